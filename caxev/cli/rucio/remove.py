"""Run ``caxev rucio rm``, ``forget`` and ``purge``: remove datasets, entries, copies on disk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import click
from attrs import evolve

from caxev.cli.command import command
from caxev.cli.forget import forget_entries, forgets
from caxev.cli.options import options
from caxev.cli.plans import asks
from caxev.cli.requests import (
    Planner,
    RunRequest,
    check_listener,
    request_each,
    requester,
    show_requests,
)
from caxev.cli.rm import with_markers
from caxev.cli.rucio.chosen import CatalogueChoice, comparison, rucio, selects_catalogue
from caxev.cli.values import SITE, STATUS
from caxev.config import Site, Sites
from caxev.copies.deletion import intent
from caxev.copies.retention import RAW, DeletionPlan, plan
from caxev.core.clock import utcnow
from caxev.core.model import DELETING, TRANSFERRED, Copy, CopyKey, Run

if TYPE_CHECKING:
    from caxev.database import Database


@command("caxev rucio rm --run 123 --why 'taken in error'", group=rucio)
@selects_catalogue()
@click.option("--why", required=True, metavar="TEXT", help="The reason, kept in deleted_data.")
@asks
@click.option("--dry-run", is_flag=True, help="Show what would be deleted, or why not.")
def rm(*, chosen: CatalogueChoice, why: str, yes: bool, dry_run: bool) -> None:
    """Give up datasets, so that the catalogue deletes all replicas.

    Like `caxev rm`: the site that uploaded a dataset has the other copies read again first, and
    gives it up only if that proves enough of them good (`deletion` of the catalogue in
    sites.json). Until then `caxev rm --site CATALOGUE --cancel` withdraws it.
    """
    there = chosen.there
    plan = partial(_removal, chosen=chosen, there=there, why=why)
    show_requests(_request(chosen, there, plan, yes=yes, dry_run=dry_run))


def _request(
    chosen: CatalogueChoice,
    here: Site,
    plan: Callable[[Run, Sites], RunRequest],
    *,
    yes: bool,
    dry_run: bool,
) -> list[dict[str, Any]]:
    """Plan and write for each selected run, given the sites with their markers."""

    async def make(database: Database) -> Planner:
        sites = await with_markers(database, options().sites(), here)
        return lambda run: plan(run, sites)

    return request_each(chosen.choice, make, yes=yes, dry_run=dry_run)


def _removal(
    run: Run, sites: Sites, *, chosen: CatalogueChoice, there: Site, why: str
) -> RunRequest:
    found = chosen.entries(run)
    what = f"{chosen.kind} at {there.name}"
    if not found:
        return RunRequest(run, what, "the catalogue has no such copy")
    # Never guess a version for a deletion.
    if len(found) > 1:
        versions = ", ".join(one.version or "none" for one in found)
        return RunRequest(run, what, f"it has several ({versions}): choose one by --version")
    wanted = _deletion(run, found[0], there, sites, why)
    return evolve(wanted, ok=bool(wanted.ok))


def _deletion(run: Run, copy: Copy, here: Site, sites: Sites, why: str) -> RunRequest:
    """Return the request to delete a copy if it is allowed; `ok` is None if it is kept."""
    what = f"{copy.type} at {here.name}"
    if copy.status == DELETING:
        return RunRequest(run, what, "is being deleted already", ok=True)
    # Derived data can be made again from raw data: one other copy is enough.
    keep, now = here.deletion.copies if copy.type == RAW else 1, utcnow()
    wanted = plan(run, copy, here, sites, now=now, by=requester(), why=why, keep=keep)
    if not isinstance(wanted, DeletionPlan):
        return RunRequest(run, what, f"kept: {wanted.why}", ok=None)
    update = intent(run, wanted, sites, now)
    state = "be deleted, once the others were read"
    return RunRequest(run, what, f"will {state}", update, planned=f"would {state}")


@command("caxev rucio forget --run 123 --status error --why 'never uploaded'", group=rucio)
@selects_catalogue()
@click.option("--status", type=STATUS, help="Only entries with this status.")
@forgets
def forget(
    *, chosen: CatalogueChoice, status: str | None, why: str, yes: bool, dry_run: bool
) -> None:
    """Remove entries of the catalogue; its datasets stay.

    Only `caxev rucio put` uploads such data again.
    """
    found = [
        (run, [one for one in chosen.entries(run) if status in (None, one.status)])
        for run in options().with_database(chosen.runs)
    ]
    what = f"{chosen.kind} at {chosen.there.name}"
    asks = not (yes or dry_run)
    show_requests(forget_entries(found, what, why, asks=asks, dry_run=dry_run))


@command("caxev rucio purge --site lngs --run 1-1000 --dry-run", group=rucio)
@selects_catalogue()
@click.option("--site", type=SITE, required=True, help="The site whose copies are deleted.")
@asks
@click.option("--dry-run", is_flag=True, help="Show what would be deleted, or why not.")
def purge(*, chosen: CatalogueChoice, site: str, yes: bool, dry_run: bool) -> None:
    """Delete copies on disk that the catalogue has, too.

    Like `caxev rm`, for many runs: the site's listener deletes a copy only if enough others are
    proved good. If the replicas of a dataset were never compared, that is requested first.
    """
    here = options().sites().get(site)
    check_listener(here)
    plan = partial(_purge, chosen=chosen, here=here)
    show_requests(_request(chosen, here, plan, yes=yes, dry_run=dry_run))


def _purge(run: Run, sites: Sites, *, chosen: CatalogueChoice, here: Site) -> RunRequest:
    what, entry = f"{chosen.kind} at {here.name}", chosen.entry(run)
    if entry is None or entry.status != TRANSFERRED:
        found = "no such copy" if entry is None else f"it as {entry.status}"
        return RunRequest(run, what, f"kept: the catalogue has {found}", ok=True)
    copy = run.copy(CopyKey(chosen.kind, here.name, entry.version))
    if copy is None:
        return RunRequest(run, what, f"{here.name} has none", ok=True)
    # A proof counts only copies whose bytes were read; without that the intent would just wait.
    if entry.read_at is None:
        kept = "kept: its replicas were never compared"
        asked = f"{kept}: requested now"
        return RunRequest(run, what, asked, comparison(run, entry), planned=kept, ok=False)
    return _deletion(run, copy, here, sites, "caxev rucio purge")
