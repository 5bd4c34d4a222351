"""Jobs on their way to a batch system: those that come within a moment go together.

Used by `caxev.handlers.processing`; lives in the listener's memory and knows nothing that is not
filed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Final

import trio
from attrs import define, field

from caxev.batch.base import JobSpec
from caxev.batch.work import Found
from caxev.core.errors import GiveUp, Retry

GATHER: Final = 0.25
"""Seconds for which a job waits for others to go with."""
PATIENCE: Final = 600.0
"""Seconds that a job waits here for room; then it lets others of its lane pass, such as the looks
for jobs that were lost, by which there may come to be room."""
MOST: Final = 500
"""Jobs that are sent at once at most."""

Sent = Found | GiveUp | Retry | None
Send = Callable[[Sequence[JobSpec]], Awaitable[list[Sent]]]
_Key = tuple[Hashable, Hashable]
"""Where jobs go, and what they need."""


@define(eq=False)
class _Seat:
    spec: JobSpec
    sent: Sent = field(factory=lambda: Retry("the one it was to go with was cut short", after=1.0))
    done: trio.Event = field(factory=trio.Event)


@define(eq=False)
class Queue:
    """The way to the batch systems of one site."""

    _gathering: dict[_Key, list[_Seat]] = field(init=False, factory=dict)
    # One that sends counts the jobs that are out and adds its own: two at once would both take the
    # same room.
    _sending: defaultdict[Hashable, trio.Lock] = field(
        init=False, factory=lambda: defaultdict(trio.Lock)
    )
    _left: trio.Event = field(init=False, factory=trio.Event)

    def left(self) -> None:
        """A job has ended: there is room for another."""
        self._left.set()
        self._left = trio.Event()

    async def place(self, spec: JobSpec, where: Hashable, send: Send) -> Found:
        """Send a job, with those that come at the same moment, need the same and go the same way.

        Waits while there is no room, but for `PATIENCE` only. `send` sends several; of those who
        come together only one's is called, and what it raises is raised by all. Raises what `send`
        says of this job.
        """
        while True:
            left = self._left
            sent = await self._together((where, spec.needs), _Seat(spec), send)
            if isinstance(sent, Found):
                return sent
            if sent is not None:
                raise sent
            with trio.move_on_after(PATIENCE) as waited:
                await left.wait()
            if waited.cancelled_caught:
                raise Retry("the batch system has no room", after=PATIENCE / 10)

    async def _together(self, key: _Key, seat: _Seat, send: Send) -> Sent:
        seats = self._gathering.setdefault(key, [])
        seats.append(seat)
        if len(seats) >= MOST:
            self._gathering.pop(key)
        if seats[0] is seat:
            await self._lead(key, seats, send)
        else:
            await seat.done.wait()
        return seat.sent

    async def _lead(self, key: _Key, seats: list[_Seat], send: Send) -> None:
        try:
            await trio.sleep(GATHER)
            async with self._sending[key[0]]:
                self._close(key, seats)
                for seat, sent in zip(
                    seats, await send([seat.spec for seat in seats]), strict=True
                ):
                    seat.sent = sent
        except (GiveUp, Retry) as error:
            for seat in seats:
                seat.sent = error
        finally:
            self._close(key, seats)
            for seat in seats:
                seat.done.set()

    def _close(self, key: _Key, seats: list[_Seat]) -> None:
        if self._gathering.get(key) is seats:
            del self._gathering[key]
