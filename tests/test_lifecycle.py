"""The life of a copy's entry, as a state machine: two sites race on what they saw before."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from caxev import Copy, CopyKey, GiveUp, Job, Retry, Run, RunUpdate, Skip, Superseded
from caxev.copies import lifecycle
from caxev.core.model import (
    ERROR,
    REQUESTED,
    TRANSFERRED,
    TRANSFERRING,
    VERIFYING,
    CopyIs,
    Event,
)
from caxev.core.update import CopyAbsent, Expectation
from tests import strategies as make

WANTED = CopyKey("raw", "lngs")
SOURCE = CopyKey("raw", "xenon")
SITES = ("lngs", "xenon")
"""The one pulls, the other pushes: both make the same copy."""


class Collection:
    """A run in the database, with the rules by which `caxev.database` applies an update."""

    def __init__(self) -> None:
        self.run = Run.from_document(
            {"_id": 1, "name": "run", "data": [_entry(SOURCE, TRANSFERRED, "/xenon/run")]}
        )

    async def update(self, update: RunUpdate, *, now: datetime, deed: Any = None) -> Run | None:
        """Apply an update if its expectations hold."""
        if not all(_holds(self.run, one) for one in update.expect):
            return None
        entries = [dict(one.fields) for one in self.run.copies]
        if update.add is not None:
            entries.append(dict(update.add))
        if update.change is not None:
            (found,) = [one for one in entries if one["host"] == update.change[0].key.host]
            found |= update.change[1]
        if update.remove is not None:
            entries = [one for one in entries if one["host"] != update.remove.key.host]
        self.run = Run.from_document({**self.run.document, "data": entries})
        return self.run


def _entry(key: CopyKey, status: str, location: str | None, **fields: Any) -> dict[str, Any]:
    shown = {"type": key.type, "host": key.host, "status": status, "location": location}
    return {**shown, "checksum": "ab", **fields}


def _holds(run: Run, expectation: Expectation) -> bool:
    if isinstance(expectation, CopyAbsent):
        return run.copy(expectation.key) is None
    assert isinstance(expectation, CopyIs)
    found = run.copy(expectation.key)
    return found is not None and all(
        found.fields.get(name) == value for name, value in expectation.fields.items()
    )


class Lifecycle(RuleBasedStateMachine):
    """Whatever two sites do on whatever they saw last, the entry has one maker and one way."""

    @initialize()
    def begin(self) -> None:
        self.database = Collection()
        self.processes = dict.fromkeys(SITES, 1)
        self.seen = dict.fromkeys(SITES, self.database.run)
        self.claimed: dict[str, Copy] = {}
        """By site, the entry that its present process has claimed."""

    def job(self, site: str) -> Job:
        event = Event(1, SOURCE, None, TRANSFERRED)
        owner = f"{site}#{self.processes[site]}"
        ports: Any = self.database
        place: Any = _Site(site)
        return Job(self.seen[site], event, place, {}, owner, ports=ports)

    @property
    def entry(self) -> Copy | None:
        return self.database.run.copy(WANTED)

    def set(self, key: CopyKey, **fields: object) -> None:
        entries = [dict(one.fields) for one in self.database.run.copies]
        (found,) = [one for one in entries if one["host"] == key.host]
        found |= fields
        self.database.run = Run.from_document({**self.database.run.document, "data": entries})

    @rule(site=st.sampled_from(SITES))
    def look(self, site: str) -> None:
        """The site reads the run: until then it acts on what it saw before."""
        self.seen[site] = self.database.run

    @rule(site=st.sampled_from(SITES))
    def restart(self, site: str) -> None:
        """The process dies; the next one knows nothing of it but what is in the entry."""
        self.processes[site] += 1
        self.claimed.pop(site, None)

    @rule()
    def ask(self) -> None:
        """A person asks for the copy."""
        if self.entry is None:
            entries = [dict(one.fields) for one in self.database.run.copies]
            entries.append(_entry(WANTED, REQUESTED, None, checksum=None))
            self.database.run = Run.from_document({**self.database.run.document, "data": entries})

    @rule(status=st.sampled_from([TRANSFERRED, ERROR]))
    def source(self, status: str) -> None:
        """The source goes bad, or is good again."""
        self.set(SOURCE, status=status)

    @rule(site=st.sampled_from(SITES))
    def claim(self, site: str) -> None:
        """A claim succeeds only on a good source, and never takes the entry of another's."""
        job, before = self.job(site), self.entry
        trigger, resume = lifecycle.trigger_of("make", job), job.run.copy(WANTED)
        is_free = resume is None or resume.status == REQUESTED
        if not (is_free or lifecycle.is_ours(resume, trigger)):
            return  # as every plan does
        source = self.seen[site].copy(SOURCE)
        assert source is not None
        if lifecycle.unfit(source):
            return

        async def attempt() -> Copy:
            plan = lifecycle.CopyPlan(source, WANTED, "/lngs/run", trigger, resume)
            return await lifecycle.claim(job, plan, {"location": plan.location})

        try:
            mine = trio.run(attempt)
        except Retry:
            assert self.seen[site] is not self.database.run  # else nothing was in its way
            assert self.entry == before
            return
        good = self.database.run.copy(SOURCE)
        assert good is not None
        assert good.status == TRANSFERRED
        assert before is None or before.status == REQUESTED or lifecycle.is_ours(before, trigger)
        assert mine.fields["source"] == SOURCE.host
        assert mine.owner == job.owner
        assert bool(mine.fields.get("requested")) == _is_requested(before)
        self.seen[site] = self.database.run
        self.claimed[site] = mine

    @rule(site=st.sampled_from(SITES), end=st.sampled_from(["arrived", "parked"]))
    def finish(self, site: str, end: str) -> None:
        """Only who has the entry finishes it."""
        if (mine := self.claimed.pop(site, None)) is None:
            return
        job, before = self.job(site), self.entry
        if end == "arrived":
            update = lifecycle.arrived(job.run, mine)
        else:
            update = RunUpdate.give_up(job.run, mine, error="no hope")
        done = trio.run(lambda: self.database.update(update, now=make.EPOCH))
        is_ours = before is not None and before.owner == job.owner
        assert (done is not None) == (
            is_ours and before is not None and before.status == TRANSFERRING
        )
        if done is not None:
            assert self.entry is not None
            assert self.entry.status == (VERIFYING if end == "arrived" else ERROR)

    @rule(site=st.sampled_from(SITES))
    def withdraw(self, site: str) -> None:
        """A reaction takes back its own unfinished entry, and nobody else's."""
        job, before = self.job(site), self.entry
        trigger = lifecycle.trigger_of("make", job)
        if (update := lifecycle.withdrawal(job.run, WANTED, trigger)) is None:
            return
        if trio.run(lambda: self.database.update(update, now=make.EPOCH)) is not None:
            assert before is not None
            assert before.fields["trigger"] == trigger
            assert before.status == TRANSFERRING
            self.claimed.pop(site, None)

    @invariant()
    def at_most_one(self) -> None:
        """There is never a second entry of the copy."""
        assert sum(one.key == WANTED for one in self.database.run.copies) <= 1


class _Site:
    def __init__(self, name: str) -> None:
        self.name = name


def _is_requested(entry: Copy | None) -> bool:
    return entry is not None and bool(entry.status == REQUESTED or entry.fields.get("requested"))


TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = settings(max_examples=50, stateful_step_count=40)


# -- several targets -----------------------------------------------------------------------------


async def served(names: str, **ends: Exception | str) -> tuple[Skip | Exception | None, list[str]]:
    """What comes of serving these sites when each ends so, and who was served."""
    job, asked = Lifecycle(), list[str]()
    job.begin()
    one = job.job("lngs")

    async def serve(_job: Job, name: str, others: tuple[RunUpdate, ...]) -> str | None:
        asked.append(name)
        end = ends.get(name)
        if isinstance(end, Exception):
            raise end
        return end

    try:
        return await lifecycle.serve_each(one, names, serve), asked
    except (Retry, GiveUp) as error:
        return error, asked


async def test_one_site_that_fails_keeps_no_other_from_being_served() -> None:
    """The error that may still come right is raised when all have had their turn."""
    late, soon, last = Retry("late", after=9.0), Retry("soon", after=1.0), GiveUp("last")
    found, asked = await served("abcd", a=last, b=late, c=soon)
    assert found is soon
    assert asked == [*"abcd"]


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ({}, None),
        ({"a": "it is there"}, None),
        ({"a": "it is there", "b": Superseded("too late")}, Skip("it is there; too late")),
    ],
)
async def test_nothing_to_do_is_said_if_it_is_so_everywhere(
    ends: dict[str, Any], expected: Skip | None
) -> None:
    found, _ = await served("ab", **ends)
    assert found == expected


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, None),
        ({"status": ERROR}, "is error"),
        ({"location": None}, "no location"),
        ({"checksum": None}, "no digest"),
    ],
)
def test_what_a_source_must_have(change: dict[str, Any], why: str | None) -> None:
    good = Copy(SOURCE, TRANSFERRED, _entry(SOURCE, TRANSFERRED, "/xenon/run"))
    one = Copy.from_entry({**good.fields, **change})
    assert one is not None
    found = lifecycle.unfit(one)
    assert (found is None) if why is None else (why in str(found))
    assert "there is no copy: raw at xenon" in str(lifecycle.unfit(None, SOURCE))
