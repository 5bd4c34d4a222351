"""Read files, and the rows of an answer, up to a limit.

A secrets file that is `/dev/zero`, or a server that never stops sending, must not fill the memory.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, TypeVar

T = TypeVar("T")

CONFIGURATION: Final = 16 << 20
"""Bytes of a configuration file: sites, rules, handlers, known hosts."""
SECRET: Final = 64 << 10
"""Bytes of a file that holds a secret, or a URI with one."""
ROWS: Final = 1_000_000
"""Rows of one listing; a run has some ten thousand files."""


def read_limited(path: str | Path, limit: int) -> bytes:
    """Return the content of a file. Raises OSError, also for more than `limit` bytes."""
    with Path(path).open("rb") as file:
        # One byte more than allowed shows that there is more; st_size of /dev/zero is 0.
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit:,} bytes", str(path))
    return content


def rows_limited(rows: Iterable[T]) -> Iterator[T]:
    """Yield rows as they come. Raises ValueError if there are more than `ROWS`."""
    for number, row in enumerate(rows):
        if number >= ROWS:
            raise ValueError(f"more than {ROWS:,} rows")
        yield row
