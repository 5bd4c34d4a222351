"""All runs that match a filter, as CSV for a spreadsheet, sent as they are read."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from contextlib import aclosing
from typing import Final

import trio
from attrs import frozen

from caxev.core.clock import utcnow
from caxev.core.escapes import escaped
from caxev.core.model import Copy, Run
from caxev.core.selection import Selection, source_of
from caxev.database import Database, DatabaseError
from caxev.web.guard import Receive, Scope, Send
from caxev.web.stream import until_gone

HEADINGS: Final = ("number", "name", "detector", "start", "source", "bytes", "tags", "copies")
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
        await _part(send, lines([HEADINGS]))
        pages = self.database.pages(self.selection, utcnow(), newest_first=True)
        try:
            async with aclosing(pages):
                async for page in pages:
                    await _part(send, lines(map(cells, page)))
        except DatabaseError as error:
            # Too late for another status: nobody must take this for all runs.
            await _part(send, lines([["incomplete", escaped(str(error))]]))
        await send({"type": "http.response.body", "body": b""})


async def _part(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


def lines(rows: Iterable[Iterable[object]]) -> bytes:
    """Return rows as CSV."""
    text = io.StringIO()
    csv.writer(text).writerows([_cell(one) for one in row] for row in rows)
    return text.getvalue().encode()


def cells(run: Run) -> Iterable[object]:
    """Return a run's row."""
    start = run.start and f"{run.start:%Y-%m-%d %H:%M:%S}"
    copies = ", ".join(map(_copy, run.copies))
    tags = ", ".join(run.tags)
    return run.number, run.name, run.detector, start, source_of(run), run.raw_size, tags, copies


def _copy(copy: Copy) -> str:
    return f"{copy.type}{f' {copy.version}' if copy.version else ''}@{copy.host} {copy.status}"


def _cell(value: object) -> object:
    if value is None or isinstance(value, int):
        return value
    text = escaped(str(value))
    # A spreadsheet would calculate what begins so, whoever wrote it.
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
