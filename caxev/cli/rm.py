"""Run ``caxev rm``: have a copy deleted.

The command only writes an intent, as the site's own rules do: the listener of the copy's site
proves that enough others are good, and deletes it. `caxev.copies.retention` decides.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import click
from attrs import frozen

from caxev.cli.completion import SITE
from caxev.cli.errors import NothingToDo
from caxev.cli.options import as_table, example, global_options, state
from caxev.cli.output import Column, Table, print_line, show, show_rows
from caxev.cli.selection import of_data, one_run
from caxev.config import ConfigError

if TYPE_CHECKING:
    from datetime import datetime

    from caxev.cli.runs import Wanted
    from caxev.config import Site, Sites
    from caxev.copies.retention import DeletionPlan
    from caxev.core.model import Copy, Run
    from caxev.database import Database

_COLUMNS = (
    Column("run", "RUN"),
    Column("type", "TYPE"),
    Column("version", "VERSION"),
    Column("goes", "GOES"),
    Column("why", "WHY"),
)


@click.command(
    epilog=example(
        "caxev rm --run 123 --site lngs --dry-run",
        "caxev rm --run 123 --site lngs",
        "caxev rm --run 123 --site lngs --type processed --version v6.8.0",
        "caxev rm --run 123 --site lngs --force-less --by-entries --why 'damaged by a pushed copy'",
        "caxev rm --site lngs --dry-run",
    )
)
@one_run
@click.option("--site", type=SITE, required=True, help="The site that has the copy.")
@of_data
@click.option(
    "--force-less",
    is_flag=True,
    help="Allow fewer good copies than the site requires; of raw data at least one.",
)
@click.option(
    "--by-entries",
    is_flag=True,
    help="Do not have the other copies read again: a site that runs cax never answers. Only for a "
    "bad copy (error), and with --why.",
)
@click.option("--why", metavar="TEXT", help="The reason, kept in the run's deleted_data.")
@click.option("--cancel", is_flag=True, help="Take it back while the files are there.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show what would be deleted, or why not; without a run, by the site's rules.",
)
@as_table
@global_options(hidden=True)
def rm(
    *,
    number: int | None,
    name: str | None,
    detector: str | None,
    site: str,
    kind: str,
    version: str | None,
    force_less: bool,
    by_entries: bool,
    why: str | None,
    cancel: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Delete a copy of a run, if enough others are good.

    This marks the copy as `deleting`. The site's listener first has the other copies read
    again, and deletes this one only if that proves them good. Without a run, --dry-run shows
    what the site's own rules would delete now.
    """
    from caxev.cli.runs import one
    from caxev.cli.runs import options as named

    options = state()
    options.log("warning")
    sites = options.sites()
    here = sites.get(site)
    if number is None and name is None:
        if not dry_run:
            raise click.UsageError("say which run: --run or --name (--dry-run shows all)")

        async def by_rules(database: Database) -> None:
            rows = _by_rules(database, here, await with_markers(database, sites, here))
            await show_rows(_COLUMNS, rows, as_json=as_json, empty=f"{site} has no copies")

        options.with_database(by_rules)
        return
    # A catalogue has no listener of its own: a site that uploads there serves the intent.
    if not here.listener and here.method != "rucio":
        raise ConfigError(f"{site} has no listener of its own, says sites.json: nobody deletes")
    if by_entries and not why:
        raise click.UsageError("--by-entries needs a reason: --why TEXT")
    force = Force(less=force_less, by_entries=by_entries)
    wanted = one(number, name, detector)

    async def act(database: Database) -> dict[str, Any]:
        known = await with_markers(database, sites, here)
        errand = Errand(here, known, wanted, kind, version, force, why)
        if dry_run:
            return await errand.look(database)
        return await (errand.cancel(database) if cancel else errand.delete(database))

    row = options.with_database(act)
    show(Table(_COLUMNS, [row]), as_json=as_json)
    if not (dry_run or cancel or as_json):
        run = named(number, name, detector)
        print_line(f"its entry says how far that is: caxev status {run}")


async def with_markers(database: Database, sites: Sites, here: Site) -> Sites:
    """Return the sites with their markers, which show what directories they share."""
    from caxev.engine.root_markers import read_markers

    return await read_markers(database, sites, here)


@frozen
class Force:
    """The waived conditions: how many copies must remain, and that they are read first."""

    less: bool = False
    by_entries: bool = False


@frozen
class Errand:
    """One call of the command: which copy is meant."""

    here: Site
    sites: Sites
    wanted: Wanted
    kind: str
    version: str | None
    force: Force = Force()
    why: str | None = None

    async def look(self, database: Database) -> dict[str, Any]:
        """Return what would happen to the copy."""
        run = await self.find(database)
        return _row(run, self.copy(run), self._plan(run))

    async def delete(self, database: Database) -> dict[str, Any]:
        """Write the intent. Raises `NothingToDo` if the copy may not be deleted."""
        from caxev.copies.deletion import intent
        from caxev.copies.retention import DeletionPlan
        from caxev.core.clock import utcnow

        # The write expects the run as the plan has seen it. If it has changed, plan again.
        while True:
            run = await self.find(database)
            plan = self._plan(run)
            if not isinstance(plan, DeletionPlan):
                raise NothingToDo(f"{plan.why}", self.copy(run).status)
            await self._check_disk(database, plan.copy)
            now = utcnow()
            if await database.update_run(intent(run, plan, self.sites, now), now) is not None:
                return _row(run, plan.copy, plan)

    async def _check_disk(self, database: Database, copy: Copy) -> None:
        """Raise `NothingToDo` if the site's listener reports that the copy's disk is away."""
        # Such an intent would wait until the disk is back, and the user should know. Only a
        # running listener knows: this command may run on another machine.
        record = await database.site_record(self.here.name)
        away = record.away if record is not None and record.active else {}
        for root, why in away.items():
            if f"{copy.location}".startswith(root.rstrip("/") + "/"):
                raise NothingToDo(f"{why} (so says the listener of {self.here.name})", copy.status)

    async def cancel(self, database: Database) -> dict[str, Any]:
        """Take the intent back. Raises `NothingToDo` if it is too late, or there is none."""
        from caxev.cli.replay import me
        from caxev.copies.deletion import Intent, withdraw
        from caxev.core.clock import utcnow
        from caxev.core.job import Skip

        while True:
            run = await self.find(database)
            copy = self.copy(run)
            wanted = Intent.of(copy)
            if wanted is None:
                raise NothingToDo(f"{copy.key} is {copy.status}", copy.status)
            # `erasing` is set before the first file goes.
            if copy.is_erasing:
                raise NothingToDo(f"{copy.key} is being erased: too late", copy.status)
            why, now = f"taken back by {me()}", utcnow()
            update = withdraw(run, copy, wanted, why, now)
            if await database.update_run(update, now) is not None:
                return _row(run, copy, Skip(why))

    async def find(self, database: Database) -> Run:
        """Read the run. Raises `NoSuchRun`."""
        # Selections leave out fields that the plan needs: read the run again, with all of them.
        found = await self.wanted.find_one(database, database.settings)
        return (await database.runs([found.id]))[found.id]

    def copy(self, run: Run) -> Copy:
        """Return the selected copy. Raises `NothingToDo` if there is none."""
        here = [one for one in run.copies if (one.type, one.host) == (self.kind, self.here.name)]
        if self.version is None and len(here) > 1:
            named = ", ".join(sorted(one.version or "none" for one in here))
            raise click.UsageError(
                f"{self.here.name} has several versions ({named}): say which by --version"
            )
        fit = [one for one in here if self.version in (None, one.version)]
        if not fit:
            raise NothingToDo(f"{run} has no {self.kind} copy at {self.here.name}", "gone")
        return fit[0]

    def _plan(self, run: Run) -> Any:
        from caxev.cli.replay import me
        from caxev.copies.retention import RAW, plan
        from caxev.core.clock import utcnow

        # Derived data can be made again, so its usual number is 1, and --force-less needs none.
        copy = self.copy(run)
        usual, least = (self.here.deletion.copies, 1) if copy.type == RAW else (1, 0)
        return plan(
            run,
            copy,
            self.here,
            self.sites,
            now=utcnow(),
            by=me(),
            why=self.why or "caxev rm",
            keep=least if self.force.less else usual,
            by_entries=self.force.by_entries,
        )


async def _by_rules(database: Database, here: Site, sites: Sites) -> AsyncIterator[dict[str, Any]]:
    """Return what the site's rules would delete now, and why the rest stays."""
    from caxev.core.clock import utcnow
    from caxev.database import Selection

    now = utcnow()
    async for page in database.pages(Selection(host=here.name), now):
        for run in page:
            for copy, decision in decisions(run, here, sites, now):
                yield _row(run, copy, decision)


def decisions(run: Run, here: Site, sites: Sites, now: datetime) -> Iterator[tuple[Copy, Any]]:
    """Return the decision of the site's rules on each of its copies of a run. Pure."""
    from caxev.copies.retention import plan_processed, plan_purge

    for copy in run.copies:
        if copy.host == here.name:
            rule = plan_processed if copy.type == "processed" else plan_purge
            yield copy, rule(run, copy, here, sites, now)


def _row(run: Run, copy: Copy, decision: DeletionPlan | Any) -> dict[str, Any]:
    from caxev.cli.runs import shown
    from caxev.copies.retention import DeletionPlan

    return {
        "run": shown(run),
        "type": copy.type,
        "version": copy.version,
        "status": copy.status,
        "location": copy.location,
        "goes": isinstance(decision, DeletionPlan),
        "why": decision.why,
    }
