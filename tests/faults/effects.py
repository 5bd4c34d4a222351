"""Handlers for the campaigns, loaded by ``--handlers``: what they do can be counted afterwards."""

from __future__ import annotations

import trio

from caxev import HERE, TRANSFERRED, Job, RunUpdate, copy, on, tag


@on(copy(TRANSFERRED, host=HERE))
async def seen(job: Job) -> RunUpdate:
    """Leave a tag for a copy that became good here.

    Done twice, it would leave two: unlike `RunUpdate.add_tag` this expects nothing.
    """
    return RunUpdate(job.run.id, tag={"name": f"seen-{job.site.name}"})


@on(tag("nap"))
async def nap(job: Job) -> RunUpdate:
    """Sleep for as many seconds as the run says, then leave a tag. Done twice, it leaves two."""
    await trio.sleep(job.run.document["nap"])
    return RunUpdate(job.run.id, tag={"name": f"napped-{job.site.name}"})


@on(tag("tick"))
async def tick(job: Job) -> RunUpdate:
    """Leave a tag for a run that the load has added. Done twice, it leaves two."""
    return RunUpdate(job.run.id, tag={"name": f"ticked-{job.site.name}"})
