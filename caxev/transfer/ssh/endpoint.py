"""Connect to a site over SSH: trust, keys, and the translation of errors."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from types import SimpleNamespace
from typing import Any, Final

import asyncssh
from attrs import frozen

from caxev import aio
from caxev.config import Site
from caxev.core.errors import UNFORESEEN, Denied, GiveUp, Retry
from caxev.files import shown
from caxev.transfer.ssh.known_hosts import read_known_hosts

CIPHERS: Final = (
    "aes128-gcm@openssh.com",
    "aes256-gcm@openssh.com",
    "chacha20-poly1305@openssh.com",
    "aes256-ctr",
    "aes128-ctr",
)
MACS: Final = ("hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com", "hmac-sha2-256")
KEX: Final = (
    "curve25519-sha256",
    "curve25519-sha256@libssh.org",
    "ecdh-sha2-nistp256",
    "ecdh-sha2-nistp384",
    "ecdh-sha2-nistp521",
    "diffie-hellman-group16-sha512",
    "diffie-hellman-group18-sha512",
    "diffie-hellman-group-exchange-sha256",
)
_HOST_KEYS: Final = (
    "ssh-ed25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "rsa-sha2-512",
    "rsa-sha2-256",
)
SIGNATURES: Final = (*_HOST_KEYS, "sk-ssh-ed25519@openssh.com")
_CONNECTING: Final = 15.0  # seconds to connect, to log in, and to start SFTP
_KEEPALIVE: Final = 15.0  # seconds; after four unanswered ones the connection is lost
_RECEIVE_WINDOW: Final = 16 << 20  # bytes, on each channel
_PACKET: Final = 224 << 10  # bytes; OpenSSH accepts 256 KiB with all headers
_FAREWELL: Final = 5.0  # seconds
_DELAY: Final = 0.25  # seconds that an address gets alone before the next one is tried beside it
_SHOWN: Final = 80  # characters of what a login shell prints
_KNOWN_HOSTS: Final = "~/.ssh/known_hosts"
_REFUSALS: Final = (
    asyncssh.SFTPPermissionDenied,
    asyncssh.SFTPWriteProtect,
    asyncssh.SFTPNoSpaceOnFilesystem,
    asyncssh.SFTPQuotaExceeded,
)


@frozen
class Endpoint:
    """An SSH server, and how to authenticate it and us.

    The host's key must be in the file `known_hosts` (None: ``~/.ssh/known_hosts``). If `host_key`
    is set, the key must have that fingerprint (``SHA256:...``) and the file is ignored. `identity`
    is the file of our private key (None: the usual ones in ``~/.ssh``).
    """

    host: str
    port: int = 22
    username: str | None = None
    known_hosts: str | None = None
    host_key: str | None = None
    identity: str | None = None

    @property
    def known_hosts_file(self) -> str:
        """The path of the file with the keys of hosts, also if it does not exist."""
        return os.path.expanduser(self.known_hosts or _KNOWN_HOSTS)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def endpoint_of(here: Site, there: Site) -> Endpoint:
    """Return how `here` reaches `there`: its address, with our key and our known hosts.

    Raises `GiveUp` if sites.json has no host name.
    """
    if there.hostname is None:
        raise GiveUp(f"site {there.name!r} has no hostname in sites.json")
    return Endpoint(
        host=there.hostname,
        port=there.port,
        username=there.username,
        known_hosts=here.known_hosts,
        host_key=there.host_key,
        identity=here.identity,
    )


@asynccontextmanager
async def sftp_session(endpoint: Endpoint) -> AsyncIterator[asyncssh.SFTPClient]:
    """Connect and start SFTP; paths are bytes. Raises as `connected` does."""
    async with connected(endpoint) as connection:
        yield await started(endpoint, connection)


async def started(
    endpoint: Endpoint, connection: asyncssh.SSHClientConnection
) -> asyncssh.SFTPClient:
    """Start SFTP on a connection, with paths as bytes. It ends with the connection.

    Raises `Denied` if the login shell prints something first, which breaks the protocol.
    """
    try:
        # Not in a task of its own: SFTP must get its channel before the receiver, which starts
        # meanwhile, because an account may allow only one.
        with translated(endpoint, "starting sftp"):
            async with asyncio.timeout(_CONNECTING):
                return await connection.start_sftp_client(path_encoding=None)
    except Retry as error:
        if said := await _shell_output(connection):
            raise Denied(
                f"the login shell at {endpoint} prints {said!r} before SFTP begins: have its "
                "start-up files print nothing where there is no terminal"
            ) from error
        raise


async def _shell_output(connection: asyncssh.SSHClientConnection) -> str:
    """Return what the login shell prints before a command that prints nothing; best effort."""
    with suppress(asyncssh.Error, OSError, TimeoutError):
        async with asyncio.timeout(_FAREWELL), connection.create_process("exit") as process:
            return " ".join((await process.stdout.read(_SHOWN)).split())
    return ""


@asynccontextmanager
async def connected(endpoint: Endpoint) -> AsyncIterator[asyncssh.SSHClientConnection]:
    """Connect, and close the connection on the way out.

    Raises `Denied` if the host or our key is refused, `Retry` if the host cannot be reached.
    """
    options = _options(endpoint)
    with translated(endpoint):
        connection = await asyncssh.connect(endpoint.host, endpoint.port, **options)
    try:
        yield connection
        connection.close()
    finally:
        connection.abort()  # does nothing after close()
        with suppress(TimeoutError):  # a far end that is gone must not hold us up
            await asyncio.wait_for(connection.wait_closed(), _FAREWELL)


async def _to_first_address(factory: Callable[[], Any], host: str, port: int) -> Any:
    """Connect to whichever address of a host answers first (RFC 8305).

    asyncssh tries them one after the other by itself: a first one that swallows everything, as a
    broken route for IPv6 does, would take all the time there is.
    """
    loop = asyncio.get_running_loop()
    return await loop.create_connection(factory, host, port, happy_eyeballs_delay=_DELAY)


def _options(endpoint: Endpoint) -> dict[str, Any]:
    """Return every option explicitly: no configuration file, agent or password is used."""
    options: dict[str, Any] = {
        "config": None,
        "tunnel": SimpleNamespace(create_connection=_to_first_address),
        "agent_path": None,
        "preferred_auth": "publickey",
        "password_auth": False,
        "kbdint_auth": False,
        "host_based_auth": False,
        "gss_host": None,
        "gss_kex": False,
        "gss_auth": False,
        "x509_trusted_certs": None,
        "agent_forwarding": False,
        "x11_forwarding": False,
        "kex_algs": KEX,
        "encryption_algs": CIPHERS,
        "mac_algs": MACS,
        "compression_algs": ["none"],
        "signature_algs": SIGNATURES,
        "connect_timeout": _CONNECTING,
        "login_timeout": _CONNECTING,
        "keepalive_interval": _KEEPALIVE,
        # Few large packets cost the least CPU time; a large window hides the round trip.
        "window": _RECEIVE_WINDOW,
        "max_pktsize": _PACKET,
        **_host_key_options(endpoint),
    }
    if endpoint.username is not None:
        options["username"] = endpoint.username
    if endpoint.identity is not None:
        options["client_keys"] = [_readable(endpoint.identity, "the key")]
    return options


def _host_key_options(endpoint: Endpoint) -> dict[str, Any]:
    pin = endpoint.host_key
    if pin is None:
        known = read_known_hosts(_readable(endpoint.known_hosts_file, "the known_hosts file"))
        return {"known_hosts": known, **_known_algorithms(known, endpoint)}
    # Empty bytes would make asyncssh fall back on ~/.ssh/known_hosts, and None would make it trust
    # anyone. A function that knows no key leaves the decision to the client's callback.
    return {
        "known_hosts": lambda _host, _address, _port: ((), (), ()),
        "server_host_key_algs": _HOST_KEYS,
        "client_factory": lambda: _Pinned(pin),
    }


def _known_algorithms(known: asyncssh.SSHKnownHosts, endpoint: Endpoint) -> dict[str, Any]:
    """Return the option that makes the host present a key which the file has.

    For an RSA key asyncssh would use SHA-1 by itself. If the file has no key of this host, the
    algorithms are left alone, and the connection fails with the reason.
    """
    keys = asyncssh.match_known_hosts(known, endpoint.host, "", host_port(endpoint))[0]
    kinds = {key.get_algorithm() for key in keys}
    found = [
        name for name in _HOST_KEYS if ("ssh-rsa" if name.startswith("rsa-") else name) in kinds
    ]
    return {"server_host_key_algs": found} if found else {}


def pinned_key(endpoint: Endpoint) -> asyncssh.SSHKey:
    """Return the key of a server whose fingerprint is pinned. Raises as `connected` does."""

    async def found() -> asyncssh.SSHKey:
        async with connected(endpoint) as connection:
            key = connection.get_server_host_key()
            assert key is not None
            return key

    return aio.run(found())


def _readable(path: str, what: str) -> str:
    path = os.path.expanduser(path)
    if not os.access(path, os.R_OK):
        raise Denied(f"{what} {shown(path)} is not there or cannot be read")
    return path


class _Pinned(asyncssh.SSHClient):
    """Trust only the host key with the given fingerprint."""

    def __init__(self, fingerprint: str) -> None:
        self._fingerprint = fingerprint.strip()

    def validate_host_public_key(
        self, host: str, addr: str, port: int, key: asyncssh.SSHKey
    ) -> bool:
        """Called by asyncssh if no known host key fits."""
        del host, addr, port
        return key.get_fingerprint("sha256") == self._fingerprint


@contextmanager
def translated(endpoint: Endpoint, doing: str = "") -> Iterator[None]:
    """Turn the errors of the other side and of the network into `Retry` or `Denied`."""
    # Specific before general: several of these classes are kinds of OSError or asyncssh.Error.
    at = f" ({doing})" if doing else ""
    try:
        yield
    except asyncssh.HostKeyNotVerifiable as exc:
        raise Denied(_distrust(endpoint)) from exc
    except asyncssh.PermissionDenied as exc:
        raise Denied(_refusal(endpoint)) from exc
    except asyncssh.KeyExchangeFailed as exc:
        raise Denied(f"{endpoint} and we have no algorithm in common: {one_line(exc)}") from exc
    except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError) as exc:
        raise Denied(f"a key for {endpoint} cannot be used: {one_line(exc)}") from exc
    except _REFUSALS as exc:
        raise Denied(f"{endpoint} refuses{at}: {one_line(exc)}") from exc
    except TimeoutError as exc:
        raise Retry(f"{endpoint} did not answer in time{at}") from exc
    except (asyncssh.SFTPConnectionLost, asyncssh.SFTPNoConnection, asyncssh.DisconnectError) as e:
        raise Retry(f"the connection to {endpoint} was lost{at}: {one_line(e)}") from e
    except (asyncssh.Error, asyncio.IncompleteReadError, *UNFORESEEN) as exc:
        raise Retry(f"{endpoint} failed{at}: {one_line(exc)}") from exc
    except OSError as exc:
        raise Retry(f"{endpoint} cannot be reached{at}: {exc.strerror or one_line(exc)}") from exc


def one_line(exc: BaseException) -> str:
    """Return an error's text on one line, never empty."""
    return " ".join(str(exc).split()) or type(exc).__name__


def _distrust(endpoint: Endpoint) -> str:
    if endpoint.host_key:
        return f"host key of {endpoint} is not the one pinned for it ({endpoint.host_key})"
    file = endpoint.known_hosts_file
    known = read_known_hosts(file)
    if not any(asyncssh.match_known_hosts(known, endpoint.host, "", host_port(endpoint))):
        return f"host key of {endpoint} is not in {shown(file)}: add it after checking it"
    return (
        f"host key of {endpoint} is not the one in {shown(file)}: "
        "the host was set up anew, or somebody stands between"
    )


def host_port(endpoint: Endpoint) -> int | None:
    """Return the port as known_hosts files have it: None for the standard one."""
    return None if endpoint.port == asyncssh.DEFAULT_PORT else endpoint.port


def _refusal(endpoint: Endpoint) -> str:
    user = endpoint.username or "the local user"
    key = f" ({shown(endpoint.identity)})" if endpoint.identity else ""
    return f"{endpoint} refused the key of {user}{key}"
