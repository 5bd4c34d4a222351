"""Everything that can happen to the database, under a load of changes and while copies move.

A replica set of three members, each behind a proxy that can cut the listeners (and nobody else)
off. In each round a run is taken and copied, runs are added at a steady rate, and one fault is
played and lifted. At the end each run has been reacted to once at each site, and no listener has
ended.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, Final

import trio
from attrs import define, field
from bson.timestamp import Timestamp
from pymongo import MongoClient
from pymongo.collection import Collection
from pymongo.errors import AutoReconnect, PyMongoError

from caxev.core.clock import utcnow
from tests.faults.campaign import PATIENCE, Born, Ground, Problem, Tally, say_round
from tests.faults.load import RATE, SHORT_RATE, Document, Load, in_turn
from tests.faults.proxy import Proxy
from tests.mongod import Cluster

SIZE: Final = 300_000
"""Bytes in a run."""
LATE: Final = 5.0
"""Seconds within which, in the median, the first reaction follows the database's return."""
_CAXEV: Final = b"application"
"""What only those say in greeting the server who name themselves, as caxev does."""
_OPTIONS: Final = (
    "--oplogSize=16",
    "--syncdelay=1",  # the oplog is cut behind the last checkpoint
    "--setParameter=enableTestCommands=1",  # for `failCommand`
)
_FAT: Final = {"fat": "x" * 500_000}
in_thread = trio.to_thread.run_sync


class Fronted(Cluster):
    """Three members, with a proxy before each."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, 3, _OPTIONS)
        self.proxies = tuple(Proxy(member.port, only=_CAXEV) for member in self.members)
        for member, proxy in zip(self.members, self.proxies, strict=True):
            member.front = proxy.port

    def stop(self) -> None:
        super().stop()
        for proxy in self.proxies:
            proxy.close()


@define(eq=False)
class Stage:
    """What a fault is played on."""

    ground: Ground
    mongod: Fronted
    client: MongoClient[Document]
    load: Load
    random: Random
    long: bool
    born: list[Born] = field(factory=list)

    @property
    def runs(self) -> Collection[Document]:
        return self.load.runs

    async def wait(self, least: float, most: float) -> None:
        """Let a fault last. In the short form: no longer than it must."""
        await trio.sleep(self.random.uniform(least, most) if self.long else least)

    @property
    def admin(self) -> Any:
        return self.client.admin

    async def primary(self) -> int:
        return await in_thread(self.mongod.primary)

    async def returned(self) -> float | None:
        """Wait until the load gets through; when it did, if anything was in its way."""
        done = len(self.load.added)
        with trio.fail_after(PATIENCE):
            while len(self.load.added) < done + 2:
                await trio.sleep(0.02)
        return self.load.returned


Fault = Callable[[Stage], Awaitable[float | None]]
"""Plays and lifts a fault; returns when the database was there again, None if it was all along."""

FAULTS: Final[dict[str, Fault]] = {}


def fault(function: Fault) -> Fault:
    FAULTS[function.__name__] = function
    return function


@fault
async def primary_killed(stage: Stage) -> float | None:
    """SIGKILL of the primary."""
    member = await stage.primary()
    stage.mongod.kill(member)
    back = await stage.returned()
    await stage.wait(0, 5)
    await in_thread(stage.mongod.restart, member)
    return back


@fault
async def stepdown(stage: Stage) -> float | None:
    """The primary steps down."""
    with suppress(AutoReconnect):
        await in_thread(lambda: stage.admin.command("replSetStepDown", 20, force=True))
    return await stage.returned()


@fault
async def member_away(stage: Stage) -> float | None:
    """A secondary is away for a while."""
    member = (await stage.primary() + 1) % 3
    stage.mongod.kill(member)
    await stage.wait(1, 8)
    await in_thread(stage.mongod.restart, member)
    return await stage.returned()


@fault
async def all_away(stage: Stage) -> float | None:
    """All members are killed, and stay away for up to a minute."""
    for member in range(3):
        stage.mongod.kill(member)
    await stage.wait(2, 60)
    for member in range(3):
        await in_thread(stage.mongod.restart, member)
    return await stage.returned()


@fault
async def frozen(stage: Stage) -> float | None:
    """The primary hangs, and comes to itself when there is another one."""
    member = stage.mongod.members[await stage.primary()]
    member.signal(signal.SIGSTOP)
    try:
        back = await stage.returned()
        await stage.wait(1, 20)
    finally:
        member.signal(signal.SIGCONT)
    return back


@fault
async def cut_off(stage: Stage) -> float | None:
    """Connections are reset, and new ones too."""
    for proxy in stage.mongod.proxies:
        proxy.cut()
    await stage.wait(2, 30)
    return _mended(stage)


@fault
async def silent(stage: Stage) -> float | None:
    """Nothing comes through any more, and nothing is closed."""
    for proxy in stage.mongod.proxies:
        proxy.stall()
    await stage.wait(2, 30)
    return _mended(stage)


def _mended(stage: Stage) -> float:
    for proxy in stage.mongod.proxies:
        proxy.repair()
    return time.time()


@fault
async def aborted(stage: Stage) -> float | None:
    """Transactions are aborted, and replies to commits are lost."""
    for name in ("killed", "TransientTransactionError", "closed"):
        if name == "killed":
            for _ in range(5):
                await in_thread(lambda: stage.admin.command("killAllSessions", []))
                await stage.wait(0.1, 0.3)
            continue
        data: Document = {"failCommands": ["commitTransaction", "update"], "appName": "caxev"}
        data |= (
            {"closeConnection": True}
            if name == "closed"
            else {"errorCode": 251, "errorLabels": [name]}
        )
        await in_thread(_fail_point, stage, {"times": 5}, data)
        await stage.wait(0.5, 1)
    return await stage.returned()


def _fail_point(stage: Stage, mode: Any, data: Document) -> None:
    command = {"configureFailPoint": "failCommand", "mode": mode, "data": data}
    with suppress(AutoReconnect):
        stage.admin.command(command)


@fault
async def dropped(stage: Stage) -> float | None:
    """The collection is dropped under the listeners, and made anew with other runs."""
    await _replaced(stage, stage.runs.drop)
    return None


@fault
async def renamed(stage: Stage) -> float | None:
    """The collection gets another name, and a new one with other runs takes its place."""
    aside = f"{stage.runs.name}_aside"
    await _replaced(stage, lambda: stage.runs.rename(aside, dropTarget=True))
    return None


async def _replaced(stage: Stage, end: Callable[[], object]) -> None:
    await _quiet(stage)
    await stage.ground.forget(stage.born)
    await in_thread(end)
    stage.load.added.clear()
    await stage.wait(0.5, 3)
    await in_thread(stage.runs.create_index, "tags.name")
    stage.load.go()
    stage.born = [await stage.ground.take(SIZE)]


async def _quiet(stage: Stage) -> None:
    """Wait until nothing moves: what is written to a collection that goes would go with it."""
    await stage.load.rest()
    await stage.load.counted(stage.ground)
    problems = await stage.ground.finish(stage.born, None)
    if problems:
        raise RuntimeError(f"it does not come to rest: {problems}")


@fault
async def rolled_over(stage: Stage) -> float | None:
    """A listener is killed, and the oplog no longer reaches back when it is started again."""
    site = stage.random.choice(stage.ground.world.listening)
    since = utcnow()
    listener = stage.ground.listeners[site]
    listener.signal(signal.SIGKILL)
    await in_thread(listener.process.wait)
    await in_thread(_roll, stage)
    await stage.ground.ready(stage.ground.listen(site))

    async def told() -> bool:
        return await _gaps(stage, site, since) > 0

    await stage.ground.until(told, f"{site} does not report the gap")
    await stage.load.rest()
    await stage.load.counted(stage.ground)
    stage.load.go()
    if (found := await _gaps(stage, site, since)) != 1:
        raise RuntimeError(f"{site} reports {found} gaps for one")
    return None


async def _gaps(stage: Stage, site: str, since: datetime) -> int:
    """How many gaps of history the site has reported since then."""
    record = await stage.ground.database.site_record(site)
    return 0 if record is None else sum(gap.found >= since for gap in record.gaps)


def _roll(stage: Stage) -> None:
    """Write until the oplog's first entry is later than what is its last one now."""
    oplog = stage.client.local["oplog.rs"]
    last: Timestamp = stage.client.admin.command("hello")["lastWrite"]["opTime"]["ts"]
    deadline = time.monotonic() + PATIENCE
    while oplog.find_one(sort=[("$natural", 1)])["ts"] <= last:  # type: ignore[index]
        if time.monotonic() > deadline:
            raise RuntimeError("the oplog does not roll over")
        stage.client["filler"]["fat"].insert_many([dict(_FAT) for _ in range(4)])
    stage.client.drop_database("filler")


# -- the campaign ---------------------------------------------------------------------------------


async def database(
    ground: Ground, *, rounds: int, seed: int, only: tuple[str, ...] = (), long: bool = True
) -> dict[str, Any]:
    """Play faults (`only` these, in this order again and again; else all, in a random order).

    Raises RuntimeError where a gap of history is not reported once.
    """
    mongod = ground.world.mongod
    assert isinstance(mongod, Fronted)
    random, tally = Random(seed), Tally(ground.compared)
    delays: list[float] = []
    settings = ground.world.settings
    await ground.gather()
    plain: MongoClient[Document] = MongoClient(
        mongod.uri, serverSelectionTimeoutMS=1000, socketTimeoutMS=2000, w="majority"
    )
    with plain as client:
        runs = client[settings.database][settings.collection]
        runs.create_index("tags.name")
        load = Load(runs, RATE if long else SHORT_RATE)
        stage = Stage(ground, mongod, client, load, random, long)
        with load.running():
            for name in in_turn(only or tuple(FAULTS), rounds, random, shuffled=not only):
                began = trio.current_time()
                problems, delay = await _round(stage, FAULTS[name])
                tally.add(problems)
                tally.faults += 1
                delays += [] if delay is None else [delay]
                told = "" if delay is None else f", first reactions {delay:.2f} s after its return"
                took = trio.current_time() - began
                say_round(f"{tally.rounds}. {name}{told}", problems, took)
    middle = round(median(delays), 2) if delays else None
    return {
        **tally.row(),
        "reaction_median_s": middle,
        "reaction_longest_s": round(max(delays), 2) if delays else None,
        "late": int(middle is not None and middle > LATE),
    }


async def _round(stage: Stage, play: Fault) -> tuple[list[Problem], float | None]:
    """Play a fault under load: what is wrong at the end, and how late the slowest site was."""
    ground, load = stage.ground, stage.load
    load.added.clear()
    load.returned = None
    load.go()
    stage.born = [await ground.take(SIZE)]
    await stage.wait(0.2, 2)
    back = await play(stage)
    delay = None
    if back is not None:
        delay = await _reacted(stage, back) - back
    await load.rest()
    await stage.load.counted(stage.ground)
    problems = await ground.finish(stage.born, None)
    problems += await stage.load.missing(ground)
    problems += ground.ended()
    await ground.ready(*ground.listeners.values())
    await ground.forget(stage.born)
    return problems, delay


async def _reacted(stage: Stage, back: float) -> float:
    """Wait until each site has reacted to something after that time; when the last one did."""
    at = datetime.fromtimestamp(back, UTC)
    times: dict[str, datetime] = {}

    def look() -> bool:
        for site in stage.ground.world.listening:
            tag = {"name": f"ticked-{site}", "date": {"$gte": at}}
            query = {"tags.name": tag["name"], "tags": {"$elemMatch": tag}}
            for one in stage.runs.find(query, {"tags": 1}, sort=[("_id", -1)]):
                dates = [tag["date"] for tag in one["tags"] if tag["name"] == f"ticked-{site}"]
                first = min(dates).replace(tzinfo=UTC)
                times[site] = min(times.get(site, first), first)
        return len(times) == len(stage.ground.world.listening)

    async def reacted() -> bool:
        with suppress(PyMongoError):
            return await in_thread(look)
        return False

    await stage.ground.until(reacted, "no site reacts any more")
    return max(time.timestamp() for time in times.values())
