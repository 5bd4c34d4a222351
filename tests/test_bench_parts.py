"""The benchmarks' own parts: the link that delays, and that each benchmark runs and reports."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from tests import sshd
from tests.bench import proxy
from tests.bench.checksum import rotated

ROOT = Path(__file__).parents[1]
DELAY = 0.04
FAST = 1e9
PATIENCE = 60  # seconds
Serve = Callable[[socket.socket], object]


@contextmanager
def served(serve: Serve, delay: float = DELAY, rate: float = FAST) -> Iterator[int]:
    """The port of a proxy to a server that gives each connection to `serve`, and closes it then."""

    def handle(connection: socket.socket) -> None:
        with connection:
            serve(connection)

    def accept(listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:  # the end of the test
                return
            connection.settimeout(PATIENCE)
            pool.submit(handle, connection)

    with ThreadPoolExecutor(16) as pool, socket.create_server(("127.0.0.1", 0)) as listening:
        pool.submit(accept, listening)
        try:
            with proxy.running(listening.getsockname()[1], delay, rate) as port:
                yield port
        finally:
            listening.shutdown(socket.SHUT_RDWR)


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), PATIENCE)


def take(connection: socket.socket, count: int | None = None) -> bytes:
    """So many bytes, or all until the end."""
    parts = []
    while count is None or count > 0:
        part = connection.recv(1 << 20 if count is None else count)
        if not part:
            break
        parts.append(part)
        count = None if count is None else count - len(part)
    return b"".join(parts)


def echo(connection: socket.socket) -> None:
    while part := connection.recv(1 << 16):
        connection.sendall(part)


# -- the link -------------------------------------------------------------------------------------


def test_an_echo_takes_a_round_trip() -> None:
    """No answer is there sooner than the delay allows, and the first one pays for a handshake."""
    with served(echo) as port:
        began = time.monotonic()
        with connect(port) as connection:
            for round_trips in (2, 3, 4):
                connection.sendall(b"x")
                assert take(connection, 1) == b"x"
                assert time.monotonic() - began >= 2 * DELAY * round_trips


def test_a_greeting_takes_two_round_trips() -> None:
    """One for the handshake; the server learns that it is over half a round trip later."""
    with served(lambda connection: connection.sendall(b"hello")) as port:
        began = time.monotonic()
        with connect(port) as connection:
            assert take(connection) == b"hello"
        assert time.monotonic() - began >= 4 * DELAY


def test_all_connections_share_one_rate() -> None:
    """Two at once take as long as what they carry together."""
    size, rate = 500_000, 2e6

    def swallow(connection: socket.socket) -> None:
        take(connection, size)
        connection.sendall(b"k")

    def send(port: int) -> bytes:
        with connect(port) as connection:
            connection.sendall(bytes(size))
            return take(connection, 1)

    with served(swallow, rate=rate) as port, ThreadPoolExecutor(2) as pool:
        began = time.monotonic()
        assert list(pool.map(send, [port, port])) == [b"k", b"k"]
        assert time.monotonic() - began >= 2 * size / rate


def test_bytes_arrive_in_order_and_whole() -> None:
    """What several connections send at once comes back to each as it was."""

    def there_and_back(port: int) -> bool:
        sent = os.urandom(3_000_000)
        with connect(port) as connection, ThreadPoolExecutor(1) as pool:
            sending = pool.submit(connection.sendall, sent)
            found = take(connection, len(sent))
            sending.result()
        return found == sent

    with served(echo) as port, ThreadPoolExecutor(3) as pool:
        assert all(pool.map(there_and_back, [port] * 3))


def test_an_end_is_passed_on_after_all_before_it() -> None:
    """A side that ends its sending is answered still; one that closes has all it sent arrive."""

    def answer_at_the_end(connection: socket.socket) -> None:
        connection.sendall(take(connection)[::-1])

    sent = os.urandom(200_000)
    with served(answer_at_the_end) as port, connect(port) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        assert take(connection) == sent[::-1]


@pytest.mark.parametrize("abrupt", [False, True])
def test_closing_one_side_closes_the_other(abrupt: bool) -> None:
    """Whether it says goodbye or is reset, the server's connection ends too."""
    rest: Queue[bytes] = Queue()

    def greet_and_wait(connection: socket.socket) -> None:
        connection.sendall(b"hello")
        rest.put(take(connection))

    with served(greet_and_wait) as port:
        with connect(port) as connection:
            assert take(connection, 5) == b"hello"
            if abrupt:
                linger = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        assert rest.get(timeout=PATIENCE) == b""


def test_a_refused_connection_is_closed() -> None:
    """Where nobody listens the client is told so, after the handshake."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with proxy.running(port, DELAY, FAST) as link, connect(link) as connection:
        assert take(connection) == b""


def test_what_is_under_way_is_bounded() -> None:
    """Where nobody takes the bytes at the far end, the sender has to wait."""
    most, sent, over = 256 << 20, 0, threading.Event()
    with served(lambda _: over.wait(PATIENCE)) as port, connect(port) as connection:
        connection.settimeout(1)
        with suppress(TimeoutError):
            while sent < most:
                sent += connection.send(bytes(1 << 20))
        over.set()
    assert sent < most


# -- the benchmarks -------------------------------------------------------------------------------


def bench(*arguments: str) -> dict[str, Any]:
    """Run a benchmark; the object of its last line."""
    command = [sys.executable, "-m", "tests.bench", *arguments, "--quick", "--json"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def test_everybody_begins_a_round_in_turn() -> None:
    """As many rounds as there are contenders: each has been first once, and nobody is left out."""
    names = ["a", "b", "c"]
    rounds = [rotated(names, n) for n in range(3)]
    assert sorted(order[0] for order in rounds) == names
    assert all(sorted(order) == names for order in rounds)


def test_checksum_reports() -> None:
    """Each contender has a time for each work, and a ratio to checksumdir, which has 1."""
    rows = bench("checksum")["rows"]
    assert {tuple(row) for row in rows} == {("work", "name", "seconds", "gb_per_s", "ratio")}
    assert {row["ratio"] for row in rows if row["name"] == "checksumdir"} == {1}
    ours = {(row["work"], row["name"]) for row in rows if "manifest" in row["name"]}
    assert len(ours) == 4


@pytest.fixture
def with_sshd() -> None:
    if reason := sshd.missing():
        pytest.skip(reason)


@pytest.mark.sshd
@pytest.mark.usefixtures("with_sshd")
def test_transfer_reports() -> None:
    """Each work, direction and care has one row: ours both ways, beside all peers."""
    rows = bench("transfer", "--only", "20x20KiB")["rows"]
    keys = {"work", "direction", "link", "verified", "seconds", "sftp_seconds", "peers"}
    assert all(row.keys() == keys for row in rows)
    cases = [(row["direction"], row["verified"]) for row in rows]
    assert cases == [(d, v) for d in ("pull", "push") for v in (False, True)]
    assert {"scp", "scp GCM"} <= rows[0]["peers"].keys()


@pytest.mark.sshd
@pytest.mark.usefixtures("with_sshd")
def test_memory_reports() -> None:
    """Each of our variants has a peak in each direction."""
    rows = bench("transfer", "--memory-gb", "0.02")["memory"]
    assert {row["direction"] for row in rows} == {"pull", "push"}
    assert all(row["peak_mb"] > 0 for row in rows)


@pytest.mark.replicaset
def test_backlog_reports() -> None:
    """A thousand times as much is owed; what is held in memory is bounded."""
    found = bench("backlog", "--reactions", "20000", "--seconds", "2")
    assert found["reactions"] == 20_000
    assert found["reactions_per_s"] > 0
    assert found["peak_mb"] < found["peak_mb_of_few"] + 50


@pytest.mark.replicaset
@pytest.mark.parametrize(
    "rows", ["ledger,first_look,scan,changes,listeners", "tags,copies,owed,run,status,rm"]
)
def test_scale_reports(rows: str) -> None:
    """Each row has figures, beside those of a bare loop in the same unit if it has a peer."""
    found = bench("scale", "--only", rows, "--runs", "40", "--few", "24", "--seconds", "1")
    assert found["runs"] == 40
    keys = {"row", "what", "value", "unit", "bare", "ratio"}
    assert all(row.keys() == keys for row in found["rows"])
    measured = {row["row"] for row in found["rows"]}
    wanted = set(rows.replace("changes", "verifying,transferred").split(","))
    assert measured == wanted


@pytest.mark.tape
def test_tape_reports() -> None:
    """Staging by hard links writes next to nothing, whatever the size."""
    found = bench("tape")
    assert found["written_bytes"] <= 1.05 * found["run_bytes"]
    assert found["run_bytes"] == 16 << 20
