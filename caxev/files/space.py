"""Compute whether a copy fits on its disk. Runs in a worker process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress

from caxev.files.errors import meaning
from caxev.files.paths import confine, partial_path, root_of

_BLOCK = 512  # bytes


def lacking(location: str, roots: Sequence[str], min_free: int, coming: int) -> int:
    """Return how many bytes are lacking for a copy of `coming` bytes; negative: bytes to spare.

    Data that has already arrived is counted. Raises `GiveUp` for a path that leads out of the
    roots, `Retry` if the disk fails.
    """
    path = confine(location, roots)
    try:
        disk = os.statvfs(root_of(path, roots))
    except OSError as error:
        raise meaning(error, "cannot ask how full the disk is") from error
    there = _taken(path) + _taken(partial_path(path))
    return min_free + max(0, coming - there) - disk.f_bavail * disk.f_frsize


def _taken(path: bytes) -> int:
    """Return the bytes that a tree takes on the disk; 0 if there is none."""
    # By its blocks: partial files can have holes, and be longer than the data in them.
    if not os.path.lexists(path):
        return 0
    blocks = os.lstat(path).st_blocks
    for directory, _, files in os.walk(path):
        for name in files:
            # A transfer may be renaming its files while we count.
            with suppress(FileNotFoundError):
                blocks += os.lstat(os.path.join(directory, name)).st_blocks
    return blocks * _BLOCK
