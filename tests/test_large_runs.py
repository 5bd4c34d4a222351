"""A run that owes very many reactions: all of them are made, and nobody else waits for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import trio
from bson import ObjectId
from hypothesis import given
from hypothesis import strategies as st
from pymongo import MongoClient
from trio.testing import MockClock

from caxev import Job, copy
from caxev.core.ledger import new_reaction
from caxev.core.model import Event, Run, Tag
from caxev.database import Database, Ingest, InvalidDocument, Lease, Request
from caxev.engine.lanes import Lane, in_turn
from caxev.engine.run_locks import FRESH, LARGE, RunCache
from tests import engine
from tests.conftest import Database as Named

SITE = "lngs"
COPIES = 45
PIECE = 10

Recorded = Callable[[Ingest], Any]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caxev.core.recording.AT_ONCE", PIECE)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """Functions that are called with whatever is recorded, before it is."""
    called: list[Recorded] = []
    ingest = Database.ingest

    async def watched(self: Database, lease: Lease, what: Ingest, *args: Any) -> None:
        for function in called:
            await function(what)
        await ingest(self, lease, what, *args)

    monkeypatch.setattr(Database, "ingest", watched)
    return called


class Reactions:
    """A handler that counts its reactions by run and host."""

    def __init__(self) -> None:
        self.of: Counter[tuple[Any, str]] = Counter()

    async def react(self, job: Job) -> None:
        self.of[job.run.id, getattr(job.event.aspect, "host", "")] += 1

    def options(self, database: Named, **options: Any) -> Any:
        one = engine.handler(self.react, copy(("transferred", "error")))
        return engine.options_for(database, [one], **options)


def large(copies: int = COPIES) -> dict[str, Any]:
    hosts = [("raw", f"site{number}", "transferred") for number in range(copies)]
    return engine.run_document(1, *hosts)


def once_each(run: ObjectId, times: int = 1) -> Counter[tuple[Any, str]]:
    return Counter({(run, f"site{number}"): times for number in range(COPIES)})


@pytest.mark.replicaset
async def test_others_come_in_between(database: Named, recorded: list[Recorded]) -> None:
    """What another run owes is recorded before the next piece of the large one."""
    reactions, order = Reactions(), list[tuple[Any, int]]()
    async with engine.opened(database) as db, engine.listener(db, reactions.options(database)):
        await engine.until(lambda: _positioned(db))

        async def note(what: Ingest) -> None:
            order.extend((run, len(what.reactions)) for run in what.snapshots)
            if len(order) == 2:
                await db.insert_run(small)
            await trio.sleep(1.0)  # for the stream to bring it

        recorded.append(note)
        small = engine.run_document(2, ("raw", SITE, "transferred"))
        run = await db.insert_run(large())
        expected = once_each(run) + Counter({(small["_id"], SITE): 1})
        await engine.until(lambda: reactions.of == expected)
    assert Counter(name for name, _ in order) == {run: 5, small["_id"]: 1}
    assert max(reactions for _, reactions in order) <= PIECE
    assert order.index((small["_id"], 1)) < 5, "the other run waited for all pieces"


async def _positioned(db: Database) -> bool:
    record = await db.site_record(SITE)
    return record is not None and record.position is not None


@pytest.mark.replicaset
@pytest.mark.parametrize("first", [True, False], ids=["scan", "stream"])
async def test_a_listener_that_ends_between_two_pieces(
    database: Named, recorded: list[Recorded], *, first: bool
) -> None:
    """The next one records the rest, although batches of others were recorded in between."""
    reactions, pieces = Reactions(), list[int]()
    stopped = trio.Event()

    async def stop(what: Ingest) -> None:
        pieces.extend(len(what.reactions) for run in what.snapshots if run == run_id)
        if len(pieces) == 3 and not stopped.is_set():
            stopped.set()
            await trio.sleep_forever()
        if len(pieces) == 2:
            await trio.sleep(0.2)  # others come

    async with engine.opened(database) as db:
        document = large()
        run_id, other = document["_id"], engine.run_document(2, ("raw", SITE, "transferred"))
        if first:
            await db.insert_run(document)
            await db.insert_run(other)
            recorded.append(stop)
        async with engine.listener(db, reactions.options(database, grace=0.5)):
            if not first:
                await engine.until(lambda: _positioned(db))
                recorded.append(stop)
                await db.insert_run(document)
                await db.insert_run(other)
            await stopped.wait()
        assert sum(reactions.of.values()) < COPIES
        recorded.clear()
        expected = once_each(run_id) + Counter({(other["_id"], SITE): 1})
        async with engine.listener(db, reactions.options(database)):
            await engine.until(lambda: reactions.of == expected)
            await db.insert_run(late := engine.run_document(3, ("raw", SITE, "transferred")))
            await engine.until(lambda: reactions.of[late["_id"], SITE])
        assert reactions.of == expected + Counter({(late["_id"], SITE): 1})


@pytest.mark.replicaset
async def test_it_changes_while_it_is_recorded(database: Named, recorded: list[Recorded]) -> None:
    """A piece is what is new when it is recorded: nothing fires for what has gone by then."""
    reactions, pieces = Reactions(), list[int]()
    with MongoClient[dict[str, Any]](database.uri) as client:
        runs = client[database.name]["runs_new"]
        document = large()

        async def change(what: Ingest) -> None:
            pieces.extend(len(what.reactions) for run in what.snapshots if run == document["_id"])
            if len(pieces) == 2:
                runs.update_one({"_id": document["_id"]}, {"$set": {"data": document["data"][:25]}})

        async with engine.opened(database) as db, engine.listener(db, reactions.options(database)):
            await engine.until(lambda: _positioned(db))
            recorded.append(change)
            await db.insert_run(document)
            await engine.until(lambda: sum(reactions.of.values()) >= 25)
            await db.insert_run(late := engine.run_document(3, ("raw", SITE, "transferred")))
            await engine.until(lambda: reactions.of[late["_id"], SITE])
    assert pieces[:2] == [PIECE, PIECE]
    assert sum(pieces) == 25
    assert sum(reactions.of.values()) == 26


@pytest.mark.replicaset
async def test_once_and_replay(database: Named) -> None:
    """`--once` leaves when all of it is done; a replay with force does all of it again."""
    reactions = Reactions()
    async with engine.opened(database) as db:
        await engine.once(db, reactions.options(database))
        run = await db.insert_run(large())
        await engine.once(db, reactions.options(database))
        assert reactions.of == once_each(run)
        await db.add_request(SITE, Request("replay", (run,), force=True), "me", Job.now())
        await engine.once(db, reactions.options(database))
        assert reactions.of == once_each(run, 2)
        await db.add_request(SITE, Request("replay", (run,)), "me", Job.now())
        await engine.once(db, reactions.options(database))
        assert reactions.of == once_each(run, 2)


@pytest.mark.replicaset
async def test_a_replay_of_what_is_new(database: Named) -> None:
    """A run that is new and large when it is replayed fires once."""
    reactions = Reactions()
    async with engine.opened(database) as db:
        await engine.once(db, reactions.options(database))
        run = await db.insert_run(large())
        await db.add_request(SITE, Request("replay", (run,)), "me", Job.now())
        await engine.once(db, reactions.options(database))
        assert reactions.of == once_each(run)


# -- its reactions ----------------------------------------------------------------------------


@pytest.mark.replicaset
async def test_others_are_due_in_between(database: Named, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a lane with more workers than reactions are fetched at once, too."""
    monkeypatch.setattr("caxev.core.recording.AT_ONCE", 500)
    monkeypatch.setattr("caxev.engine.lanes.WINDOW", 20)
    order: list[Any] = []

    async def react(job: Job) -> None:
        order.append(job.run.id)
        if len(order) == PIECE:
            await db.insert_run(small)
        await trio.sleep(0.5)

    one = engine.handler(react, copy("transferred"))
    options = engine.options_for(database, [one], site_fields={"lanes": {"default": 16}})
    small = engine.run_document(2, ("raw", SITE, "transferred"))
    async with engine.opened(database) as db, engine.listener(db, options):
        await engine.until(lambda: _positioned(db))
        run = await db.insert_run(large(300))
        await engine.until(lambda: len(order) == 301)
    assert Counter(order) == {run: 300, small["_id"]: 1}
    assert order.index(small["_id"]) < 200


@pytest.mark.replicaset
async def test_it_is_not_read_for_each(database: Named, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reactions share what was read a moment ago, but none sees less than its event."""
    monkeypatch.setattr("caxev.core.recording.AT_ONCE", 500)
    monkeypatch.setattr("caxev.engine.run_locks.LARGE", 100)
    monkeypatch.setattr("caxev.engine.run_locks.FRESH", 10.0)
    reads, stale = list[int](), list[Any]()
    reading = Database.runs

    async def counted(self: Database, ids: Iterable[Any]) -> Any:
        reads.append(1)
        return await reading(self, ids)

    async def react(job: Job) -> None:
        # A copy that was good may have become an error by now: to see more is right.
        if job.copy is None or job.copy.status not in (job.event.after, "error"):
            stale.append(job.event)

    monkeypatch.setattr(Database, "runs", counted)
    one = engine.handler(react, copy(("transferred", "error")))
    options = engine.options_for(database, [one], site_fields={"lanes": {"default": 2}})
    with MongoClient[dict[str, Any]](database.uri) as client:
        runs = client[database.name]["runs_new"]
        async with engine.opened(database) as db, engine.listener(db, options):
            await engine.until(lambda: _positioned(db))
            run = await db.insert_run(large(200))

            async def paid(number: int) -> bool:
                done = [reaction for reaction, _ in await db.reactions(SITE, state="done")]
                return sum(reaction.after == "error" for reaction in done) == number

            for number in range(10):
                changed = {f"data.{number}.status": "error"}
                runs.update_one({"_id": run}, {"$set": changed})
                await trio.sleep(0.05)
            await engine.until(lambda: paid(10))
    assert not stale
    assert len(reads) < 50


def test_a_shelf_gives_what_was_read_after_the_reaction() -> None:
    """What was read before a reaction was recorded, or a while ago, is not given."""

    async def main() -> None:
        run_cache, now = RunCache(), trio.current_time()
        run, few = Run.from_document(large(LARGE)), Run.from_document(large(LARGE - 1))
        event = Event(run.id, Tag("x"), None, "yes")
        first, late = (
            new_reaction(
                SITE, event, f"h{generation}", lane="l", generation=generation, at=Job.now()
            )
            for generation in (7, 8)
        )
        run_cache.put([run, few], now, 7)
        assert run_cache.take([run.id, few.id], [first]) == {run.id: run}
        assert run_cache.take([run.id], [first, late]) == {}
        run_cache.ended(first)
        assert run_cache.take([run.id], [first]) == {}, "it may have written to the run itself"
        await trio.sleep(FRESH + 0.1)
        run_cache.put([run], trio.current_time() - FRESH - 0.1, 7)
        assert run_cache.take([run.id], [first]) == {}

    trio.run(main, clock=MockClock(autojump_threshold=0))


@given(st.lists(st.integers(0, 5)))
def test_all_in_turn(runs: list[int]) -> None:
    """Each reaction once; of each run in its order; the n-th of one before the next of another."""
    reactions = [
        new_reaction(
            SITE,
            Event(run, Tag("x"), None, "yes"),
            "h",
            lane="l",
            generation=generation,
            at=Job.now(),
        )
        for generation, run in enumerate(runs)
    ]
    turned, places = in_turn(reactions), list[int]()
    for place, reaction in enumerate(turned):
        places.append(sum(one.run == reaction.run for one in turned[:place]))
    assert sorted(reaction.generation for reaction in turned) == list(range(len(runs)))
    assert places == sorted(places)
    for run in set(runs):
        generations = [reaction.generation for reaction in turned if reaction.run == run]
        assert generations == sorted(generations)


@pytest.mark.parametrize("lane", ["default", "transfer"])
@pytest.mark.parametrize("workers", [1, 4, 512, 5000])
def test_a_run_cannot_fill_what_is_fetched_unseen(lane: str, workers: int) -> None:
    """Whatever a lane's size, a run that keeps others out of a window is found to do so."""
    one = Lane(lane, workers)
    event = Event(1, Tag("x"), None, "yes")
    reactions = [
        new_reaction(SITE, event, "h", lane=lane, generation=generation, at=Job.now())
        for generation in range(one.window)
    ]
    assert one.crowding(reactions) == 1


# -- what cannot be recorded, and what comes meanwhile ----------------------------------------


@pytest.mark.replicaset
async def test_a_replay_of_one_that_cannot_be_recorded_ends(
    database: Named, recorded: list[Recorded]
) -> None:
    """It is parked; the request is done with, and others of it are served."""
    reactions = Reactions()
    async with engine.opened(database) as db:
        await engine.once(db, reactions.options(database))
        run = await db.insert_run(large())
        small = await db.insert_run(engine.run_document(2, ("raw", SITE, "transferred")))

        async def refuse(what: Ingest) -> None:
            if run in what.snapshots:
                raise InvalidDocument("too large")

        recorded.append(refuse)
        await db.add_request(SITE, Request("replay", (run, small)), "me", Job.now())
        await engine.once(db, reactions.options(database))
        assert await db.pending(SITE) == []
        assert reactions.of == Counter({(small, SITE): 1})
        recorded.clear()
        await db.add_request(SITE, Request("retry"), "me", Job.now())
        await engine.once(db, reactions.options(database))
        assert reactions.of == once_each(run) + Counter({(small, SITE): 1})


@pytest.mark.replicaset
async def test_a_replay_does_not_undo_what_came_meanwhile(
    database: Named, recorded: list[Recorded]
) -> None:
    """A reaction that the stream renewed between two pieces stands as it is newer."""
    reactions, pieces = Reactions(), list[int]()
    async with engine.opened(database) as db:
        await engine.once(db, reactions.options(database))
        run = await db.insert_run(large())
        await engine.once(db, reactions.options(database))
        with MongoClient[dict[str, Any]](database.uri) as client:
            runs = client[database.name]["runs_new"]

            async def change(what: Ingest) -> None:
                pieces.append(len(what.reactions))
                if len(pieces) == 1:
                    runs.update_one({"_id": run}, {"$set": {"data.44.status": "error"}})
                    await trio.sleep(0.3)  # for the stream to bring it

            async with engine.listener(db, reactions.options(database)):
                await engine.until(lambda: _positioned(db))
                recorded.append(change)
                request = Request("replay", (run,), force=True)
                await db.add_request(SITE, request, "me", Job.now())

                async def settled() -> bool:
                    every = [reaction for reaction, _ in await db.reactions(SITE, run=run)]
                    return not await db.pending(SITE) and {d.state.value for d in every} == {"done"}

                await engine.until(settled)
            last = [
                reaction
                for reaction, _ in await db.reactions(SITE, run=run)
                if "site44" in reaction.id
            ]
        assert [reaction.after.partition("@")[0] for reaction in last if reaction.after] == [
            "error"
        ]
