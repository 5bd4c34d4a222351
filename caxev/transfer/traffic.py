"""Track what goes over a site's links and how fast, to choose the best source of a copy.

The state is in the listener's memory only: it describes the present, and a restart may lose it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from itertools import count
from typing import Final

import trio
from attrs import define, field

from caxev.config import Link
from caxev.core.errors import GiveUp, RootAway

_MEMORY: Final = 0.7
"""The weight of a link's earlier rate against the latest transfer's (an exponential average)."""
_ORDER: Final = 0.5
"""How much faster a site must be, for each place behind in the configured order, to come first."""
_TELLING: Final = 16 << 20
"""The smallest transfer, in bytes, that counts for a link's rate: less measures latency only."""
_AVOIDED: Final = 600.0
"""Seconds for which a site comes last after a transfer with it has failed."""
_SIGN: Final = 60.0
"""Seconds between two calls of `waiting` while a transfer waits for its place."""


_Turn = tuple[tuple[int, int], int]
"""Urgency, and the negated ticket number; the greatest is next."""


@define(eq=False)
class Traffic:
    """The links of one site, each known by the other site's name."""

    _active: Counter[str] = field(init=False, factory=Counter)
    _rates: dict[str, float] = field(init=False, factory=dict)
    _failures: dict[str, float] = field(init=False, factory=dict)
    _left: trio.Event = field(init=False, factory=trio.Event)
    _waiting: defaultdict[str, list[_Turn]] = field(init=False, factory=lambda: defaultdict(list))
    _tickets: Iterator[int] = field(init=False, factory=count)

    def note(self, name: str, moved: int, seconds: float) -> None:
        """Record that a transfer with that site has moved so many bytes."""
        if moved >= _TELLING and seconds > 0:
            rate = moved / seconds
            self._rates[name] = _MEMORY * self._rates.get(name, rate) + (1 - _MEMORY) * rate

    def failed(self, name: str) -> None:
        """Record that a transfer with that site has failed or was cancelled just now."""
        self._failures[name] = trio.current_time()

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Record the outcome of one transfer with that site; a success clears earlier failures."""
        try:
            yield
        except (GiveUp, RootAway):
            raise  # about the data, or about a disk: no sign that the link is bad
        except BaseException:  # a transfer that hangs is cancelled, and that is a failure too
            self.failed(name)
            raise
        self._failures.pop(name, None)

    def _avoided(self, name: str) -> bool:
        since = self._failures.get(name)
        return since is not None and trio.current_time() < since + _AVOIDED

    def order(self, names: Sequence[str]) -> list[str]:
        """Return the names, best first, by their order, the links' load and their recent rate.

        Sites with which a transfer has failed in the last ten minutes come last.
        """
        # An unmeasured link counts as the fastest known one. If it counted as slow it would never
        # be chosen, and so never be measured.
        best = max(self._rates.values(), default=1.0)

        def worth(place: int, name: str) -> float:
            load = self._active[name] + len(self._waiting.get(name, ()))
            return self._rates.get(name, best) / (1 + load) / (1 + _ORDER * place)

        def rank(one: tuple[int, str]) -> tuple[bool, float, int]:
            place, name = one
            return self._avoided(name), -worth(place, name), place

        return [name for _, name in sorted(enumerate(names), key=rank)]

    @asynccontextmanager
    async def slot(
        self,
        name: str,
        link: Link,
        *,
        urgency: tuple[int, int] = (0, 0),
        aside: Callable[[], AbstractContextManager[None]] = nullcontext,
        waiting: Callable[[], None] = lambda: None,
    ) -> AsyncIterator[float | None]:
        """Wait for a place on the link, and yield one transfer's rate limit in bytes a second.

        The waiting transfer of the greatest `urgency` is next. If the link has a rate but no number
        of transfers, one transfer at a time has the whole rate. While there is no place, `aside` is
        entered and `waiting` is called at least once a minute. If cancelled, it takes no place.
        """
        most = link.transfers or (1 if link.max_rate else None)
        if most is not None:
            await self._turn(name, most, (urgency, -next(self._tickets)), aside, waiting)
        self._active[name] += 1
        try:
            yield link.max_rate and link.max_rate / (most or 1)
        finally:
            self._active[name] -= 1
            self._look()

    async def _turn(
        self,
        name: str,
        most: int,
        mine: _Turn,
        aside: Callable[[], AbstractContextManager[None]],
        waiting: Callable[[], None],
    ) -> None:
        """Wait until a place is free and no other turn in the queue precedes `mine`."""
        queue = self._waiting[name]

        def is_next() -> bool:
            return self._active[name] < most and mine >= max(queue, default=mine)

        if is_next():
            return
        queue.append(mine)
        try:
            with aside():
                while not is_next():
                    waiting()
                    with trio.move_on_after(_SIGN):
                        await self._left.wait()
        finally:
            queue.remove(mine)
            # Several places may have become free at once, and only the first in the queue took
            # one: let the next look. If we were cancelled, our turn was blocking theirs.
            self._look()

    def _look(self) -> None:
        """Let every waiting transfer check whether it is its turn."""
        self._left.set()  # an Event cannot be cleared: those that wait again need a new one
        self._left = trio.Event()
