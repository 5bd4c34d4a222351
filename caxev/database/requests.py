"""Requests: what people ask a site's listener to do. They leave them, the listener takes them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, Final

from attrs import define, evolve, field, frozen
from pymongo.asynchronous.client_session import AsyncClientSession

from caxev.core.history import HistoryRow
from caxev.core.ledger import UNREADABLE, State
from caxev.core.model import RunId
from caxev.database.client import Document
from caxev.database.connection import LONG_LIMIT, Session, operation, within
from caxev.database.history import History
from caxev.database.quarantine import Odd
from caxev.database.rows import Row, reaction_from
from caxev.database.sites import Sites
from caxev.database.writes import Lease, guard

ANY_SITE: Final = {"site": {"$exists": True}}
"""Finds what waits for a listener: requests about many runs are kept beside it."""
SHOWN: Final = 1000
"""Waiting requests that are shown at once, without their runs."""
_WITHOUT_RUNS: Final = {
    **dict.fromkeys(("site", "kind", "handler", "force", "alarm", "by", "at"), 1),
    "runs": {"$cond": [{"$isArray": "$runs"}, {"$size": "$runs"}, "$runs"]},
}
_TAKEN_BACK: Final = "was_for"
"""The field that names the site of a request which was taken back."""
_BEGUN: Final = "begun"
"""The field of a request that a listener carries out."""


@frozen
class Request:
    """A person's request to a site's listener.

    `kind`: ``replay`` (fire the present states of `runs`, None: of all), ``retry`` (open failed
    reactions again), ``scan``, or ``clear`` (the alarm with the key `alarm` is over). `handler`
    narrows the first two. With `force` reactions that are done fire, too. `bulk` is the id of the
    request about many runs that this is part of. `site` is whose listener, `by` and `at` (UTC) are
    who asked and when; these are set of what was read. `number` is how many runs a request names
    that is only shown, and whose runs are not read; None: all.
    """

    kind: str
    runs: tuple[RunId, ...] | None = None
    handler: str | None = None
    force: bool = False
    id: Any = None
    alarm: str | None = None
    site: str = ""
    by: str = ""
    at: datetime | None = None
    bulk: str | None = None
    number: int | None = None


@define
class Parts:
    """Parts of a request about many runs: how many they are, and the runs that they name."""

    number: int = 0
    runs: set[RunId] = field(factory=set)


def request_from(document: Document) -> Request:
    """Return the request that a document holds."""
    row = Row.of(document)
    return Request(
        kind=row.text("kind"),
        runs=row.runs("runs"),
        handler=row.text("handler", None),
        force=row.flag("force", default=False),
        id=document["_id"],
        alarm=row.text("alarm", None),
        site=row.text("site", "") or row.text(_TAKEN_BACK, ""),
        by=row.text("by", ""),
        at=row.moment("at", None),
        bulk=row.text("bulk", None),
    )


def waiting_from(document: Document) -> Request:
    """Return what is shown of a request: `runs` is a list, or how long that is."""
    runs = document.get("runs")
    number = len(runs) if isinstance(runs, list) else Row.of(document).whole("runs", None)
    return evolve(request_from({**document, "runs": None}), number=number)


def request_document(request: Request, by: str, now: datetime) -> Document:
    """Return the document of a request that a person leaves."""
    return {
        "site": request.site,
        "kind": request.kind,
        "runs": None if request.runs is None else list(request.runs),
        "handler": request.handler,
        "force": request.force,
        "alarm": request.alarm,
        "by": by,
        "at": now,
        **({} if request.bulk is None else {"bulk": request.bulk}),
    }


class Requests(Sites, History):
    """Leaving requests, and carrying them out.

    The listener looks for them whenever it renews its lease. One that is taken back names its site
    under another field, so that no listener finds it.
    """

    @operation
    async def add_request(
        self, site: str, request: Request, by: str, now: datetime, row: HistoryRow | None = None
    ) -> None:
        """Leave a request for the site's listener, with its row of history."""
        document = request_document(evolve(request, site=site), by, now)

        async def add(session: Session) -> None:
            await self._requests.insert_one(document, session=session)
            await self._add_rows([] if row is None else [row], session)

        # One insert is atomic without a transaction.
        await (add(None) if row is None else self._transaction(add))

    @within(LONG_LIMIT)
    async def parts_of(self, bulk: str) -> tuple[Parts, Parts]:
        """Return what is left of a request about many runs: what waits, and what was taken back."""
        waits, back = Parts(), Parts()
        # One after the other: each site has parts of its own, which all name the same runs.
        async for document in self._requests.find({"bulk": bulk}):
            for one, _ in self._read(self._requests, [document], request_from):
                parts = waits if "site" in document else back
                parts.number += 1
                parts.runs.update(one.runs or ())
        return waits, back

    @operation
    async def take_back(
        self, bulk: str, now: datetime, row_of: Callable[[Request], HistoryRow]
    ) -> int:
        """Take back what no listener has begun to carry out of a request about many runs.

        Each part of it has its row of history then. Returns how many parts these were.
        """
        days = self.settings.history_days
        expires = {"$set": {"expires": now + timedelta(days=days)}} if days else {}
        change = {"$rename": {"site": _TAKEN_BACK}, **expires}
        waits = {"bulk": bulk, **ANY_SITE, _BEGUN: {"$exists": False}}
        return await self._renamed(waits, change, row_of)

    @operation
    async def ask_again(self, bulk: str, row_of: Callable[[Request], HistoryRow]) -> int:
        """Ask again for what was taken back, with a row of history of each; return how many."""
        change = {"$rename": {_TAKEN_BACK: "site"}, "$unset": {"expires": ""}}
        back = {"bulk": bulk, _TAKEN_BACK: {"$exists": True}}
        return await self._renamed(back, change, row_of)

    async def _renamed(
        self, query: Document, change: Document, row_of: Callable[[Request], HistoryRow]
    ) -> int:
        async def rename(session: AsyncClientSession) -> int:
            rows = []
            # One by one: each part has a row of history of its own.
            async for document in self._requests.find(query, session=session):
                for part, _ in self._read(self._requests, [document], request_from):
                    found = {"_id": part.id, **query}
                    await self._requests.update_one(found, change, session=session)
                    rows.append(row_of(part))
            await self._add_rows(rows, session)
            return len(rows)

        return await self._transaction(rename)

    @operation
    async def next_request(self, site: str) -> Request | None:
        """Return the oldest request that waits for a site; None if none does."""
        # Not all of them: people may ask for more than fits in memory.
        async for document in self._requests.find({"site": site}, batch_size=1).sort("_id"):
            for request, _ in self._read(self._requests, [document], request_from):
                return request
        return None

    @operation
    async def begin_request(self, request: Request) -> bool:
        """Note that a request is carried out now; return False if it was taken back."""
        waits = {"_id": request.id, "site": request.site}
        done = await self._requests.update_one(waits, {"$currentDate": {_BEGUN: True}})
        return done.matched_count > 0

    @operation
    async def waiting(
        self, site: str | None = None, limit: int = SHOWN
    ) -> tuple[int, list[Request]]:
        """Return how many requests wait for a site, or for any, and the oldest of them."""
        return await self._waiting(site, limit)

    async def _waiting(self, site: str | None, limit: int) -> tuple[int, list[Request]]:
        query = ANY_SITE if site is None else {"site": site}
        number = await self._requests.count_documents(query)
        cursor = self._requests.find(query, _WITHOUT_RUNS).sort("_id").limit(limit)
        rows = self._read(self._requests, await cursor.to_list(None), waiting_from)
        return number, [one for one, _ in rows]

    @operation
    async def finish_request(self, lease: Lease, request: Request) -> None:
        """Remove a request that was carried out. Raises `LeaseLost`."""

        # Together: a listener that has lost its lease leaves the request to its successor.
        async def finish(session: AsyncClientSession) -> None:
            await self._requests.delete_one({"_id": request.id}, session=session)
            await guard(self._ledger, lease, session)

        await self._transaction(finish)

    @operation
    async def set_aside(self, lease: Lease, odd: Odd, now: datetime) -> None:
        """Set a malformed document aside, and ask for a replay of the run that it was about.

        Raises `LeaseLost`.
        """
        runs = None if odd.run is None else (odd.run,)
        # A handler without a decision has seen that state: only by force it reacts to it again.
        again = Request("replay", runs, force=odd.read is reaction_from, site=lease.site)

        # Together: nothing else would show what is to fire again.
        async def move(session: AsyncClientSession) -> None:
            await self._move_aside(lease, odd, now, session)
            if odd.run is not None:
                document = request_document(again, lease.owner, now)
                await self._requests.insert_one(document, session=session)

        await self._transaction(move)
        self._odd.pop(odd.key, None)

    @operation
    async def reopen_failed(self, lease: Lease, request: Request, now: datetime) -> int:
        """Open the failed reactions again that a request names; return how many.

        Raises `LeaseLost`. Leaves out those that only show a run which could not be recorded:
        nothing carries these out.
        """
        query: Document = {"site": lease.site, "state": State.FAILED.value}
        if request.runs is not None:
            query["run"] = {"$in": list(request.runs)}
        named = {} if request.handler is None else {"$eq": request.handler}
        query["handler"] = {"$ne": UNREADABLE, **named}
        fresh = {"state": State.PENDING.value, "due": now, "attempts": 0, "interrupted": 0}

        async def reopen(session: AsyncClientSession) -> int:
            await guard(self._ledger, lease, session)
            done = await self._ledger.update_many(query, {"$set": fresh}, session=session)
            return done.modified_count

        return await self._transaction(reopen)
