"""The schema of the ledger: the form of what caxev keeps there, as a number.

Versions of caxev with one schema work on a ledger side by side. One that changes the form so that
another would misread it, or miss what it needs, has the next number, and a step in `STEPS`.
A field that others ignore, and that is read as unset if it is missing, needs neither.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from caxev.database.client import Document, WrongSchema
from caxev.database.connection import LONG_LIMIT, Collection, Connection, operation, within
from caxev.database.sites import ACTIVE, SITE

KIND: Final = "schema"
SCHEMA: Final = 1
"""The schema that this caxev reads and writes."""
KEY: Final[Document] = {KIND: "ledger"}
"""The key of the document that has the number. The first listener of a new ledger makes it."""

Step = Callable[[Collection], Awaitable[None]]
STEPS: Final[Mapping[int, Step]] = {}
"""By schema: what brings a ledger there from the schema before. An asyncio function that may be cut
short, and run again beside another one, and beside listeners of the schema that it makes."""


class Schema(Connection):
    """Refusing a ledger of another schema, and bringing an older one up to date.

    Listeners of two schemas never act at once: each asks for the schema once it has taken a lease,
    and one that migrates asks for the leases once it has noted the schema.
    """

    @operation
    async def check(self) -> None:
        """Raise unless the database can be used, and its ledger is none of a newer caxev."""
        await self._check_server()
        await self._known_schema()

    @within(LONG_LIMIT)
    async def migrate(self) -> None:
        """Bring the ledger to our schema. Raises `WrongSchema` while an older caxev listens."""
        await self._make_schema()
        known = await self._known_schema()
        if known == SCHEMA:
            return
        await self._refuse_older(known)
        await self._note_schema({"$set": {"number": SCHEMA, "from": known}}, {"$lt": SCHEMA})
        await self._refuse_older(known)
        for number in range(known + 1, SCHEMA + 1):
            await STEPS[number](self._ledger)
        await self._note_schema({"$unset": {"from": ""}}, SCHEMA)

    async def _require_schema(self) -> None:
        """Raise `WrongSchema` unless the ledger has ours: it may have changed since the check."""
        await self._make_schema()
        if (known := await self._known_schema()) != SCHEMA:
            raise WrongSchema(
                f"{self._ledger.full_name} has schema {known} now, not {SCHEMA}: start anew"
            )

    async def _known_schema(self) -> int:
        """Return the schema that all of the ledger has. Raises `WrongSchema` if it is newer."""
        found = await self._ledger.find_one({"_id": KEY}) or {"number": SCHEMA}
        number = found.get("number")
        if not isinstance(number, int) or number > SCHEMA:
            raise WrongSchema(
                f"{self._ledger.full_name} has schema {number!r}, and this caxev knows {SCHEMA}: "
                "install the version that the other sites have"
            )
        return int(found.get("from", number))

    async def _refuse_older(self, known: int) -> None:
        older = {"kind": SITE, "$expr": ACTIVE, "schema": {"$not": {"$gte": SCHEMA}}}
        names = [str(one["_id"]) async for one in self._ledger.find(older, {"_id": 1})]
        if names:
            raise WrongSchema(
                f"{self._ledger.full_name} has schema {known}, and this caxev needs {SCHEMA}: "
                f"stop the listener of {', '.join(names)} first, then start it with this version"
            )

    async def _note_schema(self, change: Document, number: object) -> None:
        """Change the document if it has this number."""
        await self._ledger.update_one({"_id": KEY, "number": number}, change)

    async def _make_schema(self) -> None:
        """Note our schema if the ledger has none: it is new, or was dropped."""
        fresh = {"kind": KIND, "number": SCHEMA}
        await self._ledger.update_one({"_id": KEY}, {"$setOnInsert": fresh}, upsert=True)
