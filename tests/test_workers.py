"""Worker processes: what comes back from them, how they die, and that nothing of them is left."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import trio
from loguru import logger

from caxev import GiveUp, Retry, Skip, failpoints, logs
from caxev.config import ConfigError, load_file
from caxev.engine.worker import takes_report
from caxev.engine.workers import Workers
from tests import worker_jobs as jobs


def running(process: int) -> bool:
    """Whether there is such a process, and it is not a zombie that only waits to be reaped."""
    try:
        return bool(psutil.Process(process).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def becomes(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds, for 240 s at most."""
    with trio.fail_after(240):
        while not condition():  # what is awaited happens in other processes
            await trio.sleep(0.01)


# -- by one worker, one after the other -----------------------------------------------------------


async def results(workers: Workers) -> None:
    """A job's result comes back, also if it is larger than any pipe's buffer."""
    assert await workers.run(jobs.add, 1, 2) == 3
    value = os.urandom(5_000_000)
    assert await workers.run(jobs.echo, value) == value


async def progress(workers: Workers) -> None:
    """Progress comes in order, far less often than it is reported, and the last for certain."""
    seen: list[tuple[int, int]] = []
    await workers.run(jobs.count, 100_000, on_progress=lambda *pair: seen.append(pair))
    assert seen == sorted(seen)
    assert seen[0] == (0, 100_000)
    assert seen[-1] == (100_000, 100_000)
    assert len(seen) < 1000


async def typed_exceptions(workers: Workers) -> None:
    """`Retry`, `GiveUp` and errors of the system come through as themselves, attributes and all."""
    with pytest.raises(Retry) as retry:
        await workers.run(jobs.refuse, "retry")
    with pytest.raises(GiveUp) as give_up:
        await workers.run(jobs.refuse, "give up")
    with pytest.raises(FileNotFoundError) as missing:
        await workers.run(jobs.refuse, "os")
    assert await workers.run(jobs.refuse, "skip") == Skip("nothing to do")
    assert (retry.value.why, retry.value.after) == ("the link is down", 7.0)
    assert give_up.value.why == "the disk is full"
    assert missing.value.filename == "/data/raw"
    assert "worker_jobs.py" in missing.value.__notes__[0]


async def unpicklable_exceptions(workers: Workers) -> None:
    """An exception that cannot be pickled becomes a RuntimeError with its class and text."""
    for kind, message in (
        ("unpicklable", "Unpicklable: 1 and 2"),
        ("odd", "Local: made here"),
        ("panic", "Panic: x"),
    ):
        with pytest.raises(RuntimeError, match=message):
            await workers.run(jobs.refuse, kind)


async def unpicklable_results_and_arguments(workers: Workers) -> None:
    """What cannot be pickled is an error that says so; the worker lives on."""
    with pytest.raises(TypeError, match="what the job returned cannot be pickled"):
        await workers.run(jobs.give_unpicklable)
    with pytest.raises(Exception, match="pickle"):
        await workers.run(jobs.echo, lambda: None)
    with pytest.raises(TypeError, match="a module's own function"):
        await workers.run(lambda **_: None)


async def signals_are_for_the_listener(workers: Workers) -> None:
    """Ctrl-C and systemd's SIGTERM do not end a job."""
    assert await workers.run(jobs.interrupt) == "still here"


async def test_one_worker_serves_one_job_after_the_other() -> None:
    """Whatever comes of each, the next one runs in the same process."""
    async with Workers() as workers:
        first = await workers.run(jobs.process_id)
        for job in (
            results,
            progress,
            typed_exceptions,
            unpicklable_exceptions,
            unpicklable_results_and_arguments,
            signals_are_for_the_listener,
        ):
            await job(workers)
            assert await workers.run(jobs.process_id) == first != os.getpid(), job
            assert workers.alive == 1


# -- by several -----------------------------------------------------------------------------------


async def test_one_job_at_a_time() -> None:
    """Jobs side by side run in processes of their own."""
    async with Workers() as workers:
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(workers.run, jobs.process_id)
        assert workers.alive == 2


async def test_state_of_a_worker() -> None:
    """A worker is niced, knows its listener and the handler's scope, and imports little."""
    token = failpoints.scope.set("pull")
    try:
        async with Workers(niceness=3) as workers:
            state = await workers.run(jobs.state)
    finally:
        failpoints.scope.reset(token)
    assert state == {
        "nice": min(os.nice(0) + 3, 19),  # the most there is
        "scope": "pull",
        "die_with": [os.getpid()],
        "modules": set(),
        "stdin": "",
    }


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    """The log file of this process, for one test."""
    file = tmp_path / "caxev.log"
    logs.configure("INFO", file=str(file))
    yield file
    logger.remove()
    logger.configure(patcher=lambda _record: None)


def lines_of(log: Path) -> list[str]:
    return log.read_text().splitlines()


async def test_prints_stay_out(log: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What a job or its programs print is logged with the job's context, and harms no result."""
    async with Workers() as workers:
        with logger.contextualize(handler="pull"):
            assert await workers.run(jobs.shout) == "quiet"
    assert capfd.readouterr().out == ""
    lines = [line.split(" | ", 1) for line in lines_of(log)]
    assert [context.split()[-1] for context, _ in lines] == ["pull"] * 3
    printed = ["printed by Python", "printed by C", "printed by a program"]
    assert [text.partition(": ")[2] for _, text in lines] == printed


async def test_a_worker_logs_as_its_listener_does(log: Path) -> None:
    """By its levels, one record a line: what others wrote is escaped, and long lines are cut."""
    async with Workers() as workers:
        await workers.run(jobs.log, "x\x1b]0;owned\x07" + "y" * 5000)
    lines = lines_of(log)
    assert all(line.isprintable() and len(line) < 3000 for line in lines)
    assert [line.split()[2:4] for line in lines] == [["WARNING", "worker"]] * 3
    assert r"x\x1b]0;owned\x07" in lines[0]
    assert sum(line.count("y") for line in lines) == 5000


async def test_a_worker_does_not_wait_for_a_reader_of_standard_error(
    log: Path, tmp_path: Path
) -> None:
    """Though nobody reads what its listener writes there, and the listener's loop is blocked."""
    ours, theirs = os.pipe()
    former = os.dup(2)
    os.dup2(theirs, 2)
    note = tmp_path / "note"

    def block(_done: int, _total: int) -> None:
        end = time.monotonic() + 240
        while not note.exists():
            assert time.monotonic() < end
            time.sleep(0.01)

    try:
        async with Workers() as workers:
            await workers.run(jobs.flood, str(note), on_progress=block)
    finally:
        os.dup2(former, 2)
        for descriptor in (ours, theirs, former):
            os.close(descriptor)
    assert sum(map(len, lines_of(log))) > 2_000_000


def test_progress_is_reported_by_what_can_do_so() -> None:
    """Whatever a decorator calls its keywords; a parameter of that name is none."""

    def decorated(*args: object, **options: object) -> None: ...

    def other(kwargs: object) -> None: ...

    found = [takes_report(one) for one in (jobs.count, decorated, jobs.add, other)]
    assert found == [True, True, False, False]


async def test_descriptors_that_run_out_end_no_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that cannot be watched is ended; one that cannot be started is a reason to wait."""

    def none_left(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    async with Workers() as workers:
        with monkeypatch.context() as starved:
            starved.setattr(os, "pidfd_open", none_left)
            assert await workers.run(jobs.add, 1, 2) == 3
            await becomes(lambda: workers.alive == 0)
        with monkeypatch.context() as starved:
            starved.setattr(os, "pipe", none_left)
            with pytest.raises(Retry, match="Too many open files"):
                await workers.run(jobs.add, 1, 2)
        assert await workers.run(jobs.add, 1, 2) == 3


async def test_killed_worker() -> None:
    """A worker that dies is a `Retry` that names the signal or exit status; another one follows."""
    async with Workers() as workers:
        for number in (signal.SIGKILL, signal.SIGSEGV):
            why = rf"died of signal {number:d} while it ran .*jobs\.die"
            with pytest.raises(Retry, match=why):
                await workers.run(jobs.die, int(number))
            assert workers.alive == 0
        with pytest.raises(Retry, match="died with exit status 3"):
            await workers.run(jobs.leave, 3)
        assert await workers.run(jobs.add, 1, 1) == 2


async def test_what_a_dead_worker_has_started_dies(tmp_path: Path) -> None:
    """A program must not go on beside the next attempt, however its worker came to die."""
    note = tmp_path / "program"
    async with Workers() as workers:
        with pytest.raises(Retry, match="died of signal 9"):
            await workers.run(jobs.abandon, str(note))
        await becomes(lambda: not running(int(note.read_text())))
        program = await workers.run(jobs.leave_running)
        os.kill(await workers.run(jobs.process_id), signal.SIGKILL)
        await becomes(lambda: workers.alive == 0)
        await becomes(lambda: not running(program))


async def test_cancellation_kills() -> None:
    """Cancelling a job kills and reaps its worker and the programs that it has started."""
    seen: list[int] = []
    async with Workers() as workers:
        with trio.CancelScope() as scope:

            def cancel(*processes: int) -> None:
                seen.extend(processes)
                scope.cancel()

            await workers.run(jobs.hang, on_progress=cancel)
        assert scope.cancelled_caught
        assert workers.alive == 0
        assert not psutil.pid_exists(seen[0])
        await becomes(lambda: not running(seen[1]))


async def test_failing_listener_side() -> None:
    """An error in `on_progress` comes out, and the worker does not run on unseen."""

    def fail(_done: int, _total: int) -> None:
        raise ZeroDivisionError

    async with Workers() as workers:
        with pytest.raises(ZeroDivisionError):
            await workers.run(jobs.hang, on_progress=fail)
        assert workers.alive == 0


async def test_leaving_kills() -> None:
    """Leaving the block ends idle workers and busy ones; whoever still waits gets a `Retry`."""
    busy = trio.Event()
    ended: list[BaseException] = []

    async def wait_for_it(workers: Workers) -> None:
        try:
            await workers.run(jobs.hang, on_progress=lambda *_: busy.set())
        except Retry as retry:
            ended.append(retry)

    async with trio.open_nursery() as nursery:
        async with Workers() as workers:
            nursery.start_soon(wait_for_it, workers)
            await busy.wait()
            await workers.run(jobs.add, 1, 2)
            assert workers.alive == 2
        assert workers.alive == 0
    assert len(ended) == 1
    with pytest.raises(RuntimeError, match="closed"):
        await workers.run(jobs.add, 1, 2)


async def test_the_blocks_own_error() -> None:
    """An error in the block comes out as itself, not in a group."""

    async def fail() -> None:
        async with Workers() as workers:
            await workers.run(jobs.add, 1, 2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()


async def test_idle_workers_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that has had nothing to do for long enough is gone."""
    monkeypatch.setattr("caxev.engine.workers.IDLE", 0.05)
    async with Workers() as workers:
        first = await workers.run(jobs.process_id)
        await becomes(lambda: workers.alive == 0)
        assert not psutil.pid_exists(first)
        assert await workers.run(jobs.process_id) != first


async def test_idle_worker_that_dies() -> None:
    """An idle worker that dies is reaped, and no job is given to it."""
    async with Workers() as workers:
        first = await workers.run(jobs.process_id)
        os.kill(first, signal.SIGKILL)
        await becomes(lambda: workers.alive == 0)
        assert await workers.run(jobs.process_id) != first


async def test_nothing_leaks() -> None:
    """After many jobs, some of them cut short, there is no more open and nobody left behind."""
    async with Workers() as workers:
        await workers.run(jobs.add, 1, 1)
    me = psutil.Process()
    before = me.num_fds(), len(me.children())
    async with Workers() as workers:
        for _ in range(20):
            async with trio.open_nursery() as nursery:
                for number in range(2):
                    nursery.start_soon(workers.run, jobs.add, number, 1)
        for _ in range(2):
            with pytest.raises(Retry):
                await workers.run(jobs.leave, 1)
            with trio.CancelScope() as scope:
                await workers.run(
                    jobs.hang, on_progress=lambda *_: scope.cancel()
                )  # called before the next round
    assert (me.num_fds(), len(me.children())) == before


async def test_functions_of_handler_files(tmp_path: Path) -> None:
    """A function of a handler file is found in the worker, and so are the classes it uses."""
    file = tmp_path / "my-handlers.py"
    file.write_text(
        "from attrs import frozen\n\n\n@frozen\nclass Box:\n    number: int\n\n\n"
        "def more(box, *, report):\n    return Box(box.number + 1)\n"
    )
    module = load_file(file)
    async with Workers(files=[str(file)]) as workers:
        assert await workers.run(module.more, module.Box(1)) == module.Box(2)


async def test_broken_handler_file(tmp_path: Path) -> None:
    """A handler file that a worker cannot load is a `ConfigError` for its jobs, and no other."""
    file = tmp_path / "gone.py"
    file.write_text("def more(number, *, report):\n    return number + 1\n")
    module = load_file(file)
    file.unlink()
    async with Workers(files=[str(file)]) as workers:
        for _ in range(2):
            with pytest.raises(ConfigError, match=r"gone\.py: no such file"):
                await workers.run(module.more, 1)
        assert await workers.run(jobs.add, 1, 1) == 2


LISTENER = """
import sys, trio
from caxev.engine.workers import Workers
from tests import worker_jobs

async def main():
    async with Workers() as workers:
        await workers.run(worker_jobs.hang_and_note, sys.argv[1])

trio.run(main)
"""


async def test_a_dead_listener_takes_its_workers_along(tmp_path: Path) -> None:
    """When the listener is killed, its workers and their programs die in the middle of the job."""
    note = tmp_path / "note"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LISTENER, str(note)]
    listener = subprocess.Popen(command, env=environment)  # noqa: ASYNC220  # quick enough here
    try:
        await becomes(note.exists)
        worker, program = map(int, note.read_text().split())
        assert running(worker)
    finally:
        listener.kill()
        listener.wait()
    await becomes(lambda: not running(worker) and not running(program))
