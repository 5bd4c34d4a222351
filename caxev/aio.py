"""The border between trio and asyncio: the only module that knows that there are two loops.

PyMongo's asyncio client runs on a loop in a thread of its own. A call is handed over to that
thread and back, which costs about 0.2 ms, so a whole operation is written as one asyncio function
and crossed into once. (On a loop inside trio's, each of the dozen callbacks of one command is
a turn of trio's scheduler: the latency of a change was a fifth higher.)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from threading import Thread
from typing import Any, NoReturn, TypeVar

import trio

T = TypeVar("T")

_loop: ContextVar[asyncio.AbstractEventLoop] = ContextVar("_loop")


@asynccontextmanager
async def loop() -> AsyncIterator[None]:
    """Run an asyncio loop, in a thread, for as long as the block lasts."""
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        over = asyncio.Event()
        started.set_result((asyncio.get_running_loop(), over))
        await over.wait()

    thread = Thread(target=lambda: asyncio.run(serve()), name="asyncio", daemon=True)
    thread.start()
    running, over = started.result()
    token = _loop.set(running)
    try:
        yield
    finally:
        _loop.reset(token)
        running.call_soon_threadsafe(over.set)
        thread.join()


async def call(function: Callable[..., Awaitable[T]], *args: Any) -> T:
    """Await an asyncio function from trio. Its errors come through unchanged.

    On cancellation the asyncio side is cancelled and waited for; where it completes all the same,
    its result is returned.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    running = _loop.get()
    waiting = trio.lowlevel.current_task()
    token = trio.lowlevel.current_trio_token()
    ended: list[asyncio.Task[T]] = []
    raise_cancelled: Callable[[], NoReturn] | None = None

    async def run() -> T:
        return await function(*args)

    def start() -> None:
        # Kept by the waiting trio task, as asyncio itself keeps no hold on a task.
        ended.append(running.create_task(run()))
        ended[0].add_done_callback(wake)

    def wake(_: object) -> None:
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(trio.lowlevel.reschedule, waiting)

    def cancel() -> None:
        ended[0].cancel()

    def abort(raise_cancel: Callable[[], NoReturn]) -> trio.lowlevel.Abort:
        nonlocal raise_cancelled
        raise_cancelled = raise_cancel
        # Handed over after `start`, so the task is there by then.
        running.call_soon_threadsafe(cancel)
        return trio.lowlevel.Abort.FAILED

    running.call_soon_threadsafe(start)
    await trio.lowlevel.wait_task_rescheduled(abort)
    if ended[0].cancelled() and raise_cancelled is not None:
        raise_cancelled()
    return ended[0].result()
