"""How many bytes came to each host, and left it: by the hour for a day, by the day for a quarter.

Pure. It is made from the runs' documents: when each copy arrived, and when one was
deleted. So one pass over the runs gives all of it, and it costs a number a day for each host and
type, however many runs there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeAlias

from attrs import define, field

from caxev.core.entry import as_utc
from caxev.core.model import DELETING, ERROR, TRANSFERRED, CopyKey, RunId
from caxev.web.documents import entries_of, key_of, size_of

DAYS_KEPT: Final = 91
HOURS_KEPT: Final = 25
PRESENT: Final = timedelta(hours=24)
"""The last hours, over which the present rate is averaged."""
AT_ONCE: Final = timedelta(minutes=1)
"""A copy that becomes good so long after its arrival was there before, and is only good again."""
UNSIZED: Final = 10_000
"""Maximum number of runs whose size is not known yet."""
HELD: Final = frozenset({TRANSFERRED, ERROR, DELETING})
"""The statuses of a copy whose bytes have arrived."""

HostType: TypeAlias = tuple[str, str]
"""The key of the counts of bytes: host and type of data."""
Series: TypeAlias = dict[datetime, int]


@define(eq=False)
class Growth:
    """Bytes that came, less those that left: of each host by the hour, of its types by the day."""

    hours: dict[str, Series] = field(factory=dict)
    days: dict[HostType, Series] = field(factory=dict)
    _unsized: dict[RunId, list[tuple[CopyKey, datetime]]] = field(factory=dict)
    """Raw copies that came before the size of their run was known."""

    def note_all(self, document: Mapping[str, Any], now: datetime) -> None:
        """Count all that came and went of a run that is read for the first time."""
        for entry in entries_of(document):
            if entry.get("status") in HELD:
                self._arrived(document, entry, _arrival(entry), now)
        for former in entries_of(document, "deleted_data"):
            size = size_of(document, former)
            # If it is not known when it came, it was there for all of the time that is shown.
            if (came := as_utc(former.get("arrived_at"))) is not None:
                self._note(came, key_of(former), size, now)
            self._note(as_utc(former.get("date")), key_of(former), -size, now)

    def came(self, document: Mapping[str, Any], entry: Mapping[str, Any], now: datetime) -> None:
        """Count a copy that has become good, if it has just arrived."""
        since, arrived = as_utc(entry.get("status_since")), as_utc(entry.get("arrived_at"))
        if since is None or arrived is None or since - arrived <= AT_ONCE:
            self._arrived(document, entry, since or arrived or now, now)

    def sized(self, document: Mapping[str, Any], now: datetime) -> None:
        """Count the raw copies that came before the size of the run was known, if it is now."""
        run = document["_id"]
        if run in self._unsized and (size := size_of(document, {"type": "raw"})):
            for key, at in self._unsized.pop(run):
                self._note(at, key, size, now)

    def left(self, document: Mapping[str, Any], key: CopyKey, now: datetime) -> None:
        """Count a copy that is gone."""
        former = [one for one in entries_of(document, "deleted_data") if key_of(one) == key]
        last = former[-1] if former else {"type": key.type}
        self._note(as_utc(last.get("date")) or now, key, -size_of(document, last), now)

    def rate(self, host: str, now: datetime) -> float:
        """Return by how many bytes a second a host has grown in the last 24 hours."""
        hours = self.hours.get(host, {})
        since = now - PRESENT
        return sum(size for hour, size in hours.items() if hour > since) / PRESENT.total_seconds()

    def totals(self, host: str, kind: str, size: int, now: datetime) -> list[int]:
        """Return how much of a type a host had at the end of each day, if it has `size` now."""
        days = self.days.get((host, kind), {})
        today, found = _day(now), [size]
        for back in range(DAYS_KEPT - 1):
            found.append(max(found[-1] - days.get(today - timedelta(days=back), 0), 0))
        return found[::-1]

    def _arrived(
        self,
        document: Mapping[str, Any],
        entry: Mapping[str, Any],
        at: datetime | None,
        now: datetime,
    ) -> None:
        key, size = key_of(entry), size_of(document, entry)
        if not size and key is not None and key.type == "raw" and at is not None:
            self._unsized.setdefault(document["_id"], []).append((key, at))
            if len(self._unsized) > UNSIZED:
                del self._unsized[next(iter(self._unsized))]
        self._note(at, key, size, now)

    def _note(self, at: datetime | None, key: CopyKey | None, size: int, now: datetime) -> None:
        if at is None or key is None or not size:
            return
        at = min(at.astimezone(UTC), now)  # another clock may be ahead
        if now - at < timedelta(days=DAYS_KEPT):
            _add(self.days.setdefault((key.host, key.type), Counter()), _day(at), size, DAYS_KEPT)
        if now - at < PRESENT:
            hour = at.replace(minute=0, second=0, microsecond=0)
            _add(self.hours.setdefault(key.host, Counter()), hour, size, HOURS_KEPT)


def _add(series: Series, at: datetime, size: int, most: int) -> None:
    series[at] = series.get(at, 0) + size
    if len(series) > most:
        del series[min(series)]


def _day(moment: datetime) -> datetime:
    return moment.replace(hour=0, minute=0, second=0, microsecond=0)


def _arrival(entry: Mapping[str, Any]) -> datetime | None:
    names = ("arrived_at", "status_since", "creation_time")
    return next(filter(None, (as_utc(entry.get(name)) for name in names)), None)
