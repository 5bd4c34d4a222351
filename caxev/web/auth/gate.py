"""The gate before all pages: it lets in those whom the chosen way knows, and refuses the rest."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, Protocol
from urllib.parse import urlencode

from attrs import frozen
from loguru import logger
from starlette.requests import HTTPConnection
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from caxev.config import ConfigError
from caxev.metrics_server import Login
from caxev.web.auth.options import LOGIN
from caxev.web.auth.people import LogInAgain, NotAdmitted
from caxev.web.auth.sessions import LOGOUT_KEY, OUTSIDE_KEY, SCOPE_KEY, LoginSession, Sessions
from caxev.web.rendering import render

CALLBACK: Final = f"{LOGIN}/callback"
LOGOUT: Final = f"{LOGIN}/out"
OPEN: Final = frozenset({"/healthz", LOGIN, CALLBACK})
"""Pages that everybody gets, beside the page's files: they show nothing from the database."""
_LOCAL: Final = re.compile(r"/(?![/\\])[!-~]*")


class Way(Protocol):
    """A way to learn who asks."""

    @property
    def logs_in(self) -> bool:
        """Whether people log in at `LOGIN`, and out."""

    def session(
        self, connection: HTTPConnection, known: LoginSession | None
    ) -> LoginSession | None:
        """Return the session of who asks, whose cookie names `known`; None: they only read.

        Raises `NotAdmitted`.
        """

    def routes(self) -> Sequence[Route]:
        """Return the addresses that it needs."""


@frozen
class Gate:
    """Passes on requests of people whom `way` knows, with their session in the scope."""

    app: ASGIApp
    way: Way
    sessions: Sessions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_open(scope):
            scope[OUTSIDE_KEY] = True
            await self.app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        known = self.sessions.read(connection)
        if known is None and _comes_from_elsewhere(connection):
            # Another site's link: the browser keeps the session from us until our own page asks.
            await bounce(asked_for(connection))(scope, receive, send)
            return
        try:
            session = self.way.session(connection, known)
        except NotAdmitted as why:
            await self._refused(connection, why)(scope, receive, send)
            return
        scope[SCOPE_KEY], scope[LOGOUT_KEY] = session, LOGOUT if self.way.logs_in else None
        if session is not None and session is not known:
            send = self._with(session, send)
        await self.app(scope, receive, send)

    def _with(self, session: LoginSession, send: Send) -> Send:
        carrier = Response()
        self.sessions.write(carrier, session)
        cookies = [pair for pair in carrier.raw_headers if pair[0] == b"set-cookie"]

        async def with_cookie(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *cookies]}
            await send(message)

        return with_cookie

    def _refused(self, connection: HTTPConnection, why: NotAdmitted) -> Response:
        if isinstance(why, LogInAgain) and _opens_a_page(connection):
            return RedirectResponse(_login(asked_for(connection)), 303)
        if connection.url.path.startswith(("/api/", "/events", "/metrics")):
            return PlainTextResponse(f"{why}\n", why.status)
        return door(str(why), why.status, asked_for(connection), logs_in=self.way.logs_in)


def _is_open(scope: Scope) -> bool:
    path = scope["path"]
    return path in OPEN or path.startswith("/static/") or (path == "/metrics" and _is_scrape(scope))


def _is_scrape(scope: Scope) -> bool:
    """Return whether this is Prometheus, with the secret that it presents to listeners, too."""
    try:
        login = Login.load()
    except ConfigError as error:
        logger.error("nobody gets metrics without a log-in: {}", error)
        return False
    given = HTTPConnection(scope).headers.get("authorization", "")
    return login.is_needed and login.admits(given)


def _comes_from_elsewhere(connection: HTTPConnection) -> bool:
    is_page = connection.headers.get("sec-fetch-mode") == "navigate"
    return is_page and connection.headers.get("sec-fetch-site") == "cross-site"


def _opens_a_page(connection: HTTPConnection) -> bool:
    is_page = connection.headers.get("sec-fetch-mode") == "navigate"
    return is_page and connection.scope["method"] == "GET"


def _login(following: str) -> str:
    return f"{LOGIN}?{urlencode({'next': following})}"


def asked_for(connection: HTTPConnection) -> str:
    """Return the address that was asked for, within this page."""
    raw, query = connection.scope["raw_path"], connection.scope["query_string"]
    return local((raw + b"?" + query if query else raw).decode("latin-1"))


def local(address: str) -> str:
    """Return an address if it is within this page, as far as any browser reads it; else ``/``."""
    return address if _LOCAL.fullmatch(address) else "/"


def door(words: str, status: int, following: str, *, logs_in: bool) -> Response:
    """Return a page for those who are not in: why, and the way in if there is one."""
    login = _login(following) if logs_in else None
    html = render("door.html", words=words, login=login, bounce=None)
    return HTMLResponse(html, status, {"cache-control": "no-store"})


def bounce(address: str) -> Response:
    """Return a page that redirects to another one of ours, so that cookies are sent there."""
    html = render("door.html", words="Going on …", login=None, bounce=address)
    return HTMLResponse(html, 200, {"cache-control": "no-store"})
