"""Requests about many runs: kept under an id, carried out, followed, cancelled and resumed.

One act on several runs is one request. Its document holds the act and the runs. One process at a
time writes to these, and counts them there in the same transactions. Once another process cancels
or resumes the request, the former one can write no more.

There are three kinds of acts:

- Listeners do them later (copies, deletions, readings). The entry of each copy names the request.
  To cancel is to withdraw them by conditional writes that exclude a listener's claim, so nothing is
  left half-done. To resume is to write those that are neither pending nor done.
- Listeners do them on their own ledger (a replay). The request holds the parts that still wait.
- They are done once they are written (tags, comments, holds). The request counts them. After a
  cancellation the written ones stay; resuming writes the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from datetime import datetime, timedelta
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from attrs import define, field, frozen
from cattrs import Converter
from cattrs.errors import BaseValidationError

from caxev.asking.annotations import CommentRuns, TagRuns
from caxev.asking.archives import BringRaw, ReadArchived
from caxev.asking.asker import Asker, whole
from caxev.asking.base import DONE, FAILED, Act, ActContext, RequestedAct, Step
from caxev.asking.catalogues import CopyCatalogued, FreeDisk, GiveUpDatasets
from caxev.asking.copies import CopyData
from caxev.asking.deletions import DeleteCopies, ForgetCopies, WithdrawDeletions
from caxev.asking.holding import HoldCopies, ReleaseCopies
from caxev.asking.listeners import ListenerAct, Replay, RetryReactions, asked, leave, row_of
from caxev.asking.readings import ReadCopies
from caxev.config.errors import known_names
from caxev.core.amounts import lasting, size
from caxev.core.clock import utcnow
from caxev.core.errors import NothingToDo
from caxev.core.history import What
from caxev.core.model import Run, RunId, new_id

if TYPE_CHECKING:
    from caxev.database import BulkRequest

KINDS: Final[Mapping[str, type[Act | ListenerAct]]] = {
    one.kind: one
    for one in (
        CopyData,
        DeleteCopies,
        WithdrawDeletions,
        ReadCopies,
        BringRaw,
        ReadArchived,
        CopyCatalogued,
        GiveUpDatasets,
        FreeDisk,
        TagRuns,
        CommentRuns,
        HoldCopies,
        ReleaseCopies,
        ForgetCopies,
        RetryReactions,
        Replay,
    )
}
"""The acts that are kept as requests, by their names in the database."""
TO_WRITE: Final = "to write"
"""The state of runs that a process has still to write."""
_PATIENCE: Final = 5.0
"""Seconds that a process gets at its end to record that it writes no more."""
_KNOWN: Final = 20
"""Number of requests that are searched for the one nearest to a misspelt id."""
_converter: Final = Converter()
# The database keeps times as such: there is no text to read.
_converter.register_structure_hook(datetime, lambda value, _: value)


@frozen
class RequestProgress:
    """How far a request is: how many of its runs are done, failed or pending, and their bytes.

    `pending` counts by status. Without runs of its own, `total` counts the sites that were asked.
    """

    total: int
    done: int = 0
    failed: int = 0
    pending: Mapping[str, int] = field(factory=dict)
    bytes: int = 0
    bytes_done: int = 0

    @property
    def waiting(self) -> int:
        """How many are pending."""
        return sum(self.pending.values())

    def left(self, passed: timedelta) -> float | None:
        """Return the seconds that the rest takes at the rate of the time passed; None: unknown."""
        if not (self.waiting and self.done):
            return None
        return passed.total_seconds() / self.done * self.waiting

    @property
    def missing(self) -> int:
        """How many `carry_out` would do, or do again."""
        return self.failed + self.withdrawn + self.pending.get(TO_WRITE, 0)

    @property
    def withdrawn(self) -> int:
        """How many are neither: withdrawn, or no longer possible."""
        return max(self.total - self.done - self.failed - self.waiting, 0)


# -- keeping one ----------------------------------------------------------------------------------


async def keep(asker: Asker, act: Act | ListenerAct, runs: Sequence[RunId] | None) -> BulkRequest:
    """Keep a request for runs, such as those of a plan, or (None) for all.

    A `ListenerAct` then waits for the listeners; an `Act` needs `carry_out`.
    """
    from caxev.database import BulkRequest

    request = BulkRequest(
        id=new_id()[:8],
        kind=act.kind,
        runs=None if runs is None else tuple(runs),
        terms=_converter.unstructure(act),
        by=asker.by,
        at=utcnow(),
    )
    parts = act.requests(runs, request.id) if isinstance(act, ListenerAct) else []
    rows = [row_of(one, What.REQUESTED, asker.by) for one in parts]
    await asker.database.add_bulk(request, list(zip(parts, rows, strict=True)))
    return request


def act_of(request: BulkRequest) -> Act | ListenerAct:
    """Return the act of a request. Raises `NothingToDo` if this caxev does not know such acts."""
    cls = KINDS.get(request.kind)
    try:
        if cls is not None:
            # Another version may have written terms that this one lacks; people see the message
            # below.
            return _converter.structure(request.terms, cls)
    except (BaseValidationError, TypeError, ValueError, KeyError):
        pass
    raise NothingToDo(f"request {request.id} ({request.kind}) was made by another version of caxev")


async def request_called(asker: Asker, name: str) -> BulkRequest:
    """Return the request of that id. Raises `NothingToDo`, naming the nearest."""
    found = await asker.database.bulk(name)
    if found is None:
        known = await asker.database.bulk_names(_KNOWN)
        raise NothingToDo(f"there is no request {name!r} {known_names(name, known)}")
    return found


# -- carrying one out -----------------------------------------------------------------------------


async def begin(
    asker: Asker, act: Act, runs: Sequence[RunId], *, keeps: bool
) -> tuple[BulkRequest | None, AsyncGenerator[Step, None]]:
    """Return what does it for these runs; with `keeps` as a request, if such acts can be one."""
    if not (keeps and act.kind and runs):
        return None, asker.carry_out(act, runs)
    request = await keep(asker, act, runs)
    return request, carry_out(asker, request)


async def ask_listeners(
    asker: Asker, act: ListenerAct, runs: Sequence[RunId] | None, *, keeps: bool
) -> tuple[BulkRequest | None, list[dict[str, Any]]]:
    """Leave what an act asks of listeners; with `keeps` as a request. Returns rows as `asked`."""
    parts = act.requests(runs)
    if not (keeps and parts):
        return None, await leave(asker, parts)
    return await keep(asker, act, runs), await asked(asker, parts)


async def carry_out(asker: Asker, request: BulkRequest) -> AsyncGenerator[Step, None]:
    """Do what is missing of a request: all if it is new, what was withdrawn if it is resumed.

    The person who asks now counts as the author of that. Raises `NothingToDo` once the request is
    cancelled, or another process resumes it. If this is ended, the rest is not done.
    """
    act = act_of(request)
    if isinstance(act, ListenerAct):
        await asker.database.ask_again(
            request.id, partial(row_of, what=What.REQUESTED, by=asker.by)
        )
        return
    async with writing(asker, request) as now:
        missing = now.left if not isinstance(act, RequestedAct) else await _unasked(asker, act, now)
        async with aclosing(asker.carry_out(act, missing, now.id, now.writer)) as steps:
            async for step in steps:
                yield step


@asynccontextmanager
async def writing(asker: Asker, request: BulkRequest) -> AsyncIterator[BulkRequest]:
    """Be the one process that writes for a request; give what it is now."""
    import trio

    writer = new_id()
    now = await asker.database.begin_bulk(request.id, writer)
    if now is None:
        raise NothingToDo(f"there is no request {request.id} any more")
    try:
        yield now
    finally:
        # Also after Ctrl-C: while a request has a writer, others take its rest for being written.
        with trio.move_on_after(_PATIENCE, shield=True):
            await asker.database.end_bulk(request.id, writer)


async def _unasked(asker: Asker, act: RequestedAct, request: BulkRequest) -> list[RunId]:
    return [
        run.id
        async for run in whole(asker.database, request.runs or ())
        if act.state_of(run, request.id) in (None, FAILED)
    ]


async def cancel(asker: Asker, request: BulkRequest) -> int:
    """Withdraw what nobody has begun; return how many steps these were."""
    act = act_of(request)
    if isinstance(act, ListenerAct):
        rows = partial(row_of, what=What.CANCELLED, by=asker.by)
        return await asker.database.take_back(request.id, utcnow(), rows)
    number = (await progress(asker, request)).pending.get(TO_WRITE, 0)
    # First, so that nothing is written behind what is taken back.
    await asker.database.end_bulk(request.id)
    if isinstance(act, RequestedAct):
        steps = asker.carry_out(_TakingBack(act), request.runs or (), request.id)
        async with aclosing(steps):
            async for step in steps:
                number += step.update is not None
    return number


@frozen
class _TakingBack(RequestedAct):
    """The act that withdraws what is left of another."""

    act: RequestedAct

    def steps(self, run: Run, context: ActContext) -> list[Step]:
        """Return the steps that take back what no listener has begun."""
        return list(self.act.withdrawals(run, context))


# -- following one --------------------------------------------------------------------------------


async def progress(asker: Asker, request: BulkRequest) -> RequestProgress:
    """Read how far a request is. Raises `NothingToDo` as `act_of`."""
    act = act_of(request)
    if isinstance(act, ListenerAct):
        return await _progress_of_listeners(asker, request, act)
    request = await asker.database.bulk(request.id) or request
    if isinstance(act, RequestedAct):
        return await _progress_of_entries(asker, request, act)
    total, failed = len(request.runs or ()), len(request.failed)
    pending = _to_write(request, total - request.written)
    return RequestProgress(total, request.written - failed, failed, pending)


def _to_write(request: BulkRequest, number: int) -> dict[str, int]:
    # If nobody writes for it, the rest was withdrawn.
    return {TO_WRITE: number} if number and request.writer is not None else {}


async def _progress_of_entries(
    asker: Asker, request: BulkRequest, act: RequestedAct
) -> RequestProgress:
    """Return the states in the entries of copies."""
    states: Counter[str] = Counter()
    total = done = 0
    async for run in whole(asker.database, request.runs or ()):
        state = act.state_of(run, request.id)
        if state is not None:
            states[state] += 1
            amount = act.size_of(run, request.id)
            total, done = total + amount, done + (amount if state == DONE else 0)
    pending = {state: n for state, n in states.items() if state not in (DONE, FAILED)}
    number = len(request.runs or ())
    pending |= _to_write(request, number - states.total())
    return RequestProgress(number, states[DONE], states[FAILED], pending, total, done)


async def _progress_of_listeners(
    asker: Asker, request: BulkRequest, act: ListenerAct
) -> RequestProgress:
    """Return how many runs, or sites, no listener has still to look at."""
    waits, back = await asker.database.parts_of(request.id)
    if request.runs is None:
        total, left, gone = len(act.sites), waits.number, back.number
    else:
        total, left, gone = len(request.runs), len(waits.runs), len(back.runs)
    return RequestProgress(total, max(total - left - gone, 0), 0, {"waiting": left} if left else {})


@define
class ProgressMeter:
    """The progress of a request in words, with the time that the rest takes at the rate so far."""

    _begun: float = field(init=False, factory=monotonic)
    _first: RequestProgress | None = field(init=False, default=None)

    def line(self, now: RequestProgress) -> str:
        """Return the progress in one line."""
        first = self._first = self._first or now
        parts = [f"{now.done} of {now.total} done"]
        if now.bytes:
            parts.append(f"{size(now.bytes_done)} of {size(now.bytes)}")
        parts += [f"{number} {status}" for status, number in sorted(now.pending.items())]
        if now.failed:
            parts.append(f"{now.failed} failed")
        made = now.done - first.done
        if made and now.waiting:
            took = monotonic() - self._begun
            parts.append(f"about {lasting(took / made * now.waiting)} left")
        return ", ".join(parts)


def described(request: BulkRequest) -> str:
    """Return what a request is about, in words."""
    try:
        return act_of(request).words
    except NothingToDo:
        return request.kind
