"""Copies of many runs as one request: planned, written, followed, cancelled and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections import Counter
from typing import Any

import pytest
import trio
from pymongo import MongoClient

from caxev import HERE, REQUESTED, TRANSFERRED, TRANSFERRING, Job, RunUpdate
from caxev import copy as on_copy
from tests import engine
from tests.conftest import Database as Named
from tests.forked import Forked
from tests.test_cli import Caxev, assert_one_line, caxev, online  # noqa: F401  # fixtures
from tests.test_copy import asking  # noqa: F401  # a fixture

pytestmark = pytest.mark.replicaset
MANY = 60
"""More than are done without a confirmation, and than are written in one transaction."""
WATCHED = 30
COPY = ("copy", "--lacks", "raw@chicago", "--tag", "go", "--from", "lngs", "--to", "chicago")


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have runs read by pages that do not hold all of them."""
    monkeypatch.setattr("caxev.asking.asker._PAGE", 25)


def insert(database: Named) -> None:
    """Runs that are to be copied; one that is there already, one that is not tagged, one bad."""
    lngs, chicago = ("raw", "lngs", "transferred"), ("raw", "chicago", "transferred")
    go = {"tags": [{"name": "go"}], "raw_size_byte": 10**9}
    documents = [engine.run_document(number, lngs, **go) for number in range(1, MANY + 1)]
    documents.append(engine.run_document(MANY + 1, lngs, chicago, **go))
    documents.append(engine.run_document(MANY + 2, lngs))
    documents.append(engine.run_document(MANY + 3, ("raw", "lngs", "error"), **go))
    for document in documents:
        for one in document["data"]:
            one.setdefault("checksum", "ab")
    with MongoClient[dict[str, Any]](database.uri) as client:
        client[database.name]["runs_new"].insert_many(documents)


def statuses(database: Named) -> Counter[str]:
    """How many copies at chicago, beside the one that was there, have which status."""
    with MongoClient[dict[str, Any]](database.uri) as client:
        runs = client[database.name]["runs_new"].find({"number": {"$lte": MANY}})
        entries = [one for run in runs for one in run["data"] if one["host"] == "chicago"]
    return Counter(one["status"] for one in entries)


def kept(database: Named) -> list[dict[str, Any]]:
    with MongoClient[dict[str, Any]](database.uri) as client:
        return list(client[database.name]["caxev_requests"].find())


def begin(database: Named, number: int) -> None:
    """Begin the copies of the first runs, as a listener claims them."""
    with MongoClient[dict[str, Any]](database.uri) as client:
        client[database.name]["runs_new"].update_many(
            {"number": {"$lte": number}, "data.host": "chicago"},
            {"$set": {"data.$[one].status": "transferring", "data.$[one].owner": "chicago#1"}},
            array_filters=[{"one.host": "chicago"}],
        )


def test_many_runs_are_one_request(asking: Caxev, database: Named) -> None:  # noqa: F811
    """The plan has counts, bytes and what is left out; without --yes nobody is taken unawares."""
    insert(database)
    refused = asking(*COPY)
    assert (refused.code, kept(database), statuses(database)) == (2, [], Counter())
    left_out = "Not 1 run (1: raw at lngs"
    assert f"{MANY} runs, {MANY} GB: raw at lngs to chicago. {left_out}" in refused.err
    assert f"{MANY} runs are more than 20: add --yes" in refused.err
    answer = asking(*COPY, "--yes", "--no-wait")
    assert answer.code == 0, answer
    assert statuses(database) == {REQUESTED: MANY}
    (request,) = kept(database)
    assert len(request["runs"]) == MANY
    (row,) = asking("requests", "--json").rows
    assert (row["request"], row["runs"], row["pending"]) == (request["_id"], MANY, MANY)
    # Not 0: one of the runs was not requested.
    assert (asking(*COPY, "--cancel", "--yes").code, statuses(database)) == (1, Counter())


def test_cancelled_half_way_and_resumed(asking: Caxev, database: Named) -> None:  # noqa: F811
    """What a listener has begun goes on, the rest is withdrawn as if it had not been asked for."""
    insert(database)
    assert asking(*COPY, "--yes", "--no-wait").code == 0
    begin(database, MANY // 2)
    (request,) = kept(database)
    cancelled = asking("requests", "cancel", request["_id"], "--json")
    assert (cancelled.code, json.loads(cancelled.out)["withdrawn"]) == (0, MANY // 2)
    assert f"withdrawn: {MANY // 2} runs" in cancelled.err
    assert statuses(database) == {TRANSFERRING: MANY // 2}
    assert asking("requests", "resume", request["_id"], "--no-wait").code == 0
    assert statuses(database) == {TRANSFERRING: MANY // 2, REQUESTED: MANY // 2}
    (again,) = kept(database)
    assert (again["runs"], again["by"]) == (request["runs"], request["by"])


def test_a_request_that_nobody_made(asking: Caxev, database: Named) -> None:  # noqa: F811
    """The ids that are known are named; a selection that needs nothing is no request."""
    insert(database)
    assert asking(*COPY, "--yes", "--no-wait").code == 0
    (request,) = kept(database)
    near = request["_id"][:-1] + "x"
    for command in ("watch", "cancel", "resume"):
        assert_one_line(asking("requests", command, near), 1, f"mean '{request['_id']}'")
    nothing = f"0 runs: nothing. Not {MANY + 1} runs ({MANY}: it already"
    assert_one_line(asking(*COPY, "--yes"), 1, nothing)


async def test_ctrl_c_withdraws_what_is_not_begun(asking: Caxev, database: Named) -> None:  # noqa: F811
    """With a real listener: no copy is left half-claimed, and resumed, all are made."""
    interrupted = trio.Event()

    async def pull(job: Job) -> RunUpdate:
        assert job.copy is not None
        if statuses(database)[TRANSFERRED] > WATCHED // 3:
            await interrupted.wait()
        begun = await job.update(RunUpdate.change_copy(job.run, job.copy, TRANSFERRING))
        mine = begun.copy(job.copy.key)
        assert mine is not None
        return RunUpdate.change_copy(job.run, mine, TRANSFERRED)

    insert(database)
    one = engine.handler(pull, on_copy(REQUESTED, host=HERE), lane="transfer")
    options = engine.options_for(database, [one], site="chicago")
    async with engine.opened(database) as db:
        with started(database) as process:
            assert process.stdout is not None
            lines = process.stdout
            first = await trio.to_thread.run_sync(lines.readline)
            assert f"{WATCHED} runs, copy: raw to chicago" in first.decode()
            async with engine.listener(db, options):
                await engine.until(lambda: statuses(database)[TRANSFERRED] > WATCHED // 3)
                process.send_signal(signal.SIGINT)
                out = (await trio.to_thread.run_sync(lines.read)).decode()
                assert await trio.to_thread.run_sync(process.wait) == 130
                interrupted.set()
                await engine.until(lambda: set(statuses(database)) == {TRANSFERRED})
                assert "to do the rest: caxev requests resume" in out
                assert statuses(database)[TRANSFERRED] < WATCHED
                (request,) = kept(database)
                resumed = await trio.to_thread.run_sync(
                    asking, "requests", "resume", request["_id"]
                )
    assert resumed.code == 0, resumed
    whole = f"{WATCHED} of {WATCHED} done, {WATCHED} GB of {WATCHED} GB"
    assert resumed.out.splitlines()[-1].startswith(whole)
    assert statuses(database) == {TRANSFERRED: WATCHED}


def started(database: Named) -> subprocess.Popen[bytes]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("CAXEV_", "MONGO_"))}
    env |= {"CAXEV_MONGO_URI": database.uri, "CAXEV_DATABASE": database.name}
    return Forked([*COPY, "--run", f"1-{WATCHED}", "--yes"], env, stdout=subprocess.PIPE)
