"""Files as sites with cax have them: several for one host, each for one of its programs."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from loguru import logger

from caxev.asking.copies import doer_of
from caxev.cli.errors import CONFIGURATION
from caxev.cli.tape.archive import archive_called, reach_called
from caxev.config import BY_METHOD, ConfigError, Sites, load_handlers, load_sites
from caxev.copies.retention import DeletionPlan, plan_purge
from caxev.copies.storage import custodian
from caxev.core.model import Run
from caxev.core.registry import Registry, recorded
from tests import engine
from tests.conftest import Database as Named
from tests.engine import run_document
from tests.test_cli import Caxev, caxev  # noqa: F401  # a fixture

TAPE: list[dict[str, Any]] = [
    {
        "name": "daq",
        "hostname": "daq.example.org",
        "username": "mover",
        "method": "tsm",
        "dir_raw": "/data/raw/",
        "dir_tsm": "/data/tsm/",
        "upload_options": ["tape"],
        "download_options": None,
        "data_type": ["raw"],
        "task_list": ["CopyPull", "CopyPush"],
    },
    {"name": "tape", "hostname": None, "method": "tsm", "upload_options": None},
]
"""What the tape program of one host was given: `method` says how that host reaches the tape."""
RUCIO: list[dict[str, Any]] = [
    {
        "name": "daq",
        "hostname": "daq.example.org",
        "username": "mover",
        "method": "rucio",
        "dir_raw": "/data/raw",
        "upload_options": ["catalogue"],
        "download_options": None,
        "data_type": ["raw"],
        "task_list": ["CopyPull", "CopyPush"],
    },
    {
        "name": "cluster",
        "hostname": "cluster.example.org",
        "username": "analyst",
        "method": "rucio",
        "dir_raw": "/big/raw",
        "download_options": ["catalogue"],
        "task_list": ["RucioRule"],
    },
    {"name": "catalogue", "hostname": "", "method": "rucio", "rucio_upload_rse": "A_DISK"},
]


def written(directory: Path, entries: object, name: str = "sites.json") -> Path:
    file = directory / name
    file.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return file


def loaded(directory: Path, entries: object) -> Sites:
    return load_sites(written(directory, entries))


def enabled(sites: Sites, name: str) -> set[str]:
    """The handlers that a site enables, of all that caxev brings along."""
    load_handlers(BY_METHOD)
    ours = [one for one in recorded if one.module.startswith("caxev.handlers.")]
    return {one.name for one in Registry(ours, sites.here(name)).enabled}


def test_the_method_of_a_site_that_copies_is_not_its_own(tmp_path: Path) -> None:
    """A site that names others listens, and is reached by SSH, whatever its archive is reached by.

    So a request of the archive's data finds its listener, and its own files can be read.
    """
    tape, rucio = loaded(tmp_path, TAPE), loaded(tmp_path, RUCIO)
    assert [(one.name, one.method, one.listener) for one in tape.values()] == [
        ("daq", "sftp", True),
        ("tape", "tsm", False),
    ]
    assert [(one.name, one.method, one.listener) for one in rucio.values()] == [
        ("daq", "sftp", True),
        ("cluster", "sftp", True),
        ("catalogue", "rucio", False),
    ]
    assert all(sites.get("daq").readable for sites in (tape, rucio))
    assert archive_called(tape, None).name == "tape"
    assert reach_called(tape, None, None).here.name == "daq"
    assert doer_of(tape.get("daq"), tape.get("tape")).name == "daq"
    assert tape.here("daq").passive == {"tape"}


def test_who_looks_after_what_is_in_a_catalogue(tmp_path: Path) -> None:
    """The site that brings data there does, though its entry is of method rucio, too."""
    run = Run.from_document(run_document(1, ("raw", "catalogue", "transferred")))
    assert custodian(run.copies[0], loaded(tmp_path, RUCIO)) == "daq"


@pytest.mark.parametrize(
    ("replicas", "expected"), [(["A_DISK", "B_DISK"], "B_DISK"), (["A_DISK"], None), (None, None)]
)
def test_from_which_rse(tmp_path: Path, replicas: object, expected: str | None) -> None:
    """`rucio_download_rse` is where data is fetched from if it is there; else Rucio chooses."""
    from caxev.handlers.rucio import DownloadPlan, plan_fetch

    at_b = {**RUCIO[1], "rucio_download_rse": "B_DISK"}
    sites = loaded(tmp_path, [RUCIO[0], at_b, RUCIO[2]])
    run = Run.from_document(run_document(1, ("raw", "catalogue", "transferred")))
    run.document["data"][0].update(location="s:raw", rse=replicas)
    now = datetime(2017, 1, 1, tzinfo=UTC)
    plan = plan_fetch(run, run.copies[0].key, sites.get("cluster"), sites, trigger="t", now=now)
    assert isinstance(plan, DownloadPlan)
    assert plan.rse == expected


def test_a_site_may_say_that_nobody_listens(tmp_path: Path) -> None:
    """What stands in the file counts before what follows from it."""
    assert not loaded(tmp_path, [{**TAPE[0], "listener": False}]).get("daq").listener


def test_a_grid_site_that_copies(tmp_path: Path) -> None:
    """It is reached by gfal-copy, and listens."""
    grid = {"name": "login", "method": "gfal-copy", "hostname": "gsiftp://se.example.org:2811"}
    passive = loaded(tmp_path, [grid]).get("login")
    active = loaded(tmp_path, [{**grid, "upload_options": ["tape"]}, TAPE[1]]).get("login")
    assert (passive.method, passive.listener) == ("gfal-copy", False)
    assert (active.method, active.listener) == ("gfal-copy", True)


def test_what_tasks_of_cax_enable(tmp_path: Path) -> None:
    """CopyPush and CopyPull were for tape and the catalogue as well; CopyPush made first rules."""
    assert {"push", "pull", "backup", "recall"} <= enabled(loaded(tmp_path, TAPE), "daq")
    both = enabled(loaded(tmp_path, RUCIO), "daq")
    assert {"rucio_upload", "rucio_pull", "rucio_rules", "rucio_check"} <= both
    assert both.isdisjoint({"checksum", "purge", "process", "tape_checksum"})
    rules = enabled(loaded(tmp_path, RUCIO), "cluster")
    assert "rucio_rules" in rules
    assert rules.isdisjoint({"rucio_upload", "rucio_pull", "push", "pull", "backup", "recall"})


def test_a_correction_is_enabled_by_its_name(tmp_path: Path) -> None:
    """Whatever it is called, a `task_list` that names it enables what computes it."""
    correction = {"name": "AddElectronLifetime", "field": "processor.x", "table": "purity"}
    site = {"name": "a", "corrections": [correction], "task_list": ["AddElectronLifetime"]}
    sites = loaded(tmp_path, [site])
    assert "correct" in enabled(sites, "a")
    assert [one.name for one in sites.get("a").correcting()] == ["AddElectronLifetime"]


def test_unknown_tasks(tmp_path: Path, caxev: Caxev) -> None:  # noqa: F811  # the fixture
    """A name in `task_list` that nothing has is reported, with the nearest that something has."""
    site = {"name": "a", "task_list": ["CopyPsh", "pull", "AddGains", "Zzzzzz"]}
    written(tmp_path, [site])
    answer = caxev("sites", "check")
    assert answer.code == 0
    _, push, unknown = answer.err.splitlines()  # the first: AddGains is no correction here
    assert "site 'a': task_list names 'CopyPsh'" in push
    assert "did you mean 'CopyPush'?" in push
    assert "task_list names 'Zzzzzz', which is no reaction (caxev handlers lists them)" in unknown
    listen = caxev("listen", "--site", "a", "--mongo-uri", "mongodb://127.0.0.1:9/?timeoutMS=100")
    assert "task_list names 'CopyPsh'" in listen.err


def test_nothing_listens_at_an_archive(tmp_path: Path, caxev: Caxev) -> None:  # noqa: F811  # the fixture
    """A listener for what has none would act in vain: that is an error which says what to do."""
    written(tmp_path, TAPE)
    answer = caxev("listen", "--site", "tape", "--mongo-uri", "mongodb://127.0.0.1:9")
    assert answer.code == CONFIGURATION
    assert "site 'tape' has no listener, according to" in answer.err
    assert '"listener": true' in answer.err


def test_keys_that_stand_twice(tmp_path: Path) -> None:
    """With one value they are a warning, as in a file of cax's; true is not 1, nor 1.0 the same."""
    twice = '[{"name": "a", "purge": 5, "download_options": null, "download_options": null}]'
    (warning,) = loaded(tmp_path, twice).warnings
    assert "site 'a': 'download_options' stands there more than once" in warning
    assert "always with the same value" in warning
    with pytest.raises(ConfigError, match="'purge' stands there more than once with different"):
        loaded(tmp_path, '[{"name": "a", "purge": 1, "purge": 1.5}]')
    with pytest.raises(ConfigError, match="'x' stands there more than once with different"):
        loaded(tmp_path, '[{"name": "a", "links": {"b": {}}, "x": true, "x": 1}]')


def test_keys_that_stand_twice_in_a_rule_file(tmp_path: Path) -> None:
    """A rule of which two halves contradict each other is refused, not half-read."""
    from caxev.rucio.rules import load_rules

    rule = '[{"run_nb": "1", "destination_rse": ["A_DISK"], "run_nb": "%s"}]'
    assert len(load_rules(written(tmp_path, rule % 1, "rules.json"))) == 1
    with pytest.raises(ConfigError, match="rule 1: 'run_nb' stands there more than once"):
        load_rules(written(tmp_path, rule % 2, "rules.json"))


@pytest.mark.parametrize(
    ("key", "now"),
    [
        ("pax_versions", "pax_processing_versions"),
        ("receive", "method"),
        ("directory", "dir_raw"),
        ("data_types", "data_type"),
    ],
)
def test_keys_of_old_versions(tmp_path: Path, key: str, now: str) -> None:
    """The message names what took a key's place, not one that merely looks like it."""
    with pytest.raises(ConfigError, match=f"unknown key '{key}' .did you mean '{now}'"):
        loaded(tmp_path, [{"name": "a", key: None}])


@pytest.mark.parametrize(
    ("deletion", "hosts", "goes"),
    [
        ({}, ("b", "catalogue"), True),
        ({}, ("b",), False),
        ({"deletion": {"copies": 3}}, ("b", "catalogue"), False),
        ({"deletion": {"copies": 3}}, ("b", "c", "catalogue"), True),
        ({"deletion": {"protect": ["keep"]}}, ("b", "catalogue"), True),
    ],
)
def test_purge_counts_as_cax_did(
    tmp_path: Path, deletion: dict[str, Any], hosts: tuple[str, ...], goes: bool
) -> None:
    """Three good copies in all, this one and Rucio's among them, unless `deletion` says more."""
    names = ({"name": name, "dir_raw": "/data"} for name in ("b", "c"))
    sites = loaded(
        tmp_path, [{"name": "a", "dir_raw": "/data", "purge": 5, **deletion}, *names, RUCIO[2]]
    )
    run = Run.from_document(run_document(1, *(("raw", x, "transferred") for x in ("a", *hosts))))
    for entry in run.document["data"]:
        entry["checksum"] = "c" * 128
    now = datetime(2017, 1, 1, tzinfo=UTC)
    decision = plan_purge(run, run.copies[0], sites.get("a"), sites, now)
    assert isinstance(decision, DeletionPlan) is goes, decision


# --- several files of one host ---

COPY: list[dict[str, Any]] = [
    {
        "name": "daq",
        "hostname": "daq.example.org",
        "username": "mover",
        "method": "rsync",
        "dir_raw": "/data/raw",
        "upload_options": ["cluster"],
        "data_type": ["raw", "processed"],
        "purge": 30,
        "identity": "keys/daq",
        "task_list": ["CopyPush", "BufferPurger"],
    },
    {"name": "cluster", "hostname": "cluster.example.org", "dir_raw": "/big/raw"},
]


def several(directory: Path, *files: object) -> list[str]:
    """Write files, each in a directory of its own; their paths."""
    paths = []
    for number, entries in enumerate(files):
        (directory / str(number)).mkdir()
        paths.append(str(written(directory / str(number), entries)))
    return paths


def test_merge(tmp_path: Path, caxev: Caxev) -> None:  # noqa: F811  # the fixture
    """A site may do by the merged file what it may do by any; its archives get what they got."""
    paths = several(tmp_path, COPY, TAPE, [RUCIO[0], RUCIO[2]])
    answer = caxev("sites", "merge", *paths)
    assert (answer.code, answer.err) == (0, "")
    (tmp_path / "merged").mkdir()
    sites = loaded(tmp_path / "merged", answer.out)
    assert list(sites) == ["daq", "cluster", "tape", "catalogue"]
    daq = sites.get("daq")
    assert (daq.method, daq.listener, daq.purge) == ("rsync", True, 30)
    assert (daq.dir_raw, daq.dir_tsm) == ("/data/raw", "/data/tsm")
    assert daq.upload_options == ("cluster", "tape", "catalogue")
    assert daq.data_type == ("raw", "processed")
    assert daq.task_list == ("CopyPush", "BufferPurger", "CopyPull")
    assert daq.identity == str(tmp_path / "0" / "keys" / "daq")
    assert sites.get("cluster").data_type == ("raw", "processed", "minitrees")
    assert [sites.get(name).data_type for name in ("tape", "catalogue")] == [("raw",)] * 2
    assert {"push", "purge", "backup", "rucio_upload"} <= enabled(sites, "daq")


def test_merge_without_a_task_list(tmp_path: Path, caxev: Caxev) -> None:  # noqa: F811  # the fixture
    """By a file without a list of tasks the site does everything, and so it does by the merged."""
    paths = several(tmp_path, TAPE, [{**COPY[0], "task_list": None}, COPY[1]])
    (daq, *_) = json.loads(caxev("sites", "merge", *paths).out)
    assert "task_list" not in daq


def test_merge_of_files_that_disagree(tmp_path: Path, caxev: Caxev) -> None:  # noqa: F811  # the fixture
    """Each conflict is named with its files and values, and nothing is made unless --first is."""
    daq = {**COPY[0], "identity": None}
    other = [{**daq, "purge": 5, "dir_raw": "/data/raw/"}, {**COPY[1], "dir_raw": "/new/raw"}]
    one, two, three = several(tmp_path, [daq, COPY[1]], other, [daq, COPY[1]])
    answer = caxev("sites", "merge", one, two, three)
    assert (answer.code, answer.out) == (CONFIGURATION, "")
    purge, raw, *_ = answer.err.splitlines()
    assert purge == f"caxev: site 'daq': purge is 30 in {one} and {three}, but 5 in {two}"
    assert f'dir_raw is "/big/raw" in {one} and {three}, but "/new/raw" in {two}' in raw
    first = caxev("sites", "merge", "--first", two, one)
    assert first.code == 0
    assert [one["dir_raw"] for one in json.loads(first.out)] == ["/data/raw/", "/new/raw"]
    assert first.err.count("; the first file is used") == 2


def test_a_merged_file_says_what_its_one_part_says(tmp_path: Path, caxev: Caxev) -> None:  # noqa: F811  # the fixture
    """Merging a file with itself changes nothing that it means."""
    (path,) = several(tmp_path, [*COPY, RUCIO[2], TAPE[1]])
    (tmp_path / "merged").mkdir()
    merged = loaded(tmp_path / "merged", caxev("sites", "merge", path, path).out)
    assert merged.by_name == load_sites(path).by_name


@pytest.mark.replicaset
@pytest.mark.parametrize("same", [True, False])
async def test_standing_by_with_another_configuration(
    database: Named, tmp_path: Path, same: bool
) -> None:
    """A second listener with another sites.json names the keys; a layout is no difference."""
    first = loaded(tmp_path, [{"name": "lngs", "purge": 5}, {"name": "b"}])
    other = json.dumps([{"purge": 5 if same else 6, "name": "lngs"}, {"name": "b"}], indent=3)
    second = load_sites(written(tmp_path, other, "other.json"))
    assert (first.digest == second.digest) is same
    options, differs = engine.options_for(database, []), "sites.json is not the same as"
    logged: list[str] = []
    sink = logger.add(logged.append, level="INFO", format="{message}")
    try:
        async with engine.opened(database) as db:
            one = evolve(options, sites=first, site=first.get("lngs"))
            async with engine.listener(db, one, "one"):
                await engine.until(lambda: any("listening for lngs" in line for line in logged))
                two = evolve(options, sites=second, site=second.get("lngs"))
                async with engine.listener(db, two, "two"):
                    await engine.until(lambda: any("standing by" in line for line in logged))
                    await engine.until(lambda: same or any(differs in line for line in logged))
                record = await db.site_record("lngs")
        assert record is not None
        assert record.configuration in (first.digest, second.digest)
    finally:
        logger.remove(sink)
    told = [line.strip() for line in logged if differs in line and "alarm" not in line]
    assert set(told) == (set() if same else {f"lngs: {differs} at lngs: lngs.purge"})
