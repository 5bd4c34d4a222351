"""Documents of caxev's own collections that are not as caxev writes them.

Whoever wrote them: they are passed over, reported and set aside. Nobody's listener and nobody's
command ends for one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any, cast

import pytest
import trio
from attrs import evolve
from bson import Code, Decimal128, ObjectId, Regex, Timestamp
from bson.datetime_ms import DatetimeMS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pymongo import MongoClient

from caxev import HERE, Job, copy
from caxev.alarms.manager import AlarmManager
from caxev.cli.alarms import alarm_rows
from caxev.cli.reaction_rows import reaction_row
from caxev.cli.status import site_rows
from caxev.core.alarms import Alarm, AlarmState, Delivery
from caxev.core.ledger import Reaction
from caxev.core.model import CopyKey, Event, Tag
from caxev.core.packing import pack
from caxev.core.selection import EVERY
from caxev.database import Database, FeedStream, Odd, Position, Request, Unreachable
from caxev.database.alarms import alarm_id, alarm_row
from caxev.database.bulk_requests import bulk_from
from caxev.database.manifests import part_from
from caxev.database.reactions import reaction_document
from caxev.database.requests import request_from
from caxev.database.rows import Malformed, alarm_state_from, carefully, reaction_from, snapshot_from
from caxev.database.sites import SiteRecord
from caxev.engine.context import Context
from caxev.engine.malformed import Quarantine
from caxev.files import Manifest
from caxev.files.manifest import Item
from tests import engine
from tests.conftest import Database as Named

SITE = "lngs"
NOW = datetime(2026, 1, 1, tzinfo=UTC)
RUN = ObjectId()
DEBT = Reaction(
    SITE,
    Event(RUN, CopyKey("raw", SITE), None, "transferred"),
    "see",
    lane="default",
    generation=7,
    at=NOW,
)
ALARM = AlarmState(
    Alarm(SITE, "disk", "it is full", details={"why": "so"}),
    NOW,
    deliveries={"mail": Delivery(NOW, why="x")},
)
FILES = Manifest([Item(b"a", "file", 3, b"b" * 32)])

ODD: tuple[Any, ...] = (
    *(5, -1, 2**62, 1e300, 0.5, True, "9999", "", [], [5], {}, {"a": 1}, b"x", None),
    *(
        Regex("x"),
        Code("x"),
        Timestamp(1, 1),
        DatetimeMS(2**60),
        NOW,
        datetime.max.replace(tzinfo=UTC),
    ),
)
"""What may stand in place of anything."""


def site_document(site: str = SITE) -> dict[str, Any]:
    return {
        "_id": site,
        "kind": "site",
        "epoch": 3,
        "owner": "host:1",
        "expires": NOW,
        "position": {"token": None, "start": Timestamp(1, 1)},
        "scanned": NOW,
        "streamed": NOW,
        "rules": [{"catalogue": "rucio", "digest": "ab"}],
        "trouble": None,
        "gaps": [{"found": NOW, "why": "286"}],
        "requests": 1,
        "watched": {"run": ["x"], "copies": []},
        "lsid": {"id": b"0" * 16},
        "lease": 12.0,
        "skew": 0.1,
        "markers": [{"root": "/data", "id": "ab", "disk": "cd"}],
        "away": [{"root": "/data", "why": "it is away"}],
    }


def document_of(kind: str, run: ObjectId = RUN) -> dict[str, Any]:
    """A document of this kind, about a run, as caxev writes it."""
    made: dict[str, Any]
    match kind:
        case "reaction":
            debt = evolve(DEBT, event=evolve(DEBT.event, run=run))
            made = {
                "_id": debt.id,
                **reaction_document(debt),
                "progress": {"done": 1, "at": NOW},
                "started": NOW,
            }
        case "snapshot":
            made = {
                "_id": {"s": SITE, "r": run},
                "seen": pack({CopyKey("raw", SITE): "transferred", Tag("t"): "yes"}),
                "by": 5,
            }
        case "alarm":
            alarm = evolve(ALARM, alarm=evolve(ALARM.alarm, key=f"disk {run}"))
            made = {"_id": alarm_id(SITE, alarm.alarm.key), **alarm_row(alarm)}
        case "request":
            made = {
                "_id": ObjectId(),
                "site": SITE,
                "kind": "replay",
                "runs": [run],
                "force": False,
            }
            made |= {"handler": None, "alarm": None}
        case "manifest":
            digest = FILES.digest
            made = {
                "_id": {"m": digest, "last": True},
                "m": digest,
                "part": 0,
                "items": FILES.to_rows(),
            }
        case _:
            made = site_document()
    return made


READ: dict[str, Callable[[dict[str, Any]], object]] = {
    "reaction": reaction_from,
    "snapshot": snapshot_from,
    "alarm": alarm_state_from,
    "request": request_from,
    "manifest": part_from,
    "site": SiteRecord.from_document,
}
COLLECTION = {"request": "caxev_requests", "manifest": "caxev_manifests"}


def _paths(value: object, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a document, but for its _id."""
    pairs: Any = ()
    if isinstance(value, dict):
        pairs = value.items()
    elif isinstance(value, list):
        pairs = enumerate(value)
    for key, inner in pairs:
        if key != "_id":
            yield (*at, key)
            yield from _paths(inner, (*at, key))


@st.composite
def mutated(draw: st.DrawFn, kinds: tuple[str, ...] = tuple(READ)) -> tuple[str, dict[str, Any]]:
    """A document of some kind in which a value is another, or missing."""
    kind = draw(st.sampled_from(kinds))
    document = deepcopy(document_of(kind))
    *way, last = draw(st.sampled_from(list(_paths(document))))
    inner: Any = document
    for key in way:
        inner = inner[key]
    if draw(st.booleans()):
        del inner[last]
    else:
        inner[last] = draw(st.sampled_from(ODD))
    return kind, document


@pytest.mark.parametrize("kind", list(READ))
def test_what_caxev_writes_is_read(kind: str) -> None:
    READ[kind](document_of(kind))


@given(mutated())
def test_what_is_malformed_is_read_or_refused(odd: tuple[str, dict[str, Any]]) -> None:
    """Nothing but `Malformed` comes of it; of a site's document not even that."""
    kind, document = odd
    if kind == "site":
        READ[kind](document)
    else:
        with suppress(Malformed):
            carefully(READ[kind], document)


# -- a listener, and the commands ---------------------------------------------------------------


async def see(job: Job) -> None:
    """Do nothing."""


@pytest.mark.replicaset
@settings(
    max_examples=8,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(odd=st.lists(mutated(), min_size=1, max_size=12), elsewhere=mutated(("site",)))
def test_listener_and_commands_go_on(
    database: Named, odd: list[tuple[str, dict[str, Any]]], elsewhere: tuple[str, dict[str, Any]]
) -> None:
    """With malformed documents of this site and of another, all is done and shown."""
    with MongoClient[dict[str, Any]](database.uri, tz_aware=True) as client:
        server = client[database.name]
        for name in (*COLLECTION.values(), "caxev_ledger", "runs_new"):
            server[name].delete_many({})
        documents = [*odd, ("site", {**elsewhere[1], "_id": "chicago"})]
        for kind, document in documents:
            which = {"_id": document["_id"]}
            server[COLLECTION.get(kind, "caxev_ledger")].replace_one(which, document, upsert=True)
        trio.run(_goes_on, database)


async def _goes_on(database: Named) -> None:
    options = engine.options_for(database, [engine.handler(see, copy("transferred", host=HERE))])
    async with engine.opened(database) as db:
        number = await db.insert_run(engine.run_document(1, ("raw", SITE, "transferred")))
        await db.add_request(SITE, Request("scan"), "me", Job.now())
        async with engine.listener(db, options):
            await engine.until(lambda: _is_done(db, number))
        await _shown(db)


async def _is_done(db: Database, run: Any) -> bool:
    found = [one for one in await engine.reactions(db, SITE) if one.run == run]
    asked = [one for one in (await db.waiting(SITE))[1] if one.kind == "scan"]
    return [reaction.state.value for reaction in found] == ["done"] and not asked


async def _shown(db: Database) -> None:
    """What ``caxev status``, ``reactions`` and ``alarms`` show."""
    rows = await site_rows(db, {SITE: True, "chicago": True})
    assert {row["site"] for row in rows} >= {SITE, "chicago"}
    alarm_rows(await db.alarms(), {})
    for reaction, document in await db.reactions():
        reaction_row(reaction, document)


BROKEN: list[tuple[str, dict[str, Any]]] = [
    ("reaction", {"due": 5}),
    ("reaction", {"generation": "x"}),
    ("reaction", {"state": "ajar"}),
    ("reaction", {"aspect": 5}),
    ("reaction", {"site": 5}),
    ("reaction", {"epoch": "old", "state": "running"}),
    ("snapshot", {"seen": 5}),
    ("snapshot", {"seen": b"five"}),
    ("alarm", {"deliveries": 5}),
    ("alarm", {"details": [["a"]]}),
    ("request", {"runs": 5}),
    ("request", {"kind": None}),
]


@pytest.mark.replicaset
async def test_malformed_documents_are_set_aside(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with an alarm; what they were about fires again. All go after a week."""
    monkeypatch.setattr("caxev.engine.malformed.TEND_EVERY", 0.05)
    fired: Counter[ObjectId] = Counter()

    async def count(job: Job) -> None:
        fired[job.run.id] += 1

    options = engine.options_for(database, [engine.handler(count, copy("transferred", host=HERE))])
    runs = [ObjectId() for _ in BROKEN]
    bad = [
        (kind, fields, {**document_of(kind, run), **fields})
        for run, (kind, fields) in zip(runs, BROKEN, strict=True)
    ]
    # A reaction's run was seen before.
    seen = [run for run, (kind, _) in zip(runs, BROKEN, strict=True) if kind == "reaction"]
    async with engine.opened(database) as db:
        with MongoClient[dict[str, Any]](database.uri, tz_aware=True) as client:
            server, ledger = client[database.name], client[database.name]["caxev_ledger"]

            async def insert(some: list[ObjectId]) -> None:
                for run in some:
                    whole = engine.run_document(1, ("raw", SITE, "transferred"))
                    await db.insert_run({**whole, "_id": run})

            def is_there(kind: str, fields: dict[str, Any], one: dict[str, Any]) -> bool:
                collection = server[COLLECTION.get(kind, "caxev_ledger")]
                return collection.find_one({"_id": one["_id"], **fields}) is not None

            await insert(seen)
            async with engine.listener(db, options):
                await engine.until(lambda: fired.keys() == {*seen})
            await insert([run for run in runs if run not in seen])
            for kind, _, one in bad:
                which = {"_id": one["_id"]}
                server[COLLECTION.get(kind, "caxev_ledger")].replace_one(which, one, upsert=True)
            # A snapshot is written anew before it is set aside.
            kept = [one for kind, _, one in bad if kind != "snapshot"]
            async with engine.listener(db, options):
                await engine.until(lambda: not any(is_there(*one) for one in bad))
                await engine.until(lambda: all(fired[run] == 1 + (run in seen) for run in runs))
                await engine.until(lambda: _alarmed(db, len(kept)))
            aside = [*ledger.find({"kind": "malformed"})]
            assert all(any(one["document"] == each for one in aside) for each in kept)
            old = [{"$set": {"at": {"$subtract": ["$at", 8 * 86_400_000]}}}]
            ledger.update_many({"kind": "malformed"}, old)
            async with engine.listener(db, options):
                await engine.until(lambda: ledger.find_one({"kind": "malformed"}) is None)
                await engine.until(lambda: _alarmed_not(db))


@pytest.mark.replicaset
async def test_what_a_malformed_document_was_about_is_asked_for_with_its_removal(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both or neither: a process that ends in between loses nothing."""

    async def away(*args: Any) -> Any:
        raise Unreachable("no answer")

    async with engine.opened(database) as db:
        found = await db.acquire(SITE, "one", 60.0, NOW)
        assert found is not None
        lease = found[0]
        odd = Odd("caxev_ledger", DEBT.id, SITE, RUN, "due is no date", reaction_from)
        with MongoClient[dict[str, Any]](database.uri) as client:
            ledger = client[database.name]["caxev_ledger"]
            ledger.insert_one({**document_of("reaction"), "due": 5})
            context = Context(db, lease, engine.options_for(database, []))
            quarantine = Quarantine(context, AlarmManager(db, lease, []), lambda: None)
            monkeypatch.setattr(Database, "add_request", away)
            with suppress(Unreachable):
                await quarantine._set_aside(odd)
            there = ledger.find_one({"_id": DEBT.id}) is not None
        (waits, _), raised = await db.waiting(SITE), quarantine.alarms.active
    assert (waits, len(raised)) == ((0, 0) if there else (1, 1))


async def _alarmed_not(db: Database) -> bool:
    return not await _alarmed(db)


async def _alarmed(db: Database, times: int = 1) -> bool:
    found = [one for one in await db.alarms(SITE) if one.active]
    return sum(one.alarm.key.startswith("malformed caxev_") for one in found) >= times


@pytest.mark.replicaset
@pytest.mark.parametrize("lost", ["epoch", "document"])
async def test_epochs_go_on_if_a_sites_document_is_lost(database: Named, lost: str) -> None:
    """Claims of an older process are opened, and marks are new."""
    async with engine.opened(database) as db:
        for _ in range(3):
            taken = await db.acquire(SITE, "me", 10.0, NOW)
            assert taken is not None
            await db.release(taken[0])
        claimed = {
            "_id": DEBT.id,
            **reaction_document(DEBT),
            "state": "running",
            "epoch": 3,
            "generation": 3 << 40,
        }
        with MongoClient[dict[str, Any]](database.uri, tz_aware=True) as client:
            ledger = client[database.name]["caxev_ledger"]
            ledger.insert_one(claimed)
            if lost == "epoch":
                ledger.update_one({"_id": SITE}, {"$set": {"epoch": "three"}})
            else:
                ledger.delete_one({"_id": SITE})
        taken = await db.acquire(SITE, "me", 10.0, NOW)
        assert taken is not None
        assert (taken[0].epoch, taken[1]) == (4, 1)


ABSURD = (math.inf, -math.inf, math.nan, 1e300, 2**63 - 1, -(2**63), Decimal128("1E+6000"), "x")


@pytest.mark.replicaset
async def test_an_absurd_number_ends_no_first_start(database: Named) -> None:
    """A site whose document is missing goes on from the other reactions' epochs."""
    good = {"_id": "good", **reaction_document(DEBT), "generation": 3 << 40}
    async with engine.opened(database) as db:
        with MongoClient[dict[str, Any]](database.uri) as client:
            for name, value in product(("generation", "epoch"), ABSURD):
                ledger = client[database.name]["caxev_ledger"]
                ledger.delete_many({})
                absurd = {"_id": "absurd", **reaction_document(DEBT), name: value}
                ledger.insert_many([good, absurd])
                taken = await db.acquire(SITE, "me", 10.0, NOW)
                assert taken is not None
                assert taken[0].epoch == 4, (name, value)


@pytest.mark.replicaset
async def test_an_absurd_row_of_history_uses_up_no_epochs(database: Named) -> None:
    """A site goes on from its other rows, as if a back-up of the ledger had been restored."""
    async with engine.opened(database) as db:
        with MongoClient[dict[str, Any]](database.uri) as client:
            for generation in ("f" * 16, "f" * 40, f"{(2**22 - 1) << 40:x}", "x"):
                client[database.name]["caxev_ledger"].delete_many({})
                history = client[database.name]["caxev_history"]
                history.delete_many({})
                rows = {f"{3 << 40:x}": NOW, generation: NOW + timedelta(days=9)}
                history.insert_many(
                    [
                        {"_id": f"{SITE}:{one}", "site": SITE, "handler": "x", "at": at}
                        for one, at in rows.items()
                    ]
                )
                taken = await db.acquire(SITE, "me", 10.0, NOW)
                assert taken is not None
                assert taken[0].epoch == 4, generation


@pytest.mark.replicaset
async def test_a_malformed_lease_locks_nobody_out(database: Named) -> None:
    far = datetime(9999, 1, 1, tzinfo=UTC)
    async with engine.opened(database) as db:
        with MongoClient[dict[str, Any]](database.uri, tz_aware=True) as client:
            ledger = client[database.name]["caxev_ledger"]
            for expires in (9999, "9999-12-31", far, Timestamp(2**31, 1), None):
                ledger.delete_many({})
                ledger.insert_one({**site_document(), "expires": expires})
                assert await db.acquire(SITE, "me", 10.0, NOW) is not None, expires


@pytest.mark.replicaset
async def test_a_manifest_that_was_tampered_with_is_not_there(database: Named) -> None:
    """It is made anew, and can be stored again."""
    async with engine.opened(database) as db:
        await db.store_manifest(FILES.digest, FILES.to_rows())
        assert await db.load_manifest(FILES.digest) == FILES.to_rows()
        other = Manifest([Item(b"a", "file", 3, b"c" * 32)])
        with MongoClient[dict[str, Any]](database.uri, tz_aware=True) as client:
            manifests = client[database.name]["caxev_manifests"]
            manifests.update_one({"m": FILES.digest}, {"$set": {"items": other.to_rows()}})
        assert await db.load_manifest(FILES.digest) is None
        taken = await db.acquire(SITE, "me", 10.0, NOW)
        assert taken is not None
        for odd in db.odd:
            await db.set_aside(taken[0], odd, NOW)
        await db.store_manifest(FILES.digest, FILES.to_rows())
        assert await db.load_manifest(FILES.digest) == FILES.to_rows()


def test_a_key_that_holds_an_object_is_passed_over() -> None:
    """Whoever may write to the ledger may insert one: the page goes on with the other changes."""
    stream = FeedStream(cast("Any", None), "runs", "ledger", "requests")
    keys = [{"alarm": {"a": 1}, "s": SITE}, {"alarm": "full", "s": SITE}]
    changes = [
        {"operationType": "insert", "documentKey": {"_id": key}, "ns": {"coll": "ledger"}}
        for key in keys
    ]
    assert stream.batch(changes, Position()).ledger == (("alarm", SITE, "full"),)


async def test_figures_of_what_people_wrote(database: Named) -> None:
    """A status that is missing, a date of no calendar: a scrape of the metrics ends no listener."""
    entry = {"type": "raw", "host": SITE}
    never = DatetimeMS(2**62)
    async with engine.opened(database) as db:
        run = engine.run_document(1)
        read = {"status": "transferred", "verified_at": never}
        odd = [entry, {**entry, **read}, {"status": "transferring", "job": {}}]
        due = {"site": SITE, "state": "failed", "lane": "default", "due": never}
        with MongoClient[dict[str, Any]](database.uri) as client:
            client[database.name]["runs_new"].insert_one({**run, "data": odd})
            client[database.name]["caxev_ledger"].insert_one({"_id": "odd", **due})
        assert [row["status"] for row in await db.totals(EVERY, NOW)] == [None, "transferred"]
        (job,) = await db.jobs()
        assert (job["host"], job["type"], job["number"]) == (None, None, 1)
        assert [one["oldest"] for one in await db.readings(NOW, 9)] == [NOW]
        assert [one.since for one in await db.owed(SITE, NOW)] == [None]


def test_a_request_names_runs_by_what_can_be_a_run_s_id() -> None:
    """Nobody could look an object up among those that are written."""
    whole = {"_id": "a", "kind": "copy", "runs": [1], "terms": {}, "by": "me", "at": NOW}
    assert bulk_from({**whole, "written": 0, "failed": [1]}).left == (1, 1)
    for name in ("runs", "failed"):
        with pytest.raises(Malformed, match=f"{name} has an item that is no run's id"):
            bulk_from({**whole, "written": 0, "failed": [], name: [{"x": 1}]})
