"""Open byte channels over which a thread can speak SFTP by plain reads and writes.

Either an `ssh` process, which is fast, or a channel of the existing connection, which costs next to
nothing to open.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, TypeAlias

import asyncssh

from caxev.tails import Tail
from caxev.transfer.ssh.sftp import Sftp

_PIPE: Final = 1 << 20  # bytes
_TAIL: Final = 1 << 10  # bytes of standard error that are kept


class SshProgram:
    """An `ssh` process that carries SFTP on its standard input and output; our hello is sent."""

    def __init__(self, command: Sequence[str]) -> None:
        """Start it. Raises OSError."""
        self._process = subprocess.Popen(  # noqa: S603  # an argument list, no shell
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._complaints = Tail(self._process.stderr, _TAIL)
        self._pipes = (self._process.stdout, self._process.stdin, self._process.stderr)
        for pipe in self._pipes[:2]:
            # Refused beyond the user's limit for pipes: then they stay small, and cost some speed.
            with suppress(OSError):
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE)
        self.sftp = Sftp(self._pipes[0].fileno(), self._pipes[1].fileno())
        self.sftp.hello()

    def halt(self) -> None:
        """End it at once; a thread that waits for it gets `Lost`."""
        # Only the process: closing a descriptor under a thread that polls it does not wake the
        # thread, and the number could be another file's by then.
        self._process.kill()

    def close(self) -> None:
        """Release it; no thread uses it any more."""
        self._process.kill()
        for pipe in self._pipes:
            pipe.close()
        self._process.wait()

    def why(self) -> str:
        """Return, on one line, why it has ended."""
        said = self._complaints.text().strip()
        return " ".join(said.rpartition("\n")[2].split()) or "without a word"


class _Here(asyncio.Protocol):
    """Pass what a thread writes to its socket on to the channel."""

    def __init__(self, channel: asyncssh.SSHClientChannel[bytes]) -> None:
        self._channel = channel

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.set_write_buffer_limits(_PIPE)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._channel.write(data)

    # Back-pressure, both ways: a slow thread, or a slow network, must not fill our memory.
    def pause_writing(self) -> None:
        self._channel.pause_reading()

    def resume_writing(self) -> None:
        self._channel.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._channel.close()


class _There(asyncssh.SSHClientSession[bytes]):
    """Pass what comes through the channel on to the thread's socket."""

    here: _Here

    def data_received(self, data: bytes, datatype: int | None) -> None:
        if datatype is None:
            self.here.transport.write(data)

    def pause_writing(self) -> None:
        self.here.transport.pause_reading()

    def resume_writing(self) -> None:
        self.here.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        if hasattr(self, "here"):
            self.here.transport.close()


class ConnectionChannel:
    """A channel of a connection, as `SshProgram`. Use `channel_on`."""

    def __init__(self, ours: socket.socket, here: _Here) -> None:
        self._ours, self._here = ours, here
        self.sftp = Sftp(ours.fileno(), ours.fileno())
        self.sftp.hello()

    def halt(self) -> None:
        """End it at once."""
        # A shutdown wakes a thread that reads from the socket; a close would not.
        with suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Release it."""
        self._ours.close()
        # Python 3.11 cannot abort what has been closed with something still to be written.
        if not self._here.transport.is_closing():
            self._here.transport.abort()

    def why(self) -> str:
        """Return why it has ended."""
        return "its channel was closed"


SftpChannel: TypeAlias = SshProgram | ConnectionChannel


async def channel_on(connection: asyncssh.SSHClientConnection) -> ConnectionChannel:
    """Start SFTP on a new channel, which ends with the connection. Raises asyncssh's errors."""
    there = _There()
    channel, _ = await connection.create_session(lambda: there, subsystem="sftp", encoding=None)
    ours, theirs = socket.socketpair()
    loop = asyncio.get_running_loop()
    _, there.here = await loop.connect_accepted_socket(lambda: _Here(channel), theirs)
    return ConnectionChannel(ours, there.here)
