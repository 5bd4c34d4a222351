"""Running an archive's client: no shell, no input, watched for signs of life, killed with us."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from attrs import define, evolve, field

from caxev.core.errors import Denied, Retry
from caxev.program import Lines, Program, run
from caxev.tape.base import Transcript

_LOOK_EVERY: Final = 1.0  # seconds
MOST: Final = 64 << 20
"""Maximum size of a client's output in bytes: a hundred thousand files take ten million."""
_SETPRIV: Final = shutil.which("setpriv")


def run_client(program: Program, watch: ClientWatch) -> tuple[int, list[str]]:
    """Run a client to its end; returns its exit status and the lines of its output.

    Raises `Retry` if there is no sign of life, or if it asks a question; `Denied` if it is not
    installed. The client never outlives this call, however that ends.
    """
    said = watch.transcript.lines
    said.append(f"$ {' '.join(map(os.fsdecode, program.command))}")
    try:
        ended = run(_bound(program), output=watch.take, watch=watch.look)
        watch.split.end()
    except Retry as error:
        said.append(f"killed: {error}")
        raise
    said.append(f"return code {ended.status}")
    return ended.status, watch.lines


def _bound(program: Program) -> Program:
    """Return the program, wrapped so that it is killed when this process ends in any way."""
    name = os.fsdecode(program.command[0])
    if shutil.which(name) is None:
        raise Denied(f"{name} is not installed here")
    bound = [_SETPRIV, "--pdeathsig", "KILL", "--"] if _SETPRIV else []
    environment = {**program.environment, "LC_ALL": "C"}
    return evolve(program, command=[*bound, *program.command], environment=environment)


@define(eq=False)
class ClientWatch:
    """Read what a client writes, to a transcript, too, and see whether it still does anything.

    It does if it writes a line, or reads or writes a byte, within `patience` seconds, or the bytes
    done, which `progress` returns, change. `asks` returns whether a line is a question.
    """

    name: str
    transcript: Transcript
    patience: float
    asks: Callable[[str], bool]
    progress: Callable[[], int] | None = None
    lines: list[str] = field(init=False, factory=list)
    split: Lines = field(init=False)
    _written: int = field(init=False, default=0)
    _last_sign: float = field(init=False, factory=time.monotonic)
    _last_look: float = field(init=False, default=0.0)
    _signs: tuple[int, int] = field(init=False, default=(0, 0))

    def __attrs_post_init__(self) -> None:
        self.split = Lines(self._line)

    def take(self, chunk: bytes) -> None:
        """Take the next bytes of its output. Raises `Retry` if there are too many."""
        self._written += len(chunk)
        if self._written > MOST:
            raise Retry(f"{self.name} writes without end: more than {MOST:,} bytes")
        self.split(chunk)

    def _line(self, line: str) -> None:
        # A progress display overwrites itself by carriage returns: only its last state counts.
        text = line.rstrip("\r").rpartition("\r")[2]
        self.lines.append(text)
        self.transcript.lines.append(text)
        self._last_sign = time.monotonic()
        if self.asks(text):
            raise Retry(f"{self.name} asks a question, which nobody can answer: {text}")

    def look(self, process: int) -> None:
        """Look for signs of life, once a second. Raises `Retry` after `patience` without any."""
        now = time.monotonic()
        if now < self._last_look + _LOOK_EVERY:
            return
        self._last_look = now
        # A client may write no line while it moves a large file: its bytes are signs of life, too.
        seen = (_bytes_moved(process), self.progress() if self.progress else 0)
        if seen != self._signs:
            self._signs, self._last_sign = seen, now
        if now > self._last_sign + self.patience:
            raise Retry(
                f"{self.name} gave no sign of life for {self.patience:.0f} s{_after(self.lines)}"
            )
        self.transcript.at(max(self.transcript.done, seen[1]))


def _after(lines: Sequence[str]) -> str:
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"; it said last: {last}" if last else ""


def _bytes_moved(pid: int) -> int:
    """Return the bytes that a process has read and written; 0 if the system does not report it."""
    try:
        text = Path(f"/proc/{pid}/io").read_text("ascii")
        rows = dict(line.split(": ", 1) for line in text.splitlines())
        return int(rows["rchar"]) + int(rows["wchar"])
    except (OSError, ValueError, KeyError):
        return 0
