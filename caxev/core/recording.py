"""Recording: two snapshots of each run in, the reactions to make out. Pure.

`engine.recorder` calls `compare` with what the site saw last and what is there now, and writes the
result in one transaction; `engine.requests` calls `again` for a replay.

A handler's decision is asked here, about the very document that the snapshot is of. An event
without anything to do leaves no reaction: the snapshot alone records that it was seen. A decision
counts only if its key has no reaction, and no alarm about the run is active. A reaction
that exists waits for something, runs or has failed: then the handler is run, so that it can end
what it began.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import count
from typing import Any, Final, TypeAlias

from attrs import Factory, define, evolve, frozen

from caxev.core.diff import diff
from caxev.core.job import Decision, Job, Skip, Wait
from caxev.core.ledger import Reaction, State, priority_of, reaction_key
from caxev.core.model import Event, Run, RunId, Snapshot, Tag
from caxev.core.registry import Handler, Registry

MOST_COPIES: Final = 1000
"""Entries of a run. One with more is parked: it would delay all others at every change."""

ByRun: TypeAlias = Mapping[RunId, Snapshot]


@define(eq=False)
class WholeRuns(Mapping[RunId, Run]):
    """Runs that were read whole. Each is made of its document only when it is asked for."""

    found: dict[RunId, Mapping[str, Any] | Run] = Factory(dict)

    def __getitem__(self, run: RunId) -> Run:
        one = self.found[run]
        if not isinstance(one, Run):
            one = self.found[run] = Run.from_document(one)
        return one

    def __iter__(self) -> Iterator[RunId]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def entries(self, run: RunId) -> int:
        """Return the number of entries of a run; 0 if it is not among these."""
        one = self.found.get(run, {})
        data = (one.document if isinstance(one, Run) else one).get("data")
        return len(data) if isinstance(data, list) else 0


@frozen
class Recording:
    """The changes of some runs.

    `snapshots` has what to store for each run; None: the run is gone. `priorities` has the runs
    whose tags changed their priority. `unless_standing` has functions that make reactions which
    decisions found needless or premature: one is made only if its key has a reaction already.
    `oversized` has runs with more than `MOST_COPIES` entries; the other fields have nothing of
    these.
    """

    snapshots: Mapping[RunId, Snapshot | None] = Factory(dict)
    reactions: Sequence[Reaction] = ()
    priorities: Mapping[RunId, int] = Factory(dict)
    unless_standing: Mapping[str, tuple[Callable[[], Reaction], Decision]] = Factory(dict)
    oversized: Mapping[RunId, int] = Factory(dict)

    def standing(self, keys: Container[str]) -> list[Reaction]:
        """Return all reactions to record if the ledger has reactions under these `keys`."""
        made = list(self.reactions)
        for key, (make, decision) in self.unless_standing.items():
            if key in keys:
                made.append(make())
            elif isinstance(decision, Wait):
                made.append(later(make(), decision))
        return made


@frozen
class Maker:
    """Makes the reactions of a site.

    `sites` are all sites, for decisions. The first of the tags `urgent` is the most urgent.
    Generations come from an iterator whose numbers must never have been used, unless the reactions
    are only shown.
    """

    registry: Registry
    sites: Any = None
    urgent: Sequence[str] = ()
    generations: Iterator[int] = Factory(count)

    def reaction(self, event: Event, handler: Handler, at: datetime, priority: int) -> Reaction:
        """Return one handler's reaction to an event, which happened at that time (UTC)."""
        site, generation = self.registry.here.name, next(self.generations)
        return Reaction(site, event, handler.name, handler.lane, generation, at, priority=priority)

    def decisions(
        self, event: Event, run: Run | None, at: datetime, idle: dict[str, bool] | None = None
    ) -> Iterator[tuple[Handler, Decision]]:
        """Yield the handlers that want an event, each with its decision.

        None without one, if it fails, or if the run is not given. `idle` keeps for the events of a
        run whether it concerns each handler; without it, all decisions are asked.
        """
        here = None if self.sites is None else self.sites.get(self.registry.here.name)
        job: Job | None = None
        for handler in self.registry.wanting(event):
            if run is None or here is None:
                yield handler, None
            elif idle is not None and _is_idle(handler, run, here, idle):
                yield handler, _IDLE
            else:
                job = job or Job(run, event, here, self.sites, at=at)
                yield handler, decision_of(handler, job)

    def priority(self, snapshot: Snapshot) -> int:
        """Return the priority of a run; 0: it is not urgent."""
        return priority_of(snapshot, self.urgent) if self.urgent else 0

    def is_urgent(self, event: Event) -> bool:
        """Return whether an event changes the priority of its run."""
        return isinstance(event.aspect, Tag) and event.aspect.tag in self.urgent


_IDLE: Final = Skip("nothing of the run concerns it")


def concerns(handler: Handler, run: Run, here: Any) -> bool:
    """Return whether a run concerns a handler at our site; True as well if it cannot tell."""
    try:
        return handler.concerns is None or bool(handler.concerns(run, here))
    except BaseException:  # noqa: BLE001  # as of a decision
        return True


def _is_idle(handler: Handler, run: Run, here: Any, known: dict[str, bool]) -> bool:
    if handler.concerns is None:
        return False
    if handler.name not in known:
        known[handler.name] = not concerns(handler, run, here)
    return known[handler.name]


def decision_of(handler: Handler, job: Job) -> Decision:
    """Ask a handler's decision; None, to run it, if it has none or fails."""
    if handler.decide is None:
        return None
    try:
        decision = handler.decide(job)
        return decision if _is_decision(decision) else None
    # The handler will meet the same error, and is retried or parked for it. BaseException, as a
    # library in Rust panics with one: else the listener would end here, at every start.
    except BaseException:  # noqa: BLE001
        return None


def _is_decision(found: Any) -> bool:
    """Return whether that can be recorded; anything else has the handler run."""
    if isinstance(found, Wait):
        until = found.until
        if not isinstance(until, datetime) or until.tzinfo is None:
            return False
        # Raises if it is out of range in UTC: the database could not store it.
        return type(found.why) is str and until.astimezone(UTC) is not None
    return isinstance(found, Skip)


def later(reaction: Reaction, decision: Wait) -> Reaction:
    """Return a reaction that is due at the time of its decision, but not in the past."""
    return evolve(reaction, due=max(decision.until, reaction.due), note=decision.why)


def _decided(
    maker: Maker, events: Iterable[Event], run: Callable[[], Run | None], at: datetime
) -> Iterator[tuple[Event, Handler, Decision]]:
    """Yield what is to be decided of what is new of a run."""
    asked: Run | None = None
    idle: dict[str, bool] = {}
    for event in events:
        # Most events concern no handler, or none with a decision: then the run is not needed.
        if not (handlers := maker.registry.wanting(event)):
            continue
        if asked is None and any(one.decide for one in handlers):
            asked = run()
        for handler, decision in maker.decisions(event, asked, at, idle):
            yield event, handler, decision


def compare(
    maker: Maker,
    runs: Mapping[RunId, datetime],
    before: ByRun,
    now: ByRun,
    whole: WholeRuns,
    *,
    alarmed: Container[str] | None = (),
) -> Recording:
    """Return what is new of runs, each given with the time of its change.

    `whole` are the runs that `now` are snapshots of; for one that is missing no decision is asked,
    nor for one whose label is in `alarmed` (None: any may be): an alarm about it stands, which its
    handler may end.
    """
    snapshots: dict[RunId, Snapshot | None] = {}
    reactions: list[Reaction] = []
    priorities: dict[RunId, int] = {}
    doubtful: dict[str, tuple[Callable[[], Reaction], Decision]] = {}
    oversized: dict[RunId, int] = {}
    for run, at in runs.items():
        seen, there = before.get(run, {}), now.get(run, {})
        # Most runs of a scan are as they were.
        if seen == there:
            continue
        if (entries := whole.entries(run)) > MOST_COPIES:
            oversized[run] = entries
            continue
        asked = partial(_asked, whole, run, alarmed)
        events, priority = diff(run, seen, there), maker.priority(there)
        for event, handler, decision in _decided(maker, events, asked, at):
            make = partial(maker.reaction, event, handler, at, priority)
            if decision is None:
                reactions.append(make())
            elif seen:  # most are never made: that costs more than the key
                key = reaction_key(maker.registry.here.name, run, event.aspect, handler.name)
                doubtful[key] = make, decision
            # A run that was never seen has no reaction yet: most of a first scan ends here.
            elif isinstance(decision, Wait):
                reactions.append(later(make(), decision))
        # None for a run that is gone, so that its snapshot is deleted.
        snapshots[run] = now.get(run)
        # Existing reactions must follow; see `Database.ingest`.
        if maker.urgent and any(map(maker.is_urgent, events)):
            priorities[run] = priority
    return Recording(snapshots, reactions, priorities, doubtful, oversized)


def _asked(whole: WholeRuns, run: RunId, alarmed: Container[str] | None) -> Run | None:
    found = None if alarmed is None else whole.get(run)
    return None if alarmed and str(found) in alarmed else found


def possible_keys(registry: Registry, snapshots: ByRun) -> list[str]:
    """Return the keys of all reactions that the present states of runs can lead to."""
    return [
        reaction_key(registry.here.name, run, aspect, handler.name)
        for run, snapshot in snapshots.items()
        for aspect, _, handler in registry.triggered(snapshot)
    ]


@frozen
class Outlook:
    """The reply of a handler to an event: `decision` None, run; `why` in words."""

    reaction: Reaction
    decision: Decision
    why: str = ""


def outlook(
    maker: Maker,
    run: Run,
    snapshot: Snapshot,
    standing: Mapping[str, Reaction],
    at: datetime,
    *,
    known: Container[str] = (),
) -> Iterator[Outlook]:
    """Return what each handler would do about the present state of a run if it were replayed.

    A handler without a decision that is among those `known` to the snapshot has seen that state: it
    has nothing to do. `standing` are the run's reactions by key: for one that waits or runs, there
    is nothing to do but to wait for it.
    """
    for aspect, value in snapshot.items():
        event = Event(run.id, aspect, None, value)
        for handler, decision in maker.decisions(event, run, at):
            reaction = maker.reaction(event, handler, at, maker.priority(snapshot))
            before = standing.get(reaction.id)
            if before is not None:
                failed = before.state is State.FAILED
                yield Outlook(
                    reaction, None if failed else Skip(f"it is {before.state}"), "it failed"
                )
            elif handler.decide is not None:
                if isinstance(decision, Wait):
                    reaction = later(reaction, decision)
                yield Outlook(reaction, decision, "there is something to do")
            else:
                seen = Skip("it has seen this state")
                yield Outlook(reaction, seen if handler.name in known else None, "it is new here")


def again(
    outlooks: Iterable[Outlook], *, handler: str | None = None, force: bool = False
) -> list[tuple[Reaction, str]]:
    """Return the reactions that a replay makes of these outlooks, and why.

    With `force` all that the state triggers, else those that have something to do. `handler` names
    the only one to consider.
    """
    return [
        (one.reaction, "forced" if isinstance(one.decision, Skip) else one.why)
        for one in outlooks
        if handler in (None, one.reaction.handler) and (force or not isinstance(one.decision, Skip))
    ]
