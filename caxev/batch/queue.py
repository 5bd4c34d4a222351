"""Gather jobs for a batch system, so that they are sent together.

Used by `caxev.handlers.processing`. The queue is in the listener's memory only: everything that
must survive is in the jobs' files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Final

import trio
from attrs import define, field

from caxev.batch.base import JobSpec
from caxev.batch.work import SentJob
from caxev.core.errors import GiveUp, Retry

GATHER: Final = 0.25
"""Seconds for which a job waits for others to be sent with."""
PATIENCE: Final = 600.0
"""Seconds that a job waits here for room. Then it frees its place in the lane for other reactions,
such as checks of lost jobs, which may make room."""
MOST: Final = 500
"""Maximum number of jobs that are sent at once."""

Sent = SentJob | GiveUp | Retry | None
Send = Callable[[Sequence[JobSpec]], Awaitable[list[Sent]]]
_Key = tuple[Hashable, Hashable]
"""The destination of jobs, and their needs."""


@define(eq=False)
class _Seat:
    spec: JobSpec
    sent: Sent = field(factory=lambda: Retry("sending its group was interrupted", after=1.0))
    done: trio.Event = field(factory=trio.Event)


@define(eq=False)
class Queue:
    """The way to the batch systems of one site."""

    _gathering: dict[_Key, list[_Seat]] = field(init=False, factory=dict)
    # A sender counts the jobs that are out and adds its own: two at once would fill the same room
    # twice.
    _sending: defaultdict[Hashable, trio.Lock] = field(
        init=False, factory=lambda: defaultdict(trio.Lock)
    )
    _left: trio.Event = field(init=False, factory=trio.Event)

    def left(self) -> None:
        """Report that a job has ended, so that there is room for another."""
        self._left.set()
        self._left = trio.Event()

    async def place(self, spec: JobSpec, where: Hashable, send: Send) -> SentJob:
        """Send a job, together with others of the same moment, needs and destination.

        Waits for room, up to `PATIENCE`. `send` sends several jobs; only one caller's is called for
        all that are sent together, and an error that it raises is raised to all of them. An error
        that it returns for this job is raised here.
        """
        while True:
            # Taken before we ask for room, so that a job which ends meanwhile wakes us.
            left = self._left
            sent = await self._together((where, spec.needs), _Seat(spec), send)
            if isinstance(sent, SentJob):
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
                # Closed only now: jobs that come while we wait for the lock can still join.
                self._close(key, seats)
                for seat, sent in zip(
                    seats, await send([seat.spec for seat in seats]), strict=True
                ):
                    seat.sent = sent
        except (GiveUp, Retry) as error:
            for seat in seats:
                seat.sent = error
        finally:
            # On cancellation, too: the others must not wait forever; each has its `Retry`.
            self._close(key, seats)
            for seat in seats:
                seat.done.set()

    def _close(self, key: _Key, seats: list[_Seat]) -> None:
        if self._gathering.get(key) is seats:
            del self._gathering[key]
