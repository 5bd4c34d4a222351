"""Named points between durable writes, at which a fault-injection test can kill the process.

When they are armed, each durable write (a command to the database, a rename, a link, an unlink, a
mode) passes a point just before it, named after the function that writes:
``<scope>:<module>.<function>.<write>``. New handlers have their points without further code. Code
calls `point` for a write that raises no audit event in Python (a system call, a message to another
host), or for a point with a fixed name.

In production a point costs one check of a module variable. `tests/faults` sets the environment:

- ``CAXEV_CRASH=NAME:N ...``: SIGKILL at the Nth passing of a point NAME, whichever comes first. A
  worker process first kills the listener that started it.
- ``CAXEV_CRASH_LOG=FILE``: append a line to FILE for each point passed: process id and name, and
  ``killed`` if it was.
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
"""Whether this process logs or kills at points."""
_FILE_WRITES: Final = {
    f"os.{name}" for name in ("chmod", "chown", "link", "mkdir", "remove", "rename", "rmdir")
} | {"os.symlink"}
"""Audit events that Python raises before a durable write."""
_passed: Counter[str] = Counter()

scope: ContextVar[str] = ContextVar("scope", default="engine")
"""The writer: ``engine``, or the name of the handler that is running."""

die_with: list[int] = []
"""Processes to kill as well: a worker adds its listener's process id."""


errors: dict[str, Exception] = {}
"""Errors to raise at points of this process, once each; set by `caxev.testing`."""


def point(name: str) -> None:
    """Pass the point ``<scope>:<name>``; does nothing unless a test has armed it."""
    if not (ARMED or errors):
        return
    name = f"{scope.get()}:{name}"
    if name in errors:  # raised in place of the write, so the point does not count as passed
        raise errors.pop(name)
    _passed[name] += 1
    killed = f"{name}:{_passed[name]}" in _AT
    if _LOG:
        with Path(_LOG).open("a") as log:
            log.write(f"{os.getpid()} {name}{' killed' if killed else ''}\n")
    if killed:
        # Listener before worker: one that survived would see the worker's end and retry the job.
        for process in (*die_with, os.getpid()):
            os.kill(process, signal.SIGKILL)


def _heard(event: str, _: tuple[Any, ...]) -> None:
    if event not in _FILE_WRITES:
        return
    # Python keeps what it compiles when a module is first imported: that is no write of ours.
    if sys._getframe(1).f_code.co_filename != "<frozen importlib._bootstrap_external>":  # noqa: SLF001
        before(event.removeprefix("os."))


def before(write: str) -> None:
    """Pass the point before a write of our code or a handler's, not before a library's own."""
    if not ARMED:
        return
    # By the stack, and not by an argument, so that new code has its points without asking.
    frame = _writer(sys._getframe(1))  # noqa: SLF001  # there is no other way to know who calls
    module = "" if frame is None else frame.f_globals.get("__name__", "")
    if frame is None or "site-packages" in frame.f_code.co_filename:
        return
    function = frame.f_code.co_qualname.partition(".<locals>")[0]
    point(f"{module.removeprefix('caxev.')}.{function}.{write}")


_CARRIERS: Final = sys.stdlib_module_names | {"pymongo"}
"""Packages whose functions write on behalf of their callers."""
_REPORTING: Final = (
    __name__,
    *(f"caxev.database.{name}" for name in ("client", "connection", "writes")),
    "caxev.files.resolved",
)
"""Modules that announce writes of their callers, and so give no point its name."""


def _writer(frame: FrameType | None) -> FrameType | None:
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module not in _REPORTING and module.partition(".")[0] not in _CARRIERS:
            return frame
        frame = frame.f_back
    return None


if ARMED:
    # An audit hook cannot be removed again, so production never has one.
    sys.addaudithook(_heard)
