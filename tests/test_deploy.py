"""What an operator installs: the systemd unit, its environment file, and the scripts."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import click
import pytest
from packaging.requirements import Requirement

from caxev.cli.listen import listen
from caxev.cli.work import work
from caxev.config import Settings
from caxev.config.permissions import read_permissions
from caxev.core.clock import utcnow
from caxev.engine import helping, lanes, lease, options, session
from caxev.engine.systemd import notify
from tests import engine
from tests.conftest import Database as Named

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "caxev@.service"
WEB = DEPLOY / "caxev-web.service"
WORK = DEPLOY / "caxev-work@.service"
EXAMPLE = DEPLOY / "caxev.env.example"
SCRIPTS = [
    path
    for path in sorted([*DEPLOY.iterdir(), ROOT / ".ci" / "run"])
    if path.is_file() and (path.suffix == ".sh" or path.read_bytes().startswith(b"#!/bin/sh"))
]
VARIABLE = re.compile(r"#?([A-Z_]+)=(.*)")


def settings(name: str) -> list[str]:
    """Every value that the unit gives to a setting."""
    lines = UNIT.read_text().splitlines()
    return [line.partition("=")[2] for line in lines if line.startswith(f"{name}=")]


def seconds(name: str) -> float:
    (value,) = settings(name)
    return float(value)


def command() -> list[str]:
    (line,) = settings("ExecStart")
    return shlex.split(line)


def example() -> dict[str, str]:
    """The variables of the example, those in comments too."""
    found = map(VARIABLE.fullmatch, EXAMPLE.read_text().splitlines())
    return {match[1]: " ".join(shlex.split(match[2])) for match in found if match}


def option_of(name: str) -> click.Option:
    (option,) = (one for one in listen.params if isinstance(one, click.Option) and one.name == name)
    return option


@pytest.mark.parametrize("unit", [UNIT, WEB, WORK], ids=lambda unit: unit.name)
def test_systemd_accepts_the_unit(unit: Path, tmp_path: Path) -> None:
    """Verifying the unit says nothing: of a wrong key it would warn, and end with 0."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    installed = tmp_path / unit.name
    installed.write_text(unit.read_text().replace(command()[0], sys.executable))
    said = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--generators=no", str(installed)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (said.returncode, said.stderr.strip()) == (0, "")


def test_the_page_s_unit_starts_a_command_that_there_is() -> None:
    """It starts `caxev web` as nobody in particular, and confines it at least as a listener."""
    ours, listeners = WEB.read_text(), UNIT.read_text()
    assert "ExecStart=/opt/caxev/bin/caxev web $CAXEV_WEB_OPTIONS\n" in ours
    confining = re.findall(
        r"^(?:Protect|Private|Restrict|Capability|NoNew).*", listeners, re.MULTILINE
    )
    assert [line for line in confining if line not in ours] == []


def test_a_helper_s_unit_is_a_listener_s_with_another_command() -> None:
    """It starts `caxev work` with options that there are, and is confined as the listener."""
    ours, listeners = WORK.read_text(), UNIT.read_text()
    (line,) = re.findall(r"^ExecStart=(.*)", ours, re.MULTILINE)
    _caxev, name, *given = shlex.split(line)
    (usual,) = re.findall(r'^Environment="CAXEV_WORK_OPTIONS=(.*)"', ours, re.MULTILINE)
    assert (name, given.pop()) == ("work", "$CAXEV_WORK_OPTIONS")
    with work.make_context("work", [*given, *shlex.split(usual)]) as context:
        assert context.params["grace"] == options.GRACE
        others_begin = lease.HELD * context.params["lease_time"]
    # Systemd ends it, whatever it is stuck in, before others make what it had begun.
    (dead,) = re.findall(r"^WatchdogSec=(\d+)", ours, re.MULTILINE)
    assert helping.RENEW + int(dead) < others_begin
    confining = [one for one in listeners.splitlines() if re.match(r"[A-Z]\w+=", one)]
    others = ("Description", "Environment", "Exec")
    assert [one for one in confining if one not in ours and not one.startswith(others)] == []


def test_the_unit_starts_a_command_that_there_is() -> None:
    """The unit's command line is one that `caxev listen` takes."""
    _caxev, name, *rest = command()
    given = [part for part in rest if part != "$CAXEV_OPTIONS"]
    assert name == "listen"
    with listen.make_context("listen", given) as context:
        assert context.params["site"] == "%i"


def test_the_example_s_options_are_there() -> None:
    """The options that the environment file proposes are ones that `caxev listen` takes."""
    given = ["--site", "lngs", *shlex.split(example()["CAXEV_OPTIONS"])]
    with listen.make_context("listen", given) as context:
        assert context.params["metrics_port"] == 9101


def test_the_times_fit_together() -> None:
    """The unit waits longer than a listener that is well needs to renew its lease, or to leave."""
    with listen.make_context("listen", command()[2:-1]) as context:
        lease_time, grace = context.params["lease_time"], context.params["grace"]
    assert lease_time == option_of("lease_time").default == options.LEASE
    assert grace == option_of("grace").default == options.GRACE
    # A restart delays nothing for longer than a crash does.
    assert grace < lease_time
    assert seconds("WatchdogSec") >= 2 * lease_time
    assert seconds("TimeoutStopSec") > grace + session.LAST + 2 * session.FLUSH


def test_the_unit_lets_all_lanes_work_at_once() -> None:
    """Systemd's own limit of 1,024 descriptors is that of some hundred transfers."""
    (most,) = settings("LimitNOFILE")
    assert int(most) >= 32 * sum(lanes.LANES.values())


def test_the_unit_lets_every_mode_be_set_that_sites_json_may_name() -> None:
    """Systemd denies any chmod with the set-group-ID bit, also where a directory has it already."""
    assert read_permissions({"mode": "2750"})["raw"].mode == 0o2750
    assert not settings("RestrictSUIDSGID")


def test_the_unit_runs_as_nobody_in_particular_with_no_secret() -> None:
    """The service is not root's, and neither file holds a password."""
    assert settings("User") == ["caxev"]
    assert not settings("LoadCredential")
    assert not {"MONGO_PASSWORD", "CAXEV_MONGO_PASSWORD"} & example().keys()
    assert not any("PASSWORD" in value for value in settings("Environment"))


def test_the_example_s_settings_are_usable() -> None:
    """The environment file's variables are known, and its address is one, with a password."""
    source = "".join(path.read_text() for path in (ROOT / "caxev").rglob("*.py"))
    ours = example().keys() - {"CAXEV_OPTIONS"}
    assert [name for name in ours if name.removesuffix("_FILE") not in source] == []
    password = {"MONGO_PASSWORD": "a secret"}
    loaded = Settings.load(environ={**example(), "MONGO_PASSWORD_FILE": "", **password})
    assert (loaded.database, loaded.collection) == ("run", "runs_new")


def test_a_shell_reads_the_example() -> None:
    """A shell that sources the environment file gets what systemd gets."""
    script = f'set -eu; . "{EXAMPLE}"; printf %s "$CAXEV_MONGO_URI"'
    said = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert said.stdout == example()["CAXEV_MONGO_URI"]


def locked(name: str) -> dict[str, str]:
    """The versions in a lock file, each of which has hashes."""
    text = (DEPLOY / name).read_text()
    found = dict(re.findall(r"^([a-z0-9-]+)==(\S+) \\\n    --hash=sha256:", text, re.MULTILINE))
    assert len(found) == text.count("==")
    assert "//" not in text  # nobody's index
    return found


def test_the_locks_fit_the_project() -> None:
    """Each dependency is locked, by version and hashes, in the range that pyproject.toml gives."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = locked("requirements.lock")
    build = locked("requirements-build.lock")
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]:
        assert Requirement(line).specifier.contains(build[Requirement(line).name])
    for extra in ("htcondor", "otlp", "rucio", "web"):
        more = locked(f"requirements-{extra}.lock")
        assert base.items() <= more.items()
        for line in (*project["dependencies"], *project["optional-dependencies"][extra]):
            wanted = Requirement(line)
            assert wanted.specifier.contains(more[wanted.name]), line
            assert wanted.name in base or line not in project["dependencies"]


def test_without_a_list_of_vulnerabilities_there_is_no_audit() -> None:
    """One line says so, and nothing fails; `deploy/test` makes it a step of its own."""
    nowhere = {**os.environ, "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    said = subprocess.run(
        ["sh", str(DEPLOY / "audit")], env=nowhere, capture_output=True, text=True, check=False
    )
    told = "caxev: not audited: no list of vulnerabilities can be reached\n"
    assert (said.returncode, said.stdout, said.stderr) == (0, "", told)
    assert "\nsh deploy/audit\n" in (DEPLOY / "test").read_text()


PYTHON: Final = """\
#!/bin/sh
[ "$1" = -m ] || exit 0
mkdir -p "$3/bin"
ln -s /bin/true "$3/bin/pip"
ln -s {python} "$3/bin/python"
cp {audit} "$3/bin/pip-audit"
"""
AUDIT: Final = """\
#!/bin/sh
while [ $# -gt 1 ]; do [ "$1" = --output ] && output=$2; shift; done
[ -z '{found}' ] || echo '{found}' >"$output"
echo 'Traceback:
{said}' >&2
exit 1
"""
CLEAN: Final = '{"dependencies": [{"name": "a", "version": "1", "vulns": []}]}'
BAD: Final = CLEAN.replace("[]", '[{"id": "CVE-1", "fix_versions": []}]')


@pytest.mark.parametrize(
    ("found", "said", "status", "told"),
    [
        (CLEAN, "", 0, "requirements-rucio.lock: 1 of 1 packages looked up, 0 vulnerabilities"),
        (CLEAN, "", 0, "requirements.lock: 1 of 1 packages looked up, 0 vulnerabilities"),
        (BAD, "", 1, "a 1: CVE-1, fixed in no version yet"),
        ("", "requests.exceptions.ConnectionError: refused", 0, "no list of vulnerabilities can"),
        ("", "requests.exceptions.ReadTimeout: late", 0, "no list of vulnerabilities can"),
        ("", "ERROR:pip_audit._cli:Could not connect to OSV", 0, "no list of vulnerabilities can"),
        ("", "requests.exceptions.JSONDecodeError: nonsense", 1, "Error: nonsense"),
        ("", "pip_audit._service.interface.ServiceError", 1, "pip_audit._service.interface.Servi"),
        ("", "ERROR:pip_audit._cli:a hash is missing", 1, "a hash is missing"),
    ],
)
def test_an_audit_that_fails_is_no_audit_that_was_skipped(
    tmp_path: Path, found: str, said: str, status: int, told: str
) -> None:
    """Only what the network does is passed over; all else fails, in pip-audit's own words."""
    (tmp_path / "audit").write_text(AUDIT.format(found=found, said=said))
    python = PYTHON.format(python=sys.executable, audit=tmp_path / "audit")
    (tmp_path / "python3").write_text(python)
    for program in tmp_path.iterdir():
        program.chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run(
        ["sh", str(DEPLOY / "audit")], env=environ, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, told in ended.stdout + ended.stderr) == (status, True), ended


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_shell(script: Path) -> None:
    """A POSIX shell can read every script."""
    said = subprocess.run(["sh", "-n", script], capture_output=True, text=True, check=False)
    assert (said.returncode, said.stderr) == (0, "")


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket at which systemd hears how a service is."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as options:
        options.bind(str(tmp_path / "notify"))
        options.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield options


def test_a_process_without_descriptors_does_not_end_for_systemd(
    systemd: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("caxev.engine.systemd.socket.socket", none_left)
    notify("WATCHDOG=1")
    with pytest.raises(BlockingIOError):
        systemd.recv(4096)


def test_a_process_does_not_wait_for_systemd(systemd: socket.socket) -> None:
    """It reads nothing for a while: none of what matters is lost."""
    for _ in range(1000):
        notify("WATCHDOG=1")
    notify("READY=1")
    with suppress(BlockingIOError):
        while True:
            assert systemd.recv(4096) == b"WATCHDOG=1"
    notify("WATCHDOG=1")
    assert systemd.recv(4096) == b"READY=1\nWATCHDOG=1"
    notify("WATCHDOG=1")
    assert systemd.recv(4096) == b"WATCHDOG=1"


async def heard(options: socket.socket, *wanted: str) -> None:
    """Wait until all that is wanted has been heard, in any order."""
    missing = set(wanted)

    def complete() -> bool:
        with suppress(BlockingIOError):
            while True:
                missing.difference_update(options.recv(4096).decode().splitlines())
        return not missing

    await engine.until(complete)


@pytest.mark.replicaset
async def test_systemd_hears_that_a_listener_is_well(
    database: Named, systemd: socket.socket
) -> None:
    """A listener says when it is ready, that it is well, and that it leaves."""
    async with engine.opened(database) as db:
        async with engine.listener(db, engine.options_for(database, [])):
            await heard(systemd, "READY=1", "STATUS=listening for lngs")
            await heard(systemd, "WATCHDOG=1")
        await heard(systemd, "STOPPING=1")


@pytest.mark.replicaset
async def test_systemd_hears_that_a_stand_by_is_well(
    database: Named, systemd: socket.socket
) -> None:
    """One that stands by is ready, too, and goes on saying that it is well."""
    async with engine.opened(database) as db:
        assert await db.acquire("lngs", "somebody else", 60.0, utcnow()) is not None
        async with engine.listener(db, engine.options_for(database, [])):
            await heard(systemd, "READY=1", "STATUS=standing by")
            await heard(systemd, "WATCHDOG=1")
            await heard(systemd, "WATCHDOG=1")
