"""The time that sites share: the database's, whatever this machine's clock shows."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any

import pytest
from bson import ObjectId
from pymongo import MongoClient

from caxev.core.clock import DRIFT, Anchor, Clock, clock, utcnow
from caxev.core.job import Job
from caxev.core.model import CopyKey, Event, Run
from tests import engine
from tests.conftest import Database as Named

NOW = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)


class Wrong(datetime):
    """The clock of a machine that is wrong by `by`."""

    by = timedelta()

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return datetime.now(tz) + cls.by


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Wrong]]:
    """This machine's clock, to be set; the shared one is anchored at the right time before."""
    before = clock.anchor
    clock.anchor = Anchor(datetime.now(UTC), monotonic(), 0.001)
    monkeypatch.setattr("caxev.core.clock.datetime", Wrong)
    yield Wrong
    Wrong.by, clock.anchor = timedelta(), before


@pytest.mark.parametrize("by", [-DAY, timedelta(seconds=-20), 40 * DAY])
def test_a_local_clock_that_is_set_moves_nothing(local: type[Wrong], by: timedelta) -> None:
    """The shared time goes on; by how much the local one is wrong is known at once."""
    before = utcnow()
    local.by = by
    assert timedelta() <= utcnow() - before < timedelta(seconds=30)
    assert clock.skew == pytest.approx(by.total_seconds(), abs=1.0)
    local.by = -by
    assert clock.skew == pytest.approx(-by.total_seconds(), abs=1.0)


def test_what_cannot_be_undone_needs_both_clocks(local: type[Wrong]) -> None:
    """Neither a local clock that is ahead nor a database that is makes anything old early."""
    local.by = 40 * DAY
    assert Job.safe_now() <= utcnow()
    local.by = -DAY
    assert timedelta(hours=23) < utcnow() - Job.safe_now() < timedelta(hours=25)
    local.by = timedelta()
    clock.note(datetime.now(UTC) + 40 * DAY, monotonic())  # the new primary's clock is ahead
    assert utcnow() - datetime.now(UTC) > 39 * DAY
    assert abs(Job.safe_now() - datetime.now(UTC)) < timedelta(seconds=30)


def test_a_better_reading_replaces_a_worse_one() -> None:
    """What took long to hear is not believed over what took short, until that is old."""
    one = Clock()
    assert one.now() - datetime.now(UTC) < timedelta(seconds=30)  # nothing is known yet
    assert one.note(NOW, monotonic() - 4.0) == 0.0
    assert one.anchor is not None
    assert one.anchor.error == pytest.approx(2.0, abs=0.5)
    assert one.note(NOW + timedelta(seconds=1), monotonic()) == 0.0
    assert one.anchor.error < 0.5
    good = one.anchor
    assert one.note(NOW + timedelta(seconds=1), monotonic() - 4.0) == 0.0
    assert one.anchor is good
    assert good.doubt(good.at + 1 / DRIFT) == pytest.approx(1.0, abs=0.5)


def test_another_primary_moves_the_time_and_that_is_known() -> None:
    """Its clock is the shared one from then on, forth and back."""
    one = Clock()
    one.note(NOW, monotonic())
    assert one.note(NOW + DAY, monotonic()) == pytest.approx(DAY.total_seconds(), abs=30)
    assert one.now() - NOW > timedelta(hours=23)
    assert one.note(NOW, monotonic()) == pytest.approx(-DAY.total_seconds(), abs=30)
    assert one.now() - NOW < timedelta(hours=1)


def test_testing_moves_the_shared_time_and_not_the_skew() -> None:
    """`caxev.testing` lets time pass for both clocks."""
    one = Clock()
    one.note(datetime.now(UTC), monotonic())
    one.ahead = 5 * DAY
    assert one.now() - datetime.now(UTC) > 4 * DAY
    assert one.safe_now() - datetime.now(UTC) > 4 * DAY
    assert abs(one.skew) < 30


def test_a_job_has_both_times(local: type[Wrong]) -> None:
    """A handler reads the shared time, and the one that is past on both clocks."""
    local.by = -DAY
    one = Job(Run(ObjectId()), Event(1, CopyKey("raw", "lngs"), None, "x"))
    assert one.now() > one.safe_now()
    assert one.now().microsecond % 1000 == one.safe_now().microsecond % 1000 == 0


@pytest.mark.replicaset
async def test_a_listener_takes_the_time_of_the_database(
    database: Named, local: type[Wrong]
) -> None:
    """At the connection, when it takes the lease and with each renewal; its skew is on record."""
    local.by = -DAY
    async with engine.opened(database) as db:
        clock.anchor = None
        await db.check()
        assert clock.skew == pytest.approx(-DAY.total_seconds(), abs=5)
        clock.anchor = None
        taken = await db.acquire("lngs", "me", 10.0, utcnow())
        assert taken is not None
        assert clock.skew == pytest.approx(-DAY.total_seconds(), abs=5)
        await db.renew(taken[0], 10.0, None)
        record = await db.site_record("lngs")
        assert record is not None
        assert record.skew == pytest.approx(-DAY.total_seconds(), abs=5)
        clock.note(datetime.now(UTC) + DAY, monotonic())
        await db.renew(taken[0], 10.0, None)
        assert abs(utcnow() - datetime.now(UTC)) < timedelta(seconds=5)


@pytest.mark.replicaset
async def test_a_lease_from_the_future_keeps_nobody_waiting(database: Named) -> None:
    """One that ends later than a lease can was written by a primary whose clock was ahead."""
    async with engine.opened(database) as db:
        assert await db.acquire("lngs", "one", 10.0, utcnow()) is not None
        assert await db.acquire("lngs", "two", 10.0, utcnow()) is None
        client: MongoClient[Any]
        with MongoClient(database.uri) as client:
            ledger: Any = client[database.name]["caxev_ledger"]
            ledger.update_one({"_id": "lngs"}, {"$set": {"expires": datetime.now(UTC) + DAY}})
        taken = await db.acquire("lngs", "two", 10.0, utcnow())
        assert taken is not None
        assert taken[0].epoch == 2
