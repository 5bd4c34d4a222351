"""To whom a site's alarms go: the key ``alarms`` of sites.json.

::

    "alarms": [
      {"email": {"to": ["shift@example.org"], "host": "smtp.example.org", "user": "caxev"}},
      {"webhook": {"shape": "pagerduty", "severity": "error"}}
    ]

`sites` reads this; `caxev.alarms` makes the notifiers. Secrets do not stand here: ``secret``
names what `caxev.config.secret` looks for. Pure.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import timedelta
from importlib.metadata import entry_points
from math import isfinite
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

from attrs import field, frozen

from caxev.config.errors import Problems, nearest
from caxev.core.alarms import Rule, Severity

KINDS: Final = ("email", "webhook")
ALARMS: Final = "caxev.alarms"
"""The entry point group in which others name notifiers of their own; see `caxev.alarms`."""
SHAPES: Final = ("slack", "pagerduty", "json")
SECURITY: Final = ("starttls", "tls", "none")
PORTS: Final[Mapping[str, int]] = {"starttls": 587, "tls": 465, "none": 25}
SECRETS: Final[Mapping[str, str]] = {
    "email": "CAXEV_SMTP_PASSWORD",
    "slack": "CAXEV_SLACK_URL",
    "pagerduty": "CAXEV_PAGERDUTY_KEY",
    "json": "CAXEV_WEBHOOK_TOKEN",
}
"""The secret's name, unless ``secret`` gives another."""
PAGERDUTY: Final = "https://events.pagerduty.com/v2/enqueue"


@frozen
class Email:
    """Mail by SMTP. `secret` is the name of the password, used where there is a `user`."""

    to: tuple[str, ...]
    sender: str | None
    host: str
    port: int
    security: str
    user: str | None
    secret: str


@frozen
class Webhook:
    """A POST of JSON. `secret` is the name of the address (Slack), the key or the token."""

    shape: str
    url: str | None
    secret: str


@frozen
class Sink:
    """One address to which a site's alarms go. `options` are as the kind asks for."""

    kind: str
    name: str
    options: Email | Webhook | Mapping[str, Any] = field(repr=False)
    severity: Severity = Severity.WARNING
    repeat: float = 24.0

    def rule(self, *, resolves: bool) -> Rule:
        """What it is told."""
        return Rule(self.name, self.severity, timedelta(hours=self.repeat), resolves)


class _Shape(NamedTuple):
    words: str
    read: Callable[[Any], Any]


def _sure(fits: bool) -> None:
    if not fits:
        raise ValueError


def _text(value: Any) -> str:
    _sure(isinstance(value, str) and bool(value) and value.isprintable())
    return str(value)


def _address(value: Any) -> str:
    _sure(re.fullmatch(r"[^@\s,<>]+@[^@\s,<>]+", _text(value)) is not None)
    return str(value)


def _addresses(value: Any) -> tuple[str, ...]:
    _sure(isinstance(value, list) and bool(value))
    return tuple(map(_address, value))


def _port(value: Any) -> int:
    _sure(isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**16)
    return int(value)


def _one_of(*words: str) -> _Shape:
    def read(value: Any) -> str:
        _sure(isinstance(value, str) and value in words)
        return str(value)

    return _Shape(f"one of {', '.join(words)}", read)


def _url(value: Any) -> str:
    parts = urlsplit(_text(value))
    _sure(parts.scheme in {"https", "http"} and bool(parts.hostname) and " " not in value)
    _sure(parts.username is None)
    return str(value)


def _secret(value: Any) -> str:
    _sure(re.fullmatch(r"[A-Z][A-Z0-9_]*", _text(value)) is not None)
    return str(value)


def _name(value: Any) -> str:
    _sure(re.fullmatch(r"[A-Za-z0-9_-]{1,40}", _text(value)) is not None)
    return str(value)


def _hours(value: Any) -> float:
    _sure(isinstance(value, int | float) and not isinstance(value, bool))
    _sure(isfinite(value) and 0 < value <= 24 * 366)
    return float(value)


_COMMON: Final[Mapping[str, _Shape]] = {
    "name": _Shape("a name of letters, digits, - and _", _name),
    "severity": _one_of(*(severity.value for severity in Severity)),
    "repeat": _Shape("a number of hours, more than 0", _hours),
}
_NAMED_SECRET: Final = _Shape('the name of a secret, as "CAXEV_SMTP_PASSWORD"', _secret)
_KEYS: Final[Mapping[str, Mapping[str, _Shape]]] = {
    "email": {
        "to": _Shape('addresses, as ["shift@example.org"]', _addresses),
        "from": _Shape('an address, as "caxev@example.org"', _address),
        "host": _Shape("a host's name", _text),
        "port": _Shape("a port, 1 to 65535", _port),
        "security": _one_of(*SECURITY),
        "user": _Shape("a text", _text),
        "secret": _NAMED_SECRET,
    },
    "webhook": {
        "shape": _one_of(*SHAPES),
        "url": _Shape("an address that begins with https:// (or http://), without a user", _url),
        "secret": _NAMED_SECRET,
    },
}


def read_alarms(value: Any) -> tuple[Sink, ...]:
    """Read a site's ``alarms``.

    Raises ValueError where it is no list of objects with one key each, `Problems` where their
    inner values are wrong.
    """
    _sure(isinstance(value, list))
    _sure(all(isinstance(entry, dict) and len(entry) == 1 for entry in value))
    problems: list[str] = []
    sinks = []
    for entry in value:
        ((kind, keys),) = entry.items()
        sinks.append(_sink(kind, keys, problems))
    for name, times in Counter(sink.name for sink in sinks if sink).items():
        if times > 1:
            problems.append(f"{times} of them are called {name!r}: give each a name of its own")
    if problems:
        raise Problems(problems)
    return tuple(sink for sink in sinks if sink)


def _sink(kind: str, keys: Any, problems: list[str]) -> Sink | None:
    foreign = kind not in KINDS
    if foreign and not entry_points(group=ALARMS, name=kind):
        guess = nearest(kind, KINDS)
        hint = f"did you mean {guess!r}?" if guess else f"known: {', '.join(KINDS)}"
        problems.append(f"unknown kind {kind!r} ({hint})")
        return None
    if not isinstance(keys, dict):
        problems.append(f"{kind!r}: must be an object, not {_shown(keys)}")
        return None
    before = len(problems)
    common = _read(kind, {k: v for k, v in keys.items() if k in _COMMON}, _COMMON, problems)
    rest = {k: v for k, v in keys.items() if k not in _COMMON}
    given = rest if foreign else _read(kind, rest, _KEYS[kind], problems)
    if not foreign:
        problems.extend(f"{kind!r}: {line}" for line in _lacking(kind, rest))
    if len(problems) > before:
        return None
    common.setdefault("name", kind)
    if "severity" in common:
        common["severity"] = Severity(common["severity"])
    return Sink(kind=kind, options=given if foreign else _OPTIONS[kind](given), **common)


def _read(
    kind: str, given: Mapping[str, Any], shapes: Mapping[str, _Shape], problems: list[str]
) -> dict[str, Any]:
    """Read the values that are given; null stands for the default."""
    found: dict[str, Any] = {}
    for key, value in given.items():
        if key not in shapes:
            problems.extend(_unknown(kind, key))
        elif value is not None:
            try:
                found[key] = shapes[key].read(value)
            except ValueError:
                shown = _shown(value)
                problems.append(f"{kind!r}: {key} must be {shapes[key].words}, not {shown}")
    return found


def _lacking(kind: str, given: Mapping[str, Any]) -> list[str]:
    if kind == "email" and given.get("to") is None:
        return ['to is missing: name who is to be told, as ["shift@example.org"]']
    if kind == "email" and given.get("user") and given.get("security") == "none":
        return ["user's password would go in the clear: take out security, or user"]
    if kind == "webhook" and given.get("shape") is None:
        return [f"shape is missing: one of {', '.join(SHAPES)}"]
    if given.get("shape") == "json" and given.get("url") is None:
        return ["url is missing: where to post"]
    return []


def _email(given: Mapping[str, Any]) -> Email:
    host = given.get("host", "localhost")
    local = host in {"localhost", "127.0.0.1", "::1"}
    open_to = local and given.get("user") is None
    security = given.get("security", "none" if open_to else "starttls")
    return Email(
        to=given["to"],
        sender=given.get("from"),
        host=host,
        port=given.get("port", PORTS[security]),
        security=security,
        user=given.get("user"),
        secret=given.get("secret", SECRETS["email"]),
    )


def _webhook(given: Mapping[str, Any]) -> Webhook:
    shape = given["shape"]
    usual = PAGERDUTY if shape == "pagerduty" else None
    return Webhook(shape, given.get("url", usual), given.get("secret", SECRETS[shape]))


_OPTIONS: Final[Mapping[str, Callable[[Mapping[str, Any]], Email | Webhook]]] = {
    "email": _email,
    "webhook": _webhook,
}


def _unknown(kind: str, key: str) -> list[str]:
    if key.startswith("x_"):
        return []
    guess = nearest(key, (*_KEYS[kind], *_COMMON))
    hint = f"did you mean {guess!r}?" if guess else "take it out"
    return [f"{kind!r}: unknown key {key!r} ({hint}; a key of your own begins with x_)"]


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."  # noqa: PLR2004  # so that it stays a line
