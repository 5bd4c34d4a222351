"""Back-ups of what only caxev has: complete, of one point in time, and never a reason to erase."""

from __future__ import annotations

import gzip
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from bson import encode
from click.testing import CliRunner, Result
from pymongo import MongoClient

from caxev.cli import cli
from caxev.cli.backup import _documents
from caxev.config import ConfigError
from caxev.core.model import DELETING, TRANSFERRED
from caxev.database.backup import LATER
from caxev.database.schema import SCHEMA
from caxev.files import process_lock
from tests import engine
from tests.conftest import Database as Named
from tests.test_life import HOSTS, Lab, lab

OWN: Final = ("caxev_ledger", "caxev_requests", "caxev_manifests", "caxev_history")


def command(database: Named, *words: str) -> Result:
    env = {"CAXEV_MONGO_URI": database.uri, "CAXEV_DATABASE": database.name}
    return CliRunner().invoke(cli, [*words], env=env)


async def given(database: Named, *words: str) -> Result:
    """The result of a command, which has an event loop of its own."""
    return await trio.to_thread.run_sync(lambda: command(database, *words))


def content(database: Named) -> dict[str, list[Any]]:
    with MongoClient[dict[str, Any]](database.uri) as server:
        return {one: list(server[database.name][one].find().sort("_id", 1)) for one in OWN}


@asynccontextmanager
async def listening(three: Lab, *hosts: str) -> AsyncIterator[None]:
    """Listeners of these sites for the length of the block."""
    async with AsyncExitStack() as stack:
        three.stack = stack
        await three.listen(*hosts)
        yield


async def scanned(three: Lab, hosts: tuple[str, ...]) -> None:
    """Wait until each site has compared all runs, and nothing is due or running."""

    async def is_so() -> bool:
        records = {one.site: one for one in await three.database.site_records()}
        tally = await three.database.tally()
        rows = [tally.get(host, {}) for host in hosts]
        calm = not any(row.get("running", 0) for row in rows)
        return calm and all(host in records and records[host].scanned for host in hosts)

    await three.until(is_so)


@pytest.mark.replicaset
async def test_what_was_backed_up_is_restored(database: Named, tmp_path: Path) -> None:
    """Every document, but that sites begin later and hold no lease; not over a ledger by itself."""
    file = tmp_path / "caxev.bak"
    async with lab(database, tmp_path) as three:
        await three.take("lngs", "chicago")
        async with listening(three, "lngs", "stockholm"):
            await scanned(three, ("lngs", "stockholm"))
            said = await given(database, "restore", str(file))
            assert said.exit_code == 2
            assert (await given(database, "backup", str(file))).exit_code == 0
            said = await given(database, "restore", str(file), "--force")
            assert said.exit_code == 4
            assert "a listener is active for" in said.output
        assert (file.stat().st_mode & 0o777, [*file.parent.glob(".*part")]) == (0o600, [])
        assert (await given(database, "backup", str(file))).exit_code == 0  # replaced
        before = content(database)
        said = await given(database, "restore", str(file))
        assert said.exit_code == 4
        assert "--force" in said.output
        assert content(database) == before

        with MongoClient[dict[str, Any]](database.uri) as server:
            for one in OWN:
                server[database.name].drop_collection(one)
        said = await given(database, "restore", str(file))
        assert said.exit_code == 0, said.output
        after = content(database)
        for one in OWN[1:]:
            assert after[one] == before[one]
        plain = [row for row in before["caxev_ledger"] if row.get("kind") != "site"]
        assert [row for row in after["caxev_ledger"] if row.get("kind") != "site"] == plain
        former = {row["_id"]: row for row in before["caxev_ledger"] if row.get("kind") == "site"}
        for row in (row for row in after["caxev_ledger"] if row.get("kind") == "site"):
            assert row["epoch"] == former[row["_id"]]["epoch"] + LATER
            assert not {"position", "expires", "owner"} & row.keys()


@pytest.mark.replicaset
async def test_a_backup_is_of_one_point_in_time(database: Named, tmp_path: Path) -> None:
    """Documents that are added in pairs while it reads are there in pairs."""
    file = tmp_path / "caxev.bak"
    with MongoClient[dict[str, Any]](database.uri) as server:
        ledger, history = (server[database.name][one] for one in (OWN[0], OWN[3]))
        ledger.insert_many([{"_id": f"filler {n}", "text": "x" * 1000} for n in range(5000)])
        history.insert_one({"_id": "first"})
        server[database.name][OWN[1]].insert_one({"_id": "first"})
        server[database.name][OWN[2]].insert_one({"_id": "first"})

        def write() -> None:
            with server.start_session() as session:
                for number in range(10_000):
                    if done.is_set():
                        return
                    with session.start_transaction():
                        ledger.insert_one({"_id": f"pair {number}"}, session=session)
                        history.insert_one({"_id": f"pair {number}"}, session=session)

        done = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, write)
            await engine.until(lambda: history.find_one({"_id": "pair 0"}))
            said = await given(database, "backup", str(file))
            done.set()
        assert said.exit_code == 0, said.output
        pairs = Counter(one["_id"] for _, one in _documents(file) if "pair" in str(one["_id"]))
        assert pairs
        assert set(pairs.values()) == {2}
        assert history.count_documents({}) > len(pairs) + 1  # it went on meanwhile


def cut(whole: bytes) -> bytes:
    return whole[: len(whole) // 2]


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"no gzip at all",
        gzip.compress(b""),
        gzip.compress(b"\x05\x00\x00\x00"),
        gzip.compress(encode({"caxev": 2})),
        gzip.compress(encode({"caxev": 1})),
        gzip.compress(encode({"caxev": 1}) + encode({"end": {"ledger": 1}})),
        gzip.compress(encode({"caxev": 1}) + encode({"collection": "users"}) + encode({})),
        gzip.compress(encode({"caxev": 1}) + encode({"collection": "ledger"})),
        cut(gzip.compress(encode({"caxev": 1, "x": "y" * 99}) + encode({"end": {}}))),
        gzip.compress(encode({"caxev": 1}) + encode({"end": {}}))[:-1],
        gzip.compress(encode({"caxev": 1}) + encode({"end": {}}) + encode({})),
    ],
    ids=[str(number) for number in range(12)],
)
def test_what_is_no_complete_backup_is_refused(damaged: bytes, tmp_path: Path) -> None:
    """Before anything is written; the message names the file."""
    file = tmp_path / "caxev.bak"
    file.write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"caxev\.bak is no complete back-up"):
        list(_documents(file))


def packed(*documents: dict[str, Any], **head: Any) -> bytes:
    """A back-up with these documents of the ledger."""
    rows = [row for one in documents for row in ({"collection": "ledger"}, one)]
    end = {"end": {"ledger": len(documents)}}
    return gzip.compress(b"".join(map(encode, [{"caxev": 1, **head}, *rows, end])))


@pytest.mark.replicaset
def test_a_backup_of_a_newer_schema_is_refused(database: Named, tmp_path: Path) -> None:
    """Else this version would replace the ledger by one that it refuses itself."""
    with MongoClient[dict[str, Any]](database.uri) as server:
        server[database.name][OWN[0]].insert_one({"_id": "kept"})
    before, file = content(database), tmp_path / "caxev.bak"
    schema = {"_id": {"schema": "ledger"}, "kind": "schema", "number": SCHEMA + 1}
    mine = {"database": database.name, "runs": "runs_new"}
    file.write_bytes(packed({"_id": "other"}, schema, version="9.9", **mine))
    said = command(database, "restore", str(file), "--force")
    assert said.exit_code == 4
    assert f"caxev.bak has schema {SCHEMA + 1}" in said.output
    assert "9.9" in said.output
    assert content(database) == before
    file.write_bytes(packed({"_id": "other"}, {**schema, "number": SCHEMA}, **mine))
    assert command(database, "restore", str(file), "--force").exit_code == 0
    assert content(database) != before


@pytest.mark.replicaset
def test_a_backup_of_another_database_replaces_nothing(database: Named, tmp_path: Path) -> None:
    """It goes into an empty ledger, as for a trial or after a renaming."""
    file = tmp_path / "caxev.bak"
    file.write_bytes(packed({"_id": "other"}, database="run", runs="runs_old"))
    assert command(database, "restore", str(file)).exit_code == 0
    before = content(database)
    said = command(database, "restore", str(file), "--force")
    assert said.exit_code == 3
    assert "is of run.runs_old" in said.output
    assert content(database) == before


def test_of_two_backups_to_one_file_one_is_refused(tmp_path: Path) -> None:
    """It would write what the other one renames; the file that is there stays."""
    file = tmp_path / "caxev.bak"
    file.write_bytes(b"old")
    with process_lock(b"backup " + bytes(file.resolve()), "busy"):
        (tmp_path / ".caxev.bak.part").write_bytes(b"half")
        said = CliRunner().invoke(cli, ["backup", str(file)])
    assert (said.exit_code, "another backup" in said.output) == (1, True)
    assert sorted(path.read_bytes() for path in tmp_path.iterdir()) == [b"half", b"old"]
    said = CliRunner().invoke(cli, ["backup", ""])
    assert (said.exit_code, "is empty" in said.output) == (2, True)


@pytest.mark.replicaset
def test_a_backup_takes_the_place_of_a_file_only(database: Named, tmp_path: Path) -> None:
    """Not of a device, such as /dev/null, and not of a link: the file is where that leads."""
    fifo, link, file = (tmp_path / name for name in ("fifo", "link", "file"))
    os.mkfifo(fifo)
    link.symlink_to(file)
    said = command(database, "backup", str(fifo))
    assert (said.exit_code, "is no regular file" in said.output) == (2, True)
    assert fifo.is_fifo()
    assert command(database, "backup", str(link)).exit_code == 0
    assert (link.is_symlink(), [*_documents(file)]) == (True, [])


# -- runs that are newer or older -----------------------------------------------------------------


async def in_deletion(three: Lab, *runs: Any) -> None:
    """Have copies at lngs be about to go."""
    for run in runs:
        await three.wants_gone(run, "lngs")
    async with listening(three, "lngs"):

        async def asked() -> bool:
            entries = [await three.entry_of(run, "chicago") for run in runs]
            return all(entry.get("check_asked") for entry in entries)

        await three.until(asked)


@pytest.mark.replicaset
async def test_runs_are_not_erased_by_a_ledger_of_another_time(
    database: Named, tmp_path: Path
) -> None:
    """If the runs are newer than the restored ledger, and if they are older.

    The deletion of the one was taken back, and its other copies are gone: the last one stays. Of
    the other the entries that the ledger knew are not there yet, nor is the deletion: no file goes.
    """
    file = tmp_path / "caxev.bak"
    async with lab(database, tmp_path) as three:
        newer, older = [await three.take(*HOSTS, number=number) for number in (1, 2)]
        with MongoClient[dict[str, Any]](database.uri) as server:
            runs = server[database.name]["runs_new"]
            entries = (runs.find_one(older) or {})["data"]
            (entry,) = (one for one in entries if one["host"] == "lngs")
            await in_deletion(three, newer, older)
            said = await given(database, "backup", str(file))
            assert said.exit_code == 0, said.output
            assert (await three.entry_of(newer, "lngs"))["status"] == DELETING
            runs.update_one(
                {"_id": newer, "data.host": "lngs"},
                {"$set": {"data.$.status": TRANSFERRED}, "$unset": {"data.$.deletion": ""}},
            )
            runs.update_one({"_id": newer}, {"$pull": {"data": {"host": {"$ne": "lngs"}}}})
            runs.update_one({"_id": older}, {"$set": {"data": [entry]}})
        said = await given(database, "restore", str(file), "--force")
        assert said.exit_code == 0, said.output
        async with listening(three, *HOSTS):
            await scanned(three, HOSTS)
            # The others lost their entries and make new ones: all of what is to happen has begun.
            await three.becomes(newer, "lngs", status=TRANSFERRED)
            await trio.sleep(3)
        assert three.path("lngs", 1).exists()
        assert all(three.path(host, 2).exists() for host in HOSTS)
        for run in (newer, older):
            assert (await three.entry_of(run, "lngs"))["status"] == TRANSFERRED
