"""The types of paths that have been confined to a site's directories, and what derives from them.

The functions that list, open, write, erase or publish files take a `Confined` path, those that act
at the far end of a transfer a `FarPath`; mypy refuses any other text or bytes. Only functions that
resolve and check a path make one of these: `confine`, `confine_own` and `confine_entry` in
`caxev.files.paths`, `make_private`, the markers of `caxev.files.roots`, and the far ends' own.
"""

from __future__ import annotations

import os
from typing import NewType, TypeVar, cast

Confined = NewType("Confined", bytes)
"""A path on this machine: absolute, resolved, and inside a directory of a site or a private one."""

FarPath = NewType("FarPath", bytes)
"""A path on another machine, confined according to the links that it reports."""

P = TypeVar("P", Confined, FarPath)


def join(root: P, path: bytes) -> P:
    """Return the path of an item of a tree; ``b""`` is the root."""
    return cast("P", root.rstrip(b"/") + b"/" + path) if path else root


def parent(path: P) -> P:
    """Return the directory that holds a path."""
    return cast("P", os.path.dirname(path))


def beside(path: P, prefix: str) -> P:
    """Return the path of a file of ours in the same directory: the same name with a prefix."""
    directory, name = os.path.split(path)
    return cast("P", os.path.join(directory, prefix.encode() + name))
