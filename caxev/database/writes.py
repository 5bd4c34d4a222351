"""How the ledger is written: many documents at once, and only while a lease is held.

Every write has the epoch of its process in a filter, so a process that lost its lease records
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, Final
from uuid import uuid4

from attrs import frozen
from loguru import logger
from pymongo import UpdateOne
from pymongo.errors import AutoReconnect, BulkWriteError, OperationFailure

from caxev.database.client import DOCUMENT_CODES, Document, LeaseLost, writing_lease
from caxev.database.connection import Collection, Session

AT_ONCE: Final = 2000
"""Documents that one command reads or writes at most."""


@frozen
class Lease:
    """A process's hold on a site. Its writes count while its document has this epoch.

    The leader's document is the site's. A helper, which claims reactions beside the leader, has one
    of its own (`helpers`), and the leader's epoch; `helper` is its name, which is used only once.
    """

    site: str
    epoch: int
    owner: str
    helper: str | None = None

    @property
    def held(self) -> Document:
        """Return the filter that finds the lease's document while it is held."""
        key = self.site if self.helper is None else helper_id(self.site, self.helper)
        return {"_id": key, "epoch": self.epoch}

    @property
    def claimed(self) -> Document:
        """Return the filter that finds what this process has claimed."""
        # None: no helper is named, as in the leader's claims.
        return {"epoch": self.epoch, "helper": self.helper}


def helper_id(site: str, helper: str) -> Document:
    """Return the ``_id`` of a helper's document."""
    return {"helper": helper, "s": site}


GIVEN_BACK: Final = {"epoch": "", "helper": "", "progress": ""}
"""The fields that only a claimed reaction has."""
HELPER: Final = "helper"
"""The kind of a helper's document."""
VOID: Final = 0
"""The epoch of a helper whose lease has ended: no leader has it."""


MOST_NEWS: Final = 1000
"""Alarms that a helper's document holds at most, until the leader has taken them over."""


def pushed_news(news: Iterable[tuple[str, Document | None]]) -> Document:
    """Return the change that leaves alarms, each with its key, in a helper's document."""
    rows = [{"n": uuid4().hex, "key": key, "alarm": row} for key, row in news]
    return {"$push": {"news": {"$each": rows, "$slice": -MOST_NEWS}}}


def lost(lease: Lease) -> LeaseLost:
    """Return the error of a process that does not hold this lease any more."""
    if lease.helper is None:
        return LeaseLost(f"another process has taken over {lease.site}")
    return LeaseLost(f"what this process had claimed at {lease.site} is given to others")


TOUCH: Final = {"$currentDate": {"touched": True}}
"""The change that shows only whether a document is there."""


async def guard(
    ledger: Collection, lease: Lease, session: Session = None, change: Any = TOUCH
) -> None:
    """Change the lease's document, or only touch it. Raises `LeaseLost`.

    In a transaction this makes all of it depend on the lease.
    """
    with writing_lease() if change is TOUCH else nullcontext():
        found = (await ledger.update_one(lease.held, change, session=session)).matched_count
    if not found:
        raise lost(lease)


def upsert(key: Any, change: Document) -> Document:
    """Return a change for `write_all` that makes the document if it isn't there."""
    return {"q": {"_id": key}, "u": change, "upsert": True}


async def write_all(collection: Collection, updates: Sequence[Document], session: Session) -> int:
    """Write updates and return how many of them found their document.

    By commands of our own: pymongo's bulk writes check and wrap each operation, which takes long
    for thousands.
    """
    return await _in_parts(collection, "update", "updates", updates, session)


async def insert_all(
    collection: Collection, documents: Sequence[Document], session: Session
) -> int:
    """Insert documents, as `write_all`; return how many. Raises OperationFailure if one exists."""
    return await _in_parts(collection, "insert", "documents", documents, session)


async def delete_all(collection: Collection, queries: Sequence[Document], session: Session) -> int:
    """Delete a document for each query, as `write_all`; return how many were found."""
    deletes = [{"q": query, "limit": 1} for query in queries]
    return await _in_parts(collection, "delete", "deletes", deletes, session)


async def _in_parts(
    collection: Collection, verb: str, name: str, writes: Sequence[Document], session: Session
) -> int:
    found = 0
    for start in range(0, len(writes), AT_ONCE):
        reply = await write_some(collection, verb, name, writes[start : start + AT_ONCE], session)
        check_reply(reply, start)
        found += reply["n"]
    return found


async def write_some(
    collection: Collection, verb: str, name: str, writes: Sequence[Document], session: Session
) -> Document:
    """Give one command that writes; return its reply."""
    # Unordered: a document that the server refuses must not keep those behind it from being
    # written. In a transaction the first error ends all of it in either case.
    command: Document = {verb: collection.name, name: writes, "ordered": False}
    # In a transaction the commit has the write concern.
    if session is None:
        command["writeConcern"] = collection.write_concern.document
    return await collection.database.command(command, session=session)


def check_reply(reply: Document, start: int = 0) -> None:
    """Raise what pymongo would have raised for a write of its own.

    Its details have the write's index, of all if the first of these is at `start`.
    """
    for error in reply.get("writeErrors", ())[:1]:
        details = {**error, "index": start + error["index"]}
        raise OperationFailure(error.get("errmsg", "a write failed"), error.get("code"), details)
    concern = reply.get("writeConcernError")
    if concern:  # a majority does not have it yet, and perhaps never will
        raise AutoReconnect(concern.get("errmsg", "a majority did not confirm a write"))


async def write_each(
    collection: Collection, writes: Sequence[UpdateOne]
) -> tuple[int, dict[int, str]]:
    """Make writes, each whether or not the server refuses another.

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
