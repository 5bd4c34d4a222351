"""Complete options and their values in bash, zsh and fish.

The script that ``caxev completion`` prints makes the shell run ``caxev`` with what was typed so
far. Any error then completes nothing: a message would break into the line that the user types.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import click
from click.shell_completion import CompletionItem, get_completion_class

from caxev.cli.options import State, example
from caxev.config import BY_METHOD, ConfigError, load_handlers
from caxev.config.errors import hint
from caxev.config.sites import TYPES

if TYPE_CHECKING:
    from caxev.core.registry import Handler

_PATIENCE: Final = 2.0
"""Seconds that a completion waits for the database."""


class Known(click.ParamType):  # type: ignore[type-arg]  # not generic in older clicks
    """A text with completion: `values` returns candidates for the options given so far."""

    def __init__(self, name: str, values: Callable[[State], Iterable[str]]) -> None:
        self.name = name
        self.values = values

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return the values that begin with what was typed."""
        del param
        with suppress(Exception):  # see the module's docstring
            known = self.values(ctx.find_root().ensure_object(State))
            return [CompletionItem(one) for one in sorted({*known}) if one.startswith(incomplete)]
        return []


class OneOf(Known):
    """A text that must be one of the values."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the text if it is one of the values; else fail and name the nearest."""
        known = [*self.values(State())]
        if value not in known:
            guess = f"{hint(value, known)} known: {', '.join(known)}".lstrip()
            self.fail(f"there is no {self.name} {value!r} ({guess})", param, ctx)
        return value


def _handlers(options: State) -> Iterable[str]:
    """Return the names and aliases of all sites' handlers."""
    from caxev.core.registry import recorded

    modules: set[str] = set()
    with suppress(ConfigError):  # without sites.json there are those that come with caxev
        modules = {module for site in options.sites().values() for module in site.handlers}
    # Of all sites: the command may name another site than this machine's.
    load_handlers((*BY_METHOD.values(), *sorted(modules)), options.handlers)
    return [name for handler in recorded for name in _names(handler)]


def _names(handler: Handler) -> tuple[str, ...]:
    return (handler.name, *handler.aliases)


def _tags(options: State) -> Iterable[str]:
    from caxev.database.blocking import known_values

    return known_values(options.settings(), "tags.name", _PATIENCE)


def _statuses(options: State) -> Iterable[str]:
    from caxev.core import model

    del options
    names = ("REQUESTED", "TRANSFERRING", "VERIFYING", "TRANSFERRED", "ERROR", "DELETING", "MOVING")
    return [getattr(model, name) for name in names]


SITE: Final = Known("site", lambda options: options.sites())
HANDLER: Final = Known("handler", _handlers)
TAG: Final = Known("tag", _tags)
STATUS: Final = Known("status", _statuses)
DATA_TYPE: Final = OneOf("type", lambda _options: (*TYPES, "untriggered"))

_FILES: Final = {
    "bash": "~/.bash_completion",
    "zsh": "~/.zshrc, after compinit",
    "fish": "~/.config/fish/completions/caxev.fish",
}


@click.command(
    epilog=example(
        "caxev completion bash >> ~/.bash_completion",
        "caxev completion zsh >> ~/.zshrc",
        "caxev completion fish > ~/.config/fish/completions/caxev.fish",
    )
)
@click.argument("shell", type=click.Choice([*_FILES]))
def completion(shell: str) -> None:
    """Print the script that makes SHELL complete commands, options, sites, handlers and tags.

    Put it where the shell reads it at its start, and open a new shell.
    """
    from caxev.cli import cli

    script = get_completion_class(shell)
    assert script is not None
    click.echo(script(cli, {}, "caxev", "_CAXEV_COMPLETE").source())
