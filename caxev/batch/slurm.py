"""Slurm, by its own programs: sbatch, scontrol and scancel.

A job reports its own end. Each has a tiny second job, the watch, that depends on it
(``afterany``). If the job did not report, because it was killed or its node could not reach the
database, the watch does, from ``scontrol show job``. Nothing is polled, and neither ``squeue`` nor
``sacct`` is called.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from attrs import define, field

from caxev import failpoints
from caxev.batch.base import End, JobEnd, JobSpec
from caxev.batch.folder import Folder, Place
from caxev.core.errors import Denied, GiveUp, Retry
from caxev.program import call

PACKAGE: Final = "slurm-client"
MOST: Final = 1000
"""Maximum number of jobs in one array; the cluster's MaxArraySize must be larger."""
PASSED: Final = (
    *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "PYTHONPATH", "SSL_CERT_FILE"),
    *("CAXEV_MONGO_URI", "CAXEV_MONGO_USER", "CAXEV_DATABASE", "CAXEV_COLLECTION"),
    *("MONGO_PASSWORD", "MONGO_PASSWORD_FILE"),
)
"""Our variables that a job inherits, by name: no argument shows their values."""
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
_KILLED: Final = {
    End.TIMEOUT: re.compile(r"DUE TO TIME LIMIT"),
    End.NODE: re.compile(r"DUE TO (NODE FAILURE|PREEMPTION)"),
    End.MEMORY: re.compile(r"exceeded (job |step )?memory limit|oom[-_ ]kill", re.IGNORECASE),
    End.CANCELLED: re.compile(r"slurmstepd.* CANCELLED AT "),
}
"""Slurm's messages in the log of a job that it kills."""


@define
class Slurm:
    """The cluster that this machine's slurm.conf (or SLURM_CONF) names."""

    home: str
    folder: Folder = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.folder = Folder.opened(self.home)
        self.home = str(self.folder.home)

    def submit(self, jobs: Sequence[JobSpec]) -> list[str]:
        """Send jobs as an array, even a single one. See `BatchSystem.submit`."""
        ids: list[str] = []
        for start in range(0, len(jobs), MOST):
            ids += self._submit(jobs[start : start + MOST])
        return ids

    def _submit(self, jobs: Sequence[JobSpec]) -> list[str]:
        group = self.folder.file(jobs)
        script = [str(group / "job.sh"), *Place(group, 0).command("run", str(group))]
        options = [*_needs(jobs[0]), f"--array=0-{len(jobs) - 1}", f"--output={group}/%a.log"]
        job = _sbatch([*options, f"--job-name={group.name}", f"--chdir={group}"], script)
        failpoints.point("batch.sent")
        self._watched(group, job)
        return [f"{job}_{index}" for index in range(len(jobs))]

    def _watched(self, group: Path, job: str) -> None:
        """Give each job of a sent group its watch; then record that the group was sent."""
        # In this order: after a crash in between, `find` finds the group by its name and calls this
        # again. A second watch does no harm.
        for file in group.glob("[0-9]*.json"):
            place = Place(group, int(file.stem))
            with suppress(FileNotFoundError):  # the job was closed meanwhile
                self._watch(place.load(), place, f"{job}_{place.index}")
        self.folder.note_sent(group, job)

    def _watch(self, spec: JobSpec, place: Place, job: str) -> None:
        """Send the watch of a job.

        If Slurm accepts no more jobs there is no watch, and the regular check finds the end.
        """
        options = [f"--dependency=afterany:{job}", *_WATCH, *_where(spec)]
        options += [f"--job-name={place.group.name}.watch", f"--chdir={self.home}"]
        options += [f"--output={self.home}/watches.log", "--open-mode=append"]
        marks = [str(place.file("reported")), str(place.file("json"))]
        command = place.command("watch", str(place.group), str(place.index), job, self.name)
        try:
            _sbatch(options, [str(place.group / "watch.sh"), *marks, *command])
        except (GiveUp, Retry) as error:
            with Path(self.home, "watches.log").open("a") as log:
                log.write(f"no watch for {spec.name}: {error}\n")

    name = "slurm"

    def find(self, names: Sequence[str]) -> dict[str, str]:
        """Find jobs by the groups that they were filed in. See `BatchSystem.find`."""
        places = {name: place for name in names if (place := self.folder.place(name)) is not None}
        groups = {place.group: self.folder.sent(place.group) for place in places.values()}
        unheard = {group.name for group, job in groups.items() if job is None}
        if unheard:
            # The reply of sbatch was lost in a crash. A group's name is unique, so it finds the id.
            shown = _arrays(call(["scontrol", "-o", "show", "job"], package=PACKAGE))
            groups |= {group: shown.get(group.name) for group in groups if group.name in unheard}
        found: dict[str, str] = {}
        for name, place in places.items():
            job = groups[place.group]
            if job is not None:
                found[name] = f"{job}_{place.index}"
        for group, job in groups.items():
            if job is not None and group.name in unheard:
                self._watched(group, job)
        return found

    def outcome(self, job: str, log: str) -> JobEnd | None:
        """Ask Slurm about a job, and read its log. See `BatchSystem.outcome`."""
        ended = self._asked(job)
        return None if ended is None else explained(ended, log)

    @staticmethod
    def _asked(job: str) -> JobEnd | None:
        try:
            shown = call(["scontrol", "-o", "show", "job", job], package=PACKAGE)
        except Retry as error:
            if "invalid job id" in error.why.lower():
                return JobEnd(End.LOST, why="Slurm knows nothing of it any more")
            raise
        return end_of(shown)

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
    export = ",".join(name for name in PASSED if name in os.environ)
    command = ["sbatch", "--parsable", "--no-requeue", f"--export={export or 'NIL'}"]
    try:
        answer = call([*command, *options, *script], package=PACKAGE)
    except Retry as error:
        if _REFUSED.search(error.why):
            raise Denied(error.why) from error
        if _HOPELESS.search(error.why):
            raise GiveUp(error.why) from error
        raise
    job = answer.strip().partition(";")[0]
    if not job.isdigit():
        raise Retry(f"sbatch gave no job's id but {answer.strip()[:80]!r}")
    return job


def _needs(spec: JobSpec) -> Iterator[str]:
    yield f"--cpus-per-task={spec.cores}"
    if spec.memory is not None:
        yield f"--mem={max(1, spec.memory >> 20)}M"
    if spec.walltime is not None:
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
        return JobEnd(End.LOST, why="Slurm says nothing of it")
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


def explained(ended: JobEnd, log: str) -> JobEnd:
    """Return how a job ended, corrected by the reason for a kill in its log. Pure."""
    # Slurm forgets a job after a while (MinJobAge), and does not always report an OOM kill as such.
    doubtful: frozenset[End] = {
        End.LOST: frozenset(End),
        End.EXIT: frozenset({End.MEMORY}),
        End.CANCELLED: frozenset({End.MEMORY, End.TIMEOUT}),
    }.get(ended.how, frozenset())
    for how, pattern in _KILLED.items():
        if how in doubtful and (found := pattern.search(log)):
            return JobEnd(how, ended.exit, f"its log says: {found[0]}", ended.host, ended.at)
    return ended
