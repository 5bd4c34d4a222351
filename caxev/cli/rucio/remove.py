"""Run ``caxev rucio rm``, ``forget`` and ``purge``: remove datasets, entries, copies on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from caxev.cli.completion import SITE, STATUS
from caxev.cli.options import as_table, example, global_options, state
from caxev.cli.rucio.chosen import Chosen, ask_to_compare, rucio, selecting, show_rows
from caxev.config import ConfigError
from caxev.core.escapes import escaped

if TYPE_CHECKING:
    from caxev.config import Site
    from caxev.core.model import Copy, Run
    from caxev.database import Database


@rucio.command(epilog=example("caxev rucio rm --run 123 --why 'taken in error'"))
@selecting
@click.option("--why", required=True, metavar="TEXT", help="The reason, kept in deleted_data.")
@click.option("--dry-run", is_flag=True, help="Show what would go, or why not; write nothing.")
@as_table
@global_options(hidden=True)
def rm(*, why: str, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Give up datasets, so that the catalogue deletes all replicas.

    Like `caxev rm`: the site that uploaded a dataset has the other copies read again first, and
    gives it up only if that proves enough of them good (`deletion` of the catalogue in
    sites.json). Until then `caxev rm --site CATALOGUE --cancel` takes it back.
    """
    state().log("warning")
    chosen = Chosen.of(options)

    async def remove(database: Database) -> list[dict[str, Any]]:
        runs = await chosen.runs(database)
        return [await _remove(database, chosen, run, why, dry_run=dry_run) for run in runs]

    show_rows(state().with_database(remove), as_json=as_json)


async def _remove(
    database: Database, chosen: Chosen, run: Run, why: str, *, dry_run: bool
) -> dict[str, Any]:
    from caxev.cli.runs import shown

    entry, there = chosen.entry(run), chosen.there
    row = {"run": shown(run), "what": f"{chosen.kind} at {there.name}"}
    if entry is None:
        return {**row, "state": "the catalogue has no such copy", "ok": False}
    # Never guess a version for a deletion.
    if len(several := chosen.entries(run)) > 1:
        versions = ", ".join(one.version or "none" for one in several)
        return {**row, "state": f"there are several ({versions}): say --version", "ok": False}
    found = await _wanted(database, run, entry, there, why, dry_run=dry_run)
    return {**row, **found, "ok": bool(found["ok"])}


async def _wanted(
    database: Database, run: Run, copy: Copy, here: Site, why: str, *, dry_run: bool
) -> dict[str, Any]:
    """Request the deletion of a copy if it is allowed; `ok` in the row is None if it stays."""
    from caxev.cli.replay import me
    from caxev.copies.deletion import intent
    from caxev.copies.retention import RAW, DeletionPlan, plan
    from caxev.core.clock import utcnow
    from caxev.core.model import DELETING
    from caxev.engine.root_markers import read_markers

    if copy.status == DELETING:
        return {"state": "is going already", "ok": True}
    # Derived data can be made again from raw data: one other copy is enough.
    keep = here.deletion.copies if copy.type == RAW else 1
    sites, now = await read_markers(database, state().sites(), here), utcnow()
    wanted = plan(run, copy, here, sites, now=now, by=me(), why=why, keep=keep)
    if not isinstance(wanted, DeletionPlan):
        return {"state": f"stays: {wanted.why}", "ok": None}
    if dry_run:
        return {"state": "would go, once the others were read", "ok": True}
    if await database.update_run(intent(run, wanted, sites, now), now) is None:
        return {"state": "has changed meanwhile: ask again", "ok": False}
    return {"state": "goes, once the others were read", "ok": True}


@rucio.command(epilog=example("caxev rucio forget --run 123 --status error --why 'never uploaded'"))
@selecting
@click.option("--status", type=STATUS, help="Only entries with this status.")
@click.option("--why", required=True, metavar="TEXT", help="The reason, kept in deleted_data.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Show what would be removed; write nothing.")
@as_table
@global_options(hidden=True)
def forget(
    *, status: str | None, why: str, yes: bool, dry_run: bool, as_json: bool, **options: Any
) -> None:
    """Remove entries of the catalogue; its datasets stay.

    Only `caxev rucio put` uploads such data again.
    """
    state().log("warning")
    chosen = Chosen.of(options)
    runs = state().with_database(chosen.runs)
    found = [(run, _with_status(chosen.entries(run), status)) for run in runs]
    number = sum(len(entries) for _, entries in found)
    # What is asked about is what is written: the runs are not read again after the answer.
    if number and not (yes or dry_run):
        words = f"{escaped(chosen.wanted.words)} is at {chosen.there.name} ({number})"
        click.confirm(f"Forget that {words}?", abort=True, err=as_json)

    async def write(database: Database) -> list[dict[str, Any]]:
        return [
            row
            for run, entries in found
            for row in await _forget(database, chosen, run, entries, why, dry_run=dry_run)
        ]

    show_rows(state().with_database(write), as_json=as_json)


def _with_status(entries: list[Copy], status: str | None) -> list[Copy]:
    return [entry for entry in entries if status in (None, entry.status)]


async def _forget(
    database: Database, chosen: Chosen, run: Run, entries: list[Copy], why: str, *, dry_run: bool
) -> list[dict[str, Any]]:
    from caxev.cli.runs import shown
    from caxev.cli.tape import forgetting
    from caxev.core.clock import utcnow

    row = {"run": shown(run), "what": f"{chosen.kind} at {chosen.there.name}"}
    if not entries:
        return [{**row, "state": "there is no such entry", "ok": False}]
    rows = []
    for entry in entries:
        done, state_ = True, f"would be forgotten: it is {entry.status}"
        if not dry_run:
            update = forgetting(run, entry, why)
            done = await database.update_run(update, utcnow()) is not None
            state_ = "forgotten" if done else "has changed meanwhile: try again"
        rows.append({**row, "state": state_, "ok": done})
    return rows


@rucio.command(epilog=example("caxev rucio purge --site lngs --to-run 1000 --dry-run"))
@selecting
@click.option("--site", type=SITE, required=True, help="The site whose copies are deleted.")
@click.option("--dry-run", is_flag=True, help="Show what would go, or why not; write nothing.")
@as_table
@global_options(hidden=True)
def purge(*, site: str, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Delete copies on disk that the catalogue has, too.

    Like `caxev rm`, for many runs: the site's listener deletes a copy only if enough others are
    proved good. If the replicas of a dataset were never compared, that is requested first.
    """
    state().log("warning")
    chosen, here = Chosen.of(options), state().sites().get(site)
    if not here.listener:
        raise ConfigError(f"{site} has no listener of its own, says sites.json: nobody deletes")

    async def ask(database: Database) -> list[dict[str, Any]]:
        runs = await chosen.runs(database)
        return [await _purge(database, chosen, here, run, dry_run=dry_run) for run in runs]

    show_rows(state().with_database(ask), as_json=as_json)


async def _purge(
    database: Database, chosen: Chosen, here: Site, run: Run, *, dry_run: bool
) -> dict[str, Any]:
    from caxev.cli.runs import shown
    from caxev.core.model import TRANSFERRED, CopyKey

    row = {"run": shown(run), "what": f"{chosen.kind} at {here.name}"}
    entry = chosen.entry(run)
    if entry is None or entry.status != TRANSFERRED:
        how = "no such copy" if entry is None else f"it as {entry.status}"
        return {**row, "state": f"stays: the catalogue has {how}", "ok": True}
    copy = run.copy(CopyKey(chosen.kind, here.name, entry.version))
    if copy is None:
        return {**row, "state": "there is none", "ok": True}
    # A proof counts only copies whose bytes were read; without that the intent would just wait.
    if entry.read_at is None:
        asked = not dry_run and await ask_to_compare(database, run, entry)
        state_ = f"stays: its replicas were never compared{': asked' if asked else ''}"
        return {**row, "state": state_, "ok": False}
    return {
        **row,
        **await _wanted(database, run, copy, here, "caxev rucio purge", dry_run=dry_run),
    }
