"""Read without slowing others down: at a limited rate, and with idle disk priority.

Used by `digest` and by the patrol's worker processes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock

from attrs import define, field


@define(eq=False)
class RateLimiter:
    """Limit reads to a rate in bytes a second (None: no limit); threads may share one."""

    rate: float | None
    _free_at: float = field(init=False, factory=time.monotonic)
    _lock: Lock = field(init=False, factory=Lock)

    def passed(self, count: int) -> None:
        """Count bytes, and sleep for the time that they take at the rate."""
        if self.rate is None:
            return
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + count / self.rate
            wait = self._free_at - now
        time.sleep(wait)  # outside of the lock: others must be able to queue behind us


@contextmanager
def idle_disk() -> Iterator[None]:
    """Use the disk only while no other process does, for the length of a block, if supported."""
    import psutil  # not above: it would delay the start of every `caxev receive`

    process = psutil.Process()
    before = None
    with suppress(AttributeError, OSError, psutil.Error):
        before = process.ionice()
        process.ionice(psutil.IOPRIO_CLASS_IDLE)
    try:
        yield
    finally:
        if before is not None:
            with suppress(OSError, psutil.Error):
                process.ionice(before.ioclass, before.value or None)
