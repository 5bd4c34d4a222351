"""Keeping a lease while a listener's loop is blocked.

Apart from `blocking`, so that the process of each job of a batch system need not import this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pymongo
from pymongo import MongoClient
from pymongo.collection import Collection

from caxev.config.settings import Settings
from caxev.core.alarms import AlarmState
from caxev.core.errors import ConfigError
from caxev.database.alarms import alarm_id, alarm_row
from caxev.database.blocking import connect_plainly
from caxev.database.client import DatabaseError, Document, translated
from caxev.database.writes import Lease, pushed_news

T = TypeVar("T")


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

        An alarm of a helper is left for the leader.
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
