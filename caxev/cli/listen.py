"""Run ``caxev listen``, the process that acts for a site, and its dry run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from loguru import logger

from caxev.cli.admin import catalogue_problems, private_problems
from caxev.cli.command import command, together
from caxev.cli.options import GlobalOptions, options
from caxev.cli.output import Table, columns, event_parts, show
from caxev.cli.runs import shown_all
from caxev.cli.values import SITE
from caxev.config import ConfigError, Sites, find_sites, load_sites, private_directories
from caxev.core.clock import utcnow
from caxev.core.ledger import Reaction
from caxev.core.recording import Maker, compare
from caxev.core.registry import Registry
from caxev.files import is_bare, not_private
from caxev.finite import Finite

if TYPE_CHECKING:
    from datetime import datetime

    from caxev.database import Database, Snapshots, WaitingRequest
    from caxev.engine.metrics_push import PushAddress
    from caxev.engine.options import Options
    from caxev.metrics_server import MetricsAddress


@command(
    "caxev listen --site lngs",
    "caxev listen --site lngs --once",
    "caxev listen --site lngs --dry-run --json",
    log=None,
)
@click.option("--site", type=SITE, required=True, help="The site to act for.")
@click.option("--once", is_flag=True, help="Catch up, run what is due, and exit.")
@click.option("--dry-run", is_flag=True, help="Show what would be done now; write nothing.")
@together(
    "running",
    dict,
    click.option(
        "--lease",
        "lease_time",
        type=Finite(0.5, 3600),
        default=15.0,
        show_default=True,
        metavar="SECONDS",
        help="How soon a stand-by takes over from a listener that vanished.",
    ),
    click.option(
        "--grace",
        type=Finite(0, 86400),
        default=10.0,
        show_default=True,
        metavar="SECONDS",
        help="How long running reactions may continue after SIGTERM.",
    ),
    click.option(
        "--metrics-port",
        type=click.IntRange(1, 65535),
        metavar="N",
        help="Serve metrics for Prometheus on this port, of loopback.",
    ),
    click.option(
        "--metrics-address",
        metavar="HOST",
        help="Serve metrics at this address; other than loopback it needs TLS and a login.",
    ),
    click.option(
        "--metrics-certificate",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Serve metrics by TLS, with this certificate (PEM).",
    ),
    click.option(
        "--metrics-key",
        type=click.Path(dir_okay=False, path_type=Path),
        help="The key of that certificate, if it is in a file of its own.",
    ),
    click.option(
        "--metrics-push",
        metavar="URL",
        help="Push metrics to this collector by OTLP: https://otel.example.org/v1/metrics",
    ),
    click.option(
        "--metrics-push-every",
        type=Finite(1, 86400),
        default=60.0,
        show_default=True,
        metavar="SECONDS",
        help="How often metrics are pushed.",
    ),
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

    listening = _listening(given, site, registry, once=once, **running)
    if dry_run:
        rows = given.with_database(_would, site, registry)
        show(Table(_COLUMNS, rows), empty=f"nothing is due at {site}")
        return
    run(listener.listen, listening)


def metrics_address(running: dict[str, Any]) -> MetricsAddress | None:
    """Take the options about metrics out of these; return where to serve them, if anywhere.

    Raises `ConfigError` if they may not be served there.
    """
    from caxev.metrics_server import LOOPBACK, Login, MetricsAddress

    names = ("port", "address", "certificate", "key")
    port, host, certificate, key = (running.pop(f"metrics_{name}") for name in names)
    if port is None:
        if (host, certificate, key) != (None, None, None):
            raise click.UsageError("the other options about metrics need --metrics-port")
        return None
    if key is not None and certificate is None:
        raise click.UsageError("--metrics-key needs --metrics-certificate")
    found = MetricsAddress(port, host or LOOPBACK, certificate, key)
    found.check(Login.load())
    return found


def push_address(running: dict[str, Any]) -> PushAddress | None:
    """Take the options about pushing out of these; return where to push, if anywhere.

    Raises `ConfigError` if metrics cannot be pushed there.
    """
    from caxev.engine.metrics_push import PushAddress

    url, every = running.pop("metrics_push"), running.pop("metrics_push_every")
    if url is None:
        return None
    found = PushAddress(url, every)
    found.check()
    return found


def _listening(given: GlobalOptions, site: str, registry: Registry, **running: Any) -> Options:
    """Return the listener's options, checked. Raises `ConfigError` if it could not run."""
    from caxev.batch.following import JobEnds
    from caxev.engine.options import Options
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
    found = Options(
        site=here,
        sites=sites,
        settings=given.settings(),
        registry=registry,
        handler_files=given.handlers,
        # The engine knows neither Rucio nor batch systems: what runs beside it is handed to it.
        services=(RuleFiles, Messages, JobEnds),
        reread=partial(_reread, given, site),
        metrics=metrics_address(running),
        metrics_push=push_address(running),
        **running,
    )
    check_private(site, sites)
    # Built now for its errors: a wrong alarm sink must not be found at the first alarm.
    found.recipients()
    return found


def check_private(site: str, sites: Sites) -> None:
    """Raise `ConfigError` if no listener can run for the site.

    A disk that is not mounted is no reason: reactions that need it wait.
    """
    here = sites.get(site)
    problems = [*private_problems(here, sites, bare=False), *catalogue_problems(here, sites)]
    if problems:
        raise ConfigError("; ".join(problems))
    # At boot a listener may start before its disks are mounted. It must not fail for that.
    for key, path in private_directories(here, sites):
        if is_bare(path):
            logger.warning("{}: {}; reactions that need it wait", key, not_private(path))


def _reread(given: GlobalOptions, site: str) -> Sites:
    """Read sites.json again, and check it as at the start."""
    # Not `given.sites()`, which reads the file once. An error leaves the listener with what it
    # has: see the caller.
    sites = load_sites(find_sites(given.config))
    check_private(site, sites)
    return sites


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
