"""Count how often each reaction starts, to notice one that sets itself off again.

A handler whose update triggers it again, two that trigger each other, or one that always asks to
be tried again at once would keep a site and its database busy for ever. `dispatcher` asks before
each attempt. Pure: times are arguments, in seconds by a clock that does not go back.
"""

from __future__ import annotations

from typing import Final

from attrs import define, field

MOST: Final = 300
"""Attempts at one reaction that are let through within `WINDOW`: one every two seconds."""
WINDOW: Final = 600.0
KEPT: Final = 100_000
"""Reactions that are remembered, the latest to start: a loop is always among them."""


@define(eq=False)
class Recurrence:
    """How often each reaction has started of late."""

    _seen: dict[str, tuple[int, float]] = field(init=False, factory=dict)

    def excess(self, key: str, now: float) -> str | None:
        """Count one more start of a reaction; why it must not start, None if it may.

        After a refusal the count begins anew, so a person's retry is not refused again.
        """
        count, since = self._seen.pop(key, (0, now))
        if now - since >= WINDOW:
            count, since = 0, now
        if count >= MOST:
            return (
                f"it ran {count} times within {max(now - since, 1.0):.0f} s: it seems to set "
                "itself off, alone or with another handler; stopped until it is tried again"
            )
        self._seen[key] = (count + 1, since)
        if len(self._seen) > KEPT:
            del self._seen[next(iter(self._seen))]
        return None
