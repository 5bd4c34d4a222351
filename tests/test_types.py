"""Types of data of one's own: ``types`` of sites.json, and what becomes of such data."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import attrs
import pytest

from caxev import DELETING, ERROR, TRANSFERRED, CopyKey, RunUpdate, Skip
from caxev.batch.deriving import plan_derived
from caxev.config import ConfigError, Processing, Site, Sites, load_sites
from caxev.config.data_types import CAX
from caxev.config.merging import merge
from caxev.config.own_types import site_class
from caxev.copies.deletion import Intent, prove
from caxev.copies.retention import DeletionPlan, DeletionWish, plan, plan_processed, plan_purge
from caxev.core.clock import Clocks
from caxev.core.errors import ConfigError as AnyConfigError
from caxev.core.model import Copy, Run
from caxev.core.update import CopiesAtLeast
from caxev.engine.options import Options, adopted
from caxev.handlers import checksum, deletion, permissions, processing, transfer
from caxev.testing import Lab, lab
from caxev.testing.lab import SERVER
from tests.mongod import Cluster
from tests.test_cli import Caxev, assert_one_line, caxev  # noqa: F401  # a fixture

VETO = {"name": "veto"}
PEAKS = {"name": "peaks", "source": "raw"}
EVENTS = {"name": "events", "source": "peaks"}
TYPES: list[dict[str, Any]] = [VETO, PEAKS, EVENTS]

Written = Callable[..., Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Write a sites.json with these types and sites, in this order."""

    def write(types: Any, *sites: dict[str, Any], name: str = "sites.json") -> Path:
        file = tmp_path / name
        file.write_text(json.dumps({"types": types, "sites": list(sites) or [{"name": "lngs"}]}))
        return file

    return write


def wrong(file: Path) -> str:
    with pytest.raises(ConfigError) as error:
        load_sites(file)
    return str(error.value)


# -- sites.json -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("types", "words"),
    [
        ("veto", "types must be a list of types of data"),
        (["veto"], "no. 1: must be an object"),
        ([{"source": "raw"}], "name is missing"),
        ([{"name": "../veto"}], "name must be a name of letters, digits and _, not"),
        ([{"name": "ve/to"}], "name must be a name of letters"),
        ([{"name": "veto_"}], "name must be a name of letters"),
        ([{"name": "class"}], "name must be a name of letters"),
        ([{"name": "veto", "sorce": "raw"}], "'veto': unknown key 'sorce' (did you mean 'source'?"),
        ([VETO, VETO], "'veto': is a type of data already"),
        ([{"name": "raw"}], "'raw': is a type of data already"),
        ([{"name": "untriggered"}], "'untriggered': is a type of data already"),
        ([{"name": "lanes", "source": "raw"}], "'lanes': 'lanes' is another key of sites"),
        ([{"name": "roots"}], "'roots': 'roots' is another key of sites"),
        ([{"name": "tsm"}], "'tsm': 'dir_tsm' is another key of sites"),
        ([{"name": "mode"}], "'mode': 'mode' is another key of sites"),
        (
            [{"name": "peaks", "source": "rwa"}],
            "must be a type of data, not 'rwa' (did you mean 'raw'",
        ),
        ([{"name": "peaks", "source": "peaks"}], "'peaks': is made from itself: peaks from peaks"),
        (
            [
                {"name": "a", "source": "b"},
                {"name": "b", "source": "c"},
                {"name": "c", "source": "a"},
            ],
            "'a': is made from itself: a from b from c from a",
        ),
        (
            [{"name": "peaks", "source": "processed", "versioned": False}],
            "'peaks': must be versioned, as processed is",
        ),
    ],
)
def test_what_is_wrong_with_types(written: Written, types: Any, words: str) -> None:
    """Each mistake is named with its type, and one of a key with the nearest known one."""
    assert words in wrong(written(types))


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ({"dir_veot": "/veto"}, "unknown key 'dir_veot' (did you mean 'dir_veto'?"),
        ({"veto": {"command": ["x"]}}, "unknown key 'veto'"),
        ({"dir_veto": "veto"}, "dir_veto must be an absolute path"),
        ({"dir_veto": "/a/../b"}, "dir_veto must be a path without '..'"),
        ({"dir_raw": "/data", "dir_veto": "/data/"}, "dir_veto is dir_raw as well, /data"),
        ({"peaks": {"command": ["x"], "version": "1"}}, "peaks needs dir_peaks"),
        ({"peaks": {"command": ["x"]}, "dir_peaks": "/peaks"}, "peaks needs version"),
        ({"events": {"command": ["{inptu}"]}}, "events: command must be"),
        ({"permissions": {"vteo": {"mode": "0750"}}}, "unknown key 'vteo' (did you mean 'veto'?"),
        ({"permissions": {"veto": {"mode": "0777"}}}, "permissions: veto: mode must be"),
        ({"purge_versions": {"peeks": "v1"}}, "'peeks' must be a type that has versions (did you"),
        (
            {"purge_versions": {"veto": "v1"}},
            "purge_versions: 'veto' must be a type that has versions",
        ),
    ],
)
def test_what_is_wrong_with_the_keys_of_a_type(
    written: Written, site: dict[str, Any], words: str
) -> None:
    """The keys that a type adds to sites are checked as any other."""
    assert words in wrong(written(TYPES, {"name": "lngs", **site}))


def test_the_file_as_an_object(tmp_path: Path) -> None:
    """Its keys are `types` and `sites`; any other object is no sites.json, as before."""
    file = tmp_path / "sites.json"
    for text, words in (
        ('{"types": []}', "sites is missing: it must be a list of sites"),
        ('{"sites": {}}', "sites must be a list of sites"),
        ('{"sites": [], "typse": []}', "unknown key 'typse' (did you mean 'types'?"),
        ('{"types": [], "types": [{"name": "a"}], "sites": []}', "'types' stands there more than"),
        ('{"types": [{"name": "a", "name": "b"}], "sites": []}', "'name' stands there more than"),
        ('{"sites": []}', "holds an empty list"),
        ('{"name": "lngs"}', "holds an object, not a list of sites"),
    ):
        file.write_text(text)
        assert words in wrong(file)


def test_a_file_without_types_is_what_it_was(tmp_path: Path) -> None:
    """Its sites have the class, the keys and the digest that they had; an empty table is none."""
    entries = [{"name": "lngs", "dir_raw": "/raw"}]
    sites = []
    for name, content in (
        ("list", entries),
        ("object", {"sites": entries}),
        ("empty", {"types": [], "sites": entries}),
    ):
        (tmp_path / name).write_text(json.dumps(content))
        sites.append(load_sites(tmp_path / name))
    assert all(type(one.get("lngs")) is Site and one.types == CAX for one in sites)
    assert sites[0].digest == sites[1].digest != sites[2].digest
    assert sites[0].get("lngs").data_type == ("raw", "processed", "minitrees")
    assert [*sites[0].get("lngs").types.directories] == [
        *("dir_raw", "dir_processed", "dir_minitrees", "dir_tsm")
    ]


def test_a_type_adds_its_keys(written: Written) -> None:
    """Directory, making and permissions follow from the table; two files with one are alike."""
    entry = {
        "name": "lngs",
        "dir_veto": "/veto/",
        "dir_peaks": "/peaks",
        "peaks": {"command": ["x"], "version": "v1", "inputs": ["gains"]},
        "permissions": {"group": "xenon", "veto": {"mode": "0750"}},
    }
    sites = load_sites(written(TYPES, entry))
    lngs = sites.get("lngs")
    assert lngs.directories == {"veto": "/veto", "peaks": "/peaks"}
    assert lngs.roots == ("/veto", "/peaks")
    assert lngs.directory("veto") == "/veto"
    assert lngs.directory("peaks", "v1") == "/peaks/pax_v1"
    assert lngs.directory("peaks", "../x") is None
    assert lngs.key_of("/peaks") == "dir_peaks"
    assert [*lngs.made] == ["peaks"]
    assert lngs.data_type == ("raw", "processed", "minitrees", "veto", "peaks", "events")
    assert {name: (one.mode, one.group) for name, one in lngs.permissions.items()} == {
        **dict.fromkeys(sites.types.by_name, (None, "xenon")),
        "veto": (0o750, "xenon"),
    }
    assert sites.here("lngs").processing_inputs == {"gains"}
    again = load_sites(written(TYPES, entry, name="again.json"))
    assert again.get("lngs") == lngs
    assert type(lngs) is site_class(sites.types)
    fewer = load_sites(written([*TYPES, {"name": "more"}], entry))
    assert {key for key in sites.keys if sites.keys[key] != fewer.keys[key]} == {"types"}


def test_a_site_with_types_goes_to_a_worker(written: Written) -> None:
    """Its class has no name that pickle could find; the site arrives all the same."""
    lngs = load_sites(written(TYPES, {"name": "lngs", "dir_veto": "/veto"})).get("lngs")
    there = pickle.loads(pickle.dumps(lngs))
    assert there == lngs
    assert type(there) is type(lngs)
    assert attrs.evolve(there, dir_raw="/raw").directories == {"raw": "/raw", "veto": "/veto"}


def test_a_type_that_nobody_knows_is_a_warning(written: Written) -> None:
    """`data_type` and `master` may name what cax's files had: it is reported, and kept."""
    entry = {"name": "lngs", "data_type": ["raw", "vteo", "untriggered"], "master": ["rwa"]}
    sites = load_sites(written(TYPES, entry))
    told = "\n".join(sites.warnings)
    assert "data_type names 'vteo', which is no type of data (did you mean 'veto'?" in told
    assert "master names 'rwa', which is no type of data (did you mean 'raw'?" in told
    assert len(sites.warnings) == 2
    assert "vteo" in sites.get("lngs").data_type


def test_other_types_wait_for_a_restart(written: Written) -> None:
    """A listener that reads its file again refuses another table, and goes on by the old one."""
    sites = load_sites(written(TYPES))
    options = Options.__new__(Options)  # nothing of it but its sites is read
    object.__setattr__(options, "sites", sites)
    with pytest.raises(AnyConfigError, match="types has changed: restart the listener"):
        adopted(options, load_sites(written([VETO])))


def test_files_with_types_are_merged(written: Written, tmp_path: Path) -> None:
    """A cax.json goes into them; two tables that differ are a conflict."""
    plain = tmp_path / "cax.json"
    plain.write_text(json.dumps([{"name": "lngs", "dir_raw": "/raw"}]))
    mine = written(TYPES, {"name": "lngs", "dir_veto": "/veto"})
    merged, conflicts = merge([plain, mine])
    assert conflicts == []
    assert isinstance(merged, dict)
    mine.write_text(json.dumps(merged))
    assert load_sites(mine).get("lngs").directories == {"raw": "/raw", "veto": "/veto"}
    other = written([VETO], {"name": "lngs"}, name="other.json")
    (conflict,) = merge([mine, other])[1]
    assert str(conflict).startswith("types is [{")
    assert merge([plain])[0] == [{"name": "lngs", "dir_raw": "/raw"}]


# -- commands -------------------------------------------------------------------------------------


def test_an_option_knows_the_types(caxev: Caxev, written: Written) -> None:  # noqa: F811
    """`--type` and `--has` name the nearest type of the file."""
    written(TYPES, {"name": "lngs", "dir_veto": "/veto"})
    typed = caxev("copy", "--run", "1", "--to", "lngs", "--type", "vteo")
    assert_one_line(typed, 2, "there is no type 'vteo' (did you mean 'veto'?")
    pattern = caxev("runs", "--has", "peeks@lngs")
    assert_one_line(pattern, 2, "there is no type 'peeks' (did you mean 'peaks'?")


# -- which copies may go --------------------------------------------------------------------------

NOW = datetime(2017, 3, 1, tzinfo=UTC)
START = NOW - timedelta(days=40)


def collaboration(**fields: Any) -> Sites:
    """lngs, which deletes by its rules, and two others that have what it has."""
    types = load_types()
    made = site_class(types)
    dirs: dict[str, Any] = {f"dir_{name}": f"/{name}" for name in types.by_name}
    sites = [made(name=name, hostname=name, **dirs) for name in ("chicago", "stockholm")]
    here = made(name="lngs", hostname="lngs", **dirs, **fields)
    return Sites(Path("sites.json"), {one.name: one for one in (here, *sites)})


def load_types() -> Any:
    from caxev.config.own_types import types_of

    return types_of([*TYPES, {"name": "dear", "source": "raw", "protected": True}])


def run_with(kind: str, *hosts: str, version: str | None = None) -> Run:
    entries = [
        {
            "type": kind,
            "host": host,
            "status": "transferred",
            "checksum": "c",
            "location": f"/{kind}/{'' if version is None else f'pax_{version}/'}run",
            **({} if version is None else {"pax_version": version}),
        }
        for host in hosts
    ]
    return Run.from_document({"_id": 1, "name": "run", "start": START, "data": entries})


def copy_at(run: Run, host: str = "lngs") -> Copy:
    return next(one for one in run.copies if one.host == host)


def test_a_second_type_of_the_daq_is_as_raw_data() -> None:
    """It has an age, enough others must be there, and its last copy stays whatever is asked."""
    sites = collaboration(purge=30)
    here, run = sites.get("lngs"), run_with("veto", "lngs", "chicago", "stockholm")
    assert isinstance(plan_purge(run, copy_at(run), here, sites, NOW), DeletionPlan)
    few = run_with("veto", "lngs", "chicago")
    assert isinstance(plan_purge(few, copy_at(few), here, sites, NOW), Skip)
    last = run_with("veto", "lngs")
    assert isinstance(plan(last, DeletionWish(copy_at(last), "", "", 0), here, sites, NOW), Skip)
    young = plan_purge(run, copy_at(run), here, sites, START)
    assert not isinstance(young, DeletionPlan)


@pytest.mark.parametrize(("kind", "least"), [("veto", 1), ("dear", 1), ("raw", 1), ("peaks", 0)])
def test_an_edited_intent_does_not_lose_what_is_protected(kind: str, least: int) -> None:
    """Whatever number stands in the entry, one good copy of protected data must remain."""
    sites = collaboration()
    row = {"keep": 0, "at": NOW, "was": TRANSFERRED}
    going = Copy(CopyKey(kind, "lngs"), DELETING, {"deletion": row})
    wanted = Intent.of(going, sites.types)
    assert wanted is not None
    assert wanted.keep == least
    run = run_with(kind, "lngs")
    expected = prove(run, going, sites, proof=[], clocks=Clocks.at(NOW)).expect
    assert any(isinstance(one, CopiesAtLeast) for one in expected) == bool(least)


def test_a_version_that_is_to_go() -> None:
    """`purge_versions` is for own types what `pax_version_purge` is for processed data."""
    sites = collaboration(purge_versions={"peaks": "v1", "dear": "v1"}, pax_version_purge="v2")
    here = sites.get("lngs")
    old, new = run_with("peaks", "lngs", version="v1"), run_with("peaks", "lngs", version="v2")
    assert isinstance(plan_processed(old, copy_at(old), here, sites, NOW), DeletionPlan)
    stays = plan_processed(new, copy_at(new), here, sites, NOW)
    assert isinstance(stays, Skip)
    assert stays.why == "purge_versions is v1, not v2"
    # What is protected needs as many good copies elsewhere as any deletion: two.
    dear = run_with("dear", "lngs", "chicago", version="v1")
    assert isinstance(plan_processed(dear, copy_at(dear), here, sites, NOW), Skip)
    safe = run_with("dear", "lngs", "chicago", "stockholm", version="v1")
    assert isinstance(plan_processed(safe, copy_at(safe), here, sites, NOW), DeletionPlan)
    young = plan_purge(old, copy_at(old), here, sites, NOW)
    assert isinstance(young, Skip)  # it can be made again, and has no age


# -- what is made of what -------------------------------------------------------------------------


def plan_own(run: Run, site: Site, about: str | None = None) -> Any:
    return plan_derived(run, processing.own_types(site, about), site)


def test_own_types_are_made_of_their_source() -> None:
    """From raw data the version that is named; from data with versions each version of it."""
    how = Processing(command=("x",), version="v1", inputs=("gains",))
    events = Processing(command=("x",))
    here = collaboration(peaks=how, events=events).get("lngs")
    bare, run = run_with("raw", "lngs"), run_with("raw", "lngs")
    run = Run.from_document({**run.document, "gains": 1})
    assert isinstance(plan_own(bare, here), Skip)
    (claim,) = claims(plan_own(run, here))
    assert (claim.key, claim.location) == (CopyKey("peaks", "lngs", "v1"), "/peaks/pax_v1/run.root")
    made = run_with("peaks", "lngs", version="v7").document["data"]
    run = Run.from_document({**run.document, "gains": None, "data": [*run.document["data"], *made]})
    (claim,) = claims(plan_own(run, here))
    assert claim.key == CopyKey("events", "lngs", "v7")
    gone = attrs.evolve(here, purge_versions={"peaks": "v7"})
    assert isinstance(plan_own(run, gone), Skip)
    assert isinstance(plan_own(run, here, about="veto"), Skip)
    assert [one.key.type for one in claims(plan_own(run, here, about="peaks"))] == ["events"]
    tagged = Run.from_document({**run.document, "tags": [{"name": "donotprocess"}]})
    assert isinstance(plan_own(tagged, here), Skip)


def claims(plans: list[Any] | Skip) -> list[Any]:
    assert not isinstance(plans, Skip), plans.why
    return plans


# -- the life of such data ------------------------------------------------------------------------


@pytest.fixture
def server(mongod: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session's server is used."""
    monkeypatch.setenv(SERVER, mongod.uri)


CAT = ["sh", "-c", 'cat "$0"/* > "$1"', "{input}", "{output}"]
LNGS = {
    "upload_options": ["chicago"],
    "master": ["raw", "veto"],
    "peaks": {"command": CAT, "version": "v1", "output": "{name}.peaks", "inputs": ["gains"]},
    "events": {"command": ["cp", "{input}", "{output}"], "output": "{name}.events"},
    "permissions": {"veto": {"mode": "0700"}},
    "data_type": ["raw", "veto", "events"],
}
CHICAGO = {"data_type": ["veto", "events"]}


@pytest.mark.replicaset
@pytest.mark.usefixtures("server")
@lab(
    *(checksum, deletion, permissions, processing, transfer),
    sites={"lngs": LNGS, "chicago": CHICAGO},
    types=TYPES,
)
async def test_types_that_only_sites_json_knows(here: Lab) -> None:
    """Made, made of what was made, copied and verified; a second type of the DAQ is purged."""
    run = await here.new_run(files={"a": b"12", "b": b"345"}, gains=1)
    assert await here.settle() == []
    run = await here.look(run)
    for kind, version in (("peaks", "v1"), ("events", "v1")):
        mine = run.copy(CopyKey(kind, "lngs", version))
        assert mine is not None
        assert (mine.status, mine.size) == (TRANSFERRED, 5)
    assert here.path(run, CopyKey("events", "lngs", "v1")).parent.name == "pax_v1"
    there = run.copy(CopyKey("events", "chicago", "v1"))
    assert there is not None
    assert there.status == TRANSFERRED
    assert run.copy(CopyKey("peaks", "chicago", "v1")) is None  # data_type

    deleted = run.copy(CopyKey("events", "lngs", "v1"))
    assert deleted is not None
    await here.update(RunUpdate.remove_copy(run, deleted))
    run = await here.put(run, CopyKey("veto", "lngs"), files={"v": b"veto"})
    assert await here.settle() == []
    run = await here.look(run)
    assert run.copy(deleted.key) is None  # data that it is not made of is no reason to make it
    brought = run.copy(CopyKey("veto", "chicago"))
    assert brought is not None
    assert (brought.status, brought.size) == (TRANSFERRED, 4)
    mine = run.copy(CopyKey("veto", "lngs"))
    assert mine is not None
    assert here.path(run, CopyKey("veto", "lngs")).stat().st_mode & 0o777 == 0o700


OLD = {
    "purge": 0,
    "deletion": {"copies": 1, "protect": ["keep"]},
    "purge_versions": {"peaks": "v1"},
}


@pytest.mark.replicaset
@pytest.mark.usefixtures("server")
@lab(*(checksum, deletion), sites={"lngs": OLD, "chicago": {}}, types=TYPES)
async def test_a_tag_that_goes_lets_all_types_go(here: Lab) -> None:
    """Both types of the DAQ, and the version of a derived one: each with its own proof."""
    run = await here.new_run(files={"a": b"12"}, tags=["keep"])
    for kind, version in (("raw", None), ("veto", None), ("peaks", "v1")):
        for site in ("lngs", "chicago"):
            if (kind, site) != ("raw", "lngs"):
                run = await here.put(run, CopyKey(kind, site, version), files={"a": b"12"})
    assert await here.settle() == []
    assert len((await here.look(run)).copies) == 6
    await here.set(run, tags=[])
    assert await here.settle() == []
    run = await here.look(run)
    assert {(one.type, one.host) for one in run.copies} == {
        (kind, "chicago") for kind in ("raw", "veto", "peaks")
    }
    assert all(one.status != ERROR for one in run.copies)
