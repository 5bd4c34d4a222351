"""Two listeners for one site: one acts, and when it is killed the other takes over in time.

What the one was doing when it was killed the other brings to its end.
"""

from __future__ import annotations

import signal
from random import Random
from typing import Any, Final

import trio

from tests.faults.campaign import Ground, Listener, Tally, say_round

SITE: Final = "chicago"
SIZE: Final = 300_000


async def pair(ground: Ground, site: str = SITE) -> tuple[Listener, Listener]:
    """Start two listeners: one that acts, and one that stands by."""
    leader = ground.listen(site)
    await ground.ready(leader)
    return leader, await standby(ground, site)


async def standby(ground: Ground, site: str = SITE) -> Listener:
    """Start a listener for a site that has one, and wait until it stands by."""
    listener = ground.listen(site)

    async def stands_by() -> bool:
        return listener.said("standing by")

    await ground.until(stands_by, "the second listener does not stand by")
    return listener


async def epoch_of(ground: Ground, site: str = SITE) -> int:
    """Return the site's epoch."""
    record = await ground.database.site_record(site)
    return 0 if record is None else record.epoch


async def new_epoch(ground: Ground, former: int, site: str = SITE) -> float:
    """Wait for another epoch than the former; how many seconds that took."""
    began = trio.current_time()

    async def changed() -> bool:
        return await epoch_of(ground, site) != former

    await ground.until(changed, f"nobody took {site} over")
    return trio.current_time() - began


async def takeover(ground: Ground, *, rounds: int, seed: int) -> dict[str, Any]:
    """Kill the leader while it copies, and measure how long the site was without one."""
    random, tally = Random(seed), Tally(ground.compared)
    await ground.ready(*[ground.listen(site) for site in ground.world.listening if site != SITE])
    leader, heir = await pair(ground)
    took: list[float] = []
    for _ in range(rounds):
        began = trio.current_time()
        epoch = await epoch_of(ground)
        born = await ground.take(SIZE)
        await trio.sleep(random.uniform(0, 1))
        leader.signal(signal.SIGKILL)
        took.append(await new_epoch(ground, epoch))
        await ground.ready(heir)
        problems = [*await ground.finish([born], None), *ground.ended()]
        await ground.forget([born])
        tally.add(problems)
        tally.faults += 1
        told = f"{tally.rounds}. taken over after {took[-1]:.2f} s"
        say_round(told, problems, trio.current_time() - began)
        leader, heir = heir, await standby(ground)
    late = sum(seconds > ground.lease_time for seconds in took)
    longest = round(max(took, default=0.0), 2)
    return {**tally.row(), "lease_s": ground.lease_time, "longest_s": longest, "late": late}
