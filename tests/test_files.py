"""Copies as files: confinement, manifests, links, digests, publishing."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import random
import signal
import socket
import threading
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import pytest
from attrs import evolve
from blake3 import blake3
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from caxev import files
from caxev.core.errors import Denied, GiveUp, Retry
from caxev.files import (
    MOVED_PREFIX,
    PART,
    Item,
    Manifest,
    PartDigest,
    Range,
    Seen,
    confine,
    digest_tree,
    item_digest,
    local,
    partial_path,
    printable,
    publish,
    publishing,
    safe_name,
    scan,
    writing,
)
from caxev.files.digest import wrong_below
from caxev.files.manifest import Kind, wrong_ranges
from caxev.files.paths import LONGEST_NAME, link_problem
from caxev.files.publishing import make_above
from caxev.files.reading import read_all, stretches
from caxev.files.tree import check_links, check_paths, look
from tests.forked import armed, forked
from tests.places import partial_of, vouched

ODD = [
    b"with space",
    b"qu'o\"te",
    b"new\nline",
    b"caf\xc3\xa9",
    b"\xff\xfe",
    b"back\\slash",
    b"-rf",
]


def quiet(_done: int, _total: int) -> None:
    """Report to nobody."""


def make_run(root: Path) -> Path:
    """A run with empty and odd things in it."""
    (root / "sub" / "deep").mkdir(parents=True)
    (root / "empty directory").mkdir()
    (root / "empty file").touch()
    (root / "sub" / "deep" / "data").write_bytes(os.urandom(300_000))
    (root / "link").symlink_to("sub/deep/data")
    (root / "sub" / "up").symlink_to("../empty file")
    (root / "to directory").symlink_to("sub")
    for name in ODD:
        Path(os.fsdecode(os.path.join(os.fsencode(root), name))).write_bytes(name)
    return root


few = settings(max_examples=30)


# Paths


@pytest.mark.parametrize(
    "name", [".caxev-part-Y", ".caxev-gone-Q", ".caxev-quarantine/Q", "a/.caxev-x/b"]
)
def test_a_name_of_our_own_files_is_no_copys(tmp_path: Path, name: str) -> None:
    """It would be erased or overwritten with the copy whose partial or remains it is taken for."""
    with pytest.raises(GiveUp, match=r"\.caxev-.* are for caxev's own files"):
        confine(str(tmp_path / name), [str(tmp_path)])
    root = tmp_path / ".caxev-state" / "raw"  # below such a root, names are as below any other
    assert confine(str(root / "run"), [str(root)]) == vouched(root / "run")
    assert confine(str(root / "run"), [str(tmp_path), str(root)]) == vouched(root / "run")


def test_a_copy_is_called_like_none_of_our_own_files() -> None:
    """Its name may be derived from that of another copy."""
    assert safe_name("/data/raw/.hidden") == ".hidden"
    for name in (".caxev-part-Y", ".caxev-moved-Y"):
        with pytest.raises(GiveUp, match="own files"):
            safe_name(f"/data/raw/{name}/")


@pytest.mark.parametrize("kind", ["file", "dir"])
def test_a_copy_holds_none_of_our_own_names(tmp_path: Path, kind: Kind) -> None:
    """Neither a tree that is read here nor one that is listed elsewhere."""
    run = make_run(tmp_path / "run")
    made = run / "sub" / ".caxev-part-x"
    made.mkdir() if kind == "dir" else made.touch()
    with pytest.raises(GiveUp, match=r"sub/\.caxev-part-x is refused"):
        scan(vouched(run))
    with pytest.raises(GiveUp, match=r"sub/\.caxev-part-x is refused"):
        check_paths([Seen(b"sub", "dir"), Seen(b"sub/.caxev-part-x", kind)])


@pytest.mark.parametrize("path", ["", "n/a", "relative/x", "/root/\0x", "~/x", "../x"])
def test_confine_refuses_what_is_no_absolute_path(path: str, tmp_path: Path) -> None:
    """Only absolute paths without NUL are ever resolved."""
    with pytest.raises(GiveUp, match="not an absolute path"):
        confine(path, [str(tmp_path), "/"])


def test_confine_resolves_links_on_both_sides(tmp_path: Path) -> None:
    """What counts is where a path really leads, not how it is spelt."""
    (tmp_path / "real" / "in").mkdir(parents=True)
    (tmp_path / "root").symlink_to("real")
    (tmp_path / "real" / "out").symlink_to("/etc")
    root = str(tmp_path / "root")
    assert confine(f"{root}/in/new", [root]) == vouched(tmp_path / "real" / "in" / "new")
    for bad in (root, f"{root}/out/passwd", f"{root}/in/../..", f"{root}x", "/etc/passwd"):
        with pytest.raises(GiveUp, match="is not inside") as error:
            confine(bad, [root])
        assert "\n" not in error.value.why
        assert root in error.value.why


def test_a_name_without_room_for_our_prefixes_is_refused(tmp_path: Path) -> None:
    """It is refused before anything is moved; a disk that says so is not asked again either."""
    fits = "x" * LONGEST_NAME
    (tmp_path / f"{MOVED_PREFIX}{fits}").touch()
    assert safe_name(f"/data/{fits}") == fits
    with pytest.raises(GiveUp, match="has 243 bytes"):
        safe_name(f"/data/{fits}x")
    with pytest.raises(GiveUp, match="has 244 bytes"):
        partial_path(vouched("/data/" + "\u00e4" * 122))
    with pytest.raises(GiveUp, match="File name too long"), local(b"long", "write"):
        (tmp_path / f"{MOVED_PREFIX}{fits}xx").touch()


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, Denied),
        (errno.EDQUOT, Denied),
        (errno.EACCES, Denied),
        (errno.EROFS, Denied),
        (errno.EIO, Retry),
        (errno.ENOENT, Retry),
    ],
)
def test_what_an_error_of_the_disk_means(code: int, kind: type[Exception]) -> None:
    """What somebody must lift is waited for; what may pass costs an attempt."""
    with pytest.raises(Retry) as raised, local(b"/data/run", "write"):
        raise OSError(code, os.strerror(code))
    assert type(raised.value) is kind
    assert "/data/run" in str(raised.value)


def test_confine_without_roots_refuses(tmp_path: Path) -> None:
    """A site that holds no such data has nothing that may be touched."""
    with pytest.raises(GiveUp, match="it has none"):
        confine(str(tmp_path), [])


@given(parts=st.lists(st.sampled_from(["..", ".", "a", "b", "out", "in", ""]), max_size=8))
def test_confined_paths_never_lead_out(
    parts: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever is made of dots, names and links: accepted means really inside."""
    base = tmp_path_factory.getbasetemp() / "confine"
    (base / "root" / "a").mkdir(parents=True, exist_ok=True)
    for name, target in (("out", "/"), ("in", "a")):
        if not os.path.lexists(base / "root" / name):
            (base / "root" / name).symlink_to(target)
    root = str(base / "root")
    try:
        real = confine("/".join([root, *parts]), [root])
    except GiveUp:
        return
    assert os.path.realpath(real).startswith(os.fsencode(os.path.realpath(root) + "/"))


@pytest.mark.parametrize("location", ["", "/", "a/..", "/x/.", "a\0b"])
def test_safe_name_refuses(location: str) -> None:
    """A location that ends in no name is no target."""
    with pytest.raises(GiveUp):
        safe_name(location)


@given(st.binary())
@example(b"\xff\n\\")
def test_printable_never_raises_and_is_one_line(path: bytes) -> None:
    """Any bytes can be shown on one line."""
    assert len(printable(path).splitlines()) <= 1


# Manifests

names = st.binary(min_size=1, max_size=4).filter(lambda n: n not in {b".", b".."} and b"/" not in n)
items = st.builds(
    Item,
    path=st.lists(names, min_size=1, max_size=3).map(b"/".join),
    kind=st.sampled_from(["file", "dir", "link"]),
    size=st.integers(0, 2**62),
    blake3=st.none() | st.binary(min_size=32, max_size=32),
    sha512=st.none() | st.binary(min_size=64, max_size=64),
    target=st.binary(max_size=4),
    parts=st.integers(0, 3).flatmap(lambda n: st.binary(min_size=32 * n, max_size=32 * n)),
)
manifests = st.lists(items, max_size=6, unique_by=lambda item: item.path).map(Manifest)


@few
@given(manifests)
def test_manifest_survives_its_rows(manifest: Manifest) -> None:
    """from_rows(to_rows(m)) == m, whatever the order of the rows."""
    assert Manifest.from_rows(reversed(manifest.to_rows())) == manifest
    assert Manifest.from_rows(manifest.to_rows()).digest == manifest.digest
    assert pickle.loads(pickle.dumps(manifest)) == manifest


@few
@given(manifests, manifests)
def test_same_digest_means_no_difference(one: Manifest, other: Manifest) -> None:
    """Digests are equal exactly where there is no difference."""
    assert one.differences(one) == ()
    assert (one.digest == other.digest) == (one.differences(other) == ())


@few
@given(manifests)
def test_each_item_counts(manifest: Manifest) -> None:
    """A missing item is missing one way and unexpected the other way."""
    for item in manifest.items:
        less = Manifest(other for other in manifest.items if other != item)
        assert [(d.path, d.why) for d in manifest.differences(less)] == [(item.path, "missing")]
        assert [d.why for d in less.differences(manifest)] == ["unexpected"]


def dirhash(top: Path) -> str:
    """checksumdir.dirhash(top, "sha512"), from its description."""
    digests = []
    for root, _, names in os.walk(os.fsencode(top)):
        for name in names:
            path = os.path.join(root, name)
            content = Path(os.fsdecode(path)).read_bytes() if os.path.exists(path) else b""
            digests.append(hashlib.sha512(content).hexdigest())
    return hashlib.sha512("".join(sorted(digests)).encode()).hexdigest()


@pytest.mark.parametrize(
    "links",
    [
        {},
        {"dangling": "nowhere"},
        {"circle": "circle"},
        {"chain": "to directory/deep/data", "chain 2": "chain"},
        {"through file": "empty file/x", "slash": "sub/deep/", "root": "./"},
    ],
)
def test_cax_checksum_is_checksumdirs(tmp_path: Path, links: dict[str, str]) -> None:
    """What cax would have written into `checksum` is what we write, links and all."""
    run = make_run(tmp_path / "run")
    for name, target in links.items():
        (run / name).symlink_to(target)
    manifest = digest_tree(vouched(run), sha512=True, report=quiet)
    assert manifest.cax_checksum() == dirhash(run)
    assert digest_tree(vouched(run), sha512=False, report=quiet).cax_checksum() is None


def test_cax_checksum_of_nothing_and_of_a_file(tmp_path: Path) -> None:
    """An empty directory, and a single file."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    empty = digest_tree(vouched(tmp_path / "empty"), sha512=True, report=quiet)
    single = digest_tree(vouched(tmp_path / "file"), sha512=True, report=quiet)
    assert empty.cax_checksum() == dirhash(tmp_path / "empty")
    assert single.cax_checksum() == hashlib.sha512(b"x").hexdigest()
    assert [item.path for item in single.items] == [b""]


# Parts

CONTENT = random.Random(4).randbytes(3 * PART + 1234)
lengths = st.integers(0, len(CONTENT)) | st.builds(
    lambda part, more: part * PART + more, st.integers(1, 2), st.integers(-1, 1)
)


def parts_of(content: bytes) -> list[bytes]:
    return [blake3(content[at : at + PART]).digest() for at in range(0, len(content), PART)]


def file_of(content: bytes, path: bytes = b"f") -> Item:
    digest, parts = item_digest(parts_of(content))
    return Item(path, "file", len(content), digest, parts=parts)


def wrong_in(wanted: bytes, found: bytes) -> list[Range]:
    return wrong_ranges(len(wanted), parts_of(wanted), parts_of(found))


def repaired(wanted: bytes, found: bytes, ranges: Iterable[Range]) -> bytes:
    made = bytearray(found[: len(wanted)].ljust(len(wanted), b"\0"))
    for start, stop in ranges:
        made[start:stop] = wanted[start:stop]
    return bytes(made)


def numbers_of(ranges: Iterable[Range]) -> list[int]:
    return [at // PART for start, stop in ranges for at in range(start, stop, PART)]


@few
@given(size=lengths, cuts=st.lists(lengths, max_size=5))
@example(size=0, cuts=[])
@example(size=PART, cuts=[])
@example(size=2 * PART, cuts=[PART])
def test_parts_are_the_same_however_the_bytes_come(size: int, cuts: list[int]) -> None:
    """Blocks of any length give the BLAKE3 of each part, and the file's from them."""
    digest = PartDigest()
    bounds = [0, *sorted(min(cut, size) for cut in cuts), size]
    for start, stop in pairwise(bounds):
        digest.update(CONTENT[start:stop])
        assert digest.parts() == parts_of(CONTENT[:stop])
    whole, parts = item_digest(digest.parts())
    if size <= PART:
        assert (whole, parts) == (blake3(CONTENT[:size]).digest(), b"")
    else:
        assert (whole, parts) == (blake3(parts).digest(), b"".join(digest.parts()))
    assert file_of(CONTENT[:size]).part_digests() == parts_of(CONTENT[:size])


@given(st.sampled_from([b"", bytes(32), bytes(31), bytes(96), bytes(128)]))
def test_parts_that_the_digest_does_not_cover_are_not_known(parts: bytes) -> None:
    """Parts are believed only where the file's own digest was taken over them."""
    known = file_of(CONTENT)
    assert Item(b"f", "file", len(CONTENT), known.blake3, parts=parts).part_digests() is None
    assert Item(b"f", "file", len(CONTENT), parts=known.parts).part_digests() is None


@few
@given(size=lengths, flips=st.lists(lengths, min_size=1, max_size=4))
def test_flipped_bytes_are_exactly_those_parts(size: int, flips: list[int]) -> None:
    """Only the parts with bad bytes are brought again, neighbours as one range."""
    assume(size > 0)
    found = bytearray(CONTENT[:size])
    for at in {flip % size for flip in flips}:
        found[at] ^= 1
    ranges = wrong_in(CONTENT[:size], bytes(found))
    assert numbers_of(ranges) == sorted({flip % size // PART for flip in flips})
    assert all(stop < start for (_, stop), (start, _) in pairwise(ranges))
    assert repaired(CONTENT[:size], bytes(found), ranges) == CONTENT[:size]


@few
@given(one=lengths, other=lengths)
@example(one=2 * PART, other=3 * PART)
@example(one=3 * PART, other=2 * PART)
@example(one=0, other=PART)
@example(one=PART, other=0)
def test_cut_and_grown_files_become_whole(one: int, other: int) -> None:
    """A file that lacks its end, or has too much of it, needs no part that is whole in both."""
    ranges = wrong_in(CONTENT[:one], CONTENT[:other])
    assert repaired(CONTENT[:one], CONTENT[:other], ranges) == CONTENT[:one]
    if one != other:
        assert numbers_of(ranges) == list(range(min(one, other) // PART, -(-one // PART)))
    else:
        assert ranges == []


@pytest.mark.parametrize(
    ("found", "bad"),
    [
        (CONTENT, []),
        (CONTENT + b"more", []),
        (b"", [(0, len(CONTENT))]),
        (CONTENT[: PART + 1], [(PART, len(CONTENT))]),
        (CONTENT[:-1], [(3 * PART, len(CONTENT))]),
        (CONTENT[:PART] + bytes(PART) + CONTENT[2 * PART :], [(PART, 2 * PART)]),
        (bytes(PART) + CONTENT[PART : 3 * PART], [(0, PART), (3 * PART, len(CONTENT))]),
    ],
)
def test_wrong_is_what_the_disk_lacks(
    tmp_path: Path, found: bytes, bad: list[Range], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on the disk part by part, in a file that is shorter, longer, or wrong inside."""
    monkeypatch.setattr("caxev.files.reading._STRETCH", PART)
    (tmp_path / "f").write_bytes(found)
    (tmp_path / "good").write_bytes(CONTENT)
    (tmp_path / "empty").touch()
    items = {b"f": file_of(CONTENT), b"good": file_of(CONTENT), b"empty": file_of(b"")}
    wrong = wrong_below(vouched(tmp_path), look(vouched(tmp_path)), items, quiet)
    assert wrong == {b"f": bad, b"good": [], b"empty": []}


# Links


@pytest.mark.parametrize(
    ("path", "target"),
    [
        (b"l", b"/etc/passwd"),
        (b"l", b"../x"),
        (b"a/l", b"../../x"),
        (b"l", b"a/../b"),
        (b"a/l", b".././/../x"),
        (b"l", b""),
    ],
)
def test_links_that_lead_out_are_refused(path: bytes, target: bytes) -> None:
    """Absolute, climbing, or going up after a name: refused, in one line."""
    with pytest.raises(GiveUp, match="refused") as error:
        check_links([Seen(path, "link", target=target)])
    assert "\n" not in error.value.why


targets = st.lists(st.sampled_from([b"..", b".", b"a", b"b", b"l0", b"l1"]), min_size=1, max_size=5)


@given(links=st.lists(st.tuples(st.sampled_from([b"", b"a/", b"a/b/"]), targets), max_size=3))
def test_trees_of_accepted_links_never_lead_out(
    links: list[tuple[bytes, list[bytes]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """However accepted links point at one another, following one stays in the tree."""
    top = os.fsencode(tmp_path_factory.mktemp("links"))
    os.makedirs(top + b"/root/a/b")
    made = []
    for number, (directory, target) in enumerate(links):
        path = directory + b"l%d" % number
        if link_problem(path, b"/".join(target)) is None:
            os.symlink(b"/".join(target), top + b"/root/" + path)
            made.append(path)
    for path in made:
        real = os.path.realpath(top + b"/root/" + path)
        assert (real + b"/").startswith(top + b"/root/")


# Looking and reading


def test_scan_lists_everything_and_follows_nothing(tmp_path: Path) -> None:
    """Empty directories, odd names and links are all items; a link stays one."""
    manifest = scan(vouched(make_run(tmp_path / "run")))
    kinds = {item.path: item.kind for item in manifest.items}
    assert kinds[b"empty directory"] == "dir"
    assert kinds[b"to directory"] == "link"
    assert set(ODD) <= kinds.keys()
    assert manifest.items == tuple(sorted(manifest.items, key=lambda item: item.path))


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as it:
        it.bind(str(path))


def _leads_out(path: Path) -> None:
    path.symlink_to("/etc")


@pytest.mark.parametrize("make", [_fifo, _socket, _leads_out])
def test_what_a_copy_must_not_hold_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Fifos, sockets and links that lead out: `GiveUp`, and it names the path."""
    (tmp_path / "r").mkdir()
    make(tmp_path / "r" / "odd one")
    for function in (scan, lambda root: digest_tree(root, sha512=False, report=quiet)):
        with pytest.raises(GiveUp, match="odd one"):
            function(vouched(tmp_path / "r"))


def test_root_that_is_gone_or_a_link_is_refused(tmp_path: Path) -> None:
    """The copy itself must be a directory or a file."""
    (tmp_path / "link").symlink_to(".")
    with pytest.raises(GiveUp, match="is not there"):
        digest_tree(vouched(tmp_path / "gone"), sha512=False, report=quiet)
    with pytest.raises(GiveUp, match="neither"):
        scan(vouched(tmp_path / "link"))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("sha512", [True, False])
def test_digests_are_those_of_the_files(
    tmp_path: Path, threads: int, sha512: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file's BLAKE3, its parts', and SHA-512, with one core or several."""
    monkeypatch.setattr("caxev.files.reading._STRETCH", PART)
    run = make_run(tmp_path / "run")
    (run / "big").write_bytes(CONTENT)
    (run / "one part").write_bytes(CONTENT[:PART])
    seen: list[tuple[int, int]] = []
    manifest = digest_tree(
        vouched(run), sha512=sha512, threads=threads, report=lambda *at: seen.append(at)
    )
    for item in manifest.files:
        content = Path(os.fsdecode(os.fsencode(run) + b"/" + item.path)).read_bytes()
        expected = file_of(content, item.path)
        digest = hashlib.sha512(content).digest() if sha512 else None
        assert item == evolve(expected, sha512=digest)
    assert seen[-1] == (manifest.total_bytes, manifest.total_bytes)
    assert manifest.shape() == scan(vouched(run))
    assert manifest.cax_checksum() == (dirhash(run) if sha512 else None)


def test_a_flipped_byte_is_named(tmp_path: Path) -> None:
    """One changed byte: the manifest says in which file."""
    run = make_run(tmp_path / "run")
    before = digest_tree(vouched(run), sha512=False, report=quiet)
    with (run / "sub/deep/data").open("r+b") as file:
        byte = file.read(1)
        file.seek(0)
        file.write(bytes([byte[0] ^ 1]))
    after = digest_tree(vouched(run), sha512=False, report=quiet)
    assert [str(d) for d in before.differences(after)] == ["sub/deep/data differs"]


def test_a_file_that_changes_meanwhile_is_read_again(tmp_path: Path) -> None:
    """A tree that is still being written is no copy yet: `Retry`."""
    (tmp_path / "file").write_bytes(bytes(10))

    def grow(_done: int, _total: int) -> None:
        (tmp_path / "file").write_bytes(bytes(20))

    with pytest.raises(Retry, match="changed while"):
        digest_tree(vouched(tmp_path), sha512=False, report=grow)


@pytest.mark.parametrize("name", ["file 1", "file 5"])
@pytest.mark.parametrize("threads", [1, 4])
def test_the_file_that_cannot_be_read_is_named(tmp_path: Path, threads: int, name: str) -> None:
    """Gone, grown or cut since it was seen: `Retry` says which, whatever the others do."""
    for number in range(9):
        (tmp_path / f"file {number}").write_bytes(CONTENT[: number * PART // 2])
    seen = [one for one in look(vouched(tmp_path)) if one.kind == "file"]
    for change, why in (
        (lambda path: path.write_bytes(CONTENT), f"{name} changed while"),
        (lambda path: os.truncate(path, 1), f"{name} changed while"),
        (Path.unlink, f"cannot read .*{name}: No such file"),
    ):
        change(tmp_path / name)
        todo = [one for each in seen for one in stretches(each, each.size)]
        with pytest.raises(Retry, match=why):
            read_all(vouched(tmp_path), todo, threads, quiet)


def test_who_reports_can_end_the_reading(tmp_path: Path) -> None:
    """What `report` raises comes out, and no thread is left."""
    (tmp_path / "file").write_bytes(CONTENT)

    def enough(_done: int, _total: int) -> None:
        raise KeyError("enough")

    before = threading.active_count()
    with pytest.raises(KeyError, match="enough"):
        digest_tree(vouched(tmp_path), sha512=False, report=enough)
    assert threading.active_count() == before


# Publishing


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("kind", ["directory", "file", "many"])
def test_publish_renames_once_and_can_be_repeated(
    tmp_path: Path, kind: str, portable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it, only the final name is there; again, it changes nothing."""
    if portable:
        monkeypatch.setattr(publishing, "rename_new", publishing._rename_new_portably)
    final = tmp_path / "copy"
    partial = partial_of(final)
    if kind == "file":
        partial.write_bytes(b"x")
    else:
        make_run(partial)
    for number in range(100 if kind == "many" else 0):
        (partial / str(number)).touch()
    before = scan(vouched(partial))
    publish(vouched(partial), vouched(final))
    publish(vouched(partial), vouched(final))
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    assert scan(vouched(final)) == before


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("kind", ["directory", "file"])
def test_publish_never_replaces(
    tmp_path: Path, kind: str, portable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever stands at the final name stays as it is, and so does the partial."""
    if portable:
        monkeypatch.setattr(publishing, "rename_new", publishing._rename_new_portably)
    for path, content in ((tmp_path / "copy", "old"), (tmp_path / "part", "new")):
        if kind == "directory":
            path.mkdir()
            path = path / "in"  # noqa: PLW2901  # the file in it
        path.write_text(content)
    with pytest.raises(FileExistsError):
        publish(vouched(tmp_path / "part"), vouched(tmp_path / "copy"))
    inner = "copy/in" if kind == "directory" else "copy"
    assert (tmp_path / inner).read_text() == "old"
    assert (tmp_path / "part").exists()
    with pytest.raises(FileNotFoundError):
        publish(vouched(tmp_path / "nothing"), vouched(tmp_path / "neither"))


@pytest.mark.parametrize("directory", [False, True])
def test_one_writer_at_a_time(tmp_path: Path, directory: bool) -> None:
    """A second writer is told to come back, and nothing but the partial is left behind."""
    partial = str(tmp_path / ".caxev-part-x")
    with writing(vouched(partial), directory=directory):
        with (
            pytest.raises(Retry, match="another process") as busy,
            writing(vouched(partial), directory=directory),
        ):
            pass
        assert busy.value.after == 5
    with writing(vouched(partial), directory=directory):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".caxev-part-x"]


@pytest.mark.parametrize("directory", [False, True])
def test_a_partial_of_another_kind_makes_way(tmp_path: Path, directory: bool) -> None:
    """A link or a thing of the wrong kind at the partial's name is removed, not followed."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    partial = tmp_path / "part"
    makes: list[Callable[[], None]] = [
        partial.touch,
        partial.mkdir,
        lambda: partial.symlink_to(outside),
    ]
    for make in makes:
        make()
        with writing(vouched(partial), directory=directory):
            assert partial.is_dir() == directory
            assert not partial.is_symlink()
        partial.rmdir() if directory else partial.unlink()
    assert (outside / "precious").exists()


def test_a_killed_writer_leaves_no_lock(tmp_path: Path) -> None:
    """The lock ends with its process."""

    def killed() -> None:
        with writing(vouched(tmp_path / "part"), directory=True):
            os.kill(os.getpid(), signal.SIGKILL)

    assert forked(killed) == -signal.SIGKILL
    with writing(vouched(tmp_path / "part"), directory=True):
        pass


@pytest.mark.parametrize("point", ["files.sync", "files.publish.rename"])
@pytest.mark.parametrize("nth", [1, 2])
def test_killed_at_any_point_it_can_go_on(tmp_path: Path, point: str, nth: int) -> None:
    """Before the rename nothing stands under the final name; after it, everything."""
    make_run(tmp_path / "part")
    before = scan(vouched(tmp_path / "part"))

    def publishes() -> None:
        armed(f"engine:{point}:{nth}")
        publish(vouched(tmp_path / "part"), vouched(tmp_path / "copy"))

    assert forked(publishes) == -9
    there = [name for name in ("part", "copy") if (tmp_path / name).exists()]
    assert there == (["copy"] if (point, nth) == ("files.publish.rename", 2) else ["part"])
    publish(vouched(tmp_path / "part"), vouched(tmp_path / "copy"))
    assert scan(vouched(tmp_path / "copy")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_new_directories_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is an entry of the one above it, which a power cut would take, and the copy with it."""
    synced: list[bytes] = []
    monkeypatch.setattr("caxev.files.publishing.sync", synced.append)
    make_above(vouched(tmp_path / "a" / "b" / "copy"))
    assert synced == [os.fsencode(tmp_path), os.fsencode(tmp_path / "a")]


def test_public_names_are_there() -> None:
    """`from caxev.files import *` gives what it promises."""
    assert all(hasattr(files, name) for name in files.__all__)
