"""Share the links to other sites among the reactions of this process: places, hours and rates.

All traffic over a link, whether a copy is moved or read back, takes a `place` on it and runs in
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
"""The transfers of this process, by the other site's name."""


class Closed(Retry):
    """The link is outside of its hours."""


def closed(job: Job, name: str) -> Closed | None:
    """Return the error to raise if the link to that site is closed now; None if it is open."""
    wait = _link(job, name).opens_in(job.now())
    why = f"the link to {name} opens in {wait / 60:.0f} min"
    return Closed(why, after=wait) if wait > 0 else None


@asynccontextmanager
async def place(job: Job, name: str) -> AsyncIterator[float | None]:
    """Wait for a place on the link to that site, and yield its rate limit in bytes a second.

    While it waits, the reaction is not stalled and holds no worker of its lane. Raises `Closed` if
    the link is closed, before the wait or after it.
    """
    if (shut := closed(job, name)) is not None:
        raise shut
    # A report of no progress resets the stall timer too: a reaction that queues does not hang.
    alive = partial(job.progress, 0, 0)
    async with traffic.slot(
        name, _link(job, name), urgency=job.urgency, aside=job.yield_slot, waiting=alive
    ) as rate:
        if (shut := closed(job, name)) is not None:  # the place may have been hours in coming
            raise shut
        yield rate


async def while_open(job: Job, name: str, function: Callable[..., T], *args: object) -> T:
    """Run `function` in a worker (see `Job.work`) while the link to that site is open.

    If the link closes meanwhile, the worker is cancelled and `Closed` is raised.
    """
    until = _link(job, name).closes_in(job.now())
    with traffic.attempt(name), trio.move_on_after(until):
        return await job.work(function, *args)
    # The timer's clock and `now()` can disagree by a moment: the link may still seem open.
    raise closed(job, name) or Closed(f"the link to {name} has closed", after=1.0)


def _link(job: Job, name: str) -> Link:
    return link_between(job.site, job.sites.get(name))
