"""Try the cheap ways of copying a file, which not every file system offers."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Callable
from typing import Final, ParamSpec

P = ParamSpec("P")

_FICLONE: Final = 0x40049409
CANNOT: Final = {
    errno.EXDEV,
    errno.EOPNOTSUPP,
    errno.ENOTTY,
    errno.ENOSYS,
    errno.EINVAL,
    errno.EPERM,
    errno.EMLINK,
}
"""Errors with which the kernel refuses a way of copying these two files; another may work."""


def tried(function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> bool:
    """Call a function; return False if the kernel refuses that way. Raises any other OSError."""
    try:
        function(*args, **kwargs)
    except OSError as exc:
        if exc.errno in CANNOT:
            return False
        raise
    return True


def cloned(reading: int, writing: int) -> bool:
    """Reflink one open file to the other if the file system can; return whether it did."""
    return tried(lambda: fcntl.ioctl(writing, _FICLONE, reading))
