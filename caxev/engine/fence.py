"""The fence: until when what this process has claimed is surely its own.

`helping` renews a `Fence` with its lease, and `watchdog` does so from its thread while the loop is
blocked. Past the fence all attempts are cancelled, and a process that cannot cancel them ends.
"""

from __future__ import annotations

from math import inf
from time import monotonic

from attrs import define, field


@define(eq=False)
class Fence:
    """A limit that each renewal of a lease defers by `seconds`; `spare` seconds later others begin.

    A listener has none: it learns from the database that another process has taken over.
    """

    seconds: float = inf
    spare: float = inf
    # A float is replaced as a whole, so any thread may do so.
    _until: float = field(init=False, default=inf)

    def renewed(self, asked: float) -> None:
        """Defer the fence: the lease was renewed by a request of that time (monotonic)."""
        self._until = asked + self.seconds

    @property
    def left(self) -> float:
        """Seconds until the fence; negative once it is passed."""
        return self._until - monotonic()

    @property
    def last(self) -> float:
        """Seconds in which the process must have ended, if its attempts go on until then."""
        return max(self.left + self.spare / 2, 0.0)
