"""The input of a handler, its results, and the errors that it may raise.

`engine.runner` makes a `Job` for each attempt. Handlers see this module, `model` and `registry`
through ``from caxev import ...`` and need nothing else. The job's abilities are ports, which
`engine.ports` implements: they write to the database or run work in another process.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from contextlib import AbstractContextManager, suppress
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

from attrs import define, field, frozen

from caxev.core.alarms import Alarm, Severity
from caxev.core.clock import Clocks, clock, utcnow
from caxev.core.errors import Retry, Superseded
from caxev.core.history import Deed, joined
from caxev.core.model import Copy, CopyField, CopyKey, Event, Run, RunId, new_id
from caxev.core.transcript import packed
from caxev.core.update import RunUpdate

if TYPE_CHECKING:
    from loguru import Logger

T = TypeVar("T")


@frozen
class Skip:
    """Return this from a handler that did nothing, with the reason; it leaves no history."""

    why: str


@frozen
class Unmet(Skip):
    """A `Skip` for want of a condition that may still be met: then there would be something to do.

    `caxev explain` shows it among what is missing, and any other `Skip` only with ``--all``.
    """


@frozen
class Wait:
    """A decision: there is nothing to do before `until` (UTC)."""

    why: str
    until: datetime

    def retry(self, now: datetime) -> Retry:
        """Return the error that a handler raises, so that its reaction is due at `until`."""
        return Retry(self.why, after=max((self.until - now).total_seconds(), 1.0))


class Ports(Protocol):
    """The effects that a job can have on the world. `engine.ports` implements it; tests may."""

    async def update(
        self, update: RunUpdate, *, now: datetime, deed: Deed | None = None
    ) -> Run | None: ...
    async def work(self, function: Callable[..., T], *args: object, job: Job) -> T: ...
    async def keep(self, said: bytes) -> None: ...
    async def store_manifest(self, digest: str, items: list[dict[str, Any]]) -> None: ...
    async def load_manifest(self, digest: str) -> list[dict[str, Any]] | None: ...
    async def table(self, name: str) -> list[dict[str, Any]]: ...
    async def alarm(self, alarm: Alarm) -> None: ...
    async def all_clear(self, key: str) -> None: ...
    async def is_live(self, owner: str, run: RunId, trigger: str | None) -> bool: ...
    async def has_listened(self, site: str) -> bool: ...
    async def oldest(self, type: str, without: Collection[str], skip: int) -> list[Run]: ...  # noqa: A002
    async def neighbours(self, wanted: Any) -> list[Run]: ...
    def yield_slot(self) -> AbstractContextManager[None]: ...


@cache
def _logger() -> Logger:
    from loguru import logger

    return logger


class _NoPorts:
    def __getattr__(self, name: str) -> Any:
        raise TypeError(f"this job was made without ports: it has no {name}")


@define
class Job:
    """One attempt at one reaction.

    `run` is the run as it is now; `event` is the reason for the attempt. `site` is the site that
    this process serves, `sites` all of them by name (`caxev.config.Site`). `owner` marks entries
    that this process works on (``lngs#7``: site and epoch). The job with the greater `urgency`
    (priority, then how new) goes first. `at` is when the event happened, UTC. A test needs to give
    `run` and `event` only.
    """

    run: Run
    event: Event
    site: Any = None
    sites: Any = None
    owner: str = ""
    log: Logger = field(factory=_logger)
    ports: Ports = field(factory=_NoPorts)
    on_progress: Callable[[int, int], None] = lambda _done, _total: None
    if_parked: tuple[RunUpdate, ...] = ()
    deed: Deed | None = None
    has_noted: bool = False
    urgency: tuple[int, int] = (0, 0)
    at: datetime = field(factory=utcnow)
    handler: str = ""

    @property
    def copy(self) -> Copy | None:
        """The copy that the event is about, as it is now; None if it is gone, or was no copy."""
        key = self._copy_key
        return None if key is None else self.run.copy(key)

    @property
    def _copy_key(self) -> CopyKey | None:
        aspect = self.event.aspect
        if isinstance(aspect, CopyField):
            return aspect.key
        return aspect if isinstance(aspect, CopyKey) else None

    @staticmethod
    def now() -> datetime:
        """Return the database's time, UTC, to the millisecond (as it is kept there)."""
        return utcnow()

    @staticmethod
    def safe_now() -> datetime:
        """Return the earlier of the database's time and this machine's, as `now` does.

        Use it before what cannot be undone: one clock that is wrong then does not make it early.
        """
        return clock.safe_now()

    @staticmethod
    def clocks() -> Clocks:
        """Return the time by the database's clock and by this machine's."""
        return clock.both()

    async def update(self, update: RunUpdate) -> Run:
        """Write to the run document at once, and return the run as it is then.

        Raises `Superseded` if the run is no longer what `update` expects, and ValueError if the
        update is of another run. On cancellation the update may or may not have happened.
        """
        self._check_own(update)
        # The ledger must still have our claim: a deposed process writes nothing to a run. The deed
        # is written with it: a process that dies right after has left both, or none.
        run = await self.ports.update(update, now=self.now(), deed=self.deed)
        if run is None:
            raise Superseded(f"{self.run} is no longer as it was when this began")
        self.has_noted |= self.deed is not None
        self.deed = None
        # The next update of this handler expects the run as this one left it.
        self.run = run
        return run

    def _check_own(self, *updates: RunUpdate) -> None:
        for update in updates:
            if update.run != self.run.id:
                raise ValueError(f"an update of another run ({update.run}): use job.update_other")

    async def update_other(self, update: RunUpdate) -> bool:
        """Write to another run's document; return False if it is not what `update` expects.

        Nothing of it is rolled back if this attempt fails later. On cancellation it may or may not
        have happened.
        """
        return await self.ports.update(update, now=self.now()) is not None

    async def suspect(self, copy: Copy) -> None:
        """Ask for a fresh reading of a copy that gave other bytes than it should.

        Its own site reads it, and makes it ``error`` if it is bad. If it has just changed, nothing
        is asked.
        """
        # A change since we read it is news of its own; the next attempt sees it.
        with suppress(Superseded):
            await self.update(RunUpdate.ask(self.run, copy, new_id(), self.now()))

    async def is_live(self, owner: str, trigger: str | None = None) -> bool:
        """Return whether the process that marked an entry of this run may still work on it.

        It may while it acts for its site and has not settled the reaction that the entry's
        `trigger` names, or while it shows progress with this run.
        """
        return await self.ports.is_live(owner, self.run.id, trigger)

    async def has_listened(self, site: str) -> bool:
        """Return whether a caxev has ever acted for that site. If not, no request is answered."""
        return await self.ports.has_listened(site)

    async def oldest(
        self,
        type: str,  # noqa: A002  # the field's own name
        without: Collection[str] = (),
        *,
        skip: int = 0,
    ) -> list[Run]:
        """Return the runs of which this site has data of this type, the oldest first.

        Only runs whose copy here is ``transferred`` or ``deleting``, and that have none of the tags
        `without`; 1000 at most, after the first `skip`. By the start of the run.
        """
        return await self.ports.oldest(type, without, skip)

    async def neighbours(self, wanted: Any) -> list[Run]:
        """Read the runs with entries that `wanted` describes: `caxev.copies.sharing.Neighbours`."""
        return await self.ports.neighbours(wanted)

    async def work(self, function: Callable[..., T], *args: object) -> T:
        """Run ``function(*args)`` in a worker process and return what it returns.

        For heavy work: moving bytes, hashing. `function` is a module's top-level function;
        arguments and result are pickled. If it has a parameter `report`, it may call
        ``report(done, total)`` (bytes) as it goes. Its errors are raised here, and `Retry` if the
        process dies. On cancellation the process and the programs that it has started are killed,
        and files that it wrote stay.
        """
        return await self.ports.work(function, *args, job=self)

    def yield_slot(self) -> AbstractContextManager[None]:
        """Let others of the lane work while the block waits for something else than a worker.

        For a place on a link, for example. At most `caxev.engine.lanes.MOST_ASIDE` of a lane wait.
        """
        return self.ports.yield_slot()

    def progress(self, done: int, total: int) -> None:
        """Report progress, in bytes; that resets the stall detector."""
        self.on_progress(done, total)

    def on_failure(self, *updates: RunUpdate) -> None:
        """Set what to write to the run if this reaction is parked as failed; replaces the last.

        Raises ValueError if one of the updates is of another run.
        """
        self._check_own(*updates)
        self.if_parked = updates

    def did(self, what: str, **facts: Any) -> None:
        """Set what the history shows of this attempt: `what` was done, with the facts of a `Deed`.

        It is written together with the next update, which is what makes it true, or at the end.
        Called again before that, it adds to what was set. Without it, an attempt that does not
        return a `Skip` is shown as done.

        Example: ``job.did("transferred", source="lngs", bytes=moved)``.
        """
        self.deed = joined(self.deed, Deed(what=what, **facts))

    async def alarm(
        self,
        name: str,
        summary: str,
        *,
        severity: Severity | str = Severity.ERROR,
        about: object = None,
        **details: object,
    ) -> None:
        """Raise an alarm, which the site's ``alarms`` deliver; `details` are further lines.

        It is in the database when this returns, and is delivered later. `name` and the copy that
        the event is about (or the run, or the run and `about`) identify it: raised again, it is the
        same alarm. It is active until a reaction to the same copy or run calls `all_clear`.
        `severity` is ``warning``, ``error`` or ``critical``; raises ValueError for another.
        """
        site = getattr(self.site, "name", "")
        key = self._alarm_key(name, about)
        level = Severity(severity)
        label, run_id = str(self.run), self.run.id
        alarm = Alarm(site, key, summary, level, label, details, run_id=run_id)
        await self.ports.alarm(alarm)

    async def all_clear(self, name: str, *, about: object = None) -> None:
        """End the alarm of that name, if it is active; else this costs nothing."""
        await self.ports.all_clear(self._alarm_key(name, about))

    def _alarm_key(self, name: str, about: object) -> str:
        # Several copies of a run can be in trouble at once: each has an alarm of its own.
        about = about or self._copy_key
        return f"{name}: {self.run.id}{'' if about is None else f': {about}'}"

    async def keep(self, output: str) -> None:
        """Keep the output of a program with this reaction, behind the parts that are kept already.

        The last `KEPT_PARTS` parts stay, and of a large one its beginning and end (`packed`, in
        `caxev.core.transcript`). ``caxev reactions --json`` shows them; when the reaction is done,
        the history keeps them.
        """
        await self.ports.keep(packed(output))

    async def store_manifest(self, digest: str, items: list[dict[str, Any]]) -> None:
        """Keep a manifest's items (`Manifest.to_rows`) under its `digest`. Repeatable."""
        await self.ports.store_manifest(digest, items)

    async def load_manifest(self, digest: str) -> list[dict[str, Any]] | None:
        """Return the items of the manifest with that digest, for `Manifest.from_rows`; or None."""
        return await self.ports.load_manifest(digest)

    async def table(self, name: str) -> list[dict[str, Any]]:
        """Return all rows of a collection beside the runs; none if there is no such collection.

        Raises `GiveUp` if it is larger than any table of corrections is.
        """
        return await self.ports.table(name)


Result = RunUpdate | Skip | None
"""The result of a handler: a last update (written together with the settlement), or nothing."""

Decision = Skip | Wait | None
"""The result of a handler's decision: nothing to do, not yet, or (None) run the handler."""


_NOTHING: Final = Skip("it concerns no copy of ours, and no site")


def skip_of(*plans: object) -> Skip | None:
    """Return one `Skip` for several plans, or None if one of them is something to do."""
    skipped = [plan for plan in plans if isinstance(plan, Skip)]
    if len(skipped) < len(plans):
        return None
    if len(skipped) <= 1:  # as of most: it is asked several times for each change
        return skipped[0] if skipped else _NOTHING
    # A condition that may still be met matters most: the other reasons are for good.
    unmet = [one for one in skipped if isinstance(one, Unmet)]
    whys = dict.fromkeys(one.why for one in unmet or skipped)
    why = "; ".join(whys)
    return Unmet(why) if unmet else Skip(why)


HandlerFunction = Callable[[Job], Awaitable[Result]]
