"""Run ``caxev replay``: have the listeners fire again for the present states of runs."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click
from attrs import frozen

from caxev.cli.completion import HANDLER, SITE
from caxev.cli.options import MOST, as_table, example, global_options, state
from caxev.cli.output import Column, Table, event_parts, print_line, show, show_json
from caxev.cli.selection import many_runs
from caxev.config import ConfigError

if TYPE_CHECKING:
    from caxev.cli.runs import Wanted
    from caxev.core.ledger import Reaction
    from caxev.core.model import Aspect, Event, Run, RunId
    from caxev.core.registry import Registry
    from caxev.database import Database, Request

_PAGE = 1000


@click.command(
    epilog=example(
        "caxev replay --run 123",
        "caxev replay --last-days 2 --site lngs --handler push --dry-run",
        "caxev replay --from-run 100 --to-run 200 --tag _sciencerun0",
    )
)
@many_runs
@click.option("--site", type=SITE, help="Only at this site. [default: all with a listener]")
@click.option("--handler", type=HANDLER, help="Only this handler.")
@click.option("--dry-run", is_flag=True, help="Show what would run; write nothing.")
@click.option("--force", is_flag=True, help="Run also reactions that are done.")
@as_table
@global_options(hidden=True)
def replay(
    *,
    number: int | None,
    name: str | None,
    from_run: int | None,
    to_run: int | None,
    last_days: float | None,
    tag: str | None,
    detector: str | None,
    site: str | None,
    handler: str | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Run the reactions for existing runs again.

    For runs that were there before a handler or a rule. Only reactions that are missing run,
    unless --force is given. This leaves a request to the listeners of the sites, which waits
    until they run. --dry-run shows what they would do.
    """
    from caxev.database import Request

    options = state()
    options.log("warning")
    wanted = _wanted(
        number,
        name,
        between=(from_run, to_run),
        last_days=last_days,
        tag=tag,
        detector=detector,
    )
    places, request = _places(site, handler, Request("replay", handler=handler, force=force))
    if dry_run:
        rows = options.with_database(lambda database: _plan(database, places, wanted, request))
        show(Table(_COLUMNS, rows), as_json=as_json, empty="nothing would fire")
        return
    rows = options.with_database(lambda database: _ask(database, list(places), wanted, request))
    if as_json:
        show_json(rows)
        return
    for row in rows:
        print_line(queued(row))


_COLUMNS = (
    Column("run", "RUN"),
    Column("site", "SITE"),
    Column("event", "EVENT"),
    Column("handler", "HANDLER"),
    Column("why", "WHY"),
)


def _wanted(
    number: int | None,
    name: str | None,
    *,
    between: tuple[int | None, int | None],
    last_days: float | None,
    tag: str | None,
    detector: str | None,
) -> Wanted:
    """Return the selected runs. Raises click's error if none is, or the options conflict."""
    from caxev.cli.runs import Wanted, one
    from caxev.database import Selection

    chosen = (name, *between, last_days, tag)
    if number is not None:
        if any(given is not None for given in chosen):
            raise click.UsageError("--run names one run: give nothing else that selects runs")
        return one(number, None, detector)
    if all(given is None for given in chosen):
        raise click.UsageError(
            "say which runs: --run, --name, --from-run, --to-run, --last-days or --tag"
        )
    first, last = between[0] or 1, between[1] or MOST
    if first > last:
        raise click.UsageError(f"--from-run {first} is after --to-run {last}")
    numbers = None if between == (None, None) else (first, last)
    # A name alone selects one run, and a message then speaks of that run and not of a selection.
    if name is not None and (numbers, last_days, tag) == (None, None, None):
        return one(None, name, detector)
    selection = Selection(
        numbers=numbers, name=name, tag=tag, detector=detector, last_days=last_days
    )
    return Wanted(selection, _words(between, last_days, tag, detector))


def _words(
    between: tuple[int | None, int | None],
    last_days: float | None,
    tag: str | None,
    detector: str | None,
) -> str:
    parts = ["run"]
    if between != (None, None):
        first, last = between
        parts.append(f"from {first or 1}" + ("" if last is None else f" to {last}"))
    if tag is not None:
        parts.append(f"with tag {tag!r}")
    if detector is not None:
        parts.append(f"of {detector}")
    if last_days is not None:
        parts.append(f"in the last {last_days:g} days")
    return " ".join(parts)


def _places(
    site: str | None, handler: str | None, request: Request
) -> tuple[dict[str, Registry], Request]:
    """Return the selected sites with their handlers, and the request with its handler."""
    from attrs import evolve

    # Resolve the handler here: in the request, an unknown name would be an error in the log of a
    # listener far away, and an alias may not be known to its version.
    options = state()
    registries = {name: options.registry(name) for name in listening_sites(site)}
    if handler is None:
        return registries, request
    known = handler_called(handler, registries.values())
    enabled = {
        name: registry
        for name, registry in registries.items()
        if any(one.name == known for one in registry.enabled)
    }
    if not enabled:
        raise ConfigError(
            f"handler {known!r} is enabled at none of {', '.join(registries)}: see their task_list"
        )
    return enabled, evolve(request, handler=known)


def listening_sites(site: str | None) -> tuple[str, ...]:
    """Return the sites to ask: the one named, or all with a listener. Raises `ConfigError`."""
    sites = state().sites()
    if site is None:
        return tuple(one.name for one in sites.values() if one.listener)
    if not sites.get(site).listener:
        raise ConfigError(f"site {site!r} has no listener of its own, says {sites.path}")
    return (site,)


def handler_called(name: str, registries: Iterable[Registry]) -> str:
    """Return the handler that has this name or alias. Raises `ConfigError` naming the nearest."""
    from caxev.config.errors import known_names

    handlers = [handler for registry in registries for handler in registry.handlers.values()]
    names = {handler.name for handler in handlers}
    if name in names:  # a handler's own name precedes another one's alias
        return name
    meant = sorted({handler.name for handler in handlers if name in handler.aliases})
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise ConfigError(f"{name!r} is the name of several handlers: {', '.join(meant)}")
    raise ConfigError(f"no handler {name!r} {known_names(name, sorted(names))}")


# -- asking -------------------------------------------------------------------------------------


async def _ask(
    database: Database, sites: Sequence[str], wanted: Wanted, request: Request
) -> list[dict[str, Any]]:
    from attrs import evolve

    # The selection becomes ids now: what the user was shown is what the listeners replay, whenever
    # they come to it.
    found = await wanted.find(database, database.settings)
    ids = [run.id for run in found]
    requests = [evolve(request, runs=page) for page in pages(ids)]
    return [{**await leave(database, site, requests), "runs": len(ids)} for site in sites]


async def leave(database: Database, site: str, requests: Sequence[Request]) -> dict[str, Any]:
    """Leave requests for a site's listener, and return the result's row."""
    from caxev.core.clock import utcnow

    for request in requests:
        await database.add_request(site, request, me(), utcnow())
    record = await database.site_record(site)
    return {"site": site, "queued": len(requests), "listening": bool(record and record.active)}


def queued(row: Mapping[str, Any]) -> str:
    """Return the line about what was requested from a site."""
    site, runs = row["site"], row["runs"]
    what = f"{site}: queued {runs} run{'' if runs == 1 else 's'}"
    return what if row["listening"] else f"{what}; {nobody(site)}"


def nobody(site: str) -> str:
    """Return the hint about a site without a listener."""
    return f"nobody listens there now: start caxev listen --site {site}"


def me() -> str:
    """Return who asks: user@host."""
    import getpass
    import os
    import socket

    # In a container the user id may have no name.
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def pages(ids: Sequence[RunId]) -> Iterator[tuple[RunId, ...]]:
    """Split runs into pages of as many as one request can name."""
    return (tuple(ids[i : i + _PAGE]) for i in range(0, len(ids), _PAGE))


# -- the dry run --------------------------------------------------------------------------------


async def _plan(
    database: Database, places: Mapping[str, Registry], wanted: Wanted, request: Request
) -> list[dict[str, Any]]:
    from caxev.cli.runs import shown

    runs = await wanted.find(database, database.settings)
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
                for planned in await _plan_page(database, registry, page, request)
            ]
    return rows


@frozen
class Planned:
    """A reaction that would fire."""

    event: Event
    handler: str
    why: str


async def _plan_page(
    database: Database, registry: Registry, ids: Sequence[RunId], request: Request
) -> list[Planned]:
    from caxev.core.recording import possible_keys

    site = registry.here.name
    seen = await database.snapshot(site, ids, watched=registry.watched)
    standing = await database.standing(possible_keys(registry, seen.now))
    sets, runs = await database.handler_sets(site), await database.runs(seen.now)
    planned: list[Planned] = []
    for run in runs.values():
        known = sets.get(seen.handlers.get(run.id, 0), frozenset())
        before = seen.before.get(run.id, {})
        planned += plan(registry, run, before, standing, request, known=known)
    return planned


def plan(
    registry: Registry,
    run: Run,
    before: Mapping[Aspect, str],
    standing: Mapping[str, Reaction],
    request: Request,
    *,
    known: Container[str] = (),
) -> Iterator[Planned]:
    """Return what a replay of a run fires, given its stored snapshot."""
    from caxev.core.clock import utcnow
    from caxev.core.recording import Maker, again, compare

    maker, now = Maker(registry, state().sites()), utcnow()
    snapshot = run.snapshot(registry.watched)
    # The listener compares snapshots first, so new changes fire whatever handler was requested.
    new = compare(maker, {run.id: now}, {run.id: before}, {run.id: snapshot}, {run.id: run})
    # A reaction that is new would be found by the replay as well: list it once.
    fired = set()
    for reaction in new.standing(standing):
        fired.add(reaction.id)
        yield Planned(reaction.event, reaction.handler, "new since the site last looked")
    for reaction, why in again(
        maker,
        run,
        snapshot,
        standing,
        now,
        known=known,
        handler=request.handler,
        force=request.force,
    ):
        if reaction.id not in fired:
            yield Planned(reaction.event, reaction.handler, why)
