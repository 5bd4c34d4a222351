"""The ends of jobs from the logs of a batch system (`LogsEnds`), as they are written.

A listener runs `JobEnds` beside its engine. The kernel reports each change of a log (inotify), so
nothing is polled; after a restart the logs are read from their beginning. An end is reported by the
same update as by the job itself, which counts only once.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from random import random
from typing import Final, Protocol, runtime_checkable

import trio
from attrs import define, field, frozen
from loguru import logger

from caxev.batch.base import JobEnd, system
from caxev.batch.folder import Place
from caxev.batch.runner import report
from caxev.config import Site, Sites, jobs_directory
from caxev.config.processing import LOCAL
from caxev.core.clock import utcnow
from caxev.core.errors import GiveUp, Retry
from caxev.core.ledger import delay
from caxev.core.update import RunUpdate
from caxev.database import Database, DatabaseError, Lease, concerns_one, is_fatal


@runtime_checkable
class LogsEnds(Protocol):
    """A batch system that logs the ends of jobs in files of ours."""

    @property
    def logs(self) -> str:
        """The directory of the logs, one for each group of jobs and of its name."""
        ...

    def ends(self, group: str) -> Iterator[tuple[Place, JobEnd]]:
        """Yield the ends in a group's log that are new, each with the place of its job."""
        ...


@define(eq=False)
class JobEnds:
    """Reports the ends of a site's jobs that are in the logs of its batch systems."""

    database: Database
    lease: Lease
    site: Site
    sites: Sites
    _changed: trio.CancelScope = field(init=False, factory=trio.CancelScope)

    def use(self, site: Site, sites: Sites) -> None:
        """Go by these sites from now on."""
        self.site, self.sites = site, sites
        self._changed.cancel()

    async def catch_up(self) -> None:
        """Report all ends that are in the logs."""
        for kind in sorted(self.site.types.derived):
            try:
                if (batch := await trio.to_thread.run_sync(self._followed, kind)) is not None:
                    await self._report(batch, await trio.to_thread.run_sync(_groups, batch))
            except (GiveUp, Retry, OSError) as error:
                logger.error("the log of jobs for {} data is not read: {}", kind, error)

    async def run(self) -> None:
        """Follow the logs until cancelled."""
        while True:
            with trio.CancelScope() as self._changed:
                async with trio.open_nursery() as nursery:
                    for kind in sorted(self.site.types.derived):
                        nursery.start_soon(self._persist, kind)
                    await trio.sleep_forever()

    def _followed(self, kind: str) -> LogsEnds | None:
        """Return what makes data of that type here, if it logs the ends of jobs."""
        how = self.site.processing_of(kind)
        if how is None or how.system == LOCAL:
            return None
        batch = system(how.system, jobs_directory(self.site, kind))
        return batch if isinstance(batch, LogsEnds) else None

    async def _persist(self, kind: str) -> None:
        # A disk may be away, or HTCondor's library: ends are then found by the regular check.
        for attempt in count(1):
            try:
                if (found := await trio.to_thread.run_sync(self._followed, kind)) is not None:
                    await self._follow(found)
            except (GiveUp, Retry, OSError) as error:
                wait = delay(attempt, random())  # noqa: S311  # not for secrets
                line = "the log of jobs for {} data is not followed: {}; tried again in {:.0f} s"
                logger.error(line, kind, error, wait)
                await trio.sleep(wait)
            else:
                return

    async def _follow(self, batch: LogsEnds) -> None:
        with changes_in(batch.logs) as changes:
            # Listed after the watch began, so that no change falls between the two.
            groups = await trio.to_thread.run_sync(_groups, batch)
            while True:
                await self._report(batch, groups)
                groups = await changes.names() or await trio.to_thread.run_sync(_groups, batch)

    async def _report(self, batch: LogsEnds, groups: list[str]) -> None:
        for group in groups:
            for place, ended in await trio.to_thread.run_sync(_new_ends, batch, group):
                update = await trio.to_thread.run_sync(_report_of, place, ended)
                if update is not None:
                    await self._write(update)

    async def _write(self, update: RunUpdate) -> None:
        # An end is read once: it waits here until the database has it.
        for attempt in count(1):
            try:
                await self.database.update_run(update, utcnow())
            except DatabaseError as error:
                if is_fatal(error):
                    raise
                logger.warning("the end of a job of run {} waits: {}", update.run, error)
                if concerns_one(error):
                    return
                await trio.sleep(delay(attempt, random()))  # noqa: S311  # the same
            else:
                return


def _groups(batch: LogsEnds) -> list[str]:
    return sorted(os.listdir(batch.logs))


def _new_ends(batch: LogsEnds, group: str) -> list[tuple[Place, JobEnd]]:
    return list(batch.ends(group))


def _report_of(place: Place, ended: JobEnd) -> RunUpdate | None:
    """Return the report of a job's end, or None if it was reported before."""
    if place.file("reported").exists():
        return None
    try:
        return report(place.load(), place.ended or ended)
    except FileNotFoundError:
        return None  # the job was closed
    except GiveUp as error:  # the others are reported all the same
        logger.error("the end of a job is not reported: {}", error)
        return None


@frozen
class _Changes:
    """The kernel's events of a directory, by an inotify descriptor."""

    descriptor: int

    async def names(self) -> list[str]:
        """Wait for changes; return the names of the files, or none if any file may have changed."""
        await trio.lowlevel.wait_readable(self.descriptor)
        found, data = set(), os.read(self.descriptor, _LONGEST)
        while data:
            _, mask, _, length = _HEAD.unpack_from(data)
            if mask & _OVERFLOW:
                return []
            found.add(os.fsdecode(data[_HEAD.size : _HEAD.size + length].rstrip(b"\0")))
            data = data[_HEAD.size + length :]
        return sorted(found)


_HEAD: Final = struct.Struct("iIII")
_LONGEST: Final = 1 << 16
_MODIFIED_OR_NEW: Final = 0x2 | 0x80 | 0x100  # IN_MODIFY, IN_MOVED_TO, IN_CREATE
_OVERFLOW: Final = 0x4000


@contextmanager
def changes_in(directory: str) -> Iterator[_Changes]:
    """Watch the files of a directory while the block lasts. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "inotify is not available")
    try:
        if libc.inotify_add_watch(descriptor, os.fsencode(directory), _MODIFIED_OR_NEW) < 0:
            raise OSError(ctypes.get_errno(), "it cannot be watched", directory)
        yield _Changes(descriptor)
    finally:
        os.close(descriptor)
