"""Define the options that every command has; `GlobalOptions` holds their values.

The group and each command have the same options, so that users may give them before or after the
command's name; the last value counts.
"""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TypeVar

import click
from attrs import define, field

from caxev import config as configuration
from caxev.core.errors import ConfigError

if TYPE_CHECKING:
    from caxev.asking.asker import Asker
    from caxev.config import Settings, Sites
    from caxev.core.registry import Registry
    from caxev.database import Database

F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
T = TypeVar("T")
LEVELS: Final = ("trace", "debug", "info", "success", "warning", "error")


@define
class GlobalOptions:
    """The global options, and what is loaded according to them, each thing once."""

    config: str | None = None
    mongo_uri: str | None = None
    database: str | None = None
    collection: str | None = None
    handlers: tuple[str, ...] = ()
    log_level: str | None = None
    log_file: str | None = None
    log_json: bool = False
    as_json: bool = False
    wide: bool = False
    _sites: Sites | None = field(init=False, default=None)
    _registries: dict[str, Registry] = field(init=False, factory=dict)

    @property
    def debug(self) -> bool:
        return self.log_level in {"trace", "debug"}

    def sites(self) -> Sites:
        """Load sites.json. Raises `ConfigError`."""
        if self._sites is None:
            self._use_environment_file()
            self._sites = configuration.load_sites(configuration.find_sites(self.config))
        return self._sites

    def reread(self) -> Sites:
        """Read sites.json again, as it is now. Raises `ConfigError`: then nothing has changed."""
        self._sites = configuration.load_sites(configuration.find_sites(self.config))
        self._registries.clear()
        return self._sites

    def settings(self) -> Settings:
        """Return where the database is. Raises `ConfigError`."""
        self._use_environment_file()
        return configuration.Settings.load(
            mongo_uri=self.mongo_uri, database=self.database, collection=self.collection
        )

    def operator_settings(self) -> Settings:
        """Return where the database is, with an operator's user. Raises `ConfigError`."""
        self._use_environment_file()
        return configuration.Settings.of_operators(
            database=self.database, collection=self.collection, environ=os.environ
        )

    def _use_environment_file(self) -> None:
        from caxev.config.environment_file import use_environment_file

        use_environment_file(own_database=self.mongo_uri is not None)

    def registry(self, name: str) -> Registry:
        """Return a site's handlers: the usual ones, those of methods, its own and ``--handlers``.

        Raises `ConfigError`. If this process has loaded the handlers of several sites, those that
        only another site names are left out.
        """
        # Commands about many runs ask for it for each.
        if name not in self._registries:
            self._registries[name] = self._registry(name)
        return self._registries[name]

    def _registry(self, name: str) -> Registry:
        from caxev.core.registry import Registry, recorded

        sites = self.sites()
        own = sites.get(name).handlers
        methods = {one.method for one in sites.values()}
        by_method = {
            module for module, method in configuration.BY_METHOD.items() if method in methods
        }
        configuration.load_handlers((*sorted(by_method), *own), self.handlers)
        # Registration is global to a process, and `recorded` has every handler that it has ever
        # loaded, as in `caxev sites check`, which goes through all sites.
        foreign = {module for site in sites.values() for module in site.handlers}
        foreign |= {*configuration.BY_METHOD}
        foreign -= {*by_method, *own, *configuration.DEFAULT_HANDLERS}
        try:
            return Registry((h for h in recorded if h.module not in foreign), sites.here(name))
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def log(self, usual: str, *, lasting: bool = False) -> None:
        """Start logging to stderr, at the level asked for or else the usual one.

        A `lasting` process never blocks on the reader of its log.
        """
        from caxev import logs

        level = (self.log_level or usual).upper()
        logs.configure(level, file=self.log_file, as_json=self.log_json, lasting=lasting)

    def with_database(
        self,
        function: Callable[Concatenate[Database, P], Awaitable[T]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Run an async function with the database, open and checked, as its first argument.

        Raises `DatabaseError`.
        """
        from caxev import aio
        from caxev import database as db

        settings = self.settings()

        async def run() -> T:
            async with aio.loop(), db.open_database(settings) as database:
                await database.check()
                return await function(database, *args, **kwargs)

        result: T = db.run(run)
        return result

    def with_asker(
        self,
        function: Callable[Concatenate[Asker, P], Awaitable[T]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Run an async function that asks for the user. Raises `ConfigError`, `DatabaseError`."""

        async def ask(database: Database) -> T:
            return await function(self.asker(database), *args, **kwargs)

        return self.with_database(ask)

    def asker(self, database: Database) -> Asker:
        """Return what asks for the user. Raises `ConfigError`."""
        from caxev.asking.asker import Asker

        return Asker(database, self.sites(), self.registry, requester())


class CommandGroup(click.Group):
    """A group that names the nearest of its commands for an unknown one."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command. Raises click's error."""
        known = self.list_commands(ctx)
        if args[0] not in known and not args[0].startswith("-"):
            from caxev.config.errors import hint

            guess = hint(args[0], known)
            ctx.fail(f"no such command {args[0]!r}{guess and f' ({guess})'}")
        return super().resolve_command(ctx, args)


def requester() -> str:
    """Return who gives the command: user@host."""
    # In a container the user id may have no name.
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def options() -> GlobalOptions:
    """Return the options of the running command; the defaults if none is running."""
    context = click.get_current_context(silent=True)
    if context is None:
        return GlobalOptions()
    found: GlobalOptions = context.find_root().ensure_object(GlobalOptions)
    return found


def _remember(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    # The option was not given here: keep what was given before the command's name.
    if value is None or value == () or value is False:
        return
    found = context.find_root().ensure_object(GlobalOptions)
    assert parameter.name is not None
    if parameter.name == "handlers":  # repeatable, so both places add to it
        value = (*found.handlers, *value)
    setattr(found, parameter.name, value)


def _option(*names: str, **attributes: Any) -> click.Option:
    return click.Option(names, callback=_remember, expose_value=False, **attributes)


def global_options() -> list[click.Option]:
    """Return the options that every command has, in the order of the group's help."""
    return [
        _option(
            "--config", metavar="PATH", help="sites.json. [default: CAXEV_SITES, ./, /etc/caxev]"
        ),
        _option("--mongo-uri", metavar="URI", help="The database. [default: CAXEV_MONGO_URI]"),
        _option("--database", metavar="NAME", help="The name of the database. [default: run]"),
        _option("--collection", metavar="NAME", help="The runs' collection. [default: runs_new]"),
        _option(
            "--handlers",
            metavar="PATH.py",
            multiple=True,
            help="A file with more handlers; may be repeated.",
        ),
        _option(
            "--log-level",
            type=click.Choice(LEVELS, case_sensitive=False),
            help="What to log on stderr. [default: info for listen, else warning]",
        ),
        _option("--log-file", metavar="PATH", help="Log also to this file, which is rotated."),
        _option("--log-json", is_flag=True, help="Log one JSON object a line."),
    ]


def hidden_options() -> list[click.Option]:
    """Return the same options for a command: only the group's help lists them."""
    found = global_options()
    for one in found:
        one.hidden = True
    return found


def as_text() -> list[click.Option]:
    """Return the output options of a command that prints lines: none."""
    return []


def as_json() -> list[click.Option]:
    """Return the output options of a command that prints lines or JSON."""
    return [_option("--json", "as_json", is_flag=True, help="Print one JSON document.")]


def as_table() -> list[click.Option]:
    """Return the output options of a command that prints a table or JSON."""
    return [*as_json(), _option("--wide", is_flag=True, help="Show all columns, unfolded.")]


def example(*lines: str) -> str:
    """Return the end of a help text: commands to try."""
    # A line that is a backspace makes click print the paragraph without wrapping it.
    return "\n".join(("\b", "Example:", *(f"  {line}" for line in lines)))
