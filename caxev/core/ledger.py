"""The life of a reaction: one event that one handler still has to react to.

Theory
------
A site owes a reaction for every pair of an event and a handler that wants it. The ledger keeps
one reaction for each *key*: (site, run, aspect, handler). A newer event on the same aspect does not
make a second reaction: handlers look at the run as it is now, so it renews the one that is there.
That is why the same handler runs on the same copy one at a time and in order, and why the ledger
grows with the copies and not with time.

::

              renew                 claim                   settle: Done
    (none) ────────▶ PENDING ──────────────▶ RUNNING ─────────────────────▶ DONE
                     ▲ ▲ ▲                     │ │ │                          │
                     │ │ └── settle: Postponed ┘ │ └─ settle: Failed ▶ FAILED │
                     │ └──── interrupt ──────────┘                       │    │
                     └───────────────────────── renew ───────────────────┴────┘

A reaction that is `Hindered` is PENDING again as one that is `Postponed`; when the disk that it
waited for is back, it is due at once.

Each renewal gives the reaction a new `generation`. A settlement names the generation that was
claimed: where the reaction was renewed meanwhile the settlement changes nothing and the reaction
stays PENDING, to be looked at again. DONE and FAILED are final for their generation: only a renewal
opens the key again.

A claim carries the epoch of the process that made it. When another process takes the site over it
interrupts every claim of an older epoch, so a deposed process can settle nothing.

Callers: `watcher` makes reactions, `dispatcher` claims and settles them, `database` stores them.
Pure: `now` (UTC) and the jitter are arguments. Property-tested as a state machine in
tests/test_ledger.py.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from functools import cached_property
from json import dumps
from typing import Final, TypeAlias

from attrs import evolve, frozen

from caxev.core.model import Aspect, CopyField, CopyKey, Event, Existence, Field, RunId, Tag

FIRST_DELAY: Final = 5.0
"""Seconds before the second attempt; each further one waits twice as long..."""
LONGEST_DELAY: Final = 3600.0
"""...up to this many seconds."""
SHORTEST_DELAY: Final = 1.0
"""Seconds before the next attempt at least, however soon a handler asks for it."""
NEWEST_FIRST: Final = frozenset({"transfer"})
"""Lanes in which what is due goes by priority, then newest first; in all others oldest first."""
UNREADABLE: Final = "caxev.unreadable"
"""The handler's name in a reaction that nobody pays: it shows a run which could not be recorded."""
SURPRISES: Final = 5
"""How often an unexpected error is tried again before the reaction is parked."""
PATIENCE: Final = 7 * 86400.0
"""Seconds to wait until somebody lifts a refusal, before the reaction is parked."""
INTERRUPTIONS: Final = 20
"""How often a reaction may be running when its process dies before it is suspected and parked."""


class State(StrEnum):
    """Where a reaction stands; see the module's theory."""

    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@frozen
class Done:
    """The handler ran through; `note` says what came of it."""

    note: str = ""


@frozen
class Postponed:
    """To be tried again: after `after` seconds, or with back-off. Only back-off counts."""

    why: str
    after: float | None = None


@frozen
class Surprise:
    """An error that the handler did not foresee."""

    why: str


@frozen
class Failed:
    """Not to be tried again until a person says so."""

    why: str


@frozen
class Interrupted:
    """The process was asked to leave before the handler was through. Costs nothing."""

    why: str = "interrupted"


@frozen
class Hindered:
    """Something outside must change first: a refusal be lifted, a disk be mounted.

    Costs no attempt: it is tried again when half as long again as it has waited is over, and given
    up when it has waited for `patience` seconds. `root`: a directory of our own that is away; the
    listener opens the reaction when that is back. `host`: the other machine on which it is away.
    `watched`: a listener that looks after that directory raises the alarm.
    """

    why: str
    patience: float = PATIENCE
    root: str = ""
    host: str = ""
    watched: bool = False


Outcome: TypeAlias = Done | Postponed | Surprise | Failed | Interrupted | Hindered


def aspect_row(aspect: Aspect) -> list[str | None]:
    """Return an aspect as the database keeps it: texts, of each kind another number."""
    return list(aspect)


def aspect_from(row: Sequence[str | None]) -> Aspect:
    """Return the aspect that `aspect_row` made a row of."""
    return _ASPECTS[len(row)](*row)


_ASPECTS: Final[dict[int, Callable[..., Aspect]]] = {
    4: CopyField,
    3: CopyKey,
    2: Field,
    1: Tag,
    0: Existence,
}


@frozen
class Reaction:
    """One key of the ledger.

    `before` and `after` are the aspect's values around the event; `at` is the event's cluster
    time and `due` when to act, both UTC. `attempts` counts failures since the last renewal,
    `interrupted` deaths of the process. `note` says why it waits or failed, or what came of it.
    `started` is when the first attempt since the renewal began, UTC. Where a lane goes by
    `priority`, the higher is due first. `hindered` is since when it has waited for something
    outside, UTC, and `root` the directory of ours that it waits for, if any.
    """

    site: str
    run: RunId
    aspect: Aspect
    handler: str
    lane: str
    before: str | None
    after: str | None
    generation: int
    at: datetime
    due: datetime
    state: State = State.PENDING
    epoch: int | None = None
    attempts: int = 0
    interrupted: int = 0
    note: str = ""
    started: datetime | None = None
    priority: int = 0
    hindered: datetime | None = None
    root: str = ""

    @cached_property
    def id(self) -> str:
        """The key, as text: the reaction's key in the database."""
        return reaction_key(self.site, self.run, self.aspect, self.handler)

    @property
    def event(self) -> Event:
        """The event that is owed a reaction."""
        return Event(self.run, self.aspect, self.before, self.after)


def reaction_key(site: str, run: RunId, aspect: Aspect, handler: str) -> str:
    """Return the key of a key: all keys of one run share the prefix `slot_prefix`."""
    return dumps([site, _run_text(run), *aspect, handler])


def run_prefix(site: str, run: RunId) -> str:
    """Return what the keys of all keys of a run at a site begin with."""
    return dumps([site, _run_text(run)])[:-1] + ","


def site_prefix(site: str) -> str:
    """Return what the keys of all keys of a site begin with."""
    return dumps([site])[:-1] + ","


def _run_text(run: RunId) -> str:
    # An ObjectId's own text; of any other id one that separates 1 from "1".
    return str(run) if type(run).__name__ == "ObjectId" else repr(run)


def new_reaction(
    site: str,
    event: Event,
    handler: str,
    *,
    lane: str,
    generation: int,
    at: datetime,
    priority: int = 0,
) -> Reaction:
    """Return a new reaction to an event, due at once.

    `generation` must never have been used; `at` is when the event happened, UTC.
    """
    return Reaction(
        site=site,
        run=event.run,
        aspect=event.aspect,
        handler=handler,
        lane=lane,
        before=event.before,
        after=event.after,
        generation=generation,
        at=at,
        due=at,
        priority=priority,
    )


def priority_of(snapshot: Container[Aspect], tags: Sequence[str]) -> int:
    """Return the priority of a run that looks so: of these tags the first counts most; 0: none."""
    for place, name in enumerate(tags):
        if Tag(name) in snapshot:
            return len(tags) - place
    return 0


def claim(reaction: Reaction, epoch: int) -> Reaction:
    """Take an open reaction for the process with this epoch."""
    if reaction.state is not State.PENDING:
        raise ValueError(f"cannot claim a reaction that is {reaction.state}")
    return evolve(reaction, state=State.RUNNING, epoch=epoch)


def settle(
    reaction: Reaction, outcome: Outcome, now: datetime, *, allowed: int, jitter: float
) -> Reaction:
    """Return a claimed reaction as it stands after an attempt.

    `allowed` is the handler's number of attempts; `jitter` in [0, 1) spreads the back-off over
    half to one and a half times its length.
    """
    if reaction.state is not State.RUNNING:
        raise ValueError(f"cannot settle a reaction that is {reaction.state}")
    if isinstance(outcome, Done):
        done = evolve(reaction, epoch=None, state=State.DONE, note=outcome.note)
        return evolve(done, hindered=None, root="")
    if isinstance(outcome, Hindered):
        return _hindered(reaction, outcome, now, jitter)
    if isinstance(outcome, Interrupted):
        return evolve(
            reaction,
            epoch=None,
            state=State.PENDING,
            due=now,
            note=reaction.note if reaction.hindered else outcome.why,
        )
    free = evolve(reaction, epoch=None, hindered=None, root="")
    match outcome:
        case Failed(why):
            return evolve(free, state=State.FAILED, note=why)
        case Postponed(why, after) if after is not None:
            due = _later(now, max(after, SHORTEST_DELAY))
            return evolve(free, state=State.PENDING, due=due, note=why)
        case Surprise(why):
            return _again(free, why, now, min(allowed, SURPRISES), jitter)
        case Postponed(why):
            return _again(free, why, now, allowed, jitter)


def interrupt(reaction: Reaction, now: datetime) -> Reaction:
    """Return a claimed reaction whose process died: open again, or parked if that is its habit."""
    times = reaction.interrupted + 1
    if times >= INTERRUPTIONS:
        why = f"the listener died {times} times while this ran"
        return evolve(reaction, state=State.FAILED, epoch=None, interrupted=times, note=why)
    return evolve(reaction, state=State.PENDING, epoch=None, due=now, interrupted=times)


def delay(attempts: int, jitter: float) -> float:
    """Return the seconds to wait after the `attempts`-th failure in a row."""
    exponent = min(attempts - 1, 32)
    return float(min(FIRST_DELAY * 2**exponent, LONGEST_DELAY) * (0.5 + jitter))


def _hindered(reaction: Reaction, outcome: Hindered, now: datetime, jitter: float) -> Reaction:
    since = reaction.hindered or now
    waited = max((now - since).total_seconds(), 0.0)
    if waited >= outcome.patience:
        note = f"{outcome.why} (given up after {waited / 86400:.0f} days)"
        return evolve(reaction, epoch=None, state=State.FAILED, hindered=None, root="", note=note)
    pause = LONGEST_DELAY if outcome.root else min(max(waited / 2, FIRST_DELAY), LONGEST_DELAY)
    due = _later(now, pause * (0.5 + jitter))
    free = evolve(reaction, epoch=None, state=State.PENDING, due=due, note=outcome.why)
    return evolve(free, hindered=since, root=outcome.root)


def _again(reaction: Reaction, why: str, now: datetime, allowed: int, jitter: float) -> Reaction:
    attempts = reaction.attempts + 1
    if attempts >= allowed:
        note = f"{why} (given up after {attempts} attempts)"
        return evolve(reaction, state=State.FAILED, attempts=attempts, note=note)
    due = _later(now, delay(attempts, jitter))
    return evolve(reaction, state=State.PENDING, attempts=attempts, due=due, note=why)


def _later(now: datetime, seconds: float) -> datetime:
    # A year is for ever here, and keeps any number that a handler gives inside datetime's range.
    return now + timedelta(seconds=min(seconds, 366 * 86400.0))
