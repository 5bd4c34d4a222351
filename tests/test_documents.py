"""The documents: their examples work, their commands are there, their tables leave nothing out."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest
import trio
from prometheus_client import generate_latest

from caxev import author
from caxev.cli import COMMANDS
from caxev.cli.errors import EPILOG
from caxev.cli.status import _SITES
from caxev.config import BY_METHOD, load_handlers, load_sites
from caxev.core.expressions import evaluate
from caxev.core.registry import recorded
from caxev.core.selection import CONDITIONS, COPY_PARTS, Selection
from caxev.core.update import RunUpdate
from caxev.database import indexes
from caxev.metrics import COPIES_REGISTRY
from tests import engine
from tests.bench.__main__ import options_of
from tests.conftest import Database as Named
from tests.documents import (
    ALL,
    NAMES,
    ROOT,
    TEXTS,
    anchors,
    blocks,
    command_of,
    file,
    marked,
    mentioned,
    section,
    tables,
    typed,
    words_of,
)
from tests.faults.__main__ import _parser
from tests.mongod import Cluster

README = "README.md"
GROUPS = {"requests", "sites", "db", "tag", "tape", "rucio"}
"""Commands that only hold others."""
COLLECTIONS = {"caxev_ledger", "caxev_requests", "caxev_manifests", "caxev_history"}
PLACES = ("caxev/", "deploy/", "handlers/", "tests/")

each_document = pytest.mark.parametrize("name", TEXTS)


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """The example's two files, written as the text says."""
    for name in ("count_copies.py", "test_count_copies.py"):
        (tmp_path / name).write_text(file("README.md", name))
    return tmp_path


def environment(**more: str) -> dict[str, str]:
    ours = ("CAXEV_", "MONGO_", "PYTEST_")
    return {**{k: v for k, v in os.environ.items() if not k.startswith(ours)}, **more}


def test_the_example_is_short() -> None:
    """A handler file has ten lines of text."""
    assert len([line for line in file("README.md", "count_copies.py").splitlines() if line]) <= 10


@pytest.mark.replicaset
def test_the_example_s_own_test_passes(example: Path, mongod: Cluster) -> None:
    """The test that the text shows runs by the command that the text gives, and passes."""
    said = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=example,
        env=environment(CAXEV_LAB_MONGO_URI=mongod.uri, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (said.returncode, "1 passed" in said.stdout) == (0, True), said.stdout + said.stderr


@asynccontextmanager
async def listening(example: Path, database: Named) -> Any:
    """``caxev listen --handlers`` as its own process, which leaves in good order at the end."""
    (example / "sites.json").write_text(json.dumps([{"name": "lngs"}]))
    (command,) = (line for line in typed() if re.match("caxev listen .*count_copies", line))
    with (example / "log").open("wb") as log:
        async with trio.open_nursery() as nursery:
            process = await nursery.start(
                partial(
                    trio.run_process,
                    [sys.executable, "-m", *shlex.split(command)],
                    cwd=example,
                    env=environment(CAXEV_MONGO_URI=database.uri, CAXEV_DATABASE=database.name),
                    stderr=log,
                )
            )
            yield
            process.send_signal(signal.SIGTERM)


@pytest.mark.replicaset
async def test_the_example_reacts_to_a_tag(example: Path, database: Named) -> None:
    """A real listener with the example's file reacts to a tag being added, and only to that."""
    document = engine.run_document(1, ("raw", "lngs", "transferred"), ("raw", "chicago", "error"))
    async with engine.opened(database) as db, listening(example, database):

        async def position() -> object:
            record = await db.site_record("lngs")
            return record is not None and record.position

        async def counted() -> object:
            return (await db.runs([run]))[run].document.get("good_copies")

        await engine.until(position)
        run = await db.insert_run(document)
        before = (await db.runs([run]))[run]
        assert "good_copies" not in before.document
        await engine.write(db, RunUpdate.add_tag(before, "count_me"))
        assert await engine.until(counted) == 1


@each_document
def test_commands_are_there(name: str) -> None:
    """Commands and options that a document names exist."""
    for line in [*typed(TEXTS[name]), *mentioned(TEXTS[name])]:
        command, rest = command_of(words_of(line))
        known = {name for one in command.params for name in one.opts} | {"--help"}
        assert {word for word in rest if word.startswith("--")} <= known, line


def test_no_command_is_left_out() -> None:
    """Each command stands in one of the documents."""
    named = {command_of(words_of(line))[0].name for line in [*typed(), *mentioned()]}
    assert named >= COMMANDS.keys() - GROUPS


@each_document
def test_commands_to_be_typed_are_accepted(name: str) -> None:
    """The command line takes what the shell blocks show."""
    for line in typed(TEXTS[name]):
        command, rest = command_of(words_of(line))
        command.make_context("caxev", rest)


@pytest.mark.parametrize("words", sorted(set(re.findall(r"tests\.bench ([a-z][^`\n]*)", ALL))))
def test_a_benchmark_of_the_documents_is_there(words: str) -> None:
    """The command line of the benchmarks takes what the documents name."""
    name, *options = shlex.split(words)
    options_of(name, import_module(f"tests.bench.{name}")).parse_args(options)


@pytest.mark.parametrize("words", sorted(set(re.findall(r"tests\.faults ([a-z][^`\n]*)", ALL))))
def test_a_campaign_of_the_documents_is_there(words: str) -> None:
    """The command line of the campaigns takes what the documents name."""
    _parser().parse_args(shlex.split(words))


@each_document
def test_files_are_there(name: str) -> None:
    """Files of the project that a document names exist, and so does what `sh` is to run."""
    named = [word.partition(" ")[0].rstrip("/") for word in marked(TEXTS[name])]
    files = [word for word in named if word.startswith(PLACES) and "NAME" not in word]
    scripts = re.findall(r"^ *sh (deploy/\w+)", "\n".join(blocks("sh", TEXTS[name])), re.MULTILINE)
    assert [one for one in (*files, *scripts) if not list(ROOT.glob(one))] == []


def test_the_tables_of_commands_have_all() -> None:
    """Each command, and each command of a group, is in one of the tables by purpose."""
    listed = [
        command_of(words_of(line))[0] for line in mentioned(section("deploy/README.md", "Commands"))
    ]
    known = [command_of([name])[0] for name in COMMANDS.keys() - {"tag", "requests"}]
    groups = [command_of([name])[0] for name in COMMANDS]
    known += [
        one for group in groups if isinstance(group, click.Group) for one in group.commands.values()
    ]
    assert [one.name for one in known if one not in listed and one.name not in GROUPS] == []


def test_every_way_to_select_runs_is_there() -> None:
    """The table of conditions has them all, each with a value that is read."""
    (conditions,) = tables(section("deploy/README.md", "Select runs"))
    given: dict[str, list[str]] = {}
    for row in conditions:
        for name, value in (shlex.split(one) for one in re.findall("`(--[^`]+)`", row[0])):
            given[name.removeprefix("--")] = [value.replace("TIME", "7d")]
    assert given.keys() == {*CONDITIONS, *COPY_PARTS}
    assert Selection.read(given).texts() == {**given, "run": ["1-100", "205"]}


def test_exit_codes_are_those_of_the_help() -> None:
    """The table of exit codes says what ``--help`` says."""
    (codes,) = tables(section("deploy/README.md", "Exit codes"))
    assert [tuple(row) for row in codes] == re.findall(r"^  (\d+) +(.+)$", EPILOG, re.MULTILINE)


@pytest.mark.parametrize("text", blocks("json"))
def test_the_sites_in_the_text_load(tmp_path: Path, text: str) -> None:
    """The examples of a sites.json are such, and nothing is wrong with them."""
    (tmp_path / "sites.json").write_text(text)
    assert load_sites(tmp_path / "sites.json").warnings == ()


def test_the_function_in_the_text_has_a_value() -> None:
    """The example of a correction's function is one."""
    (text,) = blocks("text", section("caxev/config/README.md", "corrections"))
    assert evaluate(text, {"t": 1478000001.0}) == pytest.approx(1.45e-4)


@each_document
def test_variables_are_known(name: str) -> None:
    """Environment variables that a document names are read somewhere."""
    ours = [*(ROOT / "caxev").rglob("*.py"), *(ROOT / "handlers").glob("*.py")]
    there = [*ours, *(ROOT / "deploy").iterdir()]
    texts = (one for one in there if one.is_file() and one.suffix not in (".md", ".png"))
    source = "".join(one.read_text() for one in texts)
    named = set(re.findall(r"\b(?:CAXEV|MONGO)_[A-Z_]+\b", TEXTS[name])) - {"MONGO_PASSWORD_FILE"}
    assert [name for name in named if name not in source] == []


@each_document
def test_metrics_and_collections_are_known(name: str) -> None:
    """Metrics, collections and indexes that a document names are those of the code."""
    named = {word for word in marked(TEXTS[name]) if re.fullmatch(r"caxev_[a-z_]*[a-z]", word)}
    of_runs = {index.name for index in indexes.RUNS}
    assert named - {"caxev_lngs"} <= COLLECTIONS | of_runs | names_of_metrics()


def test_every_index_of_the_runs_is_there() -> None:
    """The table of indexes has each of them with its keys."""
    (rows,) = tables(section("deploy/README.md", "Indexes"))
    listed = [(marked(row[0]), marked(row[1])) for row in rows]
    assert listed == [([one.name], [key for key, _ in one.keys]) for one in indexes.RUNS]


def test_every_metric_is_there() -> None:
    """The table of metrics has each of them once, and no other."""
    (rows,) = tables(section("deploy/README.md", "Metrics"))
    assert sorted(name for row in rows for name in marked(row[0])) == sorted(names_of_metrics())


def names_of_metrics() -> set[str]:
    text = generate_latest() + generate_latest(COPIES_REGISTRY)
    names = re.findall(r"^# HELP (caxev_\w+)", text.decode(), re.MULTILINE)
    return {name for name in names if not name.endswith("_created")}  # of those counted already


def test_public_names_are_there() -> None:
    """What a handler's author needs is named where handlers are explained."""
    text = TEXTS["handlers/README.md"]
    ours = set(author.__all__) - {"ELSEWHERE", "ERROR", "VERIFYING", "TRANSFERRING", "Manifest"}
    ours -= {"Copy", "CopyKey", "Result"}
    assert [name for name in ours if not re.search(rf"\b{name}\b", text)] == []


@each_document
def test_links_lead_somewhere(name: str) -> None:
    """Links within a document, to others, and to files have a target."""
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        path, _, anchor = target.partition("#")
        there = (ROOT / name).parent / path if path else ROOT / name
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there.resolve().read_text()), target


@each_document
def test_the_words_are_the_project_s(name: str) -> None:
    """Programs report, copies are repaired, and the ledger keeps reactions."""
    former = r"\b(?:tells?|told|mend(?:s|ed)?|debts?|looked at|tenures?)\b"
    assert re.findall(former, TEXTS[name], re.IGNORECASE) == []


def test_the_readme_is_read_in_five_minutes() -> None:
    """It is short, and leads to each of the other documents."""
    text = TEXTS["README.md"]
    assert len(text.encode()) <= 15_000
    assert [name for name in NAMES[1:] if f"({name})" not in text] == []


def test_every_shipped_handler_is_there() -> None:
    """The table has each handler that comes with caxev once, with its lane."""
    load_handlers(BY_METHOD)
    shipped = {one.name: one.lane for one in recorded if one.module.startswith("caxev.handlers.")}
    (rows,) = tables(section("handlers/README.md", "The shipped handlers"))
    assert sorted((marked(row[0])[0], row[1]) for row in rows) == sorted(shipped.items())


def test_the_walk_of_a_change_is_that_of_the_code() -> None:
    """Each step names a file, and what is defined there."""
    (rows,) = tables(section("tests/README.md", "The walk of a change"))
    for row in rows:
        (path,) = marked(row[1])
        source = (ROOT / path).read_text()
        for name in marked(row[2]):
            assert re.search(rf"\b(?:def|class) {name}\b", source), (path, name)


def test_troubleshooting_names_what_status_shows() -> None:
    """The headings in capitals are columns of ``caxev status``."""
    text = section("deploy/README.md", "Troubleshooting")
    named = set(re.findall(r"\b[A-Z]{6,}(?: [A-Z]{3,})?\b", text)) - {"SIGTERM", "README"}
    assert named
    assert named <= {column.heading for column in _SITES}


def test_every_marker_is_there(pytestconfig: pytest.Config) -> None:
    """The table of markers has those of the tests, and no other."""
    (rows,) = tables(section("tests/README.md", "Tests"))
    known = [line.partition(":")[0] for line in pytestconfig.getini("markers")]
    named = {name for row in rows for name in marked(row[0])}
    assert named <= set(known)
    assert named >= {name for name in known if f"{name}:" in (ROOT / "pyproject.toml").read_text()}
