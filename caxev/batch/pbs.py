"""PBS (OpenPBS, PBS Professional, Torque), by its own programs: qsub, qstat and qdel.

Jobs are sent one by one, since a job of an array can have no watch of its own. A job reports its
own end; its watch depends on it (``afterany``), and takes the end from ``qstat -x -f``. Nothing is
polled. OpenPBS must keep finished jobs (``job_history_enable``), Torque too (``keep_completed``).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import ClassVar, Final

from attrs import define

from caxev.batch.base import OOM, End, JobEnd, JobSpec, explained
from caxev.batch.folder import Place
from caxev.batch.grouped import WatchedJob, shown_to_all, submitted
from caxev.core.errors import Retry
from caxev.program import call

PACKAGE: Final = "openpbs-client"
_WATCH: Final = ("-l", "nodes=1:ppn=1,walltime=00:10:00")
_OVER: Final = ("F", "C")
"""The states of jobs that have ended: OpenPBS's and Torque's."""
_OPENPBS: Final = {-26: End.MEMORY, -27: End.MEMORY, -28: End.TIMEOUT, -29: End.TIMEOUT}
_TORQUE: Final = {-10: End.MEMORY, -11: End.TIMEOUT, -12: End.TIMEOUT}
"""The exit statuses with which each reports why it killed a job."""
_DELETED: Final = "91"
"""OpenPBS's substate of a job that qdel has ended."""
_SIGNAL: Final = 256
"""From this exit status on, it is a signal's number added to it."""
MESSAGES: Final = {
    End.TIMEOUT: re.compile(r"PBS: job killed: (walltime|cput) "),
    End.MEMORY: re.compile(rf"PBS: job killed: v?mem |{OOM.pattern}", re.IGNORECASE),
}
"""PBS's messages in the log of a job that it kills."""
_REFUSED: Final = re.compile(r"unknown queue|unauthorized|not authorized|account", re.IGNORECASE)
_HOPELESS: Final = re.compile(r"resource limits|illegal|unknown resource|invalid", re.IGNORECASE)
_GONE: Final = re.compile(r"unknown job ?id|has finished|invalid (for )?state", re.IGNORECASE)
_TEXT: Final = re.compile(r"^ {4}([\w.]+) = (.*)$", re.MULTILINE)
_XML: Final = re.compile(r"<(\w+)>([^<]*)</\1>")


@define
class Pbs(WatchedJob):
    """The server that this machine's pbs.conf (or PBS_SERVER) names."""

    name: ClassVar[str] = "pbs"

    def called(self, group: Path) -> str:
        """Return a name of 15 characters, as Torque allows no more. See `WatchedJob.called`."""
        return f"c{blake2b(group.name.encode(), digest_size=7).hexdigest()}"

    def send(self, group: Path, jobs: Sequence[JobSpec]) -> str:
        """Send the one job of a group. See `Grouped.send`."""
        words = Place(group, 0).command("run", str(group), "0")
        script = self.folder.script(group, "job.sh", 'exec "$@"\n', words)
        options = [*_needs(jobs[0]), "-o", f"{group}/0.log", *jobs[0].options]
        return _qsub([*options, "-N", self.called(group), script])

    @staticmethod
    def id_of(number: str, index: int) -> str:
        """Return the id of a group's only job. Pure."""
        del index
        return number

    def send_watch(self, spec: JobSpec, group: Path, job: str, words: Sequence[str]) -> None:
        """Send a watch. See `WatchedJob.send_watch`."""
        log = shlex.quote(f"{self.home}/watches.log")
        # qsub can only replace a file of output, and all watches share this one.
        body = f"exec >>{log} 2>&1\n{self.WATCH}"
        script = self.folder.script(group, "watch.sh", body, words)
        options = [*_WATCH, *_where(spec), "-W", f"depend=afterany:{job}", "-N", "caxev-watch"]
        _qsub([*options, "-o", "/dev/null", script])

    def numbers_of(self, groups: Collection[Path]) -> Mapping[Path, str]:
        """Find jobs by their names. See `Grouped.numbers_of`."""
        names = {self.called(group): group for group in groups}
        rows = jobs_in(call(["qstat", "-x", "-f"], package=PACKAGE))
        return {
            names[row["Job_Name"]]: number
            for number, row in rows.items()
            if row.get("Job_Name") in names
        }

    def outcome(self, name: str, job: str) -> JobEnd | None:
        """Ask PBS about a job, and read its log. See `BatchSystem.outcome`."""
        try:
            shown = call(["qstat", "-x", "-f", job], package=PACKAGE)
        except Retry as error:
            if not _GONE.search(error.why):
                raise
            ended: JobEnd | None = JobEnd(End.LOST, why="PBS knows nothing of it any more")
        else:
            row = next(iter(jobs_in(shown).values()), {})
            ended = self.unless_reused(end_of(shown), name, row.get("Job_Name"))
        return ended and explained(ended, self.folder.tail(name), MESSAGES)

    def cancel(self, job: str) -> None:
        """Delete a job. See `BatchSystem.cancel`."""
        try:
            call(["qdel", job], package=PACKAGE)
        except Retry as error:
            if not _GONE.search(error.why):
                raise


def _qsub(options: Sequence[str]) -> str:
    """Send a job; returns its id. Raises `GiveUp` if PBS will never accept it."""
    # -r n: a job that PBS restarts by itself would run twice under one name.
    command = ["qsub", "-r", "n", "-j", "oe", "-m", "n", "-v", ",".join(shown_to_all("PBS"))]
    command += options
    return submitted(
        command, package=PACKAGE, number=r"(?s)\d.*", hopeless=_HOPELESS, refused=_REFUSED
    )


def _needs(spec: JobSpec) -> Iterator[str]:
    # In the older form, which OpenPBS and Torque both take.
    wanted = [f"nodes=1:ppn={spec.cores}"]
    if spec.memory is not None:
        wanted.append(f"mem={max(1, spec.memory >> 20)}mb")
    if spec.walltime is not None:
        wanted.append(f"walltime={spec.walltime}")
    yield from ("-l", ",".join(wanted), *_where(spec))


def _where(spec: JobSpec) -> Iterator[str]:
    queue = spec.reservation or spec.partition  # to PBS a reservation is a queue
    if queue is not None:
        yield from ("-q", queue)
    if spec.account is not None:
        yield from ("-A", spec.account)


def jobs_in(shown: str) -> dict[str, dict[str, str]]:
    """Return the fields of each job in the output of ``qstat -x -f``, by the job's id. Pure.

    OpenPBS writes lines, and shows finished jobs by ``-x``; Torque writes XML then.
    """
    if shown.lstrip().startswith("<"):
        parts = [dict(_XML.findall(part)) for part in shown.split("<Job>")[1:]]
        return {part["Job_Id"]: part for part in parts if "Job_Id" in part}
    found = {}
    # Long values are wrapped: each further line begins with a tab.
    for part in shown.replace("\n\t", "").split("Job Id: ")[1:]:
        number, _, fields = part.partition("\n")
        found[number.strip()] = dict(_TEXT.findall(fields))
    return found


def end_of(shown: str) -> JobEnd | None:
    """Return how a job ended, from ``qstat -x -f``; None if it has not. Pure."""
    rows = jobs_in(shown)
    if not rows:
        return JobEnd(End.LOST, why="PBS does not know it")
    row = next(iter(rows.values()))
    if row.get("job_state") not in _OVER:
        return None
    host = row.get("exec_host", "").partition("/")[0] or None
    why = f"PBS: {row.get('comment') or row['job_state']}"
    text = row.get("Exit_status", row.get("exit_status", ""))
    if not text.lstrip("-").isdigit():
        return JobEnd(End.CANCELLED, why=why, host=host)  # deleted before it ran
    status = int(text)
    if status < 0:
        reasons = _OPENPBS if "substate" in row else _TORQUE
        return JobEnd(reasons.get(status, End.NODE), None, f"{why} ({status})", host)
    if status >= _SIGNAL:
        # Torque has no substate: there qdel looks like any other signal.
        how = End.CANCELLED if row.get("substate", _DELETED) == _DELETED else End.EXIT
        return JobEnd(how, _SIGNAL - status, why, host)
    return JobEnd(End.EXIT if status else End.DONE, status, why, host)
