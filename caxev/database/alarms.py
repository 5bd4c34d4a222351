"""A site's alarms, each a document of the ledger: what it says, and who has been told.

Their keys begin with ``alarm``, so that no scan over runs or reactions meets them.
"""

from __future__ import annotations

from typing import Final

from attrs import asdict

from caxev.core.alarms import Standing
from caxev.database.client import Document

KIND: Final = "alarm"


def alarm_id(site: str, key: str) -> Document:
    """Return the ``_id`` of an alarm's document."""
    return {"alarm": key, "s": site}


def alarm_row(standing: Standing) -> Document:
    """Return an alarm as the database keeps it. Names of a user's choosing are values, not keys."""
    alarm = standing.alarm
    return {
        "kind": KIND,
        "site": alarm.site,
        "key": alarm.key,
        "severity": alarm.severity.value,
        "summary": alarm.summary,
        "run": alarm.run,
        "details": [[name, value] for name, value in alarm.details.items()],
        "once": alarm.once,
        "since": standing.since,
        "over": standing.over,
        "told": [{"sink": sink, **asdict(told)} for sink, told in standing.told.items()],
    }
