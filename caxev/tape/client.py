"""Running an archive's client: no shell, no input, watched for signs of life, killed with us."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import IO, Final

from caxev.core.errors import Denied, Retry
from caxev.tape.base import Transcript

_LOOK_EVERY: Final = 1.0  # seconds
_LONGEST: Final = 1 << 16
MOST: Final = 64 << 20
"""Maximum size of a client's output in characters: a hundred thousand files take ten million."""
_SETPRIV: Final = shutil.which("setpriv")


def run_client(
    command: Sequence[str],
    transcript: Transcript,
    *,
    patience: float,
    environment: Mapping[str, str],
    directory: str,
    asks: Callable[[str], bool],
    progress: Callable[[], int] | None = None,
) -> tuple[int, list[str]]:
    """Run a client to its end; returns its exit status and the lines of its output.

    The output also goes to `transcript`. `progress` returns the number of bytes done. Raises
    `Retry` if there is no sign of life for `patience` seconds (no line, no byte read or written, no
    progress), or if a line `asks` a question. Raises `GiveUp` if it is not installed. The client
    never outlives this call, however that ends.
    """
    transcript.lines.append(f"$ {' '.join(command)}")
    process = _started(command, {**os.environ, **environment, "LC_ALL": "C"}, directory)
    assert process.stdout is not None
    with process:
        try:
            lines = _listen(
                process,
                process.stdout,
                transcript,
                patience=patience,
                asks=asks,
                progress=progress,
            )
        except Retry as error:
            transcript.lines.append(f"killed: {error}")
            raise
        finally:
            process.kill()  # a no-op if it has ended
    transcript.lines.append(f"return code {process.returncode}")
    return process.returncode, lines


def _started(
    command: Sequence[str], environment: Mapping[str, str], directory: str
) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(  # noqa: S603  # an argument list, no shell
            _bound(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=directory,
        )
    except OSError as exc:
        raise Denied(f"{command[0]} cannot be started: {exc.strerror}") from exc


def _bound(command: Sequence[str]) -> list[str]:
    """Return the command, wrapped so that it is killed when this process ends in any way."""
    if shutil.which(command[0]) is None:
        raise Denied(f"{command[0]} is not installed here")
    return [_SETPRIV, "--pdeathsig", "KILL", "--", *command] if _SETPRIV else [*command]


def _listen(
    process: subprocess.Popen[bytes],
    output: IO[bytes],
    transcript: Transcript,
    *,
    patience: float,
    asks: Callable[[str], bool],
    progress: Callable[[], int] | None,
) -> list[str]:
    # A thread reads, since this loop must also notice when nothing comes.
    heard: SimpleQueue[str | None] = SimpleQueue()
    Thread(target=_read, args=(output, heard), daemon=True).start()
    lines: list[str] = []
    written = 0
    last_sign, last_look, signs = time.monotonic(), 0.0, (0, 0)
    while True:
        try:
            line = heard.get(timeout=_LOOK_EVERY)
        except Empty:
            pass
        else:
            if line is None:
                process.wait()
                return lines
            written += len(line)
            if written > MOST:
                raise Retry(f"{_name(process)} writes without end: more than {MOST:,} characters")
            lines.append(line)
            transcript.lines.append(line)
            last_sign = time.monotonic()
            if asks(line):
                raise Retry(f"{_name(process)} asks a question, which nobody can answer: {line}")
        now = time.monotonic()
        if now < last_look + _LOOK_EVERY:
            continue
        last_look = now
        # A client may write no line while it moves a large file: its bytes are signs of life, too.
        seen = (_bytes_moved(process.pid), progress() if progress else 0)
        if seen != signs:
            signs, last_sign = seen, now
        if now > last_sign + patience:
            raise Retry(
                f"{_name(process)} gave no sign of life for {patience:.0f} s{_after(lines)}"
            )
        transcript.at(max(transcript.done, seen[1]))


def _read(output: IO[bytes], heard: SimpleQueue[str | None]) -> None:
    """Pass on each line, and None at the end; stop when the output is too long."""
    written = 0
    try:
        while (line := output.readline(_LONGEST)) and written <= MOST:
            # A progress display overwrites itself by carriage returns: only its last state counts.
            text = line.decode(errors="surrogateescape").rstrip("\r\n").rpartition("\r")[2]
            heard.put(text)
            written += len(text)
    except (OSError, ValueError):
        pass  # closed: the client was killed
    heard.put(None)


def _name(process: subprocess.Popen[bytes]) -> str:
    words = [str(word) for word in process.args if not isinstance(word, int)]  # type: ignore[union-attr]
    return os.path.basename(words[words.index("--") + 1] if "--" in words else words[0])


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
