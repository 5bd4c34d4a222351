"""The digests of a copy's bytes as they pass. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from caxev.files import PART, Item, Manifest, Seen, damaged, item_digest, known_items, manifest_of

Digests = dict[bytes, dict[int, list[bytes]]]
"""The BLAKE3 of parts, by the file's path and the piece's first byte."""


def check_digests(digests: Digests, expected: Manifest | None, where: str) -> None:
    """Raise `Damaged` if the bytes that passed do not match the manifest."""
    items = known_items(expected)
    for path, stretches in digests.items():
        wanted = (path in items and items[path].part_digests()) or None
        for start, parts in stretches.items():
            first = start // PART
            if wanted and list(parts) != list(wanted[first : first + len(parts)]):
                raise damaged(path, where)


def assembled(
    source: Sequence[Seen], digests: Digests, expected: Manifest | None = None
) -> Manifest | None:
    """Return the manifest of the copy; None if it has earlier bytes whose digest is unknown."""
    known = known_items(expected)
    items: list[Item] = []
    for item in manifest_of(source).items:
        if item.kind != "file":
            items.append(item)
        elif item.path in known:
            items.append(known[item.path])
        elif (parts := _all_parts(item.size, digests.get(item.path, {}))) is not None:
            digest, several = item_digest(parts)
            items.append(Item(item.path, "file", item.size, digest, parts=several))
        else:
            return None
    return Manifest(items)


def _all_parts(size: int, stretches: Mapping[int, list[bytes]]) -> list[bytes] | None:
    parts: list[bytes] = []
    for start in sorted(stretches):
        if start != len(parts) * PART:
            return None
        parts += stretches[start]
    return parts if stretches and len(parts) == -(-size // PART) else None
