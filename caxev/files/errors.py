"""What this machine's disk raises, in our own words."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from caxev.core.errors import Damaged, Denied, GiveUp, Retry
from caxev.files.paths import printable

_FULL: Final = {errno.ENOSPC, errno.EDQUOT}
_REFUSED: Final = {errno.EACCES, errno.EPERM, errno.EROFS}


class Replaced(Retry):
    """Something else than was meant stands there by now, and stays as it is."""


def damaged(path: bytes, where: str) -> Damaged:
    """Name the file of the copy at `where` that is not what it was; ``b""`` is the copy itself."""
    name = printable(path) or "the file"
    return Damaged(f"the source is damaged: {name} in {where} is not what it was")


@contextmanager
def local(path: bytes, doing: str) -> Iterator[None]:
    """Turn what this machine's disk raises into what `meaning` says, naming the path."""
    try:
        yield
    except FileNotFoundError as exc:
        raise Retry(f"{printable(path)} vanished meanwhile") from exc
    except OSError as exc:
        raise meaning(exc, f"cannot {doing} {printable(path)}") from exc


def meaning(error: OSError, what: str) -> Retry | GiveUp:
    """What an error of this machine's disk means to us; `what` could not be done.

    `Denied` where somebody must make room or let us, `GiveUp` for a name that is too long.
    """
    why = f"{what}: {error.strerror}"
    if error.errno in _FULL:
        return Denied(f"disk full: {why}")
    if error.errno in _REFUSED:
        return Denied(why)
    return GiveUp(why) if error.errno == errno.ENAMETOOLONG else Retry(why)
