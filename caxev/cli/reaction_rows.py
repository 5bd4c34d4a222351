"""Format reactions for ``caxev status``, ``caxev reactions`` and ``caxev explain``."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from caxev.cli.history_rows import facts
from caxev.cli.options import options
from caxev.cli.output import Column, columns, event_parts, run_parts
from caxev.core.amounts import ReportedProgress
from caxev.core.history import HistoryRow
from caxev.core.ledger import Reaction, State, trigger_named
from caxev.core.model import TRANSFERRING, Run
from caxev.core.transcript import unpacked

if TYPE_CHECKING:
    from caxev.database import Database

COLUMNS: Final = columns(
    "site",
    "run",
    "handler",
    "event",
    "state",
    Column("progress", minor=1),
    Column("due", minor=1),
    Column("attempts", minor=2),
    "note",
)
"""The columns of a `reaction_row`."""
RUNNING: Final = columns(
    "site", "run", "handler", "event", "from", "to", "started", Column("progress", minor=1), "note"
)
"""The columns of a `reaction_row` with the cells of `running_cells`, in lists of running ones."""


def running_cells(reaction: Reaction, run: Run | None) -> dict[str, Any]:
    """Return the cells about a running reaction: since when, and between which sites data goes."""
    name = trigger_named(reaction.site, reaction.handler, reaction.aspect)
    copies = [] if run is None else [one for one in run.copies if one.trigger == name]
    # One reaction may have made several copies, one after the other.
    moving = next((one for one in copies if one.status == TRANSFERRING), None)
    return {
        "from": None if moving is None else moving.source,
        "to": None if moving is None else moving.host,
        "started": reaction.started,
    }


def progress_cells(progress: ReportedProgress | None) -> dict[str, Any]:
    """Return the cells of a row with its progress, for people and for programs."""
    if progress is None:
        return dict.fromkeys(("progress", *ReportedProgress(0).values))
    return {"progress": str(progress), **progress.values}


def _output(parts: Sequence[bytes] | None, number: int | None) -> dict[str, str]:
    """Return the output of the programs that the reaction has run: the last parts of so many."""
    if not parts:
        return {}
    try:
        return {"said": unpacked(parts, number or len(parts))}
    except (LookupError, TypeError, zlib.error):
        return {"said": "[the output in the ledger is unreadable]"}


def reaction_row(reaction: Reaction, document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of a reaction, with its progress if that is known."""
    progress = document.get("progress")
    return {
        "site": reaction.site,
        "event": event_parts(reaction.event),
        "handler": reaction.handler,
        "state": str(reaction.state),
        "due": reaction.due,
        "priority": reaction.priority,
        "attempts": reaction.attempts,
        **progress_cells(ReportedProgress.of(progress)),
        "progress_at": progress.get("at") if isinstance(progress, dict) else None,
        "note": reaction.note,
        **_output(document.get("kept"), document.get("kept_parts")),
    }


def done_row(row: HistoryRow) -> dict[str, Any]:
    """Return the row of a reaction that is done, from the history."""
    return {
        "run": run_parts(row.run, row.number, row.name),
        "site": row.site,
        "event": None if row.event is None else event_parts(row.event),
        "handler": row.handler,
        "state": str(State.DONE),
        "due": row.at,
        "attempts": row.attempt - 1,
        "note": ", ".join(filter(None, (str(row.deed.what), facts(row)))),
        **_output(row.output, row.outputs),
    }


def site_names(site: str | None) -> tuple[str, ...]:
    """Return the names of the sites to list: the one named, or all in sites.json."""
    return tuple(options().sites()) if site is None else (site,)


async def known_sites(database: Database, site: str | None) -> list[str]:
    """Return the sites to list: the one named, or all in sites.json and all that ever listened."""
    records = () if site is not None else await database.site_records()
    return list(dict.fromkeys([*site_names(site), *(record.site for record in records)]))
