"""Run ``caxev tag`` and ``caxev comment``: write people's words into runs.

A tag that is added or removed is an event, to which handlers react; a comment is none.
"""

from __future__ import annotations

import click

from caxev.cli.command import command
from caxev.cli.options import example
from caxev.cli.plans import asks
from caxev.cli.requests import RunRequest, planner, request_each, requester, show_requests
from caxev.cli.selection import RunChoice, selects_runs
from caxev.cli.values import NOT_TAG, TAG
from caxev.core.clock import utcnow
from caxev.core.history import Deed, HistoryRow, What, of_run
from caxev.core.model import Run, Tag
from caxev.core.update import RunUpdate

_dry_run = click.option("--dry-run", is_flag=True, help="Show what would be written; do nothing.")


@click.group(
    epilog=example("caxev tag add _sciencerun0 --run 100-200", "caxev tag rm donotprocess --run 5")
)
def tag() -> None:
    """Add tags to runs, or remove them: handlers react to both."""


@command("caxev tag add _sciencerun0 --run 100-200", group=tag)
@click.argument("name", metavar="TAG", type=TAG)
@selects_runs()
@asks
@_dry_run
def add(*, name: str, runs: RunChoice, yes: bool, dry_run: bool) -> None:
    """Add a tag to runs. It is kept with who added it, and when."""

    def plan(run: Run) -> RunRequest:
        what = f"tag {name!r}"
        if name in run.tags:
            return RunRequest(run, what, "has it already", ok=True)
        update = RunUpdate.add_tag(run, name, user=requester())
        return RunRequest(run, what, "added", update, row=_row(run, name, "added"))

    show_requests(request_each(runs, planner(plan), yes=yes, dry_run=dry_run))


@command("caxev tag rm donotprocess --run 5", group=tag)
@click.argument("name", metavar="TAG", type=NOT_TAG)
@selects_runs()
@asks
@_dry_run
def rm(*, name: str, runs: RunChoice, yes: bool, dry_run: bool) -> None:
    """Remove a tag from runs."""

    def plan(run: Run) -> RunRequest:
        what = f"tag {name!r}"
        if name not in run.tags:
            return RunRequest(run, what, "does not have it", ok=True)
        update = RunUpdate.remove_tag(run, name)
        return RunRequest(run, what, "removed", update, row=_row(run, name, "removed"))

    show_requests(request_each(runs, planner(plan), yes=yes, dry_run=dry_run))


def _row(run: Run, name: str, how: str) -> HistoryRow:
    """Return the row of history about a tag."""
    deed = Deed(what=What.TAGGED, reason=f"tag {name!r} {how}", by=requester())
    return HistoryRow(at=utcnow(), site="", deed=deed, aspect=Tag(name), **of_run(run))


@command("caxev comment --run 5 'the gate was open'")
@click.argument("text")
@selects_runs()
@asks
@_dry_run
def comment(*, text: str, runs: RunChoice, yes: bool, dry_run: bool) -> None:
    """Add a comment to runs. It is kept with who wrote it, and when."""
    if not text.strip():
        raise click.UsageError("the comment is empty")

    def plan(run: Run) -> RunRequest:
        update = RunUpdate.add_comment(run, text, requester())
        return RunRequest(run, "comment", "added", update)

    show_requests(request_each(runs, planner(plan), yes=yes, dry_run=dry_run))
