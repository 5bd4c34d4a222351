"""Serve the metrics to Prometheus: on loopback, or elsewhere with TLS and a login.

`listener` starts it if a port is given. `/copies` has the copies of all runs, which the database
must count; every other path has all other metrics, whose scrape reads no run.
"""

from __future__ import annotations

import hmac
import ipaddress
import ssl
from base64 import b64decode
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from attrs import field, frozen
from loguru import logger
from prometheus_client import REGISTRY, MetricsHandler

from caxev.config import ConfigError
from caxev.config.settings import secret
from caxev.http_server import SmallServer
from caxev.metrics import COPIES_REGISTRY
from caxev.server_certificate import ServerCertificate

LOOPBACK: Final = "127.0.0.1"
TOKEN: Final = "CAXEV_METRICS_TOKEN"  # noqa: S105  # a variable's name
PASSWORD: Final = "CAXEV_METRICS_PASSWORD"  # noqa: S105  # the same
USER: Final = "caxev"
"""The name that belongs to the password."""


@frozen
class Login:
    """Credentials that a scrape must present: a bearer token, or `USER`'s password; or none."""

    token: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)

    @classmethod
    def load(cls, environ: Mapping[str, str] | None = None) -> Login:
        """Read the secrets, which may have been renewed. Raises `ConfigError`."""
        return cls(secret(TOKEN, environ), secret(PASSWORD, environ))

    @property
    def is_needed(self) -> bool:
        return self.token is not None or self.password is not None

    def admits(self, header: str) -> bool:
        """Return whether an ``Authorization`` header is accepted."""
        if not self.is_needed:
            return True
        scheme, _, given = header.strip().partition(" ")
        if scheme.lower() == "bearer":
            return _same(given.strip(), self.token)
        if scheme.lower() == "basic":
            return _same(_decoded(given), self.password and f"{USER}:{self.password}")
        return False


def _same(given: str, wanted: str | None) -> bool:
    # In constant time: how long it takes must not show how much was right.
    return wanted is not None and hmac.compare_digest(given.encode(), wanted.encode())


def _decoded(given: str) -> str:
    try:
        return b64decode(given, validate=True).decode()
    except ValueError:
        return ""


@frozen
class MetricsAddress:
    """The address at which metrics are served, and the certificate (PEM files) for TLS."""

    port: int
    host: str = LOOPBACK
    certificate: Path | None = None
    key: Path | None = None

    def check(self, login: Login) -> None:
        """Raise `ConfigError` unless this is safe to serve at its address."""
        if self.is_loopback:
            return
        if self.certificate is None:
            raise ConfigError(
                f"metrics at {self.host} need TLS, as others can reach that address: give "
                "--metrics-certificate, or leave out --metrics-address"
            )
        if not login.is_needed:
            raise ConfigError(
                f"metrics at {self.host} need a login: name a file by {TOKEN}_FILE or "
                f"{PASSWORD}_FILE, or leave out --metrics-address"
            )

    def served(self) -> ServerCertificate | None:
        """Read the certificate, if there is one. Raises `ConfigError`."""
        if self.certificate is None:
            return None
        return ServerCertificate("metrics", self.certificate, self.key, self._context)

    def _context(self) -> ssl.SSLContext:
        assert self.certificate is not None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # With a password, which no key has: OpenSSL would ask for it on the terminal.
        context.load_cert_chain(self.certificate, self.key, password="")
        return context

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name may mean another address tomorrow
            return False


class MetricsServer(SmallServer):
    """Serves the metrics. Raises OSError if the address is taken, `ConfigError`."""

    def __init__(self, address: MetricsAddress, environ: Mapping[str, str] | None = None) -> None:
        self.environ = environ
        self.login = Login.load(environ)
        address.check(self.login)
        self._certificate = address.served()
        super().__init__((address.host, address.port), _Handler)

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection; its handshake is done in its own thread, by the first read."""
        connection, client = super().get_request()
        if self._certificate is None:
            return connection, client
        wrapped = self._certificate.context.wrap_socket(
            connection, server_side=True, do_handshake_on_connect=False
        )
        return wrapped, client

    def admits(self, header: str) -> bool:
        """Return whether a scrape may be answered, by the secrets as they are now."""
        try:
            self.login = Login.load(self.environ)
        except ConfigError as error:
            logger.error("metrics keep their previous login: {}", error)
        return self.login.admits(header)


class _Handler(MetricsHandler):
    """Answers a scrape, in the format that it asks for."""

    def do_GET(self) -> None:  # noqa: N802  # the base's own name
        """Answer, or ask for a login."""
        server = self.server
        assert isinstance(server, MetricsServer)
        if not server.admits(self.headers.get("Authorization", "")):
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="caxev metrics"')
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        is_about_copies = self.path.partition("?")[0].rstrip("/") == "/copies"
        self.registry = COPIES_REGISTRY if is_about_copies else REGISTRY
        super().do_GET()
