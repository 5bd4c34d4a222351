"""What all batch systems promise: a real Slurm, simulated HTCondor and PBS.

What one of them does as another, by the same code of ours, is tested with one of both: PBS has
watches as Slurm has, and HTCondor has a log. Local jobs are tested in test_processing.py.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import trio
from attrs import evolve

from caxev import CopyKey, Denied, GiveUp, Retry, RunUpdate
from caxev.batch import base, derived
from caxev.batch.base import End, JobSpec
from caxev.batch.deriving import plan_derived
from caxev.batch.folder import Folder
from caxev.batch.following import JobEnds
from caxev.batch.grouped import Grouped
from caxev.batch.work import SentJob, send, withdraw
from caxev.config import jobs_directory, load_sites
from caxev.database import Database
from caxev.testing.mongod import start_with_us
from tests import engine, slurm
from tests.batch_rigs import SIMULATORS, Rig, SimulatorRig, SlurmRig
from tests.conftest import Database as Named
from tests.test_processing import Ground, claims, spec_in

RUNS = int(os.environ.get("CAXEV_TEST_RUNS", "6"))
"""Of the test of many runs, two more than may be out at once; 50 in its long form."""
MOST = min(RUNS - 2, 10)
PATIENCE = 240.0  # seconds
ON_SLURM = (pytest.mark.slurm, pytest.mark.xdist_group("slurm"))
SLURM = pytest.param("slurm", marks=ON_SLURM)
OTHERS = (SLURM, "htcondor", "pbs")
"""The systems to which jobs are sent."""
SCRIPT = """
echo "$3" >> "$DIR/ran"
[ -p "$DIR/$3" ] && read what < "$DIR/$3"
case $what in
exit) echo trouble; exit 7 ;;
memory) echo "slurmstepd: error: Detected 1 oom_kill event"; exit 137 ;;
esac
cp "$1/pax_info.json" "$2"
"""
"""A job waits for a word in the FIFO of its run's number, if there is one."""


@pytest.fixture
def rig(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """The batch system of that name, for the programs that this process starts."""
    name = request.param
    if name == "slurm":
        cluster: slurm.Slurm = request.getfixturevalue("slurm")
        _set(monkeypatch, cluster.environment)
        yield SlurmRig(cluster)
    else:
        make, asks = SIMULATORS[name]
        simulator: Any = make(tmp_path / name)
        simulator.directory.mkdir()
        with simulator.running():
            _set(monkeypatch, simulator.environment)
            yield SimulatorRig(simulator, name, asks)


def _set(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def on(*names: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("rig", names, indirect=True)


@asynccontextmanager
async def ground_on(
    rig: Rig, database: Named, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **processing: Any
) -> AsyncIterator[Ground]:
    """A site whose jobs are `SCRIPT`, given input, output and the run's number."""
    _set(monkeypatch, login(database, tmp_path))
    how = {
        "system": rig.name,
        "command": ["sh", "-c", SCRIPT, "sh", "{input}", "{output}", "{run}"],
        "version": "v1",
        "memory_per_core": "10MB",
        "walltime": "01:00:00",
        "retries": 0,
        "retry_after": 0,
        "max_jobs": 4,
        "environment": {"DIR": str(tmp_path)},
        **processing,
    }
    dirs = {f"dir_{kind}": str(tmp_path / kind) for kind in ("raw", "processed", "minitrees")}
    entry = {"name": "chicago", "master": ["raw"], **dirs, "processing": how}
    site = write_sites(tmp_path, entry)
    async with engine.opened(database) as db:
        ground = Ground(db, site, tmp_path, database)
        await engine.mark(db, ground.options)
        yield ground


def write_sites(directory: Path, entry: dict[str, Any]) -> Any:
    for kind in ("raw", "processed", "minitrees"):
        (directory / kind).mkdir()
    (directory / "sites.json").write_text(json.dumps([entry]))
    return load_sites(directory / "sites.json").get("chicago")


def login(database: Named, directory: Path) -> dict[str, str]:
    """What reaches the database: the address without a password, which is in a file."""
    parts = urlsplit(database.site_uri or database.uri)
    file = directory / "password"
    file.write_text(parts.password or "")
    return {
        "CAXEV_MONGO_URI": parts.geturl().replace(f":{parts.password}@", "@"),
        "CAXEV_DATABASE": database.name,
        "MONGO_PASSWORD_FILE": str(file),
    }


def listening(ground: Ground, owner: str = "test") -> Any:
    options = evolve(ground.options, services=(JobEnds,))
    return engine.listener(ground.database, options, owner)


async def waiting(ground: Ground, number: int) -> Any:
    """A run whose job waits for a word."""
    os.mkfifo(ground.directory / str(number))
    return await ground.take(number)


async def answer(ground: Ground, number: int, what: str) -> None:
    """Give a job its word, once it is running."""
    fifo = ground.directory / str(number)
    with trio.fail_after(PATIENCE):
        await trio.to_thread.run_sync(fifo.write_text, f"{what}\n", abandon_on_cancel=True)


async def id_of(ground: Ground, run: Any) -> Any:
    """Wait until it is noted that a run's job was sent; its id."""

    async def noted() -> Any:
        entry = await ground.entry(run)
        return entry and entry.fields["job"].get("id")

    return await engine.until(noted, within=PATIENCE)


async def running(ground: Ground, run: Any, number: int) -> Any:
    """Wait until the job of a run has begun; its id."""
    await engine.until(lambda: number in ran(ground), within=PATIENCE)
    return await id_of(ground, run)


def ran(ground: Ground) -> list[int]:
    """The numbers of the runs whose jobs began, in order."""
    path = ground.directory / "ran"
    return sorted(map(int, path.read_text().split())) if path.exists() else []


# -- with a listener ------------------------------------------------------------------------------


@pytest.mark.replicaset
@on(*OTHERS)
async def test_the_end_of_each_job_is_an_event(
    rig: Rig, database: Named, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is sent once, and nobody is asked how it is.

    One that a person holds lets others pass, and runs once it is released.
    """
    before = len(rig.calls())
    async with (
        ground_on(rig, database, tmp_path, monkeypatch) as ground,
        listening(ground),
    ):
        with rig.full():
            held = await ground.take(1)
            job = await id_of(ground, held)
            rig.hold(job)
        for one in [await ground.take(number) for number in (2, 3)]:
            await ground.becomes(one, "transferred")
        assert not rig.is_running(job)
        assert (await ground.entry(held)).job_ended is None
        rig.release(job)
        await ground.becomes(held, "transferred")
        await ground.paid()
    assert ran(ground) == [1, 2, 3]
    asked = {call.split()[0] for call in rig.calls()[before:]}
    assert not asked & {*rig.asks}


@pytest.mark.replicaset
@on(*OTHERS)
async def test_each_way_to_end_is_reported_as_what_it_is(
    rig: Rig, database: Named, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the job itself, or by what sees its end: none waits for the regular check."""
    retries = {"timeout": 1, **dict.fromkeys(("exit", "memory", "cancelled", "node"), 0)}
    async with (
        ground_on(rig, database, tmp_path, monkeypatch, retries=retries, grow=2) as ground,
        listening(ground),
    ):
        failing, large, cancelled, slow = [await waiting(ground, n) for n in (1, 2, 3, 4)]
        await answer(ground, 1, "exit")
        if not rig.out_of_memory(await running(ground, large, 2)):
            await answer(ground, 2, "memory")
        rig.cancel(await running(ground, cancelled, 3))
        rig.out_of_time(await running(ground, slow, 4))
        for run, how in ((failing, "exit"), (large, "memory"), (cancelled, "cancelled")):
            entry = await ground.becomes(run, "error")
            assert entry.fields["job_ended"]["how"] == how, entry.fields
            assert entry.fields["job"]["attempt"] == 1
        assert "trouble" in (await ground.entry(failing)).fields["error"]
        await engine.until(lambda: ran(ground).count(4) == 2, within=PATIENCE)
        await answer(ground, 4, "go")
        entry = await ground.becomes(slow, "transferred")
        assert entry.fields["job"]["tries"] == {"timeout": 1}
        assert entry.fields["job"]["walltime"] == 2 * 3600

        lost = await waiting(ground, 5)
        rig.evict(await running(ground, lost, 5))
        entry = await ground.becomes(lost, "error")
        assert entry.fields["job_ended"]["how"] == "node", entry.fields
    assert Counter(ran(ground)) == {1: 1, 2: 1, 3: 1, 4: 2, 5: 1}


@pytest.mark.replicaset
@on(SLURM, "htcondor")
async def test_a_job_that_ends_without_a_listener(
    rig: Rig, database: Named, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next listener finds what has come of it."""
    async with ground_on(rig, database, tmp_path, monkeypatch) as ground:
        async with listening(ground):
            run = await waiting(ground, 1)
            job = await running(ground, run, 1)
        rig.cancel(job)
        async with listening(ground, "another"):
            entry = await ground.becomes(run, "error")
            assert entry.fields["job_ended"]["how"] == "cancelled"
            assert ran(ground) == [1]


@pytest.mark.replicaset
@on("pbs")
async def test_a_job_that_is_lost_is_sent_again(
    rig: Rig, database: Named, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the system does not know it, and it has not reported, that is found and noted."""
    async with ground_on(rig, database, tmp_path, monkeypatch, retries={"lost": 1}) as ground:
        id_ = await ground.take(1)
        run = await ground.run(id_)
        (plan,) = claims(plan_derived(run, ["processed"], ground.site))
        now = datetime.now(UTC)
        job = derived.new_job(run, plan.key, ground.how, plan.source, claimed=now)
        job["id"] = UNKNOWN[rig.name]
        update = RunUpdate.add_copy(run, plan.key, "transferring", location=plan.location, job=job)
        await engine.write(ground.database, update)
        async with listening(ground):
            entry = await ground.becomes(id_, "transferred")
        assert entry.fields["job"]["tries"] == {"lost": 1}


UNKNOWN = {"slurm": "999999_0", "htcondor": "999999.0", "pbs": "999999.pbs"}


@pytest.mark.replicaset
@on(SLURM)
async def test_a_withdrawn_run_is_cancelled(
    rig: Rig, database: Named, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tagged `donotprocess`, its job ends, and its files go with it."""
    async with (
        ground_on(rig, database, tmp_path, monkeypatch) as ground,
        listening(ground),
    ):
        id_ = await waiting(ground, 1)
        job = await running(ground, id_, 1)
        run = await ground.run(id_)
        await engine.write(ground.database, RunUpdate.add_tag(run, "donotprocess"))
        folder = Folder(Path(jobs_directory(ground.site, "processed")))

        async def withdrawn() -> bool:
            return not (rig.is_running(job) or folder.names() or await ground.entry(id_))

        await engine.until(withdrawn, within=PATIENCE)


@on("htcondor")
@pytest.mark.replicaset
async def test_a_log_that_cannot_be_read_stops_nothing(
    rig: Rig, database: Named, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HTCondor's library is missing: jobs that ended are found by the regular check."""
    monkeypatch.setitem(sys.modules, "htcondor2", None)
    async with ground_on(rig, database, tmp_path, monkeypatch) as ground:
        folder = Folder.opened(jobs_directory(ground.site, "processed"))
        group = folder.file([held(tmp_path, "x.1")])
        (folder.events / group.name).touch()
        follower = JobEnds(ground.database, None, ground.site, None)  # type: ignore[arg-type]
        await follower.catch_up()
        with trio.move_on_after(0.5) as waited:
            await follower.run()
        assert waited.cancelled_caught


@contextmanager
def listener(ground: Ground, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A listener as a process of its own; it is killed when the block ends."""
    settings = {"CAXEV_SITES": str(ground.directory / "sites.json")}
    command = [sys.executable, "-m", "caxev", "listen", "--site", "chicago", "--lease", "1"]
    with (ground.directory / "log").open("ab") as log:
        process = start_with_us(
            command, env={**os.environ, **settings, **environment}, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


async def statuses(ground: Ground) -> Counter[str]:
    """How many runs have a processed copy in each status."""
    ids, _ = await ground.database.page("chicago", None)
    runs = await ground.database.runs(ids)
    key = CopyKey("processed", "chicago", "v1")
    return Counter(copy.status for run in runs.values() if (copy := run.copy(key)))


@pytest.mark.replicaset
@on(SLURM, "htcondor")
async def test_many_runs_and_a_listener_that_is_killed(
    rig: Rig, database: Named, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run is processed once, and the batch system is never polled.

    The listener is killed between sending jobs and noting so, and again while they run: the next
    one finds them. No more jobs are out than there may be, and many went together.
    """
    script = 'flock --shared "$DIR/gate" true; echo "$3" >> "$DIR/ran"; cp "$1/pax_info.json" "$2"'
    command = ["sh", "-c", script, "sh", "{input}", "{output}", "{run}"]
    before, runs = len(rig.calls()), RUNS
    how = {"command": command, "max_jobs": MOST}
    async with ground_on(rig, database, tmp_path, monkeypatch, **how) as ground:
        folder = Folder(Path(jobs_directory(ground.site, "processed")))
        gate = os.open(tmp_path / "gate", os.O_CREAT | os.O_RDWR)
        fcntl.flock(gate, fcntl.LOCK_EX)
        for number in range(1, runs + 1):
            await ground.take(number)
        with listener(ground, CAXEV_CRASH="submit:batch.sent:1") as first:
            await engine.until(lambda: first.poll() is not None, within=PATIENCE)
        assert first.returncode == -signal.SIGKILL
        assert [one.name for one in folder.home.glob("groups/*/sent")] == []
        with listener(ground):
            await engine.until(lambda: len(numbers(rig, folder)) >= MOST, within=PATIENCE)
            await engine.until(
                lambda: any(rig.is_running(job) for job in numbers(rig, folder)), within=PATIENCE
            )
        assert len(folder.names()) == MOST
        os.close(gate)
        with listener(ground):

            async def done() -> bool:
                return await statuses(ground) == {"transferred": runs}

            await engine.until(done, within=3 * PATIENCE)
            await paid(ground.database)
        assert await ground.database.reactions(state="failed") == []
    assert ran(ground) == [*range(1, runs + 1)]
    calls = rig.calls()[before:]
    together = [call for call in calls if "--array=0-" in call or "condor_submit" in call]
    # How many go together depends on how many end at once.
    assert len(together) < runs
    if rig.name == "slurm":
        assert not [call for call in calls if call.split()[0] in rig.asks]
    assert folder.names() == []


def numbers(rig: Rig, folder: Folder) -> list[str]:
    """The ids of the jobs of which it is recorded that they were sent."""
    places = [folder.place(name) for name in folder.names()]
    found = [(one, folder.sent(one.group)) for one in places if one is not None]
    system = base.system(rig.name, str(folder.home))
    assert isinstance(system, Grouped)
    return [system.id_of(number, place.index) for place, number in found if number]


async def paid(database: Database) -> None:
    async def nothing() -> bool:
        return not any([await database.reactions(state=state) for state in ("pending", "running")])

    await engine.until(nothing, within=PATIENCE)


# -- the batch system alone -----------------------------------------------------------------------


def held(directory: Path, name: str, **fields: Any) -> JobSpec:
    """A job that ends once a file is there."""
    wait = 'while [ ! -e "$1" ]; do sleep 0.1; done'
    argv = ("sh", "-c", wait, "sh", str(directory / "go"))
    spec = spec_in(directory, name, argv=argv, **fields)
    Path(spec.input).touch()
    return spec


def system_of(rig: Rig, tmp_path: Path) -> base.BatchSystem:
    return base.system(rig.name, str(tmp_path / "jobs"))


@on(*OTHERS)
def test_jobs_are_found_by_name(rig: Rig, tmp_path: Path) -> None:
    """What was sent without its id being heard is found, and only that."""
    system = system_of(rig, tmp_path)
    specs = [held(tmp_path, f"found.{n}") for n in range(3)]
    ids = system.submit(specs)
    names = [spec.name for spec in specs]
    assert system.find([*names, "never.1"]) == dict(zip(names, ids, strict=True))
    for sent in (tmp_path / "jobs" / "groups").glob("*/sent"):
        sent.unlink()
    assert system_of(rig, tmp_path).find(names) == dict(zip(names, ids, strict=True))
    lost = Folder(tmp_path / "jobs").file([held(tmp_path, "lost.1")])
    assert lost.exists()
    assert system.find(["lost.1"]) == {}
    assert [system.outcome(*one) for one in zip(names, ids, strict=True)] == [None] * 3
    for number in ids:
        system.cancel(number)


@on(*OTHERS)
def test_what_has_ended_is_not_sent_again(rig: Rig, tmp_path: Path) -> None:
    """One whose end was taken stock of, while its run still looked as if it had to be sent."""
    home = str(tmp_path / "jobs")
    spec = held(tmp_path, "ended.1")
    (first,) = send(rig.name, home, 10, [spec])
    (again,) = send(rig.name, home, 10, [spec])
    assert isinstance(first, SentJob)
    assert again == first
    assert withdraw(rig.name, home, "ended.1") == 1
    (after,) = send(rig.name, home, 10, [spec])
    assert isinstance(after, Retry)
    assert "over already" in after.why
    assert after.after is None  # an attempt: it may be so for ever


@on(*OTHERS)
def test_no_more_are_sent_than_there_is_room_for(rig: Rig, tmp_path: Path) -> None:
    """Those that are out count, whoever sent them; what finds no room is told so."""
    home = str(tmp_path / "jobs")
    specs = [held(tmp_path, f"room.{n}") for n in range(5)]
    sent = send(rig.name, home, 2, specs[:1])
    sent += send(rig.name, home, 2, specs[1:])
    assert [isinstance(one, SentJob) for one in sent] == [True, True, False, False, False]
    assert sent[2:] == [None] * 3
    assert withdraw(rig.name, home, "room.") == 2


@on(*OTHERS)
def test_a_job_that_is_not_known_is_lost(rig: Rig, tmp_path: Path) -> None:
    """And cancelling it is no error."""
    system = system_of(rig, tmp_path)
    ended = system.outcome("never.1", UNKNOWN[rig.name])
    assert ended is not None
    assert ended.how is End.LOST
    system.cancel(UNKNOWN[rig.name])


@on(*OTHERS)
def test_a_number_that_is_another_jobs_by_now_says_nothing(rig: Rig, tmp_path: Path) -> None:
    """As a daemon gives it that has lost its state: a job is lost, and the other one goes on."""
    system, home = system_of(rig, tmp_path), str(tmp_path / "jobs")
    options = {"pbs": ("-N", "x"), "slurm": ("--job-name=x",), "htcondor": ("initialdir = /",)}
    (other,) = system.submit([held(tmp_path, "other.1", options=options[rig.name])])
    assert system.outcome("other.1", other) is None
    folder = Folder(Path(home))
    number = other if rig.name == "pbs" else re.split("[_.]", other)[0]
    folder.note_sent(folder.file([held(tmp_path, "ours.1")]), number)
    ended = system.outcome("ours.1", other)
    assert ended is not None
    assert ended.how is End.LOST
    assert withdraw(rig.name, home, "ours.1") == 1
    assert system.outcome("other.1", other) is None
    system.cancel(other)


@pytest.mark.parametrize(
    ("rig", "fields", "error"),
    [
        pytest.param("slurm", {"partition": "none"}, Denied, marks=ON_SLURM),
        ("pbs", {"partition": "none"}, Denied),
        ("htcondor", {"account": "none"}, GiveUp),
        ("htcondor", {"partition": "any"}, GiveUp),
    ],
    indirect=["rig"],
)
def test_what_will_never_be_taken_is_for_a_person(
    rig: Rig, tmp_path: Path, fields: dict[str, str], error: type[Exception]
) -> None:
    """The message names what was wrong."""
    with (
        pytest.raises(error, match=next(iter(fields)))
        if rig.name != "pbs"
        else pytest.raises(error)
    ):
        system_of(rig, tmp_path).submit([held(tmp_path, "x.1", **fields)])


@on(*OTHERS)
def test_a_system_that_does_not_answer_is_waited_for(
    rig: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost: again later, with the reason."""
    system = system_of(rig, tmp_path)
    if isinstance(rig, SimulatorRig):
        rig.simulator.down = True
    else:
        conf = Path(os.environ["SLURM_CONF"]).read_text().splitlines()
        kept = [line for line in conf if line != "MessageTimeout=10"]
        nowhere = [
            "SlurmctldPort=1" if line.startswith("SlurmctldPort=") else line
            for line in [*kept, "MessageTimeout=2"]
        ]
        (tmp_path / "slurm.conf").write_text("\n".join(nowhere))
        monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    with pytest.raises(Retry, match=r"(?i)connect|contact"):
        system.outcome("x.1", UNKNOWN[rig.name])


@on(*OTHERS)
def test_no_secret_is_in_an_argument(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The password goes by the environment, or not at all: it is in no call, script or file."""
    monkeypatch.setenv("MONGO_PASSWORD", "a-very-secret-word")
    before = len(rig.calls())
    system = system_of(rig, tmp_path)
    (number,) = system.submit([held(tmp_path, f"secret.{datetime.now(UTC):%H%M%S}")])
    system.cancel(number)
    calls = " ".join(rig.calls()[before:])
    assert ("MONGO_PASSWORD" in calls) is (rig.name == "slurm")
    assert "a-very-secret-word" not in calls
    files = [path for path in (tmp_path / "jobs").rglob("*") if path.is_file()]
    assert files
    assert not any(b"a-very-secret-word" in path.read_bytes() for path in files)


@on("htcondor", "pbs")
def test_an_address_with_a_password_is_not_shown_to_others(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These systems show a job's environment: nothing is sent."""
    monkeypatch.setenv("CAXEV_MONGO_URI", "mongodb://chicago:secret@db1.example.org/")
    with pytest.raises(Denied, match="take it out") as raised:
        system_of(rig, tmp_path).submit([held(tmp_path, "x.1")])
    assert "secret" not in str(raised.value)


@on("htcondor")
async def test_no_option_keeps_an_evicted_job_in_the_queue(rig: Rig, tmp_path: Path) -> None:
    """It would never end: what has started once does not start again."""
    system = system_of(rig, tmp_path)
    (job,) = system.submit([held(tmp_path, "x.1", options=("periodic_remove = false",))])
    await engine.until(lambda: rig.is_running(job), within=PATIENCE)
    rig.evict(job)
    await engine.until(lambda: system.outcome("x.1", job) is not None, within=PATIENCE)
    ended = system.outcome("x.1", job)
    assert ended is not None
    assert ended.how is End.NODE
