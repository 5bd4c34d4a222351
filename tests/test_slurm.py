"""Processing on a real Slurm: slurmctld, slurmd and munged on loopback."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from caxev import CopyKey, Denied, Retry, RunUpdate
from caxev.batch import derived
from caxev.batch.base import End, JobSpec
from caxev.batch.folder import Folder
from caxev.batch.slurm import Slurm as System
from caxev.batch.work import SentJob, send, withdraw
from caxev.config import jobs_directory, load_sites
from caxev.database import Database
from caxev.handlers import processing as made
from tests import engine, slurm
from tests.conftest import Database as Named
from tests.test_processing import Ground, claims, quiet, spec_in

pytestmark = [pytest.mark.slurm]
RUNS = 50
MOST = 30
PATIENCE = 240.0  # seconds


@pytest.fixture
def cluster(slurm: slurm.Slurm, monkeypatch: pytest.MonkeyPatch) -> slurm.Slurm:
    """The cluster, for the programs that this process starts."""
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    return slurm


@asynccontextmanager
async def ground_on(
    database: Named, tmp_path: Path, script: str, **processing: Any
) -> AsyncIterator[Ground]:
    """A site whose jobs are this shell script, given input, output and the run's number."""
    kinds = ("raw", "processed", "minitrees")
    how = {
        "system": "slurm",
        "command": ["sh", "-c", script, "sh", "{input}", "{output}", "{run}"],
        "version": "v1",
        "memory_per_core": "10MB",
        "walltime": "01:00:00",
        "retry_after": 0,
        "environment": {"DIR": str(tmp_path)},
        **processing,
    }
    dirs = {f"dir_{kind}": str(tmp_path / kind) for kind in kinds}
    entry = {"name": "chicago", "master": ["raw"], **dirs, "processing": how}
    async with engine.opened(database) as db:
        yield Ground(db, write_sites(tmp_path, entry), tmp_path, database)


def write_sites(directory: Path, entry: dict[str, Any]) -> Any:
    for kind in ("raw", "processed", "minitrees"):
        (directory / kind).mkdir()
    (directory / "sites.json").write_text(json.dumps([entry]))
    return load_sites(directory / "sites.json").get("chicago")


@contextmanager
def listener(ground: Ground, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A listener as a process of its own; it is killed when the block ends."""
    settings = {
        "CAXEV_MONGO_URI": ground.named.uri,
        "CAXEV_DATABASE": ground.named.name,
        "CAXEV_SITES": str(ground.directory / "sites.json"),
    }
    command = [sys.executable, "-m", "caxev", "listen", "--site", "chicago", "--lease", "1"]
    with (ground.directory / "log").open("ab") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **settings, **environment}, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


async def statuses(ground: Ground) -> Counter[str]:
    """How many runs have a processed copy in each status."""
    runs = await ground.database.runs(await all_runs(ground))
    key = CopyKey("processed", "chicago", "v1")
    return Counter(copy.status for run in runs.values() if (copy := run.copy(key)))


async def all_runs(ground: Ground) -> list[Any]:
    ids, _ = await ground.database.page("chicago", None)
    return ids


@pytest.mark.replicaset
async def test_fifty_runs_and_a_listener_that_is_killed(
    cluster: slurm.Slurm, database: Named, tmp_path: Path
) -> None:
    """Each of 50 runs is processed once, and Slurm is never polled.

    The listener is killed between sending jobs and noting so, and again while they run: the next
    one finds them. No more jobs are out than there may be, and many went as one array.
    """
    script = 'flock --shared "$DIR/gate" true; echo "$3" >> "$DIR/ran"; cp "$1/pax_info.json" "$2"'
    before = len(cluster.calls())
    async with ground_on(database, tmp_path, script, max_jobs=MOST) as ground:
        folder = Folder(Path(jobs_directory(ground.site, "processed")))
        gate = os.open(tmp_path / "gate", os.O_CREAT | os.O_RDWR)
        fcntl.flock(gate, fcntl.LOCK_EX)
        for number in range(1, RUNS + 1):
            await ground.take(number)
        with listener(ground, CAXEV_CRASH="submit:batch.sent:1") as first:
            await engine.until(lambda: first.poll() is not None, within=PATIENCE)
        assert first.returncode == -signal.SIGKILL
        sent = {line.split("JobName=")[1].split()[0] for line in our_jobs(cluster, folder)}
        assert len(sent) == 1
        with listener(ground):
            await engine.until(lambda: len(folder.names()) >= MOST, within=PATIENCE)
            await engine.until(lambda: len(noted(folder)) >= MOST, within=PATIENCE)
            await engine.until(
                lambda: "RUNNING" in " ".join(our_jobs(cluster, folder)), within=PATIENCE
            )
        assert len(folder.names()) == MOST
        os.close(gate)
        with listener(ground):

            async def done() -> bool:
                return await statuses(ground) == {"transferred": RUNS}

            await engine.until(done, within=3 * PATIENCE)
            await ground_paid(ground.database)
        assert await ground.database.reactions(state="failed") == []
    assert sorted(map(int, lines(tmp_path / "ran"))) == list(range(1, RUNS + 1))
    calls = cluster.calls()[before:]
    assert not [call for call in calls if call.split()[0] in ("squeue", "sacct")]
    arrays = [call for call in calls if call.startswith("sbatch") and "--array=0-" in call]
    assert len(arrays) < RUNS / 2
    assert folder.names() == []


def our_jobs(cluster: slurm.Slurm, folder: Folder) -> list[str]:
    """What Slurm knows of the jobs (not the watches) of this folder."""
    groups = f"WorkDir={folder.home}/groups/"
    return [line for line in cluster.jobs() if groups in line]


def noted(folder: Folder) -> list[str]:
    """The jobs of which it is written down how Slurm calls them."""
    places = [folder.place(name) for name in folder.names()]
    return [str(place) for place in places if place and folder.sent(place.group)]


async def ground_paid(database: Database) -> None:
    async def nothing() -> bool:
        return not any([await database.reactions(state=state) for state in ("pending", "running")])

    await engine.until(nothing, within=PATIENCE)


@pytest.mark.replicaset
async def test_each_end_is_told_apart(
    cluster: slurm.Slurm, database: Named, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit status, scancel and time limit: each is noted as what it is, and retried as it should.

    What cannot tell of its own end, since it was killed, the watch beside it tells of.
    """
    monkeypatch.setenv("CAXEV_MONGO_URI", database.uri)
    monkeypatch.setenv("CAXEV_DATABASE", database.name)
    script = (
        'echo "$3 $CAXEV_NAME" >> "$DIR/ran"; case "$3" in '
        "1) echo trouble; exit 7;; "
        "2) exec sleep 600;; "
        '3) [ "$(grep -c "^3 " "$DIR/ran")" -gt 1 ] || exec sleep 600;; '
        'esac; cp "$1/pax_info.json" "$2"'
    )
    retries = {"exit": 1, "cancelled": 0, "timeout": 2}
    async with ground_on(database, tmp_path, script, retries=retries, grow=2) as ground:
        async with engine.listener(ground.database, ground.options):
            exits, cancelled, slow = [await ground.take(number) for number in (1, 2, 3)]
            job = (await running(ground, cluster, cancelled)).fields["job"]["id"]
            cluster.ask("scancel", job)
            job = (await running(ground, cluster, slow)).fields["job"]["id"]
            cluster.ask("scontrol", "update", f"jobid={job}", f"EndTime={soon()}")

            entry = await ground.becomes(exits, "error")
            assert entry.fields["job_ended"]["how"] == "exit"
            assert entry.fields["job_ended"]["exit"] == 7
            assert entry.fields["job"]["attempt"] == 2
            assert "trouble" in entry.fields["error"]

            entry = await ground.becomes(cancelled, "error")
            assert entry.fields["job_ended"]["how"] == "cancelled"
            assert entry.fields["job"]["attempt"] == 1
            assert "was cancelled" in entry.fields["error"]

            entry = await ground.becomes(slow, "transferred")
            assert entry.fields["job"]["tries"] == {"timeout": 1}
            assert entry.fields["job"]["walltime"] == 2 * 3600
        failed = await ground.database.reactions(state="failed")
        assert {reaction.run for reaction, _ in failed} == {exits, cancelled}


async def running(ground: Ground, cluster: slurm.Slurm, run: Any) -> Any:
    """Wait until the job of a run runs and its id is noted; the entry."""

    async def runs() -> Any:
        entry = await ground.entry(run)
        number = entry and entry.fields["job"].get("id")
        return entry if number and "JobState=RUNNING" in job_line(cluster, number) else None

    return await engine.until(runs, within=PATIENCE)


def job_line(cluster: slurm.Slurm, number: str) -> str:
    try:
        return cluster.ask("scontrol", "-o", "show", "job", number)
    except subprocess.CalledProcessError:
        return ""


def soon() -> str:
    """A time that comes soon, but not before it was heard, as the cluster's clock shows it."""
    return subprocess.check_output(["date", "-d", "+10 sec", "+%FT%T"], text=True).strip()


@pytest.mark.replicaset
async def test_a_job_that_is_lost_is_sent_again(
    cluster: slurm.Slurm, database: Named, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of which Slurm knows nothing, and nobody has told: that is found out, and noted."""
    monkeypatch.setenv("CAXEV_MONGO_URI", database.uri)
    monkeypatch.setenv("CAXEV_DATABASE", database.name)
    async with ground_on(database, tmp_path, 'cp "$1/pax_info.json" "$2"') as ground:
        id_ = await ground.take(1)
        run = await ground.run(id_)
        (plan,) = claims(made.plan_process(run, ground.site))
        now = datetime.now(UTC)
        job = derived.new_job(run, plan.key, ground.how, plan.source, claimed=now)
        job["id"] = "999999_0"
        update = RunUpdate.add_copy(run, plan.key, "transferring", location=plan.location, job=job)
        await engine.write(ground.database, update)
        async with engine.listener(ground.database, ground.options):
            entry = await ground.becomes(id_, "transferred")
        assert entry.fields["job"]["tries"] == {"lost": 1}


@pytest.mark.replicaset
async def test_a_withdrawn_run_is_cancelled(
    cluster: slurm.Slurm, database: Named, tmp_path: Path
) -> None:
    """Tagged `donotprocess`, its job is gone from the cluster, and its files with it."""
    async with (
        ground_on(database, tmp_path, "exec sleep 600") as ground,
        engine.listener(ground.database, ground.options),
    ):
        id_ = await ground.take(1)
        number = (await running(ground, cluster, id_)).fields["job"]["id"]
        await engine.write(
            ground.database, RunUpdate.add_tag(await ground.run(id_), "donotprocess")
        )
        await engine.until(
            lambda: "JobState=CANCELLED" in job_line(cluster, number), within=PATIENCE
        )
        folder = Folder(Path(jobs_directory(ground.site, "processed")))
        await engine.until(lambda: not folder.names(), within=PATIENCE)
        assert await ground.entry(id_) is None


# -- the batch system alone -----------------------------------------------------------------------


def held(directory: Path, name: str) -> JobSpec:
    """A job that ends once a file is there."""
    wait = 'while [ ! -e "$1" ]; do sleep 0.1; done'
    spec = spec_in(directory, name, argv=("sh", "-c", wait, "sh", str(directory / "go")))
    Path(spec.input).touch()
    return spec


def test_jobs_are_found_by_name(cluster: slurm.Slurm, tmp_path: Path) -> None:
    """What was sent without its id being heard is found, and only that."""
    system = System(str(tmp_path / "jobs"))
    specs = [held(tmp_path, f"found.{n}") for n in range(3)]
    ids = system.submit(specs)
    names = [spec.name for spec in specs]
    assert system.find([*names, "never.1"]) == dict(zip(names, ids, strict=True))
    (next((tmp_path / "jobs" / "groups").iterdir()) / "sent").unlink()
    assert system.find(names) == dict(zip(names, ids, strict=True))
    lost = Folder(tmp_path / "jobs").file([held(tmp_path, "lost.1")])
    assert lost.exists()
    assert system.find(["lost.1"]) == {}
    assert [system.outcome(number, "") for number in ids] == [None] * 3
    for number in ids:
        system.cancel(number)


def test_what_has_ended_is_not_sent_again(cluster: slurm.Slurm, tmp_path: Path) -> None:
    """One whose end was taken stock of, while its run still looked as if it had to be sent."""
    home = str(tmp_path / "jobs")
    spec = held(tmp_path, "ended.1")
    (first,) = send("slurm", home, 10, [spec], report=quiet)
    (again,) = send("slurm", home, 10, [spec], report=quiet)
    assert isinstance(first, SentJob)
    assert again == first
    assert withdraw("slurm", home, "ended.1", report=quiet) == 1
    (after,) = send("slurm", home, 10, [spec], report=quiet)
    assert isinstance(after, Retry)
    assert "over already" in after.why


def test_no_more_are_sent_than_there_is_room_for(cluster: slurm.Slurm, tmp_path: Path) -> None:
    """Those that are out count, whoever sent them; what finds no room is told so."""
    home = str(tmp_path / "jobs")
    specs = [held(tmp_path, f"room.{n}") for n in range(5)]
    sent = send("slurm", home, 2, specs[:1], report=quiet)
    sent += send("slurm", home, 2, specs[1:], report=quiet)
    assert [isinstance(one, SentJob) for one in sent] == [True, True, False, False, False]
    assert sent[2:] == [None] * 3
    assert withdraw("slurm", home, "room.", report=quiet) == 2


def test_what_slurm_does_not_know_is_lost(cluster: slurm.Slurm, tmp_path: Path) -> None:
    """A job of which Slurm knows nothing any more is lost, and cancelling it is no error."""
    system = System(str(tmp_path / "jobs"))
    ended = system.outcome("999999", "")
    assert ended is not None
    assert ended.how is End.LOST
    system.cancel("999999")


def test_what_slurm_will_never_take_is_given_up(cluster: slurm.Slurm, tmp_path: Path) -> None:
    """A partition that is not there is for a person to repair."""
    with pytest.raises(Denied, match="partition"):
        System(str(tmp_path / "jobs")).submit([evolve(held(tmp_path, "x.1"), partition="none")])


def test_a_controller_that_is_down_is_waited_for(
    cluster: slurm.Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost where slurmctld does not answer: again later, with what was said."""
    conf = Path(os.environ["SLURM_CONF"]).read_text()
    nowhere = "".join(
        "SlurmctldPort=1\n" if line.startswith("SlurmctldPort=") else f"{line}\n"
        for line in [*conf.splitlines(), "MessageTimeout=2"]
        if line != "MessageTimeout=10"
    )
    (tmp_path / "slurm.conf").write_text(nowhere)
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    with pytest.raises(Retry, match="contact slurm controller"):
        System(str(tmp_path / "jobs")).outcome("1", "")


def test_no_secret_is_in_an_argument(
    cluster: slurm.Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The password goes by the environment: its value is in no call, no script and no file."""
    monkeypatch.setenv("MONGO_PASSWORD", "a-very-secret-word")
    before = len(cluster.calls())
    system = System(str(tmp_path / "jobs"))
    (number,) = system.submit([held(tmp_path, f"secret.{datetime.now(UTC):%H%M%S}")])
    system.cancel(number)
    calls = " ".join(cluster.calls()[before:])
    assert "MONGO_PASSWORD" in calls
    assert "a-very-secret-word" not in calls
    files = [path for path in (tmp_path / "jobs").rglob("*") if path.is_file()]
    assert files
    assert not any(b"a-very-secret-word" in path.read_bytes() for path in files)
