"""What a site keeps for itself: its lease and position, its snapshots, its reactions, its requests.

Three collections beside the runs collection, all with the prefix ``caxev_``:

- ``ledger``: the reactions, by key; the snapshot of each run, by (site, run); and for each site, by
  its name, its lease with epoch, its position in the stream and its gaps of history. They stand
  together so that what a change leads to is one write and a commit. Its alarms are there as well;
- ``requests``: what people asked a site's listener to do (replay, retry, scan);
- ``manifests``: what copies consist of, by digest.

Everything here is asyncio and takes part in a transaction where a session is passed. The epoch of
the process stands in the filter of every write, so a deposed process can record nothing.
"""

from __future__ import annotations

import re
from asyncio import to_thread
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from functools import cache
from typing import Any, Final, TypeVar

from attrs import field, frozen
from bson import ObjectId
from bson.timestamp import Timestamp
from loguru import logger
from pymongo import ASCENDING, DESCENDING, IndexModel, ReturnDocument, UpdateOne
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import AutoReconnect, BulkWriteError, OperationFailure

from caxev.core.alarms import AlarmState
from caxev.core.ledger import (
    NEWEST_FIRST,
    UNREADABLE,
    Reaction,
    State,
    aspect_row,
    interrupt,
    run_prefix,
    site_prefix,
)
from caxev.core.model import NO_FIELDS, Aspect, RunId, Snapshot, Watched
from caxev.core.transcript import KEPT_PARTS
from caxev.database import alarms
from caxev.database.client import DOCUMENT_CODES, Document, LeaseLost
from caxev.database.rows import (
    Malformed,
    Row,
    alarm_state_from,
    carefully,
    is_plain,
    items_from,
    reaction_from,
    snapshot_from,
    texts,
)
from caxev.failpoints import point

Collection = AsyncCollection[Document]
Session = AsyncClientSession | None
T = TypeVar("T")


@frozen
class Position:
    """Where to go on in the stream: after a token, or, before the first one, from a time."""

    token: Mapping[str, Any] | None = None
    start: Timestamp | None = None


@frozen
class Gap:
    """A stretch of history that the stream could not give; a scan made up for it."""

    found: datetime
    why: str


@frozen
class Lease:
    """A process's hold on a site: what it writes counts while the site's epoch is this one."""

    site: str
    epoch: int
    owner: str


@frozen
class SiteRecord:
    """A site's document. `expires`: when the lease lapses unless renewed, UTC.

    `rules` are the digests of the rule files that were applied last, by catalogue;
    `configuration` is the digest of the sites.json that the owner goes by. `markers` are
    the ids of the markers of its directories, by their paths; `away`, why some of these were not
    there when its listener last looked. `skew` is by how many seconds the listener's clock is
    ahead of the database's.
    """

    site: str
    epoch: int
    owner: str | None
    active: bool
    expires: datetime | None
    position: Position | None
    scanned: datetime | None
    streamed: datetime | None
    trouble: str | None
    gaps: tuple[Gap, ...]
    requests: int
    watched: Watched = NO_FIELDS
    rules: Mapping[str, str] = field(factory=dict)
    configuration: str = ""
    markers: Mapping[str, str] = field(factory=dict)
    away: Mapping[str, str] = field(factory=dict)
    skew: float | None = None

    @classmethod
    def from_document(cls, document: Document) -> SiteRecord:
        """Return the record; `active` must have been computed by the server's clock.

        What is malformed is as not given: the site's listener writes it anew.
        """
        row = Row.of(document)
        site = str(document["_id"])

        def lenient(read: Callable[..., T], *args: Any, default: T) -> T:
            try:
                return carefully(lambda _: read(*args), None)
            except Malformed as error:
                _warn_once(f"what is known of site {site} is malformed: {error}")
                return default

        return cls(
            site=site,
            epoch=lenient(row.whole, "epoch", 0, default=0),
            owner=lenient(row.text, "owner", None, default=None),
            active=bool(document.get("active")),
            expires=lenient(row.moment, "expires", None, default=None),
            position=lenient(_position_from, document.get("position"), default=None),
            scanned=lenient(row.moment, "scanned", None, default=None),
            streamed=lenient(row.moment, "streamed", None, default=None),
            trouble=lenient(row.text, "trouble", None, default=None),
            gaps=lenient(_gaps_from, row, default=()),
            requests=lenient(row.whole, "requests", 0, default=0),
            watched=lenient(_watched_from, document.get("watched"), default=NO_FIELDS),
            rules=lenient(_rules_from, row, default={}),
            configuration=lenient(row.text, "configuration", "", default=""),
            markers=lenient(_roots_from, row, "markers", "id", default={}),
            away=lenient(_roots_from, row, "away", "why", default={}),
            skew=skew if isinstance(skew := document.get("skew"), float) else None,
        )


def _position_from(value: object) -> Position | None:
    if not value:
        return None
    row = Row.of(value).document
    token, start = row.get("token"), row.get("start")
    if not isinstance(token, Mapping | None) or not isinstance(start, Timestamp | None):
        raise Malformed("position is neither a token nor a timestamp")
    return None if token is None and start is None else Position(token, start)


def _gaps_from(row: Row) -> tuple[Gap, ...]:
    rows = [Row.of(gap) for gap in row.many("gaps", [])]
    return tuple(Gap(gap.moment("found"), gap.text("why")) for gap in rows)


def _watched_from(value: object) -> Watched:
    if value is None:
        return NO_FIELDS
    row = Row.of(value)
    return Watched(frozenset(texts(row.many("run", []))), frozenset(texts(row.many("copies", []))))


def _roots_from(row: Row, name: str, of: str) -> dict[str, str]:
    return {one.text("root"): one.text(of) for one in map(Row.of, row.many(name, []))}


def _rules_from(row: Row) -> dict[str, str]:
    rows = [Row.of(one) for one in row.many("rules", [])]
    return {one.text("catalogue"): one.text("digest") for one in rows}


@cache
def _warn_once(message: str) -> None:
    logger.warning("{}", message)


@frozen
class Request:
    """Something a person asked a site's listener to do.

    `kind`: ``replay`` (fire the present states of `runs`, None: of all), ``retry`` (open failed
    reactions again), ``scan``, or ``clear`` (the alarm with the key `alarm` is over). `handler`
    narrows the first two. `force` fires what was done, too.
    """

    kind: str
    runs: tuple[RunId, ...] | None = None
    handler: str | None = None
    force: bool = False
    id: Any = None
    alarm: str | None = None


def request_from(document: Document) -> Request:
    """Return the request that a document holds."""
    row = Row.of(document)
    runs = row.many("runs", None)
    if runs is not None and not all(is_plain(run) for run in runs):
        raise Malformed("runs holds what is no run's id")
    return Request(
        kind=row.text("kind"),
        runs=None if runs is None else tuple(runs),
        handler=row.text("handler", None),
        force=row.flag("force", default=False),
        id=document["_id"],
        alarm=row.text("alarm", None),
    )


@frozen
class Odd:
    """A malformed document that was passed over: where it stands, why, and how it is read."""

    collection: str
    id: Any
    site: str | None
    run: RunId | None
    why: str
    read: Callable[[Document], object] = field(eq=False, repr=False)

    @property
    def key(self) -> tuple[str, str]:
        return self.collection, repr(self.id)


Order = Sequence[tuple[str, int]]
OLDEST_FIRST: Final[Order] = (("due", ASCENDING),)
URGENT_FIRST: Final[Order] = (("priority", DESCENDING), ("generation", DESCENDING))
"""By priority, then newest first: the order of `NEWEST_FIRST` lanes."""

GAPS_KEPT: Final = 20
_SITE: Final = "site"
MALFORMED: Final = "malformed"
ASIDE_KEPT: Final = timedelta(days=7)
"""For how long a malformed document is kept, for people: what it was about has fired again."""
LONGEST_LEASE: Final = 86400.0
"""Seconds for which a lease is believed that does not say how long it is."""
_LEASE: Final = {
    "$cond": [
        {
            "$and": [
                {"$isNumber": "$lease"},
                {"$gte": ["$lease", 0]},
                {"$lte": ["$lease", LONGEST_LEASE]},
            ]
        },
        "$lease",
        LONGEST_LEASE,
    ]
}
_ACTIVE: Final = {
    "$and": [
        {"$eq": [{"$type": "$expires"}, "date"]},
        {"$gt": ["$expires", "$$NOW"]},
        # One that ends later than a renewal makes it was written when the server's clock was ahead,
        # or by nobody: it locks nobody out.
        {"$lte": ["$expires", {"$add": ["$$NOW", {"$multiply": [2000, _LEASE]}]}]},
    ]
}
_EPOCHS: Final = 2**22
"""Epochs are below this: they are the upper part of a generation, which has 63 bits."""
_EPOCH: Final = {
    "$cond": [
        {
            "$and": [
                {"$isNumber": "$epoch"},
                {"$gte": ["$epoch", 0]},
                {"$lt": ["$epoch", _EPOCHS]},
            ]
        },
        {"$toLong": {"$floor": "$epoch"}},
        0,
    ]
}


def is_epoch(value: object) -> bool:
    """Whether this is the epoch of a process that acted for a site."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < _EPOCHS


def _whole_up_to(name: str, most: int) -> Document:
    """A field's value as a whole number; 0 if it is none within these bounds, such as infinity."""
    is_binary = {"$in": [{"$type": f"${name}"}, ["int", "long", "double"]]}
    # NaN compares as less than any number.
    within = {"$and": [is_binary, {"$gte": [f"${name}", 0]}, {"$lte": [f"${name}", most]}]}
    return {"$cond": [within, {"$toLong": f"${name}"}, 0]}


def _number(name: str) -> Document:
    return {"$cond": [{"$isNumber": f"${name}"}, f"${name}", 0]}


class Store:
    """The three collections."""

    def __init__(
        self,
        database: AsyncDatabase[Document],
        prefix: str,
        odd: dict[tuple[str, str], Odd] | None = None,
    ) -> None:
        self.ledger: Collection = database[f"{prefix}ledger"]
        self.requests: Collection = database[f"{prefix}requests"]
        self.manifests: Collection = database[f"{prefix}manifests"]
        self.odd = {} if odd is None else odd

    def read(
        self, collection: Collection, documents: Iterable[Document], read: Callable[[Document], T]
    ) -> list[tuple[Document, T]]:
        """Read documents, each with what it holds; malformed ones are passed over and noted."""
        found: list[tuple[Document, T]] = []
        for document in documents:
            try:
                found.append((document, carefully(read, document)))
            except Malformed as error:
                self._pass_over(collection, document, str(error), read)
        return found

    def _pass_over(
        self,
        collection: Collection,
        document: Document,
        why: str,
        read: Callable[[Document], object],
    ) -> None:
        key = document["_id"]
        inner = key if isinstance(key, dict) else {}
        site, run = document.get("site", inner.get("s")), document.get("run", inner.get("r"))
        known_site = site if isinstance(site, str) else None
        odd = Odd(collection.name, key, known_site, run if is_plain(run) else None, why, read)
        if odd.key not in self.odd:
            self.odd[odd.key] = odd
            logger.warning("{} {} is passed over: {}", collection.name, str(key)[:300], why)

    async def set_aside(self, lease: Lease, odd: Odd, now: datetime, session: Session) -> bool:
        """Move a malformed document where nothing reads it; False if it is readable by now.

        To be done in a transaction. Raises `LeaseLost`.
        """
        collection = self.ledger.database[odd.collection]
        document = await collection.find_one({"_id": {"$eq": odd.id}}, session=session)
        if document is None:
            return False
        try:
            carefully(odd.read, document)
        except Malformed as error:
            kept = {
                "_id": {MALFORMED: ObjectId()},
                "kind": MALFORMED,
                "from": odd.collection,
                "by": lease.site,
                "at": now,
                "why": str(error),
                "document": document,
            }
            await self.ledger.insert_one(kept, session=session)
            await collection.delete_one({"_id": {"$eq": odd.id}}, session=session)
            await self._set_site(lease, {}, session)
            return True
        return False

    async def forget_aside(self, site: str, now: datetime) -> set[tuple[str, str]]:
        """Remove what this site set aside long ago; the keys of the documents that are kept."""
        mine: Document = {"kind": MALFORMED, "by": site}
        await self.ledger.delete_many({**mine, "at": {"$not": {"$gt": now - ASIDE_KEPT}}})
        rows = await self.ledger.find(mine, {"from": 1, "document._id": 1}).to_list(None)
        return {(str(row.get("from")), repr(row.get("document", {}).get("_id"))) for row in rows}

    async def audit(self, site: str) -> None:
        """Look for reactions of a site that no query for what is due or claimed would ever find."""
        types = {"at": "date", "due": "date", "generation": "number", "lane": "string"}
        odd: list[Document] = [{name: {"$not": {"$type": kind}}} for name, kind in types.items()]
        odd += [{"state": {"$nin": [state.value for state in State]}}, {"run": None}]
        odd += [{"site": {"$ne": site}}, {"handler": {"$not": {"$type": "string"}}}]
        odd += [{"epoch": {"$exists": True, "$not": {"$type": "number"}}}]
        odd += [{"epoch": {"$exists": False}, "state": State.RUNNING.value}]
        query = {"_id": {"$regex": "^" + re.escape(site_prefix(site))}, "$or": odd}
        self.read(
            self.ledger, await self.ledger.find(query).limit(_AT_ONCE).to_list(None), reaction_from
        )

    async def create_indexes(self) -> None:
        """Make collections and indexes. Repeatable."""
        await self.ledger.create_indexes(
            [
                # What is due: only reactions that nobody has claimed.
                IndexModel(
                    [("site", ASCENDING), ("lane", ASCENDING), ("due", ASCENDING)],
                    name="due",
                    partialFilterExpression={"state": State.PENDING.value},
                ),
                # What is claimed, for the next process to interrupt.
                IndexModel(
                    [("site", ASCENDING), ("epoch", ASCENDING)],
                    name="claimed",
                    partialFilterExpression={"epoch": {"$exists": True}},
                ),
                IndexModel(
                    [("kind", ASCENDING)],
                    name="kind",
                    partialFilterExpression={"kind": {"$exists": True}},
                ),
                IndexModel(
                    [("site", ASCENDING), ("due", ASCENDING)],
                    name="failed",
                    partialFilterExpression={"state": State.FAILED.value},
                ),
                *map(_newest_first, sorted(NEWEST_FIRST)),
            ]
        )
        await self.requests.create_indexes([IndexModel([("site", ASCENDING)], name="site")])
        await self.manifests.create_indexes([IndexModel([("m", ASCENDING)], name="manifest")])

    # -- lease ------------------------------------------------------------------------------

    async def record(self, site: str) -> SiteRecord | None:
        """Read a site's document."""
        records = await self.records({"_id": site})
        return records[0] if records else None

    async def records(self, query: Document) -> list[SiteRecord]:
        """Read sites' documents; whether a lease is active, the server's clock decides."""
        query = {"kind": _SITE, **query}
        cursor = self.ledger.find(query, {"active": _ACTIVE, **_SITE_FIELDS}).sort("_id")
        return [SiteRecord.from_document(document) async for document in cursor]

    async def register(self, site: str) -> None:
        """See to it that the site has a document."""
        fresh = {"epoch": 0, "kind": _SITE}
        await self.ledger.update_one({"_id": site}, {"$setOnInsert": fresh}, upsert=True)

    async def last_epoch(self, site: str) -> int:
        """Return an epoch that none of the site's generations and claims is above.

        For a site whose document was lost: its generations must be new all the same.
        """
        last = _EPOCHS - 2  # the next one must be an epoch, too
        top = {"$max": _whole_up_to("generation", (last << 40) + (1 << 40) - 1)}
        claimed = {"$max": _whole_up_to("epoch", last)}
        match = {"$match": {"site": site, "handler": {"$exists": True}}}
        group = {"$group": {"_id": None, "generation": top, "epoch": claimed}}
        cursor = await self.ledger.aggregate([match, group])
        for row in await cursor.to_list(None):
            return max(int(row["generation"]) >> 40, int(row["epoch"]))
        return 0

    async def predecessor(self, site: str) -> Document | None:
        """Return the site's `lsid`, `epoch`, whether the lease is `active`, and the time `now`."""
        shown = {"lsid": 1, "epoch": 1, "active": _ACTIVE, "now": "$$NOW"}
        return await self.ledger.find_one({"_id": site}, shown)

    async def take_over(
        self,
        site: str,
        owner: str,
        lease_time: float,
        lsid: Any,
        *,
        configuration: str,
        least: int = 0,
    ) -> int | None:
        """Take a lapsed lease: the new epoch, above `least`, or None where it has not lapsed."""
        document = await self.ledger.find_one_and_update(
            {"_id": site, "$expr": {"$not": [_ACTIVE]}},
            [
                {
                    "$set": {
                        "epoch": {"$add": [{"$max": [_EPOCH, least]}, 1]},
                        "requests": _number("requests"),
                        "kind": _SITE,
                        "owner": {"$literal": owner},
                        "expires": {"$add": ["$$NOW", lease_time * 1000]},
                        "lsid": {"$literal": lsid},
                        "lease": lease_time,
                        "configuration": {"$literal": configuration},
                    }
                }
            ],
            return_document=ReturnDocument.AFTER,
        )
        return None if document is None else int(document["epoch"])

    async def renew(self, lease: Lease, lease_time: float, state: Mapping[str, Any]) -> SiteRecord:
        """Prolong the lease, and record our state. Raises `LeaseLost` if the epoch is another."""
        document = await self.ledger.find_one_and_update(
            _mine(lease),
            [
                {
                    "$set": {
                        "expires": {"$add": ["$$NOW", lease_time * 1000]},
                        "lease": lease_time,
                        **{name: {"$literal": value} for name, value in state.items()},
                    }
                }
            ],
            return_document=ReturnDocument.AFTER,
        )
        if document is None:
            raise LeaseLost(f"another process has taken over {lease.site}")
        return SiteRecord.from_document({**document, "active": True})

    async def release(self, lease: Lease) -> None:
        """End the lease now, so that a stand-by need not wait for it to lapse."""
        await self.ledger.update_one(_mine(lease), [{"$set": {"expires": "$$NOW"}}])

    async def interrupt_claims(self, site: str, epoch: int, now: datetime) -> int:
        """Open every claim again that older epochs than this left; how many there were.

        One that the ledger refuses to change stays among the site's `claims`.
        """
        claimed = {"site": site, "epoch": {"$lt": epoch}}
        found = await self._reactions(claimed)
        writes = [
            # What its process has settled meanwhile, if it lives after all, stays settled.
            UpdateOne({"_id": reaction.id, "epoch": reaction.epoch}, _interruption(reaction, now))
            for reaction in found
        ]
        await _write_each(self.ledger, writes)
        return len(found)

    async def _reactions(self, query: Document) -> list[Reaction]:
        documents = await self.ledger.find(query).to_list(None)
        return [reaction for _, reaction in self.read(self.ledger, documents, reaction_from)]

    # -- position ---------------------------------------------------------------------------

    async def save_position(self, lease: Lease, position: Position, now: datetime) -> None:
        """Remember where to go on. Raises `LeaseLost`."""
        await self._set_site(lease, position_fields(position, now), None)

    async def rules_applied(self, lease: Lease, digests: Mapping[str, str]) -> None:
        """Note which rule files were applied last. Raises `LeaseLost`."""
        rows = [{"catalogue": name, "digest": digest} for name, digest in digests.items()]
        await self._set_site(lease, {"rules": rows}, None)

    async def note_marker(self, site: str, root: str, marker: str) -> None:
        """Note the id of the marker of a site's directory, in place of any other."""
        await self.register(site)
        others = {
            "$filter": {
                "input": {"$cond": [{"$isArray": "$markers"}, "$markers", []]},
                "cond": {"$ne": ["$$this.root", {"$literal": root}]},
            }
        }
        row = {"root": {"$literal": root}, "id": {"$literal": marker}}
        change = {"$set": {"markers": {"$concatArrays": [others, [row]]}}}
        await self.ledger.update_one({"_id": site}, [change])

    async def note_away(self, lease: Lease, away: Mapping[str, str]) -> None:
        """Note which directories are not there, and why. Raises `LeaseLost`."""
        rows = [{"root": root, "why": why} for root, why in away.items()]
        await self._set_site(lease, {"away": rows}, None)

    async def wake(self, lease: Lease, root: str, now: datetime) -> int:
        """Make due what waits for that directory; how much that is. Raises `LeaseLost`."""
        await self._set_site(lease, {}, None)
        waiting = {"site": lease.site, "state": State.PENDING.value, "root": root}
        change = {"$set": {"due": now}}
        try:
            return (await self.ledger.update_many(waiting, change)).modified_count
        except OperationFailure as error:
            if error.code not in DOCUMENT_CODES:
                raise
        # One document that is refused must not keep those behind it asleep.
        found = await self.ledger.find(waiting, {"_id": 1}).to_list(None)
        writes = [UpdateOne({**waiting, "_id": one["_id"]}, change) for one in found]
        return (await _write_each(self.ledger, writes))[0]

    async def finish_scan(
        self,
        lease: Lease,
        start: Timestamp | None,
        now: datetime,
        gap: Gap | None,
        watched: Watched,
    ) -> None:
        """Note a completed scan, which took in the fields that are `watched`.

        Stream on from `start`, if given; `gap` is what it made up for.
        """
        seen = {"run": sorted(watched.run), "copies": sorted(watched.copies)}
        fields: Document = {"scanned": now, "watched": seen}
        if start is not None:
            fields["position"] = _position_row(Position(start=start))
        change: Document = {name: {"$literal": value} for name, value in fields.items()}
        if gap is not None:
            change["gaps"] = _with_gap({"$literal": {"found": gap.found, "why": gap.why}})
        point("database.scanned.before")
        done = await self.ledger.update_one(_mine(lease), [{"$set": change}])
        point("database.scanned.after")
        _check(done.matched_count, lease)

    async def _set_site(self, lease: Lease, fields: Document, session: Session) -> None:
        change: Document = {"$currentDate": {"touched": True}}
        if fields:
            change["$set"] = fields
        done = await self.ledger.update_one(_mine(lease), change, session=session)
        _check(done.matched_count, lease)

    # -- looks ------------------------------------------------------------------------------

    async def snapshots(self, site: str, runs: Sequence[RunId]) -> dict[RunId, dict[Aspect, str]]:
        """Return this site's snapshots of these runs."""
        cursor = self.ledger.find({"_id": {"$in": [{"s": site, "r": run} for run in runs]}})
        found = self.read(self.ledger, await cursor.to_list(None), snapshot_from)
        return {row["_id"]["r"]: snapshot for row, snapshot in found}

    async def ingest(
        self,
        lease: Lease,
        snapshots: Mapping[RunId, Snapshot | None],
        reactions: Iterable[Reaction],
        position: Mapping[str, Any],
        session: Session,
        *,
        guard_first: bool = False,
    ) -> None:
        """Write snapshots (None: the run is gone), reactions and position. Raises `LeaseLost`.

        The guard, which is the site's document, comes last: the shorter it is held, the better for
        whoever waits for it. But whoever renews the lease before it is written makes it conflict:
        with `guard_first` nobody can, and they wait.
        """
        writes = [
            _upsert({"s": lease.site, "r": run}, {"$set": {"snapshot": _rows(snapshot)}})
            for run, snapshot in snapshots.items()
            if snapshot is not None
        ]
        writes += [_upsert(reaction.id, _renewal(reaction)) for reaction in reactions]
        touch = {"$currentDate": {"touched": True}, **({"$set": position} if position else {})}
        writes.insert(0 if guard_first else len(writes), {"q": _mine(lease), "u": touch})
        if await _write_all(self.ledger, writes, session) < len(writes):
            raise LeaseLost(f"another process has taken over {lease.site}")
        gone = [
            {"s": lease.site, "r": run} for run, snapshot in snapshots.items() if snapshot is None
        ]
        if gone:
            await self.ledger.delete_many({"_id": {"$in": gone}}, session=session)

    async def seen_between(self, site: str, low: Any, high: Any) -> list[RunId]:
        """Return the runs with low < _id <= high that this site has seen."""
        bounds = {"$gt": {"s": site, "r": low}, "$lte": {"s": site, "r": high}}
        keys = [row["_id"] async for row in self.ledger.find({"_id": bounds}, {"_id": 1})]
        return [key["r"] for key in keys if "r" in key and is_plain(key["r"])]

    # -- reactions ------------------------------------------------------------------------------

    async def standing(self, keys: Sequence[str]) -> dict[str, Reaction]:
        """Return the reactions in these keys."""
        found: dict[str, Reaction] = {}
        for start in range(0, len(keys), _AT_ONCE):
            some = await self._reactions({"_id": {"$in": list(keys[start : start + _AT_ONCE])}})
            found |= {reaction.id: reaction for reaction in some}
        return found

    async def set_priority(self, site: str, run: RunId, priority: int, session: Session) -> None:
        """Give all reactions of a run this priority."""
        change = {"$set": {"priority": priority}}
        await self.ledger.update_many(run_keys(site, run), change, session=session)

    async def due(
        self,
        site: str,
        lane: str,
        now: datetime,
        limit: int,
        *,
        since: datetime | None = None,
        order: Order = OLDEST_FIRST,
        without: RunId | None = None,
    ) -> list[Reaction]:
        """Return up to `limit` reactions of a lane that are due and unclaimed, in that order.

        Those of the run `without` are left out. `since` passes by what fell due before: the index
        keeps the places of what was paid lately for some minutes, and reading over them takes time.
        By priority, reactions that were recorded without one come last.
        """
        query: Document = {"site": site, "lane": lane, "state": State.PENDING.value}
        query["due"] = {"$lte": now} if since is None else {"$lte": now, "$gte": since}
        query["epoch"] = {"$exists": False}
        if without is not None:
            query["run"] = {"$ne": without}
        cursor = self.ledger.find(query, {"kept": 0}).sort(order).limit(limit)
        documents = await cursor.to_list(None)
        return [reaction for _, reaction in self.read(self.ledger, documents, reaction_from)]

    async def next_due(self, site: str, lane: str, now: datetime) -> datetime | None:
        """Return when the next reaction of a lane falls due after `now`, or None."""
        query = {"site": site, "lane": lane, "state": State.PENDING.value, "due": {"$gt": now}}
        document = await self.ledger.find_one(query, {"due": 1}, sort=[("due", ASCENDING)])
        found = None if document is None else document["due"]
        return found if isinstance(found, datetime) else None

    async def lanes(self, site: str) -> list[str]:
        """Return the lanes in which this site has open reactions."""
        query = {"site": site, "state": State.PENDING.value}
        lanes = await self.ledger.distinct("lane", query)
        return sorted(lane for lane in lanes if isinstance(lane, str))

    async def claim(self, reactions: Sequence[Reaction], epoch: int) -> list[Reaction]:
        """Claim pending reactions of a site; return those that had not changed. Raises `LeaseLost`.

        A successor writes its epoch before it opens what is claimed. So whoever still finds its own
        epoch after a claim has either claimed in its right, or will have the claim opened. Who
        finds another one gives back what it has claimed; where it dies before that, the successor
        finds it among its `claims`.
        """
        open_still = {"state": State.PENDING.value, "epoch": {"$exists": False}}
        claimed = {"$set": {"state": State.RUNNING.value, "epoch": epoch}}
        writes = [
            {
                "q": {"_id": reaction.id, "generation": reaction.generation, **open_still},
                "u": claimed,
            }
            for reaction in reactions
        ]
        point("database.claim.before")
        matched = await _write_all(self.ledger, writes, None)
        point("database.claim.after")
        await self._check_claims(reactions, epoch)
        if matched == len(reactions):
            return list(reactions)
        mine = {"_id": {"$in": [reaction.id for reaction in reactions]}, "epoch": epoch}
        generations = {
            row["_id"]: row["generation"] async for row in self.ledger.find(mine, {"generation": 1})
        }
        return [
            reaction
            for reaction in reactions
            if generations.get(reaction.id) == reaction.generation
        ]

    async def _check_claims(self, reactions: Sequence[Reaction], epoch: int) -> None:
        """Give claims back that a successor cannot have seen. Raises `LeaseLost`."""
        for site in {reaction.site for reaction in reactions}:
            if await self.ledger.find_one({"_id": site, "epoch": epoch}, {"_id": 1}) is None:
                late = {"_id": {"$in": [reaction.id for reaction in reactions]}, "epoch": epoch}
                await self.ledger.update_many(late, _FREED)
                raise LeaseLost(f"another process has taken over {site}")

    async def claims(self, lease: Lease) -> list[Document]:
        """Return the key, generation and epoch of all that this site has claimed."""
        query = {"site": lease.site, "epoch": {"$lte": lease.epoch}}
        return await self.ledger.find(query, {"generation": 1, "epoch": 1}).to_list(None)

    async def free(self, claims: Sequence[Document]) -> tuple[int, dict[str, str]]:
        """Open these claims again if they still stand; how many, and what the ledger refused.

        The latter is by key, with the reason.
        """
        # The generation: a new reaction in that key is claimed as it is recorded.
        found = ({name: {"$eq": value} for name, value in claim.items()} for claim in claims)
        writes = [UpdateOne(claim, _FREED) for claim in found]
        freed, refused = await _write_each(self.ledger, writes)
        return freed, {claims[index]["_id"]: why for index, why in refused.items()}

    async def settle(
        self, settled: Sequence[Reaction], epoch: int, session: Session = None
    ) -> tuple[int, int]:
        """Write attempts' ends; returns how many counted, and how many keys were renewed.

        A reaction that was renewed while it ran stays open and is only freed. Neither: deposed.
        """
        point("database.settle.before")
        ours = [{"_id": reaction.id, "epoch": epoch} for reaction in settled]
        writes = [
            {"q": {**mine, "generation": reaction.generation}, "u": _settlement(reaction)}
            for mine, reaction in zip(ours, settled, strict=True)
        ]
        counted = await _write_all(self.ledger, writes, session)
        renewed = 0
        if counted < len(settled):
            freed = [{"q": mine, "u": _FREED} for mine in ours]
            renewed = await _write_all(self.ledger, freed, session)
        point("database.settle.after")
        return counted, renewed

    async def fence(self, reaction: Reaction, epoch: int, session: Session) -> bool:
        """Touch a claimed reaction; False where this process no longer holds the claim.

        Done within a transaction it makes the whole of it depend on the claim.
        """
        mine = {"_id": reaction.id, "epoch": epoch}
        done = await self.ledger.update_one(
            mine, {"$currentDate": {"touched": True}}, session=session
        )
        return done.matched_count == 1

    async def progress(self, reaction: Reaction, epoch: int, progress: Document) -> None:
        """Show in the ledger how far a running reaction is."""
        mine = {"_id": reaction.id, "epoch": epoch}
        await self.ledger.update_one(mine, {"$set": {"progress": progress}})

    async def keep(self, reaction: Reaction, epoch: int, said: bytes) -> None:
        """Add to what is kept with a running reaction what a program said, packed."""
        mine = {"_id": reaction.id, "epoch": epoch}
        push = {"kept": {"$each": [said], "$slice": -KEPT_PARTS}}
        await self.ledger.update_one(mine, {"$push": push, "$inc": {"kept_parts": 1}})

    def find_reactions(self, query: Document, limit: int) -> Any:
        """Return a cursor over ledger documents, newest first."""
        query = {"handler": {"$exists": True}, **query}
        return self.ledger.find(query).sort("due", -1).limit(limit)

    # -- alarms -----------------------------------------------------------------------------

    async def alarms(self, site: str | None) -> list[AlarmState]:
        """Return the alarms of a site, or of all, as they were last kept."""
        query: Document = {"kind": alarms.KIND, **({} if site is None else {"site": site})}
        documents = await self.ledger.find(query).to_list(None)
        return [one for _, one in self.read(self.ledger, documents, alarm_state_from)]

    async def keep_alarms(
        self,
        lease: Lease,
        kept: Iterable[AlarmState],
        gone: Iterable[str],
        session: Session,
    ) -> None:
        """Write how alarms stand, and forget others, by their keys. Raises `LeaseLost`."""
        writes = [
            _upsert(alarms.alarm_id(lease.site, one.alarm.key), {"$set": alarms.alarm_row(one)})
            for one in kept
        ]
        if writes:
            await _write_all(self.ledger, writes, session)
        forgotten = [alarms.alarm_id(lease.site, key) for key in gone]
        if forgotten:
            await self.ledger.delete_many({"_id": {"$in": forgotten}}, session=session)
        await self._set_site(lease, {}, session)

    # -- requests ---------------------------------------------------------------------------

    async def add_request(self, site: str, request: Request, by: str, now: datetime) -> None:
        """Leave a request for the site's listener.

        Killed before the second write, it is carried out with the next one, or when the listener
        starts. Not a transaction: one that was killed would keep the listener from its site's
        document, and with that from all it does, for a minute.
        """
        await self.register(site)
        await self.requests.insert_one(
            {
                "site": site,
                "kind": request.kind,
                "runs": None if request.runs is None else list(request.runs),
                "handler": request.handler,
                "force": request.force,
                "alarm": request.alarm,
                "by": by,
                "at": now,
            }
        )
        asked = {"requests": {"$add": [_number("requests"), 1]}}
        await self.ledger.update_one({"_id": site}, [{"$set": asked}])

    async def pending(self, site: str) -> list[Request]:
        """Return the requests that wait for this site, oldest first."""
        rows = await self.requests.find({"site": site}).sort("_id").to_list(None)
        return [request for _, request in self.read(self.requests, rows, request_from)]

    async def finish_request(self, lease: Lease, request: Request, session: Session) -> None:
        """Take a request that was carried out off the list. Raises `LeaseLost`."""
        await self.requests.delete_one({"_id": request.id}, session=session)
        await self._set_site(lease, {}, session)

    async def reopen_failed(
        self,
        lease: Lease,
        runs: Sequence[RunId] | None,
        handler: str | None,
        now: datetime,
        session: Session,
    ) -> int:
        """Open failed reactions again, due now; returns how many. Raises `LeaseLost`.

        Not those that only show a run which could not be recorded: nobody pays these.
        """
        await self._set_site(lease, {}, session)
        query: Document = {"site": lease.site, "state": State.FAILED.value}
        if runs is not None:
            query["run"] = {"$in": list(runs)}
        query["handler"] = {"$ne": UNREADABLE} | ({} if handler is None else {"$eq": handler})
        fresh = {"state": State.PENDING.value, "due": now, "attempts": 0, "interrupted": 0}
        done = await self.ledger.update_many(query, {"$set": fresh}, session=session)
        return done.modified_count

    # -- manifests --------------------------------------------------------------------------

    async def store_manifest(self, digest: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep a manifest's items under its digest, in parts that fit into a document."""
        if await self.manifests.find_one({"_id": {"m": digest, "last": True}}, {"_id": 1}):
            return
        parts = list(_in_parts(rows))
        for number, part in enumerate(parts):
            # The part that is marked last is written last: its presence means all are there.
            last = number == len(parts) - 1
            key: Document = {"m": digest, "last": True} if last else {"m": digest, "part": number}
            document = {"m": digest, "part": number, "items": part}
            await self.manifests.replace_one({"_id": key}, document, upsert=True)
            point("database.manifest.after")

    async def load_manifest(self, digest: str) -> list[Document] | None:
        """Return a manifest's items, or None where it is not, or not wholly, there."""
        found = await self.manifests.find({"m": digest}).sort("part").to_list(None)
        # One that is not as it was written is not there: it is made anew.
        parts = [part for part, _ in self.read(self.manifests, found, part_from)]
        if len(parts) < len(found) or not any(part["_id"].get("last") for part in parts):
            return None
        try:
            # In a thread: the digests of a large run's files would hold up all other calls.
            return await to_thread(carefully, lambda _: items_from(digest, parts), None)
        except Malformed as error:
            for part in parts:
                self._pass_over(self.manifests, part, str(error), _never)
            return None


def part_from(document: Document) -> None:
    """Read a part of a manifest."""
    row = Row.of(document)
    Row.of(document.get("_id"))
    row.whole("part")
    for item in row.many("items"):
        Row.of(item)


def _never(_document: Document) -> None:
    raise Malformed("its items are not those of its digest")


_PART: Final = 8 << 20
"""Bytes of a manifest's items in one document, about; the largest item is about as large."""


def _in_parts(rows: Sequence[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    part: list[Mapping[str, Any]] = []
    size = 0
    for row in rows:
        part.append(row)
        size += 256 + sum(len(value) for value in row.values() if isinstance(value, bytes))
        if size >= _PART:
            yield part
            part, size = [], 0
    yield part


_SITE_FIELDS: Final = dict.fromkeys(
    (
        "epoch",
        "owner",
        "expires",
        "position",
        "scanned",
        "streamed",
        "rules",
        "markers",
        "away",
        "skew",
        "trouble",
        "gaps",
        "requests",
        "watched",
        "configuration",
    ),
    1,
)


def _newest_first(lane: str) -> IndexModel:
    """Return the index in a lane's order; `due` is in it so that what is not due costs no read.

    One for each such lane: the reactions of all others are spared the upkeep.
    """
    keys = [("site", ASCENDING), ("lane", ASCENDING), *URGENT_FIRST, ("due", ASCENDING)]
    only = {"state": State.PENDING.value, "lane": lane}
    return IndexModel(keys, name=f"newest_{lane}", partialFilterExpression=only)


def _upsert(key: Any, change: Document) -> Document:
    return {"q": {"_id": key}, "u": change, "upsert": True}


async def _write_all(collection: Collection, updates: Sequence[Document], session: Session) -> int:
    """Send updates as commands of our own making; returns how many of them found their document.

    pymongo's bulk writes check and wrap each operation; here there are thousands, all our own.
    """
    found = 0
    for start in range(0, len(updates), _AT_ONCE):
        some = updates[start : start + _AT_ONCE]
        command: Document = {"update": collection.name, "updates": some, "ordered": False}
        if session is None:
            command["writeConcern"] = collection.write_concern.document
        reply = await collection.database.command(command, session=session)
        _check_reply(reply)
        found += reply["n"]
    return found


async def _write_each(
    collection: Collection, writes: Sequence[UpdateOne]
) -> tuple[int, dict[int, str]]:
    """Make writes, of which a refused one keeps back no other.

    Returns how many found their document, and why some were refused, by their index.
    """
    if not writes:
        return 0, {}
    try:
        return (await collection.bulk_write(writes, ordered=False)).matched_count, {}
    except BulkWriteError as error:
        refused = error.details["writeErrors"]
        at_fault = all(one["code"] in DOCUMENT_CODES for one in refused)
        if not refused or not at_fault or error.details.get("writeConcernErrors"):
            raise
        for one in refused:
            logger.error("{} refuses a write: {}", collection.name, one["errmsg"])
        return error.details["nMatched"], {one["index"]: one["errmsg"] for one in refused}


def _check_reply(reply: Document) -> None:
    """Raise what pymongo would have raised for a write of its own."""
    for error in reply.get("writeErrors", ())[:1]:
        raise OperationFailure(error.get("errmsg", "a write failed"), error.get("code"))
    concern = reply.get("writeConcernError")
    if concern:  # a majority does not have it yet, and perhaps never will
        raise AutoReconnect(concern.get("errmsg", "a majority did not confirm a write"))


_AT_ONCE: Final = 2000


def _mine(lease: Lease) -> Document:
    return {"_id": lease.site, "epoch": lease.epoch}


def _check(matched: int, lease: Lease) -> None:
    if not matched:
        raise LeaseLost(f"another process has taken over {lease.site}")


def position_fields(position: Position, now: datetime) -> Document:
    """Return what a site's document says about its position."""
    return {"position": _position_row(position), "streamed": now}


def _with_gap(row: Document) -> Document:
    """The site's last gaps with this one, which may be there already: its reply was lost."""
    gaps = {"$cond": [{"$isArray": "$gaps"}, "$gaps", []]}
    more = {"$slice": [{"$concatArrays": [gaps, [row]]}, -GAPS_KEPT]}
    return {"$cond": [{"$in": [row, gaps]}, gaps, more]}


def _position_row(position: Position) -> Document:
    return {"token": position.token, "start": position.start}


def _rows(snapshot: Snapshot) -> list[list[Any]]:
    return [[*aspect, value] for aspect, value in snapshot.items()]


def reaction_document(reaction: Reaction) -> Document:
    """Return an open reaction as the ledger keeps it, without its key."""
    fields: Document = {
        "site": reaction.site,
        "run": reaction.run,
        "aspect": aspect_row(reaction.aspect),
        "handler": reaction.handler,
        "lane": reaction.lane,
        "before": reaction.before,
        "after": reaction.after,
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
        fields["epoch"] = reaction.epoch
    return fields


def _renewal(reaction: Reaction) -> Document:
    fields = ("progress", "started", "hindered", "root")
    return {"$set": reaction_document(reaction), "$unset": dict.fromkeys(fields, "")}


def _settlement(reaction: Reaction) -> Document:
    fields: Document = {
        "state": reaction.state.value,
        "attempts": reaction.attempts,
        # A note may quote a file's name, which need not be valid text.
        "note": reaction.note[:2000].encode(errors="backslashreplace").decode(),
    }
    if reaction.started is not None:
        fields["started"] = reaction.started
    if reaction.state is State.PENDING:
        fields["due"] = reaction.due
    waits = {"hindered": reaction.hindered, "root": reaction.root}
    fields |= {name: value for name, value in waits.items() if value}
    gone = ("epoch", "progress", *(name for name, value in waits.items() if not value))
    return {"$set": fields, "$unset": dict.fromkeys(gone, ""), "$currentDate": {"settled": True}}


_FREED: Final = {"$set": {"state": State.PENDING.value}, "$unset": {"epoch": "", "progress": ""}}


def _interruption(reaction: Reaction, now: datetime) -> Document:
    # A reaction that was renewed while it ran is PENDING already: freeing it is enough.
    if reaction.state is not State.RUNNING:
        return {"$unset": {"epoch": "", "progress": ""}}
    after = interrupt(reaction, now)
    fields = {
        "state": after.state.value,
        "due": after.due,
        "interrupted": after.interrupted,
        "note": after.note,
    }
    return {"$set": fields, "$unset": {"epoch": "", "progress": ""}}


def run_keys(site: str, run: RunId) -> Document:
    """Return the filter for all reactions of one run at one site, served by the _id index."""
    return {"_id": {"$regex": "^" + re.escape(run_prefix(site, run))}}
