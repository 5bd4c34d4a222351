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

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Final
from uuid import uuid4

import trio
from attrs import define, evolve, field
from loguru import logger

from caxev import aio
from caxev.database import (
    AWAIT,
    Database,
    DatabaseError,
    HistoryLost,
    Lease,
    LeaseLost,
    ReactionStream,
    is_fatal,
    one_of,
    open_database,
    unless_fatal,
)
from caxev.engine.context import Context
from caxev.engine.dispatcher import Dispatcher
from caxev.engine.forcing import leave_by_force
from caxev.engine.leaving import Leaving
from caxev.engine.listener import tune_collector
from caxev.engine.options import Options
from caxev.engine.relayed import RelayedAlarms
from caxev.engine.root_watch import RootWatch
from caxev.engine.session import tidy
from caxev.engine.systemd import keep_watchdog, notify
from caxev.engine.trouble import Trouble
from caxev.engine.workers import Workers

HELD: Final = 0.8
"""Part of the lease time after which the leader gives our reactions to others..."""
FENCED: Final = 0.6
"""...and after which we have cancelled them, if the lease could not be renewed."""
RENEW: Final = 3.0
"""Seconds between two renewals..."""
OFTEN: Final = 0.1
"""...or this part of the lease time, if that is less."""
ASK: Final = 1.0
"""Seconds between two looks whether the leader has admitted us."""
CLOSING: Final = 2.0
"""Seconds that closing a stream may take."""
LAST: Final = 10.0
"""Seconds that the last settlements may take."""


async def work(options: Options, lanes: Sequence[str]) -> None:
    """Help until asked to leave. Raises `DatabaseError` if the database cannot be used at first."""
    tune_collector()
    leaving = Leaving()
    async with aio.loop(), open_database(options.settings) as database:
        await database.check()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leaving.listen)
            nursery.start_soon(keep_watchdog, RENEW)
            await serve(options, lanes, database, leaving)
            nursery.cancel_scope.cancel()


async def serve(
    options: Options, lanes: Sequence[str], database: Database, leaving: Leaving
) -> None:
    """Join, and help while the lease is ours, again and again, until asked to leave."""
    while not leaving.asked.is_set():
        trouble = Trouble(options.site.name)
        lease = await _join(options, lanes, database, leaving, trouble)
        if lease is None:
            return
        try:
            await HelperSession(options, database, lease, lanes, leaving, trouble).serve()
        except* LeaseLost as group:
            logger.warning("{}; joining again", one_of(group))


async def _join(
    options: Options,
    lanes: Sequence[str],
    database: Database,
    leaving: Leaving,
    trouble: Trouble,
) -> Lease | None:
    """Wait until the leader has admitted us; None if asked to leave first."""
    host, site = socket.gethostname(), options.site.name
    # Never used again: what is left of it counts for nobody.
    name = f"{host}:{os.getpid()}:{uuid4().hex[:8]}"
    asking, reported = Lease(site, 0, host, name), False
    while not leaving.asked.is_set():
        try:
            await database.join(asking, lanes, options.lease_time * HELD)
            if (lease := await database.admitted(asking)) is not None:
                return lease
            trouble.over("join")
        except LeaseLost:  # it took too long
            asking = evolve(asking, helper=f"{host}:{os.getpid()}:{uuid4().hex[:8]}")
        except DatabaseError as error:
            if is_fatal(error):
                raise
            trouble.meet("join", error)
        if not reported and not trouble:
            logger.info("waiting for the listener of {} to admit {}", site, name)
            notify(f"READY=1\nSTATUS=waiting for the listener of {site}")
            reported = True
        with trio.move_on_after(ASK):
            await leaving.asked.wait()
    with trio.move_on_after(LAST):
        await _withdraw(database, asking)
    return None


async def _withdraw(database: Database, asking: Lease) -> None:
    try:
        await database.withdraw(asking)
    except DatabaseError as error:
        logger.debug("the leader is left to forget us: {}", error)


@define(eq=False)
class HelperSession:
    """What a helper does while one lease lasts."""

    options: Options
    database: Database
    lease: Lease
    lanes: Sequence[str]
    leaving: Leaving
    trouble: Trouble
    alarms: RelayedAlarms = field(init=False)
    context: Context = field(init=False)
    roots: RootWatch = field(init=False)
    dispatcher: Dispatcher = field(init=False)
    # It ends before the leader may give our reactions to others; each renewal defers that.
    _held: trio.CancelScope = field(init=False, factory=trio.CancelScope)
    _warned: str = field(init=False, default="")

    def __attrs_post_init__(self) -> None:
        self.alarms = RelayedAlarms(self.database, self.lease)
        self.context = Context(self.database, self.lease, self.options, self.alarms, self.trouble)

    async def serve(self) -> None:
        """Help until asked to leave, or a disk is away. Raises `LeaseLost`."""
        with logger.contextualize(site=self.lease.site):
            async with Workers(files=self.options.handler_files) as workers:
                ours = True
                try:
                    with self._held:
                        await self._help(workers)
                    ours = not self._held.cancelled_caught
                except* LeaseLost:
                    ours = False
                    raise
                finally:
                    if ours:
                        await self._let_go()
            if not ours:
                raise LeaseLost("the lease could not be renewed in time")
        logger.info("stopped helping {}", self.lease.site)

    async def _help(self, workers: Workers) -> None:
        context = self.context
        async with trio.open_nursery() as outer:
            self.roots = RootWatch(context, workers)
            self.dispatcher = Dispatcher(context, workers, outer, self.roots, self.lanes)
            self.roots.woken = self.dispatcher.look_again
            await self.trouble.retrying("lease", self._renew)
            await self._act(outer)
            outer.cancel_scope.cancel()

    async def _act(self, outer: trio.Nursery) -> None:
        dispatcher = self.dispatcher
        for function in (
            dispatcher.settler.run,
            dispatcher.runner.show_progress,
            self._keep_lease,
            self.alarms.run,
            self.roots.run,
            partial(leave_by_force, dispatcher.runner, self._let_go),
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
        with trio.move_on_after(self.options.grace):
            await dispatcher.drained()

    # -- what may be claimed --------------------------------------------------------------------

    async def _follow(self) -> None:
        """Look for what is due whenever something may be claimed, for ever."""
        handlers = self.context.registry.handlers.values()
        names = [one.name for one in handlers if one.lane in self.lanes]
        while True:
            stream = await self.trouble.retrying(
                "follow", self.database.open_reactions, self.lease.site, names
            )
            # After it was opened: what came before is not in it.
            self.dispatcher.look_again()
            try:
                await self._follow_to_the_end(stream)
            except HistoryLost as error:
                logger.debug("following anew: {}", error)
            await trio.sleep(ASK)

    async def _follow_to_the_end(self, stream: ReactionStream) -> None:
        """Look for what is due after each change, until the stream ends."""
        try:
            with unless_fatal("reactions cannot be followed"):
                while True:
                    if await self.database.next_reactions(stream, AWAIT):
                        self.dispatcher.look_again()
        finally:
            with trio.move_on_after(CLOSING, shield=True), suppress(DatabaseError):
                await self.database.close_reactions(stream)

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

    async def _keep_lease(self) -> None:
        every = min(RENEW, self.options.lease_time * OFTEN)
        while True:
            await trio.sleep(every)
            try:
                await self._renew()
                self.trouble.over("lease")
            except DatabaseError as error:
                if is_fatal(error):
                    raise
                self.trouble.meet("lease", error)

    async def _renew(self) -> None:
        asked, lease_time = trio.current_time(), self.options.lease_time
        record = await self.database.renew_helper(self.lease, lease_time * HELD)
        self._held.deadline = asked + lease_time * FENCED
        self.dispatcher.paused = record is None or not record.active
        if record is not None:
            self.roots.heard(record)
            self._compare(record.configuration)

    def _compare(self, theirs: str) -> None:
        """Warn if the leader has another sites.json than we have."""
        mine = self.options.sites.digest
        if theirs not in ("", mine, self._warned):
            logger.warning(
                "the listener of {} has another sites.json: its digest is {}, and that of {} is {}",
                self.lease.site,
                theirs,
                self.options.sites.path,
                mine,
            )
            self._warned = theirs

    async def _let_go(self) -> None:
        """Settle what has ended, give back what is claimed, and end the lease."""
        with trio.move_on_after(LAST, shield=True):
            try:
                await self.dispatcher.settler.free_all()
                await self.alarms.relay()
            finally:
                await self.database.leave(self.lease)
