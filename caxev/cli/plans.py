"""Show what a command is about to do to many runs, have a person confirm it, and do it.

Every command that acts on selected runs goes through `Ask`, and prints the same rows. What is
asked of several runs is one request: see `caxev.cli.requests`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import click
from attrs import define, field, frozen

from caxev.asking.base import Act, ActPlan, RequestedAct, Step, counted
from caxev.asking.listeners import ListenerAct, asked, leave
from caxev.cli.command import Function, together
from caxev.cli.errors import INTERRUPTED
from caxev.cli.options import options
from caxev.cli.output import Table, columns, confirm, print_line, show
from caxev.cli.runs import shown
from caxev.cli.selection import RunChoice
from caxev.core.amounts import lasting
from caxev.core.model import RunId

if TYPE_CHECKING:
    from caxev.asking.asker import Asker
    from caxev.database import BulkRequest

FEW: Final = 20
"""Runs up to which a command goes ahead without asking."""
_OFTEN: Final = 1.0
"""Seconds between two lines about how far it is."""
Rows = list[dict[str, Any]]


def asks(function: Function) -> Function:
    """Add the option of a command that asks before it acts on many runs, as the argument `yes`."""
    return click.option("--yes", is_flag=True, help="Do not ask, however many runs it is about.")(
        function
    )


def confirm_plan(plan: ActPlan, *, yes: bool, few: int = FEW) -> None:
    """Show a plan about several runs, and have a person confirm it, if they are many, unless `yes`.

    Raises click's error if nobody can be asked.
    """
    if plan.number > min(few, 1):
        print_line(plan.words, err=True)
    if plan.number <= few or yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{counted(plan.number)} are more than {few}: add --yes to go on")
    confirm(f"Go on with {counted(plan.number)}?")


@frozen
class Ask:
    """Asks for acts, as ``--yes`` and ``--dry-run`` say; above `few` runs a person confirms it."""

    yes: bool
    dry_run: bool
    few: int = FEW

    def __call__(self, runs: RunChoice, act: Act) -> None:
        """Do it as `rows` does, and print these."""
        show_steps(self.rows(runs, act))

    def rows(self, runs: RunChoice, act: Act) -> Rows:
        """Do what an act is about to each selected run, unless it is a dry run; return the rows.

        For several runs the plan is shown first; for many, a person confirms it. Each run is
        decided about again when its turn comes. Ctrl-C leaves what is done.
        """
        if self.dry_run:
            return options().with_asker(_planned, runs, act)[1]
        if runs.names_one and self.few:
            return options().with_asker(_done_at_once, runs, act)
        plan, _, left = options().with_asker(_planned, runs, act)
        confirm_plan(plan, yes=self.yes, few=self.few)
        doing = _Doing(act, plan, left)
        try:
            return options().with_asker(doing.run, is_request=not runs.names_one)
        except KeyboardInterrupt:
            doing.interrupted()
            raise click.exceptions.Exit(INTERRUPTED) from None


def acts(dry_run: str, *, few: int = FEW) -> Callable[[Function], Function]:
    """Add ``--yes`` and ``--dry-run``, which has this help, as the argument `ask`."""
    option = click.option("--dry-run", is_flag=True, help=dry_run)
    return together("ask", partial(Ask, few=few), asks, option)


WHY: Final = click.option(
    "--why", required=True, metavar="TEXT", help="The reason, kept in deleted_data."
)


async def _planned(asker: Asker, runs: RunChoice, act: Act) -> tuple[ActPlan, Rows, Rows]:
    """Return the plan, its rows, and those of them for which nothing is written."""
    await runs.check(asker.database)
    plan, rows, left = ActPlan(), [], []
    async with aclosing(asker.steps(act, runs.selection)) as found:
        async for run, steps in found:
            plan.add_steps(run, steps)
            rows += [step_row(one.as_planned) for one in steps]
            left += [step_row(one) for one in steps if one.update is None]
    return plan, rows, left


async def plan_of(asker: Asker, runs: RunChoice, act: Act) -> ActPlan:
    """Return the plan of an act for the selected runs. Raises `NoSuchRun`."""
    await runs.check(asker.database)
    return await asker.plan(act, runs.selection)


async def _done_at_once(asker: Asker, runs: RunChoice, act: Act) -> Rows:
    ids = await runs.ids(asker.database)
    async with aclosing(asker.carry_out(act, ids)) as steps:
        return [step_row(step) async for step in steps]


async def one_step(asker: Asker, runs: RunChoice, act: Act) -> Step:
    """Do it to the run that is named. Raises the rule that is against it."""
    run = await runs.find_one(asker.database)
    return await asker.carry_out_one(act, run.id)


@define
class _Doing:
    """The acts of a plan, being done. `rows` begins with what the plan leaves alone."""

    act: Act
    plan: ActPlan
    rows: Rows
    request: BulkRequest | None = None
    _number: int = field(init=False, default=0)
    _begun: float = field(init=False, factory=monotonic)
    _shown: float = field(init=False, factory=monotonic)

    async def run(self, asker: Asker, *, is_request: bool) -> Rows:
        """Do it, and return the rows."""
        from caxev.asking import requests

        steps = asker.carry_out(self.act, self.plan.runs)
        if is_request and self.act.kind and self.plan.runs:
            self.request = await requests.keep(asker, self.act, self.plan.runs)
            # At once: another terminal can cancel it.
            print_line(f"request {self.request.id}: {title(self.request)}", err=True)
            steps = requests.carry_out(asker, self.request)
        async with aclosing(steps):
            async for step in steps:
                self.rows.append(step_row(step))
                self._show()
        if self.request is not None and isinstance(self.act, RequestedAct):
            print_line(f"to follow it: caxev requests watch {self.request.id}", err=True)
        return self.rows

    def _show(self) -> None:
        self._number += 1
        if sys.stderr.isatty() and monotonic() >= self._shown + _OFTEN:
            self._shown = monotonic()
            rest = len(self.plan.runs) - self._number
            took = self._shown - self._begun
            left = f", about {lasting(took / self._number * rest)} left" if rest > 0 else ""
            print_line(f"{self._progress}{left}", err=True)

    @property
    def _progress(self) -> str:
        return f"{self._number} of {counted(len(self.plan.runs))} written"

    def interrupted(self) -> None:
        """Print what is done, and how to do the rest."""
        rest = "the same command does the rest"
        if self.request is not None:
            name = self.request.id
            rest = f"caxev requests resume {name} does the rest"
            if isinstance(self.act, RequestedAct):
                rest += f", cancel {name} takes it back"
        print_line(f"interrupted: {self._progress}; {rest}", err=True)


async def ask_listeners(
    asker: Asker, act: ListenerAct, runs: Sequence[RunId] | None, *, is_request: bool
) -> Rows:
    """Leave what an act asks of listeners, of runs or (None) of all; return a row for each site."""
    from caxev.asking import requests

    if not is_request or not act.sites:
        return await leave(asker, act.requests(runs))
    request = await requests.keep(asker, act, runs)
    print_line(f"request {request.id}: {title(request)}", err=True)
    print_line(f"to follow it: caxev requests watch {request.id}", err=True)
    return await asked(asker, act.requests(runs))


def title(request: BulkRequest) -> str:
    """Return what a request is about: how many runs, and what is done."""
    from caxev.asking.requests import described

    runs = "all runs" if request.runs is None else counted(len(request.runs))
    return f"{runs}, {described(request)}"


def step_row(step: Step) -> dict[str, Any]:
    """Return the row of a step."""
    return {"run": shown(step.run), "what": step.what, "state": step.state, "ok": step.ok}


_STEPS: Final = columns("run", "what", "state")


def show_steps(rows: Sequence[Mapping[str, Any]], *, failed: bool | None = None) -> None:
    """Print the rows; by default, exit with a failure if one of them is not ok."""
    if failed is None:
        failed = any(row["ok"] is False for row in rows)
    show(Table(_STEPS, rows), empty="nothing to do", failed=failed)


@contextmanager
def showing_steps() -> Iterator[Rows]:
    """Print the rows that the block adds, as `show_steps` does; also if Ctrl-C ends it."""
    rows: Rows = []
    try:
        yield rows
    except BaseException:
        if rows:
            show_steps(rows, failed=False)
        raise
    show_steps(rows)


def with_hint(line: str, row: Mapping[str, Any]) -> str:
    """Return a line about a site, with a hint if no listener acts for the site now."""
    return line if row["listening"] else f"{line}; {no_listener(row['site'])}"


def no_listener(site: str) -> str:
    """Return the hint about a site without a listener."""
    return f"no listener is active there: start caxev listen --site {site}"
