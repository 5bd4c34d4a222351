"""Commands on copies: mv, register, verify, stray, and the totals of status."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import frozen
from bson import ObjectId
from pymongo import MongoClient

from caxev import GiveUp, Job, copy_field
from caxev.cli import mv as mv_module
from caxev.cli.inventory import ClaimedPlace, Find, Inventory, Kind, measured, places
from caxev.cli.mv import Move, bring, plan_move
from caxev.cli.site_paths import key_of
from caxev.cli.verify import compare
from caxev.config import Site
from caxev.core.model import Copy, CopyKey, Run
from caxev.files import digest_tree, process_lock
from caxev.files.roots import MARKER_PREFIX
from tests import engine
from tests.conftest import Database as Named
from tests.places import vouched
from tests.test_cli import (  # noqa: F401  # fixtures
    Answer,
    Caxev,
    assert_one_line,
    caxev,
    contents,
    online,
)

RAW = CopyKey("raw", "lngs")
NAME = "161111_1434"
SHM = Path("/dev/shm")


def write_run(path: Path, *, files: int = 3) -> Path:
    path.mkdir(parents=True)
    for number in range(files):
        (path / f"XENON1T-1-{number}.zip").write_bytes(bytes([number]) * 1000)
    return path


def is_marker(path: Path) -> bool:
    """Whether it is the file by which a directory is known."""
    return path.name.startswith(MARKER_PREFIX)


def elsewhere() -> bool:
    """Whether there is another file system to move to."""
    return (
        os.access(SHM, os.W_OK) and SHM.stat().st_dev != Path(tempfile.gettempdir()).stat().st_dev
    )


@frozen
class Ground:
    """A site of this machine with a database, and the command line."""

    caxev: Caxev
    database: Named
    root: Path
    far: Path

    @property
    def raw(self) -> Path:
        return self.root / "raw"

    def insert(self, *entries: dict[str, Any], number: int = 1, **fields: Any) -> ObjectId:
        """Insert a run with these entries, at lngs and raw unless they say otherwise."""
        usual = {"type": "raw", "host": "lngs", "status": "transferred", "checksum": None}
        document = engine.run_document(number, **{"name": NAME, **fields})
        document["data"] = [{**usual, **entry} for entry in entries]
        with self._runs() as runs:
            runs.insert_one(document)
        return ObjectId(document["_id"])

    def run(self, number: int = 1) -> dict[str, Any]:
        with self._runs() as runs:
            found = runs.find_one({"number": number})
        assert found is not None
        return dict(found)

    def entry(self, number: int = 1) -> dict[str, Any]:
        (entry,) = self.run(number)["data"]
        found: dict[str, Any] = entry
        return found

    def change(self, **fields: Any) -> None:
        with self._runs() as runs:
            runs.update_one(
                {}, {"$set": {f"data.0.{name}": value for name, value in fields.items()}}
            )

    def remove(self, run: ObjectId) -> None:
        with self._runs() as runs:
            runs.delete_one({"_id": run})

    def store_manifest(self, path: Path) -> str:
        """Keep the manifest of a tree in the database, as the checksum reaction does."""
        manifest = digest_tree(vouched(path), sha512=True, report=lambda _done, _total: None)

        async def store() -> None:
            async with engine.opened(self.database) as db:
                await db.store_manifest(manifest.digest, manifest.to_rows())

        trio.run(store)
        return manifest.digest

    def _runs(self) -> Any:
        return _collection(self.database)


class _collection:  # noqa: N801  # a context manager
    def __init__(self, database: Named) -> None:
        self.client = MongoClient[dict[str, Any]](database.uri, tz_aware=True)
        self.runs = self.client[database.name]["runs_new"]

    def __enter__(self) -> Any:
        return self.runs

    def __exit__(self, *_: object) -> None:
        self.client.close()


@pytest.fixture
def ground(
    online: Caxev,  # noqa: F811  # the fixture
    database: Named,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Ground]:
    """A site whose processed data is on another file system, where there is one."""
    with tempfile.TemporaryDirectory(dir=SHM if elsewhere() else None) as far:
        root = tmp_path / "lngs"
        for path in (root / "raw", Path(far) / "processed"):
            path.mkdir(parents=True)
        sites = [
            {"name": "lngs", "dir_raw": str(root / "raw"), "dir_processed": f"{far}/processed"},
            {"name": "chicago", "hostname": "chicago.example.org", "dir_raw": str(root / "raw")},
            {"name": "none", "dir_raw": "/nowhere/raw"},
        ]
        (tmp_path / "sites.json").write_text(json.dumps(sites))
        monkeypatch.setattr(os, "nice", lambda _by: 0)  # this process has more to do
        assert online("sites", "init", "--site", "lngs").code == 0
        yield Ground(online, database, root, Path(far) / "processed")


def rows(answer: Answer, code: int = 0) -> list[dict[str, Any]]:
    assert answer.code == code, answer
    return answer.rows


# -- mv -------------------------------------------------------------------------------------------


def move_to(ground: Ground, to: Path, *more: str) -> Answer:
    return ground.caxev("mv", "--run", "1", "--site", "lngs", "--to", str(to), "--json", *more)


@pytest.mark.replicaset
@pytest.mark.parametrize("where", ["near", "far"])
def test_mv_moves_the_files_and_tells_the_database(ground: Ground, where: str) -> None:
    """The files stand at the new place alone, and the entry is good there as it was before."""
    old = write_run(ground.raw / NAME)
    digest = ground.store_manifest(old)
    ground.insert({"location": str(old), "manifest": digest, "x": 1})
    to = ground.raw / "2016" if where == "near" else ground.far / "2016"
    would = rows(move_to(ground, to, "--dry-run"))[0]
    assert (would["state"], old.exists(), to.exists()) == ("would be moved", True, False)
    (row,) = rows(move_to(ground, to))
    assert (row["state"], row["to"]) == ("moved", str(to / NAME))
    entry = ground.entry()
    assert (entry["status"], entry["location"], entry["x"]) == ("transferred", str(to / NAME), 1)
    assert {entry[name] for name in ("moving_to", "moved_from", "owner") if name in entry} <= {None}
    assert ground.store_manifest(to / NAME) == digest
    assert [path for path in ground.raw.glob(".*") if not is_marker(path)] == []
    assert not old.exists()
    assert rows(move_to(ground, to / NAME))[0]["state"] == "already there"


@pytest.mark.replicaset
def test_mv_refuses(ground: Ground) -> None:
    """A place not the site's, taken, inside of the copy; a copy not good; another machine."""
    old = write_run(ground.raw / NAME)
    ground.insert({"location": str(old)})
    before = contents(ground.database)

    def refused(*args: str) -> Answer:
        return ground.caxev("mv", "--run", "1", "--site", "lngs", *args)

    assert_one_line(refused("--to", "/tmp"), 1, "is not inside")
    assert_one_line(refused("--to", str(old / "sub")), 1, "is inside the directory")
    (ground.raw / "taken").mkdir()
    (ground.raw / "taken" / NAME).touch()
    assert_one_line(refused("--to", str(ground.raw / "taken")), 1, "exists already")
    assert_one_line(
        refused("--type", "processed", "--to", str(ground.raw)), 1, "has no processed copy at lngs"
    )
    away = ground.caxev("mv", "--run", "1", "--site", "none", "--to", "/nowhere/raw/x")
    assert_one_line(away, 3, "run this at none itself")
    no_run = ground.caxev("mv", "--run", "9", "--site", "lngs", "--to", "/x")
    assert_one_line(no_run, 5, "no run 9")
    assert contents(ground.database) == before
    ground.change(status="verifying")
    assert_one_line(refused("--to", str(ground.raw / "x")), 1, "only a transferred copy")
    assert sorted(path.name for path in old.iterdir()) == [f"XENON1T-1-{i}.zip" for i in range(3)]


@pytest.mark.replicaset
def test_two_mv_of_one_copy_never_meet(ground: Ground) -> None:
    """While another process moves it, a second one takes nothing back of what that has claimed."""
    old = write_run(ground.raw / NAME)
    to = ground.raw / "x"
    moving = {"status": "moving", "moving_to": str(to / NAME), "owner": "another"}
    run = ground.insert({"location": str(old), **moving})
    before = ground.entry()
    with process_lock(f"mv {run} {CopyKey('raw', 'lngs')}".encode(), "busy"):
        answer = move_to(ground, to)
    assert (answer.code, "moved by another process" in answer.err) == (1, True)
    assert (ground.entry(), old.exists()) == (before, True)
    assert rows(move_to(ground, to))[0]["state"] == "moved"


@pytest.mark.replicaset
def test_mv_waits_for_no_copy_that_others_make_of_it(ground: Ground) -> None:
    """While another site copies from it the copy stays where it is."""
    old = write_run(ground.raw / NAME)
    reader = {"host": "chicago", "status": "transferring", "source": "lngs", "location": "/c"}
    ground.insert({"location": str(old)}, reader)
    answer = ground.caxev("mv", "--run", "1", "--site", "lngs", "--to", str(ground.raw / "x"))
    assert_one_line(answer, 1, "is being read or has just changed")
    assert old.exists()
    assert ground.run()["data"][0]["status"] == "transferred"


@pytest.mark.replicaset
def test_mv_of_files_that_are_not_what_they_were_changes_nothing(ground: Ground) -> None:
    """The manifest is checked first; the entry is good where it was when nothing was moved."""
    old = write_run(ground.raw / NAME)
    ground.insert({"location": str(old), "manifest": ground.store_manifest(old)})
    (old / "XENON1T-1-0.zip").write_bytes(b"short")
    answer = ground.caxev("mv", "--run", "1", "--site", "lngs", "--to", str(ground.raw / "x"))
    assert_one_line(answer, 1, "differs from its manifest", "XENON1T-1-0.zip differs")
    entry = ground.entry()
    assert (entry["status"], entry["location"]) == ("transferred", str(old))
    assert not (ground.raw / "x" / NAME).exists()


@pytest.mark.replicaset
def test_mv_that_was_killed_is_finished_first(ground: Ground) -> None:
    """Where it was going it goes on (`tests.test_killed_commands`), and nowhere else meanwhile."""
    old = write_run(ground.raw / NAME)
    ground.insert({"location": str(old), "manifest": ground.store_manifest(old)})
    to = ground.raw / "2016"
    killed = subprocess.run(
        [sys.executable, "-m", "caxev", "mv", "--run", "1", "--site", "lngs", "--to", str(to)],
        env={**os.environ, "CAXEV_CRASH": "engine:mv.claimed:1"},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    entry = ground.entry()
    assert (entry["status"], entry["moving_to"]) == ("moving", str(to / NAME))
    other = ground.caxev("mv", "--run", "1", "--site", "lngs", "--to", str(ground.raw / "y"))
    assert_one_line(other, 1, "is being moved to")
    assert rows(move_to(ground, to))[0]["state"] == "moved"
    assert ground.entry()["status"] == "transferred"


@pytest.mark.replicaset
async def test_mv_waits_for_reactions_that_read_the_copy(
    database: Named, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reaction that is at work on the run here is waited for; then the files are moved."""
    raw = tmp_path / "raw"
    old = write_run(raw / NAME)
    began, go_on = trio.Event(), trio.Event()
    seen: list[bool] = []

    async def reads(job: Job) -> None:
        began.set()
        await go_on.wait()
        seen.append(old.exists())

    handler = engine.handler(reads, copy_field("check_asked", host="lngs"))
    options = engine.options_for(database, [handler], site_fields={"dir_raw": str(raw)})
    entry = {"type": "raw", "host": "lngs", "status": "transferred", "location": str(old)}
    document = engine.run_document(1, data=[{**entry, "check_asked": datetime.now(UTC)}])
    waiting = trio.Event()
    monkeypatch.setattr("click.echo", lambda *_, **__: waiting.set())
    async with engine.opened(database) as db:
        await db.insert_run(document)
        async with engine.listener(db, options), trio.open_nursery() as nursery:
            with trio.fail_after(engine.PATIENCE):
                await began.wait()
            from caxev.cli.selection import named

            moving = mv_module.MoveCommand(
                options.site, options.sites, RAW, named(1, None), str(raw / "x")
            )
            nursery.start_soon(moving.go, db)
            with trio.fail_after(engine.PATIENCE):
                await waiting.wait()
            assert old.exists()
            go_on.set()
            await engine.until((raw / "x" / NAME).exists)
    assert seen == [True]


def test_bring_puts_nothing_over_anything(tmp_path: Path) -> None:
    """What has the new name already stands as it was, and so do the old files."""
    site = Site(name="lngs", dir_raw=str(tmp_path))
    old, new = write_run(tmp_path / NAME), tmp_path / "x" / NAME
    new.mkdir(parents=True)
    (new / "other").touch()
    move = Move(Copy(RAW, "moving"), str(old), str(new))
    with pytest.raises(GiveUp, match="exists already"):
        bring(move, site, None)
    assert len(list(old.iterdir())) == 3
    assert [path.name for path in new.iterdir()] == ["other"]
    gone = Move(Copy(RAW, "moving"), str(tmp_path / "gone"), str(tmp_path / "nor" / "gone"))
    with pytest.raises(GiveUp, match="there is nothing at"):
        bring(gone, site, None)


def test_a_move_keeps_the_name(tmp_path: Path) -> None:
    """PATH is the directory that is to have the copy, or ends in the copy's own name."""
    site = Site(name="lngs", dir_raw=str(tmp_path))
    entry = {"type": "raw", "host": "lngs", "status": "transferred", "location": f"{tmp_path}/r"}
    run = Run.from_document({"_id": 1, "data": [entry]})
    for to in (f"{tmp_path}/x", f"{tmp_path}/x/", f"{tmp_path}/x/r", f"{tmp_path}/y/../x"):
        assert plan_move(run, RAW, site, to).new == f"{tmp_path}/x/r"


def test_a_move_that_continues_syncs_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before it did, and after a power cut the files would not be where the entry says."""
    site = Site(name="lngs", dir_raw=str(tmp_path))
    (tmp_path / "x" / "r").mkdir(parents=True)
    synced: list[str] = []
    monkeypatch.setattr("caxev.cli.mv.sync", lambda path: synced.append(os.fsdecode(path)))
    entry = {"location": f"{tmp_path}/r"}
    move = Move(Copy(RAW, "moving", entry), f"{tmp_path}/r", f"{tmp_path}/x/r")
    assert bring(move, site, None) is None
    assert sorted(synced) == [str(tmp_path), f"{tmp_path}/x"]


# -- register -------------------------------------------------------------------------------------


@pytest.mark.replicaset
def test_register_adds_an_entry(ground: Ground) -> None:
    """The run of that name gets an entry whose files are yet to be read; a second time it has."""
    ground.insert(host_free := {"host": "chicago", "location": "/c"})
    path = write_run(ground.raw / NAME)
    before = contents(ground.database)
    dry = ground.caxev("register", str(path), "--site", "lngs", "--dry-run")
    assert (dry.code, contents(ground.database)) == (0, before)
    (row,) = rows(ground.caxev("register", str(path), "--site", "lngs", "--json"))
    assert (row["state"], row["run"]["number"], row["type"]) == ("registered", 1, "raw")
    first, entry = ground.run()["data"]
    assert first["host"] == host_free["host"]
    assert entry.pop("creation_time") <= entry.pop("status_since")
    assert entry == {
        "type": "raw",
        "host": "lngs",
        "status": "verifying",
        "location": str(path),
        "checksum": None,
        "creation_place": "lngs",
    }
    assert_one_line(
        ground.caxev("register", str(path), "--site", "lngs"), 1, "already has this copy"
    )


@pytest.mark.replicaset
def test_register_can_make_the_run(ground: Ground) -> None:
    """Without --create a run that there is not is told; with it, it is made, once."""
    path = write_run(ground.raw / NAME)
    there = ("register", str(path), "--site", "lngs")
    assert_one_line(ground.caxev(*there), 5, f"no run '{NAME}'")
    assert ground.caxev(*there, "--run", "7", "--create", "--dry-run").code == 0
    assert_one_line(ground.caxev(*there, "--run", "7"), 5, "no run 7")
    assert ground.caxev(*there, "--run", "7", "--create").code == 0
    run = ground.run(7)
    assert (run["name"], run["detector"], run["tags"]) == (NAME, "tpc", [])
    assert run["start"] == datetime(2016, 11, 11, 14, 34, tzinfo=UTC)
    assert [entry["location"] for entry in run["data"]] == [str(path)]
    assert_one_line(ground.caxev(*there, "--run", "7", "--create"), 1, "already has this copy")


@pytest.mark.replicaset
def test_register_takes_no_files_of_another_run(ground: Ground) -> None:
    """What an entry has already, or has around it, gets no second entry; nor under a wrong name."""
    path = write_run(ground.raw / NAME)
    ground.insert(name="another")
    there = ("register", str(path), "--site", "lngs")
    other = ground.caxev(*there, "--run", "1")
    assert_one_line(other, 1, "is not the name of run 1", "--any-name")
    new = ground.caxev(*there, "--name", "new", "--create")
    assert_one_line(new, 1, "is not the name of run new")
    for number, location in enumerate((path, path / "below", f"{path}/"), start=2):
        id_ = ground.insert({"location": str(location)}, number=number, name=f"r{number}")
        for more in (("--run", "1", "--any-name"), ("--create", "--dry-run")):
            assert_one_line(ground.caxev(*there, *more), 1, f"raw at lngs of run {number}")
        ground.remove(id_)
    assert ground.caxev(*there, "--run", "1", "--any-name").code == 0
    assert ground.entry()["location"] == str(path)


@pytest.mark.replicaset
def test_register_and_mv_name_places_as_sites_json_does(ground: Ground) -> None:
    """Where dir_raw is a link the entries' locations begin with it: so the copies may go again."""
    link = ground.root / "link"
    link.symlink_to(ground.raw)
    entries = json.loads(Path("sites.json").read_text())
    entries[0]["dir_raw"] = str(link)
    Path("sites.json").write_text(json.dumps(entries))
    assert ground.caxev("sites", "init", "--site", "lngs").code == 0
    ground.insert()
    write_run(ground.raw / NAME)
    assert ground.caxev("register", str(ground.raw / NAME), "--site", "lngs").code == 0
    assert ground.entry()["location"] == f"{link}/{NAME}"
    ground.change(status="transferred")
    assert move_to(ground, ground.raw / "2016").code == 0
    assert ground.entry()["location"] == f"{link}/2016/{NAME}"
    ground.insert(number=2, name="161112_0000")
    write_run(ground.raw / "161112_0000")
    assert stray(ground, "--register")["161112_0000"] == "registered"
    assert ground.entry(2)["location"] == f"{link}/161112_0000"
    ground.insert({"location": f"{link}/161113_0000"}, number=3, name="known")
    known = write_run(ground.raw / "161113_0000")
    taken = ground.caxev("register", str(known), "--site", "lngs", "--create")
    assert_one_line(taken, 1, "of run 3")


@pytest.mark.replicaset
def test_register_of_derived_data(ground: Ground) -> None:
    """The type and the version follow from the directory, the run from the file's name."""
    ground.insert()
    file = ground.far / "pax_v6.8.0" / f"{NAME}.root"
    file.parent.mkdir()
    file.touch()
    assert ground.caxev("register", str(file), "--site", "lngs").code == 0
    entry = ground.entry()
    assert (entry["type"], entry["pax_version"]) == ("processed", "v6.8.0")
    nothing = ground.caxev("register", str(ground.raw / "no"), "--site", "lngs")
    assert_one_line(nothing, 1, "there is nothing at")
    for wrong in (ground.far / "pax_v6.8.0", ground.raw, Path("/tmp")):
        assert_one_line(ground.caxev("register", str(wrong), "--site", "lngs"), 1, "no")


def test_what_a_place_holds(tmp_path: Path) -> None:
    """A copy stands right below the site's directory for its type, or below a version there."""
    site = Site(name="lngs", dir_raw=f"{tmp_path}/raw", dir_processed=f"{tmp_path}/p")
    assert key_of(site, f"{tmp_path}/raw/{NAME}") == RAW
    assert key_of(site, f"{tmp_path}/p/pax_v1/x.root") == CopyKey("processed", "lngs", "v1")
    for wrong in ("raw/a/b", "p/x.root", "p/pax_/x", "p/pax_v1/a/b", "other/x"):
        with pytest.raises(GiveUp, match="not a place for copies"):
            key_of(site, f"{tmp_path}/{wrong}")


# -- verify ---------------------------------------------------------------------------------------


@pytest.mark.replicaset
def test_verify_tells_good_from_bad(ground: Ground) -> None:
    """Presence and sizes without --deep, contents with it; exit code 1 where a copy is bad."""
    old = write_run(ground.raw / NAME)
    digest = ground.store_manifest(old)
    ground.insert({"location": str(old), "manifest": digest})
    assert rows(ground.caxev("verify", "--run", "1", "--json"))[0]["found"] == "good"
    assert rows(ground.caxev("verify", "--run", "1", "--deep", "--json"))[0]["found"] == "good"
    (old / "XENON1T-1-0.zip").write_bytes(b"x" * 1000)  # as long as before
    assert rows(ground.caxev("verify", "--site", "lngs", "--json"))[0]["found"] == "good"
    assert "check_asked" not in ground.entry()
    (row,) = rows(ground.caxev("verify", "--site", "lngs", "--deep", "--json"), 1)
    assert (row["found"], row["why"]) == ("bad", "1 files: XENON1T-1-0.zip differs")
    assert len(ground.entry()["check_asked"]) == 1  # its listener is to look itself
    (old / "XENON1T-1-1.zip").unlink()
    (row,) = rows(ground.caxev("verify", "--run", "1", "--json"), 1)
    assert row["why"] == "1 files: XENON1T-1-1.zip is missing"
    ground.change(location=str(ground.raw / "gone"))
    (row,) = rows(ground.caxev("verify", "--run", "1", "--json"), 1)
    assert row["found"] == "gone"
    ground.change(location="/etc")
    (row,) = rows(ground.caxev("verify", "--run", "1", "--json"), 1)
    assert "not inside" in row["why"]


@pytest.mark.replicaset
def test_verify_of_what_the_disk_does_not_give(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that cannot be read is no good one: the exit code is 1, and its listener is asked."""
    old = write_run(ground.raw / NAME)
    ground.insert({"location": str(old), "manifest": ground.store_manifest(old)})

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("caxev.files.reading.open_uncached", fails)
    assert rows(ground.caxev("verify", "--run", "1", "--json"))[0]["found"] == "good"
    (row,) = rows(ground.caxev("verify", "--run", "1", "--deep", "--json"), 1)
    assert (row["found"], "Input/output error" in row["why"]) == ("unreadable", True)
    assert len(ground.entry()["check_asked"]) == 1


@pytest.mark.replicaset
def test_verify_of_several_copies(ground: Ground) -> None:
    """Each is compared with its own manifest, in the order of the runs; some are not here."""
    for number in range(1, 7):
        old = write_run(ground.raw / f"run{number}", files=number)
        here = {"location": str(old), "manifest": ground.store_manifest(old)}
        ground.insert({"host": "chicago", "location": "/c"}, here, number=number, name=old.name)
    shutil.rmtree(ground.raw / "run2")
    (ground.raw / "run5" / "XENON1T-1-4.zip").unlink()
    found = rows(ground.caxev("verify", "--run", "1-6", "--json"), 1)
    results = ("good", "gone", "good", "good", "bad", "good")
    assert [(row["run"]["number"], row["host"], row["found"]) for row in found] == [
        row
        for number, result in enumerate(results, 1)
        for row in ((number, "chicago", "not checked"), (number, "lngs", result))
    ]
    assert found[9]["why"] == "1 files: XENON1T-1-4.zip is missing"


@pytest.mark.replicaset
def test_verify_by_caxs_checksum(ground: Ground) -> None:
    """A copy that only has the checksum of cax is compared by that, where it is read."""
    old = write_run(ground.raw / NAME)
    manifest = digest_tree(vouched(old), sha512=True, report=lambda _done, _total: None)
    ground.insert({"location": str(old), "checksum": manifest.cax_checksum()})
    assert rows(ground.caxev("verify", "--run", "1", "--json"))[0]["found"] == "there"
    assert rows(ground.caxev("verify", "--run", "1", "--deep", "--json"))[0]["found"] == "good"
    ground.change(checksum="00")
    assert rows(ground.caxev("verify", "--run", "1", "--deep", "--json"), 1)[0]["found"] == "bad"
    ground.change(checksum=None)
    (row,) = rows(ground.caxev("verify", "--run", "1", "--deep", "--json"))
    assert row["found"] == "not compared"


@pytest.mark.replicaset
def test_verify_asks_other_sites(ground: Ground) -> None:
    """A copy elsewhere is asked for with --deep alone, in a field that is no change of status."""
    ground.insert({"host": "chicago", "location": "/c/raw/x", "status_since": None})
    before = contents(ground.database)
    assert rows(ground.caxev("verify", "--run", "1", "--json"))[0]["found"] == "not checked"
    assert contents(ground.database) == before
    assert rows(ground.caxev("verify", "--run", "1", "--deep", "--json"))[0]["found"] == "asked"
    entry = ground.entry()
    assert isinstance(entry["check_asked"][0]["at"], datetime)
    assert (entry["status"], entry["status_since"]) == ("transferred", None)
    assert_one_line(ground.caxev("verify", "--run", "9"), 5, "no run 9")
    assert ground.caxev("verify").code == 2


# -- status ---------------------------------------------------------------------------------------


@pytest.mark.replicaset
def test_status_of_copies_and_totals(ground: Ground) -> None:
    """Copies by host, status and type; sums of them with the bytes that are known."""
    ground.insert({"location": "/a"}, {"host": "chicago", "status": "error"}, raw_size_byte=100)
    processed = {"type": "processed", "pax_version": "v1", "size": 7}
    ground.insert({"location": "/b"}, processed, {**processed, "pax_version": "v2"}, number=2)
    odd = {"type": None, "host": 3}
    ground.insert(odd, {"status": "error"}, number=3, raw_size_byte=5)
    for number, size in enumerate((nan, inf, -1.0, "7", None), 4):
        ground.insert({"host": "chicago", "size": size}, number=number, raw_size_byte=size)
    found = rows(ground.caxev("status", "--host", "lngs", "--status", "transferred", "--json"))
    assert [(row["run"]["number"], row["type"], row["bytes"]) for row in found] == [
        (1, "raw", 100),
        (2, "raw", None),
        (2, "processed", 7),
        (2, "processed", 7),
    ]
    totals = rows(ground.caxev("status", "--totals", "--json"))
    assert [tuple(row.values()) for row in totals] == [
        ("chicago", "raw", "error", 1, 0, 0),
        ("chicago", "raw", "transferred", 5, 0, 0),
        ("lngs", "processed", "transferred", 2, 2, 14),
        ("lngs", "raw", "error", 1, 0, 0),
        ("lngs", "raw", "transferred", 2, 1, 100),
    ]
    of_errors = rows(ground.caxev("status", "--totals", "--status", "error", "--json"))
    assert [row["host"] for row in of_errors] == ["chicago", "lngs"]
    assert "transferred  2       100 B" in ground.caxev("status", "--totals").out
    assert "there are no such copies" in ground.caxev("status", "--host", "none").out
    assert ground.caxev("status", "--totals", "--site", "lngs").code == 2


# -- Ctrl-C ---------------------------------------------------------------------------------------


async def interrupted(work: Callable[..., object], *args: object) -> None:
    """Wait for work in a thread, in which somebody presses Ctrl-C."""

    async def wait() -> None:
        await trio.to_thread.run_sync(partial(work, *args))
        await trio.lowlevel.checkpoint()  # else it would hit another test

    with pytest.raises(KeyboardInterrupt):
        await wait()


async def test_ctrl_c_ends_the_reading_of_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not read to its end first, which may take an hour."""
    counts: list[int] = []

    def slow(_root: object, *, sha512: bool, report: Callable[[int, int], object]) -> None:
        assert sha512
        signal.raise_signal(signal.SIGINT)
        for number in range(1000):
            counts.append(number)
            report(number, 1000)
            time.sleep(0.01)

    monkeypatch.setattr("caxev.cli.verify.digest_tree", slow)
    path = write_run(tmp_path / NAME)
    copy = Copy(CopyKey("raw", "lngs"), "transferred", {"location": str(path)})
    await interrupted(compare, copy, Site("lngs", dir_raw=str(tmp_path)), None, True)
    assert len(counts) < 1000


@pytest.mark.replicaset
def test_ctrl_c_ends_a_move_to_another_disk(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are copied, which takes long, and stay where they were: the entry counts again."""
    if not elsewhere():
        pytest.skip("there is one file system only")
    old = write_run(ground.raw / NAME)
    ground.insert({"location": str(old)})
    counts: list[int] = []

    def slow(_mover: object, _route: object, *, report: Callable[[int, int], object]) -> None:
        signal.raise_signal(signal.SIGINT)
        for number in range(1000):
            counts.append(number)
            report(number, 1000)
            time.sleep(0.01)

    monkeypatch.setattr("caxev.transfer.local.Local.pull", slow)
    assert move_to(ground, ground.far / "2016").code == 130
    assert len(counts) < 1000
    entry = ground.entry()
    assert (entry["status"], entry["location"]) == ("transferred", str(old))
    assert (entry["moving_to"], old.exists()) == (None, True)


async def test_ctrl_c_ends_the_walk_through_a_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not only once all files are seen, of which there may be millions."""
    for number in range(1000):
        (tmp_path / str(number)).touch()
    seen: list[bytes] = []

    def slow(path: bytes, kind: Kind) -> Find:
        if not seen:
            signal.raise_signal(signal.SIGINT)
        seen.append(path)
        time.sleep(0.01)
        return Find(path, kind, 1, 0, 0.0)

    monkeypatch.setattr("caxev.cli.inventory.measured", slow)
    with Inventory() as inventory:
        await interrupted(inventory.walk, Site("lngs", dir_raw=str(tmp_path)))
    assert len(seen) < 1000


# -- stray ----------------------------------------------------------------------------------------


def stray(ground: Ground, *more: str, code: int = 0) -> dict[str, str]:
    """What was found, by the name of its path, with its state."""
    age = ("--age", "0") if {"--delete", "--register"}.intersection(more) else ()
    answer = ground.caxev("stray", "--site", "lngs", *age, "--json", *more)
    return {Path(row["path"]).name: row["state"] for row in rows(answer, code)}


def littered(ground: Ground) -> None:
    """Two runs known, one of them gone; and what nobody knows."""
    ground.insert({"location": str(write_run(ground.raw / NAME))})
    ground.insert({"location": str(ground.raw / "gone")}, number=2, name="gone")
    ground.insert({"location": str(write_run(ground.raw / "deep" / "known"))}, number=3, name="k")
    moving = {"status": "transferring", "location": str(ground.raw / "coming")}
    ground.insert(moving, number=4, name="coming")
    ground.insert(number=5, name="stray")
    write_run(ground.raw / ".caxev-part-coming")
    write_run(ground.raw / ".caxev-part-left")
    (ground.raw / ".caxev-jobs").mkdir()
    (ground.raw / ".caxev-jobs" / "log").touch()
    write_run(ground.raw / "stray" / "sub")
    write_run(ground.raw / "deep" / "other")
    (ground.raw / "empty").mkdir()
    (ground.raw / "link").symlink_to(ground.raw / NAME)
    (ground.far / "pax_v1").mkdir()
    for name in (NAME, "alien"):
        (ground.far / "pax_v1" / f"{name}.root").write_text("x")


@pytest.mark.replicaset
def test_stray_finds_both(ground: Ground) -> None:
    """What no entry names, each as a whole, and copies whose files are gone; nothing is touched."""
    littered(ground)
    before = contents(ground.database)
    assert stray(ground) == {
        ".caxev-part-left": "unknown",
        "stray": "unknown",
        "other": "unknown",
        "link": "unknown",
        f"{NAME}.root": "unknown",
        "alien.root": "unknown",
        "gone": "raw of run 2",
    }
    assert contents(ground.database) == before
    plain = [line.split() for line in ground.caxev("stray", "--site", "lngs").out.splitlines()]
    assert ["stray", "3", "3", "kB", f"{ground.raw}/stray", "unknown"] in plain


@pytest.mark.replicaset
def test_stray_deletes_what_nobody_knows_and_nothing_else(ground: Ground) -> None:
    """Every known file stands afterwards; a link goes, and what it leads to stays."""
    littered(ground)
    would = stray(ground, "--delete", "--dry-run")
    assert set(would.values()) == {"would be deleted", "raw of run 2"}
    young = ground.caxev("stray", "--site", "lngs", "--delete", "--json")
    assert {row["state"] for row in rows(young) if row["what"] != "gone"} == {
        "left alone: it has changed recently"
    }
    before = contents(ground.database)
    assert set(stray(ground, "--delete").values()) == {"deleted", "raw of run 2"}
    assert contents(ground.database) == before
    left = {path.name for path in ground.raw.glob("*") if not is_marker(path)}
    assert left == {NAME, ".caxev-part-coming", ".caxev-jobs", "deep", "empty"}
    assert [path.name for path in (ground.raw / "deep").iterdir()] == ["known"]
    assert len(list((ground.raw / NAME).iterdir())) == 3
    assert stray(ground) == {"gone": "raw of run 2"}


@pytest.mark.replicaset
def test_what_an_entry_without_a_type_or_a_host_names_is_no_stray(ground: Ground) -> None:
    """Somebody has edited it by hand: the files may be the only ones of that run."""
    littered(ground)
    edited: list[dict[str, Any]] = [{"type": one} for one in (None, "", 5)]
    edited += [{"host": None}, {"host": ""}]
    for number, fields in enumerate(edited, 6):
        path = write_run(ground.raw / f"edited{number}")
        ground.insert({**fields, "location": str(path)}, number=number, name=f"edited{number}")
    found = {name for name in stray(ground, "--delete") if name.startswith(("edited", "stray"))}
    assert found == {"stray"}
    assert len(list(ground.raw.glob("edited*"))) == len(edited)


@pytest.mark.replicaset
def test_the_files_of_an_entry_without_a_host_need_not_be_here(ground: Ground) -> None:
    """They may be at any site, and are missing at none."""
    here = {"location": str(write_run(ground.raw / NAME))}
    ground.insert(here, {"host": None, "location": str(ground.raw / "nowhere")})
    assert stray(ground) == {}


@pytest.mark.replicaset
def test_stray_of_selected_runs(ground: Ground) -> None:
    """Their entries, and files named as they are: what else is there is neither shown nor gone."""
    littered(ground)
    assert stray(ground, "--run", "1-2") == {f"{NAME}.root": "unknown", "gone": "raw of run 2"}
    assert stray(ground, "--name", "str*", "--delete") == {"stray": "deleted"}
    assert {*stray(ground)} == {".caxev-part-left", "other", "link"} | {
        f"{NAME}.root",
        "alien.root",
        "gone",
    }
    assert_one_line(ground.caxev("stray", "--site", "lngs", "--run", "77"), 5, "no run 77")
    # What a broken transfer of the run has left is named as the run behind our prefix.
    ground.insert(number=6, name="left")
    assert stray(ground, "--run", "6") == {".caxev-part-left": "unknown"}
    ground.insert(number=7, name="")
    assert stray(ground, "--run", "7", "--delete") == {}
    assert (ground.raw / ".caxev-part-left").exists()
    write_run(ground.raw / ".hidden")  # nothing stands before its dot, as in no run's name
    assert stray(ground, "--run", "7", "--register") == {}
    assert "is not the name of" in stray(ground, "--register")[".hidden"]


@pytest.mark.replicaset
def test_what_stands_beside_a_stray_file_does_not_matter(ground: Ground) -> None:
    """A link of any name may lead anywhere."""
    littered(ground)
    (ground.raw / "x").symlink_to("/")
    assert stray(ground, "--delete")["stray"] == "deleted"
    assert not (ground.raw / "stray").exists()


def test_what_another_site_on_the_machine_knows_is_no_stray(ground: Ground) -> None:
    """Two sites of one host name may have one directory: neither deletes what the other has."""
    littered(ground)
    theirs = {"host": "chicago", "location": str(ground.raw / "stray")}
    ground.insert(theirs, number=6, name="theirs")
    entries = json.loads(Path("sites.json").read_text())
    for entry in entries:
        entry["hostname"] = "data1.example.org"
    Path("sites.json").write_text(json.dumps(entries))
    assert {"stray", "other"} & stray(ground, "--delete").keys() == {"other"}
    assert (ground.raw / "stray").exists()


@pytest.mark.replicaset
def test_stray_registers_what_is_a_runs(ground: Ground) -> None:
    """Only what stands where a copy may stand, and has a run of its name without that copy."""
    littered(ground)
    found = stray(ground, "--register")
    assert found["stray"] == "registered"
    assert (
        found["alien.root"] == "left alone: no run 'alien' in " + f"{ground.database.name}.runs_new"
    )
    assert "several" in found[f"{NAME}.root"] or "registered" in found[f"{NAME}.root"]
    assert found[".caxev-part-left"] == "left alone: it is not a copy"
    assert "not a place for copies" in found["other"]
    assert ground.entry(5)["location"] == str(ground.raw / "stray")
    assert "stray" not in stray(ground)


@pytest.mark.replicaset
def test_stray_knows_what_is_hidden_and_whose(ground: Ground) -> None:
    """What mv, erasing and quarantine have beside copies is theirs while an entry says so."""
    made = ground.far / "pax_v1" / f"{NAME}.root"
    quarantine = ground.raw / ".caxev-quarantine"
    job = {"type": "processed", "pax_version": "v1", "status": "transferring", "job": {}}
    entries: dict[str, dict[str, Any]] = {
        "moving": {"status": "moving", "moving_to": str(ground.raw / "x" / "moving")},
        "going": {"status": "deleting"},
        "kept": {"status": "error", "quarantine": {"place": str(quarantine / "once%kept")}},
        "soon": {"status": "error", "quarantine": {"place": None}},
    }
    theirs = [
        ground.raw / ".caxev-moved-moving",
        ground.raw / ".caxev-gone-going",
        quarantine / "once%kept",
        quarantine / "soon",
    ]
    nobodys = [
        made.with_name(f".caxev-part-3-other-{made.name}"),
        ground.raw / f".caxev-part-3-{NAME}",
        ground.raw / f".caxev-moved-{NAME}",
        ground.raw / f".caxev-gone-{NAME}",
        quarantine / NAME,
    ]
    ground.insert({"location": str(write_run(ground.raw / NAME))}, {"location": str(made), **job})
    for number, (name, entry) in enumerate(entries.items(), start=2):
        ground.insert({"location": str(ground.raw / name), **entry}, number=number, name=name)
    for path in (*theirs, *nobodys):
        write_run(path)
    expected = dict.fromkeys((path.name for path in nobodys), "unknown")
    assert stray(ground) == expected
    assert stray(ground, "--delete", "--dry-run") == dict.fromkeys(expected, "would be deleted")
    rows_ = rows(ground.caxev("stray", "--site", "lngs", "--json"))
    assert {row["what"] for row in rows_} == {"leftover"}
    assert stray(ground, "--delete") == dict.fromkeys(expected, "deleted")
    assert [path.exists() for path in theirs] == [True] * len(theirs)
    assert stray(ground) == {}


@pytest.mark.replicaset
def test_stray_does_not_delete_at_the_wrong_place(ground: Ground) -> None:
    """Where most copies are not here, or the database knows none at all, nothing is deleted."""
    path = write_run(ground.raw / "unknown")
    command = ("stray", "--site", "lngs", "--delete", "--age", "0")
    assert_one_line(ground.caxev(*command), 1, "Nothing was deleted")
    ground.insert({"location": str(ground.raw / "gone")})
    assert_one_line(ground.caxev(*command), 1, "1 of the 1 copies", "Nothing was deleted")
    assert len(list(path.iterdir())) == 3
    shutil.rmtree(ground.far)
    assert_one_line(ground.caxev("stray", "--site", "lngs"), 1, "Mount the disk")
    assert ground.caxev(*command, "--register").code == 2


@pytest.mark.replicaset
def test_stray_by_names_of_any_bytes_and_through_links(ground: Ground) -> None:
    """Names that are no text are found and deleted; a directory may be named through a link."""
    (ground.root / "alias").symlink_to(ground.raw)
    known = write_run(ground.raw / NAME)
    ground.insert({"location": str(ground.root / "alias" / known.name)})
    odd = os.fsdecode(os.fsencode(ground.raw) + b"/\xff\n'x")
    Path(odd).touch()
    assert stray(ground, "--delete") == {Path(odd).name: "deleted"}
    assert known.exists()
    assert not Path(odd).exists()


def test_census_needs_no_entry_twice(tmp_path: Path) -> None:
    """Of two claims on one place that counts which must be there; pages lose none."""
    with Inventory() as inventory:
        names = [f"{tmp_path}/{number:05}".encode() for number in range(2500)]
        inventory.claim(ClaimedPlace(name, must=True, run="1") for name in names)
        inventory.claim(ClaimedPlace(name) for name in names)
        assert inventory.musts() == 2500
        Path(os.fsdecode(names[7])).touch()
        assert inventory.settle() == 2499
        gone = [claim.path for page in inventory.gone() for claim in page]
        assert gone == names[:7] + names[8:]


def test_measured_follows_no_link(tmp_path: Path) -> None:
    """Files and bytes of a tree, links as themselves; a tree that cannot be read says so."""
    write_run(tmp_path / "run" / "sub")
    (tmp_path / "run" / "out").symlink_to("/usr")
    found = measured(os.fsencode(tmp_path / "run"), "stray")
    assert (found.files, found.size, found.trouble) == (4, 3004, None)
    assert measured(os.fsencode(tmp_path / "gone"), "stray").trouble


@pytest.mark.parametrize("location", [None, 5, "", "n/a", "relative/x", "/a\0b"])
def test_what_is_no_place_claims_none(location: Any) -> None:
    """Whatever stands in an entry, only an absolute path is a place."""
    assert places(location) == ()
