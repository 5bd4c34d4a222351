"""Compute the digests of a file's parts as its bytes pass. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import define, field
from blake3 import blake3

from caxev.files.manifest import PART

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


@define(eq=False)
class PartDigest:
    """Compute the BLAKE3 of each part of a file from its bytes, fed in their order.

    They may begin at the first byte of any part. `item_digest` turns the parts' digests into those
    of an `Item`.
    """

    _whole: list[bytes] = field(factory=list, init=False)
    _part: blake3 = field(factory=blake3, init=False)
    _filled: int = field(default=0, init=False)

    def update(self, data: ReadableBuffer, /) -> None:
        """Take the next bytes, which may end anywhere."""
        rest = memoryview(data).cast("B")
        while rest:
            now = rest[: PART - self._filled]
            self._part.update(now)
            self._filled += len(now)
            rest = rest[len(now) :]
            if self._filled == PART:
                self._whole.append(self._part.digest())
                self._part, self._filled = blake3(), 0

    def parts(self) -> list[bytes]:
        """Return the digests (32 bytes each) of the parts so far; the last may be unfinished."""
        return [*self._whole, self._part.digest()] if self._filled else self._whole.copy()
