"""README.md: its example works, its commands are there, and its tables leave nothing out."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import click
import pytest
import trio

import caxev
from caxev.cli import COMMANDS, cli
from caxev.cli.errors import EPILOG
from caxev.config import BY_METHOD, ArchiveOptions, load_handlers, load_sites
from caxev.config.sites import KEYS, METHODS
from caxev.core.expressions import evaluate
from caxev.core.model import RunUpdate
from caxev.engine.dispatcher import LANES, OTHER_LANE
from caxev.testing.mongod import ReplicaSet
from tests import engine
from tests.conftest import Database as Named

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def words(text: str) -> list[str]:
    return text.split()


CAX_COMMANDS = words("""
    cax caxer massive-cax cax-process cax-mv cax-rm cax-stray cax-status massive-tsm
    cax-tsm-remove cax-tsm-watch ruciax ruciax-rm massive-ruciax ruciax-check ruciax-purge
    ruciax-download ruciax-locator
""")
CAX_FLAGS = words("""
    --once --run --name --host --config --log --log-file --disable_database_update --ncpu
    --version --start --stop --tag --mem_per_cpu --walltime --partition --reservation
    --from-run --to-run --last-days --rucio-rule --rucio-scope --rucio-rse --rucio-upload
""")
CAX_PROGRAMS = {
    "massive-cax": "--start --stop --tag --mem_per_cpu --walltime --partition --reservation",
    "massive-tsm": "--from-run --to-run --last-days --logfile",
    "massive-ruciax": "--from-run --to-run --last-days --on-disk-only",
    "cax-mv": "--input --output",
    "cax-rm": "--location",
    "cax-stray": "--delete",
    "cax-status": "--host --status",
    "cax-tsm-remove": "--location",
    "cax-tsm-watch": "--monitor --status --log-path",
    "ruciax-rm": "--location --status",
    "ruciax-check": "--mode --location",
    "ruciax-purge": "--purge",
    "ruciax-download": "--type --rse --dir --restore --overwrite --list --location",
    "ruciax-locator": "--method --rse --copies --status",
}
"""The flags of programs of cax beside those that several have."""
CAX_TASKS = words("""
    CopyPush CopyPull AddChecksum CompareChecksums RetryStalledTransfer
    RetryBadChecksumTransfer SetPermission AddSize ProcessBatchQueue ProcessBatchQueueHax
    PurgeProcessed BufferPurger AddGains AddDriftVelocity SetNeuralNetwork AddTSMChecksum
    RucioRule
""")


LINES = re.MULTILINE | re.DOTALL
"""How the text is searched: ^ and $ fit at each line, and . fits all."""


GROUPS = {"sites", "db", "tape", "rucio"}
"""Commands that only hold others."""
TAPE = [["tape", name] for name in ("put", "get", "ls", "check", "status", "forget")]


def section(title: str) -> str:
    """A section's text, without its heading."""
    match = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^##? |\Z)", README, LINES)
    assert match, title
    return match[1]


def blocks(language: str, text: str = README) -> list[str]:
    """The code blocks in a language, without their indentation."""
    found = re.findall(rf"^ *```{language}\n(.*?)^ *```$", text, LINES)
    return ["\n".join(line.strip() for line in block.splitlines()) for block in found]


def file(name: str) -> str:
    """The contents of a file that the text tells to write: the next block of Python."""
    match = re.search(
        rf"[Ww]rite (?:it|this) to\s+`{name}`.*?^```python\n(.*?)^```$",
        README,
        LINES,
    )
    assert match, name
    return match[1]


def tables(text: str) -> Iterator[list[list[str]]]:
    """The tables, as rows of cells, without their headings."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [re.split(r"(?<!\\)\|", line.strip())[1:-1] for line in table.splitlines()]
        yield [[cell.strip() for cell in row] for row in rows[2:]]


def marked(text: str) -> list[str]:
    """What stands in backquotes."""
    return re.findall(r"`([^`\n]+)`", text)


def typed() -> list[str]:
    """The commands in blocks of shell: to be typed as they are."""
    lines = [line.partition("  #")[0] for block in blocks("sh") for line in block.splitlines()]
    return [line.strip() for line in lines if line.startswith("caxev ")]


def mentioned() -> list[str]:
    """The commands in backquotes, which may have placeholders."""
    prose = re.sub(r"^ *```.*?^ *```$", "", README, flags=LINES)
    return [text for text in marked(prose) if text.startswith("caxev ")]


def command_of(line: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the words begin with, and the words that are left."""
    command: click.Command = cli
    context = click.Context(cli)
    while line and isinstance(command, click.Group):
        found = command.get_command(context, line[0])
        assert found is not None, line
        command, line = found, line[1:]
    return command, line


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """The example's two files, written as the text says."""
    for name in ("count_copies.py", "test_count_copies.py"):
        (tmp_path / name).write_text(file(name))
    return tmp_path


def environment(**more: str) -> dict[str, str]:
    ours = ("CAXEV_", "MONGO_", "PYTEST_")
    return {**{k: v for k, v in os.environ.items() if not k.startswith(ours)}, **more}


def test_the_example_is_short() -> None:
    """A handler file has ten lines of text."""
    assert len([line for line in file("count_copies.py").splitlines() if line]) <= 10


@pytest.mark.replicaset
def test_the_example_s_own_test_passes(example: Path, mongod: ReplicaSet) -> None:
    """The test that the text shows runs by the command that the text gives, and passes."""
    said = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=example,
        env=environment(CAXEV_LAB_MONGO_URI=mongod.uri),
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


def test_every_command_is_there() -> None:
    """Commands and options that the text names exist."""
    named = set()
    for line in [*typed(), *mentioned()]:
        command, rest = command_of(shlex.split(line)[1:])
        known = {name for one in command.params for name in one.opts} | {"--help"}
        options = {word for word in rest if word.startswith("--")}
        assert options <= known, line
        named.add(command.name)
    assert named >= COMMANDS.keys() - GROUPS


def test_every_command_to_be_typed_is_accepted() -> None:
    """The command line takes what the text's shell blocks say."""
    assert typed()
    for line in typed():
        command, rest = command_of(shlex.split(line)[1:])
        command.make_context("caxev", rest)


def test_every_option_of_a_command_is_told() -> None:
    """The table of commands leaves out no option but those that tune."""
    (commands, _codes) = tables(section("Commands"))
    told: dict[str, set[str]] = {}
    for row in commands:
        command, _rest = command_of(shlex.split(marked(row[0])[0])[1:])
        told.setdefault(str(command.name), set()).update(re.findall(r"--[a-z-]+", " ".join(row)))
    general = {"--json", "--lease", "--grace", "--metrics-port", "--limit", "--help"}
    for line in [[name] for name in COMMANDS.keys() - GROUPS - {"demo"}] + TAPE:
        command, _ = command_of(line)
        name = str(command.name)
        options = [one for one in command.params if isinstance(one, click.Option)]
        there = {one.opts[0] for one in options if not one.hidden}
        selecting = told["put"] if line[0] == "tape" else set()
        assert there - general <= told[name] | selecting, name


def test_exit_codes_are_those_of_the_help() -> None:
    """The table of exit codes says what ``--help`` says."""
    (_commands, codes) = tables(section("Commands"))
    assert [tuple(row) for row in codes] == re.findall(r"^  (\d+) +(.+)$", EPILOG, re.MULTILINE)


def test_every_key_of_sites_json_is_told() -> None:
    """The table of keys has every key that a site can have, each once, and no other."""
    (table,) = tables(section("sites.json"))
    keys = [key for row in table for key in marked(row[0])]
    assert sorted(keys) == sorted(KEYS)
    (methods,) = (marked(row[1]) for row in table if row[0] == "`method`")
    assert set(methods) == set(METHODS)


def test_the_lanes_are_those_of_the_engine() -> None:
    """The sizes of lanes in the text are the engine's."""
    (table,) = tables(section("sites.json"))
    (default,) = (row[2] for row in table if row[0] == "`lanes`")
    assert default == ", ".join(f"{k} {v}" for k, v in LANES.items()) + f", any other {OTHER_LANE}"


def test_the_sites_in_the_text_load(tmp_path: Path) -> None:
    """The examples of a sites.json are such, and nothing is wrong with them."""
    names = []
    for text in blocks("json"):
        (tmp_path / "sites.json").write_text(text)
        sites = load_sites(tmp_path / "sites.json")
        assert sites.warnings == ()
        names.append(list(sites))
    assert names == [["lngs", "chicago"], ["lngs"], ["lngs", "tsm-server"]]


def test_the_function_in_the_text_has_a_value() -> None:
    """The example of a correction's function is one."""
    (text,) = blocks("text", section("sites.json"))
    assert evaluate(text, {"t": 1478000001.0}) == pytest.approx(1.45e-4)


def test_every_key_of_an_archive_is_told() -> None:
    """The table of an archive's keys has each once, and no other."""
    (table,) = tables(section("Tape"))
    keys = [key for row in table for key in marked(row[0])]
    assert sorted(keys) == sorted(one.name for one in attrs.fields(ArchiveOptions))


def test_every_variable_is_known() -> None:
    """Environment variables that the text names are read somewhere."""
    ours = [*(ROOT / "caxev").rglob("*.py"), *(ROOT / "handlers").glob("*.py")]
    there = [*ours, *(ROOT / "deploy").iterdir()]
    source = "".join(path.read_text() for path in there if path.is_file())
    named = set(re.findall(r"\b(?:CAXEV|MONGO)_[A-Z_]+\b", README)) - {"MONGO_PASSWORD_FILE"}
    assert [name for name in named if name not in source] == []


def test_public_names_are_told() -> None:
    """What a handler's author needs is named where handlers are explained."""
    text = section("Writing a handler")
    ours = set(caxev.__all__) - {"ELSEWHERE", "ERROR", "VERIFYING", "TRANSFERRING", "Manifest"}
    ours -= {"Copy", "CopyKey", "Result"}
    assert [name for name in ours if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize(
    ("place", "names"), [(0, CAX_COMMANDS), (1, CAX_FLAGS), (2, CAX_TASKS)], ids=str
)
def test_nothing_of_cax_is_left_out(place: int, names: list[str]) -> None:
    """Every command, flag and task of cax has a row that says what became of it."""
    table = list(tables(section("Migrating from cax")))[place]
    told = {word.split()[0] for row in table for word in marked(row[0])}
    assert set(names) <= told
    assert all(row[1] for row in table)


@pytest.mark.parametrize(("program", "flags"), CAX_PROGRAMS.items(), ids=CAX_PROGRAMS)
def test_no_flag_of_a_program_is_left_out(program: str, flags: str) -> None:
    """Each flag of each program of cax has a row of that program."""
    table = list(tables(section("Migrating from cax")))[1]
    of_program = [row for row in table if program in row[0].partition(":")[0].split(", ")]
    told = {word.split()[0] for row in of_program for word in marked(row[0])}
    assert told == set(words(flags))


def test_tasks_of_cax_enable_what_the_text_says() -> None:
    """A task that has a successor enables it in ``task_list``, and no other task does."""
    from caxev.core.registry import recorded

    load_handlers(BY_METHOD.values())
    shipped = [one for one in recorded if one.module.startswith("handlers.")]
    aliases = {alias for one in shipped for alias in one.aliases}
    successors = {alias: [one.name for one in shipped if alias in one.aliases] for alias in aliases}
    table = list(tables(section("Migrating from cax")))[2]
    for row in table:
        for task in marked(row[0]):
            if task in successors:
                assert all(f"`{name}`" in row[1] for name in successors[task]), task
            else:
                assert "not yet" in row[1], task


def test_links_lead_somewhere() -> None:
    """Links within the text, and to files, have a target."""
    headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        found = target[1:] in anchors if target.startswith("#") else (ROOT / target).exists()
        assert found, target
