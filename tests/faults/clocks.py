"""Listeners whose clocks are wrong: behind, ahead, and set forth and back while they work.

A round gives each site a clock of its own and takes runs, of which each site is to get a copy: they
come to the end, and in about the time, that they come to where all clocks are right, and each site
that is wrong has its alarm. Then two sites are asked for their copies of one run at once; and of
another a copy rots which, by an asker whose clock is ahead, was read a month from now: what is
deleted leaves enough behind. Raw data at the first site has an age at which it will go in some
days, which no clock brings about early.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Final

import trio
from attrs import frozen

from caxev.copies.deletion import intent, plan
from caxev.core.clock import utcnow
from caxev.core.job import Skip
from caxev.core.model import TRANSFERRED, Copy, CopyKey, Run, RunUpdate, new_id
from caxev.demo.world import FIRST_START
from tests.faults.campaign import (
    BIRTH,
    Born,
    End,
    Ground,
    Problem,
    Tally,
    corrupt,
    say_round,
)
from tests.faults.deletion import KEEP, harm, race
from tests.faults.deletion import SITES as DELETING

AGE: Final = (datetime.now(UTC) - FIRST_START).days + 20
"""Days after its start when raw data goes at the first site: in 20 days from now."""
SITES: Final[dict[str, dict[str, Any]]] = {**DELETING, BIRTH: {**DELETING[BIRTH], "purge": AGE}}
STEPS: Final = "steps"
SKEWS: Final = ("-1h", "+40d", "-20s", STEPS, "+20s")
"""What libfaketime adds to the clock of a site; `STEPS` goes from one to the other and back."""
BETWEEN: Final = ("-1h", "+40d")
STEP_EVERY: Final = 0.7
AHEAD: Final = timedelta(days=40)
VICTIM: Final = "chicago"
"""Where a copy rots, and is repaired."""
RIGHT: Final[Mapping[str, str]] = {}
SIZE: Final = 100_000
SLOWER: Final = 1.5
"""So much longer than with right clocks a round may take..."""
SLACK: Final = 3.0
"""...and so many seconds, as no two rounds take the same."""


def library() -> Path | None:
    """Return libfaketime, if Debian's `faketime` is installed."""
    return next(iter(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)


@frozen
class Wrong:
    """The environment of processes whose clock is wrong; what steps reads a file."""

    library: Path
    steps: Path

    def environment(self, skew: str) -> dict[str, str]:
        """Return what gives a process that clock; times of files and of waiting stay right."""
        usual = {
            "LD_PRELOAD": str(self.library),
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }
        if skew != STEPS:
            return {**usual, "FAKETIME": skew}
        return {**usual, "FAKETIME_TIMESTAMP_FILE": str(self.steps), "FAKETIME_NO_CACHE": "1"}

    async def step(self) -> None:
        """Set the clock of what steps, forth and back, for ever."""
        while True:
            for skew in BETWEEN:
                new = self.steps.with_suffix(".new")
                new.write_text(skew)
                new.rename(self.steps)
                await trio.sleep(STEP_EVERY)


async def clocks(ground: Ground, *, rounds: int, seed: int, runs: int = 8) -> dict[str, Any]:
    """Play so many rounds, each by right clocks first, to compare the time with."""
    found = library()
    assert found is not None, "install Debian's package faketime"
    wrong, random = Wrong(found, ground.world.directory / "clock"), Random(seed)
    wrong.steps.write_text(BETWEEN[0])
    tally, late, slowest, alarms = Tally(ground.compared), 0, 0.0, 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wrong.step)
        for skews in islice(_turns([*ground.world.sites]), rounds):
            began = trio.current_time()
            await _listen(ground, dict.fromkeys(skews, RIGHT))
            usual, before = await _flow(ground, tally, runs)
            await ground.forget(before)
            await _listen(ground, {site: wrong.environment(one) for site, one in skews.items()})
            problems = [*await _alarmed(ground, list(skews))]
            alarms += len(skews) - len(problems)
            seconds, taken = await _flow(ground, tally, runs, problems)
            late += seconds > SLOWER * usual + SLACK
            slowest = max(slowest, seconds / usual)
            first, second = random.sample(list(ground.world.sites), 2)
            problems = await race(ground, taken[0], (first, second))
            doomed = random.choice([site for site in ground.world.sites if site != VICTIM])
            problems += await _rotten(ground, taken[1], doomed)
            problems += await _left(ground, taken[2:])
            await ground.forget(taken)
            tally.add([*problems, *ground.ended()])
            tally.faults += len(skews)
            what = f"{', '.join(f'{site} {one}' for site, one in skews.items())}"
            what += f": {seconds:.1f} s, by right clocks {usual:.1f} s"
            say_round(f"{tally.rounds}. {what}", problems, trio.current_time() - began)
        nursery.cancel_scope.cancel()
    return {**tally.row(), "slowest": round(slowest, 2), "alarms": alarms, "late": late}


def _turns(sites: Sequence[str]) -> Iterator[dict[str, str]]:
    """Give each site another clock in each round, for ever."""
    at = 0
    while True:
        yield {site: SKEWS[(at + place) % len(SKEWS)] for place, site in enumerate(sites)}
        at += 1


async def _listen(ground: Ground, environments: Mapping[str, Mapping[str, str]]) -> None:
    """Have listeners with these environments in place of those that there are."""
    await ground.stop(*ground.listeners.values())
    await ground.ready(*[ground.listen(site, **one) for site, one in environments.items()])


async def _flow(
    ground: Ground, tally: Tally, runs: int, problems: Sequence[Problem] = ()
) -> tuple[float, list[Born]]:
    """Take runs and wait until each site has its copies: in how many seconds, and the runs."""
    began = trio.current_time()
    taken = [await ground.take(SIZE) for _ in range(runs)]
    found = await ground.finish(taken, _whole(ground))
    seconds = trio.current_time() - began
    tally.add([*problems, *found])
    say_round(f"    {runs} runs", found, seconds)
    return seconds, taken


def _whole(ground: Ground) -> End:
    """Return the end at which nothing has come to its age yet."""
    end = ground.wanted
    return End({**end.copies, CopyKey("raw", BIRTH): TRANSFERRED}, end.tags)


async def _alarmed(ground: Ground, sites: Sequence[str]) -> list[Problem]:
    """Wait until each site has its alarm; those that have none."""
    missing = set(sites)

    async def alarmed() -> bool:
        for one in await ground.database.alarms():
            if one.stands and one.alarm.key == "clock":
                missing.discard(one.alarm.site)
        return not missing

    try:
        await ground.until(alarmed, "no alarm", within=30.0)
    except TimeoutError:
        return [Problem("lost", f"{site}: no alarm that its clock is wrong") for site in missing]
    return []


async def _rotten(ground: Ground, born: Born, doomed: str) -> list[Problem]:
    """Have a copy read for somebody whose clock is ahead; then it rots, and another is to go."""
    await _changed(ground, born, lambda run, copy: RunUpdate.ask(run, copy, new_id(), _ahead()))

    async def was_read() -> bool:
        there = _copy(await _read(ground, born), VICTIM)
        return bool(there.asked) and not there.pending

    await ground.until(was_read, f"{born}: the copy at {VICTIM} was not read")
    # So an older version wrote it down.
    await _changed(ground, born, lambda run, copy: RunUpdate.note(run, copy, verified_at=_ahead()))
    run = await _read(ground, born)
    copy = _copy(run, doomed)
    await trio.to_thread.run_sync(harm, Path(_copy(run, VICTIM).location or ""))
    sites = ground.world.sites
    wish = plan(run, copy, sites.get(doomed), sites, now=utcnow(), by="tests", why="rot", keep=KEEP)
    if isinstance(wish, Skip):
        return [Problem("lost", f"{run}: {wish.why}")]
    if await ground.database.update_run(intent(run, wish, sites, utcnow()), utcnow()) is None:
        return [Problem("lost", f"{run}: the intent did not fit")]

    async def is_over() -> bool:
        now = await _read(ground, born)
        is_mended = _copy(now, VICTIM).fields.get("repairs")
        return bool(is_mended) and all(one.status == TRANSFERRED for one in now.copies)

    await ground.until(is_over, f"{run}: the rot at {VICTIM} was not found")
    return await _left(ground, [born])


async def _left(ground: Ground, runs: Sequence[Born]) -> list[Problem]:
    """Say which runs have too few good copies left; every copy on the disks is read."""
    problems: list[Problem] = []
    for born in runs:
        run = await _read(ground, born)
        good = [one for one in run.copies if one.type == "raw" and one.status == TRANSFERRED]
        if len(good) < KEEP:
            problems.append(Problem("quorum_broken", f"{run}: {len(good)} good copies are left"))
        problems += await trio.to_thread.run_sync(_corrupt, run, born, ground)
    return problems


def _corrupt(run: Run, born: Born, ground: Ground) -> list[Problem]:
    return list(corrupt(run, born, ground.world.listening))


async def _read(ground: Ground, born: Born) -> Run:
    return (await ground.database.runs([born.id]))[born.id]


def _copy(run: Run, host: str) -> Copy:
    copy = run.copy(CopyKey("raw", host))
    assert copy is not None
    return copy


async def _changed(ground: Ground, born: Born, change: Callable[[Run, Copy], RunUpdate]) -> None:
    run = await _read(ground, born)
    update = change(run, _copy(run, VICTIM))
    assert await ground.database.update_run(update, utcnow()) is not None


def _ahead() -> datetime:
    return utcnow() + AHEAD
