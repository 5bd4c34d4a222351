"""All runs that match a filter, as CSV for a spreadsheet, sent as they are read."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import aclosing
from math import inf
from typing import Final

import trio
from attrs import frozen
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from caxev.core.clock import utcnow
from caxev.core.selection import Selection
from caxev.core.sheet import HEADINGS, as_csv, cells
from caxev.database import Database, DatabaseError
from caxev.web.stream import until_gone

_HEADERS: Final = (
    (b"content-type", b"text/csv; charset=utf-8"),
    (b"content-disposition", b'attachment; filename="runs.csv"'),
    (b"cache-control", b"no-store"),
)

MOST_EXPORTS: Final = 4
"""Lists that are sent at once: each reads all of its runs."""
TOO_MANY: Final = "Too many lists of runs are being sent: try again in a minute."
PATIENCE: Final = 60.0
"""Seconds in which a browser must take a page of runs, or else make room for others."""


@frozen
class RunsExport:
    """The answer with the runs of a selection, newest first, until the browser has gone."""

    database: Database
    selection: Selection
    limit: trio.CapacityLimiter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self.limit.available_tokens:
            refused = PlainTextResponse(f"{TOO_MANY}\n", 503, {"retry-after": f"{PATIENCE:.0f}"})
            await refused(scope, receive, send)
            return
        async with self.limit, trio.open_nursery() as nursery:
            nursery.start_soon(until_gone, receive, nursery.cancel_scope)
            await self._send(send, nursery.cancel_scope)
            nursery.cancel_scope.cancel()

    async def _send(self, send: Send, scope: trio.CancelScope) -> None:
        async def part(rows: Iterable[Iterable[object]]) -> None:
            scope.deadline = trio.current_time() + PATIENCE
            body = as_csv(rows).encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
            scope.deadline = inf

        start = {"type": "http.response.start", "status": 200, "headers": [*_HEADERS]}
        await send(start)
        await part([HEADINGS])
        pages = self.database.pages(self.selection, utcnow(), newest_first=True)
        try:
            async with aclosing(pages):
                async for page in pages:
                    await part(map(cells, page))
        except DatabaseError as error:
            # Too late for another status: nobody must take this for all runs.
            await part([["incomplete", str(error)]])
        await send({"type": "http.response.body", "body": b""})
