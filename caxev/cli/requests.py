"""Have listeners do something: writes to runs, and requests in the ledger.

Each command that asks something of many runs makes a `RunRequest` of each, shows them as a plan or
writes them, and prints the same rows.
"""

from __future__ import annotations

import getpass
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final

from attrs import Factory, field, frozen

from caxev.cli.options import options
from caxev.cli.output import Table, columns, show
from caxev.cli.plans import FEW, Tally
from caxev.cli.runs import shown
from caxev.cli.selection import RunChoice
from caxev.config import ConfigError, Site
from caxev.core.clock import utcnow
from caxev.core.history import Deed, HistoryRow, What, of_run
from caxev.core.model import CopyKey, Run
from caxev.core.update import RunUpdate

if TYPE_CHECKING:
    from caxev.database import Database, Request

CHANGED: Final = "the run has just changed: try again"


def requester() -> str:
    """Return who gives the command: user@host."""
    # In a container the user id may have no name.
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def asked(run: Run, key: CopyKey, what: str, *, reason: str = "", source: str = "") -> HistoryRow:
    """Return the row of history about what the user asks for, of this copy."""
    target = key.host if source else ""
    deed = Deed(what=what, source=source, target=target, reason=reason, by=requester())
    return HistoryRow(at=utcnow(), site=key.host, deed=deed, aspect=key, **of_run(run))


# -- writes to runs -------------------------------------------------------------------------------


@frozen
class RunRequest:
    """A write that is to be made to a run, or the reason why there is none.

    `what` is the data concerned, `size` its bytes. `state` is what comes of the write, or the
    reason; `planned` what would come of it, for a dry run. `ok`: whether the user gets what was
    asked for; None: neither. `row` is added to the history after the write.
    """

    run: Run
    what: str
    state: str
    update: RunUpdate | None = None
    planned: str = field(default=Factory(lambda self: f"would be {self.state}", takes_self=True))
    ok: bool | None = field(default=Factory(lambda self: self.update is not None, takes_self=True))
    size: int | None = field(default=None, kw_only=True)
    row: HistoryRow | None = field(default=None, kw_only=True)

    @property
    def why(self) -> str:
        """Why there is no write, in the same words for all runs."""
        return self.state.replace(str(self.run), "it")

    async def write(self, database: Database, *, dry_run: bool) -> dict[str, Any]:
        """Write it unless it is a dry run; return the row that the command prints."""
        row = {"run": shown(self.run), "what": self.what, "state": self.state, "ok": self.ok}
        if self.update is None:
            return row
        if dry_run:
            return {**row, "state": self.planned}
        if await database.update_run(self.update, utcnow()) is None:
            return {**row, "state": CHANGED, "ok": False}
        if self.row is not None:
            await database.note(self.row)
        return row


async def write_all(
    database: Database, requests: Iterable[RunRequest], *, dry_run: bool
) -> list[dict[str, Any]]:
    """Write all of these unless it is a dry run; return their rows."""
    return [await one.write(database, dry_run=dry_run) for one in requests]


Planner = Callable[[Run], RunRequest]


def request_each(
    runs: RunChoice,
    make: Callable[[Database], Awaitable[Planner]],
    *,
    yes: bool,
    dry_run: bool,
) -> list[dict[str, Any]]:
    """Make a request of each selected run, and write it unless it is a dry run; return the rows.

    `make` returns the planner, which is pure except for the time. Of many runs the plan is shown
    first, and a person confirms it. Each run is planned again when its turn comes.
    """
    if not dry_run and runs.selection.at_most > FEW:
        options().with_database(_tallied, runs, make).ask(yes=yes)
    return options().with_database(_write_each, runs, make, dry_run=dry_run)


async def _tallied(
    database: Database, runs: RunChoice, make: Callable[[Database], Awaitable[Planner]]
) -> Tally:
    tally, plan = Tally(), await make(database)
    async with aclosing(runs.each_whole(database)) as found:
        async for run in found:
            one = plan(run)
            tally.add(one.what, one.size, None if one.update is not None else one.why)
    return tally


async def _write_each(
    database: Database,
    runs: RunChoice,
    make: Callable[[Database], Awaitable[Planner]],
    *,
    dry_run: bool,
) -> list[dict[str, Any]]:
    plan = await make(database)
    async with aclosing(runs.each_whole(database)) as found:
        return [await plan(run).write(database, dry_run=dry_run) async for run in found]


def planner(plan: Planner) -> Callable[[Database], Awaitable[Planner]]:
    """Return the `make` of `request_each` for a planner that needs nothing of the database."""

    async def make(_database: Database) -> Planner:
        return plan

    return make


REQUESTED: Final = columns("run", "what", "state")


def show_requests(rows: Sequence[Mapping[str, Any]], *, failed: bool | None = None) -> None:
    """Print the rows; by default, exit with a failure if one of them is not ok."""
    if failed is None:
        failed = any(row["ok"] is False for row in rows)
    show(Table(REQUESTED, rows), empty="nothing to do", failed=failed)


# -- requests in the ledger -----------------------------------------------------------------------


def listening_sites(site: str | None) -> tuple[str, ...]:
    """Return the sites to ask: the one named, or all with a listener. Raises `ConfigError`."""
    sites = options().sites()
    if site is None:
        return tuple(one.name for one in sites.values() if one.listener)
    check_listener(sites.get(site))
    return (site,)


def check_listener(site: Site) -> None:
    """Raise `ConfigError` if the site has no listener that could do what is asked."""
    if not site.listener:
        path = options().sites().path
        raise ConfigError(f"site {site.name!r} has no listener of its own, according to {path}")


async def leave(database: Database, site: str, requests: Sequence[Request]) -> dict[str, Any]:
    """Leave requests for a site's listener, and return the result's row."""
    for request in requests:
        await database.add_request(site, request, requester(), utcnow())
        await database.note(_asked_of(site, request))
    record = await database.site_record(site)
    return {"site": site, "queued": len(requests), "listening": bool(record and record.active)}


def _asked_of(site: str, request: Request) -> HistoryRow:
    """Return the row of history about a request to a site's listener."""
    runs = request.runs or ()
    of = "" if request.runs is None else f" of {len(runs)} run{'' if len(runs) == 1 else 's'}"
    words = [f"{request.kind}{of}", request.handler or "", request.alarm or ""]
    words.append("forced" if request.force else "")
    deed = Deed(what=What.REQUESTED, reason=", ".join(filter(None, words)), by=requester())
    run = runs[0] if len(runs) == 1 else None
    return HistoryRow(at=utcnow(), site=site, deed=deed, run=run)


def with_hint(line: str, row: Mapping[str, Any]) -> str:
    """Return a line about a site, with a hint if no listener acts for the site now."""
    return line if row["listening"] else f"{line}; {no_listener(row['site'])}"


def no_listener(site: str) -> str:
    """Return the hint about a site without a listener."""
    return f"no listener is active there: start caxev listen --site {site}"
