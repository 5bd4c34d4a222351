"""Acts on a catalogue: upload data, fetch it, give it up, or free a disk. Pure.

`caxev.rucio` has the catalogue itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from attrs import field, frozen

from caxev.asking.base import ActContext, AtSite, DataChoice, Step
from caxev.asking.copies import CopyPath, CopyRequests, new_request, request_row
from caxev.asking.deletions import Deletions, deletion, plan_asked
from caxev.asking.holding import Keep
from caxev.asking.readings import reading
from caxev.config import Site
from caxev.copies.retention import DeletionPlan, DeletionWish
from caxev.core.clock import utcnow
from caxev.core.errors import NothingToDo
from caxev.core.model import DELETING, REQUESTED, TRANSFERRED, Copy, CopyKey, Run
from caxev.core.update import RunUpdate

AGAIN: Final = ("RSEreupload", "RSEquota", "error")
"""States of an entry whose upload can be tried again."""


@frozen
class CopyCatalogued(CopyRequests):
    """Upload data to a catalogue, or fetch it to a site; `extra` goes into the new entries."""

    kind: ClassVar[str] = "rucio"
    data: DataChoice
    source: str
    target: str
    extra: Mapping[str, str] = field(factory=dict)

    @property
    def what(self) -> str:
        return f"{self.data.kind} from {self.source} to {self.target}"

    def step(self, run: Run, context: ActContext) -> Step:
        """Decide about a run. Raises `NothingToDo` if the source has no good copy, or several."""
        copy = self.data.copy(run, self.source)
        if copy is None or copy.status != TRANSFERRED:
            found = "no such copy" if copy is None else f"it as {copy.status}"
            raise NothingToDo(f"{self.source} has {found}")
        there = run.copy(copy.key.at(self.target))
        # Only an upload is repeated here. A failed copy at a site is repaired by its own listener.
        is_upload = context.sites.get(self.target).method == "rucio"
        if there is not None and not (is_upload and there.status in AGAIN):
            return Step(run, self.what, f"there already: {there.status}", ok=True)
        path = CopyPath(copy.key, copy.key.at(self.target))
        hold = Keep().of_request(path.target, context.sites.get(self.target), context.by)
        if there is not None:
            hold, update = None, self._anew(run, there, context)
        else:
            update = new_request(
                run, path, context.by, utcnow(), hold, bulk=context.request, **self.extra
            )
        row = request_row(run, path, context, hold)
        return Step(run, self.what, REQUESTED, update, size=copy.size, row=row)

    def _anew(self, run: Run, there: Copy, context: ActContext) -> RunUpdate:
        anew: dict[str, Any] = {"source": self.source, "bulk": context.request}
        none = dict.fromkeys(("trigger", "owner", "error", "checksumproblem"))
        return RunUpdate.change_copy(run, there, REQUESTED, **anew, **none)


@frozen
class GiveUpDatasets(AtSite, Deletions):
    """Give up datasets, so that the catalogue `site` deletes all replicas."""

    kind: ClassVar[str] = "rucio rm"
    why: str

    def step(self, run: Run, context: ActContext) -> Step:
        """Decide about a run."""
        found = self.data.copy(run, self.site)
        if found is None:
            return Step(run, self.what, "the catalogue has no such copy")
        return _deletion(run, found, context.sites.get(self.site), context, self.why)

    def refusal(self, run: Run, why: Exception) -> Step:
        """Return the step of a dataset that stays, for this reason."""
        return Step(run, self.what, f"kept: {why}")


@frozen
class FreeDisk(AtSite, Deletions):
    """Delete copies at a site that the catalogue has, too.

    If the replicas of a dataset were never compared, that is requested first.
    """

    kind: ClassVar[str] = "rucio purge"
    catalogue: str

    def step(self, run: Run, context: ActContext) -> Step:
        """Decide about a run."""
        entry = self.data.copy(run, self.catalogue)
        if entry is None or entry.status != TRANSFERRED:
            found = "no such copy" if entry is None else f"it as {entry.status}"
            return Step(run, self.what, f"kept: the catalogue has {found}", ok=True)
        copy = run.copy(CopyKey(self.data.kind, self.site, entry.version))
        if copy is None:
            return Step(run, self.what, f"{self.site} has none", ok=True)
        # A proof counts only copies whose bytes were read; without that the intent would just wait.
        if entry.read_at is None:
            kept = "kept: its replicas were never compared"
            asked = reading(run, entry, context)
            state = f"{kept}: requested now"
            return Step(run, self.what, state, asked.update, kept, ok=False, row=asked.row)
        return _deletion(run, copy, context.sites.get(self.site), context, "caxev rucio purge")


def _deletion(run: Run, copy: Copy, here: Site, context: ActContext, why: str) -> Step:
    """Return the step that deletes a copy. Raises `NothingToDo` if it is kept."""
    if copy.status == DELETING:
        return Step(run, f"{copy.type} at {here.name}", "is being deleted already", ok=True)
    # Derived data can be made again from raw data: one other copy is enough.
    keep = here.deletion.copies if copy.type in here.types.protected else 1
    wish = DeletionWish(copy, context.by, why, keep)
    wanted = plan_asked(run, wish, here, context)
    if not isinstance(wanted, DeletionPlan):
        raise NothingToDo(wanted.why, copy.status)
    return deletion(run, wanted, context)
