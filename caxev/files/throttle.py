"""Move bytes without slowing others down: at a limited rate, and with idle disk priority.

The only rate limit: of readers, of movers, and of the patrol's worker processes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock

from attrs import define, field


@define(eq=False)
class RateLimiter:
    """Limit to a rate in bytes a second (None: no limit); threads may share one.

    Idle time is not saved up: after a pause the rate still holds.
    """

    rate: float | None
    _free_at: float = field(init=False, factory=time.monotonic)
    _lock: Lock = field(init=False, factory=Lock)

    def passed(self, count: int) -> None:
        """Count bytes that have passed, and sleep until they are due."""
        if self.rate is None:
            return
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at + count / self.rate, now)
            wait = self._free_at - now
        time.sleep(wait)  # outside of the lock: others must be able to queue behind us

    def take(self, count: int) -> float:
        """Return 0 and count the bytes if they may pass now; else the seconds to wait."""
        if self.rate is None:
            return 0.0
        with self._lock:
            now = time.monotonic()
            if self._free_at > now:
                return self._free_at - now
            self._free_at = now + count / self.rate
            return 0.0

    def chunk(self, most: int, least: int) -> int:
        """Return how many bytes to move at once, from `least` to `most`.

        That is what the rate allows in a quarter of a second, for a smooth flow.
        """
        return most if self.rate is None else max(least, min(most, int(self.rate / 4)))


@contextmanager
def idle_disk() -> Iterator[None]:
    """Use the disk only while no other process does, for the length of a block.

    By ioprio_set(2), class idle. Without effect if the kernel, or its I/O scheduler, has none.
    """
    import psutil  # not above: it would delay the start of every `caxev receive`

    process = psutil.Process()
    before = None
    with suppress(AttributeError, OSError, psutil.Error):
        before = process.ionice()
        # The priority of this thread alone: threads that read inherit it, as the block starts them.
        process.ionice(psutil.IOPRIO_CLASS_IDLE)
    try:
        yield
    finally:
        if before is not None:
            with suppress(OSError, psutil.Error):
                process.ionice(before.ioclass, before.value or None)
