"""The demo's stand-ins for what a real installation has: a DAQ, and an SSH server at each site."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import asyncssh
import pytest
from attrs import frozen
from hypothesis import given, settings
from hypothesis import strategies as st

from caxev import aio
from caxev.config import ConfigError, Settings
from caxev.core.model import CopyKey, Run
from caxev.demo import daq, server
from caxev.demo.world import SITES, World

START = datetime(2016, 11, 11, 14, 34, tzinfo=UTC)


def contents(run: daq.RawRun) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.path.iterdir()}


def write(directory: Path, size_bytes: int = 200_000, seed: int = 1) -> daq.RawRun:
    return daq.write_run(directory, 6731, size_bytes=size_bytes, seed=seed, start=START)


def test_the_demo_leaves_a_real_installation_alone(tmp_path: Path) -> None:
    """Neither its listeners nor commands in its environment go by what the shell has of one."""
    world = World(tmp_path, SITES)
    world.mongod = cast("Any", SimpleNamespace(uri="mongodb://127.0.0.1:1/"))
    shell = {
        "CAXEV_MONGO_URI": "mongodb://db1.example.org/",
        "CAXEV_MONGO_USER": "lngs",
        "CAXEV_DATABASE": "xenonnt",
        "CAXEV_COLLECTION": "runs",
        "CAXEV_MONGO_OPERATOR_URI": "mongodb://op@db1.example.org/",
    }
    found = Settings.load(environ={**shell, **world.environment})
    assert found.mongo_uri == world.settings.mongo_uri
    assert (found.database, found.collection) == ("run", "runs_new")
    with pytest.raises(ConfigError, match="no operator's user"):
        Settings.of_operators(
            database=None, collection=None, environ={**shell, **world.environment}
        )


@settings(max_examples=15)
@given(size_bytes=st.integers(0, 12_000_000))
def test_files_hold_every_event_once(size_bytes: int) -> None:
    """File names and members tell the events 0 to n-1, in files of 1000, the last one shorter."""
    with tempfile.TemporaryDirectory() as directory:
        run = write(Path(directory), size_bytes)
        events: list[int] = []
        for path in sorted(run.path.glob("XENON1T-*.zip")):
            name, number, first, last, count = path.stem.split("-")
            with zipfile.ZipFile(path) as file:
                members = [int(member) for member in file.namelist()]
            assert (name, number) == ("XENON1T", "6731")
            assert members == list(range(int(first), int(last) + 1))
            assert len(members) == int(count) <= daq.EVENTS_PER_FILE
            events += members
        assert events == list(range(run.events))


@pytest.mark.parametrize("size_bytes", [100_000, 1_000_000, 7_654_321])
def test_the_size_is_met(tmp_path: Path, size_bytes: int) -> None:
    """From 100 kB up a run is as large as asked for, within five per cent."""
    total = sum(map(len, contents(write(tmp_path, size_bytes)).values()))
    assert total == pytest.approx(size_bytes, rel=0.05)


def test_a_run_looks_as_the_event_builder_left_it(tmp_path: Path) -> None:
    """The directory has the run's name, and nothing but the files that pax wrote."""
    run = write(tmp_path)
    assert run.path == tmp_path / "161111_1434"
    assert sorted(contents(run)) == [
        "XENON1T-6731-000000000-000000039-000000040.zip",
        "pax_info.json",
        "trigger_monitor_data.zip",
    ]


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    """A run is a function of its arguments; another seed gives other events."""
    first, again, other = (
        contents(write(tmp_path / name, seed=seed))
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert first == again
    assert {name for name in first if first[name] != other[name]} == {
        name for name in first if name.startswith("XENON1T")
    }


def test_a_name_is_given_once(tmp_path: Path) -> None:
    """Two runs of one minute would share a directory: refused."""
    write(tmp_path)
    with pytest.raises(FileExistsError):
        write(tmp_path)


def test_the_document_is_a_run(tmp_path: Path) -> None:
    """What the DAQ inserts reads as a run without copies, and its entry as the first copy."""
    raw = write(tmp_path)
    document = daq.run_document(raw)
    run = Run.from_document(document)
    assert (run.number, run.name, run.start, run.copies) == (6731, raw.name, START, ())
    document["data"].append(daq.data_entry(raw, "xe1t-datamanager", "transferred"))
    copy = Run.from_document(document).copy(CopyKey("raw", "xe1t-datamanager"))
    assert copy is not None
    assert (copy.status, copy.location, copy.checksum) == ("transferred", str(raw.path), None)


@frozen
class Site:
    """A running server, and what a client needs to know of it."""

    process: subprocess.Popen[bytes]
    directory: Path
    port: int

    def connect(self, key: str = "client", known_hosts: str = "known_hosts") -> Connection:
        return asyncssh.connect(
            server.HOST,
            self.port,
            username="anyone",
            client_keys=[str(self.directory / key)],
            known_hosts=str(self.directory / known_hosts),
            config=None,
        )


SHARED = pytest.mark.xdist_group("demo-server")
Connection = asyncssh.misc._ACMWrapper[asyncssh.SSHClientConnection]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site's server that tests share, which find it as it was."""
    with started(tmp_path_factory.mktemp("site")) as made:
        yield made


@contextmanager
def started(directory: Path) -> Iterator[Site]:
    """A site's server, started as the demo starts it."""
    public = server.make_key(directory / "host")
    (directory / "authorized_keys").write_text(server.make_key(directory / "client"))
    flags = {
        "--directory": directory,
        "--host-key": directory / "host",
        "--authorized-keys": directory / "authorized_keys",
        "--port-file": directory / "port",
    }
    command = [sys.executable, "-m", "caxev.demo.server"]
    command += [str(word) for pair in flags.items() for word in pair]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not (directory / "port").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        port = int((directory / "port").read_text())
        (directory / "known_hosts").write_text(server.known_hosts_line(port, public))
        yield Site(process, directory, port)
        process.terminate()


@SHARED
def test_files_are_served(site: Site) -> None:
    """A client with the authorised key reads by absolute path what the server may read."""
    (site.directory / "file").write_bytes(b"raw")

    async def fetch() -> object:
        path = str(site.directory / "file")
        async with (
            site.connect() as client,
            client.start_sftp_client() as sftp,
            sftp.open(path, "rb") as file,
        ):
            return await file.read()

    assert aio.run(fetch()) == b"raw"


@SHARED
def test_another_key_is_refused(site: Site) -> None:
    """Only the authorised key gets in."""
    server.make_key(site.directory / "other")

    async def connect() -> None:
        async with site.connect(key="other"):
            pass

    with pytest.raises(asyncssh.PermissionDenied):
        aio.run(connect())


@SHARED
def test_another_host_key_is_noticed(site: Site) -> None:
    """The known-hosts line is checked against the key that the server shows."""
    line = server.known_hosts_line(site.port, server.make_key(site.directory / "other host"))
    (site.directory / "wrong").write_text(line)

    async def connect() -> None:
        async with site.connect(known_hosts="wrong"):
            pass

    with pytest.raises(asyncssh.HostKeyNotVerifiable):
        aio.run(connect())


@SHARED
def test_no_command_is_run(site: Site) -> None:
    """The server serves files and nothing else."""

    async def run() -> None:
        async with site.connect() as client:
            await client.run("true")

    with pytest.raises(asyncssh.ChannelOpenError):
        aio.run(run())


@pytest.mark.parametrize("how", ["end of input", "SIGTERM"])
def test_it_ends_when_told(tmp_path: Path, how: str) -> None:
    """The server leaves with status 0 when its input ends or SIGTERM comes, clients or none."""

    async def hold(site: Site) -> int:
        async with site.connect():
            assert site.process.stdin is not None
            (site.process.stdin.close if how == "end of input" else site.process.terminate)()
            return await asyncio.to_thread(site.process.wait, 20)

    with started(tmp_path) as site:
        assert aio.run(hold(site)) == 0


@pytest.mark.replicaset
def test_asked_twice_to_end_the_demo_leaves_nothing(tmp_path: Path) -> None:
    """The signal's status, no traceback, no process and no directory."""
    command = [sys.executable, "-m", "caxev", "demo", "--runs", "1", "--size-mb", "1"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as demo:
        assert demo.stdout is not None
        assert any("MongoDB at" in line for line in demo.stdout)  # its listeners are being started
        while len(naming(tmp_path)) <= 4:
            assert demo.poll() is None
            time.sleep(0.02)
        demo.terminate()
        time.sleep(0.2)  # else the two may come as one
        demo.terminate()
        said = demo.stdout.read()
    assert demo.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in said
    assert naming(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def naming(path: Path) -> list[str]:
    """The processes that have this path in their command line or environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            if os.fsencode(path) in words:
                found.append(process.name)
    return found
