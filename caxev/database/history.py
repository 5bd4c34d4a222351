"""The history: adding rows, and reading them page by page. `caxev.core.history` has their fields.

Each row has the time at which the server may delete it, so that every site can keep its own as long
as it wants.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from re import fullmatch
from typing import Any, Final, TypeAlias

from attrs import define, field, frozen
from pymongo import DESCENDING
from pymongo.asynchronous.cursor import AsyncCursor
from pymongo.errors import OperationFailure

from caxev.core.history import Deed, HistoryRow
from caxev.core.ledger import aspect_from, aspect_row
from caxev.core.model import RunId, new_id
from caxev.database.client import Document
from caxev.database.connection import Session, operation
from caxev.database.quarantine import Quarantine
from caxev.database.rows import Row, texts
from caxev.database.writes import AT_ONCE, check_reply, write_some

Rows: TypeAlias = Mapping[str, HistoryRow]
"""Rows of history by the keys of the reactions that they are about."""
NO_ROWS: Final[Rows] = {}
PAGE: Final = 500
"""Rows that are read at a time."""
_FEW: Final = 20
"""Rows that are read at a time with the output of programs."""
_LATEST: Final = 20
"""Rows to search for a site's latest epoch: they are nearly in order of time."""
MOST_THERE: Final = 10_000
"""Rows that are remembered as there, about."""
_DUPLICATE: Final = 11000
KeptOutput: TypeAlias = tuple[tuple[bytes, ...], int]
"""The last parts of what programs printed, packed, and how many there were."""
_LAST_PARTS: Final = {"$slice": -2}


@frozen(kw_only=True)
class HistorySearch:
    """Which rows: all that fit every condition given. `since` and `until` are UTC, inclusive.

    Only `with_output` they have the output of programs, which can be large.
    """

    site: str | None = None
    runs: Sequence[RunId] | None = None
    what: Sequence[str] = ()
    handler: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    with_output: bool = False


@define(eq=False, slots=False)
class History(Quarantine):
    """Adding rows of history and reading them. Malformed ones are left out; see `odd`."""

    # Rows that are there, and need not be tried again: as after a restored ledger.
    _there: set[str] = field(init=False, factory=set)

    @operation
    async def note(self, *rows: HistoryRow) -> None:
        """Add rows; one whose id is there already changes nothing. Repeatable if rows have ids.

        A reaction needs no note: its handler gives the facts by `Job.did`.
        """
        await self._add_rows(rows, None)

    async def _add_rows(self, rows: Sequence[HistoryRow], session: Session) -> None:
        # Inserts, not upserts: a site may add to the history, and change nothing in it.
        days = self.settings.history_days
        documents = [
            {"_id": row.id or new_id(), **history_document(row, days)}
            for row in rows
            if row.id not in self._there
        ]
        for start in range(0, len(documents), AT_ONCE):
            await self._insert(documents[start : start + AT_ONCE], session)

    def _are_there(self, rows: Collection[str]) -> None:
        if len(self._there) > MOST_THERE:
            self._there.clear()  # the server knows them, too
        self._there.update(rows)

    async def _insert(self, documents: Sequence[Document], session: Session) -> None:
        reply = await write_some(self._history, "insert", "documents", documents, session)
        errors = reply.get("writeErrors", ())
        known = [documents[one["index"]]["_id"] for one in errors if one.get("code") == _DUPLICATE]
        check_reply({**reply, "writeErrors": [e for e in errors if e.get("code") != _DUPLICATE]})
        # The server has given the transaction up: have it tried again, without those.
        if known and session is not None:
            self._are_there(known)
            again = {"errorLabels": ["TransientTransactionError"]}
            raise OperationFailure("a row of history is there already", _DUPLICATE, again)

    @operation
    async def history(self, search: HistorySearch, limit: int = PAGE) -> list[HistoryRow]:
        """Return up to `limit` rows, newest first."""
        cursor = await self._search(search, limit)
        return self._history_rows(await cursor.to_list(None))

    @operation
    async def outputs(self, run: RunId, limit: int) -> list[HistoryRow]:
        """Return the newest rows of a run with what programs printed: of each the last parts."""
        if limit <= 0:
            return []
        query = {"run": run, "kept": {"$exists": True}}
        cursor = self._history.find(query, {"kept": _LAST_PARTS}, batch_size=_FEW)
        order = [("at", DESCENDING), ("_id", DESCENDING)]
        return self._history_rows(await cursor.sort(order).limit(limit).to_list(None))

    @operation
    async def open_outputs(self, reactions: Sequence[str]) -> dict[str, KeptOutput]:
        """Return what the programs of open reactions printed, by their keys: the last parts."""
        query = {"_id": {"$in": list(reactions)}, "kept": {"$exists": True}}
        fields: Document = {"kept_parts": 1, "kept": _LAST_PARTS}
        found = await self._ledger.find(query, fields).to_list(None)
        return {one["_id"]: kept_output(one) for one in found}

    def history_pages(
        self, search: HistorySearch, limit: int = 0
    ) -> AsyncGenerator[list[HistoryRow], None]:
        """Return all rows page by page, newest first; `limit` is the most in all, 0: no limit."""
        return self._by_pages(partial(self._search, search, limit), PAGE, self._history_rows)

    async def _search(self, search: HistorySearch, limit: int) -> AsyncCursor[Document]:
        query = _query(search)
        if search.site is None and search.runs is None:
            # With each site named, the server reads them in order from one index.
            query["site"] = {"$in": await self._history.distinct("site")}
        order = [("at", DESCENDING), ("_id", DESCENDING)]
        left_out = None if search.with_output else {"kept": 0}
        found = self._history.find(query, left_out, batch_size=_FEW if search.with_output else PAGE)
        return found.sort(order).limit(limit)

    async def _last_generation(self, site: str, most: int) -> int:
        """Return the highest generation in the site's latest rows, none above `most`; else 0."""
        query = {"site": site, "handler": {"$exists": True}}
        cursor = self._history.find(query, {"_id": 1}).sort("at", DESCENDING).limit(_LATEST)
        keys = [str(row["_id"]).rpartition(":") for row in await cursor.to_list(None)]
        hexes = [text for of, _, text in keys if of == site and fullmatch("[0-9a-f]{1,16}", text)]
        # One row that is malformed must not use up all epochs.
        return max((one for text in hexes if (one := int(text, 16)) <= most), default=0)

    def _history_rows(self, documents: Sequence[Document]) -> list[HistoryRow]:
        return [row for row, _ in self._read(self._history, documents, history_row_from)]


def _query(search: HistorySearch) -> Document:
    query: Document = {}
    if search.site is not None:
        query["site"] = search.site
    if search.runs is not None:
        query["run"] = {"$in": list(search.runs)}
    if search.what:
        query["what"] = {"$in": list(search.what)}
    if search.handler is not None:
        query["handler"] = search.handler
    times = {"$gte": search.since, "$lte": search.until}
    if bounds := {name: time for name, time in times.items() if time is not None}:
        query["at"] = bounds
    return query


def history_document(row: HistoryRow, days: float) -> Document:
    """Return a row as the database keeps it for so many days (0: forever), without its id.

    Unknown and empty fields are left out, except the site, which queries use.
    """
    deed = row.deed
    fields: Document = {
        "at": row.at,
        "site": row.site,
        "what": str(deed.what),
        "handler": row.handler,
        "run": row.run,
        "number": row.number,
        "name": row.name,
        "aspect": None if row.aspect is None else aspect_row(row.aspect),
        "before": row.before,
        "after": row.after,
        "from": deed.source,
        "to": deed.target,
        "bytes": deed.bytes,
        "seconds": row.seconds,
        "waited": row.waited,
        "attempt": None if row.attempt == 1 else row.attempt,
        "files": list(deed.files),
        "reason": deed.reason,
        "by": deed.by,
        "proof": list(deed.proof),
        "kept": list(row.output),
        "kept_parts": row.outputs or None,
        "expires": row.at + timedelta(days=days) if days else None,
    }
    return {
        name: value
        for name, value in fields.items()
        if name == "site" or (value not in (None, "") and (value != [] or name == "aspect"))
    }


def history_row_from(document: Mapping[str, Any]) -> HistoryRow:
    """Return the row that a document holds. Raises `Malformed`."""
    row, (output, parts) = Row.of(document), kept_output(document)
    return HistoryRow(
        id=row.text("_id"),
        at=row.moment("at"),
        site=row.text("site"),
        deed=Deed(
            what=row.text("what"),
            source=row.text("from", ""),
            target=row.text("to", ""),
            bytes=row.whole("bytes", None),
            files=texts(row.many("files", [])),
            reason=row.text("reason", ""),
            by=row.text("by", ""),
            proof=texts(row.many("proof", [])),
        ),
        handler=row.text("handler", ""),
        run=row.run("run") if "run" in document else None,
        number=row.whole("number", None),
        name=row.text("name", ""),
        aspect=aspect_from(document["aspect"]) if "aspect" in document else None,
        before=row.text("before", None),
        after=row.text("after", None),
        seconds=row.number("seconds", None),
        waited=row.number("waited", None),
        attempt=row.whole("attempt", 1),
        output=output,
        outputs=parts,
    )


def kept_output(document: Mapping[str, Any]) -> KeptOutput:
    """Return the packed output in a document, and of how many parts these are the last."""
    kept, parts = document.get("kept"), document.get("kept_parts")
    output = tuple(one for one in kept if isinstance(one, bytes)) if isinstance(kept, list) else ()
    return output, parts if isinstance(parts, int) else len(output)
