"""Run ``caxev tape``: list copies on tape, and make, restore, check and forget them.

`put`, `get` and `check` write requests to which the listeners react. `ls`, `status` and
``get --to DIR`` call the archive's client, so they need a machine that has it. `forget` removes an
entry from the database; nothing on tape is ever deleted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from attrs import define, field, frozen

from caxev.cli.completion import SITE
from caxev.cli.errors import FAILED, NothingToDo
from caxev.cli.options import MOST, as_table, example, global_options, state
from caxev.cli.output import Column, Table, print_line, show, show_rows, size
from caxev.cli.selection import many_runs
from caxev.config import ConfigError
from caxev.core.escapes import escaped

if TYPE_CHECKING:
    from caxev.cli.runs import Wanted
    from caxev.config import Site, Sites
    from caxev.core.model import Copy, CopyKey, Run
    from caxev.core.update import RunUpdate
    from caxev.database import Database
    from caxev.tape.base import Reach, Stored
    from caxev.tape.steps import Outcome

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
_HANDLERS: Final = ("backup", "recall", "tape_checksum")


@click.group(epilog=example("caxev tape put --run 123", "caxev tape ls --last-days 30"))
def tape() -> None:
    """Make, restore, list and compare backups of raw data on tape."""


def _selection(*, required: bool) -> Callable[[F], F]:
    """Add the options that select runs, as one argument `wanted`."""

    def add(function: F) -> F:
        def command(**given: Any) -> None:
            chosen = {name: given.pop(name) for name in _CHOICE}
            function(wanted=_wanted(**chosen, required=required), **given)

        # What click reads from a function: its name, its help, and the options declared so far.
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        chosen: Any = command
        chosen.__click_params__ = getattr(function, "__click_params__", [])
        return many_runs(chosen)  # type: ignore[no-any-return]  # click's decorators keep the function

    return add


_CHOICE: Final = ("number", "name", "detector", "from_run", "to_run", "last_days", "tag")


def _wanted(
    *,
    number: int | None,
    name: str | None,
    detector: str | None,
    from_run: int | None,
    to_run: int | None,
    last_days: float | None,
    tag: str | None,
    required: bool,
) -> Wanted:
    from caxev.cli.runs import Wanted, one
    from caxev.database import Selection

    between = (from_run, to_run)
    several = (*between, last_days, tag)
    alone = all(given is None for given in several)
    if (number is not None or name is not None) and not alone:
        raise click.UsageError("--run and --name name one run: give nothing else that selects")
    if number is not None or name is not None:
        return one(number, name, detector)
    if alone and required:
        raise click.UsageError(
            "say which runs: --run, --name, --from-run, --to-run, --last-days or --tag"
        )
    first, last = between[0] or 1, between[1] or MOST
    if first > last:
        raise click.UsageError(f"--from-run {first} is after --to-run {last}")
    numbers = None if between == (None, None) else (first, last)
    selection = Selection(numbers=numbers, tag=tag, detector=detector, last_days=last_days)
    return Wanted(selection, "run that fits")


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
_dry_run = click.option("--dry-run", is_flag=True, help="Show what would be done; do nothing.")


# -- where ----------------------------------------------------------------------------------------


def archive_called(sites: Sites, name: str | None) -> Site:
    """Return the archive of that name, or the only one. Raises `ConfigError`."""
    from caxev.tape.find import methods

    # A site with an archive's method and a listener is a machine that uses one, not the archive.
    known = [site for site in sites.values() if site.method in methods() and not site.listener]
    if name is not None:
        if sites.get(name) not in known:
            raise ConfigError(f"{name} is no archive, says {sites.path}")
        return sites.get(name)
    if len(known) != 1:
        names = ", ".join(site.name for site in known) or "none"
        raise ConfigError(f"say which archive by --archive (known: {names})")
    return known[0]


def reach_called(sites: Sites, tape_name: str | None, here_name: str | None) -> Reach:
    """Return the selected archive as the selected site reaches it."""
    from caxev.tape.base import Reach

    there = archive_called(sites, tape_name)
    if here_name is not None:
        return Reach(sites.get(here_name), there)
    options = [
        site
        for site in sites.values()
        if there.name in (*site.upload_options, *site.download_options)
    ]
    if len(options) != 1:
        names = ", ".join(site.name for site in options) or "none names it"
        raise ConfigError(f"say which site this is by --site ({there.name} is used by: {names})")
    return Reach(options[0], there)


def _raw(site: str) -> CopyKey:
    from caxev.core.model import CopyKey

    return CopyKey("raw", site)


# -- asking ---------------------------------------------------------------------------------------


@frozen
class Ask:
    """The request for one run: a write, or the reason why there is none."""

    run: Run
    what: str
    update: RunUpdate | None = None


async def _carry_out(
    database: Database, asks: Iterable[Ask], *, dry_run: bool
) -> list[dict[str, Any]]:
    from caxev.cli.runs import shown
    from caxev.core.clock import utcnow

    rows = []
    for ask in asks:
        what = ask.what
        if ask.update is not None and not dry_run:
            done = await database.update_run(ask.update, utcnow())
            what = what if done is not None else "the run has just changed: try again"
        rows.append({"run": shown(ask.run), "asked": ask.update is not None, "what": what})
    return rows


_ASKED: Final = (Column("run", "RUN"), Column("what", "WHAT"))


def _ask_for(wanted: Wanted, plan: Callable[[Run], Ask], *, dry_run: bool, as_json: bool) -> None:
    """Plan and write the request for every selected run; exit with 1 if there is none."""

    async def run(database: Database) -> list[dict[str, Any]]:
        found = await wanted.find(database, database.settings)
        return await _carry_out(database, map(plan, found), dry_run=dry_run)

    _finish(state().with_database(run), as_json)


def _finish(rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    show(Table(_ASKED, rows), as_json=as_json)
    # Runs that need nothing are no error as long as one has been requested.
    if not any(row["asked"] for row in rows):
        raise click.exceptions.Exit(FAILED)


@tape.command(
    epilog=example("caxev tape put --run 123", "caxev tape put --from-run 100 --to-run 200")
)
@_selection(required=True)
@_archive
@click.option("--from", "source", type=SITE, help="From this site. [default: any that can]")
@_dry_run
@as_table
@global_options(hidden=True)
def put(
    *, wanted: Wanted, tape_name: str | None, source: str | None, dry_run: bool, as_json: bool
) -> None:
    """Bring raw data to tape.

    This adds an entry that is `requested`; the listener of a site that has the data does it.
    """
    options = state()
    options.log("warning")
    sites = options.sites()
    there = archive_called(sites, tape_name)
    names = (
        [sites.get(source).name]
        if source is not None
        else [one.name for one in sites.values() if there.name in one.upload_options]
    )
    _ask_for(wanted, lambda run: put_ask(run, names, there.name), dry_run=dry_run, as_json=as_json)


def put_ask(run: Run, names: Sequence[str], tape_name: str) -> Ask:
    """Return the request for a copy on tape, from the first of these sites that has one. Pure."""
    from caxev.cli.copy import Way, asked_for, why_not
    from caxev.cli.replay import me
    from caxev.core.clock import utcnow

    # The first site's reason is shown: it is the one that usually brings data there.
    reasons = []
    for name in names:
        way = Way(_raw(name), _raw(tape_name))
        if (why := why_not(run, way)) is None:
            return Ask(run, f"from {name} to {tape_name}", asked_for(run, way, me(), utcnow()))
        reasons.append(why)
    return Ask(run, reasons[0] if reasons else f"no site brings data to {tape_name}")


@tape.command(
    epilog=example("caxev tape get --run 123 --site lngs", "caxev tape get --run 123 --to /scratch")
)
@_selection(required=True)
@_archive
@_site
@click.option("--to", "directory", metavar="DIR", help="Restore into this directory, here and now.")
@_dry_run
@as_table
@global_options(hidden=True)
def get(
    *,
    wanted: Wanted,
    tape_name: str | None,
    here_name: str | None,
    directory: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Bring raw data back from tape.

    Without --to, the site's listener restores, compares and registers the copy. With --to, this
    command restores the files into a directory here, and registers nothing; if no digest is
    known, it reports the files as unverified.
    """
    options = state()
    options.log("warning")
    reach = reach_called(options.sites(), tape_name, here_name)
    if directory is None:
        target, source = reach.here.name, [reach.there.name]
        _ask_for(wanted, lambda run: put_ask(run, source, target), dry_run=dry_run, as_json=as_json)
        return
    place = Path(directory).absolute()
    if not place.is_dir():
        raise ConfigError(f"{place} is no directory: make it first")
    pairs = options.with_database(lambda database: _on_tape(database, wanted, reach.there.name))
    rows = [_restore(run, copy, rows_, reach, place, dry_run=dry_run) for run, copy, rows_ in pairs]
    show(Table(_ASKED, rows), as_json=as_json)
    if not all(row["asked"] for row in rows):
        raise click.exceptions.Exit(FAILED)


async def _on_tape(
    database: Database, wanted: Wanted, host: str
) -> list[tuple[Run, Copy | None, list[dict[str, Any]] | None]]:
    """Return the selected runs, with their copies on tape and the manifests of these."""
    found = []
    for run in await wanted.find(database, database.settings):
        copy = run.copy(_raw(host))
        digest = None if copy is None else copy.manifest
        found.append((run, copy, await database.load_manifest(digest) if digest else None))
    return found


def _restore(
    run: Run,
    copy: Copy | None,
    rows: list[dict[str, Any]] | None,
    reach: Reach,
    place: Path,
    *,
    dry_run: bool,
) -> dict[str, Any]:
    from caxev.cli.runs import shown
    from caxev.core.errors import GiveUp, Retry
    from caxev.core.model import TRANSFERRED
    from caxev.files import Manifest, safe_name
    from caxev.tape.base import folder_of
    from caxev.tape.steps import Data, recall

    if copy is None or copy.status != TRANSFERRED or copy.location is None:
        standing = "is not there" if copy is None else f"is {copy.status}"
        return {"run": shown(run), "asked": False, "what": f"the copy on tape {standing}"}
    folder = folder_of(copy.location)
    target = str(place / safe_name(folder))
    expected = None if rows is None else Manifest.from_rows(rows)
    data = Data(safe_name(folder), folder, expected, copy.checksum)
    if not dry_run:
        try:
            recall(reach, data, target, [str(place)]).get()
        except (Retry, GiveUp) as error:
            return {"run": shown(run), "asked": False, "what": str(error)}
    what = target if data.is_known else f"{target} (unverified: no digest is known)"
    return {"run": shown(run), "asked": True, "verified": data.is_known, "what": what}


@tape.command(epilog=example("caxev tape check --run 123", "caxev tape check --last-days 30"))
@_selection(required=True)
@_archive
@_dry_run
@as_table
@global_options(hidden=True)
def check(*, wanted: Wanted, tape_name: str | None, dry_run: bool, as_json: bool) -> None:
    """Read copies on tape again, and compare them.

    The listener of the site that brought them there restores them to scratch. It answers in
    `check_answered` and `verified_at` of the entry.
    """
    options = state()
    options.log("warning")
    host = archive_called(options.sites(), tape_name).name
    _ask_for(wanted, lambda run: check_ask(run, host), dry_run=dry_run, as_json=as_json)


def check_ask(run: Run, host: str) -> Ask:
    """Return the request to read a copy on tape again. Pure except for the time."""
    from caxev.core.clock import utcnow
    from caxev.core.model import TRANSFERRED, new_id
    from caxev.core.update import RunUpdate

    copy = run.copy(_raw(host))
    if copy is None or copy.status != TRANSFERRED:
        return Ask(run, "no good copy on tape" if copy is None else f"{copy.key} is {copy.status}")
    update = RunUpdate.ask(run, copy, new_id(), utcnow())
    return Ask(run, f"to be read again at {host}", update)


@tape.command(epilog=example("caxev tape forget --run 123 --why 'the tape is lost'"))
@_selection(required=True)
@_archive
@click.option("--why", required=True, metavar="TEXT", help="The reason, kept in deleted_data.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_dry_run
@as_table
@global_options(hidden=True)
def forget(
    *,
    wanted: Wanted,
    tape_name: str | None,
    why: str,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove the entries of copies on tape; the files on tape stay.

    A note of it stays in the run's `deleted_data`. If a site's `upload_options` name the
    archive, its listener brings the data there again.
    """
    options = state()
    options.log("warning")
    host = archive_called(options.sites(), tape_name).name
    found = options.with_database(lambda database: wanted.find(database, database.settings))
    asks = [forget_ask(run, host, why) for run in found]
    number = sum(ask.update is not None for ask in asks)
    if number and not (yes or dry_run):
        words = escaped(wanted.words)
        # The runs are read before the question, and not again: what is written is what was shown.
        click.confirm(f"Forget that {words} is at {host} ({number})?", abort=True, err=as_json)
    _finish(options.with_database(lambda one: _carry_out(one, asks, dry_run=dry_run)), as_json)


def forget_ask(run: Run, host: str, why: str) -> Ask:
    """Return the request that removes an entry, with a tombstone. Pure except for the time."""
    copy = run.copy(_raw(host))
    if copy is None:
        return Ask(run, f"no entry for {host}")
    return Ask(run, f"forgotten at {host}", forgetting(run, copy, why))


def forgetting(run: Run, copy: Copy, why: str) -> RunUpdate:
    """Return the write that removes an entry, but no data. Pure except for the time.

    The tombstone records who did that and why, and that nothing was deleted.
    """
    from caxev.cli.replay import me
    from caxev.core.clock import utcnow
    from caxev.core.update import RunUpdate

    proof = f"status {copy.status}; nothing at {copy.host} was deleted"
    tombstone = {"by": me(), "at": utcnow(), "why": why, "proof": proof}
    return RunUpdate.remove_copy(run, copy, tombstone=tombstone)


# -- looking --------------------------------------------------------------------------------------


@tape.command("ls", epilog=example("caxev tape ls --run 123", "caxev tape ls --name 161111_1434"))
@_selection(required=True)
@_archive
@_site
@as_table
@global_options(hidden=True)
def list_(*, wanted: Wanted, tape_name: str | None, here_name: str | None, as_json: bool) -> None:
    """List the files that the archive itself has of runs."""
    from caxev.cli.runs import shown
    from caxev.tape.base import folder_of
    from caxev.tape.steps import contents

    options = state()
    options.log("warning")
    reach = reach_called(options.sites(), tape_name, here_name)
    pairs = options.with_database(lambda database: _on_tape(database, wanted, reach.there.name))
    rows: list[dict[str, Any]] = []
    for run, copy, _ in pairs:
        if copy is not None and copy.location is not None:
            found = _result(contents(reach, folder_of(copy.location)))
            rows += [
                {"run": shown(run), "file": one.name, "bytes": one.size, "time": one.time}
                for one in found
            ]
    columns = (
        Column("run", "RUN"),
        Column("bytes", "SIZE", size),
        Column("time", "TIME"),
        Column("file", "FILE"),
    )
    show(Table(columns, rows), as_json=as_json, empty="nothing on tape")
    if not rows:
        raise click.exceptions.Exit(FAILED)


def _result(outcome: Outcome[T]) -> T:
    from caxev.core.errors import GiveUp, Retry

    try:
        return outcome.get()
    except (GiveUp, Retry) as error:
        raise NothingToDo(str(error)) from error


@tape.command(epilog=example("caxev tape status", "caxev tape status --last-days 30 --by-day"))
@_selection(required=False)
@_archive
@_site
@click.option("--offline", is_flag=True, help="Ask only the database, not the archive.")
@click.option("--by-day", is_flag=True, help="Show runs and bytes by the day of their arrival.")
@as_table
@global_options(hidden=True)
def status(
    *,
    wanted: Wanted,
    tape_name: str | None,
    here_name: str | None,
    offline: bool,
    by_day: bool,
    as_json: bool,
) -> None:
    """Compare the database with the archive: what is missing there.

    A run is missing if the archive lacks it or has it in another size, or if a site's
    `upload_options` want it there and nobody brings it. Exit code 1 if one is.
    """
    from caxev.tape.steps import holdings

    options = state()
    options.log("warning")
    sites = options.sites()
    there = archive_called(sites, tape_name)
    bringing = {site.name for site in sites.values() if there.name in site.upload_options}
    reach = None if offline or by_day else reach_called(sites, tape_name, here_name)
    found = Summary()

    async def look(database: Database) -> None:
        def standing() -> AsyncIterator[dict[str, Any]]:
            return _standing(database, wanted, there.name, bringing)

        if by_day:
            rows = [{name: row[name] for name in _DATED} async for row in standing()]
            show(Table(_DAYS, list(days(rows))), as_json=as_json, empty="nothing on tape")
            return
        held = None
        if reach is not None:
            # Few directories hold all folders, and the archive lists a directory in one call.
            places = {place async for row in standing() for place in above([row])}
            held = _result(holdings(reach, sorted(places)))
        rows_ = found.counting(standing(), held)
        await show_rows(_STATUS, rows_, as_json=as_json, empty="no raw data")
        if not as_json:
            print_line(found.words)

    options.with_database(look)
    if found.missing:
        raise click.exceptions.Exit(FAILED)


_DATED: Final = ("status", "since", "arrived_at", "bytes")
"""What `days` needs of a row: rows may be many."""
_STATUS: Final = (
    Column("run", "RUN"),
    Column("status", "STATUS"),
    Column("bytes", "SIZE", size),
    Column("on_tape", "ON TAPE"),
    Column("note", "NOTE"),
)
_DAYS: Final = (
    Column("day", "DAY"),
    Column("runs", "RUNS"),
    Column("bytes", "SIZE", size),
    Column("bytes_per_s", "RATE", lambda rate: f"{size(rate)}/s for each run"),
)


async def _standing(
    database: Database,
    wanted: Wanted,
    host: str,
    bringing: Collection[str],
) -> AsyncIterator[dict[str, Any]]:
    """Return each run's copy on tape, from the database, and a note on it from the ledger."""
    from caxev.core.clock import utcnow

    # Raises, if there is none.
    await wanted.find(database, database.settings, 1)
    notes, on_its_way = await _noted(database)
    async for page in database.pages(wanted.selection, utcnow()):
        for run in page:
            # A run without raw data anywhere, as before its first entry, has nothing to put there.
            raw = [copy for copy in run.copies if copy.type == "raw" and copy.host != host]
            copy = run.copy(_raw(host))
            if copy is not None or raw:
                owed = run.id not in on_its_way and should_be_there(copy, raw, bringing)
                yield row_of(run, copy, notes.get(run.id), owed=owed)


async def _noted(database: Database) -> tuple[dict[Any, str], set[Any]]:
    """Return the ledger's notes on runs, and the runs which a reaction brings to tape."""
    notes: dict[Any, str] = {}
    on_its_way: set[Any] = set()
    # A query for each state and handler, and none for each run, of which there are thousands. Of
    # several notes on a run the worst, read last, remains.
    sites = [record.site for record in await database.site_records()]
    for standing, handler, site in product(("pending", "running", "failed"), _HANDLERS, sites):
        for reaction, _ in await database.reactions(site, state=standing, handler=handler):
            more = f": {reaction.note}" if reaction.note else ""
            notes[reaction.run] = f"{handler} {standing}{more}"
            if handler == "backup" and standing != "failed":
                on_its_way.add(reaction.run)
    return notes, on_its_way


def should_be_there(copy: Copy | None, raw: Iterable[Copy], bringing: Collection[str]) -> bool:
    """Return whether data is not on tape though a site that brings it there has it. Pure."""
    from caxev.core.model import TRANSFERRED

    if copy is not None and copy.status == TRANSFERRED:
        return False
    return any(one.host in bringing and one.status == TRANSFERRED for one in raw)


def row_of(run: Run, copy: Copy | None, note: str | None, *, owed: bool = False) -> dict[str, Any]:
    """Return a run's row; `owed`: it should be on tape, and no reaction brings it. Pure."""
    from caxev.cli.runs import shown
    from caxev.core.entry import Entry

    entry = Entry({}) if copy is None else copy
    return {
        "run": shown(run),
        "status": "not on tape" if copy is None else copy.status,
        "location": None if copy is None else copy.location,
        "bytes": entry.size or run.raw_size,
        "since": entry.creation_time,
        "arrived_at": entry.arrived_at or entry.verified_at,
        "missing": owed,
        "note": note or entry.error or ("should be on tape" if owed else None),
    }


def above(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the directories on tape that contain these rows' folders. Pure."""
    from caxev.tape.base import folder_of

    known = (row["location"] for row in rows)
    # Old programs wrote "n/a" and other texts as locations of what is not on tape yet.
    folders = (folder_of(one) for one in known if one is not None and one.startswith("/"))
    return sorted({folder.rpartition("/")[0] for folder in folders})


def on_tape(row: Mapping[str, Any], held: Mapping[str, Sequence[Stored]]) -> dict[str, Any]:
    """Return the archive's state of a row: its bytes, or that it is missing. Pure."""
    from caxev.core.model import TRANSFERRED
    from caxev.tape.base import folder_of

    found = held.get(folder_of(row["location"] or ""))
    total = None if found is None else sum(one.size for one in found)
    good = row["status"] == TRANSFERRED
    differs = total is not None and row["bytes"] is not None and total != row["bytes"]
    words = "no" if total is None else f"{size(total)} in {len(found or ())} files"
    note = row["note"]
    # Only an entry that claims a good copy can be contradicted: others are still under way.
    if good and (total is None or differs):
        note = "missing on tape" if total is None else "another size on tape"
    missing = row.get("missing") or (good and (total is None or differs))
    return {"on_tape": words, "bytes_on_tape": total, "missing": missing, "note": note}


def days(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Return runs, bytes and rate by the day on which copies were verified on tape. Pure.

    Copies made by cax count on the day of their start, and not for the rate.
    """
    runs: Counter[str] = Counter()
    amount: Counter[str] = Counter()
    timed: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for row in rows:
        since, arrived = row["since"], row["arrived_at"] or row["since"]
        if row["status"] != "transferred" or not isinstance(arrived, datetime):
            continue
        day = f"{arrived:%Y-%m-%d}"
        runs[day] += 1
        amount[day] += row["bytes"] or 0
        # cax recorded the start only: without an end there is no rate.
        if isinstance(since, datetime) and arrived > since:
            seconds[day] += round((arrived - since).total_seconds())
            timed[day] += row["bytes"] or 0
    for day in sorted(runs):
        rate = timed[day] / seconds[day] if seconds[day] else None
        yield {
            "day": day,
            "runs": runs[day],
            "bytes": amount[day],
            "bytes_per_s": rate,
        }


@define
class Summary:
    """The last line of `status`: the number of runs in each state, counted as they pass."""

    states: Counter[str] = field(factory=Counter)
    missing: int = 0
    bytes: int = 0

    def count(self, row: Mapping[str, Any]) -> None:
        """Count a row."""
        self.states[row["status"]] += 1
        self.missing += bool(row.get("missing"))
        self.bytes += row["bytes"] or 0 if row["status"] == "transferred" else 0

    async def counting(
        self, rows: AsyncIterable[dict[str, Any]], held: Mapping[str, Sequence[Stored]] | None
    ) -> AsyncIterator[dict[str, Any]]:
        """Pass on rows, with the archive's state if it was asked, and count them."""
        async for row in rows:
            full = row if held is None else {**row, **on_tape(row, held)}
            self.count(full)
            yield full

    @property
    def words(self) -> str:
        """Return the line."""
        words = ", ".join(f"{count} {name}" for name, count in sorted(self.states.items()))
        lost = f"; {self.missing} of them are missing on tape" if self.missing else ""
        return f"{self.states.total()} runs: {words}; {size(self.bytes)} on tape{lost}"
