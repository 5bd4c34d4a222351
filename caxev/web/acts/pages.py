"""The pages of acts: a form, its plan with the command that does the same, and what came of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from secrets import token_hex
from typing import Any, Final
from urllib.parse import urlencode

from attrs import define, evolve, field, frozen
from loguru import logger
from starlette.datastructures import ImmutableMultiDict
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from caxev.asking.asker import Asker
from caxev.config import ConfigError, Settings
from caxev.core.errors import NoSuchRun, NothingToDo
from caxev.core.ledger import State
from caxev.core.registry import Registry
from caxev.database import Database
from caxev.tape.base import methods
from caxev.web.acts.doing import Wish, planned
from caxev.web.acts.links import naming
from caxev.web.acts.offers import OFFERS, ActField, without_copy
from caxev.web.auth.forms import TOKEN, PublicAddress, read_form
from caxev.web.auth.people import Person
from caxev.web.auth.sessions import session_of
from caxev.web.frame import Frame
from caxev.web.listing import BadFilter, Filter
from caxev.web.scene import Scene
from caxev.web.views import Failures

MANY: Final = 100
"""Number of runs above which a person must type it."""
LONGEST: Final = 2000
"""Characters of a value."""
MOST_SENT: Final = 1000
"""Forms that are remembered as sent, because a second click or a reload sends them again."""
LONGEST_ADDRESS: Final = 8000
"""Characters of an address of ours: a form has room for as many runs, the web server for 16 KB."""
SEEN: Final = "seen"
NUMBER: Final = "count"
_OWN: Final = frozenset({TOKEN, SEEN, NUMBER})


@frozen
class ActingOptions:
    """The base of operators' acts: the database as their user reaches it, and a site's handlers."""

    settings: Settings
    registry: Callable[[str], Registry]


@define(eq=False)
class ActPages:
    """The acts of operators. `database` is as an operator's user reaches it."""

    database: Database
    scene: Scene
    registry: Callable[[str], Registry]
    address: PublicAddress
    frame: Frame
    _sent: deque[str] = field(factory=lambda: deque(maxlen=MOST_SENT))

    def routes(self) -> list[Route]:
        """Return the addresses."""
        return [
            Route("/acts/{name}", self.show, methods=["GET"]),
            Route("/acts/{name}", self.do, methods=["POST"]),
            Route("/failures/retry", self.retry_matching),
        ]

    async def retry_matching(self, request: Request) -> Response:
        """Continue with the retry of all failed reactions of a handler, site and reason."""
        _operator(request)
        chosen = Failures.of(request.query_params)
        failed = self.scene.state.of_state(State.FAILED)
        members = [one for one in failed if chosen.means(one)]
        wider = evolve(chosen, reason="")
        given: dict[str, Any] = wider.given
        if len(members) < sum(map(wider.means, failed)):
            # A command knows no reasons: it names the runs.
            runs = await self.database.runs({one.reaction.run for one in members})
            given |= naming(runs.values()).texts()
        address = f"/acts/retry?{urlencode(given, doseq=True)}"
        if len(address) > LONGEST_ADDRESS:
            raise BadFilter(
                f"these are {len(members)} reactions of too many scattered runs to name here: "
                "choose a handler and a site, and retry those that failed for other reasons, too"
            )
        return RedirectResponse(address, 303)

    async def show(self, request: Request) -> Response:
        """Show the form of an act and, once it is complete, the plan."""
        _operator(request)
        return await self._shown(request, self._wish(request, request.query_params))

    async def do(self, request: Request) -> Response:
        """Do what was planned and shown."""
        _, form = await read_form(request, self.address)
        person = _operator(request)
        wish = self._wish(request, form)
        if wish.offer.missing(wish.values):
            return await self._shown(request, wish, status=400)
        asker = self._asker(person)
        try:
            wanted = await planned(asker, wish)
            digest, _, once = form.get(SEEN, "").partition("-")
            if once in self._sent:
                why = "This form was sent before. To do it once more, this is the plan:"
                return await self._shown(request, wish, why, 409)
            if digest != wanted.digest:
                why = "It is not what was shown any more. This is the plan now:"
                return await self._shown(request, wish, why, 409)
            if wanted.number > MANY and form.get(NUMBER, "").strip() != str(wanted.number):
                why = f"Type {wanted.number} to confirm: it is about that many."
                return await self._shown(request, wish, why, 400)
            # Before the first wait: the second of two clicks may be here already.
            self._sent.append(once)
            logger.info("{} asks: {}", person.name, wish.command)
            outcome = await wanted.carry(asker)
        except (NothingToDo, NoSuchRun, ConfigError, BadFilter) as why:
            return await self._shown(request, wish, str(why), 400)
        return self.frame.page(
            request, wish.offer.title, "act_done.html", wish=wish, outcome=outcome
        )

    async def _shown(
        self, request: Request, wish: Wish, problem: str = "", status: int = 200
    ) -> Response:
        missing, plan, session = wish.offer.missing(wish.values), None, session_of(request)
        if not missing:
            try:
                plan = await planned(self._asker(_operator(request)), wish)
            except (NothingToDo, NoSuchRun, ConfigError, BadFilter) as why:
                problem, status = problem or str(why), 400
        elif wish.values or status != 200:  # noqa: PLR2004  # it was sent
            problem = problem or f"Needed: {', '.join(one.label for one in missing)}."
        return self.frame.page(
            request,
            wish.offer.title,
            "act.html",
            status=status,
            wish=wish,
            token="" if session is None else session.token,
            fields=[self._field(one, wish) for one in wish.offer.fields],
            selecting=_pairs(wish.selection.texts()),
            problem=problem,
            planned=plan,
            seen="" if plan is None else f"{plan.digest}-{token_hex(8)}",
            hidden=_pairs({**wish.selection.texts(), **{k: [v] for k, v in wish.values.items()}}),
            typed=None if plan is None or plan.number <= MANY else plan.number,
        )

    def _wish(self, request: Request, given: ImmutableMultiDict[str, str]) -> Wish:
        """Return what a form asks for. Raises `HTTPException`, `BadFilter`."""
        offer = OFFERS.get(request.path_params["name"])
        if offer is None:
            raise HTTPException(404, "There is no such act.")
        mine = {one.name for one in offer.fields}
        values = {name: given.get(name, "").strip() for name in mine}
        for name, value in values.items():
            if len(value) > LONGEST:
                raise BadFilter(f"{name} is too long")
        conditions = [pair for pair in given.multi_items() if pair[0] not in mine | _OWN]
        chosen = Filter.of(ImmutableMultiDict(conditions)).selection()
        return Wish(offer, {k: v for k, v in values.items() if v}, without_copy(chosen))

    def _field(self, one: ActField, wish: Wish) -> dict[str, Any]:
        return {"field": one, "value": wish.values.get(one.name, ""), "known": self._known(one)}

    def _known(self, one: ActField) -> Sequence[str]:
        if one.kind == "archive":
            tapes = methods()
            return [
                s.name for s in self.scene.sites.values() if s.method in tapes and not s.listener
            ]
        return [site.name for site in self.scene.sites.values()] if one.kind == "site" else ()

    def _asker(self, person: Person) -> Asker:
        return Asker(self.database, self.scene.sites, self.registry, person.name)


def _operator(request: Request) -> Person:
    """Return the operator who asks. Raises `HTTPException` if it is none."""
    session = session_of(request)
    if session is None or not session.person.may_act:
        raise HTTPException(403, "Only operators act: see caxev web --operator.")
    return session.person


def _pairs(texts: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    return [(name, one) for name, values in texts.items() for one in values]
