"""When a copy that is not at its end is warned of and given up, as a pure function of its age."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caxev import Skip
from caxev.config import Stalled
from caxev.core.job import Wait
from caxev.core.model import Copy, CopyKey, Run
from caxev.handlers.stalled import (
    AHEAD,
    Late,
    Surplus,
    TooLate,
    Undated,
    plan_merge,
    plan_stalled,
)
from tests import strategies as make

NOW = make.EPOCH
RULES = Stalled()


def copy(status: str = "transferring", hours: float | None = 1.0, **fields: Any) -> Copy:
    since = None if hours is None else NOW - timedelta(hours=hours)
    entry = {"type": "raw", "host": "lngs", "status": status, "status_since": since, **fields}
    found = Copy.from_entry(entry)
    assert found is not None
    return found


def early(hours: int, status: str = "transferring") -> Wait:
    return Wait(f"it has not been {status} for long", NOW + timedelta(hours=hours))


def test_an_age_is_judged_by_the_rules() -> None:
    """Below the warning nothing; then a warning; then it is given up."""
    assert plan_stalled(copy(), RULES, NOW, NOW) == early(1)
    assert plan_stalled(copy(hours=2.0), RULES, NOW, NOW) == Late(2.0, NOW + timedelta(hours=22))
    assert plan_stalled(copy(hours=24.0), RULES, NOW, NOW) == TooLate(24.0)


@pytest.mark.parametrize("status", ["verifying", "moving"])
def test_what_others_look_after_is_never_given_up(status: str) -> None:
    """Its own site's ledger, or who moves it, knows how that goes; it is told of all the same."""
    assert plan_stalled(copy(status), RULES, NOW, NOW) == early(1, status)
    late = plan_stalled(copy(status, 1000.0), RULES, NOW, NOW)
    assert late == Late(1000.0, NOW + timedelta(hours=24))


def test_what_a_job_makes_is_never_given_up() -> None:
    """A job may wait and run for longer than any transfer; its entry is not taken from it."""
    made = copy(hours=1000.0, type="processed", job={"name": "j"})
    assert isinstance(plan_stalled(made, RULES, NOW, NOW), Skip)


def test_entries_of_old_cax_go_by_their_creation() -> None:
    """A list that holds one time, as its oldest ones have; of what it verified nothing is known."""
    made: dict[str, Any] = {"creation_time": [NOW - timedelta(hours=30)]}
    assert plan_stalled(copy(hours=None, **made), RULES, NOW, NOW) == TooLate(30.0)
    verified = plan_stalled(copy("verifying", None, **made), RULES, NOW, NOW)
    assert verified == early(2, "verifying")


@pytest.mark.parametrize("made", [None, "yesterday", [], NOW + timedelta(days=36500)])
def test_no_entry_is_exempt_for_want_of_a_date(made: object) -> None:
    """What is on the way is dated in its entry, anything else counts from when it was seen."""
    fields: dict[str, Any] = {"creation_time": made}
    seen = [NOW - timedelta(hours=hours) for hours in (0, 3, 25)]
    assert plan_stalled(copy(hours=None, **fields), RULES, NOW, seen[2]) == Undated()
    error = [plan_stalled(copy("error", None, **fields), RULES, NOW, at) for at in seen]
    assert error == [
        early(2, "error"),
        Late(3.0, NOW + timedelta(hours=21)),
        TooLate(25.0),
    ]
    verifying = plan_stalled(copy("verifying", None, **fields), RULES, NOW, seen[1])
    assert verifying == Late(3.0, NOW + timedelta(hours=24))
    entry = {"status": "transferring", "creation_time": made}
    plans = [merged({}, entry, seen=at) for at in seen]
    assert [len(plan.entries) for plan in plans if isinstance(plan, Surplus)] == [0, 0, 1]


def test_a_time_in_the_future_is_none() -> None:
    """It would keep a copy that stands still for so long: it is dated anew, and counts from now."""
    assert plan_stalled(copy(hours=-960.0), RULES, NOW, NOW) == Undated()
    made: dict[str, Any] = {"creation_time": NOW + timedelta(days=40)}
    assert plan_stalled(copy(hours=None, **made), RULES, NOW, NOW) == Undated()
    a_little = -AHEAD.total_seconds() / 3600
    assert isinstance(plan_stalled(copy(hours=a_little), RULES, NOW, NOW), Wait)


@pytest.mark.parametrize("fields", [{"status": "transferred"}, {"type": "untriggered"}])
def test_what_is_left_alone(fields: dict[str, Any]) -> None:
    """What is at its end, and the DAQ's buffer."""
    assert isinstance(plan_stalled(copy(hours=99.0, **fields), RULES, NOW, NOW), Skip)


@given(
    hours=st.floats(0, 1e5),
    warn=st.floats(0, 1e4),
    retry=st.floats(0, 1e4),
    status=st.sampled_from(["transferring", "verifying"]),
)
def test_a_next_look_is_never_in_the_past(
    hours: float, warn: float, retry: float, status: str
) -> None:
    """Whatever the rules say, nothing is looked at again at once, for ever."""
    match plan_stalled(copy(status, hours), Stalled(warn, retry), NOW, NOW):
        case Wait(_, at) | Late(_, at):
            assert at > NOW
        case TooLate(age):
            assert age >= retry or age == pytest.approx(retry, abs=1e-3)


# -- what old programs left, and entries beside one another ---------------------------------------


def abandoned(hours: float = 1.0, **fields: Any) -> Copy:
    return copy("error", None, creation_time=NOW - timedelta(hours=hours), **fields)


def test_what_an_old_program_failed_to_make_is_given_up() -> None:
    """As what it does not finish; but never where nothing else is good."""
    assert plan_stalled(abandoned(), RULES, NOW, NOW) == early(1, "error")
    assert plan_stalled(abandoned(3.0), RULES, NOW, NOW) == Late(3.0, NOW + timedelta(hours=21))
    assert plan_stalled(abandoned(25.0), RULES, NOW, NOW) == TooLate(25.0)
    stays = plan_stalled(abandoned(25.0), RULES, NOW, NOW, stays=True)
    assert stays == Late(25.0, NOW + timedelta(hours=24))
    for ours in ({"trigger": "lngs: pull: raw at chicago"}, {"checksumproblem": True}):
        assert isinstance(plan_stalled(abandoned(99.0, **ours), RULES, NOW, NOW), Skip)
    assert isinstance(plan_stalled(copy("error", 99.0), RULES, NOW, NOW), Skip)


RAW = CopyKey("raw", "lngs")
GOOD: dict[str, Any] = {
    "type": "raw",
    "host": "lngs",
    "status": "transferred",
    "location": "/lngs/raw/1",
    "checksum": "ab",
}


def merged(*entries: dict[str, Any], seen: datetime = NOW) -> Surplus | Skip:
    run = Run.from_document({"_id": 1, "data": [{**GOOD, **entry} for entry in entries]})
    return plan_merge(run, RAW, RULES, NOW, seen)


def taken(*entries: dict[str, Any]) -> list[int]:
    """The places of the entries that are taken out."""
    plan = merged(*entries)
    assert isinstance(plan, Surplus)
    found = [
        place
        for place, entry in enumerate(entries)
        if any({**GOOD, **entry} == one.fields for one in plan.entries)
    ]
    assert len(found) == len(plan.entries)
    return found


ERROR: dict[str, Any] = {"status": "error", "checksum": None}


def test_a_failed_entry_beside_another_is_surplus() -> None:
    """Whichever comes first, and though the other is not good yet."""
    assert taken({}, ERROR) == [1]
    assert taken(ERROR, {}) == [0]
    assert taken(ERROR, {"status": "verifying"}) == [0]
    assert taken(ERROR, {"status": "transferring"}, ERROR) == [0, 2]
    assert isinstance(merged(ERROR, ERROR), Skip)
    assert isinstance(merged({}), Skip)
    assert isinstance(merged({}, {**ERROR, "disputed": True}), Skip)


@pytest.mark.parametrize("status", ["transferring", "verifying"])
def test_what_may_be_at_work_is_waited_for(status: str) -> None:
    """For as long as it may live; beside one that is not good it stays."""
    young = {"status": status, "creation_time": NOW - timedelta(hours=23)}
    old = {**young, "creation_time": NOW - timedelta(hours=24)}
    plan = merged({}, young)
    assert isinstance(plan, Surplus)
    assert (plan.entries, plan.until) == ((), NOW + timedelta(hours=1))
    assert taken({}, old) == [1]
    assert isinstance(merged({"status": "transferring"}, old), Skip)


def test_two_good_entries_are_one_if_they_are_the_same_copy() -> None:
    """Of one place and one content; what contradicts, or cannot be told apart, is left."""
    assert taken({"manifest": "b3"}, {}) == [1]
    for other in ({"checksum": "cd"}, {"location": "/lngs/raw/2"}, {}, {"status": "deleting"}):
        assert isinstance(merged({}, other), Skip)
