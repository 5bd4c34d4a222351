"""Run OpenSSH's own client with every option given and no configuration file.

It moves bytes only; asyncssh does all the rest, in this process. Trust is as in `Endpoint`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import asyncssh

from caxev.core.errors import GiveUp
from caxev.transfer.ssh.endpoint import (
    CIPHERS,
    KEX,
    MACS,
    SIGNATURES,
    Endpoint,
    host_port,
    pinned_key,
)

_SSH: Final = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "GlobalKnownHostsFile": "none",
    "UpdateHostKeys": "no",
    "PreferredAuthentications": "publickey",
    "IdentityAgent": "none",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "ClearAllForwardings": "yes",
    "ControlMaster": "no",
    "ControlPath": "none",
    "PermitLocalCommand": "no",
    "RequestTTY": "no",
    "Compression": "no",
    "Ciphers": ",".join(CIPHERS),
    "MACs": ",".join(MACS),
    "KexAlgorithms": ",".join(KEX),
    "PubkeyAcceptedAlgorithms": ",".join(SIGNATURES),
    # Subtract from ssh's own list: with a list of ours it would not prefer the algorithms of the
    # keys in known_hosts.
    "HostKeyAlgorithms": "-ssh-rsa*,ssh-dss*",
    "ConnectTimeout": "15",
    "ServerAliveInterval": "15",
    "ServerAliveCountMax": "4",
    "LogLevel": "ERROR",
}
_RSA: Final = "rsa-sha2-512,rsa-sha2-256"
"""The algorithms for an RSA key, without SHA-1."""


@contextmanager
def shell(endpoint: Endpoint, key: asyncssh.SSHKey | None = None) -> Iterator[list[str]]:
    """Yield the ``ssh`` command that reaches the account, without the host's name.

    It is valid in the block only, as the host's key is in a file in memory.

    `key` is the host's key, if known for certain. Otherwise a host with a pinned fingerprint is
    asked for its key first, because ssh takes no fingerprints; raises as `pinned_key` does.
    """
    if key is None and endpoint.host_key is not None:
        key = pinned_key(endpoint)
    options = dict(_SSH)
    with _in_memory("" if key is None else _known(endpoint, key)) as known:
        options["UserKnownHostsFile"] = _quoted(known if key else endpoint.known_hosts_file)
        if key is not None:
            kind = key.get_algorithm()
            options["HostKeyAlgorithms"] = _RSA if kind == "ssh-rsa" else kind
        if endpoint.identity is not None:
            options["IdentityFile"] = _quoted(os.path.expanduser(endpoint.identity))
            options["IdentitiesOnly"] = "yes"
        if endpoint.username is not None:
            options["User"] = endpoint.username
        flags = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        yield ["ssh", "-F", "none", "-p", str(endpoint.port), *flags]


def host_name(endpoint: Endpoint) -> str:
    """Return the host's name as an argument. Raises `GiveUp` if ssh would read it as an option."""
    if endpoint.host.startswith("-"):
        raise GiveUp(f"{endpoint.host!r} is no host name")
    return endpoint.host


@contextmanager
def _in_memory(text: str) -> Iterator[str]:
    """Yield the path of a file in memory: it goes with this process, however that ends."""
    descriptor = os.memfd_create("known_hosts")
    try:
        os.write(descriptor, text.encode())
        # By our own process: ssh closes every descriptor that it inherits, and could not open its
        # own.
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _known(endpoint: Endpoint, key: asyncssh.SSHKey) -> str:
    """Return the known_hosts line of the host's key."""
    kind, public = key.export_public_key("openssh").decode().split()[:2]
    port = host_port(endpoint)
    return f"{endpoint.host if port is None else f'[{endpoint.host}]:{port}'} {kind} {public}\n"


def _quoted(path: str) -> str:
    """Quote a path as the value of an ssh option: one word, without percent expansion."""
    return '"' + path.replace("%", "%%") + '"'
