"""Remove entries from the database but no data, for ``caxev tape forget`` and ``rucio forget``."""

from __future__ import annotations

from typing import Any

import click

from caxev.asking.forgetting import ForgetCopies
from caxev.cli.command import Function
from caxev.cli.plans import ask_each
from caxev.cli.selection import RunChoice

_OPTIONS = (
    click.option("--why", required=True, metavar="TEXT", help="The reason, kept in deleted_data."),
    click.option("--yes", is_flag=True, help="Do not ask for confirmation."),
    click.option("--dry-run", is_flag=True, help="Show what would be removed; write nothing."),
)


def forgets(function: Function) -> Function:
    """Add the options of a command that removes entries: `why`, `yes` and `dry_run`."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def forget(runs: RunChoice, act: ForgetCopies, *, yes: bool, dry_run: bool) -> list[dict[str, Any]]:
    """Remove entries, after a person has confirmed it, however few; return the rows."""
    return ask_each(runs, act, yes=yes, dry_run=dry_run, few=0)
