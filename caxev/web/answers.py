"""Facts that only the database has: sizes, readings, holds, requests for many copies.

They are counted in the background, when a viewer asks and runs have changed; meanwhile viewers get
the previous answer. Without a viewer or a change the database is not queried.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, suppress
from datetime import datetime
from typing import Final, Generic, TypeVar

import trio
from attrs import define, field, frozen
from loguru import logger

from caxev.asking.asker import Asker
from caxev.asking.requests import RequestProgress, described, progress
from caxev.config import ConfigError
from caxev.copies.holds import standing, terms
from caxev.core.clock import utcnow
from caxev.core.errors import NothingToDo
from caxev.core.model import Run, RunId
from caxev.core.registry import Registry
from caxev.core.selection import EVERY
from caxev.database import BulkRequest, Database, DatabaseError
from caxev.engine.root_markers import with_markers
from caxev.web import drawing
from caxev.web.growth import HostType
from caxev.web.scene import Scene
from caxev.web.storage import Candidate, Holdings, candidate, longest_patrol

T = TypeVar("T")

PATIENCE: Final = 0.2
"""Seconds that a page waits for the first answer: a small collection needs less."""
SHARE: Final = 20.0
"""An answer is kept for so many times the seconds that it took."""
OFTEN: Final = 60.0
"""Seconds for which nothing is asked again."""
BULKS: Final = 20
CANDIDATES: Final = 100
HOLDS: Final = 500


@define(eq=False)
class Counted(Generic[T]):
    """An answer of the database, at least `least` seconds old before it is asked for again.

    It is the same as long as `mark` returns the same. `counted` is called when there is a new one.
    `at` is when it was asked for, UTC; None: never.
    """

    look_up: Callable[[], Awaitable[T]]
    value: T
    least: float
    mark: Callable[[], int]
    counted: Callable[[], None]
    at: datetime | None = field(init=False, default=None)
    _wanted: trio.Event = field(init=False, factory=trio.Event)
    _there: trio.Event = field(init=False, factory=trio.Event)
    _mark: int = field(init=False, default=-1)

    def peek(self) -> T:
        """Return the last answer, and have it renewed if it is old."""
        self._wanted.set()
        return self.value

    async def get(self) -> T:
        """Return the last answer; wait a moment for the first."""
        self._wanted.set()
        with trio.move_on_after(PATIENCE):
            await self._there.wait()
        return self.value

    async def run(self) -> None:
        """Count whenever a viewer needs it, until cancelled."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            began = trio.current_time()
            if self.mark() != self._mark:
                await self._count()
            took = trio.current_time() - began
            await trio.sleep(max(self.least, SHARE * took))

    async def _count(self) -> None:
        # Before the count: a change during it asks for another.
        at, mark = utcnow(), self.mark()
        try:
            self.value = await self.look_up()
        except DatabaseError as error:
            logger.debug("not counted: {}", error)
            return
        self.at, self._mark = at, mark
        self._there.set()
        self.counted()


@frozen
class BulkRow:
    """A request about many runs, and how far it is, as a bar and in words; `runs` None: all."""

    id: str
    what: str
    by: str
    at: datetime
    runs: int | None
    bar: str
    words: str


@frozen
class HoldRow:
    """A copy that somebody holds, and until when."""

    run: RunId
    label: str
    what: str
    host: str
    status: str
    by: str
    terms: str


@frozen
class Holds:
    """How many holds there are, and the first of them."""

    number: int = 0
    rows: tuple[HoldRow, ...] = ()


@define(eq=False)
class Answers:
    """Asks the database. `counted` is called with the name of a view that has something new."""

    scene: Scene
    database: Database
    counted: Callable[[str], None]
    holdings: Counted[Holdings] = field(init=False)
    holds: Counted[Holds] = field(init=False)
    bulks: Counted[tuple[BulkRow, ...]] = field(init=False)

    def __attrs_post_init__(self) -> None:
        def mark() -> int:
            return self.scene.state.changed

        def new(view: str) -> Callable[[], None]:
            return lambda: self.counted(view)

        self.holdings = Counted(self._holdings, Holdings(), OFTEN, mark, new("storage"))
        self.holds = Counted(self._holds, Holds(), OFTEN, mark, new("holds"))
        self.bulks = Counted(self._bulks, (), OFTEN, mark, new("requests"))

    async def run(self) -> None:
        """Query what viewers need, until cancelled."""
        async with trio.open_nursery() as nursery:
            for one in (self.holdings, self.holds, self.bulks):
                nursery.start_soon(one.run)

    async def _holdings(self) -> Holdings:
        now = utcnow()
        sizes: Counter[HostType] = Counter()
        for one in await self.database.totals(EVERY, now):
            if one["bytes"] is not None:
                sizes[one["host"], one["type"]] += int(one["bytes"])
        readings: dict[str, dict[int | None, int]] = {}
        oldest: dict[str, datetime] = {}
        for row in await self.database.readings(now, longest_patrol(self.scene.sites)):
            host, day = row["host"], row["day"]
            readings.setdefault(host, {})[day] = row["copies"]
            if day is not None:
                oldest[host] = min(row["oldest"], oldest.get(host, now))
        return Holdings(sizes, readings, oldest, now)

    async def _holds(self) -> Holds:
        now, rows, number = utcnow(), list[HoldRow](), 0
        async with aclosing(self.database.held()) as pages:
            async for page in pages:
                found = [row for run in page for row in _hold_rows(run, now)]
                number += len(found)
                rows += found[: HOLDS - len(rows)]
        return Holds(number, tuple(rows))

    async def _bulks(self) -> tuple[BulkRow, ...]:
        # To see how far a request is asks for no handlers, and nothing in anybody's name.
        asker = Asker(self.database, self.scene.sites, _no_handlers, "")
        rows = []
        async for one in self.database.bulks(BULKS):
            with suppress(NothingToDo):  # another version of caxev made it
                rows.append(_bulk_row(one, await progress(asker, one)))
        return tuple(rows)

    async def candidates(self, name: str) -> list[Candidate]:
        """Return the oldest raw copies at a site, and whether its rules delete them."""
        scene, now = self.scene, utcnow()
        sites = with_markers(scene.sites, None, scene.state.sites)
        site = sites.get(name)
        runs = await self.database.oldest(name, "raw", (), 0)
        return [candidate(run, site, sites, now) for run in runs[:CANDIDATES]]


def _hold_rows(run: Run, now: datetime) -> Iterator[HoldRow]:
    for copy in run.copies:
        for one in standing(copy, now):
            until = terms(copy, one)
            yield HoldRow(run.id, str(run), copy.key.data, copy.host, copy.status, one.by, until)


def _bulk_row(request: BulkRequest, now: RequestProgress) -> BulkRow:
    words = f"{now.done:,} done, {now.waiting:,} pending, {now.failed:,} failed"
    if now.withdrawn:
        words += f", {now.withdrawn:,} withdrawn"
    parts = [("good", now.done), ("busy", now.waiting), ("bad", now.failed)]
    bar = drawing.stack([*parts, ("none", now.withdrawn)], words)
    runs = None if request.runs is None else len(request.runs)
    return BulkRow(request.id, described(request), request.by, request.at, runs, bar, words)


def _no_handlers(site: str) -> Registry:
    raise ConfigError(f"the handlers of {site} are not loaded here")
