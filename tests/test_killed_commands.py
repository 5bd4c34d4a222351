"""Commands that are killed between two writes, and given again."""

from __future__ import annotations

import gc
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import frozen
from pymongo import MongoClient

from caxev.cli import cli
from caxev.files import digest_tree
from caxev.files.roots import marker_path
from tests import engine
from tests.conftest import Database as Named
from tests.places import vouched
from tests.test_commands import NAME, SHM, elsewhere, write_run
from tests.test_tape import killed_at, points_of

Document = dict[str, Any]
OTHERS = ("chicago", "stockholm")
WHEN = datetime(2026, 1, 1, tzinfo=UTC)
MARKER = "0123456789abcdef"
ID = re.compile("[0-9a-f]{8}|[0-9a-f]{32}")


@frozen
class Place:
    """A site's directories, and another file system; `digest` is that of a run written there."""

    root: Path
    far: Path
    digest: str = ""

    @property
    def raw(self) -> Path:
        return self.root / "raw"

    def entry(self, host: str = "lngs", **fields: Any) -> Document:
        location = str(self.raw / NAME) if host == "lngs" else f"/{host}/{NAME}"
        usual = {"type": "raw", "host": host, "status": "transferred", "location": location}
        return {**usual, "manifest": self.digest, "checksum": "ab" * 64, **fields}

    def begin(self) -> None:
        """Have nothing stand there but one run."""
        for path in (self.root, self.far):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        write_run(self.raw / NAME)
        for path in (self.raw, self.far):
            Path(marker_path(str(path), MARKER)).touch()

    async def note(self, database: Named) -> None:
        """Note that its directories are known by their markers, and the run's manifest."""
        manifest = digest_tree(vouched(self.raw / NAME), sha512=True, report=lambda *_: None)
        async with engine.opened(database) as db:
            for path in (self.raw, self.far):
                await db.note_marker("lngs", str(path), MARKER)
            await db.store_manifest(manifest.digest, manifest.to_rows())


def known(place: Place) -> list[Document]:
    """A run that is at three sites."""
    return [place.entry(), *map(place.entry, OTHERS)]


def unknown(_: Place) -> list[Document]:
    """A run that is nowhere, says the database."""
    return []


def unheard_of(_: Place) -> None:
    """No run at all."""


def going(place: Place) -> list[Document]:
    """One that is to be deleted."""
    wish = {"by": "tests", "why": "x", "keep": 1, "at": WHEN, "was": "transferred"}
    return [place.entry(status="deleting", deletion=wish), *map(place.entry, OTHERS)]


def strays(place: Place) -> list[Document]:
    """One that is known, beside a directory and a file that are not."""
    write_run(place.raw / "161112_0000")
    (place.raw / "stray").write_text("left by somebody")
    return known(place)


def at_odds(place: Place) -> list[Document]:
    """One whose copies contradict one another."""
    return [place.entry(), *(place.entry(host, manifest=f"b3:{host}") for host in OTHERS)]


AT = "--site lngs"
DEEDS: dict[str, tuple[str, Callable[[Place], list[Document] | None]]] = {
    "mv": (f"mv --run 1 {AT} --to {{root}}/raw/2016", known),
    "mv to another disk": (f"mv --run 1 {AT} --to {{far}}/2016", known),
    "rm": (f"rm --run 1 {AT}", known),
    "rm --cancel": (f"rm --run 1 {AT} --cancel", going),
    "rm of several": (f"rm --run 1-2 {AT}", known),
    "hold": (f"hold --run 1 {AT} --why talk", known),
    "tag": ("tag add good --run 1", known),
    "tag of several": ("tag add good --run 1-2", known),
    "register": (f"register {{root}}/raw/{NAME} {AT}", unknown),
    "register --create": (f"register {{root}}/raw/{NAME} {AT} --run 1 --create", unheard_of),
    "stray --delete": (f"stray {AT} --delete --age 0", strays),
    "stray --register": (f"stray {AT} --register --age 0", unknown),
    "vouch": (f"vouch --run 1 {AT}", at_odds),
}
"""What is given, and what stands there before: the entries of the run, with files of its own."""
ONCE = ("rm", "rm of several", "tag", "tag of several")
"""What is refused if it was done: the history has one row of it, however often it is given."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.chdir(tmp_path)
    with tempfile.TemporaryDirectory(dir=SHM if elsewhere() else None) as far:
        empty = Place(tmp_path / "lngs", Path(far) / "processed")
        empty.begin()
        manifest = digest_tree(vouched(empty.raw / NAME), sha512=True, report=lambda *_: None)
        yield Place(empty.root, empty.far, manifest.digest)


@pytest.mark.replicaset
@pytest.mark.parametrize("deed", DEEDS)
def test_killed_at_each_point(deed: str, place: Place, database: Named, tmp_path: Path) -> None:
    """Killed anywhere and given again, a command ends as if nothing had been.

    Nothing is lost meanwhile: what an entry calls good stands whole where it says.
    """
    words, prepare = DEEDS[deed]
    given = words.format(root=place.root, far=place.far).split()
    write_sites(tmp_path / "sites.json", place)
    trio.run(place.note, database)
    options = ["--config", str(tmp_path / "sites.json"), "--database", database.name]

    def command() -> None:
        gc.freeze()  # else a collection would copy the memory that we share with the test
        cli.main([*given, "--mongo-uri", database.uri, *options], prog_name="caxev")

    with MongoClient[Document](database.uri) as client, engine.short_transactions(database):
        runs, history = (client[database.name][name] for name in ("runs_new", "caxev_history"))

        def begin() -> None:
            runs.delete_many({})
            history.delete_many({})
            place.begin()
            if (data := prepare(place)) is not None:
                runs.insert_one({**engine.run_document(1, name=NAME), "data": data})

        def end() -> object:
            found = [plain({**run, "_id": None}) for run in runs.find().sort("_id")]
            rows = sorted(row["what"] for row in history.find()) if deed in ONCE else []
            return found, rows, files_in(place.root), files_in(place.far)

        begin()
        before = end()
        points = points_of(command, tmp_path / "points")
        whole = end()
        assert whole != before
        assert points
        for point in points:
            begin()
            assert killed_at(point, command), point
            for run in runs.find():
                assert all(stands(one, place) for one in run["data"]), (point, run["data"])
            assert not killed_at("nowhere:1", command)
            assert end() == whole, point


def stands(entry: Document, place: Place) -> bool:
    """Whether what is called good here is there, whole."""
    if (entry["host"], entry["status"]) != ("lngs", "transferred"):
        return True
    found = digest_tree(vouched(entry["location"]), sha512=False, report=lambda *_: None)
    return found.digest == place.digest


def plain(value: Any) -> Any:
    """A document without its times, ids of requests, repeated ones, and what is set to nothing."""
    if isinstance(value, str) and ID.fullmatch(value):
        return "an id"
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        rows = [plain(one) for one in value]
        return [one for at, one in enumerate(rows) if one not in rows[:at]]
    return "a time" if isinstance(value, datetime) else value


def files_in(path: Path) -> list[tuple[str, int]]:
    found = (one for one in path.rglob("*") if not one.is_dir())
    return sorted((str(one.relative_to(path)), one.stat().st_size) for one in found)


def write_sites(file: Path, place: Place) -> None:
    here: Document = {"name": "lngs", "dir_raw": str(place.raw), "dir_processed": str(place.far)}
    here |= {"deletion": {"copies": len(OTHERS)}}
    others = [
        {"name": name, "hostname": f"{name}.example.org", "dir_raw": f"/{name}"} for name in OTHERS
    ]
    file.write_text(json.dumps([here, *others]))
