"""Find the runs that a command is about, and name them in its output."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from shlex import quote
from typing import TYPE_CHECKING, Any

from attrs import frozen

from caxev.cli.errors import NoSuchRun
from caxev.cli.options import MOST
from caxev.cli.output import Parts, run_parts

if TYPE_CHECKING:
    from caxev.config import Settings
    from caxev.core.model import Run, RunId
    from caxev.database import Database, Selection

_PAGE = 1000
_PATIENCE = 10.0
"""Seconds to wait for the list of known values."""


@frozen
class Wanted:
    """The runs that a command line selects, and the text that describes them."""

    selection: Selection
    words: str

    async def find(self, database: Database, settings: Settings, limit: int = 0) -> list[Run]:
        """Read the runs, with only the fields that matching needs. Raises `NoSuchRun`."""
        from caxev.core.clock import utcnow

        runs = await database.select(self.selection, utcnow(), limit)
        if not runs:
            where = f"{settings.database}.{settings.collection}"
            raise NoSuchRun(f"no {self.words} in {where}{await self._hint(settings)}")
        return runs

    async def _hint(self, settings: Settings) -> str:
        """Return the known tag or detector that was probably meant, as the end of a message."""
        import trio

        from caxev.config.errors import nearest
        from caxev.database.blocking import known_values

        # Only after a miss: the query for all known values reads every run, or an index of them.
        chosen = {"tags.name": self.selection.tag, "detector": self.selection.detector}
        for path, value in chosen.items():
            if value is not None:
                known = await trio.to_thread.run_sync(known_values, settings, path, _PATIENCE)
                if value not in known and (guess := nearest(value, known)) is not None:
                    return f" (did you mean {guess!r}?)"
        return ""

    async def find_one(self, database: Database, settings: Settings) -> Run:
        """Read the selected run. Raises `NoSuchRun`, also if several match."""
        found = await self.find(database, settings)
        if len(found) > 1:
            detectors = ", ".join(run.detector or "none" for run in found)
            raise NoSuchRun(f"{len(found)} runs fit ({detectors}): say which by --detector")
        return found[0]


def one(number: int | None, name: str | None, detector: str | None = None) -> Wanted:
    """Return the run of that number or name."""
    from caxev.database import Selection

    numbers = None if number is None else (number, number)
    words = f"run {number}" if number is not None else f"run {name!r}"
    if number is not None and name is not None:
        words += f" named {name!r}"
    if detector is not None:
        words += f" of {detector}"
    return Wanted(Selection(numbers=numbers, name=name, detector=detector), words)


def which(run: Run) -> str:
    """Return the options that name a run to another command."""
    return options(run.number or None, run.name, run.detector)


def options(number: int | None, name: str | None, detector: str | None) -> str:
    """Return the options that name a run; without a number, its name needs a detector."""
    if number is not None:
        return f"--run {number}"
    which_detector = f" --detector {quote(detector)}" if detector else ""
    return f"--name {quote(name or '')}{which_detector}"


def shown(run: Run) -> Parts:
    """Return a run as commands print it."""
    return run_parts(run.id, run.number, run.name)


async def shown_by_name(database: Database, text: str) -> Parts:
    """Return the run that an alarm is about, which names it as ``run 7`` or ``run 161111_1434``."""
    from caxev.core.clock import utcnow

    word = text.removeprefix("run ")
    number = int(word) if word.isdecimal() and int(word) <= MOST else None
    name = None if number is not None else word
    # Two detectors may have runs of one name: then nothing shows which one is meant.
    found = await database.select(one(number, name).selection, utcnow(), 2)
    return shown(found[0]) if len(found) == 1 else run_parts(None, number, name)


async def shown_all(database: Database, ids: Iterable[RunId]) -> dict[Any, Parts]:
    """Return runs as commands print them, by id; a run that is no longer stored has only its id."""
    wanted = dict.fromkeys(ids)
    found = {run: run_parts(run) for run in wanted}
    rest = iter(wanted)
    while page := list(islice(rest, _PAGE)):
        for run in (await database.runs(page)).values():
            found[run.id] = shown(run)
    return found
