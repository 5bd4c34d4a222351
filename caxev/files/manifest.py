"""What a copy consists of: its items and their digests. Pure.

Whoever looks at a tree (`scan`, `digest_tree`, the movers) makes a `Manifest`; handlers compare
manifests and keep them in the database under their own digest.
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
"""Bytes of a file, from the first number on and up to the second."""

KINDS: Final = ("file", "dir", "link")
_MOST_PARTS: Final = 6 << 20  # bytes; those of a file of 768 GiB
PART: Final = 4 << 20
"""Bytes of a file that are checked, and brought again, alone; the last part may be shorter."""
_LENGTH: Final = 32  # bytes of a BLAKE3 digest
_EMPTY: Final = hashlib.sha512().hexdigest()
_HOPS: Final = 40  # links in a row that the kernel follows


@frozen
class Item:
    """One file, directory or link of a copy.

    `path` is relative to the copy's root, ``/``-separated; ``b""`` is the copy itself where that is
    a single file. `size` is in bytes, 0 but for files. `blake3` (32 bytes) and `sha512` (64) are
    None where they were not computed. `target` is where a link points.

    The `blake3` of a file of at most one `PART` is that of its content; that of a larger file is
    taken over the BLAKE3 digests of its parts, which stand one after the other in `parts`.
    """

    path: bytes
    kind: Kind = field(validator=validators.in_(KINDS))
    size: int = 0
    blake3: bytes | None = None
    sha512: bytes | None = None
    target: bytes = b""
    parts: bytes = b""

    def to_row(self) -> dict[str, Any]:
        """As a document; what is empty is left out, and parts that would not fit into one."""
        row: dict[str, Any] = {"path": self.path, "kind": self.kind}
        if len(self.parts) > _MOST_PARTS:
            return evolve(self, parts=b"").to_row()
        for name in ("size", "blake3", "sha512", "target", "parts"):
            if getattr(self, name):
                row[name] = getattr(self, name)
        return row

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Item:
        """The inverse of `to_row`."""
        return cls(**{name: row[name] for name in _FIELDS if row.get(name) is not None})

    def wrong_in(self, found: Item) -> list[Range]:
        """The bytes of this file that must be brought again where `found` stands in its place.

        Of a file whose parts are known on both sides only the bad ones, those beyond its end
        included; of any other the whole, unless both digests say the same.
        """
        if None not in (self.blake3, found.blake3) and self.same(found):
            return []
        wanted, there = self.part_digests(), found.part_digests()
        if wanted is None or there is None:
            return [(0, self.size)]
        return wrong_ranges(self.size, wanted, there)

    def same(self, other: Item) -> bool:
        """Whether both say the same content; the SHA-512 is left out, as either may lack it."""
        return self._content == other._content

    def part_digests(self) -> list[bytes] | None:
        """The BLAKE3 of each part of this file; None where they are not known.

        Nor are they where `parts` is not what `blake3` was taken over.
        """
        if self.blake3 is None:
            return None
        found = _cut(self.parts) if self.size > PART else [self.blake3] * (self.size > 0)
        known = len(found) == -(-self.size // PART) and item_digest(found)[0] == self.blake3
        return found if known else None

    @property
    def _content(self) -> tuple[object, ...]:
        return (self.kind, self.size, self.blake3, self.target)


_FIELDS: Final = ("path", "kind", "size", "blake3", "sha512", "target", "parts")
_values: Final = attrgetter(*_FIELDS)


def item_digest(parts: Sequence[bytes]) -> tuple[bytes, bytes]:
    """The `blake3` and the `parts` of a file, given the BLAKE3 of each of its parts in turn."""
    joined = b"".join(parts)
    if len(parts) == 1:
        return joined, b""
    return _blake3(joined).digest(), joined


def _cut(parts: bytes) -> list[bytes]:
    return [parts[at : at + _LENGTH] for at in range(0, len(parts), _LENGTH)]


class Difference(NamedTuple):
    """One path by which a copy differs from what it should be."""

    path: bytes
    why: Literal["missing", "unexpected", "differs"]

    def __str__(self) -> str:
        return f"{printable(self.path) or 'the file'} {_SAID[self.why]}"


_SAID: Final = {"missing": "is missing", "unexpected": "is unexpected", "differs": "differs"}


def wrong_ranges(size: int, wanted: Sequence[bytes], found: Sequence[bytes]) -> list[Range]:
    """The parts of a file of `size` bytes that are not in `found` as `wanted`, neighbours joined.

    Both are the digests of parts in turn; `found` may have more or fewer.
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
        """``b3:<hex>``: names this content, whatever the modes, times and SHA-512 digests are.

        BLAKE3 over each item's kind, path, size, BLAKE3 and target in turn, each with its length.
        """
        digest = _blake3(b"caxev manifest 1\n")
        for item in self.items:
            for part in _parts(item):
                digest.update(len(part).to_bytes(8, "big") + part)
        return f"b3:{digest.hexdigest()}"

    @property
    def files(self) -> tuple[Item, ...]:
        return tuple(item for item in self.items if item.kind == "file")

    @cached_property
    def known_files(self) -> Mapping[bytes, Item]:
        """The files whose parts' digests are known, by path."""
        return {item.path: item for item in self.files if item.part_digests() is not None}

    @property
    def total_bytes(self) -> int:
        return sum(item.size for item in self.items)

    def shape(self) -> Manifest:
        """The same without digests: what a look at the tree shows without reading the files."""
        return Manifest(Item(i.path, i.kind, i.size, target=i.target) for i in self.items)

    def differences(self, other: Manifest) -> tuple[Difference, ...]:
        """How `other`, a copy, differs from this one, by path.

        A digest missing on one side is a difference: what was not computed proves nothing.
        """
        mine = {item.path: item for item in self.items}
        theirs = {item.path: item for item in other.items}
        return tuple(_differences(mine, theirs))

    def cax_checksum(self) -> str | None:
        """The SHA-512 that cax keeps in `checksum`, hex; None if a file's SHA-512 is not known.

        A single file: its own. A directory: over the sorted hex digests of its files, as
        ``checksumdir.dirhash(path, "sha512")``. That one opens what a link to a file points to, so
        such a link counts as one more file of that content, and a dangling one (or a circle)
        as an empty file; links to directories, and empty directories, do not count. File names
        do not enter: two files swapped pass. `digest` tells.
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
        """As documents that BSON can hold, one an item; bytes stay bytes."""
        return [item.to_row() for item in self.items]

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> Manifest:
        """The inverse of `to_rows`."""
        return cls(Item.from_row(row) for row in rows)

    def __reduce__(self) -> tuple[Any, ...]:
        """As plain tuples: one goes to a worker, and back, with every transfer."""
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
    """What opening `path` comes to, as the kernel would resolve it inside the tree."""
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
