"""Run ``caxev reactions`` and ``caxev retry``: list reactions, and retry those that failed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import click
from attrs import evolve

from caxev.asking.listeners import COUNTED, RetryReactions, addressed, failures, handler_called
from caxev.cli.command import RUNS, command, excludes, limits
from caxev.cli.options import as_json, options
from caxev.cli.output import show_lines, show_rows
from caxev.cli.plans import ask_listeners, asks, confirm_plan, with_hint
from caxev.cli.reaction_rows import (
    COLUMNS,
    RUNNING,
    done_row,
    known_sites,
    reaction_row,
    running_cells,
    site_names,
)
from caxev.cli.runs import shown_all
from caxev.cli.selection import RunChoice, selects_runs
from caxev.cli.values import HANDLER, SITE
from caxev.core.alarms import UNRECORDED
from caxev.core.ledger import State
from caxev.core.model import RunId

if TYPE_CHECKING:
    from caxev.asking.asker import Asker
    from caxev.database import Database

_STATES = ("failed", "running", "pending")


@command("caxev reactions --failed", "caxev reactions --pending --site lngs --handler pull --json")
@click.option("--failed", "states", flag_value="failed", multiple=True, help="Failed reactions.")
@click.option("--running", "states", flag_value="running", multiple=True, help="Running reactions.")
@click.option("--pending", "states", flag_value="pending", multiple=True, help="Pending reactions.")
@click.option("--done", "states", flag_value="done", multiple=True, help="Finished reactions.")
@click.option("--site", type=SITE, help="Only at this site.")
@click.option("--handler", type=HANDLER, help="Only reactions of this handler.")
@limits(100, "The most to list for each site and state.")
def reactions(states: Sequence[str], site: str | None, handler: str | None, limit: int) -> None:
    """List the reactions that are pending, running or failed.

    A reaction is one handler's work on one change of a run. Without a state, all are listed
    that are not done. With --running alone: since when, between which sites, how many bytes and how
    fast. Those that are done, and did something, are in `caxev history`, too.
    """
    if handler is not None:
        handler = handler_called(handler, map(options().registry, site_names(site)))
    wanted = tuple(dict.fromkeys(states)) or _STATES

    async def find(database: Database) -> None:
        rows = _find(database, await known_sites(database, site), wanted, handler, limit)
        columns = RUNNING if wanted == (State.RUNNING,) else COLUMNS
        await show_rows(columns, rows, empty=f"no {' or '.join(wanted)} reactions")

    options().with_database(find)


async def _find(
    database: Database, sites: Iterable[str], states: Iterable[str], handler: str | None, limit: int
) -> AsyncIterator[dict[str, Any]]:
    for site, one in product(sites, states):
        if one == State.DONE:
            async for row in _done(database, site, handler, limit):
                yield row
            continue
        async for page in database.reaction_pages(site, one, handler, limit):
            named = await shown_all(database, (reaction.run for reaction, _ in page))
            ids = {reaction.run for reaction, _ in page} if one == State.RUNNING else ()
            runs = await database.runs(ids)
            for reaction, document in page:
                row = {"run": named[reaction.run], **reaction_row(reaction, document)}
                if one == State.RUNNING:
                    row |= running_cells(reaction, runs.get(reaction.run))
                yield row


async def _done(
    database: Database, site: str, handler: str | None, limit: int
) -> AsyncIterator[dict[str, Any]]:
    """Return the rows of reactions that have left the ledger, the newest first."""
    from caxev.database import HistorySearch

    search = HistorySearch(site=site, handler=handler, with_output=options().as_json)
    async for page in database.history_pages(search, limit):
        for row in page:
            if row.event is not None:
                yield done_row(row)


# -- retry --------------------------------------------------------------------------------------


@command(
    "caxev retry --run 123",
    "caxev retry --site lngs --handler pull",
    "caxev retry --all",
    output=as_json,
)
@excludes("--all", f"{RUNS} --handler")
@click.option("--site", type=SITE, help="Only at this site. [default: all with a listener]")
@selects_runs(required=False)
@click.option("--handler", type=HANDLER, help="Only reactions of this handler.")
@click.option("--all", "everything", is_flag=True, help="Retry all failed reactions.")
@asks
def retry(
    *, site: str | None, runs: RunChoice, handler: str | None, everything: bool, yes: bool
) -> None:
    """Try failed reactions again, as if they had never been tried.

    This leaves a request to the listeners of the sites. It waits until they run.
    """
    if not runs.selects and handler is None and not everything:
        raise click.UsageError(
            "select reactions: by runs (--run, --name ...), by --handler, or --all"
        )
    given = options()
    act = RetryReactions(*addressed(given.sites(), given.registry, site, handler))
    ids = tuple(given.with_database(runs.ids)) if runs.selects else None
    if ids is not None:
        confirm_plan(act.plan(ids), yes=yes)
    rows = given.with_asker(_retry, act, ids, is_request=not runs.names_one)
    show_lines(rows, _line, failed=not any(row["failed"] for row in rows))


async def _retry(
    asker: Asker, act: RetryReactions, ids: Sequence[RunId] | None, *, is_request: bool
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    database = asker.database
    for site in act.sites:
        failed = await failures(database, site, ids, act.handler)
        unrecorded = await _unrecorded(database, site)
        record = await database.site_record(site)
        state = {"queued": 0, "listening": bool(record and record.active)}
        rows.append({"site": site, **state, "failed": failed, "unrecorded": unrecorded})
    # Sites without failures get no request, but a row: the user sees that they were asked.
    asked = evolve(act, sites=tuple(str(row["site"]) for row in rows if row["failed"]))
    left = await ask_listeners(asker, asked, ids, is_request=is_request)
    found = {row["site"]: row for row in left}
    return [{**row, **found.get(row["site"], {})} for row in rows]


async def _unrecorded(database: Database, site: str) -> int:
    """Return how many failed reactions of the site the ledger refuses to record."""
    active = [one.alarm for one in await database.alarms(site) if one.active]
    return sum(alarm.details.get("what to do") == UNRECORDED for alarm in active)


def _line(row: Mapping[str, Any]) -> str:
    site, failed, more = row["site"], row["failed"], ""
    if row["unrecorded"]:
        more = f"; the ledger refuses to record {row['unrecorded']} failures: see caxev alarms"
    if not failed:
        return f"{site}: no matching reaction has failed{more}"
    number = f"{failed} or more" if failed >= COUNTED else f"{failed}"
    return with_hint(
        f"{site}: queued {number} failed reaction{'' if failed == 1 else 's'}{more}", row
    )
