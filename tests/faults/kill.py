"""kill -9 of a listener while it moves a large run: the moment is a share of the bytes moved."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import trio

from caxev.core.model import TRANSFERRED, CopyKey
from tests.faults.campaign import (
    BIRTH,
    Born,
    Ground,
    Listener,
    Problem,
    Tally,
    digest_of,
    say,
    say_round,
)
from tests.places import partial_of

MOVERS = {"chicago": "chicago", "stockholm": BIRTH}
"""For each site that gets a copy: who moves it there, by pulling or by pushing."""


async def kill(ground: Ground, *, rounds: int, size: int, seed: int) -> dict[str, Any]:
    """Kill the puller and the pusher in turn, each time during the transfer of a new run."""
    random = Random(seed)
    tally = Tally(ground.compared)
    await ground.gather()
    for number in range(rounds):
        began = trio.current_time()
        to = list(MOVERS)[number % len(MOVERS)]
        share = random.random()
        # Taking a large run is slow: have it there before anybody may act on it.
        born = await ground.take(size)
        killed, problems = await _during(ground, born, to, share * size)
        problems += await ground.finish([born], None)
        await ground.forget([born])
        tally.add(problems)
        tally.faults += killed
        missed = "" if killed else " (was through already)"
        what = f"{tally.rounds}. {MOVERS[to]} at {share:.0%} of the copy to {to}{missed}"
        say_round(what, problems, trio.current_time() - began)
    say(f"{tally.faults} kills during {rounds} transfers of {size / 1e6:.0f} MB")
    return tally.row()


async def _during(
    ground: Ground, born: Born, to: str, threshold: float
) -> tuple[bool, list[Problem]]:
    """Kill once so many bytes have come to `to`; whether that was in time, and what is wrong."""
    mover = ground.listeners[MOVERS[to]]
    final = await _location(ground, born, to)
    partial = partial_of(final)
    while not final.exists():
        if _bytes_in(partial) >= threshold:
            _kill(ground, mover)
            problems = await trio.to_thread.run_sync(lambda: list(_under_final(final, born)))
            ground.listen(mover.site)
            return True, problems
        await trio.sleep(0.005)
    return False, []


def _kill(ground: Ground, mover: Listener) -> None:
    del ground
    mover.signal(signal.SIGKILL)
    mover.process.wait()


async def _location(ground: Ground, born: Born, to: str) -> Path:
    """Return where the copy will stand, once it has been claimed."""
    found: list[str] = []

    async def claimed() -> bool:
        one = (await ground.database.runs([born.id]))[born.id]
        copy = one.copy(CopyKey("raw", to))
        if copy is not None and copy.location:
            found.append(copy.location)
        return bool(found)

    await ground.until(claimed, f"nobody claimed the copy to {to}")
    return Path(found[0])


def _under_final(final: Path, born: Born) -> Iterator[Problem]:
    """Whatever stands under the final name when a process is killed must be whole."""
    if final.exists() and digest_of(str(final)) != born.digest:
        yield Problem("corrupt_accepted", f"a partial under the final name, {TRANSFERRED} or not")


def _bytes_in(path: Path) -> int:
    """What has been written: a file may be longer than that before it is whole."""
    try:
        with os.scandir(path) as entries:
            return sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in entries)
    except FileNotFoundError:
        return 0
