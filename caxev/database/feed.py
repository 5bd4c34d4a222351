"""The feed of the page: one pass over all that it shows, then what changes, in batches.

A stream of the whole database brings only which documents changed. They are read afterwards, a
batch at once and only the fields that are shown, so a change is small, and nothing is read while
nothing changes. Snapshots change most often and are not shown: the server leaves them out.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Iterable, Sequence
from contextlib import aclosing
from datetime import datetime
from functools import partial
from typing import Any, Final

from attrs import frozen
from pymongo.asynchronous.cursor import AsyncCursor
from pymongo.asynchronous.database import AsyncDatabase

from caxev.core.alarms import AlarmState
from caxev.core.entry import NOTED
from caxev.core.ledger import Reaction, State
from caxev.core.model import RunId
from caxev.core.processes import Process
from caxev.core.selection import Selection
from caxev.database.alarms import KIND as ALARM
from caxev.database.alarms import Alarms
from caxev.database.client import Document, HistoryLost
from caxev.database.connection import PAGE, operation
from caxev.database.processes import KIND as PROCESS
from caxev.database.processes import processes_from
from caxev.database.requests import SHOWN, Request, Requests
from caxev.database.rows import reaction_from
from caxev.database.selections import query_of
from caxev.database.sites import SITE, Position, SiteRecord
from caxev.database.stream import ALL, ENDS, ChangeCursor, is_usable, pipeline

_OF_COPIES: Final = (
    *("type", "host", "pax_version", "status", "status_since", "creation_time", "source"),
    *("arrived_at", "size", "error", "trigger", "owner", "verified_at", NOTED),
)
_OF_DELETED: Final = ("type", "host", "pax_version", "date", "size", "arrived_at")
SHOWN_OF_RUNS: Final = dict.fromkeys(
    (
        *("number", "name", "detector", "start", "tags.name", "raw_size_byte", "source.type"),
        *(f"data.{name}" for name in _OF_COPIES),
        *(f"deleted_data.{name}" for name in _OF_DELETED),
    ),
    1,
)
"""The fields of a run that its row on the page, and the growth of its sites, are made of."""
_OF_PROCESSES: Final = {"keys": 0}
_OPEN: Final = tuple(one.value for one in State if one is not State.DONE)
_TEXTS: Final = {"$gte": ""}
"""Any text: with a bound on its first key the server uses an index by site."""


@frozen
class Changed:
    """Which documents changed: ids of runs, and keys of the ledger. Read on from `position`.

    A key of the ledger that is no text is (``alarm`` or ``process``, its site, its name).
    """

    runs: tuple[RunId, ...]
    ledger: tuple[Any, ...]
    requests: bool
    position: Position

    def __bool__(self) -> bool:
        return bool(self.runs or self.ledger or self.requests)


@frozen
class News:
    """The present content of changed documents.

    `runs`: documents with `SHOWN_OF_RUNS`, by id; None: it was deleted. `gone` are the keys of
    reactions that are done, were removed or cannot be read.
    """

    runs: dict[RunId, Document | None]
    sites: tuple[SiteRecord, ...] = ()
    reactions: tuple[tuple[Reaction, Document], ...] = ()
    gone: frozenset[str] = frozenset()
    alarms: tuple[AlarmState, ...] = ()
    ended: frozenset[tuple[str, str]] = frozenset()
    """Site and key of alarms that were removed."""
    processes: tuple[Process, ...] = ()
    """Without their `keys`, which are many."""
    left: frozenset[str] = frozenset()
    """Owners of processes that left."""
    requests: tuple[int, list[Request]] | None = None
    """How many wait now, and the oldest; None: as before."""


class FeedStream(ChangeCursor[Changed]):
    """An open change stream on the runs, the ledger and the requests."""

    def __init__(
        self, database: AsyncDatabase[Document], runs: str, ledger: str, requests: str
    ) -> None:
        super().__init__(database, None, _stages(runs, ledger, requests))
        self._names = (runs, ledger, requests)

    def batch(self, changes: Sequence[Document], position: Position) -> Changed:
        runs, ledger, _ = self._names
        # Dicts as ordered sets: of many changes of a document only its present state is read.
        found: dict[str, dict[Any, None]] = {name: {} for name in self._names}
        for change in changes:
            if change["operationType"] in ENDS:
                raise HistoryLost(f"a collection had a {change['operationType']!r}")
            key = change["documentKey"]["_id"]
            name = change["ns"]["coll"]
            if name == ledger and isinstance(key, dict):
                kind = ALARM if ALARM in key else PROCESS
                key = (kind, key.get("s"), key.get(kind))
            if is_usable(key):
                found[name][key] = None
        return Changed(
            tuple(found[runs]), tuple(found[ledger]), bool(found[self._names[2]]), position
        )


def _stages(runs: str, ledger: str, requests: str) -> list[Document]:
    """Return the stages that pass on what is shown."""
    match, _ = pipeline(ALL)
    which = "documentKey._id"
    wanted = [
        {"ns.coll": runs, **match["$match"]},
        # The ledger's sites and reactions, whose keys are texts, its alarms and its processes.
        {"ns.coll": ledger, which: {"$type": "string"}},
        *({"ns.coll": ledger, f"{which}.{kind}": {"$exists": True}} for kind in (ALARM, PROCESS)),
        {"ns.coll": requests},
    ]
    shown = {"operationType": 1, "documentKey": 1, "ns.coll": 1}
    return [{"$match": {"$or": wanted}}, {"$project": shown}]


class Feeds(Requests, Alarms):
    """Reading all that the page shows, and following it."""

    @operation
    async def open_feed(self, position: Position) -> FeedStream:
        """Open the stream after `position`. Raises `HistoryLost`."""
        names = (self._runs.name, self._ledger.name, self._requests.name)
        stream = FeedStream(self._client[self.settings.database], *names)
        await stream.open(position)
        return stream

    @operation
    async def read_changed(self, changed: Changed) -> News:
        """Read what the changed documents are now; of nothing changed nothing is read."""
        runs = await self._documents(changed.runs)
        texts = [key for key in changed.ledger if isinstance(key, str)]
        keys = [key for key in changed.ledger if isinstance(key, tuple)]
        alarms = [(site, name) for kind, site, name in keys if kind == ALARM]
        owners = [(site, name) for kind, site, name in keys if kind == PROCESS]
        # The output of programs can be large, and is not shown here.
        rows = await self._ledger.find({"_id": {"$in": texts}}, {"kept": 0}).to_list(None)
        reactions = self._open(rows)
        shown = {reaction.id for reaction, _ in reactions}
        sites = [row["_id"] for row in rows if row.get("kind") == SITE]
        ids = [{"alarm": key, "s": site} for site, key in alarms]
        states = await self._alarm_states({"_id": {"$in": ids}}) if alarms else []
        kept = {(one.alarm.site, one.alarm.key) for one in states}
        processes = await self._processes_of(owners)
        return News(
            {run: runs.get(run) for run in changed.runs},
            sites=tuple(await self._site_records({"_id": {"$in": sites}}) if sites else ()),
            reactions=tuple(reactions),
            gone=frozenset(texts) - shown,
            alarms=tuple(states),
            ended=frozenset(alarms) - kept,
            processes=processes,
            left=frozenset(name for _, name in owners) - {one.owner for one in processes},
            requests=await self._waiting(None, SHOWN) if changed.requests else None,
        )

    async def _documents(self, ids: Collection[RunId]) -> dict[RunId, Document]:
        if not ids:
            return {}
        cursor = self._runs.find({"_id": {"$in": list(ids)}}, SHOWN_OF_RUNS)
        return {one["_id"]: one for one in await cursor.to_list(None)}

    def _open(self, rows: Iterable[Document]) -> list[tuple[Reaction, Document]]:
        rows = [row for row in rows if row.get("state") in _OPEN]
        return self._read(self._ledger, rows, reaction_from)

    async def _processes_of(self, owners: Sequence[tuple[Any, Any]]) -> tuple[Process, ...]:
        if not owners:
            return ()
        ids = [{PROCESS: owner, "s": site} for site, owner in owners]
        cursor = self._ledger.find({"_id": {"$in": ids}, "kind": PROCESS}, _OF_PROCESSES)
        return tuple(processes_from(await cursor.to_list(None)))

    # -- the pass at the start --------------------------------------------------------------

    @operation
    async def feed_ledger(self) -> News:
        """Read the sites, alarms, processes and requests, each by its index."""
        processes = await self._ledger.find({"kind": PROCESS}, _OF_PROCESSES).to_list(None)
        return News(
            {},
            sites=tuple(await self._site_records({})),
            alarms=tuple(await self._alarm_states({})),
            processes=tuple(processes_from(processes)),
            requests=await self._waiting(None, SHOWN),
        )

    async def feed_reactions(self) -> AsyncGenerator[News, None]:
        """Read the open reactions page by page, by their index."""
        for state in _OPEN:
            find = partial(self._of_state, state)
            async with aclosing(self._by_pages(find, PAGE, self._open)) as pages:
                async for page in pages:
                    yield News({}, reactions=tuple(page))

    async def _of_state(self, state: str) -> AsyncCursor[Document]:
        query: Document = {"site": _TEXTS, "state": state}
        # The index of claimed reactions has only those with an epoch; the server uses it only if
        # the query says so.
        if state == State.RUNNING.value:
            query["epoch"] = {"$exists": True}
        return self._ledger.find(query, {"kept": 0})

    @operation
    async def feed_runs(self, after: RunId | None) -> tuple[list[Document], RunId | None]:
        """Read the next page of all runs; return it, and where the next one begins (None: end)."""
        # By `min`, which needs the hint: `$gt` would find only ids of the same type, and runs have
        # ids of several.
        cursor = self._runs.find({}, SHOWN_OF_RUNS).hint([("_id", 1)])
        if after is not None:
            cursor = cursor.min([("_id", after)])
        found = await cursor.limit(PAGE + 1).to_list(None)
        return found[:PAGE], found[PAGE]["_id"] if len(found) > PAGE else None

    @operation
    async def newest_runs(
        self, selection: Selection, now: datetime, before: RunId | None, limit: int
    ) -> list[Document]:
        """Read the newest runs, those stored last first, from before this id on.

        All that are selected, and perhaps more: see `selections.query_of`.
        """
        bound: Document = {} if before is None else {"_id": {"$lt": before}}
        query = {"$and": [query_of(selection, now), bound]}
        cursor = self._runs.find(query, SHOWN_OF_RUNS).sort("_id", -1).limit(limit)
        return await cursor.to_list(None)
