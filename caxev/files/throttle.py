"""Reading so that nobody is held up by it: at a rate, and after everybody else's reads and writes.

Used by `digest` and by what the patrol runs in a worker process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Lock

from attrs import define, field


@define(eq=False)
class RateLimiter:
    """Holds bytes back to a rate in bytes a second (None: no limit); threads may share one."""

    rate: float | None
    _free_at: float = field(init=False, factory=time.monotonic)
    _lock: Lock = field(init=False, factory=Lock)

    def passed(self, count: int) -> None:
        """Sleep until as many bytes more may pass as have passed now."""
        if self.rate is None:
            return
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + count / self.rate
            wait = self._free_at - now
        time.sleep(wait)


@contextmanager
def idle_disk() -> Iterator[None]:
    """Let every other process's use of the disk come first, for the length of a block.

    Where the system has no such thing, nothing changes.
    """
    import psutil  # here: every `caxev receive` would wait for it

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
