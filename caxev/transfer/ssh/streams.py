"""Stream many small files through one channel, without any framing between them.

Over SFTP each of them would cost several requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from attrs import define, field

from caxev import failpoints
from caxev.files import Confined, Meter, PartDigest, Piece, RateLimiter, join
from caxev.transfer.receive import CHUNK, read_piece, write_piece
from caxev.transfer.ssh.agent import Agent
from caxev.transfer.ssh.digests import Digests

T = TypeVar("T")


async def send_stream(
    agent: Agent,
    root: Confined,
    pieces: Sequence[Piece],
    limiter: RateLimiter,
    meter: Meter,
    *,
    digests: Digests,
) -> None:
    """Send these pieces of the files below `root`; the next are read while these are sent."""
    blocks = _packed(root, pieces, digests)
    coming = asyncio.create_task(_in_thread(next, blocks, b""))
    try:
        while data := await coming:
            coming = asyncio.create_task(_in_thread(next, blocks, b""))
            await _paced(limiter, len(data))
            await agent.write(data)
            meter.add(len(data))
    finally:  # a thread that still reads must not outlive us
        await asyncio.wait([coming])


async def receive_stream(
    agent: Agent,
    root: Confined,
    pieces: Sequence[Piece],
    limiter: RateLimiter,
    meter: Meter,
    *,
    digests: Digests,
) -> None:
    """Write what comes to these pieces of the files below `root`."""
    unpacker = Unpacker(root, list(pieces), digests)
    left = sum(piece.left for piece in pieces)
    writing = asyncio.create_task(_in_thread(unpacker.put, b""))
    try:
        while left:
            data = await agent.read(min(left, CHUNK))
            left -= len(data)
            await _paced(limiter, len(data))
            await writing
            writing = asyncio.create_task(_in_thread(unpacker.put, data))
            meter.add(len(data))
        await writing
    finally:
        await asyncio.wait([writing])


async def _paced(limiter: RateLimiter, count: int) -> None:
    while wait := limiter.take(count):  # noqa: ASYNC110  # no event marks the passing of time
        await asyncio.sleep(wait)


async def _in_thread(function: Callable[..., T], *args: Any) -> T:
    """Call `function` in a thread, and wait for its end even if we are cancelled meanwhile."""
    running = asyncio.ensure_future(asyncio.to_thread(function, *args))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


def _packed(root: Confined, pieces: Iterable[Piece], digests: Digests) -> Iterator[bytes]:
    """Yield the bytes of these pieces, about `CHUNK` at once, and compute their digests."""
    blocks: list[bytes] = []
    size = 0
    for piece in pieces:
        digest = PartDigest()
        for block in read_piece(join(root, piece.file.path), piece):
            digest.update(block)
            blocks.append(block)
            size += len(block)
        digests.setdefault(piece.file.path, {})[piece.start] = digest.parts()
        if size >= CHUNK:
            yield b"".join(blocks)
            blocks, size = [], 0
    yield b"".join(blocks)


@define
class Unpacker:
    """Write pieces of files, each when it is complete, and compute their digests."""

    root: Confined
    pieces: list[Piece]
    digests: Digests
    _next: int = 0
    _rest: bytes = field(default=b"", init=False)

    def put(self, data: bytes) -> None:
        """Take the next bytes."""
        data = self._rest + data
        at = 0
        while self._next < len(self.pieces):
            piece = self.pieces[self._next]
            if len(data) - at < piece.left:
                break
            self._write(piece, memoryview(data)[at : at + piece.left])
            at += piece.left
            self._next += 1
        self._rest = data[at:]

    def _write(self, piece: Piece, data: memoryview) -> None:
        path = join(self.root, piece.file.path)
        digest = PartDigest()
        digest.update(data)
        self.digests.setdefault(piece.file.path, {})[piece.start] = digest.parts()
        write_piece(path, piece, data)
        failpoints.point("files.file")
