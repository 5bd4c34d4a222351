"""Shortcut: serve new changes at once while the stream works through a backlog.

After an outage, or after a change of very many runs, new changes may wait behind a hundred thousand
others, or behind as many writes to other collections, past which the server reads before it opens
the stream. Then a second stream is opened from now on (after a start: from the start on), and the
two are served in turn. The first one skips nothing: it reaches the same changes later and finds
them recorded. So nothing depends on the second stream, whose position is not saved.

`watcher` runs a `Shortcut` beside the stream.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio
from attrs import define, field
from loguru import logger

from caxev.core.clock import utcnow
from caxev.database import Batch, Position, Stream
from caxev.engine.context import Context
from caxev.engine.recorder import Recorder

BACKLOG: Final = 100
"""A batch of this many changes shows a backlog..."""
LATE: Final = 5.0
"""...if the newest of them is older than this, in seconds."""
SLOW: Final = 2.0
"""Seconds that opening the first stream may take. Before it answers, the server reads past all
later writes, also those that do not concern the site."""


@asynccontextmanager
async def opened(context: Context, position: Position) -> AsyncIterator[Stream]:
    """Open the site's stream after `position`, and close it. Raises `HistoryLost`."""
    database = context.database
    stream = await database.open_stream(position, context.registry.interest)
    async with database.closing(stream):
        yield stream


def age(batch: Batch) -> float:
    """How many seconds ago the newest change of a batch was made; of none: 0."""
    newest = max(batch.runs.values(), default=None)
    return 0.0 if newest is None else max((utcnow() - newest).total_seconds(), 0.0)


def is_late(batch: Batch) -> bool:
    """Return whether more changes like these are queued before new ones."""
    return batch.changes >= BACKLOG and age(batch) >= LATE


@define(eq=False)
class Shortcut:
    """A second stream, for as long as the first one is late: from `start` on, later from now on.

    Set `opened` when the first one is open.
    """

    context: Context
    recorder: Recorder
    start: Position | None
    opened: trio.Event = field(init=False, factory=trio.Event)
    _wanted: trio.Event = field(init=False, factory=trio.Event)
    _reading: trio.CancelScope = field(init=False, factory=trio.CancelScope)

    def judge(self, batch: Batch) -> None:
        """Open or close the second stream by what the first one has brought."""
        if is_late(batch):
            self._wanted.set()
        elif age(batch) < LATE:
            self.start = None  # what has changed since has come
            if self._wanted.is_set():
                self._wanted = trio.Event()
                self._reading.cancel()

    async def run(self) -> None:
        """Serve what changes now whenever the stream is late, until cancelled.

        Raises DatabaseError, as the first stream would.
        """
        with trio.move_on_after(SLOW):
            await self.opened.wait()
        if not self.opened.is_set():
            self._wanted.set()
        while True:
            await self._wanted.wait()
            logger.info("the stream is late: new changes are served beside it")
            while self._wanted.is_set():
                await self._serve()

    async def _serve(self) -> None:
        """Serve what has changed since, until the first stream is there, or this one is late."""
        start, self.start = self.start, None
        if start is None:
            start = Position(start=await self.context.database.cluster_time())
        async with opened(self.context, start) as stream:
            while (batch := await self._next(stream)) is not None and not is_late(batch):
                await self.recorder.snapshot(batch.runs)

    async def _next(self, stream: Stream) -> Batch | None:
        """Wait for the next changes; None: there is no need to."""
        # Only the reading may be cut short: what is recorded has to be started, too.
        with trio.CancelScope() as self._reading:
            if self._wanted.is_set():
                return await self.context.database.next_batch(stream)
        return None
