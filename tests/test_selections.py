"""The language that selects runs: its texts, what it means, and MongoDB's answer to it."""

from __future__ import annotations

import re
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import Any

import attrs
import pytest
import trio
from bson import encode
from bson.errors import InvalidDocument
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pymongo import MongoClient
from pymongo.errors import WriteError

from caxev.core.model import UNKNOWN, Run
from caxev.core.moments import read_length, read_moment, write_length, write_moment
from caxev.core.selection import (
    CONDITIONS,
    COPY_PARTS,
    MOST,
    CopyPattern,
    NumberRange,
    Selection,
    SelectionError,
    glob_of,
    glob_pattern,
    is_glob,
    name_of,
)
from caxev.database import DatabaseError, indexes
from caxev.database.selections import query_of
from tests import engine, strategies
from tests.conftest import Database as Named

NOW = datetime(2017, 3, 1, 12, tzinfo=UTC)

# -- values that documents have, too, so that selections find some --------------------------------

lengths = st.integers(1, 10**9).map(lambda ms: timedelta(milliseconds=ms)) | st.sampled_from(
    [timedelta(days=90), timedelta(weeks=2), timedelta(minutes=30), timedelta(hours=1.5)]
)
days = st.integers(0, 730 * 86_400_000).map(lambda ms: timedelta(milliseconds=ms))
times = days.map(lambda since: datetime(2016, 1, 1, tzinfo=UTC) + since)
moments = times | lengths


@st.composite
def ranges(draw: st.DrawFn) -> NumberRange:
    first = draw(st.integers(1, 12))
    last = draw(st.sampled_from([first, first + 3, MOST]))
    return NumberRange(first, last)


words = st.sampled_from(["tpc", "muon_veto", "AmBe", "go", "v6.8.0", "v6.9.1"])
all_statuses = strategies.statuses | st.just(UNKNOWN)
patterns = st.builds(
    CopyPattern,
    type=st.none() | strategies.kinds,
    version=st.none() | strategies.versions,
    host=st.none() | strategies.hosts,
    status=st.none() | all_statuses,
)
globs = st.sampled_from(["161111_1434", "1611*", "*_1434", "??????_0001", "*", "1?*4", "161111_"])


def some(values: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.just(()) | st.lists(values, max_size=2, unique=True).map(tuple)


selections = st.builds(
    Selection,
    numbers=some(ranges()),
    names=some(globs | strategies.names | strategies.names.map(glob_of)),
    detectors=some(words | strategies.names),
    sources=some(words),
    tags=some(words | strategies.names),
    not_tags=some(words | strategies.names),
    since=st.none() | moments,
    until=st.none() | moments,
    has=some(patterns.filter(str)),
    lacks=some(patterns.filter(str)),
    fewer_than=st.none() | st.integers(1, 3),
    unverified_for=st.none() | lengths,
    copy=patterns,
)
"""Selections of many conditions; of `one_condition` those that find something."""


@st.composite
def one_condition(draw: st.DrawFn) -> Selection:
    whole = draw(selections)
    names = [one.name for one in attrs.fields(Selection)]
    kept = draw(st.sets(st.sampled_from(names), min_size=1, max_size=2))
    return Selection(**{name: getattr(whole, name) for name in kept})


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    """A run as it should be, of few values."""
    document = draw(strategies.documents)
    document["number"] = draw(st.integers(0, 14) | st.integers(0, 14).map(float))
    document["start"] = draw(times)
    document["source"] = {"type": draw(words)}
    document["tags"] = [{"name": one} for one in draw(st.lists(words, max_size=2))]
    for entry in document.get("data", ()):
        if draw(st.booleans()):
            entry["verified_at"] = draw(times)
            entry["verified_noted"] = draw(times)
    return document


def meant(selection: Selection, documents: list[dict[str, Any]]) -> set[Any]:
    found = (Run.from_document(one) for one in documents)
    return {run.id for run in found if selection.means(run, NOW)}


# -- texts ----------------------------------------------------------------------------------------


@given(selections)
def test_a_selection_is_its_texts(selection: Selection) -> None:
    """Written and read again it is the same: as options, and as parameters of an address."""
    texts = selection.texts()
    assert Selection.read(texts) == selection
    assert texts.keys() <= {*CONDITIONS, *COPY_PARTS}


@given(st.text("ab*?\n\\", max_size=6), st.text("ab*?\n\\", max_size=6))
def test_a_name_as_a_glob_means_itself(name: str, other: str) -> None:
    glob = glob_of(name)
    assert not is_glob(glob)
    assert name_of(glob) == name
    means = re.compile(glob_pattern(glob), re.DOTALL).fullmatch
    assert means(name)
    assert bool(means(other)) == (name == other)


@given(moments)
def test_a_time_is_its_text(moment: Any) -> None:
    """To the microsecond, whether it is a time or a length."""
    assert read_moment(write_moment(moment)) == moment


@given(lengths)
def test_a_length_is_its_text(length: timedelta) -> None:
    assert read_length(write_length(length)) == length


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("run", "5", "numbers", (NumberRange(5, 5),)),
        ("run", "1-100,205,300-", "numbers", ((1, 100), (205, 205), (300, MOST))),
        ("since", "2016-11-11", "since", datetime(2016, 11, 11, tzinfo=UTC)),
        ("since", "2016-11-11T01:30+01:00", "since", datetime(2016, 11, 11, 0, 30, tzinfo=UTC)),
        ("until", "7d", "until", timedelta(days=7)),
        ("has", "raw@lngs", "has", (CopyPattern(type="raw", host="lngs", status="transferred"),)),
        ("has", "@lngs=error", "has", (CopyPattern(host="lngs", status="error"),)),
        ("lacks", "raw:v6.8.0=any", "lacks", (CopyPattern(type="raw", version="v6.8.0"),)),
        ("fewer-than", "2", "fewer_than", 2),
        ("unverified-for", "90d", "unverified_for", timedelta(days=90)),
        ("status", "error", "copy", CopyPattern(status="error")),
    ],
)  # fmt: skip
def test_how_conditions_are_written(name: str, text: str, field: str, value: Any) -> None:
    assert getattr(Selection.read({name: [text]}), field) == value


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("run", "0", "'0' is no run number: write 5"),
        ("run", "9-1", "9 is after 1"),
        ("run", "5,", "'' is no run number"),
        ("run", "-5", "'-5' is no run number"),
        ("run", str(2**63), "is no run number"),
        ("since", "yesterday", "'yesterday' is no time: write 2016-11-11"),
        ("since", "0d", "is no length of time"),
        ("unverified-for", "99999999d", "is no length of time"),
        ("since", "9999999999w", "is no length of time"),
        ("unverified-for", "90", "'90' is no length of time: write 30min"),
        ("has", "", "names no copy: write raw@lngs"),
        ("has", "raw@", "names no copy"),
        ("lacks", "raw=", "names no copy"),
        ("fewer-than", "0", "is no number of copies"),
        ("tag", "", "is empty"),
        ("version", "", "version is empty"),
        ("colour", "red", "there is no condition 'colour' (known: run, "),
    ],
)
def test_what_cannot_be_read(name: str, text: str, words: str) -> None:
    """The value is named, with one that can be read."""
    with pytest.raises(SelectionError) as raised:
        Selection.read({name: [text]})
    assert words in str(raised.value)


# -- what they mean -------------------------------------------------------------------------------


def run_with(*copies: dict[str, Any], **fields: Any) -> Run:
    return Run.from_document({"_id": 1, "number": 5, "data": [*copies], **fields})


def raw(host: str, status: str = "transferred", **fields: Any) -> dict[str, Any]:
    return {"type": "raw", "host": host, "status": status, **fields}


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ({"has": ["raw@lngs"]}, True),
        ({"has": ["raw@chicago"]}, False),
        ({"has": ["raw@chicago=error"]}, True),
        ({"has": ["raw@chicago=any", "raw@lngs"]}, True),
        ({"lacks": ["raw@chicago"]}, True),
        ({"lacks": ["raw@chicago=any"]}, False),
        ({"lacks": ["processed"]}, True),
        ({"fewer-than": ["2"]}, True),
        ({"fewer-than": ["1"]}, False),
        ({"fewer-than": ["1"], "type": ["processed"]}, False),
        ({"unverified-for": ["90d"]}, True),
        ({"unverified-for": ["90d"], "host": ["chicago"]}, False),
        ({"host": ["chicago"], "status": ["transferred"]}, False),
        ({"host": ["chicago"], "status": ["error"]}, True),
        ({"name": ["1611*"]}, True),
        ({"name": ["1611"]}, False),
        ({"tag": ["go", "stop"]}, False),
        ({"tag": ["go"], "not-tag": ["stop"]}, True),
        ({"source": ["AmBe", "none"], "detector": ["tpc"]}, True),
        ({"since": ["2016-11-11"], "until": ["2016-11-12"]}, True),
        ({"until": ["2016-11-11T14:00"]}, False),
    ],
    ids=str,
)
def test_what_conditions_mean(texts: dict[str, list[str]], expected: bool) -> None:
    """Of a run with a good copy at one site, and a bad one at another."""
    run = run_with(
        raw("lngs"),
        raw("chicago", "error"),
        name="161111_1434",
        detector="tpc",
        tags=[{"name": "go"}],
        source={"type": "AmBe"},
        start=datetime(2016, 11, 11, 14),  # noqa: DTZ001  # as some clients return it
    )
    assert Selection.read(texts).means(run, NOW) is expected


def test_only_a_reading_that_is_past_verifies() -> None:
    """A copy counts as unverified until it was read, as of when that was noted."""
    wanted = Selection(unverified_for=timedelta(days=90))
    old, late = NOW - timedelta(days=91), NOW - timedelta(days=89)
    for read, noted, unverified in (
        (None, None, True),
        (old, old, True),
        (late, late, False),
        (late, None, True),  # somebody else's time
        (NOW, late, True),  # it had not come when it was noted
    ):
        copy = raw("lngs", verified_at=read, verified_noted=noted)
        assert wanted.means(run_with(copy), NOW) is unverified


def test_copies_at_one_host_count_once() -> None:
    """Old programs leave two entries for one copy."""
    twice = run_with(raw("lngs"), raw("lngs"))
    assert Selection(fewer_than=2).means(twice, NOW)
    assert not Selection(fewer_than=2).means(run_with(raw("lngs"), raw("chicago")), NOW)


# -- MongoDB's answer -----------------------------------------------------------------------------


FEW = settings(
    max_examples=5,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def read(database: Named, chosen: list[Selection], page: int) -> list[list[list[Any]]]:
    """The ids of each selection, read the oldest and the newest first."""

    async def all_of_them() -> list[list[list[Any]]]:
        found = []
        async with engine.opened(database) as db:
            for one in chosen:
                ways = [db.pages(one, NOW), db.pages(one, NOW, newest_first=True)]
                found.append([[run.id async for some in way for run in some] for way in ways])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("caxev.database.run_pages.PAGE", page)
        return trio.run(all_of_them)


@pytest.mark.replicaset
@FEW
@given(
    st.lists(runs() | strategies.run_documents, max_size=8, unique_by=lambda one: one["_id"]),
    st.lists(selections | one_condition(), min_size=20, max_size=40),
    st.booleans(),
    st.integers(1, 3),
)
def test_the_database_finds_what_is_meant(
    database: Named,
    documents: list[dict[str, Any]],
    chosen: list[Selection],
    has_indexes: bool,
    page: int,
) -> None:
    """Whatever stands in the documents: each run once, in both directions, by any index or none."""
    with MongoClient[dict[str, Any]](database.uri, tz_aware=True) as client:
        there = client[database.name]["runs_new"]
        there.drop()
        make_indexes(there, has_indexes)
        kept = [one for one in documents if stored(there, one)]
        found = read(database, chosen, page)
        kept = list(there.find())
    for selection, ways in zip(chosen, found, strict=True):
        for ids in ways:
            assert sorted(map(str, ids)) == sorted(map(str, meant(selection, kept)))


def stored(there: Any, document: dict[str, Any]) -> bool:
    """Add a document, if the server takes it: an index refuses some that old programs left."""
    try:
        there.insert_one(document)
    except (WriteError, InvalidDocument, OverflowError):
        return False
    return True


def make_indexes(there: Any, wanted: bool) -> None:
    for index in indexes.RUNS if wanted else ():
        there.create_index(list(index.keys), name=index.name)


@pytest.mark.replicaset
@FEW
@given(
    st.lists(runs(), max_size=8, unique_by=lambda one: one["_id"]),
    st.lists(selections | one_condition(), min_size=20, max_size=40),
)
def test_the_query_alone_is_exact(
    database: Named, documents: list[dict[str, Any]], chosen: list[Selection]
) -> None:
    """Of runs as they should be: so the server can count what is selected."""
    with MongoClient[dict[str, Any]](database.uri, tz_aware=True) as client:
        there = client[database.name]["runs_new"]
        there.drop()
        for one in documents:
            stored(there, one)
        kept = list(there.find())
        for selection in chosen:
            found = {one["_id"] for one in there.find(query_of(selection, NOW), {"_id": 1})}
            if UNKNOWN not in str(selection):
                assert found == meant(selection, kept)


@pytest.mark.replicaset
@pytest.mark.parametrize("by", ["numbers", "names"])
async def test_many_runs_are_no_larger_queries(database: Named, by: str) -> None:
    """Each query is about its own number or name; thousands of runs may be selected one by one."""
    documents = [engine.run_document(number) for number in range(40)]
    with MongoClient[dict[str, Any]](database.uri) as client:
        client[database.name]["runs_new"].insert_many(documents)
    every_other = documents[::2]
    chosen = (
        Selection(numbers=tuple(NumberRange(one["number"], one["number"]) for one in every_other))
        if by == "numbers"
        else Selection(names=tuple(one["name"] for one in every_other))
    )
    async with engine.opened(database) as db:
        queries, shown = [], db._shown

        def noted(query: dict[str, Any]) -> Any:
            queries.append(query)
            return shown(query)

        db._shown = noted  # type: ignore[method-assign]
        found = await db.select(chosen, NOW)
    assert [run.id for run in found] == [one["_id"] for one in every_other]
    assert max(len(encode(one)) for one in queries) < 200


@pytest.mark.replicaset
async def test_an_index_that_goes(database: Named, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan whose order is that of ids goes on without it; one of numbers is an error."""
    monkeypatch.setattr("caxev.database.run_pages.PAGE", 2)
    tags = [{"name": "go"}]
    documents = [engine.run_document(number, tags=tags) for number in range(1, 8)]
    with MongoClient[dict[str, Any]](database.uri) as client:
        there = client[database.name]["runs_new"]
        there.insert_many(documents)
        async with engine.opened(database) as db:
            make_indexes(there, True)
            found = []
            async with aclosing(db.pages(Selection(tags=("go",)), NOW)) as pages:
                async for page in pages:
                    found += page
                    there.drop_indexes()
            assert [run.number for run in found] == [*range(1, 8)]
            make_indexes(there, True)
            async with aclosing(db.pages(Selection(numbers=(NumberRange(1, 7),)), NOW)) as pages:
                assert len(await anext(pages)) == 2
                there.drop_indexes()
                with pytest.raises(DatabaseError):
                    await anext(pages)
