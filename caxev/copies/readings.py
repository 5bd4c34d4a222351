"""Fresh readings of copies, which decisions about other copies wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from attrs import frozen

from caxev.copies.lifecycle import SOON, write
from caxev.core.errors import Retry
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
