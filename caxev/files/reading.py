"""Read ranges of files for their digests, in several threads. Used by `digest`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from attrs import define, field

from caxev.files.confined import Confined, join
from caxev.files.errors import changed, meaning
from caxev.files.manifest import PART
from caxev.files.meter import Report
from caxev.files.part_digest import PartDigest
from caxev.files.paths import printable
from caxev.files.resolved import open_resolved
from caxev.files.throttle import RateLimiter
from caxev.files.tree import Seen, check_unchanged
from caxev.files.uncached import aligned_buffer, drop, open_uncached, read_into

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

CHUNK: Final = 2 << 20  # bytes read at once; larger chunks do not stay in a core's cache
_STRETCH: Final = 16 * PART
_TICK: Final = 0.5  # seconds between two reports
_FLAGS: Final = os.O_RDONLY | os.O_NONBLOCK


class Hash(Protocol):
    """A digest that is computed from bytes as they pass."""

    def update(self, data: ReadableBuffer, /) -> object: ...


@define(eq=False)
class Stretch:
    """The bytes `start` to `stop` of a file, the digests that are wanted, and their values.

    `start` is the first byte of a part; a SHA-512 needs the whole file. The bytes are fed to the
    hashes in `also`, too.
    """

    seen: Seen
    start: int
    stop: int
    sha512: bool = False
    also: Sequence[Hash] = ()
    part_digests: list[bytes] = field(factory=list)
    sha512_digest: bytes | None = None

    @property
    def size(self) -> int:
        return self.stop - self.start


_Buffers: TypeAlias = tuple[memoryview, memoryview]


def stretches(seen: Seen, stop: int) -> list[Stretch]:
    """Cut the file up to `stop` between parts, for several threads; an empty file is one."""
    starts = range(0, max(stop, 1), _STRETCH)
    return [Stretch(seen, at, min(at + _STRETCH, stop)) for at in starts]


def read_all(
    root: Confined,
    todo: Sequence[Stretch],
    threads: int | None,
    report: Report,
    max_rate: float | None = None,
    *,
    cached: bool = False,
) -> None:
    """Feed every stretch of the files below `root` to its hashes, at `max_rate` bytes a second.

    The bytes come from the disk (see `uncached`), or with `cached` from memory if they are there.
    Raises `Retry` if a file cannot be read or is not as it was listed. However this ends, every
    thread has ended.
    """
    # Two pools, because a thread of one waits for a thread of the other: in a single pool all
    # could wait for work that nobody is left to do.
    threads = threads or len(os.sched_getaffinity(0))
    with (
        ThreadPoolExecutor(threads) as ahead,
        ThreadPoolExecutor(threads) as pool,
    ):
        readers = _Readers(root, todo, threads, ahead, RateLimiter(max_rate), cached)
        futures = [pool.submit(readers.run, number) for number in range(threads)]
        _wait(futures, readers, report)


def _wait(futures: Sequence[Future[None]], readers: _Readers, report: Report) -> None:
    pending = set(futures)
    try:
        while pending:
            done, pending = wait(pending, _TICK, FIRST_EXCEPTION)
            for future in done:
                future.result()
            report(sum(readers.counts), readers.total)
    finally:
        readers.stopped = True


class _Stopped(Exception):  # never seen outside: another thread's error is raised
    """Another thread failed, or the digests are no longer wanted."""


@define(eq=False)
class _Readers:
    """The state that the threads share. Each takes the next stretch, with buffers of its own."""

    root: Confined
    todo: Sequence[Stretch]
    threads: int
    ahead: ThreadPoolExecutor
    limiter: RateLimiter
    cached: bool
    total: int = field(init=False)
    counts: list[int] = field(init=False)
    stopped: bool = False
    _left: Iterator[Stretch] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.total = sum(one.size for one in self.todo)
        self.counts = [0] * self.threads
        # The largest come first, so that all threads end at about the same time. A list's iterator
        # needs no lock: `next` on it is atomic.
        self._left = iter(sorted(self.todo, key=lambda one: one.size, reverse=True))

    def run(self, number: int) -> None:
        """Run thread `number`: take stretches until none is left."""
        buffers = aligned_buffer(CHUNK), aligned_buffer(CHUNK)
        for one in self._left:
            self._digest(one, buffers, number)

    def _digest(self, one: Stretch, buffers: _Buffers, number: int) -> None:
        path = join(self.root, one.seen.path)
        parts = PartDigest()
        sha512 = hashlib.sha512() if one.sha512 else None
        hashes: list[Hash] = [parts, *([sha512] if sha512 else []), *one.also]
        try:
            self._feed_all(path, one, hashes, buffers, number)
        except OSError as exc:
            raise meaning(exc, f"cannot read {printable(path)}") from exc
        one.part_digests = parts.parts()
        one.sha512_digest = sha512.digest() if sha512 else None

    def _feed_all(
        self, path: Confined, one: Stretch, hashes: list[Hash], buffers: _Buffers, number: int
    ) -> None:
        descriptor = self._open(path, one)
        try:
            if one.size > CHUNK:
                os.posix_fadvise(descriptor, one.start, one.size, os.POSIX_FADV_SEQUENTIAL)
                check_unchanged(descriptor, one.seen, path)  # early, or much would be read in vain
            with closing(_chunks(descriptor, path, one, buffers, self.ahead)) as chunks:
                for chunk in chunks:
                    if self.stopped:
                        raise _Stopped
                    for each in hashes:
                        each.update(chunk)
                    self.limiter.passed(len(chunk))
                    self.counts[number] += len(chunk)
            check_unchanged(descriptor, one.seen, path)
            if not self.cached:
                drop(descriptor, one.start, one.size)  # keep other programs' pages in the cache
        finally:
            os.close(descriptor)

    def _open(self, path: Confined, one: Stretch) -> int:
        if self.cached or not one.size:
            return open_resolved(path, _FLAGS)
        return open_uncached(path, one.start, one.size)


def _chunks(
    descriptor: int, path: bytes, one: Stretch, buffers: _Buffers, ahead: ThreadPoolExecutor
) -> Generator[memoryview]:
    """Yield the bytes of a stretch in turn. While one chunk is used, `ahead` reads the next."""
    # The kernel does not read ahead for direct reads: without this, disk and hash took turns, at
    # half the speed.

    def read(at: int, buffer: memoryview) -> int:
        return read_into(descriptor, buffer, at, min(CHUNK, one.stop - at))

    at, (this, other) = one.start, buffers
    count = read(at, this) if one.size else 0
    while at < one.stop:
        if count == 0:
            raise changed(printable(path))
        after = at + count
        coming = ahead.submit(read, after, other) if after < one.stop else None
        try:
            yield this[:count]
        finally:
            # Also on the way out: the caller then closes the descriptor that `ahead` reads from.
            count = coming.result() if coming else 0
        at, this, other = after, other, this
