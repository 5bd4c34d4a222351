"""Limits of the ways between sites: rates and amounts in words, hours, and what both ends say.

`sites` reads these out of sites.json; `Site.link` and `link_between` give the outcome to whoever
moves copies. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from math import inf
from typing import Any, Final

import attrs
from attrs import evolve, frozen

from caxev.config.errors import Problems, nearest

DAY: Final = 86400.0
_UNITS: Final = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGTP", 1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGTP", 1)},
}
_AMOUNT: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([A-Za-z]+)")
_HOURS: Final = re.compile(r"([0-9]{2}):([0-9]{2})-([0-9]{2}):([0-9]{2})")


@frozen
class Hours:
    """A time of day, UTC, in seconds since midnight; where `end` is not after `begin`, it wraps."""

    begin: float
    end: float

    def opens_in(self, now: datetime) -> float:
        """Seconds until these hours begin; 0.0 within them."""
        since = self._since(now)
        return 0.0 if since < self._length else DAY - since

    def closes_in(self, now: datetime) -> float:
        """Seconds until these hours end; 0.0 outside of them, infinite for all of the day."""
        return inf if self._length == DAY else max(self._length - self._since(now), 0.0)

    @property
    def _length(self) -> float:
        return (self.end - self.begin) % DAY or DAY

    def _since(self, now: datetime) -> float:
        utc = now.astimezone(UTC)
        time = utc.hour * 3600 + utc.minute * 60 + utc.second + utc.microsecond / 1e6
        return (time - self.begin) % DAY


@frozen
class Link:
    """The limits of the way between two sites. None: no limit is named.

    `max_rate` is in bytes a second, `hours` when it is open, `transfers` how many may run
    at once, `nstreams` how many connections one of them may have.
    """

    max_rate: float | None = None
    hours: Hours | None = None
    transfers: int | None = None
    nstreams: int | None = None

    def opens_in(self, now: datetime) -> float:
        """Seconds from `now` until the hours of this link begin; 0.0: it is open."""
        return 0.0 if self.hours is None else self.hours.opens_in(now)

    def closes_in(self, now: datetime) -> float:
        """Seconds from `now` until the hours of this link end; infinite where it is always open."""
        return inf if self.hours is None else self.hours.closes_in(now)

    def within(self, other: Link) -> Link:
        """This link's limits with the other's: the smaller of two numbers, our hours first."""
        return evolve(
            self,
            max_rate=_smaller(self.max_rate, other.max_rate),
            hours=self.hours or other.hours,
            transfers=_smaller(self.transfers, other.transfers),
            nstreams=_smaller(self.nstreams, other.nstreams),
        )


def _smaller(one: Any, other: Any) -> Any:
    return min((value for value in (one, other) if value is not None), default=None)


def read_amount(value: Any) -> int:
    """Read ``500GB`` (B, kB to PB, KiB to PiB) as bytes. Raises ValueError for anything else."""
    match = _AMOUNT.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2] not in _UNITS:
        raise ValueError
    return int(Decimal(match[1]) * _UNITS[match[2]])


def read_rate(value: Any) -> float:
    """Read ``200MB/s`` as bytes a second, 1 or more. Raises ValueError for anything else."""
    if not isinstance(value, str) or not value.endswith("/s"):
        raise ValueError
    rate = float(read_amount(value.removesuffix("/s")))
    if rate < 1:
        raise ValueError
    return rate


def _hours(value: Any) -> Hours:
    match = _HOURS.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError
    begin, end = (_time(*match.group(i, i + 1)) for i in (1, 3))
    if begin in (end, DAY):
        raise ValueError
    return Hours(begin, end)


def _time(hour: str, minute: str) -> float:
    seconds = int(hour) * 3600.0 + int(minute) * 60.0
    if int(minute) > 59 or seconds > DAY:  # noqa: PLR2004  # minutes of an hour
        raise ValueError
    return seconds


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError
    return value


_READ: Final[Mapping[str, tuple[str, Callable[[Any], Any]]]] = {
    "max_rate": ('a rate, as "200MB/s", or null', read_rate),
    "hours": ('a time of day in UTC, as "20:00-06:00", or null', _hours),
    "transfers": ("a whole number, 1 or more, or null", _count),
    "nstreams": ("a whole number, 1 or more, or null", _count),
}
_keys: Final = tuple(attribute.name for attribute in attrs.fields(Link))


def read_links(value: Any) -> dict[str, Link]:
    """Read a site's ``links``: limits by the other site's name.

    Raises ValueError where it is no such object, `Problems` where its inner values are wrong.
    """
    if not isinstance(value, dict) or not all(value):
        raise ValueError
    problems: list[str] = []
    links = {name: _link(name, entry, problems) for name, entry in value.items()}
    if problems:
        raise Problems(problems)
    return links


def _link(name: str, entry: Any, problems: list[str]) -> Link:
    if not isinstance(entry, dict):
        problems.append(f"{name!r}: must be an object with limits, not {_shown(entry)}")
        return Link()
    limits: dict[str, Any] = {}
    for key, value in entry.items():
        if key not in _READ:
            problems.extend(_unknown(name, key))
        elif value is not None:
            words, read = _READ[key]
            try:
                limits[key] = read(value)
            except ValueError:
                problems.append(f"{name!r}: {key} must be {words}, not {_shown(value)}")
    return Link(**limits)


def _unknown(name: str, key: str) -> list[str]:
    if key.startswith("x_"):
        return []
    guess = nearest(key, _keys)
    hint = f"did you mean {guess!r}?" if guess else "take it out"
    return [f"{name!r}: unknown key {key!r} ({hint}; a key of your own begins with x_)"]


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."  # noqa: PLR2004  # so that it stays a line
