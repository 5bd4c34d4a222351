"""The leader's part of helping: admit helpers, and take over what they leave.

`session` runs a `HelperWatch`. The renewal of the lease reports whether there are helpers: without
any, nothing is asked of the database. See `caxev.database.helpers`; `helping` is the other end.

A helper's alarms about itself end with it. If one vanishes, and none from its host is back within
`MISSED`, that is an alarm: until one is back, or an operator clears it. One that was asked to leave
is not missed.
"""

from __future__ import annotations

from typing import Final

import trio
from attrs import define, field
from loguru import logger

from caxev.alarms.manager import AlarmManager
from caxev.core.alarms import HELPER, gone_key, helper_gone, helper_key
from caxev.core.clock import utcnow
from caxev.database import Helper, SiteRecord, unless_fatal
from caxev.engine.context import Context
from caxev.engine.dispatcher import Dispatcher
from caxev.engine.recorder import Recorder

MISSED: Final = 60.0
"""Seconds after which a helper that vanished is missed: systemd starts it again within 10."""


@define(eq=False)
class HelperWatch:
    """Looks after the helpers of a site, for one lease."""

    context: Context
    alarms: AlarmManager
    recorder: Recorder
    dispatcher: Dispatcher
    _news: trio.Event = field(init=False, factory=trio.Event)
    # Helpers that may be at work, by name: those admitted, and void ones that have not stopped yet.
    _there: dict[str, Helper] = field(init=False, factory=dict)
    # The last helper that vanished from a host, and when it will be missed.
    _missed: dict[str, tuple[float, Helper]] = field(init=False, factory=dict)
    # The news of each helper that were taken over, though perhaps not yet removed.
    _heard: dict[str, set[str]] = field(init=False, factory=dict)

    def heard(self, record: SiteRecord) -> None:
        """Take in the site's record."""
        if record.helped or self._there or self._missed:
            self._news.set()

    def clear_former(self) -> None:
        """End what was raised about helpers under the former leader: they raise it again."""
        for key in [one.alarm.key for one in self.alarms.active]:
            if key.startswith(HELPER):
                self.alarms.clear(key)

    async def begin(self) -> None:
        """Find the lanes in which helpers of the former leader may still work."""
        found = await self.context.database.helpers(self.context.lease.site)
        self._there = {one.name: one for one in found if one.is_void}
        self._share()

    async def run(self) -> None:
        """Admit and void helpers whenever there are any, until cancelled. Raises `LeaseLost`."""
        while True:
            await self._news.wait()
            self._news = trio.Event()
            with unless_fatal("helpers cannot be admitted or voided"):
                await self.look()

    async def look(self) -> None:
        """Admit helpers that ask, void those whose lease lapsed, take over from stopped ones."""
        database = self.context.database
        helpers = await database.helpers(self.context.lease.site)
        # A helper that withdrew while it was admitted has left no document.
        names = {one.name for one in helpers}
        self._there = {name: one for name, one in self._there.items() if name in names}
        self._share()
        for helper in helpers:
            if helper.epoch is None:
                await (self._admit(helper) if helper.active else database.forget_helper(helper))
            elif helper.active:
                if helper.helps:  # also after an admission whose reply was lost
                    self._end_missing(helper)
                await self._hear(helper)
            elif helper.is_void:
                await self._succeed(helper)
            elif await database.void(helper):
                logger.warning("the helper {} has not renewed its lease", helper.name)
                self._news.set()  # from now on it leaves no alarms: read all of them
        self._miss()

    async def _admit(self, helper: Helper) -> None:
        self._there[helper.name] = helper
        self._share()
        # A record that is being written now may still claim for us a reaction that it renews.
        async with self.recorder.beside_stream():
            pass
        await self.context.database.admit(self.context.lease, helper)
        self._end_missing(helper)
        logger.info("{} helps with {}", helper.name, ", ".join(helper.lanes))

    def _end_missing(self, helper: Helper) -> None:
        self._missed.pop(helper.host, None)
        self.alarms.clear(gone_key(helper.host))

    async def _succeed(self, helper: Helper) -> None:
        """Open what a void helper had claimed, then forget it."""
        database = self.context.database
        opened = await database.reopen_claims(self.context.lease, helper, utcnow())
        await self._hear(helper)
        await self._end_alarms(helper)
        # Its document goes last: if we die before, the next leader finds it, and repeats all this.
        await database.forget_helper(helper)
        self._there.pop(helper.name, None)
        self._heard.pop(helper.name, None)
        self._share()
        logger.info("{} has gone; {} reactions of it are due again", helper.name, opened)
        # Nobody else knows the reactions that it had postponed.
        self.dispatcher.look_again()

    async def _hear(self, helper: Helper) -> None:
        """Take over its alarms."""
        if not helper.news:
            return
        # Not twice: an alarm may have ended since it was taken over.
        heard = self._heard.get(helper.name, set())
        self._heard[helper.name] = {number for number, _, _ in helper.news}
        for _, key, alarm in (one for one in helper.news if one[0] not in heard):
            if alarm is None:
                self.alarms.clear(key)
            else:
                self.alarms.raise_(alarm)
        # Kept before they are removed there: a crash in between repeats them, and loses none.
        await self.alarms.keep()
        await self.context.database.take_news(self.context.lease, helper)

    async def _end_alarms(self, helper: Helper) -> None:
        """End the alarms about a helper that is gone; raise what it could not, and miss it."""
        own = helper_key(helper.owner)
        for key in [one.alarm.key for one in self.alarms.active]:
            if key.startswith(own):
                self.alarms.clear(key)
        if not helper.left:
            # It may have died between a failure and its alarm.
            await self.alarms.raise_failed()
            self._missed[helper.host] = (trio.current_time() + MISSED, helper)

    def _miss(self) -> None:
        """Raise an alarm about each host whose helper has not come back in time."""
        there = {one.host for one in self._there.values()}
        for host, (at, helper) in list(self._missed.items()):
            if host in there:
                del self._missed[host]
            elif trio.current_time() >= at:
                del self._missed[host]
                self.alarms.raise_(helper_gone(helper.site, host, helper.lanes))

    def _share(self) -> None:
        lanes = (lane for one in self._there.values() for lane in one.lanes)
        self.dispatcher.lanes.shared = frozenset(lanes)
