"""The reactions in the ledger: reading them, by key, by lane and for people."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Collection, Iterable, Sequence
from datetime import datetime
from functools import partial
from typing import Final

from pymongo import ASCENDING, UpdateOne
from pymongo.asynchronous.cursor import AsyncCursor
from pymongo.errors import OperationFailure

from caxev.core.ledger import NEWEST_FIRST, Reaction, State, aspect_row, run_prefix, site_prefix
from caxev.core.model import RunId
from caxev.database.client import DOCUMENT_CODES, Document
from caxev.database.connection import operation
from caxev.database.indexes import URGENT_FIRST, Order
from caxev.database.quarantine import Quarantine
from caxev.database.rows import reaction_from
from caxev.database.writes import AT_ONCE, Lease, guard, write_each

OLDEST_FIRST: Final[Order] = (("due", ASCENDING),)
MOVING: Final = 10_000
"""Running reactions whose progress is read at once."""


class Reactions(Quarantine):
    """Queries for reactions. Malformed ones are left out; see `odd`."""

    async def _documented(self, cursor: AsyncCursor[Document]) -> list[tuple[Reaction, Document]]:
        return self._of_documents(await cursor.to_list(None))

    def _of_documents(self, documents: Sequence[Document]) -> list[tuple[Reaction, Document]]:
        return self._read(self._ledger, documents, reaction_from)

    @operation
    async def standing(self, keys: Sequence[str]) -> dict[str, Reaction]:
        """Return the reactions that have these keys."""
        found: dict[str, Reaction] = {}
        # In parts: a command has a size limit.
        for start in range(0, len(keys), AT_ONCE):
            query = {"_id": {"$in": list(keys[start : start + AT_ONCE])}}
            some = await self._documented(self._ledger.find(query, {"kept": 0}))
            found |= {reaction.id: reaction for reaction, _ in some}
        return found

    @operation
    async def standing_keys(self, keys: Iterable[str]) -> set[str]:
        """Return which of these keys have a reaction."""
        wanted, found = list(keys), set[str]()
        for start in range(0, len(wanted), AT_ONCE):
            query = {"_id": {"$in": wanted[start : start + AT_ONCE]}}
            found |= {one["_id"] async for one in self._ledger.find(query, {"_id": 1})}
        return found

    @operation
    async def due(
        self,
        site: str,
        lane: str,
        now: datetime,
        limit: int,
        *,
        since: datetime | None = None,
        handlers: Collection[str] | None = None,
        but: Collection[str] = (),
    ) -> list[Reaction]:
        """Return up to `limit` reactions of a lane that are due and unclaimed, in its order.

        Those that fell due before `since` are left out: the index keeps the places of reactions
        that were settled lately for some minutes, and to read over them takes time. By priority,
        reactions that were recorded without one come last. `handlers`: only theirs. `but`: keys
        that are left out.
        """
        query: Document = {"site": site, "lane": lane, "state": State.PENDING.value}
        query["due"] = {"$lte": now} if since is None else {"$lte": now, "$gte": since}
        query["epoch"] = {"$exists": False}
        if handlers is not None:
            query["handler"] = {"$in": [*handlers]}
        if but:
            query["_id"] = {"$nin": [*but]}
        order = URGENT_FIRST if lane in NEWEST_FIRST else OLDEST_FIRST
        # The output of programs can be large, and nobody needs it to start a reaction.
        cursor = self._ledger.find(query, {"kept": 0}).sort(order).limit(limit)
        return [reaction for reaction, _ in await self._documented(cursor)]

    @operation
    async def next_due(self, site: str, lane: str, now: datetime) -> datetime | None:
        """Return when the next reaction of a lane falls due after `now`, or None."""
        query = {"site": site, "lane": lane, "state": State.PENDING.value, "due": {"$gt": now}}
        document = await self._ledger.find_one(query, {"due": 1}, sort=[("due", ASCENDING)])
        found = None if document is None else document["due"]
        return found if isinstance(found, datetime) else None

    @operation
    async def lanes(self, site: str) -> list[str]:
        """Return the lanes in which the site has open reactions."""
        return await self._lanes(site)

    async def _lanes(self, site: str) -> list[str]:
        query = {"site": site, "state": State.PENDING.value}
        lanes = await self._ledger.distinct("lane", query)
        return sorted(lane for lane in lanes if isinstance(lane, str))

    @operation
    async def wake(self, lease: Lease, root: str, now: datetime) -> int:
        """Make due what waits for a directory of the site; return how much. Raises `LeaseLost`."""
        await guard(self._ledger, lease)
        waiting = {"site": lease.site, "state": State.PENDING.value, "root": root}
        change = {"$set": {"due": now}}
        try:
            return (await self._ledger.update_many(waiting, change)).modified_count
        except OperationFailure as error:
            if error.code not in DOCUMENT_CODES:
                raise
        # One document that the server refuses must not keep those behind it asleep.
        woken, cursor = 0, self._ledger.find(waiting, {"_id": 1})
        while found := await cursor.to_list(AT_ONCE):
            writes = [UpdateOne({**waiting, "_id": one["_id"]}, change) for one in found]
            woken += (await write_each(self._ledger, writes))[0]
        return woken

    @operation
    async def reactions(
        self,
        site: str | None = None,
        *,
        run: RunId | None = None,
        state: str | None = None,
        handler: str | None = None,
        limit: int = 1000,
    ) -> list[tuple[Reaction, Document]]:
        """Return reactions with their whole documents, newest first; `run` needs `site`."""
        return await self._documented(await self._listed(site, run, state, handler, limit))

    def reaction_pages(
        self, site: str, state: str, handler: str | None = None, limit: int = 0
    ) -> AsyncGenerator[list[tuple[Reaction, Document]], None]:
        """Return reactions page by page, as `reactions` does all at once; 0: no limit."""
        find = partial(self._listed, site, None, state, handler, limit)
        return self._by_pages(find, _AT_A_TIME, self._of_documents)

    async def _listed(
        self,
        site: str | None,
        run: RunId | None,
        state: str | None,
        handler: str | None,
        limit: int,
    ) -> AsyncCursor[Document]:
        named = {"site": site, "state": state, "handler": handler}
        query: Document = {"handler": {"$exists": True}, **_keys(site, run, state)}
        query |= {name: value for name, value in named.items() if value is not None}
        # Without these conditions the server does not use the indexes of claimed and of due
        # reactions.
        if state == State.RUNNING.value:
            query["epoch"] = {"$exists": True}
        if state == State.PENDING.value and site is not None and run is None:
            query["lane"] = {"$in": await self._lanes(site)}
        return self._ledger.find(query, batch_size=_AT_A_TIME).sort("due", -1).limit(limit)

    def hindered(self, site: str) -> AsyncGenerator[list[Reaction], None]:
        """Return the site's open reactions that wait for something outside, page by page."""

        async def find() -> AsyncCursor[Document]:
            query = {"site": site, "state": State.PENDING.value, "hindered": {"$exists": True}}
            return self._ledger.find(query, {"kept": 0}, batch_size=_AT_A_TIME)

        def read(documents: Sequence[Document]) -> list[Reaction]:
            return [reaction for reaction, _ in self._of_documents(documents)]

        return self._by_pages(find, _AT_A_TIME, read)

    @operation
    async def moving(self, sites: Iterable[str]) -> list[tuple[Reaction, Document]]:
        """Return claimed reactions of these sites that have reported progress, up to `MOVING`."""
        # The epoch is there for the index of claimed reactions.
        claimed = {"site": {"$in": list(sites)}, "epoch": {"$exists": True}}
        query = {**claimed, "state": State.RUNNING.value, "progress": {"$type": "object"}}
        return await self._documented(self._ledger.find(query, {"kept": 0}).limit(MOVING))

    @operation
    async def tally(self, site: str | None = None) -> dict[str, dict[str, int]]:
        """Return, for each site, how many reactions are in each state."""
        # Malformed rows have no place in a table of names.
        named = {name: {"$type": "string"} for name in ("handler", "site", "state")}
        match = {"$match": {**_keys(site), **named, **({"site": site} if site else {})}}
        group = {"_id": {"site": "$site", "state": "$state"}, "n": {"$sum": 1}}
        cursor = await self._ledger.aggregate([match, {"$group": group}])
        counts: dict[str, dict[str, int]] = {}
        for row in await cursor.to_list(None):
            counts.setdefault(row["_id"]["site"], {})[row["_id"]["state"]] = row["n"]
        return counts


_AT_A_TIME: Final = 200
"""Reactions that are read at a time: what programs printed is in them, and can be large."""
_INDEXED: Final = {State.PENDING.value, State.RUNNING.value, State.FAILED.value}
"""States whose reactions have an index by site."""


def _keys(site: str | None, run: RunId | None = None, state: str | None = None) -> Document:
    """Return the filter by key for reactions, so that none of the many snapshots is read."""
    if site is None:
        return {"_id": {"$type": "string"}}
    if run is not None:
        return run_keys(site, run)
    return {} if state in _INDEXED else {"_id": {"$regex": "^" + re.escape(site_prefix(site))}}


def run_keys(site: str, run: RunId) -> Document:
    """Return the filter for all reactions of one run at one site, served by the _id index."""
    return {"_id": {"$regex": "^" + re.escape(run_prefix(site, run))}}


def reaction_document(reaction: Reaction) -> Document:
    """Return an open reaction as the ledger keeps it, without its key."""
    fields: Document = {
        "site": reaction.site,
        "run": reaction.run,
        "aspect": aspect_row(reaction.aspect),
        "handler": reaction.handler,
        "lane": reaction.lane,
        "before": reaction.event.before,
        "after": reaction.event.after,
        "generation": reaction.generation,
        "at": reaction.at,
        "due": reaction.due,
        "state": reaction.state.value,
        "attempts": 0,
        "interrupted": 0,
        "note": reaction.note,
        "priority": reaction.priority,
    }
    if reaction.epoch is not None:  # born claimed
        fields |= {"epoch": reaction.epoch, "helper": None}
    return fields
