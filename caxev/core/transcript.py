"""The output of programs, compressed to be kept with a reaction. Pure."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Final

KEPT: Final = 512 << 10
"""Compressed bytes that one call of `Job.keep` keeps."""
KEPT_PARTS: Final = 16
"""The latest calls that are kept: together they fit into one document of the ledger."""
READ: Final = 16 << 20
"""Bytes of a part that `last_of` reads: packed, they can be a thousandth of that."""
_CHUNK: Final = 1 << 18


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


def last_of(parts: Sequence[bytes], number: int, most: int) -> str:
    """Return the last `most` characters, or nearly, of what is kept of `number` parts.

    Anybody may have written the parts: they are read in little memory, and up to a limit.
    """
    text = "\n".join(_end_of(part, most) for part in parts)
    is_whole = len(text) <= most and number <= len(parts)
    return text if is_whole else f"[... earlier output left out ...]\n{text[-most:]}"


def _end_of(part: bytes, most: int) -> str:
    reader, data, end, read = zlib.decompressobj(), part, bytearray(), 0
    try:
        while data and not reader.eof:
            if read > READ:
                return "[... more than is shown ...]"
            some = reader.decompress(data, _CHUNK)
            end, read, data = (end + some)[-4 * most :], read + len(some), reader.unconsumed_tail
    except zlib.error:
        return "[unreadable]"
    return end.decode(errors="replace")
