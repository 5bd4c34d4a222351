"""The answer that never ends: server-sent events to one browser."""

from __future__ import annotations

from math import inf
from typing import Final

import trio
from attrs import frozen
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from caxev.core.errors import GiveUp
from caxev.database import DatabaseError
from caxev.web.hub import BEHIND, Hub, Render, Viewer, message

ALIVE: Final = 15.0
"""Seconds of silence after which the browser hears that all is well."""
ADMITTED: Final = 600.0
"""Seconds after which the browser of a person who has logged in must ask again whether it may."""
AGAIN: Final = b"retry: 2000\n\n"
"""Milliseconds after which a browser that lost the connection tries again."""


@frozen
class EventStream:
    """Sends the parts of a view as they change, until the browser has gone or is too slow.

    It ends after `seconds`, too; the browser then connects again, if it still may.
    """

    hub: Hub
    name: str
    render: Render
    seen: str | None
    seconds: float = inf
    who: str = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender, receiver = trio.open_memory_channel[bytes](BEHIND)
        async with trio.open_nursery() as nursery:
            viewer = Viewer(sender, nursery.cancel_scope, self.who)
            try:
                await self.hub.join(self.name, self.render, viewer, self.seen)
                nursery.start_soon(until_gone, receive, nursery.cancel_scope)
                await _send_all(send, receiver, trio.current_time() + self.seconds)
            except GiveUp:
                await Response(status_code=404)(scope, receive, send)
            except DatabaseError:
                await Response(status_code=503)(scope, receive, send)  # the browser asks again
            finally:
                self.hub.leave(self.name, viewer)
            nursery.cancel_scope.cancel()


async def _send_all(send: Send, messages: trio.MemoryReceiveChannel[bytes], until: float) -> None:
    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-store"),
        (b"x-accel-buffering", b"no"),  # a proxy must not wait for more
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    first = AGAIN + message("alive", {})
    await send({"type": "http.response.body", "body": first, "more_body": True})
    while trio.current_time() < until:
        data = message("alive", {})
        with trio.move_on_after(min(ALIVE, until - trio.current_time())):
            data = await messages.receive()
        await send({"type": "http.response.body", "body": data, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def until_gone(receive: Receive, scope: trio.CancelScope) -> None:
    """Cancel a scope as soon as the browser has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
