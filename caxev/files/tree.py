"""List a tree on this machine's disk without following links."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence

from attrs import evolve, frozen

from caxev import limited
from caxev.core.errors import GiveUp, Retry
from caxev.files.confined import Confined, join
from caxev.files.errors import changed, gone, meaning
from caxev.files.manifest import KINDS, Item, Kind, Manifest
from caxev.files.paths import check_names, link_problem, printable, within_tree
from caxev.files.resolved import opened


@frozen
class Seen:
    """One item in the listing of a tree, here or far away.

    `path`, `size` (bytes) and `target` are as in `Item`. `mtime_ns`: ns since the epoch, 0 for all
    but files; from SFTP and grid storage whole seconds.
    """

    path: bytes
    kind: Kind
    size: int = 0
    mtime_ns: int = 0
    target: bytes = b""


def manifest_of(seen: Iterable[Seen]) -> Manifest:
    """Return the manifest of a listing, without digests."""
    return Manifest(Item(s.path, s.kind, s.size, target=s.target) for s in seen)


def scan(root: Confined) -> Manifest:
    """Return the items of the copy at `root`, without digests. Never follows a link.

    Raises `GiveUp` if `root` is missing or is a link, or if the tree contains a socket, a fifo, a
    device or a link that leads out of it; `Retry` if it changes meanwhile or cannot be read. An
    absolute link into the tree is listed as the relative one that copies get.
    """
    return manifest_of(look(root))


def look(root: Confined, *, check: bool = True) -> list[Seen]:
    """List as `scan` does, with modification times, sorted by path. Raises the same.

    Without `check`, links are listed wherever they lead, and our own files as well.
    """
    try:
        status = os.lstat(root)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise GiveUp(f"{printable(root)} is not there") from exc
    except OSError as exc:
        raise meaning(exc, f"cannot read {printable(root)}") from exc
    if stat.S_ISREG(status.st_mode):
        return [Seen(b"", "file", status.st_size, status.st_mtime_ns)]
    if not stat.S_ISDIR(status.st_mode):
        raise GiveUp(f"{printable(root)} is neither a directory nor a file")
    found: list[Seen] = []
    for seen in _walk(root):
        check_rows(len(found), printable(root))
        found.append(seen)
    # Each file system has its own order, and two listings of one tree must be equal.
    found.sort(key=lambda seen: seen.path)
    if check:
        _check(found)
    return found


def check_rows(number: int, shown: str) -> None:
    """Raise `GiveUp` if a tree, `shown` in the message, has more items than a copy may have."""
    if number >= limited.ROWS:
        raise GiveUp(f"{shown} holds more than {limited.ROWS:,} files")


def look_source(path: Confined) -> list[Seen]:
    """List a copy to read. Raises as `look`, with a message of its own if it is gone."""
    if not os.path.lexists(path):
        raise gone(printable(path))
    return look(path)


def check_unchanged(descriptor: int, seen: Seen, path: bytes) -> None:
    """Raise `Retry` unless the open file is as it was listed, which vouches for all read of it."""
    status = os.fstat(descriptor)
    if (status.st_size, status.st_mtime_ns) != (seen.size, seen.mtime_ns):
        raise changed(printable(path))


def _check(found: Sequence[Seen]) -> None:
    for seen in found:
        check_names(seen.path, printable(seen.path))
    check_links(found)


def check_links(found: Iterable[Seen]) -> None:
    """Raise `GiveUp` for the first link that leads out of the tree."""
    for seen in found:
        if seen.kind == "link" and (problem := link_problem(seen.path, seen.target)):
            name, target = printable(seen.path), printable(seen.target)
            raise GiveUp(f"link {name} -> {target} refused: {problem}")


def check_paths(found: Sequence[Seen]) -> None:
    """Raise `GiveUp` if a listing from another machine is not one of a tree.

    A tree has no path or link that leads out, no path twice, no name of our own files, and no
    unknown kind.
    """
    alone = len(found) == 1 and found[0].path == b"" and found[0].kind == "file"
    for seen in found:
        parts = seen.path.split(b"/")
        plain = b"\0" not in seen.path and not {b"", b".", b".."} & {*parts}
        if not (plain or alone) or seen.kind not in KINDS or seen.size < 0:
            raise GiveUp(f"the impossible name {printable(seen.path)} ({seen.kind}) was listed")
    if len({seen.path for seen in found}) < len(found):
        raise GiveUp("the same name was listed twice")
    _check(found)


def _walk(top: Confined) -> Iterator[Seen]:
    # No recursion: a tree can be deeper than Python's stack.
    pending = [b""]
    while pending:
        for seen in _directory(top, pending.pop()):
            if seen.kind == "dir":
                pending.append(seen.path)
            yield seen


def _directory(top: Confined, path: bytes) -> Iterator[Seen]:
    full = join(top, path)
    above = path + b"/" if path else b""
    try:
        # By a descriptor: if somebody swaps the directory for a link, we do not follow it.
        with (
            opened(full, os.O_RDONLY | os.O_DIRECTORY) as descriptor,
            os.scandir(descriptor) as entries,
        ):
            for entry in entries:
                yield _inner(top, _seen(full, above, entry, descriptor))
    except FileNotFoundError as exc:
        raise Retry(f"{printable(full)} changed while it was read") from exc
    except OSError as exc:
        raise meaning(exc, f"cannot read {printable(full)}") from exc


def _seen(full: bytes, above: bytes, entry: os.DirEntry[str], directory: int) -> Seen:
    name = os.fsencode(entry.name)
    path = above + name
    status = entry.stat(follow_symlinks=False)
    if stat.S_ISREG(status.st_mode):
        return Seen(path, "file", status.st_size, status.st_mtime_ns)
    if stat.S_ISDIR(status.st_mode):
        return Seen(path, "dir")
    if stat.S_ISLNK(status.st_mode):
        return Seen(path, "link", target=os.readlink(name, dir_fd=directory))
    where = printable(os.path.join(full, name))
    raise GiveUp(f"{where} is neither a file, a directory nor a link")


def _inner(top: bytes, seen: Seen) -> Seen:
    """Return the item; an absolute link into the tree, by any name of it, as a relative one."""
    if not seen.target.startswith(b"/"):
        return seen
    above, name = os.path.split(seen.target.rstrip(b"/"))
    # Only the directory is resolved: the target may itself be a link, and stays one.
    real = os.path.join(os.path.realpath(above), name)
    inner = within_tree(os.path.realpath(top), seen.path, real)
    return seen if inner == real else evolve(seen, target=inner)
