"""What the page keeps and concludes, without a database."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from starlette.exceptions import HTTPException
from starlette.requests import Request

from caxev.config import Site, Sites
from caxev.core.alarms import Alarm, AlarmState, Severity
from caxev.core.ledger import Reaction, State
from caxev.core.model import CopyKey, Event
from caxev.database import Gap, SiteRecord
from caxev.web import app
from caxev.web.documents import label_of
from caxev.web.hub import MOST_VIEWERS, SHARE, SPARE, Hub, Topic, Viewer
from caxev.web.lights import Level, light_of
from caxev.web.reasons import grouped, normalised
from caxev.web.rendering import element_id, environment, render
from caxev.web.runs import CopyGroup, KnownRuns
from caxev.web.scene import Scene
from caxev.web.state import LiveState, Open
from caxev.web.stream import EventStream
from tests import strategies as make

NOW = datetime(2026, 11, 11, 12, 0, tzinfo=UTC)
STATUSES = ("transferring", "verifying", "transferred", "error")

entries = st.fixed_dictionaries(
    {
        "type": st.sampled_from(["raw", "processed"]),
        "host": st.sampled_from(["lngs", "chicago"]),
        "status": st.sampled_from(STATUSES),
    },
    optional={"pax_version": st.sampled_from(["v1", "v2"]), "source": st.just("lngs")},
)


def run(number: int, *statuses: tuple[str, str], **fields: Any) -> dict[str, Any]:
    data = [{"type": "raw", "host": host, "status": status} for host, status in statuses]
    return {"_id": number, "number": number, "name": f"run_{number}", "data": data, **fields}


def counted(documents: list[dict[str, Any]]) -> Counter[CopyGroup]:
    found: Counter[CopyGroup] = Counter()
    for document in documents:
        keys = set()
        for one in document["data"]:
            key = (one["type"], one["host"], one.get("pax_version"))
            if key not in keys:
                found[CopyGroup(one["host"], one["type"], one["status"])] += 1
            keys.add(key)
    return found


class Life(RuleBasedStateMachine):
    """Runs come, change and go; the counters are always those of a count."""

    @initialize()
    def begin(self) -> None:
        self.runs = KnownRuns()
        self.runs.begin()
        self.documents: dict[int, dict[str, Any]] = {}
        self.statuses: dict[tuple[int, CopyKey], str] = {}

    @rule(number=st.integers(1, 4), data=st.lists(entries, max_size=4))
    def put(self, number: int, data: list[dict[str, Any]]) -> None:
        document = {"_id": number, "data": data}
        self.documents[number] = document
        self._apply(self.runs.put(document, NOW))
        assert self.runs.put(document, NOW) == []

    @rule(number=st.integers(1, 4))
    def drop(self, number: int) -> None:
        self.documents.pop(number, None)
        self._apply(self.runs.drop(number, NOW))
        assert self.runs.drop(number, NOW) == []

    def _apply(self, changes: list[Any]) -> None:
        for one in changes:
            key = (one.run, one.key)
            assert self.statuses.get(key) == one.before
            if one.after is None:
                del self.statuses[key]
            else:
                self.statuses[key] = one.after

    @invariant()
    def the_counters_are_right(self) -> None:
        assert self.runs.counts == counted(list(self.documents.values()))
        assert len(self.runs) == len(self.documents)

    @invariant()
    def what_moves_is_known(self) -> None:
        moving = {place for place, status in self.statuses.items() if status == "transferring"}
        assert set(self.runs.moving) == moving

    @invariant()
    def no_shape_is_kept_in_vain(self) -> None:
        assert set(self.runs._uses) == set(self.runs._shapes.values())


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=40, stateful_step_count=30)


@given(st.dictionaries(make.texts, make.values, max_size=4), st.lists(make.values, max_size=3))
def test_any_document_is_taken(fields: dict[str, Any], data: list[Any]) -> None:
    """Whatever a document holds, it is counted and has a name."""
    document = {**fields, "_id": 7, "data": data}
    runs = KnownRuns()
    runs.put(document, NOW)
    assert len(runs) == 1
    assert label_of(document)


def test_the_first_pass_keeps_the_latest_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a pass finds is sorted by time, and no more is kept than that."""
    kept = 100
    monkeypatch.setattr("caxev.web.runs.CHANGES_KEPT", kept)
    runs = KnownRuns()
    times = [NOW - timedelta(seconds=n) for n in range(kept + 50)]
    for number, at in enumerate(times):
        document = run(number, ("lngs", "transferred"))
        document["data"][0]["status_since"] = at
        runs.put(document, NOW)
    runs.begin()
    assert [one.at for one in runs.changes] == times[kept - 1 :: -1]


def test_a_transfer_is_counted_in_its_hour() -> None:
    """A copy that became good counts for the link that it came by, once."""
    runs = KnownRuns()
    runs.begin()
    moving = run(1, ("chicago", "transferring"), raw_size_byte=100)
    moving["data"][0]["source"] = "lngs"
    runs.put(moving, NOW)
    arrived = run(1, ("chicago", "transferred"), raw_size_byte=100)
    arrived["data"][0] |= {"source": "lngs", "status_since": NOW}
    for _ in range(2):
        runs.put(arrived, NOW)
    (link,) = runs.links.within(NOW, 1).items()
    assert (link[0], link[1].copies, link[1].bytes) == (("lngs", "chicago"), 1, 100)
    assert runs.links.within(NOW + timedelta(hours=3), 1) == {}


# -- reactions ------------------------------------------------------------------------------------


def reaction(number: int, state: State = State.FAILED, **fields: Any) -> Reaction:
    event = Event(number, CopyKey("raw", "lngs"), None, "transferred")
    made = Reaction("chicago", event, "pull", "transfer", 1, NOW, state=state)
    return evolve(made, **fields)


@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from([*State]))))
def test_the_tally_is_that_of_the_open_reactions(steps: list[tuple[int, State]]) -> None:
    """However reactions come and go, the numbers by site and state are those of a count."""
    state, known = LiveState(), dict[int, State]()
    for number, now in steps:
        one = reaction(number, now)
        if now is State.DONE:
            state.done(one.id)
            known.pop(number, None)
        else:
            state.of_reaction(one, {"progress": {"done": 1}})
            known[number] = now
    assert state.tally == Counter(("chicago", one) for one in known.values())
    assert all(state.tally.values())


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> int:
    """How many names are kept: fewer than otherwise."""
    monkeypatch.setattr("caxev.web.state.LABELS_KEPT", 1000)
    return 1000


def test_names_are_kept_within_bounds(kept: int) -> None:
    """However many runs are heard of, so many names are kept."""
    state = LiveState()
    for number in range(kept + 10):
        state.name(number, "x")
    assert len(state.labels) == kept
    assert state.label(kept + 5) == "x"


def test_the_names_of_very_many_runs_are_not_asked_for_without_end(kept: int) -> None:
    """More failed than there is room for names: those that find room are named, and that ends."""
    state = LiveState()
    for number in range(kept + 10):
        state.of_reaction(reaction(number), {})
    asked = 0
    while (missing := state.unnamed(200)) and asked <= kept:
        asked += len(missing)
        for one in missing:
            state.name(one, "x")
    assert 0 < asked <= kept


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("no route to /data/7/a (errno 113)", "no route to /data/8/b (errno 111)"),
        ("run 17 is gone", "run 3 is gone"),
        ("'a b' differs in 12 files (given up after 3 attempts)", "'c' differs in 99 files"),
        (
            "manifest b3:8e072e0d882360ca lacks 161111_1434",
            "manifest b3:18e072ea lacks 161112_0001",
        ),
        ("12.5 GB are missing", "3 MB are missing"),
    ],
)
def test_reasons_differ_only_in_names_and_numbers(one: str, other: str) -> None:
    """What differs from run to run is taken out."""
    assert normalised(one) == normalised(other)


def test_different_reasons_stay_apart() -> None:
    """The largest group comes first, and in it the newest failure."""
    notes = ["refused by /a", "timed out", "refused by /b"]
    failed = [
        Open(reaction(n, note=note, due=NOW + timedelta(seconds=n))) for n, note in enumerate(notes)
    ]
    groups = grouped(failed)
    assert [(one.reason, len(one.members)) for one in groups] == [
        ("refused by /…", 2),
        ("timed out", 1),
    ]
    assert groups[0].newest == NOW + timedelta(seconds=2)


# -- lights ---------------------------------------------------------------------------------------


def record(**fields: Any) -> SiteRecord:
    usual = {
        "site": "lngs", "epoch": 3, "owner": "host:1", "active": True,
        "expires": NOW + timedelta(seconds=10), "position": None, "scanned": NOW, "scanning": None,
        "streamed": NOW, "trouble": None, "gaps": (), "requests": 0,
    }  # fmt: skip
    return SiteRecord(**{**usual, **fields})


@pytest.mark.parametrize(
    ("fields", "level", "words"),
    [
        ({}, Level.GOOD, "listening"),
        ({"expires": NOW - timedelta(minutes=3)}, Level.BAD, "no listener, for 3 min"),
        ({"owner": None, "expires": None}, Level.BAD, "no listener"),
        ({"trouble": "no majority"}, Level.BAD, "no majority"),
        ({"away": {"/data": "/data: not mounted"}}, Level.BAD, "disk away: /data: not mounted"),
        ({"gaps": (Gap(NOW, "code 286"),)}, Level.WARN, "history was lost"),
        ({"gaps": (Gap(NOW - timedelta(days=2), "code 286"),)}, Level.GOOD, "listening"),
        ({"epoch": 0}, Level.WARN, "never started"),
    ],
)
def test_the_light_of_a_site(fields: dict[str, Any], level: Level, words: str) -> None:
    """The worst reason decides, and is said in words."""
    state = LiveState(sites={"lngs": record(**fields)})
    light = light_of(state, "lngs", NOW)
    assert light.level is level
    assert words in light.words


def test_a_light_turns_as_time_passes() -> None:
    """A lease that lapses changes no document: the clock alone turns the light red."""
    state = LiveState(sites={"lngs": record()})
    assert light_of(state, "lngs", NOW + timedelta(seconds=9)).level is Level.GOOD
    assert light_of(state, "lngs", NOW + timedelta(seconds=11)).level is Level.BAD


def test_work_that_waits_and_alarms_turn_it_too() -> None:
    """Failed and late reactions warn; an alarm that is no warning is bad."""
    state = LiveState(sites={"chicago": record(site="chicago")})
    late = reaction(1, State.PENDING, due=NOW - timedelta(hours=1))
    state.of_reaction(late, {})
    assert light_of(state, "chicago", NOW).words == "work has waited for 60 min"
    state.of_reaction(reaction(2), {})
    assert light_of(state, "chicago", NOW).level is Level.WARN
    alarm = AlarmState(Alarm("chicago", "k", "a disk is full", Severity.CRITICAL), NOW)
    state.of_alarms([alarm], [])
    assert light_of(state, "chicago", NOW).words == "1 alarm"
    state.of_alarms([], [("chicago", "k")])
    assert light_of(state, "chicago", NOW).level is Level.WARN


# -- views ----------------------------------------------------------------------------------------


def scene(state: LiveState) -> Scene:
    sites = {name: Site(name=name, hostname="localhost") for name in ("lngs", "chicago")}
    return Scene(state, Sites(Path("sites.json"), sites), lambda: NOW)


async def test_nothing_is_known_and_every_view_is_there() -> None:
    """Before the first document every view shows that there is nothing."""
    database = SimpleNamespace(settings=SimpleNamespace(safe_uri=""))
    pages = app.Pages(scene(LiveState()), cast("Any", database), Hub(), lambda *_: [])
    simple = ("now", "alarms", "handlers", "storage", "requests")
    for name in (*simple, "failures:site=x", "links:7d", "site:lngs"):
        parts = await pages._rendering(name)()
        assert all(parts.values()), name


@given(make.names)
def test_any_name_is_text(name: str) -> None:
    """A name in a page is neither an element nor an attribute, and stays on one line."""
    html = environment().from_string("<b title='{{ name }}'>{{ name }}</b>").render(name=name)
    assert html.startswith("<b title='")
    assert html.endswith("</b>")
    assert not {*"\n\r\0\u202e"} & {*html}
    assert html.count("<") == 2


async def test_so_many_may_watch_and_no_more() -> None:
    """Each open connection takes a descriptor and memory; a few addresses keep nobody out."""
    database = SimpleNamespace(settings=SimpleNamespace(safe_uri=""))
    pages = app.Pages(cast("Any", None), cast("Any", database), Hub(), lambda *_: [])

    async def may_watch(host: str, *watching: tuple[str, int]) -> bool:
        each = (who for who, number in watching for _ in range(number))
        viewers = {Viewer(cast("Any", None), trio.CancelScope(), who) for who in each}
        pages.hub.topics["now"] = Topic(cast("Any", None), viewers)
        scope = {"type": "http", "query_string": b"view=runs", "headers": [], "client": (host, 1)}
        try:
            return isinstance(await pages.events(Request(scope)), EventStream)
        except HTTPException:
            return False

    assert await may_watch("a")
    assert not await may_watch("a", *((str(n), 1) for n in range(MOST_VIEWERS)))
    assert not await may_watch("a", ("a", SHARE))
    assert not await may_watch("b", ("a", SHARE), ("b", MOST_VIEWERS - SPARE - SHARE))
    assert await may_watch("c", ("a", SHARE), ("b", MOST_VIEWERS - SPARE - SHARE))


def test_a_long_name_is_cut() -> None:
    """No name pushes a page aside."""
    html = render("now_changes.html", changes=[])
    assert html
    assert len(environment().from_string("{{ x }}").render(x="y" * 10_000)) <= 160


@given(make.names, make.names)
def test_elements_of_two_names_have_two_ids(one: str, other: str) -> None:
    """An id is a word, whatever the name, and different for different names."""
    assert element_id(one).isalnum()
    assert (element_id(one) == element_id(other)) == (one == other)
