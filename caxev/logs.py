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
from contextlib import suppress
from queue import Full, Queue
from threading import Thread
from traceback import format_exception
from typing import TYPE_CHECKING, Any, Final, TextIO

from loguru import logger

from caxev.escapes import escaped

if TYPE_CHECKING:
    from loguru import Record

ROTATE_AT: Final = "20 MB"
KEEP: Final = 10
QUEUED: Final = 10_000
"""Lines that wait for whoever reads standard error; further ones are dropped."""
LAST: Final = 2.0
"""Seconds that the last lines may take when the process ends."""

_CONTEXT: Final = ("site", "handler", "run", "event")


class _Caught(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        level: str | int = record.levelname
        try:
            logger.level(record.levelname)
        except ValueError:
            level = record.levelno
        logger.opt(exception=record.exc_info).log(level, "{}: {}", record.name, record.getMessage())


class Outlet:
    """A stream that is written by a thread of its own, so that nobody waits for its reader.

    A pager that was stopped, or a log shipper that hangs, must not stop a listener. What does not
    fit into the queue is dropped; the first line that gets through again is preceded by how much.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lines: Queue[str | None] = Queue(QUEUED)
        self._dropped = 0
        self._thread = Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    def isatty(self) -> bool:
        """Whether people read it: then it has colours."""
        return self._stream.isatty()

    def write(self, line: str) -> None:
        """Have a line written; drop it if too many wait. Never waits."""
        try:
            self._lines.put_nowait(line)
        except Full:
            self._dropped += 1

    def stop(self) -> None:
        """Write what waits, for `LAST` seconds at most. Called by loguru when it lets go of it."""
        end = time.monotonic() + LAST
        with suppress(Full):
            self._lines.put(None, timeout=LAST)
            self._thread.join(max(end - time.monotonic(), 0.0))

    def _write_all(self) -> None:
        line: str | None = ""
        while line is not None:
            line = self._lines.get()
            dropped, self._dropped = self._dropped, 0
            if dropped:
                self._write(f"{dropped} lines of the log were dropped: nobody read them\n")
            self._write(line or "")

    def _write(self, text: str) -> None:
        """Write past the stream's own buffer, which would be locked while nobody reads."""
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError):  # not a file: a test's, that may be over
            with suppress(ValueError):
                self._stream.write(text)
            return
        rest = text.encode(errors="backslashreplace")
        while rest:
            try:
                rest = rest[os.write(descriptor, rest) :]
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:  # the disk is full, the reader has left
                return


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
    process never waits for whoever reads its stderr. Variables are never shown in tracebacks: they
    may hold a password.
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
    logger.add(Outlet(sys.stderr) if lasting else sys.stderr, colorize=colours, **common)
    if file is not None:
        logger.add(file, rotation=ROTATE_AT, retention=KEEP, watch=True, **common)
    logging.basicConfig(handlers=[_Caught()], level=logging.WARNING, force=True)
