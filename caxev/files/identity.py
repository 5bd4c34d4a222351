"""Identify the very file or directory at a path, to tie an irreversible step to it.

A process may be suspended between deciding and doing. When it continues, hours later, another one
may have finished its work, and a new copy may have the same name. The step must then hit what was
decided on, or nothing.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from contextlib import suppress
from typing import Final

from caxev.files.confined import Confined
from caxev.files.resolved import directory_of, empty, open_directory

_EMPTY_PATH: Final = 0x1000
_libc: Final = ctypes.CDLL(None, use_errno=True)
_NOFOLLOW: Final = 0x100
_INO: Final = 0x100
_BIRTH: Final = 0x800
# Called through libc: `os.stat` does not return the time of birth.
_SIZE: Final = 256  # bytes of struct statx


def identity(path: Confined) -> str | None:
    """Return a unique mark of what is at a path; None if there is nothing.

    It is ``MAJOR:MINOR:INODE:BORN``: the device, the inode number and, because inode numbers are
    used again, the time of birth in nanoseconds since 1970, by statx(2). On a file system without
    that time, as NFS may be, it is 0. A link is not followed. Raises OSError.
    """
    try:
        with directory_of(path) as (directory, name):
            return _identity_in(directory, name)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _identity_in(directory: int, name: bytes) -> str:
    """Return the identity of a name in a directory, or of the directory itself (``b""``)."""
    # The offsets of struct statx: stx_mask 0, stx_ino 32, stx_btime 80, stx_dev_major 136.
    found = _statx(directory, name)
    mask, inode = struct.unpack_from("=I", found)[0], struct.unpack_from("=Q", found, 32)[0]
    seconds, nanoseconds = struct.unpack_from("=qI", found, 80)
    device = struct.unpack_from("=II", found, 136)
    born = seconds * 1_000_000_000 + nanoseconds if mask & _BIRTH else 0
    return f"{device[0]}:{device[1]}:{inode}:{born}"


def is_same(found: str | None, mark: str | None) -> bool:
    """Return whether `found` and `mark` identify the same thing.

    Inode number and time of birth decide, as a device may have another number after a mount.
    Without a time of birth all must be equal: an inode number alone is soon used again.
    """
    if found is None or mark is None:
        return False
    here, there = found.split(":")[2:], mark.split(":")[2:]
    return found == mark or (here == there and here[-1:] != ["0"])


def may_be_same(found: str, mark: str) -> bool:
    """As `is_same`, but without a time of birth the inode number is enough."""
    return found.split(":")[2:] == mark.split(":")[2:]


def remove_marked(path: Confined, mark: str) -> bool:
    """Remove what is at a path if it may have the `mark`; return False if it has another.

    True if nothing is there. Raises OSError.
    """
    # A directory is compared and emptied through one descriptor, so what is put in its place
    # meanwhile stays. Files have no such call: between the check and unlink a gap remains.
    with suppress(FileNotFoundError), directory_of(path) as (directory, name):
        if not stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            if not may_be_same(_identity_in(directory, name), mark):
                return False
            os.unlink(name, dir_fd=directory)
            return True
        inner = open_directory(directory, name)
        try:
            if not may_be_same(_identity_in(inner, b""), mark):
                return False
            empty(inner)
        finally:
            os.close(inner)
        os.rmdir(name, dir_fd=directory)
    return True


def _statx(directory: int, name: bytes) -> bytes:
    buffer = ctypes.create_string_buffer(_SIZE)
    if _libc.statx(directory, name, _NOFOLLOW | _EMPTY_PATH, _INO | _BIRTH, buffer) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fsdecode(name))
    return buffer.raw
