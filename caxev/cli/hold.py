"""Run ``caxev hold``, ``release`` and ``holds``: keep copies, however much a rule wants them gone.

`caxev.copies.holds` has what a hold is. Each person has one on a copy: a new one replaces it.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import click
from attrs import evolve, frozen

from caxev.cli.command import command, together
from caxev.cli.options import options
from caxev.cli.output import Column, Table, columns, show
from caxev.cli.plans import asks
from caxev.cli.requests import (
    Planner,
    RunRequest,
    asked,
    planner,
    request_each,
    requester,
    show_requests,
)
from caxev.cli.runs import copy_cells
from caxev.cli.selection import DataChoice, RunChoice, selects_data, selects_runs
from caxev.cli.values import HOST, LENGTH, SITE, TIME
from caxev.config import Site
from caxev.copies.deletion import hold as holding
from caxev.copies.holds import COMING, end_of, standing, terms, words
from caxev.copies.retention import days_kept
from caxev.core.clock import utcnow
from caxev.core.entry import Hold
from caxev.core.history import HistoryRow, What
from caxev.core.model import REQUESTED, Copy, CopyKey, Run

if TYPE_CHECKING:
    from caxev.database import Database


@frozen
class Keep:
    """How long to keep a copy, as a person gave it: so many days, or until a time (UTC)."""

    days: float | None = None
    until: datetime | None = None
    why: str | None = None

    @classmethod
    def of(cls, *, length: timedelta | None, until: datetime | None, why: str | None) -> Keep:
        """Take it from the options. Raises click's error."""
        days = None if length is None else length / timedelta(days=1)
        if days is not None and until is not None:
            raise click.UsageError("--keep-for and --keep-until exclude each other")
        if until is not None and until <= utcnow():
            raise click.UsageError(f"--keep-until {until:%Y-%m-%d %H:%M} UTC has passed already")
        return cls(days, until, why)

    @property
    def is_given(self) -> bool:
        """Whether the person said how long."""
        return self.days is not None or self.until is not None

    def of_request(self, target: CopyKey, site: Site, now: datetime) -> Hold | None:
        """Return the hold of a copy that is requested at a site; None if no rule would end it.

        By default it is for as many days as ``purge`` names, from the copy's arrival on.
        """
        keep = self if self.is_given else evolve(self, days=days_kept(target, site))
        return keep.hold(REQUESTED, now) if keep.is_given else None

    def hold(self, status: str, now: datetime) -> Hold:
        """Return the hold of a copy that has this status. Its days count from the arrival."""
        until, days = self.until, self.days
        if days is not None and status not in COMING:
            until, days = now + timedelta(days=days), None
        return Hold(requester(), self.why or "", now, until, days)


keeps: Final = together(
    "keep",
    Keep.of,
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
_dry_run = click.option("--dry-run", is_flag=True, help="Show what would be held or released.")


@command(
    "caxev hold --run 123 --site lngs --keep-for 14d --why 'for a talk'",
    "caxev hold --tag sciencerun0 --site lngs --keep-until 2026-12-24",
)
@selects_runs(copies=())
@_selects_site
@selects_data
@keeps
@asks
@_dry_run
def hold(
    *, runs: RunChoice, site: str, data: DataChoice, keep: Keep, yes: bool, dry_run: bool
) -> None:
    """Keep copies at a site, although its rules would delete them.

    Neither purge nor a full disk nor `caxev rm` deletes a copy that is held. Without --keep-for or
    --keep-until it is held until you release it. Each person has one hold on a copy, and a new one
    replaces it. A deletion that is under way is withdrawn unless files are being erased.
    """
    _carry_out(runs, partial(_held, keep=keep, site=site, data=data), yes=yes, dry_run=dry_run)


@command("caxev release --run 123 --site lngs", "caxev release --run 123 --site lngs --all")
@selects_runs(copies=())
@_selects_site
@selects_data
@click.option("--all", "everybody", is_flag=True, help="End the holds of other people, too.")
@asks
@_dry_run
def release(
    *, runs: RunChoice, site: str, data: DataChoice, everybody: bool, yes: bool, dry_run: bool
) -> None:
    """End your holds of copies at a site.

    Its rules of deletion apply to them again at once, unless somebody else holds them, too.
    """
    plan = partial(_released, everybody=everybody, site=site, data=data)
    _carry_out(runs, plan, yes=yes, dry_run=dry_run)


def _carry_out(runs: RunChoice, plan: Planner, *, yes: bool, dry_run: bool) -> None:
    show_requests(request_each(runs, planner(plan), yes=yes, dry_run=dry_run))


def _held(run: Run, *, keep: Keep, site: str, data: DataChoice) -> RunRequest:
    """Return the request to hold the run's copy at a site."""
    copy, now = data.copy(run, site), utcnow()
    if copy is None:
        return RunRequest(run, f"{data.kind} at {site}", "there is no such copy", ok=False)
    mine = keep.hold(copy.status, now)
    others = [one for one in standing(copy, now) if one.by != mine.by]
    row = asked(run, copy.key, What.HELD, reason=terms(copy, mine))
    return _written(run, copy, [*others, mine], words(copy, mine), row)


def _released(run: Run, *, everybody: bool, site: str, data: DataChoice) -> RunRequest:
    """Return the request to end holds of the run's copy at a site."""
    copy, now, who = data.copy(run, site), utcnow(), requester()
    left = [] if copy is None else standing(copy, now)
    if copy is None or not left:
        return RunRequest(run, f"{data.kind} at {site}", "nobody holds it", ok=False)
    stays = [] if everybody else [one for one in left if one.by != who]
    still = f"{words(copy, stays[0])}: --all ends that, too" if stays else ""
    if stays == left:
        return RunRequest(run, str(copy.key), still, ok=False)
    ended = ", ".join(dict.fromkeys(one.by for one in left if one not in stays and one.by != who))
    row = asked(run, copy.key, What.RELEASED, reason=f"the hold of {ended}" if ended else "")
    return _written(run, copy, stays, f"released; still {still}" if still else "released", row)


def _written(run: Run, copy: Copy, holds: list[Hold], state: str, row: HistoryRow) -> RunRequest:
    update = holding(run, copy, holds)
    if update is None:
        return RunRequest(run, str(copy.key), "it is being erased: too late", ok=False)
    return RunRequest(run, str(copy.key), state, update, row=row)


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
    rows = options().with_database(_listed, site, requester() if mine else None)
    show(Table(_COLUMNS, rows), empty="nobody holds a copy")


async def _listed(database: Database, site: str | None, who: str | None) -> list[dict[str, Any]]:
    now = utcnow()
    return [
        row
        for run in await database.held()
        for row in _rows(run, now)
        if site in (None, row["host"]) and who in (None, row["by"])
    ]


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
