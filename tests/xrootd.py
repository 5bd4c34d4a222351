"""A real XRootD server on loopback, for tests. It needs no root.

XRootD listens on every address of its machine and cannot be told otherwise. So it runs in a network
namespace of its own, where there is loopback and nothing else; a relay takes what comes to
127.0.0.1 here to 127.0.0.1 there. Run as a program this module is that relay.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Final

import pytest
from attrs import define

_CONFIG = """\
all.export {data}
all.adminpath {directory}/admin
all.pidpath {directory}/admin
xrd.port {port}
xrd.network nodnr norpipa
xrootd.chksum max 2 adler32
xrootd.async off
"""
_PATIENCE: Final = 120.0  # seconds
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 1
_USER: Final = 1000  # whom XRootD takes itself for: it refuses to be root
_CHUNK: Final = 1 << 18


@define
class Server:
    """A running XRootD. It serves the directory `data` under its own path."""

    data: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"root://127.0.0.1:{self.port}/"

    def stop(self) -> None:
        """End the server and its relay."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stdin is not None:
            self.process.stdin.close()


def missing() -> str | None:
    """Why there can be no server here; None where there can."""
    for program, package in (("xrootd", "xrootd-server"), ("gfal-copy", "gfal2-util-scripts")):
        if shutil.which(program) is None:
            return f"{program} is not installed (Debian: {package})"
    trial = [sys.executable, "-c", "from tests.xrootd import enter; enter()"]
    if subprocess.run(trial, capture_output=True, check=False).returncode:
        return "this machine lets nobody make a network namespace"
    return None


@contextmanager
def running(directory: Path, data: Path) -> Iterator[Server]:
    """Start a server for `data` that keeps its things in `directory`."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        port: int = listener.getsockname()[1]
        text = _CONFIG.format(directory=directory, data=data, port=port)
        (directory / "config").write_text(text)
        command = [sys.executable, "-m", "tests.xrootd", str(listener.fileno()), str(directory)]
        with (directory / "relay.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # it ends with us
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
                start_new_session=True,
                cwd=Path(__file__).parents[1],
            )
    server = Server(data, port, process)
    try:
        _wait_until_up(server, directory)
        yield server
    finally:
        server.stop()


def _wait_until_up(server: Server, directory: Path) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not (directory / "up").exists():
        if server.process.poll() is not None or time.monotonic() > deadline:
            logs = [path.read_text(errors="replace") for path in directory.glob("*.log")]
            raise RuntimeError("xrootd did not start: " + "\n".join(logs))
        time.sleep(0.02)


def enter() -> None:
    """Move this process into namespaces of its own: users, and a network with loopback alone."""
    user, group = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    with socket.socket() as any_socket:
        up = struct.pack("16sh14x", b"lo", _IFF_UP)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, up)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{_USER} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{_USER} {group} 1")


def _serve(listener: socket.socket, directory: Path) -> None:
    """Start XRootD in a namespace and take connections to it. Never returns."""
    enter()
    (directory / "admin").mkdir(exist_ok=True)
    log = str(directory / "xrootd.log")
    command = ["xrootd", "-n", "t", "-c", str(directory / "config"), "-l", log, "-I", "v4"]
    xrootd = subprocess.Popen(command, stdin=subprocess.DEVNULL, cwd=directory)
    Thread(target=_end_with_parent, daemon=True).start()
    port = listener.getsockname()[1]
    while xrootd.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            break
        time.sleep(0.02)
    (directory / "up").touch()
    while xrootd.poll() is None:
        here, _ = listener.accept()
        try:
            there = socket.create_connection(("127.0.0.1", port))
        except OSError:
            here.close()
            continue
        for one, other in ((here, there), (there, here)):
            Thread(target=_relay, args=(one, other), daemon=True).start()


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGKILL)


def _relay(one: socket.socket, other: socket.socket) -> None:
    with suppress(OSError):
        while data := one.recv(_CHUNK):
            other.sendall(data)
    for end in (one, other):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def xrootd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of the test's own, for a directory of its own."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("xrootd")
    (directory / "data").mkdir()
    with running(directory, directory / "data") as server:
        yield server


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2]))
