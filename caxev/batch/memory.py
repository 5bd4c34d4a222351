"""Whether the kernel has killed a process of ours for want of memory.

A job's parent often lives on when one of its workers is killed so, and ends with a status of its
own. The kernel counts such kills in each cgroup.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

OURS = Path("/proc/self/cgroup")
"""Where the kernel says in which cgroups this process is."""
CGROUPS = Path("/sys/fs/cgroup")


def oom_kills() -> int:
    """Count the processes of our own cgroup that were killed so; 0 where nobody can tell."""
    return max(_counts(), default=0)


def _counts() -> Iterator[int]:
    with suppress(OSError, ValueError):
        for line in OURS.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                yield _count(CGROUPS / path.lstrip("/") / "memory.events")
            elif "memory" in controllers.split(","):  # version 1
                yield _count(CGROUPS / "memory" / path.lstrip("/") / "memory.oom_control")


def _count(file: Path) -> int:
    with suppress(OSError, ValueError):
        for line in file.read_text().splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0
