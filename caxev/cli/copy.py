"""Run ``caxev copy``: request copies of runs, and watch until they are complete.

The command adds an entry with the status ``requested``. The listener of the target site reacts to
it, as to any other change; if that site has no listener, the source's does. The entry holds the
copy from its arrival on: see `caxev.copies.holds`. `caxev.asking.copies` decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from time import monotonic
from typing import TYPE_CHECKING

import click
from attrs import define, field

from caxev.asking.base import DataChoice
from caxev.asking.copies import CopyData, CopyPath, PlannedCopy, WithdrawCopies
from caxev.asking.holding import Keep
from caxev.cli.command import command, excludes, together
from caxev.cli.copy_progress import CopyState, Display, copy_state
from caxev.cli.errors import FAILED, INTERRUPTED
from caxev.cli.hold import keeps
from caxev.cli.options import as_json, options
from caxev.cli.output import show_json
from caxev.cli.plans import Ask, acts, no_listener
from caxev.cli.requests import copy_many
from caxev.cli.runs import shown
from caxev.cli.selection import RunChoice, selects_data, selects_runs
from caxev.cli.values import SITE
from caxev.config import ConfigError
from caxev.copies.holds import words
from caxev.copies.lifecycle import in_commands
from caxev.core.clock import utcnow
from caxev.core.errors import NothingToDo
from caxev.core.job import Skip
from caxev.core.model import REQUESTED, Copy, CopyKey, Event, Run
from caxev.core.recording import Maker
from caxev.finite import Finite

if TYPE_CHECKING:
    from caxev.asking.asker import Asker
    from caxev.database import Database


def _act(
    *, source: str | None, target: str, cancel: bool, data: DataChoice, keep: Keep
) -> CopyData:
    if source == target:
        raise click.UsageError(f"--from and --to are both {source}")
    return (WithdrawCopies if cancel else CopyData)(data, source, target, keep)


@command(
    "caxev copy --run 123 --to chicago",
    "caxev copy --run 123 --to chicago --keep-for 14d --why 'for a talk'",
    "caxev copy --run 123 --from lngs --to chicago --type processed --version v6.8.0",
    "caxev copy --run 123 --to chicago --cancel",
    "caxev copy --lacks raw@chicago --tag _sciencerun0 --to chicago",
    output=as_json,
)
@excludes("--cancel", "--keep-for --keep-until --why --wait --no-wait --timeout")
@excludes("--no-wait", "--timeout")
@selects_runs(copies=("status",))
@click.option("--from", "source", type=SITE, help="The site to copy from. [default: the best]")
@click.option("--to", "target", type=SITE, required=True, help="The site to copy to.")
@selects_data
@keeps
@click.option("--cancel", is_flag=True, help="Withdraw a request that no listener has begun.")
@together("act", _act, of="source target cancel data keep")
@together(
    "patience",
    lambda wait, timeout: (timeout or inf) if wait else 0.0,
    click.option(
        "--wait/--no-wait", default=True, show_default=True, help="Watch until it is done."
    ),
    click.option(
        "--timeout",
        type=Finite(0, min_open=True),
        metavar="SECONDS",
        help="Stop watching after that time; the request stays.",
    ),
)
@acts("Show what would be requested, or why not; write nothing.")
def copy(*, runs: RunChoice, act: CopyData, patience: float, ask: Ask) -> None:
    """Copy runs to another site, and watch until the copies are verified.

    This adds an entry that is `requested`; the listener of one of the two sites makes the copy.
    If none runs, the request waits. Ctrl-C ends the watching, not the copy. Once the copy is there
    nothing deletes it for as many days as `purge` of that site names, or as you ask by --keep-for
    or --keep-until. `caxev holds` lists it, and `caxev release` ends that.

    Many runs are one request: Ctrl-C or `caxev requests cancel` withdraws what no listener has
    begun, and `caxev requests resume` does the rest.
    """
    runs = runs.of_status(type=act.data.kind, version=act.data.version)
    if ask.dry_run or isinstance(act, WithdrawCopies):
        ask(runs, act)
    elif runs.names_one:
        one = CopyCommand(runs, act, Display(as_json=options().as_json), act.source)
        with one.summed_up():
            options().with_asker(one.run, patience)
    else:
        copy_many(runs, act, yes=ask.yes, patience=patience)


def _declined(site: str, run: Run | None, key: CopyKey) -> str:
    """Return why the handlers of a site leave a requested copy alone, as far as they do."""
    copy = None if run is None else run.copy(key)
    if run is None or copy is None or copy.status != REQUESTED:
        return ""
    try:
        registry = options().registry(site)
    except ConfigError:
        return ""  # the site has handlers that this machine lacks: only it knows
    event = Event(run.id, key, None, copy.seen_as)
    decisions = Maker(registry, options().sites()).decisions(event, run, utcnow())
    whys = [(handler, one.why) for handler, one in decisions if isinstance(one, Skip)]
    return "; ".join(f"{handler.name} at {site}: {why}" for handler, why in whys)


# -- doing it -----------------------------------------------------------------------------------


@define(eq=False)
class CopyCommand:
    """One call of the command; `last` is the latest state of the copy that was read."""

    choice: RunChoice
    act: CopyData
    display: Display
    source: str | None = None
    last: CopyState | None = None
    found: Run | None = None
    size: int | None = None
    _begun: float = field(init=False, factory=monotonic)

    async def run(self, asker: Asker, patience: float) -> None:
        """Request the copy, and watch it for `patience` seconds at most."""
        import trio

        path, doer = await self._request(asker)
        record = await asker.database.site_record(doer)
        if record is None or not record.active:
            self.display.print_line(f"{doer}: {no_listener(doer)}")
        if not patience:
            return
        with trio.move_on_after(patience) as scope:
            await self._watch(asker.database, path, doer)
        if scope.cancelled_caught:
            raise NothingToDo(f"not done after {patience:g} s; {self._left()}")

    async def _request(self, asker: Asker) -> tuple[CopyPath, str]:
        """Write the request; return what it is, and the site whose listener serves it."""
        self.found = run = await self.choice.find_one(asker.database)
        step = await asker.carry_out_one(self.act, run.id)
        plan = self.act.plan(step.run, await asker.context(self.act))
        self.source = plan.path.source.host
        self._announce(plan)
        return plan.path, plan.doer.name

    def _announce(self, plan: PlannedCopy) -> None:
        """Show that the copy is requested, and what was decided for the user."""
        if self.act.source is None:
            self.display.print_line(f"{plan.path.target} comes from {self.source}")
        if plan.hold is not None:
            kept = words(Copy(plan.path.target, REQUESTED), plan.hold)
            self.display.print_line(f"{plan.path.target} will be {kept}")
        self._note(CopyState(REQUESTED))

    async def _watch(self, database: Database, path: CopyPath, doer: str) -> None:
        """Show the state of the copy at each change, until it is final."""
        import trio

        from caxev.database import DatabaseError, is_transient

        trouble = ""
        with self.display.live():
            while True:
                try:
                    await self._follow(database, path, doer)
                except DatabaseError as error:
                    if not is_transient(error):
                        raise
                    # A fail-over takes seconds, and the copy continues without us.
                    if str(error) != trouble:
                        trouble = str(error)
                        self.display.print_line(f"{trouble}; trying again")
                    await trio.sleep(1.0)
                else:
                    return

    async def _follow(self, database: Database, path: CopyPath, doer: str) -> None:
        assert self.found is not None
        assert self.source is not None
        run, sites = self.found.id, (self.source, self.act.target)
        # Follow before the first read, so that no change between the two is missed.
        async with database.follow(run, sites) as changed:
            while True:
                # Snapshot, reactions, run, in this order: a snapshot is recorded with its
                # reactions, and a reaction settles after its writes to the run.
                seen = (await database.snapshot(doer, [run])).before.get(run, {})
                reactions = [
                    pair for site in sites for pair in await database.reactions(site, run=run)
                ]
                found = (await database.runs([run])).get(run)
                copy = None if found is None else found.copy(path.target)
                if found is not None and copy is not None:
                    # For the summary only: an entry has its size once the copy is made.
                    self.size = found.size_of(copy) or self.size
                state = copy_state(
                    found,
                    path.target,
                    reactions,
                    seen_as=seen.get(path.target),
                    declined=_declined(doer, found, path.target),
                )
                self._note(state)
                if self.last is None or self.last.over:
                    return
                await changed()

    def _note(self, now: CopyState) -> None:
        if now.progress is not None and now.progress.total is not None:
            self.size = self.size or now.progress.total
        if now != self.last:
            self.display.show(now)
        self.last = now

    def _left(self) -> str:
        """Return a line about what continues after the watching ends."""
        if self.last is None or self.found is None:
            return "nothing was requested"
        if self.last.status != REQUESTED:
            return "the copy continues"
        data, target = self.act.data, self.act.target
        wanted = Copy(CopyKey(data.kind, target, data.version), REQUESTED)
        _, which = in_commands(self.found, wanted)
        return f"the request stands; to withdraw it: caxev copy {which} --to {target} --cancel"

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
            "from": self.source,
            "to": self.act.target,
            "status": status or (None if self.last is None else self.last.status),
            "bytes": self.size,
            "seconds": round(monotonic() - self._begun, 3),
        }
        show_json(summary)
