"""Serve the page: Hypercorn and what feeds it, in one nursery."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final, TypeAlias, cast
from urllib.parse import urlsplit

import trio
from attrs import define, frozen
from hypercorn.config import Config
from hypercorn.trio import serve as hypercorn_serve
from loguru import logger

from caxev import aio
from caxev.config import ConfigError, Settings, Sites
from caxev.core.errors import GiveUp
from caxev.core.processes import differing
from caxev.database import Database, DatabaseError, open_database
from caxev.engine.leaving import Leaving
from caxev.engine.process import tune_collector
from caxev.server_certificate import ServerCertificate
from caxev.web.acts.pages import ActingOptions, ActPages
from caxev.web.app import Pages
from caxev.web.auth.forms import PublicAddress
from caxev.web.auth.gate import Gate, Way
from caxev.web.auth.link import LinkLogin
from caxev.web.auth.options import LinkOptions, LoginOptions, OidcOptions, ProxyOptions, is_loopback
from caxev.web.auth.people import Membership
from caxev.web.auth.proxy import ProxyLogin
from caxev.web.auth.sessions import Sessions
from caxev.web.broadcast import Broadcast
from caxev.web.feeder import Feeder, Heard
from caxev.web.guard import LOOPBACK, WRITING, Guard
from caxev.web.hub import Hub
from caxev.web.run import History
from caxev.web.scene import Scene
from caxev.web.state import LiveState

Reread: TypeAlias = Callable[[], tuple[Sites, Sequence[Mapping[str, Any]]]]
"""Reads sites.json again; returns it with the rows of what handlers there are."""

TICK: Final = 1.0
"""Seconds between two looks at the clock: a lease lapses without any change."""
GRACE: Final = 2.0
"""Seconds that open connections have at the end."""


@frozen
class PageOptions:
    """How the page is served. `names`: host names that requests may use, beside loopback's.

    `address` is the one that browsers use, if it differs from the one in their requests.
    `login`: how people log in; None: everybody reads. `acting`: how operators act; None: nobody
    does. `history` makes rows of a run's history, `handlers` has a row for each handler, and
    `reread` reads sites.json and the handlers again. `started` is called with the address.
    """

    settings: Settings
    sites: Sites
    history: History
    host: str = "127.0.0.1"
    port: int = 8765
    names: Collection[str] = ()
    address: str | None = None
    login: LoginOptions | None = None
    acting: ActingOptions | None = None
    certificate: Path | None = None
    key: Path | None = None
    handlers: Sequence[Mapping[str, Any]] = ()
    reread: Reread | None = None
    started: Callable[[str], None] = print

    @property
    def hosts(self) -> frozenset[str]:
        """The names that are served: what else asks comes from another page."""
        public = {urlsplit(self.address).hostname or ""} if self.address else set()
        return LOOPBACK | {self.host.lower()} | {name.lower() for name in self.names} | public


async def serve(options: PageOptions) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises `GiveUp` if the address cannot be had.

    Raises `DatabaseError` if the database cannot be used at the start; afterwards trouble with it
    is shown and waited out.
    """
    tune_collector()
    leaving = Leaving()
    async with aio.loop(), AsyncExitStack() as stack:
        database = await stack.enter_async_context(open_database(options.settings))
        await database.check()
        operators = None
        if options.acting is not None:
            operators = await stack.enter_async_context(open_database(options.acting.settings))
            await operators.check()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leaving.listen)
            await _serve_on(options, database, leaving, operators)
            nursery.cancel_scope.cancel()


async def _serve_on(
    options: PageOptions, database: Database, leaving: Leaving, operators: Database | None
) -> None:
    """Serve from an open database until asked to leave; `operators` is as their user reaches it."""
    state, hub = LiveState(), Hub()
    scene = Scene(state, options.sites)
    broadcast = Broadcast(scene, hub)
    feeder = Feeder(database, state, broadcast)
    pages = Pages(scene, database, hub, options.history, options.handlers)
    app = _guarded(pages, options, operators)
    if options.reread is not None:
        databases = [one for one in (database, operators) if one is not None]
        leaving.hangup = PageReloader(pages, broadcast, options.reread, databases).reload
    async with trio.open_nursery() as nursery:
        nursery.start_soon(feeder.run)
        nursery.start_soon(hub.run)
        nursery.start_soon(pages.answers.run)
        nursery.start_soon(_tick, hub)
        await _serve_http(app, options, leaving.asked)
        nursery.cancel_scope.cancel()


def _guarded(pages: Pages, options: PageOptions, operators: Database | None) -> Guard:
    """Return all that is served, behind what lets people in. Raises `ConfigError`."""
    if options.login is None:
        return Guard(pages.app(), options.hosts)
    address = PublicAddress(options.address, tls=options.certificate is not None)
    sessions = Sessions.begin(secure=address.secure)
    way = _way_of(options.login, sessions, address)
    routes = [*way.routes()]
    if options.acting is not None and operators is not None:
        acting = ActPages(operators, pages.scene, options.acting.registry, address, pages.frame)
        routes += acting.routes()
    return Guard(Gate(pages.app(*routes), way, sessions), options.hosts, WRITING)


def _way_of(options: LoginOptions, sessions: Sessions, address: PublicAddress) -> Way:
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
        from caxev.web.auth.oidc import OidcLogin
    except ModuleNotFoundError as missing:
        raise ConfigError(
            f"--auth oidc needs the package {missing.name}: pip install 'caxev[web,oidc]'"
        ) from missing
    return OidcLogin(options, membership, sessions, address)


@define(eq=False)
class PageReloader:
    """Has pages show another sites.json; a file with a mistake changes nothing."""

    pages: Pages
    broadcast: Broadcast
    reread: Reread
    databases: Sequence[Database]

    async def reload(self) -> None:
        """Read credentials and sites.json again, and have all views rendered again."""
        for one in self.databases:
            try:
                await one.renew_credentials()
            except DatabaseError as error:
                logger.error("keeping the previous database credentials: {}", error)
        scene = self.pages.scene
        try:
            sites, handlers = self.reread()
        except ConfigError as error:
            logger.error("keeping the previous configuration: {}", error)
            return
        changed = ", ".join(differing(scene.sites.keys, sites.keys)) or "nothing"
        logger.info("reloaded {}; changed: {}", sites.path, changed)
        scene.sites, self.pages.handlers = sites, handlers
        scene.state.changed += 1  # what is counted by the rules of sites.json is counted again
        self.broadcast(Heard())
        for name in self.pages.hub.topics:
            self.pages.hub.reload(name)  # not all that a page shows of sites.json is in its parts


async def _tick(hub: Hub) -> None:
    while True:
        await trio.sleep(TICK)
        names = [name for name in hub.topics if not name.startswith("run")]
        if names:
            hub.wake(*names)


async def _serve_http(app: Any, options: PageOptions, leave: trio.Event) -> None:
    config = _HypercornConfig()
    config.bind = [
        f"[{options.host}]:{options.port}"
        if ":" in options.host
        else f"{options.host}:{options.port}"
    ]
    config.include_server_header = False
    config.graceful_timeout = config.shutdown_timeout = GRACE
    config.errorlog = _quiet()
    config.accesslog = None
    if options.certificate is not None:
        config.certfile, config.keyfile = str(options.certificate), str(options.key)
        config.keyfile_password = ""  # else OpenSSL asks for it on the terminal
        config.read_certificate(options.certificate, options.key)
    try:
        async with trio.open_nursery() as nursery:
            bound = await nursery.start(_bound, app, config, leave)
            options.started(bound[0])
            logger.info("the page is at {}", bound[0])
    except* OSError as group:
        raise _unusable(options, group) from None


class _HypercornConfig(Config):
    """Hypercorn's, with a certificate that is read again when its file has changed."""

    served: ServerCertificate | None = None

    def read_certificate(self, certificate: Path, key: Path | None) -> None:
        """Read the certificate. Raises `ConfigError`."""
        # Not None, as both files are named.
        make = cast("Callable[[], ssl.SSLContext]", super().create_ssl_context)
        self.served = ServerCertificate("the page", certificate, key, make)

    def create_ssl_context(self) -> ssl.SSLContext | None:
        """Return what the server's socket is wrapped in."""
        return None if self.served is None else self.served.context


def _unusable(options: PageOptions, group: BaseExceptionGroup[OSError]) -> GiveUp:
    # No ConfigError, after which systemd would not start it again: a port may be free later, and at
    # boot an address may not be there yet.
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    why = getattr(error, "strerror", None) or error
    return GiveUp(
        f"cannot listen on {options.host} port {options.port}: {why}; name another by --port"
    )


async def _bound(app: Any, config: Config, leave: trio.Event, *, task_status: Any) -> None:
    await hypercorn_serve(
        app, config, shutdown_trigger=leave.wait, task_status=task_status, mode="asgi"
    )


def _quiet() -> logging.Logger:
    """Return Hypercorn's log: its warnings go where ours go."""
    log = logging.getLogger("hypercorn.error")
    log.setLevel(logging.WARNING)
    return log
