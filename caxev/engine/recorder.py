"""Recorder: compare runs with what this site saw last, and record what is new.

The first scan, the live stream, a restart, an event that is delivered twice and a month's outage
all come through here: what differs from the stored snapshot makes events, and those make reactions.
Snapshots, reactions and the stream's position are written in one transaction.

`watcher` and `requests` call it. Reactions are handed to the `Intake`, which is the dispatcher.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from itertools import count
from typing import Final, Protocol
from weakref import WeakSet

import trio
from attrs import define, evolve, field

from caxev import metrics
from caxev.core import recording
from caxev.core.clock import utcnow
from caxev.core.ledger import Reaction
from caxev.core.model import Run, RunId, Snapshot
from caxev.database import AWAIT, Batch, DatabaseError, Ingest, Position, Snapshots, Stream
from caxev.engine.context import Context
from caxev.engine.trouble import by_halves
from caxev.engine.unreadable import UnreadableRuns

KNOWN: Final = 5000
"""Snapshots that are kept in memory, those of the runs that changed last..."""
KNOWN_SIZE: Final = 100
"""...unless they have more aspects than this."""
DEFERRED: Final = 1.0
"""Seconds after which changes that led to nothing are recorded. They cost no write of their own: if
the process dies before, the stream brings them again..."""
MOST_DEFERRED: Final = 1000
"""...and when there are so many."""


class Intake(Protocol):
    """Takes over reactions: the dispatcher."""

    def reserve(self, reactions: Sequence[Reaction]) -> list[Reaction]:
        """Return the reactions; those that can be started at once are claimed."""
        ...

    def start(self, reactions: Sequence[Reaction], runs: Mapping[RunId, Run]) -> None:
        """Take over reactions that are recorded now: start the claimed, remember the others.

        `runs` are some of the runs, as they are now.
        """
        ...

    def cancel(self, reactions: Sequence[Reaction]) -> None:
        """Forget reservations: the reactions could not be recorded."""
        ...

    async def reconcile(self) -> None:
        """Free what is claimed by us and is not running: a reply was lost."""
        ...

    def look_again(self) -> None:
        """Look for reactions that are due in the database: some were opened there."""
        ...


@define(eq=False)
class Ahead:
    """A batch that was read ahead, with the snapshots of its runs.

    `turn` is the recorder's when they were read; `newer` are snapshots that the stream has brought
    since, or that were not recorded yet; `recorded` is set when the batch is recorded.
    """

    batch: Batch
    snapshots: Snapshots
    turn: int
    newer: Mapping[RunId, Snapshot | None] = field(factory=dict)
    recorded: trio.Event = field(factory=trio.Event)


@define(eq=False)
class Reading:
    """Snapshots that are read beside the stream, while others may be recorded.

    `compared` are its runs that were compared, or recorded, since the reading began: what was read
    of them does not count. `at` is when it began.
    """

    runs: Sequence[RunId]
    at: datetime = field(factory=utcnow)
    snapshots: Snapshots = field(init=False)
    compared: set[RunId] = field(init=False, factory=set)


@define(eq=False)
class Recorder:
    """Records what is new of runs, for one lease."""

    context: Context
    intake: Intake
    unreadable: UnreadableRuns = field(init=False)
    _generations: Iterator[int] = field(init=False)
    # One comparison at a time: two at once could write an older snapshot over a newer one.
    _comparing: trio.Lock = field(init=False, factory=trio.Lock)
    # Changes whenever something is recorded beside the stream: then what was read ahead is stale.
    _turn: int = field(init=False, default=0)
    _known: OrderedDict[RunId, Snapshot] = field(init=False, factory=OrderedDict)
    # Snapshots that were recorded or deferred since we began to read the batch that is read ahead.
    _newer: dict[RunId, Snapshot | None] = field(init=False, factory=dict)
    # Snapshots of changes that led to nothing, not recorded yet: newer than those in the database.
    _deferred: dict[RunId, Snapshot | None] = field(init=False, factory=dict)
    _behind: Position | None = field(init=False, default=None)
    _has_deferred: trio.Event = field(init=False, factory=trio.Event)
    _noted: set[int] = field(init=False, factory=set)
    # As long as somebody has them.
    _readings: WeakSet[Reading] = field(init=False, factory=WeakSet)

    def __attrs_post_init__(self) -> None:
        # Unique over all processes that ever acted for the site: the epoch is part of it.
        self._generations = count(self.context.lease.epoch << 40)
        self.unreadable = UnreadableRuns(self.context, self._generations)

    # -- from the stream ----------------------------------------------------------------------

    async def read_ahead(self, stream: Stream, wait: float = AWAIT) -> Ahead:
        """Wait up to `wait` seconds for the stream's next batch, and read its runs' snapshots."""
        context, turn = self.context, self._turn
        # A copy: what is deferred may be recorded before it is compared.
        newer = self._newer = dict(self._deferred)
        found = await context.database.next_look(
            stream, context.lease.site, self._known, context.registry.watched, wait
        )
        return Ahead(*found, turn, newer)

    async def record_batch(self, ahead: Ahead) -> bool:
        """Take in a batch; return whether the position behind it was saved.

        If it led to nothing, it is recorded later, with others; see `record_deferred`.
        """
        batch, snapshots = ahead.batch, ahead.snapshots
        async with self._comparing:
            if ahead.turn != self._turn:  # a scan or a replay came between
                snapshots = await self.read(batch.runs)
            else:
                # They were read while the batch before this one was being recorded or deferred.
                _overlay(snapshots, batch.runs, ahead.newer)
            ingest = await self.compare(batch.runs, snapshots)
            if not ingest.snapshots:
                return False
            if not (
                ingest.reactions or ingest.priorities or self.unreadable.among(ingest.snapshots)
            ):
                self._defer(ingest.snapshots, batch.position)
                self._newer.update(ingest.snapshots)
                return False
            await self.record(evolve(ingest, position=batch.position))
            unreadable = self.unreadable.runs
            self._newer |= {run: s for run, s in ingest.snapshots.items() if run not in unreadable}
            return True

    def forget(self) -> None:
        """Forget what may have been recorded or not: only the database knows."""
        self._known.clear()
        # It may be lost: what is deferred must not write it over where the next stream begins.
        self._behind = None

    # -- what led to nothing ------------------------------------------------------------------

    def _defer(self, snapshots: Mapping[RunId, Snapshot | None], position: Position) -> None:
        self._outdate(snapshots)
        self._deferred.update(snapshots)
        self._behind = position
        self._has_deferred.set()

    async def record_deferred(self) -> None:
        """Record changes without a reaction, until cancelled, many in one write."""
        while True:
            await self._has_deferred.wait()
            if len(self._deferred) < MOST_DEFERRED:
                await trio.sleep(DEFERRED)
            await self.context.trouble.retrying("stream", self.flush)

    async def flush(self) -> None:
        """Record what led to nothing so far."""
        async with self._comparing:
            await self._write_deferred()

    async def _write_deferred(self) -> None:
        if self._deferred:
            number = self.context.registry.id
            await self._record(Ingest(dict(self._deferred), (), self._behind, number))

    def _defer_no_more(self, runs: Iterable[RunId]) -> None:
        for run in runs:
            self._deferred.pop(run, None)
        # One that is not set yet stays: `record_deferred` may be waiting for it.
        if not self._deferred and self._has_deferred.is_set():
            self._has_deferred = trio.Event()

    # -- beside the stream --------------------------------------------------------------------

    async def snapshot(self, runs: Mapping[RunId, datetime]) -> None:
        """Record what is new of runs, each given with the time of its change."""
        async with self.beside_stream():
            ingest = await self.compare(runs, await self.read(runs))
            if ingest.snapshots:
                await self.record(ingest)

    async def read_early(self, runs: Sequence[RunId]) -> Reading:
        """Read snapshots for `record_reading`, while others are compared and recorded."""
        reading = Reading(runs)
        self._readings.add(reading)  # before it reads: nothing may be compared unnoticed
        reading.snapshots = await self.read(runs)
        return reading

    async def record_reading(self, reading: Reading) -> None:
        """Record what is new of the runs of a reading."""
        snapshots = reading.snapshots
        async with self.beside_stream():
            self._readings.discard(reading)
            if again := [run for run in reading.runs if run in reading.compared]:
                snapshots.replace(again, await self.read(again))
            ingest = await self.compare(dict.fromkeys(reading.runs, reading.at), snapshots)
            if ingest.snapshots:
                await self.record(ingest)

    def _outdate(self, runs: Iterable[RunId]) -> None:
        for reading in self._readings:
            reading.compared.update(runs)

    @asynccontextmanager
    async def beside_stream(self) -> AsyncIterator[None]:
        """Exclude other comparisons; batches that were read ahead meanwhile are read again."""
        async with self._comparing:
            # Before and after: the stream may begin to read ahead at any time in between.
            self._turn += 1
            try:
                yield
            finally:
                self._turn += 1

    # -- comparing ----------------------------------------------------------------------------

    @property
    def maker(self) -> recording.Maker:
        """The maker of reactions, by the present options."""
        context = self.context
        return recording.Maker(
            context.registry, context.sites, context.site.priority, self._generations
        )

    async def read(self, runs: Iterable[RunId]) -> Snapshots:
        """Read the snapshots of runs: as they are now, and as this site saw them last."""
        context, runs = self.context, list(runs)
        found = await context.database.snapshot(
            context.lease.site, runs, self._known, context.registry.watched
        )
        _overlay(found, runs, self._deferred)
        return found

    async def compare(self, runs: Mapping[RunId, datetime], snapshots: Snapshots) -> Ingest:
        """Return what to write about these runs."""
        # In any case: no further change may follow a state that was read before.
        self._outdate(runs)
        # Due at once, even if the clock of the server that dated the change is ahead.
        now, context = utcnow(), self.context
        times = {run: min(at, now) for run, at in runs.items()}
        found = recording.compare(
            self.maker,
            times,
            snapshots.before,
            snapshots.now,
            snapshots.whole,
            alarmed=context.alarms.runs,
        )
        for run, copies in found.oversized.items():
            await self.unreadable.park_oversized(run, copies)
        keys = found.unless_standing.keys()
        standing = await context.database.standing_keys(keys) if keys else ()
        return Ingest(
            found.snapshots,
            found.standing(standing),
            handlers=context.registry.id,
            runs=snapshots.whole,
            priorities=found.priorities,
        )

    # -- writing ------------------------------------------------------------------------------

    async def record(self, ingest: Ingest) -> None:
        """Write new reactions and snapshots, and the deferred ones."""
        if self._deferred.keys() & ingest.snapshots.keys():
            # In a write of its own. If two snapshots of a run were written together and the reply
            # was lost, neither could be trusted.
            await self._write_deferred()
        await self._record(evolve(ingest, snapshots={**self._deferred, **ingest.snapshots}))

    async def _record(self, ingest: Ingest) -> None:
        """Write what is new; if the database refuses one run, write the others without it."""
        await self._note_handlers()
        reacting = (reaction.run for reaction in ingest.reactions)
        runs = list(dict.fromkeys([*ingest.snapshots, *reacting]))

        def part(some: Sequence[RunId]) -> Ingest:
            if len(some) == len(runs):
                return ingest
            # The position goes with the last part, so that nothing is skipped.
            return _part(ingest, some, with_position=some[-1:] == runs[-1:])

        async def write(some: Sequence[RunId]) -> None:
            await self._write(part(some))

        async def alone(run: RunId, error: DatabaseError) -> None:
            await self.unreadable.park(run, part([run]).position, error)
            self._defer_no_more([run])

        await by_halves(runs, write, alone)

    async def _write(self, ingest: Ingest) -> None:
        reactions = self.intake.reserve(ingest.reactions)
        readable = self.unreadable.among(ingest.snapshots)
        recorded = False
        try:
            # In the same transaction: a crash leaves either both or none.
            over = [self.unreadable.key(run) for run in readable]
            everything = evolve(ingest, reactions=reactions, over=over)
            await self.context.database.ingest(self.context.lease, everything, utcnow())
            recorded = True
        finally:
            self._outdate(ingest.snapshots)
            if not recorded:
                self.intake.cancel(reactions)
                for run in ingest.snapshots:  # recorded or not, we cannot know
                    self._known.pop(run, None)
        self._remember(ingest.snapshots)
        self._defer_no_more(ingest.snapshots)
        self.unreadable.forget(readable)
        for handler, number in Counter(reaction.handler for reaction in reactions).items():
            metrics.reactions.labels(self.context.lease.site, handler).inc(number)
        self.intake.start(reactions, ingest.runs)
        if ingest.priorities:  # what was due before may now go first, or last
            self.intake.look_again()

    async def _note_handlers(self) -> None:
        """Note which handlers the snapshots of now on are taken with."""
        registry = self.context.registry
        if registry.id not in self._noted:
            names = [handler.name for handler in registry.enabled]
            await self.context.database.note_handlers(self.context.lease, registry.id, names)
            self._noted.add(registry.id)

    def _remember(self, snapshots: Mapping[RunId, Snapshot | None]) -> None:
        """Keep recorded snapshots: a run that changed will soon change again."""
        for run, snapshot in snapshots.items():
            # One step each: the database's thread may read them meanwhile.
            if snapshot is not None and len(snapshot) <= KNOWN_SIZE:
                self._known[run] = snapshot
                self._known.move_to_end(run)
            else:
                self._known.pop(run, None)
        while len(self._known) > KNOWN:
            self._known.popitem(last=False)

    async def retry_unreadable(self, runs: Collection[RunId] | None) -> None:
        """Try again to record runs (None: all) that could not be; they may have been deleted."""
        wanted = self.unreadable.runs if runs is None else self.unreadable.among(runs)
        if wanted:
            await self.snapshot(dict.fromkeys(wanted, utcnow()))
            await self.unreadable.forget_deleted(wanted)


def _overlay(
    snapshots: Snapshots, runs: Iterable[RunId], newer: Mapping[RunId, Snapshot | None]
) -> None:
    """Put newer snapshots in place of those that were read."""
    for run in runs:
        if run in newer:
            snapshots.before[run] = dict(newer[run] or {})


def _part(ingest: Ingest, runs: Iterable[RunId], *, with_position: bool) -> Ingest:
    chosen = set(runs)
    return evolve(
        ingest,
        snapshots={run: one for run, one in ingest.snapshots.items() if run in chosen},
        reactions=[reaction for reaction in ingest.reactions if reaction.run in chosen],
        position=ingest.position if with_position else None,
        priorities={run: n for run, n in ingest.priorities.items() if run in chosen},
    )
