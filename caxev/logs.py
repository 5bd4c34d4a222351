"""Logging: one place that decides where it goes and how it looks.

Modules log with loguru's ``logger``; the standard library's logging (pymongo, asyncssh) is caught
here. Each attempt at a reaction is logged with its run, its event and its handler. One record is
one line, but for tracebacks, which are indented: what others wrote, such as a run's name, is
escaped here, once, so that it can neither forge a line nor steer a terminal.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from contextlib import suppress
from contextvars import copy_context
from pathlib import Path
from threading import Condition, Thread
from traceback import format_exception
from typing import TYPE_CHECKING, Any, Final, Protocol, TextIO

from loguru import logger

from caxev.core.escapes import escaped

if TYPE_CHECKING:
    from loguru import Record

ROTATE_AT: Final = 20_000_000
"""Bytes from which on a new log file is begun."""
KEEP: Final = 10
ROOM: Final = 10_000_000
"""Characters of lines that wait to be written; further lines are dropped."""
LAST: Final = 2.0
"""Seconds that the last lines may take when the process ends."""

LONGEST: Final = 2000
"""Bytes of a line of another process; a longer one is cut into several."""
LINGER: Final = 1.0
"""Seconds for the last lines of a process that has ended."""
LEVELS: Final = ("TRACE", "DEBUG", "INFO", "SUCCESS", "WARNING", "ERROR", "CRITICAL")

_CONTEXT: Final = ("site", "handler", "run", "event")


class _Caught(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        level: str | int = record.levelname
        try:
            logger.level(record.levelname)
        except ValueError:
            level = record.levelno
        logger.opt(exception=record.exc_info).log(level, "{}: {}", record.name, record.getMessage())


class Target(Protocol):
    """What an `Outlet` writes to; its `write` may take as long as it likes."""

    def isatty(self) -> bool: ...
    def write(self, text: str, /) -> object: ...
    def stop(self) -> object: ...


class Outlet:
    """Writes to a target by a thread of its own, so that nobody waits for its reader or its disk.

    A pager that was stopped, a log shipper or a disk that hangs must not stop a listener. Lines for
    which there is no room are dropped; the next line that is written is preceded by their number.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._waiting: deque[str] = deque()
        self._size = self._dropped = 0
        self._over = False
        self._changed = Condition()
        self._thread = Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    def isatty(self) -> bool:
        """Whether people read it: then it has colours."""
        return self._target.isatty()

    def write(self, line: str) -> None:
        """Have a line written; drop it if there is no room. Never waits."""
        with self._changed:
            if self._size + len(line) > ROOM:
                self._dropped += 1
                return
            self._waiting.append(line)
            self._size += len(line)
            self._changed.notify()

    def stop(self) -> None:
        """Write what waits, for `LAST` seconds at most. Called by loguru when it lets go of it."""
        with self._changed:
            self._over = True
            self._changed.notify()
        self._thread.join(LAST)

    def _write_all(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._over):
                    self._changed.wait()
                line = self._waiting.popleft() if self._waiting else None
                dropped, self._dropped = self._dropped, 0
            if dropped:
                self._write(f"{dropped} lines of the log were dropped: there was no room\n")
            if line is None:
                self._target.stop()
                return
            self._write(line)
            with self._changed:  # until it is written it takes up room
                self._size -= len(line)

    def _write(self, text: str) -> None:
        # The disk is full, the reader has left, a test's stream is closed: later lines may fare
        # better, and there is nowhere to report it.
        with suppress(OSError, ValueError):
            self._target.write(text)


class Unbuffered:
    """A stream that is written past its own buffer, which is locked while nobody reads."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def isatty(self) -> bool:
        """Whether people read it."""
        return self._stream.isatty()

    def write(self, text: str) -> None:
        """Write all of it. Raises OSError, and ValueError if the stream is closed."""
        try:
            descriptor = self._stream.fileno()
        except OSError:  # not a file: a test's
            self._stream.write(text)
            return
        rest = text.encode(errors="backslashreplace")
        while rest:
            try:
                rest = rest[os.write(descriptor, rest) :]
            except BlockingIOError:
                time.sleep(0.1)

    def stop(self) -> None:
        """Leave the stream open: it is not ours."""


class LogFile:
    """A file that is rotated, and opened again if something else has moved or removed it.

    The former ones have numbers behind their names, the latest 1, as logrotate does it.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path).absolute()
        self._file = self._open()

    def isatty(self) -> bool:
        """Return False: nobody reads it by a terminal."""
        return False

    def write(self, text: str) -> None:
        """Append to the file. Raises OSError."""
        if self._is_moved():
            self._file.close()
            self._file = self._open()
        if self._file.tell() + len(text) > ROTATE_AT and self._file.tell():
            self._rotate()
        self._file.write(text)

    def stop(self) -> None:
        """Close the file. Called by loguru when it lets go of it."""
        self._file.close()

    def _open(self) -> TextIO:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return self._path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")

    def _is_moved(self) -> bool:
        try:
            return not os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except (FileNotFoundError, ValueError):  # it is gone; opening it again had failed
            return True

    def _rotate(self) -> None:
        for number in range(KEEP, 0, -1):
            older = self._path if number == 1 else self._numbered(number - 1)
            with suppress(OSError):  # not there, or not ours to rename: the file goes on as it is
                older.replace(self._numbered(number))
        self._file.close()
        self._file = self._open()

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")


class Relay:
    """Logs the lines that another process writes to a pipe, by a thread of its own.

    The process never waits for the log. A line keeps its level if it begins with one, as those of
    `begin_relayed` do; others are what programs and libraries print. `context` is where a line's
    run, event and handler come from: the `copy_context` of the latest job.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self.name = name
        self.context = copy_context()
        self._thread = Thread(target=self._read_all, args=(descriptor,), name="relay", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait a moment for the last lines; a program left behind may hold the pipe for ever."""
        self._thread.join(LINGER)

    def _read_all(self, descriptor: int) -> None:
        level = None
        with open(descriptor, "rb") as pipe:
            for piece in iter(lambda: pipe.readline(LONGEST), b""):
                text = piece.decode(errors="replace").rstrip()
                if level is None:
                    level, text = _levelled(text)
                if text:
                    self.context.run(logger.log, level, "{}: {}", self.name, text)
                if piece.endswith(b"\n"):
                    level = None


def _levelled(line: str) -> tuple[str, str]:
    level, colon, text = line.partition(": ")
    return (level, text) if colon and level in LEVELS else ("INFO", line)


def begin_relayed() -> None:
    """Log to stderr as a `Relay` at its other end takes it, which also decides what is kept."""
    logger.remove()
    logger.add(sys.stderr, level="TRACE", format="{level}: {message}", diagnose=False)


def _harmless(record: Record) -> None:
    """Escape what a record may have from elsewhere."""
    record["message"] = escaped(record["message"])
    for name in _CONTEXT:
        if name in record["extra"]:
            record["extra"][name] = escaped(str(record["extra"][name]))


def _trace(record: Record) -> str:
    """Return a record's traceback, indented: no line of it can pass for a record's."""
    exception = record["exception"]
    if exception is None or exception.value is None:
        return ""
    lines = "".join(format_exception(exception.value)).splitlines()
    return "".join(f"    {escaped(line)}\n" for line in lines)


def _format(record: Record) -> str:
    record["extra"]["trace"] = _trace(record)
    context = " ".join(f"{{extra[{name}]}}" for name in _CONTEXT if name in record["extra"])
    middle = f"<cyan>{context}</cyan> | " if context else ""
    return (
        "<green>{time:YYYY-MM-DD HH:mm:ss.SSS!UTC}</green> <level>{level: <7}</level> "
        + middle
        + "{message}\n{extra[trace]}"
    )


def configure(
    level: str, *, file: str | None = None, as_json: bool = False, lasting: bool = False
) -> None:
    """Log to stderr and, if `file` is given, to that file too.

    The file is rotated, and opened again if something else has moved or removed it. A `lasting`
    process waits neither for whoever reads its stderr nor for the file's disk. Variables are never
    shown in tracebacks: they may hold a password.

    Raises OSError if the file cannot be opened.
    """
    logger.remove()
    logger.configure(patcher=_harmless)
    common: dict[str, Any] = {
        "level": level,
        "format": "{message}" if as_json else _format,
        "serialize": as_json,
        "backtrace": False,
        "diagnose": False,
    }
    # loguru itself colours what goes to a terminal, whatever NO_COLOR says.
    colours = False if os.environ.get("NO_COLOR") else None
    stderr = Outlet(Unbuffered(sys.stderr)) if lasting else sys.stderr
    logger.add(stderr, colorize=colours, **common)
    if file is not None:
        target = LogFile(file)
        logger.add(Outlet(target) if lasting else target, **common)
    logging.basicConfig(handlers=[_Caught()], level=logging.WARNING, force=True)
