"""Define the group of commands and its common options: runs, data, a catalogue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import click
from attrs import frozen

from caxev.asking.base import DataChoice, pages
from caxev.asking.listeners import leave
from caxev.cli.command import Function, together
from caxev.cli.options import CommandGroup, example, options
from caxev.cli.selection import COPY, DATA, RUNS, RunChoice, chosen_runs
from caxev.cli.values import SITE
from caxev.config import ConfigError, Site
from caxev.core.clock import utcnow
from caxev.core.model import Copy, Run
from caxev.core.update import RunUpdate

if TYPE_CHECKING:
    from caxev.asking.asker import Asker
    from caxev.database import Database


@click.group(
    cls=CommandGroup,
    epilog=example("caxev rucio put --run 123 --from lngs", "caxev rucio check --since 7d"),
)
def rucio() -> None:
    """Upload data to the Rucio catalogue, check it there, and fetch it."""


def catalogue_called(name: str | None) -> Site:
    """Return the catalogue of that name, or the only one. Raises `ConfigError`."""
    sites = options().sites()
    if name is not None:
        site = sites.get(name)
        if site.method != "rucio":
            raise ConfigError(f"site {name!r} is of method {site.method}, not rucio")
        return site
    used = {to for one in sites.values() for to in one.upload_options}
    found = [one for one in sites.values() if one.method == "rucio"]
    found = [one for one in found if one.name in used] or found
    if len(found) != 1:
        known = ", ".join(one.name for one in found) or "none"
        raise ConfigError(f"choose a catalogue by --catalogue (known to {sites.path}: {known})")
    return found[0]


@frozen
class CatalogueChoice:
    """The selection of a command line: runs, a type and version of data, and the catalogue."""

    choice: RunChoice
    data: DataChoice
    catalogue: str | None = None

    @classmethod
    def of(
        cls, *, required: bool, kind: str, version: str | None, catalogue: str | None, **given: Any
    ) -> Self:
        """Take the options of a command. Raises click's error."""
        runs = chosen_runs(required=required, **given).of_status(type=kind, version=version)
        return cls(runs, DataChoice(kind, version), catalogue)

    @property
    def there(self) -> Site:
        """The catalogue. Raises `ConfigError` if there are several and none was named."""
        return catalogue_called(self.catalogue)

    def entry(self, run: Run) -> Copy | None:
        """Return the run's entry at the catalogue."""
        return next(iter(self.entries(run)), None)

    def entries(self, run: Run) -> list[Copy]:
        """Return the run's entries at the catalogue: for derived data one for each version."""
        return self.data.entries(run, self.there.name)

    def means(self, dataset: str) -> bool:
        """Return whether a dataset of this name contains such data."""
        kind, _, version = dataset.partition("_pax_")
        return self.data.means(kind, version)


def selects_catalogue(
    *, required: bool = True, status: bool = False
) -> Callable[[Function], Function]:
    """Add the options that select runs, data and a catalogue, as the argument `chosen`.

    With `status` runs are selected by the status of such a copy, too.
    """
    catalogue = click.option("--catalogue", type=SITE, help="The catalogue's name in sites.json.")
    make = partial(CatalogueChoice.of, required=required)
    of_copies = (COPY["status"],) if status else ()
    return together("chosen", make, *RUNS, *of_copies, *DATA, catalogue)


async def checked(database: Database, entry: Copy) -> Any:
    """Read the manifest of an entry; None if it has none."""
    from caxev.rucio.files import Checked, stored_as

    if entry.manifest is None:
        return None
    rows = await database.load_manifest(stored_as(entry.manifest))
    return None if rows is None else tuple(map(Checked.from_row, rows))


async def apply_rules(asker: Asker, chosen: CatalogueChoice, runs: Sequence[Run]) -> list[str]:
    """Have the uploading sites apply the rules of these runs again; return these sites."""
    from caxev.database import Request

    # Reset the digest, because the handler skips rules that have not changed since.
    for run in runs:
        for entry in chosen.entries(run):
            await asker.database.update_run(RunUpdate.note(run, entry, rules=None), utcnow())
    there = chosen.there.name
    sites = [one for one in options().sites().values() if there in one.upload_options]
    asked = [one.name for one in sites if one.listener]
    requests = [
        Request("replay", page, handler="rucio_rules", force=True, site=name)
        for name in asked
        for page in pages([run.id for run in runs])
    ]
    await leave(asker, requests)
    return asked
