"""Run external programs: an argument list, no shell, no input, and limits for all they do.

The only runner of programs that are waited for: movers, tape clients, batch systems and setfacl use
it. A program never outlives the call.
"""

from __future__ import annotations

import errno
import os
import select
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from math import inf
from typing import Final

from attrs import Factory, frozen

from caxev.core.errors import Denied, GiveUp, Retry
from caxev.limited import ROWS, limit_files_of
from caxev.tails import Tail

PLAIN: Final = {"LC_ALL": "C", "TZ": "UTC"}
"""Environment for programs whose messages and times are parsed."""
MOST: Final = 256 << 20
"""The longest answer, in bytes: a listing of a million files takes some 200 million."""
_TAIL: Final = 16 << 10  # bytes of standard error that are kept
_CHUNK: Final = 1 << 16
_LONGEST: Final = 1 << 20  # bytes of a line
_TICK: Final = 1.0  # seconds without output after which the program is checked
_PATIENCE: Final = 120.0  # seconds that a program whose answer is wanted may take

Output = Callable[[bytes], object]


@frozen
class Program:
    """A program to run: its arguments, the Debian `package` that has it, and where it runs.

    `environment` is added to ours; `directory` None: where we are.
    """

    command: Sequence[str | bytes]
    package: str
    environment: Mapping[str, str] = Factory(dict)
    directory: str | None = None


@frozen
class ProgramEnd:
    """How a program ended, and the end of what it wrote to its standard error."""

    status: int
    said: str

    @property
    def last(self) -> str:
        """Return the last line of standard error, or a line about the exit status."""
        lines = [" ".join(line.split()) for line in self.said.splitlines() if line.strip()]
        return lines[-1] if lines else f"it ended with status {self.status}"


@frozen
class Limits:
    """The most that a program may take: seconds, and bytes of a file that it writes.

    A program that takes longer is killed, and its status is ETIMEDOUT. A file that is written at
    once may become a little larger.
    """

    seconds: float = inf
    file_size: int | None = None


UNLIMITED: Final = Limits()


def run(
    program: Program,
    *,
    output: Output = lambda _chunk: None,
    limits: Limits = UNLIMITED,
    watch: Callable[[int], object] | None = None,
) -> ProgramEnd:
    """Run a program to its end, and pass each chunk of its standard output to `output`.

    With `watch`, standard error is part of the output, and `watch` is called with the process id,
    at least once a second. Raises `Denied`, naming the package, if the program is not installed,
    `Retry` if it cannot be started, and what `output` and `watch` raise. However this returns, the
    program has ended.
    """
    process = _started(program, apart=watch is None)
    if limits.file_size is not None:
        with suppress(ProcessLookupError):  # it has ended
            limit_files_of(process.pid, limits.file_size)
    until = time.monotonic() + limits.seconds
    with process:
        # Read standard error beside standard output: a program that fills the one pipe while we
        # wait for the other would never end.
        complaints = Tail(process.stderr, _TAIL) if process.stderr else None
        try:
            for chunk in _chunks(process, until, watch):
                output(chunk)
            process.wait(None if until == inf else max(0.0, until - time.monotonic()))
        except (TimeoutError, subprocess.TimeoutExpired):
            return ProgramEnd(errno.ETIMEDOUT, f"no answer within {limits.seconds} s")
        finally:
            process.kill()  # does nothing once it has ended; `Popen.__exit__` only waits
        said = complaints.text() if complaints else ""
    return ProgramEnd(process.returncode, said)


def _started(program: Program, *, apart: bool) -> subprocess.Popen[bytes]:
    """Start a program; `apart`: with a pipe of its own for standard error."""
    name = os.fsdecode(program.command[0])
    try:
        return subprocess.Popen(  # noqa: S603  # an argument list, no shell
            program.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if apart else subprocess.STDOUT,
            env={**os.environ, **program.environment},
            cwd=program.directory,
        )
    except FileNotFoundError as exc:
        raise Denied(f"{name} is not installed here (Debian: {program.package})") from exc
    except OSError as exc:
        raise Retry(f"{name} cannot be started: {exc.strerror}") from exc


def _chunks(
    process: subprocess.Popen[bytes], until: float, watch: Callable[[int], object] | None
) -> Iterator[bytes]:
    """Yield a program's output. Raises TimeoutError at `until`, by the monotonic clock."""
    assert process.stdout is not None
    pipe = process.stdout.fileno()
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while (left := until - time.monotonic()) > 0:
        # A child that outlives the program may hold the pipe forever: what the program itself has
        # written is all there a moment after its end.
        ended = process.poll() is not None
        if poll.poll(1000 * min(_TICK, left)):
            if not (chunk := os.read(pipe, _CHUNK)):
                return
            yield chunk
        elif ended:
            return
        if watch is not None:
            watch(process.pid)
    raise TimeoutError


def call(command: Sequence[str], *, package: str) -> str:
    """Return the output of a program that answers within two minutes.

    Raises `Denied` if it is not installed, `Retry` with its standard error if it fails. A program
    that took too long may still have done its work.
    """
    answer = Answer(command[0], Retry)
    ended = run(Program(command, package), output=answer, limits=Limits(_PATIENCE))
    if ended.status:
        raise Retry(f"{command[0]} failed: {' '.join(ended.said.split()) or ended.last}")
    return answer.text("replace")


class Lines:
    """Split a program's output into lines and pass each one on.

    On a `terminal` a carriage return alone ends a line too, as progress displays use it.
    """

    def __init__(self, take: Callable[[str], object], *, terminal: bool = False) -> None:
        self._take = take
        self._terminal = terminal
        self._rest = b""

    def __call__(self, chunk: bytes) -> None:
        """Take the next bytes."""
        data = self._rest + chunk
        lines = (data.replace(b"\r", b"\n") if self._terminal else data).split(b"\n")
        self._rest = lines.pop()[-_LONGEST:]
        for line in lines:
            self._take(line.decode(errors="surrogateescape"))

    def end(self) -> None:
        """Pass on a last line that lacks its end."""
        if self._rest:
            self(b"\n")


class Answer:
    """Keep what a program writes. Raises `GiveUp`, or the given error, beyond the limits."""

    def __init__(self, program: str, error: type[Retry | GiveUp] = GiveUp) -> None:
        self._program, self._error = program, error
        self._chunks: list[bytes] = []
        self._size = self._rows = 0

    def __call__(self, chunk: bytes) -> None:
        """Take the next bytes."""
        self._size += len(chunk)
        self._rows += chunk.count(b"\n")
        if self._rows > ROWS or self._size > MOST:
            raise self._error(
                f"{self._program} answers with more than {ROWS:,} lines or {MOST:,} bytes"
            )
        self._chunks.append(chunk)

    def text(self, errors: str = "surrogateescape") -> str:
        """Return all of it; `errors` as in `bytes.decode`."""
        return b"".join(self._chunks).decode(errors=errors)

    @property
    def lines(self) -> list[str]:
        text = self.text()
        return text.removesuffix("\n").split("\n") if text else []
