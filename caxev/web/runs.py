"""The page's table of all runs: where their copies are, the latest changes, and the links. Pure.

Most runs have the same copies as many others. So a run costs one entry of a dictionary that refers
to a *shape*, its copies with their statuses, of which there are few. Counters by host, type and
status are kept by adding and taking away shapes.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from heapq import heappush, heappushpop
from typing import Any, Final, NamedTuple, TypeAlias

from attrs import define, field, frozen

from caxev.core.entry import as_utc, count, text
from caxev.core.model import TRANSFERRED, TRANSFERRING, UNKNOWN, CopyKey, RunId
from caxev.web.documents import entries_of, key_of, label_of, size_of
from caxev.web.growth import HELD, Growth

CHANGES_KEPT: Final = 10_000
"""The latest changes of copies that are kept."""
HOURS_KEPT: Final = 7 * 24
"""Hours for which transfers are counted, by link."""

Shape: TypeAlias = tuple[tuple[CopyKey, str], ...]
"""A run's copies with their statuses, in the order of the keys' texts."""


class CopyGroup(NamedTuple):
    """The key of the counts of copies."""

    host: str
    type: str
    status: str


@frozen
class Change:
    """A copy's status changed at `at` (UTC). `before` or `after` is None if there is no copy."""

    number: int
    at: datetime
    run: RunId
    label: str
    key: CopyKey
    before: str | None
    after: str | None


@frozen
class Moving:
    """A copy that is being made from the one at `source`, by the reaction `trigger`.

    `label` is what the run is called; `size`: bytes of its raw data, if it is that.
    """

    run: RunId
    label: str
    key: CopyKey
    source: str | None
    trigger: str | None
    since: datetime | None
    size: int | None

    @property
    def site(self) -> str | None:
        """The site that makes it, if one of ours does."""
        return self.trigger.partition(": ")[0] if self.trigger else None


@define
class Arrivals:
    """Copies and bytes that arrived over a link in an hour."""

    copies: int = 0
    bytes: int = 0


def _moving(document: Mapping[str, Any], key: CopyKey, entry: Mapping[str, Any]) -> Moving:
    size = count(document.get("raw_size_byte")) if key.type == "raw" else None
    since = as_utc(entry.get("status_since"))
    source, trigger = text(entry.get("source")), text(entry.get("trigger"))
    return Moving(document["_id"], label_of(document), key, source, trigger, since, size)


def shape_of(document: Mapping[str, Any]) -> Shape:
    """Return a run's copies with their statuses. If entries have one key, the first counts."""
    found: dict[CopyKey, str] = {}
    for entry in entries_of(document):
        if (key := key_of(entry)) is not None:
            found.setdefault(key, text(entry.get("status")) or UNKNOWN)
    return tuple(sorted(found.items(), key=lambda one: (*one[0][:2], one[0].version or "")))


@define(eq=False)
class Links:
    """Arrivals over each link, from host to host, by the hour."""

    hours: dict[tuple[str, str], dict[datetime, Arrivals]] = field(factory=dict)

    def note(self, document: Mapping[str, Any], changes: list[Change]) -> None:
        """Count the copies that have just arrived."""
        # An entry that begins as `transferred` was registered: nothing came over a link.
        arrived: set[CopyKey | None] = {
            one.key for one in changes if one.after == TRANSFERRED and one.before is not None
        }
        for entry in entries_of(document):
            if (key := key_of(entry)) in arrived:
                arrived.discard(key)
                self.arrived(entry, size_of(document, entry))

    def arrived(self, entry: Mapping[str, Any], size: int) -> None:
        """Count a good copy of so many bytes by the hour in which it became good."""
        source, host, at = entry.get("source"), entry.get("host"), as_utc(entry.get("status_since"))
        if entry.get("status") != TRANSFERRED or at is None:
            return
        if not isinstance(source, str) or not isinstance(host, str) or source == host:
            return
        hours = self.hours.setdefault((source, host), {})
        hour = hours.setdefault(at.replace(minute=0, second=0, microsecond=0), Arrivals())
        hour.copies += 1
        hour.bytes += size
        # Only when there are twice as many: sorting them at each arrival would cost more.
        if len(hours) > 2 * HOURS_KEPT:
            for old in sorted(hours)[:-HOURS_KEPT]:
                del hours[old]

    def within(self, now: datetime, hours: int) -> dict[tuple[str, str], Arrivals]:
        """Return what arrived over each link in the last hours, the current one included."""
        since = now.astimezone(UTC) - timedelta(hours=hours)
        found: dict[tuple[str, str], Arrivals] = {}
        for link, by_hour in self.hours.items():
            some = [one for hour, one in by_hour.items() if hour + timedelta(hours=1) > since]
            if some:
                total = Arrivals(sum(one.copies for one in some), sum(one.bytes for one in some))
                found[link] = total
        return found


@define(eq=False)
class KnownRuns:
    """All runs, in little memory. `put` and `drop` return the changes that they are."""

    counts: Counter[CopyGroup] = field(factory=Counter)
    changes: deque[Change] = field(factory=lambda: deque(maxlen=CHANGES_KEPT))
    links: Links = field(factory=Links)
    growth: Growth = field(factory=Growth)
    moving: dict[tuple[RunId, CopyKey], Moving] = field(factory=dict)
    """The copies that are being made."""
    _shapes: dict[RunId, Shape] = field(factory=dict)
    _uses: dict[Shape, list[Any]] = field(factory=dict)
    """Each shape with itself, the one object that all runs refer to, and by how many."""
    _first: list[tuple[datetime, int, Change]] | None = field(factory=list)
    """The latest changes found by the first pass, as a heap; None once that has ended."""
    _numbers: Iterator[int] = field(init=False, factory=lambda: itertools.count(1))

    def __len__(self) -> int:
        return len(self._shapes)

    def __contains__(self, run: RunId) -> bool:
        return run in self._shapes

    @property
    def ids(self) -> set[RunId]:
        return set(self._shapes)

    def put(self, document: Mapping[str, Any], now: datetime) -> list[Change]:
        """Take a run as it is now; return what changed, in no order."""
        run = document["_id"]
        before, after = self._shapes.get(run, ()), shape_of(document)
        self._note_moving(document, before, after)
        if self._first is not None and not before:
            self._note_first(document, now)
        self.growth.sized(document, now)
        if before == after:
            # A run without copies has the same shape as one that is unknown.
            if run not in self._shapes:
                self._replace(run, before, after)
            return []
        self._replace(run, before, after)
        if self._first is not None:
            return []  # what the first pass finds was there before
        changes = list(self._between(run, document, dict(before), dict(after), now))
        self.changes.extend(changes)
        self.links.note(document, changes)
        self._note_growth(document, changes, now)
        return changes

    def drop(self, run: RunId, now: datetime) -> list[Change]:
        """Forget a run that was deleted."""
        before = self._shapes.pop(run, None)
        if before is None:
            return []
        for key, _ in before:
            self.moving.pop((run, key), None)
        self._release(before)
        gone = [
            Change(next(self._numbers), now, run, str(run), key, status, None)
            for key, status in before
        ]
        self.changes.extend(gone)
        return gone

    def begin(self) -> None:
        """Note that the first pass has ended: from now on differences are changes."""
        if self._first is not None:
            self.changes.extend(change for _, _, change in sorted(self._first, key=lambda o: o[:2]))
            self._first = None

    def _note_moving(self, document: Mapping[str, Any], before: Shape, after: Shape) -> None:
        run = document["_id"]
        for key, status in before:
            if status == TRANSFERRING:
                self.moving.pop((run, key), None)
        wanted: set[CopyKey | None] = {key for key, status in after if status == TRANSFERRING}
        for entry in entries_of(document) if wanted else ():
            if (found := key_of(entry)) in wanted and found is not None:
                wanted.discard(found)
                self.moving[run, found] = _moving(document, found, entry)

    def _note_growth(
        self, document: Mapping[str, Any], changes: Iterable[Change], now: datetime
    ) -> None:
        arrived = set()
        for one in changes:
            if one.after == TRANSFERRED:
                arrived.add(one.key)
            elif one.after is None and one.before in HELD:
                self.growth.left(document, one.key, now)
        for entry in entries_of(document) if arrived else ():
            if (key := key_of(entry)) in arrived:
                arrived.discard(key)
                self.growth.came(document, entry, now)

    def _note_first(self, document: Mapping[str, Any], now: datetime) -> None:
        assert self._first is not None
        self.growth.note_all(document, now)
        for entry in entries_of(document):
            at, key = as_utc(entry.get("status_since")), key_of(entry)
            if at is None or key is None:
                continue
            self.links.arrived(entry, size_of(document, entry))
            if len(self._first) == CHANGES_KEPT and at <= self._first[0][0]:
                continue
            status = text(entry.get("status"))
            number, run = next(self._numbers), document["_id"]
            change = Change(number, at, run, label_of(document), key, None, status)
            push = heappush if len(self._first) < CHANGES_KEPT else heappushpop
            push(self._first, (at, change.number, change))

    def _replace(self, run: RunId, before: Shape, after: Shape) -> None:
        if run in self._shapes:
            self._release(before)
        use = self._uses.setdefault(after, [after, 0])
        use[1] += 1
        self._shapes[run] = use[0]
        for key, status in after:
            self.counts[CopyGroup(key.host, key.type, status)] += 1

    def _release(self, shape: Shape) -> None:
        use = self._uses[shape]
        use[1] -= 1
        if not use[1]:
            del self._uses[shape]
        for key, status in shape:
            place = CopyGroup(key.host, key.type, status)
            self.counts[place] -= 1
            if not self.counts[place]:
                del self.counts[place]

    def _between(
        self,
        run: RunId,
        document: Mapping[str, Any],
        before: Mapping[CopyKey, str],
        after: Mapping[CopyKey, str],
        now: datetime,
    ) -> Iterator[Change]:
        label, since = label_of(document), _since(document)
        for key in dict.fromkeys((*before, *after)):
            old, new = before.get(key), after.get(key)
            if old != new:
                at = since.get(key, now) if new is not None else now
                yield Change(next(self._numbers), at, run, label, key, old, new)


def _since(document: Mapping[str, Any]) -> dict[CopyKey, datetime]:
    """Return since when each copy has had its status, if one of us has set it."""
    found: dict[CopyKey, datetime] = {}
    for entry in entries_of(document):
        at, key = as_utc(entry.get("status_since")), key_of(entry)
        if at is not None and key is not None:
            found.setdefault(key, at)
    return found
