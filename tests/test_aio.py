"""The border between trio and asyncio."""

from __future__ import annotations

import asyncio
import signal

import pytest
import trio

from caxev import aio


@pytest.mark.parametrize("where", ["task", "callback"])
def test_an_interrupt_in_a_callback_of_asyncio_is_not_lost(where: str) -> None:
    """It ends the block, as anywhere else in trio, and not just what it happened to hit."""

    async def hit() -> None:
        if where == "task":
            signal.raise_signal(signal.SIGINT)
        else:
            asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGINT)
        await asyncio.sleep(60)

    async def main() -> None:
        with trio.fail_after(10):
            async with aio.loop():
                await aio.call(hit)

    with pytest.raises(KeyboardInterrupt):
        trio.run(main)


async def test_an_error_comes_through_as_it_is() -> None:
    """Neither the loop nor the call wraps it in a group."""

    async def fail() -> None:
        raise LookupError("nothing there")

    with pytest.raises(LookupError, match="nothing there"):
        async with aio.loop():
            await aio.call(fail)


async def test_a_call_that_is_cancelled_ends_on_both_sides() -> None:
    ended: list[str] = []

    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async with aio.loop():
        with trio.move_on_after(0.05) as scope:
            await aio.call(wait)
    assert scope.cancelled_caught
    assert ended == ["cancelled"]
