"""Run ``caxev status``: show the state of the sites, of a run, or of copies."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click
from attrs import frozen

from caxev.cli.completion import DATA_TYPE, SITE, STATUS
from caxev.cli.errors import NothingToDo
from caxev.cli.options import as_table, example, global_options, state
from caxev.cli.output import (
    Column,
    Table,
    print_line,
    show,
    show_json,
    show_rows,
    size,
    time,
)
from caxev.cli.reaction_rows import COLUMNS, RUN_COLUMN, Progress, progress_cells, reaction_row
from caxev.cli.selection import one_run

if TYPE_CHECKING:
    from caxev.cli.runs import Wanted
    from caxev.config import Sites
    from caxev.core.alarms import AlarmState
    from caxev.core.model import Copy, Run
    from caxev.database import Database, Selection, SiteRecord


@click.command(
    epilog=example(
        "caxev status",
        "caxev status --run 123",
        "caxev status --site lngs --json",
        "caxev status --host chicago --status error",
        "caxev status --totals",
        "caxev status --totals --host chicago --type raw",
    )
)
@one_run
@click.option("--site", type=SITE, help="Only this site.")
@click.option("--host", type=SITE, help="Copies at this host.")
@click.option("--status", "wanted", type=STATUS, help="Copies with this status.")
@click.option("--type", "kind", type=DATA_TYPE, help="Copies of this type of data.")
@click.option("--totals", is_flag=True, help="Show numbers and sizes instead of copies.")
@as_table
@global_options(hidden=True)
def status(
    *,
    number: int | None,
    name: str | None,
    detector: str | None,
    site: str | None,
    host: str | None,
    wanted: str | None,
    kind: str | None,
    totals: bool,
    as_json: bool,
) -> None:
    """Show the sites, one run, or which copies there are.

    Without options, a row for each site: whether a listener is active, how many reactions are
    pending, running and failed, and what is wrong. With --run or --name, the copies of a run
    and its reactions. With --host, --status or --type, the copies of all runs that fit; with
    --totals, their number and size for each host, type and status.
    """
    if detector is not None and number is None and name is None:
        raise click.UsageError("--detector says which of several runs: give --run or --name, too")
    options = state()
    options.log("warning")
    if totals or (host, wanted, kind) != (None, None, None):
        if number is not None or name is not None or site is not None:
            raise click.UsageError(
                "--host, --status, --type and --totals are of all runs: leave out --run, --name "
                "and --site"
            )
        _show_copies(Sought(host, wanted, kind), totals=totals, as_json=as_json)
        return
    from caxev.cli.runs import one

    names = _names(site)
    if number is None and name is None:
        rows = options.with_database(lambda database: site_rows(database, names, only=site))
        show(Table(_SITES, rows), as_json=as_json, empty="no site is known")
        return
    meant = one(number, name, detector)
    runs = options.with_database(lambda database: _runs(database, meant, names, site))
    if as_json:
        show_json(runs)
        return
    for row in runs:
        _show_run(row)


def _names(site: str | None) -> dict[str, bool]:
    """Return the sites of sites.json, and whether each has a listener. Raises `ConfigError`."""
    sites = state().sites()
    chosen = sites.values() if site is None else (sites.get(site),)
    return {one.name: one.listener for one in chosen}


_SITES = (
    Column("site", "SITE"),
    Column("listening", "LISTENING"),
    Column("owner", "OWNER", minor=2),
    Column("epoch", "EPOCH", minor=3),
    Column("streamed", "STREAMED", minor=1),
    Column("pending", "PENDING"),
    Column("running", "RUNNING", minor=1),
    Column("failed", "FAILED"),
    Column("progress", "PROGRESS", minor=1),
    Column("requests", "REQUESTS", minor=2),
    Column("alarms", "ALARMS"),
    Column("clock", "CLOCK", minor=3),
    Column("gap", "LAST GAP", minor=3),
    Column("trouble", "TROUBLE"),
    Column("away", "DISKS AWAY"),
)


async def site_rows(
    database: Database, names: Mapping[str, bool], *, only: str | None = None
) -> list[dict[str, Any]]:
    """Return a row for each site of sites.json, and for each that ever listened."""
    records = {record.site: record for record in await database.site_records()}
    tally = await database.tally(only)
    # A site that was taken out of sites.json may still owe reactions: list it.
    listed = names if only is not None else dict.fromkeys([*names, *records])
    moving = await _moving(database, listed)
    alarms = await database.alarms(only)
    return [
        {
            **_site_row(one, records.get(one), names.get(one, True)),
            **{
                key: tally.get(one, {}).get(key, 0)
                for key in ("pending", "running", "failed", "done")
            },
            **_moving_cells(moving.get(one, ())),
            "requests": len(await database.pending(one)),
            **_alarm_cells([alarm for alarm in alarms if alarm.alarm.site == one]),
        }
        for one in listed
    ]


async def _moving(database: Database, sites: Iterable[str]) -> dict[str, list[Progress]]:
    """Return, for each site, the progress of its running reactions, if they report it."""
    found: dict[str, list[Progress]] = {}
    for reaction, document in await database.moving(sites):
        if (progress := Progress.of(document.get("progress"))) is not None:
            found.setdefault(reaction.site, []).append(progress)
    return found


def _moving_cells(moving: Sequence[Progress]) -> dict[str, Any]:
    cells = progress_cells(Progress.sum(moving) if moving else None)
    if len(moving) > 1:
        cells["progress"] = f"{len(moving)} at work: {cells['progress']}"
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
    return {
        "site": name,
        "listening": record.active,
        # A record outlives its listener: what it reported about itself is shown only while it runs.
        "owner": record.owner if record.active else None,
        "epoch": record.epoch,
        "configuration": record.configuration or None,
        "streamed": record.streamed,
        "scanned": record.scanned,
        **_clock_cells(record.skew if record.active else None),
        "trouble": record.trouble if record.active else None,
        "away": list(record.away.values()) if record.active else [],
        "gap": None if gap is None else f"{time(gap.found)} {gap.why}",
        "gaps": [{"found": one.found, "why": one.why} for one in record.gaps],
    }


def _clock_cells(skew: float | None) -> dict[str, Any]:
    """Return how far a listener's clock is ahead of the database's."""
    return {"clock": None if skew is None else f"{skew:+.1f} s", "skew": skew}


# -- the copies of all runs ---------------------------------------------------------------------


@frozen
class Sought:
    """A search for copies at one host, with one status, of one type; None: any."""

    host: str | None
    status: str | None
    type: str | None

    def means(self, copy: Copy) -> bool:
        """Return whether that copy matches."""
        wanted = ((self.host, copy.host), (self.status, copy.status), (self.type, copy.type))
        return all(one is None or one == other for one, other in wanted)

    def check(self, sites: Sites) -> None:
        """Raise an error that names the nearest host or status, if this one is unknown."""
        from caxev.config.errors import nearest

        if self.host is not None:
            sites.get(self.host)
        if self.status is not None:
            known = [*STATUS.values(state())]
            guess = None if self.status in known else nearest(self.status, known)
            if guess is not None:
                raise NothingToDo(
                    f"no copy has the status {self.status!r}: did you mean {guess!r}?"
                )

    async def copies(self, database: Database) -> AsyncIterator[dict[str, Any]]:
        """Return a row for each copy, in the order in which the runs were stored.

        Raises an error, as `check`, if there is none.
        """
        from caxev.cli.runs import shown
        from caxev.core.clock import utcnow

        found = False
        async for page in database.pages(self._selection(), utcnow()):
            for run in page:
                for copy in filter(self.means, run.copies):
                    found = True
                    yield {"run": shown(run), **_copy_row(run, copy)}
        # Only if nothing was found: the database may have hosts that sites.json no longer names.
        if not found:
            self.check(state().sites())

    async def totals(self, database: Database) -> list[dict[str, Any]]:
        """Return a row for each host, type and status."""
        from caxev.core.clock import utcnow

        return await database.totals(self._selection(), utcnow())

    def _selection(self) -> Selection:
        from caxev.database import Selection

        return Selection(host=self.host, status=self.status, type=self.type)


def _show_copies(sought: Sought, *, totals: bool, as_json: bool) -> None:
    none = "there are no such copies"
    if totals:
        rows = state().with_database(sought.totals)
        if not rows:
            sought.check(state().sites())
        show(Table(_TOTALS, rows), as_json=as_json, empty=none)
        return
    columns = (RUN_COLUMN, Column("run.name", "NAME", minor=1), *_PLACES)

    async def print_copies(database: Database) -> None:
        await show_rows(columns, sought.copies(database), as_json=as_json, empty=none)

    state().with_database(print_copies)


_TOTALS = (
    Column("host", "HOST"),
    Column("type", "TYPE"),
    Column("status", "STATUS"),
    Column("copies", "COPIES"),
    Column("bytes", "SIZE", size),
    Column("sized", "OF COPIES"),
)
_PLACES = (
    Column("type", "TYPE"),
    Column("version", "VERSION"),
    Column("host", "HOST"),
    Column("status", "STATUS"),
    Column("since", "SINCE", minor=1),
    Column("bytes", "SIZE", size),
    Column("location", "LOCATION"),
)


# -- a run --------------------------------------------------------------------------------------


async def _runs(
    database: Database, meant: Wanted, names: Iterable[str], site: str | None
) -> list[dict[str, Any]]:
    found = await meant.find(database, database.settings)
    whole = await database.runs([run.id for run in found])
    records = () if site is not None else await database.site_records()
    sites = dict.fromkeys([*names, *(record.site for record in records)])
    return [
        {**_run_row(run), "reactions": await _reactions(database, run, sites)}
        for run in whole.values()
    ]


def _run_row(run: Run) -> dict[str, Any]:
    from caxev.cli.runs import shown

    return {
        "run": shown(run),
        "detector": run.detector,
        "start": run.start,
        "tags": list(run.tags),
        "copies": [_copy_row(run, copy) for copy in run.copies],
    }


def _copy_row(run: Run, copy: Copy) -> dict[str, Any]:
    # If the entry has no size: the run's own is that of its complete raw data.
    size = copy.size
    if size is None and copy.type == "raw" and copy.status == "transferred":
        size = run.raw_size
    return {
        "type": copy.type,
        "version": copy.version,
        "host": copy.host,
        "status": copy.status,
        "since": copy.since or copy.creation_time,
        "bytes": size,
        "checksum": copy.checksum,
        "manifest": copy.manifest,
        "location": copy.location,
    }


async def _reactions(database: Database, run: Run, sites: Iterable[str]) -> list[dict[str, Any]]:
    return [
        reaction_row(reaction, document)
        for site in sites
        for reaction, document in await database.reactions(site, run=run.id)
        if reaction.state != "done"
    ]


def _show_run(row: Mapping[str, Any]) -> None:
    run = row["run"]
    name = run.parts["name"] if run.parts["number"] else None
    what = f"run {run} {name or ''}".rstrip()
    tags = f"  tags: {', '.join(row['tags'])}" if row["tags"] else ""
    print_line(f"{what}  {row['detector']}  {time(row['start']) or ''}{tags}".rstrip())
    copies = [{**copy, "checksum": _short(copy), "type": _kind(copy)} for copy in row["copies"]]
    show(Table(_COPIES, copies), as_json=False, empty="no copies")
    click.echo()
    show(Table(COLUMNS, row["reactions"]), as_json=False, empty="all reactions are done")


def _kind(copy: Mapping[str, Any]) -> str:
    return f"{copy['type']} {copy['version'] or ''}".rstrip()


def _short(copy: Mapping[str, Any]) -> str | None:
    digest = copy["checksum"] or copy["manifest"]
    return None if digest is None else digest[:12]


_COPIES = (
    Column("type", "TYPE"),
    Column("host", "HOST"),
    Column("status", "STATUS"),
    Column("since", "SINCE", minor=1),
    Column("bytes", "SIZE", size),
    Column("checksum", "CHECKSUM", minor=2),
    Column("location", "LOCATION"),
)
