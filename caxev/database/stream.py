"""The change stream, in batches.

Cursor commands are sent by hand, because a batch and its resume token belong together: the token
is saved with what the batch led to, and the next batch is asked for while this one is worked on.
An event carries only which run it is about; what the run is like now is read afterwards, for the
whole batch at once, so an event is small whatever the document's size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from attrs import frozen
from bson import Int64
from loguru import logger
from pymongo.asynchronous.change_stream import AsyncDatabaseChangeStream
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import OperationFailure

from caxev.core.model import NO_FIELDS, RunId, Watched
from caxev.database.client import BAD_TOKEN_CODES, PLAIN, TOO_LARGE, Document, HistoryLost
from caxev.database.rows import is_plain
from caxev.database.site_record import Position

BATCH: Final = 1000
AWAIT: Final = 30.0
"""Seconds that the server holds an empty answer back: an idle site asks twice a minute."""

_UPDATED: Final = {"$objectToArray": {"$ifNull": ["$updateDescription.updatedFields", {}]}}
_REMOVED: Final = {"$ifNull": ["$updateDescription.removedFields", []]}
_TRUNCATED: Final = {"$ifNull": ["$updateDescription.truncatedArrays", []]}


def pipeline(watched: Watched = NO_FIELDS) -> list[Document]:
    """Let through what changes ``data``, ``tags``, a watched field or a run's existence."""
    names = {"data", "tags", *(path.partition(".")[0] for path in watched.run)}
    ours = rf"^({'|'.join(re.escape(name) for name in sorted(names))})(\.|$)"

    def any_of(paths: Document, key: str) -> Document:
        touched = {"$regexMatch": {"input": key, "regex": ours}}
        return {"$anyElementTrue": [{"$map": {"input": paths, "as": "f", "in": touched}}]}

    touching = [any_of(_UPDATED, "$$f.k"), any_of(_REMOVED, "$$f"), any_of(_TRUNCATED, "$$f.field")]
    wanted = [{"operationType": {"$ne": "update"}}, {"$expr": {"$or": touching}}]
    return [
        {"$match": {"$or": wanted}},
        {"$project": {"operationType": 1, "documentKey": 1, "clusterTime": 1, "wallTime": 1}},
    ]


_ENDS: Final = {"drop", "rename", "dropDatabase", "invalidate"}


@frozen
class Batch:
    """Changes in order: the runs they are about, each once, with the time of its first change.

    `position` is where to go on from once everything up to here has been recorded.
    """

    runs: dict[RunId, datetime]
    position: Position
    changes: int


class Stream:
    """An open change stream on the runs collection. All methods are asyncio functions."""

    def __init__(
        self, database: AsyncDatabase[Document], collection: str, watched: Watched = NO_FIELDS
    ) -> None:
        self._database = database
        self._collection = collection
        self._pipeline = pipeline(watched)
        self._session: AsyncClientSession | None = None
        self._cursor = 0
        self._first: Document | None = None

    async def open(self, position: Position) -> None:
        """Start after `position`. Raises pymongo's errors; `HistoryLost` for what is no token."""
        # getMore must come from the session that opened the cursor.
        self._session = self._database.client.start_session()
        where: Document = (
            {"startAfter": position.token}
            if position.token is not None
            else {"startAtOperationTime": position.start}
        )
        command = {
            "aggregate": self._collection,
            "pipeline": [{"$changeStream": where}, *self._pipeline],
            "cursor": {"batchSize": BATCH},
            "readConcern": {"level": "majority"},
        }
        try:
            reply = await self._database.command(
                command, session=self._session, codec_options=PLAIN
            )
        except OperationFailure as error:
            self._check_size(error)
            if position.token is None or error.code not in BAD_TOKEN_CODES:
                raise
            raise HistoryLost(f"the saved position is unusable (code {error.code})") from error
        self._first = reply["cursor"]
        self._cursor = reply["cursor"]["id"]

    async def next(self, wait: float) -> Batch:
        """Wait for the next batch; empty after `wait` seconds without a change.

        Raises `HistoryLost` where the collection was dropped or renamed.
        """
        cursor, self._first = self._first, None
        if cursor is None or not cursor["firstBatch"]:
            cursor = await self._more(wait)
        return _batch(cursor.get("firstBatch") or cursor.get("nextBatch") or [], cursor)

    async def _more(self, wait: float) -> Document:
        command = {
            "getMore": Int64(self._cursor),
            "collection": self._collection,
            "batchSize": BATCH,
            "maxTimeMS": int(wait * 1000),
        }
        try:
            reply = await self._database.command(
                command, session=self._session, codec_options=PLAIN
            )
        except OperationFailure as error:
            self._check_size(error)
            raise
        cursor: Document = reply["cursor"]
        return cursor

    @staticmethod
    def _check_size(error: OperationFailure) -> None:
        if error.code == TOO_LARGE:
            raise HistoryLost(f"a change is too large for the stream: {error}") from error

    async def close(self) -> None:
        """Forget the cursor; the server ends it with its session."""
        if self._session is not None:
            await self._session.end_session()
            self._session = None


class Following:
    """Whether a run, or one of its reactions, changes. All methods are asyncio functions."""

    def __init__(self, database: AsyncDatabase[Document], which: Sequence[Document]) -> None:
        self._database = database
        self._pipeline: list[Document] = [
            {"$match": {"$or": list(which)}},
            {"$project": {"operationType": 1}},
        ]
        self._stream: AsyncDatabaseChangeStream[Document] | None = None

    async def open(self) -> None:
        """Begin: what changes from now on is told."""
        wait = int(AWAIT * 1000)
        self._stream = await self._database.watch(self._pipeline, max_await_time_ms=wait)

    async def changed(self) -> None:
        """Wait until something has changed since the last call, or since `open`."""
        assert self._stream is not None
        try:
            await self._stream.next()
        except StopAsyncIteration:
            raise HistoryLost("the database was dropped") from None

    async def close(self) -> None:
        """End the stream."""
        if self._stream is not None:
            await self._stream.close()


def is_usable(run: Any) -> bool:
    """Whether a run can be known by this id: a document as an id is nobody's run."""
    if not is_plain(run):
        logger.warning("a run is passed over: its _id {!r} is not a plain value", run)
        return False
    return True


def _when(change: Document) -> datetime:
    # Servers before 6.0 give no wallTime, and a cluster time counts whole seconds.
    wall: datetime | None = change.get("wallTime")
    return wall or change["clusterTime"].as_datetime()


def _batch(changes: Sequence[Document], cursor: Document) -> Batch:
    runs: dict[RunId, datetime] = {}
    for change in changes:
        if change["operationType"] in _ENDS:
            raise HistoryLost(f"the runs collection met {change['operationType']!r}")
        run = change["documentKey"]["_id"]
        if is_usable(run):
            runs.setdefault(run, _when(change))
    token = cursor.get("postBatchResumeToken") or (changes[-1]["_id"] if changes else None)
    return Batch(runs, Position(token=token), len(changes))
