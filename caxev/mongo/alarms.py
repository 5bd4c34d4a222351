"""A site's alarms, each a document of the ledger: what it says, and who has been told.

Their keys begin with ``alarm``, so that no scan over runs or debts meets them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from attrs import asdict

from caxev.alarms import Alarm, Standing, Told
from caxev.mongo.client import Document

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


def standing_from(row: Mapping[str, Any]) -> Standing:
    """Return the alarm that `alarm_row` made a row of."""
    alarm = Alarm(
        row["site"],
        row["key"],
        row["summary"],
        row["severity"],
        row["run"],
        dict(row["details"]),
        row["once"],
    )
    told = {one["sink"]: _told(one) for one in row["told"]}
    return Standing(alarm, row["since"], row["over"], told)


def _told(row: Mapping[str, Any]) -> Told:
    return Told(row["raised"], row["over"], row["tries"], row["due"], row["why"])
