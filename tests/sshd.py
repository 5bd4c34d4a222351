"""A real OpenSSH server on loopback with throw-away keys, for tests, campaigns and benchmarks."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from attrs import define, frozen

from caxev import aio
from caxev.config import Site
from caxev.files import Manifest, Moved, Report
from caxev.testing.mongod import start_with_us
from caxev.transfer import Route
from caxev.transfer.ssh import Endpoint, SshMover
from caxev.transfer.ssh.mover import _check

_CONFIG = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {directory}/host_key
AuthorizedKeysFile {directory}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
PermitUserEnvironment no
MaxStartups 100
Subsystem sftp internal-sftp
SetEnv HOME={directory}/home
"""
# An empty home: start-up files of a shell here take their time, and one that is killed in the midst
# of them may leave a lock behind.
_REAPER = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(36, 1)
os.execv(sys.argv[1], sys.argv[1:])
"""
# PR_SET_CHILD_SUBREAPER, which outlasts the exec. A session may go on after its connection was cut,
# as one that waits to open a FIFO: it then stays a process below sshd, and ends with it.
_PATIENCE = 120.0  # seconds


@define
class Server:
    """A running sshd. `directory` holds its keys, its configuration, known_hosts and its log."""

    directory: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(
            "127.0.0.1",
            port=self.port,
            username=getpass.getuser(),
            known_hosts=str(self.directory / "known_hosts"),
            identity=str(self.directory / "user_key"),
        )

    @property
    def fingerprint(self) -> str:
        """The host key's, as ``SHA256:...``."""
        shown = subprocess.check_output(["ssh-keygen", "-lf", self.directory / "host_key.pub"])
        return shown.decode().split()[1]

    def stop(self) -> None:
        """End the listening process and every session it has started."""
        ended = set[int]()
        while children := set(_children(self.process.pid)) - ended:
            for child in children:
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            ended |= children
            time.sleep(0.01)  # one that was just forked becomes a child of sshd
        self.process.kill()
        self.process.wait()


@frozen
class Transfer:
    """A copy to be moved between this machine and a server; `route` as the movers take it."""

    endpoint: Endpoint
    remote_path: str
    remote_roots: Sequence[str]
    local_path: str
    local_roots: Sequence[str]
    nstreams: int | None = None
    agent: str | None = None
    expected: Manifest | None = None
    max_rate: float | None = None
    min_free: int = 0
    again: bool = False
    found: Manifest | None = None
    checksum: str | None = None

    @property
    def route(self) -> Route:
        end = self.endpoint
        here = Site(
            "here",
            known_hosts=end.known_hosts,
            identity=end.identity,
            **_directories(self.local_roots),
        )
        there = Site(
            "there",
            hostname=end.host,
            port=end.port,
            username=end.username,
            host_key=end.host_key,
            nstreams=self.nstreams,
            receiver=self.agent,
            **_directories(self.remote_roots),
        )
        return Route(
            here,
            there,
            self.local_path,
            self.remote_path,
            self.expected,
            self.max_rate,
            self.min_free,
            self.again,
            self.found,
            self.checksum,
        )


def _directories(roots: Sequence[str]) -> dict[str, Any]:
    keys = ("dir_raw", "dir_processed", "dir_minitrees")
    known = {str(root): getattr(root, "marker", None) for root in roots}
    named = dict(zip(keys, known, strict=False))
    return {**named, "markers": {root: marker for root, marker in known.items() if marker}}


def pull(transfer: Transfer, *, report: Report) -> Moved:
    """Pull over SSH."""
    return SshMover().pull(transfer.route, report=report)


def push(transfer: Transfer, *, report: Report) -> Moved:
    """Push over SSH."""
    return SshMover().push(transfer.route, report=report)


def check(endpoint: Endpoint) -> str:
    """Connect and start SFTP."""
    return aio.run(_check(endpoint))


def remote_manifest(transfer: Transfer, *, report: Report) -> Manifest:
    """Read a copy back over SSH."""
    return SshMover().manifest(transfer.route, report=report)


def missing() -> str | None:
    """Why there can be no server here; None where there can."""
    for program in ("sshd", "ssh-keygen"):
        if _program(program) is None:
            return f"{program} is not installed (Debian: openssh-server)"
    return None


@contextmanager
def running(directory: Path, more: str = "") -> Iterator[Server]:
    """Start a server that keeps its things in `directory`; it is stopped when the block ends.

    `more` is added to its configuration.
    """
    for key in ("host_key", "user_key"):
        make_key(directory / key)
    (directory / "home").mkdir(exist_ok=True)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    server = _started(directory, more)
    try:
        yield server
    finally:
        server.stop()


def _started(directory: Path, more: str) -> Server:
    """A server that listens: its port could have been taken before it had it."""
    for left in (2, 1, 0):
        port = free_port()
        (directory / "config").write_text(_CONFIG.format(port=port, directory=directory) + more)
        write_known_hosts(directory, port)
        with (directory / "log").open("wb") as log:
            sshd = [_program("sshd") or "sshd", "-D", "-e", "-f", str(directory / "config")]
            command = [sys.executable, "-I", "-S", "-c", _REAPER, *sshd]
            process = start_with_us(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        server = Server(directory, port, process)
        try:
            _wait_until_up(server)
        except RuntimeError:
            server.stop()
            if not left:
                raise
        else:
            return server
    raise AssertionError


def make_key(path: Path) -> None:
    """Make an Ed25519 key pair without passphrase, where there is none yet."""
    if not path.exists():
        make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "throw-away", "-f", str(path)]
        subprocess.run(make, check=True)


def write_known_hosts(directory: Path, port: int, key: str = "host_key.pub") -> None:
    """Say in known_hosts that the server has this key."""
    public = (directory / key).read_text()
    (directory / "known_hosts").write_text(f"[127.0.0.1]:{port} {public}")


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_up(server: Server) -> None:
    """Wait until it listens by its own word: at its port another server could answer."""
    deadline = time.monotonic() + _PATIENCE
    while b"Server listening on" not in (log := (server.directory / "log").read_bytes()):
        if server.process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"sshd did not start: {log.decode(errors='replace')}")
        time.sleep(0.02)


def _children(parent: int) -> list[int]:
    """All processes below `parent`, deepest last."""
    try:
        own = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [pid for child in map(int, own) for pid in (child, *_children(child))]


_shared: list[Server] = []


@pytest.fixture
def sshd(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server; the next test has the same, unless this one stops it or changes what it knows."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    if not _shared or _shared[-1].process.returncode is not None:
        held = ExitStack()
        _shared.append(held.enter_context(running(tmp_path_factory.mktemp("sshd"))))
        request.config.add_cleanup(held.close)
    server = _shared[-1]
    before = _known(server)
    yield server
    if _known(server) != before:
        server.stop()


def _known(server: Server) -> dict[str, bytes]:
    files = (path for path in server.directory.iterdir() if path.is_file() and path.name != "log")
    return {path.name: path.read_bytes() for path in files}
