"""Listeners whose clocks are wrong: behind, ahead, and set forth and back while they work.

A round gives each site a clock of its own and takes runs, of which each site is to get a copy: they
come to the end that they come to if all clocks are right, and each site whose clock is wrong has
its alarm, until that is right. Then two sites are asked for their copies of one run at once; and of
another a copy rots which, by an asker whose clock is ahead, was read a month from now: what is
deleted leaves enough behind. Raw data at the first site has an age at which it will go in some
days, which no clock brings about early.

The time with wrong clocks is compared with that with right ones just before and after. For that the
clocks of the same processes are set right and wrong in turn, so that the two differ by nothing
else: neither by what libfaketime costs, nor by what a new process does once, nor by other work of
the machine.
"""

from __future__ import annotations

from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, Final

import trio
from attrs import frozen

from caxev.copies.deletion import intent
from caxev.copies.retention import DeletionPlan, DeletionWish, plan
from caxev.core.clock import utcnow
from caxev.core.model import (
    TRANSFERRED,
    Copy,
    CopyKey,
    Run,
    new_id,
)
from caxev.core.update import RunUpdate
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
RIGHT: Final = "+0"
STEPS: Final = "steps"
SKEWS: Final = ("-1h", "+40d", "-20s", STEPS, "+20s")
"""What libfaketime adds to the clock of a site; `STEPS` goes from one to the other and back."""
BETWEEN: Final = ("-1h", "+40d")
STEP_EVERY: Final = 0.7
AHEAD: Final = timedelta(days=40)
VICTIM: Final = "chicago"
"""Where a copy rots, and is repaired."""
SIZE: Final = 100_000
SLOWER: Final = 1.5
"""So much longer than with right clocks the runs of a round may take."""
SLEEP: Final = """
import select, time

def sleep(seconds):
    select.select([], [], [], seconds)

time.sleep = sleep
"""
"""Python's `time.sleep`, but not by `clock_nanosleep`.

It gives that an instant of the monotonic clock, which libfaketime 0.9.10 takes for one of the wall
clock, whatever FAKETIME_DONT_FAKE_MONOTONIC is: `time.sleep` raises OSError.
"""


def library() -> Path | None:
    """Return libfaketime, if Debian's `faketime` is installed."""
    return next(iter(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)


@frozen
class WallClocks:
    """The wall clocks of sites, which can be set while their processes run: a file for each."""

    library: Path
    directory: Path

    def __attrs_post_init__(self) -> None:
        self.directory.mkdir()
        (self.directory / "sitecustomize.py").write_text(SLEEP)

    def environment(self, site: str) -> dict[str, str]:
        """Return what has a process go by the site's clock; times of files and waits stay right.

        FAKETIME_FORCE_MONOTONIC_FIX=0 leaves waits of threads to the kernel. Debian's libfaketime
        else wakes up again and again while one waits, and a listener takes 3 to 8 times the CPU.
        """
        return {
            "LD_PRELOAD": str(self.library),
            "PYTHONPATH": str(self.directory),
            "FAKETIME_TIMESTAMP_FILE": str(self.directory / site),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",
            "NO_FAKE_STAT": "1",
        }

    def set(self, site: str, skew: str) -> None:
        """Set a site's clock."""
        new = self.directory / f"{site}.new"
        new.write_text(skew)
        new.rename(self.directory / site)

    @asynccontextmanager
    async def off(self, skews: Mapping[str, str]) -> AsyncIterator[None]:
        """Have the clocks of sites wrong for the length of a block, and right afterwards."""
        async with trio.open_nursery() as nursery:
            for site, skew in skews.items():
                if skew == STEPS:
                    nursery.start_soon(self._step, site)
                else:
                    self.set(site, skew)
            try:
                yield
            finally:
                nursery.cancel_scope.cancel()
                for site in skews:
                    self.set(site, RIGHT)

    async def _step(self, site: str) -> None:
        for skew in cycle(BETWEEN):
            self.set(site, skew)
            await trio.sleep(STEP_EVERY)


async def clocks(
    ground: Ground, *, rounds: int, seed: int, runs: int = 8, flows: int = 3
) -> dict[str, Any]:
    """Play so many rounds; in each, runs are taken so many times with right and wrong clocks."""
    found = library()
    assert found is not None, "install Debian's package faketime"
    wall, random = WallClocks(found, ground.world.directory / "clocks"), Random(seed)
    tally, slower, alarms = Tally(ground.compared), list[float](), 0
    for skews in islice(_turns([*ground.world.sites]), rounds):
        began, taken = trio.current_time(), list[Born]()
        flow, wrong = partial(_flow, ground, tally, runs, taken), partial(wall.off, skews)
        async with wrong():
            await ground.stop(*ground.listeners.values())
            await ground.ready(*[ground.listen(one, **wall.environment(one)) for one in skews])
            silent = await _unless(ground, skews, alarmed=True)
            await flow()  # a new process does some things once
        slower.append(await _slower(flow, wrong, flows))
        async with wrong():
            first, second = random.sample(list(ground.world.sites), 2)
            problems = await race(ground, taken[0], (first, second))
            doomed = random.choice([site for site in ground.world.sites if site != VICTIM])
            problems += await _rotten(ground, taken[1], doomed)
            problems += await _left(ground, taken[2:])
        problems += [*silent, *await _unless(ground, skews, alarmed=False), *ground.ended()]
        await ground.forget(taken)
        tally.add(problems)
        tally.faults += len(skews)
        alarms += len(skews) - len(silent)
        what = ", ".join(f"{site} {skew}" for site, skew in skews.items())
        what = f"{len(slower)}. {what}: {slower[-1]:.2f} times as long"
        say_round(what, problems, trio.current_time() - began)
    return {
        **tally.row(),
        "rounds": rounds,
        "usual": round(median(slower), 2),
        "slowest": round(max(slower), 2),
        "alarms": alarms,
        "late": sum(one > SLOWER for one in slower),
    }


def _turns(sites: Sequence[str]) -> Iterator[dict[str, str]]:
    """Give each site another clock in each round, for ever."""
    at = 0
    while True:
        yield {site: SKEWS[(at + place) % len(SKEWS)] for place, site in enumerate(sites)}
        at += 1


async def _slower(
    flow: Callable[[], Awaitable[float]],
    wrong: Callable[[], AbstractAsyncContextManager[None]],
    flows: int,
) -> float:
    """Return how many times as long runs take with wrong clocks, in the median."""
    right, ratios = await flow(), list[float]()
    for _ in range(flows):
        async with wrong():
            seconds = await flow()
        before, right = right, await flow()
        ratios.append(2 * seconds / (before + right))
    return median(ratios)


async def _flow(ground: Ground, tally: Tally, runs: int, taken: list[Born]) -> float:
    """Take runs and wait until each site has its copies: in how many seconds."""
    began = trio.current_time()
    new = [await ground.take(SIZE) for _ in range(runs)]
    problems = await ground.finish(new, _whole(ground))
    seconds = trio.current_time() - began
    taken += new
    tally.add(problems)
    say_round(f"    {runs} runs", problems, seconds)
    return seconds


def _whole(ground: Ground) -> End:
    """Return the end at which nothing has come to its age yet."""
    end = ground.wanted
    return End({**end.copies, CopyKey("raw", BIRTH): TRANSFERRED}, end.tags)


async def _unless(ground: Ground, sites: Iterable[str], *, alarmed: bool) -> list[Problem]:
    """Wait until each site has the alarm of its clock, or none has; those that differ."""
    wanted, found = {*sites} if alarmed else set[str](), set[str]()

    async def as_wanted() -> bool:
        alarms = await ground.database.alarms()
        found.clear()
        found.update(one.alarm.site for one in alarms if one.active and one.alarm.key == "clock")
        return found == wanted

    with suppress(TimeoutError):
        await ground.until(as_wanted, "no change", within=30.0)
    what = "no alarm that its clock is wrong" if alarmed else "an alarm, and its clock is right"
    return [Problem("lost", f"{site}: {what}") for site in sorted(found ^ wanted)]


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
    wish = plan(run, DeletionWish(copy, "tests", "rot", KEEP), sites.get(doomed), sites, utcnow())
    if not isinstance(wish, DeletionPlan):
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
