"""Recording: what decisions leave of the reactions to a change; and packed snapshots."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caxev import (
    ERROR,
    HERE,
    TRANSFERRED,
    CopyKey,
    Decision,
    Job,
    Retry,
    Skip,
    Tag,
    Wait,
    copy,
    tag,
)
from caxev.config import Site
from caxev.core.ledger import Failed as FailedOutcome
from caxev.core.ledger import Reaction, State, claim, settle
from caxev.core.model import Aspect, Event, Run
from caxev.core.packing import pack, unpack
from caxev.core.recording import Maker, Recording, WholeRuns, again, compare, outlook
from caxev.core.registry import Handler, Registry
from tests import engine
from tests import strategies as make

NOW = datetime(2020, 1, 1, tzinfo=UTC)
LATER = NOW + timedelta(days=5)
RAW = CopyKey("raw", "lngs")
RUN = Run.from_document(
    {"_id": 1, "number": 1, "data": [{"type": "raw", "host": "lngs", "status": TRANSFERRED}]}
)
SNAPSHOT = RUN.snapshot()


async def react(job: Job) -> None:
    """React."""


def maker(decide: Any = None, *, also: tuple[Handler, ...] = (), concerns: Any = None) -> Maker:
    triggers = (copy((TRANSFERRED, ERROR), host=HERE), tag("*"))
    one = Handler(react, triggers, decide=decide, concerns=concerns)
    sites = engine.sites_of("lngs", "chicago")
    return Maker(Registry([one, *also], sites.here("lngs")), sites)


def recorded(
    decide: Any = None,
    before: dict[Aspect, str] | None = None,
    concerns: Any = None,
    **options: Any,
) -> Recording:
    made, whole = maker(decide, concerns=concerns), WholeRuns({1: RUN})
    return compare(made, {1: NOW}, {1: before or {}}, {1: SNAPSHOT}, whole, **options)


def key(found: Recording) -> str:
    return next(iter(found.unless_standing))


OLD: dict[Aspect, str] = {**SNAPSHOT, RAW: "transferring"}


def test_without_a_decision_every_event_makes_a_reaction() -> None:
    assert [one.handler for one in recorded().standing(())] == ["react"]


def test_what_is_skipped_leaves_the_snapshot_alone() -> None:
    """Of a run that was never seen no reaction can stand, so nothing needs to be asked for."""
    found = recorded(lambda job: Skip("no"))
    assert found.snapshots == {1: SNAPSHOT}
    assert not found.unless_standing
    assert found.standing(()) == []


def test_a_run_that_does_not_concern_a_handler_is_asked_about_once() -> None:
    """Its decision is not asked; what stands is renewed all the same."""
    asked: list[str] = []

    def concerns(_run: Run, site: Site) -> bool:
        asked.append(site.name)
        return False

    both = {**SNAPSHOT, Tag("new"): "yes"}
    seen: dict[Aspect, str] = {Tag("gone"): "yes"}
    for before, doubtful in ({}, 0), (seen, 2):
        made, whole = maker(lambda _job: None, concerns=concerns), WholeRuns({1: RUN})
        found = compare(made, {1: NOW}, {1: before}, {1: both}, whole)
        assert found.standing(()) == []
        assert len(found.standing(found.unless_standing)) == doubtful
    assert asked == ["lngs", "lngs"]


@pytest.mark.parametrize("concerns", [lambda _run, _site: True, lambda: False], ids=["yes", "bad"])
def test_a_run_that_may_concern_a_handler_is_decided_about(concerns: Any) -> None:
    """Also if the answer fails: the decision then meets what it could not read."""
    assert not recorded(lambda _job: Skip("no"), concerns=concerns).standing(())
    assert len(recorded(lambda _job: None, concerns=concerns).standing(())) == 1


def test_a_standing_reaction_is_renewed_whatever_the_decision() -> None:
    """It waits, has failed, or has begun something: its handler must end that."""
    found = recorded(lambda job: Skip("no"), OLD)
    assert found.standing(()) == []
    (made,) = found.standing({key(found)})
    assert (made.due, made.note) == (NOW, "")


@pytest.mark.parametrize("at", [LATER, NOW - timedelta(days=1)])
def test_not_before(at: datetime) -> None:
    """A reaction waits for its time, and never lies in the past; one that stands is due now."""
    found = recorded(lambda job: Wait("soon", at), OLD)
    (made,) = found.standing(())
    assert (made.due, made.note) == (max(at, NOW), "soon")
    assert [one.due for one in found.standing({made.id})] == [NOW]


class Panic(BaseException):
    """As a library in Rust raises it."""


@pytest.mark.parametrize("before", [OLD, {}], ids=["seen before", "new"])
@pytest.mark.parametrize("error", [KeyError("x"), Panic(), SystemExit(), GeneratorExit()], ids=repr)
def test_a_decision_that_fails_decides_nothing(error: BaseException, before: Any) -> None:
    """The handler runs, whose errors are data: none of a decision ends the listener."""

    def decide(job: Job) -> Decision:
        raise error

    assert len(recorded(decide, before).standing(())) == 1


def test_a_time_that_no_date_can_have_in_utc_decides_nothing() -> None:
    """It could not be stored, and the run's other reactions not with it."""
    never = datetime.max.replace(tzinfo=timezone(-timedelta(hours=12)))
    (made,) = recorded(lambda job: Wait("for ever", never), OLD).standing(())
    assert made.due == NOW


@pytest.mark.parametrize("before", [OLD, {}], ids=["seen before", "new"])
@pytest.mark.parametrize(
    "found",
    [
        *(True, False, "no", 5, Retry("later")),
        Wait("soon", cast("Any", None)),
        Wait("soon", datetime(2020, 1, 1)),  # noqa: DTZ001  # as it must not be
        Wait(cast("Any", 5), NOW),
    ],
    ids=repr,
)
def test_what_is_no_decision_decides_nothing(found: Any, before: Any) -> None:
    """The handler runs."""
    assert len(recorded(lambda _job: found, before).standing(())) == 1


@pytest.mark.parametrize(
    ("alarmed", "made"), [((), 0), ({"run 2"}, 0), ({"run 1"}, 1), (None, 1)], ids=str
)
def test_a_run_with_an_alarm_is_not_passed_over(alarmed: Any, made: int) -> None:
    found = recorded(lambda job: Skip("no"), OLD, alarmed=alarmed)
    assert len(found.standing(())) == made


def test_a_decision_can_do_nothing() -> None:
    """It has no ports: it is asked while changes are recorded, and nothing may wait for it."""
    asked: list[str] = []

    def decide(job: Job) -> Decision:
        asked.append(job.site.name)
        job.yield_slot()
        return Skip("never")

    assert len(recorded(decide, OLD).standing(())) == 1
    assert asked == ["lngs"]


def standing(state: State) -> dict[str, Reaction]:
    made = Reaction(
        "lngs", Event(1, RAW, None, TRANSFERRED), "react", lane="default", generation=0, at=NOW
    )
    if state is State.PENDING:
        return {made.id: made}
    failed = settle(claim(made, 1), FailedOutcome("x"), NOW, allowed=1, jitter=0)
    return {made.id: failed}


@pytest.mark.parametrize(
    ("decide", "known", "stands", "fires"),
    [
        (None, (), None, True),
        (None, ("react",), None, False),
        (lambda job: None, ("react",), None, True),
        (lambda job: Skip("no"), (), None, False),
        (lambda job: Wait("soon", LATER), (), None, True),
        (lambda job: None, (), State.PENDING, False),
        (lambda job: Skip("no"), (), State.FAILED, True),
        (None, ("react",), State.FAILED, True),
    ],
)
def test_a_replay_fires_what_has_something_to_do(
    decide: Any, known: tuple[str, ...], stands: State | None, *, fires: bool
) -> None:
    """What failed, what a decision wants, what a handler never saw; with force, everything."""
    keys = standing(stands) if stands else {}
    found = [*outlook(maker(decide), RUN, SNAPSHOT, keys, NOW, known=known)]
    assert bool(again(found)) == fires
    assert len(again(found, force=True)) == 1


def test_a_replay_of_one_handler() -> None:
    other = Handler(react, (copy(TRANSFERRED),), "other")
    one = maker(also=(other,))
    found = again(outlook(one, RUN, SNAPSHOT, {}, NOW), handler="other")
    assert [reaction.handler for reaction, _ in found] == ["other"]


@given(make.snapshots())
def test_packing_keeps_everything(snapshot: dict[Aspect, str]) -> None:
    assert unpack(pack(snapshot)) == snapshot


@given(st.binary(max_size=200))
def test_other_bytes_are_no_snapshot(data: bytes) -> None:
    try:
        found = unpack(data)
    except ValueError:
        return
    assert unpack(pack(found)) == found


def test_a_run_with_five_copies_takes_few_bytes() -> None:
    """The ledger keeps one such for each site and run."""
    hosts = ("lngs", "chicago", "xe1t-datamanager", "rucio-catalogue", "stash")
    snapshot: dict[Aspect, str] = {
        CopyKey("raw", host): f"transferred@{1_700_000_000_000 + 12_345_678 * number}"
        for number, host in enumerate(hosts)
    }
    assert len(pack({**snapshot, Tag("sciencerun1"): "yes"})) < 180
