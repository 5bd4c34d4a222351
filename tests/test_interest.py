"""The server leaves out changes that concern no handler of a site, and nothing else."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio
from pymongo import MongoClient
from pymongo.collection import Collection

from caxev import ELSEWHERE, ERROR, GONE, HERE, PASSIVE, TRANSFERRED, VERIFYING, copy, copy_field
from caxev.config import Site, Sites
from caxev.core.diff import diff
from caxev.core.model import CHANGED, Run, RunId
from caxev.core.registry import Handler, Registry
from caxev.core.update import RunUpdate
from caxev.database import Database, Position
from tests import engine
from tests.conftest import Database as Named

pytestmark = pytest.mark.replicaset

STATUSES = ("transferring", "verifying", "transferred", "error", "deleting", "odd")
HOSTS = ("lngs", "chicago", "tape", "stash")
Runs = Collection[dict[str, Any]]


async def react(job: Any) -> None:
    """React."""


def registry() -> Registry:
    """As a site has it: with a host that it looks after, and one that is named."""
    here = Handler(react, (copy((VERIFYING, TRANSFERRED), host=(HERE, PASSIVE)),), "here")
    there = Handler(react, (copy((TRANSFERRED, GONE), host=ELSEWHERE),), "there")
    named = Handler(react, (copy(ERROR, host="stash"), copy_field("proof")), "named")
    sites = {name: Site(name=name) for name in ("lngs", "chicago", "stash")}
    sites["tape"] = Site(name="tape", listener=False)
    return Registry([here, there, named], Sites(Path("sites.json"), sites).here("lngs"))


def document(number: int) -> dict[str, Any]:
    return engine.run_document(number, *(("raw", host, "transferred") for host in HOSTS))


async def test_a_status_that_concerns_nobody_here(database: Named) -> None:
    """By what triggers there are, at the site itself, elsewhere, at passive and named hosts."""
    changes = [
        ("chicago", "verifying", False),
        ("chicago", "transferring", False),
        ("chicago", "error", False),
        ("chicago", "transferred", True),
        ("stash", "error", True),
        ("stash", "verifying", False),
        ("tape", "verifying", True),
        ("tape", "error", False),
        ("lngs", "odd", True),
    ]
    async with engine.opened(database) as db:
        runs = [await db.insert_run(document(1)) for _ in changes]
        interest = registry().interest
        stream = await db.open_stream(Position(start=await db.cluster_time()), interest)
        for run, (host, status, _) in zip(runs, changes, strict=True):
            before = (await db.runs([run]))[run]
            mine = next(one for one in before.copies if one.host == host)
            await engine.write(db, RunUpdate.change_copy(before, mine, status))
        last = await db.insert_run(document(2))
        found: list[RunId] = []
        while last not in found:
            found += (await engine.next_batch(db, stream, 1.0)).runs
        await db.close_stream(stream)
    come = [run for run, (_, _, comes) in zip(runs, changes, strict=True) if comes]
    assert found == [*come, last]


def _odd_changes() -> list[dict[str, Any]]:
    """What cax, an older caxev, a person or a fault may write."""
    mark = {"host": "chicago", "status": "verifying"}
    return [
        {"$set": {"data.1.status": "verifying"}},  # without a mark
        {"$set": {"data.1.checksum": "ab"}},
        {"$set": {"data.1.status": "verifying", CHANGED: 5}},
        {"$set": {"data.1.status": "verifying", CHANGED: {"host": 5, "status": 7}}},
        {"$set": {"data.1.status": "verifying", "data.1.proof": 1, CHANGED: mark}},
        {"$set": {"data.1.status": "verifying", CHANGED: mark}, "$unset": {"data.1.host": ""}},
        {"$set": {"data.1.status": "verifying", "tags": [{"name": "x"}], CHANGED: mark}},
        {"$set": {"data": [], CHANGED: mark}},
        {"$pull": {"data": {"host": "chicago"}}, "$set": {CHANGED: mark}},
        {"$push": {"data": {"type": "raw", "host": "x"}}, "$set": {CHANGED: mark}},
        {"$unset": {"data.1.status": ""}, "$set": {CHANGED: mark}},
    ]


async def test_any_other_change_comes(database: Named) -> None:
    """Only an update of a status alone, which says whose it is, is left out."""
    with MongoClient[dict[str, Any]](database.uri) as client:
        runs = client[database.name]["runs_new"]
        async with engine.opened(database) as db:
            changes = [(await db.insert_run(document(1)), change) for change in _odd_changes()]
            stream = await db.open_stream(
                Position(start=await db.cluster_time()), registry().interest
            )
            for run, change in changes:
                runs.update_one({"_id": run}, change)
                found = list((await engine.next_batch(db, stream, 30.0)).runs)
                assert found == [run], change
            await db.close_stream(stream)


async def test_what_is_left_out_makes_no_event_that_is_wanted(database: Named) -> None:
    """Random histories of a run: at every change that fires something, the stream shows the run."""
    random, site = Random(5), registry()
    with MongoClient[dict[str, Any]](database.uri, tz_aware=True) as client:
        runs = client[database.name]["runs_new"]
        async with engine.opened(database) as db:
            run = await db.insert_run(document(1))
            snapshot = Run.from_document(_read(runs, run)).snapshot(site.watched)
            stream = await db.open_stream(Position(start=await db.cluster_time()), site.interest)
            left_out = 0
            for _ in range(60):
                await _change(db, runs, run, random)
                now = Run.from_document(_read(runs, run)).snapshot(site.watched)
                events = diff(run, snapshot, now)
                wanted = [one for event in events for one in site.wanting(event)]
                runs.insert_one({"_id": "mark"})
                runs.delete_one({"_id": "mark"})
                seen: set[RunId] = set()
                while "mark" not in seen:
                    seen |= set((await engine.next_batch(db, stream, 1.0)).runs)
                assert run in seen or not wanted
                left_out += bool(events) and run not in seen
                # As the site would: it compares with what it saw last.
                snapshot = now if run in seen else snapshot
            await db.close_stream(stream)
    assert left_out > 4


def _read(runs: Runs, run: RunId) -> dict[str, Any]:
    return runs.find_one({"_id": run}) or {}


async def _change(db: Database, runs: Runs, run: RunId, random: Random) -> None:
    """One change, by caxev or by an old program."""
    host, status = random.choice(HOSTS), random.choice(STATUSES)
    now = (await db.runs([run]))[run]
    mine = next((one for one in now.copies if one.host == host), None)
    digest = random.choice(({}, {"manifest": "cd"}, {"checksum": None, "manifest": None}))
    match random.randrange(9):
        case 0:
            runs.update_one({"_id": run}, {"$pull": {"data": {"host": host}}})
        case 1:
            entry = {"type": "raw", "host": host, "status": status}
            runs.update_one({"_id": run, "data.host": {"$ne": host}}, {"$push": {"data": entry}})
        case 2:
            runs.update_one({"_id": run, "data.host": host}, {"$set": {"data.$.status": status}})
        case 3:
            data = list(now.document["data"])
            random.shuffle(data)
            runs.update_one({"_id": run}, {"$set": {"data": data}})
        case 4:  # cax adds the checksum of a copy that is good already
            checksum = random.choice(("ab", None))
            runs.update_one(
                {"_id": run, "data.host": host}, {"$set": {"data.$.checksum": checksum}}
            )
        case _ if mine is not None:
            await trio.sleep(0.002)  # so that the date of the status differs
            await engine.write(db, RunUpdate.change_copy(now, mine, status, **digest))
        case _:
            pass
