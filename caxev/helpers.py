"""Further processes for one job: what runs in a worker may have helpers of its own.

A helper is a `caxev.worker` that a worker has started. It takes one task at a time, rests between
tasks for the next job to use it, and dies with the worker.
"""

from __future__ import annotations

import os
import pickle
import subprocess
from collections.abc import Callable
from typing import Any, TypeVar

from caxev import crash
from caxev.job import Retry
from caxev.worker import HEADER, Progress, Raised, Returned, Setup, Task, command, frame

T = TypeVar("T")

_resting: list[Helper] = []


class Helper:
    """One process to work beside this one. Its methods block: call them in a thread.

    Use `take`, then `run` any number of times, then `rest` or, where a run failed, `close`.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(  # noqa: S603  # our own interpreter
            command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self._first = frame(Setup(os.getpid(), 0, (), tuple(crash.die_with)))

    @property
    def alive(self) -> bool:
        """Whether it can still be used."""
        return self._process.poll() is None

    @classmethod
    def take(cls) -> Helper:
        """One that rests, else a new one."""
        while _resting:
            helper = _resting.pop()
            if helper.alive:
                return helper
            helper.close()
        return cls()

    def run(
        self,
        function: Callable[..., T],
        *args: object,
        on_progress: Callable[[int, int], None],
    ) -> T:
        """Call ``function(*args, report=...)`` there; raises what it raises, `Retry` if it dies."""
        task = Task(function.__module__, function.__qualname__, args, crash.scope.get())
        try:
            self._send(self._first + frame(task))
            self._first = b""
            while isinstance(message := self._receive(), Progress):
                on_progress(message.done, message.total)
        except (EOFError, OSError) as error:
            status = self.close()
            raise Retry(f"a helper process died (exit status {status})") from error
        result: T = _unwrapped(message)
        return result

    def _send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        rest = memoryview(data)
        while rest:
            rest = rest[self._process.stdin.write(rest) or 0 :]

    def _receive(self) -> Progress | Returned | Raised:
        (length,) = HEADER.unpack(self._exactly(HEADER.size))
        message: Progress | Returned | Raised = pickle.loads(self._exactly(length))  # noqa: S301  # our own process
        return message

    def _exactly(self, size: int) -> bytes:
        assert self._process.stdout is not None
        found = bytearray()
        while len(found) < size:
            some = self._process.stdout.read(size - len(found))
            if not some:
                raise EOFError
            found += some
        return bytes(found)

    def rest(self) -> None:
        """Keep it for the next job."""
        _resting.append(self)

    def kill(self) -> None:
        """End it at once; a `run` that waits for it raises. What it had done by then stays done."""
        self._process.kill()

    def close(self) -> int:
        """End it and wait until it is gone; its exit status. Nothing may wait for it then."""
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        return self._process.wait()


def _unwrapped(outcome: Returned | Raised) -> Any:
    if isinstance(outcome, Returned):
        return outcome.value
    if outcome.trace:
        outcome.error.add_note(f"In the helper process: {outcome.trace}")
    raise outcome.error
