"""Run ``caxev replay``: have the listeners fire again for the present states of runs."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click
from attrs import frozen

from caxev.asking.base import counted, pages
from caxev.asking.listeners import Replay, addressed, enabling
from caxev.cli.command import command
from caxev.cli.options import options
from caxev.cli.output import Table, columns, event_parts, show, show_lines
from caxev.cli.plans import ask_listeners, asks, confirm_plan, with_hint
from caxev.cli.runs import shown
from caxev.cli.selection import RunChoice, selects_runs
from caxev.cli.values import HANDLER, SITE
from caxev.core.clock import utcnow
from caxev.core.ledger import Reaction
from caxev.core.model import Aspect, Event, Run, RunId
from caxev.core.recording import Maker, WholeRuns, again, compare, outlook, possible_keys
from caxev.core.registry import Registry

if TYPE_CHECKING:
    from caxev.database import Database


@command(
    "caxev replay --run 123",
    "caxev replay --since 2d --site lngs --handler push --dry-run",
    "caxev replay --run 100-200 --tag _sciencerun0",
)
@selects_runs()
@click.option("--site", type=SITE, help="Only at this site. [default: all with a listener]")
@click.option("--handler", type=HANDLER, help="Only this handler.")
@click.option("--dry-run", is_flag=True, help="Show what would run; write nothing.")
@click.option("--force", is_flag=True, help="Also run reactions that are done.")
@asks
def replay(
    *, runs: RunChoice, site: str | None, handler: str | None, dry_run: bool, force: bool, yes: bool
) -> None:
    """Run the reactions for existing runs again.

    For runs that were there before a handler or a rule. Only reactions that are missing run,
    unless --force is given. This leaves a request to the listeners of the sites, which waits
    until they run. --dry-run shows what they would do.
    """
    places, named = _places(site, handler)
    act = Replay(tuple(places), named, force=force)
    if dry_run:
        rows = options().with_database(_plan, places, runs, act)
        show(Table(_COLUMNS, rows), empty="no reaction would run")
        return
    # The selection becomes ids now: what the user was shown is what the listeners replay, whenever
    # they come to it.
    ids = options().with_database(runs.ids)
    confirm_plan(act.plan(ids), yes=yes)
    rows = options().with_asker(ask_listeners, act, ids, is_request=not runs.names_one)
    show_lines([{**row, "runs": len(ids)} for row in rows], queued)


_COLUMNS = columns("run", "site", "event", "handler", "why")


def _places(site: str | None, handler: str | None) -> tuple[dict[str, Registry], str | None]:
    """Return the selected sites with their handlers, and the handler's own name."""
    given = options()
    names, known = addressed(given.sites(), given.registry, site, handler)
    return {one: given.registry(one) for one in enabling(names, given.registry, known)}, known


def queued(row: Mapping[str, Any]) -> str:
    """Return the line about what was requested from a site."""
    return with_hint(f"{row['site']}: queued {counted(row['runs'])}", row)


# -- the dry run --------------------------------------------------------------------------------


async def _plan(
    database: Database, places: Mapping[str, Registry], choice: RunChoice, act: Replay
) -> list[dict[str, Any]]:
    runs = await choice.find(database)
    names = {run.id: shown(run) for run in runs}
    rows = []
    for page in pages(list(names)):
        for site, registry in places.items():
            rows += [
                {
                    "run": names[planned.event.run],
                    "site": site,
                    "event": event_parts(planned.event),
                    "handler": planned.handler,
                    "why": planned.why,
                }
                for planned in await _plan_page(database, registry, page, act)
            ]
    return rows


@frozen
class Planned:
    """A reaction that would fire."""

    event: Event
    handler: str
    why: str


async def _plan_page(
    database: Database, registry: Registry, ids: Sequence[RunId], act: Replay
) -> list[Planned]:
    site = registry.here.name
    seen = await database.snapshot(site, ids, watched=registry.watched)
    standing = await database.standing(possible_keys(registry, seen.now))
    knows, runs = await database.known_to(site, ids), await database.runs(seen.now)
    planned: list[Planned] = []
    for run in runs.values():
        before, known = seen.before.get(run.id, {}), knows.get(run.id, ())
        planned += plan(registry, run, before, standing, act, known=known)
    return planned


def plan(
    registry: Registry,
    run: Run,
    before: Mapping[Aspect, str],
    standing: Mapping[str, Reaction],
    act: Replay,
    *,
    known: Container[str] = (),
) -> Iterator[Planned]:
    """Return what a replay of a run fires, given its stored snapshot."""
    maker, now = Maker(registry, options().sites()), utcnow()
    snapshot = run.snapshot(registry.watched)
    whole = WholeRuns({run.id: run})
    # The listener compares snapshots first, so new changes fire whatever handler was requested.
    new = compare(maker, {run.id: now}, {run.id: before}, {run.id: snapshot}, whole)
    # A reaction that is new would be found by the replay as well: list it once.
    fired = set()
    for reaction in new.standing(standing):
        fired.add(reaction.id)
        yield Planned(reaction.event, reaction.handler, "new since the last snapshot")
    outlooks = outlook(maker, run, snapshot, standing, now, known=known)
    for reaction, why in again(outlooks, handler=act.handler, force=act.force):
        if reaction.id not in fired:
            yield Planned(reaction.event, reaction.handler, why)
