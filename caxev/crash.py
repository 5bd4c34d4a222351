"""Named points between durable writes, at which a campaign can kill the process.

Every primitive that makes something last (a database write, a rename, an unlink) calls `point`
before and after it, so whatever is built on them is covered. In production a point costs one
look at a module variable. `tests/faults` sets the environment:

- ``CAXEV_CRASH=NAME:N``: at the Nth passing of the point NAME, SIGKILL. A worker process first
  kills the listener that started it.
- ``CAXEV_CRASH_LOG=FILE``: append a line for each point passed to FILE: process id and name.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from contextvars import ContextVar
from pathlib import Path
from typing import Final

_AT: Final = os.environ.get("CAXEV_CRASH", "")
_LOG: Final = os.environ.get("CAXEV_CRASH_LOG", "")
_ARMED: Final = bool(_AT or _LOG)
_passed: Counter[str] = Counter()

scope: ContextVar[str] = ContextVar("scope", default="engine")
"""Who is writing: ``engine``, or the name of the handler that is running."""

die_with: list[int] = []
"""Processes to take along: a worker puts its listener's process id here."""


errors: dict[str, Exception] = {}
"""What is raised at points of this process, once each; `caxev.testing` puts it here."""


def point(name: str) -> None:
    """Pass the point ``<scope>:<name>``; does nothing unless a campaign or a test has armed it."""
    if not (_ARMED or errors):
        return
    name = f"{scope.get()}:{name}"
    if name in errors:
        raise errors.pop(name)
    _passed[name] += 1
    if _LOG:
        with Path(_LOG).open("a") as log:
            log.write(f"{os.getpid()} {name}\n")
    wanted, _, nth = _AT.rpartition(":")
    if name == wanted and _passed[name] == int(nth):
        for process in (*die_with, os.getpid()):
            os.kill(process, signal.SIGKILL)
