"""What an administrator does once: making indexes, and the users of sites with their rights.

MongoDB gives rights to collections, not to documents: a site may change any run and any site's
reactions, but can neither add nor delete runs, nor touch another database or another user.
`caxev db grants` shows the rights and makes the user.
"""

from __future__ import annotations

from typing import Any, Final

from pymongo import ASCENDING, IndexModel
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import OperationFailure

from caxev.config import Settings
from caxev.core.ledger import NEWEST_FIRST, State
from caxev.database.client import Document
from caxev.database.connection import LONG_LIMIT, Connection, operation, within
from caxev.database.reactions import URGENT_FIRST

OWN: Final = ("ledger", "requests", "manifests")
"""Collections that the sites keep for themselves."""
EXTERNAL: Final = "$external"
_EXISTS: Final = {51002, 51003}  # of a role, of a user


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
        """Make a site's user with its role, or bring them up to date."""
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


def role_name(settings: Settings) -> str:
    """Return the name of the role that every site's user has."""
    return f"{settings.prefix}site"


def privileges(settings: Settings) -> list[Document]:
    """Return what the role allows, as MongoDB's createRole takes it. Pure.

    Reading and following are for the whole database: a run and its reactions are followed together,
    by one stream.
    """

    def on(collection: str, *actions: str) -> Document:
        return {
            "resource": {"db": settings.database, "collection": collection},
            "actions": list(actions),
        }

    return [
        on("", "find", "changeStream"),
        on(settings.collection, "update"),
        *(on(f"{settings.prefix}{name}", "insert", "update", "remove") for name in OWN),
    ]


def commands(
    settings: Settings, user: str, password: str | None, *, x509: bool
) -> list[tuple[str, Document]]:
    """Return the database commands that make role and user, each with its database. Pure.

    `user` is a name, or with `x509` a certificate's subject, which needs no password.
    """
    roles = [{"role": role_name(settings), "db": "admin"}]
    login: Document = {} if x509 else {"pwd": password}
    # The role comes first: a user cannot have one that does not exist.
    return [
        (
            "admin",
            {"createRole": role_name(settings), "privileges": privileges(settings), "roles": []},
        ),
        (EXTERNAL if x509 else "admin", {"createUser": user, **login, "roles": roles}),
    ]


async def carry_out(database: AsyncDatabase[Document], command: Document) -> None:
    """Create a role or a user, or bring the one that is there up to date. An asyncio function."""
    try:
        await database.command(command)
    except OperationFailure as error:
        if error.code not in _EXISTS:
            raise
        await database.command(updating(command))


def updating(command: Document) -> Document:
    """Return the command that changes what is there to what this one would have made. Pure."""
    (verb, name), *rest = command.items()
    return {verb.replace("create", "update"): name, **dict[str, Any](rest)}
