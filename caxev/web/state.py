"""What the page shows, as it is now. Pure: `feeder` feeds it, `views` read it.

Everything is bounded: of runs their shapes (see `runs`), of the ledger what is open, and the latest
changes. Times are UTC.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final, TypeAlias

from attrs import define, field, frozen

from caxev.core.alarms import AlarmState
from caxev.core.amounts import ReportedProgress
from caxev.core.ledger import Reaction, State
from caxev.core.model import CopyKey, RunId
from caxev.web.runs import KnownRuns

Record: TypeAlias = Any
"""A `caxev.database.SiteRecord`: what is pure imports nothing of the database."""

LABELS_KEPT: Final = 50_000
"""Runs whose names are kept, those heard of last."""


@frozen
class Open:
    """A reaction that is not done, with its progress."""

    reaction: Reaction
    progress: ReportedProgress | None = None

    @property
    def copy(self) -> CopyKey | None:
        """The copy that it is about, if it is about one."""
        aspect = self.reaction.aspect
        return aspect if isinstance(aspect, CopyKey) else getattr(aspect, "key", None)


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
    reactions: dict[str, Open] = field(factory=dict)
    alarms: dict[tuple[str, str], AlarmState] = field(factory=dict)
    labels: dict[RunId, str] = field(factory=dict)
    """What runs are called of which something was heard lately."""
    tally: Counter[tuple[str, State]] = field(factory=Counter)
    """Open reactions by site and state."""
    health: FeedHealth = field(factory=FeedHealth)

    def of_site(self, record: Record) -> None:
        """Take a site's record as it is now."""
        self.sites[record.site] = record

    def of_reaction(self, reaction: Reaction, document: Mapping[str, Any]) -> None:
        """Take an open reaction as it is now."""
        self.done(reaction.id)
        progress = ReportedProgress.of(document.get("progress"))
        self.reactions[reaction.id] = Open(reaction, progress)
        self.tally[reaction.site, reaction.state] += 1

    def done(self, key: str) -> None:
        """Forget a reaction: it is done, or was removed."""
        former = self.reactions.pop(key, None)
        if former is None:
            return
        place = (former.reaction.site, former.reaction.state)
        self.tally[place] -= 1
        if not self.tally[place]:
            del self.tally[place]

    def of_alarms(self, states: Iterable[AlarmState], ended: Iterable[tuple[str, str]]) -> None:
        """Take alarms as they are now, and forget those that ended."""
        for one in states:
            self.alarms[one.alarm.site, one.alarm.key] = one
        for key in ended:
            self.alarms.pop(key, None)

    def name(self, run: RunId, label: str) -> None:
        """Note what a run is called."""
        self.labels.pop(run, None)
        self.labels[run] = label
        if len(self.labels) > LABELS_KEPT:
            del self.labels[next(iter(self.labels))]

    def unnamed(self, most: int) -> list[RunId]:
        """Return runs with running or failed reactions of which no name is known."""
        shown = (State.RUNNING, State.FAILED)
        found = {
            one.reaction.run: None
            for one in self.reactions.values()
            if one.reaction.state in shown and one.reaction.run not in self.labels
        }
        return list(found)[:most]

    def forget_ledger(self) -> None:
        """Forget what the ledger had: a new pass reads all of it."""
        for known in (self.sites, self.reactions, self.alarms, self.tally):
            known.clear()

    # -- questions --------------------------------------------------------------------------

    def of_state(self, state: State, site: str | None = None) -> list[Open]:
        """Return the open reactions in a state, of a site or of all."""
        return [
            one
            for one in self.reactions.values()
            if one.reaction.state is state and site in (None, one.reaction.site)
        ]

    def active_alarms(self, site: str | None = None) -> list[AlarmState]:
        """Return the active alarms, of a site or of all."""
        return [a for a in self.alarms.values() if a.active and site in (None, a.alarm.site)]

    def oldest_due(self, site: str, now: datetime) -> datetime | None:
        """Return since when the site's longest waiting reaction could have run."""
        due = [one.reaction.due for one in self.of_state(State.PENDING, site)]
        late = [at for at in due if at <= now]
        return min(late, default=None)

    def label(self, run: RunId) -> str:
        """Return what a run is called; its id if that is not known."""
        return self.labels.get(run, str(run))
