"""handlers/README.md: each of its recipes works, and passes its own test."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from caxev.core.registry import recorded
from caxev.testing import Lab
from caxev.testing.lab import SERVER
from tests.mongod import Cluster

COOKBOOK = (Path(__file__).parents[1] / "handlers" / "README.md").read_text()
FILES = dict(re.findall(r"^```python\n# (\S+\.py)\n(.*?)^```$", COOKBOOK, re.MULTILINE | re.DOTALL))
RECIPES = [name.removesuffix(".py") for name in FILES if not name.startswith("test_")]


@pytest.fixture
def kitchen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with all files of the cookbook, from which they can be imported."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    modules = set(sys.modules)
    yield tmp_path
    recipes = {path.stem for path in tmp_path.glob("*.py")} - modules
    # Handlers of caxev that a recipe imported first stay: nothing would record them once more.
    recorded[:] = [one for one in recorded if one.module not in recipes]
    for name in recipes:
        sys.modules.pop(name, None)


def _tests(module: ModuleType) -> list[str]:
    return [name for name in vars(module) if name.startswith("test_")]


@pytest.mark.replicaset
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(
    kitchen: Path, mongod: Cluster, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """The recipe's tests pass, on the real engine."""
    monkeypatch.setenv(SERVER, mongod.uri)
    module = import_module(f"test_{recipe}")
    assert _tests(module)
    for name in _tests(module):
        getattr(module, name)()


def test_there_are_five_and_each_is_tested() -> None:
    """Five recipes, each with a test beside it, and one handler of its own name."""
    assert len(RECIPES) == 5
    assert FILES.keys() == {f"{p}{name}.py" for name in RECIPES for p in ("", "test_")}
    for name in RECIPES:
        assert f"async def {name}(job: Job) -> Result:" in FILES[f"{name}.py"]


def test_what_a_lab_can_do_is_told() -> None:
    """The table names all that a lab offers, and nothing else."""
    (table,) = re.findall(r"^\| in a lab.*?\n\n", COOKBOOK, re.MULTILINE | re.DOTALL)
    told = set(re.findall(r"`([a-z_]+)[(`]", re.sub(r"\([^)]*=[^)]*\)", "(", table)))
    methods = {n for n, _ in inspect.getmembers(Lab, inspect.isroutine) if not n.startswith("_")}
    assert told - {"job", "after"} >= methods
    assert {name for name in told if hasattr(Lab, name)} <= methods
