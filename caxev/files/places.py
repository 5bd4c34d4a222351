"""Resolve locations to places on this machine's disk, to find entries that share files.

Two entries that name one place are one copy: erasing, moving or rewriting the files of one affects
both. Used by reactions and commands before they do so; `overlapping` runs in a worker.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from caxev.files.paths import inside


def places(location: object, real: Callable[[str], str] = os.path.realpath) -> tuple[bytes, ...]:
    """Return the paths of an entry's location on this disk: its own, and its target if a link.

    Nothing for a location that is no absolute path. `real` resolves the directory that holds it.
    """
    if not isinstance(location, str) or not os.path.isabs(location) or "\0" in location:
        return ()
    directory, name = os.path.split(location.rstrip("/"))
    # The directory is resolved, but not the name: if the copy is a link, both places count.
    whole = name in {"", ".", ".."}
    path = os.path.realpath(location) if whole else os.path.join(real(directory or "/"), name)
    # A text that cannot be a name on this machine names nothing here.
    try:
        if os.path.islink(path):
            return (os.fsencode(path), os.fsencode(os.path.realpath(path)))
        return (os.fsencode(path),)
    except UnicodeEncodeError:
        return ()


def overlapping(location: str, others: Sequence[str]) -> list[int]:
    """Return the indices of those `others` that are at, above or below `location` on this disk."""
    mine = places(location)
    return [
        number
        for number, other in enumerate(others)
        if any(_overlap(one, place) for one in mine for place in places(other))
    ]


def _overlap(one: bytes, other: bytes) -> bool:
    return one == other or inside(one, other) or inside(other, one)
