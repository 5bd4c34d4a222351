"""Run ``caxev rm``: have a copy deleted.

The command only writes an intent, as the site's own rules do: the listener of the copy's site
proves that enough others are good, and deletes it. `caxev.copies.retention` decides.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from typing import TYPE_CHECKING, Any

import click

from caxev.asking.base import DataChoice
from caxev.asking.deletions import DeleteCopies, Terms, WithdrawDeletions
from caxev.asking.listeners import listening_sites
from caxev.cli.command import RUNS, command, excludes, needs, together
from caxev.cli.options import options
from caxev.cli.output import columns, print_line, stream
from caxev.cli.plans import Ask, acts
from caxev.cli.runs import copy_cells
from caxev.cli.selection import RunChoice, selects_data, selects_runs
from caxev.cli.values import SITE
from caxev.config import Site, Sites
from caxev.copies.retention import DeletionPlan, plan_processed, plan_purge
from caxev.core.clock import utcnow
from caxev.core.model import Copy, Run
from caxev.core.selection import at_host

if TYPE_CHECKING:
    from datetime import datetime

    from caxev.database import Database

_COLUMNS = columns("run", "type", "version", "goes", "why")


@command(
    "caxev rm --run 123 --site lngs --dry-run",
    "caxev rm --run 123 --site lngs",
    "caxev rm --run 123 --site lngs --type processed --version v6.8.0",
    "caxev rm --run 123 --site lngs --force-less --by-entries --why 'damaged by a pushed copy'",
    "caxev rm --run 100-200 --site lngs --status error",
    "caxev rm --site lngs --dry-run",
)
@excludes("--cancel", "--force-less --by-entries --why")
@needs("--by-entries", "--why")
@needs("--type --version --force-less --why --cancel", RUNS)
@selects_runs(required=False, copies=("status",))
@click.option("--site", type=SITE, required=True, help="The site that has the copy.")
@selects_data
@together(
    "terms",
    Terms,
    click.option(
        "--force-less",
        "less",
        is_flag=True,
        help="Allow fewer good copies than the site requires; of raw data at least one.",
    ),
    click.option(
        "--by-entries",
        is_flag=True,
        help="Do not have the other copies read again: a site that runs cax never answers. Only "
        "for a bad copy (error), and with --why.",
    ),
    click.option("--why", metavar="TEXT", help="The reason, kept in the run's deleted_data."),
)
@click.option("--cancel", is_flag=True, help="Withdraw it, while the files are still there.")
@acts("Show what would be deleted, or why not; without a run, by the site's rules.")
def rm(
    *, runs: RunChoice, site: str, data: DataChoice, terms: Terms, cancel: bool, ask: Ask
) -> None:
    """Delete copies of runs, if enough others are good.

    This marks a copy as `deleting`. The site's listener first has the other copies read
    again, and deletes this one only if that proves them good. Without a run, --dry-run shows
    what the site's own rules would delete now.
    """
    here = options().sites().get(site)
    if not runs.selects:
        if not ask.dry_run:
            raise click.UsageError("select runs: --run, --name, ... (--dry-run shows all)")
        stream(_COLUMNS, "it has no copies", _by_rules, here, options().sites())
        return
    # A catalogue has no listener of its own: a site that uploads there serves the intent.
    if here.method != "rucio":
        listening_sites(options().sites(), site)
    act = WithdrawDeletions(site, data) if cancel else DeleteCopies(site, data, terms)
    if runs.names_one:  # and not those of several detectors
        options().with_database(runs.find_one)
    else:
        runs = runs.narrowed(host=site, type=data.kind, version=data.version)
    ask(runs, act)
    if runs.names_one and not (ask.dry_run or cancel or options().as_json):
        print_line(f"to follow it: caxev status {runs.naming}")


async def _by_rules(
    database: Database, here: Site, sites: Sites
) -> AsyncGenerator[dict[str, Any], None]:
    """Return what the site's rules would delete now, and why the rest stays."""
    from caxev.engine.root_markers import read_markers

    now, known = utcnow(), await read_markers(database, sites, here)
    async for page in database.pages(at_host(here.name), now):
        for run in page:
            for copy, decision in decisions(run, here, known, now):
                yield {
                    **copy_cells(run, copy.key),
                    "status": copy.status,
                    "location": copy.location,
                    "goes": isinstance(decision, DeletionPlan),
                    "why": decision.why,
                }


def decisions(run: Run, here: Site, sites: Sites, now: datetime) -> Iterator[tuple[Copy, Any]]:
    """Return the decision of the site's rules on each of its copies of a run. Pure."""
    for copy in run.copies:
        if copy.host == here.name:
            rule = plan_purge if copy.type in here.types.primary else plan_processed
            yield copy, rule(run, copy, here, sites, now)
