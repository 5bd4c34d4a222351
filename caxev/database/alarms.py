"""A site's alarms as documents of the ledger.

Their keys begin with ``alarm``, so that a scan over runs or reactions skips them.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from attrs import asdict
from pymongo.asynchronous.client_session import AsyncClientSession

from caxev.core.alarms import AlarmState
from caxev.core.history import Deed, HistoryRow, What
from caxev.core.selection import MOST
from caxev.database.client import Document
from caxev.database.connection import operation
from caxev.database.history import History
from caxev.database.rows import alarm_state_from
from caxev.database.writes import Lease, guard, upsert, write_all

KIND: Final = "alarm"


def alarm_id(site: str, key: str) -> Document:
    """Return the ``_id`` of an alarm's document."""
    return {"alarm": key, "s": site}


def alarm_row(state: AlarmState) -> Document:
    """Return an alarm's document. Names that users choose are values in it, never keys."""
    alarm = state.alarm
    return {
        "kind": KIND,
        "site": alarm.site,
        "key": alarm.key,
        "severity": alarm.severity.value,
        "summary": alarm.summary,
        "run": alarm.run,
        **({} if alarm.run_id is None else {"run_id": alarm.run_id}),
        "details": [[name, value] for name, value in alarm.details.items()],
        "once": alarm.once,
        "since": state.since,
        "over": state.over,
        "deliveries": [{"sink": sink, **asdict(last)} for sink, last in state.deliveries.items()],
    }


def alarm_rows(state: AlarmState) -> list[HistoryRow]:
    """Return what the history shows of an alarm; the same rows however often it is kept. Pure."""
    alarm, since = state.alarm, state.since
    key = f"{alarm.site}:alarm:{alarm.id}:{since:%Y%m%dT%H%M%S}{since.microsecond // 1000:03d}"

    word = alarm.run.removeprefix("run ")
    number = int(word) if word.isdecimal() and int(word) <= MOST else None
    of: Any = {"run": alarm.run_id, "number": number, "name": "" if number else word}

    def row(what: What, at: datetime, key: str) -> HistoryRow:
        deed = Deed(what=what, reason=alarm.summary)
        return HistoryRow(at=at, site=alarm.site, deed=deed, id=key, **of)

    rows = [row(What.ALARM_RAISED, since, key)]
    return (
        rows if state.over is None else [*rows, row(What.ALARM_CLEARED, state.over, f"{key}:over")]
    )


class Alarms(History):
    """Keep the states of alarms, so that a restart repeats and forgets none."""

    @operation
    async def alarms(self, site: str | None = None) -> list[AlarmState]:
        """Return the alarms of a site, or of all, as they were last kept."""
        return await self._alarm_states({} if site is None else {"site": site})

    async def _alarm_states(self, query: Document) -> list[AlarmState]:
        documents = await self._ledger.find({"kind": KIND, **query}).to_list(None)
        return [one for one, _ in self._read(self._ledger, documents, alarm_state_from)]

    @operation
    async def keep_alarms(
        self, lease: Lease, kept: Sequence[AlarmState], gone: Sequence[str] = ()
    ) -> None:
        """Write the states of alarms, and forget others, by their keys. Raises `LeaseLost`."""
        writes = [
            upsert(alarm_id(lease.site, one.alarm.key), {"$set": alarm_row(one)}) for one in kept
        ]
        forgotten = [alarm_id(lease.site, key) for key in gone]
        rows = [row for one in kept for row in alarm_rows(one)]

        async def keep(session: AsyncClientSession) -> None:
            await write_all(self._ledger, writes, session)
            await self._add_rows(rows, session)
            if forgotten:
                await self._ledger.delete_many({"_id": {"$in": forgotten}}, session=session)
            # Last: from here to the commit nobody else can write the site's document.
            await guard(self._ledger, lease, session)

        await self._transaction(keep)
        # An alarm is kept again at each delivery.
        self._are_there([row.id for row in rows])
