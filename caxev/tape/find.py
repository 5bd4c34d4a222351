"""Which archives there are, by the method of sites.json."""

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
    """The methods that stand for archives, third parties' among them."""
    return frozenset(_OURS) | entry_points(group=ARCHIVES).names


def archive(method: str) -> Archive:
    """The archive of that method. Raises `GiveUp` where there is none."""
    if method in _OURS:
        module, name = _OURS[method].split(":")
        ours: Archive = getattr(importlib.import_module(module), name)()
        return ours
    for point in entry_points(group=ARCHIVES, name=method):
        theirs: Archive = point.load()()
        return theirs
    raise GiveUp(f"no archive is reached by {method!r} (known: {', '.join(sorted(methods()))})")
