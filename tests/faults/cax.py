"""cax at one site, caxev at two, on one collection: every copy comes right, and nothing loops.

At stockholm runs a simulator of cax, with all its retries and its purge; lngs and chicago have
caxev. Runs are of three kinds:

- `pulled`: born at chicago, which purges. lngs pulls them, and so does cax, slowly: its source must
  not be purged under it.
- `pushed`: born at stockholm. lngs pulls them; cax pushes them to chicago. There some pushes break
  off, some end with cax itself, and some bring damaged bytes.
- `refused`: born at lngs, which pushes them to stockholm, where something else has the name at
  first. cax takes the failed entries out; when a person has made way, and said so, they come.

lngs pushes to stockholm in every second round only: what cax pulls there nobody else is to bring.
In the end cax goes on for some rounds, and no document may change any more.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any, Final

import trio
from attrs import define, field, frozen

from caxev.core.clock import utcnow
from caxev.core.model import TRANSFERRED, CopyKey, Run
from caxev.database import Request
from caxev.demo.world import World
from tests.faults.campaign import (
    BIRTH,
    Born,
    Ground,
    Problem,
    Tally,
    corrupt,
    digest_of,
    say_round,
)
from tests.faults.cax_simulator import Cax, Dies
from tests.faults.races import lead

CAX: Final = "stockholm"
OTHER: Final = "chicago"
SECOND: Final = 1 / 3600
"""An hour's share."""
SITES: Final[dict[str, dict[str, Any]]] = {
    BIRTH: {"upload_options": None, "download_options": [OTHER, CAX]},
    OTHER: {
        "upload_options": None,
        "download_options": None,
        "purge": 1,
        "deletion": {"copies": 1, "protect": ["keep"]},
        "stalled": {"warn": 5 * SECOND, "retry": 8 * SECOND},
        "data_type": ["raw"],
        "dir_processed": None,
        "processing": None,
        "dir_minitrees": None,
        "minitrees": None,
    },
    CAX: {"upload_options": [OTHER], "download_options": [OTHER, BIRTH]},
}
SIZE: Final = 300_000
PAUSE: Final = 0.2
"""Seconds between two rounds of cax, which are a minute in life."""
SLOW: Final = 0.8
"""Seconds that cax takes for each file that it pulls."""
QUIET: Final = 5
"""Rounds of cax in which nothing may change."""
WAYS: Final = ("damages", "dies", "breaks", "well")
"""What becomes of a push of cax, in turn."""
KEEP: Final = ({"name": "keep"},)
OBSTACLE: Final = "somebody's own"
"""What stands in a file where a copy is refused."""


@frozen
class Kind:
    """Where runs are born, and where they are good in the end."""

    name: str
    birth: str
    ends: tuple[str, ...]
    tags: tuple[Mapping[str, str], ...] = KEEP


PULLED: Final = Kind("pulled", OTHER, (BIRTH, CAX), ())
PUSHED: Final = Kind("pushed", CAX, (BIRTH, OTHER, CAX))
REFUSED: Final = Kind("refused", BIRTH, (BIRTH, CAX))


@define(eq=False)
class Meddler:
    """What happens to what cax copies: slowness, and one fault for each run that it pushes."""

    faults: dict[str, str] = field(factory=dict)
    played: Counter[str] = field(factory=Counter)
    ways: Iterator[str] = field(factory=lambda: cycle(WAYS))

    def __call__(self, name: str, host: str, old: Path, new: Path) -> None:
        if host != OTHER:
            time.sleep(SLOW)
            return
        what = self.faults.get(name, "well")
        if what == "well" or old != max(old.parent.iterdir(), key=lambda one: one.stat().st_size):
            return
        del self.faults[name]
        self.played[what] += 1
        content = old.read_bytes()
        if what == "damages":
            new.write_bytes(bytes([content[0] ^ 1]) + content[1:])
            return
        new.write_bytes(content[: len(content) // 2])
        raise OSError("the way broke") if what == "breaks" else Dies


Taken = Sequence[tuple[Kind, Born]]
"""Runs, each with its kind."""
Passes = Callable[[int], Awaitable[None]]
"""Waits until so many whole rounds of cax have passed."""


async def beside_cax(ground: Ground, *, rounds: int, seed: int, runs: int = 3) -> dict[str, Any]:
    """Take `runs` of each of two kinds a round; `faults` counts what went wrong on purpose."""
    random, tally, meddler = Random(seed), Tally(ground.compared), Meddler()
    cax = _cax(ground.world, meddler)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, cax.run, PAUSE)
        try:
            for number in range(rounds):
                began = trio.current_time()
                kinds = [REFUSED if number % 2 else PULLED, PUSHED] * runs
                random.shuffle(kinds)
                problems = await _round(ground, cax, meddler, kinds)
                tally.add(problems)
                what = f"{tally.rounds}. {', '.join(kind.name for kind in kinds)}"
                say_round(what, problems, trio.current_time() - began)
        finally:
            cax.end()
    tally.faults = meddler.played.total() + sum(cax.taken_out.values())
    return tally.row()


async def _round(
    ground: Ground, cax: Cax, meddler: Meddler, kinds: Sequence[Kind]
) -> list[Problem]:
    pushes = {"upload_options": [CAX] if REFUSED in kinds else None}
    await ground.stop(*ground.listeners.values())
    lead(ground.world, {BIRTH: pushes, OTHER: {}, CAX: {}})
    await ground.ready(*[ground.listen(site) for site in (BIRTH, OTHER)])
    taken = [(kind, await _take(ground, kind, meddler)) for kind in kinds]
    passes = partial(_rounds, ground, cax)
    refused = [born for kind, born in taken if kind is REFUSED]
    problems = await made_way(ground, refused, REFUSED, CAX, passes) if refused else []
    problems += await finished(ground, taken, passes)
    found = await ground.database.runs([born.id for _, born in taken])
    problems += [problem for run in found.values() for problem in _looped(run, cax)]
    problems += ground.ended()
    await ground.forget([born for _, born in taken])
    return problems


def _cax(world: World, meddler: Meddler) -> Cax:
    site = world.sites.get(CAX)
    return Cax(
        world.mongod.uri,
        world.settings.database,
        CAX,
        {name: world.dir_of(name, "dir_raw") for name in world.sites},
        master=BIRTH,
        upload=site.upload_options,
        download=site.download_options,
        purge=1e5,  # all is younger than that: it stays, but the task looks at it
        copies=lambda run, host: run.get("born") == (OTHER if host == CAX else CAX),
        meddle=meddler,
    )


async def _take(ground: Ground, kind: Kind, meddler: Meddler) -> Born:
    world, number = ground.world, next(ground.numbers)

    def write() -> tuple[dict[str, Any], str]:
        document = world.take_run(kind.birth, number, SIZE, number)
        place = Path(document["data"][0]["location"])
        if kind is REFUSED:
            (world.dir_of(CAX, "dir_raw") / place.name).write_text(OBSTACLE)
        return document, digest_of(str(place))

    document, digest = await trio.to_thread.run_sync(write)
    if kind is PUSHED:
        meddler.faults[document["name"]] = next(meddler.ways)
    fields = {"tags": [*kind.tags], "born": kind.birth}
    return Born(await ground.database.insert_run({**document, **fields}), number, digest)


# -- what is refused ------------------------------------------------------------------------------


async def made_way(
    ground: Ground, refused: Sequence[Born], kind: Kind, there: str, passes: Passes
) -> list[Problem]:
    """Wait until cax has taken out what was refused `there`; then make way, and ask again."""
    ids, key = [born.id for born in refused], CopyKey("raw", there)

    async def all_taken_out() -> bool:
        found = await ground.database.runs(ids)
        return all([*run.given_up(key)] and run.copy(key) is None for run in found.values())

    await ground.until(all_taken_out, "cax has taken out no failed entry")
    await passes(QUIET)
    found = await ground.database.runs(ids)
    problems = [
        Problem("duplicated", f"{run}: pushed {tries} times to where it was refused")
        for run in found.values()
        if (tries := len([*run.given_up(key)])) != 1
    ]
    for run in found.values():
        (copy,) = (one for one in run.copies if one.host == kind.birth)
        obstacle = ground.world.dir_of(there, "dir_raw") / Path(copy.location or "").name
        if obstacle.read_text() != OBSTACLE:
            problems.append(Problem("lost", f"{run}: {obstacle} is not what it was"))
        obstacle.unlink()
    request = Request("retry", tuple(found), "push")
    await ground.database.add_request(kind.birth, request, "tests", utcnow())
    return problems


async def _rounds(ground: Ground, cax: Cax, number: int) -> None:
    """Wait for so many whole rounds of cax."""
    end = cax.rounds + number + 1

    async def over() -> bool:
        return cax.rounds >= end

    await ground.until(over, "cax has ended")


# -- the end --------------------------------------------------------------------------------------


async def finished(ground: Ground, taken: Taken, passes: Passes) -> list[Problem]:
    """Wait until all copies are good and nothing changes any more; what is wrong then."""
    ids = [born.id for _, born in taken]

    async def all_ended() -> bool:
        found = await ground.database.runs(ids)
        return not any(next(_wrong(found[born.id], kind), None) for kind, born in taken)

    async def quiet() -> bool:
        before = await ground.database.runs(ids)
        await passes(QUIET)
        await ground.heard()
        after = await ground.database.runs(ids)
        return all(before[one].document == after[one].document for one in ids)

    problems: list[Problem] = []
    try:
        await ground.until(all_ended, "not all copies are good")
        await ground.until(quiet, "documents go on changing", within=QUIET * 10)
    except TimeoutError as error:
        problems.append(Problem("lost", str(error)))
    found = await ground.database.runs(ids)
    for kind, born in taken:
        run = found[born.id]
        ground.compared.setdefault(run.id, set()).update(copy.key for copy in run.copies)
        problems += _wrong(run, kind)
        problems += await trio.to_thread.run_sync(_corrupt, run, born, [*ground.world.sites])
    # What is open waits for its time: it has changed nothing meanwhile.
    return [*problems, *await ground.owed(("running", "failed")), *ground.partials()]


def _corrupt(run: Run, born: Born, sites: Sequence[str]) -> list[Problem]:
    return [*corrupt(run, born, sites)]


def _wrong(run: Run, kind: Kind) -> Iterator[Problem]:
    """Say how a run's entries differ from the end of its kind. Pure."""
    entries = Counter((one.host, one.status) for one in run.copies)
    for host in kind.ends:
        if not entries[host, TRANSFERRED]:
            yield Problem("lost", f"{run} ({kind.name}): raw at {host}: {run.document['data']}")
    for (host, status), number in entries.items():
        if number > 1 or host not in kind.ends or status != TRANSFERRED:
            yield Problem("duplicated", f"{run} ({kind.name}): {number} at {host} are {status}")


def _looped(run: Run, cax: Cax) -> Iterator[Problem]:
    """Say what was tried again and again, or failed because its source was taken away."""
    if (times := cax.taken_out[run.id, CAX]) > 1:
        yield Problem("duplicated", f"{run}: cax took {times} failed entries out at {CAX}")
    if cax.failed[run.id, CAX]:
        yield Problem("quorum_broken", f"{run}: what cax was reading was taken away")
