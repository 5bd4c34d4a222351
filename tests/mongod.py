"""A replica set with what tests need beside `caxev.testing.mongod`: members, a login, faults."""

from __future__ import annotations

import secrets
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from pymongo import MongoClient
from pymongo.errors import OperationFailure

from caxev.testing.mongod import DEFAULTS, NAME, Mongod, ReplicaSet, leads, wait_for

_UNAUTHORIZED: Final = 13


class Server(Mongod):
    """A mongod whose `options` replace our own flags of their names, or add to them.

    `query` is appended to the URI, such as ``&tls=true``. `front` is the port of a proxy before it.
    """

    def __init__(self, directory: Path, options: Sequence[str] = (), query: str = "") -> None:
        super().__init__(directory)
        given = {option.partition("=")[0] for option in options} - {"--setParameter"}
        ours = [flag for flag in DEFAULTS if flag.partition("=")[0] not in given]
        self.flags = (*ours, *options)
        self.query = query
        self.front: int | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.front or self.port}"

    @property
    def uri(self) -> str:
        return super().uri + self.query

    def signal(self, number: signal.Signals) -> None:
        """Send a signal: SIGSTOP and SIGCONT make a server that hangs, SIGTERM one that leaves."""
        if self.process is not None:
            self.process.send_signal(number)


class Cluster(ReplicaSet):
    """A replica set of `members` mongods (1 or 3).

    With ``auth`` there is one user, `user` with `password`, and `uri` contains both.
    """

    user: Final = "root"
    members: tuple[Server, ...]

    def __init__(
        self,
        directory: Path,
        members: int = 1,
        options: Sequence[str] = (),
        *,
        auth: bool = False,
        query: str = "",
    ) -> None:
        self.query = query
        self.password = secrets.token_urlsafe(12) if auth else ""
        self._key = directory / "key"
        flags = [*options, f"--replSet={NAME}", *([f"--keyFile={self._key}"] if auth else [])]
        self.members = tuple(
            Server(directory / f"member-{i}", flags, query) for i in range(members)
        )

    @property
    def hosts(self) -> str:
        """The members' addresses, joined by commas."""
        return ",".join(member.address for member in self.members)

    @property
    def address(self) -> str:
        """The part of the set's URI after ``mongodb://`` and the login."""
        return f"{self.hosts}/?replicaSet={NAME}{self.query}"

    @property
    def uri(self) -> str:
        login = f"{self.user}:{self.password}@" if self.password else ""
        return f"mongodb://{login}{self.address}"

    def start(self) -> None:
        if self.password and not self._key.exists():
            self._key.touch(mode=0o600)
            self._key.write_text(secrets.token_hex(32))
        super().start()

    def kill(self, i: int) -> None:
        """SIGKILL member `i`."""
        self.members[i].kill()

    def restart(self, i: int) -> None:
        """Start member `i` again on its old port; returns when it accepts connections."""
        # The old port, since the set's configuration has the members by their addresses.
        self.members[i].kill()
        self.members[i].start()
        self.members[i].wait()

    def primary(self) -> int:
        """Return the index of the primary; waits for an election to end."""
        with self._client() as client:
            client.admin.command("ping")
            host, port = client.primary or ("", 0)
            return [member.address for member in self.members].index(f"{host}:{port}")

    def _initiate(self) -> None:
        """Initiate the set, and create its user."""
        try:
            super()._initiate()
        except OperationFailure as error:
            if error.code != _UNAUTHORIZED:
                raise
            return  # it is a set already: since it has a user, only that user may ask
        if self.password:
            wait_for(lambda: leads(self.members[0]), "no primary was elected")
            # MongoDB lets a client on localhost create the first user without a login.
            with MongoClient[dict[str, Any]](self.members[0].uri) as client:
                roles = ["root"]
                client.admin.command("createUser", self.user, pwd=self.password, roles=roles)
