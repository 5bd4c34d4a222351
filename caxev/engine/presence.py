"""Presence: report this process to the others, and compare its sites.json with theirs.

`listener` runs it beside the lease, so a stand-by is seen, too; `helping` runs it for a helper. It
reads and writes one small document a minute, and no run.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import trio
from attrs import define, field
from loguru import logger

from caxev import __version__
from caxev.config.handlers import digest
from caxev.core.alarms import Alarm, Severity
from caxev.core.processes import Process, disagreements, unlike_listener
from caxev.database import Database, DatabaseError
from caxev.engine.options import Reloader

EVERY: Final = 60.0
"""Seconds between two reports."""
LEAVING: Final = 5.0
"""Seconds that the last write may take."""
KEY: Final = "sites.json differs"
OTHER: Final = "other program"
SHOWN: Final = 20
"""Keys that an alarm names."""


@define(eq=False)
class Presence:
    """Reports one process while it listens or stands by, or helps with `lanes`."""

    reloader: Reloader
    database: Database
    owner: str
    lanes: Sequence[str] = ()
    _reported: Process | None = field(init=False, default=None)
    _differing: dict[str, list[str]] = field(init=False, factory=dict)

    async def run(self) -> None:
        """Report and compare, until cancelled; at the end, withdraw the report."""
        try:
            while True:
                changed = self.reloader.changed
                await self._report()
                with trio.move_on_after(EVERY):
                    await changed.wait()
        finally:
            # If it cannot be withdrawn, the report is left to expire.
            with trio.move_on_after(LEAVING, shield=True), suppress(DatabaseError):
                if self._reported is not None:
                    await self.database.forget_process(self._reported)

    @property
    def process(self) -> Process:
        """This process as it is now."""
        options = self.reloader.options
        return Process(
            owner=self.owner,
            site=options.site.name,
            version=__version__,
            configuration=options.sites.digest,
            handlers=digest(options.registry.enabled),
            keys=options.sites.keys,
            lanes=tuple(self.lanes),
        )

    async def _report(self) -> None:
        try:
            # Before the write, which may have been made although its reply was lost: it is
            # withdrawn.
            self._reported = process = self.process
            await self.database.report_process(process)
            known = await self.database.processes()
            self.compare(process, known)
            self._compare_programs(process, known)
        except DatabaseError as error:
            logger.debug("this process cannot be reported yet: {}", error)

    def compare(self, process: Process, known: list[Process]) -> None:
        """Raise an alarm if other processes have another sites.json; end it if none has."""
        found, former = disagreements(process, known), self._differing
        alarms, self._differing = self.reloader.alarms, found
        if not found:
            alarms.clear(KEY)
            return
        names = ", ".join(found)
        summary = f"{process.site}: sites.json is not the same as at {names}"
        details = {site: ", ".join(keys[:SHOWN]) for site, keys in found.items()}
        if found != former:  # a stand-by has no alarms
            logger.warning("{}: {}", summary, "; ".join(details.values()))
        what = "caxev sites diff; use one file at all sites, then reload"
        alarm = Alarm(
            process.site, KEY, summary, Severity.WARNING, "", {**details, "what to do": what}
        )
        alarms.raise_(alarm)

    def _compare_programs(self, process: Process, known: list[Process]) -> None:
        """Raise an alarm if a helper is of another version than its listener; end it if not."""
        found = unlike_listener(process, known)
        if not found:
            self.reloader.alarms.clear(OTHER)
            return
        summary = f"{process.site}: not the same program as the listener: {found}"
        todo = "install the listener's version, and start it with the same handlers"
        alarm = Alarm(process.site, OTHER, summary, Severity.WARNING, details={"what to do": todo})
        self.reloader.alarms.raise_(alarm)
