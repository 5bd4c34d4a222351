"""``caxev mv``: the files of a copy go to another directory of their own site.

The entry says at every moment where the files are. In the order of what happens:

1. the entry becomes ``moving``, with `moving_to`, if nobody makes a copy from it: from then on
   nobody counts on it and no reaction begins to read it; those that read it already are waited for;
2. the files are renamed, or, where that is another file system, copied, read again and compared,
   and the old ones are given a hidden name, `moved_from`;
3. the entry is told: ``transferred``, at the new place;
4. what was given the hidden name is removed, and the entry forgets it.

Killed anywhere, the same command goes on. Where nothing was moved, the first step is taken back.
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

from caxev.cli.completion import SITE
from caxev.cli.errors import NothingToDo
from caxev.cli.options import as_json, example, global_options, state
from caxev.cli.output import print_line, show_json
from caxev.cli.selection import of_data, one_run
from caxev.config import Site, Sites
from caxev.core.errors import GiveUp, Retry
from caxev.core.escapes import escaped
from caxev.failpoints import point

if TYPE_CHECKING:
    from caxev.cli.runs import Wanted
    from caxev.core.model import Copy, CopyKey, Run, RunUpdate
    from caxev.database import Database
    from caxev.files import Manifest

_WITHDRAWING: Final = 10.0
"""Seconds that taking back may take."""


@click.command(
    epilog=example(
        "caxev mv --run 123 --site lngs --to /data2/raw",
        "caxev mv --run 123 --site lngs --to /data2/raw --dry-run",
        "caxev mv --name 161111_1434 --site lngs --type processed --version v6.8.0 --to /data2/p",
    )
)
@one_run
@click.option("--site", type=SITE, required=True, help="The site of this machine and the copy.")
@of_data
@click.option("--to", required=True, metavar="PATH", help="The directory to move it to.")
@click.option("--dry-run", is_flag=True, help="Show what would be moved; touch nothing.")
@as_json
@global_options(hidden=True)
def mv(
    *,
    number: int | None,
    name: str | None,
    detector: str | None,
    site: str,
    kind: str,
    version: str | None,
    to: str,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Move the files of a copy to another directory of its site.

    Run it on the site's own machine. The copy keeps its name: PATH is the directory to move it
    to, with or without that name. If the command is killed, give it again: it continues.
    """
    from caxev.cli.runs import one
    from caxev.cli.site_paths import at_disks, ours
    from caxev.core.model import CopyKey

    if (number is None) == (name is None):
        raise click.UsageError("say which run: --run or --name")
    options = state()
    options.log("warning")
    here = ours(site)

    async def move(database: Database) -> Mapping[str, Any]:
        async with at_disks(database, here, options.sites()) as (there, sites):
            key, wanted = CopyKey(kind, site, version), one(number, name, detector)
            errand = Errand(there, sites, key, wanted, to)
            return await (errand.plan(database) if dry_run else errand.go(database))

    row = options.with_database(move)
    if as_json:
        show_json([row])
    else:
        print_line(f"{row['state']}: {row['from']} -> {row['to']}")


@frozen
class Move:
    """Files that are to go from one place to another, both resolved and inside the site's roots.

    `aside`: where the old files wait for their removal, where they cannot be renamed.
    """

    copy: Copy
    old: str
    new: str

    @property
    def aside(self) -> str:
        from caxev.files import MOVED_PREFIX

        directory, name = os.path.split(self.old)
        return f"{directory}/{MOVED_PREFIX}{name}"

    @property
    def untouched(self) -> bool:
        """Whether all files are where they were, and nothing is where they go."""
        return os.path.lexists(self.old) and not os.path.lexists(self.new)

    def row(self, run: Run, what: str) -> Mapping[str, Any]:
        """Return what the command prints of it."""
        from caxev.cli.runs import shown

        return {
            "run": shown(run),
            "type": self.copy.type,
            "version": self.copy.version,
            "host": self.copy.host,
            "from": self.old,
            "to": self.new,
            "state": what,
        }


def plan_move(run: Run, key: CopyKey, site: Site, to: str) -> Move:
    """Decide what is to be moved where. Raises `NothingToDo`, and `GiveUp` for a place not ours.

    Looks at no file but to see where links lead.
    """
    from caxev.core.model import MOVING, TRANSFERRED
    from caxev.files import confine, inside, safe_name

    copy = run.copy(key)
    if copy is None:
        raise NothingToDo(f"{run} has no copy: {key}")
    if copy.location is None or copy.status not in (TRANSFERRED, MOVING):
        raise NothingToDo(f"{run}: {key} is {copy.status}, and only what is transferred is moved")
    old, name = confine(copy.location, site.roots), safe_name(copy.location)
    place = os.path.abspath(to)
    new = confine(place if os.path.basename(place) == name else f"{place}/{name}", site.roots)
    if inside(os.fsencode(new), os.fsencode(old)):
        raise NothingToDo(f"{escaped(new)} is inside of what is to be moved")
    heading = copy.fields.get("moving_to")
    if copy.status == MOVING and heading != new:
        raise NothingToDo(f"{run}: {key} is on its way to {heading}: finish that first (--to)")
    return Move(copy, old, new)


@frozen
class Errand:
    """One copy to be moved at the site where we are."""

    site: Site
    sites: Sites
    key: CopyKey
    wanted: Wanted
    to: str

    async def plan(self, database: Database) -> Mapping[str, Any]:
        """Say what would be moved."""
        run = await self.wanted.find_one(database, database.settings)
        move = plan_move(run, self.key, self.site, self.to)
        self._sure_free(move)
        await self._sure_alone(database, run, move)
        return move.row(run, "it is there" if move.old == move.new else "would be moved")

    async def go(self, database: Database) -> Mapping[str, Any]:
        """Move it. Raises `NothingToDo`, or what the disk says as `Retry` or `GiveUp`.

        One process of this machine at a time: a second one would take back what the first has
        claimed.
        """
        from caxev.files import process_lock

        run = await self.wanted.find_one(database, database.settings)
        busy = f"{run}: {self.key} is being moved by another process"
        with process_lock(f"mv {run.id} {self.key}".encode(), busy):
            return await self._go(database)

    async def _go(self, database: Database) -> Mapping[str, Any]:
        from caxev.cli.site_paths import own_name

        run = await self.wanted.find_one(database, database.settings)
        move = plan_move(run, self.key, self.site, self.to)
        if move.old == move.new:
            await self._clear(database, run, move.copy)
            return move.row(run, "it is there")
        self._sure_free(move)
        await self._sure_alone(database, run, move)
        run, moving = await self._claim(database, run, move)
        point("mv.claimed")
        told = False
        try:
            await self._alone(database, run)
            expected = await self._expected(database, moving)
            aside = await trio.to_thread.run_sync(bring, move, self.site, expected)
            place = own_name(move.new, self.site, self.key.type)
            run = await self._tell(database, run, moving, location=place, moved_from=aside)
            told = True
            point("mv.told")
        finally:
            if not told:
                await self._withdraw(database, run, moving, move)
        done = run.copy(self.key)
        if done is not None:
            await self._clear(database, run, done)
        return move.row(run, "moved")

    @staticmethod
    def _sure_free(move: Move) -> None:
        from caxev.core.model import MOVING

        if move.copy.status != MOVING and move.old != move.new and os.path.lexists(move.new):
            raise NothingToDo(f"{escaped(move.new)} exists already and is not replaced")

    async def _sure_alone(self, database: Database, run: Run, move: Move) -> None:
        """Raise `NothingToDo` if the files are another entry's as well: it would lose its own."""
        from caxev.copies.sharing import sharing_here

        if others := await sharing_here(database.neighbours, run, move.copy, self.site, self.sites):
            raise NothingToDo(
                f"{escaped(move.old)} is at, above or below the files of {others[0]}, which would "
                "lose them: take that entry out first"
            )

    async def _claim(self, database: Database, run: Run, move: Move) -> tuple[Run, Copy]:
        from caxev.copies.deletion import unread
        from caxev.core.clock import utcnow
        from caxev.core.model import MOVING, RunUpdate

        if move.copy.status == MOVING:
            return run, move.copy
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
        from caxev.core.clock import utcnow

        found = await database.update_run(update, utcnow())
        copy = None if found is None else found.copy(self.key)
        if found is None or copy is None:
            raise NothingToDo(
                f"{run}: {self.key} is being read or has just changed: see caxev status, and try "
                "again"
            )
        return found, copy

    async def _alone(self, database: Database, run: Run) -> None:
        """Wait until no reaction of this site that began before us is at work on the run."""
        name = self.site.name
        record = await database.site_record(name)
        if record is None or not record.active:
            return
        async with database.follow(run.id, [name]) as changed:
            while running := await database.reactions(name, run=run.id, state="running"):
                names = ", ".join(sorted({reaction.handler for reaction, _ in running}))
                print_line(f"caxev: waiting for {names} of {run} at {name}", err=True)
                await changed()

    async def _expected(self, database: Database, copy: Copy) -> Manifest | None:
        from caxev.files import Manifest

        rows = None if copy.manifest is None else await database.load_manifest(copy.manifest)
        return None if rows is None else Manifest.from_rows(rows)

    async def _tell(self, database: Database, run: Run, moving: Copy, **fields: Any) -> Run:
        from caxev.core.model import TRANSFERRED, RunUpdate

        update = RunUpdate.change_copy(
            run, moving, TRANSFERRED, moving_to=None, owner=None, **fields
        )
        return (await self._written(database, run, update))[0]

    async def _withdraw(self, database: Database, run: Run, moving: Copy, move: Move) -> None:
        """Say that the copy is good where it was, if all of it still is."""
        if move.untouched:
            with trio.move_on_after(_WITHDRAWING, shield=True):
                await self._tell(database, run, moving)

    async def _clear(self, database: Database, run: Run, copy: Copy) -> None:
        """Remove what an earlier step has put aside."""
        from caxev.core.model import RunUpdate
        from caxev.files import MOVED_PREFIX, confine_own

        aside = copy.fields.get("moved_from")
        if not isinstance(aside, str) or not os.path.basename(aside).startswith(MOVED_PREFIX):
            return
        real = confine_own(aside, self.site.roots)
        await trio.to_thread.run_sync(_remove, real)
        point("mv.removed")
        seen = copy.as_seen
        forget = RunUpdate(run.id, (seen,), change=(seen, {"moved_from": None}))
        await self._written(database, run, forget)


def bring(move: Move, site: Site, expected: Manifest | None) -> str | None:
    """Have the files stand at their new place alone; where the old ones were put aside, if so.

    Raises `GiveUp` where the files are not what `expected` says (None: not known), or something
    else has the new name; `Retry` for what the disk refuses. Until it returns, all of the copy
    stands at the old place or all of it at the new one. Called again, it goes on.
    """
    from caxev.files import local, make_parents, rename_new

    here, there = os.path.lexists(move.old), os.path.lexists(move.new)
    if not here:
        if not there:
            raise GiveUp(f"there is nothing at {escaped(move.old)}, nor at {escaped(move.new)}")
        _sure_shape(move.new, expected)
        return move.aside if os.path.lexists(move.aside) else None
    _sure_shape(move.old, expected)
    if not there:
        make_parents(move.new, site.roots)
        with local(os.fsencode(move.new), "write"):
            try:
                rename_new(move.old, move.new)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
            else:
                _synced(move)
                point("mv.renamed")
                return None
    _copied(move, site, expected)
    point("mv.copied")
    with local(os.fsencode(move.old), "rename"):
        rename_new(move.old, move.aside)
        _synced(move)
    point("mv.aside")
    return move.aside


def _sure_shape(path: str, expected: Manifest | None) -> None:
    from caxev.files import scan

    if expected is None:
        return
    if differ := expected.shape().differences(scan(path)):
        raise GiveUp(
            f"{escaped(path)} is not what its manifest says: {differ[0]} ({len(differ)} in all)"
        )


def _copied(move: Move, site: Site, expected: Manifest | None) -> None:
    """Have a copy of the old files at the new place, which is read again and compared."""
    from caxev.files import digest_tree
    from caxev.transfer import Route
    from caxev.transfer.local import Local

    own = evolve(site, hard_links=False)
    route = Route(own, own, move.new, move.old, expected, min_free=site.min_free)
    Local().pull(route, report=_to_nobody)
    point("mv.written")
    wanted = expected or digest_tree(move.old, sha512=False, report=_to_nobody)
    found = digest_tree(move.new, sha512=False, report=_to_nobody)
    if wanted.digest != found.digest:
        differ = wanted.differences(found)
        _remove(move.new)
        raise GiveUp(
            f"{escaped(move.old)} could not be copied: {differ[0]} ({len(differ)} in all); see "
            "caxev verify --deep"
        )


def _synced(move: Move) -> None:
    from caxev.files.resolved import sync

    for path in {os.path.dirname(move.old), os.path.dirname(move.new)}:
        sync(path)


def _remove(path: str) -> None:
    from caxev.files.resolved import remove

    try:
        remove(path)
    except OSError as error:
        raise Retry(f"cannot remove {escaped(path)}: {error.strerror}") from error


def _to_nobody(_done: int, _total: int) -> None:
    """Report to nobody."""
