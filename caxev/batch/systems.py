"""Lookup of batch systems: ours, and those of third parties."""

from __future__ import annotations

from importlib.metadata import entry_points

from caxev.batch.base import BatchSystem
from caxev.config.processing import BATCH
from caxev.core.errors import GiveUp


def system(name: str, home: str) -> BatchSystem:
    """Return the batch system of that name. Raises `GiveUp` if there is none."""
    if name == "slurm":
        from caxev.batch.slurm import Slurm

        return Slurm(home)
    for point in entry_points(group=BATCH, name=name):
        theirs: BatchSystem = point.load()(home)
        return theirs
    raise GiveUp(f"no batch system is named {name!r}: name one in processing, system")
