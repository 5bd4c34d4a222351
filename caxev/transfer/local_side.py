"""Read and check this machine's side of a move; shared by all movers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Final

from attrs import define, field

from caxev.core.errors import GiveUp, Retry
from caxev.files import (
    Manifest,
    Moved,
    Plan,
    Seen,
    confine,
    damaged,
    known_items,
    look,
    shown,
    to_nobody,
    wrong_below,
)

_REPORT_EVERY: Final = 0.2  # seconds


@define
class Meter:
    """Count bytes from any thread, and report the count a few times a second.

    Before each report it calls `guard`; an error that `guard` raises ends the move.
    """

    report: Callable[[int, int], None]
    total: int
    done: int = 0
    sent: int = 0
    guard: Callable[[], object] = field(default=lambda: None, kw_only=True)
    _began: float = field(factory=time.monotonic)
    _last: float = 0.0
    _lock: Lock = field(factory=Lock)

    @classmethod
    def of(cls, source: Sequence[Seen], report: Callable[[int, int], None]) -> Meter:
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
        if now - self._last >= _REPORT_EVERY:
            self._last = now
            self.guard()
            self.report(self.done, self.total)

    def moved(self, source: Sequence[Seen]) -> Moved:
        """Report completion, and return the summary of the move."""
        self.report(self.total, self.total)
        files = sum(seen.kind == "file" for seen in source)
        return Moved(self.total, self.sent, files, time.monotonic() - self._began)


def look_here(path: str, roots: Sequence[str]) -> tuple[str, list[Seen]]:
    """Return the real path of a copy here, inside one of `roots`, and its listing.

    Raises `GiveUp` if it is gone, leads out of the roots or holds what a copy must not.
    """
    real = confine(path, roots)
    if not os.path.lexists(real):
        raise GiveUp(f"source directory gone: {shown(real)}")
    return real, look(real)


def check_content(root: str, expected: Manifest | None, source: str) -> None:
    """Raise `Damaged` unless the files below `root` match `expected`, if that is known.

    For movers that delegate the copying and never see the bytes: `root` is what they have written,
    or, if that is on another machine, what they have read. The error names `source`.
    """
    items = known_items(expected)
    found = [seen for seen in look(root) if seen.path in items]
    wrong = wrong_below(os.fsencode(root), found, items, to_nobody)
    for path, ranges in wrong.items():
        if ranges:
            raise damaged(path, source)


def changed(where: str) -> Retry:
    """Return the error for a source that changed during the move."""
    return Retry(f"{where} changed while it was copied")
