"""Mixed load for an hour, with faults at random: at the end nothing has grown.

Runs are added at a steady rate, others are taken and copied, connections are cut, the database is
killed and started again, people ask for scans and replays. The listeners live through all of it.
What they hold when nothing moves is measured after the first rounds and at the end.
"""

from __future__ import annotations

import signal
from random import Random
from typing import Any, Final

import psutil
import trio
from attrs import asdict, frozen
from pymongo import MongoClient

from caxev.job import utcnow
from caxev.mongo import Request
from tests.faults.campaign import Ground, Tally, say, say_round
from tests.faults.load import Document, Load
from tests.faults.proxy import Proxy, front_ssh

SIZE: Final = 1_000_000
WARM: Final = 0.2
"""The share of the time after which what a listener holds is measured first."""
SPARE: Final = {"memory": 40 << 20, "descriptors": 12, "threads": 6, "processes": 0}
"""By how much the end may be above the start: pools of threads and connections fill slowly."""


@frozen
class Held:
    """What a listener and its workers hold: bytes, open files, threads, processes."""

    memory: int
    descriptors: int
    threads: int
    processes: int

    @classmethod
    def by(cls, process: int) -> Held:
        """Measure one; of its workers only how many there are, for they come and go."""
        one = psutil.Process(process)
        workers = len(one.children(recursive=True))
        return cls(one.memory_info().rss, one.num_fds(), one.num_threads(), workers)


async def soak(ground: Ground, *, seconds: float, seed: int, rounds: int = 0) -> dict[str, Any]:
    """Go on for so long, or for so many `rounds`; `late`: of what a listener holds more now."""
    random, tally = Random(seed), Tally(ground.compared)
    world = ground.world
    proxies = front_ssh(world)
    listeners = [ground.listen(site) for site in world.sites]
    await ground.ready(*listeners)
    began = trio.current_time()
    warm: dict[str, Held] = {}
    with MongoClient[Document](world.mongod.uri, serverSelectionTimeoutMS=1000) as client:
        load = Load(client[world.settings.database][world.settings.collection])
        with load.running():
            done = 0.0
            while done < 1 or not warm:
                if done >= WARM and not warm:
                    warm = {one.site: Held.by(one.pid) for one in listeners}
                await _round(ground, load, proxies, random, tally)
                passed = trio.current_time() - began
                done = tally.rounds / rounds if rounds else passed / seconds
    now = {one.site: Held.by(one.pid) for one in listeners}
    for proxy in proxies.values():
        proxy.close()
    grown = [
        f"{site}: {name} {before} -> {asdict(now[site])[name]}"
        for site in warm
        for name, before in asdict(warm[site]).items()
        if asdict(now[site])[name] > before + max(SPARE[name], 0.1 * before)
    ]
    for what in grown:
        say(f"    grown: {what}")
    debts = sum(sum(states.values()) for states in (await ground.database.tally()).values())
    held = {
        name: max(asdict(one)[name] - asdict(warm[site])[name] for site, one in now.items())
        for name in SPARE
    }
    per_run = round(debts / len(ground.compared), 2)
    more = {f"{name}_more": value for name, value in held.items()}
    return {**tally.row(), **more, "debts_per_run": per_run, "late": len(grown)}


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
        proxy.mend()


async def _database(ground: Ground, proxies: dict[str, Proxy], random: Random) -> None:
    del proxies
    ground.world.mongod.kill(0)
    await trio.sleep(random.uniform(0, 3))
    await trio.to_thread.run_sync(ground.world.mongod.restart, 0)


async def _frozen(ground: Ground, proxies: dict[str, Proxy], random: Random) -> None:
    del proxies
    member = ground.world.mongod.members[0]
    member.signal(signal.SIGSTOP)
    await trio.sleep(random.uniform(0, 2))
    member.signal(signal.SIGCONT)


async def _requests(ground: Ground, proxies: dict[str, Proxy], random: Random) -> None:
    del proxies, random
    for site in ground.world.sites:
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
