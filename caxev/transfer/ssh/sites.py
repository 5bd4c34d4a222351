"""Turn two sites of sites.json into the endpoint that connects them."""

from __future__ import annotations

from caxev.config import Site
from caxev.core.errors import GiveUp
from caxev.transfer.ssh.endpoint import Endpoint


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
