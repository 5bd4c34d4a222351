"""Watcher: follow the runs collection's change stream for one site, and scan when that is needed.

`session` starts `Watcher.run`. Each batch goes to the `Recorder`, which writes the position behind
it. A scan compares every run: at the first start, when the stream has lost history, and daily. It
runs beside the stream, so that new changes are served meanwhile, and continues after a kill.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final, TypeVar

import trio
from attrs import define, field, frozen
from loguru import logger

from caxev import metrics
from caxev.core.alarms import gap as gap_alarm
from caxev.core.clock import utcnow
from caxev.core.model import RunId
from caxev.database import (
    DatabaseError,
    Gap,
    HistoryLost,
    InvalidDocument,
    Position,
    Scanning,
    Stream,
    concerns_one,
    is_fatal,
    is_transient,
)
from caxev.engine.context import Context
from caxev.engine.recorder import Ahead, Reading, Recorder
from caxev.engine.shortcut import BACKLOG, Shortcut, age, opened

T = TypeVar("T")

SAVE_EVERY: Final = 60.0
"""Seconds after which the position is saved even if no change led to anything."""
SCAN_EVERY: Final = 86400.0
"""Seconds between scans that are made as a safety net."""
LONGEST_WAIT: Final = 30.0
"""Seconds at most between two attempts to open the stream."""
PAGE_SIZE: Final = 16 << 20
"""Bytes of runs that a page of a scan has, about: as objects they take several times that, and two
pages are in memory..."""
MOST_ON_PAGE: Final = 1000
"""...and how many runs at most..."""
FIRST_PAGE: Final = 100
"""...and at first: nothing shows how large they are."""
SHOW_EVERY: Final = 30.0
"""Seconds between two lines of the log about how far a scan is."""


@define(eq=False)
class Watcher:
    """Follows the runs collection for one lease.

    `behind` is how old, in seconds, the newest change of the last batch was when it was taken in;
    `answered`, by trio's clock, when the stream answered last, if only that there is nothing new.
    """

    context: Context
    recorder: Recorder
    behind: float = field(init=False, default=0.0)
    answered: float = field(init=False, factory=trio.current_time)
    _position: Position | None = field(init=False, default=None)
    _saved_at: float = field(init=False, default=0.0)
    _following: trio.CancelScope | None = field(init=False, default=None)
    # The number of scans that were begun, and locks: only one scan runs, and notes its position.
    _scans: int = field(init=False, default=0)
    _scanning: trio.Lock = field(init=False, factory=trio.Lock)
    _scan_noting: trio.Lock = field(init=False, factory=trio.Lock)
    _scan_needed: trio.Event = field(init=False, factory=trio.Event)
    _page: int = field(init=False, factory=lambda: FIRST_PAGE)

    async def run(self, *, ready: trio.Event) -> None:
        """Follow the stream, until cancelled. Sets `ready` once its position is known.

        Waits out trouble with the database and continues from its position. Raises `LeaseLost`, and
        `NotAuthorized` if rights are missing.
        """
        await self._locate()
        ready.set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._scan_as_needed)
            await self._follow_for_ever()

    async def _follow_for_ever(self) -> None:
        failures = 0
        while True:
            try:
                await self._follow()
            except HistoryLost as lost:
                await self._make_up_for(lost)
                failures = 0
            except DatabaseError as error:
                # If another task has come through since, begin with short waits again.
                failures = failures + 1 if self.context.trouble else 0
                await self._wait_out(error, failures)

    async def catch_up(self) -> int:
        """Read the stream to its end, once; return the number of changes. For ``--once``."""
        if self._position is None:
            await self._locate()
        try:
            await self.continue_scan()
            return await self._read_to_end()
        except HistoryLost as lost:
            await self._make_up_for(lost)
            await self.continue_scan()
            return 1

    async def _read_to_end(self) -> int:
        assert self._position is not None
        context, recorder, changes = self.context, self.recorder, 0
        async with opened(context, self._position) as stream:
            try:
                while True:
                    ahead = await recorder.read_ahead(stream, context.options.caught_up)
                    if not ahead.batch.changes:
                        await self._save(ahead.batch.position)
                        return changes
                    await self._take_in(ahead)
                    await recorder.flush()
                    changes += ahead.batch.changes
            finally:
                recorder.forget()

    async def _locate(self) -> None:
        """Find the position to start from; if there is none, scan."""

        async def locate() -> None:
            await self.recorder.unreadable.load()
            record = await self.context.database.site_record(self.context.lease.site)
            self._position = record.position if record else None
            if record is None or self._position is None:
                logger.info("first start with this runs database: scanning all runs")
                await self.begin_scan(restart=True)
            elif record.scanning is not None:
                logger.info("continuing an incomplete scan of all runs")
                self._scan_needed.set()
            elif not self.context.registry.watched <= record.watched:
                # No snapshot has these fields yet. The stream continues from its position.
                logger.info("handlers watch additional fields: scanning all runs")
                await self.begin_scan()

        await self.persist(locate)

    # -- the stream ---------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Follow the stream until it must be opened again."""
        # From before it is opened: what concerns the site may change meanwhile.
        with trio.CancelScope() as self._following:
            await self._follow_stream()

    async def _follow_stream(self) -> None:
        assert self._position is not None
        # Before the stream is opened: what changes meanwhile need not wait for a backlog either.
        start = Position(start=await self.context.database.cluster_time())
        shortcut = Shortcut(self.context, self.recorder, start)
        try:
            with ungrouped():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(shortcut.run)
                    async with opened(self.context, self._position) as stream:
                        shortcut.opened.set()
                        # While it was away a reply to a claim may have been lost, too.
                        await self.recorder.intake.reconcile()
                        self.context.trouble.over("stream")
                        await self._record_all(stream, shortcut)
        finally:
            self.recorder.forget()

    async def _record_all(self, stream: Stream, shortcut: Shortcut) -> None:
        # Without a buffer: one batch ahead keeps the database busy, and more would cost memory.
        send, receive = trio.open_memory_channel[Ahead](0)
        async with trio.open_nursery() as nursery:
            # While one batch is recorded the next one is read.
            nursery.start_soon(self._read, stream, send, shortcut)
            nursery.start_soon(self.recorder.record_deferred)
            async for ahead in receive:
                await self._take_in(ahead)
                ahead.recorded.set()

    def reopen(self) -> None:
        """Open the stream again at its position, because the site's interest has changed."""
        if self._following is not None:
            self._following.cancel()

    async def _read(
        self, stream: Stream, send: trio.MemorySendChannel[Ahead], shortcut: Shortcut
    ) -> None:
        while True:
            ahead = await self.recorder.read_ahead(stream)
            # At once: the batch may take seconds to be recorded.
            shortcut.judge(ahead.batch)
            await send.send(ahead)
            if ahead.batch.changes < BACKLOG:
                # Asking for more now would only delay the recording of these few.
                await ahead.recorded.wait()

    async def _take_in(self, ahead: Ahead) -> None:
        batch, self.answered = ahead.batch, trio.current_time()
        self.behind = age(batch)
        metrics.changes.labels(self.context.lease.site).inc(batch.changes)
        if batch.changes and await self.recorder.record_batch(ahead):
            self._position, self._saved_at = batch.position, trio.current_time()
        elif trio.current_time() - self._saved_at >= SAVE_EVERY:
            await self._save(batch.position)
        else:
            # In memory only: after a crash the stream brings changes again that led to nothing.
            self._position = batch.position

    async def _save(self, position: Position) -> None:
        await self.recorder.flush()  # all before the position is recorded, or it must not be saved
        try:
            await self.context.database.save_position(self.context.lease, position, utcnow())
        except InvalidDocument as error:  # the next start reads again from the former position
            logger.error("the position in the stream cannot be saved: {}", error)
        self._position, self._saved_at = position, trio.current_time()

    # -- trouble ------------------------------------------------------------------------------

    async def _make_up_for(self, lost: HistoryLost) -> None:
        """Report lost history once, and scan, however often the scan must begin again."""
        why = str(lost)
        logger.warning("{}; scanning all runs instead", why)
        metrics.gaps.labels(self.context.lease.site).inc()
        self.context.alarms.raise_(gap_alarm(self.context.lease.site, why))
        gap = Gap(utcnow(), why)
        await self.persist(partial(self.begin_scan, gap=gap, restart=True))

    async def persist(self, function: Callable[[], Awaitable[T]]) -> T:
        """Call an async function until the database lets it through; report trouble at once."""
        return await self.context.trouble.retrying("stream", function, quiet=0.0)

    async def _wait_out(self, error: DatabaseError, failures: int) -> None:
        if is_fatal(error):
            raise error
        self.context.trouble.meet("stream", error)
        await trio.sleep(min(0.2 * 2 ** min(failures, 20), LONGEST_WAIT))

    # -- scans --------------------------------------------------------------------------------

    async def begin_scan(self, *, gap: Gap | None = None, restart: bool = False) -> None:
        """Have all runs scanned from the newest one on. With `restart`, stream on from now."""
        database, lease = self.context.database, self.context.lease
        # One that is under way must not note its place after this.
        async with self._scan_noting:
            try:
                # Before the scan: what changes during it comes by the stream, too.
                start = await database.cluster_time() if restart else None
                await database.begin_scan(lease, start, gap)
            except DatabaseError as error:
                if concerns_one(error):  # it is not tried again: the former scan must continue
                    self._scan_needed.set()
                raise
            finally:  # it may have begun without our hearing of it
                self._scans += 1
        if start is not None:
            self._position = Position(start=start)
        self._scan_needed.set()

    async def _scan_as_needed(self) -> None:
        """Complete scans that were begun, until cancelled, beside the stream."""
        while True:
            await self._scan_needed.wait()
            self._scan_needed = trio.Event()
            await self.persist(self.continue_scan)

    async def continue_scan(self) -> None:
        """Complete the scan that was begun, if there is one, from its position."""
        async with self._scanning:
            number = self._scans  # before the read: another scan may be begun during it
            record = await self.context.database.site_record(self.context.lease.site)
            if record is not None and record.scanning is not None:
                await self._go_through(record.scanning, number)

    async def _go_through(self, scanning: Scanning, number: int) -> None:
        """Compare page after page of runs, until all are or another scan is begun."""
        runs = scanning.runs
        meter = ScanMeter(await self.context.database.estimated_runs(), runs)
        page: Page | None = await self._read_page(scanning.before)
        while page is not None:
            runs += len(page.reading.runs)
            page = await self._record_page(page, runs, number)
            if page is not None and (line := meter.line(runs, trio.current_time())) is not None:
                logger.info("{}", line)

    async def _read_page(self, before: RunId | None) -> Page:
        site = self.context.lease.site
        ids, before = await self.context.database.page(site, before, self._page)
        reading = await self.recorder.read_early(ids)
        self._page = next_page(self._page, reading.snapshots.size)
        return Page(reading, before)

    async def _record_page(self, page: Page, runs: int, number: int) -> Page | None:
        """Record a page of a scan, and meanwhile read the next one; None: there is none to record.

        `runs` are those of the scan up to here, and `number` is how many scans were begun by it.
        """
        following: Page | None = None

        async def read() -> None:
            nonlocal following
            if page.before is not None:
                following = await self._read_page(page.before)

        with ungrouped():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                await self.recorder.record_reading(page.reading)
                goes_on = await self._note_scanned(page.before, runs, number)
                if not goes_on:
                    nursery.cancel_scope.cancel()
        return following if goes_on else None

    async def _note_scanned(self, before: RunId | None, runs: int, number: int) -> bool:
        """Note the position of a scan; return whether it continues."""
        database, lease = self.context.database, self.context.lease
        async with self._scan_noting:
            if number != self._scans:
                return False  # history was lost again, or somebody asked for another scan
            if before is None:
                await database.finish_scan(lease, utcnow(), self.context.registry.watched)
                logger.info("scanned {} runs", runs)
                return False
            await database.note_scanned(lease, Scanning(before, runs))
            return True

    async def scan(self) -> None:
        """Compare every run, stored or seen."""
        await self.begin_scan()
        await self.continue_scan()

    async def scan_daily(self, then: Callable[[], Awaitable[None]]) -> None:
        """Scan once a day, until cancelled, as a safety net; run the other daily tasks after it."""
        while True:
            await self.persist(self._sleep_until_scan)
            await self.persist(self.scan)
            # A deposed process that woke up late may have claimed what it will never settle.
            await self.persist(self.recorder.intake.reconcile)
            await then()

    async def _sleep_until_scan(self) -> None:
        record = await self.context.database.site_record(self.context.lease.site)
        last = record.scanned if record else None
        age = 0.0 if last is None else (utcnow() - last).total_seconds()
        # A day at most: the time of the last scan may lie in the future if a clock was set.
        await trio.sleep(min(max(SCAN_EVERY - age, 0.0), SCAN_EVERY))


def next_page(runs: int, size: int) -> int:
    """Return how many runs a scan reads after a page of so many, whose size was this in bytes."""
    fitting = runs * PAGE_SIZE // max(size, 1)
    return max(min(fitting, 2 * runs, MOST_ON_PAGE), 1)


@frozen
class Page:
    """Runs of a scan that were read; `before`: where the next page begins, None after the last."""

    reading: Reading
    before: RunId | None


@define
class ScanMeter:
    """Describes from time to time how far a scan is. `total` runs are an estimate."""

    total: int
    begun_with: int
    _began: float = field(init=False, factory=trio.current_time)
    _shown: float = field(init=False, factory=trio.current_time)

    def line(self, runs: int, now: float) -> str | None:
        """Return a line about so many runs that were scanned by `now`, if one is due."""
        if now - self._shown < SHOW_EVERY:
            return None
        self._shown = now
        rate = (runs - self.begun_with) / (now - self._began)
        left = max(self.total - runs, 0) / rate if rate else 0.0
        return f"scanned {runs} of about {max(self.total, runs)} runs, {left / 60:.0f} min left"


@contextmanager
def ungrouped() -> Iterator[None]:
    """Raise errors of the database in the block as one: the one that decides what to do."""
    failed: DatabaseError | None = None
    try:
        yield
    except* DatabaseError as group:
        # False sorts first: an error that ends the session, then lost history, which a scan makes
        # up for, then errors that pass by themselves.
        failed = min(
            _leaves(group), key=lambda one: (is_transient(one), isinstance(one, HistoryLost))
        )
    if failed is not None:  # raised in the block above, Python before 3.11.4 would group it
        raise failed


def _leaves(group: BaseExceptionGroup[DatabaseError]) -> Iterator[DatabaseError]:
    for error in group.exceptions:
        yield from _leaves(error) if isinstance(error, BaseExceptionGroup) else (error,)
