"""Trouble with the database: keep trying, and show what is wrong meanwhile.

The stream may go on while no write is confirmed, and the other way round, so each task reports its
own trouble. `listener` makes a `Trouble` for each lease and for the wait before it; metrics, alarms
and ``caxev status`` show it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from time import monotonic
from typing import Any, Final, TypeVar

import trio
from attrs import define, field
from loguru import logger

from caxev import metrics
from caxev.core.clock import utcnow
from caxev.database import DatabaseError, concerns_one, is_fatal

T = TypeVar("T")

BRIEF: Final = 1.0
"""Seconds for which a write that conflicts with another is repeated without a report."""
LONGEST_PAUSE: Final = 5.0
"""Seconds at most between two attempts at a read or write."""


@define(eq=False)
class Trouble:
    """A site's trouble with the database: since when, and the last error of each task."""

    site: str
    _since: datetime | None = field(init=False, default=None)
    _at: float = field(init=False, default=0.0)
    _met: dict[str, str] = field(init=False, factory=dict)

    def meet(self, task: str, error: DatabaseError) -> None:
        """Report what a task has met; logged once, until all of it is over."""
        metrics.database_errors.labels(self.site, type(error).__name__).inc()
        if self._since is None:
            logger.warning("{}; retrying until it answers", error)
            self._since, self._at = utcnow(), monotonic()
        self._met[task] = str(error)
        self._show()

    def over(self, task: str) -> None:
        """Report that what a task met is over; nothing if it has met none."""
        self._met.pop(task, None)
        if self._since is not None and not self._met:
            logger.info("the database answers again")
            self._since = None
        self._show()

    async def retrying(
        self,
        task: str,
        function: Callable[..., Awaitable[T]],
        *args: Any,
        quiet: float = BRIEF,
    ) -> T:
        """Call an async function until the database lets it through.

        Trouble of less than `quiet` seconds is not reported. Raises an error that neither time nor
        leaving out one write can cure (`is_fatal`).
        """
        pause, began = 0.1, trio.current_time()
        while True:
            try:
                result = await function(*args)
            except DatabaseError as error:
                if is_fatal(error):
                    raise
                logger.debug("retrying: {}", error)
                if trio.current_time() > began + quiet:
                    self.meet(task, error)
                await trio.sleep(pause)
                # Soon at first: most trouble is an election, over within seconds.
                pause = min(pause * 2, LONGEST_PAUSE)
            else:
                self.over(task)
                return result

    def _show(self) -> None:
        metrics.troubled.labels(self.site).set(self._since is not None)
        since = 0 if self._since is None else self._since.timestamp()
        metrics.troubled_since.labels(self.site).set(since)

    def __bool__(self) -> bool:
        return self._since is not None

    @property
    def text(self) -> str | None:
        """The error and since when it lasts; None if there is no trouble."""
        if self._since is None:
            return None
        return f"since {self._since:%Y-%m-%d %H:%M:%S} UTC: {next(iter(self._met.values()))}"

    @property
    def seconds(self) -> float:
        """For how long it has lasted; 0.0 if there is none."""
        return 0.0 if self._since is None else monotonic() - self._at


async def by_halves(
    items: Sequence[T],
    write: Callable[[Sequence[T]], Awaitable[None]],
    alone: Callable[[T, DatabaseError], Awaitable[None]],
) -> None:
    """Write items together; if the database refuses one of them, find it by writing halves.

    `write` must be repeatable. `alone` gets each item that is refused by itself, with the error.
    """
    try:
        await write(items)
    except DatabaseError as error:
        if not (items and concerns_one(error)):
            raise
        if len(items) == 1:
            await alone(items[0], error)
            return
        # Each refused item costs about 2 log2(n) writes, and all the others get through.
        middle = len(items) // 2
        await by_halves(items[:middle], write, alone)
        await by_halves(items[middle:], write, alone)
