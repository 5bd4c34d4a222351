"""Entries that name one place on the disk, in one way or another."""

from __future__ import annotations

from pathlib import Path

import pytest

from caxev.config import Site, Sites
from caxev.copies.retention import DeletionWish, plan
from caxev.copies.sharing import Neighbours, neighbours, sharing_here
from caxev.core.clock import utcnow
from caxev.core.model import Copy, CopyKey, Run
from caxev.core.paths import plain
from caxev.files.places import overlapping
from tests import engine
from tests.conftest import Database as Named

RAW = CopyKey("raw", "lngs")
NEEDED = ("number", "name", "detector")
PLACED = ("status", "location")
SPELLINGS = (
    "{root}//run",
    "/{root}/run",
    "{root}/./run",
    "{root}/run/",
    "{root}/run//",
    "{root}/run/.",
    "{root}/other/../run",
    "{tmp}/alias/run",
    "{tmp}/to-run",
    "{root}/link",
    "{root}/run/sub",
    "{tmp}/alias",
)
"""Of the place ``{root}/run``, of one inside of it, and of one that holds it."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A site's directory with runs, and links to it and into it."""
    root = tmp_path / "raw"
    for name in ("run/sub", "other", "run2"):
        (root / name).mkdir(parents=True)
    (tmp_path / "alias").symlink_to(root)
    (tmp_path / "to-run").symlink_to(root / "run")
    (root / "link").symlink_to("run")
    return root


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_one_place_is_known_however_it_is_written(root: Path, spelling: str) -> None:
    """And another one is not taken for it."""
    other = spelling.format(root=root, tmp=root.parent)
    place = str(root / "run")
    beside = [str(root / "run2"), f"{root}/run/../run2", "n/a", "run"]
    assert overlapping(place, [*beside, other]) == [len(beside)]
    assert overlapping(other, [place]) == [0]


def test_a_path_has_one_plain_way_of_writing() -> None:
    """As far as the text shows; what is no path stays as it is."""
    for text in ("/a/b", "//a/b", "///a//b/", "/a/./b/.", "/a/c/../b", "/a/b//"):
        assert plain(text) == "/a/b"
    assert plain("scope:name//x") == "scope:name//x"
    assert plain("/") == "/"


def sites(root: Path, **others: Path) -> Sites:
    """``lngs`` with its data in `root`, and others on this machine."""
    named = {"lngs": root, **others}
    there = {
        name: Site(name, method="local", dir_raw=str(where), data_type=("raw",))
        for name, where in named.items()
    }
    return Sites(root.parent / "sites.json", there)


def entry(location: str, **fields: object) -> dict[str, object]:
    usual = {"type": "raw", "host": "lngs", "status": "transferred", "checksum": "ab"}
    return {**usual, "location": location, **fields}


@pytest.mark.parametrize("spelling", ["{root}//run", "{root}/./run", "{root}/run/"])
def test_a_run_s_own_second_name_is_seen_without_the_disk(root: Path, spelling: str) -> None:
    """Neither is wanted gone: its files are the other's."""
    second = entry(spelling.format(root=root), type="processed", pax_version="v1")
    run = Run.from_document({"_id": 1, "data": [entry(f"{root}/run"), second]})
    known = sites(root)
    mine = run.copy(RAW)
    assert mine is not None
    found = plan(run, DeletionWish(mine, "test", "asked", 0), known.get("lngs"), known, utcnow())
    assert "another entry is at" in str(found)


@pytest.mark.parametrize(
    ("fields", "named"),
    [*(({"type": kind}, "unknown at lngs") for kind in (None, "", 5))]
    + [({"host": host}, "raw at unknown") for host in (None, "", 5)],
)
async def test_files_of_an_entry_without_a_type_or_a_host_are_shared(
    root: Path, fields: dict[str, object], named: str
) -> None:
    """Somebody has edited it by hand: of the same run, or of another one."""
    mine, other = entry(f"{root}/run", pax_version="v1"), {**entry(f"{root}/run/sub"), **fields}
    known, here = sites(root), sites(root).get("lngs")
    run = Run.from_document({"_id": 1, "data": [mine, other]})
    copy = run.copies[0]
    found = plan(run, DeletionWish(copy, "test", "asked", 0), here, known, utcnow())
    assert "another entry is at" in str(found)

    async def find(_wanted: Neighbours) -> list[Run]:
        return [Run.from_document({"_id": 2, "data": [other]})]

    assert await sharing_here(find, run, copy, here, known) == [f"{named} of run 2"]


def test_two_names_of_a_shared_directory_are_not_two_copies(root: Path) -> None:
    """Of sites on one machine; the second is none of the copies that must remain."""
    known = sites(root, chicago=root)
    other = entry(f"{root}/./run", host="chicago")
    run = Run.from_document({"_id": 1, "data": [entry(f"{root}/run"), other]})
    mine = run.copy(RAW)
    assert mine is not None
    found = plan(run, DeletionWish(mine, "test", "asked", 1), known.get("lngs"), known, utcnow())
    assert "there are 0" in str(found)


def test_the_same_directory_may_have_other_names_elsewhere(root: Path) -> None:
    """Sites beside it, and an entry that has the name to which a link leads."""
    known = sites(root, chicago=root.parent / "alias")
    alias = f"{root.parent}/alias/run"
    for location in (f"{root}/run", f"{root}//run", alias, "/mnt/disk/run"):
        wanted = neighbours(
            Copy(RAW, "transferred", {"location": location}), known.get("lngs"), known
        )
        assert {f"{root}/run", alias} <= {*wanted.names}
        assert wanted.hosts == {"lngs", "chicago"}


@pytest.mark.replicaset
async def test_the_database_finds_all_that_may_be_there(database: Named, root: Path) -> None:
    """Whatever it may lead to, and nothing of what is plainly elsewhere."""
    known = sites(root)
    here = known.get("lngs")
    places = [spelling.format(root=root, tmp=root.parent) for spelling in SPELLINGS]
    elsewhere = [str(root / "run2"), str(root / "runs"), "n/a", f"{root}/.../run"]
    async with engine.opened(database) as db:
        for number, place in enumerate([*places, *elsewhere], start=2):
            data = [entry(place, checksum="cd" if place in elsewhere else "ab")]
            await db.insert_run({**engine.run_document(number), "data": data})
        mine = {**engine.run_document(1), "data": [entry(f"{root}/run")]}
        run = (await db.runs([run_id := await db.insert_run(mine)]))[run_id]
        copy = run.copy(RAW)
        assert copy is not None
        found = await db.neighbours(neighbours(copy, here, known))
        numbers = {one.number for one in found} - {1}
        assert numbers == {*range(2, 2 + len(places))}
        # They may be many: no more of them is read than it takes.
        assert {name for one in found for name in one.document} == {"_id", *NEEDED, "data"}
        there = [row for one in found for row in one.document["data"]]
        assert all(tuple(row) == ("type", "host", *PLACED) for row in there)
        shared = await sharing_here(db.neighbours, run, copy, here, known)
        assert len(shared) == len(places)
