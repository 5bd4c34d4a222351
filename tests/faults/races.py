"""Who wins where several want the same: copies by two ways, replays by two people, and the stream.

The sites are told to bring every copy by more than one way at once: lngs pushes to chicago, which
pulls; stockholm is pushed to by both and pulls from both. While a run is on its way, two people
replay it at every site, and listeners are asked to scan.
"""

from __future__ import annotations

import json
from random import Random
from typing import Any, Final

import trio

from caxev.config import load_sites
from caxev.demo.world import World
from caxev.job import utcnow
from caxev.mongo import Request
from tests.faults.campaign import Born, Ground, Tally, say_round

SIZE: Final = 300_000
RUNS: Final = 4
"""Runs on their way at once."""
WAYS: Final[dict[str, dict[str, list[str]]]] = {
    "lngs": {"upload_options": ["chicago", "stockholm"]},
    "chicago": {
        "download_options": ["lngs", "stockholm"],
        "upload_options": ["stockholm", "lngs"],
    },
    "stockholm": {"download_options": ["lngs", "chicago"], "upload_options": ["chicago"]},
}


def every_way(world: World) -> None:
    """Rewrite sites.json so that each copy is wanted by several ways."""
    file = world.directory / "sites.json"
    entries = json.loads(file.read_text())
    for entry in entries:
        entry.update(WAYS[entry["name"]])
    file.write_text(json.dumps(entries))
    world.sites = load_sites(file)


async def races(ground: Ground, *, rounds: int, seed: int) -> dict[str, Any]:
    """Take runs, and have everything happen to them at once; `faults` are the requests made."""
    random, tally = Random(seed), Tally(ground.compared)
    every_way(ground.world)
    await ground.ready(*[ground.listen(site) for site in ground.world.sites])
    for _ in range(rounds):
        began = trio.current_time()
        runs = [await ground.take(SIZE) for _ in range(RUNS)]
        async with trio.open_nursery() as nursery:
            for person in ("one", "another"):
                nursery.start_soon(_asks, ground, runs, person, Random(random.random()))
        problems = [*await ground.finish(runs, None), *ground.ended()]
        await ground.forget(runs)
        tally.add(problems)
        tally.faults += 2 * REQUESTS
        say_round(f"{tally.rounds}. {RUNS} runs", problems, trio.current_time() - began)
    return tally.row()


REQUESTS: Final = 12
"""Requests that each of the two people makes in a round."""


async def _asks(ground: Ground, runs: list[Born], who: str, random: Random) -> None:
    ids = tuple(born.id for born in runs)
    handlers = [None, "pull", "push", "checksum"]
    for _ in range(REQUESTS):
        site = random.choice(list(ground.world.sites))
        kind = random.choice(["replay", "replay", "scan", "retry"])
        # Fired by force it does again what was done: only what may be done twice.
        handler = random.choice(handlers)
        force = handler is not None and random.random() < 0.5
        request = Request(kind, ids, handler, force) if kind == "replay" else Request(kind)
        await ground.database.add_request(site, request, who, utcnow())
        await trio.sleep(random.uniform(0, 0.2))
