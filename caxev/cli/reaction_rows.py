"""Format reactions for ``caxev status``, ``caxev reactions`` and ``caxev explain``."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any, Final

from attrs import frozen

from caxev.cli.history_rows import facts
from caxev.cli.output import Column, columns, event_parts, lasting, run_parts, size
from caxev.core.history import HistoryRow
from caxev.core.ledger import Reaction, State
from caxev.core.transcript import unpacked

RUN_COLUMN: Final = Column("run", "RUN")
COLUMNS: Final = columns(
    "site",
    "handler",
    "event",
    "state",
    Column("progress", minor=1),
    Column("due", minor=1),
    Column("attempts", minor=2),
    "note",
)
"""The columns of a `reaction_row`; in lists of several runs `RUN_COLUMN` follows the site."""


@frozen
class ReportedProgress:
    """The progress of reactions in bytes, and bytes a second; None if unknown."""

    done: int
    total: int | None = None
    rate: float | None = None

    @classmethod
    def of(cls, row: object) -> ReportedProgress | None:
        """Return the progress in a reaction's ledger document; None if it has none, or nonsense."""
        # Ledger documents may come from other versions of the program: trust no type.
        match row:
            case {"done": int(done)}:
                assert isinstance(row, Mapping)
                return cls(done, _total(row.get("total")), _rate(row.get("rate")))
            case _:
                return None

    @classmethod
    def sum(cls, several: Iterable[ReportedProgress]) -> ReportedProgress:
        """Return the total progress, as far as it is known."""
        found = list(several)
        rates = [one.rate for one in found if one.rate is not None]
        return cls(
            sum(one.done for one in found),
            sum(one.total or 0 for one in found) or None,
            sum(rates) if rates else None,
        )

    @property
    def left(self) -> float | None:
        """Return the seconds until the end at this rate; None if unknown."""
        if self.total is None or not self.rate:
            return None
        return max(self.total - self.done, 0) / self.rate

    def __str__(self) -> str:
        whole = "" if self.total is None else f" of {size(self.total)}"
        rate = "" if self.rate is None else f", {size(self.rate)}/s"
        left = "" if self.left is None else f", {lasting(self.left)} left"
        return f"{size(self.done)}{whole}{rate}{left}"


def _total(value: object) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _rate(value: object) -> float | None:
    if not isinstance(value, int | float) or not isfinite(value):
        return None
    return max(float(value), 0.0)


def progress_cells(progress: ReportedProgress | None) -> dict[str, Any]:
    """Return the cells of a row with its progress, for people and for programs."""
    left = None if progress is None else progress.left
    return {
        "progress": None if progress is None else str(progress),
        "bytes_done": None if progress is None else progress.done,
        "bytes_total": None if progress is None else progress.total,
        "bytes_per_s": None if progress is None else progress.rate,
        "eta_s": None if left is None else round(left),
    }


def _output(document: Mapping[str, Any]) -> dict[str, str]:
    """Return the output of the programs that the reaction has run."""
    parts = document.get("kept")
    if not parts:
        return {}
    try:
        return {"said": unpacked(parts, document["kept_parts"])}
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
        **_output(document),
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
    }
