"""Translate the errors of this machine's disk into `Retry` and `GiveUp`."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from caxev.core.errors import Damaged, Denied, GiveUp, Retry
from caxev.files.paths import printable

BUSY_AFTER: Final = 5.0
"""Seconds after which what another process holds is tried again."""
_FULL: Final = {errno.ENOSPC, errno.EDQUOT}
_REFUSED: Final = {errno.EACCES, errno.EPERM, errno.EROFS}


class Replaced(Retry):
    """Something else is at that path by now, and stays as it is."""


def damaged(path: bytes, where: str) -> Damaged:
    """Return the error for a damaged file of a copy; the path ``b""`` is the copy itself."""
    name = printable(path) or "the file"
    return Damaged(f"the source is damaged: {name} in {where} is not what it was")


def gone(where: str) -> GiveUp:
    """Return the error for a source that is not there."""
    return GiveUp(f"source directory gone: {where}")


def changed(where: str) -> Retry:
    """Return the error for a source that changed during a copy."""
    return Retry(f"{where} changed while it was copied")


@contextmanager
def local(path: bytes, doing: str) -> Iterator[None]:
    """Turn the OSErrors of a block into those of `meaning`, naming the path."""
    try:
        yield
    except FileNotFoundError as exc:
        raise Retry(f"{printable(path)} vanished meanwhile") from exc
    except OSError as exc:
        raise meaning(exc, f"cannot {doing} {printable(path)}") from exc


def meaning(error: OSError, what: str) -> Retry | GiveUp:
    """Return the `Retry` or `GiveUp` for an error of this machine's disk; `what` failed.

    `Denied` if somebody must make room or grant access, `GiveUp` for a name that is too long.
    """
    why = f"{what}: {error.strerror}"
    if error.errno in _FULL:
        return Denied(f"disk full: {why}")
    if error.errno in _REFUSED:
        return Denied(why)
    return GiveUp(why) if error.errno == errno.ENAMETOOLONG else Retry(why)
