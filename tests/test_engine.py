"""The engine on a real replica set: nothing is missed, nothing happens twice."""

from __future__ import annotations

from typing import Any

import pytest
import trio

from caxev import HERE, Job, Retry, RunUpdate, copy, dispatcher, tag
from caxev.daemon import Leaving, serve_tenures
from tests import engine
from tests.conftest import Database as Named

pytestmark = pytest.mark.replicaset


def recorder() -> tuple[list[str], Any]:
    seen: list[str] = []

    async def record(job: Job) -> None:
        seen.append(f"{job.run.number} {job.event}")

    return seen, record


async def test_first_scan_fires_what_is_there(database: Named) -> None:
    """A site that never listened reacts to what it finds, once."""
    seen, record = recorder()
    options = engine.options_for(database, [engine.handler(record, copy("transferred", host=HERE))])
    async with engine.opened(database) as db:
        for number in range(1, 4):
            await db.insert_run(engine.run_document(number, ("raw", "lngs", "transferred")))
        async with engine.listener(db, options):
            await engine.until(lambda: len(seen) == 3)
        async with engine.listener(db, options):
            await db.insert_run(engine.run_document(9, ("raw", "lngs", "transferred")))
            await engine.until(lambda: len(seen) == 4)
    assert min(seen) == "1 raw at lngs: transferred"
    assert seen[-1].startswith("9")


async def test_one_update_triggers_the_next(database: Named) -> None:
    """A handler's update is a change, and the next reaction starts."""
    order: list[str] = []

    async def first(job: Job) -> RunUpdate:
        order.append("first")
        assert job.copy is not None
        return RunUpdate.change_copy(job.run, job.copy, "transferred")

    async def second(job: Job) -> None:
        order.append("second")

    handlers = [
        engine.handler(first, copy("verifying", host=HERE)),
        engine.handler(second, copy("transferred", host=HERE)),
    ]
    async with engine.opened(database) as db:
        options = engine.options_for(database, handlers)
        async with engine.listener(db, options):
            run = await db.insert_run(engine.run_document(1, ("raw", "lngs", "verifying")))
            await engine.until(lambda: order == ["first", "second"])
            await engine.until(lambda: _states(db, ["done", "done"]))
        after = (await db.runs([run]))[run]
        assert after.copies[0].status == "transferred"
        assert after.copies[0].since is not None


async def _states(db: Any, wanted: list[str]) -> bool:
    return sorted(debt.state.value for debt, _ in await db.debts("lngs")) == wanted


async def test_retry_comes_back_and_is_durable(database: Named) -> None:
    """A retry's due time outlives the process that set it."""
    tries: list[float] = []

    async def stubborn(job: Job) -> None:
        tries.append(trio.current_time())
        if len(tries) == 1:
            raise Retry("not yet", after=1.0)

    options = engine.options_for(database, [engine.handler(stubborn, tag("go"))])
    async with engine.opened(database) as db:
        document = engine.run_document(1, tags=[{"name": "go"}])
        async with engine.listener(db, options):
            await db.insert_run(document)
            await engine.until(lambda: len(tries) == 1)
            await engine.until(lambda: _states(db, ["open"]))
        async with engine.listener(db, options):
            await engine.until(lambda: len(tries) == 2)
    assert tries[1] - tries[0] > 0.9


async def test_once_leaves_nothing_due(database: Named, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--once` ends only when all that is due is done, however often more must be fetched."""
    monkeypatch.setattr(dispatcher, "WINDOW", 3)
    seen, record = recorder()
    handlers = [engine.handler(record, copy("transferred", host=HERE))]
    options = engine.options_for(database, handlers, once=True)
    async with engine.opened(database) as db:
        for number in range(1, 201):
            await db.insert_run(engine.run_document(number, ("raw", "lngs", "transferred")))
        await serve_tenures(options, db, "test", Leaving())
        states = {debt.state.value for debt, _ in await db.debts("lngs")}
    assert len(seen) == 200
    assert states == {"done"}
