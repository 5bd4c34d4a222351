"""Define the group of commands, and find the archive that a command is about."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import click
import trio
from attrs import frozen

from caxev.cli.command import together
from caxev.cli.interrupts import stop_if_interrupted
from caxev.cli.options import CommandGroup, example, options
from caxev.cli.values import SITE
from caxev.config import ConfigError, Site, Sites
from caxev.core.errors import GiveUp, NothingToDo, Retry
from caxev.tape.base import Reach, methods
from caxev.tape.steps import Outcome

if TYPE_CHECKING:
    from caxev.database import Database

T = TypeVar("T")


@click.group(
    cls=CommandGroup, epilog=example("caxev tape put --run 123", "caxev tape ls --since 30d")
)
def tape() -> None:
    """Make, restore, list and compare backups of raw data on tape."""


@frozen
class ArchiveChoice:
    """The names of an archive, and of the site that uses it; None: the only one."""

    tape_name: str | None = None
    here_name: str | None = None

    @property
    def there(self) -> Site:
        """The archive. Raises `ConfigError`."""
        return archive_called(options().sites(), self.tape_name)

    @property
    def reach(self) -> Reach:
        """The archive as the site reaches it. Raises `ConfigError`."""
        return reach_called(options().sites(), self.tape_name, self.here_name)


_archive = click.option(
    "--archive", "tape_name", type=SITE, help="The archive. [default: the only one]"
)
_site = click.option(
    "--site",
    "here_name",
    type=SITE,
    metavar="S",
    help="The site of this machine. [default: the only one]",
)
selects_archive = together("archive", ArchiveChoice, _archive)
"""Adds the option that selects an archive, as the argument `archive`."""
selects_reach = together("archive", ArchiveChoice, _archive, _site)
"""Adds the options that select an archive and the site that uses it, as `archive`."""


def archive_called(sites: Sites, name: str | None) -> Site:
    """Return the archive of that name, or the only one. Raises `ConfigError`."""
    # A site with an archive's method and a listener is a machine that uses one, not the archive.
    known = [site for site in sites.values() if site.method in methods() and not site.listener]
    if name is not None:
        if sites.get(name) not in known:
            raise ConfigError(f"{name} is not an archive, according to {sites.path}")
        return sites.get(name)
    if len(known) != 1:
        names = ", ".join(site.name for site in known) or "none"
        raise ConfigError(f"choose an archive by --archive (known: {names})")
    return known[0]


def reach_called(sites: Sites, tape_name: str | None, here_name: str | None) -> Reach:
    """Return the selected archive as the selected site reaches it."""
    there = archive_called(sites, tape_name)
    if here_name is not None:
        return Reach(sites.get(here_name), there)
    users = [
        site
        for site in sites.values()
        if there.name in (*site.upload_options, *site.download_options)
    ]
    if len(users) != 1:
        names = ", ".join(site.name for site in users) or "none"
        raise ConfigError(f"name this machine's site by --site ({there.name} is used by: {names})")
    return Reach(users[0], there)


async def as_noted(database: Database, reach: Reach) -> Reach:
    """Return an archive as the site reaches it, with the markers that the database has noted.

    They distinguish a directory whose disk is away from one that has lost its files.
    """
    from caxev.engine.root_markers import read_markers

    sites = await read_markers(database, options().sites(), reach.here)
    return Reach(sites.get(reach.here.name), sites.get(reach.there.name))


def asked(step: Callable[..., Outcome[T]], reach: Reach, *args: object) -> T:
    """Ask an archive, in a thread that Ctrl-C ends. Raises its `Retry` or `GiveUp`."""
    return step(reach, *args, report=stop_if_interrupted).get()


async def answer(step: Callable[..., Outcome[T]], reach: Reach, *args: object) -> T:
    """Return what an archive answers. Raises `NothingToDo` with its error."""
    try:
        return await trio.to_thread.run_sync(partial(asked, step, reach, *args))
    except (GiveUp, Retry) as error:
        raise NothingToDo(f"{reach.there.name}: {error}") from error
