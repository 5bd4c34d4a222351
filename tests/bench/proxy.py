"""A TCP proxy in user space that delays without serialising: a long link on loopback.

``python -m tests.bench.proxy --listen 0 --to PORT --delay-ms 50 --rate 125e6`` prints its port.

Each chunk that comes in is given a due time, when the last of its bytes would have arrived over a
link of that rate (bytes a second) and delay (one way), and is handed on then. All connections share
one rate in each direction. A connection costs what the handshake of a real one costs: nothing of
the client's leaves before one round trip, and what the server says first is there after two.
There is no loss and no slow start, so the link flatters whoever uses it.

What is under way is bounded: a direction that holds more than its rate times its delay and `SPARE`
reads no more, and so does a connection whose other end does not take what it is given.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final, Self

from attrs import define, field

SPARE: Final = 4 << 20
"""Bytes that wait at the entrance of a full link, beyond what is on it."""
TICK: Final = 0.001
"""Seconds for which small chunks are gathered: what comes in meanwhile is read at once."""
_BUFFER: Final = 2 << 20  # bytes that one end may be behind before the other end must wait


@define(eq=False)
class Line:
    """One direction of the link: everything on it, in the order in which it is due."""

    delay: float
    rate: float
    sides: set[Side] = field(factory=set)
    held: int = 0
    _free_at: float = 0.0
    _under_way: deque[tuple[float, Side, bytes | None]] = field(factory=deque)
    _armed: bool = False

    @property
    def full(self) -> bool:
        return self.held > self.rate * self.delay + SPARE

    def send(self, target: Side, data: bytes | None) -> None:
        """Put bytes on their way to `target`; None: there will be no more of them."""
        loop = asyncio.get_running_loop()
        self._free_at = max(self._free_at, loop.time()) + len(data or b"") / self.rate
        self._under_way.append((self._free_at + self.delay, target, data))
        self._hold(len(data or b""))
        self._arm(loop)

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._under_way and not self._armed:
            self._armed = True
            loop.call_at(self._under_way[0][0], self._deliver)

    def _deliver(self) -> None:
        loop = asyncio.get_running_loop()
        self._armed = False
        while self._under_way and self._under_way[0][0] <= loop.time():
            _, target, data = self._under_way.popleft()
            target.take(data)
            self._hold(-len(data or b""))
        self._arm(loop)

    def _hold(self, change: int) -> None:
        was = self.full
        self.held += change
        if self.full != was:
            for side in self.sides:
                side.look_again()


@define(eq=False)
class Side(asyncio.Protocol):
    """One end of a connection: reads onto `line`, and is handed what comes from the other end."""

    line: Line
    other: Side | None = None
    transport: asyncio.Transport | None = None
    open: bool = False  # whether it may be read at all yet
    choked: bool = False  # whether it takes no more for now
    ended: bool = False  # whether the other end has been told that there is no more
    _rests: bool = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(_BUFFER)
        self.line.sides.add(self)
        # Not at once: Python 3.11's first releases begin to read after this, paused or not.
        asyncio.get_running_loop().call_soon(self.look_again)

    def joined(self, other: Side) -> Self:
        self.other, other.other = other, self
        return self

    def start(self) -> None:
        self.open = True
        self.look_again()

    def look_again(self) -> None:
        """Read, or do not."""
        if self.transport is None or self.gone:
            return
        blocked = self.line.full or (self.other is not None and self.other.choked)
        if self.open and not self._rests and not blocked:
            self.transport.resume_reading()
        else:
            self.transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        assert self.other is not None
        self.line.send(self.other, data)
        self._rests = True
        asyncio.get_running_loop().call_later(TICK, self._rested)
        self.look_again()

    def _rested(self) -> None:
        self._rests = False
        self.look_again()

    def eof_received(self) -> bool:
        """Say so at the other end when all before it has arrived there; stay open to write."""
        assert self.other is not None
        self.open = False
        self.line.send(self.other, None)
        return True

    def take(self, data: bytes | None) -> None:
        """Hand on what has come over the link."""
        if self.transport is None or self.gone:
            return
        if data is not None:
            self.transport.write(data)
        else:
            with suppress(OSError):  # it has gone, and we are about to be told
                self.transport.write_eof()
            self._end()

    def _end(self) -> None:
        assert self.other is not None
        self.other.ended = True
        if self.ended or self.other.gone:
            self.close()
            self.other.close()

    @property
    def gone(self) -> bool:
        return self.transport is None or self.transport.is_closing()

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()

    def pause_writing(self) -> None:
        self._choke(choked=True)

    def resume_writing(self) -> None:
        self._choke(choked=False)

    def _choke(self, *, choked: bool) -> None:
        self.choked = choked
        if self.other is not None:
            self.other.look_again()

    def connection_lost(self, error: Exception | None) -> None:
        """The other end closes too, when all before it has arrived there."""
        self.line.sides.discard(self)
        self._choke(choked=False)
        if self.other is not None and not self.other.gone:
            self.line.send(self.other, None)


@define(eq=False)
class Link:
    """A link to one port of this machine."""

    port: int
    delay: float
    there: Line
    back: Line
    _openings: set[asyncio.Task[None]] = field(factory=set)

    def accept(self) -> Side:
        client = Side(self.there)
        opening = asyncio.get_running_loop().create_task(self._open(client))
        self._openings.add(opening)
        opening.add_done_callback(self._openings.discard)
        return client

    async def _open(self, client: Side) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(2 * self.delay)
        try:
            _, server = await loop.create_connection(
                lambda: Side(self.back).joined(client), "127.0.0.1", self.port
            )
        except OSError:
            client.close()
            return
        client.start()
        await asyncio.sleep(self.delay)
        server.start()


async def serve(listen: int, to: int, delay: float, rate: float) -> None:
    """Print the port, then serve until cancelled."""
    loop = asyncio.get_running_loop()
    link = Link(to, delay, Line(delay, rate), Line(delay, rate))
    server = await loop.create_server(link.accept, "127.0.0.1", listen, backlog=1000)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextmanager
def running(port: int, delay: float, rate: float) -> Iterator[int]:
    """A proxy to `port` as a process of its own; its port. `delay`: seconds one way."""
    command = [sys.executable, "-m", "tests.bench.proxy", "--listen", "0", "--to", str(port)]
    command += ["--delay-ms", str(1000 * delay), "--rate", str(rate)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description="a TCP proxy that delays")
    parser.add_argument("--listen", type=int, default=0, help="port; 0: any that is free")
    parser.add_argument("--to", type=int, required=True, help="port on this machine")
    parser.add_argument("--delay-ms", type=float, default=50.0, help="one way")
    parser.add_argument("--rate", type=float, default=125e6, help="bytes a second and direction")
    given = parser.parse_args()
    asyncio.run(serve(given.listen, given.to, given.delay_ms / 1000, given.rate))


if __name__ == "__main__":
    main()
