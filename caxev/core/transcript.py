"""What programs printed, compressed to be kept with a reaction. Pure."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Final

KEPT: Final = 512 << 10
"""Bytes, compressed, that are kept with a reaction of what `Job.keep` is given at once."""


KEPT_PARTS: Final = 16
"""So often, the latest of it: together that fits into one document of the ledger."""


def packed(said: str) -> bytes:
    """Compress text to `KEPT` bytes at most; of more, the middle is left out, which it then says.

    Pure.
    """
    whole = said.encode(errors="backslashreplace")
    done, ends = zlib.compress(whole), len(whole)
    while len(done) > KEPT:
        ends //= 2
        head, tail = whole[: ends // 2], whole[-(ends // 2) :]
        left_out = len(whole) - len(head) - len(tail)
        done = zlib.compress(head + b"\n[... %d bytes left out ...]\n" % left_out + tail)
    return done


def unpacked(parts: Sequence[bytes], number: int) -> str:
    """Return the text of parts that are kept of `number`, one after the other. Pure."""
    texts = [zlib.decompress(part).decode(errors="replace") for part in parts]
    lost = number - len(texts)
    return "\n".join([f"[... {lost} earlier parts left out ...]"] * (lost > 0) + texts)
