"""The types of paths: which directory of a site a path is, and how its disk is known."""

from __future__ import annotations

import posixpath
from typing import Final, Self

UNKNOWN: Final = "unknown"
"""In place of a marker's id if none is noted yet: nothing is done beneath such a root."""


class Root(str):
    """A base directory of a site, as its path.

    `marker` is the id of the file that shows that its disk is mounted; None: none is noted, and
    nothing is checked. `disk` is the UUID of the file system that it was noted on, if it has one.
    See `caxev.files.roots`.
    """

    __slots__ = ("disk", "marker")
    marker: str | None
    disk: str | None

    def __new__(cls, path: str, noted: str | None = None) -> Self:
        """Return the path with what is noted of its marker: ID, or ID/UUID of the file system."""
        root = super().__new__(cls, path)
        marker, _, disk = (noted or "").partition("/")
        root.marker, root.disk = marker or None, disk or None
        return root


def plain(location: str) -> str:
    """Return the one way of writing a path, as far as that can be known without the disk.

    ``/a//b/./c/`` is ``/a/b/c``. A text that is no absolute path stays as it is.
    """
    # An entry of an old program may hold anything.
    if not location.startswith("/"):
        return location
    # POSIX lets two leading slashes mean something else, and `normpath` keeps them.
    return "/" + posixpath.normpath(location).lstrip("/")
