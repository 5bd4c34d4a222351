"""Run ``caxev verify``: compare copies with their entries in the database.

The command reads the files of this machine's site. A copy at another site is read by that site's
listener: the request goes to ``check_asked`` of the entry, and the answer to ``check_answered`` and
``verified_at``, or the status becomes ``error``. If files here are bad or gone, this command asks
this site's own listener as well: only its result counts.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import click
import trio
from attrs import define, field

from caxev.cli.completion import DATA_TYPE, SITE
from caxev.cli.errors import FAILED
from caxev.cli.options import RUN_NUMBER, as_table, example, global_options, state
from caxev.cli.output import Column, show_rows
from caxev.core.errors import GiveUp, Retry, RootAway

if TYPE_CHECKING:
    from caxev.config import Site, Sites
    from caxev.core.model import Copy, Run
    from caxev.database import Database, Selection
    from caxev.files import Manifest

BAD: Final = frozenset({"bad", "gone"})
_NAMED: Final = 3
"""How many differences a row names."""


@click.command(
    epilog=example(
        "caxev verify --run 123",
        "caxev verify --run 123 --run 124 --deep",
        "caxev verify --site lngs --type raw",
    )
)
@click.option(
    "--run", "numbers", type=RUN_NUMBER, multiple=True, metavar="N", help="Runs of these numbers."
)
@click.option("--name", metavar="X", help="The run of this name.")
@click.option("--detector", metavar="D", help="Only runs of this detector.")
@click.option("--site", type=SITE, help="Only copies at this site.")
@click.option("--type", "kind", type=DATA_TYPE, help="Only copies of this type of data.")
@click.option("--deep", is_flag=True, help="Read the files and compare their digests.")
@as_table
@global_options(hidden=True)
def verify(
    *,
    numbers: tuple[int, ...],
    name: str | None,
    detector: str | None,
    site: str | None,
    kind: str | None,
    deep: bool,
    as_json: bool,
) -> None:
    """Check that the files of good copies are there, each of its size.

    Only copies of sites on this machine are checked. With --deep their files are read and
    compared by digest, and the listeners of other sites are asked to read theirs; they answer
    in the entry (caxev status --run N). If a copy here is bad or missing, --deep also asks this
    site's listener: when it confirms that, the copy no longer counts. Exit code 1 if a copy is
    bad or missing.
    """
    from caxev.engine.root_markers import read_markers

    if not numbers and name is None and site is None:
        raise click.UsageError("say which copies: --run, --name or --site")
    options = state()
    options.log("warning")
    sites = options.sites()
    if site is not None:
        sites.get(site)

    async def find(database: Database) -> bool:
        known = await read_markers(database, sites)
        look = Look(known, site, kind, deep, detector)
        rows = look.rows(database, numbers, name)
        await show_rows(_COLUMNS, rows, as_json=as_json, empty="there are no such copies")
        return look.all_well

    if not options.with_database(find):
        raise click.exceptions.Exit(FAILED)


_COLUMNS = (
    Column("run", "RUN"),
    Column("type", "TYPE"),
    Column("version", "VERSION"),
    Column("host", "HOST"),
    Column("found", "FOUND"),
    Column("why", "WHY"),
    Column("location", "LOCATION", minor=1),
)


@define
class Look:
    """The selection of copies to compare, and how. `all_well`: none was bad or gone so far."""

    sites: Sites
    site: str | None
    kind: str | None
    deep: bool
    detector: str | None = None
    all_well: bool = field(init=False, default=True)

    async def rows(
        self, database: Database, numbers: Sequence[int], name: str | None
    ) -> AsyncIterator[Mapping[str, Any]]:
        """Return a row for each copy. Raises `NoSuchRun` if a named run does not exist."""
        async for run in self._runs(database, numbers, name):
            for copy in filter(self._means, run.copies):
                found, why = await self._verdict(database, run, copy)
                self.all_well = self.all_well and found not in BAD
                yield _row(run, copy, found, why)

    async def _runs(
        self, database: Database, numbers: Sequence[int], name: str | None
    ) -> AsyncIterator[Run]:
        from caxev.cli.runs import one
        from caxev.core.clock import utcnow
        from caxev.core.model import TRANSFERRED
        from caxev.database import Selection

        if numbers or name is not None:
            for number in numbers or (None,):
                for run in await one(number, name, self.detector).find(database, database.settings):
                    yield run
            return
        wanted: Selection = Selection(
            host=self.site, type=self.kind, status=TRANSFERRED, detector=self.detector
        )
        async for page in database.pages(wanted, utcnow()):
            for run in page:
                yield run

    def _means(self, copy: Copy) -> bool:
        from caxev.core.model import TRANSFERRED

        return (
            copy.status == TRANSFERRED
            and self.site in (None, copy.host)
            and self.kind in (None, copy.type)
        )

    async def _verdict(self, database: Database, run: Run, copy: Copy) -> tuple[str, str | None]:
        from caxev.cli.site_paths import is_here
        from caxev.files import Manifest

        site = self.sites.find(copy.host)
        if site is None:
            return "not checked", "sites.json has no such site"
        if copy.location is None:
            return "not checked", "it has no location"
        if is_here(site):
            rows = None if copy.manifest is None else await database.load_manifest(copy.manifest)
            known = None if rows is None else Manifest.from_rows(rows)
            found, why = await trio.to_thread.run_sync(looked, copy, site, known, self.deep)
            # Only the listener changes the status, under its lease, and by its own reading.
            if self.deep and found in BAD:
                await _asked(database, run, copy)
            return found, why
        if not self.deep:
            return "not checked", f"{copy.host} is not this machine: --deep asks it"
        return await _asked(database, run, copy)


def _row(run: Run, copy: Copy, found: str, why: str | None) -> Mapping[str, Any]:
    from caxev.cli.runs import shown

    return {
        "run": shown(run),
        "type": copy.type,
        "version": copy.version,
        "host": copy.host,
        "found": found,
        "why": why,
        "location": copy.location,
    }


async def _asked(database: Database, run: Run, copy: Copy) -> tuple[str, str | None]:
    """Request that the copy's site, or the one responsible for it, reads it again."""
    from caxev.core.clock import utcnow
    from caxev.core.model import new_id
    from caxev.core.update import RunUpdate

    now = utcnow()
    if await database.update_run(RunUpdate.ask(run, copy, new_id(), now), now) is None:
        return "not checked", "it has just changed"
    return "asked", f"{copy.host} is to read it: see caxev status"


def looked(copy: Copy, site: Site, known: Manifest | None, deep: bool) -> tuple[str, str | None]:
    """Compare a copy on this machine with its manifest; return the result and the reason.

    Raises `RootAway`.
    """
    from caxev.files import confine, digest_tree, scan, steady

    assert copy.location is not None
    try:
        with steady():
            path = confine(copy.location, site.roots)
            if not os.path.lexists(path):
                return "gone", "nothing is there"
            if not deep:
                return _compared(known and known.shape(), scan(path))
            sha512 = known is None  # without a manifest there is only cax's checksum, a SHA-512
            found = digest_tree(path, sha512=sha512, report=lambda _done, _total: None)
    except RootAway:
        raise  # it concerns every copy on that disk, not only this one
    except GiveUp as error:
        return "bad", error.why
    except Retry as error:
        return "not checked", error.why
    if known is not None:
        return _compared(known, found)
    if copy.checksum is None:
        return "not compared", "the database has no digest of it yet"
    same = found.cax_checksum() == copy.checksum
    return ("good", None) if same else ("bad", "its checksum differs")


def _compared(known: Manifest | None, found: Manifest) -> tuple[str, str | None]:
    if known is None:
        return "there", "the database has no manifest to compare it with"
    differ = known.differences(found)
    if not differ:
        return "good", None
    more = ", ..." if len(differ) > _NAMED else ""
    return "bad", f"{len(differ)} files: {', '.join(map(str, differ[:_NAMED]))}{more}"
