"""Merge the ledger, the entries and the tombstones of a run to its history, in order of time.

The ledger keeps only the last reaction of each handler and aspect. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from attrs import evolve

from caxev.cli.output import Column, Parts, columns, event_parts
from caxev.core.ledger import Reaction
from caxev.core.model import CopyKey, Event, Run

COLUMNS: Final = columns(
    "time", "site", Column("handler", "WHO", minor=1), Column("event", "WHAT"), "state", "why"
)


def rows(
    run: Run, reactions: Sequence[tuple[Reaction, Mapping[str, Any]]], site: str | None = None
) -> list[dict[str, Any]]:
    """Return rows by time (UTC), of all sites or one, without reactions that did nothing."""
    found = [*_of_run(run), *_of_reactions(reactions), *_of_tombstones(run)]
    ours = (row for row in found if row["time"] is not None and site in (None, row["site"]))
    return sorted(ours, key=lambda row: row["time"])


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
        state = str(reaction.state)
        if state == "done" and reaction.note:
            continue  # a reaction that is done with a note was skipped
        yield {
            # The latest time that is known: a pending reaction has only that of its event.
            "time": document.get("settled") or reaction.started or reaction.at,
            "site": reaction.site,
            "handler": reaction.handler,
            "event": event_parts(reaction.event),
            "state": state,
            "why": reaction.note,
        }


def _of_tombstones(run: Run) -> Iterator[dict[str, Any]]:
    from caxev.core.entry import as_utc, mapping, rows

    # Old programs wrote this field, too: check every type.
    for row in filter(None, map(mapping, rows(run.document.get("deleted_data")))):
        kind, host, version = (row.get(name) for name in ("type", "host", "pax_version"))
        proof = [str(one.get("host")) for one in row.get("proof") or () if isinstance(one, Mapping)]
        yield {
            "time": as_utc(row.get("date")),
            "site": host,
            "handler": row.get("by"),
            "event": _copy(run, CopyKey(str(kind), str(host), version)),
            "state": "deleted",
            "why": f"{row.get('why') or ''}{'; good at ' if proof else ''}{', '.join(proof)}",
        }


def _copy(run: Run, key: CopyKey) -> Parts:
    """Return a copy without its state, which has a column of its own."""
    return evolve(event_parts(Event(run.id, key, None, None)), words=str(key))
