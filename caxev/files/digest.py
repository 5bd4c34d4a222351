"""Reading a tree, or one file, once and across cores for its digests. Runs in a worker process."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from caxev.core.errors import Retry
from caxev.files.manifest import PART, Item, Manifest, Range, item_digest, wrong_ranges
from caxev.files.paths import printable
from caxev.files.reading import Report, Stretch, read_all, stretches
from caxev.files.tree import Seen, look, manifest_of


def digest_tree(
    root: str,
    *,
    sha512: bool,
    blake3: bool = True,
    threads: int | None = None,
    max_rate: float | None = None,
    report: Report,
) -> Manifest:
    """The manifest of the copy at `root` with those digests of each file that are wanted.

    Each file is read once, from the disk and not from the cache (see `uncached`), by `threads`
    threads (default: one a core): with `sha512` a file by one of them, else the parts of one also
    by several. Memory stays below 5 MiB a thread. At most `max_rate` bytes a second are read.
    Raises `GiveUp` as `scan` does; `Retry` where a file cannot be read, or anything in the tree
    changes meanwhile. Leaves nothing behind, however it ends.
    """
    before = look(root)
    files = [_wanted(s, sha512=sha512, blake3=blake3) for s in before if s.kind == "file"]
    read_all(os.fsencode(root), [one for file in files for one in file], threads, report, max_rate)
    if look(root) != before:
        raise Retry(f"{printable(os.fsencode(root))} changed while it was read")
    rest = [item for item in manifest_of(before).items if item.kind != "file"]
    return Manifest([*map(_item, files), *rest])


def _wanted(seen: Seen, *, sha512: bool, blake3: bool) -> list[Stretch]:
    if sha512 or not blake3:
        return [Stretch(seen, 0, seen.size, blake3=blake3, sha512=sha512)]
    return stretches(seen, seen.size)


def _item(file: Sequence[Stretch]) -> Item:
    """What was read of one file."""
    first = file[0]
    digests = [digest for one in file for digest in one.part_digests]
    blake3, parts = item_digest(digests) if first.blake3 else (None, b"")
    seen = first.seen
    return Item(seen.path, "file", seen.size, blake3, first.sha512_digest, parts=parts)


def _whole_parts(seen: Seen, size: int) -> list[Stretch]:
    """What a file has wholly of the parts that it has where its size is `size`."""
    return stretches(seen, size if seen.size >= size else seen.size // PART * PART)


def wrong_below(
    root: bytes, found: Sequence[Seen], items: Mapping[bytes, Item], report: Report
) -> dict[bytes, list[Range]]:
    """The bytes of each of these files below `root` that are not what its item says, in order.

    Those of whole parts, neighbours joined; what is there beyond an item's size does not count.
    Every item's digests must be known. What the cache has is not read from the disk: this is about
    what has passed, and proves nothing of the disk. Raises `Retry` if a file cannot be read, or
    changes meanwhile.
    """
    todo = {seen.path: _whole_parts(seen, items[seen.path].size) for seen in found}
    reading = [one for file in todo.values() for one in file if one.size]
    if reading:
        read_all(root, reading, None, report, cached=True)
    return {
        path: wrong_ranges(
            items[path].size,
            items[path].part_digests() or (),
            [digest for one in file for digest in one.part_digests],
        )
        for path, file in todo.items()
    }


def to_nobody(_done: int, _total: int) -> None:
    """Report to nobody."""
