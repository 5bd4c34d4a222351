"""A simulator of HTCondor, whose daemons Debian 12 does not have.

It speaks what the manual documents of condor_submit, condor_q and condor_rm. Its event logs are
written by HTCondor's own library (`tests.condor_log`), with the events that its daemons write, in
their order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from attrs import define, field
from htcondor2 import JobEventType

from tests import condor_log
from tests.batch_simulator import Reply, Simulator, Task

ADDRESS = "<127.0.0.1:9618?addrs=127.0.0.1-9618&alias=condor.example.org>"
SLOT = "slot1@condor.example.org"
WAITS = (1, 15, 16)
PERSON = 1
"""The code of a hold by condor_hold."""


@define(eq=False)
class CondorSimulator(Simulator):
    """A pool with one access point."""

    programs: ClassVar[tuple[str, ...]] = ("condor_submit", "condor_q", "condor_rm")
    _clusters: int = field(init=False, default=0)

    def unreachable(self, program: str) -> Reply:
        return Reply(err=f"{program}: ERROR: Failed to connect to local queue manager\n", status=1)

    def answer(self, argv: list[str], env: Mapping[str, str]) -> Reply:
        match argv:
            case ["condor_submit", "-terse", file]:
                return self._submit(Path(file))
            case ["condor_q", job, "-af", "Iwd"]:
                task = self.tasks.get(job)
                return Reply(f"{task.directory}\n" if task else "")
            case ["condor_rm", job]:
                if job not in self.tasks:
                    return Reply(err=f"Couldn't find/remove all jobs {job}\n", status=1)
                self.remove(job)
                return Reply(f"Job {job} marked for removal\n")
        return Reply(err=f"{argv} is not simulated\n", status=1)

    def _submit(self, file: Path) -> Reply:
        lines = [line for line in file.read_text().splitlines() if line]
        fields = {
            key.strip().lower(): value.strip()
            for key, _, value in (line.partition("=") for line in lines)
        }
        count = int(lines[-1].removeprefix("queue"))
        if fields.get("accounting_group") == "none":
            return Reply(err="ERROR: invalid accounting_group none\n", status=1)
        self._clusters += 1
        for proc in range(count):
            task = self._task(f"{self._clusters}.{proc}", str(proc), fields)
            self.tasks[task.id] = task
            self.log(task, JobEventType.SUBMIT, SubmitHost=ADDRESS)
        return Reply(f"{self._clusters}.0 - {self._clusters}.{count - 1}\n")

    @staticmethod
    def _task(number: str, proc: str, fields: dict[str, str]) -> Task:
        filled = {
            key: value.replace("$(ProcId)", proc).replace("$(DOLLAR)", "$")
            for key, value in fields.items()
        }
        limit = filled.get("allowed_execute_duration")
        return Task(
            number,
            [filled["executable"], *unquoted(filled["arguments"])],
            filled["initialdir"],
            dict(word.split("=", 1) for word in unquoted(filled["environment"])),
            filled["output"],
            None if limit is None else float(limit),
            {**filled, "starts": 0},
        )

    def log(self, task: Task, event: JobEventType, **fields: Any) -> None:
        """Append an event to the job's log."""
        condor_log.append(Path(task.fields["log"]), task.id, event, **fields)

    def is_ready(self, task: Task) -> bool:
        return task.state == "waiting" and task.fields["starts"] == 0

    def began(self, task: Task) -> None:
        task.fields["starts"] += 1
        self.log(task, JobEventType.EXECUTE, ExecuteHost=ADDRESS, SlotName=SLOT)

    def ended(self, task: Task, status: int) -> None:
        normal = status >= 0
        how = {"ReturnValue": status} if normal else {"TerminatedBySignal": -status}
        self.log(task, JobEventType.JOB_TERMINATED, TerminatedNormally=normal, **how)
        self._leave(task)

    def out_of_time(self, task: Task) -> None:
        self._hold(task, 47, 0, "The job exceeded allowed execute duration of 0+00:00:01")

    def _leave(self, task: Task) -> None:
        task.state = "gone"
        self.tasks.pop(task.id, None)

    def _aborted(self, task: Task, why: str) -> None:
        self._evicted(task)
        self.log(task, JobEventType.JOB_ABORTED, Reason=why)
        self._leave(task)

    def _hold(self, task: Task, code: int, sub: int, why: str) -> None:
        if code == PERSON:
            self._evicted(task)
        task.state, task.fields["code"] = "held", code
        codes = {"HoldReasonCode": code, "HoldReasonSubCode": sub}
        self.log(task, JobEventType.JOB_HELD, HoldReason=why, **codes)
        self._periodic(task)

    def _evicted(self, task: Task) -> None:
        # The shadow of a running job writes this, whoever ends the job; then follows what the
        # schedd writes.
        if task.state == "running":
            task.state = "waiting"
            self.log(task, JobEventType.JOB_EVICTED, Checkpointed=False)

    def _periodic(self, task: Task) -> None:
        expression = task.fields["periodic_remove"]
        again = task.state == "waiting" and task.fields["starts"] > 0
        failed = task.state == "held" and task.fields["code"] not in WAITS
        if expression != "false" and (again or failed):
            why = f"The job attribute PeriodicRemove expression '{expression}' evaluated to TRUE"
            self._aborted(task, why)

    def _evict(self, task: Task) -> None:
        self._evicted(task)
        self._periodic(task)

    # -- what happens to jobs ---------------------------------------------------------------------

    def remove(self, job: str) -> None:
        with self.lock:
            task = self.tasks[job]
            self.kill(task, lambda: self._aborted(task, "via condor_rm (by user xenon)"))

    def hold(
        self, job: str, code: int = PERSON, sub: int = 0, why: str = "via condor_hold"
    ) -> None:
        with self.lock:
            task = self.tasks[job]
            self.kill(task, lambda: self._hold(task, code, sub, why))

    def release(self, job: str) -> None:
        with self.lock:
            task = self.tasks[job]
            task.state = "waiting"
            self.log(task, JobEventType.JOB_RELEASED, Reason="via condor_release (by user xenon)")
            self._periodic(task)
        self.schedule()

    def out_of_memory(self, job: str) -> None:
        self.hold(job, 34, 102, f"Error from {SLOT}: memory usage exceeded request_memory")

    def evict(self, job: str) -> None:
        with self.lock:
            task = self.tasks[job]
            self.kill(task, lambda: self._evict(task))


def unquoted(text: str) -> list[str]:
    """The words of HTCondor's new syntax."""
    words = re.findall(r"(?:'(?:[^']|'')*'|[^\s'])+", text[1:-1].replace('""', '"'))
    # Two quotes are one within quotes only: those around a word are taken off first.
    return [re.sub(r"'((?:[^']|'')*)'", lambda one: one[1].replace("''", "'"), w) for w in words]
