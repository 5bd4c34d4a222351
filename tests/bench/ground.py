"""What `tests.bench.scale` stands on: a mongod with a great many runs, listeners, bare loops.

The documents are like those of XENON1T: five copies a run, tags, and the blocks of trigger and
processor that nobody here needs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Self

import psutil
from attrs import define, field, frozen
from bson import ObjectId
from pymongo import MongoClient, UpdateOne

from caxev.core.model import Run
from caxev.core.update import RunUpdate
from caxev.database.runs import write_of
from caxev.testing.mongod import start_with_us
from tests.mongod import Cluster
from tests.sshd import free_port

DAQ: Final = "xe1t-datamanager"
TAPE: Final = "tsm-server"
HOSTS: Final = (DAQ, "lngs", "chicago", "stockholm", TAPE)
"""Where the copies of a run are: none is at the sites `idle00`, `idle01` ..., which listen."""
MOST_IDLE: Final = 40
AT_ONCE: Final = 2000
PATIENCE: Final = 7200.0
"""Seconds for what takes long at a million runs."""
FIRST: Final = datetime(2016, 11, 11, 14, 34, tzinfo=UTC)
LEASE: Final = "3"

HANDLERS: Final = '''"""Handlers of the benchmark: each writes a line when it begins."""

import os
import time

from caxev import Job, on, tag

out = open(os.environ["SCALE_OUT"], "a", buffering=1)


@on(tag("probe"), lane="transfer")
async def probe(job: Job) -> None:
    """Note that an urgent reaction has begun."""
    out.write(f"probe {job.run.number} {time.time()}\\n")


@on(tag("counted"))
async def counted(job: Job) -> None:
    """Note that one of many reactions has begun."""
    out.write(f"counted {job.run.number} {time.time()}\\n")
'''
BARE: Final = """
import sys
from pymongo import MongoClient
uri, name, kind = sys.argv[1:]
runs = MongoClient(uri)[name]["runs_new"]
stages = [{"$match": {"operationType": "never"}}] if kind == "filtered" else []
options = {"full_document": "updateLookup"} if kind == "lookup" else {}
with runs.watch(stages, **options) as stream:
    print("ready", flush=True)
    for change in stream:
        pass
"""
"""A loop over ``watch()`` that does nothing with a change."""


# -- documents ------------------------------------------------------------------------------------

_TRIGGER: Final = {"events_built": 12345, "status": "processed", "ended": True, "deadtime": 0.0123}
_READER: Final = {
    "self_trigger": True,
    "ini": {"write_mode": 2, "trigger_config_override": {"Zip": {"events_per_file": 1000}}},
}
_PROCESSOR: Final = {
    "DEFAULT": {
        "gains": [2_000_000 + 7 * n for n in range(248)],
        "drift_velocity_liquid": 144000.0,
        "electron_lifetime_liquid": 452000.0,
    }
}


def run_document(number: int, copies: int = 5, **fields: Any) -> dict[str, Any]:
    """A run with good copies at `HOSTS`, and beyond these of processed versions there."""
    start = FIRST + timedelta(minutes=number)
    name = f"{start:%y%m%d_%H%M}"
    return {
        "_id": ObjectId(),
        "number": number,
        "name": name,
        "detector": "tpc",
        "start": start,
        "end": start + timedelta(hours=1),
        "source": {"type": "none"},
        "tags": [{"name": "_sciencerun1", "user": "daq", "date": start}],
        "trigger": _TRIGGER,
        "reader": _READER,
        "processor": _PROCESSOR,
        "raw_size_byte": 30_000_000_000 + number,
        "data": [_entry(number, name, start, n) for n in range(copies)],
        **fields,
    }


def _entry(number: int, name: str, start: datetime, n: int) -> dict[str, Any]:
    host, version = HOSTS[n % len(HOSTS)], n // len(HOSTS)
    kind = {"type": "processed", "pax_version": f"v{version}"} if version else {"type": "raw"}
    return {
        **kind,
        "host": host,
        "status": "transferred",
        "status_since": start,
        "location": f"/data/{host}/raw/{name}",
        "checksum": f"{number * 1000 + n:0128x}",
        "manifest": f"{number * 1000 + n:064x}",
        "creation_time": start,
        "creation_place": host,
        "verified_at": start,
    }


# -- processes ------------------------------------------------------------------------------------


def cpu(pid: int) -> float:
    """The seconds of CPU that a process has used, of which /proc/PID/stat has the ticks."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def peak_mb(pid: int) -> float:
    """The largest memory that a process had."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1000


@frozen
class Ended:
    """A command that has ended: its times in seconds, its memory, its output's lines."""

    code: int
    seconds: float
    first: float
    peak_mb: float
    lines: int


@define(eq=False)
class Listener:
    """``caxev listen`` for a site, as a process; what its handlers note is in `out`."""

    site: str
    process: subprocess.Popen[bytes]
    out: Path
    log: Path
    metrics: int

    def noted(self, name: str) -> dict[int, float]:
        """When the handler of that name began, by the run's number."""
        rows = (line.split() for line in self.out.read_text().splitlines())
        return {int(row[1]): float(row[2]) for row in rows if len(row) == 3 and row[0] == name}

    def count(self, name: str) -> int:
        """How many reactions of that handler have begun."""
        return self.out.read_bytes().count(f"{name} ".encode())

    @property
    def changes(self) -> float:
        """How many changes it has read from the stream."""
        url = f"http://127.0.0.1:{self.metrics}/"
        text = urllib.request.urlopen(url, timeout=30).read().decode()
        rows = [line for line in text.splitlines() if line.startswith("caxev_changes_total{")]
        return sum(float(row.rpartition(" ")[2]) for row in rows)

    def stop(self, *, kill: bool = False) -> None:
        """Ask it to leave, or kill it; wait for its end."""
        if kill:
            self.process.kill()
        else:
            self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@define(eq=False)
class Ground:
    """A mongod, its runs, and the sites on this machine. Use it as a context manager."""

    directory: Path
    mongod: Cluster = field(init=False)
    client: MongoClient[dict[str, Any]] = field(init=False)
    name: str = "run"
    _started: int = 0

    def __enter__(self) -> Self:
        options = ("--wiredTigerCacheSizeGB=2", "--oplogSize=2048")
        self.mongod = Cluster(self.directory / "mongod", options=options)
        self.mongod.start()
        self.client = MongoClient(self.mongod.uri)
        (self.directory / "scale_handlers.py").write_text(HANDLERS)
        (self.directory / "sites.json").write_text(json.dumps(self._sites()))
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.mongod.stop()

    def _sites(self) -> list[dict[str, Any]]:
        def entry(name: str, **more: Any) -> dict[str, Any]:
            raw = self.directory / "data" / name / "raw"
            raw.mkdir(parents=True)
            state = str(self.directory / "state")
            usual: dict[str, Any] = {
                "hostname": "localhost",
                "method": "sftp",
                "state": state,
                "dir_raw": str(raw),
            }
            no_more = {"upload_options": None, "download_options": None}
            return {"name": name, **usual, **no_more, **more}

        others = [entry(name) for name in (DAQ, "chicago", "stockholm")]
        lngs = entry("lngs", upload_options=[TAPE], purge=30)
        idle = [entry(f"idle{n:02d}") for n in range(MOST_IDLE)]
        return [*others, lngs, {"name": TAPE, "method": "tsm"}, *idle]

    # -- the database -------------------------------------------------------------------------

    @property
    def database(self) -> Any:
        return self.client[self.name]

    @property
    def runs(self) -> Any:
        return self.database["runs_new"]

    @property
    def ledger(self) -> Any:
        return self.database["caxev_ledger"]

    @property
    def pid(self) -> int:
        """The process of the server."""
        process = self.mongod.members[0].process
        assert process is not None
        return process.pid

    def fill(self, count: int, copies: int = 5) -> None:
        """Replace all there is by so many runs."""
        self.client.drop_database(self.name)
        for start in range(0, count, AT_ONCE):
            some = range(start, min(start + AT_ONCE, count))
            self.runs.insert_many([run_document(n + 1, copies) for n in some], ordered=False)

    def forget(self) -> None:
        """Drop all that caxev has written beside the runs."""
        for name in self.database.list_collection_names():
            if name.startswith("caxev_"):
                self.database[name].drop()

    def numbers(self, count: int, skip: int = 0) -> dict[int, ObjectId]:
        """The ids of some runs, by their numbers."""
        found = self.runs.find({}, {"number": 1}).sort("_id", 1).skip(skip).limit(count)
        return {row["number"]: row["_id"] for row in found}

    def set_status(self, ids: Sequence[ObjectId], status: str, entry: int) -> None:
        """Give an entry of many runs another status, in bulk."""
        for start in range(0, len(ids), AT_ONCE):
            some = self._read(ids[start : start + AT_ONCE])
            self.runs.bulk_write([_status(one, status, entry) for one in some], ordered=False)

    def _read(self, ids: Sequence[ObjectId]) -> list[Run]:
        return [Run.from_document(one) for one in self.runs.find({"_id": {"$in": list(ids)}})]

    def pace(self, ids: Sequence[ObjectId], status: str, entry: int, rate: float) -> None:
        """The same, so many a second."""
        runs, began = self._read(ids), time.monotonic()
        for n, one in enumerate(runs):
            time.sleep(max(began + n / rate - time.monotonic(), 0.0))
            self.runs.bulk_write([_status(one, status, entry)])

    def tag(self, ids: Sequence[ObjectId], name: str) -> None:
        """Tag many runs, in bulk."""
        change = {"$push": {"tags": {"name": name, "date": datetime.now(UTC)}}}
        for start in range(0, len(ids), AT_ONCE):
            some = ids[start : start + AT_ONCE]
            self.runs.bulk_write([UpdateOne({"_id": one}, change) for one in some], ordered=False)

    def cursor(self) -> float:
        """Seconds that a plain loop over the whole collection takes."""
        began = time.perf_counter()
        for _ in self.runs.find():
            pass
        return time.perf_counter() - began

    def drain(self, start: Any, count: int) -> float:
        """Seconds in which a bare loop with `updateLookup` reads so many changes."""
        began = time.perf_counter()
        with self.runs.watch(start_at_operation_time=start, full_document="updateLookup") as stream:
            for n, _ in enumerate(stream, 1):
                if n == count:
                    break
        return time.perf_counter() - began

    def now(self) -> Any:
        """The server's time, for a stream to start at."""
        return self.client.admin.command("hello")["operationTime"]

    def kept(self) -> tuple[int, int]:
        """How many documents caxev keeps beside the runs, and their bytes; not the sites' own."""
        pipeline = [
            {"$match": {"kind": {"$exists": False}}},
            {"$group": {"_id": None, "n": {"$sum": 1}, "b": {"$sum": {"$bsonSize": "$$ROOT"}}}},
        ]
        names = [one for one in self.database.list_collection_names() if one.startswith("caxev_")]
        rows = [row for name in names for row in self.database[name].aggregate(pipeline)]
        return sum(row["n"] for row in rows), sum(row["b"] for row in rows)

    # -- listeners and loops ------------------------------------------------------------------

    @property
    def environment(self) -> dict[str, str]:
        # Compiled once, as an installed caxev is, whatever the shell asks for.
        inherited = {**os.environ, "PYTHONPYCACHEPREFIX": str(self.directory / "bytecode")}
        inherited.pop("PYTHONDONTWRITEBYTECODE", None)
        return {
            **inherited,
            "CAXEV_MONGO_URI": self.mongod.uri,
            "CAXEV_DATABASE": self.name,
            "CAXEV_SITES": str(self.directory / "sites.json"),
        }

    def listen(self, site: str) -> Listener:
        """Start a listener; returns at once."""
        self._started += 1
        out = self.directory / f"{site}.{self._started}.out"
        out.touch()
        log = self.directory / f"{site}.log"
        metrics = free_port()  # nobody else's: several of these may run on one machine
        command = [sys.executable, "-m", "caxev", "--log-level", "warning", "listen"]
        command += ["--site", site, "--lease", LEASE, "--metrics-port", str(metrics)]
        command += ["--handlers", str(self.directory / "scale_handlers.py")]
        environment = {**self.environment, "SCALE_OUT": str(out)}
        with log.open("ab") as file:
            process = start_with_us(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment
            )
        return Listener(site, process, out, log, metrics)

    @contextmanager
    def listening(self, *sites: str) -> Iterator[list[Listener]]:
        """Listeners that have seen all runs and are at rest."""
        before = {site: self.epoch(site) for site in sites}
        listeners = [self.listen(site) for site in sites]
        try:
            for one in listeners:
                self.led(one, before[one.site])
            for one in listeners:
                self.seen(one)
            yield listeners
        finally:
            for one in listeners:
                one.process.terminate()
            for one in listeners:
                one.stop()

    def epoch(self, site: str) -> int:
        """How often the site's lease has been taken."""
        found = self.ledger.find_one({"_id": site}, {"epoch": 1})
        return int(found["epoch"]) if found else 0

    def scanned(self, site: str) -> Any:
        """When the site's last scan ended."""
        found = self.ledger.find_one({"_id": site}, {"scanned": 1})
        return None if found is None else found.get("scanned")

    def at_rest(self, site: str) -> bool:
        """Whether nothing is due or running at a site."""
        query: dict[str, Any] = {"site": site, "due": {"$lte": datetime.now(UTC)}}
        running: dict[str, Any] = {"state": "running", "epoch": {"$exists": True}}
        states: list[dict[str, Any]] = [{"state": "pending"}, running]
        return not any(self.ledger.find_one({**query, **state}, {"_id": 1}) for state in states)

    def led(self, listener: Listener, before: int) -> None:
        """Wait until a listener has the lease, of an epoch after that one."""
        self.until(lambda: self.epoch(listener.site) > before, listener)

    def noted(self, listener: Listener, name: str, number: int, every: float = 0.02) -> float:
        """Wait until a handler has begun to react to a run; return when."""
        self.until(lambda: number in listener.noted(name), listener, every)
        return listener.noted(name)[number]

    def seen(self, listener: Listener) -> None:
        """Wait until a listener has seen all runs, and done what is due."""
        self.until(lambda: self.scanned(listener.site) is not None, listener)
        self.until(lambda: self.at_rest(listener.site), listener, every=0.25)

    @staticmethod
    def until(condition: Any, listener: Listener, every: float = 0.02) -> None:
        """Wait for a condition, as long as the listener lives."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if listener.process.poll() is not None:
                raise RuntimeError(f"{listener.site} has ended: {listener.log.read_text()[-2000:]}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{listener.site} takes longer than {PATIENCE:.0f} s")
            time.sleep(every)

    @contextmanager
    def loops(self, kind: str, number: int) -> Iterator[list[subprocess.Popen[bytes]]]:
        """So many bare loops, each a process: `lookup`, `plain` or `filtered`."""
        command = [sys.executable, "-c", BARE, self.mongod.uri, self.name, kind]
        loops = [start_with_us(command, stdout=subprocess.PIPE) for _ in range(number)]
        try:
            for one in loops:
                assert one.stdout is not None
                assert one.stdout.readline() == b"ready\n"
            yield loops
        finally:
            for one in loops:
                one.kill()
                one.wait()
                if one.stdout is not None:
                    one.stdout.close()

    # -- commands -----------------------------------------------------------------------------

    def command(self, *arguments: str) -> Ended:
        """Run a caxev command to its end."""
        began = time.perf_counter()
        command = [sys.executable, "-m", "caxev", *arguments]
        with (self.directory / "command.err").open("wb") as errors:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, env=self.environment
            )
        with process, ThreadPoolExecutor(1) as pool:
            peak = pool.submit(_watched, process)
            assert process.stdout is not None
            lines = int(bool(process.stdout.readline()))
            first = time.perf_counter() - began
            while part := process.stdout.read(1 << 16):
                lines += part.count(b"\n")
            process.wait()
            seconds = time.perf_counter() - began
        if process.returncode not in {0, 1}:
            raise RuntimeError((self.directory / "command.err").read_text()[-2000:])
        return Ended(process.returncode, seconds, first, peak.result(), lines)


def _watched(process: subprocess.Popen[bytes]) -> float:
    """The peak memory of a process in MB, which is read until it ends."""
    # What wait4 returns is no less than what the parent had when it forked.
    peak = 0.0
    while process.returncode is None:
        with suppress(OSError, StopIteration):  # it is ending
            peak = max(peak, peak_mb(process.pid))
        time.sleep(0.02)
    return peak


def _status(run: Run, status: str, entry: int) -> UpdateOne:
    """The write by which a site changes the status of a copy."""
    update = RunUpdate.change_copy(run, run.copies[entry], status)
    query, change, array_filters = write_of(update, datetime.now(UTC))
    return UpdateOne(query, change, array_filters=[*(array_filters or ())])
