"""Settling: write how attempts ended, with their updates, and report it.

`runner` adds each attempt that is over. One task, `Settler.run`, settles all that have ended in as
few writes as it can. It outlives the attempts: what a stop cuts short is settled as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from random import random
from typing import Any, Final

import trio
from attrs import define, evolve, field
from loguru import logger

from caxev import metrics
from caxev.core.alarms import parked, parked_key, refused, refused_key, unrecorded
from caxev.core.clock import utcnow
from caxev.core.history import HistoryRow
from caxev.core.ledger import Failed, Hindered, Postponed, Reaction, State, settle
from caxev.database import DatabaseError, LeaseLost, concerns_one
from caxev.engine.attempt import Ended, as_parked, refusal
from caxev.engine.context import Context
from caxev.engine.lanes import Lanes
from caxev.engine.root_watch import RootWatch
from caxev.engine.trouble import by_halves

REFUSED: Final = timedelta(minutes=5)
"""How long reactions wait for a refusal to be lifted before an alarm is raised."""
TOGETHER: Final = 32
"""Reactions whose updates are written in one transaction, if many have ended."""


@define(eq=False)
class Settler:
    """Settles the attempts of one lease.

    `stuck`: by key, the reactions that the ledger refuses to change. An open one cannot be claimed,
    a claimed one can be neither settled nor freed. They are left alone until all claims are
    compared again.
    """

    context: Context
    lanes: Lanes
    roots: RootWatch
    stuck: dict[str, Ended] = field(init=False, factory=dict)
    _ended: list[Ended] = field(init=False, factory=list)
    _news: trio.Event = field(init=False, factory=trio.Event)
    # The key of the alarm about what each hindered reaction waits for. Kept here, because a renewal
    # removes the note from the ledger.
    _awaited: dict[str, str] = field(init=False, factory=dict)

    async def run(self) -> None:
        """Settle attempts as they end, until cancelled. Raises `LeaseLost`."""
        while True:
            await self._news.wait()
            await self.settle_ended()

    def add(self, ended: Ended) -> None:
        """Settle this attempt soon; until then others can use its worker."""
        self._ended.append(ended)
        self.lanes[ended.reaction.lane].ended += 1
        self._news.set()
        self.lanes.notify()

    async def settle_ended(self) -> None:
        """Settle all attempts that have ended, until none is left."""
        self._news = trio.Event()
        retrying = self.context.trouble.retrying
        while self._ended:
            plain = [one for one in self._ended if not one.updates]
            if plain:
                await retrying("settle", by_halves, plain, self._write_plain, self._park)
                self._release(plain)
            await self._settle_updates([one for one in self._ended if one.updates][:TOGETHER])

    async def free_all(self) -> None:
        """Settle what has ended, and reopen all reactions that we have claimed.

        A claim that was cut short may have been written although its reply was lost. Call this when
        no attempt is under way any more.
        """
        await self.settle_ended()
        database = self.context.database
        await database.free(await database.claims(self.context.lease))

    # -- without updates ----------------------------------------------------------------------

    async def _write_plain(self, ended: Sequence[Ended]) -> None:
        """Settle attempts without updates in one write."""
        reactions = [self._settled(one) for one in ended]
        database, lease = self.context.database, self.context.lease
        counted, renewed = await database.settle(reactions, lease, _rows(ended))
        # A settlement that did not count was of a reaction that was renewed meanwhile, or had been
        # written before, when we did not hear of it. Fetch again in either case.
        self._follow_up(ended, reactions, renewed=counted < len(reactions))
        if counted + renewed < len(reactions):
            logger.warning(
                "{} results were discarded: their reactions have changed",
                len(reactions) - counted - renewed,
            )

    async def _park(self, ended: Ended, error: DatabaseError) -> None:
        await self.park(evolve(ended, outcome=Failed(f"its result cannot be recorded: {error}")))

    async def park(self, ended: Ended) -> None:
        """Record as failed a reaction whose end was refused; if that is refused too, leave it.

        Either way it is not run again and again.
        """
        try:
            await self.context.database.settle([self._settled(ended)], self.context.lease)
        except DatabaseError as error:
            if not concerns_one(error):
                raise
            self.leave_stuck(ended)
        else:
            # Only now: one that is not stuck any more is opened.
            self.stuck.pop(ended.reaction.id, None)
            self._report_failed(as_parked(ended), ended.run)

    # -- what the ledger refuses --------------------------------------------------------------

    def is_stuck(self, reaction: Reaction) -> bool:
        """Return whether the ledger refuses to change this reaction, unless it was renewed."""
        stuck = self.stuck.get(reaction.id)
        return stuck is not None and stuck.reaction.generation == reaction.generation

    def leave_stuck(self, ended: Ended) -> None:
        """Raise an alarm about a reaction that the ledger refuses to change; leave it alone."""
        self.stuck[ended.reaction.id] = ended
        reaction = as_parked(ended)
        self.context.alarms.raise_(unrecorded(reaction, ended.run or f"run {reaction.run}"))

    async def retry_stuck(self, claims: Sequence[Mapping[str, Any]], *, late: bool) -> None:
        """Forget stuck reactions that were renewed; if `late`, try to record the others.

        One whose attempt has ended is recorded as failed and not opened: it would run forever.
        """
        generations = {claim["_id"]: claim.get("generation") for claim in claims}
        kept = [
            one
            for key, one in self.stuck.items()
            if generations.get(key) == one.reaction.generation
        ]
        self.stuck = {one.reaction.id: one for one in kept}
        for one in kept if late else ():
            if one.reaction.epoch == self.context.lease.epoch:
                await self.park(one)
            else:
                del self.stuck[one.reaction.id]

    # -- with updates -------------------------------------------------------------------------

    async def _settle_updates(self, ended: Sequence[Ended]) -> None:
        """Settle attempts with their updates: in one transaction if that can be, else by halves."""
        if len(ended) > 1 and not await self._settle_together(ended):
            middle = len(ended) // 2
            await self._settle_updates(ended[:middle])
            await self._settle_updates(ended[middle:])
            return
        if len(ended) == 1:
            retrying = self.context.trouble.retrying
            await retrying("settle with update", self._settle_with_updates, ended[0])
        self._release(ended)

    async def _settle_together(self, ended: Sequence[Ended]) -> bool:
        """Settle attempts and write their updates; return False if they must go one by one."""
        # Several updates to one run must be applied one after the other.
        if any(len(one.updates) > 1 for one in ended):
            return False
        reactions = [self._settled(one) for one in ended]
        updates = [one.updates[-1] for one in ended]
        database, lease = self.context.database, self.context.lease
        try:
            renewed = await database.settle_with(reactions, lease, updates, utcnow(), _rows(ended))
        except LeaseLost:
            raise
        except DatabaseError:
            return False  # it may be too much at once, or one of them may be at fault
        if renewed is None:
            return False
        self._follow_up(ended, reactions, renewed=renewed > 0)
        return True

    async def _settle_with_updates(self, ended: Ended) -> None:
        *first, last = ended.updates
        reaction = self._settled(ended)
        database, lease = self.context.database, self.context.lease
        try:
            # All but the last by themselves: if the process dies in between, they are made again.
            for update in first:
                await database.update(ended.reaction, lease, update, utcnow())
            renewed = await database.settle_with(
                [reaction], lease, [last], utcnow(), _rows([ended])
            )
        except DatabaseError as error:
            outcome = refusal(error)
            if outcome is None:
                raise
            renewed = None
        else:
            # If the run has changed since the handler read it, try again a bounded number of times.
            done = reaction.state is State.DONE
            outcome = Postponed("the run changed meanwhile") if done else ended.outcome
        if renewed is not None:
            self._follow_up([ended], [reaction], renewed=renewed > 0)
        else:
            plain = Ended(ended.reaction, outcome, run=ended.run)
            await by_halves([plain], self._write_plain, self._park)

    # -- what follows -------------------------------------------------------------------------

    def _settled(self, ended: Ended) -> Reaction:
        handler = self.context.registry.handlers.get(ended.reaction.handler)
        allowed = handler.attempts if handler else 1
        # Spread: what failed together would otherwise come back together.
        jitter = random()  # noqa: S311  # not for secrets
        return settle(ended.reaction, ended.outcome, utcnow(), allowed=allowed, jitter=jitter)

    def _follow_up(
        self, ended: Sequence[Ended], reactions: Sequence[Reaction], *, renewed: bool
    ) -> None:
        """Count and report settled reactions, and wake what they concern."""
        states = Counter((reaction.handler, reaction.state.value) for reaction in reactions)
        for (handler, state), number in states.items():
            metrics.outcomes.labels(self.context.lease.site, handler, state).inc(number)
        for one, reaction in zip(ended, reactions, strict=True):
            self._report_failed(reaction, one.run)
            self._report_refusal(one, reaction)
        # Not before the ledger has it: a directory that is back opens what waits there.
        for root in {reaction.root for reaction in reactions} - {""}:
            self.roots.doubt(root)
        self._rearm(reactions, renewed=renewed)

    def _report_failed(self, reaction: Reaction, run: str) -> None:
        """Raise an alarm about a reaction that has failed, until it is done after all."""
        if reaction.state is State.DONE:
            self.context.alarms.clear(parked_key(reaction))
        elif reaction.state is State.FAILED:
            self.context.alarms.raise_(parked(reaction, run or f"run {reaction.run}"))

    def _report_refusal(self, ended: Ended, reaction: Reaction) -> None:
        """Raise one alarm for all reactions that wait for one refusal, until one of them continues.

        If a disk is away, the listener of its own site raises the alarm, if there is one.
        """
        before = self._awaited.pop(
            reaction.id, refused_key(ended.reaction) if ended.reaction.hindered else ""
        )
        if reaction.hindered:
            self._awaited[reaction.id] = refused_key(reaction)
        if before and before != self._awaited.get(reaction.id):
            self.context.alarms.clear(before)
        is_refused = isinstance(ended.outcome, Hindered) and not ended.outcome.watched
        if is_refused and reaction.hindered and utcnow() >= reaction.hindered + REFUSED:
            self.context.alarms.raise_(refused(reaction))

    def _rearm(self, reactions: Iterable[Reaction], *, renewed: bool) -> None:
        """Arm the timers of lanes for reactions that are pending again."""
        pending = [reaction for reaction in reactions if reaction.state is State.PENDING]
        for reaction in reactions if renewed else ():
            self.lanes[reaction.lane].refresh()
        for reaction in pending:
            self.lanes[reaction.lane].arm(reaction.due)
        if renewed or pending:
            self.lanes.notify()

    def _release(self, ended: Sequence[Ended]) -> None:
        # Not before it is written: what a cancellation leaves here is for the last settlement.
        settled = set(ended)
        self._ended = [one for one in self._ended if one not in settled]
        for one in ended:
            self.lanes[one.reaction.lane].release(one.reaction.id)
        self.lanes.notify()


def _rows(ended: Iterable[Ended]) -> dict[str, HistoryRow]:
    """Return what the history shows of these attempts, by the keys of their reactions."""
    return {one.reaction.id: one.row for one in ended if one.row is not None}
