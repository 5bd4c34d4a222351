"""Publish a copy under its final name: complete, on the disk, and never over something else.

A copy is written to its `partial_path`, under the lock that `writing` takes, and `publish` renames
it. If the process is killed anywhere in between, the partial stays and can be resumed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Final

from caxev import failpoints
from caxev.core.errors import Retry
from caxev.files.confined import Confined, join, parent
from caxev.files.errors import BUSY_AFTER, local
from caxev.files.paths import lock_path, printable
from caxev.files.resolved import (
    directory_of,
    link,
    mkdir,
    open_resolved,
    opened,
    remove,
    rename,
    sync,
    unlink,
)
from caxev.files.tree import look

DIR_MODE: Final = 0o755
FILE_MODE: Final = 0o644
_MANY: Final = 64  # files, above which one sync of the file system is cheaper
_RENAME_NOREPLACE: Final = 1
_CANNOT: Final = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}
_NO_LOCKS: Final = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}
_libc: Final = ctypes.CDLL(None, use_errno=True)


@contextmanager
def writing(partial: Confined, *, directory: bool) -> Iterator[None]:
    """Hold the exclusive right to write `partial`, and make it if it is missing.

    A partial of the other kind (file or directory) is removed. Raises `Retry` if another process
    holds the lock. However the block ends, the written data stays.
    """
    # The lock is an `flock` on the partial itself: it ends with this process, and leaves no file.
    with _locked_beside(partial) if directory else nullcontext():
        _clear_other_kind(partial, directory=directory)
        descriptor = _made(partial, directory=directory)
        try:
            _lock(descriptor, partial)
            yield
        finally:
            os.close(descriptor)


@contextmanager
def _locked_beside(directory: Confined) -> Iterator[None]:
    """Hold a lock on a file beside a directory.

    On NFS and Lustre other machines see locks on files, and none on directories.
    """
    path = lock_path(directory)
    with opened(path, os.O_RDWR | os.O_CREAT, FILE_MODE) as descriptor:
        try:
            _lock(descriptor, path, directory)
        except OSError as exc:
            # Lustre without `flock`: the lock on the directory still keeps processes of this
            # machine apart.
            if exc.errno not in _NO_LOCKS:
                raise
        try:
            yield
        finally:
            # While it is locked: who has opened it by then finds that it has lost its name.
            forget_lock(directory)


def forget_lock(directory: Confined) -> None:
    """Remove the lock beside a directory that is gone: a process that was killed leaves it."""
    with suppress(FileNotFoundError):
        unlink(lock_path(directory))


def _clear_other_kind(partial: Confined, *, directory: bool) -> None:
    try:
        mode = os.lstat(partial).st_mode
    except FileNotFoundError:
        return
    if directory and not stat.S_ISDIR(mode):
        unlink(partial)
    elif not directory and not stat.S_ISREG(mode):
        remove(partial)


def _made(partial: Confined, *, directory: bool) -> int:
    if not directory:
        return open_resolved(partial, os.O_RDWR | os.O_CREAT, FILE_MODE)
    mkdir(partial, DIR_MODE)
    return open_resolved(partial, os.O_RDONLY | os.O_DIRECTORY)


def _lock(descriptor: int, path: Confined, partial: Confined | None = None) -> None:
    """Lock the open file at `path`. Raises `Retry` that `partial`, or it, is being written."""
    name = printable(partial or path)
    busy = Retry(f"{name} is being written by another process", after=BUSY_AFTER)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise busy from exc
    if not _is_still(descriptor, path):  # the lock is on what has another name by now
        raise busy


def _is_still(descriptor: int, path: Confined) -> bool:
    """Return whether `path` still names the open file: its writer may have published it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def publish(partial: Confined, final: Confined) -> None:
    """Bring all of `partial` to the disk and rename it to `final`, replacing nothing.

    If it was killed at any point, it can be called again: `final` without `partial` counts as done,
    and so do two names of one file. Raises FileExistsError if both exist, FileNotFoundError if
    neither does, OSError if the disk fails.
    """
    # Sync before the rename: after a power cut the final name must lead to all the data.
    if _are_one(partial, final):
        unlink(partial)
    elif os.path.lexists(partial):
        failpoints.point("files.sync")
        sync_tree(partial)
        failpoints.point("files.sync")
        failpoints.point("files.publish.rename")
        rename_new(partial, final)
        failpoints.point("files.publish.rename")
    elif not os.path.lexists(final):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), partial)
    sync(parent(final))


def withdraw(final: Confined, partial: Confined) -> None:
    """Rename the copy at `final` back to a partial; the inverse of `publish`.

    Raises `Retry` if a process holds it, FileExistsError if there is another partial, OSError if
    the disk fails.
    """
    with _holding(final):
        rename_new(final, partial)


def make_above(path: Confined) -> None:
    """Make the missing directories above a path, and sync them. Raises `Retry`, or `GiveUp`."""
    missing, above = [], parent(path)
    while not os.path.isdir(above):
        missing.append(above)
        above = parent(above)
    with local(above, "make a directory in"):
        for directory in reversed(missing):
            mkdir(directory, DIR_MODE)
            # After a power cut the copy would be lost with a directory above it.
            sync(parent(directory))


def end_rename(partial: Confined, final: Confined) -> None:
    """Remove `partial` if `final` names the same file: a rename in two steps was interrupted.

    Raises `Retry` if its process still lives, OSError if the disk fails.
    """
    if _are_one(partial, final):
        with _holding(partial):
            if _are_one(partial, final):  # again, now that nobody else can be at it
                unlink(partial)
                sync(parent(final))


@contextmanager
def _holding(path: Confined) -> Iterator[None]:
    """Hold the exclusive right to write the file at `path`, whichever of its names that is."""
    # Over NFS an exclusive flock is a lock on bytes, for which a file must be open for writing.
    flags = os.O_RDONLY if os.path.isdir(path) else os.O_RDWR
    with opened(path, flags) as descriptor:
        _lock(descriptor, path)
        yield


def _are_one(one: Confined, other: Confined) -> bool:
    try:
        return os.path.samestat(os.lstat(one), os.lstat(other))
    except FileNotFoundError:
        return False


def sync_tree(root: Confined) -> None:
    """Bring every file and directory of a tree to the disk. Raises OSError."""
    seen = look(root)
    if sum(s.kind == "file" for s in seen) > _MANY and _syncfs(root):
        return
    # From the inside out: a directory comes after everything that it holds.
    paths = {b"", *(s.path for s in seen if s.kind != "link")}
    for path in sorted(paths, reverse=True):
        sync(join(root, path))


def _syncfs(root: Confined) -> bool:
    with opened(root, os.O_RDONLY) as descriptor:
        if _libc.syncfs(descriptor) == 0:
            return True
    _raise_unless_unable(root, root)
    return False


def rename_new(old: Confined, new: Confined) -> None:
    """Rename, or raise FileExistsError: nothing is replaced."""
    failpoints.before("rename")
    with directory_of(old) as (here, name), directory_of(new) as (there, to):
        if _libc.renameat2(here, name, there, to, _RENAME_NOREPLACE) != 0:
            _raise_unless_unable(old, new)
            _rename_new_portably(old, new)


def _raise_unless_unable(old: Confined, new: Confined) -> None:
    code = ctypes.get_errno()
    if code not in _CANNOT:
        raise OSError(code, os.strerror(code), old, None, new)


def _rename_new_portably(old: Confined, new: Confined) -> None:
    """Rename on file systems without RENAME_NOREPLACE, such as NFS."""
    if os.path.isdir(old):
        # A rename onto a directory that holds anything fails by itself, so between these two
        # lines at worst an empty directory can be replaced.
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
        rename(old, new)
    else:
        # A hard link fails if the name is taken, without a race. Killed between the two steps, the
        # file has both names, which `publish` and `end_rename` recognize.
        link(old, new)
        failpoints.point("files.link")
        unlink(old)
