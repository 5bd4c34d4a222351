"""The sinks of a site's alarms: the key ``alarms`` of sites.json.

::

    "alarms": [
      {"email": {"to": ["shift@example.org"], "host": "smtp.example.org", "user": "caxev"}},
      {"webhook": {"shape": "pagerduty", "severity": "error"}}
    ]

`caxev.alarms` makes notifiers of them. No secret is in the file: ``secret`` is the name that
`caxev.config.secret` reads. Pure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from attrs import Factory, field, frozen

from caxev.config.errors import Problems, hint, shown
from caxev.config.plugins import entry_points
from caxev.config.reading import keys, read
from caxev.config.values import Kind, Port, check, listed, matching, number, one_of, printable
from caxev.core.alarms import DeliveryRule, Severity

ALARMS: Final = "caxev.alarms"
"""The entry point group of further kinds of sinks; see `caxev.alarms`."""
SECRETS: Final[Mapping[str, str]] = {
    "email": "CAXEV_SMTP_PASSWORD",
    "slack": "CAXEV_SLACK_URL",
    "pagerduty": "CAXEV_PAGERDUTY_KEY",
    "json": "CAXEV_WEBHOOK_TOKEN",
}
_PORTS: Final[Mapping[str, int]] = {"starttls": 587, "tls": 465, "none": 25}
_PAGERDUTY: Final = "https://events.pagerduty.com/v2/enqueue"
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})


def web_address(value: Any) -> str:
    """Read an address without a user. Raises ValueError, whose message may repeat it."""
    parts = urlsplit(printable(value))
    check(parts.scheme in {"https", "http"} and parts.hostname and " " not in value)
    check(parts.port != 0)  # asked for, as it may be no port
    check(parts.username is None)  # a password would follow, and belongs in no file
    return str(value)


# No white space: a line break would add a header to the mail.
_address: Final = matching(r"[^@\s,<>]+@[^@\s,<>]+")
_Secret = Annotated[
    str, Kind('the name of a secret, as "CAXEV_SMTP_PASSWORD"', matching("[A-Z][A-Z0-9_]*"))
]


@frozen(kw_only=True)
class Sink:
    """An address to which a site's alarms are delivered."""

    name: Annotated[
        str, Kind("a name of letters, digits, - and _", matching("[A-Za-z0-9_-]{1,40}"))
    ] = Factory(lambda self: self.kind, takes_self=True)
    """The sink's name in lists; by default its kind."""
    severity: Annotated[Severity, one_of(*(one.value for one in Severity))] = field(
        default=Severity.WARNING, converter=Severity
    )
    """The least severity that is delivered."""
    repeat: Annotated[
        float, Kind("a number of hours, more than 0", number(above=0, high=24 * 366))
    ] = 24.0
    """Hours after which an active alarm is delivered again."""

    @property
    def kind(self) -> str:
        """Its key in the file: ``email`` for an `Email`."""
        return type(self).__name__.lower()

    def rule(self, *, resolves: bool) -> DeliveryRule:
        """Return which alarms it receives, and when."""
        return DeliveryRule(self.name, self.severity, timedelta(hours=self.repeat), resolves)


@frozen(kw_only=True)
class Email(Sink):
    """Mail by SMTP. Raises ValueError for a password without TLS."""

    to: Annotated[tuple[str, ...], Kind('addresses, as ["shift@example.org"]', listed(_address, 1))]
    """The recipients."""
    from_: Annotated[str | None, Kind('an address, as "caxev@example.org"', _address)] = None
    """The sender; by default caxev at this machine."""
    host: Annotated[str, Kind("a host's name", printable)] = "localhost"
    """The mail server."""
    user: Annotated[str | None, Kind("a text", printable)] = None
    """The user at the mail server, if it requires a login."""
    security: Annotated[str, one_of(*_PORTS)] = field()
    """How the connection is encrypted: by default ``starttls``, or ``none`` for localhost without
    a user. With a user ``none`` is refused."""
    port: Port = Factory(lambda self: _PORTS[self.security], takes_self=True)
    """The mail server's port; by default 587 (``starttls``), 465 (``tls``) or 25 (``none``)."""
    secret: _Secret = SECRETS["email"]
    """The name of the user's password: see below."""

    @security.default
    def _security(self) -> str:
        return "none" if self.host in _LOOPBACK and self.user is None else "starttls"

    def __attrs_post_init__(self) -> None:
        if self.user is not None and self.security == "none":
            raise ValueError("user's password would go in the clear: take out security, or user")


@frozen(kw_only=True)
class Webhook(Sink):
    """A POST of JSON. Raises ValueError if there is no address to post to."""

    shape: Annotated[str, one_of("slack", "pagerduty", "json")]
    """The form of a post: a message (``slack``, also for Mattermost and Rocket.Chat), an event of
    the Events API v2, or all fields of the alarm, for a program of yours."""
    url: Annotated[
        str | None,
        Kind("an address that begins with https:// (or http://), without a user", web_address),
    ] = Factory(lambda self: _PAGERDUTY if self.shape == "pagerduty" else None, takes_self=True)
    """The address to post to. By default PagerDuty's own, and for ``slack`` the secret."""
    secret: _Secret = Factory(lambda self: SECRETS[self.shape], takes_self=True)
    """The name of Slack's address, PagerDuty's integration key or the bearer token: see below. By
    default ``CAXEV_SLACK_URL``, ``CAXEV_PAGERDUTY_KEY`` or ``CAXEV_WEBHOOK_TOKEN``."""

    def __attrs_post_init__(self) -> None:
        if self.shape == "json" and self.url is None:
            raise ValueError("url is missing: where to post")


@frozen(kw_only=True)
class Installed(Sink):
    """A sink of a kind that an entry point of `ALARMS` names; `options` are its other keys."""

    kind: str
    options: Mapping[str, Any] = field(repr=False)


KINDS: Final[Mapping[str, type[Sink]]] = {"email": Email, "webhook": Webhook}


def read_alarms(value: Any) -> tuple[Sink, ...]:
    """Read a site's ``alarms``.

    Raises ValueError unless it is a list of objects with one key each, and `Problems` for mistakes
    in these.
    """
    check(isinstance(value, list))
    check(all(isinstance(entry, dict) and len(entry) == 1 for entry in value))
    problems: list[str] = []
    sinks = []
    for entry in value:
        ((kind, given),) = entry.items()
        try:
            sinks.append(_sink(kind, given))
        except Problems as error:
            problems += [f"{kind!r}: {line}" for line in error.lines]
    for name, times in Counter(sink.name for sink in sinks).items():
        if times > 1:
            problems.append(f"{times} of them are called {name!r}: give each a name of its own")
    if problems:
        raise Problems(problems)
    return tuple(sinks)


def _sink(kind: str, given: Any) -> Sink:
    if kind not in KINDS and not entry_points(group=ALARMS, name=kind):
        raise Problems([f"unknown kind ({hint(kind, KINDS, 'known: ' + ', '.join(KINDS))})"])
    if not isinstance(given, dict):
        raise Problems([f"must be an object, not {shown(given)}"])
    if kind in KINDS:
        known: Sink = read(KINDS[kind], given)
        return known
    common = read(Sink, {key: value for key, value in given.items() if key in keys(Sink)})
    options = {key: value for key, value in given.items() if key not in keys(Sink)}
    rule = {"severity": common.severity, "repeat": common.repeat}
    return Installed(kind=kind, name=given.get("name") or kind, options=options, **rule)
