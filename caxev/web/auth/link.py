"""Know the person who started the page by a link that it printed. Everybody else only reads."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from attrs import frozen
from loguru import logger
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response
from starlette.routing import Route

from caxev.web.auth.gate import bounce, door
from caxev.web.auth.options import LOGIN, LinkOptions
from caxev.web.auth.people import Person, PersonRole
from caxev.web.auth.sessions import LoginSession, Sessions


@frozen
class LinkLogin:
    """A person who opens the link may act, in the name of the person who started the page.

    The link is printed where that person alone sees it, and is good until the page ends. A browser
    that has opened it holds a session, as after any log-in.
    """

    options: LinkOptions
    sessions: Sessions
    logs_in: bool = False

    def session(
        self, connection: HTTPConnection, known: LoginSession | None
    ) -> LoginSession | None:
        """Return the session that is known. Without one a browser reads."""
        del connection
        return known

    def routes(self) -> Sequence[Route]:
        """Return the address of the link."""
        return (Route(LOGIN, self.log_in),)

    async def log_in(self, request: Request) -> Response:
        """Begin the session of who has the key."""
        given = request.query_params.get("key", "").encode("utf-8", "replace")
        if not hmac.compare_digest(given, self.options.key.encode()):
            words = "This link is not of this page: open the one that it printed when it started."
            return door(words, 403, "/", logs_in=False)
        logger.info("{} acts from the page, by its link", self.options.name)
        # Another site's page may have had the link: ours redirects, so that the cookie is sent.
        answer = bounce("/")
        person = Person(self.options.name, PersonRole.OPERATOR)
        self.sessions.write(answer, LoginSession(person))
        return answer
