"""Run ``caxev history``: list what happened to runs and at sites."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click
from attrs import evolve

from caxev.asking.listeners import handler_called
from caxev.cli.command import command, limits, together
from caxev.cli.history_rows import COLUMNS, history_row
from caxev.cli.options import options
from caxev.cli.output import show_rows
from caxev.cli.selection import RunChoice, selects_runs
from caxev.cli.values import HANDLER, MOMENT, SITE, WHAT

if TYPE_CHECKING:
    from caxev.database import Database, HistorySearch

MOST_RUNS: Final = 1000


def _search(*, site: str | None, handler: str | None, **given: Any) -> HistorySearch:
    from caxev.database import HistorySearch

    if handler is not None:
        sites = options().sites() if site is None else (site,)
        handler = handler_called(handler, map(options().registry, sites))
    return HistorySearch(site=site, handler=handler, **given)


@command(
    "caxev history --run 123",
    "caxev history --site lngs --since 2d --what deleted --what repaired",
    "caxev history --since 2016-11-11 --until 2016-11-12 --json",
)
@selects_runs(required=False, copies=(), started=False)
@click.option("--site", type=SITE, help="Only what this site did.")
@click.option("--handler", type=HANDLER, help="Only what this handler did.")
@click.option("--what", type=WHAT, multiple=True, help="Only this; may be repeated.")
@click.option(
    "--since", type=MOMENT, metavar="T", help="From then on: 2016-11-11T14:34, or 7d (ago)."
)
@click.option("--until", type=MOMENT, metavar="T", help="Until then.")
@together("search", _search, of="site handler what since until")
@limits(100, "The most to list; 0: all.", least=0)
def history(*, runs: RunChoice, search: HistorySearch, limit: int) -> None:
    """List what happened to runs and at sites, the newest first.

    Each row shows the time, the site, what was done and by which handler; between which sites, how
    many bytes, how fast; and who asked for it. Reactions that did nothing are not listed.
    """

    async def find(database: Database) -> None:
        found = None
        if runs.selects:
            found = [run.id for run in await runs.find(database, limit=MOST_RUNS + 1)]
            if len(found) > MOST_RUNS:
                raise click.UsageError(f"more than {MOST_RUNS} runs: select fewer")
        pages = database.history_pages(evolve(search, runs=found), limit)
        rows = (history_row(row) async for page in pages for row in page)
        await show_rows(COLUMNS, rows, empty="nothing happened")

    options().with_database(find)
