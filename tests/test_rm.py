"""`caxev rm` and `caxev vouch`: what is asked for, what is refused, and what is written."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient

from tests import engine
from tests.conftest import Database as Named
from tests.test_cli import Answer, Caxev, assert_one_line, caxev, online  # noqa: F401  # fixtures

pytestmark = pytest.mark.replicaset

SITES: list[dict[str, Any]] = [
    {"name": "lngs", "dir_raw": "/lngs", "purge": 5, "deletion": {"copies": 2}},
    {"name": "chicago", "dir_raw": "/chicago", "deletion": {"copies": 2}},
    {
        "name": "stockholm",
        "dir_raw": "/stockholm",
        "dir_processed": "/processed",
        "pax_version_purge": "v1",
    },
    {"name": "depot", "dir_raw": "/depot", "listener": False},
]
HOSTS = ("lngs", "chicago", "stockholm")
RM = ("rm", "--run", "1", "--site", "lngs")
BY_ENTRIES = ("--force-less", "--by-entries", "--why", "pushed damaged")


@pytest.fixture
def asking(online: Caxev) -> Caxev:  # noqa: F811  # the fixture
    """The command line with a database and sites that delete."""
    Path("sites.json").write_text(json.dumps(SITES))
    return online


def entry(host: str, **fields: Any) -> dict[str, Any]:
    place = {"location": f"/{host}/run", "manifest": "b3:0", "checksum": "ab"}
    return {"type": "raw", "host": host, "status": "transferred", **place, **fields}


def insert(database: Named, *entries: dict[str, Any], **fields: Any) -> None:
    data = list(entries) or [entry(host) for host in HOSTS]
    with MongoClient[dict[str, Any]](database.uri) as client:
        document = {**engine.run_document(fields.pop("number", 1)), "data": data, **fields}
        client[database.name]["runs_new"].insert_one(document)


def entries(database: Named) -> dict[str, dict[str, Any]]:
    with MongoClient[dict[str, Any]](database.uri, tz_aware=True) as client:
        run = client[database.name]["runs_new"].find_one({"number": 1})
    assert run is not None
    return {one["host"]: one for one in run["data"]}


def refusal(answer: Answer) -> str:
    """Return why a copy stays: that is a failure if it is the only one."""
    assert answer.code == 1, answer
    (row,) = json.loads(answer.out)
    return str(row["state"])


def rows(answer: Answer) -> list[dict[str, Any]]:
    assert answer.code == 0, answer
    found: list[dict[str, Any]] = json.loads(answer.out)
    return found


def test_the_intent_is_written_once(asking: Caxev, database: Named) -> None:
    """It says who, when, why, and how many must remain; a second one is refused."""
    insert(database)
    (row,) = rows(asking(*RM, "--json"))
    assert (row["run"]["number"], row["ok"]) == (1, True)
    there = entries(database)
    wanted = there["lngs"]["deletion"]
    assert there["lngs"]["status"] == "deleting"
    assert "@" in wanted["by"]
    assert (wanted["why"], wanted["keep"], wanted["was"]) == ("caxev rm", 2, "transferred")
    assert (wanted["manifest"], wanted["checksum"]) == ("b3:0", "ab")
    assert {there[host]["status"] for host in HOSTS[1:]} == {"transferred"}
    assert "it is deleting" in refusal(asking(*RM, "--json"))
    chicago = refusal(asking("rm", "--run", "1", "--site", "chicago", "--json"))
    assert chicago == "kept: 2 good copies must remain elsewhere, and there are 1: stockholm"


def test_it_can_be_taken_back(asking: Caxev, database: Named) -> None:
    """While its bytes are there, and not after."""
    insert(database)
    assert "raw at lngs is transferred" in refusal(asking(*RM, "--cancel", "--json"))
    assert asking(*RM).code == 0
    assert asking(*RM, "--cancel").code == 0
    there = entries(database)["lngs"]
    assert (there["status"], there["deletion"]) == ("transferred", None)
    assert "withdrawn by" in there["withdrawn"]["why"]
    insert_erasing(database)
    assert "too late" in refusal(asking(*RM, "--cancel", "--json"))


def insert_erasing(database: Named) -> None:
    wanted = {"by": "", "why": "", "keep": 2, "at": datetime.now(UTC), "was": "transferred"}
    fields = {"status": "deleting", "deletion": wanted, "erasing": datetime.now(UTC)}
    with MongoClient[dict[str, Any]](database.uri) as client:
        client[database.name]["runs_new"].update_one(
            {"data.host": "lngs"}, {"$set": {f"data.0.{k}": v for k, v in fields.items()}}
        )


def test_many_at_once(asking: Caxev, database: Named) -> None:
    """Each by itself, and with its reason; many only after a person has seen the plan."""
    for number in range(1, 31):
        # The location is each run's own, as two copies in one place are the same files.
        some = [entry(host, location=f"/{host}/{number}") for host in HOSTS]
        insert(database, *some[: 3 if number > 3 else 2], number=number, raw_size_byte=10**9)
    insert(database, entry("chicago"), number=31)
    many = ("rm", "--run", "1-30", "--site", "lngs")
    refused = asking(*many)
    assert refused.code == 2
    assert "27 runs, 27 GB: raw at lngs. Not 3 runs (3: kept: 2 good copies must" in refused.err
    assert entries(database)["lngs"]["status"] == "transferred"
    done = rows(asking(*many, "--yes", "--json"))
    states = [row["state"].partition(":")[0] for row in done]
    assert states == ["kept"] * 3 + ["will be deleted, once the others were read"] * 27
    back = rows(
        asking("rm", "--has", "raw@lngs=deleting", "--site", "lngs", "--cancel", "--json", "--yes")
    )
    assert len(back) == 27
    assert all(row["state"].startswith("withdrawn by") for row in back)
    (request, former) = rows(asking("requests", "--json"))
    assert (request["what"], request["done"]) == ("rm --cancel: raw at lngs", 27)
    assert (former["what"], former["withdrawn"]) == ("rm: raw at lngs", 27)
    assert asking("rm", "--run", "1-31", "--site", "lngs", "--status", "error").code == 5


def test_a_dry_run_writes_nothing(asking: Caxev, database: Named) -> None:
    """It says what would go, or why not."""
    insert(database, *(entry(host) for host in HOSTS[:2]))
    before = entries(database)
    why = refusal(asking(*RM, "--dry-run", "--json"))
    assert why == "kept: 2 good copies must remain elsewhere, and there are 1: chicago"
    (row,) = rows(asking(*RM, "--force-less", "--dry-run", "--json"))
    assert row["state"] == "would be deleted, once the others were read"
    assert entries(database) == before


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ({"task_list": ["CopyPush", "prove"]}, "no handler that lngs enables deletes such a copy"),
        ({"dataset_list": ["170202_1710"]}, "dataset_list of lngs leaves run 1 out"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_no_listener_would_delete(
    asking: Caxev, database: Named, limit: dict[str, Any], said: str
) -> None:
    """It is refused, as it would be about to go for ever: no source, and no copy that counts."""
    Path("sites.json").write_text(json.dumps([SITES[0] | limit, *SITES[1:]]))
    insert(database)
    for more in ((), ("--dry-run",)):
        assert said in refusal(asking(*RM, *more, "--json"))
    assert entries(database)["lngs"]["status"] == "transferred"
    assert asking(*RM[:-1], "chicago", "--force-less").code == 0


def test_less_by_force_but_never_the_last(asking: Caxev, database: Named) -> None:
    """One other good copy of raw data must remain, whoever asks."""
    insert(database, entry("lngs"))
    assert "1 good copies must remain" in refusal(asking(*RM, "--force-less", "--json"))


def test_a_damaged_copy_goes_without_a_reading_of_the_others(
    asking: Caxev, database: Named
) -> None:
    """With a reason, which is kept; of a good copy, or without a reason, it is refused."""
    insert(database, entry("lngs", status="error", checksumproblem=True), entry("chicago"))
    assert asking(*RM, *BY_ENTRIES).code == 0
    wanted = entries(database)["lngs"]["deletion"]
    assert (wanted["by_entries"], wanted["why"], wanted["keep"]) == (True, "pushed damaged", 1)
    without = asking(*RM, "--force-less", "--by-entries")
    assert (without.code, "--why" in without.err) == (2, True)
    good = asking("rm", "--run", "1", "--site", "chicago", *BY_ENTRIES, "--json")
    assert "only a bad copy" in refusal(good)


def test_what_the_rules_would_delete(asking: Caxev, database: Named) -> None:
    """Each copy at the site, with the reason of its staying."""
    insert(database)
    insert(database, entry("lngs"), number=2)
    derived = {"type": "processed", "pax_version": "v1", "location": "/processed/pax_v1/x"}
    insert(database, entry("stockholm", **derived), number=3)
    found = {
        row["run"]["number"]: row
        for row in rows(asking("rm", "--site", "lngs", "--dry-run", "--json"))
    }
    assert found.keys() == {1, 2}
    assert (found[1]["goes"], found[1]["why"]) == (True, "purge: older than 5 days")
    assert not found[2]["goes"]
    found_ = rows(asking("rm", "--site", "stockholm", "--dry-run", "--json"))
    assert [(row["run"]["number"], row["type"], row["goes"]) for row in found_] == [
        (1, "raw", False),
        (3, "processed", True),
    ]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--site", "lngs"), 2, "select runs: --run"),
        (("--run", "9", "--site", "lngs"), 5, "no run 9"),
        (("--run", "1", "--site", "depot"), 3, "no listener"),
        (("--run", "1", "--site", "lngs", "--type", "processed"), 1, "no processed copy"),
        (("--run", "1", "--site", "nowhere"), 3, "no site"),
    ],
)
def test_what_cannot_be_asked(
    asking: Caxev, database: Named, options: tuple[str, ...], code: int, said: str
) -> None:
    """Told in a line, and nothing is written."""
    insert(database)
    answer = asking("rm", *options)
    assert answer.code == code
    assert said in answer.err + answer.out
    assert "deleting" not in str(entries(database))


def test_vouching_marks_a_copy_and_has_all_judged_again(asking: Caxev, database: Named) -> None:
    """Those that have a voice are read afresh, and a bad one gets its event again."""
    bad = {
        "status": "error",
        "checksumproblem": True,
        "status_since": datetime(2020, 1, 1, tzinfo=UTC),
    }
    insert(database, entry("lngs"), entry("chicago", manifest="b3:1"), entry("stockholm", **bad))
    answer = asking("vouch", "--run", "1", "--site", "lngs")
    assert (answer.code, "is now the reference" in answer.out) == (0, True)
    there = entries(database)
    assert "@" in there["lngs"]["vouched"]["by"]
    assert len(there["lngs"]["check_asked"]) == len(there["chicago"]["check_asked"]) == 1
    assert "check_asked" not in there["stockholm"]
    assert there["stockholm"]["status_since"].year > 2020
    nothing = asking("vouch", "--run", "1", "--site", "stockholm")
    assert_one_line(nothing, 1, "cannot be vouched for")


def test_of_runs_with_one_name_none_is_guessed(asking: Caxev, database: Named) -> None:
    """Two detectors may have runs of one name, and a deletion is not done to both."""
    insert(database, detector="tpc")
    insert(database, entry("lngs", location="/lngs/veto"), number=2, detector="muon_veto")
    name = engine.run_document(1)["name"]
    with MongoClient[dict[str, Any]](database.uri) as client:
        client[database.name]["runs_new"].update_many({}, {"$set": {"name": name}})
    answer = asking("rm", "--name", name, "--site", "lngs")
    assert_one_line(answer, 5, "choose one by --detector")
    assert entries(database)["lngs"]["status"] == "transferred"
