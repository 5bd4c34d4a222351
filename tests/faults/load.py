"""A steady load of changes, each of which every site must react to once."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from random import Random
from typing import Any, Final

import trio
from attrs import define, field
from bson import ObjectId
from pymongo.collection import Collection
from pymongo.errors import DuplicateKeyError, PyMongoError

from tests.faults.campaign import Ground, Kind, Problem

Document = dict[str, Any]

RATE: Final = 20.0
"""Runs added a second."""
SHORT_RATE: Final = 5.0
"""The same in the short form of a campaign."""


@define(eq=False)
class Load:
    """A thread that adds runs, each until the database has acknowledged it.

    `added`: the acknowledged ones; `returned`: when (`time.time`) one was acknowledged for which
    that had failed before.
    """

    runs: Collection[Document]
    rate: float = RATE
    added: list[ObjectId] = field(factory=list)
    returned: float | None = None
    _goes: threading.Event = field(factory=threading.Event)
    _rests: threading.Event = field(factory=threading.Event)
    _over: bool = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the thread live as long as the block; it rests at first."""
        self._rests.set()
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over = True
            self._goes.set()
            thread.join()

    def go(self) -> None:
        """Add runs from now on."""
        self._rests.clear()
        self._goes.set()

    async def rest(self) -> None:
        """Add no more; returns when what was begun has been acknowledged."""
        self._goes.clear()
        await trio.to_thread.run_sync(self._rests.wait)

    def _run(self) -> None:
        while not self._over:
            if not self._goes.is_set():
                self._rests.set()
                self._goes.wait()
                self._rests.clear()
            self._add()
            time.sleep(1 / self.rate)
        self._rests.set()

    def _add(self) -> None:
        one = ObjectId()
        document = {"_id": one, "name": f"tick_{one}", "tags": [{"name": "tick"}], "data": []}
        failed = False
        while not self._over:
            try:
                self.runs.insert_one(document)
            except DuplicateKeyError:
                break
            except PyMongoError:
                failed = True
                time.sleep(0.02)
            else:
                break
        if failed:
            self.returned = time.time()
        self.added.append(one)

    # -- what becomes of them ---------------------------------------------------------------------

    async def counted(self, ground: Ground) -> None:
        """Wait until every added run has been reacted to, or has been waited for long enough."""

        async def none_missing() -> bool:
            with suppress(PyMongoError):
                return not await self.missing(ground)
            return False

        with suppress(TimeoutError):  # what is missing is found afterwards
            await ground.until(none_missing, "not every run was reacted to")

    async def missing(self, ground: Ground) -> list[Problem]:
        """Say which of the added runs have not been reacted to once at each site."""
        ground.compared.update((one, set()) for one in self.added)
        sites = ground.world.listening
        return await trio.to_thread.run_sync(lambda: list(self._missing(sites)))

    def _missing(self, sites: list[str]) -> Iterator[Problem]:
        added = list(self.added)
        found = {one["_id"]: one for one in self.runs.find({"_id": {"$in": added}}, {"tags": 1})}
        for one in added:
            if one not in found:
                yield Problem("lost", f"the run {one}, which was acknowledged")
                continue
            tags = Counter(tag["name"] for tag in found[one]["tags"])
            for site in sites:
                times = tags[f"ticked-{site}"]
                if times != 1:
                    kind: Kind = "lost" if times == 0 else "duplicated"
                    yield Problem(kind, f"{one} was reacted to {times} times at {site}")


def in_turn(
    names: tuple[str, ...], rounds: int, random: Random, *, shuffled: bool
) -> Iterator[str]:
    """Return `rounds` names, each as often as any other. Pure."""
    for number in range(rounds):
        if number % len(names) == 0 and shuffled:
            names = tuple(random.sample(names, len(names)))
        yield names[number % len(names)]
