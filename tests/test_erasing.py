"""Copies that are erased or set aside: what goes, what stays, and what happens after a kill."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from caxev import GiveUp, Retry, failpoints
from caxev.files import Confined, Manifest, empty_quarantine, erasing, scan, standing
from caxev.files import erase as erase_marked
from caxev.files.erasing import GONE_PREFIX, NOTHING, QUARANTINE
from caxev.files.erasing import set_aside as set_aside_marked
from caxev.files.identity import identity, is_same
from caxev.files.publishing import rename_new
from caxev.files.space import lacking
from caxev.files.throttle import RateLimiter, idle_disk
from tests.faults.campaign import add_oddities
from tests.places import vouched

WHEN = datetime(2016, 11, 11, 14, 34, tzinfo=UTC)


def erase(place: str, roots: Sequence[str]) -> None:
    """Erase what stands there now."""
    mark = standing(place, roots, None)
    erase_marked(place, roots, mark)


def set_aside(place: str, roots: Sequence[str], paths: Sequence[bytes]) -> str:
    """Set aside files of what stands there now."""
    mark = standing(place, roots, None)
    return set_aside_marked(place, roots, paths, WHEN, mark)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A site's directory with two runs, of many kinds of files."""
    for name in ("one", "two"):
        run = tmp_path / "raw" / name
        (run / "deep").mkdir(parents=True)
        for file in ("a.zip", "pax_info.json", "deep/b.zip"):
            (run / file).write_text(f"{name} {file}")
        add_oddities(run)
    return tmp_path / "raw"


def names(root: Path) -> set[str]:
    return {one.name for one in root.iterdir()}


def test_a_copy_is_erased_and_nothing_else(root: Path, tmp_path: Path) -> None:
    """Links are erased and not followed; its neighbours stay; again, it is nothing to do."""
    (root / "one" / "out").symlink_to(tmp_path / "precious")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("kept")
    before = sorted(map(str, (root / "two").rglob("*")))
    for _ in range(2):
        erase(str(root / "one"), (str(root),))
        assert names(root) == {"two"}
    assert sorted(map(str, (root / "two").rglob("*"))) == before
    assert (tmp_path / "precious" / "file").read_text() == "kept"


def test_a_single_file_is_erased(root: Path) -> None:
    """A processed file is a copy as well."""
    erase(str(root / "two" / "a.zip"), (str(root),))
    assert "a.zip" not in names(root / "two")
    assert "pax_info.json" in names(root / "two")


def test_a_link_at_a_copys_place_is_erased_itself(root: Path) -> None:
    """Not what it leads to, even inside the roots."""
    (root / "link").symlink_to(root / "two")
    erase(str(root / "link"), (str(root),))
    assert names(root) == {"one", "two"}
    assert (root / "two" / "a.zip").exists()


def test_a_read_only_copy_is_erased(root: Path) -> None:
    """Directories that their owner made read-only are no obstacle."""
    (root / "one" / "deep").chmod(0o555)
    (root / "one").chmod(0o555)
    erase(str(root / "one"), (str(root),))
    assert names(root) == {"two"}


@pytest.mark.parametrize(
    "location",
    [
        "{root}",
        "{root}/",
        "{root}/..",
        "{root}/../raw",
        "{root}/one/../../other",
        "{root}/out/other",
        "/",
        "",
        "n/a",
        "one",
        "{root}/one\0",
        "{tmp}/other",
    ],
)
def test_nothing_outside_is_erased(root: Path, tmp_path: Path, location: str) -> None:
    """Whatever the database says a copy's place is."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    (root / "out").symlink_to(tmp_path)
    place = location.format(root=root, tmp=tmp_path)
    for function in (
        lambda: erase(place, (str(root),)),
        lambda: set_aside(place, (str(root),), [b""]),
    ):
        with pytest.raises(GiveUp):
            function()
    assert (tmp_path / "other" / "file").exists()
    assert names(root) == {"one", "two", "out"}


class Killed(BaseException):
    """The process was killed at a point."""


def killed_at(monkeypatch: pytest.MonkeyPatch, nth: int) -> list[str]:
    """Die at the nth point that is passed from now on."""
    passed: list[str] = []

    def point(name: str) -> None:
        passed.append(name)
        if len(passed) == nth:
            raise Killed(name)

    monkeypatch.setattr(failpoints, "point", point)
    return passed


def through_all_kills(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[], object], begin: Callable[[], None]
) -> int:
    """Kill it at each point in turn, and let it go on; how many points there are."""
    for nth in range(1, 50):
        begin()
        killed_at(monkeypatch, nth)
        try:
            act()
        except Killed:
            monkeypatch.undo()
            act()
        else:
            monkeypatch.undo()
            return nth - 1
    raise AssertionError("it never came through")


def test_killed_anywhere_it_is_erased_in_the_end(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never half a copy under its name: it is there, or it is not."""
    mark = ""

    def begin() -> None:
        nonlocal mark
        (root / "new").mkdir()
        (root / "new" / "file").write_text("x")
        mark = standing(str(root / "new"), (str(root),), None)

    def act() -> None:
        assert not (root / "new").exists() or (root / "new" / "file").exists()
        erase_marked(str(root / "new"), (str(root),), mark)
        assert names(root) == {"one", "two"}

    assert through_all_kills(monkeypatch, act, begin) == 3


def test_what_an_earlier_copy_left_goes_too(root: Path) -> None:
    """A name under which a former copy was being erased is free again."""
    (root / f"{GONE_PREFIX}one").mkdir()
    (root / f"{GONE_PREFIX}one" / "file").touch()
    erase(str(root / "one"), (str(root),))
    assert names(root) == {"two"}


def test_files_are_set_aside_and_released(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are named and no others, killed anywhere; then they are gone."""
    place = ""

    def begin() -> None:
        (root / "one" / "deep").mkdir(exist_ok=True)
        for file in ("a.zip", "deep/b.zip"):
            (root / "one" / file).write_text(f"one {file}")
        if place:
            empty_quarantine(place, (str(root),))

    def act() -> None:
        nonlocal place
        paths = [b"a.zip", b"deep/b.zip", b"not-there"]
        place = set_aside(str(root / "one"), (str(root),), paths)
        kept = Path(place)
        assert kept == root / QUARANTINE / "one@20161111T143400000000"
        assert (kept / "a.zip").read_text() == "one a.zip"
        assert (kept / "deep" / "b.zip").read_text() == "one deep/b.zip"
        assert not (root / "one" / "a.zip").exists()
        assert (root / "one" / "pax_info.json").exists()

    assert through_all_kills(monkeypatch, act, begin) == 4
    empty_quarantine(place, (str(root),))
    assert names(root / QUARANTINE) == set()


def test_a_whole_copy_is_set_aside(root: Path) -> None:
    """Where it cannot be known which files differ."""
    place = set_aside(str(root / "one"), (str(root),), [b""])
    assert names(root) == {"two", QUARANTINE}
    assert (Path(place) / "one" / "a.zip").exists()


@pytest.mark.parametrize("path", [b"../two/a.zip", b"/etc/passwd", b"deep/../../two/a.zip"])
def test_nothing_but_the_copys_own_is_set_aside(root: Path, path: bytes) -> None:
    """Whatever a manifest names."""
    with pytest.raises(GiveUp):
        set_aside(str(root / "one"), (str(root),), [path])
    assert (root / "two" / "a.zip").exists()


@pytest.mark.parametrize("place", ["{root}/two", "{root}/.caxev-quarantine", "{root}", "/etc"])
def test_only_a_quarantine_is_emptied(root: Path, place: str) -> None:
    """A place from the database that is none is refused."""
    (root / QUARANTINE).mkdir()
    with pytest.raises(GiveUp):
        empty_quarantine(place.format(root=root), (str(root),))
    assert names(root) == {"one", "two", QUARANTINE}


def fresh(root: Path, name: str) -> Path:
    """A new copy in the place of another, of the same content."""
    old = root / name
    new = root / "coming"
    shutil.copytree(old, new, symlinks=True)
    shutil.rmtree(old)
    return new.rename(old)


def test_the_same_name_and_number_is_not_the_same_copy(root: Path) -> None:
    """An inode number is soon used again; links are themselves."""
    marks = set()
    for _ in range(20):
        marks.add(identity(vouched(root / "one")))
        fresh(root, "one")
    assert len(marks) == 20
    (root / "link").symlink_to("one")
    assert identity(vouched(root / "link")) not in {identity(vouched(root / "one")), None}
    (root / "one").rename(root / "moved")
    assert identity(vouched(root / "one")) is None
    assert identity(vouched(root / "moved")) is not None


def test_a_disk_that_was_mounted_again_has_the_same_copies(root: Path) -> None:
    """Its number may be another one by then; without a time of birth, nothing is known for sure."""
    major, minor, inode, born = (identity(vouched(root / "one")) or "").split(":")
    mark = f"{major}:{minor}:{inode}:{born}"
    assert int(born) > 0
    assert is_same(f"{major}9:{minor}9:{inode}:{born}", mark)
    assert not is_same(f"{major}:{minor}:{inode}1:{born}", mark)
    assert not is_same(f"{major}:{minor}:{inode}:{born}1", mark)
    assert is_same("0:1:2:0", "0:1:2:0")
    assert not is_same("0:9:2:0", "0:1:2:0")
    for other in (NOTHING, "", "mark", None):
        assert not is_same(mark, other)
        assert not is_same(None, other)
    erase_marked(str(root / "one"), (str(root),), f"9:9:{inode}:{born}")
    assert names(root) == {"two"}


@pytest.mark.parametrize("moment", ["before the look", "before the rename"])
def test_an_old_intent_erases_no_new_copy(
    root: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """A process is stopped; another one erases the copy and makes it anew; the first goes on."""
    place, roots = str(root / "one"), (str(root),)
    mark = standing(place, roots, None)
    if moment == "before the look":
        fresh(root, "one")
    else:

        def late(old: Confined, new: Confined) -> None:
            if old == vouched(place):
                fresh(root, "one")
            rename_new(old, new)

        monkeypatch.setattr(erasing, "rename_new", late)
    before = scan(vouched(place))
    with pytest.raises(Retry, match="something else stands there"):
        erase_marked(place, roots, mark)
    assert scan(vouched(place)) == before
    assert names(root) == {"one", "two"}


def test_what_was_renamed_by_mistake_gets_its_name_back(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that has hit a new copy is killed before it can give the name back."""
    place, roots = str(root / "one"), (str(root),)
    mark = standing(place, roots, None)
    new = fresh(root, "one")
    before = scan(vouched(new))
    new.rename(root / f"{GONE_PREFIX}one")
    with pytest.raises(Retry, match="something else stands there"):
        erase_marked(place, roots, mark)
    assert scan(vouched(place)) == before
    assert names(root) == {"one", "two"}


def test_what_is_being_erased_is_known_by_more_than_its_name(root: Path) -> None:
    """Another process may have given the name to a new copy, for a moment."""
    place, roots = str(root / "one"), (str(root),)
    mark = standing(place, roots, None)
    for name in ("one", f"{GONE_PREFIX}one"):
        shutil.rmtree(root / "one", ignore_errors=True)
        (root / name).mkdir()
        (root / name / "file").touch()
    (root / "one").mkdir()
    with pytest.raises(Retry, match="something else stands there"):
        erase_marked(place, roots, mark)
    assert (root / f"{GONE_PREFIX}one" / "file").exists()


def test_an_old_intent_erases_nothing_that_came_where_nothing_was(root: Path) -> None:
    """The copy was gone already when it was looked at."""
    place, roots = str(root / "one"), (str(root),)
    with pytest.raises(Retry, match="something else stands there"):
        erase_marked(place, roots, None)
    assert (root / "one" / "a.zip").exists()


def test_an_old_intent_sets_nothing_of_a_new_copy_aside(root: Path) -> None:
    """Nor does one that is late empty the quarantine of a later time."""
    place, roots = str(root / "one"), (str(root),)
    mark = standing(place, roots, None)
    fresh(root, "one")
    with pytest.raises(Retry, match="not what was to be set aside"):
        set_aside_marked(place, roots, [b"a.zip"], WHEN, mark)
    assert (root / "one" / "a.zip").exists()
    mark, later = identity(vouched(place)) or "", WHEN + timedelta(days=1)
    kept = [
        set_aside_marked(place, roots, [name], when, mark)
        for name, when in ((b"a.zip", WHEN), (b"deep/b.zip", later))
    ]
    empty_quarantine(kept[0], roots)
    assert (Path(kept[1]) / "deep" / "b.zip").exists()


def test_what_is_not_what_its_manifest_lists_is_not_erased(root: Path) -> None:
    """Such as another run's directory that an entry names by mistake."""
    shape: Manifest = scan(vouched(root / "one"))
    (root / "two" / "more").touch()
    assert standing(str(root / "one"), (str(root),), shape)
    assert standing(str(root / "none"), (str(root),), shape) == NOTHING
    with pytest.raises(GiveUp, match="more is unexpected"):
        standing(str(root / "two"), (str(root),), shape)


def test_a_disk_that_fails_is_tried_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the disk is no reason to give up, and is told in words."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(erasing, "rename_new", fail)
    with pytest.raises(Retry, match=r"cannot erase .*one: Input/output error"):
        erase(str(root / "one"), (str(root),))


def test_what_is_lacking_on_a_disk(root: Path) -> None:
    """What must stay free, and what is coming and not there yet, less what is free."""

    def need(min_free: int, coming: int) -> int:
        return lacking(str(root / "one"), (str(root),), min_free, coming)

    assert need(0, 0) < 0
    assert need(1 << 60, 0) > 0
    blocks = 512 * (root / "one" / "a.zip").stat().st_blocks
    assert need(1 << 60, blocks) < need(1 << 60, 0) + blocks  # some of it is there already


def test_a_brake_keeps_its_rate() -> None:
    """So many bytes take so long at least, whoever reads them; without a rate, no time."""
    import time

    brake, began = RateLimiter(1e6), time.monotonic()
    for _ in range(4):
        brake.passed(25_000)
    assert time.monotonic() - began >= 0.099
    RateLimiter(None).passed(1 << 60)


def test_the_disk_is_left_to_others_for_a_while() -> None:
    """And to us as before, afterwards."""
    import psutil

    before = psutil.Process().ionice()
    with idle_disk():
        assert psutil.Process().ionice().ioclass == psutil.IOPRIO_CLASS_IDLE
    assert psutil.Process().ionice() == before
