"""Move the bytes of files over one SFTP session, in a thread.

Requests are pipelined within a file and across files. Memory and the bytes in flight are bounded: a
pipeline takes another span only while less than `WINDOW` of its spans is still to come.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from threading import Lock
from typing import Final, Literal

import asyncssh
from attrs import define, field, frozen
from blake3 import blake3

from caxev import failpoints
from caxev.core.errors import Retry
from caxev.files import (
    FILE_MODE,
    PART,
    Confined,
    FarPath,
    Item,
    Meter,
    Piece,
    RateLimiter,
    changed,
    check_unchanged,
    damaged,
    join,
    local,
    open_resolved,
    printable,
    second,
)
from caxev.transfer.ssh.chunks import Chunks
from caxev.transfer.ssh.digests import Digests
from caxev.transfer.ssh.session import GONE, NOT_FOR_US, naming
from caxev.transfer.ssh.sftp import BLOCK, OPENING, READ, WRITE, Reply, Sftp, may_be_file

# Twice what OpenSSH lets a channel have in flight; an idle pipeline has room for any span.
WINDOW: Final = max(PART, 4 << 20)  # bytes
_FILES: Final = 64  # spans begun at once


class Refused(Exception):
    """The far end refuses to write a file, with no reason."""

    def __init__(self, path: FarPath, why: asyncssh.SFTPError) -> None:
        super().__init__(str(why))
        self.path = path


@frozen
class PieceMove:
    """The work that all pipelines share: the trees on both sides, the pieces, and the rate limit.

    `do`: pull, push, or only read for digests. `finishing`: a complete file gets its time, and, if
    pushed, is brought to the disk; `untimed` collects the files whose time the server does not set
    by a handle. `known`: the digests of the files, if known.
    """

    do: Literal["pull", "push", "read"]
    local: Confined | None
    remote: FarPath
    chunks: Chunks
    limiter: RateLimiter
    meter: Meter
    finishing: bool
    known: Mapping[bytes, Item]
    digests: Digests = field(repr=False)
    untimed: set[bytes] = field(repr=False)
    _lock: Lock = field(factory=Lock, init=False, repr=False)

    def moved(self, span: Piece, digest: bytes) -> bool:
        """Record a span; return whether it was the last of its file. Raises `Damaged`."""
        # If files are finished as they come, the next attempt trusts length and time: a bad span
        # must count as missing, and its file as unfinished. Else digests will show it.
        if self.finishing and span.left and self._is_wrong(span, digest):
            raise damaged(span.file.path, printable(self.source))
        with self._lock:
            parts = [digest] if span.left else []
            self.digests.setdefault(span.file.path, {})[span.start] = parts
        return self.chunks.done(span)

    @property
    def source(self) -> bytes:
        """Return the tree that the bytes come from."""
        return self.local if self.do == "push" and self.local else self.remote

    def _is_wrong(self, span: Piece, digest: bytes) -> bool:
        item = self.known.get(span.file.path)
        wanted = None if item is None else item.part_digests()
        return wanted is not None and wanted[span.start // PART] != digest


@define(eq=False)
class _Span:
    """A span that is being moved, its file open at both ends."""

    span: Piece
    here: Confined | None
    there: FarPath
    left: int
    handle: bytes = b""
    descriptor: int = -1
    digest: blake3 = field(factory=blake3)
    at: int = field(init=False)
    early: dict[int, bytes] = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        self.at = self.span.start

    def close(self) -> None:
        if self.descriptor >= 0:
            descriptor, self.descriptor = self.descriptor, -1
            os.close(descriptor)

    @property
    def file(self) -> Confined:
        """Return the path here; never asked for if the bytes are only read for digests."""
        assert self.here is not None
        return self.here

    # -- what is read here

    def open_source(self) -> None:
        with local(self.file, "read"):
            self.descriptor = open_resolved(self.file, os.O_RDONLY | os.O_NONBLOCK)
        self.check_source()

    def check_source(self) -> None:
        check_unchanged(self.descriptor, self.span.file, self.file)

    def read(self, buffer: memoryview) -> None:
        """Fill the buffer with the next bytes."""
        with local(self.file, "read"):
            count = os.preadv(self.descriptor, [buffer], self.at)
        if count < len(buffer):
            raise changed(printable(self.file))
        self.digest.update(buffer)
        self.at += count

    # -- what is written here

    def open_target(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT
        with local(self.file, "write"):
            self.descriptor = open_resolved(self.file, flags, FILE_MODE)

    def put(self, at: int, data: memoryview) -> None:
        """Write bytes that follow those before; keep others, as servers may answer in any order."""
        # A hash takes bytes in their order only.
        if at != self.at:
            self.early[at] = bytes(data)
            return
        self._write(data)
        while (later := self.early.pop(self.at, None)) is not None:
            self._write(memoryview(later))

    def _write(self, data: memoryview) -> None:
        if self.descriptor >= 0:
            with local(self.file, "write"):
                rest = data
                while rest:
                    rest = rest[os.pwrite(self.descriptor, rest, self.at + len(data) - len(rest)) :]
        self.digest.update(data)
        self.at += len(data)

    def settle(self) -> None:
        with local(self.file, "finish"):
            os.utime(self.descriptor, ns=(self.span.file.mtime_ns, self.span.file.mtime_ns))


@define(eq=False)
class Pipeline:
    """One session, and the spans that are under way on it."""

    sftp: Sftp
    move: PieceMove
    where: str
    _asked: dict[int, Callable[[Reply], None]] = field(factory=dict, init=False)
    _opening: dict[int, _Span] = field(factory=dict, init=False)
    _heard: float = field(factory=time.monotonic, init=False)
    _blocks: deque[tuple[_Span, int, int]] = field(factory=deque, init=False)
    _under_way: set[_Span] = field(factory=set, init=False)
    _to_come: int = field(default=0, init=False)
    _block: memoryview = field(factory=lambda: memoryview(bytearray(BLOCK)), init=False)

    def carry(self) -> None:
        """Move spans until none is left to take.

        Raises `Lost`, `Refused`, asyncssh's errors and `Retry`.
        """
        try:
            while True:
                wait = self._fill()
                if self._asked:
                    if self._is_answered(wait):
                        self._take(self.sftp.answer())
                elif wait is None or not self.move.chunks.pause(wait):
                    return
        finally:
            for one in self._under_way:
                one.close()

    def _is_answered(self, wait: float | None) -> bool:
        """Return whether an answer can be read within `wait` seconds; None: wait for one.

        Raises `Retry` if the far end hangs in opening a file.
        """
        # SFTP servers work through their requests in order: if the oldest one opens a FIFO, all
        # the others wait behind it.
        one = self._opening.get(next(iter(self._asked)))
        if one is None:
            return wait is None or self.sftp.answered(wait)
        left = self._heard + OPENING - time.monotonic()
        if self.sftp.answered(max(0.0, left if wait is None else min(left, wait))):
            return True
        if time.monotonic() >= self._heard + OPENING:
            shown = self._shown(one)
            raise Retry(f"{shown} was not opened there in {OPENING:.0f} s: is it a file still?")
        return False

    def _take(self, answer: Reply) -> None:
        self._heard = time.monotonic()
        self._opening.pop(answer.number, None)
        self._asked.pop(answer.number, _ignored)(answer)

    def _fill(self) -> float | None:
        """Send requests while there is room; return the seconds until the rate allows more.

        If no request is unanswered, waits for a span.
        """
        ask = self._push if self.move.do == "push" else self._pull
        while self._blocks or self._begin_another():
            if self._blocks:
                one, at, count = self._blocks[0]
                if wait := self.move.limiter.take(count):
                    return wait
                self._blocks.popleft()
                ask(one, at, count)
        return None

    def _begin_another(self) -> bool:
        room = WINDOW - self._to_come
        if room <= 0 or len(self._under_way) >= _FILES:
            return False
        span = self.move.chunks.take(wait=not self._asked, room=room)
        if span is not None:
            self._begin(span)
        return span is not None

    def _ask(self, number: int, then: Callable[[Reply], None]) -> None:
        if not self._asked:
            self._heard = time.monotonic()  # the far end had nothing to answer until now
        self._asked[number] = then

    def _begin(self, span: Piece) -> None:
        here = None if self.move.local is None else join(self.move.local, span.file.path)
        there = join(self.move.remote, span.file.path)
        one = _Span(span, here, there, span.left)
        self._under_way.add(one)
        self._to_come += span.left
        if self.move.do == "push":
            one.open_source()
        elif self.move.do == "pull":
            one.open_target()
        if span.left or self.move.do == "push":
            flags = WRITE if self.move.do == "push" else READ
            number = self.sftp.open(there, flags)
            self._ask(number, partial(self._opened, one))
            self._opening[number] = one
        else:
            self._end(one)

    def _opened(self, one: _Span, answer: Reply) -> None:
        self._check("open", one, answer)
        one.handle = bytes(answer.body)
        self._ask(self.sftp.kind(one.handle), partial(self._seen, one))
        span = one.span
        for at in range(span.start, span.stop, BLOCK):
            self._blocks.append((one, at, min(BLOCK, span.stop - at)))
        if not span.left:
            self._end(one)

    def _check(self, request: str, one: _Span, answer: Reply) -> None:
        if answer.error is None:
            return
        if self.move.do != "push" and isinstance(answer.error, GONE):
            raise Retry(f"{self._shown(one)} vanished meanwhile") from answer.error
        if self.move.do == "push" and isinstance(answer.error, asyncssh.SFTPFailure):
            raise Refused(one.there, answer.error)
        with naming(request, one.there):
            raise answer.error

    def _seen(self, one: _Span, answer: Reply) -> None:
        """Check that a regular file was opened: requests to others may never be answered."""
        if answer.error is None and not may_be_file(answer.body):
            raise Retry(f"{self._shown(one)} is no longer a file")

    def _settled(self, one: _Span, answer: Reply) -> None:
        """Note a file whose time the server does not set by its handle: `publish` tries by path."""
        if isinstance(answer.error, NOT_FOR_US):
            self.move.untimed.add(one.span.file.path)
        else:
            self._check("fsetstat", one, answer)

    def _shown(self, one: _Span) -> str:
        return f"{self.where}:{printable(one.there)}"

    def _pull(self, one: _Span, at: int, count: int) -> None:
        number = self.sftp.read(one.handle, at, count)
        self._ask(number, partial(self._pulled, one, at, count))

    def _pulled(self, one: _Span, at: int, count: int, answer: Reply) -> None:
        self._check("read", one, answer)
        some = len(answer.body)
        # Not even a byte: the file has become shorter than it was listed.
        if not 0 < some <= count:
            raise changed(self._shown(one))
        one.put(at, answer.body)
        if some < count:  # servers may give fewer than asked for
            self._pull(one, at + some, count - some)
        self._moved(one, some)

    def _push(self, one: _Span, at: int, count: int) -> None:
        # One buffer for all requests: it is written to the pipe before the next block is read into
        # it.
        block = self._block[:count]
        one.read(block)
        number = self.sftp.write(one.handle, at, block)
        self._ask(number, partial(self._pushed, one, count))

    def _pushed(self, one: _Span, count: int, answer: Reply) -> None:
        self._check("write", one, answer)
        self._moved(one, count)

    def _moved(self, one: _Span, count: int) -> None:
        one.left -= count
        self._to_come -= count
        if not one.left:
            self._end(one)
        self.move.meter.add(count)

    def _end(self, one: _Span) -> None:
        """Finish a span whose bytes have all arrived."""
        if self.move.do == "push":
            one.check_source()
        last = self.move.moved(one.span, one.digest.digest())
        if last and self.move.finishing:
            self._finish(one)
        one.close()
        self._under_way.discard(one)
        if one.handle:
            self.sftp.close(one.handle)  # no later request depends on the answer
        if last:
            failpoints.point("ssh.file" if self.move.do == "push" else "files.file")

    def _finish(self, one: _Span) -> None:
        if self.move.do == "pull":
            one.settle()
        elif self.move.do == "push":
            settling = self.sftp.settle(one.handle, second(one.span.file))
            self._ask(settling, partial(self._settled, one))
            if self.sftp.can_fsync:
                self._ask(self.sftp.fsync(one.handle), partial(self._check, "fsync", one))


def _ignored(_answer: Reply) -> None:
    """Ignore the answer to a close."""
