"""Lanes: groups of workers, each with its queue of reactions in memory. No I/O.

`dispatcher` fills the lanes from the database and takes from them; `settling` gives workers back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Final

import trio
from attrs import define, field

from caxev.core.ledger import NEWEST_FIRST, Reaction

LANES: Final[Mapping[str, int]] = {
    "default": 512,
    "transfer": 4,
    "checksum": 2,
    "patrol": 1,
    "processing": 256,
    "tape": 1,
}
"""Workers in each lane unless sites.json sets another number."""
OTHER_LANE: Final = 4
"""Workers in each lane that is not named in `LANES`."""
WINDOW: Final = 1000
"""Reactions of a lane that one query fetches. It skips all that were settled lately, so many small
queries would cost more."""
AHEAD: Final = 4
"""Reactions that one query fetches for each worker, in lanes that go newest first."""
MOST_ASIDE: Final = 64
"""Reactions of a lane that may wait for something else than a worker while others work."""


@define(eq=False)
class Lane:
    """A group of workers and its queue.

    `running`: the keys that are claimed; `ended`: how many of these only wait to be settled;
    `aside`: how many wait for something else than a worker. `waiting`: reactions that were due when
    they were fetched, in the lane's order. `more`: the database may hold further ones that are due,
    in a lane that goes oldest first most of them not before `since`; `news`: some of those came
    after the last fetch. `passed`: keys that were due while their former reaction was running.
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
        """How many reactions can be started now."""
        # While some are settled others can work, up to as many again.
        idle = min(self.ended, self.workers) + min(self.aside, MOST_ASIDE)
        return max(self.workers - len(self.running) + idle, 0)

    @property
    def newest_first(self) -> bool:
        return self.name in NEWEST_FIRST

    @property
    def window(self) -> int:
        """How many reactions one query fetches."""
        # A long queue would be out of date: each new reaction goes before all of it.
        return min(AHEAD * self.workers, WINDOW) if self.newest_first else WINDOW

    @property
    def stale(self) -> bool:
        """Whether to fetch before a reaction is taken: none waits, or newer ones came."""
        return self.more and (not self.waiting or (self.newest_first and self.news))

    def refresh(self) -> None:
        """Ask the database soon for what is due."""
        self.more = self.news = True

    def take_in(self, due: Sequence[Reaction], found: Sequence[Reaction]) -> bool:
        """Queue what was fetched; return whether that is all that is due.

        `due` is what the query returned, `found` what of it can be started.
        """
        if self.newest_first:
            self.waiting.clear()
        self.waiting.extend(found)
        # At the end of the queue, one query without `since` makes sure that it was the end.
        complete = len(due) < self.window and self.since is None
        crowded = len(due) == self.window and not self.newest_first
        self.since = due[-1].due if crowded else None
        return complete

    def arm(self, due: datetime | None) -> None:
        """Look into the lane at that time, or before."""
        if due is not None:
            self.next_due = min(self.next_due or due, due)

    def release(self, key: str) -> None:
        """Give back the worker of a reaction that is settled."""
        self.running.discard(key)
        self.ended -= 1
        if key in self.passed:
            self.passed.discard(key)
            self.refresh()

    def is_idle(self, now: datetime) -> bool:
        """Return whether nothing runs, and nothing is known to be due by `now`."""
        is_due = self.next_due is not None and self.next_due <= now
        return not (self.running or self.waiting or self.more or self.fetching or is_due)


@define(eq=False)
class Lanes:
    """The lanes of a site, by name; one is made when it is first asked for.

    `sizes` are the workers of lanes as sites.json sets them. `changed` is set, and replaced, when a
    task has changed a lane: take it before you look at the lanes, then wait for it. `shared` are
    those of which helpers claim reactions, too.
    """

    sizes: Mapping[str, int]
    changed: trio.Event = field(init=False, factory=trio.Event)
    shared: frozenset[str] = field(init=False, default=frozenset())
    _lanes: dict[str, Lane] = field(init=False, factory=dict)

    def __getitem__(self, name: str) -> Lane:
        if name not in self._lanes:
            self._lanes[name] = Lane(name, self.sizes.get(name, LANES.get(name, OTHER_LANE)))
        return self._lanes[name]

    def __iter__(self) -> Iterator[Lane]:
        # A copy: a lane may be added while somebody waits in the middle of a loop.
        return iter(tuple(self._lanes.values()))

    @property
    def running(self) -> set[str]:
        """The keys that this process has claimed."""
        return {key for lane in self for key in lane.running}

    def notify(self) -> None:
        """Wake all tasks that wait for a change."""
        self.changed.set()
        self.changed = trio.Event()

    def refresh(self) -> None:
        """Ask the database soon for what is due in any lane."""
        for lane in self:
            lane.refresh()
        self.notify()
