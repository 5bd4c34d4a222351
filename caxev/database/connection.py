"""The connection to the database, and how trio code calls the operations on it.

An operation is an asyncio method of a subclass of `Connection`, marked `operation`: that makes it
a trio method with the same arguments, whose whole work takes one crossing into asyncio.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from datetime import UTC, datetime
from functools import partial, wraps
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from attrs import define, field
from loguru import logger
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.asynchronous.cursor import AsyncCursor
from pymongo.errors import PyMongoError
from pymongo.read_concern import ReadConcern

from caxev import aio
from caxev.config.settings import Settings
from caxev.core.clock import clock
from caxev.core.errors import ConfigError
from caxev.database.client import (
    Client,
    Document,
    LoginFailed,
    NotReplicaSet,
    Unreachable,
    connect,
    credentials,
    not_replica_set,
    translated,
)

Collection = AsyncCollection[Document]
Session = AsyncClientSession | None
C = TypeVar("C", bound="Connection")
P = ParamSpec("P")
T = TypeVar("T")
Method = Callable[Concatenate[C, P], Coroutine[Any, Any, T]]

LIMIT: Final = 120.0
"""Seconds that a call may take: reading many large runs over a slow link does take long."""
LONG_LIMIT: Final = 3600.0
"""Seconds that building indexes, or counting all copies, may take."""
WRITES_LIMIT: Final = 25.0
"""Seconds that some writes may take together, such as a transaction."""
SLOW: Final = 12.0
"""Seconds after which a call that has not ended is reported..."""
REPEATED: Final = 600.0
"""...but not more often than this."""
STEP: Final = 0.5
"""Seconds by which the database's clock may move at once without a warning: NTP moves it so."""
PAGE: Final = 1000
"""Runs that are read at a time."""


def within(limit: float, held: float = 0.0) -> Callable[[Method[C, P, T]], Method[C, P, T]]:
    """Make a trio method of an asyncio one; `limit` and `held` as in `Connection._call`."""

    def decorate(function: Method[C, P, T]) -> Method[C, P, T]:
        @wraps(function)
        async def method(self: C, /, *args: P.args, **kwargs: P.kwargs) -> T:
            bound = partial(function, self, *args, **kwargs)
            return await self._call(bound, limit=limit, held=held)

        return method

    return decorate


def operation(function: Method[C, P, T]) -> Method[C, P, T]:
    """Make a trio method of an asyncio one, which may take `LIMIT` seconds."""
    return within(LIMIT)(function)


@define(eq=False, slots=False)
class Connection:
    """The client, the collections, and the one session in which transactions are made."""

    settings: Settings
    _client: Client = field(init=False)
    _runs: Collection = field(init=False)
    _confirmed: Collection = field(init=False)
    _ledger: Collection = field(init=False)
    _requests: Collection = field(init=False)
    _manifests: Collection = field(init=False)
    _history: Collection = field(init=False)
    # All transactions of this process use one session, one at a time: the next process ends it
    # when it takes over, so that nothing half-written can block it.
    _session: Session = field(init=False, default=None)
    _transacting: asyncio.Lock = field(init=False, factory=asyncio.Lock)
    _warned: float = field(init=False, default=-REPEATED)
    _credentials: object = field(init=False)
    _unusable: str = field(init=False, default="")
    """Why renewed credentials were not taken, as logged last: each failed call tries them."""
    _closing: set[asyncio.Task[None]] = field(init=False, factory=set)

    def __attrs_post_init__(self) -> None:
        self._connect(self.settings)

    def _connect(self, settings: Settings) -> None:
        # Before the client: a file that changes in between differs at the next failure.
        found = credentials(settings)
        self._client = connect(settings)
        # Only once that has succeeded: a file that could not be read is tried again.
        self.settings, self._credentials = settings, found
        self._runs = self._client[settings.database][settings.collection]
        # A snapshot of a write that is rolled back later would hide the change that follows.
        self._confirmed = self._runs.with_options(read_concern=ReadConcern("majority"))
        self._ledger = self._own("ledger")
        self._requests = self._own("requests")
        self._manifests = self._own("manifests")
        self._history = self._own("history")

    def _own(self, name: str) -> Collection:
        """Return one of caxev's own collections."""
        return self._client[self.settings.database][f"{self.settings.prefix}{name}"]

    async def _call(
        self,
        function: Callable[..., Awaitable[T]],
        *args: Any,
        limit: float = LIMIT,
        held: float = 0.0,
    ) -> T:
        """Await an asyncio function from trio, for up to `limit` seconds.

        The server may hold the answer back for `held` seconds more. A write that was cut short may
        have been made, or may become durable later: callers repeat it.
        """
        return await aio.call(self._perform, partial(function, *args), limit, held)

    async def _by_pages(
        self,
        find: Callable[[], Awaitable[AsyncCursor[Document]]],
        size: int,
        read: Callable[[list[Document]], list[T]],
        limit: float = LIMIT,
    ) -> AsyncGenerator[list[T], None]:
        """Read what an asyncio function finds page by page, for up to `limit` seconds a page."""
        cursor = await self._call(find, limit=limit)
        while documents := await self._call(cursor.to_list, size, limit=limit):
            # A page of nothing but malformed ones is not the end.
            if page := read(documents):
                yield page

    async def _perform(self, function: partial[Awaitable[T]], limit: float, held: float) -> T:
        name = function.func.__name__.lstrip("_")
        slow = asyncio.get_running_loop().call_later(SLOW + held, self._warn, name)
        try:
            async with asyncio.timeout(limit + held):
                with translated(self.settings):
                    return await function()
        except TimeoutError:
            server = self.settings.safe_uri
            message = f"the database at {server} did not finish {name!r} in time"
            raise Unreachable(message) from None
        except (Unreachable, LoginFailed):
            # A password or a certificate that was renewed breaks connections in many ways.
            self._renew_credentials()
            raise
        finally:
            slow.cancel()

    def _warn(self, name: str) -> None:
        # Rarely: if one call is slow, all that wait at the same time are.
        now = time.monotonic()
        if now >= self._warned + REPEATED:
            self._warned = now
            server = self.settings.safe_uri
            logger.warning("the database at {} has not answered {!r} yet", server, name)

    async def _transaction(
        self,
        function: Callable[[AsyncClientSession], Awaitable[T]],
        limit: float = WRITES_LIMIT,
    ) -> T:
        failed: list[PyMongoError] = []
        # pymongo alone would retry for two minutes, and meanwhile the lease could not be renewed.
        async with self._transacting, asyncio.timeout(limit):
            if self._session is None:
                self._session = self._client.start_session()
            try:
                return await self._session.with_transaction(partial(_attempt, function, failed))
            finally:
                while failed:
                    aio.free(failed.pop())

    # -- credentials ------------------------------------------------------------------------

    @operation
    async def renew_credentials(self) -> None:
        """Connect again if the password, or a file of certificates, has changed."""
        self._unusable = ""  # a person asked, so log the reason even if it was logged before
        self._renew_credentials()

    def _renew_credentials(self) -> None:
        # Calls that are under way on the old connections fail, and their callers repeat them.
        try:
            settings = self.settings.again()
            if credentials(settings) == self._credentials:
                return
            old, had_session = self._client, self._session is not None
            self._connect(settings)
        except ConfigError as error:
            if self._unusable != str(error):
                logger.warning("keeping the previous database credentials: {}", error)
            self._unusable = str(error)
            return
        self._unusable = ""
        logger.info("the credentials for {} have changed: reconnecting", settings.safe_uri)
        self._session = self._client.start_session() if had_session else None
        closing = asyncio.get_running_loop().create_task(old.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closed)

    def _closed(self, closing: asyncio.Task[None]) -> None:
        self._closing.discard(closing)
        # An error that nobody has retrieved would end the loop.
        if not closing.cancelled() and (error := closing.exception()) is not None:
            logger.debug("an old connection could not be closed: {!r}", error)

    # -- the server -------------------------------------------------------------------------

    async def _check_server(self) -> None:
        """Raise unless the server can be reached, lets us in and is a replica set."""
        hello = await self._client.admin.command("hello")
        if "setName" not in hello and hello.get("msg") != "isdbgrid":
            raise NotReplicaSet(not_replica_set(self.settings.safe_uri))
        # hello needs no rights, so ask for something that does.
        await self._runs.find_one({}, {"_id": 1})
        # Only now: the time that it took to connect would count as the clocks' difference.
        asked = time.monotonic()
        hello = await self._client.admin.command("hello")
        self._note_time(hello["localTime"], asked)

    @staticmethod
    def _note_time(server: datetime, asked: float) -> None:
        # A command's reply has its times without a zone.
        step = clock.note(server.replace(tzinfo=UTC), asked)
        if abs(step) >= STEP:
            logger.warning(
                "the database's clock has moved by {:.1f} s: it was set, or the primary changed",
                step,
            )

    async def close(self) -> None:
        """Close all connections."""

        async def close() -> None:
            if self._session is not None:
                await self._session.end_session()
            await self._client.close()
            await asyncio.gather(*self._closing, return_exceptions=True)
            # A transport closes its socket one turn of the loop after its `close`.
            await asyncio.sleep(0)
            await asyncio.sleep(0)

        # Not an operation: one that fails would connect again.
        await aio.call(close)


async def _attempt(
    function: Callable[[AsyncClientSession], Awaitable[T]],
    failed: list[PyMongoError],
    session: AsyncClientSession,
) -> T:
    """Make an attempt at a transaction; what it failed with is added to `failed`."""
    try:
        return await function(session)
    except PyMongoError as error:
        failed.append(error)
        # PyMongo repeats a transaction by itself, and keeps the error for long: see `aio.free`.
        raise error.with_traceback(None)  # noqa: B904
