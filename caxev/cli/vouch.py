"""Run ``caxev vouch``: let a person decide which copy is right if copies contradict each other.

The command writes a mark to that copy's entry; `caxev.handlers.judge` at each site does the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from caxev.cli.command import command
from caxev.cli.errors import NothingToDo
from caxev.cli.options import as_text, options
from caxev.cli.output import print_line
from caxev.cli.requests import requester
from caxev.cli.rm import CopyAtSite, with_markers
from caxev.cli.selection import DataChoice, RunChoice, selects_data, selects_run
from caxev.cli.values import SITE
from caxev.copies.quorum import VOUCHED, Same, same_data, voters
from caxev.copies.storage import same_bytes
from caxev.core.clock import utcnow
from caxev.core.model import ERROR, Copy, Run, new_id
from caxev.core.update import RunUpdate

if TYPE_CHECKING:
    from datetime import datetime

    from caxev.database import Database


@command("caxev vouch --run 123 --site lngs", output=as_text)
@selects_run()
@click.option("--site", type=SITE, required=True, help="The site whose copy is right.")
@selects_data
def vouch(*, run: RunChoice, site: str, data: DataChoice) -> None:
    """Decide that a site's copy is the right one, if no majority of copies does.

    For copies that contradict each other. The others become bad, and are repaired from this
    one.
    """
    sites = options().sites()
    chosen = CopyAtSite(sites.get(site), sites, run, data)
    print_line(options().with_database(_vouch_for, chosen))


async def _vouch_for(database: Database, chosen: CopyAtSite) -> str:
    """Mark the copy, and have every other judged again by its own site."""
    same = same_bytes(await with_markers(database, chosen.sites, chosen.here))
    while True:
        run = await chosen.find(database)
        copy = chosen.copy(run)
        # A copy without a digest, or a bad one, cannot be the one by which others are judged.
        if copy not in voters(run, copy.key, same):
            raise NothingToDo(f"{copy.key} is bad or has no digest yet: it cannot be vouched for")
        now = utcnow()
        mark = RunUpdate.note(run, copy, **{VOUCHED: {"by": requester(), "at": now}})
        marked = await database.update_run(mark, now)
        if marked is not None:
            break
    # The mark first: the judgements that these writes trigger must find it.
    for update in again(marked, copy, same, now):
        await database.update_run(update, now)
    return f"{copy.key} of {run} is now the reference; the other copies are compared with it"


def again(run: Run, right: Copy, same: Same, now: datetime) -> Iterator[RunUpdate]:
    """Return the writes that have each copy judged again. Pure.

    Copies are read again; bad ones get their status again. If several entries have the same bytes,
    one is read, and each site judges its own entry by the answer.
    """
    those = voters(run, right.key, same)
    for one in run.copies:
        if one in those:
            yield RunUpdate.ask(run, one, new_id(), now)
        elif same_data(one, right.key) and one.status == ERROR:
            # The same status with a new time is a change, to which the site's handlers react.
            yield RunUpdate.change_copy(run, one, ERROR)
