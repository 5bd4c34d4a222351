"""Stalled copies: an alarm first, then the copy is given up so that it can be made again.

`stalled` reacts to a copy that is ``transferring``, ``verifying`` or ``moving`` at this site or at
a host without a listener. After ``stalled.warn`` hours in one status it raises an alarm until the
status changes. After ``stalled.retry`` hours it removes the entry of a ``transferring`` copy. The
removal is an event that starts the transfer again; data that has already arrived is reused. The
run records this in ``given_up``. An ``error`` that an old program left is treated the same way,
unless `caxev.handlers.repair` can repair the copy.

`merge` reacts to a key with several entries, which old programs add without looking. If one of
them is good, it removes the others once nobody works on them, and has the copy read again if
something was being written to its location.

Age alone is not enough to give up a copy: its owner must be gone, or show no progress. Entries of
old cax have no owner, so their age decides; without a usable date it counts from when we first saw
them. Copies made by jobs may wait in a queue for days: `caxev.handlers.processing` looks after
them. A ``verifying`` copy is read by its own site's listener, and a ``moving`` one is finished by
repeating ``caxev mv``: both only raise an alarm.

Safe to repeat: the update expects the status and the owner that were found.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from attrs import frozen

from caxev import (
    ERROR,
    GONE,
    HERE,
    MOVING,
    PASSIVE,
    TRANSFERRED,
    TRANSFERRING,
    VERIFYING,
    Copy,
    CopyField,
    CopyKey,
    Job,
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
)
from caxev.config import Stalled
from caxev.config.data_types import UNTRIGGERED
from caxev.copies.lifecycle import in_commands, write
from caxev.copies.quorum import agree, is_disputed, same_data
from caxev.core.job import Wait
from caxev.core.model import STATUSES, new_id

ALARM = "copy stands still"
AHEAD = timedelta(minutes=5)
"""Allowed clock difference of two servers that were primary one after the other."""


@frozen
class Late:
    """It has had its status for `hours`, which is too long; the next check is at `again` (UTC)."""

    hours: float
    again: datetime


@frozen
class Undated:
    """Its status has no usable date: it gets one now."""


@frozen
class TooLate:
    """It has had its status for `hours`, and is given up unless its owner is alive."""

    hours: float


Plan = Wait | Late | Undated | TooLate | Skip


@on(
    copy((TRANSFERRING, VERIFYING, MOVING), host=(HERE, PASSIVE)),
    copy((TRANSFERRED, ERROR, GONE), host=(HERE, PASSIVE)),  # so that the waiting has an end
    aliases=("RetryStalledTransfer",),
    concerns=lambda run, _site: any(one.status != TRANSFERRED for one in run.copies),
    decide=lambda job: plan if isinstance(plan := _plan(job), Skip | Wait) else None,
)
async def stalled(job: Job) -> Result:
    """Raise an alarm for a copy that makes no progress, and later have it made again."""
    seen, plan, now = job.copy, _plan(job), job.now()
    if seen is None or isinstance(plan, Skip):
        await job.all_clear(ALARM)
        return plan if isinstance(plan, Skip) else None
    rules = job.sites.get(seen.host).stalled
    match plan:
        case Undated():
            return RunUpdate.change_copy(job.run, seen, seen.status)  # which dates it again
        case Wait() as early:
            await job.all_clear(ALARM)
            raise early.retry(now)
        case Late(hours, again):
            if await _is_live(job, seen):
                await job.all_clear(ALARM)
                raise Wait("somebody is at work on it", again).retry(now)
            summary = _summary(job, seen, hours)
            await job.alarm(ALARM, summary, severity="warning", **todo(job, seen))
            raise Wait(f"it has been {seen.status} for {hours:.0f} h", again).retry(now)
        case TooLate(hours):
            # Checked last, right before the removal: the owner may have come back to life.
            if await _is_live(job, seen):
                raise Retry("somebody is at work on it", after=rules.warn * 3600 or 3600.0)
            job.log.error(f"{_summary(job, seen, hours)}: given up")
            job.did(What.GIVEN_UP, reason=_summary(job, seen, hours))
            await job.all_clear(ALARM)
            gone = RunUpdate.remove_copy(job.run, seen)
            # Only files of old programs need a record: ours go to a temporary name, which the next
            # transfer finds; theirs are at the final location and look like a finished copy.
            return gone if seen.trigger else gone.remembered(seen)


def _plan(job: Job) -> Plan:
    """Decide what happens to an unfinished copy now. Pure."""
    seen = job.copy
    if seen is None:
        return Skip("the copy is gone")
    # An entry without a source, or with one that is no site any more, has no responsible site:
    # every site that sees it looks after it.
    source = seen.source if seen.source in job.sites else None
    if seen.host != job.site.name and source not in (None, job.site.name):
        return Skip(f"{seen.source} put it there, and looks after it")
    there = job.sites.get(seen.host)
    # A site that makes no such data any more looks after no job of it either.
    made = there.processing_of(seen.type) is not None
    stays = _stays(job, seen)
    return plan_stalled(seen, there.stalled, job.now(), job.at, stays=stays, made=made)


def _stays(job: Job, seen: Copy) -> bool:
    """Return whether a failed copy keeps its entry, as possibly the only one of this data.

    A catalogue may hold some of its files, which `caxev rucio put` reuses.
    """
    good = (one for one in job.run.copies if one.status == TRANSFERRED)
    made_again = any(same_data(one, seen.key) and one.host != seen.host for one in good)
    return not made_again or job.sites.get(seen.host).method == "rucio"


def _summary(job: Job, seen: Copy, hours: float) -> str:
    return f"{seen.key} of {job.run} has been {seen.status} for {hours:.0f} h"


def todo(job: Job, seen: Copy) -> dict[str, str]:
    """Return what a person can do about a copy that is not given up automatically."""
    host, (named, which) = seen.host, in_commands(job.run, seen)
    good = (one for one in job.run.copies if one.status == TRANSFERRED and same_data(one, seen.key))
    steps = {
        MOVING: f"at {host}: caxev mv {which} --site {host} --to {seen.moving_to}",
        VERIFYING: f"caxev explain {named} --site {host} shows what it waits for",
        ERROR: next((f"caxev copy {which} --from {one.host} --to {host}; or " for one in good), "")
        + f"caxev rm {which} --site {host} --by-entries --why REASON",
    }
    return {"todo": steps[seen.status]} if seen.status in steps else {}


async def _is_live(job: Job, seen: Copy) -> bool:
    return seen.owner is not None and await job.is_live(seen.owner, seen.trigger)


def _begun(seen: Copy, now: datetime) -> datetime | None:
    """Return since when it has its status, or for old programs when they created the entry.

    None without a date, or with one in the future, which would protect the copy until then.
    """
    since = seen.since
    if since is None and seen.status in (TRANSFERRING, ERROR):
        since = seen.creation_time
    return None if since is None or since > now + AHEAD else since


def plan_stalled(
    seen: Copy,
    rules: Stalled,
    now: datetime,
    at: datetime,
    *,
    stays: bool = False,
    made: bool = True,
) -> Plan:
    """Decide by its age what happens to an unfinished copy. Pure.

    `at` is when this site first saw its status, UTC, used if the entry has no usable date. With
    `stays` a failed copy is not given up, however old it is. `made`: the copy's site runs such
    jobs.
    """
    if seen.type == UNTRIGGERED:
        return Skip("the DAQ's buffer is never touched")
    if seen.status not in (TRANSFERRING, VERIFYING, MOVING) and not seen.is_abandoned:
        return Skip(f"it is {seen.status}")
    if seen.status == TRANSFERRING and seen.job is not None and made:
        return Skip("a job makes it, and may wait and run for days: it is looked after as a job")
    since = _begun(seen, now)
    if since is None and seen.status == TRANSFERRING:
        # Dated in the entry, not only here: deletions ask how long its source may have been read.
        return Undated()
    since = since or at
    age = (now - since).total_seconds() / 3600
    warn, retry = since + timedelta(hours=rules.warn), since + timedelta(hours=rules.retry)
    if now < min(warn, retry):
        return Wait(f"it has not been {seen.status} for long", min(warn, retry))
    if seen.status != TRANSFERRING and (stays or not seen.is_abandoned):
        return Late(age, now + timedelta(hours=max(rules.retry, 1.0)))
    return Late(age, retry) if now < retry else TooLate(age)


# -- several entries of one copy ------------------------------------------------------------------

STAYS = (TRANSFERRED, VERIFYING, TRANSFERRING)
"""Statuses of the entry to keep of several for one copy, best first."""
TELLING = (
    *("status", "owner", "location", "checksum", "manifest", "trigger"),
    *("creation_time", "creation_place", "status_since"),
)
"""The fields that distinguish two entries of one copy."""


@frozen
class Surplus:
    """Entries to remove, unless their owner is alive, because `stays` is the same copy.

    Others may still be in use: the next check is at `until` (UTC).
    """

    stays: Copy
    entries: tuple[Copy, ...]
    until: datetime | None = None


@on(
    copy_field(STATUSES, host=(HERE, PASSIVE)),
    aliases=("RetryStalledTransfer",),
    decide=lambda job: skip_of(_merge_plan(job)),
)
async def merge(job: Job) -> Result:
    """Remove the surplus entries of a copy that has several."""
    aspect, now, plan = job.event.aspect, job.now(), _merge_plan(job)
    if isinstance(plan, Skip):
        return plan
    assert isinstance(aspect, CopyField)
    rules = job.sites.get(aspect.host).stalled
    if job.site.name not in (aspect.host, plan.stays.source):
        return Skip(f"{plan.stays.source or 'the site that pushed it'} looks after it")
    until = plan.until
    for entry in plan.entries:
        if await _is_live(job, entry):
            until = now + timedelta(hours=max(rules.warn, 1.0))
        else:
            await _take_out(job, entry, plan.stays)
    if until is None:
        return None
    raise Wait("another entry of this copy may be at work", until).retry(now)


def _merge_plan(job: Job) -> Surplus | Skip:
    aspect = job.event.aspect
    assert isinstance(aspect, CopyField)
    rules = job.sites.get(aspect.host).stalled
    return plan_merge(job.run, aspect.key, rules, job.now(), job.at)


async def _take_out(job: Job, entry: Copy, stays: Copy) -> None:
    """Remove the entry, and have the copy read again if something was written to its location."""
    job.log.info(f"an entry of {entry.key} is removed: it is {entry.status}, and another good")
    here, goes = (one.having(*TELLING) for one in (stays, entry))
    # By their fields: both entries have the same key, which would match either.
    gone = RunUpdate(job.run.id, (here,), remove=goes)
    await write(job, gone if entry.trigger else gone.remembered(entry))
    if stays.status == TRANSFERRED != entry.status:
        await write(job, RunUpdate.ask(job.run, stays, new_id(), job.now()))


def plan_merge(
    run: Run, key: CopyKey, rules: Stalled, now: datetime, at: datetime
) -> Surplus | Skip:
    """Decide which entries of a copy are surplus. Pure.

    `at` is when this site first saw them, UTC, used for an entry without a usable date.
    """
    entries = [one for one in run.copies if one.key == key]
    stays = next((one for status in STAYS for one in entries if one.status == status), None)
    if len(entries) == 1:
        return Skip("it has one entry")
    if stays is None:
        return Skip("none of its entries is good, or on the way")
    others = [one for one in entries if one.having(*TELLING) != stays.having(*TELLING)]
    surplus = [one for one in others if _is_surplus(one, stays)]
    until = None
    if stays.status == TRANSFERRED:
        for one in others:
            if one.status in (VERIFYING, TRANSFERRING):
                ends = (_made(one, now) or at) + timedelta(hours=rules.retry)
                if ends <= now:
                    surplus.append(one)
                else:
                    until = min(until or ends, ends)
    if not surplus and until is None:
        return Skip("its entries contradict one another, or are the same: a person must look")
    return Surplus(stays, tuple(surplus), until)


def _is_surplus(one: Copy, stays: Copy) -> bool:
    """Return whether an entry that nobody works on adds nothing to `stays`."""
    if one.status == TRANSFERRED:
        return one.location == stays.location and agree(one, stays)
    return one.status == ERROR and not is_disputed(one)


def _made(one: Copy, now: datetime) -> datetime | None:
    made = one.since or one.creation_time
    return None if made is None or made > now + AHEAD else made
