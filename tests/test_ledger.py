"""The life of a reaction, as a state machine beside a store that keeps `database`'s rules."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from itertools import count
from math import inf
from typing import Any

import pytest
from attrs import astuple, evolve, frozen
from bson import ObjectId
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from caxev.core.ledger import (
    FIRST_DELAY,
    INTERRUPTIONS,
    LONGEST_DELAY,
    LONGEST_NOTE,
    PATIENCE,
    SHORTEST_DELAY,
    SURPRISES,
    Done,
    Failed,
    Hindered,
    Interrupted,
    Outcome,
    Postponed,
    Reaction,
    State,
    Surprise,
    aspect_from,
    aspect_row,
    claim,
    delay,
    interrupt,
    priority_of,
    reaction_key,
    run_prefix,
    settle,
)
from caxev.core.model import (
    Aspect,
    CopyKey,
    Event,
    Tag,
)
from tests import strategies as make

ALLOWED = 7
FINAL = (State.DONE, State.FAILED)
jitters = st.floats(0, 1, exclude_max=True)
outcomes = st.one_of(
    st.builds(Done, make.texts),
    st.builds(Postponed, make.texts),
    st.builds(Postponed, make.texts, st.floats(-10, 1e12)),
    st.builds(Surprise, make.texts),
    st.builds(Failed, make.texts),
    st.builds(Interrupted, make.texts),
    st.builds(Hindered, make.texts),
    st.builds(Hindered, make.texts, st.just(inf), st.sampled_from(["", "/data/raw"])),
)


def reaction_of(aspect: Aspect = Tag("go"), generation: int = 1) -> Reaction:  # noqa: B008  # immutable
    event = Event("run", aspect, None, "yes")
    return Reaction("lngs", event, "react", lane="default", generation=generation, at=make.EPOCH)


class Store:
    """The ledger's rules as `caxev.database` has them in its filters, in memory."""

    def __init__(self) -> None:
        self.rows: dict[str, Reaction] = {}

    def new_reaction(self, reaction: Reaction) -> None:
        standing = self.rows.get(reaction.id)
        # A renewal leaves a claim as it is: the attempt that holds it is still under way.
        epoch = reaction.epoch or (standing.epoch if standing else None)
        self.rows[reaction.id] = evolve(reaction, epoch=epoch)

    def claim(self, reaction: Reaction, epoch: int) -> bool:
        row = self.rows[reaction.id]
        if (row.generation, row.state, row.epoch) != (reaction.generation, State.PENDING, None):
            return False
        self.rows[reaction.id] = claim(row, epoch)
        return True

    def settle(self, reaction: Reaction, epoch: int) -> str:
        row = self.rows[reaction.id]
        if row.epoch != epoch:
            return "late"
        if row.generation != reaction.generation:
            self.rows[reaction.id] = evolve(row, state=State.PENDING, epoch=None)
            return "renewed"
        self.rows[reaction.id] = reaction
        return "counted"

    def interrupt_claims(self, now: datetime) -> None:
        for id_, row in self.rows.items():
            if row.epoch is not None:
                running = row.state is State.RUNNING
                self.rows[id_] = interrupt(row, now) if running else evolve(row, epoch=None)


@frozen
class Attempt:
    """A claimed reaction under way in the process of that epoch."""

    reaction: Reaction
    epoch: int


class Ledger(RuleBasedStateMachine):
    """Processes come and go; events, attempts and late settlements in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.store = Store()
        self.generations = count(1)
        self.now = make.EPOCH
        self.epoch = 1
        self.attempts: list[Attempt] = []
        self.final: dict[str, Reaction] = {}
        self.failures: dict[str, int] = {}

    def live(self, reaction_key: str) -> list[Attempt]:
        return [a for a in self.attempts if a.reaction.id == reaction_key and a.epoch == self.epoch]

    @rule(name=st.sampled_from("abc"), born_claimed=st.booleans())
    def new_reaction(self, name: str, *, born_claimed: bool) -> None:
        """An event makes a reaction, or renews the one that is there."""
        reaction = evolve(reaction_of(Tag(name), next(self.generations)), due=self.now)
        if born_claimed and not self.live(reaction.id):
            reaction = claim(reaction, self.epoch)
            self.attempts.append(Attempt(reaction, self.epoch))
        self.store.new_reaction(reaction)
        self.final.pop(reaction.id, None)
        self.failures[reaction.id] = 0

    @precondition(lambda self: self.store.rows)
    @rule(data=st.data(), stale=st.booleans())
    def claim(self, data: Any, *, stale: bool) -> None:
        """A claim counts where the reaction is as it was read, due or not."""
        row = data.draw(st.sampled_from(list(self.store.rows.values())))
        seen = evolve(row, generation=row.generation - 1) if stale else row
        free = row.state is State.PENDING and row.epoch is None
        assert self.store.claim(seen, self.epoch) == (free and not stale)
        if free and not stale:
            self.attempts.append(Attempt(claim(row, self.epoch), self.epoch))

    @precondition(lambda self: self.attempts)
    @rule(data=st.data(), outcome=outcomes, jitter=jitters)
    def settle(self, data: Any, outcome: Outcome, jitter: float) -> None:
        """An attempt ends; where its process was deposed meanwhile, nothing changes."""
        attempt = data.draw(st.sampled_from(self.attempts))
        self.attempts.remove(attempt)
        before = self.store.rows[attempt.reaction.id]
        settled = settle(attempt.reaction, outcome, self.now, allowed=ALLOWED, jitter=jitter)
        done = self.store.settle(settled, attempt.epoch)
        after = self.store.rows[attempt.reaction.id]
        if attempt.epoch != self.epoch:
            assert (done, after) == ("late", before)
        elif before.generation != attempt.reaction.generation:
            assert (done, after.state, after.epoch) == ("renewed", State.PENDING, None)
        else:
            assert done == "counted"
            self.failures[settled.id] += settled.attempts - attempt.reaction.attempts
        if after.state in FINAL:
            self.final[after.id] = after

    @rule()
    def take_over(self) -> None:
        """Another process takes the site; the old one's attempts go on, and count no more."""
        self.epoch += 1
        self.store.interrupt_claims(self.now)
        self.final |= {id_: row for id_, row in self.store.rows.items() if row.state in FINAL}

    @rule(seconds=st.floats(0, 10_000))
    def wait(self, seconds: float) -> None:
        """Time goes by."""
        self.now += timedelta(seconds=seconds)

    @invariant()
    def what_is_final_stays(self) -> None:
        """DONE and FAILED are final for their mark."""
        for id_, row in self.final.items():
            assert self.store.rows[id_] == row

    @invariant()
    def a_claim_has_its_attempt(self) -> None:
        """What is claimed is under way in the process of now, one attempt a slot."""
        for id_, row in self.store.rows.items():
            assert len(self.live(id_)) == (row.epoch is not None)
            assert row.epoch in (None, self.epoch)
            assert row.state is not State.RUNNING or row.epoch == self.epoch
            assert row.state not in FINAL or row.epoch is None

    @invariant()
    def attempts_are_bounded(self) -> None:
        """Only so many failures and deaths, then the reaction is parked."""
        for row in self.store.rows.values():
            assert row.attempts <= ALLOWED
            assert row.attempts == self.failures[row.id]
            assert row.attempts < ALLOWED or row.state is State.FAILED
            assert row.interrupted <= INTERRUPTIONS
            assert row.interrupted < INTERRUPTIONS or row.state is State.FAILED

    def teardown(self) -> None:
        """Nothing is lost: whatever came before, every reaction can be brought to its end."""
        self.take_over()
        for row in list(self.store.rows.values()):
            if row.state not in FINAL:
                assert self.store.claim(row, self.epoch)
                taken = claim(row, self.epoch)
                paid = settle(taken, Done(), self.now, allowed=ALLOWED, jitter=0)
                assert self.store.settle(paid, self.epoch) == "counted"
        assert all(row.state in FINAL for row in self.store.rows.values())


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=60, stateful_step_count=40)


@given(st.lists(make.names, unique=True, max_size=4), st.lists(make.names, max_size=4))
def test_the_first_tag_counts_most(urgent: list[str], tags: list[str]) -> None:
    """A run is as urgent as the most urgent of its tags; without one it is 0, the least."""
    priority = priority_of({Tag(name): "yes" for name in tags}, urgent)
    places = [urgent.index(name) for name in tags if name in urgent]
    assert priority == (len(urgent) - min(places) if places else 0)
    assert (priority > 0) == bool(places)


@given(outcomes, jitters)
def test_a_settlement_frees_and_is_never_early(outcome: Outcome, jitter: float) -> None:
    """A settled reaction is claimed by nobody, and if open again is due now or later."""
    taken = claim(reaction_of(), 3)
    after = settle(taken, outcome, make.EPOCH, allowed=ALLOWED, jitter=jitter)
    assert after.epoch is None
    assert after.state in (State.PENDING, *FINAL)
    assert after.due >= make.EPOCH
    assert (after.id, after.generation, after.event) == (taken.id, taken.generation, taken.event)


@given(st.sampled_from([Surprise("x"), Postponed("x")]), st.integers(1, 30))
def test_failures_park_after_their_number(outcome: Outcome, allowed: int) -> None:
    """Surprises and back-offs are tried so often, then parked with the reason."""
    bound = min(allowed, SURPRISES) if isinstance(outcome, Surprise) else allowed
    reaction, tries = reaction_of(), 0
    while reaction.state is State.PENDING and tries <= bound:
        reaction = settle(claim(reaction, 1), outcome, make.EPOCH, allowed=allowed, jitter=0.5)
        tries += 1
    assert (tries, reaction.state, reaction.attempts) == (bound, State.FAILED, bound)
    assert reaction.note == f"x (given up after {bound} attempts)"


@pytest.mark.parametrize("outcome", [Postponed("later", 60.0), Interrupted()])
def test_what_costs_nothing(outcome: Outcome) -> None:
    """A delay that the handler asked for, and a process that left, cost no attempt."""
    reaction = reaction_of()
    for _ in range(100):
        reaction = settle(claim(reaction, 1), outcome, make.EPOCH, allowed=1, jitter=0)
    assert (reaction.state, reaction.attempts) == (State.PENDING, 0)


@given(st.floats(-1e9, 1e9, allow_nan=False))
def test_nothing_is_tried_again_at_once(after: float) -> None:
    """However soon a handler asks for it, or even in the past."""
    reaction = settle(
        claim(reaction_of(), 1), Postponed("x", after), make.EPOCH, allowed=1, jitter=0
    )
    assert reaction.due >= make.EPOCH + timedelta(seconds=SHORTEST_DELAY)


def test_what_kills_its_process_is_parked() -> None:
    """A reaction that is running whenever the process dies is suspected in the end."""
    reaction, deaths = reaction_of(), 0
    while reaction.state is State.PENDING and deaths <= INTERRUPTIONS:
        reaction = interrupt(claim(reaction, deaths), make.EPOCH)
        deaths += 1
    assert (deaths, reaction.state, reaction.epoch) == (INTERRUPTIONS, State.FAILED, None)
    assert reaction.note == f"the listener died {INTERRUPTIONS} times while this ran"


def test_only_what_is_open_is_claimed_and_what_runs_is_settled() -> None:
    """The transitions that do not exist raise."""
    taken = claim(reaction_of(), 1)
    done = settle(taken, Done(), make.EPOCH, allowed=1, jitter=0)
    for reaction in (taken, done):
        with pytest.raises(ValueError, match=f"cannot claim a reaction that is {reaction.state}"):
            claim(reaction, 2)
    for reaction in (reaction_of(), done):
        with pytest.raises(ValueError, match=f"cannot settle a reaction that is {reaction.state}"):
            settle(reaction, Done(), make.EPOCH, allowed=1, jitter=0)


@given(st.integers(1, 10**6), jitters)
def test_delays_are_bounded(attempts: int, jitter: float) -> None:
    """Back-off lies between half the first delay and one and a half times the longest."""
    assert FIRST_DELAY / 2 <= delay(attempts, jitter) <= LONGEST_DELAY * 1.5
    assert delay(attempts, jitter) <= delay(attempts + 1, jitter)


runs = st.one_of(
    st.binary(min_size=12, max_size=12).map(ObjectId), make.texts, st.integers(0, 3), st.booleans()
)
slots = st.tuples(make.names, runs, make.aspects, make.names)


def _other(one: Any) -> tuple[Any, ...]:
    return (one[0], type(one[1]), one[1], tuple(one[2]), one[3])


@given(slots, slots)
def test_slots_are_unambiguous(one: Any, two: Any) -> None:
    """Two slots have one key only if they are one slot, whatever the names."""
    assert (reaction_key(*one) == reaction_key(*two)) == (_other(one) == _other(two))


@given(slots)
def test_a_key_is_json(one: Any) -> None:
    """As the ledger has it: a listener of another version must find the same key."""
    site, _run, aspect, handler = one
    key = json.loads(reaction_key(*one))
    assert [key[0], *key[2:]] == [site, *aspect, handler]
    assert reaction_key(*one) == json.dumps(key)


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (("s", "1", Tag("a"), "h"), ("s", 1, Tag("a"), "h")),
        (("s", "0" * 24, Tag("a"), "h"), ("s", ObjectId("0" * 24), Tag("a"), "h")),
        (("s", 1, Tag('a", "b'), "h"), ("s", 1, CopyKey("a", "b"), "h")),
        (("s", 1, CopyKey("a", "b"), "h"), ("s", 1, CopyKey("a", "b", "None"), "h")),
    ],
)
def test_slots_that_look_alike(one: Any, two: Any) -> None:
    """A run's id keeps its type, and a name stays inside its quotes."""
    assert reaction_key(*one) != reaction_key(*two)


@given(slots, make.names, runs)
def test_a_prefix_finds_the_slots_of_one_run(one: Any, site: str, run: Any) -> None:
    """A run's prefix begins its own slots, and no other's."""
    here, its = one[:2]
    assert reaction_key(*one).startswith(run_prefix(here, its))
    mine = (site, type(run), run) == (here, type(its), its)
    assert reaction_key(*one).startswith(run_prefix(site, run)) == mine


@given(make.aspects)
def test_an_aspect_comes_back_from_its_row(aspect: Aspect) -> None:
    """The database's row of an aspect is that aspect."""
    again = aspect_from(aspect_row(aspect))
    assert again == aspect
    assert type(again) is type(aspect)


def hindered_for(seconds: float, outcome: Hindered, jitter: float = 0.5) -> Reaction:
    """A reaction whose attempts have all ended so, the last of them after so many seconds."""
    reaction, now = reaction_of(), make.EPOCH
    while True:
        reaction = settle(claim(reaction, 1), outcome, now, allowed=ALLOWED, jitter=jitter)
        if reaction.state is State.FAILED or (now - make.EPOCH).total_seconds() >= seconds:
            return reaction
        now = reaction.due


def test_a_refusal_is_waited_out_for_days_and_not_longer() -> None:
    """It costs no attempt, is tried again ever more rarely, and ends in FAILED after a week."""
    refused = Hindered("our key is refused")
    for seconds in (0.0, 20.0, 3600.0, PATIENCE / 2):
        reaction = hindered_for(seconds, refused)
        assert (reaction.state, reaction.attempts, reaction.hindered) == (
            State.PENDING,
            0,
            make.EPOCH,
        )
        assert reaction.due - make.EPOCH <= timedelta(seconds=max(20.0, seconds) * 2 + 7200)
    reaction = hindered_for(2 * PATIENCE, refused)
    assert (reaction.state, reaction.attempts) == (State.FAILED, 0)
    assert "given up after 7 days" in reaction.note
    assert hindered_for(2 * PATIENCE, Hindered("it is away", inf)).state is State.PENDING


def test_what_waits_for_a_disk_says_for_which() -> None:
    """Any other end forgets it; a listener that is stopped does not."""
    away = settle(
        claim(reaction_of(), 1),
        Hindered("x", inf, "/data"),
        make.EPOCH,
        allowed=ALLOWED,
        jitter=0.5,
    )
    assert (away.root, away.due) == ("/data", make.EPOCH + timedelta(seconds=LONGEST_DELAY))
    for outcome, root in ((Interrupted(), "/data"), (Done(), ""), (Postponed("y"), "")):
        after = settle(claim(away, 1), outcome, make.EPOCH, allowed=ALLOWED, jitter=0.5)
        assert (after.root, after.hindered is None) == (root, not root)


@pytest.mark.parametrize("kind", [Done, Postponed, Surprise, Failed, Interrupted, Hindered])
def test_a_reason_of_any_length_is_brief(kind: Any) -> None:
    """It is searched, logged and kept, by the loop that serves all runs."""
    text = "".join(str(part) for part in astuple(kind("x" * 1_000_000)) if isinstance(part, str))
    assert text == "x" * LONGEST_NOTE + " ..."
    assert astuple(kind("\udcff"))[0] == "\\udcff"
