"""OpenSSH's own client as a program, with everything said and nothing configured.

What is not a matter of bytes is done by asyncssh, in this process; `Endpoint` says whom to trust.
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
    # What is taken out of ssh's own list leaves it free to prefer what known_hosts has.
    "HostKeyAlgorithms": "-ssh-rsa*,ssh-dss*",
    "ConnectTimeout": "15",
    "ServerAliveInterval": "15",
    "ServerAliveCountMax": "4",
    "LogLevel": "ERROR",
}


@contextmanager
def shell(endpoint: Endpoint, key: asyncssh.SSHKey | None = None) -> Iterator[list[str]]:
    """The command that reaches the account, but for the host's name. Good while this lasts.

    `key` is the host's where it is known for certain. Where it is not, a host whose key is pinned
    is asked for it first, as this program knows no fingerprints; raises as `pinned_key` does.
    """
    if key is None and endpoint.host_key is not None:
        key = pinned_key(endpoint)
    options = dict(_SSH)
    with _in_memory("" if key is None else _known(endpoint, key)) as known:
        options["UserKnownHostsFile"] = _quoted(known if key else endpoint.known_hosts_file)
        if key is not None:
            options["HostKeyAlgorithms"] = _algorithms(key)
        if endpoint.identity is not None:
            options["IdentityFile"] = _quoted(os.path.expanduser(endpoint.identity))
            options["IdentitiesOnly"] = "yes"
        if endpoint.username is not None:
            options["User"] = endpoint.username
        said = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        yield ["ssh", "-F", "none", "-p", str(endpoint.port), *said]


def host_name(endpoint: Endpoint) -> str:
    """The host's name as an argument. Raises `GiveUp` where it would be taken for an option."""
    if endpoint.host.startswith("-"):
        raise GiveUp(f"{endpoint.host!r} is no host name")
    return endpoint.host


@contextmanager
def _in_memory(text: str) -> Iterator[str]:
    """The path of a file that is gone with this process, however that ends."""
    descriptor = os.memfd_create("known_hosts")
    try:
        os.write(descriptor, text.encode())
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _known(endpoint: Endpoint, key: asyncssh.SSHKey) -> str:
    """The line of a known_hosts file that says the host's key."""
    kind, public = key.export_public_key("openssh").decode().split()[:2]
    port = host_port(endpoint)
    return f"{endpoint.host if port is None else f'[{endpoint.host}]:{port}'} {kind} {public}\n"


def _algorithms(key: asyncssh.SSHKey) -> str:
    kind = key.get_algorithm()
    return "rsa-sha2-512,rsa-sha2-256" if kind == "ssh-rsa" else kind


def _quoted(path: str) -> str:
    """A path as the value of an option of ssh: one word, and nothing in it to be filled in."""
    return '"' + path.replace("%", "%%") + '"'
