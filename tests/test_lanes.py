"""Which ways the bytes of files take, what they do where one is missing, and odd SFTP servers."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncssh
import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from caxev.core.errors import Retry
from caxev.transfer.ssh.channels import SshProgram
from caxev.transfer.ssh.openssh import host_name, shell
from caxev.transfer.ssh.pool import ON_ONE, channels_for
from caxev.transfer.ssh.sftp import Lost
from tests.sshd import Server, Transfer, pull, push, remote_manifest, sshd
from tests.test_files import quiet
from tests.test_ssh import Move, Ways, big_file, digested, fast_push, ways

__all__ = ["sshd", "ways"]

LARGE = 48  # MiB; worth a connection of its own

sshd_wanted = pytest.mark.sshd


@given(
    weight=st.integers(0, 1 << 40),
    round_trip=st.floats(0, 2),
    nstreams=st.integers(1, 64),
    cores=st.integers(0, 64),
)
def test_there_are_lanes_and_not_too_many(
    weight: int, round_trip: float, nstreams: int, cores: int
) -> None:
    """At least one; no more than are allowed, than a connection holds, than there is `ssh` for."""
    programs, channels = channels_for(weight, round_trip, nstreams, cores=cores)
    assert 1 <= programs + channels <= nstreams
    assert programs <= 8
    assert cores or not programs
    assert channels <= ON_ONE


def test_lanes_are_for_what_they_are_good_for() -> None:
    """Little work, or a short link: no more than it takes. A long link: channels besides."""
    assert channels_for(1000, 0.0, 16, cores=2) == (0, 1)
    assert channels_for(1 << 30, 0.0, 16, cores=2) == (2, 0)
    assert channels_for(1 << 30, 0.1, 16, cores=2) == (8, 8)
    assert channels_for(1 << 30, 0.01, 16, cores=2) == (2, 0)
    assert channels_for(1 << 30, 0.1, 10, cores=2) == (2, 8)
    assert channels_for(1000, 0.1, 16, cores=2) == (0, 8)


def _ssh(directory: Path, script: str) -> str:
    """A PATH where `ssh` is this script."""
    directory.mkdir()
    (directory / "ssh").write_text(f"#!/bin/sh\n{script}\n")
    (directory / "ssh").chmod(0o755)
    return f"{directory}:{os.environ['PATH']}"


some = pytest.mark.parametrize("move", [pull, fast_push])


@sshd_wanted
@some
@pytest.mark.parametrize("script", [None, "echo no way >&2; exit 255", "exec sleep 600"])
def test_without_a_good_ssh_channels_do(
    ways: Ways, move: Move, script: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no `ssh`, or it gets nowhere: the connection that there is carries the bytes."""
    if script is None:
        monkeypatch.setattr("shutil.which", lambda _name: None)
    elif script.startswith("exec"):
        # It never answers, and channels are there from the beginning, as on a long link.
        monkeypatch.setattr(
            "caxev.transfer.ssh.pool.channels_for", lambda *_args, cores: (cores > 0, 1)
        )
    monkeypatch.setenv("PATH", _ssh(tmp_path / "bin", script or "exit 1"))
    big_file(ways.source / "run", LARGE)
    moved = ways.move(move)
    assert moved.manifest == digested(ways.target / "run")


@sshd_wanted
@some
def test_our_ssh_takes_the_bytes(
    ways: Ways, move: Move, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is told the host's key that was seen, whichever way that is trusted, and nothing else."""
    calls = tmp_path / "calls"
    path = _ssh(tmp_path / "bin", f'echo "$@" >> {calls}; PATH="$REAL" exec ssh "$@"')
    monkeypatch.setenv("REAL", os.environ["PATH"])
    monkeypatch.setenv("PATH", path)
    run = big_file(ways.source / "run", LARGE)
    transfer = ways.transfer(move)
    pinned = evolve(transfer.endpoint, known_hosts="/nowhere", host_key=ways.server.fingerprint)
    moved = move(evolve(transfer, endpoint=pinned), report=quiet)
    assert moved.manifest == digested(run) == digested(ways.target / "run")
    assert "StrictHostKeyChecking=yes" in calls.read_text()


@sshd_wanted
def test_an_ssh_that_trusts_another_key_is_of_no_use(ways: Ways, tmp_path: Path) -> None:
    """Nobody is reached whose key asyncssh did not see: the program has that one alone."""
    other = asyncssh.generate_private_key("ssh-ed25519")
    endpoint = ways.server.endpoint
    with shell(endpoint, other) as command:
        program = SshProgram([*command, "-s", host_name(endpoint), "sftp"])
        try:
            with pytest.raises(Lost):
                program.sftp.greet()
        finally:
            program.close()


class _Odd(asyncssh.SFTPServer):
    """Answers in any order, and gives fewer bytes than it is asked for."""

    async def read(self, file_obj: object, offset: int, size: int) -> bytes:
        await asyncio.sleep(random.random() / 100)
        found = super().read(file_obj, offset, min(size, 100_000))
        assert isinstance(found, bytes)
        return found

    async def write(self, file_obj: object, offset: int, data: bytes) -> int:
        await asyncio.sleep(random.random() / 100)
        written = super().write(file_obj, offset, data)
        assert isinstance(written, int)
        return written


class _Full(asyncssh.SFTPServer):
    """Has no room for anything."""

    def write(self, file_obj: object, offset: int, data: bytes) -> int:
        raise asyncssh.SFTPNoSpaceOnFilesystem("no room")


class _Stale(asyncssh.SFTPServer):
    """Cannot tell what the directory is in which copies are."""

    def realpath(self, path: bytes) -> bytes:
        if path.endswith(b"/source"):
            raise asyncssh.SFTPFailure("stale file handle")
        found = super().realpath(path)
        assert isinstance(found, bytes)
        return found


@contextmanager
def serving(server: Server, factory: type[asyncssh.SFTPServer]) -> Iterator[int]:
    """An asyncssh server with the same keys, in a thread; its port."""
    # Not asyncio's default, which trio_asyncio replaces: see `caxev.aio.run`.
    loop = asyncio.SelectorEventLoop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> asyncssh.SSHAcceptor:
        return await asyncssh.listen(
            "127.0.0.1",
            0,
            server_host_keys=[str(server.directory / "host_key")],
            authorized_client_keys=str(server.directory / "user_key.pub"),
            sftp_factory=factory,
        )

    async def stop(acceptor: asyncssh.SSHAcceptor) -> None:
        acceptor.close()
        await acceptor.wait_closed()

    try:
        acceptor = asyncio.run_coroutine_threadsafe(start(), loop).result(60)
        yield acceptor.get_port()
        asyncio.run_coroutine_threadsafe(stop(acceptor), loop).result(60)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def at(port: int, ways: Ways, move: Move) -> Transfer:
    transfer = ways.transfer(move)
    endpoint = evolve(transfer.endpoint, port=port, host_key=ways.server.fingerprint)
    return evolve(transfer, endpoint=endpoint)


@sshd_wanted
@pytest.mark.parametrize("move", [pull, push])
def test_a_server_may_answer_in_any_order(ways: Ways, move: Move) -> None:
    """Answers belong to their requests, and what is missing of one is asked for again."""
    run = big_file(ways.source / "run", 9)
    with serving(ways.server, _Odd) as port:
        moved = move(at(port, ways, move), report=quiet)
        assert moved.manifest == digested(run) == digested(ways.target / "run")
        if move is push:
            assert remote_manifest(at(port, ways, move), report=quiet) == moved.manifest


@sshd_wanted
def test_a_server_that_takes_nothing(ways: Ways) -> None:
    """What it says about that is handed on, and it may pass."""
    big_file(ways.source / "run", 1)
    with (
        serving(ways.server, _Full) as port,
        pytest.raises(Retry, match=r"no room"),
    ):
        push(at(port, ways, push), report=quiet)


@sshd_wanted
def test_a_server_that_cannot_tell_where_a_root_is(ways: Ways) -> None:
    """Nothing says that the copy is outside of it: that may pass."""
    big_file(ways.source / "run", 1)
    with serving(ways.server, _Stale) as port, pytest.raises(Retry, match="stale file handle"):
        pull(at(port, ways, pull), report=quiet)
