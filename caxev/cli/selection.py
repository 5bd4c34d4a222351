"""Define the options that select runs and data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from caxev.cli.completion import DATA_TYPE, TAG
from caxev.cli.options import RUN_NUMBER
from caxev.finite import DAYS

F = TypeVar("F", bound=Callable[..., Any])


def _adding(*options: Callable[[Any], Any]) -> Callable[[F], F]:
    def add(function: F) -> F:
        for one in reversed(options):
            function = one(function)
        return function

    return add


_run = click.option("--run", "number", type=RUN_NUMBER, metavar="N", help="The run's number.")
_name = click.option("--name", metavar="X", help="The run's name, such as 161111_1434.")

one_run = _adding(
    _run,
    _name,
    click.option("--detector", metavar="D", help="Its detector, if runs share the name."),
)
"""Adds the options that name one run: `number`, `name` and `detector`."""

many_runs = _adding(
    _run,
    _name,
    click.option("--from-run", type=RUN_NUMBER, metavar="A", help="Runs from this number on."),
    click.option("--to-run", type=RUN_NUMBER, metavar="B", help="Runs up to this number."),
    click.option("--last-days", type=DAYS, metavar="D", help="Runs started in the last D days."),
    click.option("--tag", type=TAG, help="Runs with this tag."),
    click.option("--detector", metavar="D", help="Only runs of this detector: tpc, muon_veto."),
)
"""Adds those that select runs, too: `from_run`, `to_run`, `last_days` and `tag`."""

of_data = _adding(
    click.option(
        "--type", "kind", type=DATA_TYPE, default="raw", show_default=True, help="The type of data."
    ),
    click.option("--version", metavar="V", help="The version, of derived data."),
)
"""Adds the options that select the data of a run: `kind` and `version`."""
