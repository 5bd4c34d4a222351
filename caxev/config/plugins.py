"""Third parties' extensions: movers, archives, batch systems, sinks, by their entry points."""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib.metadata import entry_points


def installed(group: str) -> frozenset[str]:
    """Return the names of what is installed for a group of entry points.

    Read once for each ``sys.path``: decisions ask for every change of a run, and reading takes
    milliseconds.
    """
    return _names(group, tuple(sys.path))


@lru_cache
def _names(group: str, path: tuple[str, ...]) -> frozenset[str]:
    del path
    return frozenset(entry_points(group=group).names)
