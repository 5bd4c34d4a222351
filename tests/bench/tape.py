"""What a backup writes to the file system of staging before anything is restored.

A run is backed up to simulated tapes. At the moment when ``dsmc`` is given the staged files, the
blocks that they take are counted: a hard link or shared blocks take none that the source has not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from caxev.config import ArchiveOptions, Site
from caxev.demo.world import SIMULATOR
from caxev.tape.base import Reach
from caxev.tape.steps import Data, Outcome, back_up
from caxev.tape.tsm import Tsm

MEBIBYTE: Final = 1 << 20
SIZE_MIB: Final = 2048
QUICK_MIB: Final = 16
FILES: Final = 16
RUN: Final = "161111_1434"
LIMIT: Final = 1.05
"""At most so many times the run's bytes."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--directory", help="where to work (default: a temporary directory)")


def main(*, as_json: bool, quick: bool, directory: str | None) -> None:
    with tempfile.TemporaryDirectory(prefix="caxev-tape-", dir=directory) as root:
        figures = measure(Path(root), (QUICK_MIB if quick else SIZE_MIB) * MEBIBYTE)
    table = Table("figure", "value", title="backup to simulated tape")
    for name, value in figures.items():
        table.add_row(name, f"{value:,}")
    Console(stderr=True).print(table)
    if as_json:
        print(json.dumps(figures))
    if figures["ratio"] > LIMIT:
        sys.exit(f"staging wrote {figures['ratio']} times the run's bytes: more than {LIMIT}")


def measure(root: Path, size: int) -> dict[str, Any]:
    """Back up a run of that size; the bytes that are new on the disk when it is staged."""
    raw, staging = root / "raw", root / "tsm"
    (raw / RUN).mkdir(parents=True)
    staging.mkdir()
    for number in range(FILES):
        _write(raw / RUN / f"{number:02}.zip", size // FILES)
    here = Site(name="here", dir_raw=str(raw), dir_tsm=str(staging))
    client = ArchiveOptions(
        command=(sys.executable, "-S", str(SIMULATOR)),
        environment={"DSMC_SIMULATOR_TAPES": str(root / "tapes")},
    )
    there = Site(name="tape", method="tsm", archive=client)
    data = Data(RUN, str(staging / RUN))
    began = time.monotonic()
    outcome, written = _watched(Reach(here, there), str(raw / RUN), data)
    seconds = time.monotonic() - began
    total = outcome.get().total_bytes
    return {
        "run_bytes": total,
        "written_bytes": written,
        "ratio": round(written / total, 4),
        "seconds": round(seconds, 1),
    }


def _write(path: Path, size: int) -> None:
    with path.open("wb") as file:
        for start in range(0, size, MEBIBYTE):
            file.write(os.urandom(min(MEBIBYTE, size - start)))
        os.fsync(file.fileno())


def _watched(reach: Reach, source: str, data: Data) -> tuple[Outcome[Any], int]:
    """Back up; what came of it, and how many bytes were written until ``dsmc`` was called.

    By this process, as the kernel counts what it caused to be written to disks (``write_bytes``),
    and by the blocks of staged files that are not the source's own; the larger of these.
    """
    put, seen = Tsm.put, []
    first = _caused()

    def watched(self: Tsm, staged: str, *args: Any, **more: Any) -> None:
        seen.append(max(_caused() - first, _new_blocks(Path(source), Path(staged))))
        put(self, staged, *args, **more)

    Tsm.put = watched  # type: ignore[method-assign]
    try:
        return back_up(reach, source, data, False), seen[0]
    finally:
        Tsm.put = put  # type: ignore[method-assign]


def _caused() -> int:
    rows = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(rows["write_bytes"])


def _new_blocks(source: Path, staged: Path) -> int:
    own = {(one.stat().st_dev, one.stat().st_ino) for one in source.iterdir()}
    found = [one.stat() for one in staged.iterdir()]
    return sum(512 * one.st_blocks for one in found if (one.st_dev, one.st_ino) not in own)
