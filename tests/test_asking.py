"""What people ask of many runs: one request each for what listeners do, and its row of history."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from operator import itemgetter
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
import trio
from attrs import define, evolve
from pymongo import MongoClient

from caxev import HERE, Job
from caxev import copy as on_copy
from caxev.asking import requests
from caxev.asking.annotations import CommentRuns, TagRuns
from caxev.asking.archives import BringRaw, ReadArchived
from caxev.asking.base import DONE, FAILED, Act, ActContext, DataChoice, RequestedAct
from caxev.asking.catalogues import CopyCatalogued, FreeDisk, GiveUpDatasets
from caxev.asking.copies import CopyData
from caxev.asking.deletions import DeleteCopies, ForgetCopies, Terms, WithdrawDeletions
from caxev.asking.holding import HoldCopies, Keep, ReleaseCopies
from caxev.asking.listeners import ListenerAct, Replay, RetryReactions
from caxev.asking.readings import ReadCopies
from caxev.cli import cli
from caxev.core.clock import utcnow
from caxev.core.errors import NothingToDo
from caxev.core.model import Run
from caxev.core.selection import CopyPattern
from caxev.database import BulkRequest
from tests import engine
from tests.conftest import Database as Named
from tests.forked import Forked
from tests.test_cli import Answer, Caxev, assert_one_line, caxev, online  # noqa: F401  # fixtures
from tests.test_rm import SITES, entry
from tests.test_tape import killed_at

Document = dict[str, Any]
MANY = 22
REQUEST = "3f9ac0d1"
AT = ("--site", "lngs")


# -- how far a run is -----------------------------------------------------------------------------


def run_with(*entries: Document, **fields: Any) -> Run:
    return Run.from_document({**engine.run_document(1), "data": list(entries), **fields})


def going(**fields: Any) -> Document:
    wish = {"by": "me", "why": "x", "keep": 1, "at": utcnow(), "was": "transferred"}
    return entry("lngs", status="deleting", deletion={**wish, "bulk": REQUEST}, **fields)


ASKED = {"check_asked": [{"id": REQUEST, "at": None}]}
ANSWERED = {**ASKED, "check_answered": [REQUEST]}
STATES: tuple[tuple[RequestedAct, Run, str | None], ...] = (
    (CopyData(DataChoice("raw"), None, "lngs"), run_with(entry("lngs")), None),
    (CopyData(DataChoice("raw"), None, "lngs"), run_with(entry("lngs", bulk=REQUEST)), DONE),
    (
        CopyData(DataChoice("raw"), None, "lngs"),
        run_with(entry("lngs", bulk=REQUEST, status="verifying")),
        "verifying",
    ),
    (
        CopyData(DataChoice("raw"), None, "lngs"),
        run_with(entry("lngs", bulk=REQUEST, status="error")),
        FAILED,
    ),
    (DeleteCopies("lngs", DataChoice("raw")), run_with(going()), "deleting"),
    (DeleteCopies("lngs", DataChoice("raw")), run_with(entry("lngs")), None),
    (
        DeleteCopies("lngs", DataChoice("raw")),
        run_with(deleted_data=["odd", {"host": "lngs", "bulk": REQUEST}]),
        DONE,
    ),
    (ReadCopies(), run_with(entry("lngs")), None),
    (ReadCopies(), run_with(entry("lngs", **ASKED)), "asked"),
    (ReadCopies(), run_with(entry("lngs", **ANSWERED), entry("chicago", **ASKED)), "asked"),
    (ReadCopies(), run_with(entry("lngs", **ANSWERED)), DONE),
    (ReadCopies(), run_with(entry("lngs", status="error", **ANSWERED)), FAILED),
)


@pytest.mark.parametrize(("act", "run", "state"), STATES)
def test_how_far_a_run_is(act: RequestedAct, run: Run, state: str | None) -> None:
    """Its entries show it, and what is neither there nor deleted is open again."""
    assert act.state_of(run, REQUEST) == state


RAW = DataChoice("raw")
KEPT: tuple[Act | ListenerAct, ...] = (
    CopyData(RAW, None, "lngs", Keep(3.0, utcnow(), "for a talk")),
    CopyData(DataChoice("processed", "v1"), "chicago", "lngs"),
    DeleteCopies("lngs", RAW, Terms(less=True, why="full")),
    WithdrawDeletions("lngs", RAW),
    ReadCopies(CopyPattern(host="lngs")),
    BringRaw(("lngs", "chicago"), "tape", held=True),
    ReadArchived("tape"),
    CopyCatalogued(RAW, "rucio", "lngs", {"from_rse": "DISK1"}),
    GiveUpDatasets("rucio", RAW, "taken in error"),
    FreeDisk("lngs", RAW, "rucio"),
    TagRuns("good", remove=True),
    CommentRuns("the gate was open"),
    HoldCopies("lngs", RAW, Keep(3.0, utcnow(), "for a talk")),
    ReleaseCopies("lngs", RAW, everybody=True),
    ForgetCopies("tape", RAW, "lost", "error"),
    RetryReactions(("lngs", "chicago"), "pull"),
    Replay(("lngs",), force=True),
)


@pytest.mark.parametrize(
    "act",
    [
        CopyCatalogued(DataChoice("processed"), "lngs", "rucio"),
        GiveUpDatasets("rucio", DataChoice("processed"), "full"),
        FreeDisk("lngs", DataChoice("processed"), "rucio"),
    ],
    ids=lambda act: act.kind,
)
def test_of_several_versions_none_is_guessed(act: Act) -> None:
    """Neither to be uploaded nor to be deleted: the others would stay behind unseen."""
    data = [
        {"type": "processed", "host": host, "pax_version": version, "status": "transferred"}
        for host in ("lngs", "rucio")
        for version in ("v1", "v2")
    ]
    nobody: Any = None  # these acts are refused before they ask
    run = Run.from_document({"_id": 1, "number": 1, "data": data})
    (step,) = act.tried(run, ActContext(nobody, nobody, "me@here"))
    assert (step.update, "(v1, v2): choose one by --version" in step.state) == (None, True)


def test_a_request_is_kept_whole() -> None:
    """Every act that is kept is the same when it is read; one of another version is named."""
    assert {act.kind for act in KEPT} == {*requests.KINDS}
    whole = BulkRequest(id=REQUEST, kind="", runs=(), terms={}, by="me", at=utcnow())
    for act in KEPT:
        one = evolve(whole, kind=act.kind, terms=requests._converter.unstructure(act))
        assert requests.act_of(one) == act
    for odd in (evolve(whole, kind="dance"), evolve(whole, kind="rm", terms={"site": 5})):
        with pytest.raises(NothingToDo, match=f"{REQUEST} .* another version"):
            requests.act_of(odd)


def test_what_has_begun_is_not_taken_back() -> None:
    """Nor what another request asked for."""
    nobody: Any = None
    context = ActContext(nobody, nobody, "me@here", request=REQUEST)
    act, moment = DeleteCopies("lngs", DataChoice("raw")), utcnow()
    assert list(act.withdrawals(run_with(going(erasing=moment)), context)) == []
    (step,) = act.withdrawals(run_with(going()), context)
    assert step.row is not None
    assert (step.row.deed.what, step.row.deed.by) == ("cancelled", "me@here")
    copy = CopyData(DataChoice("raw"), None, "lngs")
    begun = entry("lngs", bulk=REQUEST, status="transferring")
    other = entry("lngs", bulk="another", status="requested")
    assert [list(copy.withdrawals(run_with(one), context)) for one in (begun, other)] == [[], []]
    read = run_with(entry("lngs", **ANSWERED), entry("chicago", **ASKED))
    assert [one.what for one in ReadCopies().withdrawals(read, context)] == ["raw at chicago"]


# -- in the database ------------------------------------------------------------------------------


@pytest.fixture
def asking(online: Caxev, database: Named) -> Caxev:  # noqa: F811  # the fixture
    """The command line, with runs at three sites."""
    Path("sites.json").write_text(json.dumps(SITES))
    documents = []
    for number in range(1, MANY + 1):
        data = [entry(one, location=f"/{one}/{number}") for one in ("lngs", "chicago", "stockholm")]
        fields = {"data": data, "raw_size_byte": 10**9}
        documents.append({**engine.run_document(number), **fields})
    with MongoClient[Document](database.uri) as client:
        client[database.name]["runs_new"].insert_many(documents)
    return online


def found(database: Named, collection: str, **query: Any) -> list[Document]:
    with MongoClient[Document](database.uri, tz_aware=True) as client:
        return list(client[database.name][collection].find(query))


def only_request(database: Named) -> Document:
    (request,) = found(database, "caxev_requests", terms={"$exists": True})
    return request


def what_was_asked(request: Document) -> Document:
    """A request's document without what it says of the process that writes."""
    return {name: request[name] for name in request.keys() - {"written", "failed", "writer"}}


def figures(asking: Caxev) -> tuple[int, int, int]:
    """How much of the only request is done, pending and withdrawn."""
    answer = asking("requests", "--json")
    (row,) = answer.rows
    return row["done"], row["pending"], row["withdrawn"]


BULK = (
    ("rm", "--run", f"1-{MANY}", *AT, "--yes"),
    ("verify", "--run", f"1-{MANY}", "--site", "chicago", "--deep", "--yes"),
    ("replay", "--run", f"1-{MANY}", *AT, "--yes"),
    ("copy", "--run", f"1-{MANY}", "--to", "depot", "--yes", "--no-wait"),
)


@pytest.mark.replicaset
@pytest.mark.parametrize("args", BULK, ids=lambda args: str(args[0]))
def test_one_request_that_can_be_cancelled_and_resumed(
    asking: Caxev, database: Named, args: Sequence[str]
) -> None:
    """Whatever listeners do for it; nothing is left of what was cancelled."""
    before = [run["data"] for run in found(database, "runs_new")]
    answer = asking(*args)
    assert answer.code == 0, answer
    assert figures(asking) == (0, MANY, 0)
    request = only_request(database)
    assert request["expires"] - request["at"] == timedelta(days=730)
    name = request["_id"]
    if args[0] != "copy":
        assert f"caxev requests watch {name}" in answer.err
    assert asking("requests", "cancel", name).code == 0
    assert figures(asking) == (0, 0, MANY)
    rows = Counter(row["what"] for row in found(database, "caxev_history"))
    assert rows["requested"] == rows["cancelled"] == rows.total() / 2
    after = [run["data"] for run in found(database, "runs_new")]
    if args[0] in {"copy", "replay"}:
        assert after == before
    assert not found(database, "caxev_requests", site="lngs")
    assert asking("requests", "resume", name, "--no-wait").code == 0
    assert figures(asking) == (0, MANY, 0)
    assert what_was_asked(only_request(database)) == what_was_asked(request)


@pytest.mark.replicaset
async def test_a_replay_is_done_when_the_listener_has_taken_it(
    asking: Caxev, database: Named
) -> None:
    """It is found by renewing the lease, without a write to what the listener keeps."""
    seen = []

    async def see(job: Job) -> None:
        seen.append(job.run.number)

    one = engine.handler(see, on_copy("transferred", host=HERE))
    options = engine.options_for(database, [one])
    async with engine.opened(database) as db, engine.listener(db, options):
        await engine.until(lambda: len(seen) == MANY)
        run = trio.to_thread.run_sync
        args = ("replay", "--run", f"1-{MANY}", *AT, "--yes", "--force")
        answer = await run(lambda: asking(*args))
        assert answer.code == 0, answer
        await engine.until(lambda: len(seen) == 2 * MANY)
        assert await run(figures, asking) == (MANY, 0, 0)
        # What a listener has taken is not asked for again.
        name = only_request(database)["_id"]
        assert (await run(lambda: asking("requests", "resume", name))).code == 0
        assert not found(database, "caxev_requests", bulk=name)


@pytest.mark.replicaset
def test_a_row_of_history_is_as_sure_as_its_change(asking: Caxev, database: Named) -> None:
    """If the one cannot be written, the other is not; then there is one of each."""
    acts = (
        ("hold", "--run", "1-3", *AT),
        ("tag", "add", "good", "--run", "1-3"),
        ("rm", "--run", "1-3", *AT),
        ("replay", "--run", "1", *AT),
        ("replay", "--run", "1-3", *AT),
    )
    before = found(database, "runs_new")
    with MongoClient[Document](database.uri) as client:
        client[database.name].command("create", "caxev_history", validator={"never": True})
        for args in acts:
            assert asking(*args).code == 4, args
        assert found(database, "runs_new") == before
        assert not found(database, "caxev_requests", site="lngs")
        client[database.name].command("collMod", "caxev_history", validator={})
    for args in acts[:2]:
        for _ in range(2):  # given twice, it is done once
            assert asking(*args).code == 0, args
    rows = found(database, "caxev_history")
    assert [row["what"] for row in rows].count("tagged") == 3
    assert {row["number"] for row in rows if row["what"] == "held"} == {1, 2, 3}
    assert all("@" in row["by"] for row in rows)
    assert asking("comment", "the gate was open", "--run", "1").code == 0
    # What concerns no site is found, too: of the run, and of all.
    of_run = {row["what"] for row in asking("history", "--run", "1", "--json").rows}
    assert of_run >= {"commented", "tagged", "held"}
    assert len(asking("history", "--what", "tagged", "--json").rows) == 3


# -- what is done once it is written --------------------------------------------------------------

WHOLE = 60
TAG = ("tag", "add", "good")
HOLD = ("hold", *AT, "--why", "a talk")
COMMENT = ("comment", "the gate was open")


@pytest.fixture
def many(asking: Caxev, database: Named) -> Caxev:
    """The command line, with more runs than are written to at once."""
    more = [engine.run_document(number) for number in range(MANY + 1, WHOLE + 1)]
    for document in more:
        document["data"] = [entry("lngs", location=f"/lngs/{document['number']}")]
    with MongoClient[Document](database.uri) as client:
        client[database.name]["runs_new"].insert_many(more)
    return asking


def marks(database: Named) -> list[tuple[str, int]]:
    """Each run, and how often it has the tag, the hold or the comment."""
    return [
        (
            str(run["_id"]),
            sum(len(one) for one in (run.get("tags", ()), run.get("comments", ())))
            + len(run["data"][0].get("holds", ())),
        )
        for run in found(database, "runs_new")
    ]


def written(database: Named) -> int:
    """How many runs have it; none has it twice, and each has its row of history."""
    counts = marks(database)
    assert max(number for _, number in counts) <= 1
    rows = sorted(str(row["run"]) for row in found(database, "caxev_history"))
    assert rows == sorted(run for run, number in counts if number)
    return len(rows)


def wait(condition: Callable[[], bool]) -> None:
    deadline = monotonic() + 60
    while not condition():
        assert monotonic() < deadline
        sleep(0.05)


@define
class Going:
    """A command of a process of its own; how it ended, and what it printed for people."""

    process: subprocess.Popen[str]
    code: int | None = None
    err: str = ""

    def end(self) -> None:
        _, self.err = self.process.communicate(timeout=240)
        self.code = self.process.returncode


@contextmanager
def stopped_at(
    database: Named,
    args: Sequence[str],
    number: int,
    done: Callable[[Named], int] = lambda database: sum(count for _, count in marks(database)),
) -> Iterator[Going]:
    """A command that has written to so many runs, and waits; it goes on and ends afterwards."""
    with MongoClient[Document](database.uri) as client, client.start_session() as session:
        runs = client[database.name]["runs_new"]
        with session.start_transaction():
            # Somebody else writes to one of the next group: until that ends, the command waits.
            runs.update_one({"number": number + 19}, {"$set": {"x": 1}}, session=session)
            with started(database, args) as process:
                going = Going(process)
                try:
                    wait(lambda: done(database) == number)
                    yield going
                finally:
                    session.abort_transaction()
                if going.code is None:
                    going.end()


@pytest.mark.replicaset
def test_ctrl_c_leaves_what_is_done(many: Caxev, database: Named) -> None:
    """The rest is withdrawn; resumed, it is done, each run once."""
    with stopped_at(database, TAG, 40) as going:
        assert figures(many) == (40, 20, 0)
        assert many("requests", "--json").rows[0]["seconds_left"] > 0
        going.process.send_signal(signal.SIGINT)
        going.end()
    name = only_request(database)["_id"]
    assert (going.code, figures(many)) == (130, (40, 0, 20)), going
    assert f"request {name}: 60 runs, add tag 'good'" in going.err
    assert f"40 of 60 runs written; caxev requests resume {name} does the rest" in going.err
    assert many("requests", "resume", name).code == 0
    assert (written(database), figures(many)) == (WHOLE, (WHOLE, 0, 0))
    assert many("requests", "resume", name).code == 0
    assert written(database) == WHOLE


@pytest.mark.replicaset
def test_another_terminal_cancels_it(many: Caxev, database: Named) -> None:
    """The command ends with the reason, and nothing more is written."""
    with stopped_at(database, HOLD, 40) as going:
        name = only_request(database)["_id"]
        cancelled = many("requests", "cancel", name)
        assert (cancelled.code, "withdrawn: 20 runs" in cancelled.out) == (0, True)
    assert (going.code, f"request {name} was cancelled" in going.err) == (1, True), going
    assert (written(database), figures(many)) == (40, (40, 0, 20))
    resumed = many("requests", "resume", name)
    assert (resumed.code, resumed.out.splitlines()[-1]) == (0, "60 of 60 done")
    assert written(database) == WHOLE


@pytest.mark.replicaset
def test_nothing_is_requested_behind_a_cancellation(many: Caxev, database: Named) -> None:
    """Although the command that requests has not finished when another terminal cancels it."""

    def requested(database: Named) -> int:
        return len(found(database, "runs_new", **{"data.host": "depot"}))

    with stopped_at(database, ("copy", "--to", "depot", "--no-wait"), 20, requested) as going:
        name = only_request(database)["_id"]
        assert figures(many) == (0, WHOLE, 0)
        assert many("requests", "cancel", name).code == 0
    assert (going.code, f"request {name} was cancelled" in going.err) == (1, True), going
    assert (requested(database), figures(many)) == (0, (0, 0, WHOLE))


@pytest.mark.replicaset
def test_readings_are_asked_for_until_they_are_cancelled(many: Caxev, database: Named) -> None:
    """`verify` asks for them one by one, while it reads what is here."""

    def asked(database: Named) -> int:
        return len(found(database, "runs_new", **{"data.check_asked": {"$exists": True}}))

    verify = ("verify", "--site", "chicago", "--deep")
    with stopped_at(database, verify, 1, lambda database: asked(database) - 18) as going:
        name = only_request(database)["_id"]
        assert many("requests", "cancel", name).code == 0
    assert (going.code, f"request {name} was cancelled" in going.err) == (1, True), going
    pending = {"data.check_asked.id": name}
    assert (found(database, "runs_new", **pending), figures(many)) == ([], (0, 0, MANY))


@pytest.mark.replicaset
def test_killed_it_is_resumed(many: Caxev, database: Named) -> None:
    """After kill -9 it is seen to wait for somebody; even a comment is not written twice."""
    at = ("--mongo-uri", database.uri, "--database", database.name)
    command = [*COMMENT, *ALL, *at]
    assert killed_at("engine:database.asked.after:2", lambda: cli.main(command, "caxev"))
    assert (written(database), figures(many)) == (40, (40, 20, 0))
    assert many("requests", "resume", only_request(database)["_id"]).code == 0
    assert (written(database), figures(many)) == (WHOLE, (WHOLE, 0, 0))


@pytest.mark.replicaset
def test_one_process_writes(many: Caxev, database: Named) -> None:
    """If it is resumed while the command still runs, the command ends; each run is written once."""
    with stopped_at(database, COMMENT, 20) as going:
        name, writer = itemgetter("_id", "writer")(only_request(database))
        resuming = started(database, ("requests", "resume", name), which=())
        wait(lambda: only_request(database)["writer"] != writer)
    with resuming:
        assert resuming.wait(240) == 0
    assert (going.code, written(database), figures(many)) == (1, WHOLE, (WHOLE, 0, 0))


@pytest.mark.replicaset
def test_what_is_refused_is_tried_again(many: Caxev, database: Named) -> None:
    """A copy that went meanwhile has failed; once it is back, the rest is done."""
    with MongoClient[Document](database.uri) as client:
        runs = client[database.name]["runs_new"]
        with stopped_at(database, HOLD, 20):
            gone = runs.find_one_and_update({"number": WHOLE}, {"$set": {"data.0.host": "x"}})
        assert gone is not None
        assert figures(many) == (WHOLE - 1, 0, 0)
        assert [*only_request(database)["failed"]] == [gone["_id"]]
        runs.update_one({"number": WHOLE}, {"$set": {"data.0.host": "lngs"}})
    assert many("requests", "resume", only_request(database)["_id"]).code == 0
    assert (written(database), figures(many)) == (WHOLE, (WHOLE, 0, 0))


ALL = ("--run", f"1-{WHOLE}", "--yes")


def started(
    database: Named, args: Sequence[str], which: Sequence[str] = ALL
) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("CAXEV_", "MONGO_"))}
    env |= {"CAXEV_MONGO_URI": database.uri, "CAXEV_DATABASE": database.name}
    pipe = subprocess.PIPE
    return Forked([*args, *which], env, stdout=pipe, stderr=pipe, text=True)
