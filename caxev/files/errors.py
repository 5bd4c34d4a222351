"""What this machine's disk raises, in our own words."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from caxev.files.paths import printable
from caxev.job import GiveUp, Retry

_FULL: Final = {errno.ENOSPC, errno.EDQUOT}


class Damaged(GiveUp):
    """The source is not what its manifest says: this copy must be had from elsewhere."""


@contextmanager
def local(path: bytes, doing: str) -> Iterator[None]:
    """Turn what this machine's disk raises into `Retry`, naming the path."""
    try:
        yield
    except FileNotFoundError as exc:
        raise Retry(f"{printable(path)} vanished meanwhile") from exc
    except OSError as exc:
        if exc.errno in _FULL:
            raise Retry(f"disk full at {printable(path)}: {exc.strerror}") from exc
        raise Retry(f"cannot {doing} {printable(path)}: {exc.strerror}") from exc
