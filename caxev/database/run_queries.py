"""The run documents: reading them, and writing them while they are what an update expects."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Iterable, Sequence
from datetime import datetime
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Final, cast

from bson import decode_all
from bson.regex import Regex
from pymongo import ReturnDocument
from pymongo.asynchronous.cursor import AsyncCursor

from caxev.core.errors import GiveUp
from caxev.core.model import DELETING, REQUESTED, TRANSFERRED, TRANSFERRING, Run, RunId
from caxev.core.selection import Selection
from caxev.core.update import RunUpdate
from caxev.database.client import Document, InvalidDocument
from caxev.database.connection import LONG_LIMIT, PAGE, Session, operation, within
from caxev.database.run_pages import RunPages
from caxev.database.runs import write_of
from caxev.database.selections import totals_pipeline

if TYPE_CHECKING:
    from caxev.copies.sharing import Neighbours

TABLE: Final = 32 << 20
"""Bytes of a table: handlers take all its rows."""
_BEGUN: Final = (REQUESTED, TRANSFERRING)
_NAMES: Final = ("number", "name", "detector")
_PLACE: Final = ("type", "host", "pax_version", "status", "location")


class Runs(RunPages):
    """Queries and updates. All but `runs` read only the fields that caxev itself uses."""

    @operation
    async def estimated_runs(self) -> int:
        """Return about how many runs are stored, at no cost."""
        return await self._runs.estimated_document_count()

    @operation
    async def runs(self, ids: Iterable[RunId]) -> dict[RunId, Run]:
        """Read whole run documents as they are now."""
        cursor = self._runs.find({"_id": {"$in": list(ids)}})
        return {doc["_id"]: Run.from_document(doc) for doc in await cursor.to_list(None)}

    async def whole_runs(self, ids: Sequence[RunId]) -> AsyncGenerator[dict[RunId, Run], None]:
        """Read whole run documents as they are now, a reply at a time: up to 16 MB of them."""
        cursor = self._runs.find_raw_batches({"_id": {"$in": ids}})

        async def whole_runs() -> list[Document]:
            batch: Any = await anext(cursor, b"")  # whatever its type says
            return decode_all(batch, self._runs.codec_options)

        while ids and cursor.alive:
            yield {one["_id"]: Run.from_document(one) for one in await self._call(whole_runs)}

    def held(self) -> AsyncGenerator[list[Run], None]:
        """Read the runs with a copy that somebody holds or has held, by number, page by page."""

        async def find() -> AsyncCursor[Document]:
            held = {"data.holds.at": {"$exists": True}}
            # No index has this order, and the server sorts at most 100 MB in memory.
            return self._shown(held).sort("number").allow_disk_use(True)

        return self._by_pages(find, PAGE, lambda page: [*map(Run.from_document, page)], LONG_LIMIT)

    @within(LONG_LIMIT)
    async def totals(self, selection: Selection, now: datetime) -> list[dict[str, Any]]:
        """Count the selected copies, for each host, type and status.

        Each row has `host`, `type`, `status`, `copies`, `bytes`, and in `sized` how many of the
        copies have a known size.
        """
        pipeline = totals_pipeline(selection, now)
        cursor = await self._runs.aggregate(pipeline, allowDiskUse=True)
        return [{**row.pop("_id"), **row} for row in await cursor.to_list(None)]

    @operation
    async def oldest(
        self,
        site: str,
        type: str,  # noqa: A002  # the field's own name
        without: Iterable[str],
        skip: int,
    ) -> list[Run]:
        """Read the runs that have such a copy at the site, good or about to go, oldest first.

        Leaves out those that have one of the tags `without`. Returns `PAGE` at most, after the
        first `skip`.
        """
        here = {"type": type, "host": site, "status": {"$in": [TRANSFERRED, DELETING]}}
        query = {"data": {"$elemMatch": here}, "tags.name": {"$nin": list(without)}}
        cursor = self._shown(query).sort({"start": 1, "_id": 1}).allow_disk_use(True)
        return await _read(cursor.skip(skip).limit(PAGE))

    @operation
    async def knows_copies(self, site: str, type: str) -> bool:  # noqa: A002
        """Return whether any run has a copy of this type at a site, good or not.

        One that is still on its way does not count: it need not have a file yet.
        """
        known = {"host": site, "type": type, "status": {"$nin": _BEGUN}}
        found = await self._runs.find_one({"data": {"$elemMatch": known}}, {"_id": 1})
        return found is not None

    @operation
    async def known_locations(self, site: str, type: str, limit: int) -> list[str]:  # noqa: A002
        """Return the locations of copies at a site, good or not, of the newest runs.

        Bad ones, because a disk that is away may have made each copy an error; none that is still
        on its way, because it need not have a file yet.
        """
        known = {"host": site, "type": type, "location": {"$gt": ""}, "status": {"$nin": _BEGUN}}
        cursor = self._shown({"data": {"$elemMatch": known}}).sort("_id", -1).limit(limit)
        return [
            one.location
            for run in await _read(cursor)
            for one in run.copies
            if (one.host, one.type) == (site, type) and one.location and one.status not in _BEGUN
        ]

    @operation
    async def located(
        self, hosts: Iterable[str], locations: Sequence[str], roots: Iterable[str] = ()
    ) -> list[Run]:
        """Read the runs that have a copy on one of these hosts in one of these places.

        With `roots` also those with a copy that may be anywhere, because its location is not
        written plainly as below one of them.
        """
        odd = [_oddly_below(roots)] if (roots := tuple(roots)) else []
        ways: list[Document] = [{"location": {"$in": list(locations)}}, *odd]
        return await _read(self._shown(_having_copies(hosts, ways)))

    @operation
    async def neighbours(self, wanted: Neighbours) -> list[Run]:
        """Read the runs that have a copy whose files may be those of another copy, too.

        Only the names of runs, and keys and locations of their copies at these hosts.
        """
        paths = [PurePosixPath(name) for name in wanted.names]
        above = {str(one) for path in paths for one in (path, *path.parents)}
        below = "|".join(map(re.escape, wanted.names))
        ways: list[Document] = [
            {"location": {"$in": [*above, *(f"{one}/" for one in above)]}},
            {"location": Regex(f"^(?:{below})/")},
            _oddly_below(wanted.roots),
            {"manifest": None, "checksum": None},
            *({"manifest": one} for one in (wanted.manifest,) if one),
            *({"checksum": one} for one in (wanted.checksum,) if one),
        ]
        # These may be all runs at the hosts, if nothing is known of their content.
        query = _having_copies(wanted.hosts, ways)
        return await _read(self._runs.find(query, _places_at(wanted.hosts)))

    @operation
    async def table(self, name: str) -> list[Document]:
        """Read all rows of a collection beside the runs; none if it does not exist.

        Raises `GiveUp` if they are more than `TABLE` bytes.
        """
        collection = self._client[self.settings.database][name]
        rows: list[Document] = []
        size = 0
        async for batch in collection.find_raw_batches({}):
            size += len(batch)
            if size > TABLE:
                raise GiveUp(f"the table {name} has more than {TABLE:,} bytes: remove old rows")
            rows += decode_all(cast("bytes", batch), collection.codec_options)
        return rows

    # -- writing ----------------------------------------------------------------------------

    async def _apply(self, update: RunUpdate, now: datetime, session: Session) -> Document | None:
        try:
            query, change, array_filters = write_of(update, now)
        except (AttributeError, TypeError) as error:  # an author may have put anything into it
            raise InvalidDocument(f"this update cannot be written: {error}") from error
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


def _having_copies(hosts: Iterable[str], ways: Sequence[Document]) -> Document:
    # Null stands for a missing host, too: such an entry may be anywhere; see `Run.at`.
    return {"data": {"$elemMatch": {"host": {"$in": [*hosts, None, ""]}, "$or": list(ways)}}}


def _places_at(hosts: Iterable[str]) -> Document:
    """Return the projection of runs to their names, and where their copies at these hosts are."""
    at_hosts = {"$in": [{"$ifNull": ["$$this.host", ""]}, {"$literal": [*hosts, ""]}]}
    there = {"$filter": {"input": "$data", "as": "this", "cond": at_hosts}}
    fields = {name: f"$$this.{name}" for name in _PLACE}
    return {**dict.fromkeys(_NAMES, 1), "data": {"$map": {"input": there, "in": fields}}}


async def _read(cursor: AsyncCursor[Document]) -> list[Run]:
    return [Run.from_document(document) for document in await cursor.to_list(None)]


def _oddly_below(roots: Iterable[str]) -> Document:
    """Match a location that is not written plainly as below one of these directories."""
    tops = "|".join(re.escape(root.rstrip("/")) for root in roots)
    plainly = Regex(rf"^(?:{tops})(?:/(?!\.{{1,2}}(?:/|$))[^/]+)+$")
    return {"location": {"$regex": "^/", "$not": plainly}}
