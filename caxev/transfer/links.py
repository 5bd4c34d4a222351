"""The ways to other sites as the reactions of this process share them: places, hours and rates.

Whatever goes over a link, bytes that are moved or read back, has a `place` on it, and is done
`while_open`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

import trio

from caxev.config import Link, link_between
from caxev.core.errors import Retry
from caxev.core.job import Job
from caxev.transfer.traffic import Traffic

T = TypeVar("T")

traffic = Traffic()
"""What this process is moving, by the other site's name."""


class Closed(Retry):
    """The link has its hours, and these are not now."""


def closed(job: Job, name: str) -> Closed | None:
    """What to raise where the link to that site is closed now; None where it is open."""
    wait = _link(job, name).opens_in(job.now())
    why = f"the link to {name} opens in {wait / 60:.0f} min"
    return Closed(why, after=wait) if wait > 0 else None


@asynccontextmanager
async def place(job: Job, name: str) -> AsyncIterator[float | None]:
    """Wait for a place on the link to that site; how many bytes a second may go over it there.

    To wait is no stall, and keeps no worker of the lane. Raises `Closed` where the link is closed,
    or has closed meanwhile.
    """
    if (shut := closed(job, name)) is not None:
        raise shut
    alive = partial(job.progress, 0, 0)
    async with traffic.slot(
        name, _link(job, name), urgency=job.urgency, aside=job.yield_slot, waiting=alive
    ) as rate:
        if (shut := closed(job, name)) is not None:  # the place may have been hours in coming
            raise shut
        yield rate


async def while_open(job: Job, name: str, function: Callable[..., T], *args: object) -> T:
    """Have it done by a worker (see `Job.work`) that uses the link to that site.

    Where the link closes meanwhile it is broken off, and `Closed` is raised.
    """
    until = _link(job, name).closes_in(job.now())
    with traffic.attempt(name), trio.move_on_after(until):
        return await job.work(function, *args)
    raise closed(job, name) or Closed(f"the link to {name} has closed", after=1.0)


def _link(job: Job, name: str) -> Link:
    return link_between(job.site, job.sites.get(name))
