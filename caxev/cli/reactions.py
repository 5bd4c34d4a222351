"""Run ``caxev reactions`` and ``caxev retry``: list reactions, and retry those that failed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import click

from caxev.cli.completion import HANDLER, SITE
from caxev.cli.errors import FAILED
from caxev.cli.options import RUN_NUMBER, as_json, as_table, example, global_options, state
from caxev.cli.output import print_line, show_json, show_rows
from caxev.cli.reaction_rows import COLUMNS, RUN_COLUMN, reaction_row

if TYPE_CHECKING:
    from caxev.cli.runs import Wanted
    from caxev.core.registry import Registry
    from caxev.database import Database

_STATES = ("failed", "running", "pending")
_COUNTED = 1000


@click.command(
    epilog=example(
        "caxev reactions --failed", "caxev reactions --pending --site lngs --handler pull --json"
    )
)
@click.option("--failed", "states", flag_value="failed", multiple=True, help="Those given up.")
@click.option("--running", "states", flag_value="running", multiple=True, help="Those at work.")
@click.option("--pending", "states", flag_value="pending", multiple=True, help="Those that wait.")
@click.option("--done", "states", flag_value="done", multiple=True, help="Those that are done.")
@click.option("--site", type=SITE, help="Only at this site.")
@click.option("--handler", type=HANDLER, help="Only of this handler.")
@click.option(
    "--limit",
    type=click.IntRange(1, 1_000_000),
    default=100,
    show_default=True,
    metavar="N",
    help="At most so many for each site and state.",
)
@as_table
@global_options(hidden=True)
def reactions(
    states: Sequence[str], site: str | None, handler: str | None, limit: int, as_json: bool
) -> None:
    """List the reactions that are pending, running or failed.

    A reaction is one handler's work on one change of a run. Without a state, all are listed
    that are not done.
    """
    options = state()
    options.log("warning")
    named = None if handler is None else _handler(handler, site)
    names = _site_names(site)
    wanted = tuple(dict.fromkeys(states)) or _STATES

    async def find(database: Database) -> None:
        rows = _find(database, await _known(database, names, site), wanted, named, limit)
        words = " or ".join(wanted)
        await show_rows(_COLUMNS, rows, as_json=as_json, empty=f"no reactions {words}")

    options.with_database(find)


_COLUMNS = (COLUMNS[0], RUN_COLUMN, *COLUMNS[1:])


def _site_names(site: str | None) -> tuple[str, ...]:
    known = state().sites()
    return tuple(known) if site is None else (known.get(site).name,)


async def _known(database: Database, names: Iterable[str], site: str | None) -> list[str]:
    """Return the sites to list: the one named, or all in sites.json and all that ever listened."""
    records = () if site is not None else await database.site_records()
    return list(dict.fromkeys([*names, *(record.site for record in records)]))


def _handler(name: str, site: str | None) -> str:
    from caxev.cli.replay import handler_called

    return handler_called(name, [state().registry(one) for one in _site_names(site)])


async def _find(
    database: Database,
    sites: Iterable[str],
    states: Iterable[str],
    handler: str | None,
    limit: int,
) -> AsyncIterator[dict[str, Any]]:
    from caxev.cli.runs import shown_all

    for site, one in product(sites, states):
        async for page in database.reaction_pages(site, one, handler, limit):
            named = await shown_all(database, (reaction.run for reaction, _ in page))
            for reaction, document in page:
                yield {"run": named[reaction.run], **reaction_row(reaction, document)}


# -- retry --------------------------------------------------------------------------------------


@click.command(
    epilog=example(
        "caxev retry --run 123", "caxev retry --site lngs --handler pull", "caxev retry --all"
    )
)
@click.option("--site", type=SITE, help="Only at this site. [default: all with a listener]")
@click.option("--run", "number", type=RUN_NUMBER, metavar="N", help="Those of this run.")
@click.option("--name", metavar="X", help="Those of the run of this name.")
@click.option("--detector", metavar="D", help="Of runs with one name, this detector's.")
@click.option("--handler", type=HANDLER, help="Only of this handler.")
@click.option("--all", "everything", is_flag=True, help="All failed reactions.")
@as_json
@global_options(hidden=True)
def retry(
    *,
    site: str | None,
    number: int | None,
    name: str | None,
    detector: str | None,
    handler: str | None,
    everything: bool,
    as_json: bool,
) -> None:
    """Try failed reactions again, as if they had never been tried.

    This leaves a request to the listeners of the sites. It waits until they run.
    """
    from caxev.cli.replay import handler_called, listening_sites
    from caxev.cli.runs import one

    if (number, name, handler) == (None, None, None) and not everything:
        raise click.UsageError("say which: --run, --name, --handler or --all")
    if everything and (number, name) != (None, None):
        raise click.UsageError("--all and a run exclude each other")
    if detector is not None and (number, name) == (None, None):
        raise click.UsageError("--detector says which of several runs: give --run or --name, too")
    options = state()
    options.log("warning")
    registries = {one: options.registry(one) for one in listening_sites(site)}
    named = None if handler is None else handler_called(handler, registries.values())
    meant = None if (number, name) == (None, None) else one(number, name, detector)

    async def ask(database: Database) -> list[dict[str, Any]]:
        return await _ask(database, registries, meant, named)

    rows = options.with_database(ask)
    if as_json:
        show_json(rows)
    for row in rows if not as_json else ():
        print_line(_line(row))
    if not any(row["failed"] for row in rows):
        raise click.exceptions.Exit(FAILED)


async def _ask(
    database: Database,
    sites: Mapping[str, Registry],
    meant: Wanted | None,
    handler: str | None,
) -> list[dict[str, Any]]:
    from caxev.cli.replay import leave
    from caxev.database import Request

    runs: tuple[Any, ...] | None = None
    if meant is not None:
        runs = tuple(run.id for run in await meant.find(database, database.settings))
    rows = []
    # Sites without failures get no request, but a row: the user sees that they were asked.
    for site in sites:
        failed = await _failed(database, site, runs, handler)
        requests = [Request("retry", runs=runs, handler=handler)] if failed else []
        unrecorded = await _unrecorded(database, site)
        asked = await leave(database, site, requests)
        rows.append({**asked, "failed": failed, "unrecorded": unrecorded})
    return rows


async def _failed(
    database: Database, site: str, runs: Sequence[Any] | None, handler: str | None
) -> int:
    """Return how many reactions have failed; for one handler, counted up to `_COUNTED`."""
    # The tally is one cheap query. For a selection the reactions themselves are counted, up to a
    # limit: a message needs no exact number.
    if runs is None and handler is None:
        return (await database.tally(site)).get(site, {}).get("failed", 0)
    found = [
        await database.reactions(site, run=run, state="failed", handler=handler, limit=_COUNTED)
        for run in runs or (None,)
    ]
    return sum(map(len, found))


async def _unrecorded(database: Database, site: str) -> int:
    """Return how many failed reactions of the site the ledger refuses to record."""
    from caxev.core.alarms import UNRECORDED

    active = [one.alarm for one in await database.alarms(site) if one.active]
    return sum(alarm.details.get("what to do") == UNRECORDED for alarm in active)


def _line(row: Mapping[str, Any]) -> str:
    from caxev.cli.replay import nobody

    site, failed, more = row["site"], row["failed"], ""
    if row["unrecorded"]:
        more = f"; of {row['unrecorded']} the ledger refuses to record it: see caxev alarms"
    if not failed:
        return f"{site}: no such reaction has failed{more}"
    number = f"{failed} or more" if failed >= _COUNTED else f"{failed}"
    what = f"{site}: queued {number} failed reaction{'' if failed == 1 else 's'}{more}"
    return what if row["listening"] else f"{what}; {nobody(site)}"
