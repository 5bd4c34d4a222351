"""Rucio, the catalogue: upload and download.

- `rucio_upload` reacts to a copy that became good here, and brings it to the catalogues in
  ``upload_options``. It also reacts to a copy that a person requested, and to cax's states
  ``RSEreupload`` and ``RSEquota``, in which an upload waits to be retried.
- `rucio_pull` fetches a copy from a catalogue in ``download_options``, for a run that has one of
  ``rucio_tags``, or because a person requested it.

`caxev.handlers.rucio_datasets` looks after what is there.

An entry in a catalogue has the location ``scope:dataset``. It is ``transferring`` until every file
is available at the entrance RSE and its storage reports the right size and checksum, and only then
``transferred``; no other handler verifies it.

Safe to repeat: an entry is claimed by a conditional update and written by compare-and-set, and the
steps of `caxev.rucio` are idempotent. An interrupted upload is continued by the same reaction,
which recognizes its entry by the ``trigger``.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from attrs import frozen

from caxev import (
    ELSEWHERE,
    ERROR,
    GONE,
    HERE,
    PASSIVE,
    REQUESTED,
    TRANSFERRED,
    TRANSFERRING,
    Copy,
    CopyKey,
    Job,
    Result,
    Retry,
    Run,
    RunUpdate,
    Skip,
    What,
    copy,
    on,
    skip_of,
    tag,
)
from caxev.config import Site, Sites
from caxev.copies.lifecycle import (
    CopyPlan,
    arrived,
    asked_by,
    claim,
    found_good,
    is_ours,
    key_of,
    manifest_of,
    place_for,
    requested_from,
    serve_each,
    taken,
    targets,
    trigger_of,
    unfit,
    withdrawal,
    written,
)
from caxev.copies.readings import suspecting
from caxev.copies.retention import to_be_purged, unwanted, was_deleted
from caxev.core.selection import source_of
from caxev.rucio import client
from caxev.rucio.errors import OverQuota
from caxev.rucio.files import Checked, stored_as
from caxev.rucio.names import CopyNames, Did, names_of, taken_at
from caxev.rucio.orders import Download, Upload
from caxev.transfer.carrying import STALLED

REUPLOAD = "RSEreupload"
QUOTA = "RSEquota"
WAITING = (REUPLOAD, QUOTA)
"""cax's states of an entry whose upload waits to be retried."""


# -- upload ---------------------------------------------------------------------------------------


@frozen
class UploadPlan(CopyPlan):
    """A copy to bring into a catalogue, by these `names`."""

    names: CopyNames


@on(
    copy(TRANSFERRED, host=HERE),
    copy((REQUESTED, GONE, *WAITING), host=PASSIVE),
    lane="transfer",
    stall=STALLED,
    aliases=("CopyPush",),
    decide=lambda job: skip_of(*(_upload_plan(job, name) for name in targets(job))),
)
async def rucio_upload(job: Job) -> Result:
    """Bring data that is good here into the catalogues that want it.

    The entry becomes ``transferring``, then ``transferred``; ``RSEreupload`` or ``RSEquota`` while
    it waits for a retry, ``error`` if it fails.
    """
    return await serve_each(job, targets(job), _upload_to)


def _upload_plan(job: Job, name: str) -> UploadPlan | Skip | RunUpdate:
    """Decide about one catalogue; an update withdraws the entry of what cannot be brought."""
    key, trigger = key_of(job), trigger_of("rucio_upload", job)
    plan = plan_upload(job.run, key, job.site, job.sites, name=name, trigger=trigger)
    if isinstance(plan, Skip):
        # Else no other site could bring it there: an entry that waits looks like one at work.
        return withdrawal(job.run, key.at(name), trigger, (TRANSFERRING, *WAITING)) or plan
    return plan


async def _upload_to(job: Job, name: str, others: tuple[RunUpdate, ...]) -> str | None:
    """Bring the copy into one catalogue, or return why there is nothing to do."""
    plan = _upload_plan(job, name)
    if isinstance(plan, Skip):
        return plan.why
    if isinstance(plan, RunUpdate):
        await job.update(plan)
        return "it can no longer be brought there"
    await job.update(await _upload(job, plan, others))
    return None


async def _upload(job: Job, plan: UploadPlan, others: tuple[RunUpdate, ...]) -> RunUpdate:
    """Bring the copy into the catalogue; returns the update for its entry."""
    assert plan.source.location is not None
    name = plan.source.location.rstrip("/").rpartition("/")[2]
    fields, began = {"location": plan.location, "source_name": name}, job.now()
    mine = await claim(job, plan, fields, others=others, new={"rse": [], "rule_info": []})
    try:
        async with suspecting(job, plan.source):
            read, found = await job.work(client.upload, _order(job, plan))
    except Retry as error:
        status = QUOTA if isinstance(error, OverQuota) else REUPLOAD
        await _wait(job, mine, status, error, others)
        raise
    digest = read.manifest.digest
    # Before the entry names it. The second has the checksums of the files in the catalogue, so
    # that replicas can be compared after our copy is gone.
    await job.store_manifest(digest, read.manifest.to_rows())
    await job.store_manifest(stored_as(digest), [one.to_row() for one in read.files])
    hosts, size = {"source": job.site.name, "target": plan.key.host}, read.manifest.total_bytes
    job.did(What.TRANSFERRED, **hosts, bytes=size, by=asked_by(mine))
    return found_good(
        job.run,
        mine,
        owner=None,
        error=None,
        checksumproblem=None,
        manifest=digest,
        checksum=plan.source.checksum or read.manifest.cax_checksum(),
        verified_at=began,
        arrived_at=job.now(),
        rse=list(found.rses),
        rule_info=[one.to_row() for one in found.rules],
        rules=None,  # has `rucio_rules` read the rule file for this entry
    )


def _order(job: Job, plan: UploadPlan) -> Upload:
    source, there = plan.source, job.sites.get(plan.key.host)
    assert source.location is not None
    return Upload(
        here=job.site,
        there=there,
        names=plan.names,
        location=source.location,
        manifest=source.manifest,
        checksum=source.checksum,
        metadata=metadata_of(job.run, plan, there),
    )


async def _wait(
    job: Job, mine: Copy, status: str, why: Retry, others: tuple[RunUpdate, ...]
) -> None:
    """Record in the entry, as cax did, that the upload waits to be retried."""
    update = RunUpdate.change_copy(job.run, mine, status, owner=None, error=str(why))
    waiting = await written(job, update, mine.key)
    job.on_failure(*others, RunUpdate.give_up(job.run, waiting))


def plan_upload(
    run: Run, seen: CopyKey, site: Site, sites: Sites, *, name: str, trigger: str
) -> UploadPlan | Skip:
    """Decide whether `site` brings its copy of this data to the catalogue `name`. Pure."""
    there = sites.find(name)
    if there is None or there.method != "rucio":
        return Skip(f"{name} is no catalogue in sites.json")
    key = seen.at(name)
    entry = run.copy(key)
    asked = entry is not None and entry.status == REQUESTED and entry.source == site.name
    ours = is_ours(entry, trigger, (TRANSFERRING, ERROR, *WAITING))
    if name not in site.upload_options and not (asked or ours):
        return Skip(f"upload_options does not name {name}")
    if seen.type not in site.data_type or seen.type not in there.data_type:
        return Skip(f"{seen.type} data does not go to {name} (data_type)")
    source = run.copy(seen.at(site.name))
    if why := unfit(source, seen.at(site.name)):
        return Skip(why)
    assert source is not None
    # Without a trigger cax had begun it, which waits for a retry.
    waits = entry is not None and entry.status in WAITING and entry.trigger is None
    if entry is not None and not (asked or ours or waits):
        return Skip(f"{key} is {entry.status} already")
    # An entry means that the upload was requested or begun after the deletion.
    if entry is None and (why := was_deleted(run, key)):
        return Skip(why)
    known = None if entry is None else entry.location
    names = names_of(run, key, there.rucio, known)
    return UploadPlan(source, key, str(names.dataset), trigger, entry, names)


def metadata_of(run: Run, plan: UploadPlan, there: Site) -> dict[str, object]:
    """Return the dataset's metadata for the catalogue, by the keys that cax used."""
    user = run.document.get("user")
    metadata = {
        "phys_group": user if isinstance(user, str) else None,
        "provenance": there.rucio.detectors.get(run.detector, run.detector) or None,
        "datatype": source_of(run),
        "campaign": plan.names.campaign,
        "run_number": run.number,
        "prod_step": plan.key.type,
        "version": plan.key.version,
    }
    return {name: value for name, value in metadata.items() if value is not None}


# -- download -------------------------------------------------------------------------------------


@frozen
class DownloadPlan(CopyPlan):
    """A copy to fetch from a catalogue, from `rse` if one is given."""

    rse: str | None


@on(
    copy(TRANSFERRED, host=PASSIVE),
    copy((ERROR, GONE), host=ELSEWHERE),  # one that came first in download_options
    copy(GONE, host=HERE),
    copy(REQUESTED, host=HERE),
    tag("*"),
    lane="transfer",
    stall=STALLED,
    aliases=("CopyPull",),
    decide=lambda job: skip_of(*_fetch_plans(job), *_withdrawals(job)),
)
async def rucio_pull(job: Job) -> Result:
    """Fetch a copy of data from a catalogue.

    The new copy becomes ``transferring``, then ``verifying``; ``error`` if it fails.
    """
    skipped: list[str] = []
    for update in _withdrawals(job):
        await job.update(update)
    for plan in _fetch_plans(job):
        if isinstance(plan, Skip):
            skipped.append(plan.why)
            continue
        mine = await _fetch(job, plan)
        await job.update(arrived(job.run, mine))
        job.on_failure()  # this copy is done: a later one that fails must not make it an error
    return Skip("; ".join(dict.fromkeys(skipped)) or "no catalogue has it") if skipped else None


def _fetch_plans(job: Job) -> Iterator[DownloadPlan | Skip]:
    """Decide about each entry in a catalogue, by the run as it is when that is asked for."""
    trigger = trigger_of("rucio_pull", job)
    for key in _catalogue_keys(job):
        yield plan_fetch(job.run, key, job.site, job.sites, trigger=trigger, now=job.now())


def _withdrawals(job: Job) -> list[RunUpdate]:
    """Return the updates that remove what this reaction has claimed and no catalogue gives."""
    trigger = trigger_of("rucio_pull", job)
    coming = {plan.key for plan in _fetch_plans(job) if isinstance(plan, DownloadPlan)}
    mine = (one.key for one in job.run.copies if one.host == job.site.name)
    left = (withdrawal(job.run, key, trigger) for key in mine if key not in coming)
    return [*filter(None, left)]


def _catalogue_keys(job: Job) -> list[CopyKey]:
    """Return the entries in catalogues that the event may be about."""
    aspect = job.event.aspect
    found = []
    for entry in job.run.copies:
        there = job.sites.find(entry.host)
        if there is None or there.method != "rucio":
            continue
        if isinstance(aspect, CopyKey):
            if (entry.type, entry.version) != (aspect.type, aspect.version):
                continue
            # One that is lost elsewhere may have come first; one that is good was no news.
            is_good = job.event.status == TRANSFERRED
            if is_good and aspect.host not in (job.site.name, entry.host):
                continue
        found.append(entry.key)
    return found


async def _fetch(job: Job, plan: DownloadPlan) -> Copy:
    """Fetch the copy; returns its entry."""
    source = plan.source
    mine = await claim(job, plan, {"location": plan.location})
    digest = source.manifest
    files = await job.load_manifest(stored_as(digest)) if digest else None
    order = Download(
        here=job.site,
        there=job.sites.get(source.host),
        dataset=Did.of(source.location),
        location=plan.location,
        taken=taken_at(job.run) or job.now(),
        files=None if files is None else tuple(map(Checked.from_row, files)),
        expected=await manifest_of(job, digest),
        rse=plan.rse,
        single=source.type not in job.site.types.primary,
    )
    async with suspecting(job, source):
        moved = await job.work(client.download, order)
    job.log.info(f"fetched {moved.bytes_sent} of {moved.bytes_total} bytes from {source.host}")
    hosts = {"source": source.host, "target": job.site.name}
    job.did(What.TRANSFERRED, **hosts, bytes=moved.bytes_sent, by=asked_by(mine))
    return mine


def plan_fetch(
    run: Run, seen: CopyKey, site: Site, sites: Sites, *, trigger: str, now: datetime
) -> DownloadPlan | Skip:
    """Decide whether `site` fetches from the catalogue entry `seen`. Pure."""
    source = run.copy(seen)
    if source is None or source.status != TRANSFERRED or source.location is None:
        return Skip(f"{seen} is {source.status if source else 'gone'}")
    key = seen.at(site.name)
    entry = run.copy(key)
    asked = requested_from(entry, trigger)
    if asked not in (None, seen.host):
        return Skip(f"it was requested from {asked}")
    if asked is None and (why := _unwanted(run, seen, site, sites, now)):
        return Skip(why)
    if why := taken(entry, trigger):
        return Skip(why)
    location = place_for(key, source.source_name or run.name + run.suffix, site)
    if isinstance(location, Skip):
        return location
    rse = entry.from_rse if entry is not None else None
    if rse is None and site.rucio_download_rse in source.rse:
        rse = site.rucio_download_rse
    return DownloadPlan(source, key, location, trigger, entry, rse)


def _unwanted(run: Run, seen: CopyKey, site: Site, sites: Sites, now: datetime) -> str | None:
    """Return why this site does not fetch the data without a request, or None if it does."""
    tagged = not {*site.rucio_tags}.isdisjoint(run.tags)
    if seen.host not in site.download_options and not tagged:
        return f"download_options does not name {seen.host}"
    if seen.type not in site.data_type:
        return f"{site.name} does not move {seen.type} data (data_type)"
    here = seen.at(site.name)
    why = (to_be_purged if tagged else unwanted)(run, here, site, now)
    if why is not None:
        return why
    for name in site.download_options:
        if name == seen.host:
            break
        other, there = run.copy(seen.at(name)), sites.find(name)
        fit = other is not None and other.status == TRANSFERRED and other.location
        if fit and there is not None and there.method != "tsm":
            return f"{name} has it too, and comes first in download_options"
    return None
