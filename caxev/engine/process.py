"""The base of a site's processes: a listener and its helpers are run by `run`.

::

    asyncio loop, the database
      signals
      `serve`: reload, systemd's watchdog and presence, beside what the process is for
"""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeAlias
from uuid import uuid4

import trio

from caxev import aio
from caxev.database import Database, open_database
from caxev.engine.leaving import Leaving
from caxev.engine.metrics_push import MetricsPush
from caxev.engine.options import Options, Reloader
from caxev.engine.presence import Presence
from caxev.engine.systemd import keep_watchdog
from caxev.metrics_server import MetricsServer

Serve: TypeAlias = Callable[[Options, Database, str, Leaving], Awaitable[None]]
"""Serves with these options until asked to leave. The text is the process's name, used once."""


async def run(
    options: Options, prepare: Callable[[Database], Awaitable[None]], serve: Serve
) -> None:
    """Serve until asked to leave. Raises `DatabaseError` if the database cannot be used first."""
    if options.metrics is not None:
        MetricsServer(options.metrics).begin()
    if options.metrics_push is not None:
        MetricsPush(options.metrics_push).begin()
    tune_collector()
    owner = f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"
    leaving = Leaving()
    async with aio.loop(), open_database(options.settings) as database:
        await prepare(database)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leaving.listen)
            await serve(options, database, owner, leaving)
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def accompanied(
    reloader: Reloader, presence: Presence, leaving: Leaving, every: float
) -> AsyncIterator[None]:
    """Reload at SIGHUP, report to the others, and every few seconds to systemd, in the block."""
    async with trio.open_nursery() as nursery:
        leaving.hangup = reloader.reload
        nursery.start_soon(keep_watchdog, every)
        nursery.start_soon(presence.run)
        yield
        nursery.cancel_scope.cancel()


def tune_collector() -> None:
    """Have Python look for reference cycles less often.

    A batch makes ten thousands of objects that live until it is written and are in no cycle; at
    the usual threshold a third of the intake's time went into looking at them.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
