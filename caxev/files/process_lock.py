"""Let one process of this machine at a time do something."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

from blake3 import blake3

from caxev.core.errors import Retry
from caxev.files.errors import BUSY_AFTER


@contextmanager
def process_lock(key: bytes, busy: str) -> Iterator[None]:
    """Hold the lock named `key` on this machine. Raises `Retry` with the text `busy`."""
    # A name in Linux's abstract socket namespace is free again when its holder dies, however that
    # happens, and leaves no file behind.
    with socket.socket(socket.AF_UNIX) as lock:
        try:
            lock.bind(f"\0caxev-{blake3(key).hexdigest()}")
        except OSError as exc:
            raise Retry(busy, after=BUSY_AFTER) from exc
        yield
