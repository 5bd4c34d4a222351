"""A simulator of OpenPBS, whose daemons Debian 12 does not have.

It speaks what the manual documents of qsub, qstat and qdel; finished jobs are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from attrs import define, field

from tests.batch_simulator import Reply, Simulator, Task

KILLED = 256
FINISHED, TERMINATED, FAILED = "92", "91", "93"


@define(eq=False)
class PbsSimulator(Simulator):
    """A server with one host."""

    programs: ClassVar[tuple[str, ...]] = ("qsub", "qstat", "qdel")
    _number: int = field(init=False, default=0)

    def unreachable(self, program: str) -> Reply:
        return Reply(
            err=f"Connection refused\n{program}: cannot connect to server pbs\n", status=111
        )

    def answer(self, argv: list[str], env: Mapping[str, str]) -> Reply:
        match argv:
            case ["qsub", *options, script]:
                return self._submit(options, Path(script), env)
            case ["qstat", "-x", "-f", *jobs]:
                for job in jobs:
                    if job not in self.tasks:
                        return Reply(err=f"qstat: Unknown Job Id {job}\n", status=153)
                return Reply("\n".join(map(self._shown, jobs or self.tasks)))
            case ["qdel", job]:
                if job not in self.tasks:
                    return Reply(err=f"qdel: Unknown Job Id {job}\n", status=153)
                if self.tasks[job].state == "gone":
                    return Reply(err=f"qdel: Job has finished {job}\n", status=35)
                self.remove(job)
                return Reply()
        return Reply(err=f"{argv} is not simulated\n", status=1)

    def _submit(self, options: list[str], script: Path, env: Mapping[str, str]) -> Reply:
        given = dict(zip(options[::2], options[1::2], strict=True))
        if given.get("-q") == "none":
            return Reply(err="qsub: Unknown queue\n", status=170)
        needs = dict(one.split("=", 1) for one in given["-l"].split(","))
        names = given["-v"].split(",")
        self._number += 1
        task = Task(
            f"{self._number}.pbs",
            ["/bin/sh", "-c", script.read_text()],
            "/",
            {name: env[name] for name in names},
            given["-o"],
            _seconds(needs["walltime"]) if "walltime" in needs else None,
            {"Job_Name": given["-N"], "after": given.get("-W", "").partition("afterany:")[2]},
        )
        self.tasks[task.id] = task
        return Reply(f"{task.id}\n")

    def _shown(self, job: str) -> str:
        task = self.tasks[job]
        state = {"waiting": "Q", "running": "R", "held": "H", "gone": "F"}[task.state]
        rows = {
            "Job_Name": task.fields["Job_Name"],
            "job_state": state,
            "exec_host": "node1.example.org/0",
            "Exit_status": task.fields.get("status"),
            "substate": task.fields.get("substate", "10"),
            "Output_Path": f"pbs.example.org:{task.output}",
            "comment": task.fields.get("comment", "Job run"),
        }
        lines = "".join(_wrapped(f"    {k} = {v}") for k, v in rows.items() if v is not None)
        return f"Job Id: {job}\n{lines}"

    def is_ready(self, task: Task) -> bool:
        before = self.tasks.get(task.fields["after"])
        return task.state == "waiting" and (before is None or before.state == "gone")

    def began(self, task: Task) -> None:
        """PBS tells nobody."""

    def ended(self, task: Task, status: int) -> None:
        shown = status if status >= 0 else KILLED - status
        self._over(task, FAILED if status else FINISHED, str(shown))

    def _over(self, task: Task, substate: str, status: str | None, why: str = "finished") -> None:
        task.state = "gone"
        task.fields |= {"substate": substate, "comment": f"Job {why}"}
        if status is not None:
            task.fields["status"] = status
        self.schedule()

    def _killed(self, task: Task, line: str, status: int) -> None:
        with Path(task.output).open("a") as output:
            output.write(f"=>> PBS: job killed: {line}\n")
        self._over(task, FAILED, str(status))

    def out_of_time(self, task: Task) -> None:
        self._killed(task, "walltime 2 exceeded limit 1", -29)

    # -- what happens to jobs ---------------------------------------------------------------------

    def remove(self, job: str) -> None:
        with self.lock:
            task = self.tasks[job]
            status = str(KILLED + 15) if task.state == "running" else None
            self.kill(task, lambda: self._over(task, TERMINATED, status, "terminated"))

    def hold(self, job: str) -> None:
        with self.lock:
            self.tasks[job].state = "held"

    def release(self, job: str) -> None:
        with self.lock:
            self.tasks[job].state = "waiting"
        self.schedule()

    def out_of_memory(self, job: str) -> None:
        with self.lock:
            task = self.tasks[job]
            self.kill(task, lambda: self._killed(task, "mem 20480kb exceeded limit 10240kb", -27))

    def evict(self, job: str) -> None:
        with self.lock:
            task = self.tasks[job]
            self.kill(task, lambda: self._over(task, FAILED, "-20", "lost its host"))


def _seconds(text: str) -> float:
    total = 0.0
    for part in text.split(":"):
        total = 60 * total + float(part)
    return total


def _wrapped(line: str, width: int = 79) -> str:
    """A line as qstat folds it."""
    parts = [line[:width]]
    parts += [line[at : at + width - 8] for at in range(width, len(line), width - 8)]
    return "\n\t".join(parts) + "\n"
