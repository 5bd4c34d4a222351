"""What people ask of runs while listeners are killed: holds, and requests about many runs.

Each is carried out once, and the history has one row of each: none of what was refused.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

import trio

from caxev.core.history import What
from caxev.core.model import TRANSFERRED, CopyKey, Run
from caxev.database import HistorySearch
from tests.faults.campaign import Born, End, Ground

HELD_AT: Final = "chicago"
GONE_FROM: Final = "stockholm"
ROWS: Final = {What.HELD: 1, What.RELEASED: 1, What.REQUESTED: 2}
"""What the history has of a run that people asked for: a deletion and a copy were requested."""


async def asked_for(ground: Ground, runs: Sequence[Born]) -> End:
    """Hold copies, which refuse their deletion; delete others, have them back; end the holds."""
    gone = CopyKey("raw", GONE_FROM)
    await _caxev(ground, "hold", runs, "--site", HELD_AT, "--why", "a campaign")
    refused = await _caxev(ground, "rm", runs, "--site", HELD_AT, "--yes", "--json")
    if not all("held by" in row["state"] for row in json.loads(refused)):
        raise RuntimeError(f"a held copy was to be deleted: {refused}")
    await _caxev(ground, "rm", runs, "--site", GONE_FROM, "--yes")
    await all_runs(ground, runs, lambda run: run.copy(gone) is None, "it was not deleted")
    await _caxev(ground, "copy", runs, "--to", GONE_FROM, "--yes", "--no-wait")

    def back(run: Run) -> bool:
        copy = run.copy(gone)
        return copy is not None and copy.status == TRANSFERRED

    await all_runs(ground, runs, back, "it did not come back")
    await _caxev(ground, "release", runs, "--site", HELD_AT)
    await _compare(ground, runs)
    wanted = ground.wanted
    return End(wanted.copies, wanted.tags + Counter([f"seen-{GONE_FROM}"]))


async def _compare(ground: Ground, runs: Sequence[Born]) -> None:
    """Raise unless both requests are done, and each act has one row of history for each run."""
    listed = json.loads(await _caxev(ground, "requests", (), "--limit", "2", "--json"))
    figures = [(one["done"], one["runs"]) for one in listed]
    if figures != [(len(runs), len(runs))] * 2:
        raise RuntimeError(f"the requests are not done: {listed}")
    for born in runs:
        pages = ground.database.history_pages(HistorySearch(runs=[born.id]))
        rows = [row async for page in pages for row in page if not row.handler and row.deed.by]
        found = Counter(row.deed.what for row in rows)
        if found != ROWS:
            raise RuntimeError(f"the history has of run {born.number} what people asked: {found}")


async def all_runs(
    ground: Ground, runs: Sequence[Born], condition: Callable[[Run], bool], why: str
) -> None:
    """Wait until that holds of every run."""
    ids = [born.id for born in runs]

    async def holds() -> bool:
        return all(map(condition, (await ground.database.runs(ids)).values()))

    await ground.until(holds, why)


async def _caxev(ground: Ground, command: str, runs: Sequence[Born], *more: str) -> str:
    """Give a command about these runs; return what it prints."""
    which = ("--run", ",".join(str(born.number) for born in runs)) if runs else ()
    environment: Any = {**ground.world.environment, "PATH": ""}
    args = [sys.executable, "-m", "caxev", command, *which, *more]
    done = await trio.run_process(args, env=environment, capture_stdout=True)
    return done.stdout.decode()
