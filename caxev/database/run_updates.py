"""Writing run documents."""

from __future__ import annotations

from datetime import datetime

from pymongo import ReturnDocument

from caxev.core.model import Run, RunId, RunUpdate
from caxev.database.client import Document
from caxev.database.connection import Connection, Session, operation
from caxev.database.runs import write_of


class RunUpdates(Connection):
    """Adding runs, and changing them while they are what the update expects."""

    async def _apply(self, update: RunUpdate, now: datetime, session: Session) -> Document | None:
        query, change, array_filters = write_of(update, now)
        return await self._runs.find_one_and_update(
            query,
            change,
            array_filters=array_filters,
            return_document=ReturnDocument.AFTER,
            session=session,
        )

    @operation
    async def update_run(self, update: RunUpdate, now: datetime) -> Run | None:
        """Write a run update on behalf of a person; return None if it no longer fits."""
        document = await self._apply(update, now, None)
        return None if document is None else Run.from_document(document)

    @operation
    async def insert_run(self, document: Document) -> RunId:
        """Add a run document; return its id."""
        return (await self._runs.insert_one(document)).inserted_id

    @operation
    async def new_run(self, name: str, detector: str, fields: Document) -> RunId:
        """Add a run of that name and detector unless there is one; return its id."""
        found = await self._runs.find_one_and_update(
            {"name": name, "detector": detector},
            {"$setOnInsert": {**fields, "data": []}},
            {"_id": 1},
            upsert=True,
            return_document=ReturnDocument.AFTER,
        )
        assert found is not None  # an upsert always has one
        return found["_id"]
