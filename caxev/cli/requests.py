"""Run ``caxev requests``: follow, cancel or resume what was requested of many runs together.

`caxev.asking.requests` has what such a request is. ``caxev copy`` follows the one that it makes.
"""

from __future__ import annotations

from contextlib import aclosing
from math import inf
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import click

from caxev.asking import requests as asking
from caxev.asking.base import DONE, counted
from caxev.cli.command import command, limits, listing
from caxev.cli.errors import INTERRUPTED
from caxev.cli.options import as_json, options
from caxev.cli.output import Column, columns, fail_if, print_progress, show, show_json
from caxev.cli.plans import confirm_plan, plan_of, title
from caxev.cli.selection import RunChoice
from caxev.core.amounts import lasting
from caxev.core.clock import utcnow
from caxev.core.errors import NothingToDo

if TYPE_CHECKING:
    from caxev.asking.asker import Asker
    from caxev.asking.base import RequestedAct
    from caxev.database import BulkRequest

_PERIOD: Final = 1.0
"""Seconds between two looks at how far a request is."""
_STILL: Final = 30.0
"""Seconds without progress after which the process that writes has probably been killed."""


def copy_many(runs: RunChoice, act: RequestedAct, *, yes: bool, patience: float) -> None:
    """Request the copies of the selected runs, after showing the plan; follow them if asked to."""
    plan = options().with_asker(plan_of, runs, act)
    if not plan.runs:
        raise NothingToDo(plan.words)
    confirm_plan(plan, yes=yes)
    _carry_out(options().with_asker(asking.keep, act, plan.runs), patience)


def _carry_out(request: BulkRequest, patience: float) -> None:
    """Do what is missing of a request, and follow it. Ctrl-C withdraws what is not begun."""
    print_progress(f"request {request.id}: {title(request)}")
    try:
        options().with_asker(_write, request)
        if patience:
            options().with_asker(_follow, request, patience)
    except KeyboardInterrupt:
        _withdraw(request)
        _sum_up(request)
        raise click.exceptions.Exit(INTERRUPTED) from None
    _sum_up(request, is_followed=patience > 0)


async def _write(asker: Asker, request: BulkRequest) -> None:
    meter, shown = asking.ProgressMeter(), monotonic()
    async with aclosing(asking.carry_out(asker, request)) as steps:
        async for _ in steps:
            if monotonic() >= shown + _PERIOD:
                now = await asking.progress(asker, request)
                print_progress(meter.line(now))
                shown = monotonic() + _pause(now)


def _pause(now: asking.RequestProgress) -> float:
    """Return the seconds until the next look: reading many runs costs the database time."""
    return _PERIOD * max(1.0, now.total / 1000)


def _withdraw(request: BulkRequest) -> None:
    number = options().with_asker(asking.cancel, request)
    print_progress(f"withdrawn: {counted(number)} that nobody has begun; others continue")
    print_progress(f"to do the rest: caxev requests resume {request.id}")


async def _follow(asker: Asker, request: BulkRequest, patience: float) -> None:
    """Show how far the request is whenever that changes, until nothing is pending."""
    import trio

    meter, last, changed = asking.ProgressMeter(), None, monotonic()
    with trio.move_on_after(patience) as scope:
        while True:
            now = await asking.progress(asker, request)
            if now != last:
                print_progress(meter.line(now))
                last, changed = now, monotonic()
            if not now.waiting:
                return
            if asking.TO_WRITE in now.pending and monotonic() > changed + _STILL:
                print_progress(
                    f"if nobody writes any more: caxev requests resume {request.id} does the rest"
                )
                changed = inf
            await trio.sleep(_pause(now))
    if scope.cancelled_caught:
        print_progress(
            f"not done after {patience:g} s; to follow it: caxev requests watch {request.id}"
        )


def _sum_up(request: BulkRequest, *, is_followed: bool = False) -> None:
    """Print how far it is as JSON, if wanted; exit with a failure unless all of it is done."""
    now = options().with_asker(asking.progress, request)
    if options().as_json:
        show_json(_cells(request, now))
    fail_if(is_followed and now.done < now.total)


def _cells(request: BulkRequest, now: asking.RequestProgress) -> dict[str, Any]:
    return {
        "request": request.id,
        "at": request.at,
        "by": request.by,
        "what": asking.described(request),
        "runs": None if request.runs is None else len(request.runs),
        DONE: now.done,
        "pending": now.waiting,
        "failed": now.failed,
        "withdrawn": now.withdrawn,
        "bytes": now.bytes,
        "seconds_left": now.left(utcnow() - request.at),
    }


# -- caxev requests -------------------------------------------------------------------------------


@listing("caxev requests", "caxev requests cancel 3f9ac0d1")
@limits(20, "The most to list.")
def requests(limit: int) -> None:
    """List requests about several runs and their progress, the newest first.

    `caxev copy`, `rm`, `verify --deep`, `retry`, `replay`, `tape`, `rucio`, `tag`, `comment`,
    `hold` and `release` make one request if they act on several runs. PENDING counts the runs that
    are not done yet, and LEFT estimates the time for them from the rate so far. WITHDRAWN counts
    those that were cancelled, or that a listener refused. A request is kept for CAXEV_HISTORY_DAYS.
    """

    async def find(asker: Asker) -> list[dict[str, Any]]:
        rows = []
        async for one in asker.database.bulks(limit):
            try:
                now = await asking.progress(asker, one)
            except NothingToDo:  # only the version that made it knows such acts
                now = asking.RequestProgress(0)
            rows.append(_cells(one, now))
        return rows

    rows = options().with_asker(find)
    show(_COLUMNS, rows, empty="nothing was requested of several runs together")


_COLUMNS: Final = columns(
    "request",
    Column("at", minor=2),
    Column("by", minor=1),
    "what",
    "runs",
    "done",
    "pending",
    "failed",
    "withdrawn",
    Column("seconds_left", "LEFT", lasting, minor=1),
)


_id = click.argument("name", metavar="ID")


@command("caxev requests watch 3f9ac0d1", group=requests, output=as_json)
@_id
def watch(*, name: str) -> None:
    """Follow a request until nothing of it is pending. Exit code 1 unless all of it is done."""
    request = options().with_asker(asking.request_called, name)
    try:
        options().with_asker(_follow, request, inf)
    except KeyboardInterrupt:
        print_progress(
            f"interrupted; the request continues. To cancel it: caxev requests cancel {request.id}"
        )
        raise click.exceptions.Exit(INTERRUPTED) from None
    _sum_up(request, is_followed=True)


@command("caxev requests cancel 3f9ac0d1", group=requests, output=as_json)
@_id
def cancel(*, name: str) -> None:
    """Withdraw what nobody has begun.

    What a listener has begun is finished. Tags, comments and holds that are written stay.
    """
    request = options().with_asker(asking.request_called, name)
    _withdraw(request)
    _sum_up(request)


@command("caxev requests resume 3f9ac0d1", group=requests, output=as_json)
@_id
@click.option("--wait/--no-wait", default=True, show_default=True, help="Watch until it is done.")
def resume(*, name: str, wait: bool) -> None:
    """Do what is missing of a request.

    That is what was withdrawn, what has failed, and what a command that was killed has not written.
    """
    request = options().with_asker(asking.request_called, name)
    _carry_out(request, inf if wait else 0.0)
