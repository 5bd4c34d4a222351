"""The options of ``caxev web`` about who gets in."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import click
from attrs import frozen

from caxev.cli.command import Function, together

if TYPE_CHECKING:
    from caxev.web.auth.options import LoginOptions, OidcOptions, ProxyOptions

_NEEDS: Final = {
    "none": (),
    "proxy": ("trust", "user_header"),
    "oidc": ("issuer", "client_id"),
}
_MAY_HAVE: Final = {
    "none": (),
    "proxy": ("groups_header", "reader_group", "operator_group"),
    "oidc": ("scope", "name_claim", "groups_claim", "reader_group", "operator_group"),
}


@frozen
class LoginChoice:
    """The way to get in that was chosen, and the options about it that were given."""

    way: str
    given: Mapping[str, Any]

    @property
    def is_needed(self) -> bool:
        return self.way != "none"

    @property
    def has_operators(self) -> bool:
        return "operator_group" in self.given

    @classmethod
    def of(cls, *, auth: str, **given: Any) -> LoginChoice:
        """Take what was given. Raises click's error if it does not go together."""
        found = {name: value for name, value in given.items() if value}
        for name in _NEEDS[auth]:
            if name not in found:
                raise click.UsageError(f"--auth {auth} needs {_option(name)}")
        for name in found.keys() - {*_NEEDS[auth], *_MAY_HAVE[auth]}:
            raise click.UsageError(f"{_option(name)} is of no use with --auth {auth}")
        by_groups = "reader_group" in found or "operator_group" in found
        if auth == "proxy" and by_groups and "groups_header" not in found:
            raise click.UsageError("--reader-group and --operator-group need --groups-header")
        return cls(auth, found)

    def options(self) -> LoginOptions | None:
        """Return the options of the page; None: nobody logs in."""
        if not self.is_needed:
            return None
        from caxev.web.auth.options import LoginOptions
        from caxev.web.auth.people import Membership

        readers, operators = self._groups("reader_group"), self._groups("operator_group")
        by = self._proxy() if self.way == "proxy" else self._oidc()
        return LoginOptions(by, Membership(readers, operators))

    def _groups(self, name: str) -> frozenset[str]:
        return frozenset(self.given.get(name, ()))

    def _proxy(self) -> ProxyOptions:
        from caxev.web.auth.options import ProxyOptions

        given = self.given
        trusted = tuple(map(_network, given["trust"]))
        return ProxyOptions(trusted, given["user_header"], given.get("groups_header"))

    def _oidc(self) -> OidcOptions:
        from caxev.web.auth.options import OidcOptions

        own = ("issuer", "client_id", "scope", "name_claim", "groups_claim")
        return OidcOptions(**{name: self.given[name] for name in own if name in self.given})


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise click.UsageError(f"--trust {text!r} is no address and no network: {error}") from error


def public_address(
    _context: click.Context, _parameter: click.Parameter, value: str | None
) -> str | None:
    """Return an address as browsers name it in `Origin`. Raises click's error."""
    if value is None:
        return None
    parts = urlsplit(value.lower())
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.path not in {"", "/"}:
        raise click.BadParameter("it should look like https://caxev.example.org")
    return f"{parts.scheme}://{parts.netloc}"


def _groups(name: str, words: str) -> Callable[[Function], Function]:
    return click.option(name, multiple=True, metavar="GROUP", help=words)


def logs_in() -> Callable[[Function], Function]:
    """Add the options, as the argument `login`."""
    return together(
        "login",
        LoginChoice.of,
        click.option(
            "--auth",
            type=click.Choice([*_NEEDS]),
            default="none",
            show_default=True,
            help="How people log in: by a proxy before the page, or by OpenID Connect.",
        ),
        _groups("--reader-group", "Who may see the page; may be repeated. [default: all]"),
        _groups("--operator-group", "Who may also act, with --operator; may be repeated."),
        click.option(
            "--trust",
            multiple=True,
            metavar="ADDRESS",
            help="The proxy's address or network; may be repeated.",
        ),
        click.option("--user-header", metavar="HEADER", help="In which the proxy names the user."),
        click.option("--groups-header", metavar="HEADER", help="In which it names their groups."),
        click.option("--issuer", metavar="URL", help="The provider, for OpenID Connect."),
        click.option("--client-id", metavar="ID", help="What this page is called there."),
        click.option("--scope", metavar="TEXT", help="[default: openid profile email]"),
        click.option("--name-claim", metavar="CLAIM", help="[default: preferred_username]"),
        click.option("--groups-claim", metavar="CLAIM", help="[default: groups]"),
    )
