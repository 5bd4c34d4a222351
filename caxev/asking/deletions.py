"""Deletions that people request, as intents like those of the sites' own rules. Pure.

`ForgetCopies` removes entries, but no data.

The listener of the copy's site proves that enough others are good, and deletes it.
`caxev.copies.retention` decides, `caxev.copies.deletion` has the steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from attrs import field, frozen

from caxev.asking.base import DONE, ActContext, AtSite, DataChoice, RequestedAct, Step
from caxev.config import Site
from caxev.copies.deletion import Intent, intent, withdraw
from caxev.copies.retention import DeletionPlan, DeletionWish, plan
from caxev.copies.storage import custodian
from caxev.core.clock import utcnow
from caxev.core.entry import mapping, rows
from caxev.core.errors import ConfigError, NothingToDo
from caxev.core.history import What
from caxev.core.job import Skip, Wait
from caxev.core.model import DELETING, YES, Copy, CopyField, Event, Run
from caxev.core.update import RunUpdate

_GOES = "be deleted, once the others were read"


@frozen
class Terms:
    """The terms of a deletion: the waived conditions, and the reason.

    `less`: fewer copies may remain; `by_entries`: they are not read first.
    """

    less: bool = False
    by_entries: bool = False
    why: str | None = None


class Deletions(RequestedAct):
    """The base of requests for deletions: the intent and the tombstone name the request."""

    def refusal(self, run: Run, why: Exception) -> Step:
        """Return the step of a copy that stays, for this reason."""
        return Step(run, self.what, f"kept: {why}", ok=None)

    def state_of(self, run: Run, request: str) -> str | None:
        """Return how far the run's copy is. None also if its deletion was withdrawn."""
        if _of(run, request) is not None:
            return DELETING
        return None if _stone(run, request) is None else DONE

    def withdrawals(self, run: Run, context: ActContext) -> Iterable[Step]:
        """Return the step that gives the copy its old status back."""
        copy = _of(run, context.request or "")
        return [] if copy is None or copy.is_erasing else [withdrawal(run, copy, context)]

    def size_of(self, run: Run, request: str) -> int:
        """Return the bytes of the copy, as far as they are known."""
        copy, stone = _of(run, request), _stone(run, request) or {}
        if copy is not None:
            return run.size_of(copy) or 0
        size = stone.get("size")
        return size if isinstance(size, int) else 0


def _stone(run: Run, request: str) -> Mapping[str, Any] | None:
    """Return the tombstone of the copy that is gone by this request."""
    stones = filter(None, map(mapping, rows(run.document.get("deleted_data"))))
    return next((one for one in stones if one.get("bulk") == request), None)


def _of(run: Run, request: str) -> Copy | None:
    """Return the copy to delete by this request."""
    those = ((one, Intent.of(one)) for one in run.copies)
    return next((one for one, wanted in those if wanted and wanted.bulk == request), None)


def withdrawal(run: Run, copy: Copy, context: ActContext) -> Step:
    """Return the step that withdraws an intent. Raises `NothingToDo` if it is too late."""
    wanted = Intent.of(copy)
    if wanted is None:
        raise NothingToDo(f"{copy.key} is {copy.status}", copy.status)
    # `erasing` is set before the first file goes.
    if copy.is_erasing:
        raise NothingToDo(f"{copy.key} is being erased: too late", copy.status)
    why = f"withdrawn by {context.by}"
    row = context.row(run, copy.key, What.CANCELLED, f"its deletion, which {wanted.by} requested")
    return Step(run, str(copy.key), why, withdraw(run, copy, wanted, why, utcnow()), row=row)


def plan_asked(
    run: Run, wish: DeletionWish, here: Site, context: ActContext
) -> DeletionPlan | Skip | Wait:
    """Decide as `plan` whether a copy may go, and whether a listener would delete it."""
    decision = plan(run, wish, here, context.sites, utcnow())
    why = _unserved(run, wish.copy, context) if isinstance(decision, DeletionPlan) else None
    return decision if why is None else Skip(why)


def _unserved(run: Run, copy: Copy, context: ActContext) -> str | None:
    """Return why no listener would take the steps of a deletion: its intent would stay."""
    here = context.sites.find(custodian(copy, context.sites) or "")
    if here is None:
        return f"no site looks after what is at {copy.host}"
    if not here.wants_run(run.name):
        return f"dataset_list of {here.name} leaves {run} out"
    try:
        registry = context.registry(here.name)
    except ConfigError:
        return None  # the site has handlers that this machine lacks: only it can decide
    going = Event(run.id, copy.key, copy.status, DELETING)
    proven = Event(run.id, CopyField(*copy.key, "proof"), None, YES)
    if registry.wanting(going) and registry.wanting(proven):
        return None
    return f"no handler that {here.name} enables deletes such a copy (task_list)"


def deletion(run: Run, wanted: DeletionPlan, context: ActContext) -> Step:
    """Return the step that writes an intent."""
    copy = wanted.copy
    return Step(
        run,
        str(copy.key),
        f"will {_GOES}",
        intent(run, wanted, context.sites, utcnow(), bulk=context.request),
        f"would {_GOES}",
        size=run.size_of(copy),
        row=context.row(run, copy.key, What.REQUESTED, f"its deletion: {wanted.why}"),
    )


@frozen
class DeleteCopies(AtSite, Deletions):
    """Delete copies at a site, on these terms."""

    kind: ClassVar[str] = "rm"
    terms: Terms = field(factory=Terms)

    def step(self, run: Run, context: ActContext) -> Step:
        """Decide about a run. Raises `NothingToDo` if the copy stays."""
        copy, here = copy_at(run, self.data, self.site), context.sites.get(self.site)
        # Derived data can be made again, so its usual number is 1, and `less` needs none.
        is_protected = copy.type in here.types.protected
        usual, least = (here.deletion.copies, 1) if is_protected else (1, 0)
        terms, keep = self.terms, least if self.terms.less else usual
        wish = DeletionWish(copy, context.by, terms.why or "caxev rm", keep, terms.by_entries)
        decision = plan_asked(run, wish, here, context)
        if not isinstance(decision, DeletionPlan):
            raise NothingToDo(decision.why, copy.status)
        # Such an intent would wait until the disk is back, and the person should know.
        for root, why in context.away(self.site).items():
            if f"{copy.location}".startswith(root.rstrip("/") + "/"):
                raise NothingToDo(f"{why} (reported by {self.site}'s listener)", copy.status)
        return deletion(run, decision, context)


@frozen
class WithdrawDeletions(AtSite):
    """Withdraw the deletion of copies at a site, while the files are still there."""

    kind: ClassVar[str] = "rm --cancel"

    def step(self, run: Run, context: ActContext) -> Step:
        """Decide about a run. Raises `NothingToDo` if it is too late, or there is none."""
        return withdrawal(run, copy_at(run, self.data, self.site), context)


@frozen
class ForgetCopies(AtSite):
    """Remove the entries of data at a site, of any status or one; `why` is kept."""

    kind: ClassVar[str] = "forget"
    why: str
    status: str | None = None

    def steps(self, run: Run, context: ActContext) -> Iterable[Step]:
        """Decide about a run: each of its entries goes."""
        found = self.data.entries(run, self.site)
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


def copy_at(run: Run, data: DataChoice, site: str) -> Copy:
    """Return the run's copy of this data at a site. Raises `NothingToDo` if there is none."""
    found = data.copy(run, site)
    if found is None:
        raise NothingToDo(f"{run} has no {data.kind} copy at {site}", "gone")
    return found
