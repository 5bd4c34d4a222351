"""Show what a command is about to do to many runs, have a person confirm it, and do it.

Every command that acts on selected runs goes through `Ask`, and prints the same rows. What is
asked of several runs is one request: see `caxev.cli.requests`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec

import click
from attrs import define, field, frozen

from caxev.asking.base import Act, ActPlan, RequestedAct, Step, counted
from caxev.asking.listeners import ListenerAct
from caxev.cli.command import Function, together
from caxev.cli.errors import INTERRUPTED
from caxev.cli.options import options
from caxev.cli.output import SIZE, Row, columns, fail_if, print_line, show_rows
from caxev.cli.runs import shown
from caxev.cli.selection import RunChoice
from caxev.core.amounts import lasting
from caxev.core.model import RunId

if TYPE_CHECKING:
    from caxev.asking.asker import Asker
    from caxev.database import BulkRequest, Database

P = ParamSpec("P")
FEW: Final = 20
"""Maximum number of runs on which a command acts without a confirmation."""
_OFTEN: Final = 1.0
"""Seconds between two lines of progress."""
Rows = list[dict[str, Any]]


asks: Final = click.option("--yes", is_flag=True, help="Do not ask for a confirmation.")
"""Adds the option of a command that asks before it acts on many runs, as the argument `yes`."""


def confirm_plan(plan: ActPlan, *, yes: bool, few: int = FEW) -> None:
    """Show a plan about several runs; unless `yes`, have a person confirm one about many.

    Raises click's error if nobody can be asked.
    """
    if plan.number > min(few, 1):
        print_line(plan.words, err=True)
    if plan.number <= few or yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(f"{counted(plan.number)} are more than {few}: add --yes to continue")
    # On stderr beside JSON, which has stdout to itself.
    question = f"Continue with {counted(plan.number)}?"
    click.confirm(question, abort=True, err=options().as_json)


@frozen
class Ask:
    """Requests acts, by ``--yes`` and ``--dry-run``; above `few` runs a person must confirm."""

    yes: bool
    dry_run: bool
    few: int = FEW

    def __call__(self, runs: RunChoice, act: Act, *, is_enough: bool = False) -> None:
        """Do what an act is about to each selected run, unless it is a dry run; print a row each.

        For several runs the plan is shown first; for many, a person confirms it. Each run is
        decided about again when its turn comes. Ctrl-C leaves what is done. Exits as
        `StepPrinter.fail` does.
        """
        printer = StepPrinter()
        if self.dry_run:
            options().with_asker(_show_planned, runs, act, printer)
        elif runs.names_one and self.few:
            options().with_asker(_do_at_once, runs, act, printer)
        else:
            plan = options().with_asker(plan_of, runs, act)
            confirm_plan(plan, yes=self.yes, few=self.few)
            doing = _Doing(act, runs, plan)
            try:
                options().with_asker(doing.run, printer)
            except KeyboardInterrupt:
                doing.interrupted()
                raise click.exceptions.Exit(INTERRUPTED) from None
        printer.fail(is_enough=is_enough)


def acts(dry_run: str, *, few: int = FEW) -> Callable[[Function], Function]:
    """Add ``--yes`` and ``--dry-run``, which has this help, as the argument `ask`."""
    option = click.option("--dry-run", is_flag=True, help=dry_run)
    return together("ask", partial(Ask, few=few), asks, option)


WHY: Final = click.option(
    "--why", required=True, metavar="TEXT", help="The reason, kept in deleted_data."
)
_STEPS: Final = columns("run", "what", SIZE, "state")


@define
class StepPrinter:
    """Prints a row for each step as it comes, and counts their `ok`."""

    oks: Counter[bool | None] = field(factory=Counter)

    async def show(self, steps: AsyncGenerator[Step, None]) -> None:
        """Print the steps; also what there is of them if Ctrl-C ends it."""
        async with aclosing(self._rows(steps)) as rows:
            await show_rows(_STEPS, rows, empty="nothing to do")

    async def _rows(self, steps: AsyncGenerator[Step, None]) -> AsyncGenerator[Row, None]:
        async with aclosing(steps):
            async for one in steps:
                self.oks[one.ok] += 1
                row = {"run": shown(one.run), "what": one.what, "bytes": one.size}
                yield {**row, "state": one.state, "ok": one.ok}

    def fail(self, *, is_enough: bool = False) -> None:
        """Exit with a failure if one is not ok, or none is; if one `is_enough`, only if none is."""
        if is_enough:
            fail_if(not self.oks[True])
        else:
            fail_if(self.oks[False] > 0 or self.oks.keys() == {None})


def show_steps(
    steps: Callable[Concatenate[Database, P], AsyncGenerator[Step, None]],
    *args: P.args,
    **kwargs: P.kwargs,
) -> None:
    """Print steps as this command itself makes them; exit with a failure if one is not ok."""
    printer = StepPrinter()

    async def show(database: Database) -> None:
        await printer.show(steps(database, *args, **kwargs))

    options().with_database(show)
    printer.fail()


async def _show_planned(asker: Asker, runs: RunChoice, act: Act, printer: StepPrinter) -> None:
    await runs.check(asker.database)
    await printer.show(_planned(asker, runs, act))


async def _planned(asker: Asker, runs: RunChoice, act: Act) -> AsyncGenerator[Step, None]:
    """Return what would come of it for each of the selected runs."""
    async with aclosing(asker.steps(act, runs.selection)) as found:
        async for _, steps in found:
            for one in steps:
                yield one.as_planned


async def plan_of(asker: Asker, runs: RunChoice, act: Act) -> ActPlan:
    """Return the plan of an act for the selected runs. Raises `NoSuchRun`."""
    await runs.check(asker.database)
    return await asker.plan(act, runs.selection)


async def _do_at_once(asker: Asker, runs: RunChoice, act: Act, printer: StepPrinter) -> None:
    await printer.show(asker.carry_out(act, await runs.ids(asker.database)))


@define
class _Doing:
    """The acts of a plan, being done."""

    act: Act
    runs: RunChoice
    plan: ActPlan
    request: BulkRequest | None = None
    _number: int = field(init=False, default=0)
    _begun: float = field(init=False, factory=monotonic)
    _printed: float = field(init=False, factory=monotonic)

    async def run(self, asker: Asker, printer: StepPrinter) -> None:
        """Do it, and print the steps: first those of what the plan leaves alone."""
        await printer.show(self._steps(asker))
        if self.request is not None and isinstance(self.act, RequestedAct):
            print_line(f"to follow it: caxev requests watch {self.request.id}", err=True)

    async def _steps(self, asker: Asker) -> AsyncGenerator[Step, None]:
        from caxev.asking.requests import begin  # not before it is needed: it takes time

        # Decided about once more: the plan has only numbers, as these may be very many.
        if self.plan.kept:
            async with aclosing(_planned(asker, self.runs, self.act)) as planned:
                async for step in planned:
                    if step.update is None:
                        yield step
        keeps = not self.runs.names_one
        self.request, steps = await begin(asker, self.act, self.plan.runs, keeps=keeps)
        if self.request is not None:  # at once: another terminal can cancel it
            print_line(f"request {self.request.id}: {title(self.request)}", err=True)
        async with aclosing(steps):
            async for step in steps:
                yield step
                self._show()

    def _show(self) -> None:
        self._number += 1
        if sys.stderr.isatty() and monotonic() >= self._printed + _OFTEN:
            self._printed = monotonic()
            rest = len(self.plan.runs) - self._number
            took = self._printed - self._begun
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
    from caxev.asking import requests as asking  # as above

    request, rows = await asking.ask_listeners(asker, act, runs, keeps=is_request)
    if request is not None:
        print_line(f"request {request.id}: {title(request)}", err=True)
        print_line(f"to follow it: caxev requests watch {request.id}", err=True)
    return rows


def title(request: BulkRequest) -> str:
    """Return what a request is about: how many runs, and what is done."""
    from caxev.asking.requests import described  # as above

    runs = "all runs" if request.runs is None else counted(len(request.runs))
    return f"{runs}, {described(request)}"


def with_hint(line: str, row: Mapping[str, Any]) -> str:
    """Return a line about a site, with a hint if no listener acts for the site now."""
    return line if row["listening"] else f"{line}; {no_listener(row['site'])}"


def no_listener(site: str) -> str:
    """Return the hint about a site without a listener."""
    return f"no listener is active there: start caxev listen --site {site}"
