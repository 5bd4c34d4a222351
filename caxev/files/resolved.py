"""Act on files by their resolved paths without following a link in any component.

`confine` resolves a path. Somebody who may write to a directory on it can put a link there
afterwards; the functions here then fail (ELOOP, ENOTDIR) and are not redirected. Linux' openat2(2)
does that in one call; if it is missing (before 5.6, or in a sandbox), each directory is opened in
turn. Paths must be absolute and without ``..``.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Final

from caxev.files.confined import Confined, parent

_OPENAT2: Final = 437  # the number of the call, on every machine
_AT_FDCWD: Final = -100
_NO_SYMLINKS: Final = 0x04
_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_libc: Final = ctypes.CDLL(None, use_errno=True)


class _How(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_resolved(path: Confined, flags: int, mode: int = 0) -> int:
    """As `os.open`, but no part of `path` may be a link, and no FIFO blocks. Raises OSError."""
    # O_NONBLOCK: somebody may have put a FIFO there, and opening one waits for its other end.
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC | (0 if flags & os.O_PATH else os.O_NONBLOCK)
    if not _has_openat2():
        return _open_step_by_step(path, flags, mode)
    while True:
        descriptor = _openat2(path, flags, mode if flags & os.O_CREAT else 0)
        if descriptor >= 0:
            return descriptor
        code = ctypes.get_errno()
        # EAGAIN: something on the way was renamed meanwhile, so the kernel cannot be sure.
        if code not in (errno.EINTR, errno.EAGAIN):
            raise OSError(code, os.strerror(code), os.fsdecode(path))


def _openat2(name: bytes, flags: int, mode: int) -> int:
    how = _How(flags, mode, _NO_SYMLINKS)
    size = ctypes.sizeof(how)
    return int(_libc.syscall(_OPENAT2, _AT_FDCWD, name, ctypes.byref(how), size))


@cache
def _has_openat2() -> bool:
    descriptor = _openat2(b"/", _DIRECTORY, 0)
    if descriptor >= 0:
        os.close(descriptor)
    return descriptor >= 0


def _open_step_by_step(name: bytes, flags: int, mode: int) -> int:
    # For kernels before 5.6, and containers that forbid the call. Each part is opened relative to
    # the one before, so that nobody can swap a directory for a link on the way.
    *above, last = [part for part in name.split(b"/") if part] or [b"."]
    directory = os.open(b"/" if name.startswith(b"/") else b".", _DIRECTORY)
    try:
        for part in above:
            inner = os.open(part, _DIRECTORY, dir_fd=directory)
            os.close(directory)
            directory = inner
        return os.open(last, flags, mode, dir_fd=directory)
    finally:
        os.close(directory)


@contextmanager
def opened(path: Confined, flags: int, mode: int = 0) -> Iterator[int]:
    """`open_resolved` for the length of a block."""
    descriptor = open_resolved(path, flags, mode)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def directory_of(path: Confined) -> Iterator[tuple[int, bytes]]:
    """Open the directory that holds `path`; yield it and the name, for calls with `dir_fd`."""
    with opened(parent(path), os.O_PATH | os.O_DIRECTORY) as descriptor:
        yield descriptor, os.path.basename(path)


def read_file(path: Confined, most: int, *, end: bool = False) -> bytes:
    """Return the first `most` bytes of a regular file, or with `end` its last.

    Raises OSError, also for anything else: a link, a directory, a FIFO.
    """
    with os.fdopen(open_resolved(path, os.O_RDONLY), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fsdecode(path))
        if end:
            file.seek(max(0, status.st_size - most))
        return file.read(most)


def unlink(path: Confined) -> None:
    """As `os.unlink`."""
    with directory_of(path) as (directory, name):
        os.unlink(name, dir_fd=directory)


def rmdir(path: Confined) -> None:
    """As `os.rmdir`."""
    with directory_of(path) as (directory, name):
        os.rmdir(name, dir_fd=directory)


def mkdir(path: Confined, mode: int) -> None:
    """Make a directory unless it exists, and set its mode, independent of the umask."""
    with directory_of(path) as (directory, name):
        with suppress(FileExistsError):
            os.mkdir(name, mode, dir_fd=directory)
        # By a descriptor: by its name the mode of a link's target would be changed.
        descriptor = os.open(name, _READ_DIRECTORY, dir_fd=directory)
        try:
            os.fchmod(descriptor, mode)
        finally:
            os.close(descriptor)


def symlink(target: bytes, path: Confined) -> None:
    """As `os.symlink`."""
    with directory_of(path) as (directory, name):
        os.symlink(target, name, dir_fd=directory)


def rename(old: Confined, new: Confined) -> None:
    """As `os.rename`."""
    with directory_of(old) as (here, name), directory_of(new) as (there, to):
        os.rename(name, to, src_dir_fd=here, dst_dir_fd=there)


def link(old: Confined, new: Confined) -> None:
    """As `os.link`; a link is linked itself, not its target."""
    with directory_of(old) as (here, name), directory_of(new) as (there, to):
        os.link(name, to, src_dir_fd=here, dst_dir_fd=there, follow_symlinks=False)


def remove(path: Confined) -> None:
    """Remove the file, or directory with its content, at `path`; a missing path is no error.

    Directories of ours are removed even if they are read-only.
    """
    with suppress(FileNotFoundError), directory_of(path) as (directory, name):
        mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
        if not stat.S_ISDIR(mode):
            os.unlink(name, dir_fd=directory)
            return
        _remove_tree(directory, name)


def _remove_tree(directory: int, name: bytes) -> None:
    # Not shutil.rmtree: it would wait forever if somebody put a FIFO in a directory's place.
    inner = open_directory(directory, name)
    try:
        empty(inner)
    finally:
        os.close(inner)
    os.rmdir(name, dir_fd=directory)


def open_directory(directory: int, name: bytes) -> int:
    """Open a directory in a directory, to read it or to `empty` it."""
    return os.open(name, _READ_DIRECTORY, dir_fd=directory)


def empty(directory: int) -> None:
    """Remove the content of an open directory of ours, even if that is read-only."""
    try:
        _empty(directory)
    except PermissionError:
        os.fchmod(directory, 0o700)
        _empty(directory)


def _empty(directory: int) -> None:
    for entry in os.listdir(directory):
        name = os.fsencode(entry)
        # Tried at once: what an entry is could change after it was asked.
        try:
            os.unlink(name, dir_fd=directory)
        except IsADirectoryError:
            _remove_tree(directory, name)
        # Another process may be removing the same tree.
        except FileNotFoundError:
            continue


def chmod(path: Confined, mode: int) -> None:
    """As `os.chmod`, for files that can be opened for reading."""
    with opened(path, os.O_RDONLY) as descriptor:
        os.fchmod(descriptor, mode)


def sync(path: Confined) -> None:
    """Bring a file, or a directory's entries, to the disk."""
    with opened(path, os.O_RDONLY) as descriptor:
        os.fsync(descriptor)
