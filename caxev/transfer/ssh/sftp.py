"""Speak as much of SFTP (version 3) as moving the bytes of files needs, over a pair of pipes.

Its calls block, so it is for threads. asyncssh has all of SFTP, but needs more time for a block
than a disk does.
"""

from __future__ import annotations

import os
import select
import stat
import struct
from contextlib import suppress
from typing import Final, NamedTuple

import asyncssh
from attrs import define, field

from caxev.files import FILE_MODE

BLOCK: Final = 255 * 1024  # bytes; the most that OpenSSH's server takes or gives in one request
READ: Final = asyncssh.FXF_READ
WRITE: Final = asyncssh.FXF_WRITE | asyncssh.FXF_CREAT
OPENING: Final = 60.0
"""Seconds that a far end may take to open a file (a FIFO blocks forever), or for its hello."""

_INIT, _VERSION, _OPEN, _CLOSE, _READ, _WRITE, _FSTAT, _FSETSTAT = 1, 2, 3, 4, 5, 6, 8, 10
_EXTENDED: Final = 200
_STATUS, _HANDLE, _DATA, _ATTRIBUTES = 101, 102, 103, 105
_SIZE, _OWNERS, _PERMISSIONS, _TIMES = 1, 2, 4, 8  # which attributes follow
_OK, _EOF = 0, 1
_HEADER: Final = struct.Struct(">IBI")  # length, kind, number of the request
_LONG: Final = struct.Struct(">I")
_LONGEST: Final = BLOCK + (1 << 12)  # bytes of an answer
_ERRORS: Final = {
    2: asyncssh.SFTPNoSuchFile,
    3: asyncssh.SFTPPermissionDenied,
    4: asyncssh.SFTPFailure,
    8: asyncssh.SFTPOpUnsupported,
}


class Lost(Exception):
    """The session has ended."""


class Reply(NamedTuple):
    """The answer to the request of that number.

    `body`: a handle, attributes, or the bytes that were read, valid until the next answer; empty
    for "done" and at the end of a file. `error`: why the request failed, if it did.
    """

    number: int
    body: memoryview
    error: asyncssh.SFTPError | None = None


@define(eq=False)
class Sftp:
    """The client's end of a session; it sends requests without waiting for earlier answers.

    All methods raise `Lost` if the session has ended; most return the request's number.
    """

    reading: int
    writing: int
    up: bool = field(default=False, init=False)
    can_fsync: bool = field(default=False, init=False)
    _number: int = field(default=0, init=False)
    _buffer: memoryview = field(factory=lambda: memoryview(bytearray(_LONGEST)), init=False)

    def hello(self) -> None:
        """Send our hello without waiting; `greet` finds out if nobody is there."""
        with suppress(Lost):
            self._write(_LONG.pack(5) + bytes([_INIT]) + _LONG.pack(3))

    def greet(self) -> None:
        """Wait for the server's hello."""
        if not self.answered(OPENING):
            raise Lost
        (length,) = _LONG.unpack(self._read(_LONG.size))
        hello = bytes(self._read(length))
        if hello[:1] != bytes([_VERSION]):
            raise Lost
        self.up = True
        self.can_fsync = b"fsync@openssh.com" in hello

    def open(self, path: bytes, flags: int) -> int:
        """Open a file, or create it with our mode if `flags` ask for that; answered by a handle."""
        mode = struct.pack(">III", flags, _PERMISSIONS, FILE_MODE)
        return self._ask(_OPEN, _counted(path) + mode)

    def kind(self, handle: bytes) -> int:
        """Ask for the attributes of an open file; see `may_be_file`."""
        return self._ask(_FSTAT, _counted(handle))

    def read(self, handle: bytes, at: int, count: int) -> int:
        """Ask for bytes; the answer may have fewer."""
        return self._ask(_READ, _counted(handle) + struct.pack(">QI", at, count))

    def write(self, handle: bytes, at: int, data: bytes | memoryview) -> int:
        """Send bytes."""
        return self._ask(_WRITE, _counted(handle) + struct.pack(">QI", at, len(data)), data)

    def settle(self, handle: bytes, seconds: int) -> int:
        """Set the mode of an open file to ours, and its time."""
        values = struct.pack(">IIII", _PERMISSIONS | _TIMES, FILE_MODE, seconds, seconds)
        return self._ask(_FSETSTAT, _counted(handle) + values)

    def fsync(self, handle: bytes) -> int:
        """Bring an open file to the disk; only if the server `can_fsync`."""
        return self._ask(_EXTENDED, _counted(b"fsync@openssh.com") + _counted(handle))

    def close(self, handle: bytes) -> int:
        """Close a file."""
        return self._ask(_CLOSE, _counted(handle))

    def answered(self, timeout: float) -> bool:
        """Return whether an answer can be read within `timeout` seconds."""
        poll = select.poll()
        poll.register(self.reading, select.POLLIN)
        return bool(poll.poll(1000 * timeout))

    def answer(self) -> Reply:
        """Wait for the next answer."""
        length, kind, number = _HEADER.unpack(self._read(_HEADER.size))
        body = self._read(length - _HEADER.size + _LONG.size)
        if kind == _STATUS:
            (code,) = _LONG.unpack(body[:4])
            # The end of a file is no error here: the empty body shows it.
            return Reply(number, body[:0], None if code in {_OK, _EOF} else _error(code, body[4:]))
        if kind in {_HANDLE, _DATA}:
            return Reply(number, body[4:])
        if kind == _ATTRIBUTES:
            return Reply(number, body)
        raise Lost

    def _ask(self, kind: int, body: bytes, data: bytes | memoryview = b"") -> int:
        self._number = (self._number + 1) & 0xFFFFFFFF
        size = _HEADER.size - _LONG.size + len(body) + len(data)
        self._write(_HEADER.pack(size, kind, self._number) + body, data)
        return self._number

    def _write(self, head: bytes, data: bytes | memoryview = b"") -> None:
        # Usually one system call; the data is never copied.
        try:
            sent = os.writev(self.writing, [head, data])
            rest = memoryview(head)[sent:]
            while rest:
                rest = rest[os.write(self.writing, rest) :]
            rest = memoryview(data)[max(0, sent - len(head)) :]
            while rest:
                rest = rest[os.write(self.writing, rest) :]
        except OSError as exc:
            raise Lost from exc

    def _read(self, count: int) -> memoryview:
        if not 0 < count <= _LONGEST:  # no SFTP server sends that: we are out of step with it
            raise Lost
        whole = rest = self._buffer[:count]
        while rest:
            try:
                some = os.readv(self.reading, [rest])
            except OSError as exc:
                raise Lost from exc
            if not some:
                raise Lost
            rest = rest[some:]
        return whole


def may_be_file(attributes: memoryview) -> bool:
    """Return whether these may be the attributes of a regular file; servers can omit the mode."""
    (flags,) = _LONG.unpack(attributes[:4])
    at = 4 + (8 if flags & _SIZE else 0) + (8 if flags & _OWNERS else 0)
    if not flags & _PERMISSIONS or len(attributes) < at + 4:
        return True
    (mode,) = _LONG.unpack(attributes[at : at + 4])
    return not stat.S_IFMT(mode) or stat.S_ISREG(mode)


def _counted(text: bytes) -> bytes:
    return _LONG.pack(len(text)) + text


def _error(code: int, rest: memoryview) -> asyncssh.SFTPError:
    length = _LONG.unpack(rest[:4])[0] if len(rest) >= _LONG.size else 0
    why = bytes(rest[4 : 4 + length]).decode(errors="replace")
    known = _ERRORS.get(code)
    return known(why) if known else asyncssh.SFTPError(code, why)
