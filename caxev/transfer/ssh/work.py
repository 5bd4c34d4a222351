"""Connect to the other side for one copy, and share what all steps of moving it need.

Bytes go through SFTP, over several connections if that is worth it. If the far account can start
``caxev receive``, small files go through that in one stream, and it reads the far disk.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial as bound
from typing import Final, Literal, TypeVar

import asyncssh
from attrs import evolve, field, frozen

from caxev.config import link_between
from caxev.files import (
    PART,
    Confined,
    FarPath,
    Meter,
    Piece,
    RateLimiter,
    Report,
    known_items,
    printable,
    root_rows,
)
from caxev.transfer.base import Route
from caxev.transfer.receive import STREAMED
from caxev.transfer.ssh.agent import Agent, agent_on
from caxev.transfer.ssh.chunks import Chunks
from caxev.transfer.ssh.digests import Digests
from caxev.transfer.ssh.endpoint import Endpoint, connected, endpoint_of, translated
from caxev.transfer.ssh.pipeline import PieceMove
from caxev.transfer.ssh.pool import ON_ONE, Pool, pool_on, weight_of
from caxev.transfer.ssh.remote import Remote
from caxev.transfer.ssh.session import GONE, cancelled
from caxev.transfer.ssh.streams import receive_stream, send_stream

T = TypeVar("T")

_STREAMS: Final = 16  # channels for one copy, unless sites.json has another number
_HANDSHAKE: Final = 8  # round trips until a connection is open


@frozen
class Work:
    """The state that all steps of a transfer share.

    `agent` is the receiver at the far account, once it is known to run. `untimed` collects the
    files whose time the server does not set by a handle.
    """

    route: Route
    pool: Pool
    starting: asyncio.Task[Agent | None] | None
    report: Report = field(repr=False)
    agent: Agent | None = None
    untimed: set[bytes] = field(factory=set, repr=False)

    @property
    def remote(self) -> Remote:
        return self.pool.remote

    @property
    def where(self) -> str:
        """Return the copy at the other side as messages show it."""
        return f"{self.pool.endpoint}:{printable(os.fsencode(self.route.remote_path))}"

    @property
    def is_known(self) -> bool:
        """Return whether files may be moved out of order: digests show which parts have arrived."""
        expected = self.route.expected
        return expected is not None and len(known_items(expected)) == len(expected.files)

    async def with_agent(self) -> Work:
        """Return the same work with the receiver, if the far account has started one."""
        return evolve(self, agent=None if self.starting is None else await self.starting)

    async def confined(self) -> FarPath:
        """Return the real path of the copy there."""
        try:
            return await self.pool.answer()
        except GONE:
            return await self.remote.confine(self.route.remote_path, self.route.there.roots)

    def split(self, pieces: Sequence[Piece]) -> tuple[list[Piece], list[Piece]]:
        """Return the pieces that go through the receiver's stream, and those over SFTP."""
        most = -1 if self.agent is None else STREAMED
        small = [piece for piece in pieces if piece.left <= most]
        return small, [piece for piece in pieces if piece.left > most]

    async def move(
        self,
        do: Literal["pull", "push", "read"],
        ends: tuple[Confined | None, FarPath | None],
        pieces: Sequence[Piece],
        meter: Meter,
        *,
        ordered: bool | None = None,
    ) -> Digests:
        """Move these pieces of the trees at the two `ends`, here and there.

        `ordered`: each file from its beginning; by default if not all digests are known. The path
        there may be None if all pieces go through the stream.
        """
        here, there = ends
        small, large = self.split(pieces)
        limiter = RateLimiter(self.route.max_rate)
        digests: Digests = {}
        moving: list[Awaitable[None]] = []
        if self.agent is not None and here is not None:
            stream = receive_stream if do == "pull" else send_stream
            moving.append(stream(self.agent, here, small, limiter, meter, digests=digests))
        if large:
            assert there is not None
            in_order = not self.is_known if ordered is None else ordered
            chunks = Chunks.of(large, ahead=unsure(self.route) if in_order else None)
            known = {} if do == "read" else known_items(self.route.expected)
            # A file that was moved out of order may get its final time, which marks it as whole,
            # only when all are whole: hence `finishing` is `in_order`.
            move = PieceMove(
                do, here, there, chunks, limiter, meter, in_order, known, digests, self.untimed
            )
            self.pool.call(weight_of(piece.left for piece in large))
            moving.append(self.pool.move(move))
        tasks = [asyncio.ensure_future(one) for one in moving]
        try:
            await asyncio.gather(*tasks)
        finally:
            await cancelled(tasks)
        return digests


def streams(route: Route) -> int:
    """Return how many channels one copy may use for large files."""
    return link_between(route.here, route.there).nstreams or _STREAMS


def unsure(route: Route) -> int:
    """Return how many bytes at the end of an interrupted file may be incomplete."""
    # A pull hands out no span further ahead than this: more would only lengthen what an interrupted
    # file must fetch again.
    return PART * min(streams(route), ON_ONE)


async def run(
    route: Route,
    function: Callable[[Work], Awaitable[T]],
    report: Report,
    request: Awaitable[Mapping[str, object]],
    *,
    above: bool = False,
) -> T:
    """Connect to the other side and call `function`; `request` is the receiver's request.

    The real path of the copy there, or with `above` of its directory, is requested at once, so that
    the answer comes while we do other things.
    """
    asking = asyncio.ensure_future(request)  # a coroutine that nobody awaits would warn
    path = os.fsencode(route.remote_path)
    first = bound(
        Remote.confine_known,
        path=os.path.dirname(path) if above else path,
        roots=route.there.roots,
        at=above,
    )
    try:
        endpoint, began = endpoint_of(route.here, route.there), time.monotonic()
        with translated(endpoint, route.remote_path):
            async with connected(endpoint) as connection:
                guess = (time.monotonic() - began) / _HANDSHAKE
                async with (
                    _starting(route, connection, endpoint, asking) as starting,
                    pool_on(
                        connection,
                        endpoint,
                        streams(route),
                        weight=_weight(route),
                        round_trip=guess,
                        first=first,
                    ) as pool,
                    pool.remote.steady(),
                ):
                    return await function(Work(route, pool, starting, report))
    finally:
        await cancelled([asking])


async def asking(route: Route, **request: object) -> Mapping[str, object]:
    """Return a request to the receiver about the copy there."""
    return {"path": route.remote_path, "roots": root_rows(route.there.roots), **request}


def _weight(route: Route) -> int:
    """Estimate the work from the manifest, before either side is listed."""
    if route.expected is None or route.again:
        return 0
    sizes = (item.size for item in route.expected.files)
    if route.there.receiver is not None:
        sizes = (size for size in sizes if size > STREAMED)
    return weight_of(sizes)


@asynccontextmanager
async def _starting(
    route: Route,
    connection: asyncssh.SSHClientConnection,
    endpoint: Endpoint,
    request: Awaitable[Mapping[str, object]],
) -> AsyncIterator[asyncio.Task[Agent | None] | None]:
    """Start a receiver at the far account during the block; None if the site names none."""
    if route.there.receiver is None:
        yield None
        return
    starting = asyncio.create_task(agent_on(connection, endpoint, route.there.receiver, request))
    try:
        yield starting
    finally:
        await cancelled([starting])
