"""The frame of every page: navigation, who is logged in, and what is wrong."""

from __future__ import annotations

from typing import Any

from attrs import frozen
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from caxev.web.assets import assets_version
from caxev.web.auth.sessions import LOGOUT_KEY, OUTSIDE_KEY, session_of
from caxev.web.hub import digest
from caxev.web.rendering import render
from caxev.web.scene import Number, Scene, numbers
from caxev.web.views import Parts


@frozen(eq=False)
class Frame:
    """Makes pages of templates. `database` is its address as people may read it."""

    scene: Scene
    database: str

    def live(
        self, request: Request, title: str, live: str, template: str, parts: Parts, **values: Any
    ) -> Response:
        """Return a page whose parts are sent as they change, as those of the view `live`."""
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
            navigation=self._navigation(),
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

    def _navigation(self) -> list[dict[str, Any]]:
        by_name = {one.name: one for one in numbers(self.scene.state)}
        failed, alarms = by_name["reactions failed"], by_name["alarms"]
        return [
            _link("Now", "/"),
            _link("Runs", "/runs"),
            _link("Links", "/links"),
            _link("Failures", "/failures", failed),
            _link("Alarms", "/alarms", alarms),
            _link("Storage", "/storage"),
            _link("Sites", "/sites"),
            _link("Requests", "/requests"),
            _link("Holds", "/holds"),
            _link("Handlers", "/handlers"),
        ]


def _link(name: str, path: str, number: Number | None = None) -> dict[str, Any]:
    badge = number.value if number is not None and number.value else None
    return {"name": name, "path": path, "badge": badge, "kind": "bad", "what": name.lower()}
