"""Acts on many runs at once: the requests that are kept, and their writes to runs.

A request is a document with the act and its runs. One process at a time may write to these runs,
and each of its transactions counts the runs in that document. So nothing is written twice, or after
the request was cancelled, even if a process is killed in between. The progress of listeners is in
the entries of copies, which name the request, or in requests to listeners that are part of it. The
server deletes the document ``history_days`` after it was made, like a row of history.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from attrs import frozen
from bson import encode
from pymongo import ReturnDocument
from pymongo.asynchronous.client_session import AsyncClientSession

from caxev.core.errors import NothingToDo
from caxev.core.history import HistoryRow
from caxev.core.model import RunId
from caxev.core.update import RunUpdate
from caxev.database.client import Document
from caxev.database.connection import operation
from caxev.database.history import History
from caxev.database.requests import Request, request_document
from caxev.database.rows import Row
from caxev.database.run_queries import Runs
from caxev.failpoints import point

_PATIENCE: Final = 90.0
"""Seconds in which a write must succeed. A command that was killed in a transaction locks its runs
for a minute, until the server aborts the transaction."""
_MOST: Final = 8_000_000
"""Maximum size of the list of a request's runs, in bytes, so that all may be listed once more, as
failed: a document has no more than 16 MiB."""
_BULK: Final = {"terms": {"$exists": True}}
"""Finds these documents among the requests to listeners."""


@frozen(kw_only=True)
class BulkRequest:
    """A requested act on runs: its kind and terms, who requested it, and when (UTC).

    `runs` None: of all that it concerns. The first `written` of them have been written to, or
    refused; those of them that were refused, or have changed at each attempt, are `failed`.
    `writer` is the token of the process that writes, None if none does; one that was killed leaves
    it.
    """

    id: str
    kind: str
    runs: tuple[RunId, ...] | None
    terms: Mapping[str, Any]
    by: str
    at: datetime
    written: int = 0
    failed: tuple[RunId, ...] = ()
    writer: str | None = None

    @property
    def left(self) -> tuple[RunId, ...]:
        """The runs that are still to be written to, or to be tried again."""
        return (*self.failed, *(self.runs or ())[self.written :])


@frozen
class RequestPart:
    """Runs of a request that are written to together, by the process whose token is `writer`.

    Nothing is written for those in `refused`.
    """

    request: str
    writer: str
    runs: Sequence[RunId]
    refused: Collection[RunId] = ()


class BulkRequests(Runs, History):
    """Keeping requests about many runs, and writing what people ask to runs."""

    @operation
    async def write_asked(
        self,
        writes: Sequence[tuple[RunUpdate, HistoryRow | None]],
        now: datetime,
        part: RequestPart | None = None,
    ) -> list[bool]:
        """Write what a person asks of runs, together with its rows of history.

        Returns for each whether it still fitted the run: if not, nothing of it is written. With
        `part` the runs are counted in their request. Raises `NothingToDo`, and writes nothing, if
        that was cancelled or another process has gone on with it.
        """

        async def write(session: AsyncClientSession) -> list[bool]:
            done = [await self._apply(one, now, session) is not None for one, _ in writes]
            rows = [row for (_, row), fits in zip(writes, done, strict=True) if fits and row]
            await self._add_rows(rows, session)
            if part is not None:
                missed = {one.run for (one, _), fits in zip(writes, done, strict=True) if not fits}
                await self._count(part, missed, session)
            return done

        done = await self._transaction(write, _PATIENCE)
        point("database.asked.after")
        return done

    async def _count(
        self, part: RequestPart, missed: Collection[RunId], session: AsyncClientSession
    ) -> None:
        """Count the runs of a part as written, in the transaction that does it."""
        runs, failed = ({"$literal": [*some]} for some in (part.runs, {*part.refused, *missed}))
        # Runs that had failed were counted before. The server reckons: it knows what is counted
        # now.
        change = {
            "written": {"$add": ["$written", {"$size": {"$setDifference": [runs, "$failed"]}}]},
            "failed": {"$concatArrays": [{"$setDifference": ["$failed", runs]}, failed]},
        }
        mine = {"_id": part.request, "writer": part.writer}
        done = await self._requests.update_one(mine, [{"$set": change}], session=session)
        if not done.matched_count:
            why = f"request {part.request} was cancelled, or goes on elsewhere"
            raise NothingToDo(why)

    @operation
    async def add_bulk(
        self, bulk: BulkRequest, parts: Sequence[tuple[Request, HistoryRow]] = ()
    ) -> None:
        """Keep a request, with all that it asks of listeners, and the rows of history of these.

        Raises `NothingToDo`, and writes nothing, if it is about too many runs.
        """
        _check_size(bulk.runs or ())
        days = self.settings.history_days
        expires = {"expires": bulk.at + timedelta(days=days)} if days else {}
        runs = None if bulk.runs is None else list(bulk.runs)
        fields = {"kind": bulk.kind, "runs": runs, "terms": dict(bulk.terms)}
        counts = {"written": bulk.written, "failed": list(bulk.failed)}
        whole = {"_id": bulk.id, **fields, **counts, "by": bulk.by, "at": bulk.at, **expires}
        documents = [request_document(one, bulk.by, bulk.at) for one, _ in parts]

        async def add(session: AsyncClientSession) -> None:
            await self._requests.insert_many([whole, *documents], session=session)
            await self._add_rows([row for _, row in parts], session)

        await self._transaction(add)

    @operation
    async def begin_bulk(self, name: str, writer: str) -> BulkRequest | None:
        """Have a process write for a request, and no other one; return the request as it is now."""
        found = await self._requests.find_one_and_update(
            {**_BULK, "_id": name},
            {"$set": {"writer": writer}},
            return_document=ReturnDocument.AFTER,
        )
        return self._first(found)

    @operation
    async def end_bulk(self, name: str, writer: str | None = None) -> None:
        """Have that process, or (None) whichever it is, write no more for a request."""
        whose = {} if writer is None else {"writer": writer}
        await self._requests.update_one({**_BULK, "_id": name, **whose}, {"$unset": {"writer": ""}})

    @operation
    async def bulk(self, name: str) -> BulkRequest | None:
        """Return the request of that id, if there is one."""
        return self._first(await self._requests.find_one({**_BULK, "_id": name}))

    def _first(self, found: Document | None) -> BulkRequest | None:
        requests = self._read(self._requests, [found] if found else [], bulk_from)
        return requests[0][0] if requests else None

    async def bulks(self, limit: int) -> AsyncGenerator[BulkRequest, None]:
        """Return the latest requests, the newest first; one at a time, as each has all its runs."""
        for name in await self.bulk_names(limit):
            if (found := await self.bulk(name)) is not None:
                yield found

    @operation
    async def bulk_names(self, limit: int) -> list[str]:
        """Return the ids of the latest requests, the newest first."""
        cursor = self._requests.find(_BULK, {"_id": 1}).sort("at", -1).limit(limit)
        return [row["_id"] for row in await cursor.to_list(None) if isinstance(row["_id"], str)]


def _check_size(runs: Sequence[RunId]) -> None:
    size = len(encode({"runs": runs}))
    if size > _MOST:
        most = len(runs) * _MOST // size
        raise NothingToDo(
            f"{len(runs)} runs are too many for one request: select at most {most} at a time"
        )


def bulk_from(document: Document) -> BulkRequest:
    """Return the request that a document holds. Raises `Malformed`."""
    row = Row.of(document)
    return BulkRequest(
        id=row.text("_id"),
        kind=row.text("kind"),
        runs=row.runs("runs"),
        terms=Row.of(document.get("terms")).document,
        by=row.text("by"),
        at=row.moment("at"),
        written=row.whole("written"),
        failed=row.runs("failed") or (),
        writer=row.text("writer", None),
    )
