"""The files of a copy as a catalogue knows them: names, sizes, ADLER32 and MD5.

`Checked` has what a file must be; `digest_for_catalogue` reads a copy on this disk once for all the
digests that the catalogue and the database need. They are stored with a manifest, so that replicas
can be compared after the copy itself is gone.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import asdict, field, frozen

from caxev.core.errors import GiveUp
from caxev.files import Confined, Item, Manifest, Report, Seen, digest_tree, look, printable
from caxev.rucio.names import CopyNames

if TYPE_CHECKING:
    from hashlib import _Hash

    from _typeshed import ReadableBuffer

    _Sums = tuple["Adler32", _Hash]


@frozen
class Checked:
    """The required content of a file; `path` is relative to the copy, ``b""`` for a single file.

    `adler32` is eight hex digits; `md5` is empty if it is not known.
    """

    path: bytes
    name: str
    size: int
    adler32: str
    md5: str = ""

    def differs(self, size: object, adler32: object, md5: object = None) -> str | None:
        """Return why bytes of this size and these checksums are not this file; None if they are.

        Every checksum that is known on both sides must be the same; without any, nothing is proven.
        """
        if size != self.size:
            return f"has {size} bytes, not {self.size}"
        has_adler32 = isinstance(adler32, str) and adler32 != ""
        has_md5 = isinstance(md5, str) and md5 != "" and self.md5 != ""
        if has_adler32 and str(adler32).lower().rjust(8, "0") != self.adler32:
            return f"has ADLER32 {adler32}, not {self.adler32}"
        if has_md5 and str(md5).lower() != self.md5:
            return f"has MD5 {md5}, not {self.md5}"
        return None if has_adler32 or has_md5 else "has no checksum"

    def to_row(self) -> dict[str, Any]:
        """As a document."""
        return asdict(self)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Checked:
        """Read the form of `to_row`."""
        return cls(row["path"], row["name"], row["size"], row["adler32"], row.get("md5", ""))


def stored_as(manifest: str) -> str:
    """Under which digest the database keeps the `Checked` rows of a manifest's files."""
    return f"catalogue:{manifest}"


@frozen
class Digested:
    """A copy that was read: its files as the catalogue wants them, and its manifest."""

    files: tuple[Checked, ...]
    manifest: Manifest = field(repr=False)


class Adler32:
    """The ADLER32 of bytes as they pass."""

    def __init__(self) -> None:
        self._value = 1

    def update(self, data: ReadableBuffer, /) -> None:
        """Take the next bytes."""
        self._value = zlib.adler32(data, self._value)

    def hexdigest(self) -> str:
        """Return it as eight hex digits."""
        return f"{self._value:08x}"


def digest_for_catalogue(
    root: Confined, names: CopyNames, *, sha512: bool, report: Report
) -> Digested:
    """Read the copy at `root` once, for all the digests that a catalogue and the database need.

    Raises `GiveUp` if it holds what a catalogue cannot: links, empty directories, odd names;
    `Retry` if it cannot be read or changes meanwhile.
    """
    # Before it is read, which takes long; and then what was read, which may be something else.
    _names(look(root), names, root)
    sums: defaultdict[bytes, _Sums] = defaultdict(
        lambda: (Adler32(), hashlib.md5(usedforsecurity=False))
    )
    manifest = digest_tree(root, sha512=sha512, report=report, also=lambda seen: sums[seen.path])
    found = _names(manifest.items, names, root)
    files = (
        Checked(
            item.path, found[item.path], item.size, *(one.hexdigest() for one in sums[item.path])
        )
        for item in manifest.files
    )
    return Digested(tuple(files), manifest)


def _names(listed: Sequence[Seen | Item], names: CopyNames, root: Confined) -> dict[bytes, str]:
    """Return each file's name in the catalogue. Raises `GiveUp` if it can hold no such copy."""
    full = {os.path.dirname(one.path) for one in listed if one.path}
    for one in listed:
        if one.kind == "link":
            raise GiveUp(f"a catalogue can hold no link: {one.path!r} in {printable(root)}")
        if one.kind == "dir" and one.path not in full:
            where = printable(root)
            raise GiveUp(f"a catalogue can hold no empty directory: {one.path!r} in {where}")
    alone = os.path.basename(root)
    files = (one.path for one in listed if one.kind == "file")
    found = {path: names.file(path or alone).name for path in files}
    if not found:
        raise GiveUp(f"{printable(root)} holds no file")
    return found


def seen_of(files: Iterable[Checked], mtime_ns: int) -> list[Seen]:
    """Return the files and directories of a copy as they will be on a disk."""
    found = [Seen(one.path, "file", one.size, mtime_ns) for one in files]
    directories = {parent for one in files for parent in _parents(one.path)}
    return sorted([*found, *(Seen(path, "dir") for path in directories)], key=lambda s: s.path)


def _parents(path: bytes) -> list[bytes]:
    parts = path.split(b"/")[:-1]
    return [b"/".join(parts[:count]) for count in range(1, len(parts) + 1)]
