"""The engine on a real replica set: nothing is missed, nothing happens twice."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from itertools import pairwise
from random import Random
from typing import Any

import pytest
import trio
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from pymongo import MongoClient

from caxev import (
    HERE,
    Decision,
    Event,
    GiveUp,
    Job,
    Retry,
    RunUpdate,
    Skip,
    Tag,
    Wait,
    copy,
    new_run,
    tag,
)
from caxev.core.ledger import Reaction
from caxev.core.registry import Handler
from caxev.core.selection import NumberRange, Selection
from caxev.database import (
    Database,
    Ingest,
    LeaseLost,
    Request,
    Unreachable,
)
from caxev.engine import lanes
from caxev.engine.attempt import LATELY, RateMeter
from caxev.engine.options import Options
from caxev.engine.requests import Requests
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
    return sorted(reaction.state.value for reaction in await engine.reactions(db)) == wanted


async def test_what_led_to_nothing_is_recorded_soon(database: Named) -> None:
    """Also after something that led to reactions, and without another change."""
    seen, record = recorder()
    options = engine.options_for(database, [engine.handler(record, tag("go"))])
    async with engine.opened(database) as db, engine.listener(db, options):
        for number in (1, 3):
            await db.insert_run(engine.run_document(number, tags=[{"name": "go"}]))
            await engine.until(lambda: len(seen) == (number + 1) // 2)  # noqa: B023  # at once
            idle = await db.insert_run(engine.run_document(number + 1))

            async def is_recorded() -> bool:
                return idle in (await db.snapshot("lngs", [idle])).before  # noqa: B023  # at once

            await engine.until(is_recorded)


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
            await engine.until(lambda: _states(db, ["pending"]))
        async with engine.listener(db, options):
            await engine.until(lambda: len(tries) == 2)
    assert tries[1] - tries[0] > 0.9


async def test_once_leaves_nothing_due(database: Named, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--once` ends only when all that is due is done, however often more must be fetched."""
    monkeypatch.setattr(lanes, "WINDOW", 3)
    seen, record = recorder()
    handlers = [engine.handler(record, copy("transferred", host=HERE))]
    options = engine.options_for(database, handlers)
    async with engine.opened(database) as db:
        for number in range(1, 61):
            await db.insert_run(engine.run_document(number, ("raw", "lngs", "transferred")))
        await engine.once(db, options)
        states = {reaction.state.value for reaction in await engine.reactions(db)}
    assert len(seen) == 60
    assert states == {"done"}


async def test_once_tries_again_what_is_due_at_once(database: Named) -> None:
    """As what was interrupted: when it is settled, it is not in the lane's queue yet."""
    tries: list[int] = []

    async def stubborn(job: Job) -> None:
        tries.append(job.run.number or 0)
        if len(tries) < 9:
            raise LeaseLost("as far as this attempt knows")

    options = engine.options_for(database, [engine.handler(stubborn, tag("go"))])
    async with engine.opened(database) as db:
        await db.insert_run(engine.run_document(1, tags=[{"name": "go"}]))
        await engine.once(db, options)
    assert tries == [1] * 9


# -- order ----------------------------------------------------------------------------------------


def _urgent_options(database: Named, *handlers: Handler) -> Options:
    """One worker for transfers, and two tags that make runs urgent."""
    options = engine.options_for(database, handlers)
    site = evolve(options.site, lanes={"transfer": 1}, priority=("urgent", "soon"))
    return evolve(options, site=site)


async def test_the_urgent_and_the_newest_are_moved_first(database: Named) -> None:
    """However long the row is: by tag, also a tag that comes later; then the newest first."""
    moved: list[int] = []
    noticed: list[str] = []
    begun, go_on = trio.Event(), trio.Event()

    async def move(job: Job) -> None:
        moved.append(job.run.number or 0)
        begun.set()
        await go_on.wait()

    async def notice(job: Job) -> None:
        noticed.append(f"{job.run.number} {job.event}")

    backlog = range(2, 62)
    options = _urgent_options(
        database,
        engine.handler(move, copy("transferred", host=HERE), lane="transfer"),
        engine.handler(notice, new_run(), tag("*")),
    )

    def run(number: int, *tags: str) -> dict[str, Any]:
        names = [{"name": name} for name in tags]
        return engine.run_document(number, ("raw", "lngs", "transferred"), tags=names)

    with MongoClient[dict[str, Any]](database.uri) as client:
        server = client[database.name]
        async with engine.opened(database) as db, engine.listener(db, options):
            await db.insert_run(run(1))
            await begun.wait()
            server["runs_new"].insert_many([run(number) for number in backlog])
            await engine.until(lambda: len(noticed) == 61)
            # As an older caxev wrote them.
            server["caxev_ledger"].update_many({"lane": "transfer"}, {"$unset": {"priority": ""}})
            await db.insert_run(run(400, "urgent"))
            await db.insert_run(run(401))
            (late,) = await _runs(db, 5)
            await engine.write(db, RunUpdate.add_tag(late, "soon"))
            wanted = {"400 tag 'urgent': yes", "401 the run: yes", "5 tag 'soon': yes"}
            await engine.until(lambda: wanted <= set(noticed))
            go_on.set()
            await engine.until(lambda: len(moved) == 63)
    rest = [number for number in reversed(backlog) if number != 5]
    assert moved == [1, 400, 5, 401, *rest]


async def _runs(db: Any, number: int) -> list[Any]:
    found: list[Any] = await db.select(Selection(numbers=(NumberRange(number, number),)), Job.now())
    return found


async def test_other_lanes_go_oldest_first(database: Named) -> None:
    """Where no bytes are moved, what came first is first, whatever its tags."""
    seen: list[int] = []
    begun, go_on = trio.Event(), trio.Event()

    async def react(job: Job) -> None:
        seen.append(job.run.number or 0)
        begun.set()
        await go_on.wait()

    options = _urgent_options(database, engine.handler(react, new_run(), lane="narrow"))
    options = evolve(options, site=evolve(options.site, lanes={"narrow": 1}))
    async with engine.opened(database) as db, engine.listener(db, options):
        await db.insert_run(engine.run_document(1))
        await begun.wait()
        for number in range(2, 8):
            urgent = [{"name": "urgent"}] if number > 5 else []
            await db.insert_run(engine.run_document(number, tags=urgent))
        await engine.until(lambda: _count(db, 7))
        go_on.set()
        await engine.until(lambda: len(seen) == 7)
    assert seen == list(range(1, 8))


async def _count(db: Any, number: int) -> bool:
    return len(await db.reactions("lngs")) == number


@pytest.mark.replicaset
async def test_a_replay_fires_nothing_that_was_done(database: Named) -> None:
    """Also of a run that this process has just served, and whose snapshot it remembers."""
    seen: list[int] = []

    async def see(job: Job) -> None:
        seen.append(job.run.number or 0)

    options = engine.options_for(database, [engine.handler(see, copy("transferred", host=HERE))])

    async def served() -> bool:
        return not (await db.waiting("lngs"))[0]

    async with engine.opened(database) as db, engine.listener(db, options):
        for number in (1, 2):
            document = engine.run_document(number, ("raw", "lngs", "transferred"))
            run = await db.insert_run(document)
            await engine.until(partial(_states, db, ["done"] * number))
            await db.add_request("lngs", Request("replay", (run,)), "tests", Job.now())
            await engine.until(served)
            await engine.until(partial(_states, db, ["done"] * number))
    assert seen == [1, 2]


async def test_a_replay_beside_the_stream_fires_a_state_once(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that changes while a replay looks at it: the replay sees that, the stream tells it."""
    fired: list[str | None] = []
    replaying: list[bool] = []
    looking, firing = Database.snapshot, Requests._fire_again

    async def note(job: Job) -> None:
        fired.append(job.event.after)

    async def fire(self: Requests, ids: Any, request: Request) -> None:
        replaying.append(True)
        await firing(self, ids, request)

    async def snapshot(self: Database, site: str, runs: Any, *more: Any) -> Any:
        if replaying and replaying.pop():
            run = (await self.runs(runs))[runs[0]]
            await engine.write(self, RunUpdate.change_copy(run, run.copies[0], "transferred"))
        return await looking(self, site, runs, *more)

    monkeypatch.setattr(Database, "snapshot", snapshot)
    monkeypatch.setattr(Requests, "_fire_again", fire)
    handler = engine.handler(note, copy("transferred", host=HERE))
    async with engine.opened(database) as db:
        run = await db.insert_run(engine.run_document(1, ("raw", "lngs", "verifying")))
        async with engine.listener(db, engine.options_for(database, [handler])):
            await engine.until(lambda: _seen(db))
            await db.add_request("lngs", Request("replay", (run,)), "tests", Job.now())
            await engine.until(lambda: fired)
            await trio.sleep(0.5)  # what the stream has still to tell
    assert len(fired) == 1


async def _seen(db: Database) -> bool:
    record = await db.site_record("lngs")
    return record is not None and record.scanned is not None


async def test_what_a_deposed_process_has_claimed_is_found(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It woke, claimed and died, or gave it back unheard: its heir pays that without being told."""
    monkeypatch.setattr("caxev.engine.dispatcher.SURE_FOR", 0.5)
    seen: list[int] = []

    async def react(job: Job) -> None:
        seen.append(job.run.number or 0)
        if seen.count(seen[-1]) == 1:
            raise Retry("later", after=3600)

    options = engine.options_for(database, [engine.handler(react, new_run())])
    with MongoClient[dict[str, Any]](database.uri) as client:
        ledger = client[database.name]["caxev_ledger"]
        async with engine.opened(database) as db, engine.listener(db, options):
            for number in (1, 2):
                await db.insert_run(engine.run_document(number))
            await engine.until(lambda: ledger.count_documents({"due": {"$gt": Job.now()}}) == 2)
            first, second = ledger.find({"handler": "react"})
            claimed = {"due": Job.now(), "state": "running", "epoch": 0}
            ledger.update_one({"_id": first["_id"]}, {"$set": claimed})
            ledger.update_one({"_id": second["_id"]}, {"$set": {"due": Job.now()}})
            await engine.until(lambda: sorted(seen) == [1, 1, 2, 2])


async def test_one_that_stands_aside_keeps_no_worker(database: Named) -> None:
    """While it waits for something else the others of its lane go on, one at a time."""
    waits, others = trio.Event(), trio.Event()
    ended: list[int | None] = []
    working: list[int] = []

    async def react(job: Job) -> None:
        if job.run.number == 1:
            with job.yield_slot():
                waits.set()
                await others.wait()
        else:
            working.append(1)
            assert len(working) == 1
            await trio.sleep(0.01)
            working.pop()
        ended.append(job.run.number)
        if len(ended) == 5:
            others.set()

    options = _urgent_options(database, engine.handler(react, new_run(), lane="narrow"))
    options = evolve(options, site=evolve(options.site, lanes={"narrow": 1}))
    async with engine.opened(database) as db, engine.listener(db, options):
        await db.insert_run(engine.run_document(1))
        await waits.wait()
        for number in range(2, 7):
            await db.insert_run(engine.run_document(number))
        await engine.until(lambda: len(ended) == 6)
    assert ended[-1] == 1


async def test_what_led_to_nothing_is_recorded_together(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many such changes cost few writes; each is compared with the one before, and none is lost."""
    written: list[int] = []
    ingest = Database.ingest

    async def counted(self: Database, lease: Any, what: Any, now: Any) -> None:
        written.append(len(what.snapshots))
        await ingest(self, lease, what, now)

    monkeypatch.setattr(Database, "ingest", counted)
    asked: list[str | None] = []

    def decide(job: Job) -> Skip:
        asked.append(job.event.before)
        return Skip("never")

    async def react(job: Job) -> None:
        raise AssertionError("it was skipped")

    one = engine.handler(react, copy(("transferred", "error"), host=HERE), decide=decide)
    async with engine.opened(database) as db:
        run = await db.insert_run(engine.run_document(1, ("raw", "lngs", "verifying")))
        async with engine.listener(db, engine.options_for(database, [one])):
            await engine.until(lambda: _seen(db))
            written.clear()
            with MongoClient[dict[str, Any]](database.uri) as client:
                runs = client[database.name]["runs_new"]
                for number in range(20):
                    status = ("transferred", "error")[number % 2]
                    runs.update_one({"_id": run}, {"$set": {"data.0.status": status}})
                    await trio.sleep(0.02)
            found = (await db.runs([run]))[run].snapshot()
            await engine.until(partial(_stored, db, run, found))
    assert len(written) <= 5
    assert {(before or "").partition("@")[0] for before in asked} <= {
        "verifying",
        "error",
        "transferred",
    }
    # Never twice for one change: each is compared with what was seen last, recorded or not.
    assert all(one != other for one, other in pairwise(asked))


async def _stored(db: Database, run: Any, snapshot: Any) -> bool:
    return bool((await db.snapshot("lngs", [run])).before.get(run) == snapshot)


async def test_what_is_premature_starts_when_it_is_due(database: Named) -> None:
    """Not at once to be postponed, although a worker is free."""
    asked, started = [], []

    def decide(job: Job) -> Decision:
        asked.append(job.at)
        return Wait("it is early", job.at + timedelta(seconds=2))

    async def react(job: Job) -> None:
        started.append((job.now() - job.at).total_seconds())

    one = engine.handler(react, copy("transferred", host=HERE), decide=decide)
    options = engine.options_for(database, [one])
    async with engine.opened(database) as db, engine.listener(db, options):
        await db.insert_run(engine.run_document(1, ("raw", "lngs", "transferred")))
        await engine.until(lambda: _states(db, ["pending"]))
        [(reaction, _)] = await db.reactions("lngs")
        assert (reaction.note, reaction.started, reaction.epoch) == ("it is early", None, None)
        await engine.until(lambda: started)
    assert len(asked) == len(started) == 1
    assert started[0] >= 2


async def test_what_was_recorded_unheard_is_found(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reply is lost, and the lane was full: the reaction is neither claimed nor announced."""
    seen: list[int | None] = []
    begun, goes_on, ingest = trio.Event(), trio.Event(), Database.ingest
    lost: list[int] = []

    async def see(job: Job) -> None:
        seen.append(job.run.number)
        begun.set()
        await goes_on.wait()

    async def unheard(self: Database, lease: Any, what: Ingest, *rest: Any) -> None:
        await ingest(self, lease, what, *rest)
        if begun.is_set() and what.reactions and not lost:
            lost.append(1)
            raise Unreachable("the reply was lost")

    monkeypatch.setattr(Database, "ingest", unheard)
    one = engine.handler(see, copy("transferred", host=HERE))
    options = engine.options_for(database, [one], site_fields={"lanes": {"default": 1}})
    async with engine.opened(database) as db, engine.listener(db, options):
        await db.insert_run(engine.run_document(1, ("raw", "lngs", "transferred")))
        await begun.wait()
        await trio.sleep(0.5)  # the lane has nothing more to fetch
        await db.insert_run(engine.run_document(2, ("raw", "lngs", "transferred")))
        await engine.until(lambda: lost)
        await trio.sleep(1)
        goes_on.set()
        await engine.until(lambda: seen == [1, 2])


async def test_priority_outlives_retry_and_replay(database: Named) -> None:
    """A failed reaction that is retried, or fired again, is as urgent as before."""
    tries: list[int] = []

    async def fail(job: Job) -> None:
        tries.append(1)
        raise GiveUp("no hope")

    failing = engine.handler(fail, copy("transferred", host=HERE), lane="transfer")
    options = _urgent_options(database, failing)
    async with engine.opened(database) as db, engine.listener(db, options):
        tags = [{"name": "soon"}, {"name": "other"}]
        copies = ("raw", "lngs", "transferred")
        await db.insert_run(engine.run_document(1, copies, tags=tags))
        await engine.until(lambda: _states(db, ["failed"]))
        kinds = ["first"]
        for kind in ("retry", "replay"):
            kinds.append(kind)
            await db.add_request("lngs", Request(kind, force=True), "me", Job.now())
            await engine.until(lambda: len(tries) == len(kinds))
            await engine.until(lambda: _states(db, ["failed"]))
            ((reaction, _),) = await db.reactions("lngs")
            assert reaction.priority == 1


async def test_due_reactions_come_in_the_order_of_their_lane(database: Named) -> None:
    """What is due, and only that; reactions without a priority are found, too."""
    chance = Random(1)
    now = Job.now()

    def reaction(generation: int, lane: str) -> Reaction:
        event = Event(generation, Tag("go"), None, "yes")
        at = now + timedelta(seconds=chance.randrange(-300, 100))
        return Reaction(
            "lngs",
            event,
            "move",
            lane=lane,
            generation=generation,
            at=at,
            priority=chance.randrange(4),
        )

    reactions = [
        reaction(generation, ("transfer", "other")[generation % 2]) for generation in range(1, 400)
    ]
    async with engine.opened(database) as db:
        taken = await db.acquire("lngs", "me", 60.0, now)
        assert taken is not None
        await db.ingest(taken[0], Ingest({}, reactions), now)
        with MongoClient[dict[str, Any]](database.uri) as client:
            client[database.name]["caxev_ledger"].update_many(
                {"priority": 0}, {"$unset": {"priority": ""}}
            )
        for lane in ("transfer", "other"):
            due = [one for one in reactions if one.due <= now and one.lane == lane]
            found = await db.due("lngs", lane, now, 500)
            first = await db.due("lngs", lane, now, 7)
            assert {one.id for one in found} == {one.id for one in due}
            assert [rank(one) for one in found] == sorted(map(rank, due))
            assert [rank(one) for one in first] == sorted(map(rank, due))[:7]


def rank(one: Reaction) -> tuple[Any, ...]:
    return (-one.priority, -one.generation) if one.lane == "transfer" else (one.due,)


# -- progress -------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.floats(0, 40), st.integers(0, 10**12)), max_size=40),
    st.floats(0, 1e6),
)
def test_a_rate_is_that_of_late(steps: list[tuple[float, int]], start: float) -> None:
    """It is never negative, is there after a while, and costs little memory however long."""
    pace, now, done = RateMeter(), start, 0
    assert pace.moved(0, now) is None
    for seconds, more in steps:
        now, done = now + seconds, done + more
        rate = pace.moved(done, now)
        assert rate is None or 0 <= rate <= done * (1 + 1e-6)  # a second, but for rounding
        assert (rate is None) <= (now - start < LATELY)
        assert len(pace._seen) <= LATELY + 2


def test_a_steady_rate() -> None:
    """Equal steps give their rate; after a change of pace, the new one; anew, what was is gone."""
    pace = RateMeter()
    for second in range(100):
        rate = pace.moved(1000 * second, float(second))
    assert rate == pytest.approx(1000)
    for second in range(100, 140):
        rate = pace.moved(99_000, float(second))
    assert rate == 0
    assert pace.moved(10, 141.0) is None
    assert pace.moved(20, 143.0) == pytest.approx(5)


async def test_progress_stands_in_the_ledger(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a reaction says of its bytes is there to be read while it runs, with its rate."""
    monkeypatch.setattr("caxev.engine.runner.PROGRESS_EVERY", 0.05)
    go_on = trio.Event()

    async def move(job: Job) -> None:
        begun = trio.current_time()
        while not go_on.is_set():
            job.progress(int(1e6 * (trio.current_time() - begun)), 10**9)
            await trio.sleep(0.05)

    options = engine.options_for(database, [engine.handler(move, tag("go"))])
    async with engine.opened(database) as db, engine.listener(db, options):
        await db.insert_run(engine.run_document(1, tags=[{"name": "go"}]))

        async def told() -> Any:
            rows = [document["progress"] for _, document in await db.moving(["lngs"])]
            return [row for row in rows if row["rate"]]

        (row,) = await engine.until(told)
        go_on.set()
        await engine.until(lambda: _states(db, ["done"]))
        assert await db.moving(["lngs", "chicago"]) == []
    assert (row["total"], row["rate"] > 0) == (10**9, True)
