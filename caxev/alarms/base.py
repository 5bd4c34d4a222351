"""What tells a person, or a service that does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

import trio

from caxev.core.alarms import Alarm

PATIENCE: Final = 30.0
"""Seconds that a server may take for each answer."""
DEADLINE: Final = 90.0
"""Seconds that a message may take in all."""


class Undelivered(Exception):
    """They could not be told; try again later. The message says why, and holds no secret."""


class Notifier(Protocol):
    """A way to tell somebody of an alarm.

    `resolves` says whether word that an alarm is over is of use there.
    """

    @property
    def resolves(self) -> bool: ...

    async def send(self, alarm: Alarm, *, over: bool) -> None:
        """Tell of one alarm, or that it is over; returns when they have it.

        Raises `Undelivered`. May be called again for the same alarm, where it is not known whether
        they had it. On cancellation they may or may not have been told.
        """
        ...


async def in_thread(send: Callable[[], None], limiter: trio.CapacityLimiter) -> None:
    """Run what blocks in a thread, one at a time; raises what it raises, `Undelivered` if late.

    A thread that is late is left to itself: its sockets have time-outs.
    """
    with trio.move_on_after(DEADLINE) as scope:
        await trio.to_thread.run_sync(send, abandon_on_cancel=True, limiter=limiter)
    if scope.cancelled_caught:
        raise Undelivered(f"not done after {DEADLINE:.0f} s")


def sentence(alarm: Alarm, *, over: bool) -> str:
    """One line that says it all: ``[lngs] over: a disk is full``."""
    return f"[{alarm.site}] {'over' if over else alarm.severity.value}: {alarm.summary}"


def lines(alarm: Alarm) -> list[str]:
    """Return the details as text; those of several lines stand below their name."""
    found = [f"run: {alarm.run}"] if alarm.run and alarm.run not in alarm.summary else []
    for name, value in alarm.details.items():
        first, *more = value.splitlines()
        found += [f"{name}:", *(f"  {line}" for line in value.splitlines())] if more else []
        found += [] if more else [f"{name}: {first}"]
    return found
