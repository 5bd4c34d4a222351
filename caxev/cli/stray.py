"""Run ``caxev stray``: find files without an entry, and entries without files.

The order makes it safe beside running listeners: the database's claims are read first, then the
directories, and before a find is listed or touched the database is read once more. Recent changes
are left alone: they may belong to a copy that is being made.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click
import trio
from attrs import define, field

from caxev.cli.command import command, excludes, needs
from caxev.cli.inventory import (
    GONE,
    MOVED,
    ClaimedPlace,
    Find,
    Inventory,
    copies_of,
    hidden,
    keepers,
    measured,
    places,
)
from caxev.cli.options import options
from caxev.cli.output import SIZE, columns, fail_if, run_parts, show_rows, time
from caxev.cli.register import found_at
from caxev.cli.selection import RunChoice, named, selects_runs
from caxev.cli.site_paths import at_disks, names_of, ours, run_called
from caxev.cli.values import SITE
from caxev.config import Site, Sites
from caxev.copies.storage import sites_sharing_storage
from caxev.core.clock import clock, utcnow
from caxev.core.errors import GiveUp, NoSuchRun, NothingToDo, Retry
from caxev.core.model import DELETING, MOVING, TRANSFERRED, Copy, Run
from caxev.core.selection import at_host
from caxev.files import confine_entry, erase
from caxev.files.erasing import quarantine_of
from caxev.files.identity import identity
from caxev.files.roots import check_root
from caxev.finite import Finite

if TYPE_CHECKING:
    from caxev.database import Database

Row = Mapping[str, Any]
NICENESS: Final = 19
_HOUR: Final = 3600.0


@command(
    "caxev stray --site lngs",
    "caxev stray --site lngs --delete --dry-run",
    "caxev stray --site lngs --register",
    "caxev stray --site lngs --run 100-200",
)
@excludes("--delete", "--register")
@needs("--age", "--delete --register")
@selects_runs(required=False, copies=())
@click.option("--site", type=SITE, required=True, help="The site of this machine.")
@click.option("--delete", is_flag=True, help="Delete files without an entry.")
@click.option("--register", is_flag=True, help="Register those that are a run's copy.")
@click.option(
    "--age",
    type=Finite(0),
    default=24.0,
    show_default=True,
    metavar="HOURS",
    help="Leave alone what has changed in the last HOURS.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be done; do nothing.")
def stray(
    *, runs: RunChoice, site: str, delete: bool, register: bool, age: float, dry_run: bool
) -> None:
    """Find files without an entry, and entries without files.

    Run it on the site's own machine. It may run beside the listener: it has the lowest priority
    and needs little memory. A directory without any entry is one row. Abandoned partial files
    and files that were put aside are `leftover`. Entries without files are only listed: caxev
    verify --deep has the site check them. If runs are selected, only their entries are listed, and
    files that are named as these runs. Exit code 1 if something could not be read or done.
    """
    os.nice(NICENESS)  # a walk through all directories must not slow the listener beside it
    act = "delete" if delete else "register" if register else ""
    here = ours(site)

    async def look(database: Database) -> bool:
        async with at_disks(database, here, options().sites()) as (there, known):
            # The earlier of both clocks: a file that is being written now must not look old.
            before = clock.safe_now().timestamp() - age * _HOUR
            only = await _selected(database, runs) if runs.selects else None
            search = Search(there, known, act, before, dry_run, only)
            none = "every file has an entry, and every entry its files"
            await show_rows(_COLUMNS, search.rows(database), empty=none)
            return search.all_well

    fail_if(not options().with_database(look))


_COLUMNS = columns("what", "files", SIZE, "path", "state")


class Selected(NamedTuple):
    """The selected runs: their ids, as texts, and their names."""

    ids: frozenset[str]
    names: frozenset[str]

    def means(self, find: Find) -> bool:
        """Return whether files without an entry are named as one of these runs, or were."""
        paths = map(os.fsdecode, copies_of(find.path))
        # A run may have no name, and a hidden file has nothing before its first dot.
        return any(name in self.names for name, _ in map(run_called, paths) if name)


async def _selected(database: Database, choice: RunChoice) -> Selected:
    found = [(str(run.id), run.name) async for run in choice.each(database)]
    return Selected(frozenset(one for one, _ in found), frozenset(name for _, name in found))


@define
class Search:
    """A search at one site; `act` is ``delete``, ``register`` or an empty text.

    `before`: files that have changed since (seconds since 1970) are left alone. `only`: the runs
    about which it is; None: all. `all_well`: all could be read and done so far.
    """

    site: Site
    sites: Sites
    act: str
    before: float
    dry_run: bool
    only: Selected | None = None
    all_well: bool = field(init=False, default=True)

    @property
    def hosts(self) -> frozenset[str]:
        """Return the sites on this machine: a file with an entry of any of them is no stray."""
        return sites_sharing_storage(self.site, self.sites)

    async def rows(self, database: Database) -> AsyncIterator[Row]:
        """Search and act; return a row for each find. Raises `RootAway`."""
        # With a disk away, all its copies would seem gone. Checked again after the walk, during
        # which a disk may vanish.
        for root in self.site.roots:
            await trio.to_thread.run_sync(check_root, root)
        with Inventory() as inventory:
            await self._claim(database, inventory)
            await trio.to_thread.run_sync(inventory.walk, self.site)
            gone = await trio.to_thread.run_sync(inventory.settle)
            for root in self.site.roots:
                await trio.to_thread.run_sync(check_root, root)
            self._sure(inventory.musts(), gone)
            async for finds in _paged(inventory.finds()):
                wanted = [one for one in finds if self.only is None or self.only.means(one)]
                for find in await self._unknown(database, wanted):
                    row = await self._done(database, find)
                    self.all_well = row.pop("ok") and self.all_well
                    yield row
            async for claims in _paged(inventory.gone()):
                due = [one for one in claims if self.only is None or one.run in self.only.ids]
                for claim in await self._still(database, due):
                    yield _gone_row(claim)

    async def _claim(self, database: Database, inventory: Inventory) -> None:
        # Sites on this machine may share directories: what another one's entry names is no stray.
        for host in self.hosts:
            async for page in database.pages(at_host(host), utcnow()):
                claims = [claim for run in page for claim in self._claims_of(run, host)]
                await trio.to_thread.run_sync(inventory.claim, claims)

    def _claims_of(self, run: Run, host: str) -> Iterator[ClaimedPlace]:
        """Return the places that a run's entries name; only this site's must exist."""
        for claim in claims_of(run, self.sites.get(host)):
            yield claim if host == self.site.name else claim._replace(must=False)

    def _sure(self, known: int, gone: int) -> None:
        """Raise `NothingToDo` if so much is missing that this is hardly the right directory."""
        # The usual causes are the wrong machine, the wrong database, or a directory that was
        # replaced: then nearly everything is missing, and all that is there seems stray.
        if self.act != "delete" or (known and 2 * gone <= known):
            return
        name = self.site.name
        raise NothingToDo(
            f"{gone} of the {known} copies of {name} in the database are missing here: is this "
            f"{name}, is it the right database, is every disk mounted? Nothing was deleted"
        )

    async def _unknown(self, database: Database, finds: Sequence[Find]) -> list[Find]:
        """Return those finds that still have no entry in the database."""
        # By location, not by a scan of all runs: for a page of finds this is one query.
        paths = {path for find in finds for path in copies_of(find.path)}
        names = {name for path in paths for name in self._names(path)}
        roots = [root for host in self.hosts for root in self.sites.get(host).roots]
        runs = await database.located(self.hosts, sorted(names), roots)
        there = [self.sites.get(host) for host in self.hosts]
        known = {claim.path for run in runs for site in there for claim in claims_of(run, site)}
        return [find for find in finds if known.isdisjoint(keepers(find.path))]

    def _names(self, path: bytes) -> Iterator[str]:
        """Return the names that an entry may have for this place."""
        try:
            text = path.decode()
        except UnicodeDecodeError:
            return  # not UTF-8, which every text of the database is
        yield from names_of(text, map(self.sites.get, self.hosts))

    async def _still(
        self, database: Database, claims: Sequence[ClaimedPlace]
    ) -> list[ClaimedPlace]:
        """Return those copies whose entries still name a place where nothing is."""
        # A walk takes hours, in which a listener may have moved, deleted or repaired the copy: read
        # the entry again, then look again.
        runs = await database.located([self.site.name], [claim.location for claim in claims])
        known = {claim.path for run in runs for claim in claims_of(run, self.site) if claim.must}
        gone = [claim for claim in claims if claim.path in known]
        return await trio.to_thread.run_sync(
            lambda: [claim for claim in gone if not os.path.lexists(claim.path)]
        )

    async def _done(self, database: Database, find: Find) -> dict[str, Any]:
        """Delete or register a find as requested, and return its row."""
        row = _find_row(find)
        if find.trouble is not None:
            return {**row, "state": find.trouble, "ok": False}
        if not self.act:
            return {**row, "state": "unknown"}
        # The mark ties the deletion to this very file: what replaces it later stays.
        mark = await trio.to_thread.run_sync(self._mark, find.path)
        # Then measure it, then ask the database: whoever begins to make a copy there adds the
        # entry first, or changes the files, and both stop us.
        latest = await trio.to_thread.run_sync(measured, find.path, find.kind)
        if not await self._unknown(database, [find]):
            return {**row, "state": "left alone: it has an entry by now"}
        if latest.trouble is not None or latest.changed > self.before:
            return {**row, "state": f"left alone: {latest.trouble or 'it has changed recently'}"}
        if self.act == "delete":
            return {**row, **await self._deleted(find, mark)}
        return {**row, **await self._registered(database, find)}

    async def _deleted(self, find: Find, mark: str | None) -> dict[str, Any]:
        if self.dry_run:
            return {"state": "would be deleted"}
        try:
            path = os.fsdecode(find.path)
            await trio.to_thread.run_sync(erase, path, self.site.roots, mark)
        except (Retry, GiveUp) as error:
            return {"state": f"not deleted: {error}", "ok": False}
        return {"state": "deleted"}

    def _mark(self, path: bytes) -> str | None:
        return identity(confine_entry(os.fsdecode(path), self.site.roots))

    async def _registered(self, database: Database, find: Find) -> dict[str, Any]:
        if find.kind != "stray":  # what is left of a transfer or a deletion is not complete
            return {"state": "left alone: it is not a copy"}
        try:
            found = found_at(os.fsdecode(find.path), self.site, self.sites)
            choice = named(None, *run_called(found.real))
            row = await found.enter(database, choice, None, dry_run=self.dry_run)
        except (NoSuchRun, NothingToDo, GiveUp) as error:
            return {"state": f"left alone: {error}"}
        return {"run": row["run"], "state": row["state"]}


async def _paged(pages: Iterator[list[Any]]) -> AsyncIterator[list[Any]]:
    """Iterate over a blocking iterator's pages in a thread."""
    while (page := await trio.to_thread.run_sync(next, pages, None)) is not None:
        yield page


def claims_of(run: Run, site: Site) -> Iterator[ClaimedPlace]:
    """Return the places at that site that a run's entries name, with links resolved."""
    for copy in run.at([site.name]):
        # The first place is the location itself; the second, if it is a link, what it leads to.
        # Only the first must exist: a dangling link is for `caxev verify`.
        for number, path in enumerate(places(copy.location)):
            # In any other state files may be missing for good reasons.
            is_whole = copy.status == TRANSFERRED
            must = is_whole and copy.host == site.name and number == 0
            about = (str(run.id), run.number, run.name, copy.type, copy.version)
            yield ClaimedPlace(path, must, *about, copy.location or "")
        for moved in (copy.moving_to, copy.moved_from):
            yield from map(ClaimedPlace, places(moved))
        yield from map(ClaimedPlace, _hidden(copy, site))


def _hidden(copy: Copy, site: Site) -> Iterator[bytes]:
    """Return the hidden places of a copy that is being made, moved, erased or repaired."""
    for path in places(copy.location):
        if copy.status == MOVING:
            yield hidden(path, MOVED)
        if copy.status == DELETING:
            yield hidden(path, GONE)
    aside = copy.quarantine
    if aside is not None:
        # If the entry has no place, compute it as `set_aside` does.
        with suppress(GiveUp):
            here = (copy.location or "", site.roots, aside.at)
            yield from places(aside.place or os.fsdecode(quarantine_of(*here)))


def _when(seconds: float) -> str | None:
    """Return a file's time; None if it is out of the range of dates, which a disk allows."""
    try:
        return time(datetime.fromtimestamp(seconds, UTC))
    except (ValueError, OverflowError, OSError):
        return None


def _find_row(find: Find) -> dict[str, Any]:
    return {
        "what": find.kind,
        "path": os.fsdecode(find.path),
        "files": find.files,
        "bytes": find.size,
        "changed": _when(find.changed),
        "run": None,
        "type": None,
        "version": None,
        "ok": True,
    }


def _gone_row(claim: ClaimedPlace) -> Row:
    run = run_parts(claim.run, claim.number, claim.name)
    return {
        "what": "gone",
        "path": claim.location,
        "files": 0,
        "bytes": None,
        "changed": None,
        "run": run,
        "type": claim.type,
        "version": claim.version,
        "state": f"{' '.join(filter(None, (claim.type, claim.version)))} of run {run}",
    }
