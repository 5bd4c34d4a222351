"""Relay a helper's alarms: its site's leader keeps and delivers them, and ends those about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import trio
from attrs import define, field
from loguru import logger

from caxev.core.alarms import PARKED, UNCANCELLABLE, Alarm, Alarms, helper_key, of_helper
from caxev.database import Database, DatabaseError, Lease, unless_fatal
from caxev.engine.trouble import by_halves

GATHER: Final = 1.0
"""Seconds for which alarms are gathered, so that many are one write."""


@define(eq=False)
class RelayedAlarms(Alarms):
    """The alarms of one helper. Use `run`."""

    database: Database
    lease: Lease
    _news: dict[str, Alarm | None] = field(init=False, factory=dict)
    _changed: trio.Event = field(init=False, factory=trio.Event)
    _writing: trio.Lock = field(init=False, factory=trio.Lock)

    def raise_(self, alarm: Alarm) -> None:
        self._note(alarm.key, alarm)

    def clear(self, key: str) -> None:
        self._note(key, None)

    async def raise_and_keep(self, alarm: Alarm) -> None:
        self.raise_(alarm)
        await self.relay()

    async def clear_and_keep(self, key: str) -> None:
        self.clear(key)
        await self.relay()

    def _note(self, key: str, alarm: Alarm | None) -> None:
        if key.startswith(UNCANCELLABLE):  # it ends with this process
            key = helper_key(self.lease.owner, key)
            alarm = alarm and of_helper(alarm, self.lease.owner)
        self._news.pop(key, None)  # the latest comes last
        self._news[key] = alarm
        self._changed.set()

    async def run(self) -> None:
        """Relay alarms as they come, until cancelled. Raises `LeaseLost`."""
        while True:
            await self._changed.wait()
            await trio.sleep(GATHER)
            with unless_fatal("alarms cannot be relayed"):
                await self.relay()

    async def relay(self) -> None:
        """Relay what was not relayed yet. Raises `DatabaseError`."""
        async with self._writing:
            self._changed = trio.Event()
            news, self._news = self._news, {}
            try:
                await self._write(news)
            except BaseException:
                # Alarms that came during the write are newer, and win.
                self._news = {**news, **self._news}
                self._changed.set()
                raise

    async def _write(self, news: dict[str, Alarm | None]) -> None:
        # Each reaction that is done ends an alarm that hardly ever was raised.
        over = {key for key, one in news.items() if one is None and key.startswith(PARKED)}
        if over and not await self.database.has_parked(self.lease.site):
            news = {key: one for key, one in news.items() if key not in over}
        await by_halves([*news.items()], self._add, self._leave_out)

    async def _add(self, news: Sequence[tuple[str, Alarm | None]]) -> None:
        if news:
            await self.database.add_news(self.lease, dict(news))

    async def _leave_out(self, news: tuple[str, Alarm | None], error: DatabaseError) -> None:
        logger.error("the alarm {!r} cannot be relayed: {}", news[0], error)


@define(eq=False)
class OwnAlarms(Alarms):
    """The alarms about the helper itself, such as a wrong configuration: they end with it."""

    relayed: RelayedAlarms

    def raise_(self, alarm: Alarm) -> None:
        self.relayed.raise_(of_helper(alarm, self.relayed.lease.owner))

    def clear(self, key: str) -> None:
        self.relayed.clear(helper_key(self.relayed.lease.owner, key))

    async def raise_and_keep(self, alarm: Alarm) -> None:
        await self.relayed.raise_and_keep(of_helper(alarm, self.relayed.lease.owner))

    async def clear_and_keep(self, key: str) -> None:
        await self.relayed.clear_and_keep(helper_key(self.relayed.lease.owner, key))
