"""Which way people log in, as it was configured."""

from __future__ import annotations

import ipaddress
from typing import TypeAlias

from attrs import frozen

from caxev.web.auth.people import Membership

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


@frozen
class ProxyOptions:
    """A proxy lets people in: its addresses, and the headers in which it names them."""

    trusted: tuple[Network, ...]
    user_header: str
    groups_header: str | None = None


@frozen
class OidcOptions:
    """People log in at a provider: its address, our name there, what is asked of it about them."""

    issuer: str
    client_id: str
    scope: str = "openid profile email"
    name_claim: str = "preferred_username"
    groups_claim: str = "groups"


@frozen
class LoginOptions:
    """How people get in, and the groups that give them a role."""

    by: ProxyOptions | OidcOptions
    membership: Membership
