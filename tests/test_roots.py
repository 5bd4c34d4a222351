"""Roots and their markers: what is beneath a disk that is away waits, and nothing is concluded.

A disk is unmounted here by giving its directory another name and putting an empty one in its place,
which is what an unmounted disk leaves.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from attrs import evolve
from loguru import logger

from caxev import CopyKey, Denied, GiveUp, Job, RootAway, RunUpdate, on, tag
from caxev.config import Site, Sites
from caxev.copies.deletion import intent
from caxev.copies.retention import DeletionPlan, DeletionWish, plan
from caxev.core.clock import utcnow
from caxev.core.ledger import Hindered, State
from caxev.core.paths import UNKNOWN, Root
from caxev.core.registry import recorded
from caxev.database import Database, Unreachable
from caxev.engine import root_markers, root_watch, workers
from caxev.engine.context import Context
from caxev.engine.options import Options
from caxev.engine.root_markers import init_roots
from caxev.engine.runner import sites_of
from caxev.files import confine, erase, standing, steady
from caxev.files.roots import (
    MARKER_PREFIX,
    Probe,
    absent,
    file_system,
    find_markers,
    make_marker,
    missing,
    probe,
)
from caxev.handlers import checksum, deletion, tape, transfer
from caxev.testing import Lab, lab
from tests import engine
from tests.conftest import Database as Named
from tests.places import vouched
from tests.test_cli import Caxev, assert_one_line, caxev, insert, online  # noqa: F401  # fixtures


@pytest.mark.parametrize("marker", [UNKNOWN, "ab"])
def test_hints_name_no_site_that_is_not_known(marker: str) -> None:
    """What is printed can be typed: a directory does not know whose it is."""
    assert "--site" not in missing(Root("/data", marker))


def marked(directory: Path, key: str = "dir_raw") -> Root:
    directory.mkdir(exist_ok=True)
    return Root(str(directory), make_marker(str(directory), "lngs", key))


@contextmanager
def unmounted(directory: Path) -> Iterator[None]:
    """The disk is away for the length of the block, and as it was afterwards."""
    disk = directory.with_name(directory.name + ".disk")
    directory.rename(disk)
    directory.mkdir()
    try:
        yield
    finally:
        directory.rmdir()  # nothing may have been written there
        disk.rename(directory)


# -- one root -------------------------------------------------------------------------------------


def test_nothing_beneath_a_root_without_its_marker(tmp_path: Path) -> None:
    """Neither an empty mount point, nor another disk, nor a directory that is gone is the root."""
    root = marked(tmp_path / "raw")
    path = f"{root}/run"
    assert confine(path, [root]) == vouched(path)
    with unmounted(tmp_path / "raw"), pytest.raises(RootAway, match="Mount the disk"):
        confine(path, [root])
    other = Root(str(root), "0123456789abcdef")
    with pytest.raises(RootAway, match="Mount the disk"):
        confine(path, [other])
    with pytest.raises(RootAway, match="is its disk mounted"):
        confine(f"{root}/gone/x", [Root(f"{root}/gone")])
    with pytest.raises(GiveUp, match="is not inside"):
        confine(str(tmp_path / "x"), [root])


def _work_until_it_vanishes(root: Root, end: Exception | None) -> None:
    """Enter a root whose disk is unmounted under way, and come to this end."""
    with steady():
        confine(f"{root}/run", [root])
        Path(root).rename(f"{root}.disk")
        Path(root).mkdir()
        if end is not None:
            raise end


@pytest.mark.parametrize("end", [None, GiveUp("nothing is there"), OSError("read error")])
def test_a_disk_that_vanishes_meanwhile_takes_every_end_along(
    tmp_path: Path, end: Exception | None
) -> None:
    """Neither "it is not there" nor "it is done" counts where the root is away by then."""
    with pytest.raises(RootAway):
        _work_until_it_vanishes(marked(tmp_path / "raw"), end)


def test_a_disk_that_is_swapped_meanwhile_is_seen(tmp_path: Path) -> None:
    """A copy of the disk, marker and all, is another disk."""
    root = marked(tmp_path / "raw")
    marker = tmp_path / "raw" / f"{MARKER_PREFIX}{root.marker}"
    with steady():
        confine(f"{root}/run", [root])
        marker.rename(tmp_path / "old")
        marker.write_bytes((tmp_path / "old").read_bytes())
        with pytest.raises(RootAway, match="changed meanwhile"):
            confine(f"{root}/run", [root])
        marker.unlink()
        (tmp_path / "old").rename(marker)


def test_erasing_needs_the_disk(tmp_path: Path) -> None:
    """What is not there because its disk is not is no copy that has been erased."""
    root = marked(tmp_path / "raw")
    (tmp_path / "raw" / "run").mkdir()
    mark = standing(f"{root}/run", [root], None)
    with unmounted(tmp_path / "raw"), pytest.raises(RootAway):
        erase(f"{root}/run", [root], mark)
    assert (tmp_path / "raw" / "run").is_dir()
    erase(f"{root}/run", [root], mark)
    assert not (tmp_path / "raw" / "run").exists()


def test_what_a_probe_finds(tmp_path: Path) -> None:
    """The free bytes where the disk is there, else why not; markers that are none are passed by."""
    root = marked(tmp_path / "raw")
    seen = probe(root)
    assert seen.away is None
    assert seen.free > 0
    with unmounted(tmp_path / "raw"):
        assert "Mount the disk" in (probe(root).away or "")
    for name, text in (("zz", "{}"), ("00", "[]"), ("11", "{"), ("22", '{"site": 1}')):
        (tmp_path / "raw" / f"{MARKER_PREFIX}{name}").write_text(text)
    (tmp_path / "raw" / f"{MARKER_PREFIX}33").symlink_to("/etc/passwd")
    assert [one.id for one in find_markers(root)] == [root.marker]
    (tmp_path / "raw" / "there").touch()
    names = [f"{root}/there", f"{root}/gone", "/elsewhere/gone", "n/a", "\0"]
    assert absent(root, names) == [f"{root}/gone", "/elsewhere/gone"]


def test_two_that_mark_one_directory_at_once(tmp_path: Path) -> None:
    """One gives way, and finds the other's marker the next time."""
    root = marked(tmp_path / "raw")
    with pytest.raises(RootAway, match="another process"):
        make_marker(str(root), "chicago", "dir_raw")
    there = find_markers(str(root))
    assert [one.id for one in there] == [root.marker]
    assert make_marker(str(root), "chicago", "dir_raw", there)


def test_staging_is_looked_after_as_well(tmp_path: Path) -> None:
    """Nothing but its marker shows that the disk of dir_tsm is mounted; no copy lies there."""
    site = Site(name="lngs", dir_raw=str(tmp_path / "raw"), dir_tsm=str(tmp_path / "tsm"))
    assert [held.key for held in root_markers.holdings(site, Sites(tmp_path, {"lngs": site}))] == [
        "dir_raw",
        "dir_tsm",
    ]


# -- a site ---------------------------------------------------------------------------------------

RULES = {"deletion": {"copies": 1}}
TWO: dict[str, dict[str, Any]] = {
    "lngs": {"master": ["raw"], **RULES},
    "chicago": {"download_options": ["lngs"], **RULES},
}
two = lab(transfer, checksum, deletion, sites=TWO)
HERE = CopyKey("raw", "chicago")


async def statuses(lab: Lab, run: Any) -> dict[str, str]:
    return {one.host: one.status for one in (await lab.look(run)).copies}


@pytest.mark.replicaset
@two
async def test_all_that_needs_an_unmounted_disk_waits_and_goes_on(lab: Lab) -> None:
    """No copy is written, condemned or dropped; one alarm; mounted again, all comes right."""
    old, asked, going = [await lab.new_run(at="lngs") for _ in range(3)]
    await lab.settle()
    assert await statuses(lab, old) == {"lngs": "transferred", "chicago": "transferred"}
    disk = lab.path(old, "chicago").parent
    before = await lab.database.site_record("chicago")
    assert before is not None
    assert [0 < one.free <= one.size for one in before.disks] == [True]
    with unmounted(disk):
        new = await lab.new_run(at="lngs")
        run = await lab.look(asked)
        seen = run.copies[1]
        await lab.update(RunUpdate.note(run, seen, check_asked=lab.now()))
        run = await lab.look(going)
        there = lab.sites.get("chicago")
        wanted = plan(
            run, DeletionWish(run.copies[1], "me", "test", 1), there, lab.sites, lab.now()
        )
        assert isinstance(wanted, DeletionPlan)
        await lab.update(intent(run, wanted, lab.sites, lab.now()))
        waiting = await lab.settle()
        ours = [one for one in waiting if one.site == "chicago"]
        assert {one.state for one in ours} == {State.PENDING}
        assert {one.handler for one in ours if one.root} == {"pull", "recheck", "erase"}
        assert {one.root for one in ours} - {""} == {str(disk)}
        assert {one.attempts for one in ours} == {0}
        assert (await statuses(lab, asked))["chicago"] == "transferred"
        assert (await statuses(lab, going))["chicago"] == "deleting"
        assert [one.key for one in await lab.alarms()] == [f"root {disk}"]
        record = await lab.database.site_record("chicago")
        assert record is not None
        assert [*record.away] == [str(disk)]
    await lab.settle()
    assert await statuses(lab, new) == {"lngs": "transferred", "chicago": "transferred"}
    assert await statuses(lab, going) == {"lngs": "transferred"}
    assert not lab.path(going, "chicago").exists()
    answered = (await lab.look(asked)).copy(HERE)
    assert answered is not None
    assert answered.fields["check_answered"] is not None
    assert [one for one in await lab.reactions() if one.state is State.FAILED or one.root] == []


@pytest.mark.replicaset
@two
async def test_directories_that_are_probed_at_once_are_noted_in_order(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The note that none is away, if it takes longer, does not replace that of one that is."""
    note, look = Database.note_away, root_watch.RootWatch._look

    noted = trio.Event()

    async def slowly(self: Database, lease: Any, away: dict[str, str]) -> None:
        if not away:
            with trio.move_on_after(0.5):
                await noted.wait()
        await note(self, lease, away)
        if away:
            noted.set()

    async def last(self: root_watch.RootWatch, held: root_markers.Holding) -> Any:
        await trio.sleep(0.2 if held.root == str(disk) else 0)
        return await look(self, held)

    run = await lab.new_run(at="lngs")
    await lab.settle()
    disk = lab.path(run, "chicago").parent
    monkeypatch.setattr(Database, "note_away", slowly)
    monkeypatch.setattr(root_watch.RootWatch, "_look", last)
    with unmounted(disk):
        await lab.settle("chicago")
        record = await lab.database.site_record("chicago")
    assert record is not None
    assert [*record.away] == [str(disk)]


@pytest.mark.replicaset
async def test_that_a_directory_is_away_is_not_noted_for_ever_if_the_reply_was_lost(
    database: Named, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is back by the next probe: what was noted last is not known then."""
    note = Database.note_away

    async def unheard(self: Database, *args: Any) -> None:
        await note(self, *args)
        raise Unreachable("no reply")

    options = engine.options_for(database, [], site_fields={"dir_raw": str(tmp_path)})
    async with engine.opened(database) as db:
        found = await db.acquire("lngs", "one", 60.0, utcnow())
        assert found is not None
        roots = root_watch.RootWatch(Context(db, found[0], options), cast("Any", None))
        root = str(tmp_path)
        await roots._note(root, Probe())
        monkeypatch.setattr(Database, "note_away", unheard)
        await roots._note(root, Probe(away="it is not mounted"))
        monkeypatch.setattr(Database, "note_away", note)
        await roots._note(root, Probe())
        record = await db.site_record("lngs")
    assert record is not None
    assert record.away == {}


@pytest.mark.replicaset
async def test_a_disk_has_the_same_name_whichever_of_its_directories_answers_first(
    database: Named, tmp_path: Path
) -> None:
    """The alarm that it is full has that name, and is to end with another process, too."""
    roots = {key: str(tmp_path / key) for key in ("dir_raw", "dir_processed")}
    options = engine.options_for(database, [], site_fields=roots)
    async with engine.opened(database) as db:
        found = await db.acquire("lngs", "one", 60.0, utcnow())
        assert found is not None
        names = []
        for order in (roots.values(), [*roots.values()][::-1]):
            watch = root_watch.RootWatch(Context(db, found[0], options), cast("Any", None))
            for root in order:
                await watch._note(root, Probe(device=1))
            names.append([disk.root for disk in watch.disks])
    assert names[0] == names[1]


ARCHIVED: dict[str, dict[str, Any]] = {
    "lngs": {"master": ["raw"], "upload_options": ["hsm"]},
    "hsm": {"method": "directory", "listener": False},
}


@pytest.mark.replicaset
@lab(tape, checksum, sites=ARCHIVED)
async def test_all_that_needs_an_unmounted_archive_waits_and_goes_on(lab: Lab) -> None:
    """A new copy is not put in its mount point, an old one not condemned; one alarm."""
    staging = Path(lab.sites.path).parent / "staging"
    staging.mkdir(mode=0o700)
    here = evolve(lab.sites.get("lngs"), dir_tsm=str(staging))
    cast("dict[str, Site]", lab.sites.by_name)["lngs"] = here
    old = await lab.new_run(at="lngs")
    await lab.settle("lngs")
    assert await statuses(lab, old) == {"lngs": "transferred", "hsm": "transferred"}
    archive = Path(lab.sites.get("hsm").dir_raw or "")
    with unmounted(archive):
        new = await lab.new_run(at="lngs")
        run = await lab.look(old)
        await lab.update(RunUpdate.note(run, run.copies[1], check_asked=lab.now()))
        waiting = [one for one in await lab.settle("lngs") if one.root]
        assert {one.handler for one in waiting} == {"backup", "tape_checksum"}
        assert {(one.root, one.state, one.attempts) for one in waiting} == {
            (str(archive), State.PENDING, 0)
        }
        assert [one.key for one in await lab.alarms()] == [f"root {archive}"]
        assert (await statuses(lab, old))["hsm"] == "transferred"
    await lab.settle("lngs")
    assert await statuses(lab, new) == {"lngs": "transferred", "hsm": "transferred"}
    answered = (await lab.look(old)).copy(CopyKey("raw", "hsm"))
    assert answered is not None
    assert answered.fields["check_answered"] is not None
    assert [one for one in await lab.reactions() if one.state is State.FAILED or one.root] == []


@pytest.mark.replicaset
@two
async def test_a_source_that_is_unmounted_is_not_gone(lab: Lab) -> None:
    """What another site cannot show now is fetched when it can: nothing is given up meanwhile."""
    first = await lab.new_run(at="lngs")
    await lab.settle()
    disk = lab.path(first, "lngs").parent
    run = await lab.new_run(at="lngs")
    with unmounted(disk):
        await lab.settle("chicago")
        assert await statuses(lab, run) == {"lngs": "transferred", "chicago": "transferring"}
        assert [one for one in await lab.reactions() if one.state is State.FAILED] == []
    lab.later(hours=1)
    await lab.settle()
    assert await statuses(lab, run) == {"lngs": "transferred", "chicago": "transferred"}


def writing(database: Named, disk: Path) -> Options:
    """A listener of lngs that writes to a disk."""
    handlers = [one for one in recorded if one.function is write_there]
    return engine.options_for(database, handlers, site_fields={"dir_raw": str(disk)})


async def known(db: Database, root: Path, status: str) -> None:
    """A run that asks to write, whose copy at lngs is beneath a root in that state."""
    document = engine.run_document(1, ("raw", "lngs", status), tags=[{"name": "write"}])
    document["data"][0]["location"] = f"{root}/run"
    await db.insert_run(document)


@pytest.mark.replicaset
@pytest.mark.parametrize("there", [True, False], ids=["the disk", "its mount point"])
async def test_a_listener_marks_no_directory_in_which_copies_are_known(
    database: Named, tmp_path: Path, there: bool
) -> None:
    """Not even with all of them there; its alarm and its log name the command that marks it."""
    disk = tmp_path / "raw"
    disk.mkdir()
    options = writing(database, disk)
    async with engine.opened(database) as db:
        await known(db, disk, "transferred")
        if there:
            (disk / "run").mkdir()
        before = list(disk.iterdir())
        log: list[str] = []
        sink = logger.add(log.append, level="ERROR", format="{message}")
        async with engine.listener(db, options, marked=False):

            async def raised() -> list[str]:
                return [
                    one.alarm.details["more"]
                    for one in await db.alarms()
                    if one.active and one.alarm.key == f"root {disk}"
                ]

            (why,) = await engine.until(raised)
            assert why.endswith("run caxev sites init --site lngs")
            assert [one for one in log if "run caxev sites init --site lngs" in one]
            assert list(disk.iterdir()) == before

            async def waiting() -> list[tuple[str, int]]:
                return [(one.root, one.attempts) for one, _ in await db.reactions() if one.root]

            assert await engine.until(waiting) == [(str(disk), 0)]
            (row,) = await init_roots(db, options.site, options.sites, force=False)
            assert row["ok"] is there
            if there:
                await engine.until((disk / "file").exists)
        logger.remove(sink)
    assert len(find_markers(str(disk))) == there


@pytest.mark.replicaset
async def test_a_listener_marks_a_new_directory(database: Named, tmp_path: Path) -> None:
    """The database knows no copy in it but one that is on its way."""
    disk = tmp_path / "raw"
    disk.mkdir()
    options = writing(database, disk)
    async with engine.opened(database) as db:
        await known(db, disk, "transferring")
        async with engine.listener(db, options, marked=False):
            await engine.until(lambda: find_markers(str(disk)))


@pytest.mark.replicaset
async def test_which_copies_are_known(database: Named) -> None:
    """All that may have had files once, whatever has become of them, of that type and site."""
    async with engine.opened(database) as db:

        async def are_known(*copies: tuple[str, str, str]) -> bool:
            await db.insert_run(engine.run_document(1, *copies))
            return await db.knows_copies("lngs", "raw")

        assert not await are_known()
        begun = [("raw", "lngs", "requested"), ("raw", "lngs", "transferring")]
        other = [("raw", "chicago", "transferred"), ("processed", "lngs", "transferred")]
        assert not await are_known(*begun, *other)
        assert await are_known(("raw", "lngs", "error"))


@pytest.mark.replicaset
@lab(tape, checksum, sites=ARCHIVED)
async def test_the_alarm_about_an_archive_names_the_site_that_uses_it(lab: Lab) -> None:
    """A marker is noted with the site whose listener looks after the directory."""
    run = await lab.put(await lab.new_run(at="lngs"), "hsm")
    held = root_markers.holdings(lab.sites.get("lngs"), lab.sites)
    (archive,) = [one for one in held if (one.owner.name, one.key) == ("hsm", "dir_raw")]
    (marker,) = find_markers(archive.root)
    (lab.path(run, "hsm").parent / f"{MARKER_PREFIX}{marker.id}").unlink()
    marking = root_markers.RootMarking(lab.database, in_place, lab.sites, "lngs")
    with pytest.raises(RootAway, match=r"run caxev sites init --site lngs$"):
        await marking.adopt(archive)
    lab.path(run, "hsm").rename(f"{archive.root}/elsewhere")
    with pytest.raises(RootAway, match=r"caxev sites init --site lngs --force"):
        await marking.adopt(archive, asked=True)


async def in_place(function: Callable[..., Any], *args: object) -> Any:
    """Call a function of `caxev.files.roots` here."""
    return function(*args)


@pytest.mark.replicaset
@lab(
    transfer,
    checksum,
    deletion,
    sites={"lngs": {"listener": False}, "chicago": {"download_options": ["lngs"]}},
)
async def test_a_disk_that_no_listener_looks_after_is_reported_by_who_waits(lab: Lab) -> None:
    """One alarm if that lasts, however many reactions wait; it goes when they go on."""
    runs = [await lab.new_run(at="lngs") for _ in range(2)]
    disk = lab.path(runs[0], "lngs").parent
    await lab.database.note_marker("lngs", str(disk), marked(disk).marker or "")
    with unmounted(disk):
        await lab.settle("chicago")
        lab.later(minutes=10)
        await lab.settle("chicago")
        (alarm,) = await lab.alarms()
        assert "Mount the disk" in alarm.details["why"]
    lab.later(hours=1)
    await lab.settle("chicago")
    assert await lab.alarms() == []
    assert await statuses(lab, runs[1]) == {"lngs": "transferred", "chicago": "transferred"}


def test_whose_disk_is_away_is_known_by_its_host() -> None:
    """Of sites with the same paths; a far end that names no directory may mean any there."""
    near = Site("lngs", dir_raw="/data", hostname="a")
    far = Site("chicago", dir_raw="/data", hostname="b", listener=False)
    more = Site("depot", dir_raw="/more", hostname="b")
    sites = Sites(Path("sites.json"), {one.name: one for one in (near, far, more)})

    def found(root: str, host: str) -> list[Site]:
        return sites_of(Hindered("it is away", root=root, host=host), near, sites)

    assert found("/data", "b") == [far]
    assert found("/data", "") == [near]
    assert found("", "b") == [far, more]


# -- refusals -------------------------------------------------------------------------------------

refusing: list[str] = []


@on(tag("ask"))
async def ask(job: Job) -> None:
    """Do what somebody may refuse."""
    if refusing:
        raise Denied(refusing[0])


@pytest.mark.replicaset
@lab(ask)
async def test_a_refusal_is_one_alarm_and_costs_nothing(lab: Lab) -> None:
    """Three reactions wait, with one alarm once that has lasted; lifted, all are done."""
    refusing[:] = ["our key is refused"]
    for _ in range(3):
        await lab.new_run(tags=["ask"])
    assert {(one.state, one.attempts) for one in await lab.settle()} == {(State.PENDING, 0)}
    assert await lab.alarms() == []
    lab.later(minutes=10)
    assert len(await lab.settle()) == 3
    (alarm,) = await lab.alarms()
    assert alarm.details["why"] == "our key is refused"
    refusing.clear()
    lab.later(hours=1)
    assert await lab.settle() == []
    assert await lab.alarms() == []


# -- a disk that hangs ----------------------------------------------------------------------------


@contextmanager
def mounted(image: Path, disk: Path) -> Iterator[None]:
    """A file system of its own for the length of the block; it is made if there is none."""
    try:
        if not image.exists():
            with image.open("wb") as file:
                file.truncate(64 << 20)
            subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True, capture_output=True)
        command = ["mount", "-o", "loop", str(image), str(disk)]
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs mkfs.ext4, and the right to mount a loop device")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def freezer(tmp_path: Path) -> Iterator[tuple[Path, Callable[[bool], None]]]:
    """A file system of its own, and what freezes and thaws it: who writes cannot be killed."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def freeze(on: bool) -> None:
        subprocess.run(
            ["fsfreeze", "-f" if on else "-u", str(disk)], check=on, capture_output=not on
        )

    with mounted(tmp_path / "image", disk):
        try:
            yield disk, freeze
        finally:
            freeze(False)


@on(tag("write"))
async def write_there(job: Job) -> None:
    """Write to the disk of the site."""
    await job.work(touch, f"{job.site.roots[0]}/file", job.site.roots)


def touch(path: str, roots: Sequence[Root]) -> None:
    """Make a file."""
    confine(path, roots)
    Path(path).touch()


@pytest.mark.replicaset
async def test_a_disk_that_hangs_is_away_and_holds_nobody_up(
    database: Named,
    freezer: tuple[Path, Callable[[bool], None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is reported, and the listener leaves though workers cannot die; thawed, all goes on."""
    disk, freeze = freezer
    monkeypatch.setattr(root_watch, "EVERY", 0.2)
    monkeypatch.setattr(root_watch, "ANSWERS", 1.0)
    monkeypatch.setattr(workers, "DEATH", 0.5)
    handlers = [one for one in recorded if one.function is write_there]
    options = engine.options_for(
        database, handlers, site_fields={"dir_raw": str(disk)}, grace=1.0, lease_time=5.0
    )

    async def away() -> object:
        record = await db.site_record("lngs")
        return record is not None and record.away

    async def done() -> object:
        return [one for one in await engine.reactions(db) if one.state is State.DONE]

    async with engine.opened(database) as db:
        async with engine.listener(db, options):
            await engine.until(lambda: list(disk.glob(f"{MARKER_PREFIX}*")))
            freeze(True)
            document = {**engine.run_document(1), "tags": [{"name": "write"}]}
            await db.insert_run(document)
            await engine.until(lambda: db.reactions(state="running"))
            found = await engine.until(away)
            assert "has not responded" in found[str(disk)]
            leaving = trio.current_time()
        assert trio.current_time() < leaving + engine.PATIENCE
        assert not await done()
        freeze(False)
        async with engine.listener(db, options):
            await engine.until(done)
            assert not await away()


# -- commands -------------------------------------------------------------------------------------


@pytest.mark.replicaset
def test_sites_init(online: Caxev, tmp_path: Path, database: Named) -> None:  # noqa: F811
    """It marks what is there, is repeatable, and wants --force for another disk than is known."""
    raw = tmp_path / "raw"
    raw.mkdir()
    entry = {"name": "lngs", "dir_raw": str(raw), "dir_minitrees": str(tmp_path / "none")}
    Path("sites.json").write_text(json.dumps([entry]))
    answer = online("sites", "init", "--site", "lngs", "--json")
    assert answer.code == 1
    first, second = json.loads(answer.out)
    assert first["ok"]
    assert not second["ok"]
    assert "cannot be read" in second["state"]
    again = json.loads(online("sites", "init", "--site", "lngs", "--json").out)
    assert (again[0]["marker"], again[0]["state"]) == (first["marker"], "present")
    with unmounted(raw):
        for command in (("stray", "--site", "lngs"), ("register", f"{raw}/x", "--site", "lngs")):
            assert_one_line(online(*command), 1, "Mount the disk")
        answer = online("sites", "init", "--site", "lngs", "--json")
        assert json.loads(answer.out)[0]["ok"] is False
        answer = online("sites", "init", "--site", "lngs", "--force", "--json")
        forced = json.loads(answer.out)[0]
        assert forced["ok"]
        assert forced["marker"] != first["marker"]
        (raw / f"{MARKER_PREFIX}{forced['marker']}").unlink()
    assert_one_line(online("stray", "--site", "lngs"), 1, "Mount the disk")


@pytest.mark.replicaset
async def test_a_marker_that_was_copied_to_another_disk(database: Named, tmp_path: Path) -> None:
    """That is another disk, until a person says that the data was moved, and all of it is there."""
    disk, kept = tmp_path / "raw", tmp_path / "kept"
    disk.mkdir()
    old, new = tmp_path / "old", tmp_path / "new"
    options = writing(database, disk)
    site, sites = options.site, options.sites

    async def row(db: Database, *, force: bool = False) -> dict[str, Any]:
        (found,) = await init_roots(db, site, sites, force=force)
        return found

    async def root(db: Database) -> Root:
        known = await root_markers.read_markers(db, sites, site)
        return known.get(site.name).roots[0]

    async with engine.opened(database) as db:
        with mounted(old, disk):
            if file_system(str(disk)) is None:
                pytest.skip("needs Linux 6.9")
            first = await row(db)
            known = await root(db)
            # As an older version, or an older kernel, has noted it.
            await db.note_marker("lngs", str(disk), first["marker"])
            assert (await row(db))["state"] == "present"
            assert (await root(db)).disk == known.disk
            (disk / "run").mkdir()
            shutil.copytree(disk, kept)
        with mounted(old, disk):  # mounted again it is the same
            assert probe(known).away is None
        with mounted(new, disk):
            shutil.copytree(kept, disk, dirs_exist_ok=True)
            assert "on another disk" in (probe(known).away or "")
            with pytest.raises(RootAway, match="sites init"):
                confine(f"{disk}/run", [known])
            (disk / "run").rmdir()
            document = engine.run_document(1, ("raw", "lngs", "transferred"))
            document["data"][0]["location"] = f"{disk}/run"
            await db.insert_run(document)
            assert "1 of the newest 1 raw copies at lngs are missing" in (await row(db))["state"]
            assert (await root(db)).disk == known.disk
            (disk / "run").mkdir()
            again = await row(db)
            assert (again["state"], again["marker"]) == ("marked", first["marker"])
            assert confine(f"{disk}/run", [await root(db)]) == vouched(f"{disk}/run")
        with mounted(old, disk):
            assert "on another disk" in (probe(await root(db)).away or "")


@pytest.mark.replicaset
def test_two_hosts_with_one_directory(
    online: Caxev,  # noqa: F811
    tmp_path: Path,
    database: Named,
) -> None:
    """The second site wants a person to confirm it; then both have one copy, and it stays."""
    raw, other = tmp_path / "raw", tmp_path / "other"
    raw.mkdir()
    other.symlink_to(raw)
    entries = [
        {"name": "lngs", "hostname": "login1", "dir_raw": str(raw)},
        {"name": "chicago", "hostname": "login2", "dir_raw": str(other)},
        {"name": "depot", "hostname": "login3", "dir_raw": str(raw)},
    ]
    Path("sites.json").write_text(json.dumps(entries))
    (first,) = json.loads(online("sites", "init", "--site", "lngs", "--json").out)
    assert "dir_raw of lngs" in online("sites", "check", "--site", "depot").err
    for name in ("chicago", "depot"):
        answer = online("sites", "init", "--site", name, "--json")
        assert answer.code == 1
        assert "--force" in json.loads(answer.out)[0]["state"]
        (again,) = json.loads(online("sites", "init", "--site", name, "--force", "--json").out)
        assert again["marker"] == first["marker"]
    good = {"type": "raw", "status": "transferred", "checksum": "ab"}
    data = [
        {**good, "host": "lngs", "location": f"{raw}/run"},
        {**good, "host": "chicago", "location": f"{other}/run"},
        {**good, "host": "depot", "location": f"{raw}/run"},
    ]
    insert(database, 1, data=data)
    answer = online("rm", "--run", "1", "--site", "depot", "--force-less")
    assert answer.code == 1
    assert "there are 0" in answer.out


@pytest.mark.replicaset
def test_an_archive_without_a_noted_marker_is_not_believed(
    online: Caxev,  # noqa: F811
    tmp_path: Path,
    database: Named,
) -> None:
    """An empty directory would pass for an archive that lacks every run, or would take new ones."""
    archive, raw = tmp_path / "archive", tmp_path / "raw"
    for path in (archive, raw):
        path.mkdir()
    entries = [
        {"name": "lngs", "dir_raw": str(raw), "upload_options": ["hsm"]},
        {"name": "hsm", "method": "directory", "dir_raw": str(archive)},
    ]
    Path("sites.json").write_text(json.dumps(entries))
    entry = {"type": "raw", "status": "transferred", "host": "hsm", "checksum": "ab" * 64}
    insert(database, 1, data=[{**entry, "location": f"{archive}/161111_1434"}])
    runs = ("--site", "lngs", "--run", "1")
    for command in ("status", "ls"):
        answer = online("tape", command, *runs)
        assert_one_line(answer, 1, f"hsm: nothing shows that the disk of {archive} is mounted")
    for what in ("stray", f"register {raw}/x"):
        answer = online(*what.split(), "--site", "lngs")
        assert_one_line(answer, 1, "nothing shows", "caxev sites init")
    answer = online("sites", "init", "--site", "lngs", "--json")
    assert answer.code == 1
    assert "missing" in {row["directory"]: row["state"] for row in answer.rows}[str(archive)]
    assert list(archive.iterdir()) == []
    assert online("sites", "init", "--site", "lngs", "--force").code == 0
    (row,) = online("tape", "status", *runs, "--json").rows
    assert row["missing"]


@pytest.mark.replicaset
def test_an_archive_whose_disk_is_away_lacks_nothing(
    online: Caxev,  # noqa: F811
    tmp_path: Path,
    database: Named,
) -> None:
    """The commands of tape name it, and report no run as missing; mounted, they list its files."""
    archive = tmp_path / "archive"
    (archive / "161111_1434").mkdir(parents=True)
    (archive / "161111_1434" / "161111_1434_a").write_text("abc")
    entries = [
        {"name": "lngs", "upload_options": ["hsm"]},
        {"name": "hsm", "method": "directory", "dir_raw": str(archive)},
    ]
    Path("sites.json").write_text(json.dumps(entries))
    assert online("sites", "init", "--site", "lngs", "--force").code == 0
    location = f"{archive}/161111_1434"
    entry = {"type": "raw", "status": "transferred", "host": "hsm", "location": location}
    insert(database, 1, data=[{**entry, "size": 3, "checksum": "ab" * 64}])
    runs = ("--site", "lngs", "--run", "1")
    with unmounted(archive):
        for command in ("status", "ls"):
            assert_one_line(online("tape", command, *runs), 1, f"hsm: {archive} is not the disk")
        restored = online("tape", "get", *runs, "--to", str(tmp_path))
        assert (restored.code, "Mount the disk" in restored.out) == (1, True)
    (row,) = json.loads(online("tape", "status", *runs, "--json").out)
    assert (row["missing"], row["bytes_on_tape"]) == (False, 3)
    assert "161111_1434_a" in online("tape", "ls", *runs).out
