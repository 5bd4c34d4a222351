"""Copies that nobody brings to their end are given up, so that they can be made again.

`stalled` reacts to a copy that is ``transferring``, ``verifying`` or ``moving`` at this site or at
a host without a listener. After ``stalled.warn`` hours in that state it has people told, until the
copy is in another one. After ``stalled.retry`` hours it takes the entry of a ``transferring`` one
out: its vanishing has whoever can make that copy begin again, and what has come of it stays and is
gone on with.

A copy is not given up for its age alone: while the process that marked it as its own acts for its
site, or shows progress, it is let be. Entries of old cax name no owner: of these the age decides.
What a
job makes may wait in a queue for days: `handlers.processing` looks after it. What is ``verifying``
is read by the listener of its own site, whose ledger knows how that goes: it is told of and left.
So is what is ``moving``: whoever gave ``caxev mv`` gives it again.

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
    Job,
    Result,
    Retry,
    RunUpdate,
    Skip,
    copy,
    on,
)
from caxev.config import Stalled
from caxev.model import as_utc

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
    """It says that it will be so from some time in the future on: it counts from now on."""


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
    match plan_stalled(seen, rules, now):
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
                ALARM, _summary(job, seen, hours), severity="warning", **_todo(job, seen)
            )
            raise Retry(f"{seen.status} for {hours:.0f} h", after=_seconds(again, now))
        case TooLate(hours):
            if await _is_live(job, seen):
                raise Retry("somebody is at work on it", after=rules.warn * 3600 or 3600.0)
            job.log.error(f"{_summary(job, seen, hours)}: given up")
            await job.all_clear(ALARM)
            return RunUpdate.remove_copy(job.run, seen)


def _summary(job: Job, seen: Copy, hours: float) -> str:
    return f"{seen.key} of {job.run} is {seen.status} for {hours:.0f} h"


def _todo(job: Job, seen: Copy) -> dict[str, str]:
    """What a person can do where nothing comes by itself."""
    if seen.status != MOVING:
        return {}
    number, to = job.run.number, seen.fields.get("moving_to")
    return {"todo": f"at {seen.host}: caxev mv --run {number} --site {seen.host} --to {to}"}


async def _is_live(job: Job, seen: Copy) -> bool:
    return seen.owner is not None and await job.is_live(seen.owner)


Verdict = Wait | Late | Undated | TooLate | Skip


def plan_stalled(seen: Copy, rules: Stalled, now: datetime) -> Verdict:
    """Decide by its age what is to be said of a copy that is not at its end. Pure."""
    if seen.type == "untriggered":
        return Skip("the DAQ's buffer is never touched")
    if seen.status not in (TRANSFERRING, VERIFYING, MOVING):
        return Skip(f"it is {seen.status}")
    if seen.status == TRANSFERRING and isinstance(seen.fields.get("job"), Mapping):
        return Skip("a job makes it, and may wait and run for days: it is looked after as a job")
    since = seen.since
    if since is None and seen.status == TRANSFERRING:  # old cax made it when it began
        since = as_utc(seen.fields.get("creation_time"))
    if since is None:
        return Skip("its entry does not say since when")
    if since > now + AHEAD:
        return Undated()
    age = (now - since).total_seconds() / 3600
    warn, retry = since + timedelta(hours=rules.warn), since + timedelta(hours=rules.retry)
    if now < min(warn, retry):
        return Wait(min(warn, retry))
    if seen.status != TRANSFERRING:
        return Late(age, now + timedelta(hours=max(rules.retry, 1.0)))
    return Late(age, retry) if now < retry else TooLate(age)


def _seconds(at: datetime, now: datetime) -> float:
    return max((at - now).total_seconds(), 1.0)
