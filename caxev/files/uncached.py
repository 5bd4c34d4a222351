"""Read files from the disk and not from the page cache. Used by `reading`.

A cached page hides that its block has gone bad. So a read that proves a copy bypasses the cache: by
O_DIRECT, which also writes out dirty pages, or, if the file system refuses that, by writing the
file out and dropping its pages first. tmpfs has no disk behind it. NFS, overlay and
FUSE file systems, btrfs and ZFS with compression, and ext4 with journalled data may still answer
from memory, theirs or the server's.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from typing import Final

from caxev.files.confined import Confined
from caxev.files.resolved import open_resolved

ALIGNED: Final = 4096
"""Offsets and lengths of direct reads are multiples of this, which suits nearly every disk."""
# O_NONBLOCK: opening a FIFO that somebody put in a file's place would wait forever.
_FLAGS: Final = os.O_RDONLY | os.O_NONBLOCK
_READ_ONLY: Final = {errno.EROFS, errno.EINVAL, errno.EBADF}


def aligned_buffer(size: int) -> memoryview:
    """Return a buffer that starts at a page, as direct reads need."""
    return memoryview(mmap.mmap(-1, size))


def open_uncached(path: Confined, start: int, size: int) -> int:
    """Open a file to read these bytes of it from the disk. Raises OSError."""
    try:
        descriptor = open_resolved(path, _FLAGS | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        descriptor = open_resolved(path, _FLAGS)
    try:
        if not _is_direct(descriptor):
            _write_out(descriptor)
        drop(descriptor, start, size)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_into(descriptor: int, buffer: memoryview, at: int, count: int) -> int:
    """Read up to `count` bytes from `at` on, 0 at the end of the file. Raises OSError.

    `buffer` has room for `count` rounded up to `ALIGNED`: a direct read of a file's last bytes
    asks for the rest of their block as well.
    """
    whole = buffer[: -(-count // ALIGNED) * ALIGNED]
    try:
        return min(os.preadv(descriptor, [whole], at), count)
    except OSError as error:
        if error.errno != errno.EINVAL or not _is_direct(descriptor):
            raise
    # The file system accepted the flag but refuses the read, as for a disk with larger blocks.
    fcntl.fcntl(descriptor, fcntl.F_SETFL, _FLAGS)
    _write_out(descriptor)
    drop(descriptor, at, 0)
    return min(os.preadv(descriptor, [whole], at), count)


def drop(descriptor: int, start: int, size: int) -> None:
    """Forget the pages of these bytes (0: to the end) that are clean and that nobody has mapped."""
    os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)


def _is_direct(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)


def _write_out(descriptor: int) -> None:
    """Write dirty pages to the disk: `drop` cannot drop them."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise
