"""Two listeners for one site: one acts, and when it is killed the other takes over in time."""

from __future__ import annotations

import signal
from typing import Any

import trio

from tests.faults.campaign import Ground, Listener, say

SITE = "chicago"


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


async def takeover(ground: Ground, *, rounds: int) -> dict[str, Any]:
    """Kill the leader again and again, and measure how long the site was without one."""
    leader, heir = await pair(ground)
    took: list[float] = []
    for number in range(rounds):
        epoch = await epoch_of(ground)
        leader.signal(signal.SIGKILL)
        took.append(await new_epoch(ground, epoch))
        say(f"{number + 1}. taken over after {took[-1]:.2f} s")
        await ground.ready(heir)
        leader, heir = heir, await standby(ground)
    late = sum(seconds > ground.lease for seconds in took)
    longest = round(max(took, default=0.0), 2)
    return {"rounds": rounds, "lease_s": ground.lease, "longest_s": longest, "late": late}
