"""The log: it stops nobody, survives what is done to its file, and cannot be forged."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

import pytest
from loguru import logger

from caxev import logs
from caxev.logs import LogFile, Outlet, Unbuffered

EVIL = "x\n2026-11-29 03:00:00.000 INFO    lngs | run 7: deleted\x1b]0;owned\x07\x9b2J{extra[no]}"


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    """The log file of this process, for one test."""
    file = tmp_path / "caxev.log"
    logs.configure("INFO", file=str(file))
    yield file
    logger.remove()
    logger.configure(patcher=lambda _record: None)


def test_what_others_wrote_cannot_forge_a_line(log: Path) -> None:
    """In the message, the context and an error's text it is escaped; a traceback is indented."""
    with logger.contextualize(site="lngs", run=EVIL):
        logger.info("copied {}", EVIL)
        logger.opt(exception=ValueError(EVIL)).error("it failed")
    lines = log.read_text().split("\n")
    assert all(line.isprintable() for line in lines)
    assert [line for line in lines if line.startswith("2026-11-29 03")] == []
    assert sum(not line.startswith(" ") for line in lines if line) == 2
    assert any(line.startswith("    ValueError: x") for line in lines)


@pytest.mark.parametrize("what", ["renamed", "deleted"])
def test_a_log_file_that_was_moved_is_opened_again(log: Path, what: str) -> None:
    """As logrotate does it, or somebody who cleans up."""
    logger.info("before")
    if what == "renamed":
        log.rename(log.with_suffix(".1"))
    else:
        log.unlink()
    logger.info("after")
    assert "after" in log.read_text()
    assert "before" not in log.read_text()


def test_a_log_file_is_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The latest of the former ones has the number 1, and so many are kept."""
    monkeypatch.setattr(logs, "ROTATE_AT", 20)
    monkeypatch.setattr(logs, "KEEP", 2)
    file = tmp_path / "deep" / "caxev.log"
    log = LogFile(str(file))
    for number in range(4):
        log.write(f"{number} {'x' * 15}\n")
    log.stop()
    kept = {one.name: one.read_text()[0] for one in file.parent.iterdir()}
    assert kept == {"caxev.log": "3", "caxev.log.1": "2", "caxev.log.2": "1"}


def test_nobody_waits_for_the_disk_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listener goes on while its log file hangs; what was dropped meanwhile is counted."""
    monkeypatch.setattr(logs, "ROOM", 10_000)
    file, answers = tmp_path / "caxev.log", Event()
    write = LogFile.write

    def hang(self: LogFile, text: str) -> None:
        assert answers.wait(60)
        write(self, text)

    monkeypatch.setattr(LogFile, "write", hang)
    logs.configure("INFO", file=str(file), lasting=True)
    try:
        for _ in range(200):
            logger.info("x" * 100)
        answers.set()
    finally:
        logger.remove()
        logger.configure(patcher=lambda _record: None)
    lines = file.read_text().splitlines()
    dropped = [int(line.split()[0]) for line in lines if "dropped" in line]
    assert len(lines) - len(dropped) + sum(dropped) == 200
    assert sum(dropped) > 100


def test_nobody_waits_for_a_reader_of_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is dropped, and counted when somebody reads again."""
    monkeypatch.setattr(logs, "ROOM", 10_000)
    ours, theirs = os.pipe()
    read: list[str] = []
    with os.fdopen(ours) as reading, os.fdopen(theirs, "w") as stream:
        outlet = Outlet(Unbuffered(stream))
        for number in range(3000):
            outlet.write(f"{number} {'x' * 1000}\n")
        reader = Thread(target=lambda: read.extend(reading))
        reader.start()
        outlet.stop()
        stream.close()
        reader.join()
    dropped = [int(line.split()[0]) for line in read if "dropped" in line]
    assert len(read) - len(dropped) + sum(dropped) == 3000
    assert sum(dropped) > 2000


def test_a_stop_does_not_wait_for_a_reader_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener whose log nobody reads leaves all the same."""
    monkeypatch.setattr(logs, "LAST", 0.1)
    ours, theirs = os.pipe()
    with os.fdopen(theirs, "w") as stream:
        outlet = Outlet(Unbuffered(stream))
        outlet.write("x" * 1_000_000)
        outlet.stop()
        assert outlet._thread.is_alive()
        os.close(ours)  # which ends its writing
        outlet._thread.join(30)
        assert not outlet._thread.is_alive()


def test_a_stream_that_is_no_file_is_written_too() -> None:
    """As tests have it."""
    stream = io.StringIO()
    outlet = Outlet(Unbuffered(stream))
    outlet.write("one\n")
    outlet.stop()
    assert stream.getvalue() == "one\n"
    assert not outlet.isatty()


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_end_nothing(tmp_path: Path, closed: str) -> None:
    """Neither a command, nor by what it opens under a number that people write to."""
    code = "import os, sys; sys.argv[1:] = ['handlers']; from caxev.__main__ import main; main()"
    script = f'exec {sys.executable} -c "{code}" {closed}'
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        ["sh", "-c", script], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_command_ends_without_looking_for_cycles() -> None:
    """Python would look through all that was imported, which takes as long as much of it."""
    code = (
        "import atexit, gc, sys; from caxev.__main__ import main; "
        "atexit.register(lambda: print(gc.get_freeze_count())); "
        "sys.argv[1:] = ['--version']; main()"
    )
    shown = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert int(shown.splitlines()[-1]) > 10_000
