"""What a good copy still gets: the run its size, the files their mode, group and ACL."""

from __future__ import annotations

import grp
import math
import os
import shutil
import stat
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from pymongo import MongoClient

from caxev import Denied, FieldIs, GiveUp, Job, Manifest, RunUpdate, Skip
from caxev.config import Permission, Site
from caxev.config.errors import Problems
from caxev.config.permissions import read_permissions
from caxev.core.ledger import Reaction, State
from caxev.core.model import CopyKey, Event, Run
from caxev.core.registry import recorded
from caxev.database import Request
from caxev.demo import daq
from caxev.files import Item
from caxev.handlers import checksum, completeness, permissions
from caxev.testing import Lab, lab
from tests import engine
from tests.conftest import Database as Named

RAW = CopyKey("raw", "lngs")
SITE = Site(name="lngs", dir_raw="/data/raw")
START = datetime(2016, 11, 11, 14, 34, tzinfo=UTC)


def run_of(status: str = "transferred", *, events: Any = 2500, **fields: Any) -> Run:
    entry = {"type": "raw", "host": "lngs", "status": status, "location": "/data/raw/161111_1434"}
    entry |= fields.pop("entry", {})
    document = {
        "_id": ObjectId(),
        "number": 1,
        "end": START,
        "trigger": {"events_built": events},
        "data": [entry],
    }
    return Run.from_document({**document, **fields})


def zips(count: int, *, size: int = 10) -> Manifest:
    names = [b"XENON1T-1-%09d-%09d-1000.zip" % (i, i + 999) for i in range(count)]
    others = [b"pax_info.json", b"trigger_monitor_data.zip", b"sub/XENON1T-x-1-2-3.zip"]
    return Manifest([Item(name, "file", size) for name in (*names, *others)])


class RunCache:
    """The ports of a job that needs one manifest."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    async def load_manifest(self, digest: str) -> list[dict[str, Any]] | None:
        return self.manifest.to_rows()


async def sized(run: Run, manifest: Manifest) -> Any:
    event = Event(run.id, RAW, None, "transferred")
    job = Job(run, event, site=SITE, ports=RunCache(manifest))  # type: ignore[arg-type]
    return await completeness.add_size(job)


# -- completeness ---------------------------------------------------------------------------------


async def test_the_size_of_complete_raw_data_is_noted_once() -> None:
    """As many files as the events fill: the bytes of all files, where no size stands yet."""
    run = run_of(entry={"manifest": "b3:1"})
    update = await sized(run, zips(3))
    copy = run.copy(RAW)
    assert copy is not None
    assert update == RunUpdate.set_fields(
        run, FieldIs("raw_size_byte"), copy.as_seen, raw_size_byte=60
    )


@pytest.mark.parametrize("count", [2, 4])
async def test_raw_data_with_other_files_than_its_events_fill_is_told(count: int) -> None:
    """Too few files, or too many, are a person's affair: no size is noted."""
    with pytest.raises(GiveUp, match=f"{count} files with events, but its events fill 3"):
        await sized(run_of(entry={"manifest": "b3:1"}), zips(count))


@pytest.mark.parametrize(
    ("events", "per_file", "files"),
    [
        *[
            (0, None, 0),
            (1, None, 1),
            (1000, None, 1),
            (1001, None, 2),
            (1001, 500, 3),
            (10, 0, 1),
            (10, "x", 1),
        ],
        *[(1001.0, 500.0, 3), (1001.0, 0.5, 2), (10, math.nan, 1)],
    ],
)
def test_files_follow_from_events(events: float, per_file: Any, files: int) -> None:
    """Events by events a file, rounded up; 1000 where the run does not say."""
    zipped = {"ini": {"trigger_config_override": {"Zip": {"events_per_file": per_file}}}}
    plan = completeness.plan_size(run_of(events=events, reader=zipped), SITE)
    assert not isinstance(plan, Skip)
    assert plan[1] == files


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (run_of(raw_size_byte=5), "has raw_size_byte"),
        (run_of(end=None), "no end"),
        (run_of(events=None), "no events_built"),
        (run_of(events=0.5), "no events_built"),
        (run_of(events=math.inf), "no events_built"),
        (run_of("verifying"), "is verifying"),
        (run_of(entry={"host": "chicago"}), "no raw copy here"),
    ],
)
def test_what_has_no_size_yet(run: Run, why: str) -> None:
    """Nothing is noted before the run has ended, is good here, and has a number of events."""
    plan = completeness.plan_size(run, SITE)
    assert isinstance(plan, Skip)
    assert why in plan.why


@pytest.mark.replicaset
async def test_one_cause_is_one_alarm() -> None:
    """Three changes of a run lead here, and it lacks data: that is one alarm, until it is right."""
    async with lab(completeness) as here:
        run = await here.new_run(at="lngs", trigger={"events_built": 5000})
        failed = await here.settle()
        assert [one.handler for one in failed] == ["add_size"] * 3
        (alarm,) = await here.alarms()
        assert "fill 5" in alarm.details["why"]
        await here.settle()  # the next listener raises no other for those that it finds
        assert [one.key for one in await here.alarms()] == [alarm.key]
        await here.set(run, trigger={"events_built": None}, raw_size_byte=1)
        await here.database.add_request("lngs", Request("retry"), "me", here.now())
        assert await here.settle() == []
        assert await here.alarms() == []


@pytest.mark.replicaset
async def test_a_copy_that_could_not_be_read_is_good_again_by_a_retry() -> None:
    """Neither the reading that was asked for nor the patrol's leaves an error behind."""
    async with lab(checksum, sites={"lngs": {"patrol": {"days": 30}}}) as here:

        async def failing() -> set[str]:
            return {one.handler for one in await here.settle() if one.state is State.FAILED}

        run = await here.new_run(at="lngs")
        assert await failing() == set()
        fifo = here.path(run, "lngs") / "x"  # what no reading gets past
        os.mkfifo(fifo)
        (mine,) = (await here.look(run)).copies
        await here.update(RunUpdate.ask(run, mine, "asked", here.now()))
        assert await failing() == {"recheck"}
        here.later(days=31)
        assert await failing() == {"recheck", "patrol"}
        (mine,) = (await here.look(run)).copies
        assert (mine.status, "caxev retry" in (mine.error or "")) == ("error", True)
        fifo.unlink()
        await here.database.add_request("lngs", Request("retry"), "me", here.now())
        assert await failing() == set()
        (mine,) = (await here.look(run)).copies
        assert (mine.status, mine.error, mine.pending) == ("transferred", None, ())


def retried(here: Lab, reaction: Reaction) -> None:
    """Open one failed reaction again, and leave the others of its run and handler as they are."""
    settings, fresh = here.database.settings, {"state": "pending", "due": here.now(), "attempts": 0}
    with MongoClient[dict[str, Any]](settings.mongo_uri, w="majority") as client:
        client[settings.database]["caxev_ledger"].update_one({"_id": reaction.id}, {"$set": fresh})


@pytest.mark.replicaset
async def test_the_alarm_of_one_cause_stands_until_the_last_is_done() -> None:
    """Whichever of them is done first, and though another listener takes over meanwhile."""
    async with lab(completeness) as here:
        run = await here.new_run(at="lngs", trigger={"events_built": 5000})
        failed = await here.settle()
        (alarm,) = await here.alarms()
        await here.set(run, trigger={"events_built": None}, raw_size_byte=1)
        for reaction in sorted(failed, key=lambda reaction: f"failed {reaction.id}" != alarm.key):
            assert [one.key for one in await here.alarms()] == [alarm.key]
            retried(here, reaction)
            await here.settle()
        assert await here.alarms() == []


@pytest.mark.replicaset
async def test_two_causes_are_two_alarms() -> None:
    """Of two runs each has its own."""
    async with lab(completeness) as here:
        for _ in range(2):
            await here.new_run(at="lngs", trigger={"events_built": 5000})
        await here.settle()
        assert len({one.run for one in await here.alarms()}) == len(await here.alarms()) == 2


# -- permissions ----------------------------------------------------------------------------------


def tree(root: Path) -> Path:
    run = root / "161111_1434"
    (run / "sub").mkdir(parents=True)
    for name in ("a", "sub/b"):
        (run / name).write_text("x")
        (run / name).chmod(0o600)
    (run / "link").symlink_to("a")
    (root / "outside").write_text("x")
    (root / "outside").chmod(0o600)
    (run / "sub" / "out").symlink_to(root / "outside")
    return run


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def apply(path: Path, root: Path, permission: Permission) -> None:
    permissions.apply(str(path), (str(root),), permission)


def test_modes_are_set_whatever_the_umask(tmp_path: Path) -> None:
    """Directories get the mode, files the same without execution; what links lead to, nothing."""
    run = tree(tmp_path)
    before = os.umask(0o777)
    try:
        apply(run, tmp_path, Permission(mode=0o2750))
        apply(run, tmp_path, Permission(mode=0o750))  # again: the group's bit of directories stays
    finally:
        os.umask(before)
    assert {mode(run), mode(run / "sub")} == {0o2750}
    assert {mode(run / "a"), mode(run / "sub" / "b")} == {0o640}
    assert mode(tmp_path / "outside") == 0o600


def test_a_single_file_is_a_copy_too(tmp_path: Path) -> None:
    """A copy that is one file gets what files get."""
    file = tmp_path / "x.root"
    file.write_text("x")
    apply(file, tmp_path, Permission(mode=0o777 & ~0o002))
    assert mode(file) == 0o664


def test_groups_are_set(tmp_path: Path) -> None:
    """All files and directories get the group; one that is not there is named."""
    run = tree(tmp_path)
    groups = [one for one in (*os.getgroups(), os.getgid()) if one != run.stat().st_gid]
    group = groups[0] if groups else os.getgid()
    apply(run, tmp_path, Permission(group=grp.getgrgid(group).gr_name))
    assert {path.lstat().st_gid for path in (run, run / "a", run / "sub" / "b")} == {group}
    with pytest.raises(Denied, match="no group 'nobody-has-this'"):
        apply(run, tmp_path, Permission(group="nobody-has-this"))


@pytest.mark.skipif(shutil.which("setfacl") is None, reason="needs acl")
def test_acls_are_set(tmp_path: Path) -> None:
    """What setfacl is told holds for the tree, and for nothing that links lead to."""
    run = tree(tmp_path)
    apply(run, tmp_path, Permission(mode=0o700, acl="u:65534:rX,d:u:65534:rX"))

    def entries(path: Path) -> list[str]:
        command = ["getfacl", "--omit-header", "--numeric", "--absolute-names", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert "user:65534:r-x" in entries(run / "sub")
    assert "default:user:65534:r-x" in entries(run / "sub")
    assert "user:65534:r--" in entries(run / "sub" / "b")
    assert "user:65534" not in " ".join(entries(tmp_path / "outside"))


def test_paths_are_confined(tmp_path: Path) -> None:
    """A copy that the database puts elsewhere is not touched, nor one that a link leads out to."""
    (tmp_path / "raw").mkdir()
    outside = tmp_path / "outside"
    outside.write_text("x")
    outside.chmod(0o600)
    (tmp_path / "raw" / "run").symlink_to(outside)
    for path in (outside, tmp_path / "raw" / "run", tmp_path / "raw"):
        with pytest.raises(GiveUp, match="not inside"):
            apply(path, tmp_path / "raw", Permission(mode=0o777))
    assert mode(outside) == 0o600


def test_permissions_are_by_type() -> None:
    """A type's own values come before those for all; without any, nothing is done to it."""
    read = read_permissions({"mode": "0750", "raw": {"mode": "700", "group": "daq"}})
    assert read["raw"] == Permission(0o700, "daq")
    assert read["minitrees"] == Permission(0o750)
    site = Site(name="lngs", permissions=read_permissions({"raw": {"mode": "750"}}))
    copy = run_of().copy(RAW)
    assert permissions.plan_permission(copy, site) == Permission(0o750)
    other = run_of(entry={"type": "processed"}).copies[0]
    assert isinstance(permissions.plan_permission(other, site), Skip)
    assert isinstance(permissions.plan_permission(run_of("error").copy(RAW), site), Skip)
    assert isinstance(permissions.plan_permission(None, site), Skip)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"mode": 750}, "mode must be a mode as"),
        ({"mode": "0777"}, "mode must be"),
        ({"mode": "0550"}, "mode must be"),
        ({"raw": {"mode": "9"}}, "raw: mode must be"),
        ({"raw": 1}, "raw must be an object"),
        ({"grup": "x"}, "did you mean 'group'"),
        ({"acl": "g:x:rX; rm"}, "acl must be"),
        ({"raw": {"processed": {}}}, "raw: unknown key 'processed'"),
    ],
)
def test_wrong_permissions_are_told(given: Any, line: str) -> None:
    """What is wrong is named with its key, the value and what it must be."""
    with pytest.raises(Problems) as wrong:
        read_permissions(given)
    assert line in wrong.value.lines[0]


# -- both -----------------------------------------------------------------------------------------


@pytest.mark.replicaset
async def test_a_copy_that_becomes_good_gets_both(database: Named, tmp_path: Path) -> None:
    """In a listener: the run is given its size and the files their mode, each by its reaction."""
    raw = daq.write_run(tmp_path / "raw", 5, size_bytes=200_000, seed=1, start=START)
    document = daq.run_document(raw)
    document["data"] = [daq.data_entry(raw, "lngs", "transferred")]
    ours = (completeness.add_size, permissions.set_permission)
    handlers = [one for one in recorded if one.function in ours]
    given = {"raw": Permission(0o750)}
    options = engine.options_for(
        database,
        handlers,
        site_fields={"dir_raw": str(tmp_path / "raw"), "permissions": given},
    )
    async with engine.opened(database) as db:
        run = await db.insert_run(document)
        async with engine.listener(db, options):

            async def there() -> bool:
                sized = "raw_size_byte" in (await db.runs([run]))[run].document
                return sized and mode(raw.path) == 0o750

            await engine.until(there)
        found = (await db.runs([run]))[run].document["raw_size_byte"]
    assert found == sum(file.stat().st_size for file in raw.path.iterdir())
    assert {mode(file) for file in raw.path.iterdir()} == {0o640}
