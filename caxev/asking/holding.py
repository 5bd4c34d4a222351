"""Hold copies, so that no rule deletes them, and end holds. Pure.

`caxev.copies.holds` has what a hold is. Each person has one on a copy: a new one replaces it.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import ClassVar, Self

from attrs import evolve, field, frozen

from caxev.asking.base import ActContext, AtSite, Step
from caxev.config import Site
from caxev.copies.deletion import hold as holding
from caxev.copies.holds import COMING, standing, terms, words
from caxev.copies.retention import days_kept
from caxev.core.clock import utcnow
from caxev.core.entry import Hold
from caxev.core.history import HistoryRow, What
from caxev.core.model import REQUESTED, Copy, CopyKey, Run


@frozen
class Keep:
    """How long to keep a copy, as a person gave it: so many days, or until a time (UTC)."""

    days: float | None = None
    until: datetime | None = None
    why: str | None = None

    @classmethod
    def of(cls, length: timedelta | None, until: datetime | None, why: str | None) -> Self:
        """Take it as a person gave it. Raises ValueError."""
        if length is not None and until is not None:
            raise ValueError("keep it for a time, or until one, not both")
        if until is not None and until <= utcnow():
            raise ValueError(f"{until:%Y-%m-%d %H:%M} UTC has passed already")
        return cls(None if length is None else length / timedelta(days=1), until, why)

    @property
    def is_given(self) -> bool:
        """Whether the person gave a length or an end."""
        return self.days is not None or self.until is not None

    def of_request(self, target: CopyKey, site: Site, by: str) -> Hold | None:
        """Return the hold of a copy that is requested at a site; None if no rule would end it.

        By default it is for as many days as ``purge`` names, from the copy's arrival on.
        """
        keep = self if self.is_given else evolve(self, days=days_kept(target, site))
        return keep.hold(REQUESTED, by) if keep.is_given else None

    def hold(self, status: str, by: str) -> Hold:
        """Return the hold of a copy that has this status. Its days count from the arrival."""
        now, until, days = utcnow(), self.until, self.days
        if days is not None and status not in COMING:
            until, days = now + timedelta(days=days), None
        return Hold(by, self.why or "", now, until, days)


@frozen
class HoldCopies(AtSite):
    """Keep copies at a site; a deletion that is under way is withdrawn unless bytes are going."""

    kind: ClassVar[str] = "hold"
    keep: Keep = field(factory=Keep)

    def step(self, run: Run, context: ActContext) -> Step:
        """Decide about a run."""
        copy, now = self.data.copy(run, self.site), utcnow()
        if copy is None:
            return Step(run, self.what, "there is no such copy", ok=False)
        mine = self.keep.hold(copy.status, context.by)
        others = [one for one in standing(copy, now) if one.by != mine.by]
        row = context.row(run, copy.key, What.HELD, terms(copy, mine))
        return _written(run, copy, [*others, mine], words(copy, mine), row)


@frozen
class ReleaseCopies(AtSite):
    """End the person's holds of copies at a site; with `everybody` those of others, too."""

    kind: ClassVar[str] = "release"
    everybody: bool = False

    def step(self, run: Run, context: ActContext) -> Step:
        """Decide about a run."""
        copy = self.data.copy(run, self.site)
        left = [] if copy is None else standing(copy, utcnow())
        if copy is None or not left:
            return Step(run, self.what, "nobody holds it", ok=False)
        stays = [] if self.everybody else [one for one in left if one.by != context.by]
        still = f"{words(copy, stays[0])}: --all ends that, too" if stays else ""
        if stays == left:
            return Step(run, str(copy.key), still, ok=False)
        gone = [one.by for one in left if one not in stays and one.by != context.by]
        ended = ", ".join(dict.fromkeys(gone))
        row = context.row(run, copy.key, What.RELEASED, f"the hold of {ended}" if ended else "")
        return _written(run, copy, stays, f"released; still {still}" if still else "released", row)


def _written(run: Run, copy: Copy, holds: list[Hold], state: str, row: HistoryRow) -> Step:
    update = holding(run, copy, holds)
    if update is None:
        return Step(run, str(copy.key), "it is being erased: too late", ok=False)
    return Step(run, str(copy.key), state, update, size=run.size_of(copy), row=row)
