"""The change stream, in batches.

Cursor commands are sent by hand, because a batch and its resume token belong together: the token
is saved with the reactions of the batch, and the next batch is requested while this one is
recorded. An event names only its run. The run itself is read afterwards, for the whole batch at
once, so an event is small even if the document is not.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Final, Generic, TypeVar

import trio
from attrs import frozen
from bson import Int64
from bson.timestamp import Timestamp
from loguru import logger
from pymongo.asynchronous.change_stream import AsyncDatabaseChangeStream
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import OperationFailure

from caxev.core.model import CHANGED, ENTRY_FIELDS, Interest, RunId
from caxev.database.client import BAD_TOKEN_CODES, TOO_LARGE, DatabaseError, Document, HistoryLost
from caxev.database.connection import LIMIT, Connection, operation, within
from caxev.database.reactions import run_keys
from caxev.database.rows import is_plain
from caxev.database.sites import Position

B = TypeVar("B")

ALL: Final = Interest()
BATCH: Final = 1000
AWAIT: Final = 30.0
"""Seconds that the server holds an empty answer back: an idle site asks twice a minute."""
_CLOSING: Final = 2.0
"""Seconds that closing a stream may take."""

_UPDATED: Final = {"$objectToArray": {"$ifNull": ["$updateDescription.updatedFields", {}]}}
_REMOVED: Final = {"$ifNull": ["$updateDescription.removedFields", []]}
_TRUNCATED: Final = {"$ifNull": ["$updateDescription.truncatedArrays", []]}


_STATUS: Final = r"^data\.\d+\.(status(_since)?|manifest|checksum)$"
_CHANGED: Final = f"$updateDescription.updatedFields.{CHANGED}"
# Servers before 6.0 give no wallTime; the cluster time counts only whole seconds. A number is
# decoded much sooner than a date.
_MILLISECONDS: Final = {"$toLong": {"$ifNull": ["$wallTime", {"$toDate": "$clusterTime"}]}}


def pipeline(interest: Interest = ALL) -> list[Document]:
    """Return the stages that pass on what can concern a site.

    These are changes of ``data``, ``tags``, watched fields and existence. Only those fields of an
    entry count that snapshots are made of. A new status, with its digests, counts unless the update
    names its host (`CHANGED`, which only caxev writes), and the status concerns nobody here.
    """
    watched = interest.watched
    names = {"data", "tags", *(path.partition(".")[0] for path in watched.run)}
    ours = rf"^({'|'.join(re.escape(name) for name in sorted(names))})(\.|$)"
    fields = "|".join(re.escape(name) for name in (*ENTRY_FIELDS, *sorted(watched.copies)))
    others = rf"^data\.\d+\.(?!({fields})(\.|$))"

    def any_of(paths: Document, key: str, *also: Document) -> Document:
        touched = {"$regexMatch": {"input": key, "regex": ours}}
        is_other = {"$regexMatch": {"input": key, "regex": others}}
        counts = {"$and": [touched, {"$not": [is_other]}, *also]}
        return {"$anyElementTrue": [{"$map": {"input": paths, "as": "f", "in": counts}}]}

    is_status = {"$regexMatch": {"input": "$$f.k", "regex": _STATUS}}
    concerned: list[Document] = []
    if interest.site is not None:
        concerned = [{"$or": [{"$not": [is_status]}, _concerned(interest)]}]
    touching = [
        any_of(_UPDATED, "$$f.k", *concerned),
        any_of(_REMOVED, "$$f"),
        any_of(_TRUNCATED, "$$f.field"),
    ]
    # An insert, a replacement or a deletion names no fields: these always count.
    wanted = [{"operationType": {"$ne": "update"}}, {"$expr": {"$or": touching}}]
    return [
        {"$match": {"$or": wanted}},
        {"$project": {"operationType": 1, "run": "$documentKey._id", "at": _MILLISECONDS}},
    ]


def _concerned(interest: Interest) -> Document:
    """Return the expression for whether a new status concerns the site.

    It compares whole values: another program may write anything there, and no operator may fail.
    """
    host, status = f"{_CHANGED}.host", f"{_CHANGED}.status"
    pairs = [list(pair) for pair in sorted(interest.pairs)]
    known = {"$in": [host, {"$literal": sorted(interest.hosts)}]}
    there = {"$in": [[host, status], {"$literal": pairs}]}
    elsewhere = {"$in": [status, {"$literal": sorted(interest.statuses)}]}
    return {
        "$or": [
            {"$ne": [{"$type": host}, "string"]},
            {"$eq": [host, {"$literal": interest.site}]},
            {"$cond": [known, there, elsewhere]},
        ]
    }


ENDS: Final = {"drop", "rename", "dropDatabase", "invalidate"}
"""Changes after which a stream is of no use."""


@frozen
class Batch:
    """Changes in order: the runs that changed, each once, with the time of its first change.

    `position`: the stream continues there once everything up to here has been recorded.
    """

    runs: dict[RunId, datetime]
    position: Position
    changes: int


class ChangeCursor(Generic[B]):
    """The cursor of a change stream, of one collection or (None) the whole database.

    `batch` makes of changes, and the position behind them, what the stream gives. It raises
    `HistoryLost` if the stream is of no use after them. All other methods are asyncio functions.
    """

    def __init__(
        self,
        database: AsyncDatabase[Document],
        collection: str | None,
        stages: Sequence[Document],
    ) -> None:
        self._database = database
        self._collection = collection
        self._stages = stages
        self._session: AsyncClientSession | None = None
        self._cursor = 0
        self._first: Document | None = None
        self._following: asyncio.Task[Document] | None = None

    async def open(self, position: Position) -> None:
        """Start after `position`. Raises pymongo's errors, and `HistoryLost` for a bad token."""
        # The server wants getMore from the session that opened the cursor.
        self._session = self._database.client.start_session()
        begin: Document = {"startAtOperationTime": position.start}
        if position.token is not None:
            # Not `resumeAfter`, which refuses the token of an invalidate event (a dropped
            # collection).
            begin = {"startAfter": position.token}
        command = {
            "aggregate": self._collection or 1,
            "pipeline": [{"$changeStream": begin}, *self._stages],
            "cursor": {"batchSize": BATCH},
            # A change stream needs it, and a command by hand takes no option of the client.
            "readConcern": {"level": "majority"},
        }
        try:
            self._first = await self._command(command)
        except OperationFailure as error:
            if position.token is None or error.code not in BAD_TOKEN_CODES:
                raise
            raise HistoryLost(f"the saved position is unusable (code {error.code})") from error
        self._cursor = self._first["id"]

    def batch(self, changes: Sequence[Document], position: Position) -> B:
        raise NotImplementedError

    async def next(self, wait: float) -> B:
        """Wait for the next batch; empty after `wait` seconds without a change."""
        # Opening has brought a first batch, which may be empty.
        cursor, self._first = self._first, None
        if cursor is None or not cursor["firstBatch"]:
            following, self._following = self._following, None
            cursor = await (following or self._more(wait))
        changes = cursor.get("firstBatch") or cursor.get("nextBatch") or []
        if len(changes) >= BATCH:
            # There are more: let the server look for them while these are worked on.
            self._following = asyncio.create_task(self._more(wait))
        # The token after the batch: it also passes what the pipeline left out.
        token = cursor.get("postBatchResumeToken") or (changes[-1]["_id"] if changes else None)
        return self.batch(changes, Position(token=token))

    async def _more(self, wait: float) -> Document:
        command = {
            "getMore": Int64(self._cursor),
            "collection": self._collection or "$cmd.aggregate",
            "batchSize": BATCH,
            "maxTimeMS": int(wait * 1000),
        }
        return await self._command(command)

    async def _command(self, command: Document) -> Document:
        # A command does not take the client's options for what it decodes.
        plain = self._database.codec_options
        try:
            reply = await self._database.command(
                command, session=self._session, codec_options=plain
            )
        except OperationFailure as error:
            if error.code == TOO_LARGE:
                raise HistoryLost(f"a change is too large for the stream: {error}") from error
            raise
        cursor: Document = reply["cursor"]
        return cursor

    async def close(self) -> None:
        """Forget the cursor; the server ends it with its session."""
        if self._following is not None:
            self._following.cancel()
            # It may have failed already: asyncio logs an error that nobody has retrieved.
            await asyncio.gather(self._following, return_exceptions=True)
        if self._session is not None:
            await self._session.end_session()
            self._session = None


Cursor = TypeVar("Cursor", bound=ChangeCursor[Any])


class Stream(ChangeCursor[Batch]):
    """An open change stream on the runs collection."""

    def __init__(
        self, database: AsyncDatabase[Document], collection: str, interest: Interest = ALL
    ) -> None:
        super().__init__(database, collection, pipeline(interest))

    def batch(self, changes: Sequence[Document], position: Position) -> Batch:
        runs: dict[RunId, datetime] = {}
        for change in changes:
            if change["operationType"] in ENDS:
                raise HistoryLost(f"the runs collection had a {change['operationType']!r}")
            run = change["run"]
            if is_usable(run) and run not in runs:
                runs[run] = datetime.fromtimestamp(change["at"] / 1000, UTC)
        return Batch(runs, position, len(changes))


def is_usable(run: Any) -> bool:
    """Return whether this can be a run's id; log it if not."""
    if not is_plain(run):
        logger.warning("skipping a run: its _id {!r} is not a plain value", run)
        return False
    return True


class Streams(Connection):
    """The stream of all runs that a listener reads, and that of one run for a person."""

    @operation
    async def cluster_time(self) -> Timestamp:
        """Return a time that a stream can start at, just after the last operation of a majority.

        A stream that starts there does not meet again what ended the one before, such as the drop
        of the collection.
        """
        return await self._majority_time()

    async def _majority_time(self) -> Timestamp:
        reply = await self._client.admin.command("hello")
        majority = reply.get("lastWrite", {}).get("majorityOpTime")  # a mongos gives none
        last: Timestamp = majority["ts"] if majority else reply["operationTime"]
        return Timestamp(last.time, last.inc + 1)

    @operation
    async def open_stream(self, position: Position, interest: Interest = ALL) -> Stream:
        """Open the change stream after `position`. Raises `HistoryLost`."""
        database = self._client[self.settings.database]
        stream = Stream(database, self.settings.collection, interest)
        await stream.open(position)
        return stream

    @within(LIMIT, held=AWAIT)
    async def next_batch(self, stream: ChangeCursor[B]) -> B:
        """Wait for the stream's next batch; empty after `AWAIT`. Cancelling this ends the stream.

        Raises `HistoryLost`.
        """
        return await stream.next(AWAIT)

    @operation
    async def close_stream(self, stream: ChangeCursor[Any]) -> None:
        """Close the stream."""
        await stream.close()

    @asynccontextmanager
    async def closing(self, stream: Cursor) -> AsyncIterator[Cursor]:
        """Close an open stream at the end of the block, however it ends."""
        try:
            yield stream
        finally:
            # Also when cancelled: a cursor left open costs the server memory until it times out.
            with trio.move_on_after(_CLOSING, shield=True):
                try:
                    await self.close_stream(stream)
                except DatabaseError as error:
                    logger.debug("the stream's cursor is left to expire: {}", error)

    @asynccontextmanager
    async def follow(
        self, run: RunId, sites: Sequence[str]
    ) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Follow a run, its reactions and its snapshots at sites: a function that awaits a change.

        No change after the block was entered is missed: read first, then wait. Cancelling the wait
        ends the stream, and so does any error.
        """
        which: list[Document] = [{"ns.coll": self._runs.name, "documentKey._id": run}]
        keys = [run_keys(site, run)["_id"] for site in sites]
        keys += [{"s": site, "r": run} for site in sites]
        which += [{"ns.coll": self._ledger.name, "documentKey._id": one} for one in keys]
        following = await self._watch(which)

        async def changed() -> None:
            try:
                await following.next()
            except StopAsyncIteration:
                raise HistoryLost("the database was dropped") from None

        try:
            yield lambda: self._call(changed, held=float("inf"))
        finally:
            with trio.move_on_after(_CLOSING, shield=True):
                await self._call(following.close)

    @operation
    async def _watch(self, which: Sequence[Document]) -> AsyncDatabaseChangeStream[Document]:
        pipeline: list[Document] = [
            {"$match": {"$or": which}},
            {"$project": {"operationType": 1}},
        ]
        database = self._client[self.settings.database]
        return await database.watch(pipeline, max_await_time_ms=int(AWAIT * 1000))
