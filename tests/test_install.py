"""Installing versions beside one another: what is switched, and what is gone back to.

systemctl, and Python with pip, are stand-ins here: systemd is not PID 1 where tests run, and
packages need an index. The script, git and the links are real.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from attrs import frozen

DEPLOY = Path(__file__).parents[1] / "deploy"
UNITS = [DEPLOY / "caxev-update@.service", DEPLOY / "caxev-update@.timer"]

PYTHON: Final = """\
#!/bin/sh
# python -m venv PLACE
mkdir -p "$3/bin"
cat >"$3/bin/pip" <<'END'
#!/bin/sh
echo "pip $*" >>"$CAXEV_HOME/log"
[ ! -e "$CAXEV_HOME/no-packages" ]
END
cat >"$3/bin/caxev" <<'END'
#!/bin/sh
echo "caxev $*" >>"$CAXEV_HOME/log"
echo "what caxev $* prints"
! grep -qF "$(basename "$(dirname "$(dirname "$0")")") $1" "$CAXEV_HOME/refused" 2>/dev/null
END
chmod +x "$3/bin/pip" "$3/bin/caxev"
"""
SYSTEMCTL: Final = """\
#!/bin/sh
version=$(basename "$(readlink "$CAXEV_HOME/current")")
echo "systemctl $* with $version" >>"$CAXEV_HOME/log"
if [ "$1" = list-units ]; then
    for unit; do grep -w "^$unit" "$CAXEV_HOME/units" 2>/dev/null; done
    exit 0
fi
if [ "$1" = restart ] && [ -e "$CAXEV_HOME/killing" ]; then  # the script: the parent of timeout
    kill -KILL "$(cut -d ' ' -f 4 "/proc/$PPID/stat")"
fi
[ "$1" != restart ] || ! grep -qF "$version" "$CAXEV_HOME/unready" 2>/dev/null
"""
RUNUSER: Final = """\
#!/bin/sh
echo "runuser -u $2 in $PWD with $HOME" >>"$CAXEV_HOME/log"
shift 3
exec "$@"
"""


@frozen
class Machine:
    """A machine with a checkout, and stand-ins for systemctl and Python."""

    root: Path

    @property
    def home(self) -> Path:
        return self.root / "opt"

    @property
    def checkout(self) -> Path:
        return self.root / "checkout"

    def git(self, *words: str) -> str:
        author = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
        command = ["git", "-C", str(self.checkout), *author, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def commit(self, text: str) -> str:
        """Make a version; its name."""
        (self.checkout / "pyproject.toml").write_text(text)
        self.git("add", ".")
        self.git("commit", "-qm", text)
        return self.git("rev-parse", "--short=12", "HEAD")

    def install(self, *words: str) -> subprocess.CompletedProcess[str]:
        environ = {
            **os.environ,
            "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}",
            "CAXEV_HOME": str(self.home),
            "CAXEV_PYTHON": str(self.root / "bin" / "python"),
        }
        (self.home / "log").unlink(missing_ok=True)
        command = ["sh", str(DEPLOY / "install"), *words]
        return subprocess.run(
            command, env=environ, cwd=self.root, capture_output=True, text=True, check=False
        )

    def installs(self, *words: str) -> None:
        ended = self.install(*words)
        assert ended.returncode == 0, ended.stderr

    @property
    def current(self) -> str:
        link = self.home / "current"
        return link.readlink().name if link.is_symlink() else ""

    @property
    def log(self) -> list[str]:
        log = self.home / "log"
        return log.read_text().splitlines() if log.exists() else []

    @property
    def restarts(self) -> list[str]:
        """The versions with which listeners were restarted."""
        return [line.split()[-1] for line in self.log if line.startswith("systemctl restart")]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    found = Machine(tmp_path)
    (found.checkout / "deploy").mkdir(parents=True)
    for name in ("requirements.lock", "requirements-build.lock", "requirements-otlp.lock"):
        (found.checkout / "deploy" / name).touch()
    (tmp_path / "bin").mkdir()
    for name, text in (
        ("python", PYTHON),
        ("systemctl", SYSTEMCTL),
        ("id", "#!/bin/sh\nexit 1\n"),
    ):
        program = tmp_path / "bin" / name
        program.write_text(text)
        program.chmod(0o755)
    found.home.mkdir()
    found.git("init", "-q", "-b", "stable")
    return found


def test_a_version_is_checked_before_it_is_switched_to(machine: Machine) -> None:
    """Packages by their hashes, then the checks with the new version, then the restart."""
    version = machine.commit("a")
    machine.installs(str(machine.checkout), "lngs", "chicago")
    assert machine.current == version
    steps = [line.partition(" with")[0] for line in machine.log if "list-units" not in line]
    assert "--require-hashes" in steps[0]
    assert "-build.lock" in steps[0]
    assert "--no-build-isolation" in steps[1]  # else pip would fetch what builds it, without hashes
    assert steps[2] == f"caxev man {machine.home}/versions/{version}/share/man/man1"
    assert steps[3:] == [
        "caxev sites check --site lngs",
        "caxev handlers --site lngs",
        "caxev sites check --site chicago",
        "caxev handlers --site chicago",
        "caxev status",
        "systemctl restart caxev@lngs.service",
        "systemctl is-active --quiet caxev@lngs.service",
        "systemctl restart caxev@chicago.service",
        "systemctl is-active --quiet caxev@chicago.service",
    ]


def test_helpers_and_the_page_get_the_version_too(machine: Machine) -> None:
    """If they run here; where only a helper runs, no listener is started."""
    units = machine.home / "units"
    helper, listener, page = "caxev-work@lngs.service", "caxev@lngs.service", "caxev-web.service"

    def restarted() -> list[str]:
        machine.commit(units.read_text())
        machine.installs(str(machine.checkout), "lngs")
        return [line.split()[2] for line in machine.log if line.startswith("systemctl restart")]

    units.write_text(f"{helper} loaded active running helps lngs\n")
    assert restarted() == [helper]
    units.write_text(
        f"{helper} loaded failed failed x\n{listener} loaded active x\n{page} loaded x\n"
    )
    assert restarted() == [listener, helper, page]


def test_several_lock_files_are_taken(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a site that uses both Rucio and OTLP; one that is missing is named."""
    machine.commit("a")
    monkeypatch.setenv("CAXEV_LOCK", "requirements.lock requirements-none.lock")
    ended = machine.install(str(machine.checkout), "lngs")
    assert ended.returncode == 1
    assert "requirements-none.lock" in ended.stderr
    monkeypatch.setenv("CAXEV_LOCK", "requirements.lock requirements-otlp.lock")
    machine.installs(str(machine.checkout), "lngs")
    assert machine.log[0].count(" -r ") == 3


def test_a_version_that_runs_already_is_left_alone(machine: Machine) -> None:
    """The timer restarts nothing for it."""
    machine.commit("a")
    machine.installs(str(machine.checkout), "lngs")
    machine.installs(str(machine.checkout), "lngs")
    assert machine.log == []


def test_the_paths_that_others_name_stay_the_same(machine: Machine) -> None:
    """The unit's, and the script that the timer runs; another installation is not touched."""
    version = machine.commit("a")
    machine.installs(str(machine.checkout), "lngs")
    assert (machine.home / "bin" / "caxev").resolve().parts[-3:] == (version, "bin", "caxev")
    assert os.access(machine.home / "install", os.X_OK)
    (machine.home / "bin").unlink()
    (machine.home / "bin").mkdir()
    ended = machine.install(str(machine.checkout), "lngs")
    assert (ended.returncode, machine.log) == (1, [])
    assert "move" in ended.stderr


def test_a_directory_is_never_taken_for_a_package(machine: Machine) -> None:
    """What pip gets is an absolute path: a bare name would be looked for in the index."""
    machine.commit("a")
    machine.installs("checkout", "lngs")
    (installed,) = [line for line in machine.log if "--no-deps" in line]
    assert installed.split()[-1] == str(machine.checkout)


def test_one_can_go_back_and_forth(machine: Machine) -> None:
    """`--back` is the version before, and again that one."""
    first = machine.commit("a")
    machine.installs(str(machine.checkout), "lngs")
    second = machine.commit("b")
    machine.installs(str(machine.checkout), "lngs")
    assert machine.current == second
    machine.installs("--back", "lngs")
    assert (machine.current, machine.restarts) == (first, [first])
    machine.installs("--back", "lngs")
    assert machine.current == second


def test_a_version_that_does_not_become_ready_is_given_up(machine: Machine) -> None:
    """The former one is restarted, and the exit status reports it."""
    first = machine.commit("a")
    machine.installs(str(machine.checkout), "lngs", "chicago")
    second = machine.commit("b")
    (machine.home / "unready").write_text(second)
    ended = machine.install(str(machine.checkout), "lngs", "chicago")
    assert ended.returncode == 1
    assert f"{second} does not become ready: going back to {first}" in ended.stderr
    assert (machine.current, machine.restarts) == (first, [second, first, first])
    (machine.home / "unready").unlink()
    machine.installs(str(machine.checkout), "lngs", "chicago")
    assert machine.current == second


def test_a_version_that_was_given_up_is_not_tried_each_night(machine: Machine) -> None:
    """But a person may try it again, and another one is tried."""
    first = machine.commit("a")
    machine.installs("--once", str(machine.checkout), "lngs")
    second = machine.commit("b")
    (machine.home / "unready").write_text(second)
    assert machine.install("--once", str(machine.checkout), "lngs").returncode == 1
    ended = machine.install("--once", str(machine.checkout), "lngs")
    assert ended.returncode == 1
    assert f"{second} did not become ready before" in ended.stderr
    assert (machine.current, machine.restarts) == (first, [])
    (machine.home / "unready").unlink()
    machine.installs(str(machine.checkout), "lngs")
    assert machine.current == second
    third = machine.commit("c")
    machine.installs("--once", str(machine.checkout), "lngs")
    assert machine.current == third


@pytest.mark.parametrize("what", ["sites", "handlers", "status"])
def test_a_version_that_refuses_the_site_is_not_switched_to(machine: Machine, what: str) -> None:
    """No listener is restarted: sites.json, handlers or the database do not suit it."""
    first = machine.commit("a")
    machine.installs(str(machine.checkout), "lngs")
    second = machine.commit("b")
    (machine.home / "refused").write_text(f"{second} {what}")
    ended = machine.install(str(machine.checkout), "lngs")
    assert (ended.returncode, machine.current, machine.restarts) == (1, first, [])
    assert "nothing was changed" in ended.stderr
    assert f"what caxev {what}" in ended.stderr  # where the reason is


def test_an_installation_that_broke_is_begun_anew(machine: Machine) -> None:
    """What an interrupted one left is no version."""
    version = machine.commit("a")
    (machine.home / "no-packages").touch()
    ended = machine.install(str(machine.checkout), "lngs")
    assert (ended.returncode, machine.current) == (1, "")
    (machine.home / "no-packages").unlink()
    machine.installs(str(machine.checkout), "lngs")
    assert machine.current == version


def test_an_update_that_was_killed_after_the_switch_is_done_again(machine: Machine) -> None:
    """Listeners that still run the former version, or cannot start, are not taken for updated."""
    first = machine.commit("a")
    machine.installs(str(machine.checkout), "lngs")
    second = machine.commit("b")
    (machine.home / "killing").touch()
    assert machine.install(str(machine.checkout), "lngs").returncode == -signal.SIGKILL
    assert machine.current == second
    (machine.home / "killing").unlink()
    (machine.home / "unready").write_text(second)
    ended = machine.install(str(machine.checkout), "lngs")
    assert f"going back to {first}" in ended.stderr
    assert (ended.returncode, machine.current) == (1, first)
    (machine.home / "unready").unlink()
    machine.installs(str(machine.checkout), "lngs")
    assert (machine.current, machine.restarts) == (second, [second])
    machine.installs("--back", "lngs")
    assert machine.current == first


def test_one_goes_back_from_an_update_that_was_killed(machine: Machine) -> None:
    """To what ran before it, also from the first one of all."""
    machine.commit("a")
    (machine.home / "killing").touch()
    machine.install(str(machine.checkout), "lngs")
    assert "no version to go back to" in machine.install("--back", "lngs").stderr
    (machine.home / "killing").unlink()
    first = machine.commit("b")
    machine.installs(str(machine.checkout), "lngs")
    machine.commit("c")
    (machine.home / "killing").touch()
    machine.install(str(machine.checkout), "lngs")
    (machine.home / "killing").unlink()
    machine.installs("--back", "lngs")
    assert (machine.current, machine.restarts) == (first, [first])


def test_a_killed_git_is_in_no_update_s_way(machine: Machine) -> None:
    """Its lock files and its half of a repository are left by a power cut, or by systemd."""
    source, git = f"file://{machine.checkout}@stable", machine.home / "src" / ".git"
    git.mkdir(parents=True)
    first = machine.commit("a")
    machine.installs(source, "lngs")
    for name in ("index.lock", "shallow.lock"):
        (git / name).touch()
    second = machine.commit("b")
    machine.installs(source, "lngs")
    assert (first, machine.current) == (first, second)


def test_the_checks_are_made_as_the_service_makes_them(machine: Machine) -> None:
    """Not in a directory that may be closed to its user, and not with root's home."""
    for name, text in (
        ("id", '#!/bin/sh\n[ "$1" != -u ] || echo 0\n'),
        ("getent", "#!/bin/sh\necho caxev:x:1:1::/var/lib/caxev:/bin/sh\n"),
        ("runuser", RUNUSER),
    ):
        (machine.root / "bin" / name).write_text(text)
        (machine.root / "bin" / name).chmod(0o755)
    machine.commit("a")
    machine.installs(str(machine.checkout), "lngs")
    runs = [line for line in machine.log if line.startswith("runuser")]
    assert runs == ["runuser -u caxev in / with /var/lib/caxev"] * 3


def test_a_branch_is_followed(machine: Machine) -> None:
    """By its address, as the timer does; a tag works as well."""
    first = machine.commit("a")
    machine.git("tag", "v1")
    source = f"file://{machine.checkout}"
    machine.installs(f"{source}@stable", "lngs")
    assert machine.current == first
    second = machine.commit("b")
    machine.installs(f"{source}@stable", "lngs")
    assert machine.current == second
    machine.installs(f"{source}@v1", "lngs")
    assert machine.current == first
    ended = machine.install(f"{source}@none", "lngs")
    assert (ended.returncode, machine.current) == (1, first)


def test_a_wheel_is_known_by_its_content(machine: Machine) -> None:
    """The lock file beside it pins the packages."""
    wheel = machine.root / "caxev-1.0-py3-none-any.whl"
    wheel.write_bytes(b"one")
    ended = machine.install(str(wheel), "lngs")
    assert ended.returncode == 1
    assert "requirements.lock" in ended.stderr
    (machine.root / "requirements.lock").touch()
    machine.installs(str(wheel), "lngs")
    first = machine.current
    wheel.write_bytes(b"two")
    machine.installs(str(wheel), "lngs")
    assert machine.current != first


def test_old_versions_go_but_not_the_one_before(machine: Machine) -> None:
    """Three are kept."""
    versions = []
    for number in range(5):
        versions.append(machine.commit(str(number)))
        machine.installs(str(machine.checkout), "lngs")
        os.utime(machine.home / "versions" / versions[-1], (number, number))
    kept = {path.name for path in (machine.home / "versions").iterdir()}
    assert len(kept) == 3
    assert {versions[-1], versions[-2]} <= kept


def test_each_site_of_a_machine_gets_the_version(machine: Machine) -> None:
    """Each has a timer of its own: the first one's update is not yet the second's."""
    first = machine.commit("first")
    machine.installs(str(machine.checkout), "lngs", "chicago")
    for number in range(5):
        version = machine.commit(str(number))
        machine.installs(str(machine.checkout), "lngs")
        os.utime(machine.home / "versions" / version, (number, number))
    assert (machine.home / "versions" / first).exists()  # chicago's listener runs it
    machine.installs(str(machine.checkout), "chicago")
    restarts = [line for line in machine.log if line.startswith("systemctl restart")]
    assert restarts == [f"systemctl restart caxev@chicago.service with {version}"]
    machine.installs(str(machine.checkout), "chicago")
    assert machine.log == []


def test_changes_that_are_not_committed_are_no_version(machine: Machine) -> None:
    """Nobody could go back to them."""
    machine.commit("a")
    (machine.checkout / "pyproject.toml").write_text("changed")
    ended = machine.install(str(machine.checkout), "lngs")
    assert ended.returncode == 1
    assert "not committed" in ended.stderr


def test_the_usage_is_shown_for_a_wrong_command(machine: Machine) -> None:
    """Exit status 2, as of other commands."""
    ended = machine.install("only-a-source")
    assert ended.returncode == 2
    assert "deploy/install SOURCE SITE..." in ended.stderr


def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    """Verifying them says nothing: of a wrong key it would warn, and end with 0."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for unit in UNITS:
        text = unit.read_text().replace("/opt/caxev/install", sys.executable)
        (tmp_path / unit.name.replace("@", "@lngs")).write_text(text)
    for name in ("caxev-update@lngs.service", "caxev-update@lngs.timer"):
        command = ["systemd-analyze", "verify", "--man=no", "--generators=no", name]
        said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (said.returncode, said.stderr.strip()) == (0, "")
