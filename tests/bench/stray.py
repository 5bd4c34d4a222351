"""``caxev stray`` on many files: its memory, its time, and what a listener beside it feels of it.

Half of the files are in the copies of runs that the database knows, single files and directories;
half are strays, alone and in directories. A listener of the same site reacts to runs all the while;
its reactions are timed with and without a ``caxev stray`` beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import trio
from loguru import logger
from pymongo import MongoClient
from rich.console import Console
from rich.table import Table

from caxev import Job, RunUpdate, tag
from caxev.database import run as run_trio
from tests import engine
from tests.conftest import Database as Named
from tests.mongod import Cluster

FILES: Final = 1_000_000
QUICK: Final = 20_000
ALONE: Final = 20
"""Files that are a copy, or a stray, by themselves, for each in a directory of that many."""
PROBES: Final = 200
BATCH: Final = 1000
PATIENCE: Final = 900.0
"""Seconds that the first scan may take on a busy machine."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--files", type=int, help=f"how many files (default {FILES})")
    parser.add_argument("--directory", help="where to put them (default: a temporary directory)")


def main(*, as_json: bool, quick: bool, files: int | None, directory: str | None) -> None:
    logger.remove()
    number = files or (QUICK if quick else FILES)
    with (
        tempfile.TemporaryDirectory(prefix="caxev-stray-", dir=directory) as root,
        Cluster(Path(root) / "mongod") as mongod,
    ):
        database = Named(mongod.uri, "run")
        lay_out(Path(root), number, database)
        figures = run_trio(measure, Path(root), database, PROBES // (4 if quick else 1))
    figures = {"files": number, **figures}
    table = Table("figure", "value", title="caxev stray")
    for name, value in figures.items():
        table.add_row(name, f"{value:,}")
    Console(stderr=True).print(table)
    if as_json:
        print(json.dumps(figures))


def lay_out(root: Path, number: int, database: Named) -> None:
    """Write the files and the runs: a quarter of the files in each of four forms."""
    quarter = number // 4
    derived = root / "processed" / "pax_v1"
    for path in (root / "raw", derived):
        path.mkdir(parents=True)
    with MongoClient[dict[str, Any]](database.uri) as client:
        runs = client[database.name]["runs_new"]
        documents = []
        for first in range(0, quarter, ALONE):
            name = f"{first:09}"
            known = _files(root / "raw" / name, ALONE)
            singles = [derived / f"{name}.{i}" for i in range(ALONE)]
            documents.append(_document(name, known, singles))
            _files(root / "raw" / f"stray-{name}", ALONE)
            for i, single in enumerate(singles):
                single.touch()
                (derived / f"stray-{name}.{i}").touch()
            if len(documents) == BATCH:
                runs.insert_many(documents)
                documents = []
        if documents:
            runs.insert_many(documents)


def _files(path: Path, number: int) -> Path:
    path.mkdir()
    for i in range(number):
        (path / str(i)).touch()
    return path


def _document(name: str, raw: Path, singles: list[Path]) -> dict[str, Any]:
    usual = {"host": "lngs", "status": "transferred"}
    entries = [{**usual, "type": "raw", "location": str(raw)}]
    for version, single in enumerate(singles):
        derived = {"type": "processed", "pax_version": f"v1.{version}", "location": str(single)}
        entries.append({**usual, **derived})
    return {"name": name, "detector": "tpc", "tags": [], "data": entries}


async def measure(root: Path, database: Named, probes: int) -> dict[str, float]:
    """Time a listener's reactions alone and beside the search, and take the search's figures."""
    directories = {"dir_raw": f"{root}/raw", "dir_processed": f"{root}/processed"}
    (root / "sites.json").write_text(json.dumps([{"name": "lngs", **directories}]))

    async def answer(job: Job) -> RunUpdate:
        return RunUpdate.add_tag(job.run, "pong")

    options = engine.options_for(
        database, [engine.handler(answer, tag("ping"))], site_fields=directories
    )
    async with engine.opened(database) as db, engine.listener(db, options):
        await _round(db)  # the first scan is over then
        alone = sorted([await _round(db) for _ in range(probes)])
        beside: list[float] = []
        figures: dict[str, float] = {}
        async with trio.open_nursery() as nursery:
            done = trio.Event()
            nursery.start_soon(_search, root, database, figures, done)
            while not done.is_set():
                beside.append(await _round(db))
    beside.sort()
    return {
        **figures,
        "alone_p50_ms": _at(alone, 0.5),
        "alone_p99_ms": _at(alone, 0.99),
        "beside_p50_ms": _at(beside, 0.5),
        "beside_p99_ms": _at(beside, 0.99),
        "beside_reactions": len(beside),
    }


def _at(times: list[float], part: float) -> float:
    return round(times[min(len(times) - 1, int(part * len(times)))] * 1000, 1)


async def _round(db: Any) -> float:
    """Give a run the tag, and wait for the reaction; in seconds."""
    number = time.monotonic_ns()
    document = engine.run_document(number, tags=[{"name": "ping"}])
    began = time.monotonic()
    run = await db.insert_run(document)

    async def answered() -> bool:
        return "pong" in (await db.runs([run]))[run].tags

    await engine.until(answered, within=PATIENCE)
    return time.monotonic() - began


async def _search(root: Path, database: Named, figures: dict[str, float], done: trio.Event) -> None:
    """Run ``caxev stray`` as its own process: its peak memory, its time, what it found."""
    command = [sys.executable, "-m", "caxev", "--config", str(root / "sites.json"), "stray"]
    command += ["--site", "lngs", "--mongo-uri", database.uri, "--database", database.name]

    def search() -> tuple[float, int, int]:
        began = time.monotonic()
        with (root / "found").open("wb") as found:
            process = subprocess.Popen(command, stdout=found)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"caxev stray ended with {process.returncode}")
        strays = (root / "found").read_bytes().count(b"\n") - 1
        return time.monotonic() - began, usage.ru_maxrss * 1024, strays

    try:
        seconds, peak, strays = await trio.to_thread.run_sync(search)
    finally:
        done.set()
    figures |= {"seconds": round(seconds, 1), "peak_mb": round(peak / 1e6), "strays": strays}
