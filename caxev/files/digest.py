"""Reading a tree once, across cores, for its digests. Runs in a worker process."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from attrs import define, field
from blake3 import blake3

from caxev.files.manifest import Item, Manifest
from caxev.files.paths import printable
from caxev.files.tree import Seen, look, manifest_of
from caxev.job import Retry

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

Report: TypeAlias = Callable[[int, int], None]
"""Called as ``report(done, total)``, in bytes."""

CHUNK: Final = 2 << 20
_TICK: Final = 0.5  # seconds between two reports
_WIDE: Final = 64 << 20  # bytes from which one file is worth several cores


class _Hash(Protocol):
    def update(self, data: ReadableBuffer, /) -> object: ...


def digest_tree(root: str, *, sha512: bool, threads: int | None = None, report: Report) -> Manifest:
    """The manifest of the copy at `root` with the BLAKE3, and if wanted the SHA-512, of each file.

    Each file is read once, `threads` at a time (default: one a core). Memory stays below
    4 MiB a thread. Raises `GiveUp` as `scan` does; `Retry` where a file cannot be read, or
    anything in the tree changes meanwhile. Leaves nothing behind, however it ends.
    """
    threads = threads or len(os.sched_getaffinity(0))
    before = look(root)
    task = _Task(os.fsencode(root), sha512=sha512, total=sum(seen.size for seen in before))
    files = sorted((s for s in before if s.kind == "file"), key=lambda s: s.size, reverse=True)
    with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(threads) as helpers:
        wide = task.total // threads
        futures = [
            pool.submit(task.item, seen, helpers if seen.size > max(wide - 1, _WIDE) else None)
            for seen in files
        ]
        items = _collect(futures, task, report)
    if look(root) != before:
        raise Retry(f"{printable(task.root)} changed while it was read")
    rest = [item for item in manifest_of(before).items if item.kind != "file"]
    return Manifest([*items, *rest])


def _collect(futures: list[Future[Item]], task: _Task, report: Report) -> list[Item]:
    pending = set(futures)
    try:
        while pending:
            done, pending = wait(pending, timeout=_TICK)
            for future in done:
                future.result()
            report(task.done, task.total)
    finally:
        task.stopped = True
        for future in pending:
            future.cancel()
    return [future.result() for future in futures]


class _Stopped(Exception):  # never seen outside: another file's error is raised
    """Another file of the tree could not be read."""


@define(eq=False)
class _Task:
    root: bytes
    sha512: bool
    total: int
    counts: dict[bytes, int] = field(factory=dict)
    stopped: bool = False

    @property
    def done(self) -> int:
        return sum(self.counts.copy().values())

    def item(self, seen: Seen, helpers: ThreadPoolExecutor | None) -> Item:
        """Read one file; with `helpers`, the two digests of it in two threads."""
        path = os.path.join(self.root, seen.path) if seen.path else self.root
        b3 = blake3(max_threads=blake3.AUTO if helpers else 1)
        sha = hashlib.sha512() if self.sha512 else None
        try:
            with _opened(path, seen) as descriptor:
                for chunk in self._chunks(descriptor, path, seen):
                    _feed(chunk, b3, sha, helpers)
        except OSError as exc:
            raise Retry(f"cannot read {printable(path)}: {exc.strerror}") from exc
        return Item(seen.path, "file", seen.size, b3.digest(), sha.digest() if sha else None)

    def _chunks(self, descriptor: int, path: bytes, seen: Seen) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(min(CHUNK, seen.size + 1)))
        done = 0
        while count := os.readv(descriptor, [buffer]):
            if self.stopped:
                raise _Stopped
            yield buffer[:count]
            done += count
            self.counts[seen.path] = done
        if done != seen.size:
            raise _changed(path)


def _feed(
    chunk: memoryview, b3: _Hash, sha: _Hash | None, helpers: ThreadPoolExecutor | None
) -> None:
    beside = helpers.submit(sha.update, chunk) if helpers and sha else None
    b3.update(chunk)
    if beside:
        beside.result()
    elif sha:
        sha.update(chunk)


@contextmanager
def _opened(path: bytes, seen: Seen) -> Iterator[int]:
    """Open a file for reading from end to end, as it was seen and as it still must be then."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        _unchanged(descriptor, path, seen)
        yield descriptor
        _unchanged(descriptor, path, seen)
    finally:
        os.close(descriptor)


def _unchanged(descriptor: int, path: bytes, seen: Seen) -> None:
    status = os.fstat(descriptor)
    if (status.st_size, status.st_mtime_ns) != (seen.size, seen.mtime_ns):
        raise _changed(path)


def _changed(path: bytes) -> Retry:
    return Retry(f"{printable(path)} changed while it was read")
