"""What a listener goes by is read again while it runs."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any, cast

import pytest
import trio
import trio.testing
from attrs import evolve
from loguru import logger
from pymongo import MongoClient

from caxev import ELSEWHERE, HERE, PASSIVE, Job, RunUpdate, copy, field, metrics
from caxev.alarms.health import of_gone_directories
from caxev.alarms.manager import AlarmManager, Recipient
from caxev.config import ConfigError, Sites
from caxev.core.alarms import Alarm, DeliveryRule
from caxev.core.clock import utcnow
from caxev.core.errors import Denied
from caxev.core.model import RunId
from caxev.database import Database, HistorySearch, Lease, Unreachable
from caxev.engine.leaving import Leaving
from caxev.engine.options import KEY, Options, adopted
from caxev.engine.session import tidy
from caxev.rucio.rule_files import RuleFiles
from tests import engine
from tests.conftest import Database as Named

SITE = "lngs"
NOWHERE = Named("mongodb://localhost/", "run")


async def see(job: Job) -> None:
    """Do nothing."""


async def weigh(job: Job) -> None:
    """Do nothing."""


def options(*names: str) -> Options:
    handlers = [
        engine.handler(see, copy("transferred", host=HERE)),
        engine.handler(weigh, field("weight")),
    ]
    return engine.options_for(NOWHERE, handlers, site_fields={"task_list": names})


def with_site(sites: Sites, name: str = SITE, **fields: Any) -> Sites:
    return evolve(sites, by_name={**sites.by_name, name: evolve(sites.get(name), **fields)})


def test_what_can_change_counts_at_once() -> None:
    """Of this site and of others; handlers are enabled anew."""
    before = options()
    after = with_site(with_site(before.sites, purge=5, task_list=("see",)), "chicago", port=23)
    new, waiting = adopted(before, after)
    assert (new.site.purge, new.sites.get("chicago").port, waiting) == (5, 23, [])
    assert [handler.name for handler in new.registry.enabled] == ["see"]


def test_what_cannot_change_is_named_and_stays() -> None:
    """The rest of the file counts all the same."""
    before = options()
    after = with_site(before.sites, purge=5, lanes={"transfer": 9}, handlers=("mine",))
    new, waiting = adopted(before, after)
    assert waiting == ["handlers", "lanes"]
    assert (new.site.purge, new.site.lanes, new.site.handlers) == (5, {}, ())


def test_a_task_that_watches_more_waits() -> None:
    """The stream does not bring the fields that it needs."""
    before = options("see")
    new, waiting = adopted(before, with_site(before.sites, task_list=(), purge=5))
    assert waiting == ["task_list"]
    assert (new.site.task_list, new.site.purge) == (("see",), 5)


def test_a_site_that_is_gone_is_an_error() -> None:
    before = options()
    rest = {name: site for name, site in before.sites.by_name.items() if name != SITE}
    with pytest.raises(ConfigError, match=SITE):
        adopted(before, evolve(before.sites, by_name=rest))


async def test_sighup_reads_again_and_does_not_end() -> None:
    called: list[bool] = []

    async def hangup() -> None:
        called.append(True)

    leaving = Leaving(hangup=hangup)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(leaving.listen)
        await trio.testing.wait_all_tasks_blocked()
        os.kill(os.getpid(), signal.SIGHUP)
        await engine.until(lambda: called)
        assert not leaving.asked.is_set()
        nursery.cancel_scope.cancel()


@pytest.mark.replicaset
async def test_a_listener_goes_by_what_was_read_again(database: Named) -> None:
    """What is wrong changes nothing, and is an alarm until it is put right."""
    seen: list[float | None] = []
    files: list[Sites | ConfigError] = []

    async def note(job: Job) -> None:
        seen.append(job.site.purge)

    def reread() -> Sites:
        found = files.pop(0)
        if isinstance(found, ConfigError):
            raise found
        return found

    made = engine.options_for(database, [engine.handler(note, copy("transferred", host=ELSEWHERE))])
    made = evolve(made, reread=reread)
    files += [with_site(made.sites, purge=5), ConfigError("purge must be days, not 'x'")]
    files.append(with_site(made.sites, purge=7))
    async with engine.opened(database) as db, engine.listener(db, made) as leaving:
        for number, purge in enumerate((None, 5, 5, 7), 1):
            await db.insert_run(engine.run_document(number, ("raw", "chicago", "transferred")))
            await engine.until(partial(_so_many, seen, number))
            assert seen[-1] == purge
            await engine.until(partial(_alarmed, db, stands=number == 3))
            if files:
                await leaving.hangup()


@pytest.mark.replicaset
async def test_a_reload_changes_what_the_stream_brings(database: Named) -> None:
    """A site that has no listener any more is looked after, also in what nobody wanted before."""
    seen: list[str | None] = []

    async def note(job: Job) -> None:
        seen.append(job.event.status)

    made = engine.options_for(database, [engine.handler(note, copy("verifying", host=PASSIVE))])
    passive = evolve(made.sites.get("chicago"), listener=False)
    after = evolve(made.sites, by_name={**made.sites.by_name, "chicago": passive})
    made = evolve(made, reread=lambda: after)
    async with engine.opened(database) as db, engine.listener(db, made) as leaving:
        run = await db.insert_run(engine.run_document(1, ("raw", "chicago", "transferring")))
        await leaving.hangup()
        found = (await db.runs([run]))[run]
        await engine.write(db, RunUpdate.change_copy(found, found.copies[0], "verifying"))
        await engine.until(lambda: seen == ["verifying"])


@pytest.mark.replicaset
async def test_a_reload_that_fails_in_a_stand_by_is_reported_when_it_leads(
    database: Named,
) -> None:
    """A stand-by has no alarms of its own: the site's are the leader's."""

    def reread() -> Sites:
        raise ConfigError("purge must be days, not 'x'")

    made = evolve(engine.options_for(database, []), reread=reread, lease_time=1.0)
    async with engine.opened(database) as db, engine.listener(db, made, "one") as leader:
        await engine.until(lambda: _led_by(db, "one"))
        async with engine.listener(db, made, "two") as other:
            await engine.until(lambda: other.hangup is not trio.lowlevel.checkpoint)
            await other.hangup()
            assert await _alarmed(db, stands=False)
            leader.asked.set()
            await engine.until(lambda: _led_by(db, "two"))
            await engine.until(partial(_alarmed, db, stands=True))


@pytest.mark.replicaset
async def test_asked_to_leave_it_serves_until_its_last_work_has_ended(database: Named) -> None:
    """A new run is not kept waiting by an old one, which has the grace to end."""
    begun, may_end = trio.Event(), trio.Event()

    async def work(job: Job) -> None:
        begun.set()
        if job.run.number == 1:
            await may_end.wait()

    one = engine.handler(work, copy("transferred", host=HERE))
    made = evolve(engine.options_for(database, [one]), grace=engine.PATIENCE)
    async with engine.opened(database) as db, engine.listener(db, made) as leaving:
        first = await db.insert_run(engine.run_document(1, ("raw", SITE, "transferred")))
        await begun.wait()
        leaving.asked.set()
        second = await db.insert_run(engine.run_document(2, ("raw", SITE, "transferred")))
        await engine.until(partial(_is_over, db, second))
        assert await _led_by(db, "test")
        may_end.set()
        await engine.until(partial(_is_over, db, first))

        async def gone() -> bool:
            return not await _led_by(db, "test")

        await engine.until(gone)


async def _is_over(db: Database, run: RunId) -> bool:
    pages = db.history_pages(HistorySearch(runs=[run], handler="work"))
    return any([row async for page in pages for row in page])


async def _led_by(db: Database, owner: str) -> bool:
    record = await db.site_record(SITE)
    return record is not None and record.active and record.owner == owner


@pytest.mark.replicaset
async def test_a_start_ends_alarms_that_only_the_former_process_could_end(
    database: Named,
) -> None:
    """Of a file that is correct by now, and of directories that the site no longer has."""
    made = engine.options_for(database, [])
    async with engine.opened(database) as db:
        taken = await db.acquire(SITE, "former", 0.01, utcnow())
        assert taken is not None
        former = AlarmManager(db, taken[0], [])
        for key in (KEY, "root /gone", "disk /gone", "another"):
            former.raise_(Alarm(SITE, key, f"{key} is wrong"))
        await former.keep()
        assert len(await db.alarms(SITE)) == 4
        await engine.once(db, made)
        assert [one.alarm.key for one in await db.alarms(SITE) if one.active] == ["another"]


def test_alarms_about_directories_that_are_held_stay() -> None:
    keys = ["root /data", "disk /data", "root /data/old", "disk /old", "database"]
    assert of_gone_directories(keys, {"/data"}) == ["root /data/old", "disk /old"]


@pytest.mark.replicaset
async def test_trouble_ends_with_its_tenure(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a stream that has failed: a stand-by that reaches the database reports no trouble."""
    monkeypatch.setattr("caxev.engine.recorder.Recorder.read_ahead.__defaults__", (0.05,))
    troubled, leading = metrics.troubled.labels(SITE)._value, metrics.leading.labels(SITE)._value
    logged: list[str] = []
    sink = logger.add(logged.append, level="INFO", format="{message}")

    async def fail(*args: Any) -> Any:
        raise Unreachable("no answer")

    try:
        options = engine.options_for(database, [])
        async with engine.opened(database) as db, engine.listener(db, options):
            await engine.until(lambda: any("ready" in line for line in logged))
            monkeypatch.setattr(Database, "next_look", fail)
            monkeypatch.setattr(Database, "open_stream", fail)
            await engine.until(lambda: troubled.get() == 1)
            with MongoClient[dict[str, Any]](database.uri) as plain:
                other: dict[str, Any] = {"epoch": 99, "owner": "other", "lease": 3600.0}
                other["expires"] = utcnow() + timedelta(hours=1)
                plain[database.name]["caxev_ledger"].update_one({"_id": SITE}, {"$set": other})
            await engine.until(lambda: leading.get() == 0)
            await engine.until(lambda: troubled.get() == 0)
    finally:
        logger.remove(sink)


@pytest.mark.replicaset
async def test_what_was_reloaded_is_what_others_compare_with(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A listener that reloads and its stand-by warn once each, and only if they differ."""
    monkeypatch.setattr("caxev.engine.presence.EVERY", 0.1)
    old = engine.options_for(database, [])
    old = evolve(old, sites=evolve(old.sites, digest="old"))
    new = evolve(old.sites, digest="new")
    old = evolve(old, reread=lambda: new)
    logged: list[str] = []
    sink = logger.add(logged.append, level="INFO", format="{message}")

    def so_many(number: int) -> bool:
        return sum("the order of sites" in line for line in logged) == number

    try:
        async with engine.opened(database) as db, engine.listener(db, old, "one") as leader:
            await engine.until(partial(_goes_by, db, "old"))
            async with engine.listener(db, old, "two"):
                await engine.until(lambda: any("standing by" in line for line in logged))
                assert so_many(0)
                await leader.hangup()
                await engine.until(partial(_goes_by, db, "new"))
                await engine.until(partial(so_many, 2))
            async with engine.listener(db, evolve(old, sites=new), "three"):
                await engine.until(lambda: sum("standing by" in line for line in logged) > 1)
                await trio.sleep(old.lease_time / 3)  # they compare several times
        assert so_many(2)
    finally:
        logger.remove(sink)


async def _goes_by(db: Database, digest: str) -> bool:
    record = await db.site_record(SITE)
    return record is not None and record.configuration == digest


def _so_many(seen: list[Any], number: int) -> bool:
    return len(seen) == number


async def _alarmed(db: Database, *, stands: bool) -> bool:
    found = [one for one in await db.alarms(SITE) if one.alarm.key == KEY]
    return any(one.active for one in found) == stands


class Sink:
    """A notifier that knows a secret."""

    resolves = True

    def __init__(self, secret: str) -> None:
        self.secret = secret

    async def send(self, alarm: Alarm, *, over: bool) -> None:
        """Do nothing."""


def test_a_notifiers_secret_is_read_again(tmp_path: Path) -> None:
    """One that is not there leaves the notifier as it was."""
    file = tmp_path / "secret"

    def make() -> Sink:
        if not file.exists():
            raise ConfigError("the secret is missing")
        return Sink(file.read_text())

    one = Recipient(DeliveryRule("mail"), Sink("old"), make)
    one.renew()
    assert one.notifier.secret == "old"  # type: ignore[attr-defined]
    file.write_text("new")
    one.renew()
    assert one.notifier.secret == "new"  # type: ignore[attr-defined]


async def test_rule_files_are_read_at_once_after_a_reload() -> None:
    """Not only at the next of the looks that come by themselves."""
    sites = options().sites
    here, there = sites.get(SITE), sites.get("chicago")
    looked: list[str] = []

    class Files(RuleFiles):
        async def catch_up(self) -> None:
            looked.append(self.site.name)

    files = Files(cast("Database", None), cast("Lease", None), here, sites)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(files.run)
        await trio.testing.wait_all_tasks_blocked()
        files.use(there, sites)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert looked == [SITE, "chicago"]


async def test_rule_files_on_a_disk_that_hangs_hold_up_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sites, answers = options().sites, Event()

    class Files(RuleFiles):
        files: Mapping[str, Path] = {"rucio": Path("rules.json")}

    monkeypatch.setattr("caxev.rucio.rule_files._seen", lambda _: answers.wait(10))
    files = Files(cast("Database", None), cast("Lease", None), sites.get(SITE), sites)
    with trio.move_on_after(0.1) as leaving:
        await files.catch_up()
    answers.set()
    assert leaving.cancelled_caught


@pytest.mark.parametrize("error", [OSError(errno.EIO, "no answer"), Denied("it is read-only")])
async def test_a_private_directory_that_fails_ends_no_listener(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_state: str) -> None:
        raise error

    monkeypatch.setattr("caxev.engine.session.forget_incoming", fail)
    await tidy(options().site)


async def test_a_process_that_reloads_hears_that_it_is_to_leave() -> None:
    """A reload notes itself in the history, which waits as long as the database is away."""
    reloading = trio.Event()

    async def reload() -> None:
        reloading.set()
        await trio.sleep_forever()

    leaving = Leaving(hangup=reload)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(leaving.listen)
        await trio.testing.wait_all_tasks_blocked()
        os.kill(os.getpid(), signal.SIGHUP)
        with trio.fail_after(engine.PATIENCE):
            await reloading.wait()
            os.kill(os.getpid(), signal.SIGTERM)
            await leaving.asked.wait()
        nursery.cancel_scope.cancel()
