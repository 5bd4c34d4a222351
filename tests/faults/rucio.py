"""kill -9 of the Rucio server at random moments while runs are brought into the catalogue.

The listener goes on by itself when the server is there again. At the end every run must be whole in
the catalogue: `caxev rucio check` finds no difference, by the storage's own checksums.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any, Final

import trio
from attrs import define, evolve, field

from caxev.config import load_handlers, load_sites
from caxev.config.handlers import BY_METHOD
from caxev.core.clock import utcnow
from caxev.core.model import (
    TRANSFERRED,
    Copy,
    CopyKey,
    Run,
    new_id,
)
from caxev.core.update import RunUpdate
from tests.faults.campaign import BIRTH, Born, End, Ground, Listener, Problem, Tally, say_round
from tests.rucio_server import RucioServer, running

TEMPLATE: Final = Path(__file__).with_suffix(".json")
RUNS: Final = 30
SIZE: Final = 60_000
KILLS: Final = 4
ENTRY: Final = CopyKey("raw", "rucio-catalogue")
END: Final = End(
    {CopyKey("raw", BIRTH): TRANSFERRED, ENTRY: TRANSFERRED}, Counter([f"seen-{BIRTH}"])
)


@define(eq=False)
class CatalogueGround(Ground):
    """One with a catalogue, of a server of its own, to which only runs of plain names go."""

    odd: bool = False
    server: RucioServer = field(init=False)
    _held: ExitStack = field(init=False, factory=ExitStack)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        load_handlers(default=BY_METHOD)
        self.server = self._held.enter_context(running(self.world.directory / "rucio"))
        file = self.world.directory / "sites.json"
        there = self.server.site(rucio={"ask_after": 1}, deletion={"copies": 2})
        file.write_text(json.dumps([*json.loads(file.read_text()), there]))
        self.world.sites = load_sites(file)

    def listen(self, site: str, *options: str, **environment: str) -> Listener:
        """Start a listener that knows how to log in to the catalogue."""
        return super().listen(site, *options, **self.server.environment, **environment)

    def close(self) -> None:
        """End every listener, and the server."""
        super().close()
        self._held.close()


async def given_up(ground: Ground, runs: Sequence[Born]) -> End:
    """Ask for what is in the catalogue to be compared, and then have it given up."""
    assert isinstance(ground, CatalogueGround)
    ids = [born.id for born in runs]
    for run in (await ground.database.runs(ids)).values():
        update = RunUpdate.ask(run, _in_catalogue(run), new_id(), utcnow())
        await ground.database.update_run(update, utcnow())

    async def compared() -> bool:
        found = map(_in_catalogue, (await ground.database.runs(ids)).values())
        return all(one.fields.get("check_answered") for one in found)

    await ground.until(compared, "what is in the catalogue was not compared")
    environment = {**os.environ, **ground.world.environment, **ground.server.environment}
    for born in runs:
        command = [sys.executable, "-m", "caxev", "rm", "--run", str(born.number)]
        command += ["--site", ENTRY.host]
        await trio.run_process(command, env=environment, capture_stdout=True)
    wanted = ground.wanted
    stay = {key: status for key, status in wanted.copies.items() if key != ENTRY}
    return evolve(wanted, copies=stay)


def _in_catalogue(run: Run) -> Copy:
    copy = run.copy(ENTRY)
    assert copy is not None
    return copy


async def rucio(
    ground: Ground, *, rounds: int, seed: int, runs: int = RUNS, kills: int = KILLS
) -> dict[str, Any]:
    """Bring so many runs in each round, while the server dies again and again."""
    random = Random(seed)
    tally = Tally(ground.compared)
    with running(ground.world.directory / "rucio") as server:
        _describe(ground, server)
        environment = server.environment
        listener = ground.listen(BIRTH, **environment)
        await ground.ready(listener)
        for _ in range(rounds):
            began = trio.current_time()
            born = [await ground.take(SIZE, odd=False) for _ in range(runs)]
            killed = await _during(ground, server, born, random, kills)
            problems = await ground.finish(born, END)
            problems += await _wrong(ground, server, born, environment)
            tally.add(problems)
            tally.faults += killed
            what = f"{tally.rounds}. {killed} kills during {runs} uploads"
            say_round(what, problems, trio.current_time() - began)
    return tally.row()


def _describe(ground: Ground, server: RucioServer) -> None:
    """Make the catalogue a site of this world, which the birth site brings its data to."""
    file = ground.world.directory / "sites.json"
    entries = [one for one in json.loads(file.read_text()) if one["name"] == BIRTH]
    entries[0]["upload_options"] = ["rucio-catalogue"]
    file.write_text(json.dumps([*entries, server.site(rucio={"ask_after": 1})]))


async def _during(
    ground: Ground, server: RucioServer, born: list[Born], random: Random, most: int
) -> int:
    """Kill the server and start it again, until all is there; how often."""
    kills = 0
    with trio.move_on_after(300):
        while not await _all_there(ground, born):
            if kills < most:
                await trio.sleep(random.uniform(0.2, 2.0))
                server.stop()
                kills += 1
                await trio.sleep(random.uniform(0.0, 1.0))
                await trio.to_thread.run_sync(server.start)
            else:
                await trio.sleep(0.2)
    return kills


async def _all_there(ground: Ground, born: list[Born]) -> bool:
    return not [one for one in (await _entries(ground, born)) if one != TRANSFERRED]


async def _entries(ground: Ground, born: list[Born]) -> list[str | None]:
    found = await ground.database.runs([one.id for one in born])
    entries = [run.copy(ENTRY) for run in found.values()]
    return [None if entry is None else entry.status for entry in entries]


async def _wrong(
    ground: Ground, server: RucioServer, born: list[Born], environment: dict[str, str]
) -> list[Problem]:
    problems = [
        Problem("lost" if "is there" in row["problem"] else "corrupt_accepted", row["problem"])
        for row in await trio.to_thread.run_sync(_differences, ground, born, environment)
    ]
    counts = await trio.to_thread.run_sync(server.counts)
    return problems + [
        Problem("duplicated", f"{counts[name]} {name}")
        for name in ("dataset", "rules")
        if counts[name] > len(ground.compared)
    ]


def _differences(
    ground: Ground, born: list[Born], environment: dict[str, str]
) -> list[dict[str, Any]]:
    """What ``caxev rucio check`` finds, by the storage's own checksums."""
    command = [sys.executable, "-m", "caxev", "rucio", "check", "--deep", "--json"]
    command += ["--run", f"{born[0].number}-{born[-1].number}"]
    whole = {**os.environ, **ground.world.environment, **environment}
    done = subprocess.run(command, env=whole, capture_output=True, check=False)
    rows: list[dict[str, Any]] = json.loads(done.stdout or b"[]")
    if done.returncode and not rows:
        return [{"problem": done.stderr.decode(errors="replace").strip()}]
    return rows
