"""Feed the page's state: one pass over everything, then what changes, until cancelled.

The stream is opened at a time before the pass, so that nothing falls between the two; what comes
twice changes nothing. Without a viewer and without a change no document is read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Sequence
from contextlib import aclosing
from datetime import datetime
from typing import Any, Final

import trio
from attrs import define, field, frozen
from loguru import logger

from caxev.core.clock import utcnow
from caxev.core.model import RunId
from caxev.database import (
    Changed,
    Database,
    DatabaseError,
    FeedStream,
    HistoryLost,
    News,
    Position,
    is_transient,
)
from caxev.web.documents import label_of
from caxev.web.state import LiveState

PAUSE: Final = 0.25
"""Seconds between two batches at least: a viewer sees no more than four states a second."""
NAMED_AT_ONCE: Final = 1000
_DELAYS: Final = (1.0, 2.0, 5.0)

Documents = Sequence[dict[str, Any]]


@frozen
class Heard:
    """The content of a batch: runs as they are now, and which of them are new.

    `touched` are all whose page may have changed; None: all runs.
    """

    runs: Documents = ()
    new: Container[RunId] = ()
    touched: Collection[RunId] | None = None


@define(eq=False)
class Feeder:
    """Feeds `state` from `database`. `heard` is called after each batch."""

    database: Database
    state: LiveState
    heard: Callable[[Heard], None] = field(default=lambda _: None)
    _position: Position | None = field(init=False, default=None)

    async def run(self) -> None:
        """Feed the state forever; waits out trouble with the database, and shows it.

        Raises `NotAuthorized` or another `DatabaseError` that waiting does not cure.
        """
        failures = 0
        while True:
            try:
                await self._feed()
            except HistoryLost as lost:
                logger.warning("reading everything again: {}", lost)
                self.state.health.gap = (utcnow(), str(lost))
                self._position = None
            except DatabaseError as error:
                if not is_transient(error):
                    raise
                failures = 0 if self.state.health.trouble is None else failures + 1
                self._note_trouble(error)
                await trio.sleep(_DELAYS[min(failures, len(_DELAYS) - 1)])

    def _note_trouble(self, error: DatabaseError) -> None:
        health = self.state.health
        if health.trouble is None:
            logger.warning("the page is not up to date: {}", error)
        since = utcnow() if health.trouble is None else health.trouble[0]
        health.trouble = (since, str(error))
        self.heard(Heard())

    async def _feed(self) -> None:
        if self._position is None:
            # Before the pass: what changes during it comes by the stream as well.
            start = Position(start=await self.database.cluster_time())
            await self._pass()
            self._position = start
        async with self.database.closing(await self.database.open_feed(self._position)) as stream:
            await self._follow(stream)

    async def _follow(self, stream: FeedStream) -> None:
        while True:
            changed = await self.database.next_batch(stream)
            began = trio.current_time()
            if changed:
                await self._take(changed)
            # Only now: after an error the stream brings changes again that were not taken.
            self._position = changed.position
            self._well()
            if changed:
                # Changes that come meanwhile are read together.
                await trio.sleep_until(began + PAUSE)

    def _well(self) -> None:
        health = self.state.health
        health.fed = utcnow()
        if health.trouble is not None:
            logger.info("the page is up to date again")
            health.trouble = None
            self.heard(Heard())

    async def _take(self, changed: Changed) -> None:
        news = await self.database.read_changed(changed)
        new = {run for run in news.runs if run not in self.state.runs}
        touched = self._apply(news, utcnow())
        await self._name()
        self.heard(Heard([one for one in news.runs.values() if one is not None], new, touched))

    def _apply(self, news: News, now: datetime) -> set[RunId]:
        """Take what was read; return the runs that it is about."""
        state = self.state
        for run, document in news.runs.items():
            if document is None:
                state.runs.drop(run, now)
            else:
                state.runs.put(document, now)
                state.name(run, label_of(document))
        for record in news.sites:
            state.of_site(record)
        for reaction, document in news.reactions:
            state.of_reaction(reaction, document)
        gone = filter(None, map(state.done, news.gone))
        reactions = [*(one for one, _ in news.reactions), *(one.reaction for one in gone)]
        state.of_alarms(news.alarms, news.ended)
        state.of_processes(news.processes, news.left)
        state.changed += bool(news.runs)
        if news.requests is not None:
            state.waiting, state.requests = news.requests
        return {*news.runs, *(one.run for one in reactions)}

    async def _name(self) -> None:
        """Read the names of runs that are shown and not known yet."""
        while missing := self.state.unnamed(NAMED_AT_ONCE):
            found = await self.database.read_changed(Changed(tuple(missing), (), False, Position()))
            for run, document in found.runs.items():
                self.state.name(run, str(run) if document is None else label_of(document))

    async def _pass(self) -> None:
        health = self.state.health
        health.pass_done, health.pass_total = 0, await self.database.estimated_runs()
        news = await self.database.feed_ledger()
        # Only now that the answer is here: until then the page shows what it knew.
        self.state.forget_ledger()
        self._apply(news, utcnow())
        async with aclosing(self.database.feed_reactions()) as pages:
            async for page in pages:
                self._apply(page, utcnow())
        self.heard(Heard())
        await self._pass_runs()
        self.state.runs.begin()
        health.pass_done = None
        await self._name()
        self._well()
        self.heard(Heard())

    async def _pass_runs(self) -> None:
        runs, unseen = self.state.runs, self.state.runs.ids
        after, more = None, True
        while more:
            documents, after = await self.database.feed_runs(after)
            now = utcnow()
            for document in documents:
                runs.put(document, now)
                unseen.discard(document["_id"])
            assert self.state.health.pass_done is not None
            self.state.health.pass_done += len(documents)
            more = after is not None
        for gone in unseen:  # deleted while the history was lost
            runs.drop(gone, utcnow())
