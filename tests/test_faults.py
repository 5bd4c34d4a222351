"""The short forms of the fault campaigns, and the laws of their own parts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
from attrs import asdict, evolve
from trio.lowlevel import current_statistics

from caxev import metrics
from caxev.config import ConfigError
from caxev.core.clock import utcnow
from caxev.core.ledger import Reaction
from caxev.core.model import (
    YES,
    CopyKey,
    Event,
    Run,
    Tag,
)
from caxev.database import Ingest
from caxev.testing.mongod import find_mongod
from tests import engine
from tests import sshd as servers
from tests.conftest import Database as Named
from tests.faults.__main__ import main
from tests.faults.campaign import (
    BIRTH,
    MUST_BE_0,
    ROOT,
    TWO,
    Born,
    End,
    Ground,
    compare,
    play,
    raw_only,
)
from tests.faults.cax import SITES as BESIDE_CAX
from tests.faults.cax import beside_cax
from tests.faults.cax_bridge import GET_IT, SLEEPS, VERSION, Cax
from tests.faults.clocks import RIGHT, WallClocks, clocks, library
from tests.faults.clocks import SITES as WRONG
from tests.faults.crash import Fault, crash, faults_in, missed, waves
from tests.faults.database import Fronted, database
from tests.faults.deletion import SITES as DELETING
from tests.faults.deletion import deletion
from tests.faults.documents import documents_campaign
from tests.faults.fuzz import fuzz
from tests.faults.hostile import DEEDS
from tests.faults.kill import kill
from tests.faults.load import in_turn
from tests.faults.races import races
from tests.faults.real_cax import unreadable_files
from tests.faults.rucio import rucio
from tests.faults.scenes import PURGED, SCENES
from tests.faults.soak import SPARE, Held, grown, soak
from tests.faults.transfers import flip_partial, transfers
from tests.faults.update import update
from tests.mongod import Cluster
from tests.places import partial_of
from tests.rucio_server import missing

GOOD = {"type": "raw", "host": "lngs", "status": "transferred", "manifest": "b3:1"}
BORN = Born("id", 1, "b3:1")
END = End.of(Run.from_document({"_id": "id", "data": [GOOD], "tags": [{"name": "seen"}]}))


def short(
    campaign: Callable[[Ground], Awaitable[Mapping[str, Any]]],
    sites: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    server: Callable[[Path], Cluster] = Cluster,
) -> Mapping[str, Any]:
    """Play a campaign, in which nothing is processed."""
    try:
        find_mongod()
    except ConfigError as error:
        pytest.skip(str(error))
    return play(campaign, server=server, sites=raw_only(sites or {}))


def problems(data: list[dict[str, str]], *tags: str) -> list[str]:
    document = {"_id": "id", "data": data, "tags": [{"name": name} for name in tags]}
    return [problem.kind for problem in compare(Run.from_document(document), BORN, END)]


def test_the_same_end_is_no_problem() -> None:
    """A run at its end compares equal with it."""
    assert problems([GOOD], "seen") == []


@pytest.mark.parametrize(
    ("data", "tags", "kind"),
    [
        ([], ["seen"], "lost"),
        ([{**GOOD, "status": "verifying"}], ["seen"], "lost"),
        ([GOOD], [], "lost"),
        ([GOOD, GOOD], ["seen"], "duplicated"),
        ([GOOD], ["seen", "seen"], "duplicated"),
        ([{**GOOD, "manifest": "b3:2"}], ["seen"], "corrupt_accepted"),
        ([GOOD, {**GOOD, "host": "chicago"}], ["seen"], "lost"),
    ],
)
def test_a_problem_is_called_by_its_name(
    data: list[dict[str, str]], tags: list[str], kind: str
) -> None:
    """Missing, or not gone: lost. There twice: duplicated. Not what the source is: corrupt."""
    assert problems(data, *tags) == [kind]


def test_points_are_read_from_the_log() -> None:
    """Each point is tried at its first passing, and at the middle one of the busiest process."""
    log = "1 a\n1 b\n1 b\n1 b\n2 a\n2 b\n"
    assert list(faults_in("lngs", log)) == [
        Fault("lngs", "a", 1),
        Fault("lngs", "b", 1),
        Fault("lngs", "b", 2),
    ]


def test_a_handler_that_did_not_run_through_is_missed() -> None:
    """What a handler writes on the way, or what the engine does, is not a handler's end."""
    places = [("lngs", point) for point in ("push:through", "pull:x", "engine:through")]
    assert missed(places, ("push", "pull", "erase")) == ["erase", "pull"]


def test_every_fault_is_in_one_wave() -> None:
    """Waves hold all faults once, apart one each, together at most one for each site."""
    faults = [Fault(site, point, 1) for site in ("lngs", "chicago") for point in "abc"]
    apart, together = (list(waves(faults, together=value)) for value in (False, True))
    assert [wave[0] for wave in apart] == faults
    assert len(together) == 3
    assert {fault for wave in together for fault in wave} == set(faults)
    assert all(len({fault.site for fault in wave}) == len(wave) for wave in together)


def test_the_birth_copy_is_part_of_the_end() -> None:
    """An end names every copy of the run."""
    assert END.copies == {CopyKey("raw", "lngs"): "transferred"}


def test_faults_come_in_turn() -> None:
    """Each as often as any other, in an order that the seed chooses unless it is given."""
    assert list(in_turn(("a", "b"), 3, Random(1), shuffled=False)) == ["a", "b", "a"]
    assert sorted(in_turn(("a", "b", "c"), 6, Random(1), shuffled=True)) == [*"aabbcc"]


def test_any_documents_can_be_looked_at() -> None:
    """Whatever BSON holds makes a run and a look, and the laws of `diff` hold between any two."""
    assert fuzz(1000) >= 1000


REST = Held(memory=100 << 20, descriptors=40, threads=9, tasks=30, workers=2, ledger_per_run=7.0)


def test_a_little_more_is_no_growth() -> None:
    """Pools fill slowly: up to its spare each figure may be higher, and lower by any."""
    assert list(grown(REST, REST)) == []
    more = (getattr(REST, name) + spare for name, spare in asdict(SPARE).items())
    assert list(grown(REST, Held(*more))) == []
    assert list(grown(REST, Held(0, 0, 0, 0, 0, 0.0))) == []


@pytest.mark.parametrize("name", asdict(SPARE))
def test_each_figure_s_growth_is_told(name: str) -> None:
    """More than its spare of any of them is told, by its name."""
    more = evolve(REST, **{name: getattr(REST, name) + getattr(SPARE, name) + 1})
    assert [what.split()[0] for what in grown(REST, more)] == [name]


def test_what_a_process_leaks_is_told() -> None:
    """Files, threads, memory and tasks that are kept on purpose are seen in a living process."""
    with subprocess.Popen(
        [sys.executable, "-c", LEAKING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        port = int(process.stdout.readline())
        before = Held.by(process.pid, port, 7.0)
        process.stdin.write("\n")
        process.stdin.flush()
        process.stdout.readline()
        told = [what.split()[0] for what in grown(before, Held.by(process.pid, port, 7.0))]
        process.stdin.close()
    assert told == ["memory", "descriptors", "threads", "tasks", "workers"]


LEAKING = """
import os, subprocess, sys, threading
from prometheus_client import start_http_server
from caxev import metrics
server, _ = start_http_server(0, addr="127.0.0.1")
metrics.tasks.labels("lngs").set(30)
print(server.server_port, flush=True)
sys.stdin.readline()
memory = bytearray(os.urandom(20 << 20))
files = [open(os.devnull) for _ in range(8)]
for _ in range(6):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
metrics.tasks.labels("lngs").set(36)
child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
print("leaked", flush=True)
sys.stdin.readline()
child.communicate()
"""


@pytest.mark.replicaset
async def test_a_listener_counts_its_tasks(database: Named) -> None:
    """What it says is what trio counts, with the test's own tasks."""
    async with engine.opened(database) as db, engine.listener(db, engine.options_for(database, [])):
        counted = metrics.tasks.labels("lngs")._value.get
        await engine.until(lambda: counted() == current_statistics().tasks_living)


def assert_nothing_happened(figures: Mapping[str, Any], faults: int) -> None:
    assert figures["faults"] >= faults
    assert figures["runs"] > 0
    wrong = {name: figures[name] for name in MUST_BE_0 if figures.get(name)}
    wrong.pop("late", None)  # times are the machine's; the long forms tell
    wrong.pop("handlers_missed", None)  # no scene has all of them act
    assert wrong == {}


def test_a_wrong_clock_moves_no_wait(tmp_path: Path) -> None:
    """A process reads the time that its clock is set to at that moment; its sleep stays right."""
    if (found := library()) is None:
        pytest.skip("no libfaketime (Debian: faketime)")
    wall = WallClocks(found, tmp_path / "clocks")
    wall.set("lngs", "-1h")
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPING],
        env={**os.environ, **wall.environment("lngs")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert float(process.stdout.readline()) == pytest.approx(time.time() - 3600, abs=60)
        wall.set("lngs", RIGHT)
        process.stdin.close()
        now, slept = map(float, process.stdout.readline().split())
    assert now == pytest.approx(time.time(), abs=60)
    assert slept >= 0.1


SLEEPING = """
import sys, time
print(time.time(), flush=True)
sys.stdin.read()
now, before = time.time(), time.monotonic()
time.sleep(0.1)
print(now, time.monotonic() - before)
"""


@pytest.mark.replicaset
@pytest.mark.campaign
def test_wrong_clocks() -> None:
    """Behind, ahead, or set meanwhile: the end is that of right clocks; nobody waits for one."""
    if library() is None:
        pytest.skip("no libfaketime (Debian: faketime)")
    figures = short(partial(clocks, rounds=1, seed=1, runs=2, flows=1), WRONG)
    assert_nothing_happened(figures, 3)
    assert figures["alarms"] == 3


@pytest.mark.replicaset
@pytest.mark.campaign
def test_broken_databases() -> None:
    """Whatever the database does, each change is reacted to once, and no listener ends."""
    faults = ("primary_killed", "aborted")
    campaign = partial(database, rounds=2, seed=1, only=faults, long=False)
    assert_nothing_happened(short(campaign, TWO, server=Fronted), 2)


@pytest.mark.replicaset
def test_a_time_out_shows_entries_and_reactions() -> None:
    """A campaign that comes to no end somewhere else can be understood from its message."""

    async def waits_in_vain(ground: Ground) -> dict[str, Any]:
        born = await ground.take(1000)
        taken = await ground.database.acquire(BIRTH, "me", 60.0, utcnow())
        assert taken is not None
        event = Event(born.id, Tag("go"), None, YES)
        slow = Reaction(BIRTH, event, "slow", lane="a", generation=1, at=utcnow())
        await ground.database.ingest(taken[0], Ingest({}, [slow]), utcnow())

        async def never() -> bool:
            return False

        with pytest.raises(TimeoutError, match=r"no end \(after 0 s\)") as raised:
            await ground.until(never, "no end", within=0.1)
        return {"message": str(raised.value), "run": born.id}

    found = short(waits_in_vain)
    message, run = found["message"], found["run"]
    assert "raw at lngs is verifying" in message
    assert f"lngs: slow of tag 'go': yes of run {run} is pending, due at " in message


@pytest.mark.replicaset
@pytest.mark.campaign
def test_broken_documents() -> None:
    """Whatever stands in the collection, the good runs are copied, and no listener ends."""
    figures = short(partial(documents_campaign, rounds=1, seed=1, long=False), TWO)
    assert_nothing_happened(figures, 40)


@pytest.mark.replicaset
@pytest.mark.campaign
def test_killed_during_large_transfers_and_races() -> None:
    """Killed while it moves bytes, or wanted by several ways and people: there is one of each copy.

    It is verified, and nothing partial is named.
    """

    async def one_after_the_other(ground: Ground) -> dict[str, Mapping[str, Any]]:
        return {
            "kill": await kill(ground, rounds=2, size=30_000_000, seed=1),
            "races": await races(ground, rounds=2, seed=1, runs=2, requests=5),
        }

    for figures in short(one_after_the_other).values():
        assert_nothing_happened(figures, 1)


def test_only_what_has_come_is_flipped(tmp_path: Path) -> None:
    """Where nothing has, or only what is still to be written is there, nothing is harmed."""
    source, target = tmp_path / "run", tmp_path / "there" / "run"
    source.mkdir()
    data = os.urandom(200_000)
    (source / "data").write_bytes(data)
    assert not flip_partial(target, source)
    partial = partial_of(target)
    partial.mkdir(parents=True)
    (partial / "data").write_bytes(bytes(150_000))
    assert not flip_partial(target, source)
    (partial / "data").write_bytes(bytes(100_000) + data[100_000:150_000])
    before = (partial / "data").stat()
    assert flip_partial(target, source)
    after = (partial / "data").stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    found = (partial / "data").read_bytes()
    assert [at for at in range(100_000, 150_000) if found[at] != data[at]] == [131_072]


@pytest.mark.replicaset
@pytest.mark.campaign
def test_broken_ways() -> None:
    """A bit that flips on the disk before it has been verified: each copy ends verified."""
    only = ("target_flipped",)
    figures = short(partial(transfers, rounds=1, seed=1, only=only, long=False), TWO)
    assert_nothing_happened(figures, 1)


@pytest.mark.rucio
@pytest.mark.replicaset
@pytest.mark.campaign
def test_a_catalogue_that_is_killed() -> None:
    """Its server killed during uploads, each run is whole in the catalogue in the end."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    assert_nothing_happened(short(partial(rucio, rounds=1, seed=1, runs=3, kills=1)), 1)


@pytest.mark.replicaset
@pytest.mark.campaign
def test_soak() -> None:
    """Under mixed load with faults nothing is lost."""
    figures = {**short(partial(soak, seconds=0, seed=18, rounds=2), TWO)}
    del figures["grown"]  # two rounds are no base line: pools may still grow to their size
    assert_nothing_happened(figures, 1)


@pytest.mark.replicaset
@pytest.mark.campaign
def test_killed_at_points() -> None:
    """Killed anywhere, every site comes to the end that it would have come to."""
    every = "database.update."  # points that each handler passes
    campaign = partial(crash, rounds=0, seed=1, points=3, only=every, together=True, runs=1)
    figures = short(campaign, PURGED)
    assert_nothing_happened(figures, 3)
    assert figures["reached"] + len(figures["unreached"]) == 3
    assert figures["points"] == 3
    assert not {"pull", "push", "checksum", "purge", "erase"} & {*figures["handlers_missed"]}


@pytest.mark.replicaset
@pytest.mark.campaign
def test_killed_where_copies_age() -> None:
    """Killed while rot, a stalled copy and an unwanted version are looked after, all are."""
    aged = SCENES["aged"]
    campaign = partial(crash, rounds=0, seed=1, points=3, together=True, act=aged.act, runs=1)
    figures = short(campaign, aged.sites)
    assert_nothing_happened(figures, 1)
    ran = {"correct", "merge", "patrol", "purge_processed", "repair", "set_permission", "stalled"}
    assert not ran & {*figures["handlers_missed"]}


@pytest.mark.sshd
@pytest.mark.campaign
@pytest.mark.parametrize(("only", "code", "rounds"), [((), 0, 10), (("--only", "careless"), 1, 40)])
def test_an_attacker_gets_nothing_from_outside(only: Sequence[str], code: int, rounds: int) -> None:
    """Who may write in the data directories; and the campaign notices one who is obeyed.

    That one is not obeyed in every round: it is a matter of the moment.
    """
    if (reason := servers.missing()) is not None:
        pytest.skip(reason)
    command = [sys.executable, "-m", "tests.faults", "hostile", "--json", *only]
    command += ["--rounds", str(rounds)]
    played = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert played.returncode == code, played.stderr
    figures = json.loads(played.stdout)
    assert bool(figures["outside"]) == bool(code)
    assert figures["faults"] > 10
    assert all(figures["done"].get(name) for name in only[1:] or DEEDS)


@pytest.mark.replicaset
@pytest.mark.campaign
def test_deleted_in_a_race_and_beside_a_bad_master() -> None:
    """One of two may delete, killed in the midst of it or not; a bad master costs no good copy."""
    assert_nothing_happened(short(partial(deletion, rounds=2, seed=1), DELETING), 2)


@pytest.mark.replicaset
@pytest.mark.campaign
def test_moved_to_another_version_and_back() -> None:
    """Leader and stand-by, one after the other, beside sites of the old version: all is done."""
    assert_nothing_happened(short(partial(update, rounds=1, pause=20.0, control=False), TWO), 4)


@pytest.mark.replicaset
@pytest.mark.campaign
def test_beside_cax() -> None:
    """With cax at one of three sites each copy comes right, and nothing is done again and again."""
    assert_nothing_happened(short(partial(beside_cax, rounds=2, seed=1, runs=1), BESIDE_CAX), 2)


def made_cax(directory: Path, version: str = VERSION, main: str = "") -> Path:
    """A checkout as the campaign wants it, of a program of ours."""
    (directory / "cax").mkdir(parents=True)
    (directory / "cax" / "__init__.py").write_text(f"__version__ = '{version}'\n")
    (directory / "cax" / "config.py").write_text("")
    (directory / "cax" / "main.py").write_text(main or "# clear.BufferPurger(),\n")
    return directory


@pytest.mark.parametrize("what", ["nothing", "another directory", "another version"])
def test_what_is_no_checkout_of_cax_is_refused(tmp_path: Path, what: str) -> None:
    """One line, which names the directory and how to get cax; nothing is started."""
    wrong = {
        "nothing": tmp_path / "missing",
        "another directory": tmp_path,
        "another version": made_cax(tmp_path / "new", "6.0"),
    }[what]
    with pytest.raises(SystemExit) as raised:
        main(["real-cax", "--cax", str(wrong)])
    message = raised.value.code
    assert isinstance(message, str)  # Python prints it to stderr, and ends with 1
    assert message.startswith(f"--cax {wrong}: ")
    assert message.endswith(GET_IT)
    assert "\n" not in message


def test_a_file_of_cax_that_does_not_load_is_named(tmp_path: Path) -> None:
    """A configuration and a rule file that do not load; those that mean what they say are not."""
    source = made_cax(tmp_path)
    (source / "cax" / "rules").mkdir()
    lngs: dict[str, Any] = {
        "name": "lngs",
        "dir_raw": "/data/raw/",
        "upload_options": [],
        "purge": None,
    }
    (source / "cax" / "cax.json").write_text(json.dumps([lngs]))
    (source / "cax" / "rules" / "simple.json").write_text("[]")
    assert unreadable_files(source) == []
    (source / "cax" / "cax.json").write_text('[{"nome": "lngs"}]')
    (source / "cax" / "rules" / "simple.json").write_text('[{"rule": 5}]')
    site, rule = unreadable_files(source)
    assert "nome" in site
    assert "simple.json" in rule


LOOPING = f"""
import argparse, sys, time
import hax, pax, paramiko, pytz, requests, scp, sympy
from pathlib import Path
from cax import config

class clear:
    BufferPurger = staticmethod(lambda: "purges")

def main():
    tasks = [
        # clear.BufferPurger(),
    ]
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    parser.add_argument("--log-file")
    parser.add_argument("--once", action="store_true")
    given = parser.parse_args()
    if given.once:
        sys.exit("once: " + " ".join(tasks))
    while True:
        with Path(given.log_file).open("a") as log:
            log.write("{SLEEPS}\\n")
        time.sleep(60)
"""


def test_cax_runs_round_after_round_over_the_bridge(tmp_path: Path) -> None:
    """Its modules are there, its purge is on, its minute is short; it ends with what it started."""
    source = made_cax(tmp_path / "source", main=LOOPING)
    home, keys = tmp_path / "home", tmp_path / "keys"
    home.mkdir()
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        server = servers.Server(keys, 22, process)
        cax = Cax(source, home, "midway-login1", "mongodb://127.0.0.1:1", "run", server, {"a": 1})
    cax.configure([])
    cax.start()
    try:
        deadline = time.monotonic() + 60
        while cax.rounds < 3:
            cax.attend()
            assert not cax.ended, cax.ended
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        cax.stop()
    assert (cax.once() or "").strip() == "once: purges"
    assert not [*source.rglob("*.pyc")]
