"""Run ``caxev rm``: have a copy deleted.

The command only writes an intent, as the site's own rules do: the listener of the copy's site
proves that enough others are good, and deletes it. `caxev.copies.retention` decides.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import click
from attrs import frozen

from caxev.cli.command import command, together
from caxev.cli.errors import NothingToDo
from caxev.cli.options import options
from caxev.cli.output import Table, columns, print_line, show, stream
from caxev.cli.plans import asks
from caxev.cli.requests import (
    Planner,
    RunRequest,
    check_listener,
    request_each,
    requester,
    show_requests,
)
from caxev.cli.runs import copy_cells
from caxev.cli.selection import DataChoice, RunChoice, selects_data, selects_runs
from caxev.cli.values import SITE
from caxev.config import Site, Sites
from caxev.copies.deletion import Intent, intent, withdraw
from caxev.copies.retention import RAW, DeletionPlan, plan, plan_processed, plan_purge
from caxev.core.clock import utcnow
from caxev.core.job import Skip
from caxev.core.model import Copy, Run
from caxev.core.selection import at_host

if TYPE_CHECKING:
    from datetime import datetime

    from caxev.database import Database

_COLUMNS = columns("run", "type", "version", "goes", "why")


@frozen
class Terms:
    """The terms of a deletion: the waived conditions, and the reason.

    `less`: fewer copies may remain; `by_entries`: they are not read first.
    """

    less: bool = False
    by_entries: bool = False
    why: str | None = None

    @classmethod
    def of(cls, *, force_less: bool, by_entries: bool, why: str | None) -> Terms:
        """Take them from the options. Raises click's error."""
        if by_entries and not why:
            raise click.UsageError("--by-entries needs a reason: --why TEXT")
        return cls(force_less, by_entries, why)


@command(
    "caxev rm --run 123 --site lngs --dry-run",
    "caxev rm --run 123 --site lngs",
    "caxev rm --run 123 --site lngs --type processed --version v6.8.0",
    "caxev rm --run 123 --site lngs --force-less --by-entries --why 'damaged by a pushed copy'",
    "caxev rm --run 100-200 --site lngs --status error",
    "caxev rm --site lngs --dry-run",
)
@selects_runs(required=False, copies=("status",))
@click.option("--site", type=SITE, required=True, help="The site that has the copy.")
@selects_data
@together(
    "terms",
    Terms.of,
    click.option(
        "--force-less",
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
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show what would be deleted, or why not; without a run, by the site's rules.",
)
@asks
def rm(
    *,
    runs: RunChoice,
    site: str,
    data: DataChoice,
    terms: Terms,
    cancel: bool,
    dry_run: bool,
    yes: bool,
) -> None:
    """Delete copies of runs, if enough others are good.

    This marks a copy as `deleting`. The site's listener first has the other copies read
    again, and deletes this one only if that proves them good. Without a run, --dry-run shows
    what the site's own rules would delete now.
    """
    here = options().sites().get(site)
    if not runs.selects:
        if not dry_run:
            raise click.UsageError("select runs: --run, --name, ... (--dry-run shows all)")
        stream(_COLUMNS, _by_rules, here, options().sites())
        return
    # A catalogue has no listener of its own: a site that uploads there serves the intent.
    if here.method != "rucio":
        check_listener(here)
    if not runs.names_one:
        wanted = runs.narrowed(host=site, type=data.kind, version=data.version)
        make = partial(_planner, here=here, chosen=(wanted, data, terms), cancel=cancel)
        show_requests(request_each(wanted, make, yes=yes, dry_run=dry_run))
        return
    row = options().with_database(_act, here, (runs, data, terms), cancel=cancel, dry_run=dry_run)
    show(Table(_COLUMNS, [row]))
    if not (dry_run or cancel or options().as_json):
        print_line(f"to follow it: caxev status {runs.naming}")


async def _planner(
    database: Database, *, here: Site, chosen: tuple[RunChoice, DataChoice, Terms], cancel: bool
) -> Planner:
    known = await with_markers(database, options().sites(), here)
    deletion = CopyDeletion(here, known, *chosen)
    away = await deletion.away(database)

    def plan(run: Run) -> RunRequest:
        try:
            return deletion.withdrawal(run) if cancel else deletion.request(run, away)
        except (NothingToDo, click.UsageError) as why:
            return RunRequest(run, f"{deletion.data.kind} at {here.name}", str(why), ok=None)

    return plan


async def _act(
    database: Database,
    here: Site,
    chosen: tuple[RunChoice, DataChoice, Terms],
    *,
    cancel: bool,
    dry_run: bool,
) -> dict[str, Any]:
    known = await with_markers(database, options().sites(), here)
    deletion = CopyDeletion(here, known, *chosen)
    if dry_run:
        return await deletion.look(database)
    return await (deletion.cancel(database) if cancel else deletion.delete(database))


async def with_markers(database: Database, sites: Sites, here: Site) -> Sites:
    """Return the sites with their markers, which show what directories they share."""
    from caxev.engine.root_markers import read_markers

    return await read_markers(database, sites, here)


@frozen
class CopyAtSite:
    """The copy of a run at a site that a command is about."""

    here: Site
    sites: Sites
    choice: RunChoice
    data: DataChoice

    async def find(self, database: Database) -> Run:
        """Read the run. Raises `NoSuchRun`."""
        # Selections leave out fields that the plan needs: read the run again, with all of them.
        found = await self.choice.find_one(database)
        return (await database.runs([found.id]))[found.id]

    def copy(self, run: Run) -> Copy:
        """Return the selected copy. Raises `NothingToDo` if there is none."""
        found = self.data.copy(run, self.here.name)
        if found is None:
            raise NothingToDo(f"{run} has no {self.data.kind} copy at {self.here.name}", "gone")
        return found


@frozen
class CopyDeletion(CopyAtSite):
    """One call of the command: which copy is meant, and on what terms it is deleted."""

    terms: Terms

    async def look(self, database: Database) -> dict[str, Any]:
        """Return what would happen to the copy."""
        run = await self.find(database)
        return _row(run, self.copy(run), self._plan(run))

    async def delete(self, database: Database) -> dict[str, Any]:
        """Write the intent. Raises `NothingToDo` if the copy may not be deleted."""
        # The write expects the run as the plan has seen it. If it has changed, plan again.
        while True:
            run = await self.find(database)
            plan = self._plan(run)
            if not isinstance(plan, DeletionPlan):
                raise NothingToDo(f"{plan.why}", self.copy(run).status)
            self._check_disk(plan.copy, await self.away(database))
            now = utcnow()
            if await database.update_run(intent(run, plan, self.sites, now), now) is not None:
                return _row(run, plan.copy, plan)

    def request(self, run: Run, away: Mapping[str, str]) -> RunRequest:
        """Return the request to delete the copy of one of many runs, or why it is kept."""
        plan = self._plan(run)
        if not isinstance(plan, DeletionPlan):
            return RunRequest(run, str(self.copy(run).key), f"kept: {plan.why}", ok=None)
        self._check_disk(plan.copy, away)
        state, now = "be deleted, once the others were read", utcnow()
        return RunRequest(
            run,
            str(plan.copy.key),
            f"will {state}",
            intent(run, plan, self.sites, now),
            f"would {state}",
            size=plan.copy.size or run.raw_size,
        )

    async def away(self, database: Database) -> Mapping[str, str]:
        """Return the disks that the site's listener reports as away, and why."""
        # Only a running listener knows: this command may run on another machine.
        record = await database.site_record(self.here.name)
        return record.away if record is not None and record.active else {}

    def _check_disk(self, copy: Copy, away: Mapping[str, str]) -> None:
        """Raise `NothingToDo` if the copy's disk is away."""
        # Such an intent would wait until the disk is back, and the user should know.
        for root, why in away.items():
            if f"{copy.location}".startswith(root.rstrip("/") + "/"):
                raise NothingToDo(f"{why} (reported by {self.here.name}'s listener)", copy.status)

    async def cancel(self, database: Database) -> dict[str, Any]:
        """Withdraw the intent. Raises `NothingToDo` if it is too late, or there is none."""
        while True:
            run = await self.find(database)
            one = self.withdrawal(run)
            assert one.update is not None
            if await database.update_run(one.update, utcnow()) is not None:
                return _row(run, self.copy(run), Skip(one.state))

    def withdrawal(self, run: Run) -> RunRequest:
        """Return the request to withdraw the intent. Raises as `cancel`."""
        copy = self.copy(run)
        wanted = Intent.of(copy)
        if wanted is None:
            raise NothingToDo(f"{copy.key} is {copy.status}", copy.status)
        # `erasing` is set before the first file goes.
        if copy.is_erasing:
            raise NothingToDo(f"{copy.key} is being erased: too late", copy.status)
        why = f"withdrawn by {requester()}"
        return RunRequest(run, str(copy.key), why, withdraw(run, copy, wanted, why, utcnow()))

    def _plan(self, run: Run) -> Any:
        # Derived data can be made again, so its usual number is 1, and --force-less needs none.
        copy = self.copy(run)
        usual, least = (self.here.deletion.copies, 1) if copy.type == RAW else (1, 0)
        return plan(
            run,
            copy,
            self.here,
            self.sites,
            now=utcnow(),
            by=requester(),
            why=self.terms.why or "caxev rm",
            keep=least if self.terms.less else usual,
            by_entries=self.terms.by_entries,
        )


async def _by_rules(database: Database, here: Site, sites: Sites) -> AsyncIterator[dict[str, Any]]:
    """Return what the site's rules would delete now, and why the rest stays."""
    now, known = utcnow(), await with_markers(database, sites, here)
    async for page in database.pages(at_host(here.name), now):
        for run in page:
            for copy, decision in decisions(run, here, known, now):
                yield _row(run, copy, decision)


def decisions(run: Run, here: Site, sites: Sites, now: datetime) -> Iterator[tuple[Copy, Any]]:
    """Return the decision of the site's rules on each of its copies of a run. Pure."""
    for copy in run.copies:
        if copy.host == here.name:
            rule = plan_processed if copy.type == "processed" else plan_purge
            yield copy, rule(run, copy, here, sites, now)


def _row(run: Run, copy: Copy, decision: DeletionPlan | Any) -> dict[str, Any]:
    return {
        **copy_cells(run, copy.key),
        "status": copy.status,
        "location": copy.location,
        "goes": isinstance(decision, DeletionPlan),
        "why": decision.why,
    }
