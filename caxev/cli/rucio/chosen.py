"""Define the group of commands and its common options: runs, data, a catalogue."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from attrs import define

from caxev.cli.completion import SITE
from caxev.cli.errors import FAILED
from caxev.cli.options import example, state
from caxev.cli.output import Column, Table, show
from caxev.cli.selection import many_runs, of_data
from caxev.config import ConfigError

if TYPE_CHECKING:
    from caxev.cli.runs import Wanted
    from caxev.config import Site
    from caxev.core.model import Copy, Run
    from caxev.database import Database

F = TypeVar("F", bound=Callable[..., Any])


@click.group(
    epilog=example("caxev rucio put --run 123 --from lngs", "caxev rucio check --last-days 7")
)
def rucio() -> None:
    """Upload data to the Rucio catalogue, check it there, and fetch it."""


def selecting(function: F) -> F:
    """Add the options that select runs and data."""
    catalogue = click.option("--catalogue", type=SITE, help="The catalogue's name in sites.json.")
    return many_runs(of_data(catalogue(function)))


def catalogue_called(name: str | None) -> Site:
    """Return the catalogue of that name, or the only one. Raises `ConfigError`."""
    sites = state().sites()
    if name is not None:
        site = sites.get(name)
        if site.method != "rucio":
            raise ConfigError(f"site {name!r} is of method {site.method}, not rucio")
        return site
    brought = {to for one in sites.values() for to in one.upload_options}
    found = [one for one in sites.values() if one.method == "rucio"]
    found = [one for one in found if one.name in brought] or found
    if len(found) != 1:
        known = ", ".join(one.name for one in found) or "none"
        raise ConfigError(
            f"{sites.path} has {len(found)} catalogues ({known}): say which, or add one"
        )
    return found[0]


@define
class Chosen:
    """The selection of a command line: runs, a type and version of data, and the catalogue."""

    wanted: Wanted
    kind: str
    version: str | None
    there: Site

    @classmethod
    def of(cls, options: dict[str, Any]) -> Chosen:
        """Take the options of `selecting` out of a command's."""
        from caxev.cli.replay import _wanted

        between = (options.pop("from_run"), options.pop("to_run"))
        wanted = _wanted(
            options.pop("number"),
            options.pop("name"),
            between=between,
            last_days=options.pop("last_days"),
            tag=options.pop("tag"),
            detector=options.pop("detector"),
        )
        there = catalogue_called(options.pop("catalogue"))
        return cls(wanted, options.pop("kind"), options.pop("version"), there)

    def entry(self, run: Run) -> Copy | None:
        """Return the run's entry at the catalogue."""
        return next(iter(self.entries(run)), None)

    def entries(self, run: Run) -> list[Copy]:
        """Return the run's entries at the catalogue: for derived data one for each version."""
        # Of double entries, which old programs left, the first one counts: reversed, so that it is
        # the last to be put into the dict.
        same = [one for one in run.copies if one.host == self.there.name and one.type == self.kind]
        found = {one.key: one for one in reversed(same) if self.version in (None, one.version)}
        return [*reversed(found.values())]

    def means(self, dataset: str) -> bool:
        """Return whether a dataset of this name contains such data."""
        kind, _, version = dataset.partition("_pax_")
        return kind == self.kind and self.version in (None, version)

    async def runs(self, database: Database) -> list[Run]:
        """Read the runs with all their fields."""
        found = await self.wanted.find(database, database.settings)
        whole = await database.runs([run.id for run in found])
        return [whole[run.id] for run in found if run.id in whole]  # one may be deleted in between


_COLUMNS: Final = (Column("run", "RUN"), Column("what", "WHAT"), Column("state", "STATE"))


def show_rows(rows: Sequence[Mapping[str, Any]], *, as_json: bool) -> None:
    """Print the rows; exit with a failure if one of them is not ok."""
    show(Table(_COLUMNS, rows), as_json=as_json, empty="nothing to do")
    if any(row["ok"] is False for row in rows):
        raise click.exceptions.Exit(FAILED)


def nobody(_done: int, _total: int) -> None:
    """Ignore a report."""


async def checked(database: Database, entry: Copy) -> Any:
    """Read the manifest of an entry; None if it has none."""
    from caxev import rucio

    if entry.manifest is None:
        return None
    rows = await database.load_manifest(rucio.stored_as(entry.manifest))
    return None if rows is None else tuple(map(rucio.Checked.from_row, rows))


async def ask_to_compare(database: Database, run: Run, entry: Copy) -> bool:
    """Request that its site compares an entry's replicas; return whether that was written."""
    from caxev.core.clock import utcnow
    from caxev.core.model import new_id
    from caxev.core.update import RunUpdate

    now = utcnow()
    return await database.update_run(RunUpdate.ask(run, entry, new_id(), now), now) is not None


async def look_again(database: Database, chosen: Chosen, runs: Sequence[Run]) -> list[str]:
    """Have the uploading sites apply the rules of these runs again; return these sites."""
    from caxev.cli.replay import leave, pages
    from caxev.core.clock import utcnow
    from caxev.core.update import RunUpdate
    from caxev.database import Request

    # Reset the digest by which the handler skips rules that have not changed since.
    for run in runs:
        for entry in chosen.entries(run):
            await database.update_run(RunUpdate.note(run, entry, rules=None), utcnow())
    sites = [one for one in state().sites().values() if chosen.there.name in one.upload_options]
    asked = [one.name for one in sites if one.listener]
    requests = [
        Request("replay", page, handler="rucio_rules", force=True)
        for page in pages([run.id for run in runs])
    ]
    for name in asked:
        await leave(database, name, requests)
    return asked
