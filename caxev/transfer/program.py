"""Run external programs that move bytes: no shell, no input, and they end when we do."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Event, Timer
from typing import Final

from attrs import frozen

from caxev.core.errors import Denied, GiveUp
from caxev.limited import ROWS
from caxev.tails import Tail

_TAIL: Final = 16 << 10  # bytes of standard error that are kept
_CHUNK: Final = 1 << 16
_LONGEST: Final = 1 << 20
MOST: Final = 256 << 20
"""The longest answer, in characters: a listing of a million files takes some 200 million."""


@frozen
class Ended:
    """How a program ended, and the end of what it wrote to its standard error."""

    status: int
    said: str

    @property
    def last(self) -> str:
        """Return the last line of standard error, or a line about the exit status."""
        lines = [" ".join(line.split()) for line in self.said.splitlines() if line.strip()]
        return lines[-1] if lines else f"it ended with status {self.status}"


def run(
    command: Sequence[str | bytes],
    *,
    package: str,
    output: Callable[[bytes], object],
    environment: Mapping[str, str] | None = None,
    limit: float | None = None,
) -> Ended:
    """Run a program to its end, and pass each chunk of its standard output to `output`.

    A program that takes longer than `limit` seconds is killed, and its status is ETIMEDOUT.
    Raises `Denied`, naming the Debian `package`, if the program is not installed. However this
    returns, the program has ended.
    """
    # LC_ALL and TZ are fixed because we parse messages and times.
    environment = {**os.environ, "LC_ALL": "C", "TZ": "UTC", **(environment or {})}
    try:
        process = subprocess.Popen(  # noqa: S603  # an argument list, no shell
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
    except FileNotFoundError as exc:
        name = os.fsdecode(command[0])
        raise Denied(f"{name} is not installed here (Debian: {package})") from exc
    with process, _killing(process, limit) as late:
        assert process.stdout is not None
        assert process.stderr is not None
        # Read standard error beside standard output: a program that fills the one pipe while we
        # wait for the other would never end.
        complaints = Tail(process.stderr, _TAIL)
        try:
            while chunk := process.stdout.read1(_CHUNK):  # type: ignore[attr-defined]  # it is buffered
                output(chunk)
            process.wait()
        except BaseException:  # `Popen.__exit__` only waits: kill it, or that may take hours
            process.kill()
            raise
        said = complaints.text()
    if late.is_set():
        return Ended(errno.ETIMEDOUT, f"no answer within {limit} s")
    return Ended(process.returncode, said)


@contextmanager
def _killing(process: subprocess.Popen[bytes], limit: float | None) -> Iterator[Event]:
    """Kill the process, and set the event, if the block takes longer than `limit` seconds."""
    late = Event()

    def kill() -> None:
        late.set()  # first: whoever sees the process dead must see why
        process.kill()

    timer = None if limit is None else Timer(limit, kill)
    if timer is not None:
        timer.start()
    try:
        yield late
    finally:
        if timer is not None:
            timer.cancel()
            timer.join()  # or it could fire after `late` was read


class Lines:
    """Split a program's output into lines, as a terminal would, and pass each one on."""

    def __init__(self, take: Callable[[str], object]) -> None:
        self._take = take
        self._rest = b""

    def __call__(self, chunk: bytes) -> None:
        """Take the next bytes."""
        # A progress display ends its lines with a carriage return alone.
        lines = (self._rest + chunk).replace(b"\r", b"\n").split(b"\n")
        self._rest = lines.pop()[-_LONGEST:]
        for line in lines:
            self._take(line.decode(errors="surrogateescape"))


class Answer:
    """Keep the lines that a program writes. Raises `GiveUp` beyond the limits."""

    def __init__(self, program: str) -> None:
        self._program = program
        self.lines: list[str] = []
        self._cut = Lines(self._keep)
        self._size = 0

    def __call__(self, chunk: bytes) -> None:
        """Take the next bytes."""
        self._cut(chunk)

    def _keep(self, line: str) -> None:
        self._size += len(line)
        if len(self.lines) >= ROWS or self._size > MOST:
            raise GiveUp(
                f"{self._program} answers with more than {ROWS:,} lines or {MOST:,} characters"
            )
        self.lines.append(line)
