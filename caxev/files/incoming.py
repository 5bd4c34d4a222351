"""Between a private directory and the data directories, where others may write at any time.

Programs that are not ours open files by name, and would follow a link that somebody puts in their
way. So what they write goes to a private directory (`caxev.files.private`), and is brought in from
there; what they read they find there, too.
"""

from __future__ import annotations

import errno
import os
import resource
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Final

from attrs import evolve
from blake3 import blake3

from caxev.core.errors import GiveUp, Retry
from caxev.files.digest import digest_tree, to_nobody
from caxev.files.errors import local
from caxev.files.manifest import Manifest
from caxev.files.paths import confine, printable
from caxev.files.plan import plan
from caxev.files.private import MODE, make_private
from caxev.files.process_lock import process_lock
from caxev.files.publishing import DIR_MODE, FILE_MODE, publish, writing
from caxev.files.reading import Report
from caxev.files.resolved import link, mkdir, open_resolved, remove, rename
from caxev.files.staging import StagedCopy, enough_space, join, make_parents
from caxev.files.tree import Seen, look, shown
from caxev.files.uncached import aligned_buffer, open_uncached, read_into

_CHUNK: Final = 8 << 20
_ENOUGH: Final = 32  # hex digits
_PASSING: Final = ".passing"  # stands behind the name of what nobody goes on with
_OURS: Final = 256  # descriptors that we need for other things than a program's input
KEPT: Final = 14 * 86400.0
"""Seconds for which what has arrived of a copy is kept if nobody goes on with it."""
CANNOT_LINK: Final = {
    errno.EXDEV,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EINVAL,
    errno.EPERM,
    errno.EMLINK,
}
"""What the kernel reports where there can be no hard link."""


def bring_in(
    made: str,
    final: str,
    roots: Sequence[str],
    *,
    expected: Manifest | None = None,
    min_free: int = 0,
    report: Report = to_nobody,
) -> int | None:
    """Publish what lies in a private directory as `final`, inside one of `roots`; its bytes.

    By a rename if both are on one file system, else by a copy beside `final` that is renamed. With
    `expected`, the manifest of what was made, that copy is read from the disk and compared first:
    pass it if nothing else reads the copy before it is called good. None: there is nothing to
    publish. Repeatable. Raises `GiveUp` if something else has the name, and `Retry` if what was
    copied is not what was made.
    """
    real = confine(final, roots)
    if not os.path.lexists(made):
        return _size(real) if os.path.lexists(real) else None
    size = _size(made)
    make_parents(real, roots)
    with local(os.fsencode(real), "publish"):
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
                expected,
            )
            remove(made)
    return size


def _taken(final: str) -> GiveUp:
    return GiveUp(f"something else stands at {shown(final)}: take it away")


def _size(path: str) -> int:
    """Bytes of a file, or of all files below a directory."""
    return sum(seen.size for seen in look(path))


def _copy_in(made: str, arrival: StagedCopy, expected: Manifest | None) -> None:
    if arrival.stands():
        if _differs(arrival.final, expected, arrival.report):
            raise _taken(arrival.final)
        return
    with arrival.opened() as todo:
        total, done = sum(piece.file.size for piece in todo.pieces), 0
        for piece in todo.pieces:
            path = piece.file.path
            copy_file(join(os.fsencode(made), path), join(arrival.partial, path))
            done += piece.file.size
            arrival.report(done, total)
        arrival.finish(todo)
        if _differs(os.fsdecode(arrival.partial), expected, arrival.report):
            remove(arrival.partial)  # by its sizes and times the next attempt would keep it
            raise Retry(f"{shown(arrival.final)} was copied, and the disk gives something else")
        arrival.publish()


def _differs(path: str, expected: Manifest | None, report: Report) -> bool:
    """Whether the disk holds something else there than is expected, if that is known."""
    if expected is None:
        return False
    return bool(expected.differences(digest_tree(path, sha512=False, report=report)))


def copy_file(old: bytes, new: bytes) -> None:
    """Copy a file's bytes and times, following no link at either end. Raises OSError.

    The bytes are those that the disk gives, not those in memory: some copies prove the original.
    """
    reading = open_uncached(old, 0, 0)
    try:
        writing = open_resolved(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE)
        with os.fdopen(writing, "wb") as target:
            status = os.fstat(reading)
            buffer, at = aligned_buffer(_CHUNK), 0
            while at < status.st_size and (count := read_into(reading, buffer, at, _CHUNK)):
                target.write(buffer[:count])
                at += count
            target.flush()
            os.utime(writing, ns=(status.st_atime_ns, status.st_mtime_ns))
    finally:
        os.close(reading)


def place_file(staged: bytes, path: bytes, *, is_lock: bool = False) -> None:
    """Bring one file of a private directory to `path`, replacing what is there. Raises OSError.

    What stands there keeps its inode if it is a lock: then its content is replaced.
    """
    if is_lock:
        copy_file(staged, path)
        return
    try:
        rename(staged, path)
    except OSError as exc:
        if exc.errno != errno.EXDEV:
            raise
        copy_file(staged, path)


@contextmanager
def mirror(source: str, target: str, *, links: bool = True) -> Iterator[None]:
    """Let a program find the copy at `source` at `target`, in a private directory, for a while.

    As a tree of hard links, in which nobody can put a link in its way. A file of which there can be
    none, as on another file system, is held open, and what stands there is a link to the open file.
    Without `links` those of the copy are left out. Raises `GiveUp` for what a copy must not hold.
    """
    seen = look(source)
    top, old = os.fsencode(target), os.fsencode(source)
    with ExitStack() as held:
        with local(top, "make"):
            if not any(one.path == b"" for one in seen):
                os.mkdir(top)
            for one in sorted(seen, key=lambda one: one.path):
                path = join(top, one.path)
                if one.kind == "dir":
                    os.mkdir(path)
                elif one.kind == "link":
                    if links:
                        os.symlink(one.target, path)
                elif not _linked(join(old, one.path), path):
                    _let_open(len(seen), source)
                    os.symlink(held.enter_context(pinned(join(old, one.path))), path)
        yield


def _linked(old: bytes, new: bytes) -> bool:
    """Make a hard link of a regular file; whether there can be one."""
    try:
        link_file(old, new)
    except OSError as exc:
        if exc.errno not in CANNOT_LINK:
            raise
        return False
    return True


def _let_open(files: int, source: str) -> None:
    """Let this process hold so many files open, and the programs that it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = files + _OURS
    if soft != resource.RLIM_INFINITY and soft < need:
        if hard != resource.RLIM_INFINITY and hard < need:
            raise GiveUp(
                f"{shown(source)} holds more files ({files:,}) than a process may have open here"
                f" ({hard:,}): raise that limit (LimitNOFILE, ulimit -n), or move `state` to the"
                " file system of the data"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))


@contextmanager
def landing(state: str, final: str) -> Iterator[bytes]:
    """Make a private directory for what other programs write or read of a copy; then it goes.

    It is that of the copy at `final`; one that is read has a name that nobody else uses meanwhile.

    What a process that was killed has left there is removed, here or by `forget_incoming`. Raises
    `Retry` if another process has it.
    """
    path = _place(state, final) + _PASSING
    with _in_use(path):
        with local(os.fsencode(path), "make"):
            remove(path)
            os.mkdir(path, MODE)
        try:
            yield os.fsencode(path)
        finally:
            with suppress(OSError):
                remove(path)


def _in_use(path: str) -> AbstractContextManager[None]:
    return process_lock(os.fsencode(path), f"another process of this machine has {shown(path)}")


@contextmanager
def apart(state: str, arrival: StagedCopy) -> Iterator[StagedCopy]:
    """Make a copy in a private directory, for a program that writes it by name.

    Yields what is to be made there; `bring_in` then publishes its partial. What an earlier attempt
    left is gone on with, there or beside the final name, and stays if this one fails.
    """
    arrival.withdraw()
    path = _place(state, arrival.final)
    there = os.path.dirname(arrival.final)
    with local(os.fsencode(path), "make"):
        mkdir(path, MODE)
        is_near = os.stat(path).st_dev == os.stat(there).st_dev
    inner = evolve(
        arrival, final=f"{path}/copy", roots=(path,), min_free=arrival.min_free if is_near else 0
    )
    if not is_near:
        where, free = shown(arrival.final), arrival.free()
        enough_space(plan(arrival.source, ()), (), free, arrival.min_free, where)
    if os.path.lexists(arrival.partial):
        _take_over(arrival, inner)
    yield inner
    with suppress(OSError):
        remove(path)


def _take_over(arrival: StagedCopy, inner: StagedCopy) -> None:
    """Bring what is beside the final name to the private directory, in directories of its own."""
    old, new = arrival.partial, inner.partial
    with (
        local(old, "take over"),
        writing(os.fsdecode(old), directory=not arrival.is_file),
    ):
        found: list[Seen] = []
        with suppress(GiveUp):  # something that no copy holds was put there
            found = look(os.fsdecode(old), check=False)
        if not arrival.is_file:
            mkdir(new, DIR_MODE)
        for seen in sorted(found, key=lambda one: one.path):
            path = join(new, seen.path)
            if seen.kind == "dir":
                mkdir(path, DIR_MODE)
            elif seen.kind == "file" and not os.path.lexists(path):
                _take(join(old, seen.path), path)
        remove(old)


def _take(old: bytes, new: bytes) -> None:
    with suppress(FileNotFoundError):
        place_file(old, new)
        if not stat.S_ISREG(os.lstat(new).st_mode):
            remove(new)


def forget_incoming(state: str) -> int:
    """Remove what has arrived of copies that nobody has gone on with for `KEPT`; how many it was.

    What counts is when something was last changed in such a directory, as the file system has it.
    What `landing` made is of no use to anybody once its process is gone, and goes at once: hard
    links there keep the bytes of a copy on the disk that has been deleted.
    """
    gone = 0
    with suppress(FileNotFoundError), os.scandir(os.path.realpath(f"{state}/incoming")) as entries:
        for entry in entries:
            with suppress(OSError, Retry), _in_use(entry.path):
                if entry.name.endswith(_PASSING) or _changed(entry.path) < time.time() - KEPT:
                    remove(entry.path)
                    gone += 1
    return gone


def _changed(path: str) -> float:
    last = os.lstat(path).st_ctime
    for directory, names, files in os.walk(path):
        for name in (*names, *files):
            last = max(last, os.lstat(os.path.join(directory, name)).st_ctime)
    return last


def _place(state: str, final: str) -> str:
    """Where the copy at `final` is received: in a directory where only we may write."""
    incoming = make_private(f"{state}/incoming")
    return os.path.join(incoming, blake3(os.fsencode(final)).hexdigest()[:_ENOUGH])


def name_in(directory: bytes, path: bytes) -> bytes:
    """A plain name in such a directory for the file of that path in the copy."""
    return os.path.join(directory, blake3(path).hexdigest()[:_ENOUGH].encode())


@contextmanager
def pinned(path: bytes) -> Iterator[bytes]:
    """Open a regular file, and name it so that programs of ours find that very file, by no link.

    Raises `Retry` if it is none, or cannot be read.
    """
    with local(path, "read"):
        descriptor = open_resolved(path, os.O_RDONLY)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Retry(f"{printable(path)} is no longer a file")
        yield f"/proc/{os.getpid()}/fd/{descriptor}".encode()
    finally:
        os.close(descriptor)


def link_file(old: bytes, new: bytes) -> None:
    """Make a hard link of a regular file. Raises OSError, and `Retry` if it is none any more."""
    link(old, new)
    if not stat.S_ISREG(os.lstat(new).st_mode):
        os.unlink(new)
        raise Retry(f"{printable(old)} is no longer a file")
