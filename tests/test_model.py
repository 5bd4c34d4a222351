"""What is made of a run document, whatever it holds."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson import Int64, ObjectId
from hypothesis import given
from hypothesis import strategies as st

from caxev.core.diff import diff
from caxev.core.entry import NOTED, as_utc
from caxev.core.model import (
    STATUSES,
    TRANSFERRED,
    UNKNOWN,
    YES,
    Aspect,
    Copy,
    CopyField,
    CopyIs,
    CopyKey,
    Event,
    Existence,
    Field,
    Run,
    Tag,
    Watched,
    _digest,
    field_of,
    snapshot_of,
    time_of,
)
from caxev.core.update import (
    CopiesAtLeast,
    CopyAbsent,
    Fresh,
    RunUpdate,
)
from tests import strategies as make

RAW = CopyKey("raw", "lngs")
AT = datetime(2020, 1, 1, tzinfo=UTC)


def run_with(*entries: Any, **fields: Any) -> Run:
    return Run.from_document({"_id": ObjectId(), "data": list(entries), **fields})


def told_by(run: Run) -> dict[Aspect, str]:
    snapshot: dict[Aspect, str] = {Existence(): YES}
    snapshot |= {Tag(name): tag_seen_as(run, name) for name in run.tags}
    for copy in reversed(run.copies):  # of two with one key, the first counts
        snapshot[copy.key] = copy.seen_as
    for key in {copy.key for copy in run.copies}:
        statuses = [copy.seen_as for copy in run.copies if copy.key == key]
        if len(statuses) > 1:
            snapshot[CopyField(*key, STATUSES)] = _digest(statuses)
    return snapshot


def tag_seen_as(run: Run, name: str) -> str:
    rows = [
        tag for tag in run.document["tags"] if isinstance(tag, dict) and tag.get("name") == name
    ]
    dates = [as_utc(tag.get("date")) for tag in rows]
    return max(YES if at is None else f"{YES}@{int(at.timestamp() * 1000)}" for at in dates)


@make.few
@given(make.run_documents)
def test_any_document_is_a_run(document: dict[str, Any]) -> None:
    """`from_document` and everything that is asked of its run take any document."""
    run = Run.from_document(document)
    assert str(run)
    assert run.start is None or run.start.tzinfo is not None
    for copy in run.copies:
        assert run.copy(copy.key) is not None
        assert copy.status
        assert (copy.type, copy.host, copy.version) == copy.key
        for told in (copy.location, copy.checksum, copy.manifest, copy.source, copy.owner):
            assert told is None or (isinstance(told, str) and told)


@make.few
@given(make.run_documents)
def test_a_look_is_what_run_and_copies_say(document: dict[str, Any]) -> None:
    """`look_at(document)` is what `Run` and `Copy` say, without making them."""
    assert snapshot_of(document) == told_by(Run.from_document(document))


@make.few
@given(make.run_documents)
def test_looking_changes_nothing(document: dict[str, Any]) -> None:
    """The document is kept as it is: the run's and each copy's fields are the very ones."""
    before = repr(document)
    run = Run.from_document(document)
    assert run.snapshot() == snapshot_of(document)
    assert run.document is document
    assert all(any(copy.fields is entry for entry in document["data"]) for copy in run.copies)
    assert repr(document) == before


@make.few
@given(make.documents, st.randoms())
def test_the_order_of_entries_makes_no_difference(document: dict[str, Any], random: Any) -> None:
    """A copy is known by its key: shuffled entries (each of its own key) look the same."""
    unique = {str(Copy.from_entry(entry)): entry for entry in document.get("data", [])}
    keyed = {(e["type"], e["host"], e.get("pax_version")): e for e in unique.values()}
    there = list(keyed.values())
    shuffled = random.sample(there, len(there))
    assert snapshot_of({**document, "data": there}) == snapshot_of({**document, "data": shuffled})


def test_of_two_entries_with_one_key_the_first_counts() -> None:
    """A duplicate is no second copy."""
    first = {"type": "raw", "host": "lngs", "status": "transferred"}
    run = run_with(first, {**first, "status": "error"})
    assert run.snapshot()[RAW] == "transferred@-"
    other = run_with(first, {**first, "status": "verifying"})
    assert run.snapshot()[CopyField(*RAW, STATUSES)] != other.snapshot()[CopyField(*RAW, STATUSES)]
    assert CopyField(*RAW, STATUSES) not in run_with(first).snapshot()
    assert (copy := run.copy(RAW)) is not None
    assert copy.status == "transferred"


@pytest.mark.parametrize(
    "entry", [None, 5, "raw", ["raw", "lngs"], {}, {"type": "raw"}, {"type": "raw", "host": ""}]
)
def test_an_entry_without_type_and_host_is_no_copy(entry: object) -> None:
    """What names no owner is left in the document and is no copy."""
    run = run_with(entry)
    assert run.copies == ()
    assert run.document["data"] == [entry]
    assert run.snapshot() == {Existence(): YES}


@pytest.mark.parametrize("location", ["n/a", "N/A", "NA", "na", "", None, 5, ["/data"]])
def test_no_location_is_none(location: object) -> None:
    """`n/a` and its kin, and what is no text, are no location."""
    (copy,) = run_with({"type": "raw", "host": "lngs", "location": location}).copies
    assert copy.location is None
    assert copy.status == UNKNOWN


def test_times_of_old_documents() -> None:
    """A time may be a list that holds one, may lack its zone, or may be no time at all."""
    plain = datetime(2016, 11, 11)  # noqa: DTZ001  # as old documents come
    known = datetime(2016, 11, 11, tzinfo=UTC)
    assert as_utc(plain) == as_utc([plain, 5]) == as_utc(known) == known
    assert as_utc([]) is as_utc("2016-11-11") is as_utc([[known]]) is as_utc(None) is None


def test_people_read_that_a_field_is_set() -> None:
    """Its value is a digest, which would tell them nothing."""
    values = (None, "0f3a"), ("0f3a", "77b0"), ("0f3a", None)
    shown = [str(Event(None, Field("gains"), *value)) for value in values]
    assert shown == ["field gains: set", "field gains: set", "field gains: gone"]


@given(make.statuses, make.times, make.times)
def test_a_status_that_came_back_is_a_change(status: str, one: datetime, two: datetime) -> None:
    """The same status set at another millisecond is another value, and the same status."""
    entry = {"type": "raw", "host": "lngs", "status": status}
    values = [run_with({**entry, "status_since": at}).snapshot()[RAW] for at in (one, two)]
    ms = [int(at.timestamp() * 1000) for at in (one, two)]
    assert (values[0] == values[1]) == (ms[0] == ms[1])
    assert {Event(None, RAW, None, value).status for value in values} == {status}


@pytest.mark.parametrize("since", [None, AT])
@pytest.mark.parametrize("digest", [{"checksum": "ab"}, {"manifest": "cd"}])
def test_a_digest_that_comes_later_is_a_change(
    since: datetime | None, digest: dict[str, str]
) -> None:
    """An old program adds it without a status; until then nothing is copied from there."""
    entry = {"type": "raw", "host": "lngs", "status": TRANSFERRED, "status_since": since}
    bare, whole = (run_with({**entry, **more}).snapshot()[RAW] for more in ({}, digest))
    assert bare != whole
    assert {Event(None, RAW, None, value).status for value in (bare, whole)} == {TRANSFERRED}
    assert time_of(bare) == time_of(whole) == since


def test_a_tag_that_is_given_again_is_another() -> None:
    """Removed and given again before anybody looks, which its date shows; what has none is one."""

    def value(*dates: datetime | None) -> str:
        return run_with(tags=[{"name": "x", "date": at} for at in dates]).snapshot()[Tag("x")]

    later = AT + timedelta(seconds=1)
    assert value(AT) != value(later)
    assert value(None) == YES
    assert value(AT, later) == value(later, None, AT) == value(later)
    (event,) = diff("run", {Tag("x"): value(AT)}, {Tag("x"): value(later)})
    assert event.status == YES


def test_a_doubt_after_a_reading_is_another() -> None:
    """Cleared and raised again before anybody looks; a bad copy's mark is one, however read."""
    watched, name = (
        Watched(copies=frozenset({"checksumproblem"})),
        CopyField(*RAW, "checksumproblem"),
    )

    def value(status: str, noted: datetime) -> str:
        entry = {"type": "raw", "host": "lngs", "status": status, "checksumproblem": True}
        return run_with({**entry, NOTED: noted}).snapshot(watched)[name]

    later = AT + timedelta(seconds=1)
    assert value(TRANSFERRED, AT) != value(TRANSFERRED, later)
    assert value("error", AT) == value("error", later)


@pytest.mark.parametrize("number", [0, None, -1, "7", 7.5, True])
def test_a_run_without_number_is_known_by_name(number: object) -> None:
    """The muon veto's runs have number 0, or none."""
    run = run_with(number=number, name="161111_1434")
    assert run.number is None
    assert str(run) == "run 161111_1434"


@pytest.mark.parametrize("number", [7, 7.0, Int64(7)])
def test_a_number_of_any_type(number: object) -> None:
    """Mongosh writes whole numbers as floating ones."""
    assert run_with(number=number).number == 7


def test_a_claim_expects_no_such_copy() -> None:
    """`add_copy` carries the absence that it relies on, and writes the version it names."""
    run, key = run_with(), CopyKey("processed", "lngs", "v6.8.0")
    update = RunUpdate.add_copy(run, key, "transferring", checksum=None)
    assert update.expect == (CopyAbsent(key),)
    assert update.add is not None
    entry = Copy.from_entry(update.add)
    assert entry is not None
    assert (entry.key, entry.status) == (key, "transferring")


@pytest.mark.parametrize("status", ["verifying", None, "", 5])
def test_a_change_expects_what_was_seen(status: object) -> None:
    """`change_copy` and `remove_copy` expect the status and owner as the document holds them."""
    run = run_with({"type": "raw", "host": "lngs", "status": status, "owner": "lngs#3"})
    seen = CopyIs(RAW, {"status": status, "owner": "lngs#3"})
    update = RunUpdate.change_copy(run, run.copies[0], "error", checksum="ab")
    assert update.expect == (seen,)
    assert update.change == (seen, {"status": "error", "checksum": "ab"})
    assert RunUpdate.remove_copy(run, run.copies[0]).remove == seen


# -- fields -----------------------------------------------------------------------------------

WATCHED = Watched(frozenset({"start", "tags", "x.y"}), frozenset({"status", "owner", "location"}))


@make.few
@given(make.run_documents)
def test_watched_fields_are_aspects(document: dict[str, Any]) -> None:
    """Whatever they hold; what is absent or null is none; the rest of the look is the same."""
    run = Run.from_document(document)
    snapshot = run.snapshot(WATCHED)
    plain = {key: v for key, v in snapshot.items() if not isinstance(key, Field | CopyField)}
    several = {key: v for key, v in snapshot.items() if getattr(key, "field", "") == STATUSES}
    assert plain | several == run.snapshot()
    there = {path for path in WATCHED.run if field_of(document, path) is not None}
    assert {key.path for key in snapshot if isinstance(key, Field)} == there
    of_copies = {
        CopyField(*copy.key, name)
        for copy in reversed(run.copies)
        for name in WATCHED.copies
        if run.copy(copy.key).fields.get(name) is not None  # type: ignore[union-attr]  # it is there
    }
    assert {key for key in snapshot if isinstance(key, CopyField)} - several.keys() == of_copies


@given(make.values.filter(lambda value: value is not None), make.values)
def test_a_field_that_changes_is_a_change(one: Any, other: Any) -> None:
    """Equal values look equal, and values that are written differently do not."""
    watched = Watched(frozenset({"a.b"}))
    snapshots = [
        snapshot_of({"a": {"b": value}}, watched).get(Field("a.b")) for value in (one, other)
    ]
    assert (snapshots[0] == snapshots[1]) == (repr(one) == repr(other))


@pytest.mark.parametrize(
    ("others", "enough"),
    [
        ([{}, {"host": "chicago"}], True),
        ([{}], False),
        ([{}, {}], False),  # two entries of one host are one copy
        ([{}, {"host": "chicago", "status": "deleting"}], False),
        ([{}, {"host": "chicago", "manifest": "other"}], False),
        ([{}, {"host": "chicago", "manifest": None}], True),  # cax wrote it
        ([{}, {"host": "chicago", "manifest": None, "checksum": None}], False),
        ([{}, {"host": "chicago", "manifest": None, "checksum": "other"}], False),
        ([{}, {"host": "chicago", "pax_version": "v1"}], False),
        ([{}, {"host": "chicago", "type": "processed"}], False),
        ([{}, {"host": "lngs"}], False),  # the copy itself is none of the others
        ([{}, {"host": "chicago", "verified_at": AT - timedelta(1)}], False),
        ([{}, {"host": "chicago", "verified_at": AT + timedelta(1)}], False),
        ([{}, {"host": "chicago", "verified_noted": AT - timedelta(1)}], False),
        ([{}, {"host": "chicago", "verified_noted": None}], False),
        (
            [{}, {"host": "chicago", "verified_at": AT - timedelta(1), "check_answered": ["x"]}],
            True,
        ),
        ([{}, {"host": "chicago", "verified_at": None, "check_answered": ["x"]}], False),
        ([{}, {"host": "chicago", "verified_at": None}], False),
        ([{"verified_at": None}, {"host": "chicago"}], True),  # that one counts by its entry
        ([{}, {"host": "nowhere"}], False),
    ],
)
def test_how_many_good_copies(others: list[dict[str, Any]], enough: bool) -> None:
    """`CopiesAtLeast` counts hosts with a good copy of the same data, freshly verified."""
    usual = {
        "type": "raw",
        "host": "tape",
        "status": "transferred",
        "manifest": "m",
        "checksum": "c",
        "verified_at": AT,
        "verified_noted": AT,
    }
    document = {"_id": 1, "data": [{**usual, "host": "lngs"}, *({**usual, **o} for o in others)]}
    run = Run.from_document(document)
    lately = Fresh("x", AT, AT)
    wanted = CopiesAtLeast.of(2, run.copies[0], {"tape": None, "chicago": lately, "lngs": lately})
    assert wanted.holds(run) == enough


def _set(name: str) -> RunUpdate:
    return RunUpdate.set_fields(run_with(), **{name: 1})


def _change(name: str) -> RunUpdate:
    run = run_with({"type": "raw", "host": "lngs", "status": "transferred"})
    return RunUpdate.note(run, run.copies[0], **{name: 1})


def test_a_new_copys_fields_have_no_dots() -> None:
    """It is added whole, so nobody would find `job.id` in its `job`; of a change that is a path."""
    run = Run("run", copies=(Copy(CopyKey("raw", "lngs"), "error"),))
    with pytest.raises(ValueError, match=r"'job\.id'.*without a dot"):
        RunUpdate.add_copy(run, CopyKey("raw", "x"), "error", **{"job.id": 4})
    RunUpdate.change_copy(run, run.copies[0], "error", **{"job.id": 4})


def test_an_update_that_means_something_else_is_not_made() -> None:
    """A note sets no status, and what is no expectation could not be expected."""
    with pytest.raises(ValueError, match="use change_copy"):
        _change("status")
    with pytest.raises(TypeError, match="is no expectation"):
        RunUpdate.set_fields(run_with(), {"good": 1})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["data", "data.0.status", "tags", "_id", "number", "name"])
def test_no_update_sets_what_makes_the_run_what_it_is(name: str) -> None:
    """Copies and tags have updates of their own; only an administrator's overwrites all."""
    with pytest.raises(ValueError, match=f"'{name}' is no field to set: .*add_copy"):
        _set(name)
    with pytest.raises(ValueError, match="no field to set"):
        RunUpdate(ObjectId(), fields={name: 1})
    assert RunUpdate.overwrite(run_with(), **{name: 1}).fields == {name: 1}


@pytest.mark.parametrize("name", ["type", "host", "pax_version"])
def test_no_update_makes_a_copy_another(name: str) -> None:
    """It would be another copy, of which nobody has made sure that there is none."""
    with pytest.raises(ValueError, match=f"'{name}' is no field to set"):
        _change(name)


@pytest.mark.parametrize("make_update", [_set, _change])
@pytest.mark.parametrize("name", ["", "$inc", "x.$[]", "a..b", ".a", "a.", "a\0b"])
def test_names_that_mongodb_does_not_take_are_refused(
    make_update: Callable[[str], RunUpdate], name: str
) -> None:
    """When the update is made, so that the handler's line is in the error."""
    with pytest.raises(ValueError, match="can be named"):
        make_update(name)
