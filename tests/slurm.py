"""A real Slurm on loopback: munged, slurmctld and slurmd with a configuration of their own.

The programs by which a site talks to Slurm are reached through small wrappers that note each call,
so that a test can say which were made.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from attrs import Factory, define

from caxev.testing.mongod import start_with_us

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "deploy" / "slurm.conf.example"
PROGRAMS = ("sbatch", "scancel", "scontrol", "squeue", "sacct", "srun", "strigger")
DAEMONS = ("munged", "slurmctld", "slurmd")
PATIENCE = 180.0  # seconds
STARTS = 120.0  # seconds

_OURS = """\
# -- what is particular to a test: after the example's settings
ClusterName=caxev
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={directory}/munge.sock
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={controller}
SlurmdPort={node}
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
KillWait=1
OverTimeLimit=0
NodeName={host} NodeAddr=127.0.0.1 CPUs=40 Boards=1 SocketsPerBoard=1 CoresPerSocket=40 \\
ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN
PartitionName=work Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
_WRAPPER = """\
#!/bin/sh
echo "$(date +%s.%N) {name} $*" >> {log}
exec {program} "$@"
"""


@define
class Slurm:
    """A cluster of one node. `environment` is what a client needs; `directory` holds its things.

    Its daemons stay in the foreground, and so die with the process that has started them.
    """

    directory: Path
    _daemons: list[subprocess.Popen[bytes]] = Factory(list)

    @property
    def environment(self) -> dict[str, str]:
        path = f"{self.directory / 'bin'}:{os.environ['PATH']}"
        return {"SLURM_CONF": str(self.directory / "slurm.conf"), "PATH": path}

    def calls(self, *names: str) -> list[str]:
        """The calls of these programs, or of all, as they were noted: name and arguments."""
        log = self.directory / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        calls = [line.partition(" ")[2] for line in lines]
        return [call for call in calls if not names or call.split()[0] in names]

    def ask(self, *command: str) -> str:
        """Run a program of Slurm's, unnoted."""
        return subprocess.run(
            command,
            env={**os.environ, "SLURM_CONF": self.environment["SLURM_CONF"]},
            capture_output=True,
            text=True,
            check=True,
            timeout=PATIENCE,
        ).stdout

    def jobs(self) -> list[str]:
        """What Slurm knows of its jobs, a line each."""
        return [line for line in self.ask("scontrol", "-o", "show", "job").splitlines() if line]

    def start(self, daemon: str, *options: str) -> None:
        """Start a daemon. What it reports before it has a log goes to ``DAEMON.out``."""
        with (self.directory / f"{daemon}.out").open("wb") as out:
            process = start_with_us(
                [_found(daemon), *options],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        self._daemons.append(process)

    def end_jobs(self) -> None:
        """Cancel all jobs, and wait until none runs: they would outlive the daemons."""
        self.ask("scancel", f"--user={os.getuid()}")
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if not any("=RUNNING" in job or "=COMPLETING" in job for job in self.jobs()):
                return
            time.sleep(0.1)

    @property
    def lost(self) -> bool:
        """Whether a daemon has ended by itself."""
        return any(daemon.poll() is not None for daemon in self._daemons)

    def stop(self) -> None:
        """End the daemons, the last one first, and wait until they are gone."""
        while self._daemons:
            daemon = self._daemons.pop()
            daemon.kill()  # asked, it first waits for answers that do not come
            daemon.wait()


def missing() -> str | None:
    """Why there can be no Slurm here; None where there can."""
    if os.geteuid() != 0:
        return "Slurm's daemons need root"
    absent = [name for name in (*DAEMONS, "sbatch", "scontrol") if not _program(name)]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: slurm-wlm, munge)"
    return None


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def _found(name: str) -> str:
    program = _program(name)
    assert program is not None
    return program


@contextmanager
def running(directory: Path) -> Iterator[Slurm]:
    """Start a cluster that keeps its things in `directory`; it is stopped when the block ends."""
    slurm = Slurm(directory)
    for name in ("state", "spool", "bin"):
        (directory / name).mkdir()
    _write_wrappers(slurm)
    _write_configuration(slurm)
    try:
        _start_munge(slurm)
        slurm.start("slurmctld", "-D")
        slurm.start("slurmd", "-D")
        _wait_for(slurm, lambda: _is_idle(slurm))
        yield slurm
    finally:
        with suppress(subprocess.SubprocessError):
            slurm.end_jobs()
        slurm.stop()


def _write_wrappers(slurm: Slurm) -> None:
    for name in PROGRAMS:
        wrapper = slurm.directory / "bin" / name
        log = slurm.directory / "calls"
        wrapper.write_text(_WRAPPER.format(name=name, program=_program(name), log=log))
        wrapper.chmod(0o755)


def _write_configuration(slurm: Slurm) -> None:
    host = socket.gethostname().partition(".")[0]
    controller, node = _free_ports()
    ours = _OURS.format(host=host, directory=slurm.directory, controller=controller, node=node)
    taken = {line.partition("=")[0].lower() for line in ours.splitlines()}
    example = [
        line
        for line in EXAMPLE.read_text().splitlines()
        if line and not line.startswith("#") and line.partition("=")[0].lower() not in taken
    ]
    (slurm.directory / "slurm.conf").write_text("\n".join([*example, ours]))


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


def _start_munge(slurm: Slurm) -> None:
    key, socket_file = slurm.directory / "munge.key", slurm.directory / "munge.sock"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    files = {"key": key, "socket": socket_file}
    files |= {name: slurm.directory / f"munged.{name}" for name in ("pid", "log", "seed")}
    options = [
        f"--{name}{'' if name == 'socket' else '-file'}={file}" for name, file in files.items()
    ]
    slurm.start("munged", "--foreground", "--force", *options)
    _wait_for(slurm, socket_file.exists)


def _is_idle(slurm: Slurm) -> bool:
    with suppress(subprocess.CalledProcessError):
        return "idle" in slurm.ask("sinfo", "-h", "-o", "%T")
    return False


def _wait_for(slurm: Slurm, condition: Callable[[], bool]) -> None:
    """Wait until it holds. Raises RuntimeError if a daemon ends, or after `STARTS` seconds."""
    deadline = time.monotonic() + STARTS
    while not condition():
        if time.monotonic() > deadline or slurm.lost:
            logs = sorted([*slurm.directory.glob("*.out"), *slurm.directory.glob("*.log")])
            ends = (f"{log.name}: {log.read_text(errors='replace')[-2000:]}" for log in logs)
            raise RuntimeError("Slurm did not start: " + "\n".join(ends))
        time.sleep(0.05)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A cluster, shared by the whole session; mark the test `slurm`."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    with ExitStack() as stack:
        yield _started(tmp_path_factory, stack)


def _started(factory: pytest.TempPathFactory, stack: ExitStack) -> Slurm:
    """A cluster that answers: its ports could have been taken before it had them."""
    for left in (2, 1, 0):
        try:
            return stack.enter_context(running(factory.mktemp("slurm")))
        except (RuntimeError, subprocess.SubprocessError):
            if not left:
                raise
    raise AssertionError
