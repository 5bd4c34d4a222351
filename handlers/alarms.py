"""Alarms about bad copies, and about requested ones that nobody can make.

`bad_copy` reacts to ``checksumproblem`` being set in the entry of a copy here, or at a host without
a listener that this site looks after. It raises an alarm until the copy is good again or gone.
`no_source` raises one while a requested copy has no source that is good, or may become so. The run
is not changed.

Safe to repeat: raising the same alarm again is a no-op.
"""

from __future__ import annotations

from caxev import (
    ERROR,
    GONE,
    HERE,
    PASSIVE,
    TRANSFERRED,
    Copy,
    Job,
    Result,
    Run,
    Skip,
    copy,
    copy_field,
    on,
)
from caxev.config import Sites
from caxev.copies.lifecycle import in_commands, key_of
from caxev.copies.quorum import same_data
from caxev.core.model import REQUESTED

NAME = "bad copy"
LACKING = "no source"


@on(
    copy_field("checksumproblem", host=(HERE, PASSIVE)),
    copy((TRANSFERRED, GONE), host=(HERE, PASSIVE)),  # the field may have been removed
    decide=lambda job: plan_alarm(job.copy, job.site.name, job.sites),
)
async def bad_copy(job: Job) -> Result:
    """Raise an alarm while a copy is bad."""
    bad = job.copy
    skip = plan_alarm(bad, job.site.name, job.sites)
    if bad is None or not bad.checksumproblem:
        await job.all_clear(NAME)
    if bad is None or skip is not None:
        return skip
    named, which = in_commands(job.run, bad)
    todo = (
        f"caxev explain {named} --site {job.site.name} shows whether it is being repaired; if it "
        f"cannot be: caxev rm {which} --site {bad.host} --by-entries --why REASON, then caxev copy"
    )
    summary = f"the copy of {job.run}, {bad.key}, is not what it should be"
    where = {"location": bad.location, "source": bad.source}
    await job.alarm(NAME, summary, severity="error", why=bad.error, todo=todo, **where)
    return None


def plan_alarm(bad: Copy | None, here: str, sites: Sites) -> Skip | None:
    """Decide whether the site `here` raises an alarm about this copy. Pure."""
    if bad is None or not bad.checksumproblem:
        return Skip("it is gone" if bad is None else "it is good")
    # Both sites of a pushed copy could see the entry: only the responsible one raises the alarm.
    if not _is_in_care(bad, here, sites):
        return Skip(f"{bad.source} raises that alarm")
    return None


def _is_in_care(one: Copy, here: str, sites: Sites) -> bool:
    """Return whether this site looks after a copy here, or at a host without a listener.

    If it is unknown which site put it there, or that is no site any more, each one does.
    """
    return here in (one.host, one.source) or one.source not in sites


@on(
    copy(REQUESTED, host=(HERE, PASSIVE)),
    copy((TRANSFERRED, ERROR, GONE)),  # of the source, or the request was withdrawn
    concerns=lambda run, _site: any(one.status == REQUESTED for one in run.copies),
    decide=lambda job: None if _lacking(job) else Skip("no requested copy lacks a source"),
)
async def no_source(job: Job) -> Result:
    """Raise an alarm while a requested copy has no source that is good, or may become so."""
    lacking = {one.key: one for one in _lacking(job)}
    for key in {key_of(job), *(one.key for one in job.run.copies)} - lacking.keys():
        await job.all_clear(LACKING, about=key)
    for key, one in lacking.items():
        _, which = in_commands(job.run, one)
        await job.alarm(
            LACKING,
            f"the copy of {job.run}, {key}, is requested, and no good source is left",
            severity="warning",
            about=key,
            source=one.source,
            todo=f"caxev copy {which} --to {one.host} --cancel, then --from another site",
        )
    return None


def _lacking(job: Job) -> list[Copy]:
    """Return the requested copies in this site's care that cannot be made as it is."""
    asked = [one for one in job.run.copies if one.status == REQUESTED]
    return [one for one in asked if _is_ours(job, one) and not has_source(job.run, one)]


def _is_ours(job: Job, one: Copy) -> bool:
    there = job.sites.find(one.host)
    passive = there is not None and not there.listener
    here: str = job.site.name
    return one.host == here or (passive and _is_in_care(one, here, job.sites))


def has_source(run: Run, wanted: Copy) -> bool:
    """Return whether a requested copy has its source, and that is or may become good. Pure."""
    if wanted.source is not None and run.copy(wanted.key.at(wanted.source)) is None:
        return False
    # One that is bad is repaired from any good one, and each on its way may become good.
    others = (one for one in run.copies if same_data(one, wanted.key) and one is not wanted)
    return any(one.status not in (ERROR, REQUESTED) for one in others)
