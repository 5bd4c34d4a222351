"""Malformed documents of caxev's own: report them, and set them aside in the ledger.

The database package skips what it cannot read and remembers it. `session` runs a `Quarantine`
beside the engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import trio
from attrs import define, field
from loguru import logger

from caxev.alarms.manager import AlarmManager
from caxev.core.alarms import MALFORMED, malformed
from caxev.core.clock import utcnow
from caxev.database import DatabaseError, Odd, concerns_one, unless_fatal
from caxev.engine.context import Context

AUDIT_EVERY: Final = 86400.0
"""Seconds between two audits of all of the site's documents."""
TEND_EVERY: Final = 2.0
"""Seconds between two looks, in memory, at what was found malformed."""


@define(eq=False)
class Quarantine:
    """Sets malformed documents of a site aside. `look_again` is called when that opened some."""

    context: Context
    alarms: AlarmManager
    look_again: Callable[[], None]
    _reported: set[tuple[str, str]] = field(init=False, factory=set)

    async def run(self) -> None:
        """Report malformed documents of this site, and set them aside, until cancelled."""
        audited, site = -AUDIT_EVERY, self.context.lease.site
        while True:
            with unless_fatal("malformed documents cannot be set aside"):
                if trio.current_time() >= audited + AUDIT_EVERY:
                    await self.context.database.audit(site)
                    await self._forget_aside()
                    audited = trio.current_time()
                for odd in self.context.database.odd:
                    # None: nothing shows which site's document it is, so each site reports it.
                    if odd.site in (None, site) and odd.key not in self._reported:
                        await self._set_aside(odd)
                        self.look_again()
            await trio.sleep(TEND_EVERY)

    async def _forget_aside(self) -> None:
        """End the alarms of malformed documents that are not kept any more."""
        site = self.context.lease.site
        kept = await self.context.database.forget_aside(site, utcnow()) | self._reported
        keys = {MALFORMED + " ".join(key) for key in kept}
        for one in self.alarms.active:
            if one.alarm.key.startswith(MALFORMED) and one.alarm.key not in keys:
                self.alarms.clear(one.alarm.key)

    async def _set_aside(self, odd: Odd) -> None:
        database, lease = self.context.database, self.context.lease
        runs = {} if odd.run is None else await database.runs([odd.run])
        label = str(runs[odd.run]) if odd.run in runs else ""
        try:
            await database.set_aside(lease, odd, utcnow())
        except DatabaseError as error:
            if not concerns_one(error):
                raise
            logger.error("{} {} cannot be set aside: {}", *odd.key, error)
            self._reported.add(odd.key)
        self.alarms.raise_(malformed(lease.site, " ".join(odd.key), odd.why, label))
