"""Run ``caxev tape put``, ``get``, ``check`` and ``forget``."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import trio

from caxev.asking.archives import BringRaw, ReadArchived, unusable
from caxev.asking.base import Act, DataChoice, Step
from caxev.asking.deletions import ForgetCopies
from caxev.cli.command import command
from caxev.cli.options import options
from caxev.cli.plans import WHY, Ask, acts, show_steps
from caxev.cli.selection import RunChoice, selects_runs
from caxev.cli.tape.archive import (
    ArchiveChoice,
    as_noted,
    asked,
    selects_archive,
    selects_reach,
    tape,
)
from caxev.cli.values import SITE
from caxev.config import ConfigError
from caxev.copies.lifecycle import manifest_of
from caxev.core.errors import GiveUp, Retry
from caxev.core.model import TRANSFERRED, Copy, CopyKey, Run
from caxev.files import Manifest, safe_name
from caxev.tape.base import Reach, folder_of
from caxev.tape.steps import Data, recall

if TYPE_CHECKING:
    from caxev.database import Database

_acts = acts("Show what would be done; do nothing.")


def _ask(ask: Ask, runs: RunChoice, act: Act) -> None:
    # Runs that need nothing are no error as long as one has been requested.
    ask(runs.of_status(type="raw"), act, is_enough=True)


@command("caxev tape put --run 123", "caxev tape put --run 100-200", group=tape)
@selects_runs(copies=("status",))
@selects_archive
@click.option("--from", "source", type=SITE, help="The site to send it. [default: any that can]")
@_acts
def put(*, runs: RunChoice, archive: ArchiveChoice, source: str | None, ask: Ask) -> None:
    """Bring raw data to tape.

    This adds an entry that is `requested`; the listener of a site that has the data does it.
    """
    host, sites = archive.there.name, options().sites()
    names = [one.name for one in sites.values() if host in one.upload_options]
    names = names if source is None else [source]
    _ask(ask, runs, BringRaw(tuple(names), host))


@command(
    "caxev tape get --run 123 --site lngs", "caxev tape get --run 123 --to /scratch", group=tape
)
@selects_runs(copies=("status",))
@selects_reach
@click.option("--to", "directory", metavar="DIR", help="Restore into this directory here.")
@_acts
def get(*, runs: RunChoice, archive: ArchiveChoice, directory: str | None, ask: Ask) -> None:
    """Bring raw data back from tape.

    Without --to, the site's listener restores, compares and registers the copy, which is held as
    one that `caxev copy` requests. With --to, this command restores the files into a directory
    here, and registers nothing; if no digest is known, it reports the files as unverified.
    """
    reach = archive.reach
    target, source = reach.here.name, reach.there.name
    if directory is None:
        _ask(ask, runs, BringRaw((source,), target, held=True))
        return
    place = Path(directory).absolute()
    if not place.is_dir():
        raise ConfigError(f"{place} is not a directory: make it first")
    wanted = runs.of_status(type="raw")
    show_steps(_restored, wanted, reach, place, dry_run=ask.dry_run)


async def _restored(
    database: Database, runs: RunChoice, reach: Reach, place: Path, *, dry_run: bool
) -> AsyncGenerator[Step, None]:
    """Restore the selected runs, one after the other; return what came of each."""
    reach = await as_noted(database, reach)
    async with aclosing(runs.each(database)) as found:
        async for run in found:
            copy = run.copy(CopyKey("raw", reach.there.name))
            known = None if copy is None else await manifest_of(database, copy.manifest)
            one = partial(restore, run, copy, known, reach, place, dry_run=dry_run)
            yield await trio.to_thread.run_sync(one)


def restore(
    run: Run,
    copy: Copy | None,
    expected: Manifest | None,
    reach: Reach,
    place: Path,
    *,
    dry_run: bool,
) -> Step:
    """Restore a copy into a directory unless it is a dry run; return what came of it."""
    what = f"raw from {reach.there.name} to {place}"
    if copy is None or copy.status != TRANSFERRED or copy.location is None:
        return Step(run, what, unusable(copy))
    folder = folder_of(copy.location)
    target = str(place / safe_name(folder))
    data = Data(safe_name(folder), folder, expected, copy.checksum, copy.manifest)
    if dry_run:
        target = f"would be restored to {target}"
    else:
        try:
            asked(recall, reach, data, target, [str(place)])
        except (Retry, GiveUp) as error:
            return Step(run, what, str(error))
    state = target if data.is_known else f"{target} (unverified: no digest is known)"
    return Step(run, what, state, ok=True)


@command("caxev tape check --run 123", "caxev tape check --since 30d", group=tape)
@selects_runs(copies=("status",))
@selects_archive
@_acts
def check(*, runs: RunChoice, archive: ArchiveChoice, ask: Ask) -> None:
    """Read copies on tape again, and compare them.

    The listener of the site that brought them there restores them to scratch. It answers in
    `check_answered` and `verified_at` of the entry.
    """
    act = ReadArchived(archive.there.name)
    _ask(ask, runs, act)


@command("caxev tape forget --run 123 --why 'the tape is lost'", group=tape)
@selects_runs(copies=("status",))
@selects_archive
@WHY
@acts("Show what would be removed; write nothing.", few=0)
def forget(*, runs: RunChoice, archive: ArchiveChoice, why: str, ask: Ask) -> None:
    """Remove the entries of copies on tape; the files on tape stay.

    A note of it stays in the run's `deleted_data`. If a site's `upload_options` name the
    archive, its listener brings the data there again.
    """
    act = ForgetCopies(archive.there.name, DataChoice("raw"), why)
    _ask(ask, runs, act)
