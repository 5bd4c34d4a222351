"""Run ``caxev runs``: find runs, and list them or where their files are."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

import click

from caxev.cli.command import command, excludes, needs
from caxev.cli.options import options
from caxev.cli.output import SIZE, Column, columns, print_line, show_rows
from caxev.cli.runs import shown
from caxev.cli.selection import RunChoice, selects_runs
from caxev.cli.values import HOST
from caxev.core.clock import utcnow
from caxev.core.errors import NoSuchRun
from caxev.core.model import TRANSFERRED, Run
from caxev.core.selection import CopyPattern, source_of
from caxev.core.sheet import HEADINGS, as_csv, cells

if TYPE_CHECKING:
    from caxev.database import Database

Found = AsyncGenerator[Run, None]
_FIRST: Final = 200
"""Runs in the first page."""


@command(
    "caxev runs --limit 20",
    "caxev runs --lacks raw@chicago --since 30d",
    "caxev runs --tag _sciencerun0 --fewer-than 2 --csv",
    "caxev runs --run 100-200 --type raw --paths --at lngs",
)
@excludes("--csv", "--paths --json --wide")
@excludes("--paths", "--json --wide")
@needs("--at", "--paths")
@selects_runs(required=False)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="The most to list: the newest.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV, with a line of headings.")
@click.option("--paths", "as_paths", is_flag=True, help="Print the paths of good copies instead.")
@click.option("--at", type=HOST, metavar="SITE", help="With --paths: only of copies there.")
def runs(
    *, runs: RunChoice, limit: int | None, as_csv: bool, as_paths: bool, at: str | None
) -> None:
    """Find runs: list those that are selected, the newest first.

    COPIES are the sites with a good copy of raw data. --paths prints the path of each good copy
    that --host, --type and --version select, as HOST:PATH, or with --at as PATH.
    """
    if as_paths:
        wanted = runs.narrowed(host=at, status=runs.selection.copy.status or TRANSFERRED)
        options().with_database(_print, wanted, limit, _paths(wanted, plain=at is not None))
    elif as_csv:
        options().with_database(_print, runs, limit, _csv())
    else:
        options().with_database(_table, runs, limit)


async def find(database: Database, choice: RunChoice, limit: int | None) -> Found:
    """Read the selected runs, the newest first. Raises `NoSuchRun` for an unknown value."""
    left = limit
    # A person wants to see the first lines at once.
    first = min(limit or _FIRST, _FIRST)
    pages = database.pages(choice.selection, utcnow(), newest_first=True, first=first)
    async with aclosing(pages):
        async for page in pages:
            for run in page[:left]:
                yield run
            left = None if left is None else left - len(page[:left])
            if left == 0:
                return
    if left == limit and (hint := await choice.hint()):
        raise NoSuchRun(f"no {choice.words}{hint}")


# -- as a table -----------------------------------------------------------------------------------

_COLUMNS: Final = columns(
    "run",
    Column("run.name", "NAME"),
    Column("detector", minor=2),
    Column("start", minor=1),
    Column("source", minor=3),
    SIZE,
    Column("good", "COPIES"),
    "tags",
)


async def _table(database: Database, choice: RunChoice, limit: int | None) -> None:
    async with aclosing(find(database, choice, limit)) as found:
        await show_rows(_COLUMNS, (_row(run) async for run in found), empty="no such run")


_OF_COPY: Final = ("type", "version", "host", "status", "location")
_RAW: Final = CopyPattern(type="raw", status=TRANSFERRED)


def _row(run: Run) -> dict[str, Any]:
    return {
        "run": shown(run),
        "detector": run.detector or None,
        "start": run.start,
        "source": source_of(run),
        "bytes": run.raw_size,
        "good": [one.host for one in run.copies if _RAW.means(one)],
        "tags": [*run.tags],
        "copies": [{name: getattr(one, name) for name in _OF_COPY} for one in run.copies],
    }


# -- as lines -------------------------------------------------------------------------------------

Printer = Callable[[Run], None]


async def _print(
    database: Database, choice: RunChoice, limit: int | None, printer: Printer
) -> None:
    async with aclosing(find(database, choice, limit)) as found:
        async for run in found:
            printer(run)


def _paths(choice: RunChoice, *, plain: bool) -> Printer:
    def show(run: Run) -> None:
        for copy in run.copies:
            if choice.selection.means_copy(copy, utcnow()) and copy.location is not None:
                print_line(copy.location if plain else f"{copy.host}:{copy.location}")

    return show


def _csv() -> Printer:
    click.echo(as_csv([HEADINGS]), nl=False)
    return lambda run: click.echo(as_csv([cells(run)]), nl=False)
