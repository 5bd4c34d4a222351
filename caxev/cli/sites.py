"""Run ``caxev sites``: check sites.json, the directories and the connections between sites."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from caxev.cli.command import command, needs
from caxev.cli.errors import CONFIGURATION
from caxev.cli.options import CommandGroup, GlobalOptions, as_text, example, options
from caxev.cli.output import Column, columns, print_line, show, show_json
from caxev.cli.values import PLACE, SITE
from caxev.config import (
    ConfigError,
    Site,
    Sites,
    find_sites,
    private_directories,
)
from caxev.config.merging import merge as merged
from caxev.copies.storage import sites_sharing_storage
from caxev.core.errors import GiveUp, Retry, RootAway
from caxev.core.processes import Process, differing
from caxev.files import is_bare, not_private
from caxev.files.private import lies_in
from caxev.files.roots import find_markers

if TYPE_CHECKING:
    from caxev.database import Database


@click.group(cls=CommandGroup, epilog=example("caxev sites check --site lngs --connect"))
def sites() -> None:
    """Check sites.json and the connections between sites; merge several files."""


@command("caxev sites check", "caxev sites check --site lngs --connect", group=sites)
@needs("--connect", "--site")
@click.option("--site", type=PLACE, help="The site of this machine, whose directories are checked.")
@click.option("--connect", is_flag=True, help="Reach the other sites from --site.")
def check(*, site: str | None, connect: bool) -> None:
    """Report everything that is wrong with sites.json, or list its sites.

    With --site, the site's directories are checked on this machine. With --connect, the other
    sites are reached from here, too.
    """
    known = _read(options())
    rows = [_site_row(one) for one in known.values()]
    shared: Iterable[str] = ()
    columns: tuple[Column, ...] = _SITES
    if site is not None:
        here = known.get(site)
        rows = [_checked(row, known, here, connect=connect) for row in rows]
        shared = _shared_directories(here, known)
        columns += (Column("state", "STATE"),)
    for warning in (*known.warnings, *_unknown_tasks(options(), known), *shared):
        print_line(f"warning: {warning}", err=True)
    show(columns, rows, failed=any(row.get("ok") is False for row in rows))


@command("caxev sites merge cax.json cax_tsm.json > sites.json", group=sites, output=as_text)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("--first", is_flag=True, help="If files disagree, use the first one.")
def merge(*, files: tuple[str, ...], first: bool) -> None:
    """Print one sites.json made of several: cax has one for each program.

    If the files disagree, only that is printed, unless --first decides.
    """
    entries, conflicts = merged(files)
    for conflict in conflicts:
        click.echo(f"caxev: {conflict}{'; the first file is used' if first else ''}", err=True)
    if conflicts and not first:
        click.echo("caxev: make the files agree, or use the first one by --first", err=True)
        raise click.exceptions.Exit(CONFIGURATION)
    show_json(entries)


@command("caxev sites diff", "caxev sites diff --json", group=sites)
def diff() -> None:
    """Compare sites.json with those of all listeners, key by key.

    A row for each process that listens or stands by: its version, the digests of its sites.json
    and of its handlers, and the keys whose values differ from this sites.json. Exit status 1 if
    any does.
    """
    given = options()
    rows = given.with_database(process_rows, given.sites())
    differ = any(row["differs"] for row in rows)
    show(_PROCESSES, rows, empty="no listener is running", failed=differ)


_PROCESSES = (
    Column("site", "SITE"),
    Column("role", "ROLE"),
    Column("owner", "PROCESS", minor=1),
    Column("version", "VERSION"),
    Column("configuration", "SITES.JSON"),
    Column("handlers", "HANDLERS", minor=2),
    Column("differs", "DIFFERS"),
)


async def process_rows(database: Database, mine: Sites) -> list[dict[str, Any]]:
    """Return a row for each process of a site, compared with a sites.json."""
    records = {record.site: record for record in await database.site_records()}

    def row(one: Process) -> dict[str, Any]:
        record = records.get(one.site)
        leader = record.owner if record is not None and record.active else None
        same = one.configuration == mine.digest
        return {
            "site": one.site,
            "role": one.role(leader),
            "owner": one.owner,
            "version": one.version,
            "configuration": one.configuration,
            "handlers": one.handlers,
            "differs": [] if same else differing(mine.keys, one.keys) or ["the order of sites"],
        }

    return [row(one) for one in await database.processes()]


def _unknown_tasks(given: GlobalOptions, known: Sites) -> Iterable[str]:
    """Return the names in the sites' task_lists that are unknown."""
    for site in known.values():
        if site.task_list:
            try:
                # With that site's own handlers: a task is known if its own site knows it.
                handlers = given.registry(site.name).handlers.values()
            except ConfigError as error:  # a module that only that site has
                yield f"site {site.name!r}: task_list is not checked here: {error.summary}"
            else:
                yield from site.unknown_tasks(handlers)


@command("caxev sites init --site lngs", group=sites)
@click.option("--site", type=SITE, required=True, help="The site of this machine.")
@click.option(
    "--force", is_flag=True, help="Mark even if the known marker, or copies, are missing."
)
def init(*, site: str, force: bool) -> None:
    """Mark a site's directories, so that unmounted disks are noticed.

    An unmounted disk would look like an empty one. Each directory gets a small file whose id
    the database keeps. Run it on the site's own machine. It can be repeated. If the database knows
    copies in a directory, the newest must be there. A listener marks by itself only directories of
    which the database knows no copies.
    """
    from caxev.engine.root_markers import init_roots

    known = options().sites()
    rows = options().with_database(init_roots, known.get(site), known, force=force)
    failed = not all(row["ok"] for row in rows)
    show(_ROOTS, rows, empty=f"{site} has no directories", failed=failed)


_ROOTS = columns("directory", "marker", "state")


def _read(given: GlobalOptions) -> Sites:
    """Read the sites; if the file has several problems, report all of them."""
    try:
        return given.sites()
    except ConfigError as error:
        if len(error.problems) == 1:
            raise
        file = find_sites(given.config).absolute()
        for problem in error.problems:
            print_line(f"caxev: {file}: {problem}", err=True)
        raise click.exceptions.Exit(CONFIGURATION) from None


_SITES = columns("site", "method", "address", "listener", "directories")


def _site_row(site: Site) -> dict[str, Any]:
    user = f"{site.username}@" if site.username else ""
    port = f":{site.port}" if site.port != 22 else ""  # noqa: PLR2004  # SSH's own
    return {
        "site": site.name,
        "method": site.method,
        "address": f"{user}{site.hostname}{port}" if site.hostname else None,
        "listener": site.listener,
        "directories": list(site.roots),
    }


def _checked(row: dict[str, Any], known: Sites, here: Site, *, connect: bool) -> dict[str, Any]:
    there = known.get(row["site"])
    # Our own directories only: a path of another site may exist here too, and mean another disk.
    if there is here:
        wrong = "; ".join(
            (
                *_directory_problems(here),
                *private_problems(here, known),
                *catalogue_problems(here, known),
            )
        )
        return {**row, "ok": not wrong, "state": wrong or "ok: this site"}
    if not connect:
        return {**row, "ok": None, "state": None}
    return {**row, **_connected(here, there)}


def private_problems(here: Site, known: Sites, *, bare: bool = True) -> Iterable[str]:
    """Report directories to which others may write though only this site's listener should.

    Without `bare`, mount points without their disks are left out, because those problems pass.
    """
    # Data directories are written by other sites' accounts, and also by programs of the experiment:
    # state, keys and handlers below one would be under their control.
    names = sites_sharing_storage(here, known)
    shared = [path for one in known.values() if one.name in names for path in one.roots]
    for key, path in private_directories(here, known):
        if (root := lies_in(path, shared)) is not None:
            yield (
                f"{key}: {path} lies in {root}, where other sites may write:"
                " choose a directory outside of it"
            )
        elif (bare or not is_bare(path)) and (why := not_private(path)) is not None:
            yield f"{key}: {why}"


def _directory_problems(site: Site) -> Iterable[str]:
    named = dict.fromkeys(filter(None, (getattr(site, key) for key in site.types.directories)))
    for root in named:
        if not os.path.isdir(root):  # noqa: PTH112  # kept as the text that sites.json has
            yield f"{root} is not a directory here"
        elif not os.access(root, os.R_OK | os.W_OK | os.X_OK):
            yield f"{root} is not readable and writable for this user"


def _shared_directories(here: Site, known: Sites) -> Iterable[str]:
    """Report directories with the marker of a site that sites.json has on another machine."""
    from caxev.engine.root_markers import foreign_markers

    for root in here.roots:
        with suppress(RootAway):  # reported as a problem of the directory already
            for marker in foreign_markers(find_markers(root), here, known):
                yield (
                    f"site {here.name!r}: {root} has the marker of {marker.key} of {marker.site}: "
                    "if both use this directory, run caxev sites init --force, and copies of both "
                    "in it count as one; if it is a clone, remove the marker"
                )


def catalogue_problems(here: Site, known: Sites) -> Iterable[str]:
    """Report what keeps a site from the catalogues that it uploads to or fetches from."""
    from caxev.rucio.connection import missing
    from caxev.rucio.rules import load_rules

    catalogues = [site for site in known.values() if site.method == "rucio"]
    names = [*here.upload_options, *here.download_options]
    needed = here.rucio_tags or any(known.find(name) in catalogues for name in names)
    if needed and (why := missing()) is not None:
        yield f"{here.name} needs a catalogue, but {why}"
    for there in catalogues:
        # Only a site that uploads to the catalogue applies its rules.
        if there.rucio.rules is not None and there.name in here.upload_options:
            try:
                load_rules(there.rucio.rules)
            except ConfigError as error:
                yield from error.problems


def _connected(here: Site, there: Site) -> dict[str, Any]:
    from caxev import transfer
    from caxev.rucio.client import check as check_catalogue
    from caxev.tape.base import Reach
    from caxev.tape.base import methods as archives
    from caxev.tape.steps import check as check_tape

    if there.method not in {*transfer.methods(), *archives(), "rucio"}:
        return {"ok": None, "state": f"reached by {there.method}, which this command cannot check"}
    # An unreachable site is one row's result: the other sites are still tried.
    try:
        if there.method in archives():
            answer = check_tape(Reach(here, there)).get()
        elif there.method == "rucio":
            answer = check_catalogue(there)
        else:
            answer = transfer.check(here, there)
    except (GiveUp, Retry) as error:
        return {"ok": False, "state": error.why}
    return {"ok": True, "state": f"ok: {answer}"}
