"""Run ``caxev tape ls`` and ``status``: list what is on tape, and compare it with the database."""

from __future__ import annotations

from collections import Counter
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from datetime import datetime
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, Final

import click
from attrs import define, field

from caxev.cli.command import command, excludes
from caxev.cli.options import options
from caxev.cli.output import (
    SIZE,
    Column,
    columns,
    fail_if,
    print_line,
    show,
    show_rows,
    stream,
)
from caxev.cli.runs import shown
from caxev.cli.selection import RunChoice, selects_runs
from caxev.cli.tape.archive import ArchiveChoice, answer, as_noted, selects_reach, tape
from caxev.core.amounts import size
from caxev.core.entry import Entry
from caxev.core.model import TRANSFERRED, Copy, CopyKey, Run
from caxev.tape.base import Reach, Stored, folder_of
from caxev.tape.steps import contents, holdings

if TYPE_CHECKING:
    from caxev.database import Database

_HANDLERS: Final = ("backup", "recall", "tape_checksum")


@command("caxev tape ls --run 123", "caxev tape ls --name 161111_1434", group=tape, name="ls")
@selects_runs(copies=())
@selects_reach
def list_(*, runs: RunChoice, archive: ArchiveChoice) -> None:
    """List the files that the archive itself has of runs."""
    fail_if(not stream(_FILES, "nothing on tape", _files, runs, archive.reach))


_FILES: Final = columns("run", SIZE, "time", "file")


async def _files(
    database: Database, runs: RunChoice, reach: Reach
) -> AsyncGenerator[dict[str, Any], None]:
    """Return a row for each file that the archive has of the selected runs."""
    reach = await as_noted(database, reach)
    async with aclosing(runs.each(database)) as found:
        async for run in found:
            copy = run.copy(CopyKey("raw", reach.there.name))
            if copy is not None and copy.location is not None:
                for one in await answer(contents, reach, folder_of(copy.location)):
                    row = {"run": shown(run), "file": one.name}
                    yield {**row, "bytes": one.size, "time": _moment(one.time)}


def _moment(text: str) -> datetime | str:
    """Return the time in an archive's list, which is its client's local one; as it is, if odd."""
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError:
        return text


@command("caxev tape status", "caxev tape status --since 30d --by-day", group=tape)
@excludes("--by-day", "--offline --site")
@excludes("--offline", "--site")
@selects_runs(required=False, copies=())
@selects_reach
@click.option("--offline", is_flag=True, help="Ask only the database, not the archive.")
@click.option("--by-day", is_flag=True, help="Show runs and bytes by the day of their arrival.")
def status(*, runs: RunChoice, archive: ArchiveChoice, offline: bool, by_day: bool) -> None:
    """Compare the database with the archive: what is missing there.

    A run is missing if the archive lacks it or has it in another size, or if a site's
    `upload_options` want it there and nobody brings it. Exit code 1 if one is.
    """
    name, sites = archive.there.name, options().sites()
    uploading = {site.name for site in sites.values() if name in site.upload_options}
    reach = None if offline or by_day else archive.reach
    found = TapeSummary()

    async def look(database: Database) -> None:
        by_run = partial(_by_run, database, runs, name, uploading)
        if by_day:
            rows = [{name: row[name] for name in _DATED} async for row in by_run()]
            show(_DAYS, list(days(rows)), empty="nothing on tape")
            return
        held = None
        if reach is not None:
            # Few directories hold all folders, and the archive lists a directory in one call.
            places = {place async for row in by_run() for place in above([row])}
            known = await as_noted(database, reach)
            held = await answer(holdings, known, sorted(places))
        await show_rows(_STATUS, found.counting(by_run(), held), empty="no raw data")
        if not options().as_json:
            print_line(found.words)

    options().with_database(look)
    fail_if(found.missing > 0)


_DATED: Final = ("status", "since", "arrived_at", "bytes")
"""The fields of a row that `days` needs: rows may be many."""
_STATUS: Final = columns("run", "status", SIZE, Column("on_tape", "ON TAPE"), "note")
_DAYS: Final = columns(
    "day", "runs", SIZE, Column("bytes_per_s", "RATE", lambda rate: f"{size(rate)}/s for each run")
)


async def _by_run(
    database: Database, choice: RunChoice, host: str, uploading: Collection[str]
) -> AsyncIterator[dict[str, Any]]:
    """Return each run's copy on tape, from the database, and a note on it from the ledger."""
    notes, on_their_way = await _notes(database)
    async for run in choice.each(database):
        # A run without raw data anywhere, as before its first entry, has nothing to put there.
        raw = [copy for copy in run.copies if copy.type == "raw" and copy.host != host]
        copy = run.copy(CopyKey("raw", host))
        if copy is not None or raw:
            owed = run.id not in on_their_way and should_be_there(copy, raw, uploading)
            yield row_of(run, copy, notes.get(run.id), owed=owed)


async def _notes(database: Database) -> tuple[dict[Any, str], set[Any]]:
    """Return a note on each run that has reactions about tape, and the runs on their way to it."""
    notes: dict[Any, str] = {}
    on_their_way: set[Any] = set()
    # A query for each state and handler, and none for each run, of which there are thousands. If a
    # run has several notes, the worst, read last, remains.
    sites = [record.site for record in await database.site_records()]
    for state, handler, site in product(("pending", "running", "failed"), _HANDLERS, sites):
        for reaction, _ in await database.reactions(site, state=state, handler=handler):
            more = f": {reaction.note}" if reaction.note else ""
            notes[reaction.run] = f"{handler} {state}{more}"
            if handler == "backup" and state != "failed":
                on_their_way.add(reaction.run)
    return notes, on_their_way


def should_be_there(copy: Copy | None, raw: Iterable[Copy], uploading: Collection[str]) -> bool:
    """Return whether data is not on tape though a site that brings it there has it. Pure."""
    if copy is not None and copy.status == TRANSFERRED:
        return False
    return any(one.host in uploading and one.status == TRANSFERRED for one in raw)


def row_of(run: Run, copy: Copy | None, note: str | None, *, owed: bool = False) -> dict[str, Any]:
    """Return a run's row; `owed`: it should be on tape, and no reaction puts it there. Pure."""
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
    known = (row["location"] for row in rows)
    # Old programs wrote "n/a" and other texts as locations of what is not on tape yet.
    folders = (folder_of(one) for one in known if one is not None and one.startswith("/"))
    return sorted({folder.rpartition("/")[0] for folder in folders})


def on_tape(row: Mapping[str, Any], held: Mapping[str, Sequence[Stored]]) -> dict[str, Any]:
    """Return the archive's state of a row: its bytes, or that it is missing. Pure."""
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
        yield {"day": day, "runs": runs[day], "bytes": amount[day], "bytes_per_s": rate}


@define
class TapeSummary:
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
