"""What an administrator does once: indexes, and the users of sites."""

from __future__ import annotations

from pymongo import ASCENDING, IndexModel

from caxev.core.ledger import NEWEST_FIRST, State
from caxev.database.client import Document
from caxev.database.connection import LONG_LIMIT, Connection, operation, within
from caxev.database.grants import carry_out, commands
from caxev.database.reactions import URGENT_FIRST


class Setup(Connection):
    """Making what the ledger needs. All of it is repeatable."""

    @within(LONG_LIMIT)
    async def create_indexes(self) -> None:
        """Make the ledger's collections and indexes. A site's user gets `NotAuthorized`."""
        await self._ledger.create_indexes(
            [
                # Due reactions: only those that nobody has claimed.
                _index("due", "site", "lane", "due", only={"state": State.PENDING.value}),
                # Claimed reactions, for the next process to interrupt.
                _index("claimed", "site", "epoch", only={"epoch": {"$exists": True}}),
                _index("kind", "kind", only={"kind": {"$exists": True}}),
                _index("failed", "site", "due", only={"state": State.FAILED.value}),
                *map(_newest_first, sorted(NEWEST_FIRST)),
            ]
        )
        await self._requests.create_indexes([IndexModel([("site", ASCENDING)], name="site")])
        await self._manifests.create_indexes([IndexModel([("m", ASCENDING)], name="manifest")])

    @operation
    async def grant(self, user: str, password: str | None, *, x509: bool) -> None:
        """Make a site's user with its role, or bring them up to date; see `grants`."""
        for name, command in commands(self.settings, user, password, x509=x509):
            await carry_out(self._client[name], command)


def _index(name: str, *keys: str, only: Document) -> IndexModel:
    ascending = [(key, ASCENDING) for key in keys]
    return IndexModel(ascending, name=name, partialFilterExpression=only)


def _newest_first(lane: str) -> IndexModel:
    """Return the index in a lane's order; `due` is in it so that what is not due costs no read.

    One for each such lane: the reactions of all others are spared the upkeep.
    """
    keys = [("site", ASCENDING), ("lane", ASCENDING), *URGENT_FIRST, ("due", ASCENDING)]
    only = {"state": State.PENDING.value, "lane": lane}
    return IndexModel(keys, name=f"newest_{lane}", partialFilterExpression=only)
