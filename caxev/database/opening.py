"""Opening the database for a block, and running an async function that does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import trio

from caxev.config import Settings
from caxev.database.client import DatabaseError
from caxev.database.database import Database

CLOSING: Final = 10.0
"""Seconds that closing the connections may take."""


@asynccontextmanager
async def open_database(settings: Settings) -> AsyncIterator[Database]:
    """Open the database for a block, inside the asyncio loop; close it however the block ends.

    Raises `ConfigError` for an address that cannot be used. It does not wait for the server.
    """
    database = Database(settings)
    try:
        yield database
    finally:
        with trio.move_on_after(CLOSING, shield=True):
            await database.close()


def run(function: Callable[..., Any], *args: object) -> Any:
    """Run an async function to its end; raise a single error as itself, not in a group."""
    try:
        return trio.run(function, *args, strict_exception_groups=True)
    except BaseExceptionGroup as group:
        error = one_of(group)
        if isinstance(error, DatabaseError | OSError | KeyboardInterrupt):
            raise error from None
        raise


def one_of(group: BaseExceptionGroup[Any]) -> BaseException:
    """Return the first single error of a group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
