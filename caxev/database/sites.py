"""What is known of each site: its position in the stream, scans, directories and rule files."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Final

from attrs import fields
from bson.timestamp import Timestamp

from caxev.core.model import NO_FIELDS, Watched
from caxev.database.client import Document
from caxev.database.connection import Connection, operation
from caxev.database.site_record import Gap, Position, SiteRecord, with_gap
from caxev.database.writes import Lease, guard, lease_lost
from caxev.failpoints import point

SITE: Final = "site"
_SHOWN: Final = dict.fromkeys((one.name for one in fields(SiteRecord)), 1)

LONGEST_LEASE: Final = 86400.0
"""Seconds for which a lease is believed that does not say how long it is."""
_LENGTH: Final = {
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


def number(name: str) -> Document:
    """Return an expression for a field's value, or 0 if it is no number."""
    return {"$cond": [{"$isNumber": f"${name}"}, f"${name}", 0]}


class Sites(Connection):
    """The sites' own documents. What a listener writes needs its lease."""

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
        shown = {**_SHOWN, "active": ACTIVE}
        cursor = self._ledger.find({"kind": SITE, **query}, shown).sort("_id")
        return [SiteRecord.from_document(document) async for document in cursor]

    async def _register(self, site: str) -> None:
        """Make the site's document if there is none."""
        fresh = {"epoch": 0, "kind": SITE}
        await self._ledger.update_one({"_id": site}, {"$setOnInsert": fresh}, upsert=True)

    @operation
    async def save_position(self, lease: Lease, position: Position, now: datetime) -> None:
        """Save an idle stream's position. Raises `LeaseLost`."""
        await guard(self._ledger, lease, fields={"position": position.row, "streamed": now})
        point("database.position.after")

    @operation
    async def finish_scan(
        self,
        lease: Lease,
        start: Timestamp | None,
        now: datetime,
        gap: Gap | None,
        watched: Watched = NO_FIELDS,
    ) -> None:
        """Note a completed scan, which covered the fields that are `watched`.

        From now on the stream goes on at `start`, if given; `gap` is what the scan made up for.
        Raises `LeaseLost`.
        """
        seen = {"run": sorted(watched.run), "copies": sorted(watched.copies)}
        values: Document = {"scanned": now, "watched": seen}
        if start is not None:
            values["position"] = Position(start=start).row
        change: Document = {name: {"$literal": value} for name, value in values.items()}
        if gap is not None:
            change["gaps"] = with_gap(gap)
        point("database.scanned.before")
        done = await self._ledger.update_one(lease.held, [{"$set": change}])
        point("database.scanned.after")
        if not done.matched_count:
            raise lease_lost(lease.site)

    @operation
    async def rules_applied(self, lease: Lease, digests: Mapping[str, str]) -> None:
        """Note the digests of the applied rule files, by catalogue. Raises `LeaseLost`."""
        rows = [{"catalogue": name, "digest": digest} for name, digest in digests.items()]
        await guard(self._ledger, lease, fields={"rules": rows})

    @operation
    async def note_marker(self, site: str, root: str, marker: str) -> None:
        """Note the id of the marker of a site's directory, in place of any other."""
        await self._register(site)
        others = {
            "$filter": {
                "input": {"$cond": [{"$isArray": "$markers"}, "$markers", []]},
                "cond": {"$ne": ["$$this.root", {"$literal": root}]},
            }
        }
        row = {"root": {"$literal": root}, "id": {"$literal": marker}}
        change = {"$set": {"markers": {"$concatArrays": [others, [row]]}}}
        await self._ledger.update_one({"_id": site}, [change])

    @operation
    async def note_away(self, lease: Lease, away: Mapping[str, str]) -> None:
        """Note which directories of the site are missing, and why. Raises `LeaseLost`."""
        rows = [{"root": root, "why": why} for root, why in away.items()]
        await guard(self._ledger, lease, fields={"away": rows})
