"""The real cax 5.2.1 at midway-login1, caxev at xe1t-datamanager and tegner-login-1.

Each round is a kind of run, with sites and cax configured for it:

- `pulled`: cax pulls from tegner by scp, slowly, while tegner is to purge: the source must not be
  purged under it.
- `pushed`: cax pulls by rsync and pushes to tegner by scp. There some pushes break off, some end
  with cax itself, and in some a byte of what has arrived changes.
- `refused`: datamanager pushes to midway, where something else has the name at first. cax takes the
  failed entries out; when a person has made way, and said so, the runs come.
- `purged`: datamanager pushes to midway, and tegner pulls; the runs grow old, and cax purges its
  copies. Nobody may bring them again.
- `stalled`: a cax of yesterday has left a good copy at datamanager and half of one at midway and at
  tegner, under the final name, ``transferring`` or ``error``.

All start today, so that cax's purge of a day looks at each and takes none but those that grow old.
Of raw data cax takes xe1t-datamanager's copy for the master, and ends with a `KeyError` at a copy
of its own that has no such master: runs are born there, and it keeps them.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from getpass import getuser
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Final

import trio
from attrs import define, field, frozen
from pymongo import MongoClient

from caxev.config import ConfigError, load_sites
from caxev.core.clock import utcnow
from caxev.core.model import ERROR, TRANSFERRED, TRANSFERRING, VERIFYING, CopyKey
from caxev.demo.world import World
from caxev.rucio.rules import load_rules
from tests import sshd
from tests.faults.campaign import Born, Ground, Problem, Tally, digest_of, say, say_round
from tests.faults.cax import KEEP, OBSTACLE, SECOND, Kind, finished, made_way
from tests.faults.cax_bridge import TASKS, Cax
from tests.faults.cax_simulator import dirhash
from tests.faults.proxy import Proxy, Way
from tests.faults.races import lead

TEMPLATE: Final = Path(__file__).with_name("real_cax.json")
BIRTH: Final = "xe1t-datamanager"
CAX: Final = "midway-login1"
OTHER: Final = "tegner-login-1"
METHODS: Final = {BIRTH: "rsync", OTHER: "scp", CAX: "rsync"}
"""How cax reaches the sites, as in its cax.json."""
SIZE: Final = 300_000
HALF: Final = 150_000
"""Bytes of a connection after which what is to go wrong does."""
SLOW: Final = 0.4
"""Seconds that 64 KiB take."""
WAYS: Final = ("breaks", "dies", "damages", "well")
"""What becomes of a push of cax, in turn."""
LONG_AGO: Final = timedelta(hours=30)
NEIGHBOUR: Final = "neighbour"
"""A directory beside the site's own, with a file that nobody may touch."""

Change = Mapping[str, Any]


@frozen
class Scene:
    """A kind of run: how the sites and cax are configured, and what is done to the runs."""

    kind: Kind
    sites: Mapping[str, Change]
    cax: Change
    act: Callable[[Play, Sequence[Born]], Awaitable[list[Problem]]]
    before: Callable[[Play, dict[str, Any]], object] = lambda *_: None


@define(eq=False)
class Fault:
    """What the way to tegner does to cax: it is slow, or one fault befalls each connection."""

    raw: Path
    dies: Callable[[], None]
    slow: bool = False
    faults: deque[str] = field(factory=deque)
    played: Counter[str] = field(factory=Counter)

    def __call__(self, proxy: Proxy, way: Way, done: int, data: bytes) -> bytes:
        if self.slow:
            time.sleep(SLOW * len(data) / (1 << 16))
        if way == "there" and done < HALF <= done + len(data) and self.faults:
            what = self.faults.popleft()
            self.played[what] += what != "well"
            if what == "breaks":
                proxy.reset()
            elif what == "dies":
                self.dies()
            elif what == "damages":
                self._flip()
        return data

    def _flip(self) -> None:
        """Change the first byte of the file that was written last."""
        files = [path for path in self.raw.rglob("*") if path.is_file()]
        last = max(files, key=lambda path: path.stat().st_mtime_ns)
        with last.open("r+b") as file:
            first = file.read(1)
            file.seek(0)
            file.write(bytes([first[0] ^ 1]) if first else b"x")


class AtGranSasso(Ground):
    """A ground whose runs are born where cax's master copies are."""

    birth: ClassVar[str] = BIRTH


@define(eq=False)
class Play:
    """cax, what befalls it, and the ground; `waits` lets rounds of cax pass."""

    ground: Ground
    cax: Cax
    fault: Fault
    random: Random

    async def waits(self, rounds: int) -> None:
        """Wait for so many whole rounds of cax."""
        end = self.cax.rounds + rounds + 1

        async def over() -> bool:
            return self.cax.rounds >= end

        await self.ground.until(over, f"cax does not go on: {self.cax.said[-500:]}")

    def change(self, born: Born, change: Change) -> None:
        """Change a run as a person does, by hand."""
        settings = self.ground.world.settings
        with MongoClient[dict[str, Any]](settings.mongo_uri) as client:
            client[settings.database]["runs_new"].update_one({"_id": born.id}, change)

    def raw(self, site: str) -> Path:
        return self.ground.world.dir_of(site, "dir_raw")

    async def has(self, born: Born, host: str, *statuses: str) -> bool:
        """Whether the run has a copy at a host, in one of these statuses."""
        found = (await self.ground.database.runs([born.id]))[born.id].copy(CopyKey("raw", host))
        return found is not None and found.status in statuses


# -- scenes ---------------------------------------------------------------------------------------


async def _is_purged_while_it_is_read(play: Play, runs: Sequence[Born]) -> list[Problem]:
    """Let each run be purged at tegner as soon as cax pulls it from there."""
    left = [*runs]

    async def all_read() -> bool:
        for born in [*left]:
            if await play.has(born, CAX, TRANSFERRING, VERIFYING, TRANSFERRED):
                play.change(born, {"$pull": {"tags": KEEP[0]}})
                left.remove(born)
        return not left

    await play.ground.until(all_read, "cax does not pull all from tegner")
    return []


async def _breaks(_play: Play, _runs: Sequence[Born]) -> list[Problem]:
    return []


def _obstruct(play: Play, document: dict[str, Any]) -> None:
    (play.raw(CAX) / document["name"]).write_text(OBSTACLE)


async def _is_refused(play: Play, runs: Sequence[Born]) -> list[Problem]:
    return await made_way(play.ground, runs, REFUSED, CAX, play.waits)


async def _grows_old(play: Play, runs: Sequence[Born]) -> list[Problem]:
    """Let days pass as soon as all copies of a run are good; cax must purge its own."""
    for born in runs:
        for host in (BIRTH, OTHER, CAX):
            good = partial(play.has, born, host, TRANSFERRED)
            await play.ground.until(good, f"no good copy at {host}")
        play.change(born, {"$set": {"start": utcnow() - timedelta(days=2)}})
    return []


def _leave_half(play: Play, document: dict[str, Any]) -> None:
    """Leave what a cax of yesterday has left: a good copy, and of others half a file and a file."""
    (good,) = document["data"]
    source = Path(good["location"])
    good |= {"status": TRANSFERRED, "checksum": dirhash(source)}
    for host in (CAX, OTHER):
        place = play.raw(host) / source.name
        place.mkdir()
        first, *others = sorted(source.iterdir(), key=lambda _: play.random.random())
        (place / first.name).write_bytes(first.read_bytes()[: first.stat().st_size // 2])
        (place / others[0].name).write_bytes(others[0].read_bytes())
        then = datetime.now(UTC) - LONG_AGO
        os.utime(place, (then.timestamp(), then.timestamp()))
        entry = {"type": "raw", "host": host, "location": str(place), "checksum": None}
        status = play.random.choice((TRANSFERRING, ERROR))
        document["data"].append({**entry, "status": status, "creation_time": then})


PULLED: Final = Kind("pulled", BIRTH, (BIRTH, CAX))
PUSHED: Final = Kind("pushed", BIRTH, (BIRTH, OTHER, CAX))
REFUSED: Final = Kind("refused", BIRTH, (BIRTH, CAX))
PURGED: Final = Kind("purged", BIRTH, (BIRTH, OTHER))
STALLED: Final = Kind("stalled", BIRTH, (BIRTH, OTHER, CAX))
_QUICKLY: Final = {"warn": 5 * SECOND, "retry": 8 * SECOND}
SCENES: Final = (
    Scene(
        PULLED,
        {
            OTHER: {
                "download_options": [BIRTH],
                "purge": SECOND / 24,
                "deletion": {"copies": 1, "protect": ["keep"]},
            }
        },
        {"download_options": [OTHER]},
        _is_purged_while_it_is_read,
    ),
    Scene(
        PUSHED,
        {OTHER: {"stalled": _QUICKLY}},
        {"download_options": [BIRTH], "upload_options": [OTHER]},
        _breaks,
    ),
    Scene(REFUSED, {BIRTH: {"upload_options": [CAX]}}, {}, _is_refused, _obstruct),
    Scene(
        PURGED,
        {BIRTH: {"upload_options": [CAX]}, OTHER: {"download_options": [BIRTH]}},
        {},
        _grows_old,
    ),
    Scene(
        STALLED,
        {OTHER: {"download_options": [BIRTH]}},
        {"download_options": [BIRTH]},
        _breaks,
        _leave_half,
    ),
)
_PLAIN: Final[Change] = {
    "upload_options": None,
    "download_options": None,
    "purge": None,
    "deletion": {},
    "stalled": {},
}
PLAIN: Final = {BIRTH: _PLAIN, OTHER: _PLAIN, CAX: {**_PLAIN, "purge": 1}}
"""The sites if a scene says nothing else."""


# -- the campaign ---------------------------------------------------------------------------------


async def beside_real_cax(ground: Ground, *, source: Path, runs: int, seed: int) -> dict[str, Any]:
    """Take `runs` in all, dealt to the scenes.

    `unreadable` counts the times that cax ended at a document, and those of cax's own files that
    caxev cannot read; `outside` what has changed beside the sites' directories.
    """
    tally = Tally(ground.compared)
    with _played(ground, source, Random(seed)) as play:
        outside = Outside(ground.world, source)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_attend, play.cax)
            for at, scene in enumerate(SCENES):
                began = trio.current_time()
                problems = await _round(play, scene, len(range(at, runs, len(SCENES))))
                tally.add(problems)
                say_round(f"{at + 1}. {scene.kind.name}", problems, trio.current_time() - began)
            nursery.cancel_scope.cancel()
        play.cax.stop()
        _configure(play, {}, await _names(ground))
        last = await trio.to_thread.run_sync(play.cax.once)
        unreadable = [*play.cax.ended, *([last] if last else [])]
        unreadable += unreadable_files(source)
        changed = outside.changed(await _names(ground))
        tally.faults = play.fault.played.total() + play.cax.taken_out
    for what in [*unreadable, *changed]:
        say(what)
    return {**tally.row(), "outside": len(changed), "unreadable": len(unreadable)}


async def _names(ground: Ground) -> list[str]:
    found = await ground.database.runs([*ground.compared])
    return [str(run.name) for run in found.values()]


@contextmanager
def _played(ground: Ground, source: Path, random: Random) -> Iterator[Play]:
    """Give a server by which cax reaches the sites, with what befalls it before tegner's, and cax.

    Neither is left running.
    """
    world = ground.world
    keys, home = world.directory / "sshd", world.directory / "cax"
    keys.mkdir()
    home.mkdir()
    with sshd.running(keys) as server:
        proxy = Proxy(server.port)
        ports = {BIRTH: server.port, OTHER: proxy.port}
        settings = world.settings
        cax = Cax(source, home, CAX, settings.mongo_uri, settings.database, server, ports)
        fault = Fault(world.dir_of(OTHER, "dir_raw"), cax.dies)
        proxy.meddle = partial(fault, proxy)
        try:
            yield Play(ground, cax, fault, random)
        finally:
            cax.stop()
            proxy.close()


async def _attend(cax: Cax) -> None:
    while True:
        await trio.sleep(0.2)
        await trio.to_thread.run_sync(cax.attend)


async def _round(play: Play, scene: Scene, number: int) -> list[Problem]:
    ground, fault, cax = play.ground, play.fault, play.cax
    cax.stop()
    await ground.stop(*ground.listeners.values())
    lead(ground.world, {name: {**PLAIN[name], **scene.sites.get(name, {})} for name in PLAIN})
    await ground.ready(*[ground.listen(site) for site in (BIRTH, OTHER)])
    taken = [await _take(play, scene) for _ in range(number)]
    found = await ground.database.runs([born.id for born in taken])
    _configure(play, scene.cax, [str(run.name) for run in found.values()])
    fault.slow = scene.kind is PULLED
    fault.faults.extend(islice(cycle(WAYS), number) if scene.kind is PUSHED else ())
    failures = cax.failures
    cax.start()
    try:
        problems = await scene.act(play, taken)
    except TimeoutError as error:
        problems = [Problem("lost", str(error))]
    problems += await finished(ground, [(scene.kind, born) for born in taken], play.waits)
    if scene.kind is not PUSHED and cax.failures > failures:
        why = f"cax failed to make {cax.failures - failures} copies: what it read was taken away"
        problems.append(Problem("quorum_broken", why))
    return [*problems, *ground.ended()]


async def _take(play: Play, scene: Scene) -> Born:
    world, number = play.ground.world, next(play.ground.numbers)
    start = utcnow() - timedelta(hours=2)

    def write() -> tuple[dict[str, Any], str]:
        document = world.take_run(BIRTH, number, SIZE, number)
        digest = digest_of(document["data"][0]["location"])
        scene.before(play, document)
        return document, digest

    document, digest = await trio.to_thread.run_sync(write)
    fields = {"tags": [*scene.kind.tags], "start": start, "end": start + timedelta(hours=1)}
    return Born(await play.ground.database.insert_run({**document, **fields}), number, digest)


def _configure(play: Play, options: Change, runs: Sequence[str]) -> None:
    """Write cax's configuration: at its own site with these options, for these runs alone."""
    entries: list[dict[str, Any]] = [
        {
            "name": name,
            "hostname": name,
            "username": getuser(),
            "method": method,
            "dir_raw": str(play.raw(name)),
            "data_type": ["raw"],
            "upload_options": [],
            "download_options": [],
        }
        for name, method in METHODS.items()
    ]
    for entry in entries:
        if entry["name"] == CAX:
            entry |= {"purge": 1, "task_list": [*TASKS], "dataset_list": [*runs], **options}
    play.cax.configure(entries)


KEYS: Final = (
    *("dir_raw", "dir_processed", "dir_minitrees", "dir_tsm", "data_type", "nstreams"),
    *("upload_options", "download_options", "purge"),
)
"""Keys of cax's configuration whose value caxev has as it stands there."""


def unreadable_files(source: Path) -> list[str]:
    """Say which of cax's own configuration and rule files do not load, or mean something else."""
    wrong: list[str] = []
    for file in sorted(source.glob("cax/*.json")):
        try:
            sites = load_sites(file)
        except ConfigError as error:
            wrong.append(str(error))
            continue
        for entry in json.loads(file.read_text()):
            site = sites.get(entry["name"])
            wrong += [
                f"{file}: {site.name}: {key} is {getattr(site, key)!r}, not {entry[key]!r}"
                for key in KEYS
                if key in entry and _plain(getattr(site, key)) != _plain(entry[key])
            ]
    for file in sorted(source.glob("cax/rules/*.json")):
        try:
            load_rules(file)
        except ConfigError as error:
            wrong.append(str(error))
    return wrong


def _plain(value: object) -> object:
    """Return a value of a configuration as it is compared: empty is none."""
    if isinstance(value, str):
        return value.rstrip("/")
    return (list(value) or None) if isinstance(value, list | tuple) else value


# -- what nobody may touch ------------------------------------------------------------------------


@define(eq=False)
class Outside:
    """What stands beside the sites' directories, with a neighbour put there, and cax's source."""

    world: World
    source: Path
    _before: dict[Path, tuple[int, int]] = field(init=False)

    def __attrs_post_init__(self) -> None:
        for site in self.world.sites:
            (self.world.directory / site / NEIGHBOUR).mkdir()
            (self.world.directory / site / NEIGHBOUR / "file").write_text(site)
        self._before = self._stands()

    def changed(self, runs: Collection[str]) -> list[str]:
        """Say what has come, gone or changed; in raw directories, what is no run's."""
        before, now = self._before, self._stands()
        those = [path for path in before.keys() | now.keys() if before.get(path) != now.get(path)]
        for site in self.world.sites:
            those += [
                path
                for path in self.world.dir_of(site, "dir_raw").iterdir()
                if path.name not in runs and not path.name.startswith(".caxev")
            ]
        return [f"outside: {path}" for path in sorted(those)]

    def _stands(self) -> dict[Path, tuple[int, int]]:
        top = self.world.directory
        ours = {top / name for name in ("mongod", "logs", "state", "cax", "sshd", "sites.json")}
        ours |= {self.world.dir_of(site, "dir_raw") for site in self.world.sites}
        return {
            path: (entry.st_size, entry.st_mtime_ns) if path.is_file() else (0, 0)
            for base in (top, self.source)
            for path in base.rglob("*")
            if not ours & {path, *path.parents}
            if (entry := path.lstat())
        }
