"""Running the programs that move bytes for us: no shell, no input, and they end when we do."""

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

_TAIL: Final = 16 << 10  # bytes of what a program complained that are kept
_CHUNK: Final = 1 << 16
_LINES: Final = b"\r\n"
_LONGEST: Final = 1 << 20
MOST: Final = 256 << 20
"""Characters of an answer: a listing of a million files takes some 200 million."""


@frozen
class Ended:
    """How a program ended, and the end of what it wrote to its standard error."""

    status: int
    said: str

    @property
    def last(self) -> str:
        """The last line of it, or what the status tells."""
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
    """Run a program to its end, handing on what it writes to standard output as it comes.

    One that takes longer than `limit` seconds is killed, and counts as ended with ETIMEDOUT.
    Raises `Denied`, naming the Debian `package`, where the program is not installed. However this
    ends, the program has ended by then.
    """
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
        complaints = Tail(process.stderr, _TAIL)
        try:
            while chunk := process.stdout.read1(_CHUNK):  # type: ignore[attr-defined]  # it is buffered
                output(chunk)
            process.wait()
        except BaseException:
            process.kill()
            raise
        said = complaints.text()
    if late.is_set():
        return Ended(errno.ETIMEDOUT, f"no answer within {limit} s")
    return Ended(process.returncode, said)


@contextmanager
def _killing(process: subprocess.Popen[bytes], limit: float | None) -> Iterator[Event]:
    """Kill the process if the block lasts longer than that; the event tells of it."""
    late = Event()

    def kill() -> None:
        late.set()
        process.kill()

    timer = None if limit is None else Timer(limit, kill)
    if timer is not None:
        timer.start()
    try:
        yield late
    finally:
        if timer is not None:
            timer.cancel()
            timer.join()


class Lines:
    """Cuts what a program writes into lines, as its terminal would, and hands them on."""

    def __init__(self, take: Callable[[str], object]) -> None:
        self._take = take
        self._rest = b""

    def __call__(self, chunk: bytes) -> None:
        """Take the next bytes."""
        lines = (self._rest + chunk).replace(b"\r", b"\n").split(b"\n")
        self._rest = lines.pop()[-_LONGEST:]
        for line in lines:
            self._take(line.decode(errors="surrogateescape"))


class Answer:
    """Keeps the lines that a program writes, up to a limit. Raises `GiveUp` beyond it."""

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
