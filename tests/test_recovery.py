"""A listener through trouble: nothing is missed, nothing fires twice, one bad run stops nobody."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import trio
from attrs import evolve
from bson import ObjectId
from bson.datetime_ms import DatetimeMS
from bson.timestamp import Timestamp
from hypothesis import given
from hypothesis import strategies as st
from pymongo import MongoClient
from pymongo.synchronous.database import Database as MongoDatabase
from trio.testing import MockClock

from caxev import (
    ELSEWHERE,
    GONE,
    HERE,
    GiveUp,
    Job,
    Retry,
    RunUpdate,
    Skip,
    copy,
    copy_field,
    field,
    metrics,
    new_run,
    tag,
)
from caxev.asking.listeners import row_of
from caxev.config import Settings
from caxev.core.clock import utcnow
from caxev.core.history import What
from caxev.core.ledger import LONGEST_NOTE, Reaction
from caxev.core.model import CopyKey, Run
from caxev.database import (
    Batch,
    Database,
    DatabaseError,
    InvalidDocument,
    NotAuthorized,
    Position,
    Request,
    Scanning,
    SiteRecord,
    Stream,
    Unreachable,
)
from caxev.engine.context import Context
from caxev.engine.dispatcher import Dispatcher
from caxev.engine.lanes import Lane
from caxev.engine.options import Options
from caxev.engine.recorder import Ahead
from caxev.engine.recorder import Recorder as EngineRecorder
from caxev.engine.requests import Requests
from caxev.engine.shortcut import opened
from caxev.engine.watcher import PAGE_SIZE, SHOW_EVERY, ScanMeter, Watcher, next_page
from tests import engine
from tests.conftest import Database as Named
from tests.mongod import Cluster

pytestmark = pytest.mark.replicaset

SITE = "lngs"
Server = MongoDatabase[dict[str, Any]]


@pytest.fixture
def server(database: Named) -> Iterator[Server]:
    """The test's database as a plain client sees it."""
    with MongoClient[dict[str, Any]](database.uri) as client:
        yield client[database.name]


class Recorder:
    """A handler that notes each reaction."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str]] = []
        self.fails = False

    async def record(self, job: Job) -> None:
        self.seen.append((job.run.number or 0, str(job.event)))
        if self.fails:
            raise Retry("not yet")

    @property
    def numbers(self) -> Counter[int]:
        return Counter(number for number, _ in self.seen)

    def options(self, database: Named, **options: Any) -> Options:
        one = engine.handler(self.record, copy("transferred", host=HERE))
        return engine.options_for(database, [one], **options)


async def add(db: Database, *numbers: int, status: str = "transferred") -> list[Any]:
    return [
        await db.insert_run(engine.run_document(number, ("raw", SITE, status)))
        for number in numbers
    ]


async def go(db: Database, number: int = 1, *tags: str) -> Any:
    """Add a run with tags; `go` is what most handlers here wait for."""
    names = [{"name": name} for name in tags or ("go",)]
    return await db.insert_run(engine.run_document(number, tags=names))


async def record_of(db: Database) -> SiteRecord:
    record = await db.site_record(SITE)
    assert record is not None
    return record


async def reactions(db: Database, *states: str) -> list[Reaction]:
    """The reactions that are owed or did something, once they stand in these states."""

    async def found() -> tuple[list[Reaction]] | None:
        now = await engine.reactions(db, SITE)
        return (now,) if sorted(d.state.value for d in now) == sorted(states) else None

    (standing,) = await engine.until(found)
    return list(standing)


def lose(server: Server, position: dict[str, Any]) -> None:
    """Put another position in place of the site's."""
    assert server["caxev_ledger"].update_one({"_id": SITE}, {"$set": position}).matched_count


# -- history ----------------------------------------------------------------------------------


async def test_lost_history_is_made_up_for(database: Named, server: Server) -> None:
    """After a stop, what changed fires once although the position is unusable; the gap is told."""
    record = Recorder()
    async with engine.opened(database) as db:
        async with engine.listener(db, record.options(database)):
            await ready(db)
            ids = await add(db, 1, 2, 3)
            await engine.until(lambda: len(record.seen) == 3)
            await engine.until(lambda: _has_token(db))
        await add(db, 4, 5)
        server["runs_new"].update_one({"_id": ids[0]}, {"$set": {"data.0.status": "error"}})
        server["runs_new"].delete_one({"_id": ids[1]})
        lose(server, {"position.token._data": "zz"})
        async with engine.listener(db, record.options(database)):
            await engine.until(lambda: len(record.seen) == 5)
            await add(db, 6)
            await engine.until(lambda: len(record.seen) == 6)
        assert record.numbers == Counter(range(1, 7))
        (gap,) = (await record_of(db)).gaps
        assert gap.why
        assert (await db.page(SITE, None))[0].count(ids[1]) == 0


async def test_a_gap_is_told_once_however_often_it_is_made_up_for(
    database: Named, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scan that the database breaks off, and a beginning of it whose reply is lost: one gap.

    Metrics say since when there is trouble with the database, and of which kind.
    """
    record, begin = Recorder(), Database.begin_scan
    broken: list[float] = []
    sounded = metrics.gaps.labels(SITE)
    since, errors = metrics.troubled_since, metrics.database_errors.labels(SITE, "Unreachable")

    async def reply_lost(self: Database, *args: Any) -> None:
        await begin(self, *args)
        if len(broken) < 2:
            broken.append(since.labels(SITE)._value.get())
            raise Unreachable("the reply is lost")

    async with engine.opened(database) as db:
        async with engine.listener(db, record.options(database)):
            await ready(db)
            await add(db, 1)
            await engine.until(lambda: len(record.seen) == 1)
            await engine.until(lambda: _has_token(db))
        lose(server, {"position.token._data": "zz"})
        monkeypatch.setattr(Database, "begin_scan", reply_lost)
        before, waited_out, began = sounded._value.get(), errors._value.get(), time.time()
        async with engine.listener(db, record.options(database)):
            await add(db, 2)
            await engine.until(lambda: len(record.seen) == 2)
            await engine.until(lambda: len(broken) == 2)
            await add(db, 3)
            await engine.until(lambda: len(record.seen) == 3)
            await engine.until(lambda: since.labels(SITE)._value.get() == 0)
        assert len((await record_of(db)).gaps) == sounded._value.get() - before == 1
        assert broken[0] == 0
        assert began - 1 < broken[1] < time.time()
        assert errors._value.get() == waited_out + 2


async def test_a_new_change_is_served_while_all_runs_are_scanned(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fresh site reacts to today's run at once; what the scan brings later fires once."""
    record, page = Recorder(), Database.page
    go_on = trio.Event()

    async def slow(self: Database, *args: Any) -> Any:
        await go_on.wait()
        return await page(self, *args)

    monkeypatch.setattr(Database, "page", slow)
    async with engine.opened(database) as db:
        await add(db, 1, 2)
        async with engine.listener(db, record.options(database)):
            await engine.until(partial(_scanning, db))
            await add(db, 3)
            await engine.until(lambda: record.numbers == {3: 1})
            assert await _scanning(db)
            go_on.set()
            await engine.until(lambda: record.numbers == {1: 1, 2: 1, 3: 1})
            await engine.until(partial(_scanned, db))


async def test_a_new_change_is_served_while_the_stream_is_late(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was missed does not hold up what changes now; the stream brings that once more."""
    monkeypatch.setattr("caxev.engine.shortcut.BACKLOG", 2)
    monkeypatch.setattr("caxev.engine.shortcut.LATE", 0.0)
    record, take_in, open_stream = Recorder(), Watcher._take_in, Database.open_stream
    go_on, opened = trio.Event(), trio.Event()

    async def slow(self: Watcher, ahead: Ahead) -> None:
        await go_on.wait()
        await take_in(self, ahead)

    async def opening(self: Database, *args: Any) -> Stream:
        stream = await open_stream(self, *args)
        if not opened.is_set():
            opened.set()
            await add(db, 4)
        return stream

    async with engine.opened(database) as db:
        async with engine.listener(db, record.options(database)):
            await add(db, 1)
            await engine.until(lambda: record.numbers == {1: 1})
        await add(db, 2, 3)  # were missed
        monkeypatch.setattr(Watcher, "_take_in", slow)
        monkeypatch.setattr(Database, "open_stream", opening)
        async with engine.listener(db, record.options(database)):
            await engine.until(lambda: record.numbers == {1: 1, 4: 1})
            await add(db, 5)
            await engine.until(lambda: record.numbers == {1: 1, 4: 1, 5: 1})
            go_on.set()
            await engine.until(lambda: record.numbers == dict.fromkeys(range(1, 6), 1))
            await add(db, 6)
            await engine.until(lambda: record.numbers == dict.fromkeys(range(1, 7), 1))


async def test_a_new_change_is_served_while_the_stream_is_being_opened(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server reads past all that was written meanwhile before it answers."""
    monkeypatch.setattr("caxev.engine.shortcut.SLOW", 0.1)
    record, open_stream, reads_on = Recorder(), Database.open_stream, trio.Event()
    opening: list[int] = []

    async def slow(self: Database, *args: Any) -> Stream:
        opening.append(1)
        if len(opening) == 1:
            await reads_on.wait()
        return await open_stream(self, *args)

    async with engine.opened(database) as db:
        await engine.once(db, record.options(database))  # else a scan finds the run
        monkeypatch.setattr(Database, "open_stream", slow)
        async with engine.listener(db, record.options(database)):
            await engine.until(lambda: opening)
            await add(db, 1)
            await engine.until(lambda: record.numbers == {1: 1})
            reads_on.set()
            await add(db, 2)
            await engine.until(lambda: record.numbers == {1: 1, 2: 1})


async def _scanning(db: Database) -> bool:
    found = await db.site_record(SITE)
    return found is not None and found.scanning is not None


async def _scanned(db: Database) -> bool:
    found = await record_of(db)
    return found.scanned is not None and found.scanning is None


async def test_a_scan_that_was_begun_unheard_starts_with_the_newest_run(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scan before it does not note its place over that of the new one."""
    begin = Database.begin_scan

    async def unheard(self: Database, *args: Any) -> None:
        await begin(self, *args)
        raise Unreachable("no reply")

    async with recording(database, engine.options_for(database, [])) as (db, recorder, _, _):
        watcher = Watcher(recorder.context, recorder)
        await watcher.begin_scan()
        number = watcher._scans
        monkeypatch.setattr(Database, "begin_scan", unheard)
        with pytest.raises(Unreachable):
            await watcher.begin_scan(restart=True)
        assert not await watcher._note_scanned("a run", 1, number)
        assert (await record_of(db)).scanning == Scanning()


async def test_a_scan_goes_on_after_another_was_refused(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not only after a restart."""
    page = Database.page

    async def refuse(*_: Any) -> None:
        raise InvalidDocument("refused")

    async with recording(database, engine.options_for(database, [])) as (db, recorder, _, _):
        watcher = Watcher(recorder.context, recorder)

        async def meanwhile(self: Database, *args: Any) -> Any:
            monkeypatch.setattr(Database, "page", page)
            with monkeypatch.context() as refusing:
                refusing.setattr(Database, "begin_scan", refuse)
                with pytest.raises(InvalidDocument):
                    await watcher.begin_scan()
            return await page(self, *args)

        await add(db, 1, 2, 3)
        await watcher.begin_scan()
        monkeypatch.setattr(Database, "page", meanwhile)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watcher._scan_as_needed)
            await engine.until(lambda: _scanned(db))
            nursery.cancel_scope.cancel()


async def test_a_request_is_carried_out_once_although_it_cannot_be_removed(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is removed as soon as that works."""
    scans: list[int] = []

    async def scan() -> None:
        scans.append(1)

    async def unheard(*_: Any) -> None:
        raise Unreachable("no reply")

    async with recording(database, engine.options_for(database, [])) as (db, recorder, _, _):
        requests = Requests(recorder.context, recorder, scan)
        await db.add_request(SITE, Request("scan"), "me", utcnow())
        with monkeypatch.context() as lost:
            lost.setattr(Database, "finish_request", unheard)
            with pytest.raises(Unreachable):
                await requests.serve()
        await requests.serve()
        assert len(scans) == 1
        assert await db.next_request(SITE) is None


async def test_a_request_that_is_being_carried_out_is_not_taken_back(database: Named) -> None:
    """Else it would be shown as both cancelled and done."""
    withdrawn: list[int] = []
    cancelled = partial(row_of, what=What.CANCELLED, by="me")

    async with recording(database, engine.options_for(database, [])) as (db, recorder, _, _):

        async def scan() -> None:
            withdrawn.append(await db.take_back("many", utcnow(), cancelled))

        for _ in range(2):
            await db.add_request(SITE, Request("scan", bulk="many"), "me", utcnow())
        await Requests(recorder.context, recorder, scan).serve()
        assert withdrawn == [1], "only the second one, which nobody had begun"
        assert (await db.parts_of("many"))[1].number == 1


async def test_a_scan_that_is_begun_while_another_is_taken_up_starts_with_the_newest_run(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The place of the other one, read a moment before, does not count for the new one."""
    read = Database.site_record

    async with recording(database, engine.options_for(database, [])) as (db, recorder, _, _):
        watcher, lease = Watcher(recorder.context, recorder), recorder.context.lease
        runs = await add(db, 1, 2, 3)
        await watcher.begin_scan()
        await db.note_scanned(lease, Scanning(min(runs), 2))

        async def meanwhile(self: Database, site: str) -> SiteRecord | None:
            found = await read(self, site)
            monkeypatch.setattr(Database, "site_record", read)
            await watcher.begin_scan()
            return found

        monkeypatch.setattr(Database, "site_record", meanwhile)
        await watcher.continue_scan()
        assert (await record_of(db)).scanning == Scanning()


async def test_a_reload_while_the_stream_is_opened_opens_it_anew(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is opened for what concerned the site before."""
    open_stream = Database.open_stream

    async with recording(database, engine.options_for(database, [])) as (_, recorder, _, _):
        watcher = Watcher(recorder.context, recorder)
        await watcher.begin_scan(restart=True)

        async def meanwhile(self: Database, *args: Any) -> Stream:
            stream = await open_stream(self, *args)
            watcher.reopen()
            return stream

        monkeypatch.setattr(Database, "open_stream", meanwhile)
        with trio.fail_after(20):
            await watcher._follow()


async def test_a_scan_goes_on_where_it_was(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ends during it leaves a note; the next one reads no run twice."""
    monkeypatch.setattr("caxev.engine.watcher.FIRST_PAGE", 2)
    monkeypatch.setattr("caxev.engine.watcher.MOST_ON_PAGE", 2)
    record, page, pages = Recorder(), Database.page, list[Any]()

    async def counted(self: Database, *args: Any) -> Any:
        if len(pages) == 2:
            await trio.sleep_forever()
        pages.append(args[1])
        return await page(self, *args)

    monkeypatch.setattr(Database, "page", counted)
    async with engine.opened(database) as db:
        await add(db, *range(1, 8))
        async with engine.listener(db, record.options(database)):
            # The newest first: a site that starts reacts to the runs of today at once.
            await engine.until(lambda: record.numbers == dict.fromkeys(range(4, 8), 1))
        monkeypatch.setattr(Database, "page", page)
        seen, scanning = len(pages), (await record_of(db)).scanning
        async with engine.listener(db, record.options(database)):
            await engine.until(lambda: record.numbers == dict.fromkeys(range(1, 8), 1))
            await engine.until(partial(_scanned, db))
    assert seen == 2
    assert pages[0] is None
    assert scanning is not None
    assert scanning.runs == 4


async def test_a_scan_reads_few_large_runs_at_a_time(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes bound its pages and not only runs: two are in memory."""
    monkeypatch.setattr("caxev.engine.watcher.PAGE_SIZE", 50_000)
    monkeypatch.setattr("caxev.engine.watcher.FIRST_PAGE", 2)
    record, read_early, pages = Recorder(), EngineRecorder.read_early, list[int]()

    async def reading(self: EngineRecorder, runs: Sequence[Any]) -> Any:
        pages.append(len(runs))
        return await read_early(self, runs)

    monkeypatch.setattr(EngineRecorder, "read_early", reading)
    async with engine.opened(database) as db:
        copies = ("raw", SITE, "transferred")
        for number in range(1, 21):
            await db.insert_run(engine.run_document(number, copies, large="x" * 10_000))
        await engine.once(db, record.options(database))
    assert record.numbers == dict.fromkeys(range(1, 21), 1)
    assert max(pages) == 4


@given(st.integers(1, 1000), st.integers(0, 1 << 30))
def test_pages_of_a_scan_fit(runs: int, each: int) -> None:
    """After a page of runs like these, unless it is a single run."""
    found = next_page(runs, runs * each)
    assert 1 <= found <= 1000
    assert found == 1 or found * each <= PAGE_SIZE


def test_how_far_a_scan_is() -> None:
    """By the runs of this process; those that a former one scanned took no time."""

    async def main() -> None:
        meter = ScanMeter(total=1000, begun_with=400)
        await trio.sleep(SHOW_EVERY - 1)
        assert meter.line(450, trio.current_time()) is None
        await trio.sleep(31)
        line = meter.line(500, trio.current_time())
        assert line == "scanned 500 of about 1000 runs, 5 min left"
        assert meter.line(501, trio.current_time()) is None
        await trio.sleep(60)
        line = meter.line(1100, trio.current_time())
        assert line == "scanned 1100 of about 1100 runs, 0 min left"

    trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize(
    "error", [Unreachable("stepped down"), NotAuthorized("not allowed")], ids=type
)
@pytest.mark.parametrize("call", ["next_look", "next_request"])
async def test_once_waits_out_trouble_that_passes(
    database: Named, monkeypatch: pytest.MonkeyPatch, call: str, error: DatabaseError
) -> None:
    """`--once` goes on when the database answers again; the site is free, however it ends."""
    record, method = Recorder(), getattr(Database, call)
    failed: list[str] = []

    async def fails(self: Database, *args: Any, **more: Any) -> Any:
        if not failed:
            failed.append(call)
            raise error
        return await method(self, *args, **more)

    monkeypatch.setattr(Database, call, fails)
    async with engine.opened(database) as db:
        await add(db, 1)
        if isinstance(error, NotAuthorized):
            with pytest.RaisesGroup(NotAuthorized, flatten_subgroups=True):
                await engine.once(db, record.options(database))
        else:
            await engine.once(db, record.options(database))
            assert record.numbers == {1: 1}
        assert failed
        assert not (await record_of(db)).active


async def ready(db: Database) -> None:
    """Wait until the first scan is through: what comes from now on comes by the stream."""

    async def scanned() -> bool:
        record = await db.site_record(SITE)
        return record is not None and record.scanned is not None

    await engine.until(scanned)


async def _has_token(db: Database) -> bool:
    position = (await record_of(db)).position
    return position is not None and position.token is not None


async def test_an_oplog_that_rolled_over(tmp_path: Any) -> None:
    """The real thing: the oplog no longer reaches back to the position."""
    record = Recorder()
    options = ("--oplogSize=1", "--syncdelay=1")
    with Cluster(tmp_path, options=options) as replica_set:
        database = Named(replica_set.uri, "rolled")
        async with engine.opened(database) as db:
            async with engine.listener(db, record.options(database)):
                await ready(db)
                await add(db, 1)
                await engine.until(lambda: len(record.seen) == 1)
                await engine.until(lambda: _has_token(db))
            await add(db, 2)
            with MongoClient[dict[str, Any]](replica_set.uri) as client:
                await trio.to_thread.run_sync(_roll, client)
            async with engine.listener(db, record.options(database)):
                await engine.until(lambda: len(record.seen) == 2)
                await add(db, 3)
                await engine.until(lambda: len(record.seen) == 3)
            assert record.numbers == Counter([1, 2, 3])
            (gap,) = (await record_of(db)).gaps
            assert "286" in gap.why


def _roll(client: MongoClient[dict[str, Any]]) -> None:
    """Write until the oplog's first entry is another one."""
    oplog = client["local"]["oplog.rs"]
    oldest = oplog.find_one(sort=[("$natural", 1)])
    ballast = b"\0" * 1_000_000
    for _ in range(400):
        client["other"]["ballast"].replace_one({"_id": 1}, {"x": ballast}, upsert=True)
        now = oplog.find_one(sort=[("$natural", 1)])
        assert oldest is not None
        assert now is not None
        if now["ts"] > oldest["ts"] and _passed(client):
            return
    raise AssertionError("the oplog did not roll over")


def _passed(client: MongoClient[dict[str, Any]]) -> bool:
    site = client["rolled"]["caxev_ledger"].find_one({"_id": SITE})
    first = client["local"]["oplog.rs"].find_one(sort=[("$natural", 1)])
    assert site is not None
    assert first is not None
    token = site["position"]["token"]["_data"]
    return bool(first["ts"].time > int(token[2:10], 16))


@pytest.mark.parametrize("end", ["drop", "overwrite"])
async def test_a_collection_that_is_made_anew(database: Named, server: Server, end: str) -> None:
    """Dropped, or replaced by another, under a live listener: one gap, each run fires once."""
    record = Recorder()
    async with engine.opened(database) as db:
        async with engine.listener(db, record.options(database)):
            (kept, _) = await add(db, 1, 2)
            await engine.until(lambda: len(record.seen) == 2)
            documents = [
                {**engine.run_document(1, ("raw", SITE, "transferred")), "_id": kept},
                engine.run_document(3, ("raw", SITE, "transferred")),
            ]
            if end == "drop":
                server["runs_new"].drop()
                await engine.until(lambda: _gaps(db, 1))
                await engine.until(partial(_scanned, db))
                server["runs_new"].insert_many(documents)
            else:
                server["fresh"].insert_many(documents)
                server["fresh"].rename("runs_new", dropTarget=True)
            await engine.until(lambda: 3 in record.numbers)
            await add(db, 4)
            await engine.until(lambda: 4 in record.numbers)
        # Where the run was gone for a while, it came to that state once more.
        assert record.numbers == Counter({1: 2 if end == "drop" else 1, 2: 1, 3: 1, 4: 1})
        assert len((await record_of(db)).gaps) == 1


async def _gaps(db: Database, number: int) -> bool:
    return len((await record_of(db)).gaps) >= number


async def test_an_event_that_comes_twice_fires_once(database: Named, server: Server) -> None:
    """Started again from an older position, the stream repeats itself, and nothing fires."""
    record = Recorder()
    async with engine.opened(database) as db:
        start = await db.cluster_time()
        async with engine.listener(db, record.options(database)):
            await add(db, 1, 2)
            await engine.until(lambda: len(record.seen) == 2)
        older = {"token": None, "start": start}
        lose(server, {"position": older})
        async with engine.listener(db, record.options(database)):
            await add(db, 3)
            await engine.until(lambda: len(record.seen) == 3)
        assert record.numbers == Counter([1, 2, 3])


async def test_an_idle_streams_position_is_saved(
    database: Named, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing changes for the site the position moves on all the same, now and then."""
    monkeypatch.setattr("caxev.engine.watcher.SAVE_EVERY", 0.05)
    monkeypatch.setattr("caxev.engine.recorder.Recorder.read_ahead.__defaults__", (0.05,))
    record = Recorder()
    async with (
        engine.opened(database) as db,
        engine.listener(db, record.options(database)),
    ):
        await ready(db)
        await add(db, 1)
        await engine.until(lambda: len(record.seen) == 1)
        before = await record_of(db)

        async def moved() -> bool:
            # No change for us, but the server's time goes on.
            server["runs_new"].update_many({}, {"$inc": {"x": 1}})
            return (await record_of(db)).position != before.position

        await engine.until(moved)
        assert (await record_of(db)).position is not None


class Counting:
    """An intake that starts nothing and counts what was recorded."""

    def __init__(self) -> None:
        self.started: list[Reaction] = []

    def reserve(self, reactions: Sequence[Reaction]) -> list[Reaction]:
        return list(reactions)

    def start(self, reactions: Sequence[Reaction], runs: Mapping[Any, Run]) -> None:
        del runs
        self.started += reactions

    def cancel(self, reactions: Sequence[Reaction]) -> None:
        pass

    async def reconcile(self) -> None:
        pass

    def look_again(self) -> None:
        pass


async def test_a_change_from_the_future_is_reacted_to_now(database: Named) -> None:
    """A primary whose clock was ahead dated it: nothing waits until that time has come."""

    async def react(job: Job) -> None:
        """Wanted for every status."""

    options = engine.options_for(database, [engine.handler(react, copy("transferred"))])
    intake = Counting()
    async with engine.opened(database) as db:
        found = await db.acquire(SITE, "one", 60.0, Job.now())
        assert found is not None
        recorder = EngineRecorder(Context(db, found[0], options), intake)
        (run,) = await add(db, 1)
        await recorder.snapshot({run: Job.now() + timedelta(days=40)})
    assert [reaction.due <= Job.now() for reaction in intake.started] == [True]


async def test_a_scan_between_two_batches_fires_nothing_twice(
    database: Named, server: Server
) -> None:
    """What a scan recorded while a batch was looked at ahead is not news to that batch."""

    async def react(job: Job) -> None:
        """Wanted for every status."""

    statuses = ("transferred", "error", "verifying")
    options = engine.options_for(database, [engine.handler(react, copy(statuses))])
    intake = Counting()
    async with engine.opened(database) as db:
        found = await db.acquire(SITE, "one", 60.0, Job.now())
        assert found is not None
        recorder = EngineRecorder(Context(db, found[0], options), intake)
        (run,) = await add(db, 1)

        async def ahead() -> Ahead:
            batch = Batch({run: Job.now()}, Position(start=await db.cluster_time()), 1)
            return Ahead(batch, await recorder.read(batch.runs), recorder._turn)

        assert await recorder.record_batch(await ahead())
        server["runs_new"].update_one({}, {"$set": {"data.0.status": "error"}})
        late = await ahead()
        await recorder.snapshot({run: Job.now()})
        assert not await recorder.record_batch(late)
        server["runs_new"].update_one({}, {"$set": {"data.0.status": "verifying"}})
        assert await recorder.record_batch(await ahead())
    assert [reaction.event.status for reaction in intake.started] == [*statuses]


async def test_a_batch_that_was_read_ahead_is_compared_with_the_one_before(
    database: Named, server: Server
) -> None:
    """Also if that led to nothing and is recorded by then: a status that came back is news."""

    async def react(job: Job) -> None:
        """Wanted for one status."""

    options = engine.options_for(database, [engine.handler(react, copy("transferred"))])
    intake = Counting()
    async with engine.opened(database) as db:
        found = await db.acquire(SITE, "one", 60.0, Job.now())
        assert found is not None
        context = Context(db, found[0], options)
        recorder = EngineRecorder(context, intake)
        (run,) = await add(db, 1)
        await recorder.snapshot({run: Job.now()})
        async with opened(context, Position(start=await db.cluster_time())) as stream:

            async def ahead(status: str) -> Ahead:
                server["runs_new"].update_one({}, {"$set": {"data.0.status": status}})
                return await recorder.read_ahead(stream)

            one, two = await ahead("other"), await ahead("transferred")
            assert not await recorder.record_batch(one)
            await recorder.flush()
            assert await recorder.record_batch(two)
    assert len(intake.started) == 2


@asynccontextmanager
async def recording(
    database: Named, options: Options
) -> AsyncIterator[tuple[Database, EngineRecorder, Counting, Callable[[], Awaitable[Ahead]]]]:
    """A recorder, its intake, and what reads a batch of the one run ahead."""
    intake = Counting()
    async with engine.opened(database) as db:
        found = await db.acquire(SITE, "one", 60.0, Job.now())
        assert found is not None
        recorder = EngineRecorder(Context(db, found[0], options), intake)

        async def ahead() -> Ahead:
            runs, _ = await db.page(SITE, None)
            batch = Batch(
                dict.fromkeys(runs, Job.now()), Position(start=await db.cluster_time()), 1
            )
            return Ahead(batch, await recorder.read(runs), recorder._turn)

        yield db, recorder, intake, ahead


async def test_a_run_that_led_to_nothing_at_first_is_known_to_the_handlers(database: Named) -> None:
    """Else a replay would run again what its later changes led to."""

    async def react(job: Job) -> None:
        """Wanted for a status that comes later."""

    options = engine.options_for(database, [engine.handler(react, copy("transferred"))])
    async with recording(database, options) as (db, recorder, _, ahead):
        (run,) = await add(db, 1, status="verifying")
        assert not await recorder.record_batch(await ahead())
        await recorder.flush()
        assert await db.known_to(SITE, [run]) == {run: {"react"}}


async def test_however_many_runs_are_refused_all_are_known(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restart, too: else those beyond a page would be shown as failed for ever."""
    monkeypatch.setattr("caxev.database.reactions._AT_A_TIME", 2)
    monkeypatch.setattr(Database, "reactions", None)
    async with recording(database, engine.options_for(database, [])) as (db, recorder, _, _):
        runs = await add(db, 1, 2, 3)
        for run in runs:
            await recorder.unreadable.park(run, None, InvalidDocument("too large"))
        recorder.unreadable.runs = set()
        await recorder.unreadable.load()
        assert recorder.unreadable.runs == {*runs}


async def test_a_run_that_is_refused_is_parked_once(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it had led to nothing: it is not written again and again."""
    ingest = Database.ingest

    async def refused(self: Database, *args: Any) -> None:
        if args[1].snapshots:
            raise InvalidDocument("too large")
        await ingest(self, *args)

    async with recording(database, engine.options_for(database, [])) as (db, recorder, _, ahead):
        (run,) = await add(db, 1)
        assert not await recorder.record_batch(await ahead())
        monkeypatch.setattr(Database, "ingest", refused)
        await recorder.flush()
        assert recorder.unreadable.runs == {run}
        monkeypatch.setattr(Database, "ingest", None)
        await recorder.flush()


async def test_what_led_to_nothing_does_not_hide_what_was_recorded_unheard(
    database: Named, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reaction was recorded, the reply was lost, and the run is as before: that is an event."""

    async def react(job: Job) -> None:
        """Wanted for two statuses."""

    options = engine.options_for(database, [engine.handler(react, copy(("transferred", "error")))])
    ingest = Database.ingest

    async def unheard(self: Database, *args: Any) -> None:
        await ingest(self, *args)
        if args[1].reactions:
            raise Unreachable("no reply")

    async with recording(database, options) as (db, recorder, intake, ahead):
        await add(db, 1)
        assert await recorder.record_batch(await ahead())
        server["runs_new"].update_one({}, {"$push": {"tags": {"name": "of no interest"}}})
        assert not await recorder.record_batch(await ahead())
        server["runs_new"].update_one({}, {"$set": {"data.0.status": "error"}})
        second = await ahead()
        monkeypatch.setattr(Database, "ingest", unheard)
        with pytest.raises(Unreachable):
            await recorder.record_batch(second)
        monkeypatch.setattr(Database, "ingest", ingest)
        recorder.forget()
        server["runs_new"].update_one({}, {"$set": {"data.0.status": "transferred"}})
        assert await recorder.record_batch(await ahead())
    assert [reaction.event.status for reaction in intake.started] == ["transferred"] * 2


async def test_what_led_to_nothing_brings_no_lost_position_back(database: Named) -> None:
    """It is recorded after the stream has lost its history, and begins elsewhere."""
    start = Timestamp(1_600_000_000, 1)
    async with recording(database, engine.options_for(database, [])) as (db, recorder, _, ahead):
        await add(db, 1)
        assert not await recorder.record_batch(await ahead())
        recorder.forget()
        await db.begin_scan(recorder.context.lease, start, None)
        await recorder.flush()
        assert (await record_of(db)).position == Position(start=start)


async def test_what_a_scan_read_early_does_not_count_once_it_was_compared(
    database: Named, server: Server
) -> None:
    """Not even if it differed for a moment only, which led to nothing: no later change tells."""

    async def react(job: Job) -> None:
        """Wanted for every status."""

    options = engine.options_for(database, [engine.handler(react, copy(("transferred", "error")))])
    intake, update = Counting(), server["runs_new"].update_one
    async with engine.opened(database) as db:
        found = await db.acquire(SITE, "one", 60.0, Job.now())
        assert found is not None
        recorder = EngineRecorder(Context(db, found[0], options), intake)
        one, other, gone = await add(db, 1, 2, 3)
        await recorder.snapshot(dict.fromkeys((one, other, gone), Job.now()))
        update({"_id": one}, {"$set": {"data.0.status": "error"}})
        update({"_id": other}, {"$set": {"data.0.status": "error"}})
        reading = await recorder.read_early([one, other, gone])
        update({"_id": one}, {"$set": {"data.0.status": "transferred"}})
        server["runs_new"].delete_one({"_id": gone})
        await recorder.snapshot(dict.fromkeys((one, gone), Job.now()))
        await recorder.record_reading(reading)
        seen = (await recorder.read([one, other, gone])).before
        assert not recorder._readings
    started = [(one.run, one.event.status) for one in intake.started[3:]]
    assert started == [(other, "error")]
    assert [{*one.values()} for one in seen.values()] == [
        {"yes", "transferred@-"},
        {"yes", "error"},
    ]


async def test_what_arrived_long_ago_is_removed_daily(
    database: Named, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the daily scan, what nobody has gone on with is gone, and the listener goes on."""
    monkeypatch.setattr("caxev.engine.watcher.SCAN_EVERY", 0.1)
    monkeypatch.setattr("caxev.files.incoming.KEPT", -1.0)
    options = engine.options_for(database, [], site_fields={"state": str(tmp_path)})
    async with engine.opened(database) as db, engine.listener(db, options):
        incoming = tmp_path / SITE / "incoming"
        for name in ("one", "two"):
            (incoming / name).mkdir(parents=True)
            await engine.until(lambda: not list(incoming.iterdir()))


@pytest.mark.replicaset
async def test_a_scan_finds_what_the_stream_did_not_say(database: Named) -> None:
    """Asked for a scan, a listener that was moved past a change makes up for it, once."""
    record = Recorder()
    async with engine.opened(database) as db:
        async with engine.listener(db, record.options(database)):
            await add(db, 1)
            await engine.until(lambda: len(record.seen) == 1)
        await add(db, 2)
        found = await db.acquire(SITE, "other", 0.0, Job.now())
        assert found is not None
        await db.save_position(found[0], Position(start=await db.cluster_time()), Job.now())
        async with engine.listener(db, record.options(database)):
            await add(db, 3)
            await engine.until(lambda: len(record.seen) == 2)
            for _ in range(2):
                await db.add_request(SITE, Request("scan"), "me", Job.now())
                await engine.until(lambda: _served(db))
            await engine.until(lambda: len(record.seen) == 3)
        assert record.numbers == Counter([1, 2, 3])


async def _served(db: Database) -> bool:
    return not (await db.waiting(SITE))[0]


# -- bad runs ---------------------------------------------------------------------------------


async def test_malformed_runs_stop_nobody(database: Named, server: Server) -> None:
    """Runs that anything happened to come and go; those around them are served."""
    record = Recorder()
    async with engine.opened(database) as db, engine.listener(db, record.options(database)):
        await add(db, 1)
        server["runs_new"].insert_many(
            [
                {"data": "no list", "tags": 5, "number": "x", "start": [None]},
                {"data": [None, 5, [], {"type": 5, "host": {}}, {"type": "raw"}]},
                {"data": [{"type": "raw", "host": SITE, "status": {"$ne": 1}}], "tags": [{}, 7]},
                {"data": [{"type": "raw", "host": SITE, "status_since": DatetimeMS(2**62)}]},
                {"_id": {"a": 1}},
                {"_id": "text"},
            ]
        )
        await add(db, 2)
        await engine.until(lambda: record.numbers == Counter([1, 2]))
        server["runs_new"].delete_many({"number": {"$exists": False}})
        await add(db, 3)
        await engine.until(lambda: record.numbers == Counter([1, 2, 3]))


async def test_a_run_that_cannot_be_recorded_is_parked(database: Named, server: Server) -> None:
    """What it owes is larger than a document can be: it is shown as failed, the others fire."""
    record = Recorder()
    one = engine.handler(record.record, copy("transferred", host=HERE), tag("*"))
    options = engine.options_for(database, [one])
    ducks = "🦆" * 1_500_000  # three times as long in the key of a slot
    async with engine.opened(database) as db:
        bad = engine.run_document(2, ("raw", SITE, "transferred"), tags=[{"name": ducks}])
        first, last = (engine.run_document(i, ("raw", SITE, "transferred")) for i in (1, 3))
        server["runs_new"].insert_many([first, bad, last])
        async with engine.listener(db, options):
            await engine.until(lambda: record.numbers == Counter([1, 3]))
            parked = await reactions(db, "done", "done", "failed")
            await add(db, 4)
            await engine.until(lambda: record.numbers == Counter([1, 3, 4]))
        (shown,) = [reaction for reaction in parked if reaction.state.value == "failed"]
        assert shown.run == bad["_id"]
        assert "too large" in shown.note
        (alarm,) = await db.alarms(SITE)
        assert alarm.alarm.run == "run 2"
        assert str(bad["_id"]) not in alarm.alarm.summary


async def test_a_reaction_without_its_handler_waits(database: Named, server: Server) -> None:
    """It is reported, fails never, and is done once the handler is back."""
    record = Recorder()
    absent = engine.options_for(database, [engine.handler(_other, tag("other"))])
    async with engine.opened(database) as db:
        async with engine.listener(db, record.options(database)):
            await ready(db)
        await add(db, 1)
        record.fails = True
        await engine.once(db, record.options(database))
        held = {"$set": {"due": Job.now()}}
        assert server["caxev_ledger"].update_one({"handler": "record"}, held).matched_count
        async with engine.listener(db, absent):
            await engine.until(lambda: _missing(db, stands=True))
        (waiting,) = await reactions(db, "pending")
        assert (waiting.attempts, "'record'" in waiting.note) == (1, True)
        record.fails = False
        server["caxev_ledger"].update_one({"handler": "record"}, {"$set": {"due": Job.now()}})
        async with engine.listener(db, record.options(database)):
            await engine.until(lambda: len(record.seen) == 2)
            await reactions(db, "done")
            await engine.until(lambda: _missing(db, stands=False))


async def _other(job: Job) -> None:
    """Do nothing."""


async def _missing(db: Database, *, stands: bool) -> bool:
    found = [one for one in await db.alarms(SITE) if one.alarm.key == "missing record"]
    return any(one.active for one in found) == stands


async def test_indexes_are_made_again_after_the_ledger_was_dropped(
    database: Named, server: Server
) -> None:
    """The listener goes on, from the beginning, with the indexes that it needs."""
    record = Recorder()
    options = evolve(record.options(database), settings=settings_of_admin(database))
    async with engine.opened(database) as db:
        async with engine.listener(db, options):
            await ready(db)
            before = set(server["caxev_ledger"].index_information())
            server.drop_collection("caxev_ledger")
            await engine.until(lambda: set(server["caxev_ledger"].index_information()) == before)
            await add(db, 1)
            await engine.until(lambda: len(record.seen) == 1)
        assert len(before) > 1


async def test_indexes_of_what_else_was_dropped_are_made_daily(
    database: Named, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests and manifests go on without a word, into collections that lack them."""
    monkeypatch.setattr("caxev.engine.indexes.EVERY", 0.5)  # a short day
    options = evolve(Recorder().options(database), settings=settings_of_admin(database))

    def indexes() -> list[set[str]]:
        names = ("caxev_requests", "caxev_manifests")
        return [set(server[name].index_information()) for name in names]

    async with engine.opened(database) as db:
        wanted = indexes()
        async with engine.listener(db, options):
            await ready(db)
            for name in ("caxev_requests", "caxev_manifests"):
                server.drop_collection(name)
            await engine.until(lambda: indexes() == wanted)
    assert all(len(one) > 1 for one in wanted)


def settings_of_admin(database: Named) -> Settings:
    return Settings(mongo_uri=database.uri, database=database.name)


async def test_a_run_that_is_mended_at_once_fires(database: Named, server: Server) -> None:
    """What could not be recorded was not seen, also by the very next batch."""
    record = Recorder()
    one = engine.handler(record.record, copy("transferred", host=HERE), tag("*"))
    options = engine.options_for(database, [one])
    async with engine.opened(database) as db, engine.listener(db, options):
        bad = engine.run_document(
            2, ("raw", SITE, "transferred"), tags=[{"name": "🦆" * 1_500_000}]
        )
        await add(db, 1)
        await reactions(db, "done")  # so that the rest comes by the stream
        server["runs_new"].insert_one(bad)
        await reactions(db, "done", "failed")
        server["runs_new"].update_one({"_id": bad["_id"]}, {"$set": {"tags": []}})
        await reactions(db, "done", "done")
    assert record.numbers == Counter([1, 2])


@pytest.mark.parametrize("repair", ["repaired", "deleted"])
async def test_a_run_that_can_be_recorded_again_is_shown_no_more(
    database: Named, server: Server, repair: str
) -> None:
    """Repaired it fires, and deleted it is gone, at a retry too."""
    record = Recorder()
    one = engine.handler(record.record, copy("transferred", host=HERE), tag("*"))
    options = engine.options_for(database, [one])
    async with engine.opened(database) as db:
        bad = engine.run_document(
            2, ("raw", SITE, "transferred"), tags=[{"name": "🦆" * 1_500_000}]
        )
        server["runs_new"].insert_one(bad)
        async with engine.listener(db, options):
            await reactions(db, "failed")
            await db.add_request(SITE, Request("retry"), "me", Job.now())
            await engine.until(lambda: server["caxev_requests"].count_documents({}) == 0)
            await reactions(db, "failed")
        if repair == "repaired":
            server["runs_new"].update_one({"_id": bad["_id"]}, {"$set": {"tags": []}})
        else:
            server["runs_new"].delete_one({"_id": bad["_id"]})
        async with engine.listener(db, options):
            await db.add_request(SITE, Request("retry"), "me", Job.now())
            await reactions(db, *(["done"] if repair == "repaired" else []))
    assert record.numbers == Counter([2] if repair == "repaired" else [])


async def test_a_run_deleted_while_a_reaction_is_open(database: Named, server: Server) -> None:
    """The reaction is done, with the reason; handlers of its deletion are called without it."""
    tries: list[int] = []
    gone: list[str] = []

    async def stubborn(job: Job) -> None:
        tries.append(1)
        raise Retry("not yet", after=0.5)

    async def mourn(job: Job) -> None:
        assert job.copy is None
        gone.append(str(job.event))

    handlers = [
        engine.handler(stubborn, tag("go")),
        engine.handler(mourn, copy(GONE, host=ELSEWHERE)),
    ]
    async with engine.opened(database) as db:
        async with engine.listener(db, engine.options_for(database, handlers)):
            document = engine.run_document(1, ("raw", "chicago", "error"), tags=[{"name": "go"}])
            run = await db.insert_run(document)
            await engine.until(lambda: tries)
            server["runs_new"].delete_one({"_id": run})
            (done,) = await reactions(db, "done")
        assert gone == ["raw at chicago: gone"]
        assert done.handler == "mourn"


# -- outcomes ---------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back-off of a hundredth of a second and more; surprises are tried twice."""
    monkeypatch.setattr("caxev.core.ledger.FIRST_DELAY", 0.01)
    monkeypatch.setattr("caxev.core.ledger.SURPRISES", 2)


@asynccontextmanager
async def listening(
    database: Named, function: Any, *triggers: Any, **options: Any
) -> AsyncIterator[Database]:
    """A listener with one handler, by default of the tag `go`."""
    one = engine.handler(function, *(triggers or (tag("go"),)), **options)
    async with (
        engine.opened(database) as db,
        engine.listener(db, engine.options_for(database, [one])),
    ):
        yield db


async def test_a_reaction_renewed_while_it_runs_runs_again(database: Named, server: Server) -> None:
    """What changed during a reaction is reacted to afterwards, not beside it."""
    running = 0
    seen: list[str] = []
    begun, go_on = trio.Event(), trio.Event()

    async def slow(job: Job) -> None:
        nonlocal running
        running += 1
        assert running == 1
        assert job.copy is not None
        seen.append(job.copy.status)
        begun.set()
        await go_on.wait()
        running -= 1

    async with listening(database, slow, copy(("transferred", "error"))) as db:
        (run,) = await add(db, 1)
        await begun.wait()
        (first,) = await reactions(db, "running")
        for status in ("error", "transferred", "error"):
            server["runs_new"].update_one({"_id": run}, {"$set": {"data.0.status": status}})
        await engine.until(lambda: _renewed(db, first))
        go_on.set()
        await engine.until(lambda: len(seen) >= 2)
        await reactions(db, "done")
    assert seen[0] == "transferred"
    assert seen[-1] == "error"


async def _renewed(db: Database, reaction: Reaction) -> bool:
    return (await db.standing([reaction.id]))[reaction.id].event.after == "error"


async def test_spent_attempts_park(database: Named, impatient: None) -> None:
    """`Retry` is tried as often as the handler allows; then it is failed, and a person decides."""
    tries: list[int] = []

    async def never(job: Job) -> RunUpdate | None:
        job.on_failure(RunUpdate.add_tag(job.run, "parked"))
        tries.append(1)
        if len(tries) <= 3:
            raise Retry("not yet")
        return None

    async with listening(database, never, attempts=3) as db:
        run = await go(db)
        (parked,) = await reactions(db, "failed")
        assert parked.note == "not yet (given up after 3 attempts)"
        assert (await db.runs([run]))[run].tags == ("go", "parked")
        assert len(tries) == 3
        await db.add_request(SITE, Request("retry"), "me", Job.now())
        await reactions(db, "done")
    assert len(tries) == 4


class Panic(BaseException):
    """As libraries in Rust raise it: no `Exception`."""


class Unshowable(Exception):
    def __str__(self) -> str:
        raise ValueError("nor can this be shown")

    __repr__ = __str__


class UnshowableEnd(GiveUp):
    def __str__(self) -> str:
        raise ValueError("nor can this be shown")


class Busy(Retry):
    def __init__(self) -> None:
        Exception.__init__(self, "without what Retry sets")


class Soon(Retry):
    def __init__(self) -> None:
        super().__init__("in words")
        self.after: Any = "soon"


async def go_each(db: Database, number: int) -> list[Any]:
    """Add as many runs for `go`, numbered from 0: a handler acts by the number."""
    return [await go(db, one) for one in range(number)]


async def notes(db: Database, runs: Sequence[Any], *states: str) -> list[str]:
    """The notes of the reactions to these runs, once they stand in these states."""
    found = {reaction.run: reaction.note for reaction in await reactions(db, *sorted(states))}
    return [found[run] for run in runs if run in found]


async def test_a_surprise_is_tried_again_a_few_times(database: Named, impatient: None) -> None:
    """An error that nobody foresaw is bounded on its own, and its text is kept."""
    tries: Counter[int] = Counter()
    surprises: list[tuple[BaseException, str]] = [
        (ZeroDivisionError("by nothing"), "ZeroDivisionError: by nothing"),
        (SystemExit(7), "SystemExit: 7"),
        (BaseExceptionGroup("of a nursery", [SystemExit(7), Retry("x")]), "SystemExit: 7"),
        (KeyboardInterrupt("by a handler"), "KeyboardInterrupt: by a handler"),
        (GeneratorExit(), "GeneratorExit: "),
        (Panic("in Rust"), "Panic: in Rust"),
        (BaseExceptionGroup("of a nursery", [Panic("in Rust"), Retry("x")]), "Panic: in Rust"),
        (Unshowable(), "Unshowable (its text cannot be shown)"),
        (UnshowableEnd("x"), "UnshowableEnd (its text cannot be shown)"),
        (Busy(), "Busy: without what Retry sets"),
        (Soon(), "Soon: in words"),
    ]

    async def broken(job: Job) -> None:
        tries[number_of(job)] += 1
        raise surprises[number_of(job)][0]

    async with listening(database, broken) as db:
        runs = await go_each(db, len(surprises))
        found = await notes(db, runs, *["failed"] * len(surprises))
    assert set(tries.values()) == {2}
    for note, (_, text) in zip(found, surprises, strict=True):
        assert note.startswith(text)


def number_of(job: Job) -> int:
    return int(job.run.document["number"])


async def test_who_spoils_a_job_fails_alone(database: Named) -> None:
    """What the engine reads of it after the attempt is the job's own; the listener goes on."""
    spoiling = [
        ("run", None),
        ("run", Run("another")),
        ("deed", "counted"),
        ("has_noted", None),
        ("if_parked", (None,)),
    ]

    async def spoil(job: Job) -> None:
        setattr(job, *spoiling[number_of(job)])

    async with listening(database, spoil) as db:
        runs = await go_each(db, len(spoiling))
        found = await notes(db, runs, *["failed"] * len(spoiling))
    for note, (name, _) in zip(found, spoiling, strict=True):
        assert note.startswith(f"the handler has set job.{name}")


async def test_an_update_that_nothing_can_be_made_of_fails_alone(database: Named) -> None:
    """An author may give a `RunUpdate` anything; so it ends its reaction, and no listener."""

    async def odd(job: Job) -> RunUpdate:
        return RunUpdate(job.run.id, tag="no object")  # type: ignore[arg-type]

    async with listening(database, odd) as db:
        await go(db)
        (parked,) = await reactions(db, "failed")
    assert parked.note.startswith("this update cannot be written: ")


async def test_a_cancellation_that_is_over_is_an_error(database: Named, impatient: None) -> None:
    """A handler that kept a `Cancelled`, and raises it later, fails; the listener goes on."""

    async def late(job: Job) -> None:
        kept: list[trio.Cancelled] = []
        with trio.move_on_after(0):
            try:
                await trio.sleep_forever()
            except trio.Cancelled as cancelled:
                kept.append(cancelled)
        raise kept[0]

    async with listening(database, late) as db:
        await go(db)
        (parked,) = await reactions(db, "failed")
    assert parked.note.startswith("Cancelled: ")


async def test_what_sets_itself_off_is_stopped(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler whose update triggers it, two that trigger each other, one that never waits."""
    monkeypatch.setattr("caxev.core.recurrence.MOST", 5)
    monkeypatch.setattr("caxev.core.ledger.SHORTEST_DELAY", 0.0)

    async def ping(job: Job) -> RunUpdate:
        if job.run.number == 3:
            raise Retry("at once", after=-5)
        into = "pong" if job.run.number == 2 else "ping"
        return RunUpdate.set_fields(job.run, **{into: (job.run.document.get("ping") or 0) + 1})

    async def pong(job: Job) -> RunUpdate:
        return RunUpdate.set_fields(job.run, ping=job.run.document["pong"] + 1)

    both = [engine.handler(ping, field("ping")), engine.handler(pong, field("pong"))]
    options = engine.options_for(database, both)
    async with engine.opened(database) as db, engine.listener(db, options):
        for number in (1, 2, 3):
            await db.insert_run(engine.run_document(number, ping=1))
        parked = await engine.until(lambda: _failed(db, 3))
        assert all(one.note.startswith("it ran 5 times within ") for one in parked)

        async def alarmed() -> bool:
            whys = [one.alarm.details["why"] for one in await db.alarms(SITE)]
            return sorted(whys) == sorted(one.note for one in parked)

        await engine.until(alarmed)


async def test_what_sets_itself_off_by_something_new_is_stopped(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time another tag, copy or field: each is a reaction of its own, of the same handler."""
    monkeypatch.setattr("caxev.core.recurrence.MOST", 5)

    async def spread(job: Job) -> RunUpdate:
        new = len(job.run.tags) + len(job.run.copies) + len(job.run.document)
        if job.run.number == 1:
            return RunUpdate.add_tag(job.run, f"another-{new}")
        if job.run.number == 2:
            return RunUpdate.add_copy(job.run, CopyKey("raw", f"another-{new}"), "transferred")
        return RunUpdate.set_fields(job.run, **{f"f{new % 30}": new})

    fields = [field(f"f{number}") for number in range(30)]
    one = engine.handler(spread, tag("*"), copy("transferred"), *fields)
    options = engine.options_for(database, [one])
    async with engine.opened(database) as db, engine.listener(db, options):
        for number in (1, 2, 3):
            await db.insert_run(engine.run_document(number, f1=1))
        parked = await engine.until(lambda: _failed(db, 3))
    why = "spread ran for 5 changes of this run within "
    assert all(one.note.startswith(why) for one in parked)


async def test_files_that_run_out_are_the_listeners_trouble(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One alarm is about the listener, however many reactions fail for it; they are tried again."""
    monkeypatch.setattr("caxev.alarms.health.EVERY", 0.1)

    async def starved(job: Job) -> None:
        none_left = OSError(errno.EMFILE, os.strerror(errno.EMFILE), f"/data/{job.run.number}")
        raise RuntimeError("no worker") from none_left

    async with listening(database, starved) as db:
        for number in range(3):
            await go(db, number + 1)
        (alarm,) = await engine.until(lambda: db.alarms(SITE))
        keys = {alarm.alarm.key}

        async def postponed() -> bool:
            # The alarm may be over before the last reaction has failed: collect all that appear.
            keys.update(one.alarm.key for one in await db.alarms(SITE))
            return await _postponed(db, 3)

        await engine.until(postponed)
    assert keys == {alarm.alarm.key}
    assert alarm.alarm.summary == f"{SITE}: the listener has too many open files"


async def _postponed(db: Database, number: int) -> bool:
    reactions = [reaction for reaction, _ in await db.reactions(SITE)]
    return sum(reaction.note == "RuntimeError: no worker" for reaction in reactions) == number


async def test_a_handler_writes_to_its_own_run(database: Named, impatient: None) -> None:
    """Another run is written to by `update_other`, which is named in the error."""
    other, ways = Run.from_document(engine.run_document(2)), ("returned", "written", "if parked")

    async def wrong(job: Job) -> RunUpdate:
        update, way = RunUpdate.set_fields(other, x=1), ways[number_of(job)]
        if way == "written":
            await job.update(update)
        if way == "if parked":
            job.on_failure(update)
        return update

    async with listening(database, wrong) as db:
        found = await notes(db, await go_each(db, 3), *["failed"] * 3)
    assert len(found) == 3
    assert all("job.update_other" in note for note in found)


async def test_an_update_may_change_nothing(database: Named) -> None:
    """Of what a handler computes there may be no fields left: the update counts as written."""

    async def nothing(job: Job) -> RunUpdate:
        update = RunUpdate.set_fields(job.run)
        if number_of(job) == 2:
            update = RunUpdate.note(await job.update(update), job.run.copies[0])
        return update

    async with listening(database, nothing) as db:
        tagged = {"tags": [{"name": "go"}], "data": [_copy("transferred")]}
        runs = [await db.insert_run({**engine.run_document(n), **tagged}) for n in (1, 2)]
        await reactions(db, "done", "done")
        found = await db.runs(runs)
        assert [found[run].copies[0].status for run in runs] == ["transferred"] * 2


def _copy(status: str) -> dict[str, Any]:
    return {"type": "raw", "host": SITE, "status": status}


def _endless() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


async def test_a_value_that_cannot_be_stored_fails_its_reaction(
    database: Named, impatient: None
) -> None:
    """Whatever error the driver has for it: the listener goes on, and a person decides."""
    values: list[object] = [{1}, 2**70, uuid4(), _endless()]

    async def odd(job: Job) -> RunUpdate:
        return RunUpdate.set_fields(job.run, x=values[number_of(job)])

    async with listening(database, odd) as db:
        found = await notes(db, await go_each(db, len(values)), *["failed"] * len(values))
    assert len(found) == len(values)
    assert all(note.startswith("the database cannot store it: ") for note in found)


async def _failed(db: Database, number: int) -> list[Reaction]:
    """So many failed reactions, once there are."""
    found = [reaction for reaction, _ in await db.reactions(SITE, state="failed")]
    return found if len(found) >= number else []


async def test_an_attempt_that_does_not_stop_is_reported(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that swallows its cancellation keeps no worker of its lane, and raises an alarm."""
    monkeypatch.setattr("caxev.engine.runner.IGNORED", 0.1)
    monkeypatch.setattr("caxev.engine.runner.PROGRESS_EVERY", 0.1)
    seen: list[int] = []
    enough = trio.Event()

    async def swallow(job: Job) -> None:
        seen.append(job.run.number or 0)
        while job.run.number == 1 and not enough.is_set():
            with trio.CancelScope(shield=True):
                await trio.sleep(0.01)

    async with listening(database, swallow, lane="tape", timeout=0.1) as db:
        try:
            await go(db, 1)
            await engine.until(lambda: seen)
            await go(db, 2)
            (alarm,) = await engine.until(lambda: db.alarms(SITE))
            await engine.until(lambda: seen == [1, 2])
        finally:
            enough.set()
        await engine.until(lambda: _is_settled(db))
    assert alarm.alarm.summary == "swallow does not stop for run 1 (tag 'go': yes)"
    assert alarm.alarm.details["why it should"] == "timed out after 0 s"


async def _is_settled(db: Database) -> bool:
    return all(reaction.state.value != "running" for reaction, _ in await db.reactions(SITE))


async def test_outcomes(database: Named) -> None:
    """What a handler did or raised is recorded, and it is called once; what did nothing is not."""
    calls: Counter[int] = Counter()
    outcomes: list[tuple[Any, str, str]] = [
        (None, "done", ""),
        (Skip("not mine"), "", ""),
        (GiveUp("hopeless"), "failed", "hopeless"),
        (5, "failed", "the handler returned a int, not a RunUpdate, a Skip or None"),
        (ExceptionGroup("two", [GiveUp("one"), Retry("two")]), "failed", "one"),
        (GiveUp("bad name \udcff\0"), "failed", "bad name \\udcff\0"),
        (GiveUp("x" * 1_000_000), "failed", "x" * LONGEST_NOTE + " ..."),
    ]

    async def react(job: Job) -> Any:
        result = outcomes[number_of(job)][0]
        calls[number_of(job)] += 1
        if isinstance(result, Exception):
            raise result
        return result

    async with listening(database, react) as db:
        runs = await go_each(db, len(outcomes))
        await engine.until(lambda: len(calls) == len(outcomes))
        found = await reactions(db, *sorted(state for _, state, _ in outcomes if state))
    assert set(calls.values()) == {1}
    assert {one.run: (one.state.value, one.note, one.attempts) for one in found} == {
        run: (state, note, 0) for run, (_, state, note) in zip(runs, outcomes, strict=True) if state
    }


async def test_an_update_that_no_longer_fits(database: Named, impatient: None) -> None:
    """Somebody else was first: within a handler it is done, at its end it looks again."""
    snapshots: list[str] = []

    async def late(job: Job) -> RunUpdate:
        stale = evolve(job.run.copies[0], status="stale")
        snapshots.append("late")
        if len(snapshots) == 1:
            return RunUpdate.change_copy(job.run, stale, "error")
        await job.update(RunUpdate.change_copy(job.run, stale, "error"))
        raise AssertionError("unreachable")

    async with listening(database, late, copy("transferred")) as db:
        (run,) = await add(db, 1)
        await engine.until(lambda: len(snapshots) == 2)
        await reactions(db)
        assert (await db.runs([run]))[run].copies[0].status == "transferred"
    assert len(snapshots) == 2


async def test_timeout_and_stall(database: Named) -> None:
    """An attempt that takes too long, or stands still, is broken off and counts as a failure."""

    async def hang(job: Job) -> None:
        await trio.sleep_forever()

    hanging = [
        engine.handler(hang, tag("go"), name=name, attempts=1, **{name: 0.2})
        for name in ("stall", "timeout")
    ]
    options = engine.options_for(database, hanging)
    async with engine.opened(database) as db, engine.listener(db, options):
        await go(db)
        failed = await reactions(db, "failed", "failed")
    assert {one.handler: one.note for one in failed} == {
        "stall": "no progress for 0 s (given up after 1 attempts)",
        "timeout": "timed out after 0 s (given up after 1 attempts)",
    }


async def test_progress_keeps_a_slow_one_alive(database: Named) -> None:
    """Longer than `stall` in all, but never without progress for so long."""

    async def slow(job: Job) -> None:
        for done in range(8):
            job.progress(done, 8)
            await trio.sleep(0.5)

    async with listening(database, slow, stall=3.0, attempts=1) as db:
        await go(db)
        await reactions(db, "done")


# -- fields -----------------------------------------------------------------------------------


async def test_a_tag_that_was_given_again_meanwhile_fires(database: Named) -> None:
    """Nobody listened when it was removed and given again: who did so wants the reaction."""
    record = Recorder()
    one = engine.handler(record.record, tag("go"))
    options = engine.options_for(database, [one])
    async with engine.opened(database) as db:
        run = await add(db, 1)
        for expected in (1, 2):
            await db.update_run(RunUpdate.add_tag(Run(run[0]), "go"), utcnow())
            await engine.once(db, options)
            assert len(record.seen) == expected
            await db.update_run(RunUpdate.remove_tag(Run(run[0]), "go"), utcnow())


async def test_a_field_that_is_set_fires(database: Named, server: Server) -> None:
    """Of the run and of a copy; once for each value, also over a restart."""
    seen: list[str] = []

    async def see(job: Job) -> None:
        seen.append(f"{job.event.aspect}")
        assert job.copy is None or job.copy.host == "chicago"

    def reached(times: int) -> bool:
        return len(seen) >= (1, 1, 2, 3)[times]

    triggers = (field("processor.gains"), copy_field("asked", host=ELSEWHERE))
    options = engine.options_for(database, [engine.handler(see, *triggers)])
    changes: list[dict[str, Any]] = [
        {"$set": {"processor": {"gains": 1, "other": 1}}},
        {"$set": {"processor.other": 2}},
        {"$set": {"data.0.asked": True, "data.1.asked": True}},
        {"$set": {"processor.gains": 2}},
    ]
    async with engine.opened(database) as db:
        copies = [("raw", SITE, "transferred"), ("raw", "chicago", "transferred")]
        run = await db.insert_run(engine.run_document(1, *copies))
        for times, change in enumerate(changes):
            async with engine.listener(db, options):
                await ready(db)
                server["runs_new"].update_one({"_id": run}, change)
                await engine.until(partial(reached, times))
        await engine.once(db, options)
    assert seen == ["field processor.gains", "asked of raw at chicago", "field processor.gains"]


async def test_a_field_watched_for_the_first_time_fires(database: Named) -> None:
    """A handler installed later reacts to what was there before, once."""
    recorder = Recorder()
    later = engine.handler(recorder.record, field("end"))
    async with engine.opened(database) as db:
        for number in (1, 2):
            await db.insert_run(engine.run_document(number, end=5 if number == 1 else None))
        await engine.once(db, engine.options_for(database, []))
        before = (await record_of(db)).position
        await engine.once(db, engine.options_for(database, [later]))
        assert before is not None
        assert before.token is not None
        assert recorder.numbers == {1: 1}
        scanned = (await record_of(db)).scanned
        await engine.once(db, engine.options_for(database, [later]))
        assert recorder.numbers == {1: 1}
        assert (await record_of(db)).scanned == scanned  # nothing new to watch: no scan


# -- side by side -----------------------------------------------------------------------------


async def test_an_exclusive_reaction_waits_for_readers(database: Named) -> None:
    """Nothing else runs on the copy meanwhile; waiting does not count as its time."""
    inside: Counter[str] = Counter()
    order: list[str] = []
    reading, go_on = trio.Event(), trio.Event()

    async def read(job: Job) -> None:
        assert not inside["delete"]
        inside["read"] += 1
        reading.set()
        await go_on.wait()
        inside["read"] -= 1
        order.append("read")

    async def delete(job: Job) -> None:
        assert not +inside
        inside["delete"] += 1
        await trio.lowlevel.checkpoint()
        inside["delete"] -= 1
        order.append("delete")

    waited = 2.0
    handlers = [
        engine.handler(read, copy("transferred")),
        engine.handler(delete, copy(("transferred", "error")), exclusive=True, timeout=waited),
    ]
    async with engine.opened(database) as db:
        async with engine.listener(db, engine.options_for(database, handlers)):
            (run,) = await add(db, 1)
            await reading.wait()
            started = trio.current_time()
            await engine.until(lambda: trio.current_time() > started + 2 * waited)
            assert order in ([], ["delete"])
            go_on.set()
            done = await reactions(db, "done", "done")
        assert {reaction.run for reaction in done} == {run}
        assert sorted(order) == ["delete", "read"]
        assert {reaction.attempts for reaction in done} == {0}


async def test_who_waited_sees_what_was_done_meanwhile(database: Named) -> None:
    """The run is read again after a wait for an exclusive reaction."""
    seen: list[Any] = []

    async def alone(job: Job) -> None:
        await job.update(RunUpdate.add_tag(job.run, "read"))
        await engine.until(lambda: claimed(job.ports))
        await job.update(RunUpdate.set_fields(job.run, x=1))

    async def claimed(ports: Any) -> bool:
        owed = await ports.context.database.reactions(SITE, handler="read", state="running")
        return bool(owed)

    async def read(job: Job) -> None:
        seen.append(job.run.document.get("x"))

    handlers = [
        engine.handler(alone, tag("go"), exclusive=True),
        engine.handler(read, tag("read")),
    ]
    options = engine.options_for(database, handlers)
    async with engine.opened(database) as db, engine.listener(db, options):
        await go(db)
        await reactions(db, "done", "done")
    assert seen == [1]


async def test_different_copies_do_not_wait(database: Named) -> None:
    """An exclusive reaction on one copy leaves the others alone."""
    first = trio.Event()

    async def alone(job: Job) -> None:
        if job.run.number == 1:
            await first.wait()
        first.set()

    async with listening(database, alone, copy("transferred"), exclusive=True) as db:
        await add(db, 1, 2)
        await reactions(db, "done", "done")


async def test_a_burst_is_served_within_its_lanes(
    database: Named, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """600 runs at once: each reaction once, never more at a time than workers, few in memory."""
    window = 200
    monkeypatch.setattr("caxev.engine.lanes.WINDOW", window)
    sizes = {"wide": 40, "narrow": 3}
    inside: Counter[str] = Counter()
    most: Counter[str] = Counter()
    waiting: list[int] = []
    done: Counter[tuple[str, int]] = Counter()
    filling = Dispatcher._fill

    async def fill(self: Dispatcher, lane: Lane) -> None:
        await filling(self, lane)
        waiting.append(len(lane.waiting))
        assert len(lane.running) - lane.ended <= lane.workers
        assert lane.ended >= 0

    monkeypatch.setattr(Dispatcher, "_fill", fill)

    async def attempt(lane: str, job: Job) -> None:
        inside[lane] += 1
        most[lane] = max(most[lane], inside[lane])
        await trio.lowlevel.checkpoint()
        inside[lane] -= 1
        done[lane, job.run.number or 0] += 1

    async def wide(job: Job) -> None:
        await attempt("wide", job)

    async def narrow(job: Job) -> None:
        await attempt("narrow", job)

    handlers = [
        engine.handler(wide, new_run(), lane="wide"),
        engine.handler(narrow, tag("narrow"), lane="narrow"),
    ]
    options = engine.options_for(database, handlers)
    options = evolve(options, site=evolve(options.site, lanes=sizes))
    number = 600
    async with engine.opened(database) as db, engine.listener(db, options):
        await ready(db)
        server["runs_new"].insert_many(
            {"_id": ObjectId(), "number": i, "tags": [{"name": "narrow"}] if i % 20 == 0 else []}
            for i in range(1, number + 1)
        )
        await engine.until(lambda: len(done) == number + number // 20)
        await engine.until(lambda: _all_done(db))
    assert set(done.values()) == {1}
    assert all(0 < most[lane] <= size for lane, size in sizes.items())
    assert max(waiting) <= window


async def _all_done(db: Database) -> bool:
    return not await db.tally(SITE)
