"""Which copies may go: the decisions, as pure functions of a run and the sites."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from bson import ObjectId
from hypothesis import given
from hypothesis import strategies as st

from caxev.asking.vouching import again
from caxev.config import DEFAULT_HANDLERS, Deletion, Site, Sites, load_handlers
from caxev.copies.deletion import (
    Intent,
    Proven,
    Withdraw,
    begin,
    intent,
    prove,
    tombstone,
    weigh,
    withdraw,
)
from caxev.copies.quorum import agree, at_odds, at_one_host, majority, voters
from caxev.copies.readings import Ask
from caxev.copies.retention import (
    DeletionPlan,
    DeletionWish,
    InUse,
    plan,
    plan_processed,
    plan_purge,
    was_deleted,
)
from caxev.copies.storage import same_bytes, sites_sharing_storage
from caxev.core.clock import Clocks, utcnow
from caxev.core.entry import NOTED
from caxev.core.job import Job, Skip, Wait
from caxev.core.model import (
    DELETING,
    TRANSFERRED,
    Copy,
    CopyKey,
    Event,
    Run,
)
from caxev.core.registry import recorded
from caxev.core.update import RunUpdate, TagAbsent
from tests import strategies as make

NOW = make.EPOCH + timedelta(days=100)
DAY = timedelta(days=1)
RAW = CopyKey("raw", "lngs")
HOSTS = ("lngs", "chicago", "stockholm", "depot", "rucio-catalogue")


def site(name: str, **fields: Any) -> Site:
    return Site(
        **{
            "name": name,
            "hostname": name,
            "dir_raw": f"/{name}",
            "dir_processed": f"/{name}/processed",
            "purge": 5.0,
            **fields,
        }
    )


def sites_with(**deletion: Any) -> Sites:
    rules = Deletion(**{"copies": 2, **deletion})
    sites = [site(name, deletion=rules) for name in HOSTS[:4]]
    sites += [site("rucio-catalogue", method="rucio"), site("tape", method="tsm")]
    return Sites(Path("sites.json"), {one.name: one for one in sites})


ALL = sites_with()


def entry(host: str, status: str = TRANSFERRED, **fields: Any) -> dict[str, Any]:
    usual = {"location": f"/{host}/run", "manifest": "b3:good", "checksum": "good", NOTED: NOW}
    return {"type": "raw", "host": host, "status": status, **usual, **fields}


def run_of(*entries: dict[str, Any], **fields: Any) -> Run:
    document = {"_id": ObjectId(), "number": 1, "start": make.EPOCH, "data": list(entries)}
    return Run.from_document({**document, **fields})


def decided(run: Run, sites: Sites = ALL, *, full: bool = False, now: datetime = NOW) -> Any:
    here = sites.get("lngs")
    return plan_purge(run, run.copy(RAW), here, sites, now, full=full)


def why(decision: object) -> str:
    assert isinstance(decision, Skip | Wait), decision
    return decision.why


READER = entry(
    *("lngs", "transferring"), type="processed", location="/lngs/out", job={"input": "raw"}
)
THREE = (entry("lngs"), entry("chicago"), entry("stockholm"))


# -- who may go -----------------------------------------------------------------------------------


def test_raw_data_goes_at_its_age() -> None:
    """Where enough good copies are elsewhere, `purge` days after the start and not before."""
    run = run_of(*THREE)
    due = make.EPOCH + 5 * DAY
    assert isinstance(decided(run), DeletionPlan)
    early = decided(run, now=due - timedelta(seconds=1))
    assert isinstance(early, Wait)
    assert early.until == due
    assert isinstance(decided(run, now=due), DeletionPlan)
    assert isinstance(decided(run, full=True, now=make.EPOCH), DeletionPlan)


FOR_EVER = datetime(9999, 12, 31, tzinfo=UTC)
WITHDRAWN = entry("lngs", withdrawn={"at": FOR_EVER, "why": "x"})
GOING = {"at": FOR_EVER, "by": "x", "keep": 1, "was": TRANSFERRED, "manifest": "b3:good"}


@pytest.mark.parametrize(
    "run",
    [
        run_of(*THREE, start=FOR_EVER),
        run_of(WITHDRAWN, *THREE[1:]),
        run_of(entry("lngs", DELETING, deletion=GOING), *THREE[1:]),
    ],
    ids=["its start", "a withdrawal", "an intent"],
)
@pytest.mark.parametrize("full", [False, True])
def test_no_time_in_a_document_is_out_of_range(run: Run, *, full: bool) -> None:
    """Else one such run would keep every other from making room."""
    decided(run, full=full)
    mine = run.copy(RAW)
    assert mine is not None
    assert isinstance(weigh(run, mine, ALL, Clocks.at(NOW)), Ask | Skip)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (run_of(entry("lngs"), entry("chicago")), "there are 1: chicago"),
        (run_of(entry("lngs"), entry("chicago"), entry("stockholm", "error")), "there are 1"),
        (run_of(entry("lngs"), entry("chicago"), entry("stockholm", DELETING)), "there are 1"),
        (
            run_of(entry("lngs"), entry("chicago"), entry("stockholm", manifest="b3:bad")),
            "there are 1",
        ),
        (run_of(entry("lngs"), entry("chicago"), entry("nowhere")), "there are 1"),
        (run_of(entry("lngs"), entry("chicago"), entry("chicago")), "there are 1"),
        (run_of(entry("lngs", "verifying"), *THREE[1:]), "it is verifying"),
        (run_of(entry("lngs", location=None), *THREE[1:]), "no location"),
        (run_of(*THREE, tags=[{"name": "keep"}]), "tagged keep"),
        (run_of(*THREE, start=None), "no age"),
        (run_of(*THREE[1:]), "gone"),
        (run_of(*THREE, entry("depot", "transferring", source="lngs")), "it is being read"),
        (
            run_of(*THREE, READER),
            "it is being read",
        ),
        (run_of(*THREE, entry("lngs", type="x", location="/lngs/run/x")), "another entry"),
        (run_of(*THREE, entry("lngs", location="/lngs/run")), "another entry"),
        (run_of(entry("lngs", location="/other/run"), *THREE[1:]), "not inside /lngs"),
        (run_of(entry("lngs", location="/lngs"), *THREE[1:]), "place of its own"),
        (run_of(entry("lngs", location="/lngs/"), *THREE[1:]), "place of its own"),
    ],
)
def test_what_stays(run: Run, reason: str) -> None:
    """Whatever is needed, protected, read, or cannot be told from something else."""
    assert reason in why(decided(run, sites_with(protect=("keep",))))


def test_without_a_rule_nothing_goes() -> None:
    """`purge` null keeps raw data, and so does `pax_version_purge` processed data."""
    here = evolve(ALL.get("lngs"), purge=None)
    run = run_of(*THREE)
    assert "purge is null" in why(plan_purge(run, run.copy(RAW), here, ALL, NOW))
    place = "/lngs/processed/pax_v1/run.root"
    derived = run_of(entry("lngs", type="processed", pax_version="v1", location=place))
    key = CopyKey("processed", "lngs", "v1")
    assert "is null" in why(plan_processed(derived, derived.copy(key), here, ALL, NOW))
    ruled = evolve(here, pax_version_purge="v1")
    assert isinstance(plan_processed(derived, derived.copy(key), ruled, ALL, NOW), DeletionPlan)
    ruled = evolve(here, pax_version_purge="v2")
    assert "not v1" in why(plan_processed(derived, derived.copy(key), ruled, ALL, NOW))


@pytest.mark.parametrize(
    ("fields", "at"),
    [({"type": "untriggered"}, "lngs"), ({"host": "tape"}, "tape")],
)
def test_what_never_goes(fields: dict[str, Any], at: str) -> None:
    """Neither the DAQ's buffer nor what is on tape, whoever asks."""
    run = run_of(entry("lngs") | fields, *THREE[1:])
    copy = run.copies[0]
    answer = plan(run, DeletionWish(copy, "me", "", 0), ALL.get(at), ALL, NOW)
    assert isinstance(answer, Skip)


@pytest.mark.parametrize(
    ("location", "others", "reason"),
    [
        ("scope:raw", (), None),
        ("scope", (), "is not scope:dataset"),
        ("/rucio/raw", (), "is not scope:dataset"),
        (None, (), "no location"),
        ("scope:raw", ({"type": "processed", "location": "scope:raw"},), "another entry"),
        ("scope:raw", ({"type": "processed", "location": "scope:raw_pax_v1"},), None),
    ],
)
def test_a_dataset_goes_as_a_copy_does(
    location: str | None, others: tuple[dict[str, Any], ...], reason: str | None
) -> None:
    """Where it has a name of its own, and enough copies that can be read are elsewhere."""
    here = entry("rucio-catalogue", location=location)
    run = run_of(here, *THREE, *(entry("rucio-catalogue", **one) for one in others))
    there = ALL.get("rucio-catalogue")
    answer = plan(run, DeletionWish(run.copies[0], "me", "", 3), there, ALL, NOW)
    assert isinstance(answer, DeletionPlan) if reason is None else reason in why(answer)
    fewer = run_of(here, *THREE[:2], entry("tape"))
    answer = plan(fewer, DeletionWish(fewer.copies[0], "me", "", 4), there, ALL, NOW)
    assert isinstance(answer, Skip)


@given(keep=st.integers(-5, 0))
def test_the_last_raw_copy_never_goes(keep: int) -> None:
    """Whatever number of others is asked for."""
    run = run_of(entry("lngs"))
    answer = plan(run, DeletionWish(run.copies[0], "me", "", keep), ALL.get("lngs"), ALL, NOW)
    assert "1 good copies must remain" in why(answer)


BAD: dict[str, Any] = {"status": "error", "checksumproblem": True, "manifest": "b3:bad"}


def test_a_bad_copy_may_go_by_the_entries_of_others() -> None:
    """A site with an old program never answers: the copy goes at once, and the reason is kept."""
    cax: dict[str, Any] = {"manifest": None, "verified_at": None}
    run = run_of(entry("lngs", **BAD), entry("chicago", **cax))
    here = ALL.get("lngs")
    wish = DeletionWish(mine(run), "me", "it was pushed damaged", 1)
    usual = plan(run, wish, here, ALL, NOW)
    assert isinstance(usual, DeletionPlan)
    assert isinstance(weighed(applied(run, intent(run, usual, ALL, NOW))), Ask)
    wanted = plan(run, evolve(wish, by_entries=True), here, ALL, NOW)
    assert isinstance(wanted, DeletionPlan)
    going = applied(run, intent(run, wanted, ALL, NOW))
    verdict = weighed(going)
    assert isinstance(verdict, Proven)
    assert [row["host"] for row in verdict.proof] == ["chicago"]
    read = Intent.of(mine(going))
    assert read is not None
    stone = tombstone(mine(going), read, "lngs#1", 100)
    assert (stone["why"], stone["by_entries"]) == ("it was pushed damaged", True)
    assert stone["size"] == 100


@pytest.mark.parametrize(
    ("others", "fields", "reason"),
    [
        ((), BAD, "no majority"),
        (("chicago",), {}, "only a bad copy goes before the others are read"),
        (("rucio-catalogue",), BAD, "1 good copies must remain"),
        (("chicago",), {**BAD, "disputed": True}, "no majority"),
    ],
)
def test_a_good_copy_never_goes_by_entries(
    others: tuple[str, ...], fields: dict[str, Any], reason: str
) -> None:
    """Nor one without another, and what is disputed may be the good one."""
    run = run_of(entry("lngs", **fields), *map(entry, others))
    answer = plan(run, DeletionWish(mine(run), "me", "", 1, True), ALL.get("lngs"), ALL, NOW)
    assert reason in why(answer)


def test_an_entry_cannot_claim_that_a_good_copy_was_bad() -> None:
    """Of a copy that was good before its deletion the others are read, whatever stands there."""
    run = wanted_gone(run_of(*THREE))
    row = {**mine(run).fields["deletion"], "by_entries": True}
    assert isinstance(weighed(changed(run, "lngs", deletion=row)), Ask)


def test_what_an_old_program_may_read_stays() -> None:
    """It says from where it copies in no entry; after it must have ended it is no reader."""
    reading = entry("depot", status="transferring", manifest=None, checksum=None)
    young = {**reading, "creation_time": NOW - timedelta(hours=23)}
    verdict = decided(run_of(*THREE, young))
    assert isinstance(verdict, Wait)
    assert verdict.why == "it is being read"
    old = {**reading, "creation_time": NOW - timedelta(hours=25)}
    assert isinstance(decided(run_of(*THREE, old)), DeletionPlan)


def test_what_stays_anyway_waits_for_no_reader() -> None:
    """A timer would come back every hour, for nothing."""
    run = run_of(*THREE, entry("depot", "transferring", source="lngs"), tags=[{"name": "keep"}])
    assert isinstance(decided(run, sites_with(protect=("keep",))), Skip)


@pytest.mark.parametrize(
    ("others", "age", "expected"),
    [
        # The end of a job that reads it is no event for a purge.
        ((READER,), 9, InUse),
        # The reaction to our own copy waits for its age already.
        ((), 1, Skip),
        ((), 9, type(None)),
    ],
)
def test_the_last_copy_that_was_lacking_may_come_while_ours_is_read(
    others: tuple[dict[str, Any], ...], age: int, expected: type
) -> None:
    """The reaction to our own copy found too few others, and ended: this one must wait."""
    load_handlers(default=DEFAULT_HANDLERS)
    purge = next(one for one in recorded if one.name == "purge")
    run = run_of(*THREE, *others, start=utcnow() - age * DAY)
    event = Event(run.id, RAW.at("stockholm"), "verifying", TRANSFERRED)
    assert purge.decide is not None
    assert type(purge.decide(Job(run, event, ALL.get("lngs"), ALL))) is expected


def test_an_archive_never_counts_alone() -> None:
    """Rucio's copy can be one of those that must remain; it cannot be the only one."""
    run = run_of(entry("lngs"), entry("chicago"), entry("rucio-catalogue"))
    assert isinstance(decided(run), DeletionPlan)
    alone = run_of(entry("lngs"), entry("rucio-catalogue"))
    here = ALL.get("lngs")
    answer = plan(alone, DeletionWish(alone.copies[0], "me", "", 1), here, ALL, NOW)
    assert "there are 1: rucio-catalogue" in why(answer)


def test_one_place_under_two_names_is_one_copy() -> None:
    """Where two sites share a directory, deleting the one would delete the other."""
    twin = evolve(ALL.get("chicago"), hostname="lngs")
    sites = Sites(ALL.path, {**ALL.by_name, "chicago": twin})
    run = run_of(entry("lngs"), entry("chicago", location="/lngs/run"), entry("stockholm"))
    assert "there are 1: stockholm" in why(decided(run, sites))


def test_what_two_others_share_counts_once() -> None:
    """Deleting ours must leave so many sets of bytes, not so many entries."""
    run = run_of(entry("lngs"), *twins())
    assert "there are 1: chicago" in why(decided(run, sharing_sites()))


def test_hard_links_count_once() -> None:
    """Where one of two sites with one storage allows them, and they have the same content."""
    linked = evolve(sharing_sites().get("stockholm"), hard_links=True)
    sites = Sites(ALL.path, {**ALL.by_name, "stockholm": linked})
    run = run_of(*THREE)
    assert isinstance(decided(run, sharing_sites()), DeletionPlan)
    assert "there are 1: chicago" in why(decided(run, sites))
    other = run_of(entry("lngs"), entry("chicago", manifest="b3:bad"), entry("stockholm"))
    key = CopyKey("raw", "chicago")
    assert [one.host for one in voters(other, key, same_bytes(sites))] == list(HOSTS[:3])


def sharing_sites() -> Sites:
    """All sites; of these, chicago and stockholm are on one machine."""
    twin = evolve(ALL.get("stockholm"), hostname=ALL.get("chicago").hostname)
    return Sites(ALL.path, {**ALL.by_name, "stockholm": twin})


def twins(**fields: Any) -> list[dict[str, Any]]:
    """Two entries of one directory, which is written in two ways."""
    places = {"chicago": "/shared/run", "stockholm": "/shared//run/."}
    return [entry(host, location=place, **fields) for host, place in places.items()]


def test_one_set_of_bytes_has_one_voice() -> None:
    """Two entries of the same bad bytes do not outvote a good copy."""
    same = same_bytes(sharing_sites())
    run = run_of(entry("lngs"), *twins(manifest="b3:bad"))
    assert majority(run, RAW, same=same) == ()
    more = run_of(entry("lngs"), entry("depot"), *twins(manifest="b3:bad"))
    assert [one.host for one in majority(more, RAW, same=same)] == ["lngs", "depot"]
    for host in ("chicago", "stockholm"):  # each of the two is judged for itself
        assert [one.host for one in voters(more, CopyKey("raw", host), same)][-1] == host
    apart = same_bytes(ALL)
    assert {one.host for one in majority(run, RAW, same=apart)} == {"chicago", "stockholm"}


@pytest.mark.parametrize("there", ["/shared", "/mnt/disk"])
def test_one_marker_at_two_sites_is_one_directory(there: str) -> None:
    """Hosts may mount it over the network, at one path or at two: two entries are one copy."""
    places = {"lngs": "/shared", "chicago": there}

    def known(*ids: str) -> Sites:
        sharing = {
            name: evolve(ALL.get(name), dir_raw=root, markers={root: one})
            for (name, root), one in zip(places.items(), ids, strict=True)
        }
        return Sites(ALL.path, {**ALL.by_name, **sharing})

    entries = [entry(name, location=f"{root}/run") for name, root in places.items()]
    run = run_of(*entries)
    now = make.EPOCH + 30 * DAY

    def asked(sites: Sites) -> Any:
        copy = run.copies[0]
        here = sites.get("lngs")
        return plan(run, DeletionWish(copy, "me", "asked", 1), here, sites, now)

    assert isinstance(asked(known("aa", "bb")), DeletionPlan)
    assert isinstance(asked(known("unknown", "unknown")), DeletionPlan)
    one = known("aa", "aa")
    assert "there are 0" in why(asked(one))
    assert sites_sharing_storage(one.get("lngs"), one) == {"lngs", "chicago"}
    run = run_of(*entries, entry("stockholm"))
    assert isinstance(asked(one), DeletionPlan)


def test_one_set_of_bytes_is_read_once_when_a_person_vouches() -> None:
    """Two entries of one directory are no two voices, and one reading is for both."""
    run = run_of(entry("lngs"), *twins(manifest="b3:bad"))
    asked = list(again(run, run.copies[0], same_bytes(sharing_sites()), NOW))
    assert [one.change[0].key.host for one in asked if one.change] == ["lngs", "chicago"]


def test_a_voice_that_a_person_vouches_for_is_the_one_that_is_heard() -> None:
    """Though another entry of the same bytes comes first, or is the one that is judged."""
    first, second = twins()
    run = run_of(first, {**second, "vouched": {"by": "me"}})
    (one,) = voters(run, run.copies[0].key, same_bytes(sharing_sites()))
    assert one.host == "stockholm"


def test_a_bad_copy_may_go_beside_good_ones() -> None:
    """What must remain is what the majority says, not what the bad one says."""
    bad = entry("lngs", "error", manifest="b3:bad", checksum=None, checksumproblem=True)
    wanted = decided(run_of(bad, *THREE[1:]))
    assert isinstance(wanted, DeletionPlan)
    assert wanted.like.manifest == "b3:good"
    assert "no majority" in why(decided(run_of(bad)))


# -- what proves it -------------------------------------------------------------------------------


def applied(run: Run, update: RunUpdate) -> Run:
    """The run after an update of a copy's fields, if it fits."""
    assert update.change is not None
    which, fields = update.change
    for one in update.expect:
        if hasattr(one, "holds"):
            assert one.holds(run)
    data = [dict(copy.fields) for copy in run.copies]
    place = [copy.key for copy in run.copies].index(which.key)
    for name, value in which.fields.items():
        assert data[place].get(name) == value
    data[place] |= fields
    return Run.from_document({**run.document, "data": data})


def wanted_gone(run: Run, sites: Sites = ALL, keep: int = 2) -> Run:
    here = sites.get("lngs")
    wanted = plan(run, DeletionWish(mine(run), "me", "test", keep), here, sites, NOW)
    assert isinstance(wanted, DeletionPlan), wanted
    return applied(run, intent(run, wanted, sites, NOW))


def mine(run: Run) -> Copy:
    copy = run.copy(RAW)
    assert copy is not None
    return copy


def weighed(run: Run, sites: Sites = ALL, now: datetime = NOW) -> Any:
    return weigh(run, mine(run), sites, Clocks.at(now))


def changed(run: Run, host: str, **fields: Any) -> Run:
    data = [{**copy.fields, **(fields if copy.host == host else {})} for copy in run.copies]
    return Run.from_document({**run.document, "data": data})


def request_of(run: Run) -> str:
    wanted = Intent.of(mine(run))
    assert wanted is not None
    return wanted.request


def asked(run: Run, *hosts: str) -> Run:
    """The run with this deletion's request at these hosts."""
    for host in hosts:
        run = changed(run, host, check_asked=[{"id": request_of(run), "at": NOW}])
    return run


def read(run: Run, *hosts: str) -> Run:
    """The run once these hosts have answered this deletion's request."""
    for host in hosts:
        answers = ["another", request_of(run)]
        run = changed(asked(run, host), host, verified_at=NOW, check_answered=answers)
    return run


def test_the_others_are_asked_then_waited_for_then_believed() -> None:
    """Each is asked once; the proof names them with the times of their readings."""
    run = wanted_gone(run_of(*THREE))
    wish = weighed(run)
    assert isinstance(wish, Ask)
    assert [one.host for one in wish.copies] == ["chicago", "stockholm"]
    run = asked(run, "chicago", "stockholm")
    waiting = weighed(run)
    assert isinstance(waiting, Wait)
    assert waiting.until == NOW + 7 * DAY
    run = read(run, "chicago")
    assert isinstance(weighed(run), Wait)
    run = read(run, "stockholm")
    proven = weighed(run)
    assert isinstance(proven, Proven)
    assert [(row["host"], row["verified_at"]) for row in proven.proof] == [
        ("chicago", NOW),
        ("stockholm", NOW),
    ]
    clocks = Clocks.at(NOW)
    after = applied(run, prove(run, mine(run), ALL, proof=proven.proof, clocks=clocks))
    assert mine(after).fields["proof"] == proven.proof
    assert mine(after).status == DELETING


@pytest.mark.parametrize("proof_days", [0.0, 10.0])
@pytest.mark.parametrize(
    ("at", "answers"),
    [
        (NOW + 40 * DAY, []),
        (NOW + timedelta(seconds=1), []),
        (NOW + 40 * DAY, ["another"]),
        (NOW + 40 * DAY, NOW + 40 * DAY),
        (None, ["mine"]),
    ],
)
def test_a_time_in_the_future_proves_nothing(
    proof_days: float, at: datetime | None, answers: Any
) -> None:
    """Only the answer to this deletion's own request does, or a reading of the last days."""
    sites = sites_with(copies=1, proof_days=proof_days)
    run = wanted_gone(run_of(entry("lngs"), entry("chicago")), sites, keep=1)
    if answers == ["mine"]:
        answers = [request_of(run)]
    read_so = changed(run, "chicago", verified_at=at, check_answered=answers)
    assert isinstance(weighed(read_so, sites), Ask)
    assert isinstance(weighed(changed(read_so, "chicago", check_asked=at), sites), Ask)
    assert isinstance(weighed(read(run, "chicago"), sites), Proven)


def test_the_answer_to_a_deletion_is_not_one_to_the_next() -> None:
    """What was read for a deletion that was withdrawn proves nothing for the one after it."""
    run = read(wanted_gone(run_of(*THREE)), "chicago", "stockholm")
    assert isinstance(weighed(run), Proven)
    wanted = Intent.of(mine(run))
    assert wanted is not None
    again = wanted_gone(applied(run, withdraw(run, mine(run), wanted, "", NOW)))
    assert isinstance(weighed(again), Ask)


def test_a_reading_answers_all_who_asked_before_it_began() -> None:
    """Each of several that ask one copy one after the other is served by its request's id."""
    run = asked(wanted_gone(run_of(*THREE)), "chicago", "stockholm")
    ours, theirs = request_of(run), {"id": "theirs", "at": NOW}
    seen = run.copy(RAW._replace(host="chicago"))
    assert seen is not None
    late = RunUpdate.ask(run, seen, "late", NOW)
    assert late.append == {"check_asked": [{"id": "late", "at": NOW}]}
    both = changed(run, "chicago", check_asked=[*seen.fields["check_asked"], theirs])
    before = both.copy(seen.key)
    assert before is not None
    answer = RunUpdate.note(both, before, verified_at=NOW).answering(before)
    assert answer.append == {"check_answered": [ours, "theirs"]}
    done = changed(both, "chicago", verified_at=NOW, check_answered=[ours, "theirs"])
    assert isinstance(weighed(done), Wait)  # for stockholm alone
    assert isinstance(weighed(read(done, "stockholm")), Proven)


def test_a_late_reading_counts_for_some_days() -> None:
    """As many as `proof_days` says, before the intent."""
    sites = sites_with(proof_days=10)
    late: dict[str, Any] = {"verified_at": NOW - 9 * DAY}
    run = wanted_gone(run_of(entry("lngs"), *(entry(h, **late) for h in HOSTS[1:3])), sites)
    assert isinstance(weighed(run, sites), Proven)
    assert isinstance(weighed(changed(run, "chicago", verified_at=NOW - 11 * DAY), sites), Ask)


@pytest.mark.parametrize("noted", [NOW - 10 * DAY, None])
def test_a_time_that_was_in_the_future_proves_nothing_when_it_has_come(
    noted: datetime | None,
) -> None:
    """Somebody wrote that a copy was read, days before that time: it was not."""
    sites = sites_with(copies=1, proof_days=10)
    never: dict[str, Any] = {"verified_at": NOW - 9 * DAY, NOTED: noted}
    others = (entry("chicago", **never), entry("rucio-catalogue", **never))
    run = wanted_gone(run_of(entry("lngs"), *others), sites, keep=1)
    assert isinstance(weighed(run, sites), Ask)


def test_a_late_reading_is_late_by_both_clocks() -> None:
    """One clock that is wrong makes no reading younger, and none from the future past."""
    sites = sites_with(copies=1, proof_days=10)
    lately = entry("chicago", verified_at=NOW - 9 * DAY)
    run = wanted_gone(run_of(entry("lngs"), lately), sites, keep=1)
    for clocks, counts in (
        (Clocks.at(NOW), True),
        (Clocks(NOW, NOW, NOW + 40 * DAY), False),  # the intent's clock may have been behind
        (Clocks(NOW, NOW - 20 * DAY, NOW), False),
    ):
        found = weigh(run, mine(run), sites, clocks)
        assert isinstance(found, Proven if counts else Ask)
        assert isinstance(weigh(read(run, "chicago"), mine(run), sites, clocks), Proven)


def test_a_copy_on_tape_needs_no_reading() -> None:
    """It was restored and compared before it was good: the readable one is asked, it is not."""
    run = wanted_gone(run_of(entry("lngs"), entry("chicago"), entry("tape")))
    wish = weighed(run)
    assert isinstance(wish, Ask)
    assert [one.host for one in wish.copies] == ["chicago"]
    assert isinstance(weighed(read(run, "chicago")), Proven)
    gone = changed(run, "tape", status="error")
    assert isinstance(weighed(read(gone, "chicago")), Withdraw)


def test_a_copy_at_rucio_counts_once_it_was_compared() -> None:
    """Not because an entry says that it is there: it is asked for, and waited for, as the others.

    Once it was, however long ago, it proves what a copy on tape does.
    """
    run = wanted_gone(run_of(entry("lngs"), entry("chicago"), entry("rucio-catalogue")))
    wish = weighed(run)
    assert isinstance(wish, Ask)
    assert [one.host for one in wish.copies] == ["chicago", "rucio-catalogue"]
    run = read(run, "chicago")
    wish = weighed(run)
    assert isinstance(wish, Ask)
    assert [one.host for one in wish.copies] == ["rucio-catalogue"]
    run = asked(run, "rucio-catalogue")
    assert isinstance(weighed(run), Wait)
    assert isinstance(weighed(changed(run, "rucio-catalogue", verified_at=NOW + DAY)), Wait)
    verdict = weighed(run, now=NOW + 7 * DAY)
    assert isinstance(verdict, Withdraw)
    assert verdict.why == "no answer from rucio-catalogue for 7 days"
    compared = changed(run, "rucio-catalogue", verified_at=NOW - 300 * DAY)
    assert isinstance(weighed(compared), Proven)
    assert isinstance(weighed(changed(run, "rucio-catalogue", status="error")), Withdraw)


def test_rucio_is_not_waited_for_where_others_are_enough() -> None:
    """As many that can be read prove it without what was never compared."""
    run = read(wanted_gone(run_of(*THREE, entry("rucio-catalogue"))), "chicago", "stockholm")
    proven = weighed(run)
    assert isinstance(proven, Proven)
    assert [row["host"] for row in proven.proof] == ["chicago", "stockholm"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"status": "error"}, "fewer than 2 good copies"),
        ({"status": DELETING}, "fewer than 2 good copies"),
        ({"manifest": "b3:bad"}, "fewer than 2 good copies"),
    ],
)
def test_an_intent_is_withdrawn_when_too_few_are_left(change: dict[str, Any], reason: str) -> None:
    """The copy is what it was before, and its entry says why."""
    run = changed(wanted_gone(run_of(*THREE)), "chicago", **change)
    verdict = weighed(run)
    assert isinstance(verdict, Withdraw)
    assert reason in verdict.why
    wanted = Intent.of(mine(run))
    assert wanted is not None
    after = applied(run, withdraw(run, mine(run), wanted, verdict.why, NOW))
    assert mine(after).status == TRANSFERRED
    assert mine(after).fields["withdrawn"] == {"at": NOW, "why": verdict.why}
    healed = changed(after, "chicago", status=TRANSFERRED, manifest="b3:good")
    again = decided(healed)
    assert isinstance(again, Wait)
    assert again.until == NOW + 7 * DAY
    assert isinstance(decided(healed, now=NOW + 7 * DAY), DeletionPlan)


def test_who_does_not_answer_is_not_waited_for_for_ever() -> None:
    """After `patience` days the copy stays."""
    run = asked(wanted_gone(run_of(*THREE)), "chicago", "stockholm")
    run = read(run, "chicago")
    verdict = weighed(run, now=NOW + 7 * DAY)
    assert isinstance(verdict, Withdraw)
    assert verdict.why == "no answer from stockholm for 7 days"


def test_a_tag_protects_to_the_last() -> None:
    """Given after the intent, it has it withdrawn."""
    sites = sites_with(protect=("keep",))
    run = wanted_gone(run_of(*THREE), sites)
    tagged = Run.from_document({**run.document, "tags": [{"name": "keep"}]})
    assert isinstance(weighed(tagged, sites), Withdraw)


def test_a_tag_that_comes_last_of_all_protects() -> None:
    """Set between the snapshot and the write: neither the proof nor the start of it fits."""
    sites = sites_with(copies=2, protect=("keep",))
    run = wanted_gone(run_of(entry("lngs"), entry("chicago"), entry("stockholm")), sites)
    for update in (
        prove(run, mine(run), sites, proof=[], clocks=Clocks.at(NOW)),
        begin(run, mine(run), sites, proof=[], clocks=Clocks.at(NOW)),
    ):
        assert TagAbsent("keep") in update.expect


def test_what_is_erased_already_is_not_taken_back() -> None:
    """Neither weighed again, nor withdrawn."""
    run = changed(wanted_gone(run_of(*THREE)), "lngs", erasing=NOW)
    assert isinstance(weighed(run), Skip)
    wanted = Intent.of(mine(run))
    assert wanted is not None
    update = withdraw(run, mine(run), wanted, "", NOW)
    assert any(getattr(one, "fields", {}).get("erasing", 1) is None for one in update.expect)


@given(row=make.values)
def test_any_deletion_field_is_met_calmly(row: object) -> None:
    """What cannot be understood is no intent, and nothing is done about it."""
    run = run_of(entry("lngs", DELETING, deletion=row), *THREE[1:])
    assert Intent.of(mine(run)) is None
    assert isinstance(weighed(run), Skip)


def test_a_tombstone_tells_what_was_deleted_on_purpose() -> None:
    """By type, host and version; rows that are none are passed by."""
    stone = {"type": "raw", "host": "lngs", "pax_version": None, "by": "me", "why": "old"}
    run = run_of(deleted_data=[stone, "odd", {}])
    assert was_deleted(run, RAW) == "me deleted it (old)"
    assert was_deleted(run, CopyKey("raw", "chicago")) is None
    assert was_deleted(run, CopyKey("raw", "lngs", "v1")) is None
    assert was_deleted(run_of(deleted_data="odd"), RAW) is None


# -- the laws -------------------------------------------------------------------------------------

entries = st.builds(
    entry,
    st.sampled_from([*HOSTS, "tape", "nowhere"]),
    st.sampled_from([TRANSFERRED, "error", DELETING, "transferring"]),
    manifest=st.sampled_from(["b3:good", "b3:bad", None]),
    checksum=st.sampled_from(["good", "bad", None]),
    verified_at=st.sampled_from([NOW, NOW - DAY, NOW + DAY, None]),
    verified_noted=st.sampled_from([NOW, NOW - DAY, None]),
    check_answered=st.sampled_from([["ours"], ["theirs"], NOW, None]),
)


@given(others=st.lists(entries, max_size=7), keep=st.integers(0, 4))
def test_what_goes_leaves_enough_behind(others: list[dict[str, Any]], keep: int) -> None:
    """A proof holds only where so many others, at other hosts, are good and were read."""
    run = run_of(entry("lngs"), *(one for one in others if one["host"] != "lngs"))
    wanted = plan(run, DeletionWish(mine(run), "me", "", keep), ALL.get("lngs"), ALL, NOW)
    good = {
        copy.host
        for copy in run.copies
        if copy.host != "lngs" and copy.status == TRANSFERRED and copy.host in ALL
        if (copy.manifest or "b3:good") == "b3:good" and (copy.manifest or copy.checksum == "good")
    }
    least = max(keep, 1)
    if len(good) < least:
        assert isinstance(wanted, Skip)
        return
    if isinstance(wanted, Skip):
        return
    row = {"by": "", "why": "", "keep": keep, "at": NOW, "was": TRANSFERRED, "request": "ours"}
    digests = {"manifest": "b3:good", "checksum": "good"}
    begun = changed(run, "lngs", status=DELETING, deletion={**row, **digests})
    verdict = weighed(begun)
    if isinstance(verdict, Proven):
        hosts = {one["host"] for one in verdict.proof}
        assert len(hosts) >= least
        assert hosts <= good
        verified = [copy for copy in run.copies if copy.verified_at is not None]
        read = {copy.host for copy in verified if "ours" in copy.answered}
        compared = read | {copy.host for copy in verified if (copy.verified_at or NOW) <= NOW}
        assert hosts - {"rucio-catalogue", "tape"} <= read
        assert hosts - {"tape"} <= compared
        assert hosts & read - {"rucio-catalogue", "tape"}


# -- who says what --------------------------------------------------------------------------------


def test_who_changed_has_no_voice() -> None:
    """A copy that is not what its entry said; one that contradicts only others has one."""
    bad: dict[str, Any] = {"status": "error", "checksumproblem": True, "manifest": "b3:bad"}
    run = run_of(entry("lngs", **bad), entry("chicago"), entry("depot", disputed=True, **bad))
    same = at_one_host
    assert [one.host for one in voters(run, RAW, same)] == ["chicago", "depot"]
    assert at_odds(run, RAW, same)
    assert majority(run, RAW, same=same) == ()
    more = run_of(*run.document["data"], entry("stockholm"))
    assert [one.host for one in majority(more, RAW, same=same)] == ["chicago", "stockholm"]


def test_a_person_outweighs_a_majority() -> None:
    """Where one vouches for a copy, it is those that say the same."""
    run = run_of(*THREE, entry("depot", manifest="b3:bad", vouched={"by": "me"}))
    assert [one.host for one in majority(run, RAW, same=at_one_host)] == ["depot"]
    assert [one.host for one in majority(run, RAW, without=["depot"], same=at_one_host)] == [
        "lngs",
        "chicago",
        "stockholm",
    ]


@given(others=st.lists(entries, max_size=7))
def test_a_majority_is_of_one_mind_and_more_than_half(others: list[dict[str, Any]]) -> None:
    """It has more than half of all voices, and the order of entries does not matter to it."""
    run = run_of(*others)
    most, all_ = majority(run, RAW, same=at_one_host), voters(run, RAW, at_one_host)
    assert not most or 2 * len(most) > len(all_)
    assert set(most) <= set(all_)
    if most and all(one.manifest for one in all_):
        assert len({one.manifest for one in most}) == 1


def test_copies_of_cax_agree_by_checksum() -> None:
    """Where not both have a manifest; without any digest nothing agrees."""
    run = run_of(entry("lngs", manifest=None), entry("chicago"), entry("depot", checksum=None))
    ours, theirs, third = run.copies
    assert agree(ours, theirs)
    assert agree(theirs, third)
    assert not agree(ours, third)
