"""Plan what a form asks for, and do it: the same acts as the commands', in the person's name."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from hashlib import blake2b
from typing import Any, Final

from attrs import define, evolve, field, frozen

from caxev.asking import requests
from caxev.asking.asker import Asker
from caxev.asking.base import Act, Plan, RequestedAct, Step, counted
from caxev.asking.listeners import (
    ListenerAct,
    Replay,
    Retry,
    failures,
    handler_called,
    leave_all,
    listening_sites,
)
from caxev.core.clock import utcnow
from caxev.core.errors import NothingToDo
from caxev.core.model import RunId
from caxev.core.selection import EVERY, Selection
from caxev.web.acts.command_line import typed
from caxev.web.acts.offers import Offer, Values

SHOWN: Final = 100
"""Steps that went wrong, of which a page names each."""


@frozen
class Wish:
    """What a form asks for: an offer with its values, about the runs of a selection."""

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


@frozen
class PlannedWish:
    """A wish, and what would come of it now. `runs`: None: all, as listeners find them."""

    wish: Wish
    act: Act | ListenerAct
    plan: Plan
    runs: Sequence[RunId] | None

    @property
    def number(self) -> int:
        """How many runs it is about; without runs of its own, how many failed reactions."""
        if not self.plan.done:
            return 0
        return self.plan.number if self.runs is None else len(self.runs)

    @property
    def amount(self) -> str:
        """The number in words."""
        return counted(self.number, "reaction" if self.runs is None else "run")

    @property
    def digest(self) -> str:
        """A text that differs for another plan."""
        runs = None if self.runs is None else sorted(map(repr, self.runs))
        parts = (self.wish.command, runs, sorted(self.plan.done.items()))
        return blake2b(repr(parts).encode(), digest_size=12).hexdigest()


@define
class Outcome:
    """What has been done: how many steps came out how, and those that went wrong."""

    states: Counter[str] = field(factory=Counter)
    wrong: list[Step] = field(factory=list)
    request: str | None = None

    def add(self, step: Step) -> None:
        """Count a step."""
        self.states[step.why] += 1
        if step.ok is False and len(self.wrong) < SHOWN:
            self.wrong.append(step)


async def planned(asker: Asker, wish: Wish) -> PlannedWish:
    """Plan it; nothing is written. Raises `NothingToDo`, `ConfigError`."""
    if wish.offer.make is None:
        return await _planned_for_listeners(asker, wish)
    act = wish.offer.make(wish.values)
    plan = await asker.plan(act, wish.runs)
    if wish.offer.about_one and len(plan.runs) > 1:
        raise NothingToDo(f"{counted(len(plan.runs))} match: this is done to one at a time")
    return PlannedWish(wish, act, plan, plan.runs)


async def _planned_for_listeners(asker: Asker, wish: Wish) -> PlannedWish:
    sites = listening_sites(asker.sites, wish.values.get("site") or None)
    registries = {site: asker.registry(site) for site in sites}
    handler = wish.values.get("handler") or None
    named = None if handler is None else handler_called(handler, registries.values())
    runs = None if wish.selection == EVERY else await _ids(asker, wish.selection)
    if wish.offer.name == "retry":
        return await _planned_retry(asker, wish, Retry(sites, named), runs)
    if runs is None:
        raise NothingToDo("choose runs: not all of them are replayed from here")
    enabled = tuple(
        site
        for site, registry in registries.items()
        if named is None or any(one.name == named for one in registry.enabled)
    )
    act = Replay(enabled, named, force=bool(wish.values.get("force")))
    return PlannedWish(wish, act, act.plan(runs), runs)


async def _planned_retry(
    asker: Asker, wish: Wish, act: Retry, runs: Sequence[RunId] | None
) -> PlannedWish:
    plan = Plan()
    for site in act.sites:
        found = await failures(asker.database, site, runs, act.handler)
        if found:
            plan.done[f"failed at {site}"] = found
        else:
            plan.kept[f"nothing has failed at {site}"] = 1
    failed = tuple(site for site in act.sites if plan.done[f"failed at {site}"])
    plan.done = +plan.done
    return PlannedWish(wish, evolve(act, sites=failed), plan, runs)


async def _ids(asker: Asker, selection: Selection) -> list[RunId]:
    async with aclosing(asker.database.pages(selection, utcnow())) as pages:
        return [run.id async for page in pages for run in page]


async def do(asker: Asker, wanted: PlannedWish) -> Outcome:
    """Do what was planned. What listeners do to several runs is one request, as for commands."""
    outcome, act = Outcome(), wanted.act
    if isinstance(act, ListenerAct | RequestedAct) and act.kind and wanted.number > 1:
        request = await requests.keep(asker, act, wanted.runs)
        outcome.request = request.id
        if isinstance(act, ListenerAct):
            rows = await leave_all(asker, act, wanted.runs, request.id)
            _add_rows(outcome, rows)
            return outcome
        steps = requests.carry_out(asker, request)
    elif isinstance(act, ListenerAct):
        _add_rows(outcome, await leave_all(asker, act, wanted.runs))
        return outcome
    else:
        steps = asker.carry_out(act, wanted.runs or ())
    await _count(outcome, steps)
    return outcome


def _add_rows(outcome: Outcome, rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        waits = "" if row["listening"] else "; no listener is active there: it waits"
        outcome.states[f"asked of {row['site']}{waits}"] += 1


async def _count(outcome: Outcome, steps: Any) -> None:
    async with aclosing(steps) as found:
        each: AsyncIterator[Step] = found
        async for step in each:
            outcome.add(step)
