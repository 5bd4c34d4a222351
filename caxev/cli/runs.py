"""Name runs in the output of commands, and in the options of others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from caxev.asking.base import pages
from caxev.cli.output import Parts, run_parts
from caxev.core.clock import utcnow
from caxev.core.model import CopyKey, Run, RunId
from caxev.core.selection import MOST, glob_of

if TYPE_CHECKING:
    from caxev.database import Database


def shown(run: Run) -> Parts:
    """Return a run as commands print it."""
    return run_parts(run.id, run.number, run.name)


def copy_cells(run: Run, key: CopyKey) -> dict[str, Any]:
    """Return the cells of a row that name a copy."""
    return {"run": shown(run), "type": key.type, "version": key.version, "host": key.host}


async def shown_by_name(database: Database, text: str) -> Parts:
    """Return the run that an alarm is about, which names it as ``run 7`` or ``run 161111_1434``."""
    from caxev.cli.selection import named

    word = text.removeprefix("run ")
    number = int(word) if word.isdecimal() and int(word) <= MOST else None
    name = None if number is not None else word
    glob = None if name is None else glob_of(name)
    # Two detectors may have runs of one name: then nothing shows which one is meant.
    found = await database.select(named(number, glob).selection, utcnow(), 2)
    return shown(found[0]) if len(found) == 1 else run_parts(None, number, name)


async def shown_all(database: Database, ids: Iterable[RunId]) -> dict[Any, Parts]:
    """Return runs as commands print them, by id; a run that is no longer stored has only its id."""
    found = {run: run_parts(run) for run in ids}
    for page in pages([*found]):
        for run in (await database.runs(page)).values():
            found[run.id] = shown(run)
    return found
