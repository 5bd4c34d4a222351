"""Log in by OpenID Connect: Indigo IAM, CILogon, Keycloak, or another provider that has discovery.

It is the code flow with PKCE, `state` and `nonce`, which authlib carries out. The provider sends
the browser back from another site, so no strict cookie comes with it: what the flow must remember
is in a cookie of its own, which is lax and short-lived, and worth nothing without the code. The
session's cookie is strict: a page of ours then redirects to the requested one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import httpx2
from attrs import define, field
from authlib.common.errors import AuthlibBaseError
from authlib.integrations.starlette_client import OAuth
from joserfc.errors import JoseError
from loguru import logger
from starlette.requests import HTTPConnection, Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from caxev.config import ConfigError
from caxev.config.settings import secret
from caxev.web.auth.forms import PublicAddress, read_form
from caxev.web.auth.gate import CALLBACK, LOGOUT, bounce, door, local
from caxev.web.auth.options import LOGIN, OidcOptions
from caxev.web.auth.people import LogInAgain, Membership, NotAdmitted, Person
from caxev.web.auth.sessions import LoginSession, Sessions, SignedCookie

SECRET: Final = "CAXEV_OIDC_CLIENT_SECRET"  # noqa: S105  # a variable's name
PATIENCE: Final = 10.0
"""Seconds that the provider has for an answer."""
MINUTES: Final = 10
"""How long a person may take to log in there."""
BELIEVED: Final = 3600.0
"""Seconds for which the provider's answer about a person is valid."""
ENDPOINTS: Final = ("authorization_endpoint", "token_endpoint", "jwks_uri")
ALGORITHMS: Final = (
    "RS256",
    "RS384",
    "RS512",
    "PS256",
    "PS384",
    "PS512",
    "ES256",
    "ES384",
    "ES512",
)
"""Signatures that are accepted, even if the provider lists others: those with a public key."""


@define(eq=False)
class OidcLogin:
    """People who log in at a provider; the session holds who they are until it ends.

    The provider's answer about a person is believed for `BELIEVED` seconds. The next page then
    leads there and back, which asks for nothing while the person is still logged in there; who has
    lost a group or the account has lost it here, too.
    """

    options: OidcOptions
    membership: Membership
    sessions: Sessions
    address: PublicAddress
    logs_in: bool = field(init=False, default=True)
    _flow: SignedCookie = field(init=False)
    _client: Any = field(init=False)

    def __attrs_post_init__(self) -> None:
        secure = self.address.secure
        self._flow = SignedCookie("login", MINUTES * 60, secure, same_site="lax")
        self._client = self._new_client()

    def session(self, connection: HTTPConnection, known: LoginSession | None) -> LoginSession:
        """Return the session that is known. Raises `NotAdmitted` if there is none, or too old."""
        if known is None:
            raise NotAdmitted(401, "You are not logged in.")
        if known.age > BELIEVED and connection.url.path != LOGOUT:
            raise LogInAgain
        return known

    def routes(self) -> Sequence[Route]:
        """Return the addresses of logging in and out."""
        return (
            Route(LOGIN, self.log_in),
            Route(CALLBACK, self.come_back),
            Route(LOGOUT, self.log_out, methods=["POST"]),
        )

    async def log_in(self, request: Request) -> Response:
        """Send the browser to the provider, unless its session is good."""
        following = local(request.query_params.get("next", "/"))
        known = self.sessions.read(request)
        if known is not None and known.age <= BELIEVED:
            return RedirectResponse(following, 303)
        # authlib keeps there what it must find again; the cookie has it meanwhile.
        request.scope["session"] = flow = {"next": following}
        try:
            await self._known_provider()
            answer: Response = await self._client.authorize_redirect(
                request, f"{self.address.origin(request)}{CALLBACK}"
            )
        except (httpx2.HTTPError, ValueError) as error:
            return self._trouble(error, following)
        self._flow.write(answer, flow)
        return answer

    async def come_back(self, request: Request) -> Response:
        """Begin the session of a person whom the provider has sent back."""
        flow = self._flow.read(request) or {}
        following = local(flow.get("next", "/"))
        request.scope["session"] = flow
        try:
            person = self._person(await self._claims(request))
        except NotAdmitted as why:
            return door(str(why), why.status, following, logs_in=True)
        except (AuthlibBaseError, JoseError) as error:
            logger.warning("a log-in was refused: {}", error)
            return door("The log-in was not completed: try again.", 403, following, logs_in=True)
        except (httpx2.HTTPError, ValueError) as error:
            return self._trouble(error, following)
        logger.info("{} has logged in as {}", person.name, person.role.value)
        # No redirect: the way here began at another site, so a browser would send no cookie along.
        answer = bounce(following)
        self._flow.delete(answer)
        self.sessions.write(answer, LoginSession(person))
        return answer

    async def log_out(self, request: Request) -> Response:
        """End the session."""
        session, _ = await read_form(request, self.address)
        answer = door("You are logged out.", 200, "/", logs_in=True)
        self.sessions.end(answer, session)
        return answer

    def _new_client(self) -> Any:
        """Return authlib's client. Raises `ConfigError`."""
        chosen, ours = self.options, secret(SECRET)
        return OAuth().register(
            "provider",
            client_id=chosen.client_id,
            client_secret=ours,
            server_metadata_url=f"{chosen.issuer.rstrip('/')}/.well-known/openid-configuration",
            client_kwargs={
                "scope": chosen.scope,
                "code_challenge_method": "S256",
                "timeout": PATIENCE,
                **({} if ours else {"token_endpoint_auth_method": "none"}),
            },
        )

    def _person(self, claims: Mapping[str, Any]) -> Person:
        """Return who the claims are about. Raises `NotAdmitted`."""
        groups = claims.get(self.options.groups_claim) or ()
        listed = [groups] if isinstance(groups, str) else groups
        names = [one for one in listed if isinstance(one, str)] if isinstance(listed, list) else ()
        name = str(claims.get(self.options.name_claim) or claims["sub"])
        return self.membership.person(name, names)

    async def _known_provider(self) -> Mapping[str, Any]:
        """Return the provider's discovery document. Raises ValueError if it is another's."""
        metadata: dict[str, Any] = await self._client.load_server_metadata()
        if metadata.get("issuer") != self.options.issuer:
            self._client = self._new_client()  # which asks again
            raise ValueError(f"the provider calls itself {metadata.get('issuer')!r}")
        if missing := [name for name in ENDPOINTS if name not in metadata]:
            self._client = self._new_client()
            raise ValueError(f"the provider's discovery document lacks {', '.join(missing)}")
        metadata["id_token_signing_alg_values_supported"] = ALGORITHMS
        return metadata

    async def _claims(self, request: Request) -> Mapping[str, Any]:
        """Return the provider's claims about the person: in the signed token, and on request."""
        metadata = await self._known_provider()
        try:
            self._client.client_secret = secret(SECRET)
        except ConfigError as error:
            logger.error("log-ins keep the previous client secret: {}", error)
        # By itself authlib takes one that is for another client, if its `azp` names us.
        ours = {"iss": {"value": metadata["issuer"]}, "aud": {"value": self._client.client_id}}
        token = await self._client.authorize_access_token(request, claims_options=ours)
        claims = token.get("userinfo")
        if claims is None:
            raise ValueError("the provider sent no ID token")
        if "userinfo_endpoint" not in metadata:
            return dict(claims)
        more = await self._client.userinfo(token=token)
        if more.get("sub") != claims["sub"]:
            raise ValueError("the provider's answers are about two people")
        return {**more, **claims}  # what is signed counts more

    def _trouble(self, error: Exception, following: str) -> Response:
        logger.error("{} is of no use for a log-in: {}", self.options.issuer, error)
        words = "The log-in service cannot be used now: try again later."
        return door(words, 503, following, logs_in=True)
