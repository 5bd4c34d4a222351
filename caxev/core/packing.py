"""Packing: a snapshot as few bytes, as the ledger keeps one for each site and run. Pure.

The format: JSON, a list of ``[*aspect, value]``, as a raw deflate stream (RFC 1951) whose preset
dictionary is `_COMMON`. So a run with five copies takes some 120 bytes.
"""

from __future__ import annotations

import json
import zlib
from functools import lru_cache
from json.encoder import encode_basestring_ascii
from typing import Any, Final

from caxev.core.ledger import aspect_from
from caxev.core.model import Aspect, Snapshot

_COMMON: Final = (
    b'"requested","error","deleting","minitrees",null,"verifying@17"],["processed",null,'
    b'"transferring@17"],["yes"],["raw",null,"transferred@17"]]'
)
"""Texts that most snapshots contain, the most frequent last. A change makes all snapshots
unreadable: the ledger's schema must change with it."""
_WINDOW: Final = -10
"""log2 of the window, negative for a raw stream. With a small one, packing takes 12 µs, not 50."""
_MEMORY: Final = 4
_MOST: Final = 1 << 26
"""Bytes of JSON in one snapshot: beyond that it is not one of ours."""
_ASPECTS: Final = 4096
"""Aspects that are kept in memory: most runs have the same ones."""


def pack(snapshot: Snapshot) -> bytes:
    """Return a snapshot as the ledger keeps it."""
    rows = [f"{_head(aspect)}{encode_basestring_ascii(one)}]" for aspect, one in snapshot.items()]
    text = f"[{','.join(rows)}]".encode()
    packer = zlib.compressobj(6, zlib.DEFLATED, _WINDOW, _MEMORY, zlib.Z_DEFAULT_STRATEGY, _COMMON)
    return packer.compress(text) + packer.flush()


@lru_cache(_ASPECTS)
def _head(aspect: Aspect) -> str:
    """Return the beginning of an aspect's row, as JSON: ``["raw","lngs",null,``."""
    return json.dumps([*aspect, ""], separators=(",", ":")).removesuffix('""]')


def unpack(packed: bytes) -> dict[Aspect, str]:
    """Return the snapshot that `pack` packed. Raises ValueError if these are not such bytes."""
    unpacker = zlib.decompressobj(_WINDOW, _COMMON)
    try:
        rows = json.loads(unpacker.decompress(packed, _MOST).decode())
        if not unpacker.eof or not isinstance(rows, list):
            raise ValueError("it is not a packed snapshot")
        return dict(map(_aspect_and_value, rows))
    # TypeError: an aspect that is not hashable.
    except (zlib.error, RecursionError, TypeError) as error:
        raise ValueError(f"it cannot be unpacked: {error}") from error


def _aspect_and_value(row: Any) -> tuple[Aspect, str]:
    if not isinstance(row, list) or not row or type(row[-1]) is not str:
        raise ValueError(f"{row!r} is no aspect with its value")
    return _aspect(*row[:-1]), row[-1]


@lru_cache(_ASPECTS)
def _aspect(*row: Any) -> Aspect:
    return aspect_from([*row])
