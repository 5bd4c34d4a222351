"""Check by a marker file that a root's disk is mounted, and that it is the right one.

An empty mount point looks like a disk that has lost everything. So each base directory of a site
contains a small file that a mount point lacks, made once by ``caxev sites init``, or by the site's
first listener if no copy is known there. Its name ends in a random id, which the database keeps:
one `lstat`, here or over SFTP, shows whether that disk is mounted. `caxev.files.confine` checks it
before anything below a root is touched, and `steady` checks it again at the end, as a disk may
vanish at any moment.

A marker that was copied to another disk would pass for the original. So the UUID of the file
system, if the kernel gives one (`file_system`), is noted with the marker, and another one counts
as a disk that is away until ``caxev sites init`` finds the copies there. No other identity would
do: device numbers change when the machine starts, inode numbers on FUSE at each mount; the id of
`statvfs` (`f_fsid`) contains the device number on XFS, is 0 on NFS, and differs between kernels on
others; an NFS server may be reached by several names. On such file systems, with a kernel before
Linux 6.9, for a clone made block by block, and from afar over SFTP, the marker alone counts. If a
clone's content differs, verification finds it, as on any disk.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from fcntl import ioctl
from typing import Any, Final

from attrs import frozen

from caxev.core.errors import RootAway
from caxev.core.paths import UNKNOWN, Root
from caxev.files.confined import Confined, parent
from caxev.files.resolved import open_resolved, sync

MARKER_PREFIX: Final = ".caxev-root-"
_LONGEST: Final = 4096  # bytes of a marker
_GETFSUUID: Final = 0x80111500  # FS_IOC_GETFSUUID of linux/fs.h; where it is another: refused
_UUID: Final = 16  # bytes of a UUID, behind one that holds its length
_ID: Final = frozenset("0123456789abcdef")
_READ_ONLY: Final = (errno.EROFS, errno.EACCES, errno.EPERM)

_entered: ContextVar[dict[Root, tuple[int, int]] | None] = ContextVar("_entered", default=None)


@frozen
class Marker:
    """A marker: its id, and the site and the key of sites.json for which it was made."""

    id: str
    site: str
    key: str


@frozen
class Probe:
    """The state of a root: free bytes, the device's number, and why it is away, if so.

    `size`: how many bytes its file system can hold.
    """

    free: int = 0
    device: int = 0
    away: str | None = None
    size: int = 0


def marker_path(root: str, marker: str) -> str:
    """Return the path of the marker with that id in a root."""
    return os.path.join(root, MARKER_PREFIX + marker)


def missing(root: Root) -> str:
    """Return the message about a root without its marker."""
    if root.marker == UNKNOWN:
        return (
            f"nothing shows that the disk of {root} is mounted: if it is, run caxev sites init for "
            "its site"
        )
    return (
        f"{root} is not the disk that it was: its marker is not there. Mount the disk, or run "
        "caxev sites init --force for its site if this is the right directory"
    )


def file_system(root: str) -> str | None:
    """Return the UUID of the file system that a directory is on; None if it has none.

    It lies in the file system itself, and so stays when that is mounted elsewhere or once more.
    Raises `RootAway` if the directory cannot be read.
    """
    try:
        directory = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as exc:
        raise RootAway(f"{root} cannot be read: {exc.strerror}", root=root) from exc
    try:
        # ENOTTY before Linux 6.9, and on file systems without a UUID.
        length, *uuid = ioctl(directory, _GETFSUUID, bytes(1 + _UUID))
    except OSError:
        return None
    finally:
        os.close(directory)
    return bytes(uuid).hex() if length == _UUID and any(uuid) else None


def check_root(root: str) -> None:
    """Raise `RootAway` unless the root's marker exists, or the directory if no marker is known."""
    if not isinstance(root, Root):
        return
    if root.marker is None:
        if not os.path.isdir(root):
            raise RootAway(f"{root} is not there: is its disk mounted?", root=root)
        return
    seen = _identity(root)
    if (entered := _entered.get()) is not None and entered.setdefault(root, seen) != seen:
        raise RootAway(f"the disk of {root} was changed meanwhile", root=root)


def _identity(root: Root) -> tuple[int, int]:
    """Return the device and inode of the root's marker. Raises `RootAway` if it is missing."""
    assert root.marker is not None
    try:
        status = os.lstat(marker_path(root, root.marker))
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise RootAway(missing(root), root=root) from exc
    except OSError as exc:
        raise RootAway(f"{root} cannot be read: {exc.strerror}", root=root) from exc
    if not stat.S_ISREG(status.st_mode):
        raise RootAway(missing(root), root=root)
    if root.disk is not None:
        _check_disk(root)
    return status.st_dev, status.st_ino


def _check_disk(root: Root) -> None:
    disk = file_system(root)
    if disk not in {None, root.disk}:
        raise RootAway(
            f"{root} is on another disk than before, to which its marker was copied (file system "
            f"{disk}, not {root.disk}). Mount the right disk, or run caxev sites init for its site "
            "if the data was moved",
            root=root,
        )


@contextmanager
def steady() -> Iterator[None]:
    """Raise `RootAway` at the end of the block if a root that was used in it is away by then.

    It replaces the block's own error or result: a file that was missing, or was written, may have
    been so in the empty mount point.
    """
    entered: dict[Root, tuple[int, int]] = {}
    token = _entered.set(entered)
    try:
        try:
            yield
        finally:
            for root in entered:
                check_root(root)
    finally:
        _entered.reset(token)


def root_rows(roots: Iterable[str]) -> list[list[str | None]]:
    """Return roots as JSON has them: each with the id of its marker."""
    return [[root, getattr(root, "marker", None)] for root in roots]


def roots_from(rows: Iterable[Sequence[Any]]) -> list[Root]:
    """Return the roots of `root_rows`. Raises TypeError, ValueError."""
    return [Root(_text(path), None if marker is None else _text(marker)) for path, marker in rows]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a {type(value).__name__} in place of a text")
    return value


# -- for the listener and `caxev sites init`; all run in a worker process -------------------------


def find_markers(root: str) -> list[Marker]:
    """Return a root's markers. Raises `RootAway` if it is missing or cannot be read."""
    try:
        names = [name for name in os.listdir(root) if name.startswith(MARKER_PREFIX)]
    except OSError as exc:
        raise RootAway(f"{root} cannot be read: {exc.strerror}", root=root) from exc
    return [marker for name in sorted(names) if (marker := _read(root, name)) is not None]


def _read(root: str, name: str) -> Marker | None:
    marker = name.removeprefix(MARKER_PREFIX)
    if not marker or not _ID.issuperset(marker):
        return None
    try:
        # Others may write here: a file that is not as `make_marker` writes it is none of ours.
        flags = os.O_RDONLY | os.O_NONBLOCK
        with open(open_resolved(_in_root(root, name), flags), "rb") as file:
            row = json.loads(file.read(_LONGEST))
        return Marker(marker, str(row["site"]), str(row["directory"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _in_root(root: str, name: str) -> Confined:
    return Confined(os.fsencode(os.path.join(os.path.realpath(root), name)))


def are_same(root: str, others: Sequence[str]) -> list[bool]:
    """Return which of these paths are that directory: sites may share one by several names."""
    return [_is_same(root, other) for other in others]


def _is_same(root: str, other: str) -> bool:
    try:
        return os.path.normpath(root) == os.path.normpath(other) or os.path.samefile(root, other)
    except (OSError, ValueError):
        return False


def make_marker(root: str, site: str, key: str, there: Sequence[Marker] = ()) -> str:
    """Make a marker in a root beside those that are `there`, and return its id.

    Raises `RootAway` if the disk refuses, or if another process made one at the same moment: two
    would hide that two sites share the directory.
    """
    marker = secrets.token_hex(8)
    path = _in_root(root, MARKER_PREFIX + marker)
    about = "caxev knows by this file that the disk is mounted: leave it here"
    row = {"site": site, "directory": key, "id": marker, "about": about}
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with open(open_resolved(path, flags, 0o644), "w", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        sync(parent(path))
    except OSError as exc:
        raise RootAway(f"no marker can be made in {root}: {exc.strerror}", root=root) from exc
    # Looked for once ours is there, so that of two processes at least one finds the other's.
    if {one.id for one in find_markers(root)} - {marker, *(one.id for one in there)}:
        os.unlink(marker_path(root, marker))
        raise RootAway(f"{root} is being marked by another process: try again", root=root)
    return marker


def probe(root: Root) -> Probe:
    """Return whether a root is mounted and how full its disk is; blocks while the disk hangs."""
    # The marker is touched if we may: on a disk that hangs, reads may still come from the cache.
    try:
        check_root(root)
        if root.marker is not None:
            _touch(marker_path(root, root.marker))
        disk = os.statvfs(root)
        free, size = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
        return Probe(free, os.stat(root).st_dev, size=size)
    except RootAway as away:
        return Probe(away=away.why)
    except OSError as exc:
        return Probe(away=f"{root} cannot be read: {exc.strerror}")


def _touch(path: str) -> None:
    try:
        os.utime(path, follow_symlinks=False)
    except OSError as exc:
        if exc.errno not in _READ_ONLY:
            raise


def absent(root: str, locations: Sequence[str]) -> list[str]:
    """Return those of these absolute paths that are outside of a root, or do not exist."""
    top = os.path.join(os.path.realpath(root), "")
    found = []
    for location in locations:
        with suppress(ValueError):  # a NUL byte
            path = os.path.realpath(location)
            is_there = path.startswith(top) and os.path.lexists(path)
            if os.path.isabs(location) and not is_there:
                found.append(location)
    return found
