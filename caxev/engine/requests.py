"""Requests: what people asked a site's listener to do, by the command line.

`session` runs `Requests.serve_as_asked`. The lease's renewal reports whether requests wait.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from itertools import chain
from math import inf
from typing import Any, Final

import trio
from attrs import define, evolve, field
from loguru import logger

from caxev.core import recording
from caxev.core.clock import utcnow
from caxev.core.ledger import UNREADABLE, Reaction
from caxev.core.model import RunId, Snapshot
from caxev.database import DatabaseError, Request, SiteRecord, concerns_one, unless_fatal
from caxev.engine.context import Context
from caxev.engine.recorder import Recorder

AT_ONCE: Final = 100
"""Runs that are replayed at once: the stream waits meanwhile."""


@define(eq=False)
class Requests:
    """Carries out the requests to a site. `scan` compares all runs."""

    context: Context
    recorder: Recorder
    scan: Callable[[], Awaitable[None]]
    _added: trio.Event = field(init=False, factory=trio.Event)
    # The request that was carried out last: if it could not be removed, it is still there.
    _carried_out: Any = field(init=False, default=None)

    def heard(self, record: SiteRecord) -> None:
        """Take in the site's record."""
        if record.requests:
            self._added.set()

    async def serve_as_asked(self) -> None:
        """Carry out requests as they are added, until cancelled. Raises `LeaseLost`."""
        while True:
            self._added = trio.Event()
            wait = 1.0
            with unless_fatal("requests cannot be read"):
                await self.serve()
                wait = inf
            with trio.move_on_after(wait):
                await self._added.wait()

    async def serve(self) -> None:
        """Carry out all requests that are there, the oldest first."""
        database, lease = self.context.database, self.context.lease
        while (request := await database.next_request(lease.site)) is not None:
            if not await database.begin_request(request):
                continue  # it was taken back meanwhile
            if request.id != self._carried_out:
                await self._carry_out(request)
                self._carried_out = request.id
            # Also after a refusal: else one request would be in the way of all later ones.
            await database.finish_request(lease, request)

    async def _carry_out(self, request: Request) -> None:
        try:
            await self._serve(request)
        except DatabaseError as error:
            if not concerns_one(error):
                raise
            logger.error("a request to {} cannot be carried out: {}", request.kind, error)

    async def _serve(self, request: Request) -> None:
        match request.kind:
            case "scan":
                await self.scan()
            case "retry":
                await self._retry(request)
            case "replay":
                await self._replay(request)
            case "clear":
                await self.context.alarms.clear_and_keep(request.alarm or "")
            case _:
                logger.error("ignoring a request of an unknown kind, {!r}", request.kind)

    async def _retry(self, request: Request) -> None:
        if request.handler in (None, UNREADABLE):
            # These are failed reactions that no handler can run again.
            await self.recorder.retry_unreadable(request.runs)
        context = self.context
        opened = await context.database.reopen_failed(context.lease, request, utcnow())
        logger.info("retrying {} failed reactions", opened)
        self.recorder.intake.look_again()

    async def _replay(self, request: Request) -> None:
        before, ids = None, list(request.runs or ())
        while True:
            if request.runs is None:
                ids, before = await self.context.database.page(self.context.lease.site, before)
            await self._fire_again(ids, request)
            if before is None:
                return

    async def _fire_again(self, ids: Sequence[RunId], request: Request) -> None:
        """Record what is new of runs, and with it the reactions that their states fire again.

        One comparison for both: a state that is replayed counts as seen, so that the stream does
        not fire it once more.
        """
        context, recorder, made = self.context, self.recorder, 0
        for start in range(0, len(ids), AT_ONCE):
            some = list(ids[start : start + AT_ONCE])
            async with recorder.beside_stream():
                snapshots = await recorder.read(some)
                ingest = await recorder.compare(dict.fromkeys(some, utcnow()), snapshots)
                # What has too many copies was parked by the comparison, and is not served.
                whole, now = snapshots.whole, dict(snapshots.now)
                for run in [run for run in now if whole.entries(run) > recording.MOST_COPIES]:
                    del now[run]
                # From the database: what is in memory does not have it.
                known = await context.database.known_to(context.lease.site, some)
                again = await self._again(now, known, request, but=ingest.reactions)
                seen = now if request.handler is None else {}
                every = {**seen, **ingest.snapshots}
                if every or again:
                    reactions = [*ingest.reactions, *again]
                    new = evolve(ingest, snapshots=every, reactions=reactions, replayed=bool(seen))
                    await recorder.record(new)
            made += len(again)
        logger.info("replayed {} runs: {} reactions", len(ids), made)

    async def _again(
        self,
        snapshots: Mapping[RunId, Snapshot],
        known: Mapping[RunId, frozenset[str]],
        request: Request,
        *,
        but: Iterable[Reaction],
    ) -> list[Reaction]:
        """Return the reactions that a replay makes of runs, without those that are made already."""
        database, maker, now = self.context.database, self.recorder.maker, utcnow()
        standing = await database.standing(
            recording.possible_keys(self.context.registry, snapshots)
        )
        runs = await database.runs(snapshots)
        outlooks = (
            recording.outlook(
                maker, run, snapshots[run.id], standing, now, known=known.get(run.id, ())
            )
            for run in runs.values()
        )
        made = {reaction.id for reaction in but}
        again = recording.again(
            chain.from_iterable(outlooks), handler=request.handler, force=request.force
        )
        return [reaction for reaction, _ in again if reaction.id not in made]
