"""Count the bytes of a transfer or of a reading, and report them.

The only progress counter of movers, of the catalogue's uploads and of ``caxev receive``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Final, TypeAlias

from attrs import define, field, frozen

from caxev.files.manifest import Manifest

if TYPE_CHECKING:
    from caxev.files.plan import Plan
    from caxev.files.tree import Seen

Report: TypeAlias = Callable[[int, int], None]
"""Called as ``report(done, total)``, in bytes."""

_REPORT_EVERY: Final = 0.2  # seconds


def to_nobody(_done: int, _total: int) -> None:
    """Report to nobody."""


@frozen
class Moved:
    """The summary of a transfer of `files` files, of `bytes_total` bytes, in so many seconds.

    `bytes_sent` excludes bytes that an earlier attempt had moved, and those of links and reflinks.
    `manifest` has the BLAKE3 of the bytes as they passed; None if some were there before, or if
    another program moved them.
    """

    bytes_total: int
    bytes_sent: int
    files: int
    seconds: float
    manifest: Manifest | None = field(default=None, repr=False)


@define(eq=False)
class Meter:
    """Count bytes from any thread, and report the count a few times a second.

    Before each report it calls `guard`; an error that `guard` raises ends the move.
    """

    report: Report
    total: int
    done: int = 0
    sent: int = 0
    guard: Callable[[], object] = field(default=lambda: None, kw_only=True)
    _began: float = field(factory=time.monotonic, init=False)
    _last: float = field(default=0.0, init=False)
    _lock: Lock = field(factory=Lock, init=False, repr=False)

    @classmethod
    def of(cls, source: Iterable[Seen], report: Report) -> Meter:
        """Return a meter for a copy of `source`."""
        return cls(report, sum(seen.size for seen in source))

    def left(self, todo: Plan) -> None:
        """Set the count from the plan: all that it does not list is done."""
        self.done = self.total - todo.left

    def add(self, count: int) -> None:
        """Count bytes that were moved."""
        with self._lock:
            self.sent += count
            self._at(self.done + count)

    def shared(self, count: int) -> None:
        """Count bytes that arrived without being moved (reflinks, hard links)."""
        with self._lock:
            self._at(self.done + count)

    def at(self, done: int) -> None:
        """Set the number of bytes that have arrived in all."""
        with self._lock:
            self._at(done)

    def _at(self, done: int) -> None:
        # rsync's count starts at 0 and includes bytes that it found there: keep ours monotonic,
        # and never above the total.
        self.done = max(self.done, min(done, self.total))
        now = time.monotonic()
        if now - self._last >= _REPORT_EVERY or self.done >= self.total:
            self._last = now
            self.guard()
            self.report(self.done, self.total)

    def moved(self, source: Sequence[Seen], manifest: Manifest | None = None) -> Moved:
        """Report completion, and return the summary of the move."""
        self.report(self.total, self.total)
        files = sum(seen.kind == "file" for seen in source)
        return Moved(self.total, self.sent, files, time.monotonic() - self._began, manifest)
