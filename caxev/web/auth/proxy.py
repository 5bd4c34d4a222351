"""Believe a proxy about who asks: it names the person in a header, and nobody else may."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Final

from attrs import frozen
from starlette.requests import HTTPConnection
from starlette.routing import Route

from caxev.web.auth.options import ProxyOptions
from caxev.web.auth.people import Membership, NotAdmitted
from caxev.web.auth.sessions import LoginSession

_BETWEEN: Final = str.maketrans({",": " ", ";": " "})


@frozen
class ProxyLogin:
    """People whom a proxy at a trusted address has let in.

    The header of groups has names with commas, semicolons or spaces between them.
    """

    options: ProxyOptions
    membership: Membership
    logs_in: bool = False

    def session(self, connection: HTTPConnection, known: LoginSession | None) -> LoginSession:
        """Return the session of who is named. Raises `NotAdmitted`."""
        if not self._is_trusted(connection):
            raise NotAdmitted(403, "This page is reached only through its proxy.")
        names = connection.headers.getlist(self.options.user_header)
        if len(names) != 1:
            raise NotAdmitted(401, "The proxy names nobody: it must let only people in who log in.")
        person = self.membership.person(_text(names[0]), self._groups(connection))
        return known if known is not None and known.person == person else LoginSession(person)

    def _groups(self, connection: HTTPConnection) -> Sequence[str]:
        if self.options.groups_header is None:
            return ()
        given = connection.headers.getlist(self.options.groups_header)
        # Several may be one of the proxy's and one of the person's own.
        return _text(given[0]).translate(_BETWEEN).split() if len(given) == 1 else ()

    def _is_trusted(self, connection: HTTPConnection) -> bool:
        if connection.client is None:
            return False
        try:
            # A socket of the file system has no address, so none that could be trusted.
            peer = ipaddress.ip_address(connection.client.host)
        except ValueError:
            return False
        mapped = getattr(peer, "ipv4_mapped", None)
        return any((mapped or peer) in network for network in self.options.trusted)

    def routes(self) -> Sequence[Route]:
        """Return the addresses that it needs: none."""
        return ()


def _text(header: str) -> str:
    """Return a header's value as what proxies send: UTF-8."""
    return header.encode("latin-1").decode("utf-8", "replace").strip()
