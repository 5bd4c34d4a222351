"""Request copies of many runs together, follow them, and withdraw what no listener has begun.

``caxev copy`` makes such a request if it is about many runs; ``caxev requests`` lists them, and
follows, cancels or resumes one. Each copy is an entry that is `requested`, as for one run, and
names the request. It is withdrawn by the same conditional write that a listener's claim excludes,
so no copy is left half-claimed.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import click
from attrs import define, field

from caxev.cli.command import command
from caxev.cli.copy_request import CopyRequest, history_row, new_request
from caxev.cli.errors import FAILED, INTERRUPTED, NothingToDo
from caxev.cli.hold import Keep
from caxev.cli.options import as_json, as_table, example, hidden_options, options
from caxev.cli.output import Column, Table, columns, json_text, print_line, show
from caxev.cli.plans import Tally
from caxev.cli.requests import requester
from caxev.cli.runs import pages
from caxev.cli.selection import DataChoice, RunChoice
from caxev.config import ConfigError
from caxev.core.amounts import lasting, size
from caxev.core.clock import utcnow
from caxev.core.model import ERROR, REQUESTED, TRANSFERRED, Copy, Run, RunId, new_id
from caxev.core.update import RunUpdate

if TYPE_CHECKING:
    from caxev.cli.copy_request import PlannedCopy
    from caxev.database import BulkProgress, BulkRequest, Database

_PERIOD: Final = 1.0
"""Seconds between two looks at how far a request is."""
_TRIES: Final = 5
"""Attempts to write a request to a run that changes at the same time."""


# -- making one -----------------------------------------------------------------------------------


def copy_many(runs: RunChoice, request: CopyRequest, *, yes: bool, patience: float) -> None:
    """Request the copies of the selected runs, after showing the plan; follow them if asked to."""
    tally, ids = options().with_database(_planned, runs, request)
    if not ids:
        raise NothingToDo(tally.words)
    tally.ask(yes=yes)
    bulk = _bulk(request, ids)
    options().with_database(lambda database: database.add_bulk(bulk))
    _carry_out(bulk, request, patience)


def _bulk(request: CopyRequest, ids: list[RunId]) -> BulkRequest:
    from caxev.database import BulkRequest

    return BulkRequest(
        id=new_id()[:8],
        runs=tuple(ids),
        type=request.data.kind,
        version=request.data.version,
        source=None if request.source is None else request.source.name,
        target=request.target.name,
        keep_days=request.keep.days,
        keep_until=request.keep.until,
        why=request.keep.why,
        by=requester(),
        at=utcnow(),
    )


def _request_of(bulk: BulkRequest) -> CopyRequest:
    sites = options().sites()
    return CopyRequest(
        DataChoice(bulk.type, bulk.version),
        None if bulk.source is None else sites.get(bulk.source),
        sites.get(bulk.target),
        sites,
        Keep(bulk.keep_days, bulk.keep_until, bulk.why),
    )


async def _planned(
    database: Database, runs: RunChoice, request: CopyRequest
) -> tuple[Tally, list[RunId]]:
    tally, ids, active = Tally(), [], await _active(database)
    async with aclosing(runs.each_whole(database)) as found:
        async for run in found:
            plan, why = _plan(request, run, active)
            if plan is None:
                tally.add("", None, why.replace(str(run), "it"))
                continue
            ids.append(run.id)
            source = run.copy(plan.path.source)
            weight = None if source is None else source.size or run.raw_size
            tally.add(f"{plan.path.source} to {plan.path.target.host}", weight)
    return tally, ids


async def _active(database: Database) -> set[str]:
    return {one.site for one in await database.site_records() if one.active}


def _plan(request: CopyRequest, run: Run, active: set[str]) -> tuple[PlannedCopy | None, str]:
    """Return how a run is copied; or else why it is not."""
    try:
        return request.plan(run, active, utcnow()), ""
    except (NothingToDo, ConfigError, click.UsageError) as why:
        return None, str(why)


# -- carrying one out -----------------------------------------------------------------------------


def _carry_out(bulk: BulkRequest, request: CopyRequest, patience: float) -> None:
    """Write the entries that are missing, and follow them. Ctrl-C withdraws what is not begun."""
    say = _printer()
    say(f"request {bulk.id}: {len(bulk.runs)} runs to {bulk.target}")
    try:
        options().with_database(_write_missing, bulk, request)
        if patience:
            options().with_database(_follow, bulk, patience, say)
    except KeyboardInterrupt:
        _withdraw(bulk, say)
        _sum_up(bulk)
        raise click.exceptions.Exit(INTERRUPTED) from None
    progress = _sum_up(bulk)
    if patience and progress.copies.get(TRANSFERRED, 0) < len(bulk.runs):
        raise click.exceptions.Exit(FAILED)


def _printer() -> Callable[[str], None]:
    as_json = options().as_json
    return lambda line: print_line(line, err=as_json)


async def _write_missing(database: Database, bulk: BulkRequest, request: CopyRequest) -> None:
    active = await _active(database)
    async with aclosing(_each(database, bulk)) as runs:
        async for run in runs:
            if _of(bulk, run) is None:
                await _write(database, bulk, request, run, active)


async def _each(database: Database, bulk: BulkRequest) -> AsyncGenerator[Run, None]:
    for page in pages(bulk.runs):
        for run in (await database.runs(page)).values():
            yield run


def _of(bulk: BulkRequest, run: Run) -> Copy | None:
    """Return the copy of a run that the request has made, or is about to."""
    mine = (one for one in run.copies if one.bulk == bulk.id and one.status != ERROR)
    return next(mine, None)


async def _write(
    database: Database, bulk: BulkRequest, request: CopyRequest, run: Run, active: set[str]
) -> None:
    for _ in range(_TRIES):
        plan, _why = _plan(request, run, active)
        if plan is None:  # there by now, or refused by now: the summary counts it
            return
        update = new_request(run, plan.path, requester(), utcnow(), plan.hold, bulk=bulk.id)
        if await database.update_run(update, utcnow()) is not None:
            await database.note(history_row(run, plan))
            return
        # The write expects the run as it was read. If it has changed meanwhile, decide again.
        found = (await database.runs([run.id])).get(run.id)
        if found is None:
            return
        run = found


def _withdraw(bulk: BulkRequest, say: Callable[[str], None]) -> None:
    number = options().with_database(_withdrawn, bulk)
    say(f"withdrawn: {number} copies that no listener has begun; others continue")
    say(f"to do the rest: caxev requests resume {bulk.id}")


async def _withdrawn(database: Database, bulk: BulkRequest) -> int:
    """Withdraw the requested copies that no listener has begun; return how many."""
    number = 0
    async with aclosing(_each(database, bulk)) as runs:
        async for run in runs:
            copy = _of(bulk, run)
            if copy is not None and copy.status == REQUESTED:
                # A listener that claims it changes its status: then this write does not fit.
                update = RunUpdate.remove_copy(run, copy)
                number += await database.update_run(update, utcnow()) is not None
    return number


# -- following one --------------------------------------------------------------------------------


@define
class Meter:
    """How far a request is, and how long the rest takes at the rate since it was first read."""

    runs: int
    _begun: float = field(init=False, factory=monotonic)
    _first: BulkProgress | None = field(init=False, default=None)

    def line(self, now: BulkProgress) -> str:
        """Return the progress in one line."""
        first = self._first = self._first or now
        done, failed = now.copies.get(TRANSFERRED, 0), now.copies.get(ERROR, 0)
        parts = [f"{done} of {self.runs} copies"]
        if total := sum(now.bytes.values()):
            parts.append(f"{size(now.bytes.get(TRANSFERRED, 0))} of {size(total)}")
        others = {k: n for k, n in sorted(now.copies.items()) if k not in {TRANSFERRED, ERROR}}
        parts += [f"{number} {status}" for status, number in others.items()]
        if failed:
            parts.append(f"{failed} failed")
        made = done - first.copies.get(TRANSFERRED, 0)
        if made and (left := pending(now)):
            took = monotonic() - self._begun
            parts.append(f"about {lasting(took / made * left)} left")
        return ", ".join(parts)


def pending(now: BulkProgress) -> int:
    """Return how many copies are not finished, one way or the other."""
    return sum(number for status, number in now.copies.items() if status not in _OVER)


_OVER: Final = frozenset({TRANSFERRED, ERROR})


async def _follow(
    database: Database, bulk: BulkRequest, patience: float, say: Callable[[str], None]
) -> None:
    """Show how far the request is whenever that changes, until nothing is pending."""
    import trio

    meter, last = Meter(len(bulk.runs)), None
    with trio.move_on_after(patience) as scope:
        while True:
            now = await database.bulk_progress(bulk)
            if now != last:
                say(meter.line(now))
            if not pending(now):
                return
            last = now
            # Many runs are counted less often: reading them costs the database time.
            await trio.sleep(_PERIOD * max(1.0, len(bulk.runs) / 1000))
    if scope.cancelled_caught:
        say(f"not done after {patience:g} s; to follow it: caxev requests watch {bulk.id}")


def _sum_up(bulk: BulkRequest) -> BulkProgress:
    progress = options().with_database(lambda database: database.bulk_progress(bulk))
    if options().as_json:
        click.echo(json_text(_cells(bulk, progress)))
    return progress


def _cells(bulk: BulkRequest, now: BulkProgress) -> dict[str, Any]:
    there = sum(now.copies.values())
    return {
        "request": bulk.id,
        "at": bulk.at,
        "by": bulk.by,
        "data": f"{bulk.type} {bulk.version or ''}".rstrip(),
        "from": bulk.source,
        "to": bulk.target,
        "runs": len(bulk.runs),
        "done": now.copies.get(TRANSFERRED, 0),
        "pending": pending(now),
        "failed": now.copies.get(ERROR, 0),
        "withdrawn": len(bulk.runs) - there,
        "bytes": sum(now.bytes.values()),
    }


# -- caxev requests -------------------------------------------------------------------------------


@click.group(
    invoke_without_command=True,
    epilog=example("caxev requests", "caxev requests cancel 3f9ac0d1"),
)
@click.option(
    "--limit",
    type=click.IntRange(1),
    default=20,
    show_default=True,
    metavar="N",
    help="The most to list.",
)
@click.pass_context
def requests(context: click.Context, limit: int) -> None:
    """List the requests for copies of many runs, the newest first: how far they are.

    `caxev copy` makes them. WITHDRAWN are copies that were cancelled, or that another request
    has made.
    """
    if context.invoked_subcommand is not None:
        return
    options().log("warning")

    async def find(database: Database) -> list[dict[str, Any]]:
        found = await database.bulks(limit)
        return [_cells(one, await database.bulk_progress(one)) for one in found]

    show(Table(_COLUMNS, options().with_database(find)), empty="no request for many copies")


requests.params += [*as_table(), *hidden_options()]

_COLUMNS: Final = columns(
    "request",
    Column("at", minor=2),
    Column("by", minor=1),
    "data",
    "to",
    "runs",
    "done",
    "pending",
    "failed",
    "withdrawn",
)


def _known(name: str) -> BulkRequest:
    """Return the request of that id. Raises `NothingToDo`, naming the nearest."""
    from caxev.config.errors import known_names

    async def find(database: Database) -> BulkRequest:
        found = await database.bulk(name)
        if found is None:
            known = [one.id for one in await database.bulks(20)]
            raise NothingToDo(f"there is no request {name!r} {known_names(name, known)}")
        return found

    return options().with_database(find)


_id = click.argument("name", metavar="ID")


@command("caxev requests watch 3f9ac0d1", group=requests, output=as_json)
@_id
def watch(*, name: str) -> None:
    """Follow a request until each of its copies is made or has failed."""
    bulk, say = _known(name), _printer()
    try:
        options().with_database(_follow, bulk, float("inf"), say)
    except KeyboardInterrupt:
        say(f"interrupted; the copies continue. To cancel them: caxev requests cancel {bulk.id}")
        raise click.exceptions.Exit(INTERRUPTED) from None
    _sum_up(bulk)


@command("caxev requests cancel 3f9ac0d1", group=requests, output=as_json)
@_id
def cancel(*, name: str) -> None:
    """Withdraw the copies that no listener has begun.

    Those that a listener has begun are finished.
    """
    bulk = _known(name)
    _withdraw(bulk, _printer())
    _sum_up(bulk)


@command("caxev requests resume 3f9ac0d1", group=requests, output=as_json)
@_id
@click.option("--wait/--no-wait", default=True, show_default=True, help="Watch until it is done.")
def resume(*, name: str, wait: bool) -> None:
    """Request again what is missing of a request.

    That is what was withdrawn, and what has failed.
    """
    bulk = _known(name)
    _carry_out(bulk, _request_of(bulk), float("inf") if wait else 0.0)
