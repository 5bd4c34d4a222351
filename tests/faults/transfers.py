"""What disks and networks do to copies while they move.

Chicago pulls and lngs pushes a run, slowly enough that a fault meets it on its way; the sites'
SSH servers stand behind proxies. When the fault has had its effect, each copy is good and whole,
or says what is wrong. Then the fault is lifted, a person asks to try again, and all end good.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple

import trio
from attrs import define

from caxev.core.clock import utcnow
from caxev.core.model import ERROR, TRANSFERRED, Run
from caxev.database import Request
from caxev.demo.world import World
from caxev.engine.root_markers import init_roots
from tests.faults.campaign import BIRTH, Born, Ground, Problem, Tally, corrupt, say, say_round
from tests.faults.load import in_turn
from tests.faults.proxy import Proxy, Way, front_ssh
from tests.places import partial_of

SIZE: Final = 6_000_000
"""Bytes in a run."""
RATE: Final = "4MB/s"
MOVED: Final = 0.2
"""The share of a run that has come somewhere when its fault begins."""
ARRIVING: Final = 30.0
"""Seconds in which a copy that moves comes somewhere."""
TRIES: Final = 3
"""Rounds of a fault that comes too late."""
SPACE: Final = 4 * SIZE
"""Bytes of the small disk at chicago."""


@define(eq=False)
class Stage:
    """A run on its way. `random` says where and when; `disk` is chicago's own small one, if any."""

    ground: Ground
    proxies: dict[str, Proxy]
    random: Random
    source: Path
    disk: Path | None
    long: bool

    async def wait(self, least: float, most: float) -> None:
        """Let a fault last; in the short form no longer than it must."""
        await trio.sleep(self.random.uniform(least, most) if self.long else least)

    def target(self, site: str) -> Path:
        return self.ground.world.dir_of(site, "dir_raw") / self.source.name

    async def moving(self) -> None:
        """Wait until some of it has come somewhere."""

        async def some() -> bool:
            targets = [self.target(site) for site in self.proxies if site != BIRTH]
            parts = [partial_of(target) for target in targets]
            moved = (_size(part) > MOVED * SIZE for part in parts)
            return any(moved) or any(target.exists() for target in targets)

        await self.ground.until(some, "nothing moves")


def _size(path: Path) -> int:
    with suppress(OSError):
        return sum(file.stat().st_blocks * 512 for file in path.iterdir())
    return 0


Fault = Callable[[Stage], Awaitable[Callable[[], object] | None]]
"""Begins a fault; returns what lifts it, and None where it came too late to harm anything."""
FAULTS: Final[dict[str, Fault]] = {}
AT_ONCE: Final = {"too_small", "read_only", "no_inodes"}
"""Faults that are there before anything moves."""


def fault(function: Fault) -> Fault:
    FAULTS[function.__name__] = function
    return function


def nothing() -> None:
    """Lift a fault that is over by itself."""


@fault
async def cut(stage: Stage) -> Callable[[], object]:
    """Connections break at random bytes, again and again."""
    ends = {stage.random.randrange(10_000, SIZE) for _ in range(4)}

    def meddle(_: Way, done: int, data: bytes) -> bytes:
        for end in [end for end in ends if done <= end < done + len(data)]:
            ends.discard(end)
            for proxy in stage.proxies.values():
                proxy.reset()
        return data

    return _meddling(stage, meddle)


@fault
async def flipped_in_flight(stage: Stage) -> Callable[[], object]:
    """Single bits change on their way."""
    left = [3]

    def meddle(_: Way, done: int, data: bytes) -> bytes:
        if not left[0] or done < 10_000:
            return data
        left[0] -= 1
        return _flip(data, stage.random.randrange(len(data)))

    return _meddling(stage, meddle)


def _meddling(stage: Stage, meddle: Callable[[Way, int, bytes], bytes]) -> Callable[[], object]:
    for proxy in stage.proxies.values():
        proxy.meddle = meddle
        proxy.reset()

    def lift() -> None:
        for proxy in stage.proxies.values():
            proxy.meddle = None

    return lift


def _flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << 3]) + data[at + 1 :]


@fault
async def stalled(stage: Stage) -> Callable[[], object]:
    """Nothing comes through and nothing is closed."""
    for proxy in stage.proxies.values():
        proxy.stall()
    await stage.wait(1, 90)  # after a minute the connection is given up
    for proxy in stage.proxies.values():
        proxy.repair()
    return nothing


@fault
async def server_killed(stage: Stage) -> Callable[[], object]:
    """The SSH servers are killed, and come back."""
    for site, proxy in stage.proxies.items():
        proxy.cut()
        proxy.to = await trio.to_thread.run_sync(stage.ground.world.restart_server, site)
    await stage.wait(0.5, 10)
    for proxy in stage.proxies.values():
        proxy.repair()
    return nothing


@fault
async def source_changed(stage: Stage) -> Callable[[], object]:
    """A file of the source grows while it is read."""
    file = _largest(stage.source)
    before = file.stat()
    with file.open("ab") as end:
        end.write(b"more")

    def lift() -> None:
        os.truncate(file, before.st_size)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    return lift


@fault
async def source_flipped(stage: Stage) -> Callable[[], object]:
    """A bit of the source changes on its disk."""
    file = _largest(stage.source)
    at = stage.random.randrange(file.stat().st_size)
    _flip_on_disk(file, at)
    return lambda: _flip_on_disk(file, at)


@fault
async def source_gone(stage: Stage) -> Callable[[], object]:
    """The source vanishes while it is read."""
    aside = stage.source.with_name("aside")
    stage.source.rename(aside)
    return lambda: aside.rename(stage.source)


@fault
async def target_flipped(stage: Stage) -> Callable[[], object] | None:
    """A bit of what has arrived changes on its disk before it has been verified."""
    left = {stage.target(site) for site in stage.proxies if site != BIRTH}
    flipped: set[Path] = set()
    with trio.move_on_after(ARRIVING):
        while left:
            flipped |= {target for target in left if flip_partial(target, stage.source)}
            left = {target for target in left - flipped if not target.exists()}
            await trio.sleep(0.01)
    return nothing if flipped else None


def flip_partial(target: Path, source: Path) -> bool:
    """Change a bit of what has come of that copy; whether there was one, and is wrong for now.

    What has come is known by its being what the source has: a file may have holes that are still
    to be filled, and what is changed in those would be written over.
    """
    partial = partial_of(target)
    for file in source.iterdir():
        if file.is_symlink() or not file.is_file():
            continue
        with suppress(FileNotFoundError), (partial / file.name).open("r+b", buffering=0) as there:
            wanted, number = file.read_bytes(), there.fileno()
            for at in range(0, len(wanted) - 16, 65536):
                block = wanted[at : at + 16]
                if any(block) and os.pread(number, 16, at) == block:
                    times = os.fstat(number)
                    os.pwrite(number, _flip(block[:1], 0), at)
                    os.utime(number, ns=(times.st_atime_ns, times.st_mtime_ns))
                    return os.pread(number, 1, at) != block[:1]
    return False


def _largest(directory: Path) -> Path:
    files = (file for file in directory.iterdir() if file.is_file() and not file.is_symlink())
    return max(files, key=lambda file: file.stat().st_size)


def _flip_on_disk(file: Path, at: int) -> None:
    """Change a bit, and leave the times as they are."""
    times = file.stat()
    with file.open("r+b") as open_file:
        open_file.seek(at)
        byte = open_file.read(1)
        open_file.seek(at)
        open_file.write(_flip(byte, 0))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


@fault
async def disk_full(stage: Stage) -> Callable[[], object]:
    """The disk is filled up while the copy is written."""
    disk = _needed(stage)
    balloon = disk / "balloon"
    with balloon.open("wb") as file, suppress(OSError):
        while True:
            file.write(b"\0" * 65536)
            file.flush()
    return balloon.unlink


@fault
async def quota_hit(stage: Stage) -> Callable[[], object]:
    """What may be written is cut down to a little more than there is, in mid-write."""
    disk = os.statvfs(_needed(stage))
    used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
    return _mounted(stage, f"size={used + 65536}")


@fault
async def permission_lost(stage: Stage) -> Callable[[], object]:
    """From half-way on nothing may be added where the copy is written, nor be renamed."""
    disk = _needed(stage)
    _forbid(disk, "+i")
    return lambda: _forbid(disk, "-i")


def _forbid(disk: Path, flag: str) -> None:
    """Change what is there and its partial copies; permissions alone do not stop root."""
    directories = [str(path) for path in (disk, *disk.iterdir()) if path.is_dir()]
    subprocess.run(["chattr", flag, *directories], check=True)


@fault
async def too_small(stage: Stage) -> Callable[[], object]:
    """The disk is smaller than the run."""
    return _mounted(stage, f"size={SIZE // 2}")


@fault
async def no_inodes(stage: Stage) -> Callable[[], object]:
    """A quota on the number of files is used up."""
    return _mounted(stage, "nr_inodes=3")


@fault
async def read_only(stage: Stage) -> Callable[[], object]:
    """The disk takes nothing."""
    return _mounted(stage, "ro")


def _mounted(stage: Stage, options: str) -> Callable[[], object]:
    disk = _needed(stage)
    mount(disk, f"remount,{options}")
    return lambda: mount(disk, f"remount,rw,size={SPACE},nr_inodes=10000")


def _needed(stage: Stage) -> Path:
    assert stage.disk is not None
    return stage.disk


def mount(disk: Path, options: str) -> bool:
    """Mount a file system in memory, or change one; whether we may."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0


ON_DISK: Final = {
    "disk_full",
    "quota_hit",
    "permission_lost",
    "too_small",
    "no_inodes",
    "read_only",
}
"""Faults that need a small disk, which only root can make."""


@contextmanager
def small_disk(world: World) -> Iterator[Path | None]:
    """Give chicago a small disk of its own for the length of a block; None where we may not."""
    disk = world.dir_of("chicago", "dir_raw")
    mounted = mount(disk, f"size={SPACE},nr_inodes=10000")
    try:
        yield disk if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(disk)], check=False)


async def transfers(
    ground: Ground, *, rounds: int, seed: int, only: tuple[str, ...] = (), long: bool = True
) -> dict[str, Any]:
    """Play faults (`only` these, in this order again and again; else all, in a random order)."""
    random, tally = Random(seed), Tally(ground.compared)
    stated = 0
    proxies = front_ssh(ground.world, max_rate=RATE)
    with small_disk(ground.world) as disk:
        if disk is None:
            say("no small disk can be mounted here: its faults are left out")
        sites = ground.world.sites
        await init_roots(ground.database, sites.get("chicago"), sites, force=True)
        may = tuple(name for name in only or FAULTS if disk is not None or name not in ON_DISK)
        await ground.gather()
        for name in in_turn(may, rounds, random, shuffled=not only):
            for _ in range(TRIES):
                began = trio.current_time()
                done = await _round(ground, proxies, name, random, disk, long=long)
                tally.add(done.problems)
                tally.faults += done.harmed
                stated += bool(done.said)
                took = trio.current_time() - began
                told = f", stated: {done.said[0][:90]}" if done.said else ""
                told += "" if done.harmed else ", which came too late"
                say_round(f"{tally.rounds}. {name}{told}", done.problems, took)
                if done.harmed:
                    break
        await ground.stop(*ground.listeners.values())
    for proxy in proxies.values():
        proxy.close()
    return {**tally.row(), "stated": stated}


class Played(NamedTuple):
    """What is wrong after a round, what was said to be wrong in it, and whether anything was."""

    problems: list[Problem]
    said: list[str]
    harmed: bool


async def _round(
    ground: Ground,
    proxies: dict[str, Proxy],
    name: str,
    random: Random,
    disk: Path | None,
    *,
    long: bool,
) -> Played:
    """Play a fault, and lift it when it has had its effect."""
    raw = ground.world.dir_of(BIRTH, "dir_raw")
    stage = Stage(ground, proxies, random, raw, disk, long)
    lift: Callable[[], object] | None = None
    if name in AT_ONCE:
        lift = await FAULTS[name](stage)
    born = await ground.take(SIZE)
    one = await _now(ground, born)
    stage.source = Path(next(copy.location or "" for copy in one.copies if copy.host == BIRTH))
    if name not in AT_ONCE:
        await stage.moving()
        lift = await FAULTS[name](stage)
    try:
        said = await _settled(ground, born)
        one = await _now(ground, born)
        problems = await trio.to_thread.run_sync(_accepted, ground, one, born, name)
    finally:
        (lift or nothing)()
    for site in ground.world.listening:
        await ground.database.add_request(site, Request("retry"), "tests", utcnow())
    problems += await ground.finish([born], None)
    problems += ground.ended()
    await ground.forget([born])
    return Played(problems, said, harmed=lift is not None)


async def _now(ground: Ground, born: Born) -> Run:
    return (await ground.database.runs([born.id]))[born.id]


async def _settled(ground: Ground, born: Born) -> list[str]:
    """Wait until each copy is good or somebody says what is wrong; what they say."""
    said: list[str] = []

    async def settled() -> bool:
        said.clear()
        one = await _now(ground, born)
        for state in ("failed", "pending"):
            reactions = await ground.database.reactions(state=state)
            mine = (reaction for reaction, _ in reactions if reaction.run == born.id)
            # That one waits for its time says nothing of what is wrong.
            said.extend(
                reaction.note
                for reaction in mine
                if reaction.note and reaction.handler != "stalled"
            )
        bad = (copy for copy in one.copies if copy.status == ERROR)
        said.extend(str(copy.fields.get("error") or "") for copy in bad)
        good = [copy for copy in one.copies if copy.status == TRANSFERRED]
        return len(good) == len(ground.world.sites) or any(said)

    await ground.until(settled, "neither good nor in a stated error")
    return [text for text in said if text]


def _accepted(ground: Ground, one: Run, born: Born, name: str) -> list[Problem]:
    """Read what is said to be good while the fault lasts; the source is what we broke ourselves."""
    found = list(corrupt(one, born, ground.world.listening))
    if name.startswith("source_"):
        found = [problem for problem in found if f"at {BIRTH}" not in problem.what]
    return found
