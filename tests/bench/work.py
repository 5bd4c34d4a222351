"""Several machines at one site: how fast a site fetches runs by its listener, and with helpers.

Each machine is a network namespace with a link of its own of 100 Mbit/s each way (`tc`, tbf;
``--rate`` sets another), over which it reaches the database and the source. The first is the site's
listener, all others help it. What is measured is the time from when the runs are known until the
last is there and verified, in bytes a second, beside that of one machine. Needs root. All machines
share this one's processors: if these are busy, only a slow link shows what helpers bring.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from attrs import frozen
from pymongo import MongoClient
from rich.console import Console
from rich.table import Table

from caxev.config import load_handlers
from caxev.config.handlers import DEFAULT_HANDLERS
from caxev.demo.world import World, end
from caxev.testing.mongod import start_with_us
from tests.bench.checksum import say
from tests.faults.campaign import new_world

RATE: Final = "100mbit"
"""Of each machine's link, as tc takes it."""
MACHINES: Final = (1, 2, 4)
SOURCE: Final = "lngs"
SITE: Final = "chicago"
SITES: Final[dict[str, dict[str, Any]]] = {
    SOURCE: {"upload_options": None},
    SITE: {"download_options": [SOURCE], "processing": None, "minitrees": None},
    "stockholm": {"download_options": None, "upload_options": None},
}
_CHUNK: Final = 1 << 18


@frozen
class Machine:
    """A network namespace, and the address at which it reaches this machine."""

    name: str
    host: str


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def machine(number: int, ports: Sequence[int], rate: str) -> Iterator[Machine]:
    """Make a namespace with a shaped link to these ports of this machine's loopback."""
    name, ours = f"caxev-{os.getpid()}-{number}", f"cx{os.getpid() % 100000}h{number}"
    theirs, net = f"cx{os.getpid() % 100000}n{number}", f"10.87.{number}"
    with ExitStack() as stack:
        _run("ip", "netns", "add", name)
        stack.callback(_run, "ip", "netns", "del", name)
        _run("ip", "link", "add", ours, "type", "veth", "peer", "name", theirs, "netns", name)
        _run("ip", "addr", "add", f"{net}.1/24", "dev", ours)
        _run("ip", "link", "set", ours, "up")
        within = ("ip", "-n", name)
        _run(*within, "addr", "add", f"{net}.2/24", "dev", theirs)
        _run(*within, "link", "set", theirs, "up")
        _run(*within, "link", "set", "lo", "up")
        shape = ("root", "tbf", "rate", rate, "burst", "128kb", "latency", "50ms")
        _run("tc", "qdisc", "add", "dev", ours, *shape)
        _run("tc", "-n", name, "qdisc", "add", "dev", theirs, *shape)
        relay = multiprocessing.get_context("fork").Process(
            target=_relay, args=(f"{net}.1", tuple(ports)), daemon=True
        )
        relay.start()
        stack.callback(relay.kill)
        yield Machine(name, f"{net}.1")


def _relay(host: str, ports: Sequence[int]) -> None:
    """Pass connections to ports of an address on to those of loopback, for ever."""
    threads = [threading.Thread(target=_listen, args=(host, port)) for port in ports]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _listen(host: str, port: int) -> None:
    with socket.create_server((host, port)) as server:
        while True:
            client = server.accept()[0]
            there = socket.create_connection(("127.0.0.1", port))
            for ends in ((client, there), (there, client)):
                threading.Thread(target=_pump, args=ends, daemon=True).start()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while some := source.recv(_CHUNK):
            target.sendall(some)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def port_of(uri: str) -> int:
    """Return the port in a database's address."""
    return int(uri.partition("://")[2].partition("/")[0].rpartition(":")[2])


def sites_for(world: World, one: Machine) -> Path:
    """Write a sites.json in which the source is where this machine reaches it."""
    document = json.loads((world.directory / "sites.json").read_text())
    entries = document if isinstance(document, list) else document["sites"]
    known = (world.directory / "keys" / "known_hosts").read_text()
    hosts = world.directory / f"{one.name}.known_hosts"
    hosts.write_text(known.replace("127.0.0.1", one.host))
    for entry in entries:
        entry.update(known_hosts=str(hosts), state=str(world.directory / one.name))
        if entry["name"] != SITE:
            entry["hostname"] = one.host
    path = world.directory / f"{one.name}.json"
    path.write_text(json.dumps(document))
    return path


def start(world: World, one: Machine, *command: str) -> subprocess.Popen[bytes]:
    """Start a command of caxev on a machine."""
    uri = f"mongodb://{one.host}:{port_of(world.mongod.uri)}/?directConnection=true"
    where = {"CAXEV_MONGO_URI": uri, "CAXEV_SITES": str(sites_for(world, one))}
    netns = ["/usr/bin/env", "ip", "netns", "exec", one.name, sys.executable, "-m", "caxev"]
    with (world.directory / f"{one.name}.log").open("wb") as log:
        return start_with_us(
            [*netns, *command, "--site", SITE],
            env={**os.environ, **where},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def measure(machines: int, runs: int, size: int, rate: str) -> float:
    """Return the seconds in which so many machines have fetched and verified so many runs."""
    with new_world(sites=SITES) as world, ExitStack() as stack:
        client = stack.enter_context(MongoClient[Mapping[str, Any]](world.mongod.uri))
        database = client[world.settings.database]
        stored, ledger = database[world.settings.collection], database["caxev_ledger"]
        world.listen(SOURCE)
        ports = [port_of(world.mongod.uri), world.sites.get(SOURCE).port]
        for number in range(1, machines + 1):
            one = stack.enter_context(machine(number, ports, rate))
            help_with = ("work", "--lane", "transfer", "--lane", "checksum")
            process = start(world, one, *(("listen",) if number == 1 else help_with))
            stack.callback(end, process)
        lead = {"_id": {"$in": [SOURCE, SITE]}, "scanned": {"$type": "date"}}
        wait(lambda: ledger.count_documents(lead) == 2)
        wait(lambda: _helpers(ledger) == machines - 1)
        time.sleep(5.0)  # they look for their disks
        taken = [world.take_run(SOURCE, number, size, number) for number in range(1, runs + 1)]
        began = time.monotonic()
        stored.insert_many(taken)
        there = {"data": {"$elemMatch": {"host": SITE, "status": "transferred"}}}
        wait(lambda: stored.count_documents(there) == runs)
        return time.monotonic() - began


def _helpers(ledger: Any) -> int:
    found: int = ledger.count_documents({"kind": "helper", "epoch": {"$gt": 0}})
    return found


def wait(condition: Any, within: float = 600.0) -> None:
    """Wait for a condition. Raises TimeoutError."""
    until = time.monotonic() + within
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError("it does not come")
        time.sleep(0.1)


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=24, help="runs that are fetched")
    parser.add_argument("--machines", type=int, nargs="+", default=MACHINES, help="how many")
    parser.add_argument("--rate", default=RATE, dest="link", help="of each machine's link")
    parser.add_argument("--size-mb", type=float, default=24.0, help="of each run")


def main(
    *, as_json: bool, quick: bool, runs: int, size_mb: float, link: str, machines: Sequence[int]
) -> None:
    load_handlers(default=DEFAULT_HANDLERS)
    if quick:
        runs, size_mb = 2, 1.0
    size, rows = int(size_mb * 1e6), list[dict[str, Any]]()
    for number in machines[: 2 if quick else None]:
        seconds = measure(number, runs, size, link)
        rate = runs * size / seconds / 1e6
        ratio = rate / rows[0]["mb_s"] if rows else 1.0
        rows.append({"machines": number, "seconds": seconds, "mb_s": rate, "ratio": ratio})
        say(f"{number} machines: {seconds:.1f} s, {rate:.1f} MB/s, {ratio:.2f} times one")
    table = Table("machines", "seconds", "MB/s", "times one")
    for row in rows:
        table.add_row(
            str(row["machines"]),
            f"{row['seconds']:.1f}",
            f"{row['mb_s']:.1f}",
            f"{row['ratio']:.2f}",
        )
    Console(stderr=True).print(table)
    if as_json:
        print(json.dumps({"rows": rows}))
