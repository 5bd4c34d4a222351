"""What a batch system is: the interface that each ``system`` of sites.json implements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any, Protocol, Self

from attrs import asdict, frozen

from caxev.core.model import CopyKey, RunId


class End(StrEnum):
    """How a job ended: well, or in one of the ways that `caxev.config.processing` lists."""

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

    `name` is made of letters, digits and ``._-`` and never used again. `memory` is in bytes for
    the whole job, `walltime` in seconds. `input` lies in one of `roots`. The command finds it at
    `view` and writes `output`; both lie in a directory of the job's own, where nobody else may
    write. `run` and `key` name the entry in which the job's end is reported.
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
    setup: str | None = None
    environment: Mapping[str, str] = {}

    @property
    def needs(self) -> tuple[object, ...]:
        """What it asks of the batch system: jobs of the same needs can go as one array."""
        return (
            self.cores,
            self.memory,
            self.walltime,
            self.partition,
            self.account,
            self.reservation,
        )


@frozen
class Ended:
    """How a job ended; `exit` is its status (negative: a signal's number), `why` in words."""

    how: End
    exit: int | None = None
    why: str = ""
    host: str | None = None
    at: datetime | None = None

    def as_row(self) -> dict[str, Any]:
        """As it stands in files and in the database."""
        return {**asdict(self), "how": str(self.how)}

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """What `as_row` made a row of; what makes no sense is a job that was lost."""
        how = row.get("how")
        known = how if how in list(End) else End.LOST
        return cls(End(known), row.get("exit"), str(row.get("why") or ""), row.get("host"))


class BatchSystem(Protocol):
    """A place to which jobs are sent. It is made with the directory where jobs keep their files.

    All methods run in a worker process. They raise `Retry` where the system does not answer, and
    `GiveUp` where it will never take such a job. `caxev.batch.Folder` has what each needs: it
    files the jobs, and knows how a job is started so that it reports its own end.

    A system must see to it that somebody tells of a job that was killed: see `Slurm._watch`.
    """

    def __init__(self, home: str) -> None: ...

    def submit(self, jobs: Sequence[JobSpec]) -> list[str]:
        """Send jobs of the same needs; their ids, in order."""
        ...

    def find(self, names: Sequence[str]) -> dict[str, str]:
        """The ids of those of these jobs that were sent before, also where no reply was heard."""
        ...

    def outcome(self, job: str, log: str) -> Ended | None:
        """How the job of that id ended; None while it waits or runs. `log`: the end of its log."""
        ...

    def cancel(self, job: str) -> None:
        """End the job of that id, if it has not ended."""
        ...
