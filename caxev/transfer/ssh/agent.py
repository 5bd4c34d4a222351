"""Start ``caxev receive`` at the far account and exchange messages with it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final

import asyncssh
from attrs import define
from loguru import logger

from caxev.core.errors import GiveUp, Retry, RootAway
from caxev.transfer import receive
from caxev.transfer.ssh.endpoint import Endpoint

_NOISE: Final = 64 << 10  # bytes that a login shell may write before the hello
_CHUNK: Final = 1 << 16
_SHOWN: Final = 2000  # characters of standard error in a message
_COMPLAINTS: Final = 64 << 10  # bytes of standard error that are read
_PATIENCE: Final = 20.0  # seconds to wait for the far end's hello, or for its standard error


async def _line(stream: asyncssh.SSHReader[bytes], most: int) -> bytes:
    """Return the next line with its end, or what is left at the end of the stream.

    Raises ValueError if it is longer than `most` bytes: the far end is not trusted.
    """
    line = b""
    while not line.endswith(b"\n") and (some := await stream.read(1)):
        line += some
        if len(line) > most:
            raise ValueError(f"a line of more than {most} bytes")
    return line


@define
class Agent:
    """A running ``caxev receive`` at `endpoint`."""

    endpoint: Endpoint
    process: asyncssh.SSHClientProcess[bytes]

    async def ask(self, **message: Any) -> None:
        """Send a message."""
        await self.write(receive.packed(message))

    async def answer(
        self, on_checking: Callable[[int, int], None] = lambda _done, _total: None
    ) -> dict[str, Any]:
        """Return the next message. Raises the `Retry` or `GiveUp` that the far end reports.

        Its progress in checking existing data goes to `on_checking`, in bytes.
        """
        while "checking" in (message := await self._next()):
            with shaped(self.endpoint):
                on_checking(int(message["checking"]), int(message["total"]))
        return message

    async def _next(self) -> dict[str, Any]:
        try:
            length = receive.length(await _line(self.process.stdout, receive.LINE))
            message = json.loads(await self.process.stdout.readexactly(length))
        except receive.TooLong as exc:
            raise GiveUp(f"{self.endpoint}: caxev receive announced {exc}") from exc
        except (ValueError, RecursionError, asyncio.IncompleteReadError) as exc:
            # Garbage, or an end: standard error has the reason if it ended by itself.
            raise await self.why() from exc
        if not isinstance(message, dict):
            raise Retry(f"{self.endpoint}: caxev receive answered with a {type(message).__name__}")
        return message

    async def write(self, data: bytes) -> None:
        """Send bytes of files."""
        try:
            self.process.stdin.write(data)
            await self.process.stdin.drain()
        except OSError as exc:
            raise await self.why() from exc

    async def read(self, most: int) -> bytes:
        """Read at least one byte of files, and up to `most`."""
        data = await self.process.stdout.read(most)
        if not data:
            raise await self.why()
        return data

    async def why(self) -> Retry | GiveUp:
        """Return the error that the far end wrote to standard error when it ended."""
        said = bytearray()
        # Best effort: without it the message has fewer details.
        with suppress(TimeoutError, asyncssh.Error, OSError):
            async with asyncio.timeout(_PATIENCE):
                while len(said) < _COMPLAINTS and (some := await self.process.stderr.read(_CHUNK)):
                    said += some
        # The last line is ours: log lines and warnings of its interpreter may come before it.
        last = said.decode(errors="replace").strip().rpartition("\n")[2]
        try:
            row = json.loads(last)
            kind = receive.KINDS.get(row["error"], Retry)
            error = kind(f"{self.endpoint}: {str(row['why'])[:_SHOWN]}")
        except (ValueError, KeyError, TypeError):
            last = last[-_SHOWN:] or "without a word"
            return Retry(f"{self.endpoint}: caxev receive ended there: {last}")
        if isinstance(error, RootAway):
            error.host = self.endpoint.host
        return error


@contextmanager
def shaped(endpoint: Endpoint) -> Iterator[None]:
    """Raise `GiveUp` if the far end's answer is malformed."""
    try:
        yield
    except receive.MISSHAPEN as exc:
        raise GiveUp(
            f"{endpoint}: caxev receive answered in a wrong shape: {type(exc).__name__}: {exc}"
        ) from exc


async def agent_on(
    connection: asyncssh.SSHClientConnection,
    endpoint: Endpoint,
    command: str,
    request: Awaitable[Mapping[str, object]],
) -> Agent | None:
    """Start ``caxev receive`` over a connection; None if the account has none or refuses.

    Raises what `request` raises. The process ends with the connection.
    """
    try:
        process = await connection.create_process(f"{command} receive", encoding=None)
    except asyncssh.ChannelOpenError as exc:
        logger.warning("{} does not start caxev receive, using SFTP: {}", endpoint, exc.reason)
        return None
    # Send the request before the hello is here: that saves a round trip. If the process has ended,
    # the hello is missing, and `why` below has the reason.
    message = receive.packed(await request)
    with suppress(OSError):
        process.stdin.write(message)
    agent = Agent(endpoint, process)
    try:
        if await asyncio.wait_for(_greeted(process.stdout), _PATIENCE):
            return agent
        why = str(await agent.why())
    except TimeoutError:
        why = f"{endpoint}: {command} receive does not say hello"
    logger.warning("{}: using SFTP", why)
    process.close()
    return None


async def _greeted(stream: asyncssh.SSHReader[bytes]) -> bool:
    """Return whether the hello comes, after any output of a login shell."""
    left = _NOISE
    while left > 0:
        try:
            line = await _line(stream, left)
        except ValueError:
            break
        if line.endswith(receive.HELLO):  # a shell's output may lack its last line end
            return True
        if not line:
            break
        left -= len(line)
    return False
