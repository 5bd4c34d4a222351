"""`caxev copy`: what is asked for, what is refused, what is taken back, and how it is watched."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
from collections.abc import Callable, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve
from pymongo import MongoClient

from caxev import (
    HERE,
    REQUESTED,
    TRANSFERRED,
    TRANSFERRING,
    CopyIs,
    CopyKey,
    GiveUp,
    Job,
    Run,
    RunUpdate,
    Skip,
)
from caxev import copy as on_copy
from caxev.asking.copies import GONE, CopyPath, new_request, why_not
from caxev.cli.copy_progress import CopyState, copy_state
from caxev.cli.reaction_rows import running_cells
from caxev.core.ledger import Failed, Outcome, Reaction, claim, settle
from caxev.core.model import Event
from caxev.core.selection import Selection
from caxev.database import Database, Ingest
from tests import engine
from tests.conftest import Database as Named
from tests.forked import Forked
from tests.test_cli import Answer, Caxev, assert_one_line, caxev, online  # noqa: F401  # fixtures

SITES: list[dict[str, Any]] = [
    {"name": "lngs", "dir_raw": "/data", "dir_processed": "/data"},
    {"name": "chicago", "dir_raw": "/data"},
    {"name": "depot", "dir_raw": "/data", "listener": False},
    {"name": "tape", "method": "tsm"},
]
THERE = CopyKey("raw", "lngs")
WANTED = CopyKey("raw", "chicago")
PATH = CopyPath(THERE, WANTED)
COPY = ("copy", "--run", "1", "--from", "lngs", "--to", "chicago")
NOW = datetime(2016, 11, 11, tzinfo=UTC)


@pytest.fixture
def asking(online: Caxev) -> Caxev:  # noqa: F811  # the fixture
    """The command line with a database and sites that keep raw data."""
    Path("sites.json").write_text(json.dumps(SITES))
    return online


def insert(database: Named, *copies: tuple[str, str, str], **fields: Any) -> None:
    with MongoClient[dict[str, Any]](database.uri) as client:
        given = copies or (("raw", "lngs", "transferred"),)
        document = engine.run_document(1, *given, **fields)
        # Without a digest nobody could compare a copy with it.
        for one in document["data"]:
            one.setdefault("checksum", "ab")
        client[database.name]["runs_new"].insert_one(document)


def entries(database: Named) -> list[dict[str, Any]]:
    with MongoClient[dict[str, Any]](database.uri, tz_aware=True) as client:
        (run,) = client[database.name]["runs_new"].find()
    found: list[dict[str, Any]] = run["data"]
    return found


def change(database: Named, **fields: Any) -> None:
    """Change the entry at chicago, as somebody who follows no rules."""
    with MongoClient[dict[str, Any]](database.uri) as client:
        done = client[database.name]["runs_new"].update_one(
            {"data.host": "chicago"}, {"$set": {f"data.$.{k}": v for k, v in fields.items()}}
        )
    assert done.matched_count == 1


def summary(answer: Answer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(answer.out)
    return found


# -- asking ---------------------------------------------------------------------------------------


@pytest.mark.replicaset
def test_the_request_is_an_entry(asking: Caxev, database: Named) -> None:
    """A request is an entry that says from where and who; without a listener that is said, too."""
    insert(database)
    answer = asking(*COPY, "--no-wait")
    assert answer.code == 0
    assert answer.out.splitlines() == [
        "requested",
        "chicago: no listener is active there: start caxev listen --site chicago",
    ]
    _, entry = entries(database)
    assert "@" in entry.pop("creation_place")
    assert entry.pop("creation_time") <= entry.pop("status_since")
    assert entry == {
        "type": "raw",
        "host": "chicago",
        "status": "requested",
        "source": "lngs",
        "location": None,
        "checksum": None,
    }


@pytest.mark.replicaset
def test_a_dry_run_writes_nothing(asking: Caxev, database: Named) -> None:
    """It shows what would be requested, or withdrawn, of one run and of several."""
    insert(database)
    before = entries(database)
    for which in (COPY, ("copy", "--name", "*", *COPY[3:])):
        answer = asking(*which, "--dry-run", "--json")
        (row,) = answer.rows
        assert (answer.code, row["state"]) == (0, "would be requested")
        assert row["what"] == "raw at lngs to chicago"
        assert entries(database) == before
    assert asking(*COPY, "--cancel", "--dry-run").code == 1
    asking(*COPY, "--no-wait")
    before = entries(database)
    assert asking(*COPY, "--cancel", "--dry-run").code == 0
    assert entries(database) == before


@pytest.mark.replicaset
def test_who_makes_it_where_the_target_has_no_listener(asking: Caxev, database: Named) -> None:
    """To a site without a listener the source's listener brings it."""
    insert(database)
    answer = asking("copy", "--run", "1", "--from", "lngs", "--to", "depot", "--no-wait")
    assert (answer.code, "caxev listen --site lngs" in answer.out) == (0, True)


@pytest.mark.replicaset
def test_a_version_that_goes_without_saying(asking: Caxev, database: Named) -> None:
    """Of derived data the only version is meant; of several, one must be named."""
    Path("sites.json").write_text(json.dumps([{**one, "dir_processed": "/p"} for one in SITES]))
    good = {"host": "lngs", "status": "transferred", "location": "/p/1", "checksum": "ab"}
    data = [{"type": "processed", "pax_version": version, **good} for version in ("v1", "v2")]
    insert(database, data=data[:1])
    kind = ("--type", "processed", "--no-wait")
    assert asking(*COPY, *kind).code == 0
    assert entries(database)[1]["pax_version"] == "v1"
    assert asking(*COPY, *kind[:2], "--cancel").code == 0
    with MongoClient[dict[str, Any]](database.uri) as client:
        client[database.name]["runs_new"].update_one({}, {"$set": {"data": data}})
    several = asking(*COPY, *kind)
    assert (several.code, "(v1, v2): choose one by --version" in several.err) == (2, True)
    assert asking(*COPY, *kind, "--version", "v2").code == 0
    assert [one["pax_version"] for one in entries(database)] == ["v1", "v2", "v2"]


@pytest.mark.replicaset
@pytest.mark.parametrize(
    ("copies", "args", "end"),
    [
        ([], ["--run", "2"], (5, "no run 2")),
        ([("raw", "depot", "transferred")], [], (1, "run 1 has no copy: raw at lngs")),
        ([("raw", "lngs", "verifying")], [], (1, "raw at lngs is verifying, and only a")),
        ([], ["--type", "minitrees"], (1, "run 1 has no copy: minitrees at lngs")),
        ([("processed", "lngs", "transferred")], ["--type", "processed"], (3, "no directory for")),
        (
            [("raw", "lngs", "transferred"), ("raw", "chicago", "verifying")],
            [],
            (1, "run 1 already has this copy: raw at chicago is verifying"),
        ),
        ([], ["--to", "lngs"], (2, "--from and --to are both lngs")),
        ([], ["--to", "chicgo"], (3, "mean 'chicago'")),
        ([], ["--from", "tape"], (1, "run 1 has no copy: raw at tape")),
        ([], ["--from", "tape", "--to", "depot"], (3, "neither tape nor depot has a listener")),
        ([], ["--name", "x"], (5, "no run with --run 1 --name x")),
        ([], ["--timeout", "0"], (2, "not in the range")),
    ],
    ids=str,
)
def test_refusals(
    asking: Caxev,
    database: Named,
    copies: list[tuple[str, str, str]],
    args: list[str],
    end: tuple[int, str],
) -> None:
    """What cannot be asked for is told in one line, and nothing is written."""
    insert(database, *copies)
    before = entries(database)
    answer, (code, words) = asking(*COPY, *args), end
    if code == 2:
        assert (answer.code, words in answer.err) == (2, True)
    else:
        assert_one_line(answer, code, words)
    assert entries(database) == before


@pytest.mark.replicaset
def test_a_copy_that_is_there_is_told_with_its_error(asking: Caxev, database: Named) -> None:
    """What stands there already is named with its status; a program gets that, too."""
    insert(database)
    asking(*COPY, "--no-wait")
    assert_one_line(asking(*COPY), 1, "raw at chicago is requested")
    change(database, status="error", error="3 files differ")
    answer = asking(*COPY, "--json")
    assert (answer.code, "is error (3 files differ)" in answer.err) == (1, True)
    told = summary(answer)
    assert (told["run"]["number"], told["from"], told["to"], told["status"]) == (
        1,
        "lngs",
        "chicago",
        "error",
    )


def run_of(*copies: tuple[str, str, str], **fields: Any) -> Run:
    return Run.from_document(engine.run_document(1, *copies, **fields))


def test_a_request_expects_what_was_seen() -> None:
    """It counts only where the source still is as it was, and where there is no such copy."""
    run = run_of(("raw", "lngs", "transferred"))
    assert why_not(run, PATH) is None
    update = new_request(run, PATH, "me@here", NOW)
    assert CopyIs(THERE, {"status": "transferred", "owner": None}) in update.expect
    assert len(update.expect) == 2


@pytest.mark.replicaset
@pytest.mark.parametrize(
    ("fields", "left"),
    [({}, "/data/1"), ({"trigger": "chicago: pull: raw at lngs", "status_since": NOW}, None)],
    ids=["an old program's", "ours"],
)
def test_a_copy_that_failed_can_be_asked_for(
    asking: Caxev, database: Named, fields: dict[str, Any], left: str | None
) -> None:
    """Whoever failed; what an old program left under the name is remembered, to be gone on with."""
    insert(database, ("raw", "lngs", "transferred"), ("raw", "chicago", "error"))
    change(database, location="/data/1", **fields)
    assert asking(*COPY, "--no-wait").code == 0
    asked = entries(database)[1]
    assert (asked["status"], asked["source"], asked["location"]) == ("requested", "lngs", None)
    with MongoClient[dict[str, Any]](database.uri) as client:
        document = client[database.name]["runs_new"].find_one({"number": 1})
    assert document is not None
    assert [row["location"] for row in document.get("given_up", [])] == ([left] if left else [])


@pytest.mark.replicaset
async def test_of_many_who_ask_one_is_heard(database: Named) -> None:
    """However many ask for one copy at once, there is one entry."""
    insert(database)
    won: list[Run | None] = []
    async with engine.opened(database) as db:
        (run,) = await db.select(Selection(), NOW)

        async def ask(number: int) -> None:
            won.append(await db.update_run(new_request(run, PATH, f"{number}@here", NOW), NOW))

        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(ask, number)
    assert len([one for one in won if one]) == 1
    assert len(entries(database)) == 2


# -- taking back ----------------------------------------------------------------------------------


@pytest.mark.replicaset
def test_cancel(asking: Caxev, database: Named) -> None:
    """What nobody has begun can be taken back; a second time there is nothing."""
    insert(database)
    before = entries(database)
    asking(*COPY, "--no-wait")
    answer = asking(*COPY, "--cancel", "--json")
    assert (answer.code, answer.rows[0]["state"]) == (0, "withdrawn")
    assert entries(database) == before
    none = asking(*COPY, "--cancel")
    assert (none.code, "no raw copy at chicago is requested for run 1" in none.out) == (1, True)


@pytest.mark.replicaset
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"status": "transferring"}, "raw at chicago is transferring: too late"),
        ({"source": "depot"}, "raw at chicago was requested from depot"),
    ],
    ids=str,
)
def test_what_cannot_be_taken_back(
    asking: Caxev, database: Named, fields: dict[str, str], words: str
) -> None:
    """What has begun, or what was asked for otherwise, stays."""
    insert(database)
    asking(*COPY, "--no-wait")
    change(database, **fields)
    before = entries(database)
    late = asking(*COPY, "--cancel")
    assert (late.code, words in late.out) == (1, True)
    assert entries(database) == before


@pytest.mark.replicaset
def test_explain_knows_who_asked(asking: Caxev, database: Named) -> None:
    """`explain` tells who wants a copy that is only requested, and from where."""
    insert(database)
    asking(*COPY, "--no-wait")
    out = asking("explain", "--run", "1", "--site", "chicago").out
    (line,) = [line for line in out.splitlines() if line.startswith("raw at chicago: requested by")]
    assert ", from lngs, 20" in line


# -- how it stands --------------------------------------------------------------------------------


def pair(run: Run, outcome: Outcome | None, *, site: str = "chicago", after: str = "") -> Any:
    """A reaction to the copy that is wanted, as the ledger has it."""
    copy = run.copy(WANTED)
    assert copy is not None
    event = Event(run.id, WANTED, None, after or copy.seen_as)
    reaction = claim(Reaction(site, event, "pull", lane="transfer", generation=1, at=NOW), 1)
    progress = {"progress": {"done": 3, "total": 9}} if outcome is None else {}
    return (settle(reaction, outcome, NOW, allowed=3, jitter=0) if outcome else reaction), progress


def test_how_a_copy_stands() -> None:
    """Only an end is over; a request is, too, once all that reacted to it have let it be."""

    def at(status: str, **fields: Any) -> Run:
        run = run_of(("raw", "lngs", "transferred"), ("raw", "chicago", status))
        run.document["data"][1].update(fields)
        return Run.from_document(run.document)

    look = partial(copy_state, key=WANTED)
    asked = at("requested")
    assert look(None, reactions=()).over
    assert look(run_of(), reactions=()).status == GONE
    assert look(at("transferred"), reactions=()) == CopyState("transferred", over=True)
    assert look(at("error", error="bad"), reactions=()) == CopyState("error", "bad", over=True)
    assert look(asked, reactions=()) == CopyState("requested")
    at_work = look(asked, reactions=[pair(asked, None)])
    assert (at_work.line, at_work.over) == ("requested: 3 B of 9 B", False)
    seen = partial(look, asked, seen_as=asked.copies[1].seen_as)
    skipped = seen(reactions=(), declined="pull at chicago: full")
    assert (skipped.line, skipped.over) == ("requested: pull at chicago: full", True)
    assert seen(reactions=()).line == "requested: no handler makes this copy"
    assert not seen(reactions=[pair(asked, None)]).over
    assert not look(asked, reactions=(), seen_as="error@1").over
    assert look(asked, reactions=[pair(asked, Failed("no"))]).over
    assert not look(asked, reactions=[pair(asked, Failed("no")), pair(asked, None)]).over
    assert look(asked, reactions=[pair(asked, Failed("no"), after="requested@1")]) == CopyState(
        "requested"
    )
    begun = at("transferring")
    assert not look(begun, reactions=(), seen_as=begun.copies[1].seen_as).over


def test_only_what_makes_the_copy_is_shown() -> None:
    """What looks after it, or has begun to react to it, is no news of the copy."""
    fields = {"trigger": "chicago: pull: raw at chicago", "status_since": NOW}
    document = run_of(("raw", "lngs", "transferred"), ("raw", "chicago", "transferring")).document
    document["data"][1].update(fields)
    run = Run.from_document(document)
    copy = run.copy(WANTED)
    assert copy is not None

    def waiting(handler: str, note: str, after: str) -> Any:
        event = Event(run.id, WANTED, None, after)
        made = Reaction("chicago", event, handler, lane="x", generation=1, at=NOW)
        return evolve(made, note=note), {}

    pull = waiting("pull", "the disk is away", "requested@1")
    others = [
        waiting("stalled", "it is transferring since lately", copy.seen_as),
        waiting("make_room", "there is room", copy.seen_as),
    ]
    assert copy_state(run, WANTED, others).line == "transferring"
    told = copy_state(run, WANTED, [*others, pull]).line
    assert told == "transferring: pull at chicago: the disk is away"


def test_a_running_reaction_shows_from_where_to_where() -> None:
    """By the entry that it has claimed; one that makes no copy shows neither."""
    document = run_of(("raw", "lngs", "transferred"), ("raw", "chicago", "transferring")).document
    document["data"][1] |= {"trigger": "chicago: pull: raw at lngs", "source": "lngs"}
    run = Run.from_document(document)
    event = Event(run.id, THERE, None, "transferred")
    made = Reaction("chicago", event, "pull", lane="transfer", generation=1, at=NOW)
    running = evolve(made, started=NOW)
    assert running_cells(running, run) == {"from": "lngs", "to": "chicago", "started": NOW}
    assert running_cells(evolve(running, handler="checksum"), run)["to"] is None
    assert running_cells(running, None) == {"from": None, "to": None, "started": NOW}


# -- watching -------------------------------------------------------------------------------------


@asynccontextmanager
async def watching(asking: Caxev, *args: str) -> Any:
    """The command in a thread of its own; at the end its answer is the one item of the list."""
    answers: list[Answer] = []

    async def ask() -> None:
        answers.append(await trio.to_thread.run_sync(asking, *COPY, *args))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        yield answers


async def until_requested(db: Database) -> Run:
    async def requested() -> Run | None:
        (run,) = await db.select(Selection(), NOW)
        copy = run.copy(WANTED)
        return run if copy is not None and copy.status == REQUESTED else None

    run: Run = await engine.until(requested)
    return run


async def step(db: Database, run: Run, status: str, **fields: Any) -> Run:
    copy = run.copy(WANTED)
    assert copy is not None
    after = await db.update_run(RunUpdate.change_copy(run, copy, status, **fields), NOW)
    assert after is not None
    return after


async def at_work(db: Database, run: Run) -> Callable[[Mapping[str, Any]], Any]:
    """A reaction to the request, claimed at chicago; returns how to say how far it is."""
    taken = await db.acquire("chicago", "fake", 60.0, NOW)
    assert taken is not None
    copy = run.copy(WANTED)
    assert copy is not None
    event = Event(run.id, WANTED, None, copy.seen_as)
    reaction = claim(
        Reaction("chicago", event, "pull", lane="transfer", generation=1, at=NOW),
        taken[0].epoch,
    )
    await db.ingest(taken[0], Ingest({}, [reaction]), NOW)
    return lambda row: db.progress(reaction, taken[0], dict(row))


@pytest.mark.replicaset
async def test_a_copy_is_watched_to_its_end(asking: Caxev, database: Named) -> None:
    """Each change of status and each word of progress is a line; the end is one JSON object."""
    insert(database)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    async with engine.opened(database) as db:
        with started(database, "--json", **streams) as process:
            assert process.stdout is not None
            assert process.stderr is not None

            async def line(wanted: str) -> None:
                """Read on to that line."""
                assert process.stderr is not None
                while (found := await trio.to_thread.run_sync(process.stderr.readline)).strip():
                    if found.decode().strip() == wanted:
                        return
                raise AssertionError(wanted)

            await line("requested")
            run = await until_requested(db)
            say = await at_work(db, run)
            run = await step(db, run, TRANSFERRING)
            await line("transferring")
            await say({"done": 1_000_000, "total": 4_000_000, "rate": 1e6})
            await line("transferring: 1 MB of 4 MB, 1 MB/s, 3 s left")
            run = await step(db, run, "verifying")
            await line("verifying: 1 MB of 4 MB, 1 MB/s, 3 s left")
            await step(db, run, TRANSFERRED)
            await line("transferred")
            told = json.loads(process.stdout.read())
            assert process.wait() == 0
    assert told.pop("seconds") > 0
    assert told.pop("run")["number"] == 1
    assert told == {
        "from": "lngs",
        "to": "chicago",
        "status": "transferred",
        "bytes": 4_000_000,
    }


@pytest.mark.replicaset
@pytest.mark.parametrize(
    ("status", "fields", "line"),
    [
        ("error", {"error": "2 files differ"}, "error: 2 files differ"),
        (None, {}, "gone: the request was withdrawn"),
    ],
)
async def test_a_bad_end(
    asking: Caxev, database: Named, status: str | None, fields: dict[str, str], line: str
) -> None:
    """An entry that becomes `error`, or vanishes, ends the watching with exit code 1."""
    insert(database)
    async with engine.opened(database) as db:
        async with watching(asking) as answers:
            run = await until_requested(db)
            copy = run.copy(WANTED)
            assert copy is not None
            if status is None:
                await engine.write(db, RunUpdate.remove_copy(run, copy))
            else:
                await step(db, run, status, **fields)
        (answer,) = answers
    assert (answer.code, answer.out.splitlines()[-1]) == (1, line)


@pytest.mark.replicaset
@pytest.mark.parametrize(
    ("result", "code", "line"),
    [
        (TRANSFERRED, 0, "transferred"),
        (Skip("not mine"), 1, "recall at chicago: lngs has it too, and comes first"),
        (GiveUp("no way"), 1, "no way"),
    ],
    ids=str,
)
async def test_a_listener_does_it(
    asking: Caxev, database: Named, result: Any, code: int, line: str
) -> None:
    """A real listener reacts to the request; what it makes of it is the end of the watching.

    If it does nothing, the command says what its own handlers would say of the request.
    """

    async def pull(job: Job) -> RunUpdate | Skip:
        assert job.copy is not None
        if isinstance(result, Exception):
            raise result
        if isinstance(result, Skip):
            return result
        mine = (await job.update(RunUpdate.change_copy(job.run, job.copy, TRANSFERRING))).copy(
            job.copy.key
        )
        assert mine is not None
        return RunUpdate.change_copy(job.run, mine, result)

    one = engine.handler(pull, on_copy(REQUESTED, host=HERE), lane="transfer")
    options = engine.options_for(database, [one], site="chicago")
    insert(database)
    async with engine.opened(database) as db, engine.listener(db, options):

        async def active() -> bool:
            record = await db.site_record("chicago")
            return record is not None and record.active

        await engine.until(active)
        answer = await trio.to_thread.run_sync(asking, *COPY)
    assert answer.code == code
    assert line in answer.out.splitlines()[-1]
    assert "no listener is active" not in answer.out


@pytest.mark.replicaset
def test_a_timeout_leaves_the_request(asking: Caxev, database: Named) -> None:
    """When its time is up the command ends with 1; it says how to take the request back."""
    insert(database)
    answer = asking(*COPY, "--timeout", "0.5")
    assert answer.code == 1
    assert answer.err.startswith("caxev: not done after 0.5 s; the request stands; to withdraw it")
    back = (
        answer.err.strip().partition(": caxev ")[2].partition(": caxev ")[2]
        or (answer.err.strip().rpartition("caxev ")[2])
    )
    assert entries(database)[1]["status"] == "requested"
    assert asking(*back.split()).code == 0
    assert len(entries(database)) == 1


def started(database: Named, *args: str, **streams: Any) -> subprocess.Popen[bytes]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("CAXEV_", "MONGO_"))}
    env |= {"CAXEV_MONGO_URI": database.uri, "CAXEV_DATABASE": database.name, "COLUMNS": "200"}
    return Forked([*COPY, *args], env, **streams)


@pytest.mark.replicaset
async def test_ctrl_c_leaves_the_request(asking: Caxev, database: Named) -> None:
    """Interrupted, it says how to take the request back, and leaves it standing."""
    insert(database)
    with started(database, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        # The second line comes when the watching is about to begin.
        assert process.stdout.readline() == b"requested\n"
        assert b"no listener is active" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out = (await trio.to_thread.run_sync(process.stdout.read)).decode()
        assert process.wait() == 130
    assert out.startswith("interrupted: the request stands; to withdraw it: caxev copy --run 1 ")
    assert out.endswith("caxev copy --run 1 --type raw --to chicago --cancel\n")
    assert entries(database)[1]["status"] == "requested"


@pytest.mark.replicaset
async def test_a_terminal_gets_a_bar(asking: Caxev, database: Named) -> None:
    """On a terminal there is a bar with bytes, rate and time left; its last word is the end."""
    insert(database)
    ours, theirs = pty.openpty()
    async with engine.opened(database) as db:
        with started(database, stdout=theirs, stderr=theirs) as process:
            os.close(theirs)
            seen: list[bytes] = []

            def read() -> bool:
                try:
                    seen.append(os.read(ours, 65536))
                except OSError:  # the other end was closed
                    return False
                return True

            run = await until_requested(db)
            say = await at_work(db, run)
            run = await step(db, run, TRANSFERRING)
            await say({"done": 1_000_000, "total": 4_000_000, "rate": 1e6})
            while b"3 s left" not in b"".join(seen):
                assert await trio.to_thread.run_sync(read)
            await step(db, run, TRANSFERRED)
            while await trio.to_thread.run_sync(read):
                pass
            assert process.wait() == 0
    os.close(ours)
    text = b"".join(seen).decode()
    assert "━" in text
    assert "1 MB of 4 MB, 1 MB/s, 3 s left" in text
    assert re.search(r"\x1b\[2Ktransferred\r?$", text, re.MULTILINE)
