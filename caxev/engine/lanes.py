"""Lanes: groups of workers, each with its queue of reactions in memory. No I/O.

`dispatcher` fills the lanes from the database and takes from them.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from operator import itemgetter
from typing import Final

from attrs import define, field

from caxev.core.ledger import NEWEST_FIRST, Reaction
from caxev.core.model import RunId
from caxev.database import OLDEST_FIRST, URGENT_FIRST, Order

LANES: Final[Mapping[str, int]] = {
    "default": 512,
    "transfer": 4,
    "checksum": 2,
    "patrol": 1,
    "processing": 256,
    "tape": 1,
}
"""Workers in each lane unless sites.json says otherwise; a lane not named here has 4."""
OTHER_LANE: Final = 4
WINDOW: Final = 1000
"""Reactions of a lane that are fetched at once: each fetch has to pass by what was paid lately."""
AHEAD: Final = 4
"""In lanes that go newest first, reactions for each worker that are fetched at once."""
MOST_ASIDE: Final = 64
"""Reactions of a lane that may wait for something else than a worker while others work."""


@define(eq=False)
class Lane:
    """A group of workers.

    `running` are the keys that are claimed, `ended` how many of these are over and only wait to
    be settled, `aside` how many wait for something else than a worker. `waiting` are reactions that
    were due when they were fetched, in the lane's order; `more`: the database may hold others that
    are due in this lane, where it goes oldest first all or most of them not before `since`;
    `news`: some of those came after the last fetch.
    `passed` are keys that were found due while their former reaction was still running.
    """

    name: str
    workers: int
    running: set[str] = field(factory=set)
    ended: int = 0
    aside: int = 0
    waiting: deque[Reaction] = field(factory=deque)
    passed: set[str] = field(factory=set)
    more: bool = True
    news: bool = True
    fetching: bool = False
    since: datetime | None = None
    next_due: datetime | None = None

    @property
    def free(self) -> int:
        # While some are settled others can work, up to as many again.
        idle = min(self.ended, self.workers) + min(self.aside, MOST_ASIDE)
        return max(self.workers - len(self.running) + idle, 0)

    @property
    def newest_first(self) -> bool:
        return self.name in NEWEST_FIRST

    @property
    def order(self) -> Order:
        return URGENT_FIRST if self.newest_first else OLDEST_FIRST

    @property
    def window(self) -> int:
        return min(AHEAD * self.workers, WINDOW) if self.newest_first else WINDOW

    @property
    def share(self) -> int:
        """How many reactions of one run may wait at once: those of others come in between."""
        return max(min(AHEAD * self.workers, WINDOW) // 2, 1)

    def crowding(self, due: Sequence[Reaction]) -> RunId | None:
        """The run whose reactions may have kept those of others out of what was fetched."""
        if len(due) < self.window:
            return None
        run, reactions = Counter(reaction.run for reaction in due).most_common(1)[0]
        return run if reactions > self.share else None

    @property
    def stale(self) -> bool:
        """Whether reactions must be fetched before one is taken: none waits, or newer ones came."""
        return self.more and (not self.waiting or (self.newest_first and self.news))

    def snapshot(self) -> None:
        """See to it that the database is asked what is due."""
        self.more = self.news = True

    def keep(self, reactions: Sequence[Reaction]) -> None:
        """Have fetched reactions wait; what waited goes where the newest come first."""
        if self.newest_first:
            self.waiting.clear()
        self.waiting.extend(reactions)

    def arm(self, due: datetime | None) -> None:
        """See to it that the lane is looked into at that time, or before."""
        if due is not None:
            self.next_due = min(self.next_due or due, due)

    @property
    def idle(self) -> bool:
        """Nothing runs, and nothing is due as far as is known."""
        return not (self.running or self.waiting or self.more or self.fetching)


def few_of_each(reactions: Iterable[Reaction], most: int) -> list[Reaction]:
    """Leave out what is more than so many reactions of one run, the last of them. Pure."""
    seen: Counter[RunId] = Counter()
    kept: list[Reaction] = []
    for reaction in reactions:
        seen[reaction.run] += 1
        if seen[reaction.run] <= most:
            kept.append(reaction)
    return kept


def in_turn(reactions: Iterable[Reaction]) -> list[Reaction]:
    """Return the first reaction of each run, then the second of each, and so on. Pure."""
    seen: Counter[RunId] = Counter()
    places: list[tuple[int, Reaction]] = []
    for reaction in reactions:
        places.append((seen[reaction.run], reaction))
        seen[reaction.run] += 1
    return [reaction for _, reaction in sorted(places, key=itemgetter(0))]
