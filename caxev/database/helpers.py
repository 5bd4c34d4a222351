"""Helpers: processes that claim reactions of a site beside its leader, on other machines.

Theory
------
A helper has a document in the ledger, which is its lease: a claim of a helper counts while that
document has the epoch of the leader. The helper joins without one, and the leader admits it by
writing its own. So the leader knows of each helper before it can claim anything.

A helper whose lease has lapsed is voided: its epoch becomes `VOID`. Then its claims are opened. The
filter of all that it writes has epoch and helper, so from then on nothing of it counts. The names
of helpers are never used twice: one that was voided joins again as a new one.

A process that takes the site over voids all helpers at once. They may be at what they have claimed,
so that stays theirs until their leases have lapsed, or they report that they have stopped (`stop`):
no reaction is made by two. Their settlements count meanwhile.

Only the leader records. The alarms of a helper go through its document.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from attrs import evolve, field, fields, frozen
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.asynchronous.database import AsyncDatabase

from caxev.core.alarms import PARKED, Alarm, raised
from caxev.core.clock import utcnow
from caxev.core.ledger import State, site_prefix
from caxev.core.processes import host_of
from caxev.database.alarms import KIND as ALARM
from caxev.database.alarms import alarm_id, alarm_row
from caxev.database.client import Document, HistoryLost
from caxev.database.connection import operation
from caxev.database.leases import SHORTEST_LIMIT, Leases, prolonged
from caxev.database.rows import Malformed, Row, alarm_state_from, carefully, texts
from caxev.database.sites import ACTIVE, Position, SiteRecord
from caxev.database.stream import ENDS, ChangeCursor, Streams
from caxev.database.writes import HELPER, VOID, Lease, guard, helper_id, lost, pushed_news

_LEFT: Final = [{"$set": {"epoch": VOID, "expires": "$$NOW", "left": True}}]


@frozen
class Helper:
    """A helper's document. `epoch` is None until a leader has admitted it.

    `owner` is its process. `active`: whether its lease is valid. `left`: it was asked to leave.
    `since` and `seen`: when it joined, and renewed its lease last. `running`: by lane, how many
    reactions it has claimed. `away`: why directories of the site are missing on its machine. `news`
    are alarms: each with an id of its own, its key, and the alarm, or None if it is over.
    """

    name: str
    site: str
    owner: str = ""
    lanes: tuple[str, ...] = ()
    epoch: int | None = None
    active: bool = False
    expires: datetime | None = None
    left: bool = False
    since: datetime | None = None
    seen: datetime | None = None
    running: Mapping[str, int] = field(factory=dict)
    away: tuple[str, ...] = ()
    lsid: Any = None
    news: tuple[tuple[str, str, Alarm | None], ...] = ()

    @property
    def host(self) -> str:
        """The machine on which it runs."""
        return host_of(self.owner)

    @property
    def is_void(self) -> bool:
        """Whether its lease was ended: it can claim nothing any more."""
        return self.epoch == VOID

    @property
    def helps(self) -> bool:
        """Whether it was admitted, and its lease is valid."""
        return self.active and bool(self.epoch)


class ReactionStream(ChangeCursor[bool]):
    """An open change stream on the reactions of some handlers of a site that may be claimed.

    A batch is whether there are any.
    """

    def __init__(
        self, database: AsyncDatabase[Document], ledger: str, site: str, handlers: Sequence[str]
    ) -> None:
        super().__init__(database, ledger, _openings(site, handlers))

    def batch(self, changes: Sequence[Document], position: Position) -> bool:
        del position
        if any(change["operationType"] in ENDS for change in changes):
            raise HistoryLost("the ledger was dropped or renamed")
        return bool(changes)


def _openings(site: str, handlers: Sequence[str]) -> list[Document]:
    names = "|".join(re.escape(name) for name in handlers)
    # A reaction's key begins with its site and ends with its handler.
    ours = {"documentKey._id": {"$regex": f'^{re.escape(site_prefix(site))}.*"({names})"\\]$'}}
    opened: list[Document] = [
        {"operationType": "insert", "fullDocument.state": State.PENDING.value},
        {"updateDescription.updatedFields.state": State.PENDING.value},
        {"updateDescription.updatedFields.due": {"$exists": True}},
        {"updateDescription.removedFields": "epoch"},
    ]
    wanted = [{"operationType": {"$in": sorted(ENDS)}}, {**ours, "$or": opened}]
    return [{"$match": {"$or": wanted}}, {"$project": {"operationType": 1}}]


class Helpers(Leases, Streams):
    """Joining, admitting, renewing and ending helpers."""

    # -- by the helper --------------------------------------------------------------------------

    @operation
    async def join(self, lease: Lease, lanes: Sequence[str], lease_time: float) -> None:
        """Ask the leader to admit a helper, or ask again; `lease` has its name."""
        assert lease.helper is not None
        await self._require_schema()
        if self._session is None:
            self._session = self._client.start_session()
        state = {
            "kind": HELPER,
            "owner": lease.owner,
            "lanes": list(lanes),
            "lsid": self._session.session_id,
        }
        since = {"since": {"$ifNull": ["$since", "$$NOW"]}}
        change = [{"$set": prolonged(lease_time, state) | since}]
        key = helper_id(lease.site, lease.helper)
        await self._ledger.update_one({"_id": key}, change, upsert=True)

    @operation
    async def admitted(self, lease: Lease) -> Lease | None:
        """Return the lease of a helper that was admitted; None if it was not yet.

        Raises `LeaseLost` if its document is gone, or was ended.
        """
        assert lease.helper is not None
        key = helper_id(lease.site, lease.helper)
        document = await self._ledger.find_one({"_id": key}, {"epoch": 1})
        epoch = None if document is None else document.get("epoch")
        if document is None or epoch == VOID:
            raise lost(lease)
        return None if epoch is None else evolve(lease, epoch=int(epoch))

    @operation
    async def renew_helper(self, lease: Lease, lease_time: float) -> SiteRecord | None:
        """Prolong a helper's lease; return the site's record. Raises `LeaseLost`."""
        state: Document = {}
        if self._session is not None:
            state["lsid"] = self._session.session_id
        async with asyncio.timeout(max(lease_time / 3, SHORTEST_LIMIT)):
            change = [{"$set": prolonged(lease_time, state)}]
            await guard(self._ledger, lease, change=change)
            records = await self._site_records({"_id": lease.site})
        # A leader of a version that knows no helpers voids none.
        if any(one.epoch != lease.epoch for one in records):
            raise lost(lease)
        return records[0] if records else None

    @operation
    async def leave(self, lease: Lease) -> None:
        """End a helper's lease at once, after it has given its claims back."""
        await self._ledger.update_one(lease.held, _LEFT)

    @operation
    async def stop(self, lease: Lease) -> None:
        """Let others make at once what a helper has claimed: it has lost its lease, and stopped."""
        assert lease.helper is not None
        key = helper_id(lease.site, lease.helper)
        await self._ledger.update_one({"_id": key}, [{"$set": {"expires": "$$NOW"}}])

    @operation
    async def withdraw(self, lease: Lease) -> None:
        """End a helper that has not begun, whether or not a leader has admitted it meanwhile."""
        assert lease.helper is not None
        key = {"_id": helper_id(lease.site, lease.helper)}
        # The leader may admit it between these two writes. Then its document stays, as that of one
        # that has left, and the leader takes over from it as usual.
        if not (await self._ledger.delete_one({**key, "epoch": {"$exists": False}})).deleted_count:
            await self._ledger.update_one(key, _LEFT)

    @operation
    async def add_news(self, lease: Lease, news: Mapping[str, Alarm | None]) -> None:
        """Leave alarms, by their keys, for the leader; None: it is over. Raises `LeaseLost`."""
        now = utcnow()
        push = pushed_news(
            (key, None if one is None else alarm_row(raised(None, one, now)))
            for key, one in news.items()
        )
        await guard(self._ledger, lease, change=push)

    @operation
    async def has_parked(self, site: str) -> bool:
        """Return whether an alarm about a failed reaction of the site is active."""
        about = {"$regex": f"^{re.escape(PARKED)}"}
        active = {"kind": ALARM, "site": site, "over": None, "key": about}
        return await self._ledger.find_one(active, {"_id": 1}) is not None

    @operation
    async def open_reactions(self, site: str, handlers: Sequence[str]) -> ReactionStream:
        """Open the stream of what can be claimed from now on."""
        database = self._client[self.settings.database]
        stream = ReactionStream(database, self._ledger.name, site, handlers)
        await stream.open(Position(start=await self._majority_time()))
        return stream

    # -- by the leader --------------------------------------------------------------------------

    @operation
    async def helpers(self, site: str | None = None) -> list[Helper]:
        """Return the helpers of a site, or of all."""
        return await self._known(site)

    async def _known(self, site: str | None) -> list[Helper]:
        query: Document = {"kind": HELPER, **({} if site is None else {"_id.s": site})}
        shown = {**dict.fromkeys((one.name for one in fields(Helper)), 1), "active": ACTIVE}
        rows = await self._ledger.find(query, {**shown, "lease": 1}).sort("_id").to_list(None)
        return [one for one in map(_helper_from, rows) if one is not None]

    @operation
    async def helpers_at_work(self, site: str | None = None) -> list[Helper]:
        """Return the helpers of a site, or of all, with how many reactions each has claimed."""
        found = await self._known(site)
        if not found:
            return []
        names, sites = [one.name for one in found], {one.site for one in found}
        # With an epoch: claims have an index.
        claimed = {"site": {"$in": [*sites]}, "helper": {"$in": names}, "epoch": {"$gt": VOID}}
        group = {"$group": {"_id": {"helper": "$helper", "lane": "$lane"}, "n": {"$sum": 1}}}
        running: dict[str, dict[str, int]] = {}
        for row in await (await self._ledger.aggregate([{"$match": claimed}, group])).to_list(None):
            running.setdefault(row["_id"]["helper"], {})[str(row["_id"].get("lane"))] = row["n"]
        return [evolve(one, running=running.get(one.name, {})) for one in found]

    @operation
    async def admit(self, lease: Lease, helper: Helper) -> None:
        """Let a helper claim reactions under the leader's lease. Raises `LeaseLost`."""
        key = helper_id(helper.site, helper.name)

        async def write(session: AsyncClientSession) -> None:
            fresh = {"_id": key, "epoch": {"$exists": False}}
            change = {"$set": {"epoch": lease.epoch}}
            # No match if it has withdrawn, or was admitted before and the reply was lost: both are
            # fine.
            await self._ledger.update_one(fresh, change, session=session)
            # A leader that was deposed must admit nobody.
            await guard(self._ledger, lease, session)

        await self._transaction(write)

    @operation
    async def void(self, helper: Helper) -> bool:
        """End the lease of a helper if it has lapsed; return whether it had."""
        key = helper_id(helper.site, helper.name)
        lapsed = {"_id": key, "epoch": helper.epoch, "$expr": {"$not": [ACTIVE]}}
        done = await self._ledger.update_one(lapsed, {"$set": {"epoch": VOID}})
        return done.matched_count > 0

    @operation
    async def reopen_claims(self, lease: Lease, helper: Helper, now: datetime) -> int:
        """Open what a helper that is void had claimed; return how many reactions that were."""
        await self._end_session(helper.lsid)
        claimed = {
            "site": lease.site,
            "epoch": {"$lte": lease.epoch},
            "helper": helper.name,
        }
        return await self._interrupt(claimed, now)

    @operation
    async def take_news(self, lease: Lease, helper: Helper) -> None:
        """Remove the alarms that were taken over. Raises `LeaseLost`."""
        await guard(self._ledger, lease)
        taken = {"$pull": {"news": {"n": {"$in": [id_ for id_, _, _ in helper.news]}}}}
        await self._ledger.update_one({"_id": helper_id(helper.site, helper.name)}, taken)

    @operation
    async def forget_helper(self, helper: Helper) -> None:
        """Remove the document of a helper that is void, or that has left before it was admitted."""
        key = helper_id(helper.site, helper.name)
        over = [{"epoch": VOID}, {"epoch": {"$exists": False}, "$expr": {"$not": [ACTIVE]}}]
        await self._ledger.delete_one({"_id": key, "$or": over})


def _helper_from(document: Document) -> Helper | None:
    try:
        return carefully(_read, document)
    except Malformed:  # of no helper that lives: it writes them again
        return None


def _read(document: Mapping[str, Any]) -> Helper:
    row = Row.of(document)
    key = Row.of(document["_id"])
    site = key.text("s")
    away = [Row.of(one).text("why") for one in row.many("away", [])]
    news = [_news_from(site, Row.of(one)) for one in row.many("news", [])]
    expires, lease = row.moment("expires", None), float(document.get("lease") or 0)
    return Helper(
        key.text("helper"),
        site,
        owner=row.text("owner", ""),
        lanes=tuple(texts(row.many("lanes", []))),
        epoch=row.whole("epoch", None),
        active=document.get("active") is True,
        expires=expires,
        left=document.get("left") is True,
        since=row.moment("since", None),
        seen=None if expires is None else expires - timedelta(seconds=lease),
        away=tuple(away),
        lsid=document.get("lsid"),
        news=tuple(news),
    )


def _news_from(site: str, row: Row) -> tuple[str, str, Alarm | None]:
    key, found = row.text("key"), row.document.get("alarm")
    if found is None:
        return row.text("n"), key, None
    state = alarm_state_from({**Row.of(found).document, "_id": alarm_id(site, key)})
    return row.text("n"), key, state.alarm
