"""What many tests share: one mongod for the session, a fresh database for each test, and trio.

Nothing here acts by itself: a test gets what it asks for by name. An ``async def`` test runs under
`trio.run`, with its fixtures resolved as for any other test.
"""

from __future__ import annotations

import inspect
import os
import secrets
import signal
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import hypothesis
import pytest
import trio
from pymongo import MongoClient

from caxev.config import ConfigError
from caxev.embedded import ReplicaSet, find_mongod
from tests.slurm import slurm  # noqa: F401  # a fixture
from tests.sshd import sshd  # noqa: F401  # a fixture

hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")

# A shell that starts the tests in the background has their processes ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)


class Database(NamedTuple):
    """A database of a test's own: how to reach the server, and the name to use there."""

    uri: str
    name: str


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run an ``async def`` test under trio."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    wanted = inspect.signature(pyfuncitem.obj).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in wanted}
    trio.run(partial(pyfuncitem.obj, **arguments))
    return True


@pytest.fixture(scope="session")
def mongod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplicaSet]:
    """A replica set of one member, shared by the whole session; mark the test `replicaset`."""
    try:
        find_mongod()
    except ConfigError as error:
        pytest.skip(str(error))
    with ReplicaSet(tmp_path_factory.mktemp("mongod")) as replica_set:
        yield replica_set


@pytest.fixture
def database(mongod: ReplicaSet) -> Iterator[Database]:
    """A fresh, empty database of that server, dropped after the test."""
    name = f"test_{secrets.token_hex(6)}"
    yield Database(mongod.uri, name)
    with MongoClient[dict[str, Any]](mongod.uri) as client:
        client.drop_database(name)
