"""The interface of an alarm sink, and the base of ours."""

from __future__ import annotations

from typing import Final, Protocol

import trio
from attrs import define, field

from caxev.core.alarms import Alarm

PATIENCE: Final = 30.0
"""Seconds that a server may take for each answer."""
DEADLINE: Final = 90.0
"""Seconds that a delivery may take in all."""


class DeliveryFailed(Exception):
    """A sink did not accept an alarm; try again later. The message has no secret."""


class Notifier(Protocol):
    """A way to notify somebody of an alarm. `resolves`: it can use the end of an alarm, too."""

    @property
    def resolves(self) -> bool: ...

    async def send(self, alarm: Alarm, *, over: bool) -> None:
        """Deliver an alarm, or its end; returns when the other side has accepted it.

        Raises `DeliveryFailed`. May be called again for the same alarm if it is unknown whether it
        arrived. After cancellation it may have arrived or not.
        """
        ...


@define(eq=False)
class Threaded:
    """A notifier that delivers in a thread, one alarm at a time, by `deliver`, which may block."""

    resolves: bool = field(default=True, init=False)
    # One at a time: an abandoned thread may still be at work, and must not be joined by others.
    _limiter: trio.CapacityLimiter = field(init=False, factory=lambda: trio.CapacityLimiter(1))

    async def send(self, alarm: Alarm, *, over: bool) -> None:
        """See `Notifier`. A thread that is late is abandoned: its sockets have time-outs."""
        with trio.move_on_after(DEADLINE) as scope:
            await trio.to_thread.run_sync(
                self.deliver, alarm, over, abandon_on_cancel=True, limiter=self._limiter
            )
        if scope.cancelled_caught:
            raise DeliveryFailed(f"timed out after {DEADLINE:.0f} s")

    def deliver(self, alarm: Alarm, over: bool) -> None:
        """Deliver an alarm, or its end. Raises `DeliveryFailed`."""
        raise NotImplementedError


def sentence(alarm: Alarm, *, over: bool) -> str:
    """Return the alarm as one line: ``[lngs] over: a disk is full``."""
    return f"[{alarm.site}] {'over' if over else alarm.severity.value}: {alarm.summary}"


def lines(alarm: Alarm) -> list[str]:
    """Return the details as text; a detail of several lines is indented below its name."""
    found = [f"run: {alarm.run}"] if alarm.run and alarm.run not in alarm.summary else []
    for name, value in alarm.details.items():
        first, *more = value.splitlines()
        found += [f"{name}:", *(f"  {line}" for line in (first, *more))] if more else []
        found += [] if more else [f"{name}: {first}"]
    return found
