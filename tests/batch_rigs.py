"""One face for all batch systems, real and simulated: what a person or a machine does to a job."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Protocol

from attrs import define, frozen

from tests import slurm
from tests.batch_simulator import Simulator
from tests.condor_simulator import CondorSimulator
from tests.pbs_simulator import PbsSimulator


class Rig(Protocol):
    """A batch system of the contract. `asks`: programs that ask about jobs."""

    name: str
    asks: tuple[str, ...]

    def calls(self, *names: str) -> list[str]: ...
    def is_running(self, job: str) -> bool: ...
    def full(self) -> AbstractContextManager[None]:
        """Start no job within the block."""
        ...

    def cancel(self, job: str) -> None: ...
    def hold(self, job: str) -> None: ...
    def release(self, job: str) -> None: ...
    def out_of_time(self, job: str) -> None: ...
    def out_of_memory(self, job: str) -> bool:
        """Kill a job for its memory; false if the job itself must pretend it."""
        ...

    def evict(self, job: str) -> None: ...


@frozen
class SlurmRig:
    """A real Slurm."""

    cluster: slurm.Slurm
    name: str = "slurm"
    asks: tuple[str, ...] = ("squeue", "sacct")

    def calls(self, *names: str) -> list[str]:
        return self.cluster.calls(*names)

    def is_running(self, job: str) -> bool:
        with suppress(subprocess.CalledProcessError):
            return "JobState=RUNNING" in self.cluster.ask("scontrol", "-o", "show", "job", job)
        return False

    @contextmanager
    def full(self) -> Iterator[None]:
        self._update("PartitionName=work", "State=DOWN")
        try:
            yield
        finally:
            self._update("PartitionName=work", "State=UP")

    def cancel(self, job: str) -> None:
        self.cluster.ask("scancel", job)

    def hold(self, job: str) -> None:
        self.cluster.ask("scontrol", "hold", job)

    def release(self, job: str) -> None:
        self.cluster.ask("scontrol", "release", job)

    def out_of_time(self, job: str) -> None:
        # As the cluster's clock shows it, and not before the change was heard.
        soon = subprocess.check_output(["date", "-d", "+5 sec", "+%FT%T"], text=True).strip()
        self._update(f"JobId={job}", f"EndTime={soon}")

    def out_of_memory(self, job: str) -> bool:
        return False  # without cgroups no daemon sees to it

    def evict(self, job: str) -> None:
        (node,) = self.cluster.ask("sinfo", "-h", "-o", "%n").split()
        self._update(f"NodeName={node}", "State=DOWN", "Reason=test")
        # One that registers again meanwhile is in use already, and cannot be resumed.
        while "down" in self.cluster.ask("sinfo", "-h", "-n", node, "-o", "%T"):
            with suppress(subprocess.CalledProcessError):
                self._update(f"NodeName={node}", "State=RESUME")
            time.sleep(0.05)

    def _update(self, *what: str) -> None:
        self.cluster.ask("scontrol", "update", *what)


@define
class SimulatorRig:
    """A simulated batch system."""

    simulator: CondorSimulator | PbsSimulator
    name: str
    asks: tuple[str, ...]

    def calls(self, *names: str) -> list[str]:
        return self.simulator.calls(*names)

    def is_running(self, job: str) -> bool:
        task = self.simulator.tasks.get(job)
        return task is not None and task.state == "running"

    @contextmanager
    def full(self) -> Iterator[None]:
        slots, self.simulator.slots = self.simulator.slots, 0
        yield
        self.simulator.slots = slots
        self.simulator.schedule()

    def cancel(self, job: str) -> None:
        self.simulator.remove(job)

    def hold(self, job: str) -> None:
        self.simulator.hold(job)

    def release(self, job: str) -> None:
        self.simulator.release(job)

    def out_of_time(self, job: str) -> None:
        self.simulator.expire(job)

    def out_of_memory(self, job: str) -> bool:
        self.simulator.out_of_memory(job)
        return True

    def evict(self, job: str) -> None:
        self.simulator.evict(job)


SIMULATORS: dict[str, tuple[type[Simulator], tuple[str, ...]]] = {
    "htcondor": (CondorSimulator, ("condor_q",)),
    "pbs": (PbsSimulator, ("qstat",)),
}
