"""Distribute the work of one copy among threads, span by span.

Shared by the threads that move the bytes and the event loop beside them.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from threading import Condition

from attrs import define, evolve, field

from caxev.files import PART, Piece


@define(eq=False)
class Chunks:
    """Hand out pieces, cut into spans of at most one `PART` of a file.

    With `ahead`, no span of a file ends more than that many bytes beyond the first missing byte. So
    an interrupted file is right, except for that many bytes at its end.
    """

    ahead: int | None
    _left: deque[Piece]
    _to_begin: int = field(init=False)
    _under_way: int = field(default=0, init=False)
    _spans: Counter[bytes] = field(factory=Counter, init=False)
    _begun: dict[bytes, set[int]] = field(factory=dict, init=False)
    _stopped: bool = field(default=False, init=False)
    _changed: Condition = field(factory=Condition, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        self._to_begin = sum(piece.left for piece in self._left)

    @classmethod
    def of(cls, pieces: Iterable[Piece], *, ahead: int | None = None) -> Chunks:
        """Return a chunks of these pieces, in this order if possible."""
        chunks = cls(ahead, deque(pieces))
        for piece in chunks._left:  # an empty file has one span too, or nobody would make it
            chunks._spans[piece.file.path] += max(1, -(-piece.left // PART))
        return chunks

    @property
    def finished(self) -> bool:
        """Return whether all has been moved."""
        return not self._spans

    def take(self, *, wait: bool, room: int = PART) -> Piece | None:
        """Return the next span; None if there is none now or, with `wait`, ever again.

        `room`: the size, in bytes, that the caller prefers not to exceed.
        """
        with self._changed:
            while not self._stopped and self._left:
                for place, piece in enumerate(self._left):
                    span = evolve(piece, stop=min(piece.start + PART, piece.stop))
                    if self._may_begin(span):
                        # Near the end, more in flight on one channel means that the others finish
                        # first and wait for it: give it only what it has room for.
                        if span.left > room and self._to_begin < self._under_way:
                            return None
                        self._begin(place, span)
                        return span
                if not wait:
                    break
                self._changed.wait()
            return None

    def _may_begin(self, span: Piece) -> bool:
        begun = self._begun.get(span.file.path)
        return self.ahead is None or not begun or span.stop <= min(begun) + self.ahead

    def _begin(self, place: int, span: Piece) -> None:
        piece = self._left[place]
        if span.stop < piece.stop:
            self._left[place] = evolve(piece, start=span.stop)
        else:
            del self._left[place]
        self._to_begin -= span.left
        self._under_way += span.left
        self._begun.setdefault(span.file.path, set()).add(span.start)

    def done(self, span: Piece) -> bool:
        """Record that a span has been moved; return whether it was the last of its file."""
        path = span.file.path
        with self._changed:
            self._under_way -= span.left
            self._begun[path].discard(span.start)
            self._spans[path] -= 1
            self._changed.notify_all()
            if self._spans[path]:
                return False
            del self._spans[path], self._begun[path]
            return True

    def pause(self, seconds: float) -> bool:
        """Wait `seconds`, or until something changes; return whether to continue at all."""
        with self._changed:
            if not self._stopped:
                self._changed.wait(seconds)
            return not self._stopped

    def stop(self) -> None:
        """Hand out no more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
