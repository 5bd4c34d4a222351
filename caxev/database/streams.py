"""Opening and reading change streams from trio."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio
from bson.timestamp import Timestamp

from caxev.core.model import NO_FIELDS, RunId, Watched
from caxev.database.client import Document
from caxev.database.connection import Connection, operation
from caxev.database.reactions import run_keys
from caxev.database.site_record import Position
from caxev.database.stream import AWAIT, Batch, Following, Stream

_CLOSING: Final = 2.0
"""Seconds that closing a stream may take."""


class Streams(Connection):
    """The stream of all runs that a listener reads, and that of one run for a person."""

    @operation
    async def cluster_time(self) -> Timestamp:
        """Return a time that a stream can start at, just after the last operation of a majority.

        A stream that starts there does not meet again what ended the one before, such as the drop
        of the collection.
        """
        reply = await self._client.admin.command("hello")
        majority = reply.get("lastWrite", {}).get("majorityOpTime")  # a mongos gives none
        last: Timestamp = majority["ts"] if majority else reply["operationTime"]
        return Timestamp(last.time, last.inc + 1)

    @operation
    async def open_stream(self, position: Position, watched: Watched = NO_FIELDS) -> Stream:
        """Open the change stream after `position`. Raises `HistoryLost`."""
        database = self._client[self.settings.database]
        stream = Stream(database, self.settings.collection, watched)
        await stream.open(position)
        return stream

    async def next_batch(self, stream: Stream, wait: float | None = None) -> Batch:
        """Wait for the stream's next batch; empty after `wait` (`AWAIT`) seconds without a change.

        Cancelling this ends the stream. Raises `HistoryLost`.
        """
        wait = AWAIT if wait is None else wait
        return await self._call(stream.next, wait, held=wait)

    @operation
    async def close_stream(self, stream: Stream) -> None:
        """Close the stream."""
        await stream.close()

    @asynccontextmanager
    async def follow(
        self, run: RunId, sites: Sequence[str]
    ) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Follow a run and its reactions at these sites: a function that waits for a change.

        No change after the block was entered is missed: read first, then wait. Cancelling the wait
        ends the stream, and so does any error.
        """
        which: list[Document] = [{"ns.coll": self._runs.name, "documentKey._id": run}]
        for site in sites:
            keys = run_keys(site, run)["_id"]
            which.append({"ns.coll": self._ledger.name, "documentKey._id": keys})
        following = Following(self._client[self.settings.database], which)
        await self._call(following.open)
        try:
            yield lambda: self._call(following.changed, held=float("inf"))
        finally:
            with trio.move_on_after(_CLOSING, shield=True):
                await self._call(following.close)
