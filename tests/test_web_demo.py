"""The running demo in a real browser: runs turn green, what goes wrong shows and is retried."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pymongo import MongoClient

from caxev.demo.play import BIRTH, PROTECTED
from caxev.demo.world import SITES, World
from tests.browser import browser, visit
from tests.engine import PATIENCE
from tests.mongod import Cluster

pytestmark = [pytest.mark.replicaset, pytest.mark.browser]
RUNS = 3
SIZE = 300_000
FOUND: int = int(1000 * PATIENCE)
"""Milliseconds that a browser waits for what is to appear."""


class Watched(NamedTuple):
    """The demo's sites, the link to the page by which we act, and a browser."""

    world: World
    link: str
    browser: Any

    def visit(self, path: str, errors: list[str]) -> Any:
        """Open a page as somebody who has not the link."""
        return _followed(visit(self.browser, self.link.partition("/login")[0] + path, errors))

    def caxev(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "caxev", *arguments]
        environment = {**os.environ, **self.world.environment}
        subprocess.run(command, env=environment, check=False, timeout=PATIENCE)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with (
        World(tmp_path_factory.mktemp("demo"), SITES, server=Cluster) as world,
        browser() as running,
    ):
        for site in world.listening:
            world.listen(site)
        link = world.serve_page()
        assert link is not None
        yield Watched(world, link, running)


def _followed(page: Any) -> Any:
    """Wait until a page follows what changes, and mark it: a reload would lose the mark."""
    page.set_default_timeout(FOUND)
    page.wait_for_selector('#live[data-state="on"]')
    page.evaluate("window.first = true")
    return page


def test_the_demo_is_watched(watched: Watched) -> None:
    """No page is loaded twice, and nothing is asked of it but to be looked at."""
    errors: list[str] = []
    now, runs = watched.visit("/", errors), watched.visit("/runs", errors)
    _all_listen(now, watched)
    _every_run_turns_green(watched, runs)
    _a_flipped_byte_is_in_the_history(watched, errors)
    _a_failed_reaction_is_retried(watched, now, errors)
    _a_killed_listener_turns_its_light_red(watched, now)
    assert errors == []
    _the_database_is_away_and_comes_back(watched, now)
    assert all(page.evaluate("window.first") for page in (now, runs))


def _all_listen(now: Any, watched: Watched) -> None:
    for site in watched.world.listening:
        now.wait_for_selector(f"tr.good:has-text('{site}')")
    # Each reports its disks and its version as well.
    now.wait_for_selector(".sites .disk .bar >> nth=2")


def _every_run_turns_green(watched: Watched, runs: Any) -> None:
    world = watched.world
    with MongoClient[dict[str, Any]](world.mongod.uri) as client:
        collection = client[world.settings.database][world.settings.collection]
        for number in range(1, RUNS + 1):
            document = world.take_run(BIRTH, number, SIZE, number)
            collection.insert_one({**document, "tags": [{"name": PROTECTED}]})
    for number in range(1, RUNS + 1):
        row = f"tbody tr:has(b:text-is('{number}'))"
        for site in world.listening:
            runs.wait_for_selector(f"{row} td[data-site='{site}'] .dotmark.good")


def _a_flipped_byte_is_in_the_history(watched: Watched, errors: list[str]) -> None:
    with MongoClient[dict[str, Any]](watched.world.mongod.uri) as client:
        settings = watched.world.settings
        run = client[settings.database][settings.collection].find_one({"number": 1})
        assert run is not None
    (place,) = [
        Path(one["location"])
        for one in run["data"]
        if (one["type"], one["host"]) == ("raw", "stockholm")
    ]
    page = watched.visit(f"/runs/{run['_id']}", errors)
    file = min(one for one in place.rglob("*") if one.is_file())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.chmod(0o644)
    file.write_bytes(content)
    watched.caxev("verify", "--deep", "--run", "1", "--site", "stockholm")
    page.wait_for_selector(".history .bad:has-text('found damaged')")
    page.wait_for_selector(".history .good:has-text('repaired')")
    # What the job that made peaks at chicago was, as far as the database knows.
    page.wait_for_selector("section:has(#h-jobs) tr:has-text('chicago'):has-text('local') .good")
    assert page.evaluate("window.first")


def _a_failed_reaction_is_retried(watched: Watched, now: Any, errors: list[str]) -> None:
    """A pull fails on what is in its way; a person takes that away, and retries from the page."""
    world, number = watched.world, RUNS + 1
    document = world.take_run(BIRTH, number, SIZE, number)
    in_the_way = world.dir_of("chicago", "dir_raw") / document["name"]
    in_the_way.mkdir()
    (in_the_way / "notes").write_text("of something else")
    with MongoClient[dict[str, Any]](world.mongod.uri) as client:
        runs = client[world.settings.database][world.settings.collection]
        run = runs.insert_one({**document, "tags": [{"name": PROTECTED}]}).inserted_id
    now.wait_for_selector("#failures:has-text('is not replaced')")

    acting = _followed(visit(watched.browser, watched.link, errors))
    address = f"{watched.link.partition('/login')[0]}/runs/{run}"
    acting.goto(address)
    copy, wanted = "tr:has(th:text-is('raw')):has-text('chicago')", "section:has(#h-open)"
    _followed(acting).wait_for_selector(f"{wanted} tr:has-text('pull') .bad")
    acting.wait_for_selector(f"{copy} .bad")
    shutil.rmtree(in_the_way)

    other = acting.context.new_page()
    other.goto(address)
    other.click(".acts summary")
    other.click(".acts >> text=Retry")
    assert "failed at chicago" in other.inner_text("section:has(#h-plan)")
    other.click("text=Retry: 1 run")
    other.wait_for_selector("text=asked of chicago")

    acting.wait_for_selector(f"{copy} .good")
    acting.wait_for_selector(f"{wanted} >> text=Nothing is left to do.")
    assert acting.evaluate("window.first")
    acting.context.close()


def _a_killed_listener_turns_its_light_red(watched: Watched, now: Any) -> None:
    listener = watched.world.listeners["chicago"]
    listener.kill()
    listener.wait()
    now.wait_for_selector("tr.bad:has-text('chicago'):has-text('no listener')")
    assert "Somebody has to act" in now.inner_text("#summary")
    watched.world.listen("chicago")
    now.wait_for_selector("tr.good:has-text('chicago')")


def _the_database_is_away_and_comes_back(watched: Watched, now: Any) -> None:
    mongod = watched.world.mongod
    assert isinstance(mongod, Cluster)
    mongod.kill(0)
    now.wait_for_selector("#summary:has-text('No answer since')")
    assert "Somebody has to act" in now.inner_text("#summary")
    mongod.restart(0)
    now.wait_for_selector("#summary:not(:has-text('No answer since'))")
    now.wait_for_selector("tr.good:has-text('lngs')")
