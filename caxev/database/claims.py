"""Claiming reactions and settling them, with the writes to runs that are made on their behalf."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import datetime
from itertools import count
from typing import Final, TypeVar

import trio
from attrs import evolve
from pymongo import UpdateOne
from pymongo.asynchronous.client_session import AsyncClientSession

from caxev.core.history import HistoryRow
from caxev.core.ledger import Reaction, State
from caxev.core.model import Run, RunId
from caxev.core.transcript import KEPT_PARTS
from caxev.core.update import RunUpdate
from caxev.database.client import Document, Unreachable
from caxev.database.connection import Session, operation
from caxev.database.history import NO_ROWS, History, Rows, kept_output
from caxev.database.reactions import run_keys
from caxev.database.run_queries import Runs
from caxev.database.writes import (
    GIVEN_BACK,
    HELPER,
    TOUCH,
    Lease,
    delete_all,
    lost,
    write_all,
    write_each,
)
from caxev.failpoints import point

T = TypeVar("T")

CLAIMING: Final = 10.0
"""Seconds that claiming reactions may take once the caller is cancelled."""
MOST_SETTLED: Final = 500
"""Reactions that are settled in one transaction with their rows of history."""
_FREED: Final = {"$set": {"state": State.PENDING.value}, "$unset": GIVEN_BACK}


class _ClaimGone(Exception):
    """The claim for which a transaction wrote is gone: nothing was written."""


class _NotTogether(Exception):
    """An update does not fit, or several cannot be written at once: nothing was written."""


class Claims(Runs, History):
    """The life of a claim: taken, kept up to date, settled or given back."""

    async def claim(self, reactions: Sequence[Reaction], lease: Lease) -> list[Reaction]:
        """Claim open reactions in one write; return those that were still as given.

        Raises `LeaseLost`. A cancelled call goes on for up to `CLAIMING` seconds: a process that
        has lost the lease must notice that, and give back what it has claimed.
        """
        with trio.move_on_after(CLAIMING, shield=True):
            return await self._claim(reactions, lease)
        raise Unreachable(f"claiming took more than {CLAIMING:.0f} s")

    @operation
    async def _claim(self, reactions: Sequence[Reaction], lease: Lease) -> list[Reaction]:
        # A process that ends our lease does so before it opens claims. So if the lease is still
        # ours after the write, the claim is valid, or the other one will open it. Otherwise we give
        # it back; if we die before that, the leader finds it among its `claims`.
        pending = {"state": State.PENDING.value, "epoch": {"$exists": False}}
        claimed = {"$set": {"state": State.RUNNING.value, **lease.claimed}}
        writes = [
            {"q": {"_id": one.id, "generation": one.generation, **pending}, "u": claimed}
            for one in reactions
        ]
        matched = await write_all(self._ledger, writes, None)
        point("database.claim.after")
        mine = {"_id": {"$in": [one.id for one in reactions]}, **lease.claimed}
        if not await self._is_held(lease):
            await self._ledger.update_many(mine, _FREED)
            raise lost(lease)
        if matched == len(reactions):
            return list(reactions)
        # Some were renewed, or are no longer pending: find out which are ours.
        rows = await self._ledger.find(mine, {"generation": 1}).to_list(None)
        generations = {row["_id"]: row["generation"] for row in rows}
        return [one for one in reactions if generations.get(one.id) == one.generation]

    async def _is_held(self, lease: Lease) -> bool:
        # A helper needs two documents: its own, and that of the leader who admitted it.
        keys = [lease.held["_id"], *([] if lease.helper is None else [lease.site])]
        current = {"_id": {"$in": keys}, "epoch": lease.epoch}
        return len(await self._ledger.find(current, {"_id": 1}).to_list(None)) == len(keys)

    @operation
    async def claims(self, lease: Lease) -> list[Document]:
        """Return the key, generation, epoch and helper of all that this process has claimed.

        For the leader, all claims of the site, except those of its helpers.
        """
        mine = lease.claimed if lease.helper is not None else {"epoch": {"$lte": lease.epoch}}
        shown = {"generation": 1, "epoch": 1, "helper": 1}
        found = await self._ledger.find({"site": lease.site, **mine}, shown).to_list(None)
        if lease.helper is not None:
            return found
        # Read afterwards: a helper that is gone by then has claimed nothing that counts.
        helpers = await self._helpers_of(lease.site)
        return [one for one in found if one.get("helper") not in helpers]

    async def _helpers_of(self, site: str) -> set[str]:
        """Return the names of the helpers that may be at what they claimed, also void ones."""
        # The site is in the key alone: with a site and an epoch it would look like a claim.
        rows = self._ledger.find({"kind": HELPER, "_id.s": site}, {"_id.helper": 1})
        return {one["_id"]["helper"] async for one in rows}

    @operation
    async def claimed_elsewhere(self, run: RunId, lease: Lease) -> set[str]:
        """Return the handlers whose reactions to a run other processes of the site have claimed."""
        # Claims of any epoch: a helper under the leader before this one may still be at it.
        query = {**run_keys(lease.site, run), "epoch": {"$exists": True}}
        rows = self._ledger.find({**query, "helper": {"$ne": lease.helper}}, {"handler": 1})
        return {str(one.get("handler")) async for one in rows}

    @operation
    async def free(self, claims: Sequence[Document]) -> tuple[int, dict[str, str]]:
        """Reopen these claims if they still exist.

        Returns how many were opened and, by key, why the ledger refused others.
        """
        # The generation: a new reaction with that key is claimed as it is recorded.
        # Without a helper the field is missing, which `$eq: None` finds. `$eq` for all: a value
        # from the database must not be read as an operator.
        whole = ({"helper": None, **claim} for claim in claims)
        found = ({name: {"$eq": value} for name, value in claim.items()} for claim in whole)
        writes = [UpdateOne(claim, _FREED) for claim in found]
        freed, refused = await write_each(self._ledger, writes)
        return freed, {claims[index]["_id"]: why for index, why in refused.items()}

    @operation
    async def progress(self, reaction: Reaction, lease: Lease, progress: Document) -> None:
        """Show in the ledger how far a running reaction is."""
        await self._ledger.update_one(_claimed(reaction, lease), {"$set": {"progress": progress}})

    @operation
    async def keep(self, reaction: Reaction, lease: Lease, output: bytes) -> None:
        """Add a program's packed output to what is kept with a running reaction."""
        # The latest parts only: a document has a size limit.
        push = {"kept": {"$each": [output], "$slice": -KEPT_PARTS}}
        # All parts are counted, also those that are dropped: people see that some are missing.
        change = {"$push": push, "$inc": {"kept_parts": 1}}
        await self._ledger.update_one(_claimed(reaction, lease), change)

    # -- settling ---------------------------------------------------------------------------

    @operation
    async def settle(
        self, reactions: Sequence[Reaction], lease: Lease, rows: Rows = NO_ROWS
    ) -> tuple[int, int]:
        """Write the ends of attempts; return how many counted, and how many had been renewed.

        A reaction that is done leaves the ledger. One that was renewed while it ran stays open and
        is only freed. One that is in neither number was claimed by a process that has lost the
        lease since, or was settled before. `rows` are what the history shows of some of them, by
        their keys.
        """
        noted = [reaction for reaction in reactions if reaction.id in rows]
        others = [reaction for reaction in reactions if reaction.id not in rows]
        numbers = [await self._settle_noted(some, lease, rows) for some in _parts(noted)]
        if others:
            numbers.append(await self._settle(others, lease, None))
        return sum(one[0] for one in numbers), sum(one[1] for one in numbers)

    async def _settle_noted(
        self, reactions: Sequence[Reaction], lease: Lease, rows: Rows
    ) -> tuple[int, int]:
        """Settle reactions together with their rows of history, all or none of each."""

        async def write(session: AsyncClientSession) -> tuple[int, int]:
            found = await self._settle(reactions, lease, session, rows)
            if sum(found) < len(reactions):
                raise _ClaimGone
            return found

        try:
            return await self._transaction(write)
        except _ClaimGone:
            if len(reactions) == 1:
                return 0, 0
        # The history must not show what another process does again: find out which is gone.
        numbers = [await self._settle_noted([one], lease, rows) for one in reactions]
        return sum(one[0] for one in numbers), sum(one[1] for one in numbers)

    async def _settle(
        self, reactions: Sequence[Reaction], lease: Lease, session: Session, rows: Rows = NO_ROWS
    ) -> tuple[int, int]:
        done = [_generation(one, lease) for one in reactions if one.state is State.DONE]
        some = {one.id: rows[one.id] for one in reactions if one.id in rows}
        happened = await self._with_output(some, session)
        writes = [
            {"q": _generation(one, lease), "u": _settlement(one)}
            for one in reactions
            if one.state is not State.DONE
        ]
        counted = await delete_all(self._ledger, done, session)
        counted += await write_all(self._ledger, writes, session)
        renewed = 0
        # The others were renewed meanwhile, so their generation differs, or are no longer ours.
        if counted < len(reactions):
            freed = [{"q": _claimed(one, lease), "u": _FREED} for one in reactions]
            renewed = await write_all(self._ledger, freed, session)
        # The history keeps it, even if the reaction must run again.
        if happened:
            await self._add_rows([*happened.values()], session)
        point("database.settle.after")
        return counted, renewed

    async def _with_output(self, rows: Rows, session: Session) -> Rows:
        """Add to rows what programs printed: with the reactions it will leave the ledger."""
        if not rows:
            return rows
        query = {"_id": {"$in": list(rows)}, "kept": {"$type": "binData"}}
        cursor = self._ledger.find(query, {"kept": 1, "kept_parts": 1}, session=session)
        found = dict(rows)
        async for document in cursor:
            output, parts = kept_output(document)
            key = document["_id"]
            found[key] = evolve(found[key], output=output, outputs=parts)
        return found

    @operation
    async def settle_with(
        self,
        reactions: Sequence[Reaction],
        lease: Lease,
        updates: Sequence[RunUpdate],
        now: datetime,
        rows: Rows = NO_ROWS,
    ) -> int | None:
        """Write an update for each of these reactions and settle them with their rows of history.

        All or nothing: returns how many had been renewed, or None if nothing was written. That is
        if an update no longer fits its run; and, of several reactions, if they must go one by one,
        as when one was settled before. Raises `LeaseLost`.
        """
        attempts = count()
        alone = len(reactions) == 1

        async def write(session: AsyncClientSession) -> int:
            # A second attempt means a conflict: one reaction at a time is better then.
            if next(attempts) and not alone:
                raise _NotTogether
            for reaction, update in zip(reactions, updates, strict=True):
                if await self._apply(update, now, session) is None:
                    # An update that was written, and whose reply was lost, does not fit any more.
                    mine = _claimed(reaction, lease)
                    if alone and not await self._ledger.find_one(mine, {"_id": 1}, session=session):
                        raise _ClaimGone
                    raise _NotTogether
            point("database.update.settle")
            settled, renewed = await self._settle(reactions, lease, session, rows)
            # Raising ends the transaction: no update must stay without its settlement.
            if settled + renewed < len(reactions):
                raise _ClaimGone
            return renewed

        try:
            renewed = await self._write_for(lease, write)
        except _NotTogether:
            return None
        if renewed is None:
            return 1 if alone else None  # it was settled before, and the reply was lost
        point("database.update.after")
        return renewed

    @operation
    async def update(
        self,
        reaction: Reaction,
        lease: Lease,
        update: RunUpdate,
        now: datetime,
        row: Callable[[Run], HistoryRow] | None = None,
    ) -> Run | None:
        """Write a run update on behalf of a claimed reaction; return the run as it is then.

        `row` makes the row of history that is written with it, of the run after the update.

        Returns None if the run is no longer what the update expects, or the claim was given back.
        Raises `LeaseLost`.
        """
        mine = _claimed(reaction, lease)

        async def write(session: AsyncClientSession) -> Document | None:
            if (document := await self._apply(update, now, session)) is None:
                return None
            # Touching the claim makes the whole transaction depend on it.
            if not (await self._ledger.update_one(mine, TOUCH, session=session)).matched_count:
                raise _ClaimGone
            if row is not None:
                bare = {reaction.id: row(Run.from_document(document))}
                whole = await self._with_output(bare, session)
                await self._add_rows([*whole.values()], session)
            return document

        point("database.update.before")
        document = await self._write_for(lease, write)
        point("database.update.after")
        return None if document is None else Run.from_document(document)

    async def _write_for(
        self, lease: Lease, write: Callable[[AsyncClientSession], Awaitable[T]]
    ) -> T | None:
        """Make a transaction for a claim; return None if the claim is gone. Raises `LeaseLost`."""
        try:
            return await self._transaction(write)
        except _ClaimGone:
            if not await self._is_held(lease):
                raise lost(lease) from None
            return None


def _claimed(reaction: Reaction, lease: Lease) -> Document:
    return {"_id": reaction.id, **lease.claimed}


def _generation(reaction: Reaction, lease: Lease) -> Document:
    return {**_claimed(reaction, lease), "generation": reaction.generation}


def _parts(reactions: Sequence[Reaction]) -> Iterator[Sequence[Reaction]]:
    # A long transaction would keep the lease from being renewed.
    for start in range(0, len(reactions), MOST_SETTLED):
        yield reactions[start : start + MOST_SETTLED]


def _settlement(reaction: Reaction) -> Document:
    fields: Document = {
        "state": reaction.state.value,
        "attempts": reaction.attempts,
        "note": reaction.note,
    }
    if reaction.started is not None:
        fields["started"] = reaction.started
    if reaction.state is State.PENDING:
        fields["due"] = reaction.due
    waits = {"hindered": reaction.hindered, "root": reaction.root}
    fields |= {name: value for name, value in waits.items() if value}
    gone = (*GIVEN_BACK, *(name for name, value in waits.items() if not value))
    return {"$set": fields, "$unset": dict.fromkeys(gone, ""), "$currentDate": {"settled": True}}
