"""Alarms by mail."""

from __future__ import annotations

import smtplib
import ssl
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from socket import getfqdn
from typing import Self

import trio
from attrs import define, field
from loguru import logger

from caxev.alarms.base import PATIENCE, Undelivered, in_thread, lines, sentence
from caxev.config import ConfigError, Email, secret
from caxev.core.alarms import Alarm


@define(eq=False)
class Mail:
    """Mail by SMTP to some addresses: STARTTLS, TLS, or in the clear to a relay on this machine.

    The server's certificate is checked. Mails about one alarm are one thread for a reader.
    """

    to: Email
    password: str | None = field(repr=False)
    resolves: bool = True
    _limiter: trio.CapacityLimiter = field(init=False, factory=lambda: trio.CapacityLimiter(1))

    @classmethod
    def of(cls, options: Email) -> Self:
        """Look for the password. Raises `ConfigError` where there should be one and is none."""
        if options.user is None:
            return cls(options, None)
        password = secret(options.secret)
        if password is None:
            raise ConfigError(
                f"there is no password for {options.user} at {options.host}: set "
                f"{options.secret}, or {options.secret}_FILE to a file that holds it"
            )
        return cls(options, password)

    async def send(self, alarm: Alarm, *, over: bool) -> None:
        """See `Notifier`."""
        mail = self.message(alarm, over=over)
        await in_thread(lambda: self._send(mail), self._limiter)

    def message(self, alarm: Alarm, *, over: bool) -> EmailMessage:
        """Return the mail."""
        here = getfqdn() or "localhost"
        mail = EmailMessage()
        mail["From"] = self.to.sender or f"caxev@{here}"
        mail["To"] = ", ".join(self.to.to)
        mail["Subject"] = sentence(alarm, over=over)
        mail["Date"] = formatdate(usegmt=True)
        mail["Message-ID"] = make_msgid(domain="caxev.invalid")
        mail["References"] = f"<{alarm.id}.{alarm.site}@caxev.invalid>"
        mail["Auto-Submitted"] = "auto-generated"
        mail.set_content("\n".join([alarm.summary, "", *lines(alarm), ""]))
        return mail

    def _send(self, mail: EmailMessage) -> None:
        where = f"{self.to.host}:{self.to.port}"
        try:
            with self._connected() as server:
                if self.to.user is not None:
                    server.login(self.to.user, self.password or "")
                refused = server.send_message(mail)
        except smtplib.SMTPResponseException as error:
            # What a server says to a login may hold what was sent to it.
            login = isinstance(error, smtplib.SMTPAuthenticationError)
            said = "refused the login" if login else f"said {_text(error.smtp_error)}"
            raise Undelivered(f"{where} {said} ({error.smtp_code})") from None
        except smtplib.SMTPRecipientsRefused as error:
            raise Undelivered(f"{where} takes no mail for {_refused(error.recipients)}") from None
        except (smtplib.SMTPException, OSError) as error:
            raise Undelivered(f"{where}: {error}") from error
        if refused:  # others have it: to send it again would not help
            logger.error("{} takes no mail for {}", where, _refused(refused))

    def _connected(self) -> smtplib.SMTP:
        context = ssl.create_default_context()
        if self.to.security == "tls":
            return smtplib.SMTP_SSL(self.to.host, self.to.port, timeout=PATIENCE, context=context)
        server = smtplib.SMTP(self.to.host, self.to.port, timeout=PATIENCE)
        if self.to.security == "starttls":
            try:
                server.starttls(context=context)
            except BaseException:
                server.close()
                raise
        return server


def _refused(recipients: dict[str, tuple[int, bytes]]) -> str:
    return ", ".join(f"{who} ({code} {_text(why)})" for who, (code, why) in recipients.items())


def _text(said: bytes | str) -> str:
    return said.decode(errors="replace")[:200] if isinstance(said, bytes) else said[:200]
