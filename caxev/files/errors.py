"""What this machine's disk raises, in our own words."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from caxev.files.paths import printable
from caxev.job import Damaged, Retry

_FULL: Final = {errno.ENOSPC, errno.EDQUOT}


def damaged(path: bytes, where: str) -> Damaged:
    """Name the file of the copy at `where` that is not what it was; ``b""`` is the copy itself."""
    name = printable(path) or "the file"
    return Damaged(f"the source is damaged: {name} in {where} is not what it was")


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
