"""Alarms by HTTP: to Slack (and what is shaped like it), to PagerDuty, or as plain JSON."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Mapping
from hashlib import sha256
from http.client import HTTPException
from typing import Any, Final, Self
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

import trio
from attrs import define, field

from caxev.alarms.base import PATIENCE, Undelivered, in_thread, lines, sentence
from caxev.config import ConfigError, Webhook, secret
from caxev.core.alarms import Alarm
from caxev.core.clock import utcnow

LONGEST_KEY: Final = 255
GATEWAY: Final = {502, 503, 504}
"""What a gateway answers while the server behind it is away."""
"""Characters that PagerDuty takes for the key by which it knows an incident again."""


class _Stay(urllib.request.HTTPRedirectHandler):
    """A POST that is sent elsewhere would arrive as a GET: that is a failure, not a delivery."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


@define(eq=False)
class Hook:
    """One address to which JSON is posted. Redirects are not followed; certificates are checked."""

    shape: str
    url: str = field(repr=False)
    token: str | None = field(repr=False)
    resolves: bool = True
    _limiter: trio.CapacityLimiter = field(init=False, factory=lambda: trio.CapacityLimiter(1))

    @classmethod
    def of(cls, options: Webhook) -> Self:
        """Look for the secret. Raises `ConfigError` where there should be one and is none."""
        found = secret(options.secret)
        where = f"set {options.secret}, or {options.secret}_FILE to a file that holds it"
        if options.shape == "pagerduty" and found is None:
            raise ConfigError(f"there is no integration key: {where}")
        if options.url is not None:
            return cls(options.shape, options.url, found)
        if found is None:
            raise ConfigError(f"there is no url: {where}")
        _check(options.secret, found)
        return cls(options.shape, found, None)

    async def send(self, alarm: Alarm, *, over: bool) -> None:
        """See `Notifier`."""
        body = json.dumps(BODIES[self.shape](alarm, over, self.token)).encode()
        await in_thread(lambda: self._post(body), self._limiter)

    def _post(self, body: bytes) -> None:
        where = urlsplit(self.url).netloc.rpartition("@")[2]  # Slack's path is a secret
        headers = {"Content-Type": "application/json", "User-Agent": "caxev"}
        if self.shape == "json" and self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        request = urllib.request.Request(self.url, body, headers)  # noqa: S310  # http(s): checked
        try:
            with urllib.request.build_opener(_Stay).open(request, timeout=PATIENCE) as answer:
                answer.read(1000)
        except HTTPError as error:
            if error.code in GATEWAY:
                error.close()
                raise Undelivered(f"{where} is away: its gateway answered {error.code}") from None
            with error:
                said = " ".join(error.read(200).decode(errors="replace").split())
            raise Undelivered(f"{where} answered {error.code} {said}") from None
        except URLError as error:
            raise Undelivered(f"{where}: {error.reason}") from None
        except (HTTPException, OSError, ValueError) as error:
            # Their messages may hold the address.
            raise Undelivered(f"{where}: {type(error).__name__}") from None


def _check(name: str, url: str) -> None:
    """Raise `ConfigError` where that secret is no address, in words that do not repeat it."""
    try:
        parts = urlsplit(url)
        scheme, host, user = parts.scheme, parts.hostname, parts.username
        _ = parts.port
    except ValueError:  # its message may hold the address
        scheme, host, user = "", None, None
    if scheme not in {"https", "http"} or not host or not url.isprintable():
        raise ConfigError(f"{name} holds no address: it begins with https://") from None
    if user is not None:
        raise ConfigError(f"{name} must be an address without a user: nothing before an @")


def slack(alarm: Alarm, over: bool, token: str | None) -> Mapping[str, Any]:
    """A message as Slack, Mattermost and Rocket.Chat take it."""
    del token
    mark = ":white_check_mark:" if over else ":rotating_light:"
    text = "\n".join([sentence(alarm, over=over), *([] if over else lines(alarm))])
    for character, name in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(character, name)
    return {"text": f"{mark} {text}"}


def pagerduty(alarm: Alarm, over: bool, token: str | None) -> Mapping[str, Any]:
    """An event of PagerDuty's Events API v2: it triggers an incident, or resolves it."""
    key = f"{alarm.site}: {alarm.key}"
    if len(key) > LONGEST_KEY:
        key = sha256(key.encode()).hexdigest()
    event: dict[str, Any] = {
        "routing_key": token,
        "event_action": "resolve" if over else "trigger",
        "dedup_key": key,
    }
    if not over:
        event["client"] = "caxev"
        event["payload"] = {
            "summary": sentence(alarm, over=False),
            "source": alarm.site,
            "severity": alarm.severity.value,
            "component": "caxev",
            "timestamp": utcnow().isoformat(),
            "custom_details": {"run": alarm.run, **alarm.details},
        }
    return event


def plain(alarm: Alarm, over: bool, token: str | None) -> Mapping[str, Any]:
    """All that there is to say, for a program of one's own."""
    del token
    return {
        "site": alarm.site,
        "key": alarm.key,
        "state": "over" if over else "raised",
        "severity": alarm.severity.value,
        "summary": alarm.summary,
        "run": alarm.run or None,
        "details": dict(alarm.details),
        "at": utcnow().isoformat(),
    }


BODIES: Final[Mapping[str, Callable[[Alarm, bool, str | None], Mapping[str, Any]]]] = {
    "slack": slack,
    "pagerduty": pagerduty,
    "json": plain,
}
