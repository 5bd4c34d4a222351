"""The one clock of a process: every shared time comes from `utcnow`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Final

from attrs import define, frozen

DRIFT: Final = 1e-4
"""Seconds that a machine's monotonic clock may go wrong in each second."""


@frozen
class Anchor:
    """The database's time at an instant of the monotonic clock, and how wrong that may be."""

    time: datetime
    at: float
    error: float

    def read(self, at: float) -> datetime:
        """Return the database's time at another instant."""
        return self.time + timedelta(seconds=at - self.at)

    def doubt(self, at: float) -> float:
        """Return how wrong that may be, in seconds."""
        return self.error + DRIFT * abs(at - self.at)


@frozen
class Clocks:
    """The shared time `now`, and between which two it is if only one of two clocks is right."""

    now: datetime
    earliest: datetime
    latest: datetime

    @classmethod
    def at(cls, now: datetime) -> Clocks:
        """Return the time of clocks that agree."""
        return cls(now, now, now)


@define
class Clock:
    """The time that all sites share: the database's, which the monotonic clock carries on.

    `database` anchors it whenever the server shows its time, so a local clock that is wrong, or is
    set, moves nothing. Without an anchor it is the local clock. `ahead` is how far `caxev.testing`
    has moved it. The anchor holds for all processes of this machine until it is started again.
    """

    ahead: timedelta = timedelta()
    anchor: Anchor | None = None

    def note(self, server: datetime, asked: float) -> float:
        """Note the server's time from a reply to what was asked at that `time.monotonic`.

        Returns by how many seconds the time stepped. It does if the server's clock was set, or if
        another server became primary; else a better reading only replaces a worse one.
        """
        heard = monotonic()
        # The server read its clock at some moment between asking and hearing.
        half = (heard - asked) / 2
        new, old = Anchor(server + timedelta(seconds=half), heard, half + 0.001), self.anchor
        if old is None:
            # The first reading: nothing has relied on another time yet.
            self.anchor = new
            return 0.0
        # Beyond both uncertainties the difference cannot be noise: a clock was set.
        off = (new.time - old.read(heard)).total_seconds()
        stepped = abs(off) > new.error + old.doubt(heard)
        # A slow reply knows the time worse than a good anchor that has drifted a little.
        if stepped or new.error <= old.doubt(heard):
            self.anchor = new
        return off if stepped else 0.0

    def now(self) -> datetime:
        """Return the database's time, UTC."""
        # Without a database, as in tests and commands that need none.
        anchor = self.anchor
        return self._local() if anchor is None else anchor.read(monotonic()) + self.ahead

    def both(self) -> Clocks:
        """Return the time by the database's clock and by this machine's."""
        shared, local = _to_millisecond(self.now()), _to_millisecond(self._local())
        return Clocks(shared, min(shared, local), max(shared, local))

    def safe_now(self) -> datetime:
        """Return the earlier of the database's time and this machine's: past on both clocks."""
        return _to_millisecond(min(self.now(), self._local()))

    @property
    def skew(self) -> float:
        """By how many seconds this machine's clock is ahead of the database's."""
        return (self._local() - self.now()).total_seconds()

    def _local(self) -> datetime:
        return datetime.now(UTC) + self.ahead


clock: Final = Clock()


def utcnow() -> datetime:
    """Return the database's time, UTC, to the millisecond (as it is kept there). See `Clock`."""
    return _to_millisecond(clock.now())


def _to_millisecond(now: datetime) -> datetime:
    # MongoDB keeps milliseconds: a finer time would differ from itself after a round trip.
    return now.replace(microsecond=now.microsecond // 1000 * 1000)
