"""Moving the bytes of files: many files, and many blocks of a file, in flight over sessions.

Memory is bounded by structure: `_BIG_AT_ONCE` files with a window of blocks on each session, and
`_SMALL_AT_ONCE` files of one block.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from itertools import cycle
from typing import Final, Protocol, TypeVar

import asyncssh
from asyncssh import FXF_CREAT, FXF_READ, FXF_TRUNC, FXF_WRITE, SFTPAttrs, SFTPClientFile
from attrs import define, field
from blake3 import blake3

from caxev.files import FILE_MODE, Report, Seen, printable
from caxev.job import Retry
from caxev.ssh.endpoint import Endpoint, sftp_session
from caxev.ssh.plan import BLOCK, Piece, Plan
from caxev.ssh.remote import GONE, Remote, cancelled, each

T = TypeVar("T")

WINDOW: Final = 16  # blocks of one file in flight on one session; 4 MiB, twice a channel's window
UNSURE: Final = WINDOW * BLOCK
_BATCH: Final = 8  # blocks handed to a thread at once
_BIG_AT_ONCE: Final = 2
_SMALL_AT_ONCE: Final = 48
_REPORT_EVERY: Final = 0.2  # seconds
_STREAM_WORTH: Final = 64 << 20  # bytes that make one more connection worth its set-up
_FULL: Final = {errno.ENOSPC, errno.EDQUOT}
_SECOND: Final = 1_000_000_000


@contextmanager
def local(path: bytes, doing: str) -> Iterator[None]:
    """Turn what this machine's disk raises into `Retry`, naming the path."""
    try:
        yield
    except FileNotFoundError as exc:
        raise Retry(f"{printable(path)} vanished meanwhile") from exc
    except OSError as exc:
        if exc.errno in _FULL:
            raise Retry(f"disk full at {printable(path)}: {exc.strerror}") from exc
        raise Retry(f"cannot {doing} {printable(path)}: {exc.strerror}") from exc


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


@define
class Lanes:
    """The sessions that a transfer uses, and the threads that do what would block the loop."""

    remotes: Sequence[Remote]
    threads: ThreadPoolExecutor
    _turn: int = 0

    @property
    def first(self) -> Remote:
        return self.remotes[0]

    def of(self, size: int) -> Sequence[Remote]:
        """Those to use for a file of this size: all for a large one, else one in turn."""
        if size > UNSURE:
            return self.remotes
        self._turn += 1
        return [self.remotes[self._turn % len(self.remotes)]]

    async def thread(self, function: Callable[..., T], *args: object) -> T:
        """Run `function` in a thread. It is waited for even where we are cancelled meanwhile."""
        future = asyncio.get_running_loop().run_in_executor(self.threads, function, *args)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise


@asynccontextmanager
async def lanes_for(
    first: Remote, todo: Plan, nstreams: int, threads: ThreadPoolExecutor
) -> AsyncIterator[Lanes]:
    """The sessions for this much work: `first`, and as many more as are worth it."""
    more = max(0, min(nstreams - 1, todo.left // _STREAM_WORTH))
    async with AsyncExitStack() as stack:
        opening = [
            asyncio.create_task(stack.enter_async_context(_session(first.endpoint)))
            for _ in range(more)
        ]
        try:
            others = await asyncio.gather(*opening)
        finally:
            await cancelled(opening)
        yield Lanes([first, *others], threads)


@asynccontextmanager
async def _session(endpoint: Endpoint) -> AsyncIterator[Remote]:
    async with sftp_session(endpoint) as sftp:
        yield Remote(endpoint, sftp)


async def move_all(pieces: Iterable[Piece], move: Callable[[Piece], Awaitable[None]]) -> None:
    """Move every piece: a few large ones at a time, and many small ones beside them."""
    pieces = list(pieces)
    big = [piece for piece in pieces if piece.left > BLOCK]
    small = [piece for piece in pieces if piece.left <= BLOCK]
    tasks = [
        asyncio.create_task(each(move, big, _BIG_AT_ONCE)),
        asyncio.create_task(each(move, small, _SMALL_AT_ONCE)),
    ]
    try:
        await asyncio.gather(*tasks)
    finally:
        await cancelled(tasks)


class Sink(Protocol):
    """Where the blocks of one file go, in their order. Called in threads, one call at a time."""

    def put(self, blocks: Sequence[bytes], *, last: bool) -> None: ...
    def close(self) -> None: ...


@define
class DigestSink:
    """Takes the BLAKE3 of what passes and keeps nothing."""

    digest: blake3 = field(factory=blake3)

    def put(self, blocks: Sequence[bytes], *, last: bool) -> None:
        """Take the next blocks."""
        del last
        for block in blocks:
            self.digest.update(block)

    def close(self) -> None:
        """Nothing to close."""


@define
class FileSink:
    """Writes one file of a partial, from `piece.start` on, and takes the BLAKE3 of what passes.

    Blocks are written in their order, so a file that was cut off is right as far as it goes.
    Its time and mode are set when it is whole. Raises `Retry`.
    """

    path: bytes
    piece: Piece
    digest: blake3 = field(factory=blake3)
    _descriptor: int = -1

    def put(self, blocks: Sequence[bytes], *, last: bool) -> None:
        """Write the next blocks; with `last`, finish the file."""
        with local(self.path, "write"):
            if self._descriptor < 0:
                self._open()
            for block in blocks:
                self._write(block)
            if last:
                os.fchmod(self._descriptor, FILE_MODE)
                os.utime(self._descriptor, ns=(self.piece.file.mtime_ns,) * 2)
                self.close()
        for block in blocks:
            self.digest.update(block)

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._descriptor = os.open(self.path, flags, FILE_MODE)
        os.ftruncate(self._descriptor, self.piece.start)
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
    """Reads one file that is to be sent, from `piece.start` on, and takes its BLAKE3.

    Raises `Retry` where it is no longer what it was when the tree was looked at.
    """

    path: bytes
    piece: Piece
    digest: blake3 = field(factory=blake3)
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
            if self._at == self.piece.file.size:
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
        block = os.pread(self._descriptor, min(BLOCK, self.piece.file.size - self._at), self._at)
        if not block and self._at < self.piece.file.size:
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
    """Read the file at `path` there into `sink`, from `piece.start` on."""
    try:
        if piece.left == 0:
            await lanes.thread(_put, sink, [], True)
        else:
            await _fetch(lanes, path, piece, sink, progress)
    except GONE as exc:
        raise Retry(f"{lanes.first.shown(path)} vanished meanwhile") from exc
    finally:
        sink.close()


async def _fetch(lanes: Lanes, path: bytes, piece: Piece, sink: Sink, progress: Progress) -> None:
    shown = lanes.first.shown(path)
    async with _opened(lanes.of(piece.left), path, FXF_READ) as files:
        turn = cycle(files)
        ranges = iter(_ranges(piece))
        window: deque[asyncio.Task[bytes]] = deque()
        batch: list[bytes] = []
        try:
            while True:
                while len(window) < WINDOW * len(files) and (block := next(ranges, None)):
                    window.append(asyncio.create_task(_read(next(turn), *block, shown)))
                if window:
                    batch.append(await window.popleft())
                if len(batch) >= _BATCH or not window:
                    await lanes.thread(_put, sink, batch, not window)
                    progress.add(sum(map(len, batch)))
                    batch = []
                if not window:
                    return
        finally:
            await cancelled(window)


def _put(sink: Sink, blocks: Sequence[bytes], last: bool) -> None:
    sink.put(blocks, last=last)


def _ranges(piece: Piece) -> Iterable[tuple[int, int]]:
    size = piece.file.size
    return ((at, min(BLOCK, size - at)) for at in range(piece.start, size, BLOCK))


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
    """Write `source` to the file at `path` there, from `piece.start` on, to the disk."""
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
    flags = FXF_WRITE | FXF_CREAT | (0 if piece.start else FXF_TRUNC)
    async with _opened(lanes.of(piece.left), path, flags) as files:
        if piece.start:
            await files[0].setstat(SFTPAttrs(size=piece.start))
        if piece.left > BLOCK:
            await _send_blocks(lanes, files, source, progress)
            await asyncio.gather(*_finishing(files[0], piece.file))
        else:
            blocks = await lanes.thread(source.get, 1)
            # A session is served in order, so nothing here needs to wait for what is before it.
            writes = [files[0].write(block, piece.start) for block in blocks]
            await asyncio.gather(*writes, *_finishing(files[0], piece.file))
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
                if len(window) >= WINDOW * len(files):
                    progress.add(await window.popleft())
                window.append(asyncio.create_task(next(turn).write(block, at)))
                at += len(block)
        while window:
            progress.add(await window.popleft())
    finally:
        await cancelled(window)


def _finishing(file: SFTPClientFile, seen: Seen) -> list[Awaitable[None]]:
    when = seen.mtime_ns // _SECOND
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
    """The file, open in each of these sessions; the first may create it."""
    files: list[SFTPClientFile] = []
    try:
        for remote in remotes:
            files.append(await remote.sftp.open(path, flags, _NEW, block_size=None, encoding=None))
            flags &= ~(FXF_CREAT | FXF_TRUNC)
        yield files
    finally:
        await asyncio.gather(*(file.close() for file in files), return_exceptions=True)


_NEW: Final = SFTPAttrs(permissions=FILE_MODE)
