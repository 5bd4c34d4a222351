"""Holds: a copy that a person wants to keep stays until then, whatever wants it gone."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from pymongo import MongoClient

from caxev import DELETING, TRANSFERRED, TRANSFERRING, CopiesAtLeast, Copy, CopyKey, Run, testing
from caxev.asking.copies import CopyPath, best_sources, new_request
from caxev.asking.holding import Keep
from caxev.config import DEFAULT_HANDLERS, Link, Sites, load_handlers
from caxev.config.links import TimeOfDay
from caxev.copies.deletion import Intent, Withdraw, begin, hold, intent, prove, withdraw
from caxev.copies.holds import end_of, held, rows, standing
from caxev.copies.retention import DeletionPlan, DeletionWish, plan, plan_processed
from caxev.core.clock import Clocks, utcnow
from caxev.core.entry import Hold
from caxev.core.job import Skip, Wait
from caxev.core.ledger import State
from caxev.handlers import checksum, deletion, transfer
from caxev.testing.lab import Lab as Small
from tests import strategies as make
from tests.conftest import Database as Named
from tests.engine import run_document
from tests.test_cli import Caxev, assert_one_line, caxev, online  # noqa: F401  # fixtures
from tests.test_life import HOSTS, Lab, lab
from tests.test_retention import (
    ALL,
    DAY,
    NOW,
    THREE,
    applied,
    changed,
    decided,
    entry,
    mine,
    read,
    run_of,
    site,
    wanted_gone,
    weighed,
    why,
)

MINE = Hold("me@host", "a talk", NOW - DAY, until=NOW + 3 * DAY)
THEIRS = Hold("you@host", "", NOW - DAY, until=NOW + 9 * DAY)


def holding(*some: Hold, **fields: Any) -> Any:
    """A run whose copy at lngs is old enough to go, with these holds."""
    return run_of(entry("lngs", holds=rows(some), **fields), *THREE[1:])


# -- until when -----------------------------------------------------------------------------------


def test_a_copy_stays_until_its_last_hold_ends() -> None:
    """The rule waits until exactly then, and its reason names who holds it and why."""
    waits = decided(holding(MINE, THEIRS))
    assert isinstance(waits, Wait)
    assert waits.until == THEIRS.until
    assert "held by you@host until" in waits.why
    assert "held by me@host" in why(decided(holding(MINE)))
    assert "(a talk)" in why(decided(holding(MINE)))
    assert MINE.until is not None
    assert isinstance(decided(holding(MINE), now=MINE.until - timedelta(seconds=1)), Wait)
    assert isinstance(decided(holding(MINE), now=MINE.until), DeletionPlan)
    assert isinstance(decided(holding()), DeletionPlan)


def test_a_full_disk_does_not_end_a_hold() -> None:
    """Nor does a person's `rm`, of a good copy or of a bad one."""
    assert isinstance(decided(holding(MINE), full=True), Wait)
    here = ALL.get("lngs")
    for run in (holding(MINE), holding(MINE, status="error")):
        asked = plan(run, DeletionWish(mine(run), "them", "", 1), here, ALL, NOW)
        assert "held by me@host" in why(asked)


def test_derived_data_is_held_too() -> None:
    """Data of the version that is to be purged waits like raw data."""
    place = "/lngs/processed/pax_v1/run.root"
    fields: dict[str, Any] = {"type": "processed", "pax_version": "v1", "location": place}
    fields["holds"] = rows([MINE])
    run, here = run_of(entry("lngs", **fields)), evolve(ALL.get("lngs"), pax_version_purge="v1")
    waits = plan_processed(run, run.copies[0], here, ALL, NOW)
    assert isinstance(waits, Wait)
    assert waits.until == MINE.until


def test_a_hold_without_an_end_is_not_waited_for() -> None:
    """It ends by an event, its release, and not at a time."""
    assert "until it is released" in why(decided(holding(MINE._replace(until=None))))
    assert isinstance(decided(holding(MINE._replace(until=None))), Skip)


def test_days_count_from_the_arrival() -> None:
    """While the copy is on its way the end is open; an old program's copy counts from the hold."""
    days = MINE._replace(until=None, days=30.0)
    key = CopyKey("raw", "lngs")
    coming = Copy(key, TRANSFERRING, {"holds": rows([days])})
    assert end_of(coming, days) is None
    assert "for 30 days from its arrival" in why(held(coming, NOW))
    there = Copy(key, TRANSFERRED, {"holds": rows([days]), "arrived_at": NOW})
    assert end_of(there, days) == NOW + 30 * DAY
    # As it is when a copy is going: its end must not be open again.
    for status in (TRANSFERRED, DELETING, "error"):
        assert end_of(Copy(key, status, {"holds": rows([days])}), days) == NOW - DAY + 30 * DAY


@settings(max_examples=50)
@given(
    holds=st.lists(make.values | st.dictionaries(st.sampled_from(Hold._fields), make.values)),
    at=make.times,
)
def test_whatever_stands_there_is_met_calmly(holds: list[Any], at: datetime) -> None:
    """What is an object is a hold, and one whose end is not understood has none."""
    copy = Copy(CopyKey("raw", "lngs"), TRANSFERRED, {"holds": holds})
    known = [one for one in holds if isinstance(one, dict)]
    assert len(copy.holds) == len(known)
    left = standing(copy, at)
    assert (held(copy, at) is None) == (not left)
    for one in copy.holds:
        end = end_of(copy, one)
        assert (one in left) == (end is None or end > at)


@given(st.lists(st.integers(-5, 5), max_size=6))
def test_one_hold_ends_no_other(ends: list[int]) -> None:
    """A copy is held as long as any of its holds stands."""
    some = [MINE._replace(until=NOW + end * DAY) for end in ends]
    copy = Copy(CopyKey("raw", "lngs"), TRANSFERRED, {"holds": rows(some)})
    assert (held(copy, NOW) is None) == (max(ends, default=0) <= 0)
    assert copy.holds == tuple(some)


# -- a hold and a deletion at the same time -------------------------------------------------------


def test_a_hold_that_comes_after_the_intent_withdraws_it() -> None:
    """Whether the proof is complete or not; the rules wait for its end and not for `patience`."""
    run = changed(wanted_gone(run_of(*THREE)), "lngs", holds=rows([MINE]))
    for found in (weighed(run), weighed(read(run, "chicago", "stockholm"))):
        assert isinstance(found, Withdraw)
        assert "held by me@host" in found.why
    wanted = Intent.of(mine(run))
    assert wanted is not None
    after = applied(run, withdraw(run, mine(run), wanted, "held", NOW))
    assert mine(after).status == TRANSFERRED
    waits = decided(after)
    assert isinstance(waits, Wait)
    assert waits.until == MINE.until
    assert isinstance(decided(after, now=NOW + 3 * DAY), DeletionPlan)


def test_a_hold_that_came_between_reading_and_writing_is_seen() -> None:
    """The intent, the proof and the last step each expect the holds that were read."""
    run = run_of(*THREE)
    wanted = plan(run, DeletionWish(mine(run), "me", "", 2), ALL.get("lngs"), ALL, NOW)
    assert isinstance(wanted, DeletionPlan)
    going = wanted_gone(run)
    for update in (
        intent(run, wanted, ALL, NOW),
        prove(going, mine(going), ALL, proof=[], clocks=Clocks.at(NOW)),
        begin(going, mine(going), ALL, proof=[], clocks=Clocks.at(NOW)),
    ):
        assert mine(run).having("holds") in update.expect


def test_who_holds_a_copy_that_is_going_has_it_back() -> None:
    """In one write, before a byte is gone; afterwards it is too late."""
    run = wanted_gone(run_of(*THREE))
    update = hold(run, mine(run), [MINE])
    assert update is not None
    after = applied(run, update)
    assert mine(after).status == TRANSFERRED
    assert mine(after).holds == (MINE,)
    assert mine(after).deletion is None
    going = changed(run, "lngs", erasing=NOW)
    assert hold(going, mine(going), [MINE]) is None


# -- with listeners -------------------------------------------------------------------------------

PURGING = {"purge": 1000.0}


async def hold_at(three: Lab, run: Any, *some: Hold, host: str = "lngs") -> None:
    """Set the holds of a copy, as `caxev hold` does."""
    now = await three.run(run)
    copy = now.copy(CopyKey("raw", host))
    assert copy is not None
    update = hold(now, copy, some)
    assert update is not None
    assert await three.database.update_run(update, utcnow()) is not None


async def due_of(three: Lab, run: Any) -> set[datetime]:
    """When the purges that wait for this run are due."""
    found = await three.database.reactions("lngs", run=run)
    waiting = [one for one, _ in found if one.handler == "purge" and one.state is State.PENDING]
    return {one.due for one in waiting}


@pytest.mark.replicaset
async def test_holds_and_listeners(database: Named, tmp_path: Path) -> None:
    """Four copies that rules or people want gone, each with a hold of its own history."""
    async with lab(database, tmp_path, lngs=PURGING) as three:
        asked, written, ends, released = [await three.take(*HOSTS, number=n) for n in range(1, 5)]
        await held_before_the_readings(three, asked)
        # A program only wrote it down, which withdraws nothing: the deletion's next check sees it.
        await three.wants_gone(written, "lngs")
        await three.note(written, "lngs", holds=rows([Hold("me", "", utcnow())]))
        end, later = utcnow() + timedelta(seconds=4), utcnow() + 9 * DAY
        one, other = (Hold(who, "", utcnow(), until=later) for who in ("me", "you"))
        await hold_at(three, ends, Hold("me", "", utcnow(), until=end))
        await hold_at(three, released, one, other)
        await three.listen("chicago", "stockholm")
        await three.until(partial(waits_until, three, released, later))
        await goes_when_the_hold_ends(three, ends, end)
        await goes_when_the_last_one_is_released(three, released, other)
        for number, run in ((1, asked), (2, written)):
            await three.becomes(run, "lngs", status=TRANSFERRED, deletion=None)
            assert three.path("lngs", number).exists()


async def waits_until(three: Lab, run: Any, end: datetime) -> bool:
    """Whether a purge waits for the end of the run's holds."""
    due = await due_of(three, run)
    return bool(due) and min(due) >= end


async def held_before_the_readings(three: Lab, run: Any) -> None:
    """A hold stops a deletion that waits for readings: once they come, nothing is left to go."""
    await three.wants_gone(run, "lngs")
    await three.listen("lngs")

    async def asked() -> bool:
        return bool((await three.entry_of(run, "chicago")).get("check_asked"))

    await three.until(asked)
    await hold_at(three, run, Hold("me", "", utcnow()))


async def goes_when_the_hold_ends(three: Lab, run: Any, end: datetime) -> None:
    """By itself, and with a proof: nothing but the end of the hold starts it."""
    await three.gone(run, "lngs")
    (stone,) = (await three.run(run)).document["deleted_data"]
    assert stone["asked"] >= end
    assert {row["host"] for row in stone["proof"]} == {"chicago", "stockholm"}


async def goes_when_the_last_one_is_released(three: Lab, run: Any, other: Hold) -> None:
    """The release is the event; as long as another hold stands, the copy stays."""
    await hold_at(three, run, other)
    await three.settled()
    assert (await three.entry_of(run, "lngs"))["status"] == TRANSFERRED
    await hold_at(three, run)
    await three.gone(run, "lngs")


@pytest.mark.replicaset
@pytest.mark.parametrize("is_held", [False, True])
@pytest.mark.parametrize("step", ["prove", "begin"])
async def test_a_hold_that_wins_the_race_is_seen_by_the_write(
    database: Named, tmp_path: Path, step: str, is_held: bool
) -> None:
    """A step that was decided before the hold came does not fit any more."""
    async with lab(database, tmp_path) as three:
        run = await three.take(*HOSTS)
        await three.wants_gone(run, "lngs")
        before = await three.run(run)
        copy = before.copy(CopyKey("raw", "lngs"))
        assert copy is not None
        clocks = Clocks.at(utcnow())
        late = {"prove": prove, "begin": begin}[step](
            before, copy, three.sites, proof=[], clocks=clocks
        )
        # If no others are counted, only the hold can be in the way, as the first write shows.
        others = tuple(one for one in late.expect if not isinstance(one, CopiesAtLeast))
        late = evolve(late, expect=others)
        if is_held:
            await three.note(run, "lngs", holds=rows([Hold("me", "", utcnow())]))
        assert (await three.database.update_run(late, utcnow()) is None) == is_held


# -- by command -----------------------------------------------------------------------------------

SITES: list[dict[str, Any]] = [
    {"name": "lngs", "dir_raw": "/lngs", "purge": 30, "download_options": ["chicago", "stockholm"]},
    {"name": "chicago", "dir_raw": "/chicago", "dir_processed": "/chicago"},
    {"name": "stockholm", "dir_raw": "/stockholm", "pax_version_purge": "v1"},
    {"name": "strict", "dir_raw": "/strict", "purge": 0},
    {"name": "choosy", "dir_raw": "/choosy", "dataset_list": ["161111_0002"]},
    {"name": "processors", "dir_raw": "/p", "data_type": ["processed"]},
    {"name": "idle", "dir_raw": "/idle", "task_list": ["checksum"]},
]
GOOD = {"status": "transferred", "manifest": "b3:0", "checksum": "ab"}


@pytest.fixture
def asking(online: Caxev) -> Caxev:  # noqa: F811  # the fixture
    """The command line with a database, and sites with rules."""
    Path("sites.json").write_text(json.dumps(SITES))
    return online


def stored(database: Named, *hosts: str, kind: str = "raw", **fields: Any) -> None:
    """A run with good copies at these hosts."""
    data = [{"type": kind, "host": one, "location": f"/{one}/run", **GOOD} for one in hosts]
    with MongoClient[dict[str, Any]](database.uri) as client:
        document = {**run_document(1), "data": [{**one, **fields} for one in data]}
        client[database.name]["runs_new"].insert_one(document)


def copies(database: Named) -> dict[str, Copy]:
    with MongoClient[dict[str, Any]](database.uri, tz_aware=True) as client:
        document = client[database.name]["runs_new"].find_one({"number": 1})
    assert document is not None
    return {one.host: one for one in Run.from_document(document).copies}


def as_user(database: Named, who: str, host: str = "lngs", **fields: Any) -> None:
    """Another person's hold of a copy."""
    theirs = rows([Hold(who, "", utcnow(), **fields)])
    with MongoClient[dict[str, Any]](database.uri) as client:
        client[database.name]["runs_new"].update_one(
            {"data.host": host}, {"$push": {"data.$.holds": {"$each": theirs}}}
        )


@pytest.mark.replicaset
def test_a_request_holds_what_it_brings(asking: Caxev, database: Named) -> None:
    """For `purge` days from its arrival on, or as asked; nothing if no rule would delete it."""
    stored(database, "chicago")
    assert asking("copy", "--run", "1", "--to", "lngs", "--no-wait").code == 0
    (usual,) = copies(database)["lngs"].holds
    assert (usual.days, usual.until, usual.why) == (30.0, None, "")
    assert asking("copy", "--run", "1", "--to", "lngs", "--cancel").code == 0
    keep = ("--keep-for", "36h", "--why", "a talk", "--no-wait")
    assert asking("copy", "--run", "1", "--to", "lngs", *keep).code == 0
    (some,) = copies(database)["lngs"].holds
    assert (some.days, some.why) == (1.5, "a talk")
    until = ("--keep-until", "2999-12-24T18:00", "--no-wait")
    assert asking("copy", "--run", "1", "--to", "strict", *until).code == 0
    (some,) = copies(database)["strict"].holds
    assert some.until == datetime(2999, 12, 24, 18, tzinfo=UTC)
    assert asking("copy", "--run", "1", "--to", "stockholm", "--no-wait").code == 0
    assert copies(database)["stockholm"].holds == ()


@pytest.mark.replicaset
@pytest.mark.parametrize(
    ("target", "args", "end"),
    [
        ("strict", [], (1, "purge of strict is 0")),
        ("choosy", [], (1, "dataset_list of choosy leaves run 1 out")),
        ("processors", [], (1, "does not move raw data (data_type)")),
        ("idle", [], (1, "no handler that idle enables makes such a copy (task_list)")),
        ("lngs", ["--keep-until", "2016-11-11"], (2, "has passed already")),
        (
            "lngs",
            ["--keep-for", "14"],
            (2, "'14' is no length of time: write 30min"),
        ),
        ("lngs", ["--keep-for", "0d"], (2, "no length of time")),
        ("lngs", ["--keep-for", "9999999d"], (2, "no length of time")),
        ("lngs", ["--keep-for", "1d", "--keep-until", "2999-01-01"], (2, "not both")),
    ],
    ids=str,
)
def test_a_rule_that_is_against_it_is_named_at_once(
    asking: Caxev, database: Named, target: str, args: list[str], end: tuple[int, str]
) -> None:
    """Nothing is written that no site would carry out, or that a rule would undo."""
    stored(database, "chicago")
    answer = asking("copy", "--run", "1", "--to", target, *args, "--no-wait")
    assert (answer.code, end[1] in answer.err) == (end[0], True), answer
    assert [*copies(database)] == ["chicago"]


@pytest.mark.replicaset
def test_the_second_of_two_requests_is_refused_with_the_reason(
    asking: Caxev, database: Named
) -> None:
    """Each names who was first: for a copy that is asked for, for one that is held."""
    stored(database, "chicago", "stockholm")
    first = asking("copy", "--run", "1", "--from", "chicago", "--to", "lngs", "--no-wait")
    assert first.code == 0
    second = asking("copy", "--run", "1", "--from", "stockholm", "--to", "lngs", "--no-wait")
    who = copies(database)["lngs"].fields["creation_place"]
    assert_one_line(second, 1, f"requested by {who} from chicago", "for 30 days from its arrival")
    # The source must not go before the copy is there.
    removal = asking("rm", "--run", "1", "--site", "chicago")
    assert (removal.code, f"the source of raw at lngs, which {who} requested" in removal.out) == (
        1,
        True,
    )
    as_user(database, "you@there", host="stockholm")
    removal = asking("rm", "--run", "1", "--site", "stockholm")
    assert (removal.code, "held by you@there until it is released" in removal.out) == (1, True)
    assert "held by you@there" in asking("explain", "--run", "1", "--site", "stockholm").out


@pytest.mark.replicaset
def test_each_person_has_a_hold_of_their_own(asking: Caxev, database: Named) -> None:
    """A new one replaces one's own; a release leaves those of others, unless all are meant."""
    stored(database, "lngs", "chicago")
    as_user(database, "you@there", until=utcnow() + DAY)
    at = ("--run", "1", "--site", "lngs")
    assert asking("hold", *at, "--keep-for", "2d", "--why", "a talk", "--dry-run").code == 0
    assert len(copies(database)["lngs"].holds) == 1
    for days in ("2d", "3w"):
        assert asking("hold", *at, "--keep-for", days, "--why", "a talk").code == 0
    theirs, mine_ = copies(database)["lngs"].holds
    assert (theirs.by, mine_.why) == ("you@there", "a talk")
    assert mine_.until is not None
    assert mine_.until > utcnow() + 20 * DAY
    listed = asking("holds", "--site", "lngs", "--json").rows
    assert [(row["by"], row["host"], row["why"]) for row in listed] == [
        (mine_.by, "lngs", "a talk"),
        ("you@there", "lngs", ""),
    ]
    assert [row["by"] for row in asking("holds", "--mine", "--json").rows] == [mine_.by]
    assert asking("holds", "--site", "chicago", "--json").rows == []
    released = asking("release", *at)
    assert (released.code, "still held by you@there" in released.out) == (0, True)
    again = asking("release", *at)
    assert (again.code, "--all ends that, too" in again.out) == (1, True)
    assert asking("release", *at, "--all").code == 0
    assert copies(database)["lngs"].holds == ()
    assert asking("release", *at).code == 1
    assert asking("hold", "--run", "1", "--site", "stockholm").code == 1
    with MongoClient[dict[str, Any]](database.uri) as client:
        rows_ = [*client[database.name]["caxev_history"].find({}).sort("at")]
    assert [row["what"] for row in rows_] == ["held", "held", "released", "released"]
    assert {row["by"] for row in rows_} == {mine_.by}
    assert rows_[1]["reason"].endswith("UTC (a talk)")
    assert rows_[3]["reason"] == "the hold of you@there"


@pytest.mark.replicaset
def test_by_the_status_of_what_is_held(asking: Caxev, database: Named) -> None:
    """`--status` is that of the copy which a command is about, not of another one of the run."""
    stored(database, "lngs", "chicago")
    change = {"$set": {"data.$.status": "error"}}
    with MongoClient[dict[str, Any]](database.uri) as client:
        client[database.name]["runs_new"].update_one({"data.host": "chicago"}, change)
    bad = ("--run", "1-3", "--status", "error")
    assert_one_line(asking("hold", *bad, "--site", "lngs"), 5, "no run with --run 1-3 --host lngs")
    assert copies(database)["lngs"].holds == ()
    assert asking("hold", *bad, "--site", "chicago").code == 0
    assert len(copies(database)["chicago"].holds) == 1
    assert asking("release", *bad, "--site", "chicago").code == 0
    assert copies(database)["chicago"].holds == ()
    copied = asking("copy", *bad, "--to", "stockholm", "--type", "raw", "--yes", "--no-wait")
    assert (copied.code, copies(database)["stockholm"].source) == (0, "lngs")
    unknown = asking("hold", "--run", "1", "--site", "lngs", "--version", "v7")
    assert_one_line(unknown, 2, "no copy has the version 'v7'")


@pytest.mark.replicaset
def test_a_hold_withdraws_a_deletion_until_bytes_go(asking: Caxev, database: Named) -> None:
    """Then it is refused."""
    stored(database, *HOSTS)
    assert asking("rm", "--run", "1", "--site", "chicago").code == 0
    assert copies(database)["chicago"].status == DELETING
    assert asking("hold", "--run", "1", "--site", "chicago").code == 0
    assert copies(database)["chicago"].status == TRANSFERRED
    assert asking("release", "--run", "1", "--site", "chicago").code == 0
    assert asking("rm", "--run", "1", "--site", "chicago").code == 0
    with MongoClient[dict[str, Any]](database.uri) as client:
        client[database.name]["runs_new"].update_one(
            {"data.host": "chicago"}, {"$set": {"data.$.erasing": utcnow()}}
        )
    late = asking("hold", "--run", "1", "--site", "chicago")
    assert (late.code, "too late" in late.out) == (1, True)


# -- the best source ------------------------------------------------------------------------------

DIGESTS = {"manifest": "b3:0", "verified_at": NOW, "verified_noted": NOW}


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        ({"host": "tape"}, {"host": "far", "manifest": None}),
        ({"host": "chicago", "verified_at": None}, {"host": "far"}),
        ({"host": "chicago", "checksumproblem": True}, {"host": "far"}),
        ({"host": "silent"}, {"host": "far"}),
        ({"host": "shut"}, {"host": "far"}),
        ({"host": "near"}, {"host": "chicago"}),
        ({"host": "far"}, {"host": "near"}),
        ({"host": "slow"}, {"host": "far"}),
    ],
    ids=str,
)
def test_the_best_source_comes_first(worse: dict[str, Any], better: dict[str, Any]) -> None:
    """Read before tape; verified; with a listener; an open link; as configured; by its rate."""
    hours = TimeOfDay((NOW.hour + 2) % 24 * 3600.0, (NOW.hour + 3) % 24 * 3600.0)
    links = {"slow": Link(max_rate=1000), "shut": Link(hours=hours)}
    names = ("lngs", "chicago", "near", "far", "slow", "shut", "silent")
    known = {one: site(one) for one in names} | {"tape": site("tape", method="tsm")}
    known["lngs"] = site("lngs", links=links, download_options=("chicago", "near"))
    sites = Sites(Path("sites.json"), known)
    usual = {"type": "raw", "status": TRANSFERRED, "location": "/x/run", "checksum": "c", **DIGESTS}
    run = run_of(*({**usual, **one} for one in (worse, better)))
    active = {*names} - {"silent"}
    found = best_sources(run.copies, sites.get("lngs"), sites, active, NOW)
    assert [one.host for one in found] == [better["host"], worse["host"]]
    both = run_of(*({**usual, **one} for one in (better, worse)))
    assert best_sources(both.copies, sites.get("lngs"), sites, active, NOW) == found


@pytest.mark.replicaset
def test_without_a_source_the_best_is_taken(asking: Caxev, database: Named) -> None:
    """One that a rule excludes is none; if there is none, the best one's reason is given."""
    stored(database, "stockholm", "chicago")
    answer = asking("copy", "--run", "1", "--to", "lngs", "--no-wait")
    assert (answer.code, "raw at lngs comes from chicago" in answer.out) == (0, True)
    assert copies(database)["lngs"].source == "chicago"
    nothing = asking("copy", "--run", "1", "--to", "lngs", "--type", "processed", "--no-wait")
    assert_one_line(nothing, 1, "run 1 has no good copy of processed data elsewhere")


# -- from the request to the end ------------------------------------------------------------------

DELETING_AT_LNGS = {"lngs": {"purge": 30, "deletion": {"copies": 1}}, "chicago": {}}


async def requested(lab: Small, run: Run, *, hold: Hold | None) -> Run:
    """The run with a requested copy at lngs."""
    path = CopyPath(CopyKey("raw", "chicago"), CopyKey("raw", "lngs"))
    return await lab.update(new_request(run, path, "me@host", lab.now(), hold))


@pytest.mark.replicaset
async def test_what_is_requested_is_kept_while_it_is_held() -> None:
    """Of runs that are old enough to go: until the holds end, and then each goes with a proof.

    One without a hold goes as soon as it is there, which is what the others are spared.
    """
    load_handlers(default=DEFAULT_HANDLERS)
    modules = (transfer, checksum, deletion)
    async with testing.lab(*modules, sites=DELETING_AT_LNGS) as lab:
        target = lab.sites.get("lngs")
        usual = Keep().of_request(CopyKey("raw", "lngs"), target, "me@here")
        runs = []
        for hold in (usual, None):
            run = await lab.new_run(at="chicago", start=lab.now() - 1000 * DAY)
            runs.append(await requested(lab, run, hold=hold))
        await lab.settle()
        kept, spared = [await lab.look(run) for run in runs]
        assert (status_at(kept, "lngs"), status_at(spared, "lngs")) == (TRANSFERRED, None)
        assert lab.path(kept, "lngs").exists()
        (waiting,) = await lab.reactions(handler="purge")
        assert waiting.run == kept.id
        assert waiting.due >= (copy_at(kept, "lngs").arrived_at or NOW) + 30 * DAY
        lab.later(days=30, hours=1)
        await lab.settle()
        now = await lab.look(kept)
        assert status_at(now, "lngs") is None
        assert not lab.path(kept, "lngs").exists()
        (stone,) = now.document["deleted_data"]
        assert stone["by"] == "lngs: purge"
        assert [row["host"] for row in stone["proof"]] == ["chicago"]


def copy_at(run: Run, host: str) -> Copy:
    found = run.copy(CopyKey("raw", host))
    assert found is not None
    return found


def status_at(run: Run, host: str) -> str | None:
    found = run.copy(CopyKey("raw", host))
    return None if found is None else found.status


# -- what blocks ----------------------------------------------------------------------------------


@pytest.mark.replicaset
def test_explain_shows_what_blocks(asking: Caxev, database: Named) -> None:
    """What is unmet but could be, and what `task_list` leaves out; all of the rest by --all."""
    stored(database, "chicago", "lngs")
    at = ("explain", "--run", "1", "--site")
    told = {row["handler"]: row for row in asking(*at, "lngs", "--json").rows}
    assert told["purge"]["state"] == "not met"
    assert "2 good copies must remain elsewhere" in told["purge"]["why"]
    assert {"push", "stalled", "merge", "minitrees"}.isdisjoint(told)
    every = {row["handler"] for row in asking(*at, "lngs", "--all", "--json").rows}
    assert every >= {"push", "stalled", "merge", "minitrees"}
    there = {row["handler"]: row for row in asking(*at, "stockholm", "--json").rows}
    assert there["pull"]["state"] == "not met"
    assert "download_options names no site" in there["pull"]["why"]
    Path("sites.json").write_text(
        json.dumps([*SITES[:1], {**SITES[1], "task_list": ["checksum"]}, *SITES[2:]])
    )
    change = {"$set": {"data.$.status": "error", "data.$.checksumproblem": True}}
    with MongoClient[dict[str, Any]](database.uri) as client:
        client[database.name]["runs_new"].update_one({"data.host": "chicago"}, change)
    off = {row["handler"]: row for row in asking(*at, "chicago", "--json").rows}
    assert (off["repair"]["state"], "task_list" in off["repair"]["why"]) == ("off", True)
    assert "purge" not in off
