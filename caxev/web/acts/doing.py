"""Plan what a form asks for, and do it: the same acts as the commands', in the person's name."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from hashlib import blake2b
from typing import Any, Final, TypeAlias

from attrs import define, field, frozen

from caxev.asking import requests
from caxev.asking.asker import Asker
from caxev.asking.base import Act, ActPlan, Step, counted
from caxev.asking.listeners import (
    ListenerAct,
    Replay,
    RetryReactions,
    addressed,
    enabling,
    failures,
)
from caxev.core.clock import utcnow
from caxev.core.errors import NothingToDo
from caxev.core.model import RunId
from caxev.core.selection import EVERY, Selection
from caxev.database import BulkRequest
from caxev.web.acts.command_line import typed
from caxev.web.acts.offers import Offer, Values

SHOWN: Final = 100
"""Maximum number of failed steps that a page names."""


@frozen
class Wish:
    """The act that a form asks for: an offer with its values, about the runs of a selection."""

    offer: Offer
    values: Values
    selection: Selection

    @property
    def command(self) -> str:
        """The command that does the same."""
        return typed(self.offer.line(self.selection, self.values))

    @property
    def runs(self) -> Selection:
        """The runs that it is about."""
        return self.offer.runs(self.selection, self.values)


@define
class ActOutcome:
    """The outcome of an act: how many steps came out how, and those that went wrong."""

    states: Counter[str] = field(factory=Counter)
    wrong: list[Step] = field(factory=list)
    request: str | None = None

    async def add(self, steps: AsyncGenerator[Step, None]) -> None:
        """Count steps as they are made."""
        async with aclosing(steps) as found:
            async for step in found:
                self.states[step.why] += 1
                if step.ok is False and len(self.wrong) < SHOWN:
                    self.wrong.append(step)

    def add_sites(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Count sites whose listeners were asked."""
        for row in rows:
            waits = "" if row["listening"] else "; no listener is active there: it waits"
            self.states[f"asked of {row['site']}{waits}"] += 1


Carry: TypeAlias = Callable[[Asker], Awaitable[ActOutcome]]


@frozen
class PlannedWish:
    """A wish, and what would come of it now; `carry` does it.

    `runs` are those that something is done to; None: it is about what `noun` names instead.
    """

    wish: Wish
    plan: ActPlan
    carry: Carry
    runs: Sequence[RunId] | None = None
    noun: str = "run"

    @property
    def number(self) -> int:
        """How many runs it is about, or what else it counts."""
        if not self.plan.done:
            return 0
        return self.plan.number if self.runs is None else len(self.runs)

    @property
    def amount(self) -> str:
        """The number in words."""
        return counted(self.number, self.noun)

    @property
    def digest(self) -> str:
        """A text that differs for another plan."""
        runs = None if self.runs is None else sorted(map(repr, self.runs))
        parts = (self.wish.command, runs, sorted(self.plan.done.items()))
        return blake2b(repr(parts).encode(), digest_size=12).hexdigest()


async def planned(asker: Asker, wish: Wish) -> PlannedWish:
    """Plan it; nothing is written. Raises `NothingToDo`, `ConfigError`."""
    return await _PLANNERS.get(wish.offer.name, _planned_act)(asker, wish)


# -- acts on runs ---------------------------------------------------------------------------------


async def _planned_act(asker: Asker, wish: Wish) -> PlannedWish:
    assert wish.offer.make is not None
    act = wish.offer.make(wish.values)
    plan = await asker.plan(act, wish.runs)
    if wish.offer.about_one and len(plan.runs) > 1:
        raise NothingToDo(f"{counted(len(plan.runs))} match: this is done to one at a time")
    return PlannedWish(wish, plan, partial(_carry_act, act, plan.runs), plan.runs)


async def _carry_act(act: Act, runs: Sequence[RunId], asker: Asker) -> ActOutcome:
    request, steps = await requests.begin(asker, act, runs, keeps=len(runs) > 1)
    outcome = ActOutcome(request=None if request is None else request.id)
    await outcome.add(steps)
    return outcome


# -- what listeners are asked for -----------------------------------------------------------------


async def _planned_retry(asker: Asker, wish: Wish) -> PlannedWish:
    sites, handler = _addressed(asker, wish)
    runs = None if wish.selection == EVERY else await _ids(asker, wish.selection)
    plan, failed = ActPlan(), []
    for site in sites:
        found = await failures(asker.database, site, runs, handler)
        if found:
            plan.done[f"failed at {site}"] = found
            failed.append(site)
        else:
            plan.kept[f"nothing has failed at {site}"] = 1
    carry = partial(_carry_asking, RetryReactions(tuple(failed), handler), runs)
    return PlannedWish(wish, plan, carry, runs, "run" if runs else "reaction")


async def _planned_replay(asker: Asker, wish: Wish) -> PlannedWish:
    sites, handler = _addressed(asker, wish)
    if wish.selection == EVERY:
        raise NothingToDo("choose runs: all of them are not replayed from here")
    sites = enabling(sites, asker.registry, handler)
    act = Replay(sites, handler, force=bool(wish.values.get("force")))
    runs = await _ids(asker, wish.selection)
    return PlannedWish(wish, act.plan(runs), partial(_carry_asking, act, runs), runs)


def _addressed(asker: Asker, wish: Wish) -> tuple[tuple[str, ...], str | None]:
    given = wish.values
    return addressed(asker.sites, asker.registry, given.get("site"), given.get("handler"))


async def _ids(asker: Asker, selection: Selection) -> list[RunId]:
    async with aclosing(asker.database.pages(selection, utcnow())) as pages:
        return [run.id async for page in pages for run in page]


async def _carry_asking(act: ListenerAct, runs: Sequence[RunId] | None, asker: Asker) -> ActOutcome:
    keeps = runs is None or len(runs) > 1
    request, rows = await requests.ask_listeners(asker, act, runs, keeps=keeps)
    outcome = ActOutcome(request=None if request is None else request.id)
    outcome.add_sites(rows)
    return outcome


# -- requests that were made ----------------------------------------------------------------------


async def _planned_of_request(asker: Asker, wish: Wish) -> PlannedWish:
    request = await requests.request_called(asker, wish.values["request"])
    now, what = await requests.progress(asker, request), requests.described(request)
    if wish.offer.name == "cancel":
        number, words = now.waiting, f"withdrawn of {what}, unless it is begun"
    else:
        number, words = now.missing, f"asked for again of {what}"
    plan = ActPlan(Counter({words: number} if number else {}))
    return PlannedWish(wish, plan, partial(_carry_on_request, wish.offer.name, request))


async def _carry_on_request(name: str, request: BulkRequest, asker: Asker) -> ActOutcome:
    outcome = ActOutcome(request=request.id)
    if name == "cancel":
        outcome.states["withdrawn"] = await requests.cancel(asker, request)
    else:
        await outcome.add(requests.carry_out(asker, request))
    return outcome


_PLANNERS: Final[Mapping[str, Callable[[Asker, Wish], Awaitable[PlannedWish]]]] = {
    "retry": _planned_retry,
    "replay": _planned_replay,
    "cancel": _planned_of_request,
    "resume": _planned_of_request,
}
