"""What people ask of runs while listeners are killed: tags, holds, requests about many runs.

Each is carried out once, and the history has one row of each: none of what was refused. The
commands are killed as well, at each point between two of their writes, and resumed.
"""

from __future__ import annotations

import json
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import trio
from attrs import define, field
from pymongo import MongoClient

from caxev.core.history import What
from caxev.core.model import TRANSFERRED, CopyKey, Run
from caxev.database import BulkRequest, HistorySearch
from tests.faults.campaign import Born, End, Ground, say

HELD_AT: Final = "chicago"
GONE_FROM: Final = "stockholm"
TAGGED: Final = "asked"
LISTED: Final = 100
"""The latest requests that are looked through."""


async def asked_for(ground: Ground, runs: Sequence[Born]) -> End:
    """Hold copies, which refuse their deletion; delete others, have them back; end the holds."""
    people, gone = People(ground, runs), CopyKey("raw", GONE_FROM)
    await people.begin()
    await people.do(What.HELD, "hold", "--site", HELD_AT, "--why", "a campaign")
    refused = await people.caxev("rm", "--site", HELD_AT, "--yes", "--json", code=1)
    if not all("held by" in row["state"] for row in json.loads(refused)):
        raise RuntimeError(f"a held copy was to be deleted: {refused}")
    await people.do(What.REQUESTED, "rm", "--site", GONE_FROM, "--yes")
    await all_runs(ground, runs, lambda run: run.copy(gone) is None, "it was not deleted")
    await people.do(What.REQUESTED, "copy", "--to", GONE_FROM, "--yes", "--no-wait")

    def back(run: Run) -> bool:
        copy = run.copy(gone)
        return copy is not None and copy.status == TRANSFERRED

    await all_runs(ground, runs, back, "it did not come back")
    await _killed(people)
    await people.do(What.RELEASED, "release", "--site", HELD_AT)
    await people.compare()
    wanted = ground.wanted
    return End(wanted.copies, wanted.tags + Counter([f"seen-{GONE_FROM}"]) + people.tags)


# -- commands that are killed ---------------------------------------------------------------------

KILLED: Final = {
    "tag": (What.TAGGED, ("tag", "add", "{}")),
    "hold": (What.HELD, ("hold", "--site", HELD_AT, "--why", "{}")),
    "comment": (What.COMMENTED, ("comment", "{}")),
}
"""What is killed in turn, in one pass at each of its points, and how it is counted."""


async def _killed(people: People) -> None:
    """Kill a command at each of its points, one after the other, and resume it each time.

    The points are those that it passes undisturbed.
    """
    turn = people.runs[0].number // len(people.runs) % len(KILLED)
    name, (what, words) = [*KILLED.items()][turn]
    points = await people.points(what, *_naming(words, TAGGED))
    with _short_transactions(people.ground):
        for number, point in enumerate(points):
            await people.do(what, *_naming(words, f"{TAGGED}-{number}"), at=point)
    say(f"{name}: killed at {len(points)} points, and resumed")


def _naming(words: Sequence[str], name: str) -> list[str]:
    return [word.format(name) for word in words]


@contextmanager
def _short_transactions(ground: Ground) -> Iterator[None]:
    """Have the server give up soon what a command has begun that was killed in it."""
    name = "transactionLifetimeLimitSeconds"
    with MongoClient[dict[str, Any]](ground.world.mongod.uri) as client:
        usual = client.admin.command({"getParameter": 1, name: 1})[name]
        client.admin.command({"setParameter": 1, name: 1})
        try:
            yield
        finally:
            client.admin.command({"setParameter": 1, name: usual})


@define
class People:
    """Who ask, of these runs, by commands; they keep count of what they have asked for."""

    ground: Ground
    runs: Sequence[Born]
    tags: Counter[str] = field(init=False, factory=Counter)
    _acts: Counter[What] = field(init=False, factory=Counter)
    _before: frozenset[str] = field(init=False, default=frozenset())

    async def begin(self) -> None:
        """Note which requests there are already."""
        self._before = frozenset(one.id for one in await self._requests())

    async def _requests(self) -> list[BulkRequest]:
        found = [one async for one in self.ground.database.bulks(LISTED)]
        return [one for one in found if one.id not in self._before]

    async def do(self, what: What, *words: str, at: str = "") -> None:
        """Ask for something that the history calls so; killed `at` a point, it is done later."""
        self._acts[what] += 1
        if words[0] == "tag":
            self.tags[words[-1]] += 1
        if not at:
            await self.caxev(*words)
            return
        known = {one.id for one in await self._requests()}
        await self.caxev(*words, CAXEV_CRASH=at)
        left = [one for one in await self._requests() if one.id not in known]
        if left:
            await self.caxev("requests", "resume", left[0].id, about=())
        else:  # nothing was asked for yet
            await self.caxev(*words)

    async def points(self, what: What, *words: str) -> list[str]:
        """Ask for something; return the points between its writes, with how often each is passed.

        A point that is passed often is taken at a middle passing, too.
        """
        log = self.ground.world.directory / f"people-{self.runs[0].number}.points"
        self._acts[what] += 1
        if words[0] == "tag":
            self.tags[words[-1]] += 1
        await self.caxev(*words, CAXEV_CRASH_LOG=str(log))
        points = (line.split()[1] for line in log.read_text().splitlines())
        # Not those of Python, which may write what it has compiled.
        passed = Counter(point for point in points if ":database." in point)
        middle = {(point, times // 2 + 1) for point, times in passed.items()}
        return [f"{point}:{nth}" for point, nth in sorted({(one, 1) for one in passed} | middle)]

    async def caxev(
        self,
        command: str,
        *more: str,
        about: Sequence[Born] | None = None,
        code: int = 0,
        **environment: str,
    ) -> str:
        """Give a command about the runs; return what it prints."""
        about = self.runs if about is None else about
        which = ("--run", ",".join(str(born.number) for born in about)) if about else ()
        given: Any = {**self.ground.world.environment, "PATH": "", **environment}
        args = [sys.executable, "-m", "caxev", command, *more, *which]
        done = await trio.run_process(
            args, env=given, capture_stdout=True, capture_stderr=True, check=False
        )
        if done.returncode != (-signal.SIGKILL if "CAXEV_CRASH" in environment else code):
            how = f"{environment} {done.returncode} {done.stderr.decode()}"
            raise RuntimeError(f"{command} {more} ended otherwise: {how}")
        return done.stdout.decode()

    async def compare(self) -> None:
        """Raise unless all requests are done, and each act has one row of history for each run."""
        figures = json.loads(
            await self.caxev("requests", "--limit", str(LISTED), "--json", about=())
        )
        mine = {one.id for one in await self._requests()}
        undone = [one for one in figures if one["request"] in mine and one["done"] != one["runs"]]
        if undone:
            raise RuntimeError(f"these requests are not done: {undone}")
        for born in self.runs:
            pages = self.ground.database.history_pages(HistorySearch(runs=[born.id]))
            rows = [row async for page in pages for row in page if not row.handler and row.deed.by]
            found = Counter(row.deed.what for row in rows)
            if found != self._acts:
                why = f"{found}, not {self._acts}"
                raise RuntimeError(f"what people asked of run {born.number} by its history: {why}")
        await self._compare_comments()

    async def _compare_comments(self) -> None:
        for run in (await self.ground.database.runs([born.id for born in self.runs])).values():
            texts = Counter(one["text"] for one in run.document.get("comments", ()))
            if texts.total() != self._acts[What.COMMENTED] or max(texts.values(), default=1) > 1:
                raise RuntimeError(f"comments of {run}: {texts}")


async def all_runs(
    ground: Ground, runs: Sequence[Born], condition: Callable[[Run], bool], why: str
) -> None:
    """Wait until that holds of every run."""
    ids = [born.id for born in runs]

    async def holds() -> bool:
        return all(map(condition, (await ground.database.runs(ids)).values()))

    await ground.until(holds, why)
