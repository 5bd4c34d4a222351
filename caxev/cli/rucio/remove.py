"""``caxev rucio rm`` and ``purge``: give up datasets, or copies on disk that the catalogue has."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import click

from caxev.cli.options import as_json, example, global_options, state
from caxev.cli.rucio.chosen import Chosen, rucio, selecting, told
from caxev.config import ConfigError

if TYPE_CHECKING:
    from caxev.config import Site
    from caxev.model import Copy, CopyKey, Run
    from caxev.mongo import Database

PROOF: Final = timedelta(hours=24)
"""How fresh the comparison of other copies must be before a dataset is given up."""
OTHERS: Final = 2
"""How many other good copies there must be."""


@rucio.command(epilog=example("caxev rucio rm --run 123 --why 'taken in error'"))
@selecting
@click.option("--why", required=True, metavar="TEXT", help="Why it goes; kept for ever.")
@click.option("--dry-run", is_flag=True, help="Print what would be done; write nothing.")
@as_json
@global_options(hidden=True)
def rm(*, why: str, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Give datasets up, so that the catalogue deletes every replica; on proof, by a listener.

    At least two other good copies must have been compared within a day: where they have not, that
    is asked for, and the command is to be given again.
    """
    state().log("warning")
    chosen = Chosen.of(options)

    async def remove(database: Database) -> list[dict[str, Any]]:
        runs = await chosen.runs(database)
        return [await _remove(database, chosen, run, why, dry_run) for run in runs]

    told(state().with_database(remove), as_json=as_json)


async def _remove(
    database: Database, chosen: Chosen, run: Run, why: str, dry_run: bool
) -> dict[str, Any]:
    from caxev.cli.replay import me
    from caxev.cli.runs import label
    from caxev.job import utcnow
    from caxev.model import DELETING, CopiesAtLeast, RunUpdate

    entry, now = chosen.entry(run), utcnow()
    row = {"run": label(run), "what": f"{chosen.kind} at {chosen.there.name}"}
    if entry is None:
        return {**row, "state": "the catalogue has no such copy", "ok": False}
    proof = CopiesAtLeast(
        OTHERS,
        entry.key,
        manifest=entry.manifest,
        checksum=entry.checksum,
        verified_since=now - PROOF,
    )
    if dry_run:
        enough = proof.holds(run)
        state = "would be given up" if enough else "other copies would be compared first"
        return {**row, "state": state, "ok": True}
    intent = RunUpdate.change_copy(
        run, entry, DELETING, proof, deleting={"by": me(), "why": why, "since": now}, owner=None
    )
    if await database.update_run(intent, now) is not None:
        return {**row, "state": "being given up", "ok": True}
    asked = await _ask_for_proof(database, run, entry.key)
    return {
        **row,
        "state": f"not enough good copies were compared today: asked {asked}",
        "ok": False,
    }


async def _ask_for_proof(database: Database, run: Run, gone: CopyKey) -> str:
    from caxev.model import TRANSFERRED

    asked = []
    for one in run.copies:
        same = (one.type, one.version) == (gone.type, gone.version) and one.host != gone.host
        if same and one.status == TRANSFERRED and await _ask_to_look(database, run, one):
            asked.append(one.host)
    return ", ".join(asked) or "nobody, there is none"


async def _ask_to_look(database: Database, run: Run, copy: Copy) -> bool:
    """Have a copy read or compared afresh; whether that could be written."""
    from caxev.job import utcnow
    from caxev.model import RunUpdate

    now = utcnow()
    update = RunUpdate.note(run, copy, check_asked=now)
    return await database.update_run(update, now) is not None


@rucio.command(epilog=example("caxev rucio purge --site lngs --to-run 1000 --dry-run"))
@selecting
@click.option("--site", required=True, metavar="S", help="The site whose copies go.")
@click.option("--dry-run", is_flag=True, help="Print what would go, and why not; write nothing.")
@as_json
@global_options(hidden=True)
def purge(*, site: str, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Have copies on disk deleted that the catalogue has, if enough others are good.

    As `caxev rm`, for many runs: the site's listener deletes on proof. A dataset whose replicas
    have not been compared is no reason to delete: that is asked for first.
    """
    state().log("warning")
    chosen, here = Chosen.of(options), state().sites().get(site)
    if not here.listener:
        raise ConfigError(f"{site} has no listener of its own, says sites.json: nobody deletes")

    async def ask(database: Database) -> list[dict[str, Any]]:
        runs = await chosen.runs(database)
        return [await _purge(database, chosen, here, run, dry_run=dry_run) for run in runs]

    told(state().with_database(ask), as_json=as_json)


async def _purge(
    database: Database, chosen: Chosen, here: Site, run: Run, *, dry_run: bool
) -> dict[str, Any]:
    from caxev.cli.replay import me
    from caxev.cli.runs import label
    from caxev.job import utcnow
    from caxev.model import TRANSFERRED, CopyKey
    from caxev.retention import Plan, intent, plan

    row = {"run": label(run), "what": f"{chosen.kind} at {here.name}"}
    entry = chosen.entry(run)
    if entry is None or entry.status != TRANSFERRED:
        how = "no such copy" if entry is None else f"it as {entry.status}"
        return {**row, "state": f"stays: the catalogue has {how}", "ok": True}
    copy = run.copy(CopyKey(chosen.kind, here.name, entry.version))
    if copy is None:
        return {**row, "state": "there is none", "ok": True}
    if entry.verified_at is None:
        asked = not dry_run and await _ask_to_look(database, run, entry)
        state_ = f"stays: its replicas were never compared{': asked' if asked else ''}"
        return {**row, "state": state_, "ok": False}
    keep = here.deletion.copies
    sites, why = state().sites(), "caxev rucio purge"
    wanted = plan(run, copy, here, sites, by=me(), why=why, keep=keep)
    if not isinstance(wanted, Plan):
        return {**row, "state": f"stays: {wanted.why}", "ok": True}
    if dry_run:
        return {**row, "state": "would go", "ok": True}
    now = utcnow()
    if await database.update_run(intent(run, wanted, sites, now), now) is None:
        return {**row, "state": "has changed meanwhile: ask again", "ok": False}
    return {**row, "state": "goes, once the others were read", "ok": True}
