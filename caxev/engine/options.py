"""The options of a listener, and how a reload changes them.

`listener` makes one `Reloader` for its process and calls it on SIGHUP. sites.json is read whole and
checked before anything of it counts: a file with a mistake changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

import trio
from attrs import define, evolve, field, frozen
from loguru import logger

from caxev.alarms.manager import Recipient
from caxev.alarms.recipients import recipients
from caxev.config import BY_METHOD, ConfigError, Settings, Site, Sites
from caxev.core.alarms import Alarm, Alarms
from caxev.core.clock import utcnow
from caxev.core.history import Deed, HistoryRow, What
from caxev.core.processes import differing
from caxev.core.registry import Registry
from caxev.database import Database, DatabaseError, Lease
from caxev.engine.metrics_push import PushAddress
from caxev.engine.root_markers import holdings
from caxev.engine.workers import Workers
from caxev.metrics_server import MetricsAddress

CAUGHT_UP: Final = 0.3
"""Seconds without a change after which ``--once`` takes the stream for read."""
LEASE: Final = 15.0
"""Seconds within which a stand-by takes over from a listener that vanished."""
GRACE: Final = 10.0
"""Seconds that reactions in flight get to end after SIGTERM."""
FIXED: Final = ("alarms", "handlers", "lanes", "listener", "state")
"""Keys of the listener's own site that wait for its next start, as its directories do."""
WATCHING: Final = ("corrections", "task_list")
"""Keys that wait for the next start only if they need further fields of runs to be watched."""
KEY: Final = "configuration"


class Service(Protocol):
    """Runs beside the engine while a lease lasts, such as the rule files of a catalogue."""

    async def run(self) -> None:
        """Serve, until cancelled. Raises `LeaseLost`."""
        ...

    async def catch_up(self) -> None:
        """Do once what is due. For ``--once``."""
        ...

    def use(self, site: Site, sites: Sites) -> None:
        """Go by these sites from now on: sites.json was read again."""
        ...


@frozen
class Options:
    """The options of a listener. Times in seconds.

    With `once` the stream counts as read if nothing comes for `caught_up`. `reread` reads
    sites.json again; it raises `ConfigError`. `services` make what runs beside the engine, which
    knows nothing of it. `workers`: those of several listeners that follow each other.
    """

    site: Site
    sites: Sites
    settings: Settings
    registry: Registry
    handler_files: Sequence[str] = ()
    once: bool = False
    lease_time: float = LEASE
    grace: float = GRACE
    metrics: MetricsAddress | None = None
    metrics_push: PushAddress | None = None
    caught_up: float = CAUGHT_UP
    reread: Callable[[], Sites] | None = None
    services: Sequence[Callable[[Database, Lease, Site, Sites], Service]] = ()
    workers: Workers | None = None

    def recipients(self) -> list[Recipient]:
        """Return who is notified of alarms. Raises `ConfigError` if a secret is missing."""
        return recipients(self.site.name, self.site.alarms)


def adopted(options: Options, sites: Sites) -> tuple[Options, list[str]]:
    """Return the options with these sites, and the keys that count only after a restart. Pure.

    Raises `ConfigError` if the site is gone from them, or the types of data are others.
    """
    if sites.types != options.sites.types:
        raise ConfigError(f"{sites.path}: types has changed: restart the listener")
    before, after = options.site, sites.get(options.site.name)
    fixed = (*sites.types.directories, *FIXED)
    waiting = [key for key in fixed if getattr(after, key) != getattr(before, key)]
    new = _with(options, sites, evolve(after, **{key: getattr(before, key) for key in fixed}))
    if not new.registry.watched <= options.registry.watched:
        kept = {key: getattr(before, key) for key in WATCHING}
        waiting += [key for key in WATCHING if getattr(after, key) != kept[key]]
        new = _with(options, sites, evolve(new.site, **kept))
    known = {held.root for held in holdings(before, options.sites)}
    more = [held for held in holdings(new.site, new.sites) if held.root not in known]
    waiting += [f"{held.key} of {held.owner.name}" for held in more]
    return new, [*waiting, *_elsewhere(options.sites, sites)]


def _with(options: Options, sites: Sites, site: Site) -> Options:
    # A directory that is watched stays so, even if its site has left the file.
    owners = {held.owner.name: held.owner for held in holdings(options.site, options.sites)}
    mixed = evolve(sites, by_name={**owners, **sites.by_name, site.name: site})
    registry = Registry(options.registry.handlers.values(), mixed.here(site.name))
    return evolve(options, site=mixed.get(site.name), sites=mixed, registry=registry)


def _elsewhere(before: Sites, after: Sites) -> Iterator[str]:
    """Return the keys of other sites that count only after a restart."""
    unloaded = {*BY_METHOD.values()} - {one.method for one in before.values()}
    for one in after.values():
        if one.method in unloaded:
            yield f"method of {one.name}"
        known = before.find(one.name)
        if one.rucio.messages != (known.rucio.messages if known else None):
            yield f"rucio.messages of {one.name}"


@define(eq=False)
class Reloader:
    """Reads the options again, on SIGHUP. `users` get the new ones.

    `records`: whether the site's history shows that, as only its listener does.
    """

    options: Options
    database: Database
    records: bool = True
    users: list[Callable[[Options], None]] = field(factory=list)
    alarms: Alarms = field(factory=Alarms)
    wrong: Alarm | None = field(init=False, default=None)
    """The mistake that the last reload found. A process that starts has read a correct file."""
    changed: trio.Event = field(init=False, factory=trio.Event)
    """Set, and replaced, when the options or the place of alarms have changed."""

    def report_to(self, alarms: Alarms) -> None:
        """Raise alarms there from now on, also about the mistake of a reload before."""
        self.alarms = alarms
        self._report()
        self._announce()

    def _announce(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    def _report(self) -> None:
        if self.wrong is None:
            self.alarms.clear(KEY)
        else:
            self.alarms.raise_(self.wrong)

    async def reload(self) -> None:
        """Read credentials and sites.json again."""
        # First and apart: a new password must not wait until a mistake in the file is corrected.
        try:
            await self.database.renew_credentials()
        except DatabaseError as error:
            logger.error("keeping the previous database credentials: {}", error)
        if self.options.reread is None:
            return
        try:
            sites = self.options.reread()
            new, waiting = adopted(self.options, sites)
        except ConfigError as error:
            logger.error("keeping the previous configuration: {}", error)
            self.wrong = self._alarm(error)
            self._report()
            return
        # Only now: until the file is right the former options stay in force.
        self.wrong = None
        self._report()
        found = differing(self.options.sites.keys, sites.keys)
        logger.info("reloaded {}; changed: {}", sites.path, ", ".join(found) or "nothing")
        for key in waiting:
            logger.warning("{}: the change takes effect after a restart", key)
        self.options = new
        self._announce()
        for use in self.users:
            use(new)
        if found and self.users and self.records:
            await self._note(found)

    async def _note(self, changed: Sequence[str]) -> None:
        """Add to the history which keys of the configuration have changed."""
        deed = Deed(what=What.CONFIGURED, reason=", ".join(changed))
        row = HistoryRow(at=utcnow(), site=self.options.site.name, deed=deed)
        try:
            await self.database.note(row)
        except DatabaseError as error:
            logger.error("cannot add the changed configuration to the history: {}", error)

    def _alarm(self, error: ConfigError) -> Alarm:
        site = self.options.site.name
        summary = f"{site}: the new configuration is wrong; the previous one stays in force"
        what = "correct it, then reload (SIGHUP, or systemctl reload)"
        return Alarm(site, KEY, summary, details={"why": str(error), "what to do": what})
