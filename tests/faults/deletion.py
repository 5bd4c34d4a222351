"""Deleting where it could be fatal: races for the last copies, and a master that is the bad one.

A round takes two runs, which come to stand at three sites, two of which must remain. Of the first,
two sites are asked for their copies at once, in some rounds with listeners that are killed at a
named point while they delete. Of the second the copy of the master goes bad: its bytes only, or its
bytes and all that the database says of them. In each second round a back-up is made meanwhile, and
restored when all is over: what its ledger owed then must erase nothing now.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any, Final

import trio

from caxev.copies.deletion import intent
from caxev.copies.retention import DeletionPlan, DeletionWish, plan
from caxev.core.clock import utcnow
from caxev.core.model import (
    TRANSFERRED,
    Copy,
    CopyKey,
    Run,
    RunId,
    new_id,
)
from caxev.core.update import RunUpdate
from caxev.files import digest_tree, to_nobody
from tests.faults.campaign import (
    BIRTH,
    UNSETTLED,
    Born,
    End,
    Ground,
    Listener,
    Problem,
    Tally,
    compare,
    corrupt,
    say,
    say_round,
)
from tests.places import vouched

KEEP: Final = 2
SITES: Final = {
    name: {"deletion": {"copies": KEEP}, "master": ["raw"] if name == BIRTH else []}
    for name in (BIRTH, "chicago", "stockholm")
}
SIZE: Final = 300_000
POINTS: Final = (
    None,
    "erase:files.erase.rename:1",
    "erase:files.erase.rename:2",
    "erase:files.erase.done:1",
    "prove:database.update.before:1",
    "recheck:database.manifest.after:1",
    "erase:database.update.after:1",
)
"""Where the listeners of those that are asked are killed, in turn."""


async def deletion(ground: Ground, *, rounds: int, seed: int) -> dict[str, Any]:
    """Play so many rounds; each is a race, and a corrupt master."""
    random = Random(seed)
    tally = Tally(ground.compared)
    await ground.gather()
    points = cycle(POINTS)
    for number in range(rounds):
        began = trio.current_time()
        runs = [await ground.take(SIZE) for _ in range(2)]
        problems = await ground.finish(runs, None)
        first, second = random.sample(list(ground.world.sites), 2)
        point, silently = next(points), bool(number % 2)
        saved = ground.world.directory / f"{number}.bak"
        async with trio.open_nursery() as nursery:
            if number % 2:
                nursery.start_soon(_back_up, ground, saved, random.random())
            kills, broken = await _armed(ground, runs[0], (first, second), point)
        problems += broken
        problems += await _corrupt_master(ground, runs[1], silently=silently)
        if number % 2:
            problems += await _restored(ground, runs, saved)
        await ground.forget(runs)
        tally.add(problems)
        tally.faults += kills + 1
        how = "with its record" if silently else "its bytes"
        what = (
            f"{tally.rounds}. {first} and {second} asked, {point or 'nobody killed'}; master: {how}"
        )
        say_round(what, problems, trio.current_time() - began)
    what = (
        f"{rounds} corrupt masters, {rounds // 2} ledgers restored, {tally.faults - rounds} kills"
    )
    say(f"{rounds} races, {what}")
    return tally.row()


async def _armed(
    ground: Ground, born: Born, asked: Sequence[str], point: str | None
) -> tuple[int, list[Problem]]:
    """Have two sites race, whose listeners kill themselves at `point`: how many did, problems."""
    if point is None:
        return 0, await race(ground, born, asked)
    await ground.stop(*(ground.listeners[site] for site in asked))
    armed = [ground.listen(site, CAXEV_CRASH=point) for site in asked]
    await ground.ready(*armed)
    async with trio.open_nursery() as nursery:
        for listener in armed:
            nursery.start_soon(_again_when_killed, ground, listener)
        problems = await race(ground, born, asked)
        nursery.cancel_scope.cancel()
    await ground.stop(*(one for one in armed if not one.killed))
    for listener in armed:
        if ground.listeners[listener.site] is listener:
            ground.listen(listener.site)
    await ground.ready(*ground.listeners.values())
    return sum(listener.killed for listener in armed), problems


async def _again_when_killed(ground: Ground, listener: Listener) -> None:
    while not listener.killed:
        await trio.sleep(0.05)
    ground.listen(listener.site)


# -- the race -------------------------------------------------------------------------------------


async def race(ground: Ground, born: Born, asked: Sequence[str]) -> list[Problem]:
    """Ask two sites for their copies, both with the run as it was before; what is wrong then."""
    run = await _read(ground, born)
    gone: list[CopyKey] = []

    async def ask(name: str) -> None:
        site = ground.world.sites.get(name)
        copy = run.copy(CopyKey("raw", name))
        assert copy is not None
        plan_ = plan(
            run, DeletionWish(copy, "tests", "a race", KEEP), site, ground.world.sites, utcnow()
        )
        assert isinstance(plan_, DeletionPlan), plan_
        wish = intent(run, plan_, ground.world.sites, utcnow())
        if await ground.database.update_run(wish, utcnow()) is not None:
            gone.append(copy.key)

    async with trio.open_nursery() as nursery:
        for name in asked:
            nursery.start_soon(ask, name)
    problems = []
    if len(gone) != 1:
        problems.append(Problem("quorum_broken", f"{run}: {len(gone)} were let delete"))
    left = {copy.key: TRANSFERRED for copy in run.copies if copy.key not in gone}
    problems += await ground.finish([born], End(left, _tags(run)))
    return [*problems, *_erased(run, await _read(ground, born), gone)]


def _tags(run: Run) -> Any:
    return End.of(run).tags


def _erased(before: Run, after: Run, gone: Sequence[CopyKey]) -> Iterator[Problem]:
    """Say what is left of copies that were deleted, and whether a tombstone tells of each."""
    stones = [row["host"] for row in after.document.get("deleted_data", [])]
    if sorted(stones) != sorted(key.host for key in gone):
        kind = "duplicated" if len(stones) > len(gone) else "lost"
        yield Problem(kind, f"{after}: tombstones of {stones}")  # type: ignore[arg-type]
    for row in after.document.get("deleted_data", []):
        if len(row["proof"]) < KEEP:
            yield Problem("quorum_broken", f"{after}: proven by {row['proof']}")
    for copy in before.copies:
        if copy.key in gone and Path(copy.location or "/").exists():
            yield Problem("lost", f"{after}: the bytes of {copy.key} are still there")
    if sum(copy.type == "raw" and copy.status == TRANSFERRED for copy in after.copies) < KEEP:
        yield Problem("quorum_broken", f"{after}: too few copies are left")


async def _read(ground: Ground, born: Born) -> Run:
    return (await ground.database.runs([born.id]))[born.id]


# -- the restored ledger --------------------------------------------------------------------------


async def _back_up(ground: Ground, file: Path, after: float) -> None:
    await trio.sleep(after)
    await _caxev(ground, "backup", str(file))


async def _restored(ground: Ground, runs: Sequence[Born], saved: Path) -> list[Problem]:
    """Restore a ledger that is older than the runs; what is wrong once all sites went by it."""
    before = await ground.database.runs([born.id for born in runs])
    await ground.stop(*ground.listeners.values())
    await _caxev(ground, "restore", str(saved), "--force")
    began = utcnow()
    await ground.ready(*[ground.listen(site) for site in ground.world.sites])

    async def over() -> bool:
        records = [await ground.database.site_record(site) for site in ground.world.sites]
        seen = [one and one.scanning is None and one.scanned for one in records]
        return all(at and at > began for at in seen) and not await ground.owed(UNSETTLED)

    await ground.until(over, "the sites do not get through the restored ledger")
    await ground.heard()
    after = await ground.database.runs([born.id for born in runs])
    return [problem for born in runs for problem in _differ(ground, born, before, after)]


def _differ(
    ground: Ground, born: Born, before: Mapping[RunId, Run], after: Mapping[RunId, Run]
) -> Iterator[Problem]:
    was, now = before[born.id], after[born.id]
    # What reacts to a state may do so again.
    yield from compare(now, born, End(End.of(was).copies, Counter(now.tags)))
    yield from corrupt(now, born, ground.world.listening)
    if now.document.get("deleted_data") != was.document.get("deleted_data"):
        yield Problem("quorum_broken", f"{now}: something was deleted by the restored ledger")


async def _caxev(ground: Ground, *words: str) -> None:
    command = [sys.executable, "-m", "caxev", *words]
    await trio.run_process(command, env=ground.world.environment, capture_stdout=True)


# -- the corrupt master ---------------------------------------------------------------------------


async def _corrupt_master(ground: Ground, born: Born, *, silently: bool) -> list[Problem]:
    """Harm the master, have somebody look, and wait until it is repaired; what is wrong then.

    `silently`: so that its entry says what its bytes are, and it is the others that contradict it.
    """
    run = await _read(ground, born)
    master = _copy(run, BIRTH)
    await trio.to_thread.run_sync(harm, Path(master.location or ""))
    doubted = master
    if silently:
        await record(ground, run, master)
        doubted = _copy(run, "chicago")
        site = ground.world.sites.get("chicago")
        now = await _read(ground, born)
        there = _copy(now, "chicago")
        may = plan(
            now, DeletionWish(there, "tests", "no", KEEP), site, ground.world.sites, utcnow()
        )
        if isinstance(may, DeletionPlan):
            return [Problem("quorum_broken", f"{run}: a good copy may go beside a bad master")]
    now = await _read(ground, born)
    asked = RunUpdate.ask(now, _copy(now, doubted.host), new_id(), utcnow())
    assert await ground.database.update_run(asked, utcnow()) is not None

    async def repaired() -> bool:
        found = _copy(await _read(ground, born), BIRTH)
        return found.status == TRANSFERRED and found.manifest == born.digest and _was_mended(found)

    try:
        await ground.until(repaired, f"{run}: the master was not repaired")
    except TimeoutError as error:
        return [Problem("lost", str(error))]
    end = End.of(run)
    # Its status came back: what reacts to that has done so again.
    tags = end.tags + type(end.tags)([f"seen-{BIRTH}"])
    problems = await ground.finish([born], End(end.copies, tags))
    after = await _read(ground, born)
    if after.document.get("deleted_data"):
        problems.append(Problem("quorum_broken", f"{run}: a copy was deleted for a bad master"))
    return [
        *problems,
        *await trio.to_thread.run_sync(lambda: list(corrupt(after, born, ground.world.listening))),
    ]


def _was_mended(copy: Copy) -> bool:
    return bool(copy.fields.get("repairs"))


def _copy(run: Run, host: str) -> Copy:
    copy = run.copy(CopyKey("raw", host))
    assert copy is not None
    return copy


def harm(path: Path) -> None:
    """Flip a bit of a copy's largest file, and keep its time."""
    file = max(path.iterdir(), key=lambda one: one.lstat().st_size)
    times = file.stat()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


async def record(ground: Ground, run: Run, copy: Copy) -> None:
    """Have the entry of a copy say what its bytes are now."""

    def read() -> Any:
        return digest_tree(vouched(copy.location or ""), sha512=True, report=to_nobody)

    found = await trio.to_thread.run_sync(read)
    await ground.database.store_manifest(found.digest, found.to_rows())
    said = RunUpdate.note(run, copy, manifest=found.digest, checksum=found.cax_checksum())
    assert await ground.database.update_run(said, utcnow()) is not None
