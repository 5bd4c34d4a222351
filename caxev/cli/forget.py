"""Remove entries from the database but no data, for ``caxev tape forget`` and ``rucio forget``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from caxev.cli.command import Function
from caxev.cli.options import options
from caxev.cli.output import confirm
from caxev.cli.requests import RunRequest, requester, write_all
from caxev.core.clock import utcnow
from caxev.core.model import Copy, Run
from caxev.core.update import RunUpdate

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


def forget_entries(
    found: Sequence[tuple[Run, Sequence[Copy]]], what: str, why: str, *, asks: bool, dry_run: bool
) -> list[dict[str, Any]]:
    """Remove these entries, after a person has confirmed it if `asks`; return the rows.

    The runs were read before the question and are not read again: what is written is what was
    confirmed.
    """
    requests = [one for run, copies in found for one in _requests(run, copies, what, why)]
    number = sum(one.update is not None for one in requests)
    if number and asks:
        confirm(f"Forget that {what} exists, for {number} entries?")
    return options().with_database(write_all, requests, dry_run=dry_run)


def _requests(run: Run, copies: Sequence[Copy], what: str, why: str) -> list[RunRequest]:
    if not copies:
        return [RunRequest(run, what, "there is no such entry")]
    return [forget_request(run, copy, why) for copy in copies]


def forget_request(run: Run, copy: Copy, why: str) -> RunRequest:
    """Return the request that removes an entry, with a tombstone. Pure except for the time."""
    planned = f"would be forgotten: it is {copy.status}"
    return RunRequest(run, str(copy.key), "forgotten", forgetting(run, copy, why), planned)


def forgetting(run: Run, copy: Copy, why: str) -> RunUpdate:
    """Return the write that removes an entry, but no data. Pure except for the time.

    The tombstone records who did that and why, and that nothing was deleted.
    """
    proof = f"status {copy.status}; nothing at {copy.host} was deleted"
    tombstone = {"by": requester(), "at": utcnow(), "why": why, "proof": proof}
    return RunUpdate.remove_copy(run, copy, tombstone=tombstone)
