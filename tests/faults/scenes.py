"""What is done to runs while listeners are killed: all that a copy meets in its life.

A scene is a world whose sites are told to do more than copy, and what is done there to runs that
have come to their first end. Together the scenes have every shipped handler do what it is for;
`crash` says which did not.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any, Final

import trio
from attrs import evolve, frozen
from pymongo import MongoClient
from pymongo.collection import Collection
from pymongo.database import Database

from caxev.core.clock import utcnow
from caxev.core.model import (
    TRANSFERRED,
    Copy,
    CopyKey,
    Run,
    new_id,
)
from caxev.core.update import RunUpdate
from caxev.database import Request
from caxev.files import digest_tree
from tests.faults import rucio
from tests.faults.campaign import BIRTH, Born, End, Ground
from tests.faults.deletion import harm, record
from tests.faults.held import HOLD
from tests.faults.people import all_runs, asked_for
from tests.faults.tape import TEMPLATE, TapeGround, asked
from tests.places import vouched
from tests.rucio_server import missing

Document = dict[str, Any]
Act = Callable[[Ground, Sequence[Born]], Awaitable[End]]
"""What is done to runs that have come to their first end; the end that they come to then."""

CHICAGO: Final = "chicago"
STOCKHOLM: Final = "stockholm"
LONG_AGO: Final = datetime(2016, 11, 11, tzinfo=UTC)
MADE: Final = "v6.8.0"
"""The version of processed data that is made in `sites.json` of the project."""
OLD: Final = "v6.0.0"
"""A version that nobody wants any more."""
FIELD: Final = "processor.caxev.gain"
TABLE: Final = "gains"
KEPT: Final = "keep"
"""The tag of a run that comes to a full disk, and stays."""
SIZE: Final = 300_000
"""Its bytes."""


@frozen
class Scene:
    """A world's further keys in sites.json, and what is done to runs there.

    `options` are those of `tests.faults.campaign.play` besides. `lacks` says why it cannot be
    played on this machine, if so.
    """

    help: str
    sites: Mapping[str, Mapping[str, Any]]
    act: Act | None = None
    options: Mapping[str, Any] = {}
    lacks: Callable[[], str | None] = lambda: None


# -- what the acts have in common -----------------------------------------------------------------


async def _changed(ground: Ground, born: Born, change: Callable[[Run], RunUpdate]) -> None:
    """Write to a run's document, however often others write between reading and writing."""
    while True:
        run = (await ground.database.runs([born.id]))[born.id]
        if await ground.database.update_run(change(run), utcnow()) is not None:
            return


async def _request(ground: Ground, site: str, runs: Sequence[Born], handler: str) -> None:
    """Have a site's handler look at the runs again, whatever it has done."""
    request = Request("replay", tuple(born.id for born in runs), handler, force=True)
    await ground.database.add_request(site, request, "tests", utcnow())


@contextmanager
def _raw(ground: Ground) -> Iterator[tuple[Collection[Document], Database[Document]]]:
    """The runs, and their database, as an old program writes to them."""
    settings = ground.world.settings
    with MongoClient[Document](ground.world.mongod.uri) as client:
        database = client[settings.database]
        yield database[settings.collection], database


def _copy(run: Run, host: str, kind: str = "raw", version: str | None = None) -> Copy:
    found = run.copy(CopyKey(kind, host, version))
    assert found is not None, f"{run} has no {kind} at {host}"
    return found


def _again(ground: Ground, *seen: str) -> End:
    """The usual end; at these sites a copy became good once more, each time seen there."""
    wanted = ground.wanted
    return End(wanted.copies, wanted.tags + Counter(f"seen-{site}" for site in seen))


# -- the acts -------------------------------------------------------------------------------------


async def damaged(ground: Ground, runs: Sequence[Born]) -> End:
    """Have a copy go bad, to be found out, judged and repaired; somebody asks for it."""
    for born in runs:
        run = (await ground.database.runs([born.id]))[born.id]
        copy = run.copy(CopyKey("raw", CHICAGO))
        if copy is None or copy.location is None:
            continue  # what is lost is found out by comparing
        await trio.to_thread.run_sync(harm, Path(copy.location))
        await ground.database.update_run(RunUpdate.ask(run, copy, new_id(), utcnow()), utcnow())
    # Its status came back: what reacts to that has done so again.
    return _again(ground, CHICAGO)


async def disputed(ground: Ground, runs: Sequence[Born]) -> End:
    """Have all copies say something else, until a person vouches for one."""
    for born in runs:
        for host in (CHICAGO, STOCKHOLM):
            run = (await ground.database.runs([born.id]))[born.id]
            await trio.to_thread.run_sync(harm, Path(_copy(run, host).location or ""))
            await record(ground, run, _copy(run, host))
            if host == CHICAGO:  # so that they differ from one another, too
                await trio.to_thread.run_sync(_append, Path(_copy(run, STOCKHOLM).location or ""))
    for born in runs:
        await _changed(
            ground, born, lambda run: RunUpdate.ask(run, _copy(run, CHICAGO), new_id(), utcnow())
        )

    def aside(run: Run) -> bool:
        kept = [_copy(run, host).fields.get("quarantine") for host in (CHICAGO, STOCKHOLM)]
        return all(isinstance(one, Mapping) and one.get("place") for one in kept)

    await all_runs(ground, runs, aside, "what differs was not set aside")
    for born in runs:
        command = [sys.executable, "-m", "caxev", "vouch", "--run", str(born.number)]
        environment = {**ground.world.environment, "PATH": ""}
        await trio.run_process([*command, "--site", BIRTH], env=environment, capture_stdout=True)

    def repaired(run: Run) -> bool:
        return all(_copy(run, host).status == TRANSFERRED for host in (CHICAGO, STOCKHOLM))

    await all_runs(ground, runs, repaired, "what a person vouched for did not repair the others")
    for host in (CHICAGO, STOCKHOLM):
        await _request(ground, host, runs, "release")

    def released(run: Run) -> bool:
        return not any(_copy(run, host).fields.get("quarantine") for host in (CHICAGO, STOCKHOLM))

    await all_runs(ground, runs, released, "what was set aside was not released")
    return _again(ground, CHICAGO, STOCKHOLM)


def _append(path: Path) -> None:
    with (path / "pax_info.json").open("a") as file:
        file.write(" ")


async def aged(ground: Ground, runs: Sequence[Born]) -> End:
    """Have what comes to copies with the years.

    Rot that nobody asked for, an old program that has left a copy half made and a second entry of
    a good one, processed data that nobody wants any more, and a table for fields of the run.
    """
    directory = ground.world.dir_of(CHICAGO, "dir_processed") / f"pax_{OLD}"
    row = {"version": "v1", "value": 1.25, "creation_time": LONG_AGO}
    with _raw(ground) as (collection, database):
        database[TABLE].replace_one({"version": "v1"}, row, upsert=True)
        for born in runs:
            run = (await ground.database.runs([born.id]))[born.id]
            place = await trio.to_thread.run_sync(_processed, directory / run.name)
            twice = {"type": "raw", "host": BIRTH, "status": "error", "creation_time": LONG_AGO}
            twice["location"] = _copy(run, BIRTH).location
            more = {"$each": [place, twice]}
            collection.update_one({"_id": born.id}, {"$push": {"data": more}})
            stopped: Document = {
                "type": "raw",
                "host": STOCKHOLM,
                "status": "transferring",
                "location": _copy(run, STOCKHOLM).location,
                "creation_time": LONG_AGO,
            }
            await trio.to_thread.run_sync(partial(rmtree, stopped["location"]))
            which = {"_id": born.id, "data": {"$elemMatch": {"type": "raw", "host": STOCKHOLM}}}
            collection.update_one(which, {"$set": {"data.$": stopped}})
            await trio.to_thread.run_sync(harm, Path(_copy(run, CHICAGO).location or ""))
            await _changed(
                ground,
                born,
                lambda run: RunUpdate.note(run, _copy(run, CHICAGO), verified_at=LONG_AGO),
            )
    await _request(ground, CHICAGO, runs, "patrol")
    await _request(ground, BIRTH, runs, "correct")

    def corrected(run: Run) -> bool:
        return "gain" in run.document.get("processor", {}).get("caxev", {})

    def rotten(run: Run) -> bool:
        return bool(_copy(run, CHICAGO).fields.get("repairs"))

    await all_runs(ground, runs, corrected, "the field was not computed from its table")
    await all_runs(ground, runs, rotten, "what had rotted was not found out and repaired")
    return _again(ground, CHICAGO, CHICAGO, STOCKHOLM)


def _processed(place: Path) -> Document:
    """Write processed data of an old version; its entry."""
    place.mkdir(parents=True)
    (place / "data").write_bytes(b"peaks" * 1000)
    found = digest_tree(vouched(place), sha512=True, report=lambda _done, _total: None)
    return {
        "type": "processed",
        "host": CHICAGO,
        "status": "transferred",
        "pax_version": OLD,
        "location": str(place),
        "checksum": found.cax_checksum(),
        "creation_time": utcnow(),
    }


async def full(ground: Ground, runs: Sequence[Born]) -> End:
    """Have another run come to a disk that is full: what is elsewhere goes there."""
    wanted = ground.wanted
    coming = await ground.take(SIZE, tags=[{"name": KEPT}])
    await ground.finish([coming], End(wanted.copies, wanted.tags + Counter([KEPT])))
    stay = {key: one for key, one in wanted.copies.items() if key != CopyKey("raw", BIRTH)}
    return evolve(wanted, copies=stay)


async def withdrawn(ground: Ground, runs: Sequence[Born]) -> End:
    """Have runs processed again; meanwhile they are not to be, and then they are."""
    hold = ground.world.dir_of(CHICAGO, "dir_raw") / HOLD
    hold.touch()
    made = CopyKey("processed", CHICAGO, MADE)
    for born in runs:
        run = (await ground.database.runs([born.id]))[born.id]
        made_here = Path(_copy(run, *_where(made)).location or "")
        await trio.to_thread.run_sync(made_here.unlink)
        await _changed(
            ground, born, lambda run: RunUpdate.remove_copy(run, _copy(run, *_where(made)))
        )
    await _tagged(ground, runs, tagged=True)
    await ground.heard()
    await _tagged(ground, runs, tagged=False)

    def runs_now(run: Run) -> bool:
        entry = run.copy(made)
        return entry is not None and entry.fields["job"].get("submitted") is not None

    await all_runs(ground, runs, runs_now, "it was not processed again")
    await _tagged(ground, runs, tagged=True)
    await all_runs(ground, runs, lambda run: run.copy(made) is None, "it was not withdrawn")
    hold.unlink()
    await ground.heard()
    await _tagged(ground, runs, tagged=False)
    return _again(ground, CHICAGO)


def _where(key: CopyKey) -> tuple[str, str, str | None]:
    return key.host, key.type, key.version


async def _tagged(ground: Ground, runs: Sequence[Born], *, tagged: bool) -> None:
    """Say that runs are not to be processed, or no longer say so."""
    tag = {"name": "donotprocess"}
    ids = {"_id": {"$in": [born.id for born in runs]}}
    with _raw(ground) as (collection, _):
        collection.update_many(ids, {"$push" if tagged else "$pull": {"tags": tag}})


# -- all of them ----------------------------------------------------------------------------------

PURGED: Final = {BIRTH: {"purge": 1, "deletion": {"copies": 2}}}
FULL: Final = {"copies": 2, "when_full": True, "protect": [KEPT]}
HELD: Final = [sys.executable, "-m", "tests.faults.held", "peaks", "{input}", "{output}"]
SCENES: Final = {
    "plain": Scene("where runs are taken, they are purged in the end", PURGED),
    "damaged": Scene("a copy goes bad, and somebody asks for it", {}, damaged),
    "disputed": Scene(
        "no majority says what is right, until a person does",
        {name: {"quarantine_days": 0} for name in (CHICAGO, STOCKHOLM)},
        disputed,
    ),
    "aged": Scene(
        "rot, a copy that an old program left, data that nobody wants any more, a table",
        {
            BIRTH: {
                "corrections": [{"name": "gain", "field": FIELD, "table": TABLE, "when": ["start"]}]
            },
            CHICAGO: {
                "patrol": {"days": 30},
                "permissions": {"mode": "0750"},
                "pax_version_purge": OLD,
            },
        },
        aged,
    ),
    "asked": Scene("people tag runs, hold copies, delete many and have them back", {}, asked_for),
    "full": Scene(
        "the disk is full where runs are taken",
        {BIRTH: {"min_free": "1000000TB", "deletion": FULL}},
        full,
    ),
    "withdrawn": Scene(
        "runs are not to be processed while they are",
        {
            CHICAGO: {
                "processing": {
                    "command": HELD,
                    "version": MADE,
                    "output": "{name}.jsonl",
                    "max_jobs": 2,
                }
            }
        },
        withdrawn,
    ),
    "tape": Scene(
        "to tape, read again, and back", {}, asked, {"template": TEMPLATE, "kind": TapeGround}
    ),
    "rucio": Scene(
        "to a catalogue, compared there, back, and given up there",
        {},
        rucio.given_up,
        {"template": rucio.TEMPLATE, "kind": rucio.CatalogueGround},
        missing,
    ),
}
"""By name, in the order in which they are played."""
