"""Runs that cannot be recorded: each is shown by a failed reaction of its own, and by an alarm.

The database refuses one, or it has too many copies to be served. `recorder` parks such a run, goes
on behind it, and tries it again when it changes or a person asks for that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from attrs import define, evolve, field
from loguru import logger

from caxev.core.alarms import PARKED, parked
from caxev.core.clock import utcnow
from caxev.core.ledger import UNREADABLE, Reaction, State, reaction_key
from caxev.core.model import YES, Event, Existence, RunId
from caxev.core.recording import MOST_COPIES
from caxev.database import DatabaseError, Ingest, InvalidDocument, Position, concerns_one
from caxev.engine.context import Context


@define(eq=False)
class UnreadableRuns:
    """The runs of one lease that cannot be recorded. `generations` are the recorder's."""

    context: Context
    generations: Iterator[int]
    runs: set[RunId] = field(init=False, factory=set)

    async def load(self) -> None:
        """Read which runs could not be recorded by a former process."""
        database, site = self.context.database, self.context.lease.site
        pages = database.reaction_pages(site, State.FAILED.value, UNREADABLE)
        self.runs = {reaction.run async for page in pages for reaction, _ in page}

    def among(self, runs: Iterable[RunId]) -> set[RunId]:
        """Return which of these runs cannot be recorded."""
        return self.runs.intersection(runs)

    async def park_oversized(self, run: RunId, copies: int) -> None:
        """Park a run that has too many copies, once; its changes lead to nothing here."""
        if run not in self.runs:
            why = f"it has more than {MOST_COPIES} copies ({copies} or more), and is not served"
            await self.park(run, None, InvalidDocument(why))

    async def park(self, run: RunId, position: Position | None, error: DatabaseError) -> None:
        """Park a run that the database refuses to record, and continue with the next."""
        context = self.context
        label = await self._label(run)
        reaction = self._shown(run, str(error))
        try:
            await context.database.ingest(context.lease, Ingest({}, [reaction], position), utcnow())
        except DatabaseError as refused:
            if not concerns_one(refused):
                raise
            await context.database.ingest(context.lease, Ingest({}, (), position), utcnow())
        logger.error("{} cannot be recorded: {}", label, error)
        self.runs.add(run)
        context.alarms.raise_(parked(reaction, label))

    async def _label(self, run: RunId) -> str:
        """Return what people call a run; its id if it is no longer there."""
        found = await self.context.database.runs([run])
        return str(found[run]) if run in found else f"run {run}"

    def key(self, run: RunId) -> str:
        """Return the key of the reaction that shows that a run cannot be recorded."""
        return reaction_key(self.context.lease.site, run, Existence(), UNREADABLE)

    def _shown(self, run: RunId, why: str) -> Reaction:
        """Return that reaction."""
        site, event = self.context.lease.site, Event(run, Existence(), None, YES)
        made = Reaction(site, event, UNREADABLE, "default", next(self.generations), utcnow())
        return evolve(made, state=State.FAILED, note=why)

    def forget(self, runs: Iterable[RunId]) -> None:
        """Forget runs whose reactions were removed, and end their alarms."""
        for run in runs:
            self.runs.discard(run)
            self.context.alarms.clear(PARKED + self.key(run))

    async def forget_deleted(self, runs: Iterable[RunId]) -> None:
        """Forget which of these runs no longer exist."""
        context, parked_runs = self.context, self.among(runs)
        gone = parked_runs - (await context.database.runs(parked_runs)).keys()
        if gone:
            over = [self.key(run) for run in gone]
            await context.database.ingest(context.lease, Ingest({}, over=over), utcnow())
            self.forget(gone)
