"""Copies moved over SSH: ours beside scp, rsync and rclone, to and from one real sshd.

Everybody has the same key, the same known hosts and no configuration file. Peers are timed from
their start to their end. Ours is called in a worker process that is up and has its code loaded, as
those of a listener are after a first job, and the manifest of what is to be copied is known,
as it is of every run from its birth on: *caxev sftp* at an account that has nothing but SFTP,
*caxev receiver* at one where caxev is installed. Trees cannot be compressed, lie in memory, and
their copies are removed after each timing. Contenders take turns in every round, and each round
begins with another one.

*Verified* is the same copy's time and then that of making sure of it. Ours: the digests of the copy
are taken where it is, and compared with those taken as the bytes passed; through SFTP alone a
pushed copy is read back. The peers': ``sha512sum`` of all files on both sides at once, and what
it printed compared; they are spared the connection that the far one would need.

With ``--wan`` the same on a long link: 100 ms there and back, 125 MB/s in each direction, through
`tests.bench.proxy`. With ``--memory`` no speed but the memory that our processes take.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import psutil
import trio
from attrs import define, evolve, field, frozen
from loguru import logger
from rich.console import Console
from rich.table import Table

from caxev.engine.workers import Workers
from caxev.files import Manifest, Moved
from caxev.transfer.ssh import Endpoint
from tests import sshd
from tests.bench import proxy
from tests.bench.checksum import (
    KIB,
    MIB,
    Work,
    digest,
    make_tree,
    medians,
    nothing,
    result,
    rotated,
    say,
    scratch,
    sums,
)
from tests.sshd import Transfer, pull, push, remote_manifest

LOOPBACK: Final = (Work("8x128MiB", 8, 128 * MIB), Work("5000x20KiB", 5000, 20 * KIB))
WAN: Final = (Work("8x64MiB", 8, 64 * MIB), Work("500x20KiB", 500, 20 * KIB))
QUICK: Final = (Work("2x4MiB", 2, 4 * MIB), Work("20x20KiB", 20, 20 * KIB))
DELAY: Final = 0.05  # seconds one way
RATE: Final = 125e6  # bytes a second
DIRECTIONS: Final = {"pull": pull, "push": push}
GCM: Final = "scp GCM"
FAST_CIPHER: Final = ("-c", "aes128-gcm@openssh.com")
RCLONE: Final = "rclone"
SFTP: Final = "caxev sftp"
RECEIVER: Final = "caxev receiver"
_EVERY: Final = 0.05  # seconds between two looks at the memory in use
_MARGIN: Final = 256 * MIB


class Seconds(NamedTuple):
    """What one copy took: to be there, and to be there for certain."""

    copied: float
    verified: float


@frozen
class Case:
    """One tree to be copied once, in one direction, to a place where nothing is."""

    direction: str
    endpoint: Endpoint
    source: Path
    target: Path

    @property
    def ends(self) -> tuple[str, str]:
        """Source and target as scp and rsync want them."""
        far = f"{self.endpoint.username}@{self.endpoint.host}:"
        source, target = str(self.source), str(self.target)
        return (far + source, target) if self.direction == "pull" else (source, far + target)

    def transfer(self, agent: str | None) -> Transfer:
        source, target = self.source, self.target
        remote, local = (source, target) if self.direction == "pull" else (target, source)
        transfer = Transfer(
            self.endpoint,
            remote_path=str(remote),
            remote_roots=(str(remote.parent),),
            local_path=str(local),
            local_roots=(str(local.parent),),
        )
        return evolve(transfer, agent=agent)

    def clear(self) -> None:
        shutil.rmtree(self.target, ignore_errors=True)


Contender = Callable[[Case], Seconds]


# -- peers ----------------------------------------------------------------------------------------


def _options(endpoint: Endpoint) -> list[str]:
    """What ssh is told: this key, these hosts, and nothing else from anywhere."""
    said = {
        "IdentityFile": endpoint.identity,
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "UserKnownHostsFile": endpoint.known_hosts,
        "GlobalKnownHostsFile": "none",
        "StrictHostKeyChecking": "yes",
        "BatchMode": "yes",
    }
    return ["-F", "none", *(f"-o{name}={value}" for name, value in said.items())]


def scp(case: Case, *more: str) -> list[str]:
    port = str(case.endpoint.port)
    return ["scp", "-q", "-r", *more, "-P", port, *_options(case.endpoint), *case.ends]


def rsync(case: Case) -> list[str]:
    shell = shlex.join(["ssh", "-p", str(case.endpoint.port), *_options(case.endpoint)])
    source, target = case.ends
    return ["rsync", "-a", "-e", shell, f"{source}/", f"{target}/"]


def rclone(case: Case) -> list[str]:
    far, pulls = case.endpoint, case.direction == "pull"
    source, target = str(case.source), str(case.target)
    said = {
        "--sftp-host": far.host,
        "--sftp-port": str(far.port),
        "--sftp-user": far.username,
        "--sftp-key-file": far.identity,
        "--sftp-known-hosts-file": far.known_hosts,
    }
    options = [f"{name}={value}" for name, value in said.items()]
    ends = [f":sftp:{source}", target] if pulls else [source, f":sftp:{target}"]
    return [RCLONE, "copy", "--config=", "--quiet", *options, *ends]


PEERS: Final[Mapping[str, Callable[[Case], list[str]]]] = {
    "scp": scp,
    GCM: lambda case: scp(case, *FAST_CIPHER),
    "rsync": rsync,
    RCLONE: rclone,
}


def _peer(command_for: Callable[[Case], list[str]], case: Case) -> Seconds:
    command = command_for(case)
    began = time.perf_counter()
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    copied = time.perf_counter() - began
    if ended.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}: {ended.stderr.decode(errors='replace')}")
    both = [sums("sha512sum", path) for path in (case.source, case.target)]
    source, target = map(result, both)
    verified = time.perf_counter() - began
    if source != target:
        raise AssertionError(f"{command[0]} has made another tree of {case.source}")
    return Seconds(copied, verified)


def beside(only: str | None = None) -> dict[str, Contender]:
    """Those that are installed here; of several names with commas between, those."""
    wanted = list(PEERS) if only is None else [name for name in only.split(",") if name]
    if unknown := set(wanted) - PEERS.keys():
        sys.exit(f"no peer {', '.join(sorted(unknown))} here: {', '.join(PEERS)}")
    found: dict[str, Contender] = {}
    for name in wanted:
        program, command_for = name.split()[0], PEERS[name]
        if shutil.which(program):
            found[name] = partial(_peer, command_for)
        else:
            say(f"{program} is not installed, so its column is left out (Debian: {program})")
    return found


# -- ours -----------------------------------------------------------------------------------------


async def _timed(case: Case, transfer: Transfer) -> Seconds:
    async with Workers(niceness=0) as workers:
        await workers.run(nothing, transfer)
        began = time.perf_counter()
        moved = await workers.run(DIRECTIONS[case.direction], transfer)
        copied = time.perf_counter() - began
        found = await _read_back(workers, case, transfer)
        same = found.digest == (await _expected(workers, case, moved)).digest
        verified = time.perf_counter() - began
    if not same:
        raise AssertionError(f"we have made another tree of {case.source}")
    return Seconds(copied, verified)


async def _read_back(workers: Workers, case: Case, transfer: Transfer) -> Manifest:
    if case.direction == "pull":
        return await workers.run(digest, str(case.target))
    return await workers.run(remote_manifest, transfer)


async def _expected(workers: Workers, case: Case, moved: Moved) -> Manifest:
    """What the bytes were as they passed, or, where nobody saw them all pass, what they are."""
    if moved.manifest is None:
        return await workers.run(digest, str(case.source))
    return moved.manifest


def _ours(agent: str | None, case: Case) -> Seconds:
    return trio.run(_timed, case, evolve(case.transfer(agent), expected=known(case.source)))


@cache
def known(source: Path) -> Manifest:
    """The manifest of what is to be copied: made once, where the data is born."""
    return digest(str(source), report=lambda *_: None)


def agents() -> dict[str, str | None]:
    """The command at the far account, for each of our variants."""
    return {SFTP: None, RECEIVER: shlex.join([sys.executable, "-m", "caxev"])}


def variants() -> dict[str, Contender]:
    return {name: partial(_ours, agent) for name, agent in agents().items()}


# -- speed ----------------------------------------------------------------------------------------


@define
class Bench:
    """A server and a directory in memory, and the link between the two sides."""

    link: str
    endpoint: Endpoint
    directory: Path
    rounds: int
    theirs: Mapping[str, Contender] = field(factory=dict)

    def measure(self, work: Work) -> list[dict[str, Any]]:
        source = make_tree(self.directory / "source" / work.name, work)
        rows = [row for direction in DIRECTIONS for row in self._rows(work, direction, source)]
        shutil.rmtree(source)
        return rows

    def _rows(self, work: Work, direction: str, source: Path) -> Iterator[dict[str, Any]]:
        theirs, ours = dict(self.theirs), variants()
        target = self.directory / "target"
        target.mkdir(exist_ok=True)
        times = self._times(
            Case(direction, self.endpoint, source, target / work.name), theirs | ours
        )
        for verified in (False, True):
            what = {"work": work.name, "direction": direction, "link": self.link}
            found = {name: [pair[verified] for pair in pairs] for name, pairs in times.items()}
            seconds = {name: round(taken, 4) for name, taken in medians(found).items()}
            mine = {"seconds": seconds[RECEIVER], "sftp_seconds": seconds[SFTP]}
            beside = {name: seconds[name] for name in theirs}
            yield what | {"verified": verified} | mine | {"peers": beside}

    def _times(self, case: Case, everybody: Mapping[str, Contender]) -> dict[str, list[Seconds]]:
        times: dict[str, list[Seconds]] = {name: [] for name in everybody}
        for n in range(self.rounds):
            for name in rotated(list(everybody), n):
                try:
                    taken = everybody[name](case)
                finally:
                    case.clear()
                say(f"{case.direction} {case.source.name} {name}: {taken.copied:.2f} s")
                times[name].append(taken)
        return times


@contextmanager
def bench(works: Sequence[Work], rounds: int, *, wan: bool) -> Iterator[Bench]:
    with ExitStack() as held:
        keys = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        reached = held.enter_context(sshd.running(keys))
        if wan:
            reached.port = held.enter_context(proxy.running(reached.port, DELAY, RATE))
            sshd.write_known_hosts(keys, reached.port)
        need = 2 * max(work.total for work in works) + _MARGIN
        directory = held.enter_context(scratch(need))
        yield Bench("wan" if wan else "loopback", reached.endpoint, directory, rounds)


def speed(
    works: Sequence[Work], rounds: int, theirs: Mapping[str, Contender], *, wan: bool
) -> list[dict[str, Any]]:
    with bench(works, rounds, wan=wan) as made:
        made.theirs = theirs
        return [row for work in works for row in made.measure(work)]


# -- memory ---------------------------------------------------------------------------------------


@define
class Watch:
    """The most memory (bytes, RSS) that our processes have had in use at once, this one included.

    It stands for the listener, and has more loaded than that.
    """

    peak: int = 0

    def snapshot(self) -> None:
        me = psutil.Process()
        self.peak = max(self.peak, sum(map(_resident, [me, *me.children(recursive=True)])))


def _resident(process: psutil.Process) -> int:
    """Its memory; none for what is not ours: the server, and the SFTP that is a part of it."""
    with suppress(psutil.Error):
        if not process.name().startswith("sshd"):
            return int(process.memory_info().rss)
    return 0


@contextmanager
def watched() -> Iterator[Watch]:
    watch, stop = Watch(), threading.Event()

    def snapshot() -> None:
        while not stop.wait(_EVERY):
            watch.snapshot()

    thread = threading.Thread(target=snapshot)
    thread.start()
    try:
        yield watch
    finally:
        stop.set()
        thread.join()


async def _moved(direction: str, transfer: Transfer) -> int:
    async with Workers() as workers:
        await workers.run(nothing, transfer)
        with watched() as watch:
            await workers.run(DIRECTIONS[direction], transfer)
    return watch.peak


def peaks(gigabytes: float) -> list[dict[str, Any]]:
    """Move one sparse file both ways by each variant; the peaks. Its copies are on the disk."""
    size = int(gigabytes * 1e9)
    with ExitStack() as held:
        directory = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        if shutil.disk_usage(directory).free < size + _MARGIN:
            raise OSError(f"{directory} has no room for {gigabytes:g} GB")
        endpoint = held.enter_context(sshd.running(directory)).endpoint
        for name in ("source", "target"):
            (directory / name).mkdir()
        source = directory / "source" / "run"
        source.mkdir()
        with (source / "sparse").open("wb") as file:
            file.truncate(size)
        return [
            _peak(Case(direction, endpoint, source, directory / "target" / "run"), name, gigabytes)
            for direction in DIRECTIONS
            for name in agents()
        ]


def _peak(case: Case, variant: str, gigabytes: float) -> dict[str, Any]:
    began = time.perf_counter()
    try:
        transfer = evolve(case.transfer(agents()[variant]), expected=known(case.source))
        peak = trio.run(_moved, case.direction, transfer)
    finally:
        case.clear()
    seconds = round(time.perf_counter() - began, 2)
    return {
        "gb": gigabytes,
        "direction": case.direction,
        "variant": variant,
        "peak_mb": round(peak / 1e6, 1),
        "seconds": seconds,
    }


# -- going on -------------------------------------------------------------------------------------


async def _killed_at_half(direction: str, transfer: Transfer) -> int:
    """Kill the worker, and all that it has started, at half of the bytes; how many there were."""
    seen = 0
    async with Workers(niceness=0) as workers:
        with trio.CancelScope() as scope:

            def on_progress(done: int, total: int) -> None:
                nonlocal seen
                seen = done
                if done >= total / 2:
                    scope.cancel()

            await workers.run(DIRECTIONS[direction], transfer, on_progress=on_progress)
    return seen


async def _gone_on(direction: str, transfer: Transfer) -> Moved:
    async with Workers(niceness=0) as workers:
        return await workers.run(DIRECTIONS[direction], transfer)


def sent_twice(size: int) -> list[dict[str, Any]]:
    """Kill each kind of transfer of one file half-way, and go on; the share that was sent twice."""
    with bench([Work("1 file", 1, size)], 1, wan=False) as made:
        source = make_tree(made.directory / "source" / "run", Work("1 file", 1, size))
        expected = digest(str(source), report=lambda *_: None)
        rows = []
        for direction in DIRECTIONS:
            for name, agent in agents().items():
                case = Case(direction, made.endpoint, source, made.directory / "target" / "run")
                case.target.parent.mkdir(exist_ok=True)
                transfer = evolve(case.transfer(agent), expected=expected)
                first = trio.run(_killed_at_half, direction, transfer)
                moved = trio.run(_gone_on, direction, transfer)
                case.clear()
                twice = (first + moved.bytes_sent - size) / size
                rows.append({"direction": direction, "variant": name, "twice": round(twice, 4)})
        return rows


def twice_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("direction", "who", "sent twice", title="killed at half, and started again")
    for row in rows:
        table.add_row(row["direction"], row["variant"], f"{row['twice']:.2%}")
    return table


# -- what is shown --------------------------------------------------------------------------------


def speed_table(rows: Sequence[Mapping[str, Any]], works: Sequence[Work], link: str) -> Table:
    """MB/s of everybody, and how many times as fast as the fastest peer and as scp with GCM."""
    table = Table("work", "copy", "who", title=f"copies over SSH, {link}")
    for heading in ("s", "MB/s", "best", "GCM"):
        table.add_column(heading, justify="right")
    sizes = {work.name: work.total for work in works}
    for row in rows:
        table.add_section()
        for line in _lines(row, sizes[row["work"]]):
            copied = row["direction"] + " + verify" * row["verified"]
            table.add_row(row["work"], copied, *line)
    return table


def _lines(row: Mapping[str, Any], size: int) -> Iterator[tuple[str, ...]]:
    theirs: Mapping[str, float] = row["peers"]
    best = min(theirs.values(), default=None)
    ours = {RECEIVER: row["seconds"], SFTP: row["sftp_seconds"]}
    for who, seconds in {**theirs, **ours}.items():
        ratios = (f"{peer / seconds:.2f}" if peer else "" for peer in (best, theirs.get(GCM)))
        yield (who, f"{seconds:.2f}", f"{size / seconds / 1e6:.1f}", *ratios)


def memory_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("direction", "who", "GB moved", "peak RSS, MB", "seconds", title="our memory")
    for row in rows:
        figures = (f"{row['gb']:g}", f"{row['peak_mb']:.0f}", f"{row['seconds']:.1f}")
        table.add_row(row["direction"], row["variant"], *figures)
    return table


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--wan", action="store_true", help="on the long link instead of loopback")
    parser.add_argument("--only", metavar="WORK", help=f"one of {', '.join(_names())}")
    parser.add_argument("--rounds", type=int, help="how often (default 3, with --quick 1)")
    parser.add_argument(
        "--peers", metavar="NAMES", help=f"only these (none: ''): {', '.join(PEERS)}; default all"
    )
    parser.add_argument("--memory", action="store_true", help="memory instead of speed")
    parser.add_argument("--resume", action="store_true", help="what a kill costs instead of speed")
    parser.add_argument("--memory-gb", type=float, metavar="N", help="of a file of N GB (10)")


def _names() -> list[str]:
    return [work.name for work in (*LOOPBACK, *WAN, *QUICK)]


def _wanted(only: str | None, *, wan: bool, quick: bool) -> list[Work]:
    works = QUICK if quick else WAN if wan else LOOPBACK
    found = [work for work in works if only in {None, work.name}]
    if not found:
        sys.exit(f"no work {only!r} here: {', '.join(work.name for work in works)}")
    return found


def main(
    *,
    as_json: bool,
    quick: bool,
    wan: bool = False,
    only: str | None = None,
    rounds: int | None = None,
    peers: str | None = None,
    memory: bool = False,
    resume: bool = False,
    memory_gb: float | None = None,
) -> None:
    logger.remove()
    if reason := sshd.missing():
        sys.exit(reason)
    console = Console(stderr=as_json)
    found: dict[str, Any] = {"rows": []}
    if memory or memory_gb is not None:
        found["memory"] = peaks(memory_gb or (0.1 if quick else 10.0))
        console.print(memory_table(found["memory"]))
    elif resume:
        found["resume"] = sent_twice(64 * MIB if quick else 1024 * MIB)
        console.print(twice_table(found["resume"]))
    else:
        works = _wanted(only, wan=wan, quick=quick)
        theirs = beside(peers)
        found["rows"] = speed(works, rounds or (1 if quick else 3), theirs, wan=wan)
        console.print(speed_table(found["rows"], works, "long link" if wan else "loopback"))
    if as_json:
        print(json.dumps(found))
