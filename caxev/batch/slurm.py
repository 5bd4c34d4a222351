"""Slurm, by its own programs: sbatch, scontrol and scancel.

Jobs go as arrays, even a single one. A job reports its own end; its watch depends on it
(``afterany``), and takes the end from ``scontrol show job``. Nothing is polled, and neither
``squeue`` nor ``sacct`` is called.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final

from attrs import define

from caxev.batch.base import OOM, End, JobEnd, JobSpec, explained
from caxev.batch.folder import Place
from caxev.batch.grouped import PASSWORD, WatchedJob, passed, submitted
from caxev.core.errors import Retry
from caxev.program import call

PACKAGE: Final = "slurm-client"
ENDS: Final[Mapping[str, End]] = {
    "COMPLETED": End.DONE,
    "FAILED": End.EXIT,
    "TIMEOUT": End.TIMEOUT,
    "DEADLINE": End.TIMEOUT,
    "OUT_OF_MEMORY": End.MEMORY,
    "CANCELLED": End.CANCELLED,
    "REVOKED": End.CANCELLED,
    "NODE_FAIL": End.NODE,
    "BOOT_FAIL": End.NODE,
    "PREEMPTED": End.NODE,
}
"""Slurm's states of jobs that have ended. In any other state a job waits or runs."""
_WATCH: Final = ("--mem=100M", "--cpus-per-task=1", "--time=10")
_REFUSED: Final = re.compile(
    r"invalid (partition|account|qos|reservation|feature|user|node|wckey)", re.IGNORECASE
)
"""Refusals that are retried: Slurm also reports them while its accounting database is down."""
_HOPELESS: Final = re.compile(
    r"requested (node configuration|partition configuration|time limit) is", re.IGNORECASE
)
_FIELD: Final = re.compile(r"(?:^|\s)(\w+)=(\S*)")
MESSAGES: Final = {
    End.TIMEOUT: re.compile(r"DUE TO TIME LIMIT"),
    End.NODE: re.compile(r"DUE TO (NODE FAILURE|PREEMPTION)"),
    End.MEMORY: OOM,
    End.CANCELLED: re.compile(r"slurmstepd.* CANCELLED AT "),
}
"""Slurm's messages in the log of a job that it kills."""


@define
class Slurm(WatchedJob):
    """The cluster that this machine's slurm.conf (or SLURM_CONF) names."""

    name: ClassVar[str] = "slurm"
    most: ClassVar[int] = 1000
    """Maximum number of jobs in one array; the cluster's MaxArraySize must be larger."""

    def send(self, group: Path, jobs: Sequence[JobSpec]) -> str:
        """Send a group as an array. See `Grouped.send`."""
        script = self.folder.script(group, "job.sh", 'exec "$@" "$SLURM_ARRAY_TASK_ID"\n')
        self.folder.script(group, "watch.sh", self.WATCH)
        options = [*_needs(jobs[0]), f"--array=0-{len(jobs) - 1}", f"--output={group}/%a.log"]
        # The name comes last, after the options of the site: by it a job is known as ours.
        options += [f"--chdir={group}", *jobs[0].options, f"--job-name={self.called(group)}"]
        return _sbatch(options, [script, *Place(group, 0).command("run", str(group))])

    @staticmethod
    def id_of(number: str, index: int) -> str:
        """Return the id of a task of an array. Pure."""
        return f"{number}_{index}"

    def send_watch(self, spec: JobSpec, group: Path, job: str, words: Sequence[str]) -> None:
        """Send a watch. See `WatchedJob.send_watch`."""
        options = [f"--dependency=afterany:{job}", *_WATCH, *_where(spec)]
        options += [f"--job-name={group.name}.watch", f"--chdir={self.home}"]
        options += [f"--output={self.home}/watches.log", "--open-mode=append"]
        _sbatch(options, [str(group / "watch.sh"), *words])

    def numbers_of(self, groups: Collection[Path]) -> Mapping[Path, str]:
        """Find arrays by their names. See `Grouped.numbers_of`."""
        shown = _arrays(call(["scontrol", "-o", "show", "job"], package=PACKAGE))
        names = {self.called(group): group for group in groups}
        return {names[name]: number for name, number in shown.items() if name in names}

    def outcome(self, name: str, job: str) -> JobEnd | None:
        """Ask Slurm about a job, and read its log. See `BatchSystem.outcome`."""
        ended = self._asked(name, job)
        return ended and explained(ended, self.folder.tail(name), MESSAGES)

    def _asked(self, name: str, job: str) -> JobEnd | None:
        try:
            shown = call(["scontrol", "-o", "show", "job", job], package=PACKAGE)
        except Retry as error:
            # Slurm forgets a job some minutes after its end (MinJobAge).
            if "invalid job id" in error.why.lower():
                return JobEnd(End.LOST, why="Slurm knows nothing of it any more")
            raise
        return self.unless_reused(end_of(shown), name, fields_of(shown).get("JobName"))

    def cancel(self, job: str) -> None:
        """End a job. See `BatchSystem.cancel`."""
        try:
            call(["scancel", "--quiet", job], package=PACKAGE)
        except Retry as error:
            if "invalid job id" not in error.why.lower():
                raise


def _sbatch(options: Sequence[str], script: Sequence[str]) -> str:
    """Send a job; returns its id. Raises `GiveUp` if Slurm will never accept it."""
    # --no-requeue: a job that Slurm restarts by itself would run twice under one name.
    # By name, so that no argument shows a value.
    export = ",".join(name for name in (*passed(), PASSWORD) if name in os.environ)
    # NIL: an empty list would hand over the whole environment.
    command = ["sbatch", "--parsable", "--no-requeue", f"--export={export or 'NIL'}"]
    command += [*options, *script]
    return submitted(
        command, package=PACKAGE, number=r"\d+(?=;|$)", hopeless=_HOPELESS, refused=_REFUSED
    )


def _needs(spec: JobSpec) -> Iterator[str]:
    yield f"--cpus-per-task={spec.cores}"
    if spec.memory is not None:
        yield f"--mem={max(1, spec.memory >> 20)}M"
    if spec.walltime is not None:
        # Minutes and seconds: sbatch takes a bare number for minutes.
        yield f"--time={spec.walltime // 60}:{spec.walltime % 60:02}"
    yield from _where(spec)


def _where(spec: JobSpec) -> Iterator[str]:
    for option in ("partition", "account", "reservation"):
        value = getattr(spec, option)
        if value is not None:
            yield f"--{option}={value}"


def fields_of(line: str) -> dict[str, str]:
    """Return the fields of a line of ``scontrol -o show job``. Pure."""
    # The first of each name counts: the command comes late in the line, and can contain anything,
    # even text that looks like a field.
    found: dict[str, str] = {}
    for match in _FIELD.finditer(line):
        found.setdefault(match[1], match[2])
    return found


def _arrays(shown: str) -> dict[str, str]:
    """Return the ids of jobs and arrays by their names."""
    rows = [fields_of(line) for line in shown.splitlines() if line.strip()]
    return {
        row["JobName"]: row.get("ArrayJobId", row["JobId"])
        for row in rows
        if "JobName" in row and "JobId" in row
    }


def end_of(shown: str) -> JobEnd | None:
    """Return how a job ended, from ``scontrol -o show job``; None if it has not. Pure."""
    lines = [line for line in shown.splitlines() if line.strip()]
    if not lines:
        return JobEnd(End.LOST, why="Slurm does not know it")
    row = fields_of(lines[0])
    state = row.get("JobState", "")
    how = ENDS.get(state)
    if how is None:
        return None
    status, _, number = row.get("ExitCode", "").partition(":")
    ends = int(status) if status.isdigit() else None
    if number.isdigit() and int(number):
        ends = -int(number)
    return JobEnd(how, ends, f"Slurm: {state}, {row.get('Reason', '')}", row.get("BatchHost"))
