"""The document of each site: its position in the stream, scans, directories and rule files.

A site has a document in the ledger, whose key is its name. Its listener writes the fields again, so
one that is malformed is read as if it were missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, Final, TypeVar

from attrs import asdict, field, fields, frozen
from bson.timestamp import Timestamp
from loguru import logger

from caxev.core.model import NO_FIELDS, RunId, Watched
from caxev.database.client import Document
from caxev.database.connection import Connection, operation
from caxev.database.rows import Malformed, Row, carefully, is_plain, texts
from caxev.database.writes import Lease, guard

T = TypeVar("T")

GAPS_KEPT: Final = 20
SETS_KEPT: Final = 50
SITE: Final = "site"
LONGEST_LEASE: Final = 86400.0
"""Seconds for which a lease without a usable length is believed."""


@frozen
class Position:
    """A place in the change stream: after a token or, before there is one, at a time."""

    token: Mapping[str, Any] | None = None
    start: Timestamp | None = None

    @property
    def row(self) -> Document:
        """Return the position as the site's document has it."""
        return {"token": self.token, "start": self.start}


@frozen
class Gap:
    """A part of the history that the stream could not give; a scan made up for it."""

    found: datetime
    why: str


@frozen
class Scanning:
    """A scan of all runs that is not complete.

    It continues with the runs before this one, which are older; None: with the newest.
    `runs`: how many it has compared so far.
    """

    before: RunId | None = None
    runs: int = 0


@frozen
class Disk:
    """A file system of a site, by a directory on it: how many bytes are free, and fit at all."""

    root: str
    free: int
    size: int


@frozen
class SiteRecord:
    """A site's document. `expires`: when the lease lapses unless renewed, UTC.

    `rules` are the digests of the rule files that were applied last, by catalogue;
    `configuration` is the digest of the owner's sites.json. `markers` are the markers of its
    directories, by their paths, each as `Root` takes it; `away`, why some of these were missing
    when its listener last checked; `disks`, those that were there, a minute old at most.
    `requests`: whether people's requests wait, and `helped`, whether there are helpers, as its
    listener finds by renewing the lease. `skew`: how many seconds the listener's clock is ahead of
    the database's.
    """

    site: str
    epoch: int
    owner: str | None
    active: bool
    expires: datetime | None
    position: Position | None
    scanned: datetime | None
    scanning: Scanning | None
    streamed: datetime | None
    trouble: str | None
    gaps: tuple[Gap, ...]
    requests: bool
    watched: Watched = NO_FIELDS
    rules: Mapping[str, str] = field(factory=dict)
    configuration: str = ""
    markers: Mapping[str, str] = field(factory=dict)
    away: Mapping[str, str] = field(factory=dict)
    disks: tuple[Disk, ...] = ()
    skew: float | None = None
    helped: bool = False

    @classmethod
    def from_document(cls, document: Document) -> SiteRecord:
        """Return the record; `active` must have been computed by the server's clock."""
        row = Row.of(document)
        site = str(document["_id"])

        # Field by field: a malformed one must not hide the others, nor keep a listener from acting.
        def lenient(read: Callable[..., T], *args: Any, default: T) -> T:
            try:
                return carefully(lambda _: read(*args), None)
            except Malformed as error:
                _warn_once(f"the record of site {site} is malformed: {error}")
                return default

        return cls(
            site=site,
            epoch=lenient(row.whole, "epoch", 0, default=0),
            owner=lenient(row.text, "owner", None, default=None),
            active=bool(document.get("active")),
            expires=lenient(row.moment, "expires", None, default=None),
            position=lenient(_position_from, document.get("position"), default=None),
            scanned=lenient(row.moment, "scanned", None, default=None),
            scanning=_scanning_from(document.get("scanning")),
            streamed=lenient(row.moment, "streamed", None, default=None),
            trouble=lenient(row.text, "trouble", None, default=None),
            gaps=lenient(_gaps_from, row, default=()),
            requests=document.get("requests") is True,
            watched=lenient(_watched_from, document.get("watched"), default=NO_FIELDS),
            rules=lenient(_pairs_from, row, "rules", "catalogue", "digest", default={}),
            configuration=lenient(row.text, "configuration", "", default=""),
            markers=lenient(_markers_from, row, default={}),
            away=lenient(_pairs_from, row, "away", "root", "why", default={}),
            disks=lenient(_disks_from, row, default=()),
            skew=skew if isinstance(skew := document.get("skew"), float) else None,
        )


SHOWN_OF_SITES: Final = dict.fromkeys((one.name for one in fields(SiteRecord)), 1)
"""The fields of a site's document that a `SiteRecord` is made of."""


def _position_from(value: object) -> Position | None:
    if not value:
        return None
    row = Row.of(value).document
    token, start = row.get("token"), row.get("start")
    if not isinstance(token, Mapping | None) or not isinstance(start, Timestamp | None):
        raise Malformed("position is neither a token nor a timestamp")
    return None if token is None and start is None else Position(token, start)


def _scanning_from(value: object) -> Scanning | None:
    if value is None:
        return None
    # A scan was begun, even if this cannot be read. Beginning again is always correct.
    row: Mapping[str, Any] = value if isinstance(value, Mapping) else {}
    before, runs = row.get("before"), row.get("runs")
    if before is None or not is_plain(before):
        return Scanning()
    return Scanning(before, runs if isinstance(runs, int) else 0)


def _gaps_from(row: Row) -> tuple[Gap, ...]:
    rows = [Row.of(gap) for gap in row.many("gaps", [])]
    return tuple(Gap(gap.moment("found"), gap.text("why")) for gap in rows)


def _watched_from(value: object) -> Watched:
    if value is None:
        return NO_FIELDS
    row = Row.of(value)
    return Watched(frozenset(texts(row.many("run", []))), frozenset(texts(row.many("copies", []))))


def _pairs_from(row: Row, name: str, key: str, value: str) -> dict[str, str]:
    return {one.text(key): one.text(value) for one in map(Row.of, row.many(name, []))}


def _markers_from(row: Row) -> dict[str, str]:
    # A disk in a field of its own: an older version reads the id alone.
    noted = _pairs_from(row, "markers", "root", "id")
    for one in map(Row.of, row.many("markers", [])):
        if disk := one.text("disk", ""):
            noted[one.text("root")] += f"/{disk}"
    return noted


def _disks_from(row: Row) -> tuple[Disk, ...]:
    rows = map(Row.of, row.many("disks", []))
    return tuple(Disk(one.text("root"), one.whole("free"), one.whole("size")) for one in rows)


@cache
def _warn_once(message: str) -> None:
    logger.warning("{}", message)


def number(
    name: str, least: float = float("-inf"), most: float = float("inf"), other: float = 0
) -> Document:
    """Return an expression for a field's number if it has one within these bounds, else `other`."""
    value = f"${name}"
    # NaN compares as less than any number.
    fits = [{"$isNumber": value}, {"$gte": [value, least]}, {"$lte": [value, most]}]
    return {"$cond": [{"$and": fits}, value, other]}


_LENGTH: Final = number("lease", 0, LONGEST_LEASE, LONGEST_LEASE)
ACTIVE: Final = {
    "$and": [
        {"$eq": [{"$type": "$expires"}, "date"]},
        {"$gt": ["$expires", "$$NOW"]},
        # A lease that ends later than any renewal sets was written while the server's clock was
        # ahead, or by hand: it keeps nobody out.
        {"$lte": ["$expires", {"$add": ["$$NOW", {"$multiply": [2000, _LENGTH]}]}]},
    ]
}
"""Whether a site's lease is valid, by the server's clock."""


class Sites(Connection):
    """The sites' own documents. A listener writes them only with its lease."""

    @operation
    async def site_records(self) -> list[SiteRecord]:
        """Read the records of all sites that ever listened."""
        return await self._site_records({})

    @operation
    async def site_record(self, site: str) -> SiteRecord | None:
        """Read the record of one site."""
        records = await self._site_records({"_id": site})
        return records[0] if records else None

    async def _site_records(self, query: Document) -> list[SiteRecord]:
        shown = {**SHOWN_OF_SITES, "active": ACTIVE}
        cursor = self._ledger.find({"kind": SITE, **query}, shown).sort("_id")
        return [SiteRecord.from_document(document) async for document in cursor]

    async def _register(self, site: str) -> None:
        """Make the site's document if there is none."""
        fresh = {"epoch": 0, "kind": SITE}
        await self._ledger.update_one({"_id": site}, {"$setOnInsert": fresh}, upsert=True)

    @operation
    async def save_position(self, lease: Lease, position: Position, now: datetime) -> None:
        """Save an idle stream's position. Raises `LeaseLost`."""
        await self._set(lease, position=position.row, streamed=now)

    async def _set(self, lease: Lease, **fields: Any) -> None:
        await guard(self._ledger, lease, change={"$set": fields})

    @operation
    async def begin_scan(self, lease: Lease, start: Timestamp | None, gap: Gap | None) -> None:
        """Note that a scan of all runs begins, from the newest one on.

        If `start` is given, the stream continues there, so it brings what changes during the scan.
        `gap` is the lost history that the scan makes up for. Raises `LeaseLost`.
        """
        change: Document = {"scanning": {"$literal": {}}}
        if start is not None:
            change["position"] = {"$literal": Position(start=start).row}
        if gap is not None:
            change["gaps"] = _with_gap(gap)
        await guard(self._ledger, lease, change=[{"$set": change}])

    @operation
    async def note_scanned(self, lease: Lease, scanning: Scanning) -> None:
        """Note the position of a scan, so that it continues there. Raises `LeaseLost`."""
        await self._set(lease, scanning=asdict(scanning, recurse=False))

    @operation
    async def finish_scan(self, lease: Lease, now: datetime, watched: Watched = NO_FIELDS) -> None:
        """Note a completed scan, which covered the `watched` fields. Raises `LeaseLost`."""
        seen = {"run": sorted(watched.run), "copies": sorted(watched.copies)}
        change = {"$set": {"scanned": now, "watched": seen}, "$unset": {"scanning": ""}}
        await guard(self._ledger, lease, change=change)

    @operation
    async def rules_applied(self, lease: Lease, digests: Mapping[str, str]) -> None:
        """Note the digests of the applied rule files, by catalogue. Raises `LeaseLost`."""
        rows = [{"catalogue": name, "digest": digest} for name, digest in digests.items()]
        await self._set(lease, rules=rows)

    @operation
    async def note_handlers(self, lease: Lease, number: int, names: Sequence[str]) -> None:
        """Note which handlers a set has, by the id that snapshots name. Raises `LeaseLost`."""
        known = await self._handler_sets(lease.site)
        # Taken out first: the set in use is then the last, and the last to be forgotten.
        known.pop(number, None)
        known[number] = frozenset(names)
        sets = [{"id": one, "names": sorted(those)} for one, those in known.items()]
        await self._set(lease, handlers=sets[-SETS_KEPT:])

    async def _handler_sets(self, site: str) -> dict[Any, frozenset[str]]:
        """Return the sets of handlers that a site's snapshots were taken for, by their ids."""
        found = await self._ledger.find_one({"_id": site}, {"handlers": 1}) or {}
        try:
            rows = [Row.of(one) for one in Row.of(found).many("handlers", [])]
            return {one.whole("id"): frozenset(texts(one.many("names"))) for one in rows}
        except Malformed as error:  # then a replay runs all handlers, as if they had seen nothing
            _warn_once(f"the sets of handlers of {site} are malformed: {error}")
            return {}

    @operation
    async def note_marker(self, site: str, root: str, marker: str, disk: str | None = None) -> None:
        """Note the marker of a site's directory, in place of any other.

        `disk` is the UUID of the file system that it is on, if it has one.
        """
        await self._register(site)
        others = {
            "$filter": {
                "input": {"$cond": [{"$isArray": "$markers"}, "$markers", []]},
                "cond": {"$ne": ["$$this.root", {"$literal": root}]},
            }
        }
        named = {"root": root, "id": marker} | ({} if disk is None else {"disk": disk})
        # Literal: in a pipeline a text that begins with `$` names a field.
        row = {key: {"$literal": value} for key, value in named.items()}
        change = {"$set": {"markers": {"$concatArrays": [others, [row]]}}}
        await self._ledger.update_one({"_id": site}, [change])

    @operation
    async def note_away(self, lease: Lease, away: Mapping[str, str]) -> None:
        """Note which directories of the site are missing, and why. Raises `LeaseLost`."""
        rows = [{"root": root, "why": why} for root, why in away.items()]
        await self._set(lease, away=rows)

    @operation
    async def note_disks(self, lease: Lease, disks: Sequence[Disk]) -> None:
        """Note how full the disks of the site are. Raises `LeaseLost`."""
        await self._set(lease, disks=[asdict(one) for one in disks])


def _with_gap(gap: Gap) -> Document:
    """Return an expression for the site's last gaps with this one, once.

    It may be there already, if the reply to an earlier attempt was lost.
    """
    row = {"$literal": {"found": gap.found, "why": gap.why}}
    gaps = {"$cond": [{"$isArray": "$gaps"}, "$gaps", []]}
    more = {"$slice": [{"$concatArrays": [gaps, [row]]}, -GAPS_KEPT]}
    return {"$cond": [{"$in": [row, gaps]}, gaps, more]}
