"""Deletion of copies, each with a proof that enough others are good.

- `purge` and `purge_processed` mark a copy for deletion by the site's rules: raw data and other
  data that is made from none by its age (``purge``), processed data and the like by its version
  (``pax_version_purge``, ``purge_versions``). `make_room` marks the oldest
  if the disk is full (``deletion.when_full``), a person any by ``caxev rm``. All record the same
  intent: the copy becomes ``deleting``, by a write that counts the other good copies.
- `prove` requests fresh readings of the others, waits for them, and records the proof. If too few
  good copies are left it withdraws the intent, and the copy gets its old status back.
- `erase` erases the bytes, then the entry, and leaves a tombstone in ``deleted_data``.

A copy that a person holds (``holds``, see `caxev.copies.holds`) is neither marked nor erased, and
each of these steps expects that no hold has come. `purge` and `purge_processed` are due again when
the last hold ends, and react when one is released.

`caxev.copies.retention` decides what may go. Safe to repeat: each step is a conditional write, and
until `erase` has written ``erasing`` no file has changed. From then on the deletion is completed,
whichever process crashes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Final

from caxev import (
    DELETING,
    ELSEWHERE,
    ERROR,
    GONE,
    HERE,
    PRIMARY,
    TRANSFERRED,
    TRANSFERRING,
    VERIFYING,
    VERSIONED,
    Copy,
    CopyKey,
    Decision,
    GiveUp,
    Job,
    Manifest,
    Result,
    Retry,
    Run,
    RunUpdate,
    Skip,
    What,
    copy,
    copy_field,
    on,
    skip_of,
    tag,
)
from caxev.config import Site
from caxev.copies.deletion import (
    Intent,
    Proven,
    Step,
    Withdraw,
    begin,
    begun,
    go_on,
    intent,
    tombstone,
    weigh,
    why_of,
    withdraw,
)
from caxev.copies.deletion import prove as proven
from caxev.copies.lifecycle import key_of, manifest_of, write
from caxev.copies.quorum import same_data
from caxev.copies.readings import Ask, decided
from caxev.copies.remaining import unread
from caxev.copies.retention import DeletionPlan, InUse, plan_processed, plan_purge
from caxev.copies.sharing import sharing
from caxev.copies.storage import custodian, sites_sharing_storage
from caxev.core.job import Wait
from caxev.core.model import STATUSES
from caxev.files import MOVED_PREFIX, empty_quarantine, standing
from caxev.files import erase as erase_files
from caxev.files.erasing import NOTHING, distinct
from caxev.files.errors import Replaced
from caxev.files.space import lacking as lacking_bytes

REPLACED = "replaced"
"""The alarm about other files at the location of a copy whose erasure was interrupted."""
READ_AGAIN = 60.0
"""Seconds between two checks whether a copy to delete is still being read."""
LOOK_AGAIN = 15 * 60.0
"""Seconds between two checks of a disk that is too full for an incoming copy."""


BEGINNING: Final = ("purge", "purge_processed", "make_room", "BufferPurger", "PurgeProcessed")
"""Names that begin deletions: a ``task_list`` with any of them enables the handlers that finish
deletions, too. Else a marked copy would stay ``deleting``, and count for nothing."""

NOT_GOING: Final = Skip("this site deletes nothing of it")

# -- intent: a rule wants a copy gone -------------------------------------------------------------

_BESIDE: Final = (copy((TRANSFERRED, GONE), host=HERE), copy_field(STATUSES, host=HERE, gone=True))
"""Another entry, of any data, may have left the place of ours, or was moved."""


@on(
    copy((TRANSFERRED, DELETING, GONE), type=PRIMARY, host=HERE),  # the last two end a waiting
    copy((TRANSFERRED, ERROR, GONE), type=PRIMARY, host=ELSEWHERE),
    tag("*", gone=True),
    copy_field("holds", type=PRIMARY, host=HERE),  # one was released, or ends earlier or later
    *_BESIDE,
    aliases=("BufferPurger",),
    concerns=lambda run, site: site.name in run.hosts,
    decide=lambda job: _decision(job, _old(job)),
)
async def purge(job: Job) -> Result:
    """Mark raw data for deletion once it is older than ``purge`` days and good elsewhere."""
    return await _mark(job, _old(job))


@on(
    copy((TRANSFERRED, DELETING, GONE), type=VERSIONED, host=HERE),
    copy((TRANSFERRED, ERROR, GONE), type=VERSIONED, host=ELSEWHERE),
    copy_field("holds", type=VERSIONED, host=HERE),
    *_BESIDE,
    tag("*", gone=True),
    aliases=("PurgeProcessed",),
    concerns=lambda run, site: site.name in run.hosts,
    decide=lambda job: _decision(job, _outdated(job)),
)
async def purge_processed(job: Job) -> Result:
    """Mark data of the versions ``pax_version_purge`` and ``purge_versions`` for deletion."""
    return await _mark(job, _outdated(job))


Purge = DeletionPlan | Skip | Wait
Purges = Sequence[tuple[Copy | None, Purge]]
"""Our copies that an event may let go, and what the rule decides."""


def _old(job: Job) -> Purges:
    return _purges(job, plan_purge, job.site.types.primary)


def _outdated(job: Job) -> Purges:
    return _purges(job, plan_processed, job.site.types.versioned)


def _purges(job: Job, rule: Callable[..., Purge], types: Collection[str]) -> Purges:
    """Apply a rule to our copy of the data that came elsewhere, else to all ours of these types."""
    if job.copy is not None and job.copy.host != job.site.name:
        mine: Sequence[Copy | None] = [job.run.copy(job.copy.key.at(job.site.name))]
    else:
        here = (one for one in job.run.copies if one.host == job.site.name)
        mine = [one for one in here if one.type in types]
    return [(one, rule(job.run, one, job.site, job.sites, job.safe_now())) for one in mine]


def _decision(job: Job, purges: Purges) -> Decision:
    if any(_may_prove(job, mine) or isinstance(plan, DeletionPlan) for mine, plan in purges):
        return None
    # Only the reaction to our own copy waits for its age: one timer a copy is enough. But it may
    # have seen too few good copies, and ended; then the reaction to the last of them waits.
    for mine, plan in purges:
        if isinstance(plan, InUse) or (isinstance(plan, Wait) and job.copy is mine is not None):
            return plan
    return skip_of(*(Skip(plan.why) if isinstance(plan, Wait) else plan for _mine, plan in purges))


async def _mark(job: Job, purges: Purges) -> Result:
    """Record the intent to delete our copy; that change is the event for the next one."""
    if any(_may_prove(job, mine) for mine, _plan in purges):
        return await prove(job)
    for plan in (plan for _mine, plan in purges if isinstance(plan, DeletionPlan)):
        job.log.info(f"{plan.copy.key} of {job.run} is marked for deletion: {plan.why}")
        job.did(What.MARKED, reason=plan.why)
        return intent(job.run, plan, job.sites, job.now())
    decision = _decision(job, purges)
    if isinstance(decision, Wait):
        raise decision.retry(job.safe_now())
    return decision


def _may_prove(job: Job, mine: Copy | None) -> bool:
    """Return whether a new copy elsewhere may complete the proof for ours."""
    # It may replace a copy that never answers the request for a reading.
    came = job.copy is not None and job.copy.status == TRANSFERRED and job.copy is not mine
    return came and mine is not None and mine.status == DELETING and same_data(mine, key_of(job))


# -- proof: enough others are good ----------------------------------------------------------------


@on(
    copy((ERROR, DELETING, GONE)),
    copy_field("check_answered"),
    aliases=BEGINNING,
    decide=lambda job: None if _going(job) else NOT_GOING,
)
async def prove(job: Job) -> Result:
    """Have the other copies read again, and record the proof that ours may be deleted.

    Ours are the copy here, and one in a catalogue that this site looks after.
    """
    going = _going(job)
    if not going:
        return NOT_GOING
    waiting = {key: wait for key in going if (wait := await _prove(job, key)) is not None}
    if job.copy is not None and job.copy.key in waiting:
        raise waiting[job.copy.key].retry(job.safe_now())
    return None if job.has_noted else Skip("; ".join(wait.why for wait in waiting.values()))


def _going(job: Job) -> list[CopyKey]:
    return [one.key for one in job.run.copies if _is_ours_to_delete(job, one)]


def _is_ours_to_delete(job: Job, one: Copy) -> bool:
    is_going = one.status == DELETING and same_data(one, key_of(job))
    return is_going and custodian(one, job.sites) == job.site.name


async def _prove(job: Job, key: CopyKey) -> Wait | None:
    """Take the next step for a copy to delete; returns the `Wait` if it waits for others."""
    found: Step = await decided(job, partial(_weighed, job, key))
    match found:
        case Skip():
            return None
        case Wait():
            return found
    mine = job.run.copy(key)
    wanted = None if mine is None else Intent.of(mine, job.site.types)
    assert mine is not None
    assert wanted is not None
    if isinstance(found, Withdraw):
        job.log.warning(f"{key} of {job.run} is not deleted: {found.why}")
        job.did(What.WITHDRAWN, reason=found.why)
        await write(job, withdraw(job.run, mine, wanted, found.why, job.now()))
    else:
        hosts = [str(row["host"]) for row in found.proof]
        job.did(What.PROVEN, **{**why_of(mine, wanted), "proof": hosts})
        await write(job, proven(job.run, mine, job.sites, proof=found.proof, clocks=job.clocks()))
    return None


def _weighed(job: Job, key: CopyKey) -> Ask | Step:
    mine = job.run.copy(key)
    if mine is None:
        return Skip("the copy is gone")
    return weigh(job.run, mine, job.sites, job.clocks())


# -- erasing --------------------------------------------------------------------------------------


@on(
    copy_field("proof", host=HERE),
    lane="deletion",
    timeout=None,
    exclusive=True,
    aliases=BEGINNING,
    decide=lambda job: plan_erase(job.copy),
)
async def erase(job: Job) -> Result:
    """Erase a copy whose deletion is proven: its bytes, then its entry; a tombstone remains.

    Other files at its location, such as data that a person restored, are not touched.
    """
    mine = job.copy
    wanted = None if mine is None else Intent.of(mine, job.site.types)
    if mine is None or wanted is None or mine.proof is None:
        return plan_erase(mine)
    try:
        sure = await _sure(job, mine, wanted)
    except GiveUp as no:
        job.log.warning(f"{mine.key} of {job.run} is not deleted: {no.why}")
        job.did(What.WITHDRAWN, reason=no.why, by=wanted.by or "")
        return withdraw(job.run, mine, wanted, no.why, job.now())
    # Bytes before entry: a crash in between leaves an entry that is erased again. The other order
    # would leave files that no entry names.
    mine = (await write(job, sure)).copy(mine.key) or mine
    await _erase_files(job, mine)
    job.log.info(f"{mine.key} of {job.run} is deleted: {wanted.why}")
    size = await _size(job, job.run, mine)
    job.did(What.DELETED, bytes=size, **why_of(mine, wanted))
    stone = tombstone(mine, wanted, job.owner, size)
    return RunUpdate.remove_copy(job.run, mine, begun(mine), tombstone=stone)


async def _size(job: Job, run: Run, mine: Copy) -> int | None:
    """Return the copy's bytes, from the run or from its manifest; None if neither has them."""
    size = run.size_of(mine)
    if size is not None:
        return size
    known = await manifest_of(job, mine.manifest)
    return None if known is None else known.total_bytes


async def _sure(job: Job, mine: Copy, wanted: Intent) -> RunUpdate:
    """Return the update after which nothing is withdrawn. Raises `GiveUp` if the copy must stay.

    All that can fail or refuse comes before that update.
    """
    if mine.location is None:
        raise GiveUp("it has no location")
    if mine.is_erasing:
        return go_on(job.run, mine)
    if not unread(mine.key, job.sites, job.clocks().earliest).holds(job.run):
        raise Retry("it is being read", after=READ_AGAIN)
    found = weigh(job.run, mine, job.sites, job.clocks())
    if not isinstance(found, Proven):  # a counted copy went bad meanwhile, or a hold came
        raise GiveUp(found.why if isinstance(found, Withdraw) else "its proof is out of date")
    shape = await _shape(job, mine, wanted)
    # The mark identifies these very files, for a successor that erases them after a crash.
    mark = await job.work(standing, mine.location, job.site.roots, shape)
    marks = {"mark": mark, **await _mark_moved(job, mine)}
    if others := await sharing(job, mine):
        raise GiveUp(f"its files are at, above or below those of {', '.join(others[:3])}, too")
    await _check_others(job, mine, wanted, found)
    return begin(job.run, mine, job.sites, proof=found.proof, clocks=job.clocks(), marks=marks)


def plan_erase(mine: Copy | None) -> Skip | None:
    """Decide whether to erase a copy. Pure."""
    if mine is None:
        return Skip("the copy is gone")
    if Intent.of(mine) is None or mine.proof is None:
        return Skip(f"it is {mine.status}, without a proof that it may go")
    return None


async def _shape(job: Job, mine: Copy, wanted: Intent) -> Manifest | None:
    """Return the files that the copy must have; None if they are unknown, or the copy is bad."""
    known = await manifest_of(job, mine.manifest if wanted.was == TRANSFERRED else None)
    return None if known is None else known.shape()


def _moved(mine: Copy) -> str | None:
    """Return the path of files that a move left behind and that no other entry names."""
    left = mine.moved_from
    # The path comes from the database: erase it only if its name is one that a move gives.
    is_ours = left is not None and left.rpartition("/")[2].startswith(MOVED_PREFIX)
    return left if is_ours else None


async def _mark_moved(job: Job, mine: Copy) -> dict[str, str]:
    if (left := _moved(mine)) is None:
        return {}
    return {"moved_mark": await job.work(standing, left, job.site.roots, None)}


async def _erase_files(job: Job, mine: Copy) -> None:
    """Erase the copy's files, its quarantine and what a move left, each identified by its mark.

    Without a mark the files cannot be identified, and stay.
    """
    replaced = []
    if mine.quarantine is not None and mine.quarantine.place is not None:
        await job.work(empty_quarantine, mine.quarantine.place, job.site.roots)
    for place, mark in ((_moved(mine), mine.moved_mark), (mine.location, mine.mark)):
        if place is None:
            continue
        try:
            await job.work(erase_files, place, job.site.roots, mark or NOTHING)
        except Replaced:
            replaced.append(place)
    if replaced:
        # Check that this deletion is still ours: else those are the files of a new copy.
        await write(job, go_on(job.run, mine))
        await _alarm_replaced(job, mine, ", ".join(replaced))


async def _alarm_replaced(job: Job, mine: Copy, places: str) -> None:
    """Raise an alarm about files that stay without an entry."""
    await job.alarm(
        REPLACED,
        f"{places}: not erased, as something else stands there than {mine.key} of {job.run}, "
        "which was to be deleted",
        places=places,
        todo="find out whose files these are, and remove them or take them in (caxev stray, caxev "
        "register); then: caxev alarms clear",
    )


async def _check_others(job: Job, mine: Copy, wanted: Intent, found: Proven) -> None:
    """Raise `GiveUp` if the counted copies are too few: two paths of the same files are one."""
    hosts, near = [row["host"] for row in found.proof], sites_sharing_storage(job.site, job.sites)
    those = [one for name in hosts if (one := job.run.copy(mine.key._replace(host=name)))]
    here = [one for one in those if one.host in near and one.location]
    if not (wanted.keep and here and mine.location):
        return
    places = [one.location for one in here]
    # Links and bind mounts make one directory look like two: only the disk shows it.
    groups = await job.work(distinct, mine.location, job.site.roots, places)
    if len(those) - len(here) + len({*groups} - {0}) < wanted.keep:
        names = ", ".join(one.host for one in here)
        why = f"not all copies at {names} are copies of their own"
        raise GiveUp(f"the same files have several names: {why}")


# -- a full disk ----------------------------------------------------------------------------------


@on(copy((TRANSFERRING, VERIFYING), host=HERE), decide=lambda job: plan_room(job.copy, job.site))
async def make_room(job: Job) -> Result:
    """Mark the oldest raw data for deletion if an incoming copy does not fit on the disk.

    Data born here is already on the disk, which may then be too full.
    """
    mine = job.copy
    skip = plan_room(mine, job.site)
    if mine is None or skip is not None:
        return skip
    is_coming = mine.status == TRANSFERRING
    coming = job.run.size_of(mine) or 0 if is_coming else 0
    there = (mine.location, job.site.roots, job.site.min_free)
    lacking = await job.work(lacking_bytes, *there, coming)
    if lacking <= 0:
        return Skip("there is room")
    # Bytes marked, not bytes free: `erase` frees them later.
    freed = 0
    for kind in sorted(job.site.types.primary, key=job.site.types.order):
        freed += await _free(job, kind, lacking - freed)
    if freed < lacking:
        job.log.error(
            f"the disk of {job.site.name} is full: {lacking - freed} bytes are lacking, and no "
            f"more raw data may go (caxev rm --site {job.site.name} --dry-run says why)"
        )
    if not is_coming:
        return None  # the next run that is born here checks again
    raise Retry(f"{lacking} bytes were lacking", after=LOOK_AGAIN)


def plan_room(mine: Copy | None, site: Site) -> Skip | None:
    """Decide whether to see if there is room for this copy. Pure."""
    if mine is None or mine.status not in (TRANSFERRING, VERIFYING, TRANSFERRED):
        return Skip("no copy is on its way here")
    if not (site.deletion.when_full and site.min_free and mine.location):
        return Skip("deletion.when_full is not set, or no min_free")
    return None


async def _free(job: Job, kind: str, lacking: int) -> int:
    """Mark the oldest data of a type for deletion, `lacking` bytes or more; return how many."""
    freed = seen = 0
    while freed < lacking and (
        some := await job.oldest(kind, job.site.deletion.protect, skip=seen)
    ):
        seen += len(some)
        mine = [(run, one) for run in some for one in run.copies if one.host == job.site.name]
        for run, one in mine:
            if freed >= lacking or one.type != kind:
                continue
            # One of unknown size would not count, and so all of them would go.
            if (size := await _size(job, run, one)) and await _goes(job, run, one):
                freed += size
    return freed


async def _goes(job: Job, run: Run, one: Copy) -> bool:
    """Mark our copy of that run for deletion if it may go; whether it goes."""
    if run.id == job.run.id:
        return False
    # Each run is decided again, by the same rules as a purge except its age.
    plan = plan_purge(run, one, job.site, job.sites, job.safe_now(), full=True)
    if not isinstance(plan, DeletionPlan):
        return one.status == DELETING
    if not await job.update_other(intent(run, plan, job.sites, job.now())):
        return False
    job.log.info(f"{one.key} of {run} is marked for deletion: {plan.why}")
    return True
