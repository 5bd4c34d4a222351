"""Run ``caxev replay``: have the listeners fire again for the present states of runs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Container, Iterator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import click

from caxev.asking.base import counted
from caxev.asking.listeners import Replay, addressed, enabling
from caxev.cli.command import command, needs
from caxev.cli.options import options
from caxev.cli.output import columns, event_parts, show_lines, stream
from caxev.cli.plans import ask_listeners, asks, confirm_plan, with_hint
from caxev.cli.runs import shown
from caxev.cli.selection import RunChoice, selects_runs
from caxev.cli.values import HANDLER, SITE
from caxev.core.clock import utcnow
from caxev.core.ledger import Reaction
from caxev.core.model import Aspect, Run
from caxev.core.recording import Maker, WholeRuns, again, compare, outlook, possible_keys
from caxev.core.registry import Registry

if TYPE_CHECKING:
    from caxev.database import Database


@command(
    "caxev replay --run 123",
    "caxev replay --since 2d --site lngs --handler push --dry-run",
    "caxev replay --run 100-200 --tag _sciencerun0",
)
@needs("--wide", "--dry-run")
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
        stream(_COLUMNS, "no reaction would run", _plan, places, runs, act)
        return
    # The selection becomes ids now: what the user was shown is what the listeners replay, whenever
    # they come to it.
    ids = options().with_database(runs.ids)
    confirm_plan(act.plan(ids), yes=yes)
    rows = options().with_asker(ask_listeners, act, ids, is_request=not runs.names_one)
    queued = f"queued {counted(len(ids))}"
    rows = [{**row, "runs": len(ids)} for row in rows]
    show_lines(rows, lambda row: with_hint(f"{row['site']}: {queued}", row))


_COLUMNS = columns("run", "site", "event", "handler", "why")


def _places(site: str | None, handler: str | None) -> tuple[dict[str, Registry], str | None]:
    """Return the selected sites with their handlers, and the handler's own name."""
    given = options()
    names, known = addressed(given.sites(), given.registry, site, handler)
    return {one: given.registry(one) for one in enabling(names, given.registry, known)}, known


# -- the dry run --------------------------------------------------------------------------------


async def _plan(
    database: Database, places: Mapping[str, Registry], choice: RunChoice, act: Replay
) -> AsyncGenerator[dict[str, Any], None]:
    await choice.check(database)
    async with aclosing(choice.pages(database)) as found:
        async for page in found:
            ids = [run.id for run in page]
            for site, registry in places.items():
                seen = await database.snapshot(site, ids, watched=registry.watched)
                standing = await database.standing(possible_keys(registry, seen.now))
                knows, runs = await database.known_to(site, ids), await database.runs(seen.now)
                for run in runs.values():
                    before, known = seen.before.get(run.id, {}), knows.get(run.id, ())
                    for reaction, why in plan(registry, run, before, standing, act, known=known):
                        event, handler = event_parts(reaction.event), reaction.handler
                        row = {"run": shown(run), "site": site, "event": event}
                        yield {**row, "handler": handler, "why": why}


def plan(
    registry: Registry,
    run: Run,
    before: Mapping[Aspect, str],
    standing: Mapping[str, Reaction],
    act: Replay,
    *,
    known: Container[str] = (),
) -> Iterator[tuple[Reaction, str]]:
    """Return what a replay of a run fires, and why, given its stored snapshot."""
    maker, now = Maker(registry, options().sites()), utcnow()
    snapshot = run.snapshot(registry.watched)
    whole = WholeRuns({run.id: run})
    # The listener compares snapshots first, so new changes fire for all handlers.
    new = compare(maker, {run.id: now}, {run.id: before}, {run.id: snapshot}, whole)
    # A reaction that is new would be found by the replay as well: list it once.
    fired = set()
    for reaction in new.standing(standing):
        fired.add(reaction.id)
        yield reaction, "new since the last snapshot"
    outlooks = outlook(maker, run, snapshot, standing, now, known=known)
    for reaction, why in again(outlooks, handler=act.handler, force=act.force):
        if reaction.id not in fired:
            yield reaction, why
