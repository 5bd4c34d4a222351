"""Make functions commands, with what all commands have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Final

import click
from attrs import frozen
from click.core import ParameterSource

from caxev.cli.options import CommandGroup, as_table, example, hidden_options, options
from caxev.cli.values import check_known

Function = Callable[..., Any]
Output = Callable[[], list[click.Option]]
Decorator = Callable[[Function], Function]
Given = Mapping[str, str]

RUNS: Final = "runs"
"""Stands for all options that select runs, in `excludes` and `needs`."""
CHOOSES: Final = "which_"
"""The parameters of these options begin so: none of a command's other options do."""
RULES: Final = "__rules__"
"""The attribute of a function with its rules."""


def command(
    *examples: str,
    group: click.Group | None = None,
    output: Output = as_table,
    log: str | None = "warning",
    **attributes: Any,
) -> Callable[[Function], click.Command]:
    """Make a function a command, of a group or of its own, with examples in its help.

    It has the global options and those of its `output`. Before it runs, its log is started at the
    level `log` (None: it does that itself), and options that do not go together are refused, and
    values that nobody knows.
    """

    def make(function: Function) -> click.Command:
        @wraps(function)
        def run(**given: Any) -> None:
            _begin(function, log)
            function(**given)

        decorator = click.command if group is None else group.command
        made: click.Command = decorator(epilog=example(*examples), **attributes)(run)
        made.params += [*output(), *hidden_options()]
        return made

    return make


def listing(*examples: str) -> Callable[[Function], click.Group]:
    """Make a function a group of commands, which lists something if no command is given."""

    def make(function: Function) -> click.Group:
        @click.pass_context
        @wraps(function)
        def run(context: click.Context, /, **given: Any) -> None:
            if context.invoked_subcommand is None:
                _begin(function, "warning")
                function(**given)
            elif lost := [one.opts[0] for one in _given_of(context) if not one.hidden]:
                name = context.invoked_subcommand
                raise click.UsageError(f"{lost[0]} is about the list: leave it out before {name}")

        group = click.group(
            cls=CommandGroup, invoke_without_command=True, epilog=example(*examples)
        )
        made: click.Group = group(run)
        made.params += [*as_table(), *hidden_options()]
        return made

    return make


def _begin(function: Function, log: str | None) -> None:
    context = click.get_current_context()
    if log is not None:
        options().log(log)
    given = _given(context)
    for rule in (excludes("--wide", "--json"), *rules_of(function)):
        rule.check(given)
    check_known(context)


# -- options that do not go together --------------------------------------------------------------


@frozen
class Rule:
    """Refuses each of `some` options beside each of `others`; if `needed`, without all of them."""

    some: str
    others: str
    needed: bool = False

    def __call__(self, function: Function) -> Function:
        """Give a command this rule. What wraps the function has it, too."""
        setattr(function, RULES, (self, *rules_of(function)))
        return function

    def check(self, given: Given) -> None:
        """Raise click's error if the options that are given do not go together."""
        beside = [one for one in self.others.split() if one in given]
        for one in (one for one in self.some.split() if one in given):
            if self.needed and not beside:
                wanted = " or ".join(self.others.split()).replace(RUNS, "runs (--run, --name, ...)")
                raise click.UsageError(f"{given[one]} needs {wanted}")
            if beside and not self.needed:
                raise click.UsageError(f"{given[one]} and {given[beside[0]]} do not go together")


def rules_of(function: Any) -> tuple[Rule, ...]:
    """Return the rules of a command's function."""
    found: tuple[Rule, ...] = getattr(function, RULES, ())
    return found


def excludes(some: str, others: str) -> Rule:
    """Refuse each of `some` options beside each of `others`: one of them would have no effect.

    Options are written as users do, with spaces between them. ``--yes`` and ``--dry-run`` are never
    refused: they may be added to any line of a command that has them.
    """
    return Rule(some, others)


def needs(some: str, others: str) -> Rule:
    """Refuse each of `some` options if none of `others` is given: it would have no effect."""
    return Rule(some, others, needed=True)


def _given_of(context: click.Context) -> list[click.Option]:
    """Return the options that the command line itself has, and not those by default."""
    return [
        one
        for one in context.command.params
        if isinstance(one, click.Option)
        and context.get_parameter_source(one.name or "") is ParameterSource.COMMANDLINE
    ]


def _given(context: click.Context) -> Given:
    """Return the options of the command line as users write them, by their names in the rules."""
    found: dict[str, str] = {}
    for one in _given_of(context):
        name = one.name or ""
        is_off = one.secondary_opts and context.params[name] is False
        word = (one.secondary_opts if is_off else one.opts)[0]
        found |= {word: word, f"{word}={(value := context.params.get(name))}": f"{word} {value}"}
        if name.startswith(CHOOSES):
            found[RUNS] = word
    return found


# -- options --------------------------------------------------------------------------------------


def limits(most: int, words: str, *, least: int = 1) -> Decorator:
    """Add how many rows are listed, as the argument `limit`; `most` by default."""
    count = click.IntRange(least, 1_000_000)
    return click.option(
        "--limit", type=count, default=most, show_default=True, metavar="N", help=words
    )


def together(name: str, make: Function, *decorators: Decorator, of: str = "") -> Decorator:
    """Add options whose values a command gets as one argument: what `make` makes of them.

    It is also made `of` other arguments, which the command then does not get.
    """

    def add(function: Function) -> Function:
        @wraps(function)
        def run(**given: Any) -> None:
            values = {one: given.pop(one) for one in (*names, *of.split())}
            function(**{name: make(**values)}, **given)

        before = len(getattr(run, "__click_params__", ()))
        for decorator in reversed(decorators):  # --help lists them in the order given
            decorator(run)
        names = [str(one.name) for one in run.__click_params__[before:]]  # type: ignore[attr-defined]
        return run

    return add
