"""Find a site's directories on this machine, and translate paths in them to copies.

For `mv`, `register`, `stray` and `verify`, which act on files, on the site's own machine only.
"""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from functools import cache
from typing import TYPE_CHECKING

from caxev.cli.options import options
from caxev.config import ConfigError, Site, Sites
from caxev.core.errors import GiveUp
from caxev.core.model import CopyKey
from caxev.files import steady

if TYPE_CHECKING:
    from caxev.database import Database

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def ours(name: str) -> Site:
    """Return the site of that name. Raises `ConfigError` unless its directories are here."""
    site = options().sites().get(name)
    if not stands_here(site):
        where = ", ".join(site.roots) or "it has none"
        raise ConfigError(
            f"no directory of {name} is on this machine ({where}): run this at {name} itself"
        )
    return site


@asynccontextmanager
async def at_disks(
    database: Database, site: Site, sites: Sites
) -> AsyncIterator[tuple[Site, Sites]]:
    """Yield the site and all sites, with the markers of their directories.

    If the block has used a directory whose disk is away, its result does not count, and `RootAway`
    is raised.
    """
    from caxev.engine.root_markers import read_markers

    # Markers, because an unmounted disk looks like one that has lost all its files.
    known = await read_markers(database, sites, site)
    with steady():
        yield known.get(site.name), known


def stands_here(site: Site) -> bool:
    """Return whether any directory of the site exists on this machine."""
    return any(os.path.isdir(root) for root in site.roots)


def is_here(site: Site) -> bool:
    """Return whether this machine is that site's, by sites.json and the disk."""
    # The directories alone do not decide: two sites may use the same path on different machines.
    return stands_here(site) and (site.hostname in _our_names() or site.method == "local")


@cache
def _our_names() -> frozenset[str | None]:
    # Once: the resolver may need long, and commands ask for each of very many copies.
    return frozenset((None, *_LOOPBACK, socket.gethostname(), socket.getfqdn()))


def key_of(site: Site, path: str) -> CopyKey:
    """Return the key of a copy at this (resolved) path, by its directory.

    Raises `GiveUp` if the site keeps no copies there.
    """
    # A copy is an entry of its type's directory, or of a version's directory in it: nothing deeper.
    directory = os.path.dirname(path)
    above, _, version = directory.rpartition("/pax_")
    is_version = bool(version) and "/" not in version
    versioned = site.types.versioned
    for kind, root in site.directories.items():
        if kind not in versioned and directory == os.path.realpath(root):
            return CopyKey(kind, site.name)
        if kind in versioned and is_version and above == os.path.realpath(root):
            return CopyKey(kind, site.name, version)
    expected = ", ".join(
        f"{root}/{'pax_VERSION/' if kind in versioned else ''}NAME"
        for kind, root in site.directories.items()
    )
    raise GiveUp(f"{path} is not a place for copies of {site.name}: those are {expected or 'none'}")


def own_name(path: str, site: Site, kind: str) -> str:
    """Return a resolved path of data of that type below the directory that sites.json names."""
    # Entries use the path as in sites.json. That directory may be a link to the disk of today, and
    # then the resolved path does not begin with it.
    # The type's own directory first: several of the site's may lead to the same disk.
    roots = (site.directories.get(kind), *site.roots)
    return next(_below(path, filter(None, roots)), path)


def names_of(path: str, sites: Iterable[Site]) -> list[str]:
    """Return the names that entries may have for a resolved path: its own, and these sites'."""
    roots = (root for site in sites for root in site.roots)
    return list(dict.fromkeys([path, *_below(path, roots)]))


def _below(path: str, roots: Iterable[str]) -> Iterator[str]:
    for root in roots:
        real = os.path.realpath(root).rstrip("/")
        if path.startswith(f"{real}/"):
            yield root.rstrip("/") + path.removeprefix(real)


def run_called(path: str) -> tuple[str, str | None]:
    """Return the name of the run whose copy is at this path, and its detector if the name has it.

    Raw data has the run's own name; cax appended ``_MV`` for the muon veto.
    """
    # A derived file has the run's name and an extension.
    name = os.path.basename(path).partition(".")[0]
    plain = name.removesuffix("_MV")
    return plain, None if plain == name else "muon_veto"
