"""What a listener sees of itself: whether its disks are full, its database there, its stream late.

`listener` runs `Vitals` beside its other tasks. `ailments` decides, and is pure.
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
"""Seconds between two looks. None of them asks the database."""
TROUBLED: Final = 60.0
"""Seconds without the database after which people are told: an election takes a few."""
LATE: Final = 600.0
"""Seconds that the stream may be behind..."""
LOOKS: Final = 5
"""...at one of so many looks: after an outage the first batches are old."""
ROOM: Final = 1.05
"""A disk is no longer full when this much of `min_free` is free."""
EXHAUSTED: Final = 0.9
"""Share of the descriptors that a process may have, from which on there are too few..."""
RELIEVED: Final = 0.7
"""...and up to which there are enough again."""
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
    """Whether an error, or what it came from, is that this process or machine has none left."""
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
class Pulse:
    """How a listener is.

    `trouble` says what ails the database, and since when, `troubled` for how many seconds; `behind`
    is how many seconds the stream is late. `free` are the free bytes of each file system, by a
    directory on it; at least `min_free` should be. `away` has each directory, and why it is not
    there if it is not. `files` are the descriptors that the process has open. `skew` is by how
    many seconds this machine's clock is ahead of the database's.
    """

    trouble: str | None = None
    troubled: float = 0.0
    behind: float = 0.0
    free: Mapping[str, int] = field(factory=dict)
    away: Mapping[str, str | None] = field(factory=dict)
    files: Descriptors = field(factory=lambda: Descriptors(0, 1))
    min_free: int = 0
    skew: float = 0.0


def ailments(site: str, pulse: Pulse) -> Iterator[tuple[str, Alarm | None]]:
    """Return the alarms that a pulse calls for by their keys; None: that one is over.

    What is neither is left out, and stays as it is.
    """
    if pulse.trouble is None or pulse.troubled >= TROUBLED:
        yield _of("database", site, _no_database(pulse))
    if pulse.behind >= LATE or pulse.behind < LATE / 2:
        yield _of("stream", site, _late(pulse))
    yield _of("clock", site, _skewed(pulse))
    if not RELIEVED < pulse.files.share < EXHAUSTED:
        yield _of("open files", site, _exhausted(pulse.files))
    for directory, free in pulse.free.items():
        enough = pulse.min_free * ROOM
        if free < pulse.min_free or free >= enough:
            yield _of(f"{DISK}{directory}", site, _full(directory, free, pulse.min_free))
    for directory, why in pulse.away.items():
        yield _of(f"{ROOT}{directory}", site, _away(directory, why))


def gone_directories(keys: Iterable[str], held: Collection[str]) -> list[str]:
    """Return those keys of alarms that are about a directory which is not held any more. Pure."""
    about = [(key, prefix) for key in keys for prefix in (DISK, ROOT) if key.startswith(prefix)]
    return [key for key, prefix in about if key.removeprefix(prefix) not in held]


def _of(key: str, site: str, found: tuple[str, Severity, str] | None) -> tuple[str, Alarm | None]:
    if found is None:
        return key, None
    summary, severity, more = found
    return key, Alarm(site, key, f"{site}: {summary}", severity, details={"more": more})


def _no_database(pulse: Pulse) -> tuple[str, Severity, str] | None:
    if pulse.trouble is None:
        return None
    return "the runs database is not reached", Severity.CRITICAL, pulse.trouble


def _late(pulse: Pulse) -> tuple[str, Severity, str] | None:
    if pulse.behind < LATE:
        return None
    more = f"the change being recorded is {pulse.behind / 60:.0f} minutes old"
    return "the change stream is late", Severity.WARNING, more


def _exhausted(files: Descriptors) -> tuple[str, Severity, str] | None:
    if files.share < EXHAUSTED:
        return None
    more = (
        f"of {files.allowed:,} allowed nearly all are in use, and reactions fail for want of one: "
        "raise LimitNOFILE of its unit, or ulimit -n, and restart it"
    )
    return "the listener has too many open files", Severity.CRITICAL, more


def _skewed(pulse: Pulse) -> tuple[str, Severity, str] | None:
    if abs(pulse.skew) <= SKEW:
        return None
    how = f"{abs(pulse.skew):.0f} s {'ahead of' if pulse.skew > 0 else 'behind'} the database's"
    more = f"it is {how}: synchronise both machines by NTP; nothing is deleted early meanwhile"
    # Without the figure: an alarm of another text would be delivered again.
    return "this machine's clock is not the database's", Severity.WARNING, more


def _full(directory: str, free: int, min_free: int) -> tuple[str, Severity, str] | None:
    if free >= min_free:
        return None
    more = f"{free:,} bytes are free, {min_free:,} should be (min_free)"
    return f"the disk of {directory} is full", Severity.CRITICAL, more


def _away(directory: str, why: str | None) -> tuple[str, Severity, str] | None:
    return None if why is None else (f"the disk of {directory} is away", Severity.CRITICAL, why)


@define(eq=False)
class Vitals:
    """Looks after a listener, whose `pulse` it takes."""

    site: str
    pulse: Callable[[], Pulse]
    alarms: Alarms
    every: float = EVERY
    _behind: deque[float] = field(init=False, factory=lambda: deque([0.0] * LOOKS, LOOKS))

    async def run(self) -> None:
        """Look, for ever."""
        while True:
            self.look()
            await trio.sleep(self.every)

    def look(self) -> None:
        """Look once, raise what is to be raised and clear what is over."""
        seen = self.pulse()
        self._behind.append(seen.behind)
        pulse = evolve(seen, behind=min(self._behind))
        for key, alarm in ailments(self.site, pulse):
            if alarm is None:
                self.alarms.clear(key)
            else:
                self.alarms.sound(alarm)
