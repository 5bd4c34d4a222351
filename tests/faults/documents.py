"""Hostile and broken documents, among good ones that must not wait for them.

Anything may stand in the collection: what cax wrote, what people wrote by hand, what an attacker
wrote. Each round adds all of the broken runs below, changes them in odd ways, and copies a good
run and adds others at a steady rate meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from random import Random
from typing import Any, Final

import trio
from bson import ObjectId
from bson.code import Code
from bson.datetime_ms import DatetimeMS
from bson.errors import BSONError
from hypothesis import HealthCheck, Phase, given, seed, settings
from pymongo import MongoClient
from pymongo.client_session import ClientSession
from pymongo.collection import Collection
from pymongo.errors import PyMongoError

from caxev.demo.world import World
from tests.faults import fuzz
from tests.faults.campaign import BIRTH, Born, Ground, Tally, say_round
from tests.faults.load import RATE, SHORT_RATE, Load

Document = dict[str, Any]

SIZE: Final = 300_000
LATE: Final = 10.0
"""Seconds within which a good run is reacted to, whatever the others are."""
MEGABYTE: Final = 1 << 20
HOSTS: Final = ("lngs", "chicago", "stockholm")
STATUSES: Final = ("transferred", "verifying", "error", "requested", "transferring", "deleting")
LASTS: Final = 30.0
"""Seconds for which good runs come beside the broken ones."""
FUZZED: Final = 100
"""Arbitrary runs in a round."""


def entry(location: Any = "/data/raw/161111_1434", **fields: Any) -> Document:
    good = {"type": "raw", "host": BIRTH, "status": "transferred", "checksum": "ab" * 64}
    return {**good, "location": location, **fields}


def entries(outside: str, random: Random, *, long: bool) -> Iterator[tuple[str, list[Any]]]:
    """Return what `data` may hold, by name. `outside` is a path that no site owns.

    Not `long`: what is large is a fortieth of that.
    """
    share = 1 if long else 40
    yield "no entries", [None, 5, "text", [], [[entry()]], True, ObjectId()]
    yield "no status", [{"type": "raw", "host": BIRTH, "location": "/data"}]
    yield "unknown status", [entry(status="perhaps")]
    yield "a status that is none", [entry(status=["transferred"]), entry(status={"$ne": None})]
    yield "an unknown host", [entry(host="atlantis"), entry(host="")]
    yield "a host that is none", [entry(host=["lngs"]), entry(host={"name": "lngs"})]
    yield "duplicates", [entry(), entry(), entry(status="error"), entry(host="chicago")]
    yield "times", [entry(creation_time=[datetime(2016, 11, 11, tzinfo=UTC)], status_since="soon")]
    yield (
        "a time beyond",
        [entry(status_since=DatetimeMS(2**62), creation_time=DatetimeMS(-(2**62)))],
    )
    yield "code", [entry(host=Code("lngs")), {"type": Code("raw"), "host": "lngs"}]
    yield "operators", [entry(host="$set", status="$$NOW"), {"$where": "1", "type": "raw"}]
    yield "10 MB", [entry("/" + "x" * (10 * MEGABYTE // share))]
    yield "10 MB of a host", [entry(host="x" * (10 * MEGABYTE // share))]
    yield "10,000 entries", [entry(host=f"site{n}") for n in range(10_000 // share)]
    yield "just below 16 MB", [entry(), "x" * (16 * MEGABYTE // share - 1000)]
    places: list[Any] = [
        "n/a",
        "NA",
        "",
        "data/raw",
        "../../etc",
        "/data/../etc",
        "/etc/passwd",
        "/data\0/x",
    ]
    places += [outside, None, 5, ["/data"], {"path": "/data"}, "-rf", "/", "\n", "a\ud7ffb"]
    for place in places:
        host, status = random.choice(HOSTS), random.choice(STATUSES)
        yield f"{status} at {place!r}", [entry(place, host=host, status=status)]


def documents(outside: str, random: Random, *, long: bool) -> Iterator[Document]:
    """Return broken runs."""
    for name, data in entries(outside, random, long=long):
        yield {"_id": ObjectId(), "name": name, "start": [None], "tags": [{}], "data": data}
    for tags in (5, "tick", [5, None], [{"name": 5}, {"name": Code("tick")}, {"name": ["tick"]}]):
        yield {"_id": ObjectId(), "number": "x", "detector": 5, "data": "none", "tags": tags}
    yield {"_id": {"a": 1}, "data": [entry()]}
    yield {"_id": Code("x"), "data": [entry()]}
    yield {"_id": f"text {ObjectId()}", "data": [entry()], "number": 2**62}


def arbitrary(number: int, start: int) -> list[Document]:
    """Return so many runs of anything at all."""
    found: list[Document] = []

    @seed(start)
    @settings(
        max_examples=number,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(fuzz.documents)
    def collect(document: Document) -> None:
        found.append({**document, "_id": ObjectId()})

    collect()
    return found


async def documents_campaign(
    ground: Ground, *, rounds: int, seed: int, long: bool = True
) -> dict[str, Any]:
    """Add broken runs in each round; `late`: rounds in which a good one waited too long."""
    random, tally = Random(seed), Tally(ground.compared)
    late, longest, broken = 0, 0.0, 0
    await ground.gather()
    world = ground.world
    with MongoClient[Document](world.mongod.uri) as client:
        runs = client[world.settings.database][world.settings.collection]
        load = Load(runs, RATE if long else SHORT_RATE)
        with load.running():
            for number in range(rounds):
                began = trio.current_time()
                load.added.clear()
                load.go()
                born = await ground.take(SIZE)
                wicked = [
                    *documents(str(world.directory), random, long=long),
                    *arbitrary(FUZZED if long else 10, seed + number),
                ]
                random.shuffle(wicked)
                added = await trio.to_thread.run_sync(_add, runs, wicked, ground)
                broken += added
                await trio.to_thread.run_sync(_churn, runs, born, random)
                await trio.sleep(LASTS if long else LASTS / 10)
                await load.rest()
                await load.counted(ground)
                problems = [*await ground.finish([born], None), *await load.missing(ground)]
                problems += ground.ended()
                waited = await trio.to_thread.run_sync(_longest_wait, world, runs, load)
                longest, late = max(longest, waited), late + (waited > LATE)
                await ground.forget([born])
                tally.add(problems)
                tally.faults += added
                took = trio.current_time() - began
                say_round(f"{tally.rounds}. {added} broken runs, {waited:.1f} s", problems, took)
    return {**tally.row(), "longest_wait_s": round(longest, 2), "late": late}


def _add(runs: Collection[Document], wicked: list[Document], ground: Ground) -> int:
    """Add what the database takes; how many."""
    added = 0
    for document in wicked:
        with suppress(PyMongoError, BSONError, OverflowError, UnicodeError):
            runs.replace_one({"_id": document["_id"]}, document, upsert=True)
            added += 1
            if not isinstance(document["_id"], dict | Code):
                ground.outcasts.add(document["_id"])
    return added


def _churn(runs: Collection[Document], born: Born, random: Random) -> None:
    """Write as old programs do: pull and push the same entry, come and go, by position."""
    for _ in range(20):
        one = runs.find_one({"_id": born.id})
        assert one is not None
        brief = {"type": "raw", "host": f"brief{random.random()}", "status": "transferred"}
        runs.update_one({"_id": born.id}, {"$push": {"data": brief}})
        runs.update_one({"_id": born.id}, {"$pull": {"data": {"host": brief["host"]}}})
        kept = [e for e in one["data"] if e["host"] == BIRTH and e.get("manifest")]
        with runs.database.client.start_session() as session:
            session.with_transaction(partial(_replace, runs, born, kept))


def _replace(
    runs: Collection[Document], born: Born, kept: list[Document], session: ClientSession
) -> None:
    """Take entries out and put them back, elsewhere in the array."""
    for one in kept:
        which = {"_id": born.id, "data": one}
        if runs.update_one(which, {"$pull": {"data": one}}, session=session).modified_count:
            runs.update_one({"_id": born.id}, {"$push": {"data": one}}, session=session)


def _longest_wait(world: World, runs: Collection[Document], load: Load) -> float:
    """How long the slowest reaction to a good run took, in seconds."""
    names = {f"ticked-{site}" for site in world.listening}
    waits: list[float] = [
        (tag["date"].replace(tzinfo=UTC) - one["_id"].generation_time).total_seconds()
        for one in runs.find({"_id": {"$in": list(load.added)}}, {"tags": 1})
        for tag in one["tags"]
        if tag["name"] in names
    ]
    return max(waits)
