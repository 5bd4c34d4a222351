"""What the database refuses of one run, and what it cannot do at all.

A write that only its own document is to blame for ends one reaction. Everything else is waited for,
and reported within seconds.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import trio
from attrs import evolve
from loguru import logger
from pymongo import MongoClient
from pymongo.asynchronous.client_session import AsyncClientSession as Session
from pymongo.errors import BulkWriteError, OperationFailure, WTimeoutError

from caxev import HERE, CopyIs, Job, RunUpdate, aio, copy, metrics
from caxev.asking.asker import Asker
from caxev.asking.listeners import RetryReactions
from caxev.cli.reactions import _line, _retry, _unrecorded
from caxev.config import ConfigError, Settings
from caxev.core.clock import utcnow
from caxev.core.ledger import Failed, Postponed, Reaction, State, claim
from caxev.core.model import CopyKey, Event, Run
from caxev.database import (
    Database,
    DatabaseError,
    Ingest,
    InvalidDocument,
    Lease,
    Request,
    Unreachable,
    client,
    concerns_one,
    is_transient,
)
from caxev.database.snapshots import MANY_REACTIONS
from caxev.engine.attempt import Ended, failure, refusal
from caxev.engine.context import Context
from caxev.engine.dispatcher import Dispatcher
from caxev.engine.lanes import AHEAD
from caxev.engine.root_watch import RootWatch
from caxev.engine.workers import Workers
from tests import engine
from tests.conftest import Database as Named
from tests.mongod import Cluster

SITE = "lngs"
RAW = CopyKey("raw", SITE)
SETTINGS = Settings(mongo_uri="mongodb://db.example.org/?replicaSet=runs")


def met(code: int, **details: Any) -> DatabaseError:
    """What an error of the server with this code means to us."""
    return client.meaning(OperationFailure("the server's words", code, details), SETTINGS)


def outcome_of(code: int) -> str:
    found = refusal(met(code))
    return "wait" if found is None else type(found).__name__


@pytest.mark.parametrize("code", [2, 9, 52, 121, 10334, 11000, 17280])
def test_a_document_at_fault_ends_its_reaction(code: int) -> None:
    """The server's words are kept."""
    error = met(code)
    assert isinstance(error, InvalidDocument)
    assert refusal(error) == Failed(str(error))
    assert "the server's words" in str(error)


@pytest.mark.parametrize("code", [1, 8, 96, 31_337, 4_242_424])
def test_an_unknown_code_ends_its_reaction(code: int) -> None:
    """But whoever has no document to blame, such as the stream, waits."""
    assert outcome_of(code) == "Failed"
    assert isinstance(failure(met(code)), Failed)
    assert is_transient(met(code))


@pytest.mark.parametrize("code", [64, 100, 112, 189, 10107, 11600, 14031, 371])
def test_the_database_as_a_whole_is_waited_for(code: int) -> None:
    """No primary, no majority, no room on its disk: the next write would fare no better."""
    assert outcome_of(code) == "wait"
    assert is_transient(met(code))
    assert not concerns_one(met(code))


def test_a_missing_right_is_tried_again_a_few_times() -> None:
    """With back-off, so attempts are counted; a login that fails is waited for."""
    assert refusal(met(13)) == Postponed(str(met(13)))
    assert outcome_of(18) == "wait"


def test_of_many_writes_the_one_that_failed_counts() -> None:
    errors = [{"index": 3, "code": 121, "errmsg": "Document failed validation"}]
    assert isinstance(
        client.meaning(BulkWriteError({"writeErrors": errors}), SETTINGS), InvalidDocument
    )
    slow = {"code": 64, "errmsg": "waiting for replication timed out"}
    whole = client.meaning(BulkWriteError({"writeConcernErrors": [slow]}), SETTINGS)
    assert not concerns_one(whole)
    assert not concerns_one(client.meaning(WTimeoutError("timed out", 64), SETTINGS))


# -- the address --------------------------------------------------------------------------------


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What is logged, from warnings on."""
    found: list[str] = []
    number = logger.add(
        lambda message: found.append(str(message)), level="WARNING", format="{message}"
    )
    client._warn_overridden.cache_clear()
    yield found
    logger.remove(number)


@pytest.mark.parametrize(
    "option",
    [
        "readPreference=secondaryPreferred&maxStalenessSeconds=120",
        "readPreferenceTags=dc:ny&readPreference=nearest",
        "readConcernLevel=linearizable",
        "w=1&wtimeoutMS=500&journal=false",
        "timeoutMS=3000&socketTimeoutMS=10000",
    ],
)
async def test_what_the_engine_relies_on_is_not_the_addresss_to_choose(
    option: str, warnings: list[str]
) -> None:
    """It is left out with one warning for each option, and the rest of the address counts."""
    uri = f"mongodb://localhost:1/?{option}&appName=x&serverSelectionTimeoutMS=77"
    async with aio.loop():
        for _ in range(2):
            made = await aio.call(_made, Settings(mongo_uri=uri))
            assert made.write_concern.document == {"w": "majority", "wtimeout": 10_000}
            assert made.read_preference.name == "Primary"
            assert made.read_concern.document == {}
            assert made.options.timeout is None
            assert made.options.pool_options.socket_timeout is None
            assert made.options.server_selection_timeout == pytest.approx(0.077)
    names = [one.partition("=")[0] for one in option.split("&")]
    assert len(warnings) == len(names)
    assert all(any(name in text for text in warnings) for name in names)


async def _made(settings: Settings) -> client.Client:
    made = client.connect(settings)
    await made.close()
    return made


def test_too_few_connections_are_a_configuration_error() -> None:
    for few in ("1", "+1", "%31", "01"):
        with pytest.raises(ConfigError, match="caxev needs 10 connections"):
            client.connect(Settings(mongo_uri=f"mongodb://localhost/?maxPoolSize={few}"))


# -- memory ---------------------------------------------------------------------------------------


class Batch:
    """What a call holds."""


@pytest.mark.replicaset
async def test_a_call_that_fails_frees_what_it_has_held(database: Named) -> None:
    """At once: a first look at all runs has a conflict every few seconds, each with a page."""

    async def refused(_batch: Batch) -> None:
        await db._ledger.find_one({"$unknown": 1})

    async def conflicting(_batch: Batch, attempts: Iterator[int], session: Session) -> None:
        await db._ledger.find_one({}, session=session)
        if next(attempts) == 1:
            await db._ledger.update_one({"_id": "x"}, {"$inc": {"n": 1}})
        await db._ledger.update_one({"_id": "x"}, {"$inc": {"n": 1}}, session=session)

    async with engine.opened(database) as db:
        await db._call(db._ledger.insert_one, {"_id": "x"})
        one, two, attempts = Batch(), Batch(), count(1)
        held = [ref(one), ref(two)]
        gc.collect()
        gc.disable()
        try:
            with pytest.raises(DatabaseError):
                await db._call(refused, one)
            await db._call(db._transaction, partial(conflicting, two, attempts))
            assert next(attempts) == 3
            del one, two
            assert [one() for one in held] == [None, None]
        finally:
            gc.enable()


# -- one run that the database refuses ----------------------------------------------------------


async def note(job: Job) -> RunUpdate:
    """Note in the entry of this site's copy that it was here."""
    is_its = CopyIs(RAW, {"status": "transferred"})
    return RunUpdate(job.run.id, (is_its,), change=(is_its, {"noted": True}))


def numbered(number: int, detector: str = "tpc") -> dict[str, Any]:
    return engine.run_document(number, ("raw", SITE, "transferred"), detector=detector)


@pytest.mark.replicaset
async def test_a_run_that_a_validator_refuses_stops_no_other(database: Named) -> None:
    """Its reaction fails with the server's words and an alarm; the others are settled."""
    options = engine.options_for(database, [engine.handler(note, copy("transferred", host=HERE))])
    async with engine.opened(database) as db:
        with MongoClient[dict[str, Any]](database.uri) as server:
            runs = server[database.name]["runs_new"]
            runs.insert_many(
                [numbered(number, "nveto" if number % 3 else "tpc") for number in range(1, 10)]
            )
            rule = {"$jsonSchema": {"properties": {"detector": {"enum": ["tpc"]}}}}
            server[database.name].command("collMod", "runs_new", validator=rule)
            async with engine.listener(db, options):
                await engine.until(lambda: runs.count_documents({"data.noted": True}) == 3)
                runs.insert_one(numbered(12))
                await engine.until(lambda: runs.count_documents({"data.noted": True}) == 4)
            failed = [reaction for reaction, _ in await db.reactions(SITE, state="failed")]
            assert len(failed) == 6
            assert all("detector (code 121)" in reaction.note for reaction in failed)
            assert len([one for one in await db.alarms(SITE) if one.active]) == 6


@pytest.mark.replicaset
@pytest.mark.parametrize("is_running", [False, True], ids=["at the start", "under way"])
async def test_a_site_whose_own_document_is_refused_waits_and_reports_it(
    database: Named, warnings: list[str], is_running: bool
) -> None:
    """It blames no run, and goes on once the document is accepted."""
    options = engine.options_for(database, [engine.handler(note, copy("transferred", host=HERE))])
    troubled = metrics.troubled.labels(SITE)._value
    async with engine.opened(database) as db:
        with MongoClient[dict[str, Any]](database.uri) as server:
            runs = server[database.name]["runs_new"]

            def refuse(rule: dict[str, Any]) -> None:
                server[database.name].command("collMod", "caxev_ledger", validator=rule)

            def noted(number: int) -> bool:
                return runs.count_documents({"data.noted": True}) == number

            if not is_running:
                refuse({"_id": {"$ne": SITE}})
            async with engine.listener(db, options):
                if is_running:
                    runs.insert_one(numbered(1))
                    await engine.until(lambda: noted(1))
                    refuse({"_id": {"$ne": SITE}})
                runs.insert_one(numbered(2))
                await engine.until(lambda: any("document of the lease" in one for one in warnings))
                assert troubled.get() == 1
                # The renewal of the lease has met it; the recording of the run has to meet it, too.
                await trio.sleep(1.0)
                assert noted(int(is_running))
                refuse({})
                await engine.until(lambda: noted(1 + is_running))
                await engine.until(lambda: troubled.get() == 0)
            assert not await db.reactions(SITE, state="failed")
            assert not [one for one in await db.alarms(SITE) if one.active]


@pytest.mark.replicaset
async def test_a_refusal_of_the_sites_own_document_blames_no_other(database: Named) -> None:
    """Not even if the document is accepted a moment later: the first error shows which it was."""
    async with engine.opened(database) as db:
        lease = await taken(db)
        with MongoClient[dict[str, Any]](database.uri) as server:
            rule = {"_id": {"$ne": SITE}}
            server[database.name].command("collMod", "caxev_ledger", validator=rule)
        for number in (1, MANY_REACTIONS):
            what = Ingest({}, [open_reaction(n, generation=n) for n in range(number)])
            with pytest.raises(Unreachable, match="the document of the lease"):
                await db.ingest(lease, what, utcnow())
        with pytest.raises(Unreachable, match="the document of the lease"):
            await db.reopen_failed(lease, Request("retry"), utcnow())


@pytest.mark.replicaset
async def test_a_run_that_cannot_be_read_is_left_alone_for_a_while(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Claimed again at once, its reactions would keep a database busy that is in trouble."""
    seen: list[int] = []

    async def see(job: Job) -> None:
        seen.append(job.run.number or 0)

    def fail(*_: Any) -> None:
        raise Unreachable("no reply")

    async def left_alone() -> bool:
        rows = await db.reactions(SITE, state="pending")
        return any(one.note == "no reply" and one.due > utcnow() for one, _ in rows)

    options = engine.options_for(database, [engine.handler(see, copy("transferred", host=HERE))])
    async with engine.opened(database) as db, engine.listener(db, options):
        with monkeypatch.context() as lost:
            lost.setattr(Database, "whole_runs", fail)
            lost.setattr("caxev.engine.dispatcher.Dispatcher.reserve", lambda _, made: made)
            await db.insert_run(numbered(1))
            await engine.until(left_alone)
        await engine.until(lambda: seen == [1])


@pytest.mark.replicaset
async def test_an_attempt_keeps_no_other_run_in_memory(database: Named) -> None:
    """Of all runs that were read together, each is freed when its own attempts are over."""
    held: list[ref[Run]] = []
    begun, goes_on = trio.Event(), trio.Event()

    async def see(job: Job) -> None:
        if job.run.number == 1:
            begun.set()
            await goes_on.wait()
        else:
            held.append(ref(job.run))

    async def freed() -> bool:
        gc.collect()
        return len(held) == 3 and not any(one() for one in held)

    options = engine.options_for(database, [engine.handler(see, copy("transferred", host=HERE))])
    async with engine.opened(database) as db:
        for number in range(1, 5):
            await db.insert_run(numbered(number))
        async with engine.listener(db, options):
            await begun.wait()
            await engine.until(freed)
            goes_on.set()


@pytest.mark.replicaset
async def test_a_run_that_not_even_the_ledger_takes_stops_no_other(database: Named) -> None:
    """Neither what was seen of it nor that this cannot be recorded is to be written."""
    options = engine.options_for(database, [engine.handler(note, copy("transferred", host=HERE))])
    async with engine.opened(database) as db:
        with MongoClient[dict[str, Any]](database.uri) as server:
            runs, bad = server[database.name]["runs_new"], numbered(1)
            rule = {"$nor": [{"run": bad["_id"]}, {"_id.r": bad["_id"]}]}
            server[database.name].command("collMod", "caxev_ledger", validator=rule)
            async with engine.listener(db, options):
                runs.insert_many([bad, numbered(2), numbered(3)])
                await engine.until(lambda: runs.count_documents({"data.noted": True}) == 2)
                await engine.until(lambda: _alarms(db, 1))


def refuse(server: Any, query: dict[str, Any]) -> None:
    """Have neither the ledger nor the history take the end of a reaction like this."""
    ends = {"caxev_ledger": {"state": "failed"}, "caxev_history": {"handler": "see"}}
    for name, end in ends.items():
        server.command("collMod", name, validator={"$nor": [{**end, **query}]})


@pytest.mark.replicaset
async def test_an_end_that_the_ledger_refuses_holds_up_no_other(database: Named) -> None:
    """The reaction is not run again and again; there is an alarm."""
    seen: list[int] = []

    async def see(job: Job) -> None:
        seen.append(job.run.number or 0)

    options = engine.options_for(database, [engine.handler(see, copy("transferred", host=HERE))])
    async with engine.opened(database) as db:
        with MongoClient[dict[str, Any]](database.uri) as server:
            bad = numbered(1)
            refused = {"$nor": [{"run": bad["_id"], "handler": "see"}]}
            server[database.name].command("collMod", "caxev_history", validator=refused)
            server[database.name]["runs_new"].insert_many([bad, numbered(2), numbered(3)])
            async with engine.listener(db, options) as leaving:
                await engine.until(lambda: _count(db, State.DONE, 2))
                await engine.until(lambda: _alarms(db, 1))
                await engine.until(lambda: _count(db, State.FAILED, 1))
                leaving.asked.set()
        assert sorted(seen) == [1, 2, 3]


@pytest.mark.replicaset
async def test_once_the_ledger_takes_it_an_end_is_recorded_as_failed(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then a retry runs the reaction again, without a restart."""
    monkeypatch.setattr("caxev.engine.dispatcher.SURE_FOR", 0.5)
    seen: list[int] = []

    async def see(job: Job) -> None:
        seen.append(job.run.number or 0)

    options = engine.options_for(database, [engine.handler(see, copy("transferred", host=HERE))])
    async with engine.opened(database) as db:
        with MongoClient[dict[str, Any]](database.uri) as server:
            refuse(server[database.name], {})
            server[database.name]["runs_new"].insert_one(numbered(1))
            async with engine.listener(db, options):
                await engine.until(lambda: _alarms(db, 1))
                asker = Asker(db, options.sites, lambda _: options.registry, "me")
                (row,) = await _retry(asker, RetryReactions((SITE,)), None, is_request=False)
                assert "the ledger refuses to record 1 failures" in _line(row)
                for name in ("caxev_ledger", "caxev_history"):
                    server[database.name].command("collMod", name, validator={})
                await engine.until(lambda: _count(db, State.FAILED, 1))
                await engine.until(lambda: _unrecorded_now(db, 0))
                assert seen == [1]
                await db.add_request(SITE, Request("retry"), "me", utcnow())
                await engine.until(lambda: _count(db, State.DONE, 1))
                assert seen == [1, 1]


@pytest.mark.replicaset
async def test_what_cannot_be_recorded_yet_is_not_run_again(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the database fails while the first of several ends is recorded as failed."""

    async def fail(*_: Any) -> None:
        raise Unreachable("no reply")

    async with engine.opened(database) as db:
        lease = await taken(db)
        reactions = [open_reaction(number, generation=number) for number in (1, 2)]
        await db.ingest(lease, Ingest({}, reactions), utcnow())
        ended = [
            Ended(claim(one, lease.epoch), Failed("it cannot be recorded"))
            for one in await db.claim(reactions, lease)
        ]
        context = Context(db, lease, engine.options_for(database, []))
        async with trio.open_nursery() as nursery, Workers() as workers:
            dispatcher = Dispatcher(context, workers, nursery, RootWatch(context, workers))
            for one in ended:
                dispatcher.settler.leave_stuck(one)
            dispatcher._sure_until = 0.0
            with monkeypatch.context() as lost:
                lost.setattr(Database, "settle", fail)
                with pytest.raises(Unreachable):
                    await dispatcher.reconcile()
            for _ in range(2):
                await dispatcher.reconcile()
                assert await db.due(SITE, "default", utcnow(), 9) == []
                dispatcher._sure_until = 0.0
            assert await _count(db, State.FAILED, 2)


@pytest.mark.replicaset
async def test_an_end_that_was_refused_stands_in_the_way_of_no_later_change(
    database: Named,
) -> None:
    """The change is recorded while no worker is free, so in a slot that is claimed still."""
    seen: list[int] = []
    goes_on = trio.Event()

    async def see(job: Job) -> None:
        seen.append(job.run.number or 0)
        if job.run.number == 2:
            await goes_on.wait()

    trigger = copy(["transferred", "error"], host=HERE)
    options = engine.options_for(
        database, [engine.handler(see, trigger)], site_fields={"lanes": {"default": 1}}
    )
    async with engine.opened(database) as db:
        with MongoClient[dict[str, Any]](database.uri) as server:
            bad = numbered(1)
            refuse(server[database.name], {"run": bad["_id"], "after": {"$regex": "^transferred"}})
            runs = server[database.name]["runs_new"]
            runs.insert_one(bad)
            async with engine.listener(db, options):
                await engine.until(lambda: _alarms(db, 1))
                runs.insert_one(numbered(2))
                await engine.until(lambda: seen == [1, 2])
                runs.update_one({"number": 1}, {"$set": {"data.0.status": "error"}})
                await engine.until(lambda: _count(db, State.PENDING, 1))
                goes_on.set()
                await engine.until(lambda: seen == [1, 2, 1])
                await engine.until(lambda: _count(db, State.DONE, 2))


def open_reaction(run: Any, **fields: Any) -> Reaction:
    event = Event(run, RAW, None, "transferred")
    return evolve(Reaction(SITE, event, "see", lane="default", generation=1, at=utcnow()), **fields)


async def taken(db: Database) -> Lease:
    found = await db.acquire(SITE, "a former process", 60.0, utcnow())
    assert found is not None
    return found[0]


@pytest.mark.replicaset
@pytest.mark.parametrize("refused", ["running", "pending"], ids=["a claim", "an interruption"])
async def test_a_claim_that_the_ledger_refuses_stops_no_other(
    database: Named, refused: str
) -> None:
    """Neither a claim to be made nor one of a former process to be opened: there is an alarm."""

    async def see(job: Job) -> None:
        pass

    options = engine.options_for(database, [engine.handler(see, copy("transferred", host=HERE))])
    async with engine.opened(database) as db:
        with MongoClient[dict[str, Any]](database.uri) as server:
            documents = [numbered(number) for number in range(1, 6)]
            server[database.name]["runs_new"].insert_many(documents)
            reactions = [
                open_reaction(document["_id"], generation=n) for n, document in enumerate(documents)
            ]
            former = await taken(db)
            # As a scan finds them: it is to make no further reactions.
            seen = {one["_id"]: Run.from_document(one).snapshot() for one in documents}
            await db.ingest(former, Ingest(seen, reactions), utcnow())
            if refused == "pending":
                assert len(await db.claim(reactions, former)) == 5
            await db.release(former)
            rule = {"$nor": [{"run": documents[2]["_id"], "state": refused}]}
            server[database.name].command("collMod", "caxev_ledger", validator=rule)
            async with engine.listener(db, options):
                await engine.until(lambda: _count(db, State.DONE, 4))
                await engine.until(lambda: _alarms(db, 1))
                server[database.name]["runs_new"].insert_one(numbered(6))
                await engine.until(lambda: _count(db, State.DONE, 5))
            server[database.name].command("collMod", "caxev_ledger", validator={})
            await engine.once(db, options)
            assert await _count(db, State.DONE, 6)
            assert not [one for one in await db.alarms(SITE) if one.active]


@pytest.mark.replicaset
async def test_claims_that_the_ledger_refuses_hide_no_other(database: Named) -> None:
    """However many they are, and although they come first in their lane."""
    seen: list[int] = []

    async def see(job: Job) -> None:
        seen.append(job.run.number or 0)

    one = engine.handler(see, copy("transferred", host=HERE), lane="transfer")
    options = engine.options_for(database, [one], site_fields={"lanes": {"transfer": 1}})
    async with engine.opened(database) as db:
        with MongoClient[dict[str, Any]](database.uri) as server:
            documents = [numbered(number) for number in range(AHEAD + 1)]
            server[database.name]["runs_new"].insert_many(documents)
            former = await taken(db)
            reactions = [
                open_reaction(one["_id"], generation=one["number"], lane="transfer")
                for one in documents
            ]
            snapshots = {one["_id"]: Run.from_document(one).snapshot() for one in documents}
            await db.ingest(former, Ingest(snapshots, reactions), utcnow())
            await db.release(former)
            rule = {"$nor": [{"run": {"$ne": documents[0]["_id"]}, "state": "running"}]}
            server[database.name].command("collMod", "caxev_ledger", validator=rule)
        async with engine.listener(db, options):
            await engine.until(lambda: seen == [0])


@pytest.mark.replicaset
async def test_a_reaction_that_cannot_be_woken_keeps_no_other_asleep(database: Named) -> None:
    later = utcnow() + timedelta(days=1)
    async with engine.opened(database) as db:
        with MongoClient[dict[str, Any]](database.uri) as server:
            lease = await taken(db)
            reactions = [open_reaction(number, due=later) for number in range(5)]
            await db.ingest(lease, Ingest({}, reactions), utcnow())
            ledger = server[database.name]["caxev_ledger"]
            ledger.update_many({"handler": "see"}, {"$set": {"root": "/disk"}})
            rule = {"$nor": [{"run": 0, "due": {"$lt": utcnow() + timedelta(hours=1)}}]}
            server[database.name].command("collMod", "caxev_ledger", validator=rule)
            assert await db.wake(lease, "/disk", utcnow()) == 4


@pytest.mark.replicaset
async def test_a_note_that_the_ledger_refuses_ends_no_listener(
    database: Named, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which directories are away, and the position of an idle stream."""
    refusals: list[str] = []

    def refuse(name: str) -> None:
        async def refusing(*args: Any) -> None:
            refusals.append(name)
            raise met(121)

        monkeypatch.setattr(Database, name, refusing)

    refuse("save_position")
    refuse("note_away")
    monkeypatch.setattr("caxev.engine.recorder.Recorder.read_ahead.__defaults__", (0.05,))
    monkeypatch.setattr("caxev.engine.watcher.SAVE_EVERY", 0.0)
    one = engine.handler(note, copy("transferred", host=HERE))
    options = engine.options_for(database, [one], site_fields={"dir_raw": str(tmp_path)})
    async with engine.opened(database) as db:
        with MongoClient[dict[str, Any]](database.uri) as server:
            runs = server[database.name]["runs_new"]
            async with engine.listener(db, options):
                await engine.until(lambda: {*refusals} == {"save_position", "note_away"})
                runs.insert_one(numbered(1))
                await engine.until(lambda: runs.count_documents({"data.noted": True}) == 1)


async def _count(db: Database, state: State, number: int) -> bool:
    return sum(one.state is state for one in await engine.reactions(db, SITE)) == number


async def _unrecorded_now(db: Database, number: int) -> bool:
    return await _unrecorded(db, SITE) == number


async def _alarms(db: Database, number: int) -> bool:
    return len(await db.alarms(SITE)) == number


# -- a majority that is never reached -----------------------------------------------------------


class WithArbiter(Cluster):
    """Primary, secondary, arbiter: without the secondary there is a primary, but no majority."""

    def _configuration(self) -> dict[str, Any]:
        made = super()._configuration()
        made["members"][0]["priority"] = 5
        made["members"][2]["arbiterOnly"] = True
        return made


@pytest.mark.replicaset
async def test_a_majority_that_is_never_reached_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    """Log, metric, alarm; the listener leaves when it is asked; all is done once it is back."""
    monkeypatch.setattr("caxev.alarms.health.TROUBLED", 1.0)
    monkeypatch.setattr("caxev.engine.session.FLUSH", 1.0)
    monkeypatch.setattr("caxev.alarms.health.EVERY", 0.1)
    metric = metrics.troubled.labels(SITE)._value
    with WithArbiter(tmp_path, 3) as server:
        database = Named(server.uri, "run")
        one = engine.handler(note, copy("transferred", host=HERE))
        options = engine.options_for(database, [one], grace=2.0)
        with MongoClient[dict[str, Any]](server.uri, w=1) as plain, monkeypatch.context() as hasty:
            hasty.setitem(client.RELIED_ON, "wTimeoutMS", 1000)
            runs = plain["run"]["runs_new"]
            async with engine.opened(database) as db:
                with trio.fail_after(engine.PATIENCE):
                    async with engine.listener(db, options):
                        runs.insert_one(numbered(1))
                        await engine.until(lambda: runs.count_documents({"data.noted": True}) == 1)
                        # A loaded machine may have taken longer than that second for a write.
                        await engine.until(lambda: metric.get() == 0)
                        # If it leads, as a loaded machine may elect it, member 0 follows it.
                        server.kill(1)
                        await engine.until(lambda: metric.get() == 1)
                        await engine.until(lambda: any("is unreachable" in one for one in warnings))
                assert any("retrying until it answers" in one for one in warnings)
            hasty.undo()
            server.restart(1)
            runs.insert_one(numbered(2))
            async with engine.opened(database) as db:
                await engine.once(db, options)
            assert runs.count_documents({"data.noted": True}) == 2
            assert metric.get() == 0
