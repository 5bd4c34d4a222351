"""The digests of a file's parts, taken as its bytes pass. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import define, field
from blake3 import blake3

from caxev.files.manifest import PART

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


@define(eq=False)
class PartDigest:
    """The BLAKE3 of each part of a file whose bytes are fed in their order.

    They may begin at any part's first byte. `item_digest` makes of all parts what an `Item` has.
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
        """The digests of the parts so far, in turn; the last may be of an unfinished one."""
        return [*self._whole, self._part.digest()] if self._filled else self._whole.copy()
