"""Run ``caxev copy``: request one copy of a run, and watch until it is complete.

The command adds an entry with the status ``requested``. The listener of the target site reacts to
it, as to any other change; if that site has no listener, the source's does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from time import monotonic
from typing import TYPE_CHECKING, Any

import click
from attrs import define, field, frozen

from caxev.cli.completion import SITE
from caxev.cli.errors import FAILED, INTERRUPTED, NoSuchRun, NothingToDo
from caxev.cli.options import example, global_options, state
from caxev.cli.output import json_text
from caxev.cli.selection import of_data, one_run
from caxev.config import ConfigError
from caxev.core.escapes import escaped
from caxev.finite import Finite

if TYPE_CHECKING:
    import rich.progress

    from caxev.cli.reaction_rows import Progress
    from caxev.cli.runs import Wanted
    from caxev.config import Site, Sites
    from caxev.core.ledger import Reaction
    from caxev.core.model import Copy, CopyKey, Run
    from caxev.core.update import RunUpdate
    from caxev.database import Database

GONE = "gone"
CANCELLED = "cancelled"


@click.command(
    epilog=example(
        "caxev copy --run 123 --from lngs --to chicago",
        "caxev copy --run 123 --from lngs --to chicago --type processed --version v6.8.0",
        "caxev copy --run 123 --from lngs --to chicago --cancel",
    )
)
@one_run
@click.option("--from", "source", type=SITE, required=True, help="The site that has it.")
@click.option("--to", "target", type=SITE, required=True, help="The site that gets it.")
@of_data
@click.option("--wait/--no-wait", default=True, show_default=True, help="Watch until it is there.")
@click.option(
    "--timeout",
    type=Finite(0, min_open=True),
    metavar="SECONDS",
    help="Stop watching after that; the request stays.",
)
@click.option("--cancel", is_flag=True, help="Take back a request that nobody has begun.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on stdout.")
@global_options(hidden=True)
def copy(
    *,
    number: int | None,
    name: str | None,
    detector: str | None,
    source: str,
    target: str,
    kind: str,
    version: str | None,
    wait: bool,
    timeout: float | None,
    cancel: bool,
    as_json: bool,
) -> None:
    """Copy a run to another site, and watch until the copy is verified.

    This adds an entry that is `requested`; the listener of one of the two sites makes the copy.
    If none runs, the request waits. Ctrl-C ends the watching, not the copy.
    """
    from caxev.cli.runs import one

    if (number is None) == (name is None):
        raise click.UsageError("say which run: --run or --name")
    if source == target:
        raise click.UsageError(f"--from and --to are both {source}")
    options = state()
    options.log("warning")
    errand = Errand(
        options.sites(),
        one(number, name, detector),
        Wish(kind, version, options.sites().get(source), options.sites().get(target)),
        Display(as_json=as_json),
    )
    with errand.summed_up():
        if cancel:
            options.with_database(errand.cancel)
        else:
            patience = (timeout or float("inf")) if wait else 0.0
            options.with_database(lambda database: errand.run(database, patience))


@frozen
class Wish:
    """The type and version of the data that is wanted, its source and its target."""

    kind: str
    version: str | None
    source: Site
    target: Site

    @property
    def doer(self) -> Site:
        """Return the site whose listener makes the copy. Raises `ConfigError` if there is none."""
        # The target's listener pulls, which is preferred; a site without one is pushed to.
        for site in (self.target, self.source):
            if site.listener:
                return site
        names = f"{self.source.name} nor {self.target.name}"
        raise ConfigError(f"neither {names} has a listener of its own, says sites.json")

    def way(self, run: Run) -> Way:
        """Return the source and target copies for this run.

        Raises `NothingToDo` if the run has no copy at the source, `ConfigError` if the target keeps
        no such data.
        """
        from caxev.core.model import CopyKey

        version = self.version or _only_version(run, self.kind, self.source.name)
        source = CopyKey(self.kind, self.source.name, version)
        if run.copy(source) is None:
            raise NothingToDo(f"{run} has no copy: {source}", GONE)
        target = self.target
        if target.listener and target.directory(self.kind, version) is None:
            raise ConfigError(f"{target.name} has no directory for {self.kind} data in sites.json")
        return Way(source, CopyKey(self.kind, target.name, version))


def _only_version(run: Run, kind: str, host: str) -> str | None:
    versions = {one.version for one in run.copies if (one.type, one.host) == (kind, host)}
    if len(versions) > 1:
        named = ", ".join(sorted(version or "none" for version in versions))
        raise click.UsageError(f"{host} has several versions ({named}): say which by --version")
    return next(iter(versions), None)


@frozen
class Way:
    """From which copy to which."""

    source: CopyKey
    target: CopyKey


def why_not(run: Run, way: Way) -> str | None:
    """Return why that copy cannot be requested; None if it can. Pure."""
    from caxev.core.model import TRANSFERRED

    source, target = run.copy(way.source), run.copy(way.target)
    if target is not None and not _has_failed(target):
        return f"{run} has that copy: {target.key} is {_standing_of(target)}"
    if source is None:
        return f"{run} has no copy: {way.source}"
    if source.status != TRANSFERRED:
        return f"{source.key} is {_standing_of(source)}, and only what is transferred is copied"
    return None


def _has_failed(copy: Copy) -> bool:
    """Return whether an attempt to make the copy was given up, by us or by an old program."""
    from caxev.core.model import ERROR

    # With a checksum problem the copy is bad, not unfinished: it is repaired, not requested again.
    given_up = copy.status == ERROR and copy.trigger is not None
    return (given_up and not copy.checksumproblem) or copy.is_abandoned


def _standing_of(copy: Copy) -> str:
    return f"{copy.status} ({copy.error})" if copy.error else copy.status


def asked_for(run: Run, way: Way, who: str, now: datetime) -> RunUpdate:
    """Return the request: an entry that is added if the source is unchanged. Pure.

    A failed copy is requested again, and data that an old program left there is reused.
    """
    from caxev.core.model import REQUESTED
    from caxev.core.update import RunUpdate

    source, target = run.copy(way.source), run.copy(way.target)
    assert source is not None
    if target is not None:
        # Without the fields of the failed attempt: they would be taken for this one's.
        again = {"location": None, "source": source.host, "error": None, "trigger": None}
        again |= {"checksum": None}
        update = RunUpdate.change_copy(run, target, REQUESTED, source.as_seen, **again)
        return update.remembered(target) if target.is_abandoned else update
    return RunUpdate.add_copy(
        run,
        way.target,
        REQUESTED,
        source.as_seen,
        location=None,
        checksum=None,
        source=source.host,
        creation_time=now,
        creation_place=who,
    )


@frozen
class Standing:
    """The state of the copy: its status, `words` about it, its progress; `over`: it is final."""

    status: str
    words: str = ""
    progress: Progress | None = None
    over: bool = False

    @property
    def line(self) -> str:
        parts = (self.status, self.words, str(self.progress or ""))
        return ": ".join(part for part in parts if part)


def standing(run: Run | None, key: CopyKey, reactions: Iterable[tuple[Reaction, Any]]) -> Standing:
    """Return the state of a requested copy, from its run and reactions. Pure."""
    from caxev.core.model import ERROR, TRANSFERRED

    copy = None if run is None else run.copy(key)
    if copy is None:
        return Standing(GONE, "the request was taken back", over=True)
    if copy.status == TRANSFERRED:
        return Standing(copy.status, over=True)
    if copy.status == ERROR:
        return Standing(copy.status, copy.error or "", over=True)
    return _under_way(copy, [pair for pair in reactions if pair[0].aspect == key])


def _under_way(copy: Copy, reactions: Sequence[tuple[Reaction, Any]]) -> Standing:
    from caxev.cli.reaction_rows import Progress
    from caxev.core.ledger import State
    from caxev.core.model import REQUESTED

    # Only these react to the present status: the others belong to an earlier entry of that copy.
    current = [reaction for reaction, _ in reactions if reaction.after == copy.seen_as]
    # A reaction that is done, and has left the copy as `requested`, has declined it. In later
    # states only a failure is final.
    notes = [f"{d.handler} at {d.site}: {d.note}" for d in current if d.note]
    words, states = "; ".join(notes), {reaction.state for reaction in current}
    ended = {State.FAILED} if copy.status != REQUESTED else {State.FAILED, State.DONE}
    if states and states <= ended:
        return Standing(copy.status, words or "nobody makes this copy", over=True)
    known = [Progress.of(document.get("progress")) for _, document in reactions]
    moving = [progress for progress in known if progress is not None]
    return Standing(copy.status, words, Progress.sum(moving) if moving else None)


# -- doing it -----------------------------------------------------------------------------------


@define(eq=False)
class Errand:
    """One call of the command; `last` is the latest state of the copy that was read."""

    sites: Sites
    wanted: Wanted
    wish: Wish
    display: Display
    last: Standing | None = None
    found: Run | None = None
    size: int | None = None
    _begun: float = field(init=False, factory=monotonic)

    async def run(self, database: Database, patience: float) -> None:
        """Request the copy, and watch it for `patience` seconds at most."""
        import trio

        doer = self.wish.doer.name
        way = await self._ask(database)
        record = await database.site_record(doer)
        if record is None or not record.active:
            from caxev.cli.replay import nobody

            self.display.print_line(f"{doer}: {nobody(doer)}")
        if not patience:
            return
        with trio.move_on_after(patience) as scope:
            await self._watch(database, way)
        if scope.cancelled_caught:
            raise NothingToDo(f"not done after {patience:g} s; {self._left()}")

    async def _ask(self, database: Database) -> Way:
        from caxev.cli.replay import me
        from caxev.core.clock import utcnow
        from caxev.core.model import REQUESTED

        run = await self._find(database)
        way = self.wish.way(run)
        # The write expects the run as it was read. If it has changed meanwhile, decide again.
        while (why := why_not(run, way)) is None:
            update = asked_for(run, way, me(), utcnow())
            if await database.update_run(update, utcnow()) is not None:
                self._note(Standing(REQUESTED))
                return way
            run = await self._read(database, run)
        there = run.copy(way.target)
        raise NothingToDo(why, GONE if there is None else there.status)

    async def _find(self, database: Database) -> Run:
        self.found = await self.wanted.find_one(database, database.settings)
        return self.found

    async def _read(self, database: Database, run: Run) -> Run:
        found = (await database.runs([run.id])).get(run.id)
        if found is None:
            raise NoSuchRun(f"{run} was deleted")
        return found

    async def _watch(self, database: Database, way: Way) -> None:
        """Show the state of the copy at each change, until it is final."""
        import trio

        from caxev.database import DatabaseError, is_transient

        trouble = ""
        with self.display.live():
            while True:
                try:
                    await self._follow(database, way)
                except DatabaseError as error:
                    if not is_transient(error):
                        raise
                    # A fail-over takes seconds, and the copy goes on without us.
                    if str(error) != trouble:
                        trouble = str(error)
                        self.display.print_line(f"{trouble}; trying again")
                    await trio.sleep(1.0)
                else:
                    return

    async def _follow(self, database: Database, way: Way) -> None:
        assert self.found is not None
        run, sites = self.found.id, (self.wish.source.name, self.wish.target.name)
        # Follow before the first read, so that no change between the two is missed.
        async with database.follow(run, sites) as changed:
            while True:
                # Reactions before the run: a reaction settles after its writes to the run, so the
                # run that is read next has them.
                reactions = [
                    pair for site in sites for pair in await database.reactions(site, run=run)
                ]
                found = (await database.runs([run])).get(run)
                self._weigh(found, way)
                self._note(standing(found, way.target, reactions))
                if self.last is None or self.last.over:
                    return
                await changed()

    def _weigh(self, run: Run | None, way: Way) -> None:
        """Set the copy's size from its entry, or from the run's document."""
        copy = None if run is None else run.copy(way.target)
        if run is None or copy is None:
            return
        # For the summary only: an entry has its size once the copy is made.
        size = copy.size
        if size is None and copy.type == "raw":
            size = run.raw_size
        self.size = self.size if size is None else size

    def _note(self, now: Standing) -> None:
        if now.progress is not None and now.progress.total is not None:
            self.size = self.size or now.progress.total
        if now != self.last:
            self.display.show(now)
        self.last = now

    async def cancel(self, database: Database) -> None:
        """Take the request back. Raises `NothingToDo` if there is none any more."""
        from caxev.core.clock import utcnow
        from caxev.core.model import REQUESTED, CopyKey
        from caxev.core.update import RunUpdate

        run, name = await self._find(database), self.wish.target.name
        version = self.wish.version or _only_version(run, self.wish.kind, name)
        key = CopyKey(self.wish.kind, name, version)
        while (there := run.copy(key)) is not None:
            if there.status != REQUESTED:
                raise NothingToDo(f"{key} is {_standing_of(there)}: too late", there.status)
            if there.source != self.wish.source.name:
                raise NothingToDo(f"{key} was asked for from {there.source}", there.status)
            if await database.update_run(RunUpdate.remove_copy(run, there), utcnow()) is not None:
                self._note(Standing(CANCELLED))
                return
            run = await self._read(database, run)
        raise NothingToDo(f"nobody asks for {key} of {run}", GONE)

    def _left(self) -> str:
        """Return a line about what goes on after the watching ends."""
        from caxev.cli.runs import which
        from caxev.core.model import REQUESTED

        if self.last is None or self.found is None:
            return "nothing was asked for"
        if self.last.status != REQUESTED:
            return "the copying goes on"
        wish = self.wish
        kind = "" if wish.kind == "raw" else f" --type {wish.kind}"
        version = "" if wish.version is None else f" --version {wish.version}"
        where = f"--from {wish.source.name} --to {wish.target.name}"
        back = f"caxev copy {which(self.found)} {where}{kind}{version} --cancel"
        return f"the request stands; to take it back: {back}"

    @contextmanager
    def summed_up(self) -> Iterator[None]:
        """End with the JSON object, if wanted, and with an exit code for the result."""
        try:
            yield
        except KeyboardInterrupt:  # it ends the watching only, so print how to cancel the request
            self.display.print_line(f"interrupted: {self._left()}")
            self._sum_up(None)
            raise click.exceptions.Exit(INTERRUPTED) from None
        except NothingToDo as nothing:
            self._sum_up(nothing.status)
            raise
        self._sum_up(None)
        if self.last is not None and self.last.over and self.last.status != "transferred":
            raise click.exceptions.Exit(FAILED)

    def _sum_up(self, status: str | None) -> None:
        from caxev.cli.runs import shown

        if not self.display.as_json or self.found is None:
            return
        summary = {
            "run": shown(self.found),
            "from": self.wish.source.name,
            "to": self.wish.target.name,
            "status": status or (None if self.last is None else self.last.status),
            "bytes": self.size,
            "seconds": round(monotonic() - self._begun, 3),
        }
        click.echo(json_text(summary))


@define(eq=False)
class Display:
    """Output for people: a bar on a terminal, plain lines in a pipe; on stderr beside JSON."""

    as_json: bool
    _bar: rich.progress.Progress | None = field(init=False, default=None)

    def print_line(self, line: str) -> None:
        """Print a line."""
        if self._bar is not None:
            self._bar.console.print(escaped(line), highlight=False, markup=False)
        else:
            click.echo(escaped(line), err=self.as_json)

    def show(self, now: Standing) -> None:
        """Show the state of the copy."""
        if self._bar is None:
            self.print_line(now.line)
            return
        progress, (task,) = now.progress, self._bar.task_ids
        self._bar.update(
            task,
            description=now.status,
            words=escaped(now.words or str(progress or "")),
            completed=0 if progress is None else progress.done,
            total=None if progress is None else progress.total,
        )
        if now.over:
            self.print_line(now.line)

    @contextmanager
    def live(self) -> Iterator[None]:
        """Draw a bar for the length of the block, if this is a terminal."""
        if not (sys.stderr if self.as_json else sys.stdout).isatty():
            yield
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = (TextColumn("{task.description}"), BarColumn(), _words(TextColumn))
        with Progress(*columns, console=Console(stderr=self.as_json), transient=True) as bar:
            bar.add_task("requested", total=None, words="")
            self._bar = bar
            try:
                yield
            finally:
                self._bar = None


def _words(column: type[rich.progress.TextColumn]) -> rich.progress.TextColumn:
    # Other programs wrote these texts: brackets in them are no mark-up.
    return column("{task.fields[words]}", markup=False)
