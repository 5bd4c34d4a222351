"""Names in the catalogue, rule files, and what the reactions decide: pure, without a server."""

from __future__ import annotations

import json
import os
import socket
import sys
from contextlib import nullcontext, suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.request import urlopen

import pytest
import trio
from attrs import evolve
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rucio.common.config import config_get

from caxev import (
    Copy,
    CopyField,
    CopyKey,
    Denied,
    Event,
    GiveUp,
    Job,
    Retry,
    Run,
    RunUpdate,
    Skip,
    limited,
)
from caxev.cli import cli
from caxev.cli.rucio.look import differing
from caxev.config import Catalogue, ConfigError, Site, Sites, load_sites
from caxev.copies.deletion import Proven
from caxev.copies.lifecycle import trigger_of
from caxev.copies.storage import custodian
from caxev.core import ledger
from caxev.core.alarms import Alarm
from caxev.core.clock import utcnow
from caxev.core.errors import Damaged
from caxev.database import Lease
from caxev.files import Meter, Seen, to_nobody
from caxev.handlers import rucio, rucio_datasets
from caxev.http_server import SmallServer
from caxev.rucio import answers, connection
from caxev.rucio import client as rucio_client
from caxev.rucio.changes import ENDED, Changes, RuleState, Wishes, changes, wishes_for
from caxev.rucio.connection import RucioSession
from caxev.rucio.files import Checked
from caxev.rucio.messages import Messages, datasets_in
from caxev.rucio.moving import Fetching
from caxev.rucio.names import Did, names_of
from caxev.rucio.orders import DatasetState, Download, Settlement, Verdict
from caxev.rucio.rules import Rule, WantedReplica, load_rules
from caxev.rucio.storage import Storage
from tests import engine
from tests.conftest import Database as Named
from tests.places import vouched
from tests.test_cli import Caxev, caxev  # noqa: F401  # a fixture
from tests.test_handlers import Yard, fits

NOW = datetime(2017, 3, 1, 12, tzinfo=UTC)
KEY = CopyKey("raw", "rucio-catalogue")
CATALOGUE = Site(name="rucio-catalogue", method="rucio", rucio_upload_rse="A_DISK")
LNGS = Site(name="lngs", dir_raw="/raw", upload_options=("rucio-catalogue",))
CHICAGO = Site(name="chicago", dir_raw="/c", download_options=("rucio-catalogue",))
SITES = Sites(Path("sites.json"), {one.name: one for one in (LNGS, CHICAGO, CATALOGUE)})
TRIGGER = "lngs: rucio: raw at lngs"


def run_of(*entries: dict[str, Any], **fields: Any) -> Run:
    document = {
        "_id": 1,
        "number": 5207,
        "name": "170301_1200",
        "detector": "tpc",
        "start": NOW,
        "source": {"type": "Kr83m"},
        "tags": [{"name": "good"}],
        "data": list(entries),
    }
    return Run.from_document({**document, **fields})


def entry(host: str, status: str = "transferred", **fields: Any) -> dict[str, Any]:
    place = "xe1t_SR001_170301_1200_tpc:raw" if host == KEY.host else f"/{host}/170301_1200"
    known = {"location": place, "manifest": "b3:1"}
    return {"type": "raw", "host": host, "status": status, **known, **fields}


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "dataset"),
    [
        ({}, "xe1t_SR001_170301_1200_tpc:raw"),
        ({"detector": "muon_veto"}, "xe1t_SR001_170301_1200_mv:raw"),
        (
            {"name": "170202_1739", "start": datetime(2017, 2, 2, 17, 39, tzinfo=UTC)},
            "xe1t_SR000_170202_1739_tpc:raw",
        ),
        (
            {"name": "170202_1740", "start": datetime(2017, 2, 2, 17, 40, tzinfo=UTC)},
            "xe1t_SR001_170202_1740_tpc:raw",
        ),
        ({"name": "161111_1434", "start": None}, "xe1t_SR000_161111_1434_tpc:raw"),
    ],
)
def test_scopes_and_datasets(fields: dict[str, Any], dataset: str) -> None:
    """The science run by the time, the run by its name, the detector as it is called."""
    names = names_of(run_of(**fields), KEY, Catalogue())
    assert str(names.dataset) == dataset
    scope = names.dataset.scope
    assert str(names.run) == f"{scope[:10]}:{scope}"
    assert str(names.period) == f"{scope[:10]}:{scope[:10]}_data"


def test_names_of_derived_data_and_of_other_experiments() -> None:
    """A version is part of the dataset; experiment, periods and detectors are configurable."""
    key = CopyKey("processed", "rucio-catalogue", "v6.8.0")
    settings = Catalogue(experiment="xnt", periods=(), detectors={"muon_veto": "mv"})
    settings = evolve(settings, periods=(Catalogue().periods[0],))
    names = names_of(run_of(detector="muon_veto"), key, settings)
    assert str(names.dataset) == "xnt_SR000_170301_1200_mv:processed_pax_v6.8.0"


def test_a_run_without_a_time_has_no_name() -> None:
    """Neither start nor a name that tells it."""
    with pytest.raises(GiveUp, match="can have no scope"):
        names_of(run_of(name="test", start=None), KEY, Catalogue())


@pytest.mark.parametrize("location", [None, "", "raw", ":raw", "a:", "a:b:c", "/data/raw"])
def test_what_is_no_place_in_a_catalogue(location: str | None) -> None:
    """Anything but scope:name."""
    with pytest.raises(GiveUp, match="no place in a catalogue"):
        Did.of(location)


# -- rule files -----------------------------------------------------------------------------------


def rules_of(tmp_path: Path, *rules: dict[str, Any]) -> tuple[Rule, ...]:
    file = tmp_path / "rules.json"
    file.write_text(json.dumps(rules))
    return load_rules(file)


SIMPLE = {
    "version": "1.0",
    "verification_only": False,
    "run_nb": None,
    "run_nb_exclude": None,
    "run_name": None,
    "run_name_exclude": None,
    "detector_type": None,
    "source_type": None,
    "destination_rse": ["B_DISK", "C_DISK"],
    "destination_livetime": {"B_DISK": "-1", "C_DISK": "3600"},
    "destination_condition": "blabla",
    "remove_rse": None,
}
"""A rule as cax's own files have it."""


def test_a_rule_of_cax(tmp_path: Path) -> None:
    """Replicas for ever and for an hour, and what sites.json wants."""
    rules = rules_of(tmp_path, SIMPLE)
    assert wishes_for(rules, run_of(), KEY, always=["A_DISK"]).keep == (
        WantedReplica(("B_DISK",), None, "rule 1"),
        WantedReplica(("C_DISK",), 3600, "rule 1"),
        WantedReplica(("A_DISK",), None, "sites.json"),
    )


@pytest.mark.parametrize(
    ("condition", "met"),
    [
        ({"run_nb": "5207"}, True),
        ({"run_nb": "5200, 5205, 5207"}, True),
        ({"run_nb": "5200-5207"}, True),
        ({"run_nb": "5207 - 5210, 7"}, True),
        ({"run_nb": "5200-5206"}, False),
        ({"run_nb": 5207}, True),
        ({"run_nb": "5200-5300", "run_nb_exclude": "5207"}, False),
        ({"run_nb_exclude": "5200-5206"}, True),
        ({"run_name": "170301_1200"}, True),
        ({"run_name": "170301_1100-170301_1200"}, True),
        ({"run_name": "all"}, True),
        ({"run_name": "161111_1434"}, False),
        ({"run_nb": "1", "run_name": "170301_1200"}, True),
        ({"run_nb": "1", "run_name": "161111_1434"}, False),
        ({"run_name_exclude": "170301_0000-170301_2359"}, False),
        ({"detector_type": "tpc"}, True),
        ({"detector_type": ["muon_veto"]}, False),
        ({"source_type": "Kr83m, Rn220"}, True),
        ({"source_type": "AmBe"}, False),
        ({"tags": "good"}, True),
        ({"tags": ["bad", "worse"]}, False),
        ({"tags_exclude": "good"}, False),
        ({"data_type": "processed"}, False),
        ({"after": "2017-03-01 12:00"}, True),
        ({"after": "2017-03-01T12:00:01Z"}, False),
        ({"before": "2017-03-01 12:00"}, False),
        ({"min_copies": 2}, False),
        ({"min_copies": 1, "max_copies": 1}, True),
        ({"max_copies": 0}, False),
    ],
)
def test_conditions(tmp_path: Path, condition: dict[str, Any], met: bool) -> None:
    """Each form of each condition; several hold together, but run_nb and run_name either."""
    (rule,) = rules_of(tmp_path, {**SIMPLE, **condition})
    run = run_of(entry("lngs"), entry(KEY.host), entry("chicago", "error"))
    assert (rule.unmet(run, KEY) is None) == met


@pytest.mark.parametrize("value", [True, None])
def test_only_to_verify(tmp_path: Path, value: bool | None) -> None:
    """A rule that only verifies ends the list: nothing is wanted, nothing is removed."""
    rules = rules_of(tmp_path, {**SIMPLE, "verification_only": value}, SIMPLE)
    wishes = wishes_for(rules, run_of(), KEY, always=["A_DISK"])
    assert (wishes.keep, wishes.only_verify) == ((), "rule 1")
    assert changes(wishes, [], [], run_name="x", now=NOW) == Changes()


def test_one_of_several(tmp_path: Path) -> None:
    """By chance, but the same for a run always; and where there is a rule already, that one."""
    rules = rules_of(
        tmp_path,
        {
            **SIMPLE,
            "destination_rse": ["random: B_DISK, C_DISK"],
            "destination_livetime": {"random: B_DISK, C_DISK": "-1"},
        },
    )
    wishes = wishes_for(rules, run_of(), KEY)
    taken = {
        changes(wishes, [], [], run_name=f"run {number}", now=NOW).add[0][0] for number in range(50)
    }
    assert taken == {"B_DISK", "C_DISK"}
    for rse in taken:
        done = changes(wishes, [standing(rse)], [], run_name="run 1", now=NOW)
        assert done == Changes()


def test_the_higher_priority_speaks_for_an_rse(tmp_path: Path) -> None:
    """Then the first in the file; of an RSE that nobody speaks of, sites.json does."""
    low = {**SIMPLE, "name": "low", "destination_livetime": {"B_DISK": 60}}
    high = {**SIMPLE, "name": "high", "priority": 5, "destination_rse": []}
    high |= {"destination_livetime": {}, "remove_rse": ["B_DISK", "A_DISK"]}
    wishes = wishes_for(rules_of(tmp_path, low, high), run_of(), KEY, always=["A_DISK"])
    assert wishes.keep == (WantedReplica(("C_DISK",), None, "rule 1 (low)"),)
    assert dict(wishes.remove) == dict.fromkeys(("A_DISK", "B_DISK"), "rule 2 (high)")


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"run_nb": "5200-5100"}, "rule 1: run_nb must be run numbers"),
        ({"run_nb": "many"}, "rule 1: run_nb must be run numbers"),
        ({"run_name": "yesterday"}, "rule 1: run_name must be run names"),
        ({"destination_rse": ["b disk"]}, "rule 1: destination_rse must be a list of RSEs"),
        ({"destination_rse": ["B_DISK", "B_DISK"]}, "each once"),
        ({"destination_livetime": {"D_DISK": 1}}, "'D_DISK' is not in destination_rse"),
        ({"destination_livetime": {"B_DISK": "soon"}}, "destination_livetime must be seconds"),
        ({"remove_rse": ["B_DISK"]}, "remove_rse: 'B_DISK' is in destination_rse too"),
        ({"verification_only": "no"}, "verification_only must be true, false"),
        ({"priority": "high"}, "priority must be a whole number"),
        ({"after": "soon"}, "after must be a moment"),
        ({"source_typ": "x"}, "unknown key 'source_typ' (did you mean 'source_type'?"),
    ],
)
def test_an_error_names_file_rule_and_key(
    tmp_path: Path, fields: dict[str, Any], told: str
) -> None:
    """Everything that is wrong is told at once."""
    with pytest.raises(ConfigError) as raised:
        rules_of(tmp_path, {**SIMPLE, **fields})
    assert told in str(raised.value)
    assert str(tmp_path / "rules.json") in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]", "[" * 100_000])
def test_what_is_no_rule_file(tmp_path: Path, text: str) -> None:
    """It is told as what it is."""
    (tmp_path / "rules.json").write_text(text)
    with pytest.raises(ConfigError, match=r"rules\.json.* (empty|JSON|rules|rule 1: is 1, not)"):
        load_rules(tmp_path / "rules.json")
    with pytest.raises(ConfigError, match="does not exist"):
        load_rules(tmp_path / "none.json")


def test_a_rule_file_is_checked_in_json_too(tmp_path: Path) -> None:
    """One document, and no line beside it."""
    file = tmp_path / "rules.json"
    file.write_text(json.dumps([SIMPLE]))
    said = CliRunner().invoke(cli, ["rucio", "rules", "--check", str(file), "--json"])
    assert json.loads(said.output) == [{"file": str(file), "rules": 1}]


# -- what is to be done ---------------------------------------------------------------------------


def standing(rse: str, state: str = "OK", **fields: Any) -> RuleState:
    return RuleState(f"id of {rse}", rse, state, NOW, **fields)


def test_a_rule_file_in_error_waits_for_a_person(tmp_path: Path) -> None:
    """And has an alarm, as all that does."""
    (tmp_path / "rules.json").write_text("[1]")
    there = evolve(CATALOGUE, rucio=Catalogue(rules=str(tmp_path / "rules.json")))
    run = run_of(entry(KEY.host))
    with pytest.raises(Denied, match="rule 1"):
        rucio_datasets.wishes_of(run, run.copies[0], there)


RSES = ("A_DISK", "B_DISK", "C_DISK")
wanted_sets = st.dictionaries(st.sampled_from(RSES), st.none() | st.integers(100, 10**6))
standing_sets = st.dictionaries(
    st.sampled_from(RSES), st.none() | st.integers(0, 10**6).map(lambda s: timedelta(seconds=s))
)


@given(wanted_sets, standing_sets, st.integers(0, 10**6))
def test_what_is_done_leaves_nothing_to_do(
    wanted: dict[str, int | None], there: dict[str, timedelta | None], age: int
) -> None:
    """Applied to rules, the changes make a state in which there are none, at any later time."""
    now = NOW + timedelta(seconds=age)
    wishes = Wishes(tuple(WantedReplica((rse,), lifetime, "x") for rse, lifetime in wanted.items()))
    rules = [
        standing(rse, expires=None if end is None else now + end) for rse, end in there.items()
    ]
    todo = changes(wishes, rules, [], run_name="x", now=now)
    ends = dict(todo.expire)
    after = [
        evolve(one, expires=_until(now, ends[one.id])) if one.id in ends else one for one in rules
    ]
    after += [evolve(standing(rse), created=now, expires=_until(now, s)) for rse, s in todo.add]
    assert changes(wishes, after, [], run_name="x", now=now) == Changes()
    later = now + timedelta(seconds=50)
    assert changes(wishes, after, [], run_name="x", now=later) == Changes()


def _until(now: datetime, seconds: int | None) -> datetime | None:
    return None if seconds is None else now + timedelta(seconds=seconds)


def test_a_rule_that_came_to_its_end_is_not_made_anew() -> None:
    """As the entry remembers it; a longer lifetime makes it live again."""
    gone = [standing("B_DISK", ENDED)]
    hour = Wishes((WantedReplica(("B_DISK",), 3600, "x"),))
    later = NOW + timedelta(hours=2)
    assert changes(hour, [], gone, run_name="x", now=later) == Changes()
    day = Wishes((WantedReplica(("B_DISK",), 86400, "x"),))
    assert changes(day, [], gone, run_name="x", now=later).add == (("B_DISK", 86400),)


def test_a_rule_survives_being_written_down() -> None:
    """What stands in rule_info is read again; cax's texts tell of no rule."""
    one = standing("B_DISK", "STUCK", expires=NOW, stuck=3, error="no space")
    assert RuleState.from_row(one.to_row()) == one
    assert str(one) == "B_DISK STUCK until 2017-03-01 12:00 (3 files to go): no space"
    assert RuleState.from_row("B_DISK:valid") is None
    assert RuleState.from_row({"rse": "B_DISK"}) is None


@pytest.mark.parametrize(
    ("size", "adler32", "md5", "why"),
    [
        (5, "0000000a", None, None),
        (5, "A", None, None),
        (5, "0000000b", None, "has ADLER32 0000000b, not 0000000a"),
        (4, "0000000a", None, "has 4 bytes, not 5"),
        (5, None, "FF", None),
        (5, "", "fe", "has MD5 fe, not ff"),
        (5, "0000000a", "FF", None),
        (5, "0000000a", "fe", "has MD5 fe, not ff"),
        (5, "0000000b", "ff", "has ADLER32 0000000b, not 0000000a"),
        (5, None, None, "has no checksum"),
        (None, "0000000a", None, "has None bytes, not 5"),
    ],
)
def test_when_a_replica_is_the_file(size: Any, adler32: Any, md5: Any, why: str | None) -> None:
    """By size and every checksum that is known, one at least: a row alone proves nothing."""
    assert Checked(b"a", "a", 5, "0000000a", "ff").differs(size, adler32, md5) == why


# -- what the reactions decide --------------------------------------------------------------------


def upload(run: Run, site: Site = LNGS, name: str = KEY.host) -> rucio.UploadPlan | str:
    seen = CopyKey("raw", site.name)
    plan = rucio.plan_upload(run, seen, site, SITES, name=name, trigger=TRIGGER)
    return plan.why if isinstance(plan, Skip) else plan


def test_an_upload_is_planned() -> None:
    """Where the copy is good here and the catalogue has none."""
    run = run_of(entry("lngs"))
    plan = upload(run)
    assert isinstance(plan, rucio.UploadPlan)
    assert (plan.key, plan.resume) == (KEY, None)
    assert rucio.metadata_of(run, plan, CATALOGUE)["run_number"] == 5207


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ([entry("lngs", "error")], "is error"),
        ([entry("lngs", location="n/a")], "no location"),
        ([entry("lngs", manifest=None)], "no digest yet"),
        ([entry("lngs"), entry(KEY.host)], "is transferred already"),
        ([entry("lngs"), entry(KEY.host, "transferring", trigger="x")], "is transferring already"),
        ([entry("lngs"), entry(KEY.host, "RSEquota", trigger="x")], "is RSEquota already"),
        ([], "there is no copy"),
    ],
)
def test_an_upload_says_why_not(entries: list[dict[str, Any]], why: str) -> None:
    """What is not good is not brought, and what another reaction brings is left to it."""
    found = upload(run_of(*entries))
    assert isinstance(found, str)
    assert why in found


@pytest.mark.parametrize("status", ["RSEreupload", "RSEquota"])
def test_an_upload_of_cax_that_waits_is_taken_up(status: str) -> None:
    """Into the dataset that its entry names."""
    waiting = entry(KEY.host, status, location="x1t_SR001_170301_1200_tpc:raw")
    plan = upload(run_of(entry("lngs"), waiting))
    assert isinstance(plan, rucio.UploadPlan)
    assert plan.resume is not None
    assert str(plan.names.dataset) == "x1t_SR001_170301_1200_tpc:raw"


def fetch(run: Run, site: Site = CHICAGO) -> rucio.DownloadPlan | str:
    plan = rucio.plan_fetch(run, KEY, site, SITES, trigger=TRIGGER, now=NOW)
    return plan.why if isinstance(plan, Skip) else plan


def test_a_download_is_planned_by_option_tag_or_request() -> None:
    """Any of the three is enough; without, nothing is fetched."""
    run = run_of(entry(KEY.host))
    plan = fetch(run)
    assert isinstance(plan, rucio.DownloadPlan)
    assert plan.location == "/c/170301_1200"
    bare = evolve(CHICAGO, download_options=())
    assert "does not name" in str(fetch(run, bare))
    assert isinstance(fetch(run, evolve(bare, rucio_tags=("good",))), rucio.DownloadPlan)
    asked = entry("chicago", "requested", source=KEY.host, location=None, from_rse="B_DISK")
    plan = fetch(run_of(entry(KEY.host), asked), bare)
    assert isinstance(plan, rucio.DownloadPlan)
    assert plan.rse == "B_DISK"


class Giving:
    """A storage that gives these bytes, or fails."""

    def __init__(self, content: bytes | None) -> None:
        self.content = content

    def fetch(self, _pfn: str, path: bytes) -> None:
        if self.content is None:
            raise OSError("is away")
        Path(os.fsdecode(path)).write_bytes(self.content)


@pytest.mark.parametrize(("second", "kind"), [(b"evil", Damaged), (None, Retry)])
def test_a_file_is_bad_if_every_replica_is(
    tmp_path: Path, second: bytes | None, kind: type[Exception]
) -> None:
    """One that cannot be had now may be good."""
    storages = {"X": Giving(b"bad!"), "Y": Giving(second)}
    pfns = {rse: {"rse": rse} for rse in storages}
    client = SimpleNamespace(
        list_replicas=lambda *_, **_options: [{"name": "a", "rses": storages, "pfns": pfns}]
    )
    session = SimpleNamespace(client=client, storage=storages.get)
    order = SimpleNamespace(dataset=Did("scope", "raw"), rse=None)
    one, here = Checked(b"a", "a", 4, "0400019b"), vouched(tmp_path)
    fetching = Fetching(
        cast("Any", session), here, here, cast("Any", order), [one], Meter(to_nobody, 4)
    )
    with pytest.raises(kind, match="a: X: has ADLER32"):
        fetching.fetch(Seen(b"a", "file", 4))


class Damaging(Yard):
    """A catalogue that gives bad files."""

    async def work(self, function: object, *_args: Any, job: Job) -> Any:
        raise Damaged("a: X: has ADLER32 1")


async def test_a_catalogue_that_gives_bad_files_is_compared() -> None:
    """While its copy counts as good, others are deleted."""
    ports: Any = Damaging(run_of(entry(KEY.host, manifest=None)))
    event = Event(ports.run.id, KEY, None, "transferred")
    with pytest.raises(Retry, match="ADLER32"):
        await rucio.rucio_pull(Job(ports.run, event, CHICAGO, SITES, "chicago#1", ports=ports))
    copy = ports.run.copy(KEY)
    assert copy is not None
    assert copy.pending


@pytest.mark.parametrize("status", ["transferring", "RSEreupload", "RSEquota"])
def test_an_upload_without_a_source_is_withdrawn(status: str) -> None:
    """So that another site can bring the data, whose own upload would skip the entry for ever."""
    for source in ("transferred", "error"):
        run = run_of(entry("lngs", source))
        job = Job(run, Event(run.id, KEY.at("lngs"), None, "transferred"), LNGS, SITES)
        mine = entry(KEY.host, status, trigger=trigger_of("rucio_upload", job))
        job.run = run_of(entry("lngs", source), mine)
        plan = rucio._upload_plan(job, KEY.host)
        assert isinstance(plan, rucio.UploadPlan if source == "transferred" else RunUpdate)


@pytest.mark.parametrize(("status", "left"), [("transferred", 0), ("error", 1)])
def test_a_download_that_no_catalogue_gives_is_withdrawn(status: str, left: int) -> None:
    """Its listener is alive, so that nobody else would ever take the entry out."""
    run = run_of(entry(KEY.host, status))
    job = Job(run, Event(run.id, KEY, None, "transferred"), CHICAGO, SITES)
    mine = entry("chicago", "transferring", trigger=trigger_of("rucio_pull", job))
    job.run = run_of(entry(KEY.host, status), mine)
    assert len(rucio._withdrawals(job)) == left


@pytest.mark.parametrize("name", ["..", "a/..", ".caxev-gone-run", "x" * 250])
def test_a_name_that_no_copy_may_have_is_refused_before_the_claim(name: str) -> None:
    """It comes from the database."""
    with pytest.raises(GiveUp, match=r"usable name|is refused"):
        fetch(run_of(entry(KEY.host, source_name=name)))
    plan = fetch(run_of(entry(KEY.host, source_name="../elsewhere")))
    assert isinstance(plan, rucio.DownloadPlan)
    assert plan.location == "/c/elsewhere"


def test_what_was_deleted_on_purpose_does_not_come_again() -> None:
    """Neither from the catalogue nor into it, unless a person asks for it."""
    stones = [
        {"type": "raw", "host": host, "pax_version": None, "by": "me", "why": "a test"}
        for host in ("chicago", KEY.host)
    ]

    def after(*entries: dict[str, Any]) -> Run:
        run = run_of(*entries)
        return Run.from_document({**run.document, "deleted_data": stones})

    assert "me deleted it" in str(fetch(after(entry(KEY.host))))
    assert "me deleted it" in str(upload(after(entry("lngs"))))
    asked = entry("chicago", "requested", source=KEY.host, location=None)
    assert isinstance(fetch(after(entry(KEY.host), asked)), rucio.DownloadPlan)
    wish = entry(KEY.host, "requested", source="lngs", location=None)
    assert isinstance(upload(after(entry("lngs"), wish)), rucio.UploadPlan)


@pytest.mark.parametrize(
    ("rses", "rules", "proves"),
    [
        (["A_DISK"], {"A_DISK": None}, True),
        (["A_DISK", "B_DISK"], {"A_DISK": NOW, "B_DISK": None}, True),
        (["A_DISK"], {"A_DISK": NOW}, False),
        (["A_DISK"], {"A_DISK": NOW, "B_DISK": None}, False),
        (["B_DISK"], {"B_DISK": None}, False),
        ([], {}, False),
    ],
)
def test_what_was_compared_proves_nothing_once_it_goes(
    rses: list[str], rules: dict[str, datetime | None], proves: bool
) -> None:
    """Where an RSE has it no more that had it, or only rules with an end keep it."""
    known = Copy.from_entry(entry(KEY.host, rse=["A_DISK"], verified_at=NOW))
    assert known is not None
    found = DatasetState(
        tuple(rses), tuple(standing(rse, expires=end) for rse, end in rules.items())
    )
    fields = rucio_datasets.standing(known, found)
    assert fields["rse"] == rses
    assert ("verified_at" not in fields) == proves


@pytest.mark.parametrize(
    ("one", "after"),
    [
        (standing("A_DISK"), None),
        (standing("A_DISK", ENDED, expires=NOW), None),
        (standing("A_DISK", "REPLICATING"), 60.0),
        (evolve(standing("A_DISK", "STUCK"), created=NOW - timedelta(hours=2)), 1800.0),
        (
            evolve(standing("A_DISK", "STUCK"), created=NOW - timedelta(days=9)),
            rucio_datasets.LONGEST_WAIT,
        ),
        (standing("A_DISK", expires=NOW + timedelta(hours=1)), 3600 + rucio_datasets.GOING),
        (standing("A_DISK", expires=NOW), rucio_datasets.LONGEST_WAIT),
    ],
)
def test_when_rules_are_looked_at_again(one: RuleState, after: float | None) -> None:
    """While they are not OK, at growing intervals; then not before they end, or never."""
    found = DatasetState((), (one, standing("B_DISK")))
    assert rucio_datasets.look_again(found, CATALOGUE, NOW) == after
    there = evolve(CATALOGUE, rucio=Catalogue(messages=("::1", 1)))
    told = after if after is None or one.ok else rucio_datasets.LONGEST_WAIT
    assert rucio_datasets.look_again(found, there, NOW) == told
    if after is not None:
        assert not rucio_datasets.is_settled(one, NOW + timedelta(seconds=after))


def test_who_looks_after_an_entry() -> None:
    """Who brought it there; of an entry that does not tell, the first site that brings data."""
    for source in ("lngs", "nobody", None):
        found = Copy.from_entry(entry(KEY.host, source=source))
        assert found is not None
        assert custodian(found, SITES) == "lngs"


# -- messages -------------------------------------------------------------------------------------


def test_what_messages_tell_of() -> None:
    """Datasets of rules, as hermes posts them, each once; whatever else comes is passed over."""
    rule = {"scope": "s", "name": "raw", "rule_id": "1"}
    told = [
        {"index": {}},
        {"event_type": "rule_ok", "payload": rule},
        {"event_type": "datasetlock_ok", "payload": {**rule, "rse": "A_DISK"}},
        {"event_type": "transfer-done", "payload": {"scope": "s", "name": "a.zip"}},
        {"event_type": "rule_ok", "payload": {**rule, "name": 5}},
        5,
    ]
    body = "\n".join(map(json.dumps, told)).encode()
    assert [*datasets_in(body + b"\n{\n\xff\n" + b"[" * 100_000)] == ["s:raw"]


def test_a_rule_tells_why_it_is_stuck() -> None:
    """In Rucio's own words."""
    stuck = evolve(standing("A_DISK", "STUCK"), stuck=3, error="the disk is full")
    assert str(stuck) == "A_DISK STUCK (3 files to go): the disk is full"


class Endless(BaseHTTPRequestHandler):
    """Lets anybody in, and answers with one line that never ends."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("X-Rucio-Auth-Token", "token")
        self.send_header("Content-Type", "application/x-json-stream")
        self.end_headers()
        with suppress(OSError):
            while not self.path.startswith("/auth"):
                self.wfile.write(b"[" * 65536)

    def log_message(self, format: str, *_args: object) -> None:  # noqa: A002
        del format


def test_an_answer_of_one_endless_line_fills_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rucio's client would join its pieces for ever; the next attempt may fare better."""
    monkeypatch.setenv("RUCIO_PASSWORD", "secret")
    monkeypatch.setenv("RUCIO_CONFIG", str(tmp_path / "rucio.cfg"))
    (tmp_path / "rucio.cfg").write_text("[client]\nauth_type = userpass\n")
    server = SmallServer(("127.0.0.1", 0), Endless)
    server.begin()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        settings = Catalogue(username="me", auth_type="userpass", timeout=5)
        there = evolve(CATALOGUE, hostname=address, rucio_account="root", rucio=settings)
        with pytest.raises(Retry, match="does not end: 1,04"):
            rucio_client.check(there)
    finally:
        server.close()


def test_each_catalogue_has_its_own_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that serves one after the other does not log in with the first one's account."""
    monkeypatch.delenv("RUCIO_CONFIG", raising=False)
    monkeypatch.setenv("RUCIO_PASSWORD", "secret")
    monkeypatch.setenv("RUCIO_HOME", str(tmp_path / "ours"))
    monkeypatch.setattr(connection, "_HOME", str(tmp_path / "ours"))
    found = []
    for name in ("ours", "first", "second", "ours"):
        (tmp_path / name / "etc").mkdir(parents=True, exist_ok=True)
        text = (
            f"[client]\naccount = {name}\nauth_type = userpass\nrequest_retries = 0\npassword = x\n"
        )
        (tmp_path / name / "etc" / "rucio.cfg").write_text(text)
        home = None if name == "ours" else str(tmp_path / name)
        settings = Catalogue(home=home, username="me", auth_type="userpass", timeout=1)
        with pytest.raises(Retry):
            rucio_client.check(evolve(CATALOGUE, hostname="http://127.0.0.1:1", rucio=settings))
        found.append(config_get("client", "account"))
    assert found == ["ours", "first", "second", "ours"]


class EndlessStorage(Endless):
    """A storage by WebDAV whose listings and files never end."""

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_PROPFIND(self) -> None:  # the base's own way
        self.do_GET()


def test_a_storage_fills_neither_memory_nor_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it answers by WebDAV is read up to a limit, and written up to the size of the file."""
    # Rucio's library reads a configuration, unless another test's is still in its memory.
    monkeypatch.setenv("RUCIO_CONFIG", str(tmp_path / "rucio.cfg"))
    (tmp_path / "rucio.cfg").write_text("[client]\n")
    monkeypatch.setattr(answers, "MOST", 1 << 20)
    monkeypatch.setattr(limited, "SMALL_FILES", 1 << 20)
    server = SmallServer(("127.0.0.1", 0), EndlessStorage)
    server.begin()
    operations = dict.fromkeys(("read", "write", "delete"), 1)
    scheme = {
        "scheme": "http",
        "hostname": "127.0.0.1",
        "port": server.server_port,
        "prefix": "/",
        "impl": "rucio.rse.protocols.webdav.Default",
        "domains": {"lan": operations, "wan": operations},
        "extended_attributes": None,
    }
    settings = {
        "id": "1",
        "rse": "X",
        "deterministic": True,
        "lfn2pfn_algorithm": "hash",
        "domain": ["lan", "wan"],
        "protocols": [scheme],
        "sign_url": None,
        "verify_checksum": True,
        "credentials": None,
    }
    pfn, file = f"http://127.0.0.1:{server.server_port}/file", tmp_path / "file"
    storage = Storage("X", settings, "a token")
    try:
        with pytest.raises(Retry, match="does not end: 1,"):
            storage.stat(pfn)
        with limited.no_file_over(2 << 20), pytest.raises(OSError, match="too large"):
            storage.fetch(pfn, os.fsencode(file))
        assert file.stat().st_size <= 2 << 20
    finally:
        server.close()


# -- removing -------------------------------------------------------------------------------------

GOING: dict[str, Any] = {
    "deletion": {"at": NOW, "by": "me", "keep": 0, "was": "transferred", "request": "x"},
    "proof": [{"host": "lngs"}],
    "erasing": NOW,
    "source": "lngs",
}


class Stopped(Yard):
    """A process that is stopped before it deletes rules, until the dataset was uploaded anew."""

    given_up: Any = None

    async def work(self, function: object, *args: Any, job: Job) -> Any:
        if function is rucio_client.standing_rules:
            return frozenset({"old"})
        assert function is rucio_client.give_up
        self.given_up = args[2]
        self.run = run_of(entry("lngs"), entry(KEY.host, source="lngs"))
        return 0


async def test_a_process_that_was_stopped_gives_up_no_new_dataset() -> None:
    """It has the rules of the old one, read before it was sure that the deletion stands."""
    run = run_of(entry("lngs"), entry(KEY.host, "deleting", **GOING))
    ports = Stopped(run)
    event = Event(run.id, CopyField(*KEY, "proof"), None, "x")
    job = Job(run, event, LNGS, SITES, "lngs#1", ports=cast("Any", ports))
    last = await rucio_datasets.rucio_rm(job)
    assert ports.given_up == {"old"}
    assert isinstance(last, RunUpdate)
    assert not all(fits(ports.run, one) for one in last.expect)
    # Nor when another deletion of it is under way.
    other = {**GOING, "deletion": {**GOING["deletion"], "request": "y"}}
    again = run_of(entry("lngs"), entry(KEY.host, "deleting", **other))
    assert not all(fits(again, one) for one in last.expect)


class Ruled(Yard):
    """A catalogue in which a container has a rule."""

    async def work(self, function: object, *args: Any, job: Job) -> Any:
        assert function is rucio_client.containers_with_rules
        return [Did("x_SR001", "period")]


async def test_a_dataset_that_a_container_s_rule_keeps_is_not_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The deletion is withdrawn: without the entry nobody would know of the replicas."""
    run = run_of(entry("lngs"), entry(KEY.host, "deleting", **{**GOING, "erasing": None}))
    event = Event(run.id, CopyField(*KEY, "proof"), None, "x")
    job = Job(run, event, LNGS, SITES, "lngs#1", ports=cast("Any", Ruled(run)))
    monkeypatch.setattr(rucio_datasets, "weigh", lambda *_args: Proven([]))
    last = await rucio_datasets.rucio_rm(job)
    assert isinstance(last, RunUpdate)
    assert last.change is not None
    assert last.change[1]["status"] == "transferred"
    assert "a rule of x_SR001:period keeps it" in str(last.change[1]["withdrawn"])


def test_containers_are_found_however_deep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose rules keep a dataset; one with several ways to it is asked once."""
    above = {"raw": ["run", "all"], "run": ["all"], "all": []}
    client = SimpleNamespace(
        list_parent_dids=lambda _s, name: [{"scope": "s", "name": one} for one in above[name]],
    )
    session = RucioSession(client, CATALOGUE)
    rule = RuleState("1", "X", "OK", NOW)
    monkeypatch.setattr(RucioSession, "rules", lambda _self, did: [rule] * (did.name == "all"))
    monkeypatch.setattr(rucio_client, "connected", lambda *_args: nullcontext(session))
    found = rucio_client.containers_with_rules(CATALOGUE, Did("s", "raw"))
    assert found == [Did("s", "all")]


def test_only_these_rules_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that stand; the others are counted."""
    rules = [RuleState(name, "X", "OK", NOW) for name in ("old", "new")]
    rules.append(RuleState("gone", "X", "OK", NOW, expires=NOW))
    deleted: list[str] = []
    client = SimpleNamespace(
        delete_replication_rule=lambda rule, **_options: deleted.append(rule),
    )
    session = SimpleNamespace(rules=lambda _dataset: rules, client=client)
    monkeypatch.setattr(rucio_client, "connected", lambda *_args: nullcontext(session))
    dataset = Did("scope", "raw")
    assert rucio_client.standing_rules(CATALOGUE, dataset) == {"old", "new"}
    # Nor one that was deleted just now, by a catalogue whose clock is ahead of ours.
    rules[-1] = evolve(rules[-1], expires=utcnow() + timedelta(seconds=3630))
    others = rucio_client.give_up(CATALOGUE, dataset, {"old", "gone"})
    assert (deleted, others) == (["old"], 1)


@pytest.mark.parametrize(
    ("good", "gone"), [(("A_DISK",), ["id of C_DISK"]), (("B_DISK",), []), ((), [])]
)
def test_a_rule_goes_only_if_a_lasting_replica_is_good(
    good: tuple[str, ...], gone: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is kept for an hour would leave the bad one alone."""
    rules = (
        standing("A_DISK"),
        standing("B_DISK", expires=utcnow() + timedelta(days=1)),
        standing("C_DISK"),
    )
    deleted: list[str] = []
    session = SimpleNamespace(
        rules=lambda _dataset: rules,
        look=lambda _dataset: DatasetState(RSES, rules),
        verify=lambda *_args, **_options: Verdict(good),
        client=SimpleNamespace(delete_replication_rule=lambda rule, **_: deleted.append(rule)),
    )
    monkeypatch.setattr(rucio_client, "connected", lambda *_args: nullcontext(session))
    wishes = Wishes(remove={"C_DISK": "rule 1"})
    order = Settlement(CATALOGUE, Did("scope", "raw"), "run", wishes, files=())
    with nullcontext() if gone else pytest.raises(Retry, match="stays at C_DISK: no rule without"):
        rucio_client.settle(order, report=to_nobody)
    assert deleted == gone


def test_a_dataset_without_files_makes_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not an empty directory: the catalogue takes out files of which it has lost all replicas."""
    session = SimpleNamespace(files=lambda _dataset: ())
    monkeypatch.setattr(rucio_client, "connected", lambda *_args: nullcontext(session))
    here = evolve(CHICAGO, dir_raw=str(tmp_path))
    order = Download(here, CATALOGUE, Did("scope", "raw"), str(tmp_path / "run"), NOW)
    with pytest.raises(GiveUp, match="scope:raw holds no file"):
        rucio_client.download(order, report=to_nobody)
    assert not [*tmp_path.iterdir()]


@given(st.binary(max_size=200))
def test_any_post_is_met_calmly(body: bytes) -> None:
    """Nothing is raised."""
    assert not [*datasets_in(body)]


@pytest.mark.replicaset
async def test_an_address_that_is_taken_is_tried_again(
    database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart beside the process that goes, say: messages are taken once the address is free."""
    monkeypatch.setattr(ledger, "FIRST_DELAY", 0.05)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        there = evolve(CATALOGUE, rucio=Catalogue(messages=("127.0.0.1", port)))
        sites = evolve(SITES, by_name={**SITES.by_name, there.name: there})
        async with engine.opened(database) as db, trio.open_nursery() as nursery:
            nursery.start_soon(Messages(db, Lease(LNGS.name, 1, "a test"), LNGS, sites).run)
            await trio.sleep(0.2)
            holder.close()

            def posted() -> bool:
                url = f"http://127.0.0.1:{port}"
                with suppress(OSError), urlopen(url, b"{}", timeout=5) as answer:
                    return bool(answer.status == 200)
                return False

            await engine.until(lambda: trio.to_thread.run_sync(posted))
            nursery.cancel_scope.cancel()


# -- sites.json -----------------------------------------------------------------------------------


def test_the_catalogue_in_sites_json(tmp_path: Path) -> None:
    """Paths are relative to the file; a wrong value is told with its key; secrets are refused."""
    file = tmp_path / "sites.json"
    good = {
        "rules": "rules.json",
        "messages": "[::1]:9201",
        "periods": {"SR0": None, "SR1": "2020-01-01"},
    }
    file.write_text(json.dumps([{"name": "c", "method": "rucio", "rucio": good}]))
    settings = load_sites(file).get("c").rucio
    assert settings.rules == str(tmp_path / "rules.json")
    assert settings.messages == ("::1", 9201)
    assert settings.periods[1].begins == datetime(2020, 1, 1, tzinfo=UTC)
    bad = {"auth_type": "magic", "password": "x", "timeot": 5, "periods": {"SR1": "2020-01-01"}}
    file.write_text(json.dumps([{"name": "c", "method": "rucio", "rucio": bad}]))
    with pytest.raises(ConfigError) as raised:
        load_sites(file)
    told = str(raised.value)
    assert "rucio: auth_type must be one of userpass" in told
    assert "set RUCIO_PASSWORD" in told
    assert "did you mean 'timeout'?" in told
    assert "rucio: periods must be science runs" in told


def test_without_the_client_library_a_site_that_needs_it_does_not_start(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caxev: Caxev,  # noqa: F811  # the fixture
) -> None:
    """It says what to install; a site that needs no catalogue does start."""
    monkeypatch.setitem(sys.modules, "rucio", None)
    file = tmp_path / "sites.json"
    here = {"name": "lngs", "dir_raw": str(tmp_path), "upload_options": ["c"]}
    file.write_text(json.dumps([here, {"name": "c", "method": "rucio"}, {"name": "chicago"}]))
    away = "mongodb://127.0.0.1:1/?serverSelectionTimeoutMS=1"
    more = ("--config", str(file), "--mongo-uri", away, "--once")
    lngs, chicago = (caxev("listen", "--site", site, *more) for site in ("lngs", "chicago"))
    assert lngs.code > 0
    assert "pip install 'caxev[rucio]'" in lngs.err
    assert chicago.code > 0
    assert "127.0.0.1:1" in chicago.err
    assert "Traceback" not in lngs.err + chicago.err


def test_the_sites_of_ruciax_load_unchanged(tmp_path: Path) -> None:
    """A site of method rucio without an RSE is a site; the catalogue is what others bring to."""
    file = tmp_path / "cax_ruciax.json"
    file.write_text(
        json.dumps(
            [
                {
                    "name": "rucio-catalogue",
                    "hostname": "",
                    "username": "",
                    "method": "rucio",
                    "dir_raw": "/data/xenon/raw",
                    "upload_options": None,
                    "download_options": None,
                    "rucio_upload_rse": "NIKHEF_USERDISK",
                    "rucio_account": "production",
                    "rucio_transfer": [],
                }
            ]
        )
    )
    assert load_sites(file).get("rucio-catalogue").rucio == Catalogue()


# -- comparing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replicas", "expected"),
    [
        ({"DISK1": "COPYING", "DISK2": "BAD"}, Verdict(unseen=("no RSE has all of it",))),
        ({"DISK1": "UNAVAILABLE"}, Verdict(unseen=("no RSE has all of it",))),
        ({"DISK1": "BAD"}, Verdict(bad=("a is at no RSE any more",), lost=True)),
        ({}, Verdict(bad=("a is at no RSE any more",), lost=True)),
    ],
)
def test_a_dataset_that_is_nowhere_is_a_difference(
    replicas: dict[str, str], expected: Verdict
) -> None:
    """The catalogue has its files, and no RSE has all of them; asked deeply or not."""
    wanted = Checked(b"a", "a", 1, "00000001")
    row = {"name": "a", "bytes": 1, "adler32": wanted.adler32, "md5": None}
    replica = {**row, "states": replicas, "rses": {}}
    client = SimpleNamespace(
        get_did=lambda *_did: {},
        list_replicas=lambda *_dids, **_options: [replica],
        list_files=lambda *_did: [row],
    )
    session = RucioSession(client, CATALOGUE)
    for deep in (False, True):
        verdict = session.verify(Did("scope", "raw"), [wanted], to_nobody, deep=deep)
        assert verdict == expected


def test_no_replica_is_missed_that_arrives_between_two_questions() -> None:
    """It is listed, or its rule is not OK yet, so that the catalogue is asked again."""
    asked: list[str] = []

    def answer(what: str, **fields: Any) -> list[dict[str, Any]]:
        asked.append(what)
        there = len(asked) > 1  # the transfer ends behind the first question
        state = ("OK" if there else "REPLICATING") if what == "rules" else "AVAILABLE"
        return [{**fields, "state": state}] if there or what == "rules" else []

    counts = dict.fromkeys(("locks_ok_cnt", "locks_replicating_cnt", "locks_stuck_cnt"), 0)
    rule = {"id": "1", "rse_expression": "DISK2", "created_at": NOW, "expires_at": None, **counts}
    client = SimpleNamespace(
        list_did_rules=lambda *_did: answer("rules", **rule),
        list_dataset_replicas=lambda *_did, **_options: answer("replicas", rse="DISK2", length=1),
    )
    found = RucioSession(client, CATALOGUE).look(Did("scope", "raw"))
    assert found.unfinished or found.rses == ("DISK2",)


class Comparing(Yard):
    """A catalogue that answers so, one answer after the other."""

    verdicts: list[Verdict]
    standing: dict[str, Alarm]

    async def alarm(self, alarm: Alarm) -> None:
        self.standing[alarm.key] = alarm

    async def all_clear(self, key: str) -> None:
        self.standing.pop(key, None)

    async def work(self, function: object, *_args: Any, job: Job) -> Any:
        del job
        if function is rucio_client.look:
            return DatasetState(("DISK1",), (RuleState("r", "DISK1", "OK", NOW),))
        assert function is rucio_client.verify
        return self.verdicts.pop(0)


LOST = Verdict(bad=("a is at no RSE any more",), lost=True)


@pytest.mark.parametrize(
    ("second", "becomes"), [(LOST, "error"), (Verdict(good=("DISK1",)), "transferred")]
)
async def test_only_what_is_at_no_rse_twice_is_lost(
    second: Verdict, becomes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica that is made anew is gone for a moment."""
    monkeypatch.setattr(rucio_datasets, "LOST_AFTER", 0.0)
    copy, ports = await compared(LOST, second)
    assert (copy.status, ports.verdicts) == (becomes, [])


def comparing(*verdicts: Verdict) -> tuple[Job, Comparing]:
    """Return a request to compare a dataset that gives these answers."""
    asked: dict[str, Any] = {"check_asked": [{"id": "x", "at": NOW}]}
    ports = Comparing(run_of(entry("lngs"), entry(KEY.host, source="lngs", **asked)))
    ports.verdicts, ports.standing = [*verdicts], {}
    ports.rows["catalogue:b3:1"] = [Checked(b"a", "a", 1, "00000001").to_row()]
    event = Event(ports.run.id, CopyField(*KEY, "check_asked"), None, "x")
    return Job(ports.run, event, LNGS, SITES, "lngs#1", ports=cast("Any", ports)), ports


async def compared(*verdicts: Verdict) -> tuple[Copy, Comparing]:
    """Compare it; return its entry, and the alarms that stand."""
    job, ports = comparing(*verdicts)
    update = await rucio_datasets.rucio_check(job)
    assert isinstance(update, RunUpdate)
    await job.update(update)
    copy = ports.run.copy(KEY)
    assert copy is not None
    return copy, ports


async def test_what_cannot_be_compared_proves_nothing() -> None:
    """Neither by an earlier comparison: other copies would be deleted on its account."""
    job, _ = comparing(Verdict(unseen=("no RSE has all of it",)))
    with pytest.raises(Retry, match="no RSE has all of it"):
        await rucio_datasets.rucio_check(job)
    (update,) = job.if_parked
    assert update.change is not None
    assert update.change[1]["verified_at"] is None


async def test_bad_replicas_beside_good_ones_have_an_alarm() -> None:
    """The entry stays good, and Rucio may copy the bad ones elsewhere."""
    copy, ports = await compared(Verdict(good=("DISK1",), bad=("a at DISK2 has 3 bytes",)))
    (alarm,) = ports.standing.values()
    assert copy.status == "transferred"
    assert "--repair" in str(alarm.details["todo"])


def test_a_rule_that_was_deleted_is_a_difference() -> None:
    """Its replicas stay until the catalogue needs their room, so that nothing else shows it."""
    rule = RuleState("r", "DISK1", "OK", NOW)
    fields: dict[str, Any] = {"rse": ["DISK1"], "rule_info": [rule.to_row(), "a text of cax"]}
    (known,) = run_of(entry(KEY.host, **fields)).copies
    assert differing(known, DatasetState(("DISK1",), (rule,))) == []
    for rules in ((), (evolve(rule, expires=NOW),), (evolve(rule, state=ENDED),)):
        (line,) = differing(known, DatasetState(("DISK1",), rules))
        assert "rule at DISK1" in line
    limited_ = evolve(rule, expires=NOW + timedelta(days=1))
    (known,) = run_of(entry(KEY.host, **{**fields, "rule_info": [limited_.to_row()]})).copies
    assert differing(known, DatasetState(("DISK1",), ())) == []
    (line,) = differing(known, DatasetState((), ()))
    assert line == "at no RSE in the catalogue, at DISK1 in the database"
