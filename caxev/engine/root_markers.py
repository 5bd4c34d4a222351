"""Markers: the files that identify a site's directories, and their records in the database.

``caxev sites init`` marks directories when a person asks. `root_watch` does so by itself only while
the runs database knows no copy there: an empty mount point would pass for an empty disk, and each
of its copies for lost.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import trio
from attrs import evolve, frozen
from loguru import logger

from caxev.config import Site, Sites
from caxev.config.directories import are_near
from caxev.core.errors import RootAway
from caxev.core.paths import UNKNOWN, Root
from caxev.database import Database, SiteRecord
from caxev.files.roots import (
    Marker,
    absent,
    are_same,
    file_system,
    find_markers,
    make_marker,
    marker_path,
    probe,
)

SAMPLE: Final = 100
"""Copies that must be there before ``caxev sites init`` believes a directory without a marker."""
Call = Callable[..., Awaitable[Any]]
"""Calls a function of `caxev.files.roots` in another process, or wherever a disk may hang."""


@frozen
class Holding:
    """A directory that a site's listener watches; it belongs to the site `owner`."""

    owner: Site
    root: str

    @property
    def key(self) -> str:
        return self.owner.key_of(self.root)


def holdings(site: Site, sites: Sites) -> list[Holding]:
    """Return the directories of a site, and of archives on this machine that it brings data to."""
    names = dict.fromkeys([*site.upload_options, *site.download_options])
    near = [one for name in names if (one := sites.find(name)) and one.method == "directory"]
    found = {str(root): owner for owner in (*near[::-1], site) for root in owner.marked}
    return [Holding(owner, root) for root, owner in found.items()]


def with_markers(sites: Sites, here: Site | None, records: Mapping[str, SiteRecord]) -> Sites:
    """Return the sites with the markers that are noted. Pure.

    Those of an archive on this machine are noted with the site `here`, which looks after them.
    Nothing is done beneath a directory that it looks after before its marker is noted (`UNKNOWN`).
    """
    looked_after: dict[str, dict[str, str]] = {}
    for one in () if here is None else holdings(here, sites):
        looked_after.setdefault(one.owner.name, {})[one.root] = UNKNOWN

    def noted(site: Site) -> Site:
        unknown = looked_after.get(site.name, {})
        record = records.get(here.name if here is not None and unknown else site.name)
        return evolve(site, markers={**unknown, **(record.markers if record else {})})

    return evolve(sites, by_name={site.name: noted(site) for site in sites.values()})


async def read_markers(database: Database, sites: Sites, here: Site | None = None) -> Sites:
    """Return the sites with the markers that the database has noted."""
    records = {record.site: record for record in await database.site_records()}
    return with_markers(sites, here, records)


@frozen
class RootMarking:
    """How the directories are marked that the listener of the site `by` looks after."""

    database: Database
    call: Call
    sites: Sites
    by: str

    async def adopt(self, held: Holding, *, asked: bool = False, force: bool = False) -> str:
        """Find or make the marker of a directory for which none is noted; note it, return its id.

        It is made if the database knows no copy of this kind at the site, whatever its state. If a
        person has `asked` for it, it is also made if the files of the newest `SAMPLE` copies are
        there. A marker that was made for a site on another machine shows a directory that both
        share, or a clone of its disk: only a person can decide. Raises `RootAway` unless a person
        confirms (`force`) the directory.
        """
        there = await self.call(find_markers, held.root)
        foreign = foreign_markers(there, held.owner, self.sites)
        if not force:
            _check_not_foreign(held, foreign, self.by)
        made_for = [_place(marker, self.sites) for marker in there]
        fits = await self.call(are_same, held.root, made_for)
        # A second marker would hide that two sites share the directory.
        found = [one for one, same in zip(there, fits, strict=True) if same or one in foreign]
        if len(found) > 1:
            names = ", ".join(one.id for one in found)
            raise RootAway(f"{held.root} has several markers ({names}): remove all but one")
        if not found and not force:
            _check_free(held, there, self.by)
            await (self._check_copies(held) if asked else self._check_new(held))
        if found:
            marker = str(found[0].id)
        else:
            marker = str(await self.call(make_marker, held.root, held.owner.name, held.key, there))
        await self._note(held, marker)
        logger.info("{} is now identified by the marker {}", held.root, marker)
        return marker

    async def _note(self, held: Holding, marker: str) -> None:
        disk = await self.call(file_system, held.root)
        await self.database.note_marker(self.by, held.root, marker, disk)

    async def _check_new(self, held: Holding) -> None:
        """Raise `RootAway` if the database knows copies in a directory that has no marker."""
        kind = _kind_in(held)
        if kind is not None and await self.database.knows_copies(held.owner.name, kind):
            raise RootAway(
                f"{held.root} has no marker, and the database knows {kind} copies at "
                f"{held.owner.name}: if its disk is mounted, run caxev sites init --site {self.by}"
            )

    async def _check_copies(self, held: Holding) -> None:
        """Raise `RootAway` unless the newest copies are there that a directory should hold."""
        if (kind := _kind_in(held)) is None:
            return
        known = await self.database.known_locations(held.owner.name, kind, SAMPLE)
        gone = await self.call(absent, held.root, known)
        if gone:
            raise RootAway(
                f"{len(gone)} of the newest {len(known)} {kind} copies at {held.owner.name} are "
                f"missing in {held.root}, for example {gone[0]}: {_way_out(self.by)}"
            )

    async def init(self, held: Holding, noted: str | None, *, force: bool) -> dict[str, Any]:
        """Mark a directory at a person's request, if it is not; return its row."""
        known = Root(held.root, noted)
        row = {"directory": held.root, "marker": known.marker, "ok": True}
        try:
            if known.marker is not None:
                if (await self.call(probe, known)).away is None:
                    if known.disk is None:
                        await self._note(held, known.marker)
                    return {**row, "state": "present"}
                if not force:
                    await self._check_moved(held, known)
            marker = await self.adopt(held, asked=True, force=force)
        except RootAway as away:
            return {**row, "ok": False, "state": away.why}
        return {**row, "marker": marker, "state": "marked"}

    async def _check_moved(self, held: Holding, known: Root) -> None:
        """Raise `RootAway` unless its marker is there, on another disk, and the copies, too."""
        if (seen := await self.call(probe, Root(known, known.marker))).away is not None:
            raise RootAway(f"{seen.away}: {_way_out(self.by)}")
        await self._check_copies(held)


def _place(marker: Marker, sites: Sites) -> str:
    """Return the directory of sites.json that a marker was made for; empty if it is not there."""
    site = sites.find(marker.site)
    known = () if site is None else site.types.directories
    return getattr(site, marker.key) or "" if marker.key in known else ""


def foreign_markers(there: Iterable[Marker], owner: Site, sites: Sites) -> list[Marker]:
    """Return the markers of sites that are not known to share a disk with this one."""
    return [
        one for one in there if (site := sites.find(one.site)) is None or not are_near(site, owner)
    ]


def _check_not_foreign(held: Holding, foreign: Sequence[Marker], by: str) -> None:
    for one in foreign:
        raise RootAway(
            f"{held.root} has the marker of {one.key} of {one.site}, a site on another machine: "
            f"if both use this directory, run caxev sites init --site {by} --force, "
            "and their copies in it count as one; if this is a clone of that disk, remove "
            f"{marker_path(held.root, one.id)}"
        )


def _check_free(held: Holding, there: Sequence[Marker], by: str) -> None:
    for marker in there:
        raise RootAway(
            f"{held.root} has the marker of {marker.key} of {marker.site}: {_way_out(by)}"
        )


def _way_out(by: str) -> str:
    init = f"caxev sites init --site {by} --force"
    return f"mount the right disk, or run {init} if this is the right directory"


def _kind_in(held: Holding) -> str | None:
    """Return the type of data in a directory; None if no entry names anything there."""
    kind = held.key.removeprefix("dir_")
    return kind if kind in held.owner.directories else None


async def init_roots(
    database: Database, site: Site, sites: Sites, *, force: bool
) -> list[dict[str, Any]]:
    """Mark the directories of a site at a person's request; return a row for each."""
    record = await database.site_record(site.name)
    noted = {} if record is None else record.markers
    marking = RootMarking(database, trio.to_thread.run_sync, sites, site.name)
    return [
        await marking.init(held, noted.get(held.root), force=force)
        for held in holdings(site, sites)
    ]
