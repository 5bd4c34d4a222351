"""Calling a batch system's programs: argument lists, no shell, and never for long."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from typing import Final

from caxev.core.errors import Denied, Retry
from caxev.tails import Tail

PATIENCE: Final = 120.0
"""Seconds that a batch system may take to answer."""
MOST: Final = 64 << 20
"""Bytes of an answer: a hundred thousand jobs take some ten million."""
COMPLAINTS: Final = 64 << 10
"""Bytes of what it complains of that are kept, the last of it."""


def call(
    command: Sequence[str], *, package: str, environment: Mapping[str, str] | None = None
) -> str:
    """Call a program; what it says.

    Raises `Retry` with what it complained of where it fails, `GiveUp` where it is not installed.
    One that took too long may have done what was asked.
    """
    name = command[0]
    try:
        process = subprocess.Popen(  # noqa: S603  # an argument list, no shell
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
    except FileNotFoundError as error:
        raise Denied(f"{name} is not installed here (Debian: {package})") from error
    except OSError as error:
        raise Retry(f"{name} cannot be started: {error.strerror}") from error
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        answer, complaints = Tail(process.stdout, MOST), Tail(process.stderr, COMPLAINTS)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired as error:
            raise Retry(f"{name} has not answered for {PATIENCE:.0f} s") from error
        finally:
            process.kill()  # does nothing once it has ended
        text, said = answer.text(), " ".join(complaints.text().split())
    if process.returncode != 0:
        raise Retry(f"{name} failed: {said or f'exit status {process.returncode}'}")
    if not answer.whole:
        raise Retry(f"{name} has written {answer.read:,} bytes: more than {MOST:,} are not read")
    return text
