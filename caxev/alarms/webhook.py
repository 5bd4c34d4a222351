"""Alarms by HTTP: to Slack (and compatible chats), to PagerDuty, or as plain JSON."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Mapping
from hashlib import sha256
from html import escape
from http.client import HTTPException
from typing import Any, Final, Self
from urllib.error import URLError
from urllib.parse import urlsplit

from attrs import define, field

from caxev.alarms.base import PATIENCE, DeliveryFailed, Threaded, lines, sentence
from caxev.config import ConfigError, Webhook, secret
from caxev.config.alarms import web_address
from caxev.core.alarms import Alarm
from caxev.core.clock import utcnow

LONGEST_KEY: Final = 255
"""Characters that PagerDuty accepts for the key that identifies an incident."""
GATEWAY: Final = {502, 503, 504}
"""The statuses of a gateway while the server behind it is away."""


class _AsItIs(urllib.request.HTTPErrorProcessor):
    """Returns every answer: an error, and a redirect, which would make a GET of our POST."""

    def http_response(self, request: Any, response: Any) -> Any:  # noqa: ARG002  # the base's
        """Return the answer."""
        return response

    https_response = http_response


@define(eq=False)
class WebhookNotifier(Threaded):
    """POSTs JSON to one address. Follows no redirect; checks certificates."""

    shape: str
    url: str = field(repr=False)
    token: str | None = field(repr=False)

    @classmethod
    def of(cls, options: Webhook) -> Self:
        """Read the secret. Raises `ConfigError` if one is needed and there is none."""
        found = secret(options.secret)
        todo = f"set {options.secret}, or {options.secret}_FILE to a file that holds it"
        if options.shape == "pagerduty" and found is None:
            raise ConfigError(f"there is no integration key: {todo}")
        if options.url is not None:
            return cls(options.shape, options.url, found)
        if found is None:
            raise ConfigError(f"there is no url: {todo}")
        try:
            return cls(options.shape, web_address(found), None)
        except ValueError:  # its message may hold the address
            raise ConfigError(
                f"{options.secret} is not an address without a user that begins with https://"
            ) from None

    def deliver(self, alarm: Alarm, over: bool) -> None:
        """See `Threaded`."""
        body = dict(BODIES[self.shape](alarm, over))
        host = urlsplit(self.url).netloc.rpartition("@")[2]  # the path of Slack's is a secret
        headers = {"Content-Type": "application/json", "User-Agent": "caxev"}
        if self.shape == "pagerduty":
            body["routing_key"] = self.token
        elif self.shape == "json" and self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url, data, headers)  # noqa: S310  # http(s): checked
        try:
            with urllib.request.build_opener(_AsItIs).open(request, timeout=PATIENCE) as answer:
                # No more is read of an answer without an end.
                status, start = answer.status, answer.read(200).decode(errors="replace")
        except URLError as error:
            raise DeliveryFailed(f"{host}: {error.reason}") from None
        except (HTTPException, OSError, ValueError) as error:
            # Their messages may hold the address.
            raise DeliveryFailed(f"{host}: {type(error).__name__}") from None
        if status in GATEWAY:
            raise DeliveryFailed(f"{host} is unreachable: its gateway answered {status}")
        if not 200 <= status < 300:  # noqa: PLR2004  # HTTP's success
            raise DeliveryFailed(f"{host} answered {status} {' '.join(start.split())}")


def slack(alarm: Alarm, over: bool) -> Mapping[str, Any]:
    """Return a message for Slack, Mattermost or Rocket.Chat."""
    mark = ":white_check_mark:" if over else ":rotating_light:"
    text = "\n".join([sentence(alarm, over=over), *([] if over else lines(alarm))])
    # Escaped so that an alarm's text mentions nobody.
    return {"text": f"{mark} {escape(text, quote=False)}"}


def pagerduty(alarm: Alarm, over: bool) -> Mapping[str, Any]:
    """Return an event of PagerDuty's Events API v2: it triggers an incident, or resolves it."""
    key = f"{alarm.site}: {alarm.key}"
    if len(key) > LONGEST_KEY:
        key = sha256(key.encode()).hexdigest()
    action = "resolve" if over else "trigger"
    event: dict[str, Any] = {"event_action": action, "dedup_key": key}
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


def plain(alarm: Alarm, over: bool) -> Mapping[str, Any]:
    """Return every field of the alarm, for a program of the user's own."""
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


BODIES: Final[Mapping[str, Callable[[Alarm, bool], Mapping[str, Any]]]] = {
    "slack": slack,
    "pagerduty": pagerduty,
    "json": plain,
}
