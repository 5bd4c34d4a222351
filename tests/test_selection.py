"""How commands are told which runs, copies and values are meant, and by whose settings they go."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import click
import pytest

from caxev.asking.base import DataChoice
from caxev.cli.command import together
from caxev.cli.selection import RunChoice, selects_run, selects_runs
from caxev.config import ConfigError, Settings
from caxev.config.environment_file import use_environment_file
from caxev.core.errors import Ambiguous
from caxev.core.model import Run
from caxev.core.selection import Selection
from tests import engine
from tests.conftest import Database as Named
from tests.test_cli import (  # noqa: F401  # fixtures
    Caxev,
    assert_one_line,
    caxev,
    insert,
    online,
)

# -- runs -----------------------------------------------------------------------------------------


def chosen(decorator: Any, *args: str) -> RunChoice:
    """What a command gets that is given these arguments."""
    found: list[RunChoice] = []

    @click.command()
    @decorator  # type: ignore[untyped-decorator]  # of either kind
    def command(*, run: RunChoice | None = None, runs: RunChoice | None = None) -> None:
        choice = run or runs
        assert choice is not None
        found.append(choice)

    command.main([*args], standalone_mode=False)
    return found[0]


@pytest.mark.parametrize(
    ("args", "texts", "words"),
    [
        (["--run", "5"], {"run": ["5"]}, "run 5"),
        (["--run", "5", "--run", "7-9"], {"run": ["5", "7-9"]}, "runs 5, 7-9"),
        (["--run", "3-"], {"run": ["3-"]}, "runs 3-"),
        (["--name", "x"], {"name": ["x"]}, "run 'x'"),
        (["--run", "5", "--name", "x"], {"run": ["5"], "name": ["x"]}, "run with --run 5 --name x"),
        (
            ["--tag", "t", "--detector", "tpc", "--since", "2d", "--status", "error"],
            {"tag": ["t"], "detector": ["tpc"], "since": ["2d"], "status": ["error"]},
            "run with --detector tpc --tag t --since 2d --status error",
        ),
    ],
    ids=str,
)
def test_the_options_that_select_runs(
    args: list[str], texts: dict[str, list[str]], words: str
) -> None:
    """They are the conditions of one language, and are shown as they were given."""
    choice = chosen(selects_runs(), *args)
    assert choice.selection.texts() == texts
    assert choice.words == words


@pytest.mark.parametrize(
    ("decorator", "args", "words"),
    [
        (selects_runs(), [], "select runs"),
        (selects_runs(), ["--run", "2-1"], "2 is after 1"),
        (selects_runs(), ["--run", "1;2"], "is no run number: write 5, 1-100"),
        (selects_runs(), ["--since", "yesterday"], "is no time: write 2016-11-11"),
        (selects_runs(), ["--has", "raw@"], "names no copy: write raw@lngs"),
        (selects_run(), [], "name one run"),
        (selects_run(), ["--run", "1", "--name", "x"], "name one run"),
        (selects_run(), ["--detector", "tpc"], "name one run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_selects_nothing_is_a_usage_error(decorator: Any, args: list[str], words: str) -> None:
    """So does what contradicts itself: no command guesses."""
    with pytest.raises(click.UsageError) as raised:
        chosen(decorator, *args)
    assert words in raised.value.message


def test_not_every_command_needs_a_selection() -> None:
    """Without options all runs are meant, or those of one detector."""
    assert not chosen(selects_runs(required=False)).selects
    assert chosen(selects_runs(required=False), "--detector", "d").selection == Selection(
        detectors=("d",)
    )


def test_options_together_are_one_argument() -> None:
    """They are in the help in the order given, and the command's other options stay its own."""

    @click.command()
    @click.option("--first")
    @together("both", lambda **given: given, click.option("--a"), click.option("--b"))
    @click.option("--last")
    def command(*, first: str, both: dict[str, str], last: str) -> None:
        assert (first, both, last) == ("1", {"a": "2", "b": None}, "4")

    assert [one.name for one in command.params] == ["first", "a", "b", "last"]
    command.main(["--first", "1", "--a", "2", "--last", "4"], standalone_mode=False)


def test_no_version_is_guessed() -> None:
    """Of one version there is no doubt, of several one must be chosen."""
    data = [
        {"type": "processed", "host": "lngs", "status": "transferred", "pax_version": version}
        for version in ("v1", "v2")
    ]
    one, two = (Run.from_document(engine.run_document(1, data=data[:n])) for n in (1, 2))
    assert DataChoice("processed").copy(one, "lngs") == one.copies[0]
    assert DataChoice("processed", "v2").copy(two, "lngs") == two.copies[1]
    assert DataChoice("raw").copy(two, "lngs") is None
    with pytest.raises(Ambiguous, match=r"several versions \(v1, v2\)"):
        DataChoice("processed").copy(two, "lngs")


# -- values that nobody knows ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "nearest"),
    [
        (["status", "--type", "processd"], "'processed'"),
        (["verify", "--site", "lngs", "--type", "processd"], "'processed'"),
        (["reactions", "--site", "chicgo"], "'chicago'"),
        (["alarms", "--site", "chicgo"], "'chicago'"),
        (["alarms", "test", "--site", "chicgo"], "'chicago'"),
        (["verify", "--site", "chicgo"], "'chicago'"),
        (["retry", "--all", "--site", "chicgo"], "'chicago'"),
        (["retry", "--handler", "psh"], "'push'"),
        (["reactions", "--handler", "psh"], "'push'"),
        (["vouch", "--run", "1", "--site", "chicgo"], "'chicago'"),
        (["mv", "--run", "1", "--site", "chicgo", "--to", "/x"], "'chicago'"),
        (["stray", "--site", "chicgo"], "'chicago'"),
        (["register", "/x", "--site", "chicgo"], "'chicago'"),
        (["tape", "put", "--run", "1", "--archive", "tpae"], "'tape'"),
        (["tape", "status", "--site", "chicgo"], "'chicago'"),
        (["rucio", "put", "--run", "1", "--from", "chicgo"], "'chicago'"),
        (["rucio", "get", "--run", "1", "--to", "chicgo", "--catalogue", "tape"], "'chicago'"),
        (["rucio", "purge", "--run", "1", "--site", "chicgo"], "'chicago'"),
        (["sites", "init", "--site", "chicgo"], "'chicago'"),
        (["sites", "check", "--site", "chicgo"], "'chicago'"),
        (["db", "grants", "--site", "chicgo"], "'chicago'"),
        (["replay", "--has", "rwa@lngs"], "'raw'"),
        (["retry", "--lacks", "processd"], "'processed'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_value_that_nobody_knows(
    caxev: Caxev,  # noqa: F811  # the fixture
    args: list[str],
    nearest: str,
) -> None:
    """In every command, before the database is asked: the nearest one is named."""
    answer = caxev(*args, "--mongo-uri", "mongodb://127.0.0.1:9/?serverSelectionTimeoutMS=50")
    assert answer.code in (2, 3), answer
    assert f"did you mean {nearest}" in answer.err
    assert answer.err.count("\n") == 1


@pytest.mark.replicaset
@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["status", "--host", "nowhere"], 3, "known: "),
        (["status", "--status", "qqqq"], 2, "known: "),
        (["status", "--totals", "--status", "transfered"], 2, "'transferred'"),
        (["verify", "--tag", "goo"], 5, "'go'"),
        (["retry", "--tag", "goo"], 5, "'go'"),
        (["retry", "--not-tag", "goo"], 2, "'go'"),
        (["retry", "--source", "AmBa"], 5, "'AmBe'"),
        (["replay", "--detector", "tcp"], 5, "'tpc'"),
        (["replay", "--host", "chicgo"], 3, "'chicago'"),
        (["replay", "--has", "raw@chicgo"], 3, "'chicago'"),
        (["replay", "--lacks", "raw@chicago=eror"], 2, "'error'"),
        (["replay", "--lacks", "processed:v6.8.1"], 2, "'v6.8.0'"),
        (["replay", "--version", "v6.8.1"], 5, "'v6.8.0'"),
        (["status", "--version", "v6.8.1"], 5, "'v6.8.0'"),
        (["verify", "--version", "v6.8.1"], 5, "'v6.8.0'"),
        (["tag", "rm", "goo", "--run", "1"], 2, "'go'"),
        (["tag", "add", "new", "--tag", "goo"], 5, "'go'"),
    ],
    ids=str,
)
def test_a_value_that_not_even_the_database_knows(
    online: Caxev,  # noqa: F811  # the fixture
    database: Named,
    args: list[str],
    code: int,
    words: str,
) -> None:
    """No near one either: then those are named that there are."""
    made = {"type": "processed", "host": "lngs", "pax_version": "v6.8.0", "status": "error"}
    insert(database, 1, data=[made], source={"type": "AmBe"})
    assert_one_line(online(*args), code, words)


@pytest.mark.replicaset
def test_what_the_database_has_is_known(online: Caxev, database: Named) -> None:  # noqa: F811
    """Hosts that sites.json no longer names, and statuses of cax: they are found, not refused."""
    copy = {"type": "raw", "host": "depot", "status": "RSEquota", "location": "/x"}
    insert(database, 1, data=[copy])
    for args in (["--host", "depot"], ["--status", "RSEquota"]):
        (row,) = online("status", *args, "--json").rows
        assert (row["host"], row["status"]) == ("depot", "RSEquota")


# -- the service's settings -----------------------------------------------------------------------

FILE = """
# the database
CAXEV_MONGO_URI="mongodb://caxev_lngs@db1,db2/run?replicaSet=runs&authSource=admin"
; and its password
MONGO_PASSWORD='geheim$1'
CAXEV_SITES=/etc/caxev/sites.json
CAXEV_OPTIONS="--metrics-port 9101 --log-json"
PATH=/nowhere
"""


def used(file: Path, text: str, *, own_database: bool = False, **given: str) -> dict[str, str]:
    """The environment after a command has fallen back to a file of that content."""
    file.write_text(text)
    environ = dict(given)
    use_environment_file(own_database=own_database, environ=environ, file=file)
    return environ


def test_commands_fall_back_to_the_services_settings(tmp_path: Path) -> None:
    """As systemd reads them: quotes go, comments are left out, and only ours are taken."""
    found = used(tmp_path / "env", FILE)
    assert found == {
        "CAXEV_MONGO_URI": "mongodb://caxev_lngs@db1,db2/run?replicaSet=runs&authSource=admin",
        "MONGO_PASSWORD": "geheim$1",
        "CAXEV_SITES": "/etc/caxev/sites.json",
        "CAXEV_OPTIONS": "--metrics-port 9101 --log-json",
    }
    assert "geheim%241@" in Settings.load(environ=found).mongo_uri


def test_what_is_set_stays(tmp_path: Path) -> None:
    """Each variable by itself, also one that is set to nothing."""
    found = used(tmp_path / "env", FILE, CAXEV_SITES="./sites.json", CAXEV_OPTIONS="")
    assert found["CAXEV_SITES"] == "./sites.json"
    assert found["CAXEV_OPTIONS"] == ""
    assert found["MONGO_PASSWORD"] == "geheim$1"


@pytest.mark.parametrize("given", [{"CAXEV_MONGO_URI": "mongodb://me@other/"}, {}], ids=str)
def test_the_services_password_is_for_its_own_database(
    tmp_path: Path, given: dict[str, str]
) -> None:
    """Who names another database does not offer it to that one, nor takes the other names."""
    text = FILE + "CAXEV_DATABASE=run\nCAXEV_MONGO_USER=x\nMONGO_PASSWORD_FILE=/x\n"
    found = used(tmp_path / "env", text, own_database=not given, **given)
    assert found == {
        **given,
        "CAXEV_SITES": "/etc/caxev/sites.json",
        "CAXEV_OPTIONS": "--metrics-port 9101 --log-json",
    }


@pytest.mark.parametrize("line", ["MONGO_PASSWORD='geheim", "MONGO_PASSWORD geheim", "geheim"])
def test_a_line_that_is_no_assignment(tmp_path: Path, line: str) -> None:
    """It is named by its place; what stands there, which may be a secret, is not shown."""
    with pytest.raises(ConfigError) as raised:
        used(tmp_path / "env", f"# x\n{line}\n")
    assert str(raised.value).startswith(f"{tmp_path / 'env'}, line 2: ")
    assert raised.value.__cause__ is None
    assert "geheim" not in str(raised.value)


def test_a_file_that_is_not_for_us(tmp_path: Path) -> None:
    """Missing, or not readable: the command goes by its own environment alone."""
    environ: dict[str, str] = {}
    for file in (tmp_path / "none", tmp_path):  # a directory cannot be read, not even by root
        use_environment_file(own_database=False, environ=environ, file=file)
    assert environ == {}


def test_a_command_reads_them(
    caxev: Caxev,  # noqa: F811  # the fixture
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The database is the service's, and its password is in no message."""
    place = tmp_path / "caxev.env"
    uri = "mongodb://me@127.0.0.1:9/?serverSelectionTimeoutMS=50"
    place.write_text(f'CAXEV_MONGO_URI="{uri}"\nMONGO_PASSWORD=geheim\n')
    monkeypatch.setattr("caxev.config.environment_file.PLACE", place)
    with mock.patch.dict(os.environ):
        answer = caxev("status", "--log-level", "debug")
    assert answer.code == 4
    assert "no answer from the database at mongodb://me@127.0.0.1:9" in answer.err
    assert "geheim" not in answer.err
    with mock.patch.dict(os.environ):
        place.write_text("CAXEV_MONGO_URI\n")
        assert_one_line(caxev("status"), 3, "caxev.env, line 1")
