"""Fresh readings of copies, which their sites' listeners make. Pure.

A request is in ``check_asked`` of the copy's entry under an id; the answer goes to
``check_answered`` under the same, and to ``verified_at``, or the status becomes ``error``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar

from attrs import evolve, field, frozen

from caxev.asking.base import DONE, FAILED, ActContext, RequestedAct, Step
from caxev.core.clock import utcnow
from caxev.core.history import What
from caxev.core.model import TRANSFERRED, Copy, Run, new_id
from caxev.core.selection import CopyPattern
from caxev.core.update import RunUpdate

WAITING = "asked"


class Readings(RequestedAct):
    """The base of requests for readings, whose id is in the entry of the copy."""

    def state_of(self, run: Run, request: str) -> str | None:
        """Return how far the run's copies are: all must have been read."""
        copies = list(_asked(run, request))
        if not copies:
            return None
        if any(request not in one.answered for one in copies if one.status == TRANSFERRED):
            return WAITING
        return DONE if all(one.status == TRANSFERRED for one in copies) else FAILED

    def withdrawals(self, run: Run, context: ActContext) -> Iterable[Step]:
        """Return the steps that take the request out of the entries that have not answered it."""
        request = context.request or ""
        for copy in _asked(run, request):
            if request not in copy.answered:
                left = [one._asdict() for one in copy.asked if one.id != request]
                row = context.row(run, copy.key, What.CANCELLED, "a reading of it")
                update = RunUpdate.replace(run, copy, check_asked=left)
                yield Step(run, str(copy.key), "withdrawn", update, row=row)

    def size_of(self, run: Run, request: str) -> int:
        """Return the bytes that are read."""
        return sum(run.size_of(one) or 0 for one in _asked(run, request))


def _asked(run: Run, request: str) -> Iterator[Copy]:
    for copy in run.copies:
        if request in copy.answered or any(one.id == request for one in copy.asked):
            yield copy


def reading(run: Run, copy: Copy, context: ActContext) -> Step:
    """Return the step that has a copy read again."""
    update = RunUpdate.ask(run, copy, context.request or new_id(), utcnow())
    row = context.row(run, copy.key, What.REQUESTED, "a reading of it")
    state = "be read again"
    size = run.size_of(copy)
    return Step(run, str(copy.key), f"will {state}", update, f"would {state}", size=size, row=row)


@frozen
class ReadCopies(Readings):
    """Have good copies read again by their sites, and compared."""

    kind: ClassVar[str] = "verify"
    copies: CopyPattern = field(factory=CopyPattern)

    @property
    def what(self) -> str:
        return f"good copies {evolve(self.copies, status=TRANSFERRED)}".rstrip()

    def steps(self, run: Run, context: ActContext) -> Iterable[Step]:
        """Decide about a run: each of its copies that is meant is read."""
        pattern = evolve(self.copies, status=TRANSFERRED)
        found = [one for one in run.copies if pattern.means(one)]
        if not found:
            return [Step(run, self.what, "there is no such good copy", ok=None)]
        return [_readable(run, one, context) for one in found]


def _readable(run: Run, copy: Copy, context: ActContext) -> Step:
    if context.sites.find(copy.host) is None:
        return Step(run, str(copy.key), f"{copy.host} is not a site of sites.json", ok=None)
    if copy.location is None:
        return Step(run, str(copy.key), "it has no location", ok=None)
    return reading(run, copy, context)
