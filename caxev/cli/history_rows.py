"""Format rows of history, for ``caxev history``, ``reactions`` and ``explain``. Pure."""

from __future__ import annotations

from typing import Any, Final

from caxev.cli.output import SIZE, Column, columns, event_parts, run_parts
from caxev.core.amounts import lasting, size
from caxev.core.history import HistoryRow
from caxev.core.model import CopyField, CopyKey, Tag

COLUMNS: Final = columns(
    "time",
    "site",
    "run",
    "what",
    Column("of", "OF"),
    "from",
    "to",
    SIZE,
    Column("seconds", "TOOK", lasting, minor=2),
    Column("bytes_per_s", "RATE", lambda rate: f"{size(rate)}/s", minor=2),
    Column("files", minor=1),
    Column("reason", minor=1),
    Column("proof", "GOOD AT", minor=1),
    "by",
    Column("handler", minor=3),
)
"""The columns of a `history_row`."""


def history_row(row: HistoryRow) -> dict[str, Any]:
    """Return the cells of a row."""
    deed, run = row.deed, None
    if row.run is not None:
        run = run_parts(row.run, row.number, row.name)
    return {
        "time": row.at,
        "site": row.site,
        "run": run,
        "what": str(deed.what),
        "of": _of(row),
        "event": None if row.event is None else event_parts(row.event),
        "handler": row.handler or None,
        "from": deed.source or None,
        "to": deed.target or None,
        "bytes": deed.bytes,
        "seconds": row.seconds,
        "bytes_per_s": row.rate,
        "waited_s": row.waited,
        "attempt": row.attempt,
        "files": list(deed.files),
        "reason": deed.reason or None,
        "proof": list(deed.proof),
        "by": deed.by or None,
        "id": row.id,
    }


def _of(row: HistoryRow) -> str | None:
    """Return in words which data or tag it was about."""
    match row.aspect:
        case CopyKey() | CopyField() as one:
            key = CopyKey(one.type, one.host, one.version)
            # From and to name the sites between which it went.
            return key.data if row.deed.source or row.deed.target else str(key)
        case Tag(tag):
            return f"tag {tag!r}"
        case None:
            return None
        case other:
            return str(other)


def facts(row: HistoryRow) -> str:
    """Return the facts of a row in a line, without when, where and what."""
    deed = row.deed
    parts = [
        f"from {deed.source}" if deed.source else "",
        f"to {deed.target}" if deed.target else "",
        size(deed.bytes) or "",
        f"{size(row.rate)}/s" if row.rate is not None else "",
        f"files {', '.join(deed.files)}" if deed.files else "",
        deed.reason,
        f"good at {', '.join(deed.proof)}" if deed.proof else "",
        f"asked for by {deed.by}" if deed.by else "",
    ]
    return ", ".join(filter(None, parts))


def happened(row: HistoryRow) -> tuple[CopyKey | None, str]:
    """Return the copy that a row is about, and what happened to it."""
    aspect = row.aspect
    if isinstance(aspect, CopyField):
        aspect = aspect.key
    if not isinstance(aspect, CopyKey):
        return None, str(row.deed.what)
    if row.deed.target and ", " not in row.deed.target:
        aspect = aspect.at(row.deed.target)
    return aspect, str(row.deed.what)
