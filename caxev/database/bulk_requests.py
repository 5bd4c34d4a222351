"""What people ask of many runs at once: the requests that are kept, and their writes to runs.

The document of such a request is written once and never changed: how far it is, and what is left of
it, show the entries of copies, which name it, or the requests to listeners that are part of it. So
nothing has to be kept consistent, whoever is killed in between. The server deletes it
``history_days`` after it was made, as a row of history.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from attrs import frozen
from pymongo.asynchronous.client_session import AsyncClientSession

from caxev.core.history import HistoryRow
from caxev.core.model import RunId
from caxev.core.update import RunUpdate
from caxev.database.client import Document
from caxev.database.connection import operation
from caxev.database.history import History
from caxev.database.rows import Row
from caxev.database.run_queries import Runs
from caxev.failpoints import point

_PATIENCE: Final = 90.0
"""Seconds in which a write must be done. A command that was killed in a transaction locks its runs
for a minute: the server only then gives it up."""
_BULK: Final = {"terms": {"$exists": True}}
"""Finds these documents among the requests to listeners."""


@frozen(kw_only=True)
class BulkRequest:
    """Something that was asked of runs: an act, by its kind and terms; by whom, when (UTC).

    `runs` None: of all that it concerns.
    """

    id: str
    kind: str
    runs: tuple[RunId, ...] | None
    terms: Mapping[str, Any]
    by: str
    at: datetime


class BulkRequests(Runs, History):
    """Keeping requests about many runs, and writing what people ask to runs."""

    @operation
    async def write_asked(
        self, writes: Sequence[tuple[RunUpdate, HistoryRow | None]], now: datetime
    ) -> list[bool]:
        """Write what a person asks of runs, together with its rows of history.

        Returns for each whether it still fitted the run: if not, nothing of it is written.
        """

        async def write(session: AsyncClientSession) -> list[bool]:
            done = [await self._apply(one, now, session) is not None for one, _ in writes]
            rows = [row for (_, row), fits in zip(writes, done, strict=True) if fits and row]
            await self._add_rows(rows, session)
            return done

        done = await self._transaction(write, _PATIENCE)
        point("database.asked.after")
        return done

    @operation
    async def add_bulk(self, bulk: BulkRequest) -> None:
        """Keep a request."""
        days = self.settings.history_days
        expires = {"expires": bulk.at + timedelta(days=days)} if days else {}
        runs = None if bulk.runs is None else list(bulk.runs)
        fields = {"kind": bulk.kind, "runs": runs, "terms": dict(bulk.terms)}
        await self._requests.insert_one(
            {"_id": bulk.id, **fields, "by": bulk.by, "at": bulk.at, **expires}
        )

    @operation
    async def bulk(self, name: str) -> BulkRequest | None:
        """Return the request of that id, if there is one."""
        found = await self._requests.find_one({**_BULK, "_id": name})
        requests = self._read(self._requests, [found] if found else [], bulk_from)
        return requests[0][1] if requests else None

    @operation
    async def bulks(self, limit: int) -> list[BulkRequest]:
        """Return the latest requests, the newest first."""
        cursor = self._requests.find(_BULK).sort("at", -1).limit(limit)
        documents = await cursor.to_list(None)
        return [one for _, one in self._read(self._requests, documents, bulk_from)]


def bulk_from(document: Document) -> BulkRequest:
    """Return the request that a document holds. Raises `Malformed`."""
    row = Row.of(document)
    runs = row.many("runs", None)
    return BulkRequest(
        id=row.text("_id"),
        kind=row.text("kind"),
        runs=None if runs is None else tuple(runs),
        terms=Row.of(document.get("terms")).document,
        by=row.text("by"),
        at=row.moment("at"),
    )
