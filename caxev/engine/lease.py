"""The lease: stand by until it is ours, and renew it while it is.

One process acts for a site. It holds the lease for 0.8 of `Options.lease_time` without renewal and
renews it every fifth of that time; a stand-by asks for it every tenth.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import trio
from loguru import logger

from caxev import metrics
from caxev.core.clock import clock, utcnow
from caxev.database import Database, DatabaseError, Lease, SiteRecord, is_fatal, of_the_site
from caxev.engine.context import Context
from caxev.engine.leaving import Leaving
from caxev.engine.options import Options, Reloader
from caxev.engine.systemd import notify
from caxev.engine.trouble import Trouble

HELD: Final = 0.8
"""Part of the lease time for which a lease is held without renewal."""
RENEW: Final = 0.2
"""Part of the lease time after which it is renewed."""
STAND_BY: Final = 0.1
"""Part of the lease time after which a stand-by asks for it again."""
LONGEST_WAIT: Final = 30.0


async def stand_by(
    reloader: Reloader, database: Database, owner: str, leaving: Leaving, trouble: Trouble
) -> Lease | None:
    """Wait until the site's lease is ours and return it; None if asked to leave first."""
    reported = False
    while not leaving.asked.is_set():
        options = reloader.options
        try:
            lease = await _acquire(options, database, owner)
            trouble.over("lease")
            if lease is not None:
                return lease
        except DatabaseError as error:
            if is_fatal(error):
                raise
            trouble.meet("lease", of_the_site(error))
        if not reported and not trouble:
            logger.info("another process listens for {}: standing by", options.site.name)
            notify("READY=1\nSTATUS=standing by")
            reported = True
        # Often enough to take over within the lease time, seldom enough to cost nothing.
        with trio.move_on_after(options.lease_time * STAND_BY):
            await leaving.asked.wait()
    return None


async def _acquire(options: Options, database: Database, owner: str) -> Lease | None:
    site, held = options.site.name, options.lease_time * HELD
    taken = await database.acquire(site, owner, held, utcnow(), options.sites.digest)
    if taken is None:
        return None
    lease, claims = taken
    logger.info("listening for {} (epoch {})", site, lease.epoch)
    if claims:
        logger.info("{} reactions were interrupted and are due again", claims)
    return lease


async def keep_lease(context: Context, hearers: Sequence[Callable[[SiteRecord], None]]) -> None:
    """Renew a site's lease forever; `hearers` get the site's record. Raises `LeaseLost`."""

    async def renew() -> None:
        site, options = context.lease.site, context.options
        metrics.skew.labels(site).set(clock.skew)
        metrics.tasks.labels(site).set(trio.lowlevel.current_statistics().tasks_living)
        record = await context.database.renew(
            context.lease, options.lease_time * HELD, context.trouble.text, options.sites.digest
        )
        for hear in hearers:
            hear(record)

    await renewing(context.trouble, renew, context.options.lease_time * RENEW)


async def renewing(trouble: Trouble, renew: Callable[[], Awaitable[None]], every: float) -> None:
    """Renew a lease every so many seconds, until cancelled. Raises `LeaseLost`."""
    while True:
        try:
            await renew()
            trouble.over("lease")
        except DatabaseError as error:
            if is_fatal(error):
                raise
            # Nothing else. A stand-by that still reaches the database may take the site over: then
            # the renewal raises `LeaseLost` when the database is back. A helper has its fence.
            trouble.meet("lease", of_the_site(error))
            # Sooner than usual, because the lease is running out.
            await trio.sleep(min(every, LONGEST_WAIT) / 4)
        else:
            await trio.sleep(every)
