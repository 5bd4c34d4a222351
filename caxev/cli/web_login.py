"""The options of ``caxev web`` about who gets in."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import click
from attrs import frozen

from caxev.cli.command import Decorator, needs, together
from caxev.cli.options import requester

if TYPE_CHECKING:
    from caxev.web.auth.options import LoginOptions

_RULES: Final = (
    needs("--trust --user-header --groups-header", "--auth=proxy"),
    needs("--issuer --client-id --scope --name-claim --groups-claim", "--auth=oidc"),
    needs("--reader-group --operator-group", "--auth=proxy --auth=oidc"),
    needs("--reader-group --operator-group", "--groups-header --auth=oidc"),
    needs("--auth=proxy", "--trust"),
    needs("--auth=proxy", "--user-header"),
    needs("--auth=oidc", "--issuer"),
    needs("--auth=oidc", "--client-id"),
    needs("--operator", "--operator-group --auth=link"),
    needs("--operator-group --auth=link", "--operator"),
)


@frozen
class LoginChoice:
    """The way to get in that was chosen, and the options about it that were given."""

    way: str
    given: Mapping[str, Any]

    @classmethod
    def of(cls, *, auth: str, **given: Any) -> LoginChoice:
        """Take what was given."""
        return cls(auth, {name: value for name, value in given.items() if value})

    def check(self, host: str) -> None:
        """Check that the page may be served at this address. Raises click's error."""
        from caxev.web.auth.options import is_loopback

        if self.way == "link" and not is_loopback(host):
            raise click.UsageError("--auth link is for this machine: --host must be of loopback")

    def options(self) -> LoginOptions | None:
        """Return the options of the page; None: nobody logs in."""
        if self.way == "none":
            return None
        from caxev.web.auth.options import LinkOptions, LoginOptions, OidcOptions, ProxyOptions
        from caxev.web.auth.people import Membership

        given = self.given
        groups = (frozenset(given.get(name, ())) for name in ("reader_group", "operator_group"))
        by: ProxyOptions | OidcOptions | LinkOptions
        if self.way == "proxy":
            trusted = tuple(map(_network, given["trust"]))
            by = ProxyOptions(trusted, given["user_header"], given.get("groups_header"))
        elif self.way == "oidc":
            own = ("issuer", "client_id", "scope", "name_claim", "groups_claim")
            by = OidcOptions(**{name: given[name] for name in own if name in given})
        else:
            by = LinkOptions(requester())
        return LoginOptions(by, Membership(*groups))


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
    try:
        parts = urlsplit(value.lower())
        is_page = parts.scheme in {"http", "https"} and parts.path in {"", "/"}
        fits = is_page and parts.hostname and parts.port != 0
    except ValueError:
        fits = False
    if not fits:
        raise click.BadParameter("it should look like https://caxev.example.org")
    return f"{parts.scheme}://{parts.netloc}"


def _groups(name: str, words: str) -> Decorator:
    return click.option(name, multiple=True, metavar="GROUP", help=words)


def logs_in() -> Decorator:
    """Add the options, as the argument `login`."""
    return together(
        "login",
        LoginChoice.of,
        click.option(
            "--auth",
            type=click.Choice(["none", "proxy", "oidc", "link"]),
            default="none",
            show_default=True,
            help="How people log in: by a proxy before the page, by OpenID Connect, or by a link "
            "that is printed for the person who starts the page.",
        ),
        _groups("--reader-group", "A group that may see the page; may be repeated. [default: all]"),
        _groups("--operator-group", "A group that may also act, with --operator; may be repeated."),
        click.option(
            "--trust",
            multiple=True,
            metavar="ADDRESS",
            help="The proxy's address or network; may be repeated.",
        ),
        click.option("--user-header", metavar="HEADER", help="The proxy's header with the user."),
        click.option(
            "--groups-header", metavar="HEADER", help="The proxy's header with the user's groups."
        ),
        click.option("--issuer", metavar="URL", help="The provider of OpenID Connect."),
        click.option("--client-id", metavar="ID", help="The page's client id at the provider."),
        click.option(
            "--scope", metavar="TEXT", help="The scopes to ask for. [default: openid profile email]"
        ),
        click.option(
            "--name-claim",
            metavar="CLAIM",
            help="The claim with a person's name. [default: preferred_username]",
        ),
        click.option(
            "--groups-claim",
            metavar="CLAIM",
            help="The claim with a person's groups. [default: groups]",
        ),
        *_RULES,
    )
