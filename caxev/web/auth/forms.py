"""Read what a form of ours sends; refuse what another site's page sends in a person's name."""

from __future__ import annotations

import hmac
from typing import Final
from urllib.parse import parse_qsl

from attrs import frozen
from starlette.datastructures import ImmutableMultiDict
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request

from caxev.web.auth.sessions import LoginSession, session_of

LONGEST: Final = 1_000_000
"""Bytes of a form."""
MOST_FIELDS: Final = 1000
TOKEN: Final = "token"  # noqa: S105  # a field's name
Form = ImmutableMultiDict[str, str]


@frozen
class PublicAddress:
    """Where browsers find the page: `given`, or else by the name that each asks for."""

    given: str | None = None
    tls: bool = False

    @property
    def secure(self) -> bool:
        return self.given.startswith("https:") if self.given is not None else self.tls

    def origin(self, connection: HTTPConnection) -> str:
        """Return scheme, name and port as browsers name them."""
        if self.given is not None:
            return self.given
        return f"{'https' if self.tls else 'http'}://{connection.headers.get('host', '')}"


async def read_form(request: Request, address: PublicAddress) -> tuple[LoginSession, Form]:
    """Return who has sent a form, and its fields. Raises `HTTPException`."""
    _check_origin(request, address)
    session = session_of(request)
    if session is None:
        raise HTTPException(403, "Nothing can be changed here.")
    form = await _fields(request)
    given = form.get(TOKEN, "")
    if not hmac.compare_digest(given.encode("utf-8", "replace"), session.token.encode()):
        raise HTTPException(403, "This form is not of your session: open its page again.")
    return session, form


def _check_origin(request: Request, address: PublicAddress) -> None:
    wanted, origin = address.origin(request), request.headers.get("origin")
    site = request.headers.get("sec-fetch-site", "same-origin")
    if origin != wanted or site != "same-origin":
        raise HTTPException(
            403,
            f"This was sent by a page of {origin or 'an unknown origin'}, not of {wanted}. "
            "If that is this page's own address, give it to caxev web by --address.",
        )


async def _fields(request: Request) -> Form:
    kind = request.headers.get("content-type", "").partition(";")[0].strip()
    if kind != "application/x-www-form-urlencoded":
        raise HTTPException(415, "A form is sent as application/x-www-form-urlencoded.")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LONGEST:
            raise HTTPException(413, "The form is too long.")
    try:
        pairs = parse_qsl(
            body.decode("ascii"),
            keep_blank_values=True,
            errors="surrogateescape",
            max_num_fields=MOST_FIELDS,
        )
    except ValueError as error:
        raise HTTPException(400, "The form cannot be read.") from error
    return Form(pairs)
