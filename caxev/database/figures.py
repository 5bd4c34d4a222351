"""Figures for metrics: what is owed, and how large caxev's own collections are."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from attrs import frozen

from caxev.core.entry import moment
from caxev.core.ledger import State
from caxev.core.model import TRANSFERRED, TRANSFERRING
from caxev.database.client import Document
from caxev.database.connection import LONG_LIMIT, Connection, operation, within
from caxev.database.selections import or_null
from caxev.database.setup import OWN


@frozen
class Owed:
    """Reactions of a lane: `state` is ``due``, ``waiting`` (due later) or ``failed``.

    `since` is when the first of them was due, UTC.
    """

    lane: str
    state: str
    number: int
    since: datetime | None


@frozen
class Size:
    """The documents of a collection, and their size in bytes."""

    collection: str
    documents: int
    bytes: int


class Figures(Connection):
    """Counting, each by an index, or by what the server knows anyway."""

    @operation
    async def owed(self, site: str, now: datetime) -> list[Owed]:
        """Count the site's reactions that are not done and not running."""
        pending = {"site": site, "state": State.PENDING.value, "epoch": {"$exists": False}}
        failed = {"site": site, "state": State.FAILED.value}
        is_due = {"$cond": [{"$gt": ["$due", now]}, "waiting", "due"]}
        return [
            *await self._counted(pending, is_due),
            *await self._counted(failed, {"$literal": "failed"}),
        ]

    async def _counted(self, query: Document, state: Document) -> list[Owed]:
        # A malformed one has no place in a table of lanes.
        match = {"$match": {**query, "lane": {"$type": "string"}, "due": {"$type": "date"}}}
        key = {"lane": "$lane", "state": state}
        group = {"$group": {"_id": key, "number": {"$sum": 1}, "since": {"$min": "$due"}}}
        rows = await (await self._ledger.aggregate([match, group])).to_list(None)
        # A date that is out of Python's range is none.
        return [
            Owed(**row["_id"], number=row["number"], since=moment(row["since"])) for row in rows
        ]

    @operation
    async def sizes(self) -> list[Size]:
        """Return the sizes of caxev's own collections; the server reads no document for that."""
        return [await self._size(name) for name in OWN]

    async def _size(self, name: str) -> Size:
        collection = self._own(name)
        documents = await collection.estimated_document_count()
        stats: list[Document] = [
            {"$collStats": {"storageStats": {}}},
            {"$project": {"storageStats.size": 1}},
        ]
        rows = await (await collection.aggregate(stats)).to_list(None)
        return Size(name, documents, sum(int(row["storageStats"]["size"]) for row in rows))

    @within(LONG_LIMIT)
    async def jobs(self) -> list[dict[str, Any]]:
        """Count the jobs of copies that are not complete: rows of host, type, state and number.

        `state` is ``waiting`` before the job is submitted, ``submitted``, or ``ended``.
        """
        entry = {"job": {"$exists": True}, "status": TRANSFERRING}
        state = {
            "$switch": {
                "branches": [
                    {"case": {"$gt": ["$data.job_ended", None]}, "then": "ended"},
                    {"case": {"$gt": ["$data.job.submitted", None]}, "then": "submitted"},
                ],
                "default": "waiting",
            }
        }
        key = {"host": or_null("$data.host"), "type": or_null("$data.type"), "state": state}
        pipeline: list[Document] = [
            {"$match": {"data": {"$elemMatch": entry}}},
            {"$project": {f"data.{name}": 1 for name in _OF_JOBS}},
            {"$unwind": "$data"},
            {"$match": {f"data.{name}": value for name, value in entry.items()}},
            {"$group": {"_id": key, "number": {"$sum": 1}}},
        ]
        rows = await (await self._runs.aggregate(pipeline)).to_list(None)
        return [{**row["_id"], "number": row["number"]} for row in rows]

    @within(LONG_LIMIT)
    async def readings(self, now: datetime, longest: int) -> list[dict[str, Any]]:
        """Count good copies by host, and by how many whole days ago they were read.

        Each row has `host`, `day` (at most `longest`), `copies`, and `oldest`, when the first of
        them was read. The day None is of those that were never read, as far as is known.
        """
        read = "$data.verified_at"
        days = {"$floor": {"$divide": [{"$subtract": [now, read]}, DAY]}}
        is_read = {"$eq": [{"$type": read}, "date"]}
        day = {"$cond": [is_read, {"$min": [days, longest]}, None]}
        key: Document = {"host": "$data.host", "day": day}
        good: Document = {"data.status": TRANSFERRED}
        pipeline: list[Document] = [
            {"$match": good},
            {"$project": {f"data.{name}": 1 for name in ("host", "status", "verified_at")}},
            {"$unwind": "$data"},
            {"$match": {**good, "data.host": {"$type": "string"}}},
            {"$group": {"_id": key, "copies": {"$sum": 1}, "oldest": {"$min": read}}},
        ]
        rows = await (await self._runs.aggregate(pipeline)).to_list(None)
        return [
            {
                "host": row["_id"]["host"],
                "day": None if (found := row["_id"]["day"]) is None else max(int(found), 0),
                "copies": row["copies"],
                "oldest": moment(row["oldest"]) or now,
            }
            for row in rows
        ]


DAY: Final = 86400 * 1000
"""Milliseconds."""
_OF_JOBS: Final = ("host", "type", "status", "job", "job_ended")
