"""The listener: the process that acts for a site, or stands by until it may.

::

    asyncio loop
      signals
      stand by for the lease, again and again
        session: what acts for the site while the lease is ours

SIGTERM lets what is in flight end; a second SIGTERM leaves at once. See `session`.
"""

from __future__ import annotations

from loguru import logger

from caxev import metrics
from caxev.database import Database, LeaseLost, one_of
from caxev.engine import process
from caxev.engine.indexes import make_indexes
from caxev.engine.lease import RENEW, stand_by
from caxev.engine.leaving import Leaving
from caxev.engine.options import Options, Reloader
from caxev.engine.presence import Presence
from caxev.engine.session import LeaderSession
from caxev.engine.trouble import Trouble


async def listen(options: Options) -> None:
    """Listen for a site until asked to leave; with ``once`` until nothing is left to do.

    Raises `DatabaseError` if the database cannot be used at the start; afterwards it waits out any
    trouble.
    """
    options.recipients()  # a mistake is reported now, and not when the lease is ours
    await process.run(options, prepare, serve_leases)


async def prepare(database: Database) -> None:
    """Check the database, bring its ledger to our schema, and make the indexes if we may."""
    await database.check()
    await database.migrate()
    await make_indexes(database)


async def serve_leases(options: Options, database: Database, owner: str, leaving: Leaving) -> None:
    """Act for the site whenever its lease is ours, until asked to leave or, with once, done."""
    reloader = Reloader(options, database)
    presence = Presence(reloader, database, owner)
    async with process.accompanied(reloader, presence, leaving, options.lease_time * RENEW):
        await _serve_leases(reloader, database, owner, leaving)


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
