"""Jobs that tests/test_workers.py has done by worker processes. Imports little, as a job should."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from loguru import logger

from caxev import GiveUp, Retry, Skip, failpoints

Report = Callable[[int, int], None]


class Unpicklable(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


class Panic(BaseException):
    """As libraries in Rust raise it: no `Exception`."""


def add(one: int, two: int) -> int:
    return one + two


def echo(value: object, *, report: Report) -> object:
    return value


def process_id(*, report: Report) -> int:
    return os.getpid()


def state(*, report: Report) -> dict[str, object]:
    return {
        "nice": os.nice(0),
        "scope": failpoints.scope.get(),
        "die_with": failpoints.die_with,
        "modules": {"trio", "pymongo", "click", "asyncssh", "cattrs"} & set(sys.modules),
        "stdin": sys.stdin.read(),
    }


def shout(*, report: Report) -> str:
    print("printed by Python", flush=True)
    os.write(1, b"printed by C\n")
    subprocess.run(["/bin/sh", "-c", "cat; echo printed by a program"], check=True)
    return "quiet"


def log(text: str, *, report: Report) -> None:
    logger.debug("not asked for")
    logger.warning("{}", text)


def flood(path: str, *, report: Report) -> None:
    """Report, write more than any pipe holds to standard error, and leave a note."""
    report(0, 1)
    for _ in range(20):
        os.write(2, b"x" * 99_999 + b"\n")
    Path(path).touch()


def count(total: int, *, report: Report) -> None:
    for done in range(total + 1):
        report(done, total)


def refuse(kind: str, *, report: Report) -> Skip:
    if kind == "skip":
        return Skip("nothing to do")
    raise {
        "retry": Retry("the link is down", after=7.0),
        "give up": GiveUp("the disk is full"),
        "os": FileNotFoundError(2, "No such file or directory", "/data/raw"),
        "unpicklable": Unpicklable(1, 2),
        "odd": type("Local", (Exception,), {})("made here"),
        "panic": Panic("x"),
    }[kind]


def give_unpicklable(*, report: Report) -> object:
    return lambda: None


def die(number: int, *, report: Report) -> None:
    os.kill(os.getpid(), number)


def leave(status: int, *, report: Report) -> None:
    os._exit(status)


def interrupt(*, report: Report) -> str:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    return "still here"


def hang(*, report: Report) -> None:
    """Start a program, tell the numbers of both processes as progress, and never end."""
    program = subprocess.Popen(["/bin/sleep", "1000"])
    report(os.getpid(), program.pid)
    time.sleep(1000)


def abandon(path: str, *, report: Report) -> None:
    """As `hang_and_note`, but it dies at once: its program goes on."""
    program = subprocess.Popen(["/bin/sleep", "1000"])
    Path(path).write_text(str(program.pid))
    os.kill(os.getpid(), signal.SIGKILL)


def leave_running(*, report: Report) -> int:
    """Start a program and come to an end before it."""
    return subprocess.Popen(["/bin/sleep", "1000"]).pid


def hang_and_note(path: str, *, report: Report) -> None:
    """As `hang`, with the numbers in a file."""
    program = subprocess.Popen(["/bin/sleep", "1000"])
    note = Path(path)
    note.with_suffix(".new").write_text(f"{os.getpid()} {program.pid}")
    note.with_suffix(".new").rename(note)
    time.sleep(1000)
