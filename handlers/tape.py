"""Copies on tape: backup, verification and recall to disk.

- `backup` reacts to raw data that became good here, and brings it to the archives in
  ``upload_options``. It also reacts to a copy on tape that a person requested.
- `recall` reacts to raw data that is good on tape and that this site wants: ``download_options``
  names the archive, the run has the tag ``recall``, or a person requested it.
- `tape_checksum` reads a copy on tape again if that is requested, or if it has no checksum.

A copy on tape is ``transferring`` until the archive lists it, ``verifying`` until it was restored
to scratch and compared file by file, and only then ``transferred``. Recalled data is compared
before it gets its final name. Nothing on tape is ever deleted or replaced.

Safe to repeat: the claim adds an entry only if the run has no such copy, and each step reuses what
an earlier attempt staged, stored or restored. An attempt recognizes its entry by its ``trigger``.
The ledger keeps the full output of the archive's client, with each command and return code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import Final, TypeVar

from caxev import (
    ELSEWHERE,
    ERROR,
    GONE,
    HERE,
    PASSIVE,
    REQUESTED,
    TRANSFERRED,
    TRANSFERRING,
    VERIFYING,
    Copy,
    CopyKey,
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
from caxev.config import Site, Sites
from caxev.copies.lifecycle import (
    CopyPlan,
    arrived,
    asked_by,
    broken_off,
    claim,
    found_bad,
    found_good,
    key_of,
    manifest_of,
    not_brought,
    place_for,
    requested_from,
    retried,
    serve_each,
    taken,
    targets,
    trigger_of,
    unfit,
    withdrawal,
    written,
)
from caxev.copies.readings import suspecting
from caxev.copies.retention import unwanted
from caxev.files import safe_name
from caxev.tape.base import Reach, archive, folder_of, methods
from caxev.tape.steps import Data, Outcome, back_up, compare, unstage
from caxev.tape.steps import recall as bring_back
from caxev.transfer import methods as disks

T = TypeVar("T")
STALLED: Final = 15 * 60.0
"""Seconds without a sign of life after which an attempt is stopped. While a silent client is
within ``archive.patience``, we give these signs in its place."""
RESENDS: Final = 3
"""How often data is sent again after a checksum mismatch on tape."""
TAG: Final = "recall"
UNREADABLE: Final = (
    "it cannot be read back (caxev reactions --failed shows why); once it can: caxev retry"
)
"""The ``error`` of a copy on tape that could not be read again."""
UNFINISHED: Final = (TRANSFERRING, VERIFYING, ERROR)
"""Statuses of an entry that a reaction has claimed and not finished."""


@on(
    copy(TRANSFERRED, type="raw", host=HERE),
    copy(GONE, type="raw", host=PASSIVE),
    copy(REQUESTED, type="raw", host=PASSIVE),
    lane="tape",
    stall=STALLED,
    aliases=("CopyPush",),
    decide=lambda job: skip_of(*(_backup_plan(job, name) for name in targets(job))),
)
async def backup(job: Job) -> Result:
    """Bring raw data that is good here to tape, then restore and compare it.

    Each new copy becomes ``transferring``, ``verifying``, ``transferred``; ``error`` if it fails.
    """
    return await serve_each(job, targets(job), _back_up_to)


def _backup_plan(job: Job, name: str) -> CopyPlan | Skip | RunUpdate:
    """Decide about one archive; an update withdraws the entry of what is no longer wanted."""
    key, trigger = key_of(job), trigger_of("backup", job)
    plan = plan_backup(job.run, key, job.site, job.sites, name=name, trigger=trigger)
    if isinstance(plan, Skip):
        return withdrawal(job.run, key.at(name), trigger) or plan
    return plan


async def _back_up_to(job: Job, name: str, others: tuple[RunUpdate, ...]) -> str | None:
    """Bring the copy to one archive, or return why there is nothing to do."""
    plan = _backup_plan(job, name)
    if isinstance(plan, Skip):
        return plan.why
    if isinstance(plan, RunUpdate):
        await _unstaged(job, key_of(job).at(name))
        await job.update(plan)
        return "it is no longer wanted there"
    with _parking(job, plan.key, others):
        # After a `Retry` the staged files stay, for the next attempt.
        try:
            await _verify(job, plan, await _sent(job, plan))
        except GiveUp:
            await _unstaged(job, plan.key)
            raise
    return None


async def _unstaged(job: Job, key: CopyKey) -> None:
    """Clear the staging directory: its hard links would keep the disk space of a deleted source."""
    entry = job.run.copy(key)
    # Not if another process owns the entry: it may be sending these files.
    if entry is not None and entry.folder is not None and entry.owner in (None, job.owner):
        reach = Reach(job.site, job.sites.get(key.host))
        await job.work(unstage, reach, safe_name(entry.folder))


async def _sent(job: Job, plan: CopyPlan) -> Copy:
    """Send the data to the archive unless it is there; returns the ``verifying`` entry."""
    if plan.resume is not None and plan.resume.status == VERIFYING:
        return await written(job, arrived(job.run, plan.resume, owner=job.owner), plan.key)
    # It gets its location only when the archive lists it; until then the folder is kept apart.
    mine = await claim(job, plan, {"folder": plan.location}, new={"location": "n/a"})
    source = plan.source
    data = await _data(job, plan.location, source.manifest, source.checksum)
    assert source.location is not None
    # After a mismatch the client would skip these files, as unchanged since the last backup.
    again = bool(mine.resends)
    reach = Reach(job.site, job.sites.get(plan.key.host))
    async with suspecting(job, source):
        manifest = await _step(job, back_up, reach, source.location, data, again)
    await job.store_manifest(manifest.digest, manifest.to_rows())
    update = arrived(
        job.run,
        mine,
        owner=job.owner,  # this process continues, and verifies it
        location=plan.location,
        source_manifest=manifest.digest,
        source_checksum=source.checksum or manifest.cax_checksum(),
        size=manifest.total_bytes,
    )
    return await written(job, update, plan.key)


async def _verify(job: Job, plan: CopyPlan, mine: Copy) -> None:
    """Compare what tape returns with what was sent."""
    digest, checksum = mine.source_manifest, mine.source_checksum
    data = await _data(job, plan.location, digest, checksum)
    if not data.is_known:
        raise GiveUp(f"there is nothing to compare {plan.key} with")
    reach, began = Reach(job.site, job.sites.get(plan.key.host)), job.now()
    why, found = await _step(job, compare, reach, data)
    if why is None:
        hosts = {"source": plan.source.host, "target": plan.key.host}
        job.did(What.TRANSFERRED, **hosts, bytes=found.total_bytes, by=asked_by(mine))
        await job.update(_good(mine, job.run, found, checksum, began))
        return
    # A source with a known manifest is not read again before it is sent: it may be the bad one.
    await job.suspect(plan.source)
    resends = (mine.resends or 0) + 1
    # Counted in the entry, so that a restart does not reset the number of attempts.
    await job.update(retried(job.run, mine, why, resends=resends))
    if resends > RESENDS:
        raise GiveUp(f"files came back different from tape {resends} times, the last time: {why}")
    raise Retry(f"tape gives something else, so it is sent again: {why}")


@on(
    # The last two: it may have come first in download_options.
    copy((TRANSFERRED, ERROR, GONE), type="raw", host=ELSEWHERE),
    copy(GONE, type="raw", host=HERE),
    copy(REQUESTED, type="raw", host=HERE),
    tag(TAG),
    lane="tape",
    stall=STALLED,
    aliases=("CopyPull",),
    concerns=lambda run, site: (
        bool(site.download_options) or site.name in run.hosts or TAG in run.tags
    ),
    decide=lambda job: skip_of(_recall_plan(job)),
)
async def recall(job: Job) -> Result:
    """Bring raw data back from tape to this site's disk.

    The new copy becomes ``transferring``, then ``transferred``; ``error`` if it fails.
    """
    plan = _recall_plan(job)
    if isinstance(plan, Skip | RunUpdate):
        return plan
    with _parking(job, plan.key):
        source = plan.source
        assert source.location is not None
        mine = await claim(job, plan, {"location": plan.location})
        data = await _data(job, folder_of(source.location), source.manifest, source.checksum)
        began = job.now()
        reach = Reach(job.site, job.sites.get(source.host))
        async with suspecting(job, source):
            manifest = await _step(job, bring_back, reach, data, plan.location, job.site.roots)
    await job.store_manifest(manifest.digest, manifest.to_rows())
    checksum = source.checksum or manifest.cax_checksum()
    hosts = {"source": source.host, "target": job.site.name}
    job.did(What.TRANSFERRED, **hosts, bytes=manifest.total_bytes, by=asked_by(mine))
    return _good(mine, job.run, manifest, checksum, began)


def _recall_plan(job: Job) -> CopyPlan | Skip | RunUpdate:
    """Decide about a recall; an update withdraws the entry of what is no longer wanted."""
    trigger = trigger_of("recall", job)
    seen = job.event.aspect if isinstance(job.event.aspect, CopyKey) else None
    # The run may have been tagged before the copy on tape was good.
    if seen is not None and job.event.status == TRANSFERRED and TAG in job.run.tags:
        seen = seen if isinstance(_archive(seen.host, job.site, job.sites), Skip) else None
    plan = plan_recall(job.run, seen, job.site, job.sites, trigger=trigger, now=job.now())
    if isinstance(plan, Skip):
        return withdrawal(job.run, CopyKey("raw", job.site.name), trigger) or plan
    return plan


@on(
    copy_field("check_asked", type="raw", host=PASSIVE),
    copy(TRANSFERRED, type="raw", host=PASSIVE),
    lane="tape",
    stall=STALLED,
    aliases=("AddTSMChecksum",),
    decide=lambda job: skip_of(plan_check(job.copy, job.site, job.sites)),
)
async def tape_checksum(job: Job) -> Result:
    """Read a copy on tape again if that is requested or it has no checksum.

    The copy stays ``transferred`` with a new ``verified_at``, or becomes ``error``, also if it
    cannot be read: while it counts as good, other copies may be deleted. Without anything to
    compare it with, its digests are recorded but it does not count as verified.
    """
    seen = plan_check(job.copy, job.site, job.sites)
    if isinstance(seen, Skip):
        return seen
    assert seen.location is not None
    job.on_failure(broken_off(job.run, seen, error=UNREADABLE))
    began = job.now()
    # A copy that cax brought to tape may have no digest of its own.
    known = seen if seen.manifest or seen.checksum else _any_good(job.run, seen)
    digest, checksum = (known.manifest, known.checksum) if known else (None, None)
    data = await _data(job, folder_of(seen.location), digest, checksum)
    reach = Reach(job.site, job.sites.get(seen.host))
    why, found = await _step(job, compare, reach, data)
    if why is not None:  # it may have changed on its way back: only what is so twice is bad
        why, found = await _step(job, compare, reach, data)
    await job.store_manifest(found.digest, found.to_rows())
    if why is not None:
        job.log.error(f"{seen.key} is not what it was: {why}")
        job.did(What.DAMAGED, reason=why)
        return found_bad(job.run, seen, why, verified_at=began)
    value = checksum or found.cax_checksum()
    job.did(What.VERIFIED, bytes=found.total_bytes)
    return _good(seen, job.run, found, value, began if data.is_known else None)


# -- doing ----------------------------------------------------------------------------------------


async def _step(job: Job, function: Callable[..., Outcome[T]], *args: object) -> T:
    """Run a step in a worker process, and keep the output of the archive's client."""
    # A step returns its error instead of raising it, so that the output is kept either way.
    outcome = await job.work(function, *args)
    if outcome.transcript:
        job.log.debug("the archive's client:\n{}", outcome.transcript)
        await job.keep(outcome.transcript)
    return outcome.get()


@contextmanager
def _parking(job: Job, key: CopyKey, others: Sequence[RunUpdate] = ()) -> Iterator[None]:
    """Make the copy an ``error`` with its reason if this reaction fails for good inside the block.

    `others` are written as well.
    """
    why: dict[str, object] = {}
    try:
        yield
    except (Retry, GiveUp) as error:
        why = {"error": str(error)}
        raise
    finally:
        mine = job.run.copy(key)
        if mine is not None and mine.owner == job.owner:
            parked = RunUpdate.give_up(job.run, mine, **why)
            job.on_failure(*others, parked)


def _good(
    mine: Copy, run: Run, manifest: Manifest, checksum: str | None, began: datetime | None
) -> RunUpdate:
    """Return the update for a good copy, read since `began`; None: it was not compared."""
    fields: dict[str, object] = {
        "manifest": manifest.digest,
        "checksum": checksum,
        "owner": None,
        "error": None,
    }
    if began is not None:
        fields["verified_at"] = began
    if mine.status != TRANSFERRED:
        read = found_good(run, mine, arrived_at=mine.arrived_at or began, **fields)
    else:
        if mine.checksumproblem:
            fields["checksumproblem"] = False
        read = RunUpdate.note(run, mine, **fields)
    return read.answering(mine) if mine.pending else read


async def _data(job: Job, folder: str, digest: str | None, checksum: str | None) -> Data:
    """Describe the data on tape, with its manifest if the database has it."""
    return Data(safe_name(folder), folder, await manifest_of(job, digest), checksum, digest)


# -- deciding -------------------------------------------------------------------------------------


def plan_backup(
    run: Run, seen: CopyKey, site: Site, sites: Sites, *, name: str, trigger: str
) -> CopyPlan | Skip:
    """Decide whether `site` brings its copy of this data to the archive `name`. Pure."""
    key = seen.at(name)
    entry = run.copy(key)
    asked = requested_from(entry, trigger, UNFINISHED)
    if why := not_brought(asked, site, name) or taken(entry, trigger, UNFINISHED):
        return Skip(why)
    there = _archive(name, site, sites)
    if isinstance(there, Skip):
        return there
    # All of it is on tape: only the comparison is left, which does not need the source.
    if entry is not None and entry.status == VERIFYING and entry.location is not None:
        return CopyPlan(entry, key, folder_of(entry.location), trigger, entry)
    source = run.copy(CopyKey("raw", site.name))
    if source is None or source.location is None:
        return Skip(f"there is no copy at {site.name}")
    if why := unfit(source):
        return Skip(why)
    base = archive(Reach(site, there)).folder(safe_name(source.location))
    if base is None:
        return Skip(f"neither {site.name} nor {name} says where data for tape goes (dir_tsm)")
    return CopyPlan(source, key, base, trigger, entry)


def plan_recall(
    run: Run, seen: CopyKey | None, site: Site, sites: Sites, *, trigger: str, now: datetime
) -> CopyPlan | Skip:
    """Decide whether `site` brings raw data back from tape, and from which archive. Pure.

    `seen` is the copy that changed; None if the event is the tag.
    """
    key = CopyKey("raw", site.name)
    entry = run.copy(key)
    if why := taken(entry, trigger, UNFINISHED):
        return Skip(why)
    asked = requested_from(entry, trigger, UNFINISHED)
    source = _first_good(run, _tapes(asked, seen, site, sites), site, sites)
    if isinstance(source, Skip):
        return source
    if asked is None and seen is not None and (why := unwanted(run, key, site, now)):
        return Skip(why)
    assert source.location is not None
    location = place_for(key, folder_of(source.location), site)
    if isinstance(location, Skip):
        return location
    return CopyPlan(source, key, location, trigger, entry)


def _tapes(asked: str | None, seen: CopyKey | None, site: Site, sites: Sites) -> list[str]:
    """Return the hosts to take data from, best first; for the tag, any archive within reach."""
    if asked is not None:
        return [asked]
    if seen is not None:
        return list(site.download_options)
    names = dict.fromkeys((*site.download_options, *site.upload_options))
    return [name for name in names if (there := sites.find(name)) and there.method in methods()]


def _first_good(run: Run, names: Sequence[str], site: Site, sites: Sites) -> Copy | Skip:
    """Return the first good copy in the order of `names`, if it is on tape."""
    if "raw" not in site.data_type:
        return Skip(f"{site.name} does not move raw data (data_type)")
    why: list[str] = []
    for name in names:
        found, there = run.copy(CopyKey("raw", name)), sites.find(name)
        if found is None or there is None:
            why.append(f"{name} has no such copy")
        elif (problem := unfit(found)) is not None:
            why.append(problem)
        elif there.method in disks():
            # `pull` fetches it from there: tape is slower, and is left alone.
            return Skip(f"{name} has it too, and comes first")
        elif there.method not in methods():
            why.append(f"{name} is no archive")
        else:
            return found
    return Skip(f"no copy on tape: {'; '.join(why) or 'download_options names no site'}")


def plan_check(seen: Copy | None, site: Site, sites: Sites) -> Copy | Skip:
    """Decide whether `site` reads that copy on tape again. Pure."""
    if seen is None:
        return Skip("the copy is gone")
    there = _archive(seen.host, site, sites)
    if isinstance(there, Skip):
        return there
    # One that could not be read is read again if a person retries that.
    if seen.status != TRANSFERRED and (seen.status, seen.error) != (ERROR, UNREADABLE):
        return Skip(f"it is {seen.status} now")
    if seen.source != site.name and not (seen.source is None and seen.host in site.upload_options):
        return Skip(f"{seen.source or 'a site that brings data there'} reads it")
    if not seen.pending and (seen.checksum or seen.manifest):
        return Skip("it has a checksum, and nobody asks for it to be read again")
    if seen.location is None:
        return Skip(f"{seen.key} has no location")
    return seen


def _archive(name: str, site: Site, sites: Sites) -> Site | Skip:
    """Return the site `name` if it is an archive for the raw data of `site`."""
    there = sites.find(name)
    if there is None:
        return Skip(f"{name} is not in sites.json")
    if there.method not in methods():
        return Skip(f"{name} is reached by {there.method}, which is no archive")
    if "raw" not in site.data_type or "raw" not in there.data_type:
        return Skip(f"raw data does not go to {name} (data_type)")
    return there


def _any_good(run: Run, seen: Copy) -> Copy | None:
    """Return a good copy of the same data at another host, if any."""
    others = (one for one in run.copies if one.type == seen.type and one.host != seen.host)
    return next((one for one in others if unfit(one) is None), None)
