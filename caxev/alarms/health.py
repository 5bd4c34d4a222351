"""A listener's own health: its disks, its database, its stream, its clock, its open files.

`listener` runs a `HealthMonitor` beside its other tasks. `health_alarms` decides, and is pure.
"""

from __future__ import annotations

import errno
import os
import resource
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Final, NamedTuple

import trio
from attrs import define, evolve, field, frozen

from caxev.core.alarms import Alarm, Alarms, Severity

EVERY: Final = 15.0
"""Seconds between two checks. None of them queries the database."""
TROUBLED: Final = 60.0
"""Seconds without the database before an alarm is raised: an election takes a few."""
LATE: Final = 600.0
"""Seconds that the stream may be behind..."""
CHECKS: Final = 5
"""...at one of this many checks: after an outage the first batches are old."""
ROOM: Final = 1.05
"""A disk is no longer full when this much of `min_free` is free."""
EXHAUSTED: Final = 0.9
"""An alarm is raised when this share of the process's descriptors is in use..."""
RELIEVED: Final = 0.7
"""...and cleared when the share has fallen to this."""
DISK: Final = "disk "
ROOT: Final = "root "
"""How the keys of alarms about a directory begin."""
SKEW: Final = 5.0
"""Seconds that this machine's clock may differ from the database's."""


class Descriptors(NamedTuple):
    """How many files and connections a process has open, and how many it may have."""

    used: int
    allowed: int

    @property
    def share(self) -> float:
        return self.used / self.allowed


def descriptors() -> Descriptors:
    """Return how many descriptors this process has open; all that it may, if none is left."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        return Descriptors(len(os.listdir("/proc/self/fd")) - 1, allowed)  # noqa: PTH208  # bare
    except OSError as error:
        return Descriptors(allowed if lacks_files(error) else 0, allowed)


def lacks_files(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, is that no descriptor is left."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, OSError) and one.errno in (errno.EMFILE, errno.ENFILE):
            return True
        inner = one.exceptions if isinstance(one, BaseExceptionGroup) else ()
        waiting += [one.__cause__, one.__context__, *inner]
    return False


@frozen
class Health:
    """The state of a listener.

    `trouble` is the database's, if any, which has lasted `troubled` seconds; `behind` is how many
    seconds the stream is late. `free` are the free bytes of each file system, by a directory on it;
    at least `min_free` should be. `away` has each directory, and why it is away, or None. `files`
    are the descriptors that the process has open. `skew` is by how many seconds this machine's
    clock is ahead of the database's.
    """

    trouble: str | None = None
    troubled: float = 0.0
    behind: float = 0.0
    free: Mapping[str, int] = field(factory=dict)
    away: Mapping[str, str | None] = field(factory=dict)
    files: Descriptors = field(factory=lambda: Descriptors(0, 1))
    min_free: int = 0
    skew: float = 0.0


def health_alarms(site: str, health: Health) -> Iterator[tuple[str, Alarm | None]]:
    """Return the alarms to raise by their keys; None: that one is over.

    A key is left out while its value is between two limits: its alarm stays as it is.
    """
    for key, is_wrong, summary, severity, more in (*_of_process(health), *_of_disks(health)):
        details = {"more": more}
        yield (
            key,
            Alarm(site, key, f"{site}: {summary}", severity, "", details) if is_wrong else None,
        )


_Finding = tuple[str, bool, str, Severity, str | None]


def _of_process(health: Health) -> Iterator[_Finding]:
    more = health.trouble
    if more is None or health.troubled >= TROUBLED:
        summary = "the runs database is unreachable"
        yield "database", more is not None, summary, Severity.CRITICAL, more
    if not LATE / 2 <= health.behind < LATE:
        more = f"the change being recorded is {health.behind / 60:.0f} minutes old"
        summary = "the change stream is late"
        yield "stream", health.behind >= LATE, summary, Severity.WARNING, more
    how = f"{abs(health.skew):.0f} s {'ahead of' if health.skew > 0 else 'behind'} the database's"
    more = f"it is {how}: synchronise both by NTP; nothing is deleted too early meanwhile"
    # No figure in the summary: an alarm with another summary would be written and logged again.
    summary = "this machine's clock differs from the database's"
    yield "clock", abs(health.skew) > SKEW, summary, Severity.WARNING, more
    share = health.files.share
    if not RELIEVED < share < EXHAUSTED:
        more = (
            f"nearly all of its {health.files.allowed:,} file descriptors are in use, and "
            "reactions fail: raise LimitNOFILE of its unit, or ulimit -n, and restart it"
        )
        summary = "the listener has too many open files"
        yield "open files", share >= EXHAUSTED, summary, Severity.CRITICAL, more


def _of_disks(health: Health) -> Iterator[_Finding]:
    least = health.min_free
    # Between the two limits nothing changes, so that a disk at its limit does not flap.
    for directory, free in health.free.items():
        if not least <= free < least * ROOM:
            more = f"{free:,} bytes are free, and min_free is {least:,}"
            summary = f"the disk of {directory} is full"
            yield f"{DISK}{directory}", free < least, summary, Severity.CRITICAL, more
    for directory, why in health.away.items():
        summary = f"the disk of {directory} is away"
        yield f"{ROOT}{directory}", why is not None, summary, Severity.CRITICAL, why
        if why is None and directory not in health.free:
            # Its disk has the name of another directory now.
            yield f"{DISK}{directory}", False, "", Severity.CRITICAL, None


def of_gone_directories(keys: Iterable[str], held: Collection[str]) -> list[str]:
    """Return the keys of alarms about directories that are no longer held. Pure."""
    about = [(key, prefix) for key in keys for prefix in (DISK, ROOT) if key.startswith(prefix)]
    return [key for key, prefix in about if key.removeprefix(prefix) not in held]


@define(eq=False)
class HealthMonitor:
    """Raises and clears the alarms about a listener, whose state `health` returns."""

    site: str
    health: Callable[[], Health]
    alarms: Alarms
    _behind: deque[float] = field(init=False, factory=lambda: deque([0.0] * CHECKS, CHECKS))

    async def run(self) -> None:
        """Check, until cancelled."""
        while True:
            self.check()
            await trio.sleep(EVERY)

    def check(self) -> None:
        """Check once: raise what is wrong, clear what is right again."""
        seen = self.health()
        # The least of the last checks: after an outage the first batches are old, and no fault.
        self._behind.append(seen.behind)
        for key, alarm in health_alarms(self.site, evolve(seen, behind=min(self._behind))):
            if alarm is None:
                self.alarms.clear(key)
            else:
                self.alarms.raise_(alarm)
