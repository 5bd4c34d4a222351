"""The errors that more than one part of caxev raises, named for what the caller can do."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from math import isfinite
from typing import Final

UNFORESEEN: Final = (ValueError, OverflowError, struct.error)
"""Errors of libraries on input that they were not written for: a date, a byte, a number. At our
borders with them, such an error becomes `Retry` or `GiveUp`, whose message names the far end or
file."""


def seconds(after: float | None) -> float | None:
    """Return a finite number, or None. Raises ValueError or TypeError for anything else."""
    found = None if after is None else float(after)
    # NaN would compare as due neither now nor later.
    if found is not None and not isfinite(found):
        raise ValueError(f"after={after}: not a number of seconds")
    return found


class Retry(Exception):
    """Try this again, `after` seconds from now (default: exponential back-off with jitter)."""

    def __init__(self, why: str, *, after: float | None = None) -> None:
        super().__init__(why)
        self.why = str(why)
        self.after = seconds(after)


class Denied(Retry):
    """A person must lift a refusal first: a permission, a key, a quota.

    Tried again at growing intervals; given up after days (`caxev.core.ledger.PATIENCE`).
    """


class RootAway(Retry):
    """The disk of a root is not there, so nothing can be known of what is beneath it.

    The reaction waits without an end: for a directory of this site, `root`, until the listener
    finds it again; for another site's at growing intervals. `host` is the machine on which it is
    missing, as sites.json names it; empty: this one.
    """

    def __init__(self, why: str, *, root: str = "", host: str = "") -> None:
        super().__init__(why)
        self.root = root
        self.host = host


class GiveUp(Exception):
    """Trying again is of no use: park this as failed, for a person to look at."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = str(why)


class Damaged(GiveUp):
    """The source of a copy differs from its manifest; no wrong bytes were accepted.

    The source may be a bad copy: have it read again (`caxev.copies.readings.suspecting`).
    """


class Superseded(Exception):
    """The run is no longer what the update expected: another process was first. Nothing to do."""


class NoSuchRun(Exception):
    """No run is the one that is meant. The message is one line for a person."""


class NothingToDo(Exception):
    """A person's request is impossible, or done already. The message is one line.

    `status` is that of the copy concerned, if there is one.
    """

    def __init__(self, why: str, status: str | None = None) -> None:
        super().__init__(why)
        self.status = status


class Ambiguous(NothingToDo):
    """A person's request may mean several copies. The message names the option that decides."""


class ConfigError(Exception):
    """A file or option of an operator is wrong. The message begins with what is, and what to do.

    `problems` holds one line for each mistake. If there are several, the message's first line sums
    them up and the others follow it.
    """

    def __init__(self, summary: str, problems: Sequence[str] = ()) -> None:
        super().__init__(summary, tuple(problems))
        self.summary = summary
        self.problems = tuple(problems) or (summary,)

    def __str__(self) -> str:
        if self.problems == (self.summary,):
            return self.summary
        return "\n".join((self.summary, *(f"  {problem}" for problem in self.problems)))


def one_line(error: BaseException) -> str:
    """Return an exception as one line: its class, and the first line of its message."""
    first, _, _ = str(error).strip().partition("\n")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
