"""The command line: what each command does, and what it says of what is wrong."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import click
import pytest
import trio
from bson import encode
from loguru import logger
from pymongo import MongoClient

from caxev import Job, tag
from caxev.asking.base import DataChoice, Step
from caxev.cli import COMMANDS, cli
from caxev.cli.command import RUNS, rules_of
from caxev.cli.errors import report_errors
from caxev.cli.options import GlobalOptions
from caxev.cli.output import (
    _JsonPrinter,
    _show_rich,
    cell,
    columns,
    event_parts,
    run_parts,
    show,
    show_json,
    show_rows,
)
from caxev.cli.plans import StepPrinter
from caxev.cli.reaction_rows import progress_cells
from caxev.cli.rucio.bring import DirectoryFetch
from caxev.cli.status import _SITES
from caxev.config import Settings
from caxev.core.amounts import ReportedProgress, lasting, size
from caxev.core.escapes import escaped
from caxev.core.model import (
    YES,
    CopyField,
    CopyKey,
    Event,
    Existence,
    Field,
    Run,
    Tag,
)
from caxev.core.registry import recorded
from caxev.handlers import checksum
from tests import engine
from tests.conftest import Database as Named
from tests.forked import Forked
from tests.mongod import Cluster, Server

SITES: list[dict[str, Any]] = [
    {"name": "lngs", "task_list": ["went", "waits", "fails", "stops"]},
    {"name": "chicago", "task_list": ["went"]},
    {"name": "tape", "method": "tsm"},
]
HANDLERS = '''
from caxev import GiveUp, Job, Retry, copy, on, tag

@on(tag("go"))
async def went(job: Job) -> None:
    """Goes."""

@on(tag("go"))
async def waits(job: Job) -> None:
    """Waits."""
    raise Retry("not yet", after=3600)

@on(tag("go"))
async def fails(job: Job) -> None:
    """Fails."""
    raise GiveUp("no hope")

@on(tag("stop"), copy("error"))
async def stops(job: Job) -> None:
    """Stops."""
'''


class Answer(NamedTuple):
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.out)
        return rows


Caxev = Callable[..., Answer]


@pytest.fixture
def caxev(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Caxev]:
    """The command line in this process, in a directory with a sites.json and a handlers' file."""
    for name in [name for name in os.environ if name.startswith(("CAXEV_", "MONGO_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("caxev.config.environment_file.PLACE", tmp_path / "caxev.env")
    (tmp_path / "sites.json").write_text(json.dumps(SITES))
    (tmp_path / "reactions.py").write_text(HANDLERS)

    def run(*args: str) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main(args=list(args), prog_name="caxev")
        return Answer(int(left.value.code or 0), *capsys.readouterr())

    with untouched():
        yield run


@contextmanager
def untouched() -> Iterator[None]:
    """Leave handlers, modules and logging as they were."""
    handlers, modules, roots = list(recorded), set(sys.modules), list(logging.root.handlers)
    recorded[:] = [handler for handler in handlers if handler.module.startswith("caxev.handlers.")]
    try:
        yield
    finally:
        ours = [h for h in recorded if h.module.startswith("caxev.handlers.") and h not in handlers]
        recorded[:] = [*handlers, *ours]
        for name in set(sys.modules) - modules:
            if name.startswith("caxev_handlers"):
                del sys.modules[name]
        logging.root.handlers[:] = roots
        logger.remove()


@pytest.fixture
def online(caxev: Caxev, database: Named, monkeypatch: pytest.MonkeyPatch) -> Caxev:
    """The command line with a database and the handlers of `HANDLERS`."""
    monkeypatch.setenv("CAXEV_MONGO_URI", database.uri)
    monkeypatch.setenv("CAXEV_DATABASE", database.name)
    return lambda *args: caxev(*args, "--handlers", "reactions.py")


def insert(database: Named, *numbers: int, **fields: Any) -> None:
    copies = (("raw", "lngs", "transferred"),)
    given = {"tags": [{"name": "go"}], **fields}
    with MongoClient[dict[str, Any]](database.uri) as client:
        client[database.name]["runs_new"].insert_many(
            [engine.run_document(number, *copies, **given) for number in numbers]
        )


def contents(database: Named) -> dict[str, Any]:
    """All that stands in the database, to the byte."""
    with MongoClient[dict[str, Any]](database.uri) as client:
        there = client[database.name]
        return {
            name: (
                [encode(document) for document in there[name].find().sort("_id")],
                sorted(there[name].index_information()),
            )
            for name in there.list_collection_names()
        }


def assert_one_line(answer: Answer, code: int, *words: str) -> None:
    assert answer.code == code, answer
    assert answer.out == ""
    assert answer.err.startswith("caxev: ")
    assert answer.err.count("\n") == 1
    assert "Traceback" not in answer.err
    for word in words:
        assert word in answer.err


def every_command(
    group: click.Group = cli, *names: str
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command and group there is, with its name in full."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield (*names, name), command
        if isinstance(command, click.Group):
            yield from every_command(command, *names, name)


# -- help -----------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy() -> None:
    """`caxev --help` lists all but hidden commands, and the exit codes, and loads no driver."""
    code = (
        "import sys\nfrom caxev.cli import main\n"
        "try: main()\nfinally: print(sorted("
        "{'asyncssh', 'cattrs', 'loguru', 'pymongo', 'rich', 'trio'} & set(sys.modules)), "
        "file=sys.stderr)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True
    )
    assert run.stderr.strip() == "[]"
    assert {name for name in COMMANDS if f"  {name} " not in run.stdout} == {"batch"}
    assert "no such run" in run.stdout


SPARED = ["asyncssh", "caxev.author", "caxev.config.public", "caxev.database.public", "trio"]


@pytest.mark.parametrize(
    ("module", "more"),
    [
        ("caxev.engine.worker", ["caxev.config", "cattrs", "pymongo"]),
        ("caxev.transfer.receive", ["caxev.config", "cattrs", "pymongo"]),
        ("caxev.batch.runner", ["caxev.database.connection", "cattrs"]),
        ("caxev.batch.work", ["cattrs", "importlib.metadata", "pymongo"]),
        (vars(checksum)["digest_copy"].__module__, ["caxev.config", "cattrs", "pymongo"]),
    ],
)
def test_what_others_wait_for_imports_little(module: str, more: list[str]) -> None:
    """A worker and its tasks, the far end of a transfer and a job start without what they spare."""
    heavy = {*SPARED, *more}
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_what_only_shows_imports_nothing_that_acts() -> None:
    """A command that lists starts without the code that writes requests, or files."""
    listing = ("status", "explain", "run_list", "reactions", "history", "alarms", "handlers", "top")
    code = f"import sys; from caxev.cli import {', '.join(listing)}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"caxev.asking.requests", "caxev.files", "asyncssh"} & {*run.stdout.split()}


def test_every_command_has_help(caxev: Caxev) -> None:
    """The help of every command and group works, and shows an example."""
    for names, _ in every_command():
        answer = caxev(*names, "--help")
        assert answer.code == 0
        assert f"caxev {' '.join(names)}" in answer.out
        assert "Example:" in answer.out, names


def test_help_is_whole_and_plain(caxev: Caxev) -> None:
    """No summary of a command is cut at 80 columns, and programs do not tell or say."""
    for names, _ in ((), None), *every_command():
        text = caxev(*names, "--help").out
        assert not re.search(r"^  \S.*\.\.\.$", text, re.MULTILINE), names
        assert not re.search(r"\b(tells?|told|says?|said|mends?)\b", text), names


@pytest.mark.parametrize("command", ["receive", "batch"])
def test_what_machines_start_has_help_as_well(command: str) -> None:
    """Though it is started without the command line, as it is run often."""
    asked = [sys.executable, "-m", "caxev", command, "--help"]
    assert "Example:" in subprocess.run(asked, capture_output=True, text=True, check=True).stdout


def test_runs_as_a_module() -> None:
    """`python -m caxev` is `caxev`."""
    command = [sys.executable, "-m", "caxev", "--version"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("caxev, version")


# -- bad input ------------------------------------------------------------------------------------


def test_no_such_site(caxev: Caxev) -> None:
    """A site that is not in sites.json: the nearest is named."""
    assert_one_line(caxev("listen", "--site", "lgns"), 3, "no site 'lgns'", "mean 'lngs'")


def test_unknown_key(caxev: Caxev) -> None:
    """An unknown key of sites.json: the nearest known one is named."""
    Path("sites.json").write_text('[{"name": "lngs", "hostnam": "localhost"}]')
    answer = caxev("listen", "--site", "lngs")
    assert_one_line(answer, 3, "sites.json", "site 'lngs'", "'hostnam'", "mean 'hostname'")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no sites.json"),
        ("", "is empty"),
        ("[{]", "is not JSON"),
        (f'[{{"port": {"9" * 5000}}}]', "too long"),
        ('{"name": "lngs"}', "not a list of sites"),
    ],
    ids=["missing", "empty", "not JSON", "a number without end", "not a list"],
)
def test_unusable_sites_file(caxev: Caxev, text: str | None, words: str) -> None:
    """A sites.json that is missing, empty, not JSON or not a list is told in one line."""
    if text is None:
        Path("sites.json").unlink()
    else:
        Path("sites.json").write_text(text)
    assert_one_line(caxev("listen", "--site", "lngs"), 3, words)


def test_a_certificate_that_is_missing(caxev: Caxev) -> None:
    """An address that names a file that is not there is told with that file."""
    uri = "mongodb://localhost:1/?tls=true&tlsCAFile=/no/ca.pem"
    assert_one_line(caxev("status", "--mongo-uri", uri), 3, "tlsCAFile=/no/ca.pem", "not readable")


def test_named_sites_file_is_missing(caxev: Caxev) -> None:
    """A sites.json that was named, before or after the command, is not looked for elsewhere."""
    for args in (("--config", "no.json", "status"), ("status", "--config", "no.json")):
        assert_one_line(caxev(*args), 3, "no.json does not exist")


def test_several_problems_are_one_line_and_all_in_check(caxev: Caxev) -> None:
    """`sites check` tells all that is wrong; elsewhere one line sums it up."""
    Path("sites.json").write_text('[{"name": "a", "metod": 1}, {"name": "b", "purge": "x"}]')
    assert_one_line(caxev("status"), 3, "2 problems")
    check = caxev("sites", "check")
    assert check.code == 3
    file = Path("sites.json").absolute()
    assert [line.startswith(f"caxev: {file}: site ") for line in check.err.splitlines()] == [
        True
    ] * 2


def test_no_database_named(caxev: Caxev) -> None:
    """Without a database's address, what to set is said."""
    assert_one_line(caxev("status"), 3, "CAXEV_MONGO_URI")


@pytest.mark.parametrize(
    "command",
    [["listen", "--site", "lngs"], ["listen", "--site", "lngs", "--dry-run"], ["status"]],
    ids=" ".join,
)
def test_database_unreachable(caxev: Caxev, command: list[str]) -> None:
    """A database that does not answer: one line, and nothing of its password."""
    uri = "mongodb://me:geheim@127.0.0.1:9/?serverSelectionTimeoutMS=100"
    answer = caxev(*command, "--mongo-uri", uri, "--handlers", "reactions.py")
    assert answer.code == 4
    assert "no answer from the database at mongodb://me@127.0.0.1:9" in answer.err
    assert answer.err.count("\n") == 1
    assert "geheim" not in answer.err


@pytest.mark.replicaset
def test_wrong_password(caxev: Caxev, mongod: Cluster) -> None:
    """A wrong password: one line, which does not show it."""
    uri = mongod.uri.replace(mongod.password, "falsch")
    answer = caxev("status", "--mongo-uri", uri)
    shown = caxev("status", "--mongo-uri", uri, "--log-level", "debug")
    assert_one_line(answer, 4, "denied access", "MONGO_PASSWORD")
    assert "falsch" not in answer.err + shown.err


@pytest.mark.replicaset
def test_not_a_replica_set(caxev: Caxev, mongod: Cluster, tmp_path: Path) -> None:
    """A plain server: how to make it a replica set is said."""
    server = Server(tmp_path / "plain")
    server.start()
    try:
        server.wait()
        given = ("--mongo-uri", server.uri, "--handlers", "reactions.py")
        listening = caxev("listen", "--site", "lngs", *given)
        asking = caxev("status", "--mongo-uri", server.uri)
    finally:
        server.kill()
    assert_one_line(listening, 4, "not a replica set", "--replSet", "rs.initiate()")
    assert_one_line(asking, 4, "not a replica set")


@pytest.mark.replicaset
@pytest.mark.parametrize(
    "command",
    [
        ["replay", "--run", "404"],
        ["replay", "--run", "404", "--dry-run"],
        ["status", "--run", "404"],
        ["explain", "--run", "404", "--site", "lngs"],
        ["retry", "--run", "404"],
    ],
    ids=" ".join,
)
def test_no_such_run(online: Caxev, database: Named, command: list[str]) -> None:
    """A run that is not there: which, and where it was looked for; nothing is asked for."""
    insert(database, 1)
    assert_one_line(online(*command), 5, f"no run 404 in {database.name}.runs_new")
    assert "caxev_requests" not in contents(database)


def test_no_such_handler(caxev: Caxev) -> None:
    """A handler that nobody wrote: the nearest is named."""
    assert_one_line(caxev("replay", "--run", "1", "--handler", "psh"), 3, "mean 'push'")


def test_handler_enabled_nowhere(caxev: Caxev) -> None:
    """A handler that every task_list leaves out is an error, not silence."""
    assert_one_line(caxev("replay", "--run", "1", "--handler", "push"), 3, "task_list")


def test_site_without_listener(caxev: Caxev) -> None:
    """A site that has no listener cannot be asked for anything."""
    assert_one_line(caxev("replay", "--run", "1", "--site", "tape"), 3, "no listener of its own")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["replay"], "--lacks, ... (see caxev replay --help)"),
        (["replay", "--run", "9-1"], "is after"),
        (["replay", "--run", "0"], "is no run number"),
        (["explain", "--run", "0", "--site", "lngs"], "not in the range"),
        (["retry"], "select reactions"),
        (["explain", "--site", "lngs"], "name one run"),
        (["demo", "--runs", "-1"], "not in the range"),
        (["demo", "--size-mb", "nan"], "not a finite number"),
        (["listen", "--site", "lngs", "--lease", "nan"], "not a finite number"),
        (["explain", "--run", "1"], "--timeline"),
        *(
            (line.split(), words)
            for line, words in (
                ("sites check --connect", "--connect needs --site"),
                ("copy --run 1 --to a --cancel --keep-for 1d", "--cancel and --keep-for do not go"),
                ("copy --run 1 --to a --cancel --wait", "--cancel and --wait do not go together"),
                ("copy --run 1 --to a --no-wait --timeout 3", "--no-wait and --timeout do not go"),
                ("rm --run 1 --site a --cancel --force-less", "--cancel and --force-less do not"),
                ("rm --site a --dry-run --type raw", "--type needs runs (--run, --name, ...)"),
                ("rm --run 1 --site a --by-entries", "--by-entries needs --why"),
                ("retry --all --name x", "--all and --name do not go together"),
                ("replay --run 1 --wide", "--wide needs --dry-run"),
                ("explain --run 1 --timeline --all", "--timeline and --all do not go together"),
                ("status --site a --type raw", "--site and --type do not go together"),
                ("status --wide --json", "--wide and --json do not go together"),
                ("runs --csv --json", "--csv and --json do not go together"),
                ("runs --at a", "--at needs --paths"),
                ("stray --site a --age 1", "--age needs --delete or --register"),
                ("tape status --by-day --offline", "--by-day and --offline do not go together"),
                (
                    "rucio locate --run 1 --method absent --rse R",
                    "--method absent and --rse do not",
                ),
                ("rucio rules --check f --run 1", "--run needs --dry-run or --apply"),
                ("listen --site a --json", "--json needs --dry-run"),
                ("listen --site a --metrics-key k", "--metrics-key needs --metrics-"),
                ("web --key sites.json", "--key needs --certificate"),
                ("alarms --all test --site a", "--all is about the list: leave it out before test"),
                ("requests --json watch 1", "--json is about the list: leave it out before watch"),
            )
        ),
        (["lisen"], "did you mean 'listen'"),
        (["requests", "watsh"], "caxev: no such command 'watsh' (did you mean 'watch'?) (see"),
        (["--tpye"], "caxev: No such option '--tpye' (see caxev --help)"),
        (["listen"], "--site"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage(caxev: Caxev, args: list[str], words: str) -> None:
    """A wrong command line is told as such, before anything is reached for.

    So is an option that would have no effect beside another, or without one.
    """
    answer = caxev(*args)
    assert answer.code == 2
    assert words in answer.err


def test_rules_are_about_options_that_there_are() -> None:
    """One with a misspelt option would refuse nothing."""
    ruled = 0
    for name, command in every_command():
        known = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
        for rule in rules_of(command.callback):
            words = {one.partition("=")[0] for one in f"{rule.some} {rule.others}".split()}
            assert words <= known | {RUNS}, name
            ruled += 1
    assert ruled > 20


@pytest.mark.parametrize(
    ("args", "code", "nearest"),
    [
        (["status", "--site", "chicgo"], 3, "'chicago'"),
        (["handlers", "--site", "chicgo"], 3, "'chicago'"),
        (["copy", "--run", "1", "--from", "lngs", "--to", "chicgo"], 3, "'chicago'"),
        (["rm", "--run", "1", "--site", "lngs", "--type", "rwa"], 2, "'raw'"),
        (["replay", "--run", "1", "--handler", "psh"], 3, "'push'"),
        (["status", "--tpye", "raw"], 2, "'--type'"),
        (["completion", "bsh"], 2, "'bash'"),
        (["copy", "--run", "1", "--to", "lngs", "--type", "processd"], 2, "'processed'"),
        (["hold", "--run", "1", "--site", "lnsg"], 3, "'lngs'"),
        (["hold", "--run", "1", "--site", "lngs", "--keep-for", "14q"], 2, "90d"),
        (["hold", "--run", "1", "--site", "lngs", "--keep-until", "7d"], 2, "2026-12-24"),
        (["release", "--run", "9-3", "--site", "lngs"], 2, "9 is after 3"),
        (["tag", "add", "good", "--run", "1-100,foo"], 2, "1-100,205"),
        (["runs", "--since", "2016-13-40"], 2, "2016-11-11"),
        (["runs", "--unverified-for", "soon"], 2, "90d"),
        (["runs", "--lacks", "rw@lngs"], 2, "'raw'"),
        (["retry", "--handler", "pul"], 3, "'pull'"),
        (["history", "--handler", "pul"], 3, "'pull'"),
        (["stray", "--site", "lnsg", "--run", "5"], 3, "'lngs'"),
        (["tape", "put", "--run", "1", "--archive", "tpae"], 3, "'tape'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_value(caxev: Caxev, args: list[str], code: int, nearest: str) -> None:
    """One line, with the nearest value that is known."""
    assert_one_line(caxev(*args), code, nearest)


@pytest.mark.replicaset
@pytest.mark.parametrize(
    ("args", "code", "nearest"),
    [
        (["status", "--host", "chicgo"], 3, "'chicago'"),
        (["status", "--status", "transfered"], 2, "'transferred'"),
        (["history", "--what", "transfered"], 2, "did you mean 'transferred'?"),
        (["requests", "cancel", "3f9ac0d1"], 1, "no request '3f9ac0d1' (known: none)"),
        (["replay", "--tag", "goo"], 5, "'go'"),
        (["replay", "--since", "9d", "--detector", "tcp"], 5, "'tpc'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_value_in_the_database(
    online: Caxev, database: Named, args: list[str], code: int, nearest: str
) -> None:
    """The same of what only the runs tell: hosts, statuses, tags, detectors."""
    insert(database, 1)
    assert_one_line(online(*args), code, nearest)


def completed(line: str, **environ: str) -> list[str]:
    """What bash would offer for the last word of a line."""
    words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    env = {**os.environ, **words, "_CAXEV_COMPLETE": "bash_complete", **environ}
    pipe = subprocess.PIPE
    with Forked([], env, stdout=pipe, stderr=pipe, text=True) as process:
        out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    return [one.removeprefix("plain,") for one in out.splitlines() if one]


def test_completion(caxev: Caxev) -> None:
    """Commands, options, sites, handlers (a file's too) and types; nothing where that fails."""
    assert completed("caxev rea") == ["reactions"]
    assert completed("caxev status --wi") == ["--wide"]
    assert completed("caxev listen --site ") == ["chicago", "lngs", "tape"]
    assert "push" in completed("caxev replay --handler pu")
    assert completed("caxev --handlers reactions.py replay --handler wen") == ["went"]
    assert completed("caxev rm --type p") == ["processed"]
    assert completed("caxev status --status tr") == ["transferred", "transferring"]
    Path("sites.json").write_text("{")
    assert completed("caxev listen --site ") == []
    assert "push" in completed("caxev replay --handler pu")
    nowhere = "mongodb://127.0.0.1:9/?replicaSet=x"
    assert completed("caxev replay --tag ", CAXEV_MONGO_URI=nowhere) == []


@pytest.mark.replicaset
def test_completion_of_tags(online: Caxev, database: Named) -> None:
    """Tags are those that runs have."""
    insert(database, 1)
    assert completed("caxev replay --tag g") == ["go"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_completion(caxev: Caxev, shell: str) -> None:
    """It is for that shell, and asks caxev; bash takes it."""
    script = caxev("completion", shell).out
    assert f"_CAXEV_COMPLETE={shell}_complete" in script
    if shell == "bash":
        told = subprocess.run(
            ["bash", "-c", f"{script}\ncomplete -p caxev"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "_caxev_completion" in told.stdout


def test_no_option_takes_what_is_not_finite() -> None:
    """No command takes ``nan`` or ``inf`` for a number."""
    types = [one.type for _, command in every_command() for one in command.params]
    numbers: list[Any] = [one for one in types if isinstance(one, click.types.FloatParamType)]
    assert len(numbers) >= 5
    for one in numbers:
        for value in ("nan", "inf", "-inf"):
            with pytest.raises(click.BadParameter):
                one.convert(value, None, None)


def test_unexpected_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """What nobody foresaw is one line too, and comes out of a nursery's group."""
    with pytest.raises(click.exceptions.Exit) as left, report_errors(debug=lambda: False):
        raise ExceptionGroup("nursery", [ZeroDivisionError("division\nby zero")])
    assert left.value.exit_code == 1
    line = "caxev: unexpected ZeroDivisionError: division by zero; --log-level debug shows where\n"
    assert capsys.readouterr().err == line


def test_interrupt() -> None:
    """Ctrl-C is no error, and has its own exit code."""
    with pytest.raises(click.exceptions.Exit) as left, report_errors(debug=lambda: False):
        raise KeyboardInterrupt
    assert left.value.exit_code == 130


# -- output ---------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {"what": "x" * 300, "when": datetime(2016, 11, 11, tzinfo=UTC), "more": 1},
    {"what": None},
]


def test_plain_output_cuts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """In a pipe: a line for each row, nothing cut, no boxes, no colours."""
    show(columns("what", "when"), ROWS)
    out = capsys.readouterr().out
    assert out.isascii()
    assert "\x1b" not in out
    assert [line.split() for line in out.splitlines()] == [
        ["WHAT", "WHEN"],
        ["x" * 300, "2016-11-11T00:00:00Z"],
        ["-", "-"],
    ]


def test_json_output_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    """With --json: all there is, as one list of objects; also where there is nothing."""
    show_json(ROWS)
    rows = json.loads(capsys.readouterr().out)
    assert rows[0] == {"what": "x" * 300, "when": "2016-11-11T00:00:00Z", "more": 1}
    show_json([])
    assert json.loads(capsys.readouterr().out) == []


def test_what_others_wrote_cannot_steer_a_terminal() -> None:
    """Control characters and bytes that are no text are shown escaped."""
    assert escaped("a\x1b[2Jb\nc\udcff") == r"a\x1b[2Jb\nc\udcff"
    assert cell(["a\x07", "b"]) == r"a\x07, b"


@pytest.mark.parametrize(
    "args",
    [
        ("mv", "--run", "1", "--site", "lngs", "--to", ""),
        ("mv", "--run", "1", "--site", "lngs", "--to="),
        ("--config", "", "status"),
        ("register", "", "--site", "lngs"),
    ],
    ids=str,
)
def test_a_shells_variable_that_is_not_set_is_refused(caxev: Caxev, args: tuple[str, ...]) -> None:
    """As a path it would be the directory in which the command is given."""
    assert_one_line(caxev(*args), 2, "is empty: give a value")


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("--config", "fifo", "sites", "check"), 3),
        (("--log-file", "fifo", "handlers"), 1),
        (("restore", "fifo"), 2),
    ],
    ids=str,
)
def test_a_fifo_keeps_no_command_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], code: int
) -> None:
    """Nobody has it open at its other end: the command ends with an error that names it."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo")
    env = {**os.environ, "CAXEV_MONGO_URI": "mongodb://127.0.0.1:1/"}
    with Forked(args, env, stderr=subprocess.PIPE) as process:
        try:
            _, told = process.communicate(timeout=240)
        finally:
            process.kill()
    assert (process.returncode, b"fifo" in told) == (code, True), told


@pytest.mark.parametrize("option", ["--database", "--collection"])
def test_names_that_are_not_text_are_refused(caxev: Caxev, option: str) -> None:
    """Before the driver is asked to encode them."""
    answer = caxev("--mongo-uri", "mongodb://127.0.0.1:1/", option, "\udcff", "status")
    assert_one_line(answer, 3, "which is not UTF-8")


@pytest.mark.replicaset
@pytest.mark.parametrize(
    "args",
    [
        ("tag", "add", "x", "--run", "1-9", "--dry-run"),
        ("tag", "add", "x", "--run", "1-9"),
        ("tag", "add", "go", "--run", "1-9"),
        ("holds",),
        ("replay", "--run", "1-9", "--dry-run"),
        ("listen", "--site", "lngs", "--dry-run"),
        ("status", "--run", "1-9"),
        ("runs",),
    ],
    ids=" ".join,
)
def test_rows_are_printed_as_they_come(
    online: Caxev, database: Named, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...]
) -> None:
    """Of however many runs: none is kept until the last one is read."""
    held = {"by": "me", "why": "", "at": datetime(2020, 1, 1, tzinfo=UTC)}
    insert(database, *range(1, 10))
    with MongoClient[dict[str, Any]](database.uri) as client:
        change = {"$set": {"data.0.holds": [held]}}
        client[database.name]["runs_new"].update_many({}, change)
    monkeypatch.setattr("caxev.cli.output._FEW", 1)
    kept, add = [], _JsonPrinter.add

    def noted(printer: _JsonPrinter, rows: Sequence[Any]) -> None:
        kept.append(len(rows))
        add(printer, rows)

    monkeypatch.setattr(_JsonPrinter, "add", noted)
    answer = online(*args, "--json")
    assert len(answer.rows) >= 9
    assert (max(kept), sum(kept)) == (2, len(answer.rows))


@pytest.mark.parametrize("number", [2, 200], ids=["few", "many"])
@pytest.mark.parametrize("as_json", [False, True], ids=["table", "json"])
async def test_what_was_done_before_ctrl_c_is_printed(
    capsys: pytest.CaptureFixture[str], number: int, as_json: bool
) -> None:
    """As of files that `caxev stray --delete` has deleted; of few rows none was printed so far."""

    async def rows() -> AsyncIterator[dict[str, Any]]:
        for one in range(number):
            yield {"a": one}
        raise KeyboardInterrupt

    with (
        click.Context(cli, obj=GlobalOptions(as_json=as_json)).scope(),
        pytest.raises(KeyboardInterrupt),
    ):
        await show_rows(columns("a"), rows())
    out = capsys.readouterr().out
    found = [row["a"] for row in json.loads(out)] if as_json else [*map(int, out.split()[1:])]
    assert found == [*range(number)]


async def test_what_was_fetched_before_ctrl_c_is_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whether or not it went well; the interruption is what the command ends with."""
    printer = StepPrinter()

    async def fetched(end: BaseException | None) -> AsyncGenerator[Step, None]:
        yield Step(Run.from_document({"_id": 1, "number": 1}), "raw", "no space")
        if end is not None:
            raise end

    with pytest.raises(KeyboardInterrupt):
        await printer.show(fetched(KeyboardInterrupt()))
    assert "no space" in capsys.readouterr().out
    await printer.show(fetched(None))
    assert "no space" in capsys.readouterr().out
    with pytest.raises(click.exceptions.Exit):
        printer.fail()


async def test_of_several_versions_none_is_fetched() -> None:
    """Into a directory, where all would have one name."""
    entry = {"type": "processed", "host": "rucio", "status": "transferred", "location": "s:d"}
    data = [{**entry, "pax_version": version} for version in ("v1", "v2")]
    run = Run.from_document({"_id": 1, "number": 1, "data": data})
    for version, state in ((None, "choose one by --version"), ("v2", "would be fetched from s:d")):
        there = SimpleNamespace(name="rucio")
        chosen = SimpleNamespace(data=DataChoice("processed", version), there=there)
        fetching = DirectoryFetch(cast("Any", chosen), "/x", None, dry_run=True)
        step = await fetching._fetch(cast("Any", None), run)
        assert (step.ok, state in step.state) == (version is not None, True)


def test_runs_and_events_have_one_form(capsys: pytest.CaptureFixture[str]) -> None:
    """In JSON a run is an object, and so is an event; a table shows them in words."""
    events = (
        (CopyKey("raw", "lngs"), "verifying@1", "transferred@2"),
        (CopyField("raw", "lngs", None, "checksum"), None, "digest"),
        (Tag("go"), None, YES),
        (Field("end"), "digest", None),
        (Existence(), None, YES),
    )
    rows = [{"run": run_parts(5, 7, "x"), "event": event_parts(Event(5, *one))} for one in events]
    show(columns("run", "event"), rows)
    words = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:]]
    assert words[0] == ["7", "raw at lngs: transferred"]
    assert words[3] == ["7", "field end: gone"]
    show_json(rows)
    found = json.loads(capsys.readouterr().out)
    assert found[0]["run"] == {"id": "5", "number": 7, "name": "x"}
    copy = {"type": "raw", "host": "lngs", "version": None}
    assert [row["event"] for row in found] == [
        {"kind": "copy", **copy, "before": "verifying", "after": "transferred"},
        {"kind": "copy_field", **copy, "field": "checksum", "before": None, "after": "digest"},
        {"kind": "tag", "tag": "go", "before": None, "after": "yes"},
        {"kind": "field", "field": "end", "before": "digest", "after": None},
        {"kind": "run", "before": None, "after": "yes"},
    ]


BUSY = {
    "site": "lngs",
    "listening": True,
    "owner": "daq.example.org:12345",
    "epoch": 17,
    "streamed": "2016-11-11T14:34:05Z",
    "pending": 12,
    "progress": "3 running: 12.3 GB of 40 GB, 210 MB/s, 2 min left",
    "clock": "+0.1 s",
    "gap": "2016-11-11T14:34:05Z the stream lost its history: all runs were compared",
}
TROUBLED = {
    **BUSY,
    "running": 3,
    "failed": 4,
    "requests": 1,
    "alarms": "2, 1 not told",
    "trouble": "the database refuses to record 3 changes",
    "away": ["/data/xenon/raw: it is not mounted", "/data/xenon/processed: it is not mounted"],
}


@pytest.fixture
def status_of_sites(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """What a terminal of a width shows of a site, and of another one that never listened."""

    def shown(row: dict[str, Any], width: int, *, wide: bool = False) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        rows = [row, {"site": "stockholm", "listening": "never did", "failed": 0}]
        _show_rich(_SITES, rows, wide=wide)
        return capsys.readouterr().out

    return shown


@pytest.mark.parametrize("width", [70, 80, 120])
def test_a_table_fits_the_terminal(status_of_sites: Callable[..., str], width: int) -> None:
    """What is empty is left out, and what is minor if need be; headings are whole."""
    shown = status_of_sites(BUSY, width)
    assert max(map(len, shown.splitlines())) <= width
    headings = shown.split("\n")[0].split()
    assert {"SITE", "LISTENING", "STREAMED", "PENDING", "PROGRESS"} <= {*headings}
    assert "FAILED" not in headings


def test_trouble_leaves_no_room_for_less(status_of_sites: Callable[..., str]) -> None:
    """What is wrong with a site is there even if little else has room; headings are whole."""
    shown = status_of_sites(TROUBLED, 80)
    assert max(map(len, shown.splitlines())) <= 80
    assert {"SITE", "PENDING", "FAILED", "ALARMS", "TROUBLE", "DISKS"} <= {
        *shown.split("\n")[0].split()
    }


def test_a_wide_table_has_all(status_of_sites: Callable[..., str]) -> None:
    """With --wide every column is there, and nothing is folded."""
    shown = status_of_sites(BUSY, 80, wide=True)
    heading, _line, lngs, _stockholm = shown.splitlines()
    assert {"FAILED", "EPOCH", "AWAY"} <= {*heading.split()}
    assert str(BUSY["gap"]) in lngs


def on_terminal(*args: str, **environ: str) -> str:
    """What a command prints on a terminal."""
    return printed_by(partial(Forked, args), **environ)


def printed_by(start: Callable[..., subprocess.Popen[Any]], **environ: str) -> str:
    """What a process prints on a terminal."""
    ours, theirs = pty.openpty()
    env = {"PATH": os.environ["PATH"], "TERM": "xterm", "COLUMNS": "200", **environ}
    with start(env=env, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        text = b"".join(iter(lambda: _read(ours), b"")).decode()
        os.close(ours)
        assert process.wait() == 0
    return text


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except OSError:  # the other end was closed
        return b""


def test_terminal_gets_a_rich_table() -> None:
    """On a terminal tables are rich, and NO_COLOR is respected."""
    assert "─" in (plain := on_terminal("handlers", NO_COLOR="1"))
    assert "checksum" in plain
    assert "\x1b[3" not in plain


def test_the_log_respects_no_color() -> None:
    """On a terminal the log has colours, unless NO_COLOR is set to something."""
    code = (
        "import os; from caxev import logs; from loguru import logger\n"
        "for one in ('1', ''):\n"
        "    os.environ['NO_COLOR'] = one; logs.configure('INFO'); logger.info('said')"
    )
    command = [sys.executable, "-c", code]
    plain, coloured = printed_by(partial(subprocess.Popen, command)).splitlines()
    assert "said" in plain
    assert "\x1b" not in plain
    assert "\x1b[" in coloured


@pytest.mark.parametrize(
    ("progress", "shown"),
    [
        (
            {"done": 12_300_000_000, "total": 40_000_000_000, "rate": 210e6},
            "12.3 GB of 40 GB, 210 MB/s, 2 min left",
        ),
        ({"done": 1, "total": 3}, "1 B of 3 B"),
        ({"done": 7, "total": 3, "rate": 1}, "7 B of 3 B, 1 B/s, 0 s left"),
        ({"done": 2_000_000, "total": 0, "rate": 0.0}, "2 MB, 0 B/s"),
        ({"done": 1, "total": 3, "rate": None}, "1 B of 3 B"),
        ({"done": 1, "total": "x", "rate": "x"}, "1 B"),
        ({"done": 1, "total": 3, "rate": float("nan")}, "1 B of 3 B"),
        (None, None),
        ({"done": "x"}, None),
        (5, None),
    ],
)
def test_progress(progress: object, shown: str | None) -> None:
    """Progress says bytes, rate and time left as far as they are known, and never fails."""
    assert progress_cells(ReportedProgress.of(progress))["progress"] == shown


def test_progress_of_several() -> None:
    """The sum of several is of those that know."""
    several = [ReportedProgress(1, 10, 2.0), ReportedProgress(5), ReportedProgress(2, 20, 1.0)]
    assert ReportedProgress.sum(several) == ReportedProgress(8, 30, 3.0)
    assert ReportedProgress.sum(several).left == pytest.approx(22 / 3)
    assert ReportedProgress.sum(several[1:2]) == ReportedProgress(5)


def test_lasting() -> None:
    """Lengths of time are in the largest unit of which there are two."""
    given = (0, 119, 120, 7199, 7200, 172_799, 172_800)
    shown = ["0 s", "119 s", "2 min", "120 min", "2 h", "48 h", "2 days"]
    assert [lasting(seconds) for seconds in given] == shown


def test_size() -> None:
    """Sizes are in powers of 1000."""
    given = (0, 999, 1000, 1_230_000_000, 5 * 10**15, None)
    assert [size(n) for n in given] == ["0 B", "999 B", "1 kB", "1.23 GB", "5e+03 TB", None]


# -- sites, handlers ------------------------------------------------------------------------------


def test_sites_check(caxev: Caxev) -> None:
    """The sites of the file, with its warnings on stderr."""
    Path("sites.json").write_text('[{"name": "lngs", "upload_options": ["chicgo"]}]')
    answer = caxev("sites", "check", "--json")
    assert answer.code == 0
    assert [row["site"] for row in answer.rows] == ["lngs"]
    assert "'chicgo'" in answer.err


def test_sites_check_looks_at_directories(caxev: Caxev, tmp_path: Path) -> None:
    """With --site, a directory that is not there is found."""
    there, absent = str(tmp_path), str(tmp_path / "absent")
    for root, code in ((there, 0), (absent, 1)):
        Path("sites.json").write_text(json.dumps([{"name": "lngs", "dir_raw": root}]))
        answer = caxev("sites", "check", "--site", "lngs")
        assert answer.code == code
        assert ("is not a directory" in answer.out) == bool(code)


def test_sites_check_connects(caxev: Caxev) -> None:
    """With --connect, what keeps us from a site is said in its row."""
    sites = [
        {"name": "lngs"},
        {"name": "nowhere"},
        {"name": "closed", "hostname": "127.0.0.1", "port": 1},
    ]
    Path("sites.json").write_text(json.dumps(sites))
    answer = caxev("sites", "check", "--site", "lngs", "--connect", "--json")
    state = {row["site"]: (row["ok"], row["state"]) for row in answer.rows}
    assert answer.code == 1
    assert state["lngs"] == (True, "ok: this site")
    assert state["nowhere"] == (False, "site 'nowhere' has no hostname in sites.json")
    assert not state["closed"][0]


def test_handlers(caxev: Caxev) -> None:
    """Handlers with their triggers in words, and whether the site enables them."""
    answer = caxev("handlers", "--site", "chicago", "--handlers", "reactions.py", "--json")
    rows = {row["handler"]: row for row in answer.rows}
    assert rows["went"]["enabled"]
    assert not rows["push"]["enabled"]
    assert rows["stops"]["triggers"] == ["tag stop is added", "copy is error"]
    assert rows["stops"]["does"] == "Stops."
    assert "CopyPush" in rows["push"]["aliases"]
    assert "statuses of copy here is removed" in rows["purge"]["triggers"]


def test_handlers_need_no_sites(caxev: Caxev) -> None:
    """Without --site no sites.json is needed."""
    Path("sites.json").unlink()
    assert {"pull", "push", "checksum"} <= {
        row["handler"] for row in caxev("handlers", "--json").rows
    }


def test_two_handlers_of_one_name_are_refused(caxev: Caxev) -> None:
    """With a site and without: the name, both files and lines, and exit code 3."""
    twice = "from caxev import on, tag\n@on(tag('x'))\nasync def pull(job): ...\n"
    Path("twice.py").write_text(twice)
    for command in (("handlers",), ("handlers", "--site", "chicago")):
        answer = caxev(*command, "--handlers", "twice.py")
        assert answer.code == 3
        assert "two handlers are named 'pull'" in answer.err
        assert "transfer.py, line " in answer.err
        assert "twice.py, line 2" in answer.err


# -- with a database ------------------------------------------------------------------------------


@pytest.mark.replicaset
def test_db_init_is_repeatable(online: Caxev, database: Named) -> None:
    """`db init` makes the indexes; again it changes nothing."""
    assert online("db", "init").code == 0
    made = contents(database)
    assert "due" in made["caxev_ledger"][1]
    assert online("db", "init").code == 0
    assert contents(database) == made


@pytest.mark.replicaset
def test_listen_once_does_what_its_dry_run_said(online: Caxev, database: Named) -> None:
    """The dry run names what `--once` then does, and writes nothing."""
    insert(database, 1, 2)
    before = contents(database)
    planned = online("listen", "--site", "lngs", "--dry-run", "--json").rows
    assert contents(database) == before
    assert {(row["run"]["number"], row["handler"]) for row in planned} == {
        (run, handler) for run in (1, 2) for handler in ("went", "waits", "fails")
    }
    assert online("listen", "--site", "lngs", "--once").code == 0
    ended = online("reactions", "--done", "--failed", "--pending", "--json").rows
    assert {(row["run"]["number"], row["handler"], row["state"]) for row in ended} == {
        (run, *end)
        for run in (1, 2)
        for end in (("went", "done"), ("waits", "pending"), ("fails", "failed"))
    }
    assert online("listen", "--site", "lngs", "--dry-run", "--json").rows == []


@pytest.mark.replicaset
def test_listens_dry_run_names_all_that_is_due(
    online: Caxev, database: Named, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many fall due at one time: those of every page are named, each once."""
    monkeypatch.setattr("caxev.database.reactions._AT_A_TIME", 2)
    insert(database, *range(1, 10))
    online("listen", "--site", "lngs", "--once")
    with MongoClient[dict[str, Any]](database.uri) as client:
        ledger = client[database.name]["caxev_ledger"]
        waiting = list(ledger.find({"handler": "waits"}))
        for number, one in enumerate(waiting):
            due = datetime(2020, 1, 1 + number // 5, tzinfo=UTC)
            ledger.update_one({"_id": one["_id"]}, {"$set": {"due": due}})
    rows = online("listen", "--site", "lngs", "--dry-run", "--json").rows
    assert sorted(row["run"]["number"] for row in rows) == [*range(1, 10)]


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["listen", "dry run"])
@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"alarms": [{"webhook": {"shape": "slack"}}]}, "alarms: 'webhook'"),
        ({"upload_options": ["cern"]}, "needs a catalogue"),
    ],
    ids=["alarms", "catalogue"],
)
def test_listen_and_its_dry_run_refuse_alike(
    caxev: Caxev, monkeypatch: pytest.MonkeyPatch, dry: list[str], entry: Any, words: str
) -> None:
    """What keeps a listener from starting keeps its dry run from saying what it would do."""
    monkeypatch.setattr("caxev.rucio.connection.missing", lambda: "it is not installed")
    monkeypatch.setenv("CAXEV_MONGO_URI", "mongodb://127.0.0.1:1/?replicaSet=none")
    catalogue = {"name": "cern", "method": "rucio"}
    Path("sites.json").write_text(json.dumps([{"name": "lngs", **entry}, catalogue]))
    assert_one_line(caxev("listen", "--site", "lngs", *dry), 3, words)


@pytest.mark.replicaset
def test_dry_runs_write_nothing(online: Caxev, database: Named) -> None:
    """No dry run changes a byte, on a fresh database or on one in use."""
    insert(database, 1)
    for prepare in ((), ("listen", "--site", "lngs", "--once")):
        if prepare:
            assert online(*prepare).code == 0
            insert(database, 2)
        before = contents(database)
        for command in (
            ("listen", "--site", "lngs"),
            ("listen", "--site", "lngs", "--once"),
            ("replay", "--run", "1"),
            ("replay", "--since", "36525d", "--force"),
        ):
            assert online(*command, "--dry-run").code == 0
        assert contents(database) == before


@pytest.mark.replicaset
async def test_replay_is_paid_by_the_listener(online: Caxev, database: Named) -> None:
    """What replay asks for is done at once by the listener there is: only what is missing."""
    seen: list[str] = []

    async def went(job: Job) -> None:
        seen.append(f"went {job.run.number}")

    async def waits(job: Job) -> None:
        seen.append(f"waits {job.run.number}")

    def asked(*args: str) -> Answer:
        return online("replay", "--site", "lngs", *args)

    first = [engine.handler(went, tag("go"))]
    both = [*first, engine.handler(waits, tag("go"))]
    insert(database, 1, 2)
    async with engine.opened(database) as db:
        async with engine.listener(db, engine.options_for(database, first)):
            await engine.until(lambda: len(seen) == 2)
        async with engine.listener(db, engine.options_for(database, both)):
            await engine.until(lambda: _listening(db))
            seen.clear()
            answer = await trio.to_thread.run_sync(asked, "--run", "1-")
            assert answer.out == "lngs: queued 2 runs\n"
            await engine.until(lambda: sorted(seen) == ["waits 1", "waits 2"])
            seen.clear()
            await trio.to_thread.run_sync(asked, "--run", "2", "--handler", "went", "--force")
            await engine.until(lambda: seen)
            await engine.until(lambda: _no_requests(db))
    assert seen == ["went 2"]


async def _listening(db: Any) -> bool:
    record = await db.site_record("lngs")
    return record is not None and record.active


async def _no_requests(db: Any) -> bool:
    return not (await db.waiting("lngs"))[0]


@pytest.mark.replicaset
@pytest.mark.parametrize(
    ("chosen", "runs"),
    [
        (["--run", "2"], {"2"}),
        (["--name", "161111_0003"], {"3"}),
        (["--run", "2-"], {"2", "3"}),
        (["--run", "1-2"], {"1", "2"}),
        (["--run", "1-2", "--name", "*_0002"], {"2"}),
        (["--has", "raw@lngs", "--lacks", "raw@chicago", "--not-tag", "stop"], {"1", "2", "3"}),
        (["--run", "1,3", "--fewer-than", "2", "--until", "1d"], {"1", "3"}),
        (["--tag", "go", "--detector", "tpc"], {"1", "2", "3"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_replay_selects(online: Caxev, database: Named, chosen: list[str], runs: set[str]) -> None:
    """Every way to say which runs are meant selects those."""
    insert(database, 1, 2, 3)
    insert(database, 4, tags=[{"name": "stop"}], data=[])
    rows = online("replay", *chosen, "--site", "chicago", "--dry-run", "--json").rows
    assert {str(row["run"]["number"]) for row in rows} == runs
    assert {row["handler"] for row in rows} == {"went"}


@pytest.mark.replicaset
def test_replay_asks_all_sites_with_a_listener(online: Caxev, database: Named) -> None:
    """Without --site, all sites that can are asked; where nobody listens it is said."""
    insert(database, 1)
    lines = online("replay", "--run", "1").out.splitlines()
    assert lines == [
        f"{site}: queued 1 run; no listener is active there: start caxev listen --site {site}"
        for site in ("lngs", "chicago")
    ]
    rows = online("status", "--json").rows
    assert {row["site"]: row["requests"] for row in rows} == {"lngs": 1, "chicago": 1, "tape": 0}
    (planned,) = (
        row
        for row in online("listen", "--site", "lngs", "--dry-run", "--json").rows
        if row["run"] is None
    )
    assert planned["why"] == "requested: replay of 1 run"


@pytest.mark.replicaset
def test_retry_tries_failures_again(online: Caxev, database: Named) -> None:
    """A retry opens what failed, the next listener tries it; nothing failed: exit code 1."""
    insert(database, 1, 2)
    assert online("retry", "--all").code == 1
    online("listen", "--site", "lngs", "--once")
    before = online("reactions", "--failed", "--json").rows
    assert len(before) == 2
    answer = online("retry", "--run", "1", "--handler", "fails", "--json")
    assert answer.code == 0
    assert {row["site"]: row["failed"] for row in answer.rows} == {"lngs": 1, "chicago": 0}
    once = online("listen", "--site", "lngs", "--once")
    assert once.err.count("failed: no hope") == 1
    assert online("reactions", "--failed", "--json").rows[0]["note"] == "no hope"


@pytest.mark.replicaset
def test_explain(online: Caxev, database: Named) -> None:
    """For every handler: done, waiting, failed, off, not triggered or missing, and why."""
    insert(database, 1)
    online("listen", "--site", "lngs", "--once")
    rows = {
        row["handler"]: row
        for row in online("explain", "--run", "1", "--site", "lngs", "--all", "--json").rows
    }
    states = {handler: row["state"] for handler, row in rows.items()}
    shipped = {name: states.pop(name) for name in states.keys() - {*SITES[0]["task_list"]}}
    assert shipped.keys() >= {"pull", "push", "checksum"}
    assert set(shipped.values()) == {"off"}
    assert rows["pull"]["why"] == "not enabled: task_list of lngs leaves it out"
    assert rows["process"]["why"] == "not enabled: lngs gives no processing"
    assert states == {
        "went": "done",
        "waits": "pending",
        "fails": "failed",
        "stops": "not triggered",
    }
    assert rows["waits"]["why"].startswith("waits until 20")
    assert rows["waits"]["why"].endswith(": not yet")
    assert rows["fails"]["why"] == "no hope; to retry: caxev retry --run 1 --site lngs"
    assert "raw at lngs: the status is transferred, not error" in rows["stops"]["why"]
    blocking = online("explain", "--run", "1", "--site", "lngs", "--json").rows
    told = {row["handler"]: row["state"] for row in blocking}
    assert told.items() >= {"waits": "pending", "fails": "failed"}.items()
    assert told.keys().isdisjoint({"went", "stops", "process"})
    there = online("explain", "--name", "161111_0001", "--site", "chicago", "--json").rows
    missing = next(row for row in there if row["handler"] == "went")
    assert missing["why"] == "would run, as it is new here: caxev replay --run 1 --site chicago"


@pytest.mark.replicaset
def test_explain_knows_whether_anybody_listens(online: Caxev, database: Named) -> None:
    """A dead listener is not at work on anything, and no worker of its will be free."""
    insert(database, 1)
    online("listen", "--site", "lngs", "--once")
    with MongoClient[dict[str, Any]](database.uri) as client:
        ledger = client[database.name]["caxev_ledger"]
        ledger.update_one({"handler": "fails"}, {"$set": {"state": "running", "epoch": 1}})
        ledger.update_one({"handler": "waits"}, {"$set": {"due": datetime(2020, 1, 1, tzinfo=UTC)}})
        told = []
        for ahead in (-60, 20):
            there = {"expires": datetime.now(UTC) + timedelta(seconds=ahead)}
            ledger.update_one({"_id": "lngs"}, {"$set": there})
            rows = online("explain", "--run", "1", "--site", "lngs", "--json").rows
            told.append([r["why"] for r in rows if r["handler"] in {"fails", "waits"}])
    assert told == [
        [
            "waits: no listener is active for lngs: not yet",
            "interrupted: no listener is active for lngs",
        ],
        ["due now, as soon as a worker is free: not yet", "running"],
    ]


@pytest.mark.replicaset
def test_explain_tells_what_happened_in_order(online: Caxev, database: Named) -> None:
    """Of all sites, or one: what reactions did or failed at, and where the copies stand."""
    insert(database, 1)
    insert(database, 2)
    online("listen", "--site", "lngs", "--once")
    rows = online("explain", "--run", "1", "--timeline", "--json").rows
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)
    assert [row["handler"] for row in rows].count("went") == 1  # of this run alone
    failed = next(row for row in rows if row.get("handler") == "fails")
    assert (failed["site"], failed["state"], failed["why"]) == ("lngs", "failed", "no hope")
    there = online("explain", "--run", "1", "--timeline", "--site", "chicago").out
    assert "fails" not in there
    assert_one_line(
        online("explain", "--run", "1", "--timeline", "--site", "chicgo"), 3, "'chicago'"
    )


@pytest.mark.replicaset
def test_explain_asks_which_of_two_runs(online: Caxev, database: Named) -> None:
    """A name that two detectors share is not guessed at."""
    insert(database, 1)
    insert(database, 1, detector="muon_veto")
    args = ("explain", "--name", "161111_0001", "--site", "lngs")
    assert_one_line(online(*args), 5, "2 runs match", "--detector")
    assert online(*args, "--detector", "tpc").code == 0


@pytest.mark.replicaset
def test_runs_without_a_number_are_told_apart(online: Caxev, database: Named) -> None:
    """By name and detector: `status`, `retry` and `verify` of one, and what `explain` advises."""
    insert(database, 1)
    insert(database, 1, detector="muon_veto")
    with MongoClient[dict[str, Any]](database.uri) as client:
        client[database.name]["runs_new"].update_many({}, {"$unset": {"number": 1}})
    online("listen", "--site", "lngs", "--once")
    this = ["--name", "161111_0001", "--detector", "muon_veto"]
    assert [row["detector"] for row in online("status", *this, "--json").rows] == ["muon_veto"]
    assert len(online("verify", *this, "--json").rows) == 1
    rows = online("explain", *this, "--site", "lngs", "--json").rows
    (failed,) = (row["why"] for row in rows if row["state"] == "failed")
    advised = f"caxev retry {' '.join(this)} --site lngs"
    assert failed == f"no hope; to retry: {advised}"
    (row,) = online(*advised.split()[1:], "--json").rows
    assert row["failed"] == 1
    there = online("explain", *this, "--site", "chicago", "--json").rows
    (missing,) = (row["why"] for row in there if row["state"] == "missing")
    assert missing == f"would run, as it is new here: caxev replay {' '.join(this)} --site chicago"


@pytest.mark.replicaset
def test_status_of_a_run(online: Caxev, database: Named) -> None:
    """A run's copies and what is not done at any site, with progress."""
    insert(database, 1)
    online("listen", "--site", "lngs", "--once")
    with MongoClient[dict[str, Any]](database.uri) as client:
        client[database.name]["caxev_ledger"].update_one(
            {"handler": "waits"},
            {
                "$set": {
                    "state": "running",
                    "epoch": 1,
                    "progress": {"done": 1_000, "total": 4_000, "rate": 50.0},
                }
            },
        )
    (run,) = online("status", "--run", "1", "--json").rows
    assert run["run"] == {"id": run["run"]["id"], "number": 1, "name": "161111_0001"}
    assert run["tags"] == ["go"]
    assert [(c["type"], c["host"], c["status"]) for c in run["copies"]] == [
        ("raw", "lngs", "transferred")
    ]
    reactions = {row["handler"]: (row["state"], row["progress"]) for row in run["reactions"]}
    assert reactions == {
        "waits": ("running", "1 kB of 4 kB, 50 B/s, 60 s left"),
        "fails": ("failed", None),
    }
    (sites, *_) = online("status", "--json").rows
    (listed,) = online("reactions", "--running", "--json").rows
    assert {"from", "to", "started"} <= listed.keys()
    assert "STARTED" in online("reactions", "--running").out
    for row in (sites, listed, *(one for one in run["reactions"] if one["handler"] == "waits")):
        told = [row[key] for key in ("bytes_done", "bytes_total", "bytes_per_s", "eta_s")]
        assert told == [1_000, 4_000, 50.0, 60]
    plain = online("status", "--name", "161111_0001").out
    assert plain.startswith("run 1 161111_0001  tpc  2016-11-11T00:00:00Z  tags: go\n")


@pytest.mark.replicaset
async def test_status_of_sites(online: Caxev, database: Named) -> None:
    """A row for each site: who listens, and what it owes."""
    async with (
        engine.opened(database) as db,
        engine.listener(db, engine.options_for(database, []), owner="me"),
    ):
        await engine.until(lambda: _listening(db))
        rows = (await trio.to_thread.run_sync(online, "status", "--json")).rows
    sites = {row["site"]: row for row in rows}
    assert (sites["lngs"]["listening"], sites["lngs"]["owner"]) == (True, "me")
    assert sites["chicago"]["listening"] == "never did"
    assert sites["tape"]["listening"] == "has no listener"
    assert sites["lngs"]["failed"] == 0


@pytest.mark.replicaset
def test_log_file_and_json(online: Caxev, database: Named, tmp_path: Path) -> None:
    """The log goes to the file too, and as JSON where that is asked for."""
    log = tmp_path / "log"
    answer = online("listen", "--site", "lngs", "--once", "--log-json", "--log-file", str(log))
    assert answer.code == 0
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert any(r["record"]["message"].startswith("listening for lngs") for r in records)
    assert answer.out == ""


def test_settings_are_not_shown(caxev: Caxev) -> None:
    """A password in the address is in no message, whatever is wrong with the address."""
    answer = caxev("status", "--mongo-uri", "mongodb://me:ge@heim@host/")
    assert_one_line(answer, 3, "percent-encoded")
    assert "heim" not in answer.err
    assert "geheim" not in repr(Settings("mongodb://me:geheim@host/"))
