"""The running demo in a real browser: runs turn green, and what goes wrong shows by itself."""

from __future__ import annotations

import os
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
    """The demo's sites, the address of the page, and a browser."""

    world: World
    address: str
    browser: Any

    def visit(self, path: str, errors: list[str]) -> Any:
        page = visit(self.browser, self.address + path, errors)
        page.set_default_timeout(FOUND)
        page.wait_for_selector('#live[data-state="on"]')
        page.evaluate("window.first = true")
        return page

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
        address = world.serve_page()
        assert address is not None
        yield Watched(world, address, running)


def test_the_demo_is_watched(watched: Watched) -> None:
    """No page is loaded twice, and nothing is asked of it but to be looked at."""
    errors: list[str] = []
    now, runs = watched.visit("/", errors), watched.visit("/runs", errors)
    _all_listen(now, watched)
    _every_run_turns_green(watched, runs)
    _a_flipped_byte_is_in_the_history(watched, errors)
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
    assert page.evaluate("window.first")


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
