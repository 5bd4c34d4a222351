"""Which very file or directory stands at a path: what an irreversible step is tied to.

A process may stop between deciding and doing. When it goes on, hours later, another one may have
finished its work, and a new copy may stand under the same name. What it does then must hit what it
had decided on, or nothing.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from contextlib import suppress
from typing import Final

from caxev.files.resolved import directory_of, empty, open_directory

_EMPTY_PATH: Final = 0x1000
_libc: Final = ctypes.CDLL(None, use_errno=True)
_NOFOLLOW: Final = 0x100
_INO: Final = 0x100
_BIRTH: Final = 0x800
_SIZE: Final = 256  # bytes of struct statx


def identity(path: str | bytes) -> str | None:
    """Return a word for what stands at a path that fits nothing else, ever; None: nothing does.

    It is made of the device, the inode number and, as that number is used again, the time of birth.
    A file system that keeps no such time, as NFS may, has the inode number alone. A link is not
    followed. Raises OSError.
    """
    try:
        with directory_of(path) as (directory, name):
            return _identity_in(directory, name)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _identity_in(directory: int, name: bytes) -> str:
    """The identity of what has that name in a directory, or of the directory itself (``b""``)."""
    found = _statx(directory, name)
    mask, inode = struct.unpack_from("=I", found)[0], struct.unpack_from("=Q", found, 32)[0]
    seconds, nanoseconds = struct.unpack_from("=qI", found, 80)
    device = struct.unpack_from("=II", found, 136)
    born = seconds * 1_000_000_000 + nanoseconds if mask & _BIRTH else 0
    return f"{device[0]}:{device[1]}:{inode}:{born}"


def is_same(found: str | None, mark: str | None) -> bool:
    """Return whether what was `found` is what `mark` was made of, maybe before a mount.

    A device has another number after that, so inode number and time of birth decide. Without a time
    of birth, all must be equal: an inode number alone is soon used again.
    """
    if found is None or mark is None:
        return False
    here, there = found.split(":")[2:], mark.split(":")[2:]
    return found == mark or (here == there and here[-1:] != ["0"])


def may_be_same(found: str, mark: str) -> bool:
    """As `is_same`; without a time of birth the inode number is enough, whatever the device."""
    return found.split(":")[2:] == mark.split(":")[2:]


def remove_marked(path: str, mark: str) -> bool:
    """Remove what stands at a path if it may be what `mark` was made of; else return False.

    A directory is compared and emptied through one descriptor: what is put in its place meanwhile
    stays. A file has but its name. True if nothing stands there. Raises OSError.
    """
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
