"""Which way people log in, as it was configured."""

from __future__ import annotations

import ipaddress
import secrets
from typing import Final, TypeAlias

from attrs import Factory, field, frozen

from caxev.web.auth.people import Membership

LOGIN: Final = "/login"
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
class LinkOptions:
    """The person who started the page acts, by a link with a key that only they are shown."""

    name: str
    key: str = field(default=Factory(lambda: secrets.token_urlsafe(24)), repr=False)


@frozen
class LoginOptions:
    """How people get in, and the groups that give them a role; the link asks for none."""

    by: ProxyOptions | OidcOptions | LinkOptions
    membership: Membership

    @property
    def entrance(self) -> str:
        """The text after the page's address in the link that lets a person in."""
        return f"{LOGIN}?key={self.by.key}" if isinstance(self.by, LinkOptions) else ""


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
