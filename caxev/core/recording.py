"""Recording: two snapshots of each run in, the reactions to make out. Pure.

`engine.recorder` calls `compare` with what the site saw last and what is there now, and writes the
result in one transaction; `engine.requests` calls `again` for a replay. Generations come from an
iterator whose numbers must never have been used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Final, TypeAlias

from attrs import Factory, frozen

from caxev.core.diff import diff, replay
from caxev.core.ledger import Reaction, State, new_reaction, priority_of, reaction_key
from caxev.core.model import (
    Event,
    RunId,
    Snapshot,
    Tag,
)
from caxev.core.registry import Handler, Registry

AT_ONCE: Final = 500
"""Reactions of one run that are recorded at once. A run with more is recorded in pieces, so that
the reactions of other runs come in between."""

ByRun: TypeAlias = Mapping[RunId, Snapshot]


@frozen
class Recording:
    """What is new of some runs.

    `snapshots` are to be stored; None: the run is gone. `priorities` are those of runs whose tags
    changed them. `large` are runs with more than can be recorded at once, of which nothing is in
    the rest.
    """

    snapshots: Mapping[RunId, Snapshot | None] = Factory(dict)
    reactions: Sequence[Reaction] = ()
    priorities: Mapping[RunId, int] = Factory(dict)
    large: frozenset[RunId] = frozenset()


@frozen
class Maker:
    """Makes the reactions of a site. Of the tags `urgent`, the first is the most urgent."""

    registry: Registry
    urgent: Sequence[str]
    generations: Iterator[int]

    def reactions(self, event: Event, at: datetime, priority: int) -> list[Reaction]:
        """Return the reactions to an event, which happened at that time (UTC)."""
        return [
            self.reaction(event, handler, at, priority) for handler in self.registry.wanting(event)
        ]

    def reaction(self, event: Event, handler: Handler, at: datetime, priority: int) -> Reaction:
        """Return one handler's reaction to an event."""
        return new_reaction(
            self.registry.here.name,
            event,
            handler.name,
            lane=handler.lane,
            generation=next(self.generations),
            at=at,
            priority=priority,
        )

    def priority(self, snapshot: Snapshot) -> int:
        """Return the priority of a run; 0: it is not urgent."""
        return priority_of(snapshot, self.urgent)

    def is_urgent(self, event: Event) -> bool:
        """Return whether an event changes the priority of its run."""
        return isinstance(event.aspect, Tag) and event.aspect.tag in self.urgent


def compare(
    maker: Maker,
    runs: Mapping[RunId, datetime],
    before: ByRun,
    now: ByRun,
    *,
    in_pieces: bool = False,
) -> Recording:
    """Return what is new of runs, each given with the time of its change.

    With `in_pieces` as much of each run as can be recorded at once: its snapshot is then the former
    one with the events of that piece, so that the next comparison finds the rest.
    """
    snapshots: dict[RunId, Snapshot | None] = {}
    reactions: list[Reaction] = []
    priorities: dict[RunId, int] = {}
    large: set[RunId] = set()
    for run, at in runs.items():
        seen, there = before.get(run, {}), now.get(run, {})
        events = diff(run, seen, there)
        # Most runs of a scan are as they were.
        if not events:
            continue
        priority = maker.priority(there)
        taken, made = _first_piece(maker, events, at, priority)
        is_whole = len(taken) == len(events)
        # One run with 10,000 copies would hold up the batch of all others.
        if not (is_whole or in_pieces):
            large.add(run)
            continue
        # None for a run that is gone, so that its snapshot is deleted.
        snapshots[run] = now.get(run) if is_whole else replay(seen, taken)
        reactions.extend(made)
        # The reactions that stand already must follow; see `Database.ingest`.
        if maker.urgent and any(map(maker.is_urgent, taken)):
            priorities[run] = priority
    return Recording(snapshots, reactions, priorities, frozenset(large))


def _first_piece(
    maker: Maker, events: Sequence[Event], at: datetime, priority: int
) -> tuple[Sequence[Event], list[Reaction]]:
    """Return the first events of a run, with up to `AT_ONCE` reactions; one event at least."""
    reactions: list[Reaction] = []
    for number, event in enumerate(events):
        made = maker.reactions(event, at, priority)
        # At least one event goes through, however many handlers want it: else it would never end.
        if reactions and len(reactions) + len(made) > AT_ONCE:
            return events[:number], reactions
        reactions.extend(made)
    return events, reactions


def possible_keys(registry: Registry, snapshots: ByRun) -> list[str]:
    """Return the keys of all reactions that the present states of runs can lead to."""
    return [
        reaction_key(registry.here.name, run, aspect, handler.name)
        for run, snapshot in snapshots.items()
        for handler in registry.enabled
        for aspect, _ in registry.triggering(snapshot, handler)
    ]


def again(
    maker: Maker,
    snapshots: ByRun,
    standing: Mapping[str, Reaction],
    at: datetime,
    *,
    handler: str | None = None,
    force: bool = False,
) -> list[Reaction]:
    """Return the reactions that a replay makes of the present states of runs; see `to_replay`."""
    handlers = maker.registry.handlers
    return [
        maker.reaction(event, handlers[name], at, maker.priority(snapshot))
        for run, snapshot in snapshots.items()
        for event, name in to_replay(
            maker.registry, run, snapshot, standing, handler=handler, force=force
        )
    ]


def to_replay(
    registry: Registry,
    run: RunId,
    snapshot: Snapshot,
    standing: Mapping[str, Reaction],
    *,
    handler: str | None = None,
    force: bool = False,
) -> Iterator[tuple[Event, str]]:
    """Return the (event, handler) pairs that a replay of a run fires.

    Without `force`, only what is missing: no reaction stands under that key, or one that was
    settled for another state of the aspect. With it, all that the present state triggers.
    `standing` are the run's reactions by key; `handler` names the only one to consider.
    """
    for one in registry.enabled:
        if handler not in (None, one.name):
            continue
        for aspect, value in registry.triggering(snapshot, one):
            # Under the same key: what stands there is what a replay would renew.
            reaction = standing.get(reaction_key(registry.here.name, run, aspect, one.name))
            if force or reaction is None or _is_outdated(reaction, value):
                yield Event(run, aspect, None, value), one.name


def _is_outdated(reaction: Reaction, value: str) -> bool:
    return reaction.after != value and reaction.state in (State.DONE, State.FAILED)
