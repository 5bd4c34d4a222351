"""Requests about many runs: kept under an id, carried out, followed, cancelled and resumed.

What listeners do later is one request, whatever it is: copies, deletions, readings, a replay. Its
document holds the act and the runs, and is never changed. What listeners have done shows in the
entries of copies, each of which names the request, or by which of its parts still wait. It is
withdrawn by the same conditional writes that a listener's claim excludes, so that nothing is left
half-done; resumed, it is carried out for the runs of which nothing is pending or done.

What is done as soon as it is written (tags, comments, holds) is no request: it can be interrupted
at any time, and given again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from attrs import define, field, frozen
from cattrs import Converter
from cattrs.errors import BaseValidationError

from caxev.asking.archives import BringRaw, ReadArchived
from caxev.asking.asker import Asker
from caxev.asking.base import DONE, FAILED, ActContext, RequestedAct, Step
from caxev.asking.catalogues import CopyCatalogued, FreeDisk, GiveUpDatasets
from caxev.asking.copies import CopyData
from caxev.asking.deletions import DeleteCopies
from caxev.asking.listeners import ListenerAct, Replay, RetryReactions, leave_all
from caxev.asking.readings import ReadCopies
from caxev.config.errors import known_names
from caxev.core.amounts import lasting, size
from caxev.core.clock import utcnow
from caxev.core.errors import NothingToDo
from caxev.core.model import Run, RunId, new_id

if TYPE_CHECKING:
    from caxev.database import BulkRequest

KINDS: Final[Mapping[str, type[RequestedAct | ListenerAct]]] = {
    one.kind: one
    for one in (
        CopyData,
        DeleteCopies,
        ReadCopies,
        BringRaw,
        ReadArchived,
        CopyCatalogued,
        GiveUpDatasets,
        FreeDisk,
        RetryReactions,
        Replay,
    )
}
"""The acts that are kept as requests, by their names in the database."""
_KNOWN: Final = 20
"""Requests among which a misspelt id is looked for."""
_converter: Final = Converter()
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

    @property
    def withdrawn(self) -> int:
        """How many are neither: they were withdrawn, or what was asked cannot be done any more."""
        return max(self.total - self.done - self.failed - self.waiting, 0)


# -- keeping one ----------------------------------------------------------------------------------


async def keep(
    asker: Asker, act: RequestedAct | ListenerAct, runs: Sequence[RunId] | None
) -> BulkRequest:
    """Keep a request for runs, such as those of a plan, or (None) for all; `carry_out` does it."""
    from caxev.database import BulkRequest

    request = BulkRequest(
        id=new_id()[:8],
        kind=act.kind,
        runs=None if runs is None else tuple(runs),
        terms=terms_of(act),
        by=asker.by,
        at=utcnow(),
    )
    await asker.database.add_bulk(request)
    return request


def terms_of(act: RequestedAct | ListenerAct) -> Mapping[str, Any]:
    """Return an act as plain values, of which `act_of` makes it again."""
    terms: Mapping[str, Any] = _converter.unstructure(act)
    return terms


def act_of(request: BulkRequest) -> RequestedAct | ListenerAct:
    """Return the act of a request. Raises `NothingToDo` if this caxev does not know such acts."""
    cls = KINDS.get(request.kind)
    try:
        if cls is not None:
            return _converter.structure(request.terms, cls)
    except (BaseValidationError, TypeError, ValueError, KeyError):
        pass
    raise NothingToDo(f"request {request.id} ({request.kind}) was made by another version of caxev")


async def request_called(asker: Asker, name: str) -> BulkRequest:
    """Return the request of that id. Raises `NothingToDo`, naming the nearest."""
    found = await asker.database.bulk(name)
    if found is None:
        known = [one.id for one in await asker.database.bulks(_KNOWN)]
        raise NothingToDo(f"there is no request {name!r} {known_names(name, known)}")
    return found


# -- carrying one out -----------------------------------------------------------------------------


async def carry_out(asker: Asker, request: BulkRequest) -> AsyncGenerator[Step, None]:
    """Do what is missing of a request: of a new one all, of a resumed one what was withdrawn.

    The person who asks now is who asked for that.
    """
    act = act_of(request)
    if isinstance(act, ListenerAct):
        if not await asker.database.ask_again(request.id):
            await leave_all(asker, act, request.runs, request.id)
        return
    missing = [
        run.id
        async for run in asker.whole(request.runs or ())
        if act.state_of(run, request.id) in (None, FAILED)
    ]
    async with aclosing(asker.carry_out(act, missing, request.id)) as steps:
        async for step in steps:
            yield step


async def cancel(asker: Asker, request: BulkRequest) -> int:
    """Withdraw what no listener has begun; return how many steps these were."""
    act = act_of(request)
    if isinstance(act, ListenerAct):
        return await asker.database.take_back(request.id, utcnow())
    taking_back, number = _TakingBack(act), 0
    runs = request.runs or ()
    async with aclosing(asker.carry_out(taking_back, runs, request.id)) as steps:
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
    states: Counter[str] = Counter()
    total = done = 0
    async for run in asker.whole(request.runs or ()):
        state = act.state_of(run, request.id)
        if state is not None:
            states[state] += 1
            amount = act.size_of(run, request.id)
            total, done = total + amount, done + (amount if state == DONE else 0)
    pending = {state: n for state, n in states.items() if state not in (DONE, FAILED)}
    number = len(request.runs or ())
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
        act = act_of(request)
    except NothingToDo:
        return request.kind
    return act.words if isinstance(act, ListenerAct) else f"{request.kind}: {act.what}"
