"""HTCondor, by condor_submit, condor_q and condor_rm, and by its event log.

HTCondor logs all that happens to a group's jobs in a file of ours, which the listener follows
(`caxev.batch.following`). A job reports its own end; if it was killed, held or evicted, the log has
the end. Nothing is polled. The log is read by HTCondor's own library (`pip install
'caxev[htcondor]'`). The listener must run on the access point, and the nodes must share its file
system (FILESYSTEM_DOMAIN).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Final

from attrs import define, field
from loguru import logger

from caxev.batch.base import OOM, End, JobEnd, JobSpec, explained
from caxev.batch.folder import Place
from caxev.batch.grouped import Grouped, shown_to_all, submitted
from caxev.core.errors import Denied, GiveUp, Retry
from caxev.program import call

PACKAGE: Final = "condor"
_WAITS: Final = (1, 15, 16)
"""Codes of holds that end by a release: by a person, at submission, and while files are spooled."""
_LEAVES: Final = (
    "periodic_remove = (JobStatus == 1 && NumJobStarts > 0)"
    f" || (JobStatus == 5 && {' && '.join(f'HoldReasonCode =!= {code}' for code in _WAITS)})"
)
"""The last line of a description: a job that would start again, or that has ended by a hold, leaves
the queue."""
_LEFT: Final = re.compile(r"PeriodicRemove expression")
"""The text that HTCondor has for a job that has left by `_LEAVES`."""
_HOLDS: Final[Mapping[tuple[int, int] | int, End]] = {
    (34, 102): End.MEMORY,
    46: End.TIMEOUT,
    47: End.TIMEOUT,
}
"""How a job has ended that HTCondor holds with that code, or code and subcode."""
_REASONS: Final[Mapping[End, re.Pattern[str]]] = {
    End.MEMORY: re.compile(r"memory", re.IGNORECASE),
    End.TIMEOUT: re.compile(r"wall|(run|execut\w+|allowed) ?(time|duration)", re.IGNORECASE),
}
"""A part of the reason for a hold, if a pool's own policy held the job."""
_POLICIES: Final = (3, 21, 26)
_HOPELESS: Final = re.compile(r"parse error|invalid|unknown|must be|not a valid", re.IGNORECASE)
_GONE: Final = re.compile(r"couldn't find|not found", re.IGNORECASE)
_MESSAGES: Final = {End.MEMORY: OOM}

Event = Mapping[str, Any]
"""An event of a log, by the names that HTCondor's library gives to its parts."""


@define
class HTCondor(Grouped):
    """The pool that this machine, an access point, belongs to."""

    name: ClassVar[str] = "htcondor"
    most: ClassVar[int] = 1000

    _logs: dict[str, Any] = field(init=False, factory=dict)
    """HTCondor's readers by group: each continues at its position."""

    def send(self, group: Path, jobs: Sequence[JobSpec]) -> str:
        """Send a group as a cluster. See `Grouped.send`."""
        _library()  # without it no end would be noticed
        script = self.folder.script(group, "job.sh", 'exec "$@" 2>&1\n')
        command = [script, *Place(group, 0).command("run", str(group))]
        description = group / "submit"
        lines = [*_description(jobs[0], command), f"log = {self.folder.events / group.name}"]
        lines += [f"output = {group}/$(ProcId).log", *jobs[0].options]
        # After the options of the site: by its directory a job is known as ours.
        lines += [f"initialdir = {group}", _LEAVES, f"queue {len(jobs)}"]
        description.write_text("".join(f"{line}\n" for line in lines))
        submit = ["condor_submit", "-terse", str(description)]
        return submitted(submit, package=PACKAGE, number=r"\d+(?=\.|$)", hopeless=_HOPELESS)

    @staticmethod
    def id_of(number: str, index: int) -> str:
        """Return the id of a process of a cluster. Pure."""
        return f"{number}.{index}"

    def numbers_of(self, groups: Collection[Path]) -> Mapping[Path, str]:
        """Find clusters by their logs. See `Grouped.numbers_of`."""
        # Not by condor_q: jobs that have ended have left the queue.
        found = {}
        for group in groups:
            for event in _events(self.folder.events / group.name):
                found[group] = str(event["Cluster"])
                break
        return found

    def outcome(self, name: str, job: str) -> JobEnd | None:
        """Look for the end of a job in its log. See `BatchSystem.outcome`."""
        ended, place = self._logged(name, job), self.folder.place(name)
        if ended is None:
            shown = call(["condor_q", job, "-af", "Iwd"], package=PACKAGE).strip()
            # A pool that has lost its state gives numbers again.
            if place is None or shown != str(place.group):
                # It may have ended, and left the queue, after we read the log.
                lost = JobEnd(End.LOST, why="HTCondor does not know it")
                ended = self._logged(name, job) or lost
        return ended and explained(ended, self.folder.tail(name), _MESSAGES)

    def _logged(self, name: str, job: str) -> JobEnd | None:
        place = self.folder.place(name)
        if place is not None:
            with suppress(Retry):  # behind what is damaged nothing can be known
                for event in _events(self.folder.events / place.group.name):
                    ended = end_of(event)
                    if ended is not None and self.id_of(event["Cluster"], event["Proc"]) == job:
                        return ended
        return None

    def cancel(self, job: str) -> None:
        """Remove a job. See `BatchSystem.cancel`."""
        try:
            call(["condor_rm", job], package=PACKAGE)
        except Retry as error:
            if not _GONE.search(error.why):
                raise

    @property
    def logs(self) -> str:
        """The directory of the event logs. See `LogsEnds`."""
        return str(self.folder.events)

    def ends(self, group: str) -> Iterator[tuple[Place, JobEnd]]:
        """Yield what is new in a log. See `LogsEnds.ends`."""
        path, filed = self.folder.events / group, self.folder.home / "groups" / group
        if not filed.exists():
            # All its jobs are closed. HTCondor may write once more: then it is removed again.
            self._logs.pop(group, None)
            path.unlink(missing_ok=True)
            return
        try:
            for event in self._new(group, path):
                ended = end_of(event)
                if ended is not None:
                    place = Place(filed, event["Proc"])
                    yield place, explained(ended, place.tail, _MESSAGES)
        except Retry as error:  # the other logs are read; the regular check finds these ends
            logger.error("{}", error)

    def _new(self, group: str, path: Path) -> Iterator[Event]:
        with _reading(path):
            if group not in self._logs:
                self._logs[group] = _library().JobEventLog(str(path))
            yield from self._logs[group].events(0)


def _library() -> Any:
    """Return HTCondor's library. Raises `Denied` if it is not installed."""
    try:
        import htcondor2
    except ImportError as error:
        raise Denied(
            "HTCondor's event log cannot be read: pip install 'caxev[htcondor]'"
        ) from error
    return htcondor2


def _events(path: Path) -> Iterator[Event]:
    library = _library()
    if path.exists():
        with suppress(FileNotFoundError), _reading(path), library.JobEventLog(str(path)) as log:
            yield from log.events(0)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise `Retry` for a log that cannot be read: an event is cut if the disk was full."""
    try:
        yield
    except _library().HTCondorException as error:
        raise Retry(f"HTCondor's log {path} cannot be read: {error}") from error


def _description(spec: JobSpec, command: Sequence[str]) -> Iterator[str]:
    """Return the lines of a submit description that do not depend on the group. Pure."""
    if spec.partition or spec.reservation:
        raise GiveUp("HTCondor has neither partitions nor reservations: use options in sites.json")
    yield "executable = /bin/sh"
    yield "transfer_executable = false"
    yield "should_transfer_files = NO"
    yield f'arguments = "{_quoted(command)} $(ProcId)"'
    yield f'environment = "{_quoted([f"{k}={v}" for k, v in shown_to_all("HTCondor").items()])}"'
    yield f"request_cpus = {spec.cores}"
    if spec.memory is not None:
        yield f"request_memory = {max(1, spec.memory >> 20)}M"
    if spec.walltime is not None:
        yield f"allowed_execute_duration = {spec.walltime}"
    if spec.account is not None:
        yield f"accounting_group = {spec.account}"
    # Evicted, it must not start again by itself: it would run twice under one name.
    yield "requirements = NumJobStarts == 0"


def _quoted(words: Sequence[str]) -> str:
    """Return words as HTCondor's new syntax of arguments and environments has them. Pure."""
    # A `$` begins a macro even within quotes; this macro stands for the character itself.
    return " ".join(
        "'" + word.replace("'", "''").replace('"', '""').replace("$", "$(DOLLAR)") + "'"
        for word in words
    )


def end_of(event: Event) -> JobEnd | None:
    """Return how a job ended by an event, or None if it continues. Pure."""
    match event["MyType"]:
        case "JobTerminatedEvent" if event.get("TerminatedNormally"):
            status = int(event["ReturnValue"])
            return JobEnd(End.EXIT if status else End.DONE, status, f"exit status {status}")
        case "JobTerminatedEvent":
            number = int(event.get("TerminatedBySignal", 0))
            return JobEnd(End.EXIT, -number, f"signal {number}")
        case "JobAbortedEvent":
            return _aborted(_reason(event, "Reason"))
        case "JobHeldEvent":
            return _held(event)
        case "JobReconnectFailedEvent":
            return JobEnd(End.NODE, why=_reason(event, "Reason"))
        case "ExecutableErrorEvent":
            return JobEnd(End.EXIT, why="HTCondor could not start it")
    return None


def _aborted(why: str) -> JobEnd:
    # An eviction is logged of every job that stops running, those that a person removes or holds,
    # too. Only the next event is evidence: a job that goes back to the queue is removed by _LEAVES.
    if _LEFT.search(why):
        return JobEnd(End.NODE, why="HTCondor stopped it, and would have started it again")
    return JobEnd(End.CANCELLED, why=why)


def _held(event: Event) -> JobEnd | None:
    code, sub = int(event.get("HoldReasonCode", 0)), int(event.get("HoldReasonSubCode", 0))
    if code in _WAITS:
        return None
    why = _reason(event, "HoldReason")
    how = _HOLDS.get((code, sub)) or _HOLDS.get(code)
    if how is None and code in _POLICIES:
        how = next((end for end, pattern in _REASONS.items() if pattern.search(why)), None)
    return JobEnd(how or End.NODE, why=f"held: {why} (code {code}, subcode {sub})")


def _reason(event: Event, name: str) -> str:
    return " ".join(str(event.get(name) or "").split())
