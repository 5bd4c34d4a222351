"""What comes from outside is taken up to a limit: sizes, numbers, times."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Timer
from types import SimpleNamespace
from typing import Any, cast
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from asyncssh import SFTPAttrs, SFTPName
from hypothesis import given
from hypothesis import strategies as st
from pymongo import MongoClient

from caxev import Denied, GiveUp, Retry, aio, http_server, limited, program
from caxev.config import ConfigError, Permission, load_file, load_sites
from caxev.config.settings import secret
from caxev.core.clock import utcnow
from caxev.database import manifests, run_queries
from caxev.files import FarPath, Item, Manifest, Meter, RateLimiter, Seen, confine, scan
from caxev.handlers import permissions
from caxev.http_server import SmallServer
from caxev.metrics_server import MetricsAddress, MetricsServer
from caxev.program import Program
from caxev.rucio.rules import load_rules
from caxev.tails import Tail
from caxev.tape import client
from caxev.tape.base import Transcript
from caxev.transfer.gfal import _GridReading
from caxev.transfer.ssh.agent import _line
from caxev.transfer.ssh.known_hosts import read_known_hosts
from caxev.transfer.ssh.remote import Remote
from tests import engine
from tests.conftest import Database as Named

# -- ports ----------------------------------------------------------------------------------------


@contextmanager
def served(server: SmallServer) -> Iterator[tuple[str, int]]:
    server.begin()
    try:
        yield server.server_address[0], server.server_address[1]  # type: ignore[misc]
    finally:
        server.close()


def scraped(address: tuple[str, int]) -> bytes:
    with (
        suppress(URLError, OSError),
        urlopen(f"http://{address[0]}:{address[1]}", timeout=5) as got,
    ):
        body: bytes = got.read()
        return body
    return b""


def becomes_served(address: tuple[str, int]) -> bytes:
    end = time.monotonic() + 120
    while not (body := scraped(address)):
        assert time.monotonic() < end
        time.sleep(0.05)
    return body


def test_metrics_are_served() -> None:
    """In Prometheus' own format."""
    with served(MetricsServer(MetricsAddress(0))) as address:
        assert b"# HELP caxev_leading" in scraped(address)


def test_idle_connections_take_no_more_than_their_share() -> None:
    """However many two clients open, another is served; after a while all are let go."""
    server = MetricsServer(MetricsAddress(0))
    with served(server) as address, ExitStack() as idle:
        for client, most in (("1", http_server.SHARE), ("2", http_server.MOST - 1)):
            for _ in range(50):
                source = (f"127.0.0.{client}", 0)
                one = idle.enter_context(socket.create_connection(address, 5, source))
                with suppress(OSError):
                    one.sendall(b"GET / HT")
            assert scraped(address) == b""
            assert len(server._open) <= most
        with socket.create_connection(address, 5, ("127.0.0.3", 0)) as other:
            other.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert other.recv(9) == b"HTTP/1.0 "
        server.patience = 0.5
        assert becomes_served(address)


def test_a_sender_that_drips_is_let_go() -> None:
    """Each byte in time does not make a request in time."""
    server = MetricsServer(MetricsAddress(0))
    server.patience = 0.5
    with (
        served(server) as address,
        socket.create_connection(address, 5) as dripping,
        pytest.raises(OSError, match=r"reset|[Bb]roken pipe"),
    ):
        drip(dripping)


def drip(connection: socket.socket) -> None:
    """Send a byte now and then, for much longer than is waited for."""
    for _ in range(200):
        connection.sendall(b"x")
        time.sleep(0.05)


# -- programs -------------------------------------------------------------------------------------

FLOOD = """
import sys
for _ in range(200_000):
    sys.std{0}.write("x" * 99 + "\\n")
print("the end", file=sys.std{0})
"""


def flood(stream: str) -> list[str]:
    """A program that writes 20 MB and then its last word."""
    return [sys.executable, "-c", FLOOD.format(stream)]


def test_the_end_of_complaints_is_kept() -> None:
    """Of megabytes on standard error the last line is what counts, and little more is kept."""
    ended = program.run(Program(flood("err"), "none"))
    assert ended.last == "the end"
    assert len(ended.said) <= 16 << 10


@given(st.lists(st.binary(max_size=300), max_size=20), st.integers(1, 200))
def test_a_tail_is_what_came_last(parts: list[bytes], most: int) -> None:
    """Whatever comes in whatever pieces."""
    whole = b"".join(parts)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        tail = Tail(process.stdout, most)
        for part in parts:
            process.stdin.write(part)
            process.stdin.flush()
        process.stdin.close()
        assert tail.bytes() == whole[-most:]
        assert tail.whole == (len(whole) <= most)


def test_a_batch_system_answers_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cut off is not taken for an answer."""
    assert "the end" in program.call(flood("out"), package="none")
    monkeypatch.setattr(program, "MOST", 1000)
    with pytest.raises(Retry, match="more than 1,000,000 lines or 1,000 bytes"):
        program.call(flood("out"), package="none")


def test_an_archives_client_that_writes_for_ever_is_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The error names it."""
    monkeypatch.setattr(client, "MOST", 10_000)
    transcript = Transcript(lambda _done, _total: None)
    with pytest.raises(Retry, match="yes writes without end"):
        client.run_client(
            Program(["yes"], "none", directory=str(tmp_path)),
            client.ClientWatch("yes", transcript, 60, asks=lambda _line: False),
        )
    assert len(transcript.text) < 40_000


def test_a_program_lists_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed beyond it, and named."""
    monkeypatch.setattr(program, "ROWS", 1000)
    answer = program.Answer("yes")
    with pytest.raises(GiveUp, match="yes answers with more than 1,000 lines"):
        program.run(Program(["yes"], "none"), output=answer)
    assert len(answer.lines) <= 1000


def test_of_setfacl_the_last_word_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Though it complains by megabytes."""
    fake = tmp_path / "bin" / "setfacl"
    fake.parent.mkdir()
    fake.write_text(f"#!{sys.executable}\n{FLOOD.format('err')}\nsys.exit(1)\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    (tmp_path / "raw" / "run").mkdir(parents=True)
    place = str(tmp_path / "raw")
    with pytest.raises(GiveUp, match=r"setfacl fails at .*/run: the end$"):
        permissions.apply(f"{place}/run", (place,), Permission(acl="u:1:r"))


# -- files ----------------------------------------------------------------------------------------


def _secret(file: Path) -> object:
    return secret("CAXEV_PASSWORD", {"CAXEV_PASSWORD_FILE": str(file)})


@pytest.mark.parametrize(
    ("read", "limit"),
    [
        (_secret, limited.SECRET),
        (load_sites, limited.CONFIGURATION),
        (load_rules, limited.CONFIGURATION),
        (load_file, limited.CONFIGURATION),
        (lambda file: read_known_hosts(str(file)), limited.CONFIGURATION),
    ],
)
def test_files_are_read_up_to_a_limit(
    tmp_path: Path, read: Callable[[Path], object], limit: int
) -> None:
    """The error names the file and how large it may be."""
    file = tmp_path / "large.py"
    file.touch()
    os.truncate(file, limit + 1)
    with pytest.raises((ConfigError, Denied), match=rf"large\.py.*larger than {limit:,} bytes"):
        read(file)


def test_no_file_grows_over_what_was_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that writes what a far end sends is ended, whatever that sends."""
    monkeypatch.setattr(limited, "SMALL_FILES", 1000)
    file = tmp_path / "file"
    command = ["sh", "-c", f"head -c 5000 /dev/zero > {file}"]
    assert program.run(Program(command, "x")).status == 0
    assert file.stat().st_size == 5000
    # The limit is set once it has started: what it writes before that is over the limit.
    command = ["sh", "-c", f"sleep 1; exec cat /dev/zero > {file}"]
    ended = program.run(Program(command, "x"), limits=program.Limits(file_size=2000))
    assert ended.status == -signal.SIGXFSZ
    assert file.stat().st_size <= 2000


def test_a_library_writes_no_file_over_what_was_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets an error; afterwards files are as large as ever."""
    monkeypatch.setattr(limited, "SMALL_FILES", 1000)
    file = tmp_path / "file"
    with limited.no_file_over(2000), pytest.raises(OSError, match="too large"):
        file.write_bytes(bytes(5000))
    assert file.write_bytes(bytes(5000)) == 5000


def test_a_fifo_without_a_writer_is_empty(tmp_path: Path) -> None:
    """As a sites.json it would keep a listener waiting for ever; of another one all is read."""
    os.mkfifo(tmp_path / "fifo")
    assert limited.read_limited(tmp_path / "fifo", 9) == b""
    reader, writer = os.pipe()
    os.write(writer, b"12")

    def end() -> None:
        os.write(writer, b"3")
        os.close(writer)

    Timer(0.1, end).start()
    assert limited.read_limited(f"/dev/fd/{reader}", 3) == b"123"
    os.close(reader)


def test_a_file_that_does_not_end_is_not_read_on() -> None:
    """Of grid storage, by gfal-cat: it is longer than it was listed."""
    passed = 0

    class Far:
        def run(self, *_command: str, output: Callable[[bytes], object]) -> None:
            nonlocal passed
            while True:
                passed += 10
                output(bytes(10))

        def url(self, path: object) -> str:
            return str(path)

        shown = url

    far, root = cast("Any", Far()), FarPath(b"/x")
    meter = Meter(lambda _done, _total: None, 100)
    with pytest.raises(Retry, match="changed while it was read"):
        _GridReading(far, root, meter, RateLimiter(None)).digest(Seen(b"f", "file", 100, 0))
    assert passed == 110


@given(st.integers(0, 20), st.integers(0, 20))
def test_rows_are_taken_up_to_a_limit(number: int, limit: int) -> None:
    """All of them, or none that could pass for all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limited, "ROWS", limit)
        if number <= limit:
            assert list(limited.rows_limited(range(number))) == list(range(number))
            return
        with pytest.raises(ValueError, match=f"more than {limit} rows"):
            list(limited.rows_limited(range(number)))


@pytest.mark.parametrize("limit", [2, 3])
def test_a_tree_on_our_disk_is_listed_up_to_a_number(
    limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may fill a directory, as those who push into it and jobs do; it is not read on."""
    monkeypatch.setattr(limited, "ROWS", limit)
    (tmp_path / "run" / "inner").mkdir(parents=True)
    for name in ("a", "inner/b"):
        (tmp_path / "run" / name).touch()
    run = confine(str(tmp_path / "run"), [str(tmp_path)])
    if limit == 3:
        assert len(scan(run).items) == 3
        return
    with pytest.raises(GiveUp, match="run holds more than 2 files"):
        scan(run)


# -- a far end ------------------------------------------------------------------------------------


@given(st.lists(st.text("ab\n", min_size=1, max_size=9), max_size=9), st.integers(1, 9))
def test_lines_of_a_far_end(parts: list[str], most: int) -> None:
    """They come in turn, whole and with what follows the last, and none is longer than allowed."""

    async def read_all() -> list[bytes]:
        stream = asyncio.StreamReader()
        for part in parts:
            stream.feed_data(part.encode())
        stream.feed_eof()
        got = []
        while line := await _line(stream, most):  # type: ignore[arg-type]  # asyncssh's, the same
            got.append(line)
        return got

    lines = "".join(parts).encode().splitlines(keepends=True)
    if all(len(line) <= most for line in lines):
        assert aio.run(read_all()) == lines
    else:
        with pytest.raises(ValueError, match=f"more than {most} bytes"):
            aio.run(read_all())


async def test_a_directory_of_a_far_end_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its names are counted as they come, not when all are there."""
    monkeypatch.setattr(limited, "ROWS", 10)
    given_out: list[bytes] = []

    class Endless:
        async def scandir(self, path: bytes) -> AsyncIterator[SFTPName]:
            while len(given_out) < 100:
                given_out.append(b"%d" % len(given_out))
                yield SFTPName(given_out[-1], attrs=SFTPAttrs(permissions=stat.S_IFREG))

    endpoint = SimpleNamespace(host="far", port=22)
    remote = Remote(cast("Any", endpoint), cast("Any", Endless()))
    with pytest.raises(GiveUp, match="holds more than 10 files"):
        await remote._list(FarPath(b"/run"), b"", [])
    assert len(given_out) == 11


@pytest.mark.replicaset
async def test_a_table_is_read_up_to_a_limit(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of its rows, as they were written, or none; the error names it."""
    written = [{"_id": number, "at": utcnow(), "text": "x" * 100} for number in range(300)]
    async with engine.opened(database) as db:
        with MongoClient[dict[str, Any]](database.uri) as client:
            client[database.name]["gains"].insert_many(written)
        assert await db.table("gains") == written
        assert await db.table("none") == []
        monkeypatch.setattr(run_queries, "TABLE", 20_000)
        with pytest.raises(GiveUp, match="the table gains has more than 20,000 bytes"):
            await db.table("gains")


@pytest.mark.replicaset
async def test_a_manifest_is_read_up_to_a_limit(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that somebody has made larger than any can be counts as missing, and is made anew."""
    manifest = Manifest([Item(b"%d" % number, "file", 1, bytes(32)) for number in range(300)])
    async with engine.opened(database) as db:
        await db.store_manifest(manifest.digest, manifest.to_rows())
        assert await db.load_manifest(manifest.digest) == manifest.to_rows()
        monkeypatch.setattr(manifests, "MANIFEST", 20_000)
        assert await db.load_manifest(manifest.digest) is None
