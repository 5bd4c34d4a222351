"""The right to ask, checked before any view, and headers that let a browser run only our scripts.

The page is for readers on this machine, or for people who log in: `caxev.web.auth`. Another site's
page in the same browser must neither read it (the name that was asked for is checked, against DNS
rebinding) nor have it do anything (nothing is done by GET, and `auth.forms` checks the rest).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from attrs import frozen
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS: Final = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), microphone=(), geolocation=()"),
)
LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})
READING: Final = frozenset({"GET", "HEAD"})
WRITING: Final = READING | {"POST"}


@frozen
class Guard:
    """Lets through what asks for one of the names `hosts`, with one of the methods."""

    app: ASGIApp
    hosts: Collection[str]
    methods: Collection[str] = READING

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(answer: Message) -> None:
            if answer["type"] == "http.response.start":
                answer = {**answer, "headers": [*answer.get("headers", ()), *HEADERS]}
            await send(answer)

        app, allow = self.app, {"allow": "GET, HEAD"}
        if not self._is_known(scope):
            why = "this name is not served here: see caxev web --name\n"
            app = PlainTextResponse(why, 421, allow)
        elif scope["method"] not in self.methods:
            why = "this page only shows: nothing can be changed here\n"
            app = PlainTextResponse(why, 405, allow)
        await app(scope, receive, guarded)

    def _is_known(self, scope: Scope) -> bool:
        named = [value for name, value in scope["headers"] if name == b"host"]
        return len(named) == 1 and _without_port(named[0].decode("latin-1")) in self.hosts


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdecimal() else host).lower()
