"""What a listener sees of itself: whether its disks are full, its database there, its stream late.

`daemon` runs `Vitals` beside its other tasks. `ailments` decides, and is pure.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

import trio
from attrs import define, field, frozen

from caxev.alarms import Alarm, Alarms, Severity

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
ANSWERS: Final = 10.0
"""Seconds that a disk may take to say how full it is."""


@frozen
class Pulse:
    """How a listener is.

    `trouble` says what ails the database, and since when, `troubled` for how many seconds; `behind`
    is how many seconds the stream is late. `free` are the free bytes by directory, or why they are
    not known; at least `min_free` should be.
    """

    trouble: str | None = None
    troubled: float = 0.0
    behind: float = 0.0
    free: Mapping[str, int | str] = field(factory=dict)
    min_free: int = 0


def ailments(site: str, pulse: Pulse) -> Iterator[tuple[str, Alarm | None]]:
    """Return the alarms that a pulse calls for by their keys; None: that one is over.

    What is neither is left out, and stays as it is.
    """
    if pulse.trouble is None or pulse.troubled >= TROUBLED:
        yield _of("database", site, _no_database(pulse))
    if pulse.behind >= LATE or pulse.behind < LATE / 2:
        yield _of("stream", site, _late(pulse))
    for directory, free in pulse.free.items():
        enough = pulse.min_free * ROOM
        if isinstance(free, str) or free < pulse.min_free or free >= enough:
            yield _of(f"disk {directory}", site, _full(directory, free, pulse.min_free))


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


def _full(directory: str, free: int | str, min_free: int) -> tuple[str, Severity, str] | None:
    if isinstance(free, str):
        return f"the disk of {directory} does not answer", Severity.CRITICAL, free
    if free >= min_free:
        return None
    more = f"{free:,} bytes are free, {min_free:,} should be (min_free)"
    return f"the disk of {directory} is full", Severity.CRITICAL, more


@define(eq=False)
class Vitals:
    """Looks after a listener. `database` gives what a pulse says of the database."""

    site: str
    directories: Sequence[str]
    min_free: int
    database: Callable[[], Pulse]
    alarms: Alarms
    every: float = EVERY
    _behind: deque[float] = field(init=False, factory=lambda: deque([0.0] * LOOKS, LOOKS))
    _limiter: trio.CapacityLimiter = field(init=False, factory=lambda: trio.CapacityLimiter(1))

    async def run(self) -> None:
        """Look, for ever."""
        while True:
            await self.look()
            await trio.sleep(self.every)

    async def look(self) -> None:
        """Look once, raise what is to be raised and clear what is over."""
        free = await self._free() if self.min_free else {}
        seen = self.database()
        self._behind.append(seen.behind)
        pulse = Pulse(seen.trouble, seen.troubled, min(self._behind), free, self.min_free)
        for key, alarm in ailments(self.site, pulse):
            if alarm is None:
                self.alarms.clear(key)
            else:
                self.alarms.sound(alarm)

    async def _free(self) -> dict[str, int | str]:
        """Ask each disk once. One that hangs (NFS) is waited for no longer than `ANSWERS`."""
        found: dict[str, int | str] = {}
        with trio.move_on_after(ANSWERS) as scope:
            found = await trio.to_thread.run_sync(
                partial(free_bytes, self.directories),
                abandon_on_cancel=True,
                limiter=self._limiter,
            )
        if scope.cancelled_caught:
            return dict.fromkeys(self.directories, f"no answer for {ANSWERS:.0f} s")
        return found


def free_bytes(directories: Sequence[str]) -> dict[str, int | str]:
    """The free bytes of each file system, by the first directory on it; else why not. Blocks."""
    found: dict[int, tuple[str, int | str]] = {}
    failed: dict[str, int | str] = {}
    for directory in directories:
        try:
            device = Path(directory).stat().st_dev
            found.setdefault(device, (directory, shutil.disk_usage(directory).free))
        except OSError as error:
            failed[directory] = error.strerror or str(error)
    return {**dict(found.values()), **failed}
