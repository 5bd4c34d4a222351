"""Where locations are on this machine's disk, however they are written and wherever links lead.

Two entries that name one place are one copy: whoever erases, moves or rewrites the files of one
does so to both. Used by reactions and commands before they do; `overlapping` runs in a worker.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from caxev.files.paths import inside
from caxev.files.reading import Report


def places(location: object, real: Callable[[str], str] = os.path.realpath) -> tuple[bytes, ...]:
    """Return where a location of an entry is on this disk: as it is named, and as links lead.

    Nothing for what is no absolute path. `real` resolves the directory that holds it.
    """
    if not isinstance(location, str) or not os.path.isabs(location) or "\0" in location:
        return ()
    directory, name = os.path.split(location.rstrip("/"))
    whole = name in {"", ".", ".."}
    path = os.path.realpath(location) if whole else os.path.join(real(directory or "/"), name)
    try:
        if os.path.islink(path):
            return (os.fsencode(path), os.fsencode(os.path.realpath(path)))
        return (os.fsencode(path),)
    except UnicodeEncodeError:
        return ()


def overlapping(location: str, others: Sequence[str], *, report: Report) -> list[int]:
    """Return the numbers of those `others` that are at, above or below `location` on this disk."""
    mine = places(location)
    found = [
        number
        for number, other in enumerate(others)
        if any(_overlap(one, place) for one in mine for place in places(other))
    ]
    report(1, 1)
    return found


def _overlap(one: bytes, other: bytes) -> bool:
    return one == other or inside(one, other) or inside(other, one)
