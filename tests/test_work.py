"""Helpers: `caxev work` beside a listener, as real processes on a real replica set."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.request import urlopen

import pytest
import trio
from attrs import define, field
from loguru import logger
from pymongo import MongoClient

from caxev import Job, RunUpdate, tag
from caxev.alarms.manager import AlarmManager
from caxev.cli.status import site_rows
from caxev.cli.work import check_lanes
from caxev.config import ConfigError
from caxev.core.alarms import Alarm, AlarmState, helper_gone
from caxev.core.clock import utcnow
from caxev.core.ledger import Done, Reaction, claim, settle
from caxev.core.model import YES, Event, Run, Tag
from caxev.core.registry import Registry
from caxev.database import (
    Database,
    Helper,
    HistorySearch,
    Ingest,
    Lease,
    LeaseLost,
    Request,
    Unreachable,
)
from caxev.engine.context import Context
from caxev.engine.dispatcher import Dispatcher
from caxev.engine.helpers import HelperWatch
from caxev.engine.recorder import Recorder
from caxev.engine.relayed import RelayedAlarms
from caxev.engine.root_watch import RootWatch
from caxev.engine.workers import Workers
from caxev.testing.mongod import start_with_us
from tests import engine
from tests.conftest import Database as Named
from tests.faults.proxy import proxied
from tests.sshd import free_port

pytestmark = [pytest.mark.replicaset, pytest.mark.campaign]

SITE: Final = "lngs"
LEASE: Final = 3.0
HELPED: Final = 5.0
"""Seconds of a helper's lease."""
HANDLERS: Final = """
import os, time, trio
from caxev import GiveUp, Job, RunUpdate, on, tag

def note(what, job):
    line = f"{what} {job.run.number} {os.getpid()}\\n".encode()
    file = os.open(os.environ["NOTES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, line)
    os.close(file)

@on(tag("nap"), lane="naps")
async def nap(job: Job) -> RunUpdate:
    note("begins", job)
    until = time.monotonic() + job.run.document["nap"]
    while time.monotonic() < until:
        await trio.sleep(0.1)
        note("sleeps", job)
    note("ends", job)
    return RunUpdate(job.run.id, tag={"name": "napped"})

@on(tag("wait"), lane="naps")
async def wait(job: Job) -> None:
    note("begins", job)
    while not os.path.exists(os.environ["NOTES"] + ".good"):
        await trio.sleep(0.1)

@on(tag("block"), lane="naps")
async def block(job: Job) -> None:
    note("begins", job)
    until = time.monotonic() + job.run.document["nap"]
    while time.monotonic() < until:
        time.sleep(0.1)
        note("sleeps", job)
    note("ends", job)

@on(tag("fail"), lane="naps")
async def fail(job: Job) -> None:
    if not os.path.exists(os.environ["NOTES"] + ".good"):
        raise GiveUp(f"not here, in process {os.getpid()}")

@on(tag("nap"), lane="alone", exclusive=True)
async def sweep(job: Job) -> None:
    note("sweeps", job)
"""


@define
class Crew:
    """Real processes for one site, and what they have noted of their work."""

    directory: Path
    database: Named
    processes: list[subprocess.Popen[bytes]] = field(init=False, factory=list)

    def start(
        self,
        *command: str,
        uri: str | None = None,
        crash: str = "",
        sites: str = "sites.json",
    ) -> subprocess.Popen[bytes]:
        where = {
            "CAXEV_CRASH": crash,
            "CAXEV_MONGO_URI": uri or self.database.site_uri or self.database.uri,
            "CAXEV_DATABASE": self.database.name,
            "CAXEV_SITES": str(self.directory / sites),
            "NOTES": str(self.notes_file),
        }
        files = ("--handlers", str(self.directory / "naps.py"))
        log = self.log_of(len(self.processes))
        process = start_with_us(
            [sys.executable, "-m", "caxev", *command, *files, "--log-file", str(log)],
            env={**os.environ, **where},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.processes.append(process)
        return process

    def listen(self, *options: str) -> subprocess.Popen[bytes]:
        return self.start("listen", "--site", SITE, "--lease", str(LEASE), *options)

    def work(self, *options: str, uri: str | None = None, **more: str) -> subprocess.Popen[bytes]:
        lane = ("--lane", "naps", "--lease", str(HELPED))
        return self.start("work", "--site", SITE, *lane, *options, uri=uri, **more)

    def log_of(self, number: int) -> Path:
        return self.directory / f"log.{number}"

    @property
    def notes_file(self) -> Path:
        return self.directory / "notes"

    @property
    def notes(self) -> list[tuple[str, int, int]]:
        """What was noted, in order: what, the run's number and the process."""
        if not self.notes_file.exists():
            return []
        rows = (line.split() for line in self.notes_file.read_text().splitlines())
        return [(what, int(run), int(pid)) for what, run, pid in rows]

    def at_work(self, run: int) -> list[int]:
        """The processes that have begun with a run, in order."""
        return [pid for what, one, pid in self.notes if (what, one) == ("begins", run)]

    def cure(self) -> None:
        """Let what failed, and what waits, come to its end from now on."""
        Path(f"{self.notes_file}.good").touch()

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()


FIELDS: Final = {"name": SITE, "hostname": "localhost", "method": "sftp", "lanes": {"naps": 1}}


@pytest.fixture
def crew(tmp_path: Path, database: Named) -> Iterator[Crew]:
    """A site whose naps the listener takes one at a time, and each helper, too."""
    (tmp_path / "sites.json").write_text(json.dumps([FIELDS]))
    (tmp_path / "naps.py").write_text(HANDLERS)
    crew = Crew(tmp_path, database)
    try:
        yield crew
    finally:
        crew.end()
        # One that was killed in a transaction would lock the database for a minute.
        with MongoClient[dict[str, Any]](database.uri) as client:
            client.admin.command("killAllSessions", [])


async def helpers(db: Database) -> list[str]:
    """The names of the helpers that may claim."""
    return [one.name for one in await db.helpers(SITE) if one.epoch]


async def helped_by(db: Database, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None
    return any(f":{process.pid}:" in name for name in await helpers(db))


async def nap(db: Database, number: int, seconds: float, what: str = "nap") -> None:
    document = engine.run_document(number, tags=[{"name": what}], nap=seconds)
    await db.insert_run(document)


async def busy(crew: Crew, db: Database) -> subprocess.Popen[bytes]:
    """Start a listener that makes nothing in the lane of naps but run 1, until all is cured."""
    leader = crew.listen()
    await nap(db, 1, 0.0, "wait")
    await engine.until(lambda: crew.at_work(1) == [leader.pid])
    return leader


async def are_raised(db: Database, *summaries: str) -> bool:
    """Whether these alarms are active, and no others."""
    return {one.alarm.summary for one in await _failures(db)} == {*summaries}


async def is_done(db: Database, handler: str, *numbers: int) -> bool:
    return await rows(db, handler) == [*numbers]


async def is_over(db: Database, *numbers: int) -> bool:
    """Whether nothing is owed, and these runs were seen."""
    tally = (await db.tally(SITE)).get(SITE, {})
    return (
        not tally.get("pending")
        and not tally.get("running")
        and len(await rows(db)) >= len(numbers)
    )


async def rows(db: Database, handler: str = "nap") -> list[int]:
    """The numbers of the runs for which the history has that the handler was done."""
    search = HistorySearch(site=SITE)
    found = [row async for page in db.history_pages(search) for row in page]
    return sorted(row.number or 0 for row in found if row.handler == handler)


async def napped(db: Database, database: Named) -> list[int]:
    """The numbers of runs, one for each nap whose result counts."""
    with MongoClient[dict[str, Any]](database.uri) as client:
        runs = list(client[database.name][engine.settings_for(database).collection].find())
    return sorted(run["number"] for run in runs for one in run["tags"] if one["name"] == "napped")


def met(notes: list[tuple[str, int, int]]) -> list[str]:
    """Which runs two processes were at work on at once: one goes on after another has begun."""
    last: dict[int, int] = {}
    past: dict[int, set[int]] = defaultdict(set)
    found = []
    for what, run, pid in notes:
        if what == "begins" and last.get(run, pid) != pid:
            past[run].add(last[run])
        if what == "begins":
            last[run] = pid
        elif what != "sweeps" and pid in past[run] and pid != last[run]:
            found.append(f"{pid} {what} for {run} beside {last[run]}")
    return found


async def test_helpers_share_the_work(crew: Crew, database: Named) -> None:
    """Each reaction is done once, by the listener or by one of its helpers, in every lane asked."""
    async with engine.opened(database) as db:
        ports = free_port(), free_port()
        leader = crew.listen("--metrics-port", str(ports[0]))
        others = [crew.work(), crew.work("--metrics-port", str(ports[1]))]
        for one in others:
            await engine.until(partial(helped_by, db, one))
        numbers = range(1, 13)
        for number in numbers:
            await nap(db, number, 1.0)
        await engine.until(lambda: is_over(db, *numbers))
        assert await rows(db) == await napped(db, database) == [*numbers]
        assert {crew.at_work(number)[0] for number in numbers} == {
            one.pid for one in (leader, *others)
        }
        assert met(crew.notes) == []
        (row,) = await site_rows(db, {SITE: True})
        host = socket.gethostname()
        assert all(one.startswith(f"{host} (naps): ") for one in row["helpers"])
        assert {one["process"].split(":")[1] for one in row["helping"]} == {
            str(one.pid) for one in others
        }
        shown = [await trio.to_thread.run_sync(scrape, port) for port in ports]
        there = f'caxev_helper_running{{host="{host}",lane="naps",site="{SITE}"}}'
        assert [there in text for text in shown] == [True, False]
        assert f'caxev_helping{{site="{SITE}"}} 1.0' in shown[1]
        assert f'caxev_lane_workers{{lane="naps",site="{SITE}"}} 1.0' in shown[1]
        # An exclusive handler runs at the listener alone, and while nobody reads the run.
        assert {pid for what, _, pid in crew.notes if what == "sweeps"} == {leader.pid}
        for run in numbers:
            assert _not_swept_while_read(crew.notes, run)
        for one in others:
            one.terminate()
            assert await trio.to_thread.run_sync(one.wait) == 0
        await engine.until(lambda: _nobody(db))


def scrape(port: int) -> str:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=240) as reply:
        return str(reply.read(), "utf-8")


async def _nobody(db: Database) -> bool:
    return await db.helpers(SITE) == []


def _not_swept_while_read(notes: list[tuple[str, int, int]], run: int) -> bool:
    mine = "".join(
        {"begins": "(", "ends": ")", "sweeps": "x"}.get(w, "") for w, n, _ in notes if n == run
    )
    return re.search(r"\([^)]*x", mine) is None


BREAKS: Final = ("killed", "paused", "cut off")


@pytest.mark.parametrize("how", BREAKS)
async def test_what_a_lost_helper_had_begun_is_done_by_another(
    crew: Crew, database: Named, how: str
) -> None:
    """Killed, paused beyond its lease and woken, or cut off: each once, never by two at once."""
    with proxied(database.site_uri or database.uri) as (proxy, uri):
        async with engine.opened(database) as db:
            leader = crew.listen()
            helper = crew.work(uri=uri)
            await engine.until(lambda: helped_by(db, helper))
            for number in (1, 2):
                await nap(db, number, 9.0)
            await engine.until(lambda: len(crew.at_work(1) + crew.at_work(2)) == 2)
            lost = 1 if crew.at_work(1) == [helper.pid] else 2
            assert crew.at_work(lost) == [helper.pid]
            if how == "killed":
                helper.kill()
            elif how == "paused":
                helper.send_signal(signal.SIGSTOP)
            else:
                proxy.stall()
            await engine.until(lambda: crew.at_work(lost) == [helper.pid, leader.pid])
            if how == "paused":
                helper.send_signal(signal.SIGCONT)
            proxy.repair()
            await engine.until(lambda: is_over(db, 1, 2))
            assert await rows(db) == await napped(db, database) == [1, 2]
            assert met(crew.notes) == []
            if how != "killed":
                await engine.until(lambda: helped_by(db, helper))


async def test_a_blocked_helper_keeps_what_it_has_claimed(crew: Crew, database: Named) -> None:
    """As a blocked listener does, for longer than its lease; the alarm names the handler."""
    async with engine.opened(database) as db:
        leader, helper = crew.listen(), crew.work()
        await engine.until(lambda: helped_by(db, helper))
        for number in (1, 2):
            await nap(db, number, 2 * HELPED, "block")
        await engine.until(lambda: is_done(db, "block", 1, 2))
        # The listener, whose lease is shorter, was blocked as well.
        begun = [pid for what, _, pid in crew.notes if what == "begins"]
        assert sorted(begun) == sorted((leader.pid, helper.pid))
        assert met(crew.notes) == []
        blocked = f"{SITE}: the event loop is blocked by block"
        host = f"(helper on {socket.gethostname()})"
        await engine.until(lambda: are_raised(db, blocked, f"{blocked} {host}"))
        assert await helped_by(db, helper)


async def test_a_blocked_helper_that_is_cut_off_ends(crew: Crew, database: Named) -> None:
    """Its handler cannot be cancelled: the process ends before the listener makes its reaction."""
    with proxied(database.site_uri or database.uri) as (proxy, uri):
        async with engine.opened(database) as db:
            leader = await busy(crew, db)
            # Of the lease a tenth is left when it has ended: more than a loaded machine is late.
            helper = crew.work("--lease", "20", uri=uri)
            await engine.until(lambda: helped_by(db, helper))
            await nap(db, 2, 60.0, "block")
            await engine.until(lambda: crew.at_work(2) == [helper.pid])
            proxy.stall()
            crew.cure()
            await engine.until(lambda: crew.at_work(2) == [helper.pid, leader.pid])
            assert await trio.to_thread.run_sync(helper.wait) == 1
            assert met(crew.notes) == []


async def test_a_new_leader_takes_over_from_helpers_too(crew: Crew, database: Named) -> None:
    """The helper stops what it had under the old one, and joins under the new one."""
    async with engine.opened(database) as db:
        leader, helper = crew.listen(), crew.work()
        await engine.until(lambda: helped_by(db, helper))
        heir = crew.listen()
        for number in (1, 2):
            await nap(db, number, 8.0)
        await engine.until(lambda: len(crew.at_work(1) + crew.at_work(2)) == 2)
        former = await helpers(db)
        leader.kill()
        await engine.until(lambda: is_over(db, 1, 2))
        assert await rows(db) == await napped(db, database) == [1, 2]
        assert {pid for what, _, pid in crew.notes if what == "ends"} <= {heir.pid, helper.pid}
        assert met(crew.notes) == []
        await engine.until(lambda: helped_by(db, helper))
        assert set(former).isdisjoint(await helpers(db))


async def test_asked_to_leave_a_helper_ends_what_it_has_begun(crew: Crew, database: Named) -> None:
    """Within its grace; what takes longer is due again at once, and costs no attempt."""
    async with engine.opened(database) as db:
        leader = crew.listen()
        patient, hasty = crew.work("--grace", "6"), crew.work("--grace", "0")
        for helper in (patient, hasty):
            await engine.until(partial(helped_by, db, helper))
        for number in (1, 2, 3):
            await nap(db, number, 4.0)
        everybody = {leader.pid, patient.pid, hasty.pid}
        await engine.until(lambda: {pid for _, _, pid in crew.notes} == everybody)
        for helper in (patient, hasty):
            helper.terminate()
        for helper in (patient, hasty):
            assert await trio.to_thread.run_sync(helper.wait) == 0
        ended = {pid for what, _, pid in crew.notes if what == "ends"}
        assert ended - {leader.pid} == {patient.pid}
        await engine.until(lambda: is_over(db, 1, 2, 3))
        assert await rows(db) == await napped(db, database) == [1, 2, 3]
        assert met(crew.notes) == []
        assert leader.poll() is None


async def test_the_listener_keeps_the_alarms_of_its_helpers(crew: Crew, database: Named) -> None:
    """What fails at a helper is an alarm of the site, until it is done after all.

    Also if the helper died between recording the failure and reporting it.
    """
    async with engine.opened(database) as db:
        await busy(crew, db)
        for run, crash in ((3, "engine:database.settle.after:1"), (4, "")):
            helper = crew.work(crash=crash)
            await engine.until(partial(helped_by, db, helper))
            await db.insert_run(engine.run_document(run, tags=[{"name": "fail"}]))
            if crash:
                assert await trio.to_thread.run_sync(helper.wait) == -signal.SIGKILL
            (alarm,) = await engine.until(partial(_failures, db, f"fail has failed for run {run}"))
            assert alarm.alarm.details["why"] == f"not here, in process {helper.pid}"
        crew.cure()
        await db.add_request(SITE, Request("retry"), "test", utcnow())
        await engine.until(lambda: _no_failure(db))


async def _failures(db: Database, about: str = "") -> list[AlarmState]:
    found = [one for one in await db.alarms(SITE) if one.active]
    return [one for one in found if one.alarm.summary.startswith(about)]


async def _no_failure(db: Database) -> bool:
    return await _failures(db) == []


async def test_what_a_void_helper_writes_does_not_count(database: Named) -> None:
    """From the moment its lease has ended: neither claims, nor results, nor updates of runs."""
    async with engine.opened(database) as db:
        leader, _ = await acquired(db)
        helper = await joined(db, leader)
        run, reactions = await owed(db, leader, 4)
        running = [claim(one, helper.epoch) for one in reactions[:3]]
        assert await db.claim(reactions[:3], helper) == reactions[:3]
        # The leader leaves them alone, and cannot settle them.
        assert await db.claims(leader) == []
        assert await db.settle([done(running[0])], leader) == (0, 0)
        assert await db.settle([done(running[0])], helper) == (1, 0)
        (there,) = await db.helpers(SITE)
        assert not await db.void(there), "its lease has not lapsed"
        await db.join(helper, ["naps"], 0.0)
        assert await db.void(there)
        for write in (
            lambda: db.claim(reactions[3:], helper),
            lambda: db.renew_helper(helper, 60.0),
            lambda: db.add_news(helper, {"key": None}),
        ):
            with pytest.raises(LeaseLost):
                await write()
        assert await db.reopen_claims(leader, there, utcnow()) == 2
        assert await db.settle([done(running[1])], helper) == (0, 0)
        tagging = RunUpdate.add_tag(run, "late")
        with pytest.raises(LeaseLost):
            await db.settle_with(running[2:3], helper, [tagging], utcnow())
        with pytest.raises(LeaseLost):
            await db.update(running[2], helper, tagging, utcnow())
        assert (await db.runs([run.id]))[run.id].tags == run.tags
        assert await db.claim(reactions[1:], leader) == reactions[1:]
        await db.forget_helper(there)
        assert await db.helpers(SITE) == []


async def test_a_new_leader_leaves_to_helpers_what_they_may_be_at(database: Named) -> None:
    """Until they have stopped: they claim nothing more, and what they settle meanwhile counts."""
    async with engine.opened(database) as db:
        leader, _ = await acquired(db)
        helper = await joined(db, leader)
        run, reactions = await owed(db, leader, 4)
        await db.claim(reactions[:2], helper)
        await db.claim(reactions[2:3], leader)
        await db.release(leader)
        heir, interrupted = await acquired(db)
        assert interrupted == 1, "what the former leader had claimed"
        for write in (lambda: db.claim(reactions[3:], helper), lambda: db.renew_helper(helper, 9)):
            with pytest.raises(LeaseLost):
                await write()
        assert await db.claims(heir) == [], "it frees nothing of a helper"
        assert await db.claimed_elsewhere(run.id, heir) == {"nap"}, "and runs nothing beside it"
        (there,) = await db.helpers(SITE)
        assert (there.is_void, there.active) == (True, True)
        assert await db.settle([done(claim(reactions[0], helper.epoch))], helper) == (1, 0)
        await db.stop(helper)
        assert not (await db.helpers(SITE))[0].active
        assert await db.reopen_claims(heir, there, utcnow()) == 1
        assert await db.settle([done(claim(reactions[1], helper.epoch))], helper) == (0, 0)
        with pytest.raises(LeaseLost):
            await db.admit(leader, (await db.helpers(SITE))[0])


async def acquired(db: Database) -> tuple[Lease, int]:
    found = await db.acquire(SITE, "leader", 60.0, utcnow())
    assert found is not None
    return found


async def joined(db: Database, leader: Lease) -> Lease:
    """A helper that the leader has admitted."""
    asking = Lease(SITE, 0, "host", f"host:{os.urandom(4).hex()}")
    await db.join(asking, ["naps"], 60.0)
    assert await db.admitted(asking) is None
    (helper,) = [one for one in await db.helpers(SITE) if one.name == asking.helper]
    await db.admit(leader, helper)
    lease = await db.admitted(asking)
    assert lease is not None
    return lease


async def owed(db: Database, leader: Lease, number: int) -> tuple[Run, list[Reaction]]:
    """So many reactions to one run, recorded by the leader."""
    id_ = await db.insert_run(engine.run_document(1, tags=[{"name": "x"}]))
    now = utcnow()
    made = [
        Reaction(
            SITE,
            Event(id_, Tag(f"{n}"), None, YES),
            "nap",
            lane="naps",
            generation=(leader.epoch << 40) + n,
            at=now,
        )
        for n in range(number)
    ]
    await db.ingest(leader, Ingest({}, made), now)
    return (await db.runs([id_]))[id_], made


def done(reaction: Reaction) -> Reaction:
    return settle(reaction, Done(), utcnow(), allowed=1, jitter=0.0)


async def test_a_helper_that_is_admitted_while_it_leaves_has_left(database: Named) -> None:
    """It is neither waited for nor missed."""
    async with engine.opened(database) as db:
        leader, _ = await acquired(db)
        await db.withdraw(await joined(db, leader))
        (one,) = await db.helpers(SITE)
        assert (one.is_void, one.left, one.active) == (True, True, False)


async def test_a_helper_asks_for_what_it_has_handlers_for(database: Named) -> None:
    """Others, however many are due before, neither hide that nor are asked for again and again."""
    async with engine.opened(database) as db:
        leader, _ = await acquired(db)
        _, reactions = await owed(db, leader, 3)
        assert await db.due(SITE, "naps", utcnow(), 1, handlers=["other"]) == []
        assert await db.due(SITE, "naps", utcnow(), 9, handlers=["other", "nap"]) == reactions


async def test_what_came_due_while_nothing_was_claimed_is_claimed_afterwards(
    database: Named,
) -> None:
    """As soon as the leader is active again: nothing else reports it by then."""

    async def nap(job: Job) -> None:
        """Recorded by the leader."""

    options = engine.options_for(database, [engine.handler(nap, tag("0"), lane="naps")])
    async with engine.opened(database) as db:
        leader, _ = await acquired(db)
        context = Context(db, await joined(db, leader), options)
        await owed(db, leader, 1)
        async with trio.open_nursery() as nursery, Workers() as workers:
            roots = RootWatch(context, workers)
            dispatcher = Dispatcher(context, workers, nursery, roots, ["naps"])
            dispatcher.pause(True)
            nursery.start_soon(dispatcher.take)
            await engine.until(lambda: not dispatcher._doubtful)
            await trio.sleep(0.1)
            dispatcher.pause(False)
            await engine.until(
                lambda: dispatcher.lanes.running or dispatcher.settler._ended, within=8
            )
            nursery.cancel_scope.cancel()


async def test_a_helper_that_withdraws_while_it_is_admitted_is_not_there(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else another one from its host could vanish and not be missed, and its lanes stay shared."""
    admit = Database.admit
    asking = Lease(SITE, 0, "host", "host:1")

    async def late(self: Database, lease: Lease, helper: Helper) -> None:
        await self.withdraw(asking)
        await admit(self, lease, helper)

    async with engine.opened(database) as db:
        leader, _ = await acquired(db)
        async with watching(db, leader, database) as watch:
            await db.join(asking, ["naps"], 60.0)
            monkeypatch.setattr(Database, "admit", late)
            await watch.look()
            assert await db.helpers(SITE) == []
            await watch.look()
        assert watch.dispatcher.lanes.shared == frozenset()


@asynccontextmanager
async def watching(db: Database, leader: Lease, database: Named) -> AsyncIterator[HelperWatch]:
    """What looks after the helpers of that leader."""
    context = Context(db, leader, engine.options_for(database, []))
    async with trio.open_nursery() as nursery, Workers() as workers:
        dispatcher = Dispatcher(context, workers, nursery, RootWatch(context, workers))
        recorder = Recorder(context, dispatcher)
        yield HelperWatch(context, AlarmManager(db, leader, []), recorder, dispatcher)


def summaries(watch: HelperWatch) -> list[str]:
    return [one.alarm.summary for one in watch.alarms.active]


async def unheard(*_: Any) -> None:
    raise Unreachable("no reply")


async def test_an_alarm_of_a_helper_is_taken_over_once(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it cannot be removed from the helper's document, it is not raised after its end."""
    broken = Alarm(SITE, "broken", "it is broken")
    async with engine.opened(database) as db:
        leader, _ = await acquired(db)
        helper = await joined(db, leader)
        await db.add_news(helper, {"broken": broken})
        async with watching(db, leader, database) as watch:
            with monkeypatch.context() as lost:
                lost.setattr(Database, "take_news", unheard)
                with pytest.raises(Unreachable):
                    await watch.look()
            assert summaries(watch) == ["it is broken"]
            watch.alarms.clear("broken")
            await watch.look()
            assert summaries(watch) == []
            await db.add_news(helper, {"broken": broken})
            await watch.look()
            assert summaries(watch) == ["it is broken"]


async def test_an_admission_without_a_reply_ends_the_alarm_too(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the helper which was missed at the host."""
    admit = Database.admit

    async def without_reply(self: Database, *args: Any) -> None:
        await admit(self, *args)
        await unheard()

    async with engine.opened(database) as db:
        leader, _ = await acquired(db)
        async with watching(db, leader, database) as watch:
            watch.alarms.raise_(helper_gone(SITE, "host", ["naps"]))
            await db.join(Lease(SITE, 0, "host", "host:1"), ["naps"], 60.0)
            monkeypatch.setattr(Database, "admit", without_reply)
            with pytest.raises(Unreachable):
                await watch.look()
            await watch.look()
            assert summaries(watch) == []


async def test_an_alarm_that_the_ledger_refuses_holds_up_no_other(
    database: Named, logged: list[str]
) -> None:
    """Neither of a helper nor of the listener; the log has it."""
    alarms = [Alarm(SITE, name, f"it is {name}") for name in ("bad", "good")]
    async with engine.opened(database) as db:
        leader, _ = await acquired(db)
        helper = await joined(db, leader)
        with MongoClient[dict[str, Any]](database.uri) as client:
            rule = {"$nor": [{"kind": "alarm", "key": "bad"}, {"news.key": "bad"}]}
            client[database.name].command("collMod", "caxev_ledger", validator=rule)
        for kept in (RelayedAlarms(db, helper), AlarmManager(db, leader, [])):
            for one in alarms:
                kept.raise_(one)
            await (kept.relay() if isinstance(kept, RelayedAlarms) else kept.keep())
        assert [one.alarm.key for one in await db.alarms(SITE)] == ["good"]
        (found,) = await db.helpers(SITE)
        assert [key for _, key, _ in found.news] == ["good"]
    for word in ("relayed", "stored"):
        assert any(f"the alarm 'bad' cannot be {word}" in line for line in logged)


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """The errors that are logged."""
    lines: list[str] = []
    sink = logger.add(lambda line: lines.append(str(line)), level="ERROR", format="{message}")
    yield lines
    logger.remove(sink)


async def test_a_helper_that_vanished_is_missed_until_one_is_back(
    crew: Crew, database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The alarms about itself end with it. One that was asked to leave is not missed."""
    monkeypatch.setattr("caxev.engine.helpers.MISSED", 0.1)
    host, sites = socket.gethostname(), crew.directory / "sites.json"
    wrong = f"{SITE}: the new configuration is wrong; the previous one stays in force"
    other = f"{SITE}: not the same program as the listener: other handlers (helper on {host})"
    async with (
        engine.opened(database) as db,
        engine.listener(db, engine.options_for(database, [], lease_time=LEASE)),
    ):
        first = crew.work()
        await engine.until(lambda: helped_by(db, first))
        right = sites.read_text()
        for text, raised in (("{", True), (right, False), ("{", True)):
            sites.write_text(text)
            first.send_signal(signal.SIGHUP)
            summaries = [f"{wrong} (helper on {host})"] if raised else []
            await engine.until(partial(are_raised, db, other, *summaries))
        first.kill()
        gone = f"{SITE}: the helper on {host} is gone; the others do its work"
        await engine.until(lambda: are_raised(db, gone))
        sites.write_text(right)
        second = crew.work()
        await engine.until(lambda: are_raised(db, other))
        second.terminate()
        await engine.until(lambda: _nobody(db))
        # The listener looks after its helpers whenever it has renewed its lease.
        for _ in range(3):
            renewed = await expiry(db)
            await engine.until(partial(has_renewed, db, renewed))
        assert await are_raised(db)


async def test_a_helper_without_the_site_s_disk_claims_nothing(crew: Crew, database: Named) -> None:
    """Or with another sites.json, by which it is elsewhere: what it lacks is shown, and why."""
    for name in ("here", "elsewhere"):
        (crew.directory / name).mkdir()
        site = {**FIELDS, "dir_raw": str(crew.directory / name)}
        (crew.directory / f"{name}.json").write_text(json.dumps([site]))
    async with engine.opened(database) as db:
        leader = crew.start("listen", "--site", SITE, "--lease", str(LEASE), sites="here.json")
        await engine.until(lambda: _marked(db))
        helper = crew.work(sites="elsewhere.json")
        (away,) = await engine.until(lambda: _away(db))
        assert away.startswith(f"{crew.directory / 'elsewhere'} has no marker yet")
        file = f"{SITE}: sites.json is not the same as at {SITE}"
        await engine.until(lambda: are_raised(db, f"{file} (helper on {socket.gethostname()})"))
        for number in (1, 2, 3):
            await nap(db, number, 0.1)
        await engine.until(lambda: is_done(db, "nap", 1, 2, 3))
        assert {pid for _, _, pid in crew.notes} == {leader.pid}
        assert await helped_by(db, helper)


async def _marked(db: Database) -> bool:
    record = await db.site_record(SITE)
    return record is not None and bool(record.markers)


async def _away(db: Database) -> list[str]:
    (row,) = await site_rows(db, {SITE: True})
    return [why for one in row.get("helping", ()) for why in one["away"]]


async def expiry(db: Database) -> datetime:
    record = await db.site_record(SITE)
    assert record is not None
    assert record.expires is not None
    return record.expires


async def has_renewed(db: Database, before: datetime) -> bool:
    return await expiry(db) > before


def test_a_lane_that_a_helper_cannot_run_is_refused() -> None:
    """An unknown one with the nearest name, and one whose handlers must run alone."""

    async def pull(job: Job) -> None: ...

    async def erase(job: Job) -> None: ...

    handlers = [
        engine.handler(pull, tag("x"), lane="transfer"),
        engine.handler(erase, tag("x"), lane="deletion", exclusive=True),
    ]
    registry = Registry(handlers, engine.sites_of(SITE).here(SITE))
    check_lanes(["transfer"], registry)
    with pytest.raises(ConfigError, match=r"'transfre' \(did you mean 'transfer'\?\)"):
        check_lanes(["transfre"], registry)
    with pytest.raises(ConfigError, match=r"'deletion': erase must not run"):
        check_lanes(["deletion"], registry)
