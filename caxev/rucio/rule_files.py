"""Apply a catalogue's rule file to the runs that are there already, when it has changed.

A listener runs `RuleFiles` beside its engine. The digest that was applied last is in the site's
record, so a change while nobody listened is found, too. A change makes the same requests as
``caxev rucio rules --apply``; asked for twice, it is done once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Final, TypeVar

import trio
from attrs import define, field
from loguru import logger

from caxev.config import ConfigError, Site, Sites
from caxev.core.clock import utcnow
from caxev.core.model import TRANSFERRED
from caxev.core.selection import at_host
from caxev.database import Database, DatabaseError, Lease, Request, concerns_one, unless_fatal
from caxev.limited import CONFIGURATION, read_limited
from caxev.rucio.rules import load_rules

T = TypeVar("T")

EVERY: Final = 30.0
"""Seconds between two checks of the files."""
HANDLER: Final = "rucio_rules"


@define(eq=False)
class RuleFiles:
    """The rule files of the catalogues that this site uploads to, and so looks after."""

    database: Database
    lease: Lease
    site: Site
    sites: Sites
    _seen: dict[str, tuple[int, int, int] | None] = field(init=False, factory=dict)
    _asked: trio.Event = field(init=False, factory=trio.Event)

    @property
    def files(self) -> Mapping[str, Path]:
        """The rule file of each catalogue that has one, by the catalogue's name."""
        found = [one for name in self.site.upload_options if (one := self.sites.find(name))]
        return {one.name: Path(one.rucio.rules) for one in found if one.rucio.rules}

    async def run(self) -> None:
        """Check the files forever. Raises `LeaseLost`."""
        while True:
            self._asked = trio.Event()
            with unless_fatal("rule files cannot be applied"):
                await self.catch_up()
            with trio.move_on_after(EVERY):
                await self._asked.wait()

    def use(self, site: Site, sites: Sites) -> None:
        """Use these sites from now on, and read their rule files at once."""
        self.site, self.sites = site, sites
        self._seen.clear()
        self._asked.set()

    async def catch_up(self) -> None:
        """Apply the files that have changed since they were applied last."""
        for name, path in self.files.items():
            seen = await _in_thread(_seen, path)
            if name in self._seen and seen == self._seen[name]:
                continue
            try:
                digest = await _in_thread(_digest, path)
            except (ConfigError, OSError) as error:
                logger.error("the rules of {} stay as they were: {}", name, error)
            else:
                await self._try_to_apply(name, digest)
            # After an error, too: it is reported once, and again only when the file has changed.
            self._seen[name] = seen

    async def _try_to_apply(self, name: str, digest: str) -> None:
        try:
            await self._apply(name, digest)
        except DatabaseError as error:  # an error about this document would only come again
            if not concerns_one(error):
                raise
            logger.error("cannot record that the rules of {} are applied: {}", name, error)

    async def _apply(self, name: str, digest: str) -> None:
        record = await self.database.site_record(self.lease.site)
        applied = {} if record is None else dict(record.rules)
        if applied.get(name) == digest:
            return
        # The digest is recorded after all requests: a crash in between makes them again, which is
        # harmless.
        runs, now = 0, utcnow()
        async for page in self.database.pages(at_host(name, TRANSFERRED), now):
            ids = tuple(run.id for run in page)
            request = Request("replay", ids, handler=HANDLER, force=True)
            await self.database.add_request(self.lease.site, request, self.lease.owner, now)
            runs += len(page)
        await self.database.rules_applied(self.lease, {**applied, name: digest})
        logger.info("the rule file of {} is new: its rules are applied to {} runs", name, runs)


async def _in_thread(function: Callable[[Path], T], path: Path) -> T:
    # The disk may hang: that must block no other task, nor keep the listener from leaving.
    return await trio.to_thread.run_sync(function, path, abandon_on_cancel=True)


def _digest(path: Path) -> str:
    """Return the digest of a file. Raises `ConfigError` if it is in error: it is not applied."""
    load_rules(path)
    return blake2b(read_limited(path, CONFIGURATION), digest_size=8).hexdigest()


def _seen(path: Path) -> tuple[int, int, int] | None:
    """Return what changes with a file; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    # The ctime, too: nothing else changes when a file becomes readable.
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size
