"""Finding runs, tagging them and commenting on them; what is asked before many are acted on."""

from __future__ import annotations

import csv
import io
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trio
from pymongo import MongoClient

from caxev import Job, tag
from caxev.asking.base import ActPlan
from tests import engine
from tests.conftest import Database as Named
from tests.test_cli import (  # noqa: F401  # fixtures
    Caxev,
    assert_one_line,
    caxev,
    contents,
    insert,
    on_terminal,
    online,
)

pytestmark = pytest.mark.replicaset


def documents(database: Named) -> list[dict[str, Any]]:
    with MongoClient[dict[str, Any]](database.uri, tz_aware=True) as client:
        return list(client[database.name]["runs_new"].find().sort("number"))


# -- caxev runs -----------------------------------------------------------------------------------


def test_the_newest_come_first(online: Caxev, database: Named) -> None:  # noqa: F811
    """As many as were asked for; JSON has the copies, too."""
    insert(database, *range(1, 6), source={"type": "AmBe"}, raw_size_byte=5000)
    rows = online("runs", "--limit", "2", "--json").rows
    assert [row["run"]["number"] for row in rows] == [5, 4]
    assert (rows[0]["source"], rows[0]["bytes"], rows[0]["good"]) == ("AmBe", 5000, ["lngs"])
    assert rows[0]["copies"][0]["location"] == "/data/5"
    lines = online("runs", "--run", "2-3").out.splitlines()
    assert [line.split()[0] for line in lines] == ["RUN", "3", "2"]


def test_a_table_of_80_columns(online: Caxev, database: Named, tmp_path: Path) -> None:  # noqa: F811
    """What matters less goes, if need be; the rest is whole."""
    insert(database, *range(100_001, 100_004), source={"type": "AmBe"}, raw_size_byte=5 * 10**11)
    where = {"CAXEV_MONGO_URI": database.uri, "CAXEV_DATABASE": database.name}
    sites = str(tmp_path / "sites.json")
    shown = on_terminal("runs", COLUMNS="80", CAXEV_SITES=sites, **where)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
    assert max(map(len, lines)) <= 80
    assert {"RUN", "NAME", "START", "SIZE", "COPIES", "TAGS"} <= {*lines[0].split()}
    assert lines[2].startswith("100003")


def test_csv_is_read_by_others(online: Caxev, database: Named) -> None:  # noqa: F811
    """A line of headings, and quotes where they are needed."""
    insert(database, 1, tags=[{"name": 'a "b", c'}], data=[])
    (row,) = csv.DictReader(io.StringIO(online("runs", "--csv").out))
    assert (row["number"], row["name"], row["tags"]) == ("1", "161111_0001", 'a "b", c')
    assert (row["start"], row["bytes"], row["good"]) == ("2016-11-11T00:00:00Z", "", "")


def test_csv_holds_no_formula(online: Caxev, database: Named) -> None:  # noqa: F811
    """A spreadsheet would calculate it, whoever may write a name or a tag."""
    insert(database, 1, name="=1+1", tags=[{"name": "@x"}])
    (row,) = csv.DictReader(io.StringIO(online("runs", "--csv").out))
    assert (row["name"], row["tags"]) == ("'=1+1", "'@x")


def test_paths_are_those_of_good_copies(online: Caxev, database: Named) -> None:  # noqa: F811
    """With the host, unless one was asked for; a bad copy's only if it was."""
    bad = {"type": "raw", "host": "chicago", "status": "error", "location": "/bad"}
    good = {"type": "raw", "host": "lngs", "status": "transferred", "location": "/good"}
    insert(database, 1, data=[bad, good])
    assert online("runs", "--paths").out == "lngs:/good\n"
    assert online("runs", "--paths", "--at", "lngs").out == "/good\n"
    assert online("runs", "--paths", "--at", "chicago").out == ""
    assert online("runs", "--paths", "--at", "chicago", "--status", "error").out == "/bad\n"


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["--tag", "goo"], 5, "'go'"),
        (["--detector", "tcp", "--json"], 5, "'tpc'"),
        (["--lacks", "raw@chicgo"], 3, "'chicago'"),
        (["--paths", "--at", "chicgo"], 3, "'chicago'"),
    ],
    ids=str,
)
def test_what_nobody_knows_is_not_found(
    online: Caxev,  # noqa: F811
    database: Named,
    args: list[str],
    code: int,
    words: str,
) -> None:
    """It is an error that names the nearest; nothing found is none."""
    insert(database, 1)
    assert_one_line(online("runs", *args), code, words)
    assert online("runs", "--since", "1d").out == "no such run\n"
    assert online("runs", "--since", "1d", "--json").rows == []


# -- caxev tag, caxev comment ---------------------------------------------------------------------


async def test_handlers_react_to_a_tag(online: Caxev, database: Named) -> None:  # noqa: F811
    """To one that is added, and to one that is removed; who added it, and when, stands there."""
    seen: list[str] = []

    async def came(job: Job) -> None:
        seen.append(f"came to {job.run.number}")

    async def went(job: Job) -> None:
        seen.append(f"went from {job.run.number}")

    def run(*args: str) -> Any:
        return online(*args)

    insert(database, 1, 2)
    handlers = [engine.handler(came, tag("new")), engine.handler(went, tag("new", gone=True))]
    async with (
        engine.opened(database) as db,
        engine.listener(db, engine.options_for(database, handlers)),
    ):
        added = await trio.to_thread.run_sync(run, "tag", "add", "new", "--run", "1-")
        assert added.code == 0, added
        await engine.until(lambda: sorted(seen) == ["came to 1", "came to 2"])
        again = await trio.to_thread.run_sync(run, "tag", "add", "new", "--run", "1", "--json")
        assert [row["state"] for row in again.rows] == ["has it already"]
        (_, row) = documents(database)[0]["tags"]
        assert ("@" in row["user"], row["date"] < datetime.now(UTC)) == (True, True)
        removed = await trio.to_thread.run_sync(run, "tag", "rm", "new", "--run", "2")
        assert removed.code == 0, removed
        await engine.until(lambda: "went from 2" in seen)
    assert [one["name"] for one in documents(database)[1]["tags"]] == ["go"]


def test_a_comment_is_kept(online: Caxev, database: Named) -> None:  # noqa: F811
    """Beside those that others wrote; what is no list is left alone."""
    insert(database, 1, comments=[{"text": "cax's", "user": "me"}])
    insert(database, 2, comments="odd")
    answer = online("comment", "the gate was open", "--run", "1,2", "--json")
    assert [row["state"] for row in answer.rows] == ["added", "the run has just changed: try again"]
    first, second = documents(database)
    assert [one["text"] for one in first["comments"]] == ["cax's", "the gate was open"]
    assert {*first["comments"][1]} == {"text", "user", "date"}
    assert second["comments"] == "odd"
    assert_one_line(online("comment", " ", "--run", "1"), 2, "the comment is empty")


# -- many runs ------------------------------------------------------------------------------------


def test_many_runs_are_asked_about(online: Caxev, database: Named) -> None:  # noqa: F811
    """Where nobody can be asked nothing is written, unless --yes; the plan has counts."""
    insert(database, *range(1, 31))
    insert(database, *range(31, 34), tags=[{"name": "new"}])
    before = contents(database)
    command = ("tag", "add", "new", "--tag", "go")
    refused = online(*command)
    assert (refused.code, refused.out, contents(database)) == (2, "", before)
    assert "30 runs: tag 'new'" in refused.err
    assert "30 runs are more than 20: add --yes" in refused.err
    every = ("tag", "add", "new", "--run", "1-", "--yes")
    done = online(*every)
    assert done.code == 0
    assert "30 runs: tag 'new'. Not 3 runs (3: has it already)" in done.err
    assert all("new" in {one["name"] for one in run["tags"]} for run in documents(database))
    before = contents(database)
    assert online("replay", "--run", "1-").code == 2
    asked = online("verify", "--run", "1-", "--deep")
    assert (asked.code, "33 runs: read and compared" in asked.err) == (2, True)
    assert contents(database) == before


def test_a_plan_in_words() -> None:
    """Counts and bytes, and the most frequent reasons."""
    tally = ActPlan()
    for _ in range(3):
        tally.add("raw from lngs to chicago", 10**12)
    for why in ("a", "a", "b", "c", "d"):
        tally.add("raw", None, why)
    assert tally.words == (
        "3 runs, 3 TB: raw from lngs to chicago. Not 5 runs (2: a; 1: b; 1: c; ...)"
    )
