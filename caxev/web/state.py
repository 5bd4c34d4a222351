"""The state that the page shows. Pure: `feeder` feeds it, `views` read it.

Everything is bounded: of runs their shapes (see `runs`), of the ledger what is open, and the latest
changes. Times are UTC.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from heapq import heappop, heappush
from itertools import islice
from typing import Any, Final, NamedTuple, TypeAlias

from attrs import define, field, frozen

from caxev.core.alarms import AlarmState
from caxev.core.amounts import ReportedProgress
from caxev.core.ledger import Reaction, State
from caxev.core.model import CopyKey, RunId
from caxev.core.processes import Process
from caxev.web.runs import KnownRuns

Record: TypeAlias = Any
"""A `caxev.database.SiteRecord`: what is pure imports nothing of the database."""

Asked: TypeAlias = Any
"""A `caxev.database.Request` that waits."""

FRESH: Final = timedelta(minutes=3)
"""A process that has not reported for so long is gone: it reports every minute."""
LABELS_KEPT: Final = 50_000
"""Runs whose names are kept, those heard of last."""


@frozen
class Open:
    """A reaction that is not done, with its progress.

    `outputs`: whether output of it is kept. `helper`: the process that has claimed it, if that is
    a helper.
    """

    reaction: Reaction
    progress: ReportedProgress | None = None
    outputs: bool = False
    helper: str | None = None

    @property
    def place(self) -> tuple[str, State]:
        return self.reaction.site, self.reaction.state

    @property
    def copy(self) -> CopyKey | None:
        """The copy that it is about, if it is about one."""
        aspect = self.reaction.aspect
        return aspect if isinstance(aspect, CopyKey) else getattr(aspect, "key", None)


class OpenGroup(NamedTuple):
    """The key for counts of open reactions. `host`: of the copy that they are about, if any."""

    site: str
    state: State
    lane: str
    handler: str
    host: str | None

    @classmethod
    def of(cls, one: Open) -> OpenGroup:
        """Return the group of a reaction."""
        reaction, copy = one.reaction, one.copy
        host = None if copy is None else copy.host
        return cls(reaction.site, reaction.state, reaction.lane, reaction.handler, host)


@define
class FeedHealth:
    """How the page itself is fed.

    `pass_done` of about `pass_total` runs are read; None: the pass has ended. `trouble` is why the
    database cannot be read, and since when. `gap`: when and why the history was read again.
    """

    pass_done: int | None = 0
    pass_total: int = 0
    trouble: tuple[datetime, str] | None = None
    gap: tuple[datetime, str] | None = None
    fed: datetime | None = None


@define(eq=False)
class LiveState:
    """Everything that is shown without asking the database."""

    runs: KnownRuns = field(factory=KnownRuns)
    sites: dict[str, Record] = field(factory=dict)
    processes: dict[str, Process] = field(factory=dict)
    """The last reports of processes, by their owners."""
    requests: Sequence[Asked] = ()
    """The oldest of what waits for a listener."""
    waiting: int = 0
    """How many requests wait."""
    reactions: dict[str, Open] = field(factory=dict)
    alarms: dict[tuple[str, str], AlarmState] = field(factory=dict)
    labels: dict[RunId, str] = field(factory=dict)
    """The names of runs that changed lately."""
    health: FeedHealth = field(factory=FeedHealth)
    changed: int = 0
    """How many batches with changed runs there were."""
    groups: Counter[OpenGroup] = field(init=False, factory=Counter)
    """How many reactions are open of each kind."""
    _places: dict[tuple[str, State], dict[str, Open]] = field(init=False, factory=dict)
    """The open reactions by site and state."""
    _due: dict[str, list[tuple[datetime, str]]] = field(init=False, factory=dict)
    """For each site a heap of the times at which reactions are due, with some that are no more."""

    def of_site(self, record: Record) -> None:
        """Take a site's record as it is now."""
        self.sites[record.site] = record

    def of_reaction(self, reaction: Reaction, document: Mapping[str, Any]) -> None:
        """Take an open reaction as it is now."""
        self.done(reaction.id)  # it is counted in its former state
        progress = ReportedProgress.of(document.get("progress"))
        helper = document.get("helper")
        # Each time that it joins, a helper adds a number to the name of its process.
        process = helper.rpartition(".")[0] if isinstance(helper, str) else None
        one = Open(reaction, progress, bool(document.get("kept_parts")), process)
        self.reactions[reaction.id] = self._places.setdefault(one.place, {})[reaction.id] = one
        self.groups[OpenGroup.of(one)] += 1
        if reaction.state is State.PENDING:
            heappush(self._due.setdefault(reaction.site, []), (reaction.due, reaction.id))

    def done(self, key: str) -> Open | None:
        """Forget a reaction: it is done, or was removed. Return what it was."""
        former = self.reactions.pop(key, None)
        if former is not None:
            group, here = OpenGroup.of(former), self._places[former.place]
            self.groups[group] -= 1
            if not self.groups[group]:
                del self.groups[group]
            del here[key]
            if not here:
                del self._places[former.place]
        return former

    def of_processes(self, processes: Iterable[Process], left: Iterable[str] = ()) -> None:
        """Take what processes report now, and forget those that left."""
        self.processes.update((one.owner, one) for one in processes)
        for owner in left:
            self.processes.pop(owner, None)

    def of_alarms(self, states: Iterable[AlarmState], ended: Iterable[tuple[str, str]]) -> None:
        """Take alarms as they are now, and forget those that ended."""
        for one in states:
            self.alarms[one.alarm.site, one.alarm.key] = one
        for key in ended:
            self.alarms.pop(key, None)

    def name(self, run: RunId, label: str) -> None:
        """Note what a run is called."""
        # Removed first, so that the oldest comes first, and is dropped first.
        self.labels.pop(run, None)
        self.labels[run] = label
        if len(self.labels) > LABELS_KEPT:
            del self.labels[next(iter(self.labels))]

    def unnamed(self, most: int) -> list[RunId]:
        """Return runs with running or failed reactions whose names are not known, `most` at most.

        More names than there is room for would be read and dropped again and again.
        """
        shown = [*self.of_state(State.RUNNING), *self.of_state(State.FAILED)]
        runs = dict.fromkeys(one.reaction.run for one in shown)
        first = islice(runs, LABELS_KEPT // 2)
        return [run for run in first if run not in self.labels][:most]

    def forget_ledger(self) -> None:
        """Forget what the ledger had: a new pass reads all of it."""
        self.requests, self.waiting = (), 0
        known = (self.sites, self.processes, self.alarms, self.reactions, self._places, self._due)
        for one in (*known, self.groups):
            one.clear()

    # -- questions --------------------------------------------------------------------------

    def of_state(self, state: State, site: str | None = None) -> list[Open]:
        """Return the open reactions in a state, of a site or of all."""
        return [
            one
            for place, open_ in self._places.items()
            if place[1] is state and site in (None, place[0])
            for one in open_.values()
        ]

    @property
    def tally(self) -> Counter[tuple[str, State]]:
        """How many reactions are open, by site and state."""
        return Counter({place: len(open_) for place, open_ in self._places.items()})

    def of_run(self, run: RunId) -> list[Open]:
        """Return the open reactions of a run, those that are due first, first."""
        found = (one for one in self.reactions.values() if one.reaction.run == run)
        return sorted(found, key=lambda one: one.reaction.due)

    def running_at(self, site: str, helper: str | None) -> int:
        """Return how many reactions of a site a helper runs; of None, how many its listener."""
        return sum(one.helper == helper for one in self.of_state(State.RUNNING, site))

    def processes_of(self, site: str, now: datetime) -> list[Process]:
        """Return the processes of a site that have reported lately."""
        return [
            one
            for _, one in sorted(self.processes.items())
            if one.site == site and one.seen is not None and now - one.seen < FRESH
        ]

    def active_alarms(self, site: str | None = None) -> list[AlarmState]:
        """Return the active alarms, of a site or of all."""
        return [a for a in self.alarms.values() if a.active and site in (None, a.alarm.site)]

    def oldest_due(self, site: str, now: datetime) -> datetime | None:
        """Return since when the site's longest waiting reaction could have run."""
        heap = self._due.get(site, [])
        while heap:
            due, key = heap[0]
            one = self.reactions.get(key)
            if one is None or one.reaction.state is not State.PENDING or one.reaction.due != due:
                heappop(heap)  # it has run, or is due at another time
            else:
                return due if due <= now else None
        return None

    def label(self, run: RunId) -> str:
        """Return what a run is called; its id if that is not known."""
        return self.labels.get(run, str(run))
