"""Alarms about bad copies.

`bad_copy` reacts to ``checksumproblem`` being set in the entry of a copy here, or at a host without
a listener that this site looks after. It raises an alarm until the copy is good again or gone. The
run is not changed.

Safe to repeat: raising the same alarm again is a no-op.
"""

from __future__ import annotations

from caxev import GONE, HERE, PASSIVE, TRANSFERRED, Copy, Job, Result, Skip, copy, copy_field, on

NAME = "bad copy"


@on(
    copy_field("checksumproblem", host=(HERE, PASSIVE)),
    copy((TRANSFERRED, GONE), host=(HERE, PASSIVE)),  # the field may have been removed
    decide=lambda job: plan_alarm(job.copy, job.site.name),
)
async def bad_copy(job: Job) -> Result:
    """Raise an alarm while a copy is bad."""
    bad = job.copy
    skip = plan_alarm(bad, job.site.name)
    if bad is None or not bad.checksumproblem:
        await job.all_clear(NAME)
    if bad is None or skip is not None:
        return skip
    why = bad.error
    await job.alarm(NAME, _summary(job, bad), why=why, location=bad.location, source=bad.source)
    return None


def plan_alarm(bad: Copy | None, here: str) -> Skip | None:
    """Decide whether the site `here` raises an alarm about this copy. Pure."""
    if bad is None or not bad.checksumproblem:
        return Skip("it is gone" if bad is None else "it is good")
    # Both sites of a pushed copy could see the entry: only the responsible one raises the alarm.
    if here not in {bad.host, bad.source}:
        return Skip(f"{bad.source or 'the site that pushed it'} raises that alarm")
    return None


def _summary(job: Job, bad: Copy) -> str:
    return f"the copy of {job.run}, {bad.key}, is not what it should be"
