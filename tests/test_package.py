"""What is installed: the wheel, built from the source distribution, outside any checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path
from typing import Final, NamedTuple

import pytest

import caxev
from caxev.demo.world import SITES
from tests.documents import file
from tests.test_cookbook import FILES

ROOT: Final = Path(__file__).parents[1]
MADE: Final = shutil.ignore_patterns(
    ".git", ".venv", ".*cache", ".hypothesis", "__pycache__", "build", "dist"
)
"""What is no source."""


# On one worker, since all of them share what is installed.
pytestmark = pytest.mark.xdist_group("package")


class Installed(NamedTuple):
    """The unpacked source distribution, and a Python that has its wheel and our dependencies."""

    source: Path
    python: Path
    packages: Path

    def run(self, *arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run this Python, to its end."""
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [self.python, *arguments],
            cwd=cwd,
            env=clean | environ,
            capture_output=True,
            text=True,
            check=False,
        )


def build(source: Path, what: str, where: Path) -> Path:
    """Build a distribution as pip does, but with the hatchling of this environment."""
    code = f"import hatchling.build as backend; print(backend.build_{what}({str(where)!r}))"
    built = subprocess.run(
        [sys.executable, "-c", code], cwd=source, check=True, capture_output=True, text=True
    )
    return where / built.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Install the wheel of the source distribution of a copy of this checkout."""
    base = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT, base / "checkout", symlinks=True, ignore=MADE)
    with tarfile.open(build(base / "checkout", "sdist", base)) as archive:
        archive.extractall(base, filter="data")
    source = base / f"caxev-{caxev.__version__}"
    shutil.copytree(source, base / "to-build", symlinks=True)
    wheel = build(base / "to-build", "wheel", base)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", base / "venv"], check=True)
    (packages,) = (base / "venv").glob("lib/python3.*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    # After caxev, so that the editable one is not found: a .pth file's .pth files are not read.
    (packages / "dependencies.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    return Installed(source, base / "venv" / "bin" / "python", packages)


def test_one_name_is_taken(installed: Installed) -> None:
    """The wheel has one package, with the version and the command that it should have."""
    names = {path.name for path in installed.packages.iterdir()}
    info = f"caxev-{caxev.__version__}.dist-info"
    assert names == {"caxev", info, "dependencies.pth"}
    ours = PathDistribution(installed.packages / info)
    assert ours.version == caxev.__version__
    (command,) = ours.entry_points
    assert (command.name, command.value) == ("caxev", "caxev.__main__:main")
    assert {"Keywords", "Classifier", "Project-URL", "License-Expression"} <= {*ours.metadata}


def test_the_source_distribution_is_whole(installed: Installed) -> None:
    """It has every file of the checkout, so that its tests can run; some of them do here."""
    checkout = installed.source.parent / "checkout"
    files = [path.relative_to(checkout) for path in checkout.rglob("*") if path.is_file()]
    assert [path for path in files if not (installed.source / path).is_file()] == []
    tests = ("tests/test_deploy.py", "-k", "unit")
    ended = installed.run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=installed.source
    )
    assert ended.returncode == 0, ended.stdout


def test_a_directory_called_handlers_hides_nothing(installed: Installed, tmp_path: Path) -> None:
    """People may have a package of that name where they work."""
    (tmp_path / "handlers").mkdir()
    (tmp_path / "handlers" / "__init__.py").touch()
    ended = installed.run("-m", "caxev", "handlers", "--json", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert {"pull", "checksum"} <= {row["handler"] for row in json.loads(ended.stdout)}


def test_the_types_are_for_authors(installed: Installed, tmp_path: Path) -> None:
    """The handlers of the manual and the cookbook are strictly typed; a misspelt name is found."""
    handler = file("README.md", "count_copies.py")
    texts = {"count_copies.py": handler, "misspelt.py": handler.replace("set_fields", "set_feilds")}
    for name, text in (FILES | texts).items():
        (tmp_path / name).write_text(text)
    cache = os.environ.get("MYPY_CACHE_DIR", str(ROOT / ".mypy_cache" / "authors"))
    command = ("--strict", "--python-executable", str(installed.python), "--cache-dir", cache)
    ended = subprocess.run(
        [sys.executable, "-m", "mypy", *command, "."],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert {*re.findall(r"^(.*\.py):", ended.stdout, re.MULTILINE)} == {"misspelt.py"}, ended.stdout
    assert 'has no attribute "set_feilds"' in ended.stdout


@pytest.mark.replicaset
@pytest.mark.tape
def test_a_run_s_whole_life_in_the_demo(installed: Installed, tmp_path: Path) -> None:
    """Copied, verified, processed, lost and back from tape, purged, told of; nothing is left.

    Without a checkout: the wheel has the example's sites. Here a type of data is added to them,
    which sites.json alone defines: it is made and counted as the others are.
    """
    example = (installed.packages / "caxev" / "demo" / "sites.json").read_text()
    assert example == SITES.read_text() == (ROOT / "sites.json").read_text()
    entries = json.loads(example)
    entries[1] |= {
        "dir_channels": "/data/chicago/channels",
        "channels": {**entries[1]["minitrees"], "output": "{name}_channels.jsonl"},
    }
    types = [{"name": "channels", "source": "processed"}]
    (tmp_path / "my_sites.json").write_text(json.dumps({"types": types, "sites": entries}))
    (tmp_path / "tmp").mkdir()
    demo = ("-m", "caxev", "demo", "--runs", "1", "--size-mb", "1", "--json")
    sites = ("--sites", "my_sites.json")
    ended = installed.run(*demo, *sites, cwd=tmp_path, TMPDIR=str(tmp_path / "tmp"))
    assert ended.returncode == 0, ended.stderr
    summary = json.loads(ended.stdout.splitlines()[-1])
    wanted = {"runs": 1, "copies": 3, "verified": 3, "on_tape": 1, "purged": 1, "back_from_tape": 1}
    wanted |= {"processed": 1, "minitrees": 1, "channels": 1, "runs_queries_while_idle": 0}
    assert {name: summary[name] for name in wanted} == wanted
    assert {summary["reactions"][name] for name in ("failed", "pending")} == {0}
    said = ended.stderr
    assert "1 with minitrees, 1 with channels, in " in said
    assert "channels chicago: transferred" in said
    lost = said.index("161111_1534 lngs: deleted")
    back = said.index("161111_1534 lngs: transferred", lost)
    told = said.index("caxev explain --run 1 --timeline", back)
    history = [line.split() for line in said[told:].splitlines()[3:]]
    there = [(row[1], " ".join(row)) for row in history if len(row) > 1]
    assert "its files were lost" in said[told:]
    assert "tag 'keep' removed" in said[told:]
    for site, words in (
        ("chicago", "begun from lngs"),
        ("chicago", "process raw at chicago"),
        ("chicago", "collect minitrees v6.8.0 at chicago processed"),
        ("lngs", "backup raw at tsm-server transferred from lngs, to tsm-server"),
        ("lngs", "recall raw at lngs transferred from tsm-server, to lngs"),
        ("lngs", "erase raw at lngs deleted"),
    ):
        assert any(one == site and words in line for one, line in there), (words, said[told:])
    assert list((tmp_path / "tmp").iterdir()) == []
