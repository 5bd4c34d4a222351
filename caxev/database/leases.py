"""Leader election: at most one process acts for a site, the one that holds its lease.

A process takes a lapsed lease by writing a new epoch. Every write of the former process has the
old epoch in its filter, so from then on it changes nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from attrs import evolve
from pymongo import ReturnDocument, UpdateOne
from pymongo.errors import OperationFailure

from caxev.core.clock import clock
from caxev.core.ledger import Reaction, State, interrupt
from caxev.database import schema
from caxev.database.client import AUTH_CODES, DOCUMENT_CODES, Document
from caxev.database.connection import WRITES_LIMIT, operation, within
from caxev.database.history import History
from caxev.database.reactions import Reactions
from caxev.database.schema import Schema
from caxev.database.sites import ACTIVE, SITE, SiteRecord, Sites, number
from caxev.database.writes import GIVEN_BACK, HELPER, VOID, Lease, lost, write_each
from caxev.failpoints import point

SHORTEST_LIMIT: Final = 2.0
"""Seconds that renewing a lease gets at least."""
_EPOCHS: Final = 2**22
"""Epochs are below this: they are the upper part of a generation, which has 63 bits."""
_GENERATIONS: Final = ((_EPOCHS - 1) << 40) - 1
"""No generation is above this: the epoch after it must be one, too."""
_EPOCH: Final = {"$toLong": {"$floor": number("epoch", 0, _EPOCHS - 1)}}


class Leases(Sites, Reactions, History, Schema):
    """Taking, renewing and releasing the lease of a site."""

    @within(WRITES_LIMIT)
    async def acquire(
        self, site: str, owner: str, lease_time: float, now: datetime, configuration: str = ""
    ) -> tuple[Lease, int] | None:
        """Take the site over if nobody holds it; return our lease and how many claims we opened.

        `configuration` is the digest of our sites.json: others compare it with theirs.

        Returns None while another process's lease is valid. From the new epoch on the former
        process can begin nothing, and once its claims are opened it can settle nothing. Raises
        `WrongSchema`.
        """
        # A new site has no document yet, and nothing below makes one.
        await self._register(site)
        asked = time.monotonic()
        former = await self._predecessor(site)
        if former is None:
            return None  # the document was dropped just now
        self._note_time(former["now"], asked)
        if former["active"]:
            return None
        await self._end_session(former.get("lsid"))
        self._session = self._client.start_session()
        # No transaction: if we were killed in one, it would lock the site's document for a minute,
        # and the next process could not know whose session it has to end.
        state = {
            "owner": owner,
            "lsid": self._session.session_id,
            "configuration": configuration,
            "schema": schema.SCHEMA,
        }
        least = await self._least_epoch(site, former.get("epoch"))
        epoch = await self._take_over(site, lease_time, state, least)
        if epoch is None:
            return None
        point("database.takeover.epoch")
        await self._require_schema()
        # A helper gives back by itself what it claims from now on. It may still run earlier claims:
        # `reopen_claims` opens these once its lease has lapsed.
        await self._void_helpers(site)
        former_claims = {"site": site, "epoch": {"$lt": epoch}, "helper": None}
        claims = await self._interrupt(former_claims, now)
        point("database.takeover.claims")
        return Lease(site, epoch, owner), claims

    async def _predecessor(self, site: str) -> Document | None:
        """Return the site's `lsid`, `epoch`, whether the lease is `active`, and the time `now`."""
        shown = {"lsid": 1, "epoch": 1, "active": ACTIVE, "now": "$$NOW"}
        return await self._ledger.find_one({"_id": site}, shown)

    async def _end_session(self, lsid: Any) -> None:
        # A process that was killed inside a transaction leaves it open for a minute, and its
        # locks with it. Ending one's own user's sessions needs no right.
        if not isinstance(lsid, Mapping) or not isinstance(lsid.get("id"), bytes | UUID):
            return
        try:
            await self._client.admin.command({"killSessions": [{"id": lsid["id"]}]})
        except OperationFailure as error:
            if error.code not in AUTH_CODES | DOCUMENT_CODES:
                raise

    async def _least_epoch(self, site: str, known: object) -> int:
        """Return an epoch that none of the site's was above; its document says `known`."""
        # A ledger that was restored from a back-up is older than the history: a generation that
        # was used before would have a row there already.
        least = await self._last_generation(site, _GENERATIONS) >> 40
        if not _is_epoch(known):  # its document was lost
            least = max(least, await self._last_epoch(site))
        return min(least, _EPOCHS - 2)

    async def _last_epoch(self, site: str) -> int:
        """Return an epoch that none of the site's generations and claims is above."""
        top = {"$max": {"$toLong": number("generation", 0, _GENERATIONS)}}
        claimed = {"$max": {"$toLong": number("epoch", 0, _EPOCHS - 2)}}
        match = {"$match": {"site": site, "handler": {"$exists": True}}}
        group = {"$group": {"_id": None, "generation": top, "epoch": claimed}}
        cursor = await self._ledger.aggregate([match, group])
        for row in await cursor.to_list(None):
            # A generation is an epoch followed by a count of 40 bits.
            return max(int(row["generation"]) >> 40, int(row["epoch"]))
        return 0

    async def _take_over(
        self, site: str, lease_time: float, state: Document, least: int
    ) -> int | None:
        """Take a lapsed lease: the new epoch, above `least`; None if it has not lapsed."""
        change = {
            "epoch": {"$add": [{"$max": [_EPOCH, least]}, 1]},
            "kind": SITE,
            **prolonged(lease_time, state),
        }
        # The condition once more, in the write: of two stand-bys that came this far, one wins.
        document = await self._ledger.find_one_and_update(
            {"_id": site, "$expr": {"$not": [ACTIVE]}},
            [{"$set": change}],
            return_document=ReturnDocument.AFTER,
        )
        return None if document is None else int(document["epoch"])

    async def _void_helpers(self, site: str) -> None:
        """Have the helpers of a site end: none can claim anything, or renew its lease."""
        admitted = {"kind": HELPER, "_id.s": site, "epoch": {"$gt": VOID}}
        await self._ledger.update_many(admitted, {"$set": {"epoch": VOID}})

    async def _interrupt(self, claimed: Document, now: datetime) -> int:
        """Open the claims that this filter finds; return how many there were.

        A claim that the ledger refuses to change stays among the site's `claims`.
        """
        found = await self._documented(self._ledger.find(claimed, {"kept": 0}))
        writes = [
            # The epoch: what its process settles meanwhile, if it still lives, stays settled.
            UpdateOne(
                {"_id": reaction.id, "epoch": reaction.epoch, "helper": document.get("helper")},
                _interruption(reaction, now),
            )
            for reaction, document in found
        ]
        await write_each(self._ledger, writes)
        return len(found)

    @operation
    async def renew(
        self, lease: Lease, lease_time: float, trouble: str | None, configuration: str = ""
    ) -> SiteRecord:
        """Prolong the lease, and record what troubles us. Raises `LeaseLost`.

        `configuration` is the digest of our sites.json, if it may have changed.
        """
        asked = time.monotonic()
        state: Document = {"trouble": trouble, "skew": round(clock.skew, 3)}
        if self._session is not None:
            state["lsid"] = self._session.session_id
        if configuration:
            state["configuration"] = configuration
        # Late is as bad as never: another attempt must fit before the lease lapses.
        async with asyncio.timeout(max(lease_time / 3, SHORTEST_LIMIT)):
            document = await self._ledger.find_one_and_update(
                lease.held,
                [{"$set": prolonged(lease_time, state)}],
                return_document=ReturnDocument.AFTER,
            )
            if document is None:
                raise lost(lease)
            record = SiteRecord.from_document({**document, "active": True})
            assert record.expires is not None
            self._note_time(record.expires - timedelta(seconds=lease_time), asked)
            waits = await self._requests.find_one({"site": lease.site}, {"_id": 1})
            helped = await self._ledger.find_one({"kind": HELPER, "_id.s": lease.site}, {"_id": 1})
        return evolve(record, requests=waits is not None, helped=helped is not None)

    @operation
    async def release(self, lease: Lease) -> None:
        """End the lease now, so that a stand-by need not wait for it to lapse."""
        # Only our own: if another process has taken over, its lease must stay.
        await self._ledger.update_one(lease.held, [{"$set": {"expires": "$$NOW"}}])

    @operation
    async def release_of_dead(self, site: str) -> None:
        """End the lease of a process that is known to be dead, with what it left open."""
        former = await self._predecessor(site)
        if former is not None:
            # First: a transaction that it was killed in may hold the site's document locked.
            await self._end_session(former.get("lsid"))
            await self._ledger.update_one({"_id": site}, [{"$set": {"expires": "$$NOW"}}])


def prolonged(lease_time: float, state: Document) -> Document:
    """Return the fields of a lease that is taken or renewed now, as a stage of a pipeline."""
    return {
        "expires": {"$add": ["$$NOW", lease_time * 1000]},
        "lease": lease_time,
        **{name: {"$literal": value} for name, value in state.items()},
    }


def _is_epoch(value: object) -> bool:
    # A bool is an int to Python.
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < _EPOCHS


def _interruption(reaction: Reaction, now: datetime) -> Document:
    # A reaction that was renewed while it ran is PENDING already: freeing it is enough.
    if reaction.state is not State.RUNNING:
        return {"$unset": GIVEN_BACK}
    after = interrupt(reaction, now)
    fields = {
        "state": after.state.value,
        "due": after.due,
        "interrupted": after.interrupted,
        "note": after.note,
    }
    return {"$set": fields, "$unset": GIVEN_BACK}
