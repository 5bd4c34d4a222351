"""The end of a session: return claimed reactions, and abandon attempts that ignore cancellation."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

import trio
from loguru import logger

from caxev.database import DatabaseError, LeaseLost
from caxev.engine.fence import Fence
from caxev.engine.leaving import leave_at_once
from caxev.engine.runner import Runner

STOPPING: Final = 5.0
"""Seconds that attempts get to end when they are cancelled, before the process leaves them."""


@asynccontextmanager
async def letting_go(let_go: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Call `let_go` at the end of the block, unless that was `LeaseLost`: nothing is ours then."""
    ours = True
    try:
        yield
    except* LeaseLost:
        ours = False
        raise
    finally:
        if ours:
            await let_go()


async def leave_by_force(
    runner: Runner, let_go: Callable[[], Awaitable[None]], fence: Fence | None = None
) -> None:
    """End the process if attempts ignore their cancellation.

    A handler that swallows cancellation would keep the nursery waiting forever, and with it a site
    that has been asked to stop, or has lost its lease. `let_go` settles what has ended. The process
    ends before the `fence` lets other processes run the same reactions.
    """
    fence = fence or Fence()
    try:
        await trio.sleep_forever()
    finally:
        with trio.CancelScope(shield=True):
            with trio.move_on_after(min(STOPPING, fence.last)):
                await runner.attempts_over()
            # trio cannot end a task that ignores cancellation.
            if left := runner.attempting:
                logger.error("stopping although {} still runs after its cancellation", left)
                # We leave in any case: reactions that are not settled now the next process
                # interrupts.
                with suppress(DatabaseError), trio.move_on_after(fence.last):
                    await let_go()
                leave_at_once(1)
