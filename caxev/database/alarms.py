"""A site's alarms as documents of the ledger.

Their keys begin with ``alarm``, so that a scan over runs or reactions skips them.
"""

from __future__ import annotations

from typing import Final

from attrs import asdict

from caxev.core.alarms import AlarmState
from caxev.database.client import Document

KIND: Final = "alarm"


def alarm_id(site: str, key: str) -> Document:
    """Return the ``_id`` of an alarm's document."""
    return {"alarm": key, "s": site}


def alarm_row(state: AlarmState) -> Document:
    """Return an alarm's document. What users name is a value in it, and never a key."""
    alarm = state.alarm
    return {
        "kind": KIND,
        "site": alarm.site,
        "key": alarm.key,
        "severity": alarm.severity.value,
        "summary": alarm.summary,
        "run": alarm.run,
        "details": [[name, value] for name, value in alarm.details.items()],
        "once": alarm.once,
        "since": state.since,
        "over": state.over,
        "deliveries": [{"sink": sink, **asdict(last)} for sink, last in state.deliveries.items()],
    }
