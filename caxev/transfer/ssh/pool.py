"""Move one copy over several SFTP sessions at once.

On a short link the CPU time that SSH takes limits a transfer. OpenSSH's client needs half of
asyncssh's, so large copies go through `ssh`, one process for each core. On a long link the SSH
window of each channel limits it: then further channels on the existing connection help, which open
long before another connection does, and more processes than cores. If `ssh` is not installed, or
there is little to move, channels do it all.
"""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from contextvars import copy_context
from functools import partial
from typing import Final

import asyncssh
from attrs import define, evolve, field
from loguru import logger

from caxev.core.errors import Denied, Retry
from caxev.files import FarPath, parent
from caxev.transfer.ssh.channels import SftpChannel, SshProgram, channel_on
from caxev.transfer.ssh.endpoint import Endpoint, one_line, started
from caxev.transfer.ssh.openssh import host_name, shell
from caxev.transfer.ssh.pipeline import PieceMove, Pipeline, Refused
from caxev.transfer.ssh.remote import Remote
from caxev.transfer.ssh.session import cancelled
from caxev.transfer.ssh.sftp import BLOCK, Lost

ON_ONE: Final = 8
"""Channels on a connection beside the first; OpenSSH allows 10 in all by default."""
_MOST: Final = 8  # programs: by default sshd lets 10 connections wait for their log-in
_WORTH: Final = 48 << 20  # bytes that make one more connection worth it
_FILE: Final = 64 << 10  # bytes; what a file costs beside its content
_WINDOW: Final = 2 << 20  # bytes that OpenSSH lets a channel have in flight
_RATE: Final = 400e6  # bytes a second that the channels together should be able to carry


def weight_of(sizes: Iterable[int]) -> int:
    """Return the cost of moving files of these sizes, in bytes: even an empty file has a cost."""
    return sum(size + _FILE for size in sizes)


def channels_for(weight: int, round_trip: float, nstreams: int, *, cores: int) -> tuple[int, int]:
    """Return how many programs and how many channels to use, together at most `nstreams`.

    `weight` in bytes, `round_trip` in seconds. `cores` is 0 if `ssh` is not installed.
    """
    # A channel carries one window for each round trip.
    wanted = min(nstreams, math.ceil(_RATE * round_trip / _WINDOW))
    useful = max(cores, wanted - ON_ONE) if cores else 0
    programs = min(_MOST, useful, nstreams, weight // _WORTH)
    return programs, min(ON_ONE, max(wanted - programs, 0 if programs else 1))


@define(eq=False)
class Pool:
    """The channels of one transfer, beside the session `remote` on `connection`. Use `pool_on`."""

    endpoint: Endpoint
    connection: asyncssh.SSHClientConnection
    nstreams: int
    round_trip: float
    _held: ExitStack
    remote: Remote = field(init=False)
    _first: asyncio.Task[FarPath] | None = field(init=False, default=None)
    _programs: list[asyncio.Task[SftpChannel]] = field(init=False, factory=list)
    _channels: list[asyncio.Task[SftpChannel]] = field(init=False, factory=list)
    _used: list[asyncio.Task[SftpChannel]] = field(init=False, factory=list)

    def call(self, weight: int) -> None:
        """Start the channels that so many bytes deserve, and use these."""
        cores = len(os.sched_getaffinity(0)) if shutil.which("ssh") else 0
        programs, channels = channels_for(weight, self.round_trip, self.nstreams, cores=cores)
        while len(self._programs) < programs:
            self._programs.append(asyncio.create_task(self._program()))
        while len(self._channels) < channels:
            self._channels.append(asyncio.create_task(channel_on(self.connection)))
        self._used = [*self._programs[:programs], *self._channels[:channels]]

    def ask(self, first: Callable[[Remote], Awaitable[FarPath]]) -> None:
        """Start a request that takes one round trip, and measure its time; see `answer`."""
        self._first = asyncio.create_task(self._measured(first))

    async def _measured(self, first: Callable[[Remote], Awaitable[FarPath]]) -> FarPath:
        began = time.monotonic()
        try:
            return await first(self.remote)
        finally:
            self.round_trip = time.monotonic() - began

    async def answer(self) -> FarPath:
        """Return the answer to the first request. Raises what it raised."""
        assert self._first is not None
        # Shielded: others may want the answer when this caller is cancelled.
        return await asyncio.shield(self._first)

    async def _program(self) -> SshProgram:
        key = self.connection.get_server_host_key()
        there = self.endpoint
        if key is not None:
            # We know which address answers: without it, ssh would try the others one by one.
            there = evolve(there, host=self.connection.get_extra_info("peername")[0])
        command = self._held.enter_context(shell(there, key))
        return SshProgram([*command, "-s", host_name(there), "sftp"])

    async def move(self, move: PieceMove) -> None:
        """Move all of it. The first error ends it; a channel that cannot be opened is left out."""
        try:
            excuses = await self._over(self._used, move)
            if excuses and not move.chunks.finished and self._used == self._programs:
                shown = str(self.endpoint)
                logger.warning("{}: ssh cannot connect: {}", shown, "; ".join(excuses))
                self._channels.append(asyncio.create_task(channel_on(self.connection)))
                excuses = await self._over(self._channels[-1:], move)
        except Refused as refused:
            raise await self._meaning(refused) from refused
        if not move.chunks.finished:
            raise Retry(f"{self.endpoint} gives us no SFTP: {'; '.join(excuses)}")

    async def _over(
        self, channels: Sequence[asyncio.Task[SftpChannel]], move: PieceMove
    ) -> list[str]:
        """Move all of it over those channels that can be opened; return why others cannot."""
        with ThreadPoolExecutor(len(channels)) as threads:
            using = {
                asyncio.create_task(self._use(channel, move, threads)): channel
                for channel in channels
            }
            try:
                return await _all_moved(move, using)
            except BaseException:
                # A thread cannot be cancelled, and looks for this only between two spans.
                move.chunks.stop()
                raise
            finally:
                await cancelled(using)

    async def _use(
        self, coming: asyncio.Task[SftpChannel], move: PieceMove, threads: ThreadPoolExecutor
    ) -> str | None:
        """Move spans over one channel; return why, if it cannot be opened."""
        try:
            channel = await coming
        except (asyncssh.Error, OSError) as exc:
            return one_line(exc)
        where = str(self.endpoint)
        # With our context: the thread passes failpoints and logs, too.
        carry = partial(copy_context().run, _carry, channel, move, where)
        thread = asyncio.get_running_loop().run_in_executor(threads, carry)
        try:
            return await asyncio.shield(thread)
        except asyncio.CancelledError:  # a thread cannot be cancelled: end what it waits for
            channel.halt()
            await asyncio.gather(thread, return_exceptions=True)
            raise

    async def _meaning(self, refused: Refused) -> Retry:
        """Find out whether the disk is full: SFTP version 3 has one code for every failure."""
        shown = self.remote.shown(refused.path)
        free = await self.remote.free(parent(refused.path))
        if free is not None and free < BLOCK:
            return Denied(f"disk full at {shown}: {free} bytes free")
        return Retry(f"cannot write {shown}: {refused}")

    async def close(self) -> None:
        """Close every channel."""
        channels = [*self._programs, *self._channels]
        await cancelled(channels if self._first is None else [*channels, self._first])
        for channel in channels:
            if not channel.cancelled() and channel.exception() is None:
                channel.result().close()


@asynccontextmanager
async def pool_on(
    connection: asyncssh.SSHClientConnection,
    endpoint: Endpoint,
    nstreams: int,
    *,
    weight: int,
    round_trip: float,
    first: Callable[[Remote], Awaitable[FarPath]],
) -> AsyncIterator[Pool]:
    """Start SFTP on a connection, and the channels for `weight` bytes at the same time.

    `round_trip` is a guess; the time that the request `first` takes soon replaces it.
    """
    with ExitStack() as held:
        pool = Pool(endpoint, connection, nstreams, round_trip, held)
        try:
            if weight:
                pool.call(weight)
            pool.remote = Remote(endpoint, await started(endpoint, connection))
            pool.ask(first)
            yield pool
        finally:
            await pool.close()


async def _all_moved(
    move: PieceMove, using: Mapping[asyncio.Task[str | None], asyncio.Task[SftpChannel]]
) -> list[str]:
    """Wait until all is moved and the channels that are up have ended; see `Pool._over`."""
    # A channel whose connection is still being made has nothing left to do: do not wait for it.
    pending = dict(using)
    excuses: list[str] = []
    while pending and not (move.chunks.finished and not any(map(_is_up, pending.values()))):
        done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        excuses += [why for task in done if (why := task.result()) is not None]
        pending = {task: channel for task, channel in pending.items() if task not in done}
    return sorted(set(excuses))


def _is_up(coming: asyncio.Task[SftpChannel]) -> bool:
    gone = not coming.done() or coming.cancelled() or coming.exception() is not None
    return not gone and coming.result().sftp.up


def _carry(channel: SftpChannel, move: PieceMove, where: str) -> str | None:
    """Move spans over a channel, in a thread; return why, if it cannot be opened."""
    try:
        channel.sftp.greet()
    except Lost:
        return channel.why()
    try:
        Pipeline(channel.sftp, move, where).carry()
    except Lost as exc:  # its spans are gone with it: the next attempt resumes
        raise Retry(f"the connection to {where} was lost: {channel.why()}") from exc
    return None
