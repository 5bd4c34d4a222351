"""Run ``caxev rucio put`` and ``get``: request copies, or fetch files to a directory here."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from attrs import evolve, frozen

from caxev.asking.base import Step
from caxev.asking.catalogues import CopyCatalogued
from caxev.cli.command import command
from caxev.cli.interrupts import stop_if_interrupted
from caxev.cli.options import options
from caxev.cli.plans import Ask, acts, show_steps
from caxev.cli.rucio.chosen import CatalogueChoice, checked, rucio, selects_catalogue
from caxev.cli.values import PLACE, SITE
from caxev.copies.lifecycle import manifest_of
from caxev.core.clock import utcnow
from caxev.core.errors import Ambiguous, GiveUp, Retry
from caxev.core.model import Copy, Run
from caxev.files import confine, digest_tree

if TYPE_CHECKING:
    from caxev.database import Database


@command("caxev rucio put --run 100-200 --from lngs", group=rucio)
@selects_catalogue(status=True)
@click.option("--from", "source", type=SITE, required=True, help="The site that has the data.")
@acts("Show what would be requested; write nothing.")
def put(*, chosen: CatalogueChoice, source: str, ask: Ask) -> None:
    """Upload runs to the catalogue.

    The listener of the site that has them does it. Uploads that were given up, or that wait as
    RSEreupload or RSEquota, are tried again at once.
    """
    act = CopyCatalogued(chosen.data, source, chosen.there.name)
    ask(chosen.choice, act)


@command("caxev rucio get --run 123 --to chicago --rse NIKHEF_USERDISK", group=rucio)
@selects_catalogue(status=True)
@click.option(
    "--to",
    "target",
    type=PLACE,
    required=True,
    metavar="S|DIR",
    help="A site, or a directory here.",
)
@click.option("--rse", metavar="R", help="Only from this RSE.")
@acts("Show what would be fetched; write nothing.")
def get(*, chosen: CatalogueChoice, target: str, rse: str | None, ask: Ask) -> None:
    """Fetch runs from the catalogue, to a site or to a directory here.

    To a site: its listener fetches, registers and verifies the copy. To a directory: this
    command fetches the files, compares them with the checksums of the catalogue and the
    database, and registers nothing.
    """
    if target in options().sites():
        extra = {} if rse is None else {"from_rse": rse}
        act = CopyCatalogued(chosen.data, chosen.there.name, target, extra)
        ask(chosen.choice, act)
        return
    # A bare word is more likely a mistyped site than a directory: ./NAME is always a directory.
    if "/" not in target:
        options().sites().get(target)  # raises an error that names the nearest site
    fetching = DirectoryFetch(chosen, str(Path(target).absolute()), rse, ask.dry_run)
    show_steps(fetching.steps)


@frozen
class DirectoryFetch:
    """Runs to be fetched into a directory of this machine."""

    chosen: CatalogueChoice
    directory: str
    rse: str | None
    dry_run: bool

    async def steps(self, database: Database) -> AsyncGenerator[Step, None]:
        """Fetch the selected runs; return what came of each. Raises `NoSuchRun`."""
        async with aclosing(self.chosen.choice.whole(database)) as runs:
            async for run in runs:
                yield await self._fetch(database, run)

    async def _fetch(self, database: Database, run: Run) -> Step:
        import trio

        what = f"{self.chosen.data.kind} to {self.directory}"
        try:
            entry = self.chosen.data.copy(run, self.chosen.there.name)
        except Ambiguous as several:
            return Step(run, what, str(several))
        if entry is None or entry.location is None:
            return Step(run, what, "the catalogue has no such copy")
        if self.dry_run:
            return Step(run, what, f"would be fetched from {entry.location}", ok=True)
        order = await self._order(database, run, entry)
        try:
            await trio.to_thread.run_sync(_fetch_here, order, entry.manifest)
        except (GiveUp, Retry) as error:
            return Step(run, what, error.why)
        return Step(run, what, "fetched and compared", ok=True)

    async def _order(self, database: Database, run: Run, entry: Copy) -> Any:

        from caxev.rucio.names import Did, taken_at
        from caxev.rucio.orders import Download

        return Download(
            # A site that sites.json does not have, with the target as its only directory.
            here=evolve(self.chosen.there, name="here", dir_raw=self.directory),
            there=self.chosen.there,
            dataset=Did.of(entry.location),
            location=f"{self.directory}/{entry.source_name or run.name + run.suffix}",
            taken=taken_at(run) or utcnow(),
            files=await checked(database, entry),
            expected=await manifest_of(database, entry.manifest),
            rse=self.rse,
            single=entry.type not in self.chosen.there.types.primary,
        )


def _fetch_here(order: Any, manifest: str | None) -> None:
    """Fetch a copy and compare it with its manifest, if there is one."""
    from caxev.rucio import client

    # Rucio compares its own checksums (ADLER32 or MD5) only; the manifest is that of the original.
    client.download(order, report=stop_if_interrupted)
    if manifest is not None:
        path = confine(order.location, order.here.roots)
        found = digest_tree(path, sha512=False, report=stop_if_interrupted).digest
        if found != manifest:
            raise GiveUp(f"{order.location} has the digest {found}, and should have {manifest}")
