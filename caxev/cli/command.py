"""Make functions commands, with what all commands have in common."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from caxev.cli.options import as_table, example, hidden_options, options
from caxev.cli.values import check_known

Function = Callable[..., Any]
Output = Callable[[], list[click.Option]]


def command(
    *examples: str,
    group: click.Group | None = None,
    output: Output = as_table,
    log: str | None = "warning",
    **attributes: Any,
) -> Callable[[Function], click.Command]:
    """Make a function a command, of a group or of its own, with examples in its help.

    It has the global options and those of its `output`. Before it runs, its log is started at the
    level `log` (None: it does that itself), and values that nobody knows are refused.
    """

    def make(function: Function) -> click.Command:
        @wraps(function)
        def run(**given: Any) -> None:
            if log is not None:
                options().log(log)
            check_known(click.get_current_context())
            function(**given)

        decorator = click.command if group is None else group.command
        made: click.Command = decorator(epilog=example(*examples), **attributes)(run)
        made.params += [*output(), *hidden_options()]
        return made

    return make


def limits(most: int, words: str, *, least: int = 1) -> Callable[[Function], Function]:
    """Add how many rows are listed, as the argument `limit`; `most` by default."""
    count = click.IntRange(least, 1_000_000)
    return click.option(
        "--limit", type=count, default=most, show_default=True, metavar="N", help=words
    )


def together(
    name: str, make: Function, *decorators: Callable[[Function], Function]
) -> Callable[[Function], Function]:
    """Add options whose values a command gets as one argument: what `make` makes of them."""

    def add(function: Function) -> Function:
        @wraps(function)
        def run(**given: Any) -> None:
            values = {one: given.pop(one) for one in names}
            function(**{name: make(**values)}, **given)

        before = len(getattr(run, "__click_params__", ()))
        for decorator in reversed(decorators):  # --help lists them in the order given
            decorator(run)
        names = [str(one.name) for one in run.__click_params__[before:]]  # type: ignore[attr-defined]
        return run

    return add
