"""The lock that reactions to one run share.

`runner` holds the lock around each attempt.
"""

from __future__ import annotations

from collections import Counter

import trio
from attrs import define, field

from caxev.core.model import RunId


@define(eq=False)
class RunLocks:
    """One lock for each run, for reading together or writing alone, in this process.

    It is by the run and not by the copy: a reaction to a copy elsewhere, a tag or a field may read
    the copy that is here, and nothing may be deleted under a reader.
    """

    _readers: Counter[RunId] = field(factory=Counter)
    _writers: set[RunId] = field(factory=set)
    _left: trio.Event = field(factory=trio.Event)

    async def enter(self, run: RunId, *, exclusive: bool) -> bool:
        """Lock a run, with other readers or alone; return whether that took waiting."""
        waited = False
        # A writer that waits keeps no reader out, and may wait for long: a deletion is never
        # urgent.
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
