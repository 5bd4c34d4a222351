"""The border between trio and asyncio: PyMongo's client is called from trio, SSH runs by itself.

trio-asyncio runs an asyncio loop inside trio's. Each callback of asyncio is a turn of trio's
scheduler, so that a call costs more than on a loop of its own: write a whole operation, such as a
batch or a transaction, as one asyncio function and cross into it once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from traceback import clear_frames
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# trio and trio_asyncio are imported only where they are used: worker processes, which have loops of
# asyncio's own, start sooner without. And trio_asyncio replaces functions of asyncio for the whole
# process.


@asynccontextmanager
async def loop() -> AsyncIterator[None]:
    """Run an asyncio loop inside trio's for as long as the block lasts."""
    import trio
    import trio_asyncio
    from trio_asyncio import _base

    # A Ctrl-C that interrupts one of asyncio's callbacks would be raised in it and be lost. In
    # protected code trio holds it back, and raises it in the main task.
    for function in (_base.BaseTrioEventLoop._main_loop, _base.BaseTrioEventLoop._io_task):  # noqa: SLF001
        trio.lowlevel.enable_ki_protection(function)
    failed: BaseException | None = None
    async with trio_asyncio.open_loop():
        try:
            yield
        except trio.Cancelled:
            raise
        except BaseException as error:  # noqa: BLE001  # raised below
            failed = error  # the loop's nurseries would wrap it in an ExceptionGroup
    if failed is not None:
        raise failed


async def call(function: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
    """Await an asyncio function from trio, inside `loop`. Its errors come through unchanged.

    On cancellation the asyncio side is cancelled and waited for; if it completes all the same, its
    result is returned.
    """
    import trio
    import trio_asyncio

    await trio.lowlevel.checkpoint_if_cancelled()
    try:
        result: T = await trio_asyncio.aio_as_trio(function)(*args)
    except BaseException as error:
        free(error)
        raise
    return result


def free(error: BaseException) -> None:
    """Free what the calls that failed with this error have held.

    PyMongo and trio-asyncio keep the last error of a call, and the error's traceback keeps the
    call: a cycle that would hold a whole batch of documents until Python's collector comes by,
    which a listener has it do rarely.
    """
    one: BaseException | None = error
    while one is not None:
        clear_frames(one.__traceback__)
        # Not its context: somebody may still be handling that, and clearing the frame of a
        # coroutine that is suspended would end it.
        one = one.__cause__


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run an asyncio function to its end, in a thread or process without trio.

    As `asyncio.run`, but always on asyncio's own loop: once trio_asyncio is imported the default
    is a loop of its, which runs trio for each thread and fails in PyMongo's and asyncssh's
    protocols.
    """
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        return runner.run(main)
