"""Copies that nobody brings to their end are given up, so that they can be made again.

`stalled` reacts to a copy that is ``transferring``, ``verifying`` or ``moving`` at this site or at
a host without a listener. After ``stalled.warn`` hours in that state it has people told, until the
copy is in another one. After ``stalled.retry`` hours it takes the entry of a ``transferring`` one
out: its vanishing has whoever can make that copy begin again, and what has come of it stays and is
gone on with. The run remembers that (``given_up``). In the same way it treats an ``error`` that an
old program left, unless `caxev.handlers.transfer` could repair the copy.

`merge` reacts to a key that has several entries, as old programs add theirs without looking. When
one of them is good, the others are taken out once nobody works on them, and the copy is read again
if something was being written to its place.

A copy is not given up for its age alone: while the process that marked it as its own acts for its
site, or shows progress, it is let be. Entries of old cax name no owner: of these the age decides,
and if they have no date, or one in the future, the time since we first saw them. What a job makes
may wait in a queue for days: `caxev.handlers.processing` looks after it. What is ``verifying`` is
read by the listener of its own site, whose ledger knows how that goes: an alarm is raised, and no
more. So is what is ``moving``: whoever gave ``caxev mv`` gives it again.

Safe to repeat: the update names the status and the owner that were found.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    CopyIs,
    CopyKey,
    Job,
    Result,
    Retry,
    Run,
    RunUpdate,
    Skip,
    Superseded,
    copy,
    copy_field,
    on,
)
from caxev.config import Stalled
from caxev.copies.quorum import agree, is_disputed, same_data
from caxev.core.model import STATUSES, as_utc, new_id

ALARM = "copy stands still"
AHEAD = timedelta(minutes=5)
"""So far may the clocks of two servers be apart that were primary one after the other."""


@frozen
class Wait:
    """Nothing is to be said before `at` (UTC)."""

    at: datetime


@frozen
class Late:
    """It has been so for `hours`; it is looked at again at `again` (UTC)."""

    hours: float
    again: datetime


@frozen
class Undated:
    """Nobody knows since when it is so: it is dated anew, and its age counts from now on."""


@frozen
class TooLate:
    """It has been so for `hours`: it is given up, unless somebody is at work on it."""

    hours: float


@on(
    copy((TRANSFERRING, VERIFYING, MOVING), host=(HERE, PASSIVE)),
    copy((TRANSFERRED, ERROR, GONE), host=(HERE, PASSIVE)),  # so that the waiting has an end
    aliases=("RetryStalledTransfer",),
)
async def stalled(job: Job) -> Result:
    """Have people told of a copy that stands still, and take it out so that it is made again."""
    seen, now = job.copy, job.now()
    if seen is None:
        await job.all_clear(ALARM)
        return Skip("the copy is gone")
    if seen.host != job.site.name and seen.source not in (None, job.site.name):
        return Skip(f"{seen.source} put it there, and looks after it")
    rules = job.sites.get(seen.host).stalled
    match plan_stalled(seen, rules, now, job.at, stays=_stays(job, seen)):
        case Skip() as nothing:
            await job.all_clear(ALARM)
            return nothing
        case Undated():
            return RunUpdate.change_copy(job.run, seen, seen.status)  # which dates it anew
        case Wait(at):
            await job.all_clear(ALARM)
            raise Retry(f"it is {seen.status} since lately", after=_seconds(at, now))
        case Late(hours, again):
            if await _is_live(job, seen):
                await job.all_clear(ALARM)
                raise Retry("somebody is at work on it", after=_seconds(again, now))
            await job.alarm(
                ALARM, _summary(job, seen, hours), severity="warning", **todo(job, seen)
            )
            raise Retry(f"{seen.status} for {hours:.0f} h", after=_seconds(again, now))
        case TooLate(hours):
            if await _is_live(job, seen):
                raise Retry("somebody is at work on it", after=rules.warn * 3600 or 3600.0)
            job.log.error(f"{_summary(job, seen, hours)}: given up")
            await job.all_clear(ALARM)
            gone = RunUpdate.remove_copy(job.run, seen)
            return gone if seen.fields.get("trigger") else gone.remembered(seen)


def _stays(job: Job, seen: Copy) -> bool:
    """Whether the entry of a failed copy is kept: it may be all that there is of this data.

    In a catalogue it may have files; `caxev rucio put` goes on with those.
    """
    good = (one for one in job.run.copies if one.status == TRANSFERRED)
    made_again = any(same_data(one, seen.key) and one.host != seen.host for one in good)
    return not made_again or job.sites.get(seen.host).method == "rucio"


def _summary(job: Job, seen: Copy, hours: float) -> str:
    return f"{seen.key} of {job.run} is {seen.status} for {hours:.0f} h"


def todo(job: Job, seen: Copy) -> dict[str, str]:
    """Return what a person can do, unless it is given up by itself."""
    run, host = job.run, seen.host
    named = f"--run {run.number}" if run.number else f"--name {run.name} --detector {run.detector}"
    which = f"{named} --type {seen.type}" + (f" --version {seen.version}" if seen.version else "")
    good = (one for one in run.copies if one.status == TRANSFERRED and same_data(one, seen.key))
    steps = {
        MOVING: f"at {host}: caxev mv {which} --site {host} --to {seen.fields.get('moving_to')}",
        VERIFYING: f"caxev explain {named} --site {host} shows what it waits for",
        ERROR: next((f"caxev copy {which} --from {one.host} --to {host}; or " for one in good), "")
        + f"caxev rm {which} --site {host} --by-entries --why REASON",
    }
    return {"todo": steps[seen.status]} if seen.status in steps else {}


async def _is_live(job: Job, seen: Copy) -> bool:
    return seen.owner is not None and await job.is_live(seen.owner)


Verdict = Wait | Late | Undated | TooLate | Skip


def _begun(seen: Copy, now: datetime) -> datetime | None:
    """Since when it has its status; of what an old program transfers, when that began.

    None without a date, and with one in the future: it would protect the copy until then.
    """
    since = seen.since
    if since is None and seen.status in (TRANSFERRING, ERROR):
        since = as_utc(seen.fields.get("creation_time"))
    return None if since is None or since > now + AHEAD else since


def plan_stalled(
    seen: Copy, rules: Stalled, now: datetime, at: datetime, *, stays: bool = False
) -> Verdict:
    """Decide by its age what is to be said of a copy that is not at its end. Pure.

    `at`: when this site saw its status first, UTC; it counts if the entry has no usable date.
    `stays`: if it is an error it is not given up, however old it is.
    """
    if seen.type == "untriggered":
        return Skip("the DAQ's buffer is never touched")
    if seen.status not in (TRANSFERRING, VERIFYING, MOVING) and not seen.is_abandoned:
        return Skip(f"it is {seen.status}")
    if seen.status == TRANSFERRING and isinstance(seen.fields.get("job"), Mapping):
        return Skip("a job makes it, and may wait and run for days: it is looked after as a job")
    since = _begun(seen, now)
    if since is None and seen.status == TRANSFERRING:
        return Undated()  # in the entry, because deletions ask how long it may have been read
    since = since or at
    age = (now - since).total_seconds() / 3600
    warn, retry = since + timedelta(hours=rules.warn), since + timedelta(hours=rules.retry)
    if now < min(warn, retry):
        return Wait(min(warn, retry))
    if seen.status != TRANSFERRING and (stays or not seen.is_abandoned):
        return Late(age, now + timedelta(hours=max(rules.retry, 1.0)))
    return Late(age, retry) if now < retry else TooLate(age)


def _seconds(at: datetime, now: datetime) -> float:
    return max((at - now).total_seconds(), 1.0)


# -- several entries of one copy ------------------------------------------------------------------

STAYS = (TRANSFERRED, VERIFYING, TRANSFERRING)
"""Of several entries of one copy stays the first in the first of these statuses that one has."""
TELLING = (
    *("status", "owner", "location", "checksum", "manifest", "trigger"),
    *("creation_time", "creation_place", "status_since"),
)
"""The fields by which two entries of one copy are told apart."""


@frozen
class Surplus:
    """Entries that go, unless their process lives, because `stays` is the same copy.

    Others may still be at work: they are looked at again at `until` (UTC).
    """

    stays: Copy
    entries: tuple[Copy, ...]
    until: datetime | None = None


@on(copy_field(STATUSES, host=(HERE, PASSIVE)), aliases=("RetryStalledTransfer",))
async def merge(job: Job) -> Result:
    """Take out the surplus entries of a copy that has several."""
    aspect, now = job.event.aspect, job.now()
    assert isinstance(aspect, CopyField)
    rules = job.sites.get(aspect.host).stalled
    plan = plan_merge(job.run, aspect.key, rules, now, job.at)
    if isinstance(plan, Skip):
        return plan
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
    raise Retry("another entry of this copy may be at work", after=_seconds(until, now))


async def _take_out(job: Job, entry: Copy, stays: Copy) -> None:
    """Take the entry out, and have the copy read again if something was written to its place."""
    job.log.info(f"an entry of {entry.key} is taken out: it is {entry.status}, and another good")
    now = job.now()
    here, goes = (CopyIs(one.key, _telling(one)) for one in (stays, entry))
    try:
        gone = RunUpdate(job.run.id, (here,), remove=goes)
        await job.update(gone if entry.fields.get("trigger") else gone.remembered(entry))
        if stays.status == TRANSFERRED != entry.status:
            await job.update(RunUpdate.ask(job.run, stays, new_id(), now))
    except Superseded as lost:
        raise Retry(str(lost), after=1.0) from lost


def plan_merge(
    run: Run, key: CopyKey, rules: Stalled, now: datetime, at: datetime
) -> Surplus | Skip:
    """Decide which entries of a copy are surplus. Pure.

    `at`: when this site saw them first, UTC; it counts for an entry without a usable date.
    """
    entries = [one for one in run.copies if one.key == key]
    stays = next((one for status in STAYS for one in entries if one.status == status), None)
    if len(entries) == 1:
        return Skip("it has one entry")
    if stays is None:
        return Skip("none of its entries is good, or on the way")
    others = [one for one in entries if _telling(one) != _telling(stays)]
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
    """Whether an entry on which nobody works says nothing that counts beside `stays`."""
    if one.status == TRANSFERRED:
        return one.location == stays.location and agree(one, stays)
    return one.status == ERROR and not is_disputed(one)


def _made(one: Copy, now: datetime) -> datetime | None:
    made = one.since or as_utc(one.fields.get("creation_time"))
    return None if made is None or made > now + AHEAD else made


def _telling(one: Copy) -> dict[str, object]:
    return {name: one.fields.get(name) for name in TELLING}
