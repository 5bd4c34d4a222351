"""Calling a batch system's programs: argument lists, no shell, and never for long."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from typing import Final

from caxev.job import Denied, Retry

PATIENCE: Final = 120.0
"""Seconds that a batch system may take to answer."""


def call(
    command: Sequence[str], *, package: str, environment: Mapping[str, str] | None = None
) -> str:
    """Call a program; what it says.

    Raises `Retry` with what it complained of where it fails, `GiveUp` where it is not installed.
    One that took too long may have done what was asked.
    """
    name = command[0]
    try:
        done = subprocess.run(  # noqa: S603  # an argument list, no shell
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environment,
            timeout=PATIENCE,
            check=False,
        )
    except FileNotFoundError as error:
        raise Denied(f"{name} is not installed here (Debian: {package})") from error
    except subprocess.TimeoutExpired as error:
        raise Retry(f"{name} has not answered for {PATIENCE:.0f} s") from error
    except OSError as error:
        raise Retry(f"{name} cannot be started: {error.strerror}") from error
    if done.returncode != 0:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise Retry(f"{name} failed: {said or f'exit status {done.returncode}'}")
    return done.stdout.decode(errors="replace")
