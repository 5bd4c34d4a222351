"""Reads and writes without an event loop, such as at a job's end.

All functions block.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from time import monotonic

import pymongo
from pymongo import MongoClient

from caxev.config.settings import Settings
from caxev.core.clock import clock, utcnow
from caxev.core.update import RunUpdate
from caxev.database.client import RELIED_ON, Document, address, listeners, translated, usable
from caxev.database.runs import write_of


def amend(settings: Settings, update: Callable[[], RunUpdate]) -> bool:
    """Write an update; return whether it fitted. Raises `DatabaseError`.

    `update` is called once the database's time is known: a node's own clock may be wrong.
    """
    with translated(settings), connect_plainly(settings) as client:
        # Connect first: that takes long, and would count as the clocks' difference.
        client.admin.command("ping")
        asked = monotonic()
        server: datetime = client.admin.command("hello")["localTime"]
        clock.note(server.replace(tzinfo=UTC), asked)
        query, change, array_filters = write_of(update(), utcnow())
        runs = client[settings.database][settings.collection]
        done = runs.update_one(query, change, array_filters=array_filters)
    return done.matched_count > 0


def connect_plainly(settings: Settings) -> MongoClient[Document]:
    """Return a client without an event loop. Does not wait for the server."""
    with usable(settings):
        return MongoClient(
            address(settings),
            **RELIED_ON,
            appname="caxev batch",
            serverSelectionTimeoutMS=10_000,
            event_listeners=listeners(),
        )


def known_values(settings: Settings, path: str, patience: float) -> list[str]:
    """Return the different texts that runs have in a field, within so many seconds.

    Raises `DatabaseError`, also if it takes longer.
    """
    with translated(settings), pymongo.timeout(patience), connect_plainly(settings) as client:
        found = client[settings.database][settings.collection].distinct(path)
    return [value for value in found if isinstance(value, str)]
