"""Run ``caxev copy``: request one copy of a run, and watch until it is complete.

The command adds an entry with the status ``requested``. The listener of the target site reacts to
it, as to any other change; if that site has no listener, the source's does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from time import monotonic
from typing import TYPE_CHECKING, Any

import click
from attrs import define, field, frozen

from caxev.cli.command import command
from caxev.cli.copy_progress import GONE, CopyState, Display, copy_state
from caxev.cli.errors import FAILED, INTERRUPTED, NoSuchRun, NothingToDo
from caxev.cli.options import as_json, options
from caxev.cli.output import json_text
from caxev.cli.requests import no_listener, requester
from caxev.cli.runs import shown, which
from caxev.cli.selection import DataChoice, RunChoice, selects_data, selects_run
from caxev.cli.values import SITE
from caxev.config import ConfigError, Site
from caxev.core.clock import utcnow
from caxev.core.model import ERROR, REQUESTED, TRANSFERRED, Copy, CopyKey, Run
from caxev.core.update import RunUpdate
from caxev.finite import Finite

if TYPE_CHECKING:
    from caxev.database import Database

CANCELLED = "cancelled"


@command(
    "caxev copy --run 123 --from lngs --to chicago",
    "caxev copy --run 123 --from lngs --to chicago --type processed --version v6.8.0",
    "caxev copy --run 123 --from lngs --to chicago --cancel",
    output=as_json,
)
@selects_run()
@click.option("--from", "source", type=SITE, required=True, help="The site to copy from.")
@click.option("--to", "target", type=SITE, required=True, help="The site to copy to.")
@selects_data
@click.option("--wait/--no-wait", default=True, show_default=True, help="Watch until it is done.")
@click.option(
    "--timeout",
    type=Finite(0, min_open=True),
    metavar="SECONDS",
    help="Stop watching after that time; the request stays.",
)
@click.option("--cancel", is_flag=True, help="Withdraw a request that no listener has begun.")
def copy(
    *,
    run: RunChoice,
    source: str,
    target: str,
    data: DataChoice,
    wait: bool,
    timeout: float | None,
    cancel: bool,
) -> None:
    """Copy a run to another site, and watch until the copy is verified.

    This adds an entry that is `requested`; the listener of one of the two sites makes the copy.
    If none runs, the request waits. Ctrl-C ends the watching, not the copy.
    """
    if source == target:
        raise click.UsageError(f"--from and --to are both {source}")
    sites = options().sites()
    request = CopyRequest(data, sites.get(source), sites.get(target))
    one = CopyCommand(run, request, Display(as_json=options().as_json))
    with one.summed_up():
        if cancel:
            options().with_database(one.cancel)
        else:
            options().with_database(one.run, (timeout or float("inf")) if wait else 0.0)


@frozen
class CopyRequest:
    """The data that is wanted, its source and its target."""

    data: DataChoice
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
        raise ConfigError(f"neither {names} has a listener of its own, according to sites.json")

    def path(self, run: Run) -> CopyPath:
        """Return the source and target copies for this run.

        Raises `NothingToDo` if the run has no copy at the source, `ConfigError` if the target keeps
        no such data.
        """
        found = self.data.copy(run, self.source.name)
        if found is None:
            missing = CopyKey(self.data.kind, self.source.name, self.data.version)
            raise NothingToDo(f"{run} has no copy: {missing}", GONE)
        kind, version, target = found.type, found.version, self.target
        if target.listener and target.directory(kind, version) is None:
            raise ConfigError(f"{target.name} has no directory for {kind} data in sites.json")
        return CopyPath(found.key, CopyKey(kind, target.name, version))


@frozen
class CopyPath:
    """From which copy to which."""

    source: CopyKey
    target: CopyKey


def why_not(run: Run, path: CopyPath) -> str | None:
    """Return why that copy cannot be requested; None if it can. Pure."""
    source, target = run.copy(path.source), run.copy(path.target)
    if target is not None and not _has_failed(target):
        return f"{run} already has this copy: {target.key} is {_status_of(target)}"
    if source is None:
        return f"{run} has no copy: {path.source}"
    if source.status != TRANSFERRED:
        return f"{source.key} is {_status_of(source)}, and only a transferred copy can be copied"
    return None


def _has_failed(copy: Copy) -> bool:
    """Return whether an attempt to make the copy was given up, by us or by an old program."""
    # With a checksum problem the copy is bad, not unfinished: it is repaired, not requested again.
    given_up = copy.status == ERROR and copy.trigger is not None
    return (given_up and not copy.checksumproblem) or copy.is_abandoned


def _status_of(copy: Copy) -> str:
    return f"{copy.status} ({copy.error})" if copy.error else copy.status


def new_request(run: Run, path: CopyPath, who: str, now: datetime, **extra: Any) -> RunUpdate:
    """Return the request: an entry that is added if the source is unchanged. Pure.

    A failed copy is requested again, and data that an old program left there is reused.
    `extra` are further fields of a new entry.
    """
    source, target = run.copy(path.source), run.copy(path.target)
    assert source is not None
    new = {"location": None, "checksum": None, "source": source.host}
    if target is None:
        born = {"creation_time": now, "creation_place": who}
        return RunUpdate.add_copy(
            run, path.target, REQUESTED, source.as_seen, **new, **born, **extra
        )
    # Without the fields of the failed attempt: they would be taken for this one's.
    update = RunUpdate.change_copy(
        run, target, REQUESTED, source.as_seen, **new, error=None, trigger=None
    )
    return update.remembered(target) if target.is_abandoned else update


# -- doing it -----------------------------------------------------------------------------------


@define(eq=False)
class CopyCommand:
    """One call of the command; `last` is the latest state of the copy that was read."""

    choice: RunChoice
    request: CopyRequest
    display: Display
    last: CopyState | None = None
    found: Run | None = None
    size: int | None = None
    _begun: float = field(init=False, factory=monotonic)

    async def run(self, database: Database, patience: float) -> None:
        """Request the copy, and watch it for `patience` seconds at most."""
        import trio

        doer = self.request.doer.name
        path = await self._request(database)
        record = await database.site_record(doer)
        if record is None or not record.active:
            self.display.print_line(f"{doer}: {no_listener(doer)}")
        if not patience:
            return
        with trio.move_on_after(patience) as scope:
            await self._watch(database, path)
        if scope.cancelled_caught:
            raise NothingToDo(f"not done after {patience:g} s; {self._left()}")

    async def _request(self, database: Database) -> CopyPath:
        run = await self._find(database)
        path = self.request.path(run)
        # The write expects the run as it was read. If it has changed meanwhile, decide again.
        while (why := why_not(run, path)) is None:
            update = new_request(run, path, requester(), utcnow())
            if await database.update_run(update, utcnow()) is not None:
                self._note(CopyState(REQUESTED))
                return path
            run = await self._read(database, run)
        there = run.copy(path.target)
        raise NothingToDo(why, GONE if there is None else there.status)

    async def _find(self, database: Database) -> Run:
        self.found = await self.choice.find_one(database)
        return self.found

    async def _read(self, database: Database, run: Run) -> Run:
        found = (await database.runs([run.id])).get(run.id)
        if found is None:
            raise NoSuchRun(f"{run} was deleted")
        return found

    async def _watch(self, database: Database, path: CopyPath) -> None:
        """Show the state of the copy at each change, until it is final."""
        import trio

        from caxev.database import DatabaseError, is_transient

        trouble = ""
        with self.display.live():
            while True:
                try:
                    await self._follow(database, path)
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

    async def _follow(self, database: Database, path: CopyPath) -> None:
        assert self.found is not None
        run, sites = self.found.id, (self.request.source.name, self.request.target.name)
        # Follow before the first read, so that no change between the two is missed.
        async with database.follow(run, sites) as changed:
            while True:
                # Reactions before the run: a reaction settles after its writes to the run, so the
                # run that is read next has them.
                reactions = [
                    pair for site in sites for pair in await database.reactions(site, run=run)
                ]
                found = (await database.runs([run])).get(run)
                self._weigh(found, path)
                self._note(copy_state(found, path.target, reactions))
                if self.last is None or self.last.over:
                    return
                await changed()

    def _weigh(self, run: Run | None, path: CopyPath) -> None:
        """Set the copy's size from its entry, or from the run's document."""
        copy = None if run is None else run.copy(path.target)
        if run is None or copy is None:
            return
        # For the summary only: an entry has its size once the copy is made.
        size = copy.size
        if size is None and copy.type == "raw":
            size = run.raw_size
        self.size = self.size if size is None else size

    def _note(self, now: CopyState) -> None:
        if now.progress is not None and now.progress.total is not None:
            self.size = self.size or now.progress.total
        if now != self.last:
            self.display.show(now)
        self.last = now

    async def cancel(self, database: Database) -> None:
        """Withdraw the request. Raises `NothingToDo` if there is none any more."""
        run = await self._find(database)
        data, source, target = self.request.data, self.request.source.name, self.request.target.name
        while (there := data.copy(run, target)) is not None:
            if there.status != REQUESTED:
                raise NothingToDo(f"{there.key} is {_status_of(there)}: too late", there.status)
            if there.source != source:
                raise NothingToDo(
                    f"{there.key} was requested from {there.source}, not {source}", there.status
                )
            if await database.update_run(RunUpdate.remove_copy(run, there), utcnow()) is not None:
                self._note(CopyState(CANCELLED))
                return
            run = await self._read(database, run)
        raise NothingToDo(f"no {data.kind} copy at {target} is requested for {run}", GONE)

    def _left(self) -> str:
        """Return a line about what goes on after the watching ends."""
        if self.last is None or self.found is None:
            return "nothing was requested"
        if self.last.status != REQUESTED:
            return "the copy continues"
        request = self.request
        kind = "" if request.data.kind == "raw" else f" --type {request.data.kind}"
        version = "" if request.data.version is None else f" --version {request.data.version}"
        sites = f"--from {request.source.name} --to {request.target.name}"
        back = f"caxev copy {which(self.found)} {sites}{kind}{version} --cancel"
        return f"the request stands; to withdraw it: {back}"

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
        if not self.display.as_json or self.found is None:
            return
        summary = {
            "run": shown(self.found),
            "from": self.request.source.name,
            "to": self.request.target.name,
            "status": status or (None if self.last is None else self.last.status),
            "bytes": self.size,
            "seconds": round(monotonic() - self._begun, 3),
        }
        click.echo(json_text(summary))
