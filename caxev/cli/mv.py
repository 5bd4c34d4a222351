"""Run ``caxev mv``: move the files of a copy to another directory of their site.

The entry names the place of the files at every moment. The steps, in order:

1. The entry becomes ``moving``, with `moving_to`, unless a copy is being made from it. From then on
   it does not count, and no reaction begins to read it; we wait for those that already do.
2. The files are renamed. To another file system they are copied, read again and compared, and the
   old ones are renamed to a hidden name, `moved_from`.
3. The entry becomes ``transferred``, at the new place.
4. The files under the hidden name are removed, and `moved_from` is unset.

If it was killed at any point, the same command continues. If nothing was moved, step 1 is undone.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import click
import trio
from attrs import evolve, frozen

from caxev.asking.base import DataChoice
from caxev.asking.deletions import copy_at
from caxev.cli.command import command
from caxev.cli.interrupts import stop_if_interrupted
from caxev.cli.options import as_json, options
from caxev.cli.output import print_line, show_lines
from caxev.cli.runs import copy_cells
from caxev.cli.selection import RunChoice, selects_data, selects_run
from caxev.cli.site_paths import at_disks, ours, own_name
from caxev.cli.values import SITE
from caxev.config import Site, Sites
from caxev.copies.lifecycle import manifest_of
from caxev.copies.remaining import unread
from caxev.copies.sharing import sharing_here
from caxev.core.clock import utcnow
from caxev.core.errors import GiveUp, NothingToDo
from caxev.core.escapes import escaped
from caxev.core.model import MOVING, TRANSFERRED, Copy, CopyKey, Run
from caxev.core.update import RunUpdate
from caxev.failpoints import point
from caxev.files import (
    MOVED_PREFIX,
    Confined,
    Manifest,
    beside,
    confine,
    confine_own,
    digest_tree,
    inside,
    local,
    make_parents,
    parent,
    printable,
    process_lock,
    safe_name,
    scan,
)
from caxev.files.publishing import rename_new
from caxev.files.resolved import remove, sync

if TYPE_CHECKING:
    from caxev.database import Database

_WITHDRAWING: Final = 10.0
"""The time limit, in seconds, for undoing the first step."""


@command(
    "caxev mv --run 123 --site lngs --to /data2/raw",
    "caxev mv --run 123 --site lngs --to /data2/raw --dry-run",
    "caxev mv --name 161111_1434 --site lngs --type processed --version v6.8.0 --to /data2/p",
    output=as_json,
)
@selects_run()
@click.option("--site", type=SITE, required=True, help="The site of this machine and the copy.")
@selects_data
@click.option("--to", required=True, metavar="PATH", help="The directory to move it to.")
@click.option("--dry-run", is_flag=True, help="Show what would be moved; touch nothing.")
def mv(*, run: RunChoice, site: str, data: DataChoice, to: str, dry_run: bool) -> None:
    """Move the files of a copy to another directory of its site.

    Run it on the site's own machine. The copy keeps its name: PATH is the directory to move it
    to, with or without that name. If the command is killed, give it again: it continues.
    """
    here = ours(site)

    async def move(database: Database) -> Mapping[str, Any]:
        key = copy_at(await run.find_one(database), data, site).key
        async with at_disks(database, here, options().sites()) as (there, sites):
            one = MoveCommand(there, sites, key, run, to)
            return await (one.plan(database) if dry_run else one.go(database))

    row = options().with_database(move)
    show_lines([row], lambda row: f"{row['state']}: {row['from']} -> {row['to']}")


@frozen
class Move:
    """Files to move from one place to another, both resolved and inside the site's roots.

    `aside`: the hidden name of the old files if they are copied and not renamed.
    """

    copy: Copy
    old: str
    new: str

    @property
    def aside(self) -> str:
        directory, name = os.path.split(self.old)
        return f"{directory}/{MOVED_PREFIX}{name}"

    @property
    def untouched(self) -> bool:
        """Return whether all files are at the old place, and nothing is at the new one."""
        return os.path.lexists(self.old) and not os.path.lexists(self.new)

    def row(self, run: Run, what: str) -> Mapping[str, Any]:
        """Return the row that the command prints."""
        return {**copy_cells(run, self.copy.key), "from": self.old, "to": self.new, "state": what}


def plan_move(run: Run, key: CopyKey, site: Site, to: str) -> Move:
    """Plan the move. Raises `NothingToDo`, and `GiveUp` for a place outside of the site.

    Reads no file, but resolves links.
    """
    # A copy that is `moving` is accepted, too: an earlier call was killed, and this one continues.
    copy = run.copy(key)
    if copy is None:
        raise NothingToDo(f"{run} has no copy: {key}")
    if copy.location is None or copy.status not in (TRANSFERRED, MOVING):
        raise NothingToDo(
            f"{run}: {key} is {copy.status}, and only a transferred copy can be moved"
        )
    here, name = confine(copy.location, site.roots), safe_name(copy.location)
    # The name stays: it is the run's, and `caxev register` and people search for it.
    place = os.path.abspath(to)
    there = confine(place if os.path.basename(place) == name else f"{place}/{name}", site.roots)
    old, new = os.fsdecode(here), os.fsdecode(there)
    if inside(there, here):  # a directory cannot be renamed into itself
        raise NothingToDo(f"{escaped(new)} is inside the directory to be moved")
    heading = copy.moving_to
    if copy.status == MOVING and heading != new:
        raise NothingToDo(f"{run}: {key} is being moved to {heading}: finish that first (--to)")
    return Move(copy, old, new)


@frozen
class MoveCommand:
    """One copy to move at this machine's site."""

    site: Site
    sites: Sites
    key: CopyKey
    choice: RunChoice
    to: str

    async def plan(self, database: Database) -> Mapping[str, Any]:
        """Return what would be moved."""
        run = await self.choice.find_one(database)
        move = plan_move(run, self.key, self.site, self.to)
        self._sure_free(move)
        await self._sure_alone(database, run, move)
        return move.row(run, "already there" if move.old == move.new else "would be moved")

    async def go(self, database: Database) -> Mapping[str, Any]:
        """Move it. Raises `NothingToDo`, and for errors of the disk `Retry` or `GiveUp`."""
        # Only one process of this machine at a time: a second one would take the first one's claim
        # for that of a killed command, and undo it.
        run = await self.choice.find_one(database)
        # The run is read again under the lock: the process before us may have moved the copy.
        busy = f"{run}: {self.key} is being moved by another process"
        with process_lock(f"mv {run.id} {self.key}".encode(), busy):
            return await self._go(database)

    async def _go(self, database: Database) -> Mapping[str, Any]:
        run = await self.choice.find_one(database)
        move = plan_move(run, self.key, self.site, self.to)
        if move.old == move.new:
            # An earlier call may have been killed in its last step.
            await self._clear(database, run, move.copy)
            return move.row(run, "already there")
        self._sure_free(move)
        await self._sure_alone(database, run, move)
        run, moving = await self._claim(database, run, move)
        point("mv.claimed")
        is_recorded = False
        try:
            # Only after the claim: from then on no further reaction begins to read the copy, so
            # that this wait has an end.
            await self._alone(database, run)
            expected = await manifest_of(database, moving.manifest)
            aside = await trio.to_thread.run_sync(bring, move, self.site, expected)
            place = own_name(move.new, self.site, self.key.type)
            run = await self._record(database, run, moving, location=place, moved_from=aside)
            is_recorded = True
            point("mv.written")
        finally:  # also on Ctrl-C: an entry left as `moving` would keep the copy from counting
            if not is_recorded:
                await self._withdraw(database, run, moving, move)
        done = run.copy(self.key)
        if done is not None:
            await self._clear(database, run, done)
        return move.row(run, "moved")

    @staticmethod
    def _sure_free(move: Move) -> None:
        # In a move that continues, what is at the new place is ours, and `bring` compares it.
        if move.copy.status != MOVING and move.old != move.new and os.path.lexists(move.new):
            raise NothingToDo(f"{escaped(move.new)} exists already and is not replaced")

    async def _sure_alone(self, database: Database, run: Run, move: Move) -> None:
        """Raise `NothingToDo` if another entry has the same files: it would lose them."""
        if others := await sharing_here(database.neighbours, run, move.copy, self.site, self.sites):
            raise NothingToDo(
                f"{escaped(move.old)} is at, above or below the files of {others[0]}, which would "
                "lose them: remove that entry first"
            )

    async def _claim(self, database: Database, run: Run, move: Move) -> tuple[Run, Copy]:
        if move.copy.status == MOVING:  # claimed by an earlier call
            return run, move.copy
        # The write expects the entry as we read it, and that no copy is being made from it; the
        # database checks both with the write.
        who = f"{self.site.name}: caxev mv on {socket.gethostname()}"
        update = RunUpdate.change_copy(
            run,
            move.copy,
            MOVING,
            unread(self.key, self.sites, utcnow()),
            moving_to=move.new,
            owner=who,
        )
        return await self._written(database, run, update)

    async def _written(self, database: Database, run: Run, update: RunUpdate) -> tuple[Run, Copy]:
        found = await database.update_run(update, utcnow())
        copy = None if found is None else found.copy(self.key)
        if found is None or copy is None:
            raise NothingToDo(
                f"{run}: {self.key} is being read or has just changed: see caxev status, and try "
                "again"
            )
        return found, copy

    async def _alone(self, database: Database, run: Run) -> None:
        """Wait for the reactions of this site that were running on the run before us."""
        name = self.site.name
        record = await database.site_record(name)
        if record is None or not record.active:  # without a listener no reaction runs
            return
        # Follow before the first query, so that no change between the two is missed.
        async with database.follow(run.id, [name]) as changed:
            while running := await database.reactions(name, run=run.id, state="running"):
                names = ", ".join(sorted({reaction.handler for reaction, _ in running}))
                print_line(f"caxev: waiting for {names} of {run} at {name}", err=True)
                await changed()

    async def _record(self, database: Database, run: Run, moving: Copy, **fields: Any) -> Run:
        update = RunUpdate.change_copy(
            run, moving, TRANSFERRED, moving_to=None, owner=None, **fields
        )
        return (await self._written(database, run, update))[0]

    async def _withdraw(self, database: Database, run: Run, moving: Copy, move: Move) -> None:
        """Reset the entry to the old place, if all files are still there."""
        # If anything has moved, the entry stays `moving`, and the same command continues.
        if move.untouched:
            # Shielded, because we may be here by Ctrl-C; limited, as the database may be away.
            with trio.move_on_after(_WITHDRAWING, shield=True):
                await self._record(database, run, moving)

    async def _clear(self, database: Database, run: Run, copy: Copy) -> None:
        """Remove the files under the hidden name."""
        # The entry is input from outside: remove only what has our prefix, inside of our roots.
        aside = copy.moved_from
        if aside is None or not os.path.basename(aside).startswith(MOVED_PREFIX):
            return
        real = confine_own(aside, self.site.roots)
        await trio.to_thread.run_sync(_remove, real)
        point("mv.removed")
        # The field goes after the files: killed in between, the next call removes nothing, and
        # unsets the field.
        seen = copy.as_seen
        forget = RunUpdate(run.id, (seen,), change=(seen, {"moved_from": None}))
        await self._written(database, run, forget)


def bring(move: Move, site: Site, expected: Manifest | None) -> str | None:
    """Move the files to their new place; return the hidden name of the old ones, if any.

    Raises `GiveUp` if the files do not match `expected` (None: unknown), or something else has the
    new name; `Retry` if the disk fails. At every moment the whole copy is at the old place or at
    the new one. If interrupted, it can be called again.
    """
    old, new = confine(move.old, site.roots), confine(move.new, site.roots)
    here, there = os.path.lexists(old), os.path.lexists(new)
    # Nothing at the old place: an earlier call was killed after its last rename.
    if not here:
        if not there:
            raise GiveUp(f"there is nothing at {escaped(move.old)} or {escaped(move.new)}")
        _sure_shape(new, expected)
        with local(new, "sync"):
            _synced(old, new)  # the earlier call may have been killed before it did
        return move.aside if os.path.lexists(move.aside) else None
    _sure_shape(old, expected)
    if not there:
        make_parents(new, site.roots)
        with local(new, "write"):
            try:
                rename_new(old, new)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
            else:
                _synced(old, new)
                point("mv.renamed")
                return None
    # Both places, or another file system: make, or finish and compare, the copy at the new place
    # before the old files lose their name.
    _copied(old, new, site, expected)
    point("mv.copied")
    with local(old, "rename"):
        rename_new(old, beside(old, MOVED_PREFIX))
        _synced(old, new)
    point("mv.aside")
    return move.aside


def _sure_shape(path: Confined, expected: Manifest | None) -> None:
    if expected is None:
        return
    if differ := expected.shape().differences(scan(path)):
        raise GiveUp(
            f"{printable(path)} differs from its manifest: {differ[0]} ({len(differ)} in all)"
        )


def _copied(old: Confined, new: Confined, site: Site, expected: Manifest | None) -> None:
    """Copy the old files to the new place, read the copy again, and compare."""
    from caxev.transfer import Route
    from caxev.transfer.local import Local

    # No hard links: the comparison below would compare the files with themselves.
    own = evolve(site, hard_links=False)
    route = Route(own, own, os.fsdecode(new), os.fsdecode(old), expected, min_free=site.min_free)
    Local().pull(route, report=stop_if_interrupted)
    point("mv.written")
    # Read both from the disk: without a manifest, only the old files can prove the new ones.
    wanted = expected or digest_tree(old, sha512=False, report=stop_if_interrupted)
    found = digest_tree(new, sha512=False, report=stop_if_interrupted)
    if wanted.digest != found.digest:
        differ = wanted.differences(found)
        _remove(new)
        raise GiveUp(
            f"{printable(old)} could not be copied: {differ[0]} ({len(differ)} in all); see "
            "caxev verify --deep"
        )


def _synced(old: Confined, new: Confined) -> None:
    for path in {parent(old), parent(new)}:
        sync(path)


def _remove(path: Confined) -> None:
    with local(path, "remove"):
        remove(path)
