"""From two sites of sites.json to a transfer between them."""

from __future__ import annotations

from typing import Final

from caxev.config import Site
from caxev.job import GiveUp
from caxev.ssh.endpoint import Endpoint
from caxev.ssh.plan import Transfer

SERVED: Final = ("sftp", "scp", "rsync")
"""The methods that this package serves: all three reach an account by SSH."""
STREAMS: Final = 4


def endpoint_of(here: Site, there: Site) -> Endpoint:
    """Return how `here` reaches `there`: its address, with our key and our known hosts.

    Raises `GiveUp` where sites.json gives no host name.
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


def transfer_between(here: Site, there: Site, local_path: str, remote_path: str) -> Transfer:
    """Return the transfer between a path here and a path there, each confined to its site."""
    return Transfer(
        endpoint=endpoint_of(here, there),
        remote_path=remote_path,
        remote_roots=there.roots,
        local_path=local_path,
        local_roots=here.roots,
        nstreams=there.nstreams or STREAMS,
    )
