"""Times and lengths of time as people write them: ``2016-11-11``, ``90d``. Pure."""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Final, TypeAlias

Moment: TypeAlias = datetime | timedelta
"""A time (UTC), or how long before now it is."""

LAST: Final = datetime.max.replace(tzinfo=UTC)
"""The last time of all."""
_UNITS: Final = {
    "w": timedelta(weeks=1),
    "d": timedelta(days=1),
    "h": timedelta(hours=1),
    "min": timedelta(minutes=1),
    "s": timedelta(seconds=1),
}
_LENGTH: Final = re.compile(r"(\d{1,10}(?:\.\d{1,6})?) ?(w|d|h|min|s)", re.ASCII)
_MOST: Final = timedelta(days=36525)
"""A century: longer would leave the range of dates."""


def read_length(text: str) -> timedelta:
    """Return a length of time such as ``90d``, ``1.5h`` or ``30min``. Raises ValueError."""
    match = _LENGTH.fullmatch(text.strip())
    length = timedelta()
    if match is not None:
        # Such a length stays 0, and is refused like one that is too long.
        with suppress(OverflowError):
            length = float(match[1]) * _UNITS[match[2]]
    if not timedelta() < length <= _MOST:
        raise ValueError(f"{text!r} is no length of time: write 30min, 12h, 90d or 2w")
    return length


def is_length(text: str) -> bool:
    """Return whether a text is written as a length of time, and not as a time."""
    return _LENGTH.fullmatch(text.strip()) is not None


def write_length(length: timedelta) -> str:
    """Return the text that `read_length` reads as this length, in days or a shorter unit."""
    for name, unit in _UNITS.items():
        if name != "w" and not length % unit:
            return f"{length // unit}{name}"
    return f"{length.total_seconds():f}s"


def read_moment(text: str) -> Moment:
    """Return a time such as ``2016-11-11``, ``2016-11-11T14:34`` or ``7d`` (before now), UTC.

    A date alone is its midnight. Raises ValueError.
    """
    if is_length(text):
        return read_length(text)
    try:
        found = datetime.fromisoformat(text.strip())
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is no time: write 2016-11-11, 2016-11-11T14:34 or 7d") from None


def write_moment(moment: Moment) -> str:
    """Return the text that `read_moment` reads as this time."""
    if isinstance(moment, timedelta):
        return write_length(moment)
    text = moment.astimezone(UTC).isoformat().removesuffix("+00:00")
    return text.removesuffix("T00:00:00") or text


def after(at: datetime, span: timedelta) -> datetime:
    """Return the time so long after another, UTC; `LAST` if that is out of range.

    Times of documents may be anything: 9999-12-31 is how some people write "forever".
    """
    try:
        return at + span
    except OverflowError:
        return LAST


def moment_at(moment: Moment, now: datetime) -> datetime:
    """Return the time itself, to the millisecond, as the database keeps times."""
    found = now - moment if isinstance(moment, timedelta) else moment
    return found.replace(microsecond=found.microsecond // 1000 * 1000)
