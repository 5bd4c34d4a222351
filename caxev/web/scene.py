"""Conclusions from the state, for the page and for ``caxev top``. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final

from attrs import define, field, frozen

from caxev.config import Sites
from caxev.core.amounts import ReportedProgress, lasting, size
from caxev.core.clock import utcnow
from caxev.core.ledger import State
from caxev.core.model import ERROR, TRANSFERRED
from caxev.web.lights import Level, Light, light_of
from caxev.web.state import LiveState, Open

YEAR: Final = 365 * 86400.0
HEADLINES: Final = {
    Level.OFF: "Nobody has to do anything",
    Level.GOOD: "Nobody has to do anything",
    Level.WARN: "Somebody should have a look",
    Level.BAD: "Somebody has to act",
}


@define(eq=False)
class Scene:
    """The input of views: the state, the sites of sites.json, and the time."""

    state: LiveState
    sites: Sites
    clock: Callable[[], datetime] = field(default=utcnow)

    @property
    def now(self) -> datetime:
        return self.clock()

    @property
    def names(self) -> list[str]:
        """The sites of sites.json in its order, then others that ever listened."""
        return list(dict.fromkeys([*self.sites, *sorted(self.state.sites)]))

    @property
    def hosts(self) -> list[str]:
        """The sites, then other hosts that have copies."""
        others = {place.host for place in self.state.runs.counts}
        return list(dict.fromkeys([*self.names, *sorted(others)]))

    def listens(self, site: str) -> bool:
        """Return whether a site should have a listener."""
        found = self.sites.find(site)
        return found is None or found.listener

    def light(self, site: str) -> Light:
        """Return the light of a site."""
        forecasts = [(disk.root, disk.seconds) for disk in self.disks(site)]
        return light_of(self.state, site, self.now, listens=self.listens(site), forecasts=forecasts)

    def disks(self, site: str) -> list[DiskUse]:
        """Return how full the disks of a site were when its listener noted that last."""
        record, found = self.state.sites.get(site), self.sites.find(site)
        if record is None:
            return []
        rate = self.state.runs.growth.rate(site, self.now)
        least = 0 if found is None else int(found.min_free)
        return [DiskUse(one.root, one.free, one.size, least, rate) for one in record.disks]

    def fullest(self, site: str) -> DiskUse | None:
        """Return the disk of a site that has the least room."""
        return min(self.disks(site), key=lambda one: one.room, default=None)


@frozen
class DiskUse:
    """A file system of a site: free bytes, its size, how many must stay free, and bytes a second.

    `rate` is that of the whole site: of several disks it is not known which will get the data.
    """

    root: str
    free: int
    size: int
    least: int
    rate: float

    @property
    def room(self) -> float:
        """Return which share of it may still be filled."""
        return (self.free - self.least) / max(self.size, 1)

    @property
    def seconds(self) -> float | None:
        """Return after how many seconds it is full at the present rate; None: never."""
        return max(self.free - self.least, 0) / self.rate if self.rate > 0 else None

    @property
    def full_in(self) -> str | None:
        """Return in words when it is full; None: it does not fill."""
        if self.seconds is None:
            return None
        return "over a year" if self.seconds > YEAR else lasting(self.seconds)

    @property
    def words(self) -> str:
        """Return how full it is in words."""
        return f"{size(self.free)} of {size(self.size)} free at {self.root}"


@frozen
class Number:
    """A number with its name; `kind` is the class of its colour."""

    name: str
    value: int
    path: str | None = None
    kind: str = ""


def numbers(state: LiveState) -> list[Number]:
    """Return the counters of the first view."""
    statuses: Counter[str] = Counter()
    for place, count in state.runs.counts.items():
        statuses[place.status] += count
    states: Counter[State] = Counter()
    for (_, one), count in state.tally.items():
        states[one] += count
    bad, failed, alarms = statuses[ERROR], states[State.FAILED], len(state.active_alarms())
    busy = sum(statuses.values()) - statuses[TRANSFERRED] - bad
    return [
        Number("runs", len(state.runs), "/runs"),
        Number("good copies", statuses[TRANSFERRED], "/storage"),
        Number("copies on the way", busy),
        Number("bad copies", bad, "/runs?status=error", "bad" if bad else ""),
        Number("reactions waiting", states[State.PENDING]),
        Number("reactions failed", failed, "/failures", "bad" if failed else ""),
        Number("alarms", alarms, "/alarms", "bad" if alarms else ""),
    ]


@frozen
class WorkRow:
    """A row of what is in progress."""

    run: Any
    label: str
    what: str
    source: str | None
    place: str
    progress: ReportedProgress | None
    since: datetime | None


def work(state: LiveState) -> list[WorkRow]:
    """Return what is running: copies that are being made first, then other reactions."""
    running = {trigger_of(one): one for one in state.of_state(State.RUNNING)}
    rows, used = [], set()
    for moving in state.runs.moving.values():
        key = (moving.run, moving.trigger or "")
        one = running.get(key)
        used.add(key)
        progress = one.progress if one else None
        label, what = moving.label, moving.key.data
        place = moving.key.host
        rows.append(WorkRow(moving.run, label, what, moving.source, place, progress, moving.since))
    for key, one in running.items():
        if key not in used:
            reaction, about = one.reaction, one.copy
            what = f"{reaction.handler}{f' {about.data}' if about else ''}"
            label, since = state.label(reaction.run), reaction.started
            rows.append(
                WorkRow(reaction.run, label, what, None, reaction.site, one.progress, since)
            )
    return sorted(rows, key=lambda row: row.progress is None)


def trigger_of(one: Open) -> tuple[Any, str]:
    """Return how the entry of a copy names the reaction that makes it."""
    reaction = one.reaction
    return reaction.run, f"{reaction.site}: {reaction.handler}: {reaction.aspect}"
