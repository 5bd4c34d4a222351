"""One attempt: run a handler within its time, and turn its result or error into an outcome.

`runner` calls `attempt`; `settling` records the outcome.
"""

from __future__ import annotations

from collections import deque
from math import inf
from typing import Final

import trio
from attrs import define, evolve, field
from loguru import logger

from caxev.alarms.health import lacks_files
from caxev.core.errors import Denied, GiveUp, Retry, RootAway, Superseded
from caxev.core.history import HistoryRow
from caxev.core.job import Job, Skip
from caxev.core.ledger import (
    Done,
    Failed,
    Hindered,
    Interrupted,
    Outcome,
    Postponed,
    Reaction,
    State,
    Surprise,
)
from caxev.core.registry import Handler
from caxev.core.update import RunUpdate
from caxev.database import DatabaseError, LeaseLost, NotAuthorized, concerns_one, is_transient

STARVED: Final = 60.0
"""Seconds after which a reaction is tried again that found no file descriptor left."""
LATELY: Final = 30.0
"""Seconds over which a rate is averaged."""


@define(eq=False)
class Ended:
    """An attempt that is over and has to be settled.

    `run` is the run's label for people. `row` is what the history shows of it, if it did anything.
    """

    reaction: Reaction
    outcome: Outcome
    updates: tuple[RunUpdate, ...] = ()
    run: str = ""
    row: HistoryRow | None = None


class Watch:
    """The time that an attempt may take: in all, and without progress."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        # By the monotonic clock: setting the system's clock must cut nothing short.
        self.end = trio.current_time() + (handler.timeout or float("inf"))
        self.scope = trio.CancelScope(deadline=self.end)
        self.lacked_files = False
        self.moved()

    def moved(self) -> None:
        """Note that there was progress."""
        if self.handler.stall is not None:
            self.scope.deadline = min(self.end, trio.current_time() + self.handler.stall)

    @property
    def ignored(self) -> float:
        """For how many seconds the attempt has gone on after its time was up."""
        late = trio.current_time() - self.scope.deadline
        return late if self.scope.cancel_called else 0.0

    @property
    def verdict(self) -> str:
        """Why the attempt was cancelled."""
        if self.scope.deadline >= self.end:
            return f"timed out after {self.handler.timeout:.0f} s"
        return f"no progress for {self.handler.stall:.0f} s"


@define(eq=False)
class RateMeter:
    """How fast bytes go. Times are in seconds, by any clock that does not go back."""

    _seen: deque[tuple[float, int]] = field(init=False, factory=deque)

    def moved(self, done: int, now: float) -> float | None:
        """Note the bytes done; return the recent bytes a second, None in the first second."""
        if self._seen and done < self._seen[-1][1]:
            self._seen.clear()  # it began again
        if not self._seen or now >= self._seen[-1][0] + 1.0:
            self._seen.append((now, done))
        while len(self._seen) > 1 and self._seen[1][0] <= now - LATELY:
            self._seen.popleft()
        since, before = self._seen[0]
        return (done - before) / (now - since) if now >= since + 1.0 else None


async def attempt(handler: Handler, job: Job, watch: Watch) -> tuple[Outcome, RunUpdate | None]:
    """Run a handler once; return the outcome, and the update to write with it.

    The one place that catches every error. Only cancellation from outside passes: no handler ends
    the listener, be it by `SystemExit`, `KeyboardInterrupt` or the panic of a library in Rust. A
    real Ctrl-C does not come this way, because `listener.Leaving` takes the signal.
    """
    try:
        with watch.scope:
            return _outcome_of(await handler.function(job), job)
        # Our scope caught the cancellation, so the time was up.
        return Postponed(watch.verdict), None
    except BaseException as error:  # noqa: BLE001  # a failure is data
        cancelled = _cancelled(error)
        # A handler can keep a `Cancelled` of its own scope and raise it later: that is an error.
        if cancelled is not None and trio.current_effective_deadline() == -inf:
            raise cancelled from None
        outcome, watch.lacked_files = failure(error), lacks_files(error)
        if watch.lacked_files and not isinstance(outcome, Done | Interrupted):
            # The listener's fault and not the handler's: the alarm is about the listener.
            outcome = Postponed(_text_of(error), STARVED)
        return outcome, None


def _cancelled(error: BaseException) -> BaseException | None:
    """Return the part of an error, or of a group, that is trio's cancellation."""
    if isinstance(error, BaseExceptionGroup):
        return error.subgroup(trio.Cancelled)
    return error if isinstance(error, trio.Cancelled) else None


def _outcome_of(result: object, job: Job) -> tuple[Outcome, RunUpdate | None]:
    match result:
        case RunUpdate() if result.run != job.run.id:
            why = f"the handler returned an update of another run ({result.run})"
            return Failed(f"{why}: write it with job.update_other"), None
        case RunUpdate():
            return Done(), result
        case Skip(why):
            return Done(f"nothing to do: {why}", idle=True), None
        case None:
            return Done(), None
        case _:
            kind = type(result).__name__
            return Failed(f"the handler returned a {kind}, not a RunUpdate, a Skip or None"), None


def refusal(error: DatabaseError) -> Outcome | None:
    """Return how a reaction ends if the database refused its update; None: repeat the write.

    A missing right may be granted later, so that is tried again a few times.
    """
    if isinstance(error, NotAuthorized) and not is_transient(error):
        return Postponed(str(error))
    return Failed(str(error)) if concerns_one(error) else None


def failure(error: BaseException) -> Outcome:
    """Return what an error raised by a handler means for the reaction."""
    try:
        return _meaning(error)
    # A handler's own subclass may lack what ours sets, or fail to give its text.
    except Exception:  # noqa: BLE001
        return _surprise(error)


def _meaning(error: BaseException) -> Outcome:
    match error:
        case RootAway() | Denied():
            return _hindered(error)
        case Retry():
            return Postponed(error.why, error.after)
        case GiveUp():
            return Failed(str(error))
        case Superseded():
            return Done(f"nothing to do: {error}", idle=True)
        case LeaseLost():
            # The process that took over runs the reaction again.
            return Interrupted(str(error))
        case DatabaseError():
            # Not by back-off, which would count: the database's trouble is not the handler's.
            return refusal(error) or Postponed(str(error), 5.0)
        case BaseExceptionGroup():
            outcomes = [failure(one) for one in error.exceptions]
            # The worst decides: what needs a person must not hide behind what only needs time.
            order = (Surprise, Failed, Interrupted, Hindered, Postponed, Done)
            return min(outcomes, key=lambda outcome: order.index(type(outcome)))
        case _:
            return _surprise(error)


def _surprise(error: BaseException) -> Surprise:
    text = _text_of(error)
    logger.opt(exception=error).error("unexpected error: {}", text)
    return Surprise(text)


def _text_of(error: BaseException) -> str:
    name = type(error).__name__
    try:
        return f"{name}: {error}"
    except Exception:  # noqa: BLE001  # a class's own __str__ may fail
        return f"{name} (its text cannot be shown)"


def _hindered(error: RootAway | Denied) -> Hindered:
    if isinstance(error, RootAway):
        return Hindered(error.why, inf, error.root, error.host)
    return Hindered(error.why)


def as_parked(ended: Ended) -> Reaction:
    """Log an outcome that the ledger refused; return the reaction as it should be recorded."""
    log_outcome(ended.outcome)
    return evolve(ended.reaction, state=State.FAILED, note=getattr(ended.outcome, "why", ""))


def log_outcome(outcome: Outcome) -> None:
    """Log an outcome, the louder the worse."""
    match outcome:
        case Done(note):
            logger.debug("done. {}", note)
        case Postponed(why) | Interrupted(why) | Hindered(why):
            logger.info("postponed: {}", why)
        case Failed(why):
            logger.error("failed: {}", why)
