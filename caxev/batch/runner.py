"""``caxev batch``: what runs beside a job, started by the batch system; not for people.

- ``run GROUP``: runs the job with this task's number (SLURM_ARRAY_TASK_ID) and tells of its end;
- ``watch GROUP NUMBER ID SYSTEM``: tells of the end of a job that could not do so itself.

The end is told by one conditional update of the job's entry in the runs database. Where that is
and how to log in comes from the environment, as for every command.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from caxev import failpoints
from caxev.batch.base import End, Ended, JobSpec
from caxev.batch.folder import INPUT, OUTPUT, Folder, Place
from caxev.batch.memory import oom_kills
from caxev.batch.systems import system
from caxev.config import ConfigError, Settings, without_secrets
from caxev.core.clock import utcnow
from caxev.core.errors import GiveUp, Retry
from caxev.core.model import TRANSFERRING, CopyIs, RunUpdate
from caxev.database import DatabaseError, amend, is_transient
from caxev.files import confine, local, mirror
from caxev.files.private import MODE
from caxev.files.resolved import remove

TELL_FOR: Final = 300.0
"""Seconds for which a job waits for the database to tell it of its end."""
NOT_STARTED: Final = 127
"""The status of a job whose command could not be started, as a shell has it."""
_KILLED: Final = (-signal.SIGKILL, 128 + signal.SIGKILL)
"""How a program ends that was killed outright, and how a shell says so that ran it."""


def main(arguments: Sequence[str]) -> int:
    """Serve ``caxev batch``; its exit status: of ``run`` that of the job."""
    match list(arguments):
        case ["run", group, *number] if len(number) <= 1:
            index = number[0] if number else os.environ.get("SLURM_ARRAY_TASK_ID", "0")
            return run(Place(Path(group), int(index)))
        case ["watch", group, number, job, name]:
            return watch(Place(Path(group), int(number)), job, name)
    sys.stderr.write("caxev batch is started by a batch system: run GROUP, or watch GROUP ...\n")
    return 2


def run(place: Place) -> int:
    """Run a job to its end, note that beside it, and tell the database.

    Who killed it, and what for, only the batch system knows: of that the watch tells. So it does
    where a process of the job was killed for want of memory; of that the log is told here, which
    the watch reads.
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
    place.note(ended)
    failpoints.point("batch.noted")
    tell(place, spec, ended)
    return shown


def watch(place: Place, job: str, name: str) -> int:
    """Tell of a job that has ended and could not."""
    try:
        spec = place.load()
    except FileNotFoundError:
        return 0  # its end has been taken stock of
    ended = place.ended
    if ended is None:
        home = str(place.group.parents[1])
        ended = system(name, home).outcome(job, Folder.opened(home).tail(spec.name))
    if ended is None:
        return 0  # it runs again
    tell(place, spec, ended)
    return 0


def execute(folder: Folder, spec: JobSpec, output: BinaryIO | None = None) -> int:
    """Run a job's command where nobody else may write; its status, negative for a signal.

    What it prints goes to `output`.
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
        # The operator's lines are for a shell; the command's words are only handed on.
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
        said = f"caxev: {spec.argv[0]} cannot be started: {error.strerror}\n"
        (output or sys.stderr.buffer).write(said.encode())
        return NOT_STARTED


@contextmanager
def prepared(work: Path, spec: JobSpec) -> Iterator[None]:
    """Make the directory that a job runs in, in which it finds its input. Raises `GiveUp`, `Retry`.

    What a former process of it left there is gone then. The input may be there for the block only.
    """
    source = confine(spec.input, spec.roots)
    with local(os.fsencode(work), "make"):
        remove(str(work))
        work.mkdir(mode=MODE, parents=True)
        for inner in (INPUT, OUTPUT):
            (work / inner).mkdir()
    with mirror(source, spec.view):
        yield


def ended_by(folder: Folder, spec: JobSpec, output: BinaryIO | None = None) -> Ended:
    """Run a job's command as `execute` does; how it ended."""
    before = oom_kills()
    status = execute(folder, spec, output)
    how, said = End.DONE, ""
    if status:
        how = End.EXIT
        said = f"signal {-status}" if status < 0 else f"exit status {status}"
        if oom_kills() > before:
            how, said = End.MEMORY, f"{said} after an oom_kill in its cgroup"
    return Ended(how, status, said, socket.gethostname(), utcnow())


def report(spec: JobSpec, ended: Ended, job: str | None = None) -> RunUpdate:
    """The update that tells of a job's end, if nobody has."""
    is_its = CopyIs(spec.key, {"status": TRANSFERRING, "job.name": spec.name, "job_ended": None})
    row = {"name": spec.name, "job": job, **ended.as_row(), "at": utcnow()}
    return RunUpdate(spec.run, (is_its,), change=(is_its, {"job_ended": row}))


def tell(place: Place, spec: JobSpec, ended: Ended) -> None:
    """Tell the database of a job's end, for as long as it takes to let us, within reason."""
    deadline, wait = time.monotonic() + TELL_FOR, 1.0
    environ: Mapping[str, str] = {**os.environ, **spec.environment}
    while True:
        try:
            amend(Settings.load(environ=environ), lambda: report(spec, ended))
        except (DatabaseError, ConfigError) as error:
            hopeless = isinstance(error, ConfigError) or not is_transient(error)
            if hopeless or time.monotonic() + wait > deadline:
                sys.stderr.write(f"caxev: the end of {spec.name} is not told: {error}\n")
                return
        else:
            place.file("reported").touch()
            return
        time.sleep(wait)
        wait = min(2 * wait, 60.0)
