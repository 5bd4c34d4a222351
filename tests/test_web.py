"""The page, as a process on a real replica set: what it shows, follows, refuses and survives."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from html import unescape
from html.parser import HTMLParser
from itertools import product, takewhile
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import trio
import trio.testing
from bson import ObjectId
from pymongo import MongoClient

from caxev.config import Settings
from caxev.core.alarms import Alarm, AlarmState
from caxev.core.ledger import Reaction
from caxev.core.model import CopyKey, Event
from caxev.core.transcript import packed
from caxev.database.alarms import alarm_id, alarm_row
from caxev.database.reactions import reaction_document
from caxev.database.setup import site_role
from caxev.web.guard import POLICY
from caxev.web.hub import BEHIND, Hub, Viewer
from tests.conftest import Database as Named
from tests.engine import run_document
from tests.mongod import Cluster
from tests.page import SITES, Page, hostile_names, serving
from tests.sinks import certificate

# On one worker, since most of them share a page.
pytestmark = [pytest.mark.replicaset, pytest.mark.xdist_group("web")]
Server = Any
NAME = "page_of_runs"
NOW = datetime.now(UTC)
VIEWS = (
    *("/", "/runs", "/links", "/links?window=7d", "/failures", "/storage", "/alarms"),
    *("/sites/lngs", "/sites/chicago", "/sites/lngs/purge", "/sites", "/requests", "/holds"),
    *("/handlers", "/failures?site=lngs&handler=pull&reason=x"),
)


@pytest.fixture(scope="module")
def served(mongod: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A page that most tests share, with the rights of a site's user and no more."""
    role = site_role(Settings(mongo_uri=mongod.uri, database=NAME))
    with MongoClient[dict[str, Any]](mongod.uri) as client:
        client.admin.command("createRole", NAME, privileges=role.privileges, roles=[])
        client.admin.command("createUser", NAME, pwd=NAME, roles=[NAME])
    uri = f"mongodb://{NAME}:{NAME}@{mongod.address}&authSource=admin"
    with serving(tmp_path_factory.mktemp("page"), uri, NAME) as made:
        made.ready()
        yield made


@pytest.fixture
def server(mongod: Cluster) -> Iterator[Server]:
    """The database of that page as an administrator reaches it, with three runs."""
    with MongoClient[dict[str, Any]](mongod.uri, tz_aware=True) as client:
        found = client[NAME]
        # The runs last: when the page has these, it has the rest.
        for one in ("caxev_ledger", "caxev_requests", "caxev_history", "runs_new"):
            found[one].delete_many({})
        found.runs_new.insert_many(three_runs())
        yield found


@pytest.fixture
def page(served: Page, server: Server) -> Iterator[Page]:
    """The page once it shows these runs, and nothing of what was before."""
    runs = {str(one["_id"]) for one in server.runs_new.find({}, {"_id": 1})}
    served.until(lambda: runs <= {one["run"] for one in served.json("/api/v1/changes")["changes"]})
    yield served
    served.leave()


@pytest.fixture
def fresh(database: Named) -> Iterator[Server]:
    """A database of a test's own as an administrator reaches it."""
    with MongoClient[dict[str, Any]](database.uri, tz_aware=True) as client:
        yield client[database.name]


@pytest.fixture
def alone(fresh: Server, database: Named, tmp_path: Path) -> Iterator[Page]:
    """A page of a test's own, with three runs."""
    fresh.runs_new.insert_many(three_runs())
    with serving(tmp_path, database.site_uri or database.uri, database.name) as made:
        made.ready()
        yield made


def three_runs() -> list[dict[str, Any]]:
    copies = ("raw", "lngs", "transferred"), ("raw", "chicago", "verifying")
    return [run_document(n, *copies) for n in (1, 2, 3)]


def failed(run: Any, note: str, site: str = "chicago", **fields: Any) -> dict[str, Any]:
    """A failed reaction as the ledger keeps it."""
    at = datetime.now(UTC)
    event = Event(run, CopyKey("raw", "lngs"), None, "transferred")
    made = Reaction(site, event, "pull", lane="transfer", generation=1, at=at)
    row = {**reaction_document(made), "_id": made.id, "state": "failed", "note": note}
    return {**row, **fields}


def numbers(page: Page) -> dict[str, int]:
    found: dict[str, int] = page.json("/api/v1/now")["numbers"]
    return found


def test_what_changes_is_counted(page: Page, server: Server) -> None:
    """The counters are those of the pass, and follow every change, deletion and new run."""
    assert numbers(page)["good copies"] == 3
    set_ = {"$set": {"data.1.status": "transferred"}}
    server.runs_new.update_one({"number": 2}, set_)
    page.until(lambda: numbers(page)["good copies"] == 4)
    server.runs_new.insert_one(run_document(4, ("raw", "lngs", "error")))
    page.until(lambda: (numbers(page)["runs"], numbers(page)["bad copies"]) == (4, 1))
    server.runs_new.delete_one({"number": 2})
    page.until(lambda: (numbers(page)["runs"], numbers(page)["good copies"]) == (3, 2))
    last = page.json("/api/v1/changes")["changes"]
    assert ("verifying", "transferred") in [(one["before"], one["after"]) for one in last]


def test_the_ledger_is_shown_and_followed(page: Page, server: Server) -> None:
    """A failed reaction is grouped by its reason, an alarm is listed; both go when they end."""
    run = server.runs_new.find_one({"number": 1})["_id"]
    row = failed(run, "no route to /data/7")
    server.caxev_ledger.insert_one(row)
    state = AlarmState(Alarm("lngs", "disk", "a disk is full"), datetime.now(UTC))
    server.caxev_ledger.insert_one({"_id": alarm_id("lngs", "disk"), **alarm_row(state)})
    page.until(lambda: (numbers(page)["reactions failed"], numbers(page)["alarms"]) == (1, 1))
    (group,) = page.json("/api/v1/failures")["failures"]
    assert (group["reason"], group["reactions"][0]["label"]) == ("no route to /…", "run 1")
    assert "a disk is full" in page.get("/alarms").text
    assert "Somebody has to act" in page.get("/").text
    server.caxev_ledger.update_one({"_id": row["_id"]}, {"$set": {"state": "done"}})
    server.caxev_ledger.delete_one({"_id": alarm_id("lngs", "disk")})
    page.until(lambda: not any(numbers(page)[n] for n in ("reactions failed", "alarms")))


def test_a_change_reaches_the_browser(page: Page, server: Server) -> None:
    """Only what changed is sent; who has seen it gets nothing, who has not gets all."""
    events = page.watch("now")
    kind, first = next(events)
    assert (kind, "summary" in first) == ("parts", True)
    server.runs_new.update_one({"number": 1}, {"$set": {"data.1.status": "error"}})
    kind, change = next(events)
    assert kind == "parts"
    assert {"numbers", "changes"} <= change.keys() < first.keys()
    again = page.watch("now", last=change["id"])
    server.runs_new.update_one({"number": 1}, {"$set": {"data.1.status": "verifying"}})
    assert next(again)[1].keys() < first.keys()
    assert "summary" in next(page.watch("now", last=first["id"]))[1]


def test_a_row_is_sent_when_its_run_changes(page: Page, server: Server) -> None:
    """The list of runs gets the rows that changed, and knows which are new."""
    events = page.watch("runs")
    page.until(lambda: "caxev_web_viewers 1.0" in page.get("/metrics").text)
    server.runs_new.update_one({"number": 3}, {"$set": {"data.1.status": "error"}})
    kind, sent = next(events)
    (row,) = sent["rows"]
    assert (kind, row["fresh"]) == ("rows", False)
    assert row["html"] in page.get("/runs").text
    server.runs_new.insert_one(run_document(9))
    assert next(events)[1]["rows"][0]["fresh"]


def test_a_run_s_page_follows_it(page: Page, server: Server) -> None:
    """The page of a run has its copies and its document, and changes with them."""
    run = server.runs_new.find_one({"number": 1})["_id"]
    text = page.get(f"/runs/{run}").text
    assert "161111_0001" in text
    assert "/data/1" in text
    events = page.watch(f"run:{run}")
    next(events)
    server.runs_new.update_one({"_id": run}, {"$set": {"data.1.status": "error"}})
    assert "error" in next(events)[1]["run"]


def test_a_run_s_page_has_jobs_and_logs(page: Page, server: Server) -> None:
    """What the database has of them, as text and not without end, whatever anybody wrote there."""
    run = server.runs_new.find_one({"number": 1})["_id"]
    assert "h-jobs" not in page.get(f"/runs/{run}").text
    job = {"name": "n.2", "id": "4711<b>", "attempt": 2, "log": "/jobs/0.log", "submitted": NOW}
    ended = {"name": "n.2", "how": "exit", "why": "<i>exit status 3", "host": "node7", "at": NOW}
    entry = {"type": "processed", "host": "chicago", "status": "error", "pax_version": "v6"}
    server.runs_new.update_one(
        {"_id": run}, {"$push": {"data": {**entry, "job": job, "job_ended": ended}}}
    )
    page.until(lambda: "4711&lt;b&gt;" in page.get(f"/runs/{run}").text)
    text = page.get(f"/runs/{run}").text
    for wanted in ("node7", "&lt;i&gt;exit status 3", "/jobs/0.log"):
        assert wanted in text, wanted
    (job,) = page.json(f"/api/v1/runs/{run}")["jobs"]
    assert (job["id"], job["node"], job["state"]) == ("4711<b>", "node7", "failed")
    assert "What programs printed" not in text

    bomb = zlib.compress(b"x" * (64 << 20))
    kept = [packed("first\n<script>alert(1)</script>\x1b[31m"), bomb, b"no zlib"]
    row = {"at": NOW, "site": "lngs", "what": "done", "handler": "backup", "run": run}
    server.caxev_history.insert_one({"_id": "a", **row, "kept": kept[1:], "kept_parts": 3})
    server.caxev_history.insert_one({"_id": "b", **row, "kept": kept[:1], "kept_parts": 1})
    note = failed(run, "no", kept=[packed("still open")], kept_parts=1)
    server.caxev_ledger.insert_one(note)
    page.until(lambda: f"/output/{run}" in page.get(f"/runs/{run}").text)
    page.until(lambda: "still open" in page.get(f"/output/{run}").text)
    text = page.get(f"/output/{run}").text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\x1b[31m" in text
    assert "[unreadable]" in text
    assert "[... more than is shown ...]" in text
    assert len(text) < 200_000
    assert page.get("/output/%7B").status == 404
    assert "Nothing is kept" in page.get("/output/1").text


def test_the_state_is_a_stream_of_events(page: Page, server: Server) -> None:
    """A program gets what changes of the state as JSON, and each change of a copy."""
    events = page.watch(address="/api/v1/events")
    kind, first = next(events)
    assert (kind, first["now"]["numbers"]["runs"]) == ("parts", 3)
    assert {"alarms", "site lngs", "site chicago"} <= first.keys()
    server.runs_new.update_one({"number": 2}, {"$set": {"data.1.status": "error"}})
    found = dict(event for _, event in zip(range(2), events, strict=False))
    assert found["parts"]["now"]["numbers"]["bad copies"] == 1
    (change,) = found["changes"]["rows"]
    assert (change["label"], change["before"], change["after"]) == ("run 2", "verifying", "error")
    after = page.json(f"/api/v1/changes?after={change['number'] - 1}")
    assert after["changes"] == [change]
    assert page.json(after["next"])["changes"] == []


def test_every_list_comes_in_pages(page: Page, server: Server) -> None:
    """A row for a page, each list gives all of its rows, and says when it is the same as before."""
    for number in (1, 2, 3):
        run = server.runs_new.find_one({"number": number})["_id"]
        server.caxev_ledger.insert_one(failed(run, f"reason {'abc'[number - 1]}"))
        ask = {"site": "lngs", "kind": "scan", "by": "me@host", "at": datetime.now(UTC)}
        server.caxev_requests.insert_one(ask)
    page.until(lambda: len(page.json("/api/v1/requests")["requests"]) == 3)
    page.until(lambda: numbers(page)["reactions failed"] == 3)
    for name, most in (
        ("sites", 3), ("failures", 3), ("reactions", 3), ("requests", 3), ("storage", 2),
        ("runs", 3), ("alarms", 0), ("links", 0),
    ):  # fmt: skip
        address: str | None = f"/api/v1/{name}?limit=1"
        rows: list[Any] = []
        while address:
            answer = page.get(address)
            assert page.get(address, if_none_match=answer.headers["etag"]).status == 304
            assert len(answer.json[name]) <= 1
            rows += answer.json[name]
            address = answer.json["next"]
        assert len(rows) >= most, name
        assert rows == [*{json.dumps(one): one for one in rows}.values()], name


def test_what_people_asked_for_is_shown(alone: Page, fresh: Server) -> None:
    """Requests wait for a listener until they are carried out; a hold has a name and an end."""
    assert "No listener has a request" in alone.get("/requests").text
    asked = {"site": "lngs", "kind": "replay", "by": "me@host", "at": datetime.now(UTC)}
    request = fresh.caxev_requests.insert_one(asked).inserted_id
    alone.until(lambda: "me@host" in alone.get("/requests").text)
    asked = {"site": "lngs", "kind": "scan", "at": datetime.now(UTC)}
    fresh.caxev_requests.insert_many([dict(asked) for _ in range(200)])
    alone.until(lambda: "and 1 more" in alone.get("/requests").text)
    fresh.caxev_requests.delete_many({"kind": "scan"})
    fresh.caxev_requests.delete_one({"_id": request})
    alone.until(lambda: "No listener has a request" in alone.get("/requests").text)
    hold = {"by": "you@host", "why": "a talk", "at": datetime.now(UTC)}
    fresh.runs_new.update_one({"number": 1}, {"$set": {"data.0.holds": [hold]}})
    alone.until(lambda: "you@host" in alone.get("/holds").text)
    assert "until it is released (a talk)" in alone.get("/holds").text


def test_sites_json_is_read_again(fresh: Server, database: Named, tmp_path: Path) -> None:
    """On SIGHUP, as a listener does: open pages show it; a mistake changes nothing."""
    file = tmp_path / "sites.json"
    file.write_text(SITES.read_text())
    for number, days in enumerate((10, 400, 600, None)):
        document = run_document(number, ("raw", "lngs", "transferred"))
        if days is not None:
            document["data"][0]["verified_at"] = NOW - timedelta(days=days)
        fresh.runs_new.insert_one(document)
    with serving(tmp_path, database.uri, database.name, sites=file) as page:
        page.ready()
        seen = page.watch("storage")
        assert next(seen)
        assert page.get("/sites/elsewhere").status == 404
        read = json.loads(file.read_text())
        given = read["sites"] if isinstance(read, dict) else read
        given[0] |= {"purge": 30, "patrol": {"days": 500}}
        given.append({"name": "elsewhere", "hostname": "h.example", "dir_raw": "/data"})
        file.write_text(json.dumps(read))
        page.process.send_signal(signal.SIGHUP)
        page.until(lambda: page.get("/sites/elsewhere").status == 200)
        kinds = [kind for kind, _ in takewhile(lambda one: _lacks_rule(one[1]), seen)]
        assert "reload" in kinds
        patrol = page.until(
            lambda: re.search("50 % within 500 days, oldest <time.*", page.get("/storage").text)
        )
        assert ", 1 never" in patrol[0]
        (row,) = page.json("/api/v1/storage")["storage"]
        assert (row["patrol"]["share"], row["patrol"]["days"]) == (0.5, 500)
        file.write_text("[{]")
        page.process.send_signal(signal.SIGHUP)
        page.until(lambda: "keeping the previous configuration" in page.log.read_text())
        assert page.get("/sites/elsewhere").status == 200
        assert "changed: elsewhere, lngs.patrol, lngs.purge" in page.log.read_text()


def _lacks_rule(parts: dict[str, Any]) -> bool:
    return "raw data after" not in parts.get("purges", "")


def test_sites_are_compared(alone: Page, fresh: Server) -> None:
    """A listener's version, its stand-by, its disk, and in which keys its sites.json differs."""
    now = datetime.now(UTC)
    lease = {"owner": "here:1", "expires": now + timedelta(hours=1), "streamed": now}
    disks = [{"root": "/data", "free": 5 * 10**12, "size": 10**13}]
    site = {"_id": "lngs", "kind": "site", "epoch": 1, **lease, "disks": disks}
    fresh.caxev_ledger.insert_one(site)
    for owner in ("here:1", "there:2"):
        keys = [["lngs.purge", "1"]]
        fresh.caxev_ledger.insert_one(
            {"_id": {"process": owner, "s": "lngs"}, "kind": "process", "site": "lngs",
             "owner": owner, "version": "9.9.9", "configuration": "other", "handlers": "h",
             "keys": keys, "seen": now}
        )  # fmt: skip
    alone.until(lambda: "+1 standing by" in alone.get("/").text)
    text = alone.get("/").text
    assert "9.9.9" in text
    assert "5 TB of 10 TB free at /data" in text
    for path in ("/sites", "/sites/lngs"):
        assert "differs" in alone.get(path).text
        assert "chicago, lngs." in alone.get(path).text
    fresh.caxev_ledger.delete_many({"kind": "process"})
    alone.until(lambda: "standing by" not in alone.get("/").text)


def test_idle_viewers_cost_no_query(alone: Page, mongod: Cluster, database: Named) -> None:
    """While nothing changes no document of a run is read, whoever watches."""
    views = ("now", "failures:", "site:lngs", "links:1h", "alarms", "storage", "requests")
    events = [alone.watch(view) for view in views]
    for one in events:
        next(one)
    alone.until(lambda: "were counted" in alone.get("/storage").text)
    alone.get("/requests")
    time.sleep(0.5)
    before = mongod.queries(f"{database.name}.runs_new")
    time.sleep(4)
    assert mongod.queries(f"{database.name}.runs_new") == before


def test_pages_have_every_run_once(page: Page, server: Server) -> None:
    """Newest first, whatever the length of a page, and also with a filter."""
    server.runs_new.insert_many(run_document(n, ("raw", "lngs", "error")) for n in range(4, 12))
    choices = (("", range(11, 0, -1)), ("status=error&", range(11, 3, -1)))
    for (query, wanted), limit in product(choices, (1, 2, 7)):
        address, found = f"/api/v1/runs?{query}limit={limit}", []
        while address:
            answer = page.json(address)
            found += [one["number"] for one in answer["runs"]]
            address = answer["next"]
        assert found == list(wanted)


LONG = "/api/v1/changes?after=" + "1" * 5000


def test_filters_stand_in_the_address(page: Page) -> None:
    """A filter finds what it says, keeps its values in the form, and a wrong one is named."""
    assert 'value="2"' in page.get("/runs?run=2").text
    assert [one["number"] for one in page.json("/api/v1/runs?run=2-3")["runs"]] == [3, 2]
    long = "161111_*" + "?" * 300
    listed = page.get(f"/runs?name={long}").text
    assert f'value="{long}"' in listed
    assert f'/api/v1/runs?{urlencode({"name": long})}"' in listed
    named = page.json("/api/v1/runs?name=*_0001&lacks=raw@chicago&tag=")["runs"]
    assert [one["number"] for one in named] == [1]
    for wrong in ("/runs?run=x", "/api/v1/runs?run=x", "/api/v1/runs?limit=0", "/runs?day=1", LONG):
        answer = page.get(wrong)
        assert (answer.status, " no " in answer.text) == (400, True), wrong


def test_what_matches_is_exported(page: Page, server: Server) -> None:
    """All of it, however many pages it has, and as what a spreadsheet takes for text."""
    server.runs_new.insert_many(
        run_document(n, ("raw", "lngs", "transferred")) for n in range(10, 1300)
    )
    wild = {"number": 1, "name": '=cmd("x"),\n\x1b[31m', "tags": [{"name": "@x"}], "data": [1]}
    server.runs_new.insert_one(wild)
    address = re.search('href="(/runs[.]csv[^"]*)"', page.get("/runs?run=10-2000").text)
    assert address is not None
    answer = page.get(unescape(address[1]))
    assert answer.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [int(one["number"]) for one in rows] == list(range(1299, 9, -1))
    assert rows[0]["copies"] == "raw@lngs transferred"
    (odd,) = csv.DictReader(io.StringIO(page.get("/runs.csv?tag=@x").text))
    assert (odd["name"], odd["tags"]) == ('\'=cmd("x"),\\n\\x1b[31m', "'@x")
    assert page.get("/runs.csv?run=x").status == 400


def test_what_is_unchanged_is_not_sent_again(page: Page) -> None:
    """A tag says whether the answer is the one that the client has."""
    tag = page.get("/api/v1/sites").headers["etag"]
    assert page.get("/api/v1/sites", if_none_match=tag).status == 304


# -- who may ask ----------------------------------------------------------------------------------


def test_only_our_own_names_are_served(page: Page) -> None:
    """A page of another name in the reader's browser can read nothing (DNS rebinding)."""
    assert page.get("/", host="localhost:1").status == 200
    for host in ("evil.example", "evil.example:8765", "127.0.0.1.evil.example", ""):
        assert page.get("/", host=host).status in (400, 421), host


def test_nothing_can_be_changed(page: Page) -> None:
    """Only reading is served."""
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        for path in ("/", "/runs", "/api/v1/runs"):
            assert page.get(path, method=method).status == 405, (method, path)


def test_a_browser_runs_only_our_own(page: Page) -> None:
    """Every answer forbids scripts and styles but those of the page's own files."""
    assert "unsafe" not in POLICY
    for path in (*VIEWS, "/no", "/api/v1/sites", "/static/page.js", "/metrics"):
        headers = page.get(path).headers
        assert headers["content-security-policy"] == POLICY, path
        assert headers["x-content-type-options"] == "nosniff", path


def test_what_is_not_there_is_said(page: Page) -> None:
    """An address that means nothing has a page, and no traceback in the log."""
    for path in (
        *("/no", "/runs/no", "/runs/%7B%7D", "/runs/" + "0" * 24, "/sites/no", "/events"),
        "/static/..%2fapp.py",
        *("/static/app.py", "/events?view=no", "/api/v1/runs/no", "/links?window=9y"),
    ):
        assert page.get(path).status in (400, 404), path
    assert "Traceback" not in page.log.read_text()


def test_a_view_with_a_long_name_is_followed(page: Page) -> None:
    """As failures of a reason of many words are; another view would take their place."""
    query = urlencode({"reason": "no route to " * 30 + "lngs"})
    (view,) = re.findall('data-view="([^"]*)"', page.get(f"/failures?{query}").text)
    assert unescape(view) == f"failures:{query}"


def test_a_run_without_number_and_name_has_no_acts(page: Page, server: Server) -> None:
    """No condition selects it, and without one all runs would be meant."""
    made = run_document(4, ("raw", "lngs", "transferred"))
    for number, name in ((None, ""), (None, "a name"), (4, "")):
        fields = {"_id": ObjectId(), "number": number, "name": name}
        server.runs_new.insert_one({**made, **fields})
        text = page.get(f"/runs/{fields['_id']}").text
        addresses = re.findall(r'"/acts/[^?]*\?([^"]*)"', text)
        assert bool(addresses) == bool(number or name)
        assert all("run=4" in one or "name=a+name" in one for one in addresses)


class Inside(HTMLParser):
    """The elements and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.names: set[str] = set()
        self.scripts: list[Any] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}
        if tag == "script":
            self.scripts.append(dict(attrs).get("src"))
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "action")]


def test_names_are_only_text(fresh: Server, database: Named, tmp_path: Path) -> None:
    """Whatever a run, a tag, a host, a status or a reason is called, it is text on every page."""
    names = hostile_names()
    assert len(names) >= 40
    for n, name in enumerate(names):
        run = ObjectId()
        fresh.runs_new.insert_one(
            {
                "_id": run, "name": name, "detector": name, "tags": [{"name": name}],
                "source": {"type": name},
                "data": [{"type": name, "host": f"{name}{n % 2}", "status": name, "error": name,
                          "location": name, "status_since": datetime.now(UTC)}],
            }
        )  # fmt: skip
        fresh.caxev_ledger.insert_one(failed(run, name, site=f"s{n}", handler="pull"))
    with serving(tmp_path, database.uri, database.name) as page:
        page.ready()
        ids = [str(one["_id"]) for one in fresh.runs_new.find({}, {"_id": 1})]
        for path in (*VIEWS, *(f"/runs/{one}" for one in ids)):
            answer = page.get(path)
            assert answer.status == 200, (path, page.log.read_text()[-2000:])
            inside = Inside()
            inside.feed(answer.text)
            assert len(inside.scripts) == 1, path
            assert inside.scripts[0].startswith("/static/page.js")
            assert not {name for name in inside.names if name.startswith("on") or name == "style"}
            assert "img" not in inside.tags
            assert all(link.startswith(("/", "#")) for link in inside.links), path
            assert len(answer.text) < 400_000
        assert "Traceback" not in page.log.read_text()


# -- trouble --------------------------------------------------------------------------------------


def _client(cluster: Cluster) -> MongoClient[dict[str, Any]]:
    return MongoClient(cluster.uri)


def test_the_database_is_away_and_comes_back(tmp_path: Path) -> None:
    """The page says since when, shows what it had, and goes on by itself."""
    with (
        Cluster(tmp_path / "mongod") as cluster,
        MongoClient[dict[str, Any]](cluster.uri) as client,
    ):
        client.run.runs_new.insert_one(run_document(1, ("raw", "lngs", "transferred")))
        uri = f"{cluster.uri}&serverSelectionTimeoutMS=1000"
        with serving(tmp_path, uri, "run") as page:
            page.ready()
            run = client.run.runs_new.find_one()
            assert run is not None
            # A run's page asks the database when something changes.
            events = page.watch(f"run:{run['_id']}")
            next(events)
            cluster.kill(0)
            page.until(lambda: page.get("/healthz").status == 503)
            assert page.get("/healthz").text == "the database cannot be read\n"
            assert page.get(f"/events?view=run:{'0' * 24}").status == 503
            text = page.get("/").text
            assert "No answer since" in text
            assert page.json("/api/v1/now")["numbers"]["good copies"] == 1
            assert page.get("/runs").status == 503
            cluster.restart(0)
            cluster._wait_writable()
            client.run.runs_new.insert_one(run_document(2, ("raw", "lngs", "transferred")))
            page.until(lambda: numbers(page)["good copies"] == 2)
            assert "No answer since" not in page.get("/").text
            client.run.runs_new.update_one({"number": 1}, {"$set": {"data.0.status": "error"}})
            assert any("error" in parts["run"] for _, parts in events)


def test_a_lost_history_is_made_up_for(alone: Page, fresh: Server) -> None:
    """If the collection is replaced, everything is read again, and the page says so."""
    fresh.runs_new.drop()
    fresh.runs_new.insert_one(run_document(7, ("raw", "lngs", "error")))
    alone.until(lambda: (numbers(alone)["runs"], numbers(alone)["bad copies"]) == (1, 1))
    assert "everything was read again" in alone.get("/").text


def test_a_port_that_is_taken_is_said(page: Page, mongod: Cluster) -> None:
    """One line, and a status after which systemd starts it again: it may be free then."""
    port = page.address.rpartition(":")[2]
    command = [sys.executable, "-m", "caxev", "web", "--port", port, "--mongo-uri", mongod.uri]
    command += ["--config", str(Path(__file__).parents[1] / "sites.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_terminal_shows_the_same(server: Server, mongod: Cluster) -> None:
    """`caxev top` counts what the page counts, and a name steers no terminal."""
    run = server.runs_new.find_one({"number": 1})["_id"]
    server.caxev_ledger.insert_one(failed(run, "no \x1b[31m route"))
    command = [sys.executable, "-m", "caxev", "top", "--mongo-uri", mongod.uri]
    command += ["--database", NAME, "--config", str(SITES)]
    wide = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=120, env=wide
    )
    assert "3 runs   3 good copies   3 copies on the way" in done.stdout
    assert "no \\x1b[31m route" in done.stdout
    assert "\x1b[31m route" not in done.stdout


def test_a_listener_s_lease_lapses(alone: Page, fresh: Server) -> None:
    """The light of a site turns red when its lease has lapsed, without any change.

    And SIGTERM ends the page, although browsers watch.
    """
    until = datetime.now(UTC) + timedelta(seconds=2)
    fresh.caxev_ledger.insert_one(
        {"_id": "lngs", "kind": "site", "epoch": 1, "owner": "here:1", "expires": until}
    )

    def level() -> str:
        sites = {one["site"]: one for one in alone.json("/api/v1/sites")["sites"]}
        return str(sites["lngs"]["level"])

    events = alone.watch("now")
    alone.until(lambda: level() == "good")
    alone.until(lambda: level() == "bad")
    seen = (html for _, parts in events for html in parts.values() if "no listener, for" in html)
    assert next(seen)
    alone.process.send_signal(signal.SIGTERM)
    assert alone.process.wait(240) == 0


async def test_a_slow_viewer_is_dropped() -> None:
    """Who takes nothing loses the connection; the others do not wait."""
    count = 0

    async def render() -> dict[str, str]:
        nonlocal count
        count += 1
        return {"a": str(count)}

    hub, got = Hub(), []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hub.run)
        slow = Viewer(trio.open_memory_channel[bytes](BEHIND)[0], trio.CancelScope())
        send, receive = trio.open_memory_channel[bytes](BEHIND)
        await hub.join("now", render, slow, None)
        await hub.join("now", render, Viewer(send, trio.CancelScope()), None)
        await receive.receive()  # what there was when it came
        for _ in range(2 * BEHIND):
            hub.wake("now")
            got.append(await receive.receive())
        assert slow.scope.cancel_called
        assert hub.viewers == 1
        assert len(got) == 2 * BEHIND
        nursery.cancel_scope.cancel()


async def test_who_joins_while_a_view_is_rendered_sees_what_changes_meanwhile() -> None:
    """Also if another viewer, for whom it was rendered as well, has gone by then."""
    number, go_on = "old", trio.Event()

    async def render() -> dict[str, str]:
        found = number
        await go_on.wait()
        return {"a": found}

    hub = Hub()
    ends = [trio.open_memory_channel[bytes](BEHIND) for _ in range(2)]
    gone, stays = (Viewer(send, trio.CancelScope()) for send, _ in ends)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(hub.run)
        nursery.start_soon(hub.join, "run", render, gone, None)
        nursery.start_soon(hub.join, "run", render, stays, None)
        await trio.testing.wait_all_tasks_blocked()
        number = "new"
        hub.wake("run")
        await trio.testing.wait_all_tasks_blocked()
        hub.leave("run", gone)
        go_on.set()
        await trio.testing.wait_all_tasks_blocked()
        assert b"new" in last_of(ends[1][1])
        number = "newest"
        hub.wake("run")
        await trio.testing.wait_all_tasks_blocked()
        assert b"newest" in last_of(ends[1][1])
        nursery.cancel_scope.cancel()


async def test_a_view_may_end_while_another_is_rendered() -> None:
    """Its last viewer has gone when it is its turn: the page goes on."""
    number, go_on = "old", trio.Event()
    go_on.set()

    async def render() -> dict[str, str]:
        await go_on.wait()
        return {"a": number}

    hub, names = Hub(), ("one", "two")
    ends = {name: trio.open_memory_channel[bytes](BEHIND) for name in names}
    viewers = {name: Viewer(send, trio.CancelScope()) for name, (send, _) in ends.items()}
    for name in names:
        await hub.join(name, render, viewers[name], None)
    async with trio.open_nursery() as nursery:
        number, go_on = "new", trio.Event()
        hub.wake(*names)
        nursery.start_soon(hub.run)
        await trio.testing.wait_all_tasks_blocked()
        (first,) = (name for name in names if hub.topics[name]._rendering.locked())
        (other,) = {*names} - {first}
        hub.leave(other, viewers[other])
        go_on.set()
        await trio.testing.wait_all_tasks_blocked()
        assert b"new" in last_of(ends[first][1])
        nursery.cancel_scope.cancel()


def last_of(sent: trio.MemoryReceiveChannel[bytes]) -> bytes:
    """What was sent last."""
    found = b""
    with suppress(trio.WouldBlock):
        while True:
            found = sent.receive_nowait()
    return found


def test_a_renewed_certificate_counts_for_the_next_browser(database: Named, tmp_path: Path) -> None:
    """Without a restart; while the files do not fit together the former one is served."""
    pem, _ = certificate(tmp_path)
    old, key = ssl.create_default_context(cafile=str(pem)), tmp_path / "key.pem"
    files = ("--certificate", str(pem), "--key", str(key))
    with serving(tmp_path, database.uri, database.name, *files) as page:
        assert "https" in page.address

        def asked(trusted: ssl.SSLContext) -> int:
            with urlopen(page.address + "/static/page.css", context=trusted) as answer:
                found: int = answer.status
                return found

        assert asked(old) == 200
        key.write_text("half")
        assert asked(old) == 200
        certificate(tmp_path)
        assert asked(ssl.create_default_context(cafile=str(pem))) == 200
        with pytest.raises(URLError, match="CERTIFICATE_VERIFY_FAILED"):
            asked(old)
        assert "cannot be used" in page.log.read_text()
