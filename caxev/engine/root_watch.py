"""Watch the disks of a site's directories, by their markers.

`session` runs a `RootWatch`. `runner` gets from it the sites with their noted markers, `settling`
reports the directories that reactions found away, and `HealthMonitor` raises the alarms. No disk is
touched in this process: one that hangs would keep it from ever ending.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

import trio
from attrs import define, field
from loguru import logger

from caxev.config import Sites
from caxev.core.clock import utcnow
from caxev.core.errors import Retry, RootAway
from caxev.core.paths import Root
from caxev.database import DatabaseError, Disk, SiteRecord, unless_fatal
from caxev.engine.context import Context
from caxev.engine.root_markers import Holding, RootMarking, holdings, with_markers
from caxev.engine.workers import Workers
from caxev.files.roots import Probe, probe

EVERY: Final = 15.0
"""Seconds between two probes of a disk that is there..."""
AWAY_EVERY: Final = 2.0
"""...and of one that is not."""
LEAST: Final = 1.0
"""Seconds at least between two probes, however often one is asked for."""
ANSWERS: Final = 10.0
"""Seconds that a disk may take to answer."""
REFRESH: Final = 60.0
"""Seconds between two readings of other sites' noted markers, and between two records of the disks'
free space."""


@define(eq=False)
class RootWatch:
    """Probes the directories of a site, and opens the reactions that waited for one that is back.

    `looked` is set when each directory was probed once; `probed` is set, and replaced, after each
    probe; `woken` is called if reactions were opened.
    """

    context: Context
    workers: Workers
    woken: Callable[[], None] = lambda: None
    looked: trio.Event = field(init=False, factory=trio.Event)
    probed: trio.Event = field(init=False, factory=trio.Event)
    _records: dict[str, SiteRecord] = field(init=False, factory=dict)
    _known: Sites = field(init=False)
    _read: float = field(init=False, default=float("-inf"))
    _seen: dict[str, Probe] = field(init=False, factory=dict)
    _doubted: set[str] = field(init=False)
    _nudge: dict[str, trio.Event] = field(init=False, factory=dict)
    _noted: dict[str, str] | None = field(init=False, default=None)
    # Each directory has a task: of two writes at once the older one could come last.
    _writing: trio.Lock = field(init=False, factory=trio.Lock)
    _disks_noted: float = field(init=False, default=float("-inf"))
    _holdings: list[Holding] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._holdings = holdings(self.context.site, self.context.sites)
        self._doubted = {held.root for held in self._holdings}
        self._nudge = {held.root: trio.Event() for held in self._holdings}
        self._take_in(())

    # -- what others ask ----------------------------------------------------------------------

    async def known(self) -> Sites:
        """Return the sites with the noted markers of their directories, a minute old at most."""
        now = trio.current_time()
        if now >= self._read + REFRESH:
            self._read = now  # set first, so that other tasks do not ask as well
            try:
                self._take_in(await self.context.database.site_records())
            except DatabaseError as error:
                logger.debug("markers cannot be read yet: {}", error)
        return self._known

    def use_options(self) -> None:
        """Go by the new options; the directories that are watched stay the same."""
        self._take_in(list(self._records.values()))

    async def have_changed(self, sites: Sites) -> bool:
        """Return whether other markers are noted now than these sites have."""
        self._read = float("-inf")
        known = await self.known()
        return any(site.markers != known.get(site.name).markers for site in sites.values())

    def heard(self, record: SiteRecord) -> None:
        """Take in the site's own record, which each renewal of the lease returns."""
        known = self._records.get(record.site)
        if known is None or known.markers != record.markers:
            self._take_in([*self._records.values(), record])
            for nudge in self._nudge.values():
                nudge.set()

    def looks_after(self, root: str) -> bool:
        """Return whether reactions that wait for that directory are opened when it is back."""
        return root in self._nudge

    def doubt(self, root: str) -> None:
        """Probe a directory soon: a reaction found it away, and waits for it in the ledger."""
        self._doubted.add(root)
        # One that is known to be away is probed every `AWAY_EVERY` seconds in any case.
        if root in self._nudge and self._is_there(root):
            self._nudge[root].set()

    @property
    def seen(self) -> Mapping[str, Probe]:
        """The last probe of each directory."""
        return self._seen

    @property
    def disks(self) -> list[Disk]:
        """Each file system that is there, by the first directory on it."""
        # Several directories can be on one file system, whose free bytes count once.
        found: dict[int, Disk] = {}
        # In the order of sites.json, whichever was probed first: it is the name of an alarm.
        for root in filter(self._is_there, self._nudge):
            seen = self._seen[root]
            found.setdefault(seen.device, Disk(root, seen.free, seen.size))
        return list(found.values())

    @property
    def free(self) -> dict[str, int]:
        """The free bytes of each file system, by the first directory on it."""
        return {disk.root: disk.free for disk in self.disks}

    @property
    def away(self) -> dict[str, str | None]:
        """Each directory, and why it is away; None if it is there."""
        return {root: seen.away for root, seen in self._seen.items()}

    @property
    def _all_seen(self) -> bool:
        return self._seen.keys() >= self._nudge.keys()

    def _is_there(self, root: str) -> bool:
        return root in self._seen and self._seen[root].away is None

    def _take_in(self, records: Iterable[SiteRecord]) -> None:
        self._records |= {record.site: record for record in records}
        self._known = with_markers(self.context.sites, self.context.site, self._records)

    # -- probing ------------------------------------------------------------------------------

    async def run(self) -> None:
        """Probe each directory, until cancelled. Raises `LeaseLost`."""
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
        # Without a noted marker each probe asks the database, so it is made less often.
        return AWAY_EVERY if root in self._markers else REFRESH

    @property
    def _markers(self) -> Mapping[str, str]:
        own = self._records.get(self.context.site.name)
        return {} if own is None else own.markers

    async def _look(self, held: Holding) -> Probe | None:
        """Probe a directory; None if that is not possible now. Waits for a disk that hangs."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._lose_patience, held.root)
            try:
                with unless_fatal(f"{held.root} cannot be probed"):
                    return await self._probed(held)
            except RootAway as away:
                return Probe(away=away.why)
            except Retry as error:  # the worker died
                logger.debug("{} cannot be probed: {}", held.root, error)
            finally:
                nursery.cancel_scope.cancel()
        return None

    async def _lose_patience(self, root: str) -> None:
        await trio.sleep(ANSWERS)
        # The probe itself continues: its answer shows when the disk is back.
        await self._note(root, Probe(away=f"{root} has not responded for {ANSWERS:.0f} s"))

    async def _probed(self, held: Holding) -> Probe | None:
        if held.root not in self._markers:
            record = await self.context.database.site_record(self.context.site.name)
            if record is None:
                return None
            self.heard(record)
        if held.root not in self._markers:
            context = self.context
            if context.is_helper:
                raise RootAway(f"{held.root} has no marker yet: the listener of the site makes it")
            call, by = self.workers.run, context.site.name
            await RootMarking(context.database, call, context.sites, by).adopt(held)
            return await self._probed(held)
        return await self.workers.run(probe, Root(held.root, self._markers[held.root]))

    def _see(self, root: str, seen: Probe) -> None:
        was = self._seen.get(root)
        self._seen[root] = seen
        if seen.away is not None and (was is None or was.away is None):
            logger.error("{}; reactions that need it wait", seen.away)
        elif seen.away is None and was is not None and was.away is not None:
            logger.info("{} is available again", root)

    async def _note(self, root: str, seen: Probe) -> None:
        """Keep the result of a probe; if the directory is there, open what waits for it."""
        if seen.away is not None or not self._is_there(root):
            # Reactions may wait for it by the time it is back.
            self._doubted.add(root)
        self._see(root, seen)
        # First: who waits for the probes may leave once they are made, as `listen --once` does.
        with unless_fatal(f"the state of {root} cannot be stored"):
            async with self._writing:
                await self._write(root, seen)
                await self._write_disks()
        if self._all_seen:
            self.looked.set()
        self.probed.set()
        self.probed = trio.Event()

    async def _write(self, root: str, seen: Probe) -> None:
        away = {one: why for one, why in self.away.items() if why is not None}
        if away != self._noted:
            self._noted = None  # if it is cut short, nobody knows which of the two is noted
            await self.context.database.note_away(self.context.lease, away)
            self._noted = away
        if seen.away is None and root in self._doubted:
            self._doubted.discard(root)
            try:
                woken = await self.context.database.wake(self.context.lease, root, utcnow())
            except DatabaseError:
                # Not opened: try again after the next probe.
                self._doubted.add(root)
                raise
            if woken:
                self.woken()

    async def _write_disks(self) -> None:
        """Record how full the disks are, once each has been probed and then once a minute."""
        now = trio.current_time()
        if self._all_seen and now >= self._disks_noted + REFRESH:
            self._disks_noted = now  # set first: each directory has a task
            await self.context.database.note_disks(self.context.lease, self.disks)
