"""Take the messages of a catalogue: Rucio's hermes posts them, and the catalogue is asked again.

Rucio has no change stream. Its daemon hermes delivers, among others by plain HTTP (its service
``elastic``), that a rule has become OK. A listener runs `Messages` beside its engine. If the
catalogue's ``rucio.messages`` names an address, each dataset of a message is checked by the site
that looks after it. The content of a message proves nothing: the catalogue is asked. The post is
answered when the request is in the database, so that hermes repeats lost messages.
"""

from __future__ import annotations

import contextvars
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from itertools import count
from random import random
from typing import Final

import trio
from attrs import define
from loguru import logger

from caxev.config import Site, Sites
from caxev.copies.storage import custodian
from caxev.core.clock import utcnow
from caxev.core.ledger import delay
from caxev.core.model import TRANSFERRED, RunId
from caxev.database import Database, DatabaseError, Lease, Request
from caxev.http_server import Quiet, SmallServer

LONGEST: Final = 16 << 20
"""Maximum size of a post in bytes; hermes sends a thousand messages of some hundred bytes."""


def datasets_in(body: bytes) -> Iterator[str]:
    """Return the datasets whose rules a post is about: ``scope:name``, each once."""
    found: dict[str, None] = {}
    for line in body.splitlines():
        try:
            message = json.loads(line)
        # hermes sends messages of other kinds, too; anybody can post anything.
        except (ValueError, RecursionError):
            continue
        payload = message.get("payload") if isinstance(message, Mapping) else None
        if not isinstance(payload, Mapping) or not payload.get("rule_id"):
            continue
        scope, name = payload.get("scope"), payload.get("name")
        if isinstance(scope, str) and isinstance(name, str):
            found[f"{scope}:{name}"] = None
    yield from found


@define(eq=False)
class Messages:
    """The receiver of messages of the catalogues that `site` uploads to."""

    database: Database
    lease: Lease
    site: Site
    sites: Sites

    @property
    def addresses(self) -> dict[str, tuple[str, int]]:
        """The address at which messages of each catalogue are taken, by its name."""
        found = [one for name in self.site.upload_options if (one := self.sites.find(name))]
        return {one.name: one.rucio.messages for one in found if one.rucio.messages}

    async def catch_up(self) -> None:
        """Do nothing: Rucio delivers again what was not taken."""

    def use(self, site: Site, sites: Sites) -> None:
        """Go by these sites from now on, but for the addresses."""
        self.site, self.sites = site, sites

    async def run(self) -> None:
        """Receive messages until cancelled. An address that is in use is tried again."""
        async with trio.open_nursery() as nursery:
            for name, address in self.addresses.items():
                nursery.start_soon(self._serve_at, name, address)

    async def _serve_at(self, name: str, address: tuple[str, int]) -> None:
        server = await self._opened(name, address)
        server.begin()
        logger.info("takes messages of {} at {}:{}", name, *server.server_address[:2])
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(server.close)

    async def _opened(self, name: str, address: tuple[str, int]) -> _Server:
        token = trio.lowlevel.current_trio_token()
        # The address may still be in use by the former listener of this site.
        for attempt in count(1):
            try:
                return _Server(address, partial(self._take, name), token)
            except OSError as error:
                wait = delay(attempt, random())  # noqa: S311  # not for secrets
                line = "messages of {} cannot be taken at {}:{}: {}; tried again in {:.0f} s"
                logger.error(line, name, *address, error, wait)
            await trio.sleep(wait)
        raise AssertionError

    async def _take(self, name: str, body: bytes) -> None:
        """Request checks of the datasets in a post. Raises `DatabaseError`."""
        places = [*datasets_in(body)]
        wanted: dict[str, list[RunId]] = {}
        for run in await self.database.located([name], places) if places else ():
            for one in run.copies:
                if one.host == name and one.status == TRANSFERRED and one.location in places:
                    wanted.setdefault(custodian(one, self.sites) or self.site.name, []).append(
                        run.id
                    )
        # Requests in the database and not calls: the responsible site may be another one.
        for who, runs in wanted.items():
            request = Request("replay", tuple(runs), handler="rucio_rules", force=True)
            await self.database.add_request(who, request, self.lease.owner, utcnow())
        if wanted:
            logger.info("{} reports {} datasets", name, sum(map(len, wanted.values())))


class _Server(SmallServer):
    """Serves one address in threads, and handles its posts in trio."""

    def __init__(
        self,
        address: tuple[str, int],
        take: Callable[[bytes], Awaitable[None]],
        token: trio.lowlevel.TrioToken,
    ) -> None:
        self.take = take
        self.token = token
        self.context = contextvars.copy_context()  # the database client needs it
        super().__init__(address, _Post)


class _Post(Quiet):
    """One request: a POST with the messages, a line each."""

    server: _Server

    def do_POST(self) -> None:  # noqa: N802  # the base's own name
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            length = -1
        if not 0 <= length <= LONGEST:
            self.answer(413 if length > LONGEST else 400)
            return
        body = self.rfile.read(length)
        if len(body) < length:
            return  # the sender closed the connection, or was too slow
        try:
            take = partial(trio.from_thread.run, self.server.take, body)
            self.server.context.copy().run(partial(take, trio_token=self.server.token))
        except (DatabaseError, trio.RunFinishedError, trio.Cancelled) as error:
            logger.debug("messages are to be sent again: {}", error)
            self.answer(503)
        else:
            self.answer(200)
