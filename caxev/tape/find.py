"""Lookup of archives by the method in sites.json."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Final

from caxev.config.archive import ARCHIVES
from caxev.core.errors import GiveUp
from caxev.tape.base import Archive

_OURS: Final = {
    "tsm": "caxev.tape.tsm:Tsm",
    "directory": "caxev.tape.directory:Directory",
}


def methods() -> frozenset[str]:
    """Return the methods of archives, including third parties'."""
    return frozenset(_OURS) | entry_points(group=ARCHIVES).names


def archive(method: str) -> Archive:
    """Return the archive of that method. Raises `GiveUp` if there is none."""
    # Imported when needed: a command that uses no tape need not load its modules. Ours come first,
    # so that a third party cannot replace them by accident.
    if method in _OURS:
        module, name = _OURS[method].split(":")
        ours: Archive = getattr(importlib.import_module(module), name)()
        return ours
    for point in entry_points(group=ARCHIVES, name=method):
        theirs: Archive = point.load()()
        return theirs
    raise GiveUp(f"no archive is reached by {method!r} (known: {', '.join(sorted(methods()))})")
