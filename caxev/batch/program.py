"""Calls of a batch system's programs: argument lists, no shell, limited time and output."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from typing import Final

from caxev.core.errors import Denied, Retry
from caxev.tails import Tail

PATIENCE: Final = 120.0
"""Seconds that a batch system may take to answer."""
MOST: Final = 64 << 20
"""Maximum size of the output in bytes: a hundred thousand jobs take some ten million."""
COMPLAINTS: Final = 64 << 10
"""Bytes of standard error that are kept, the last ones."""


def call(
    command: Sequence[str], *, package: str, environment: Mapping[str, str] | None = None
) -> str:
    """Call a program; returns its output.

    Raises `Retry` with its standard error if it fails, `GiveUp` if it is not installed. A program
    that took too long may still have done its work.
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
        # `Tail` reads both pipes: a program that fills one that nobody reads would wait for ever.
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired as error:
            raise Retry(f"{name} has not answered for {PATIENCE:.0f} s") from error
        finally:
            process.kill()  # does nothing once it has ended
        text, why = answer.text(), " ".join(complaints.text().split())
    if process.returncode != 0:
        raise Retry(f"{name} failed: {why or f'exit status {process.returncode}'}")
    if not answer.whole:
        raise Retry(f"{name} has written {answer.read:,} bytes: more than {MOST:,} are not read")
    return text
