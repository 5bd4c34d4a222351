"""``caxev batch``: the program that the batch system starts for a job; not for people.

- ``run GROUP NUMBER``: runs a job and reports its end;
- ``watch GROUP NUMBER ID SYSTEM``: reports the end of a job that did not report it itself.

The report is one conditional update of the job's entry in the runs database. Its address and login
come from the environment, as for every command. A job of this machine (``system`` is ``local``) is
run by `run_here` in a worker process: it ends with its listener, and the next one runs it again.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from caxev.batch.base import End, JobEnd, JobSpec, system
from caxev.batch.folder import INPUT, OUTPUT, Folder, Place
from caxev.batch.work import BUSY, check
from caxev.config.settings import Settings, without_secrets
from caxev.core.clock import utcnow
from caxev.core.errors import ConfigError, GiveUp, Retry
from caxev.core.model import TRANSFERRING, CopyIs
from caxev.core.update import RunUpdate
from caxev.database.blocking import amend
from caxev.database.client import DatabaseError, is_transient
from caxev.files import confine, confine_entry, local, mirror
from caxev.files.private import MODE
from caxev.files.resolved import remove

REPORT_FOR: Final = 300.0
"""Seconds for which a job tries to report its end to the database."""
NOT_STARTED: Final = 127
"""The exit status of a job whose command could not be started, as in a shell."""
_KILLED: Final = (-signal.SIGKILL, 128 + signal.SIGKILL)
"""Exit statuses of a killed program: its own, and that of a shell around it."""
OURS: Final = Path("/proc/self/cgroup")
"""The kernel's list of the cgroups of this process."""
CGROUPS: Final = Path("/sys/fs/cgroup")


def main(arguments: Sequence[str]) -> int:
    """Serve ``caxev batch``; returns the exit status, which for ``run`` is that of the job."""
    match list(arguments):
        case ["run", group, number]:
            return run(Place(Path(group), int(number)))
        case ["watch", group, number, job, name]:
            return watch(Place(Path(group), int(number)), job, name)
    sys.stderr.write("caxev batch is started by a batch system: run GROUP N, watch ...\n")
    return 2


def run(place: Place) -> int:
    """Run a job to its end, record that beside it, and report it to the database.

    If the job was killed, or OOM-killed, the watch reports instead: only the batch system has the
    reason. An OOM kill is written to the log, which the watch reads.
    """
    folder = Folder.opened(str(place.group.parents[1]))
    spec = place.load()
    ended = ended_by(folder, spec)
    status = ended.exit or 0
    shown = status if status >= 0 else 128 - status
    if ended.how is End.MEMORY:
        sys.stderr.write(f"caxev: {ended.why}\n")
        return shown
    if status in _KILLED:
        return shown
    # Recorded first: if we are killed before the report, the watch reports this.
    with suppress(OSError):  # the disk may be full; what was made is good all the same
        place.note(ended)
    report_end(place, spec, ended)
    return shown


def watch(place: Place, job: str, name: str) -> int:
    """Report the end of a job that did not report it itself."""
    try:
        spec = place.load()
    except FileNotFoundError:
        return 0  # it was reported, and the job was closed
    ended = place.ended
    if ended is None:
        home = str(place.group.parents[1])
        ended = system(name, home).outcome(spec.name, job)
    if ended is None:
        return 0  # it runs again
    report_end(place, spec, ended)
    return 0


def run_here(home: str, spec: JobSpec) -> JobEnd:
    """Run a job of this machine to its end.

    Raises the errors of `check`, and `Retry` while a process of a former attempt still runs, since
    it outlives a listener that was killed. Cancellation kills the job.
    """
    folder = Folder.opened(home)
    check(spec)
    place = folder.place(spec.name)
    if place is None:
        folder.file([spec])
        place = folder.place(spec.name)
    assert place is not None
    # The job inherits the lock with its output, and holds it until its last process has ended.
    with place.file("log").open("ab", buffering=0) as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Retry(f"an earlier process of {spec.name} still runs", after=BUSY) from error
        return ended_by(folder, spec, log)


def execute(folder: Folder, spec: JobSpec, output: BinaryIO | None = None) -> int:
    """Run a job's command in its private directory; returns its status, negative for a signal.

    Its output goes to `output`.
    """
    work = folder.work(spec.name)
    with ExitStack() as held:
        try:
            held.enter_context(prepared(work, spec))
        except (GiveUp, Retry) as error:
            (output or sys.stderr.buffer).write(f"caxev: {error}\n".encode())
            return NOT_STARTED
        return _run(work, spec, output)


def _run(work: Path, spec: JobSpec, output: BinaryIO | None) -> int:
    command = list(spec.argv)
    if spec.setup:
        # Only the operator's lines are shell code; the command's words are passed as arguments.
        command = ["/bin/bash", "-c", f'{spec.setup}\nexec "$@"', "caxev", *command]
    environment = {**os.environ, **spec.environment}
    try:
        return subprocess.run(  # noqa: S603  # an argument list
            command,
            cwd=work,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=without_secrets(environment),
            check=False,
        ).returncode
    except OSError as error:
        line = f"caxev: {spec.argv[0]} cannot be started: {error.strerror}\n"
        (output or sys.stderr.buffer).write(line.encode())
        return NOT_STARTED


@contextmanager
def prepared(work: Path, spec: JobSpec) -> Iterator[None]:
    """Create a job's working directory with its input. Raises `GiveUp`, `Retry`.

    Files of a former process are removed. The input may exist for the block only.
    """
    source = confine(spec.input, spec.roots)
    place = confine_entry(str(work), [str(work.parent)])
    with local(place, "make"):
        remove(place)
        work.mkdir(mode=MODE, parents=True)
        for inner in (INPUT, OUTPUT):
            (work / inner).mkdir()
    with mirror(source, confine_entry(spec.view, [str(work)])):
        yield


def ended_by(folder: Folder, spec: JobSpec, output: BinaryIO | None = None) -> JobEnd:
    """Run a job's command as `execute` does; returns how it ended."""
    # The counter is of the cgroup, and may contain kills of earlier processes.
    before = oom_kills()
    status = execute(folder, spec, output)
    how, why = End.DONE, ""
    if status:
        how = End.EXIT
        why = f"signal {-status}" if status < 0 else f"exit status {status}"
        if oom_kills() > before:
            how, why = End.MEMORY, f"{why} after an oom_kill in its cgroup"
    return JobEnd(how, status, why, socket.gethostname(), utcnow())


def oom_kills() -> int:
    """Count the OOM-killed processes of our own cgroup; 0 if that is unknown.

    If the kernel kills a worker of a job, the job's main process often survives and ends with
    another exit status.
    """
    # Both versions of cgroups may be mounted, with a counter in only one: the larger one is right.
    return max(_counts(), default=0)


def _counts() -> Iterator[int]:
    # Without /proc, or without a memory controller, an OOM kill passes for any other end.
    with suppress(OSError, ValueError):
        for line in OURS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                yield _count(CGROUPS / path.lstrip("/") / "memory.events")
            elif "memory" in controllers.split(","):  # version 1
                yield _count(CGROUPS / "memory" / path.lstrip("/") / "memory.oom_control")


def _count(file: Path) -> int:
    with suppress(OSError, ValueError):
        for line in file.read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0


def report(spec: JobSpec, ended: JobEnd, job: str | None = None) -> RunUpdate:
    """Return the update that reports a job's end, unless it was reported before."""
    # By the job's name: an entry that was claimed again has another job, and is left alone.
    is_its = CopyIs(spec.key, {"status": TRANSFERRING, "job.name": spec.name, "job_ended": None})
    row = {"name": spec.name, "job": job, **ended.as_row(), "at": utcnow()}
    return RunUpdate(spec.run, (is_its,), change=(is_its, {"job_ended": row}))


def report_end(place: Place, spec: JobSpec, ended: JobEnd) -> None:
    """Report a job's end to the database, retried with back-off for `REPORT_FOR` seconds."""
    deadline, wait = time.monotonic() + REPORT_FOR, 1.0
    environ: Mapping[str, str] = {**os.environ, **spec.environment}
    while True:
        try:
            amend(Settings.load(environ=environ), lambda: report(spec, ended))
        except (DatabaseError, ConfigError) as error:
            hopeless = isinstance(error, ConfigError) or not is_transient(error)
            # The job's node is occupied meanwhile; the watch, or the regular check, reports later.
            if hopeless or time.monotonic() + wait > deadline:
                sys.stderr.write(f"caxev: the end of {spec.name} could not be reported: {error}\n")
                return
        else:
            with suppress(OSError):  # the watch then finds that it was reported
                place.file("reported").touch()
            return
        time.sleep(wait)
        wait = min(2 * wait, 60.0)
