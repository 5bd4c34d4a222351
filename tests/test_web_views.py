"""What the views conclude: growth and room, links, failures by what they have in common, pages."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from caxev.config import Site, Sites
from caxev.config.retention import Patrol
from caxev.core.ledger import State
from caxev.core.model import Run
from caxev.core.processes import Process
from caxev.core.transcript import last_of, packed, unpacked
from caxev.database import DatabaseError, Disk
from caxev.web import data
from caxev.web.answers import Counted
from caxev.web.growth import DAYS_KEPT, Growth
from caxev.web.jobs import job_rows
from caxev.web.lights import Level
from caxev.web.links import MATRIX, link_rows, matrix
from caxev.web.listing import cells, columns
from caxev.web.now import now_parts, site_row
from caxev.web.rendering import element_id
from caxev.web.runs import KnownRuns
from caxev.web.scene import Scene, work
from caxev.web.site import lane_rows, process_rows
from caxev.web.state import LiveState
from caxev.web.storage import Holdings, candidate, host_rows, purge_rows
from caxev.web.views import Failures, failures_parts
from tests.test_web_state import NOW, reaction, record, run

MB = 10**6
DAY = timedelta(days=1)


def scene(state: LiveState, *names: str, **fields: Any) -> Scene:
    sites = {
        name: Site(name=name, hostname="localhost", **fields)
        for name in names or ("lngs", "chicago")
    }
    return Scene(state, Sites(Path("sites.json"), sites), lambda: NOW)


def test_helpers_are_shown_beside_their_listener() -> None:
    """Each process with its role, and with what it runs; a helper stands by for nothing."""
    state = LiveState()
    state.of_site(record(owner="a:1:f"))
    processes = [
        Process("a:1:f", "lngs", seen=NOW),
        Process("b:2:f", "lngs", lanes=("transfer",), began=NOW, seen=NOW),
        Process("c:3:f", "lngs", seen=NOW),
    ]
    state.of_processes(processes)
    for number, helper in enumerate([None, "b:2:f.1", "b:2:f.2"]):
        one = reaction(number, State.RUNNING, site="lngs")
        state.of_reaction(one, {"helper": helper})
    made = scene(state)
    row = site_row(made, "lngs")
    assert (row.standby, row.helpers) == (1, 1)
    assert "+1 helping" in now_parts(made)[element_id("site", "lngs")]
    assert [(one.role, one.running) for one in process_rows(made, processes)] == [
        ("listens", 1),
        ("helps with transfer", 2),
        ("stands by", 0),
    ]


# -- jobs and logs --------------------------------------------------------------------------------


SENT = {"name": "n.2", "attempt": 2, "claimed": 1478874000000}
GONE_WRONG = {"name": "n.2", "how": "memory", "why": "oom", "host": "node7", "at": NOW}


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"job": SENT}, ("pending", None, "")),
        ({"job": {**SENT, "id": "7", "submitted": NOW}}, ("sent", None, "")),
        ({"job": {**SENT, "id": "7"}, "error": "again"}, ("sent", None, "again")),
        ({"job": SENT, "job_ended": {**GONE_WRONG, "name": "n.1"}}, ("pending", None, "")),
        ({"job": SENT, "job_ended": GONE_WRONG}, ("failed", "node7", "oom")),
        ({"job": SENT, "job_ended": {**GONE_WRONG, "how": "done", "why": ""}},
         ("done", "node7", "")),
        ({"job": SENT, "status": "verifying"}, ("done", None, "")),
        ({"job": SENT, "status": "error"}, ("failed", None, "")),
        ({"job": {"name": 7}}, None),
        ({"job": "x", "job_ended": []}, None),
        ({"job": {**SENT, "claimed": 1e300, "submitted": "x"}}, ("pending", None, "")),
    ],
)  # fmt: skip
def test_jobs_are_what_their_entries_say(fields: dict[str, Any], wanted: Any) -> None:
    """The state of the present attempt, whatever stands in the document."""
    entry = {"type": "processed", "host": "lngs", "status": "transferring", **fields}
    known = scene(LiveState()).sites
    rows = list(job_rows(Run.from_document({"_id": 1, "data": [entry]}), known))
    assert [(one.state, one.node, one.why) for one in rows] == ([wanted] if wanted else [])


@given(st.lists(st.text(), min_size=1, max_size=3), st.integers(1, 20))
def test_the_end_of_the_output_is_shown(texts: list[str], most: int) -> None:
    """Its last characters, however it was cut into parts."""
    parts = list(map(packed, texts))
    found = last_of(parts, len(parts), most)
    assert found.endswith(unpacked(parts, len(parts))[-most:])
    assert len(found) <= most + 50
    assert "earlier output left out" in last_of(parts, len(parts) + 1, most)


def test_what_is_in_progress_has_a_name() -> None:
    """Also a copy of which nothing was heard but that it is being made."""
    state = LiveState()
    state.runs.put({**run(7, ("lngs", "transferring")), "number": 7}, NOW)
    assert [one.label for one in work(state)] == ["run 7"]


# -- growth and room ------------------------------------------------------------------------------


def copied(at: datetime, host: str = "lngs", **fields: Any) -> dict[str, Any]:
    entry = {"type": "raw", "host": host, "status": "transferred", "arrived_at": at}
    return {**entry, "status_since": at, **fields}


def deleted(at: datetime, came: datetime) -> dict[str, Any]:
    return {"type": "raw", "host": "lngs", "date": at, "size": MB, "arrived_at": came}


DAYS = st.integers(0, DAYS_KEPT - 2)


@given(st.lists(DAYS), st.lists(st.tuples(DAYS, DAYS)))
def test_what_a_host_had_on_each_day(stay: list[int], went: list[tuple[int, int]]) -> None:
    """The series is that of a count on each day, from what stands in the documents alone."""
    spans = [(max(pair), min(pair)) for pair in went]
    growth = Growth()
    for number, back in enumerate(stay):
        growth.note_all({"_id": number, "data": [copied(NOW - back * DAY, size=MB)]}, NOW)
    for number, (came, gone) in enumerate(spans):
        row = deleted(NOW - gone * DAY, NOW - came * DAY)
        growth.note_all({"_id": -number - 1, "deleted_data": [row]}, NOW)
    series = growth.totals("lngs", "raw", len(stay) * MB, NOW)
    counted = [
        sum(one >= back for one in stay) + sum(came >= back > gone for came, gone in spans)
        for back in range(DAYS_KEPT - 1, -1, -1)
    ]
    assert series == [MB * one for one in counted]


def test_growth_follows_what_changes() -> None:
    """A copy that comes counts once, one that is read again not, and one that goes is taken off."""
    runs = KnownRuns()
    runs.begin()
    coming = run(1, ("lngs", "verifying"), raw_size_byte=86400 * 10)
    runs.put(coming, NOW)
    there = {**coming, "data": [copied(NOW)]}
    for document in (
        there,
        run(1, ("lngs", "verifying")),
        {**there, "data": [copied(NOW - DAY, status_since=NOW)]},
    ):
        runs.put(document, NOW)
    assert runs.growth.rate("lngs", NOW) == 10
    runs.put({**there, "data": []}, NOW)
    assert runs.growth.rate("lngs", NOW) == 0


def test_raw_data_whose_size_is_known_later_counts() -> None:
    """A run's size is measured after its first copy is good."""
    runs = KnownRuns()
    runs.begin()
    document = {"_id": 1, "data": [copied(NOW)]}
    runs.put(document, NOW)
    assert runs.growth.rate("lngs", NOW) == 0
    for _ in range(2):
        runs.put({**document, "raw_size_byte": 86400}, NOW)
    assert runs.growth.rate("lngs", NOW) == 1


@pytest.mark.parametrize(
    ("free", "level", "words"),
    [
        (100 * 86400, Level.GOOD, "4 days"),
        (10 * 86400, Level.WARN, "10 h"),
        (86400 * 25 * 400, Level.GOOD, "over a year"),
    ],
)
def test_when_a_disk_is_full(free: int, level: Level, words: str) -> None:
    """It is known from what came in a day, and somebody is asked to look while there is time."""
    state = LiveState()
    disk = Disk("/data", free + 86400, 10**12)
    state.of_site(record(disks=(disk,)))
    document = {"_id": 1, "data": [copied(NOW, size=24 * 86400)]}
    state.runs.put(document, NOW)
    state.runs.begin()
    made = scene(state, min_free=86400)
    row = site_row(made, "lngs")
    assert row.disk is not None
    assert (row.disk.full_in, row.light.level) == (words, level)


def test_storage_by_host() -> None:
    """Copies, bytes by day, readings and what is on tape, each by host."""
    state = LiveState()
    for number, status in enumerate(("transferred", "transferred", "error", "verifying")):
        state.runs.put(run(number, ("lngs", status), ("tsm", "transferred")), NOW)
    readings = {"lngs": {0: 1, 35: 1, None: 2}}
    oldest = {"lngs": NOW - timedelta(days=35.5)}
    counted = Holdings({("lngs", "raw"): 7}, readings, oldest, NOW)
    sites = scene(state).sites
    by_name = {**sites.by_name, "tsm": Site(name="tsm", hostname="localhost", method="tsm")}
    made = Scene(state, evolve(sites, by_name=by_name), lambda: NOW)
    lngs, tsm = host_rows(made, counted)
    (raw,) = lngs.types
    assert (raw.good, raw.busy, raw.bad, raw.bytes) == (2, 1, 1, 7)
    assert lngs.reading is not None
    assert "1 within a month, 1 within 3 months" in lngs.reading.bar
    assert (lngs.reading.percent, lngs.reading.never) == (None, 2)
    for days, percent in ((1, 25), (35, 25), (36, 50), (1000, 50)):
        by_name["lngs"] = evolve(sites.get("lngs"), patrol=Patrol(days))
        (lngs, _) = host_rows(Scene(state, evolve(sites, by_name=by_name), lambda: NOW), counted)
        assert lngs.reading is not None
        assert (lngs.reading.percent, lngs.reading.oldest) == (percent, oldest["lngs"]), days
    assert (tsm.tape, tsm.reading) == ("tape: 0 running, 0 waiting, 0 failed", None)
    assert host_rows(made, Holdings())[0].bytes is None


def test_what_rules_delete() -> None:
    """Reactions that wait to delete are counted by when, and a copy that stays has its reason."""
    state = LiveState()
    for number, days in enumerate((-1, 3, 30)):
        one = reaction(number, State.PENDING, site="lngs", handler="purge", due=NOW + days * DAY)
        state.of_reaction(evolve(one, note="it stays"), {})
    made = scene(state, purge=30.0)
    row = purge_rows(made)[0]
    assert (row.rules, row.due, row.week, row.later) == ("raw data after 30 days", 1, 1, 1)
    old = {**run(1, ("lngs", "transferred")), "start": NOW - 60 * DAY}
    lngs = made.sites.get("lngs")
    found = candidate(Run.from_document(old), lngs, made.sites, NOW)
    assert not found.goes
    assert found.why
    young = candidate(Run.from_document({**old, "start": NOW}), lngs, made.sites, NOW)
    assert (young.goes, young.until) == (False, NOW + 30 * DAY)


# -- links ----------------------------------------------------------------------------------------


def test_links_show_what_moves_waits_and_failed() -> None:
    """Each as from one site to another: a reaction to a copy elsewhere brings it here."""
    state = LiveState()
    moving = run(1, ("lngs", "transferred"), ("chicago", "transferring"))
    moving["data"][1] |= {"source": "lngs", "trigger": "chicago: pull: raw at lngs"}
    state.runs.put(moving, NOW)
    running = reaction(1, State.RUNNING)
    state.of_reaction(running, {"progress": {"done": 5, "total": 10, "rate": 2.0}})
    for number, one in enumerate((State.PENDING, State.PENDING, State.FAILED), 2):
        state.of_reaction(reaction(number, one), {})
    (row,) = link_rows(scene(state), 24)
    assert (row.source, row.target) == ("lngs", "chicago")
    assert (row.active, row.queued, row.failed, row.rate) == (1, 2, 1, 2)
    found = matrix([row])
    assert found is not None
    assert found.sites == ("chicago", "lngs")
    assert found.rows[1][1] == (row, None)
    many = [evolve(row, target=f"site{n}") for n in range(MATRIX)]
    assert matrix(many) is None


# -- reactions ------------------------------------------------------------------------------------

STEPS = st.lists(st.tuples(st.integers(1, 4), st.sampled_from([*State]), st.integers(-5, 5)))


@given(STEPS)
def test_the_oldest_that_is_due(steps: list[tuple[int, State, int]]) -> None:
    """However reactions come, wait longer and go, it is that of a search through all of them."""
    state = LiveState()
    for number, now, minutes in steps:
        one = reaction(number, now, due=NOW + timedelta(minutes=minutes))
        if now is State.DONE:
            state.done(one.id)
        else:
            state.of_reaction(one, {})
        due = [
            open_.reaction.due
            for open_ in state.reactions.values()
            if open_.reaction.state is State.PENDING and open_.reaction.due <= NOW
        ]
        assert state.oldest_due("chicago", NOW) == min(due, default=None)
        groups: Counter[State] = Counter()
        for group, n in state.groups.items():
            groups[group.state] += n
        assert groups == Counter(open_.reaction.state for open_ in state.reactions.values())


def test_failures_are_narrowed() -> None:
    """By site, handler and reason, each as a link with how many there are."""
    state = LiveState()
    for number, (site, note) in enumerate((("lngs", "a /x"), ("lngs", "b"), ("chicago", "a /y"))):
        state.of_reaction(reaction(number, site=site, note=note), {})
    made = scene(state)
    html = failures_parts(made, Failures())["groups"]
    assert 'href="/failures?site=lngs">lngs <b>2</b>' in html
    one = failures_parts(made, Failures(reason="a /…"))["groups"]
    assert "2 of 3" in one
    assert "2 reactions were given up" in one
    assert "No reaction has failed" in failures_parts(made, Failures(site="x"))["groups"]


def test_lanes_show_their_workers() -> None:
    """A lane of sites.json is there although nothing is open in it."""
    rows = lane_rows([], NOW, {"transfer": 4})
    assert [(one.name, one.workers, one.running) for one in rows] == [("transfer", 4, 0)]


def test_many_sites_have_no_column() -> None:
    """Of more sites than a page has room for, each run lists those that have a copy."""
    names = [f"site{n}" for n in range(100)]
    made = scene(LiveState(), *names)
    assert columns(made) == []
    assert columns(scene(LiveState())) == ["lngs", "chicago"]
    found = cells(Run.from_document(run(1, ("site7", "error"))), ["site7"])
    assert [(site, [one.status for one in copies]) for site, copies in found] == [
        ("site7", ["error"])
    ]


# -- data -----------------------------------------------------------------------------------------


@given(st.sets(st.text()), st.integers(1, 5))
def test_pages_have_every_row_once(rows: set[str], limit: int) -> None:
    """Whatever the length of a page, and although a row is read by its key alone."""
    found: list[str] = []
    start: str | None = None
    while True:
        page, start = data.after(rows, str, start, limit)
        found += page
        if start is None:
            break
    assert found == sorted(rows)


def test_an_answer_is_asked_for_only_if_something_changed() -> None:
    """Nobody waits for it, the database is left alone while nothing changes, and trouble passes."""
    trio.run(_ask, clock=MockClock(autojump_threshold=0))


async def _ask() -> None:
    asked: list[int] = []
    mark = 0

    async def look_up() -> int:
        asked.append(mark)
        if len(asked) == 1:
            raise DatabaseError("away")
        await trio.sleep(1)
        return len(asked)

    one = Counted(look_up, 0, 60.0, lambda: mark, lambda: None)

    async def later() -> int:
        one.peek()
        await trio.sleep(100)
        return one.peek()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.run)
        assert await one.get() == 0
        assert [await later() for _ in range(4)] == [2, 2, 2, 2]
        mark = 1
        assert [await later() for _ in range(3)] == [3, 3, 3]
        assert asked == [0, 0, 1]
        nursery.cancel_scope.cancel()


def test_a_disk_of_a_site_is_data() -> None:
    """The API has what the page has."""
    state = LiveState()
    state.of_site(record(disks=(Disk("/data", 5, 10),)))
    value = data.site_value(scene(state), "lngs")
    assert value["disks"] == [
        {"root": "/data", "free": 5, "size": 10, "least": 0, "rate": 0.0, "full_in_s": None}
    ]
    assert value["level"] == "good"
    assert value["oldest_due"] is None
