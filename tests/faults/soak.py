"""Mixed load for long, with faults at random: at the end nothing has grown.

Runs are added at a steady rate, others are taken and copied, connections are cut, the database is
killed and started again, people ask for scans and replays. The listeners live through all of it.
What they hold when nothing moves is measured after the first rounds and at the end.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from random import Random
from typing import Any, Final
from urllib.request import urlopen

import psutil
import trio
from attrs import asdict, astuple, frozen
from prometheus_client.parser import text_string_to_metric_families
from pymongo import MongoClient
from pymongo.collection import Collection

from caxev.core.clock import utcnow
from caxev.database import Request
from tests.faults.campaign import Ground, Listener, Tally, say, say_round
from tests.faults.load import RATE, SHORT_RATE, Document, Load
from tests.faults.proxy import Proxy, front_ssh
from tests.mongod import Cluster
from tests.sshd import free_port

SIZE: Final = 1_000_000
WARM: Final = 0.4
"""The share of the time after which what a listener holds is measured first."""
LOOKS: Final = 5
"""How often it is measured then, half a second apart: the least is what it holds at rest."""


@frozen
class Held:
    """What a listener holds at rest.

    Bytes, open files, threads, tasks; its worker processes, which come and go; how many entries of
    the ledger there are for a run (`_ledger_per_run`).
    """

    memory: int
    descriptors: int
    threads: int
    tasks: int
    workers: int
    ledger_per_run: float

    @classmethod
    def by(cls, process: int, metrics_port: int, ledger_per_run: float) -> Held:
        """Measure one. Blocks."""
        one = psutil.Process(process)
        workers = len(one.children(recursive=True))
        tasks = _tasks(metrics_port)
        memory = one.memory_info().rss
        return cls(memory, one.num_fds(), one.num_threads(), tasks, workers, ledger_per_run)

    @classmethod
    def least(cls, looks: Iterable[Held]) -> Held:
        """Return the least of each figure."""
        return cls(*map(min, zip(*map(astuple, looks), strict=True)))


SPARE: Final = Held(12 << 20, 4, 3, 2, 0, 0.1)
"""By how much the end may be above the start: pools of threads and connections fill slowly."""


def grown(before: Held, after: Held) -> Iterator[str]:
    """Say what a listener holds more of than it may. Pure."""
    for name, spare in asdict(SPARE).items():
        was, now = getattr(before, name), getattr(after, name)
        if now > was + spare:
            yield f"{name} {was} -> {now}"


def _tasks(metrics_port: int) -> int:
    with urlopen(f"http://127.0.0.1:{metrics_port}/metrics") as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    (sample,) = (
        one for family in families if family.name == "caxev_tasks" for one in family.samples
    )
    return int(sample.value)


async def soak(ground: Ground, *, seconds: float, seed: int, rounds: int = 0) -> dict[str, Any]:
    """Go on for so long, or for so many `rounds`; `grown`: of what a listener holds too much."""
    random, tally = Random(seed), Tally(ground.compared)
    world = ground.world
    proxies = front_ssh(world)
    ports = {site: free_port() for site in world.listening}
    listeners = [ground.listen(site, "--metrics-port", str(ports[site])) for site in ports]
    await ground.ready(*listeners)
    began = trio.current_time()
    taken: list[dict[str, Held]] = []
    with MongoClient[Document](world.mongod.uri, serverSelectionTimeoutMS=1000) as client:
        runs = client[world.settings.database][world.settings.collection]
        load = Load(runs, SHORT_RATE if rounds else RATE)

        async def measured() -> dict[str, Held]:
            looks = [await trio.to_thread.run_sync(_look, runs, listeners, ports)]
            for _ in range(LOOKS - 1):
                await trio.sleep(0.5)
                looks.append(await trio.to_thread.run_sync(_look, runs, listeners, ports))
            # One that has ended is told as lost, and the one after it holds something else.
            return {site: Held.least(look[site] for look in looks) for site in looks[-1]}

        with load.running():
            done = 0.0
            while done < 1 or len(taken) < 2:
                await _round(ground, load, proxies, random, tally)
                passed = trio.current_time() - began
                done = tally.rounds / rounds if rounds else passed / seconds
                if done >= (1 if taken else WARM):
                    taken.append(await measured())
    warm, now = taken
    for proxy in proxies.values():
        proxy.close()
    found = [f"{site}: {what}" for site in now for what in grown(warm[site], now[site])]
    for what in found:
        say(f"    grown: {what}")
    more = {
        f"{name}_more": round(max(getattr(now[s], name) - getattr(warm[s], name) for s in now), 2)
        for name in asdict(SPARE)
    }
    return {**tally.row(), **(more if now else {}), "grown": len(found)}


def _ledger_per_run(runs: Collection[Document]) -> float:
    """How many entries of the ledger there are for a run with copies, and for one without.

    Each for itself: how many there are of either is chance.
    """
    ledger = runs.database["caxev_ledger"]
    taken = [row["_id"] for row in runs.find({"data": {"$ne": []}}, {"_id": 1})]
    theirs = {"$or": [{"run": {"$in": taken}}, {"_id.r": {"$in": taken}}]}
    of_taken, others = ledger.count_documents(theirs), runs.count_documents({"data": []})
    rest = ledger.count_documents({}) - of_taken
    return of_taken / max(len(taken), 1) + rest / max(others, 1)


def _look(
    runs: Collection[Document], listeners: Sequence[Listener], ports: Mapping[str, int]
) -> dict[str, Held]:
    """Measure the listeners that live."""
    per_run = _ledger_per_run(runs)
    living = [one for one in listeners if one.process.poll() is None]
    return {one.site: Held.by(one.pid, ports[one.site], per_run) for one in living}


async def _round(
    ground: Ground, load: Load, proxies: dict[str, Proxy], random: Random, tally: Tally
) -> None:
    began = trio.current_time()
    load.added.clear()
    load.go()
    born = [await ground.take(SIZE) for _ in range(2)]
    what = random.choice(list(FAULTS))
    await trio.sleep(random.uniform(0, 2))
    await FAULTS[what](ground, proxies, random)
    await trio.sleep(random.uniform(0, 3))
    await load.rest()
    await load.counted(ground)
    problems = [*await ground.finish(born, None), *await load.missing(ground), *ground.ended()]
    await ground.forget(born)
    tally.add(problems)
    tally.faults += 1
    say_round(f"{tally.rounds}. {what}", problems, trio.current_time() - began)


async def _cut(ground: Ground, proxies: dict[str, Proxy], random: Random) -> None:
    del ground
    for proxy in proxies.values():
        proxy.cut()
    await trio.sleep(random.uniform(0, 2))
    for proxy in proxies.values():
        proxy.repair()


async def _database(ground: Ground, proxies: dict[str, Proxy], random: Random) -> None:
    del proxies
    _cluster(ground).kill(0)
    await trio.sleep(random.uniform(0, 3))
    await trio.to_thread.run_sync(_cluster(ground).restart, 0)


def _cluster(ground: Ground) -> Cluster:
    mongod = ground.world.mongod
    assert isinstance(mongod, Cluster)
    return mongod


async def _frozen(ground: Ground, proxies: dict[str, Proxy], random: Random) -> None:
    del proxies
    member = _cluster(ground).members[0]
    member.signal(signal.SIGSTOP)
    await trio.sleep(random.uniform(0, 2))
    member.signal(signal.SIGCONT)


async def _requests(ground: Ground, proxies: dict[str, Proxy], random: Random) -> None:
    del proxies, random
    for site in ground.world.listening:
        for request in (Request("scan"), Request("replay"), Request("retry")):
            await ground.database.add_request(site, request, "tests", utcnow())


async def _nothing(ground: Ground, proxies: dict[str, Proxy], random: Random) -> None:
    del ground, proxies, random


FAULTS: Final = {
    "cut": _cut,
    "database": _database,
    "frozen": _frozen,
    "requests": _requests,
    "nothing": _nothing,
}
