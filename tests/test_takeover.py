"""Two listeners for one site, as real processes: one acts, whatever is done to it."""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import trio
from attrs import evolve
from pymongo import MongoClient

from caxev.config import ConfigError
from caxev.core.clock import utcnow
from caxev.core.ledger import Reaction
from caxev.core.model import (
    YES,
    CopyKey,
    Event,
    Tag,
)
from caxev.database import Ingest
from caxev.demo.world import World
from caxev.files import PART_PREFIX
from caxev.testing.mongod import find_mongod
from tests import engine
from tests.conftest import Database as Named
from tests.faults.campaign import (
    BIRTH,
    TWO,
    Born,
    End,
    Ground,
    Listener,
    ground_in,
    new_world,
    raw_only,
)
from tests.faults.proxy import proxied
from tests.faults.takeover import SITE, epoch_of, new_epoch, pair, takeover

pytestmark = [
    pytest.mark.replicaset,
    pytest.mark.campaign,
    pytest.mark.xdist_group("takeover"),
]

LEASE = 6.0
# What the holder of a lease goes on writing while nothing happens.
_ALIVE = ("expires", "touched", "trouble", "skew", "position", "streamed", "disks", "seen")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A small collaboration for all tests here."""
    try:
        find_mongod()
    except ConfigError as error:
        pytest.skip(str(error))
    with new_world(sites=raw_only(TWO)) as world:
        yield world


def written(world: World) -> dict[str, list[dict[str, Any]]]:
    """Everything that stands in the database, but for signs of life."""
    with MongoClient[dict[str, Any]](world.mongod.uri) as client:
        database = client[world.settings.database]
        found = {name: list(database[name].find()) for name in database.list_collection_names()}
    for row in found[f"{world.settings.prefix}ledger"]:
        for name in _ALIVE if row.get("kind") in ("site", "process") else ():
            row.pop(name, None)
    return {name: sorted(rows, key=lambda row: str(row["_id"])) for name, rows in found.items()}


async def nap_of(ground: Ground, born: Born, site: str = SITE) -> Reaction | None:
    """The reaction of the handler that sleeps."""
    found = await engine.reactions(ground.database, site)
    return next((one for one in found if (one.run, one.handler) == (born.id, "nap")), None)


def napping(ground: Ground, born: Born, *states: str) -> Callable[[], Awaitable[bool]]:
    async def in_state() -> bool:
        reaction = await nap_of(ground, born)
        return reaction is not None and reaction.state.value in states

    return in_state


async def tags_of(ground: Ground, born: Born) -> list[str]:
    return list((await ground.database.runs([born.id]))[born.id].tags)


async def napper(ground: Ground, seconds: float) -> Born:
    """A run at whose tag a handler sleeps for so long."""
    return await ground.take(100_000, tags=[{"name": "nap"}], nap=seconds)


async def test_the_other_one_takes_over_within_the_lease(world: World) -> None:
    """One acts; when it is killed the other has the site before the lease has passed."""
    async with ground_in(world, lease_time=LEASE) as ground:
        figures = await takeover(ground, rounds=1, seed=1)
    # How late is the machine's matter: the long form of the campaign reports it.
    assert figures["lost"] == figures["duplicated"] == 0


async def test_a_leader_that_slept_through_its_lease_writes_nothing(world: World) -> None:
    """Stopped in mid-transfer and woken after the take-over, a process records nothing at all."""
    async with ground_in(world, lease_time=LEASE) as ground:
        leader, heir = await pair(ground)
        epoch = await epoch_of(ground)
        await ground.ready(ground.listen(BIRTH))
        # Its nap and its transfer are in flight when it stops.
        born = await ground.take(30_000_000, tags=[{"name": "nap"}], nap=4.0)
        await ground.until(napping(ground, born, "running"), "nobody naps")
        await ground.until(_claimed(ground, born), "nobody fetches")
        leader.signal(signal.SIGSTOP)
        assert await epoch_of(ground) == epoch
        await new_epoch(ground, epoch)
        await ground.ready(heir)
        await ground.until(napping(ground, born, "done"), "the nap is not over")
        end = _napped(ground)
        assert await ground.finish([born], end) == []
        before = await trio.to_thread.run_sync(written, world)
        leader.signal(signal.SIGCONT)
        await ground.until(_has_said(leader, "taken over chicago; standing by"), "it acts on")
        assert await trio.to_thread.run_sync(written, world) == before
        assert await ground.leading(heir)
        assert [
            reaction.epoch
            for reaction, _ in await ground.database.reactions(SITE)
            if reaction.epoch
        ] == []
        after = await ground.take(100_000)
        assert await ground.finish([after], None) == []


OTHER_MACHINE = """
from caxev import Job, on, tag
from caxev.engine import worker

far = (
    "import contextlib, fcntl, os, stat; from caxev.files import incoming; "
    "from caxev.transfer.ssh import landing; locked = fcntl.flock; "
    "is_file = lambda one: stat.S_ISREG(os.fstat(one).st_mode); "
    "fcntl.flock = lambda one, how: locked(one, how) if is_file(one) else None; "
    "incoming.process_lock = landing.process_lock = lambda *_: contextlib.nullcontext(); "
)
worker._BOOT = worker._BOOT.replace("main()", far + "main()")

@on(tag("nothing"))
async def nothing(job: Job) -> None:
    pass
"""
"""Of another machine on NFS only the locks on files count here."""


@pytest.mark.parametrize(("site", "made"), [(SITE, SITE), (BIRTH, "stockholm")])
async def test_two_that_make_one_copy_make_it_right(world: World, site: str, made: str) -> None:
    """Cut off from the database, a leader goes on with a transfer that its heir begins as well.

    One site pulls, and the other pushes by SFTP, which has no locks at all.
    """
    sites, far = world.directory / f"slow.{site}.json", world.directory / "far.py"
    entries = json.loads((world.directory / "sites.json").read_text())
    slow = [one | ({"max_rate": "1MB/s"} if one["name"] == site else {}) for one in entries]
    sites.write_text(json.dumps(slow))
    far.write_text(OTHER_MACHINE)
    async with ground_in(world, lease_time=LEASE) as ground:
        with proxied(world.settings.mongo_uri) as (proxy, uri):

            def listen(**environment: str) -> Listener:
                where = {"CAXEV_SITES": str(sites), **environment}
                return ground.listen(site, "--handlers", str(far), **where)

            leader = listen(CAXEV_MONGO_URI=uri)
            await ground.ready(leader)
            heir, epoch = listen(), await epoch_of(ground, site)
            await ground.until(_has_said(heir, "standing by"), "it does not stand by")
            others = [one for one in world.listening if one != site]
            await ground.ready(*[ground.listen(one) for one in others])
            # For longer than the heir takes to begin, if it is to meet the leader at that.
            born = await ground.take(50_000_000 if made == site else 20_000_000)
            await ground.until(_begun(world, made), "nobody copies")
            proxy.stall()
            await new_epoch(ground, epoch, site)
            await ground.ready(heir)
            assert await ground.finish([born], None) == []
            before = await trio.to_thread.run_sync(written, world)
            proxy.repair()
            await ground.until(_has_said(leader, f"taken over {site}; standing by"), "it acts on")
            assert await trio.to_thread.run_sync(written, world) == before
            if made == site:
                assert heir.said("is being written by another process")


def _napped(ground: Ground) -> End:
    """The end of a run at whose tag every site sleeps: each once."""
    tags = Counter(["nap", *(f"napped-{site}" for site in ground.world.listening)])
    return evolve(ground.wanted, tags=ground.wanted.tags + tags)


def _claimed(ground: Ground, born: Born) -> Callable[[], Awaitable[bool]]:
    async def claimed() -> bool:
        one = (await ground.database.runs([born.id]))[born.id]
        return one.copy(CopyKey("raw", SITE)) is not None

    return claimed


def _begun(world: World, site: str) -> Callable[[], Awaitable[bool]]:
    """Bytes arrive at a site: more than a claim, whose writer may not have its reply yet."""

    async def begun() -> bool:
        partials = (world.directory / site).rglob(f"{PART_PREFIX}*")
        return any(any(one.iterdir()) for one in partials)

    return begun


def _has_started(listener: Listener) -> Callable[[], Awaitable[bool]]:
    async def started() -> bool:
        return listener.log.exists()

    return started


def _has_said(listener: Listener, text: str) -> Callable[[], Awaitable[bool]]:
    async def said() -> bool:
        return listener.said(text)

    return said


@pytest.mark.parametrize("point", ["epoch", "claims"])
async def test_who_dies_taking_over_blocks_nobody(world: World, point: str) -> None:
    """Killed in the midst of taking over, a process holds the site no longer than its lease."""
    async with ground_in(world, lease_time=LEASE) as ground:
        doomed = ground.listen(SITE, CAXEV_CRASH=f"engine:database.takeover.{point}:1")

        async def dead() -> bool:
            return doomed.killed

        # Its epoch may be seen before the signal has done its work.
        await ground.until(dead, "it was not killed")
        heir = ground.listen(SITE)
        await ground.until(_has_started(heir), "it does not start")
        # A transaction left open would lock the site for a minute.
        await ground.until(lambda: ground.leading(heir), "the site is blocked", within=45.0)


async def test_only_stale_claims_are_opened(database: Named) -> None:
    """After a lost reply, what stands as claimed and is not running is open again, no more."""
    async with engine.opened(database) as db:
        taken = await db.acquire("lngs", "one", 60.0, utcnow())
        assert taken is not None
        lease = taken[0]
        reactions = [
            Reaction(
                "lngs",
                Event(1, Tag(name), None, YES),
                name,
                lane="a",
                generation=generation,
                at=utcnow(),
            )
            for generation, name in enumerate("xyz")
        ]
        await db.ingest(lease, Ingest({}, reactions), utcnow())
        assert len(await db.claim(reactions, lease)) == 3
        stale = [claim for claim in await db.claims(lease) if claim["_id"] != reactions[0].id]
        assert await db.free(stale) == (2, {})
        assert await db.free(stale) == (0, {})
        standing = await db.standing([reaction.id for reaction in reactions])
    assert [standing[reaction.id].state.value for reaction in reactions] == [
        "running",
        "pending",
        "pending",
    ]


async def test_asked_to_leave_it_ends_what_is_in_flight(world: World) -> None:
    """SIGTERM: a reaction that ends within the grace is settled, and the status is 0."""
    async with ground_in(world, lease_time=LEASE) as ground:
        listener = ground.listen(SITE, "--grace", "120")  # on a slow machine, too
        await ground.ready(listener)
        born = await napper(ground, 4.0)
        await ground.until(napping(ground, born, "running"), "nobody naps")
        await ground.stop(listener)
        assert listener.process.returncode == 0
        reaction = await nap_of(ground, born)
        assert reaction is not None
        assert (reaction.state.value, reaction.attempts) == ("done", 0)
        assert (await tags_of(ground, born)).count(f"napped-{SITE}") == 1
        record = await ground.database.site_record(SITE)
        assert record is not None
        assert not record.active


async def test_what_outlasts_the_grace_is_due_again(world: World) -> None:
    """SIGTERM: a reaction that is cut short is open, costs no attempt, and the status is 0."""
    async with ground_in(world, lease_time=LEASE) as ground:
        listener = ground.listen(SITE, "--grace", "0.5")
        await ground.ready(listener)
        born = await napper(ground, 10.0)
        await ground.until(napping(ground, born, "running"), "nobody naps")
        await ground.stop(listener)
        assert listener.process.returncode == 0
        reaction = await nap_of(ground, born)
        assert reaction is not None
        assert (reaction.state.value, reaction.attempts, reaction.interrupted) == ("pending", 0, 0)
        await ground.ready(ground.listen(SITE))
        await ground.until(napping(ground, born, "done"), "it is not done in the end")
        assert (await tags_of(ground, born)).count(f"napped-{SITE}") == 1


async def test_asked_twice_it_leaves_at_once(world: World) -> None:
    """A second SIGTERM: it is gone while the reaction still runs, which is due again afterwards."""
    async with ground_in(world, lease_time=LEASE) as ground:
        listener = ground.listen(SITE)
        await ground.ready(listener)
        born = await napper(ground, 15.0)
        await ground.until(napping(ground, born, "running"), "nobody naps")
        listener.signal(signal.SIGTERM)
        await ground.until(_has_said(listener, "finishing running reactions"), "it did not hear")
        listener.signal(signal.SIGTERM)
        status = await trio.to_thread.run_sync(listener.process.wait)
        assert status == 128 + signal.SIGTERM
        reaction = await nap_of(ground, born)
        assert reaction is not None
        assert reaction.state.value == "running"
        await ground.ready(ground.listen(SITE))

        async def interrupted() -> bool:
            again = await nap_of(ground, born)
            return again is not None and again.interrupted == 1

        await ground.until(interrupted, "it is not tried again")
        await ground.until(napping(ground, born, "done"), "it is not done in the end")
        assert (await tags_of(ground, born)).count(f"napped-{SITE}") == 1
