"""What many tests share: one mongod for the session, a fresh database for each test, and trio.

That mongod asks for a login. Tests set up and look in as its administrator; what listens, in
`tests.engine`, does so as a site's user, with the rights of `caxev db grants` and no more.

Nothing here acts by itself: a test gets what it asks for by name. An ``async def`` test runs under
`trio.run`, with its fixtures resolved as for any other test.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import pytest
import trio
from pymongo import MongoClient

from caxev.config import ConfigError, Settings
from caxev.database.setup import site_role
from caxev.testing.mongod import find_mongod
from tests.mongod import Cluster
from tests.slurm import slurm  # noqa: F401  # a fixture
from tests.sshd import sshd  # noqa: F401  # a fixture

# On a loaded machine whatever is generated comes slowly.
_any_pace = hypothesis.settings(
    deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("default", _any_pace)
hypothesis.settings.register_profile("ci", _any_pace, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")

# A listener's worker processes give way to all others by a niceness of 10. Beside a whole suite on
# few cores they would come to nothing; near the end of the scale, which is 19, they hold their own.
os.nice(max(16 - os.nice(0), 0))

# What tests mount is in a namespace of our own, if we may have one. It is gone with the last of the
# tests' processes, even if they are killed.
_CLONE_NEWNS, _MS_REC_PRIVATE = 0x20000, 0x4000 | 1 << 18
_libc = ctypes.CDLL(None)
if os.geteuid() == 0 and _libc.unshare(_CLONE_NEWNS) == 0:
    _libc.mount(b"none", b"/", None, _MS_REC_PRIVATE, None)

# A shell that starts the tests in the background has their processes ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)


class Database(NamedTuple):
    """A database of a test's own: how its administrator and a site reach it, and its name."""

    uri: str
    name: str
    site_uri: str | None = None
    """As a site's user; None: there is none but the administrator."""


@pytest.fixture(scope="session")
def states(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Directories for state, one for each test; none is made here."""
    base = tmp_path_factory.mktemp("state")
    return (base / str(number) for number in count())


@pytest.fixture(autouse=True)
def state(states: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the sites of a test keep what nobody else may write."""
    path = next(states)
    monkeypatch.setenv("CAXEV_STATE", str(path))
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put first what takes long: a test that starts last leaves the other workers idle.

    That are tests that share a server, which go to one worker (`xdist_group`), and campaigns.
    """
    marks = ("xdist_group", "campaign")
    items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in marks])


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name a long parameter by its length: each worker would make megabytes of it a test's name."""
    if isinstance(val, str | bytes) and len(val) > 500:
        return f"{argname} of {len(val)}"
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run an ``async def`` test under trio."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    wanted = inspect.signature(pyfuncitem.obj).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in wanted}
    trio.run(partial(pyfuncitem.obj, **arguments))
    return True


_FEW_ROUNDS = ("--setParameter=scramSHA256IterationCount=5000",)
"""So that the many logins of the tests take less time; a server takes no fewer."""


@pytest.fixture(scope="session")
def mongod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A replica set of one member, shared by the whole session; mark the test `replicaset`."""
    try:
        find_mongod()
    except ConfigError as error:
        pytest.skip(str(error))
    with Cluster(tmp_path_factory.mktemp("mongod"), options=_FEW_ROUNDS, auth=True) as server:
        yield server


@pytest.fixture(scope="session")
def site_uri(mongod: Cluster) -> str:
    """How a site's user reaches that server: the user that `caxev db grants --apply` makes."""
    password = secrets.token_urlsafe(12)
    command = [sys.executable, "-m", "caxev", "db", "grants", "--site", "lngs", "--apply"]
    sites = str(Path(__file__).parents[1] / "sites.json")
    where = {"CAXEV_MONGO_URI": mongod.uri, "CAXEV_SITES": sites, "NEW_PASSWORD": password}
    subprocess.run(command, env={**os.environ, **where}, check=True, capture_output=True)
    return f"mongodb://caxev_lngs:{password}@{mongod.address}&authSource=admin"


@pytest.fixture
def database(mongod: Cluster, site_uri: str) -> Iterator[Database]:
    """A fresh, empty database of that server, dropped after the test.

    The role of the site's user is brought to this database; it has no right to any other.
    """
    name = f"test_{secrets.token_hex(6)}"
    granted = Settings(mongo_uri=site_uri, database=name)
    with MongoClient[dict[str, Any]](mongod.uri) as client:
        role = site_role(granted)
        client.admin.command("updateRole", role.name, privileges=role.privileges)
        yield Database(mongod.uri, name, site_uri)
        client.drop_database(name)
