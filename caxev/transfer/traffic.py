"""What goes over a site's links now, and how fast it went: which source is the best to take.

Kept in the listener's memory: it is about the present, and a restart forgets it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import (
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from itertools import count
from typing import Final

import trio
from attrs import define, field

from caxev.config import Link
from caxev.core.errors import GiveUp, RootAway

_MEMORY: Final = 0.7
"""How much of the known rate of a link the latest transfer leaves as it was."""
_ORDER: Final = 0.5
"""How much faster the next site in the order must be, for each place, to come first."""
_TELLING: Final = 16 << 20
"""Bytes from which a transfer says something about its link."""
_AVOIDED: Final = 600.0
"""Seconds for which a site comes last after a transfer from or to there has failed."""
_SIGN: Final = 60.0
"""Seconds between the signs of life of one that waits for a place."""


_Turn = tuple[tuple[int, int], int]
"""Urgency, and how early it came; the greatest is next."""


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
        """A transfer from or to there has moved so many bytes."""
        if moved >= _TELLING and seconds > 0:
            rate = moved / seconds
            self._rates[name] = _MEMORY * self._rates.get(name, rate) + (1 - _MEMORY) * rate

    def failed(self, name: str) -> None:
        """A transfer from or to there has failed, or was broken off, just now."""
        self._failures[name] = trio.current_time()

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """One transfer from or to there: it has failed unless this comes to its end.

        So does one that hangs and is cancelled for that. A success makes up for failures. A
        `GiveUp` is about the data, a `RootAway` about a disk: neither says anything of the way.
        """
        try:
            yield
        except (GiveUp, RootAway):
            raise
        except BaseException:
            self.failed(name)
            raise
        self._failures.pop(name, None)

    def _avoided(self, name: str) -> bool:
        since = self._failures.get(name)
        return since is not None and trio.current_time() < since + _AVOIDED

    def order(self, names: Sequence[str]) -> list[str]:
        """The names, best first: by their order, by what goes or waits there, by how fast it went.

        A link of which nothing is known counts as the fastest one that is. Where a transfer has
        failed in the last ten minutes, that one comes after all others.
        """
        best = max(self._rates.values(), default=1.0)

        def worth(place: int, name: str) -> float:
            rate = self._rates.get(name, best)
            return rate / (1 + self._load(name)) / (1 + _ORDER * place)

        def rank(one: tuple[int, str]) -> tuple[bool, float, int]:
            place, name = one
            return self._avoided(name), -worth(place, name), place

        return [name for _, name in sorted(enumerate(names), key=rank)]

    def _load(self, name: str) -> int:
        return self._active[name] + len(self._waiting.get(name, ()))

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
        """Wait for a place on the link; what one transfer may move in a second, in bytes.

        Of those that wait the one of the greatest `urgency` is next. Where a rate but no number of
        transfers is given, one at a time has all of it. While there is no place `aside` is entered,
        and `waiting` is called at least once a minute. Cancelled there, it takes none.
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
        """Wait until a place is free and nobody waits whose turn is before `mine`."""
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
            self._look()  # there may be another place

    def _look(self) -> None:
        """Have all that wait look whether it is their turn."""
        self._left.set()
        self._left = trio.Event()
