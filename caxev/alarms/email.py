"""Alarms by mail."""

from __future__ import annotations

import smtplib
import ssl
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from socket import getfqdn
from typing import Self

from attrs import define, field
from loguru import logger

from caxev.alarms.base import PATIENCE, DeliveryFailed, Threaded, lines, sentence
from caxev.config import ConfigError, Email, secret
from caxev.core.alarms import Alarm


@define(eq=False)
class EmailNotifier(Threaded):
    """Mail by SMTP: with STARTTLS or TLS, or in the clear to a relay on this machine.

    The server's certificate is checked. Mails about one alarm form a thread in a mail reader.
    """

    options: Email
    password: str | None = field(repr=False)

    @classmethod
    def of(cls, options: Email) -> Self:
        """Read the password. Raises `ConfigError` if one is needed and there is none."""
        password = None if options.user is None else secret(options.secret)
        if options.user is not None and password is None:
            raise ConfigError(
                f"there is no password for {options.user} at {options.host}: set "
                f"{options.secret}, or {options.secret}_FILE to a file that holds it"
            )
        # smtplib's error would hold both, and reach the log.
        if not f"{options.user or ''}{password or ''}".isascii():
            raise ConfigError(
                f"the user or the password for {options.host} is not ASCII, and cannot be sent"
            )
        return cls(options, password)

    def message(self, alarm: Alarm, *, over: bool) -> EmailMessage:
        """Return the mail."""
        mail = EmailMessage()
        mail["From"] = self.options.from_ or f"caxev@{getfqdn() or 'localhost'}"
        mail["To"] = ", ".join(self.options.to)
        mail["Subject"] = sentence(alarm, over=over)
        mail["Date"] = formatdate(usegmt=True)
        mail["Message-ID"] = make_msgid(domain="caxev.invalid")
        mail["References"] = f"<{alarm.id}.{alarm.site}@caxev.invalid>"
        mail["Auto-Submitted"] = "auto-generated"
        mail.set_content("\n".join([alarm.summary, "", *lines(alarm), ""]))
        return mail

    def deliver(self, alarm: Alarm, over: bool) -> None:
        """See `Threaded`."""
        server_name = f"{self.options.host}:{self.options.port}"
        try:
            with self._connected() as server:
                if self.options.user is not None:
                    server.login(self.options.user, self.password or "")
                refused = server.send_message(self.message(alarm, over=over))
        except smtplib.SMTPAuthenticationError as error:
            # Without the server's answer: it may repeat the password.
            why = f"refused the login ({error.smtp_code})"
            raise DeliveryFailed(f"{server_name} {why}") from None
        except smtplib.SMTPResponseException as error:
            why = f"answered {_text(error.smtp_error)} ({error.smtp_code})"
            raise DeliveryFailed(f"{server_name} {why}") from None
        except smtplib.SMTPRecipientsRefused as error:
            why = f"refuses mail for {_refused(error.recipients)}"
            raise DeliveryFailed(f"{server_name} {why}") from None
        except (smtplib.SMTPException, OSError) as error:
            raise DeliveryFailed(f"{server_name}: {error}") from error
        if refused:  # the others have it: sending again would repeat it to them, and not help
            logger.error("{} refuses mail for {}", server_name, _refused(refused))

    def _connected(self) -> smtplib.SMTP:
        host, port = self.options.host, self.options.port
        # Trusts what the machine trusts, or SSL_CERT_FILE: a site may have a CA of its own.
        context = ssl.create_default_context()
        if self.options.security == "tls":
            return smtplib.SMTP_SSL(host, port, timeout=PATIENCE, context=context)
        server = smtplib.SMTP(host, port, timeout=PATIENCE)
        if self.options.security == "starttls":
            try:
                server.starttls(context=context)
            except BaseException:
                server.close()
                raise
        return server


def _refused(recipients: dict[str, tuple[int, bytes]]) -> str:
    return ", ".join(f"{who} ({code} {_text(why)})" for who, (code, why) in recipients.items())


def _text(answer: bytes | str) -> str:
    return (answer.decode(errors="replace") if isinstance(answer, bytes) else answer)[:200]
