"""What reactions to one run share: a lock, and for large runs what was read a moment ago.

`runner` holds the lock around each attempt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

import trio
from attrs import define, field

from caxev.core.ledger import Reaction
from caxev.core.model import Run, RunId

LARGE: Final = 500
"""Copies from which on a run takes so long to read that reactions share what was read..."""
FRESH: Final = 1.0
"""...for this many seconds, if it was read after their reactions were recorded."""


@define(eq=False)
class RunLocks:
    """One lock for each run, for reading together or writing alone, in this process.

    It is by the run and not by the copy: a reaction to a copy elsewhere, a tag or a field may read
    the copy that stands here, and nothing may be deleted under a reader.
    """

    _readers: Counter[RunId] = field(factory=Counter)
    _writers: set[RunId] = field(factory=set)
    _left: trio.Event = field(factory=trio.Event)

    async def enter(self, run: RunId, *, exclusive: bool) -> bool:
        """Lock a run, with other readers or alone; return whether that took waiting."""
        waited = False
        while run in self._writers or (exclusive and run in self._readers):
            await self._left.wait()
            waited = True
        if exclusive:
            self._writers.add(run)
        else:
            self._readers[run] += 1
        return waited

    def leave(self, run: RunId, *, exclusive: bool) -> None:
        """Unlock the run."""
        if exclusive:
            self._writers.discard(run)
        else:
            self._readers[run] -= 1
            if not self._readers[run]:
                del self._readers[run]
        self._left.set()
        self._left = trio.Event()


@define(eq=False)
class RunCache:
    """Large runs as they were read a moment ago, so that not each of many reactions reads them.

    A reaction must see its own event, so only what was read after it was recorded will do.
    Generations grow, so that is true of each reaction up to the newest generation at that time.
    """

    _read: dict[RunId, tuple[float, int, Run]] = field(init=False, factory=dict)
    _ended: dict[str, float] = field(init=False, factory=dict)

    def ended(self, reaction: Reaction) -> None:
        """Note that an attempt is over: the next one must see what it has written."""
        self._ended[reaction.id] = trio.current_time()

    def put(self, runs: Iterable[Run], at: float, generation: int) -> None:
        """Keep the large ones of these, which were read at that time, after that generation."""
        self._read |= {run.id: (at, generation, run) for run in runs if is_large(run)}

    def take(self, ids: Iterable[RunId], reactions: Iterable[Reaction]) -> dict[RunId, Run]:
        """Return those of these runs that are fresh enough for all of these reactions."""
        since = trio.current_time() - FRESH
        self._read = {run: read for run, read in self._read.items() if read[0] >= since}
        self._ended = {key: at for key, at in self._ended.items() if at >= since}
        reactions = list(reactions)
        if not self._read or any(reaction.id in self._ended for reaction in reactions):
            return {}
        generation = max(reaction.generation for reaction in reactions)
        read = {run: self._read[run] for run in ids if run in self._read}
        return {run: one for run, (_, newest, one) in read.items() if newest >= generation}


def is_large(run: Run) -> bool:
    """Return whether a run takes so long to read that reactions share what was read."""
    return len(run.copies) >= LARGE
