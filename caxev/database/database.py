"""All that caxev does with the database, as trio functions that each cross into asyncio once."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from pathlib import PurePosixPath
from typing import Any, Final, TypeVar
from uuid import UUID

import trio
from attrs import Factory, define, evolve, field
from bson.max_key import MaxKey
from bson.min_key import MinKey
from bson.regex import Regex
from bson.timestamp import Timestamp
from loguru import logger
from pymongo import ReturnDocument
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import OperationFailure
from pymongo.read_concern import ReadConcern

from caxev import aio
from caxev.config import ConfigError, Settings
from caxev.copies.sharing import Neighbours
from caxev.core.alarms import AlarmState
from caxev.core.clock import clock
from caxev.core.ledger import Reaction
from caxev.core.model import (
    DELETING,
    NO_FIELDS,
    REQUESTED,
    TRANSFERRED,
    TRANSFERRING,
    Aspect,
    Run,
    RunId,
    RunUpdate,
    Snapshot,
    Watched,
    snapshot_of,
)
from caxev.database.client import (
    AUTH_CODES,
    DOCUMENT_CODES,
    Client,
    Document,
    InvalidDocument,
    LeaseLost,
    LoginFailed,
    NotReplicaSet,
    Unreachable,
    connect,
    credentials,
    not_replica_set,
    translated,
)
from caxev.database.grants import carry_out, commands
from caxev.database.rows import reaction_from
from caxev.database.runs import Selection, snapshot_projection, totals_pipeline, write_of
from caxev.database.store import (
    OLDEST_FIRST,
    Collection,
    Gap,
    Lease,
    Odd,
    Order,
    Position,
    Request,
    SiteRecord,
    Store,
    is_epoch,
    position_fields,
    run_keys,
)
from caxev.database.stream import AWAIT, Batch, Following, Stream, is_usable
from caxev.failpoints import point

T = TypeVar("T")
PAGE: Final = 1000
LIMIT: Final = 120.0
"""Seconds that a call may take: reading many large runs over a slow link does take long."""
LONG_LIMIT: Final = 3600.0
"""Seconds that building indexes, or counting all copies, may take."""
WRITES_LIMIT: Final = 25.0
"""Seconds that some writes may take together, such as a transaction."""
SHORTEST_LIMIT: Final = 2.0
"""Seconds that renewing a lease gets at least."""
SLOW: Final = 12.0
"""Seconds after which a call that has not ended is reported..."""
REPEATED: Final = 600.0
"""...but not more often than this."""
_CLOSING: Final = 2.0
"""Seconds that closing a stream may take."""
MOST_DEBTS: Final = 2000
"""Reactions that are recorded in one transaction."""
CLAIMING: Final = 10.0
"""Seconds that claiming reactions may take, where nobody waits for it any more."""

FEW: Final = 16
"""Runs of a batch up to which they are read whole."""


@define
class Snapshots:
    """Looks of now and snapshots, of the runs that exist or were seen; and runs read whole."""

    now: dict[RunId, dict[Aspect, str]]
    before: dict[RunId, dict[Aspect, str]]
    whole: Mapping[RunId, Run]


@define
class Ingest:
    """What one batch of changes leads to; written in one transaction.

    `runs` are those that were read whole; they are not written but passed on with the reactions.
    `priorities` are those of runs whose tags changed them, for the reactions that stand already.
    """

    snapshots: Mapping[RunId, Snapshot | None]
    reactions: Sequence[Reaction] = ()
    position: Position | None = None
    runs: Mapping[RunId, Run] = Factory(dict)
    priorities: Mapping[RunId, int] = Factory(dict)


class _ClaimGone(Exception):
    """The claim on whose behalf a transaction wrote is not there: nothing was written."""


class _NotTogether(Exception):
    """Several updates cannot be written at once: nothing was written."""


@define(eq=False)
class Database:
    """The runs database and this site's ledger in it.

    Every method may raise `Unreachable`, `NotAuthorized` or another `DatabaseError`. Cancelling one
    leaves its write done or not done; the filters make it safe to do it again.
    """

    settings: Settings
    _client: Client = field(init=False)
    _runs: Collection = field(init=False)
    _confirmed: Collection = field(init=False)
    _store: Store = field(init=False)
    # All transactions of this process use one session, one at a time: the next process ends it
    # when it takes over, so that nothing half-written can block it.
    _session: AsyncClientSession | None = field(init=False, default=None)
    _pen: asyncio.Lock = field(init=False, factory=asyncio.Lock)
    _warned: float = field(init=False, default=-REPEATED)
    _odd: dict[tuple[str, str], Odd] = field(init=False, factory=dict)
    _credentials: object = field(init=False)
    _unusable: str = field(init=False, default="")
    """Why renewed credentials were not taken, as it was logged last: each failed call tries."""
    _closing: set[asyncio.Task[None]] = field(init=False, factory=set)

    def __attrs_post_init__(self) -> None:
        self._connect(self.settings)

    def _connect(self, settings: Settings) -> None:
        found = credentials(settings)  # first: a file that changes meanwhile is read again
        self._client = connect(settings)
        # Not before that has succeeded: what could not be read is tried again.
        self.settings, self._credentials = settings, found
        database = self._client[settings.database]
        self._runs = database[settings.collection]
        # What could still be rolled back must not be taken for seen.
        self._confirmed = self._runs.with_options(read_concern=ReadConcern("majority"))
        self._store = Store(database, settings.prefix, self._odd)

    async def _call(
        self,
        function: Callable[..., Awaitable[T]],
        *args: Any,
        limit: float = LIMIT,
        held: float = 0.0,
    ) -> T:
        """Await an asyncio function of pymongo's, up to `limit` seconds.

        `held`: so long the server may hold the answer back. A write that was cut short may have
        been made, or become durable later: callers repeat it.
        """

        async def translating() -> T:
            loop = asyncio.get_running_loop()
            slow = loop.call_later(SLOW + held, self._warn, _name_of(function))
            try:
                async with asyncio.timeout(limit + held):
                    with translated(self.settings):
                        return await function(*args)
            except TimeoutError:
                where = self.settings.safe_uri
                message = f"the database at {where} did not end {_name_of(function)!r} in time"
                raise Unreachable(message) from None
            except (Unreachable, LoginFailed):
                self._renew_credentials()
                raise
            finally:
                slow.cancel()

        return await aio.call(translating)

    def _renew_credentials(self) -> None:
        """Connect anew if the password, or a file of certificates, is another one by now.

        What is under way on the old connections fails, and is repeated by whoever asked for it.
        """
        try:
            settings = self.settings.again()
            if credentials(settings) == self._credentials:
                return
            old, had_session = self._client, self._session is not None
            self._connect(settings)
        except ConfigError as error:
            if self._unusable != str(error):
                logger.warning("the credentials for the database stay as they were: {}", error)
            self._unusable = str(error)
            return
        self._unusable = ""
        logger.info("the credentials for {} were renewed: connecting anew", settings.safe_uri)
        self._session = self._client.start_session() if had_session else None
        closing = asyncio.get_running_loop().create_task(old.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def renew_credentials(self) -> None:
        """Connect anew if the password, or a file of certificates, is another one by now."""

        async def renew() -> None:
            self._unusable = ""  # whoever asks is answered
            self._renew_credentials()

        await self._call(renew)

    def _warn(self, name: str) -> None:
        """Log that a call takes long, once in a while: all that wait at one time are slow."""
        now = time.monotonic()
        if now >= self._warned + REPEATED:
            self._warned = now
            where = self.settings.safe_uri
            logger.warning("the database at {} has not answered {!r} yet", where, name)

    async def _transact(self, function: Callable[[AsyncClientSession], Awaitable[T]]) -> T:
        """Call an asyncio function in a transaction; see `_call`."""
        return await self._call(partial(self._transaction, function))

    async def _transaction(self, function: Callable[[AsyncClientSession], Awaitable[T]]) -> T:
        async with self._pen, asyncio.timeout(WRITES_LIMIT):
            if self._session is None:
                self._session = self._client.start_session()
            return await self._session.with_transaction(function)

    # -- the server -------------------------------------------------------------------------

    async def check(self) -> None:
        """Raise unless the server can be reached, lets us in and is a replica set."""

        async def check() -> None:
            hello = await self._client.admin.command("hello")
            if "setName" not in hello and hello.get("msg") != "isdbgrid":
                raise NotReplicaSet(not_replica_set(self.settings.safe_uri))
            # hello needs no rights: ask something that does.
            await self._runs.find_one({}, {"_id": 1})
            asked = time.monotonic()  # not before: to connect takes long
            hello = await self._client.admin.command("hello")
            self._note_time(hello["localTime"], asked)

        await self._call(check)

    @staticmethod
    def _note_time(server: datetime, asked: float) -> None:
        # The reply to a command has its times without a zone.
        if (step := clock.note(server.replace(tzinfo=UTC), asked)) != 0.0:
            logger.warning(
                "the database's clock has moved by {:.3f} s: it was set, or its primary is another",
                step,
            )

    async def create_indexes(self) -> None:
        """Make what the ledger needs. A site user who may not is told by `NotAuthorized`."""
        await self._call(self._store.create_indexes, limit=LONG_LIMIT)

    async def grant(self, user: str, password: str | None, *, x509: bool) -> None:
        """Make a site's user with its role, or bring them up to date; see `grants`."""

        async def grant() -> None:
            for name, command in commands(self.settings, user, password, x509=x509):
                await carry_out(self._client[name], command)

        await self._call(grant)

    async def close(self) -> None:
        """Close all connections."""

        async def close() -> None:
            if self._session is not None:
                await self._session.end_session()
            await self._client.close()
            await asyncio.gather(*self._closing)
            # A transport closes its socket one turn of the loop after it was told to.
            await asyncio.sleep(0)
            await asyncio.sleep(0)

        await aio.call(close)

    # -- the lease --------------------------------------------------------------------------

    async def acquire(
        self, site: str, owner: str, lease_time: float, now: datetime, configuration: str = ""
    ) -> tuple[Lease, int] | None:
        """Take the site over if nobody holds it: our lease and how many claims were interrupted.

        `configuration` is the digest of our sites.json: others see whether theirs differs.

        None where another process's lease has not lapsed. From the new epoch on the former process
        can begin nothing, and once its claims are opened it can settle nothing.
        """

        async def acquire() -> tuple[Lease, int] | None:
            await self._store.register(site)
            asked = time.monotonic()
            former = await self._store.predecessor(site)
            if former is None:
                return None  # it was dropped just now
            self._note_time(former["now"], asked)
            if former["active"]:
                return None
            await self._end_session(former.get("lsid"))
            self._session = self._client.start_session()
            # Not a transaction: one that we were killed in would lock the site's document for a
            # minute, and the next process could not know whose session it has to end.
            lsid = self._session.session_id
            known = is_epoch(former.get("epoch"))
            least = 0 if known else await self._store.last_epoch(site)
            epoch = await self._store.take_over(
                site, owner, lease_time, lsid, configuration=configuration, least=least
            )
            if epoch is None:
                return None
            point("database.takeover.epoch")
            claims = await self._store.interrupt_claims(site, epoch, now)
            point("database.takeover.claims")
            return Lease(site, epoch, owner), claims

        return await self._call(acquire, limit=WRITES_LIMIT)

    async def _end_session(self, lsid: Any) -> None:
        # A process that was killed inside a transaction leaves it open for a minute, and its
        # locks with it. Ending one's own user's sessions needs no right.
        if not isinstance(lsid, Mapping) or not isinstance(lsid.get("id"), bytes | UUID):
            return
        try:
            await self._client.admin.command({"killSessions": [{"id": lsid["id"]}]})
        except OperationFailure as error:
            if error.code not in AUTH_CODES | DOCUMENT_CODES:
                raise

    async def renew(
        self, lease: Lease, lease_time: float, trouble: str | None, configuration: str = ""
    ) -> SiteRecord:
        """Prolong the lease, and record what troubles us. Raises `LeaseLost`.

        `configuration` is the digest of our sites.json, if it may have changed.
        """
        limit = max(lease_time / 3, SHORTEST_LIMIT)
        asked = time.monotonic()
        state: dict[str, Any] = {"trouble": trouble, "skew": round(clock.skew, 3)}
        if self._session is not None:
            state["lsid"] = self._session.session_id
        if configuration:
            state["configuration"] = configuration
        record = await self._call(self._store.renew, lease, lease_time, state, limit=limit)
        assert record.expires is not None
        self._note_time(record.expires - timedelta(seconds=lease_time), asked)
        return record

    async def release(self, lease: Lease) -> None:
        """End the lease now."""
        point("database.release.before")
        await self._call(self._store.release, lease)

    async def site_records(self) -> list[SiteRecord]:
        """Read what is known of every site that ever listened."""
        return await self._call(self._store.records, {})

    async def site_record(self, site: str) -> SiteRecord | None:
        """Read what is known of one site."""
        return await self._call(self._store.record, site)

    # -- watching ---------------------------------------------------------------------------

    async def cluster_time(self) -> Timestamp:
        """Return a time such that whatever comes before it can be read from now on.

        That is just after the last operation that a majority has: a stream that starts there
        does not meet again what ended the one before, such as the drop of the collection.
        """

        async def cluster_time() -> Timestamp:
            reply = await self._client.admin.command("hello")
            majority = reply.get("lastWrite", {}).get("majorityOpTime")  # a mongos gives none
            last: Timestamp = majority["ts"] if majority else reply["operationTime"]
            return Timestamp(last.time, last.inc + 1)

        return await self._call(cluster_time)

    async def open_stream(self, position: Position, watched: Watched = NO_FIELDS) -> Stream:
        """Open the change stream after `position`. Raises `HistoryLost`."""

        async def open_stream() -> Stream:
            database = self._client[self.settings.database]
            stream = Stream(database, self.settings.collection, watched)
            await stream.open(position)
            return stream

        return await self._call(open_stream)

    async def next_batch(self, stream: Stream, wait: float | None = None) -> Batch:
        """Wait for the stream's next batch; empty after `wait` (`AWAIT`) seconds without a change.

        Cancelling this ends the stream. Raises `HistoryLost`.
        """
        wait = AWAIT if wait is None else wait
        return await self._call(stream.next, wait, held=wait)

    async def close_stream(self, stream: Stream) -> None:
        """Close the stream."""
        await self._call(stream.close)

    async def snapshot(
        self,
        site: str,
        runs: Sequence[RunId],
        known: Mapping[RunId, Mapping[Aspect, str]] | None = None,
        watched: Watched = NO_FIELDS,
    ) -> Snapshots:
        """Look at runs as they are now, and at what the site last saw of them.

        `known` are snapshots that the caller has and that need not be read.
        """
        return await self._call(self._look, site, runs, known or {}, watched)

    async def next_look(
        self,
        stream: Stream,
        site: str,
        known: Mapping[RunId, Mapping[Aspect, str]],
        watched: Watched = NO_FIELDS,
    ) -> tuple[Batch, Snapshots]:
        """Wait for the stream's next batch and look at its runs: `next_batch` and `look` in one."""

        async def next_look() -> tuple[Batch, Snapshots]:
            batch = await stream.next(AWAIT)
            return batch, await self._look(site, list(batch.runs), known, watched)

        return await self._call(next_look, held=AWAIT)

    async def _look(
        self,
        site: str,
        runs: Sequence[RunId],
        known: Mapping[RunId, Mapping[Aspect, str]],
        watched: Watched,
    ) -> Snapshots:
        if not runs:  # an idle stream's empty batches must not become queries
            return Snapshots({}, {}, {})
        # `known` is the caller's, who may change it meanwhile, in another thread.
        last = {run: dict(snapshot) for run in runs if (snapshot := known.get(run)) is not None}
        unknown = [run for run in runs if run not in last]
        # Few runs are read whole, so that their handlers can start without another question.
        few = len(runs) <= FEW
        reading = self._confirmed.find(
            {"_id": {"$in": list(runs)}}, None if few else snapshot_projection(watched)
        ).to_list(None)
        if unknown:
            documents, found = await asyncio.gather(reading, self._store.snapshots(site, unknown))
            last.update(found)
        else:
            documents = await reading
        now = {document["_id"]: snapshot_of(document, watched) for document in documents}
        whole = {doc["_id"]: Run.from_document(doc) for doc in documents} if few else {}
        return Snapshots(now, last, whole)

    async def ingest(self, lease: Lease, ingest: Ingest, now: datetime) -> None:
        """Record what changes led to. Raises `LeaseLost`.

        All of it in one transaction or, where there are more than `MOST_DEBTS`, the first of these
        before, as many at a time: a long one would keep the lease from being renewed. Looks and
        position come last, so what was cut off is found again, and renews what is there.
        """
        reactions = list(ingest.reactions)
        while len(reactions) > MOST_DEBTS:
            some, reactions = reactions[:MOST_DEBTS], reactions[MOST_DEBTS:]
            await self._ingest(lease, Ingest({}, some), now)
        await self._ingest(lease, evolve(ingest, reactions=reactions), now)

    async def _ingest(self, lease: Lease, ingest: Ingest, now: datetime) -> None:
        attempts = count()

        async def write(session: AsyncClientSession) -> None:
            point("database.ingest.begin")
            position = {} if ingest.position is None else position_fields(ingest.position, now)
            await self._store.ingest(
                lease,
                ingest.snapshots,
                ingest.reactions,
                position,
                session,
                guard_first=next(attempts) > 0,
            )
            for run, priority in ingest.priorities.items():
                await self._store.set_priority(lease.site, run, priority, session)
            point("database.ingest.commit")

        await self._transact(write)
        point("database.ingest.after")

    async def save_position(self, lease: Lease, position: Position, now: datetime) -> None:
        """Remember an idle stream's position. Raises `LeaseLost`."""
        await self._call(self._store.save_position, lease, position, now)
        point("database.position.after")

    async def rules_applied(self, lease: Lease, digests: Mapping[str, str]) -> None:
        """Note the digests of the applied rule files, by catalogue. Raises `LeaseLost`."""
        await self._call(self._store.rules_applied, lease, digests)

    async def note_marker(self, site: str, root: str, marker: str) -> None:
        """Note the id of the marker of a site's directory, in place of any other."""
        await self._call(self._store.note_marker, site, root, marker)

    async def note_away(self, lease: Lease, away: Mapping[str, str]) -> None:
        """Note which directories of the site are not there, and why. Raises `LeaseLost`."""
        await self._call(self._store.note_away, lease, away)

    async def wake(self, lease: Lease, root: str, now: datetime) -> int:
        """Make due what waits for a directory of the site; how much. Raises `LeaseLost`."""
        return await self._call(self._store.wake, lease, root, now)

    async def known_locations(self, site: str, type: str, limit: int) -> list[str]:  # noqa: A002
        """Where the entries of copies at a site have their files, good or not; of the newest runs.

        A disk that is away may have made each copy an error. What is still being brought there
        need not have a file yet.
        """
        begun = (REQUESTED, TRANSFERRING)
        known = {"host": site, "type": type, "location": {"$gt": ""}, "status": {"$nin": begun}}

        async def known_locations() -> list[str]:
            cursor = self._runs.find({"data": {"$elemMatch": known}}, _SHOWN).sort("_id", -1)
            runs = [Run.from_document(row) for row in await cursor.limit(limit).to_list(None)]
            return [
                one.location
                for run in runs
                for one in run.copies
                if (one.host, one.type) == (site, type) and one.location and one.status not in begun
            ]

        return await self._call(known_locations)

    async def finish_scan(
        self,
        lease: Lease,
        start: Timestamp | None,
        now: datetime,
        gap: Gap | None,
        watched: Watched = NO_FIELDS,
    ) -> None:
        """Note a completed scan; see `Store.finish_scan`. Raises `LeaseLost`."""
        await self._call(self._store.finish_scan, lease, start, now, gap, watched)

    async def page(self, site: str, after: RunId | None) -> tuple[list[RunId], RunId | None]:
        """Return a page of run ids, stored or seen, and the `after` with which to ask for the next.

        That is None when there are no more. Runs that were seen but are no longer stored are
        among them, so that a scan also finds what was deleted.
        """

        async def page() -> tuple[list[RunId], RunId | None]:
            low: Any = MinKey() if after is None else after
            # By the index's bounds: a filter would stop where ids begin to be of another type.
            cursor = self._runs.find({}, {"_id": 1}).hint([("_id", 1)]).min([("_id", low)])
            ids = [row["_id"] for row in await cursor.limit(PAGE + 1).to_list(None)]
            more = ids.pop() if len(ids) > PAGE else None
            seen = await self._store.seen_between(site, low, MaxKey() if more is None else more)
            return list(dict.fromkeys([*filter(is_usable, ids), *seen])), more

        return await self._call(page)

    # -- reactions ------------------------------------------------------------------------------

    async def standing(self, keys: Sequence[str]) -> dict[str, Reaction]:
        """Return the reactions in these keys."""
        return await self._call(self._store.standing, keys)

    async def due(
        self,
        site: str,
        lane: str,
        now: datetime,
        limit: int,
        *,
        since: datetime | None = None,
        order: Order = OLDEST_FIRST,
        without: RunId | None = None,
    ) -> list[Reaction]:
        """Return reactions of a lane that are due and unclaimed, in that order; see `Store.due`."""

        async def due() -> list[Reaction]:
            store = self._store
            return await store.due(
                site, lane, now, limit, since=since, order=order, without=without
            )

        return await self._call(due)

    async def next_due(self, site: str, lane: str, now: datetime) -> datetime | None:
        """Return when a lane's next reaction falls due after `now`."""
        return await self._call(self._store.next_due, site, lane, now)

    async def lanes(self, site: str) -> list[str]:
        """Return the lanes in which the site has open reactions."""
        return await self._call(self._store.lanes, site)

    async def claim(self, reactions: Sequence[Reaction], epoch: int) -> list[Reaction]:
        """Claim open reactions in one write; return those that were still as given.

        Cancelled, it goes on for up to `CLAIMING` seconds: who has lost the lease must find that
        out, and give back what it has claimed.
        """
        with trio.move_on_after(CLAIMING, shield=True):
            return await self._call(self._store.claim, reactions, epoch)
        raise Unreachable(f"claiming took more than {CLAIMING:.0f} s")

    async def claims(self, lease: Lease) -> list[Document]:
        """Return what the site has claimed; see `Store.claims`."""
        return await self._call(self._store.claims, lease)

    async def free(self, claims: Sequence[Document]) -> tuple[int, dict[str, str]]:
        """Open claims again; see `Store.free`."""
        return await self._call(self._store.free, claims)

    async def settle(self, reactions: Sequence[Reaction], epoch: int) -> tuple[int, int]:
        """Settle reactions in one write: how many counted, and how many had been renewed."""
        return await self._call(self._store.settle, reactions, epoch)

    async def settle_with(
        self, reaction: Reaction, epoch: int, update: RunUpdate, now: datetime
    ) -> tuple[bool, bool]:
        """Write a run update and settle the reaction, both or neither: (it fitted, was renewed).

        Where the update no longer fits the run, nothing is written. Raises `LeaseLost`.
        """

        async def write(session: AsyncClientSession) -> tuple[bool, bool]:
            if await self._apply(update, now, session) is None:
                return False, False
            point("database.update.settle")
            settled, renewed = await self._store.settle([reaction], epoch, session)
            if not settled + renewed:
                raise _ClaimGone
            return True, bool(renewed)

        try:
            done: tuple[bool, bool] = await self._transact(write)
        except _ClaimGone:
            await self._check_epoch(reaction.site, epoch)
            return True, True  # settled before, and the reply got lost
        point("database.update.after")
        return done

    async def settle_together(
        self, reactions: Sequence[Reaction], epoch: int, updates: Sequence[RunUpdate], now: datetime
    ) -> int | None:
        """Write an update for each of these reactions and settle them: how many had been renewed.

        None, and nothing is written, where one of the updates does not fit or cannot be stored, a
        claim is gone, or somebody else writes to one of these runs now.
        """
        attempts = count()

        async def write(session: AsyncClientSession) -> int:
            if next(attempts):
                raise _NotTogether
            for update in updates:
                if await self._apply(update, now, session) is None:
                    raise _NotTogether
            point("database.update.settle")
            settled, renewed = await self._store.settle(reactions, epoch, session)
            if settled + renewed < len(reactions):
                raise _NotTogether
            return renewed

        try:
            renewed: int = await self._transact(write)
        except (_NotTogether, InvalidDocument):
            return None
        point("database.update.after")
        return renewed

    async def _check_epoch(self, site: str, epoch: int) -> None:
        record = await self.site_record(site)
        if record is None or record.epoch != epoch:
            raise LeaseLost(f"another process has taken over {site}")

    async def update(
        self, reaction: Reaction, epoch: int, update: RunUpdate, now: datetime
    ) -> Run | None:
        """Write a run update on behalf of a claimed reaction; the run as it is then.

        None where the run is no longer what the update expects, or the claim was given back.
        Raises `LeaseLost`.
        """

        async def write(session: AsyncClientSession) -> Document | None:
            document = await self._apply(update, now, session)
            if document is None:
                return None
            if not await self._store.fence(reaction, epoch, session):
                raise _ClaimGone
            return document

        point("database.update.before")
        try:
            document = await self._transact(write)
        except _ClaimGone:
            await self._check_epoch(reaction.site, epoch)
            return None
        point("database.update.after")
        return None if document is None else Run.from_document(document)

    async def update_run(self, update: RunUpdate, now: datetime) -> Run | None:
        """Write a run update on behalf of a person; None where it no longer fits."""
        document = await self._call(self._apply, update, now, None)
        return None if document is None else Run.from_document(document)

    async def _apply(
        self, update: RunUpdate, now: datetime, session: AsyncClientSession | None
    ) -> Document | None:
        query, change, array_filters = write_of(update, now)
        return await self._runs.find_one_and_update(
            query,
            change,
            array_filters=array_filters,
            return_document=ReturnDocument.AFTER,
            session=session,
        )

    async def progress(self, reaction: Reaction, epoch: int, progress: Document) -> None:
        """Show in the ledger how far a running reaction is."""
        await self._call(self._store.progress, reaction, epoch, progress)

    async def keep(self, reaction: Reaction, epoch: int, said: bytes) -> None:
        """Add to what is kept with a running reaction what a program said, packed."""
        await self._call(self._store.keep, reaction, epoch, said)

    async def reactions(
        self,
        site: str | None = None,
        *,
        run: RunId | None = None,
        state: str | None = None,
        handler: str | None = None,
        limit: int = 1000,
    ) -> list[tuple[Reaction, Document]]:
        """Return reactions with their whole documents; `run` needs `site`."""
        query: Document = run_keys(site, run) if site is not None and run is not None else {}
        if site is not None:
            query["site"] = site
        if state is not None:
            query["state"] = state
        if handler is not None:
            query["handler"] = handler

        async def reactions() -> list[tuple[Reaction, Document]]:
            return self._read_reactions(
                await self._store.find_reactions(query, limit).to_list(None)
            )

        return await self._call(reactions)

    async def hindered(self, site: str) -> list[Reaction]:
        """Return the site's open reactions that wait for something outside."""
        query = {"site": site, "state": "pending", "hindered": {"$exists": True}}

        async def hindered() -> list[tuple[Reaction, Document]]:
            return self._read_reactions(await self._store.ledger.find(query).to_list(None))

        return [reaction for reaction, _ in await self._call(hindered)]

    def _read_reactions(self, documents: Iterable[Document]) -> list[tuple[Reaction, Document]]:
        rows = self._store.read(self._store.ledger, documents, reaction_from)
        return [(reaction, document) for document, reaction in rows]

    async def moving(self, sites: Iterable[str]) -> list[tuple[Reaction, Document]]:
        """Return the claimed reactions of these sites that say how far they are."""
        # By the index of what is claimed.
        claimed = {"site": {"$in": list(sites)}, "epoch": {"$exists": True}}
        query = {**claimed, "state": "running", "progress": {"$type": "object"}}

        async def moving() -> list[tuple[Reaction, Document]]:
            return self._read_reactions(await self._store.ledger.find(query).to_list(None))

        return await self._call(moving)

    async def tally(self, site: str | None = None) -> dict[str, dict[str, int]]:
        """Return, for each site, how many reactions stand in each state."""

        async def tally() -> dict[str, dict[str, int]]:
            named = {name: {"$type": "string"} for name in ("handler", "site", "state")}
            match = {"$match": {**named, **({"site": site} if site else {})}}
            group = {"_id": {"site": "$site", "state": "$state"}, "n": {"$sum": 1}}
            cursor = await self._store.ledger.aggregate([match, {"$group": group}])
            counts: dict[str, dict[str, int]] = {}
            for row in await cursor.to_list(None):
                counts.setdefault(row["_id"]["site"], {})[row["_id"]["state"]] = row["n"]
            return counts

        return await self._call(tally)

    # -- malformed documents ------------------------------------------------------------------

    @property
    def odd(self) -> list[Odd]:
        """The malformed documents that were passed over, each until it is set aside."""
        return list(self._store.odd.values())

    async def audit(self, site: str) -> None:
        """Look for malformed reactions of a site that nothing else would meet; see `odd`."""
        await self._call(self._store.audit, site, limit=LONG_LIMIT)

    async def forget_aside(self, site: str, now: datetime) -> set[tuple[str, str]]:
        """Remove what this site set aside long ago; the `Odd.key` of each document that is kept."""
        return await self._call(self._store.forget_aside, site, now)

    async def set_aside(self, lease: Lease, odd: Odd, now: datetime) -> bool:
        """Move a malformed document where nothing reads it; False if it is readable by now.

        Raises `LeaseLost`.
        """

        async def move(session: AsyncClientSession) -> bool:
            return await self._store.set_aside(lease, odd, now, session)

        moved: bool = await self._transact(move)
        self._store.odd.pop(odd.key, None)
        return moved

    # -- alarms -----------------------------------------------------------------------------

    async def alarms(self, site: str | None = None) -> list[AlarmState]:
        """Return the alarms of a site, or of all, as they were last kept."""
        return await self._call(self._store.alarms, site)

    async def keep_alarms(
        self, lease: Lease, kept: Sequence[AlarmState], gone: Sequence[str] = ()
    ) -> None:
        """Write how alarms stand, and forget others, by their keys. Raises `LeaseLost`."""

        async def keep(session: AsyncClientSession) -> None:
            await self._store.keep_alarms(lease, kept, gone, session)

        point("database.alarms.before")
        await self._transact(keep)
        point("database.alarms.after")

    # -- requests ---------------------------------------------------------------------------

    async def add_request(self, site: str, request: Request, by: str, now: datetime) -> None:
        """Leave a request for the site's listener."""
        await self._call(self._store.add_request, site, request, by, now)

    async def pending(self, site: str) -> list[Request]:
        """Return the requests that wait for this site."""
        return await self._call(self._store.pending, site)

    async def finish_request(self, lease: Lease, request: Request) -> None:
        """Take a request that was carried out off the list. Raises `LeaseLost`."""

        async def finish(session: AsyncClientSession) -> None:
            await self._store.finish_request(lease, request, session)

        await self._transact(finish)
        point("database.request.after")

    async def reopen_failed(self, lease: Lease, request: Request, now: datetime) -> int:
        """Open the failed reactions again that a request names; how many. Raises `LeaseLost`."""
        runs, handler = request.runs, request.handler

        async def reopen(session: AsyncClientSession) -> int:
            return await self._store.reopen_failed(lease, runs, handler, now, session)

        return await self._transact(reopen)

    # -- runs -------------------------------------------------------------------------------

    async def runs(self, ids: Iterable[RunId]) -> dict[RunId, Run]:
        """Read whole run documents as they are now."""

        async def runs() -> dict[RunId, Run]:
            cursor = self._runs.find({"_id": {"$in": list(ids)}})
            return {doc["_id"]: Run.from_document(doc) for doc in await cursor.to_list(None)}

        return await self._call(runs)

    @asynccontextmanager
    async def follow(
        self, run: RunId, sites: Sequence[str]
    ) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        """Follow a run and what these sites owe it: a function that waits for the next change.

        What changes after the block was entered is not missed: look first, then wait. Cancelling
        the wait ends the stream, and so does any error.
        """
        which: list[Document] = [{"ns.coll": self._runs.name, "documentKey._id": run}]
        for site in sites:
            keys = run_keys(site, run)["_id"]
            which.append({"ns.coll": self._store.ledger.name, "documentKey._id": keys})
        following = Following(self._client[self.settings.database], which)
        await self._call(following.open)
        try:
            yield lambda: self._call(following.changed, held=float("inf"))
        finally:
            with trio.move_on_after(_CLOSING, shield=True):
                await self._call(following.close)

    async def select(self, selection: Selection, now: datetime, limit: int = 0) -> list[Run]:
        """Read the runs that are meant, in the order of their numbers; 0: no limit."""

        async def select() -> list[Run]:
            cursor = self._runs.find(selection.query(now), _SHOWN).sort("number").limit(limit)
            return [Run.from_document(document) for document in await cursor.to_list(None)]

        return await self._call(select)

    async def pages(self, selection: Selection, now: datetime) -> AsyncIterator[list[Run]]:
        """Read the runs that are meant page by page, in the order of their ids.

        Of each what `select` reads. A run that changes meanwhile is read once, before or after.
        """
        after: RunId | None = None
        query = selection.query(now)

        async def page() -> list[Document]:
            low: Any = MinKey() if after is None else after
            # By the index's bounds, as in `page`.
            cursor = self._runs.find(query, _SHOWN).hint([("_id", 1)]).min([("_id", low)])
            return await cursor.limit(PAGE + 1).to_list(None)

        while True:
            documents = await self._call(page)
            more = documents.pop() if len(documents) > PAGE else None
            yield [Run.from_document(document) for document in documents]
            if more is None:
                return
            after = more["_id"]

    async def totals(self, selection: Selection, now: datetime) -> list[dict[str, Any]]:
        """Count the copies that are meant, for each host, type and status.

        Each row has `host`, `type`, `status`, `copies`, their `bytes`, and in `sized` of how many
        copies these are.
        """

        async def totals() -> list[dict[str, Any]]:
            pipeline = totals_pipeline(selection, now)
            cursor = await self._runs.aggregate(pipeline, allowDiskUse=True)
            return [{**row.pop("_id"), **row} for row in await cursor.to_list(None)]

        return await self._call(totals, limit=LONG_LIMIT)

    async def located(
        self, hosts: Iterable[str], locations: Sequence[str], roots: Iterable[str] = ()
    ) -> list[Run]:
        """Read the runs that have a copy at one of these hosts in one of these places.

        With `roots` also those that have one which may be anywhere, as it is not written plainly
        as below one of them.
        """
        odd = [_oddly_below(roots)] if (roots := tuple(roots)) else []
        return await self._with_copies(hosts, [{"location": {"$in": list(locations)}}, *odd])

    async def neighbours(self, wanted: Neighbours) -> list[Run]:
        """Read the runs that have a copy of which files may be where those of another copy are."""
        above = {str(one) for name in wanted.names for one in _upwards(name)}
        below = "|".join(map(re.escape, wanted.names))
        ways: list[Document] = [
            {"location": {"$in": [*above, *(f"{one}/" for one in above)]}},
            {"location": Regex(f"^(?:{below})/")},
            _oddly_below(wanted.roots),
            {"manifest": None, "checksum": None},
            *({"manifest": one} for one in (wanted.manifest,) if one),
            *({"checksum": one} for one in (wanted.checksum,) if one),
        ]
        return await self._with_copies(wanted.hosts, ways)

    async def _with_copies(self, hosts: Iterable[str], ways: Sequence[Document]) -> list[Run]:
        """Read the runs that have a copy at one of these hosts to which one of `ways` applies."""
        wanted = {"host": {"$in": list(hosts)}, "$or": list(ways)}

        async def find() -> list[Run]:
            cursor = self._runs.find({"data": {"$elemMatch": wanted}}, _SHOWN)
            return [Run.from_document(document) for document in await cursor.to_list(None)]

        return await self._call(find)

    async def table(self, name: str) -> list[Document]:
        """Read all rows of a collection beside the runs; none where there is no such."""

        async def table() -> list[Document]:
            collection = self._client[self.settings.database][name]
            return await collection.find({}).to_list(None)

        return await self._call(table)

    async def new_run(self, name: str, detector: str, fields: Document) -> RunId:
        """Add a run of that name and detector, unless there is one; its id."""

        async def new_run() -> RunId:
            which = {"name": name, "detector": detector}
            found = await self._runs.find_one_and_update(
                which,
                {"$setOnInsert": {**fields, "data": []}},
                {"_id": 1},
                upsert=True,
                return_document=ReturnDocument.AFTER,
            )
            assert found is not None  # it was made
            return found["_id"]

        return await self._call(new_run)

    async def oldest(
        self,
        site: str,
        type: str,  # noqa: A002  # the field's own name
        without: Iterable[str],
        skip: int,
    ) -> list[Run]:
        """Read the runs of which the site has such data, good or about to go, oldest first.

        None that has one of the tags `without`; `PAGE` at most, after the first `skip`.
        """
        here = {"type": type, "host": site, "status": {"$in": [TRANSFERRED, DELETING]}}
        query = {"data": {"$elemMatch": here}, "tags.name": {"$nin": list(without)}}

        async def oldest() -> list[Run]:
            cursor = self._runs.find(query).sort({"start": 1, "_id": 1}).allow_disk_use(True)
            cursor = cursor.skip(skip).limit(PAGE)
            return [Run.from_document(document) for document in await cursor.to_list(None)]

        return await self._call(oldest)

    async def insert_run(self, document: Document) -> RunId:
        """Add a run document."""

        async def insert() -> RunId:
            return (await self._runs.insert_one(document)).inserted_id

        return await self._call(insert)

    # -- manifests --------------------------------------------------------------------------

    async def store_manifest(self, digest: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep a manifest's items under its digest."""
        await self._call(self._store.store_manifest, digest, rows)

    async def load_manifest(self, digest: str) -> list[Document] | None:
        """Return a manifest's items, or None."""
        return await self._call(self._store.load_manifest, digest)


def _name_of(function: Callable[..., Any]) -> str:
    """Return what a call is: of a database method's nested function, the method."""
    inner = function.args[0] if isinstance(function, partial) else function
    parts: list[str] = inner.__qualname__.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


_SHOWN: Final = dict.fromkeys(
    ("number", "name", "detector", "start", "end", "tags", "data", "raw_size_byte"), 1
)


def _upwards(name: str) -> Iterator[PurePosixPath]:
    path = PurePosixPath(name)
    yield path
    yield from path.parents


def _oddly_below(roots: Iterable[str]) -> Document:
    """Match a location that is not written plainly as below one of these directories."""
    tops = "|".join(re.escape(root.rstrip("/")) for root in roots)
    plainly = Regex(rf"^(?:{tops})(?:/(?!\.{{1,2}}(?:/|$))[^/]+)+$")
    return {"location": {"$regex": "^/", "$not": plainly}}
