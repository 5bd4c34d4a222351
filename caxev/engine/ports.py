"""The ports of a job: what a handler can do to the world, for `core.job.Job`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar

from attrs import Factory, frozen

from caxev.copies.sharing import Neighbours
from caxev.core.alarms import Alarm
from caxev.core.clock import utcnow
from caxev.core.entry import as_utc
from caxev.core.history import Deed, HistoryRow, of_attempt
from caxev.core.job import Job
from caxev.core.ledger import Reaction, State, trigger_named
from caxev.core.model import Run, RunId
from caxev.core.update import RunUpdate
from caxev.engine.context import Context
from caxev.engine.workers import Workers

T = TypeVar("T")

ALIVE: Final = 15 * 60.0
"""Seconds for which written progress shows that a reaction is at work."""


@frozen
class JobPorts:
    """Implements `core.job.Ports` for one reaction."""

    context: Context
    workers: Workers
    reaction: Reaction
    yield_slot: Callable[[], AbstractContextManager[None]]
    began: datetime = Factory(utcnow)

    async def update(
        self, update: RunUpdate, *, now: datetime, deed: Deed | None = None
    ) -> Run | None:
        database, lease = self.context.database, self.context.lease
        if deed is None:
            return await database.update(self.reaction, lease, update, now)
        seconds = (now - self.began).total_seconds()

        def row(run: Run) -> HistoryRow:
            return of_attempt(self.reaction, deed, run, now=now, seconds=seconds, over=False)

        return await database.update(self.reaction, lease, update, now, row)

    async def work(self, function: Callable[..., T], *args: object, job: Job) -> T:
        return await self.workers.run(function, *args, on_progress=job.progress)

    async def keep(self, said: bytes) -> None:
        await self.context.database.keep(self.reaction, self.context.lease, said)

    async def store_manifest(self, digest: str, items: list[dict[str, Any]]) -> None:
        await self.context.database.store_manifest(digest, items)

    async def load_manifest(self, digest: str) -> list[dict[str, Any]] | None:
        return await self.context.database.load_manifest(digest)

    async def table(self, name: str) -> list[dict[str, Any]]:
        return await self.context.database.table(name)

    async def alarm(self, alarm: Alarm) -> None:
        await self.context.alarms.raise_and_keep(alarm)

    async def all_clear(self, key: str) -> None:
        await self.context.alarms.clear_and_keep(key)

    async def is_live(self, owner: str, run: RunId, trigger: str | None) -> bool:
        site, _, epoch = owner.rpartition("#")
        record = await self.context.database.site_record(site)
        if record is None:
            return False
        # The epoch names one process: a later one of the same site did not write that owner.
        is_led = record.active and str(record.epoch) == epoch
        if is_led and (trigger is None or await self._is_owed(site, run, trigger)):
            return True
        now, alive = utcnow(), timedelta(seconds=ALIVE)
        # Without its lease it may still move bytes, in a worker that has not died yet.
        return any(
            reaction.run == run
            and abs(now - (as_utc(document["progress"].get("at")) or now)) < alive
            for reaction, document in await self.context.database.moving([site])
        )

    async def _is_owed(self, site: str, run: RunId, trigger: str) -> bool:
        """Return whether the reaction that claims by this trigger still stands, and has not failed.

        If it ended without finishing or withdrawing what it had claimed, nobody works on that.
        """
        found = await self.context.database.reactions(site, run=run, limit=0)
        owed = (one for one, _ in found if one.state is not State.FAILED)
        return any(trigger_named(site, one.handler, one.aspect) == trigger for one in owed)

    async def has_listened(self, site: str) -> bool:
        record = await self.context.database.site_record(site)
        return record is not None and record.epoch > 0

    async def oldest(self, type: str, without: Collection[str], skip: int) -> list[Run]:  # noqa: A002
        return await self.context.database.oldest(self.reaction.site, type, without, skip)

    async def neighbours(self, wanted: Neighbours) -> list[Run]:
        return await self.context.database.neighbours(wanted)
