"""Run ``caxev tag`` and ``caxev comment``: write people's words into runs.

A tag that is added or removed is an event, to which handlers react; a comment is none.
"""

from __future__ import annotations

import click

from caxev.asking.annotations import CommentRuns, TagRuns
from caxev.cli.command import command
from caxev.cli.options import CommandGroup, example
from caxev.cli.plans import Ask, acts
from caxev.cli.selection import RunChoice, selects_runs
from caxev.cli.values import NOT_TAG, TAG

_acts = acts("Show what would be written; do nothing.")


@click.group(
    cls=CommandGroup,
    epilog=example("caxev tag add _sciencerun0 --run 100-200", "caxev tag rm donotprocess --run 5"),
)
def tag() -> None:
    """Add tags to runs, or remove them: handlers react to both."""


@command("caxev tag add _sciencerun0 --run 100-200", group=tag)
@click.argument("name", metavar="TAG", type=TAG)
@selects_runs()
@_acts
def add(*, name: str, runs: RunChoice, ask: Ask) -> None:
    """Add a tag to runs. It is kept with who added it, and when."""
    ask(runs, TagRuns(name))


@command("caxev tag rm donotprocess --run 5", group=tag)
@click.argument("name", metavar="TAG", type=NOT_TAG)
@selects_runs()
@_acts
def rm(*, name: str, runs: RunChoice, ask: Ask) -> None:
    """Remove a tag from runs."""
    ask(runs, TagRuns(name, remove=True))


@command("caxev comment --run 5 'the gate was open'")
@click.argument("text")
@selects_runs()
@_acts
def comment(*, text: str, runs: RunChoice, ask: Ask) -> None:
    """Add a comment to runs. It is kept with who wrote it, and when."""
    if not text.strip():
        raise click.UsageError("the comment is empty")
    ask(runs, CommentRuns(text))
