"""Which copy is right, if copies contradict each other and no majority decides. Pure.

The act writes a mark to that copy's entry; `caxev.handlers.judge` at each site does the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime

from attrs import frozen

from caxev.asking.base import ActContext, AtSite, Step
from caxev.asking.deletions import copy_at
from caxev.copies.quorum import VOUCHED, Same, same_data, voters
from caxev.copies.storage import same_bytes
from caxev.core.clock import utcnow
from caxev.core.errors import NothingToDo
from caxev.core.history import What
from caxev.core.model import ERROR, Copy, Run, new_id
from caxev.core.update import RunUpdate


@frozen
class VouchFor(AtSite):
    """Decide that a site's copy is the right one: the others are compared with it."""

    why: str | None = None

    def steps(self, run: Run, context: ActContext) -> Iterable[Step]:
        """Return the mark, and then what has every other copy judged again by its own site.

        Raises `NothingToDo` if this copy cannot be the right one.
        """
        same, now = same_bytes(context.sites), utcnow()
        copy = copy_at(run, self.data, self.site)
        if copy not in voters(run, copy.key, same):
            raise NothingToDo(f"{copy.key} is bad or has no digest yet: it cannot be vouched for")
        mark = RunUpdate.note(run, copy, **{VOUCHED: {"by": context.by, "at": now}})
        state = f"{copy.key} of {run} is now the reference; the other copies are compared with it"
        reason = f"the others are compared with it{f': {self.why}' if self.why else ''}"
        row = context.row(run, copy.key, What.VOUCHED, reason)
        yield Step(run, self.what, state, mark, row=row)
        # The mark first: the judgements that these writes trigger must find it.
        for update in again(run, copy, same, now):
            yield Step(run, self.what, "judged again", update)


def again(run: Run, right: Copy, same: Same, now: datetime) -> Iterator[RunUpdate]:
    """Return the writes that have each copy judged again. Pure.

    Copies are read again; bad ones get their status again. If several entries have the same bytes,
    one is read, and each site judges its own entry by the answer.
    """
    those = voters(run, right.key, same)
    for one in run.copies:
        if one in those:
            yield RunUpdate.ask(run, one, new_id(), now)
        elif same_data(one, right.key) and one.status == ERROR:
            # The same status with a new time is a change, to which the site's handlers react.
            yield RunUpdate.change_copy(run, one, ERROR)
