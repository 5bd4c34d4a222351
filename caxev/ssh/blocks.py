"""Moving the bytes of files: many files, and many blocks of a file, in flight over sessions.

Memory is bounded by structure: `_BIG_AT_ONCE` files with a window of blocks on each session, and
`_SMALL_AT_ONCE` files of one block.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from itertools import cycle
from typing import Final, Protocol, TypeVar

import asyncssh
from asyncssh import FXF_CREAT, FXF_READ, FXF_WRITE, SFTPAttrs, SFTPClientFile
from attrs import define, field

from caxev.files import FILE_MODE, PartDigest, Piece, Report, local, printable
from caxev.job import Retry
from caxev.ssh.plan import BLOCK
from caxev.ssh.remote import GONE, Remote, cancelled, each

T = TypeVar("T")

WINDOW: Final = 16  # blocks of one file in flight on one session; 4 MiB, twice a channel's window
UNSURE: Final = WINDOW * BLOCK
_BATCH: Final = 8  # blocks handed to a thread at once
_BIG_AT_ONCE: Final = 2
_SMALL_AT_ONCE: Final = 48
_REPORT_EVERY: Final = 0.2  # seconds
_SECOND: Final = 1_000_000_000


@define
class Progress:
    """Counts bytes, and passes the count on a few times a second."""

    report: Report
    total: int
    done: int = 0
    sent: int = 0
    _last: float = 0.0

    def add(self, count: int) -> None:
        """So many bytes more have been moved."""
        self.done += count
        self.sent += count
        now = time.monotonic()
        if now - self._last >= _REPORT_EVERY or self.done >= self.total:
            self._last = now
            self.report(self.done, self.total)

    def share(self) -> Report:
        """A report for another process that moves some of it."""
        before = 0

        def report(done: int, _total: int) -> None:
            nonlocal before
            self.add(done - before)
            before = done

        return report


@define
class Pace:
    """Keeps what is moved to so many bytes a second; None: as fast as it goes."""

    rate: float | None = None
    _free_at: float = 0.0

    async def take(self, count: int) -> None:
        """Wait until so many bytes more may be moved."""
        if self.rate is not None:
            now = time.monotonic()
            wait = self._free_at - now
            self._free_at = max(now, self._free_at) + count / self.rate
            if wait > 0:
                await asyncio.sleep(wait)


@define
class Lanes:
    """The sessions that one process uses, and the threads that do what would block its loop.

    With `finishing`, a file whose end was sent is given its time and brought to the disk over SFTP.
    `large` is the number of large stretches to move.
    """

    remotes: Sequence[Remote]
    threads: ThreadPoolExecutor
    pace: Pace = field(factory=Pace)
    finishing: bool = True
    large: int = 0
    _turn: int = 0

    @property
    def first(self) -> Remote:
        return self.remotes[0]

    def of(self, piece: Piece) -> Sequence[Remote]:
        """Those to use for this stretch: some where there are more than large stretches, else one.

        Each has its turn.
        """
        count = len(self.remotes) // max(1, self.large) if piece.left > UNSURE else 1
        self._turn += 1
        turned = [*self.remotes[self._turn % len(self.remotes) :], *self.remotes]
        return turned[: max(1, count)]

    async def thread(self, function: Callable[..., T], *args: object) -> T:
        """Run `function` in a thread. It is waited for even where we are cancelled meanwhile."""
        future = asyncio.get_running_loop().run_in_executor(self.threads, function, *args)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise


async def move_all(
    lanes: Lanes, pieces: Iterable[Piece], move: Callable[[Piece], Awaitable[None]]
) -> None:
    """Move every piece: a few large ones at a time, and many small ones beside them."""
    pieces = list(pieces)
    big = [piece for piece in pieces if piece.left > BLOCK]
    small = [piece for piece in pieces if piece.left <= BLOCK]
    lanes.large = len(big)
    tasks = [
        asyncio.create_task(each(move, big, max(_BIG_AT_ONCE, len(lanes.remotes)))),
        asyncio.create_task(each(move, small, _SMALL_AT_ONCE)),
    ]
    try:
        await asyncio.gather(*tasks)
    finally:
        await cancelled(tasks)


class Sink(Protocol):
    """Where the blocks of one file go, in their order. Called in threads, one call at a time."""

    digest: PartDigest

    def put(self, blocks: Sequence[bytes]) -> None: ...
    def close(self) -> None: ...


@define
class DigestSink:
    """Takes the BLAKE3 of what passes and keeps nothing."""

    digest: PartDigest = field(factory=PartDigest)

    def put(self, blocks: Sequence[bytes]) -> None:
        """Take the next blocks."""
        for block in blocks:
            self.digest.update(block)

    def close(self) -> None:
        """Nothing to close."""


@define
class FileSink:
    """Writes one stretch of a file of a partial, and takes the BLAKE3 of its parts as they pass.

    Blocks are written in their order, so a stretch that was cut off is right as far as it goes.
    Raises `Retry`.
    """

    path: bytes
    piece: Piece
    digest: PartDigest = field(factory=PartDigest)
    _descriptor: int = -1

    def put(self, blocks: Sequence[bytes]) -> None:
        """Write the next blocks."""
        with local(self.path, "write"):
            if self._descriptor < 0:
                self._open()
            for block in blocks:
                self._write(block)
        for block in blocks:
            self.digest.update(block)

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(self.path, flags, FILE_MODE)
        os.lseek(self._descriptor, self.piece.start, os.SEEK_SET)

    def _write(self, block: bytes) -> None:
        rest = memoryview(block)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]

    def close(self) -> None:
        """Close the file, whole or not."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


@define
class FileSource:
    """Reads a stretch of a file that is to be sent, and takes the BLAKE3 of its parts.

    Raises `Retry` where it is no longer what it was when the tree was looked at.
    """

    path: bytes
    piece: Piece
    digest: PartDigest = field(factory=PartDigest)
    _descriptor: int = -1
    _at: int = -1
    _done: bool = False

    def get(self, count: int) -> list[bytes]:
        """The next `count` blocks, fewer at the end and none after it."""
        if self._done:
            return []
        with local(self.path, "read"):
            if self._descriptor < 0:
                self._open()
            blocks = [block for _ in range(count) if (block := self._read())]
            if self._at == self.piece.stop:
                self._check()
                self.close()
                self._done = True
        for block in blocks:
            self.digest.update(block)
        return blocks

    def _open(self) -> None:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        self._descriptor = os.open(self.path, flags)
        self._at = self.piece.start
        self._check()

    def _read(self) -> bytes:
        block = os.pread(self._descriptor, min(BLOCK, self.piece.stop - self._at), self._at)
        if not block and self._at < self.piece.stop:
            raise changed(printable(self.path))
        self._at += len(block)
        return block

    def _check(self) -> None:
        status = os.fstat(self._descriptor)
        seen = self.piece.file
        if (status.st_size, status.st_mtime_ns) != (seen.size, seen.mtime_ns):
            raise changed(printable(self.path))

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


def changed(shown: str) -> Retry:
    """What to raise where a source is not what it was."""
    return Retry(f"{shown} changed while it was copied")


async def fetch(lanes: Lanes, path: bytes, piece: Piece, sink: Sink, progress: Progress) -> None:
    """Read a stretch of the file at `path` there into `sink`."""
    try:
        if piece.left == 0:
            await lanes.thread(sink.put, [])
        else:
            await _fetch(lanes, path, piece, sink, progress)
    except GONE as exc:
        raise Retry(f"{lanes.first.shown(path)} vanished meanwhile") from exc
    finally:
        sink.close()


async def _fetch(lanes: Lanes, path: bytes, piece: Piece, sink: Sink, progress: Progress) -> None:
    shown = lanes.first.shown(path)
    async with _opened(lanes.of(piece), path, FXF_READ) as files:
        turn = cycle(files)
        ranges = iter(_ranges(piece))
        window: deque[asyncio.Task[bytes]] = deque()
        batch: list[bytes] = []
        try:
            while True:
                while len(window) < WINDOW * len(files) and (block := next(ranges, None)):
                    await lanes.pace.take(block[1])
                    window.append(asyncio.create_task(_read(next(turn), *block, shown)))
                if window:
                    batch.append(await window.popleft())
                if len(batch) >= _BATCH or not window:
                    await lanes.thread(sink.put, batch)
                    progress.add(sum(map(len, batch)))
                    batch = []
                if not window:
                    return
        finally:
            await cancelled(window)


def _ranges(piece: Piece) -> Iterable[tuple[int, int]]:
    return ((at, min(BLOCK, piece.stop - at)) for at in range(piece.start, piece.stop, BLOCK))


async def _read(file: SFTPClientFile, offset: int, length: int, shown: str) -> bytes:
    """Exactly `length` bytes; servers may give fewer than asked for."""
    data = await _read_some(file, length, offset)
    while len(data) < length:
        more = await _read_some(file, length - len(data), offset + len(data))
        if not more:
            raise changed(shown)
        data += more
    return data


async def _read_some(file: SFTPClientFile, length: int, offset: int) -> bytes:
    data: object = await file.read(length, offset)
    assert isinstance(data, bytes)
    return data


async def send(
    lanes: Lanes, path: bytes, piece: Piece, source: FileSource, progress: Progress
) -> None:
    """Write `source` to its stretch of the file at `path` there."""
    try:
        await _send(lanes, path, piece, source, progress)
    except asyncssh.SFTPNoSpaceOnFilesystem as exc:
        raise Retry(f"disk full at {lanes.first.shown(path)}") from exc
    except asyncssh.SFTPFailure as exc:
        raise await _failure(lanes.first, path, exc) from exc
    finally:
        source.close()


async def _failure(remote: Remote, path: bytes, exc: asyncssh.SFTPFailure) -> Retry:
    """Version 3 has one code for every failure: find out whether the disk is full."""
    free = await remote.free(os.path.dirname(path))
    if free is not None and free < BLOCK:
        return Retry(f"disk full at {remote.shown(path)}: {free} bytes free")
    return Retry(f"cannot write {remote.shown(path)}: {exc}")


async def _send(
    lanes: Lanes, path: bytes, piece: Piece, source: FileSource, progress: Progress
) -> None:
    async with _opened(lanes.of(piece), path, FXF_WRITE | FXF_CREAT) as files:
        if piece.left > BLOCK:
            await _send_blocks(lanes, files, source, progress)
            await asyncio.gather(*_finishing(lanes, files[0], piece))
        else:
            await lanes.pace.take(piece.left)
            blocks = await lanes.thread(source.get, 1)
            # A session is served in order, so nothing here needs to wait for what is before it.
            writes = [files[0].write(block, piece.start) for block in blocks]
            await asyncio.gather(*writes, *_finishing(lanes, files[0], piece))
            progress.add(piece.left)


async def _send_blocks(
    lanes: Lanes, files: Sequence[SFTPClientFile], source: FileSource, progress: Progress
) -> None:
    """Send the blocks of one file, never more than a window beyond the first unacknowledged one.

    So what a cut-off file has there is right, but for a window at its end.
    """
    turn = cycle(files)
    window: deque[asyncio.Task[int]] = deque()
    at = source.piece.start
    try:
        while blocks := await lanes.thread(source.get, _BATCH):
            for block in blocks:
                await lanes.pace.take(len(block))
                if len(window) >= WINDOW * len(files):
                    progress.add(await window.popleft())
                window.append(asyncio.create_task(next(turn).write(block, at)))
                at += len(block)
        while window:
            progress.add(await window.popleft())
    finally:
        await cancelled(window)


def _finishing(lanes: Lanes, file: SFTPClientFile, piece: Piece) -> list[Awaitable[None]]:
    if not lanes.finishing or piece.stop < piece.file.size:
        return []
    when = piece.file.mtime_ns // _SECOND
    attrs = SFTPAttrs(permissions=FILE_MODE, atime=when, mtime=when)
    return [file.setstat(attrs), _fsync(file)]


async def _fsync(file: SFTPClientFile) -> None:
    try:
        await file.fsync()
    except asyncssh.SFTPOpUnsupported:
        return


@asynccontextmanager
async def _opened(
    remotes: Sequence[Remote], path: bytes, flags: int
) -> AsyncIterator[list[SFTPClientFile]]:
    """The file, open in each of these sessions."""
    opening = [
        remote.sftp.open(path, flags, _NEW, block_size=None, encoding=None) for remote in remotes
    ]
    others = await asyncio.gather(*opening, return_exceptions=True)
    files = [file for file in others if not isinstance(file, BaseException)]
    try:
        for failed in others:
            if isinstance(failed, BaseException):
                raise failed
        yield files
    finally:
        await asyncio.gather(*(file.close() for file in files), return_exceptions=True)


_NEW: Final = SFTPAttrs(permissions=FILE_MODE)
