"""Make the way in that was chosen."""

from __future__ import annotations

from urllib.parse import urlsplit

from caxev.config import ConfigError
from caxev.web.auth.forms import PublicAddress
from caxev.web.auth.gate import Way
from caxev.web.auth.link import LinkLogin
from caxev.web.auth.options import LinkOptions, LoginOptions, OidcOptions, ProxyOptions, is_loopback
from caxev.web.auth.people import Membership
from caxev.web.auth.proxy import ProxyLogin
from caxev.web.auth.sessions import Sessions


def way_of(options: LoginOptions, sessions: Sessions, address: PublicAddress) -> Way:
    """Return how people get in. Raises `ConfigError`."""
    if isinstance(options.by, ProxyOptions):
        return ProxyLogin(options.by, options.membership)
    if isinstance(options.by, LinkOptions):
        return LinkLogin(options.by, sessions)
    return _oidc(options.by, options.membership, sessions, address)


def _oidc(
    options: OidcOptions, membership: Membership, sessions: Sessions, address: PublicAddress
) -> Way:
    issuer = urlsplit(options.issuer)
    if issuer.scheme != "https" and not is_loopback(issuer.hostname or ""):
        raise ConfigError(f"--issuer {options.issuer} must begin with https://")
    try:
        from caxev.web.auth.oidc import OidcLogin, Provider
    except ModuleNotFoundError as missing:
        raise ConfigError(
            f"--auth oidc needs the package {missing.name}: pip install 'caxev[web,oidc]'"
        ) from missing
    return OidcLogin(Provider(options), membership, sessions, address)
