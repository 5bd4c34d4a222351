"""Worker processes for heavy work, seen from the listener.

`ports` runs here what a handler gives to ``job.work``: bytes move and are hashed in other
processes, so the listener's loop stays free. A worker does one job at a time and is used again.
The far end is `caxev.engine.worker`.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import copy_context
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import trio
from loguru import logger

from caxev import failpoints
from caxev.core.clock import clock
from caxev.core.errors import Retry
from caxev.engine.worker import HEADER, Progress, Raised, Returned, Setup, Task, command, frame
from caxev.logs import Relay

T = TypeVar("T")

IDLE: Final = 60.0
"""Seconds after which a worker without a job is ended."""
NICENESS: Final = 10
DEATH: Final = 5.0
"""Seconds that a worker may take to die: one whose disk hangs dies only when the disk answers."""
_READ: Final = 65536
_left_behind: Final[list[trio.Process]] = []
"""Processes that did not die. Kept, because trio warns if a living process is collected."""


def _ignore(_done: int, _total: int) -> None:
    pass


class Workers:
    """A pool of worker processes; use it as an async context manager.

    Their number is not limited. `files` are handler files that every worker loads, so
    that functions in them are found. Leaving the block kills every worker, idle or not, and waits
    until it is gone; a `run` that still waits for one raises `Retry`. A worker that does not die
    within `DEATH` is left behind, and logged.
    """

    def __init__(self, files: Sequence[str] = (), *, niceness: int = NICENESS) -> None:
        self._setup = Setup(os.getpid(), niceness, tuple(files))
        self._resting: list[_Worker] = []
        self._alive: set[_Worker] = set()
        self._open = False

    @property
    def alive(self) -> int:
        """The number of worker processes."""
        return len(self._alive)

    async def __aenter__(self) -> Self:
        self._manager = trio.open_nursery()
        self._nursery = await self._manager.__aenter__()
        self._open = True
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open = False
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as ending:
                for worker in tuple(self._alive):
                    ending.start_soon(self._end, worker)
        self._nursery.cancel_scope.cancel()
        # The block's own error is raised as it is: the nursery would wrap it in a group.
        await self._manager.__aexit__(None, None, None)

    async def run(
        self,
        function: Callable[..., T],
        *args: object,
        on_progress: Callable[[int, int], None] = _ignore,
    ) -> T:
        """Call ``function(*args)`` in a worker process and return what it returns.

        `function` must be importable by its name; it, its arguments and its result are pickled. If
        it has a parameter `report`, `on_progress` is called with the (done, total), in bytes, that
        it reports: at most four times a second, and with the last report for certain.

        Error handling: what the function raises is raised here, with the worker's traceback as a
        note; a class that cannot be pickled becomes RuntimeError. Raises `Retry` if the worker
        dies, and TypeError or a pickling error if the job cannot be handed over at all.

        Cancellation: the worker and every program it has started are killed and waited for. The
        effects that the function had by then stay.
        """
        name = _name(function)
        # Pickled before a worker is taken: what cannot be pickled must not cost one.
        task = frame(Task(function.__module__, name, args, failpoints.scope.get(), clock))
        worker = await self._take()
        worker.doing = f"{function.__module__}.{name}"
        worker.relay.context = copy_context()
        try:
            outcome = await worker.work(task, on_progress)
        except BaseException:
            # Its state is unknown now, so it is not used again.
            with trio.CancelScope(shield=True):
                await self._end(worker)
            raise
        if outcome is None:
            raise await self._obituary(worker)
        self._rest(worker)
        result: T = _unwrapped(outcome)
        return result

    async def _take(self) -> _Worker:
        self._check_open()
        if self._resting:
            worker = self._resting.pop()
            worker.rest.cancel()
            return worker
        with trio.CancelScope(shield=True):  # a process that starts is in `_alive`, or is none
            try:
                worker = await _start()
            except OSError as error:  # no descriptor, process or memory left
                raise Retry(f"no worker process can be started: {error}") from error
            self._alive.add(worker)
            if not self._open:  # closed while it started
                await self._end(worker)
        self._check_open()
        worker.first = frame(self._setup)
        return worker

    def _check_open(self) -> None:
        if not self._open:
            raise RuntimeError("these workers are closed")

    def _rest(self, worker: _Worker) -> None:
        if worker in self._alive:
            # Made here and not in the task: `_take` may cancel it before the task has begun.
            worker.rest = trio.CancelScope(deadline=trio.current_time() + IDLE)
            self._resting.append(worker)
            self._nursery.start_soon(self._resting_until_due, worker, worker.rest)

    async def _resting_until_due(self, worker: _Worker, rest: trio.CancelScope) -> None:
        """End a worker that has rested long enough, or has died."""
        with rest:
            await worker.ended()
        if worker.rest is rest and worker in self._resting:
            self._resting.remove(worker)
            with trio.CancelScope(shield=True):
                await self._end(worker)

    async def _end(self, worker: _Worker) -> int | None:
        """Kill and reap a worker; return its exit status, None if it does not die."""
        status = await worker.kill()
        if worker in self._alive:
            self._alive.discard(worker)
            if status is None:
                pid, doing = worker.process.pid, worker.doing
                logger.error(
                    "worker process {} cannot be killed: its disk hangs. It ran {}; leaving it",
                    pid,
                    doing,
                )
                _left_behind.append(worker.process)
                self._nursery.start_soon(self._bury, worker.process)
        return status

    @staticmethod
    async def _bury(process: trio.Process) -> None:
        await process.wait()
        _left_behind.remove(process)

    async def _obituary(self, worker: _Worker) -> Retry:
        with trio.CancelScope(shield=True):
            status = await self._end(worker)
        how = "or hangs" if status is None else f"with exit status {status}"
        how = f"of signal {-status}" if status is not None and status < 0 else how
        return Retry(f"the worker process died {how} while it ran {worker.doing}")


class _Worker:
    """One worker process and the pipes to it."""

    def __init__(self, process: trio.Process, relay: Relay) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.process, self.relay = process, relay
        self.rest = trio.CancelScope()
        self.first = b""
        self.doing = "nothing"
        self._requests, self._replies = process.stdin, process.stdout
        self._buffer = bytearray()
        self._killed = False

    async def work(
        self, task: bytes, on_progress: Callable[[int, int], None]
    ) -> Returned | Raised | None:
        """Hand over a task and wait for its end; return None if the process dies first."""
        try:
            await self._requests.send_all(self.first + task)
            self.first = b""
            while (message := await self._receive()) is not None:
                if not isinstance(message, Progress):
                    return message
                on_progress(message.done, message.total)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            logger.debug("a worker's pipe broke: {!r}", error)
        return None

    async def _receive(self) -> Progress | Returned | Raised | None:
        if not await self._fill(HEADER.size):
            return None
        (length,) = HEADER.unpack_from(self._buffer)
        if not await self._fill(HEADER.size + length):
            return None
        body = bytes(self._buffer[HEADER.size : HEADER.size + length])
        del self._buffer[: HEADER.size + length]
        message: Progress | Returned | Raised = pickle.loads(body)  # noqa: S301  # our own process
        return message

    async def _fill(self, size: int) -> bool:
        while len(self._buffer) < size:
            some = await self._replies.receive_some(_READ)
            if not some:
                return False
            self._buffer += some
        return True

    async def ended(self) -> None:
        """Wait until it has ended. It is not reaped, so its number stays its own until `kill`."""
        # No such process: `kill` has reaped it, and it has ended. No descriptor left: it counts as
        # ended, and its own are freed.
        with suppress(OSError):
            descriptor = os.pidfd_open(self.process.pid)
            try:
                await trio.lowlevel.wait_readable(descriptor)
            finally:
                os.close(descriptor)

    async def kill(self) -> int | None:
        """Kill it and the programs it has started, close the pipes, and reap it.

        Returns its exit status, None if it is not dead within `DEATH`. Also call this
        if it has ended by itself: programs that it has started may live on, and would go on beside
        the next attempt.
        """
        # Nothing else reaps it, so the first time its number cannot be another process's.
        if not self._killed:
            self._killed = True
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        await self._requests.aclose()
        await self._replies.aclose()
        status = None
        with trio.move_on_after(DEATH):
            status = await self.process.wait()
            await trio.to_thread.run_sync(self.relay.join)
        return status


async def _start() -> _Worker:
    ours, theirs = os.pipe()
    # The far end of the pipe is closed here: the log then ends when the worker, and every program
    # that it started, has ended.
    # A group of its own: `kill` then reaches the programs that its jobs start, too.
    try:
        process = await trio.lowlevel.open_process(
            command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=theirs,
            process_group=0,
        )
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    return _Worker(process, Relay(ours, f"worker {process.pid}"))


def _name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__qualname__", None)
    if name is None or "<" in name or function.__module__ == "__main__":
        raise TypeError(f"{function!r} cannot run in a worker: it must be a module's own function")
    return str(name)


def _unwrapped(outcome: Returned | Raised) -> Any:
    if isinstance(outcome, Returned):
        return outcome.value
    if outcome.trace:
        outcome.error.add_note(f"In the worker process: {outcome.trace}")
    raise outcome.error
