"""A reading that proves a copy comes from the disk, whatever the page cache holds."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import evolve, frozen

from caxev.files import Confined, Manifest, digest_tree, resolved, uncached
from caxev.tape.steps import Data, back_up, compare
from tests.places import vouched
from tests.test_tape import RUN, ground_in

PAGE = 4096
SBIN = os.environ["PATH"] + ":/usr/sbin:/sbin"


@frozen
class Disk:
    """A small ext4 file system on a device of its own, whose blocks can be spoilt."""

    image: Path
    mounted: Path

    def spoil(self, data: bytes) -> None:
        """Overwrite the block that holds `data` below the file system, which is not told."""
        os.sync()
        at = self.image.read_bytes().find(data)
        assert at > 0
        assert at % PAGE == 0
        with self.image.open("r+b") as file:
            file.seek(at)
            file.write(bytes(len(data)))
        os.sync()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk", tmp_path / "mounted")
    made.mounted.mkdir()
    with made.image.open("wb") as file:
        file.truncate(32 << 20)
    commands = (
        ["mkfs.ext4", "-q", "-b", str(PAGE), str(made.image)],
        ["mount", "-o", "loop", str(made.image), str(made.mounted)],
    )
    for command in commands:
        program = shutil.which(command[0], path=SBIN)
        if os.geteuid() != 0 or program is None:
            pytest.skip("only root mounts a disk, by mkfs.ext4 and mount")
        done = subprocess.run([program, *command[1:]], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"no disk of our own: {done.stderr.decode()}")
    yield made
    subprocess.run(["umount", "-l", str(made.mounted)], check=True)


def digested(path: Path, *, sha512: bool = False) -> Manifest:
    return digest_tree(vouched(path), sha512=sha512, report=lambda _done, _total: None)


@pytest.fixture(params=["direct", "refused at open", "refused at read"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the file system meets O_DIRECT: it takes it, or there is only the advice to drop."""
    if request.param == "refused at open":
        real = resolved.open_resolved

        def without(path: Confined, flags: int, mode: int = 0) -> int:
            if flags & os.O_DIRECT:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return real(path, flags, mode)

        monkeypatch.setattr(uncached, "open_resolved", without)
    if request.param == "refused at read":
        preadv = os.preadv

        def refusing(descriptor: int, buffers: list[memoryview], at: int) -> int:
            if uncached._is_direct(descriptor):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return preadv(descriptor, buffers, at)

        monkeypatch.setattr(os, "preadv", refusing)
    return str(request.param)


@pytest.mark.parametrize("sha512", [False, True], ids=["manifest", "and cax"])
@pytest.mark.usefixtures("way")
def test_a_spoilt_block_is_seen_behind_a_warm_cache(disk: Disk, *, sha512: bool) -> None:
    """The block under a page that is in memory goes bad: the next reading says so."""
    run = disk.mounted / "run"
    run.mkdir()
    data = os.urandom(3 * PAGE + 100)
    (run / "file").write_bytes(data)
    good = digested(run, sha512=sha512)
    with (run / "file").open("rb") as file:
        file.read()
        disk.spoil(data[PAGE : 2 * PAGE])
        assert (run / "file").read_bytes() == data  # as the cache has it
    found = digested(run, sha512=sha512)
    assert [str(one) for one in good.differences(found)] == ["file differs"]


def test_a_page_that_a_process_has_mapped_hides_nothing(disk: Disk) -> None:
    """Such a page cannot be dropped; a direct read does not ask for it."""
    path = disk.mounted / "file"
    data = os.urandom(4 * PAGE)
    path.write_bytes(data)
    good = digested(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[:] == data
        disk.spoil(data[:PAGE])
        assert mapped[:] == data
        assert digested(path).digest != good.digest


@pytest.mark.parametrize("size", [0, 1, PAGE - 1, PAGE, PAGE + 1, (2 << 20) + 5, (4 << 20) + 5])
@pytest.mark.usefixtures("way")
def test_what_was_just_written_is_read_whole(tmp_path: Path, size: int) -> None:
    """Dirty pages, and files that end within a block, are read as they are."""
    path = tmp_path / "file"
    data = os.urandom(size)
    path.write_bytes(data)
    found = digested(path, sha512=True)
    same = tmp_path / "same"
    same.write_bytes(data)
    os.sync()
    assert found == digested(same, sha512=True)
    assert found.cax_checksum() == hashlib.sha512(data).hexdigest()


def test_what_a_directory_gives_back_as_an_archive_comes_from_the_disk(
    disk: Disk, tmp_path: Path
) -> None:
    """Its files are still in memory after a backup, and prove nothing of what the disk holds."""
    ground = ground_in(tmp_path, "directory")
    data = os.urandom(2 * PAGE)
    (ground.source / "one.zip").write_bytes(data)
    there = evolve(ground.reach.there, dir_raw=str(disk.mounted))
    reach = evolve(ground.reach, there=there)
    run = Data(RUN, str(disk.mounted / RUN), ground.manifest)
    back_up(reach, str(ground.source), run, False).get()
    archived = disk.mounted / RUN / f"{RUN}_one.zip"
    assert archived.read_bytes() == data
    disk.spoil(data[:PAGE])
    assert archived.read_bytes() == data  # as the cache has it
    why, _ = compare(reach, run).get()
    assert "one.zip differs" in (why or "")
