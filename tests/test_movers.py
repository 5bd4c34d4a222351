"""One contract for all ways of moving copies, each with its real far end."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final, Literal

import pytest
from attrs import define, evolve, frozen

from caxev import transfer
from caxev.config import Site, load_sites, state_directory
from caxev.core.errors import Damaged, Denied, GiveUp, Retry
from caxev.files import (
    Confined,
    FarPath,
    Manifest,
    Meter,
    Moved,
    StagedCopy,
    digest_tree,
    incoming,
    join,
    look,
)
from caxev.files.incoming import _place
from caxev.files.plan import to_the_second
from caxev.program import ProgramEnd
from caxev.transfer import Route
from caxev.transfer.grid import storage_of
from caxev.transfer.rsync import _check
from caxev.transfer.ssh import Endpoint
from caxev.transfer.ssh.remote import Remote
from tests import sshd as ssh_servers
from tests import xrootd as xrootd_servers
from tests.forked import forked
from tests.places import partial_of, vouched
from tests.test_commands import SHM, elsewhere
from tests.test_files import make_run, quiet

OLD: Final = 1_480_000_000
MIB: Final = 1 << 20
ROOT: Final = Path(__file__).parents[1]
Way = Literal["pull", "push"]
Move = Callable[..., Moved]


def digested(path: Path) -> Manifest:
    return digest_tree(vouched(path), sha512=False, report=quiet)


@frozen
class World:
    """Two sites, one of them reached by `method`, and what can be said of that method."""

    here: Site
    there: Site
    stop: Callable[[], None]

    @property
    def method(self) -> str:
        return self.there.method

    @property
    def carries_all(self) -> bool:
        """Whether links and any name at all can be moved."""
        return self.method != "gfal-copy"

    def root(self, site: Site) -> Path:
        return Path(site.roots[0])

    def source(self, way: Way) -> Path:
        return self.root(self.there if way == "pull" else self.here)

    def target(self, way: Way) -> Path:
        return self.root(self.here if way == "pull" else self.there)

    def route(self, name: str = "run") -> Route:
        here, there = self.root(self.here) / name, self.root(self.there) / name
        return Route(self.here, self.there, str(here), str(there))

    def move(self, way: Way, name: str = "run") -> Moved:
        return mover(way)(self.route(name), report=quiet)

    def run(self, way: Way, name: str = "run") -> Path:
        """A run in the source: as odd as the method can carry."""
        root = self.source(way) / name
        if self.carries_all:
            return make_run(root)
        (root / "sub" / "deep").mkdir(parents=True)
        (root / "empty directory".replace(" ", "-")).mkdir()
        (root / "empty-file").touch()
        (root / "sub" / "deep" / "data").write_bytes(os.urandom(300_000))
        (root / "a+b=c,d:e@f~(g)'h!$&;").write_bytes(b"odd")
        return root

    def plain_run(self, way: Way, mib: int = 1) -> Path:
        """A run in the source that any method carries quickly: one file, two directories down."""
        run = self.source(way) / "run"
        (run / "sub" / "deep").mkdir(parents=True)
        big_file(run / "sub" / "deep" / "data", mib)
        return run

    def arrived(self, way: Way) -> Path:
        """Where what has arrived of a copy is, until it has its name."""
        if (self.method, way) != ("rsync", "pull"):
            return self.partial(way)
        place = _place(state_directory(self.here), os.fsencode(self.target(way) / "run"))
        return partial_of(os.fsdecode(join(place, b"copy")))

    def partial(self, way: Way) -> Path:
        return partial_of(self.target(way) / "run")


def staged_as_locally(world: World, way: Way) -> None:
    """Skip what another method shows: gfal's programs play no part in it."""
    if world.method == "gfal-copy" and way == "pull":
        pytest.skip("a pull is staged as by the method local")


def mover(way: Way) -> Move:
    return transfer.pull if way == "pull" else transfer.push


@define
class Servers:
    """The far ends of all tests of this module: each is started once, and anew when it was stopped.

    What they serve is below `base`, where each test has a directory of its own.
    """

    base: Path
    held: ExitStack
    _ssh: ssh_servers.Server | None = None
    _xrootd: xrootd_servers.Server | None = None

    def ssh(self) -> ssh_servers.Server:
        if reason := ssh_servers.missing():
            pytest.skip(reason)
        if self._ssh is None or self._ssh.process.returncode is not None:
            directory = Path(tempfile.mkdtemp(dir=self.base))
            self._ssh = self.held.enter_context(ssh_servers.running(directory))
        return self._ssh

    def xrootd(self) -> xrootd_servers.Server:
        if self._xrootd is None or self._xrootd.process.returncode is not None:
            if reason := xrootd_servers.missing():
                pytest.skip(reason)
            directory = Path(tempfile.mkdtemp(dir=self.base))
            running = xrootd_servers.running(directory, self.base)
            self._xrootd = self.held.enter_context(running)
        return self._xrootd


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with ExitStack() as held:
        yield Servers(tmp_path_factory.mktemp("servers"), held)


@pytest.fixture
def space(servers: Servers) -> Path:
    """A directory of the test's own that every server serves."""
    return Path(tempfile.mkdtemp(dir=servers.base))


def sites(space: Path, method: str) -> tuple[Site, Site]:
    """This site and another, each with its directory."""
    for name in ("here", "there"):
        (space / name).mkdir()
    here = Site("here", dir_raw=str(space / "here"))
    return here, Site("there", method=method, dir_raw=str(space / "there"))


def world_of(method: str, space: Path, servers: Servers) -> World:
    """Two sites below `space`, one of them reached by that method."""
    here, there = sites(space, method)
    if method == "local":
        return World(here, there, lambda: None)
    if method == "gfal-copy":
        storage = servers.xrootd()
        return World(here, evolve(there, hostname=storage.url, nstreams=2), storage.stop)
    if method == "rsync" and shutil.which("rsync") is None:
        pytest.skip("rsync is not installed (Debian: rsync)")
    server = servers.ssh()
    end = server.endpoint
    return World(
        evolve(here, identity=end.identity, known_hosts=end.known_hosts),
        evolve(there, hostname=end.host, port=end.port, username=end.username),
        server.stop,
    )


METHODS: Final = ("sftp", "rsync", "local", "gfal-copy")
MARKS: Final = {"sftp": "sshd", "rsync": "sshd", "gfal-copy": "gfal"}
PARAMETERS: Final = [
    pytest.param(method, marks=[getattr(pytest.mark, MARKS[method])] if method in MARKS else [])
    for method in METHODS
]


@pytest.fixture(params=PARAMETERS)
def world(request: pytest.FixtureRequest, space: Path, servers: Servers) -> World:
    return world_of(request.param, space, servers)


both = pytest.mark.parametrize("way", ["pull", "push"])

SWAPPING: Final = """\
#!/bin/sh
for one in "{here}"/.caxev-part-*; do
    if [ -d "$one" ]; then mv "$one" "{here}/aside"; ln -s "{outside}" "$one"; fi
done
for one in "{here}/{swapped}"; do
    if [ -d "$one" ]; then mv "$one" "$one.aside"; ln -s "{outside}" "$one"; fi
done
exec {program} "$@"
"""
"""gfal-copy, once somebody has put links to elsewhere where it is about to read and to write."""


def changed(route: Route, side: str, path: str) -> Route:
    return evolve(route, remote_path=path) if side == "remote" else evolve(route, local_path=path)


def big_file(path: Path, mib: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(os.urandom(mib * MIB))  # no two parts alike: one in the wrong place shows
    os.utime(path, (OLD, OLD))
    return path


# Whole copies


@both
def test_a_run_arrives_whole(world: World, way: Way) -> None:
    """Every file, empty or oddly named, every directory, and links where the method can."""
    run = world.run(way)
    (run / "sub" / "7").write_bytes(os.urandom(700))
    os.utime(run / "sub" / "7", (OLD, OLD))
    (run / "sub" / "7").chmod(0o4777)
    moved = world.move(way)
    copy = world.target(way) / "run"
    assert digested(copy) == digested(run)
    assert moved.bytes_total == digested(run).total_bytes
    assert moved.files == len(digested(run).files)
    assert moved.manifest in (None, digested(run))
    assert [path.name for path in world.target(way).iterdir()] == ["run"]
    if world.carries_all:
        assert to_the_second(look(vouched(copy))) == to_the_second(look(vouched(run)))
        assert stat.S_IMODE((copy / "sub" / "7").stat().st_mode) == 0o644
        assert stat.S_IMODE((copy / "sub").stat().st_mode) == 0o755


@pytest.mark.parametrize(("way", "size"), [("pull", 0), ("push", MIB + 1)])
def test_a_single_file_arrives_whole(world: World, way: Way, size: int) -> None:
    """A copy may be one file; directories above it are made."""
    (world.source(way) / "v1").mkdir()
    (world.source(way) / "v1" / "one").write_bytes(os.urandom(size))
    world.move(way, "v1/one")
    copy = world.target(way) / "v1" / "one"
    assert copy.read_bytes() == (world.source(way) / "v1" / "one").read_bytes()
    assert [path.name for path in copy.parent.iterdir()] == ["one"]


@both
def test_a_name_is_taken_for_no_pattern(world: World, way: Way) -> None:
    """Beside a copy whose name is a pattern stands one that the pattern would fit."""
    if not world.carries_all:
        pytest.skip("no such name goes into its URLs")
    odd, plain = "run[1] $(touch x)*\\", "run1 $(touch x)"
    for name in (odd, plain):
        (world.source(way) / name).mkdir()
        (world.source(way) / name / "data").write_text(name)
    world.move(way, odd)
    assert (world.target(way) / odd / "data").read_text() == odd


def test_it_is_read_back_as_it_is(world: World) -> None:
    """The manifest of the far copy is that of its bytes, and a flipped byte shows."""
    world.run("push") if world.carries_all else world.plain_run("push")
    world.move("push")
    far = world.root(world.there) / "run"
    assert transfer.manifest(world.route(), report=quiet) == digested(far)
    data = far / "sub/deep/data"
    content = data.read_bytes()
    data.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    found = digested(world.root(world.here) / "run").differences(
        transfer.manifest(world.route(), report=quiet)
    )
    assert [str(difference) for difference in found] == ["sub/deep/data differs"]


@both
def test_the_last_report_says_all(world: World, way: Way) -> None:
    """Progress only grows, and ends at the whole."""
    world.plain_run(way, 8)
    told: list[tuple[int, int]] = []
    moved = mover(way)(world.route(), report=lambda *at: told.append(at))
    assert told == sorted(told)
    assert told[-1] == (moved.bytes_total, moved.bytes_total)


@both
def test_what_stands_there_whole_is_done(world: World, way: Way) -> None:
    """Called once more after it had published, it moves no byte and is content."""
    staged_as_locally(world, way)
    world.plain_run(way)
    total = world.move(way).bytes_total
    again = world.move(way)
    assert (again.bytes_sent, again.bytes_total) == (0, total)


@both
@pytest.mark.parametrize("kind", ["directory", "file", "other"])
def test_what_stands_at_the_target_is_never_replaced(world: World, way: Way, kind: str) -> None:
    """Something else under the final name stays as it is."""
    staged_as_locally(world, way)
    world.run(way)
    final = world.target(way) / "run"
    if kind == "file":
        final.write_text("precious")
    else:
        final.mkdir()
        if kind == "other":
            (final / "other").write_text("precious")
    with pytest.raises(GiveUp, match="exists already"):
        world.move(way)
    if kind == "file":
        assert final.read_text() == "precious"
    else:
        assert [path.name for path in final.iterdir()] == ["other"] * (kind == "other")


@both
def test_a_bad_copy_is_mended(world: World, way: Way) -> None:
    """A flipped byte, behind an unchanged size and time, is found and put right.

    What another attempt has left is not in the way.
    """
    run = world.plain_run(way)
    good = digested(run)
    world.move(way)
    world.partial(way).mkdir()
    (world.partial(way) / "old").write_text("of another attempt")
    data = world.target(way) / "run/sub/deep/data"
    when = data.stat().st_mtime_ns
    content = data.read_bytes()
    data.write_bytes(content[:9] + bytes([content[9] ^ 1]) + content[10:])
    os.utime(data, ns=(when, when))
    found = digested(world.target(way) / "run")
    again = evolve(world.route(), again=True, expected=good, found=found)
    mover(way)(again, report=quiet)
    assert digested(world.target(way) / "run") == good
    assert [path.name for path in world.target(way).iterdir()] == ["run"]


# Breaks


def kill_midway(world: World, way: Way, route: Route) -> None:
    """Run the mover in a process group of its own, which kills itself at its first progress."""

    def report(done: int, total: int) -> None:
        if 0 < done < total:
            assert os.path.lexists(world.arrived(way)), "nothing is there to go on with"
            os.killpg(0, signal.SIGKILL)

    assert forked(lambda: mover(way)(route, report=report)) == -signal.SIGKILL


@both
def test_killed_midway_it_goes_on(world: World, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle: nothing under the final name; called again, it ends whole.

    Only XRootD may hold what was left open for a while: then it is put off.
    """
    monkeypatch.setattr("caxev.transfer.grid._TAKING", 10.0)
    monkeypatch.setattr("caxev.transfer.grid._ANSWER", 5.0)
    run = world.plain_run(way, 4)
    for number in range(2):
        big_file(run / f"big{number}", 4)
    # Slowly enough for rsync, which reports its progress each second.
    kill_midway(world, way, evolve(world.route(), max_rate=6e6))
    assert not (world.target(way) / "run").exists()
    try:
        world.move(way)
    except Retry as held:
        assert world.method == "gfal-copy"
        assert "the far side is not ready" in str(held)  # noqa: PT017  # it may as well not be
        assert not (world.target(way) / "run").exists()
        return
    assert digested(world.target(way) / "run") == digested(run)
    assert [path.name for path in world.target(way).iterdir()] == ["run"]


@both
def test_what_does_not_belong_into_a_partial_goes(world: World, way: Way) -> None:
    """Whatever an earlier attempt, or somebody else, left in it; links are never followed."""
    staged_as_locally(world, way)
    run = world.run(way)
    outside = world.root(world.here).parent / "outside"
    outside.mkdir()
    (outside / "data").write_text("precious")
    partial = world.partial(way)
    if not world.carries_all and way == "push":
        pytest.skip("links there cannot be seen, and so not be taken out")
    (partial / "gone" / "deep").mkdir(parents=True)
    (partial / "gone" / "deep" / "file").touch()
    (partial / "sub").mkdir()
    (partial / "sub" / "deep").symlink_to(outside)
    (partial / "a").symlink_to(outside / "data")
    world.move(way)
    assert digested(world.target(way) / "run") == digested(run)
    assert [(path.name, path.read_text()) for path in outside.iterdir()] == [("data", "precious")]


@both
def test_a_source_that_changes_is_noticed(world: World, way: Way) -> None:
    """A file that appears while we copy: `Retry`, and nothing is published."""
    run = world.plain_run(way, 8)
    with pytest.raises(Retry, match=r"changed|vanished"):
        mover(way)(world.route(), report=lambda *_: (run / "new").touch())
    assert not (world.target(way) / "run").exists()
    world.move(way)
    assert digested(world.target(way) / "run") == digested(run)


def flip(path: Path, at: int) -> None:
    """Change a byte of a file, and nothing that a look at it shows."""
    times, data = path.stat(), bytearray(path.read_bytes())
    data[at] ^= 1
    path.unlink()  # a server may keep a checksum with the file
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(("way", "at"), [("pull", 9 * MIB - 1), ("push", 0)])
def test_a_damaged_source_is_never_accepted(world: World, way: Way, at: int) -> None:
    """However often it is tried, and whatever has come of it; once it is repaired, the copy is."""
    run = world.plain_run(way, 9)
    (run / "other").write_bytes(b"other")
    expected = digested(run)
    route = evolve(world.route(), expected=expected)
    flip(run / "sub" / "deep" / "data", at)
    for _ in range(2):
        with pytest.raises(Damaged, match=r"data in .* is not what it was"):
            mover(way)(route, report=quiet)
        assert not (world.target(way) / "run").exists()
    flip(run / "sub" / "deep" / "data", at)
    mover(way)(route, report=quiet)
    assert digested(world.target(way) / "run") == expected


@both
def test_a_source_that_is_gone(world: World, way: Way) -> None:
    """Trying again is of no use; the source is named."""
    with pytest.raises(GiveUp, match=r"gone: .*/nothing"):
        world.move(way, "nothing")


@both
@pytest.mark.parametrize("what", ["fifo", "link"])
def test_what_a_copy_must_not_hold_is_refused(world: World, way: Way, what: str) -> None:
    """A fifo, or a link that leads out: named, before anything is moved."""
    run = world.run(way)
    if what == "fifo":
        os.mkfifo(run / "bad")
    else:
        (run / "bad").symlink_to("/etc/passwd")
    if not world.carries_all and way == "pull":
        pytest.skip("the far side shows neither for what it is")
    with pytest.raises(GiveUp, match="bad"):
        world.move(way)
    assert list(world.target(way).iterdir()) == []


@both
def test_an_absolute_link_into_the_run_is_kept(world: World, way: Way, tmp_path: Path) -> None:
    """By any name of its directory: the copy has a relative one, and both are the same data."""
    if not world.carries_all:
        pytest.skip("it holds no links")
    run, alias = world.run(way), tmp_path / "alias"
    alias.symlink_to(world.source(way))
    (run / "sub" / "inner").symlink_to(run / "a")
    (run / "aliased").symlink_to(alias / "run" / "sub")
    world.move(way)
    copy = world.target(way) / "run"
    assert os.readlink(copy / "sub" / "inner") == "../a"
    assert os.readlink(copy / "aliased") == "sub"
    assert digested(copy) == digested(run)


@both
def test_paths_stay_inside_their_roots(world: World, way: Way) -> None:
    """Paths that are relative, climb, or are a root itself are refused on either side."""
    world.run(way)
    good = world.route()
    for side, site in (("remote", world.there), ("local", world.here)):
        (root,) = site.roots
        for bad in ("n/a", "", root, f"{root}/../x", f"{root}/..", "/", "/etc/passwd"):
            with pytest.raises(GiveUp, match="is not"):
                mover(way)(changed(good, side, bad), report=quiet)
    assert list(world.target(way).iterdir()) == []


@both
def test_a_link_leads_out_of_no_root(world: World, way: Way) -> None:
    """A link in a root that leads elsewhere is seen for what it is, but not behind a URL."""
    world.run(way)
    sides = [("local", world.here), ("remote", world.there)]
    for side, site in sides if world.carries_all else sides[:1]:
        (Path(site.roots[0]) / "out").symlink_to("/etc")
        bad = changed(world.route(), side, f"{site.roots[0]}/out/x")
        with pytest.raises(GiveUp, match="is not inside"):
            mover(way)(bad, report=quiet)


@both
def test_a_site_that_is_away_is_tried_again(
    world: World, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody answers there: that may pass."""
    if world.method == "local":
        pytest.skip("there is nothing to be reached")
    world.run(way)
    world.stop()
    monkeypatch.setenv("XRD_CONNECTIONWINDOW", "2")
    monkeypatch.setenv("XRD_CONNECTIONRETRY", "1")
    with pytest.raises(Retry) as raised:
        world.move(way)
    assert "\n" not in raised.value.why
    with pytest.raises(Retry):
        transfer.check(world.here, world.there)


def test_check_says_what_answers(world: World) -> None:
    """One line, not empty."""
    said = transfer.check(world.here, world.there)
    assert said
    assert "\n" not in said


@both
def test_a_full_disk_is_named_and_may_pass(
    world: World, way: Way, request: pytest.FixtureRequest
) -> None:
    """Too little space: `Retry`. When there is room again the copy is made."""
    run = big_file(world.source(way) / "run", 40)
    disk = world.target(way)
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    request.addfinalizer(lambda: subprocess.run(["umount", "-l", str(disk)], check=True))
    filler = disk / "filler"
    filler.write_bytes(bytes(20 * MIB))
    with pytest.raises(Retry, match=r"(not enough space|disk full).*"):
        world.move(way)
    filler.unlink()
    run.unlink()
    big_file(run, 16)
    world.move(way)
    assert digested(disk / "run") == digested(run)


@both
def test_room_is_left_free(world: World, way: Way) -> None:
    """`min_free` bytes stay free where the copy goes, where that can be known."""
    if world.method == "gfal-copy" and way == "push":
        pytest.skip("such servers do not say how much is free")
    world.run(way)
    with pytest.raises(Retry, match="not enough space"):
        mover(way)(evolve(world.route(), min_free=1 << 60), report=quiet)
    assert not (world.target(way) / "run").exists()


@both
def test_a_disk_that_fills_up_meanwhile_breaks_it_off(
    world: World, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others write there, too: `min_free` holds while bytes move; later it goes on."""
    if world.method == "sftp":
        pytest.skip("looked at there every few seconds")
    if world.method == "gfal-copy" and way == "push":
        pytest.skip("such servers do not say how much is free")
    big_file(world.source(way) / "run", 24)
    found = iter([1 << 62])  # as it begins

    async def free_there(_self: Remote, _path: bytes) -> int:
        return next(found, 5)

    monkeypatch.setattr(StagedCopy, "free", lambda _self: next(found, 5))
    monkeypatch.setattr(Remote, "free", free_there)
    monkeypatch.setattr("caxev.transfer.rsync._LOOK_AT_DISK", 0.0)
    with pytest.raises(Retry, match=r"not enough space.*must stay so"):
        mover(way)(evolve(world.route(), min_free=10), report=quiet)
    assert not (world.target(way) / "run").exists()
    monkeypatch.undo()
    world.move(way)
    assert digested(world.target(way) / "run") == digested(world.source(way) / "run")


# Of one method alone


@pytest.fixture
def local(space: Path, servers: Servers) -> World:
    return world_of("local", space, servers)


@both
def test_hard_links_are_made_where_they_are_allowed(local: World, way: Way) -> None:
    """With the key the bytes are shared; without it they are not."""
    run = local.run(way)
    data = run / "sub/deep/data"
    data.chmod(0o600)
    local.move(way)
    assert not os.path.samefile(data, local.target(way) / "run/sub/deep/data")
    sharing = evolve(local, there=evolve(local.there, hard_links=True))
    (run).rename(local.source(way) / "again")
    sharing.move(way, "again")
    copy = local.target(way) / "again/sub/deep/data"
    assert os.path.samefile(local.source(way) / "again/sub/deep/data", copy)
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600


def test_what_was_linked_before_is_not_written_to(local: World) -> None:
    """A hard link in a partial is another file's bytes: it is taken out, not gone on with."""
    run = local.run("pull")
    precious = local.root(local.here).parent / "precious"
    precious.write_bytes(b"p" * 1000)
    partial = local.partial("pull")
    (partial / "sub" / "deep").mkdir(parents=True)
    os.link(precious, partial / "sub/deep/data")
    local.move("pull")
    assert precious.read_bytes() == b"p" * 1000
    assert digested(local.target("pull") / "run") == digested(run)


@both
@pytest.mark.parametrize("hard_links", [False, True])
def test_a_local_copy_is_mended_by_its_digests(local: World, way: Way, hard_links: bool) -> None:
    """Wrong in several places, broken off before, and linked or not: it becomes what it must be."""
    run = local.plain_run(way, 13)
    (run / "sub/deep/data").chmod(0o600)
    good = digested(run)
    local = evolve(local, there=evolve(local.there, hard_links=hard_links))
    route = evolve(local.route(), expected=good)
    partial = local.partial(way) / "sub/deep/data"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(5 * MIB) + (run / "sub/deep/data").read_bytes()[5 * MIB : 9 * MIB])
    mover(way)(route, report=quiet)
    copy = local.target(way) / "run"
    assert digested(copy) == good
    shutil.copytree(copy, copy.with_name("other"))  # what is linked is nothing to be flipped
    shutil.rmtree(copy)
    copy.with_name("other").rename(copy)
    with (copy / "sub/deep/data").open("r+b") as file:
        for at in (0, 9 * MIB):
            file.seek(at)
            file.write(b"wrong")
    os.utime(copy / "sub/deep/data", (OLD, OLD))
    mover(way)(evolve(route, again=True), report=quiet)
    assert digested(copy) == digested(run) == good
    data = run / "sub/deep/data"
    assert stat.S_IMODE(data.stat().st_mode) == 0o600
    assert os.path.samefile(data, copy / "sub/deep/data") == hard_links


def test_a_directory_that_is_missing_is_named(local: World) -> None:
    """`check` of a local site looks at its directories."""
    gone = evolve(local.there, dir_processed="/nowhere/at/all")
    with pytest.raises(GiveUp, match="/nowhere/at/all"):
        transfer.check(local.here, gone)


def test_a_rate_is_kept(local: World) -> None:
    """Sleeps between pieces are as long as the rate asks for, whatever the disk does."""
    big_file(local.source("pull") / "run", 4)
    moved = transfer.pull(evolve(local.route(), max_rate=8 * MIB), report=quiet)
    assert moved.bytes_sent in {0, 4 * MIB}
    assert moved.bytes_sent == 0 or moved.seconds >= 0.5


@pytest.mark.sshd
def test_rsync_keeps_a_rate(rsync: tuple[World, ssh_servers.Server]) -> None:
    """It is told so; it may be a little ahead of the time."""
    world, _ = rsync
    big_file(world.source("push") / "run", 3)
    assert transfer.push(evolve(world.route(), max_rate=2 * MIB), report=quiet).seconds > 1.2


def test_a_rate_is_kept_in_reading_back(world: World) -> None:
    """As in moving. What gfal2's programs take before the first byte and after does not count."""
    big_file(world.root(world.there) / "run" / "data", 2)
    told: list[float] = []
    began = time.monotonic()
    route = evolve(world.route(), max_rate=2 * MIB)
    transfer.manifest(route, report=lambda _done, _total: told.append(time.monotonic()))
    ended = time.monotonic()
    if world.method == "gfal-copy":
        began, ended = told[0], told[-2]
    assert ended - began > 0.5


@pytest.fixture
def rsync(space: Path, servers: Servers) -> tuple[World, ssh_servers.Server]:
    world = world_of("rsync", space, servers)
    key = space / "the %k's key"
    shutil.copy(str(world.here.identity), key)
    return evolve(world, here=evolve(world.here, identity=str(key))), servers.ssh()


@pytest.mark.sshd
def test_rsync_believes_a_pinned_key_alone(rsync: tuple[World, ssh_servers.Server]) -> None:
    """The fingerprint decides, whatever stands in a file; another one is refused."""
    world, server = rsync
    world.run("push")
    pinned = evolve(world.there, host_key=server.fingerprint)
    here = evolve(world.here, known_hosts="/nowhere")
    evolve(world, here=here, there=pinned).move("push")
    wrong = evolve(world.there, host_key="SHA256:" + "A" * 43)
    with pytest.raises(Denied, match="is not the one pinned"):
        evolve(world, there=wrong).move("push")


@pytest.mark.sshd
def test_rsync_that_is_missing_is_named(
    rsync: tuple[World, ssh_servers.Server], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Which program, and which package has it."""
    world, _ = rsync
    world.run("push")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Denied, match=r"rsync is not installed here \(Debian: rsync\)"):
        world.move("push")


@pytest.mark.sshd
@pytest.mark.parametrize(("way", "by_us"), [("push", True), ("pull", True), ("pull", False)])
def test_rsync_goes_on_with_half_a_file(
    rsync: tuple[World, ssh_servers.Server], way: Way, by_us: bool
) -> None:
    """What is there of a file is not sent again, be it that another method has brought it."""
    world, _ = rsync
    data = big_file(world.source(way) / "run" / "data", 16)
    half = world.arrived(way) if by_us else world.partial(way)
    half.mkdir(parents=True)
    (half / "data").write_bytes(data.read_bytes()[: 12 * MIB])
    moved = world.move(way)
    assert 0 < moved.bytes_sent <= 5 * MIB
    assert digested(world.target(way) / "run") == digested(data.parent)
    assert [path.name for path in world.target(way).iterdir()] == ["run"]
    assert not half.exists()


@pytest.mark.sshd
@pytest.mark.parametrize("single", [False, True])
def test_rsync_pulls_to_another_file_system(
    rsync: tuple[World, ssh_servers.Server], monkeypatch: pytest.MonkeyPatch, single: bool
) -> None:
    """Than that of the private directory: what is there is gone on with, and a copy is repaired."""
    if not elsewhere():
        pytest.skip("there is one file system here")
    world, _ = rsync
    run = world.source("pull") / "run"
    data = big_file(run if single else run / "data", 12)
    good = digested(run)
    with tempfile.TemporaryDirectory(dir=SHM) as state:
        monkeypatch.setenv("CAXEV_STATE", state)
        kill_midway(world, "pull", evolve(world.route(), max_rate=8e6))
        world.move("pull")
        copy = world.target("pull") / "run"
        assert digested(copy) == good
        flip(copy if single else copy / "data", 9)
        os.utime(copy if single else copy / "data", ns=(0, data.stat().st_mtime_ns))
        steps, copy_file = list[object](), incoming.copy_file

        def copied(*paths: Confined) -> None:
            copy_file(*paths)
            steps.append(None)

        monkeypatch.setattr(incoming, "copy_file", copied)
        again = evolve(world.route(), again=True)
        moved = transfer.pull(again, report=lambda *at: steps.append(at))
        # Reports follow the last copied file, and not only the one of the end: without any, a long
        # copy would be taken for one that hangs, and cut short.
        assert steps[::-1].index(None) > 1
        assert 0 < moved.bytes_sent < 1 * MIB
        assert digested(copy) == good
        assert [path.name for path in world.target("pull").iterdir()] == ["run"]
        assert list((Path(state) / "here" / "incoming").iterdir()) == []


@pytest.mark.parametrize(
    ("status", "said", "error", "match"),
    [
        (127, "sh: 1: rsync: not found\nrsync error: unexplained", Denied, "not installed there"),
        (12, "bash: line 1: rsync: command not found", Denied, "not installed there"),
        (14, "rsync: [sender] Failed to exec ssh: No such file", Denied, "ssh is not installed"),
        (255, "Host key verification failed.", Denied, "Host key verification failed"),
        (255, "u@h: Permission denied (publickey).", Denied, "Permission denied"),
        (23, 'rsync: [x] open "/d/f" failed: Permission denied (13)', Retry, "/d/f"),
        (11, 'rsync: write failed on "/d/f": No space left on device (28)', Retry, "disk full"),
        (24, 'file has vanished: "/d/f"', Retry, "vanished meanwhile .*/d/f"),
        (30, "rsync error: timeout in data send/receive", Retry, "no answer in time"),
        (12, "rsync: connection unexpectedly closed", Retry, "connection was lost"),
        (2, "rsync: protocol incompatibility", GiveUp, "cannot do this"),
        (20, "", Retry, "status 20"),
    ],
)
def test_what_rsync_says_is_told(
    status: int, said: str, error: type[Exception], match: str
) -> None:
    """Each of its ways to end is one line, and passes by itself or does not."""
    with pytest.raises(error, match=match) as raised:
        _check(ProgramEnd(status, said), Endpoint("h"))
    assert "\n" not in str(raised.value)
    assert "h:22" in str(raised.value) or "here" in str(raised.value)


@pytest.fixture
def grid(space: Path, servers: Servers) -> World:
    return world_of("gfal-copy", space, servers)


@pytest.mark.gfal
@pytest.mark.parametrize(
    ("way", "name"),
    [
        *(("pull", name) for name in (b"a b", b"\xff", b"new\nline")),
        *(("push", name) for name in (b"a b", b"q?x=1", b"100%", b"\xff", b"new\nline", b"back\\")),
    ],
)
def test_a_name_that_no_url_carries_is_refused(grid: World, way: Way, name: bytes) -> None:
    """It is named, and nothing is moved. XRootD itself cannot list a name of two lines."""
    grid.run(way)
    Path(os.fsdecode(os.fsencode(grid.source(way) / "run") + b"/" + name)).touch()
    unlisted = way == "pull" and b"\n" in name
    with pytest.raises((GiveUp, Retry) if unlisted else GiveUp, match=r"URL can|gfal-ls"):
        grid.move(way)
    assert list(grid.target(way).iterdir()) == []


@pytest.mark.gfal
@both
def test_gfal_keeps_what_is_good_of_a_partial(grid: World, way: Way) -> None:
    """A file of the right ADLER32 is not sent again; one of the right size alone is."""
    run = grid.source(way) / "run"
    good, bad = big_file(run / "good", 2), big_file(run / "bad", 3)
    partial = grid.partial(way)
    partial.mkdir()
    shutil.copy2(good, partial)
    (partial / "bad").write_bytes(bytes(3 * MIB))
    moved = grid.move(way)
    assert moved.bytes_sent == bad.stat().st_size
    assert digested(grid.target(way) / "run") == digested(run)


@pytest.mark.gfal
def test_gfal_that_is_missing_is_named(
    grid: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Which program, and which packages have it; an address that is no URL; a missing proxy."""
    grid.run("push")
    for site, match in (
        (evolve(grid.there, hostname="se.example.org"), "is not a URL"),
        (evolve(grid.there, grid_cert="/nowhere/proxy"), "grid_cert /nowhere/proxy is not there"),
    ):
        with pytest.raises((GiveUp, Denied), match=match):
            evolve(grid, there=site).move("push")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Denied, match=r"gfal-copy is not installed here \(Debian: gfal2-util"):
        grid.move("push")


def test_a_gfal_that_takes_no_such_option_finds_nothing_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends with 2, which is the number of ENOENT, too: what cannot be seen is not gone."""
    for name in ("gfal-copy", "gfal-ls"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'usage: gfal-ls [-h] file' >&2\nexit 2\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    there = Site(name="there", hostname="root://se.example.org/", dir_raw="/raw")
    with pytest.raises(Retry, match="usage"):
        storage_of(there, there).stat(FarPath(b"/raw"))


# Finding movers


THIRD_PARTY: Final = """
from caxev.files import Manifest, Moved

class Pigeon:
    whole_files = True
    def pull(self, route, *, report):
        return Moved(1, 1, 1, 1.0)
    def check(self, here, there):
        return f"a pigeon flies to {there.name}"
"""


def test_others_may_name_movers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class named by an entry point serves its method, which sites.json may then name."""
    (tmp_path / "pigeon_post.py").write_text(THIRD_PARTY)
    info = tmp_path / "pigeon_post-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pigeon_post\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[caxev.transfer]\npigeon = pigeon_post:Pigeon\n")
    sites = tmp_path / "sites.json"
    sites.write_text('[{"name": "loft", "method": "pigeon"}]')
    with pytest.raises(Exception, match="method must be"):
        load_sites(sites)
    monkeypatch.syspath_prepend(str(tmp_path))
    loft = load_sites(sites).get("loft")
    assert "pigeon" in transfer.methods()
    assert transfer.check(Site("here"), loft) == "a pigeon flies to loft"
    route = Route(Site("here"), loft, "/a/b", "/a/b")
    assert transfer.pull(route, report=quiet).files == 1


def test_scp_goes_over_sftp() -> None:
    """Both names stand for the same mover, so one of them is tried."""
    assert type(transfer.mover("scp")) is type(transfer.mover("sftp"))


def test_a_method_that_nothing_serves_is_named() -> None:
    """lcg-cp has a successor; of any other the known ones are told."""
    with pytest.raises(GiveUp, match="gfal-copy"):
        transfer.mover("lcg-cp")
    with pytest.raises(GiveUp, match=r"'rucio' \(known: .*rsync"):
        transfer.mover("rucio")


def test_a_meter_only_grows() -> None:
    """Whatever order counts come in, what is told grows and ends at the whole."""
    told: list[tuple[int, int]] = []
    meter = Meter(lambda *at: told.append(at), 10)
    meter.at(7)
    meter.at(3)
    meter.shared(2)
    meter.add(100)
    meter.moved([])
    assert meter.done == 10
    assert told == sorted(told)
    assert told[-1] == (10, 10)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("gfal-copy", marks=pytest.mark.gfal),
        pytest.param("rsync", marks=pytest.mark.sshd),
    ],
)
@both
def test_a_program_follows_no_link_of_others(
    space: Path, servers: Servers, way: Way, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """What it fetches goes to a directory of ours; what it sends is what we have open, or linked.

    Nothing of a pull by rsync is where somebody can put a link, so that ends well.
    """
    world = world_of(method, space, servers)
    run = world.plain_run(way)
    program = shutil.which(method)
    outside, programs = space / "outside", space / "programs"
    for directory in (outside, programs):
        directory.mkdir()
    (outside / "data").write_text("not ours")
    swapping = SWAPPING.format(
        here=space / "here",
        swapped="run" if method == "rsync" else "run/sub/deep",  # it sends no link below the top
        outside=outside,
        program=program,
    )
    (programs / method).write_text(swapping)
    (programs / method).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    if (method, way) == ("rsync", "pull"):
        world.move(way)
        assert digested(world.target(way) / "run") == digested(run)
    else:
        with pytest.raises((GiveUp, Retry)):
            world.move(way)
    assert [(one.name, one.read_text()) for one in outside.iterdir()] == [("data", "not ours")]
    sent = [one.read_bytes() for one in (space / "there").rglob("*") if one.is_file()]
    assert b"not ours" not in sent
