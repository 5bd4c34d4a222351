"""The account that other sites log in to, confined as deploy/ shows it, and what SSH must be."""

from __future__ import annotations

import asyncio
import getpass
import os
import pwd
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import asyncssh
import pytest
from attrs import define, evolve

from caxev import aio, transfer
from caxev.config import Permission, Site
from caxev.core.errors import Denied, GiveUp, Retry
from caxev.files import erase, standing
from caxev.handlers import permissions
from caxev.transfer import Route
from caxev.transfer.ssh import Endpoint
from caxev.transfer.ssh.endpoint import connected, sftp_session
from tests import sshd as servers
from tests.forked import forked
from tests.sshd import Transfer, check, pull, push
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
    account: str

    @property
    def endpoint(self) -> Endpoint:
        return evolve(self.server.endpoint, username=self.account)

    def transfer(self, local: Path, remote: str, **fields: object) -> Transfer:
        return Transfer(
            self.endpoint,
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

        return aio.run(talking())


@pytest.fixture(scope="module")
def confined(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Confined]:
    """A server whose account has our own name, so that it owns what we do."""
    with confining(tmp_path_factory.mktemp("confined"), getpass.getuser()) as server:
        yield server


@contextmanager
def confining(directory: Path, account: str) -> Iterator[Confined]:
    """Serve by the deployed configuration, with names of ours in place of those of a site."""
    if (reason := servers.missing()) is not None:
        pytest.skip(reason)
    if os.geteuid() != 0:
        pytest.skip("only root can confine an account to a directory")
    # Nobody but root may be able to write to any directory above: not so below /tmp.
    root = Path(tempfile.mkdtemp(prefix="caxev-test-", dir="/var/lib"))
    try:
        root.chmod(0o755)
        raw = root / "data" / "raw"
        raw.mkdir(parents=True)
        shutil.chown(raw, account)
        servers.make_key(directory / "user_key")
        keys = root / "data" / "keys"  # the account must be able to read them
        shutil.copy(directory / "user_key.pub", keys)
        text = DEPLOYED.read_text()
        for name, ours in (
            ("User caxev-data", f"User {account}"),
            ("/etc/ssh/caxev/%u", str(keys)),
            ("/srv/caxev\n", f"{root}\n"),
        ):
            assert name in text
            text = text.replace(name, ours)
        with servers.running(directory, text) as server:
            yield Confined(server, root, account)
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


def test_the_listener_owns_what_is_pushed(tmp_path: Path) -> None:
    """A process of the account's uid gives it its permissions, repairs it and erases it."""
    source = make_run(tmp_path / "source")
    with confining(tmp_path, "daemon") as confined:
        push(confined.transfer(source, "/data/raw/run"), report=quiet)
        raw = confined.root / "data" / "raw"
        pushed, good = raw / "run", raw / "good"
        shutil.copytree(source, good, symlinks=True)
        assert pushed.stat().st_uid == pwd.getpwnam("daemon").pw_uid
        data = max(pushed.rglob("*"), key=lambda path: path.lstat().st_size * path.is_file())
        data.write_bytes(data.read_bytes()[:-1] + b"?")
        here, there = Site("here", dir_raw=str(raw)), Site("there", "local", dir_raw=str(raw))
        mending = Route(here, there, str(pushed), str(good), again=True)
        transfer.mover("local")  # what is imported only now may not be readable then

        def listener() -> None:
            permissions.apply(str(pushed), here.roots, Permission(mode=0o750))
            transfer.pull(mending, report=quiet)
            assert digested(pushed) == digested(good)
            mark = standing(str(pushed), here.roots, None)
            erase(str(pushed), here.roots, mark)
            assert not pushed.exists()

        assert as_account("daemon", listener) == 0
        assert not pushed.exists()


def as_account(name: str, do: Callable[[], None]) -> int:
    """Have a process of that account's uid do it; its exit status."""
    account = pwd.getpwnam(name)

    def done() -> None:
        os.setgroups([])
        os.setgid(account.pw_gid)
        os.setuid(account.pw_uid)
        do()

    return forked(done)


def test_the_receiving_account_has_the_listeners_uid(tmp_path: Path) -> None:
    """The command that makes it does so, in an empty list of accounts."""
    if (useradd := shutil.which("useradd", path="/usr/sbin:/sbin")) is None or os.geteuid() != 0:
        pytest.skip("only root makes accounts, by useradd (Debian: passwd)")
    (line,) = (one[2:].strip() for one in DEPLOYED.read_text().splitlines() if "useradd" in one)
    line = line.replace("$(id -u caxev)", "997").replace("$(id -g caxev)", "995")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "shadow").touch()
    (tmp_path / "etc" / "passwd").write_text("caxev:x:997:995::/var/lib/caxev:/bin/sh\n")
    (tmp_path / "etc" / "group").write_text("caxev:x:995:\n")
    command = [useradd, "--prefix", str(tmp_path), *shlex.split(line)[1:]]
    subprocess.run(command, check=True)
    _, made = (tmp_path / "etc" / "passwd").read_text().splitlines()
    assert made == "caxev-data:x:997:995::/:/usr/sbin/nologin"


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

    assert sorted(aio.run(look())) == [b".", b"..", b"data"]


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
        aio.run(knock())


def test_the_pinned_key_is_the_only_one(confined: Confined) -> None:
    """A fingerprint in sites.json counts, whatever known_hosts says."""
    server = confined.server
    assert check(evolve(server.endpoint, host_key=server.fingerprint, known_hosts="/none"))
    with pytest.raises(Denied, match="not the one pinned"):
        check(evolve(server.endpoint, host_key="SHA256:" + "A" * 43))


def test_old_algorithms_are_refused(tmp_path: Path) -> None:
    """A server that knows nothing newer is not spoken with."""
    if (reason := servers.missing()) is not None:
        pytest.skip(reason)
    # Whoever notices first hangs up.
    wanted = pytest.raises((GiveUp, Retry), match=r"no algorithm in common|was lost")
    with servers.running(tmp_path, OLD) as server, wanted:
        check(server.endpoint)
