"""Leave by force: end the process if attempts go on although they were cancelled."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import trio
from loguru import logger

from caxev.database import DatabaseError
from caxev.engine.leaving import leave_at_once
from caxev.engine.runner import Runner

STOPPING: Final = 5.0
"""Seconds that attempts get to end when they are cancelled, before the process leaves them."""


async def leave_by_force(runner: Runner, let_go: Callable[[], Awaitable[None]]) -> None:
    """When all is cancelled, end the process if attempts go on all the same.

    A handler that swallows cancellation would keep the nursery waiting for ever, and with it a site
    that has been asked to stop, or has lost its lease. `let_go` settles what has ended.
    """
    try:
        await trio.sleep_forever()
    finally:
        with trio.CancelScope(shield=True):
            with trio.move_on_after(STOPPING):
                await runner.attempts_over()
            # trio cannot end a task that ignores cancellation.
            if left := runner.attempting:
                logger.error("stopping although {} still runs after its cancellation", left)
                with suppress(DatabaseError):
                    await let_go()
                leave_at_once(1)
