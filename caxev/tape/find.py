"""Lookup of archives by the method in sites.json."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Final

from caxev.config.archive import ARCHIVES
from caxev.core.errors import GiveUp
from caxev.files import to_nobody
from caxev.tape.base import Archive, Reach, Transcript

_OURS: Final = {
    "tsm": "caxev.tape.tsm:Tsm",
    "directory": "caxev.tape.directory:Directory",
}


def methods() -> frozenset[str]:
    """Return the methods of archives, including third parties'."""
    return frozenset(_OURS) | entry_points(group=ARCHIVES).names


def archive(reach: Reach, transcript: Transcript | None = None) -> Archive:
    """Return the archive of that site's method. Raises `GiveUp` if there is none."""
    method, transcript = reach.there.method, transcript or Transcript(to_nobody)
    # Imported when needed: a command that uses no tape need not load its modules. Ours come first,
    # so that a third party cannot replace them by accident.
    if method in _OURS:
        module, name = _OURS[method].split(":")
        ours: Archive = getattr(importlib.import_module(module), name)(reach, transcript)
        return ours
    for point in entry_points(group=ARCHIVES, name=method):
        theirs: Archive = point.load()(reach, transcript)
        return theirs
    raise GiveUp(f"no archive is reached by {method!r} (known: {', '.join(sorted(methods()))})")
