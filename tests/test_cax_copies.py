"""What cax did with copies, and caxev does: names, versions, and what their entries keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient

from caxev import Copy, CopyKey, Run, What
from caxev.batch.deriving import plan_derived
from caxev.cli.site_paths import run_called
from caxev.config import Processing, Site, Sites
from caxev.config.reading import read
from caxev.copies.lifecycle import CopyPlan
from caxev.handlers import alarms, checksum, judge, repair, transfer
from caxev.handlers.rucio import DownloadPlan, plan_fetch
from caxev.handlers.transfer import plan_pull, plan_push
from caxev.testing import Lab, lab
from tests.conftest import Database as Named
from tests.engine import run_document
from tests.test_cli import Caxev, caxev, online  # noqa: F401  # fixtures

NAME = "161111_1434"
PUSHING: dict[str, dict[str, Any]] = {
    "lngs": {"upload_options": ["depot"]},
    "depot": {"listener": False},
}
TWO: dict[str, dict[str, Any]] = {
    "lngs": {},
    "chicago": {"download_options": ["lngs"], "pax_processing_versions": ["v6.8.0"]},
}


# -- runs of one name -----------------------------------------------------------------------------


def ready(detector: str, **fields: Any) -> Run:
    """A run of this detector whose raw data can be processed."""
    document = run_document(1, ("raw", "lngs", "transferred"), name=NAME, detector=detector)
    document |= {"trigger": {"events_built": 5000}, "reader": {"ini": {"write_mode": 2}}, **fields}
    return Run.from_document(document)


@pytest.mark.parametrize(
    ("detector", "output"), [("tpc", f"{NAME}.root"), ("muon_veto", f"{NAME}_MV.root")]
)
def test_what_is_made_of_runs_of_one_name(detector: str, output: str) -> None:
    """The muon veto's result is called as cax called it, and not as the TPC's."""
    how = read(Processing, {"command": ["pax", "{output}"], "version": "v6.8.0", "inputs": []})
    site = Site("lngs", dir_processed="/processed", processing=how)
    plans = plan_derived(ready(detector), ["processed"], site)
    assert isinstance(plans, list)
    assert [plan.location for plan in plans if isinstance(plan, CopyPlan)] == [
        f"/processed/pax_v6.8.0/{output}"
    ]


@pytest.mark.parametrize(("detector", "name"), [("tpc", NAME), ("muon_veto", f"{NAME}_MV")])
def test_what_is_fetched_of_runs_of_one_name(detector: str, name: str) -> None:
    """What cax brought to the catalogue says no name: the directory is called as cax called it."""
    document = run_document(1, ("raw", "cern", "transferred"), name=NAME, detector=detector)
    document["data"][0]["location"] = "scope:raw"
    run = Run.from_document(document)
    site = Site("lngs", dir_raw="/raw", download_options=("cern",))
    sites = Sites(Path("sites.json"), {"lngs": site, "cern": Site("cern", method="rucio")})
    plan = plan_fetch(run, run.copies[0].key, site, sites, trigger="t", now=run.start)  # type: ignore[arg-type]
    assert isinstance(plan, DownloadPlan)
    assert plan.location == f"/raw/{name}"
    assert run_called(plan.location) == (NAME, detector if run.suffix else None)


# -- processed copies -----------------------------------------------------------------------------


@pytest.mark.replicaset
@lab(transfer, checksum, sites=TWO)
async def test_a_processed_copy_keeps_how_it_was_made(here: Lab) -> None:
    """Where, by what and how large it was made stands in the entry of each copy."""
    made: dict[str, Any] = {"creation_place": "midway", "pax_hash": "5b3d", "size": 606}
    run = await here.new_run()
    await here.put(run, CopyKey("processed", "lngs", "v6.8.0"), **made)
    await here.put(run, "lngs")
    assert await here.settle() == []
    run = await here.look(run)
    processed = run.copy(CopyKey("processed", "chicago", "v6.8.0"))
    raw = run.copy(CopyKey("raw", "chicago"))
    assert isinstance(processed, Copy)
    assert {name: processed.fields.get(name) for name in made} == made
    assert raw is not None
    assert raw.fields["creation_place"] == "chicago"
    assert "size" not in raw.fields


@pytest.mark.replicaset
@lab(transfer, checksum, repair, judge, alarms, sites=PUSHING)
async def test_what_cax_made_is_pushed_to_a_site_without_a_listener(here: Lab) -> None:
    """Over the link no SHA-512 is taken, so our copy gets a manifest first; nobody is suspected."""
    run = await here.new_run()
    run = await here.put(run, "lngs", manifest=None)
    assert await here.settle("lngs") == []
    assert What.DAMAGED not in [row.deed.what for row in await here.history()]
    pushed = (await here.look(run)).copy(CopyKey("raw", "depot"))
    ours = (await here.look(run)).copy(CopyKey("raw", "lngs"))
    assert pushed is not None
    assert ours is not None
    assert (pushed.status, pushed.manifest, pushed.checksum) == (
        "transferred",
        ours.manifest,
        run.copies[0].checksum,
    )
    assert ours.manifest is not None


@pytest.mark.replicaset
@lab(transfer, checksum, repair, judge, alarms, sites=PUSHING)
async def test_what_cax_made_and_has_gone_bad_is_no_reference(here: Lab) -> None:
    """Our own copy is bad then, and what was pushed of it is not good."""
    run = await here.new_run()
    run = await here.put(run, "lngs", manifest=None)
    (here.path(run, "lngs") / "pax_info.json").write_text("[]")
    await here.settle("lngs")
    states = {one.host: one.status for one in (await here.look(run)).copies}
    assert states["lngs"] == "error"
    assert states["depot"] != "transferred"


def versioned(version: str, host: str = "lngs") -> Run:
    document = run_document(1, ("processed", host, "transferred"))
    document["data"][0] |= {"pax_version": version, "checksum": "c" * 128}
    return Run.from_document(document)


def between(**fields: Any) -> Sites:
    """lngs, which pushes to chicago, which pulls from it and is of these fields."""
    common: dict[str, Any] = {"dir_processed": "/processed", "hostname": "localhost"}
    lngs = Site("lngs", upload_options=("chicago",), **common)
    chicago = Site("chicago", download_options=("lngs", "cern"), **common, **fields)
    cern = Site("cern", method="rucio")
    return Sites(Path("sites.json"), {one.name: one for one in (lngs, chicago, cern)})


@pytest.mark.parametrize(
    ("fields", "version", "comes"),
    [
        ({}, "v6.6.5", True),
        ({"pax_processing_versions": ("v6.8.0",)}, "v6.8.0", True),
        ({"pax_processing_versions": ("v6.8.0",)}, "v6.6.5", False),
        ({"pax_version_purge": "v6.6.5"}, "v6.6.5", False),
        ({"pax_version_purge": "v6.6.5"}, "v6.8.0", True),
    ],
)
def test_only_wanted_versions_come(fields: dict[str, Any], version: str, comes: bool) -> None:
    """Pulled, pushed and fetched are the versions that a site names, and none that is to go."""
    sites, run = between(**fields), versioned(version)
    now, seen = run.start, run.copies[0].key
    assert now is not None
    lngs, chicago = sites.get("lngs"), sites.get("chicago")
    pulled = plan_pull(run, seen, chicago, sites, trigger="t", now=now)
    pushed = plan_push(run, seen.at("chicago"), lngs, sites, trigger="t", now=now)
    catalogued = versioned(version, "cern")
    at_cern = catalogued.copies[0].key
    fetched = plan_fetch(catalogued, at_cern, chicago, sites, trigger="t", now=now)
    kinds = [isinstance(one, CopyPlan) for one in (pulled, pushed, fetched)]
    assert kinds == [comes] * 3, (pulled, pushed, fetched)


# -- entries that go alone ------------------------------------------------------------------------


def forgetting(database: Named, *copies: tuple[str, str, str]) -> None:
    """A run 1 with these copies, and a sites.json with a tape and a catalogue."""
    there = [{"name": "lngs"}, {"name": "tape", "method": "tsm"}, {"name": "c", "method": "rucio"}]
    Path("sites.json").write_text(json.dumps(there))
    with MongoClient[dict[str, Any]](database.uri) as client:
        client[database.name]["runs_new"].insert_one(run_document(1, *copies))


def stored(database: Named) -> dict[str, Any]:
    with MongoClient[dict[str, Any]](database.uri) as client:
        document = client[database.name]["runs_new"].find_one({"number": 1})
    assert document is not None
    return document


@pytest.mark.replicaset
@pytest.mark.parametrize("command", [("tape", "forget"), ("rucio", "forget")], ids=" ".join)
def test_nothing_is_asked_about_what_is_not_there(
    database: Named,
    online: Caxev,  # noqa: F811  # the fixture
    command: tuple[str, str],
) -> None:
    """Of a run that is not there, or has no such entry, the answer is known before the question."""
    forgetting(database, ("raw", "lngs", "transferred"))
    gone = online(*command, "--run", "7", "--why", "lost")
    assert (gone.code, "no run 7" in gone.err, "Forget" in gone.out + gone.err) == (5, True, False)
    none = online(*command, "--run", "1", "--why", "lost")
    assert (none.code, "Forget" in none.out + none.err) == (1, False)
    assert "no entry" in none.out or "no such entry" in none.out


@pytest.mark.replicaset
def test_an_entry_at_the_catalogue_is_forgotten(database: Named, online: Caxev) -> None:  # noqa: F811  # the fixture
    """The entry goes and leaves a tombstone; one with another status, and other copies, stay."""
    copies = (("raw", "lngs", "transferred"), ("raw", "c", "error"))
    forgetting(database, *copies)
    options = ("rucio", "forget", "--run", "1", "--why", "never uploaded", "--yes")
    assert online(*options, "--status", "transferred").code == 1
    assert online(*options, "--dry-run").code == 0
    assert len(stored(database)["data"]) == 2
    assert online(*options, "--status", "error").code == 0
    document = stored(database)
    assert [one["host"] for one in document["data"]] == ["lngs"]
    (tombstone,) = document["deleted_data"]
    assert (tombstone["host"], tombstone["why"]) == ("c", "never uploaded")
    assert tombstone["proof"] == "status error; nothing at c was deleted"


@pytest.mark.replicaset
def test_the_muon_veto_s_data_is_registered_as_its_own(
    database: Named,
    online: Caxev,  # noqa: F811  # the fixture
    tmp_path: Path,
) -> None:
    """Of two runs of one name, what is called _MV is the muon veto's, and no other's."""
    here = {"name": "lngs", "dir_raw": str(tmp_path / "raw")}
    Path("sites.json").write_text(json.dumps([here]))
    (tmp_path / "raw" / f"{NAME}_MV").mkdir(parents=True)
    (tmp_path / "raw" / f"{NAME}_MV" / "a").write_text("a")
    assert online("sites", "init", "--site", "lngs").code == 0
    tpc, veto = (run_document(n, name=NAME, detector=d) for n, d in ((1, "tpc"), (0, "muon_veto")))
    with MongoClient[dict[str, Any]](database.uri) as client:
        runs = client[database.name]["runs_new"]
        runs.insert_many([tpc, veto])
        path = str(tmp_path / "raw" / f"{NAME}_MV")
        refused = online("register", path, "--site", "lngs", "--run", "1")
        assert (refused.code, "is not the name of run 1" in refused.err) == (1, True)
        assert online("register", path, "--site", "lngs").code == 0
        assert [run["detector"] for run in runs.find({"data.location": path})] == ["muon_veto"]
