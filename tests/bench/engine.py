"""The engine beside a bare PyMongo ``watch()`` loop, in the same run, on the same mongod.

- *ingest*: a backlog of changes, one a run. Peer: a loop over ``watch()`` that drains it. Two
  peers are timed: the loop as it comes, and with ``full_document="updateLookup"``, without which a
  loop does not learn a run's state. Ours: read, compared with the snapshot, matched, one ledger
  entry each, committed together with the position.
- *reactions*: no-op reactions claimed, run and settled, all with majority write concern.
- *latency*: from a writer's call, in another process, to the handler's start; peer: to the bare
  loop's body. The same while a transfer and a checksum run at full speed in worker processes.
- *growth*: all of these with 100,000 more runs in the collection.
- *idle*: three listeners as processes; the server's own counters.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import trio
from attrs import define
from bson import ObjectId
from loguru import logger
from pymongo import MongoClient, UpdateOne
from rich.console import Console
from rich.table import Table

from caxev import HERE, Job, aio, copy
from caxev.config import Settings
from caxev.core.ledger import Reaction
from caxev.database import Database, Position, open_database
from caxev.demo.world import World
from caxev.engine.context import Context
from caxev.engine.dispatcher import Dispatcher
from caxev.engine.listener import prepare
from caxev.engine.options import Options
from caxev.engine.process import tune_collector
from caxev.engine.recorder import Recorder
from caxev.engine.root_watch import RootWatch
from caxev.engine.watcher import Watcher
from caxev.engine.workers import Workers
from caxev.files import digest_tree
from caxev.transfer import Route, pull
from tests import engine
from tests.conftest import Database as Named
from tests.mongod import Cluster
from tests.places import vouched

ROOT = Path(__file__).parents[2]
SITE = "lngs"
Client = MongoClient[dict[str, Any]]
Sizes = dict[str, int]

FULL: Sizes = {
    "changes": 40_000,
    "growth_changes": 10_000,
    "growth_reactions": 10_000,
    "reactions": 20_000,
    "samples": 150,
    "rounds": 3,
    "filler": 100_000,
    "idle": 60,
}
QUICK: Sizes = {
    "changes": 2_000,
    "growth_changes": 1_000,
    "growth_reactions": 1_000,
    "reactions": 1_000,
    "samples": 20,
    "rounds": 1,
    "filler": 2_000,
    "idle": 5,
}


class NoIntake:
    """Takes reactions and starts none: what is timed is the way into the ledger."""

    def __init__(self) -> None:
        self.count = 0

    def reserve(self, reactions: Sequence[Reaction]) -> list[Reaction]:
        return list(reactions)

    def start(self, reactions: Sequence[Reaction], runs: object) -> None:
        self.count += len(reactions)

    def look_again(self) -> None:
        return

    def cancel(self, reactions: Sequence[Reaction]) -> None:
        raise AssertionError("nothing is to fail here")

    async def reconcile(self) -> None:
        return


@define
class Bench:
    """A mongod with a database of runs."""

    mongod: Cluster
    client: Client
    name: str

    @property
    def named(self) -> Named:
        return Named(self.mongod.uri, self.name)

    @property
    def runs(self) -> Any:
        return self.client[self.name]["runs_new"]

    @property
    def settings(self) -> Settings:
        return engine.settings_for(self.named)

    def fill(self, count: int, first: int = 1) -> list[ObjectId]:
        """Insert runs with two copies each, and some fields that nobody here needs."""
        filler = {"reader": {"ini": {"notes": "x" * 400}}, "source": {"type": "none"}}
        documents = [
            engine.run_document(n, ("raw", SITE, "transferring"), ("raw", "other", "new"), **filler)
            for n in range(first, first + count)
        ]
        for start in range(0, count, 5000):
            self.runs.insert_many(documents[start : start + 5000])
        return [document["_id"] for document in documents]

    def set_status(self, ids: Sequence[ObjectId], status: str) -> None:
        writes = [UpdateOne({"_id": i}, {"$set": {"data.0.status": status}}) for i in ids]
        for start in range(0, len(writes), 5000):
            self.runs.bulk_write(writes[start : start + 5000], ordered=True)

    def now(self) -> Any:
        return self.client.admin.command("hello")["operationTime"]


async def nothing(job: Job) -> None:
    """A reaction that does nothing."""


def options_of(bench: Bench) -> Options:
    """The options of the site whose listener's parts are measured."""
    return engine.options_for(bench.named, handlers(), site=SITE)


def handlers() -> list[Any]:
    return [engine.handler(nothing, copy("verifying", host=HERE))]


# -- ingest ---------------------------------------------------------------------------------------


def drain_bare(bench: Bench, start: Any, count: int, **options: Any) -> float:
    began = time.perf_counter()
    with bench.runs.watch(start_at_operation_time=start, **options) as stream:
        for n, _ in enumerate(stream, 1):
            if n == count:
                break
    return count / (time.perf_counter() - began)


async def drain_ours(bench: Bench, start: Any, count: int) -> float:
    async with aio.loop(), open_database(bench.settings) as database:
        await prepare(database)
        taken = await database.acquire(SITE, "bench", 600.0, datetime.now(UTC))
        assert taken is not None
        lease, intake = taken[0], NoIntake()
        await database.save_position(lease, Position(start=start), datetime.now(UTC))
        context = Context(database, lease, options_of(bench))
        watcher = Watcher(context, Recorder(context, intake))
        began = time.perf_counter()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: watcher.run(ready=trio.Event()))
            while intake.count < count:
                await trio.sleep(0.005)
            rate = count / (time.perf_counter() - began)
            nursery.cancel_scope.cancel()
        await database.release(lease)
        return rate


async def first_look(bench: Bench) -> None:
    """Let the site see every run as it is."""
    async with aio.loop(), open_database(bench.settings) as database:
        await prepare(database)
        taken = await database.acquire(SITE, "bench", 600.0, datetime.now(UTC))
        assert taken is not None
        context = Context(database, taken[0], options_of(bench))
        watcher = Watcher(context, Recorder(context, NoIntake()))
        await watcher.begin_scan(restart=True)
        await watcher.continue_scan()
        await database.release(taken[0])


def ingest(bench: Bench, count: int, rounds: int) -> dict[str, float]:
    """Drain a backlog with the bare loops and with ours, in turn; other runs in each round."""
    ids = bench.fill(count * rounds)
    trio.run(first_look, bench)
    ledger = bench.client[bench.name]["caxev_ledger"]
    rates: dict[str, list[float]] = {"bare": [], "lookup": [], "ours": []}
    for n in range(rounds):
        start = bench.now()
        bench.set_status(ids[n * count : (n + 1) * count], "verifying")
        rates["bare"].append(drain_bare(bench, start, count))
        rates["lookup"].append(drain_bare(bench, start, count, full_document="updateLookup"))
        rates["ours"].append(trio.run(drain_ours, bench, start, count))
        assert ledger.count_documents({"state": "pending"}) == count * (n + 1)
    return {name: statistics.median(found) for name, found in rates.items()}


# -- reactions ------------------------------------------------------------------------------------


async def settle_all(bench: Bench, count: int) -> float:
    """Run the reactions that the ingest left; reactions a second."""
    async with aio.loop(), open_database(bench.settings) as database:
        taken = await database.acquire(SITE, "bench", 600.0, datetime.now(UTC))
        assert taken is not None
        context = Context(database, taken[0], options_of(bench))
        async with Workers() as workers, trio.open_nursery() as nursery:
            dispatcher = Dispatcher(context, workers, nursery, RootWatch(context, workers))
            began = time.perf_counter()
            nursery.start_soon(dispatcher.settler.run)
            nursery.start_soon(dispatcher.take)
            await dispatcher.wait_idle()
            rate = count / (time.perf_counter() - began)
            nursery.cancel_scope.cancel()
        await database.release(taken[0])
        return rate


def reactions(bench: Bench, count: int, rounds: int) -> float:
    """Time no-op reactions; the ledger must hold `count` open reactions or more."""
    ledger = bench.client[bench.name]["caxev_ledger"]
    reactions = {"handler": {"$exists": True}}
    keys = [row["_id"] for row in ledger.find(reactions, {"_id": 1})]
    # All but the first part wait until their round has come.
    ledger.update_many(reactions, {"$set": {"state": "kept"}})
    rates = []
    for n in range(rounds):
        part = keys[n * count : (n + 1) * count]
        ledger.update_many({"_id": {"$in": part}}, {"$set": {"state": "pending"}})
        rates.append(trio.run(settle_all, bench, len(part)))
        assert ledger.count_documents({"_id": {"$in": part}}) == 0
    return statistics.median(rates)


# -- latency --------------------------------------------------------------------------------------

WRITER = """
import sys, time
from pymongo import MongoClient
uri, name, samples = sys.argv[1], sys.argv[2], int(sys.argv[3])
runs = MongoClient(uri, w="majority")[name]["runs_new"]
ids = [r["_id"] for r in runs.find({}, {"_id": 1}).sort("number", 1).limit(samples)]
sys.stdin.readline()
for i in ids:
    began = time.time()
    runs.update_one({"_id": i}, {"$set": {"data.0.status": sys.argv[4]}})
    print(i, began, flush=True)
    time.sleep(0.02)
"""


@contextmanager
def writer(bench: Bench, samples: int, status: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", WRITER, bench.mongod.uri, bench.name, str(samples), status]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.wait(60)


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def delays(process: subprocess.Popen[str], seen: dict[str, float]) -> list[float]:
    assert process.stdout is not None
    issued = [line.split() for line in process.stdout]
    return [1000 * (seen[run] - float(began)) for run, began in issued]


def bare_latency(bench: Bench, samples: int, status: str) -> list[float]:
    seen: dict[str, float] = {}
    with writer(bench, samples, status) as process, bench.runs.watch() as stream:
        stream.try_next()
        go(process)
        while len(seen) < samples:
            change = stream.next()
            seen.setdefault(str(change["documentKey"]["_id"]), time.time())
        return delays(process, seen)


def our_latency(bench: Bench, samples: int, status: str) -> list[float]:
    seen: dict[str, float] = {}

    async def note(job: Job) -> None:
        seen.setdefault(str(job.run.id), time.time())

    async def main() -> list[float]:
        handler = engine.handler(note, copy(("verifying", "transferring"), host=HERE))
        options = engine.options_for(bench.named, [handler])
        async with aio.loop(), open_database(bench.settings) as database:
            await prepare(database)
            async with listener(database, options):
                with writer(bench, samples, status) as process:
                    go(process)
                    while len(seen) < samples:
                        await trio.sleep(0.01)
                    return await trio.to_thread.run_sync(delays, process, seen)

    @asynccontextmanager
    async def listener(database: Database, options: Any) -> Any:
        async with engine.listener(database, options) as leaving:
            # Let the first scan, and what it starts, pass.
            await trio.sleep(1.0)
            while await database.due(SITE, "default", datetime.now(UTC), 1):
                await trio.sleep(0.1)
            await trio.sleep(0.5)
            seen.clear()
            yield leaving

    return trio.run(main)


def latency(bench: Bench, samples: int, rounds: int) -> dict[str, list[float]]:
    """Time from the writer's call, in milliseconds, for the bare loop and for ours, in turn."""
    first = bench.runs.find({}, {"_id": 1}).sort("number", 1).limit(samples)
    ids = [row["_id"] for row in first]
    found: dict[str, list[float]] = {"bare": [], "ours": []}
    for _ in range(rounds):
        bench.set_status(ids, "new")
        found["bare"] += bare_latency(bench, samples, "verifying")
        bench.set_status(ids, "new")
        found["ours"] += our_latency(bench, samples, "verifying")
    return found


@contextmanager
def load(directory: Path) -> Iterator[None]:
    """A transfer over SSH and a checksum at full speed in worker processes."""
    with World(directory, ROOT / "sites.json") as world:
        source = world.dir_of(SITE, "dir_raw") / "big"
        source.mkdir()
        for n in range(4):
            (source / f"{n}.zip").write_bytes(b"caxev" * (12 << 20))
        stop = threading.Event()
        thread = threading.Thread(target=_load, args=(world, source, stop))
        thread.start()
        try:
            time.sleep(3)
            yield
        finally:
            stop.set()
            thread.join()


def _load(world: World, source: Path, stop: threading.Event) -> None:
    async def transfers(workers: Workers) -> None:
        here, there = world.sites.get("chicago"), world.sites.get(SITE)
        final = world.dir_of("chicago", "dir_raw") / "big"
        while True:
            route = Route(here, there, str(final), str(source))
            await workers.run(pull, route)
            for file in final.iterdir():
                file.unlink()
            final.rmdir()

    async def checksums(workers: Workers) -> None:
        while True:
            await workers.run(digest, str(source))

    async def main() -> None:
        async with Workers() as workers, trio.open_nursery() as nursery:
            nursery.start_soon(transfers, workers)
            nursery.start_soon(checksums, workers)
            while not stop.is_set():
                await trio.sleep(0.1)
            nursery.cancel_scope.cancel()

    trio.run(main)


def digest(path: str, *, report: Any) -> str:
    return digest_tree(vouched(path), sha512=True, report=report).digest


# -- idle -----------------------------------------------------------------------------------------


def idle(directory: Path, seconds: int) -> tuple[int, float]:
    """Three idle listeners: queries to the runs collection, and getMores a minute and site."""
    with World(directory, ROOT / "sites.json") as world:
        for site in world.sites:
            world.listen(site)
        with Client(world.mongod.uri) as client:
            while (
                client["run"]["caxev_ledger"].count_documents({"position": {"$exists": True}}) < 3
            ):
                time.sleep(0.1)
            time.sleep(3)
            before, asked = _counters(client), world.mongod.queries("run.runs_new")
            time.sleep(seconds)
            after, queries = _counters(client), world.mongod.queries("run.runs_new") - asked
        return queries, (after["getmore"] - before["getmore"]) * 60 / seconds / len(world.sites)


def _counters(client: Client) -> dict[str, int]:
    counters: dict[str, int] = client.admin.command("serverStatus")["opcounters"]
    return counters


# -- all of it ------------------------------------------------------------------------------------


@contextmanager
def benches() -> Iterator[Callable[[str], Bench]]:
    with tempfile.TemporaryDirectory(prefix="caxev-bench-") as directory:
        options = ("--wiredTigerCacheSizeGB=2", "--oplogSize=512")
        with Cluster(Path(directory), options=options) as mongod, Client(mongod.uri) as client:
            yield lambda name: Bench(mongod, client, name)


def p(values: Sequence[float], percent: int) -> float:
    return float(statistics.quantiles(values, n=100)[percent - 1])


def measure(sizes: Sizes) -> dict[str, float]:
    """Run everything; the figures of the last line, and those behind them."""
    result: dict[str, float] = {}
    rounds, samples = sizes["rounds"], sizes["samples"]
    with benches() as bench_of:
        rates = ingest(bench := bench_of("ingest"), sizes["changes"], rounds)
        result |= {f"ingest_{name}_per_s": rate for name, rate in rates.items()}
        result["ingest_ratio"] = rates["ours"] / rates["lookup"]
        result["ingest_ratio_plain"] = rates["ours"] / rates["bare"]
        result["reactions_per_s"] = reactions(bench, sizes["reactions"], rounds)
        small = _at_size(bench_of("small"), 100, sizes)
        found = small["latency"]
        result |= _latencies(found)
        with tempfile.TemporaryDirectory(prefix="caxev-load-") as directory, load(Path(directory)):
            loaded = latency(bench_of("small"), samples, 1)
        result["loaded_bare_p50_ms"] = p(loaded["bare"], 50)
        result["loaded_p50_ms"] = p(loaded["ours"], 50)
        result["loaded_latency_p50_ratio"] = p(loaded["ours"], 50) / p(found["bare"], 50)
        result["loaded_over_idle_p50"] = p(loaded["ours"], 50) / p(found["ours"], 50)
        large = _at_size(bench_of("large"), sizes["filler"], sizes)
        result["growth_ratio"] = _growth(small, large, result)
    with tempfile.TemporaryDirectory(prefix="caxev-idle-") as directory:
        result["idle_queries"], result["idle_getmores_per_min"] = idle(
            Path(directory), sizes["idle"]
        )
    return result


def _at_size(bench: Bench, filler: int, sizes: Sizes) -> dict[str, Any]:
    """Ingest, reactions and latency with so many more runs in the collection."""
    bench.fill(filler, first=1_000_000)
    rounds, samples = sizes["rounds"], sizes["samples"]
    found: dict[str, Any] = {"ingest": ingest(bench, sizes["growth_changes"], rounds)["ours"]}
    found["reactions"] = reactions(bench, sizes["growth_reactions"], rounds)
    found["latency"] = latency(bench, samples, rounds)
    return found


def _latencies(found: dict[str, list[float]]) -> dict[str, float]:
    bare, ours = found["bare"], found["ours"]
    return {
        "bare_p50_ms": p(bare, 50),
        "bare_p99_ms": p(bare, 99),
        "latency_p50_ms": p(ours, 50),
        "latency_p99_ms": p(ours, 99),
        "latency_p50_ratio": p(ours, 50) / p(bare, 50),
        "latency_p99_ratio": p(ours, 99) / p(bare, 99),
    }


def _growth(small: dict[str, Any], large: dict[str, Any], result: dict[str, float]) -> float:
    """How much slower the worst of the three is when the collection is large; 1: as fast."""
    ratios = {
        "growth_ingest": small["ingest"] / large["ingest"],
        "growth_reactions": small["reactions"] / large["reactions"],
        "growth_latency": p(large["latency"]["ours"], 50) / p(small["latency"]["ours"], 50),
    }
    result |= ratios
    return float(max(ratios.values()))


def main(*, as_json: bool, quick: bool) -> None:
    logger.remove()
    tune_collector()
    result = {k: round(v, 3) for k, v in measure(QUICK if quick else FULL).items()}
    table = Table("figure", "value", title="engine beside a bare watch() loop")
    for name, value in result.items():
        table.add_row(name, f"{value:,.3f}".rstrip("0").rstrip("."))
    Console(stderr=as_json).print(table)
    if as_json:
        print(json.dumps(result))
