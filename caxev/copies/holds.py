"""Holds: which copies a person wants to stay, and until when. Pure.

A hold is an item in the list ``holds`` of a copy's entry. So every site sees it, a deletion can
expect its absence in the filter of its own write, a snapshot shows a change, and it disappears with
the entry. Old programs keep fields that they do not know. Each person has a hold of their own, so
releasing one, or asking for more time, never ends another's.

`caxev.copies.retention` and `caxev.copies.deletion` ask `stays` before any deletion. Nothing is
written when a hold ends: a reaction that would delete the copy waits until then.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any, Final

from caxev.core.entry import Hold
from caxev.core.job import Skip, Unmet, Wait
from caxev.core.model import REQUESTED, TRANSFERRING, VERIFYING, Copy, CopyIs, Run
from caxev.core.moments import LAST, after

COMING: Final = (REQUESTED, TRANSFERRING, VERIFYING)
"""The statuses of a copy that has not arrived."""


def end_of(copy: Copy, hold: Hold) -> datetime | None:
    """Return when a hold of this copy ends, UTC; None: not before it is released, or unknown yet.

    One that counts from the copy's arrival ends at an unknown time until the copy has arrived.
    """
    if hold.until is not None or hold.days is None:
        return hold.until
    # An old program may have finished the copy, and written no arrival.
    came = copy.arrived_at or (None if copy.status in COMING else hold.at)
    if came is None:
        return None
    end = after(came, timedelta(days=hold.days))
    return None if end == LAST else end


def standing(copy: Copy, now: datetime) -> list[Hold]:
    """Return the holds of a copy that have not ended, the one that ends last first."""
    ends = ((end_of(copy, one) or LAST, one) for one in copy.holds)
    left = [(end, one) for end, one in ends if end > now]
    return [one for _, one in sorted(left, key=lambda pair: pair[0], reverse=True)]


def held(copy: Copy, now: datetime) -> Skip | Wait | None:
    """Return why a copy stays, and until when if that is known; None if nobody holds it."""
    left = standing(copy, now)
    if not left:
        return None
    why, end = f"it is {words(copy, left[0])}", end_of(copy, left[0])
    return Unmet(why) if end is None else Wait(why, end)


def stays(run: Run, copy: Copy, now: datetime) -> Skip | Wait | None:
    """Return which person's wish keeps a copy: a hold, or a request to copy it elsewhere."""
    wanted = (one for one in run.copies if one.status == REQUESTED and one.source == copy.host)
    for one in wanted:
        if one.key.at(copy.host) == copy.key:
            who = one.creation_place or "somebody"
            return Unmet(f"it is the source of {one.key}, which {who} requested")
    return held(copy, now)


def words(copy: Copy, hold: Hold) -> str:
    """Return a hold in words: ``held by me@host until 2026-12-24 10:00 UTC (a talk)``."""
    return f"held by {hold.by} {terms(copy, hold)}"


def terms(copy: Copy, hold: Hold) -> str:
    """Return in words until when a hold lasts, and why it is there."""
    end = end_of(copy, hold)
    if end is not None:
        until = f"until {end:%Y-%m-%d %H:%M} UTC"
    elif hold.days is not None:
        until = f"for {hold.days:g} days from its arrival"
    else:
        until = "until it is released"
    return f"{until} ({hold.why})" if hold.why else until


def as_seen(copy: Copy) -> CopyIs:
    """Return the expectation that nobody has set or ended a hold of this copy meanwhile."""
    return copy.having("holds")


def rows(holds: Iterable[Hold]) -> list[dict[str, Any]]:
    """Return holds as an entry has them."""
    return [
        {name: value for name, value in one._asdict().items() if value is not None} for one in holds
    ]
