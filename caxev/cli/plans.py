"""Show what a command is about to do to many runs, and have a person confirm it.

Every command that acts on selected runs uses these words, and the same bound.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Final

import click
from attrs import define, field

from caxev.cli.command import Function
from caxev.cli.output import confirm, print_line
from caxev.core.amounts import size

FEW: Final = 20
"""Runs up to which a command goes ahead without asking."""
_REASONS: Final = 3
"""Reasons that a plan names, the most frequent."""


def asks(function: Function) -> Function:
    """Add the option of a command that asks before it acts on many runs, as the argument `yes`."""
    return click.option("--yes", is_flag=True, help="Do not ask, however many runs it is about.")(
        function
    )


@define
class Tally:
    """What a plan does: counts and bytes by what is done, counts by why nothing is."""

    done: Counter[str] = field(factory=Counter)
    kept: Counter[str] = field(factory=Counter)
    bytes: int = 0

    def add(self, what: str, size: int | None = None, why_not: str | None = None) -> None:
        """Count a run: what is done with it, or why nothing is."""
        if why_not is None:
            self.done[what] += 1
            self.bytes += size or 0
        else:
            self.kept[why_not] += 1

    @property
    def words(self) -> str:
        """The plan in one line, such as ``500 runs, 1.2 TB: raw from lngs to chicago``."""
        number, kept = self.done.total(), self.kept.total()
        amount = f", {size(self.bytes)}" if self.bytes else ""
        what = "; ".join(one for one, _ in self.done.most_common(_REASONS)) or "nothing"
        line = f"{_runs(number)}{amount}: {what}"
        if not kept:
            return line
        why = "; ".join(f"{count}: {one}" for one, count in self.kept.most_common(_REASONS))
        return f"{line}. Not {_runs(kept)} ({why}{'; ...' if len(self.kept) > _REASONS else ''})"

    def ask(self, *, yes: bool, few: int = FEW) -> None:
        """Show a plan about many runs, and have a person confirm it unless `yes`.

        Raises click's error if nobody can be asked.
        """
        number = self.done.total()
        if number <= few:
            return
        print_line(self.words, err=True)
        if yes:
            return
        if not sys.stdin.isatty():
            raise click.UsageError(f"{_runs(number)} are more than {few}: add --yes to go on")
        confirm(f"Go on with {_runs(number)}?")


def _runs(number: int) -> str:
    return f"{number} run{'' if number == 1 else 's'}"
