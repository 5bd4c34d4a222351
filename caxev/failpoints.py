"""Named points between durable writes, at which a campaign can kill the process.

Where a campaign or a test has armed them, each write that lasts (a command to the database, a
rename, a link, an unlink, a mode) passes a point just before it, which is named after the function
that writes: ``<scope>:<module>.<function>.<write>``. So handlers that are written later have theirs
without further code. What Python tells nobody of (a system call, a message to another host), or
what a campaign wants to meet by a name of its own, calls `point`.

In production none of this is there but for one look at a module variable. `tests/faults` sets the
environment:

- ``CAXEV_CRASH=NAME:N ...``: at the Nth passing of a point NAME, the first that comes of these,
  SIGKILL. A worker process first kills the listener that started it.
- ``CAXEV_CRASH_LOG=FILE``: append a line for each point passed to FILE: process id and name, and
  ``killed`` where it was.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from contextvars import ContextVar
from pathlib import Path
from types import FrameType
from typing import Any, Final

_AT: Final = frozenset(os.environ.get("CAXEV_CRASH", "").split())
_LOG: Final = os.environ.get("CAXEV_CRASH_LOG", "")
ARMED: Final = bool(_AT or _LOG)
"""Whether points are passed in this process but for `errors`."""
_FILE_WRITES: Final = {
    f"os.{name}" for name in ("chmod", "chown", "link", "mkdir", "remove", "rename", "rmdir")
} | {"os.symlink"}
"""Events that Python raises before it does what lasts."""
_passed: Counter[str] = Counter()

scope: ContextVar[str] = ContextVar("scope", default="engine")
"""Who is writing: ``engine``, or the name of the handler that is running."""

die_with: list[int] = []
"""Processes to take along: a worker puts its listener's process id here."""


errors: dict[str, Exception] = {}
"""What is raised at points of this process, once each; `caxev.testing` puts it here."""


def point(name: str) -> None:
    """Pass the point ``<scope>:<name>``; does nothing unless a campaign or a test has armed it."""
    if not (ARMED or errors):
        return
    name = f"{scope.get()}:{name}"
    if name in errors:
        raise errors.pop(name)
    _passed[name] += 1
    killed = f"{name}:{_passed[name]}" in _AT
    if _LOG:
        with Path(_LOG).open("a") as log:
            log.write(f"{os.getpid()} {name}{' killed' if killed else ''}\n")
    if killed:
        for process in (*die_with, os.getpid()):
            os.kill(process, signal.SIGKILL)


def _heard(event: str, _: tuple[Any, ...]) -> None:
    if event in _FILE_WRITES:
        before(event.removeprefix("os."))


def before(write: str) -> None:
    """Pass the point before a write, if it is ours or a handler's, and no library's own."""
    if not ARMED:
        return
    frame = _writer(sys._getframe(1))  # noqa: SLF001  # there is no other way to know who calls
    module = "" if frame is None else frame.f_globals.get("__name__", "")
    if frame is None or "site-packages" in frame.f_code.co_filename:
        return
    function = frame.f_code.co_qualname.partition(".<locals>")[0]
    point(f"{module.removeprefix('caxev.')}.{function}.{write}")


_CARRIERS: Final = sys.stdlib_module_names | {"pymongo"}
"""Packages whose functions write on behalf of their callers."""
_TELLING: Final = (__name__, "caxev.database.client", "caxev.files.resolved")
"""Modules that say that somebody writes."""


def _writer(frame: FrameType | None) -> FrameType | None:
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module not in _TELLING and module.partition(".")[0] not in _CARRIERS:
            return frame
        frame = frame.f_back
    return None


if ARMED:
    sys.addaudithook(_heard)
