"""Which disks are there: how a listener looks after its site's directories and their markers.

`listener` runs a `RootWatch` beside its other tasks; `dispatcher` gets from it the sites with the
markers that are noted, and reports what found a disk away; `alarms.Vitals` raises the alarms.
No disk is touched in this process: one that hangs would keep it from ever ending.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import trio
from attrs import define, evolve, field, frozen
from loguru import logger

from caxev.config import Site, Sites
from caxev.config.directories import are_near
from caxev.config.sites import DIRECTORIES, TYPES
from caxev.core.clock import utcnow
from caxev.core.errors import Retry, RootAway
from caxev.core.paths import UNKNOWN, Root
from caxev.database import Database, DatabaseError, Lease, SiteRecord, is_fatal
from caxev.engine.workers import Workers
from caxev.files import to_nobody
from caxev.files.roots import (
    Marker,
    Probe,
    absent,
    are_same,
    find_markers,
    make_marker,
    marker_path,
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
SAMPLE: Final = 100
"""Copies that must be there before a directory without a marker is believed to be the right one."""

Call = Callable[..., Awaitable[Any]]
"""Calls a function of `caxev.files.roots` in another process, or wherever a disk may hang."""


@frozen
class Holding:
    """A directory that a site's listener looks after: `owner` is the site that it belongs to."""

    owner: Site
    root: str

    @property
    def key(self) -> str:
        return self.owner.key_of(self.root)


def holdings(site: Site, sites: Sites) -> list[Holding]:
    """The directories of a site, and of the archives on this machine that it brings data to."""
    names = dict.fromkeys([*site.upload_options, *site.download_options])
    near = [one for name in names if (one := sites.find(name)) and one.method == "directory"]
    found = {str(root): owner for owner in (*near[::-1], site) for root in owner.marked}
    return [Holding(owner, root) for root, owner in found.items()]


def with_markers(sites: Sites, here: Site | None, records: Mapping[str, SiteRecord]) -> Sites:
    """The sites with the markers that are noted. Pure.

    Those of an archive on this machine are noted with the site `here`, which looks after them.
    """
    mine = {} if here is None else {held.owner.name: here.name for held in holdings(here, sites)}

    def noted(site: Site) -> Site:
        record = records.get(mine.get(site.name, site.name))
        return site if record is None else evolve(site, markers=record.markers)

    return evolve(sites, by_name={site.name: noted(site) for site in sites.values()})


async def read_markers(database: Database, sites: Sites, here: Site | None = None) -> Sites:
    """`with_markers`, of what the database has noted."""
    records = {record.site: record for record in await database.site_records()}
    return with_markers(sites, here, records)


# -- markers that are not noted yet ---------------------------------------------------------------


async def adopt(
    database: Database, call: Call, held: Holding, sites: Sites, by: str, *, force: bool = False
) -> str:
    """Find or make the marker of a directory for which none is noted, and note it; its id.

    It is made if the database knows no copy of this kind at the site, whatever its state, or the
    files of the newest `SAMPLE` are there: an empty mount point has none. A marker that was made
    for a site on another machine shows a directory that both share, or a clone of its disk: only
    a person knows. Raises `RootAway` unless a person confirms (`force`) the directory.
    """
    there = await call(find_markers, held.root)
    foreign = foreign_markers(there, held.owner, sites)
    if not force:
        _check_not_foreign(held, foreign)
    made_for = [_place(marker, sites) for marker in there]
    fits = await call(are_same, held.root, made_for)
    # A second marker would hide that two sites share the directory.
    found = [one for one, same in zip(there, fits, strict=True) if same or one in foreign]
    if len(found) > 1:
        names = ", ".join(one.id for one in found)
        raise RootAway(f"{held.root} has several markers ({names}): remove all but one")
    if not found and not force:
        _check_free(held, there)
        await _check_copies(database, call, held)
    if found:
        marker = str(found[0].id)
    else:
        marker = str(await call(make_marker, held.root, held.owner.name, held.key))
    await database.note_marker(by, held.root, marker)
    logger.info("{} is known by the marker {} from now on", held.root, marker)
    return marker


def _place(marker: Marker, sites: Sites) -> str:
    """The directory that a marker was made for, as sites.json has it; empty if it has none."""
    site = sites.find(marker.site)
    return "" if site is None or marker.key not in DIRECTORIES else getattr(site, marker.key) or ""


def foreign_markers(there: Iterable[Marker], owner: Site, sites: Sites) -> list[Marker]:
    """The markers that were made for sites which are not known to share a disk with this one."""
    return [
        one for one in there if (site := sites.find(one.site)) is None or not are_near(site, owner)
    ]


def _check_not_foreign(held: Holding, foreign: Sequence[Marker]) -> None:
    for one in foreign:
        raise RootAway(
            f"{held.root} has the marker of {one.key} of {one.site}, a site on another machine: "
            f"if both see this one directory, run caxev sites init --site {held.owner.name} "
            "--force, and their copies in it count as one; if this is a clone of that disk, remove "
            f"{marker_path(held.root, one.id)}"
        )


def _check_free(held: Holding, there: Sequence[Marker]) -> None:
    for marker in there:
        raise RootAway(
            f"{held.root} has the marker of {marker.key} of {marker.site}: {_way_out(held)}"
        )


def _way_out(held: Holding) -> str:
    init = f"caxev sites init --site {held.owner.name} --force"
    return f"mount the right disk, or run {init} if this is the right directory"


async def _check_copies(database: Database, call: Call, held: Holding) -> None:
    kind = held.key.removeprefix("dir_")
    if kind not in TYPES:
        return  # nothing that an entry names stands there
    known = await database.known_locations(held.owner.name, kind, SAMPLE)
    gone = await call(absent, held.root, known)
    if gone:
        raise RootAway(
            f"{held.root} has no marker, and of {len(known)} {kind} copies at {held.owner.name} "
            f"{len(gone)} are not there, {gone[0]} for one: {_way_out(held)}"
        )


async def init_roots(
    database: Database, site: Site, sites: Sites, *, force: bool
) -> list[dict[str, Any]]:
    """Mark the directories of a site, as a person says; a row for each."""
    record = await database.site_record(site.name)
    noted = {} if record is None else record.markers
    return [
        await _init_root(database, held, sites, site.name, noted.get(held.root), force=force)
        for held in holdings(site, sites)
    ]


async def _init_root(
    database: Database, held: Holding, sites: Sites, by: str, noted: str | None, *, force: bool
) -> dict[str, Any]:
    async def call(function: Callable[..., Any], *args: object) -> Any:
        return await trio.to_thread.run_sync(partial(function, *args, report=to_nobody))

    row = {"directory": held.root, "marker": noted, "ok": True}
    try:
        if noted is not None and (seen := await call(probe, Root(held.root, noted))).away is None:
            return {**row, "state": "it is there"}
        if noted is not None and not force:
            return {**row, "ok": False, "state": f"{seen.away}: {_way_out(held)}"}
        marker = await adopt(database, call, held, sites, by, force=force)
    except RootAway as away:
        return {**row, "ok": False, "state": away.why}
    return {**row, "marker": marker, "state": "is known by its marker now"}


# -- watching -------------------------------------------------------------------------------------


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
