"""This end of a fast transfer: speaking with ``caxev receive`` at the far account."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, Final

import asyncssh
from attrs import define
from loguru import logger

from caxev import receive
from caxev.job import GiveUp, Retry
from caxev.ssh.endpoint import Endpoint

_NOISE: Final = 50  # lines that a login shell may say before
_PATIENCE: Final = 20.0  # seconds for the far end to say hello, or why it ended


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
        """The next message. Raises `Retry` or `GiveUp` as the far end says.

        How far it is while it checks what it has already is passed on to `on_checking`, in bytes.
        """
        while "checking" in (message := await self._next()):
            on_checking(message["checking"], message["total"])
        return message

    async def _next(self) -> dict[str, Any]:
        try:
            length = await self.process.stdout.readline()
            message = json.loads(await self.process.stdout.readexactly(int(length)))
        except (ValueError, asyncio.IncompleteReadError) as exc:
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
        """Some bytes of files, at least one."""
        data = await self.process.stdout.read(most)
        if not data:
            raise await self.why()
        return data

    async def why(self) -> Retry | GiveUp:
        """What the far end said when it ended."""
        try:
            said = await asyncio.wait_for(self.process.stderr.read(), _PATIENCE)
        except (TimeoutError, asyncssh.Error, OSError):
            said = b""
        last = said.decode(errors="replace").strip().rpartition("\n")[2]
        try:
            error = json.loads(last)
            return receive.error_of(error["error"], f"{self.endpoint}: {error['why']}")
        except (ValueError, KeyError, TypeError):
            return Retry(f"{self.endpoint}: caxev receive ended there: {last or 'without a word'}")


async def agent_on(
    connection: asyncssh.SSHClientConnection,
    endpoint: Endpoint,
    command: str,
    request: Awaitable[Mapping[str, object]],
) -> Agent | None:
    """Start ``caxev receive`` over a connection; None where the account does not let us.

    The request is sent as soon as it is known, so that its answer comes as soon as it can. Raises
    what `request` does. Ends with the connection.
    """
    try:
        process = await connection.create_process(f"{command} receive", encoding=None)
    except asyncssh.ChannelOpenError as exc:
        logger.warning("{} starts no caxev receive, so SFTP must do: {}", endpoint, exc.reason)
        return None
    said = receive.packed(await request)
    with suppress(OSError):
        process.stdin.write(said)
    agent = Agent(endpoint, process)
    try:
        if await asyncio.wait_for(_greeted(process), _PATIENCE):
            return agent
        why = str(await agent.why())
    except TimeoutError:
        why = f"{endpoint}: {command} receive does not say hello"
    logger.warning("{}, so SFTP must do", why)
    process.close()
    return None


async def _greeted(process: asyncssh.SSHClientProcess[bytes]) -> bool:
    """Whether it says hello, after whatever a login shell says."""
    for _ in range(_NOISE):
        said = await process.stdout.readline()
        if said.endswith(receive.HELLO):
            return True
        if not said:
            break
    return False
