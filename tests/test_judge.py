"""What is said of copies that contradict one another, as a pure function of the run."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from attrs import evolve
from bson import ObjectId
from hypothesis import given
from hypothesis import strategies as st

from caxev import Copy, CopyKey, Run, Skip
from caxev.config import Site, Sites
from caxev.copies.readings import Ask
from caxev.core.entry import NOTED
from caxev.core.job import Wait
from caxev.handlers.judge import FRESH, Acquit, Convict, Hung, plan_judgement, speaker
from tests import strategies as make

NOW = make.EPOCH
SITES = Sites(
    Path("sites.json"),
    {
        "lngs": Site(name="lngs", master=("raw",)),
        "chicago": Site(name="chicago"),
        "stockholm": Site(name="stockholm"),
        "depot": Site(name="depot", listener=False),
        "tape": Site(name="tape", method="tsm"),
    },
)


def entry(host: str, says: str = "good", **fields: Any) -> dict[str, Any]:
    usual = {"type": "raw", "host": host, "status": "transferred", "manifest": says}
    return {**usual, "verified_at": NOW, NOTED: NOW, **fields}


def run_of(*entries: dict[str, Any]) -> Run:
    return Run.from_document({"_id": ObjectId(), "data": list(entries)})


def mine(run: Run, host: str) -> Copy:
    copy = run.copy(CopyKey("raw", host))
    assert copy is not None
    return copy


def judged(run: Run, host: str = "lngs") -> Any:
    return plan_judgement(run, mine(run, host), SITES, NOW, NOW)


BAD_MASTER = (entry("lngs", "bad"), entry("chicago"), entry("stockholm"))
DISPUTED: dict[str, Any] = {"status": "error", "checksumproblem": True, "disputed": True}


def test_two_sites_with_one_directory_are_no_majority() -> None:
    """The master is not convicted by bytes that are read twice."""
    place = {"location": "/shared/run"}
    run = run_of(
        entry("lngs"), entry("chicago", "bad", **place), entry("stockholm", "bad", **place)
    )
    assert isinstance(judged(run), Convict)
    twin = evolve(SITES.get("stockholm"), hostname="chicago")
    other = evolve(SITES.get("chicago"), hostname="chicago")
    shared = evolve(SITES, by_name={**SITES.by_name, "chicago": other, "stockholm": twin})
    for host in ("lngs", "chicago", "stockholm"):
        assert isinstance(plan_judgement(run, mine(run, host), shared, NOW, NOW), Hung)


def test_the_majority_decides_against_the_master() -> None:
    """It is convicted, and the others are let be."""
    run = run_of(*BAD_MASTER)
    assert judged(run) == Convict("most of its copies say something else: chicago, stockholm")
    for host in ("chicago", "stockholm"):
        assert isinstance(judged(run, host), Skip)


def test_who_was_accused_by_a_bad_master_is_acquitted() -> None:
    """In any order of the sites' judgements."""
    run = run_of(entry("lngs", "bad"), *(entry(h, **DISPUTED) for h in ("chicago", "stockholm")))
    assert [judged(run, host) for host in ("chicago", "stockholm")] == [Acquit()] * 2
    assert isinstance(judged(run), Convict)
    convicted = {"status": "error", "checksumproblem": True, "disputed": None}
    after = run_of(entry("lngs", "bad", **convicted), *(dict(c.fields) for c in run.copies[1:]))
    assert judged(after, "chicago") == Acquit()


def test_nobody_is_judged_before_all_were_read_afresh() -> None:
    """Those that were not are asked, once; then they are waited for."""
    old: dict[str, Any] = {"verified_at": NOW - FRESH}
    run = run_of(entry("lngs", "bad", **old), entry("chicago", **old), entry("stockholm"))
    asked = judged(run)
    assert isinstance(asked, Ask)
    assert [one.host for one in asked.copies] == ["lngs", "chicago"]
    wait: dict[str, Any] = {**old, "check_asked": NOW}
    run = run_of(entry("lngs", "bad"), entry("chicago", **wait), entry("stockholm"))
    assert judged(run) == Wait("waits for a fresh reading at chicago", NOW + FRESH)


def test_who_does_not_answer_loses_its_voice() -> None:
    """So two of one mind outvote... one that answered and one that did not."""
    silent: dict[str, Any] = {"verified_at": None, "check_asked": NOW - FRESH}
    run = run_of(entry("lngs", "bad"), entry("chicago", **silent), entry("stockholm"))
    assert isinstance(judged(run), Hung)
    run = run_of(*run.document["data"], entry("depot", source="lngs"))
    assert judged(run) == Convict("most of its copies say something else: depot, stockholm")


def test_no_time_in_the_future_counts() -> None:
    """A reading from there is none, nor is a request; the answer to one of now is a reading."""
    ahead = NOW + 5 * FRESH
    others = (entry("lngs", "bad"), entry("stockholm"))
    times: list[dict[str, Any]] = [
        {"verified_at": ahead},
        {"verified_at": None, "check_asked": ahead},
        {NOTED: NOW - timedelta(1)},  # it has passed by now, and had not when it was written
        {NOTED: None},
    ]
    for fields in times:
        verdict = judged(run_of(*others, entry("chicago", **fields)))
        assert isinstance(verdict, Ask)
        assert [one.host for one in verdict.copies] == ["chicago"]
    asked = [{"id": "x", "at": NOW}]
    answered: dict[str, Any] = {"check_asked": asked, "check_answered": ["x"]}
    verdict = judged(run_of(*others, entry("chicago", verified_at=ahead, **answered)))
    assert isinstance(verdict, Convict)


def test_no_clock_that_is_ahead_takes_a_voice_away() -> None:
    """By one of two clocks the other copy has been silent for too long, by the other it has not."""
    silent: dict[str, Any] = {"verified_at": None, "check_asked": NOW - FRESH}
    run = run_of(entry("lngs", "bad"), entry("chicago", **silent), entry("stockholm"))
    run = run_of(*run.document["data"], entry("depot", source="lngs"))
    assert isinstance(judged(run), Convict)
    safe = NOW - timedelta(seconds=1)
    verdict = plan_judgement(run, mine(run, "lngs"), SITES, NOW, safe)
    assert isinstance(verdict, Wait)
    assert verdict.until > safe


def test_the_only_one_that_answers_is_no_majority() -> None:
    """It may be the bad one: nobody acquits itself. A person who vouches for it can."""
    silent: dict[str, Any] = {"verified_at": None, "check_asked": NOW - FRESH}
    accused = entry("lngs", "bad", **DISPUTED)
    assert isinstance(judged(run_of(entry("chicago", **silent), accused)), Hung)
    vouched = {**accused, "vouched": {"by": "me"}}
    assert judged(run_of(entry("chicago", **silent), vouched)) == Acquit()


def test_nobody_waits_for_an_old_program_s_reading() -> None:
    """Where no caxev has ever listened a copy counts as it stands."""
    old: dict[str, Any] = {"verified_at": None, "manifest": None, "checksum": "ab"}
    others = [entry("chicago", **old), entry("stockholm", checksum="ab")]
    run = run_of(*others, entry("lngs", "bad", **DISPUTED))
    assert isinstance(judged(run), Ask)
    verdict = plan_judgement(run, mine(run, "lngs"), SITES, NOW, NOW, mute=["chicago"])
    assert verdict == Convict("most of its copies say something else: chicago, stockholm")


def test_a_jury_is_not_hung_while_one_is_still_to_speak() -> None:
    """What is being verified will have a voice, and may decide."""
    run = run_of(entry("lngs", "bad"), entry("chicago"), entry("stockholm", status="verifying"))
    verdict = judged(run, "chicago")
    assert isinstance(verdict, Wait)
    assert verdict.why == "waits for what is being verified at stockholm"


def test_where_nobody_can_read_a_copy_it_counts_as_it_stands() -> None:
    """What is on tape, and what is at a site that no file describes."""
    old: dict[str, Any] = {"verified_at": None}
    run = run_of(entry("lngs", "bad"), entry("tape", **old), entry("nowhere", **old))
    assert isinstance(judged(run), Convict)


def test_a_hung_jury_names_the_master() -> None:
    """What differs from the master knows from what; the master itself is left as it is."""
    run = run_of(entry("lngs"), entry("chicago", "bad"))
    verdict = judged(run, "chicago")
    assert isinstance(verdict, Hung)
    assert verdict.master == mine(run, "lngs")
    assert "lngs: good; chicago: bad" in verdict.why
    own = judged(run)
    assert isinstance(own, Hung)
    assert own.master is None
    without = run_of(entry("stockholm"), entry("chicago", "bad"))
    assert judged(without, "chicago").master is None


def test_what_sites_have_made_themselves_is_not_compared() -> None:
    """Each has a voice about its own alone, and so has who took a copy of it."""
    derived: dict[str, Any] = {"type": "processed", "pax_version": "v1"}
    ours = entry("lngs", "made at lngs", job={}, **derived)
    theirs = entry("chicago", "made at chicago", job={}, **derived)
    taken = entry("stockholm", "made at lngs", source="lngs", producer="lngs", **derived)

    def at(run: Run, host: str) -> Any:
        copy = run.copy(CopyKey("processed", host, "v1"))
        assert copy is not None
        return plan_judgement(run, copy, SITES, NOW, NOW)

    run = run_of(ours, theirs, taken)
    assert all(isinstance(at(run, host), Skip) for host in ("lngs", "chicago", "stockholm"))
    run = run_of(ours, theirs, {**taken, "manifest": "other"})
    assert isinstance(at(run, "chicago"), Skip)
    assert isinstance(at(run, "stockholm"), Hung)


def test_one_site_tells_of_a_dispute() -> None:
    """The master's or, where it has no voice or there is none, the first that has a listener."""
    bad = [entry("depot", "c"), entry("chicago", "a"), entry("stockholm", "b")]
    assert speaker(run_of(*bad, entry("lngs", "d")), CopyKey("raw", "chicago"), SITES) == "lngs"
    assert speaker(run_of(*bad), CopyKey("raw", "stockholm"), SITES) == "chicago"
    assert speaker(run_of(*bad[:1]), CopyKey("raw", "depot"), SITES) is None


def test_where_all_agree_there_is_nothing_to_judge() -> None:
    """And one that is bad by its own record is for `repair`."""
    assert isinstance(judged(run_of(entry("lngs"), entry("chicago"))), Skip)
    rotten = entry("lngs", "bad", status="error", checksumproblem=True)
    assert isinstance(judged(run_of(rotten, entry("chicago"), entry("stockholm"))), Skip)
    alone = run_of(entry("lngs", **DISPUTED))
    assert isinstance(judged(alone), Skip)


votes = st.builds(
    entry,
    st.sampled_from(["lngs", "chicago", "stockholm", "depot", "tape"]),
    st.sampled_from(["good", "bad", "worse"]),
    status=st.sampled_from(["transferred", "error", "deleting"]),
    disputed=st.booleans(),
)


@given(entries=st.lists(votes, max_size=6, unique_by=lambda one: one["host"]))
def test_all_sites_come_to_one_verdict(entries: list[dict[str, Any]]) -> None:
    """Whoever judges: those that are found good say the same, and nobody is both."""
    run = run_of(*entries)
    verdicts = {copy: judged(run, copy.host) for copy in run.copies}
    good = {copy.manifest for copy, verdict in verdicts.items() if verdict == Acquit()}
    bad = {copy.manifest for copy, verdict in verdicts.items() if isinstance(verdict, Convict)}
    assert len(good) <= 1
    assert not good & bad
