"""What the reactions to data on tape decide, and what they and ``caxev tape`` do with listeners."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio
from attrs import define, evolve
from pymongo import MongoClient
from pymongo.collection import Collection

from caxev import Copy, CopyKey, GiveUp, Job, Retry, Run, RunUpdate, Skip, aio
from caxev.asking import base
from caxev.asking.archives import BringRaw, ReadArchived
from caxev.asking.deletions import ForgetCopies
from caxev.cli import cli
from caxev.cli.tape.archive import answer
from caxev.cli.tape.look import (
    TapeSummary,
    above,
    days,
    on_tape,
    row_of,
    should_be_there,
)
from caxev.cli.tape.request import restore
from caxev.config import ArchiveOptions, ConfigError, archive_between, load_sites
from caxev.config.reading import read
from caxev.copies.lifecycle import CopyPlan
from caxev.core.clock import utcnow
from caxev.core.errors import Damaged
from caxev.core.model import CopyIs
from caxev.core.transcript import KEPT, packed, unpacked
from caxev.database import open_database
from caxev.demo.world import TAPE, World
from caxev.engine.root_markers import init_roots
from caxev.files import Item, Manifest, Report
from caxev.handlers import checksum, repair, tape
from caxev.tape.base import Reach, Stored
from caxev.tape.steps import Outcome
from tests import dsmc_faults, engine
from tests import test_tape as steps
from tests.conftest import Database as Named
from tests.faults.campaign import ground_in, new_world
from tests.faults.crash import crash
from tests.faults.tape import TEMPLATE, TapeGround, asked
from tests.faults.tape import tape as campaign
from tests.test_cli import Caxev, caxev  # noqa: F401  # a fixture
from tests.test_handlers import (
    ALL,
    LNGS,
    NAME,
    NOW,
    Yard,
    entry,
    job_of,
    run_of,
    site,
    sites_of,
    why,
)

TRIGGER = "lngs: backup: raw at lngs"
HERE = evolve(LNGS, dir_tsm="/lngs/tsm", upload_options=("chicago", "tape"))
SITES = sites_of(HERE, *(one for one in ALL.values() if one.name != "lngs"))


def backup(run: Run, name: str = "tape", here: Any = HERE, seen: str = "lngs") -> Any:
    key = CopyKey("raw", seen)
    return tape.plan_backup(run, key, here, SITES, name=name, trigger=TRIGGER)


def recall(run: Run, seen: str | None = "tape", here: Any = HERE, days: float = 0) -> Any:
    key = None if seen is None else CopyKey("raw", seen)
    now = NOW + timedelta(days=days)
    return tape.plan_recall(run, key, here, SITES, trigger=TRIGGER, now=now)


# -- backup ---------------------------------------------------------------------------------------


def test_a_backup_is_planned_as_cax_named_it() -> None:
    """The folder is that of the data's own name below dir_tsm of the site that brings it."""
    plan = backup(run_of(entry("lngs")))
    assert isinstance(plan, CopyPlan)
    assert (plan.location, plan.key) == (f"/lngs/tsm/{NAME}", ("raw", "tape", None))
    assert plan.resume is None


@pytest.mark.parametrize(
    ("entries", "name", "reason"),
    [
        ([entry("lngs")], "xenon", "upload_options does not name xenon"),
        ([entry("lngs")], "chicago", "reached by sftp, which is no archive"),
        ([entry("xenon")], "tape", "no copy at lngs"),
        ([entry("lngs", "deleting")], "tape", "is deleting"),
        ([entry("lngs", checksum=None)], "tape", "no digest yet"),
        ([entry("lngs"), entry("tape")], "tape", "is transferred already"),
        ([entry("lngs"), entry("tape", "verifying", trigger="x")], "tape", "verifying already"),
        (
            [entry("lngs"), entry("tape", "requested", source="xenon")],
            "tape",
            "requested from xenon",
        ),
    ],
)
def test_what_is_not_backed_up(entries: list[dict[str, Any]], name: str, reason: str) -> None:
    """Only what is good here, to an archive that wants it, and that no one else is bringing."""
    assert reason in why(backup(run_of(*entries), name))


def test_a_backup_needs_a_place() -> None:
    """Without dir_tsm nobody knows where data for tape is staged."""
    assert "dir_tsm" in why(backup(run_of(entry("lngs")), here=evolve(HERE, dir_tsm=None)))


def test_a_backup_goes_on_where_it_was() -> None:
    """Its own entry, by the trigger; what has only to be compared needs no source any more."""
    for status in ("transferring", "error"):
        ours = entry("tape", status, trigger=TRIGGER, location="n/a")
        plan = backup(run_of(entry("lngs"), ours))
        assert plan.resume.status == status
        assert why(backup(run_of(ours))) == "there is no copy at lngs"
    sent = entry("tape", "verifying", trigger=TRIGGER, location="/old/tsm/x")
    plan = backup(run_of(sent))
    assert (plan.location, plan.resume.status) == ("/old/tsm/x", "verifying")


def test_what_a_person_asks_for_is_backed_up() -> None:
    """Whatever upload_options name."""
    wish = entry("tape", "requested", source="lngs", location=None)
    plan = backup(run_of(entry("lngs"), wish), here=evolve(HERE, upload_options=()), seen="tape")
    assert plan.resume.status == "requested"


# -- recall ---------------------------------------------------------------------------------------

WANTS = evolve(HERE, download_options=("tape",))
ON_TAPE = entry("tape", location="/data/xenon/tsm//161111_1434/")


def test_what_was_deleted_on_purpose_is_recalled_only_for_a_person() -> None:
    """Its vanishing is no reason to bring it back; a tag is."""
    stone = {"type": "raw", "host": "lngs", "pax_version": None, "by": "me", "why": "a test"}
    run = Run.from_document({**run_of(ON_TAPE).document, "deleted_data": [stone]})
    assert "me deleted it" in why(recall(run, seen="lngs", here=WANTS))
    assert isinstance(recall(run, seen=None, here=WANTS), CopyPlan)


def test_a_recall_is_planned_from_where_cax_left_it() -> None:
    """To the site's own directory, from the folder that the entry names."""
    plan = recall(run_of(ON_TAPE), here=WANTS)
    assert (plan.source, plan.location) == (run_of(ON_TAPE).copies[0], f"/lngs/raw/{NAME}")


@pytest.mark.parametrize(
    ("entries", "fields", "reason"),
    [
        ([entry("tape", "verifying")], {}, "is verifying"),
        ([ON_TAPE, entry("lngs")], {}, "transferred already"),
        ([ON_TAPE, entry("lngs", "transferring", trigger="pull")], {}, "transferring already"),
        ([ON_TAPE], {"download_options": ()}, "names no site"),
        ([ON_TAPE], {"dir_raw": None}, "no directory"),
        ([ON_TAPE], {"data_type": ("processed",)}, "data_type"),
        ([ON_TAPE], {"purge": 1.0}, "purged at once"),
        ([ON_TAPE, entry("xenon")], {"download_options": ("xenon", "tape")}, "comes first"),
    ],
)
def test_what_is_not_recalled(
    entries: list[dict[str, Any]], fields: dict[str, Any], reason: str
) -> None:
    """Only what is wanted here and not to be had sooner from a disk."""
    here = evolve(WANTS, **fields)
    assert reason in why(recall(run_of(*entries), here=here, days=2))


def test_the_tag_asks_any_site_that_reaches_tape() -> None:
    """Also one that only brings data there, and what would be purged; a disk does not count."""
    here = evolve(HERE, purge=1.0, download_options=("xenon",))
    assert isinstance(recall(run_of(ON_TAPE, entry("xenon")), None, here, days=9), CopyPlan)
    away = evolve(here, upload_options=())
    assert isinstance(recall(run_of(ON_TAPE), None, away), Skip)


def test_a_person_s_wish_names_the_archive() -> None:
    """What was asked for comes from where it was asked for."""
    wish = entry("lngs", "requested", source="tape", location=None)
    here = evolve(HERE, download_options=("xenon",), purge=1.0)
    plan = recall(run_of(ON_TAPE, entry("xenon"), wish), "lngs", here, days=9)
    assert (plan.source.host, plan.resume.status) == ("tape", "requested")
    other = entry("lngs", "requested", source="xenon", location=None)
    assert "comes first" in why(recall(run_of(ON_TAPE, entry("xenon"), other), "lngs", here))


# -- reading again --------------------------------------------------------------------------------


ASKED = {"id": "x", "at": NOW}


@pytest.mark.parametrize(
    ("fields", "planned"),
    [
        ({}, False),
        ({"checksum": None}, True),
        ({"check_asked": NOW}, True),
        ({"check_asked": [ASKED], "verified_at": NOW + timedelta(1)}, True),
        ({"check_asked": [ASKED], "check_answered": ["another"]}, True),
        ({"check_asked": [ASKED], "check_answered": ["x"]}, False),
        ({"check_asked": NOW, "source": "xenon"}, False),
        ({"check_asked": NOW, "status": "error"}, False),
        ({"check_asked": NOW, "status": "error", "error": tape.UNREADABLE}, True),
        ({"check_asked": NOW, "location": "n/a"}, False),
    ],
)
def test_what_is_read_again(fields: dict[str, Any], planned: bool) -> None:
    """What has no digest, or was asked for since; by the site that brought it there."""
    copy = run_of({**entry("tape", source="lngs"), **fields}).copies[0]
    assert isinstance(tape.plan_check(copy, HERE, SITES), Copy) == planned


class Answering(Yard):
    """An archive whose steps end so, one after the other."""

    ends: list[Outcome[object]]

    async def work(self, function: object, *_args: object, job: Job) -> object:
        return self.ends.pop(0)


def answering(*ends: Outcome[object], **fields: Any) -> Job:
    ports = Answering(run_of({**ON_TAPE, "source": "lngs", **fields}))
    ports.ends = [*ends]
    return job_of(ports, CopyKey("raw", "tape"), WANTS)


@pytest.mark.parametrize(("second", "status"), [("differs", "error"), (None, None)])
async def test_what_differs_once_came_back_wrong(second: str | None, status: str | None) -> None:
    """Tape itself is right if it gives the right bytes at all."""
    ends = [Outcome[object]("", (why, Manifest([]))) for why in ("differs", second)]
    job = answering(*ends, check_asked=NOW)
    update = await tape.tape_checksum(job)
    assert isinstance(update, RunUpdate)
    assert update.change is not None
    assert update.change[1].get("status") == status


async def test_tape_that_gives_something_else_is_read_again() -> None:
    """While its copy counts as good, others are deleted."""
    job = answering(Outcome("", failed=Damaged("other bytes")))
    with pytest.raises(Retry, match="other bytes"):
        await tape.recall(job)
    copy = job.run.copy(CopyKey("raw", "tape"))
    assert copy is not None
    assert copy.pending


async def test_tape_that_cannot_be_read_does_not_count() -> None:
    """As any other copy; a person retries it when it can."""
    job = answering(Outcome("", failed=GiveUp("is not on tape")), check_asked=NOW)
    with pytest.raises(GiveUp, match="is not on tape"):
        await tape.tape_checksum(job)
    (update,) = job.if_parked
    assert update.change is not None
    assert update.change[1]["status"] == "error"


def test_an_entry_of_cax_is_read_by_who_brings_data_there() -> None:
    """Those of cax did not say where a copy came from."""
    copy = run_of(entry("tape", checksum=None)).copies[0]
    assert isinstance(tape.plan_check(copy, HERE, SITES), Copy)
    assert isinstance(tape.plan_check(copy, evolve(HERE, upload_options=()), SITES), Skip)


def test_other_reactions_leave_tape_alone() -> None:
    """Nobody verifies or repairs a copy on tape over SSH."""
    seen = run_of(entry("lngs"), entry("tape", "verifying", source="lngs")).copies[1]
    verdict = checksum.plan_checksum(run_of(entry("lngs")), seen, HERE, SITES)
    assert "which this reaction does not serve" in why(verdict)
    bad = entry("tape", "error", source="lngs", checksumproblem=True)
    run = run_of(entry("lngs", manifest="b3:1"), bad)
    plan = repair.plan_repair(run, run.copies[1], HERE, SITES, trigger="x")
    assert "is not reached by" in why(plan)


# -- what is kept of the client's output ----------------------------------------------------------


def test_all_that_the_client_wrote_is_kept() -> None:
    """The output for a run of many files, step after step, with nothing left out."""
    lines = [
        f"Restoring 1,000,000 /tsm/{NAME}/{n:06} --> /raw/{n:06} [Done]" for n in range(20_000)
    ]
    steps = ["$ dsmc incremental\nreturn code 0", "\n".join(["$ dsmc restore", *lines])]
    assert unpacked([packed(step) for step in steps], 2) == "\n".join(steps)
    assert unpacked([packed("b")], 3) == "[... 2 earlier parts left out ...]\nb"


def test_of_too_much_output_the_ends_are_kept() -> None:
    """What can be kept of a program that went mad is bounded, and says how much is not there."""
    noise = Random(1).randbytes(2 * KEPT).hex()
    said = f"$ dsmc restore\n{noise}\nANS1029E Lost.\nreturn code 12"
    assert len(packed(said)) <= KEPT
    text = unpacked([packed(said)], 1)
    head, number, tail = re.split(r"\n\[\.\.\. (\d+) bytes left out \.\.\.\]\n", text)
    assert said.startswith(head)
    assert said.endswith(tail)
    assert "ANS1029E Lost." in tail
    assert len(head) + len(tail) + int(number) == len(said)


# -- sites.json -----------------------------------------------------------------------------------


def test_an_archive_s_options() -> None:
    """The machine's own go before those of the archive; variables are put together."""
    here = site("a", archive=read(ArchiveOptions, {"optfile": "/a.opt", "environment": {"A": "1"}}))
    there = site(
        "t",
        method="tsm",
        archive=read(
            ArchiveOptions,
            {"server": "S", "optfile": "/t.opt", "patience": "2h", "environment": {"B": "2"}},
        ),
    )
    options = archive_between(here, there)
    assert (options.server, options.optfile, options.patience) == ("S", "/a.opt", 7200.0)
    assert options.environment == {"A": "1", "B": "2"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"patience": "soon"}, 'patience must be a length of time, as "6h"'),
        ({"patience": "0s"}, "patience must be"),
        ({"command": "dsmc -x"}, "command must be a list of words"),
        ({"optfile": "dsm.opt"}, "optfile must be an absolute path"),
        ({"scratch": "/a/../b"}, "scratch must be an absolute path"),
        ({"environment": {"LANG": "de"}}, "environment must be"),
        ({"server": "two words"}, "server must be a name without spaces"),
        ({"optfiel": "/x"}, "unknown key 'optfiel' (did you mean 'optfile'?"),
        ("dsmc", "archive must be an object"),
    ],
)
def test_what_is_wrong_with_an_archive_is_told(tmp_path: Path, value: Any, message: str) -> None:
    """By file, site, key and value."""
    file = tmp_path / "sites.json"
    file.write_text(json.dumps([{"name": "t", "method": "tsm", "archive": value}]))
    with pytest.raises(ConfigError) as told:
        load_sites(file)
    assert str(told.value).startswith(f"{file}: site 't': archive")
    assert message in str(told.value)


# -- caxev tape, pure -----------------------------------------------------------------------------


def test_what_put_check_and_forget_write() -> None:
    """A request, a field, a removal with a tombstone; where there is nothing to do, why."""
    nowhere: Any = None  # these acts need neither sites nor handlers
    context = base.ActContext(nowhere, nowhere, "me@here")
    run = run_of(entry("lngs"), entry("xenon", "error"))
    (asked,) = BringRaw(("xenon", "lngs"), "tape").tried(run, context)
    assert asked.update is not None
    assert (asked.update.add or {}).items() >= {"host": "tape", "status": "requested"}.items()
    for act in (BringRaw(("xenon",), "tape"), ReadArchived("tape")):
        assert [one.update for one in act.tried(run, context)] == [None]
    run = run_of(entry("tape"))
    update = ReadArchived("tape").step(run, context).update
    assert isinstance(update, RunUpdate)
    assert len(update.append["check_asked"]) == 1
    forget = ForgetCopies("tape", base.DataChoice("raw"), "the tape is lost")
    (step,) = forget.steps(run, context)
    assert step.update is not None
    assert isinstance(step.update.remove, CopyIs)
    assert (step.update.tombstone or {})["why"] == "the tape is lost"


def test_the_database_against_the_tape() -> None:
    """What should be there and is not, or in another size, is missing."""
    row = {"status": "transferred", "location": "/tsm//r/", "bytes": 3, "note": None}
    held = {"/tsm/r": [Stored("a", 1), Stored("b", 2)]}
    assert not on_tape(row, held)["missing"]
    assert on_tape(row, {})["note"] == "missing on tape"
    assert above([row, {"location": "/old/tsm/r"}, {"location": "n/a"}, {"location": None}]) == [
        "/old/tsm",
        "/tsm",
    ]
    assert on_tape({**row, "bytes": 4}, held)["note"] == "another size on tape"
    assert not on_tape({**row, "status": "error"}, {})["missing"]
    found = TapeSummary()
    found.count({**row, "missing": True})
    assert found.words == "1 runs: 1 transferred; 3 B on tape; 1 of them are missing on tape"


def test_what_is_fetched_without_a_digest_says_so(tmp_path: Path) -> None:
    """Neither is a location of cax taken as it was written."""
    reach = Reach(HERE, SITES.get("tape"))
    for digest, ending in (("ab" * 64, ""), (None, " (unverified: no digest is known)")):
        run = run_of(entry("tape", location="/tsm//x/", checksum=digest))
        step = restore(run, run.copies[0], None, reach, tmp_path, dry_run=True)
        state = f"would be restored to {tmp_path / 'x'}{ending}"
        assert (step.ok, step.state) == (True, state)


async def test_ctrl_c_ends_a_question_to_an_archive() -> None:
    """It is asked in a thread, and hears of it as soon as it reports a sign of life."""

    def waits(_reach: Reach, *, report: Report) -> Any:
        while True:
            report(0, 0)
            time.sleep(0.001)

    with trio.move_on_after(0.05) as scope:
        await answer(waits, Reach(HERE, SITES.get("tape")))
    assert scope.cancelled_caught


def test_what_is_read_without_a_digest_is_not_called_verified() -> None:
    """What a tape gives is recorded, so that the next reading can be compared with it."""
    run = run_of(entry("tape", checksum=None, check_asked=NOW))
    manifest = Manifest([Item(b"a", "file", 1, bytes(32), sha512=bytes(64))])
    update = tape._good(run.copies[0], run, manifest, manifest.cax_checksum(), None)
    assert update.change is not None
    assert update.change[1]["manifest"] == manifest.digest
    assert "verified_at" not in update.change[1]


def test_rates_by_day() -> None:
    """Runs and bytes count on the day on which they were found good on tape."""
    good = {"status": "transferred", "since": NOW, "bytes": 1000}
    row = {**good, "arrived_at": NOW + timedelta(seconds=10)}
    (day,) = days([row, row, {**row, "arrived_at": None}, {**row, "status": "verifying"}])
    assert (day["runs"], day["bytes"], day["bytes_per_s"]) == (3, 3000, 100.0)


def test_a_run_that_should_be_on_tape_counts() -> None:
    """A site that brings data there has it, and it is not good there: missing, archive or not."""
    raw = run_of(entry("lngs"), entry("xenon", "error"), entry("tape", "error"))
    copies = {copy.host: copy for copy in raw.copies}
    disks = [copies["lngs"], copies["xenon"]]
    for copy, bringing, owed in (
        (None, ["lngs"], True),
        (copies["tape"], ["lngs"], True),
        (copies["lngs"], ["lngs"], False),
        (None, ["xenon"], False),
        (None, [], False),
    ):
        assert should_be_there(copy, disks, bringing) == owed
    row = row_of(raw, None, None, owed=True)
    assert (row["note"], on_tape(row, {})["missing"]) == ("should be on tape", True)
    found = TapeSummary()
    found.count(row)
    assert found.words == "1 runs: 1 not on tape; 0 B on tape; 1 of them are missing on tape"


# -- killed ---------------------------------------------------------------------------------------


EACH = 5
"""Of so many points of a command one is tried: most are those of the steps."""


@pytest.mark.replicaset
@pytest.mark.tape
@pytest.mark.parametrize("words", ["get --to out", "get", "put"])
def test_killed_at_each_point_of_a_command(words: str, tmp_path: Path, database: Named) -> None:
    """Killed at any of the points that a command passes, and given again: as if nothing had been.

    What it restores stands whole under its name with nothing beside it, and a copy is asked for
    once.
    """
    ground = steps.ground_in(tmp_path, "tsm")
    manifest = ground.back_up().get()
    assert ground.compare() is None
    places = {"lngs": str(ground.source), TAPE: ground.folder}
    host = "lngs" if words == "put" else TAPE
    run = engine.run_document(1, ("raw", host, "transferred"), name=steps.RUN)
    run["data"][0] |= {"location": places[host], "manifest": manifest.digest, "checksum": "ab"}
    write_sites(tmp_path / "sites.json", ground.reach)
    out = tmp_path / "out"

    def command() -> None:
        options = ("--database", database.name, "--config", str(tmp_path / "sites.json"))
        os.chdir(tmp_path)
        arguments = ["tape", *words.split(), "--run", "1", "--mongo-uri", database.uri, *options]
        cli.main(arguments, prog_name="caxev")

    async def kept() -> None:
        async with aio.loop(), open_database(engine.settings_for(database)) as opened:
            await opened.store_manifest(manifest.digest, manifest.to_rows())
            sites = load_sites(tmp_path / "sites.json")
            await init_roots(opened, sites.get("lngs"), sites, force=True)

    trio.run(kept)
    with MongoClient[dict[str, Any]](database.uri) as client, engine.short_transactions(database):
        runs = client[database.name]["runs_new"]

        def begin() -> None:
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            runs.replace_one({"_id": run["_id"]}, run, upsert=True)

        def end() -> object:
            (found,) = runs.find()
            staging = sorted(path.name for path in (tmp_path / "tsm").rglob("*"))
            entries = [(one["host"], one["status"]) for one in found["data"]]
            return entries, steps.manifest_of(out).digest, staging

        begin()
        before = end()
        points = steps.points_of(command, tmp_path / "points")
        whole = end()
        assert points
        assert whole != before
        for point in points[::EACH]:
            begin()
            assert steps.killed_at(point, command), point
            assert not steps.killed_at("nowhere:1", command)
            assert end() == whole, point


def write_sites(file: Path, reach: Reach) -> None:
    """A sites.json with the site and the archive of the steps' ground."""
    options = reach.options
    archive = {"command": options.command, "environment": options.environment}
    here = {"name": "lngs", "dir_raw": reach.here.dir_raw, "dir_tsm": reach.here.dir_tsm}
    there = {"name": TAPE, "method": "tsm", "archive": archive}
    file.write_text(json.dumps([{**here, "upload_options": [TAPE]}, there]))


# -- with listeners -------------------------------------------------------------------------------

PATIENCE = 240.0  # seconds


@define
class Ground:
    """Two sites with listeners and a tape archive: one brings data there, the other takes it."""

    world: World
    runs: Collection[dict[str, Any]]
    ledger: Collection[dict[str, Any]]
    run: Any = None

    def take(self, number: int = 1) -> None:
        document = self.world.take_run("lngs", number, 300_000, seed=number)
        self.runs.insert_one(document)
        self.run = document["_id"]

    @property
    def document(self) -> dict[str, Any]:
        document = self.runs.find_one({"_id": self.run})
        assert document is not None
        return document

    def entry(self, host: str) -> dict[str, Any]:
        return next((one for one in self.document["data"] if one["host"] == host), {})

    def wait(self, what: str, holds: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < deadline, f"{what}: {self.document['data']}"
            time.sleep(0.05)

    def is_good(self, host: str) -> bool:
        return self.entry(host).get("status") == "transferred"

    def contents(self, host: str) -> dict[str, bytes]:
        path = Path(self.entry(host)["location"])
        return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Ground]:
    """Two sites that are idle, and tapes that fail as planned in the file ``faults``."""
    with (
        World(tmp_path / "world", TEMPLATE, dsmc=dsmc_faults.PROGRAM) as world,
        MongoClient[dict[str, Any]](world.mongod.uri, w="majority", tz_aware=True) as client,
    ):
        for name in world.listening:
            faults = {"DSMC_SIMULATOR_FAULTS": str(tmp_path / f"faults-{name}")}
            world.listen(name, environment=faults)
        yield Ground(world, client["run"]["runs_new"], client["run"]["caxev_ledger"])


@pytest.mark.replicaset
@pytest.mark.tape
def test_to_tape_and_back(ground: Ground, tmp_path: Path, caxev: Caxev) -> None:  # noqa: F811  # the fixture
    """A run goes to tape, comes back elsewhere, is checked, listed, forgotten; a wrong byte shows.

    A first backup that puts a wrong byte on tape is found out and made again. A run that is not
    fit for tape is parked, and its entry says why. What does not go on leaves nothing staged.
    """
    began = utcnow() - timedelta(seconds=1)
    (tmp_path / "faults-lngs").write_text("incremental wrong-byte\n")
    ground.take()
    ground.wait("not on tape", lambda: ground.is_good(TAPE))
    there, lngs = ground.entry(TAPE), ground.entry("lngs")
    name = Path(lngs["location"]).name
    assert there["resends"] == 1
    assert there["location"] == str(ground.world.dir_of("lngs", "dir_tsm") / name)
    assert (there["manifest"], there["checksum"]) == (lngs["manifest"], lngs["checksum"])
    assert not Path(there["location"]).exists()
    ground.wait("not back", lambda: ground.is_good("chicago"))
    assert ground.contents("chicago") == ground.contents("lngs")

    more = ("--mongo-uri", ground.world.mongod.uri, "--config", str(ground.world.sites.path))
    answer = caxev("reactions", "--done", "--handler", "backup", "--json", *more)
    (said,) = [row["said"] for row in answer.rows if "said" in row]
    for word in ("incremental", "query backup", "restore"):  # twice each: it was made again
        assert len(re.findall(rf"^\$ .*{word} ", said, re.MULTILINE)) >= 2
    assert said.count("\n$ ") + 1 == said.count("\nreturn code 0") + said.count("\nreturn code 8")

    for here in ("lngs", "chicago"):  # also from where no data was brought there
        answer = caxev("tape", "status", "--site", here, "--json", *more)
        assert (answer.code, answer.rows[0]["missing"]) == (0, False)
    answer = caxev("tape", "ls", "--run", "1", "--site", "lngs", "--json", *more)
    files = {f"{name}_{file}": len(data) for file, data in ground.contents("lngs").items()}
    assert {row["file"]: row["bytes"] for row in answer.rows} == files
    assert all(began < datetime.fromisoformat(row["time"]) <= utcnow() for row in answer.rows)
    (tmp_path / "out").mkdir()
    out = ("--to", str(tmp_path / "out"))
    answer = caxev("tape", "get", "--run", "1", "--site", "lngs", *out, *more)
    assert answer.code == 0
    assert {f.name: f.read_bytes() for f in (tmp_path / "out" / name).iterdir()} == (
        ground.contents("lngs")
    )

    assert caxev("tape", "check", "--run", "1", *more).code == 0
    (asked,) = ground.entry(TAPE)["check_asked"]
    ground.wait(
        "not read again", lambda: asked["id"] in ground.entry(TAPE).get("check_answered", [])
    )
    nothing_stays_staged(ground, tmp_path)
    for stored in (ground.world.directory / TAPE / "tapes" / "objects").iterdir():
        stored.write_bytes(bytes(stored.stat().st_size))
    assert caxev("tape", "check", "--run", "1", *more).code == 0
    ground.wait("not found out", lambda: ground.entry(TAPE)["status"] == "error")
    assert ground.entry(TAPE)["checksumproblem"]

    answer = caxev("tape", "forget", "--run", "1", "--why", "spoilt", "--yes", *more)
    assert answer.code == 0
    (tombstone,) = ground.document["deleted_data"]
    assert (tombstone["host"], tombstone["why"]) == (TAPE, "spoilt")

    document = ground.world.take_run("lngs", 2, 300_000, seed=2)
    raw = Path(document["data"][0]["location"])
    (raw / "copy.json").write_bytes((raw / "pax_info.json").read_bytes())
    ground.runs.insert_one(document)
    ground.run = document["_id"]
    ground.wait("not parked", lambda: ground.entry(TAPE).get("status") == "error")
    assert "copy.json and pax_info.json are alike" in ground.entry(TAPE)["error"]
    parked = {"handler": "backup", "state": "failed", "run": ground.run}
    ground.wait("not failed", lambda: ground.ledger.find_one(parked))


def nothing_stays_staged(ground: Ground, tmp_path: Path) -> None:
    """What is given up, or whose source goes bad meanwhile, leaves no links to it behind."""
    staging, first = ground.world.dir_of("lngs", "dir_tsm"), ground.run
    assert ground.is_good(TAPE)

    def staged() -> list[Path]:
        return [path for path in staging.iterdir() if not path.name.startswith(".")]

    (tmp_path / "faults-lngs").write_text("incremental path\n")
    ground.take(3)
    ground.wait("not given up", lambda: ground.entry(TAPE).get("status") == "error")
    assert "ANS1063E" in ground.entry(TAPE)["error"]
    assert not staged()
    (tmp_path / "faults-lngs").write_text("incremental quota\n")
    ground.take(4)
    ground.wait("not staged", staged)
    bad = {"$set": {"data.$.status": "error"}}
    ground.runs.update_one({"_id": ground.run, "data.host": "lngs"}, bad)
    ground.wait("not withdrawn", lambda: not ground.entry(TAPE))
    assert not staged()
    ground.run = first


@pytest.mark.replicaset
@pytest.mark.tape
@pytest.mark.campaign
async def test_killed_at_points_of_backup_and_recall() -> None:
    """Killed between two steps on the way to tape and back, or while that is read again."""
    with new_world(template=TEMPLATE) as world:
        async with ground_in(world, kind=TapeGround) as ground:
            figures = await crash(
                ground, rounds=0, seed=1, points=2, only=":tape.", together=True, act=asked, runs=1
            )
    # Not every run passes a point of the client's log files: see the campaign's long form.
    assert figures["faults"] == figures["reached"] >= 1
    assert figures["reached"] + len(figures["unreached"]) == 2
    assert figures["lost"] == figures["duplicated"] == figures["corrupt_accepted"] == 0


@pytest.mark.replicaset
@pytest.mark.tape
@pytest.mark.campaign
async def test_tapes_that_fail_at_random() -> None:
    """Whatever fails, every run ends on tape or parked, and nothing wrong is accepted.

    One is refused: it waits, with the code and the text of that, until the refusal is lifted.
    """
    with new_world(template=TEMPLATE) as world:
        async with ground_in(world, kind=TapeGround) as ground:
            figures = await campaign(ground, rounds=2, seed=3, chance=0.1)
    assert figures["refused"] == 1
    assert figures["lost"] == figures["duplicated"] == figures["corrupt_accepted"] == 0
