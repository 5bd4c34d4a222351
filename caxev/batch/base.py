"""The interface of batch systems, and how one is found by its name in sites.json."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any, Final, Protocol, Self

from attrs import asdict, frozen

from caxev.config.plugins import found
from caxev.config.processing import BATCH, SYSTEMS
from caxev.core.errors import GiveUp
from caxev.core.model import CopyKey, RunId


class End(StrEnum):
    """How a job ended: well, or by a failure listed in `caxev.config.processing`."""

    DONE = "done"
    EXIT = "exit"
    TIMEOUT = "timeout"
    MEMORY = "memory"
    CANCELLED = "cancelled"
    NODE = "node"
    LOST = "lost"


@frozen
class JobSpec:
    """One job: a command that makes one copy out of another.

    `name` consists of letters, digits and ``+._-`` and is never used again. `memory` is in bytes
    for the whole job, `walltime` in seconds. `input` is inside one of `roots`. The command finds it
    at `view` and writes `output`; both are in the job's own private directory. The result gets the
    path `final`. The job's end is reported in the entry `key` of `run`.
    """

    name: str
    argv: tuple[str, ...]
    run: RunId
    key: CopyKey
    input: str
    view: str
    output: str
    roots: tuple[str, ...]
    cores: int = 1
    memory: int | None = None
    walltime: int | None = None
    partition: str | None = None
    account: str | None = None
    reservation: str | None = None
    options: tuple[str, ...] = ()
    setup: str | None = None
    environment: Mapping[str, str] = {}
    final: str | None = None

    @property
    def needs(self) -> tuple[object, ...]:
        """The requested resources: jobs with the same needs can be sent as one array."""
        return (
            self.cores,
            self.memory,
            self.walltime,
            self.partition,
            self.account,
            self.reservation,
            self.options,
        )


@frozen
class JobEnd:
    """The end of a job; `exit` is its status (negative: a signal's number), `why` in words."""

    how: End
    exit: int | None = None
    why: str = ""
    host: str | None = None
    at: datetime | None = None

    def as_row(self) -> dict[str, Any]:
        """Return the form for files and the database."""
        return {**asdict(self), "how": str(self.how)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """Read the form of `as_row`; an unknown `how` counts as a lost job."""
        how = row.get("how")
        known = how if how in list(End) else End.LOST
        return cls(End(known), row.get("exit"), str(row.get("why") or ""), row.get("host"))


class BatchSystem(Protocol):
    """A system to which jobs are sent. It is created with the directory for the jobs' files.

    All methods run in a worker process. They raise `Retry` if the system does not answer, and
    `GiveUp` if it will never accept such a job. `caxev.batch.folder.Folder` files the jobs, and has
    the command that starts a job so that it reports its own end. `caxev.batch.grouped` has what
    systems that are reached by programs have in common.

    A system must also have the end of a killed job reported: by a second job that waits for the
    first (`grouped.WatchedJob`), or by a log that the listener follows (`following.LogsEnds`).
    """

    def __init__(self, home: str) -> None: ...

    def submit(self, jobs: Sequence[JobSpec]) -> list[str]:
        """Send jobs of the same needs; returns their ids, in order."""
        ...

    def find(self, names: Sequence[str]) -> dict[str, str]:
        """Return the ids of the jobs among these that were sent, even if the reply was lost."""
        ...

    def outcome(self, name: str, job: str) -> JobEnd | None:
        """Return how the job of a name and id ended, or None while it waits or runs."""
        ...

    def cancel(self, job: str) -> None:
        """Cancel a job unless it has ended."""
        ...


def system(name: str, home: str) -> BatchSystem:
    """Return the batch system of that name. Raises `GiveUp` if there is none."""
    kind: type[BatchSystem] | None = found(name, SYSTEMS, BATCH)
    if kind is None:
        raise GiveUp(f"no batch system is named {name!r}: name one in processing, system")
    return kind(home)


OOM: Final = re.compile(r"exceeded (job |step )?memory limit|oom[-_ ]kill", re.IGNORECASE)
"""The messages of the kernel and of batch systems about a job that was OOM-killed."""
_DOUBTFUL: Final[Mapping[End, frozenset[End]]] = {
    End.LOST: frozenset(End),
    End.EXIT: frozenset({End.MEMORY}),
    End.CANCELLED: frozenset({End.MEMORY, End.TIMEOUT}),
}


def explained(ended: JobEnd, log: str, messages: Mapping[End, re.Pattern[str]]) -> JobEnd:
    """Return how a job ended, corrected by a batch system's messages at the end of its log. Pure.

    A batch system forgets a job after a while, and does not always report why it was killed.
    """
    for how, pattern in messages.items():
        if how in _DOUBTFUL.get(ended.how, ()) and (match := pattern.search(log)):
            return JobEnd(how, ended.exit, f"its log says: {match[0]}", ended.host, ended.at)
    return ended
