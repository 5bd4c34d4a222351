"""Copies are made: pulled from where they are good, or pushed to where they are wanted.

- `pull` reacts to a copy that became good elsewhere: where this site's ``download_options`` name
  that site and this site wants such data, it fetches a copy of its own.
- `push` reacts to a copy that became good here: it brings it to the sites that ``upload_options``
  names and that have none.

Both leave the new copy ``verifying``; `handlers.checksum`, at the copy's own host, does the rest.

Safe to repeat: the claim adds an entry only where the run has no such copy, so of two sites one
wins. The bytes go to a temporary name and appear under the final one only when they are whole and
on the disk. A broken transfer is continued by the same reaction, which knows its entry by the
``trigger`` that stands in it.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from attrs import frozen

from caxev import (
    ELSEWHERE,
    ERROR,
    GONE,
    HERE,
    TRANSFERRED,
    TRANSFERRING,
    VERIFYING,
    Copy,
    CopyIs,
    CopyKey,
    GiveUp,
    Job,
    Result,
    Retry,
    Run,
    RunUpdate,
    Skip,
    Superseded,
    copy,
    on,
)
from caxev.config import Site, Sites
from caxev.files import safe_name
from caxev.ssh import SERVED, transfer_between
from caxev.ssh import pull as pull_bytes
from caxev.ssh import push as push_bytes

STALLED = 15 * 60.0
"""Seconds without a byte after which a transfer is broken off and tried again."""


@frozen
class Plan:
    """A copy to be made: from which one, to which place; `resume` is its entry if we began it."""

    source: Copy
    key: CopyKey
    location: str
    resume: Copy | None


@on(
    copy(TRANSFERRED, host=ELSEWHERE),
    copy(GONE, host=HERE),
    lane="transfer",
    timeout=None,
    stall=STALLED,
    aliases=("CopyPull",),
)
async def pull(job: Job) -> Result:
    """Fetch a copy of data that is good at another site.

    The new copy is ``transferring``, then ``verifying``; ``error`` where it is given up.
    """
    trigger = str(job.event.aspect)
    plan = plan_pull(job.run, _key(job), job.site, job.sites, trigger=trigger, now=job.now())
    if isinstance(plan, Skip):
        wanted = CopyKey(_key(job).type, job.site.name, _key(job).version)
        return _withdrawal(job.run, wanted, trigger) or plan
    mine = await claim(job, plan)
    there = job.sites.get(plan.source.host)
    assert plan.source.location is not None
    transfer = transfer_between(job.site, there, plan.location, plan.source.location)
    await job.work(pull_bytes, transfer)
    return RunUpdate.change_copy(job.run, mine, VERIFYING, owner=None)


@on(
    copy(TRANSFERRED, host=HERE),
    copy(GONE, host=ELSEWHERE),
    lane="transfer",
    timeout=None,
    stall=STALLED,
    aliases=("CopyPush",),
)
async def push(job: Job) -> Result:
    """Bring data that is good here to the sites that want it and have none.

    Each new copy is ``transferring``, then ``verifying``; ``error`` where it is given up.
    """
    key = _key(job)
    wanted = (key.host,) if key.host != job.site.name else job.site.upload_options
    skipped: list[str] = []
    failed: list[Retry | GiveUp] = []
    for name in wanted:
        try:
            if (why := await _push_to(job, name, key)) is not None:
                skipped.append(why)
        except Superseded as lost:
            skipped.append(str(lost))
        except (Retry, GiveUp) as error:
            failed.append(error)
    if failed:
        # What may still come right is tried again before anything is given up.
        raise min(failed, key=lambda error: isinstance(error, GiveUp))
    return Skip("; ".join(skipped) or "upload_options names no site") if skipped else None


async def _push_to(job: Job, name: str, key: CopyKey) -> str | None:
    """Bring the copy to one site; says why not, where there is nothing to do."""
    trigger = str(job.event.aspect)
    plan = plan_push(job.run, key, job.site, job.sites, name=name, trigger=trigger)
    if isinstance(plan, Skip):
        withdrawal = _withdrawal(job.run, CopyKey(key.type, name, key.version), trigger)
        if withdrawal is not None:
            await job.update(withdrawal)
        return plan.why
    others = job.if_parked
    mine = await claim(job, plan)
    job.park_with(*others, *job.if_parked)
    there = job.sites.get(plan.key.host)
    assert plan.source.location is not None
    transfer = transfer_between(job.site, there, plan.source.location, plan.location)
    await job.work(push_bytes, transfer)
    await job.update(RunUpdate.change_copy(job.run, mine, VERIFYING, owner=None))
    job.park_with(*others)
    return None


def _withdrawal(run: Run, key: CopyKey, trigger: str) -> RunUpdate | None:
    """Take back an entry that this reaction made and can no longer bring to its end.

    Its vanishing is an event: whoever else can make that copy starts then.
    """
    entry = run.copy(key)
    if entry is None or entry.status != TRANSFERRING or not _ours(entry, trigger):
        return None
    return RunUpdate.remove_copy(run, entry)


async def claim(job: Job, plan: Plan) -> Copy:
    """Make the planned copy ours in the run document, anew or again; returns its entry.

    The digests of the source go with it, so that what arrives can be compared with what was
    meant even where the source is gone by then. Raises `Superseded` where somebody else was
    first, `Retry` where we were and the source is no longer good.
    """
    good = CopyIs(plan.source.key, {"status": TRANSFERRED, "location": plan.source.location})
    if plan.resume is not None:
        update = RunUpdate.change_copy(
            job.run,
            plan.resume,
            TRANSFERRING,
            good,
            owner=job.owner,
            source=plan.source.host,
            source_manifest=plan.source.manifest,
            source_checksum=plan.source.checksum,
        )
    else:
        update = RunUpdate.add_copy(
            job.run,
            plan.key,
            TRANSFERRING,
            good,
            location=plan.location,
            checksum=None,
            creation_time=job.now(),
            creation_place=job.site.name,
            source=plan.source.host,
            source_manifest=plan.source.manifest,
            source_checksum=plan.source.checksum,
            owner=job.owner,
            trigger=str(job.event.aspect),
        )
    try:
        mine = (await job.update(update)).copy(plan.key)
    except Superseded as lost:
        if plan.resume is None:
            raise
        raise Retry(str(lost), after=1.0) from lost
    if mine is None:
        raise Retry(f"the entry of {plan.key} vanished while it was claimed")
    job.park_with(RunUpdate.change_copy(job.run, mine, ERROR, owner=None))
    return mine


def plan_pull(
    run: Run, seen: CopyKey, site: Site, sites: Sites, *, trigger: str, now: datetime
) -> Plan | Skip:
    """Decide whether `site` fetches data of this type and version, and from where. Pure."""
    key = CopyKey(seen.type, site.name, seen.version)
    source = best_source(run, key, site, sites)
    if isinstance(source, Skip):
        return source
    if seen.host not in (source.host, site.name):
        return Skip(f"{source.host} has it too, and comes first in download_options")
    if to_be_purged(run, key, site, now):
        return Skip(f"it would be purged at once (purge: {site.purge:g} days)")
    return _plan(run, source, key, site, trigger)


def plan_push(
    run: Run, seen: CopyKey, site: Site, sites: Sites, *, name: str, trigger: str
) -> Plan | Skip:
    """Decide whether `site` brings its copy of this type and version to the site `name`. Pure."""
    if name not in site.upload_options:
        return Skip(f"upload_options does not name {name}")
    there = sites.find(name)
    if there is None:
        return Skip(f"{name} is not in sites.json")
    if there.method not in SERVED:
        return Skip(f"{name} is reached by {there.method}, which this reaction does not serve")
    if seen.type not in site.data_type or seen.type not in there.data_type:
        return Skip(f"{seen.type} data does not go to {name} (data_type)")
    source = run.copy(CopyKey(seen.type, site.name, seen.version))
    if source is None:
        return Skip(f"there is no copy at {site.name}")
    if why := unfit(source):
        return Skip(why)
    return _plan(run, source, CopyKey(seen.type, name, seen.version), there, trigger)


def _plan(run: Run, source: Copy, key: CopyKey, owner: Site, trigger: str) -> Plan | Skip:
    """Plan a copy of `source` as `key` in the directories of `owner`, its site."""
    there_already = run.copy(key)
    if there_already is not None and not _ours(there_already, trigger):
        return Skip(f"{key} is {there_already.status} already")
    base = owner.directory(key.type, key.version)
    if base is None:
        return Skip(f"{owner.name} has no directory for {key.type} data")
    assert source.location is not None
    location = f"{base.rstrip('/')}/{safe_name(source.location)}"
    if there_already is not None and there_already.location != location:
        raise GiveUp(f"the entry of {key} says {there_already.location!r}, not {location!r}")
    return Plan(source, key, location, there_already)


def _ours(entry: Copy, trigger: str) -> bool:
    """Whether this very reaction began that copy and has not brought it to its end."""
    return entry.status in (TRANSFERRING, ERROR) and entry.fields.get("trigger") == trigger


def best_source(run: Run, key: CopyKey, site: Site, sites: Sites) -> Copy | Skip:
    """Find the good copy that comes first in the site's ``download_options``. Pure."""
    if key.type not in site.data_type:
        return Skip(f"{site.name} does not move {key.type} data (data_type)")
    why = "download_options names no site"
    for name in site.download_options:
        found = run.copy(CopyKey(key.type, name, key.version))
        there = sites.find(name)
        if found is None:
            why = f"{name} has no such copy"
        elif there is None or there.method not in SERVED:
            why = f"{name} is not reached by {', '.join(SERVED)}"
        elif (problem := unfit(found)) is not None:
            why = problem
        else:
            return found
    return Skip(f"no source: {why}")


def unfit(source: Copy) -> str | None:
    """Say why nothing can be copied from there; None where it can."""
    if source.status != TRANSFERRED:
        return f"{source.key} is {source.status}"
    if source.location is None:
        return f"{source.key} has no location"
    if source.manifest is None and source.checksum is None:
        return f"{source.key} has no digest yet to compare a copy with"
    return None


def to_be_purged(run: Run, key: CopyKey, site: Site, now: datetime) -> bool:
    """Whether raw data of this age is purged at the site, so that fetching it is of no use."""
    if key.type != "raw" or site.purge is None or run.start is None:
        return False
    return run.start + timedelta(days=site.purge) < now


def _key(job: Job) -> CopyKey:
    assert isinstance(job.event.aspect, CopyKey)
    return job.event.aspect
