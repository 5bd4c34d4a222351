"""Plan acts for a person, and carry them out in the database.

Runs are written in groups, each in one transaction with its rows of history, so there is a row for
each write and no other. An interrupted command has written whole groups.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Final

from attrs import frozen

from caxev.asking.base import Act, ActContext, ActPlan, Step, pages
from caxev.config import Sites
from caxev.core.clock import utcnow
from caxev.core.errors import NoSuchRun
from caxev.core.model import Run, RunId
from caxev.core.registry import Registry
from caxev.core.selection import Selection

if TYPE_CHECKING:
    from caxev.database import Database, RequestPart

CHANGED: Final = "the run has just changed: try again"
TOGETHER: Final = 20
"""Runs that are written in one transaction: a listener that wants one of them waits meanwhile."""
_PAGE: Final = 200
"""Whole runs that are read at a time."""
_TRIES: Final = 5
"""Attempts to write to a run that changes at the same time."""


@frozen
class Asker:
    """A person who asks: the database, the sites with their handlers, and the person's name.

    `registry` returns the handlers of a site by its name, and raises `ConfigError`.
    """

    database: Database
    sites: Sites
    registry: Callable[[str], Registry]
    by: str

    async def context(self, act: Act, request: str | None = None) -> ActContext:
        """Read what an act is decided by; `request` is the id of the request to carry out."""
        from caxev.engine.root_markers import with_markers

        records = {one.site: one for one in await self.database.site_records()}
        here = None if act.place is None else self.sites.get(act.place)
        sites = with_markers(self.sites, here, records)
        return ActContext(sites, self.registry, self.by, records, request)

    async def plan(self, act: Act, selection: Selection) -> ActPlan:
        """Decide about the selected runs, and sum it up; nothing is written."""
        plan = ActPlan()
        async with aclosing(self.steps(act, selection)) as found:
            async for run, steps in found:
                plan.add_steps(run, steps)
        return plan

    async def steps(
        self, act: Act, selection: Selection
    ) -> AsyncGenerator[tuple[Run, list[Step]], None]:
        """Decide about each of the selected runs; nothing is written."""
        context = await self.context(act)
        async with aclosing(self.database.pages(selection, utcnow())) as pages:
            async for page in pages:
                async for run in whole(self.database, [run.id for run in page]):
                    yield run, act.tried(run, context)

    async def carry_out(
        self, act: Act, runs: Iterable[RunId], request: str | None = None, writer: str | None = None
    ) -> AsyncGenerator[Step, None]:
        """Do it for these runs; return each step as it was made, or with the reason why not.

        Each run is decided on again, as it is now. Runs that are gone are left out. With the
        token of the request's `writer` the runs are counted there. Raises `NothingToDo` then once
        the request is cancelled, or continues elsewhere.
        """
        context = await self.context(act, request)
        writing = _Writing(self, lambda run: act.tried(run, context), request, writer)
        for few in pages(runs, TOGETHER):
            for step in await writing.write(few):
                yield step

    async def carry_out_one(self, act: Act, run: RunId) -> Step:
        """Do it for one run; return its first step.

        Raises `NothingToDo` or `ConfigError` with the rule that is against it.
        """
        context = await self.context(act)
        found = [one async for one in whole(self.database, [run])]
        if not found:
            raise NoSuchRun("the run was deleted")
        steps = await _Writing(self, lambda one: act.steps(one, context)).write_runs(found)
        return steps[0]


async def whole(database: Database, ids: Iterable[RunId]) -> AsyncGenerator[Run, None]:
    """Read runs with all their fields: handlers decide by some that a selection leaves out."""
    for some in pages(ids, _PAGE):
        found = await database.runs(some)
        for one in some:
            if one in found:
                yield found[one]


@frozen
class _Writing:
    """Writes the steps that `decide` makes; for a request if it has the token of its writer."""

    asker: Asker
    decide: Callable[[Run], Iterable[Step]]
    request: str | None = None
    writer: str | None = None

    async def write(self, ids: Sequence[RunId]) -> list[Step]:
        """Decide about runs and write to them, all together; return the steps."""
        found = [run async for run in whole(self.asker.database, ids)]
        gone = {*ids} - {run.id for run in found}
        return await self.write_runs(found, gone)

    async def write_runs(
        self, runs: Sequence[Run], gone: Collection[RunId] = frozenset()
    ) -> list[Step]:
        """Decide about runs and write; those that have changed meanwhile are decided again."""
        done: list[Step] = []
        for _ in range(_TRIES):
            steps = [step for run in runs for step in self.decide(run)]
            part = self._part([*gone, *(run.id for run in runs)], gone, steps)
            missed = await self._write_steps(steps, part)
            done += [one for one in steps if one.run.id not in missed]
            if not missed:
                return done
            runs = [run async for run in whole(self.asker.database, list(missed))]
            gone = frozenset()
        return [*done, *(step.failed(CHANGED) for run in runs for step in self.decide(run))]

    async def _write_steps(self, steps: Sequence[Step], part: RequestPart | None) -> set[RunId]:
        """Write steps together; return the runs that no longer are as a step expects."""
        writes = [(one, one.update) for one in steps if one.update is not None]
        if not writes and part is None:
            return set()
        asked = [(update, one.row) for one, update in writes]
        fitted = await self.asker.database.write_asked(asked, utcnow(), part)
        return {one.run.id for (one, _), fits in zip(writes, fitted, strict=True) if not fits}

    def _part(
        self, ids: Sequence[RunId], gone: Collection[RunId], steps: Iterable[Step]
    ) -> RequestPart | None:
        from caxev.database import RequestPart

        if self.request is None or self.writer is None:
            return None
        refused = {one.run.id for one in steps if one.update is None and one.ok is not True}
        return RequestPart(self.request, self.writer, ids, {*gone, *refused})
