"""Leaving: the signals that end a listener, and how it ends at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable
from typing import NoReturn

import trio
from attrs import define, field
from loguru import logger


@define(eq=False)
class Leaving:
    """Whether the process was asked to leave. `hangup` is called on SIGHUP."""

    asked: trio.Event = field(factory=trio.Event)
    hangup: Callable[[], Awaitable[None]] = field(default=trio.lowlevel.checkpoint)

    async def listen(self) -> None:
        """Handle signals, until cancelled: SIGTERM and SIGINT ask the process to leave."""
        received = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        async with trio.open_nursery() as nursery:
            with trio.open_signal_receiver(*received) as signals:
                async for number in signals:
                    if number == signal.SIGHUP:
                        # A reload may wait for the database; a signal to leave must not wait.
                        nursery.start_soon(self.hangup)
                    else:
                        self._leave(number)

    def _leave(self, number: int) -> None:
        name = signal.Signals(number).name
        if self.asked.is_set():
            logger.warning("{} again: stopping at once", name)
            # Reactions in flight are claimed in the ledger: the next process opens them.
            leave_at_once(128 + number)
        logger.info("{}: finishing running reactions; send it again to stop at once", name)
        self.asked.set()

    async def cancel(self, scope: trio.CancelScope) -> None:
        """Cancel a scope as soon as the process is asked to leave."""
        await self.asked.wait()
        scope.cancel()


def leave_at_once(status: int) -> NoReturn:
    """End the process without waiting for anything but its log."""
    # It flushes the log. Nothing else may be waited for: a handler or a disk may hang.
    logger.remove()
    os._exit(status)
