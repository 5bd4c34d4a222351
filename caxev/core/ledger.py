"""The life cycle of a reaction: one event to which one handler has to react.

Theory
------
A site makes a reaction for every pair of an event and a handler that wants it. The ledger keeps one
reaction for each *key*: (site, run, aspect, handler). A newer event on the same aspect renews the
reaction that is there and does not make a second one, because handlers read the run as it is now.
So the same handler runs on the same copy one at a time and in order, and the ledger grows with what
is to be done and not with time.

::

              renew                 claim                   settle: Done
    (none) ────────▶ PENDING ──────────────▶ RUNNING ─────────────────────▶ DONE = (none)
                     ▲ ▲ ▲                     │ │ │
                     │ │ └── settle: Postponed ┘ │ └─ settle: Failed ▶ FAILED
                     │ └──── interrupt ──────────┘                       │
                     └───────────────────────── renew ───────────────────┘

A reaction that is `Hindered` becomes PENDING like one that is `Postponed`. If it waits for a disk,
it is due as soon as the disk is back.

Each renewal gives the reaction a new `generation`. A settlement names the generation that was
claimed: if the reaction was renewed meanwhile, the settlement changes nothing and the reaction
stays PENDING, to run again. DONE and FAILED are final for their generation: only a renewal opens
the key again.

The ledger keeps what is owed. A reaction that is DONE leaves it, and what it did becomes a row of
`history` in the same transaction. One that has FAILED stays until it is retried or renewed.

A claim carries the epoch of the process that made it. A process that takes the site over interrupts
every claim of an older epoch, so a deposed process can settle nothing.

`recording` makes reactions, `dispatcher` claims them, `settling` settles them, `database` stores
them. Pure: `now` (UTC) and the jitter are arguments. Property-tested as a state machine in
tests/test_ledger.py.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from functools import cached_property, lru_cache
from json import dumps
from json.encoder import encode_basestring_ascii
from typing import Final, TypeAlias

from attrs import Factory, evolve, field, frozen

from caxev.core.errors import seconds
from caxev.core.model import Aspect, CopyField, CopyKey, Event, Existence, Field, RunId, Tag

FIRST_DELAY: Final = 5.0
"""Seconds before the second attempt; each further one waits twice as long..."""
LONGEST_DELAY: Final = 3600.0
"""...up to this many seconds."""
SHORTEST_DELAY: Final = 1.0
"""Seconds before the next attempt at least, however soon a handler asks for it."""
NEWEST_FIRST: Final = frozenset({"transfer"})
"""Lanes that start due reactions by priority, then newest first; all others start the oldest."""
UNREADABLE: Final = "caxev.unreadable"
"""The handler's name in a reaction that never runs: it shows a run that could not be recorded."""
SURPRISES: Final = 5
"""Attempts with an unexpected error after which the reaction is parked."""
PATIENCE: Final = 7 * 86400.0
"""Seconds that a reaction waits for a refusal to be lifted before it is parked."""
INTERRUPTIONS: Final = 20
"""Deaths of the process during a reaction after which it is parked as their likely cause."""


LONGEST_NOTE: Final = 2000
"""Characters of a reason that are kept: an error's text may be of any length."""


def _brief(text: object) -> str:
    kept = str(text)
    if len(kept) > LONGEST_NOTE:
        kept = f"{kept[:LONGEST_NOTE]} ..."
    # A file's name in it need not be valid text; the database takes only that.
    return kept.encode(errors="backslashreplace").decode()


class State(StrEnum):
    """The state of a reaction; see the module's theory."""

    PENDING = "pending"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@frozen
class Done:
    """The handler returned. `idle`: it did nothing, for the reason in `note`."""

    note: str = field(default="", converter=_brief)
    idle: bool = False


@frozen
class Postponed:
    """Try again after `after` seconds, or (None) with back-off. Only the latter is an attempt."""

    why: str = field(converter=_brief)
    after: float | None = field(default=None, converter=seconds)


@frozen
class Surprise:
    """An error that the handler did not foresee."""

    why: str = field(converter=_brief)


@frozen
class Failed:
    """Do not try again until a person asks for it."""

    why: str = field(converter=_brief)


@frozen
class Interrupted:
    """The process was asked to leave before the handler returned, or the database is in trouble.

    Costs no attempt. It is due again after so many seconds.
    """

    why: str = field(default="interrupted", converter=_brief)
    after: float = field(default=0.0, converter=float)


@frozen
class Hindered:
    """Something outside must change first: a refusal be lifted, a disk be mounted.

    Costs no attempt. It is tried again at growing intervals, each half of the time waited so far,
    and fails after `patience` seconds. `root`: a directory of our own that is away; the listener
    opens the reaction when it is back. `host`: the other machine on which it is away. `watched`:
    the listener that watches that directory raises the alarm.
    """

    why: str = field(converter=_brief)
    patience: float = PATIENCE
    root: str = field(default="", converter=str)
    host: str = field(default="", converter=str)
    watched: bool = False


Outcome: TypeAlias = Done | Postponed | Surprise | Failed | Interrupted | Hindered


def aspect_row(aspect: Aspect) -> list[str | None]:
    """Return an aspect as the database keeps it: a list of texts, whose length shows its kind."""
    return list(aspect)


def aspect_from(row: object) -> Aspect:
    """Return the aspect of a row that `aspect_row` made. Raises ValueError for any other."""
    if not isinstance(row, list) or len(row) not in _ASPECTS:
        raise ValueError(f"{str(row)[:100]} is no aspect")
    if not all(part is None or type(part) is str for part in row):
        raise ValueError(f"{str(row)[:100]} is no aspect: not all of it is text")
    return _ASPECTS[len(row)](*row)


# Each kind has a length of its own; a further kind needs another.
_ASPECTS: Final[dict[int, Callable[..., Aspect]]] = {
    4: CopyField,
    3: CopyKey,
    2: Field,
    1: Tag,
    0: Existence,
}


@frozen
class Reaction:
    """One key of the ledger: a handler's reaction to an event at a site.

    `generation` must never have been used. `at` is the event's cluster time and `due` when to act,
    both UTC; by default at once. `attempts` counts failures since the last renewal, `interrupted`
    deaths of the process. `note` is why it waits or failed, or its result. `started` is when the
    first attempt since the renewal began, UTC. In lanes that go by `priority`, the
    higher is due first. `hindered` is since when it has waited for something outside, UTC, and
    `root` the directory of ours that it waits for, if any.
    """

    site: str
    event: Event
    handler: str
    lane: str
    generation: int
    at: datetime
    due: datetime = Factory(lambda self: self.at, takes_self=True)
    state: State = State.PENDING
    epoch: int | None = None
    attempts: int = 0
    interrupted: int = 0
    note: str = field(default="", converter=_brief)
    started: datetime | None = None
    priority: int = 0
    hindered: datetime | None = None
    root: str = ""

    @cached_property
    def id(self) -> str:
        """The reaction's key as text, its ``_id`` in the database."""
        return reaction_key(self.site, self.run, self.aspect, self.handler)

    @property
    def run(self) -> RunId:
        return self.event.run

    @property
    def aspect(self) -> Aspect:
        return self.event.aspect


def reaction_key(site: str, run: RunId, aspect: Aspect, handler: str) -> str:
    """Return a reaction's key as text. All keys of one run begin with its `run_prefix`."""
    return f"{run_prefix(site, run)} {_key_end(aspect, handler)}"


@lru_cache(4096)  # most runs have the same aspects
def _key_end(aspect: Aspect, handler: str) -> str:
    return dumps([*aspect, handler])[1:]


def trigger_named(site: str, handler: str, aspect: Aspect) -> str:
    """Return the ``trigger`` of the entries that a reaction with this key has claimed."""
    # Without the attempt or process, which a restart changes: its successor continues the entry.
    return f"{site}: {handler}: {aspect}"


def run_prefix(site: str, run: RunId) -> str:
    """Return the beginning of the keys of all reactions to a run at a site."""
    return f"[{encode_basestring_ascii(site)}, {encode_basestring_ascii(_run_text(run))},"


def site_prefix(site: str) -> str:
    """Return the beginning of the keys of all reactions of a site."""
    return dumps([site])[:-1] + ","


def _run_text(run: RunId) -> str:
    # An ObjectId's own text is short and unique. For other ids, `repr` separates 1 from "1".
    return str(run) if type(run).__name__ == "ObjectId" else repr(run)


def priority_of(snapshot: Container[Aspect], tags: Sequence[str]) -> int:
    """Return the priority of a run: the earlier its tag is in the list, the higher; 0: no tag."""
    for place, name in enumerate(tags):
        if Tag(name) in snapshot:
            return len(tags) - place
    return 0


def claim(reaction: Reaction, epoch: int) -> Reaction:
    """Claim a pending reaction for the process with this epoch."""
    if reaction.state is not State.PENDING:
        raise ValueError(f"cannot claim a reaction that is {reaction.state}")
    return evolve(reaction, state=State.RUNNING, epoch=epoch)


def settle(
    reaction: Reaction, outcome: Outcome, now: datetime, *, allowed: int, jitter: float
) -> Reaction:
    """Return a claimed reaction as it is after an attempt.

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
        # A hindered reaction keeps its note: the key of the alarm about its refusal is made of it.
        return evolve(
            reaction,
            epoch=None,
            state=State.PENDING,
            due=_later(now, outcome.after),
            note=reaction.note if reaction.hindered else outcome.why,
        )
    # It may wait for something else, but no longer for a disk or a refusal.
    free = evolve(reaction, epoch=None, hindered=None, root="")
    match outcome:
        case Failed(why):
            return evolve(free, state=State.FAILED, note=why)
        case Postponed(why, after) if after is not None:
            due = _later(now, max(after, SHORTEST_DELAY))
            return evolve(free, state=State.PENDING, due=due, note=why)
        # A bug is seldom cured by time: fewer attempts than for what the handler foresaw.
        case Surprise(why):
            return _again(free, why, now, min(allowed, SURPRISES), jitter)
        case Postponed(why):
            return _again(free, why, now, allowed, jitter)


def interrupt(reaction: Reaction, now: datetime) -> Reaction:
    """Return a claimed reaction whose process died: pending, or failed after `INTERRUPTIONS`."""
    # A handler that kills the process (out of memory, a crash in C) would otherwise take the
    # listener down again at every start.
    times = reaction.interrupted + 1
    if times >= INTERRUPTIONS:
        why = f"the listener died {times} times while this ran"
        return evolve(reaction, state=State.FAILED, epoch=None, interrupted=times, note=why)
    return evolve(reaction, state=State.PENDING, epoch=None, due=now, interrupted=times)


def delay(attempts: int, jitter: float) -> float:
    """Return the seconds to wait after the `attempts`-th failure in a row."""
    # 2**1024 fits no float: a thousand failures must not raise OverflowError.
    exponent = min(attempts - 1, 32)
    return float(min(FIRST_DELAY * 2**exponent, LONGEST_DELAY) * (0.5 + jitter))


def _hindered(reaction: Reaction, outcome: Hindered, now: datetime, jitter: float) -> Reaction:
    # Another refusal does not begin the wait again: else two that alternate would never end it.
    since = reaction.hindered or now
    waited = max((now - since).total_seconds(), 0.0)
    if waited >= outcome.patience:
        note = f"{outcome.why} (given up after {waited / 86400:.0f} days)"
        return evolve(reaction, epoch=None, state=State.FAILED, hindered=None, root="", note=note)
    # The listener opens it when our disk is back; the pause is only the safety net.
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
    # Any number of seconds that a handler gives must stay within datetime's range; a year is for
    # ever here.
    return now + timedelta(seconds=min(seconds, 366 * 86400.0))
