"""One process of this machine at a time."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from blake3 import blake3

from caxev.core.errors import Retry

_BUSY_AFTER: Final = 5.0
"""Seconds after which a place that another process holds is tried again."""


@contextmanager
def process_lock(key: bytes, busy: str) -> Iterator[None]:
    """Keep other processes of this machine from what `key` names; raises `Retry`, saying `busy`.

    A name in Linux's abstract socket namespace is free again when its holder dies, and leaves
    no file behind.
    """
    with socket.socket(socket.AF_UNIX) as lock:
        try:
            lock.bind(f"\0caxev-{blake3(key).hexdigest()}")
        except OSError as exc:
            raise Retry(busy, after=_BUSY_AFTER) from exc
        yield
