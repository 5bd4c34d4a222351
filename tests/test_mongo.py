"""The database edge, on a real replica set: what wins, what loses, and what writes nothing."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import bson
import pytest
import trio
import trio.testing
from attrs import evolve
from bson import ObjectId
from bson.datetime_ms import DatetimeMS
from bson.raw_bson import RawBSONDocument
from bson.timestamp import Timestamp
from pymongo import MongoClient
from pymongo.collection import Collection
from pymongo.errors import AutoReconnect
from pymongo.synchronous.database import Database as MongoDatabase

from caxev.asking.listeners import row_of
from caxev.config import Settings
from caxev.copies.remaining import EVER
from caxev.core.clock import utcnow
from caxev.core.entry import NOTED
from caxev.core.errors import NothingToDo
from caxev.core.history import What
from caxev.core.ledger import Done, Reaction, State, claim, settle
from caxev.core.model import (
    DELETING,
    YES,
    Aspect,
    CopyIs,
    CopyKey,
    Event,
    Existence,
    Field,
    Interest,
    Run,
    Tag,
    Watched,
    snapshot_of,
)
from caxev.core.selection import Selection
from caxev.core.update import (
    CopiesAtLeast,
    FieldIs,
    Fresh,
    NobodyReads,
    RunUpdate,
    TagThere,
)
from caxev.database import (
    BulkRequest,
    Database,
    DatabaseError,
    Gap,
    HistoryLost,
    HistorySearch,
    Ingest,
    Lease,
    LeaseLost,
    Position,
    Request,
    Scanning,
    Stream,
    manifests,
    open_database,
    reactions,
    run_queries,
)
from caxev.database.runs import GIVEN_UP_KEPT, snapshot_projection
from caxev.database.snapshots import MANY_REACTIONS
from caxev.database.stream import BATCH
from caxev.files import Manifest
from tests import engine
from tests.conftest import Database as Named

pytestmark = pytest.mark.replicaset

SITE = "lngs"
RAW = CopyKey("raw", "lngs")
AT = datetime(2020, 1, 1, tzinfo=UTC)
Runs = Collection[dict[str, Any]]
HOSTILE = ("$set", "$$NOW", "$where", "a.b", "a\0b", '{"$ne": null}', "Zürich 🦆", "lngs/../x")


@pytest.fixture
def server(database: Named) -> Iterator[MongoDatabase[dict[str, Any]]]:
    """The test's database as a plain client sees it."""
    with MongoClient[dict[str, Any]](database.uri, tz_aware=True) as client:
        yield client[database.name]


@pytest.fixture
def runs(server: MongoDatabase[dict[str, Any]]) -> Runs:
    """The runs collection as a plain client, an old program for one, sees it."""
    return server["runs_new"]


@asynccontextmanager
async def two(database: Named) -> AsyncIterator[tuple[Database, Database]]:
    """Two processes' views of one database."""
    async with (
        engine.opened(database) as one,
        open_database(engine.settings_for(database)) as other,
    ):
        yield one, other


def everything(server: MongoDatabase[dict[str, Any]]) -> dict[str, list[bytes]]:
    """All documents there are, as bytes."""
    return {
        name: sorted(bson.encode(document) for document in server[name].find())
        for name in server.list_collection_names()
    }


async def added(db: Database, *entries: dict[str, Any], **fields: Any) -> Run:
    document = {**engine.run_document(1), "data": list(entries), **fields}
    return await read(db, await db.insert_run(document))


async def read(db: Database, run: Any) -> Run:
    return (await db.runs([run]))[run]


def entry(status: str = "verifying", **fields: Any) -> dict[str, Any]:
    return {"type": "raw", "host": "lngs", "status": status, **fields}


async def racing(number: int, function: Callable[[int], Awaitable[Any]]) -> list[Any]:
    """Call a function so many times at once; returns what it returned."""
    results: list[Any] = []

    async def one(i: int) -> None:
        results.append(await function(i))

    async with trio.open_nursery() as nursery:
        for i in range(number):
            nursery.start_soon(one, i)
    return results


# -- as many as people like -------------------------------------------------------------------


async def test_requests_are_read_one_at_a_time(
    database: Named, server: MongoDatabase[dict[str, Any]]
) -> None:
    """However many wait: the oldest that can be read; lists have their number, not their runs."""
    ids = [ObjectId() for _ in range(3)]
    parts = [Request("replay", tuple(ids[:2]), bulk="all"), Request("replay", (), bulk="all")]
    async with engine.opened(database) as db:
        server.caxev_requests.insert_one({"site": SITE, "kind": 7})
        for request in (*parts, Request("replay")):
            await db.add_request(SITE, request, "me", utcnow())
        more = Request("replay", tuple(ids[1:]), bulk="all")
        await db.add_request("chicago", more, "me", utcnow())
        oldest = await db.next_request(SITE)
        assert oldest is not None
        assert oldest.runs == tuple(ids[:2])
        assert await db.next_request("depot") is None
        number, shown = await db.waiting(SITE, 3)
        assert (number, [one.number for one in shown]) == (4, [2, 0])
        number, shown = await db.waiting(SITE)
        assert (number, [one.number for one in shown]) == (4, [2, 0, None])
        waits, back = await db.parts_of("all")
        assert (waits.number, waits.runs, back.number) == (3, set(ids), 0)
        row = partial(row_of, what=What.CANCELLED, by="me")
        assert await db.take_back("all", utcnow(), row) == 3
        rows = await db.history(HistorySearch(what=["cancelled"]))
        assert sorted(row.site for row in rows) == ["chicago", SITE, SITE]
        waits, back = await db.parts_of("all")
        assert (waits.number, back.number, back.runs) == (0, 3, set(ids))


async def test_requests_about_many_runs_are_read_one_by_one(
    database: Named, server: MongoDatabase[dict[str, Any]]
) -> None:
    """The newest first, up to a number; one that cannot be read is not in the way of the next."""
    async with engine.opened(database) as db:
        for day, name in enumerate(("first", "odd", "last")):
            at = AT + timedelta(days=day)
            await db.add_bulk(
                BulkRequest(id=name, kind="replay", runs=(1, 2), terms={}, by="me", at=at)
            )
        server.caxev_requests.update_one({"_id": "odd"}, {"$set": {"runs": 7}})
        assert [(one.id, one.runs) async for one in db.bulks(3)] == [
            ("last", (1, 2)),
            ("first", (1, 2)),
        ]
        assert await db.bulk_names(2) == ["last", "odd"]


async def test_a_request_about_too_many_runs_is_refused(
    database: Named, server: MongoDatabase[dict[str, Any]]
) -> None:
    """Before anything is written. As many as it names are kept, though all should fail."""
    runs = tuple(f"{n:01000}" for n in range(20_000))
    whole = BulkRequest(id="all", kind="tag", runs=runs, terms={}, by="me", at=AT)
    async with engine.opened(database) as db:
        with pytest.raises(NothingToDo, match=r"20000 runs .* at most \d+ at") as refused:
            await db.add_bulk(whole)
        assert server.caxev_requests.count_documents({}) == 0
        most = int(re.findall(r"at most (\d+)", str(refused.value))[0])
        await db.add_bulk(evolve(whole, runs=runs[:most]))
        every = {"failed": "$runs", "written": {"$size": "$runs"}}
        server.caxev_requests.update_one({"_id": "all"}, [{"$set": every}])
        kept = await db.bulk("all")
        assert kept is not None
        assert kept.left == runs[:most]


async def test_what_is_held_or_waits_is_read_in_pages(
    database: Named, server: MongoDatabase[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither all runs that people hold, nor all that waits for a site, is in memory at once."""
    monkeypatch.setattr(run_queries, "PAGE", 2)
    monkeypatch.setattr(reactions, "_AT_A_TIME", 2)
    async with engine.opened(database) as db:
        lease = await taken(db)
        holds = [{"by": "me", "at": utcnow()}]
        runs = [await added(db, entry(holds=holds)) for _ in range(3)]
        await added(db, entry())
        pages = [page async for page in db.held()]
        assert [len(page) for page in pages] == [2, 1]
        assert {run.id for page in pages for run in page} == {run.id for run in runs}
        await db.ingest(lease, Ingest({}, [reaction_of(run, lease) for run in runs]), utcnow())
        waits = {"handler": {"$exists": True}}
        server.caxev_ledger.update_many(waits, {"$set": {"hindered": utcnow()}})
        found = [len(page) async for page in db.hindered(SITE)]
        assert found == [2, 1]


# -- updates of runs --------------------------------------------------------------------------


async def test_of_many_claims_one_wins(database: Named) -> None:
    """Twenty that add the same copy at once: one entry, one winner."""
    async with engine.opened(database) as db:
        run = await added(db)

        async def add(i: int) -> Run | None:
            update = RunUpdate.add_copy(run, RAW, "transferring", owner=f"site{i}")
            return await db.update_run(update, utcnow())

        won = [one for one in await racing(20, add) if one is not None]
        assert len(won) == 1
        assert (await read(db, run.id)).copies == won[0].copies
        assert len(won[0].copies) == 1
        assert await add(99) is None


async def test_of_many_that_take_a_copy_on_one_wins(database: Named) -> None:
    """Twenty that change one copy at once: one does, and the others learn that they lost."""
    async with engine.opened(database) as db:
        run = await added(db, entry())

        async def take(i: int) -> Run | None:
            update = RunUpdate.change_copy(run, run.copies[0], "verifying", owner=f"site{i}")
            return await db.update_run(update, utcnow())

        won = [one for one in await racing(20, take) if one is not None]
        assert len(won) == 1
        assert (await read(db, run.id)).copies[0].owner == won[0].copies[0].owner


async def test_a_stale_change_changes_nothing(database: Named, runs: Runs) -> None:
    """Where status or owner is no longer as seen, neither change nor removal happens."""
    async with engine.opened(database) as db:
        for name, value in (("status", "transferred"), ("owner", "chicago#2")):
            seen = await added(db, entry(owner="lngs#1"))
            which = {"_id": seen.id}
            runs.update_one(which, {"$set": {f"data.0.{name}": value}})
            before = runs.find_one(which)
            for update in (
                RunUpdate.change_copy(seen, seen.copies[0], "error", checksum="ab"),
                RunUpdate.remove_copy(seen, seen.copies[0]),
            ):
                assert await db.update_run(update, utcnow()) is None
            assert runs.find_one(which) == before


async def test_no_version_is_null_absent_or_no_text(database: Named) -> None:
    """A copy without a version is found however its entry says so; one with a version is not."""
    absent: dict[str, Any] = {}
    async with engine.opened(database) as db:
        for odd in (absent, {"pax_version": None}, {"pax_version": ""}, {"pax_version": 6.8}):
            run = await added(db, entry(**odd), entry(pax_version="v6.8.0"))
            assert [copy.version for copy in run.copies] == [None, "v6.8.0"]
            again = RunUpdate.add_copy(run, RAW, "transferring")
            assert await db.update_run(again, utcnow()) is None
            changed = await made(
                db, RunUpdate.change_copy(run, run.copies[0], "transferred"), utcnow()
            )
            assert [copy.status for copy in changed.copies] == ["transferred", "verifying"]
            left = await made(db, RunUpdate.remove_copy(changed, changed.copies[0]), utcnow())
            assert [copy.version for copy in left.copies] == ["v6.8.0"]
            assert await db.update_run(again, utcnow()) is not None


async def test_a_copy_without_status_can_be_changed(database: Named) -> None:
    """What is `unknown` to us is expected as it stands in the document."""
    absent: dict[str, Any] = {}
    async with engine.opened(database) as db:
        for odd in (absent, {"status": None}, {"status": ""}, {"status": 5}):
            run = await added(db, {"type": "raw", "host": "lngs", **odd})
            assert run.copies[0].status == "unknown"
            after = await made(db, RunUpdate.change_copy(run, run.copies[0], "error"), utcnow())
            assert after.copies[0].status == "error"


async def test_of_two_entries_of_one_key_one_is_changed(database: Named) -> None:
    """Old programs left both: what is found out about the files of one is not about the other's."""
    async with engine.opened(database) as db:
        run = await added(db, entry(location="/a"), entry(location="/b"), entry(location="/a"))
        changed = await db.update_run(RunUpdate.change_copy(run, run.copies[0], "error"), utcnow())
        assert changed is not None
        assert [copy.status for copy in changed.copies] == ["error", "verifying", "error"]
        left = await db.update_run(RunUpdate.remove_copy(changed, changed.copies[0]), utcnow())
        assert left is not None
        assert [copy.location for copy in left.copies] == ["/b"]


async def test_a_removal_takes_that_entry_alone(database: Named) -> None:
    """Of several copies, and things that are none, only the one goes."""
    async with engine.opened(database) as db:
        others = [entry(host="chicago"), "nonsense", entry(type="processed", pax_version="v1")]
        run = await added(db, others[0], entry(), *others[1:])  # type: ignore[arg-type]
        copy = run.copy(RAW)
        assert copy is not None
        update = RunUpdate.remove_copy(run, copy)
        after = await db.update_run(update, utcnow())
        assert after is not None
        assert after.document["data"] == others
        assert await db.update_run(update, utcnow()) is None


async def test_a_tag_is_added_once(database: Named) -> None:
    """The second of two that add a tag learns that it is there."""
    async with engine.opened(database) as db:
        run = await added(db)
        update = RunUpdate.add_tag(run, "bad", user="me")
        assert (
            sum(r is not None for r in await racing(5, lambda _: db.update_run(update, utcnow())))
            == 1
        )
        assert (await read(db, run.id)).tags == ("bad",)


async def test_many_reactions_are_recorded_before_the_look(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few at a time; cut off in the midst, the look is not there, and all is recorded again."""
    monkeypatch.setattr("caxev.database.snapshots.MOST_REACTIONS", 3)
    async with engine.opened(database) as db:
        lease = await taken(db)
        run = await added(db, entry())
        reactions = [evolve(reaction_of(run, lease, n), handler=f"handler{n}") for n in range(1, 9)]
        ingest = Ingest({run.id: {RAW: "error"}}, reactions)
        inner, calls = Database._ingest, []

        async def cut(self: Database, *given: Any) -> None:
            calls.append(given)
            if len(calls) == 3:
                raise OSError("cut")
            await inner(self, *given)

        monkeypatch.setattr(Database, "_ingest", cut)
        with pytest.raises(OSError, match="cut"):
            await db.ingest(lease, ingest, utcnow())
        assert len(await db.reactions(SITE)) == 6
        assert (await db.snapshot(SITE, [run.id])).before == {}
        await db.ingest(lease, ingest, utcnow())
        assert len(await db.reactions(SITE)) == 8
        assert (await db.snapshot(SITE, [run.id])).before == {run.id: {RAW: "error"}}


async def test_an_update_may_need_a_tag(database: Named) -> None:
    """It fits while the run has that tag, and not without."""
    async with engine.opened(database) as db:
        run = await added(db, entry())
        needs = RunUpdate(run.id, (TagThere("bad"),), fields={"x": 1})
        assert await db.update_run(needs, utcnow()) is None
        await made(db, RunUpdate.add_tag(run, "bad"), utcnow())
        assert await db.update_run(needs, utcnow()) is not None


async def test_fields_are_set_where_they_are_as_expected(database: Named) -> None:
    """`FieldIs` without a value stands for null or absent; unknown fields stay."""
    async with engine.opened(database) as db:
        run = await added(db, x_unknown={"kept": [1]})
        update = RunUpdate.set_fields(run, FieldIs("raw_size_byte"), raw_size_byte=7)
        after = await db.update_run(update, utcnow())
        assert after is not None
        assert after.document["raw_size_byte"] == 7
        assert after.document["x_unknown"] == {"kept": [1]}
        assert await db.update_run(update, utcnow()) is None
        on = RunUpdate.set_fields(run, FieldIs("raw_size_byte", 7), raw_size_byte=8)
        assert await db.update_run(on, utcnow()) is not None


async def test_a_status_brings_its_time(database: Named) -> None:
    """Whoever sets a status sets `status_since`; whoever does not, does not."""
    now = datetime(2020, 1, 1, tzinfo=UTC)
    async with engine.opened(database) as db:
        run = await added(db, entry("transferred"))
        again = await db.update_run(RunUpdate.change_copy(run, run.copies[0], "transferred"), now)
        assert again is not None
        assert again.copies[0].since == now
        assert again.snapshot() != run.snapshot()


async def test_an_expectation_of_another_copy_is_part_of_the_write(database: Named) -> None:
    """A claim that relies on a good source fails with it."""
    async with engine.opened(database) as db:
        run = await added(db, entry(host="chicago", status="error"))
        good = CopyIs(CopyKey("raw", "chicago"), {"status": "transferred"})
        claiming = RunUpdate.add_copy(run, RAW, "transferring", good)
        assert await db.update_run(claiming, utcnow()) is None
        assert (await read(db, run.id)).copy(RAW) is None


def odd_runs(number: int) -> Iterator[dict[str, Any]]:
    """Runs whose copies are good, bad or nothing that anybody understands."""
    random = Random(1)
    usual: dict[str, list[Any]] = {
        "type": ["raw"],
        "host": ["chicago", "tape", "$$copy"],
        "status": ["transferred"],
        "manifest": ["m", None],
        "checksum": ["c"],
        "pax_version": [None],
        "verified_at": [AT],
        "verified_noted": [AT],
        "check_answered": [None, ["x"], ["y", "x"]],
    }
    odd: dict[str, list[Any]] = {
        "type": ["processed"],
        "host": ["lngs", 5, None],
        "status": ["deleting", None, ["transferred"]],
        "manifest": ["other", "", 5, ["m"], {"m": 1}, "$m"],
        "checksum": ["other", None, "", 5],
        "pax_version": ["", 5, "v1"],
        "verified_at": [AT - timedelta(days=1), AT + timedelta(days=1), None, "today", [AT]],
        "verified_noted": [AT - timedelta(days=1), AT + timedelta(days=1), None, "today", [AT]],
        "check_answered": ["x", AT, [["x"]], ["$x"], {"x": 1}],
    }
    for _ in range(number):
        entries: list[Any] = [
            {
                name: random.choice(odd[name] if random.random() < 0.1 else usual[name])
                for name in odd
            }
            for _ in range(random.randrange(5))
        ]
        yield engine.run_document(1, data=random.choice([entries, [*entries, "x", ["y"], None]]))


COUNTED: tuple[dict[str, Fresh | None] | None, ...] = (
    None,
    {"chicago": None, "tape": None, "$$copy": None},
    {"chicago": Fresh("x"), "tape": None, "$$copy": Fresh("x", AT, AT)},
    {"chicago": Fresh("x", AT, AT), "tape": Fresh("$x", EVER, AT)},
)


async def test_so_many_good_copies_are_part_of_the_write(database: Named) -> None:
    """The database counts exactly the copies that `CopiesAtLeast` says it counts."""
    documents = [*odd_runs(60), {**engine.run_document(1), "data": {"host": "chicago"}}]
    async with engine.opened(database) as db:
        runs = [await read(db, await db.insert_run(document)) for document in documents]
        for manifest, hosts in product(("m", None, "$m"), COUNTED):
            wanted = CopiesAtLeast(2, RAW, manifest, "c", hosts)
            expected = [run.id for run in runs if wanted.holds(run)]
            assert 0 < len(expected) < len(runs)
            updates = [RunUpdate(run.id, (wanted,), fields={"x": 1}) for run in runs]
            found = [one.run for one in updates if await db.update_run(one, AT) is not None]
            assert found == expected, wanted


async def test_of_three_copies_two_remain(database: Named) -> None:
    """All three sites mean to delete at once: exactly one may."""
    good = [entry("transferred", checksum="c") | {"host": host} for host in "abc"]
    async with engine.opened(database) as db:
        for _ in range(8):
            run = await added(db, *good)

            async def delete(i: int, run: Run = run) -> Run | None:
                mine = run.copies[i]
                update = RunUpdate.change_copy(run, mine, DELETING, CopiesAtLeast.of(2, mine))
                return await db.update_run(update, utcnow())

            assert sum(one is not None for one in await racing(3, delete)) == 1


async def test_nobody_reads(database: Named) -> None:
    """A copy from which another is being made does not go; another's source is no matter."""
    async with engine.opened(database) as db:
        reading = entry("transferring", source="lngs") | {"host": "chicago"}
        run = await added(db, entry("transferred"), reading)
        update = RunUpdate.change_copy(run, run.copies[0], DELETING, NobodyReads(RAW))
        assert await db.update_run(update, utcnow()) is None
        for change in ({"source": "tape"}, {"status": "error"}, {"pax_version": "v1"}):
            run = await added(db, entry("transferred"), {**reading, **change})
            update = RunUpdate.change_copy(run, run.copies[0], DELETING, NobodyReads(RAW))
            assert await db.update_run(update, utcnow()) is not None


async def test_a_copy_that_something_is_made_of_is_read(database: Named) -> None:
    """A job at the same site that is not at its end; model and filter are of one mind."""
    async with engine.opened(database) as db:
        job = {"input": "raw", "input_version": None}
        making = entry("transferring", type="processed", pax_version="v1", job=job)
        for change, free in (
            ({}, False),
            ({"host": "chicago"}, True),
            ({"status": "verifying"}, True),
            ({"job": {**job, "input": "processed"}}, True),
            ({"job": {**job, "input_version": "v1"}}, True),
            ({"job": None}, True),
        ):
            run = await added(db, entry("transferred"), {**making, **change})
            assert NobodyReads(RAW).holds(run) == free, change
            update = RunUpdate.change_copy(run, run.copies[0], DELETING, NobodyReads(RAW))
            assert (await db.update_run(update, utcnow()) is not None) == free, change


async def test_an_old_program_may_read_any_copy(database: Named) -> None:
    """It names no source, and counts for as long as it may live; model and filter agree."""
    since = datetime(2017, 1, 2, tzinfo=UTC)
    made = {"creation_time": since + timedelta(hours=1)}
    async with engine.opened(database) as db:
        reading = entry("transferring", location="/chicago") | {"host": "chicago", **made}
        for change, free in (
            ({}, False),
            ({"creation_time": [made["creation_time"]]}, False),
            ({"creation_time": None}, False),
            ({"creation_time": since}, True),
            ({"creation_time": [since]}, True),
            ({"creation_time": None, "status_since": since}, True),
            ({"creation_time": "yesterday", "status_since": made["creation_time"]}, False),
            ({"creation_time": since + timedelta(days=36500), "status_since": since}, True),
            ({"source": "tape"}, True),
            ({"source": "lngs", "creation_time": since}, False),
            ({"job": {"input": "raw", "input_version": None}}, True),
            ({"status": "verifying"}, True),
            ({"type": "processed"}, True),
            ({"host": "lngs", "location": "/other"}, True),
        ):
            unread = NobodyReads(RAW, since)
            run = await added(db, entry("transferred"), {**reading, **change})
            assert unread.holds(run) == free, change
            update = RunUpdate.change_copy(run, run.copies[0], DELETING, unread)
            assert (await db.update_run(update, utcnow()) is not None) == free, change


async def test_a_copy_that_is_given_up_is_remembered(database: Named) -> None:
    """In the run, where nobody takes it out with the entry; the latest are kept."""
    trigger = "lngs: push: raw at lngs"
    async with engine.opened(database) as db:
        run = await added(db, entry("transferring", owner="lngs#1", trigger=trigger, location="/1"))
        before = utcnow()
        for _ in range(GIVEN_UP_KEPT + 2):
            update = RunUpdate.give_up(run, run.copies[0])
            found = await db.update_run(update, utcnow())
            assert found is not None
            run = found
        assert (run.copies[0].status, run.copies[0].owner) == ("error", None)
        gone = await db.update_run(RunUpdate.remove_copy(run, run.copies[0]), utcnow())
        assert gone is not None
        kept = list(gone.given_up(RAW))
        assert len(kept) == GIVEN_UP_KEPT
        assert all(one.at is not None and one.at >= before for one in kept)
        assert {(one.trigger, one.location) for one in kept} == {(trigger, "/1")}
        assert list(gone.given_up(CopyKey("raw", "chicago"))) == []


async def test_a_removal_can_leave_a_tombstone(database: Named) -> None:
    """The entry goes and is remembered in one write: which copy it was, and what else is said."""
    async with engine.opened(database) as db:
        run = await added(db, entry("deleting", location="/data/1", checksum="c"))
        copy = run.copies[0]
        update = RunUpdate.remove_copy(run, copy, tombstone={"by": "lngs#1", "why": "purge"})
        after = await db.update_run(update, AT)
        assert after is not None
        assert after.copies == ()
        assert after.document["deleted_data"] == [
            {
                "date": AT,
                "type": "raw",
                "host": "lngs",
                "pax_version": None,
                "location": "/data/1",
                "checksum": "c",
                "manifest": None,
                "by": "lngs#1",
                "why": "purge",
            }
        ]
        assert await db.update_run(update, AT) is None


async def test_values_are_data_and_never_operators(database: Named) -> None:
    """A host, version, status, tag or field value from anywhere is compared and stored as text."""
    async with engine.opened(database) as db:
        for text in HOSTILE:
            await store_text(db, text, utcnow())


async def store_text(db: Database, text: str, now: datetime) -> None:
    key = CopyKey(text, text, text)
    run = await added(db, entry(), tags=[{"name": "innocent"}])
    run = await made(db, RunUpdate.add_copy(run, key, text, location=text, owner=text), now)
    assert await db.update_run(RunUpdate.add_copy(run, key, "x"), now) is None
    copy = run.copy(key)
    assert copy is not None
    assert (copy.status, copy.location, copy.owner) == (text, text, text)
    run = await made(db, RunUpdate.change_copy(run, copy, text, error=text), now)
    run = await made(db, RunUpdate.add_tag(run, text, user=text), now)
    assert await db.update_run(RunUpdate.add_tag(run, text), now) is None
    run = await made(db, RunUpdate.overwrite(run, FieldIs("name", run.name), name=text), now)
    assert [one.id for one in await db.select(Selection(tags=(text,)), now)] == [run.id]
    assert await db.select(Selection(tags=("$gone",)), now) == []
    copy = run.copy(key)
    assert copy is not None
    run = await made(db, RunUpdate.remove_copy(run, copy), now)
    assert [one.key for one in run.copies] == [RAW]


async def made(db: Database, update: RunUpdate, now: datetime) -> Run:
    run = await db.update_run(update, now)
    assert run is not None
    return run


# -- the lease and the fence ------------------------------------------------------------------


async def taken(db: Database, owner: str = "one", lease_time: float = 0.0) -> Lease:
    """The site's lease; a lease of no length has lapsed at once, and nobody has noticed."""
    found = await db.acquire(SITE, owner, lease_time, utcnow())
    assert found is not None
    return found[0]


def reaction_of(run: Run, lease: Lease, number: int = 0, aspect: Aspect = RAW) -> Reaction:
    event = Event(run.id, aspect, None, "verifying")
    generation = (lease.epoch << 40) + number
    return Reaction(
        SITE, event, f"handler{number}", lane="default", generation=generation, at=utcnow()
    )


async def owed(
    db: Database, run: Run, lease: Lease, *, claimed: int = 0, free: int = 0
) -> list[Reaction]:
    """Reactions in the ledger, some of them claimed."""
    reactions = [reaction_of(run, lease, number) for number in range(claimed + free)]
    reactions = [claim(reaction, lease.epoch) for reaction in reactions[:claimed]] + reactions[
        claimed:
    ]
    await db.ingest(lease, Ingest({run.id: run.snapshot()}, reactions), utcnow())
    return reactions


async def test_one_holds_the_lease(database: Named) -> None:
    """While it is active nobody else gets it, nor its holder again; twenty at once: one."""
    async with two(database) as (db, other):
        leases = await racing(20, lambda i: other.acquire(SITE, f"p{i}", 60.0, utcnow()))
        assert len([one for one in leases if one is not None]) == 1
        assert await db.acquire(SITE, "late", 60.0, utcnow()) is None
        record = await db.site_record(SITE)
        assert record is not None
        assert (record.active, record.epoch) == (True, 1)
        assert await db.acquire("chicago", "late", 60.0, utcnow()) is not None


async def test_a_lapsed_lease_goes_to_the_next(database: Named) -> None:
    """The epoch grows by one, and what was claimed is open again, due now, as interrupted."""
    async with two(database) as (one, other):
        lease = await taken(one)
        run = await added(one, entry())
        reactions = await owed(one, run, lease, claimed=2, free=1)
        found = await other.acquire(SITE, "other", 60.0, utcnow())
        assert found == (Lease(SITE, 2, "other"), 2)
        standing = await other.standing([reaction.id for reaction in reactions])
        assert {reaction.state.value for reaction in standing.values()} == {"pending"}
        assert {reaction.epoch for reaction in standing.values()} == {None}
        assert sorted(reaction.interrupted for reaction in standing.values()) == [0, 1, 1]
        assert len(await other.due(SITE, "default", utcnow(), 10)) == 3


async def test_a_released_lease_is_free_at_once(database: Named) -> None:
    """Nobody waits for a lease that was given back; a deposed process cannot give it back."""
    async with two(database) as (one, other):
        first = await taken(one, lease_time=60.0)
        await one.release(first)
        await taken(other, lease_time=60.0)
        await one.release(first)
        record = await one.site_record(SITE)
        assert record is not None
        assert (record.active, record.epoch) == (True, 2)


async def test_a_renewal_keeps_the_lease(database: Named) -> None:
    """Renewed, a lapsed lease that nobody took is active again."""
    async with two(database) as (one, other):
        lease = await taken(one)
        record = await one.renew(lease, 60.0, "$trouble")
        assert record.active
        assert await other.acquire(SITE, "other", 60.0, utcnow()) is None
        again = await other.site_record(SITE)
        assert again is not None
        assert again.trouble == "$trouble"


async def test_a_deposed_process_raises_and_writes_nothing(
    database: Named, server: MongoDatabase[dict[str, Any]]
) -> None:
    """Whatever it tries, every document stays as it is to the byte, and it learns why."""
    async with two(database) as (one, other):
        old = await taken(one)
        run = await added(one, entry())
        running, free = await owed(one, run, old, claimed=1, free=1)
        await one.add_request(SITE, Request("scan"), "me", utcnow())
        request = await one.next_request(SITE)
        assert request is not None
        await taken(other, "other", 60.0)
        now = utcnow()
        changing = RunUpdate.change_copy(run, run.copies[0], "transferred")
        paid = settle(running, Done(), now, allowed=3, jitter=0)
        snapshot: dict[Aspect, str] = {RAW: "error"}
        new = claim(reaction_of(run, old, 7), old.epoch)
        start = Timestamp(5, 5)
        deeds: list[Callable[[], Awaitable[Any]]] = [
            lambda: one.ingest(old, Ingest({run.id: snapshot}, [new], Position(start=start)), now),
            lambda: one.ingest(old, Ingest({run.id: None}, []), now),
            lambda: one.ingest(old, Ingest({ObjectId(): snapshot for _ in range(2500)}, []), now),
            lambda: one.save_position(old, Position(start=start), now),
            lambda: one.begin_scan(old, start, Gap(now, "lost")),
            lambda: one.note_scanned(old, Scanning(5, 1)),
            lambda: one.finish_scan(old, now),
            lambda: one.renew(old, 60.0, None),
            lambda: one.finish_request(old, request),
            lambda: one.update(running, old, changing, now),
            lambda: one.settle_with([paid], old, [changing], now),
            lambda: one.claim([free], old),
            lambda: one.reopen_failed(old, Request("retry"), now),
        ]
        before = everything(server)
        for deed in deeds:
            with pytest.raises(LeaseLost, match="another process has taken over lngs"):
                await deed()
            assert everything(server) == before


async def test_a_late_settlement_changes_nothing(
    database: Named, server: MongoDatabase[dict[str, Any]]
) -> None:
    """Settling, freeing and showing progress after the take-over match no document."""
    async with two(database) as (one, other):
        old = await taken(one)
        run = await added(one, entry())
        reactions = await owed(one, run, old, claimed=3)
        heir = await taken(other, "other", 60.0)
        mine = await other.due(SITE, "default", utcnow(), 1)
        assert await other.claim(mine, heir) == mine
        before = everything(server)
        paid = [settle(reaction, Done(), utcnow(), allowed=3, jitter=0) for reaction in reactions]
        assert await one.settle(paid, old) == (0, 0)
        assert await one.free(await one.claims(old)) == (0, {})
        await one.progress(reactions[0], old, {"done": 1})
        await one.release(old)
        assert everything(server) == before


def die_in_transaction() -> None:
    """Take the site over for a second, and begin to record (for a process of its own)."""
    named = Named(*json.load(sys.stdin))

    async def begin() -> None:
        async with engine.opened(named) as db:
            lease = await taken(db, "doomed", lease_time=1.0)
            run = await added(db, entry())
            await owed(db, run, lease, claimed=1)

    trio.run(begin)


async def test_who_dies_in_a_transaction_blocks_nobody(database: Named) -> None:
    """Its locks go with its session, not after the minute that the server would wait."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", "from tests.test_mongo import *; die_in_transaction()"]
    environ = {**os.environ, "CAXEV_CRASH": "engine:database.ingest.commit:1"}
    done = await trio.run_process(
        command, stdin=json.dumps(database).encode(), cwd=root, env=environ, check=False
    )
    assert done.returncode == -signal.SIGKILL
    async with engine.opened(database) as db:
        found = await engine.until(lambda: db.acquire(SITE, "heir", 60.0, utcnow()), within=40.0)
        assert found == (Lease(SITE, 2, "heir"), 0)
        assert await db.reactions(SITE) == []
        (run,) = await db.select(Selection(), utcnow())
        await owed(db, run, found[0], claimed=1)


async def test_a_large_record_is_made_while_the_lease_is_renewed(database: Named) -> None:
    """However often the lease is renewed meanwhile, thousands of reactions get into the ledger."""
    async with engine.opened(database) as db:
        found = await db.acquire(SITE, "me", 60.0, utcnow())
        assert found is not None
        lease = found[0]
        aspects = [CopyKey("raw", f"site{number}") for number in range(2500)]
        reactions = [
            Reaction(
                SITE,
                Event("run", one, None, YES),
                "go",
                lane="default",
                generation=generation,
                at=utcnow(),
            )
            for generation, one in enumerate(aspects)
        ]

        async def renew() -> None:
            while True:
                with suppress(DatabaseError):
                    await db.renew(lease, 60.0, None)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(renew)
            with trio.fail_after(engine.PATIENCE):
                await db.ingest(lease, Ingest({"run": {Existence(): YES}}, reactions), utcnow())
            nursery.cancel_scope.cancel()
        assert sum((await db.tally(SITE))[SITE].values()) == len(reactions)


# -- reactions ------------------------------------------------------------------------------------


async def test_one_of_many_reactions_may_stand(database: Named) -> None:
    """Many are inserted together; one that stands and runs is renewed, and keeps its claim."""
    async with engine.opened(database) as db:
        lease = await taken(db)
        run = await added(db, entry())
        (running,) = await owed(db, run, lease, claimed=1)
        renewed = evolve(running, generation=running.generation + 100, state=State.PENDING)
        others = [reaction_of(run, lease, number) for number in range(1, MANY_REACTIONS)]
        ingest = Ingest({run.id: run.snapshot()}, [renewed, *others])
        await db.ingest(lease, ingest, utcnow())
        assert len(await db.standing([one.id for one in ingest.reactions])) == MANY_REACTIONS
        assert (await db.snapshot(SITE, [run.id])).before == {run.id: run.snapshot()}
        done = settle(running, Done(), utcnow(), allowed=3, jitter=0)
        assert await db.settle([done], lease) == (0, 1)


async def test_a_claim_counts_for_what_is_still_as_given(database: Named) -> None:
    """Of reactions that were renewed or claimed meanwhile, only the others are ours."""
    async with engine.opened(database) as db:
        lease = await taken(db)
        run = await added(db, entry())
        reactions = await owed(db, run, lease, free=4)
        await db.claim(reactions[:1], lease)
        renewed = evolve(reactions[1], generation=reactions[1].generation + 100)
        await db.ingest(lease, Ingest({}, [renewed]), utcnow())
        assert await db.claim([*reactions[1:], renewed], lease) == [
            reactions[2],
            reactions[3],
            renewed,
        ]


async def test_a_reaction_renewed_while_it_ran_stays_open(database: Named) -> None:
    """Its settlement only frees it, and so does an update with it; the update counts."""
    async with engine.opened(database) as db:
        lease = await taken(db)
        run = await added(db, entry())
        plain, updating = await owed(db, run, lease, claimed=2)
        fresh = [
            evolve(
                reaction,
                generation=reaction.generation + 100,
                state=type(reaction.state).PENDING,
                epoch=None,
            )
            for reaction in (plain, updating)
        ]
        await db.ingest(lease, Ingest({}, fresh), utcnow())
        assert await db.due(SITE, "default", utcnow(), 10) == []
        now = utcnow()
        paid = [
            settle(reaction, Done(), now, allowed=3, jitter=0) for reaction in (plain, updating)
        ]
        assert await db.settle(paid[:1], lease) == (0, 1)
        update = RunUpdate.change_copy(run, run.copies[0], "transferred")
        assert await db.settle_with(paid[1:], lease, [update], now) == 1
        due = await db.due(SITE, "default", utcnow(), 10)
        assert sorted(reaction.generation for reaction in due) == [
            reaction.generation for reaction in fresh
        ]
        assert (await read(db, run.id)).copies[0].status == "transferred"


async def test_an_update_and_its_settlement_are_one(
    database: Named, server: MongoDatabase[dict[str, Any]]
) -> None:
    """An update that no longer fits leaves the reaction as it is."""
    async with engine.opened(database) as db:
        lease = await taken(db)
        run = await added(db, entry())
        (reaction,) = await owed(db, run, lease, claimed=1)
        changing = RunUpdate.change_copy(run, run.copies[0], "transferred")
        assert await db.update_run(changing, utcnow()) is not None
        before = everything(server)
        paid = settle(reaction, Done(), utcnow(), allowed=3, jitter=0)
        assert await db.settle_with([paid], lease, [changing], utcnow()) is None
        assert everything(server) == before


async def test_what_was_settled_without_a_reply_is_known_to_be_settled(database: Named) -> None:
    """Its update does not fit the run any more, for that reason."""
    async with engine.opened(database) as db:
        lease = await taken(db)
        run = await added(db, entry())
        (reaction,) = await owed(db, run, lease, claimed=1)
        changing = RunUpdate.change_copy(run, run.copies[0], "transferred")
        paid = settle(reaction, Done(), utcnow(), allowed=3, jitter=0)
        assert await db.settle_with([paid], lease, [changing], utcnow()) == 0
        assert await db.settle_with([paid], lease, [changing], utcnow()) == 1


async def test_updates_and_their_settlements_are_one(
    database: Named, server: MongoDatabase[dict[str, Any]]
) -> None:
    """All of several are written, or none: where one does not fit, for instance."""
    async with engine.opened(database) as db:
        lease = await taken(db)
        runs = [await added(db, entry()) for _ in range(3)]
        reactions = [(await owed(db, run, lease, claimed=1))[0] for run in runs]
        paid = [settle(reaction, Done(), utcnow(), allowed=3, jitter=0) for reaction in reactions]
        good = [RunUpdate.change_copy(run, run.copies[0], "transferred") for run in runs]

        async def together(updates: list[RunUpdate], by: Lease = lease) -> int | None:
            return await db.settle_with(paid, by, updates, utcnow())

        stale = evolve(runs[2].copies[0], status="error")
        unfit = RunUpdate.change_copy(runs[2], stale, "transferred")
        before = everything(server)
        assert await together([*good[:2], unfit]) is None
        with pytest.raises(LeaseLost):
            await together(good, evolve(lease, epoch=lease.epoch + 1))
        with server.client.start_session() as session, session.start_transaction():
            which = {"_id": runs[1].id}
            server["runs_new"].update_one(which, {"$set": {"number": 7}}, session=session)
            assert await together(good) is None
            session.abort_transaction()
        assert everything(server) == before
        fresh = evolve(
            reactions[0], generation=reactions[0].generation + 100, state=State.PENDING, epoch=None
        )
        await db.ingest(lease, Ingest({}, [fresh]), utcnow())
        assert await together(good) == 1
        assert [(await read(db, run.id)).copies[0].status for run in runs] == ["transferred"] * 3
        assert (await db.tally(SITE))[SITE] == {"pending": 1}


async def test_reactions_with_odd_names(database: Named) -> None:
    """Slots, looks and filters take any text, and find a run's reactions and no other's."""
    async with engine.opened(database) as db:
        lease = await taken(db)
        for text in HOSTILE:
            one, other = await added(db), await added(db, _id=text)
            aspects: list[Aspect] = [CopyKey(text, text, text), CopyKey(text, text), Tag(text)]
            reactions = [
                reaction_of(run, lease, 0, aspect) for run in (one, other) for aspect in aspects
            ]
            snapshots: Any = dict.fromkeys((one.id, other.id), dict.fromkeys(aspects, text))
            await db.ingest(lease, Ingest(snapshots, reactions), utcnow())
            assert (await db.snapshot(SITE, [one.id, other.id])).before == snapshots
            found = [reaction for reaction, _ in await db.reactions(SITE, run=other.id)]
            assert sorted(reaction.id for reaction in found) == sorted(
                reaction.id for reaction in reactions[3:]
            )
            assert {reaction.aspect for reaction in found} == set(aspects)
            assert len(await db.claim(reactions, lease)) == 6


# -- the stream -------------------------------------------------------------------------------


async def follow(db: Database, stream: Stream, last: Any) -> tuple[list[Any], Position]:
    """The runs that the stream speaks of, up to the run `last`; where it goes on."""
    seen: list[Any] = []
    with trio.fail_after(engine.PATIENCE):
        while last not in seen:
            batch = await engine.next_batch(db, stream, 1.0)
            seen += batch.runs
    return seen, batch.position


async def test_only_what_matters_comes_through(database: Named, runs: Runs) -> None:
    """Changes of `data`, of `tags` and of existence; nothing else, whatever its name."""
    quiet: list[dict[str, Any]] = [
        {"$set": {"comments": ["x"], "datatype": 1, "tagsize": 2, "trigger.data": 3}},
        {"$unset": {"detector": ""}},
        {"$set": {"x.tags": [], "Data": []}},
    ]
    loud: list[dict[str, Any]] = [
        {"$set": {"data.0.status": "error"}},
        {"$push": {"data": entry()}},
        {"$push": {"data": {"$each": [], "$slice": 1}}},
        {"$set": {"tags": [{"name": "x"}]}},
        {"$unset": {"data": ""}},
        {"$unset": {"tags": ""}},
    ]
    async with engine.opened(database) as db:
        ids = [(await added(db, entry(), entry(), number=number)).id for number in range(12)]
        stream = await db.open_stream(Position(start=await db.cluster_time()))
        for run, change in zip(ids, quiet, strict=False):
            runs.update_one({"_id": run}, change)
        for run, change in zip(ids[3:], loud, strict=False):
            runs.update_one({"_id": run}, change)
        runs.replace_one({"_id": ids[9]}, {"number": 9})
        runs.delete_one({"_id": ids[10]})
        new = (await added(db)).id
        seen, _ = await follow(db, stream, new)
        assert seen == [*ids[3:11], new]
        await db.close_stream(stream)


async def test_watched_fields_come_through(database: Named, runs: Runs) -> None:
    """What is within them, and what they lie in; a name that only begins so is another."""
    changes: list[dict[str, Any]] = [
        {"$set": {"endings": 1}},
        {"$set": {"end": 1}},
        {"$set": {"trigger.events_built": 2}},
        {"$unset": {"trigger": ""}},
    ]
    watched = Watched(frozenset({"end", "trigger.events_built"}), frozenset({"size"}))
    async with engine.opened(database) as db:
        ids = [(await added(db, trigger={}, number=number)).id for number in range(4)]
        stream = await db.open_stream(Position(start=await db.cluster_time()), Interest(watched))
        for run, change in zip(ids, changes, strict=True):
            runs.update_one({"_id": run}, change)
        seen, _ = await follow(db, stream, ids[-1])
        assert seen == ids[1:]
        await db.close_stream(stream)


async def test_a_look_takes_in_what_is_watched(database: Named) -> None:
    """Whether few runs are read whole or many by projection, also a path beside one it lies in."""
    watched = Watched(frozenset({"x", "x.y", "data", "tags"}), frozenset({"size", "status"}))
    async with engine.opened(database) as db:
        runs = [await added(db, entry(size=1), x={"y": 5}, number=n) for n in range(40)]
        for some in (runs[:1], runs):
            looked = await db.snapshot("lngs", [run.id for run in some], watched=watched)
            assert looked.now == {run.id: run.snapshot(watched) for run in some}
            assert Field("x.y") in looked.now[runs[0].id]


async def test_a_scan_reads_all_that_snapshots_are_made_of(database: Named, runs: Runs) -> None:
    """Else each run would differ from what was seen, and be read whole."""
    watched = Watched(frozenset({"x.y"}), frozenset({"checksumproblem"}))
    seen = {"checksumproblem": True, NOTED: utcnow(), "status_since": utcnow()}
    good = {"type": "raw", "host": "lngs", "status": "transferred", "location": "/x", **seen}
    documents = [
        {"data": [{**good, **digest}], "tags": [{"name": "x", "date": utcnow()}], "x": {"y": 1}}
        for digest in ({"manifest": "b3:1"}, {"checksum": "ab" * 64}, {})
    ]
    runs.insert_many(documents)
    for document in runs.find():
        (short,) = runs.find({"_id": document["_id"]}, snapshot_projection(watched))
        assert snapshot_of(short, watched) == snapshot_of(document, watched)
        assert "location" not in short["data"][0]


async def test_a_batch_holds_each_run_once(database: Named, runs: Runs) -> None:
    """However often it changed; in the order, and with the time, of its first change."""
    async with engine.opened(database) as db:
        one, other = await added(db, entry()), await added(db, entry())
        start = await db.cluster_time()
        for status in "abc":
            for run in (one, other):
                runs.update_one({"_id": run.id}, {"$set": {"data.0.status": status}})
        stream = await db.open_stream(Position(start=start))
        batch = await engine.until(lambda: _full(db, stream, 6))
        assert list(batch.runs) == [one.id, other.id]
        first, second = batch.runs.values()
        assert first <= second
        assert abs(first - datetime.now(UTC)) < timedelta(minutes=1)
        await db.close_stream(stream)


async def test_what_is_asked_for_ahead_may_fail_at_the_end(
    database: Named, server: MongoDatabase[dict[str, Any]]
) -> None:
    """While a batch is worked on the next one is asked for. An error of that ends no process."""

    async def read_one(db: Database) -> None:
        stream = await db.open_stream(Position(start=await db.cluster_time()))
        more = stream._more

        async def cut_off(wait: float) -> Any:
            try:
                return await more(wait)
            except asyncio.CancelledError:
                raise AutoReconnect("connection closed") from None

        server.runs_new.insert_many([{"data": []} for _ in range(BATCH)])
        stream._more = cut_off  # type: ignore[method-assign]
        assert (await engine.until(partial(_full, db, stream, BATCH))).changes == BATCH
        await db.close_stream(stream)

    async with engine.opened(database) as db:
        await read_one(db)
        gc.collect()
        await trio.testing.wait_all_tasks_blocked()


async def _full(db: Database, stream: Stream, changes: int) -> Any:
    batch = await engine.next_batch(db, stream, 1.0)
    assert batch.changes in (0, changes)
    return batch if batch.changes else None


async def test_a_position_goes_on_where_it_was(database: Named) -> None:
    """After a token nothing comes twice and nothing is left out, also after an idle time."""
    async with engine.opened(database) as db:
        stream = await db.open_stream(Position(start=await db.cluster_time()))
        first = (await added(db)).id
        seen, position = await follow(db, stream, first)
        idle = await engine.next_batch(db, stream, 0.1)
        assert (idle.changes, seen) == (0, [first])
        await db.close_stream(stream)
        second = (await added(db)).id
        for where in (position, idle.position):
            stream = await db.open_stream(where)
            assert (await follow(db, stream, second))[0] == [second]
            await db.close_stream(stream)


async def test_a_start_is_after_what_is_known(database: Named) -> None:
    """What was written before `cluster_time` is not met again; what comes after is."""
    async with engine.opened(database) as db:
        for _ in range(5):
            await added(db)
            position = Position(start=await db.cluster_time())
            after = (await added(db)).id
            stream = await db.open_stream(position)
            assert (await follow(db, stream, after))[0] == [after]
            await db.close_stream(stream)


async def first_batch(db: Database, position: Position) -> None:
    await engine.next_batch(db, await db.open_stream(position), 0.1)


async def test_an_impossible_position_is_history_lost(database: Named) -> None:
    """A token that the oplog no longer knows, or that is none, ends in `HistoryLost`."""
    async with engine.opened(database) as db:
        stream = await db.open_stream(Position(start=await db.cluster_time()))
        _, position = await follow(db, stream, (await added(db)).id)
        await db.close_stream(stream)
        assert position.token is not None
        data = position.token["_data"]
        for bad in (
            {"_data": data[:2] + "00000001" + data[10:]},  # long ago
            {"_data": "82" + "ff" * 20},
            {"_data": data[:2]},
            {"_data": "zz"},
            {"x": 1},
        ):
            with pytest.raises(HistoryLost):
                await first_batch(db, Position(bad))


async def test_the_end_of_a_collection_is_history_lost(
    database: Named, server: MongoDatabase[dict[str, Any]]
) -> None:
    """Dropped, renamed, replaced by another, or gone with its database."""

    def overwrite() -> None:
        server["other"].insert_one({})
        server["other"].rename("runs_new", dropTarget=True)

    ends: list[Callable[[], Any]] = [
        server["runs_new"].drop,
        partial(server["runs_new"].rename, "elsewhere"),
        overwrite,
        partial(server.client.drop_database, server.name),
    ]
    async with engine.opened(database) as db:
        for end in ends:
            await added(db)
            stream = await db.open_stream(Position(start=await db.cluster_time()))
            end()
            with pytest.raises(HistoryLost):
                await follow(db, stream, None)
            again = await db.open_stream(Position(start=await db.cluster_time()))
            after = (await added(db)).id
            assert (await follow(db, again, after))[0] == [after]
            await db.close_stream(again)


# -- odd documents ----------------------------------------------------------------------------


async def test_what_cannot_be_decoded_stops_nothing(database: Named, runs: Runs) -> None:
    """A date beyond the calendar and text that is no UTF-8 are read as well as can be."""
    async with engine.opened(database) as db:
        stream = await db.open_stream(Position(start=await db.cluster_time()))
        far = DatetimeMS(2**62)
        beyond = {**engine.run_document(1), "start": far, "data": [entry(status_since=far)]}
        broken = {**engine.run_document(2), "data": [entry("XXXX")], "tags": [{"name": "XXXX"}]}
        raw = RawBSONDocument(bson.encode(broken).replace(b"XXXX", b"\xff\xfe\xff\xfe"))
        runs.insert_many([beyond, raw])
        last = (await added(db)).id
        ids = [beyond["_id"], broken["_id"], last]
        assert (await follow(db, stream, last))[0] == ids
        looked = await db.snapshot(SITE, ids)
        assert looked.now[beyond["_id"]][RAW] == "verifying"
        assert len(looked.now[broken["_id"]]) == 3
        assert set(await db.runs(ids)) == set(ids)
        assert (await db.runs(ids))[beyond["_id"]].start is None
        lease = await taken(db)
        await db.ingest(lease, Ingest(looked.now), utcnow())
        assert (await db.snapshot(SITE, ids)).before == looked.now


async def test_a_document_as_id_is_passed_over(database: Named, runs: Runs) -> None:
    """Nobody can know such a run; those before and after it come through."""
    async with engine.opened(database) as db:
        stream = await db.open_stream(Position(start=await db.cluster_time()))
        first = (await added(db)).id
        runs.insert_one({"_id": {"a": 1}, "data": [entry()]})
        last = (await added(db)).id
        assert (await follow(db, stream, last))[0] == [first, last]
        assert (await db.page(SITE, None))[0] == [last, first]


# -- looks and pages --------------------------------------------------------------------------


async def paged(db: Database, site: str = SITE) -> list[Any]:
    found, (ids, before) = [], await db.page(site, None)
    found += ids
    while before is not None:
        ids, before = await db.page(site, before)
        found += ids
    return found


async def test_pages_hold_every_run_stored_or_seen(
    database: Named, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the page's size and the ids' types, deleted runs included, other sites' not."""
    async with engine.opened(database) as db:
        lease = await taken(db)
        for size in (1, 2, 7, 8, 100):
            monkeypatch.setattr("caxev.database.snapshots.PAGE", size)
            odd: list[Any] = [5, "name", 7.5, utcnow()]
            ids = [(await added(db)).id for _ in range(4)]
            ids += [(await added(db, _id=one)).id for one in odd]
            snapshots: Any = {run: {RAW: "transferred"} for run in ids}
            await db.ingest(lease, Ingest(snapshots), utcnow())
            gone = [ids[0], ids[3], "name"]
            runs.delete_many({"_id": {"$in": gone}})
            assert set(await paged(db)) == set(ids)
            assert set(await paged(db, "chicago")) == set(ids) - set(gone)
            looked = await db.snapshot(SITE, ids)
            assert set(looked.now) == set(ids) - set(gone)
            assert looked.before == snapshots
            await db.ingest(lease, Ingest(dict.fromkeys(gone)), utcnow())
            assert set(await paged(db)) == set(ids) - set(gone)
            runs.delete_many({})
            assert len((await db.page(SITE, None))[0]) <= 2 * size
            assert set(await paged(db)) == set(ids) - set(gone)
            assert set((await db.snapshot(SITE, ids)).before) == set(ids) - set(gone)
            await db.ingest(lease, Ingest(dict.fromkeys(ids)), utcnow())


# -- manifests --------------------------------------------------------------------------------


def rows_of(number: int, length: int = 20) -> list[dict[str, Any]]:
    return [
        {"path": b"%0*d" % (length, i), "kind": "file", "size": i, "blake3": bytes(32)}
        for i in range(number)
    ]


async def test_a_manifest_comes_back(database: Named) -> None:
    """However many files, and however long their names; stored twice it is the same."""
    async with engine.opened(database) as db:
        for number, length in ((0, 1), (1, 1), (30_000, 20), (3000, 4096)):
            rows = rows_of(number, length)
            digest = Manifest.from_rows(rows).digest
            assert await db.load_manifest(digest) is None
            await db.store_manifest(digest, rows)
            assert await db.load_manifest(digest) == rows
        await db.store_manifest(digest, rows)
        assert await db.load_manifest(digest) == rows
        assert await db.load_manifest("b3:01") is None


async def test_a_manifest_of_large_files_comes_back(database: Named) -> None:
    """The digests of parts take far more room than the names: no document outgrows its limit."""
    rows = [{**row, "parts": bytes(16_384)} for row in rows_of(600)]
    digest = Manifest.from_rows(rows).digest
    async with engine.opened(database) as db:
        await db.store_manifest(digest, rows)
        assert await db.load_manifest(digest) == rows


async def test_several_manifests_are_read_at_once(
    database: Named, server: MongoDatabase[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one by one; those that would make them too large are left out."""
    sets = [rows_of(number) for number in (1, 2, 3, 3000)]
    digests = [Manifest.from_rows(rows).digest for rows in sets]
    async with engine.opened(database) as db:
        for digest, rows in zip(digests, sets, strict=True):
            await db.store_manifest(digest, rows)
        server["caxev_manifests"].update_one({"m": digests[0]}, {"$set": {"items.0.size": 9}})
        wanted = [*digests, "b3:01", digests[1]]
        found = await db.load_manifests(wanted)
        assert found == {one: await db.load_manifest(one) for one in wanted}
        assert [found[one] is None for one in digests] == [True, False, False, False]
        monkeypatch.setattr(manifests, "TOGETHER", 100_000)
        few = await db.load_manifests(digests)
        assert few == {one: found[one] for one in digests if one < digests[3]}


async def test_half_a_manifest_is_none(
    database: Named, server: MongoDatabase[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its last part is missing it is not there; storing it again completes it."""
    monkeypatch.setattr(manifests, "_PART", 20_000)
    rows = rows_of(200)
    digest = Manifest.from_rows(rows).digest
    async with engine.opened(database) as db:
        await db.store_manifest(digest, rows)
        server["caxev_manifests"].delete_one({"_id.last": True})
        assert await db.load_manifest(digest) is None
        await db.store_manifest(digest, rows)
        assert await db.load_manifest(digest) == rows


# -- the settings -----------------------------------------------------------------------------


async def test_names_of_collections_are_configurable(
    database: Named, server: MongoDatabase[dict[str, Any]]
) -> None:
    """The runs' collection and the prefix of ours are the settings'."""
    settings = Settings(database.uri, database.name, collection="runs_test", prefix="x_")
    async with engine.opened(database), open_database(settings) as db:
        await db.create_indexes()
        await taken(db)
        await added(db)
        await db.store_manifest("b3:00", [])
    names = set(server.list_collection_names())
    assert {"runs_test", "x_ledger", "x_manifests"} <= names
    assert "runs_new" not in names


# -- following a run --------------------------------------------------------------------------


async def test_what_is_followed_is_told_and_nothing_else(database: Named) -> None:
    """Changes of a run and of its reactions at these sites; not of another run or a site."""
    async with engine.opened(database) as db:
        lease = await taken(db, lease_time=60.0)
        run, other = await added(db, entry()), await added(db, entry())
        (reaction,) = await owed(db, run, lease, claimed=1)
        told: list[int] = []

        async def listen(changed: Callable[[], Awaitable[None]]) -> None:
            while True:
                await changed()
                told.append(1)

        async with db.follow(run.id, [SITE]) as changed, trio.open_nursery() as nursery:
            nursery.start_soon(listen, changed)
            # In the stream these come first: were they told, there would be more in the end.
            await made(db, RunUpdate.add_tag(other, "x"), utcnow())
            await owed(db, other, lease, free=1)
            await db.renew(lease, 60.0, None)
            await made(db, RunUpdate.add_tag(run, "x"), utcnow())
            await engine.until(lambda: told)
            await db.progress(reaction, lease, {"done": 1})
            await engine.until(lambda: len(told) > 1)
            await db.settle([_paid(reaction)], lease)
            await engine.until(lambda: len(told) > 2)
            nursery.cancel_scope.cancel()
        assert len(told) == 3


def _paid(reaction: Reaction) -> Reaction:
    return settle(reaction, Done(), utcnow(), allowed=3, jitter=0)
