"""Change or scan -> diff -> ledger entries.

One code path serves the first scan, the live stream, a restart, an event that is
delivered twice and a month's outage: what differs from the snapshot that this site stored makes
events, and those make reactions. Looks, reactions and the stream's position are written together.

`listener` starts `Watcher.run`; reactions go to the `Intake`, which is the dispatcher.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from itertools import count
from typing import Final, Protocol, TypeVar

import trio
from attrs import Factory, define, evolve, field
from loguru import logger

from caxev import metrics
from caxev.core.alarms import Alarms, parked, parked_key
from caxev.core.alarms import gap as gap_alarm
from caxev.core.clock import utcnow
from caxev.core.diff import diff, replay
from caxev.core.ledger import (
    UNREADABLE,
    Done,
    Failed,
    Outcome,
    Reaction,
    State,
    claim,
    owe,
    priority_of,
    reaction_key,
    settle,
)
from caxev.core.model import YES, Event, Existence, Run, RunId, Snapshot, Tag
from caxev.core.registry import Handler, Registry
from caxev.database import (
    Batch,
    Database,
    DatabaseError,
    Gap,
    HistoryLost,
    Ingest,
    InvalidDocument,
    Lease,
    Position,
    Request,
    Snapshots,
    Stream,
    concerns_one,
    is_fatal,
    is_transient,
    of_the_site,
)
from caxev.engine.trouble import Trouble

T = TypeVar("T")

SAVE_EVERY: Final = 60.0
"""Seconds after which a stream that led to nothing has its position saved all the same."""
SCAN_EVERY: Final = 86400.0
"""Seconds between scans that are made as a safety net."""
LONGEST_WAIT: Final = 30.0
"""Seconds at most between attempts to reach the database again."""
CLOSING: Final = 2.0
"""Seconds that closing a stream may take."""
CAUGHT_UP: Final = 0.3
"""Seconds without a change after which ``--once`` takes the stream for read."""

BACKLOG: Final = 100
"""Changes in a batch from which on the next one is read while this one is recorded."""
KNOWN: Final = 5000
"""Last looks that are kept in memory, those of the runs that changed last..."""
KNOWN_SIZE: Final = 100
"""...unless they have more aspects than this."""
AT_ONCE: Final = 500
"""Reactions of one run that are recorded at once. A run with more is recorded piece by piece, so
that the reactions of other runs come in between."""


class Intake(Protocol):
    """Where reactions go: the dispatcher."""

    def reserve(self, reactions: Sequence[Reaction]) -> list[Reaction]:
        """Return the reactions; those that there is room to start are claimed already."""
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
        """Free what stands as claimed by us and is not running: a reply got lost."""
        ...

    def look_again(self) -> None:
        """Look for reactions that are due in the database: some were opened there."""
        ...


def owed_again(
    registry: Registry,
    run: RunId,
    snapshot: Snapshot,
    standing: Mapping[str, Reaction],
    request: Request,
) -> Iterator[tuple[Event, str]]:
    """Return the (event, handler) pairs that a replay of this run fires.

    Without force, only what is missing: no reaction in that key, or one that was settled for
    another state of the aspect. With force, all that the run's present state triggers.
    """
    for handler in registry.enabled:
        if request.handler not in (None, handler.name):
            continue
        for aspect, value in registry.owed(snapshot, handler):
            event = Event(run, aspect, None, value)
            reaction = standing.get(reaction_key(registry.here.name, run, aspect, handler.name))
            if request.force or reaction is None or _for_another_state(reaction, value):
                yield event, handler.name


def _for_another_state(reaction: Reaction, value: str) -> bool:
    return reaction.after != value and reaction.state in (State.DONE, State.FAILED)


@define(eq=False)
class _Ahead:
    """A batch on its way: with the looks of its runs, and word when it is recorded.

    `turn` tells whether a scan or a replay has recorded anything since the looks were read.
    """

    batch: Batch
    looked: Snapshots
    turn: int
    recorded: trio.Event = field(factory=trio.Event)


@define(eq=False)
class Watcher:
    """Follows the runs collection on behalf of one site.

    `urgent` are the tags whose runs go first, the most urgent before the others. `trouble` gets
    what ails the database; `behind` is how old, in seconds, the newest change of the last batch was
    when that was taken in.
    """

    database: Database
    lease: Lease
    registry: Registry
    intake: Intake
    urgent: Sequence[str] = ()
    alarms: Alarms = field(factory=Alarms)
    caught_up: float = CAUGHT_UP
    trouble: Trouble = field(
        default=Factory(lambda self: Trouble(self.lease.site), takes_self=True)
    )
    behind: float = field(init=False, default=0.0)
    _generations: Iterator[int] = field(init=False)
    # One look at a time: two at once could write an older look over a newer one.
    _looking: trio.Lock = field(init=False, factory=trio.Lock)
    # Runs of which more is new than is recorded at once, each with the time of its change. While
    # there are any no position is saved: a restart finds them again.
    _large: dict[RunId, datetime] = field(init=False, factory=dict)
    _grown: trio.Event = field(init=False, factory=trio.Event)
    _turn: int = field(init=False, default=0)
    _known: OrderedDict[RunId, Snapshot] = field(init=False, factory=OrderedDict)
    _unreadable: set[RunId] = field(init=False, factory=set)
    _recorded: Mapping[RunId, Snapshot | None] = field(init=False, factory=dict)
    _position: Position | None = field(init=False, default=None)
    _saved_at: float = field(init=False, default=0.0)

    def __attrs_post_init__(self) -> None:
        # Unique over all processes that ever acted for the site: the epoch is part of it.
        self._generations = count(self.lease.epoch << 40)

    # -- following the stream ---------------------------------------------------------------

    async def run(self, *, ready: trio.Event) -> None:
        """Follow the stream for ever. Sets `ready` once the first scan, if any, is through.

        Never ends for trouble with the database: it waits and goes on where it was. Raises
        `LeaseLost`, and `NotAuthorized` where the rights are missing.
        """
        await self._locate()
        ready.set()
        failures = 0
        while True:
            try:
                await self._follow()
            except HistoryLost as lost:
                gap = self._tell_of_gap(str(lost))  # once, however often the scan is begun anew
                await self.persist(partial(self.scan, gap=gap, restart=True))
                failures = 0
            except DatabaseError as error:
                failures = failures + 1 if self.trouble else 0
                await self._wait_out(error, failures)

    async def catch_up(self) -> int:
        """Read the stream to its end, once; how many changes there were. For ``--once``."""
        if self._position is None:
            await self._locate()
        assert self._position is not None
        try:
            return await self._read_to_end(self._position)
        except HistoryLost as lost:
            gap = self._tell_of_gap(str(lost))
            await self.persist(partial(self.scan, gap=gap, restart=True))
            return 1

    async def _read_to_end(self, position: Position) -> int:
        stream = await self.database.open_stream(position, self.registry.watched)
        changes = 0
        try:
            while True:
                batch = await self.database.next_batch(stream, self.caught_up)
                if not batch.changes:
                    await self._finish_large()
                    await self._save(batch.position)
                    return changes
                await self.snapshot(batch.runs, position=batch.position)
                changes += batch.changes
        finally:
            await self._forget(stream)

    async def _locate(self) -> None:
        """Find the position to start from; without one, scan."""

        async def locate() -> None:
            site = self.lease.site
            shown = await self.database.reactions(site, state="failed", handler=UNREADABLE)
            self._unreadable = {reaction.run for reaction, _ in shown}
            record = await self.database.site_record(site)
            self._position = record.position if record else None
            if record is None or self._position is None:
                logger.info("first look at the runs database: scanning all runs")
                await self.scan(gap=None, restart=True)
            elif not self.registry.watched <= record.watched:
                # What these fields were before nobody noted: the stream goes on where it was.
                logger.info("handlers watch fields that were not watched: scanning all runs")
                await self.scan()

        await self.persist(locate)

    async def _follow(self) -> None:
        assert self._position is not None
        stream = await self.database.open_stream(self._position, self.registry.watched)
        await self.intake.reconcile()
        self.trouble.over("stream")
        send, receive = trio.open_memory_channel[_Ahead](0)
        failed: DatabaseError | None = None
        try:
            async with trio.open_nursery() as nursery:
                # While one batch is recorded the next one is read and looked at.
                nursery.start_soon(self._read, stream, send)
                nursery.start_soon(self._record_large)
                async for ahead in receive:
                    await self._take_in(ahead)
                    ahead.recorded.set()
        except* DatabaseError as group:
            failed = _worst(group)  # raised here, Python before 3.11.4 would put it into a group
        finally:
            # Whether what was being recorded now is, only the database knows.
            self._recorded = {}
            self._known.clear()
            await self._forget(stream)
        if failed is not None:
            raise failed

    async def _forget(self, stream: Stream) -> None:
        with trio.move_on_after(CLOSING, shield=True):
            try:
                await self.database.close_stream(stream)
            except DatabaseError as error:
                logger.debug("the stream's cursor is left to the server: {}", error)

    async def _read(self, stream: Stream, send: trio.MemorySendChannel[_Ahead]) -> None:
        while True:
            turn = self._turn
            found = await self.database.next_look(
                stream, self.lease.site, self._known, self.registry.watched
            )
            ahead = _Ahead(*found, turn)
            await send.send(ahead)
            if ahead.batch.changes < BACKLOG:
                # To ask for more at once would only get into the way of these few.
                await ahead.recorded.wait()

    async def _take_in(self, ahead: _Ahead) -> None:
        batch = ahead.batch
        newest = max(batch.runs.values(), default=None)
        self.behind = 0.0 if newest is None else max((utcnow() - newest).total_seconds(), 0.0)
        metrics.changes.labels(self.lease.site).inc(batch.changes)
        if batch.changes and await self._record_batch(ahead):
            self._position, self._saved_at = batch.position, trio.current_time()
        elif trio.current_time() - self._saved_at >= SAVE_EVERY:
            await self._save(batch.position)
        else:
            self._position = batch.position

    async def _record_batch(self, ahead: _Ahead) -> bool:
        """Record what a batch shows that is new; False where nothing is."""
        batch, looked = ahead.batch, ahead.looked
        async with self._looking:
            if ahead.turn != self._turn:  # a scan or a replay came between
                looked = await self._read_snapshots(batch.runs)
            else:
                # The snapshots were read while the batch before this one was being recorded.
                for run, snapshot in self._recorded.items():
                    if run in batch.runs:
                        looked.before[run] = dict(snapshot or {})
            ingest = self._compare(batch.runs, looked)
            self._recorded = {}
            if not ingest.snapshots:
                return False
            await self._record(evolve(ingest, position=self._to_save(batch.position)))
            refused = self._unreadable
            self._recorded = {
                run: one for run, one in ingest.snapshots.items() if run not in refused
            }
            return True

    def _to_save(self, position: Position | None) -> Position | None:
        return None if self._large else position

    async def _save(self, position: Position) -> None:
        if self._to_save(position) is not None:
            try:
                await self.database.save_position(self.lease, position, utcnow())
            except InvalidDocument as error:  # the next start reads again from the former position
                logger.error("the position in the stream cannot be saved: {}", error)
            self._saved_at = trio.current_time()
        self._position = position

    # -- trouble ----------------------------------------------------------------------------

    def _tell_of_gap(self, why: str) -> Gap:
        logger.warning("{}; scanning all runs to make up for it", why)
        metrics.gaps.labels(self.lease.site).inc()
        self.alarms.raise_(gap_alarm(self.lease.site, why))
        return Gap(utcnow(), why)

    async def persist(self, function: Callable[[], Awaitable[T]]) -> T:
        """Call an async function again until the database lets it through."""
        failures = 0
        while True:
            try:
                result = await function()
            except DatabaseError as error:
                await self._wait_out(error, failures)
                failures += 1
            else:
                self.trouble.over("stream")
                return result

    async def _wait_out(self, error: DatabaseError, failures: int) -> None:
        if is_fatal(error):
            raise error
        self.trouble.meet("stream", error)
        await trio.sleep(min(0.2 * 2 ** min(failures, 20), LONGEST_WAIT))

    # -- looking ----------------------------------------------------------------------------

    async def scan(self, *, gap: Gap | None = None, restart: bool = False) -> None:
        """Look at every run, stored or seen. With `restart`, stream on from its beginning."""
        start = await self.database.cluster_time() if restart else None
        after, runs = None, 0
        while True:
            ids, after = await self.database.page(self.lease.site, after)
            await self.snapshot(dict.fromkeys(ids, utcnow()))
            runs += len(ids)
            if after is None:
                break
        await self._finish_large()
        await self.database.finish_scan(self.lease, start, utcnow(), gap, self.registry.watched)
        if start is not None:
            self._position = Position(start=start)
        logger.info("scanned {} runs", runs)

    async def scan_daily(self, then: Callable[[], Awaitable[None]]) -> None:
        """Scan once a day, for ever, as a safety net, and then do what else is done daily."""
        while True:
            await self.persist(self._sleep_until_scan)
            await self.persist(self.scan)
            # A deposed process that woke up late may have claimed what it will never settle.
            await self.persist(self.intake.reconcile)
            await then()

    async def _sleep_until_scan(self) -> None:
        record = await self.database.site_record(self.lease.site)
        last = record.scanned if record else None
        age = 0.0 if last is None else (utcnow() - last).total_seconds()
        await trio.sleep(min(max(SCAN_EVERY - age, 0.0), SCAN_EVERY))

    async def snapshot(
        self, runs: Mapping[RunId, datetime], *, position: Position | None = None
    ) -> None:
        """Look at runs (each with the time of its change) and record what is new."""
        async with self._looking_apart():
            ingest = self._compare(runs, await self._read_snapshots(runs))
            if ingest.snapshots or position is not None:
                await self._record(evolve(ingest, position=self._to_save(position)))

    async def _record_large(self) -> None:
        """Record what is new of large runs, for ever, beside the stream."""
        while True:
            await self._finish_large()
            self._grown = trio.Event()
            await self._grown.wait()

    async def _finish_large(self) -> None:
        """Record what is new of large runs: of each in turn a piece, others in between."""
        while self._large:
            async with self._looking_apart():
                if self._large:
                    await self._record_piece(next(iter(self._large)))

    async def _record_piece(self, run: RunId) -> None:
        looked, at = await self._read_snapshots([run]), self._large[run]
        ingest = self._compare({run: at}, looked, piece=True)
        if ingest.snapshots:
            await self._record(ingest)
        del self._large[run]
        rest = ingest.snapshots and ingest.snapshots[run] != looked.now.get(run)
        if rest and run not in self._unreadable:
            self._large[run] = at

    @asynccontextmanager
    async def _looking_apart(self) -> AsyncIterator[None]:
        """Look at runs beside the stream: what it has read ahead meanwhile is read anew."""
        async with self._looking:
            # Before and after: a look-ahead may begin at any time in between.
            self._turn += 1
            try:
                yield
            finally:
                self._turn += 1

    async def _read_snapshots(self, runs: Iterable[RunId]) -> Snapshots:
        return await self.database.snapshot(
            self.lease.site, list(runs), self._known, self.registry.watched
        )

    def _remember(self, snapshots: Mapping[RunId, Snapshot | None]) -> None:
        """Keep looks that were recorded: a run that changed will soon change again."""
        for run, snapshot in snapshots.items():
            # One step each: the next look may be read in the database's thread meanwhile.
            if snapshot is not None and len(snapshot) <= KNOWN_SIZE:
                self._known[run] = snapshot
                self._known.move_to_end(run)
            else:
                self._known.pop(run, None)
        while len(self._known) > KNOWN:
            self._known.popitem(last=False)

    def _compare(
        self, runs: Mapping[RunId, datetime], looked: Snapshots, *, piece: bool = False
    ) -> Ingest:
        """What is new of these runs; of a large one nothing, or, with `piece`, as much as goes.

        The look that goes with a piece is the last one and the piece's events.
        """
        snapshots: dict[RunId, Snapshot | None] = {}
        reactions: list[Reaction] = []
        priorities: dict[RunId, int] = {}
        for run, at in runs.items():
            now, before = looked.now.get(run, {}), looked.before.get(run, {})
            events = diff(run, before, now)
            if not events:
                continue
            priority = priority_of(now, self.urgent)
            taken, owed = self._as_many_as_go(events, at, priority)
            if len(taken) < len(events) and not piece:
                self._large.setdefault(run, at)
                self._grown.set()
                continue
            snapshots[run] = (
                looked.now.get(run) if len(taken) == len(events) else replay(before, taken)
            )
            reactions.extend(owed)
            if self.urgent and any(self._is_urgent(event) for event in taken):
                priorities[run] = priority
        return Ingest(snapshots, reactions, runs=looked.whole, priorities=priorities)

    def _as_many_as_go(
        self, events: Sequence[Event], at: datetime, priority: int
    ) -> tuple[Sequence[Event], list[Reaction]]:
        """The first of a run's events, up to `AT_ONCE` reactions, and these; one event at least."""
        reactions: list[Reaction] = []
        for number, event in enumerate(events):
            owed = list(self._reactions(event, at, priority))
            if reactions and len(reactions) + len(owed) > AT_ONCE:
                return events[:number], reactions
            reactions.extend(owed)
        return events, reactions

    def _is_urgent(self, event: Event) -> bool:
        return isinstance(event.aspect, Tag) and event.aspect.tag in self.urgent

    def _reactions(self, event: Event, at: datetime, priority: int) -> Iterator[Reaction]:
        for handler in self.registry.wanting(event):
            yield self._owe(event, handler, at, priority)

    def _owe(self, event: Event, handler: Handler, at: datetime, priority: int) -> Reaction:
        return owe(
            self.lease.site,
            event,
            handler.name,
            lane=handler.lane,
            generation=next(self._generations),
            # Due at once, whatever the clock of the server was on which the change was made.
            at=min(at, utcnow()),
            priority=priority,
        )

    async def _record(self, ingest: Ingest) -> None:
        reactions = self.intake.reserve(ingest.reactions)
        readable = ingest.snapshots.keys() & self._unreadable
        settled = [self._shown(run, Done("it can be recorded again")) for run in readable]
        refused: DatabaseError | None = None
        recorded = False
        try:
            everything = evolve(ingest, reactions=[*reactions, *settled])
            await self.database.ingest(self.lease, everything, utcnow())
            recorded = True
        except DatabaseError as error:
            if not concerns_one(error):
                raise
            refused = error
        finally:
            if not recorded:
                self.intake.cancel(reactions)
                for run in ingest.snapshots:  # recorded or not, we cannot say
                    self._known.pop(run, None)
        if refused is not None:
            await self._record_apart(ingest, refused)
            return
        self._remember(ingest.snapshots)
        self._unreadable -= readable
        for reaction in settled:
            self.alarms.clear(parked_key(reaction))
        for handler, number in Counter(reaction.handler for reaction in reactions).items():
            metrics.reactions.labels(self.lease.site, handler).inc(number)
        self.intake.start(reactions, ingest.runs)
        if ingest.priorities:  # what was due before may now go first, or last
            self.intake.look_again()

    async def _record_apart(self, ingest: Ingest, error: DatabaseError) -> None:
        """Record a batch that the database will not take run by run, and park what is at fault.

        The position goes with the last piece, so that nothing is passed over.
        """
        runs = list(
            dict.fromkeys([*ingest.snapshots, *(reaction.run for reaction in ingest.reactions)])
        )
        if not runs:
            raise error
        if len(runs) == 1:
            label = await self._label(runs[0])
            reaction = self._shown(runs[0], Failed(str(error)))
            await self._pass_by(reaction, ingest.position)
            logger.error("{} cannot be recorded: {}", label, error)
            self._unreadable.add(runs[0])
            self.alarms.raise_(parked(reaction, label))
            return
        middle = len(runs) // 2
        await self._record(_part(ingest, runs[:middle], position=False))
        await self._record(_part(ingest, runs[middle:], position=True))

    async def _pass_by(self, reaction: Reaction, position: Position | None) -> None:
        """Record what shows a run that cannot be recorded, if that can be; else the position alone.

        If not even that can be recorded, it is the site's own document that the ledger refuses.
        """
        try:
            await self.database.ingest(self.lease, Ingest({}, [reaction], position), utcnow())
        except DatabaseError as error:
            if not concerns_one(error):
                raise
            await self._record_position(position)

    async def _record_position(self, position: Position | None) -> None:
        try:
            await self.database.ingest(self.lease, Ingest({}, (), position), utcnow())
        except DatabaseError as error:
            raise of_the_site(error) from error

    async def _label(self, run: RunId) -> str:
        """Return what people call a run; its id if it is no longer there."""
        found = await self.database.runs([run])
        return str(found[run]) if run in found else f"run {run}"

    def _shown(self, run: RunId, outcome: Outcome) -> Reaction:
        """The reaction that shows whether a run can be recorded."""
        event = Event(run, Existence(), None, YES)
        reaction = owe(
            self.lease.site,
            event,
            UNREADABLE,
            lane="default",
            generation=next(self._generations),
            at=utcnow(),
        )
        claimed = claim(reaction, self.lease.epoch)
        return settle(claimed, outcome, utcnow(), allowed=1, jitter=0.0)

    # -- requests ---------------------------------------------------------------------------

    async def serve_requests(self) -> None:
        """Carry out what people asked for, oldest first."""
        for request in await self.database.pending(self.lease.site):
            try:
                await self._serve(request)
            except DatabaseError as error:
                if not concerns_one(error):
                    raise
                logger.error("a request to {} cannot be carried out: {}", request.kind, error)
            await self.database.finish_request(self.lease, request)

    async def _serve(self, request: Request) -> None:
        match request.kind:
            case "scan":
                await self.scan()
            case "retry":
                await self._look_again(request)
                opened = await self.database.reopen_failed(self.lease, request, utcnow())
                logger.info("{} failed reactions are opened again", opened)
                self.intake.look_again()
            case "replay":
                await self._replay(request)
            case "clear":
                await self.alarms.clear_and_keep(request.alarm or "")
            case _:
                logger.error("a request of an unknown kind, {!r}, is passed over", request.kind)

    async def _look_again(self, request: Request) -> None:
        """Look at runs that could not be recorded: they may have been repaired, or deleted."""
        runs = self._unreadable & set(self._unreadable if request.runs is None else request.runs)
        if not runs or request.handler not in (None, UNREADABLE):
            return
        await self.snapshot(dict.fromkeys(runs, utcnow()))
        await self._finish_large()
        gone = (runs & self._unreadable) - (await self.database.runs(runs)).keys()
        if gone:
            settled = [self._shown(run, Done("the run is no longer there")) for run in gone]
            await self.database.ingest(self.lease, Ingest({}, settled), utcnow())
            self._unreadable -= gone
            for reaction in settled:
                self.alarms.clear(parked_key(reaction))

    async def _replay(self, request: Request) -> None:
        after, ids = None, list(request.runs or ())
        while True:
            if request.runs is None:
                ids, after = await self.database.page(self.lease.site, after)
            await self._fire_again(ids, request)
            if after is None:
                return

    async def _fire_again(self, ids: Sequence[RunId], request: Request) -> None:
        """Record what is new of these runs, and with it what their present states fire again.

        One look for both: what is fired for a state counts as seen, and the stream does not fire
        it once more.
        """
        async with self._looking_apart():
            looked = await self._read_snapshots(ids)
            ingest = self._compare(dict.fromkeys(ids, utcnow()), looked)
            large = self._large.keys() & set(ids)
            if not large:
                again = await self._again(looked.now, request, but=ingest.reactions)
                if ingest.snapshots or again:
                    reactions = [*ingest.reactions, *again[:AT_ONCE]]
                    await self._record(evolve(ingest, reactions=reactions))
        if large:  # the stream's events first: else they would fire what was fired for a state
            await self._finish_large()
            hopeless = large & self._unreadable
            await self._fire_again([run for run in ids if run not in hopeless], request)
            return
        for start in range(AT_ONCE, len(again), AT_ONCE):
            async with self._looking_apart():
                piece = again[start : start + AT_ONCE]
                newer = await self.database.standing([reaction.id for reaction in piece])
                # What came meanwhile is not to be undone.
                piece = [
                    d for d in piece if d.id not in newer or newer[d.id].generation < d.generation
                ]
                if piece:
                    await self._record(Ingest({}, piece))
        logger.info("replayed {} runs: {} reactions", len(looked.now), len(again))

    async def _again(
        self, snapshots: Mapping[RunId, Snapshot], request: Request, *, but: Iterable[Reaction]
    ) -> list[Reaction]:
        """The reactions that a replay makes of what these runs look like, but for those."""
        possible = [
            reaction_key(self.lease.site, run, aspect, handler.name)
            for run, snapshot in snapshots.items()
            for handler in self.registry.enabled
            for aspect, _ in self.registry.owed(snapshot, handler)
        ]
        standing = await self.database.standing(possible)
        again = [
            self._fired(event, handler, snapshot)
            for run, snapshot in snapshots.items()
            for event, handler in owed_again(self.registry, run, snapshot, standing, request)
        ]
        new = {reaction.id for reaction in but}
        return [reaction for reaction in again if reaction.id not in new]

    def _fired(self, event: Event, handler: str, snapshot: Snapshot) -> Reaction:
        priority = priority_of(snapshot, self.urgent)
        return self._owe(event, self.registry.handlers[handler], utcnow(), priority)


def _part(ingest: Ingest, runs: Iterable[RunId], *, position: bool) -> Ingest:
    chosen = set(runs)
    return Ingest(
        {run: snapshot for run, snapshot in ingest.snapshots.items() if run in chosen},
        [reaction for reaction in ingest.reactions if reaction.run in chosen],
        ingest.position if position else None,
        priorities={run: n for run, n in ingest.priorities.items() if run in chosen},
    )


def _worst(group: BaseExceptionGroup[DatabaseError]) -> DatabaseError:
    """Return the error of several that decides what to do."""
    leaves: list[DatabaseError] = []
    stack: list[BaseException] = [group]
    while stack:
        error = stack.pop()
        if isinstance(error, BaseExceptionGroup):
            stack.extend(error.exceptions)
        elif isinstance(error, DatabaseError):
            leaves.append(error)
    return min(leaves, key=lambda error: (is_transient(error), isinstance(error, HistoryLost)))
