"""Sampling: what metrics show of a process's state, looked up while they are scraped.

`session` runs a `Sampler`, and `helping` a `ProcessSampler`. A scrape is a thread of
`metrics_server`; it hands its request over and waits. So an unscraped process does none of this,
and a blocked one makes no scrape hang.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from datetime import datetime
from typing import Any, Final

import trio
from attrs import define, field
from loguru import logger

from caxev import __version__, metrics
from caxev.alarms.health import descriptors
from caxev.alarms.manager import AlarmManager
from caxev.config.handlers import digest
from caxev.core.alarms import Severity
from caxev.core.clock import utcnow
from caxev.core.model import OUR_STATUSES
from caxev.core.selection import Selection
from caxev.database import DatabaseError, Helper
from caxev.engine.context import Context
from caxev.engine.dispatcher import Dispatcher
from caxev.engine.root_watch import RootWatch
from caxev.engine.watcher import Watcher
from caxev.metrics import Samples

Rows = dict[str, dict[tuple[str, ...], float]]

PATIENCE: Final = 8.0
"""Seconds that a scrape waits: Prometheus gives up after 10, by default."""
COUNTING: Final = 5.0
"""Seconds that figures of the ledger may take; then a scrape goes without them."""
COUNTING_COPIES: Final = 600.0
"""The same for the copies of all runs; counting continues after the scrape has ended."""
SELDOM: Final = 300.0
"""Seconds between two counts of the copies of all runs."""
SHARE: Final = 20.0
"""Figures are cached for this many times as long as they took: 5 % of one server thread."""
STATUSES: Final = (*OUR_STATUSES, "RSEreupload", "RSEquota")
JOB_STATES: Final = ("waiting", "submitted", "ended")
OTHER: Final = "other"
"""The label of what is not in sites.json, or no status of ours."""


@define(eq=False)
class Kept:
    """Figures of the database that are kept for a while. `look_up` returns them."""

    look_up: Callable[[], Awaitable[Rows]]
    limit: float
    least: float = 0.0
    _found: Rows = field(init=False, factory=dict)
    _until: float = field(init=False, default=float("-inf"))

    async def get(self) -> Rows:
        """Return the figures; none of them if the database does not give them in time."""
        began = trio.current_time()
        if began < self._until:
            return self._found
        # Figures that cannot be had are missing: old ones would look as if nothing had changed.
        self._found = {}
        try:
            with trio.move_on_after(self.limit):
                self._found = await self.look_up()
        except DatabaseError as error:
            logger.debug("no figures for metrics: {}", error)
        took = trio.current_time() - began
        self._until = trio.current_time() + max(took * SHARE, self.least if self._found else 0.0)
        return self._found


@define(eq=False)
class ProcessSampler:
    """Answers scrapes about this process, for one lease."""

    context: Context
    dispatcher: Dispatcher
    roots: RootWatch

    async def run(self) -> None:
        """Answer scrapes, until cancelled."""
        await self._answer(metrics.STATES, self.sample)

    async def _answer(
        self, collector: metrics.Sampled, sample: Callable[[], Awaitable[Samples]]
    ) -> None:
        token = trio.lowlevel.current_trio_token()
        send, receive = trio.open_memory_channel[Future[Samples]](100)

        # It runs in the thread of the scrape, which waits there for trio's answer.
        def ask() -> Samples:
            answer: Future[Samples] = Future()
            # A scrape without these figures is better than none: it shows that the loop is blocked.
            try:
                token.run_sync_soon(_hand_over, send, answer)
                return answer.result(PATIENCE)
            except (trio.RunFinishedError, Late):
                return {}

        with collector.source(ask):
            async for answer in receive:
                answer.set_result(await sample())

    async def sample(self) -> Samples:
        """Return the state of the process."""
        return {**self._of_process(), **self._of_disks()}

    def _of_process(self) -> Rows:
        context, lanes = self.context, list(self.dispatcher.lanes)
        site, handlers = context.lease.site, digest(context.registry.enabled)
        files = descriptors()
        return {
            "caxev_build_info": {(__version__, platform.python_version()): 1},
            "caxev_configuration_info": {(site, context.sites.digest, handlers): 1},
            "caxev_reactions_running": {(site, one.name): len(one.running) for one in lanes},
            "caxev_lane_workers": {(site, one.name): one.workers for one in lanes},
            "caxev_open_files": {(site,): files.used},
            "caxev_open_files_allowed": {(site,): files.allowed},
        }

    def _of_disks(self) -> Rows:
        site, seen = self.context.lease.site, self.roots.seen
        there = {root: one for root, one in seen.items() if one.away is None}
        return {
            "caxev_directory_free_bytes": {(site, root): one.free for root, one in there.items()},
            "caxev_directory_size_bytes": {(site, root): one.size for root, one in there.items()},
            "caxev_directory_away": {
                (site, root): one.away is not None for root, one in seen.items()
            },
        }


@define(eq=False)
class Sampler(ProcessSampler):
    """Answers scrapes for the lease of a site."""

    watcher: Watcher
    alarms: AlarmManager
    _ledger: Kept = field(init=False)
    _copies: Kept = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._ledger = Kept(self._of_ledger, COUNTING)
        self._copies = Kept(self._of_copies, COUNTING_COPIES, SELDOM)

    async def run(self) -> None:
        """Answer scrapes, until cancelled."""
        async with trio.open_nursery() as nursery:
            # Apart: who asks for the state must not wait until all copies are counted.
            nursery.start_soon(self._answer, metrics.STATES, self.sample)
            nursery.start_soon(self._answer, metrics.COPIES, self._copies.get)

    async def sample(self) -> Samples:
        """Return the state of the listener and of its ledger."""
        site, watcher = self.context.lease.site, self.watcher
        severities = Counter(one.alarm.severity for one in self.alarms.active)
        return {
            **self._of_process(),
            "caxev_stream_age_seconds": {(site,): trio.current_time() - watcher.answered},
            "caxev_stream_lag_seconds": {(site,): watcher.behind},
            "caxev_alarms": {(site, one.value): severities[one] for one in Severity},
            **self._of_disks(),
            **await self._ledger.get(),
        }

    async def _of_ledger(self) -> Rows:
        database, site, now = self.context.database, self.context.lease.site, utcnow()
        owed, sizes = await database.owed(site, now), await database.sizes()
        found: Rows = {
            "caxev_ledger_reactions": {(site, one.lane, one.state): one.number for one in owed},
            "caxev_ledger_oldest_seconds": {
                (site, one.lane, one.state): max((now - one.since).total_seconds(), 0.0)
                for one in owed
                if one.since is not None
            },
            "caxev_collection_documents": {(site, one.collection): one.documents for one in sizes},
            "caxev_collection_bytes": {(site, one.collection): one.bytes for one in sizes},
        }
        # An idle lane has the value 0 and is not left out, so that alerts on it can end.
        for lane in self.dispatcher.lanes:
            for state in ("due", "waiting", "failed"):
                found["caxev_ledger_reactions"].setdefault((site, lane.name, state), 0)
        return found | _of_helpers(site, await database.helpers_at_work(site), now)

    async def _of_copies(self) -> Rows:
        database, sites = self.context.database, self.context.sites
        totals = await database.totals(Selection(), utcnow())
        jobs = await database.jobs()

        def labels(row: Mapping[str, Any], last: str, known: Iterable[str]) -> tuple[str, ...]:
            """Return host, type and a third label, each with few values."""
            return (
                _one_of(row["host"], sites.by_name),
                _one_of(row["type"], sites.types.known),
                _one_of(row[last], known),
            )

        copies: Counter[tuple[str, ...]] = Counter()
        size: Counter[tuple[str, ...]] = Counter()
        at_work: Counter[tuple[str, ...]] = Counter()
        for row in totals:
            key = labels(row, "status", STATUSES)
            copies[key] += row["copies"]
            size[key] += row["bytes"] or 0
        for row in jobs:
            at_work[labels(row, "state", JOB_STATES)] += row["number"]
        return {
            "caxev_copies": dict(copies),
            "caxev_copies_bytes": dict(size),
            "caxev_jobs": dict(at_work),
        }


def _of_helpers(site: str, helpers: Iterable[Helper], now: datetime) -> Rows:
    """Return figures about the helpers of a site, by host: of each the oldest sign of life."""
    found: dict[str, dict[tuple[str, ...], float]] = {
        "caxev_helper_running": {},
        "caxev_helper_joined_timestamp_seconds": {},
        "caxev_helper_seen_seconds": {},
    }
    running, joined, seen = found.values()
    for one in helpers:
        if not one.helps or one.since is None or one.seen is None:
            continue
        key, began = (site, one.host), one.since.timestamp()
        for lane in one.lanes:
            running[*key, lane] = running.get((*key, lane), 0) + one.running.get(lane, 0)
        joined[key] = min(joined.get(key, began), began)
        seen[key] = max(seen.get(key, 0.0), (now - one.seen).total_seconds())
    return found


def _hand_over(send: trio.MemorySendChannel[Future[Samples]], answer: Future[Samples]) -> None:
    try:
        send.send_nowait(answer)
    except (trio.WouldBlock, trio.BrokenResourceError):
        answer.set_result({})


def _one_of(value: object, known: Iterable[str]) -> str:
    return value if isinstance(value, str) and value in known else OTHER
