"""Third parties' extensions: movers, archives, batch systems, sinks, by their entry points."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import lru_cache
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import EntryPoints


def entry_points(*, group: str, name: str | None = None) -> EntryPoints:
    """Return the entry points of a group, or only those of that name."""
    # Not before it is needed: the import takes a tenth of the time in which a process starts.
    from importlib import metadata

    every = metadata.entry_points(group=group)
    return every if name is None else every.select(name=name)


def installed(group: str) -> frozenset[str]:
    """Return the names of what is installed for a group of entry points.

    Read once for each ``sys.path``: decisions ask for every change of a run, and reading takes
    milliseconds.
    """
    return _names(group, tuple(sys.path))


def found(name: str, ours: Mapping[str, str], group: str) -> Any | None:
    """Import what has that name: ours, by its path there, else a third party's; None if nobody's.

    Not before it is needed: a process need not load what it does not use. Ours come first, so that
    a third party cannot replace them by accident.
    """
    if name in ours:
        return resolve_name(ours[name])
    return next((point.load() for point in entry_points(group=group, name=name)), None)


@lru_cache
def _names(group: str, path: tuple[str, ...]) -> frozenset[str]:
    del path
    return frozenset(entry_points(group=group).names)
