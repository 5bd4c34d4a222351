"""Sessions: signed cookies, which end by themselves and which no other site's page can use.

The key is made at the start, so nobody has to keep it: a restart ends all sessions. One that a
person has ended is remembered until its cookie is too old, wherever a copy of that may be.
"""

from __future__ import annotations

import secrets
import time
from typing import Any, Final

from attrs import Factory, field, frozen
from itsdangerous import BadSignature, URLSafeTimedSerializer
from starlette.requests import HTTPConnection
from starlette.responses import Response

from caxev.web.auth.people import Person, PersonRole

HOURS: Final = 10
"""How long a session lasts: a shift, and then people log in again."""
SCOPE_KEY: Final = "caxev.session"
LOGOUT_KEY: Final = "caxev.logout"
OUTSIDE_KEY: Final = "caxev.outside"
"""In the scope of a request that needs no login."""


@frozen
class LoginSession:
    """A person's session, begun at a time (Unix). Every form made for it has its `token`."""

    person: Person
    token: str = Factory(lambda: secrets.token_urlsafe(24))
    began: float = Factory(time.time)

    @property
    def age(self) -> float:
        """Seconds since its beginning."""
        return time.time() - self.began


def session_of(connection: HTTPConnection) -> LoginSession | None:
    """Return the session of a request that the gate has let through."""
    found: LoginSession | None = connection.scope.get(SCOPE_KEY)
    return found


@frozen
class SignedCookie:
    """A cookie that holds a value which only we can have written, for so many seconds.

    With `secure` (TLS) its name has the prefix that has browsers refuse one set by another host.
    """

    purpose: str
    seconds: int
    secure: bool
    same_site: str = "strict"
    # With a key of this process alone: a restart ends all sessions, and no key must be kept.
    _signer: URLSafeTimedSerializer = field(
        init=False,
        default=Factory(
            lambda self: URLSafeTimedSerializer(secrets.token_bytes(32), salt=self.purpose),
            takes_self=True,
        ),
    )

    @property
    def name(self) -> str:
        return f"{'__Host-' if self.secure else ''}caxev_{self.purpose}"

    def read(self, connection: HTTPConnection) -> Any:
        """Return the value; None if there is none, or if it is not ours or too old."""
        try:
            return self._signer.loads(connection.cookies[self.name], max_age=self.seconds)
        except (KeyError, BadSignature):
            return None

    def write(self, response: Response, value: Any) -> None:
        """Have the browser keep a value."""
        self._set(response, str(self._signer.dumps(value)), self.seconds)

    def delete(self, response: Response) -> None:
        """Have the browser forget it."""
        self._set(response, "", 0)

    def _set(self, response: Response, text: str, seconds: int) -> None:
        same_site: Any = self.same_site
        response.set_cookie(
            self.name, text, max_age=seconds, secure=self.secure, httponly=True, samesite=same_site
        )


@frozen
class Sessions:
    """The sessions of people who have got in."""

    cookie: SignedCookie
    _ended: dict[str, float] = field(init=False, factory=dict)
    """The tokens of sessions that people have ended, and when."""

    @classmethod
    def begin(cls, *, secure: bool) -> Sessions:
        """Make a key, and no session."""
        return cls(SignedCookie("session", HOURS * 3600, secure))

    def read(self, connection: HTTPConnection) -> LoginSession | None:
        """Return the session that the browser names, unless it has ended."""
        value = self.cookie.read(connection)
        if value is None:
            return None
        name, role, token, began = value
        if token in self._ended:
            return None
        return LoginSession(Person(name, PersonRole(role)), token, began)

    def write(self, response: Response, session: LoginSession) -> None:
        """Have the browser name this session from now on."""
        person = session.person
        value = (person.name, person.role.value, session.token, session.began)
        self.cookie.write(response, value)

    def end(self, response: Response, session: LoginSession) -> None:
        """End a session at once; have the browser forget it."""
        now = time.time()
        for token, at in list(self._ended.items()):
            if now - at > self.cookie.seconds:
                del self._ended[token]
        self._ended[session.token] = now
        self.cookie.delete(response)
