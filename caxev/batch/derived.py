"""The ``job`` of an entry of derived data: its name, its attempts, and what is sent for it. Pure.

`caxev.handlers.processing` claims such entries, sends their jobs and collects the results.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from hashlib import blake2b
from typing import Any, Final

from caxev.batch.base import End, JobEnd, JobSpec
from caxev.batch.folder import INPUT, OUTPUT, work_directory
from caxev.config import Processing, Site, jobs_directory
from caxev.core.entry import count
from caxev.core.errors import GiveUp
from caxev.core.model import ERROR, TRANSFERRING, Copy, CopyKey, Run, field_of
from caxev.files import safe_name

FEW: Final = 1000
"""Events below which one core is enough."""


def events_of(run: Run) -> int:
    """Return the number of events that were built, 0 if unknown."""
    return count(field_of(run.document, "trigger.events_built")) or 0


def cores_for(run: Run, how: Processing) -> int:
    """Return the number of cores for a run's job."""
    return 1 if events_of(run) < FEW else how.cores


def values_of(run: Run, key: CopyKey, how: Processing) -> dict[str, object]:
    """Return the values of the placeholders in commands, except the paths."""
    return {
        "run": run.number or run.name,
        "name": run.name,
        "suffix": run.suffix,
        "version": key.version or "",
        "events": events_of(run),
        "detector": run.detector,
        "cores": cores_for(run, how),
        "python": sys.executable,
    }


def attempt_at(run: Run, key: CopyKey, claimed: int, attempt: int) -> dict[str, Any]:
    """Return number and name of an attempt; unique, as attempts are counted within each claim."""
    return {"attempt": attempt, "name": f"{names_of(run, key)}{claimed:x}.{attempt}"}


def names_of(run: Run, key: CopyKey) -> str:
    """Return the prefix of the names of all jobs for this copy, and of no others."""
    words = (key.host, str(run.id), key.type, key.version or "-")
    plain = [re.sub(r"[^A-Za-z0-9+_.-]", "_", word)[:60] for word in words]
    # Characters may have been replaced or cut, and a version may begin as another one: v6 and v6.8.
    digest = blake2b(repr(words).encode(), digest_size=6).hexdigest()
    return f"{'.'.join(plain)}.{digest}."


def name_of(run: Run, entry: Copy) -> str:
    """Return the name of a copy's job. Raises `GiveUp` if the entry's name is not its own."""
    # The name becomes part of paths: someone who can write to the database must not choose them.
    job = entry.job
    if job is not None and job.claimed and job.attempt:
        name = attempt_at(run, entry.key, job.claimed, job.attempt)["name"]
        if name == job.name:
            return str(name)
    raise GiveUp(f"the entry of {entry.key} names a job that is not its own")


def new_job(
    run: Run, key: CopyKey, how: Processing, source: Copy, *, claimed: datetime
) -> dict[str, Any]:
    """Return the entry's ``job`` for the first attempt of a claim made at `claimed`."""
    cores = cores_for(run, how)
    number = int(claimed.timestamp() * 1000)
    return {
        **attempt_at(run, key, number, 1),
        "claimed": number,
        "system": how.system,
        "tries": {},
        "cores": cores,
        "memory": None if how.memory_per_core is None else how.memory_per_core * cores,
        "walltime": how.walltime,
        "input": source.type,
        "input_version": source.version,
        "reads": source.location,
        "id": None,
    }


def attempt_of(entry: Copy) -> int:
    """Return the attempt number in an entry, 0 if there is none."""
    return 0 if entry.job is None else entry.job.attempt or 0


def spec_of(run: Run, entry: Copy, how: Processing, site: Site) -> JobSpec:
    """Return the job that makes this copy, from its entry and sites.json.

    Raises `GiveUp` if the entry is incomplete.
    """
    job = entry.job
    if job is None or job.reads is None or entry.location is None:
        raise GiveUp(f"the entry of {entry.key} does not say what is made of what")
    name = name_of(run, entry)
    work = work_directory(jobs_directory(site, entry.key.type), name)
    view = str(work / INPUT / safe_name(job.reads))
    output = str(work / OUTPUT / safe_name(entry.location))
    values = values_of(run, entry.key, how) | {"input": view, "output": output}
    # Values come from the database: one that begins with - could act as an option.
    if any(str(value).startswith("-") for value in values.values()):
        raise GiveUp(f"a name or version of {run} begins with -, as options of commands do")
    return JobSpec(
        name=name,
        argv=tuple(how.fill(word, values) for word in how.command),
        run=run.id,
        key=entry.key,
        input=job.reads,
        view=view,
        output=output,
        roots=site.roots,
        final=entry.location,
        cores=job.cores or 1,
        memory=job.memory,
        walltime=job.walltime,
        partition=how.partition,
        account=how.account,
        reservation=how.reservation,
        options=how.options,
        setup=how.setup,
        environment={**variables(values), **how.environment},
    )


def variables(values: Mapping[str, object]) -> dict[str, str]:
    """Return the environment variables for a job's `setup`."""
    # Variables, not text in the script: the shell does not interpret what they contain.
    names = ("run", "name", "version", "events", "detector", "cores")
    return {f"CAXEV_{name.upper()}": str(values[name]) for name in names}


def next_job(run: Run, entry: Copy, failed: JobEnd, how: Processing) -> dict[str, Any] | None:
    """Return the entry's ``job`` for the next attempt, or None if none is left.

    A job that failed for good and is retried by a person has all its attempts again. A job that
    ran out of time or memory gets more of it.
    """
    assert entry.job is not None  # `plan_collect` has checked it
    job = dict(entry.job.fields)
    tries = {} if entry.status == ERROR else dict(entry.job.tries or {})
    if entry.status != ERROR:
        used = count(tries.get(failed.how)) or 0
        if used >= how.retries.get(failed.how, 0):
            return None
        tries[str(failed.how)] = used + 1
    if failed.how is End.MEMORY and entry.job.memory:
        job["memory"] = int(entry.job.memory * how.grow)
    if failed.how is End.TIMEOUT and entry.job.walltime:
        job["walltime"] = int(entry.job.walltime * how.grow)
    # The same claim with the next attempt: a new name, so that the files of both never mix.
    fresh = attempt_at(run, entry.key, entry.job.claimed or 0, attempt_of(entry) + 1)
    return {**job, **fresh, "tries": tries, "id": None}


def in_words(ended: JobEnd, last_words: str, log: str) -> str:
    """Describe how a job failed, for people."""
    what = {
        End.EXIT: "the job failed",
        End.TIMEOUT: "the job ran out of time",
        End.MEMORY: "the job ran out of memory",
        End.CANCELLED: "the job was cancelled",
        End.NODE: "the job's node failed",
        End.LOST: "the job is lost",
    }.get(ended.how, "the job ended")
    where = f" at {ended.host}" if ended.host else ""
    why = f" ({ended.why})" if ended.why else ""
    return f"{what}{where}{why}; {log}{': ' if last_words else ''}{last_words}"


def jobs_of(run: Run, site: Site) -> Iterator[Copy]:
    """Yield the copies of a run that jobs of this site are making."""
    for one in run.copies:
        mine = one.host == site.name and one.status == TRANSFERRING
        if mine and one.type in site.types.derived and one.job is not None:
            yield one
