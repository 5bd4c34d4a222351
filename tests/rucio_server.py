"""A real Rucio server on loopback, for tests: SQLite, one gunicorn worker, two disks as RSEs.

Rucio's server has a virtual environment of its own, in the user's cache; it is made when it is
first needed, which takes half a minute, and kept for later runs of any checkout. What is simulated
is the transfer service alone (FTS in production): `RucioServer.replicate` copies the files that
rules wait for, and tells the server by its client.

As a collaboration does that names its scopes as XENON did, the server has a policy package that
allows scopes longer than 25 characters.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import pytest
from attrs import define, field

from caxev.testing.mongod import start_with_us

RSES: Final = ("DISK1", "DISK2", "DISK3")
ACCOUNT: Final = "root"
USERNAME: Final = "tester"
PASSWORD: Final = "throw-away"
_PATIENCE: Final = 180.0
_TO_DO: Final = ("REPLICATING", "STUCK")
"""What rules and locks are whose transfers are to be done, or done again."""
_CONFIG: Final = """\
[common]
logdir = {home}/log
loglevel = WARNING
mailtemplatedir = {home}/etc/mail_templates
[client]
rucio_host = {url}
auth_host = {url}
auth_type = userpass
username = {username}
account = {account}
request_retries = 1
auth_token_file_path = {home}/token
[database]
default = sqlite:///{home}/rucio.db
echo = false
pool_recycle = 3600
pool_reset_on_return = rollback
[bootstrap]
userpass_identity = {username}
userpass_pwd = {password}
userpass_email = {username}@localhost
[alembic]
cfg = {home}/etc/alembic.ini
[policy]
package = long_scopes
permission = generic
schema = generic
lfn2pfn_algorithm_default = hash
support = nobody@localhost
support_rucio = nobody@localhost
[core]
default_mail_from = rucio@localhost
[hermes]
services_list = elastic
elastic_endpoint = http://127.0.0.1:{messages}/
[trace]
tracedir = {home}/log
trace_host = {url}
"""
_ALEMBIC: Final = """\
[alembic]
script_location = {migrations}
sqlalchemy.url = sqlite:///{home}/rucio.db
[loggers]
keys = root
[handlers]
keys = console
[formatters]
keys = generic
[logger_root]
level = WARN
handlers = console
qualname =
[handler_console]
class = StreamHandler
args = (sys.stderr,)
level = NOTSET
formatter = generic
[formatter_generic]
format = %(levelname)-5.5s [%(name)s] %(message)s
"""
_BOOTSTRAP: Final = """\
from rucio.db.sqla.util import build_database, create_base_vo, create_root_account
build_database(); create_base_vo(); create_root_account()
"""


def missing() -> str | None:
    """Why there can be no server here; None where there can."""
    try:
        version("rucio-clients")
    except PackageNotFoundError:
        return "rucio-clients is not installed: pip install caxev[rucio]"
    return None


def server_python() -> Path:
    """The Python that has Rucio's server, of the client's version; made if it is not there."""
    wanted = version("rucio-clients")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "caxev"
    home = cache / f"rucio-server-{wanted}-{sys.implementation.cache_tag}"
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError:
        home = Path(sys.prefix) / home.name
        home.mkdir(exist_ok=True)
    python = home / "bin" / "python"
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several test runs one makes it
        if not ((home / "whole").exists() and python.exists()):
            venv.create(home, symlinks=True)
            subprocess.run([*_install(python), f"rucio=={wanted}", "gunicorn"], check=True)
            (home / "whole").touch()
    return python


def _install(python: Path) -> list[str]:
    """The command that installs packages for another Python, by what `deploy/setup.sh` uses."""
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--quiet", "--python", str(python)]
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-qq"]
    # Of the 90 MB the server imports little: compiling all of it takes a third of the time.
    return [*pip, "--no-compile", "--disable-pip-version-check"]


@define(eq=False)
class RucioServer:
    """A running server, and the directories of its RSEs."""

    home: Path
    port: int
    messages: int
    python: Path
    process: subprocess.Popen[bytes] | None = None
    _client: Any = field(init=False, default=None)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs that talks to this server."""
        return {"RUCIO_PASSWORD": PASSWORD, "RUCIO_HOME": str(self.home)}

    def disk(self, rse: str) -> Path:
        """Where an RSE keeps its files."""
        return self.home / rse.lower()

    def site(self, **fields: Any) -> dict[str, Any]:
        """The catalogue as an entry of sites.json."""
        return {
            "name": "rucio-catalogue",
            "method": "rucio",
            "hostname": self.url,
            "rucio_account": ACCOUNT,
            "rucio_upload_rse": RSES[0],
            "rucio": {
                "auth_type": "userpass",
                "username": USERNAME,
                "home": str(self.home),
                **fields.pop("rucio", {}),
            },
            **fields,
        }

    @property
    def client(self) -> Any:
        """A client of the test's own."""
        if self._client is None:
            from rucio.client import Client

            self._client = Client(
                rucio_host=self.url,
                auth_host=self.url,
                account=ACCOUNT,
                auth_type="userpass",
                creds={"username": USERNAME, "password": PASSWORD},
            )
        return self._client

    # -- its life ---------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the database, and what the configuration names."""
        for name in ("etc", "log", *(rse.lower() for rse in RSES)):
            (self.home / name).mkdir(parents=True)
        names = {"home": self.home, "url": self.url, "username": USERNAME, "password": PASSWORD}
        config = _CONFIG.format(**names, account=ACCOUNT, messages=self.messages)
        (self.home / "etc" / "rucio.cfg").write_text(config)
        packages = next((self.python.parents[1] / "lib").glob("python3.*")) / "site-packages"
        migrations = packages / "rucio" / "db" / "sqla" / "migrate_repo"
        alembic = _ALEMBIC.format(home=self.home, migrations=migrations)
        (self.home / "etc" / "alembic.ini").write_text(alembic)
        policy = self.home / "policy" / "long_scopes"
        policy.mkdir(parents=True)
        (policy / "__init__.py").touch()
        (policy / "schema.py").write_text("SCOPE_LENGTH = 64\n")
        bootstrap = [str(self.python), "-W", "ignore", "-c", _BOOTSTRAP]
        subprocess.run(bootstrap, env=self._env(), check=True, capture_output=True)

    def _env(self) -> Mapping[str, str]:
        keep = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        policy = str(self.home / "policy")
        return {**keep, "RUCIO_HOME": str(self.home), "PYTHONPATH": policy}

    def start(self) -> None:
        """Start serving, and wait until it does."""
        command = [
            str(self.python.with_name("gunicorn")),
            "--no-control-socket",
            "-w",
            "1",
            "--keep-alive",
            "0",
        ]
        command += ["-b", f"127.0.0.1:{self.port}", "--log-level", "warning"]
        command += ["rucio.web.rest.flaskapi.v1.main:application"]
        with (self.home / "log" / "server").open("ab") as log:
            self.process = start_with_us(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._env(),
                start_new_session=True,
            )
        deadline = time.monotonic() + _PATIENCE
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.home / "log" / "server").read_text(errors="replace"))
            time.sleep(0.05)

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as asking:
            asking.sendall(b"GET /ping HTTP/1.0\r\n\r\n")
            asking.settimeout(10)
            return b" 200 " in asking.recv(100)
        return False

    def stop(self) -> None:
        """Kill it, wherever it is. What it has told its clients is in its database."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def add_rses(self) -> None:
        """Make the RSEs: directories of this machine, with a terabyte for our account."""
        every = {"read": 1, "write": 1, "delete": 1}
        third = {"third_party_copy_read": 1, "third_party_copy_write": 1}
        for rse in RSES:
            self.client.add_rse(rse, deterministic=True, rse_type="DISK")
            protocol = {
                "scheme": "file",
                "hostname": "localhost",
                "port": 0,
                "prefix": f"{self.disk(rse)}/",
                "impl": "rucio.rse.protocols.posix.Default",
                "domains": {"lan": every, "wan": {**every, **third}},
            }
            self.client.add_protocol(rse, protocol)
            self.client.set_local_account_limit(ACCOUNT, rse, 10**12)
        for one in RSES:
            for other in RSES:
                if one != other:
                    self.client.add_distance(one, other, {"distance": 1})

    # -- what happens in it -------------------------------------------------------------------

    def replicate(self) -> int:
        """Do the transfers that rules wait for, as Rucio's daemons and FTS would; how many."""
        rules = list(self.client.list_replication_rules())
        return sum(self._transfer(one) for one in rules if one["state"] in _TO_DO)

    def _transfer(self, rule: Mapping[str, Any]) -> int:
        locks = list(self.client.list_replica_locks(rule["id"]))
        waiting = [lock for lock in locks if lock["state"] in _TO_DO]
        dataset = {"scope": rule["scope"], "name": rule["name"]}
        rows = list(self.client.list_replicas([dataset], schemes=["file"]))
        sources = {row["name"]: urlsplit(next(iter(row["pfns"]))).path for row in rows}
        for rse in {lock["rse"] for lock in waiting}:
            files = [
                {"scope": lock["scope"], "name": lock["name"], "state": "A"}
                for lock in waiting
                if lock["rse"] == rse
            ]
            for one in files:
                target = self.path(one["scope"], one["name"], rse)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(sources[one["name"]], target)
            self.client.update_replicas_states(rse, files)
        return len(waiting)

    def deliver(self) -> None:
        """Have hermes, Rucio's own daemon, deliver what messages there are."""
        self._daemon("hermes.hermes")

    def repair(self) -> None:
        """Have judge-repairer, Rucio's own daemon, look after the rules that are stuck."""
        self._daemon("judge.repairer")

    def _daemon(self, module: str) -> None:
        once = f"from rucio.daemons.{module} import run; run(once=True)"
        command = [str(self.python), "-W", "ignore", "-c", once]
        subprocess.run(command, env=self._env(), check=True, capture_output=True, timeout=_PATIENCE)

    def path(self, scope: str, name: str, rse: str = RSES[0]) -> Path:
        """Where an RSE keeps, or would keep, a file: Rucio's ``hash`` algorithm."""
        digest = hashlib.md5(f"{scope}:{name}".encode(), usedforsecurity=False).hexdigest()
        return self.disk(rse) / scope.replace(".", "/") / digest[:2] / digest[2:4] / name

    def counts(self, within: Collection[str] | None = None) -> dict[str, int]:
        """How many of what there is in the catalogue; of names, those of the scopes `within`."""
        # A stream that is not read to its end holds the only worker for two seconds.
        scopes = list(self.client.list_scopes())
        found = {"rules": len(list(self.client.list_replication_rules())), "replicas": 0}
        found["scopes"] = len(scopes)
        for scope in scopes if within is None else within:
            for kind in ("file", "dataset", "container"):
                names = list(self.client.list_dids(scope, {}, did_type=kind))
                found[kind] = found.get(kind, 0) + len(names)
                for name in names if kind == "dataset" else ():
                    rows = list(self.client.list_dataset_replicas(scope, name, deep=True))
                    found["replicas"] += sum(row["available_length"] for row in rows)
        return found


@contextmanager
def running(home: Path) -> Iterator[RucioServer]:
    """A new server that keeps its things in `home`."""
    with socket.socket() as probe, socket.socket() as other:
        probe.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        port, messages = probe.getsockname()[1], other.getsockname()[1]
    server = RucioServer(home, port, messages, server_python())
    try:
        server.prepare()
        server.start()
        server.add_rses()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def rucio_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RucioServer]:
    """A server for the session: tests tell their runs apart by number."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with running(tmp_path_factory.mktemp("rucio") / "home") as server:
        yield server
