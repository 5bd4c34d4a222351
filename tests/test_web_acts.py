"""What operators do from the page: each act as by its command, and refused to everybody else."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from html.parser import HTMLParser
from itertools import cycle, product
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import pytest
import trio
from attrs import define
from bson import ObjectId
from pymongo import MongoClient
from starlette.datastructures import ImmutableMultiDict

from caxev.asking.base import Act
from caxev.asking.listeners import ListenerAct
from caxev.asking.readings import ReadCopies
from caxev.cli import cli, command, verify
from caxev.cli.options import GlobalOptions
from caxev.cli.selection import RunChoice
from caxev.copies.lifecycle import in_commands
from caxev.core.clock import utcnow
from caxev.core.errors import GiveUp
from caxev.core.job import Job, Result
from caxev.core.model import Copy, CopyKey, Run
from caxev.core.registry import tag
from caxev.core.selection import Selection, which
from caxev.core.update import RunUpdate
from caxev.web.acts.command_line import typed
from caxev.web.acts.doing import Wish
from caxev.web.acts.links import links_of as acts_on
from caxev.web.acts.links import naming
from caxev.web.acts.offers import OFFERS, without_copy
from caxev.web.listing import BadFilter, Filter
from tests import engine
from tests.conftest import Database as Named
from tests.engine import run_document
from tests.mongod import Cluster
from tests.page import SITES, Answer, Page, hostile_names, serving
from tests.test_cli import Caxev, caxev
from tests.test_web import Inside, failed

__all__ = ["caxev"]

# On one worker, since all of them share a page.
pytestmark = [pytest.mark.replicaset, pytest.mark.xdist_group("web-acts")]
OPTIONS = (
    *("--auth", "proxy", "--trust", "127.0.0.1", "--user-header", "X-User"),
    *("--groups-header", "X-Groups", "--operator", "--operator-group", "operators"),
)
NAME = "page_of_acts"
FIELDS: Mapping[str, Mapping[str, str]] = {
    "retry": {},
    "replay": {},
    "copy": {"to": "chicago", "keep-for": "14d", "why": "a talk"},
    "withdraw": {"to": "chicago"},
    "hold": {"site": "lngs", "keep-until": "2099-12-24"},
    "release": {"site": "lngs", "all": "yes"},
    "verify": {"site": "lngs", "type": "raw"},
    "recall": {"archive": "tape", "site": "lngs"},
    "tag": {"word": "good"},
    "untag": {"word": "good"},
    "comment": {"text": "the gate was open"},
    "vouch": {"site": "lngs", "why": "it was read by hand"},
    "rm": {"site": "lngs", "why": "too much"},
    "keep": {"site": "lngs"},
    "cancel": {"request": "3f9ac0d1"},
    "resume": {"request": "3f9ac0d1"},
}
"""Each act that is offered, with what its form must hold."""


class Form(HTMLParser):
    """The fields of the form by which an act is confirmed, and the commands that are shown."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fields: list[tuple[str, str]] = []
        self.inside = False
        self.command = ""
        self._in_code = False
        self.text = text
        self.feed(text)

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if name == "form":
            self.inside = given.get("method") == "post" and "/acts/" in (given["action"] or "")
        elif name == "input" and self.inside and given.get("type") == "hidden":
            self.fields.append((given["name"] or "", given.get("value") or ""))
        self._in_code = name == "code"

    def handle_data(self, data: str) -> None:
        if self._in_code and data.startswith("caxev "):
            self.command = data


@define
class Operator:
    """An operator before the page, behind the proxy; `groups` decide whether it is one."""

    page: Page
    name: str = "anna"
    groups: str = "operators"
    cookie: str = ""

    @property
    def headers(self) -> dict[str, Any]:
        return {"x_user": self.name, "x_groups": self.groups, "cookie": self.cookie}

    def get(self, path: str) -> Answer:
        answer = self.page.get(path, **self.headers)
        if "set-cookie" in answer.headers:
            self.cookie = answer.headers["set-cookie"].partition(";")[0]
        return answer

    def post(self, name: str, fields: Any, **headers: str) -> Answer:
        return self.page.post(f"/acts/{name}", fields, **{**self.headers, **headers})

    def plan(self, name: str, run: str = "1", **fields: str) -> Form:
        answer = self.get(address(name, {"run": run, **FIELDS[name], **fields}))
        assert answer.status == 200, answer.text
        return Form(answer.text)

    def act(self, name: str, run: str = "1", **fields: str) -> Answer:
        form = self.plan(name, run, **fields)
        assert form.fields, form.text
        return self.post(name, form.fields)


def address(name: str, fields: Mapping[str, str]) -> str:
    return f"/acts/{name}?{urlencode(fields)}"


def grant(mongod: Cluster, name: str) -> dict[str, str]:
    """Make an operator's user of a database, by the command; return how the page is given it."""
    password = secrets.token_urlsafe(12)
    command = [sys.executable, "-m", "caxev", "db", "grants", "--operator", name, "--apply"]
    where = {"CAXEV_MONGO_URI": mongod.uri, "CAXEV_SITES": str(SITES), "NEW_PASSWORD": password}
    environ = {**os.environ, **where, "CAXEV_DATABASE": name}
    subprocess.run(command, env=environ, check=True, capture_output=True)
    uri = f"mongodb://caxev_{name}@{mongod.address}&authSource=admin"
    return {"CAXEV_MONGO_OPERATOR_URI": uri, "MONGO_OPERATOR_PASSWORD": password}


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's sites, and an archive."""
    found = [*json.loads(SITES.read_text()), {"name": "tape", "method": "tsm"}]
    path = tmp_path_factory.mktemp("sites") / "sites.json"
    path.write_text(json.dumps(found))
    return path


@pytest.fixture(scope="module")
def served(
    mongod: Cluster, sites: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Page]:
    environ, directory = grant(mongod, NAME), tmp_path_factory.mktemp("acts")
    with serving(directory, mongod.uri, NAME, *OPTIONS, sites=sites, environ=environ) as made:
        made.ready()
        yield made
    assert "Traceback" not in made.log.read_text()


@pytest.fixture
def server(mongod: Cluster) -> Iterator[Any]:
    """The database, with three runs at two sites."""
    with MongoClient[dict[str, Any]](mongod.uri, tz_aware=True) as client:
        found = client[NAME]
        for one in ("runs_new", "caxev_ledger", "caxev_requests", "caxev_history"):
            found[one].delete_many({})
        found.runs_new.insert_many(map(good_run, (1, 2, 3)))
        yield found


def good_run(number: int, *more: str) -> dict[str, Any]:
    """A run of 1 GB with equal copies at two sites, or more."""
    copies = [("raw", site, "transferred") for site in ("lngs", "stockholm", *more)]
    document = run_document(number, *copies, raw_size_byte=10**9)
    for one in document["data"]:
        one |= {"checksum": "5" * 128, "location": f"/data/{one['host']}/raw/{number}"}
    return document


@pytest.fixture
def anna(served: Page, server: Any) -> Operator:
    del server
    return Operator(served)


def history(server: Any) -> list[Mapping[str, Any]]:
    return list(server.caxev_history.find({}))


# -- who may --------------------------------------------------------------------------------------


def test_each_act_is_refused_to_others(served: Page, server: Any, anna: Operator) -> None:
    """Without the session's token, from another origin, as a reader, as nobody, by GET."""
    assert FIELDS.keys() == OFFERS.keys()
    before = list(server.runs_new.find({}))
    bert = Operator(served, "bert", "readers")
    bert.get("/")
    for name, fields in FIELDS.items():
        assert anna.get(address(name, {"run": "1", **fields})).status in (200, 400), name
        good = [("token", token(anna)), ("run", "1"), *fields.items()]
        assert bert.get(address(name, {"run": "1", **fields})).status == 403, name
        assert bert.post(name, [("token", token(bert)), *good[1:]]).status == 403, name
        assert bert.post(name, good).status == 403, name
        for headers in (
            {"origin": "https://evil.example"},
            {"origin": "null"},
            {"sec_fetch_site": "cross-site"},
            {"cookie": ""},
            {"content_type": "text/plain"},
        ):
            assert anna.post(name, good, **headers).status in (403, 415), (name, headers)
        for wrong in ([], [("token", "")], [("token", token(bert))], [("token", "\xff")]):
            assert anna.post(name, [*wrong, *good[1:]]).status == 403, (name, wrong)
        assert served.post(f"/acts/{name}", good).status == 401, name
    assert list(server.runs_new.find({})) == before
    assert history(server) == []
    assert list(server.caxev_requests.find({})) == []


def token(operator: Operator) -> str:
    """The token of a session, by the form of an act that an operator sees."""
    if operator.groups != "operators":
        return "x" * 32
    return dict(operator.plan("comment").fields)["token"]


def test_nothing_acts_unless_it_is_asked_to(caxev: Caxev, mongod: Cluster, tmp_path: Path) -> None:
    """Without --operator there is no act; --operator needs people who log in, and a user."""
    options = (*OPTIONS[:8],)
    with serving(tmp_path, mongod.uri, NAME, *options) as page:
        reader = Operator(page)
        assert reader.get("/acts/retry?run=1").status == 404
        assert reader.post("retry", {"run": "1"}).status == 404
    for given, word in (
        (["--operator"], "--operator-group"),
        ([*OPTIONS[:8], "--operator"], "--operator-group"),
        ([*OPTIONS[:8], "--operator-group", "o"], "--operator"),
        (OPTIONS, "CAXEV_MONGO_OPERATOR_URI"),
    ):
        answer = caxev("--config", str(SITES), "web", *given, "--mongo-uri", "mongodb://x")
        assert (answer.code in (2, 3), word in answer.err) == (True, True), answer


# -- acts -----------------------------------------------------------------------------------------


def test_a_plan_is_shown_first(anna: Operator, server: Any) -> None:
    """It has counts, bytes, what is refused and why, and the command; a GET writes nothing."""
    server.runs_new.update_one({"number": 3}, {"$set": {"data.0.status": "error"}})
    text = anna.get(address("copy", {"run": "1-3", "to": "chicago", "from": "lngs"})).text
    assert "2 runs, 2" in text
    assert "is error" in text
    assert Form(text).command == "caxev copy --run=1-3 --no-wait --to=chicago --from=lngs"
    assert history(server) == []


def test_acts_are_done_in_the_person_s_name(anna: Operator, server: Any) -> None:
    """The name goes into the run, the request and the history."""
    assert anna.act("copy", "1", why="a talk").status == 200
    entry = server.runs_new.find_one({"number": 1})["data"][2]
    assert (entry["host"], entry["status"], entry["creation_place"]) == (
        "chicago", "requested", "anna",
    )  # fmt: skip
    assert entry["holds"][0]["by"] == "anna"
    assert anna.act("tag", "1-2").status == 200
    assert anna.act("comment", "2").status == 200
    assert anna.act("withdraw", "1").status == 200
    server.runs_new.insert_one(good_run(5, "chicago"))
    assert anna.act("rm", "5", site="chicago").status == 200
    assert anna.act("keep", "5", site="chicago").status == 200
    assert anna.act("hold", "2").status == 200
    assert anna.act("release", "2").status == 200
    assert anna.act("verify", "1-3").status == 200
    assert anna.act("replay", "1-3", site="lngs").status == 200
    assert anna.act("untag", "1").status == 200
    run = server.runs_new.find_one({"number": 2})
    assert (run["tags"][0]["user"], run["comments"][0]["user"]) == ("anna", "anna")
    rows = history(server)
    assert {row["by"] for row in rows} == {"anna"}
    assert any("too much" in row.get("reason", "") for row in rows)
    for kind, runs in (("verify", 3), ("tag", 2)):
        (request,) = server.caxev_requests.find({"kind": kind})
        assert (request["by"], len(request["runs"]), request["written"]) == ("anna", runs, runs)


def test_a_request_is_cancelled_and_resumed(anna: Operator, server: Any) -> None:
    """By its id; what is withdrawn can be asked for again."""
    assert anna.act("copy", "1-2").status == 200
    requested = {"data": {"$elemMatch": {"host": "chicago", "status": "requested"}}}
    (bulk,) = server.caxev_requests.find({"kind": "copy"})
    anna.page.until(lambda: f"/acts/cancel?request={bulk['_id']}" in anna.get("/requests").text)
    for name, left in (("cancel", 0), ("resume", 2)):
        fields = {"request": bulk["_id"]}
        form = Form(anna.get(address(name, fields)).text)
        assert form.command.startswith(f"caxev requests {name}")
        assert anna.post(name, form.fields).status == 200
        assert server.runs_new.count_documents(requested) == left
        assert not Form(anna.get(address(name, fields)).text).fields, "there is nothing to do"
    assert "no request" in anna.get(address("cancel", {"request": "x"})).text


def test_what_was_shown_is_what_is_done(anna: Operator, server: Any) -> None:
    """A plan that has changed since is shown again instead."""
    form = anna.plan("tag", "1-9")
    server.runs_new.insert_one(run_document(4, ("raw", "lngs", "transferred")))
    answer = anna.post("tag", form.fields)
    assert (answer.status, "4 runs" in answer.text) == (409, True)
    assert server.runs_new.count_documents({"tags": {"$ne": []}}) == 0
    assert anna.post("tag", Form(answer.text).fields).status == 200
    assert server.runs_new.count_documents({"tags": {"$ne": []}}) == 4


def test_a_form_that_is_sent_twice_is_done_once(anna: Operator, server: Any) -> None:
    """By a second click or a reload; the same may still be done again."""
    form = anna.plan("comment")
    assert [anna.post("comment", form.fields).status for _ in range(3)] == [200, 409, 409]
    assert len(server.runs_new.find_one({"number": 1})["comments"]) == 1
    again = Form(anna.post("comment", form.fields).text)
    assert anna.post("comment", again.fields).status == 200
    assert len(server.runs_new.find_one({"number": 1})["comments"]) == 2


def test_a_reason_is_needed(anna: Operator, server: Any) -> None:
    """For rm and vouch, also of who sends the form without its page."""
    server.runs_new.insert_one(good_run(5, "chicago"))
    for name in ("rm", "vouch"):
        form = anna.plan(name, "5", site="chicago")
        fields = [pair for pair in form.fields if pair[0] != "why"]
        for why in ([], [("why", "")], [("why", " \t")]):
            answer = anna.post(name, [*fields, *why])
            assert (answer.status, "Reason" in answer.text) == (400, True), (name, why)
    assert history(server) == []
    assert anna.act("vouch").status == 200
    (row,) = (row for row in history(server) if row["what"] == "vouched for")
    assert (row["by"], "it was read by hand" in row["reason"]) == ("anna", True)


def test_the_number_of_many_is_typed(anna: Operator, server: Any) -> None:
    """Above a hundred runs, and it must be right."""
    server.runs_new.insert_many(run_document(n, ("raw", "lngs", "error")) for n in range(11, 109))
    form = anna.plan("tag", "1-200")
    for count in ([], [("count", "100")], [("count", "")]):
        assert anna.post("tag", [*form.fields, *count]).status == 400
    assert server.runs_new.count_documents({"tags": {"$ne": []}}) == 0
    assert anna.post("tag", [*form.fields, ("count", "101")]).status == 200
    assert server.runs_new.count_documents({"tags": {"$ne": []}}) == 101


def test_all_that_failed_for_one_reason_are_selected(anna: Operator, server: Any) -> None:
    """From the failures: those runs, the handler and the site, and no other."""
    ids = {run["number"]: run["_id"] for run in server.runs_new.find({})}
    for number, why in ((1, "no route to /a"), (2, "no route to /b"), (3, "no disk")):
        server.caxev_ledger.insert_one(failed(ids[number], why, handler="pull", site="lngs"))
    anna.page.until(lambda: "3 reactions" in anna.get("/failures").text)
    text = anna.get("/failures").text
    links = [link for link in links_of(text) if link.startswith("/failures/retry")]
    (group,) = (link for link in links if "route" in link)
    going = anna.get(group)
    assert going.status == 303
    form = Form(anna.get(str(going.headers["location"])).text)
    assert ("run", "1-2") in form.fields
    assert "--run=1-2" in form.command
    assert anna.post("retry", form.fields).status == 200
    (request,) = server.caxev_requests.find({"site": "lngs"})
    assert (request["runs"], request["handler"]) == ([ids[1], ids[2]], "pull")
    for query, line in (
        ("", "--all"),
        ("site=lngs", "--all --site=lngs"),
        ("handler=pull", "--handler=pull"),
    ):
        going = anna.get(f"/failures/retry?{query}")
        assert Form(anna.get(str(going.headers["location"])).text).command == f"caxev retry {line}"
    assert any(link == "/failures/retry?" for link in links)


def test_more_runs_than_an_address_can_name_are_refused_in_words(
    anna: Operator, server: Any
) -> None:
    runs = [good_run(n) for n in range(1001, 5001, 2)]
    server.runs_new.insert_many(runs)
    server.caxev_ledger.insert_many(
        failed(one["_id"], why, handler="pull", site="lngs")
        for one, why in zip(runs, cycle(["no disk"] * 1999 + ["no route"]), strict=False)
    )
    anna.page.until(lambda: "2,000 reactions" in anna.get("/failures").text)
    links = links_of(anna.get("/failures").text)
    (group,) = (one for one in links if one.startswith("/failures/retry") and "disk" in one)
    answer = anna.get(group)
    assert (answer.status, "too many scattered runs" in answer.text) == (400, True)


def test_runs_that_cannot_be_named_are_not_all_runs() -> None:
    """A run may be gone, or have neither number nor name."""
    one, nameless = Run(id=1, number=1, name="a"), Run(id=2, detector="tpc")
    assert str(naming([one])) == "--run 1"
    for runs in ([], [nameless], [one, nameless], [Run(id=3, number=3), Run(id=4, name="d")]):
        with pytest.raises(BadFilter, match="cannot be named"):
            naming(runs)


def test_runs_of_several_detectors_are_named_only_if_no_other_is_meant() -> None:
    """Numbers and detectors are conditions of their own: each number of each detector is meant."""
    five, seven = Run(id=1, number=5, detector="tpc"), Run(id=2, number=7, detector="muon_veto")
    for odd in (seven, Run(id=3, number=7)):
        with pytest.raises(BadFilter, match="several detectors"):
            naming([five, odd])
    both = naming([five, Run(id=4, number=5, detector="muon_veto")])
    assert str(both) == "--run 5 --detector tpc --detector muon_veto"


def links_of(text: str) -> list[str]:
    inside = Inside()
    inside.feed(text)
    return inside.links


async def test_a_failed_reaction_is_done_after_a_retry(
    anna: Operator, server: Any, mongod: Cluster, tmp_path: Path
) -> None:
    """The listener tries again what an operator retries."""
    works, database = tmp_path / "works", Named(mongod.uri, NAME)

    async def fails(job: Job) -> Result:
        if not works.exists():
            raise GiveUp("no hope")
        return RunUpdate.set_fields(job.run, again=True)

    options = engine.options_for(database, [engine.handler(fails, tag("go"))])
    async with engine.opened(database) as db, engine.listener(db, options):
        server.runs_new.update_one({"number": 1}, {"$set": {"tags": [{"name": "go"}]}})

        def has_failed() -> bool:
            return bool(server.caxev_ledger.count_documents({"state": "failed"}))

        await engine.until(has_failed)
        works.touch()
        answer = await trio.to_thread.run_sync(partial(anna.act, "retry", site="lngs"))
        assert answer.status == 200
        await engine.until(lambda: server.runs_new.find_one({"number": 1}).get("again"))
        assert not has_failed()


# -- the command that does the same ---------------------------------------------------------------


class Captured(BaseException):
    """A command was about to ask for something."""


def parsed(line: str, sites: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Return the act and the runs that a line means to a shell and to the command line."""
    found: dict[str, Any] = {}

    def capture(_self: Any, function: Any, *given: Any, **_: Any) -> Any:
        own = getattr(function, "__self__", None)
        for one in (own, getattr(own, "act", None), getattr(own, "choice", None), *given):
            if isinstance(one, Act | ListenerAct):
                found["act"] = one
            if isinstance(one, RunChoice):
                found["runs"] = one.selection
        if function.__name__ == "request_called":
            found["act"] = given[0]
        if "act" in found or function.__name__ == "_planned":
            raise Captured
        return []

    # What is verified by one command is planned by none: the rows are made as they are read.
    monkeypatch.setattr(verify, "stream", lambda *given: capture(None, _planned, given[-1]))
    monkeypatch.setattr(command, "check_known", lambda _: None)  # it asks the database
    for name in ("with_database", "with_asker"):
        monkeypatch.setattr(GlobalOptions, name, capture)
    with pytest.raises(Captured):
        cli.main(["--config", str(sites), *words_of(line)[1:]], standalone_mode=False)
    return found.get("act"), found.get("runs", Selection())


def _planned() -> None:
    """Stand for what plans."""


def words_of(line: str) -> list[str]:
    """Return the words that bash makes of a line."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    return [one.decode() for one in done.stdout.split(b"\0")[:-1]]


SELECTIONS = (
    {"run": ["1"]},
    {"run": ["1-5,7"], "tag": ["a b"], "lacks": ["raw@chicago"]},
    {"name": ["-x'y\n\x1b$(reboot)`"], "detector": ["tpc"]},
    {"host": ["lngs"], "status": ["error"], "since": ["2016-11-11"]},
)
HOSTILE = {"why": "-o 'x'; reboot\x07 \u202e", "text": "--$(x)\n'", "word": "-a'b"}


@pytest.mark.parametrize("name", FIELDS)
def test_a_command_means_what_its_form_means(
    name: str, sites: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line that is shown, read by a shell and the command line, asks for the same."""
    offer = OFFERS[name]
    chosen = SELECTIONS[:1] if offer.about_one else SELECTIONS
    chosen = ({},) if "request" in FIELDS[name] else chosen
    chosen = ({}, *chosen) if name == "retry" else chosen
    for texts, values in product(chosen, (FIELDS[name], {**FIELDS[name], **hostile(name)})):
        selection = without_copy(Selection.read(texts))
        wish = Wish(offer, values, selection)
        assert wish.command.isprintable()
        with monkeypatch.context() as patched:
            act, runs = parsed(wish.command, sites, patched)
        if "request" in values:
            assert act == values["request"], wish.command
            continue
        # Of one run that is named, the command finds the copy itself.
        found_there = name == "verify" or not RunChoice(selection).names_one
        assert runs == (wish.runs if found_there else selection), wish.command
        if offer.make is not None and act is not None:
            assert act == offer.make(values), wish.command
        elif act is None:
            assert ReadCopies(runs.wanted) == offer.make(values)  # type: ignore[misc]
        else:
            force = getattr(act, "force", False)
            assert (act.kind, act.handler, force) == (name, None, bool(values.get("force")))


def test_a_name_with_the_signs_of_globs_names_one_run() -> None:
    """In the links to acts, and in the commands that are printed."""
    runs = [Run(id=name, name=name) for name in ("a*", "a?", "ab", r"a\*", "a\\", " ", "*")]
    for run in runs:
        copy = Copy(CopyKey("raw", "lngs", None), "error")
        printed = [shlex.split(one) for one in (which(run), in_commands(run, copy)[0])]
        assert {name for name, _ in printed} == {"--name"}
        chosen = [Selection(names=(glob,)) for _, glob in printed]
        query = parse_qsl(links("retry", run))
        if run.name.strip():
            chosen.append(Filter.of(ImmutableMultiDict(query)).selection())
        for selection in chosen:
            assert [one.id for one in runs if selection.means(one, utcnow())] == [run.id]
            assert RunChoice(selection).names_one


def links(act: str, run: Run) -> str:
    """Return the query of the link to an act, empty if there is no link."""
    found = [one.address.partition("?") for one in acts_on(run)]
    return "".join(query for path, _, query in found if path == f"/acts/{act}")


def hostile(name: str) -> dict[str, str]:
    mine = {one.name for one in OFFERS[name].fields}
    more = {"request": "-x'y", "force": "yes", "site": "lngs", "version": "v'1 2"}
    return {key: value for key, value in {**HOSTILE, **more}.items() if key in mine}


def test_names_are_quoted_for_the_shell() -> None:
    """Whatever a word is, the line is printable, and a shell makes that word of it."""
    names = [name for name in hostile_names() if "\0" not in name]
    line = typed(["x", *names])
    assert line.isprintable()
    assert words_of(line) == ["x", *names]


def test_hostile_names_are_text_in_plans(anna: Operator, server: Any) -> None:
    """In plans and in commands: no element comes of them."""
    names = [name for name in hostile_names() if "\0" not in name and len(name) < 2000]
    server.runs_new.insert_many(
        {"_id": ObjectId(), "name": name, "tags": [{"name": name}], "data": [
            {"type": "raw", "host": name, "status": "transferred", "location": "/x"}]}
        for name in names
    )  # fmt: skip
    for name in names:
        for act, fields in (("comment", {"text": name}), ("tag", {"word": name, "tag": name})):
            answer = anna.get(address(act, {"name": name, **fields}))
            inside = Inside()
            inside.feed(answer.text)
            assert len(inside.scripts) == 1
            assert not {one for one in inside.names if one.startswith("on")}
            assert "img" not in inside.tags
