"""Run ``caxev listen``, the process that acts for a site, and its dry run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import click
from loguru import logger

from caxev.cli.command import command
from caxev.cli.options import GlobalOptions, options
from caxev.cli.output import Table, columns, event_parts, show
from caxev.cli.processes import process_options, runs_for_years
from caxev.cli.runs import shown_all
from caxev.cli.values import SITE
from caxev.config import ConfigError
from caxev.core.clock import utcnow
from caxev.core.ledger import Reaction
from caxev.core.recording import Maker, compare
from caxev.core.registry import Registry

if TYPE_CHECKING:
    from datetime import datetime

    from caxev.database import Database, Snapshots, WaitingRequest
    from caxev.engine.options import Options


@command(
    "caxev listen --site lngs",
    "caxev listen --site lngs --once",
    "caxev listen --site lngs --dry-run --json",
    log=None,
)
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
    if given.as_json and not dry_run:
        raise click.UsageError("--json goes with --dry-run; for the log there is --log-json")
    from caxev.database import run
    from caxev.engine import listener

    listening = _listening(given, site, registry, running, once=once)
    if dry_run:
        rows = given.with_database(_would, site, registry)
        show(Table(_COLUMNS, rows), empty=f"nothing is due at {site}")
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
    for line in here.unknown_tasks(registry.handlers.values()):
        logger.warning(line)
    # The engine knows neither Rucio nor batch systems: what runs beside it is handed to it.
    services = (RuleFiles, Messages, JobEnds)
    found = process_options(given, site, registry, running, services=services, once=once)
    # Built now for its errors: a wrong alarm sink must not be found at the first alarm.
    found.recipients()
    return found


_COLUMNS = columns("run", "event", "handler", "why")
_PAGE = 1000


async def _would(database: Database, site: str, registry: Registry) -> list[dict[str, Any]]:
    """Return what a listener would do now: reactions that are due, requested or new."""
    # In the listener's own order: the ledger, the requests, then a scan of all runs.
    rows = [row async for row in _due(database, site)]
    rows += [
        {"event": None, "handler": request.handler, "why": _requested(request)}
        for request in (await database.waiting(site))[1]
    ]
    before, more = None, True
    while more:
        ids, before = await database.page(site, before)
        looked = await database.snapshot(site, ids, watched=registry.watched)
        rows += new_reactions(registry, looked)
        more = before is not None
    return await _labelled(database, rows)


def new_reactions(registry: Registry, found: Snapshots) -> Iterator[dict[str, Any]]:
    """Return the reactions to the changes between the stored snapshots and the runs of now."""
    maker, now = Maker(registry, options().sites()), utcnow()
    times = dict.fromkeys([*found.now, *found.before], now)
    for reaction in compare(maker, times, found.before, found.now, found.whole).standing(()):
        event = reaction.event
        why = "new" if event.before is None else f"was {event.before.partition('@')[0]}"
        yield {
            "id": reaction.run,
            "event": event_parts(event),
            "handler": reaction.handler,
            "why": why,
        }


def _requested(request: WaitingRequest) -> str:
    what = "all runs" if request.runs is None else _runs(request.runs)
    return f"requested: {request.kind} of {what}"


def _runs(number: int) -> str:
    return "1 run" if number == 1 else f"{number} runs"


async def _due(database: Database, site: str) -> AsyncIterator[dict[str, Any]]:
    now = utcnow()
    for lane in await database.lanes(site):
        async for reaction in _due_in(database, site, lane, now):
            yield {
                "id": reaction.run,
                "event": event_parts(reaction.event),
                "handler": reaction.handler,
                "due": reaction.due,
                "why": f"due{f': {reaction.note}' if reaction.note else ''}",
            }


async def _due_in(
    database: Database, site: str, lane: str, now: datetime
) -> AsyncIterator[Reaction]:
    """Read what is due in a lane page by page; each page begins at the last one's final time."""
    since: datetime | None = None
    seen: set[str] = set()  # reactions due at that very time, which the next page has again
    more = True
    # Pages go by time and not by offset, as the listener takes reactions away meanwhile. Many may
    # be due at one time: ask for as many more as the page before has shown of that time.
    while more:
        limit = _PAGE + len(seen)
        page = await database.due(site, lane, now, limit, since=since)
        for reaction in page:
            if reaction.id not in seen:
                yield reaction
        more = len(page) == limit
        if more:
            seen = seen if page[-1].due == since else set()
            since = page[-1].due
            seen |= {reaction.id for reaction in page if reaction.due == since}


async def _labelled(database: Database, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Replace the runs' ids by their numbers or names."""
    named = await shown_all(database, (row["id"] for row in rows if "id" in row))
    return [{"run": named.get(row.pop("id", None)), **row} for row in rows]
