"""Reactions for the tests of `caxev.testing`, in a module, so that other processes find them."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

from caxev import HERE, TRANSFERRED, GiveUp, Job, Result, Retry, RunUpdate, Skip, copy, on, tag
from caxev.files import confine, printable


@on(tag("count"))
async def count(job: Job) -> Result:
    """Write the number of good copies into the run."""
    good = sum(one.status == TRANSFERRED for one in job.run.copies)
    return RunUpdate.set_fields(job.run, good=good)


@on(copy(TRANSFERRED, host=HERE))
async def note(job: Job) -> Result:
    """Tag the run with the site that has it."""
    return RunUpdate(job.run.id, tag={"name": f"at-{job.site.name}"})


@on(copy(TRANSFERRED, host=HERE, type="raw"))
async def measure(job: Job) -> Result:
    """Write the number of bytes at this site into the run."""
    if job.copy is None or job.copy.location is None:
        return Skip("it is gone")
    size = await job.work(weigh, job.copy.location, job.site.roots)
    return RunUpdate.set_fields(job.run, raw_size_byte=size)


def weigh(location: str, roots: tuple[str, ...]) -> int:
    """Sum up the sizes of a copy's files."""
    path = Path(os.fsdecode(confine(location, roots)))
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@on(tag("late"))
async def wait(job: Job) -> Result:
    """Do nothing before the run is five days old."""
    assert job.run.start is not None
    left = (job.run.start + timedelta(days=5) - job.now()).total_seconds()
    if left > 0:
        raise Retry("it is young", after=left)
    return RunUpdate.set_fields(job.run, old=True)


@on(tag("hopeless"))
async def fail(job: Job) -> Result:
    """Fail."""
    raise GiveUp(f"no hope for {printable(job.run.name.encode())}")
