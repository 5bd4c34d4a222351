"""The listener: the process that acts for a site, or stands by until it may.

::

    asyncio loop
      signals
      stand by for the lease, again and again
        session: what acts for the site while the lease is ours

SIGTERM lets what is in flight end; a second SIGTERM leaves at once. See `session`.
"""

from __future__ import annotations

import gc
import os
import socket
from uuid import uuid4

import trio
from loguru import logger

from caxev import aio, metrics
from caxev.database import Database, LeaseLost, one_of, open_database
from caxev.engine.indexes import make_indexes
from caxev.engine.lease import RENEW, stand_by
from caxev.engine.leaving import Leaving
from caxev.engine.metrics_push import MetricsPush
from caxev.engine.options import Options, Reloader
from caxev.engine.presence import Presence
from caxev.engine.session import LeaderSession
from caxev.engine.systemd import keep_watchdog
from caxev.engine.trouble import Trouble
from caxev.metrics_server import MetricsServer


async def listen(options: Options) -> None:
    """Listen for a site until asked to leave; with ``once`` until nothing is left to do.

    Raises `DatabaseError` if the database cannot be used at the start; afterwards it waits out any
    trouble.
    """
    options.recipients()  # a mistake is reported now, and not when the lease is ours
    owner = f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"
    if options.metrics is not None:
        MetricsServer(options.metrics).begin()
    if options.metrics_push is not None:
        MetricsPush(options.metrics_push).begin()
    tune_collector()
    leaving = Leaving()
    async with aio.loop(), open_database(options.settings) as database:
        await prepare(database)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leaving.listen)
            await serve_leases(options, database, owner, leaving)
            nursery.cancel_scope.cancel()


def tune_collector() -> None:
    """Have Python look for reference cycles less often.

    A batch makes ten thousands of objects that live until it is written and are in no cycle; at
    the usual threshold a third of the intake's time went into looking at them.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


async def prepare(database: Database) -> None:
    """Check the database, bring its ledger to our schema, and make the indexes if we may."""
    await database.check()
    await database.migrate()
    await make_indexes(database)


async def serve_leases(options: Options, database: Database, owner: str, leaving: Leaving) -> None:
    """Act for the site whenever its lease is ours, until asked to leave or, with once, done."""
    async with trio.open_nursery() as nursery:
        reloader = Reloader(options, database)
        leaving.hangup = reloader.reload
        nursery.start_soon(keep_watchdog, options.lease_time * RENEW)
        nursery.start_soon(Presence(reloader, database, owner).run)
        await _serve_leases(reloader, database, owner, leaving)
        nursery.cancel_scope.cancel()


async def _serve_leases(
    reloader: Reloader, database: Database, owner: str, leaving: Leaving
) -> None:
    site = reloader.options.site.name
    leading = metrics.leading.labels(site)
    while not leaving.asked.is_set():
        # Anew: tasks that end with a lease cannot report that their trouble is over.
        trouble = Trouble(site)
        lease = await stand_by(reloader, database, owner, leaving, trouble)
        if lease is None:
            return
        leading.set(1)
        try:
            await LeaderSession(reloader, database, lease, leaving, trouble).serve()
        except* LeaseLost as group:
            logger.warning("{}; standing by", one_of(group))
            await make_indexes(database)  # perhaps the ledger was dropped
        else:
            return
        finally:
            leading.set(0)
