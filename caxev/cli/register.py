"""Run ``caxev register``: add an entry for a copy whose files exist already.

The entry is ``verifying`` and has no digests yet. The site's listener reacts to it, as to any other
change: it reads the copy and stores its digests, or finds that it differs from the other copies. No
two entries may have the same files.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click
from attrs import frozen

from caxev.cli.command import command, together
from caxev.cli.options import as_json, options
from caxev.cli.output import show_lines
from caxev.cli.runs import copy_cells
from caxev.cli.selection import RunChoice, named
from caxev.cli.site_paths import at_disks, key_of, ours, own_name, run_called
from caxev.cli.values import RUN_NUMBER, SITE
from caxev.config import Site, Sites
from caxev.copies.sharing import sharing_here
from caxev.core.clock import utcnow
from caxev.core.errors import NoSuchRun, NothingToDo
from caxev.core.escapes import escaped
from caxev.core.model import VERIFYING, Copy, CopyKey, Run
from caxev.core.update import RunUpdate
from caxev.files import confine, safe_name

if TYPE_CHECKING:
    from caxev.database import Database


@frozen
class Naming:
    """The run that the user names for the files; what is None, their own name decides."""

    number: int | None = None
    name: str | None = None
    detector: str | None = None
    create: bool = False
    any_name: bool = False

    def choice(self, path: str) -> RunChoice:
        """Return which run the files at a path belong to."""
        if self.number is not None or self.name is not None:
            return named(self.number, self.name, self.detector)
        called, detector = run_called(path)
        return named(None, called, self.detector or detector)

    def birth(self, path: str) -> NewRun | None:
        """Return the run to create if there is none for the files at a path."""
        called, detector = run_called(path)
        name = self.name or called
        return (
            NewRun(self.number, name, self.detector or detector or "tpc") if self.create else None
        )


@command(
    "caxev register /data/raw/161111_1434 --site lngs",
    "caxev register /data/raw/161111_1434 --site lngs --run 123 --dry-run",
    "caxev register /data/raw/161111_1434 --site lngs --run 123 --create",
    "caxev register /data/processed/pax_v6.8.0/161111_1434.root --site chicago",
    output=as_json,
)
@click.argument("path")
@click.option("--site", type=SITE, required=True, help="The site of this machine.")
@together(
    "naming",
    Naming,
    click.option("--run", "number", type=RUN_NUMBER, metavar="N", help="The run's number."),
    click.option("--name", metavar="X", help="The run's name. [default: from PATH]"),
    click.option("--detector", metavar="D", help="Its detector, if runs share the name."),
    click.option("--create", is_flag=True, help="Create the run if there is none."),
    click.option("--any-name", is_flag=True, help="Accept a PATH whose name is not the run's."),
)
@click.option("--dry-run", is_flag=True, help="Show what would be written; write nothing.")
def register(*, path: str, site: str, naming: Naming, dry_run: bool) -> None:
    """Enter a copy whose files are there already: PATH, a directory of raw data or a derived file.

    Run it on the site's own machine. The directory decides the type of data. The new entry is
    `verifying` until the site's listener has read the files. Files that belong to another
    entry, or are not named as the run, are refused.
    """
    if naming.name is not None:  # with --create it becomes a run's name, and so one of directories
        safe_name(naming.name)
    place = os.path.abspath(path)
    row = options().with_database(_register, ours(site), place, naming, dry_run=dry_run)
    show_lines([row], _line)


async def _register(
    database: Database, here: Site, place: str, naming: Naming, *, dry_run: bool
) -> Mapping[str, Any]:
    async with at_disks(database, here, options().sites()) as (there, sites):
        found = found_at(place, there, sites, any_name=naming.any_name)
        choice, birth = naming.choice(found.real), naming.birth(found.real)
        return await found.enter(database, choice, birth, dry_run=dry_run)


def _line(row: Mapping[str, Any]) -> str:
    key = CopyKey(row["type"], row["host"], row["version"])
    return f"{row['state']}: {key} of {row['run'].parts['name']} ({row['location']})"


@frozen
class NewRun:
    """The name of a run to be created for files that were found."""

    number: int | None
    name: str
    detector: str

    @property
    def start(self) -> datetime | None:
        """Return the start time that the name contains; None if it contains none."""
        try:
            return datetime.strptime(self.name, "%y%m%d_%H%M").replace(tzinfo=UTC)
        except ValueError:
            return None

    @property
    def expected(self) -> Run:
        """Return the run as it will be created."""
        return Run.from_document({"_id": None, "number": self.number, "name": self.name})

    async def give(self, database: Database) -> None:
        """Create the run, unless there is one of that name and detector."""
        fields: dict[str, Any] = {"tags": []}
        if self.number is not None:
            fields["number"] = self.number
        if self.start is not None:
            fields["start"] = self.start
        await database.new_run(self.name, self.detector, fields)


@frozen
class FoundCopy:
    """A copy at `real`, a resolved path of a site, that needs an entry."""

    site: Site
    sites: Sites
    key: CopyKey
    real: str
    any_name: bool = False

    @property
    def location(self) -> str:
        """Return the location for the entry."""
        return own_name(self.real, self.site, self.key.type)

    async def enter(
        self, database: Database, choice: RunChoice, birth: NewRun | None, *, dry_run: bool
    ) -> Mapping[str, Any]:
        """Add the entry. Raises `NoSuchRun`.

        Raises `NothingToDo` if the entry exists, or if the files may belong to another run.
        """
        try:
            run = await choice.find_one(database)
        except NoSuchRun:
            if birth is None:
                raise
            # Before the run is created: a refused registration must not leave an empty run.
            await self._sure_its(database, birth.expected)
            if dry_run:
                return self._row(birth.expected, "would be registered, with its run")
            # Read back, because somebody may have created the run at the same time.
            await birth.give(database)
            run = await choice.find_one(database)
        update = entry_for(run, self.key, self.location, utcnow())
        await self._sure_its(database, run)
        if dry_run:
            return self._row(run, "would be registered")
        # The write expects that there is still no such entry.
        if await database.update_run(update, utcnow()) is None:
            raise NothingToDo(f"{run} has got this copy meanwhile: {self.key}")
        return self._row(run, "registered")

    async def _sure_its(self, database: Database, run: Run) -> None:
        """Raise `NothingToDo` if these files may belong to another entry.

        They may if they do not have the run's name, or if an entry names that place, or one above
        or below it.
        """
        called, detector = run_called(self.real)
        is_named = called and called == run.name and detector in (None, run.detector)
        if not (self.any_name or is_named):
            raise NothingToDo(
                f"{escaped(os.path.basename(self.real))} is not the name of {run}: if it is "
                "that run's nevertheless, add --any-name"
            )
        mine = Copy(self.key, VERIFYING, {"location": self.location})
        find = database.neighbours
        if others := await sharing_here(find, run, mine, self.site, self.sites):
            raise NothingToDo(
                f"{escaped(self.location)} is at, above or below the files of {others[0]}"
            )

    def _row(self, run: Run, what: str) -> Mapping[str, Any]:
        return {**copy_cells(run, self.key), "location": self.location, "state": what}


def found_at(path: str, here: Site, sites: Sites, *, any_name: bool = False) -> FoundCopy:
    """Return the copy at that path, following links.

    Raises `GiveUp` if the site keeps no copies there, `NothingToDo` if nothing is there.
    """
    real = os.fsdecode(confine(path, here.roots))
    if not os.path.lexists(real):
        raise NothingToDo(f"there is nothing at {escaped(real)}")
    return FoundCopy(here, sites, key_of(here, real), real, any_name)


def entry_for(run: Run, key: CopyKey, location: str, now: datetime) -> RunUpdate:
    """Return the write that adds the entry of a copy that is still to be read. Pure.

    Raises `NothingToDo` if there is an entry.
    """
    known = run.copy(key)
    if known is not None:
        where = escaped(known.location or "no place")
        raise NothingToDo(f"{run} already has this copy: {key} is {known.status} ({where})")
    # BSON has UTF-8 only, and a file name may be any bytes.
    try:
        location.encode()
    except UnicodeEncodeError:
        raise NothingToDo(
            f"{escaped(location)} is not valid UTF-8, which the database needs: rename it"
        ) from None
    return RunUpdate.add_copy(
        run,
        key,
        VERIFYING,  # such a copy does not count until its own site has read it
        location=location,
        checksum=None,
        creation_time=now,
        creation_place=key.host,
    )
