"""The certificate of a server of ours, read again when its file has changed.

The servers of metrics and of the page use it: certificates are renewed while they run.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attrs import define, field
from loguru import logger

from caxev.config import ConfigError


@define(eq=False)
class ServerCertificate:
    """A certificate in PEM files; `key` is None if it is in the same file.

    `context` is for the server's socket. `make` makes one and reads the files into it; `of` names
    the server in messages. Raises `ConfigError` if the files cannot be used at the start;
    afterwards the former certificate is kept, and an error is logged.
    """

    of: str
    certificate: Path
    key: Path | None
    make: Callable[[], ssl.SSLContext]
    context: ssl.SSLContext = field(init=False)
    _newest: ssl.SSLContext = field(init=False)
    _version: object = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._read()
        self.context = self._newest
        # OpenSSL calls it in every handshake, also of a client that names no server.
        self.context.sni_callback = self._renew

    def _renew(self, connection: Any, _name: object, _context: object) -> None:
        if self._seen() != self._version:
            try:
                self._read()
            except ConfigError as error:
                logger.error("{}; the former one is kept", error)
        connection.context = self._newest

    def _read(self) -> None:
        # Before the files are read: what is replaced meanwhile is read again.
        self._version = self._seen()
        try:
            self._newest = self.make()
        except (OSError, ValueError) as error:
            why = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            raise ConfigError(
                f"the certificate for {self.of}, {self.certificate} with the key in "
                f"{self.key or self.certificate}, cannot be used: {why}"
            ) from error

    def _seen(self) -> object:
        found: list[object] = []
        for path in (self.certificate, self.key):
            try:
                status = path.stat() if path else None
            except OSError:
                status = None
            found.append(status and (status.st_ino, status.st_mtime_ns, status.st_size))
        return found
