"""Merge the history of a run with its ledger, entries and tombstones, in order of time. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from attrs import evolve

from caxev.cli.history_rows import facts, happened
from caxev.cli.output import Column, Parts, columns, event_parts
from caxev.core import entry
from caxev.core.history import HistoryRow, What
from caxev.core.ledger import Reaction
from caxev.core.model import TRANSFERRED, CopyKey, Event, Run

COLUMNS: Final = columns(
    "time", "site", Column("handler", "WHO", minor=1), Column("event", "WHAT"), "state", "why"
)


def rows(
    run: Run,
    history: Sequence[HistoryRow],
    reactions: Sequence[tuple[Reaction, Mapping[str, Any]]],
    site: str | None = None,
) -> list[dict[str, Any]]:
    """Return rows by time (UTC), of all sites or one.

    The run's document repeats what the history has, and has what old programs did: it adds only
    what the history does not show.
    """
    shown = [_happened(run, row) for row in history]
    known = {(_place(row["event"]), row["state"]): row["time"] for row in shown}
    found = [row for row in (*_of_run(run), *_of_tombstones(run)) if not _is_known(row, known)]
    found += [*shown, *_of_reactions(reactions)]
    ours = (row for row in found if row["time"] is not None and site in (None, row["site"]))
    return sorted(ours, key=lambda row: row["time"])


_SAME: Final = timedelta(seconds=10)
"""A settlement comes after its write to the run, by less than this."""


def _is_known(row: Mapping[str, Any], known: Mapping[Any, datetime]) -> bool:
    at, names = row["time"], {row["state"]}
    if row["state"] == TRANSFERRED:  # verified, if a handler has found that it is good
        names |= {What.VERIFIED, What.TRANSFERRED}
    times = (known.get((_place(row["event"]), name)) for name in names)
    return at is not None and any(one is not None and abs(one - at) <= _SAME for one in times)


def _place(event: Parts | None) -> str | None:
    return None if event is None else event.words


def _happened(run: Run, row: HistoryRow) -> dict[str, Any]:
    copy, what = happened(row)
    event = None if row.event is None else event_parts(row.event)
    return {
        "time": row.at,
        "site": row.site,
        "handler": row.handler or row.deed.by,
        "event": event if copy is None else _copy(run, copy),
        "state": what,
        "why": facts(row),
    }


def _of_run(run: Run) -> Iterator[dict[str, Any]]:
    for copy in run.copies:
        row = {"site": copy.host, "event": _copy(run, copy.key)}
        source = f"from {copy.source}" if copy.source else ""
        yield {**row, "time": copy.creation_time, "state": "begun", "why": source}
        yield {**row, "time": copy.since, "state": copy.status, "why": copy.error or ""}
        # Equal if the verification itself has set the status: one row is enough.
        if copy.verified_at != copy.since:
            yield {**row, "time": copy.verified_at, "state": "verified", "why": ""}


def _of_reactions(
    reactions: Sequence[tuple[Reaction, Mapping[str, Any]]],
) -> Iterator[dict[str, Any]]:
    for reaction, document in reactions:
        yield {
            # The latest time that is known: a pending reaction has only that of its event.
            "time": document.get("settled") or reaction.started or reaction.at,
            "site": reaction.site,
            "handler": reaction.handler,
            "event": event_parts(reaction.event),
            "state": str(reaction.state),
            "why": reaction.note,
        }


def _of_tombstones(run: Run) -> Iterator[dict[str, Any]]:
    # Old programs wrote this field, too: check every type.
    for row in filter(None, map(entry.mapping, entry.rows(run.document.get("deleted_data")))):
        kind, host, version = (row.get(name) for name in ("type", "host", "pax_version"))
        proof = [str(one.get("host")) for one in row.get("proof") or () if isinstance(one, Mapping)]
        yield {
            "time": entry.as_utc(row.get("date")),
            "site": host,
            "handler": row.get("by"),
            "event": _copy(run, CopyKey(str(kind), str(host), version)),
            "state": "deleted",
            "why": f"{row.get('why') or ''}{'; good at ' if proof else ''}{', '.join(proof)}",
        }


def _copy(run: Run, key: CopyKey) -> Parts:
    """Return a copy without its state, which has a column of its own."""
    return evolve(event_parts(Event(run.id, key, None, None)), words=str(key))
