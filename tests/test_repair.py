"""Copies that went bad are repaired by real listeners: what is wrong is brought again, no more."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import define
from pymongo import MongoClient
from pymongo.collection import Collection

from caxev.demo.world import World
from tests.faults.campaign import new_world, raw_only
from tests.test_ssh import flip

pytestmark = [pytest.mark.replicaset, pytest.mark.sshd, pytest.mark.xdist_group("repair")]

PATIENCE = 240.0  # seconds
SIZE = 3_000_000


@define
class Ground:
    """Three sites that have copied a run, and are idle."""

    world: World
    runs: Collection[dict[str, Any]]
    run: Any
    number: int

    def entry(self, host: str) -> dict[str, Any]:
        document = self.runs.find_one({"_id": self.run})
        assert document is not None
        return next((one for one in document["data"] if one["host"] == host), {})

    def is_good(self, host: str) -> bool:
        return self.entry(host).get("status") == "transferred"

    def wait(self, what: str, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < deadline, f"{what}: {self.runs.find_one({'_id': self.run})}"
            time.sleep(0.05)

    def verify_again(self, host: str) -> None:
        """Have a person doubt a copy."""
        self.runs.update_one(
            {"_id": self.run, "data.host": host}, {"$set": {"data.$.status": "verifying"}}
        )

    def files(self, host: str) -> list[Path]:
        return sorted(Path(self.entry(host)["location"]).iterdir())

    def largest(self, host: str) -> Path:
        return max(self.files(host), key=lambda file: (file.stat().st_size, file.name))

    def contents(self, host: str) -> list[bytes]:
        return [file.read_bytes() for file in self.files(host)]

    def moved(self, site: str) -> list[int]:
        """The bytes of each transfer of the run that the site's listener has logged."""
        log = (self.world.directory / "logs" / f"{site}.log").read_text()
        return [int(count) for count in re.findall(rf"run {self.number} .*moved (\d+) of", log)]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Three sites with their listeners, for all tests here."""
    with new_world(sites=raw_only({})) as world:
        for site in world.sites:
            world.listen(site)
        yield world


@pytest.fixture
def ground(world: World) -> Iterator[Ground]:
    with MongoClient[dict[str, Any]](world.mongod.uri, w="majority") as client:
        runs = client["run"]["runs_new"]
        number = 1 + runs.count_documents({})
        document = world.take_run("lngs", number, SIZE, seed=number)
        runs.insert_one(document)
        ground = Ground(world, runs, document["_id"], number)
        ground.wait("not copied", lambda: all(map(ground.is_good, world.sites)))
        yield ground


def test_a_flipped_bit_costs_one_file(ground: Ground) -> None:
    """Found by a re-check, the bad file alone is fetched again, and the copy is good as before."""
    before = ground.contents("chicago")
    bad = ground.largest("chicago")
    flip(bad, 100)
    ground.verify_again("chicago")
    ground.wait("not repaired", lambda: ground.entry("chicago").get("repairs") == 1)
    ground.wait("not good", lambda: ground.is_good("chicago"))
    assert ground.contents("chicago") == before
    assert ground.moved("chicago") == [sum(map(len, before)), bad.stat().st_size]
    assert not ground.entry("chicago")["checksumproblem"]
    assert ground.entry("chicago")["error"] is None


def test_a_damaged_source_is_passed_over(ground: Ground) -> None:
    """The same file is bad at the first source too: nothing of it is taken.

    The first is read again by its own site, found to be bad and repaired as well.
    """
    before = ground.contents("chicago")
    flip(ground.largest("chicago"), 100)
    flip(ground.largest("lngs"), 200)
    ground.verify_again("chicago")
    ground.wait("not repaired", lambda: ground.entry("chicago").get("repairs") == 1)
    ground.wait("not good", lambda: ground.is_good("chicago"))
    assert ground.contents("chicago") == before
    assert ground.entry("chicago")["manifest"] == ground.entry("stockholm")["manifest"]
    ground.wait("not repaired", lambda: ground.entry("lngs").get("repairs") == 1)
    ground.wait("not good", lambda: ground.is_good("lngs"))
    assert ground.contents("lngs") == before


def test_the_first_good_copy_repairs_those_found_bad_before(ground: Ground) -> None:
    """None was within reach when they were found: they wait for no further event of their own."""
    hosts = ("chicago", "lngs", "stockholm")
    before = {file.name: file.read_bytes() for file in ground.files("lngs")}
    for host in hosts:
        flip(ground.largest(host), 100)
    ground.verify_again("chicago")
    ground.wait(
        "not all found", lambda: all(ground.entry(host)["status"] == "error" for host in hosts)
    )
    place = Path(ground.entry("lngs")["location"])
    place.mkdir(exist_ok=True)
    for name, content in before.items():
        (place / name).write_bytes(content)
    ground.verify_again("lngs")
    ground.wait("not repaired", lambda: all(map(ground.is_good, hosts)))
    assert all(ground.contents(host) == list(before.values()) for host in hosts)


def test_a_copy_that_nobody_can_mend_is_left_to_a_person(ground: Ground) -> None:
    """Bad at every place: each is found to be, and says so; nothing is deleted."""
    hosts = ("chicago", "lngs", "stockholm")
    for host in hosts:
        flip(ground.largest(host), 100)
    ground.verify_again("chicago")
    ground.wait(
        "not all found", lambda: all(ground.entry(host)["status"] == "error" for host in hosts)
    )
    time.sleep(1)  # nothing more may follow
    assert [ground.entry(host)["status"] for host in hosts] == ["error"] * 3
    assert all("differs" in ground.entry(host)["error"] for host in hosts)
    names = {host: Path(ground.entry(host)["location"]) for host in hosts}
    for place in names.values():  # under its name, or as the partial that a repair has made of it
        assert place.exists() or place.with_name(f".caxev-part-{place.name}").exists()
