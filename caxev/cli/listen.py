"""Run ``caxev listen``, the process that acts for a site, and its dry run."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import click
from loguru import logger

from caxev.asking.base import counted
from caxev.cli.command import command, needs
from caxev.cli.options import GlobalOptions, options
from caxev.cli.output import columns, event_parts, stream
from caxev.cli.processes import process_options, runs_for_years
from caxev.cli.runs import shown_all
from caxev.cli.values import SITE
from caxev.config import ConfigError
from caxev.config.handlers import doubtful_triggers
from caxev.core.clock import utcnow
from caxev.core.ledger import Reaction, State
from caxev.core.recording import Maker, compare
from caxev.core.registry import Registry

if TYPE_CHECKING:
    from caxev.database import Database, Snapshots
    from caxev.engine.options import Options


@command(
    "caxev listen --site lngs",
    "caxev listen --site lngs --once",
    "caxev listen --site lngs --dry-run --json",
    log=None,
)
@needs("--json --wide", "--dry-run")
@click.option("--site", type=SITE, required=True, help="The site to act for.")
@click.option("--once", is_flag=True, help="Catch up, run what is due, and exit.")
@click.option("--dry-run", is_flag=True, help="Show what would be done now; write nothing.")
@runs_for_years(
    lease=15.0, least=0.5, what="How soon a stand-by takes over from a listener that vanished."
)
def listen(*, site: str, once: bool, dry_run: bool, running: dict[str, Any]) -> None:
    """Act for a site: follow the runs database and react to its changes.

    Runs until SIGTERM. A second listener for the same site stands by, and takes over when the
    first one has gone. The first SIGTERM lets running reactions end (--grace); a second one
    ends them at once. --dry-run shows what it would do now.
    """
    given = options()
    given.log("warning" if dry_run else "info", lasting=not dry_run)
    registry = given.registry(site)
    from caxev.database import run
    from caxev.engine import listener

    listening = _listening(given, site, registry, running, once=once)
    if dry_run:
        stream(_COLUMNS, f"nothing is due at {site}", _would, site, registry)
        return
    run(listener.listen, listening)


def _listening(
    given: GlobalOptions, site: str, registry: Registry, running: dict[str, Any], *, once: bool
) -> Options:
    """Return the listener's options, checked. Raises `ConfigError` if it could not run."""
    from caxev.batch.following import JobEnds
    from caxev.rucio.messages import Messages
    from caxev.rucio.rule_files import RuleFiles

    sites = given.sites()
    here = sites.get(site)
    if not here.listener:
        raise ConfigError(
            f"site {site!r} has no listener, according to {sites.path}: run one at a site that "
            'uploads there or fetches from it; or, if this is a site of its own, set "listener": '
            "true"
        )
    handlers = registry.handlers.values()
    for line in (*here.unknown_tasks(handlers), *doubtful_triggers(handlers, sites)):
        logger.warning("{}", line)
    # The engine knows neither Rucio nor batch systems: what runs beside it is handed to it.
    services = (RuleFiles, Messages, JobEnds)
    found = process_options(given, site, registry, running, services=services, once=once)
    # Built now for its errors: a wrong alarm sink must not be found at the first alarm.
    found.recipients()
    return found


_COLUMNS = columns("run", "event", "handler", "why")


async def _would(
    database: Database, site: str, registry: Registry
) -> AsyncGenerator[dict[str, Any], None]:
    """Return what a listener would do now: reactions that are due, requested or new."""
    # As the listener does: the ledger, the requests, then a scan of all runs.
    now = utcnow()
    async with aclosing(database.reaction_pages(site, State.PENDING)) as found:
        async for page in found:
            due = [one for one, _ in page if one.due <= now]
            whys = [f"due{f': {one.note}' if one.note else ''}" for one in due]
            for row in await _rows(database, zip(due, whys, strict=True)):
                yield row
    for request in (await database.waiting(site))[1]:
        what = "all runs" if request.number is None else counted(request.number)
        why = f"requested: {request.kind} of {what}"
        yield {"run": None, "event": None, "handler": request.handler, "why": why}
    before, more = None, True
    while more:
        ids, before = await database.page(site, before)
        looked = await database.snapshot(site, ids, watched=registry.watched)
        for row in await _rows(database, _new(registry, looked)):
            yield row
        more = before is not None


async def _rows(database: Database, found: Iterable[tuple[Reaction, str]]) -> list[dict[str, Any]]:
    reactions = list(found)
    runs = await shown_all(database, (one.run for one, _ in reactions))
    return [
        {
            "run": runs[one.run],
            "event": event_parts(one.event),
            "handler": one.handler,
            "due": one.due,
            "why": why,
        }
        for one, why in reactions
    ]


def _new(registry: Registry, found: Snapshots) -> Iterator[tuple[Reaction, str]]:
    """Return the reactions to the changes between the stored snapshots and the runs of now."""
    maker, now = Maker(registry, options().sites()), utcnow()
    times = dict.fromkeys([*found.now, *found.before], now)
    for reaction in compare(maker, times, found.before, found.now, found.whole).standing(()):
        before = reaction.event.before
        yield reaction, "new" if before is None else f"was {before.partition('@')[0]}"
