"""What the transfer and checksum reactions decide, as pure functions of a run and the sites."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from contextlib import nullcontext
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve
from blake3 import blake3
from bson import ObjectId
from hypothesis import given
from hypothesis import strategies as st
from loguru import logger
from trio.testing import MockClock

from caxev import CopyKey, GiveUp, Job, Manifest, Retry, RunUpdate, Skip, metrics
from caxev.config import DEFAULT_HANDLERS, Deletion, Link, Processing, Site, Sites, load_handlers
from caxev.config.links import TimeOfDay
from caxev.config.reading import read
from caxev.config.retention import Patrol
from caxev.copies import lifecycle
from caxev.copies.deletion import Proven
from caxev.core.alarms import Alarm
from caxev.core.errors import Damaged
from caxev.core.ledger import Done, Postponed
from caxev.core.model import (
    Copy,
    CopyIs,
    Event,
    Run,
)
from caxev.core.registry import recorded
from caxev.core.update import (
    CopiesAtLeast,
    CopyAbsent,
    Expectation,
    NobodyReads,
)
from caxev.engine.attempt import Watch, attempt
from caxev.files import MOVED_PREFIX, Item, Moved
from caxev.files.erasing import GONE_PREFIX, NOTHING
from caxev.files.identity import identity
from caxev.handlers import checksum as verify
from caxev.handlers import deletion, repair, stalled, transfer
from caxev.handlers.judge import quarantine
from caxev.transfer import Route, links
from caxev.transfer.carrying import STALLED, TransferPlan
from caxev.transfer.traffic import Traffic
from tests import strategies as make
from tests.places import vouched

NOW = make.EPOCH
RAW = CopyKey("raw", "lngs")
TRIGGER = "lngs: pull: raw at xenon"
NAME = "161111_1434"


def site(name: str, **fields: Any) -> Site:
    directories = {f"dir_{kind}": f"/{name}/{kind}" for kind in ("raw", "processed", "minitrees")}
    return Site(**{"name": name, "method": "sftp", "hostname": name, **directories, **fields})


def sites_of(*sites: Site) -> Sites:
    return Sites(Path("sites.json"), {site.name: site for site in sites})


LNGS = site("lngs", download_options=("xenon", "chicago"), upload_options=("chicago", "tape"))
ALL = sites_of(
    LNGS,
    site("xenon", master=("raw",)),
    site("chicago"),
    site("tape", method="tsm"),
    site("remote", listener=False),
)


def entry(host: str, status: str = "transferred", **fields: Any) -> dict[str, Any]:
    place = {"location": f"/{host}/raw/{NAME}", "checksum": "ab"}
    return {"type": "raw", "host": host, "status": status, **place, **fields}


ASKED = {"location": None, "checksum": None}
"""What the entry of a copy lacks that a person has asked for."""


def run_of(*entries: dict[str, Any], **fields: Any) -> Run:
    document = {"_id": ObjectId(), "name": NAME, "start": NOW, "data": list(entries)}
    return Run.from_document({**document, **fields})


def copy_of(run: Run, host: str) -> Copy:
    found = run.copy(CopyKey("raw", host))
    assert found is not None
    return found


def pull(
    run: Run, at: str = "xenon", here: Site = LNGS, kind: str = "raw", days: float = 0
) -> TransferPlan | Skip:
    seen = CopyKey(kind, at, "v1" if kind != "raw" else None)
    now = NOW + timedelta(days=days)
    return transfer.plan_pull(run, seen, here, ALL, trigger=TRIGGER, now=now)


def push(
    run: Run,
    name: str = "chicago",
    here: Site = LNGS,
    kind: str = "raw",
    *,
    sites: Sites = ALL,
    days: float = 0,
) -> Any:
    key = CopyKey(kind, name)
    now = NOW + timedelta(days=days)
    return transfer.plan_push(run, key, here, sites, trigger=TRIGGER, now=now)


def why(plan: object) -> str:
    assert isinstance(plan, Skip)
    return plan.why


# -- pull -------------------------------------------------------------------------------------


def test_pull_plans_a_copy_under_the_sites_own_directory() -> None:
    """The first good source, our directory for that type, the run's own directory name."""
    run = run_of(entry("xenon"))
    plan = TransferPlan(copy_of(run, "xenon"), RAW, f"/lngs/raw/{NAME}", TRIGGER, None)
    assert pull(run) == plan


def test_pull_prefers_the_order_of_download_options() -> None:
    """Of two good copies the one named first is fetched, by that one's event alone."""
    run = run_of(entry("chicago"), entry("xenon"))
    plan = pull(run, "xenon")
    assert isinstance(plan, TransferPlan)
    assert plan.source.host == "xenon"
    assert "comes first" in why(pull(run, "chicago"))


def test_pull_falls_back_to_the_next_source() -> None:
    """A first source that is not good yet does not stop the second."""
    plan = pull(run_of(entry("xenon", "verifying"), entry("chicago")), "chicago")
    assert isinstance(plan, TransferPlan)
    assert plan.source.host == "chicago"


def test_pull_after_the_first_source_vanished_takes_another() -> None:
    """Its own event is left where the other source's has been passed over, and finds that one."""
    assert "comes first" in why(pull(run_of(entry("xenon"), entry("chicago")), "chicago"))
    plan = pull(run_of(entry("chicago")), "xenon")
    assert isinstance(plan, TransferPlan)
    assert plan.source.host == "chicago"


def test_pull_after_our_copy_vanished_takes_the_best_source() -> None:
    """Where our own copy is gone, the event speaks of us and not of a source."""
    plan = pull(run_of(entry("chicago")), "lngs")
    assert isinstance(plan, TransferPlan)
    assert plan.source.host == "chicago"


def test_pull_of_derived_data_matches_its_version() -> None:
    """Another version of the same type is another copy."""
    derived = {"type": "processed", "pax_version": "v1", "location": "/xenon/x.root"}
    plan = pull(run_of(entry("xenon", **derived)), kind="processed")
    assert isinstance(plan, TransferPlan)
    assert plan.location == "/lngs/processed/pax_v1/x.root"
    other = run_of(entry("xenon", **{**derived, "pax_version": "v2"}))
    assert "no such copy" in why(pull(other, kind="processed"))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"checksum": None}, "no digest yet"),
        ({"location": "n/a"}, "no location"),
        ({"status": "error"}, "is error"),
        ({"type": "processed"}, "no such copy"),
    ],
)
def test_pull_needs_a_good_source(fields: dict[str, Any], reason: str) -> None:
    """A source is transferred, has a place, and a digest to compare the copy with."""
    here = site("lngs", download_options=("xenon",))
    assert reason in why(pull(run_of(entry("xenon", **fields)), here=here))


def test_pull_takes_a_manifest_for_a_digest() -> None:
    """A source that has a manifest needs no cax-compatible checksum."""
    run = run_of(entry("xenon", checksum=None, manifest="b3:00"))
    assert isinstance(pull(run), TransferPlan)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"data_type": ("processed",)}, "does not move raw data"),
        ({"download_options": ()}, "download_options names no site"),
        ({"download_options": ("tape",)}, "no such copy"),
        ({"download_options": ("nowhere",)}, "no such copy"),
        ({"dir_raw": None}, "no directory for raw data"),
    ],
)
def test_pull_goes_by_sites_json(fields: dict[str, Any], reason: str) -> None:
    """`data_type`, `download_options` and the directories say what is fetched."""
    here = site("lngs", **{"download_options": ("xenon",), **fields})
    assert reason in why(pull(run_of(entry("xenon")), here=here))


@pytest.mark.parametrize(
    ("host", "reason"),
    [("tape", "which this reaction does not serve"), ("nowhere", "not in sites.json")],
)
def test_pull_from_where_ssh_does_not_reach(host: str, reason: str) -> None:
    """A source that is no SSH site, or that no file describes, is none for this reaction."""
    here = site("lngs", download_options=(host,))
    assert reason in why(pull(run_of(entry(host)), host, here))


def test_what_has_taken_the_place_of_an_old_method_is_named() -> None:
    """By a pull and by a push, not only where sites.json is checked."""
    here = site("lngs", upload_options=("grid",), download_options=("grid",))
    grid = site("grid", method="lcg-cp")
    sites = sites_of(here, grid)
    run = run_of(entry("grid"), entry("lngs"))
    found = transfer.sources(run, RAW, here, sites)
    assert "write gfal-copy" in why(found)
    verdict = transfer.plan_push(run, RAW.at("grid"), here, sites, trigger=TRIGGER, now=NOW)
    assert "write gfal-copy" in why(verdict)


@given(purge=st.floats(0.1, 100), days=st.floats(0, 200))
def test_raw_data_that_would_be_purged_at_once_is_not_fetched(purge: float, days: float) -> None:
    """Raw data older than `purge` days stays where it is; nothing else has an age."""
    here = site("lngs", download_options=("xenon",), purge=purge)
    raw = pull(run_of(entry("xenon")), here=here, days=days)
    assert isinstance(raw, Skip) == (timedelta(days=purge) < timedelta(days=days))
    ageless = run_of(entry("xenon"), start=None)
    assert isinstance(pull(ageless, here=here, days=days), TransferPlan)
    derived = run_of(entry("xenon", type="processed", pax_version="v1"))
    assert isinstance(pull(derived, here=here, kind="processed", days=days), TransferPlan)


# -- what is there already ----------------------------------------------------------------------


@pytest.mark.parametrize("status", ["transferring", "error"])
def test_only_ones_own_copy_is_resumed(status: str) -> None:
    """A broken transfer goes on where this very trigger began it, and nowhere else."""
    ours = entry("lngs", status, trigger=TRIGGER)
    run = run_of(entry("xenon"), ours)
    plan = pull(run)
    assert isinstance(plan, TransferPlan)
    assert plan.resume == copy_of(run, "lngs")
    for other in ("pull: raw at chicago", "push: raw at xenon", "raw at xenon", None):
        theirs = run_of(entry("xenon"), entry("lngs", status, trigger=other))
        assert why(pull(theirs)) == f"raw at lngs is {status} already"


def test_a_copy_that_was_found_bad_is_not_taken_up_again() -> None:
    """Not even by the reaction that made it: it would pass for new."""
    ours = entry("lngs", "error", trigger=TRIGGER, checksumproblem=True)
    assert "is error already" in why(pull(run_of(entry("xenon"), ours)))


@pytest.mark.parametrize("status", ["verifying", "transferred", "RSEreupload", None])
def test_a_finished_copy_is_not_made_again(status: str | None) -> None:
    """Even our own entry is left alone once the bytes are there."""
    ours = entry("lngs", trigger=TRIGGER) | {"status": status}
    assert "already" in why(pull(run_of(entry("xenon"), ours)))


def test_an_entry_that_names_another_place_is_given_up() -> None:
    """Bytes never go where the entry does not say they are."""
    ours = entry("lngs", "transferring", trigger=TRIGGER, location="/elsewhere")
    with pytest.raises(GiveUp, match="says '/elsewhere', not '/lngs/raw"):
        pull(run_of(entry("xenon"), ours))


@pytest.mark.parametrize("location", ["/xenon/raw/..", "/", "/xenon/raw/a\0b", "///"])
def test_a_source_without_a_usable_name_is_given_up(location: str) -> None:
    """The last part of a location from the database becomes a name here only if it is one."""
    with pytest.raises(GiveUp, match="no usable name"):
        pull(run_of(entry("xenon", location=location)))


# -- push -------------------------------------------------------------------------------------


def test_push_plans_a_copy_in_the_other_sites_directory() -> None:
    """The plan's place is the other site's, the source ours."""
    run = run_of(entry("lngs"))
    wanted = CopyKey("raw", "chicago")
    plan = TransferPlan(copy_of(run, "lngs"), wanted, f"/chicago/raw/{NAME}", TRIGGER, None)
    assert push(run) == plan


@pytest.mark.parametrize(
    ("name", "entries", "reason"),
    [
        ("xenon", [entry("lngs")], "upload_options does not name xenon"),
        ("tape", [entry("lngs")], "reached by tsm"),
        ("chicago", [entry("xenon")], "there is no copy at lngs"),
        ("chicago", [entry("lngs", "error")], "is error"),
        ("chicago", [entry("lngs", checksum=None)], "no digest yet"),
        ("chicago", [entry("lngs"), entry("chicago", "error")], "is error already"),
    ],
)
def test_push_says_why_not(name: str, entries: list[dict[str, Any]], reason: str) -> None:
    """A push goes to a named site that has none, from a good copy of ours."""
    assert reason in why(push(run_of(*entries), name))


@given(purge=st.floats(0.1, 100), days=st.floats(0, 200))
def test_raw_data_that_would_be_purged_there_at_once_is_not_brought(
    purge: float, days: float
) -> None:
    """By the purge of the site where it would go, and not where a person asks for it."""
    sites = sites_of(evolve(LNGS, purge=0.01), site("chicago", purge=purge))
    plan = push(run_of(entry("lngs")), sites=sites, days=days)
    assert isinstance(plan, Skip) == (timedelta(days=purge) < timedelta(days=days))
    if isinstance(plan, Skip):
        assert "purged at once at chicago" in plan.why
    wish = entry("chicago", "requested", source="lngs", **ASKED)
    asked = push(run_of(entry("lngs"), wish), sites=sites, days=days)
    assert isinstance(asked, TransferPlan)


def test_push_to_a_site_that_is_not_described() -> None:
    """An upload option without a site is no reason to fail the others."""
    assert "not in sites.json" in why(
        push(run_of(entry("lngs")), "gone", site("lngs", upload_options=("gone",)))
    )


# -- what a person asks for -----------------------------------------------------------------------


def test_a_requested_copy_comes_from_where_it_was_asked() -> None:
    """Whatever download_options say, and whatever would be purged."""
    wish = entry("lngs", "requested", source="remote", **ASKED)
    run = run_of(entry("xenon"), entry("remote"), wish)
    here = evolve(LNGS, purge=1.0)
    plan = pull(run, at="lngs", here=here, days=9)
    assert isinstance(plan, TransferPlan)
    assert (plan.source.host, plan.location) == ("remote", f"/lngs/raw/{NAME}")
    assert plan.resume == copy_of(run, "lngs")
    begun = entry("lngs", "transferring", source="remote", trigger=TRIGGER, requested=True)
    again = pull(run_of(entry("xenon"), entry("remote"), begun), at="lngs", here=here, days=9)
    assert isinstance(again, TransferPlan)
    assert again.source.host == "remote"


def test_a_requested_copy_is_pushed_by_the_site_that_was_asked() -> None:
    """Upload options do not matter, and nobody else pushes it."""
    for source, expected in (("lngs", TransferPlan), ("xenon", Skip)):
        wish = entry("remote", "requested", source=source, **ASKED)
        assert isinstance(push(run_of(entry("lngs"), entry("xenon"), wish), "remote"), expected)


# -- repair ---------------------------------------------------------------------------------------


def repaired_by(run: Run, host: str = "lngs", here: Site = LNGS) -> TransferPlan | Skip:
    return repair.plan_repair(run, copy_of(run, host), here, ALL, trigger=TRIGGER)


def bad(host: str, status: str = "error", **fields: Any) -> dict[str, Any]:
    return entry(host, status, **{"checksumproblem": True, "source": "chicago", **fields})


def test_a_bad_copy_is_mended_from_the_one_it_came_from_or_any_other() -> None:
    """Where it is, and only from copies whose manifests say what is wrong."""
    good = [entry(host, manifest="b3:0") for host in ("remote", "chicago", "xenon")]
    run = run_of(bad("lngs", location="/lngs/raw/odd"), *good, entry("tape", manifest="b3:0"))
    plan = repaired_by(run)
    assert isinstance(plan, TransferPlan)
    assert plan.location == "/lngs/raw/odd"
    assert [one.host for one in (plan.source, *plan.others)] == ["chicago", "xenon", "remote"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"status": "transferred"}, "it is transferred"),
        ({"checksumproblem": None, "trigger": "another"}, "not for what is in it"),
        ({"repairs": 3}, "a person must look"),
        ({"location": None}, "no location"),
        ({"status": "transferring", "trigger": "another"}, "it is transferring"),
    ],
)
def test_what_is_not_mended(fields: dict[str, Any], reason: str) -> None:
    """Only what a checksum found bad, a bounded number of times, and what we began ourselves."""
    good = entry("chicago", manifest="b3:0")
    assert reason in why(repaired_by(run_of(good, {**bad("lngs"), **fields})))
    ours = {**bad("lngs"), "status": "transferring", "trigger": TRIGGER, "repairs": 3}
    assert isinstance(repaired_by(run_of(good, ours)), TransferPlan)


def test_a_copy_without_listener_is_mended_by_its_pusher_alone() -> None:
    """From the pusher's own copy."""
    run = run_of(entry("lngs", manifest="b3:0"), bad("remote", source="lngs"))
    plan = repaired_by(run, "remote")
    assert isinstance(plan, TransferPlan)
    assert plan.source.host == "lngs"
    theirs = run_of(entry("lngs", manifest="b3:0"), bad("remote", source="xenon"))
    assert "within reach" in why(repaired_by(theirs, "remote"))
    without = run_of(entry("chicago", location=None), bad("lngs"))
    assert "within reach" in why(repaired_by(without))


def test_a_copy_whose_files_another_run_names_is_repaired_once_it_does_not() -> None:
    """The end of that is no event of this run; a repair that had begun is an error until then."""
    good = entry("chicago", manifest="b3:0")
    plan = repaired_by(run := run_of(good, bad("lngs")))
    assert isinstance(plan, TransferPlan)
    with pytest.raises(Retry, match="those of raw at lngs of run 9, too") as later:
        repair._shared(run, plan, ["raw at lngs of run 9"])
    assert later.value.after == repair.SHARED
    begun = run_of(good, {**bad("lngs"), "status": "transferring", "trigger": TRIGGER})
    plan = repaired_by(begun)
    assert isinstance(plan, TransferPlan)
    update = repair._shared(begun, plan, ["raw at lngs of run 9"])
    assert (update.change or ({}, {}))[1]["status"] == "error"


def test_a_copy_is_repaired_from_one_with_a_manifest_first() -> None:
    """Of one that old programs made no part can be compared: it is taken if there is no other."""
    made_by_cax = entry("xenon")
    run = run_of(made_by_cax, entry("chicago", manifest="b3:0"), bad("lngs", source="xenon"))
    plan = repaired_by(run)
    assert isinstance(plan, TransferPlan)
    assert [one.host for one in (plan.source, *plan.others)] == ["chicago", "xenon"]
    alone = repaired_by(run_of(made_by_cax, bad("lngs", source=None)))
    assert isinstance(alone, TransferPlan)
    assert alone.source.host == "xenon"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"trigger": "chicago: push: raw at chicago"}, "not for what is in it"),
        ({"status_since": NOW}, "not for what is in it"),
        ({"repairs": 3}, "3 times"),
    ],
)
def test_what_an_old_program_failed_to_make_is_made_by_us(
    fields: dict[str, Any], reason: str | None
) -> None:
    """An error that names none of us, wherever the data is good; and what is there is kept."""
    failed = entry("lngs", "error", checksum=None) | fields
    plan = repaired_by(run_of(entry("chicago", manifest="b3:0"), failed))
    if reason is not None:
        assert reason in why(plan)
        return
    assert isinstance(plan, TransferPlan)
    assert (plan.source.host, plan.again) == ("chicago", True)
    beside = run_of(entry("chicago", manifest="b3:0"), failed, entry("lngs", "verifying"))
    assert "another entry" in why(repaired_by(beside))


def test_where_no_caxev_listens_it_is_made_by_who_pushes_there() -> None:
    """From its own copy; a site that does not push there leaves it."""
    failed = entry("remote", "error", checksum=None)
    run = run_of(entry("lngs", manifest="b3:0"), failed)
    here = evolve(LNGS, upload_options=("remote",))
    plan = repair.plan_repair(run, copy_of(run, "remote"), here, ALL, trigger=TRIGGER)
    assert isinstance(plan, TransferPlan)
    assert plan.source.host == "lngs"
    assert "within reach" in why(repaired_by(run, "remote"))


def test_what_an_old_program_left_under_the_name_is_gone_on_with() -> None:
    """It was given up at that place, and nothing whole has been deleted there since."""
    left = {"type": "raw", "host": "lngs", "pax_version": None, "location": f"/lngs/raw/{NAME}"}

    def again(*rows: dict[str, Any], **fields: Any) -> bool:
        rows_ = [{"date": NOW, **left, **row} for row in rows]
        plan = pull(run_of(entry("xenon"), given_up=rows_, **fields))
        assert isinstance(plan, TransferPlan)
        return plan.again

    assert again({})
    assert not again()
    assert not again({"location": "/elsewhere"})
    assert not again({"trigger": TRIGGER})
    later = NOW + timedelta(days=1)
    stone = {"type": "raw", "host": "lngs", "pax_version": None, "date": later}
    asked = entry("lngs", "requested", source="xenon", **ASKED)
    asked_again = {"data": [entry("xenon"), asked], "deleted_data": [stone]}
    assert not again({}, **asked_again)
    assert again({"date": later + timedelta(days=1)}, **asked_again)


def test_a_copy_is_mended_as_most_say() -> None:
    """Not from the one it came from where that is outvoted; not before it is known who is right."""
    good = [entry(host, manifest="b3:0") for host in ("xenon", "remote")]
    outvoted = entry("chicago", manifest="b3:1")
    plan = repaired_by(run_of(bad("lngs"), outvoted, *good))
    assert isinstance(plan, TransferPlan)
    assert [one.host for one in (plan.source, *plan.others)] == ["xenon", "remote"]
    with pytest.raises(Retry, match="contradict one another"):
        repaired_by(run_of(bad("lngs"), outvoted, good[0]))
    assert "no majority" in why(repaired_by(run_of(bad("lngs", disputed=True), *good)))
    accused = [{**one, "status": "error", "disputed": True} for one in good]
    with pytest.raises(Retry, match="about to be found good"):
        repaired_by(run_of(bad("lngs"), *accused))
    aside = bad("lngs", quarantine={"place": "/lngs"})
    assert "vouch" in why(repaired_by(run_of(aside, *good)))
    sure = entry("chicago", manifest="b3:1", vouched={"by": "me"})
    with pytest.raises(Retry, match="about to be set aside"):
        repaired_by(run_of(bad("lngs", quarantine={"place": None}), sure, *good))
    plan = repaired_by(run_of(aside, sure, *good))
    assert isinstance(plan, TransferPlan)
    assert (plan.source.host, plan.others) == ("chicago", ())


def test_what_was_deleted_on_purpose_comes_again_only_where_a_person_asks() -> None:
    """Neither pulled nor pushed: the tombstone says who deleted it."""
    stones = [
        {"type": "raw", "host": host, "pax_version": None, "by": "lngs: purge", "why": "old"}
        for host in ("lngs", "chicago")
    ]
    assert why(pull(run_of(entry("xenon"), deleted_data=stones))) == (
        "lngs: purge deleted it (old)"
    )
    assert "deleted it" in why(push(run_of(entry("lngs"), deleted_data=stones)))
    wish = entry("lngs", "requested", source="xenon", **ASKED)
    asked = pull(run_of(entry("xenon"), wish, deleted_data=stones), at="lngs")
    assert isinstance(asked, TransferPlan)


def test_nothing_is_copied_from_what_is_to_go() -> None:
    """A copy that is ``deleting`` is no source."""
    assert "is deleting" in why(pull(run_of(entry("xenon", "deleting"))))
    assert "is deleting" in why(push(run_of(entry("lngs", "deleting"))))


def test_a_repair_and_a_pull_of_the_same_copy_are_told_apart() -> None:
    """Both may have reacted to that very copy; neither goes on with what the other began."""
    began = {"status": "transferring", "checksumproblem": True}
    for name in ("pull", "repair"):
        theirs = {**bad("lngs", trigger=f"{name}: raw at lngs"), **began}
        run = run_of(entry("chicago", manifest="b3:0"), theirs)
        pulled = transfer.plan_pull(run, RAW, LNGS, ALL, trigger="pull: raw at lngs", now=NOW)
        ours = run.copy(RAW)
        repaired = repair.plan_repair(run, ours, LNGS, ALL, trigger="repair: raw at lngs")
        assert isinstance(pulled, TransferPlan) == (name == "pull")
        assert isinstance(repaired, TransferPlan) == (name == "repair")


@pytest.mark.parametrize("plan", [pull, push])
def test_untriggered_is_never_moved(plan: Any) -> None:
    """The DAQ's buffer is in nobody's `data_type`."""
    run = run_of(*(entry(host, type="untriggered") for host in ("xenon", "lngs")))
    assert "data_type" in why(plan(run, kind="untriggered"))


# -- what is done of it ---------------------------------------------------------------------------


class Manifests:
    """The ports of a job that needs only manifests."""

    def __init__(self, *manifests: Manifest) -> None:
        self.rows = {one.digest: one.to_rows() for one in manifests}
        self.asked: list[RunUpdate] = []

    async def load_manifest(self, digest: str) -> list[dict[str, Any]] | None:
        return self.rows.get(digest)

    async def update(self, update: RunUpdate, *, now: datetime, deed: Any = None) -> Run | None:
        self.asked.append(update)
        return None


class Yard(Manifests):
    """The ports of a job that moves copies: one run, and what comes of moving from or to a site."""

    def __init__(self, run: Run, outcomes: Mapping[str, object] | None = None) -> None:
        super().__init__()
        self.run = run
        self.rates: list[float | None] = []
        self.outcomes = dict(outcomes or {})
        self.tried: list[str] = []
        self.mute: list[str] = []
        self.yield_slot = nullcontext

    async def update(self, update: RunUpdate, *, now: datetime, deed: Any = None) -> Run | None:
        if not all(fits(self.run, one) for one in update.expect):
            return None
        entries = [dict(one.fields) for one in self.run.copies]
        if update.add is not None:
            entries.append(dict(update.add))
        if update.change is not None:
            place = [one.key for one in self.run.copies].index(update.change[0].key)
            entries[place] |= update.change[1]
            for name, values in update.append.items():
                entries[place][name] = [*entries[place].get(name, ()), *values]
        self.run = Run.from_document({**self.run.document, "data": entries})
        return self.run

    async def has_listened(self, site: str) -> bool:
        """Whether a caxev has ever acted for that site."""
        return site not in self.mute

    async def all_clear(self, key: str) -> None:
        """No alarm stands."""

    async def neighbours(self, wanted: object) -> list[Run]:
        """No other entry has its files there."""
        return []

    async def store_manifest(self, digest: str, items: list[dict[str, Any]]) -> None:
        """Kept."""

    async def work(self, function: object, route: Route, *, job: Job) -> object:
        """Move nothing; where there is no outcome, hang."""
        name = route.there.name
        self.tried.append(name)
        self.rates.append(route.max_rate)
        outcome = self.outcomes.get(name, Moved(1, 1, 1, 1.0))
        if outcome is None:
            await trio.sleep_forever()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def fits(run: Run, expectation: Expectation) -> bool:
    match expectation:
        case CopyAbsent(key):
            return run.copy(key) is None
        case CopyIs(key, fields):
            there = run.copy(key)
            return there is not None and all(
                there.fields.get(name) == value for name, value in fields.items()
            )
        case CopiesAtLeast() | NobodyReads():
            return True  # a test of who counts looks at them
    raise AssertionError(expectation)


class Still(Job):
    """A job in a world without time."""

    @staticmethod
    def now() -> datetime:
        return NOW


class Timed(Still):
    """A job whose clock is trio's: see `in_no_time`."""

    began = 0.0

    @classmethod
    def now(cls) -> datetime:
        return NOW + timedelta(seconds=trio.current_time() - cls.began)


def job_of(yard: Yard, seen: CopyKey, here: Site = LNGS, kind: type[Job] = Still) -> Job:
    ports: Any = yard
    event = Event(yard.run.id, seen, None, "transferred")
    return kind(yard.run, event, here, ALL, "lngs#1", logger, ports)


def opening(**hours: float) -> Site:
    """The site, with links to some others that open in so many hours, for one."""
    day = (NOW - NOW.replace(hour=0, minute=0, second=0, microsecond=0)).total_seconds()
    begins = {name: (day + 3600 * wait) % 86400 for name, wait in hours.items()}
    links = {
        name: Link(hours=TimeOfDay(begin, (begin + 3600) % 86400)) for name, begin in begins.items()
    }
    return evolve(LNGS, links=links)


AT_XENON = CopyKey("raw", "xenon")
BOTH = (entry("xenon"), entry("chicago"))


@pytest.fixture(autouse=True)
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    """What this process is moving: nothing yet."""
    fresh = Traffic()
    monkeypatch.setattr(links, "traffic", fresh)
    return fresh


def in_no_time(main: Callable[[], Awaitable[None]]) -> None:
    """Run it by a clock that goes on as soon as all wait, and that `Timed` jobs go by."""

    async def timed() -> None:
        Timed.began = trio.current_time()
        await main()

    trio.run(timed, clock=MockClock(autojump_threshold=0))


async def test_nothing_is_claimed_for_a_closed_link() -> None:
    """Neither a pull nor a push leaves a trace in the run, and both come when the link opens."""
    pushing = evolve(opening(chicago=2), upload_options=("chicago",))
    for handler, seen, here in (
        (transfer.pull, AT_XENON, opening(xenon=2)),
        (transfer.push, RAW, pushing),
    ):
        yard = Yard(run_of(entry(seen.host)))
        before = yard.run
        job = job_of(yard, seen, here)
        with pytest.raises(Retry) as error:
            await handler(job)
        assert error.value.after == 7200
        assert (yard.run, yard.tried, job.if_parked) == (before, [], ())


def test_nobody_waits_for_a_place_on_a_closed_link() -> None:
    """It is put off at once, and its worker is free for others."""
    link = Link(transfers=1, hours=opening(chicago=2).link("chicago").hours)
    here = evolve(LNGS, links={"chicago": link}, upload_options=("chicago",))

    async def main() -> None:
        begin = trio.current_time()
        async with links.traffic.slot("chicago", link):
            with pytest.raises(Retry, match="opens in 120 min"), trio.fail_after(9):
                await transfer.push(job_of(Yard(run_of(entry("lngs"))), RAW, here))
        assert trio.current_time() == begin

    in_no_time(main)


async def test_a_source_behind_a_closed_link_is_passed_over() -> None:
    """The next one is taken, and the entry names that one alone."""
    yard = Yard(run_of(*BOTH))
    await transfer.pull(job_of(yard, AT_XENON, opening(xenon=2)))
    assert yard.tried == ["chicago"]
    assert copy_of(yard.run, "lngs").source == "chicago"


async def test_where_all_links_are_closed_the_first_to_open_counts() -> None:
    """Whatever their order in download_options."""
    for first, second in ((5, 3), (3, 5)):
        here = opening(xenon=first, chicago=second)
        with pytest.raises(Retry) as error:
            await transfer.pull(job_of(Yard(run_of(*BOTH)), AT_XENON, here))
        assert error.value.after == 3 * 3600


async def test_an_open_source_is_not_kept_waiting_by_a_closed_one() -> None:
    """What may come right at once is tried again soon; what will not waits for the other link."""
    cases: list[tuple[Retry | GiveUp, float | None]] = [
        (Retry("no connection"), None),
        (GiveUp("a refused key"), 7200),
    ]
    for outcome, after in cases:
        yard = Yard(run_of(*BOTH), {"chicago": outcome})
        with pytest.raises(Retry) as error:
            await transfer.pull(job_of(yard, AT_XENON, opening(xenon=2)))
        assert error.value.after == after


async def test_a_source_that_is_damaged_is_to_be_read_again() -> None:
    """Each one is asked for a reading, and tried again: by then it is good, or no source."""
    yard = Yard(run_of(*BOTH), dict.fromkeys(("chicago", "xenon"), Damaged("bad")))
    with pytest.raises(Retry, match="bad"):
        await transfer.pull(job_of(yard, AT_XENON, opening()))
    assert sorted(yard.tried) == ["chicago", "xenon"]
    assert all(len(copy_of(yard.run, name).pending) == 1 for name in yard.tried)
    yard = Yard(run_of(entry("lngs")), {"chicago": Damaged("bad")})
    with pytest.raises(Retry, match="bad"):
        await transfer.push(job_of(yard, RAW, evolve(LNGS, upload_options=("chicago",))))
    assert len(copy_of(yard.run, "lngs").pending) == 1


async def test_a_damaged_source_that_nobody_reads_is_marked_and_then_given_up() -> None:
    """No caxev has ever listened there: nobody answers. What passes well takes the mark off."""
    yard = Yard(run_of(entry("xenon")), {"xenon": Damaged("bad bytes")})
    yard.mute = ["xenon"]
    with pytest.raises(Retry, match="bad bytes"):
        await transfer.pull(job_of(yard, AT_XENON, opening()))
    source = copy_of(yard.run, "xenon")
    assert (source.fields["checksumproblem"], source.fields["error"]) == (True, "bad bytes")
    assert (source.status, source.pending) == ("transferred", ())
    with pytest.raises(GiveUp, match="bad bytes"):
        await transfer.pull(job_of(yard, AT_XENON, opening()))
    yard.outcomes = {}
    assert isinstance(await transfer.pull(job_of(yard, AT_XENON, opening())), RunUpdate)
    assert copy_of(yard.run, "xenon").fields["checksumproblem"] is False


async def test_a_repair_whose_source_has_gone_bad_says_so() -> None:
    """The copy that was being repaired is bad again, not under way for ever."""
    trigger = f"lngs: repair: {RAW}"
    mine = entry("lngs", "transferring", trigger=trigger, checksumproblem=True)
    yard = Yard(run_of(mine, entry("xenon", "error")))
    await repair.repair(job_of(yard, RAW, LNGS))
    assert copy_of(yard.run, "lngs").status == "error"


@pytest.mark.parametrize("outcome", [GiveUp("no"), Moved(1, 1, 1, 1.0)])
async def test_each_bad_copy_is_repaired_from_the_first_good_one(outcome: object) -> None:
    """Of those that we have pushed; one that cannot be repaired keeps none of the others bad."""
    pushed = [bad(name, source="lngs") for name in ("remote", "far")]
    yard = Yard(run_of(entry("lngs", manifest="b3:0"), *pushed), {"remote": outcome})
    job = job_of(yard, RAW)
    job.sites = sites_of(*ALL.values(), site("far", listener=False))
    with pytest.raises(GiveUp) if isinstance(outcome, GiveUp) else nullcontext():
        await repair.repair(job)
    assert yard.tried == ["remote", "far"]
    assert copy_of(yard.run, "far").status == "verifying"


def test_the_soonest_retry_counts() -> None:
    """One that names no time is later than any that does; giving up comes last."""
    soon, late, some = Retry("soon", after=0.0), Retry("late", after=9.0), Retry("some day")
    first, last = GiveUp("first"), GiveUp("last")
    assert lifecycle.worst([first, some, late, soon, last]) is soon
    assert lifecycle.worst([first, some, last]) is some
    assert lifecycle.worst([first, last]) is last


async def attempted(job: Job) -> object:
    """What comes of one attempt at a pull, with the time that it has for it."""
    (handler,) = (one for one in recorded if one.function is transfer.pull)
    watch = Watch(handler)
    job.on_progress = lambda _done, _total: watch.moved()
    outcome, _update = await attempt(handler, job, watch)
    return outcome


def test_waiting_for_a_place_is_no_stall() -> None:
    """For hours, and without a claim; then it goes on as if nothing had been."""
    link = Link(transfers=1)
    yard = Yard(run_of(entry("xenon")))
    outcomes: list[object] = []

    async def wait() -> None:
        outcomes.append(
            await attempted(job_of(yard, AT_XENON, evolve(LNGS, links={"xenon": link})))
        )

    async def main() -> None:
        async with trio.open_nursery() as nursery, links.traffic.slot("xenon", link):
            nursery.start_soon(wait)
            await trio.sleep(10 * STALLED)
            assert (yard.run.copy(RAW), yard.tried, outcomes) == (None, [], [])

    in_no_time(main)
    assert outcomes == [Done()]
    assert copy_of(yard.run, "lngs").source == "xenon"


def test_a_transfer_is_broken_off_when_its_link_closes() -> None:
    """It goes on from there when the link opens again, and the link is not blamed for it."""
    begin = opening(xenon=0).link("xenon").hours.begin  # type: ignore[union-attr]
    here = evolve(LNGS, links={"xenon": Link(hours=TimeOfDay(begin, begin + 300))})
    yard = Yard(run_of(entry("xenon")), {"xenon": None})
    outcomes: list[object] = []

    async def main() -> None:
        outcomes.append(await attempted(job_of(yard, AT_XENON, here, kind=Timed)))

    in_no_time(main)
    assert outcomes == [Postponed("the link to xenon opens in 1435 min", 86400 - 300)]
    assert copy_of(yard.run, "lngs").status == "transferring"
    assert links.traffic.order(["xenon", "chicago"]) == ["xenon", "chicago"]


def test_a_link_that_has_closed_while_one_waited_is_left_alone() -> None:
    """The place comes too late: nothing is claimed, nothing moved."""
    hours = opening(xenon=0).link("xenon").hours
    link = Link(transfers=1, hours=hours)
    yard = Yard(run_of(entry("xenon")))
    outcomes: list[object] = []

    async def wait() -> None:
        job = job_of(yard, AT_XENON, evolve(LNGS, links={"xenon": link}), kind=Timed)
        outcomes.append(await attempted(job))

    async def main() -> None:
        async with trio.open_nursery() as nursery, links.traffic.slot("xenon", link):
            nursery.start_soon(wait)
            await trio.sleep(2 * 3600)

    in_no_time(main)
    assert outcomes == [Postponed("the link to xenon opens in 1320 min", 22 * 3600)]
    assert (yard.run.copy(RAW), yard.tried) == (None, [])


def test_a_hanging_source_is_tried_last_the_next_time() -> None:
    """What a stall has cut short goes on from another source."""
    yard = Yard(run_of(*BOTH), {"xenon": None})

    async def main() -> None:
        ended = await attempted(job_of(yard, AT_XENON))
        assert ended == Postponed(f"no progress for {STALLED:.0f} s")
        assert await attempted(job_of(yard, AT_XENON)) == Done()

    in_no_time(main)
    assert yard.tried == ["xenon", "chicago"]
    assert copy_of(yard.run, "lngs").source == "chicago"


async def test_one_that_was_second_looks_again() -> None:
    """Whether another was first, or only the source is no longer good, the next attempt sees."""
    for now, reason in (
        ([entry("xenon"), entry("lngs", "transferring", trigger="push: raw at xenon")], "already"),
        ([entry("xenon", "error")], "is error"),
    ):
        yard = Yard(run_of(entry("xenon")))
        job = job_of(yard, AT_XENON)
        yard.run = run_of(*now, _id=yard.run.id)
        with pytest.raises(Retry) as error:
            await transfer.pull(job)
        assert error.value.after == 1.0
        again = await transfer.pull(job_of(yard, AT_XENON))
        assert reason in why(again)
        assert yard.tried == []


async def test_a_source_that_is_no_longer_good_is_passed_over() -> None:
    """The run has changed since it was read: the next source is claimed in the same attempt."""
    yard = Yard(run_of(*BOTH))
    job = job_of(yard, AT_XENON)
    yard.run = run_of(entry("xenon", "error"), entry("chicago"), _id=yard.run.id)
    await transfer.pull(job)
    assert yard.tried == ["chicago"]


async def test_an_entry_names_the_reaction_that_made_it() -> None:
    """The site, the handler and what it reacted to."""
    repaired = run_of(bad("lngs"), entry("chicago", manifest="b3:0"))
    for handler, seen, run, at in (
        (transfer.pull, AT_XENON, run_of(entry("xenon")), "lngs"),
        (transfer.push, RAW, run_of(entry("lngs")), "chicago"),
        (repair.repair, RAW, repaired, "lngs"),
    ):
        yard = Yard(run)
        await handler(job_of(yard, seen))
        trigger = copy_of(yard.run, at).fields["trigger"]
        assert trigger == f"lngs: {handler.__name__}: {seen}"


async def test_all_copies_that_a_push_has_begun_are_parked_with_it() -> None:
    """Where it is given up, none of them is left transferring."""
    here = evolve(LNGS, upload_options=("chicago", "remote"))
    yard = Yard(run_of(entry("lngs")), {"chicago": GiveUp("no"), "remote": GiveUp("no")})
    job = job_of(yard, RAW, here)
    with pytest.raises(GiveUp):
        await transfer.push(job)
    for update in job.if_parked:
        assert await yard.update(update, now=NOW)
    assert [copy_of(yard.run, name).status for name in here.upload_options] == ["error"] * 2


# -- checksum ---------------------------------------------------------------------------------


def check(run: Run, host: str, here: str = "lngs") -> verify.ReadPlan | Skip:
    return verify.plan_checksum(run, run.copy(CopyKey("raw", host)), ALL.get(here), ALL)


def test_a_copy_is_compared_with_the_one_it_came_from() -> None:
    """The source comes before the master, the master before any other good one."""
    others = [entry("remote"), entry("xenon"), entry("chicago")]
    order = []
    while others:
        run = run_of(*others, entry("lngs", "verifying", source="chicago"))
        plan = check(run, "lngs")
        assert isinstance(plan, verify.ReadPlan)
        assert plan.reference is not None
        order.append(plan.reference.host)
        others = [one for one in others if one["host"] != order[-1]]
    assert order == ["chicago", "xenon", "remote"]


@pytest.mark.parametrize("fields", [{"type": "processed"}, {"pax_version": "v1"}])
def test_other_data_is_no_reference(fields: dict[str, Any]) -> None:
    """A copy beside which there is only other data is the first of its kind."""
    run = run_of(entry("xenon", **fields), entry("lngs", "verifying"))
    plan = check(run, "lngs")
    assert isinstance(plan, verify.ReadPlan)
    assert plan.reference is None
    assert plan.sha512


@pytest.mark.parametrize("fields", [{"status": "error"}, {"checksum": None}])
def test_a_copy_is_not_accepted_without_a_comparison(fields: dict[str, Any]) -> None:
    """Where there are other copies and none of them tells what is right, a person must decide."""
    with pytest.raises(GiveUp, match="no good copy"):
        check(run_of(entry("xenon", **fields), entry("lngs", "verifying")), "lngs")


def test_the_source_is_remembered() -> None:
    """A copy whose source is gone is compared with what its entry says of the source."""
    fields = {"source": "xenon", "source_manifest": "b3:00", "source_checksum": "ab"}
    plan = check(run_of(entry("lngs", "verifying", **fields)), "lngs")
    assert isinstance(plan, verify.ReadPlan)
    assert plan.reference is not None
    assert (plan.reference.host, plan.reference.manifest) == ("xenon", "b3:00")
    with pytest.raises(GiveUp, match="no good copy"):
        check(run_of(entry("lngs", "verifying", source="xenon")), "lngs")


def test_the_sha512_is_carried_over_where_it_can_be() -> None:
    """It is computed only where the other copy lacks it, or has no manifest to trust."""
    cases: list[tuple[dict[str, Any], bool]] = [
        ({"checksum": "ab", "manifest": "b3:00"}, False),
        ({"checksum": "ab"}, True),
        ({"checksum": None, "manifest": "b3:00"}, True),
    ]
    for fields, wanted in cases:
        plan = check(run_of(entry("xenon", **fields), entry("lngs", "verifying")), "lngs")
        assert isinstance(plan, verify.ReadPlan)
        assert plan.sha512 == wanted


def test_a_copy_without_listener_is_verified_by_its_pusher_alone() -> None:
    """Of all the sites that see it, the one that put it there reads it."""
    run = run_of(entry("lngs"), entry("remote", "verifying", source="lngs"))
    assert isinstance(check(run, "remote", "lngs"), verify.ReadPlan)
    assert why(check(run, "remote", "chicago")) == "lngs verifies it"
    nobody = run_of(entry("lngs"), entry("remote", "verifying"))
    assert "the site that pushed" in why(check(nobody, "remote", "lngs"))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"status": "transferred"}, "it has a checksum"),
        ({"status": "error"}, "it is error now"),
        ({"status": "transferring"}, "it is transferring now"),
    ],
)
def test_what_is_not_verified(fields: dict[str, Any], reason: str) -> None:
    """Only what waits for it, or has no checksum yet."""
    assert why(check(run_of(entry("lngs", **fields)), "lngs")) == reason


@pytest.mark.parametrize(
    ("fields", "verified"),
    [
        ({"status_since": NOW}, True),
        ({"status_since": NOW, "checksumproblem": True}, False),
        ({}, False),  # an old program's: `repair` looks after it
    ],
)
def test_a_verification_that_was_given_up_can_be_had_again(
    fields: dict[str, Any], verified: bool
) -> None:
    """By `caxev retry`: the copy is an error because it was given up."""
    run = run_of(entry("xenon", manifest="b3:1"), entry("lngs", "error", source="xenon", **fields))
    seen = copy_of(run, "lngs")
    assert isinstance(verify.plan_checksum(run, seen, LNGS, ALL), Skip)
    plan = verify.plan_checksum(run, seen, LNGS, ALL, again=True)
    assert isinstance(plan, verify.ReadPlan) == verified


def test_a_copy_that_is_gone_is_not_verified() -> None:
    """The event may be older than the run."""
    assert why(check(run_of(), "lngs")) == "the copy is gone"


@pytest.mark.parametrize("status", ["verifying", "transferred"])
def test_untriggered_is_never_read(status: str) -> None:
    """The DAQ's buffer is not even hashed."""
    run = run_of(entry("lngs", status, type="untriggered", checksum=None))
    seen = run.copy(CopyKey("untriggered", "lngs"))
    assert "never touched" in why(verify.plan_checksum(run, seen, LNGS, ALL))


def test_masters() -> None:
    """The sites that say so hold the masters of that type."""
    assert verify.masters("raw", ALL) == ["xenon"]
    assert verify.masters("processed", ALL) == []


# -- reading again ------------------------------------------------------------------------------


def again(run: Run, host: str = "lngs", here: str = "lngs") -> Copy | Skip:
    return verify.plan_recheck(run.copy(CopyKey("raw", host)), ALL.get(here), ALL)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"status": "deleting"}, "it is deleting"),
        ({"status": "verifying"}, "it is verifying"),
        ({"status": "error"}, "it is error"),
        ({"checksum": None}, "nothing is known of it"),
    ],
)
def test_what_is_not_read_again(fields: dict[str, Any], reason: str) -> None:
    """Only what is good, or contradicts others, and what something is known of."""
    assert reason in why(again(run_of(entry("lngs", **fields))))


def test_a_reading_from_the_future_was_none() -> None:
    """The patrol goes by the latest time there is that is past."""
    ahead = NOW + timedelta(days=40)
    run = run_of(entry("lngs", verified_at=ahead, creation_time=NOW - timedelta(days=1)))
    assert verify._last_read(run, copy_of(run, "lngs"), NOW) == NOW - timedelta(days=1)
    later = verify._last_read(run, copy_of(run, "lngs"), ahead + timedelta(days=1))
    assert later == NOW - timedelta(days=1), "that it has come by now makes it no reading"
    run = run_of(entry("lngs", verified_at=ahead, creation_time=ahead), start=ahead)
    assert verify._last_read(run, copy_of(run, "lngs"), NOW) < NOW - timedelta(days=365)


def test_who_reads_a_copy_again() -> None:
    """Its own site or, without a listener there, the one that pushed; on tape, nobody."""
    run = run_of(
        entry("lngs", "error", disputed=True),
        entry("chicago"),
        entry("remote", source="lngs", manifest="b3:0"),
        entry("tape", source="lngs"),
    )
    assert again(run) == copy_of(run, "lngs")
    assert again(run, "remote") == copy_of(run, "remote")
    assert "reads it" in why(again(run, "chicago"))
    assert "cannot be read" in why(again(run, "tape"))
    assert "no manifest" in why(again(run_of(entry("remote", source="lngs")), "remote"))


READERS = pytest.mark.parametrize(
    ("reader", "status"),
    [
        (verify.checksum, "verifying"),
        (verify.recheck, "transferred"),
        (verify.patrol, "transferred"),
    ],
)


def reading_back(status: str, link: Link, found: object) -> tuple[Yard, Job]:
    """A copy at a site without a listener that is to be read over that link, and what it gives."""
    read = NOW - timedelta(days=40)
    digests = {"manifest": GOOD.digest, "verified_at": read, "verified_noted": read}
    seen = entry("remote", status, source="lngs", check_asked=NOW, **digests)
    yard = Yard(run_of(entry("lngs", manifest=GOOD.digest), seen), {"remote": found})
    here = evolve(LNGS, links={"remote": link})
    job = job_of(yard, CopyKey("raw", "remote"), here, kind=Timed)
    patrolled = evolve(ALL.get("remote"), patrol=Patrol(days=30.0, max_rate=50e6))
    job.sites = sites_of(here, patrolled)
    return yard, job


async def outcome_of(reader: Callable[[Job], Awaitable[object]], job: Job) -> Retry | None:
    """What puts it off; None where it has come to its end."""
    try:
        await reader(job)
    except Retry as error:
        return error
    return None


@READERS
def test_a_copy_is_read_back_at_the_rate_of_its_link(reader: Any, status: str) -> None:
    """The patrol at its own where that is slower."""

    async def main() -> None:
        for rate, patrolled in ((8e6, 8e6), (90e6, 50e6), (None, 50e6)):
            yard, job = reading_back(status, Link(max_rate=rate), GOOD)
            await outcome_of(reader, job)
            assert yard.rates == [patrolled if reader is verify.patrol else rate]

    in_no_time(main)


@READERS
def test_a_copy_is_read_back_in_a_place_of_its_link(reader: Any, status: str) -> None:
    """It waits for a transfer that has it, which is no stall."""
    link = Link(transfers=1)
    yard, job = reading_back(status, link, GOOD)

    async def main() -> None:
        async with trio.open_nursery() as nursery, links.traffic.slot("remote", link):
            nursery.start_soon(outcome_of, reader, job)
            await trio.sleep(10 * STALLED)
            assert yard.tried == []

    in_no_time(main)
    assert yard.tried == ["remote"]


@READERS
def test_a_copy_is_read_back_in_the_hours_of_its_link(reader: Any, status: str) -> None:
    """Before them not at all; what is not done when they end is broken off. No rot is told of."""
    rotten = metrics.rotten.labels("lngs")._value
    before = rotten.get()
    later = opening(remote=2).link("remote")
    now = opening(remote=0).link("remote")

    async def main() -> None:
        yard, job = reading_back(status, later, GOOD)
        put_off = await outcome_of(reader, job)
        assert (str(put_off), yard.tried) == ("the link to remote opens in 120 min", [])
        yard, job = reading_back(status, now, None)
        put_off = await outcome_of(reader, job)
        assert (str(put_off), yard.tried) == ("the link to remote opens in 1380 min", ["remote"])

    in_no_time(main)
    assert rotten.get() == before


async def reread(found: Manifest, *others: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """What the entry is given when its copy was read again."""
    run = run_of(entry("lngs", **fields), *others)
    seen = copy_of(run, "lngs")
    ports: Any = Manifests(GOOD)
    job = Job(run, Event(run.id, RAW, None, "x"), LNGS, ALL, "lngs#1", logger, ports)
    update = await verify.compare_with_entry(job, seen, found, NOW)
    assert update.change is not None
    assert update.change[0] == seen.as_seen
    return {**update.change[1], **update.append}


async def test_a_good_copy_that_was_read_again_has_no_event() -> None:
    """Its status is not touched: nobody reacts to what is as it was."""
    request = [{"id": "x", "at": NOW}]
    fields = await reread(GOOD, manifest=GOOD.digest, check_asked=request)
    assert fields == {"manifest": GOOD.digest, "verified_at": NOW, "check_answered": ["x"]}
    fields = await reread(GOOD, manifest=GOOD.digest, check_asked=NOW)  # as older versions wrote it
    assert fields["check_answered"] == [str(NOW)]
    fields = await reread(GOOD, manifest=GOOD.digest)
    assert fields == {"manifest": GOOD.digest, "verified_at": NOW}
    fields = await reread(GOOD, checksum=GOOD.cax_checksum())
    assert fields == {"manifest": GOOD.digest, "verified_at": NOW}


async def test_a_good_reading_clears_a_doubt() -> None:
    """Of a copy that is good but for the mark; with the mark it is read though nobody asks."""
    doubted: dict[str, Any] = {"checksumproblem": True, "error": "x", "manifest": GOOD.digest}
    fields = await reread(GOOD, **doubted)
    assert (fields["checksumproblem"], fields["error"]) == (False, None)
    assert "status" not in fields
    seen = copy_of(run_of(entry("lngs", **doubted)), "lngs")
    assert verify.plan_recheck(seen, LNGS, ALL) == seen


async def test_a_copy_that_could_not_be_read_is_good_once_it_can() -> None:
    """The reading is had again by a retry; if its bytes are bad, that is why it is an error."""
    unread: dict[str, Any] = {"status": "error", "status_since": NOW, "manifest": GOOD.digest}
    asked = {**unread, "check_asked": [{"id": "x", "at": NOW}], "error": "it cannot be read"}
    run = run_of(entry("lngs", **asked))
    seen = copy_of(run, "lngs")
    assert verify.plan_answer(seen, LNGS, ALL) == seen
    patrolled = evolve(LNGS, patrol=Patrol(days=30))
    sites = Sites(ALL.path, {**ALL.by_name, "lngs": patrolled})
    assert verify.plan_patrol(run, seen, patrolled, sites, NOW) is None
    fields = await reread(GOOD, **asked)
    assert (fields["status"], fields["error"]) == ("transferred", None)
    assert fields["check_answered"] == ["x"]
    fields = await reread(manifest_of(a="1"), **asked)
    assert (fields["status"], fields["checksumproblem"]) == ("error", True)
    for other in ({"checksumproblem": True}, {"status_since": None}, {"manifest": None}):
        bad = entry("lngs", **{**unread, "checksum": None, **other})
        assert isinstance(again(run_of(bad)), Skip)


async def test_a_copy_that_contradicts_others_calls_for_a_judgement() -> None:
    """Even where nobody asked for the reading."""
    other = entry("chicago", manifest="b3:1")
    fields = await reread(GOOD, other, manifest=GOOD.digest)
    assert len(fields["check_answered"]) == 1
    assert "status" not in fields


async def test_a_copy_that_is_not_what_it_was_is_bad() -> None:
    """By its own record: whatever others say, and whoever vouched for it."""
    rotten = manifest_of(a="1", b="2!")
    request = [{"id": "x", "at": NOW}]
    fields = await reread(rotten, manifest=GOOD.digest, vouched={"by": "me"}, check_asked=request)
    assert (fields["status"], fields["checksumproblem"]) == ("error", True)
    assert (fields["disputed"], fields["vouched"]) == (None, None)
    assert fields["error"] == "1 files: b (differs)"
    assert fields["check_answered"] == ["x"]


@pytest.mark.parametrize(("days", "forgotten"), [(1, False), (31, True)])
async def test_repairs_of_long_ago_do_not_count(days: int, forgotten: bool) -> None:
    """A fault in years needs no person; a disk that spoils what was just repaired does."""
    since = NOW - timedelta(days=days)
    known: dict[str, Any] = {"manifest": GOOD.digest, "status_since": since, "repairs": 3}
    fields = await reread(manifest_of(a="1", b="2!"), **known)
    assert (fields.get("repairs", 3) is None) == forgotten


def test_who_keeps_its_word() -> None:
    """A copy disputes another's word only where its own and its source's were the same."""
    kept = verify.keeps_its_word
    for fields, expected in (
        ({"checksum": None}, True),
        ({"manifest": GOOD.digest}, True),
        ({"manifest": "b3:1"}, False),
        ({"checksum": None, "source_manifest": "b3:1"}, False),
        ({"checksum": GOOD.cax_checksum()}, True),
        ({"checksum": "other"}, False),
        ({"checksum": None, "source_checksum": "other"}, False),
    ):
        assert kept(copy_of(run_of(entry("lngs", **fields)), "lngs"), GOOD) == expected, fields


# -- verdict ----------------------------------------------------------------------------------


def manifest_of(**files: str) -> Manifest:
    items = []
    for name, content in files.items():
        sha512 = hashlib.sha512(content.encode()).digest()
        items.append(
            Item(name.encode(), "file", len(content), blake3(content.encode()).digest(), sha512)
        )
    return Manifest(items)


GOOD = manifest_of(a="1", b="22")


async def judge(
    known: dict[str, Any] | None, found: Manifest = GOOD, *run_cache: Manifest
) -> dict[str, Any]:
    """What the copy's entry is given, where the other copy has these fields."""
    others = [] if known is None else [entry("xenon", **known)]
    run = run_of(*others, entry("lngs", "verifying"))
    plan = check(run, "lngs")
    assert isinstance(plan, verify.ReadPlan)
    event = Event(run.id, RAW, None, "verifying")
    ports: Any = Manifests(*run_cache)
    job = Job(run, event, LNGS, ALL, "lngs#1", logger, ports)
    update = await verify.verdict(job, plan, found, NOW)
    assert update.change is not None
    expected, fields = update.change
    assert expected == plan.copy.as_seen
    assert fields["manifest"] == found.digest
    return dict(fields)


async def test_a_copy_that_came_bad_has_its_source_read_again() -> None:
    """The source may have been bad: not every way of moving sees what passes."""
    run = run_of(entry("xenon", manifest=GOOD.digest), entry("lngs", "verifying", source="xenon"))
    plan = check(run, "lngs")
    assert isinstance(plan, verify.ReadPlan)
    for found, asked in ((GOOD, []), (manifest_of(a="1", b="33"), ["xenon"])):
        ports: Any = Manifests(GOOD)
        event = Event(run.id, RAW, None, "verifying")
        await verify.verdict(Job(run, event, LNGS, ALL, "lngs#1", logger, ports), plan, found, NOW)
        changes = [update.change for update in ports.asked]
        assert [change[0].key.host for change in changes] == asked


async def test_a_first_copy_is_what_it_is() -> None:
    """Without another to compare with, a copy is good and its digests are recorded."""
    fields = await judge(None)
    assert (fields["status"], fields["checksum"]) == ("transferred", GOOD.cax_checksum())


async def test_a_copy_with_the_same_manifest_is_good() -> None:
    """The manifest decides; the checksum is our own, or carried over where we computed none."""
    fields = await judge({"manifest": GOOD.digest, "checksum": "carried"})
    assert (fields["status"], fields["checksum"]) == ("transferred", GOOD.cax_checksum())
    bare = Manifest(evolve(item, sha512=None) for item in GOOD.items)
    fields = await judge({"manifest": GOOD.digest, "checksum": "carried"}, bare)
    assert (fields["status"], fields["checksum"]) == ("transferred", "carried")


async def test_a_copy_of_caxs_is_compared_by_checksum() -> None:
    """Where the other has no manifest, the cax-compatible checksums must be equal."""
    fields = await judge({"checksum": GOOD.cax_checksum()})
    assert fields["status"] == "transferred"
    fields = await judge({"checksum": "other"})
    assert (fields["status"], fields["checksumproblem"]) == ("error", True)
    assert fields["error"] == "its checksum differs from that of raw at xenon"


async def test_an_equal_checksum_does_not_outweigh_another_manifest() -> None:
    """The checksum of cax ignores names: two files swapped have it alike, and are an error."""
    swapped = manifest_of(a="22", b="1")
    assert swapped.cax_checksum() == GOOD.cax_checksum()
    known = {"manifest": GOOD.digest, "checksum": GOOD.cax_checksum()}
    fields = await judge(known, swapped, GOOD)
    assert fields["status"] == "error"
    assert fields["error"] == "2 files: a (differs), b (differs)"


async def test_bad_files_are_named_but_not_all() -> None:
    """The entry names a few of the bad files and says how many there are."""
    many = manifest_of(**{f"f{number}": "x" for number in range(8)})
    known = {"manifest": many.digest}
    fields = await judge(known, manifest_of(f0="x"), many)
    named = ", ".join(f"f{number} (missing)" for number in range(1, verify.NAMED + 1))
    assert fields["error"] == f"7 files: {named}, ..."
    fields = await judge(known, manifest_of(f0="x"))
    assert "its checksum differs" in fields["error"]


@pytest.mark.parametrize(
    "task", ["BufferPurger", "PurgeProcessed", "purge", "purge_processed", "make_room"]
)
def test_what_begins_a_deletion_can_end_it(task: str) -> None:
    """With such a name alone a copy that is to go is proven and erased, and not left for ever."""
    load_handlers(default=DEFAULT_HANDLERS)
    enabled = {one.name for one in recorded if evolve(LNGS, task_list=(task,)).wants(one)}
    assert enabled >= {"prove", "erase"}


class Full(Yard):
    """The ports of a site whose disk is full, with these runs on it."""

    held: list[Run]
    marked: list[object]

    async def oldest(self, kind: str, without: object, skip: int) -> list[Run]:
        del kind, without
        return self.held[skip:]

    async def update(self, update: RunUpdate, *, now: datetime, deed: Any = None) -> Run | None:
        self.marked.append(update.run)
        return self.run

    async def work(self, function: object, *args: object, job: Job) -> object:
        return 10


async def test_what_has_no_known_size_makes_no_room() -> None:
    """It would not count, and everything that has a copy elsewhere would be deleted."""
    manifest = manifest_of(a="x")
    copies = [entry(host, manifest=manifest.digest) for host in ("lngs", "xenon", "chicago")]
    unknown = run_of(*map(entry, ("lngs", "xenon", "chicago")))
    ports = Full(run_of(entry("lngs", "transferring")))
    ports.rows, ports.marked = {manifest.digest: manifest.to_rows()}, []
    ports.held = [unknown, run_of(*copies), run_of(*copies, raw_size_byte=5)]
    here = evolve(LNGS, min_free=1, deletion=Deletion(when_full=True))
    with pytest.raises(Retry, match="10 bytes were lacking"):
        await deletion.make_room(job_of(ports, RAW, here))
    assert ports.marked == [run.id for run in ports.held[1:]]


class Working(Yard):
    """The ports of a job whose work is done at once, in this process."""

    async def work(self, function: Any, *args: object, job: Job) -> Any:
        return function(*args)


@pytest.mark.parametrize("name", ["link/run", "a\0b/run"])
async def test_what_cannot_be_erased_is_not_begun_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A place that leads out, or is none: the copy is as it was before, and its entry says why."""
    root = tmp_path / "raw"
    for path in (root, tmp_path / "away" / "run"):
        path.mkdir(parents=True)
    (root / "link").symlink_to(tmp_path / "away")
    wish = {"by": "me", "why": "a test", "keep": 1, "at": NOW, "was": "transferred"}
    going = entry("lngs", "deleting", location=f"{root}/{name}", deletion=wish, proof=[])
    yard = Working(run_of(going))
    before = yard.run
    monkeypatch.setattr(deletion, "weigh", lambda *_: Proven([]))
    update = await deletion.erase(job_of(yard, RAW, evolve(LNGS, dir_raw=str(root))))
    assert isinstance(update, RunUpdate)
    assert update.change is not None
    assert update.change[1]["status"] == "transferred"
    assert str(root) in update.change[1]["withdrawn"]["why"]
    assert yard.run is before
    assert (tmp_path / "away" / "run").is_dir()


class Stopped(Working):
    """A process that is stopped before one step, while all is done and begun anew without it."""

    def __init__(self, run: Run, before: str, meanwhile: Callable[[Run], Run]) -> None:
        super().__init__(run)
        self.before, self.meanwhile = before, meanwhile
        self.alarms: list[Alarm] = []

    async def alarm(self, alarm: Alarm) -> None:
        self.alarms.append(alarm)

    def _step(self, name: str) -> None:
        if name == self.before:
            self.before, self.run = "", self.meanwhile(self.run)

    async def update(self, update: RunUpdate, *, now: datetime, deed: Any = None) -> Run | None:
        self._step("noting")
        return await super().update(update, now=now)

    async def work(self, function: Any, *args: object, job: Job) -> Any:
        self._step(function.__name__)
        return await super().work(function, *args, job=job)


@pytest.mark.parametrize("goes_again", [False, True], ids=["good", "to go again"])
@pytest.mark.parametrize(
    ("is_taken_over", "before"),
    [
        *((False, step) for step in ("standing", "noting", "erase")),
        *((True, step) for step in ("noting", "erase")),
    ],
)
async def test_a_process_that_was_stopped_erases_no_new_copy(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: str,
    *,
    is_taken_over: bool,
    goes_again: bool,
) -> None:
    """Whatever it does when it goes on, a copy that was made meanwhile stands, if it is good.

    If that is to go as well, that is for its own intent, which is not proven yet.
    """
    path = tmp_path / "raw" / "run"
    path.mkdir(parents=True)
    wish = {"by": "me", "why": "a test", "keep": 1, "at": NOW, "was": "transferred"}
    fields = {"erasing": NOW, "mark": identity(vouched(path))} if is_taken_over else {}
    going: dict[str, Any] = {"deletion": wish, "proof": [], **fields, "location": str(path)}

    def meanwhile(run: Run) -> Run:
        path.rename(tmp_path / "old")  # a new directory within one tick could be its very double
        path.mkdir()
        new = entry("lngs", location=str(path))
        if goes_again:
            new = {**new, "status": "deleting", "deletion": {**wish, "at": NOW + timedelta(days=1)}}
        return run_of(new)

    yard = Stopped(run_of(entry("lngs", "deleting", **going)), before, meanwhile)
    monkeypatch.setattr(deletion, "weigh", lambda *_: Proven([]))
    with pytest.raises(Retry):
        await deletion.erase(job_of(yard, RAW, evolve(LNGS, dir_raw=str(tmp_path / "raw"))))
    assert path.is_dir()
    assert not copy_of(yard.run, "lngs").fields.get("erasing")


@pytest.mark.parametrize("moment", ["begun", "killed", "nothing was there", "no mark", "moved"])
async def test_what_stands_by_now_at_the_place_of_a_copy_that_goes_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """It is marked once and never again; its bytes gone, its entry goes, and people are alarmed."""
    root = tmp_path / "raw"
    path = root / (f"{MOVED_PREFIX}run" if moment == "moved" else "run")
    path.mkdir(parents=True)
    wish = {"by": "me", "why": "a test", "keep": 1, "at": NOW, "was": "transferred"}
    begun = {} if moment == "begun" else {"erasing": NOW, "mark": identity(vouched(path))}

    def restored(run: Run) -> Run:
        path.rename(path.with_name(f"{GONE_PREFIX}{path.name}"))
        path.mkdir()
        (path / "precious").touch()
        return run

    match moment:
        case "nothing was there":
            begun["mark"] = NOTHING
        case "no mark":
            del begun["mark"]
        case "moved":
            moved = {"moved_from": str(path), "moved_mark": begun["mark"]}
            begun = {**begun, **moved, "mark": NOTHING}
    going: dict[str, Any] = {"deletion": wish, "proof": [], "location": str(root / "run"), **begun}
    yard = Stopped(run_of(entry("lngs", "deleting", **going)), "erase", restored)
    monkeypatch.setattr(deletion, "weigh", lambda *_: Proven([]))
    update = await deletion.erase(job_of(yard, RAW, evolve(LNGS, dir_raw=str(root))))
    # Without a mark nobody can tell whose it was: `caxev stray` reports it.
    left = {f"{GONE_PREFIX}run"} if moment in ("nothing was there", "no mark") else set()
    assert {one.name for one in root.iterdir()} == {path.name, *left}
    assert (path / "precious").exists()
    assert isinstance(update, RunUpdate)
    assert update.remove is not None
    assert update.tombstone is not None
    (alarm,) = yard.alarms
    assert str(path) in alarm.summary


async def test_what_is_moved_aside_is_marked_once(tmp_path: Path) -> None:
    """Taken over, it is still the files that were judged, and none that a person restored."""
    path = tmp_path / "raw" / "run"
    path.mkdir(parents=True)
    wanted = {"at": NOW, "place": None, "from": "chicago", "mark": identity(vouched(path))}
    bad = entry("lngs", "error", location=str(path), quarantine=wanted)
    path.rename(tmp_path / "raw" / "kept")  # so that its inode number is not used again
    path.mkdir()
    site = evolve(LNGS, dir_raw=str(tmp_path / "raw"))
    with pytest.raises(Retry, match="not what was to be set aside"):
        await quarantine(job_of(Working(run_of(bad)), RAW, site))
    assert path.is_dir()


@pytest.mark.parametrize("pusher", ["chicago", "lngs", "closed", None])
async def test_a_copy_that_was_pushed_is_its_pusher_s_to_give_up(pusher: str | None) -> None:
    """At a host without a listener; anybody's if that is unknown, or no site any more."""
    since = NOW - timedelta(days=3)
    made = {"status_since": since, "source": pusher, "owner": None}
    there = entry("remote", "transferring", **made)
    seen = CopyKey("raw", "remote")
    result = await stalled.stalled(job_of(Yard(run_of(there)), seen))
    if pusher == "chicago":
        assert result == Skip("chicago put it there, and looks after it")
    else:
        assert isinstance(result, RunUpdate)
        assert result.remove is not None


@pytest.mark.parametrize("made", [True, False])
async def test_what_no_job_makes_any_more_is_given_up(*, made: bool) -> None:
    """Its site makes no such data now: else what it is made of would be kept for it for ever."""
    how = read(Processing, {"command": ["pax", "{output}"], "version": "v1", "inputs": []})
    here = evolve(LNGS, processing=how if made else None)
    old = {"status_since": NOW - timedelta(days=3), "owner": None, "job": {"name": "j"}}
    there = entry("lngs", "transferring", type="processed", pax_version="v1", **old)
    job = job_of(Yard(run_of(there)), CopyKey("processed", "lngs", "v1"), here)
    job.sites = sites_of(here)
    result = await stalled.stalled(job)
    assert isinstance(result, Skip if made else RunUpdate)


@pytest.mark.parametrize(
    ("status", "others", "todo"),
    [
        ("error", ("lngs",), "caxev copy --run 1 --type raw --from lngs --to remote; or caxev rm"),
        ("error", (), "caxev rm --run 1 --type raw --site remote --by-entries --why REASON"),
        ("verifying", (), "caxev explain --run 1 --site remote"),
        ("moving", (), "at remote: caxev mv --run 1 --type raw --site remote --to /new"),
    ],
)
async def test_an_alarm_about_a_copy_that_stands_still_has_a_next_step(
    status: str, others: tuple[str, ...], todo: str
) -> None:
    """Whatever is never given up by itself waits for a person."""
    there = entry("remote", status, status_since=NOW, moving_to="/new")
    run = evolve(run_of(there, *(entry(host, "transferred") for host in others)), number=1)
    job = job_of(Yard(run), CopyKey("raw", "remote"))
    seen = job.copy
    assert seen is not None
    assert stalled.todo(job, seen)["todo"].startswith(todo)
