"""Which other entries have their files where a copy has its own.

No two copies should, but documents are copied, and edited, by hand. Whoever is about to erase, move
or rewrite the files of one copy asks first: it would do so to the other as well.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable
from functools import partial
from typing import TypeAlias

import trio
from attrs import frozen

from caxev.config import Site, Sites
from caxev.copies.deletion import sites_sharing_storage
from caxev.core.job import Job
from caxev.core.model import Copy, Run
from caxev.core.paths import plain
from caxev.files import overlapping, to_nobody

Find: TypeAlias = "Callable[[Neighbours], Awaitable[list[Run]]]"


async def sharing(job: Job, copy: Copy) -> list[str]:
    """Name the other entries whose files are at, above or below those of a copy at this site.

    However their locations are written, and wherever links lead.
    """
    wanted = neighbours(copy, job.site, job.sites)
    others = located(await job.neighbours(wanted), job.run, copy, wanted.hosts)
    places = [place for _, place in others]
    found = await job.work(overlapping, copy.location, places) if others else ()
    return [others[number][0] for number in found]


async def sharing_here(find: Find, run: Run, copy: Copy, site: Site, sites: Sites) -> list[str]:
    """As `sharing`, for a command at the site's own machine; `find` asks the database."""
    wanted = neighbours(copy, site, sites)
    others = located(await find(wanted), run, copy, wanted.hosts)
    places = [place for _, place in others]
    look = partial(overlapping, copy.location or "", places, report=to_nobody)
    return [others[number][0] for number in await trio.to_thread.run_sync(look)]


def located(
    runs: Iterable[Run], run: Run, copy: Copy, hosts: Collection[str]
) -> list[tuple[str, str]]:
    """What other entries at these hosts are, and their locations; a run's `copy` itself is none.

    Which of them have their files at, above or below those of `copy`, only the disk can tell: see
    `caxev.files.overlapping`.
    """
    itself = (run.id, copy.key, copy.location)
    return [
        (f"{other.key} of {one}", other.location)
        for one in runs
        for other in one.copies
        if other.host in hosts and other.location and (one.id, other.key, other.location) != itself
    ]


@frozen
class Neighbours:
    """Which entries may have their files where a copy has its own, as a query can find them.

    Such are at these `hosts`, and at, above or below one of the `names` of its place; or written in
    an odd way, so that they may lead anywhere: not plainly below one of the `roots`; or of the same
    content, as a link leads to; or of none that is known yet.
    """

    hosts: frozenset[str]
    names: tuple[str, ...]
    roots: tuple[str, ...]
    manifest: str | None = None
    checksum: str | None = None


def neighbours(copy: Copy, site: Site, sites: Sites) -> Neighbours:
    """Describe what may share the files of a copy at this site.

    Sites beside it may know the same directory by another name, and its entry may have the name
    that a link leads to: what is below one of their directories may be below each.
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
