"""`caxev.testing`: what a handler's author is promised."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from caxev import TRANSFERRED, CopyKey, Job, RunUpdate, on, tag
from caxev.core.ledger import State
from caxev.core.registry import recorded
from caxev.database import Unreachable
from caxev.handlers import alarms, checksum, transfer
from caxev.testing import Lab, lab
from caxev.testing.lab import SERVER
from tests import lab_reactions
from tests.mongod import Cluster

pytestmark = pytest.mark.replicaset


@pytest.fixture(autouse=True)
def server(mongod: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session's server is used: only the test of that starts one of its own."""
    monkeypatch.setenv(SERVER, mongod.uri)


@lab(lab_reactions.count, sites=2)
async def test_a_reaction_runs(here: Lab) -> None:
    """A change, the real engine, and the run as it is then; each of two sites reacts once."""
    run = await here.new_run(files={"a": b"abc"})
    assert await here.settle() == []
    assert "good" not in (await here.look(run)).document
    await here.put(run, "chicago")
    assert (here.path(run, "chicago") / "a").read_bytes() == b"abc"
    await here.tag(run, "count")
    assert await here.settle() == []
    assert (await here.look(run)).document["good"] == 2
    assert [row.handler for row in await here.history(run)] == ["count"] * 2
    assert {row.site for row in await here.history(handler="count")} == {*here.names}


@lab(lab_reactions)
async def test_all_reactions_of_a_module(here: Lab, tmp_path: Path) -> None:
    """A module stands for all of its reactions, heavy work runs in a worker, and fixtures work."""
    assert tmp_path
    run = await here.new_run(files={"a": b"abc", "deep/b": b"de"})
    await here.settle()
    run = await here.look(run)
    assert (run.document["raw_size_byte"], run.tags) == (5, ("at-lngs",))


@lab(lab_reactions.wait)
async def test_time_passes(here: Lab) -> None:
    """What waits for five days is owed, and done when five days have passed; then time is back."""
    run = await here.new_run(tags=["late"])
    (owed,) = await here.settle()
    assert (owed.note, owed.state) == ("it is young", State.PENDING)
    here.later(days=4)
    assert await here.settle()
    here.later(days=1, seconds=1)
    assert await here.settle() == []
    assert (await here.look(run)).document["old"]


@lab(lab_reactions.fail)
async def test_failures_and_alarms_are_seen(here: Lab) -> None:
    """A reaction that failed is owed, with its reason, and people would have been told."""
    run = await here.new_run(tags=["hopeless"])
    (owed,) = await here.settle()
    assert (owed.state, owed.run) == (State.FAILED, run.id)
    (alarm,) = await here.alarms()
    assert alarm.details["why"].startswith("no hope for ")


@lab(lab_reactions.note)
async def test_killed_at_a_point(here: Lab) -> None:
    """A listener that is killed, wherever: the next one pays, and the effect is there once.

    A command that writes passes a point named after the function that gave it.
    """
    await here.new_run(at="lngs")
    passed = await here.points()
    assert "engine:database.update.settle" in passed
    assert "engine:database.snapshots.Recording._record.commitTransaction" in passed
    assert "engine:database.leases.Leases._take_over.findAndModify" in passed
    assert "note:through" in passed
    # At the commit it dies in a transaction that holds the site's document.
    for point in ("ingest.commit", "update.settle"):
        run = await here.new_run(at="lngs")
        here.crash_at(f"engine:database.{point}")
        assert await here.settle() == []
        assert (await here.look(run)).tags == ("at-lngs",)


def test_every_write_has_a_point(tmp_path: Path) -> None:
    """Whatever a handler does to files passes a point before it.

    What a library does passes none, nor does Python when it keeps a module that it has compiled.
    """
    source, log = tmp_path / "mine.py", tmp_path / "points"
    (tmp_path / "fresh.py").touch()
    source.write_text(
        "import os, shutil\nfrom pathlib import Path\nfrom caxev import failpoints\n"
        "failpoints.scope.set('mine')\n"
        "def act(top):\n"
        "    import fresh\n"
        "    (top / 'a').mkdir()\n    (top / 'a' / 'b').touch()\n"
        "    os.replace(top / 'a', top / 'c')\n    shutil.rmtree(top / 'c')\n"
        f"act(Path({str(tmp_path)!r}))\n"
    )
    env = {**os.environ, "CAXEV_CRASH_LOG": str(log)}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    subprocess.run([sys.executable, source], env=env, check=True)  # our own file
    assert any(tmp_path.rglob("fresh.*.pyc"))
    passed = [line.split()[1] for line in log.read_text().splitlines()]
    writes = ("mkdir", "rename", "remove", "rmdir")
    assert passed == [f"mine:__main__.act.{write}" for write in writes]


@lab(lab_reactions.count)
async def test_a_crash_that_does_not_come_is_told(here: Lab) -> None:
    """A point that is never passed: the test fails, and names those that were."""
    await here.new_run(tags=["count"])
    here.crash_at("count:database.nowhere")
    with pytest.raises(AssertionError, match=r"(?s)never passed.*engine:database.ingest.commit"):
        await here.settle()


@lab(lab_reactions.count)
async def test_a_reply_gets_lost(here: Lab) -> None:
    """An error at a failpoint is raised once; the reaction is done all the same.

    And a NaN is not equal to itself: a run that has one must not count as ever changing.
    """
    run = await here.new_run(tags=["count"], livetime=float("nan"))
    here.fail_at("engine:database.claim.after", Unreachable("the connection broke"))
    assert await here.settle() == []
    assert (await here.look(run)).document["good"] == 0


@lab(
    transfer,
    checksum,
    alarms,
    sites={"lngs": {"master": ["raw"]}, "chicago": {"download_options": ["lngs"]}},
)
async def test_shipped_reactions(here: Lab) -> None:
    """Keys of sites.json count: chicago pulls and verifies; of a bad copy people are told."""
    run = await here.new_run(files={"a": b"abc"})
    assert await here.settle() == []
    run = await here.look(run)
    copy = run.copy(CopyKey("raw", "chicago"))
    assert copy is not None
    assert copy.status == TRANSFERRED
    assert (here.path(run, "chicago") / "a").read_bytes() == b"abc"
    run = await here.change(run, "chicago", "lost", checksumproblem=True, error="a differs")
    await here.settle()
    (alarm,) = await here.alarms()
    assert alarm.summary == f"the copy of {run}, raw at chicago, is not what it should be"
    assert alarm.details["why"] == "a differs"
    await here.change(run, "chicago", TRANSFERRED, checksumproblem=False)
    await here.settle()
    assert await here.alarms() == []


async def test_without_a_decorator(mongod: Cluster) -> None:
    """As a context manager, on a server of one's own; a function that is no reaction is refused."""

    @on(tag("go"))
    async def go(job: Job) -> RunUpdate:
        return RunUpdate.set_fields(job.run, gone=True)

    recorded.pop()
    with pytest.raises(TypeError, match="is no reaction"):
        lab(go)
    async with lab(lab_reactions.count, mongo_uri=mongod.uri) as here:
        run = await here.new_run(tags=["count"])
        run = await here.set(run, processor__DEFAULT__gains=[1])
        assert run.document["processor"] == {"DEFAULT": {"gains": [1]}}
        await here.settle()
        assert (await here.look(run)).document["good"] == 0
        with pytest.raises(LookupError, match="not what this expects"):
            await here.tag(run, "count")


def test_nothing_but_pytest_is_needed(tmp_path: Path) -> None:
    """Without configuration, plugins and server: a lab starts its own, and leaves nothing."""
    (tmp_path / "test_it.py").write_text(EXAMPLE)
    said = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**_environment(), "TMPDIR": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 passed" in said.stdout, said.stdout + said.stderr
    assert not list(tmp_path.glob("caxev-lab-*"))


def _environment() -> dict[str, Any]:
    import os

    ours = ("CAXEV_LAB", "PYTEST_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


EXAMPLE = """
import pytest
from caxev import Job, RunUpdate, on, tag
from caxev.testing import lab

@on(tag("go"))
async def went(job: Job) -> RunUpdate:
    return RunUpdate.set_fields(job.run, went=job.run.document["times"])

@pytest.mark.parametrize("times", [3])
@lab(went)
async def test_it(lab, times):
    run = await lab.new_run(tags=["go"], times=times)
    lab.crash_at("engine:database.update.settle")
    assert await lab.settle() == []
    assert (await lab.look(run)).document["went"] == 3
"""
