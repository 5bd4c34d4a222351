"""Real servers to which alarms go: HTTP, and SMTP with STARTTLS and a login."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from json import loads
from pathlib import Path
from threading import Event, Thread
from time import sleep
from typing import Any

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session
from attrs import define, field
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from caxev import aio


@define(eq=False)
class Web:
    """A web server: what was posted to it, and what it answers (a status; then None: 200)."""

    port: int = 0
    posts: list[tuple[str, dict[str, str], Any]] = field(factory=list)
    answers: list[int] = field(factory=list)
    after: float = 0.0
    """Seconds between a post and the answer to it."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def bodies(self) -> list[Any]:
        return [body for _, _, body in self.posts]


@contextmanager
def web() -> Iterator[Web]:
    """A web server on loopback."""
    seen = Web()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status = seen.answers.pop(0) if seen.answers else 200
            if status < 300:
                seen.posts.append((self.path, dict(self.headers), loads(body)))
            sleep(seen.after)
            self.send_response(status)
            if status in {301, 302, 307}:
                self.send_header("Location", f"{seen.url}/elsewhere")
            said = f"status {status}".encode()
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def do_GET(self) -> None:
            seen.posts.append((self.path, {}, "GET"))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        seen.port = server.server_address[1]
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield seen
        finally:
            server.shutdown()
            thread.join()


@define(eq=False)
class Post:
    """A mail server: the mails that it took, and for whom it takes none."""

    port: int = 0
    mails: list[EmailMessage] = field(factory=list)
    logins: list[tuple[str, str]] = field(factory=list)
    refused: set[str] = field(factory=set)

    async def handle_RCPT(  # noqa: N802  # aiosmtpd's name
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if address in self.refused:
            return "550 no such user"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(  # noqa: N802  # aiosmtpd's name
        self, server: SMTP, session: Session, envelope: Envelope
    ) -> str:
        assert isinstance(envelope.content, bytes)
        mail = message_from_bytes(envelope.content, policy=default)
        assert isinstance(mail, EmailMessage)
        self.mails.append(mail)
        return "250 OK"


@contextmanager
def post(password: str | None = None, context: ssl.SSLContext | None = None) -> Iterator[Post]:
    """A mail server on loopback; with a context it offers STARTTLS, and wants user and password."""
    seen = Post()

    def login(
        server: SMTP, session: Session, envelope: Envelope, mechanism: str, data: Any
    ) -> AuthResult:
        assert isinstance(data, LoginPassword)
        seen.logins.append((data.login.decode(), data.password.decode()))
        return AuthResult(success=data.password.decode() == password, handled=False)

    def session() -> SMTP:
        if context is None:
            return SMTP(seen, hostname="localhost")
        return SMTP(
            seen,
            hostname="localhost",
            tls_context=context,
            require_starttls=True,
            auth_required=True,
            authenticator=login,
        )

    started, stop = Event(), asyncio.Event()

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(session, "127.0.0.1", 0)
        seen.port = server.sockets[0].getsockname()[1]
        running.append(asyncio.get_running_loop())
        started.set()
        await stop.wait()
        server.close()

    running: list[asyncio.AbstractEventLoop] = []
    thread = Thread(target=lambda: aio.run(serve()))
    thread.start()
    started.wait()
    try:
        yield seen
    finally:
        running[0].call_soon_threadsafe(stop.set)
        thread.join()


def certificate(directory: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate for loopback: the file to trust, and the context of a server that has it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))]
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    trusted, private = directory / "certificate.pem", directory / "key.pem"
    trusted.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(trusted, private)
    return trusted, context
