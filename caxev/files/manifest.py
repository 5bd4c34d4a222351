"""Describe a copy by its items and their digests. Pure.

`scan`, `digest_tree` and the movers make a `Manifest`; handlers compare manifests and store them in
the database under their own digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import starmap
from operator import attrgetter
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from attrs import evolve, field, frozen, validators
from blake3 import blake3 as _blake3

from caxev.files.paths import printable

Kind: TypeAlias = Literal["file", "dir", "link"]
Range: TypeAlias = tuple[int, int]
"""Bytes of a file: the first one, and the first after it."""

KINDS: Final = ("file", "dir", "link")
_MOST_PARTS: Final = 6 << 20  # bytes; those of a file of 768 GiB. A BSON document has 16 MiB
PART: Final = 4 << 20
"""Bytes of a part: each is checked and fetched again alone; the last one may be shorter."""
_LENGTH: Final = 32  # bytes of a BLAKE3 digest
_EMPTY: Final = hashlib.sha512().hexdigest()
_HOPS: Final = 40  # links in a row that the kernel follows


@frozen
class Item:
    """One file, directory or link of a copy.

    `path` is relative to the copy's root, ``/``-separated; ``b""`` is the copy itself if that is a
    single file. `size` is in bytes, and 0 for all but files. `blake3` (32 bytes) and `sha512` (64)
    are None if they were not computed. `target` is the target of a link.

    The `blake3` of a file of at most one `PART` is that of its content; that of a larger file is
    computed over the BLAKE3 digests of its parts, which `parts` contains one after the other.
    """

    path: bytes
    kind: Kind = field(validator=validators.in_(KINDS))
    size: int = 0
    blake3: bytes | None = None
    sha512: bytes | None = None
    target: bytes = b""
    parts: bytes = b""

    def to_row(self) -> dict[str, Any]:
        """Return a document without empty fields, and without parts that would not fit into it."""
        row: dict[str, Any] = {"path": self.path, "kind": self.kind}
        # Without them the file, if it is bad, is fetched again as a whole.
        if len(self.parts) > _MOST_PARTS:
            return evolve(self, parts=b"").to_row()
        for name in ("size", "blake3", "sha512", "target", "parts"):
            if getattr(self, name):
                row[name] = getattr(self, name)
        return row

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Item:
        """Return the item of `to_row`."""
        return cls(**{name: row[name] for name in _FIELDS if row.get(name) is not None})

    def same(self, other: Item) -> bool:
        """Return whether both have the same content; without SHA-512, which either may lack."""
        return _content(self) == _content(other)

    def part_digests(self) -> list[bytes] | None:
        """Return the BLAKE3 of each part; None if unknown, or if `blake3` contradicts `parts`."""
        if self.blake3 is None:
            return None
        found = _cut(self.parts) if self.size > PART else [self.blake3] * (self.size > 0)
        known = len(found) == -(-self.size // PART) and item_digest(found)[0] == self.blake3
        return found if known else None


_FIELDS: Final = ("path", "kind", "size", "blake3", "sha512", "target", "parts")
_values: Final = attrgetter(*_FIELDS)
_content: Final = attrgetter("kind", "size", "blake3", "target")


def item_digest(parts: Sequence[bytes]) -> tuple[bytes, bytes]:
    """Return the `blake3` and the `parts` of a file, from the BLAKE3 of each part in turn.

    A digest has 32 bytes. Without a part (an empty file) `blake3` is that of no bytes.
    """
    joined = b"".join(parts)
    if len(parts) == 1:
        return joined, b""
    return _blake3(joined).digest(), joined


def _cut(parts: bytes) -> list[bytes]:
    return [parts[at : at + _LENGTH] for at in range(0, len(parts), _LENGTH)]


class Difference(NamedTuple):
    """A path in which a copy differs from its manifest."""

    path: bytes
    why: Literal["missing", "unexpected", "differs"]

    def __str__(self) -> str:
        return f"{printable(self.path) or 'the file'} {_SAID[self.why]}"


_SAID: Final = {"missing": "is missing", "unexpected": "is unexpected", "differs": "differs"}


def wrong_ranges(size: int, wanted: Sequence[bytes], found: Sequence[bytes]) -> list[Range]:
    """Return the parts of a file of `size` bytes that differ, neighbours joined.

    `wanted` and `found` are the digests of parts in turn; `found` may have more or fewer.
    """
    ranges: list[Range] = []
    for number, digest in enumerate(wanted):
        if number < len(found) and found[number] == digest:
            continue
        start, stop = number * PART, min((number + 1) * PART, size)
        if ranges and ranges[-1][1] == start:
            start = ranges.pop()[0]
        ranges.append((start, stop))
    return ranges


def _by_path(items: Iterable[Item]) -> tuple[Item, ...]:
    return tuple(sorted(items, key=lambda item: item.path))


@frozen
class Manifest:
    """The items of a copy, sorted by path. Every directory below the root is an item."""

    items: tuple[Item, ...] = field(converter=_by_path)

    @property
    def digest(self) -> str:
        """Return ``b3:<hex>``, which names this content, independent of modes, times and SHA-512.

        BLAKE3 over each item's kind, path, size, BLAKE3 and target in turn, each with its length.
        """
        # With the lengths no two lists of items give the same bytes.
        digest = _blake3(b"caxev manifest 1\n")
        for item in self.items:
            for part in _parts(item):
                digest.update(len(part).to_bytes(8, "big") + part)
        return f"b3:{digest.hexdigest()}"

    @property
    def files(self) -> tuple[Item, ...]:
        """The items that are files, by path."""
        return tuple(item for item in self.items if item.kind == "file")

    @cached_property
    def known_files(self) -> Mapping[bytes, Item]:
        """Return the files whose parts' digests are known, by path."""
        return {item.path: item for item in self.files if item.part_digests() is not None}

    @property
    def total_bytes(self) -> int:
        """The sizes of all files together."""
        return sum(item.size for item in self.items)

    def shape(self) -> Manifest:
        """Return the same without digests: what a listing of the tree shows."""
        return Manifest(Item(i.path, i.kind, i.size, target=i.target) for i in self.items)

    def differences(self, other: Manifest) -> tuple[Difference, ...]:
        """Return how `other`, a copy, differs from this one, by path.

        A digest that one side lacks is a difference: it proves nothing.
        """
        mine = {item.path: item for item in self.items}
        theirs = {item.path: item for item in other.items}
        return tuple(_differences(mine, theirs))

    def cax_checksum(self) -> str | None:
        """Return the SHA-512 that cax keeps in `checksum`, hex; None if a file's is unknown.

        For a single file it is the file's own; for a directory it is computed over the sorted hex
        digests of its files, as ``checksumdir.dirhash(path, "sha512")``. A link to a file counts as
        one more file of that content, a dangling link (or a circle) as an empty file; links to
        directories, and empty directories, do not count. Names do not enter, so that two swapped
        files go unnoticed; `digest` detects them.
        """
        files = {item.path: item for item in self.items if item.kind == "file"}
        if any(item.sha512 is None for item in files.values()):
            return None
        if b"" in files:
            return (files[b""].sha512 or b"").hex()
        return hashlib.sha512("".join(sorted(self._dirhash_digests())).encode()).hexdigest()

    def _dirhash_digests(self) -> Iterator[str]:
        known = {item.path: item for item in self.items}
        for item in self.items:
            end = _followed(item.path, known)
            if end is None:
                yield _EMPTY
            elif end.kind == "file":
                yield (end.sha512 or b"").hex()

    def to_rows(self) -> list[dict[str, Any]]:
        """Return one document for each item, for BSON; bytes stay bytes."""
        return [item.to_row() for item in self.items]

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> Manifest:
        """Return the manifest of `to_rows`."""
        return cls(Item.from_row(row) for row in rows)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as plain tuples: a manifest goes to a worker and back with every transfer."""
        return _unpickled, ([_values(item) for item in self.items],)


def _unpickled(items: Iterable[tuple[Any, ...]]) -> Manifest:
    return Manifest(starmap(Item, items))


def _parts(item: Item) -> tuple[bytes, ...]:
    size = item.size.to_bytes(8, "big")
    return (item.kind.encode(), item.path, size, item.blake3 or b"", item.target)


def _differences(mine: Mapping[bytes, Item], theirs: Mapping[bytes, Item]) -> Iterator[Difference]:
    for path in sorted(mine.keys() | theirs.keys()):
        if path not in theirs:
            yield Difference(path, "missing")
        elif path not in mine:
            yield Difference(path, "unexpected")
        elif not mine[path].same(theirs[path]):
            yield Difference(path, "differs")


_ROOT: Final = Item(b"", "dir")


def _followed(path: bytes, known: Mapping[bytes, Item]) -> Item | None:
    """Return the item that the kernel would reach by opening `path` inside the tree."""
    todo = path.split(b"/")[::-1]
    here: list[bytes] = []
    hops = 0
    while todo:
        part = todo.pop()
        if part in {b"", b"."}:
            continue
        if part == b"..":
            here = here[:-1]
            continue
        item = known.get(b"/".join([*here, part]))
        if item is None or (item.kind == "file" and todo):
            return None
        if item.kind == "link":
            hops += 1
            if hops > _HOPS:
                return None
            todo += item.target.split(b"/")[::-1]
        else:
            here.append(part)
    return known.get(b"/".join(here), _ROOT if not here else None)
