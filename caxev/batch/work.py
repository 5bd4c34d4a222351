"""Steps for jobs in worker processes: send, look, take stock, withdraw.

Plain functions that handlers call by ``job.work``.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Final

from attrs import frozen

from caxev.batch.base import JobEnd, JobSpec, system
from caxev.batch.folder import OUTPUT, Folder
from caxev.config.processing import LOCAL
from caxev.core.errors import GiveUp, Retry
from caxev.files import (
    Confined,
    bring_in,
    confine,
    confine_entry,
    digest_tree,
    safe_name,
    shown,
    to_nobody,
)
from caxev.files import look as snapshot_of

BUSY: Final = 2.0
"""Seconds between two checks whether a former attempt has ended."""


@frozen
class SentJob:
    """A job that was sent: its id, and how it ended if it has."""

    id: str
    ended: JobEnd | None = None


@frozen
class Stock:
    """The remains of a job: its log, the last lines of that, and the bytes of a good result."""

    log: str
    last_words: str
    size: int | None = None
    problem: str = ""


def check(spec: JobSpec) -> None:
    """Check before a job starts that its input exists, and nothing has the path of its result.

    Raises `GiveUp` if there is something, or a path is outside of the roots; `Retry` if the input
    is missing.
    """
    # Not only when it has ended: what is there then counts as its result, since `take_stock` may
    # have been killed just after it had published that.
    if spec.final is not None and os.path.lexists(confine(spec.final, spec.roots)):
        raise GiveUp(f"something else stands at {shown(spec.final)}: take it away")
    real = confine(spec.input, spec.roots)
    if not os.path.lexists(real):
        raise Retry(f"{shown(spec.input)} is not there")


def send(
    name: str, home: str, most: int, specs: Sequence[JobSpec]
) -> list[SentJob | GiveUp | Retry | None]:
    """Send jobs of the same needs to the batch system; returns the outcome of each, in order.

    None means that there is no room, as `most` jobs are out. A job that was sent before is found
    and not sent twice, nor is one that has already ended. Raises `Retry` if the batch system does
    not answer.
    """
    batch, folder = system(name, home), Folder.opened(home)
    found: dict[str, SentJob | GiveUp | Retry] = {}
    ours = [spec.name for spec in specs]
    # Counted by the files, not by the batch system: they also show jobs of a crashed attempt.
    out = set(folder.names())
    for job, number in batch.find([one for one in ours if one in out]).items():
        ended = _ended(folder, job)
        found[job] = SentJob(number, ended or batch.outcome(job, number))
    over = [one for one in ours if one not in found and folder.closed(one)]
    # Counted as attempts: if its end never comes to be known, the reaction fails, and has an alarm.
    found |= {one: Retry("its job is over already") for one in over}
    room = most - len(out - {*ours} | found.keys())
    fresh: list[JobSpec] = []
    for spec in specs:
        if spec.name in found or len(fresh) >= room:
            continue
        try:
            check(spec)
        except (GiveUp, Retry) as error:
            found[spec.name] = error
        else:
            folder.forget(spec.name)  # a crash may have filed it without sending it
            fresh.append(spec)
    if fresh:
        try:
            ids = batch.submit(fresh)
        # Only for `GiveUp`: after a `Retry` a job may have been sent, and must be found again.
        except GiveUp:
            for spec in fresh:
                folder.forget(spec.name)
            raise
        found |= {spec.name: SentJob(number) for spec, number in zip(fresh, ids, strict=True)}
    return [found.get(one) for one in ours]


def look(name: str, home: str, job: str, number: str) -> JobEnd | None:
    """Return how a job ended that did not report; None while it waits or runs."""
    folder = Folder.opened(home)
    # The job's own note first: it is exact, and stays after the batch system has forgotten the job.
    return _ended(folder, job) or system(name, home).outcome(job, number)


def _ended(folder: Folder, job: str) -> JobEnd | None:
    place = folder.place(job)
    return None if place is None else place.ended


def take_stock(home: str, job: str, final: str, roots: Sequence[str], good: bool) -> Stock:
    """Publish a job's result as `final` if it ended well, else remove it; close its files.

    Idempotent. Raises `GiveUp` if the final path leads out of the roots.
    """
    folder = Folder.opened(home)
    size, problem = None, ""
    if good:
        output = folder.work(job) / OUTPUT / safe_name(final)
        size, problem = _published(confine_entry(str(output), [home]), final, roots)
    last_words = folder.tail(job)  # before `close`, which removes the job's files
    return Stock(folder.close(job), last_words, size, problem)


def _published(output: Confined, final: str, roots: Sequence[str]) -> tuple[int | None, str]:
    try:
        if os.path.lexists(output) and not any(seen.size for seen in snapshot_of(output)):
            return None, "it left nothing in its output"
    except GiveUp as refused:  # the job's fault: kept, it would occupy its place in the system
        return None, f"it left what no copy may hold: {refused}"
    made = partial(digest_tree, output, sha512=False, report=to_nobody)
    size = bring_in(output, final, roots, expected=made)
    return size, "" if size is not None else "it ended well and left no result"


def withdraw(name: str, home: str, prefix: str, but: str = "") -> int:
    """Cancel the jobs with a prefix, except `but`, and remove their files; returns their number.

    `prefix` is a whole name, or ends in a dot. Raises `Retry` while a process of such a job still
    runs on this machine.
    """
    folder = Folder.opened(home)
    found = [job for job in folder.names(prefix) if job == prefix or prefix.endswith(".")]
    jobs = [job for job in found if job != but]
    if jobs and name != LOCAL:
        batch = system(name, home)
        for job, number in batch.find(jobs).items():
            if batch.outcome(job, number) is None:  # else the number may be another job's by now
                batch.cancel(number)
    # A local job outlives a listener that was killed, and still writes: its files must wait.
    busy = [job for job in jobs if name == LOCAL and _runs(folder, job)]
    for job in jobs:
        if job in busy:
            continue
        folder.close(job)
    if busy:
        raise Retry(f"a process of {busy[0]} still runs", after=BUSY)
    return len(jobs)


def _runs(folder: Folder, job: str) -> bool:
    """Return whether a process of a job runs on this machine, and so holds the lock on its log."""
    with suppress(FileNotFoundError), folder.log(job).open("rb") as log:
        try:
            # All processes of a job inherit the descriptor of its log, and with it the lock.
            fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
