"""Run ``caxev hold``, ``release`` and ``holds``: keep copies that rules would delete.

`caxev.copies.holds` has what a hold is. Each person has one on a copy: a new one replaces it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import click

from caxev.asking.base import DataChoice
from caxev.asking.holding import HoldCopies, Keep, ReleaseCopies
from caxev.cli.command import command, together
from caxev.cli.options import requester
from caxev.cli.output import Column, columns, stream
from caxev.cli.plans import Ask, acts
from caxev.cli.runs import copy_cells
from caxev.cli.selection import RunChoice, selects_data, selects_runs
from caxev.cli.values import HOST, LENGTH, SITE, TIME
from caxev.copies.holds import end_of, standing
from caxev.core.clock import utcnow
from caxev.core.model import Run

if TYPE_CHECKING:
    from caxev.database import Database


def _keep(*, length: timedelta | None, until: datetime | None, why: str | None) -> Keep:
    """Return how long to keep a copy, by the options. Raises click's error."""
    try:
        return Keep.of(length, until, why)
    except ValueError as error:
        raise click.UsageError(f"--keep-for and --keep-until: {error}") from None


keeps: Final = together(
    "keep",
    _keep,
    click.option(
        "--keep-for",
        "length",
        type=LENGTH,
        metavar="TIME",
        help="Keep the copy so long once it is there, as 36h, 14d, 2w.",
    ),
    click.option(
        "--keep-until",
        "until",
        type=TIME,
        metavar="DATE",
        help="Keep it until then, UTC: 2026-12-24 or 2026-12-24T18:00.",
    ),
    click.option("--why", metavar="TEXT", help="The reason; caxev holds and explain show it."),
)
"""Adds the options of a hold as the argument `keep`."""
_selects_site = click.option("--site", type=SITE, required=True, help="The site with the copies.")
_acts = acts("Show what would be held or released.")


@command(
    "caxev hold --run 123 --site lngs --keep-for 14d --why 'for a talk'",
    "caxev hold --tag sciencerun0 --site lngs --keep-until 2026-12-24",
)
@selects_runs(copies=("status",))
@_selects_site
@selects_data
@keeps
@_acts
def hold(*, runs: RunChoice, site: str, data: DataChoice, keep: Keep, ask: Ask) -> None:
    """Keep copies at a site, although its rules would delete them.

    Neither purge nor a full disk nor `caxev rm` deletes a copy that is held. Without --keep-for or
    --keep-until it is held until you release it. Each person has one hold on a copy, and a new one
    replaces it. A deletion that is under way is withdrawn unless files are being erased.
    """
    wanted = runs.of_status(host=site, type=data.kind, version=data.version)
    ask(wanted, HoldCopies(site, data, keep))


@command("caxev release --run 123 --site lngs", "caxev release --run 123 --site lngs --all")
@selects_runs(copies=("status",))
@_selects_site
@selects_data
@click.option("--all", "everybody", is_flag=True, help="End the holds of other people, too.")
@_acts
def release(*, runs: RunChoice, site: str, data: DataChoice, everybody: bool, ask: Ask) -> None:
    """End your holds of copies at a site.

    Its rules of deletion apply to them again at once, unless somebody else holds them, too.
    """
    wanted = runs.of_status(host=site, type=data.kind, version=data.version)
    ask(wanted, ReleaseCopies(site, data, everybody))


# -- what is held ---------------------------------------------------------------------------------

_COLUMNS = columns(
    "run",
    "type",
    Column("version", minor=1),
    "host",
    "by",
    "until",
    Column("days", minor=1),
    "why",
    Column("since", minor=2),
)


@command("caxev holds", "caxev holds --site lngs --json")
@click.option("--site", type=HOST, help="Only copies at this site.")
@click.option("--mine", is_flag=True, help="Only your own.")
def holds(*, site: str | None, mine: bool) -> None:
    """List the copies that somebody holds: who, why, and until when.

    Without a time they are held until they are released, or for so many days from their arrival.
    """
    stream(_COLUMNS, "nobody holds a copy", _listed, site, requester() if mine else None)


async def _listed(
    database: Database, site: str | None, who: str | None
) -> AsyncGenerator[dict[str, Any], None]:
    now = utcnow()
    async with aclosing(database.held()) as pages:
        async for page in pages:
            for row in (row for run in page for row in _rows(run, now)):
                if site in (None, row["host"]) and who in (None, row["by"]):
                    yield row


def _rows(run: Run, now: datetime) -> Iterator[dict[str, Any]]:
    for copy in run.copies:
        for one in standing(copy, now):
            until = end_of(copy, one)
            yield {
                **copy_cells(run, copy.key),
                "status": copy.status,
                "by": one.by,
                "until": until,
                "days": one.days if until is None else None,
                "why": one.why,
                "since": one.at,
            }
