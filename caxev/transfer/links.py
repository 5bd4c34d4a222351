"""Share the links to other sites among the reactions of this process: places, hours and rates.

All traffic over a link, whether a copy is moved or read back, takes a `place` on it and runs in
`while_open`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TypeVar

import trio

from caxev import metrics
from caxev.config import Link, link_between
from caxev.core.errors import Retry
from caxev.core.job import Job
from caxev.core.reasons import DONE, reason
from caxev.files import Manifest, Moved
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
    with _counted(job, name) as note, traffic.attempt(name), trio.move_on_after(until):
        result = await job.work(function, *args)
        note(result)
        return result
    # The timer's clock and `now()` can disagree by a moment: the link may still seem open.
    raise closed(job, name) or Closed(f"the link to {name} has closed", after=1.0)


@contextmanager
def _counted(job: Job, name: str) -> Iterator[Callable[[object], None]]:
    """Count one use of the link, its time, and the bytes of the result that it is given."""
    labels = (job.site.name, name, job.handler)
    began, ended = trio.current_time(), "closed"

    def note(result: object) -> None:
        nonlocal ended
        ended = DONE
        metrics.link_bytes.labels(*labels).inc(_bytes_of(result))

    try:
        yield note
    except BaseException as error:
        ended = "interrupted" if isinstance(error, trio.Cancelled) else reason(error)
        raise
    finally:
        metrics.link_seconds.labels(*labels).inc(trio.current_time() - began)
        metrics.link_attempts.labels(*labels, ended).inc()


def _bytes_of(result: object) -> int:
    match result:
        case Moved(bytes_sent=sent):
            return sent
        case Manifest(total_bytes=read):
            return read
        case _:
            return 0


def _link(job: Job, name: str) -> Link:
    return link_between(job.site, job.sites.get(name))
