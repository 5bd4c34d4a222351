"""Warnings about directories of sites.json that are equal, or lie in one another. Pure.

`caxev.config.loading` adds them to the file's warnings, so ``caxev sites check`` reports them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, groupby
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from caxev.core.paths import UNKNOWN, plain

if TYPE_CHECKING:
    from caxev.config.sites import Site


class _Named(NamedTuple):
    """A directory as one key of one site names it."""

    path: PurePosixPath
    site: Site
    key: str

    def __str__(self) -> str:
        return f"{self.key} of site {self.site.name!r}"


def directory_warnings(sites: Sequence[Site], keys: Iterable[str]) -> Iterator[str]:
    """Report one directory for several types of data, and directories that lie in one another.

    Sites on different machines may have the same paths.
    """
    named = [
        _Named(PurePosixPath(plain(path)), site, key)
        for site in sites
        for key in keys
        if (path := getattr(site, key)) is not None and path.startswith("/")
    ]
    for path, group in groupby(sorted(named, key=_by_path), key=_by_path):
        for one, other in combinations(group, 2):
            if one.key != other.key and are_near(one.site, other.site):
                yield (
                    f"{one} is {other} as well: {path}. The two types of data "
                    "get mixed up; give each a directory of its own"
                )
    for one, other in combinations(named, 2):
        inner, outer = (one, other) if other.path in one.path.parents else (other, one)
        if outer.path in inner.path.parents and are_near(one.site, other.site):
            yield (
                f"{inner} lies inside {outer}: {inner.path}. What is kept in the one is taken for "
                "copies in the other; put the directories beside one another"
            )


def _by_path(one: _Named) -> str:
    return str(one.path)


def are_near(one: Site, other: Site) -> bool:
    """Whether both may see one file system.

    They do if they are one site, are on one machine, are reached by ``local``, or if their
    directories have a marker in common: hosts may mount one directory over the network.
    """
    same = one.hostname == other.hostname is not None or "local" in (one.method, other.method)
    return one.name == other.name or same or not _markers(one).isdisjoint(_markers(other))


def _markers(site: Site) -> set[str | None]:
    return {root.marker for root in site.roots} - {None, UNKNOWN}
