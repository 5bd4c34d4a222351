"""A light for each site: does anybody have to do something, and why. Pure.

The text carries the meaning; colour and icon repeat it.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from enum import IntEnum
from typing import Final

from attrs import frozen

from caxev.core.alarms import Severity
from caxev.core.amounts import lasting
from caxev.core.ledger import State
from caxev.web.state import LiveState, Record

LATE: Final = timedelta(minutes=15)
"""A reaction that could have run for so long is late."""
GAP_SHOWN: Final = timedelta(hours=24)
SOON: Final = 24 * 3600.0
"""A disk that will be full in so many seconds needs attention."""


class Level(IntEnum):
    """How urgent it is."""

    OFF = 0
    GOOD = 1
    WARN = 2
    BAD = 3

    @property
    def icon(self) -> str:
        """The name of its icon, and of its colour."""
        return self.name.lower()


@frozen
class Light:
    """How urgently a site needs a person, with the reasons, the worst first."""

    level: Level
    reasons: tuple[tuple[Level, str], ...]

    @property
    def words(self) -> str:
        return self.reasons[0][1]

    @property
    def others(self) -> int:
        """How many other reasons there are to do something."""
        return sum(level >= Level.WARN for level, _ in self.reasons[1:])


def is_active(record: Record, now: datetime) -> bool:
    """Return whether a listener holds the site's lease."""
    return record.expires is not None and record.expires > now and record.owner is not None


def light_of(
    state: LiveState,
    site: str,
    now: datetime,
    *,
    listens: bool = True,
    forecasts: Iterable[tuple[str, float | None]] = (),
) -> Light:
    """Return the light of a site; `listens`: whether it should have a listener.

    `forecasts`: after how many seconds the disk of each directory is full; None: it does not fill.
    """
    found = [*_listener(state, site, now, listens=listens), *_work(state, site, now)]
    record = state.sites.get(site)
    if record is not None and is_active(record, now):
        found += [(Level.BAD, f"disk away: {why}") for why in record.away.values()]
        found += [
            (Level.WARN, f"the disk of {root} is full in {lasting(seconds)}")
            for root, seconds in forecasts
            if seconds is not None and seconds < SOON
        ]
        if record.gaps and now - record.gaps[-1].found < GAP_SHOWN:
            found.append((Level.WARN, f"history was lost and made up for: {record.gaps[-1].why}"))
    reasons = sorted(found, key=lambda one: -one[0])
    return Light(reasons[0][0], tuple(reasons))


def _listener(
    state: LiveState, site: str, now: datetime, *, listens: bool
) -> list[tuple[Level, str]]:
    record = state.sites.get(site)
    if record is None or not record.epoch:
        words = "its listener was never started" if listens else "has no listener of its own"
        return [(Level.WARN if listens else Level.OFF, words)]
    if is_active(record, now):
        return [(Level.BAD, record.trouble)] if record.trouble else [(Level.GOOD, "listening")]
    if record.owner is None and not record.expires:
        return [(Level.BAD, "no listener")]
    since = f", for {_ago(record.expires, now)}" if record.expires else ""
    return [(Level.BAD, f"no listener{since}")]


def _ago(moment: datetime, now: datetime) -> str:
    return lasting(max((now - moment).total_seconds(), 0.0))


def _work(state: LiveState, site: str, now: datetime) -> list[tuple[Level, str]]:
    found = []
    alarms = state.active_alarms(site)
    severe = sum(one.alarm.severity is not Severity.WARNING for one in alarms)
    if severe:
        found.append((Level.BAD, _count(severe, "alarm")))
    elif alarms:
        found.append((Level.WARN, _count(len(alarms), "warning")))
    if failed := state.tally[site, State.FAILED]:
        found.append((Level.WARN, f"{_count(failed, 'reaction')} failed"))
    oldest = state.oldest_due(site, now)
    if oldest is not None and now - oldest > LATE:
        found.append((Level.WARN, f"work has waited for {_ago(oldest, now)}"))
    return found


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
