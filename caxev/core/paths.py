"""The types of paths: which directory of a site a path is, and how its disk is known."""

from __future__ import annotations

import posixpath
from typing import Final, Self

UNKNOWN: Final = "unknown"
"""In place of a marker's id if none is noted yet: nothing is done beneath such a root."""


class Root(str):
    """A base directory of a site, as its path.

    `marker` is the id of the file that shows that its disk is mounted; None: none is noted, and
    nothing is checked. See `caxev.files.roots`.
    """

    __slots__ = ("marker",)
    marker: str | None

    def __new__(cls, path: str, marker: str | None = None) -> Self:
        """Return the path with what is known of its marker."""
        root = super().__new__(cls, path)
        root.marker = marker
        return root


def plain(location: str) -> str:
    """Return the one way of writing a path, as far as that can be known without the disk.

    ``/a//b/./c/`` is ``/a/b/c``. What is no absolute path stays as it is.
    """
    # An entry of an old program may hold anything.
    if not location.startswith("/"):
        return location
    # POSIX lets two leading slashes mean something else, and `normpath` keeps them.
    return "/" + posixpath.normpath(location).lstrip("/")
