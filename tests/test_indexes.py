"""Indexes: `caxev db init` makes them and says which, and commands read no more than they must."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from attrs import evolve
from pymongo import MongoClient

from caxev.core.clock import utcnow
from caxev.core.ledger import Reaction
from caxev.core.model import CopyKey, Event
from caxev.core.selection import CopyPattern, NumberRange, Selection, at_host
from caxev.database import indexes
from caxev.database.reactions import reaction_document
from tests import engine
from tests.conftest import Database as Named
from tests.test_cli import Caxev, caxev, contents, online  # noqa: F401  # fixtures

pytestmark = pytest.mark.replicaset
Runs = Any
OURS = {index.name for index in indexes.RUNS}
STATUSES = ("transferred", "error", "verifying")


@pytest.fixture
def runs(database: Named) -> Iterator[Runs]:
    """The runs collection, as an administrator sees it: 300 runs with a copy at each of two sites.

    One in 100 is bad at chicago, one in 100 is tagged.
    """
    with MongoClient[dict[str, Any]](database.uri) as client:
        runs = client[database.name]["runs_new"]
        runs.insert_many(_document(number) for number in range(1, 301))
        yield runs


def _document(number: int) -> dict[str, Any]:
    status = "error" if number % 100 == 0 else "transferred"
    tags = [{"name": "keep"}] if number % 100 == 1 else []
    copies = (("raw", "lngs", "transferred"), ("raw", "chicago", status))
    return engine.run_document(number, *copies, tags=tags)


def states(answer: Any) -> dict[str, str]:
    return {row["index"]: row["state"] for row in answer.rows}


# -- making them ----------------------------------------------------------------------------------


def test_init_says_what_it_makes(online: Caxev, database: Named) -> None:  # noqa: F811
    """Each index has a row with its keys and its purpose; again, all are there."""
    dry = online("db", "init", "--dry-run", "--json")
    assert (dry.code, set(states(dry).values())) == (0, {"would be made"})
    assert contents(database) == {}
    made = online("db", "init", "--json")
    assert (made.code, set(states(made).values())) == (0, {"made"})
    assert set(states(made)) >= {*OURS, "due", "failed", "manifest"}
    assert all(row["keys"] and row["for"] for row in made.rows)
    assert set(states(online("db", "init", "--json")).values()) == {"there"}
    assert set(contents(database)["runs_new"][1]) == {"_id_", *OURS}


def test_a_listener_leaves_the_runs_alone(online: Caxev, runs: Runs) -> None:  # noqa: F811
    """The runs are not only ours: no index is made that nobody asked for."""
    assert online("listen", "--site", "lngs", "--once").code == 0
    assert set(runs.index_information()) == {"_id_"}


def test_an_index_of_others_is_used(online: Caxev, runs: Runs) -> None:  # noqa: F811
    """One with the same keys is enough, whatever its name; one that leaves out runs is not."""
    runs.create_index([("number", 1), ("_id", 1)])
    runs.create_index([("name", 1), ("_id", 1)], sparse=True)
    found = states(online("db", "init", "--json"))
    assert found["caxev_number"] == "there: number_1__id_1"
    assert found["caxev_name"] == "made"
    assert "caxev_number" not in runs.index_information()


def test_what_is_refused_keeps_no_other_away(online: Caxev, runs: Runs) -> None:  # noqa: F811
    """A document that an index cannot hold, or an index of that name: the row says why."""
    runs.insert_one({"data": [{"host": ["a"], "status": ["b"]}]})
    runs.create_index("detector", name="caxev_name")
    answer = online("db", "init", "--json")
    found = states(answer)
    assert answer.code == 1
    assert "parallel arrays" in found.pop("caxev_copies")
    assert "same name" in found.pop("caxev_name")
    assert set(found.values()) == {"made"}


# -- using them -----------------------------------------------------------------------------------


@pytest.fixture
def plans(database: Named, runs: Runs) -> Iterator[Any]:
    """A function that returns how the runs were read since it was called last: (plan, read)."""
    with MongoClient[dict[str, Any]](database.uri) as client:
        there = client[database.name]

        def read() -> list[tuple[str, int]]:
            there.command("profile", 0)
            found = list(there["system.profile"].find({"planSummary": {"$exists": True}}))
            there["system.profile"].drop()
            there.command("profile", 2)
            return [
                (one["planSummary"], one["docsExamined"])
                for one in found
                if one["ns"] == f"{database.name}.runs_new"
                and one["command"].get("filter", one["command"].get("pipeline")) != {}
            ]

        read()
        yield read
        there.command("profile", 0)


COMMANDS = {
    ("status", "--run", "7"): 1,
    ("status", "--name", "161111_0007"): 1,
    ("explain", "--run", "7", "--site", "lngs"): 1,
    ("verify", "--run", "7"): 1,
    ("rm", "--run", "7", "--site", "lngs", "--dry-run"): 1,
    ("replay", "--run", "7", "--site", "lngs", "--dry-run"): 1,
    ("retry", "--run", "7", "--site", "lngs"): 1,
    ("status", "--host", "chicago", "--status", "error"): 3,
    ("status", "--status", "error"): 3,
    ("status", "--host", "tape"): 0,
    ("verify", "--site", "chicago"): 297,
    ("rm", "--site", "tape", "--dry-run"): 0,
    ("status", "--totals", "--host", "tape"): 0,
    ("replay", "--tag", "keep", "--dry-run"): 3,
}


def test_commands_read_only_what_they_show(online: Caxev, plans: Any) -> None:  # noqa: F811
    """No query scans the collection, and none reads many more runs than it is about."""
    assert online("db", "init").code == 0
    plans()
    for command, most in COMMANDS.items():
        answer = online(*command)
        assert answer.code in {0, 1}, answer
        found = plans()
        assert found, command
        assert not [plan for plan, _ in found if "COLLSCAN" in plan], command
        assert all(examined <= most + 1 for _, examined in found), (command, found)


async def test_pages_are_the_same_without_indexes(
    runs: Runs,
    database: Named,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each selection is read whole, once and in the order of ids, with indexes and without."""
    monkeypatch.setattr("caxev.database.run_pages.PAGE", 2)
    odd = {"data": [{"host": "chicago", "type": "raw", "status": "error"}], "tags": [{"name": "x"}]}
    runs.insert_many([{"_id": "text", **odd}, {"_id": 7, **odd}, {"_id": None, **odd}])
    wanted = [
        at_host("chicago", "error"),
        Selection(copy=CopyPattern(status="error")),
        evolve(at_host("chicago", "error"), numbers=(NumberRange(1, 150),)),
        Selection(tags=("x",)),
        evolve(at_host("lngs"), tags=("keep",)),
        evolve(at_host("lngs"), numbers=(NumberRange(1, 20),)),
        evolve(at_host("lngs"), numbers=(NumberRange(7, 7),)),
        Selection(names=("161111_0007",)),
    ]
    async with engine.opened(database) as db:

        async def read(selection: Selection) -> list[Any]:
            return [run.id async for page in db.pages(selection, utcnow()) for run in page]

        before = [await read(one) for one in wanted]
        assert [len(one) for one in before] == [6, 6, 1, 3, 3, 20, 1, 1]
        assert not any(one.refused for one in await db.init())
        assert [await read(one) for one in wanted] == before


async def test_reactions_are_listed_by_an_index(database: Named) -> None:
    """A list of reactions reads none of the snapshots beside them, and none of another state."""
    with MongoClient[dict[str, Any]](database.uri) as client:
        there = client[database.name]
        async with engine.opened(database) as db:
            states = ("failed", "running", "pending")
            rows = [
                one
                for n, state in enumerate(states)
                for site, number in (("lngs", 20), ("chicago", 200))
                for one in _reactions(site, state, number, first=1000 * n)
            ]
            snapshots = [{"_id": {"s": "lngs", "r": n}, "snapshot": []} for n in range(1000)]
            there["caxev_ledger"].insert_many([*rows, *snapshots])
            for state in states:
                there.command("profile", 2)
                pages = db.reaction_pages("lngs", state, limit=5)
                found = [one async for page in pages for one in page]
                there.command("profile", 0)
                dues = [reaction.due for reaction, _ in found]
                assert (len(found), dues) == (5, sorted(dues, reverse=True))
                (read,) = there["system.profile"].find({"command.sort": {"due": -1}})
                there["system.profile"].drop()
                assert "COLLSCAN" not in read["planSummary"]
                assert read["docsExamined"] <= (20 if state == "running" else 6)


def _reactions(site: str, state: str, number: int, first: int = 0) -> list[dict[str, Any]]:
    """Reactions of a site in two lanes."""
    now = utcnow()
    made = []
    for n in range(first, first + number):
        event = Event(n, CopyKey("raw", site), None, "transferred@1")
        at, lane = now + timedelta(seconds=n), f"lane{n % 2}"
        one = Reaction(site, event, "pull", lane=lane, generation=n, at=at)
        row = {"_id": one.id, **reaction_document(one), "state": state}
        made.append({**row, "epoch": 1} if state == "running" else row)
    return made


# -- many rows ------------------------------------------------------------------------------------


def test_many_rows_are_what_few_are(
    online: Caxev,  # noqa: F811
    runs: Runs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A table that is printed row by row has the same rows, and its JSON the same bytes."""
    for command in (("status", "--host", "lngs"), ("rm", "--site", "lngs", "--dry-run")):
        many, many_json = online(*command), online(*command, "--json")
        with monkeypatch.context() as patch:
            patch.setattr("caxev.cli.output._FEW", 1000)
            few, few_json = online(*command), online(*command, "--json")
        assert many_json.out == few_json.out
        assert len(many_json.rows) == 300
        cells = [line.split()[0] for line in few.out.splitlines()]
        assert [line.split()[0] for line in many.out.splitlines()] == cells
