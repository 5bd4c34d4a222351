"""Move files between a private directory and the data directories, to which others may write.

External programs open files by name, and would follow a link that somebody puts in their way. So
they write to and read from a private directory (`caxev.files.private`), and we move the files.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Final

from attrs import evolve
from blake3 import blake3

from caxev.core.errors import GiveUp, Retry
from caxev.files.confined import Confined, beside, join, parent
from caxev.files.digest import digest_tree
from caxev.files.erasing import GONE_PREFIX
from caxev.files.errors import local
from caxev.files.manifest import Manifest
from caxev.files.meter import Report, to_nobody
from caxev.files.paths import confine, printable
from caxev.files.plan import plan
from caxev.files.private import MODE, make_private, not_private
from caxev.files.process_lock import process_lock
from caxev.files.publishing import DIR_MODE, FILE_MODE, publish, writing
from caxev.files.resolved import link, mkdir, open_resolved, opened, remove, rename
from caxev.files.staging import StagedCopy, enough_space, make_parents
from caxev.files.tree import Seen, look
from caxev.files.uncached import aligned_buffer, open_uncached, read_into
from caxev.files.ways import tried

_CHUNK: Final = 8 << 20
_ENOUGH: Final = 32  # hex digits
# The suffix of directories that are of no use after their process. With this machine's name, as
# others may have the same state directory, and no lock shows here what they use.
_PASSING: Final = f".{socket.gethostname()}.passing".encode()
_OURS: Final = 256  # descriptors for everything but a program's input
KEPT: Final = 14 * 86400.0
"""Seconds for which an unfinished copy is kept if it is not resumed."""


def bring_in(
    made: Confined,
    final: str,
    roots: Sequence[str],
    *,
    expected: Callable[[], Manifest] | None = None,
    min_free: int = 0,
    report: Report = to_nobody,
) -> int | None:
    """Publish a copy from a private directory as `final`, inside one of `roots`; return its size.

    By a rename if both are on one file system, else by a copy beside `final` that is renamed. With
    `expected`, which returns the manifest, that copy is first read from the disk and compared: pass
    it if nothing else will verify the copy. None: there is nothing to publish. Repeatable. Raises
    `GiveUp` if something else has the name, and `Retry` if the copy does not match.
    """
    real, gone = confine(final, roots), beside(made, GONE_PREFIX)
    with local(gone, "remove"):
        remove(gone)
    if not os.path.lexists(made):  # published by an earlier call, if at all
        return _size(real) if os.path.lexists(real) else None
    size = _size(made)
    make_parents(real, roots)
    with local(real, "publish"):
        try:
            publish(made, real)
        except FileExistsError as exc:
            raise _taken(real) from exc
        except OSError as exc:
            if exc.errno != errno.EXDEV:
                raise
            seen = look(made)
            _copy_in(
                made,
                StagedCopy(real, roots, seen, min_free=min_free, whole_files=True, report=report),
                expected and expected(),
            )
            # Its name goes at once: the next call would take a rest of it for another copy.
            rename(made, gone)
            remove(gone)
    return size


def _taken(final: Confined) -> GiveUp:
    return GiveUp(f"something else stands at {printable(final)}: take it away")


def _size(path: Confined) -> int:
    """Return the bytes of a file, or of all files below a directory."""
    return sum(seen.size for seen in look(path))


def _copy_in(made: Confined, arrival: StagedCopy, expected: Manifest | None) -> None:
    if arrival.stands():
        if _differs(arrival.final, expected, arrival.report):
            raise _taken(arrival.final)
        return
    with arrival.opened() as todo:
        total, done = sum(piece.file.size for piece in todo.pieces), 0
        for piece in todo.pieces:
            path = piece.file.path
            copy_file(join(made, path), join(arrival.partial, path))
            done += piece.file.size
            arrival.report(done, total)
        arrival.finish(todo)
        if _differs(arrival.partial, expected, arrival.report):
            # Removed, because the next attempt would keep it: its sizes and times are right.
            remove(arrival.partial)
            raise Retry(f"{printable(arrival.final)} was copied, and the disk gives something else")
        arrival.publish()


def _differs(path: Confined, expected: Manifest | None, report: Report) -> bool:
    """Return whether the disk holds something else than `expected`, if that is known."""
    if expected is None:
        return False
    return bool(expected.differences(digest_tree(path, sha512=False, report=report)))


def copy_file(old: Confined, new: Confined) -> None:
    """Copy a file's bytes and times, following no link at either end. Raises OSError."""
    # From the disk, not from the cache: some callers prove the original by comparing the copy.
    reading = open_uncached(old, 0, 0)
    try:
        writing = open_resolved(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE)
        with os.fdopen(writing, "wb") as target:
            status = os.fstat(reading)
            buffer, at = aligned_buffer(_CHUNK), 0
            while at < status.st_size and (count := read_into(reading, buffer, at, _CHUNK)):
                target.write(buffer[:count])
                at += count
            # The time marks a file as whole, so it is set after the last byte.
            target.flush()
            os.utime(writing, ns=(status.st_atime_ns, status.st_mtime_ns))
    finally:
        os.close(reading)


def place_file(staged: Confined, path: Confined, *, is_lock: bool = False) -> None:
    """Move a file from a private directory to `path`, replacing what is there. Raises OSError.

    With `is_lock` only its content is replaced.
    """
    if is_lock:  # the partial of a single file carries our flock, which is bound to its inode
        copy_file(staged, path)
        return
    try:
        rename(staged, path)
    except OSError as exc:
        if exc.errno != errno.EXDEV:
            raise
        copy_file(staged, path)


@contextmanager
def mirror(source: Confined, target: Confined, *, links: bool = True) -> Iterator[None]:
    """Mirror the copy at `source` at `target`, in a private directory, for the length of a block.

    It is a tree of hard links. A file that cannot be linked, as on another file system, is held
    open, and the mirror has a link to the open file. Without `links` the copy's own links are left
    out. Raises `GiveUp` for what a copy must not hold.
    """
    seen = look(source)
    with ExitStack() as held:
        with local(target, "make"):
            if not any(one.path == b"" for one in seen):
                os.mkdir(target)
            for one in sorted(seen, key=lambda one: one.path):
                path = join(target, one.path)
                if one.kind == "dir":
                    os.mkdir(path)
                elif one.kind == "link":
                    if links:
                        os.symlink(one.target, path)
                elif not tried(link_file, join(source, one.path), path):
                    _let_open(len(seen), source)
                    os.symlink(held.enter_context(pinned(join(source, one.path))), path)
        yield


def _let_open(files: int, source: Confined) -> None:
    """Raise the limit of open files, for this process and the programs that it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = files + _OURS
    if soft != resource.RLIM_INFINITY and soft < need:
        if hard != resource.RLIM_INFINITY and hard < need:
            raise GiveUp(
                f"{printable(source)} holds more files ({files:,}) than a process may have open"
                f" here ({hard:,}): raise that limit (LimitNOFILE, ulimit -n), or move `state` to"
                " the file system of the data"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))


@contextmanager
def landing(state: str, final: bytes) -> Iterator[Confined]:
    """Make a private directory in which other programs write or read the copy at `final`.

    It is removed after the block. Leftovers of a killed process are removed here, or by
    `forget_incoming`. Raises `Retry` if another process uses it.
    """
    path = _place(state, final, _PASSING)
    with _in_use(path):
        with local(path, "make"):
            remove(path)
            os.mkdir(path, MODE)
        try:
            yield path
        finally:
            # An error here would hide that of the block; `forget_incoming` removes what stays.
            with suppress(OSError):
                remove(path)


def _in_use(path: bytes) -> AbstractContextManager[None]:
    return process_lock(path, f"another process of this machine has {printable(path)}")


@contextmanager
def apart(state: str, arrival: StagedCopy) -> Iterator[StagedCopy]:
    """Make a copy in a private directory, for a program that writes it by name.

    Yields the copy to make there; `bring_in` then publishes its partial. Data of an earlier
    attempt, there or beside the final name, is reused, and stays if this attempt fails. Raises
    `Denied` if the directory is not private (see `make_private`), or if it is on another file
    system and the copy would not fit beside its final name.
    """
    arrival.withdraw()
    path = _place(state, arrival.final)
    with local(path, "make"):
        mkdir(path, MODE)
        is_near = os.stat(path).st_dev == os.stat(parent(arrival.final)).st_dev
    inner = evolve(
        arrival,
        final=join(path, b"copy"),
        roots=(os.fsdecode(path),),
        min_free=arrival.min_free if is_near else 0,
    )
    # On another file system the copy takes its space twice: here, and when it is brought in.
    if not is_near:
        where, free = printable(arrival.final), arrival.free()
        enough_space(plan(arrival.source, ()), (), free, arrival.min_free, where)
    if os.path.lexists(arrival.partial):
        _take_over(arrival, inner)
    yield inner
    with suppress(OSError):  # not in `finally`: after an error the next attempt reuses the data
        remove(path)


def _take_over(arrival: StagedCopy, inner: StagedCopy) -> None:
    """Move the partial beside the final name to the private directory, file by file."""
    # Its directories are made again: others may have put links into the old ones.
    old, new = arrival.partial, inner.partial
    with local(old, "take over"), writing(old, directory=not arrival.is_file):
        found: list[Seen] = []
        with suppress(GiveUp):  # somebody put something there that no copy holds
            found = look(old, check=False)
        if not arrival.is_file:
            mkdir(new, DIR_MODE)
        for seen in sorted(found, key=lambda one: one.path):
            path = join(new, seen.path)
            if seen.kind == "dir":
                mkdir(path, DIR_MODE)
            elif seen.kind == "file" and not os.path.lexists(path):
                _take(join(old, seen.path), path)
        remove(old)


def _take(old: Confined, new: Confined) -> None:
    # Others may take it away meanwhile: then it is moved over the network again.
    with suppress(FileNotFoundError):
        place_file(old, new)
        if not stat.S_ISREG(os.lstat(new).st_mode):
            remove(new)


def forget_incoming(state: str) -> int:
    """Remove unfinished copies that were not resumed for `KEPT`; return how many.

    The latest change in the directory counts, by the file system's clock. What `landing` has made
    on this machine is removed as soon as its process is gone.
    """
    # Hard links in the latter would keep the bytes of deleted copies on the disk.
    gone = 0
    if not os.path.isdir(f"{state}/incoming") or not_private(f"{state}/incoming"):
        return gone
    incoming = make_private(f"{state}/incoming")
    for name in os.listdir(incoming):
        path = join(incoming, name)
        # If it is in use, or cannot be removed now, it is tried again the next day.
        with suppress(OSError, Retry), _in_use(path):
            if name.endswith(_PASSING) or _changed(path) < time.time() - KEPT:
                remove(path)
                gone += 1
    return gone


def _changed(path: bytes) -> float:
    last = os.lstat(path).st_ctime
    for directory, names, files in os.walk(path):
        for name in (*names, *files):
            last = max(last, os.lstat(os.path.join(directory, name)).st_ctime)
    return last


def _place(state: str, final: bytes, suffix: bytes = b"") -> Confined:
    """Return where the copy at `final` is received: a directory where only we may write."""
    return join(make_private(f"{state}/incoming"), _hashed(final) + suffix)


def name_in(directory: Confined, path: bytes) -> Confined:
    """Return a plain name in such a directory for a file of a copy."""
    return join(directory, _hashed(path))


def _hashed(path: bytes) -> bytes:
    # A path's name could be too long, and other copies have the same last name.
    return blake3(path).hexdigest()[:_ENOUGH].encode()


@contextmanager
def pinned(path: Confined) -> Iterator[bytes]:
    """Open a regular file, and yield a path with which programs of ours open that very file.

    Raises `Retry` if it is no regular file, or cannot be read.
    """
    with ExitStack() as held:
        with local(path, "read"):
            descriptor = held.enter_context(opened(path, os.O_RDONLY))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Retry(f"{printable(path)} is no longer a file")
        yield f"/proc/{os.getpid()}/fd/{descriptor}".encode()


def link_file(old: Confined, new: Confined) -> None:
    """Make a hard link to a regular file. Raises OSError, and `Retry` if it is none any more."""
    link(old, new)  # then check what was linked: a check before could be outdated
    if not stat.S_ISREG(os.lstat(new).st_mode):
        os.unlink(new)
        raise Retry(f"{printable(old)} is no longer a file")
