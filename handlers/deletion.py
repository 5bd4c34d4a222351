"""Copies are deleted, each with a proof that enough others are good.

- `purge` and `purge_processed` want a copy gone by the site's rules: raw data by its age
  (``purge``), processed data by its version (``pax_version_purge``); `make_room` the oldest where
  the disk is full (``deletion.when_full``); a person by ``caxev rm``. All record the same intent:
  the copy is ``deleting`` from then on, by a write that counts the other good copies.
- `prove` asks the others to be read afresh, waits for that, and writes down the proof; where too
  few of them are left it takes the intent back, and the copy is what it was.
- `erase` takes away the bytes, then the entry, and leaves a tombstone in ``deleted_data``.

`caxev.copies.deletion` decides what may go. Safe to repeat: each step is a conditional write, and
until `erase` has written ``erasing`` nothing has been touched. After that it is gone through with,
whoever was killed in between.
"""

from __future__ import annotations

from collections.abc import Mapping

from caxev import (
    DELETING,
    ELSEWHERE,
    ERROR,
    GONE,
    HERE,
    TRANSFERRED,
    TRANSFERRING,
    VERIFYING,
    Copy,
    CopyField,
    CopyKey,
    GiveUp,
    Job,
    Manifest,
    Result,
    Retry,
    Run,
    RunUpdate,
    Skip,
    Superseded,
    copy,
    copy_field,
    on,
    tag,
)
from caxev.copies.deletion import (
    Ask,
    DeletionPlan,
    Intent,
    NotYet,
    Proven,
    Wait,
    Withdraw,
    begin,
    begun,
    custodian,
    go_on,
    intent,
    plan_processed,
    plan_purge,
    sites_sharing_storage,
    tombstone,
    unread,
    weigh,
    withdraw,
)
from caxev.copies.deletion import prove as proven
from caxev.copies.quorum import same_data
from caxev.copies.sharing import sharing
from caxev.files import MOVED_PREFIX, NOTHING, Replaced, distinct, empty_quarantine, standing
from caxev.files import erase as erase_files
from caxev.files import lacking as lacking_bytes

SOON = 1.0
"""Seconds after which a step is tried again that another write came before."""
REPLACED = "replaced"
"""The alarm that something else stands at the place of a copy that was to be erased."""
READ_AGAIN = 60.0
"""Seconds between two looks at whether a copy that is to go is still being read."""
LOOK_AGAIN = 15 * 60.0
"""Seconds between two looks at a disk that is too full for a copy that is coming."""


# -- who wants it ---------------------------------------------------------------------------------


@on(
    copy((TRANSFERRED, DELETING, GONE), type="raw", host=HERE),  # the last two end a waiting
    copy((TRANSFERRED, ERROR, GONE), type="raw", host=ELSEWHERE),
    tag("*", gone=True),
    aliases=("BufferPurger",),
)
async def purge(job: Job) -> Result:
    """Want raw data gone that is older than ``purge`` days and good at enough other sites."""
    mine = job.run.copy(CopyKey("raw", job.site.name))
    if _may_prove(job, mine):
        return await prove(job)
    return _wanted(job, plan_purge(job.run, mine, job.site, job.sites, job.safe_now()))


@on(
    copy((TRANSFERRED, DELETING, GONE), type="processed", host=HERE),
    copy((TRANSFERRED, ERROR, GONE), type="processed", host=ELSEWHERE),
    aliases=("PurgeProcessed",),
)
async def purge_processed(job: Job) -> Result:
    """Want processed data gone that is of the version ``pax_version_purge``."""
    data = _data(job)
    mine = job.run.copy(CopyKey(data.type, job.site.name, data.version))
    if _may_prove(job, mine):
        return await prove(job)
    return _wanted(job, plan_processed(job.run, mine, job.site, job.sites, job.safe_now()))


def _may_prove(job: Job, mine: Copy | None) -> bool:
    """Whether another copy came that may prove that ours may go: others may never answer."""
    came = job.copy is not None and job.copy.status == TRANSFERRED
    return came and mine is not None and mine.status == DELETING and job.copy is not mine


def _wanted(job: Job, plan: DeletionPlan | Skip | NotYet) -> Result:
    if isinstance(plan, DeletionPlan):
        job.log.info(f"{plan.copy.key} of {job.run} is to go: {plan.why}")
        return intent(job.run, plan, job.sites, job.now())
    if isinstance(plan, Skip):
        return plan
    if job.copy is not None and job.copy.host == job.site.name:
        raise Retry(plan.why, after=(plan.at - job.safe_now()).total_seconds())
    return Skip(plan.why)  # the reaction to our own copy waits for that


# -- what proves that it may ----------------------------------------------------------------------


@on(
    copy((ERROR, DELETING, GONE)),
    copy_field("check_answered"),
    # A site that wants copies gone by cax's names must also be able to bring that to its end.
    aliases=("BufferPurger", "PurgeProcessed"),
)
async def prove(job: Job) -> Result:
    """Have the other copies read afresh, and write down what proves that ours may go.

    Ours are the one here, and one at a catalogue that this site looks after.
    """
    going = [one.key for one in job.run.copies if _is_ours_to_delete(job, one)]
    if not going:
        return Skip("nothing of it is to go by us")
    waiting = {key: wait for key in going if (wait := await _prove(job, key)) is not None}
    if job.copy is not None and job.copy.key in waiting:
        raise waiting[job.copy.key]
    return Skip("; ".join(wait.why for wait in waiting.values())) if waiting else None


def _is_ours_to_delete(job: Job, one: Copy) -> bool:
    is_going = one.status == DELETING and same_data(one, _data(job))
    return is_going and custodian(one, job.sites) == job.site.name


async def _prove(job: Job, key: CopyKey) -> Retry | None:
    """Do what is next for a copy that is to go; returns until when others are waited for."""
    found = _weighed(job, key)
    if isinstance(found, Ask):
        await _ask(job, found)
        found = _weighed(job, key)
    match found:
        case Skip():
            return None
        case Wait(why, until):
            return Retry(why, after=(until - job.safe_now()).total_seconds())
        case Ask():
            raise Retry("another copy came meanwhile", after=SOON)
    mine = job.run.copy(key)
    wanted = None if mine is None else Intent.of(mine)
    assert mine is not None
    assert wanted is not None
    if isinstance(found, Withdraw):
        job.log.warning(f"{key} of {job.run} is not deleted: {found.why}")
        await _write(job, withdraw(job.run, mine, wanted, found.why, job.now()))
    else:
        there, proof = job.sites.get(key.host), found.proof
        update = proven(job.run, mine, wanted, there, job.sites, proof=proof, clocks=job.clocks())
        await _write(job, update)
    return None


def _weighed(job: Job, key: CopyKey) -> Proven | Ask | Wait | Withdraw | Skip:
    mine = job.run.copy(key)
    if mine is None:
        return Skip("the copy is gone")
    return weigh(job.run, mine, job.sites.get(key.host), job.sites, job.clocks())


async def _ask(job: Job, wanted: Ask) -> None:
    for one in wanted.copies:
        await _write(job, RunUpdate.ask(job.run, one, wanted.request, job.now()))


async def _write(job: Job, update: RunUpdate) -> Run:
    """Write a step; where the run has changed meanwhile, it is looked at again soon."""
    try:
        return await job.update(update)
    except Superseded as lost:
        raise Retry(str(lost), after=SOON) from lost


def _data(job: Job) -> CopyKey:
    """The copy of which the event speaks."""
    aspect = job.event.aspect
    assert isinstance(aspect, CopyKey | CopyField)
    return CopyKey(aspect.type, aspect.host, aspect.version)


# -- doing it -------------------------------------------------------------------------------------


@on(
    copy_field("proof", host=HERE),
    lane="deletion",
    timeout=None,
    exclusive=True,
    aliases=("BufferPurger", "PurgeProcessed"),
)
async def erase(job: Job) -> Result:
    """Erase a copy whose proof stands: its bytes, then its entry; a tombstone remains.

    If something else stands at its place by then, as what a person restored, that stays.
    """
    mine = job.copy
    if mine is None:
        return Skip("the copy is gone")
    wanted = Intent.of(mine)
    if wanted is None or mine.fields.get("proof") is None:
        return Skip(f"it is {mine.status}, without a proof that it may go")
    if mine.location is None:
        return withdraw(job.run, mine, wanted, "it has no location", job.now())
    if mine.fields.get("erasing"):
        sure = go_on(job.run, mine)
    elif not unread(mine.key, job.sites, job.clocks().earliest).holds(job.run):
        raise Retry("it is being read", after=READ_AGAIN)
    else:
        found = weigh(job.run, mine, job.site, job.sites, job.clocks())
        if not isinstance(found, Proven):
            # What was proven does not hold any more: begin again from the intent.
            job.log.warning(f"{mine.key} of {job.run}: its proof no longer holds")
            return withdraw(job.run, mine, wanted, "its proof no longer holds", job.now())
        try:  # while it can be taken back: afterwards nobody could
            shape = await _shape(job, mine, wanted)
            mark = await job.work(standing, mine.location, job.site.roots, shape)
            marks = {"mark": mark, **await _mark_moved(job, mine)}
        except GiveUp as no:
            return withdraw(job.run, mine, wanted, no.why, job.now())
        if others := await sharing(job, mine):
            why = f"its files are at, above or below those of {', '.join(others[:3])}, too"
            return withdraw(job.run, mine, wanted, why, job.now())
        if (few := await _too_few(job, mine, wanted, found)) is not None:
            return withdraw(job.run, mine, wanted, few, job.now())
        those, clocks = (job.site, job.sites), job.clocks()
        sure = begin(job.run, mine, wanted, *those, proof=found.proof, clocks=clocks, marks=marks)
    mine = (await _write(job, sure)).copy(mine.key) or mine
    await _erase_files(job, mine)
    job.log.info(f"{mine.key} of {job.run} is deleted: {wanted.why}")
    stone = tombstone(mine, wanted, job.owner)
    return RunUpdate.remove_copy(job.run, mine, begun(mine), tombstone=stone)


async def _shape(job: Job, mine: Copy, wanted: Intent) -> Manifest | None:
    """What must stand there if it is this copy; None if that is not known, or the copy is bad."""
    if wanted.was != TRANSFERRED or mine.manifest is None:
        return None
    rows = await job.load_manifest(mine.manifest)
    return None if rows is None else Manifest.from_rows(rows).shape()


def _moved(mine: Copy) -> str | None:
    """Return the place of what a move of the copy left, which would be nobody's without it."""
    left = mine.fields.get("moved_from")
    is_ours = isinstance(left, str) and left.rpartition("/")[2].startswith(MOVED_PREFIX)
    return str(left) if is_ours else None


async def _mark_moved(job: Job, mine: Copy) -> dict[str, str]:
    if (left := _moved(mine)) is None:
        return {}
    return {"moved_mark": await job.work(standing, left, job.site.roots, None)}


async def _erase_files(job: Job, mine: Copy) -> None:
    """Erase the files by their marks, and what was set aside of them or left by a move.

    Without a mark nobody knows which files were meant: then nothing that stands there goes.
    """
    kept, replaced = mine.fields.get("quarantine"), []
    if isinstance(kept, Mapping) and kept.get("place"):
        await job.work(empty_quarantine, str(kept["place"]), job.site.roots)
    for place, name in ((_moved(mine), "moved_mark"), (mine.location, "mark")):
        if place is None:
            continue
        try:
            mark = str(mine.fields.get(name) or NOTHING)
            await job.work(erase_files, place, job.site.roots, mark)
        except Replaced:
            replaced.append(place)
    if replaced:
        await _write(job, go_on(job.run, mine))  # or else it is a new copy's place by now
        await _alarm_replaced(job, mine, ", ".join(replaced))


async def _alarm_replaced(job: Job, mine: Copy, places: str) -> None:
    """Raise an alarm: files stay that no entry names once this one is gone."""
    await job.alarm(
        REPLACED,
        f"{places}: not erased, as something else stands there than {mine.key} of {job.run}, "
        "which was to be deleted",
        places=places,
        todo="find out whose files these are, and remove them or take them in (caxev stray, caxev "
        "register); then: caxev alarms clear",
    )


async def _too_few(job: Job, mine: Copy, wanted: Intent, found: Proven) -> str | None:
    """Why the copies that are counted are not enough: two names of the same files are one copy."""
    hosts, near = [row["host"] for row in found.proof], sites_sharing_storage(job.site, job.sites)
    those = [one for name in hosts if (one := job.run.copy(mine.key._replace(host=name)))]
    here = [one for one in those if one.host in near and one.location]
    if not (wanted.keep and here and mine.location):
        return None
    places = [one.location for one in here]
    groups = await job.work(distinct, mine.location, job.site.roots, places)
    if len(those) - len(here) + len({*groups} - {0}) >= wanted.keep:
        return None
    names = ", ".join(one.host for one in here)
    return f"the same files have several names: not all copies at {names} are copies of their own"


# -- where the disk is full -----------------------------------------------------------------------


@on(copy((TRANSFERRING, VERIFYING), host=HERE))
async def make_room(job: Job) -> Result:
    """Want the oldest raw data gone that may go, where a copy fills the disk or would fill it.

    What is born here is there before anybody is told: then the disk may be too full already.
    """
    mine, rules = job.copy, job.site.deletion
    if mine is None or mine.status not in (TRANSFERRING, VERIFYING, TRANSFERRED):
        return Skip("nothing is coming")
    if not (rules.when_full and job.site.min_free and mine.location):
        return Skip("deletion.when_full is not set, or no min_free")
    is_coming = mine.status == TRANSFERRING
    coming = _size(job.run) if is_coming and mine.type == "raw" else 0
    there = (mine.location, job.site.roots, job.site.min_free)
    lacking = await job.work(lacking_bytes, *there, coming)
    if lacking <= 0:
        return Skip("there is room")
    freed = seen = 0
    while freed < lacking and (some := await job.oldest("raw", rules.protect, skip=seen)):
        seen += len(some)
        for run in some:
            if freed < lacking and await _goes(job, run):
                freed += _size(run)
    if freed < lacking:
        job.log.error(
            f"the disk of {job.site.name} is full: {lacking - freed} bytes are lacking, and no "
            f"more raw data may go (caxev rm --site {job.site.name} --dry-run says why)"
        )
    if not is_coming:
        return None  # the next one that is born looks again
    raise Retry(f"{lacking} bytes were lacking", after=LOOK_AGAIN)


async def _goes(job: Job, run: Run) -> bool:
    """Whether our copy of that run goes, or is going already."""
    one = run.copy(CopyKey("raw", job.site.name))
    if run.id == job.run.id or one is None:
        return False
    plan = plan_purge(run, one, job.site, job.sites, job.safe_now(), full=True)
    if not isinstance(plan, DeletionPlan):
        return one.status == DELETING
    if not await job.update_other(intent(run, plan, job.sites, job.now())):
        return False
    job.log.info(f"{one.key} of {run} is to go: {plan.why}")
    return True


def _size(run: Run) -> int:
    size = run.document.get("raw_size_byte")
    return size if isinstance(size, int) else 0
