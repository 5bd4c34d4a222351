"""The account that other sites log in to, confined as deploy/ shows it, and what SSH must be."""

from __future__ import annotations

import asyncio
import getpass
import os
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import asyncssh
import pytest
from attrs import define, evolve

from caxev.job import GiveUp, Retry
from caxev.ssh import Transfer, check, pull, push
from caxev.ssh.endpoint import connected, sftp_session
from tests import sshd as servers
from tests.test_files import make_run, quiet
from tests.test_ssh import AGENT, digested

pytestmark = pytest.mark.sshd

DEPLOYED = Path(__file__).parents[1] / "deploy" / "sshd_caxev.conf"
OLD = """\
KexAlgorithms diffie-hellman-group14-sha1
"""


@define
class Confined:
    """A server whose one account is confined; `root` is what it sees as ``/``."""

    server: servers.Server
    root: Path

    def transfer(self, local: Path, remote: str, **fields: object) -> Transfer:
        return Transfer(
            self.server.endpoint,
            remote_path=remote,
            remote_roots=("/data/raw",),
            local_path=str(local),
            local_roots=(str(local.parent),),
            **fields,  # type: ignore[arg-type]
        )

    def talk(self, do: Callable[[asyncssh.SSHClientConnection], Awaitable[object]]) -> object:
        async def talking() -> object:
            async with connected(self.server.endpoint) as connection:
                return await asyncio.wait_for(do(connection), 60)

        return asyncio.run(talking())


@pytest.fixture(scope="module")
def confined(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Confined]:
    """The deployed configuration, with the names of this test in place of those of a site."""
    if (reason := servers.missing()) is not None:
        pytest.skip(reason)
    if os.geteuid() != 0:
        pytest.skip("only root can confine an account to a directory")
    directory = tmp_path_factory.mktemp("confined")
    # Nobody but root may be able to write to any directory above: not so below /tmp.
    root = Path(tempfile.mkdtemp(prefix="caxev-test-", dir="/var/lib"))
    try:
        root.chmod(0o755)
        (root / "data" / "raw").mkdir(parents=True)
        text = DEPLOYED.read_text()
        for name, ours in (
            ("User caxev-data", f"User {getpass.getuser()}"),
            ("/etc/ssh/caxev/%u", str(directory / "user_key.pub")),
            ("/srv/caxev\n", f"{root}\n"),
        ):
            assert name in text
            text = text.replace(name, ours)
        with servers.running(directory, text) as server:
            yield Confined(server, root)
    finally:
        shutil.rmtree(root)


@pytest.mark.parametrize("agent", [None, AGENT])
def test_copies_come_and_go(confined: Confined, tmp_path: Path, agent: str | None) -> None:
    """Push and pull work, by SFTP even where a receiver is asked for; modes are as they must be."""
    source = make_run(tmp_path / "source")
    name = "run" if agent is None else "run-by-agent"
    push(confined.transfer(source, f"/data/raw/{name}", agent=agent), report=quiet)
    back = tmp_path / name
    pull(confined.transfer(back, f"/data/raw/{name}", agent=agent), report=quiet)
    assert digested(back) == digested(source)
    there = confined.root / "data" / "raw" / name
    assert digested(there) == digested(source)
    modes = {path.lstat().st_mode & 0o777 for path in there.rglob("*") if not path.is_symlink()}
    assert modes <= {0o644, 0o755}


@pytest.mark.parametrize("command", ["id", "cat /etc/passwd", "/bin/sh", ""])
def test_no_command_runs(confined: Confined, command: str) -> None:
    """Whatever is asked for, SFTP answers, which does not understand it; there is no shell."""

    async def run(connection: asyncssh.SSHClientConnection) -> object:
        process = await connection.create_process(command or None)
        with suppress(BrokenPipeError):  # it may have hung up by now
            process.stdin.write("id\n")
            process.stdin.write_eof()
        said = await process.stdout.read()
        process.close()
        return said

    said = confined.talk(run)
    assert "uid=" not in str(said)
    assert "root:" not in str(said)


def test_nothing_is_forwarded(confined: Confined) -> None:
    """No port, no socket, no terminal."""

    async def forwards(connection: asyncssh.SSHClientConnection) -> None:
        with pytest.raises(asyncssh.ChannelOpenError):
            await connection.open_connection("127.0.0.1", confined.server.port)
        with pytest.raises(asyncssh.ChannelOpenError):
            await connection.open_unix_connection("/run/x")
        with pytest.raises(asyncssh.ChannelListenError):
            await connection.forward_remote_port("127.0.0.1", 0, "127.0.0.1", 22)
        with pytest.raises(asyncssh.ChannelOpenError):
            await connection.create_process(term_type="xterm")

    confined.talk(forwards)


def test_nothing_outside_is_seen(confined: Confined) -> None:
    """Its root is the whole world to it; a link out of it leads to nothing."""

    async def look() -> list[bytes]:
        async with sftp_session(confined.server.endpoint) as sftp:
            for path in (b"/etc/passwd", b"/data/../../etc/passwd", b"/proc/self/root/etc/passwd"):
                assert not await sftp.exists(path)
            await sftp.symlink(b"/etc/passwd", b"/data/raw/link")
            assert not await sftp.isfile(b"/data/raw/link")
            await sftp.unlink(b"/data/raw/link")
            return [bytes(name) for name in await sftp.listdir(b"/")]

    assert sorted(asyncio.run(look())) == [b".", b"..", b"data"]


def test_a_password_is_no_login(confined: Confined) -> None:
    """Nobody gets in without a key that root has put down."""

    async def knock() -> None:
        await asyncssh.connect(
            "127.0.0.1",
            confined.server.port,
            username=getpass.getuser(),
            password="x",
            known_hosts=None,
            client_keys=None,
            agent_path=None,
            config=None,
        )

    with pytest.raises(asyncssh.PermissionDenied):
        asyncio.run(knock())


def test_the_pinned_key_is_the_only_one(confined: Confined) -> None:
    """A fingerprint in sites.json counts, whatever known_hosts says."""
    server = confined.server
    assert check(evolve(server.endpoint, host_key=server.fingerprint, known_hosts="/none"))
    with pytest.raises(GiveUp, match="not the one pinned"):
        check(evolve(server.endpoint, host_key="SHA256:" + "A" * 43))


def test_old_algorithms_are_refused(tmp_path: Path) -> None:
    """A server that knows nothing newer is not spoken with."""
    if (reason := servers.missing()) is not None:
        pytest.skip(reason)
    # Whoever notices first hangs up.
    wanted = pytest.raises((GiveUp, Retry), match=r"no algorithm in common|was lost")
    with servers.running(tmp_path, OLD) as server, wanted:
        check(server.endpoint)
