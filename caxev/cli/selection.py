"""Define the options that select runs and data; `RunChoice` is what they select.

`selects_runs` and `selects_run` give a command its options, and `RunChoice.queries` alone turns
them into queries of the database.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import click
from attrs import evolve, frozen

from caxev.cli.command import Function, together
from caxev.cli.errors import NoSuchRun
from caxev.cli.options import options
from caxev.cli.runs import naming, pages
from caxev.cli.values import DATA_TYPE, MOST, RUN_NUMBER, TAG, known_values
from caxev.config.errors import nearest
from caxev.core.clock import utcnow
from caxev.core.model import Copy, Run
from caxev.finite import DAYS

if TYPE_CHECKING:
    from caxev.database import Database, Selection


@frozen(kw_only=True)
class RunChoice:
    """The runs to which all of the given options apply; several numbers select several runs."""

    numbers: tuple[int, ...] = ()
    name: str | None = None
    from_run: int | None = None
    to_run: int | None = None
    last_days: float | None = None
    tag: str | None = None
    detector: str | None = None

    @property
    def selects(self) -> bool:
        """Return whether anything is chosen; a detector alone only narrows a choice."""
        return evolve(self, detector=None) != RunChoice()

    def require(self) -> None:
        """Raise click's error unless something is chosen."""
        if not self.selects:
            raise click.UsageError(
                "select runs: --run, --name, --from-run, --to-run, --last-days or --tag"
            )

    @property
    def queries(self) -> list[Selection]:
        """Return the database's selections: one for each number, else one."""
        from caxev.database import Selection

        every = Selection(
            name=self.name, tag=self.tag, detector=self.detector, last_days=self.last_days
        )
        if self.numbers:
            return [evolve(every, numbers=(one, one)) for one in self.numbers]
        if self.from_run is None and self.to_run is None:
            return [every]
        return [evolve(every, numbers=(self.from_run or 1, self.to_run or MOST))]

    @property
    def words(self) -> str:
        """Return the choice in words, such as ``runs 1 to 9 with tag 'x'``."""
        numbers = ", ".join(map(str, self.numbers))
        parts = [f"{'runs' if len(self.numbers) != 1 else 'run'} {numbers}".rstrip()]
        if self.name is not None:
            parts = [f"run {numbers} named {self.name!r}" if numbers else f"run {self.name!r}"]
        if self.from_run is not None or self.to_run is not None:
            last = "" if self.to_run is None else f" to {self.to_run}"
            parts.append(f"from {self.from_run or 1}{last}")
        if self.tag is not None:
            parts.append(f"with tag {self.tag!r}")
        if self.detector is not None:
            parts.append(f"of {self.detector}")
        if self.last_days is not None:
            parts.append(f"of the last {self.last_days:g} days")
        return " ".join(parts)

    @property
    def naming(self) -> str:
        """Return the options that name the run to another command."""
        return naming(next(iter(self.numbers), None), self.name, self.detector)

    async def find(self, database: Database, *, limit: int = 0) -> list[Run]:
        """Read the runs, with only the fields that matching needs.

        Raises `NoSuchRun` if there is none, or none with one of the numbers.
        """
        found: list[Run] = []
        for place, query in enumerate(self.queries):
            runs = await database.select(query, utcnow(), limit)
            if not runs:
                one = evolve(self, numbers=self.numbers[place : place + 1])
                settings = database.settings
                where = f"{settings.database}.{settings.collection}"
                raise NoSuchRun(f"no {one.words} in {where}{await self._hint()}")
            found += runs
        return found

    async def each(
        self,
        database: Database,
        *,
        host: str | None = None,
        kind: str | None = None,
        status: str | None = None,
    ) -> AsyncIterator[Run]:
        """Read the runs page by page: those with a copy at the host, of the type and status.

        Raises `NoSuchRun` if there is no such run at all, whatever its copies.
        """
        if self.selects or (host, kind, status) == (None, None, None):
            await self.check(database)
        for query in self.queries:
            wanted = evolve(query, host=host, type=kind, status=status)
            async for page in database.pages(wanted, utcnow()):
                for run in page:
                    yield run

    async def check(self, database: Database) -> None:
        """Raise `NoSuchRun` as `find` does, without reading all of the runs."""
        await self.find(database, limit=1)

    async def each_whole(self, database: Database) -> AsyncIterator[Run]:
        """Read the runs with all their fields, page by page. Raises `NoSuchRun`."""
        for page in pages([run.id for run in await self.find(database)]):
            whole = await database.runs(page)
            for run in page:
                if run in whole:  # one may be deleted in between
                    yield whole[run]

    async def find_whole(self, database: Database) -> list[Run]:
        """Read the runs with all their fields. Raises `NoSuchRun`."""
        return [run async for run in self.each_whole(database)]

    async def find_one(self, database: Database) -> Run:
        """Read the selected run. Raises `NoSuchRun`, also if several match."""
        found = await self.find(database)
        if len(found) > 1:
            detectors = ", ".join(run.detector or "none" for run in found)
            raise NoSuchRun(f"{len(found)} runs match ({detectors}): choose one by --detector")
        return found[0]

    async def _hint(self) -> str:
        """Return the known tag or detector that was probably meant, as the end of a message."""
        import trio

        # Only after a miss: the query for all known values reads every run, or an index of them.
        for path, value in {"tags.name": self.tag, "detector": self.detector}.items():
            if value is not None:
                known = await trio.to_thread.run_sync(known_values, options(), path)
                if value not in known and (guess := nearest(value, known)) is not None:
                    return f" (did you mean {guess!r}?)"
        return ""


def named(number: int | None, name: str | None, detector: str | None = None) -> RunChoice:
    """Return the choice of the run with that number or name."""
    numbers = () if number is None else (number,)
    return RunChoice(numbers=numbers, name=name, detector=detector)


_number = click.option("--run", "number", type=RUN_NUMBER, metavar="N", help="The run's number.")
_name = click.option("--name", metavar="X", help="The run's name, such as 161111_1434.")


def selects_run(*, required: bool = True) -> Callable[[Function], Function]:
    """Add the options that name one run, as the argument `run`."""
    detector = click.option("--detector", metavar="D", help="Its detector, if runs share the name.")
    return together("run", partial(_named, required=required), _number, _name, detector)


def _named(*, required: bool, **given: Any) -> RunChoice:
    choice = named(**given)
    if required and bool(choice.numbers) == (choice.name is not None):
        raise click.UsageError("name one run: --run or --name")
    check_detector(choice)
    return choice


def check_detector(choice: RunChoice) -> None:
    """Raise click's error if there is a detector, but no choice of runs that it narrows."""
    if choice.detector is not None and not choice.selects:
        raise click.UsageError("--detector only narrows a choice of runs: add --run or --name")


RUNS: Final = (
    click.option(
        "--run",
        "numbers",
        type=RUN_NUMBER,
        multiple=True,
        metavar="N",
        help="The run's number; may be repeated.",
    ),
    _name,
    click.option("--from-run", type=RUN_NUMBER, metavar="A", help="Runs from this number on."),
    click.option("--to-run", type=RUN_NUMBER, metavar="B", help="Runs up to this number."),
    click.option("--last-days", type=DAYS, metavar="D", help="Runs started in the last D days."),
    click.option("--tag", type=TAG, help="Runs with this tag."),
    click.option("--detector", metavar="D", help="Only runs of this detector: tpc, muon_veto."),
)
"""The options that select runs: the fields of `RunChoice`."""


def selects_runs(*, required: bool = True) -> Callable[[Function], Function]:
    """Add the options that select runs, as the argument `runs`."""
    return together("runs", partial(chosen_runs, required=required), *RUNS)


def chosen_runs(*, required: bool, **given: Any) -> RunChoice:
    """Return the choice that these values of `RUNS` make.

    Raises click's error if they contradict each other, or select nothing although `required`.
    """
    choice = RunChoice(**given)
    if choice.numbers and evolve(choice, numbers=(), name=None, detector=None) != RunChoice():
        raise click.UsageError("--run names one run: remove the options that select others")
    if required:
        choice.require()
    if (choice.from_run or 1) > (choice.to_run or MOST):
        raise click.UsageError(f"--from-run {choice.from_run} is after --to-run {choice.to_run}")
    return choice


@frozen
class DataChoice:
    """The type and version of a run's data; without a version, any."""

    kind: str
    version: str | None = None

    def means(self, kind: str, version: str | None) -> bool:
        """Return whether data of that type and version is meant."""
        return kind == self.kind and self.version in (None, version)

    def copies(self, run: Run, host: str) -> list[Copy]:
        """Return the run's copies of this data at a host, in the order of its entries."""
        return [one for one in run.copies if one.host == host and self.means(one.type, one.version)]

    def copy(self, run: Run, host: str) -> Copy | None:
        """Return the run's copy of this data at a host, if there is one.

        Raises click's error if there are several versions: none is guessed.
        """
        found = self.copies(run, host)
        versions = sorted({one.version or "none" for one in found})
        if len(versions) > 1:
            raise click.UsageError(
                f"{host} has several versions ({', '.join(versions)}): choose one by --version"
            )
        return found[0] if found else None


DATA: Final = (
    click.option(
        "--type", "kind", type=DATA_TYPE, default="raw", show_default=True, help="The type of data."
    ),
    click.option("--version", metavar="V", help="The version, of derived data."),
)
"""The options that select the data of a run: the fields of `DataChoice`."""
selects_data = together("data", DataChoice, *DATA)
"""Adds them as the argument `data`."""
