"""Run ``caxev vouch``: let a person decide which copy is right if copies contradict each other.

The command writes a mark to that copy's entry; `caxev.handlers.judge` at each site does the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from caxev.cli.completion import SITE
from caxev.cli.errors import NothingToDo
from caxev.cli.options import example, global_options, state
from caxev.cli.output import print_line
from caxev.cli.rm import Errand, with_markers
from caxev.cli.selection import of_data, one_run

if TYPE_CHECKING:
    from datetime import datetime

    from caxev.copies.quorum import Same
    from caxev.core.model import Copy, Run
    from caxev.core.update import RunUpdate
    from caxev.database import Database


@click.command(epilog=example("caxev vouch --run 123 --site lngs"))
@one_run
@click.option("--site", type=SITE, required=True, help="The site whose copy is right.")
@of_data
@global_options(hidden=True)
def vouch(
    *,
    number: int | None,
    name: str | None,
    detector: str | None,
    site: str,
    kind: str,
    version: str | None,
) -> None:
    """Decide that a site's copy is the right one, if no majority of copies does.

    For copies that contradict each other. The others become bad, and are repaired from this
    one.
    """
    from caxev.cli.runs import one

    if (number is None) == (name is None):
        raise click.UsageError("say which run: --run or --name")
    options = state()
    options.log("warning")
    sites = options.sites()
    errand = Errand(sites.get(site), sites, one(number, name, detector), kind, version)
    said = options.with_database(lambda database: _vouch_for(errand, database))
    print_line(said)


async def _vouch_for(errand: Errand, database: Database) -> str:
    """Mark the copy, and have every other judged again by its own site."""
    from caxev.cli.replay import me
    from caxev.copies.quorum import VOUCHED, voters
    from caxev.copies.storage import same_bytes
    from caxev.core.clock import utcnow
    from caxev.core.update import RunUpdate

    same = same_bytes(await with_markers(database, errand.sites, errand.here))
    while True:
        run = await errand.find(database)
        copy = errand.copy(run)
        # A copy without a digest, or a bad one, cannot be the one by which others are judged.
        if copy not in voters(run, copy.key, same):
            raise NothingToDo(f"{copy.key} has no voice: there is nothing to vouch for")
        now = utcnow()
        mark = RunUpdate.note(run, copy, **{VOUCHED: {"by": me(), "at": now}})
        marked = await database.update_run(mark, now)
        if marked is not None:
            break
    # The mark first: the judgements that these writes trigger must find it.
    for update in again(marked, copy, same, now):
        await database.update_run(update, now)
    return f"{copy.key} of {run} counts as right; the others are judged by it"


def again(run: Run, right: Copy, same: Same, now: datetime) -> Iterator[RunUpdate]:
    """Return the writes that have each copy judged again. Pure.

    Copies are read again; bad ones get their status again. If several entries have the same bytes,
    one is read, and each site judges its own entry by the answer.
    """
    from caxev.copies.quorum import same_data, voters
    from caxev.core.model import ERROR, new_id
    from caxev.core.update import RunUpdate

    those = voters(run, right.key, same)
    for one in run.copies:
        if one in those:
            yield RunUpdate.ask(run, one, new_id(), now)
        elif same_data(one, right.key) and one.status == ERROR:
            # The same status with a new time is a change, to which the site's handlers react.
            yield RunUpdate.change_copy(run, one, ERROR)
