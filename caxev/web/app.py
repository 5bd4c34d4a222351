"""The addresses of the page, and what each answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import inf
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode

import trio
from attrs import define, field
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from caxev.core.errors import GiveUp
from caxev.database import Database, DatabaseError
from caxev.web import listing, views
from caxev.web.acts.links import links
from caxev.web.answers import Answers
from caxev.web.api import Api
from caxev.web.auth.sessions import session_of
from caxev.web.broadcast import EVENTS, RUNS
from caxev.web.export import MOST_EXPORTS, RunsExport
from caxev.web.frame import KINDS, Frame, asset
from caxev.web.hub import Hub, Render
from caxev.web.links import WINDOWS, links_parts
from caxev.web.listing import BadFilter, Filter
from caxev.web.now import now_parts
from caxev.web.rendering import Parts, lines, shown
from caxev.web.run import History, RunView
from caxev.web.scene import Scene
from caxev.web.site import configuration, process_rows, site_parts
from caxev.web.storage import rules_of, storage_parts
from caxev.web.stream import ADMITTED, EventStream
from caxev.web.views import Failures

LIVE: Final = {"/": "now", "/alarms": "alarms", "/handlers": "handlers"}
"""The addresses of views that need nothing else."""
TEXTS: Final = (
    ("run", "Number", "1-100,205"),
    ("name", "Name", "1611*"),
    ("tag", "Tag", ""),
    ("since", "Since", "7d"),
    ("until", "Until", "2016-11-11"),
    ("lacks", "Lacks", "raw@chicago"),
)
"""The conditions that the form has as texts, each with an example."""


@define(eq=False)
class Pages:
    """Everything that is served.

    `history` makes rows of what happened to a run; `handlers` are rows of what handlers there are.
    """

    scene: Scene
    database: Database
    hub: Hub
    history: History
    handlers: Sequence[Mapping[str, Any]] = ()
    frame: Frame = field(init=False)
    answers: Answers = field(init=False)
    run_view: RunView = field(init=False)
    api: Api = field(init=False)
    exports: trio.CapacityLimiter = field(
        init=False, factory=lambda: trio.CapacityLimiter(MOST_EXPORTS)
    )

    def __attrs_post_init__(self) -> None:
        self.frame = Frame(self.scene, self.database.settings.safe_uri)
        self.answers = Answers(self.scene, self.database, self.hub.wake)
        self.run_view = RunView(self.scene, self.database, self.history)
        self.api = Api(self.scene, self.database, self.hub, self.answers)

    def app(self, *more: Route) -> ASGIApp:
        """Return the ASGI application with more addresses than its own, without its guard."""
        # `:path`, as ids of runs and names of sites may contain a slash. So what is more specific
        # comes first.
        routes = [
            *(Route(path, partial(self.live, name=name)) for path, name in LIVE.items()),
            Route("/runs", self.runs),
            Route("/runs.csv", self.export),
            Route("/runs/{id:path}", self.run),
            Route("/output/{id:path}", self.output),
            Route("/links", self.links),
            Route("/failures", self.failures),
            Route("/storage", self.storage),
            Route("/requests", self.requests),
            Route("/holds", self.holds),
            Route("/sites", self.sites),
            Route("/sites/{name}/purge", self.purge),
            Route("/sites/{name:path}", self.site),
            Route("/events", self.events),
            Route("/static/{name}", self.static),
            Route("/api/v1/events", self.api_events),
            *self.api.routes(),
            *more,
        ]
        handlers: Any = {
            HTTPException: self.http_problem,
            DatabaseError: self.database_problem,
            BadFilter: self.bad_address,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    # -- pages that follow the state ---------------------------------------------------------

    async def live(self, request: Request, name: str, title: str = "", **values: Any) -> Response:
        """Show the view of that name, whose parts are sent as they change."""
        parts = await self._rendering(name)()
        return self.frame.live(request, title or name.capitalize(), name, parts, **values)

    async def failures(self, request: Request) -> Response:
        """Show what has failed."""
        which = Failures.of(request.query_params)
        query = urlencode(which.given, errors="surrogateescape")
        return await self.live(request, f"failures:{query}", "Failures")

    async def links(self, request: Request) -> Response:
        """Show what moves between the sites."""
        window = request.query_params.get("window", "24h")
        if window not in WINDOWS:
            raise BadFilter(f"the period is one of {', '.join(WINDOWS)}")
        more = {"window": window, "windows": list(WINDOWS)}
        return await self.live(request, f"links:{window}", "Links", **more)

    # -- pages that ask the database --------------------------------------------------------

    async def sites(self, request: Request) -> Response:
        """Show all processes, their versions, and in what their sites.json differ."""
        rows = process_rows(self.scene, await self.database.processes())
        digest = self.scene.sites.digest
        return self.frame.page(request, "Sites", "sites.html", processes=rows, digest=digest)

    async def site(self, request: Request) -> Response:
        """Show a site."""
        name = self._host(request)
        found = [one for one in await self.database.processes() if one.site == name]
        more = {
            "current": "Sites",
            "processes": process_rows(self.scene, found),
            "digest": self.scene.sites.digest,
            "configuration": lines(configuration(self.scene.sites, name)),
        }
        return await self.live(request, f"site:{name}", name, **more)

    async def purge(self, request: Request) -> Response:
        """Show which copies the rules of a site delete, and why not others."""
        name = self._host(request)
        if name not in self.scene.sites:
            raise HTTPException(404, "sites.json does not have this site.")
        rows = await self.answers.candidates(name)
        more: dict[str, Any] = {"current": "Storage", "site": name, "rows": rows}
        rules = rules_of(self.scene.sites.find(name))
        return self.frame.page(request, f"Purge at {name}", "purge.html", rules=rules, **more)

    def _host(self, request: Request) -> str:
        name: str = request.path_params["name"]
        if name not in self.scene.hosts:
            raise HTTPException(404, "There is no such site.")
        return name

    async def storage(self, request: Request) -> Response:
        """Show what the sites hold."""
        await self.answers.holdings.get()
        return await self.live(request, "storage")

    async def requests(self, request: Request) -> Response:
        """Show what people asked for that is not done."""
        await self.answers.bulks.get()
        return await self.live(request, "requests")

    async def holds(self, request: Request) -> Response:
        """Show the copies that somebody holds."""
        found = self.answers.holds
        return self.frame.page(request, "Holds", "holds.html", holds=await found.get(), at=found.at)

    async def runs(self, request: Request) -> Response:
        """List runs, newest first."""
        chosen = Filter.of(request.query_params)
        before = request.query_params.get("before") or None
        page, problem = listing.Page(()), None
        try:
            page = await listing.read_page(
                self.database, chosen, before, listing.PAGE, self.scene.now
            )
        except BadFilter as error:
            problem = str(error)
        following = page.following
        values = {
            **self._form(chosen),
            "command": "" if problem else str(chosen.selection()),
            "filtered": bool(chosen.given),
            "problem": problem,
            "columns": listing.columns(self.scene),
            "rows": [Markup(listing.row(self.scene, one)) for one in page.documents],  # noqa: S704
            "newest": not chosen.given and before is None,
            "first": chosen.address("/runs") if before else None,
            "next": following and chosen.address("/runs", before=following),
            "export": None if problem else chosen.address("/runs.csv"),
            "json": None if problem else chosen.address("/api/v1/runs"),
            "acts": links(chosen.selection()) if chosen.given and not problem else [],
        }
        return self.frame.page(
            request, "Runs", "runs.html", live="runs", status=400 if problem else 200, **values
        )

    async def export(self, request: Request) -> ASGIApp:
        """Send all runs that match, as CSV."""
        return RunsExport(self.database, Filter.of(request.query_params).selection(), self.exports)

    def _form(self, chosen: Filter) -> dict[str, Any]:
        """Return what the form shows; `more` are conditions for which it has no field."""
        counts = self.scene.state.runs.counts

        def choice(name: str, known: Iterable[str]) -> tuple[str, Sequence[str]]:
            value = chosen.get(name)
            return value, list(dict.fromkeys([*known, *filter(None, [value])]))

        choices = {
            "host": ("Site", *choice("host", self.scene.hosts)),
            "type": ("Data", *choice("type", sorted({place.type for place in counts}))),
            "status": ("Status", *choice("status", sorted({place.status for place in counts}))),
        }
        texts = [(name, label, chosen.get(name), hint) for name, label, hint in TEXTS]
        selects = [(name, label, value, known) for name, (label, value, known) in choices.items()]
        shown_ones = {*(name for name, *_ in TEXTS), *choices}
        more = {name: values for name, values in chosen.given.items() if name not in shown_ones}
        return {"texts": texts, "selects": selects, "more": more}

    async def run(self, request: Request) -> Response:
        """Show a run."""
        path = request.path_params["id"]
        try:
            parts = await self.run_view.parts(path)
        except GiveUp as gone:
            raise HTTPException(404, str(gone)) from gone
        title = shown(self.scene.state.label(listing.id_of(path)), 60)
        return self.frame.live(request, title, f"run:{path}", parts, current="Runs")

    async def output(self, request: Request) -> Response:
        """Show what programs printed while reactions to a run ran."""
        path = request.path_params["id"]
        try:
            rows, run = await self.run_view.outputs(path), listing.id_of(path)
        except (GiveUp, BadFilter) as gone:
            raise HTTPException(404, str(gone)) from gone
        more: dict[str, Any] = {"current": "Runs", "run": run}
        more["label"] = self.scene.state.label(run)
        return self.frame.page(request, "Output", "output.html", rows=rows, **more)

    # -- what changes -----------------------------------------------------------------------

    async def events(self, request: Request) -> ASGIApp:
        """Send a view's parts as they change."""
        name = request.query_params.get("view", "")
        return self._stream(request, name, self._rendering(name))

    async def api_events(self, request: Request) -> ASGIApp:
        """Send the state as data, as it changes, and each change of a copy."""
        return self._stream(request, EVENTS, self.api.parts)

    def _stream(self, request: Request, name: str, render: Render) -> EventStream:
        seen = request.headers.get("last-event-id") or request.query_params.get("seen")
        session, client = session_of(request), request.client
        who = session.person.name if session is not None else client.host if client else ""
        if not self.hub.has_room(who):
            raise HTTPException(503, "Too many watch: this page does not follow what changes.")
        # After that the browser connects again, and the gate decides again about the person.
        seconds = inf if session is None else ADMITTED
        return EventStream(self.hub, name, render, seen, seconds, who)

    def _rendering(self, name: str) -> Render:
        """Return the function that makes a view's parts; a subject follows a colon in `name`."""
        scene, answers = self.scene, self.answers
        kind, _, rest = name.partition(":")
        known: dict[str, Callable[[], Parts]] = {
            RUNS: dict,  # rows of it are sent as they change
            "now": lambda: now_parts(scene),
            "alarms": lambda: views.alarms_parts(scene),
            "storage": lambda: storage_parts(scene, answers.holdings.peek()),
            "requests": lambda: views.requests_parts(scene, answers.bulks.peek()),
            "handlers": lambda: views.handlers_parts(scene, self.handlers),
        }
        if kind == "run":
            return partial(self.run_view.parts, rest)
        if kind == "failures":
            which = Failures.of(dict(parse_qsl(rest, errors="surrogateescape")))
            return partial(_at_once, lambda: views.failures_parts(scene, which))
        if kind == "links" and rest in WINDOWS:
            return partial(_at_once, lambda: links_parts(scene, rest))
        if kind == "site" and rest in scene.hosts:
            return partial(_at_once, lambda: site_parts(scene, rest))
        if name not in known:
            raise HTTPException(404, "There is no such view.")
        return partial(_at_once, known[name])

    # -- all else ----------------------------------------------------------------------------

    async def static(self, request: Request) -> Response:
        """Send a file that pages refer to."""
        name = request.path_params["name"]
        if name not in KINDS:
            raise HTTPException(404, "There is no such file.")
        headers = {"cache-control": "public, max-age=86400"}
        return Response(asset(name), 200, headers, KINDS[name])

    async def http_problem(self, request: Request, error: Exception) -> Response:
        """Answer with what is wrong."""
        assert isinstance(error, HTTPException)
        return self.frame.problem(request, error.status_code, "Not here", str(error.detail))

    async def database_problem(self, request: Request, error: Exception) -> Response:
        """Answer that the database cannot be read now."""
        return self.frame.problem(request, 503, "The database cannot be read", str(error))

    async def bad_address(self, request: Request, error: Exception) -> Response:
        """Answer that the address means nothing."""
        return self.frame.problem(request, 400, "This address means nothing here", str(error))


async def _at_once(make: Callable[[], Parts]) -> Parts:
    return make()
