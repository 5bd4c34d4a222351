"""Forgetting copies: their entries are removed, but no data. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from attrs import frozen

from caxev.asking.base import ActContext, AtSite, Step
from caxev.asking.catalogues import entries_at
from caxev.core.clock import utcnow
from caxev.core.history import What
from caxev.core.model import Copy, Run
from caxev.core.update import RunUpdate


@frozen
class ForgetCopies(AtSite):
    """Remove the entries of data at a site, of any status or one; `why` is kept."""

    kind: ClassVar[str] = "forget"
    why: str
    status: str | None = None

    def steps(self, run: Run, context: ActContext) -> Iterable[Step]:
        """Decide about a run: each of its entries goes."""
        found = entries_at(run, self.data, self.site)
        found = [one for one in found if self.status in (None, one.status)]
        if not found:
            return [Step(run, self.what, "there is no such entry")]
        return [self._step(run, copy, context) for copy in found]

    def _step(self, run: Run, copy: Copy, context: ActContext) -> Step:
        planned = f"would be forgotten: it is {copy.status}"
        row = context.row(run, copy.key, What.FORGOTTEN, self.why)
        # Unlike the tombstone of a deletion it records that nothing was deleted.
        proof = f"status {copy.status}; nothing at {copy.host} was deleted"
        tombstone = {"by": context.by, "at": utcnow(), "why": self.why, "proof": proof}
        update = RunUpdate.remove_copy(run, copy, tombstone=tombstone)
        size = run.size_of(copy)
        return Step(run, str(copy.key), "forgotten", update, planned, size=size, row=row)
