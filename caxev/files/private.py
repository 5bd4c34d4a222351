"""Make and check directories to which only this user may write.

All that is trusted, followed or executed is in such a directory: see `caxev.config.directories`.
Data directories are not private, even if they are ours: the account that other sites log in to may
share our uid, and can write to them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Final

from caxev.core.errors import Denied
from caxev.files.confined import Confined
from caxev.files.errors import meaning
from caxev.files.paths import inside, shown
from caxev.files.resolved import chmod

MODE: Final = 0o700
_OTHERS_WRITE: Final = 0o022


def make_private(path: str) -> Confined:
    """Make a directory that only we may read and write, if missing; return its real path.

    Raises `Denied` if others may write to it or could replace it, or if we may not make it.
    """
    # `Denied` and not `GiveUp`: an operator can lift that, and a mount point belongs to root only
    # until its disk is mounted.
    try:
        _make(path)
        if (why := not_private(path)) is not None:
            raise Denied(why)
        real = Confined(os.fsencode(os.path.realpath(path)))
        chmod(real, MODE)
    except OSError as error:
        raise meaning(error, f"cannot make {shown(path)}") from error
    return real


def _make(path: str) -> None:
    if not os.path.isdir(path):
        _make(os.path.dirname(path))
        with suppress(FileExistsError):
            os.mkdir(path, MODE)


def not_private(path: str) -> str | None:
    """Return why somebody else could write in that directory, or put another there; else None.

    A missing directory is judged by those above it.
    """
    # Both the path as written and its real path: a writer on either can redirect it.
    if not os.path.isabs(path):
        return f"{shown(path)} is not an absolute path"
    if os.path.islink(path):
        return f"{shown(path)} is a link: name the directory that it leads to"
    above = {*_above(path), *_above(os.path.realpath(path))}
    problems = [_writable(one) for one in sorted(above)]
    problems.append(_not_ours(path))
    return next((problem for problem in problems if problem), None)


def _above(path: str) -> Iterator[str]:
    while (parent := os.path.dirname(path)) != path:
        yield parent
        path = parent


def _writable(directory: str) -> str | None:
    """Return why others may rename entries of a directory; None if they may not."""
    # A directory that is missing, or hidden from us, is judged by those above it.
    try:
        status = os.stat(directory)
    except OSError:
        return None
    mode = stat.S_IMODE(status.st_mode)
    # With the sticky bit, as in /tmp, others may not rename what is ours.
    if status.st_uid not in (0, os.geteuid()):
        return f"{shown(directory)} belongs to another user, who may replace what is in it"
    if mode & _OTHERS_WRITE and not mode & stat.S_ISVTX:
        return f"others may write in {shown(directory)} (mode {mode:o}), and replace what is in it"
    return None


def _not_ours(directory: str) -> str | None:
    try:
        status = os.lstat(directory)
    except OSError:
        return None
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISDIR(status.st_mode):
        return f"{shown(directory)} is not a directory"
    if is_bare(directory):
        return f"{shown(directory)} belongs to root: mount its disk, or give it to who runs caxev"
    if status.st_uid != os.geteuid():
        return f"{shown(directory)} belongs to another user: give it to the one that runs caxev"
    if mode & _OTHERS_WRITE:
        return f"others may write in {shown(directory)} (mode {mode:o}): chmod go-w it"
    return None


def is_bare(directory: str) -> bool:
    """Return whether a directory is root's and we are not, as a mount point without its disk."""
    try:
        return os.lstat(directory).st_uid == 0 and os.geteuid() != 0
    except OSError:
        return False


def lies_in(path: str, directories: Iterable[str]) -> str | None:
    """Return the first of these directories that `path` is, or lies in, links resolved; or None."""
    real = os.fsencode(os.path.realpath(path))
    for directory in directories:
        other = os.fsencode(os.path.realpath(directory))
        if real == other or inside(real, other):
            return directory
    return None
