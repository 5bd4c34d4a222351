"""The output of programs, compressed to be kept with a reaction. Pure."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Final

KEPT: Final = 512 << 10
"""Compressed bytes that one call of `Job.keep` keeps."""
KEPT_PARTS: Final = 16
"""The latest calls that are kept: together they fit into one document of the ledger."""


def packed(text: str) -> bytes:
    """Compress text to at most `KEPT` bytes; if it is longer, a line replaces its middle."""
    whole = text.encode(errors="backslashreplace")
    done, ends = zlib.compress(whole), len(whole)
    while len(done) > KEPT:
        # Output compresses by an unknown factor, so halve until it fits: a few rounds at most.
        ends //= 2
        head, tail = whole[: ends // 2], whole[-(ends // 2) :]
        left_out = len(whole) - len(head) - len(tail)
        done = zlib.compress(head + b"\n[... %d bytes left out ...]\n" % left_out + tail)
    return done


def unpacked(parts: Sequence[bytes], number: int) -> str:
    """Return the text of the parts that are kept of `number`, one after the other."""
    texts = [zlib.decompress(part).decode(errors="replace") for part in parts]
    lost = number - len(texts)
    return "\n".join([f"[... {lost} earlier parts left out ...]"] * (lost > 0) + texts)
