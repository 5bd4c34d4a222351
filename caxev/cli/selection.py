"""Define the options that select runs and data; `RunChoice` is what they select.

`selects_runs` and `selects_run` give a command its options: the conditions of
`caxev.core.selection`, which is the one language for all of them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import click
from attrs import evolve, frozen

from caxev.asking.asker import whole
from caxev.asking.base import DataChoice
from caxev.cli.command import CHOOSES, Function, together
from caxev.cli.options import options
from caxev.cli.values import (
    DATA_TYPE,
    HOST,
    NOT_TAG,
    PATTERN,
    RUN_NUMBER,
    STATUS,
    TAG,
    VERSION,
    condition_type,
    known_values,
)
from caxev.config.errors import hint
from caxev.core.clock import utcnow
from caxev.core.errors import NoSuchRun
from caxev.core.model import Run, RunId
from caxev.core.selection import (
    COPY_PARTS,
    EVERY,
    CopyPattern,
    NumberRange,
    Selection,
    SelectionError,
    is_glob,
    naming,
)

if TYPE_CHECKING:
    from caxev.database import Database


@frozen
class RunChoice:
    """The runs that the options of a command select."""

    selection: Selection = EVERY

    @property
    def selects(self) -> bool:
        """Return whether anything is chosen."""
        return self.selection != EVERY

    @property
    def names_one(self) -> bool:
        """Return whether one run is named, by its number or name."""
        by_name = len(self.selection.names) == 1 and not is_glob(self.selection.names[0])
        return self.selection.at_most == 1 or by_name

    def require(self) -> None:
        """Raise click's error unless something is chosen."""
        if not self.selects:
            raise click.UsageError("select runs: --run, --name, --tag, --since, --lacks, ...")

    @property
    def words(self) -> str:
        """Return the choice in words, such as ``runs 1-9`` or ``run with --tag x``."""
        texts = self.selection.texts()
        if texts.keys() == {"run"}:
            several = len(texts["run"]) > 1 or not self.selection.single_numbers
            return f"run{'s' if several else ''} {', '.join(texts['run'])}"
        if texts.keys() == {"name"} and len(texts["name"]) == 1:
            return f"run {texts['name'][0]!r}"
        return f"run with {self.selection}" if texts else "run"

    @property
    def naming(self) -> str:
        """Return the options that name the run to another command."""
        chosen = self.selection
        numbers, names = chosen.single_numbers, chosen.names
        detector = next(iter(chosen.detectors), None)
        return naming(next(iter(numbers), None), next(iter(names), None), detector)

    def narrowed(self, **parts: str | None) -> RunChoice:
        """Return the choice of those that have such a copy; see `Selection.with_copy`."""
        return RunChoice(self.selection.with_copy(**parts))

    def of_status(self, **parts: str | None) -> RunChoice:
        """Return the choice of those whose such copy has the status that is given, if one is."""
        return self if self.selection.copy.status is None else self.narrowed(**parts)

    async def find(self, database: Database, *, limit: int = 0) -> list[Run]:
        """Read the runs, with only the fields that matching needs.

        Raises `NoSuchRun` if there is none, or none with one of the numbers.
        """
        found = await database.select(self.selection, utcnow(), limit)
        numbers = {run.number for run in found}
        missing = () if limit else {*self.selection.single_numbers} - numbers
        if missing or not found:
            await self._fail(database, sorted(missing))
        return found

    async def _fail(self, database: Database, missing: list[int]) -> None:
        ranges = tuple(NumberRange(one, one) for one in missing) or self.selection.numbers
        settings = database.settings
        where = f"{settings.database}.{settings.collection}"
        words = RunChoice(evolve(self.selection, numbers=ranges)).words
        raise NoSuchRun(f"no {words} in {where}{await self.hint()}")

    async def each(self, database: Database) -> AsyncGenerator[Run, None]:
        """Read the runs one by one, as `pages` does."""
        async with aclosing(self.pages(database)) as found:
            async for page in found:
                for run in page:
                    yield run

    async def pages(self, database: Database) -> AsyncGenerator[list[Run], None]:
        """Read the runs page by page, with only the fields that matching needs.

        Raises `NoSuchRun` if no run fits even without regard to copies, or if none is found
        and one of the values is unknown.
        """
        whatever = RunChoice(evolve(self.selection, copy=CopyPattern()))
        if whatever.selects or not self.selects:
            await whatever.check(database)
        some = False
        async with aclosing(database.pages(self.selection, utcnow())) as found:
            async for page in found:
                some = some or bool(page)
                yield page
        if not some and (hint := await self.hint()):
            raise NoSuchRun(f"no {self.words}{hint}")

    async def ids(self, database: Database) -> list[RunId]:
        """Read the ids of the runs. Raises `NoSuchRun` as `find` does."""
        await self.check(database)
        return [run.id async for run in self.each(database)]

    async def check(self, database: Database) -> None:
        """Raise `NoSuchRun` as `find` does, without reading all of the runs."""
        numbers = self.selection.numbers
        singles = tuple(one for one in numbers if one.first == one.last)
        if singles:
            await RunChoice(evolve(self.selection, numbers=singles)).find(database)
        if len(singles) < len(numbers) or not numbers:
            await self.find(database, limit=1)

    async def whole(self, database: Database) -> AsyncGenerator[Run, None]:
        """Read the runs one by one with all their fields. Raises `NoSuchRun` as `find` does."""
        await self.check(database)
        async with aclosing(self.pages(database)) as found:
            async for page in found:
                async for run in whole(database, [run.id for run in page]):
                    yield run

    async def find_one(self, database: Database) -> Run:
        """Read the selected run. Raises `NoSuchRun`, also if several match."""
        found = await self.find(database)
        if len(found) > 1:
            detectors = ", ".join(run.detector or "none" for run in found)
            raise NoSuchRun(f"{len(found)} runs match ({detectors}): choose one by --detector")
        return found[0]

    async def hint(self) -> str:
        """Return the known value that was probably meant, as the end of a message."""
        import trio

        # Only after a miss: the query for all known values reads every run, or an index of them.
        for path, what, value in self._values():
            known = await trio.to_thread.run_sync(known_values, options(), path)
            if value not in known:
                guess = hint(value, known, f"known: {', '.join(sorted(known)) or 'none'}")
                return f" (no {what} {value!r}; {guess})"
        return ""

    def _values(self) -> Iterator[tuple[str, str, str]]:
        """Return the texts that only the database knows, with their paths and names."""
        chosen = self.selection
        yield from (("tags.name", "tag", one) for one in chosen.tags)
        yield from (("detector", "detector", one) for one in chosen.detectors)
        yield from (("source.type", "source", one) for one in chosen.sources)
        for pattern in (chosen.copy, *chosen.has):
            if pattern.version is not None:
                yield "data.pax_version", "version", pattern.version


def named(number: int | None, name: str | None, detector: str | None = None) -> RunChoice:
    """Return the choice of the run with that number or name."""
    numbers = () if number is None else (NumberRange(number, number),)
    texts = (() if one is None else (one,) for one in (name, detector))
    names, detectors = texts
    return RunChoice(Selection(numbers=numbers, names=names, detectors=detectors))


def selects_run() -> Callable[[Function], Function]:
    """Add the options that name one run, as the argument `run`."""
    number = click.option("--run", "number", type=RUN_NUMBER, metavar="N", help="The run's number.")
    name = click.option("--name", metavar="X", help="The run's name, such as 161111_1434.")
    detector = click.option("--detector", metavar="D", help="Its detector, if runs share the name.")
    return together("run", _named, number, name, detector)


def _named(*, number: int | None, name: str | None, detector: str | None) -> RunChoice:
    if (number is None) == (name is None):
        raise click.UsageError("name one run: --run or --name")
    return named(number, name, detector)


def _parameter(name: str) -> str:
    return f"{CHOOSES}{name.replace('-', '_')}"


def _condition(name: str, metavar: str, help: str, **more: Any) -> Function:  # noqa: A002
    given = {"type": condition_type(name), "multiple": True, **more}
    return click.option(f"--{name}", _parameter(name), metavar=metavar, help=help, **given)


_NAMED: Final = (
    _condition("run", "N,A-B", "Runs with these numbers: 5, 1-100, 300- or 1-100,205."),
    _condition("name", "GLOB", r"Runs of this name, such as 161111_1434 or '1611*' (\*: a star)."),
    _condition("detector", "D", "Runs of this detector: tpc, muon_veto."),
    _condition("source", "S", "Runs of this source, such as AmBe."),
    _condition("tag", "TAG", "Runs with this tag; of several, with all.", type=TAG),
    _condition("not-tag", "TAG", "Runs without this tag.", type=NOT_TAG),
)
_STARTED: Final = (
    _condition(
        "since", "TIME", "Runs started then or later: 2016-11-11, or 7d (ago).", multiple=False
    ),
    _condition("until", "TIME", "Runs started before then.", multiple=False),
)
_HELD: Final = (
    _condition("has", "COPY", "Runs with such a good copy: raw@lngs.", type=PATTERN),
    _condition("lacks", "COPY", "Runs without such a good copy: raw@chicago.", type=PATTERN),
    _condition("fewer-than", "N", "Runs with fewer good copies, of --type.", multiple=False),
    _condition(
        "unverified-for", "TIME", "Runs with a good copy not verified for 90d.", multiple=False
    ),
)
RUNS: Final = (*_NAMED, *_STARTED, *_HELD)
"""The options that select runs: the conditions of a `Selection`."""


def _copy(name: str, help: str, **given: Any) -> Function:  # noqa: A002
    return click.option(f"--{name}", _parameter(name), help=help, **given)


COPY: Final = {
    "host": _copy("host", "Runs with a copy at this host.", type=HOST),
    "status": _copy("status", "Runs with a copy of this status.", type=STATUS),
    "type": _copy("type", "Runs with a copy of this type of data.", type=DATA_TYPE),
    "version": _copy("version", "Runs with a copy of this version.", metavar="V"),
}
"""The options that select runs by one copy: the parts of its `copy`."""


def selects_runs(
    *, required: bool = True, copies: Sequence[str] = COPY_PARTS, started: bool = True
) -> Callable[[Function], Function]:
    """Add the options that select runs, as the argument `runs`.

    `copies`: which of those that are about one copy; `started`: whether those about when a run was
    started. The command may have others of that name.
    """
    make = partial(chosen_runs, required=required)
    those = RUNS if started else (*_NAMED, *_HELD)
    return together("runs", make, *those, *(COPY[name] for name in copies))


def chosen_runs(*, required: bool, **given: Any) -> RunChoice:
    """Return the choice that these values of `RUNS` and `COPY` make.

    Raises click's error if they select nothing although `required`.
    """
    texts = {
        name.removeprefix(CHOOSES).replace("_", "-"): [value] if isinstance(value, str) else value
        for name, value in given.items()
        if value is not None
    }
    try:
        choice = RunChoice(Selection.read(texts))
    except SelectionError as error:  # values are read one by one before
        raise click.UsageError(str(error)) from None
    if required:
        choice.require()
    return choice


_TYPE: Final = click.option(
    "--type", "kind", type=DATA_TYPE, default="raw", show_default=True, help="The type of data."
)
_VERSION: Final[Mapping[str, Any]] = {"metavar": "V", "help": "The version, of derived data."}
DATA: Final = (_TYPE, click.option("--version", **_VERSION))
"""The options that select the data of a run: the fields of `DataChoice`. The version is any one: a
catalogue may have some that no run has."""
selects_data = together(
    "data", DataChoice, _TYPE, click.option("--version", type=VERSION, **_VERSION)
)
"""Adds them as the argument `data`; the version must be one that a copy has."""
