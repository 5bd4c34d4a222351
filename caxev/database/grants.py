"""What a site's user of the database may do, and no more. `caxev db grants` shows and makes it.

MongoDB gives rights to collections, not to documents: a site may change any run and any site's
reactions, but can neither add nor delete runs, nor touch another database or another user.
"""

from __future__ import annotations

from typing import Any, Final

from pymongo.asynchronous.database import AsyncDatabase
from pymongo.errors import OperationFailure

from caxev.config import Settings
from caxev.database.client import Document

OWN: Final = ("ledger", "requests", "manifests")
"""Collections that the sites keep for themselves."""
EXTERNAL: Final = "$external"
_EXISTS: Final = {51002, 51003}  # of a role, of a user


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
