"""The embedded MongoDB: found, started, killed, started again, and never left behind."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio
from pymongo import MongoClient
from pymongo.errors import OperationFailure

from caxev.config import ConfigError
from caxev.testing.mongod import find_mongod
from tests.conftest import Database
from tests.mongod import Cluster, Server

SITES = Path(__file__).parents[1] / "sites.json"
Client = MongoClient[dict[str, Any]]

# Starts a set and a listener from a thread that ends, sees that the set answers still, says which
# processes they are, and then lives until killed.
STARTER = """
import sys, threading, pathlib
from caxev.demo.world import World
from caxev.testing.mongod import ReplicaSet
directory, sites = map(pathlib.Path, sys.argv[1:])
replica_set = ReplicaSet(directory)
world = World(directory, sites)
world.mongod = replica_set
def start():
    replica_set.start()
    world.listen("lngs", "--config", str(sites))
thread = threading.Thread(target=start)
thread.start()
thread.join()
replica_set.queries("run.runs_new")
print(replica_set.members[0].process.pid, world.listeners["lngs"].pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, mongod: Cluster) -> Iterator[Cluster]:
    """A set of three members; asks for `mongod` so as to be skipped where that is."""
    with Cluster(tmp_path_factory.mktemp("three"), members=3) as replica_set:
        yield replica_set


def test_a_named_mongod_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """CAXEV_MONGOD is taken before any other."""
    monkeypatch.setenv("CAXEV_MONGOD", sys.executable)
    assert find_mongod() == sys.executable


def test_path_comes_before_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mongod on PATH is taken before the embedded extra's."""
    ours = tmp_path / "mongod"
    ours.touch(mode=0o755)
    monkeypatch.delenv("CAXEV_MONGOD", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_mongod() == str(ours)


def test_a_named_mongod_that_is_none_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong CAXEV_MONGOD is not passed over in silence."""
    monkeypatch.setenv("CAXEV_MONGOD", "/nowhere/mongod")
    with pytest.raises(ConfigError, match="CAXEV_MONGOD=/nowhere/mongod"):
        find_mongod()


def test_no_mongod_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no mongod, the message names the command that brings one."""
    monkeypatch.delenv("CAXEV_MONGOD", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "fiftyone", raising=False)  # another test may have found it
    with pytest.raises(ConfigError, match=r'pip install "caxev\[embedded\]"'):
        find_mongod()


@pytest.mark.replicaset
def test_changes_are_streamed(database: Database) -> None:
    """A started set accepts majority writes and streams them as changes."""
    with Client(database.uri, w="majority") as client:
        runs = client[database.name]["runs"]
        with runs.watch() as stream:
            runs.insert_one({"number": 1})
            assert next(stream)["fullDocument"]["number"] == 1


@pytest.mark.replicaset
async def test_async_tests_run_under_trio(database: Database) -> None:
    """An async test gets its fixtures, and trio."""
    with trio.fail_after(60):
        await trio.lowlevel.checkpoint()
    assert database.name.startswith("test_")


@pytest.mark.replicaset
def test_a_dead_primary_is_replaced(three: Cluster) -> None:
    """With three members, writes go on after the primary is killed, and it can come back."""
    with Client(three.uri, w="majority") as client:
        runs = client["test"]["runs"]
        runs.insert_one({"number": 1})
        dead = three.primary()
        three.kill(dead)
        runs.insert_one({"number": 2})
        assert three.primary() != dead
        three.restart(dead)
        assert runs.count_documents({}) == 2


@pytest.mark.replicaset
def test_acknowledged_writes_survive_stop(mongod: Cluster, tmp_path: Path) -> None:
    """What was acknowledged before `stop` is there after `start`.

    With `auth` the URI works, also after a restart, and a wrong password does not.
    """
    replica_set = Cluster(tmp_path, auth=True)
    for before in range(2):
        with replica_set, Client(replica_set.uri, w="majority") as client:
            assert client["test"]["runs"].count_documents({}) == before
            client["test"]["runs"].insert_one({})
            wrong = replica_set.uri.replace(replica_set.password, "wrong")
            with Client(wrong) as other, pytest.raises(OperationFailure, match="Authentication"):
                other["test"]["runs"].find_one()


@pytest.mark.replicaset
def test_a_caller_s_option_replaces_ours(mongod: Cluster, tmp_path: Path) -> None:
    """Options given by the caller win; without a set's name the server is a plain one."""
    server = Server(tmp_path, ["--oplogSize=5"])
    server.start()
    try:
        server.wait()
        with Client(server.uri) as client:
            parsed = client.admin.command("getCmdLineOpts")["parsed"]
            assert parsed["replication"] == {"oplogSizeMB": 5}
            assert "setName" not in client.admin.command("hello")
    finally:
        server.kill()


@pytest.mark.replicaset
def test_a_start_that_fails_says_why(mongod: Cluster, tmp_path: Path) -> None:
    """A mongod that ends at once is reported in its own words, and nothing is left running."""
    replica_set = Cluster(tmp_path, options=["--nosuch=1"])
    with pytest.raises(ConfigError, match="unrecognised option '--nosuch=1'"):
        replica_set.start()
    assert [member.process for member in replica_set.members] == [None]


@pytest.mark.replicaset
def test_nothing_outlives_its_starter(mongod: Cluster, tmp_path: Path) -> None:
    """A set and a listener outlive the thread that started them, and die with the process."""
    command = [sys.executable, "-c", STARTER, str(tmp_path), str(SITES)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        children = [psutil.Process(int(pid)) for pid in starter.stdout.readline().split()]
        assert all(child.is_running() for child in children)
        while children[1].cmdline()[1:3] != ["-m", "caxev"]:  # itself, no longer what starts it
            time.sleep(0.01)
        children[1].suspend()  # it cannot end by itself, for want of a database
        starter.kill()
    _, left = psutil.wait_procs(children, timeout=120)
    for child in left:
        child.kill()
    assert left == []
