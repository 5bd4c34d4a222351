"""Count how often each reaction starts, to notice one that sets itself off again.

A handler whose update triggers it again, two that trigger each other, or one that always asks to
be tried again at once would keep a site and its database busy forever. `runner` asks before each
attempt. Pure: times are arguments, in seconds by a clock that does not go back.
"""

from __future__ import annotations

from typing import Any, Final

from attrs import define, field

from caxev.core.ledger import Reaction
from caxev.core.model import RunId

MOST: Final = 300
"""Attempts at one reaction within `WINDOW`: one every two seconds. The same number limits
the reactions of one handler to one run..."""
PER_COPY: Final = 4
"""...unless this number for each copy that the run had at first is more."""
WINDOW: Final = 600.0
KEPT: Final = 100_000
"""Reactions that are remembered, the latest to start: a loop is always among them."""


@define(eq=False)
class Recurrence:
    """How often each reaction has started lately, and how many each handler had for each run.

    A reaction is known by the tag, field or copy that changed: a handler that adds another one each
    time sets off a new reaction each time.
    """

    _seen: dict[str, tuple[int, float]] = field(init=False, factory=dict)
    _spread: dict[tuple[RunId, str], tuple[int, float, int]] = field(init=False, factory=dict)

    def excess(self, reaction: Reaction, copies: int, now: float) -> str | None:
        """Count one more start of a reaction; return why it must not start, None if it may.

        `copies`: how many the run has now. After a refusal the count of the reaction begins again,
        so a person's retry is not refused again.
        """
        # Popped and put back: the dictionary stays in the order of the last start, for `_forget`.
        count, since = self._seen.pop(reaction.id, (0, now))
        if now - since >= WINDOW:
            count, since = 0, now
        if count >= MOST:
            return _refusal(f"it ran {count} times", now - since)
        # Only first starts count for the spread: retries of one reaction are counted above.
        is_new = count == 0
        self._seen[reaction.id] = (count + 1, since)
        _forget(self._seen)
        return self._spreading(reaction, copies, now) if is_new else None

    def _spreading(self, reaction: Reaction, copies: int, now: float) -> str | None:
        key = reaction.run, reaction.handler
        count, since, bound = self._spread.pop(key, (0, now, 0))
        if now - since >= WINDOW or not count:
            # Not the copies of later on: a handler may add one each time.
            count, since, bound = 0, now, max(MOST, PER_COPY * copies)
        self._spread[key] = (count + 1, since, bound)
        _forget(self._spread)
        if count < bound:
            return None
        return _refusal(f"{reaction.handler} ran for {bound} changes of this run", now - since)


def _refusal(what: str, seconds: float) -> str:
    return (
        f"{what} within {max(seconds, 1.0):.0f} s: it seems to set itself off, alone or with "
        "another handler; stopped until it is tried again"
    )


def _forget(seen: dict[Any, Any]) -> None:
    if len(seen) > KEPT:
        # One goes for each that comes, so this stays quick.
        del seen[next(iter(seen))]
