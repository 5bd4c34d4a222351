"""Run ``caxev rucio put`` and ``get``: request copies, or fetch files to a directory here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from attrs import define, field

from caxev.cli.completion import SITE
from caxev.cli.options import as_table, example, global_options, state
from caxev.cli.rucio.chosen import Chosen, checked, nobody, rucio, selecting, show_rows

if TYPE_CHECKING:
    from caxev.core.model import Run
    from caxev.core.update import RunUpdate
    from caxev.database import Database


@rucio.command(epilog=example("caxev rucio put --from-run 100 --to-run 200 --from lngs"))
@selecting
@click.option("--from", "source", type=SITE, required=True, help="The site that has the data.")
@click.option("--dry-run", is_flag=True, help="Show what would be requested; write nothing.")
@as_table
@global_options(hidden=True)
def put(*, source: str, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Upload runs to the catalogue.

    The listener of the site that has them does it. Uploads that were given up, or that wait as
    RSEreupload or RSEquota, are tried again at once.
    """
    state().log("warning")
    chosen, site = Chosen.of(options), state().sites().get(source)
    _request(Wish(chosen, site.name, chosen.there.name), dry_run=dry_run, as_json=as_json)


@rucio.command(epilog=example("caxev rucio get --run 123 --to chicago --rse NIKHEF_USERDISK"))
@selecting
@click.option(
    "--to", "target", type=SITE, required=True, metavar="S|DIR", help="A site, or a directory here."
)
@click.option("--rse", metavar="R", help="Only from this RSE.")
@click.option("--dry-run", is_flag=True, help="Show what would be fetched; write nothing.")
@as_table
@global_options(hidden=True)
def get(*, target: str, rse: str | None, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Fetch runs from the catalogue, to a site or to a directory here.

    To a site: its listener fetches, registers and verifies the copy. To a directory: this
    command fetches the files, compares them with the checksums of the catalogue and the
    database, and registers nothing.
    """
    state().log("warning")
    chosen = Chosen.of(options)
    if target in state().sites():
        extra = {} if rse is None else {"from_rse": rse}
        wish = Wish(chosen, chosen.there.name, target, extra)
        _request(wish, dry_run=dry_run, as_json=as_json)
        return
    # A bare word is more likely a mistyped site than a directory: ./NAME is always a directory.
    if "/" not in target:
        state().sites().get(target)  # raises an error that names the nearest site
    directory = str(Path(target).absolute())
    rows = state().with_database(
        lambda database: _fetch_all(database, chosen, directory, rse, dry_run=dry_run)
    )
    show_rows(rows, as_json=as_json)


@define
class Wish:
    """Requested copies: their source and target hosts; `extra` goes into their entries."""

    chosen: Chosen
    source: str
    target: str
    extra: Mapping[str, Any] = field(factory=dict)

    def request(self, run: Run) -> RunUpdate | str:
        """Return the request for one run's copy, or why there can be none."""
        from caxev.cli.replay import me
        from caxev.core.clock import utcnow
        from caxev.core.model import REQUESTED, TRANSFERRED, CopyKey
        from caxev.core.update import RunUpdate

        kind, version = self.chosen.kind, self.chosen.version
        good = [one for one in run.copies if (one.type, one.host) == (kind, self.source)]
        good = [one for one in good if version in (None, one.version)]
        if not good or good[0].status != TRANSFERRED:
            return f"{self.source} has {f'it as {good[0].status}' if good else 'no such copy'}"
        key = CopyKey(kind, self.target, good[0].version)
        there = run.copy(key)
        # Only an upload is repeated here. A failed copy at a site is repaired by its own listener.
        if there is not None and there.status in AGAIN and self.target == self.chosen.there.name:
            anew = {"source": self.source, "trigger": None, "owner": None, "error": None}
            return RunUpdate.change_copy(run, there, REQUESTED, checksumproblem=None, **anew)
        if there is not None:
            return f"it is there already: {there.status}"
        return RunUpdate.add_copy(
            run,
            key,
            REQUESTED,
            good[0].as_seen,
            location=None,
            checksum=None,
            source=self.source,
            creation_time=utcnow(),
            creation_place=me(),
            **self.extra,
        )


AGAIN: Final = ("RSEreupload", "RSEquota", "error")
"""States of an entry whose upload can be tried again."""


def _request(wish: Wish, *, dry_run: bool, as_json: bool) -> None:
    async def ask(database: Database) -> list[dict[str, Any]]:
        runs = await wish.chosen.runs(database)
        return [await _ask(database, wish, run, dry_run=dry_run) for run in runs]

    show_rows(state().with_database(ask), as_json=as_json)


async def _ask(database: Database, wish: Wish, run: Run, *, dry_run: bool) -> dict[str, Any]:
    from caxev.cli.runs import shown
    from caxev.core.clock import utcnow

    row = {"run": shown(run), "what": f"{wish.chosen.kind} from {wish.source} to {wish.target}"}
    update = wish.request(run)
    if isinstance(update, str):
        return {**row, "state": update, "ok": "there already" in update}
    if dry_run:
        return {**row, "state": "would be asked for", "ok": True}
    done = await database.update_run(update, utcnow())
    state = "requested" if done is not None else "has changed meanwhile: ask again"
    return {**row, "state": state, "ok": done is not None}


async def _fetch_all(
    database: Database, chosen: Chosen, directory: str, rse: str | None, *, dry_run: bool
) -> list[dict[str, Any]]:
    import trio
    from attrs import evolve

    from caxev import rucio
    from caxev.cli.runs import shown
    from caxev.core.clock import utcnow
    from caxev.core.errors import GiveUp, Retry
    from caxev.files import Manifest

    # A site that sites.json does not have, with the target as its only directory.
    here = evolve(chosen.there, name="here", dir_raw=directory)
    rows = []
    for run in await chosen.runs(database):
        row = {"run": shown(run), "what": f"{chosen.kind} to {directory}"}
        entry = chosen.entry(run)
        if entry is None or entry.location is None:
            rows.append({**row, "state": "the catalogue has no such copy", "ok": False})
            continue
        if dry_run:
            rows.append({**row, "state": f"would be fetched from {entry.location}", "ok": True})
            continue
        known = await database.load_manifest(entry.manifest) if entry.manifest else None
        order = rucio.Download(
            here=here,
            there=chosen.there,
            dataset=rucio.Did.of(entry.location),
            location=f"{directory}/{entry.source_name or run.name + run.suffix}",
            taken=rucio.taken_at(run) or utcnow(),
            files=await checked(database, entry),
            expected=None if known is None else Manifest.from_rows(known),
            rse=rse,
            single=entry.type != "raw",
        )
        try:
            await trio.to_thread.run_sync(_fetch_here, order, entry.manifest)
        except (GiveUp, Retry) as error:
            rows.append({**row, "state": error.why, "ok": False})
        else:
            rows.append({**row, "state": "fetched, compared", "ok": True})
    return rows


def _fetch_here(order: Any, manifest: str | None) -> None:
    """Fetch a copy and compare it with its manifest, if there is one."""
    from caxev import rucio
    from caxev.core.errors import GiveUp
    from caxev.files import digest_tree

    # Rucio compares its own checksums (ADLER32 or MD5) only; the manifest is that of the original.
    rucio.download(order, report=nobody)
    if manifest is not None:
        found = digest_tree(order.location, sha512=False, report=nobody).digest
        if found != manifest:
            raise GiveUp(f"{order.location} is {found}, and should be {manifest}")
