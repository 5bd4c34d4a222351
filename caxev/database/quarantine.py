"""Malformed documents: readers skip them, and the site's listener sets them aside.

A person, or a fault, may have changed any document of ours. One that cannot be read must not stop
what is done about the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar

from attrs import define, field, frozen
from bson import ObjectId
from loguru import logger
from pymongo.asynchronous.client_session import AsyncClientSession

from caxev.core.ledger import State, site_prefix
from caxev.core.model import RunId
from caxev.database.client import Document
from caxev.database.connection import LONG_LIMIT, Collection, Connection, operation, within
from caxev.database.rows import Malformed, carefully, is_plain, reaction_from
from caxev.database.writes import AT_ONCE, Lease, guard

T = TypeVar("T")

MALFORMED: Final = "malformed"
ASIDE_KEPT: Final = timedelta(days=7)
"""How long a malformed document is kept, for people: what it was about has fired again."""


@frozen
class Odd:
    """A malformed document that was skipped: its collection, the reason, and its reader."""

    collection: str
    id: Any
    site: str | None
    run: RunId | None
    why: str
    read: Callable[[Document], object] = field(eq=False, repr=False)

    @property
    def key(self) -> tuple[str, str]:
        return self.collection, repr(self.id)


@define(eq=False, slots=False)
class Quarantine(Connection):
    """Reading with care, and setting aside what cannot be read."""

    _odd: dict[tuple[str, str], Odd] = field(init=False, factory=dict)

    @property
    def odd(self) -> list[Odd]:
        """The malformed documents that were skipped, each until it is set aside."""
        return list(self._odd.values())

    def _read(
        self, collection: Collection, documents: Iterable[Document], read: Callable[[Document], T]
    ) -> list[tuple[T, Document]]:
        """Read what documents hold, each with its document; note and skip the malformed ones."""
        found: list[tuple[T, Document]] = []
        for document in documents:
            try:
                found.append((carefully(read, document), document))
            except Malformed as error:
                self._skip(collection, document, str(error), read)
        return found

    def _skip(
        self,
        collection: Collection,
        document: Document,
        why: str,
        read: Callable[[Document], object],
    ) -> None:
        key = document["_id"]
        # Snapshots and alarms have site and run in their keys.
        inner = key if isinstance(key, dict) else {}
        site, run = document.get("site", inner.get("s")), document.get("run", inner.get("r"))
        known_site = site if isinstance(site, str) else None
        odd = Odd(collection.name, key, known_site, run if is_plain(run) else None, why, read)
        if odd.key not in self._odd:
            self._odd[odd.key] = odd
            logger.warning("skipping {} {}: {}", collection.name, str(key)[:300], why)

    @within(LONG_LIMIT)
    async def audit(self, site: str) -> None:
        """Find a site's malformed reactions that no query for due or claimed ones would; see `odd`.

        Reads `AT_ONCE` of them at most.
        """
        types = {"at": "date", "due": "date", "generation": "number", "lane": "string"}
        odd: list[Document] = [{name: {"$not": {"$type": kind}}} for name, kind in types.items()]
        odd += [{"state": {"$nin": [state.value for state in State]}}, {"run": None}]
        odd += [{"site": {"$ne": site}}, {"handler": {"$not": {"$type": "string"}}}]
        odd += [{"epoch": {"$exists": True, "$not": {"$type": "number"}}}]
        odd += [{"epoch": {"$exists": False}, "state": State.RUNNING.value}]
        query = {"_id": {"$regex": "^" + re.escape(site_prefix(site))}, "$or": odd}
        documents = await self._ledger.find(query, {"kept": 0}).limit(AT_ONCE).to_list(None)
        self._read(self._ledger, documents, reaction_from)

    @operation
    async def forget_aside(self, site: str, now: datetime) -> set[tuple[str, str]]:
        """Remove what this site set aside long ago; return `Odd.key` of each document it keeps."""
        mine: Document = {"kind": MALFORMED, "by": site}
        await self._ledger.delete_many({**mine, "at": {"$not": {"$gt": now - ASIDE_KEPT}}})
        rows = await self._ledger.find(mine, {"from": 1, "document._id": 1}).to_list(None)
        return {(str(row.get("from")), repr(row.get("document", {}).get("_id"))) for row in rows}

    async def _move_aside(
        self, lease: Lease, odd: Odd, now: datetime, session: AsyncClientSession
    ) -> None:
        """Move a malformed document out of every query, unless it is readable by now.

        Raises `LeaseLost`.
        """
        collection = self._ledger.database[odd.collection]
        # $eq: the id itself may be an object that reads like an operator.
        this = {"_id": {"$eq": odd.id}}
        document = await collection.find_one(this, session=session)
        if document is None:
            return
        try:
            carefully(odd.read, document)
        except Malformed as error:
            kept = _aside(lease, odd, now, str(error), document)
            await self._ledger.insert_one(kept, session=session)
            await collection.delete_one(this, session=session)
            await guard(self._ledger, lease, session)


def _aside(lease: Lease, odd: Odd, now: datetime, why: str, document: Document) -> Document:
    return {
        # A key of its own: the document's may be what is wrong, and its place is taken again.
        "_id": {MALFORMED: ObjectId()},
        "kind": MALFORMED,
        "from": odd.collection,
        "by": lease.site,
        "at": now,
        "why": why,
        "document": document,
    }
