"""Define the options that every command has; `State` holds their values.

The group and each command have the same options, so that users may give them before or after the
command's name; the last value counts.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from attrs import define, field

from caxev.config import (
    BY_METHOD,
    DEFAULT_HANDLERS,
    ConfigError,
    Settings,
    Sites,
    find_sites,
    load_handlers,
    load_sites,
)

if TYPE_CHECKING:
    from caxev.core.registry import Registry
    from caxev.database import Database

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
LEVELS: Final = ("trace", "debug", "info", "success", "warning", "error")
MOST: Final = 2**63 - 1
"""The largest number that MongoDB can hold."""


class RunNumber(click.ParamType):  # type: ignore[type-arg]  # not generic in older clicks
    """A run's number: at least 1, and within MongoDB's range."""

    name = "run number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number. Raises click's error."""
        number: int = click.IntRange(1, MOST).convert(value, param, ctx)
        return number


RUN_NUMBER: Final = RunNumber()


@define
class State:
    """The global options, and what is loaded according to them, each thing once."""

    config: str | None = None
    mongo_uri: str | None = None
    database: str | None = None
    collection: str | None = None
    handlers: tuple[str, ...] = ()
    log_level: str | None = None
    log_file: str | None = None
    log_json: bool = False
    wide: bool = False
    _sites: Sites | None = field(init=False, default=None)

    @property
    def debug(self) -> bool:
        return self.log_level in {"trace", "debug"}

    def sites(self) -> Sites:
        """Load sites.json. Raises `ConfigError`."""
        if self._sites is None:
            self._sites = load_sites(find_sites(self.config))
        return self._sites

    def settings(self) -> Settings:
        """Return where the database is. Raises `ConfigError`."""
        return Settings.load(
            mongo_uri=self.mongo_uri, database=self.database, collection=self.collection
        )

    def registry(self, name: str) -> Registry:
        """Return a site's handlers: the usual ones, those of methods, its own and ``--handlers``.

        Raises `ConfigError`. If this process has loaded the handlers of several sites, those that
        only another site names are left out.
        """
        from caxev.core.registry import Registry, recorded

        sites = self.sites()
        own = sites.get(name).handlers
        by_method = {BY_METHOD[one.method] for one in sites.values() if one.method in BY_METHOD}
        load_handlers((*sorted(by_method), *own), self.handlers)
        # Registration is global to a process, and `recorded` has every handler that it has ever
        # loaded, as in `caxev sites check`, which goes through all sites.
        foreign = {module for site in sites.values() for module in site.handlers}
        foreign |= {*BY_METHOD.values()}
        foreign -= {*by_method, *own, *DEFAULT_HANDLERS}
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

    def with_database(self, function: Callable[[Database], Awaitable[T]]) -> T:
        """Run an async function with the database open and checked. Raises `DatabaseError`."""
        from caxev import aio
        from caxev.engine import listener

        settings = self.settings()

        async def run() -> T:
            async with aio.loop(), listener.open_database(settings) as database:
                await database.check()
                return await function(database)

        result: T = listener.run(run)
        return result


def state() -> State:
    """Return the state of the running command."""
    found: State = click.get_current_context().find_root().ensure_object(State)
    return found


def _remember(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    # The option was not given here: keep what was given before the command's name.
    if value is None or value == () or value is False:
        return
    options = context.find_root().ensure_object(State)
    assert parameter.name is not None
    if parameter.name == "handlers":  # repeatable, so both places add to it
        value = (*options.handlers, *value)
    setattr(options, parameter.name, value)


def global_options(*, hidden: bool) -> Callable[[F], F]:
    """Add the options that every command has; only the group's help lists them."""

    def option(*names: str, **attributes: Any) -> Callable[[F], F]:
        return click.option(
            *names, callback=_remember, expose_value=False, hidden=hidden, **attributes
        )

    options = (
        option(
            "--config",
            metavar="PATH",
            help="sites.json. [default: CAXEV_SITES, ./, /etc/caxev]",
        ),
        option(
            "--mongo-uri",
            metavar="URI",
            help="The database. [default: CAXEV_MONGO_URI]",
        ),
        option("--database", metavar="NAME", help="The name of the database. [default: run]"),
        option(
            "--collection",
            metavar="NAME",
            help="The runs' collection. [default: runs_new]",
        ),
        option(
            "--handlers",
            metavar="PATH.py",
            multiple=True,
            help="A file with more handlers; may be repeated.",
        ),
        option(
            "--log-level",
            type=click.Choice(LEVELS, case_sensitive=False),
            help="What to log on stderr. [default: info for listen, else warning]",
        ),
        option("--log-file", metavar="PATH", help="Log also to this file, which is rotated."),
        option("--log-json", is_flag=True, help="Log one JSON object a line."),
    )

    def add(function: F) -> F:
        for one in reversed(options):  # decorators apply from the inside out, --help lists in order
            function = one(function)
        return function

    return add


def example(*lines: str) -> str:
    """Return the end of a help text: commands to try."""
    # A line that is a backspace makes click print the paragraph without wrapping it.
    return "\n".join(("\b", "Example:", *(f"  {line}" for line in lines)))


as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
_wide = click.option(
    "--wide",
    is_flag=True,
    callback=_remember,
    expose_value=False,
    help="Show all columns, and fold none.",
)


def as_table(function: F) -> F:
    """Add the options of a command that prints a table."""
    return as_json(_wide(function))
