"""Figures that only the database can count, by reading every run.

They are counted in the background, when a viewer asks and runs have changed; meanwhile viewers get
the previous answer. Without a viewer or a change the database is not queried.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Final, Generic, TypeVar

import trio
from attrs import define, field
from loguru import logger

from caxev.core.clock import utcnow
from caxev.database import DatabaseError

T = TypeVar("T")

PATIENCE: Final = 0.2
"""Seconds that a page waits for the first answer: a small collection needs less."""
SHARE: Final = 20.0
"""An answer is kept for so many times the seconds that it took."""


@define(eq=False)
class Counted(Generic[T]):
    """An answer of the database, at least `least` seconds old before it is asked for again.

    It is the same as long as `mark` returns the same. `counted` is called when there is a new one.
    `at` is when it was asked for, UTC; None: never.
    """

    look_up: Callable[[], Awaitable[T]]
    value: T
    least: float
    mark: Callable[[], int]
    counted: Callable[[], None]
    at: datetime | None = field(init=False, default=None)
    _wanted: trio.Event = field(init=False, factory=trio.Event)
    _there: trio.Event = field(init=False, factory=trio.Event)
    _mark: int = field(init=False, default=-1)

    def peek(self) -> T:
        """Return the last answer, and have it renewed if it is old."""
        self._wanted.set()
        return self.value

    async def get(self) -> T:
        """Return the last answer; wait a moment for the first."""
        self._wanted.set()
        with trio.move_on_after(PATIENCE):
            await self._there.wait()
        return self.value

    async def run(self) -> None:
        """Count whenever a viewer needs it, until cancelled."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            began = trio.current_time()
            if self.mark() != self._mark:
                await self._count()
            took = trio.current_time() - began
            await trio.sleep(max(self.least, SHARE * took))

    async def _count(self) -> None:
        # Before the count: a change during it asks for another.
        at, mark = utcnow(), self.mark()
        try:
            self.value = await self.look_up()
        except DatabaseError as error:
            logger.debug("not counted: {}", error)
            return
        self.at, self._mark = at, mark
        self._there.set()
        self.counted()
