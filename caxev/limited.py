"""Read files, and the rows of an answer, up to a limit, and write files up to one.

A secrets file that is `/dev/zero`, or a server that never stops sending, must not fill the memory
or a disk.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

T = TypeVar("T")

CONFIGURATION: Final = 16 << 20
"""Bytes of a configuration file: sites, rules, handlers, known hosts."""
SECRET: Final = 64 << 10
"""Bytes of a file that holds a secret, or a URI with one."""
SMALL_FILES: Final = 16 << 20
"""Bytes up to which no file is refused: there may be others beside those that are fetched."""
ROWS: Final = 1_000_000
"""Rows of one listing; a run has some ten thousand files."""


def read_limited(path: str | Path, limit: int) -> bytes:
    """Return the content of a file. Raises OSError, also for more than `limit` bytes."""
    with open(path, "rb", opener=without_waiting) as file:  # has the opener
        # One byte more than allowed shows that there is more; st_size of /dev/zero is 0.
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit:,} bytes", str(path))
    return content


def without_waiting(path: str, flags: int) -> int:
    """Open a file, as `opener` of `open`: also a FIFO that nobody has open at its other end.

    Such a FIFO is empty; to write to it raises OSError. Of another one all is read.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    return descriptor


@contextmanager
def no_file_over(size: int) -> Iterator[None]:
    """Let this process write no file of more than `size` bytes inside the block.

    For libraries that write a file as long as a server sends: they get an OSError (EFBIG).
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, _within(size, *before))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def limit_files_of(process: int, size: int) -> None:
    """Let a program that has just been started, and what it starts, write no larger file."""
    before = resource.prlimit(process, resource.RLIMIT_FSIZE)
    resource.prlimit(process, resource.RLIMIT_FSIZE, _within(size, *before))


def _within(size: int, soft: int, hard: int) -> tuple[int, int]:
    given = [one for one in (soft, hard) if one != resource.RLIM_INFINITY]
    return min([max(size, SMALL_FILES), *given]), hard


def rows_limited(rows: Iterable[T]) -> Iterator[T]:
    """Yield rows as they come. Raises ValueError if there are more than `ROWS`."""
    for number, row in enumerate(rows):
        if number >= ROWS:
            raise ValueError(f"more than {ROWS:,} rows")
        yield row
