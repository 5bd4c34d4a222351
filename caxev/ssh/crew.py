"""Several processes that move one copy together.

Packing and unpacking what goes through SSH keeps a core busy, so large work is shared out: the
first share is moved in this process, each other one in a helper with a connection of its own.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final, Literal, TypeAlias, TypeVar

import asyncssh
from asyncssh import SFTPClient
from attrs import define, field, frozen

from caxev import crash
from caxev.files import Piece, Report, join
from caxev.helpers import Helper
from caxev.ssh.blocks import (
    DigestSink,
    FileSink,
    FileSource,
    Lanes,
    Pace,
    Progress,
    fetch,
    move_all,
    send,
)
from caxev.ssh.endpoint import Endpoint, connected, started, translated
from caxev.ssh.remote import Remote, cancelled

T = TypeVar("T")

Digests: TypeAlias = dict[bytes, dict[int, list[bytes]]]
"""The BLAKE3 of parts, by the file's path and the stretch's first byte."""

THREADS: Final = 4
_MOST: Final = 4  # processes
_WORTH: Final = 48 << 20  # bytes that make one more process worth its connection
_FILE: Final = 64 << 10  # bytes
_FRESH: Final = 20.0  # seconds after which a way is not trusted to be open still
ON_ONE: Final = 8
"""Channels on a connection at most; OpenSSH allows 10 unless told otherwise."""
_WINDOW: Final = 2 << 20  # bytes that OpenSSH lets a channel have under way
_RATE: Final = 400e6  # bytes a second that the channels together should be able to carry


@frozen
class Share:
    """What one process moves of a copy.

    `local` and `remote` are the trees on both sides. `do`: pull, push, or only read for digests.
    `nstreams` are for all `processes` together. `finishing`: a pushed file gets its time, and is
    brought to the disk, over SFTP.
    """

    endpoint: Endpoint
    do: Literal["pull", "push", "read"]
    local: bytes
    remote: bytes
    pieces: tuple[Piece, ...]
    nstreams: int
    processes: int
    rate: float | None = None
    finishing: bool = True


def weight_of(sizes: Iterable[int]) -> int:
    """What moving files of these sizes costs, in bytes: a file costs something, however small."""
    return sum(size + _FILE for size in sizes)


def processes_for(weight: int, nstreams: int) -> int:
    """How many processes so much work is worth, in bytes."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(_MOST, cores, nstreams, weight // _WORTH))


def channels_for(round_trip: float, nstreams: int, processes: int) -> int:
    """How many channels each process should have where an answer takes `round_trip` seconds."""
    wanted = math.ceil(_RATE * round_trip / _WINDOW)
    return min(ON_ONE, max(1, -(-min(wanted, nstreams) // processes)))


@define
class Way:
    """A connection, and the sessions on it. Use `way_on`."""

    endpoint: Endpoint
    connection: asyncssh.SSHClientConnection
    first: Remote
    round_trip: float
    _opening: list[asyncio.Task[SFTPClient]]

    async def remotes(self, nstreams: int, processes: int) -> list[Remote]:
        """As many sessions as each of so many processes should have."""
        count = channels_for(self.round_trip, nstreams, processes)
        while len(self._opening) < count - 1:
            self._opening.append(asyncio.create_task(started(self.endpoint, self.connection)))
        opened = await asyncio.gather(*self._opening[: count - 1], return_exceptions=True)
        # A server that allows fewer is served by fewer.
        return [
            self.first,
            *(Remote(self.endpoint, one) for one in opened if isinstance(one, SFTPClient)),
        ]


@asynccontextmanager
async def way_on(
    connection: asyncssh.SSHClientConnection, endpoint: Endpoint, sessions: int = 1
) -> AsyncIterator[Way]:
    """Start SFTP on a connection, and see how long an answer takes.

    `sessions` are opened at once, as each takes four round trips; more can be had later. They
    end with their connection.
    """
    opening = [asyncio.create_task(started(endpoint, connection)) for _ in range(sessions)]
    try:
        sftp = await opening.pop(0)
        began = time.monotonic()
        await sftp.realpath(b".")
        yield Way(endpoint, connection, Remote(endpoint, sftp), time.monotonic() - began, opening)
    finally:
        await cancelled(opening)


def sessions_for(nstreams: int, processes: int) -> int:
    """How many sessions a process opens before it knows how long answers take."""
    return max(1, min(ON_ONE, nstreams // processes)) if processes > 1 else 1


# -- helpers ------------------------------------------------------------------------------------


@define
class Crew:
    """Helpers for one transfer. They connect while it is still being found out what to move."""

    endpoint: Endpoint
    nstreams: int
    _coming: list[asyncio.Task[Helper]] = field(init=False, factory=list)

    def call(self, processes: int) -> None:
        """See to it that there are helpers enough for so many processes."""
        self._coming += [
            asyncio.create_task(self._connected(processes))
            for _ in range(processes - 1 - len(self._coming))
        ]

    async def _connected(self, processes: int) -> Helper:
        helper = Helper.take()
        await _told(helper, connect, self.endpoint, self.nstreams, processes)
        return helper

    async def move(self, shares: Sequence[Share], way: Way, progress: Progress) -> Digests:
        """Move all shares at once, the first over this way. The first error ends them all."""
        self.call(len(shares))
        moving = [asyncio.create_task(move_here(shares[0], way, progress))]
        moving += [asyncio.create_task(self._helped(one, progress)) for one in shares[1:]]
        try:
            return merged(await asyncio.gather(*moving))
        finally:
            await cancelled(moving)

    async def _helped(self, share: Share, progress: Progress) -> Digests:
        helper = await self._coming.pop()
        found = await _told(helper, move_share, share, on_progress=progress.share())
        helper.rest()
        return found

    async def dismiss(self) -> None:
        """Let those go that were not needed."""
        await cancelled(self._coming)
        for coming in self._coming:
            if not coming.cancelled() and coming.exception() is None:
                await asyncio.to_thread(coming.result().close)


async def _told(
    helper: Helper,
    function: Callable[..., T],
    *args: object,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> T:
    """Have a helper do something. Where that fails, or is cancelled, the helper is ended."""
    loop = asyncio.get_running_loop()

    def report(done: int, total: int) -> None:
        loop.call_soon_threadsafe(on_progress, done, total)

    running = asyncio.ensure_future(
        asyncio.to_thread(helper.run, function, *args, on_progress=report)
    )
    try:
        return await asyncio.shield(running)
    except BaseException:
        helper.kill()
        await asyncio.gather(running, return_exceptions=True)
        helper.close()
        raise


def merged(found: Iterable[Digests]) -> Digests:
    """The digests that several have taken."""
    every: Digests = {}
    for digests in found:
        for path, parts in digests.items():
            every.setdefault(path, {}).update(parts)
    return every


class _Far:
    """A helper's way, open from `connect` to the end of `move_share`."""

    def __init__(self, endpoint: Endpoint, nstreams: int, processes: int) -> None:
        self._since = time.monotonic()
        self._runner = asyncio.Runner()
        self._held = AsyncExitStack()
        try:
            self._way = self._runner.run(self._open(endpoint, nstreams, processes))
        except BaseException:
            self._runner.close()
            raise

    async def _open(self, endpoint: Endpoint, nstreams: int, processes: int) -> Way:
        connection = await self._held.enter_async_context(connected(endpoint))
        sessions = sessions_for(nstreams, processes)
        return await self._held.enter_async_context(way_on(connection, endpoint, sessions))

    @property
    def age(self) -> float:
        """Seconds for which nobody has answered the server on this way."""
        return time.monotonic() - self._since

    def close(self) -> None:
        """Give the way up."""
        self._runner.close()

    def move(self, share: Share, report: Report) -> Digests:
        """Move a share, and close the way."""
        try:
            return self._runner.run(self._move(share, report))
        finally:
            self.close()

    async def _move(self, share: Share, report: Report) -> Digests:
        total = sum(piece.left for piece in share.pieces)
        async with self._held:
            return await move_here(share, self._way, Progress(report, total))


_far: list[_Far] = []


def connect(endpoint: Endpoint, nstreams: int, processes: int, *, report: Report) -> None:
    """Make ready to move a share. Runs in a helper process."""
    del report
    with translated(endpoint):
        _far[:] = [_Far(endpoint, nstreams, processes)]


def move_share(share: Share, *, report: Report) -> Digests:
    """Move one share over the way that is open. Runs in a helper process, after `connect`."""
    with translated(share.endpoint, os.fsdecode(share.remote)):
        far = _far.pop()
        if far.age > _FRESH:
            far.close()
            far = _Far(share.endpoint, share.nstreams, share.processes)
        return far.move(share, report)


# -- moving -------------------------------------------------------------------------------------


async def move_here(share: Share, way: Way, progress: Progress) -> Digests:
    """Move one share over this way."""
    digests: Digests = {}
    with ThreadPoolExecutor(THREADS) as threads:
        lanes = Lanes(
            await way.remotes(share.nstreams, share.processes),
            threads,
            Pace(share.rate),
            share.finishing,
        )

        async def move(piece: Piece) -> None:
            parts = await _move(share, lanes, piece, progress)
            digests.setdefault(piece.file.path, {})[piece.start] = parts

        await move_all(lanes, share.pieces, move)
    return digests


async def _move(share: Share, lanes: Lanes, piece: Piece, progress: Progress) -> list[bytes]:
    there, here = join(share.remote, piece.file.path), join(share.local, piece.file.path)
    if share.do == "push":
        source = FileSource(here, piece)
        await send(lanes, there, piece, source, progress)
        crash.point("ssh.file")
        return source.digest.parts()
    sink = DigestSink() if share.do == "read" else FileSink(here, piece)
    await fetch(lanes, there, piece, sink, progress)
    crash.point("files.file")
    return sink.digest.parts()
