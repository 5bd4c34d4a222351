"""Acts on archives on tape: bring raw data there, back, or read it again. Pure.

Only raw data goes to tape. `caxev.tape` has the archives themselves.
"""

from __future__ import annotations

from typing import ClassVar

from attrs import frozen

from caxev.asking.base import ActContext, Step
from caxev.asking.copies import CopyPath, CopyRequests, new_request, request_row, why_not
from caxev.asking.holding import Keep
from caxev.asking.readings import Readings, reading
from caxev.core.clock import utcnow
from caxev.core.errors import NothingToDo
from caxev.core.model import REQUESTED, TRANSFERRED, Copy, CopyKey, Run


@frozen
class BringRaw(CopyRequests):
    """Bring raw data to a site, from the first of these that has it: to tape, or back from there.

    With `held` it is held there as one that `CopyData` requests.
    """

    kind: ClassVar[str] = "tape"
    sources: tuple[str, ...]
    target: str
    held: bool = False

    @property
    def what(self) -> str:
        return f"raw to {self.target}"

    def step(self, run: Run, context: ActContext) -> Step:
        """Decide about a run. Raises `NothingToDo` with the first source's reason."""
        # The first one is the site that usually brings data there.
        reasons = []
        for name in self.sources:
            path = CopyPath(CopyKey("raw", name), CopyKey("raw", self.target))
            if (why := why_not(run, path)) is None:
                return self._from(run, path, context)
            reasons.append(why)
        raise NothingToDo(reasons[0] if reasons else f"no site uploads to {self.target}")

    def _from(self, run: Run, path: CopyPath, context: ActContext) -> Step:
        hold = None
        if self.held:
            hold = Keep().of_request(path.target, context.sites.get(self.target), context.by)
        what = f"raw from {path.source.host} to {self.target}"
        update = new_request(run, path, context.by, utcnow(), hold, bulk=context.request)
        row = request_row(run, path, context, hold)
        return Step(run, what, REQUESTED, update, size=run.raw_size, row=row)


@frozen
class ReadArchived(Readings):
    """Have copies on tape read again, by the site that brought them there."""

    kind: ClassVar[str] = "tape check"
    archive: str

    @property
    def what(self) -> str:
        return f"raw at {self.archive}"

    def step(self, run: Run, context: ActContext) -> Step:
        """Decide about a run. Raises `NothingToDo` if it is not on tape."""
        copy = run.copy(CopyKey("raw", self.archive))
        if copy is None or copy.status != TRANSFERRED:
            raise NothingToDo(unusable(copy))
        return reading(run, copy, context)


def unusable(copy: Copy | None) -> str:
    """Return why a copy on tape cannot be used."""
    return "it is not on tape" if copy is None else f"the copy on tape is {copy.status}"
