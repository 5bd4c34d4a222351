"""Derived data: raw data is processed, processed data is reduced to minitrees.

- `process` reacts to raw data that is good here, and to the fields that make a run ready: it
  claims a ``processed`` entry for each wanted version. `minitrees` does the same for processed
  data, and `derive` for the types of data that ``types`` of sites.json adds. By
  `caxev.batch.deriving` all three decide.
- `submit` reacts to such an entry: it runs the site's command as a process here, or sends it to
  the batch system, together with other jobs of the same moment.
- `collect` reacts to the end of a job, which the job itself writes into the entry
  (``job_ended``). It publishes the result, and the copy becomes ``verifying`` for
  `caxev.handlers.checksum`; or it retries the job, as the site's ``retries`` allow; or the copy
  becomes ``error``.
- `withdraw` reacts to the tag ``donotprocess`` and to a removed entry, and cancels the job.

Safe to repeat: the claim adds an entry only if the run has none. A job's name contains site, run,
type, version, claim and attempt. Jobs are filed by name before they are sent, so a job that was
sent is found and not sent again. Each attempt writes to a private directory of its own, and its
result is published once. Nothing is polled: a job reports its own end, or its watch does. A job
that has not reported is checked every `LOOK_EVERY` seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from math import inf
from typing import Any, Final

import trio
from attrs import evolve, frozen

from caxev import (
    DERIVED,
    ERROR,
    GONE,
    HERE,
    OWN,
    PROCESSING_INPUTS,
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
    Tag,
    TagAbsent,
    TagThere,
    What,
    copy,
    copy_field,
    field,
    on,
    skip_of,
    tag,
)
from caxev.batch.base import End, JobEnd, JobSpec
from caxev.batch.derived import (
    attempt_at,
    attempt_of,
    in_words,
    jobs_of,
    name_of,
    names_of,
    new_job,
    next_job,
    spec_of,
)
from caxev.batch.deriving import DO_NOT, failed_before, plan_derived
from caxev.batch.queue import Queue
from caxev.batch.runner import report, run_here
from caxev.batch.work import look, send, take_stock
from caxev.batch.work import withdraw as cancel
from caxev.config import Processing, Site, jobs_directory
from caxev.config.processing import LOCAL
from caxev.copies import lifecycle
from caxev.copies.lifecycle import CopyPlan, arrived, broken_off, retried
from caxev.copies.retention import stays_gone
from caxev.core.job import Wait
from caxev.core.model import Aspect

KEYS: Final = ("processing", "minitrees", OWN)
"""The keys of sites.json that configure how a site makes derived data."""
LOOK_EVERY: Final = 6 * 3600.0
"""Seconds between two checks of a job that has not reported its end."""

queue = Queue()
"""Jobs on their way to the batch system."""
at_work: dict[tuple[str, str], trio.CancelScope] = {}
"""Jobs that run as processes of this listener, by their jobs directory and name."""
_left = trio.lowlevel.ParkingLot()


@on(
    copy(TRANSFERRED, type="raw", host=HERE),
    copy(GONE, type="processed", host=HERE),
    field("processor.DEFAULT", "trigger.events_built", "reader.ini.write_mode", PROCESSING_INPUTS),
    tag(DO_NOT, gone=True),
    needs=("processing",),
    aliases=("ProcessBatchQueue",),
    decide=lambda job: skip_of(_planned(job, "processed")),
)
async def process(job: Job) -> Result:
    """Claim a processed copy of raw data that is good here, once the run is ready.

    The new copy is ``transferring``; `submit` continues.
    """
    return await claim(job, _planned(job, "processed"))


@on(
    copy(TRANSFERRED, type="processed", host=HERE),
    copy(GONE, type="minitrees", host=HERE),
    tag(DO_NOT, gone=True),
    needs=("minitrees",),
    aliases=("ProcessBatchQueueHax",),
    decide=lambda job: skip_of(_planned(job, "minitrees")),
)
async def minitrees(job: Job) -> Result:
    """Claim minitrees of processed data that is good here.

    The new copy is ``transferring``; `submit` continues.
    """
    return await claim(job, _planned(job, "minitrees"))


@on(
    copy(TRANSFERRED, host=HERE),
    copy(GONE, type=OWN, host=HERE),
    field(PROCESSING_INPUTS),
    tag(DO_NOT, gone=True),
    needs=(OWN,),
    decide=lambda job: skip_of(_planned(job, *_own(job))),
)
async def derive(job: Job) -> Result:
    """Claim data of the types that ``types`` of sites.json adds, once what it is made of is here.

    The new copy is ``transferring``; `submit` continues.
    """
    return await claim(job, _planned(job, *_own(job)))


def _own(job: Job) -> list[str]:
    # Only the data that is made from this copy: other data may have been deleted on purpose since.
    aspect = job.event.aspect
    return own_types(job.site, aspect.type if isinstance(aspect, CopyKey) else None)


def _planned(job: Job, *types: str) -> list[CopyPlan] | Skip:
    # An entry that kept us from making the data may have been a dead program's.
    return stays_gone(job.event, job.run) or plan_derived(job.run, types, job.site)


async def claim(job: Job, plans: Sequence[CopyPlan] | Skip) -> Result:
    """Claim each planned copy, independent of the others.

    A new run has several events at once that all lead here: the first one wins.
    """
    if isinstance(plans, Skip):
        return plans
    for plan in plans:
        try:
            await job.update(claiming(job, plan))
        except Superseded as lost:
            job.log.info(f"{plan.key}: {lost}")
    return None


def claiming(job: Job, plan: CopyPlan) -> RunUpdate:
    """Return the update that claims a planned copy, if the run has not changed."""
    how = job.site.processing_of(plan.key.type)
    assert how is not None
    row = new_job(job.run, plan.key, how, plan.source, claimed=job.now())
    fields: dict[str, Any] = {
        "location": plan.location,
        "pax_hash": how.pax_hash.get(plan.key.version or "", "n/a"),
        "job": row,
    }
    if plan.resume is not None:
        row |= attempt_at(job.run, plan.key, row["claimed"], attempt_of(plan.resume) + 1)
        fields |= {"job_ended": None, "error": None}
    # Part of the update: the tag may be added between our decision and the write.
    return lifecycle.claiming(job, plan, fields, TagAbsent(DO_NOT))


# -- jobs -----------------------------------------------------------------------------------------


@on(
    # The last three end the check that the first leaves due.
    copy((TRANSFERRING, VERIFYING, ERROR, GONE), type=DERIVED, host=HERE),
    lane="processing",
    timeout=None,
    needs=KEYS,
    aliases=("ProcessBatchQueue", "ProcessBatchQueueHax"),
    decide=lambda job: skip_of(plan_submit(job.run, job.copy, job.site, job.now())),
)
async def submit(job: Job) -> Result:
    """Run the job of a claimed copy here, or send it to the batch system and watch it."""
    plan = plan_submit(job.run, job.copy, job.site, job.now())
    if isinstance(plan, Skip):
        return plan
    if isinstance(plan, Wait):
        raise plan.retry(job.now())
    how, spec = plan.how, plan.spec
    home = jobs_directory(job.site, spec.key.type)
    # A local job is awaited here; a restart runs it again. A batch job outlives this listener.
    if how.system == LOCAL:
        await job.update(report(spec, await run_in_turn(job, how, home, spec)))
        return None
    number = plan.number
    if number is None:
        sending = partial(job.work, send, how.system, home, how.most)
        found = await queue.place(spec, home, sending)
        number, ended = found.id, found.ended
        try:
            await note(job, spec, {"job.id": number, "job.submitted": job.now()})
        except Superseded:
            # `withdraw` came while the job was on its way, and could not find it yet.
            await job.work(cancel, how.system, home, spec.name)
            return Skip("it was withdrawn before it was sent")
    else:
        ended = await job.work(look, how.system, home, spec.name, number)
    if ended is None:
        raise Retry(f"{how.system} has it as job {number}", after=LOOK_EVERY)
    await job.update(report(spec, ended, number))
    return None


async def run_in_turn(job: Job, how: Processing, home: str, spec: JobSpec) -> JobEnd:
    """Run a job as a process of this machine: wait for a free slot, and stop it at its walltime."""
    here = (home, spec.name)
    # `here in at_work`: a cancelled reaction may still be ending the same job.
    while here in at_work or sum(place == home for place, _ in at_work) >= how.most:
        await _left.park()
    scope = at_work[here] = trio.CancelScope()
    try:
        # We may have waited for long: check that the copy is still wanted, just before it starts.
        await note(job, spec, {"job.submitted": job.now()}, status=TRANSFERRING, job_ended=None)
        with scope, trio.move_on_after(spec.walltime or inf) as limit:
            return await job.work(run_here, home, spec)
    finally:
        del at_work[here]
        _left.unpark_all()
    if limit.cancelled_caught:
        return JobEnd(End.TIMEOUT, why=f"not done after {spec.walltime} s")
    return JobEnd(End.CANCELLED, why="it was withdrawn")


async def note(job: Job, spec: JobSpec, fields: Mapping[str, object], **expected: object) -> None:
    """Write fields about its job into an entry.

    Raises `Superseded` if the entry has another job, or does not have the `expected` fields.
    """
    its = CopyIs(spec.key, {"job.name": spec.name, **expected})
    await job.update(RunUpdate(job.run.id, (its,), change=(its, fields)))


@on(
    copy_field("job_ended", type=DERIVED, host=HERE),
    lane="results",
    timeout=None,
    needs=KEYS,
    aliases=("ProcessBatchQueue", "ProcessBatchQueueHax"),
    decide=lambda job: skip_of(plan_collect(job.run, job.copy, job.site)),
)
async def collect(job: Job) -> Result:
    """Publish the result of a finished job, or retry a failed one as `retries` allow.

    The copy becomes ``verifying``, ``transferring`` again, or ``error``.
    """
    plan = plan_collect(job.run, job.copy, job.site)
    if isinstance(plan, Skip):
        return plan
    entry, how, ended, name = plan
    assert entry.location is not None  # `plan_collect` has checked it
    home = jobs_directory(job.site, entry.type)
    # For an error before the result is known, as a full disk; a better reason is set below.
    job.on_failure(broken_off(job.run, entry))
    good = ended.how is End.DONE
    stock = await job.work(take_stock, home, name, entry.location, job.site.roots, good)
    queue.left()  # its slot in the batch system is free: a waiting job can be sent
    if stock.size is not None:
        job.did(What.PROCESSED, bytes=stock.size)
        fields = {"size": stock.size, "error": None, "job.log": stock.log}
        return arrived(job.run, entry, **fields)
    # A job that ended well without a result has failed like any other.
    failed = evolve(ended, how=End.EXIT, why=stock.problem) if stock.problem else ended
    why = in_words(failed, stock.last_words, stock.log)
    resent = next_job(job.run, entry, failed, how)
    if resent is None:
        job.on_failure(broken_off(job.run, entry, error=why, **{"job.log": stock.log}))
        raise GiveUp(f"{entry.key}: {why}")
    job.log.warning(f"{entry.key} is tried again: {why}")
    # The time is kept in the entry: `submit` waits for it, even after a restart.
    after = job.now() + timedelta(seconds=how.retry_after)
    job_now = {**resent, "not_before": after}
    return retried(job.run, entry, why, job=job_now, job_ended=None, owner=job.owner)


@on(
    tag(DO_NOT),
    copy(GONE, type=DERIVED, host=HERE),
    lane="results",
    needs=KEYS,
    aliases=("ProcessBatchQueue", "ProcessBatchQueueHax"),
    decide=lambda job: plan_withdraw(job.event.aspect, job.run, job.site),
)
async def withdraw(job: Job) -> Result:
    """Cancel the jobs of a run tagged ``donotprocess``, or of a copy without an entry."""
    aspect = job.event.aspect
    skip = plan_withdraw(aspect, job.run, job.site)
    if skip is not None:
        return skip
    if isinstance(aspect, Tag):
        for entry in jobs_of(job.run, job.site):
            # If the tag was removed meanwhile, this may be a new claim, which must stay.
            await job.update(RunUpdate.remove_copy(job.run, entry, TagThere(DO_NOT)))
        return None  # the removals are events, and cancel the jobs
    assert isinstance(aspect, CopyKey)
    how = job.site.processing_of(aspect.type)
    assert how is not None  # `plan_withdraw` has checked it
    home, prefix = jobs_directory(job.site, aspect.type), names_of(job.run, aspect)
    # The copy may have been claimed again since: all its jobs go but the current one.
    now = None if job.copy is None else job.copy.job
    current = "" if now is None or now.name is None else now.name
    for (place, name), scope in at_work.items():
        if place == home and name.startswith(prefix) and name != current:
            scope.cancel()
    count = await job.work(cancel, how.system, home, prefix, current)
    queue.left()
    return None if count else Skip("it had no job")


# -- deciding -------------------------------------------------------------------------------------


def plan_withdraw(aspect: Aspect, run: Run, site: Site) -> Skip | None:
    """Return why there is nothing to cancel; None if there may be. Pure."""
    if isinstance(aspect, Tag):
        if DO_NOT not in run.tags:
            return Skip(f"it is no longer tagged {DO_NOT}")
        return None if any(jobs_of(run, site)) else Skip("it has no jobs here")
    assert isinstance(aspect, CopyKey)
    if site.processing_of(aspect.type) is None:
        return Skip(f"this site makes no {aspect.type} data")
    return None


def own_types(site: Site, about: str | None = None) -> list[str]:
    """Return the types that ``types`` adds and this site makes. Pure.

    If the event is `about` a type of data, only that type and those that are made from it.
    """
    made = [one for one in site.types.own if one.name in site.made]
    return [one.name for one in made if about in (None, one.name, one.source)]


@frozen
class SubmitPlan:
    """A job to send, how, and the batch system's `number` for it if it was sent."""

    how: Processing
    spec: JobSpec
    number: Any = None


def plan_submit(
    run: Run, entry: Copy | None, site: Site, now: datetime
) -> SubmitPlan | Wait | Skip:
    """Decide whether and how the job of this copy is sent. Pure."""
    if entry is None or entry.status != TRANSFERRING:
        return Skip("its job is over" if entry is None else f"it is {entry.status}")
    how, job = site.processing_of(entry.type), entry.job
    if how is None or job is None or job.name is None:
        return Skip("it is not made here, but copied")
    if entry.job_ended is not None:
        return Skip("its job has ended")
    spec = spec_of(run, entry, how, site)
    if job.id is None and job.not_before is not None and now < job.not_before:
        return Wait(f"to be tried again: {entry.error}", job.not_before)
    return SubmitPlan(how, spec, job.id)


def plan_collect(
    run: Run, entry: Copy | None, site: Site
) -> tuple[Copy, Processing, JobEnd, str] | Skip:
    """Decide whether the result of this copy's job is collected. Pure.

    Returns how the job has ended, and its name, too. One that failed for good counts: a person has
    asked for a retry.
    """
    if entry is None:
        return Skip("the copy is gone")
    how, job, ended = site.processing_of(entry.type), entry.job, entry.job_ended
    if how is None or entry.location is None:
        return Skip("it is not made here")
    if job is None or ended is None:
        return Skip("no job has ended")
    if ended.name != job.name:
        return Skip("that job is not this copy's any more")
    if entry.status != TRANSFERRING and not failed_before(entry):
        return Skip(f"it is {entry.status}")
    return entry, how, JobEnd.from_row(ended.fields), name_of(run, entry)
