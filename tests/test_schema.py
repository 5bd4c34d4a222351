"""The schema of the ledger: an older caxev refuses a newer one's, a newer brings it up to date."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from click.testing import CliRunner
from pymongo import MongoClient
from pymongo.collection import Collection

from caxev.cli import cli
from caxev.core.clock import utcnow
from caxev.database import Database, Lease, WrongSchema, is_fatal, schema
from caxev.engine.listener import prepare
from tests import engine
from tests.conftest import Database as Named

pytestmark = pytest.mark.replicaset


@pytest.fixture
def ledger(database: Named) -> Iterator[Collection[Any]]:
    with MongoClient[Any](database.uri) as server:
        yield server[database.name]["caxev_ledger"]


def noted(ledger: Collection[Any]) -> Any:
    found = ledger.find_one({"_id": schema.KEY}) or {}
    return {name: value for name, value in found.items() if name not in ("_id", "kind")}


def become(ledger: Collection[Any], **values: object) -> None:
    ledger.replace_one({"_id": schema.KEY}, values, upsert=True)


async def take(db: Database, site: str = "lngs") -> Lease:
    taken = await db.acquire(site, "me", 60.0, utcnow())
    assert taken is not None
    return taken[0]


@pytest.fixture
def newer(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A caxev with schema 3, and the steps that it has made."""
    made: list[int] = []

    def step(number: int) -> Callable[[Any], Awaitable[None]]:
        async def note(ledger: Any) -> None:
            made.append(number)
            await ledger.update_one({"_id": "a document"}, {"$set": {"form": number}}, upsert=True)

        return note

    monkeypatch.setattr(schema, "SCHEMA", 3)
    monkeypatch.setattr(schema, "STEPS", {2: step(2), 3: step(3)})
    return made


async def test_an_older_caxev_refuses_the_ledger_of_a_newer(
    database: Named, ledger: Collection[Any]
) -> None:
    """At its start and, if it is running already, when it would take a lease."""
    async with engine.opened(database) as db:
        assert noted(ledger) == {"number": 1}
        become(ledger, number=2)
        for call in (lambda: prepare(db), db.migrate, lambda: take(db)):
            with pytest.raises(
                WrongSchema, match="has schema 2, and this caxev knows 1"
            ) as refused:
                await call()
            assert is_fatal(refused.value)
        assert noted(ledger) == {"number": 2}


@pytest.mark.parametrize("number", [2, "1", None])
def test_a_command_says_which_version_it_lacks(
    database: Named, ledger: Collection[Any], number: object
) -> None:
    """Exit code 4, and one line; the same if the number is none."""
    become(ledger, number=number)
    env = {"CAXEV_MONGO_URI": database.uri, "CAXEV_DATABASE": database.name}
    said = CliRunner().invoke(cli, ["runs"], env=env)
    assert said.exit_code == 4
    assert "install the version that the other sites have" in said.output


async def test_a_newer_caxev_brings_the_ledger_up_to_date(
    database: Named, ledger: Collection[Any], newer: list[int]
) -> None:
    """Each step once, in order."""
    async with engine.opened(database) as db:
        become(ledger, number=1)
        await prepare(db)
        await prepare(db)
        assert newer == [2, 3]
        assert noted(ledger) == {"number": 3}


async def test_a_new_ledger_needs_no_steps(
    database: Named, ledger: Collection[Any], newer: list[int]
) -> None:
    """It has the schema of the listener that begins it."""
    async with engine.opened(database):
        assert (newer, noted(ledger)) == ([], {"number": 3})


async def test_a_migration_that_was_cut_short_goes_on(
    database: Named, ledger: Collection[Any], newer: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From its first step on; meanwhile an older caxev is refused already."""
    async with engine.opened(database) as db:
        become(ledger, number=1)

        async def fail(_: Any) -> None:
            raise OSError("cut short")

        with monkeypatch.context() as broken:
            broken.setattr(schema, "STEPS", {**schema.STEPS, 3: fail})
            with pytest.raises(OSError, match="cut short"):
                await db.migrate()
        assert noted(ledger) == {"number": 3, "from": 1}
        with pytest.raises(WrongSchema, match="has schema 1 now, not 3"):
            await take(db)
        with monkeypatch.context() as older:
            older.setattr(schema, "SCHEMA", 2)
            with pytest.raises(WrongSchema, match="has schema 3"):
                await db.check()
        await db.migrate()
        assert newer == [2, 2, 3]
        assert noted(ledger) == {"number": 3}


async def test_nothing_is_migrated_while_an_older_caxev_listens(
    database: Named, ledger: Collection[Any], newer: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named, and the newer one leaves; one of the same schema is in nobody's way."""
    async with engine.opened(database) as db:
        become(ledger, number=1)
        with monkeypatch.context() as older:
            older.setattr(schema, "SCHEMA", 1)
            lease = await take(db, "chicago")
        with pytest.raises(WrongSchema, match="stop the listener of chicago first"):
            await prepare(db)
        assert (newer, noted(ledger)) == ([], {"number": 1})
        await db.release(lease)
        await db.migrate()
        assert newer == [2, 3]
        await take(db, "chicago")
        become(ledger, number=3, **{"from": 2})  # as if that one had been first
        await db.migrate()
        assert newer == [2, 3, 3]


async def test_nothing_is_migrated_beside_one_that_begins_just_now(
    database: Named, ledger: Collection[Any], newer: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older one that took its lease while the schema was noted is still waited for."""
    async with engine.opened(database) as db:
        become(ledger, number=1)
        note = db._note_schema
        expires = utcnow() + timedelta(seconds=50)
        begun = {"_id": "lngs", "kind": "site", "epoch": 1, "expires": expires, "lease": 60.0}

        async def beside(change: Any, number: object) -> None:
            ledger.insert_one(begun)
            await note(change, number)

        monkeypatch.setattr(db, "_note_schema", beside)
        with pytest.raises(WrongSchema, match="stop the listener of lngs"):
            await db.migrate()
        assert (newer, noted(ledger)) == ([], {"number": 3, "from": 1})


async def test_a_stand_by_notices_that_an_older_ledger_was_restored(
    database: Named, ledger: Collection[Any], newer: list[int]
) -> None:
    """It has the ledger migrated at its next start, and does not act on it before."""
    async with engine.opened(database) as db:
        await prepare(db)
        become(ledger, number=2)
        with pytest.raises(WrongSchema, match="has schema 2 now, not 3: start anew"):
            await take(db)
        await prepare(db)
        assert newer == [3]
