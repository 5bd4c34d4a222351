"""The addresses of the page, and what each answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from hashlib import blake2b
from importlib.resources import files
from typing import Any, Final, TypeAlias

import cattrs
import trio
from attrs import define, field
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from caxev.core.clock import utcnow
from caxev.core.errors import GiveUp
from caxev.core.history import HistoryRow
from caxev.core.ledger import Reaction, State
from caxev.core.model import Run
from caxev.core.selection import EVERY, source_of
from caxev.database import Database, DatabaseError, HistorySearch
from caxev.web import listing, views
from caxev.web.acts.links import links, naming
from caxev.web.api import Api
from caxev.web.auth.sessions import LOGOUT_KEY, session_of
from caxev.web.hub import MOST_VIEWERS, Hub, Render, digest
from caxev.web.listing import BadFilter, Filter
from caxev.web.rendering import render, shown
from caxev.web.scene import Number, Scene, numbers
from caxev.web.stream import EventStream
from caxev.web.views import WINDOWS, Parts

Owed: TypeAlias = Sequence[tuple[Reaction, Mapping[str, Any]]]
History: TypeAlias = Callable[[Run, Sequence[HistoryRow], Owed], Sequence[Mapping[str, Any]]]
"""Makes rows of what happened to a run, oldest first: time, site, handler, event, state, why."""

KINDS: Final = {"page.css": "text/css", "page.js": "text/javascript", "icons.svg": "image/svg+xml"}
KINDS_OF_ASSETS: Final = {**KINDS, "favicon.svg": "image/svg+xml"}
TEXTS: Final = (
    ("run", "Number", "1-100,205"),
    ("name", "Name", "1611*"),
    ("tag", "Tag", ""),
    ("since", "Since", "7d"),
    ("until", "Until", "2016-11-11"),
    ("lacks", "Lacks", "raw@chicago"),
)
"""The conditions that the form has as texts, each with an example."""
SIZES_LAST: Final = 900.0
"""Seconds for which the sizes of all copies are believed: to count them reads every run."""
RAW_SHOWN: Final = 100_000
"""Characters of a stored document that are shown."""


@cache
def asset(name: str) -> bytes:
    """Return a file that goes to the browser as it is."""
    return files("caxev.web").joinpath("static", name).read_bytes()


@cache
def assets_version() -> str:
    """Return a text that differs for other files, so that a browser asks for these anew."""
    return blake2b(b"".join(map(asset, KINDS_OF_ASSETS)), digest_size=6).hexdigest()


@define(eq=False)
class Pages:
    """Everything that is served. `history` makes rows of what happened to a run."""

    scene: Scene
    database: Database
    hub: Hub
    history: History
    _sizes: dict[tuple[str, str], int] = field(init=False, factory=dict)
    _sized: Any = field(init=False, default=None)
    _sizing: trio.Lock = field(init=False, factory=trio.Lock)

    def app(self, *more: Route) -> ASGIApp:
        """Return the ASGI application with more addresses than its own, without its guard."""
        api = Api(self.scene, self.database, self.hub)
        routes = [
            Route("/", self.now),
            Route("/runs", self.runs),
            Route("/runs/{id:path}", self.run),
            Route("/links", self.links),
            Route("/failures", self.failures),
            Route("/storage", self.storage),
            Route("/alarms", self.alarms),
            Route("/sites/{name:path}", self.site),
            Route("/events", self.events),
            Route("/static/{name}", self.static),
            *api.routes(),
            *more,
        ]
        handlers: Any = {
            HTTPException: self.http_problem,
            DatabaseError: self.database_problem,
            BadFilter: self.bad_address,
        }
        return Starlette(routes=routes, exception_handlers=handlers)

    # -- pages of the state -----------------------------------------------------------------

    async def now(self, request: Request) -> Response:
        """Show what is going on."""
        return self._live(request, "Now", "now", "now.html", views.now_parts(self.scene))

    async def failures(self, request: Request) -> Response:
        """Show what has failed."""
        parts = views.failures_parts(self.scene)
        return self._live(request, "Failures", "failures", "failures.html", parts)

    async def alarms(self, request: Request) -> Response:
        """Show the active alarms."""
        parts = views.alarms_parts(self.scene)
        return self._live(request, "Alarms", "alarms", "alarms.html", parts)

    async def links(self, request: Request) -> Response:
        """Show what moves between the sites."""
        window = request.query_params.get("window", "24h")
        if window not in WINDOWS:
            raise BadFilter(f"the period is one of {', '.join(WINDOWS)}")
        parts = views.links_parts(self.scene, window)
        more = {"window": window, "windows": list(WINDOWS)}
        return self._live(request, "Links", f"links:{window}", "links.html", parts, **more)

    async def site(self, request: Request) -> Response:
        """Show a site."""
        name = request.path_params["name"]
        if name not in self.scene.hosts:
            raise HTTPException(404, "There is no such site.")
        parts = views.site_parts(self.scene, name)
        processes = [one for one in await self.database.processes() if one.site == name]
        more = {"current": "Now", "processes": processes, **self._entry(name)}
        return self._live(request, name, f"site:{name}", "site.html", parts, **more)

    def _entry(self, name: str) -> dict[str, Any]:
        found, record = self.scene.sites.find(name), self.scene.state.sites.get(name)
        if found is None:
            return {"configuration": None, "digest_words": ""}
        ours = self.scene.sites.digest
        words = f"The digest of this file is {ours}."
        if record is not None and record.configuration and record.configuration != ours:
            words += f" Its listener has loaded another one: {record.configuration}."
        entry = {k: v for k, v in cattrs.unstructure(found).items() if v not in (None, (), {}, [])}
        entry.pop("markers", None)
        text = json.dumps(entry, indent=2, default=str, ensure_ascii=True)
        return {"configuration": _lines(text), "digest_words": words}

    async def storage(self, request: Request) -> Response:
        """Show what the sites hold."""
        await self._count_sizes()
        parts = views.storage_parts(self.scene, self._sizes)
        words = "Numbers are live. Sizes as of" if self._sized else "Sizes are not known."
        more = {"sized_words": words, "sized_at": self._sized}
        return self._live(request, "Storage", "storage", "storage.html", parts, **more)

    async def _count_sizes(self) -> None:
        # Not at once: whoever comes first asks, the others wait for the same answer.
        async with self._sizing:
            now = utcnow()
            if self._sized is not None and (now - self._sized).total_seconds() < SIZES_LAST:
                return
            sizes: dict[tuple[str, str], int] = {}
            for one in await self.database.totals(EVERY, now):
                if one["bytes"] is not None:
                    key = (one["host"], one["type"])
                    sizes[key] = sizes.get(key, 0) + int(one["bytes"])
            self._sizes, self._sized = sizes, now

    # -- pages that ask the database --------------------------------------------------------

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
            "export": chosen.address("/api/v1/runs"),
            "acts": links(chosen.selection()) if chosen.given and not problem else [],
        }
        return self._page(
            request, "Runs", "runs.html", live="runs", status=400 if problem else 200, **values
        )

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
            parts = await self.run_parts(path)
        except GiveUp as gone:
            raise HTTPException(404, str(gone)) from gone
        title = shown(self.scene.state.label(listing.id_of(path)), 60)
        return self._live(request, title, f"run:{path}", "run.html", parts, current="Runs")

    async def run_parts(self, path: str) -> Parts:
        """Return the parts of a run's page. Raises `GiveUp` if there is no such run."""
        try:
            run_id = listing.id_of(path)
        except BadFilter as error:
            raise GiveUp(str(error)) from error
        found = (await self.database.runs([run_id])).get(run_id)
        if found is None:
            raise GiveUp("There is no such run.")
        reactions = [
            one
            for site in self.scene.names
            for one in await self.database.reactions(site, run=run_id)
        ]
        self.scene.state.name(run_id, str(found.name or found))
        past = await self.database.history(HistorySearch(runs=[run_id]))
        return {"run": self._run(found, past, reactions)}

    def _run(self, run: Run, past: Sequence[HistoryRow], reactions: Owed) -> str:
        raw = json.dumps(run.document, indent=2, default=str, ensure_ascii=True)
        cut = f"\n… {len(raw) - RAW_SHOWN:,} more characters" if len(raw) > RAW_SHOWN else ""
        rows = [
            {**row, "what": row.get("event"), "who": row.get("handler")}
            for row in reversed(self.history(run, past, reactions))
        ]
        return render(
            "run_part.html",
            run=run,
            source=source_of(run),
            acts=links(naming([run]), one=True),
            copies=sorted(run.copies, key=lambda one: self.scene.sites.types.order(one.type)),
            open=[self._owed(*one) for one in reactions if one[0].state is not State.DONE],
            history=rows,
            raw=_lines(raw[:RAW_SHOWN] + cut),
        )

    def _owed(self, reaction: Reaction, document: Mapping[str, Any]) -> dict[str, Any]:
        del document
        known = self.scene.state.reactions.get(reaction.id)
        return {
            "state": reaction.state.value,
            "site": reaction.site,
            "handler": reaction.handler,
            "event": reaction.event,
            "due": reaction.due,
            "note": reaction.note,
            "progress": None if known is None else known.progress,
        }

    # -- what changes -----------------------------------------------------------------------

    async def events(self, request: Request) -> ASGIApp:
        """Send a view's parts as they change."""
        name = request.query_params.get("view", "")
        seen = request.headers.get("last-event-id") or request.query_params.get("seen")
        found = self._rendering(name)
        if found is None:
            raise HTTPException(404, "There is no such view.")
        if self.hub.viewers >= MOST_VIEWERS:
            raise HTTPException(503, "Too many watch: this page does not follow what changes.")
        return EventStream(self.hub, name, found, seen)

    def _rendering(self, name: str) -> Render | None:
        kind, _, rest = name.partition(":")
        if name in views.VIEWS:
            return partial(_at_once, views.VIEWS[name], self.scene)
        if kind == "site" and rest in self.scene.hosts:
            return partial(_at_once, views.site_parts, self.scene, rest)
        if kind == "run":
            return partial(self.run_parts, rest)
        if name == "storage":
            return self._storage_parts
        return _nothing if name == "runs" else None

    async def _storage_parts(self) -> Parts:
        return views.storage_parts(self.scene, self._sizes)

    # -- the frame --------------------------------------------------------------------------

    def _live(
        self,
        request: Request,
        title: str,
        live: str,
        template: str,
        parts: Parts,
        **values: Any,
    ) -> Response:
        safe = {name: Markup(html) for name, html in parts.items()}  # noqa: S704  # of templates
        more = {"seen": digest(parts), **values}
        return self._page(request, title, template, live=live, parts=safe, **more)

    def frame(self, request: Request, title: str, template: str, **values: Any) -> Response:
        """Return a page with this content, which is as old as it was loaded."""
        return self._page(request, title, template, **values)

    def _page(
        self,
        request: Request,
        title: str,
        template: str,
        *,
        live: str = "",
        status: int = 200,
        **values: Any,
    ) -> Response:
        content = render(template, **values)
        html = render(
            "page.html",
            title=title,
            live=live,
            seen=values.get("seen", ""),
            content=Markup(content),  # noqa: S704  # made by templates
            navigation=self._navigation(),
            current=values.get("current", title),
            now=self.scene.now,
            assets=assets_version(),
            database=self.database.settings.safe_uri,
            session=session_of(request),
            logout=request.scope.get(LOGOUT_KEY),
        )
        headers = {"cache-control": "no-store"}
        return Response(html, status, headers, "text/html")

    def _navigation(self) -> list[dict[str, Any]]:
        by_name = {one.name: one for one in numbers(self.scene.state)}
        failed, alarms = by_name["reactions failed"], by_name["alarms"]
        return [
            _link("Now", "/"),
            _link("Runs", "/runs"),
            _link("Links", "/links"),
            _link("Failures", "/failures", failed),
            _link("Storage", "/storage"),
            _link("Alarms", "/alarms", alarms),
        ]

    async def static(self, request: Request) -> Response:
        """Send a file that pages refer to."""
        name = request.path_params["name"]
        if name not in KINDS_OF_ASSETS:
            raise HTTPException(404, "There is no such file.")
        headers = {"cache-control": "public, max-age=86400"}
        return Response(asset(name), 200, headers, KINDS_OF_ASSETS[name])

    async def http_problem(self, request: Request, error: Exception) -> Response:
        """Answer with what is wrong."""
        assert isinstance(error, HTTPException)
        return self._problem(request, error.status_code, "Not here", str(error.detail))

    async def database_problem(self, request: Request, error: Exception) -> Response:
        """Answer that the database cannot be read now."""
        return self._problem(request, 503, "The database cannot be read", str(error))

    async def bad_address(self, request: Request, error: Exception) -> Response:
        """Answer that the address means nothing."""
        return self._problem(request, 400, "This address means nothing here", str(error))

    def _problem(self, request: Request, status: int, heading: str, words: str) -> Response:
        if request.url.path.startswith(("/api/", "/events")):
            return PlainTextResponse(f"{words}\n", status)
        return self._page(
            request, heading, "problem.html", status=status, heading=heading, words=words
        )


def _link(name: str, path: str, number: Number | None = None) -> dict[str, Any]:
    badge = number.value if number is not None and number.value else None
    return {"name": name, "path": path, "badge": badge, "kind": "bad", "what": name.lower()}


def _lines(text: str) -> Markup:
    """Return a text of several lines, each printable, escaped for HTML."""
    return Markup("\n").join(shown(line, 2000) for line in text.splitlines())


async def _at_once(make: Callable[..., Parts], *arguments: Any) -> Parts:
    return make(*arguments)


async def _nothing() -> Parts:
    return {}
