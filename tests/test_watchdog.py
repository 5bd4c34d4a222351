"""A handler that blocks the listener's loop, and one that does not let it end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from inspect import currentframe
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import trio
from pymongo import MongoClient

from caxev import Job, tag
from caxev.engine.watchdog import culprit, handlers_by_code
from caxev.testing.mongod import start_with_us
from tests import engine
from tests.conftest import Database as Named

SITE = "lngs"
LEASE = 3.0


@contextmanager
def lease_seen(database: Named) -> Iterator[list[timedelta]]:
    """How much of the lease was left, as another process sees it during the block."""
    left: list[timedelta] = []
    over = Event()

    def look() -> None:
        with MongoClient[dict[str, Any]](database.uri, tz_aware=True) as client:
            ledger = client[database.name]["caxev_ledger"]
            while not over.wait(0.05):
                if (record := ledger.find_one({"_id": SITE})) and "expires" in record:
                    left.append(record["expires"] - datetime.now(UTC))

    thread = Thread(target=look)
    thread.start()
    try:
        yield left
    finally:
        over.set()
        thread.join()


@pytest.mark.replicaset
async def test_a_blocked_listener_keeps_its_lease(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For three times its length; the alarm, with who blocked it, stands until it is free again."""
    monkeypatch.setattr("caxev.engine.watchdog.BLOCKED", 0.5)
    ended: list[int] = []

    async def block(job: Job) -> None:
        with MongoClient[dict[str, Any]](database.uri) as client:
            end = time.monotonic() + 3 * LEASE
            while time.monotonic() < end:
                time.sleep(0.05)  # noqa: ASYNC251  # as a bad handler does
            kept = client[database.name]["caxev_ledger"].count_documents({"kind": "alarm"})
        ended.append(kept)

    one = engine.handler(block, tag("go"))
    async with (
        engine.opened(database) as db,
        engine.listener(db, engine.options_for(database, [one], lease_time=LEASE)),
    ):
        epoch = await engine.until(lambda: _epoch(db))
        with lease_seen(database) as left:
            await db.insert_run(engine.run_document(1, tags=[{"name": "go"}]))
            await engine.until(lambda: ended)
        assert min(left) > timedelta()
        (alarm,) = await engine.until(lambda: db.alarms(SITE))
        assert await _epoch(db) == epoch
        assert alarm.active
        assert not alarm.alarm.once
        monkeypatch.setattr("caxev.engine.watchdog.FREE", 0.5)
        await engine.until(lambda: _is_over(db))
    assert ended == [1]
    assert alarm.alarm.summary == f"{SITE}: the event loop is blocked by block"
    assert alarm.alarm.details["where"].startswith(f"{__file__}, line ")


async def _is_over(db: Any) -> bool:
    return not any(one.active for one in await db.alarms(SITE))


async def _epoch(db: Any) -> int | None:
    record = await db.site_record(SITE)
    return None if record is None else record.epoch


def test_the_culprit_is_the_handler_at_the_line_of_its_own_module() -> None:
    """Not the library that it has called; and if no handler is at work, where that is."""

    async def busy(job: Any) -> Any:
        return sorted([1], key=lambda _: job())

    frame: list[Any] = []
    one = handlers_by_code([engine.handler(busy, tag("x"))])
    trio.run(busy, lambda: frame.append(currentframe()))
    found = culprit(frame[0], one)
    assert found.handler == "busy"
    assert found.place == f"{__file__}, line {frame[0].f_lineno}"
    assert str(culprit(frame[0], {})).startswith(f"caxev itself ({__file__}, line ")


def test_a_decision_that_blocks_is_its_handler_s() -> None:
    """It is called while changes are recorded, not by an attempt."""
    frame: list[Any] = []

    async def react(job: Any) -> None: ...

    def decide(job: Any) -> None:
        frame.append(currentframe())

    decide(None)
    one = engine.handler(react, tag("x"), decide=decide)
    assert culprit(frame[0], handlers_by_code([one])).handler == "react"


BLOCKING = """
import time
from pathlib import Path
from caxev import on, tag

@on(tag("go"))
async def block(job):
    while True:
        Path("blocked").touch()
        time.sleep(0.1)
"""


@pytest.mark.replicaset
async def test_a_blocked_listener_whose_lease_is_lost_ends(database: Named, tmp_path: Path) -> None:
    """Nothing else can end its handler, whose reaction another process makes."""
    (tmp_path / "sites.json").write_text('[{"name": "lngs", "method": "local"}]')
    (tmp_path / "bad.py").write_text(BLOCKING)
    command = [sys.executable, "-m", "caxev", "--mongo-uri", str(database.site_uri)]
    command += ["--database", database.name, "--handlers", "bad.py", "listen", "--site", SITE]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    async with engine.opened(database) as db:
        await db.insert_run(engine.run_document(1, tags=[{"name": "go"}]))
        with start_with_us(command, cwd=tmp_path, env=environ, stderr=subprocess.PIPE) as process:
            await engine.until((tmp_path / "blocked").exists)
            with MongoClient[dict[str, Any]](database.uri) as client:
                ledger = client[database.name]["caxev_ledger"]
                ledger.update_one({"_id": SITE}, {"$inc": {"epoch": 1}})
            _, said = await trio.to_thread.run_sync(
                lambda: process.communicate(timeout=engine.PATIENCE)
            )
    assert process.returncode == 1
    assert b"and the lease cannot be kept" in said
    assert b"by the handler block" in said


GREEDY = """
import ctypes
from caxev import on, tag

@on(tag("go"))
async def greedy(job):
    ctypes.PyDLL(None).sleep(60)
"""


@pytest.mark.replicaset
async def test_a_handler_that_keeps_the_interpreters_lock_is_named_and_not_reported_as_well(
    database: Named, tmp_path: Path
) -> None:
    """Systemd hears nothing, so it ends the process; what it was doing stands on stderr."""
    (tmp_path / "sites.json").write_text('[{"name": "lngs", "method": "local"}]')
    (tmp_path / "bad.py").write_text(GREEDY)
    quick = "import caxev.engine.watchdog as w; w.HELD = 1.0; from caxev.cli import main; main()"
    command = [sys.executable, "-c", quick, "--mongo-uri", str(database.site_uri)]
    command += ["--database", database.name, "--handlers", "bad.py", "listen", "--site", SITE]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(240)
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        environ["NOTIFY_SOCKET"] = str(tmp_path / "notify")
        async with engine.opened(database) as db:
            with start_with_us(
                command, cwd=tmp_path, env=environ, stderr=subprocess.PIPE
            ) as process:
                await trio.to_thread.run_sync(systemd.recv, 4096)
                await db.insert_run(engine.run_document(1, tags=[{"name": "go"}]))

                said = process.stderr
                assert said is not None

                def named() -> bool:
                    return any(b"in greedy" in line for line in iter(said.readline, b""))

                assert await trio.to_thread.run_sync(named)
                systemd.settimeout(0)
                with suppress(BlockingIOError):
                    while True:
                        systemd.recv(4096)
                await trio.sleep(LEASE)
                with pytest.raises(BlockingIOError):
                    systemd.recv(4096)
                process.send_signal(signal.SIGABRT)  # as systemd does


HANDLER = """
from pathlib import Path
import trio
from caxev import on, tag

@on(tag("go"))
async def deaf(job):
    while True:
        try:
            Path("deaf").touch()
            await trio.sleep_forever()
        except trio.Cancelled:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.1)
"""


@pytest.mark.replicaset
async def test_a_listener_leaves_without_what_swallows_its_end(
    database: Named, tmp_path: Path
) -> None:
    """SIGTERM is obeyed; the handler is named, its reaction is due again, the lease is free."""
    (tmp_path / "sites.json").write_text('[{"name": "lngs", "method": "local"}]')
    (tmp_path / "bad.py").write_text(HANDLER)
    command = [sys.executable, "-m", "caxev", "--mongo-uri", str(database.site_uri)]
    command += ["--database", database.name, "--handlers", "bad.py"]
    command += ["listen", "--site", SITE, "--grace", "0"]
    async with engine.opened(database) as db:
        await db.insert_run(engine.run_document(1, tags=[{"name": "go"}]))
        with start_with_us(
            command,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.PIPE,
        ) as process:
            # Claimed is not begun: only the handler can show that it is at work.
            await engine.until((tmp_path / "deaf").exists)
            process.send_signal(signal.SIGTERM)
            _, said = await trio.to_thread.run_sync(
                lambda: process.communicate(timeout=engine.PATIENCE)
            )
        assert process.returncode == 1
        assert b"stopping although deaf (tag 'go': yes of run 1) still runs" in said
        ((reaction, _),) = await db.reactions(SITE, handler="deaf")
        assert reaction.state.value == "pending"
        record = await db.site_record(SITE)
        assert record is not None
        assert not record.active
