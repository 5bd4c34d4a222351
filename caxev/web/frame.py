"""The frame of every page: navigation, who is logged in, what is wrong; and the pages' files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from hashlib import blake2b
from importlib.resources import files
from typing import Any, Final

from attrs import frozen
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from caxev.web.auth.sessions import LOGOUT_KEY, OUTSIDE_KEY, session_of
from caxev.web.hub import digest
from caxev.web.rendering import render
from caxev.web.scene import Scene, numbers

NAVIGATION: Final = {
    "Now": "/",
    "Runs": "/runs",
    "Links": "/links",
    "Failures": "/failures",
    "Alarms": "/alarms",
    "Storage": "/storage",
    "Sites": "/sites",
    "Requests": "/requests",
    "Holds": "/holds",
    "Handlers": "/handlers",
}
KINDS: Final = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "icons.svg": "image/svg+xml",
    "favicon.svg": "image/svg+xml",
}
"""The files that go to browsers as they are."""


@frozen(eq=False)
class Frame:
    """Makes pages of templates. `database` is its address as people may read it."""

    scene: Scene
    database: str

    def live(
        self, request: Request, title: str, live: str, parts: Mapping[str, str], **values: Any
    ) -> Response:
        """Return a page whose parts are sent as they change, as those of the view `live`."""
        template = f"{live.partition(':')[0]}.html"
        safe = {name: Markup(html) for name, html in parts.items()}  # noqa: S704  # of templates
        more = {"seen": digest(parts), **values}
        return self.page(request, title, template, live=live, parts=safe, **more)

    def page(
        self,
        request: Request,
        title: str,
        template: str,
        *,
        live: str = "",
        status: int = 200,
        **values: Any,
    ) -> Response:
        """Return a page with this content, which is as old as it was loaded."""
        html = render(
            "page.html",
            title=title,
            live=live,
            seen=values.get("seen", ""),
            content=Markup(render(template, **values)),  # noqa: S704  # made by templates
            navigation=NAVIGATION,
            badges=self._badges(),
            current=values.get("current", title),
            now=self.scene.now,
            assets=assets_version(),
            database=self.database,
            session=session_of(request),
            logout=request.scope.get(LOGOUT_KEY),
        )
        return Response(html, status, {"cache-control": "no-store"}, "text/html")

    def problem(self, request: Request, status: int, heading: str, words: str) -> Response:
        """Return what is wrong; to a program, and to who is not let in, as plain text."""
        is_outside = OUTSIDE_KEY in request.scope  # the frame has the database and what is wrong
        if is_outside or request.url.path.startswith(("/api/", "/events")):
            return PlainTextResponse(f"{words}\n", status)
        return self.page(
            request, heading, "problem.html", status=status, heading=heading, words=words
        )

    def _badges(self) -> dict[str, int]:
        """Return what is wrong, by the address of the view that shows it."""
        return {one.path: one.value for one in numbers(self.scene.state) if one.kind and one.path}


@cache
def asset(name: str) -> bytes:
    """Return a file by its name."""
    return files("caxev.web").joinpath("static", name).read_bytes()


@cache
def assets_version() -> str:
    """Return a text that changes with the files, so that a browser fetches them again."""
    return blake2b(b"".join(map(asset, KINDS)), digest_size=6).hexdigest()
