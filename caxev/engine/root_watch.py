"""Which disks are there: how a listener looks after its site's directories and their markers.

`listener` runs a `RootWatch` beside its other tasks; `dispatcher` gets from it the sites with the
markers that are noted, and reports what found a disk away; `HealthMonitor` raises the alarms.
No disk is touched in this process: one that hangs would keep it from ever ending.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

import trio
from attrs import define, evolve, field
from loguru import logger

from caxev.config import Site, Sites
from caxev.core.clock import utcnow
from caxev.core.errors import Retry, RootAway
from caxev.core.paths import UNKNOWN, Root
from caxev.database import Database, DatabaseError, Lease, SiteRecord, is_fatal
from caxev.engine.root_markers import Holding, adopt, holdings, with_markers
from caxev.engine.workers import Workers
from caxev.files.roots import (
    Probe,
    probe,
)

EVERY: Final = 15.0
"""Seconds between two looks at a disk that is there..."""
AWAY_EVERY: Final = 2.0
"""...and at one that is not."""
LEAST: Final = 1.0
"""Seconds between two looks however often one is asked for."""
ANSWERS: Final = 10.0
"""Seconds that a disk may take to answer."""
REFRESH: Final = 60.0
"""Seconds for which the markers of other sites are taken to be as they were read."""


@define(eq=False)
class RootWatch:
    """Looks at the directories of a listener's site, and opens what waited for one that is back."""

    database: Database
    lease: Lease
    site: Site
    sites: Sites
    workers: Workers
    woken: Callable[[], None] = lambda: None
    looked: trio.Event = field(init=False, factory=trio.Event)
    _records: dict[str, SiteRecord] = field(init=False, factory=dict)
    _known: Sites = field(init=False)
    _read: float = field(init=False, default=float("-inf"))
    _seen: dict[str, Probe] = field(init=False, factory=dict)
    _doubted: set[str] = field(init=False)
    _nudge: dict[str, trio.Event] = field(init=False, factory=dict)
    _noted: dict[str, str] | None = field(init=False, default=None)
    _holdings: list[Holding] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._holdings = holdings(self.site, self.sites)
        self._doubted = {held.root for held in self._holdings}
        self._nudge = {held.root: trio.Event() for held in self._holdings}
        self._take_in(())

    # -- what others ask -------------------------------------------------------------------------

    async def known(self) -> Sites:
        """The sites with the markers of their directories, as they were noted a minute ago."""
        now = trio.current_time()
        if now >= self._read + REFRESH:
            self._read = now  # before: others need not ask as well
            try:
                self._take_in(await self.database.site_records())
            except DatabaseError as error:
                logger.debug("markers are not read: {}", error)
        return self._known

    def use(self, site: Site, sites: Sites) -> None:
        """Go by what was read again; the directories that are looked after stay the same."""
        self.site, self.sites = site, sites
        self._take_in(list(self._records.values()))

    async def have_changed(self, sites: Sites) -> bool:
        """Whether other markers are noted now than these sites have: what was found may be void."""
        self._read = float("-inf")
        known = await self.known()
        return any(site.markers != known.get(site.name).markers for site in sites.values())

    def heard(self, record: SiteRecord) -> None:
        """Take in the site's own record, which comes with each renewal of the lease."""
        known = self._records.get(record.site)
        if known is None or known.markers != record.markers:
            self._take_in([*self._records.values(), record])
            for nudge in self._nudge.values():
                nudge.set()

    def looks_after(self, root: str) -> bool:
        """Whether what waits for that directory is opened when it is back."""
        return root in self._nudge

    def doubt(self, root: str) -> None:
        """Look at a directory soon: a reaction found it away, and waits for it in the ledger."""
        self._doubted.add(root)
        if root in self._nudge and self._is_there(root):
            self._nudge[root].set()

    @property
    def free(self) -> dict[str, int]:
        """The free bytes of each file system, by the first directory on it."""
        there = ((root, seen) for root, seen in self._seen.items() if seen.away is None)
        found: dict[int, tuple[str, int]] = {}
        for root, seen in there:
            found.setdefault(seen.device, (root, seen.free))
        return dict(found.values())

    @property
    def away(self) -> dict[str, str | None]:
        """Each directory, and why it is away if it is."""
        return {root: seen.away for root, seen in self._seen.items()}

    def _is_there(self, root: str) -> bool:
        return root in self._seen and self._seen[root].away is None

    def _take_in(self, records: Iterable[SiteRecord]) -> None:
        self._records |= {record.site: record for record in records}
        sites = with_markers(self.sites, self.site, self._records)
        by_name = dict(sites.by_name)
        for held in self._holdings:
            owner = by_name[held.owner.name]
            markers = {held.root: UNKNOWN, **owner.markers}
            by_name[held.owner.name] = evolve(owner, markers=markers)
        self._known = evolve(sites, by_name=by_name)

    # -- what it does ----------------------------------------------------------------------------

    async def run(self) -> None:
        """Look at each directory, for ever. Raises `LeaseLost`."""
        await self.known()
        if not self._holdings:
            self.looked.set()
        async with trio.open_nursery() as nursery:
            for held in self._holdings:
                nursery.start_soon(self._follow, held)

    async def _follow(self, held: Holding) -> None:
        while True:
            self._nudge[held.root] = trio.Event()
            seen = await self._look(held)
            if seen is not None:
                await self._note(held.root, seen)
            await trio.sleep(LEAST)
            with trio.move_on_after(self._pause(held.root)):
                await self._nudge[held.root].wait()

    def _pause(self, root: str) -> float:
        if self._is_there(root):
            return EVERY
        # One without a marker asks the database each time.
        return AWAY_EVERY if root in self._markers else REFRESH

    @property
    def _markers(self) -> Mapping[str, str]:
        own = self._records.get(self.site.name)
        return {} if own is None else own.markers

    async def _look(self, held: Holding) -> Probe | None:
        """What a look shows; None where nobody can say. Waits for a disk that hangs."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._lose_patience, held.root)
            try:
                return await self._probed(held)
            except RootAway as away:
                return Probe(away=away.why)
            except Retry as error:  # the worker died
                logger.debug("{} is not looked at: {}", held.root, error)
                return None
            except DatabaseError as error:
                if is_fatal(error):
                    raise
                return None
            finally:
                nursery.cancel_scope.cancel()

    async def _lose_patience(self, root: str) -> None:
        await trio.sleep(ANSWERS)
        await self._note(root, Probe(away=f"{root} does not answer: nothing for {ANSWERS:.0f} s"))

    async def _probed(self, held: Holding) -> Probe | None:
        if held.root not in self._markers:
            record = await self.database.site_record(self.site.name)
            if record is None:
                return None
            self.heard(record)
        if held.root not in self._markers:
            await adopt(self.database, self.workers.run, held, self.sites, self.site.name)
            return await self._probed(held)
        return await self.workers.run(probe, Root(held.root, self._markers[held.root]))

    def _see(self, root: str, seen: Probe) -> None:
        was = self._seen.get(root)
        self._seen[root] = seen
        if seen.away is not None and (was is None or was.away is None):
            logger.error("{}; all that needs it waits", seen.away)
        elif seen.away is None and was is not None and was.away is not None:
            logger.info("{} is there again", root)

    async def _note(self, root: str, seen: Probe) -> None:
        """Keep what was seen; of one that is there, open what waits for it."""
        if seen.away is not None or not self._is_there(root):
            self._doubted.add(root)
        self._see(root, seen)
        if self._seen.keys() >= self._nudge.keys():
            self.looked.set()
        try:
            await self._write(root, seen)
        except DatabaseError as error:
            if is_fatal(error):
                raise
            logger.debug("how {} is cannot be noted yet: {}", root, error)

    async def _write(self, root: str, seen: Probe) -> None:
        away = {one: why for one, why in self.away.items() if why is not None}
        if away != self._noted:
            await self.database.note_away(self.lease, away)
            self._noted = away
        if seen.away is None and root in self._doubted:
            self._doubted.discard(root)
            try:
                woken = await self.database.wake(self.lease, root, utcnow())
            except DatabaseError:
                self._doubted.add(root)
                raise
            if woken:
                self.woken()
