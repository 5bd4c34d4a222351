"""What a listener needs when a great many reactions are owed: its memory, and its rate.

The ledger is given so many open reactions, a half of them due and a half due tomorrow, and a
listener works on them for a while, in a process of its own. Beside it, the same with a thousand.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import trio
from bson import ObjectId
from loguru import logger
from rich.console import Console
from rich.table import Table

from caxev import HERE, Job, copy
from caxev.core.clock import utcnow
from caxev.core.ledger import Reaction
from caxev.core.model import CopyKey, Event
from caxev.database.reactions import reaction_document
from caxev.engine.process import tune_collector
from tests import engine
from tests.bench.engine import SITE, Client
from tests.conftest import Database as Named
from tests.mongod import Cluster

FEW = 1000
RUNS = 1000


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reactions", type=int, default=1_000_000, help="how many (1000000)")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long it works (30)")


def owed(runs: Sequence[ObjectId], number: int) -> Iterator[dict[str, Any]]:
    now = utcnow()
    for generation in range(1, number + 1):
        aspect = CopyKey("processed", SITE, f"v{generation}")
        event = Event(runs[generation % len(runs)], aspect, None, "verifying@1478822400000")
        at = now + timedelta(days=generation % 2)
        reaction = Reaction(SITE, event, "nothing", lane="default", generation=generation, at=at)
        yield {"_id": reaction.id, **reaction_document(reaction)}


def work(named: Named, seconds: float, told: Any) -> None:
    """Listen for a while; tells the peak of the memory (bytes) and the reactions done."""
    logger.remove()
    tune_collector()
    done = 0

    async def nothing(job: Job) -> None:
        nonlocal done
        done += 1

    async def main() -> None:
        options = engine.options_for(named, [engine.handler(nothing, copy("verifying", host=HERE))])
        async with engine.opened(named) as database, engine.listener(database, options):
            await trio.sleep(seconds)

    trio.run(main)
    told.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, done))


def measure(number: int, seconds: float) -> tuple[float, float]:
    """Peak memory in MB, and reactions a second."""
    with tempfile.TemporaryDirectory(prefix="caxev-bench-") as directory:
        options = ("--wiredTigerCacheSizeGB=2", "--oplogSize=512")
        with Cluster(Path(directory), options=options) as mongod, Client(mongod.uri) as client:
            ledger = client["backlog"]["caxev_ledger"]
            runs = [ObjectId() for _ in range(RUNS)]
            client["backlog"]["runs_new"].insert_many({"_id": run, "data": []} for run in runs)
            rows = owed(runs, number)
            while part := list(islice(rows, 10_000)):
                ledger.insert_many(part, ordered=False)
            ours, theirs = multiprocessing.Pipe()
            context = multiprocessing.get_context("spawn")
            named = Named(mongod.uri, "backlog")
            process = context.Process(target=work, args=(named, seconds, theirs))
            process.start()
            peak, done = ours.recv()
            process.join()
            return peak / 1e6, done / seconds


def main(*, as_json: bool, quick: bool, reactions: int, seconds: float) -> None:
    if quick:
        reactions, seconds = min(reactions, 20_000), min(seconds, 5.0)
    found = {number: measure(number, seconds) for number in (FEW, reactions)}
    table = Table("open reactions", "peak memory (MB)", "reactions/s", title="a listener's backlog")
    for number, (peak, rate) in found.items():
        table.add_row(f"{number:,}", f"{peak:.1f}", f"{rate:,.0f}")
    Console(stderr=as_json).print(table)
    if as_json:
        (few, _), (many, rate) = found.values()
        result = {
            "reactions": reactions,
            "peak_mb": many,
            "peak_mb_of_few": few,
            "reactions_per_s": rate,
        }
        print(json.dumps({name: round(value, 1) for name, value in result.items()}))
