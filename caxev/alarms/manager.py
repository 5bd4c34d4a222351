"""Collect a site's alarms, keep them in the database, and deliver them.

`dispatcher`, `watcher` and `HealthMonitor` raise alarms here (`raise_`, `clear`: neither waits nor
fails), handlers by way of their job (`raise_and_keep`). Alarms are held in memory, written to the
database as soon as it is reachable, and read from there by the next process. Each sink has a task
of its own: one that hangs holds up no other.

An alarm is delivered before the delivery is written down: a process that is killed in between
delivers it twice, but never not at all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import aclosing
from random import random
from typing import Final

import trio
from attrs import define, evolve, field
from loguru import logger

from caxev import metrics
from caxev.alarms.base import DeliveryFailed, Notifier
from caxev.config import ConfigError
from caxev.core.alarms import (
    PARKED,
    REFUSED,
    UNCANCELLABLE,
    Alarm,
    Alarms,
    AlarmState,
    DeliveryRule,
    cleared,
    crowded,
    delivered,
    delivery_failed,
    forgettable,
    messages,
    next_delivery,
    parked,
    parked_key,
    raised,
    refused_key,
    same_cause,
    together,
)
from caxev.core.clock import utcnow
from caxev.core.errors import one_line
from caxev.database import Database, DatabaseError, Lease, concerns_one, unless_fatal

GATHER: Final = 2.0
"""Seconds from the first alarm that is due to the delivery, so that others can join it."""
PAUSE: Final = 60.0
"""Seconds between two deliveries to one sink."""
MOST: Final = 1000
"""Alarms that can be active one by one at a site."""
AGAIN: Final = 5.0
"""Seconds until the database is tried again."""
SWEEP: Final = 3600.0
"""Seconds at most until alarms that can be forgotten, and the clock, are checked again."""


@define(eq=False)
class Recipient:
    """A sink: its rule of delivery and its notifier. `make` reads its secrets again."""

    rule: DeliveryRule
    notifier: Notifier
    make: Callable[[], Notifier] | None = None

    def renew(self) -> None:
        """Make the notifier again: a password may have been renewed."""
        try:
            self.notifier = self.notifier if self.make is None else self.make()
        except ConfigError as error:
            logger.error("{} keeps its previous settings: {}", self.name, error)

    @property
    def name(self) -> str:
        return self.rule.sink


@define(eq=False)
class AlarmManager(Alarms):
    """One site's alarms. Use `open`, then `run`."""

    database: Database
    lease: Lease
    recipients: list[Recipient]
    _known: dict[str, AlarmState] = field(init=False, factory=dict)
    _unkept: set[str] = field(init=False, factory=set)
    _shown_by: dict[str, str] = field(init=False, factory=dict)
    """For each alarm, the one that stands for its cause: the first, until all of them are over."""
    _labels: dict[str, str] = field(init=False, factory=dict)
    """The label of the run that each active alarm is about, also of those that another stands for.
    """
    _changed: trio.Event = field(init=False, factory=trio.Event)
    _writing: trio.Lock = field(init=False, factory=trio.Lock)
    _sending: defaultdict[str, trio.Lock] = field(
        init=False, factory=lambda: defaultdict(trio.Lock)
    )

    @property
    def active(self) -> list[AlarmState]:
        """The alarms that are not over."""
        return [one for one in self._known.values() if one.active]

    @property
    def runs(self) -> frozenset[str] | None:
        # With so many, those that came later are not known.
        return None if len(self._known) >= MOST else frozenset(self._labels.values())

    # -- raising ----------------------------------------------------------------------------

    def raise_(self, alarm: Alarm) -> None:
        """Raise an alarm; no change if it, or another one of the same cause, is active."""
        key = self._key_for(alarm)
        if self._shown_by.get(alarm.key, key) != key:
            self.clear(alarm.key)  # it has another cause now
        self._shown_by[alarm.key] = key
        self._labels[alarm.key] = alarm.run
        if key != alarm.key:
            return
        # Each is a document, and is compared with every new one; nobody reads so many.
        if len(self._known) >= MOST and key not in self._known:
            alarm = crowded(alarm.site, MOST)
        before = self._known.get(alarm.key)
        self._known[alarm.key] = after = raised(before, alarm, utcnow())
        if before is None or _without_details(before) != _without_details(after):
            logger.warning("alarm: {}", alarm.summary)
            self._note(alarm.key)

    def clear(self, key: str) -> None:
        """End an alarm, if it is active and no other one of its cause still is."""
        self._labels.pop(key, None)
        key = self._shown_by.pop(key, key)
        if not self._is_active(key) or key in self._shown_by.values():
            return
        before = self._known[key]
        self._known[key] = after = cleared(before, utcnow())
        if not after.active:
            logger.info("over: {}", before.alarm.summary)
            self._note(key)

    def _key_for(self, alarm: Alarm) -> str:
        """Return the key of the active alarm that stands for this one; its own if none does."""
        if self._is_active(alarm.key):
            return alarm.key
        found = (one.alarm.key for one in self.active if same_cause(one.alarm, alarm))
        return next(found, alarm.key)

    def _is_active(self, key: str) -> bool:
        return key in self._known and self._known[key].active

    async def raise_and_keep(self, alarm: Alarm) -> None:
        self.raise_(alarm)
        await self._keep_one(alarm.key)

    async def clear_and_keep(self, key: str) -> None:
        """End an alarm and all it stands for, and keep that. Raises `DatabaseError`."""
        for one in [one for one, by in self._shown_by.items() if by == key]:
            del self._shown_by[one]
            self._labels.pop(one, None)
        self.clear(key)
        await self._keep_one(key)

    async def _keep_one(self, key: str) -> None:
        async with self._writing:  # another task may be writing it
            if key in self._unkept:
                await self._write(self._unkept)

    def _note(self, key: str) -> None:
        self._unkept.add(key)
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    # -- keeping ----------------------------------------------------------------------------

    async def open(self) -> None:
        """Read the alarms of the former process, and raise one for each reaction that has failed.

        If that process was killed between a failure and its alarm, the alarm is not lost.
        """
        site = self.lease.site
        self._known = {one.alarm.key: one for one in await self.database.alarms(site)}
        self._shown_by = {key: key for key in self._known if self._is_active(key)}
        self._labels = {one.alarm.key: one.alarm.run for one in self.active}
        about = self._active_keys(PARKED)
        for key in self._active_keys(UNCANCELLABLE):
            self.clear(key)  # it has ended with its process
        if refusals := self._active_keys(REFUSED):
            async with aclosing(self.database.hindered(site)) as pages:
                async for page in pages:
                    refusals -= {refused_key(one) for one in page}
            for key in refusals:
                self.clear(key)
        standing = await self.database.standing_keys(key.removeprefix(PARKED) for key in about)
        await self.raise_failed()
        for key in about:  # last: it may now stand for others of its cause, which have failed
            if key.removeprefix(PARKED) not in standing:
                self.clear(key)

    async def raise_failed(self) -> None:
        """Raise an alarm for each reaction that has failed and has none. Raises `DatabaseError`."""
        found = await self.database.reactions(self.lease.site, state="failed", limit=MOST)
        failures = [one for one, _ in found if not self._is_active(parked_key(one))]
        runs = await self.database.runs([reaction.run for reaction in failures]) if failures else {}
        for reaction in failures:
            self.raise_(parked(reaction, str(runs.get(reaction.run, f"run {reaction.run}"))))

    def _active_keys(self, prefix: str) -> set[str]:
        return {key for key in self._known if key.startswith(prefix) and self._is_active(key)}

    async def keep(self) -> None:
        """Write what is not in the database yet. Raises `DatabaseError`."""
        async with self._writing:
            try:
                await self._write(self._unkept)
            except DatabaseError as error:
                if not concerns_one(error):
                    raise
                await self._write_apart()

    async def _write_apart(self) -> None:
        """Write one by one, so that an alarm which the database refuses does not block others."""
        for key in sorted(self._unkept):
            try:
                await self._write({key})
            except DatabaseError as error:
                if not concerns_one(error):
                    raise
                logger.error("the alarm {!r} cannot be stored: {}", key, error)
                self._unkept.discard(key)

    async def _write(self, keys: Iterable[str]) -> None:
        keys = set(keys)
        if not keys:
            return
        self._unkept -= keys  # before the write: one that changes meanwhile is written again
        kept = [self._known[key] for key in keys if key in self._known]
        try:
            await self.database.keep_alarms(self.lease, kept, list(keys - self._known.keys()))
        except BaseException:
            self._unkept |= keys
            raise

    async def run(self) -> None:
        """Keep and deliver, until cancelled. Raises `LeaseLost`."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_all)
            for recipient in self.recipients:
                nursery.start_soon(self._deliver_all, recipient)

    async def _keep_all(self) -> None:
        while True:
            changed, wait = self._changed, AGAIN
            self._forget()
            with unless_fatal("alarms cannot be stored"):
                await self.keep()
                wait = SWEEP
            with trio.move_on_after(wait):
                await changed.wait()

    def _forget(self) -> None:
        now, rules = utcnow(), [one.rule for one in self.recipients]
        for key, state in list(self._known.items()):
            if forgettable(state, rules, now):
                del self._known[key]
                self._shown_by.pop(key, None)
                self._unkept.add(key)
        # At half of it only, so that the alarm does not flap.
        if len(self._known) < MOST // 2:
            self.clear("crowded")

    # -- delivering -------------------------------------------------------------------------

    async def _deliver_all(self, recipient: Recipient) -> None:
        while True:
            changed = self._changed
            due = [next_delivery(one, recipient.rule) for one in self._known.values()]
            first = min((one.at for one in due if one), default=None)
            wait = SWEEP if first is None else (first - utcnow()).total_seconds()
            if wait > 0:
                with trio.move_on_after(min(wait, SWEEP)):
                    await changed.wait()
                continue
            # A disk that fills up fails many reactions at once: they share a message.
            await trio.sleep(GATHER)
            await self.deliver(recipient)
            await trio.sleep(PAUSE)

    async def leave(self, *, deliver: bool) -> None:
        """Keep what is not kept yet; before that, with `deliver`, deliver what is due.

        If the database does not take it, the next process raises what is still wrong.
        """
        if deliver:
            async with trio.open_nursery() as nursery:
                for recipient in self.recipients:
                    nursery.start_soon(self.deliver, recipient)
        self._forget()
        try:
            await self.keep()
        except DatabaseError as error:
            logger.warning("alarms cannot be stored: {}", error)

    async def hang_up(self) -> None:
        """Deliver nothing more; returns when the deliveries under way have ended.

        If one were cut short, the next process would repeat it.
        """
        # Never released: further deliveries wait until the listener is gone.
        for recipient in self.recipients:
            await self._sending[recipient.name].acquire()

    async def deliver(self, recipient: Recipient) -> None:
        """Deliver to one sink what is due now; what fails is due again later."""
        async with self._sending[recipient.name]:
            now = utcnow()
            due = [(one, next_delivery(one, recipient.rule)) for one in self._known.values()]
            # First what has begun, so that no end is reported before its beginning.
            for over in (False, True):
                group = [one for one, what in due if what and what.over is over and what.at <= now]
                for batch in messages(group):
                    why = await try_send(recipient.notifier, together(batch), over=over)
                    if why is not None:  # perhaps its password has changed
                        recipient.renew()
                    self._record(recipient.name, batch, why, over=over)

    def _record(self, sink: str, batch: list[AlarmState], why: str | None, *, over: bool) -> None:
        now = utcnow()
        for key in [state.alarm.key for state in batch]:
            before = self._known.get(key)
            if before is None:
                continue
            if why is None:
                self._known[key] = delivered(before, sink, now, over=over)
            else:
                jitter = random()  # noqa: S311  # not for secrets
                self._known[key] = delivery_failed(before, sink, why, now, jitter=jitter)
            self._note(key)
        if why is not None:
            logger.error("{} of {} alarms could not be delivered: {}", sink, len(batch), why)
        undelivered = sum(sink in one.undelivered for one in self._known.values())
        metrics.undelivered.labels(self.lease.site, sink).set(undelivered)


def _without_details(state: AlarmState) -> AlarmState:
    """Return a state to compare: new details alone are worth neither a write nor a log line."""
    return evolve(state, alarm=evolve(state.alarm, details={}))


async def try_send(notifier: Notifier, alarm: Alarm, *, over: bool) -> str | None:
    """Send an alarm; returns why that failed, or None."""
    try:
        await notifier.send(alarm, over=over)
    except DeliveryFailed as error:
        return str(error)
    except Exception as error:  # noqa: BLE001  # others' notifiers may raise anything
        logger.opt(exception=error).error("a notifier failed: {!r}", error)
        return one_line(error)
    return None
