"""All runs that match a filter, as CSV for a spreadsheet, sent as they are read."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import aclosing
from typing import Final

import trio
from attrs import frozen

from caxev.core.clock import utcnow
from caxev.core.selection import Selection
from caxev.core.sheet import HEADINGS, as_csv, cells
from caxev.database import Database, DatabaseError
from caxev.web.guard import Receive, Scope, Send
from caxev.web.stream import until_gone

_HEADERS: Final = (
    (b"content-type", b"text/csv; charset=utf-8"),
    (b"content-disposition", b'attachment; filename="runs.csv"'),
    (b"cache-control", b"no-store"),
)


@frozen
class RunsExport:
    """The answer with the runs of a selection, newest first, until the browser has gone."""

    database: Database
    selection: Selection

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        del scope
        async with trio.open_nursery() as nursery:
            nursery.start_soon(until_gone, receive, nursery.cancel_scope)
            await self._send(send)
            nursery.cancel_scope.cancel()

    async def _send(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": [*_HEADERS]}
        await send(start)
        await _part(send, [HEADINGS])
        pages = self.database.pages(self.selection, utcnow(), newest_first=True)
        try:
            async with aclosing(pages):
                async for page in pages:
                    await _part(send, map(cells, page))
        except DatabaseError as error:
            # Too late for another status: nobody must take this for all runs.
            await _part(send, [["incomplete", str(error)]])
        await send({"type": "http.response.body", "body": b""})


async def _part(send: Send, rows: Iterable[Iterable[object]]) -> None:
    body = as_csv(rows).encode()
    await send({"type": "http.response.body", "body": body, "more_body": True})
