"""Run ``caxev status``: show the state of the sites, of a run, or of copies."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import click

from caxev.cli.command import command, excludes
from caxev.cli.options import options
from caxev.cli.output import SIZE, Column, columns, print_line, show, show_rows, stream, time
from caxev.cli.reaction_rows import COLUMNS, known_sites, progress_cells, reaction_row
from caxev.cli.runs import shown
from caxev.cli.selection import RunChoice, selects_runs
from caxev.cli.values import SITE
from caxev.core.alarms import AlarmState
from caxev.core.amounts import ReportedProgress
from caxev.core.clock import utcnow
from caxev.core.model import TRANSFERRED, Copy, Run
from caxev.core.processes import Process

if TYPE_CHECKING:
    from datetime import datetime

    from caxev.database import Database, Helper, SiteRecord


@command(
    "caxev status",
    "caxev status --run 123",
    "caxev status --site lngs --json",
    "caxev status --host chicago --status error",
    "caxev status --tag _sciencerun0 --type raw --unverified-for 90d",
    "caxev status --totals",
    "caxev status --totals --host chicago --type raw",
)
@excludes("--site", "--host --status --type --version --unverified-for --totals")
@selects_runs(required=False)
@click.option("--site", type=SITE, help="Only this site.")
@click.option("--totals", is_flag=True, help="Show numbers and sizes instead of copies.")
def status(*, runs: RunChoice, site: str | None, totals: bool) -> None:
    """Show the sites, runs, or which copies there are.

    Without options, a row for each site: whether a listener is active, how many reactions are
    pending, running and failed, and what is wrong. With options that select runs, such as --run,
    their copies and reactions. With --host, --status, --type or --version, a row for each copy
    that matches; with --totals, the number and size of copies for each host, type and status.
    """
    of_copies = totals or not runs.selection.wanted.is_empty
    if totals:
        rows = options().with_database(lambda one: one.totals(runs.selection, utcnow()))
        show(_TOTALS, rows, empty="there are no such copies")
    elif of_copies:
        stream(_PLACES, "there are no such copies", _copies, runs)
    elif runs.selects:
        options().with_database(_show_runs, runs, site)
    else:
        rows = options().with_database(site_rows, _names(site), only=site)
        show(_SITES, rows, empty="no site is known")


def _names(site: str | None) -> dict[str, bool]:
    """Return the sites of sites.json, and whether each has a listener. Raises `ConfigError`."""
    sites = options().sites()
    chosen = sites.values() if site is None else (sites.get(site),)
    return {one.name: one.listener for one in chosen}


_SITES = columns(
    "site",
    "listening",
    Column("owner", minor=2),
    Column("epoch", minor=3),
    Column("version", minor=3),
    Column("configuration", "SITES.JSON", minor=4),
    Column("handlers", minor=4),
    Column("standby", "STANDING BY", minor=3),
    Column("helpers", minor=3),
    Column("streamed", minor=1),
    "pending",
    Column("running", minor=1),
    "failed",
    Column("progress", minor=1),
    Column("requests", minor=2),
    "alarms",
    Column("clock", minor=3),
    Column("gap", "LAST GAP", minor=3),
    "trouble",
    Column("away", "DISKS AWAY"),
)


async def site_rows(
    database: Database, names: Mapping[str, bool], *, only: str | None = None
) -> list[dict[str, Any]]:
    """Return a row for each site of sites.json, and for each that ever listened."""
    records = {record.site: record for record in await database.site_records()}
    tally = await database.tally(only)
    # A site that was removed from sites.json may still have reactions: list it.
    listed = names if only is not None else dict.fromkeys([*names, *records])
    moving = await _moving(database, listed)
    alarms = await database.alarms(only)
    processes = await database.processes()
    helpers = [one for one in await database.helpers_at_work(only) if one.helps]
    now = utcnow()
    return [
        {
            **_site_row(one, records.get(one), names.get(one, True)),
            **_process_cells(records.get(one), [found for found in processes if found.site == one]),
            **_helper_cells([found for found in helpers if found.site == one], now),
            **{key: tally.get(one, {}).get(key, 0) for key in ("pending", "running", "failed")},
            **_moving_cells(moving.get(one, ())),
            "requests": (await database.waiting(one, 1))[0],
            **_alarm_cells([alarm for alarm in alarms if alarm.alarm.site == one]),
        }
        for one in listed
    ]


async def _moving(database: Database, sites: Iterable[str]) -> dict[str, list[ReportedProgress]]:
    """Return, for each site, the progress of its running reactions, if they report it."""
    found: dict[str, list[ReportedProgress]] = {}
    for reaction, document in await database.moving(sites):
        if (progress := ReportedProgress.of(document.get("progress"))) is not None:
            found.setdefault(reaction.site, []).append(progress)
    return found


def _moving_cells(moving: Sequence[ReportedProgress]) -> dict[str, Any]:
    cells = progress_cells(ReportedProgress.sum(moving) if moving else None)
    if len(moving) > 1:
        cells["progress"] = f"{len(moving)} running: {cells['progress']}"
    return {**cells, "moving": len(moving)}


def _alarm_cells(known: Sequence[AlarmState]) -> dict[str, Any]:
    """Return how many alarms are active, and how many of them could not be delivered."""
    active = sum(one.active for one in known)
    undelivered = sum(bool(one.undelivered) for one in known)
    cell = f"{active}, {undelivered} not delivered" if undelivered else active
    return {"alarms": cell, "alarms_active": active, "alarms_undelivered": undelivered}


def _site_row(name: str, record: SiteRecord | None, listener: bool) -> dict[str, Any]:
    # A record without an epoch comes from a request that waits for the site's first listener.
    if record is None or not record.epoch:
        return {"site": name, "listening": "never did" if listener else "has no listener"}
    gap = record.gaps[-1] if record.gaps else None
    skew = record.skew if record.active else None
    return {
        "site": name,
        "listening": record.active,
        # A record outlives its listener: what it reported about itself is shown only while it runs.
        "owner": record.owner if record.active else None,
        "epoch": record.epoch,
        "configuration": record.configuration or None,
        "streamed": record.streamed,
        "scanned": record.scanned,
        "clock": None if skew is None else f"{skew:+.1f} s",
        "skew": skew,
        "trouble": record.trouble if record.active else None,
        "away": list(record.away.values()) if record.active else [],
        "gap": None if gap is None else f"{time(gap.found)} {gap.why}",
        "gaps": [{"found": one.found, "why": one.why} for one in record.gaps],
    }


def _process_cells(record: SiteRecord | None, processes: Sequence[Process]) -> dict[str, Any]:
    """Return what a site's listener reports of itself, and how many other listeners stand by."""
    owner = record.owner if record is not None and record.active else None
    listening = next((one for one in processes if one.owner == owner), None)
    return {
        "version": listening and listening.version,
        "handlers": listening and listening.handlers,
        "standby": sum(one.owner != owner and not one.helps for one in processes),
    }


def _helper_cells(helpers: Sequence[Helper], now: datetime) -> dict[str, Any]:
    """Return each helper of a site as a line, and as a row for programs."""
    return {
        "helpers": [_helper(one, now) for one in helpers],
        "helping": [
            {
                "host": one.host,
                "process": one.owner,
                "lanes": list(one.lanes),
                "since": one.since,
                "seen": one.seen,
                "running": sum(one.running.values()),
                "away": list(one.away),
            }
            for one in helpers
        ],
    }


def _helper(helper: Helper, now: datetime) -> str:
    """Return a helper's host and lanes, what it does, and which of its disks are away."""
    line = f"{helper.host} ({', '.join(helper.lanes)}): {sum(helper.running.values())} running"
    if helper.since is not None:
        line += f", since {time(helper.since)}"
    if helper.seen is not None:
        line += f", seen {max((now - helper.seen).total_seconds(), 0.0):.0f} s ago"
    return "; ".join([line, *helper.away])


# -- the copies of all runs ---------------------------------------------------------------------


async def _copies(database: Database, choice: RunChoice) -> AsyncGenerator[dict[str, Any], None]:
    """Return a row for each copy, in the order in which the runs were stored."""
    now = utcnow()
    async with aclosing(choice.each(database)) as runs:
        async for run in runs:
            for copy in run.copies:
                if choice.selection.means_copy(copy, now):
                    yield {"run": shown(run), **_copy_row(run, copy)}


_TOTALS = columns("host", "type", "status", "copies", SIZE, Column("sized", "WITH SIZE"))
_COPY = ("type", "version", "host", "status", Column("since", minor=1), SIZE)
_PLACES = columns("run", Column("run.name", "NAME", minor=1), *_COPY, "location")


# -- a run --------------------------------------------------------------------------------------


async def _show_runs(database: Database, choice: RunChoice, site: str | None) -> None:
    async with aclosing(_runs(database, choice, site)) as rows:
        if options().as_json:
            await show_rows((), rows)
            return
        async for row in rows:
            _show_run(row)


async def _runs(
    database: Database, choice: RunChoice, site: str | None
) -> AsyncGenerator[dict[str, Any], None]:
    sites = await known_sites(database, site)
    async with aclosing(choice.whole(database)) as runs:
        async for run in runs:
            yield {**_run_row(run), "reactions": await _reactions(database, run, sites)}


def _run_row(run: Run) -> dict[str, Any]:
    return {
        "run": shown(run),
        "detector": run.detector,
        "start": run.start,
        "tags": list(run.tags),
        "copies": [_copy_row(run, copy) for copy in run.copies],
    }


def _copy_row(run: Run, copy: Copy) -> dict[str, Any]:
    # An entry without a size: that of the run is the size of its complete raw data.
    size = run.size_of(copy) if copy.status == TRANSFERRED else copy.size
    names = ("type", "version", "host", "status", "checksum", "manifest", "location")
    fields = {name: getattr(copy, name) for name in names}
    return {**fields, "since": copy.since or copy.creation_time, "bytes": size}


async def _reactions(database: Database, run: Run, sites: Iterable[str]) -> list[dict[str, Any]]:
    return [
        reaction_row(reaction, document)
        for site in sites
        for reaction, document in await database.reactions(site, run=run.id)
    ]


def _show_run(row: Mapping[str, Any]) -> None:
    run = row["run"]
    name = run.parts["name"] if run.parts["number"] else None
    what = f"run {run} {name or ''}".rstrip()
    tags = f"  tags: {', '.join(row['tags'])}" if row["tags"] else ""
    print_line(f"{what}  {row['detector']}  {time(row['start']) or ''}{tags}".rstrip())
    copies = [{**one, "checksum": one["checksum"] or one["manifest"]} for one in row["copies"]]
    show(_COPIES, copies, empty="no copies")
    click.echo()
    show(COLUMNS, row["reactions"], empty="all reactions are done")


_CHECKSUM = Column("checksum", show=lambda digest: digest[:12], minor=2)
_COPIES = columns(*_COPY, _CHECKSUM, "location")
