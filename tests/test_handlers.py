"""What the transfer and checksum reactions decide, as pure functions of a run and the sites."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from blake3 import blake3
from bson import ObjectId
from hypothesis import given
from hypothesis import strategies as st
from loguru import logger

from caxev import CopyKey, GiveUp, Job, Manifest, Skip
from caxev.config import Site, Sites
from caxev.files import Item
from caxev.model import Copy, Event, Run
from handlers import checksum as verify
from handlers import transfer
from tests import strategies as make

NOW = make.EPOCH
RAW = CopyKey("raw", "lngs")
TRIGGER = "raw at xenon: transferred"
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


def run_of(*entries: dict[str, Any], **fields: Any) -> Run:
    document = {"_id": ObjectId(), "name": NAME, "start": NOW, "data": list(entries)}
    return Run.from_document({**document, **fields})


def copy_of(run: Run, host: str) -> Copy:
    found = run.copy(CopyKey("raw", host))
    assert found is not None
    return found


def pull(
    run: Run, at: str = "xenon", here: Site = LNGS, kind: str = "raw", days: float = 0
) -> transfer.Plan | Skip:
    seen = CopyKey(kind, at, "v1" if kind != "raw" else None)
    now = NOW + timedelta(days=days)
    return transfer.plan_pull(run, seen, here, ALL, trigger=TRIGGER, now=now)


def push(run: Run, name: str = "chicago", here: Site = LNGS, kind: str = "raw") -> Any:
    seen = CopyKey(kind, here.name)
    return transfer.plan_push(run, seen, here, ALL, name=name, trigger=TRIGGER)


def why(plan: object) -> str:
    assert isinstance(plan, Skip)
    return plan.why


# -- pull -------------------------------------------------------------------------------------


def test_pull_plans_a_copy_under_the_sites_own_directory() -> None:
    """The first good source, our directory for that type, the run's own directory name."""
    run = run_of(entry("xenon"))
    assert pull(run) == transfer.Plan(copy_of(run, "xenon"), RAW, f"/lngs/raw/{NAME}", None)


def test_pull_prefers_the_order_of_download_options() -> None:
    """Of two good copies the one named first is fetched, by that one's event alone."""
    run = run_of(entry("chicago"), entry("xenon"))
    plan = pull(run, "xenon")
    assert isinstance(plan, transfer.Plan)
    assert plan.source.host == "xenon"
    assert "comes first" in why(pull(run, "chicago"))


def test_pull_falls_back_to_the_next_source() -> None:
    """A first source that is not good yet does not stop the second."""
    plan = pull(run_of(entry("xenon", "verifying"), entry("chicago")), "chicago")
    assert isinstance(plan, transfer.Plan)
    assert plan.source.host == "chicago"


def test_pull_after_our_copy_vanished_takes_the_best_source() -> None:
    """Where our own copy is gone, the event speaks of us and not of a source."""
    plan = pull(run_of(entry("chicago")), "lngs")
    assert isinstance(plan, transfer.Plan)
    assert plan.source.host == "chicago"


def test_pull_of_derived_data_matches_its_version() -> None:
    """Another version of the same type is another copy."""
    derived = {"type": "processed", "pax_version": "v1", "location": "/xenon/x.root"}
    plan = pull(run_of(entry("xenon", **derived)), kind="processed")
    assert isinstance(plan, transfer.Plan)
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
    assert isinstance(pull(run), transfer.Plan)


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


@pytest.mark.parametrize("host", ["tape", "nowhere"])
def test_pull_from_where_ssh_does_not_reach(host: str) -> None:
    """A source that is no SSH site, or that no file describes, is none for this reaction."""
    here = site("lngs", download_options=(host,))
    assert "is not reached by" in why(pull(run_of(entry(host)), host, here))


@given(purge=st.floats(0.1, 100), days=st.floats(0, 200))
def test_raw_data_that_would_be_purged_at_once_is_not_fetched(purge: float, days: float) -> None:
    """Raw data older than `purge` days stays where it is; nothing else has an age."""
    here = site("lngs", download_options=("xenon",), purge=purge)
    raw = pull(run_of(entry("xenon")), here=here, days=days)
    assert isinstance(raw, Skip) == (timedelta(days=purge) < timedelta(days=days))
    ageless = run_of(entry("xenon"), start=None)
    assert isinstance(pull(ageless, here=here, days=days), transfer.Plan)
    derived = run_of(entry("xenon", type="processed", pax_version="v1"))
    assert isinstance(pull(derived, here=here, kind="processed", days=days), transfer.Plan)


# -- what is there already ----------------------------------------------------------------------


@pytest.mark.parametrize("status", ["transferring", "error"])
def test_only_ones_own_copy_is_resumed(status: str) -> None:
    """A broken transfer goes on where this very trigger began it, and nowhere else."""
    ours = entry("lngs", status, trigger=TRIGGER)
    run = run_of(entry("xenon"), ours)
    plan = pull(run)
    assert isinstance(plan, transfer.Plan)
    assert plan.resume == copy_of(run, "lngs")
    for other in ("raw at chicago: transferred", None):
        theirs = run_of(entry("xenon"), entry("lngs", status, trigger=other))
        assert why(pull(theirs)) == f"raw at lngs is {status} already"


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
    plan = transfer.Plan(copy_of(run, "lngs"), wanted, f"/chicago/raw/{NAME}", None)
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


def test_push_to_a_site_that_is_not_described() -> None:
    """An upload option without a site is no reason to fail the others."""
    assert "not in sites.json" in why(
        push(run_of(entry("lngs")), "gone", site("lngs", upload_options=("gone",)))
    )


@pytest.mark.parametrize("plan", [pull, push])
def test_untriggered_is_never_moved(plan: Any) -> None:
    """The DAQ's buffer is in nobody's `data_type`."""
    run = run_of(*(entry(host, type="untriggered") for host in ("xenon", "lngs")))
    assert "data_type" in why(plan(run, kind="untriggered"))


# -- checksum ---------------------------------------------------------------------------------


def check(run: Run, host: str, here: str = "lngs") -> verify.Plan | Skip:
    return verify.plan_checksum(run, run.copy(CopyKey("raw", host)), ALL.get(here), ALL)


def test_a_copy_is_compared_with_the_one_it_came_from() -> None:
    """The source comes before the master, the master before any other good one."""
    others = [entry("remote"), entry("xenon"), entry("chicago")]
    order = []
    while others:
        run = run_of(*others, entry("lngs", "verifying", source="chicago"))
        plan = check(run, "lngs")
        assert isinstance(plan, verify.Plan)
        assert plan.reference is not None
        order.append(plan.reference.host)
        others = [one for one in others if one["host"] != order[-1]]
    assert order == ["chicago", "xenon", "remote"]


@pytest.mark.parametrize("fields", [{"type": "processed"}, {"pax_version": "v1"}])
def test_other_data_is_no_reference(fields: dict[str, Any]) -> None:
    """A copy beside which there is only other data is the first of its kind."""
    run = run_of(entry("xenon", **fields), entry("lngs", "verifying"))
    plan = check(run, "lngs")
    assert isinstance(plan, verify.Plan)
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
    assert isinstance(plan, verify.Plan)
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
        assert isinstance(plan, verify.Plan)
        assert plan.sha512 == wanted


def test_a_copy_without_listener_is_verified_by_its_pusher_alone() -> None:
    """Of all the sites that see it, the one that put it there reads it."""
    run = run_of(entry("lngs"), entry("remote", "verifying", source="lngs"))
    assert isinstance(check(run, "remote", "lngs"), verify.Plan)
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


# -- verdict ----------------------------------------------------------------------------------


class Shelf:
    """The ports of a job that needs only manifests."""

    def __init__(self, *manifests: Manifest) -> None:
        self.rows = {one.digest: one.to_rows() for one in manifests}

    async def load_manifest(self, digest: str) -> list[dict[str, Any]] | None:
        return self.rows.get(digest)


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
    known: dict[str, Any] | None, found: Manifest = GOOD, *shelf: Manifest
) -> dict[str, Any]:
    """What the copy's entry is given, where the other copy has these fields."""
    others = [] if known is None else [entry("xenon", **known)]
    run = run_of(*others, entry("lngs", "verifying"))
    plan = check(run, "lngs")
    assert isinstance(plan, verify.Plan)
    event = Event(run.id, RAW, None, "verifying")
    ports: Any = Shelf(*shelf)
    job = Job(run, event, LNGS, ALL, "lngs#1", logger, ports)
    update = await verify.verdict(job, plan, found)
    assert update.change is not None
    expected, fields = update.change
    assert expected == plan.copy.as_seen
    assert fields["manifest"] == found.digest
    return dict(fields)


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
