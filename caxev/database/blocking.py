"""Writes without an event loop: at a job's end, and while a listener's loop is blocked.

All functions block.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from time import monotonic
from typing import Any, TypeVar

import pymongo
from bson import json_util
from pymongo import MongoClient
from pymongo.collection import Collection

from caxev.config import ConfigError, Settings
from caxev.core.alarms import AlarmState
from caxev.core.clock import clock, utcnow
from caxev.core.model import RunId
from caxev.core.update import RunUpdate
from caxev.database.alarms import alarm_id, alarm_row
from caxev.database.client import (
    RELIED_ON,
    DatabaseError,
    Document,
    address,
    listeners,
    translated,
    usable,
)
from caxev.database.runs import write_of
from caxev.database.writes import Lease, pushed_news

T = TypeVar("T")


def id_text(run: RunId) -> str:
    """Return a run's id, of whatever type, as text."""
    return json_util.dumps(run, json_options=json_util.CANONICAL_JSON_OPTIONS)


def id_from(text: str) -> RunId:
    """Return the id that `id_text` made a text of."""
    options = json_util.CANONICAL_JSON_OPTIONS.with_options(tz_aware=True)
    run: Any = json_util.loads(text, json_options=options)
    return run


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


class LeaseKeeper:
    """Prolongs a lease and keeps alarms while the loop itself cannot. Connects when needed.

    Each call takes `limit` seconds at most, the length of the lease or less.
    """

    def __init__(self, settings: Settings, lease: Lease, lease_time: float) -> None:
        self._settings, self._lease, self._lease_time = settings, lease, lease_time
        self.limit = lease_time
        self._client: MongoClient[Document] | None = None

    def renew(self) -> bool:
        """Prolong the lease; False if another process holds it by now. Raises `DatabaseError`."""
        lease = self._lease
        change = [{"$set": {"expires": {"$add": ["$$NOW", self._lease_time * 1000]}}}]
        held = self._write(lambda ledger: ledger.update_one(lease.held, change).matched_count)
        if not held or lease.helper is None:
            return bool(held)
        # A leader of a version that knows no helpers voids none.
        leads = {"_id": lease.site, "epoch": lease.epoch}
        return self._write(lambda ledger: ledger.find_one(leads, {"_id": 1})) is not None

    def keep_alarm(self, state: AlarmState) -> None:
        """Keep an alarm, for this process or the next to deliver. Raises `DatabaseError`.

        That of a helper is left for the leader.
        """
        lease, row = self._lease, alarm_row(state)
        if lease.helper is None:
            key, change = {"_id": alarm_id(lease.site, state.alarm.key)}, {"$set": row}
            self._write(lambda ledger: ledger.update_one(key, change, upsert=True))
        else:
            news = pushed_news([(state.alarm.key, row)])
            self._write(lambda ledger: ledger.update_one(lease.held, news))

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _write(self, write: Callable[[Collection[Document]], T]) -> T:
        settings = self._settings
        # The limit includes connecting: a late renewal is worth nothing.
        try:
            with translated(settings), pymongo.timeout(self.limit):
                if self._client is None:
                    self._client = connect_plainly(settings)
                ledger = self._client[settings.database][f"{settings.prefix}ledger"]
                return write(ledger)
        except (ConfigError, DatabaseError):
            self.close()  # the next time with credentials that may be new
            self._settings = settings.again()
            raise
