"""Between a private directory and the data directories, where others may write at any time.

Programs that are not ours open files by name, and would follow a link that somebody puts in their
way. So what they write goes to a private directory (`caxev.files.private`), and is brought in from
there; what they read they find there, too.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

from blake3 import blake3

from caxev.files.arrival import Arrival, join, make_parents
from caxev.files.errors import local
from caxev.files.paths import confine, printable
from caxev.files.private import MODE, make_private
from caxev.files.publishing import FILE_MODE, publish
from caxev.files.resolved import link, open_resolved, remove, rename
from caxev.files.tree import look, shown
from caxev.job import GiveUp, Retry

_CHUNK: Final = 8 << 20
_ENOUGH: Final = 32  # hex digits
CANNOT_LINK: Final = {
    errno.EXDEV,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EINVAL,
    errno.EPERM,
    errno.EMLINK,
}
"""What the kernel reports where there can be no hard link."""


def bring_in(made: str, final: str, roots: Sequence[str]) -> int | None:
    """Publish what lies in a private directory as `final`, inside one of `roots`; its bytes.

    By a rename if both are on one file system, else by a copy beside `final` that is renamed. None:
    there is nothing to publish. Repeatable. Raises `GiveUp` if something else has the name.
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
            raise GiveUp(f"something else stands at {shown(real)}: take it away") from exc
        except OSError as exc:
            if exc.errno != errno.EXDEV:
                raise
            _copy_in(made, real, roots)
            remove(made)
    return size


def _size(path: str) -> int:
    """Bytes of a file, or of all files below a directory."""
    return sum(seen.size for seen in look(path))


def _copy_in(made: str, final: str, roots: Sequence[str]) -> None:
    arrival = Arrival(final, roots, look(made), whole_files=True)
    if arrival.stands():
        return
    with arrival.opened() as todo:
        for piece in todo.pieces:
            path = piece.file.path
            copy_file(join(os.fsencode(made), path), join(arrival.partial, path))
        arrival.finish(todo)
        arrival.publish()


def copy_file(old: bytes, new: bytes) -> None:
    """Copy a file's bytes and times, following no link at either end. Raises OSError."""
    reading = open_resolved(old, os.O_RDONLY)
    with os.fdopen(reading, "rb") as source:
        writing = open_resolved(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE)
        with os.fdopen(writing, "wb") as target:
            shutil.copyfileobj(source, target, _CHUNK)
            target.flush()
            status = os.fstat(reading)
            os.utime(writing, ns=(status.st_atime_ns, status.st_mtime_ns))


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


def mirror(source: str, target: str) -> None:
    """Let a program find the copy at `source` at `target`, in a private directory.

    As a tree of hard links, in which nobody can put a link in its way. If there can be none, as on
    another file system, as a link to `source`. Raises `GiveUp` for what a copy must not hold.
    """
    seen = look(source)
    top, old = os.fsencode(target), os.fsencode(source)
    with local(top, "make"):
        try:
            if not any(one.path == b"" for one in seen):
                os.mkdir(top)
            for one in sorted(seen, key=lambda one: one.path):
                path = join(top, one.path)
                if one.kind == "dir":
                    os.mkdir(path)
                elif one.kind == "link":
                    os.symlink(one.target, path)
                else:
                    link_file(join(old, one.path), path)
        except OSError as exc:
            if exc.errno not in CANNOT_LINK:
                raise
            remove(top)
            os.symlink(old, top)


@contextmanager
def landing(state: str, final: str) -> Iterator[bytes]:
    """Make a private directory for what other programs write of the copy at `final`; then it goes.

    One that was left there when a process was killed is emptied.
    """
    incoming = make_private(f"{state}/incoming")
    path = os.path.join(incoming, blake3(os.fsencode(final)).hexdigest()[:_ENOUGH])
    with local(os.fsencode(path), "make"):
        remove(path)
        os.mkdir(path, MODE)
    try:
        yield os.fsencode(path)
    finally:
        with suppress(OSError):
            remove(path)


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
