"""What the history must have of a run that has come to its end, and must not. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from caxev.core.entry import rows as rows_of
from caxev.core.history import HistoryRow, What
from caxev.core.ledger import Reaction
from caxev.core.model import TRANSFERRED, CopyField, CopyKey, Run

BRINGING: Final = ("pull", "push", "backup", "recall", "rucio_upload", "rucio_pull")
"""Handlers that bring a copy from elsewhere, of which the history must have a row."""
ONCE: Final = (What.TRANSFERRED, What.REPAIRED, What.DELETED)


def untold(run: Run, rows: Sequence[HistoryRow], owed: Iterable[Reaction]) -> Iterator[str]:
    """Say what of a run's life its rows lack, tell twice, or tell although it is still owed."""
    once = Counter(map(_event_of, (row for row in rows if row.deed.what in ONCE)))
    yield from (
        f"history has {number} rows of {what}" for what, number in once.items() if number > 1
    )
    ids = {row.id for row in rows}
    for reaction in owed:
        if f"{reaction.site}:{reaction.generation:x}" in ids:
            yield f"history has {reaction.handler} of {reaction.event}, which is owed"
    there = {(str(row.deed.what), copy) for row in rows for copy in _copies_of(row)}
    for copy in run.copies:
        handler = (copy.trigger or "").split(": ")[1:2]
        brought = any((what, copy.key) in there for what in (What.TRANSFERRED, What.REPAIRED))
        if copy.status == TRANSFERRED and handler and handler[0] in BRINGING and not brought:
            yield f"history does not have how {copy.key} was brought by {handler[0]}"
    for stone in rows_of(run.document.get("deleted_data")):
        key = _key_of(stone)
        if stone.get("proof") and (str(What.DELETED), key) not in there:
            yield f"history does not have that {key} was deleted"


def _event_of(row: HistoryRow) -> tuple[Any, ...]:
    event = (row.aspect, row.before, row.after)
    return (row.site, row.handler, str(row.deed.what), row.deed.target, *event)


def _copies_of(row: HistoryRow) -> Iterator[CopyKey]:
    aspect = row.aspect.key if isinstance(row.aspect, CopyField) else row.aspect
    if isinstance(aspect, CopyKey):
        for host in row.deed.target.split(", ") if row.deed.target else [aspect.host]:
            yield aspect.at(host)
    elif row.deed.target:  # a tag had it brought
        yield CopyKey("raw", row.deed.target)


def _key_of(stone: Any) -> CopyKey:
    return CopyKey(stone.get("type"), stone.get("host"), stone.get("pax_version"))
