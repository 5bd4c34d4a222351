"""The border between trio and asyncio: the only module that knows trio_asyncio.

PyMongo's asyncio client runs on one trio_asyncio loop at the root of the process. Each crossing
costs about 0.1 ms, so a whole operation is written as one asyncio function and crossed into once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import trio_asyncio

T = TypeVar("T")


@asynccontextmanager
async def loop() -> AsyncIterator[None]:
    """Run an asyncio loop for as long as the block lasts."""
    async with trio_asyncio.open_loop():
        yield


async def call(function: Callable[..., Awaitable[T]], *args: Any) -> T:
    """Await an asyncio function from trio. Its errors come through unchanged.

    On cancellation the asyncio side is cancelled and waited for.
    """
    result: T = await trio_asyncio.aio_as_trio(function)(*args)
    return result
