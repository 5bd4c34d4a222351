"""Detection of processes of ours that were OOM-killed.

If the kernel kills a worker of a job, the job's main process often survives and ends with another
exit status. The kernel counts such kills in each cgroup.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

OURS = Path("/proc/self/cgroup")
"""The kernel's list of the cgroups of this process."""
CGROUPS = Path("/sys/fs/cgroup")


def oom_kills() -> int:
    """Count the OOM-killed processes of our own cgroup; 0 if that is unknown."""
    # Both versions of cgroups may be mounted, with a counter in only one: the larger one is right.
    return max(_counts(), default=0)


def _counts() -> Iterator[int]:
    # Without /proc, or without a memory controller, an OOM kill passes for any other end.
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
