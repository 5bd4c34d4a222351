"""The life of a debt: one event that one handler still has to react to.

Theory
------
A site owes a reaction for every pair of an event and a handler that wants it. The ledger keeps
one debt for each *slot*: (site, run, aspect, handler). A newer event on the same aspect does not
make a second debt: handlers look at the run as it is now, so it renews the one that is there.
That is why the same handler runs on the same copy one at a time and in order, and why the ledger
grows with the copies and not with time.

::

              renew                 claim                   settle: Paid
    (none) ─────────▶ OPEN ────────────────▶ RUNNING ─────────────────────▶ DONE
                     ▲ ▲ ▲                     │ │ │                          │
                     │ │ └── settle: Postponed ┘ │ └─ settle: Spent ▶ FAILED  │
                     │ └──── interrupt ──────────┘                       │    │
                     └───────────────────────── renew ───────────────────┴────┘

A debt that is `Hindered` is OPEN again as one that is `Postponed`; when the disk that it waited for
is back, it is due at once.

Each renewal gives the debt a new `mark`. A settlement names the mark that was claimed: where the
debt was renewed meanwhile the settlement changes nothing and the debt stays OPEN, to be looked at
again. DONE and FAILED are final for their mark: only a renewal opens the slot again.

A claim carries the epoch of the process that made it. When another process takes the site over it
interrupts every claim of an older epoch, so a deposed process can settle nothing.

Callers: `watcher` makes debts, `dispatcher` claims and settles them, `database` stores them. Pure:
`now` (UTC) and the jitter are arguments. Property-tested as a state machine in
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
"""The handler's name in a debt that nobody pays: it shows a run which could not be recorded."""
SURPRISES: Final = 5
"""How often an unexpected error is tried again before the debt is parked."""
PATIENCE: Final = 7 * 86400.0
"""Seconds for which a refusal that somebody must lift is waited out before the debt is parked."""
INTERRUPTIONS: Final = 20
"""How often a debt may be running when its process dies before it is suspected and parked."""


class State(StrEnum):
    """Where a debt stands; see the module's theory."""

    OPEN = "open"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@frozen
class Paid:
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
class Spent:
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
    listener opens the debt when that is back. `host`: the other machine on which it is away.
    `watched`: a listener that looks after that directory raises the alarm.
    """

    why: str
    patience: float = PATIENCE
    root: str = ""
    host: str = ""
    watched: bool = False


Outcome: TypeAlias = Paid | Postponed | Surprise | Spent | Interrupted | Hindered


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
class Debt:
    """One slot of the ledger.

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
    mark: int
    at: datetime
    due: datetime
    state: State = State.OPEN
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
        """The slot, as text: the debt's key in the database."""
        return slot(self.site, self.run, self.aspect, self.handler)

    @property
    def event(self) -> Event:
        """The event that is owed a reaction."""
        return Event(self.run, self.aspect, self.before, self.after)


def slot(site: str, run: RunId, aspect: Aspect, handler: str) -> str:
    """Return the key of a slot: all keys of one run share the prefix `slot_prefix`."""
    return dumps([site, _run_text(run), *aspect, handler])


def slot_prefix(site: str, run: RunId) -> str:
    """Return what the keys of all slots of a run at a site begin with."""
    return dumps([site, _run_text(run)])[:-1] + ","


def site_prefix(site: str) -> str:
    """Return what the keys of all slots of a site begin with."""
    return dumps([site])[:-1] + ","


def _run_text(run: RunId) -> str:
    # An ObjectId's own text; of any other id one that tells 1 from "1".
    return str(run) if type(run).__name__ == "ObjectId" else repr(run)


def owe(
    site: str,
    event: Event,
    handler: str,
    *,
    lane: str,
    mark: int,
    at: datetime,
    priority: int = 0,
) -> Debt:
    """Return the debt that an event makes, due at once. `mark` must never have been used."""
    return Debt(
        site=site,
        run=event.run,
        aspect=event.aspect,
        handler=handler,
        lane=lane,
        before=event.before,
        after=event.after,
        mark=mark,
        at=at,
        due=at,
        priority=priority,
    )


def priority_of(look: Container[Aspect], tags: Sequence[str]) -> int:
    """Return the priority of a run that looks so: of these tags the first counts most; 0: none."""
    for place, name in enumerate(tags):
        if Tag(name) in look:
            return len(tags) - place
    return 0


def claim(debt: Debt, epoch: int) -> Debt:
    """Take an open debt for the process with this epoch."""
    if debt.state is not State.OPEN:
        raise ValueError(f"cannot claim a debt that is {debt.state}")
    return evolve(debt, state=State.RUNNING, epoch=epoch)


def settle(debt: Debt, outcome: Outcome, now: datetime, *, allowed: int, jitter: float) -> Debt:
    """Return a claimed debt as it stands after an attempt.

    `allowed` is the handler's number of attempts; `jitter` in [0, 1) spreads the back-off over
    half to one and a half times its length.
    """
    if debt.state is not State.RUNNING:
        raise ValueError(f"cannot settle a debt that is {debt.state}")
    if isinstance(outcome, Paid):
        done = evolve(debt, epoch=None, state=State.DONE, note=outcome.note)
        return evolve(done, hindered=None, root="")
    if isinstance(outcome, Hindered):
        return _hindered(debt, outcome, now, jitter)
    if isinstance(outcome, Interrupted):
        return evolve(
            debt,
            epoch=None,
            state=State.OPEN,
            due=now,
            note=debt.note if debt.hindered else outcome.why,
        )
    free = evolve(debt, epoch=None, hindered=None, root="")
    match outcome:
        case Spent(why):
            return evolve(free, state=State.FAILED, note=why)
        case Postponed(why, after) if after is not None:
            due = _later(now, max(after, SHORTEST_DELAY))
            return evolve(free, state=State.OPEN, due=due, note=why)
        case Surprise(why):
            return _again(free, why, now, min(allowed, SURPRISES), jitter)
        case Postponed(why):
            return _again(free, why, now, allowed, jitter)


def interrupt(debt: Debt, now: datetime) -> Debt:
    """Return a claimed debt whose process died: open again, or parked if that is its habit."""
    times = debt.interrupted + 1
    if times >= INTERRUPTIONS:
        why = f"the listener died {times} times while this ran"
        return evolve(debt, state=State.FAILED, epoch=None, interrupted=times, note=why)
    return evolve(debt, state=State.OPEN, epoch=None, due=now, interrupted=times)


def delay(attempts: int, jitter: float) -> float:
    """Return the seconds to wait after the `attempts`-th failure in a row."""
    exponent = min(attempts - 1, 32)
    return float(min(FIRST_DELAY * 2**exponent, LONGEST_DELAY) * (0.5 + jitter))


def _hindered(debt: Debt, outcome: Hindered, now: datetime, jitter: float) -> Debt:
    since = debt.hindered or now
    waited = max((now - since).total_seconds(), 0.0)
    if waited >= outcome.patience:
        note = f"{outcome.why} (given up after {waited / 86400:.0f} days)"
        return evolve(debt, epoch=None, state=State.FAILED, hindered=None, root="", note=note)
    pause = LONGEST_DELAY if outcome.root else min(max(waited / 2, FIRST_DELAY), LONGEST_DELAY)
    due = _later(now, pause * (0.5 + jitter))
    free = evolve(debt, epoch=None, state=State.OPEN, due=due, note=outcome.why)
    return evolve(free, hindered=since, root=outcome.root)


def _again(debt: Debt, why: str, now: datetime, allowed: int, jitter: float) -> Debt:
    attempts = debt.attempts + 1
    if attempts >= allowed:
        note = f"{why} (given up after {attempts} attempts)"
        return evolve(debt, state=State.FAILED, attempts=attempts, note=note)
    due = _later(now, delay(attempts, jitter))
    return evolve(debt, state=State.OPEN, attempts=attempts, due=due, note=why)


def _later(now: datetime, seconds: float) -> datetime:
    # A year is for ever here, and keeps any number that a handler gives inside datetime's range.
    return now + timedelta(seconds=min(seconds, 366 * 86400.0))
