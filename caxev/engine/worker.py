"""One worker process: what runs at the far end of `caxev.engine.workers`.

It gets one job at a time over its standard input and reports over its standard output, in frames:
eight bytes of length, then a pickle. If its input ends, the process that started it is gone. Then
it dies at once, in the middle of its work: nothing may go on writing for a site that another
process may have taken over. It imports little, so that it starts in 0.1 s.
"""

from __future__ import annotations

import gc
import importlib
import os
import pickle
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from inspect import Parameter, signature
from operator import attrgetter
from queue import SimpleQueue
from threading import Lock, Thread
from time import monotonic
from typing import Any, BinaryIO, Final, NamedTuple, NoReturn

from caxev import failpoints
from caxev.core.clock import Clock, clock
from caxev.logs import begin_relayed

HEADER: Final = struct.Struct(">Q")
"""A frame's length in bytes."""
_BOOT: Final = "import sys; sys.path[:] = {path!r}; from caxev.engine.worker import main; main()"
PROGRESS_EVERY: Final = 0.25
"""Seconds between two reports of progress."""


class Setup(NamedTuple):
    """The first frame to a worker: its parent, its niceness, the handler files to load."""

    parent: int
    niceness: int
    files: tuple[str, ...]


class Task(NamedTuple):
    """A frame to a worker: call this function of this module for that handler, by that clock."""

    module: str
    name: str
    arguments: tuple[Any, ...]
    scope: str
    clock: Clock


class Progress(NamedTuple):
    """A frame from a worker: so many bytes of so many are done."""

    done: int
    total: int


class Returned(NamedTuple):
    """A frame from a worker: the task's result. It is the last one of that task."""

    value: Any


class Raised(NamedTuple):
    """A frame from a worker: what the task raised, and its traceback. The last one as well."""

    error: Exception
    trace: str


def command() -> list[str]:
    """Return the command that starts a worker, with this process's import path."""
    # The import path is handed over, because a worker must load the same code. The last word is for
    # people, who see it in `ps`.
    return [sys.executable, "-c", _BOOT.format(path=sys.path), "caxev worker"]


def frame(message: object) -> bytes:
    """Return a message as it goes over a pipe."""
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(body)) + body


def main() -> NoReturn:
    """Serve tasks until standard input ends. Never returns."""
    gc.set_threshold(5_000, 10, 10)  # nearly all that it makes is imported, and stays
    requests, replies = _take_pipes()
    os.umask(0o022)  # copies must be readable for others, independent of the caller's umask
    # Ctrl-C and systemd's SIGTERM may reach every process of a service, but only the listener
    # decides when to stop. Unlike SIG_IGN a handler is not passed on to programs that a job starts.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda _number, _frame: None)
    begin_relayed()
    files = _settle(_next_frame(requests))
    tasks: SimpleQueue[bytes] = SimpleQueue()
    # A thread of its own notices the end of the input, even during a job.
    Thread(target=_listen, args=(requests, tasks), daemon=True).start()
    while True:
        report = Reporter(replies)
        report.last(_attempt(tasks.get(), files, report))


def _take_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Keep the pipes for frames: the output of a job goes to the log, by standard error."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, replies


def _settle(message: bytes) -> tuple[str, ...]:
    setup: Setup = pickle.loads(message)  # noqa: S301  # from the process that started us
    os.nice(setup.niceness)
    if os.getppid() != setup.parent:  # it died before we could notice the end of its pipe
        _die()
    failpoints.die_with[:] = [setup.parent]
    return setup.files


def _next_frame(stream: BinaryIO) -> bytes:
    """Return the next message, still pickled. Dies at the end of the stream."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        _die()
    (length,) = HEADER.unpack(header)
    body = stream.read(length)
    if len(body) < length:
        _die()
    return body


def _listen(requests: BinaryIO, tasks: SimpleQueue[bytes]) -> None:
    while True:
        tasks.put(_next_frame(requests))


def _die() -> NoReturn:
    """End this process, and every program that its job has started."""
    if os.getpgrp() == os.getpid():
        # With the programs that it has started: they may write, too.
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _attempt(message: bytes, files: tuple[str, ...], report: Reporter) -> Returned | Raised:
    try:
        _load(files, message)
        task: Task = pickle.loads(message)  # noqa: S301  # from the process that started us
        return Returned(_run(task, report))
    except BaseException as error:  # noqa: BLE001  # goes to the task that waits
        return Raised(_portable(error), "".join(traceback.format_exception(error)))
    finally:
        sys.stdout.flush()


def _load(files: tuple[str, ...], message: bytes) -> None:
    """Load the handler files if the task names what is in them."""
    if not files:
        return
    from caxev.core.registry import OF_FILES  # not before it is needed: it takes time

    if OF_FILES.encode() in message:
        from caxev.config import load_file  # the same

        for file in files:
            load_file(file)


def _run(task: Task, report: Callable[[int, int], None]) -> object:
    failpoints.scope.set(task.scope)
    # The parent's: no worker asks the database for the time.
    clock.anchor, clock.ahead = task.clock.anchor, task.clock.ahead
    function = attrgetter(task.name)(importlib.import_module(task.module))
    from caxev.files.roots import steady  # not before it is needed: it takes time

    with steady():
        options = {"report": report} if takes_report(function) else {}
        return function(*task.arguments, **options)


def takes_report(function: Callable[..., Any]) -> bool:
    """Return whether a function has a parameter `report`, or takes any, as a decorator's does."""
    parameters = signature(function, follow_wrapped=False).parameters.values()
    return any(one.name == "report" or one.kind is Parameter.VAR_KEYWORD for one in parameters)


def _portable(error: BaseException) -> Exception:
    """Return the error if it is an `Exception` that survives pickling, else its text."""
    try:
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301  # just made
    except Exception:  # noqa: BLE001  # whatever a class's pickling may raise
        copy = None
    if isinstance(error, Exception) and type(copy) is type(error) and str(copy) == str(error):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


class Reporter:
    """Reports one task to the listener. A job's threads may call it side by side."""

    def __init__(self, replies: BinaryIO) -> None:
        self._replies = replies
        self._lock = Lock()
        self._reported = 0.0
        self._unreported: Progress | None = None
        self._over = False

    def __call__(self, done: int, total: int) -> None:
        """Report progress if the last report is old enough, else with the next or the end."""
        with self._lock:
            self._unreported = Progress(done, total)
            if not self._over and monotonic() - self._reported >= PROGRESS_EVERY:
                self._report()

    def last(self, outcome: Returned | Raised) -> None:
        """Report the end. Later reports by threads that the job has left behind are dropped."""
        try:
            message = frame(outcome)
        except Exception as error:  # noqa: BLE001  # whatever a class's pickling may raise
            why = f"what the job returned cannot be pickled: {error}"
            message = frame(Raised(TypeError(why), ""))
        with self._lock:
            if self._unreported is not None:
                self._report()
            self._over = True
            self._write(message)

    def _report(self) -> None:
        self._write(frame(self._unreported))
        self._reported, self._unreported = monotonic(), None

    def _write(self, message: bytes) -> None:
        rest = memoryview(message)
        try:
            # The pipe is unbuffered, so that progress is not delayed: a write may take only a part.
            while rest:
                rest = rest[self._replies.write(rest) :]
        except BrokenPipeError:
            _die()
