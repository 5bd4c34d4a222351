"""Compute the digests of a tree or a file: one read, on all cores. Runs in a worker process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

from caxev.core.errors import Retry
from caxev.files.confined import Confined
from caxev.files.manifest import PART, Item, Manifest, Range, item_digest, wrong_ranges
from caxev.files.meter import Report
from caxev.files.paths import confine, printable
from caxev.files.reading import Hash, Stretch, read_all, stretches
from caxev.files.throttle import idle_disk
from caxev.files.tree import Seen, look, manifest_of


def digest_tree(
    root: Confined,
    *,
    sha512: bool,
    threads: int | None = None,
    max_rate: float | None = None,
    report: Report,
    also: Callable[[Seen], Sequence[Hash]] = lambda _seen: (),
) -> Manifest:
    """Return the manifest of the copy at `root`; with `sha512` that digest of each file, too.

    The bytes of a file are fed to the hashes that `also` returns for it, too.

    Each file is read once, from the disk and not from the cache (see `uncached`), by `threads`
    threads (default: one a core), at `max_rate` bytes a second at most. Memory stays below 5 MiB a
    thread. Raises `GiveUp` as `scan` does; `Retry` if a file cannot be read, or anything in the
    tree changes meanwhile. Leaves nothing behind, however it ends.
    """
    before = look(root)
    files = [_wanted(s, also(s), sha512) for s in before if s.kind == "file"]
    read_all(root, [one for file in files for one in file], threads, report, max_rate)
    if look(root) != before:
        raise Retry(f"{printable(root)} changed while it was read")
    rest = [item for item in manifest_of(before).items if item.kind != "file"]
    return Manifest([*map(_item, files), *rest])


def digest_copy(
    location: str,
    roots: tuple[str, ...],
    sha512: bool,
    gently: bool = False,
    max_rate: float | None = None,
    *,
    report: Report,
) -> Manifest:
    """Make the manifest of the copy at `location`, which must be inside one of `roots`.

    `max_rate` in bytes a second; with `gently` by one thread, at idle disk priority.

    Here, and not beside the handler that asks for it: a worker process would import all that a
    handler needs, which takes longer than its own start.
    """
    path, threads = confine(location, roots), 1 if gently else None
    with idle_disk() if gently else nullcontext():
        return digest_tree(path, sha512=sha512, threads=threads, max_rate=max_rate, report=report)


def _wanted(seen: Seen, also: Sequence[Hash], sha512: bool) -> list[Stretch]:
    # SHA-512 and the like are chains over the whole file, so one thread takes all of it. BLAKE3 is
    # kept for each part, so several threads can share a file.
    if sha512 or also:
        return [Stretch(seen, 0, seen.size, sha512, also)]
    return stretches(seen, seen.size)


def _item(file: Sequence[Stretch]) -> Item:
    """Return the manifest's item for one file that was read."""
    blake3, parts = item_digest([digest for one in file for digest in one.part_digests])
    seen = file[0].seen
    return Item(seen.path, "file", seen.size, blake3, file[0].sha512_digest, parts=parts)


def _whole_parts(seen: Seen, size: int) -> list[Stretch]:
    """Return the parts that a file has completely, if its final size is `size`."""
    return stretches(seen, size if seen.size >= size else seen.size // PART * PART)


def wrong_below(
    root: Confined, found: Sequence[Seen], items: Mapping[bytes, Item], report: Report
) -> dict[bytes, list[Range]]:
    """Return, for each of these files below `root`, the byte ranges that differ from its item.

    Ranges consist of whole parts, neighbours joined; bytes beyond an item's size do not count.
    Every item's digests must be known. Raises `Retry` if a file cannot be read, or changes
    meanwhile.
    """
    # Through the cache: this checks what was transferred, which is mostly still in memory. The disk
    # itself is checked later, by a verification that bypasses the cache.
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
