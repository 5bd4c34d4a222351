"""The history: one row for each thing that happened, none for what did not, and its pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import bson
import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st
from pymongo import MongoClient
from pymongo.synchronous.database import Database as MongoDatabase

from caxev import HERE, Job, Retry, RunUpdate, Skip, copy, tag
from caxev.config import ConfigError, Settings
from caxev.core.alarms import Alarm, AlarmState
from caxev.core.clock import utcnow
from caxev.core.history import MOST_FILES, Deed, HistoryRow, What, joined, of_attempt
from caxev.core.ledger import Done, Postponed, Reaction, State, settle
from caxev.core.ledger import claim as claimed
from caxev.core.model import CopyKey, Event, Run, Tag
from caxev.core.update import RunUpdate as Update
from caxev.database import Database, HistorySearch, Ingest, Lease
from caxev.database.history import history_document, history_row_from
from tests import engine
from tests.conftest import Database as Named
from tests.faults.told import untold
from tests.strategies import aspects, names, texts
from tests.test_cli import Caxev, caxev, insert, online  # noqa: F401  # fixtures

SITE = "lngs"
NOW = datetime(2016, 11, 11, tzinfo=UTC)
EVERY = HistorySearch()

moments = st.integers(0, 4_000_000_000_000).map(
    lambda ms: datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=ms)
)
whole = st.none() | st.integers(0, 2**50)
seconds = st.none() | st.floats(0, 1e9)
deeds = st.builds(
    Deed,
    what=names | st.sampled_from(What),
    source=texts,
    target=texts,
    bytes=whole,
    files=st.lists(texts, max_size=MOST_FILES + 3),
    reason=texts,
    by=texts,
    proof=st.lists(texts, max_size=3),
)
rows = st.builds(
    HistoryRow,
    at=moments,
    site=names | st.just(""),
    deed=deeds,
    handler=texts,
    run=st.none() | names | st.integers(0, 9),
    number=whole,
    name=texts,
    aspect=st.none() | aspects,
    before=st.none() | names,
    after=st.none() | names,
    seconds=seconds,
    waited=seconds,
    attempt=st.integers(1, 99),
    output=st.lists(st.binary(), max_size=3).map(tuple),
    outputs=st.integers(1, 9),
    id=names,
)


# -- pure -----------------------------------------------------------------------------------------


@given(rows, st.integers(0, 1000))
def test_a_row_survives_the_database(row: HistoryRow, days: int) -> None:
    """It is read as it was written, and goes when its days are over, or never."""
    document = {"_id": row.id, **history_document(row, days)}
    stored: dict[str, Any] = bson.decode(bson.encode(document), bson.CodecOptions(tz_aware=True))
    assert history_row_from(stored) == row
    assert stored.get("expires") == (row.at + timedelta(days=days) if days else None)


@given(deeds, deeds)
def test_two_steps_are_one_deed(first: Deed, second: Deed) -> None:
    """Nothing of either is lost: bytes add up, names are kept once each."""
    both = joined(first, second)
    assert joined(None, first) == first
    assert both.what == second.what
    assert (both.bytes or 0) == (first.bytes or 0) + (second.bytes or 0)
    if len({*first.files, *second.files}) <= MOST_FILES:
        assert set(both.files) == {*first.files, *second.files}


def test_a_row_stays_small() -> None:
    """Of thousands of files the first ones are named, of a long reason its beginning is kept."""
    deed = Deed(files=[f"file{n}" for n in range(9999)], reason="x" * 99999)
    assert deed.files[-1] == f"and {9999 - MOST_FILES} more"
    row = HistoryRow(at=NOW, site=SITE, deed=evolve(deed, what="repaired"), id="a")
    assert len(bson.encode(history_document(row, 730))) < 2500


@pytest.mark.parametrize("fact", [{"what": 5}, {"source": None}, {"bytes": "many"}, {"by": b"me"}])
def test_a_fact_of_another_kind_is_refused(fact: dict[str, Any]) -> None:
    """By `did`, in the handler: the row could be neither stored nor read."""
    job = Job(Run(1), Event(1, Tag("go"), None, "yes"))
    with pytest.raises(TypeError):
        job.did(**{"what": "counted", **fact})


@pytest.mark.parametrize("days", ["x", "-1", "nan", "1e9"])
def test_how_long_rows_are_kept(days: str) -> None:
    """What is no number of days is refused, by the variable's name."""
    environ = {"CAXEV_MONGO_URI": "mongodb://localhost", "CAXEV_HISTORY_DAYS": days}
    with pytest.raises(ConfigError, match="CAXEV_HISTORY_DAYS"):
        Settings.load(environ=environ)


# -- settling -------------------------------------------------------------------------------------


@pytest.fixture
def server(database: Named) -> Iterator[MongoDatabase[dict[str, Any]]]:
    """The test's database as a plain client sees it."""
    with MongoClient[dict[str, Any]](database.uri, tz_aware=True) as client:
        yield client[database.name]


async def taken(db: Database, owner: str = "me", lease_time: float = 60.0) -> Lease:
    found = await db.acquire(SITE, owner, lease_time, utcnow())
    assert found is not None
    return found[0]


async def at_work(db: Database, lease: Lease, number: int = 1) -> list[Reaction]:
    """Claimed reactions to as many runs."""
    made = []
    for n in range(number):
        run = await db.insert_run(engine.run_document(n + 1, ("raw", SITE, "verifying")))
        event = Event(run, CopyKey("raw", SITE), None, "verifying")
        generation = (lease.epoch << 40) + n
        one = Reaction(SITE, event, "go", lane="default", generation=generation, at=NOW)
        made.append(claimed(one, lease.epoch))
    await db.ingest(lease, Ingest({}, made), utcnow())
    return made


def done(reactions: list[Reaction]) -> list[Reaction]:
    return [settle(one, Done(), utcnow(), allowed=3, jitter=0) for one in reactions]


def rows_of(reactions: list[Reaction]) -> dict[str, HistoryRow]:
    deed = Deed(what=What.VERIFIED, bytes=5)
    return {
        one.id: of_attempt(one, deed, Run(one.run), now=utcnow(), seconds=0.5, over=True)
        for one in reactions
    }


async def history(db: Database, search: HistorySearch = EVERY) -> list[HistoryRow]:
    """What there is but for the starts of listeners."""
    found = [row async for page in db.history_pages(search) for row in page]
    return [row for row in found if row.deed.what != What.STARTED]


@pytest.mark.replicaset
async def test_a_settlement_leaves_one_row_and_no_reaction(database: Named) -> None:
    """However often it is repeated, as after a lost reply."""
    async with engine.opened(database) as db:
        lease = await taken(db)
        reactions = await at_work(db, lease, 3)
        paid, happened = done(reactions), rows_of(reactions)
        assert await db.settle(paid, lease, happened) == (3, 0)
        assert await db.settle(paid, lease, happened) == (0, 0)
        assert await db.reactions(SITE) == []
        found = await history(db)
        assert {row.run for row in found} == {one.run for one in reactions}
        assert len(found) == 3
        assert {(row.deed.what, row.deed.bytes, row.rate) for row in found} == {("verified", 5, 10)}


@pytest.mark.replicaset
async def test_what_was_renewed_meanwhile_has_happened_and_is_owed(database: Named) -> None:
    """The row of the attempt that was under way is there; the reaction stays, to run again."""
    async with engine.opened(database) as db:
        lease = await taken(db)
        reactions = await at_work(db, lease, 2)
        fresh = evolve(
            reactions[0], generation=reactions[0].generation + 9, state=State.PENDING, epoch=None
        )
        await db.ingest(lease, Ingest({}, [fresh]), utcnow())
        assert await db.settle(done(reactions), lease, rows_of(reactions)) == (1, 1)
        assert [(one.generation, one.state) for one, _ in await db.reactions(SITE)] == [
            (fresh.generation, State.PENDING)
        ]
        assert len(await history(db)) == 2


@pytest.mark.replicaset
async def test_who_lost_the_lease_has_no_history(database: Named) -> None:
    """Of several ends, those of reactions that are no longer ours leave nothing; the others do."""
    async with engine.opened(database) as db:
        lease = await taken(db)
        reactions = await at_work(db, lease, 3)
        await db.free([one for one in await db.claims(lease) if one["_id"] == reactions[1].id])
        assert await db.settle(done(reactions), lease, rows_of(reactions)) == (2, 0)
        left = [reactions[0].run, reactions[2].run]
        assert sorted(map(str, left)) == sorted(str(row.run) for row in await history(db))
        assert [one.id for one, _ in await db.reactions(SITE)] == [reactions[1].id]


@pytest.mark.replicaset
async def test_an_update_its_settlement_and_its_row_are_one(database: Named) -> None:
    """If the update no longer fits, nothing happened."""
    async with engine.opened(database) as db:
        lease = await taken(db)
        first, second = await at_work(db, lease, 2)
        runs = await db.runs([first.run, second.run])
        happened = rows_of([first, second])

        def change(one: Reaction, status: str) -> Update:
            seen = evolve(runs[one.run].copies[0], status=status)
            return Update.change_copy(runs[one.run], seen, "transferred")

        paid = done([first, second])
        unfit = [change(first, "error")]
        assert await db.settle_with(paid[:1], lease, unfit, utcnow(), happened) is None
        assert await history(db) == []
        good = [change(first, "verifying"), change(second, "verifying")]
        assert await db.settle_with(paid, lease, good, utcnow(), happened) == 0
        assert await db.settle_with(paid, lease, good, utcnow(), happened) is None
        assert len(await history(db)) == 2
        assert await db.reactions(SITE) == []


@pytest.mark.replicaset
async def test_a_lost_lease_document_does_not_repeat_the_ids_of_rows(
    database: Named, server: MongoDatabase[dict[str, Any]]
) -> None:
    """Generations stay above those of the history, when the ledger no longer knows them."""
    async with engine.opened(database) as db:
        for _ in range(3):
            lease = await taken(db)
            await db.release(lease)
        lease = await taken(db)
        reactions = await at_work(db, lease)
        await db.settle(done(reactions), lease, rows_of(reactions))
        server["caxev_ledger"].delete_many({})
        assert (await taken(db)).epoch > lease.epoch


@pytest.mark.replicaset
async def test_a_row_that_is_there_stops_no_settlement(database: Named) -> None:
    """As when the ledger was restored from a back-up: it is settled, and the row stays."""
    async with engine.opened(database) as db:
        lease = await taken(db)
        reactions = await at_work(db, lease, 3)
        happened = rows_of(reactions)
        former = evolve(happened[reactions[1].id], deed=Deed(what="before"))
        await db.note(former)
        assert await db.settle(done(reactions), lease, happened) == (3, 0)
        assert sorted(row.deed.what for row in await history(db)) == ["before", *["verified"] * 2]
        assert await db.reactions(SITE) == []


# -- what handlers do -----------------------------------------------------------------------------


@pytest.mark.replicaset
async def test_what_did_nothing_leaves_only_its_snapshot(
    database: Named, server: MongoDatabase[dict[str, Any]]
) -> None:
    """An idle run is one document of the ledger; what was done is one row, with its facts."""

    async def idle(job: Job) -> Skip:
        return Skip("there is nothing to do")

    async def acts(job: Job) -> RunUpdate:
        job.did("counted", source="chicago", bytes=7, files=["a", "b"])
        return RunUpdate.set_fields(job.run, counted=1)

    async def plain(job: Job) -> None:
        """Do something that nobody sees."""

    trigger = copy("transferred", host=HERE)
    handlers = [
        engine.handler(idle, trigger),
        engine.handler(acts, tag("go")),
        engine.handler(plain, tag("go")),
    ]
    options = engine.options_for(database, handlers)
    async with engine.opened(database) as db:
        quiet = await db.insert_run(engine.run_document(1, ("raw", SITE, "transferred")))
        busy = await db.insert_run(engine.run_document(2, tags=[{"name": "go"}]))
        await engine.once(db, options)
        assert await db.reactions(SITE) == []
        assert server["caxev_ledger"].count_documents({"_id.s": SITE}) == 2
        assert await history(db, HistorySearch(runs=[quiet])) == []
        acted, done_ = sorted(
            await history(db, HistorySearch(runs=[busy])), key=lambda row: row.handler
        )
    assert acted.deed == Deed(what="counted", source="chicago", bytes=7, files=("a", "b"))
    assert (acted.number, acted.aspect, acted.after, acted.attempt) == (2, Tag("go"), "yes", 1)
    assert (done_.handler, done_.deed) == ("plain", Deed())


@pytest.mark.replicaset
async def test_each_attempt_that_did_something_has_its_row(database: Named) -> None:
    """A handler that serves one site and fails at the next has served the first."""
    tries: list[int] = []

    async def two_steps(job: Job) -> None:
        tries.append(1)
        job.did("brought", target="chicago" if len(tries) == 1 else "stockholm")
        if len(tries) == 1:
            raise Retry("stockholm is away", after=0.0)

    options = engine.options_for(database, [engine.handler(two_steps, tag("go"))])
    async with engine.opened(database) as db, engine.listener(db, options):
        await db.insert_run(engine.run_document(1, tags=[{"name": "go"}]))
        await engine.until(lambda: _has(db, 2))
        assert [row.deed.target for row in await history(db)] == ["stockholm", "chicago"]


@pytest.mark.replicaset
async def test_a_deed_goes_with_the_update_that_makes_it_true(database: Named) -> None:
    """Once: neither the end of the attempt nor a second one repeats it."""
    tries: list[int] = []

    async def brings(job: Job) -> None:
        tries.append(1)
        if len(tries) == 1:
            job.did("brought", target="chicago")
            await job.update(RunUpdate.set_fields(job.run, brought=1))
            raise Retry("as if it were killed here", after=0.0)

    options = engine.options_for(database, [engine.handler(brings, tag("go"))])
    async with engine.opened(database) as db, engine.listener(db, options):
        await db.insert_run(engine.run_document(1, tags=[{"name": "go"}]))
        await engine.until(lambda: _has(db, 2))
        assert [str(row.deed.what) for row in await history(db)] == ["done", "brought"]


async def _has(db: Database, number: int) -> bool:
    return len(await history(db)) == number


def test_an_end_that_is_no_end() -> None:
    """A reaction that is to be tried again has no row of its generation yet."""
    event = Event("run", Tag("go"), None, "yes")
    one = Reaction(SITE, event, "go", lane="default", generation=255, at=NOW)
    late = NOW + timedelta(seconds=90)
    row = of_attempt(one, Deed(), Run("run"), now=late, seconds=30.0, over=False)
    assert (row.id, row.waited, row.seconds) == ("", 60.0, 30.0)
    assert of_attempt(one, Deed(), Run("run"), now=late, seconds=30.0, over=True).id == "lngs:ff"
    postponed = settle(claimed(one, 1), Postponed("no", 5.0), NOW, allowed=3, jitter=0)
    assert postponed.state is State.PENDING


# -- reading --------------------------------------------------------------------------------------


@pytest.mark.replicaset
async def test_pages_of_history(database: Named, server: MongoDatabase[dict[str, Any]]) -> None:
    """Newest first, each row once, by every condition; what is malformed is left out."""
    async with engine.opened(database) as db:
        noted = [
            HistoryRow(
                at=NOW + timedelta(seconds=n // 3),
                site=("lngs", "chicago")[n % 2],
                deed=Deed(what=("tagged", "deleted")[n % 3 == 0]),
                handler="purge" if n % 5 == 0 else "",
                run=n % 4,
                id=f"row {n:03d}",
            )
            for n in range(60)
        ]
        await db.note(*noted)
        await db.note(*noted[:7])  # as after a lost reply
        server["caxev_history"].insert_one({"_id": "odd", "site": "lngs", "at": "yesterday"})
        newest = sorted(noted, key=lambda row: (row.at, row.id), reverse=True)
        assert await history(db) == newest
        assert await db.history(EVERY, limit=7) == newest[:7]
        searches: dict[HistorySearch, Callable[[HistoryRow], bool]] = {
            HistorySearch(site="chicago"): lambda row: row.site == "chicago",
            HistorySearch(runs=(1, 3)): lambda row: row.run in (1, 3),
            HistorySearch(what=("deleted",)): lambda row: row.deed.what == "deleted",
            HistorySearch(handler="purge", site="lngs"): lambda row: (
                row.handler == "purge" and row.site == "lngs"
            ),
            HistorySearch(since=NOW + timedelta(seconds=3), until=NOW + timedelta(seconds=9)): (
                lambda row: 3 <= (row.at - NOW).total_seconds() <= 9
            ),
        }
        for search, fits in searches.items():
            assert await history(db, search) == [row for row in newest if fits(row)]
        assert [row async for page in db.history_pages(EVERY, 5) for row in page] == newest[:5]


@pytest.mark.replicaset
@pytest.mark.parametrize("search", [EVERY, HistorySearch(site="lngs"), HistorySearch(runs=(5,))])
async def test_a_page_costs_no_more_than_a_page(
    database: Named, server: MongoDatabase[dict[str, Any]], search: HistorySearch
) -> None:
    """However long the history is: it is read in order from an index."""
    async with engine.opened(database) as db:
        await db.note(
            *(
                HistoryRow(at=NOW, site=("lngs", "chicago")[n % 2], deed=Deed(), run=5)
                for n in range(400)
            )
        )
        server.command("profile", 2)
        assert len(await db.history(search, limit=10)) == 10
        server.command("profile", 0)
        (read,) = server["system.profile"].find(
            {"ns": f"{database.name}.caxev_history", "op": "query"}
        )
        assert read["docsExamined"] <= 12
        assert not read.get("hasSortStage")


@pytest.mark.replicaset
async def test_a_repeated_note_changes_nothing(
    database: Named, server: MongoDatabase[dict[str, Any]]
) -> None:
    """Nor does a row that another setting would keep for another time."""
    async with engine.opened(database) as db:
        row = HistoryRow(at=NOW, site=SITE, deed=Deed(what=What.TAGGED), id="one")
        await db.note(row)
        db.settings = evolve(db.settings, history_days=0)
        await db.note(evolve(row, deed=Deed(what=What.DELETED)), evolve(row, id="two"))
        assert {row.id: str(row.deed.what) for row in await history(db)} == {
            "one": "tagged",
            "two": "tagged",
        }
        kept = {row["_id"]: row.get("expires") for row in server["caxev_history"].find()}
        assert kept == {"one": NOW + timedelta(days=730), "two": None}


# -- the command ----------------------------------------------------------------------------------


@pytest.mark.replicaset
def test_the_command(online: Caxev, database: Named) -> None:  # noqa: F811  # the fixture
    """Newest first, by run, site, handler, kind and time; the timeline of a run has it, too."""
    insert(database, 1, 2)
    online("listen", "--site", "lngs", "--once")
    rows = online("history", "--json").rows
    assert [row["time"] for row in rows] == sorted((row["time"] for row in rows), reverse=True)
    went = [row for row in rows if row["handler"] == "went"]
    assert sorted(row["run"]["number"] for row in went) == [1, 2]
    assert {(row["site"], row["what"], row["of"]) for row in went} == {("lngs", "done", "tag 'go'")}
    (one,) = online("history", "--run", "1", "--handler", "went", "--json").rows
    assert one["event"] == {"kind": "tag", "tag": "go", "before": None, "after": "yes"}
    assert online("history", "--site", "chicago", "--json").rows == []
    assert online("history", "--what", "deleted", "--json").rows == []
    assert online("history", "--since", "1h", "--what", "done", "--json").rows == went
    assert online("history", "--until", "1h", "--json").rows == []
    assert len(online("history", "--limit", "1", "--json").rows) == 1
    assert "nothing happened" in online("history", "--site", "chicago").out
    done_ = online("reactions", "--done", "--json").rows
    assert sorted(row["run"]["number"] for row in done_) == [1, 2]
    timeline = online("explain", "--run", "1", "--timeline", "--json").rows
    assert [row["state"] for row in timeline if row["handler"] == "went"] == ["done"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--what", "deletd"], "'deleted'"),
        (["--since", "yesterday"], "is no time"),
        (["--site", "chicgo"], "'chicago'"),
        (["--handler", "chekcsum"], "'checksum'"),
    ],
)
def test_a_value_that_nobody_knows(caxev: Caxev, args: list[str], words: str) -> None:  # noqa: F811
    """One line with the nearest known one, and a non-zero exit code."""
    answer = caxev("history", *args)
    assert answer.code != 0
    assert words in answer.err


# -- what handlers do not do ----------------------------------------------------------------------


@pytest.mark.replicaset
async def test_starts_and_changes_of_the_configuration(database: Named) -> None:
    """A row for each time that a process began to act, and for each reload that changed a key."""
    options = engine.options_for(database, [])
    options = evolve(options, sites=evolve(options.sites, keys={"lngs.purge": "of null"}))
    changed = {"lngs": evolve(options.site, purge=5.0)}
    keys = {"lngs.purge": "of 5.0"}
    sites = evolve(options.sites, by_name={**options.sites.by_name, **changed}, keys=keys)
    async with engine.opened(database) as db:
        for reads in (None, lambda: sites):
            reloading = evolve(options, reread=reads)
            async with engine.listener(db, reloading) as leaving:
                await engine.until(lambda: _leads(db))
                if reads is not None:
                    await engine.until(lambda: leaving.hangup)
                    await leaving.hangup()
                    await engine.until(lambda: _has(db, 1))
        (row,) = await history(db)
        starts = await db.history(HistorySearch(what=(What.STARTED,)))
    assert (row.deed.what, row.deed.reason) == (What.CONFIGURED, "lngs.purge")
    assert [one.id for one in starts] == ["lngs:started:2", "lngs:started:1"]


async def _leads(db: Database) -> bool:
    started = await db.history(HistorySearch(what=(What.STARTED,)))
    record = await db.site_record(SITE)
    return record is not None and record.active and len(started) == record.epoch


@pytest.mark.replicaset
async def test_alarms_are_told_once(database: Named) -> None:
    """Raised and cleared, each once however often it is kept, also by the next process."""
    state = AlarmState(Alarm(SITE, "disk", "the disk is full"), NOW)
    over = evolve(state, over=NOW + timedelta(hours=1))
    async with engine.opened(database) as db:
        lease = await taken(db)
        for kept in (state, state, over):
            await db.keep_alarms(lease, [kept])
        db._there.clear()  # as in another process
        await db.keep_alarms(lease, [over], ["another"])
        cleared, raised = await history(db)
    assert (raised.deed.what, raised.deed.reason) == (What.ALARM_RAISED, "the disk is full")
    assert (cleared.deed.what, cleared.at) == (What.ALARM_CLEARED, over.over)


@pytest.mark.replicaset
def test_requests_are_told(online: Caxev, database: Named) -> None:  # noqa: F811
    """Who asked a listener for what, and of which run."""
    insert(database, 1)
    online("replay", "--run", "1", "--site", "lngs", "--handler", "went", "--force")
    (row,) = online("history", "--what", "requested", "--json").rows
    assert (row["site"], row["reason"]) == ("lngs", "replay of 1 run, went, forced")
    assert "@" in row["by"]


# -- how campaigns judge it -----------------------------------------------------------------------


def test_what_campaigns_miss_in_a_history() -> None:
    """A row too few, a row too many, and one of what is owed: each is named."""
    key = CopyKey("raw", "chicago")
    stone = {"type": "raw", "host": "lngs", "pax_version": None, "proof": [{"host": "chicago"}]}
    entry = {"type": "raw", "host": "chicago", "status": "transferred"}
    entry["trigger"] = "chicago: pull: raw at lngs"
    run = Run.from_document({"_id": 1, "data": [entry], "deleted_data": [stone]})
    event = Event(1, CopyKey("raw", "lngs"), None, "transferred@5")
    pull = Reaction("chicago", event, "pull", lane="transfer", generation=7, at=NOW)
    brought = Deed(what=What.TRANSFERRED, source="lngs", target=key.host)
    row = of_attempt(pull, brought, run, now=NOW, seconds=1.0, over=True)
    gone = evolve(row, id="x", site="lngs", handler="erase", deed=Deed(what=What.DELETED))
    assert list(untold(run, [row, gone], [])) == []
    assert "how raw at chicago was brought by pull" in "".join(untold(run, [gone], []))
    assert "that raw at lngs was deleted" in "".join(untold(run, [row], []))
    assert "has 2 rows of" in "".join(untold(run, [row, gone, evolve(row, id="y")], []))
    assert "which is owed" in "".join(untold(run, [row, gone], [pull]))
