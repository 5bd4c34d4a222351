"""Session: act for a site for as long as its lease is ours.

::

    outer nursery: attempts in flight, their settlement and progress, the lease
      inner nursery: the watcher, the taking of reactions, requests, services, the daily scan

When it is asked to leave, what runs by then gets the grace to end, and what comes meanwhile is
served: nobody else may serve it before the lease is released. Then the inner nursery is cancelled,
the last attempts end or are cancelled, all is settled and the lease released; what was cut short is
pending again and costs no attempt.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Final

import trio
from loguru import logger

from caxev import __version__
from caxev.alarms.health import Health, HealthMonitor, of_gone_directories
from caxev.alarms.manager import AlarmManager
from caxev.config import Site, state_directory
from caxev.core.alarms import missing_key
from caxev.core.clock import clock, utcnow
from caxev.core.errors import GiveUp, Retry
from caxev.core.history import Deed, HistoryRow, What
from caxev.database import Database, DatabaseError, Lease, is_fatal
from caxev.engine.context import Context
from caxev.engine.dispatcher import Dispatcher
from caxev.engine.forcing import leave_by_force, letting_go
from caxev.engine.helpers import HelperWatch
from caxev.engine.indexes import keep_indexes
from caxev.engine.lease import keep_lease
from caxev.engine.leaving import Leaving
from caxev.engine.malformed import Quarantine
from caxev.engine.options import Options, Reloader
from caxev.engine.recorder import Recorder
from caxev.engine.requests import Requests
from caxev.engine.root_markers import holdings
from caxev.engine.root_watch import ANSWERS, RootWatch
from caxev.engine.sampling import Sampler
from caxev.engine.systemd import notify
from caxev.engine.trouble import Trouble
from caxev.engine.watchdog import Watchdog
from caxev.engine.watcher import Watcher
from caxev.engine.workers import Workers
from caxev.files.incoming import forget_incoming
from caxev.files.staging import MARGIN

LAST: Final = 1.0
"""Seconds for what was begun during the grace: from here on until another process has taken over
nothing is served."""
FLUSH: Final = 10.0
"""Seconds that the last settlements may take."""
DELIVERY: Final = 30.0
"""Seconds that the last alarms may take if a listener leaves by itself (``--once``)."""


async def tidy(site: Site) -> None:
    """Remove unfinished copies that nobody continues from the private directory."""
    state = state_directory(site)
    try:
        # Abandoned: a disk that hangs must not keep the listener from leaving.
        gone = await trio.to_thread.run_sync(forget_incoming, state, abandon_on_cancel=True)
    except (OSError, Retry, GiveUp) as error:  # a disk that is read-only must not end it either
        logger.warning("unfinished copies in {} are left alone for a day: {}", state, error)
        return
    if gone:
        logger.info("removed {} unfinished copies from {}", gone, state)


class LeaderSession:
    """Everything that acts for a site while one lease lasts."""

    def __init__(
        self,
        reloader: Reloader,
        database: Database,
        lease: Lease,
        leaving: Leaving,
        trouble: Trouble,
    ) -> None:
        self.reloader, self.leaving = reloader, leaving
        options = reloader.options
        self.alarms = AlarmManager(database, lease, options.recipients())
        self.context = Context(database, lease, options, self.alarms, trouble)

    def _use(self, options: Options) -> None:
        """Replace the options after a reload."""
        concerned = self.context.registry.interest
        self.context.options = options
        if options.registry.interest != concerned:
            self.watcher.reopen()
        self.roots.use_options()
        for service in self.services:
            service.use(options.site, options.sites)
        for recipient in self.alarms.recipients:
            recipient.renew()

    async def serve(self) -> None:
        """Act for the site until asked to leave, or until there is nothing left to do."""
        context = self.context
        with logger.contextualize(site=context.lease.site):
            async with (
                # Outside the nursery: when it closes, no attempt uses a worker any more.
                self._workers() as workers,
                letting_go(self._let_go),
                trio.open_nursery() as outer,
            ):
                self._make_parts(workers, outer)
                await self._act(outer)
                if context.options.once:
                    with trio.move_on_after(DELIVERY):
                        await self.alarms.leave(deliver=True)
                # Alarms that are not delivered now are in the database, for the next process.
                with trio.move_on_after(FLUSH):
                    await self.alarms.hang_up()
                outer.cancel_scope.cancel()
        logger.info("stopped listening for {}", context.lease.site)

    def _workers(self) -> AbstractAsyncContextManager[Workers]:
        options = self.context.options
        if options.workers is not None:
            return nullcontext(options.workers)
        return Workers(files=options.handler_files)

    def _make_parts(self, workers: Workers, outer: trio.Nursery) -> None:
        context = self.context
        database, lease, site = context.database, context.lease, context.site
        self.roots = RootWatch(context, workers)
        self.dispatcher = Dispatcher(context, workers, outer, self.roots)
        self.roots.woken = self.dispatcher.look_again
        recorder = Recorder(context, self.dispatcher)
        self.watcher = Watcher(context, recorder)
        self.requests = Requests(context, recorder, self.watcher.scan)
        self.helpers = HelperWatch(context, self.alarms, recorder, self.dispatcher)
        self.hearers = [self.roots.heard, self.requests.heard, self.helpers.heard]
        self.services = [
            make(database, lease, site, context.sites) for make in context.options.services
        ]
        self.reloader.users = [self._use]

    async def _act(self, outer: trio.Nursery) -> None:
        """Run the intake until asked to leave, and until what runs then has had its grace."""
        dispatcher, options = self.dispatcher, self.context.options
        outer.start_soon(dispatcher.settler.run)
        outer.start_soon(dispatcher.runner.show_progress)
        # In the outer nursery: the lease must last until the last settlement.
        outer.start_soon(keep_lease, self.context, self.hearers)
        outer.start_soon(Watchdog(self.context, self.alarms).run)
        outer.start_soon(leave_by_force, dispatcher.runner, self._let_go)
        if not options.once:
            outer.start_soon(self._note_start)
        # Before anything can raise an alarm: it must know which are active already.
        await self._open_alarms()
        # Before a change is recorded: helpers under the former leader may still be at work.
        await self.context.trouble.retrying("helpers", self.helpers.begin)
        outer.start_soon(self.alarms.run)
        outer.start_soon(self.helpers.run)
        outer.start_soon(Quarantine(self.context, self.alarms, dispatcher.look_again).run)
        outer.start_soon(keep_indexes, self.context.database)
        outer.start_soon(self.roots.run)
        outer.start_soon(
            Sampler(self.context, dispatcher, self.roots, self.watcher, self.alarms).run
        )
        with trio.move_on_after(ANSWERS):  # a disk that has not answered by then counts as away
            await self.roots.looked.wait()
        outer.start_soon(HealthMonitor(options.site.name, self._health, self.alarms).run)
        async with trio.open_nursery() as inner:
            inner.start_soon(dispatcher.take)
            await (self._once() if options.once else self._until_asked(inner))
            notify("STOPPING=1")
            with trio.move_on_after(options.grace):
                await dispatcher.runner.attempts_over(dispatcher.runner.under_way)
            inner.cancel_scope.cancel()
        with trio.move_on_after(min(options.grace, LAST)):
            await dispatcher.drained()

    async def _until_asked(self, inner: trio.Nursery) -> None:
        ready = trio.Event()

        async def when_ready(function: Callable[[], Awaitable[None]]) -> None:
            await ready.wait()
            await function()

        inner.start_soon(lambda: self.watcher.run(ready=ready))
        for function in (
            self._report_ready,
            self.requests.serve_as_asked,
            self._scan_daily,
            *(service.run for service in self.services),
        ):
            inner.start_soon(when_ready, function)
        await self.leaving.asked.wait()

    async def _once(self) -> None:
        """Catch up, do what was asked for and what is due."""
        watcher = self.watcher
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.leaving.cancel, nursery.cancel_scope)
            await watcher.persist(watcher.catch_up)
            for service in self.services:
                await watcher.persist(service.catch_up)
            await watcher.persist(self.requests.serve)
            await self.dispatcher.wait_idle()
            # These reactions may have changed runs, which leads to more.
            while await watcher.persist(watcher.catch_up):
                await self.dispatcher.wait_idle()
            nursery.cancel_scope.cancel()

    async def _report_ready(self) -> None:
        notify(f"READY=1\nSTATUS=listening for {self.context.lease.site}")
        logger.info("ready")

    async def _note_start(self) -> None:
        """Add to the history that a listener acts for the site now."""
        context = self.context
        lease, version = context.lease, f"caxev {__version__}, sites.json {context.sites.digest}"
        deed = Deed(what=What.STARTED, reason=f"{lease.owner}: {version}")
        # By the epoch: repeated, it is the same row.
        key = f"{lease.site}:started:{lease.epoch}"
        row = HistoryRow(at=utcnow(), site=lease.site, deed=deed, id=key)
        await context.trouble.retrying("history", context.database.note, row)

    async def _scan_daily(self) -> None:
        await tidy(self.context.site)  # after what killed the process before this one
        await self.watcher.scan_daily(lambda: tidy(self.context.site))

    # -- alarms and health --------------------------------------------------------------------

    async def _open_alarms(self) -> None:
        while not self.leaving.asked.is_set():
            try:
                await self.alarms.open()
                self._clear_former()
            except DatabaseError as error:
                if is_fatal(error):
                    raise
                logger.debug("alarms cannot be updated yet: {}", error)
                with trio.move_on_after(1.0):
                    await self.leaving.asked.wait()
            else:
                return

    def _clear_former(self) -> None:
        """End alarms of the process before this one that nothing else here would end."""
        for handler in self.context.registry.handlers:
            self.alarms.clear(missing_key(handler))
        self.reloader.report_to(self.alarms)
        held = {one.root for one in holdings(self.context.site, self.context.sites)}
        for key in of_gone_directories([one.alarm.key for one in self.alarms.active], held):
            self.alarms.clear(key)
        self.helpers.clear_former()

    def _health(self) -> Health:
        trouble, roots = self.context.trouble, self.roots
        return Health(
            trouble.text,
            trouble.seconds,
            self.watcher.behind,
            roots.free,
            roots.away,
            self.dispatcher.runner.descriptors(),
            max(self.context.site.min_free, MARGIN),
            clock.skew,
        )

    # -- leaving ------------------------------------------------------------------------------

    async def _let_go(self) -> None:
        """Settle what has ended, and release the lease, for any reason of leaving."""
        with trio.move_on_after(FLUSH, shield=True):
            try:
                await self.dispatcher.settler.free_all()
                await self.alarms.leave(deliver=False)
            finally:
                await self.context.database.release(self.context.lease)
