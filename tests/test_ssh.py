"""Transfers against a real OpenSSH server: whole, resumable, confined, sure of the other side."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import asyncssh
import pytest
from attrs import define, evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from loguru import logger

from caxev import aio
from caxev.core.errors import Damaged, Denied, GiveUp, Retry, RootAway
from caxev.core.paths import Root
from caxev.engine.workers import Workers
from caxev.files import (
    PART,
    FarPath,
    Manifest,
    Moved,
    Piece,
    Plan,
    Seen,
    digest_tree,
    plan,
    scan,
    writing,
)
from caxev.files.roots import make_marker
from caxev.transfer.receive import CHUNK, STREAMED
from caxev.transfer.ssh import Endpoint
from caxev.transfer.ssh.channels import ConnectionChannel, _Here
from caxev.transfer.ssh.chunks import Chunks
from caxev.transfer.ssh.endpoint import KEX, MACS, _options, sftp_session
from caxev.transfer.ssh.known_hosts import read_known_hosts
from caxev.transfer.ssh.landing import only_pusher
from caxev.transfer.ssh.openssh import shell
from caxev.transfer.ssh.pipeline import Pipeline
from caxev.transfer.ssh.remote import Remote
from caxev.transfer.ssh.sftp import BLOCK
from tests import sshd as servers
from tests import worker_jobs as jobs
from tests.forked import forked
from tests.places import partial_of, vouched
from tests.sshd import Server, Transfer, check, pull, push, remote_manifest, sshd
from tests.test_files import make_run, quiet

__all__ = ["sshd"]

pytestmark = pytest.mark.sshd

OLD = 1_480_000_000
MIB = 1 << 20
Move = Callable[..., Moved]
AGENT = f"{shlex.quote(sys.executable)} -m caxev"


def fast_pull(transfer: Transfer, **options: Any) -> Moved:
    """Pull from an account that may run a command."""
    return pull(evolve(transfer, agent=AGENT), **options)


def fast_push(transfer: Transfer, **options: Any) -> Moved:
    """Push to an account that may run a command."""
    return push(evolve(transfer, agent=AGENT), **options)


PULLS = (pull, fast_pull)


def digested(path: Path) -> Manifest:
    return digest_tree(vouched(path), sha512=False, report=quiet)


@define
class Ways:
    """A source and a destination directory, with a server that reaches both."""

    server: Server
    source: Path
    target: Path

    def transfer(self, move: Move, name: str = "run", to: str | None = None) -> Transfer:
        """From `source`/name to `target`/to, whichever of them is far for `move`."""
        source, target = self.source / name, self.target / (to or name)
        remote, local = (source, target) if move in PULLS else (target, source)
        return Transfer(
            self.server.endpoint,
            remote_path=str(remote),
            remote_roots=(str(remote.parent),),
            local_path=str(local),
            local_roots=(str(local.parent),),
            nstreams=3,
        )

    def move(self, move: Move, name: str = "run") -> Moved:
        return move(self.transfer(move, name), report=quiet)

    @property
    def partial(self) -> Path:
        return partial_of(self.target / "run")


@pytest.fixture
def ways(sshd: Server, tmp_path: Path) -> Ways:
    for name in ("source", "target"):
        (tmp_path / name).mkdir()
    return Ways(sshd, tmp_path / "source", tmp_path / "target")


both = pytest.mark.parametrize("move", [pull, push, fast_pull, fast_push])
slow_and_fast = pytest.mark.parametrize("agent", [None, AGENT])


def big_file(path: Path, mib: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(os.urandom(mib * MIB))  # no two parts alike: one in the wrong place shows
    os.utime(path, (OLD, OLD))
    return path


def changed(transfer: Transfer, side: str, what: str, value: object) -> Transfer:
    change: dict[str, Any] = {f"{side}_{what}": value}
    return evolve(transfer, **change)


# Whole copies


@both
def test_a_run_arrives_whole(ways: Ways, move: Move) -> None:
    """Every file, empty or oddly named, every directory and link; times kept, modes our own."""
    run = make_run(ways.source / "run")
    big_file(run / "big", 5)
    (run / "sub").chmod(0o700)
    (run / "big").chmod(0o4777)
    moved = ways.move(move)
    copy = ways.target / "run"
    assert moved.manifest == digested(run) == digested(copy)
    assert moved.bytes_sent == moved.bytes_total == moved.manifest.total_bytes
    assert moved.files == len(moved.manifest.files)
    assert [path.name for path in ways.target.iterdir()] == ["run"]
    assert (copy / "big").stat().st_mtime == OLD
    assert stat.S_IMODE((copy / "big").stat().st_mode) == 0o644
    assert stat.S_IMODE((copy / "sub").stat().st_mode) == 0o755


@pytest.mark.parametrize(
    ("move", "size"),
    [
        *((move, size) for move in (pull, push) for size in (0, BLOCK - 1, BLOCK, 20 * BLOCK + 7)),
        *((move, size) for move in (fast_pull, fast_push) for size in (0, STREAMED, STREAMED + 1)),
    ],
)
def test_a_single_file_arrives_whole(ways: Ways, move: Move, size: int) -> None:
    """A copy may be one file, of any size around the block's, or the longest in the stream."""
    (ways.source / "run").write_bytes(os.urandom(size))
    moved = ways.move(move)
    assert moved.manifest == digested(ways.source / "run") == digested(ways.target / "run")


@both
def test_an_empty_run_and_a_crowded_one(ways: Ways, move: Move) -> None:
    """No file at all, and more small files than are in flight at once."""
    (ways.source / "run").mkdir()
    crowd = ways.source / "crowd"
    for number in range(300):
        (crowd / str(number % 7)).mkdir(parents=True, exist_ok=True)
        (crowd / str(number % 7) / str(number)).write_bytes(b"x" * number)
    for name in ("run", "crowd"):
        assert ways.move(move, name).manifest == digested(ways.target / name)


@both
def test_missing_parents_are_made(ways: Ways, move: Move) -> None:
    """Processed data goes into a directory of its version, which may be new."""
    make_run(ways.source / "run")
    transfer = ways.transfer(move, to="pax_v6/new/run")
    move(
        changed(transfer, "local" if move in PULLS else "remote", "roots", (str(ways.target),)),
        report=quiet,
    )
    assert digested(ways.target / "pax_v6/new/run") == digested(ways.source / "run")


@both
def test_several_connections_carry_one_file(
    ways: Ways, move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file large enough for three connections arrives as it was."""
    monkeypatch.setattr("caxev.transfer.ssh.pool._WORTH", 8 * MIB)
    big_file(ways.source / "run", 40)
    seen: list[tuple[int, int]] = []
    moved = move(ways.transfer(move), report=lambda *at: seen.append(at))
    assert moved.manifest == digested(ways.target / "run")
    assert seen == sorted(seen)
    assert seen[-1] == (40 * MIB, 40 * MIB)


def test_a_receiver_reads_at_the_rate_that_it_is_given(ways: Ways) -> None:
    """What it reads for a manifest goes by the same limit as bytes that move."""
    big_file(ways.target / "run" / "data", 4)
    transfer = evolve(ways.transfer(push), agent=AGENT, max_rate=3e6)
    began = time.monotonic()
    remote_manifest(transfer, report=quiet)
    assert time.monotonic() - began > 1.2


@slow_and_fast
def test_reading_back_finds_a_flipped_byte(ways: Ways, agent: str | None) -> None:
    """What is read back over SFTP, or by the far end, is compared item by item."""
    run = make_run(ways.source / "run")
    transfer = evolve(ways.transfer(push), agent=agent)
    moved = push(transfer, report=quiet)
    assert moved.manifest is not None
    assert remote_manifest(transfer, report=quiet) == moved.manifest
    data = ways.target / "run/sub/deep/data"
    content = data.read_bytes()
    data.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    found = moved.manifest.differences(remote_manifest(transfer, report=quiet))
    assert [str(difference) for difference in found] == ["sub/deep/data differs"]
    assert digested(run) == moved.manifest


# Links and odd things


@both
@pytest.mark.parametrize("target", ["/etc/passwd", "../../x", "sub/../.."])
def test_a_link_that_leads_out_is_refused(ways: Ways, move: Move, target: str) -> None:
    """Nothing is copied of a run with such a link, and it is named."""
    run = make_run(ways.source / "run")
    (run / "bad link").symlink_to(target)
    with pytest.raises(GiveUp, match=r"bad link -> .* refused"):
        ways.move(move)
    assert list(ways.target.iterdir()) == []


@both
def test_a_fifo_is_refused(ways: Ways, move: Move) -> None:
    """A run holds files, directories and links."""
    make_run(ways.source / "run")
    os.mkfifo(ways.source / "run" / "pipe")
    with pytest.raises(GiveUp, match="pipe"):
        ways.move(move)


@pytest.mark.parametrize("move", [pull, push])
@pytest.mark.parametrize("held", [False, True])
def test_a_fifo_put_in_a_file_s_place_holds_nobody_up(
    ways: Ways, monkeypatch: pytest.MonkeyPatch, move: Move, held: bool
) -> None:
    """A server that opens one waits, for ever; or until it reads, if somebody holds the other end.

    Nothing that was listed is it then, so it comes after the listing.
    """
    make_run(ways.source / "run")
    fifo = (ways.source / "run" if move is pull else ways.partial) / "sub/deep/data"
    carry, opened, one = Pipeline.carry, list[int](), threading.Lock()

    def planting(lane: Pipeline) -> None:
        with one:
            if not opened:
                fifo.unlink(missing_ok=True)
                os.mkfifo(fifo)
                opened.append(os.open(fifo, os.O_RDWR) if held else -1)
        carry(lane)

    monkeypatch.setattr(Pipeline, "carry", planting)
    monkeypatch.setattr("caxev.transfer.ssh.pipeline.OPENING", 1.0)
    why = "no longer a file" if held else "is it a file still"
    try:
        with pytest.raises(Retry, match=f"sub/deep/data .*{why}"):
            move(evolve(ways.transfer(move), agent=None), report=quiet)
    finally:
        if held:
            os.close(opened[0])


@both
def test_links_in_a_partial_are_never_followed(ways: Ways, move: Move) -> None:
    """Whatever was planted in a partial, or as the partial, what it points to is untouched."""
    run = make_run(ways.source / "run")
    outside = ways.target.parent / "outside"
    outside.mkdir()
    (outside / "data").write_text("precious")
    ways.partial.mkdir()
    (ways.partial / "sub").symlink_to(outside)
    (ways.partial / "empty file").symlink_to(outside / "data")
    ways.move(move)
    assert digested(ways.target / "run") == digested(run)
    shutil.rmtree(ways.target / "run")
    ways.partial.symlink_to(outside)
    ways.move(move)
    assert digested(ways.target / "run") == digested(run)
    assert [(path.name, path.read_text()) for path in outside.iterdir()] == [("data", "precious")]


class _Liar(asyncssh.SFTPServer):
    """A server that lists a name which is none."""

    async def scandir(self, path: bytes) -> AsyncIterator[asyncssh.SFTPName]:
        del path
        attrs = asyncssh.SFTPAttrs(permissions=stat.S_IFREG | 0o644, size=1, mtime=OLD)
        for name in (b".", b"..", b"fine", b"../../etc/cron.d/x"):
            yield asyncssh.SFTPName(name, attrs=attrs)


def test_an_impossible_name_from_the_server_is_refused(ways: Ways, tmp_path: Path) -> None:
    """A name with a slash in it would be a path of the server's choosing."""
    directory = ways.server.directory

    async def look() -> None:
        listener = await asyncssh.listen(
            "127.0.0.1",
            0,
            server_host_keys=[str(directory / "host_key")],
            authorized_client_keys=str(directory / "user_key.pub"),
            sftp_factory=_Liar,
        )
        async with listener:
            endpoint = evolve(
                ways.server.endpoint,
                port=listener.get_port(),
                host_key=ways.server.fingerprint,
            )
            async with sftp_session(endpoint) as sftp:
                await Remote(endpoint, sftp).look(FarPath(os.fsencode(tmp_path)))

    with pytest.raises(GiveUp, match="impossible name"):
        aio.run(look())


def test_new_directories_are_on_the_far_disk(
    ways: Ways, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As here: each is an entry of the one above it."""
    synced: list[bytes] = []

    async def sync(_remote: Remote, path: FarPath) -> None:
        synced.append(path)

    async def make() -> None:
        endpoint = ways.server.endpoint
        async with sftp_session(endpoint) as sftp:
            await Remote(endpoint, sftp).make_parents(
                FarPath(os.fsencode(tmp_path / "a" / "b" / "copy"))
            )

    monkeypatch.setattr(Remote, "fsync_directory", sync)
    aio.run(make())
    assert synced == [os.fsencode(tmp_path), os.fsencode(tmp_path / "a")]


# Going on after a break


def kill_midway(move: Move, transfer: Transfer) -> None:
    def report(done: int, total: int) -> None:
        if done >= 0.7 * total:
            os.kill(os.getpid(), signal.SIGKILL)

    # Slowly, so that much is left when it dies, however late the kill comes.
    slow = evolve(transfer, max_rate=20e6)
    assert forked(lambda: move(slow, report=report)) == -signal.SIGKILL


@both
def test_a_killed_transfer_of_one_file_goes_on(ways: Ways, move: Move) -> None:
    """Killed within a file: nothing under the final name; then the rest is sent."""
    run = big_file(ways.source / "run", 48)
    kill_midway(move, ways.transfer(move))
    assert not (ways.target / "run").exists()
    moved = ways.move(move)
    assert 0 < moved.bytes_sent < 0.75 * moved.bytes_total
    assert moved.manifest is None
    assert digested(ways.target / "run") == digested(run)
    assert [path.name for path in ways.target.iterdir()] == ["run"]


@both
def test_a_killed_transfer_of_many_files_goes_on(ways: Ways, move: Move) -> None:
    """Files that were whole are not sent again; those of another content are."""
    run = make_run(ways.source / "run")
    for number in range(12):
        big_file(run / f"{number}", 2)
    kill_midway(move, ways.transfer(move))
    os.utime(run / "0")
    moved = ways.move(move)
    assert 0 < moved.bytes_sent < 0.9 * moved.bytes_total
    assert digested(ways.target / "run") == digested(run)


@both
def test_what_no_longer_belongs_into_a_partial_goes(ways: Ways, move: Move) -> None:
    """The source changed between two attempts: the copy is the source as it is now."""
    run = make_run(ways.source / "run")
    shutil.copytree(run, ways.partial, symlinks=True)
    (ways.partial / "gone" / "deep").mkdir(parents=True)
    (ways.partial / "gone" / "deep" / "file").touch()
    (ways.partial / "empty file").unlink()
    (ways.partial / "empty file").mkdir()
    os.utime(ways.partial / "sub/deep/data", (OLD, OLD))
    (ways.partial / "with space").write_bytes(b"much longer than it was before")
    ways.move(move)
    assert digested(ways.target / "run") == digested(run)


@both
def test_killed_after_the_rename_it_is_done(ways: Ways, move: Move) -> None:
    """The copy stands under its name, as the source is: that was us, and nothing is sent."""
    make_run(ways.source / "run")
    total = ways.move(move).bytes_total
    again = ways.move(move)
    assert (again.bytes_sent, again.bytes_total, again.manifest) == (0, total, None)


@both
@pytest.mark.parametrize("with_partial", [False, True])
def test_what_stands_at_the_target_is_never_replaced(
    ways: Ways, move: Move, with_partial: bool
) -> None:
    """Something else under the final name stays as it is."""
    make_run(ways.source / "run")
    (ways.target / "run").mkdir()
    (ways.target / "run" / "other").write_text("precious")
    if with_partial:
        ways.partial.mkdir()
    with pytest.raises(GiveUp, match="exists already"):
        ways.move(move)
    assert [path.name for path in (ways.target / "run").iterdir()] == ["other"]


@pytest.mark.parametrize("move", [pull, fast_pull, fast_push])
def test_two_that_make_one_copy_never_meet(ways: Ways, move: Move) -> None:
    """While another process writes the partial, come back later."""
    make_run(ways.source / "run")
    with writing(vouched(ways.partial), directory=True), pytest.raises(Retry, match="another"):
        ways.move(move)
    ways.move(move)


def test_two_pushes_of_one_copy_never_meet(ways: Ways) -> None:
    """While another process of this machine pushes it, come back later."""
    make_run(ways.source / "run")
    final = os.fsencode(ways.target / "run")
    with (
        only_pusher(str(ways.server.endpoint), final),
        pytest.raises(Retry, match="another") as busy,
    ):
        ways.move(push)
    assert busy.value.after == 5
    ways.move(push)


def test_a_push_that_was_replaced_publishes_nothing(ways: Ways) -> None:
    """Its heir on another machine has begun to write the same partial, in another order."""
    make_run(ways.source / "run")
    note = ways.target / ".caxev-from-run"

    def replaced(*_progress: int) -> None:
        note.write_bytes(note.read_bytes().partition(b"\n")[0] + b"\nanother")

    with pytest.raises(Retry, match="another") as busy:
        push(ways.transfer(push), report=replaced)
    assert busy.value.after == 5
    assert not (ways.target / "run").exists()
    ways.move(push)
    assert [path.name for path in ways.target.iterdir()] == ["run"]


@both
def test_a_source_that_changes_is_tried_again(ways: Ways, move: Move) -> None:
    """A file that grows or appears while we copy: `Retry`, and nothing is published."""
    run = make_run(ways.source / "run")
    with pytest.raises(Retry, match=r"changed|vanished"):
        move(ways.transfer(move), report=lambda *_: (run / "new").touch())
    assert not (ways.target / "run").exists()


@both
def test_a_source_that_is_gone(ways: Ways, move: Move) -> None:
    """Trying again is of no use."""
    with pytest.raises(GiveUp, match=r"source directory gone: .*run"):
        ways.move(move)


def test_what_is_wrong_here_is_said_before_what_is_wrong_there(ways: Ways) -> None:
    """A source that is gone is no better for a site that is away."""
    away = evolve(ways.transfer(push).endpoint, port=1)
    with pytest.raises(GiveUp, match=r"source directory gone: .*run"):
        push(evolve(ways.transfer(push), endpoint=away), report=quiet)


# What is expected


def flip(path: Path, at: int) -> None:
    """Flip one bit, and leave no trace of it in the file's time."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_mtime_ns, before.st_mtime_ns))


expecting = pytest.mark.parametrize("move", [pull, fast_pull, fast_push])


ORIGINS: dict[str, Callable[[Manifest], dict[str, Any]]] = {
    "unknown": lambda _: {},
    "checksum": lambda found: {"checksum": found.digest},
    "manifest": lambda found: {"expected": found},
}


@both
@pytest.mark.parametrize(
    ("first", "then", "single"),
    [
        ("unknown", "manifest", False),
        ("checksum", "checksum", True),
        ("manifest", "manifest", False),
    ],
)
def test_a_partial_of_other_content_is_not_reused(
    ways: Ways, move: Move, first: str, then: str, *, single: bool
) -> None:
    """The source was damaged, and was repaired after the break: size and time are as before."""

    def broken(done: int, total: int) -> None:
        if done >= total:
            raise Retry("the link is broken")

    file = big_file(ways.source / "run" if single else ways.source / "run" / "big", 9)
    expected = digested(ways.source / "run")
    flip(file, 1)
    transfer, bad = ways.transfer(move), digested(ways.source / "run")
    with pytest.raises(Retry, match="broken"):
        move(evolve(transfer, **ORIGINS[first](bad)), report=broken)
    assert ways.partial.exists()
    flip(file, 1)
    move(evolve(transfer, **ORIGINS[then](expected)), report=quiet)
    assert digested(ways.target / "run") == expected
    assert [path.name for path in ways.target.iterdir()] == ["run"]


@both
def test_killed_within_a_file_few_bytes_are_sent_twice(ways: Ways, move: Move) -> None:
    """With the digests known, what is right is kept, wherever in the file it is."""
    run = big_file(ways.source / "run", 48)
    transfer = evolve(ways.transfer(move), expected=digested(run))
    kill_midway(move, transfer)
    moved = move(transfer, report=quiet)
    assert 0 < moved.bytes_sent < 0.75 * moved.bytes_total
    assert moved.manifest == digested(ways.target / "run") == digested(run)


@expecting
def test_only_what_is_wrong_is_sent_again(ways: Ways, move: Move) -> None:
    """One flipped bit costs one file of many, and one part of a large one."""
    run = ways.source / "run"
    run.mkdir()
    for number in range(20):
        (run / f"{number}").write_bytes(os.urandom(50_000))
    big_file(run / "big", 24)
    transfer = evolve(ways.transfer(move), expected=digested(run))
    move(transfer, report=quiet)
    flip(ways.target / "run/7", 31_000)
    flip(ways.target / "run/big", 2 * PART + 5)
    (ways.target / "run").rename(ways.partial)
    moved = move(transfer, report=quiet)
    assert moved.bytes_sent == 50_000 + PART
    assert moved.manifest == digested(ways.target / "run") == transfer.expected


@pytest.mark.parametrize("move", [push, fast_push])
@pytest.mark.parametrize("read_back", [False, True])
def test_a_bad_copy_that_was_pushed_is_mended(ways: Ways, move: Move, read_back: bool) -> None:
    """What has its name already becomes whole again, also where several parts of a file are bad."""
    run = make_run(ways.source / "run")
    big_file(run / "big", 41)
    big_file(run / "even", 2 * PART // MIB)
    expected = digested(run)
    transfer = evolve(ways.transfer(move), expected=expected, again=True)
    move(evolve(transfer, again=False), report=quiet)
    copy = ways.target / "run"
    for at in (0, 5 * PART, 7 * PART + 3):
        flip(copy / "big", at)
    for longer in ("with space", "even"):
        with (copy / longer).open("ab") as file:
            file.write(b"more")
    (copy / "sub/deep/data").unlink()
    moved = move(evolve(transfer, found=digested(copy) if read_back else None), report=quiet)
    assert digested(copy) == expected
    assert (copy / "big").stat().st_mtime == (copy / "even").stat().st_mtime == OLD
    if read_back or move is fast_push:
        small = sum((run / name).stat().st_size for name in ("with space", "sub/deep/data"))
        assert 3 * PART <= moved.bytes_sent <= 3 * PART + small


@pytest.mark.parametrize("move", [push, fast_push])
@pytest.mark.parametrize("root", ["target", "disk"])
def test_a_bad_copy_behind_a_link_is_mended(ways: Ways, move: Move, root: str) -> None:
    """It has been taken to another disk, and has left a link: where that leads is what counts."""
    big_file(ways.source / "run" / "big", 9)
    transfer = evolve(ways.transfer(move), expected=digested(ways.source / "run"))
    move(transfer, report=quiet)
    disk = ways.target.parent / "disk"
    disk.mkdir()
    copy = (ways.target / "run").rename(disk / "run")
    (ways.target / "run").symlink_to(copy)
    flip(copy / "big", PART)
    roots = tuple({str(ways.target.parent / root), str(disk)})
    move(evolve(transfer, again=True, remote_roots=roots), report=quiet)
    assert digested(copy) == transfer.expected


@both
def test_a_damaged_source_is_not_copied(ways: Ways, move: Move) -> None:
    """What passes is compared with what was to pass: nothing is published, and the file named."""
    run = make_run(ways.source / "run")
    big_file(run / "big", 12)
    transfer = evolve(ways.transfer(move), expected=digested(run))
    flip(run / "big", PART + 1)
    with pytest.raises(Damaged, match=r"big in .* is not what it was"):
        move(transfer, report=quiet)
    flip(run / "big", PART + 1)
    (run / "with space").unlink()
    with pytest.raises(Damaged, match="with space is missing"):
        move(transfer, report=quiet)
    assert not (ways.target / "run").exists()


@expecting
def test_a_bad_part_is_had_from_another_source(ways: Ways, move: Move) -> None:
    """What a damaged source has given is kept, but for the part that was bad."""
    run = big_file(ways.source / "run", 24)
    expected = digested(run)
    shutil.copy2(run, ways.source / "good")
    flip(run, 3 * PART)
    transfer = evolve(ways.transfer(move), expected=expected)
    with pytest.raises(Damaged):
        move(transfer, report=quiet)
    good = evolve(ways.transfer(move, "good", to="run"), expected=expected)
    assert move(good, report=quiet).bytes_sent == PART
    assert digested(ways.target / "run") == expected


@pytest.mark.parametrize(
    ("move", "year"),
    [(move, year) for move in (pull, push) for year in (1965, 2150)]
    + [(fast_pull, 1965), (fast_push, 2150)],
)
def test_a_file_of_any_date_is_moved(ways: Ways, move: Move, year: int) -> None:
    """SFTP's times are of 32 bits. A copy that was moved is found to stand, and not moved again."""
    run = make_run(ways.source / "run")
    when = (year - 1970) * 365.25 * 86400
    os.utime(next(path for path in sorted(run.rglob("*")) if path.is_file()), (when, when))
    assert ways.move(move).manifest == digested(ways.target / "run") == digested(run)
    assert ways.move(move).bytes_sent == 0


ODD_LINES = {
    "odd": b"=",
    "one word": b"other.example",
    "marker": b"@tomorrow * ssh-ed25519 AAAA",
    "hash": b"|1|no|hash ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIM",
    "Latin-1": b"other.example ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIM J\xfcrgen",
    "cut off": b"other.example ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIM",
    "NUL": bytes(64),
    "separator": "# a comment\x85=".encode(),
}


@pytest.mark.parametrize("line", ODD_LINES.values(), ids=ODD_LINES)
@pytest.mark.parametrize("last", [False, True])
def test_a_line_of_known_hosts_that_is_of_no_use_is_passed_over(
    sshd: Server, tmp_path: Path, line: bytes, *, last: bool
) -> None:
    """As OpenSSH does it: no host is lost for what stands there of another."""
    good = Path(sshd.endpoint.known_hosts_file).read_bytes().strip()
    known = tmp_path / "known_hosts"
    known.write_bytes(b"\n".join([good, line] if last else [line, good]))
    assert "OpenSSH" in check(evolve(sshd.endpoint, known_hosts=str(known)))
    known.write_bytes(line)
    with pytest.raises(Denied, match=r"is not in .*known_hosts: add it"):
        check(evolve(sshd.endpoint, known_hosts=str(known)))


def test_a_line_that_is_passed_over_is_reported_once(tmp_path: Path) -> None:
    """With the file and the number of the line."""
    known = tmp_path / "known_hosts"
    known.write_text("# a comment\n=\n")
    reported: list[str] = []
    sink = logger.add(lambda line: reported.append(str(line)), format="{message}")
    for _ in range(2):
        read_known_hosts(str(known))
    logger.remove(sink)
    assert reported == [f"{known}, line 2, is passed over: Invalid known hosts entry: =\n"]


@pytest.mark.parametrize("comment", [b"J\xfcrgen", "Jürgen".encode(), b"\xff\xfe x"])
def test_a_comment_of_known_hosts_may_be_anything(
    sshd: Server, tmp_path: Path, comment: bytes
) -> None:
    """In any encoding: the host is known all the same."""
    key = Path(sshd.endpoint.known_hosts_file).read_bytes().split()[:3]
    known = tmp_path / "known_hosts"
    known.write_bytes(b" ".join([*key, comment]))
    assert "OpenSSH" in check(evolve(sshd.endpoint, known_hosts=str(known)))


@pytest.mark.parametrize(
    "line",
    [
        "@revoked * ssh-tomorrow AAAA",
        "@revoked * ssh-ed25519 AA-A",
        "a ssh-ed25519",
        "a 1024 35 12",
    ],
)
def test_a_key_of_known_hosts_that_cannot_be_read_is_reported(tmp_path: Path, line: str) -> None:
    """Otherwise a person takes a key for known, or for revoked, that is not."""
    known = tmp_path / "known_hosts"
    known.write_text(f"\n{line}\n")
    reported: list[str] = []
    sink = logger.add(lambda line: reported.append(str(line)), format="{message}")
    for _ in range(2):
        read_known_hosts(str(known))
    logger.remove(sink)
    (warning,) = reported
    assert f"{known}, line 2, is passed over" in warning


@contextmanager
def hole(port: int, address: str = "127.0.0.66") -> Iterator[None]:
    """An address whose queue is full: it swallows further connections, as a firewall does."""
    with ExitStack() as held:
        full = held.enter_context(socket.socket())
        full.bind((address, port))
        full.listen(0)
        for _ in range(3):
            one = held.enter_context(socket.socket())
            one.setblocking(False)
            with suppress(BlockingIOError):
                one.connect((address, port))
        time.sleep(0.1)
        yield


def addressed(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Have every name mean these addresses."""

    def getaddrinfo(_host: object, port: int, *_: object, **__: object) -> list[Any]:
        kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        return [(*kind, (address, port)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


@pytest.mark.parametrize("move", [pull, push])
def test_every_address_of_a_host_is_tried(
    ways: Ways, move: Move, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first swallows what comes, the second is refused; long before the time is over."""
    run = make_run(ways.source / "run")
    big_file(run / "big", 60)  # so that OpenSSH's own client has its part
    with hole(ways.server.port):
        addressed(monkeypatch, "127.0.0.66", "127.0.0.67", "127.0.0.1")
        began = time.monotonic()
        assert ways.move(move).manifest == digested(run)
        assert time.monotonic() - began < 15  # seconds that a connection may take


def test_an_address_that_fails_is_reported_if_all_do(
    sshd: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused by one, swallowed by the other."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.67", 0))
        port = taken.getsockname()[1]
        there = evolve(sshd.endpoint, host="any", port=port)
        monkeypatch.setattr("caxev.transfer.ssh.endpoint._CONNECTING", 0.5)
        addressed(monkeypatch, "127.0.0.67")
        with pytest.raises(Retry, match=r"any:\d+ cannot be reached: .*127\.0\.0\.67"):
            check(there)
        addressed(monkeypatch, "127.0.0.66", "127.0.0.67")
        with hole(port), pytest.raises(Retry, match=r"any:\d+ did not answer in time"):
            check(there)


# The receiver


@pytest.mark.parametrize("command", ["/no/such/program", "echo noise;", "exit 3;"])
@pytest.mark.parametrize("move", [pull, push])
def test_without_a_receiver_sftp_does(ways: Ways, move: Move, command: str) -> None:
    """An account that starts no caxev is served all the same."""
    run = make_run(ways.source / "run")
    move(evolve(ways.transfer(move), agent=command), report=quiet)
    assert digested(ways.target / "run") == digested(run)


@pytest.mark.parametrize("move", [pull, push])
def test_an_account_that_has_no_channel_for_a_receiver(tmp_path: Path, move: Move) -> None:
    """It is served over SFTP as well, without what would have been asked of a receiver."""
    for name in ("sshd", "target", "source/run/sub"):
        (tmp_path / name).mkdir(parents=True)
    with servers.running(tmp_path / "sshd", "MaxSessions 1\n") as server:
        ways = Ways(server, tmp_path / "source", tmp_path / "target")
        move(evolve(ways.transfer(move), agent=AGENT), report=quiet)
    assert digested(ways.target / "run") == digested(ways.source / "run")


@pytest.mark.parametrize("move", [pull, push])
def test_a_talkative_login_shell_does_no_harm(ways: Ways, move: Move) -> None:
    """What is said before the receiver says hello is passed over."""
    run = make_run(ways.source / "run")
    moved = move(evolve(ways.transfer(move), agent=f"echo welcome; {AGENT}"), report=quiet)
    assert moved.manifest == digested(ways.target / "run") == digested(run)


@pytest.mark.parametrize("move", [pull, push])
def test_a_receiver_may_be_kept_inside_directories(ways: Ways, move: Move) -> None:
    """``caxev receive --root``, as a forced command has it, holds whatever the other side asks."""
    make_run(ways.source / "run")
    for number in range(20):  # so that the receiver is asked
        (ways.source / "run" / str(number)).touch()
    elsewhere = shlex.quote(str(ways.server.directory))
    wrapped = f"sh -c 'exec {AGENT} receive --root {elsewhere}' --"
    with pytest.raises(GiveUp, match="is not inside"):
        move(evolve(ways.transfer(move), agent=wrapped), report=quiet)


LIAR = """
import json, sys
print("caxev receive 1", flush=True)
sys.stdin.buffer.read(int(sys.stdin.buffer.readline()))
body = json.dumps({"source": json.loads(sys.argv[1])})
print(len(body), body, sep="\\n", end="", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    "rows",
    [
        [["../evil", "file", 3, 0, ""]],
        [["a/../../evil", "file", 3, 0, ""]],
        [["/tmp/evil", "file", 3, 0, ""]],
        [["", "file", 3, 0, ""], ["x", "file", 3, 0, ""]],
        [["a", "file", 3, 0, ""], ["a", "link", 0, 0, "x"]],
        [["a", "fifo", 3, 0, ""]],
        [["a", "link", 0, 0, "../../etc"]],
        [["a", "file", "many", 0, ""]],
        [["a", "file", 3, 10**30, ""]],
        [["a", "file", 3]],
        [5],
        {"a": 1},
    ],
)
def test_a_receivers_listing_is_not_believed(ways: Ways, rows: Any) -> None:
    """The far end does not choose where we write."""
    make_run(ways.source / "run")
    for number in range(20):  # so that the receiver is asked
        (ways.source / "run" / str(number)).touch()
    liar = shlex.join([sys.executable, "-c", LIAR, json.dumps(rows)])
    with pytest.raises(GiveUp, match=r"impossible name|listed twice|refused|in a wrong shape"):
        pull(evolve(ways.transfer(pull), agent=liar), report=quiet)
    assert list(ways.target.iterdir()) == []


HELLO = "echo caxev receive 1;"


@pytest.mark.parametrize(
    ("receiver", "words"),
    [
        ("echo 99999999999; exec cat /dev/zero;", "announced a message of 99,999,999,999 bytes"),
        ("exec cat /dev/zero;", "caxev receive ended there"),
        ("echo x; exec cat /dev/zero >&2;", "caxev receive ended there"),
    ],
)
def test_a_receiver_that_answers_without_end(
    ways: Ways, monkeypatch: pytest.MonkeyPatch, receiver: str, words: str
) -> None:
    """It is given up, and named, before it has taken memory."""
    monkeypatch.setattr("caxev.transfer.ssh.agent._PATIENCE", 1.0)
    make_run(ways.source / "run")
    for number in range(20):  # so that the receiver is asked
        (ways.source / "run" / str(number)).touch()
    transfer = evolve(ways.transfer(pull), agent=HELLO + receiver)
    with pytest.raises((GiveUp, Retry), match=words) as error:
        pull(transfer, report=quiet)
    assert str(ways.server.port) in str(error.value)
    assert len(str(error.value)) < 3000


@pytest.mark.parametrize("command", ["exec cat /dev/zero;", "exec yes;"])
def test_a_login_shell_that_never_ends_its_welcome(
    ways: Ways, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """It is taken for an account without a receiver."""
    monkeypatch.setattr("caxev.transfer.ssh.agent._PATIENCE", 1.0)
    run = make_run(ways.source / "run")
    for number in range(20):  # so that the receiver is asked
        (run / str(number)).touch()
    pull(evolve(ways.transfer(pull), agent=command), report=quiet)
    assert digested(ways.target / "run") == digested(run)


def test_a_tree_is_listed_up_to_a_number(ways: Ways, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the far end and the directory."""
    monkeypatch.setattr("caxev.limited.ROWS", 10)
    run = make_run(ways.source / "run")
    for number in range(20):
        (run / str(number)).touch()
    with pytest.raises(GiveUp, match=r":\d+:.*run holds more than 10 files"):
        pull(ways.transfer(pull), report=quiet)


# Limits


@both
def test_a_limited_rate_is_kept(ways: Ways, move: Move) -> None:
    """So many bytes a second and not more, by all processes and streams together."""
    ways_run = ways.source / "run"
    ways_run.mkdir()
    for number in range(40):
        (ways_run / f"{number}").write_bytes(os.urandom(125_000))
    big_file(ways_run / "big", 5)
    began = time.monotonic()
    moved = move(evolve(ways.transfer(move), max_rate=5e6), report=quiet)
    # What was let through last is not waited for any more.
    assert time.monotonic() - began > (moved.bytes_total - CHUNK) / 5e6
    assert moved.manifest == digested(ways.target / "run")


@both
def test_what_must_stay_free_stays_free(ways: Ways, move: Move, small_disk: Path) -> None:
    """A copy that fits is not begun where too little would be left."""
    big_file(ways.source / "run", 8)
    ways = evolve_target(ways, small_disk)
    with pytest.raises(Retry, match=r"not enough space"):
        move(evolve(ways.transfer(move), min_free=42 * MIB), report=quiet)
    move(evolve(ways.transfer(move), min_free=20 * MIB), report=quiet)


@both
def test_space_is_looked_at_meanwhile(
    ways: Ways, move: Move, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else fills the disk: the transfer ends before it is full, to go on later."""
    monkeypatch.setattr("caxev.transfer.ssh.pushing._LOOK_AT_DISK", 0.05)
    run = big_file(ways.source / "run", 10)
    ways = evolve_target(ways, small_disk)
    filler = small_disk / "filler"
    slow = evolve(ways.transfer(move), min_free=20 * MIB, max_rate=5e6)
    with pytest.raises(Retry, match=r"must stay so"):
        move(slow, report=lambda *_: filler.write_bytes(bytes(26 * MIB)))
    filler.unlink()
    move(evolve(slow, max_rate=None), report=quiet)
    assert digested(ways.target / "run") == digested(run)


# Confinement


@both
def test_paths_stay_inside_their_roots(ways: Ways, move: Move) -> None:
    """Paths that are relative, climb, or leave by a link are refused on either side."""
    make_run(ways.source / "run")
    (ways.source / "out").symlink_to("/etc")
    (ways.target / "out").symlink_to(ways.source)
    good = ways.transfer(move)
    for side in ("remote", "local"):
        (root,) = getattr(good, f"{side}_roots")
        odd = () if move in {fast_pull, fast_push} else ("n/a", "", f"{root}/..", "/")
        for bad in (root, f"{root}/../source", f"{root}/out/x", *odd):
            with pytest.raises(GiveUp, match="is not"):
                move(changed(good, side, "path", bad), report=quiet)
        with pytest.raises(GiveUp, match="is not inside"):
            move(changed(good, side, "roots", ()), report=quiet)


@both
@pytest.mark.parametrize("side", ["remote", "local"])
def test_nothing_moves_where_a_disk_is_away(ways: Ways, move: Move, side: str) -> None:
    """Without its root's marker nothing is written, and nothing is said to be gone."""
    make_run(ways.source / "run")
    transfer = ways.transfer(move)
    (path,) = getattr(transfer, f"{side}_roots")
    root = Root(path, make_marker(path, "lngs", "dir_raw"))
    there = [*ways.target.iterdir()]
    for bad in (Root(path, "0123"), Root(f"{path}/gone", root.marker)):
        away = changed(changed(transfer, side, "roots", (bad,)), side, "path", f"{bad}/run")
        with pytest.raises(RootAway, match="Mount the disk"):
            move(away, report=quiet)
    assert [*ways.target.iterdir()] == there
    move(changed(transfer, side, "roots", (root,)), report=quiet)
    assert digested(ways.target / "run") == digested(ways.source / "run")


@slow_and_fast
def test_a_copy_on_a_far_disk_that_is_away_is_not_gone(ways: Ways, agent: str | None) -> None:
    """Read back, it is neither bad nor missing."""
    (path,) = ways.transfer(push).remote_roots
    away = evolve(ways.transfer(push), remote_roots=(Root(path, "0123"),), agent=agent)
    with pytest.raises(RootAway, match="Mount the disk"):
        remote_manifest(away, report=quiet)
    with pytest.raises(GiveUp, match="gone"):
        remote_manifest(evolve(away, remote_roots=(path,)), report=quiet)


# The other side


def test_check_says_what_answers(ways: Ways) -> None:
    """The server's version, and the directory we land in."""
    assert "OpenSSH" in check(ways.server.endpoint)


def refused(endpoint: Endpoint, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match) as raised:
        check(endpoint)
    assert "\n" not in str(raised.value)
    assert f"{endpoint.host}:{endpoint.port}" in str(raised.value)


def test_a_changed_host_key_is_refused(sshd: Server) -> None:
    """Another key in known_hosts than the server's."""
    servers.make_key(sshd.directory / "other")
    servers.write_known_hosts(sshd.directory, sshd.port, "other.pub")
    refused(sshd.endpoint, Denied, "is not the one in .*known_hosts")


def test_an_unknown_host_is_refused(sshd: Server) -> None:
    """No key in known_hosts; no such file is an error of its own. ~/.ssh is not asked instead."""
    (sshd.directory / "known_hosts").write_text("")
    refused(sshd.endpoint, Denied, "is not in .*known_hosts")
    (sshd.directory / "known_hosts").unlink()
    with pytest.raises(Denied, match="known_hosts is not there"):
        check(sshd.endpoint)


def test_a_pinned_host_key_is_enough_and_is_needed(sshd: Server) -> None:
    """The fingerprint decides, whatever stands in a file."""
    endpoint = evolve(sshd.endpoint, known_hosts="/nowhere", host_key=sshd.fingerprint)
    assert check(endpoint)
    refused(evolve(endpoint, host_key="SHA256:" + "A" * 43), Denied, "is not the one pinned")


def test_a_refused_key_waits_for_somebody(sshd: Server) -> None:
    """A key that the server does not know; and a file that is no key, or is not there."""
    servers.make_key(sshd.directory / "stranger")
    stranger = str(sshd.directory / "stranger")
    refused(evolve(sshd.endpoint, identity=stranger), Denied, "refused the key of")
    no_key = evolve(sshd.endpoint, identity=str(sshd.directory / "config"))
    refused(no_key, Denied, "cannot be used")
    with pytest.raises(Denied, match="is not there"):
        check(evolve(sshd.endpoint, identity="/nowhere"))


async def test_what_is_renewed_on_the_disk_counts_at_the_next_login(ways: Ways) -> None:
    """Our key and known_hosts, in a worker process that has logged in before and lives on."""
    make_run(ways.source / "run")
    there, ours = ways.server.directory, ways.target / "key"
    shutil.copy(there / "user_key", ours)
    endpoint = evolve(ways.server.endpoint, identity=str(ours))
    servers.make_key(there / "renewed")
    async with Workers() as workers:

        async def move(to: str) -> None:
            await workers.run(pull, evolve(ways.transfer(pull, to=to), endpoint=endpoint))

        async def is_refused(why: str) -> None:
            with pytest.raises(Denied, match=why):
                await move("refused")

        first = await workers.run(jobs.process_id)
        await move("one")
        (there / "renewed.pub").replace(there / "user_key.pub")  # the server knows no other now
        await is_refused("refused the key of")
        (there / "renewed").replace(ours)
        await move("two")
        servers.write_known_hosts(there, ways.server.port, "user_key.pub")
        await is_refused("is not the one in")
        servers.write_known_hosts(there, ways.server.port)
        await move("three")
        assert await workers.run(jobs.process_id) == first
    assert all(digested(ways.target / name).items for name in ("one", "two", "three"))


DENIED = "Match all\n  ForceCommand internal-sftp -P {}\n"


@pytest.mark.parametrize("denied", ["fsetstat", "setstat", "fsetstat,setstat"])
def test_a_server_that_sets_no_times_is_pushed_to(tmp_path: Path, denied: str) -> None:
    """Times and modes are done without; what was begun is gone on with, and twice is once."""
    if (reason := servers.missing()) is not None:
        pytest.skip(reason)
    for name in ("sshd", "source", "target"):
        (tmp_path / name).mkdir()
    run = make_run(tmp_path / "source" / "run")
    with servers.running(tmp_path / "sshd", DENIED.format(denied)) as server:
        ways = Ways(server, tmp_path / "source", tmp_path / "target")
        ways.partial.mkdir()
        name = next(path.name for path in run.iterdir() if path.is_file())
        (ways.partial / name).write_bytes(b"x" * 10_000)  # more than there is to be
        for known in (None, digested(run)):
            push(evolve(ways.transfer(push), expected=known), report=quiet)
            assert digested(ways.target / "run") == digested(run)


@pytest.mark.parametrize("request_", ["mkdir", "rename", "realpath"])
def test_a_request_that_is_refused_is_named(tmp_path: Path, request_: str) -> None:
    """What cannot be done without is waited for, and the message says which request it is."""
    if (reason := servers.missing()) is not None:
        pytest.skip(reason)
    for name in ("sshd", "source", "target"):
        (tmp_path / name).mkdir()
    make_run(tmp_path / "source" / "run")
    with servers.running(tmp_path / "sshd", DENIED.format(request_)) as server:
        ways = Ways(server, tmp_path / "source", tmp_path / "target")
        with pytest.raises(Denied, match=rf"{request_} /.*target.*: Permission denied"):
            push(ways.transfer(push), report=quiet)


@pytest.mark.parametrize("said", ["hi", "Welcome to the cluster"])
def test_a_shell_that_prints_before_sftp_is_named(tmp_path: Path, said: str) -> None:
    """Where sftp-server is started by the login shell, what that prints makes SFTP impossible."""
    server_program = Path("/usr/lib/openssh/sftp-server")
    if servers.missing() is not None or not server_program.exists() or os.geteuid() != 0:
        pytest.skip("needs OpenSSH's sshd and sftp-server, and a login shell of root")
    more = f"Match all\n  ForceCommand echo {said}; {server_program}\n"
    prints = pytest.raises(Denied, match=f"prints '{said}' before SFTP begins")
    with servers.running(tmp_path, more) as server, prints:
        check(server.endpoint)


def test_nobody_listening_is_tried_again(sshd: Server) -> None:
    """A host that is down now may be up later."""
    sshd.stop()
    refused(sshd.endpoint, Retry, "cannot be reached")


def test_a_channel_that_the_far_end_closed_first_is_let_go() -> None:
    """With something still to be handed over when both ends went: no error of the event loop's."""

    async def let_go() -> None:
        ours, theirs = socket.socketpair()
        loop = asyncio.get_running_loop()
        _, here = await loop.connect_accepted_socket(lambda: _Here(Mock()), theirs)
        channel = ConnectionChannel(ours, here)
        ours.setblocking(False)
        here.transport.write(bytes(16 << 20))
        here.transport.close()
        while here.transport.get_write_buffer_size():
            with suppress(BlockingIOError):
                ours.recv(1 << 20)
            await asyncio.sleep(0)
        channel.close()

    aio.run(let_go())


@both
def test_a_server_that_stops_midway(ways: Ways, move: Move) -> None:
    """The connection is lost: `Retry`, and the partial is there to go on with."""
    big_file(ways.source / "run", 64)

    def report(done: int, total: int) -> None:
        if done < total:
            ways.server.stop()

    with pytest.raises(Retry, match=r"127\.0\.0\.1"):
        move(ways.transfer(move), report=report)
    assert ways.partial.name in [path.name for path in ways.target.iterdir()]
    assert not (ways.target / "run").exists()


# Space


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@both
def test_too_little_space_is_said_before(ways: Ways, move: Move, small_disk: Path) -> None:
    """Nothing is written where it cannot fit."""
    big_file(ways.source / "run", 40)
    with pytest.raises(Retry, match=r"not enough space .* needs 41.9 MB .* free"):
        evolve_target(ways, small_disk).move(move)
    assert [p for p in small_disk.rglob("*") if p.is_file() and p.stat().st_size] == []


@both
def test_a_disk_that_fills_up_midway(ways: Ways, move: Move, small_disk: Path) -> None:
    """`Retry` in a clear line; the partial stays, and the transfer goes on when there is room."""
    run = big_file(ways.source / "run", 28)
    ways = evolve_target(ways, small_disk)
    filler = small_disk / "filler"

    def report(_done: int, _total: int) -> None:
        if not filler.exists():
            filler.write_bytes(bytes(30 * MIB))

    with pytest.raises(Retry, match=r"disk full.*run"):
        move(ways.transfer(move), report=report)
    assert ways.partial.stat().st_size > 0
    filler.unlink()
    assert ways.move(move).bytes_sent < 28 * MIB
    assert digested(ways.target / "run") == digested(run)


def evolve_target(ways: Ways, target: Path) -> Ways:
    return Ways(ways.server, ways.source, target)


# The plan

seen = st.builds(
    Seen,
    path=st.lists(st.sampled_from([b"a", b"b"]), min_size=1, max_size=2).map(b"/".join),
    kind=st.sampled_from(["file", "dir", "link"]),
    size=st.integers(0, 5).map(lambda n: n * PART // 2),
    mtime_ns=st.integers(0, 3).map(lambda n: n * 1_000_000_000),
)
trees = st.lists(seen, max_size=4, unique_by=lambda s: s.path)


def after(todo: Plan, present: list[Seen]) -> dict[bytes, str]:
    there: dict[bytes, str] = {s.path: s.kind for s in present}
    for s in todo.remove:
        del there[s.path]
    there |= {s.path: "dir" for s in todo.directories}
    there |= {piece.file.path: "file" for piece in todo.pieces}
    return there | {s.path: "link" for s in todo.links}


@given(source=trees, present=trees, unsure=st.sampled_from([0, PART, 3 * PART]))
def test_carrying_out_a_plan_makes_the_source(
    source: list[Seen], present: list[Seen], unsure: int
) -> None:
    """What is there afterwards is the source; what is kept looked the same; pieces are in range."""
    todo = plan(source, present, unsure=unsure)
    assert after(todo, present) == {s.path: s.kind for s in source}
    moved = {piece.file.path for piece in todo.pieces}
    files = {s.path: s for s in present if s.kind == "file"}
    for s in source:
        if s.kind == "file" and s.path not in moved:
            assert files[s.path] == s
    for piece in todo.pieces:
        assert 0 <= piece.start <= piece.file.size
        if piece.start:
            assert piece.start % PART == 0
            assert piece.start <= files[piece.file.path].size - unsure
            assert files[piece.file.path].mtime_ns >= piece.file.mtime_ns


@settings(max_examples=20)
@given(
    sizes=st.lists(st.integers(0, 5 * PART), max_size=3),
    ahead=st.none() | st.integers(1, 5).map(lambda n: n * PART),
    data=st.data(),
)
def test_all_is_handed_out_once(sizes: list[int], ahead: int | None, data: st.DataObject) -> None:
    """Every byte is in one span, cut between parts; `ahead` bounds how far on a span may end.

    Nothing goes beyond the room that there is once less is left than is under way.
    """
    files = [Seen(str(n).encode(), "file", size) for n, size in enumerate(sizes)]
    handout = Chunks.of((Piece(file, 0, file.size) for file in files), ahead=ahead)
    begun: list[Piece] = []
    moved: list[Piece] = []
    ended: list[bytes] = []
    while not handout.finished:
        room = data.draw(st.integers(1, PART))
        left = sum(file.size for file in files) - sum(span.left for span in [*begun, *moved])
        under_way = sum(span.left for span in begun)
        if data.draw(st.booleans()) and (span := handout.take(wait=False, room=room)) is not None:
            assert span.left <= room or left >= under_way
            begun.append(span)
            first = min(one.start for one in begun if one.file is span.file)
            assert ahead is None or span.stop <= first + ahead
        elif begun:
            span = begun.pop(data.draw(st.integers(0, len(begun) - 1)))
            moved.append(span)
            if handout.done(span):
                ended.append(span.file.path)
    assert sorted(ended) == sorted(file.path for file in files)
    for file in files:
        mine = sorted((span.start, span.stop) for span in moved if span.file is file)
        assert (mine[0][0], mine[-1][1]) == (0, file.size)
        assert all(one[1] == two[0] and two[0] % PART == 0 for one, two in pairwise(mine))


@given(source=trees)
def test_nothing_is_left_to_do_of_a_whole_copy(source: list[Seen]) -> None:
    """plan(s, s) moves no byte."""
    assert plan(source, source).left == 0


def test_scan_of_a_copy_is_that_of_its_source(ways: Ways) -> None:
    """Pulling what was pushed gives the tree one began with."""
    make_run(ways.source / "run")
    ways.move(push)
    shutil.rmtree(ways.source / "run")
    pull(evolve(ways.transfer(push), nstreams=1), report=quiet)
    assert scan(vouched(ways.source / "run")) == scan(vouched(ways.target / "run"))


# What is spoken


def test_openssh_speaks_nothing_that_asyncssh_would_not(sshd: Server) -> None:
    """Its own lists have SHA-1 in them yet; ours go to both."""
    with shell(sshd.endpoint) as command:
        told = subprocess.check_output([*command, "-G", "127.0.0.1"], text=True)
    spoken = dict(line.partition(" ")[::2] for line in told.splitlines())
    assert spoken["macs"] == ",".join(MACS)
    assert spoken["kexalgorithms"] == ",".join(KEX)
    hostkeys = spoken["hostkeyalgorithms"].split(",")
    assert "ssh-ed25519" in hostkeys
    assert not {"ssh-rsa", "ssh-dss"} & {*hostkeys, *spoken["pubkeyacceptedalgorithms"].split(",")}


@pytest.mark.parametrize(
    ("kind", "algorithms"),
    [
        ("ssh-rsa", ["rsa-sha2-512", "rsa-sha2-256"]),
        ("ecdsa-sha2-nistp256", ["ecdsa-sha2-nistp256"]),
    ],
)
def test_an_rsa_key_signs_by_no_sha1(tmp_path: Path, kind: str, algorithms: list[str]) -> None:
    """What known_hosts has is asked for, and of an RSA key no SHA-1."""
    key = asyncssh.generate_private_key(kind).export_public_key("openssh").decode()
    known = tmp_path / "known_hosts"
    known.write_text(f"[site.example.org]:2222 {key}\nother.example.org {key}\n")
    for host, port in (("site.example.org", 2222), ("other.example.org", 22)):
        endpoint = Endpoint(host, port=port, known_hosts=str(known))
        assert _options(endpoint)["server_host_key_algs"] == algorithms


def test_no_session_outlives_the_server_of_these_tests(sshd: Server) -> None:
    """A program goes on when its connection is cut, and ends with the server."""
    keys = ["-i", f"{sshd.directory / 'user_key'}", "-o", "StrictHostKeyChecking=no"]
    hosts = ["-o", f"UserKnownHostsFile={sshd.directory / 'known_hosts'}", "-F", "none"]
    remote = [f"{sshd.endpoint.username}@127.0.0.1", "echo $$; exec sleep 1000"]
    command = ["ssh", *keys, *hosts, "-p", str(sshd.port), *remote]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        program = Path("/proc") / client.stdout.readline().decode().strip()
        session = _parent(program)
        client.kill()
    while _parent(program) == session:
        time.sleep(0.01)
    sshd.stop()
    deadline = time.monotonic() + 60
    while program.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not program.exists()


def _parent(process: Path) -> str:
    (line,) = (x for x in (process / "status").read_text().splitlines() if x.startswith("PPid:"))
    return line
