"""The leader's part of helping: admit helpers, and take over what they leave.

`session` runs a `HelperWatch`. The renewal of the lease reports whether there are helpers: without
any, nothing is asked of the database. See `caxev.database.helpers`; `helping` is the other end.
"""

from __future__ import annotations

import trio
from attrs import define, field
from loguru import logger

from caxev.alarms.manager import AlarmManager
from caxev.core.clock import utcnow
from caxev.database import Helper, SiteRecord, unless_fatal
from caxev.engine.context import Context
from caxev.engine.dispatcher import Dispatcher
from caxev.engine.recorder import Recorder


@define(eq=False)
class HelperWatch:
    """Looks after the helpers of a site, for one lease."""

    context: Context
    alarms: AlarmManager
    recorder: Recorder
    dispatcher: Dispatcher
    _news: trio.Event = field(init=False, factory=trio.Event)
    _admitted: dict[str, Helper] = field(init=False, factory=dict)

    def heard(self, record: SiteRecord) -> None:
        """Take in the site's record."""
        if record.helped or self._admitted:
            self._news.set()

    async def run(self) -> None:
        """Look after helpers whenever there are any, for ever. Raises `LeaseLost`."""
        while True:
            await self._news.wait()
            self._news = trio.Event()
            with unless_fatal("helpers cannot be looked after"):
                await self.look()

    async def look(self) -> None:
        """Admit who asks, void who is late, and take over from who is void."""
        epoch, database = self.context.lease.epoch, self.context.database
        for helper in await database.helpers(self.context.lease.site):
            if helper.epoch == epoch and not helper.active and await database.void(helper):
                logger.warning("the helper {} has not renewed its lease", helper.name)
                await self._succeed(helper)
            elif helper.epoch == epoch:
                await self._hear(helper)
            elif helper.epoch is not None:
                await self._succeed(helper)
            elif helper.active:
                await self._admit(helper)
            else:
                await database.forget_helper(helper)

    async def _admit(self, helper: Helper) -> None:
        self._admitted[helper.name] = helper
        self._share()
        # What is being recorded now may still claim for us what it renews.
        async with self.recorder.beside_stream():
            pass
        await self.context.database.admit(self.context.lease, helper)
        logger.info("{} helps with {}", helper.name, ", ".join(helper.lanes))

    async def _succeed(self, helper: Helper) -> None:
        """Open what a void helper had claimed, then forget it."""
        database = self.context.database
        opened = await database.reopen_claims(self.context.lease, helper, utcnow())
        await self._hear(helper)
        await database.forget_helper(helper)
        self._admitted.pop(helper.name, None)
        self._share()
        logger.info("{} has gone; {} reactions of it are due again", helper.name, opened)
        # What it had postponed is known to nobody else.
        self.dispatcher.look_again()

    async def _hear(self, helper: Helper) -> None:
        """Take over its alarms."""
        if not helper.news:
            return
        for _, key, alarm in helper.news:
            if alarm is None:
                self.alarms.clear(key)
            else:
                self.alarms.raise_(alarm)
        await self.alarms.keep()
        await self.context.database.take_news(self.context.lease, helper)

    def _share(self) -> None:
        lanes = (lane for one in self._admitted.values() for lane in one.lanes)
        self.dispatcher.lanes.shared = frozenset(lanes)
