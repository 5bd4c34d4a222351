"""Who wins where several want the same: copies by two ways, replays by two people, and the stream.

The sites are told to bring every copy by more than one way at once: lngs pushes to chicago, which
pulls; stockholm is pushed to by both and pulls from both. While a run is on its way, two people
replay it at every site, and listeners are asked to scan. Of one more run the source is deleted as
soon as there is a second copy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import inf
from random import Random
from signal import SIGCONT, SIGKILL, SIGSTOP, SIGTERM
from typing import Any, Final

import trio

from caxev.config import load_sites
from caxev.copies.deletion import intent
from caxev.copies.retention import DeletionPlan, DeletionWish, plan
from caxev.core.clock import utcnow
from caxev.core.model import CopyKey
from caxev.database import Request
from caxev.demo.world import World
from tests.faults.campaign import BIRTH, HELPED, Born, End, Ground, Tally, say_round

SIZE: Final = 300_000
FIRST: Final = CopyKey("raw", BIRTH)
RUNS: Final = 4
"""Runs on their way at once."""
REQUESTS: Final = 12
"""Requests that each of the two people makes in a round."""
WAYS: Final[dict[str, dict[str, list[str]]]] = {
    "lngs": {"upload_options": ["chicago", "stockholm"]},
    "chicago": {
        "download_options": ["lngs", "stockholm"],
        "upload_options": ["stockholm", "lngs"],
    },
    "stockholm": {"download_options": ["lngs", "chicago"], "upload_options": ["chicago"]},
}


THIRD: Final[dict[str, dict[str, Any]]] = {
    "lngs": {"upload_options": ["chicago", "stockholm"]},
    "chicago": {"download_options": ["lngs", "stockholm"], "upload_options": ["stockholm"]},
    "stockholm": {"listener": False, "download_options": None, "upload_options": None},
}
"""Two sites bring the same copies to a storage at which no caxev runs."""


def lead(world: World, ways: Mapping[str, Mapping[str, Any]]) -> None:
    """Rewrite sites.json so that each copy is wanted by several ways."""
    file = world.directory / "sites.json"
    entries = json.loads(file.read_text())
    for entry in entries:
        entry.update(ways[entry["name"]])
    file.write_text(json.dumps(entries))
    world.sites = load_sites(file)


async def races(
    ground: Ground, *, rounds: int, seed: int, runs: int = RUNS, requests: int = REQUESTS
) -> dict[str, Any]:
    """Take runs, and have everything happen to them at once; `faults`: requests and deletions.

    In every second round one of the sites is a storage that two others bring to. If there are
    helpers, each is killed, paused for longer than its lease or asked to leave meanwhile.
    """
    random, tally = Random(seed), Tally(ground.compared)
    for number in range(rounds):
        began = trio.current_time()
        ways = THIRD if number % 2 else WAYS
        await ground.stop(*ground.listeners.values())
        ground.listeners.clear()
        lead(ground.world, {**ways, "stockholm": {"listener": True, **ways["stockholm"]}})
        await ground.ready(*[ground.listen(name) for name in ground.everyone])
        taken = [await ground.take(SIZE) for _ in range(runs)]
        doomed = await ground.take(SIZE)
        async with trio.open_nursery() as nursery:
            for person in ("one", "another"):
                nursery.start_soon(_asks, ground, taken, requests, Random(random.random()), person)
            nursery.start_soon(_delete_the_first, ground, doomed)
            for name in (one for one in ground.everyone if "+" in one):
                nursery.start_soon(_break, ground, name, Random(random.random()))
        end = ground.wanted
        left = {key: status for key, status in end.copies.items() if key != FIRST}
        problems = await ground.finish(taken, end)
        problems += [*await ground.finish([doomed], End(left, end.tags)), *ground.ended()]
        await ground.forget([*taken, doomed])
        tally.add(problems)
        tally.faults += 2 * requests + 1 + sum("+" in one for one in ground.everyone)
        say_round(f"{tally.rounds}. {runs + 1} runs", problems, trio.current_time() - began)
    return tally.row()


async def _break(ground: Ground, name: str, random: Random) -> None:
    """Kill a helper, pause it, or ask it to leave; afterwards there is one again."""
    await trio.sleep(random.uniform(0, 3))
    helper, how = ground.listeners[name], random.choice([SIGKILL, SIGSTOP, SIGTERM])
    helper.signal(how)
    if how == SIGSTOP:
        await trio.sleep(random.uniform(1, 2) * HELPED)
        helper.signal(SIGCONT)
    with trio.move_on_after(3 * HELPED if how == SIGSTOP else inf):
        await trio.to_thread.run_sync(helper.process.wait, abandon_on_cancel=True)
        # As its unit does; one that was paused ends if it cannot stop at once what it did.
        ground.listen(name)


async def _delete_the_first(ground: Ground, born: Born) -> None:
    """Ask for the source's end as soon as there is a second copy, while others come to fetch it."""

    async def asked() -> bool:
        run = (await ground.database.runs([born.id]))[born.id]
        if (copy := run.copy(FIRST)) is None:
            return True
        sites = ground.world.sites
        wanted = plan(
            run, DeletionWish(copy, "tests", "a race", 1), sites.get(BIRTH), sites, utcnow()
        )
        if not isinstance(wanted, DeletionPlan):
            return False
        wish = intent(run, wanted, sites, utcnow())
        return await ground.database.update_run(wish, utcnow()) is not None

    await ground.until(asked, "nothing of it may go")


async def _asks(ground: Ground, runs: list[Born], requests: int, random: Random, who: str) -> None:
    ids = tuple(born.id for born in runs)
    handlers = [None, "pull", "push", "checksum"]
    for _ in range(requests):
        site = random.choice(ground.world.listening)
        kind = random.choice(["replay", "replay", "scan", "retry"])
        # Fired by force it does again what was done: only what may be done twice.
        handler = random.choice(handlers)
        force = handler is not None and random.random() < 0.5
        request = Request(kind, ids, handler, force) if kind == "replay" else Request(kind)
        await ground.database.add_request(site, request, who, utcnow())
        await trio.sleep(random.uniform(0, 0.2))
