"""The image and the trial: deploy/Containerfile and deploy/trial."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner

from caxev import CopyKey
from caxev.cli import cli
from caxev.config import Sites, load_handlers, load_sites
from caxev.core.registry import Registry, recorded
from caxev.database import Database
from caxev.engine.options import Options
from tests import engine
from tests.conftest import Database as Named

ROOT = Path(__file__).parents[1]
IMAGE = ROOT / "deploy" / "Containerfile"
TRIAL = ROOT / "deploy" / "trial"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((TRIAL / "compose.yaml").read_text())[
    "services"
]


def test_the_image_s_file_is_accepted_by_its_linter() -> None:
    """All rules but one: Debian's packages are as new as they are there."""
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    assert linter is not None
    command = [linter, "--ignore", "DL3008", "--failure-threshold", "warning", str(IMAGE)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout


def test_the_image_has_what_it_copies() -> None:
    """What the build needs is in the context, which .dockerignore makes small."""
    allowed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert all([*ROOT.glob(name)] for name in allowed)
    for name in re.findall(r"deploy/[\w.-]+\.lock", IMAGE.read_text()):
        assert (ROOT / name).exists()
    for link in (path for path in (ROOT / "caxev").rglob("*") if path.is_symlink()):
        assert link.resolve().relative_to(ROOT).parts[0] in allowed, link


@pytest.mark.parametrize("name", [name for name in SERVICES if name != "mongo"])
def test_a_service_of_the_trial_has_a_command_that_is_known(name: str) -> None:
    """With options that there are; what a service waits for is a service."""
    service = SERVICES[name]
    words = service["command"]
    if "entrypoint" in service:
        (line,) = words
        words = shlex.split(line.rpartition("exec caxev ")[2])
    context = cli.make_context("caxev", [*words])
    while isinstance(context.command, click.Group):
        first, command, rest = context.command.resolve_command(context, words)
        assert command is not None
        context = command.make_context(first, [*rest], parent=context)
        words = rest
    assert set(service["depends_on"]) <= set(SERVICES)


@pytest.mark.replicaset
async def test_a_run_of_the_trial_goes_to_the_other_site(
    database: Named, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the comments of compose.yaml say, with its sites.json."""
    file = tmp_path / "sites.json"
    text = (TRIAL / "sites.json").read_text().replace("/data", str(tmp_path))
    file.write_text(text)
    names = [one["name"] for one in json.loads(text)]
    assert set(names) < set(SERVICES)
    sites = load_sites(file)
    for name in names:
        (tmp_path / name).mkdir()
    for key, value in (("MONGO_URI", database.uri), ("DATABASE", database.name), ("SITES", file)):
        monkeypatch.setenv(f"CAXEV_{key}", str(value))
    taken = tmp_path / "lngs" / "161111_1434"
    async with engine.opened(database) as db:
        lngs, chicago = [options(database, sites, name) for name in names]
        async with engine.listener(db, lngs, "one"), engine.listener(db, chicago, "two"):
            await engine.until(partial(marked, db, names[0]))
            taken.mkdir()
            (taken / "events").write_text("now")
            register(str(taken), *["--site", "lngs", "--run", "1", "--create"])

            async def copied() -> bool:
                ids, _ = await db.page("chicago", None)
                runs = (await db.runs(ids)).values()
                key = CopyKey("raw", "chicago")
                return any((one := run.copy(key)) and one.status == "transferred" for run in runs)

            await engine.until(copied)
    assert (tmp_path / "chicago" / "161111_1434" / "events").read_text() == "now"


async def marked(db: Database, site: str) -> bool:
    record = await db.site_record(site)
    return record is not None and bool(record.markers)


def register(*words: str) -> None:
    command = [sys.executable, "-m", "caxev", "register", *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def options(database: Named, sites: Sites, name: str) -> Options:
    load_handlers()
    ours = [one for one in recorded if one.module.startswith("caxev.handlers.")]
    return Options(
        site=sites.get(name),
        sites=sites,
        settings=engine.settings_for(database),
        registry=Registry(ours, sites.here(name)),
        lease_time=3.0,
        grace=0.0,
    )


# -- manual pages ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("man") / "man1"
    ended = CliRunner().invoke(cli, ["man", str(directory)], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    return directory


def test_each_command_has_a_manual_page(pages: Path) -> None:
    """Of its own, with its options, unless it is hidden; it names only pages that there are."""
    names = {path.stem for path in pages.iterdir()}
    assert {"caxev", "caxev-copy", "caxev-sites-check"} < names
    commands = {f"caxev-{name}" for name in cli.list_commands(click.Context(cli))}
    assert commands - names == {"caxev-batch"}
    for path in pages.iterdir():
        assert set(re.findall(r"([\w\\-]+)\(1\)", path.read_text().replace("\\-", "-"))) <= names
    assert r".B \-\-keep\-for" in (pages / "caxev-copy.1").read_text()


def test_manual_pages_are_read_without_warnings(pages: Path) -> None:
    """By groff, with all its warnings."""
    groff = shutil.which("groff")
    if groff is None:
        pytest.skip("groff is not installed (Debian: groff)")
    command = [groff, "-man", "-ww", "-Tutf8", "-z", *map(str, sorted(pages.iterdir()))]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
