"""Workers per lane: take what is due, attempt it, settle it.

`watcher` hands over reactions as they are recorded, some of them claimed already because a lane has
room: those start without another round trip. What there is no room for stays in the database and
is fetched, in the lane's order, when a worker is free, so that a million open reactions cost no
memory. Claims, reads of runs and settlements are done in groups.

Tasks, all started by `listener`: `Dispatcher.take` claims what is due (intake), `Dispatcher.pay`
settles and writes progress (it must outlive the attempts), and one task for each attempt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timedelta
from math import inf
from random import random
from typing import Any, Final, TypeVar

import trio
from attrs import Factory, define, evolve, field
from loguru import logger

from caxev import failpoints, metrics
from caxev.alarms import Descriptors, descriptors
from caxev.config import Site, Sites
from caxev.config.directories import are_near
from caxev.copies.sharing import Neighbours
from caxev.core.alarms import (
    Alarm,
    Alarms,
    missing,
    parked,
    parked_key,
    refused,
    refused_key,
    uncancellable,
    uncancellable_key,
    unrecorded,
)
from caxev.core.clock import utcnow
from caxev.core.job import Job
from caxev.core.ledger import (
    Done,
    Failed,
    Hindered,
    Interrupted,
    Outcome,
    Postponed,
    Reaction,
    State,
    claim,
    settle,
)
from caxev.core.model import CopyKey, Run, RunId, RunUpdate, as_utc, time_of
from caxev.core.recurrence import Recurrence
from caxev.core.registry import Handler, Registry
from caxev.database import (
    Database,
    DatabaseError,
    Lease,
    LeaseLost,
    concerns_one,
    is_fatal,
)
from caxev.engine.attempt import Ended, RateMeter, Watch, as_parked, attempt, log_outcome, refusal
from caxev.engine.lanes import LANES, OTHER_LANE, Lane, few_of_each, in_turn
from caxev.engine.root_watch import RootWatch
from caxev.engine.run_locks import RunCache, RunLocks, is_large
from caxev.engine.trouble import Trouble
from caxev.engine.workers import Workers

T = TypeVar("T")

PROGRESS_EVERY: Final = 5.0
"""Seconds between two writes of a reaction's progress to the ledger."""
ALIVE: Final = 15 * 60.0
"""Seconds for which progress that was written shows that a reaction is at work."""
IGNORED: Final = 30.0
"""Seconds after which an attempt that was cut short, and still runs, is reported."""
REFUSED: Final = timedelta(minutes=5)
"""The time after which people are told of a refusal for which reactions wait."""
TOGETHER: Final = 32
"""Reactions whose updates are written in one transaction, where many have ended."""
BRIEF: Final = 1.0
"""Seconds for which a write that conflicts with another may be repeated without a report."""
WITHOUT_HANDLER: Final = 3600.0
"""Seconds after which a reaction without its handler is looked at again; a restart does so at once,
if the handler is there by then."""
SURE_FOR: Final = 300.0
"""Seconds after which the claims in the database are compared with what runs, though nothing was
heard: a deposed process may have claimed something, and died before it could give that back."""


@define(eq=False)
class Dispatcher:
    """Pays one site's reactions. Implements `watcher.Intake`."""

    database: Database
    lease: Lease
    registry: Registry
    site: Site
    sites: Sites
    workers: Workers
    attempts: trio.Nursery
    alarms: Alarms = field(factory=Alarms)
    trouble: Trouble = field(
        default=Factory(lambda self: Trouble(self.lease.site), takes_self=True)
    )
    roots: RootWatch | None = None
    _lanes: dict[str, Lane] = field(init=False, factory=dict)
    _ended: list[Ended] = field(init=False, factory=list)
    _run_locks: RunLocks = field(init=False, factory=RunLocks)
    _progress: dict[str, tuple[Reaction, dict[str, Any]]] = field(init=False, factory=dict)
    # By key, what the ledger refuses to change: an open one cannot be claimed, a claimed one can
    # be neither settled nor freed. It is left alone until the next look at all claims.
    _refused: dict[str, Ended] = field(init=False, factory=dict)
    _wake: trio.Event = field(init=False, factory=trio.Event)
    _settle: trio.Event = field(init=False, factory=trio.Event)
    _freed: trio.Event = field(init=False, factory=trio.Event)
    _claiming: trio.Lock = field(init=False, factory=trio.Lock)
    # Whether a claim of ours may stand in the database unheard of, and whether lanes that no
    # handler uses may hold reactions.
    # At first, some may stand that could not be taken from a former process.
    _doubtful: bool = field(init=False, default=True)
    _unsurveyed: bool = field(init=False, default=True)
    # The newest generation that is recorded. At first: those of former processes are all below it.
    _recorded: int = field(init=False)
    _run_cache: RunCache = field(init=False, factory=RunCache)
    _sure_until: float = field(init=False, factory=lambda: trio.current_time() + SURE_FOR)
    _latency: Any = field(init=False)
    _recurrence: Recurrence = field(init=False, factory=Recurrence)
    # The attempts under way, each with its run's label for people.
    _attempting: dict[str, tuple[Reaction, Watch, str]] = field(init=False, factory=dict)
    # The alarm that stands for each reaction which waits for somebody to lift a refusal.
    _awaited: dict[str, str] = field(init=False, factory=dict)
    _uncancellable: set[str] = field(init=False, factory=set)
    _lacked_files: bool = field(init=False, default=False)
    _attempt_over: trio.Event = field(init=False, factory=trio.Event)

    def __attrs_post_init__(self) -> None:
        self._latency = metrics.latency.labels(self.lease.site)
        self._recorded = (self.lease.epoch << 40) - 1
        for handler in self.registry.handlers.values():
            self._lane(handler.lane)

    def _lane(self, name: str) -> Lane:
        if name not in self._lanes:
            workers = self.site.lanes.get(name, LANES.get(name, OTHER_LANE))
            self._lanes[name] = Lane(name, workers)
        return self._lanes[name]

    @property
    def running(self) -> int:
        """How many reactions are claimed by this process now."""
        return sum(len(lane.running) for lane in self._lanes.values())

    @property
    def attempting(self) -> str:
        """The attempts under way, for people."""
        found = self._attempting.values()
        return ", ".join(
            f"{reaction.handler} ({reaction.event} of {run})" for reaction, _, run in found
        )

    # -- intake: called by the watcher --------------------------------------------------------

    def reserve(self, reactions: Sequence[Reaction]) -> list[Reaction]:
        """Claim as many of these new reactions as there are free workers for."""
        return [self._reserve(reaction) for reaction in reactions]

    def _reserve(self, reaction: Reaction) -> Reaction:
        lane = self._lane(reaction.lane)
        # While older reactions wait in the database they go first.
        behind = lane.more or lane.waiting or not lane.free
        if reaction.state is not State.PENDING or behind or reaction.id in lane.running:
            return reaction
        lane.running.add(reaction.id)
        return claim(reaction, self.lease.epoch)

    def cancel(self, reactions: Sequence[Reaction]) -> None:
        """Give the reservations back; whether they were recorded, only the database knows."""
        for reaction in reactions:
            if reaction.state is State.RUNNING:
                self._lane(reaction.lane).running.discard(reaction.id)
        self._doubtful = True
        self._wake.set()
        self._freed.set()

    def start(self, reactions: Sequence[Reaction], runs: Mapping[RunId, Run]) -> None:
        """Start the claimed reactions, and see to it that the others are fetched."""
        self._recorded = max(
            (reaction.generation for reaction in reactions), default=self._recorded
        )
        # A refused claim stands in the way of what was recorded in its key.
        self._doubtful = self._doubtful or any(
            reaction.id in self._refused for reaction in reactions
        )
        claimed = [reaction for reaction in reactions if reaction.state is State.RUNNING]
        if claimed:
            self.attempts.start_soon(self._begin, claimed, runs)
        for reaction in reactions:
            if reaction.state is State.PENDING:
                self._lane(reaction.lane).snapshot()
        if len(claimed) < len(reactions):
            self._wake.set()

    async def reconcile(self) -> None:
        """Free what stands as claimed by us or a former process, and is not running."""
        late = trio.current_time() >= self._sure_until
        async with self._claiming:  # else a claim made just now could pass for a stale one
            self._doubtful = False
            self._sure_until = trio.current_time() + SURE_FOR
            try:
                claims = await self.database.claims(self.lease)
                running = {key for lane in self._lanes.values() for key in lane.running}
                await self._try_refused(claims, late=late)
                known = running | self._refused.keys()
                stale = [claim for claim in claims if claim["_id"] not in known]
                freed, refused = await self.database.free(stale)
                for reaction in (await self.database.standing(list(refused))).values():
                    why = f"it cannot be opened again: {refused[reaction.id]}"
                    self._leave_refused(Ended(reaction, Failed(why)))
            except BaseException:
                self._doubtful = True
                raise
        if freed or late:  # what was given back is open, and nobody was told
            self.look_again()

    async def _try_refused(self, claims: Sequence[Mapping[str, Any]], *, late: bool) -> None:
        """Forget what the ledger refused if it was written anew; now and then, try the rest again.

        What has ended is recorded as failed, and not opened: it would be run again and again.
        """
        generations = {claim["_id"]: claim.get("generation") for claim in claims}
        kept = [
            one
            for key, one in self._refused.items()
            if generations.get(key) == one.reaction.generation
        ]
        self._refused = {} if late else {one.reaction.id: one for one in kept}
        for one in kept if late else ():
            if one.reaction.epoch == self.lease.epoch:
                await self._park(one)

    def look_again(self) -> None:
        """Ask the database for due reactions in all lanes."""
        self._run_cache = (
            RunCache()
        )  # reactions may have been opened under generations that they had before
        self._unsurveyed = True
        for lane in self._lanes.values():
            lane.snapshot()
        self._wake.set()

    # -- taking -----------------------------------------------------------------------------

    async def take(self) -> None:
        """Claim what is due and start it, for ever: when a reaction comes, or its time does."""
        while True:
            self._wake = trio.Event()
            if self._doubtful or trio.current_time() >= self._sure_until:
                await self._retrying(self.reconcile)
            if self._unsurveyed:
                await self._retrying(self._find_lanes)
            busy = [
                lane for lane in self._lanes.values() if lane.free and (lane.waiting or lane.more)
            ]
            for lane in busy:
                await self._retrying(self._fill, lane)
            if not busy:
                self._freed.set()
                with trio.move_on_after(self._until_due()):
                    await self._wake.wait()
                self._ring()

    async def _find_lanes(self) -> None:
        self._unsurveyed = False
        for name in await self.database.lanes(self.lease.site):
            self._lane(name)

    async def _fill(self, lane: Lane) -> None:
        """Claim for every free worker of a lane."""
        if lane.stale:
            await self._fetch(lane)
        due = [lane.waiting.popleft() for _ in range(min(lane.free, len(lane.waiting)))]
        due = self._not_running(lane, due)
        if due:
            await self._claim(lane, due)

    def _not_running(self, lane: Lane, reactions: Iterable[Reaction]) -> list[Reaction]:
        """Leave out keys whose former reaction has not been settled, and remember them."""
        found = [reaction for reaction in reactions if not self._is_refused(reaction)]
        lane.passed |= {reaction.id for reaction in found} & lane.running
        return [reaction for reaction in found if reaction.id not in lane.running]

    async def _fetch(self, lane: Lane) -> None:
        """Fetch what is due in a lane; where there is nothing, learn when the next reaction is."""
        lane.more, lane.news, lane.next_due, lane.fetching = False, False, None, True
        fetched = heard = False
        try:
            now = utcnow()
            site, since = self.lease.site, lane.since
            window = lane.window
            due = await self.database.due(
                site, lane.name, now, window, since=since, order=lane.order
            )
            found = due
            if (run := lane.crowding(due)) is not None:
                found = [*due, *await self._of_others(lane, run, now, due)]
            heard = True
            found = self._not_running(lane, found)
            kept = few_of_each(found, lane.share)
            lane.keep(kept if lane.newest_first else in_turn(kept))
            # At the end of the row, one look without `since` makes sure that it was the end.
            fetched = len(due) < window and since is None and len(kept) == len(found)
            goes_on = len(due) == window and not lane.newest_first
            # Not past what is left out: that would wait until all that came later is paid.
            taken = {reaction.id for reaction in kept}
            left_out = [reaction.due for reaction in found if reaction.id not in taken]
            lane.since = min([*left_out, due[-1].due]) if goes_on else None
            if fetched:
                # A settlement may arm the timer meanwhile: the earlier time counts.
                lane.arm(await self.database.next_due(site, lane.name, now))
        finally:
            lane.more, lane.fetching = lane.more or not fetched, False
            lane.news = lane.news or not heard

    async def _of_others(
        self, lane: Lane, run: RunId, now: datetime, due: Sequence[Reaction]
    ) -> list[Reaction]:
        """Fetch what else is due in a lane, first of all, for other runs that are as urgent."""
        site, order, known = self.lease.site, lane.order, {reaction.id for reaction in due}
        more = await self.database.due(site, lane.name, now, lane.share, order=order, without=run)
        least = due[-1].priority if lane.newest_first else 0
        return [
            reaction for reaction in more if reaction.id not in known and reaction.priority >= least
        ]

    def _is_refused(self, reaction: Reaction) -> bool:
        return (
            reaction.id in self._refused
            and self._refused[reaction.id].reaction.generation == reaction.generation
        )

    def _leave_refused(self, ended: Ended) -> None:
        """Raise an alarm about a reaction that the ledger refuses to change, and leave it alone."""
        self._refused[ended.reaction.id] = ended
        reaction = as_parked(ended)
        self.alarms.raise_(unrecorded(reaction, ended.run or f"run {reaction.run}"))

    async def _claim_those(self, due: Sequence[Reaction]) -> list[Reaction]:
        """Claim reactions in one write; by halves if the ledger refuses one."""
        try:
            return await self.database.claim(due, self.lease.epoch)
        except DatabaseError as error:
            if not concerns_one(error):
                raise
            if len(due) == 1:
                self._leave_refused(Ended(due[0], Failed(f"it cannot be claimed: {error}")))
                return []
            # What the first write has claimed counts as claimed by the second.
            middle = len(due) // 2
            return [
                *await self._claim_those(due[:middle]),
                *await self._claim_those(due[middle:]),
            ]

    async def _claim(self, lane: Lane, due: Sequence[Reaction]) -> None:
        keys = {reaction.id for reaction in due}
        lane.running |= keys
        claimed: list[Reaction] = []
        heard = False
        try:
            async with self._claiming:
                claimed = await self._claim_those(due)
            heard = True
        finally:
            self._doubtful = self._doubtful or not heard
            lane.running -= keys - {reaction.id for reaction in claimed}
            # What was renewed, or may have been claimed unheard, is to be fetched again.
            if len(claimed) < len(due):
                lane.snapshot()
        self._count(lane)
        if claimed:
            mine = [claim(reaction, self.lease.epoch) for reaction in claimed]
            self.attempts.start_soon(self._begin, mine, {})

    def _until_due(self) -> float:
        times = [lane.next_due for lane in self._lanes.values() if lane.next_due]
        sure = max(self._sure_until - trio.current_time(), 0.0)
        if not times:
            return sure
        return min(max((min(times) - utcnow()).total_seconds(), 0.0), sure)

    def _ring(self) -> None:
        """Look into the lanes whose next reaction is due by now."""
        now = utcnow()
        for lane in self._lanes.values():
            if lane.next_due is not None and lane.next_due <= now:
                lane.next_due = None
                lane.snapshot()

    async def wait_idle(self) -> None:
        """Wait until nothing is running and nothing is due. For ``--once``."""
        while not all(lane.idle for lane in self._lanes.values()):
            self._freed = trio.Event()
            await self._freed.wait()

    async def drained(self) -> None:
        """Wait until nothing is running: every attempt has ended.

        Not until all are settled: while the database is away that would take the whole grace.
        """
        while any(len(lane.running) > lane.ended for lane in self._lanes.values()):
            self._freed = trio.Event()
            await self._freed.wait()

    # -- attempting -------------------------------------------------------------------------

    async def _begin(self, reactions: Sequence[Reaction], runs: Mapping[RunId, Run]) -> None:
        """Read the runs of claimed reactions, all at once, and attempt each."""
        unread = {reaction.run for reaction in reactions} - runs.keys()
        why = "the listener was stopped"
        try:
            if unread:
                runs = {**runs, **await self._read(unread, reactions)}
            why = ""
        except DatabaseError as error:
            why = str(error)
        finally:
            if why:
                for reaction in reactions:
                    self._end(Ended(reaction, Interrupted(why)))
        if why:
            return
        async with trio.open_nursery() as nursery:
            for reaction in reactions:
                nursery.start_soon(self._pay_one, reaction, runs.get(reaction.run))

    async def _read(
        self, ids: Collection[RunId], reactions: Sequence[Reaction]
    ) -> dict[RunId, Run]:
        """Read runs as they are after these reactions were recorded."""
        run_cache = self._run_cache
        shelved = run_cache.take(ids, reactions)
        if len(shelved) == len(ids):
            return shelved
        at, recorded = trio.current_time(), self._recorded
        runs = await self.database.runs(set(ids) - shelved.keys())
        run_cache.put(runs.values(), at, recorded)
        return {**shelved, **runs}

    async def _pay_one(self, reaction: Reaction, run: Run | None) -> None:
        """Attempt one reaction; whatever becomes of it, it is handed on to be settled."""
        ended = Ended(reaction, Interrupted("the listener was stopped"))
        try:
            handler = self.registry.handlers.get(reaction.handler)
            if handler is None:
                self.alarms.raise_(missing(reaction.site, reaction.handler))
                why = f"no handler named {reaction.handler!r} is installed here: it waits for one"
                ended = Ended(reaction, Postponed(why, WITHOUT_HANDLER), run=str(run or ""))
            elif run is None and reaction.after is not None:
                ended = Ended(reaction, Done("the run is no longer in the database"))
            elif run is not None and not self.site.wants_run(run.name):
                ended = Ended(reaction, Done("nothing to do: the run is not in dataset_list"))
            else:
                with logger.contextualize(
                    run=str(run or reaction.run),
                    event=str(reaction.event),
                    handler=reaction.handler,
                ):
                    ended = await self._attempt(reaction, handler, run or Run(reaction.run))
        finally:
            self._end(ended)

    async def _attempt(self, reaction: Reaction, handler: Handler, run: Run) -> Ended:
        failpoints.scope.set(handler.name)
        waited = await self._run_locks.enter(reaction, exclusive=handler.exclusive)
        try:
            # Who had to wait did so for what may have changed the run; and nothing is deleted by
            # what was read for others.
            if waited or (handler.exclusive and is_large(run)):
                try:
                    runs = await self.database.runs([reaction.run])
                except DatabaseError as error:
                    return Ended(reaction, Interrupted(str(error)))
                run = runs.get(reaction.run, Run(reaction.run))
            if reaction.started is None:
                reaction = evolve(reaction, started=utcnow())
                self._latency.observe((utcnow() - reaction.at).total_seconds())
                if (why := no_news(run, reaction)) is not None:
                    return Ended(reaction, Failed(why), run=str(run))
            return await self._try(reaction, handler, run)
        finally:
            self._run_locks.leave(reaction, exclusive=handler.exclusive)

    async def _try(self, reaction: Reaction, handler: Handler, run: Run) -> Ended:
        now = trio.current_time()
        if (why := self._recurrence.excess(reaction, len(run.copies), now)) is not None:
            log_outcome(Failed(why))
            return Ended(reaction, Failed(why), (), str(run))
        sites = self.sites if self.roots is None else await self.roots.known()
        watch = Watch(handler)
        job = Job(
            run=run,
            event=reaction.event,
            site=sites.get(self.site.name),
            sites=sites,
            owner=f"{self.lease.site}#{self.lease.epoch}",
            log=logger,
            ports=_Ports(self, reaction),
            on_progress=self._progress_of(reaction, watch),
            urgency=(reaction.priority, reaction.generation),
            at=reaction.at,
        )
        self._attempting[reaction.id] = reaction, watch, str(run)
        try:
            outcome, update = await attempt(handler, job, watch)
        finally:
            del self._attempting[reaction.id]
            self._attempt_over.set()
            if reaction.id in self._uncancellable:
                self._uncancellable.discard(reaction.id)
                self._lane(reaction.lane).aside -= 1
                self.alarms.clear(uncancellable_key(reaction))
        self._lacked_files |= watch.lacked_files
        outcome = self._waiting_for_ours(outcome)
        if isinstance(outcome, Failed) and self.roots and await self.roots.have_changed(sites):
            outcome = Postponed(f"markers were noted meanwhile; before that: {outcome.why}", 0.0)
        if update is not None or outcome == Done():
            failpoints.point("through")
        updates: tuple[RunUpdate, ...] = () if update is None else (update,)
        if not isinstance(outcome, Done):
            updates = job.if_parked if self._is_last(reaction, handler, outcome) else ()
        log_outcome(outcome)
        return Ended(reaction, outcome, updates, str(run))

    def _report_uncancellable(self) -> None:
        """Name the attempts that go on long after they were cut short, and have others work."""
        for reaction, watch, run in self._attempting.values():
            if watch.ignored >= IGNORED and reaction.id not in self._uncancellable:
                self._uncancellable.add(reaction.id)
                self._lane(reaction.lane).aside += 1
                alarm = uncancellable(reaction, watch.verdict, run)
                logger.error("{}", alarm.summary)
                self.alarms.raise_(alarm)
                self._wake.set()

    def descriptors(self) -> Descriptors:
        """Return what the process has open: all that it may, if an attempt lacked one since."""
        found, lacked, self._lacked_files = descriptors(), self._lacked_files, False
        return found._replace(used=found.allowed) if lacked else found

    async def attempts_over(self) -> None:
        """Wait until no attempt is under way."""
        while self._attempting:
            self._attempt_over = trio.Event()
            await self._attempt_over.wait()

    @staticmethod
    def _is_last(reaction: Reaction, handler: Handler, outcome: Outcome) -> bool:
        """Whether this outcome parks the reaction."""
        after = settle(reaction, outcome, utcnow(), allowed=handler.attempts, jitter=0.0)
        return after.state is State.FAILED

    @contextmanager
    def aside(self, reaction: Reaction) -> Iterator[None]:
        """Let others of its lane work while this attempt waits for something else."""
        lane = self._lane(reaction.lane)
        lane.aside += 1
        self._wake.set()
        try:
            yield
        finally:
            lane.aside -= 1

    def _progress_of(self, reaction: Reaction, watch: Watch) -> Callable[[int, int], None]:
        pace = RateMeter()

        def on_progress(done: int, total: int) -> None:
            watch.moved()
            rate = pace.moved(done, trio.current_time())
            row = {"done": done, "total": total, "rate": rate, "at": utcnow()}
            self._progress[reaction.id] = (reaction, row)

        return on_progress

    def _end(self, ended: Ended) -> None:
        self._progress.pop(ended.reaction.id, None)
        self._run_cache.ended(ended.reaction)
        self._ended.append(ended)
        self._lane(ended.reaction.lane).ended += 1
        self._settle.set()
        self._wake.set()
        self._freed.set()

    # -- settling ---------------------------------------------------------------------------

    async def pay(self) -> None:
        """Settle attempts as they end, for ever, all that have ended in one write."""
        while True:
            await self._settle.wait()
            await self.settle_ended()

    async def settle_ended(self) -> None:
        """Settle all attempts that have ended, until none is left."""
        self._settle = trio.Event()
        while self._ended:
            plain = [one for one in self._ended if not one.updates]
            if plain:
                await self._retrying(self._settle_plain, plain)
                self._release(plain)
            await self._settle_updates([one for one in self._ended if one.updates][:TOGETHER])

    async def _settle_updates(self, ended: Sequence[Ended]) -> None:
        """Settle attempts with their updates: at once if that can be done, else by halves."""
        if len(ended) > 1 and not await self._settle_together(ended):
            middle = len(ended) // 2
            await self._settle_updates(ended[:middle])
            await self._settle_updates(ended[middle:])
            return
        if len(ended) == 1:
            await self._retrying(self._settle_with_updates, ended[0])
        self._release(ended)

    async def leave(self) -> None:
        """Settle what has ended, and open again what stands as claimed by us.

        Such is there where a claim was cut short when it had been written and not been heard of.
        To be called when no attempt is under way any more.
        """
        await self.settle_ended()
        await self.database.free(await self.database.claims(self.lease))

    async def _settle_plain(self, ended: Sequence[Ended]) -> None:
        """Settle attempts without updates in one write; by halves if the ledger refuses one."""
        try:
            await self._write_plain(ended)
        except DatabaseError as error:
            if not concerns_one(error):
                raise
            if len(ended) == 1:
                why = f"its end cannot be recorded: {error}"
                await self._park(evolve(ended[0], outcome=Failed(why)))
                return
            middle = len(ended) // 2
            await self._settle_plain(ended[:middle])
            await self._settle_plain(ended[middle:])

    async def _park(self, ended: Ended) -> None:
        """Record as failed a reaction whose end was refused; if that is as well, leave it claimed.

        Either way it is not run again and again.
        """
        try:
            await self.database.settle([self._settled(ended)], self.lease.epoch)
        except DatabaseError as error:
            if not concerns_one(error):
                raise
            self._leave_refused(ended)
        else:
            self._report_failed(as_parked(ended), ended.run)

    async def _write_plain(self, ended: Sequence[Ended]) -> None:
        reactions = [self._settled(one) for one in ended]
        counted, renewed = await self.database.settle(reactions, self.lease.epoch)
        for (handler, state), n in Counter((d.handler, d.state.value) for d in reactions).items():
            metrics.outcomes.labels(self.lease.site, handler, state).inc(n)
        for one, reaction in zip(ended, reactions, strict=True):
            self._report_failed(reaction, one.run)
            self._report_refusal(one, reaction)
        # A settlement that did not count may have done so before, unheard of: look again as well.
        missed = counted < len(reactions)
        self._doubt(reactions)
        if missed or any(reaction.state is State.PENDING for reaction in reactions):
            self._rearm(reactions, renewed=missed)
        if counted + renewed < len(reactions):
            logger.warning("{} settlements did not count", len(reactions) - counted - renewed)

    async def _settle_together(self, ended: Sequence[Ended]) -> bool:
        """Write several attempts' updates and settle them; False where it must be one by one."""
        reactions = [self._settled(one) for one in ended]
        updates = [one.updates[-1] for one in ended]
        if any(len(one.updates) > 1 for one in ended):
            return False
        epoch = self.lease.epoch
        try:
            renewed = await self.database.settle_together(reactions, epoch, updates, utcnow())
        except LeaseLost:
            raise
        except DatabaseError:
            return False  # it may be too much at once, or one of them may be at fault
        if renewed is None:
            return False
        for one, reaction in zip(ended, reactions, strict=True):
            self._with_update(one, reaction, renewed=renewed > 0)
        return True

    async def _settle_with_updates(self, ended: Ended) -> None:
        *first, last = ended.updates
        reaction = self._settled(ended)
        epoch = self.lease.epoch
        try:
            for update in first:
                await self.database.update(ended.reaction, epoch, update, utcnow())
            fitted, renewed = await self.database.settle_with(reaction, epoch, last, utcnow())
        except DatabaseError as error:
            outcome = refusal(error)
            if outcome is None:
                raise
            await self._settle_plain([Ended(ended.reaction, outcome, run=ended.run)])
            return
        if fitted:
            self._with_update(ended, reaction, renewed=renewed)
            return
        # The run has moved on since the handler looked: look again, a bounded number of times.
        again = Postponed("the run changed meanwhile") if reaction.state is State.DONE else None
        await self._settle_plain([Ended(ended.reaction, again or ended.outcome, run=ended.run)])

    def _with_update(self, ended: Ended, reaction: Reaction, *, renewed: bool = False) -> None:
        """See to what follows from a reaction that was settled with its update."""
        metrics.outcomes.labels(reaction.site, reaction.handler, reaction.state.value).inc()
        self._report_failed(reaction, ended.run)
        self._report_refusal(ended, reaction)
        if renewed or reaction.state is State.PENDING:
            self._rearm([reaction], renewed=renewed)

    def _waiting_for_ours(self, outcome: Outcome) -> Outcome:
        """Leave out a directory for which nobody here looks out, such as one of another site."""
        if not isinstance(outcome, Hindered) or outcome.patience < inf:
            return outcome
        looked_after = self.roots is not None and self.roots.looks_after(outcome.root)
        if looked_after and not outcome.host:
            return evolve(outcome, watched=True)
        there = sites_of(outcome, self.site, self.sites)
        return evolve(outcome, root="", watched=any(one.listener for one in there))

    def _doubt(self, reactions: Iterable[Reaction]) -> None:
        """Have the directories looked at that these reactions wait for, by now in the ledger."""
        for root in {reaction.root for reaction in reactions} - {""}:
            if self.roots is not None:
                self.roots.doubt(root)

    def _report_failed(self, reaction: Reaction, run: str) -> None:
        """Have people told of a reaction that was parked, until it is done after all."""
        if reaction.state is State.DONE:
            self.alarms.clear(parked_key(reaction))
        elif reaction.state is State.FAILED:
            self.alarms.raise_(parked(reaction, run or f"run {reaction.run}"))

    def _report_refusal(self, ended: Ended, reaction: Reaction) -> None:
        """Have people told what many reactions wait for, until the first of them goes on.

        A disk that is away is reported by its own site's listener, if it has one.
        """
        # Kept here because a renewal takes the former note out of the ledger.
        before = self._awaited.pop(
            reaction.id, refused_key(ended.reaction) if ended.reaction.hindered else ""
        )
        if reaction.hindered:
            self._awaited[reaction.id] = refused_key(reaction)
        if before and before != self._awaited.get(reaction.id):
            self.alarms.clear(before)
        is_refused = isinstance(ended.outcome, Hindered) and not ended.outcome.watched
        if is_refused and reaction.hindered and utcnow() >= reaction.hindered + REFUSED:
            self.alarms.raise_(refused(reaction))

    def _settled(self, ended: Ended) -> Reaction:
        handler = self.registry.handlers.get(ended.reaction.handler)
        allowed = handler.attempts if handler else 1
        jitter = random()  # noqa: S311  # not for secrets
        return settle(ended.reaction, ended.outcome, utcnow(), allowed=allowed, jitter=jitter)

    def _rearm(self, reactions: Iterable[Reaction], *, renewed: bool) -> None:
        """Arm the timers for reactions that are open again."""
        for reaction in reactions:
            lane = self._lane(reaction.lane)
            if renewed:
                lane.snapshot()
            elif reaction.state is State.PENDING:
                lane.arm(reaction.due)
        self._wake.set()

    def _release(self, ended: Sequence[Ended]) -> None:
        # Not before: what a cancellation leaves is for the last settlement before we leave.
        settled = set(ended)
        self._ended = [one for one in self._ended if one not in settled]
        lanes = {one.reaction.lane for one in ended}
        for one in ended:
            lane = self._lane(one.reaction.lane)
            lane.running.discard(one.reaction.id)
            lane.ended -= 1
            if one.reaction.id in lane.passed:
                lane.passed.discard(one.reaction.id)
                lane.snapshot()
        for name in lanes:
            self._count(self._lane(name))
        self._wake.set()
        self._freed.set()

    def _count(self, lane: Lane) -> None:
        metrics.running.labels(self.lease.site, lane.name).set(len(lane.running))

    async def show_progress(self) -> None:
        """Write the progress of running reactions to the ledger every few seconds, for ever."""
        while True:
            await trio.sleep(PROGRESS_EVERY)
            self._report_uncancellable()
            moved, self._progress = self._progress, {}
            for reaction, row in moved.values():
                try:
                    await self.database.progress(reaction, self.lease.epoch, row)
                except DatabaseError as error:
                    logger.debug("progress is not shown: {}", error)
                    break

    async def _retrying(self, function: Callable[..., Awaitable[T]], *args: Any) -> T:
        """Call an async function until the database lets it through."""
        wait, began, task = 0.1, trio.current_time(), function.__name__
        while True:
            try:
                result = await function(*args)
            except DatabaseError as error:
                if is_fatal(error):
                    raise
                logger.debug("trying again: {}", error)
                if trio.current_time() > began + BRIEF:
                    self.trouble.meet(task, error)
                await trio.sleep(wait)
                wait = min(wait * 2, 5.0)
            else:
                self.trouble.over(task)
                return result


def sites_of(away: Hindered, here: Site, sites: Sites) -> list[Site]:
    """The sites whose directory is away, as a reaction at `here` has found. Pure.

    A far end that does not name the directory may mean any at its host.
    """
    return [
        one
        for one in sites.values()
        if (one.hostname == away.host if away.host else are_near(one, here))
        and (not away.root or away.root in one.roots)
    ]


def no_news(run: Run, reaction: Reaction) -> str | None:
    """Say why nothing has changed for a reaction that gave up the very copy that vanished. Pure.

    Old programs take such entries out, so that the copy is made again. To do that for each such
    entry would be an endless loop. None if it is not so.
    """
    event = reaction.event
    if not isinstance(event.aspect, CopyKey) or event.after is not None:
        return None
    seen = time_of(event.before)
    ours = f"{reaction.site}: {reaction.handler}: "
    for one in run.given_up(event.aspect):
        # What was given up before the state that was seen last is of a former life of the copy.
        if (one.trigger or "").startswith(ours) and seen is not None and one.at >= seen:
            return (
                f"it was given up on {one.at:%Y-%m-%d %H:%M} UTC, and since then only its entry "
                "was taken out: repair what was wrong, then use caxev retry"
            )
    return None


@define
class _Ports:
    """What a job can do to the world."""

    _dispatcher: Dispatcher
    _reaction: Reaction

    async def update(self, update: RunUpdate, *, now: datetime) -> Run | None:
        dispatcher = self._dispatcher
        return await dispatcher.database.update(self._reaction, dispatcher.lease.epoch, update, now)

    async def work(self, function: Callable[..., T], *args: object, job: Job) -> T:
        return await self._dispatcher.workers.run(function, *args, on_progress=job.progress)

    async def keep(self, said: bytes) -> None:
        dispatcher = self._dispatcher
        await dispatcher.database.keep(self._reaction, dispatcher.lease.epoch, said)

    async def store_manifest(self, digest: str, items: list[dict[str, Any]]) -> None:
        await self._dispatcher.database.store_manifest(digest, items)

    async def load_manifest(self, digest: str) -> list[dict[str, Any]] | None:
        return await self._dispatcher.database.load_manifest(digest)

    async def table(self, name: str) -> list[dict[str, Any]]:
        return await self._dispatcher.database.table(name)

    async def alarm(self, alarm: Alarm) -> None:
        await self._dispatcher.alarms.raise_and_keep(alarm)

    async def all_clear(self, key: str) -> None:
        await self._dispatcher.alarms.clear_and_keep(key)

    async def is_live(self, owner: str, run: RunId) -> bool:
        site, _, epoch = owner.rpartition("#")
        database = self._dispatcher.database
        record = await database.site_record(site)
        if record is None:
            return False
        if record.active and str(record.epoch) == epoch:
            return True
        now, alive = utcnow(), timedelta(seconds=ALIVE)
        return any(
            reaction.run == run
            and abs(now - (as_utc(document["progress"].get("at")) or now)) < alive
            for reaction, document in await database.moving([site])
        )

    async def has_listened(self, site: str) -> bool:
        record = await self._dispatcher.database.site_record(site)
        return record is not None and record.epoch > 0

    async def oldest(self, type: str, without: Collection[str], skip: int) -> list[Run]:  # noqa: A002
        return await self._dispatcher.database.oldest(self._reaction.site, type, without, skip)

    async def neighbours(self, wanted: Neighbours) -> list[Run]:
        return await self._dispatcher.database.neighbours(wanted)

    def yield_slot(self) -> AbstractContextManager[None]:
        return self._dispatcher.aside(self._reaction)
