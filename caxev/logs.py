"""Logging: its targets and its format.

Modules log with loguru's ``logger``; records of the standard library's logging (pymongo, asyncssh)
are passed on to it. Each attempt at a reaction is logged with its run, event and handler. One
record is one line, except for tracebacks, which are indented: text from elsewhere, such as a run's
name, is escaped here, so that it can neither forge a line nor control a terminal.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from contextlib import suppress
from contextvars import copy_context
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from traceback import format_exception
from typing import TYPE_CHECKING, Any, Final, TextIO

from loguru import logger

from caxev.core.escapes import escaped
from caxev.limited import without_waiting

if TYPE_CHECKING:
    from loguru import Record

ROTATE_AT: Final = 20_000_000
"""Bytes in a log file before a new one is begun."""
KEEP: Final = 10
"""Former log files that are kept."""
ROOM: Final = 10_000_000
"""Characters of lines that may wait to be written; further lines are dropped."""
LAST: Final = 2.0
"""Seconds that the last lines may take when the process ends."""
LONGEST: Final = 2000
"""Bytes of a line of another process; a longer one is cut into several."""
LINGER: Final = 1.0
"""Seconds for the last lines of a process that has ended."""
LEVELS: Final = ("TRACE", "DEBUG", "INFO", "SUCCESS", "WARNING", "ERROR", "CRITICAL")

_CONTEXT: Final = ("site", "handler", "run", "event")


class _ToLoguru(logging.Handler):
    """Passes the records of the standard library's logging on to loguru."""

    def emit(self, record: logging.LogRecord) -> None:
        # A library may have levels of its own, which loguru knows only by their numbers.
        level: str | int = record.levelname
        try:
            logger.level(record.levelname)
        except ValueError:
            level = record.levelno
        logger.opt(exception=record.exc_info).log(level, "{}: {}", record.name, record.getMessage())


class Outlet:
    """Writes to a target in a thread of its own, so that logging never blocks.

    A stopped pager, a log shipper or a disk that hangs must not stop a listener. loguru's own queue
    (`enqueue`) is a pipe, and blocks when it is full. Here, lines without room are dropped, and the
    next line is preceded by their number.
    """

    def __init__(self, target: Unbuffered | LogFile) -> None:
        self._target = target
        self._waiting = SimpleQueue[str | None]()
        self._size = self._dropped = 0
        self._guard = Lock()
        self._thread = Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    def isatty(self) -> bool:
        """Whether it is a terminal: then it has colours."""
        return self._target.isatty()

    def write(self, line: str) -> None:
        """Queue a line, or drop it if there is no room. Never waits."""
        with self._guard:
            if self._size + len(line) > ROOM:
                self._dropped += 1
                return
            self._size += len(line)
            self._waiting.put(line)

    def stop(self) -> None:
        """Write the waiting lines, for at most `LAST` seconds. loguru calls this at the end."""
        self._waiting.put(None)
        self._thread.join(LAST)

    def _write_all(self) -> None:
        while True:
            line = self._waiting.get()
            with self._guard:
                dropped, self._dropped = self._dropped, 0
            if dropped:
                self._write(f"{dropped} lines of the log were dropped: there was no room\n")
            if line is None:
                self._target.stop()
                return
            self._write(line)
            with self._guard:  # only now: a line takes up room until it is written
                self._size -= len(line)

    def _write(self, text: str) -> None:
        # The disk is full, the reader has left, a test's stream is closed. Later lines may succeed,
        # and there is no log to report it to.
        with suppress(OSError, ValueError):
            self._target.write(text)


class Unbuffered:
    """A stream that is written without its buffer, whose lock is held while nobody reads."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._stream.isatty()

    def write(self, text: str) -> None:
        """Write all of it. Raises OSError, and ValueError if the stream is closed."""
        try:
            descriptor = self._stream.fileno()
        except OSError:  # no descriptor: a test's stream
            self._stream.write(text)
            return
        rest = text.encode(errors="backslashreplace")
        while rest:
            try:
                rest = rest[os.write(descriptor, rest) :]
            # Another program has set the terminal or pipe that it shares with us to non-blocking.
            except BlockingIOError:
                time.sleep(0.1)

    def stop(self) -> None:
        """Leave the stream open: it is the process's."""


class LogFile:
    """A file that is rotated, and opened again if something else has moved or removed it.

    Former files are numbered like logrotate's: the latest is ``.1``. The standard library has
    one handler that rotates and another that opens again, but none that does both.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path).absolute()
        self._file = self._open()

    def isatty(self) -> bool:
        """Return False: a file has no colours."""
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
        """Close the file. loguru calls this at the end."""
        self._file.close()

    def _open(self) -> TextIO:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return open(
            self._path,
            "a",
            buffering=1,
            encoding="utf-8",
            errors="backslashreplace",
            opener=without_waiting,
        )

    def _is_moved(self) -> bool:
        try:
            return not os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except (FileNotFoundError, ValueError):  # it is gone, or could not be opened again
            return True

    def _rotate(self) -> None:
        for number in range(KEEP, 0, -1):
            older = self._path if number == 1 else self._numbered(number - 1)
            with suppress(OSError):  # it does not exist, or may not be renamed: then it just grows
                older.replace(self._numbered(number))
        self._file.close()
        self._file = self._open()

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")


class Relay:
    """Logs the lines that another process writes to a pipe, in a thread of its own.

    The process never waits for the log. A line keeps its level if it begins with one, as those of
    `begin_relayed` do; other lines are the output of programs and libraries. A line has the run,
    event and handler of `context`, which is the `copy_context` of the latest job.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self.name = name
        self.context = copy_context()
        self._thread = Thread(target=self._read_all, args=(descriptor,), name="relay", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait a moment for the last lines: a program left behind may hold the pipe forever."""
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
    """Log to stderr in the form that a `Relay` at its other end reads; its levels decide there."""
    logger.remove()
    logger.add(sys.stderr, level="TRACE", format="{level}: {message}", diagnose=False)


def _escape(record: Record) -> None:
    """Escape the parts of a record that may be from elsewhere."""
    record["message"] = escaped(record["message"])
    for name in _CONTEXT:
        if name in record["extra"]:
            record["extra"][name] = escaped(str(record["extra"][name]))


def _trace(record: Record) -> str:
    """Return a record's traceback, indented, so that no line of it looks like a record."""
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

    The file is a `LogFile`. A `lasting` process, such as a listener, never waits for the reader of
    its stderr or for the file's disk. Tracebacks show no variables: they may hold a password.

    Raises OSError if the file cannot be opened.
    """
    logger.remove()
    logger.configure(patcher=_escape)
    common: dict[str, Any] = {
        "level": level,
        "format": "{message}" if as_json else _format,
        "serialize": as_json,
        "backtrace": False,
        "diagnose": False,
    }
    # By itself, loguru ignores NO_COLOR at a terminal.
    colours = False if os.environ.get("NO_COLOR") else None
    stderr = Outlet(Unbuffered(sys.stderr)) if lasting else sys.stderr
    logger.add(stderr, colorize=colours, **common)
    if file is not None:
        target = LogFile(file)
        logger.add(Outlet(target) if lasting else target, **common)
    logging.basicConfig(handlers=[_ToLoguru()], level=logging.WARNING, force=True)
