"""What is done by a resolved path follows no link that was put in its way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from caxev.core.errors import GiveUp, Retry
from caxev.files import Seen, StagedCopy, erase, look, open_resolved, resolved
from caxev.files import join as below
from caxev.files.publishing import rename_new
from caxev.transfer.receive import read_piece, write_piece
from tests.places import vouched


@pytest.fixture(params=["openat2", "step by step"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernel's own call, and as where there is none."""
    if request.param == "openat2":
        if not resolved._has_openat2():
            pytest.skip("this kernel has no openat2")
    else:
        monkeypatch.setattr(resolved, "_has_openat2", lambda: False)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What nobody may touch, and beside it a link that leads there: `ours`/link."""
    there = tmp_path / "outside"
    (there / "sub").mkdir(parents=True)
    (there / "file").write_text("not ours")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "link").symlink_to(there)
    return there


def state(top: Path) -> list[tuple[str, int, bytes]]:
    found = sorted(top.rglob("*"))
    return [
        (str(one), one.stat().st_mode, one.read_bytes() if one.is_file() else b"") for one in found
    ]


@pytest.mark.usefixtures("way")
def test_what_is_there_is_opened(tmp_path: Path) -> None:
    """And made, with its mode, where that is asked for."""
    path = tmp_path / "a" / "b"
    path.parent.mkdir()
    os.close(open_resolved(vouched(path), os.O_WRONLY | os.O_CREAT, 0o600))
    assert path.stat().st_mode & 0o777 == 0o600
    os.close(open_resolved(vouched(path.parent), os.O_RDONLY | os.O_DIRECTORY))
    with pytest.raises(FileNotFoundError, match="none"):
        open_resolved(vouched(tmp_path / "none"), os.O_RDONLY)


DEEDS: dict[str, Callable[[Path], object]] = {
    "read": lambda link: open_resolved(vouched(link / "file"), os.O_RDONLY),
    "make": lambda link: open_resolved(vouched(link / "new"), os.O_WRONLY | os.O_CREAT, 0o644),
    "itself": lambda link: open_resolved(vouched(link), os.O_RDONLY),
    "unlink": lambda link: resolved.unlink(vouched(link / "file")),
    "remove": lambda link: resolved.remove(vouched(link / "sub")),
    "rmdir": lambda link: resolved.rmdir(vouched(link / "sub")),
    "mkdir": lambda link: resolved.mkdir(vouched(link / "new"), 0o755),
    "mkdir there": lambda link: resolved.mkdir(vouched(link), 0o700),
    "symlink": lambda link: resolved.symlink(b"x", vouched(link / "new")),
    "link": lambda link: resolved.link(vouched(link / "file"), vouched(link.parent / "taken")),
    "rename": lambda link: resolved.rename(vouched(link / "file"), vouched(link.parent / "taken")),
    "rename there": lambda link: rename_new(vouched(link.parent / "mine"), vouched(link / "new")),
    "chmod": lambda link: resolved.chmod(vouched(link / "file"), 0o600),
    "sync": lambda link: resolved.sync(vouched(link / "file")),
}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("deed", DEEDS)
def test_no_link_is_followed(deed: str, outside: Path) -> None:
    """Wherever on the way it stands."""
    link = outside.parent / "ours" / "link"
    (link.parent / "mine").touch()
    before = state(outside.parent)
    with pytest.raises(OSError, match=r"symbolic|Not a directory"):
        DEEDS[deed](link)
    assert state(outside.parent) == before


@pytest.mark.usefixtures("way")
def test_a_link_is_removed_and_not_followed(outside: Path) -> None:
    """Itself, as what stands there, and one that stands in a directory that is removed."""
    ours = outside.parent / "ours"
    (ours / "directory").mkdir()
    (ours / "directory" / "inner").symlink_to(outside)
    before = state(outside)
    resolved.remove(vouched(ours / "directory"))
    resolved.remove(vouched(ours / "link"))
    resolved.remove(vouched(ours / "none"))
    assert list(ours.iterdir()) == []
    assert state(outside) == before


@pytest.mark.usefixtures("way")
def test_a_link_put_into_a_copy_that_is_being_made(outside: Path) -> None:
    """In place of a directory or of a file: what comes next fails, and nothing is touched there."""
    root = outside.parent / "ours"
    source = [
        Seen(b"sub", "dir"),
        Seen(b"file", "file", 3, 10**9),
        Seen(b"sub/file", "file", 3, 10**9),
    ]
    arrival = StagedCopy(vouched(root / "run"), [str(root)], source)
    before = state(outside)
    with arrival.opened() as todo:
        partial = Path(os.fsdecode(arrival.partial))
        (partial / "sub").rmdir()
        (partial / "sub").symlink_to(outside)
        (partial / "file").symlink_to(outside / "file")
        for piece in todo.pieces:
            path = below(arrival.partial, piece.file.path)
            with pytest.raises(Retry, match=r"symbolic|Not a directory"):
                write_piece(path, piece, b"new")
            with pytest.raises(Retry, match=r"symbolic|Not a directory"):
                list(read_piece(path, piece))
        with pytest.raises(Retry, match=r"symbolic|Not a directory"):
            arrival.finish(todo)
    assert state(outside) == before


def test_a_listing_that_leads_out_is_refused(tmp_path: Path) -> None:
    """Whoever says what is to be copied does not say where it is written."""
    for path in (b"../outside", b"/outside", b"sub/../../outside", b"", b"nul\0"):
        source = [Seen(b"sub", "dir"), Seen(path, "file", 3, 10**9)]
        with pytest.raises(GiveUp, match="impossible name"):
            StagedCopy(vouched(tmp_path / "run"), [str(tmp_path)], source)


@pytest.mark.usefixtures("way")
def test_what_is_erased_is_ours(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that became a link after it was looked at: nothing is erased where it leads."""
    ours = outside.parent / "ours"
    (ours / "sub" / "file").parent.mkdir()
    (ours / "sub" / "file").touch()
    before = state(outside)
    confine = erase.__globals__["confine_entry"]

    def swapped(location: str, roots: list[str]) -> str:
        found: str = confine(location, roots)
        (ours / "sub").rename(ours / "moved")
        (ours / "sub").symlink_to(outside)
        return found

    monkeypatch.setitem(erase.__globals__, "confine_entry", swapped)
    with pytest.raises(Retry, match=r"symbolic|Not a directory|something else"):
        erase(str(ours / "sub" / "file"), [str(ours)], "mark")
    assert state(outside) == before
    assert [one.path for one in look(vouched(ours / "moved"))] == [b"file"]


def test_a_directory_that_becomes_a_fifo_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody writes to it: whoever opened it to read would wait for ever."""
    (tmp_path / "run" / "below").mkdir(parents=True)
    unlink = os.unlink

    def swapped(path: bytes, *, dir_fd: int | None = None) -> None:
        """Put a FIFO there at the last moment, as one who may write there can."""
        try:
            unlink(path, dir_fd=dir_fd)
        except IsADirectoryError:
            os.rmdir(path, dir_fd=dir_fd)
            os.mkfifo(path, dir_fd=dir_fd)
            raise

    monkeypatch.setattr(os, "unlink", swapped)
    with pytest.raises(NotADirectoryError):
        resolved.remove(vouched(tmp_path / "run"))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
def test_a_fifo_is_opened_without_waiting(tmp_path: Path, flags: int) -> None:
    """Whatever for."""
    os.mkfifo(tmp_path / "fifo")
    try:
        os.close(open_resolved(vouched(tmp_path / "fifo"), flags))
    except OSError:
        assert flags == os.O_WRONLY  # nobody reads it


@pytest.mark.usefixtures("way")
def test_a_look_follows_no_directory_that_becomes_a_link(
    tmp_path: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Swapped between its being listed and its being looked into, it shows nothing of outside."""
    run = tmp_path / "run"
    (run / "below").mkdir(parents=True)
    scandir = os.scandir

    def swapped(path: int | bytes | str) -> object:
        found = scandir(path)
        if (run / "below").is_dir() and not (run / "below").is_symlink():
            (run / "below").rename(tmp_path / "aside")
            (run / "below").symlink_to(outside)
        return found

    (run / "a").mkdir()
    monkeypatch.setattr(os, "scandir", swapped)
    with pytest.raises((Retry, GiveUp)):
        look(vouched(run))
