"""Holds: a copy that a person wants to keep stays until then, whatever wants it gone."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from caxev import DELETING, TRANSFERRED, TRANSFERRING, Copy, CopyKey
from caxev.copies.deletion import Intent, Withdraw, begin, hold, intent, prove, withdraw
from caxev.copies.holds import end_of, held, rows, standing
from caxev.copies.retention import DeletionPlan, plan, plan_processed
from caxev.core.clock import Clocks, utcnow
from caxev.core.entry import Hold
from caxev.core.job import Skip, Wait
from caxev.core.ledger import State
from tests import strategies as make
from tests.conftest import Database as Named
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
        asked = plan(run, mine(run), here, ALL, now=NOW, by="them", why="", keep=1)
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
    wanted = plan(run, mine(run), ALL.get("lngs"), ALL, now=NOW, by="me", why="", keep=2)
    assert isinstance(wanted, DeletionPlan)
    going = wanted_gone(run)
    there = Intent.of(mine(going))
    assert there is not None
    rules = (ALL.get("lngs"), ALL)
    for update in (
        intent(run, wanted, ALL, NOW),
        prove(going, mine(going), there, *rules, proof=[], clocks=Clocks.at(NOW)),
        begin(going, mine(going), there, *rules, proof=[], clocks=Clocks.at(NOW)),
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
async def test_a_held_copy_goes_when_the_hold_ends(database: Named, tmp_path: Path) -> None:
    """By itself, and with a proof: nothing but the end of the hold starts it."""
    async with lab(database, tmp_path, lngs=PURGING) as three:
        run = await three.take(*HOSTS)
        end = utcnow() + timedelta(seconds=4)
        await hold_at(three, run, Hold("me", "", utcnow(), until=end))
        await three.listen(*HOSTS)

        async def waits() -> bool:
            due = await due_of(three, run)
            return bool(due) and min(due) >= end

        await three.until(waits)
        await three.gone(run, "lngs")
        (stone,) = (await three.run(run)).document["deleted_data"]
        assert stone["asked"] >= end
        assert {row["host"] for row in stone["proof"]} == {"chicago", "stockholm"}


@pytest.mark.replicaset
async def test_a_hold_that_is_released_has_the_copy_go(database: Named, tmp_path: Path) -> None:
    """The release is the event; as long as another hold stands, the copy stays."""
    async with lab(database, tmp_path, lngs=PURGING) as three:
        run = await three.take(*HOSTS)
        end = utcnow() + 9 * DAY
        one, other = (Hold(who, "", utcnow(), until=end) for who in ("me", "you"))
        await hold_at(three, run, one, other)
        await three.listen(*HOSTS)

        async def waits() -> bool:
            due = await due_of(three, run)
            return bool(due) and min(due) >= end

        await three.until(waits)
        await hold_at(three, run, other)
        await three.settled()
        assert (await three.entry_of(run, "lngs"))["status"] == TRANSFERRED
        await hold_at(three, run)
        await three.gone(run, "lngs")


@pytest.mark.replicaset
async def test_a_hold_stops_a_deletion_that_waits_for_readings(
    database: Named, tmp_path: Path
) -> None:
    """Once the readings come, nothing of it is left to go."""
    async with lab(database, tmp_path) as three:
        run = await three.take(*HOSTS)
        await three.wants_gone(run, "lngs")
        await three.listen("lngs")

        async def asked() -> bool:
            return bool((await three.entry_of(run, "chicago")).get("check_asked"))

        await three.until(asked)
        await hold_at(three, run, Hold("me", "", utcnow()))
        await three.listen("chicago", "stockholm")
        await three.settled()
        assert (await three.entry_of(run, "lngs"))["status"] == TRANSFERRED
        assert three.path("lngs").exists()


@pytest.mark.replicaset
async def test_a_hold_that_a_program_only_wrote_down_stops_a_deletion(
    database: Named, tmp_path: Path
) -> None:
    """A person's edit of the entry, which withdraws nothing: the deletion's next check sees it."""
    async with lab(database, tmp_path) as three:
        run = await three.take(*HOSTS)
        await three.wants_gone(run, "lngs")
        await three.note(run, "lngs", holds=rows([Hold("me", "", utcnow())]))
        await three.listen(*HOSTS)
        await three.becomes(run, "lngs", status=TRANSFERRED, deletion=None)
        assert three.path("lngs").exists()


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
        wanted = Intent.of(copy)
        assert wanted is not None
        there = (three.sites.get("lngs"), three.sites)
        # With `keep` 0 nothing but the hold can be in the way, as the first write shows.
        free, clocks = evolve(wanted, keep=0), Clocks.at(utcnow())
        late = {"prove": prove, "begin": begin}[step](
            before, copy, free, *there, proof=[], clocks=clocks
        )
        if is_held:
            await three.note(run, "lngs", holds=rows([Hold("me", "", utcnow())]))
        assert (await three.database.update_run(late, utcnow()) is None) == is_held
