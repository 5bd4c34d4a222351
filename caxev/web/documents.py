"""Read what the page shows of a run's document; any content is accepted. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from caxev.core.entry import count, mapping, rows, text
from caxev.core.model import CopyKey


def label_of(document: Mapping[str, Any]) -> str:
    """Return what people call a run: its number, else its name, else its id."""
    number, name = count(document.get("number")), text(document.get("name"))
    return f"run {number}" if number else name or str(document.get("_id"))


def entries_of(document: Mapping[str, Any], name: str = "data") -> Iterator[Mapping[str, Any]]:
    """Return the objects in a list of the document: the entries of its copies."""
    return filter(None, map(mapping, rows(document.get(name))))


def key_of(entry: Mapping[str, Any]) -> CopyKey | None:
    """Return the key of an entry; None if it names no type or host."""
    kind, host = text(entry.get("type")), text(entry.get("host"))
    if kind is None or host is None:
        return None
    return CopyKey(kind, host, text(entry.get("pax_version")))


def size_of(document: Mapping[str, Any], entry: Mapping[str, Any]) -> int:
    """Return the bytes of a copy, 0 if unknown; for raw data the run's document has them."""
    size = count(entry.get("size"))
    if size is None and entry.get("type") == "raw":
        size = count(document.get("raw_size_byte"))
    return size or 0
