"""An administrator's work, to do once: making indexes, and the users of sites and people.

MongoDB gives rights to collections, not to documents: a site may change any run and any site's
reactions, but can neither add nor delete runs, nor touch another database or another user. A
person who is a reader may look at all of it, an operator also write what commands request.
`caxev db grants` shows the rights and makes the user. Indexes need rights of their own, which an
administrator has, or a user with `init_role`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from attrs import frozen
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import OperationFailure

from caxev.config import Settings
from caxev.database import indexes
from caxev.database.client import Document
from caxev.database.connection import LONG_LIMIT, Collection, Connection, operation, within
from caxev.database.indexes import Index

HISTORY: Final = "history"
OWN: Final = ("ledger", "requests", "manifests", HISTORY)
"""Collections that the sites keep for themselves."""
EXTERNAL: Final = "$external"
_EXISTS: Final = {51002, 51003}  # of a role, of a user
_REFUSED: Final = {85, 86, 171}
"""Another index has the name, or other options; a document with lists at two keys has no place."""


@frozen
class Standing:
    """An index and its state: ``made``, ``there``, ``would be made``, or why it is refused."""

    collection: str
    index: Index
    state: str
    refused: bool = False


class Setup(Connection):
    """Making what the ledger and the queries need. All of it is repeatable."""

    @property
    def _ours(self) -> list[tuple[Collection, tuple[Index, ...]]]:
        return [
            (self._ledger, indexes.LEDGER),
            (self._requests, indexes.REQUESTS),
            (self._manifests, indexes.MANIFESTS),
            (self._history, indexes.HISTORY),
        ]

    @within(LONG_LIMIT)
    async def create_indexes(self) -> None:
        """Make the ledger's collections and indexes. A site's user gets `NotAuthorized`."""
        for collection, wanted in self._ours:
            await collection.create_indexes([index.model for index in wanted])

    @within(LONG_LIMIT)
    async def init(self, *, dry_run: bool = False) -> list[Standing]:
        """Make all indexes, those of the runs, too; return each. Raises `NotAuthorized`.

        One that the server refuses, as for a document that cannot be in it, keeps no other away.
        """
        found = []
        for collection, wanted in [(self._runs, indexes.RUNS), *self._ours]:
            there = await (await collection.list_indexes()).to_list(None)
            found += [await _made(collection, one, there, dry_run=dry_run) for one in wanted]
        return found

    @operation
    async def grant(self, user: str, password: str | None, role: Role, *, x509: bool) -> None:
        """Make a user with a role, or bring them up to date."""
        for name, command in commands(role, user, password, x509=x509):
            await carry_out(self._client[name], command)


async def _made(
    collection: Collection, index: Index, there: Sequence[Mapping[str, Any]], *, dry_run: bool
) -> Standing:
    same = next((one["name"] for one in there if index.is_like(one)), None)
    if same is not None:
        return Standing(collection.name, index, "there" if same == index.name else f"there: {same}")
    if dry_run:
        return Standing(collection.name, index, "would be made")
    try:
        await collection.create_indexes([index.model])
    except OperationFailure as error:
        if error.code not in _REFUSED:
            raise
        why = (error.details or {}).get("errmsg", error)
        return Standing(collection.name, index, f"refused: {why}", refused=True)
    return Standing(collection.name, index, "made")


@frozen
class Role:
    """A role: its name and what it allows, as MongoDB's createRole takes it."""

    name: str
    privileges: list[Document]


def site_role(settings: Settings) -> Role:
    """Return the role that every site's user has.

    Reading and following are for the whole database: a run and its reactions are followed together,
    by one stream.
    """
    own = (f"{settings.prefix}{name}" for name in OWN if name != HISTORY)
    allowed = [
        _looking(settings),
        _on(settings, settings.collection, "update"),
        *(_on(settings, name, "insert", "update", "remove", "collStats") for name in own),
        # The history is only ever added to.
        _on(settings, f"{settings.prefix}{HISTORY}", "insert", "collStats"),
    ]
    return Role(f"{settings.prefix}site", allowed)


def init_role(settings: Settings) -> Role:
    """Return the role that suffices for `caxev db init`. It reads no run but to connect."""
    own = [f"{settings.prefix}{name}" for name in OWN]
    allowed = [
        _on(settings, settings.collection, "find", "listIndexes", "createIndex"),
        _on(settings, f"{settings.prefix}ledger", "find"),
        *(_on(settings, name, "createCollection", "listIndexes", "createIndex") for name in own),
    ]
    return Role(f"{settings.prefix}init", allowed)


def reader_role(settings: Settings) -> Role:
    """Return the role of people who may look: it reads and follows the database, and no more."""
    return Role(f"{settings.prefix}reader", [_looking(settings)])


def operator_role(settings: Settings) -> Role:
    """Return the role of people who may ask: a reader's rights, and what requests write.

    They can take a request back, which changes it, but write nothing of what listeners keep.
    """
    asking = [
        _on(settings, settings.collection, "update"),
        _on(settings, f"{settings.prefix}requests", "insert", "update"),
        _on(settings, f"{settings.prefix}{HISTORY}", "insert"),
    ]
    return Role(f"{settings.prefix}operator", [_looking(settings), *asking])


def _looking(settings: Settings) -> Document:
    return _on(settings, "", "find", "changeStream")


def _on(settings: Settings, collection: str, *actions: str) -> Document:
    where = {"db": settings.database, "collection": collection}
    return {"resource": where, "actions": list(actions)}


def commands(
    role: Role, user: str, password: str | None, *, x509: bool
) -> list[tuple[str, Document]]:
    """Return the database commands that make role and user, each with its database. Pure.

    `user` is a name, or with `x509` a certificate's subject, which needs no password.
    """
    roles = [{"role": role.name, "db": "admin"}]
    login: Document = {} if x509 else {"pwd": password}
    # The role comes first: a user cannot have one that does not exist.
    return [
        ("admin", {"createRole": role.name, "privileges": role.privileges, "roles": []}),
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
