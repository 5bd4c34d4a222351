"""The jobs that make a run's derived data, as its entries have them. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final

from attrs import frozen

from caxev.config import Sites
from caxev.config.processing import LOCAL
from caxev.core.entry import BatchJob, JobResult
from caxev.core.model import ERROR, TRANSFERRING, Copy, Run

DONE: Final = "done"
FAILED: Final = "failed"
SENT: Final = "sent"
"""A batch system has it. Whether it waits or runs there, only that system knows."""
LATEST: Final = datetime(9999, 1, 1, tzinfo=UTC).timestamp()


@frozen
class JobRow:
    """The last job of a copy: what the database knows of it.

    `system` is as in sites.json, `id` the system's name for it; `node` is known once it has ended,
    `since` is when its state began, `log` where its output is at the site, `why` why it failed.
    """

    copy: Copy
    system: str | None
    id: Any
    attempt: int
    state: str
    since: datetime | None
    node: str | None
    why: str
    log: str | None


def job_rows(run: Run, sites: Sites) -> Iterator[JobRow]:
    """Yield a row for each copy that a job made, makes or failed to make."""
    for copy in run.copies:
        if (job := copy.job) is not None and job.name is not None:
            yield _row(copy, job, sites)


def _row(copy: Copy, job: BatchJob, sites: Sites) -> JobRow:
    ended = copy.job_ended
    if ended is not None and ended.name != job.name:
        ended = None  # a former attempt's
    site = sites.find(copy.host)
    how = site.processing_of(copy.type) if site is not None else None
    return JobRow(
        copy,
        how.system if how is not None else None,
        job.id,
        job.attempt or 1,
        _state(copy, job, ended, is_here=how is not None and how.system == LOCAL),
        _since(copy, job, ended),
        ended.host if ended is not None else None,
        (ended.why if ended is not None else _former(copy)) or "",
        job.log,
    )


def _former(copy: Copy) -> str | None:
    """Return why the attempt before failed, if there is another one now."""
    return copy.error if copy.status == TRANSFERRING else None


def _state(copy: Copy, job: BatchJob, ended: JobResult | None, *, is_here: bool) -> str:
    if ended is not None:
        return DONE if ended.how == DONE else FAILED
    if copy.status != TRANSFERRING:
        return FAILED if copy.status == ERROR else DONE
    if job.submitted is None and job.id is None:
        return "pending"
    return "running" if is_here else SENT


def _since(copy: Copy, job: BatchJob, ended: JobResult | None) -> datetime | None:
    if ended is not None:
        return ended.at
    if copy.status != TRANSFERRING:
        return copy.since
    claimed = (job.claimed or 0) / 1000
    begun = datetime.fromtimestamp(claimed, UTC) if 0 < claimed < LATEST else copy.since
    return job.submitted or job.not_before or begun
