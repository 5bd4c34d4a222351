"""The files of a copy as a catalogue knows them: names, sizes, ADLER32 and MD5.

`Checked` has what a file must be; `digest_for_catalogue` reads a copy on this disk once for all the
digests that the catalogue and the database need. They are stored with a manifest, so that replicas
can be compared after the copy itself is gone.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock
from typing import Any, Final

from attrs import asdict, define, field, frozen

from caxev.core.errors import GiveUp, Retry
from caxev.files import (
    Item,
    Manifest,
    PartDigest,
    Report,
    Seen,
    item_digest,
    join,
    local,
    look,
    open_resolved,
    shown,
)
from caxev.files import manifest_of as without_digests
from caxev.rucio.names import Did, Names

_CHUNK: Final = 2 << 20


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


def digest_for_catalogue(root: str, names: Names, *, sha512: bool, report: Report) -> Digested:
    """Read the copy at `root` once, in a thread a core.

    Raises `GiveUp` if it holds what a catalogue cannot: links, empty directories, odd names;
    `Retry` if it cannot be read or changes meanwhile.
    """
    # Listed before and after: a copy that changes meanwhile would get digests that never were.
    before = look(root)
    todo = [(seen, _name(names, seen, root)) for seen in before if seen.kind == "file"]
    _check_rest(before, root)
    reading = _Reading(os.fsencode(root), sum(seen.size for seen, _ in todo), report, sha512)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        futures = [pool.submit(reading.digest, seen, did) for seen, did in todo]
        try:
            found = [future.result() for future in futures]
        finally:
            # After an error, or when we are cancelled, the other threads stop at their next chunk.
            reading.stopped.set()
    if look(root) != before:
        raise Retry(f"{shown(root)} changed while it was read")
    rest = [item for item in without_digests(before).items if item.kind != "file"]
    manifest = Manifest([*(item for _, item in found), *rest])
    return Digested(tuple(checked for checked, _ in found), manifest)


def _name(names: Names, seen: Seen, root: str) -> Did:
    return names.file(seen.path or os.fsencode(os.path.basename(root.rstrip("/"))))


def _check_rest(seen: Sequence[Seen], root: str) -> None:
    full = {os.path.dirname(one.path) for one in seen if one.path}
    for one in seen:
        if one.kind == "link":
            raise GiveUp(f"a catalogue can hold no link: {one.path!r} in {shown(root)}")
        if one.kind == "dir" and one.path not in full:
            raise GiveUp(f"a catalogue can hold no empty directory: {one.path!r} in {shown(root)}")
    if not any(one.kind == "file" for one in seen):
        raise GiveUp(f"{shown(root)} holds no file")


@define
class _Reading:
    """The shared state of the reading threads."""

    root: bytes
    total: int
    report: Report
    sha512: bool
    stopped: Event = field(factory=Event)
    _done: int = 0
    _lock: Lock = field(factory=Lock)

    def digest(self, seen: Seen, did: Did) -> tuple[Checked, Item]:
        path = join(self.root, seen.path)
        # All digests from one reading: raw data is too large to be read twice.
        adler, md5, parts = 1, hashlib.md5(usedforsecurity=False), PartDigest()
        sha512 = hashlib.sha512() if self.sha512 else None
        with local(path, "read"), os.fdopen(open_resolved(path, os.O_RDONLY), "rb", 0) as file:
            while chunk := file.read(_CHUNK):
                adler = zlib.adler32(chunk, adler)
                md5.update(chunk)
                parts.update(chunk)
                if sha512 is not None:
                    sha512.update(chunk)
                self._add(len(chunk))
        blake3, joined = item_digest(parts.parts())
        digest = None if sha512 is None else sha512.digest()
        item = Item(seen.path, "file", seen.size, blake3, digest, parts=joined)
        return Checked(seen.path, did.name, seen.size, f"{adler:08x}", md5.hexdigest()), item

    def _add(self, count: int) -> None:
        if self.stopped.is_set():
            raise Retry("reading was broken off")
        with self._lock:
            self._done += count
            self.report(self._done, self.total)


def seen_of(files: Iterable[Checked], mtime_ns: int) -> list[Seen]:
    """Return the files and directories of a copy as they will be on a disk."""
    found = [Seen(one.path, "file", one.size, mtime_ns) for one in files]
    directories = {parent for one in files for parent in _parents(one.path)}
    return sorted([*found, *(Seen(path, "dir") for path in directories)], key=lambda s: s.path)


def _parents(path: bytes) -> list[bytes]:
    parts = path.split(b"/")[:-1]
    return [b"/".join(parts[:count]) for count in range(1, len(parts) + 1)]
