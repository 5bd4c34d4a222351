"""The fence: until when what a process has claimed is its own."""

from __future__ import annotations

import time
from threading import Thread

import pytest
import trio

from caxev.engine.fence import Fence


async def test_a_block_that_nobody_defers_ends_at_the_fence() -> None:
    """Also one that comes back late: it takes no further step."""
    fence, steps = Fence(0.1), 0
    with fence.cancelling() as held:
        fence.renewed(time.monotonic())
        for _ in range(3):
            steps += 1
            time.sleep(0.3)  # noqa: ASYNC251  # as a process that is stopped
            await trio.lowlevel.checkpoint()
    assert held.cancelled_caught
    assert steps == 1
    assert fence.left < 0


@pytest.mark.parametrize("blocked", [0.3, 0.6])
async def test_a_thread_may_defer_the_fence_while_the_loop_is_blocked(blocked: float) -> None:
    """Then the block goes on afterwards."""
    fence = Fence(0.2, 0.1)

    def keep() -> None:
        end = time.monotonic() + blocked
        while time.monotonic() < end:
            fence.renewed(time.monotonic() + 60)
            time.sleep(0.01)

    with fence.cancelling() as held:
        fence.renewed(time.monotonic())
        await trio.lowlevel.checkpoint()
        thread = Thread(target=keep)
        thread.start()
        thread.join()
        await trio.sleep(0.01)
    assert not held.cancelled_caught


def test_a_listener_has_no_fence() -> None:
    """It goes on until the database says that another has taken over."""
    fence = Fence()
    fence.renewed(time.monotonic())
    assert fence.left == fence.last == float("inf")
