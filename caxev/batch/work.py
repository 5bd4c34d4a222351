"""What handlers have worker processes do about jobs: send them, look after them, take stock.

Plain functions for ``job.work``.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from attrs import frozen

from caxev.batch.base import End, Ended, JobSpec
from caxev.batch.folder import OUTPUT, Folder
from caxev.batch.systems import system
from caxev.core.errors import GiveUp, Retry
from caxev.files import Report, bring_in, confine, safe_name, shown
from caxev.files import look as snapshot_of

BUSY: Final = 2.0
"""Seconds until it is looked again whether a former attempt has ended."""


@frozen
class Found:
    """A job that was sent: its id, and how it ended if it has."""

    id: str
    ended: Ended | None = None


@frozen
class Stock:
    """What is left of a job: its log, the end of it, and the bytes of its result, if it is good."""

    log: str
    said: str
    size: int | None = None
    problem: str = ""


@frozen
class Product:
    """A job's result: what the job calls it, where it is to stand, and inside of which roots."""

    name: str
    final: str
    roots: Sequence[str]


def check(spec: JobSpec, *, report: Report | None = None) -> None:
    """See that a job reads nothing that is not ours.

    Raises `GiveUp`, or `Retry` if it is not there.
    """
    del report
    real = confine(spec.input, spec.roots)
    if not os.path.lexists(real):
        raise Retry(f"{shown(spec.input)} is not there")


def send(
    name: str, home: str, most: int, specs: Sequence[JobSpec], *, report: Report
) -> list[Found | GiveUp | Retry | None]:
    """Send jobs of the same needs to the batch system; what became of each, in order.

    None: there is no room now, as `most` are out. One that was sent before is found again and not
    sent twice; nor is one that ended since the run was looked at. Raises `Retry` where the batch
    system does not answer.
    """
    del report
    batch, folder = system(name, home), Folder.opened(home)
    found: dict[str, Found | GiveUp | Retry] = {}
    ours = [spec.name for spec in specs]
    out = set(folder.names())
    for job, number in batch.find([one for one in ours if one in out]).items():
        ended = _ended(folder, job)
        found[job] = Found(number, ended or batch.outcome(number, folder.tail(job)))
    over = [one for one in ours if one not in found and folder.closed(one)]
    found |= {one: Retry("its job is over already", after=0.0) for one in over}
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
            folder.forget(spec.name)  # where it was filed, and never sent
            fresh.append(spec)
    if fresh:
        try:
            ids = batch.submit(fresh)
        except GiveUp:  # it was not sent, and never will be
            for spec in fresh:
                folder.forget(spec.name)
            raise
        found |= {spec.name: Found(number) for spec, number in zip(fresh, ids, strict=True)}
    return [found.get(one) for one in ours]


def look(name: str, home: str, job: str, number: str, *, report: Report) -> Ended | None:
    """How a job ended that should have told us; None while it waits or runs."""
    del report
    folder = Folder.opened(home)
    return _ended(folder, job) or system(name, home).outcome(number, folder.tail(job))


def _ended(folder: Folder, job: str) -> Ended | None:
    place = folder.place(job)
    return None if place is None else place.ended


def take_stock(home: str, job: str, product: Product, good: bool, *, report: Report) -> Stock:
    """Publish what a job has made if it ended well, else take it away; close its files.

    Repeatable: what is done stays done. Raises `GiveUp` where that leads out of the roots.
    """
    del report
    folder = Folder.opened(home)
    size, problem = None, ""
    if good:
        size, problem = _published(
            str(folder.work(job) / OUTPUT / safe_name(product.name)), product
        )
    said = folder.tail(job)
    return Stock(folder.close(job), said, size, problem)


def _published(output: str, product: Product) -> tuple[int | None, str]:
    if os.path.lexists(output) and not any(seen.size for seen in snapshot_of(output)):
        return None, "it left nothing in its output"
    size = bring_in(output, product.final, product.roots)
    return size, "" if size is not None else "it ended well and left no result"


def withdraw(name: str, home: str, prefix: str, but: str = "", *, report: Report) -> int:
    """Cancel the jobs whose names begin so, `but` one, and take away what is of them; how many.

    A name ends in a dot only where it is the beginning of several. Raises `Retry` while a process
    of one still runs here, which outlives the listener where that was killed: it still writes.
    """
    del report
    folder = Folder.opened(home)
    found = [job for job in folder.names(prefix) if job == prefix or prefix.endswith(".")]
    jobs = [job for job in found if job != but]
    if jobs and name != "local":
        batch = system(name, home)
        for number in batch.find(jobs).values():
            batch.cancel(number)
    busy = [job for job in jobs if name == "local" and _runs(folder, job)]
    for job in jobs:
        if job in busy:
            continue
        folder.close(job)
    if busy:
        raise Retry(f"a process of {busy[0]} still runs", after=BUSY)
    return len(jobs)


def _runs(folder: Folder, job: str) -> bool:
    """Whether a process of a job runs on this machine: it holds the lock on the job's log."""
    with suppress(FileNotFoundError), folder.log(job).open("rb") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def good(ended: Ended) -> bool:
    """Whether it ended well."""
    return ended.how is End.DONE
