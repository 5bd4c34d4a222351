"""Running: attempt the reactions that are claimed, each in a task of its own.

`dispatcher` hands over claimed reactions. `Runner` reads their runs, all at once, locks each run,
calls the handler by `attempt`, and hands each end to `settling`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from math import inf
from random import random
from typing import Any, Final

import trio
from attrs import define, evolve, field
from loguru import logger

from caxev import failpoints, metrics
from caxev.alarms.health import Descriptors, descriptors
from caxev.config import Site, Sites
from caxev.config.directories import are_near
from caxev.core.alarms import missing, uncancellable, uncancellable_key
from caxev.core.clock import utcnow
from caxev.core.history import Deed, HistoryRow, of_attempt
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
    settle,
)
from caxev.core.model import CopyKey, Run, RunId, time_of
from caxev.core.reasons import is_failure, reason
from caxev.core.recurrence import Recurrence
from caxev.core.registry import Handler
from caxev.core.update import RunUpdate
from caxev.database import DatabaseError
from caxev.engine.attempt import Ended, RateMeter, Watch, attempt, log_outcome
from caxev.engine.context import Context
from caxev.engine.lanes import Lanes
from caxev.engine.ports import JobPorts
from caxev.engine.root_watch import RootWatch
from caxev.engine.run_locks import RunLocks
from caxev.engine.settling import Settler
from caxev.engine.workers import Workers

PROGRESS_EVERY: Final = 5.0
"""Seconds between two writes of a reaction's progress to the ledger."""
IGNORED: Final = 30.0
"""Seconds from the cancellation of an attempt to an alarm, if it still runs."""
WITHOUT_HANDLER: Final = 3600.0
"""Seconds after which a reaction without its handler is tried again. A restart does so at once, if
the handler is there by then."""
AGAIN: Final = 2.0
"""Seconds after which a reaction is tried again whose run could not be read."""
ELSEWHERE: Final = 2.0
"""Seconds until a reaction is tried again that another process of the site blocks, or can run
better."""


@define(eq=False)
class Runner:
    """Runs the attempts of one lease, in the nursery `attempts`."""

    context: Context
    workers: Workers
    attempts: trio.Nursery
    lanes: Lanes
    settler: Settler
    roots: RootWatch
    _locks: RunLocks = field(init=False, factory=RunLocks)
    _recurrence: Recurrence = field(init=False, factory=Recurrence)
    _latency: Any = field(init=False)
    _progress: dict[str, tuple[Reaction, dict[str, Any]]] = field(init=False, factory=dict)
    # The attempts under way, each with its run's label for people.
    _running: dict[str, tuple[Reaction, Watch, str]] = field(init=False, factory=dict)
    _uncancellable: set[str] = field(init=False, factory=set)
    _lacked_files: bool = field(init=False, default=False)
    _attempt_over: trio.Event = field(init=False, factory=trio.Event)

    def __attrs_post_init__(self) -> None:
        site = self.context.lease.site
        self._latency = metrics.latency.labels(site)
        metrics.begin(site, self.context.registry.handlers)

    def start(self, reactions: Sequence[Reaction], runs: Mapping[RunId, Run]) -> None:
        """Attempt claimed reactions; `runs` are those of their runs that are read already."""
        if reactions:
            self.attempts.start_soon(self._begin, reactions, runs)

    # -- one attempt --------------------------------------------------------------------------

    async def _begin(self, reactions: Sequence[Reaction], runs: Mapping[RunId, Run]) -> None:
        """Read the runs of claimed reactions, many at once, and attempt each."""
        waiting: dict[RunId, list[Reaction]] = {}
        for reaction in reactions:
            waiting.setdefault(reaction.run, []).append(reaction)
        ended = Interrupted("the listener was stopped")  # unless something else ends the block

        def attempt_those(found: Mapping[RunId, Run | None]) -> None:
            for run in [one for one in waiting if one in found]:
                for reaction in waiting.pop(run):
                    # Apart: an attempt that takes a night must keep no other's run in memory.
                    self.attempts.start_soon(self._run_one, reaction, found[run])

        try:
            attempt_those(runs)
            async for page in self.context.database.whole_runs(tuple(waiting)):
                attempt_those(page)
            attempt_those(dict.fromkeys(waiting))
        except DatabaseError as error:
            ended = Interrupted(str(error), AGAIN)
        finally:
            for reaction in chain.from_iterable(waiting.values()):
                self._end(Ended(reaction, ended))

    async def _run_one(self, reaction: Reaction, run: Run | None) -> None:
        """Attempt one reaction, and in any case hand it on to be settled."""
        ended = Ended(reaction, Interrupted("the listener was stopped"))
        try:
            handler = self.context.registry.handlers.get(reaction.handler)
            without = self._without_attempt(reaction, handler, run)
            if handler is None or without is not None:
                ended = Ended(reaction, without or Done(idle=True), run=str(run or ""))
                return
            with logger.contextualize(
                run=str(run or reaction.run), event=str(reaction.event), handler=reaction.handler
            ):
                ended = await self._attempt(reaction, handler, run or Run(reaction.run))
        finally:
            self._end(ended)

    def _without_attempt(
        self, reaction: Reaction, handler: Handler | None, run: Run | None
    ) -> Outcome | None:
        """Return how a reaction ends that needs no attempt; None if it needs one."""
        if handler is None:
            self.context.alarms.raise_(missing(reaction.site, reaction.handler))
            why = f"no handler named {reaction.handler!r} is installed here: waiting for one"
            return Postponed(why, WITHOUT_HANDLER)
        if run is None and reaction.event.after is not None:
            return Done("the run is no longer in the database", idle=True)
        if run is not None and not self.context.site.wants_run(run.name):
            return Done("nothing to do: the run is not in dataset_list", idle=True)
        return None

    async def _attempt(self, reaction: Reaction, handler: Handler, run: Run) -> Ended:
        failpoints.scope.set(handler.name)
        waited = await self._locks.enter(reaction.run, exclusive=handler.exclusive)
        try:
            # If we waited for the lock, the run may have changed.
            if waited:
                try:
                    runs = await self.context.database.runs([reaction.run])
                except DatabaseError as error:
                    return Ended(reaction, Interrupted(str(error), AGAIN))
                run = runs.get(reaction.run, Run(reaction.run))
            if (why := await self._used_elsewhere(reaction, handler)) is not None:
                # Spread: two that found each other would otherwise meet again.
                spread = random()  # noqa: S311  # not for secrets
                return Ended(reaction, Postponed(why, ELSEWHERE + spread), run=str(run))
            if reaction.started is None:
                reaction = evolve(reaction, started=utcnow())
                # Only the first attempt: retries are late on purpose.
                self._latency.observe((utcnow() - reaction.at).total_seconds())
                if (why := no_news(run, reaction)) is not None:
                    return Ended(reaction, Failed(why), run=str(run))
            return await self._try(reaction, handler, run)
        finally:
            self._locks.leave(reaction.run, exclusive=handler.exclusive)

    async def _used_elsewhere(self, reaction: Reaction, handler: Handler) -> str | None:
        """Return why this must wait for another process of the site: our locks are in this one.

        Both have claimed their reactions by now. So if each runs only if it does not find the
        other's claim, they never run together.
        """
        is_helper, handlers = self.context.is_helper, self.context.registry.handlers
        if not is_helper and not (handler.exclusive and self.lanes.shared):
            return None
        try:
            found = await self.context.database.claimed_elsewhere(reaction.run, self.context.lease)
        except DatabaseError as error:
            return str(error)
        if is_helper:  # only the leader runs exclusive handlers
            found = {one for one in found if one not in handlers or handlers[one].exclusive}
        return f"waiting for {', '.join(sorted(found))} on another machine" if found else None

    async def _try(self, reaction: Reaction, handler: Handler, run: Run) -> Ended:
        now = trio.current_time()
        if (why := self._recurrence.excess(reaction, len(run.copies), now)) is not None:
            log_outcome(Failed(why))
            return Ended(reaction, Failed(why), run=str(run))
        sites = await self.roots.known()
        watch = Watch(handler)
        job = self._job(reaction, run, sites, watch)
        began = trio.current_time()
        with self._shown(reaction, watch, run):
            outcome, update = await attempt(handler, job, watch)
        if (why := spoiled(job, run)) is not None:
            outcome, update, job = Failed(why), None, self._job(reaction, run, sites, watch)
        seconds = trio.current_time() - began
        row = _row(reaction, outcome, job, seconds)
        self._count(handler.name, outcome, seconds)
        self._lacked_files |= watch.lacked_files
        outcome = self._waiting_for_ours(outcome)
        if isinstance(outcome, Failed) and await self.roots.have_changed(sites):
            # The handler may have failed for a marker that it could not know.
            outcome = Postponed(
                f"directories were marked meanwhile; before that: {outcome.why}", 0.0
            )
        # Crash tests kill the process here: the work is done and not yet recorded.
        if update is not None or outcome == Done():
            failpoints.point("through")
        updates: tuple[RunUpdate, ...] = () if update is None else (update,)
        if not isinstance(outcome, Done):
            updates = job.if_parked if _is_last(reaction, handler, outcome) else ()
        log_outcome(outcome)
        return Ended(reaction, outcome, updates, str(run), row)

    def _count(self, handler: str, outcome: Outcome, seconds: float) -> None:
        site = self.context.lease.site
        metrics.attempt_seconds.labels(site, handler).observe(seconds)
        if is_failure(outcome):
            metrics.failures.labels(site, handler, reason(outcome)).inc()

    def _job(self, reaction: Reaction, run: Run, sites: Sites, watch: Watch) -> Job:
        context = self.context
        return Job(
            run=run,
            event=reaction.event,
            site=sites.get(context.site.name),
            sites=sites,
            owner=f"{context.lease.site}#{context.lease.epoch}",
            log=logger,
            ports=JobPorts(context, self.workers, reaction, partial(self._aside, reaction)),
            on_progress=self._progress_of(reaction, watch),
            urgency=(reaction.priority, reaction.generation),
            at=reaction.at,
            handler=reaction.handler,
        )

    def _waiting_for_ours(self, outcome: Outcome) -> Outcome:
        """Forget a directory that nobody here watches, such as one of another site."""
        if not isinstance(outcome, Hindered) or outcome.patience < inf:
            return outcome
        if self.roots.looks_after(outcome.root) and not outcome.host:
            if self.context.is_helper:  # the leader may have that disk
                self.roots.doubt(outcome.root)
                return Postponed(outcome.why, ELSEWHERE)
            return evolve(outcome, watched=True)
        there = sites_of(outcome, self.context.site, self.context.sites)
        return evolve(outcome, root="", watched=any(one.listener for one in there))

    def _end(self, ended: Ended) -> None:
        # Late progress must not be written to a reaction that is settled.
        self._progress.pop(ended.reaction.id, None)
        self.settler.add(ended)

    # -- what is under way --------------------------------------------------------------------

    @property
    def attempting(self) -> str:
        """The attempts under way, for people."""
        found = self._running.values()
        return ", ".join(
            f"{reaction.handler} ({reaction.event} of {run})" for reaction, _, run in found
        )

    @contextmanager
    def _shown(self, reaction: Reaction, watch: Watch, run: Run) -> Iterator[None]:
        """Count an attempt as under way while the block lasts."""
        # The label now: the handler may replace the run meanwhile.
        self._running[reaction.id] = reaction, watch, str(run)
        try:
            yield
        finally:
            del self._running[reaction.id]
            self._attempt_over.set()
            self._attempt_over = trio.Event()
            if reaction.id in self._uncancellable:
                self._uncancellable.discard(reaction.id)
                self.lanes[reaction.lane].aside -= 1
                self.context.alarms.clear(uncancellable_key(reaction))

    @contextmanager
    def _aside(self, reaction: Reaction) -> Iterator[None]:
        """Let others of its lane work while this attempt waits for something else."""
        lane = self.lanes[reaction.lane]
        lane.aside += 1
        self.lanes.notify()
        try:
            yield
        finally:
            lane.aside -= 1

    @property
    def under_way(self) -> frozenset[Watch]:
        """The attempts under way."""
        return frozenset(watch for _, watch, _ in self._running.values())

    async def attempts_over(self, of: frozenset[Watch] | None = None) -> None:
        """Wait until none of these attempts is under way, or none at all."""
        while self.under_way if of is None else self.under_way & of:
            await self._attempt_over.wait()

    def descriptors(self) -> Descriptors:
        """Return how many files are open: all that may be, if an attempt lacked one since."""
        found, lacked, self._lacked_files = descriptors(), self._lacked_files, False
        return found._replace(used=found.allowed) if lacked else found

    def _progress_of(self, reaction: Reaction, watch: Watch) -> Callable[[int, int], None]:
        meter = RateMeter()

        def on_progress(done: int, total: int) -> None:
            watch.moved()
            rate = meter.moved(done, trio.current_time())
            row = {"done": done, "total": total, "rate": rate, "at": utcnow()}
            self._progress[reaction.id] = (reaction, row)

        return on_progress

    async def show_progress(self) -> None:
        """Write the progress of running reactions every few seconds, until cancelled."""
        while True:
            await trio.sleep(PROGRESS_EVERY)
            self._report_uncancellable()
            moved, self._progress = self._progress, {}
            for reaction, row in moved.values():
                try:
                    await self.context.database.progress(reaction, self.context.lease, row)
                except DatabaseError as error:
                    # The others would wait for the same database, and are outdated soon.
                    logger.debug("progress cannot be stored yet: {}", error)
                    break

    def _report_uncancellable(self) -> None:
        """Report attempts that ignore their cancellation, and free their place in the lane."""
        for reaction, watch, run in self._running.values():
            if watch.ignored >= IGNORED and reaction.id not in self._uncancellable:
                self._uncancellable.add(reaction.id)
                self.lanes[reaction.lane].aside += 1
                alarm = uncancellable(reaction, watch.verdict, run)
                logger.error("{}", alarm.summary)
                self.context.alarms.raise_(alarm)
                self.lanes.notify()


def spoiled(job: Job, run: Run) -> str | None:
    """Return what a handler has set in its job that only the job itself may set; None: nothing."""
    kept: dict[str, Any] = {"run": Run, "deed": Deed | None, "if_parked": tuple, "has_noted": bool}
    for name, kind in kept.items():
        if not isinstance(value := getattr(job, name, ...), kind):
            return f"the handler has set job.{name} to a {type(value).__name__}"
    if job.run.id != run.id:
        return f"the handler has set job.run to another run ({job.run.id})"
    if not all(isinstance(one, RunUpdate) and one.run == run.id for one in job.if_parked):
        return "the handler has set job.if_parked: use job.on_failure"
    return None


def _row(reaction: Reaction, outcome: Outcome, job: Job, seconds: float) -> HistoryRow | None:
    """Return what the history shows of an attempt; None if it did nothing."""
    deed = job.deed
    if deed is None and not job.has_noted and isinstance(outcome, Done) and not outcome.idle:
        deed = Deed()
    if deed is None:
        return None
    over = isinstance(outcome, Done)
    return of_attempt(reaction, deed, job.run, now=utcnow(), seconds=seconds, over=over)


def _is_last(reaction: Reaction, handler: Handler, outcome: Outcome) -> bool:
    """Return whether this outcome parks the reaction."""
    after = settle(reaction, outcome, utcnow(), allowed=handler.attempts, jitter=0.0)
    return after.state is State.FAILED


def sites_of(away: Hindered, here: Site, sites: Sites) -> list[Site]:
    """Return the sites whose directory is away, as a reaction at `here` has found. Pure.

    If the far end does not name the directory, it may be any at its host.
    """
    return [
        one
        for one in sites.values()
        if (one.hostname == away.host if away.host else are_near(one, here))
        and (not away.root or away.root in one.roots)
    ]


def no_news(run: Run, reaction: Reaction) -> str | None:
    """Return why nothing has changed for a reaction that gave up the copy that vanished. Pure.

    Old programs remove the entry of a copy, so that it is made again. To make it again each time
    after we gave it up would be an endless loop. None if the reaction should run.
    """
    event = reaction.event
    if not isinstance(event.aspect, CopyKey) or event.after is not None:
        return None
    seen = time_of(event.before)
    ours = f"{reaction.site}: {reaction.handler}: "
    for one in run.given_up(event.aspect):
        # A note of before the state that was seen last is about a former life of the copy.
        is_ours, at = (one.trigger or "").startswith(ours), one.at
        if is_ours and at is not None and seen is not None and at >= seen:
            return (
                f"it was given up on {at:%Y-%m-%d %H:%M} UTC, and only its entry has been "
                "removed since: correct the cause, then run caxev retry"
            )
    return None
