"""Requests for copies of many runs: what was asked is kept, and each copy's entry names it.

Such a document is written once and never changed: how far it is, and what is left of it, the
entries show. So nothing has to be kept consistent, whoever is killed in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Final

from attrs import asdict, frozen

from caxev.core.model import RunId
from caxev.database.client import Document
from caxev.database.connection import Connection, operation
from caxev.database.rows import Row

_KIND: Final = "copies"
_PAGE: Final = 5000
"""Ids of runs that one query names."""


@frozen(kw_only=True)
class BulkRequest:
    """A request that runs are copied to a site: their ids, the data, and who asked when (UTC).

    `source` None: from the best. `keep_days`, `keep_until` and `why` are those of a hold.
    """

    id: str
    runs: tuple[RunId, ...]
    type: str
    version: str | None = None
    source: str | None = None
    target: str
    keep_days: float | None = None
    keep_until: datetime | None = None
    why: str | None = None
    by: str
    at: datetime


@frozen
class BulkProgress:
    """How many of the copies, and how many bytes of them, have each status."""

    copies: dict[str, int]
    bytes: dict[str, int]


class BulkRequests(Connection):
    """Keeping requests for many copies, and counting what has become of them."""

    @operation
    async def add_bulk(self, bulk: BulkRequest) -> None:
        """Keep a request."""
        await self._requests.insert_one({"_id": bulk.id, "kind": _KIND, **_row(bulk)})

    @operation
    async def bulk(self, name: str) -> BulkRequest | None:
        """Return the request of that id, if there is one."""
        found = await self._requests.find_one({"_id": name, "kind": _KIND})
        return None if found is None else _from(found)

    @operation
    async def bulks(self, limit: int) -> list[BulkRequest]:
        """Return the latest requests, the newest first."""
        cursor = self._requests.find({"kind": _KIND}).sort("at", -1).limit(limit)
        return [_from(one) for one in await cursor.to_list(None)]

    @operation
    async def bulk_progress(self, bulk: BulkRequest) -> BulkProgress:
        """Count the copies of a request by their status; those it has no more are not counted."""
        found = BulkProgress({}, {})
        for ids in _pages(bulk.runs):
            cursor = await self._runs.aggregate(_counting(ids, bulk.id))
            async for row in cursor:
                status = str(row["_id"])
                found.copies[status] = found.copies.get(status, 0) + row["copies"]
                found.bytes[status] = found.bytes.get(status, 0) + int(row["bytes"])
        return found


def _counting(ids: Sequence[RunId], bulk: str) -> list[Document]:
    whole = {"$cond": [{"$eq": ["$data.type", "raw"]}, "$raw_size_byte", 0]}
    names = ("raw_size_byte", "data.bulk", "data.status", "data.size", "data.type")
    return [
        {"$match": {"_id": {"$in": list(ids)}}},
        {"$project": dict.fromkeys(names, 1)},
        {"$unwind": "$data"},
        {"$match": {"data.bulk": {"$eq": bulk}}},
        {
            "$group": {
                "_id": "$data.status",
                "copies": {"$sum": 1},
                "bytes": {"$sum": {"$ifNull": ["$data.size", whole]}},
            }
        },
    ]


def _pages(ids: Sequence[RunId]) -> Iterator[Sequence[RunId]]:
    return (ids[start : start + _PAGE] for start in range(0, len(ids), _PAGE))


def _row(bulk: BulkRequest) -> Document:
    return asdict(bulk, recurse=False, filter=lambda one, _value: one.name != "id")


def _from(document: Document) -> BulkRequest:
    row = Row.of(document)
    return BulkRequest(
        id=str(document["_id"]),
        runs=tuple(row.many("runs")),
        type=row.text("type"),
        version=row.text("version", None),
        source=row.text("source", None),
        target=row.text("target"),
        keep_days=row.number("keep_days", None),
        keep_until=row.moment("keep_until", None),
        why=row.text("why", None),
        by=row.text("by"),
        at=row.moment("at"),
    )
