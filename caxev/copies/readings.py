"""Fresh readings of copies, for decisions that wait for them and for sources in doubt."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

from attrs import frozen

from caxev.copies.lifecycle import SOON, write
from caxev.copies.storage import can_be_read
from caxev.core.errors import Damaged, Retry, Superseded
from caxev.core.job import Job
from caxev.core.model import Copy, new_id
from caxev.core.update import RunUpdate

T = TypeVar("T")


@frozen
class Ask:
    """These copies must be read again first.

    `request` is the id of the requests, None for one of its own for each copy.
    """

    copies: tuple[Copy, ...]
    request: str | None = None


async def decided(job: Job, decide: Callable[[], T | Ask]) -> T:
    """Decide; if that needs fresh readings, request them and decide again.

    Raises `Retry` if the run has changed meanwhile, or another copy came that must be read.
    """
    found = decide()
    if isinstance(found, Ask):
        for one in found.copies:
            request = RunUpdate.ask(job.run, one, found.request or new_id(), job.now())
            await write(job, request)
        # The requests changed the run.
        found = decide()
    if isinstance(found, Ask):
        raise Retry("another copy came meanwhile", after=SOON)
    return found


@asynccontextmanager
async def suspecting(job: Job, source: Copy) -> AsyncIterator[None]:
    """Copy from `source` inside: if it turns out to be `Damaged`, `suspect` it and try again.

    By the next attempt its own site has found it good, or it is ``error`` and no source: while a
    bad copy counts as good, others are deleted. One that no listener can read again is only marked
    the first time, since the damage may have happened on the way; a good transfer removes the mark.
    The second time the error is final.
    """
    is_marked = source.checksumproblem
    try:
        yield
    except Damaged as error:
        if await _is_read(job, source):
            await job.suspect(source)
        elif is_marked:
            raise
        else:
            await _mark(job, source, error.why)
        raise Retry(error.why) from error
    if is_marked and not await _is_read(job, source):
        await _mark(job, source, None)


async def _is_read(job: Job, source: Copy) -> bool:
    there = job.sites.find(source.host)
    if there is not None and not there.readable:
        return True  # tape, or a catalogue: by the site that brought it there
    mute = () if await job.has_listened(source.host) else (source.host,)
    return can_be_read(source, job.sites, mute)


async def _mark(job: Job, source: Copy, why: str | None) -> None:
    with suppress(Superseded):  # it has changed, so somebody looks after it
        fields = {"checksumproblem": why is not None, "error": why}
        await job.update(RunUpdate.note(job.run, source, **fields))
