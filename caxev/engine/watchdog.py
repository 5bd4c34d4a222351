"""Notice that the process's loop is blocked, name the handler, and keep the lease meanwhile.

A handler that computes, sleeps or reads a dead disk without awaiting stops everything: the lease
lapses, another process begins the same reaction and stops as well. `session` and `helping` start a
`Watchdog` with each lease: a task of the loop gives a beat, and a thread of its own waits for it.
While the beat is missing, the thread logs which handler is at work at which line, keeps an alarm,
and renews the lease, for `PATIENCE` at most. When the lease cannot be kept, it ends the process:
nothing else could end the handler, and another process makes its reaction.

A library in C that holds the interpreter's lock stops this thread as well, and all other Python
code. Then the lease lapses, and systemd, which gets no notification, ends the process after
`WatchdogSec`; after `INTERRUPTIONS` such ends the reaction is parked as failed.
`faulthandler` needs no lock: after `HELD` it writes to stderr what every thread is doing, so the
handler can be found.
"""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from inspect import unwrap
from threading import Event, Thread, get_ident
from time import monotonic
from types import CodeType, FrameType
from typing import Final

import trio
from attrs import define, field, frozen
from loguru import logger

from caxev.config import ConfigError
from caxev.core.alarms import Alarm, Alarms, of_helper, raised
from caxev.core.clock import utcnow
from caxev.core.registry import Handler
from caxev.database import DatabaseError, LeaseKeeper
from caxev.engine.context import Context
from caxev.engine.fence import Fence
from caxev.engine.lease import HELD as HELD_LEASE
from caxev.engine.leaving import leave_at_once
from caxev.engine.systemd import notify

BLOCKED: Final = 3.0
"""Seconds without a beat after which the loop is reported as blocked."""
PATIENCE: Final = 600.0
"""Seconds for which a blocked process keeps its lease, and is reported as alive to systemd."""
HELD: Final = 10.0
"""Seconds that code may hold the interpreter's lock before the stacks are written to stderr."""
FREE: Final = 60.0
"""Seconds without a block after which the alarm is over."""
KEY: Final = "blocked"
LONGEST_BEAT: Final = 1.0
SHORTEST: Final = 0.05
"""Seconds that a renewal gets at least, and between two."""


@frozen
class Culprit:
    """The cause of a blocked loop: the handler, if it is one, and the line that was running."""

    handler: str | None
    place: str

    def __str__(self) -> str:
        who = f"the handler {self.handler}" if self.handler else "caxev itself"
        return f"{who} ({self.place})"


def handlers_by_code(handlers: Iterable[Handler]) -> dict[CodeType, str]:
    """Return the names of handlers by the code of their functions and decisions."""
    functions = (
        (one, made)
        for one in handlers
        for made in (one.function, one.decide, one.concerns)
        if made is not None
    )
    codes = ((getattr(unwrap(made), "__code__", None), one.name) for one, made in functions)
    return {code: name for code, name in codes if code is not None}


def culprit(frame: FrameType, handlers: Mapping[CodeType, str]) -> Culprit:
    """Find out what is at work in a thread, given its innermost frame.

    The line is that of the handler's own module, or else the innermost.
    """
    frames = [frame]
    while (outer := frames[-1].f_back) is not None:
        frames.append(outer)
    at_work = next((one for one in frames if one.f_code in handlers), None)
    if at_work is None:
        return Culprit(None, _line(frame))
    file = at_work.f_code.co_filename
    where = next(one for one in frames if one.f_code.co_filename == file)
    return Culprit(handlers[at_work.f_code], _line(where))


def _report_unless_called_again() -> None:
    """Have the stack of each thread written to stderr after `HELD`, even if the lock is held."""
    with suppress(AttributeError, OSError, RuntimeError, ValueError):  # stderr is closed
        faulthandler.dump_traceback_later(HELD, file=sys.__stderr__ or sys.stderr)


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}, line {frame.f_lineno}"


def blocking(site: str, who: Culprit) -> Alarm:
    """Return the alarm that the process is blocked."""
    return Alarm(
        site,
        KEY,
        f"{site}: the event loop is blocked by {who.handler or 'caxev itself'}",
        details={
            "where": who.place,
            "what to do": "move heavy work to another process: await job.work(function)",
        },
    )


@define(eq=False)
class Watchdog:
    """Watches the loop that runs `run`, for one lease. `fence`: until when what we claimed is ours.

    `alarms` are those about this process.
    """

    context: Context
    alarms: Alarms
    fence: Fence = field(factory=Fence)
    _keeper: LeaseKeeper = field(init=False)
    _handlers: Mapping[CodeType, str] = field(init=False)
    _lease_time: float = field(init=False)
    _beats: int = field(init=False, default=0)
    _over: Event = field(init=False, factory=Event)
    _blocked: float = field(init=False, default=0.0)
    _found: list[Culprit] = field(init=False, factory=list)

    def __attrs_post_init__(self) -> None:
        options, lease = self.context.options, self.context.lease
        self._lease_time = options.lease_time
        self._keeper = LeaseKeeper(options.settings, lease, self._lease_time * HELD_LEASE)
        self._handlers = handlers_by_code(options.registry.handlers.values())

    async def run(self) -> None:
        """Give the beat; raise an alarm after a block, and clear it later; forever."""
        self._blocked = trio.current_time()  # a former process may have left an alarm
        _report_unless_called_again()
        thread = Thread(target=self._watch, args=(get_ident(),), name="watchdog", daemon=True)
        thread.start()
        try:
            while True:
                self._beats += 1
                while self._found:
                    self.alarms.raise_(blocking(self.context.lease.site, self._found.pop()))
                    self._blocked = trio.current_time()
                if trio.current_time() >= self._blocked + FREE:
                    self.alarms.clear(KEY)
                await trio.sleep(self._every)
        finally:
            self._over.set()

    @property
    def _every(self) -> float:
        return min(self._lease_time / 10, LONGEST_BEAT)

    # -- the thread -------------------------------------------------------------------------

    def _watch(self, loop: int) -> None:
        try:
            while not self._over.wait(self._every):
                _report_unless_called_again()
                beats = self._beats
                # Twice, because a process that was stopped as a whole finds its beat late once.
                if not self._over.wait(self._every) and beats == self._beats:
                    self._sit_out(loop, beats)
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._keeper.close()

    def _sit_out(self, loop: int, beats: int) -> None:
        """Keep the lease while the loop is blocked; end the process if it cannot be kept."""
        since = monotonic() - self._every
        report_at, keeping = since + BLOCKED, True
        while beats == self._beats and not self._over.is_set():
            _report_unless_called_again()
            now = monotonic()
            # A database that does not answer must not keep us beyond the fence.
            self._keeper.limit = max(min(self._lease_time, self.fence.last) / 3, SHORTEST)
            keeping = keeping and now - since <= PATIENCE and self._renewed(now)
            if keeping:
                notify("WATCHDOG=1")
            if now >= report_at:
                self._report(loop, now - since, keeping=keeping)
                # After twice the time each: a block of an hour gives a dozen lines.
                report_at = since + 2 * (now - since)
            # Not at once: a loop that was only slow, or stopped as a whole, finds out by itself.
            late = not keeping or self.fence.last <= 0
            if late and now - since >= BLOCKED:
                logger.critical("blocked for {:.0f} s, and the lease cannot be kept", now - since)
                leave_at_once(1)
            self._over.wait(min(2 * self._every, max(self.fence.last, SHORTEST)))

    def _renewed(self, now: float) -> bool:
        try:
            if not self._keeper.renew():
                return False
            self.fence.renewed(now)
        except (ConfigError, DatabaseError) as error:
            logger.debug("the lease of a blocked process is not renewed: {}", error)
        # No answer is not a loss: if another process has taken over, the next renewal that gets
        # through shows it. Until then a helper is bounded by its fence.
        return True

    def _report(self, loop: int, seconds: float, *, keeping: bool) -> None:
        frame = sys._current_frames().get(loop)  # noqa: SLF001  # the way to see another thread
        if frame is None:
            return
        who = culprit(frame, self._handlers)
        logger.error("the event loop has been blocked for {:.0f} s by {}", seconds, who)
        if self._found:
            return
        self._found.append(who)
        if keeping:
            self._keep_alarm(who)

    def _keep_alarm(self, who: Culprit) -> None:
        lease = self.context.lease
        alarm = blocking(lease.site, who)
        if self.context.is_helper:
            alarm = of_helper(alarm, lease.owner)
        try:
            self._keeper.keep_alarm(raised(None, alarm, utcnow()))
        except (ConfigError, DatabaseError) as error:
            logger.debug("the alarm about a blocked process cannot be stored: {}", error)
