"""This machine's side of a move, as the movers that run in it have it in common."""

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
    """Counts bytes from any thread, and passes the count on a few times a second.

    At the same times `guard` is called, whose errors break the move off.
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
        """Begin to count what becomes a copy of `source`."""
        return cls(report, sum(seen.size for seen in source))

    def left(self, todo: Plan) -> None:
        """So much of it is left to do."""
        self.done = self.total - todo.left

    def add(self, count: int) -> None:
        """So many bytes more have been moved."""
        with self._lock:
            self.sent += count
            self._at(self.done + count)

    def shared(self, count: int) -> None:
        """So many bytes more are there, and were not moved."""
        with self._lock:
            self._at(self.done + count)

    def at(self, done: int) -> None:
        """So many bytes are there in all."""
        with self._lock:
            self._at(done)

    def _at(self, done: int) -> None:
        self.done = max(self.done, min(done, self.total))
        now = time.monotonic()
        if now - self._last >= _REPORT_EVERY:
            self._last = now
            self.guard()
            self.report(self.done, self.total)

    def moved(self, source: Sequence[Seen]) -> Moved:
        """Say that all is there, and what it was."""
        self.report(self.total, self.total)
        files = sum(seen.kind == "file" for seen in source)
        return Moved(self.total, self.sent, files, time.monotonic() - self._began)


def look_here(path: str, roots: Sequence[str]) -> tuple[str, list[Seen]]:
    """The real path of a copy here, inside one of `roots`, and what it holds.

    Raises `GiveUp` where it is gone, leads out of the roots or holds what a copy must not.
    """
    real = confine(path, roots)
    if not os.path.lexists(real):
        raise GiveUp(f"source directory gone: {shown(real)}")
    return real, look(real)


def check_content(root: str, expected: Manifest | None, source: str) -> None:
    """Raise `Damaged` unless the files below `root` hold what they must, as far as that is known.

    For movers that hand bytes on without seeing them: `root` is what they have written, or if that
    is far away what they have read. `source` is named in the error.
    """
    items = known_items(expected)
    found = [seen for seen in look(root) if seen.path in items]
    wrong = wrong_below(os.fsencode(root), found, items, to_nobody)
    for path, ranges in wrong.items():
        if ranges:
            raise damaged(path, source)


def changed(where: str) -> Retry:
    """What to raise where a source is not what it was."""
    return Retry(f"{where} changed while it was copied")
