"""Reading the selected runs page by page, in bounded memory, by the index that serves them best."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import datetime
from typing import Final

from pymongo.asynchronous.cursor import AsyncCursor
from pymongo.errors import OperationFailure

from caxev.core.model import Run
from caxev.core.selection import Selection
from caxev.database.client import Document
from caxev.database.connection import PAGE, Connection, operation
from caxev.database.selections import Scan, query_beside, scans_of

_NO_SUCH_INDEX: Final = 2
"""BadValue: what the server answers to a hint at an index that does not exist."""
_SHOWN: Final = dict.fromkeys(
    ("number", "name", "detector", "source.type", "start", "end", "tags", "data", "raw_size_byte"),
    1,
)


class RunPages(Connection):
    """Queries for selected runs, which read only the fields that caxev itself uses."""

    def _shown(self, query: Document) -> AsyncCursor[Document]:
        return self._runs.find(query, _SHOWN)

    async def select(self, selection: Selection, now: datetime, limit: int = 0) -> list[Run]:
        """Read the selected runs in the order of their numbers; 0: no limit, else any so many."""
        found: list[Run] = []
        async with aclosing(self.pages(selection, now, first=limit or None)) as pages:
            async for page in pages:
                found += page
                if limit and len(found) >= limit:
                    break
        return sorted(found[: limit or None], key=lambda run: run.number or 0)

    async def pages(
        self,
        selection: Selection,
        now: datetime,
        *,
        newest_first: bool = False,
        first: int | None = None,
    ) -> AsyncGenerator[list[Run], None]:
        """Read the selected runs page by page; `first`: how many are in the first page at most.

        They come in the order of their ids, or of their numbers or names if these are selected.
        A run that changes meanwhile is read once, before or after, unless it is given another
        number or name. Pages may be empty.
        """
        scans = scans_of(selection)
        query = query_beside(selection, scans, now)
        for scan in reversed(scans) if newest_first else scans:
            rest: Scan | None = scan
            while rest is not None:
                size, first = min(first or PAGE, PAGE), None
                documents, rest = await self._page(query, rest, size, newest_first)
                runs = map(Run.from_document, documents)
                yield [run for run in runs if selection.means(run, now)]

    @operation
    async def _page(
        self, query: Document, scan: Scan, size: int, newest_first: bool
    ) -> tuple[list[Document], Scan | None]:
        """Return a page of documents, and where the next page is; None: there is none."""
        try:
            return await self._between(query, scan, size, newest_first)
        except OperationFailure as error:
            if error.code != _NO_SUCH_INDEX or scan.by_id is None:
                raise
        # Nobody has made it, or it was dropped just now.
        return await self._between(query, scan.by_id, size, newest_first)

    async def _between(
        self, query: Document, scan: Scan, size: int, newest_first: bool
    ) -> tuple[list[Document], Scan | None]:
        wanted = {"$and": [query, scan.only]} if scan.only else query
        cursor = self._shown(wanted).hint(list(scan.keys))
        # By the index's bounds: a filter would stop at ids of another type.
        names = [name for name, _ in scan.keys]
        if scan.low:
            cursor = cursor.min([*zip(names, scan.low, strict=True)])
        if scan.high:
            cursor = cursor.max([*zip(names, scan.high, strict=True)])
        if newest_first:
            # By the id alone, if all have the same other keys: the server would not use an index on
            # fields of a list to sort by these, and sort all runs.
            cursor = cursor.sort([(name, -1) for name in (names if scan.ranges else ["_id"])])
        documents = await cursor.limit(size + 1).to_list(None)
        if len(documents) <= size:
            return documents, None
        # The bound `low` is included, `high` is not.
        following = documents.pop()
        last = documents[-1] if newest_first else following
        return documents, scan.after(last, newest_first=newest_first)
