"""A hundred sites and a million runs: what one site costs, and what a person waits for.

Each row is measured by itself, in a database of its own, with listeners and commands as real
processes, and if that has a meaning beside a bare PyMongo loop in the same run: a plain cursor over
the collection, or loops over ``watch()`` with ``updateLookup``. CPU is that of /proc/PID/stat.

- *ledger*: documents and bytes that an idle site keeps for a run of 5, 50 and 500 copies.
- *first_look*: a site's first look at all runs; a tag of today meanwhile; killed and started again.
- *scan*: a look at all runs that finds nothing new.
- *changes*: a copy at another site becomes ``verifying``, or ``transferred``, and nothing is to do
  here: CPU here and of mongod for each change and site, beside loops that look up or filter it out.
- *listeners*: 20 and 40 sites at 20 such updates a second: how far behind, and mongod's CPU.
- *tags*, *copies*: changes that were missed, some of which lead to a reaction or none; then a tag.
- *owed*: a great many open reactions, and an urgent one.
- *run*, *status*, *failed*, *totals*, *copies_at*, *verify*, *tape*, *rm*: commands.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

from attrs import define, field
from bson import ObjectId
from loguru import logger
from rich.console import Console
from rich.table import Table

from caxev import aio
from caxev.config import Settings
from caxev.core.clock import utcnow
from caxev.core.ledger import Reaction
from caxev.core.model import CopyKey, Event
from caxev.database import Request, open_database
from caxev.database import run as run_trio
from caxev.database.reactions import reaction_document
from tests.bench.ground import Ended, Ground, Listener, cpu, peak_mb

IDLE: Final = "idle00"
ELSEWHERE: Final = 3
"""The entry, at another site, whose status changes."""
RATE: Final = 20.0
"""Changes a second where they are paced."""
BESIDE: Final = 4
SMALL: Final = 200  # runs, below which there are only two listeners
STATUSES: Final = ("verifying", "transferred")
ROUNDS: Final = 3
LONG: Final = 10.0  # seconds, from which on one round says enough
PROBES: Final = 10


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=100_000, help="how many (100000)")
    parser.add_argument("--only", default="", help=f"some rows: {','.join(ROWS)}")
    parser.add_argument("--few", type=int, help="runs where many listeners must see them (1000)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a paced load (20)")
    parser.add_argument(
        "--unseen", action="store_true", help="commands: on runs that no listener has seen"
    )
    parser.add_argument("--directory", help="where the database is (a temporary directory)")


@define
class Bench:
    """The sizes, the ground, and the figures found. `quick`: it is enough that they come."""

    ground: Ground
    runs: int
    few: int
    seconds: float
    unseen: bool
    quick: bool
    rows: list[dict[str, Any]] = field(factory=list)
    ready: bool = False
    report: Callable[[dict[str, Any]], None] = lambda row: None

    @property
    def beside(self) -> int:
        """Listeners, or loops, whose CPU is measured: mongod's share of one is lost in noise."""
        return 1 if self.quick else BESIDE

    def add(self, row: str, what: str, value: float, unit: str, bare: float | None = None) -> None:
        """Note a figure, and that of the bare loop beside it in the same unit."""
        ratio = None if not bare else round(value / bare, 3)
        shown = None if bare is None else round(bare, 4)
        found = {"row": row, "what": what, "value": round(value, 4), "unit": unit}
        self.rows.append({**found, "bare": shown, "ratio": ratio})
        self.report(self.rows[-1])

    def fill(self, count: int) -> None:
        """Have so many runs, as they were at first, and nothing else."""
        self.ground.fill(count)
        self.ready = False

    def prepare(self) -> None:
        """Have all runs with indexes, and seen by a site, for commands; they change nothing."""
        if self.ready:
            return
        self.fill(self.runs)
        self.ground.command("db", "init")
        if not self.unseen:
            with self.ground.listening(IDLE):
                pass
        self.ready = True


# -- a site's ledger, its first look, a scan ------------------------------------------------------


def ledger(bench: Bench) -> None:
    for copies, most in ((5, 100),) if bench.quick else ((5, 100), (50, 20), (500, 4)):
        runs = max(min(most, bench.runs // 10), 2)
        bench.ground.fill(runs, copies)
        with bench.ground.listening(IDLE):
            documents, size = bench.ground.kept()
        bench.add("ledger", f"documents a run of {copies} copies", documents / runs, "")
        bench.add("ledger", f"bytes a run of {copies} copies", size / runs, "B")


def first_look(bench: Bench) -> None:
    ground = bench.ground
    bench.fill(bench.runs)
    cursor = ground.cursor()
    whole, urgent, peak = _look(ground, probe=True)
    name = f"first look at {bench.runs} runs"
    bench.add("first_look", name, whole, "s", cursor)
    bench.add("first_look", "a tag of today meanwhile: served after", urgent, "s")
    bench.add("first_look", "peak memory", peak, "MB")
    ground.forget()
    # Killed in the midst: what was seen before is not seen again.
    listener = _started(ground)
    time.sleep(0.4 * whole)
    listener.stop(kill=True)
    rest, _, _ = _look(ground, probe=False)
    bench.add(
        "first_look", "killed at 0.4 of it and resumed, both parts", 0.4 * whole + rest, "s", whole
    )


def _started(ground: Ground) -> Listener:
    before = ground.epoch(IDLE)
    listener = ground.listen(IDLE)
    ground.led(listener, before)
    return listener


def _look(ground: Ground, *, probe: bool) -> tuple[float, float, float]:
    """Seconds of a first look from the lease on, those of a tag meanwhile, and the peak memory."""
    listener = _started(ground)
    try:
        began = time.perf_counter()
        urgent = _probed(ground, listener, 1)[0] if probe else 0.0
        ground.seen(listener)
        return time.perf_counter() - began, urgent, peak_mb(listener.process.pid)
    finally:
        listener.stop()


def _probed(ground: Ground, listener: Listener, number: int) -> list[float]:
    """Tag the latest runs, one after the other: seconds until each one's handler began."""
    found = []
    fresh = ground.runs.find({"tags.name": {"$ne": "probe"}}, {"number": 1})
    for row in list(fresh.sort("_id", -1).limit(number)):
        began = time.time()
        ground.tag([row["_id"]], "probe")
        found.append(ground.noted(listener, "probe", row["number"]) - began)
    return found


def _probed_amid(ground: Ground, listener: Listener) -> float:
    """The same of one run, once the listener is at work on what it missed."""
    ground.until(lambda: listener.changes > 0, listener)
    time.sleep(0.5)
    return _probed(ground, listener, 1)[0]


def scan(bench: Bench) -> None:
    ground = bench.ground
    bench.fill(bench.runs)
    cursor = ground.cursor()
    with ground.listening(IDLE) as (listener,):
        before, began, used = ground.scanned(IDLE), time.perf_counter(), cpu(listener.process.pid)
        _ask(ground, Request("scan"))
        ground.until(lambda: ground.scanned(IDLE) != before, listener)
        seconds = time.perf_counter() - began
        bench.add("scan", f"scan of {bench.runs} runs, nothing new", seconds, "s", cursor)
        bench.add("scan", "CPU of it here", cpu(listener.process.pid) - used, "s")


def _ask(ground: Ground, request: Request) -> None:
    settings = Settings(mongo_uri=ground.mongod.uri, database=ground.name)

    async def ask() -> None:
        async with aio.loop(), open_database(settings) as database:
            await database.add_request(IDLE, request, "bench", utcnow())

    run_trio(ask)


# -- what a change elsewhere costs ----------------------------------------------------------------


def _sites(number: int) -> list[str]:
    return [f"idle{n:02d}" for n in range(number)]


@contextmanager
def _followers(ground: Ground, kind: str, number: int) -> Iterator[list[int]]:
    """The processes that follow the runs: caxev's, bare loops of a kind, or none."""
    with ExitStack() as stack:
        if kind == "caxev":
            listeners = stack.enter_context(ground.listening(*_sites(number)))
            yield [one.process.pid for one in listeners]
        elif kind == "none":
            yield []
        else:
            yield [one.pid for one in stack.enter_context(ground.loops(kind, number))]


def _used(ground: Ground, pids: Sequence[int], work: Callable[[], None]) -> tuple[float, float]:
    """Seconds of CPU of these processes together, and of mongod, while something is done."""
    before, server = sum(map(cpu, pids)), cpu(ground.pid)
    work()
    return sum(map(cpu, pids)) - before, cpu(ground.pid) - server


def _costs(bench: Bench, kind: str) -> dict[str, tuple[float, float]]:
    """CPU (ms) of the followers and of mongod for a change to each status, without that at rest."""
    ground = bench.ground
    ids = list(ground.numbers(min(int(RATE * bench.seconds), bench.few)).values())
    ground.set_status(ids, "transferring", ELSEWHERE)
    found = {}
    with _followers(ground, kind, bench.beside) as pids:
        time.sleep(2)
        rest = _used(ground, pids, lambda: time.sleep(bench.seconds))
        for status in STATUSES:
            load = partial(_paced, ground, ids, status, bench.seconds)
            both = zip(_used(ground, pids, load), rest, strict=True)
            here, server = (1000 * max(used - idle, 0.0) / len(ids) for used, idle in both)
            found[status] = here, server
    return found


def _paced(ground: Ground, ids: Sequence[ObjectId], status: str, seconds: float) -> None:
    began = time.monotonic()
    ground.pace(ids, status, ELSEWHERE, RATE)
    time.sleep(max(began + seconds - time.monotonic(), 0.0))


def changes(bench: Bench) -> None:
    bench.fill(bench.few)
    alone = _costs(bench, "none")
    costs = {kind: _costs(bench, kind) for kind in ("caxev", "lookup", "filtered")}
    for status in STATUSES:
        here = {kind: found[status][0] / bench.beside for kind, found in costs.items()}
        written = alone[status][1]
        mongod = {kind: found[status][1] - written for kind, found in costs.items()}
        mongod = {kind: max(used, 0.0) / bench.beside for kind, used in mongod.items()}
        bench.add(status, "CPU here, a change", here["caxev"], "ms", here["lookup"])
        name = "CPU of mongod, a change and site"
        bench.add(status, name, mongod["caxev"], "ms", mongod["lookup"])
        bench.add(status, "CPU of a loop that filters it out", here["filtered"], "ms")
        bench.add(status, "CPU of mongod for such a loop", mongod["filtered"], "ms")


def listeners(bench: Bench) -> None:
    ground, seconds = bench.ground, bench.seconds
    for number in (20, 40) if bench.few >= SMALL else (2,):
        bench.fill(count := int(RATE * seconds))
        ids = list(ground.numbers(count).values())
        bare = _bare_load(bench, number, ids)
        used, behind, at_end = _load(bench, number, ids)
        name = f"{number} at {RATE:.0f}/s"
        cores = used / seconds, bare / seconds
        bench.add("listeners", f"{name}: CPU of mongod", cores[0], "cores", cores[1])
        bench.add("listeners", f"{name}: behind at most", behind, "s")
        bench.add("listeners", f"{name}: behind at the end", at_end, "s")


def _bare_load(bench: Bench, number: int, ids: Sequence[ObjectId]) -> float:
    """CPU of mongod, in seconds, during a load that so many bare loops follow."""
    ground = bench.ground
    ground.set_status(ids, "transferring", ELSEWHERE)
    with ground.loops("lookup", number):
        load = partial(_paced, ground, ids, "transferred", bench.seconds)
        return _used(ground, [], load)[1]


def _load(bench: Bench, number: int, ids: Sequence[ObjectId]) -> tuple[float, float, float]:
    """CPU of mongod during a load; how far the slowest site was behind, at most and at the end."""
    ground = bench.ground
    ground.set_status(ids, "transferring", ELSEWHERE)
    with ground.listening(*_sites(number)) as sites:
        marks = reversed(ground.numbers(len(ids)).items())
        load = threading.Thread(
            target=ground.pace, args=(ids, "transferred", ELSEWHERE, RATE), daemon=True
        )
        server, behind = cpu(ground.pid), []
        load.start()
        while load.is_alive():
            behind.append(_behind(ground, sites, *next(marks)))
            load.join(5.0)
        used = cpu(ground.pid) - server
        at_end = _behind(ground, sites, *next(marks))
        return used, max([*behind, at_end]), at_end


def _behind(ground: Ground, sites: Sequence[Listener], number: int, run: ObjectId) -> float:
    """Tag a run: seconds until the slowest of the sites has begun to react to it."""
    began = time.time()
    ground.tag([run], "probe")
    return max(ground.noted(one, "probe", number, every=0.1) for one in sites) - began


# -- what was missed ------------------------------------------------------------------------------


def tags(bench: Bench) -> None:
    ground = bench.ground
    count = min(bench.runs, 100_000)
    bench.fill(count)
    with ground.listening(IDLE):
        pass
    start, ids = ground.now(), list(ground.numbers(count).values())
    ground.tag(ids, "counted")
    bare = count / ground.drain(start, count)
    listener = _started(ground)
    try:
        began = time.perf_counter()
        urgent = _probed_amid(ground, listener)
        ground.until(lambda: listener.count("counted") >= count, listener, every=0.1)
        rate = count / (time.perf_counter() - began)
    finally:
        listener.stop()
    bench.add("tags", f"{count} tags missed, then a new one: served after", urgent, "s")
    bench.add("tags", "the missed ones", rate, "1/s", bare)


def copies(bench: Bench) -> None:
    ground = bench.ground
    count = min(bench.runs, 50_000)
    bench.fill(count)
    ids = list(ground.numbers(count).values())
    ground.set_status(ids, "transferring", ELSEWHERE)
    with ground.listening(IDLE):
        kept = ground.kept()[0]
    start = ground.now()
    ground.set_status(ids, "transferred", ELSEWHERE)
    bare = count / ground.drain(start, count)
    listener = _started(ground)
    try:
        began = time.perf_counter()
        urgent = _probed_amid(ground, listener)
        ground.until(lambda: listener.changes >= count, listener, every=0.1)
        taken = time.perf_counter() - began
        ground.until(lambda: ground.at_rest(IDLE), listener, every=0.25)
        done = time.perf_counter() - began
        more = ground.kept()[0] - kept
    finally:
        listener.stop()
    bench.add("copies", f"{count} copies elsewhere missed, then a tag: served after", urgent, "s")
    bench.add("copies", "the missed ones, taken in", count / taken, "1/s", bare)
    bench.add("copies", "the missed ones, all done", count / done, "1/s", bare)
    bench.add("copies", "documents that came into the ledger", more, "")


def owed(bench: Bench) -> None:
    ground = bench.ground
    bench.fill(min(bench.few, 1000))
    number = 10 * bench.runs
    probes = min(PROBES, bench.few // 4)
    with ground.listening(IDLE) as (listener,):
        unloaded = statistics.median(_probed(ground, listener, probes))
    runs = list(ground.numbers(bench.few).values())
    rows = _open(runs, number)
    while part := list(islice(rows, 10_000)):
        ground.ledger.insert_many(part, ordered=False)
    listener = _started(ground)
    try:
        # Before that one, the server has to read past what was inserted meanwhile.
        first, *found = _probed(ground, listener, 1 + probes)
        bench.add("owed", f"{number} owed reactions: the first change is served after", first, "s")
        name = "an urgent one among them starts after"
        bench.add("owed", name, statistics.median(found), "s", unloaded)
        bench.add("owed", "the slowest of them", max(found), "s", unloaded)
        bench.add("owed", "peak memory", peak_mb(listener.process.pid), "MB")
    finally:
        listener.stop()


def _open(runs: Sequence[ObjectId], number: int) -> Iterator[dict[str, Any]]:
    """Open reactions, half of them due now and half tomorrow."""
    now = utcnow()
    for n in range(1, number + 1):
        aspect = CopyKey("processed", IDLE, f"v{n}")
        event = Event(runs[n % len(runs)], aspect, None, "verifying@1478822400000")
        at = now + timedelta(days=n % 2)
        one = Reaction(IDLE, event, "counted", lane="default", generation=n, at=at)
        yield {"_id": one.id, **reaction_document(one)}


# -- commands -------------------------------------------------------------------------------------


def _timed(bench: Bench, *arguments: str, rounds: int = ROUNDS) -> Ended:
    """Run a command several times, or once if that is long; the one of the median time."""
    found = [bench.ground.command(*arguments)]
    if found[0].seconds < LONG and not bench.quick:
        found += [bench.ground.command(*arguments) for _ in range(rounds - 1)]
    return sorted(found, key=lambda one: one.seconds)[len(found) // 2]


def of_one_run(bench: Bench) -> None:
    bench.prepare()
    version = _timed(bench, "--version", rounds=5)
    number = str(bench.runs // 2)
    for arguments in (
        ("status", "--run", number),
        ("explain", "--run", number, "--site", IDLE),
        ("verify", "--run", number),
        ("rm", "--run", number, "--site", "lngs", "--dry-run"),
    ):
        found = _timed(bench, *arguments, rounds=5)
        name = f"{arguments[0]} --run, beside --version"
        bench.add("run", name, found.seconds, "s", version.seconds)


LISTS: Final = {
    "status": ("status",),
    "failed": ("reactions", "--failed"),
    "totals": ("status", "--totals"),
    "copies_at": ("status", "--host", "chicago", "--status", "transferred"),
    "verify": ("verify", "--site", "lngs"),
    "tape": ("tape", "status", "--offline"),
    "rm": ("rm", "--site", "lngs", "--dry-run"),
}
"""The commands whose time may grow with the runs."""


def _listing(row: str) -> Callable[[Bench], None]:
    def measure(bench: Bench) -> None:
        bench.prepare()
        cursor = bench.ground.cursor()
        found = _timed(bench, *LISTS[row])
        name = " ".join(LISTS[row])
        bench.add(row, f"{name}, {bench.runs} runs", found.seconds, "s", cursor)
        bench.add(row, "first line after", found.first, "s")
        bench.add(row, "peak memory", found.peak_mb, "MB")

    return measure


ROWS: Final[dict[str, Callable[[Bench], None]]] = {
    "ledger": ledger,
    "first_look": first_look,
    "scan": scan,
    "changes": changes,
    "listeners": listeners,
    "tags": tags,
    "copies": copies,
    "owed": owed,
    "run": of_one_run,
    **{row: _listing(row) for row in LISTS},
}


def main(
    *,
    as_json: bool,
    quick: bool,
    runs: int,
    only: str,
    few: int | None,
    seconds: float,
    unseen: bool,
    directory: str | None,
) -> None:
    logger.remove()
    if quick:
        runs, few, seconds = min(runs, 300), min(few or 40, 40), min(seconds, 2.0)
    wanted = only.split(",") if only else [*ROWS]
    if unknown := [name for name in wanted if name not in ROWS]:
        raise SystemExit(f"no such row: {', '.join(unknown)} (known: {', '.join(ROWS)})")
    console = Console(stderr=True)

    def report(row: dict[str, Any]) -> None:
        bare = "" if row["bare"] is None else f" (bare {row['bare']:g}, ratio {row['ratio']})"
        console.print(f"{row['row']}: {row['what']}: {row['value']:g} {row['unit']}{bare}")

    root = tempfile.TemporaryDirectory(prefix="caxev-scale-", dir=directory)
    with root, Ground(Path(root.name)) as ground:
        bench = Bench(ground, runs, few or min(runs, 1000), seconds, unseen, quick, report=report)
        for name in wanted:
            ROWS[name](bench)
    table = Table("row", "what", "value", "bare", "ratio", title=f"{runs} runs")
    for row in bench.rows:
        cells = (f"{row['value']:g} {row['unit']}", row["bare"], row["ratio"])
        table.add_row(row["row"], row["what"], *("" if one is None else str(one) for one in cells))
    Console(stderr=as_json).print(table)
    if as_json:
        print(json.dumps({"runs": runs, "rows": bench.rows}))
