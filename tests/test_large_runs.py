"""A run with more copies than are served: it is parked, and delays nobody."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from pymongo import MongoClient

from caxev import Job, copy
from caxev.core.clock import utcnow
from caxev.core.ledger import UNREADABLE
from caxev.core.recording import MOST_COPIES
from caxev.database import Database, Request
from tests import engine
from tests.conftest import Database as Named

SITE = "lngs"

pytestmark = pytest.mark.replicaset


def run_of(copies: int, number: int = 1) -> dict[str, Any]:
    hosts = [("raw", f"site{number}", "transferred") for number in range(copies)]
    return engine.run_document(number, *hosts)


async def _parked(db: Database) -> list[str]:
    found = await db.reactions(SITE, state="failed", handler=UNREADABLE)
    return [reaction.note for reaction, _ in found]


async def _alarmed(db: Database, runs: list[str]) -> bool:
    return [one.alarm.run for one in await db.alarms(SITE) if one.active] == runs


async def test_a_run_with_too_many_copies_is_parked(database: Named) -> None:
    """It has an alarm and no reaction; others are served; with fewer copies it is, too."""
    seen: list[int] = []

    async def react(job: Job) -> None:
        seen.append(job.run.number or 0)

    options = engine.options_for(database, [engine.handler(react, copy("transferred"))])
    async with engine.opened(database) as db, engine.listener(db, options):
        large = await db.insert_run(run_of(MOST_COPIES + 1))
        await engine.until(lambda: _parked(db))
        (why,) = await _parked(db)
        assert str(MOST_COPIES) in why
        await engine.until(partial(_alarmed, db, ["run 1"]))
        other = await db.insert_run(run_of(1, number=2))
        await engine.until(lambda: seen == [2])
        for run in (large, other):
            await db.add_request(SITE, Request("replay", (run,), force=True), "me", utcnow())
        await engine.until(lambda: seen.count(2) == 2)
        assert seen == [2, 2]
        with MongoClient[dict[str, Any]](database.uri) as client:
            runs = client[database.name]["runs_new"]
            runs.update_one({"_id": large}, {"$push": {"tags": {"name": "x"}}})
            runs.update_one({"_id": large}, {"$pull": {"data": {"host": {"$ne": "site7"}}}})
        await engine.until(lambda: sorted(seen) == [1, 2, 2])

        await engine.until(partial(_alarmed, db, []))
        assert not await _parked(db)


async def test_as_many_copies_as_may_be_are_served(database: Named) -> None:
    """Each of them has its reaction, once."""
    seen: list[str] = []

    async def react(job: Job) -> None:
        assert job.copy is not None
        seen.append(job.copy.host)

    options = engine.options_for(database, [engine.handler(react, copy("transferred"))])
    async with engine.opened(database) as db, engine.listener(db, options):
        await db.insert_run(run_of(MOST_COPIES))
        await engine.until(lambda: len(seen) >= MOST_COPIES)
        assert sorted(seen) == sorted(f"site{number}" for number in range(MOST_COPIES))
