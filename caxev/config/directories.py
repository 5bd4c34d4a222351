"""The directories of sites: those that only a listener may write, and warnings about others.

Other sites may write in a site's data directories, so nothing that is trusted, followed or executed
lies there. Jobs, logs, files that come back from tape to be compared and the output of foreign
programs lie in the site's state directory. `caxev.files.private` makes and checks it.

`caxev.config.loading` adds the warnings to the file's, so ``caxev sites check`` reports them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, groupby
from pathlib import PurePosixPath
from typing import Final, NamedTuple

from caxev.config.sites import Site, Sites, archive_between
from caxev.core.paths import UNKNOWN, plain

# A site's name may hold anything; as a directory's it must be one visible component of a path.
_UNPLAIN: Final = re.compile(r"^\.+|[^A-Za-z0-9+_.-]")


def state_directory(site: Site) -> str:
    """Return the site's state directory: below ``state`` of sites.json, or by the environment.

    In the environment it is ``CAXEV_STATE``, systemd's ``STATE_DIRECTORY``, or the user's own
    directory for state.
    """
    systemd = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")  # noqa: PTH111  # kept as text
    return _below(site.state or os.environ.get("CAXEV_STATE") or systemd or f"{home}/caxev", site)


def jobs_directory(site: Site, kind: str) -> str:
    """Return the directory in which jobs that make data of that type keep their files.

    The nodes of a batch system must see it.
    """
    how = site.processing_of(kind)
    if how is not None and how.directory is not None:
        return f"{_below(how.directory, site)}/{kind}"
    return f"{state_directory(site)}/jobs/{kind}"


def private_directories(site: Site, sites: Sites) -> Iterator[tuple[str, str]]:
    """Yield each directory in which only this site's listener may write, after its key."""
    yield "state", state_directory(site)
    for kind, how in site.made.items():
        if how.directory is not None:
            yield f"{site.types.by_name[kind].making}: directory", _below(how.directory, site)
    if site.dir_tsm is not None:
        yield "dir_tsm", site.dir_tsm
    places = (archive_between(site, there).scratch for there in sites.values())
    for path in sorted({place for place in places if place is not None}):
        yield "archive: scratch", path


def _below(base: str, site: Site) -> str:
    """Return the site's own directory in one that several sites may be given."""
    return f"{base.rstrip('/')}/{_UNPLAIN.sub('_', site.name)}"


# -- warnings -------------------------------------------------------------------------------------


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
