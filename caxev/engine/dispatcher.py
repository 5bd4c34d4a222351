"""Dispatching: claim what is due, lane by lane, and start it.

`recorder` hands over reactions as they are recorded. Some of them are claimed already, because
their lane has a free worker: those start without another round trip. The others stay in the
database and are fetched, in the lane's order, when a worker is free, so that a million pending
reactions take no memory. Claims, reads of runs and settlements are done in groups.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

import trio
from attrs import define, field

from caxev.core.clock import utcnow
from caxev.core.ledger import Failed, Reaction, State, claim
from caxev.core.model import Run, RunId
from caxev.database import DatabaseError
from caxev.engine.attempt import Ended
from caxev.engine.context import Context
from caxev.engine.lanes import Lane, Lanes
from caxev.engine.root_watch import RootWatch
from caxev.engine.runner import Runner
from caxev.engine.settling import Settler
from caxev.engine.trouble import by_halves
from caxev.engine.workers import Workers

SURE_FOR: Final = 300.0
"""Seconds after which the claims in the database are compared with what runs, without any sign of
a difference: a deposed process may have claimed something and died before it could give it back."""


@define(eq=False)
class Dispatcher:
    """Claims the reactions of one lease. Implements `recorder.Intake`.

    Start `take`, `settler.run` and `runner.show_progress` as tasks. The last two must outlive the
    attempts, which run in the nursery `attempts`. `only` are the lanes of a helper; None: all.
    While it is `paused`, nothing is claimed: see `pause`.
    """

    context: Context
    workers: Workers
    attempts: trio.Nursery
    roots: RootWatch
    only: Collection[str] | None = None
    paused: bool = field(init=False, default=False)
    lanes: Lanes = field(init=False)
    settler: Settler = field(init=False)
    runner: Runner = field(init=False)
    _claiming: trio.Lock = field(init=False, factory=trio.Lock)
    # Whether the database may have a claim of ours whose reply was lost. At first, some of a former
    # process may.
    _doubtful: bool = field(init=False, default=True)
    # Whether lanes that no handler uses may hold reactions.
    _unsurveyed: bool = field(init=False, default=True)
    _sure_until: float = field(init=False, factory=lambda: trio.current_time() + SURE_FOR)

    def __attrs_post_init__(self) -> None:
        context = self.context
        self.lanes = Lanes(context.site.lanes)
        for name in self.only or (one.lane for one in context.registry.handlers.values()):
            self.lanes[name]
        self.settler = Settler(context, self.lanes, self.roots)
        self.runner = Runner(
            context, self.workers, self.attempts, self.lanes, self.settler, self.roots
        )

    def pause(self, paused: bool) -> None:
        self.paused = paused
        self.lanes.notify()  # to claim what came due meanwhile

    # -- intake: called by the recorder -------------------------------------------------------

    def reserve(self, reactions: Sequence[Reaction]) -> list[Reaction]:
        """Claim as many of these new reactions as there are free workers for."""
        return [self._reserve(reaction) for reaction in reactions]

    def _reserve(self, reaction: Reaction) -> Reaction:
        lane = self.lanes[reaction.lane]
        # While older reactions wait in the database they go first.
        # In a shared lane a helper may have claimed what is renewed here.
        behind = lane.more or lane.waiting or not lane.free or lane.name in self.lanes.shared
        # A decision may have found that it is too early for this one.
        startable = reaction.state is State.PENDING and reaction.due <= utcnow()
        if behind or not startable or reaction.id in lane.running:
            return reaction
        lane.running.add(reaction.id)
        return claim(reaction, self.context.lease.epoch)

    def cancel(self, reactions: Sequence[Reaction]) -> None:
        """Give reservations back; only the database knows whether they were recorded."""
        for reaction in reactions:
            if reaction.state is State.RUNNING:
                self.lanes[reaction.lane].running.discard(reaction.id)
        self._doubtful = True
        self.lanes.notify()

    def start(self, reactions: Sequence[Reaction], runs: Mapping[RunId, Run]) -> None:
        """Start the claimed reactions, and fetch the others soon."""
        # A stuck claim is in the way of what was recorded under its key.
        self._doubtful |= any(reaction.id in self.settler.stuck for reaction in reactions)
        claimed = [reaction for reaction in reactions if reaction.state is State.RUNNING]
        self.runner.start(claimed, runs)
        now = utcnow()
        for reaction in reactions:
            lane = self.lanes[reaction.lane]
            if reaction.state is State.PENDING and reaction.due > now:
                lane.arm(reaction.due)
            elif reaction.state is State.PENDING:
                lane.refresh()
        if len(claimed) < len(reactions):
            self.lanes.notify()

    async def reconcile(self) -> None:
        """Free what is claimed by us or a former process, and is not running."""
        database, settler = self.context.database, self.settler
        late = trio.current_time() >= self._sure_until
        async with self._claiming:  # else a claim made just now could pass for a stale one
            self._doubtful = False
            self._sure_until = trio.current_time() + SURE_FOR
            try:
                claims = await database.claims(self.context.lease)
                running = self.lanes.running
                await settler.retry_stuck(claims, late=late)
                known = running | settler.stuck.keys()
                stale = [claim for claim in claims if claim["_id"] not in known]
                _, refused = await database.free(stale)
                for reaction in (await database.standing(list(refused))).values():
                    why = f"it cannot be released: {refused[reaction.id]}"
                    settler.leave_stuck(Ended(reaction, Failed(why)))
            except BaseException:
                self._doubtful = True
                raise
        # No lane knows of reactions that were given back and are pending again, or of those that
        # were recorded although the reply was lost.
        self.look_again()

    def look_again(self) -> None:
        """Ask the database for due reactions in all lanes, also those that no handler uses."""
        self._unsurveyed = True
        self.lanes.refresh()

    # -- taking -------------------------------------------------------------------------------

    async def take(self) -> None:
        """Claim and start reactions as they come or become due, until cancelled."""
        retrying = self.context.trouble.retrying
        while True:
            # Before the lanes are read: a notification in between must not be missed.
            changed = self.lanes.changed
            if self._doubtful or trio.current_time() >= self._sure_until:
                await retrying("reconcile", self.reconcile)
            if self._unsurveyed and self.only is None:
                await retrying("find lanes", self._find_lanes)
            busy = [lane for lane in self.lanes if self._has_work(lane)]
            for lane in busy:
                await retrying("fill lanes", self._fill, lane)
            if busy:
                self.lanes.notify()  # a lane may be idle now, and somebody wait for that
            else:
                with trio.move_on_after(self._until_due()):
                    await changed.wait()
                self._ring()

    def _has_work(self, lane: Lane) -> bool:
        return not self.paused and lane.free > 0 and (bool(lane.waiting) or lane.more)

    async def _find_lanes(self) -> None:
        self._unsurveyed = False
        for name in await self.context.database.lanes(self.context.lease.site):
            self.lanes[name]

    async def _fill(self, lane: Lane) -> None:
        """Claim for every free worker of a lane."""
        if lane.stale:
            await self._fetch(lane)
        due = [lane.waiting.popleft() for _ in range(min(lane.free, len(lane.waiting)))]
        due = self._startable(lane, due)
        if due:
            await self._claim(lane, due)

    def _startable(self, lane: Lane, reactions: Iterable[Reaction]) -> list[Reaction]:
        """Leave out keys whose former reaction has not been settled, and remember them."""
        found = [reaction for reaction in reactions if not self.settler.is_stuck(reaction)]
        lane.passed |= {reaction.id for reaction in found} & lane.running
        return [reaction for reaction in found if reaction.id not in lane.running]

    async def _fetch(self, lane: Lane) -> None:
        """Fetch what is due in a lane; if that is all, learn when the next reaction is due."""
        # Before the query: a reaction that comes during it sets them again.
        lane.more, lane.news, lane.next_due, lane.fetching = False, False, None, True
        complete = heard = False
        database, site, now = self.context.database, self.context.lease.site, utcnow()
        # A handler that is not installed on a helper's machine may be on the leader's.
        handlers = self.context.registry.handlers if self.context.is_helper else None
        # Left out by the query: a window of nothing else would hide all others.
        stuck = self.settler.stuck
        try:
            due = await database.due(
                site, lane.name, now, lane.window, since=lane.since, handlers=handlers, but=stuck
            )
            heard = True
            complete = lane.take_in(due, self._startable(lane, due))
            if complete:
                # A settlement may arm the timer meanwhile: the earlier time counts.
                lane.arm(await database.next_due(site, lane.name, now))
        finally:
            lane.more, lane.fetching = lane.more or not complete, False
            lane.news = lane.news or not heard

    async def _claim(self, lane: Lane, due: Sequence[Reaction]) -> None:
        keys = {reaction.id for reaction in due}
        # Before the write: what the stream records meanwhile under these keys must not start.
        lane.running |= keys
        claimed: list[Reaction] = []
        lease = self.context.lease

        async def write(some: Sequence[Reaction]) -> None:
            claimed.extend(await self.context.database.claim(some, lease))

        heard = False
        try:
            async with self._claiming:
                await by_halves(due, write, self._leave_unclaimed)
            heard = True
        finally:
            claimed = claimed if heard else []
            self._doubtful |= not heard
            lane.running -= keys - {reaction.id for reaction in claimed}
            # Reactions that were renewed, or claimed by a write whose reply was lost, must be
            # fetched again.
            if len(claimed) < len(due):
                lane.refresh()
        self.runner.start([claim(reaction, lease.epoch) for reaction in claimed], {})

    async def _leave_unclaimed(self, reaction: Reaction, error: DatabaseError) -> None:
        self.settler.leave_stuck(Ended(reaction, Failed(f"it cannot be claimed: {error}")))

    def _until_due(self) -> float:
        """Return the seconds until something must be done without being asked."""
        sure = max(self._sure_until - trio.current_time(), 0.0)
        times = [lane.next_due for lane in self.lanes if lane.next_due]
        if not times:
            return sure
        return min(max((min(times) - utcnow()).total_seconds(), 0.0), sure)

    def _ring(self) -> None:
        """Look into the lanes whose next reaction is due by now."""
        now = utcnow()
        for lane in self.lanes:
            if lane.next_due is not None and lane.next_due <= now:
                lane.next_due = None
                lane.refresh()

    async def wait_idle(self) -> None:
        """Wait until nothing is running and nothing is due. For ``--once``."""
        while not all(lane.is_idle(utcnow()) for lane in self.lanes):
            await self.lanes.changed.wait()

    async def drained(self) -> None:
        """Wait until nothing is running: every attempt has ended.

        Not until all are settled: while the database is away that would take the whole grace.
        """
        while any(len(lane.running) > lane.ended for lane in self.lanes):
            await self.lanes.changed.wait()
