"""The nursery tree of a listener: lease, watcher, dispatcher, signals, readiness, metrics.

::

    asyncio loop
      stand by for the lease, again and again
        outer nursery: attempts in flight, their settlement, their progress
          inner nursery: the watcher, the taking of reactions, the lease, the daily scan

SIGTERM ends the inner nursery, gives the outer one its grace, settles, releases the lease and
leaves; what was cut short is open again and costs no attempt. A second SIGTERM leaves at once.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Final, NoReturn
from uuid import uuid4

import trio
from attrs import define, field
from loguru import logger

from caxev import aio, metrics
from caxev.alarms import AlarmManager, Health, HealthMonitor, of_gone_directories
from caxev.config import Settings, state_directory
from caxev.core.alarms import MALFORMED, malformed, missing_key
from caxev.core.clock import clock, utcnow
from caxev.database import (
    Database,
    DatabaseError,
    Lease,
    LeaseKeeper,
    LeaseLost,
    NotAuthorized,
    Odd,
    Request,
    SiteRecord,
    concerns_one,
    is_fatal,
    is_transient,
    of_the_site,
)
from caxev.engine.context import Context
from caxev.engine.dispatcher import Dispatcher
from caxev.engine.options import Options, Reloader
from caxev.engine.recorder import Recorder
from caxev.engine.requests import Requests
from caxev.engine.root_markers import holdings
from caxev.engine.root_watch import ANSWERS, RootWatch
from caxev.engine.systemd import notify
from caxev.engine.trouble import Trouble
from caxev.engine.watchdog import Watchdog, handlers_by_code
from caxev.engine.watcher import LONGEST_WAIT, SCAN_EVERY, Watcher
from caxev.engine.workers import Workers
from caxev.files import MARGIN, forget_incoming
from caxev.rucio.messages import Messages
from caxev.rucio.rule_files import RuleFiles

FLUSH: Final = 10.0
"""Seconds that the last settlements may take."""
STOPPING: Final = 5.0
"""Seconds that attempts get to end when they are cancelled, before the process leaves them."""
DELIVERY: Final = 30.0
"""Seconds that the last alarms may take, where a listener leaves by itself (``--once``)."""

TEND_EVERY: Final = 2.0
"""Seconds between two looks, in memory, at what was found malformed."""

_STAND_BY: Final = 0.1  # of the lease: how often a stand-by looks
_HELD: Final = 0.8  # of the lease: how long it is held without renewal
_RENEW: Final = 0.2  # of the lease: how often it is renewed


@define(eq=False)
class Leaving:
    """Whether we were asked to leave. `hangup` is called on SIGHUP."""

    asked: trio.Event = field(factory=trio.Event)
    hangup: Callable[[], Awaitable[None]] = field(default=trio.lowlevel.checkpoint)

    async def listen(self) -> None:
        """Wait for signals, for ever: SIGTERM and SIGINT ask us to leave."""
        received = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        with trio.open_signal_receiver(*received) as signals:
            async for number in signals:
                name = signal.Signals(number).name
                if number == signal.SIGHUP:
                    await self.hangup()
                    continue
                if self.asked.is_set():
                    logger.warning("{} again: leaving at once", name)
                    # What is in flight is claimed in the ledger: the next process opens it.
                    leave_at_once(128 + number)
                logger.info("{}: finishing what is in flight; again to leave at once", name)
                self.asked.set()

    async def cancel(self, scope: trio.CancelScope) -> None:
        """Cancel a scope as soon as we are asked to leave."""
        await self.asked.wait()
        scope.cancel()


async def listen(options: Options) -> None:
    """Listen for a site until asked to leave; with ``once`` until nothing is left to do.

    Raises `DatabaseError` where the database cannot be used at the start; afterwards it waits out
    any trouble.
    """
    options.recipients()  # a mistake is reported now, and not when the lease is ours
    owner = f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"
    if options.metrics_port is not None:
        serve_metrics(options.metrics_port)
    tune_collector()
    leaving = Leaving()
    async with aio.loop(), open_database(options.settings) as database:
        await prepare(database)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leaving.listen)
            await serve_leases(options, database, owner, leaving)
            nursery.cancel_scope.cancel()


def leave_at_once(status: int) -> NoReturn:
    """End the process without waiting for anything but its log."""
    logger.remove()
    os._exit(status)


def tune_collector() -> None:
    """Have Python look for reference cycles less often.

    A batch makes ten thousands of objects that live until it is written and are in no cycle; at
    the usual threshold a third of the intake's time went into looking at them.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@asynccontextmanager
async def open_database(settings: Settings) -> AsyncIterator[Database]:
    """Open the database for a block, inside the asyncio loop."""
    database = Database(settings)
    try:
        yield database
    finally:
        with trio.move_on_after(FLUSH, shield=True):
            await database.close()


async def keep_watchdog(every: float) -> None:
    """Report to systemd that this process is alive, for ever.

    Whatever the database does: a restart would only cut transfers short.
    """
    while True:
        notify("WATCHDOG=1")
        await trio.sleep(every)


async def prepare(database: Database) -> None:
    """Check the database, and make the indexes if we may."""
    await database.check()
    await make_indexes(database)


async def make_indexes(database: Database) -> None:
    """Make the indexes if we may: at the start, and after somebody has dropped the ledger.

    Nothing shows that another collection was dropped, so `_make_indexes_daily` does it as well.
    """
    try:
        await database.create_indexes()
    except NotAuthorized as error:
        logger.warning("indexes are left to an administrator (caxev db init): {}", error)
    except DatabaseError as error:
        if not is_transient(error):
            raise
        logger.warning("the indexes may be missing, which makes everything slow: {}", error)


async def _make_indexes_daily(database: Database) -> None:
    while True:
        await trio.sleep(SCAN_EVERY)
        try:
            await make_indexes(database)
        except DatabaseError as error:
            logger.error("the indexes cannot be made: {}", error)


async def serve_leases(options: Options, database: Database, owner: str, leaving: Leaving) -> None:
    """Act for the site whenever its lease is ours, until asked to leave or, with once, done."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_watchdog, options.lease_time * _RENEW)
        await _serve_leases(options, database, owner, leaving)
        nursery.cancel_scope.cancel()


async def _serve_leases(options: Options, database: Database, owner: str, leaving: Leaving) -> None:
    reloader = Reloader(options, database)
    leaving.hangup = reloader.reload
    while not leaving.asked.is_set():
        # Anew: tasks that end with a lease cannot report that what they met is over.
        trouble = Trouble(options.site.name)
        lease = await _stand_by(reloader, database, owner, leaving, trouble)
        if lease is None:
            return
        metrics.leading.labels(options.site.name).set(1)
        try:
            await _LeaderSession(reloader, database, lease, leaving, trouble).serve()
        except* LeaseLost as group:
            logger.warning("{}; standing by", _one_of(group))
            await make_indexes(database)  # perhaps the ledger was dropped
        else:
            return
        finally:
            metrics.leading.labels(options.site.name).set(0)


async def _stand_by(
    reloader: Reloader, database: Database, owner: str, leaving: Leaving, trouble: Trouble
) -> Lease | None:
    """Wait until the site is ours; None if asked to leave first."""
    told, differs = False, ""
    site, held = reloader.options.site.name, reloader.options.lease_time * _HELD
    while not leaving.asked.is_set():
        options = reloader.options
        try:
            taken = await database.acquire(site, owner, held, utcnow(), options.sites.digest)
            trouble.over("lease")
            if taken is None:
                differs = await _compare_configurations(options, database, differs)
        except DatabaseError as error:
            if is_fatal(error):
                raise
            trouble.meet("lease", of_the_site(error))
            taken = None
        if taken is not None:
            lease, claims = taken
            logger.info("listening for {} (epoch {})", site, lease.epoch)
            if claims:
                logger.info("{} reactions were interrupted and are due again", claims)
            return lease
        if not told and not trouble:
            logger.info("another process listens for {}: standing by", site)
            notify("READY=1\nSTATUS=standing by")
            told = True
        with trio.move_on_after(options.lease_time * _STAND_BY):
            await leaving.asked.wait()
    return None


async def _compare_configurations(options: Options, database: Database, known: str) -> str:
    """Warn if the listener has another sites.json than we have, and return the warning.

    Either may be reloaded: call it again with what it returned, which is not logged twice.
    """
    record = await database.site_record(options.site.name)
    if record is None or record.configuration in ("", options.sites.digest):
        return ""
    warning = (
        f"standing by with another configuration: {options.sites.path} has digest "
        f"{options.sites.digest}, and {record.owner or 'another process'} goes by "
        f"{record.configuration}; give both one file (caxev sites merge makes one of several)"
    )
    if warning != known:
        logger.warning("{}", warning)
    return warning


class _LeaderSession:
    """One stretch of acting for a site."""

    def __init__(
        self,
        reloader: Reloader,
        database: Database,
        lease: Lease,
        leaving: Leaving,
        trouble: Trouble,
    ) -> None:
        self.reloader = reloader
        self.database = database
        self.lease = lease
        self.leaving = leaving
        self.trouble = trouble
        self.alarms = AlarmManager(database, lease, self.options.recipients())
        self.context = Context(database, lease, reloader.options, self.alarms, trouble)
        self.rule_files = RuleFiles(database, lease, self.options.site, self.options.sites)
        self._roots: RootWatch | None = None
        self._requests: Requests | None = None
        self._reported: set[tuple[str, str]] = set()
        self._reloaded = trio.Event()

    @property
    def options(self) -> Options:
        """What the listener goes by now."""
        return self.reloader.options

    def _use(self, roots: RootWatch, options: Options) -> None:
        """Go by new options from now on."""
        self.context.options = options
        self.rule_files.use(options.site, options.sites)
        roots.use(options.site, options.sites)
        self._reloaded.set()
        for recipient in self.alarms.recipients:
            recipient.renew()

    async def serve(self) -> None:
        """Act for the site until asked to leave, or until there is nothing left to do."""
        with logger.contextualize(site=self.lease.site):
            async with Workers(files=self.options.handler_files) as workers:
                ours = True
                try:
                    async with trio.open_nursery() as outer:
                        roots = self._roots = self._root_watch(workers)
                        dispatcher = Dispatcher(self.context, workers, outer, roots)
                        await self._act(dispatcher, outer, roots)
                        if self.options.once:
                            with trio.move_on_after(DELIVERY):
                                await self.alarms.leave(deliver=True)
                        with trio.move_on_after(FLUSH):
                            await self.alarms.hang_up()
                        outer.cancel_scope.cancel()
                except* LeaseLost:
                    ours = False
                    raise
                finally:
                    if ours:
                        await self._let_go(dispatcher)
        logger.info("left {} in good order", self.lease.site)

    async def _let_go(self, dispatcher: Dispatcher) -> None:
        """Settle what has ended, and end the lease, whatever we leave for."""
        with trio.move_on_after(FLUSH, shield=True):
            try:
                await dispatcher.settler.free_all()
                await self.alarms.leave(deliver=False)
            finally:
                await self.database.release(self.lease)

    def _root_watch(self, workers: Workers) -> RootWatch:
        options = self.options
        return RootWatch(self.database, self.lease, options.site, options.sites, workers)

    async def _act(self, dispatcher: Dispatcher, outer: trio.Nursery, roots: RootWatch) -> None:
        """Run the intake until asked to leave, then give what is in flight its grace."""
        recorder = Recorder(self.context, dispatcher)
        watcher = Watcher(self.context, recorder)
        requests = self._requests = Requests(self.context, recorder, watcher.scan)
        outer.start_soon(dispatcher.settler.run)
        outer.start_soon(dispatcher.runner.show_progress)
        outer.start_soon(self._keep_lease)
        outer.start_soon(self._watchdog().run)
        outer.start_soon(self._leave_by_force, dispatcher)
        await self._open_alarms()
        outer.start_soon(self.alarms.run)
        outer.start_soon(self._tend, dispatcher)
        outer.start_soon(_make_indexes_daily, self.database)
        roots.woken = dispatcher.look_again
        outer.start_soon(roots.run)
        with trio.move_on_after(ANSWERS):  # what is not known by then counts as away
            await roots.looked.wait()
        outer.start_soon(self._health_monitor(watcher, dispatcher, roots).run)
        self.reloader.users = [partial(self._use, roots)]
        async with trio.open_nursery() as inner:
            inner.start_soon(dispatcher.take)
            if self.options.once:
                await self._once(watcher, requests, dispatcher)
            else:
                await self._until_asked(watcher, requests, inner)
            inner.cancel_scope.cancel()
        notify("STOPPING=1")
        with trio.move_on_after(self.options.grace):
            await dispatcher.drained()

    async def _leave_by_force(self, dispatcher: Dispatcher) -> None:
        """When all is cancelled, end the process if attempts go on all the same.

        A handler that swallows cancellation would keep the nursery waiting for ever, and with it
        a site that has been asked to stop, or has lost its lease.
        """
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                with trio.move_on_after(STOPPING):
                    await dispatcher.runner.attempts_over()
                if left := dispatcher.runner.attempting:
                    logger.error("leaving without {}: cancelled, and still at work", left)
                    with suppress(DatabaseError):
                        await self._let_go(dispatcher)
                    leave_at_once(1)

    def _watchdog(self) -> Watchdog:
        options, held = self.options, self.options.lease_time * _HELD
        return Watchdog(
            self.lease.site,
            LeaseKeeper(options.settings, self.lease, held),
            options.lease_time,
            handlers_by_code(options.registry.handlers.values()),
            self.alarms,
            lambda: notify("WATCHDOG=1"),
        )

    async def _open_alarms(self) -> None:
        while not self.leaving.asked.is_set():
            try:
                await self.alarms.open()
                self._clear_former()
            except DatabaseError as error:
                if is_fatal(error):
                    raise
                logger.debug("alarms wait for the database: {}", error)
                with trio.move_on_after(1.0):
                    await self.leaving.asked.wait()
            else:
                return

    def _clear_former(self) -> None:
        """End alarms of our predecessor that nothing else here would end."""
        for handler in self.options.registry.handlers:
            self.alarms.clear(missing_key(handler))
        self.reloader.report_to(self.alarms)
        held = {one.root for one in holdings(self.options.site, self.options.sites)}
        for key in of_gone_directories([one.alarm.key for one in self.alarms.active], held):
            self.alarms.clear(key)

    async def _tend(self, dispatcher: Dispatcher) -> None:
        """Report malformed documents of this site, and set them aside, for ever."""
        audited = -SCAN_EVERY
        while True:
            try:
                if trio.current_time() >= audited + SCAN_EVERY:
                    await self.database.audit(self.lease.site)
                    await self._forget_aside()
                    audited = trio.current_time()
                for odd in self.database.odd:
                    if odd.site in (None, self.lease.site) and odd.key not in self._reported:
                        await self._set_aside(odd)
                        dispatcher.look_again()
            except DatabaseError as error:
                if is_fatal(error):
                    raise
                logger.debug("malformed documents wait for the database: {}", error)
            await trio.sleep(TEND_EVERY)

    async def _forget_aside(self) -> None:
        """End the alarms of malformed documents that are not kept any more."""
        kept = await self.database.forget_aside(self.lease.site, utcnow()) | self._reported
        keys = {MALFORMED + " ".join(key) for key in kept}
        for one in self.alarms.active:
            if one.alarm.key.startswith(MALFORMED) and one.alarm.key not in keys:
                self.alarms.clear(one.alarm.key)

    async def _set_aside(self, odd: Odd) -> None:
        site = self.lease.site
        try:
            await self.database.set_aside(self.lease, odd, utcnow())
            if odd.run is not None:  # what the document was about is not lost with it
                again = Request("replay", (odd.run,))
                await self.database.add_request(site, again, self.lease.owner, utcnow())
        except DatabaseError as error:
            if not concerns_one(error):
                raise
            logger.error("{} {} cannot be set aside: {}", *odd.key, error)
            self._reported.add(odd.key)
        runs = {} if odd.run is None else await self.database.runs([odd.run])
        label = str(runs[odd.run]) if odd.run in runs else ""
        self.alarms.raise_(malformed(site, " ".join(odd.key), odd.why, label))

    def _health_monitor(
        self, watcher: Watcher, dispatcher: Dispatcher, roots: RootWatch
    ) -> HealthMonitor:
        def health() -> Health:
            return Health(
                self.trouble.text,
                self.trouble.seconds,
                watcher.behind,
                roots.free,
                roots.away,
                dispatcher.runner.descriptors(),
                max(self.options.site.min_free, MARGIN),
                clock.skew,
            )

        return HealthMonitor(self.options.site.name, health, self.alarms)

    async def _until_asked(self, watcher: Watcher, requests: Requests, inner: trio.Nursery) -> None:
        ready = trio.Event()
        inner.start_soon(lambda: watcher.run(ready=ready))
        inner.start_soon(self._say_ready, ready)
        inner.start_soon(self._serve_requests, requests, ready)
        inner.start_soon(self._scan_daily, watcher, ready)
        inner.start_soon(self._follow_rules, ready)
        inner.start_soon(self._messages().serve)
        await self.leaving.asked.wait()

    async def _once(self, watcher: Watcher, requests: Requests, dispatcher: Dispatcher) -> None:
        retrying = self.trouble.retrying
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.leaving.cancel, nursery.cancel_scope)
            await retrying("stream", watcher.catch_up)
            await retrying("stream", self.rule_files.look)
            await retrying("stream", requests.serve)
            await dispatcher.wait_idle()
            # What was done here may have made more to do here.
            while await retrying("stream", watcher.catch_up):
                await dispatcher.wait_idle()
            nursery.cancel_scope.cancel()

    async def _say_ready(self, ready: trio.Event) -> None:
        await ready.wait()
        notify(f"READY=1\nSTATUS=listening for {self.lease.site}")
        logger.info("ready")

    async def _scan_daily(self, watcher: Watcher, ready: trio.Event) -> None:
        await ready.wait()
        await self._tidy()  # after what killed the process before this one
        await watcher.scan_daily(self._tidy)

    async def _tidy(self) -> None:
        """Remove from the private directory what nobody goes on with."""
        state = state_directory(self.options.site)
        gone = await trio.to_thread.run_sync(forget_incoming, state, abandon_on_cancel=True)
        if gone:
            logger.info("removed what was left of {} copies from {}", gone, state)

    async def _follow_rules(self, ready: trio.Event) -> None:
        await ready.wait()
        await self.rule_files.follow()

    def _messages(self) -> Messages:
        options = self.options
        return Messages(self.database, options.site, options.sites, self.lease.owner)

    async def _serve_requests(self, requests: Requests, ready: trio.Event) -> None:
        await ready.wait()
        await requests.serve_as_asked()

    async def _keep_lease(self) -> None:
        """Renew the lease for ever. Raises `LeaseLost` where it was lost."""
        every = self.options.lease_time * _RENEW
        tasks = metrics.tasks.labels(self.lease.site)
        while True:
            self._reloaded = trio.Event()
            metrics.skew.labels(self.lease.site).set(clock.skew)
            tasks.set(trio.lowlevel.current_statistics().tasks_living)
            try:
                self._heard(
                    await self.database.renew(
                        self.lease,
                        self.options.lease_time * _HELD,
                        self.trouble.text,
                        self.options.sites.digest,
                    )
                )
                self.trouble.over("lease")
            except DatabaseError as error:
                if is_fatal(error):
                    raise
                # Nobody else can take the site over either, unless they still reach the database;
                # then the renewal will tell.
                self.trouble.meet("lease", of_the_site(error))
                await trio.sleep(min(every, LONGEST_WAIT) / 4)
                continue
            with trio.move_on_after(every):  # a stand-by compares its sites.json with ours
                await self._reloaded.wait()

    def _heard(self, record: SiteRecord) -> None:
        if self._roots is not None:
            self._roots.heard(record)
        if self._requests is not None:
            self._requests.heard(record)


def serve_metrics(port: int) -> None:
    """Serve metrics for Prometheus on loopback."""
    metrics.MetricsServer(("127.0.0.1", port)).begin()


def _one_of(group: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def run(function: Callable[..., Any], *args: object) -> Any:
    """Run an async function to its end; a single error comes out as itself, not in a group."""
    try:
        return trio.run(function, *args, strict_exception_groups=True)
    except BaseExceptionGroup as group:
        error = _one_of(group)
        if isinstance(error, DatabaseError | OSError | KeyboardInterrupt):
            raise error from None
        raise
