"""Copies that are being made: what of a partial is believed, and what is never written to."""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest
from attrs import evolve, frozen

from caxev.core.errors import GiveUp, Retry
from caxev.files import (
    PART,
    Manifest,
    Piece,
    Plan,
    StagedCopy,
    digest,
    digest_tree,
    join,
    look,
    publish,
    publishing,
    reading,
    writing,
)
from caxev.files.reading import Stretch
from caxev.transfer.receive import Wire, item_rows, packed, seen_rows, serve
from tests.forked import armed, forked
from tests.places import partial_of, vouched
from tests.test_files import make_run, quiet

OLD: Final = 1_480_000_000
BIG: Final = 3 * PART + 1234


def digested(path: Path) -> Manifest:
    return digest_tree(vouched(path), sha512=False, report=quiet)


@frozen
class Place:
    """A source, and where a copy of it is to stand."""

    source: Path
    final: Path

    @property
    def partial(self) -> Path:
        return partial_of(self.final)

    @property
    def known(self) -> Manifest:
        return digested(self.source)

    def arrival(self, expected: Manifest | None = None, **options: Any) -> StagedCopy:
        roots = [str(self.final.parent)]
        return StagedCopy(
            vouched(self.final), roots, look(vouched(self.source)), expected, **options
        )

    def move(self, piece: Piece) -> None:
        """Write one stretch, as a mover does."""
        descriptor = os.open(self._inside(self.partial, piece), os.O_WRONLY | os.O_CREAT)
        with (
            os.fdopen(descriptor, "wb") as file,
            self._inside(self.source, piece).open("rb") as source,
        ):
            source.seek(piece.start)
            file.seek(piece.start)
            file.write(source.read(piece.left))

    def _inside(self, root: Path, piece: Piece) -> Path:
        return Path(os.fsdecode(join(vouched(root), piece.file.path)))

    def complete(self, arrival: StagedCopy) -> Plan:
        """Make all that is left of the copy."""
        with arrival.opened() as todo:
            for piece in todo.pieces:
                self.move(piece)
            arrival.finish(todo)
            arrival.publish()
        assert digested(self.final) == self.known
        assert [path.name for path in self.final.parent.iterdir()] == [self.final.name]
        return todo


def place_of(tmp_path: Path, *, single: bool, size: int = BIG) -> Place:
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
    source = tmp_path / "source" / "run"
    if not single:
        make_run(source)
    big = source if single else source / "big"
    big.write_bytes((os.urandom(1_000_003) * 13)[:size])  # no two parts are alike
    os.utime(big, (OLD, OLD))
    return Place(source, tmp_path / "target" / "run")


@pytest.fixture(params=[False, True], ids=["directory", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return place_of(tmp_path, single=request.param)


@pytest.fixture
def run(tmp_path: Path) -> Place:
    return place_of(tmp_path, single=False)


def big_of(place: Place, root: Path) -> Path:
    return root / "big" if place.source.is_dir() else root


def flip(path: Path, at: int) -> None:
    """Flip one bit, and leave no trace of it in the file's time."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))


# Holes


def broken_off(place: Place, *, at: int) -> None:
    """Leave of a copy of known digests only that stretch of its big file which begins at `at`."""
    with place.arrival(place.known).opened() as todo:
        for piece in todo.pieces:
            if piece.file.size == BIG:
                place.move(evolve(piece, start=at, stop=min(at + PART, BIG)))
            else:
                place.move(piece)


@pytest.mark.parametrize("at", [0, PART, 3 * PART])
def test_a_file_with_holes_is_not_taken_for_its_length(place: Place, at: int) -> None:
    """Where digests were known and are not any more, the file is moved from its start."""
    broken_off(place, at=at)
    todo = place.complete(place.arrival())
    spans = [(piece.start, piece.stop) for piece in todo.pieces if piece.file.size == BIG]
    assert spans == [(0, BIG)]


@pytest.mark.parametrize("at", [0, PART, 3 * PART])
def test_what_is_right_between_holes_is_kept(place: Place, at: int) -> None:
    """Where digests are still known, only the holes are filled, and space is asked for these."""
    broken_off(place, at=at)
    todo = place.complete(place.arrival(place.known))
    spans = [piece for piece in todo.pieces if piece.file.size == BIG]
    assert sum(piece.left for piece in spans) == BIG - min(PART, BIG - at)


@pytest.mark.parametrize("again", [False, True])
def test_a_whole_file_is_kept_from_being_believed_while_it_is_mended(
    place: Place, again: bool
) -> None:
    """Of the right size and time, but of wrong bytes: broken off, it passes for nothing."""
    place.complete(place.arrival())
    big = big_of(place, place.final)
    flip(big, PART + 1)
    if not again:
        place.final.rename(place.partial)
    known = place.known
    with place.arrival(known, again=again).opened() as todo:
        assert [(p.start, p.stop) for p in todo.pieces if p.left] == [(PART, 2 * PART)]
    assert big_of(place, place.partial).stat().st_size == BIG + 1
    place.complete(place.arrival())


def test_what_is_whole_loses_what_is_beyond_its_end(place: Place) -> None:
    """A file that is longer than it must be, and otherwise right, is only cut."""
    place.complete(place.arrival())
    place.final.rename(place.partial)
    with big_of(place, place.partial).open("ab") as file:
        file.write(b"more")
    todo = place.complete(place.arrival(place.known))
    assert todo.left == 0


def test_the_hole_of_a_longer_file_counts_as_space_that_is_needed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an attempt has only reserved by length takes nothing of the disk yet."""
    with place.arrival(place.known).opened():
        pass
    assert big_of(place, place.partial).stat().st_size == BIG + 1
    monkeypatch.setattr(StagedCopy, "free", lambda _self: (16 << 20) + BIG // 2)
    with pytest.raises(Retry, match="not enough space"), place.arrival(place.known).opened():
        pass


def test_small_files_are_not_made_before_they_come(run: Place) -> None:
    """A file of less than a part is written in one go, and needs no such guard."""
    with run.arrival(run.known).opened():
        assert not (run.partial / "sub" / "deep" / "data").exists()


# Hard links


def test_what_has_another_name_is_never_written_to(place: Place, tmp_path: Path) -> None:
    """Not its bytes, not its length, mode or time: the name in the partial is taken out."""
    big = big_of(place, place.partial)
    big.parent.mkdir(exist_ok=True)
    precious = tmp_path / "precious"
    precious.write_bytes(b"p" * 1000)
    precious.chmod(0o600)
    os.utime(precious, (OLD, OLD))
    for expected, again in ((None, False), (place.known, False), (place.known, True)):
        os.link(precious, big)
        before = precious.stat()
        place.complete(place.arrival(expected, again=again))
        after = precious.stat()
        assert precious.read_bytes() == b"p" * 1000
        assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
        assert after.st_nlink == 1
        place.final.rename(place.partial)
        big.unlink()


def test_what_a_mover_has_linked_keeps_what_it_has(run: Place) -> None:
    """A hard link made since is the source's own file: it gets no mode and no time."""
    big = run.source / "big"
    big.chmod(0o640)
    changed = big.stat().st_ctime_ns
    arrival = run.arrival()
    with arrival.opened() as todo:
        for piece in todo.pieces:
            if piece.file.path == b"big":
                os.link(big, run.partial / "big")
            else:
                run.move(piece)
        made = big.stat().st_ctime_ns
        arrival.finish(todo)
        assert changed <= made == big.stat().st_ctime_ns
        arrival.publish()
    assert big.samefile(run.final / "big")
    assert digested(run.final) == run.known


# Mending


@pytest.mark.parametrize("whole_files", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_a_copy_that_has_its_name_is_mended(place: Place, known: bool, whole_files: bool) -> None:
    """It loses its name; of known digests the bad parts are moved, else all of it."""
    place.complete(place.arrival())
    flip(big_of(place, place.final), PART + 1)
    expected = place.known if known else None
    arrival = place.arrival(expected, again=True, whole_files=whole_files)
    assert not arrival.stands()
    todo = place.complete(arrival)
    moved = sum(piece.left for piece in todo.pieces)
    wanted = BIG if whole_files else PART
    assert moved == (wanted if known else place.known.total_bytes)


@pytest.mark.parametrize("whole_files", [False, True])
def test_what_is_right_of_a_bad_copy_is_moved_by_nobody(place: Place, whole_files: bool) -> None:
    """A copy that is to be repaired and is as it must be gets its name back."""
    place.complete(place.arrival())
    todo = place.complete(place.arrival(place.known, again=True, whole_files=whole_files))
    assert todo.left == 0


def test_a_copy_is_withdrawn_by_one(place: Place) -> None:
    """Who comes while another repairs it is told to come back, and takes nothing away."""
    place.complete(place.arrival())
    one, other = (place.arrival(place.known, again=True) for _ in range(2))
    with one.opened() as todo:
        assert not place.final.exists()
        with pytest.raises(Retry, match="another process"), other.opened():
            pass
        one.finish(todo)
        one.publish()
        with pytest.raises(Retry, match="another process"), other.opened():
            pass
        assert place.final.exists()
    assert place.arrival().stands()


def test_a_copy_takes_the_place_of_another_partial(place: Place) -> None:
    """If both names are taken it is what stands under the final one that is repaired."""
    place.complete(place.arrival())
    big = big_of(place, place.partial)
    big.parent.mkdir(exist_ok=True)
    big.touch()
    with pytest.raises(GiveUp, match="exists already"):
        place.arrival(place.known).stands()
    assert not place.arrival(place.known, again=True).stands()
    assert place.complete(place.arrival(place.known, again=True)).left == 0


def test_a_partial_that_is_being_written_is_left(place: Place) -> None:
    """Whoever writes it may be about to give it the name."""
    place.complete(place.arrival())
    is_file = not place.source.is_dir()
    with (
        writing(vouched(place.partial), directory=not is_file),
        pytest.raises(Retry, match="by another process"),
        place.arrival(again=True).opened(),
    ):
        pass
    assert digested(place.final) == place.known


# Telling


def test_what_is_read_is_told(place: Place) -> None:
    """In bytes of all files that must be read, and nothing where none is."""
    told: list[tuple[int, int]] = []

    def report(done: int, total: int) -> None:
        told.append((done, total))

    with place.arrival(place.known, report=report).opened():
        assert told == []
    place.complete(place.arrival())
    place.final.rename(place.partial)
    place.complete(place.arrival(place.known, report=report))
    assert told == sorted(told)
    assert told[-1] == (place.known.total_bytes, place.known.total_bytes)


def test_all_files_are_read_together(run: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, threads are started once."""
    for number in range(200):
        (run.source / f"{number}").write_bytes(b"x" * number)
    run.complete(run.arrival())
    flip(run.final / "7", 3)
    arrival = run.arrival(run.known, again=True)
    calls: list[int] = []

    def read_all(root: bytes, todo: Sequence[Stretch], *rest: Any, **how: Any) -> None:
        calls.append(len(todo))
        reading.read_all(vouched(root), todo, *rest, **how)

    monkeypatch.setattr(digest, "read_all", read_all)
    with arrival.opened() as todo:
        assert todo.left == 7
    assert len(calls) == 1
    assert calls[0] >= 200


# A rename in two steps


def cut_off(step: str, old: Path, new: Path) -> None:
    """Kill a rename of a single file between its link and its unlink."""

    def rename() -> None:
        armed("engine:files.link:1")
        publishing.rename_new = publishing._rename_new_portably
        getattr(publishing, step)(vouched(old), vouched(new))

    assert forked(rename) == -9
    assert old.samefile(new)


@pytest.fixture
def file(tmp_path: Path) -> Place:
    place = place_of(tmp_path, single=True)
    place.complete(place.arrival())
    return place


def test_a_copy_of_both_names_stands(file: Place) -> None:
    """Killed between link and unlink it is done; only the partial's name is left to go."""
    for stands in (True, False):
        file.final.rename(file.partial)
        cut_off("publish", file.partial, file.final)
        if stands:
            assert file.arrival().stands()
        else:
            publish(vouched(file.partial), vouched(file.final))
        assert [path.name for path in file.final.parent.iterdir()] == ["run"]
        assert digested(file.final) == file.known


def test_a_copy_of_both_names_is_mended(file: Place) -> None:
    """Killed while its name was taken from it: that is done again."""
    cut_off("withdraw", file.final, file.partial)
    arrival = file.arrival(file.known, again=True)
    assert not arrival.stands()
    assert file.complete(arrival).left == 0


def test_a_rename_that_goes_on_is_left_alone(file: Place) -> None:
    """While the process between its two steps lives, another one takes no name away."""
    os.link(file.final, file.partial)
    with (
        writing(vouched(file.partial), directory=False),
        pytest.raises(Retry, match="another process"),
    ):
        file.arrival().stands()
    assert file.final.samefile(file.partial)


# The receiver


@frozen
class Ended:
    """How a receiver ended, and what it wrote."""

    status: int
    stdout: bytes
    stderr: bytes


def receive(message: bytes) -> Ended:
    """Send a message to a receiver, and nothing more."""
    with ExitStack() as held:
        files = [held.enter_context(tempfile.TemporaryFile()) for _ in range(3)]
        files[0].write(message)
        files[0].seek(0)

        def serving() -> None:
            for number, file in enumerate(files):
                os.dup2(file.fileno(), number)
            sys.stderr = os.fdopen(2, "w")
            status = serve([])
            sys.stderr.flush()
            os._exit(status)

        status = forked(serving)
        for file in files:
            file.seek(0)
        return Ended(status, files[1].read(), files[2].read())


def request_of(place: Place, **changes: Any) -> dict[str, Any]:
    return {
        "do": "receive",
        "path": str(place.final),
        "roots": [[str(place.final.parent), None]],
        "source": seen_rows(look(vouched(place.source))),
        "expected": item_rows(place.known),
        "min_free": 0,
        **changes,
    }


@pytest.fixture
def tiny(tmp_path: Path) -> Place:
    return place_of(tmp_path, single=True, size=3)


ROW: Final = ["", "file", 1, 0, ""]


@pytest.mark.parametrize(
    "change",
    [
        {"path": 7},
        {"path": None},
        {"roots": None},
        {"roots": [3]},
        {"roots": [[3, None]]},
        {"do": ["receive"]},
        {"source": None},
        {"source": [3]},
        {"source": [["a"]]},
        {"source": [[1, "file", 1, 0, ""]]},
        {"source": [["", "file", "x", 0, ""]]},
        {"source": [["", "file", float("inf"), 0, ""]]},
        {"expected": [ROW]},
        {"expected": [["", "file", 1, "zz", "", ""]]},
        {"expected": 3},
        {"min_free": "much"},
    ],
)
def test_a_request_of_the_wrong_shape_is_given_up(tiny: Place, change: dict[str, Any]) -> None:
    """It is told in a line, and not by a traceback."""
    refused(receive(packed(request_of(tiny, **change))))


@pytest.mark.parametrize(
    "said",
    [b"x\n{}", b"-1\n", b"3\n[1]", b"2\n{", b"2\n{]", b"9" * 40, b"99999999999999\n", b"1\n\xff"],
)
def test_what_is_no_message_is_given_up(said: bytes) -> None:
    """Nor is the receiver kept waiting for more than any message can have."""
    ended = receive(said)
    assert ended.status == 1
    assert b"Traceback" not in ended.stderr


def test_a_request_that_lacks_something_is_given_up(tiny: Place) -> None:
    """Whatever it is."""
    for name in ("path", "roots", "do", "source", "min_free"):
        request = request_of(tiny)
        del request[name]
        refused(receive(packed(request)))


def refused(ended: Ended) -> None:
    assert ended.status == 1
    (line,) = ended.stderr.decode().splitlines()
    assert json.loads(line)["error"] == "giveup"


def test_the_receiver_tells_how_far_it_has_checked(file: Place) -> None:
    """Before its answer, while it reads what is there."""
    known = file.known
    file.final.rename(file.partial)
    flip(file.partial, PART)
    told = io.BytesIO(receive(packed(request_of(file))).stdout)
    told.readline()
    channel = Wire(told, io.BytesIO())
    messages = list(iter(channel.hear, {}))
    assert messages[-1]["pieces"] == [[0, PART, 2 * PART]]
    assert messages[-2] == {"checking": known.total_bytes, "total": known.total_bytes}


def test_the_receiver_mends_a_copy_of_unknown_digests(file: Place) -> None:
    """It takes the name from it and asks for all of it."""
    ended = receive(packed(request_of(file, again=True, expected=None)))
    assert not file.final.exists()
    told = io.BytesIO(ended.stdout)
    told.readline()
    assert Wire(told, io.BytesIO()).hear()["pieces"] == [[0, 0, BIG]]
