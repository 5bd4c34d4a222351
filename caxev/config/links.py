"""Limits of the links between sites: rates, hours, and what both ends name.

`caxev.config.sites` has these out of sites.json; `Site.link` and `link_between` give the outcome to
the code that moves copies. Pure.
"""

from __future__ import annotations

from datetime import UTC, datetime
from math import inf
from typing import Annotated, Any, Final

from attrs import evolve, frozen

from caxev.config.values import Count, Kind, Rate, check, match

DAY: Final = 86400.0


@frozen
class TimeOfDay:
    """A time of day, UTC, in seconds since midnight; if `end` is not after `begin`, it wraps."""

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


def _hours(value: Any) -> TimeOfDay:
    parts = match("([0-9]{2}):([0-5][0-9])-([0-9]{2}):([0-5][0-9])", value).groups()
    times = [int(part) for part in parts]
    begin, end = times[0] * 3600.0 + times[1] * 60.0, times[2] * 3600.0 + times[3] * 60.0
    # 24:00 is an end, of today; as a beginning it would be tomorrow. Equal ends would be never.
    check(begin < DAY and end <= DAY and begin != end)
    return TimeOfDay(begin, end)


@frozen
class Link:
    """The limits of the link between two sites. None: no limit."""

    max_rate: Rate | None = None
    """The most bytes a second, as `"200MB/s"`."""
    hours: Annotated[TimeOfDay | None, Kind('a time of day in UTC, as "20:00-06:00"', _hours)] = (
        None
    )
    """The time of day at which transfers run, in UTC; it may go over midnight. A transfer is
    interrupted when it ends, and continues when it begins again."""
    transfers: Count | None = None
    """How many transfers run at once. Reading a copy back counts as one."""
    nstreams: Count | None = None
    """How many connections one transfer may have."""

    def opens_in(self, now: datetime) -> float:
        """Seconds from `now` until the hours of this link begin; 0.0: it is open."""
        return 0.0 if self.hours is None else self.hours.opens_in(now)

    def closes_in(self, now: datetime) -> float:
        """Seconds from `now` until the hours of this link end; infinite if it is always open."""
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
