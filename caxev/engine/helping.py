"""Help a site's leader: claim reactions of some lanes on another machine, for ``caxev work``.

::

    join, until the leader admits us, again and again
      outer nursery: attempts in flight, their settlement and progress, the lease
        inner nursery: the taking of reactions, the stream of those that may be claimed

The leader records; a helper claims, attempts and settles. It has a lease of its own, and holds it
for less than the leader waits: when it cannot be renewed, all attempts are cancelled before others
make them again. See `caxev.database.helpers` for why no reaction is made by two.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from time import monotonic
from typing import Final

import trio
from attrs import define, field
from loguru import logger

from caxev import metrics
from caxev.database import (
    Database,
    DatabaseError,
    HistoryLost,
    Lease,
    LeaseLost,
    is_fatal,
    one_of,
    unless_fatal,
)
from caxev.engine import process
from caxev.engine.context import Context
from caxev.engine.dispatcher import Dispatcher
from caxev.engine.fence import Fence
from caxev.engine.forcing import leave_by_force, letting_go
from caxev.engine.lease import HELD, renewing
from caxev.engine.leaving import Leaving
from caxev.engine.options import Options, Reloader
from caxev.engine.presence import Presence
from caxev.engine.relayed import OwnAlarms, RelayedAlarms
from caxev.engine.root_watch import RootWatch
from caxev.engine.sampling import ProcessSampler
from caxev.engine.session import tidy
from caxev.engine.systemd import notify
from caxev.engine.trouble import Trouble
from caxev.engine.watchdog import Watchdog
from caxev.engine.workers import Workers

FENCED: Final = 0.6
"""Part of the lease time after which we have cancelled our reactions, if the lease could not be
renewed. The leader gives them to others after `HELD`."""
RENEW: Final = 3.0
"""Seconds between two renewals..."""
OFTEN: Final = 0.1
"""...or this part of the lease time, if that is less."""
ASK: Final = 1.0
"""Seconds between two looks whether the leader has admitted us."""
LAST: Final = 10.0
"""Seconds that the last settlements may take."""


async def work(options: Options, lanes: Sequence[str]) -> None:
    """Help until asked to leave. Raises `DatabaseError` if the database cannot be used at first."""
    await process.run(options, Database.check, partial(serve, lanes=lanes))


async def serve(
    options: Options, database: Database, owner: str, leaving: Leaving, *, lanes: Sequence[str]
) -> None:
    """Join, and help while the lease is ours, again and again, until asked to leave."""
    reloader = Reloader(options, database, records=False)
    presence = Presence(reloader, database, owner, lanes)
    async with process.accompanied(reloader, presence, leaving, RENEW):
        for name in (f"{owner}.{n}" for n in count(1)):
            # Never used again: what is left of it counts for nobody.
            asking = Lease(options.site.name, 0, owner, name)
            if leaving.asked.is_set() or not await _help(
                reloader, asking, lanes, database, leaving
            ):
                return


async def _help(
    reloader: Reloader, asking: Lease, lanes: Sequence[str], database: Database, leaving: Leaving
) -> bool:
    """Join, and help while that lease is ours; return whether to join again."""
    trouble = Trouble(asking.site)
    lease = None
    helping = metrics.helping.labels(asking.site)
    try:
        lease = await _join(reloader, asking, lanes, database, leaving, trouble=trouble)
        if lease is None:
            return False
        helping.set(1)
        await HelperSession(reloader, database, lease, lanes, leaving, trouble).serve()
    except* LeaseLost as group:
        logger.warning("{}; joining again", one_of(group))
        with unless_fatal("others wait until the lease has lapsed"):
            await database.stop(lease or asking)
    finally:
        helping.set(0)
    return True


async def _join(
    reloader: Reloader,
    asking: Lease,
    lanes: Sequence[str],
    database: Database,
    leaving: Leaving,
    *,
    trouble: Trouble,
) -> Lease | None:
    """Wait until the leader has admitted us; None if asked to leave first. Raises `LeaseLost`."""
    reported, site = False, asking.site
    while not leaving.asked.is_set():
        try:
            await database.join(asking, lanes, reloader.options.lease_time * HELD)
            if (lease := await database.admitted(asking)) is not None:
                return lease
            trouble.over("join")
        except DatabaseError as error:
            if is_fatal(error):
                raise
            trouble.meet("join", error)
        if not reported and not trouble:
            logger.info("waiting for the listener of {} to admit {}", site, asking.helper)
            notify(f"READY=1\nSTATUS=waiting for the listener of {site}")
            reported = True
        with trio.move_on_after(ASK):
            await leaving.asked.wait()
    with trio.move_on_after(LAST), suppress(DatabaseError):  # the leader is left to forget us
        await database.withdraw(asking)
    return None


@define(eq=False)
class HelperSession:
    """The acts of a helper while one lease lasts."""

    reloader: Reloader
    database: Database
    lease: Lease
    lanes: Sequence[str]
    leaving: Leaving
    trouble: Trouble
    alarms: RelayedAlarms = field(init=False)
    context: Context = field(init=False)
    roots: RootWatch = field(init=False)
    dispatcher: Dispatcher = field(init=False)
    # Before the leader gives our reactions to others; each renewal defers it.
    fence: Fence = field(init=False)

    def __attrs_post_init__(self) -> None:
        options = self.reloader.options
        self.alarms = RelayedAlarms(self.database, self.lease)
        self.context = Context(self.database, self.lease, options, self.alarms, self.trouble)
        lease_time = options.lease_time
        self.fence = Fence(lease_time * FENCED, lease_time * (HELD - FENCED))

    def _use(self, options: Options) -> None:
        """Replace the options after a reload."""
        self.context.options = options
        self.roots.use_options()

    async def serve(self) -> None:
        """Help until asked to leave, or a disk is away. Raises `LeaseLost`."""
        with logger.contextualize(site=self.lease.site):
            files = self.context.options.handler_files
            async with Workers(files=files) as workers, letting_go(self._let_go):
                with self.fence.cancelling() as held:
                    await self._help(workers)
                if held.cancelled_caught:
                    raise LeaseLost("the lease could not be renewed in time")
        logger.info("stopped helping {}", self.lease.site)

    async def _help(self, workers: Workers) -> None:
        context = self.context
        async with trio.open_nursery() as outer:
            self.roots = RootWatch(context, workers)
            self.dispatcher = Dispatcher(context, workers, outer, self.roots, self.lanes)
            self.roots.woken = self.dispatcher.look_again
            self.reloader.users = [self._use]
            self.reloader.report_to(OwnAlarms(self.alarms))
            await self.trouble.retrying("lease", self._renew)
            await self._act(outer)
            outer.cancel_scope.cancel()

    async def _act(self, outer: trio.Nursery) -> None:
        dispatcher = self.dispatcher
        every = min(RENEW, self.context.options.lease_time * OFTEN)
        for function in (
            dispatcher.settler.run,
            dispatcher.runner.show_progress,
            partial(renewing, self.trouble, self._renew, every),
            Watchdog(self.context, OwnAlarms(self.alarms), self.fence).run,
            self.alarms.run,
            self.roots.run,
            ProcessSampler(self.context, dispatcher, self.roots).run,
            partial(leave_by_force, dispatcher.runner, self._let_go, self.fence),
        ):
            outer.start_soon(function)
        if not await self._disks_there():
            return
        await tidy(self.context.site)  # after what killed the process before this one
        async with trio.open_nursery() as inner:
            inner.start_soon(dispatcher.take)
            inner.start_soon(self._follow)
            inner.start_soon(self._leave_without_disks, inner.cancel_scope)
            inner.start_soon(self.leaving.cancel, inner.cancel_scope)
            logger.info("helping {} with {}", self.lease.site, ", ".join(self.lanes))
            notify(f"READY=1\nSTATUS=helping {self.lease.site}")
        if self.leaving.asked.is_set():
            notify("STOPPING=1")
        with trio.move_on_after(self.context.options.grace):
            await dispatcher.drained()

    # -- what may be claimed --------------------------------------------------------------------

    async def _follow(self) -> None:
        """Look for what is due whenever something may be claimed, until cancelled."""
        handlers = self.context.registry.handlers.values()
        names = [one.name for one in handlers if one.lane in self.lanes]
        while True:
            stream = await self.trouble.retrying(
                "follow", self.database.open_reactions, self.lease.site, names
            )
            # After it was opened: what came before is not in it.
            self.dispatcher.look_again()
            async with self.database.closing(stream):
                try:
                    with unless_fatal("reactions cannot be followed"):
                        while True:
                            if await self.database.next_batch(stream):
                                self.dispatcher.look_again()
                except HistoryLost as error:
                    logger.debug("following anew: {}", error)
            await trio.sleep(ASK)

    # -- disks ----------------------------------------------------------------------------------

    @property
    def _away(self) -> list[str]:
        return [why for why in self.roots.away.values() if why is not None]

    async def _disks_there(self) -> bool:
        """Wait until all directories are there; False if asked to leave first.

        Else each reaction would be claimed here, and wait for a disk that the leader has.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.leaving.cancel, nursery.cancel_scope)
            await self.roots.looked.wait()
            while self._away:
                await self.roots.probed.wait()
            nursery.cancel_scope.cancel()
        return not self.leaving.asked.is_set()

    async def _leave_without_disks(self, scope: trio.CancelScope) -> None:
        while not self._away:
            await self.roots.probed.wait()
        logger.error("{}: giving back what is claimed here", self._away[0])
        scope.cancel()

    # -- the lease ------------------------------------------------------------------------------

    async def _renew(self) -> None:
        # The time before the call: the server extends the lease later than that, so our fence falls
        # first, however long the reply takes.
        asked, lease_time = monotonic(), self.context.options.lease_time
        record = await self.database.renew_helper(self.lease, lease_time * HELD)
        self.fence.renewed(asked)
        self.dispatcher.pause(record is None or not record.active)
        if record is not None:
            self.roots.heard(record)

    async def _let_go(self) -> None:
        """Settle what has ended, give back what is claimed, and end the lease."""
        with trio.move_on_after(LAST, shield=True):
            try:
                await self.dispatcher.settler.free_all()
                await self.alarms.relay()
            finally:
                # Even if results could not be written: else others wait for the lease to lapse.
                await self.database.leave(self.lease)
