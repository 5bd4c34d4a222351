"""Run ``caxev tape put``, ``get``, ``check`` and ``forget``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from caxev.cli.command import command
from caxev.cli.copy_request import CopyPath, new_request, why_not
from caxev.cli.forget import forget_entries, forgets
from caxev.cli.hold import Keep
from caxev.cli.options import options
from caxev.cli.plans import asks
from caxev.cli.requests import Planner, RunRequest, planner, request_each, requester, show_requests
from caxev.cli.runs import shown
from caxev.cli.selection import RunChoice, selects_runs
from caxev.cli.tape.archive import (
    ArchiveChoice,
    as_noted,
    copies_on_tape,
    raw_at,
    selects_archive,
    selects_reach,
    tape,
)
from caxev.cli.values import SITE
from caxev.config import ConfigError
from caxev.core.clock import utcnow
from caxev.core.entry import Hold
from caxev.core.errors import GiveUp, Retry
from caxev.core.model import TRANSFERRED, Copy, Run, new_id
from caxev.core.update import RunUpdate
from caxev.files import Manifest, safe_name
from caxev.tape.base import Reach, folder_of
from caxev.tape.steps import Data, recall

if TYPE_CHECKING:
    from caxev.database import Database

_dry_run = click.option("--dry-run", is_flag=True, help="Show what would be done; do nothing.")


def _request(runs: RunChoice, plan: Planner, *, yes: bool, dry_run: bool) -> None:
    _show(request_each(runs, planner(plan), yes=yes, dry_run=dry_run))


def _show(rows: Sequence[dict[str, Any]]) -> None:
    # Runs that need nothing are no error as long as one has been requested.
    show_requests(rows, failed=not any(row["ok"] for row in rows))


@command("caxev tape put --run 123", "caxev tape put --run 100-200", group=tape)
@selects_runs(copies=())
@selects_archive
@click.option("--from", "source", type=SITE, help="From this site. [default: any that can]")
@asks
@_dry_run
def put(
    *, runs: RunChoice, archive: ArchiveChoice, source: str | None, yes: bool, dry_run: bool
) -> None:
    """Bring raw data to tape.

    This adds an entry that is `requested`; the listener of a site that has the data does it.
    """
    host, sites = archive.there.name, options().sites()
    names = [one.name for one in sites.values() if host in one.upload_options]
    names = names if source is None else [source]
    _request(runs, lambda run: put_request(run, names, host), yes=yes, dry_run=dry_run)


def put_request(
    run: Run, names: Sequence[str], target: str, hold: Hold | None = None
) -> RunRequest:
    """Return the request for a copy at a target, from the first of these sites that has one."""
    # The first site's reason is shown: it is the one that usually brings data there.
    reasons = []
    for name in names:
        path = CopyPath(raw_at(name), raw_at(target))
        if (why := why_not(run, path)) is None:
            update = new_request(run, path, requester(), utcnow(), hold)
            what = f"raw from {name} to {target}"
            return RunRequest(run, what, "requested", update, size=run.raw_size)
        reasons.append(why)
    why = reasons[0] if reasons else f"no site uploads to {target}"
    return RunRequest(run, f"raw to {target}", why)


@command(
    "caxev tape get --run 123 --site lngs", "caxev tape get --run 123 --to /scratch", group=tape
)
@selects_runs(copies=())
@selects_reach
@click.option("--to", "directory", metavar="DIR", help="Restore into this directory here.")
@asks
@_dry_run
def get(
    *, runs: RunChoice, archive: ArchiveChoice, directory: str | None, yes: bool, dry_run: bool
) -> None:
    """Bring raw data back from tape.

    Without --to, the site's listener restores, compares and registers the copy, which is held as
    one that `caxev copy` requests. With --to, this
    command restores the files into a directory here, and registers nothing; if no digest is
    known, it reports the files as unverified.
    """
    reach = archive.reach
    target, source = reach.here.name, reach.there.name
    if directory is None:
        hold = Keep().of_request(raw_at(target), reach.here, utcnow())
        plan = partial(put_request, names=[source], target=target, hold=hold)
        _request(runs, plan, yes=yes, dry_run=dry_run)
        return
    place = Path(directory).absolute()
    if not place.is_dir():
        raise ConfigError(f"{place} is not a directory: make it first")
    found, known = options().with_database(_with_manifests, runs, reach)
    rows = [restore(run, copy, rows, known, place, dry_run=dry_run) for run, copy, rows in found]
    show_requests(rows)


async def _with_manifests(
    database: Database, runs: RunChoice, reach: Reach
) -> tuple[list[tuple[Run, Copy | None, list[dict[str, Any]] | None]], Reach]:
    """Return the selected runs with their copies on tape and their manifests, and the archive."""
    found = []
    for run, copy in await copies_on_tape(database, runs, reach.there.name):
        digest = None if copy is None else copy.manifest
        found.append((run, copy, await database.load_manifest(digest) if digest else None))
    return found, await as_noted(database, reach)


def restore(
    run: Run,
    copy: Copy | None,
    rows: list[dict[str, Any]] | None,
    reach: Reach,
    place: Path,
    *,
    dry_run: bool,
) -> dict[str, Any]:
    """Restore a copy into a directory unless it is a dry run; return its row."""
    row = {"run": shown(run), "what": f"raw from {reach.there.name} to {place}", "ok": False}
    if copy is None or copy.status != TRANSFERRED or copy.location is None:
        return {**row, "state": _unusable(copy)}
    folder = folder_of(copy.location)
    target = str(place / safe_name(folder))
    expected = None if rows is None else Manifest.from_rows(rows)
    data = Data(safe_name(folder), folder, expected, copy.checksum)
    if not dry_run:
        try:
            recall(reach, data, target, [str(place)]).get()
        except (Retry, GiveUp) as error:
            return {**row, "state": str(error)}
    state = target if data.is_known else f"{target} (unverified: no digest is known)"
    return {**row, "state": state, "ok": True, "verified": data.is_known}


def _unusable(copy: Copy | None) -> str:
    """Return why a copy on tape cannot be used."""
    return "it is not on tape" if copy is None else f"the copy on tape is {copy.status}"


@command("caxev tape check --run 123", "caxev tape check --since 30d", group=tape)
@selects_runs(copies=())
@selects_archive
@asks
@_dry_run
def check(*, runs: RunChoice, archive: ArchiveChoice, yes: bool, dry_run: bool) -> None:
    """Read copies on tape again, and compare them.

    The listener of the site that brought them there restores them to scratch. It answers in
    `check_answered` and `verified_at` of the entry.
    """
    host = archive.there.name
    _request(runs, lambda run: check_request(run, host), yes=yes, dry_run=dry_run)


def check_request(run: Run, host: str) -> RunRequest:
    """Return the request to read a copy on tape again. Pure except for the time."""
    copy = run.copy(raw_at(host))
    if copy is None or copy.status != TRANSFERRED:
        return RunRequest(run, f"raw at {host}", _unusable(copy))
    update = RunUpdate.ask(run, copy, new_id(), utcnow())
    return RunRequest(
        run,
        f"raw at {host}",
        "will be read again",
        update,
        "would be read again",
        size=run.raw_size,
    )


@command("caxev tape forget --run 123 --why 'the tape is lost'", group=tape)
@selects_runs(copies=())
@selects_archive
@forgets
def forget(*, runs: RunChoice, archive: ArchiveChoice, why: str, yes: bool, dry_run: bool) -> None:
    """Remove the entries of copies on tape; the files on tape stay.

    A note of it stays in the run's `deleted_data`. If a site's `upload_options` name the
    archive, its listener brings the data there again.
    """
    host = archive.there.name
    found = options().with_database(copies_on_tape, runs, host)
    entries = [(run, [] if copy is None else [copy]) for run, copy in found]
    what = f"raw at {host}"
    _show(forget_entries(entries, what, why, asks=not (yes or dry_run), dry_run=dry_run))
