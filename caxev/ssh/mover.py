"""Pulling and pushing a copy. The entry points are plain functions that run in a worker process.

Both write to a hidden partial beside the copy's final name, bring it to the disk, and rename it
there. Killed anywhere, the partial stays and the next attempt goes on with it; where the rename had
happened, the next attempt finds the copy and is done.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any, Final, TypeVar

from attrs import evolve, frozen
from blake3 import blake3

from caxev import crash
from caxev.files import (
    DIR_MODE,
    Manifest,
    Report,
    Seen,
    confine,
    inside,
    look,
    manifest_of,
    partial_path,
    printable,
    publish,
    shown,
    writing,
)
from caxev.job import GiveUp, Retry
from caxev.ssh.blocks import (
    UNSURE,
    DigestSink,
    FileSink,
    FileSource,
    Lanes,
    Progress,
    changed,
    fetch,
    lanes_for,
    local,
    move_all,
    send,
)
from caxev.ssh.endpoint import Endpoint, connected, sftp_session, started, translated
from caxev.ssh.plan import Moved, Piece, Plan, Transfer, plan, to_the_second
from caxev.ssh.remote import GONE, Remote, each, join

T = TypeVar("T")

_MARGIN: Final = 16 << 20  # bytes that a transfer leaves free
_THREADS: Final = 4
_BUSY_AFTER: Final = 5.0  # seconds


def pull(transfer: Transfer, *, report: Report) -> Moved:
    """Copy the tree at `remote_path` to `local_path`, which must not be there yet.

    Files keep their times; modes are 0644 and 0755. Raises `GiveUp` where a path leads out of its
    roots, the source is gone or holds what a copy must not, the host or our key is refused, or
    something else stands at `local_path`; `Retry` for all that may pass. Then the partial
    stays to be gone on with.
    """
    return _in_loop(_run(transfer, _pull, report))


def push(transfer: Transfer, *, report: Report) -> Moved:
    """Copy the tree at `local_path` to `remote_path`, which must not be there yet. As `pull`."""
    return _in_loop(_run(transfer, _push, report))


def remote_manifest(transfer: Transfer, *, report: Report) -> Manifest:
    """Read the copy at `remote_path` back and take its BLAKE3 digests. Raises as `pull` does."""
    return _in_loop(_run(transfer, _remote_manifest, report))


def check(endpoint: Endpoint) -> str:
    """Connect and start SFTP; the server's version and where we land. Raises as `pull` does."""
    return _in_loop(_check(endpoint))


def _in_loop(coroutine: Coroutine[Any, Any, T]) -> T:
    # Of our own making: asyncio.run would take the loop that trio_asyncio offers where that was
    # imported, which has no threads.
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        return runner.run(coroutine)


@frozen
class _Work:
    """What every transfer needs: itself, the first session, threads, and whom to tell."""

    transfer: Transfer
    remote: Remote
    threads: ThreadPoolExecutor
    report: Report

    @asynccontextmanager
    async def lanes(self, todo: Plan) -> AsyncIterator[Lanes]:
        async with lanes_for(self.remote, todo, self.transfer.nstreams, self.threads) as lanes:
            yield lanes

    async def confined(self) -> bytes:
        return await self.remote.confine(self.transfer.remote_path, self.transfer.remote_roots)

    async def look(self, path: bytes) -> list[Seen]:
        try:
            return await self.remote.look(path)
        except GONE as exc:
            raise GiveUp(f"source directory gone: {self.remote.shown(path)}") from exc


async def _run(transfer: Transfer, function: Callable[[_Work], Awaitable[T]], report: Report) -> T:
    endpoint = transfer.endpoint
    with ThreadPoolExecutor(_THREADS) as threads, translated(endpoint, transfer.remote_path):
        async with sftp_session(endpoint) as sftp:
            return await function(_Work(transfer, Remote(endpoint, sftp), threads, report))


async def _pull(work: _Work) -> Moved:
    began = time.monotonic()
    final = confine(work.transfer.local_path, work.transfer.local_roots)
    source_path = await work.confined()
    source = await work.look(source_path)
    partial = partial_path(final)
    if _exists(final):
        found = None if _exists(partial) else look(final, check=False)
        return _published_before(source, found, shown(final), began)
    _make_parents(final, work.transfer.local_roots)
    with _writing(partial, final, source):
        present = look(partial, check=False)
        todo = plan(source, present)
        _enough_space(todo, present, _free(partial), shown(final))
        _prepare(os.fsencode(partial), todo)
        crash.point("files.prepare")
        progress, digests = await _fetch_all(work, source_path, os.fsencode(partial), todo, source)
        with local(os.fsencode(partial), "write"):
            _make_links(os.fsencode(partial), todo)
        if await work.look(source_path) != source:
            raise changed(work.remote.shown(source_path))
        await asyncio.to_thread(_publish, partial, final)
    return _moved(source, progress, digests, began)


_exists = os.path.lexists


@contextmanager
def _writing(partial: str, final: str, source: list[Seen]) -> Iterator[None]:
    with ExitStack() as held:
        with local(os.fsencode(partial), "write"):
            held.enter_context(writing(partial, directory=not _is_file(source)))
        if os.path.lexists(final):
            raise Retry(f"{shown(final)} has just appeared", after=_BUSY_AFTER)
        yield


async def _fetch_all(
    work: _Work, source_path: bytes, partial: bytes, todo: Plan, source: list[Seen]
) -> tuple[Progress, dict[bytes, bytes]]:
    progress = _progress(work, todo, source)
    digests: dict[bytes, bytes] = {}
    async with work.lanes(todo) as lanes:

        async def move(piece: Piece) -> None:
            sink = FileSink(join(partial, piece.file.path), piece)
            await fetch(lanes, join(source_path, piece.file.path), piece, sink, progress)
            crash.point("files.file")
            if piece.start == 0:
                digests[piece.file.path] = sink.digest.digest()

        await move_all(todo.pieces, move)
    return progress, digests


def _progress(work: _Work, todo: Plan, source: list[Seen]) -> Progress:
    total = sum(seen.size for seen in source)
    return Progress(work.report, total, total - todo.left)


def _is_file(source: list[Seen]) -> bool:
    return len(source) == 1 and source[0].path == b""


def _make_parents(final: str, roots: tuple[str, ...]) -> None:
    """Make what is missing between a root, which must be there, and the copy."""
    if not any(os.path.isdir(root) and _above(root, final) for root in roots):
        raise Retry(f"no directory to hold {shown(final)}: {' or '.join(roots)} is not there")
    missing = []
    parent = os.path.dirname(final)
    while not os.path.isdir(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    with local(os.fsencode(parent), "make a directory in"):
        for path in reversed(missing):
            _make_directory(os.fsencode(path))


def _above(root: str, path: str) -> bool:
    return inside(os.fsencode(path), os.fsencode(os.path.realpath(root)))


def _make_directory(path: bytes) -> None:
    with suppress(FileExistsError):
        os.mkdir(path, DIR_MODE)
    os.chmod(path, DIR_MODE)


def _free(path: str) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def _enough_space(todo: Plan, present: list[Seen], free: int | None, where: str) -> None:
    """Raise `Retry` where what is to be added to the partial would not leave a margin free."""
    changing = {s.path for s in (*todo.remove, *(piece.file for piece in todo.pieces))}
    had = sum(seen.size for seen in present if seen.path in changing)
    need = sum(piece.file.size for piece in todo.pieces) - had
    if need > 0 and free is not None and need + _MARGIN > free:
        raise Retry(
            f"not enough space for {where}: needs {need / 1e6:,.1f} MB and "
            f"{_MARGIN / 1e6:,.1f} MB to spare, has {free / 1e6:,.1f} MB free"
        )


def _prepare(partial: bytes, todo: Plan) -> None:
    with local(partial, "prepare"):
        for seen in todo.remove:
            path = join(partial, seen.path)
            os.rmdir(path) if seen.kind == "dir" else os.unlink(path)
        for seen in todo.directories:
            _make_directory(join(partial, seen.path))


def _make_links(partial: bytes, todo: Plan) -> None:
    for seen in todo.links:
        os.symlink(seen.target, join(partial, seen.path))


def _publish(partial: str, final: str) -> None:
    with local(os.fsencode(final), "publish"):
        try:
            publish(partial, final)
        except FileExistsError as exc:
            raise GiveUp(f"{shown(final)} exists already and is not replaced") from exc


def _published_before(
    source: list[Seen], found: list[Seen] | None, where: str, began: float
) -> Moved:
    """Whether what stands under the final name is the work of an attempt killed after its rename.

    By names, kinds, sizes and times; its content is verified afterwards like any copy's. `found`
    is None where there is a partial too: then it is not.
    """
    if found is None or to_the_second(found) != to_the_second(source):
        raise GiveUp(f"{where} exists already and is not replaced")
    total = sum(seen.size for seen in source)
    return Moved(total, 0, _count(source), time.monotonic() - began)


def _count(source: list[Seen]) -> int:
    return sum(seen.kind == "file" for seen in source)


def _moved(
    source: list[Seen], progress: Progress, digests: Mapping[bytes, bytes], began: float
) -> Moved:
    files = _count(source)
    manifest = _digested(source, digests) if len(digests) == files else None
    return Moved(progress.total, progress.sent, files, time.monotonic() - began, manifest)


def _digested(source: list[Seen], digests: Mapping[bytes, bytes]) -> Manifest:
    items = manifest_of(source).items
    return Manifest(
        evolve(item, blake3=digests[item.path]) if item.kind == "file" else item for item in items
    )


async def _push(work: _Work) -> Moved:
    began = time.monotonic()
    remote = work.remote
    source_path = confine(work.transfer.local_path, work.transfer.local_roots)
    source = await asyncio.to_thread(_look_here, source_path)
    final = await work.confined()
    partial = os.fsencode(partial_path(os.fsdecode(final)))
    with _only_pusher(work.transfer.endpoint, final):
        if await remote.exists(final):
            found = None if await remote.exists(partial) else await remote.look(final, check=False)
            return _published_before(source, found, remote.shown(final), began)
        await remote.make_parents(final)
        present = await _present(remote, partial, source)
        todo = plan(source, present, unsure=UNSURE * _lanes(work))
        free = await remote.free(os.path.dirname(final))
        _enough_space(todo, present, free, remote.shown(final))
        await _prepare_there(remote, partial, todo, source)
        crash.point("ssh.prepare")
        progress, digests = await _send_all(work, source_path, partial, todo, source)
        await each(
            lambda link: remote.sftp.symlink(link.target, join(partial, link.path)), todo.links
        )
        if await asyncio.to_thread(_look_here, source_path) != source:
            raise changed(shown(source_path))
        await _sync_directories(remote, partial, source)
        await remote.publish(partial, final)
    return _moved(source, progress, digests, began)


def _lanes(work: _Work) -> int:
    return max(1, work.transfer.nstreams)


def _look_here(path: str) -> list[Seen]:
    if not os.path.lexists(path):
        raise GiveUp(f"source directory gone: {shown(path)}")
    return look(path)


@contextmanager
def _only_pusher(endpoint: Endpoint, final: bytes) -> Iterator[None]:
    """Keep a second process of this machine from pushing the same copy.

    A name in Linux's abstract socket namespace is free again when its holder dies, and leaves
    no file behind.
    """
    name = blake3(f"{endpoint}\0".encode() + final).hexdigest()
    with socket.socket(socket.AF_UNIX) as lock:
        try:
            lock.bind(f"\0caxev-push-{name}")
        except OSError as exc:
            busy = f"{endpoint}:{printable(final)} is being pushed by another process"
            raise Retry(busy, after=_BUSY_AFTER) from exc
        yield


async def _present(remote: Remote, partial: bytes, source: list[Seen]) -> list[Seen]:
    """What is in the partial there; one that cannot become this copy is removed."""
    try:
        mode = (await remote.sftp.lstat(partial)).permissions or 0
    except GONE:
        return []
    if stat.S_ISREG(mode) if _is_file(source) else stat.S_ISDIR(mode):
        return await remote.look(partial, check=False)
    if stat.S_ISDIR(mode):
        await remote.remove_tree(partial)
    else:
        await remote.sftp.remove(partial)
    return []


async def _prepare_there(remote: Remote, partial: bytes, todo: Plan, source: list[Seen]) -> None:
    for seen in todo.remove:
        await remote.remove(partial, seen)
    if not _is_file(source):
        await remote.make_directory(partial)
    for seen in todo.directories:
        await remote.make_directory(join(partial, seen.path))


async def _send_all(
    work: _Work, source_path: str, partial: bytes, todo: Plan, source: list[Seen]
) -> tuple[Progress, dict[bytes, bytes]]:
    progress = _progress(work, todo, source)
    digests: dict[bytes, bytes] = {}
    async with work.lanes(todo) as lanes:

        async def move(piece: Piece) -> None:
            file = FileSource(join(os.fsencode(source_path), piece.file.path), piece)
            await send(lanes, join(partial, piece.file.path), piece, file, progress)
            crash.point("ssh.file")
            if piece.start == 0:
                digests[piece.file.path] = file.digest.digest()

        await move_all(todo.pieces, move)
    return progress, digests


async def _sync_directories(remote: Remote, partial: bytes, source: list[Seen]) -> None:
    if not _is_file(source):
        directories = [seen.path for seen in source if seen.kind == "dir"]
        await each(lambda path: remote.fsync_directory(join(partial, path)), [*directories, b""])


async def _remote_manifest(work: _Work) -> Manifest:
    path = await work.confined()
    source = await work.look(path)
    todo = plan(source, ())
    progress = _progress(work, todo, source)
    digests: dict[bytes, bytes] = {}
    async with work.lanes(todo) as lanes:

        async def move(piece: Piece) -> None:
            sink = DigestSink()
            await fetch(lanes, join(path, piece.file.path), piece, sink, progress)
            digests[piece.file.path] = sink.digest.digest()

        await move_all(todo.pieces, move)
    if await work.look(path) != source:
        raise Retry(f"{work.remote.shown(path)} changed while it was read")
    return _digested(source, digests)


async def _check(endpoint: Endpoint) -> str:
    async with connected(endpoint) as connection:
        sftp = await started(endpoint, connection)
        with translated(endpoint):
            home = await sftp.realpath(b".")
        return f"{connection.get_extra_info('server_version')}, in {printable(home)}"
