"""What the simulators of batch systems share: programs that ask a server in the test's process.

The server runs jobs as processes of this machine, as many at once as it has slots. Nothing is
polled: a thread waits for the end of each.
"""

from __future__ import annotations

import json
import os
import signal
import socketserver
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from attrs import define, field, frozen

_PROGRAM = """\
#!{python} -SE
import json, os, socket, sys
ask = {{"argv": [{name!r}, *sys.argv[1:]], "env": dict(os.environ)}}
with socket.socket(socket.AF_UNIX) as server:
    server.connect({socket!r})
    server.sendall(json.dumps(ask).encode() + b"\\n")
    reply = json.loads(server.makefile().readline())
sys.stdout.write(reply["out"])
sys.stderr.write(reply["err"])
sys.exit(reply["status"])
"""


@frozen
class Reply:
    """What a program prints, and its exit status."""

    out: str = ""
    err: str = ""
    status: int = 0


@define(eq=False)
class Task:
    """A job of the simulator; `end` is called when its process has ended, with the status."""

    id: str
    command: list[str]
    directory: str
    environment: dict[str, str]
    output: str
    limit: float | None
    fields: dict[str, Any]
    state: str = "waiting"
    process: subprocess.Popen[bytes] | None = None
    fate: Callable[[], object] | None = None


@define(eq=False)
class Simulator(ABC):
    """A batch system. Subclasses answer for its programs, and write what it writes."""

    programs: ClassVar[tuple[str, ...]]
    directory: Path
    slots: int = 40
    down: bool = False
    """Whether its server does not answer."""
    tasks: dict[str, Task] = field(init=False, factory=dict)
    asked: list[list[str]] = field(init=False, factory=list)
    lock: threading.RLock = field(init=False, factory=threading.RLock)

    @property
    def environment(self) -> dict[str, str]:
        return {"PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}"}

    def calls(self, *names: str) -> list[str]:
        """The calls of these programs, or of all: name and arguments."""
        with self.lock:
            return [" ".join(call) for call in self.asked if not names or call[0] in names]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Serve the programs; all jobs end with the block."""
        path = self.directory / "socket"
        (self.directory / "bin").mkdir()
        for name in self.programs:
            program = self.directory / "bin" / name
            program.write_text(_PROGRAM.format(python=sys.executable, name=name, socket=str(path)))
            program.chmod(0o755)
        with socketserver.ThreadingUnixStreamServer(str(path), _handler(self)) as server:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            try:
                yield
            finally:
                server.shutdown()
                with self.lock:
                    self.slots = 0
                    for task in self.tasks.values():
                        self.kill(task, lambda: None)

    def reply(self, argv: list[str], env: Mapping[str, str]) -> Reply:
        with self.lock:
            self.asked.append(argv)
            return self.unreachable(argv[0]) if self.down else self.answer(argv, env)

    @abstractmethod
    def answer(self, argv: list[str], env: Mapping[str, str]) -> Reply:
        """Serve a call of a program."""

    @abstractmethod
    def unreachable(self, program: str) -> Reply:
        """What a program prints if the server does not answer."""

    @abstractmethod
    def began(self, task: Task) -> None: ...

    @abstractmethod
    def ended(self, task: Task, status: int) -> None: ...

    @abstractmethod
    def out_of_time(self, task: Task) -> None: ...

    def expire(self, job: str) -> None:
        """End a job at its time limit."""
        with self.lock:
            task = self.tasks[job]
            self.kill(task, lambda: self.out_of_time(task))

    def is_ready(self, task: Task) -> bool:
        return task.state == "waiting"

    def schedule(self) -> None:
        """Start what can be started."""
        with self.lock:
            for task in [*self.tasks.values()]:
                busy = sum(one.state == "running" for one in self.tasks.values())
                if busy < self.slots and self.is_ready(task):
                    self._start(task)

    def _start(self, task: Task) -> None:
        task.state = "running"
        self.began(task)
        with Path(task.output).open("wb") as output:
            task.process = subprocess.Popen(
                task.command,
                cwd=task.directory,
                env=task.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        threading.Thread(target=self._await, args=(task, task.process), daemon=True).start()

    def _await(self, task: Task, process: subprocess.Popen[bytes]) -> None:
        try:
            status = process.wait(task.limit)
        except subprocess.TimeoutExpired:
            with self.lock:
                self.kill(task, lambda: self.out_of_time(task))
            status = process.wait()
        with self.lock:
            if task.fate is not None:
                task.fate()
            else:
                self.ended(task, status)
        self.schedule()

    def kill(self, task: Task, fate: Callable[[], object]) -> None:
        """End a task's process, if it has one; then let its fate happen."""
        if task.state == "running" and task.process is not None:
            task.fate = fate
            with suppress(ProcessLookupError):
                os.killpg(task.process.pid, signal.SIGKILL)
        else:
            fate()


def _handler(simulator: Simulator) -> type[socketserver.StreamRequestHandler]:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            asked = json.loads(self.rfile.readline())
            reply = simulator.reply(asked["argv"], asked["env"])
            simulator.schedule()
            row = {"out": reply.out, "err": reply.err, "status": reply.status}
            self.wfile.write(json.dumps(row).encode() + b"\n")

    return Handler
