"""The steps of a deletion, and what proves that a copy may go. Pure.

`caxev.copies.retention` decides which copies may go. `caxev.handlers.deletion` and, for datasets of
a catalogue, `caxev.handlers.rucio_datasets` take the steps. There are four, each a conditional
write: the *intent* (the copy is ``deleting`` and counts for no other deletion any more), the
*proof* (enough other copies were read again), the point of no return (``erasing``), and, after the
bytes, the removal of the entry, which leaves a tombstone. Before the third step a deletion can be
withdrawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, Final, TypeAlias

from attrs import frozen

from caxev.config import DataTypes, Site, Sites
from caxev.config.data_types import CAX
from caxev.copies.holds import as_seen, held, rows, stays
from caxev.copies.readings import Ask
from caxev.copies.remaining import enough, unread
from caxev.copies.retention import DeletionPlan
from caxev.core.clock import Clocks
from caxev.core.entry import Hold, as_utc, text
from caxev.core.job import Skip, Wait
from caxev.core.model import DELETING, ERROR, TRANSFERRED, Copy, CopyIs, Run, new_id
from caxev.core.moments import after
from caxev.core.update import CopiesAtLeast, Expectation, Fresh, RunUpdate, TagAbsent

MARKS: Final = ("mark", "moved_mark")
"""Fields of an entry that identify the files to erase, at its location and its ``moved_from``."""


def intent(
    run: Run, wanted: DeletionPlan, sites: Sites, now: datetime, *, bulk: str | None = None
) -> RunUpdate:
    """Return the first step: this copy does not count any more, and nobody begins to read it.

    `bulk` is the id of the request for many deletions that this is one of.
    """
    copy = wanted.copy
    deletion = {
        "by": wanted.by,
        "why": wanted.why,
        "keep": wanted.keep,
        "at": now,
        "request": new_id(),
        "was": copy.status,
        "by_entries": wanted.by_entries,
        "manifest": wanted.like.manifest,
        "checksum": wanted.like.checksum,
        **({} if bulk is None else {"bulk": bulk}),
    }
    # The entry may keep the fields of an earlier deletion that was withdrawn: its proof must not
    # serve this one.
    return RunUpdate.change_copy(
        run,
        copy,
        DELETING,
        *enough(run, copy.key, wanted.keep, wanted.like, sites),
        unread(copy.key, sites, now),
        copy.having("location", "manifest"),
        as_seen(copy),
        deletion=deletion,
        proof=None,
        erasing=None,
        withdrawn=None,
    )


@frozen
class Intent:
    """The intent in the entry of a copy that is ``deleting``.

    `request` is the id of its requests to read the other copies again, `bulk` that of the request
    for many deletions that this is one of.
    """

    by: str
    why: str
    keep: int
    at: datetime
    request: str
    was: str
    like: Copy
    by_entries: bool = False
    bulk: str | None = None

    @classmethod
    def of(cls, copy: Copy, types: DataTypes = CAX) -> Intent | None:
        """Read the intent of an entry; None if there is none, or it is invalid."""
        row = copy.deletion
        if copy.status != DELETING or row is None:
            return None
        keep, at, was = row.get("keep"), as_utc(row.get("at")), row.get("was")
        if not isinstance(keep, int) or at is None or was not in (TRANSFERRED, ERROR):
            return None
        # Again, as someone may have edited the entry since.
        if copy.type in types.protected:
            keep = max(keep, 1)
        digests = {name: row.get(name) for name in ("manifest", "checksum")}
        like = Copy(copy.key, TRANSFERRED, digests)
        request = str(row.get("request") or f"{copy.key} {at}")
        by_entries = row.get("by_entries") is True and was == ERROR
        by, why = str(row.get("by")), str(row.get("why"))
        bulk = text(row.get("bulk"))
        return cls(by, why, keep, at, request, was, like, by_entries, bulk)

    def fresh(self, site: Site, clocks: Clocks) -> Fresh | None:
        """Return which readings of other copies count: those for this request, or recent ones.

        None means that their entries are enough.
        """
        if self.by_entries:
            return None
        rules = site.deletion
        if rules.proof_days <= 0:
            return Fresh(self.request, until=clocks.earliest)
        # The clock that wrote `at` may have been behind, which would accept older readings.
        begun = max(self.at, clocks.latest - timedelta(days=rules.patience))
        return Fresh(self.request, begun - timedelta(days=rules.proof_days), clocks.earliest)

    def enough(self, run: Run, sites: Sites, clocks: Clocks) -> tuple[CopiesAtLeast, ...]:
        """Return the expectations on the other copies, with their readings."""
        key = self.like.key
        fresh = self.fresh(sites.get(key.host), clocks)
        return enough(run, key, self.keep, self.like, sites, fresh=fresh)


@frozen
class Proven:
    """Enough others are good: the copy may go."""

    proof: list[dict[str, Any]]


@frozen
class Withdraw:
    """The copy is needed, or it cannot be proven that it is not."""

    why: str


Step: TypeAlias = Proven | Wait | Withdraw | Skip


def weigh(run: Run, copy: Copy, sites: Sites, clocks: Clocks) -> Ask | Step:
    """Decide the next step for a copy to delete."""
    site = sites.get(copy.host)
    wanted = Intent.of(copy, site.types)
    if wanted is None:
        return Skip(f"it is {copy.status}, and does not name who requested that")
    if copy.is_erasing:
        return Skip("its files are being erased")
    # Until the third step, even if a proof exists.
    if (why := _protected(run, copy, site, clocks.earliest)) is not None:
        return Withdraw(why)
    needed = wanted.enough(run, sites, clocks)
    if all(one.holds(run) for one in needed):
        return Proven(_proof(run, needed))
    by_entry = enough(run, copy.key, wanted.keep, wanted.like, sites)
    if not all(one.holds(run) for one in by_entry):
        return Withdraw(f"fewer than {wanted.keep} good copies are left elsewhere")
    until = after(wanted.at, timedelta(days=site.deletion.patience))
    stale = [one for one in run.copies if by_entry[0].counts(one) and not needed[0].counts(one)]
    # By the earliest possible time, so that a clock which is ahead withdraws nothing.
    if until <= clocks.earliest:
        names = ", ".join(sorted(one.host for one in stale))
        return Withdraw(f"no answer from {names} for {site.deletion.patience:g} days")
    unasked = tuple(one for one in stale if not _was_asked(one, wanted.request))
    if unasked:
        return Ask(unasked, wanted.request)
    return Wait(f"waits for a fresh reading at {', '.join(one.host for one in stale)}", until)


def _protected(run: Run, copy: Copy, site: Site, now: datetime) -> str | None:
    """Return which tag or person's wish protects a copy to delete, or None."""
    tags = [tag for tag in site.deletion.protect if tag in run.tags]
    if tags:
        return f"the run was tagged {', '.join(tags)} meanwhile"
    wish = stays(run, copy, now)
    return None if wish is None else wish.why


def _was_asked(copy: Copy, request: str) -> bool:
    return any(one.id == request for one in copy.asked)


def _proof(run: Run, needed: tuple[CopiesAtLeast, ...]) -> list[dict[str, Any]]:
    return [
        {
            "host": copy.host,
            "manifest": copy.manifest,
            "checksum": copy.checksum,
            "verified_at": copy.verified_at,
        }
        for copy in run.copies
        if any(one.counts(copy) for one in needed)
    ]


def still(copy: Copy) -> CopyIs:
    """Return the expectation that this intent still holds and nothing has been erased."""
    # The whole intent is compared: a process that was stopped for long may find a later one.
    return CopyIs(copy.key, {"erasing": None, "status": DELETING, **copy.having("deletion").fields})


def _proven(run: Run, copy: Copy, sites: Sites, clocks: Clocks) -> list[Expectation]:
    """Return the expectations that the intent still holds, is proven, and nothing protects it."""
    site = sites.get(copy.host)
    wanted = Intent.of(copy, site.types)
    assert wanted is not None
    tags = (TagAbsent(tag) for tag in site.deletion.protect)
    return [still(copy), *wanted.enough(run, sites, clocks), as_seen(copy), *tags]


def prove(run: Run, copy: Copy, sites: Sites, *, proof: Any, clocks: Clocks) -> RunUpdate:
    """Return the second step: record the proof, if it still holds."""
    return RunUpdate.note(run, copy, *_proven(run, copy, sites, clocks), proof=proof)


def begin(
    run: Run,
    copy: Copy,
    sites: Sites,
    *,
    proof: Any,
    clocks: Clocks,
    marks: Mapping[str, str] | None = None,
) -> RunUpdate:
    """Return the third step: its bytes are erased, if the proof still holds and nobody reads it.

    `marks` identify the files to erase, by the fields `MARKS`.
    """
    # Marks are recorded here, once: a successor could not know whether the files that it finds at
    # the location are still this copy.
    expect = _proven(run, copy, sites, clocks)
    expect += [copy.having("location"), unread(copy.key, sites, clocks.earliest)]
    return RunUpdate.note(run, copy, *expect, erasing=clocks.now, proof=proof, **(marks or {}))


def go_on(run: Run, copy: Copy) -> RunUpdate:
    """Return the third step again, for a successor; it checks and changes nothing."""
    return RunUpdate.note(run, copy, begun(copy), **copy.having("erasing").fields)


def begun(copy: Copy) -> CopyIs:
    """Return the expectation that this copy is being erased, and not a later one."""
    seen = copy.having("deletion", "erasing", "location", *MARKS)
    return CopyIs(copy.key, {"status": DELETING, **seen.fields})


def why_of(copy: Copy, wanted: Intent) -> dict[str, Any]:
    """Return who asked for a deletion, why, and its proof, as facts for `Job.did`."""
    proof = copy.proof if isinstance(copy.proof, list) else []
    hosts = [str(row.get("host")) for row in proof if isinstance(row, Mapping)]
    return {"by": str(wanted.by or ""), "reason": str(wanted.why or ""), "proof": hosts}


def tombstone(copy: Copy, wanted: Intent, owner: str, size: int | None) -> dict[str, Any]:
    """Return the tombstone of the last step: who asked and why, who deleted it, the proof.

    `size` is the copy's bytes: of raw data its entry need not have them.
    """
    return {
        "by": wanted.by,
        "why": wanted.why,
        "asked": wanted.at,
        "by_entries": wanted.by_entries,
        "site": owner,
        "proof": copy.proof,
        "size": size,
        "arrived_at": copy.arrived_at,
        **({} if wanted.bulk is None else {"bulk": wanted.bulk}),
    }


def withdraw(run: Run, copy: Copy, wanted: Intent, why: str, now: datetime) -> RunUpdate:
    """Withdraw the intent: the copy gets its old status back, and its entry the reason.

    The rules try again after the site's ``patience``, but for a copy that is held when that ends.
    """
    note = None if held(copy, now) else {"at": now, "why": why}
    fields = {"deletion": None, "proof": None, "withdrawn": note}
    return RunUpdate.change_copy(run, copy, wanted.was, still(copy), **fields)


def hold(run: Run, copy: Copy, holds: Iterable[Hold]) -> RunUpdate | None:
    """Return the update that gives a copy these holds; None if its bytes are being erased already.

    A deletion that is under way is withdrawn by it.
    """
    if copy.is_erasing:
        return None
    fields, wanted = {"holds": rows(holds)}, Intent.of(copy)
    if wanted is None:
        return RunUpdate.note(run, copy, as_seen(copy), **fields)
    over = {"deletion": None, "proof": None, "withdrawn": None}
    expect = (still(copy), as_seen(copy))
    return RunUpdate.change_copy(run, copy, wanted.was, *expect, **over, **fields)
