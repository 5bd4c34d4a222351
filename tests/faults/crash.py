"""kill -9 at every named point between two durable writes, and at random moments.

The points are read from the log of an undisturbed pass, so handlers that are written later are
covered as they are. A point that is passed often is tried at its first passing and at a middle one.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, Final

import trio
from attrs import frozen

from caxev.config import DEFAULT_HANDLERS
from caxev.config.handlers import BY_METHOD
from caxev.core.clock import utcnow
from caxev.core.registry import recorded
from caxev.database import Request
from tests.faults.campaign import Born, End, Ground, Listener, Problem, Tally, say, say_round
from tests.faults.scenes import Act

SMALL: Final = 300_000
"""Bytes in a run for the kills at points."""
LARGER: Final = 8_000_000
"""Bytes in a run for the kills at random moments."""
RUNS: Final = 2
THROUGH: Final = "through"
"""The point that a handler passes when it has run, before that is noted."""
Place = tuple[str, str]
"""A point at a site."""


@frozen
class Fault:
    """SIGKILL of a site's listener when it (or a worker of it) passes `point` the `nth` time."""

    site: str
    point: str
    nth: int

    def __str__(self) -> str:
        return f"{self.site} {self.point}:{self.nth}"

    @property
    def place(self) -> Place:
        """The site and the point."""
        return self.site, self.point


def faults_in(site: str, log: str) -> Iterator[Fault]:
    """Return the faults to try, from a log of lines ``pid point``. Pure.

    Passings are counted in each process for itself, as `caxev.failpoints` does.
    """
    most: Counter[str] = Counter()
    for (_, point), times in Counter(map(_pair, log.splitlines())).items():
        most[point] = max(most[point], times)
    for point, times in sorted(most.items()):
        yield Fault(site, point, 1)
        if times > 1:
            yield Fault(site, point, times // 2 + 1)


def _pair(line: str) -> tuple[str, str]:
    pid, _, point = line.partition(" ")
    return pid, point


async def crash(
    ground: Ground,
    *,
    rounds: int,
    seed: int,
    points: int | None = None,
    only: str = "",
    together: bool = False,
    act: Act | None = None,
    met: set[Place] | None = None,
    runs: int = RUNS,
) -> dict[str, Any]:
    """Kill at each point (or at `points` of them, chosen by `seed`), then at random moments.

    That is in `rounds` further passes, in each of them once at every site. `act` is done in each
    pass to the runs that have come to their end: see `tests.faults.scenes`.

    `only`: at points in whose name this stands. With `together`, a round has a fault at every site.
    `met`: what was tried before, elsewhere, and is not again; what is known here is added to it.
    `runs` are taken in each pass.

    The figures say besides how many points were armed, how many of them killed, which did not,
    and which of the shipped handlers did nothing in any undisturbed pass so far.
    """
    random = Random(seed)
    tally = Tally(ground.compared)
    known, end, seconds = await reference(ground, act, number=runs)
    met = set() if met is None else met
    faults = [one for one in known if only in one.point and one.place not in met]
    met |= {one.place for one in known}
    if points is not None:
        faults = chosen(faults, points, random)
    unreached: list[Fault] = []

    async def tried(wave: Sequence[Fault]) -> None:
        began = trio.current_time()
        reached, problems = await at_points(ground, wave, end, act, number=runs)
        tally.add(problems)
        tally.faults += len(reached)
        unreached.extend(one for one in wave if one not in reached)
        told = ", ".join(f"{one}{'' if one in reached else ' (not reached)'}" for one in wave)
        say_round(f"{tally.rounds}. {told}", problems, trio.current_time() - began)

    for wave in waves(faults, together=together):
        await tried(wave)
    missing, unreached = unreached, []
    for fault in missing:  # what happens elsewhere may have kept it from that: once more, alone
        await tried([fault])
    for _ in range(rounds):
        began = trio.current_time()
        what, problems = await at_random(ground, random, end, seconds, act, number=runs)
        tally.add(problems)
        tally.faults += len(ground.everyone)
        say_round(f"{tally.rounds}. {what}", problems, trio.current_time() - began)
    say(f"{len(faults)} points, {len(unreached)} not reached; {rounds} passes with random moments")
    ours = {*DEFAULT_HANDLERS, *BY_METHOD}
    shipped = [handler.name for handler in recorded if handler.module in ours]
    return {
        **tally.row(),
        "points": len(faults),
        "reached": len(faults) - len(unreached),
        "unreached": [str(fault) for fault in unreached],
        "handlers_missed": missed(met, shipped),
    }


def missed(places: Iterable[Place], names: Iterable[str]) -> list[str]:
    """Return the handlers that did nothing at any site. Pure."""
    ran = {point for _, point in places}
    return sorted(name for name in names if f"{name}:{THROUGH}" not in ran)


async def _finished(
    ground: Ground, runs: Sequence[Born], end: End | None, act: Act | None
) -> list[Problem]:
    if act is None:
        return await ground.finish(runs, end)
    problems = await ground.finish(runs, None)
    return [*problems, *await ground.finish(runs, await act(ground, runs))]


async def reference(
    ground: Ground, act: Act | None, *, number: int
) -> tuple[list[Fault], End, float]:
    """Play undisturbed: the faults to try, the end to expect, and how many seconds it took."""
    logs = {site: ground.world.directory / f"{site}.points" for site in ground.everyone}
    started = [ground.listen(site, CAXEV_CRASH_LOG=str(log)) for site, log in logs.items()]
    await ground.ready(*started)
    began = trio.current_time()
    runs = await take(ground, number, SMALL, started)
    problems = await _finished(ground, runs, None, act)
    seconds = trio.current_time() - began
    if problems:
        raise RuntimeError(f"undisturbed, it comes to no good end: {problems}")
    faults = [fault for site, log in logs.items() for fault in faults_in(site, _read(log))]
    say(f"undisturbed: {seconds:.1f} s, {len(faults)} points")
    end = End.of((await ground.database.runs([runs[0].id]))[runs[0].id])
    await ground.forget(runs, anew=True)
    return faults, end, seconds


def _read(log: Path) -> str:
    return log.read_text() if log.exists() else ""  # a helper may have found nothing to do


def chosen(faults: Sequence[Fault], points: int, random: Random) -> list[Fault]:
    """Choose `points` faults, as many at each site as at any other. Pure."""
    mixed = random.sample(faults, len(faults))
    return [fault for wave in waves(mixed, together=True) for fault in wave][:points]


def waves(faults: Sequence[Fault], *, together: bool) -> Iterator[list[Fault]]:
    """Return the faults round by round: one, or (`together`) at most one at each site. Pure."""
    rest = list(faults)
    while rest:
        sites = dict.fromkeys(fault.site for fault in (rest if together else rest[:1]))
        wave = [next(fault for fault in rest if fault.site == site) for site in sites]
        rest = [fault for fault in rest if fault not in wave]
        yield wave


async def take(ground: Ground, number: int, size: int, listeners: Sequence[Listener]) -> list[Born]:
    """Take so many runs, and ask the sites of these listeners for what people ask for."""
    runs = [await ground.take(size) for _ in range(number)]
    for listener in (one for one in listeners if not one.helps):
        for request in (Request("scan"), Request("replay", tuple(born.id for born in runs))):
            await ground.database.add_request(listener.site, request, "tests", utcnow())
    return runs


async def at_points(
    ground: Ground, wave: Sequence[Fault], end: End, act: Act | None, *, number: int
) -> tuple[list[Fault], list[Problem]]:
    """Play with listeners that kill themselves; which of them did, and what is wrong at the end."""
    await ground.stop(*(ground.listeners[fault.site] for fault in wave))
    armed = [ground.listen(f.site, CAXEV_CRASH=f"{f.point}:{f.nth}") for f in wave]
    await ground.ready(*armed)
    async with trio.open_nursery() as nursery:
        for listener in armed:
            nursery.start_soon(_restart_when_killed, ground, listener)
        runs = await take(ground, number, SMALL, armed)
        problems = await _finished(ground, runs, end, act)
        nursery.cancel_scope.cancel()
    await ground.forget(runs, anew=True)
    alive = [listener for listener in armed if not listener.killed]
    await ground.stop(*alive)
    for listener in armed:
        if ground.listeners[listener.site] is listener:
            ground.listen(listener.site)
    await ground.ready(*ground.listeners.values())
    return [fault for fault, one in zip(wave, armed, strict=True) if one.killed], problems


async def _restart_when_killed(ground: Ground, listener: Listener) -> None:
    while not listener.killed:  # trio could not tell us
        await trio.sleep(0.05)
    ground.listen(listener.site)


async def at_random(
    ground: Ground, random: Random, end: End, seconds: float, act: Act | None, *, number: int
) -> tuple[str, list[Problem]]:
    """Kill each site's listener at a random moment of a pass with larger runs."""
    delays = {site: random.uniform(0, 1.5 * seconds) for site in ground.everyone}
    runs: list[Born] = []
    async with trio.open_nursery() as nursery:
        for site, delay in delays.items():
            nursery.start_soon(_kill_later, ground, site, delay)
        runs += await take(ground, number, LARGER, ())
    problems = await _finished(ground, runs, end, act)
    await ground.forget(runs, anew=True)
    return ", ".join(f"{site} after {delay:.2f} s" for site, delay in delays.items()), problems


async def _kill_later(ground: Ground, site: str, delay: float) -> None:
    await trio.sleep(delay)
    ground.listeners[site].signal(signal.SIGKILL)
    await trio.to_thread.run_sync(ground.listeners[site].process.wait)
    ground.listen(site)
