"""The life of copies at three real sites: read again, judged, given up, and deleted with a proof.

Listeners inside the test's process, on a real database and real files; sites of method ``local``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import define

from caxev import DELETING, TRANSFERRED, TRANSFERRING, VERIFYING, Copy, CopyKey, Run, RunUpdate
from caxev.asking.vouching import again
from caxev.config import DEFAULT_HANDLERS, Deletion, Patrol, Site, Sites, Stalled, load_handlers
from caxev.copies.deletion import intent
from caxev.copies.retention import DeletionPlan, DeletionWish, plan
from caxev.copies.storage import same_bytes
from caxev.core.clock import utcnow
from caxev.core.ledger import Reaction, trigger_named
from caxev.core.model import Event
from caxev.core.registry import Registry, recorded
from caxev.database import Database, open_database
from caxev.database.reactions import reaction_document
from caxev.engine.options import Options
from caxev.engine.workers import Workers
from caxev.files import digest_tree
from caxev.files.erasing import QUARANTINE
from caxev.files.roots import MARKER_PREFIX
from tests import engine
from tests.conftest import Database as Named
from tests.faults.deletion import harm
from tests.places import vouched

pytestmark = pytest.mark.replicaset

HOSTS = ("lngs", "chicago", "stockholm")
OLD = timedelta(days=40)


@define
class Lab:
    """Three sites, their listeners, and the database."""

    root: Path
    named: Named
    sites: Sites
    database: Database
    stack: AsyncExitStack
    workers: Workers

    def path(self, host: str, number: int = 1) -> Path:
        return self.root / host / f"run{number}"

    async def listen(self, *hosts: str) -> None:
        """Start listeners; they end with the test."""
        for host in hosts:
            database = await self.stack.enter_async_context(
                open_database(engine.settings_for(self.named))
            )
            here = self.sites.here(host)
            ours = [one for one in recorded if one.module in DEFAULT_HANDLERS]
            options = Options(
                site=self.sites.get(host),
                sites=self.sites,
                settings=engine.settings_for(self.named),
                registry=Registry(ours, here),
                lease_time=10.0,
                grace=5.0,
                workers=self.workers,
            )
            await self.stack.enter_async_context(
                engine.listener(database, options, owner=f"test {host}")
            )

    async def take(self, *hosts: str, number: int = 1, **fields: Any) -> Any:
        """A run with good copies at these sites; its id."""
        entries = []
        for host in hosts:
            path = self.path(host, number)
            (path / "deep").mkdir(parents=True)
            for name, size in (("a.zip", 5000), ("deep/b.zip", 3000), ("pax_info.json", 10)):
                (path / name).write_bytes(bytes(index % 251 for index in range(size)))
            entries.append(await self.entry(host, number))
        document = engine.run_document(number)
        return await self.database.insert_run({**document, "data": entries, **fields})

    async def entry(self, host: str, number: int = 1, **fields: Any) -> dict[str, Any]:
        """What an entry says of the files as they are."""
        path = self.path(host, number)
        found = digest_tree(vouched(path), sha512=True, report=lambda _done, _total: None)
        await self.database.store_manifest(found.digest, found.to_rows())
        return {
            "type": "raw",
            "host": host,
            "status": TRANSFERRED,
            "location": str(path),
            "manifest": found.digest,
            "checksum": found.cax_checksum(),
            "verified_at": utcnow() - OLD,
            "verified_noted": utcnow(),
            "creation_time": utcnow() - OLD,
            **fields,
        }

    async def run(self, run: Any) -> Run:
        return (await self.database.runs([run]))[run]

    async def entry_of(self, run: Any, host: str) -> Mapping[str, Any]:
        copy = await self.copy(run, host)
        assert copy is not None
        return copy.fields

    async def copy(self, run: Any, host: str) -> Copy | None:
        return (await self.run(run)).copy(CopyKey("raw", host))

    async def note(self, run: Any, host: str, **fields: Any) -> None:
        now = await self.run(run)
        copy = now.copy(CopyKey("raw", host))
        assert copy is not None
        await engine.write(self.database, RunUpdate.note(now, copy, **fields))

    async def wants_gone(self, run: Any, host: str, keep: int = 2) -> None:
        """Ask for a copy's deletion, as a person does."""
        now, site = await self.run(run), self.sites.get(host)
        copy = now.copy(CopyKey("raw", host))
        assert copy is not None
        wanted = plan(now, DeletionWish(copy, "test", "asked", keep), site, self.sites, utcnow())
        assert isinstance(wanted, DeletionPlan), wanted
        await engine.write(self.database, intent(now, wanted, self.sites, utcnow()))

    async def until(self, condition: Callable[[], Awaitable[Any]]) -> Any:
        return await engine.until(condition)

    async def becomes(self, run: Any, host: str, **fields: Any) -> Copy:
        """Wait until the entry has these values."""

        async def is_so() -> Copy | None:
            copy = await self.copy(run, host)
            if copy is None:
                return None
            return copy if all(copy.fields.get(k) == v for k, v in fields.items()) else None

        found: Copy = await self.until(is_so)
        return found

    async def gone(self, run: Any, host: str) -> None:
        async def is_gone() -> bool:
            return await self.copy(run, host) is None

        await self.until(is_gone)

    async def settled(self) -> None:
        """Wait until nothing is owed but what waits for its time."""

        async def nothing() -> bool:
            soon = utcnow() + timedelta(minutes=5)
            reactions = [
                reaction
                for state in ("pending", "running")
                for reaction, _ in await self.database.reactions(state=state)
            ]
            return all(reaction.due > soon for reaction in reactions)

        await self.until(nothing)


@asynccontextmanager
async def lab(named: Named, root: Path, **keys: dict[str, Any]) -> AsyncIterator[Lab]:
    """Three sites in directories below `root`, with these keys."""
    load_handlers(default=DEFAULT_HANDLERS)
    sites = {}
    for host in HOSTS:
        (root / host).mkdir()
        others = tuple(other for other in HOSTS if other != host)
        usual = {"deletion": Deletion(copies=2), "download_options": others}
        fields = {"method": "local", "hostname": host, "dir_raw": str(root / host), **usual}
        sites[host] = Site(**{"name": host, **fields, **keys.get(host, {})})
    async with engine.opened(named) as database, Workers() as workers, AsyncExitStack() as stack:
        yield Lab(root, named, Sites(root / "sites.json", sites), database, stack, workers)


# -- deletion -------------------------------------------------------------------------------------


async def test_a_time_in_the_future_is_no_proof(database: Named, tmp_path: Path) -> None:
    """An entry says that a rotten copy was read next month: it is read now, and the other stays."""
    async with lab(database, tmp_path) as three:
        run = await three.take("lngs", "chicago")
        ahead = utcnow() + OLD
        times = {"verified_at": ahead, "check_asked": ahead, "check_answered": [str(ahead)]}
        await three.note(run, "chicago", **times)
        harm(three.path("chicago"))
        await three.wants_gone(run, "lngs", keep=1)
        await three.listen("lngs", "chicago")
        await three.becomes(run, "lngs", status=TRANSFERRED, deletion=None)
        assert three.path("lngs").exists()
        assert "fewer than 1 good copies" in (await three.entry_of(run, "lngs"))["withdrawn"]["why"]


async def test_two_that_ask_one_copy_are_both_answered(database: Named, tmp_path: Path) -> None:
    """Of two deletions that need the same third copy each finds its own request answered."""
    async with lab(database, tmp_path) as three:
        run = await three.take(*HOSTS)
        for host in ("lngs", "chicago"):
            await three.wants_gone(run, host, keep=1)
        await three.listen("lngs", "chicago")
        asking = [(await three.entry_of(run, host))["deletion"] for host in ("lngs", "chicago")]

        async def both_asked() -> bool:
            asked = (await three.entry_of(run, "stockholm")).get("check_asked", ())
            return {row["id"] for row in asked} == {one["request"] for one in asking}

        await three.until(both_asked)
        await three.listen("stockholm")
        for host in ("lngs", "chicago"):
            await three.gone(run, host)
        last = await three.copy(run, "stockholm")
        assert last is not None
        assert not last.pending
        assert last.answered >= {one["request"] for one in asking}


async def test_old_raw_data_goes_with_a_proof(database: Named, tmp_path: Path) -> None:
    """The others are read afresh, then the bytes go, then the entry; it is not fetched again."""
    async with lab(database, tmp_path, lngs={"purge": 1000.0}) as three:
        run = await three.take(*HOSTS)
        before = utcnow()
        aside = [tmp_path / "lngs" / name for name in (f"{QUARANTINE}/run1", ".caxev-moved-run1")]
        for path in aside:
            (path / "file").parent.mkdir(parents=True)
            (path / "file").touch()
        copy = await three.copy(run, "lngs")
        assert copy is not None
        left = {"quarantine": {"place": str(aside[0])}, "moved_from": str(aside[1])}
        update = RunUpdate.note(await three.run(run), copy, **left)
        await three.database.update_run(update, utcnow())
        await three.listen(*HOSTS)
        await three.gone(run, "lngs")
        await three.settled()
        after = await three.run(run)
        assert after.copy(CopyKey("raw", "lngs")) is None
        assert not three.path("lngs").exists()
        names = [one.name for one in (tmp_path / "lngs").rglob("*")]
        assert [name for name in names if not name.startswith(MARKER_PREFIX)] == [QUARANTINE]
        (stone,) = after.document["deleted_data"]
        assert (stone["host"], stone["by"]) == ("lngs", "lngs: purge")
        assert stone["why"] == "purge: older than 1000 days"
        assert {row["host"] for row in stone["proof"]} == {"chicago", "stockholm"}
        assert all(row["verified_at"].timestamp() >= before.timestamp() for row in stone["proof"])
        assert {copy.status for copy in after.copies} == {TRANSFERRED}
        assert three.path("chicago").exists()
        assert three.path("stockholm").exists()


async def test_what_another_run_s_entry_names_too_stays(database: Named, tmp_path: Path) -> None:
    """Where the files of two entries are the same, or one's within the other's, neither goes."""
    async with lab(database, tmp_path, lngs={"purge": 1000.0}) as three:
        runs = [await three.take(*HOSTS, number=number) for number in (1, 2, 3, 4, 5)]
        (tmp_path / "alias").symlink_to(tmp_path / "lngs")
        places = {1: "lngs/run1/", 2: "lngs/run2/deep", 4: "lngs/./run4", 5: "alias/run5"}
        for number, place in places.items():
            location = f"{tmp_path}/{place}"
            other = {"type": "raw", "host": "lngs", "status": "error", "location": location}
            document = {**engine.run_document(90 + number), "data": [other]}
            await three.database.insert_run(document)
        await three.listen(*HOSTS)
        await three.gone(runs[2], "lngs")

        for number in places:

            async def stays(number: int = number) -> Copy | None:
                copy = await three.copy(runs[number - 1], "lngs")
                return copy if copy and copy.fields.get("withdrawn") else None

            held: Copy = await three.until(stays)
            assert f"raw at lngs of run {90 + number}, too" in held.fields["withdrawn"]["why"]
            assert held.status == TRANSFERRED
            assert (three.path("lngs", number) / "a.zip").exists()


@pytest.mark.parametrize("how", ["hard links", "a linked root"])
async def test_two_names_of_the_same_files_are_one_copy(
    database: Named, tmp_path: Path, how: str
) -> None:
    """What would be left were two copies by name, and is one or none by its files."""
    async with lab(database, tmp_path, lngs={"purge": 1000.0}) as three:
        run = await three.take(*HOSTS)
        mine, other = three.path("lngs"), three.path("chicago")
        shutil.rmtree(other)
        if how == "hard links":
            shutil.copytree(mine, other, copy_function=os.link)
        else:
            other.parent.rmdir()
            other.parent.symlink_to(mine.parent)

        async def asks() -> bool:
            copy = await three.copy(run, "lngs")
            return copy is not None and copy.status == DELETING

        # Before the marker that both directories share is known, by which they would count as one.
        await three.listen("lngs")
        await three.until(asks)
        await three.listen(*HOSTS[1:])

        async def stays() -> Copy | None:
            copy = await three.copy(run, "lngs")
            return copy if copy and copy.fields.get("withdrawn") else None

        held: Copy = await three.until(stays)
        assert "chicago" in held.fields["withdrawn"]["why"]
        assert mine.exists()


async def test_of_two_sites_that_delete_one_may(database: Named, tmp_path: Path) -> None:
    """In each of 30 races for the third copy, both with the run as it was before."""
    async with lab(database, tmp_path) as three:
        usual = {"type": "raw", "status": TRANSFERRED, "manifest": "b3"}
        entries = [{**usual, "host": host, "location": str(three.path(host))} for host in HOSTS]
        won: list[str] = []

        async def ask(run: Run, host: str) -> None:
            copy, site = run.copy(CopyKey("raw", host)), three.sites.get(host)
            assert copy is not None
            wanted = plan(run, DeletionWish(copy, "test", "race", 2), site, three.sites, utcnow())
            assert isinstance(wanted, DeletionPlan)
            wish = intent(run, wanted, three.sites, utcnow())
            if await three.database.update_run(wish, utcnow()) is not None:
                won.append(host)

        for number in range(30):
            document = {**engine.run_document(number), "data": entries}
            run = await three.run(await three.database.insert_run(document))
            first, second = HOSTS[number % 3], HOSTS[(number + 1) % 3]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, run, first)
                nursery.start_soon(ask, run, second)
            after = await three.run(run.id)
            assert len(won) == number + 1
            assert sorted(one.status for one in after.copies) == [DELETING, *[TRANSFERRED] * 2]


async def test_a_rotten_copy_saves_another(database: Named, tmp_path: Path) -> None:
    """The reading for the proof finds it: the deletion is withdrawn, the rotten copy repaired."""
    async with lab(database, tmp_path) as three:
        run = await three.take(*HOSTS)
        harm(three.path("chicago"))
        await three.wants_gone(run, "lngs")
        await three.listen(*HOSTS)
        await three.becomes(run, "chicago", status=TRANSFERRED, repairs=1)
        copy = await three.becomes(run, "lngs", status=TRANSFERRED)
        await three.settled()
        assert "fewer than 2 good copies" in copy.fields["withdrawn"]["why"]
        files = [(three.path(host) / "a.zip").read_bytes() for host in HOSTS]
        assert files[0] == files[1] == files[2]
        assert "deleted_data" not in (await three.run(run)).document


async def test_the_oldest_goes_where_the_disk_is_full(
    database: Named, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than is lacking; the one that came last of those that may go stays.

    However many older ones may not: they are read a page at a time.
    """
    monkeypatch.setattr("caxev.database.run_queries.PAGE", 1)
    free = os.statvfs(tmp_path)
    rules = {
        # So much must stay free that one run has to go for the copy that is coming.
        "min_free": free.f_bavail * free.f_frsize - (1 << 40),
        "deletion": Deletion(copies=2, proof_days=99.0, when_full=True),
    }
    async with lab(database, tmp_path, lngs=rules) as three:
        coming = 1 << 50
        runs = [
            await three.take(*HOSTS, number=n, raw_size_byte=coming, start=utcnow() - n * OLD)
            for n in (1, 2)
        ]
        await three.take("lngs", number=4, raw_size_byte=coming, start=utcnow() - 4 * OLD)
        entry = await three.entry("chicago")
        new = engine.run_document(3)
        began = {**entry, "host": "lngs", "status": TRANSFERRING, "location": f"{tmp_path}/lngs/n"}
        await three.database.insert_run(
            {**new, "data": [began | {"status_since": utcnow()}], "raw_size_byte": coming}
        )
        await three.listen(*HOSTS)
        await three.gone(runs[1], "lngs")
        await three.settled()
        copy = await three.copy(runs[0], "lngs")
        assert copy is not None
        assert copy.status == TRANSFERRED
        (stone,) = (await three.run(runs[1])).document["deleted_data"]
        assert (stone["by"], stone["why"]) == ("lngs: make_room", "the disk is full")


async def test_where_data_is_born_the_oldest_goes_as_well(database: Named, tmp_path: Path) -> None:
    """The DAQ does not ask for room: what it has written fills the disk."""
    free = os.statvfs(tmp_path)
    rules = {
        "min_free": free.f_bavail * free.f_frsize + (1 << 40),
        "deletion": Deletion(copies=2, proof_days=99.0, when_full=True),
    }
    async with lab(database, tmp_path, lngs=rules) as three:
        sized = {"raw_size_byte": 1 << 50}
        runs = [
            await three.take(*HOSTS, number=n, start=utcnow() - n * OLD, **sized) for n in (1, 2)
        ]
        born = three.path("lngs", 3)
        born.mkdir()
        (born / "a.zip").write_bytes(bytes(1000))
        entry = {**await three.entry("lngs", 3), "status": VERIFYING, "status_since": utcnow()}
        await three.database.insert_run({**engine.run_document(3), "data": [entry]})
        await three.listen(*HOSTS)
        await three.gone(runs[1], "lngs")
        (stone,) = (await three.run(runs[1])).document["deleted_data"]
        assert stone["by"] == "lngs: make_room"


# -- reading again --------------------------------------------------------------------------------


async def test_the_patrol_finds_rot(database: Named, tmp_path: Path) -> None:
    """A copy that was not read for long is; a bad one is repaired, a good one waits again."""
    patrol = {"patrol": Patrol(days=30.0, max_rate=50e6)}
    async with lab(database, tmp_path, chicago=patrol, stockholm=patrol) as three:
        run = await three.take(*HOSTS)
        harm(three.path("chicago"))
        before = utcnow()
        await three.listen(*HOSTS)
        await three.becomes(run, "chicago", status=TRANSFERRED, repairs=1)

        async def was_read() -> bool:
            copy = await three.copy(run, "stockholm")
            return copy is not None and (copy.verified_at or before) > before

        async def waits_again() -> bool:
            reactions = await three.database.reactions(handler="patrol", state="pending")
            left = {reaction.site: reaction.due - utcnow() for reaction, _ in reactions}
            in_a_month = [timedelta(days=29) < one <= timedelta(days=30) for one in left.values()]
            return left.keys() == {"chicago", "stockholm"} and all(in_a_month)

        await three.until(was_read)
        await three.until(waits_again)
        lngs = await three.copy(run, "lngs")
        assert lngs is not None
        assert (lngs.verified_at or before) < before


# -- judgement ------------------------------------------------------------------------------------


async def record(three: Lab, run: Any, host: str) -> None:
    """Harm a copy, and have its entry say what it is then."""
    harm(three.path(host))
    said = await three.entry(host)
    await three.note(run, host, manifest=said["manifest"], checksum=said["checksum"])


async def test_a_bad_master_is_outvoted_and_mended(database: Named, tmp_path: Path) -> None:
    """Though its entry says what its bytes are; the good copies are not touched."""
    async with lab(database, tmp_path, lngs={"master": ("raw",)}) as three:
        run = await three.take(*HOSTS)
        good = (await three.entry("chicago"))["manifest"]
        await record(three, run, "lngs")
        await three.note(run, "chicago", check_asked=utcnow())
        await three.listen(*HOSTS)
        await three.becomes(run, "lngs", status=TRANSFERRED, repairs=1, manifest=good)
        await three.settled()
        after = await three.run(run)
        assert [copy.manifest for copy in after.copies] == [good] * 3
        assert all("repairs" not in copy.fields for copy in after.copies if copy.host != "lngs")
        assert "deleted_data" not in after.document


async def test_copies_of_cax_that_contradict_the_master(database: Named, tmp_path: Path) -> None:
    """Two that were compared with a bad master are acquitted, and it is repaired from them."""
    async with lab(database, tmp_path, lngs={"master": ("raw",)}) as three:
        run = await three.take(*HOSTS)
        await record(three, run, "lngs")
        now = await three.run(run)
        for host in ("chicago", "stockholm"):
            copy = now.copy(CopyKey("raw", host))
            assert copy is not None
            fields = {"checksum": None, "manifest": None, "verified_at": None}
            update = RunUpdate.change_copy(now, copy, "verifying", **fields)
            await engine.write(three.database, update)
            now = await three.run(run)
        await three.listen(*HOSTS)
        await three.becomes(run, "lngs", status=TRANSFERRED, repairs=1)
        for host in ("chicago", "stockholm"):
            await three.becomes(run, host, status=TRANSFERRED, checksumproblem=False)
        await three.settled()
        assert len({copy.manifest for copy in (await three.run(run)).copies}) == 1


async def test_without_a_majority_nothing_is_lost(database: Named, tmp_path: Path) -> None:
    """What differs from the master is set aside until a person vouches for a copy."""
    keys: dict[str, Any] = {"lngs": {"master": ("raw",)}, "chicago": {"quarantine_days": 99.0}}
    async with lab(database, tmp_path, **keys) as three:
        run = await three.take("lngs", "chicago")
        await record(three, run, "chicago")
        bad = (three.path("chicago") / "a.zip").read_bytes()
        await three.note(run, "lngs", check_asked=utcnow())
        await three.listen("lngs", "chicago")
        copy = await three.becomes(run, "chicago", status="error", disputed=None)
        assert "no majority" in copy.fields["error"]

        async def kept_at() -> str | None:
            copy = await three.copy(run, "chicago")
            return None if copy is None else copy.fields["quarantine"]["place"]

        kept = Path(await three.until(kept_at))
        await three.settled()
        assert (kept / "a.zip").read_bytes() == bad
        assert kept.parent == tmp_path / "chicago" / QUARANTINE
        assert not (three.path("chicago") / "a.zip").exists()
        assert (three.path("chicago") / "deep" / "b.zip").exists()
        lngs = await three.copy(run, "lngs")
        assert lngs is not None
        assert lngs.status == TRANSFERRED
        alarms = [one.alarm for one in await three.database.alarms() if one.active]
        hung = [alarm for alarm in alarms if alarm.key.startswith("no_majority")]
        assert hung
        assert all(" --type raw --site SITE;" in str(alarm.details) for alarm in hung)
        told = [alarm.site for alarm in hung]
        assert sorted(told) == sorted(set(told)), "one alarm at each site, not one for each copy"

        await three.note(run, "lngs", vouched={"by": "me", "at": utcnow()})
        now = await three.run(run)
        right = now.copy(CopyKey("raw", "lngs"))
        assert right is not None
        for update in again(now, right, same_bytes(three.sites), utcnow()):
            await engine.write(three.database, update)
        await three.becomes(run, "chicago", status=TRANSFERRED, repairs=1)
        good = (three.path("lngs") / "a.zip").read_bytes()
        assert (three.path("chicago") / "a.zip").read_bytes() == good


# -- stalled --------------------------------------------------------------------------------------


async def stalled_run(three: Lab, since: datetime, **fields: Any) -> Any:
    entry = {
        "type": "raw",
        "host": "chicago",
        "status": TRANSFERRING,
        "location": str(three.path("chicago")),
        "status_since": since,
        **fields,
    }
    run = await three.take("lngs")
    now = await three.run(run)
    await three.database.update_run(RunUpdate(run, add=entry), since)
    assert (await three.run(run)).copies != now.copies
    return run


async def test_what_a_dead_site_left_is_made_again(database: Named, tmp_path: Path) -> None:
    """Its owner's lease is gone and a day has passed: it is taken out, and fetched anew."""
    async with lab(database, tmp_path) as three:
        run = await stalled_run(three, utcnow() - OLD, owner="stockholm#3", trigger="other")
        await three.listen("chicago")
        copy = await three.becomes(run, "chicago", status=TRANSFERRED)
        assert copy.fields["trigger"] in {
            f"chicago: pull: raw at {host}" for host in ("chicago", "lngs")
        }


@pytest.mark.parametrize(("hours", "stays"), [(3.0, True), (30.0, False)])
async def test_an_entry_of_old_cax_goes_by_its_age(
    database: Named, tmp_path: Path, hours: float, *, stays: bool
) -> None:
    """It names no owner: after 2 h it is warned of, after 24 h made again."""
    async with lab(database, tmp_path) as three:
        run = await stalled_run(three, utcnow() - timedelta(hours=hours))
        await three.listen("chicago")
        if not stays:
            await three.becomes(run, "chicago", status=TRANSFERRED)
            return

        async def looked() -> Any:
            reactions = await three.database.reactions(
                "chicago", handler="stalled", state="pending"
            )
            return reactions and reactions[0][0].note

        assert await three.until(looked) == "it has been transferring for 3 h"
        copy = await three.becomes(run, "chicago", status=TRANSFERRING)
        (standing,) = await three.database.alarms("chicago")
        assert standing.over is None
        assert "has been transferring for 3 h" in standing.alarm.summary
        now = await three.run(run)
        await three.database.update_run(RunUpdate.remove_copy(now, copy), utcnow())

        async def over() -> Any:
            return all(one.over for one in await three.database.alarms("chicago"))

        await three.until(over)


@pytest.mark.parametrize("owed", [True, False])
async def test_a_live_transfer_is_never_given_up(
    database: Named, tmp_path: Path, *, owed: bool
) -> None:
    """However old: its owner acts for its site, and still owes the reaction that claimed it."""
    keys = {"chicago": {"stalled": Stalled(0.0, 0.0)}}
    async with lab(database, tmp_path, **keys) as three:
        await three.listen("stockholm")

        async def leads() -> Any:
            record = await three.database.site_record("stockholm")
            return record and record.active and record.epoch

        owner = f"stockholm#{await three.until(leads)}"
        aspect = CopyKey("raw", "lngs")
        trigger = trigger_named("stockholm", "push", aspect)
        run = await stalled_run(three, utcnow() - OLD, owner=owner, trigger=trigger)
        if owed:
            event = Event(run, aspect, None, TRANSFERRED)
            waits = Reaction(
                "stockholm", event, "push", lane="transfer", generation=1, at=utcnow() + OLD
            )
            row = {"_id": waits.id, **reaction_document(waits)}
            await three.database._call(three.database._ledger.insert_one, row)
        await three.listen("chicago")
        if not owed:
            await three.becomes(run, "chicago", status=TRANSFERRED)
            return

        async def looked() -> Any:
            reactions = await three.database.reactions(
                "chicago", handler="stalled", state="pending"
            )
            return reactions and reactions[0][0].note

        assert await three.until(looked) == "somebody is at work on it"
        await three.becomes(run, "chicago", status=TRANSFERRING, owner=owner)
