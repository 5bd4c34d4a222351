"""The storage behind an RSE, reached by Rucio's own protocols.

Raises the errors of any storage's library; `caxev.rucio.connection.connected` translates them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from threading import Lock
from typing import Any, Final
from urllib.parse import urlsplit

from attrs import define, field

from caxev.files import Confined, join, pinned
from caxev.rucio.answers import LimitedRequests
from caxev.rucio.errors import is_called
from caxev.rucio.files import Adler32, Checked
from caxev.rucio.names import Did

Row = dict[str, Any]

_CHUNK: Final = 1 << 20
QUIET: Final = logging.getLogger("caxev.rucio")
"""The logger of Rucio's library."""
_importing: Final = Lock()


def _rsemanager() -> Any:
    # Threads that import Rucio's modules, which import each other, at the same time have failed
    # with a KeyError of importlib's own locks.
    with _importing:
        from rucio.rse import rsemanager
        from rucio.rse.protocols import webdav
    # Replaced in the module: it makes a session for each connection.
    webdav.requests = LimitedRequests()
    return rsemanager


@define(eq=False)
class Storage:
    """The storage behind an RSE, by Rucio's own protocols. Any thread may call."""

    rse: str
    settings: Row
    token: str | None = field(repr=False)

    @contextmanager
    def _protocol(self, scheme: str | None = None) -> Iterator[Any]:
        rsemanager = _rsemanager()
        # Rucio writes the token into the settings and takes it out again: threads need their own.
        protocol = rsemanager.create_protocol(
            deepcopy(self.settings), "read", scheme=scheme, auth_token=self.token, logger=QUIET.log
        )
        protocol.connect()
        try:
            yield protocol
        finally:
            protocol.close()

    def pfn(self, did: Did) -> str:
        """Return the place of a file in this storage, present or future."""
        with self._protocol() as protocol:
            name: str = protocol.lfns2pfns(row_of(did))[str(did)]
            return name

    def stat(self, pfn: str) -> Row | None:
        """Return size and checksums of a file as the storage has them; None if there is no file."""
        with self._protocol(urlsplit(pfn).scheme) as protocol:
            try:
                found: Row = protocol.stat(pfn)
            except Exception as error:
                if isinstance(error, FileNotFoundError) or is_called(error, "SourceNotFound"):
                    return None
                raise
        return found

    def difference(self, pfn: str, wanted: Checked) -> str | None:
        """Return why the bytes that are stored there are not the file; None if they are."""
        found = self.stat(pfn)
        if found is None:
            return "is not there"
        return wanted.differs(found.get("filesize"), found.get("adler32"), found.get("md5"))

    def send(self, did: Did, one: Checked, root: Confined) -> None:
        """Upload a file, by a temporary name, replacing any file of its name."""
        rsemanager = _rsemanager()
        # Rucio opens the file by path: pinned, nobody can swap it for a link meanwhile.
        with pinned(join(root, one.path)) as name:
            directory, file = os.path.split(os.fsdecode(name))
            rsemanager.upload(
                self.settings,
                {
                    **row_of(did),
                    "filename": file,
                    "adler32": one.adler32,
                    "md5": one.md5,
                    "filesize": one.size,
                },
                source_dir=directory,
                delete_existing=True,
                auth_token=self.token,
                logger=QUIET.log,
            )

    def fetch(self, pfn: str, path: bytes) -> None:
        """Download a file."""
        with self._protocol(urlsplit(pfn).scheme) as protocol:
            protocol.get(pfn, os.fsdecode(path))


def adler32_of(path: bytes) -> str:
    """Return the ADLER32 of a file as eight hex digits."""
    found = Adler32()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def row_of(did: Did) -> Row:
    """Return a data identifier as Rucio's library takes it."""
    return {"scope": did.scope, "name": did.name}
