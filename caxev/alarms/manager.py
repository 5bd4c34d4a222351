"""Where a site's alarms come together, are kept, and are told.

`dispatcher`, `watcher` and `Vitals` raise alarms here (`sound`, `clear`: neither waits nor fails),
handlers by way of their job (`raise_and_keep`). What stands is held in memory, is written to the
database as soon as that can be reached, and is read from there by the next process. One task for
each sink tells it what is due: a sink that hangs holds up nobody else.

A sink is told before it is written down that it was: a process that is killed in between tells it
again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from random import random
from typing import Final

import trio
from attrs import define, evolve, field
from loguru import logger

from caxev import metrics
from caxev.alarms.base import Notifier, Undelivered
from caxev.config import ConfigError
from caxev.core.alarms import (
    DEAF,
    PARKED,
    REFUSED,
    Alarm,
    Rule,
    Standing,
    cleared,
    crowded,
    delivered,
    forgettable,
    messages,
    news,
    parked,
    parked_key,
    raised,
    refused_key,
    same_cause,
    together,
    undelivered,
)
from caxev.core.clock import utcnow
from caxev.core.errors import one_line
from caxev.core.ledger import State
from caxev.database import Database, DatabaseError, Lease, concerns_one, is_fatal

GATHER: Final = 2.0
"""Seconds from the first alarm that is due to the telling: what comes with it goes with it."""
PAUSE: Final = 60.0
"""Seconds between two tellings of one sink."""
MOST: Final = 1000
"""Alarms that stand one by one at a site."""
AGAIN: Final = 5.0
"""Seconds until the database is tried again."""
SWEEP: Final = 3600.0
"""Seconds at most between two looks at what can be forgotten, and at the clock."""


@define(eq=False)
class Addressee:
    """A sink: what it is told, and by what. `make` makes the notifier anew, with its secrets."""

    rule: Rule
    notifier: Notifier
    make: Callable[[], Notifier] | None = None

    def renew(self) -> None:
        """Read its secrets again: a password may have been renewed."""
        try:
            self.notifier = self.notifier if self.make is None else self.make()
        except ConfigError as error:
            logger.error("{} stays as it was: {}", self.name, error)

    @property
    def name(self) -> str:
        return self.rule.sink


@define(eq=False)
class Desk:
    """One site's alarms. Implements `caxev.core.alarms.Alarms`. Use `open`, then `run`."""

    database: Database
    lease: Lease
    addressees: list[Addressee]
    gather: float = field(factory=lambda: GATHER)
    pause: float = field(factory=lambda: PAUSE)
    _known: dict[str, Standing] = field(init=False, factory=dict)
    _unkept: set[str] = field(init=False, factory=set)
    _cause: dict[str, str] = field(init=False, factory=dict)
    """By which alarm each one is told: several of one cause by that of the first, until all end."""
    _changed: trio.Event = field(init=False, factory=trio.Event)
    _pen: trio.Lock = field(init=False, factory=trio.Lock)
    _turns: defaultdict[str, trio.Lock] = field(init=False, factory=lambda: defaultdict(trio.Lock))

    @property
    def standing(self) -> list[Standing]:
        """The alarms that stand now."""
        return [one for one in self._known.values() if one.stands]

    # -- raising ----------------------------------------------------------------------------

    def sound(self, alarm: Alarm) -> None:
        """Raise an alarm; nothing new if it stands, or another one of the same cause does."""
        told_by = self._told_by(alarm)
        if self._cause.get(alarm.key, told_by) != told_by:
            self.clear(alarm.key)  # it has another cause by now
        self._cause[alarm.key] = told_by
        if told_by != alarm.key:
            return
        if len(self._known) >= MOST and alarm.key not in self._known:
            alarm = crowded(alarm.site, MOST)
        before = self._known.get(alarm.key)
        after = raised(before, alarm, utcnow())
        self._known[alarm.key] = after
        if before is None or _said(before) != _said(after):
            logger.log("WARNING", "alarm: {}", alarm.summary)
            self._note(alarm.key)

    def clear(self, key: str) -> None:
        """End an alarm, if it stands and no other one of its cause still does."""
        key = self._cause.pop(key, key)
        if not self._stands(key) or key in self._cause.values():
            return
        before = self._known[key]
        self._known[key] = after = cleared(before, utcnow())
        if not after.stands:
            logger.info("over: {}", before.alarm.summary)
            self._note(key)

    def _told_by(self, alarm: Alarm) -> str:
        """Return the key of the alarm that is told for this one: its own, or one of its cause."""
        if self._stands(alarm.key):
            return alarm.key
        found = (one.alarm.key for one in self.standing if same_cause(one.alarm, alarm))
        return next(found, alarm.key)

    def _stands(self, key: str) -> bool:
        return key in self._known and self._known[key].stands

    async def raise_and_keep(self, alarm: Alarm) -> None:
        """Raise an alarm; returns when it is kept. Raises `DatabaseError` where it may not be."""
        self.sound(alarm)
        await self._keep_one(alarm.key)

    async def clear_and_keep(self, key: str) -> None:
        """End an alarm for all that it is told for, and keep that. Raises `DatabaseError`."""
        self._cause = {one: told_by for one, told_by in self._cause.items() if told_by != key}
        self.clear(key)
        await self._keep_one(key)

    async def _keep_one(self, key: str) -> None:
        async with self._pen:  # it may be being written now
            if key in self._unkept:
                await self._write()

    def _note(self, key: str) -> None:
        self._unkept.add(key)
        changed, self._changed = self._changed, trio.Event()
        changed.set()
        metrics.alarms.labels(self.lease.site).set(len(self.standing))

    # -- keeping ----------------------------------------------------------------------------

    async def open(self) -> None:
        """Read what stands, and raise an alarm for each reaction that has failed meanwhile.

        So none is lost where a process was killed between the failure and the alarm.
        """
        site = self.lease.site
        self._known = {one.alarm.key: one for one in await self.database.alarms(site)}
        self._cause = {key: key for key in self._known if self._stands(key)}
        failed = await self.database.reactions(site, state="failed", limit=MOST)
        about = [key for key in self._known if key.startswith(PARKED) and self._stands(key)]
        for key in [key for key in self._known if key.startswith(DEAF)]:
            self.clear(key)  # with its process
        refusals = {key for key in self._known if key.startswith(REFUSED) and self._stands(key)}
        if refusals:
            for key in refusals - {refused_key(one) for one in await self.database.hindered(site)}:
                self.clear(key)
        reactions = await self.database.standing([key.removeprefix(PARKED) for key in about])
        untold = [reaction for reaction, _ in failed if not self._stands(parked_key(reaction))]
        runs = await self.database.runs([reaction.run for reaction in untold]) if untold else {}
        for reaction in untold:
            self.sound(parked(reaction, str(runs.get(reaction.run, f"run {reaction.run}"))))
        for key in about:  # last, since it may stand for others of its cause that have failed
            found = reactions.get(key.removeprefix(PARKED))
            if found is None or found.state is State.DONE:
                self.clear(key)

    async def keep(self) -> None:
        """Write what is not in the database yet. Raises `DatabaseError`."""
        async with self._pen:
            try:
                if self._unkept:
                    await self._write()
            except DatabaseError as error:
                if not concerns_one(error):
                    raise
                await self._write_apart()

    async def _write_apart(self) -> None:
        """Write one by one: what the database refuses of one keeps no other from being kept."""
        for key in sorted(self._unkept):
            try:
                await self._write({key})
            except DatabaseError as error:
                if not concerns_one(error):
                    raise
                logger.error("the alarm {!r} cannot be kept: {}", key, error)
                self._unkept.discard(key)

    async def _write(self, keys: set[str] | None = None) -> None:
        keys = set(self._unkept) if keys is None else keys
        self._unkept -= keys
        kept = [self._known[key] for key in keys if key in self._known]
        gone = [key for key in keys if key not in self._known]
        done = False
        try:
            await self.database.keep_alarms(self.lease, kept, gone)
            done = True
        finally:
            if not done:
                self._unkept |= keys

    async def run(self) -> None:
        """Keep and tell, for ever. Raises `LeaseLost`."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_all)
            for addressee in self.addressees:
                nursery.start_soon(self._tell_on, addressee)

    async def _keep_all(self) -> None:
        while True:
            changed, wait = self._changed, SWEEP
            self._forget()
            if self._unkept:
                wait = await self._kept()
            with trio.move_on_after(wait):
                await changed.wait()

    async def _kept(self) -> float:
        """Write what is to be written; returns in how many seconds to look again."""
        try:
            await self.keep()
        except DatabaseError as error:
            if is_fatal(error):
                raise
            logger.debug("alarms wait for the database: {}", error)
            return AGAIN
        return SWEEP

    def _forget(self) -> None:
        now, rules = utcnow(), [one.rule for one in self.addressees]
        for key, standing in list(self._known.items()):
            if forgettable(standing, rules, now):
                del self._known[key]
                self._cause.pop(key, None)
                self._unkept.add(key)
        if len(self._known) < MOST // 2:
            self.clear("crowded")

    # -- telling ----------------------------------------------------------------------------

    async def _tell_on(self, addressee: Addressee) -> None:
        while True:
            changed = self._changed
            wait = self._until_news(addressee)
            if wait > 0:
                with trio.move_on_after(min(wait, SWEEP)):
                    await changed.wait()
                continue
            await trio.sleep(self.gather)
            await self.tell(addressee)
            await trio.sleep(self.pause)

    def _until_news(self, addressee: Addressee) -> float:
        found = (news(one, addressee.rule) for one in self._known.values())
        times = [one.at for one in found if one is not None]
        if not times:
            return float("inf")
        return (min(times) - utcnow()).total_seconds()

    async def leave(self, *, telling: bool) -> None:
        """Keep what is not kept yet; before that, with `telling`, tell every sink what is due.

        Where the database does not take it, the next process raises what still stands.
        """
        if telling:
            async with trio.open_nursery() as nursery:
                for addressee in self.addressees:
                    nursery.start_soon(self.tell, addressee)
        self._forget()
        try:
            await self.keep()
        except DatabaseError as error:
            logger.warning("alarms are not kept: {}", error)

    async def hang_up(self) -> None:
        """Tell nobody any more, once what is being told now has been told.

        Cut short, it would be told again by the next process.
        """
        for addressee in self.addressees:
            await self._turns[addressee.name].acquire()

    async def tell(self, addressee: Addressee) -> None:
        """Tell one sink what is due now; what it could not be told is due again later."""
        async with self._turns[addressee.name]:
            await self._tell(addressee)

    async def _tell(self, addressee: Addressee) -> None:
        now = utcnow()
        due = [(one, news(one, addressee.rule)) for one in self._known.values()]
        for over in (False, True):
            group = [one for one, what in due if what and what.over is over and what.at <= now]
            for batch in messages(group):
                why = await attempted(addressee.notifier, together(batch), over=over)
                if why is not None:
                    addressee.renew()
                self._told(addressee.name, batch, why, over=over)

    def _told(self, sink: str, batch: list[Standing], why: str | None, *, over: bool) -> None:
        now = utcnow()
        for key in [standing.alarm.key for standing in batch]:
            before = self._known.get(key)
            if before is None:
                continue
            if why is None:
                self._known[key] = delivered(before, sink, now, over=over)
            else:
                jitter = random()  # noqa: S311  # not for secrets
                self._known[key] = undelivered(before, sink, why, now, jitter=jitter)
            self._note(key)
        if why is not None:
            logger.error("{} of {} alarms could not be told: {}", sink, len(batch), why)
        untold = sum(sink in one.untold for one in self._known.values())
        metrics.untold.labels(self.lease.site, sink).set(untold)


def _said(standing: Standing) -> object:
    """What people see of an alarm, so that it is worth a write when it changes."""
    return evolve(standing, alarm=evolve(standing.alarm, details={}))


async def attempted(notifier: Notifier, alarm: Alarm, *, over: bool) -> str | None:
    """Send it; returns why it was not sent, None where it was."""
    try:
        await notifier.send(alarm, over=over)
    except Undelivered as error:
        return str(error)
    except Exception as error:  # noqa: BLE001  # others' notifiers may raise anything
        logger.opt(exception=error).error("a notifier failed: {!r}", error)
        return one_line(error)
    return None
