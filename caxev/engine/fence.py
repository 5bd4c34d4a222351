"""The fence: the time until which this process surely owns what it has claimed.

`helping` renews a `Fence` with its lease, and `watchdog` does so from its thread while the loop is
blocked. Past the fence all attempts are cancelled, and a process that cannot cancel them ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import inf
from time import monotonic

import trio
from attrs import define, field


@define(eq=False)
class Fence:
    """A time limit that each renewal of a lease defers by `seconds`.

    Other processes may take over `spare` seconds after it.

    A listener has none: it learns from the database that another process has taken over.
    """

    seconds: float = inf
    spare: float = inf
    # A float is replaced as a whole, so any thread may do so.
    until: float = field(init=False, default=inf)

    def renewed(self, asked: float) -> None:
        """Defer the fence: the lease was renewed by a request of that time (monotonic)."""
        self.until = asked + self.seconds

    @property
    def left(self) -> float:
        """Seconds until the fence; negative once it is passed."""
        return self.until - monotonic()

    @property
    def last(self) -> float:
        """Seconds in which the process must end, if its attempts do not."""
        return max(self.left + self.spare / 2, 0.0)

    @contextmanager
    def cancelling(self) -> Iterator[trio.CancelScope]:
        """Cancel the block once the fence is passed."""
        with trio.CancelScope() as scope:
            deferring = _Deferring(self, scope, trio.current_time() - monotonic())
            trio.lowlevel.add_instrument(deferring)
            try:
                yield scope
            finally:
                with suppress(KeyError):  # trio removes one that has failed
                    trio.lowlevel.remove_instrument(deferring)


@define(eq=False)
class _Deferring(trio.abc.Instrument):
    """Moves a scope's deadline just before the loop checks which deadlines have passed.

    So a process that was stopped takes no step beyond the fence, and one that was blocked continues
    if its watchdog has deferred the fence meanwhile.
    """

    fence: Fence
    scope: trio.CancelScope
    offset: float

    def after_io_wait(self, timeout: float) -> None:  # noqa: ARG002  # trio gives it
        deadline = self.fence.until + self.offset
        if self.scope.deadline != deadline:
            self.scope.deadline = deadline
