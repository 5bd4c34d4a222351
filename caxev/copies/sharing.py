"""Entries that share the files of a copy.

No two copies should, but people copy and edit documents by hand. Code that erases, moves or
rewrites the files of a copy checks this first, since it would damage the other copy as well.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import TypeAlias

import trio
from attrs import frozen

from caxev.config import Site, Sites
from caxev.copies.storage import sites_sharing_storage
from caxev.core.job import Job
from caxev.core.model import Copy, Run
from caxev.core.paths import plain
from caxev.files.places import overlapping

Find: TypeAlias = "Callable[[Neighbours], Awaitable[list[Run]]]"


async def sharing(job: Job, copy: Copy) -> list[str]:
    """Name the other entries whose files are at, above or below those of a copy at this site.

    The disk decides, so links and odd spellings of a location are seen through.
    """
    wanted = neighbours(copy, job.site, job.sites)
    # The query finds too many rather than too few; then the disk decides.
    others = located(await job.neighbours(wanted), job.run, copy, wanted.hosts)
    places = [place for _, place in others]
    found = await job.work(overlapping, copy.location, places) if others else ()
    return [others[number][0] for number in found]


async def sharing_there(job: Job, copy: Copy) -> bool:
    """Return whether another entry has its files at, above or below a copy at another site.

    By the paths alone: where links lead at another host cannot be seen from here.
    """
    near = neighbours(copy, job.sites.get(copy.host), job.sites)
    others = located(await job.neighbours(near), job.run, copy, near.hosts)
    mine = f"{plain(copy.location or '/')}/"
    places = [f"{plain(place)}/" for _, place in others]
    return any(one.startswith(mine) or mine.startswith(one) for one in places)


async def sharing_here(find: Find, run: Run, copy: Copy, site: Site, sites: Sites) -> list[str]:
    """As `sharing`, for a command on the site's own machine; `find` queries the database."""
    wanted = neighbours(copy, site, sites)
    others = located(await find(wanted), run, copy, wanted.hosts)
    places = [place for _, place in others]
    shared = await trio.to_thread.run_sync(overlapping, copy.location or "", places)
    return [others[number][0] for number in shared]


def located(
    runs: Iterable[Run], run: Run, copy: Copy, hosts: Collection[str]
) -> list[tuple[str, str]]:
    """Return names and locations of other entries at these hosts, without `copy` itself.

    `caxev.files.places.overlapping` then finds on the disk which of them overlap.
    """
    # With the location: a second entry of the same key is another copy, unless it is the same.
    itself = (run.id, copy.key, copy.location)
    return [
        (f"{other.key} of {one}", other.location)
        for one in runs
        for other in one.at(hosts)
        if other.location and (one.id, other.key, other.location) != itself
    ]


@frozen
class Neighbours:
    """A query for entries that may share the files of a copy.

    They are at these `hosts`, and at least one of: at, above or below one of the copy's `names`;
    not plainly below one of the `roots`, so that they may lead anywhere; of the same content, as
    behind a link; without known content.
    """

    hosts: frozenset[str]
    names: tuple[str, ...]
    roots: tuple[str, ...]
    manifest: str | None = None
    checksum: str | None = None


def neighbours(copy: Copy, site: Site, sites: Sites) -> Neighbours:
    """Return the query for entries that may share the files of a copy at this site.

    Sites with the same storage may know a directory by another path, and a location may go through
    a link, so a path below one of their directories may be below each of them.
    """
    hosts = sites_sharing_storage(site, sites)
    roots = {plain(root).rstrip("/") for name in hosts for root in sites.get(name).roots}
    place = plain(copy.location or "/")
    below = {place.removeprefix(root) for root in roots if place.startswith(f"{root}/")}
    parts = place.split("/")[1:]
    below |= {f"/{'/'.join(parts[-count:])}" for count in (1, 2)}  # as `Site.directory` has them
    names = {place, *(root + tail for root in roots for tail in below)}
    digests = (copy.manifest, copy.checksum)
    return Neighbours(hosts, tuple(sorted(names)), tuple(sorted(roots)), *digests)
