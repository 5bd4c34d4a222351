"""A listener inside the test's own process, on a real replica set."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import trio
from attrs import evolve
from bson import ObjectId
from pymongo import MongoClient

from caxev import aio
from caxev.config import Settings, Site, Sites
from caxev.core.history import HistoryRow
from caxev.core.ledger import Reaction, State
from caxev.core.registry import Handler, Registry, Trigger
from caxev.core.update import RunUpdate
from caxev.database import (
    Batch,
    Database,
    DatabaseError,
    HistorySearch,
    Stream,
    open_database,
)
from caxev.engine.leaving import Leaving
from caxev.engine.listener import prepare, serve_leases
from caxev.engine.options import Options
from caxev.engine.root_markers import holdings, init_roots
from tests.conftest import Database as Named

PATIENCE: Final = 240.0
"""Seconds to wait for what must come: a machine that is slow and busy has its time."""


def settings_for(database: Named) -> Settings:
    """As a site has them: its user may do what it is granted, and no more."""
    return Settings(mongo_uri=database.site_uri or database.uri, database=database.name)


def sites_of(*names: str) -> Sites:
    sites = {name: Site(name=name, method="sftp", hostname="localhost") for name in names}
    return Sites(Path("sites.json"), sites)


async def next_batch(db: Database, stream: Stream, wait: float) -> Batch:
    """Wait for a stream's next batch, which is empty after so many seconds."""
    return (await db.next_look(stream, "lngs", {}, wait=wait))[0]


def handler(function: Any, *triggers: Trigger, **options: Any) -> Handler:
    return Handler(function, triggers, **options)


@contextmanager
def short_transactions(database: Named) -> Iterator[None]:
    """Have the server give up at once what a process has begun that was killed in it.

    By itself it does so after a minute, for which the next process waits.
    """
    with MongoClient[dict[str, Any]](database.uri) as client:
        name = "transactionLifetimeLimitSeconds"
        usual = client.admin.command({"getParameter": 1, name: 1})[name]
        client.admin.command({"setParameter": 1, name: 1})
        try:
            yield
        finally:
            client.admin.command({"setParameter": 1, name: usual})


def run_document(number: int, *copies: tuple[str, str, str], **fields: Any) -> dict[str, Any]:
    """A run with copies given as (type, host, status)."""
    return {
        "_id": ObjectId(),
        "number": number,
        "name": f"161111_{number:04d}",
        "detector": "tpc",
        "start": datetime(2016, 11, 11, tzinfo=UTC),
        "tags": [],
        "data": [
            {"type": kind, "host": host, "status": status, "location": f"/data/{number}"}
            for kind, host, status in copies
        ],
        **fields,
    }


def options_for(
    database: Named,
    handlers: Iterable[Handler],
    *,
    site: str = "lngs",
    site_fields: Mapping[str, Any] | None = None,
    **options: Any,
) -> Options:
    known = {one.name: one for one in sites_of("lngs", "chicago", "stockholm").values()}
    known[site] = evolve(known[site], **(site_fields or {}))
    sites = Sites(Path("sites.json"), known)
    return Options(
        site=sites.get(site),
        sites=sites,
        settings=settings_for(database),
        registry=Registry(handlers, sites.here(site)),
        **{"lease_time": 3.0, "grace": 5.0, **options},
    )


@asynccontextmanager
async def opened(database: Named) -> AsyncIterator[Database]:
    """The database as its administrator sees it, for looking in and adding runs; with indexes."""
    settings = Settings(mongo_uri=database.uri, database=database.name)
    async with aio.loop(), open_database(settings) as db:
        await prepare(db)
        yield db


@asynccontextmanager
async def listener(
    database: Database, options: Options, owner: str = "test", *, marked: bool = True
) -> AsyncIterator[Leaving]:
    """A listener for the length of the block; asked to leave, and waited for, at its end.

    It has a connection of its own, as the user of its settings, unless `database` is that. The
    directories of its site are marked before, unless not `marked`: see `mark`.
    """
    leaving = Leaving()
    async with as_site(database, options) as own, trio.open_nursery() as nursery:
        if marked:
            await mark(own, options)
        nursery.start_soon(serve_leases, options, own, owner, leaving)
        try:
            yield leaving
        finally:
            leaving.asked.set()


async def once(database: Database, options: Options) -> None:
    """Catch up as a site's user, do what is due, leave."""
    async with as_site(database, options) as own:
        await mark(own, options)
        await serve_leases(evolve(options, once=True), own, "once", Leaving())


async def mark(database: Database, options: Options) -> None:
    """Mark the site's directories, as ``caxev sites init`` does: it refuses where copies lack."""

    async def marked() -> bool:
        with suppress(DatabaseError):  # as a listener, which tries until it answers
            await init_roots(database, options.site, options.sites, force=False)
            return True
        return False

    if holdings(options.site, options.sites):  # else it may be the database that is away
        await until(marked)


@asynccontextmanager
async def as_site(database: Database, options: Options) -> AsyncIterator[Database]:
    """The database as the site of these options reaches it."""
    if database.settings == options.settings:
        yield database
    else:
        async with open_database(options.settings) as own:
            yield own


async def until(condition: Callable[[], Any], *, within: float = PATIENCE) -> Any:
    """Wait for a condition (plain or async) to hold, and return what it returned.

    The longer it takes, the less often it is looked at: what waits takes little of the processor
    from what it waits for.
    """
    pause = 0.01
    with trio.fail_after(within):
        while True:
            result = condition()
            if hasattr(result, "__await__"):
                result = await result
            if result:
                return result
            await trio.sleep(pause)
            pause = min(1.3 * pause, 0.05)  # what is seen for a tenth of a second is not missed


async def write(database: Database, update: RunUpdate) -> None:
    assert await database.update_run(update, datetime.now(UTC)) is not None


async def reactions(database: Database, site: str = "lngs") -> list[Reaction]:
    """The latest reaction of each key: those that are owed, and those that did something."""
    # The ledger first: what is settled between the two is in both, and in neither if it came last.
    owed = [reaction for reaction, _ in await database.reactions(site)]
    search = HistorySearch(site=site)
    done = [row async for page in database.history_pages(search) for row in page]
    found = {one.id: one for one in map(_settled, reversed(done)) if one is not None}
    # A generation that is done is done, also if it was owed a moment ago.
    for reaction in owed:
        if reaction.id not in found or found[reaction.id].generation < reaction.generation:
            found[reaction.id] = reaction
    return [*found.values()]


def _settled(row: HistoryRow) -> Reaction | None:
    if row.event is None:
        return None
    generation = int(row.id.rpartition(":")[2], 16)
    lane = "unknown"
    made = Reaction(row.site, row.event, row.handler, lane=lane, generation=generation, at=row.at)
    return evolve(made, state=State.DONE, note=row.deed.reason, attempts=row.attempt - 1)
