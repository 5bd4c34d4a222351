"""Snapshots: what runs are like now, what a site last saw of them, and recording the difference.

The watcher reads both for each batch of changes, works out the reactions, and records these with
the new snapshots and the stream's position in one transaction.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from itertools import count
from typing import Any, Final, TypeVar

from attrs import Factory, define, evolve
from bson import encode
from bson.max_key import MaxKey
from bson.min_key import MinKey
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import OperationFailure

from caxev.core.ledger import Reaction
from caxev.core.model import NO_FIELDS, Aspect, Run, RunId, Snapshot, Watched, snapshot_of
from caxev.core.packing import pack
from caxev.core.recording import MOST_COPIES, WholeRuns
from caxev.database.client import Document, writing_lease
from caxev.database.connection import LIMIT, PAGE, operation, within
from caxev.database.quarantine import Quarantine
from caxev.database.reactions import reaction_document, run_keys
from caxev.database.rows import is_plain, snapshot_from
from caxev.database.runs import snapshot_projection
from caxev.database.sites import Position, Sites
from caxev.database.stream import AWAIT, Batch, Stream, is_usable
from caxev.database.writes import TOUCH, Lease, insert_all, lost, upsert, write_all
from caxev.failpoints import point

T = TypeVar("T")

MOST_REACTIONS: Final = 2000
"""Reactions that are recorded in one transaction."""
MANY_REACTIONS: Final = 50
"""From this number on, reactions are inserted, which costs the server a third of an upsert."""
SAMPLE: Final = 10
"""Runs by which the size of all that were read is estimated."""
_DUPLICATE_KEY: Final = 11000


@define
class Snapshots:
    """Runs as they are now, and as the site saw them last.

    `now` and `before` have the runs that exist, and that were seen. `whole` are those of `now`
    that were read whole.
    """

    now: dict[RunId, dict[Aspect, str]]
    before: dict[RunId, dict[Aspect, str]]
    whole: WholeRuns

    @property
    def size(self) -> int:
        """The bytes of the runs that were read whole, about: by some of them."""
        runs = list(self.whole.found.values())
        # Spread over all: neighbours are often alike.
        some = runs[:: max(len(runs) // SAMPLE, 1)]
        found = sum(len(encode(one.document if isinstance(one, Run) else one)) for one in some)
        return found * len(runs) // max(len(some), 1)

    def replace(self, runs: Iterable[RunId], newer: Snapshots) -> None:
        """Put what was read later of some runs in the place of what is here."""
        wanted = [*runs]
        _replace(self.now, newer.now, wanted)
        _replace(self.before, newer.before, wanted)
        _replace(self.whole.found, newer.whole.found, wanted)


def _replace(mine: dict[RunId, T], newer: Mapping[RunId, T], runs: Iterable[RunId]) -> None:
    for run in runs:
        mine.pop(run, None)
        if run in newer:
            mine[run] = newer[run]


@define
class Ingest:
    """The result of one batch of changes, written in one transaction.

    `handlers` is the id of the set of handlers that has seen all of a run whose snapshot is new;
    with `replayed` they have seen all of each. `runs` are those that were read whole; they are not
    written but passed on with the reactions. `priorities` are those of runs whose tags changed
    them, for existing reactions. `over` are the keys of reactions to remove.
    """

    snapshots: Mapping[RunId, Snapshot | None]
    reactions: Sequence[Reaction] = ()
    position: Position | None = None
    handlers: int = 0
    replayed: bool = False
    runs: Mapping[RunId, Run] = Factory(dict)
    priorities: Mapping[RunId, int] = Factory(dict)
    over: Collection[str] = ()


class Recording(Sites, Quarantine):
    """Reading snapshots, and recording what follows from their difference."""

    @operation
    async def snapshot(
        self,
        site: str,
        runs: Sequence[RunId],
        known: Mapping[RunId, Mapping[Aspect, str]] | None = None,
        watched: Watched = NO_FIELDS,
    ) -> Snapshots:
        """Read runs as they are now, and what the site last saw of them.

        Only those that differ are read whole: most runs of a scan are as they were. `known` are
        last snapshots that the caller has, which are not read again.
        """
        return await self._snapshot(site, runs, known or {}, watched, changed=False)

    @within(LIMIT, held=AWAIT)
    async def next_look(
        self,
        stream: Stream,
        site: str,
        known: Mapping[RunId, Mapping[Aspect, str]],
        watched: Watched = NO_FIELDS,
        wait: float = AWAIT,
    ) -> tuple[Batch, Snapshots]:
        """Wait for the stream's next batch and read its snapshots, in one crossing.

        The batch is empty after `wait` seconds (`AWAIT` at most) without a change. Cancelling this
        ends the stream. Raises `HistoryLost`.
        """
        batch = await stream.next(wait)
        return batch, await self._snapshot(site, list(batch.runs), known, watched, changed=True)

    async def _snapshot(
        self,
        site: str,
        runs: Sequence[RunId],
        known: Mapping[RunId, Mapping[Aspect, str]],
        watched: Watched,
        *,
        changed: bool,
    ) -> Snapshots:
        if not runs:  # an idle stream's empty batches must not become queries
            return Snapshots({}, {}, WholeRuns())
        # Copied, because the caller may change `known` meanwhile.
        last = {run: dict(snapshot) for run in runs if (snapshot := known.get(run)) is not None}
        unknown = [run for run in runs if run not in last]
        if changed:
            documents, found = await asyncio.gather(
                self._whole(runs), self._last_snapshots(site, unknown)
            )
        else:
            found = await self._last_snapshots(site, unknown)
            seen = [run for run in runs if run in last or run in found]
            shown = snapshot_projection(watched)
            documents = await _found(self._confirmed, seen, shown) if seen else []
        last.update(found)
        now = {document["_id"]: snapshot_of(document, watched) for document in documents}
        if not changed:
            # The document that a decision is about must be the one that its snapshot is of.
            differing = [run for run in runs if now.get(run) != last.get(run) or run not in now]
            documents = await self._whole(differing) if differing else []
            now |= {document["_id"]: snapshot_of(document, watched) for document in documents}
        return Snapshots(now, last, WholeRuns({one["_id"]: one for one in documents}))

    async def _whole(self, runs: Sequence[RunId]) -> list[Document]:
        # One more than the most copies that are served shows that a run has too many.
        most = {"data": {"$slice": MOST_COPIES + 1}}
        return await _found(self._confirmed, runs, most)

    async def _last_snapshots(
        self, site: str, runs: Sequence[RunId]
    ) -> dict[RunId, dict[Aspect, str]]:
        if not runs:
            return {}
        rows = await _found(self._ledger, [_key(site, run) for run in runs])
        found = self._read(self._ledger, rows, snapshot_from)
        return {row["_id"]["r"]: snapshot for snapshot, row in found}

    @operation
    async def known_to(self, site: str, runs: Sequence[RunId]) -> dict[RunId, frozenset[str]]:
        """Return for each run the handlers that the site's snapshot was taken for."""
        sets = await self._handler_sets(site)
        keys = [_key(site, run) for run in runs]
        cursor = self._ledger.find({"_id": {"$in": keys}}, {"by": 1})
        rows = [row async for row in cursor if is_plain(row.get("by"))]
        return {row["_id"]["r"]: sets.get(row.get("by"), frozenset()) for row in rows}

    @operation
    async def page(
        self, site: str, before: RunId | None, size: int | None = None
    ) -> tuple[list[RunId], RunId | None]:
        """Return a page of run ids, and the `before` of the next page, or None.

        It has up to `size` (None: `PAGE`) stored runs. The newest come first: a site that starts
        looks at the runs of today first. Runs that the site has seen but that are no longer stored
        are among them, so that a scan also finds what was deleted.
        """
        size = size or PAGE
        low: Any = MinKey()
        high: Any = MaxKey() if before is None else before
        ids = await self._stored(low, high, size)
        low = ids[-1] if len(ids) == size else low
        # As far as this page goes, so that each run that was seen is on exactly one page.
        bounds = {"$gte": _key(site, low), "$lt": _key(site, high)}
        cursor = self._ledger.find({"_id": bounds}, {"_id": 1}).sort("_id", -1).limit(2 * size)
        keys = [row["_id"] for row in await cursor.to_list(None)]
        seen = [key["r"] for key in keys if "r" in key and is_plain(key["r"])]
        if seen and len(keys) == 2 * size:  # so many were deleted: the page ends before them
            low = seen[-1]
            ids = await self._stored(low, high, size)
        runs = list(dict.fromkeys([*filter(is_usable, ids), *seen]))
        return runs, None if isinstance(low, MinKey) else low

    async def _stored(self, low: Any, high: Any, most: int) -> list[RunId]:
        """Return the newest ids of runs from `low` to before `high`, so many at most."""
        # By the index's bounds, which need the hint: a filter would stop at ids of another type.
        cursor = self._runs.find({}, {"_id": 1}).hint([("_id", 1)]).sort("_id", -1)
        cursor = cursor.min([("_id", low)]).max([("_id", high)])
        return [row["_id"] for row in await cursor.limit(most).to_list(None)]

    async def ingest(self, lease: Lease, ingest: Ingest, now: datetime) -> None:
        """Record what changes led to. Raises `LeaseLost`.

        In one transaction, but for reactions beyond `MOST_REACTIONS`: these are recorded before,
        as many at a time, because a long transaction would keep the lease from being renewed.
        Snapshots and position come last, so what was cut off is found again, and renews the
        reactions that are there.
        """
        reactions = list(ingest.reactions)
        while len(reactions) > MOST_REACTIONS:
            some, reactions = reactions[:MOST_REACTIONS], reactions[MOST_REACTIONS:]
            await self._ingest(lease, Ingest({}, some), now)
        await self._ingest(lease, evolve(ingest, reactions=reactions), now)

    @operation
    async def _ingest(self, lease: Lease, ingest: Ingest, now: datetime) -> None:
        try:
            insert = len(ingest.reactions) >= MANY_REACTIONS
            await self._record(lease, ingest, now, insert=insert)
        except OperationFailure as error:
            if error.code != _DUPLICATE_KEY:
                raise
            # One of them exists already, which ended the transaction.
            await self._record(lease, ingest, now, insert=False)

    async def _record(self, lease: Lease, ingest: Ingest, now: datetime, *, insert: bool) -> None:
        attempts = count()

        async def seen() -> list[Document]:
            return _seen(lease, ingest)

        async def write(session: AsyncClientSession) -> None:
            # The site's document comes last: whoever waits for it waits the shorter. But a renewal
            # of the lease in between makes it conflict, so a second attempt locks it first.
            guard = {"q": lease.held, "u": _moved(ingest.position, now)}
            first = not next(attempts)
            if insert and first:
                # Snapshots are packed while the server inserts.
                new = [{"_id": one.id, **reaction_document(one)} for one in ingest.reactions]
                inserting = insert_all(self._ledger, new, session)
                writes = (await asyncio.gather(inserting, seen()))[1]
            else:
                writes = [*_seen(lease, ingest), *map(_renewal, ingest.reactions)]
            place = len(writes) if first else 0
            writes.insert(place, guard)
            with writing_lease(place):
                found = await write_all(self._ledger, writes, session)
            if found < len(writes):
                raise lost(lease)
            # Otherwise each scan would find the runs again that are gone.
            deleted = (run for run, snapshot in ingest.snapshots.items() if snapshot is None)
            if gone := [*(_key(lease.site, run) for run in deleted), *ingest.over]:
                await self._ledger.delete_many({"_id": {"$in": gone}}, session=session)
            for run, priority in ingest.priorities.items():
                change = {"$set": {"priority": priority}}
                await self._ledger.update_many(run_keys(lease.site, run), change, session=session)
            point("database.ingest.commit")

        await self._transaction(write)
        point("database.ingest.after")


async def _found(
    collection: AsyncCollection[Document], ids: Sequence[Any], fields: Document | None = None
) -> list[Document]:
    # In one reply: by default the first has 101 documents. One more than there are ends the cursor.
    query = {"_id": {"$in": list(ids)}}
    return await collection.find(query, fields, batch_size=len(ids) + 1).to_list(None)


def _key(site: str, run: RunId) -> Document:
    return {"s": site, "r": run}


def _seen(lease: Lease, ingest: Ingest) -> list[Document]:
    # A handler that came later has not seen all of a run whose snapshot was there already.
    when = "$set" if ingest.replayed else "$setOnInsert"
    return [
        upsert(_key(lease.site, run), {"$set": {"seen": pack(seen)}, when: {"by": ingest.handlers}})
        for run, seen in ingest.snapshots.items()
        if seen is not None
    ]


def _renewal(one: Reaction) -> Document:
    # It keeps the claim, if there is one: its attempt is still under way.
    stale = dict.fromkeys(("progress", "started", "hindered", "root"), "")
    return upsert(one.id, {"$set": reaction_document(one), "$unset": stale})


def _moved(position: Position | None, now: datetime) -> Document:
    if position is None:
        return TOUCH
    return {**TOUCH, "$set": {"position": position.row, "streamed": now}}
