"""A simulator of HTCondor, whose daemons Debian 12 does not have.

It speaks what the manual documents of condor_submit, condor_q and condor_rm, and writes event logs
in the documented form; HTCondor's own library must be able to read them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

from attrs import define, field

from tests.batch_simulator import Reply, Simulator, Task

ADDRESS = "<127.0.0.1:9618?addrs=127.0.0.1-9618&alias=condor.example.org>"
SLOT = "slot1@condor.example.org"
BYTES = "".join(
    f"\t0  -  {which}\n" for which in ("Run Bytes Sent By Job", "Run Bytes Received By Job")
)
USAGE = "\t\tUsr 0 00:00:00, Sys 0 00:00:00  -  {} Usage\n"
WAITS = (1, 15, 16)


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
            case ["condor_q", job, "-af", "JobStatus"]:
                states = {"waiting": 1, "running": 2, "held": 5}
                task = self.tasks.get(job)
                return Reply(f"{states[task.state]}\n" if task else "")
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
            self.log(task, f"000 Job submitted from host: {ADDRESS}\n")
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

    def log(self, task: Task, text: str) -> None:
        """Append an event: its number, and the rest."""
        number, _, rest = text.partition(" ")
        cluster, _, proc = task.id.partition(".")
        now = f"{datetime.now(UTC).astimezone():%F %T}"
        head = f"{number} ({int(cluster):03}.{int(proc):03}.000) {now} "
        with Path(task.fields["log"]).open("a") as log:
            log.write(f"{head}{rest}...\n")

    def is_ready(self, task: Task) -> bool:
        return task.state == "waiting" and task.fields["starts"] == 0

    def began(self, task: Task) -> None:
        task.fields["starts"] += 1
        self.log(task, f"001 Job executing on host: {ADDRESS}\n\tSlotName: {SLOT}\n")

    def ended(self, task: Task, status: int) -> None:
        how = (
            f"\t(1) Normal termination (return value {status})\n"
            if status >= 0
            else f"\t(0) Abnormal termination (signal {-status})\n\t(0) No core file\n"
        )
        usage = "".join(
            USAGE.format(f"{which} {place}")
            for which in ("Run", "Total")
            for place in ("Remote", "Local")
        )
        total = BYTES.replace("Run", "Total")
        self.log(task, f"005 Job terminated.\n{how}{usage}{BYTES}{total}")
        self._leave(task)

    def out_of_time(self, task: Task) -> None:
        self._hold(task, 47, 0, "The job exceeded allowed execute duration of 0+00:00:01")

    def _leave(self, task: Task) -> None:
        task.state = "gone"
        self.tasks.pop(task.id, None)

    def _aborted(self, task: Task, why: str) -> None:
        self.log(task, f"009 Job was aborted.\n\t{why}\n")
        self._leave(task)

    def _hold(self, task: Task, code: int, sub: int, why: str) -> None:
        task.state = "held"
        self.log(task, f"012 Job was held.\n\t{why}\n\tCode {code} Subcode {sub}\n")
        if code not in WAITS:
            self._periodic(task)

    def _periodic(self, task: Task) -> None:
        if "periodic_remove" in task.fields:
            self._aborted(task, "The job attribute PeriodicRemove expression evaluated to TRUE")

    def _evict(self, task: Task) -> None:
        task.state = "waiting"
        usage = USAGE.format("Run Remote") + USAGE.format("Run Local")
        self.log(task, f"004 Job was evicted.\n\t(0) CPU times\n{usage}{BYTES}")
        self._periodic(task)

    # -- what happens to jobs ---------------------------------------------------------------------

    def remove(self, job: str) -> None:
        with self.lock:
            task = self.tasks[job]
            self.kill(task, lambda: self._aborted(task, "via condor_rm (by user xenon)"))

    def hold(self, job: str, code: int = 1, sub: int = 0, why: str = "via condor_hold") -> None:
        with self.lock:
            task = self.tasks[job]
            self.kill(task, lambda: self._hold(task, code, sub, why))

    def release(self, job: str) -> None:
        with self.lock:
            task = self.tasks[job]
            task.state = "waiting"
            self.log(task, "013 Job was released.\n\tvia condor_release (by user xenon)\n")
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
