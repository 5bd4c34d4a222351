"""Derived data: what the processing reactions decide, and jobs as processes of this machine."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from importlib.metadata import EntryPoint
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trio
from attrs import evolve, frozen
from hypothesis import example, given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from caxev import CopyKey, GiveUp, Job, NobodyReads, Retry, Run, RunUpdate, Skip, Tag, TagAbsent
from caxev.batch import derived, folder, runner
from caxev.batch.base import End, JobEnd, JobSpec, explained
from caxev.batch.deriving import plan_derived
from caxev.batch.folder import Folder, Place
from caxev.batch.following import _report_of
from caxev.batch.queue import Queue, Sent
from caxev.batch.runner import report, run_here
from caxev.batch.runner import run as run_job
from caxev.batch.slurm import MESSAGES, end_of
from caxev.batch.work import SentJob, send, take_stock, withdraw
from caxev.config import (
    ConfigError,
    Processing,
    Site,
    Sites,
    jobs_directory,
    load_handlers,
    load_sites,
)
from caxev.config.alarms import SECRETS
from caxev.copies.lifecycle import CopyPlan
from caxev.core.job import Wait
from caxev.core.model import Event
from caxev.core.registry import Registry, recorded
from caxev.database import Database, Request, id_from, id_text
from caxev.demo import daq, processor
from caxev.engine.options import Options
from caxev.files.roots import MARKER_PREFIX
from caxev.handlers import processing as made
from tests import engine
from tests.conftest import Database as Named

START = datetime(2016, 11, 11, 14, 34, tzinfo=UTC)
DEFAULT = {"gains": [1.0], "drift_velocity_liquid": 1.4, "electron_lifetime_liquid": 600.0}
HOW = Processing(command=("pax", "{input}", "{output}", "{cores}"), version="v6.8.0", cores=4)
SITE = Site(
    name="chicago",
    dir_raw="/data/raw",
    dir_processed="/data/processed",
    dir_minitrees="/data/minitrees",
    processing=HOW,
    minitrees=Processing(command=("hax", "{input}", "{output}")),
)
PROCESSED = CopyKey("processed", "chicago", "v6.8.0")


def raw(status: str = "transferred", **fields: Any) -> dict[str, Any]:
    return {
        "type": "raw",
        "host": "chicago",
        "status": status,
        "location": "/data/raw/161111_1434",
        **fields,
    }


def run_of(*entries: dict[str, Any], events: Any = 5000, **fields: Any) -> Run:
    document = {
        "_id": "r",
        "number": 7,
        "name": "161111_1434",
        "detector": "tpc",
        "processor": {"DEFAULT": DEFAULT},
        "trigger": {"events_built": events},
        "reader": {"ini": {"write_mode": 2}},
        "data": list(entries),
    }
    return Run.from_document({**document, **fields})


def entry_of(run: Run, **fields: Any) -> dict[str, Any]:
    """The entry that a claim leads to."""
    (claim,) = claims(plan_derived(run, ["processed"], SITE))
    return {
        "type": "processed",
        "host": "chicago",
        "pax_version": "v6.8.0",
        "status": "transferring",
        "location": claim.location,
        "job": derived.new_job(run, claim.key, HOW, claim.source, claimed=START),
        **fields,
    }


def claims(plan: list[CopyPlan] | Skip) -> list[CopyPlan]:
    assert not isinstance(plan, Skip), plan.why
    return plan


# -- what is processed -------------------------------------------------------------------------


def test_a_run_that_is_ready_is_processed() -> None:
    """Raw here, inputs, events, write mode, no tag: the version that is wanted is claimed."""
    (claim,) = claims(plan_derived(run_of(raw()), ["processed"], SITE))
    assert claim.key == PROCESSED
    assert claim.location == "/data/processed/pax_v6.8.0/161111_1434.root"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"data": []}, "not here"),
        ({"data": [raw("verifying")]}, "is verifying"),
        ({"tags": [{"name": "donotprocess"}]}, "tagged donotprocess"),
        ({"processor": {"DEFAULT": {**DEFAULT, "gains": None}}}, "lacks processor.DEFAULT.gains"),
        ({"processor": "odd"}, "lacks processor.DEFAULT.gains, processor.DEFAULT.drift"),
        ({"reader": {"ini": {"write_mode": 1}}}, "write mode is 1"),
        ({"trigger": {"events_built": 0}}, "no events"),
        ({"trigger": {}}, "no events"),
    ],
)
def test_a_run_that_is_not_ready_is_not(change: dict[str, Any], why: str) -> None:
    """Of cax's conditions each is told by its name where it does not hold."""
    plan = plan_derived(run_of(raw(), **change), ["processed"], SITE)
    assert isinstance(plan, Skip)
    assert why in plan.why


@pytest.mark.parametrize("status", ["transferring", "verifying", "transferred", "error"])
def test_a_version_that_is_there_is_not_made_again(status: str) -> None:
    """Whatever an entry of that version says, it is somebody's already."""
    run = run_of(
        raw(), {"type": "processed", "host": "chicago", "status": status, "pax_version": "v6.8.0"}
    )
    assert isinstance(plan_derived(run, ["processed"], SITE), Skip)


def test_each_version_is_for_itself() -> None:
    """`pax_processing_versions` says which; one that is there or is to be purged is left out."""
    site = evolve(
        SITE, pax_processing_versions=("v6.7.0", "v6.8.0", "v6.9.0"), pax_version_purge="v6.7.0"
    )
    run = run_of(raw())
    run = run_of(raw(), entry_of(run, status="transferred"))
    plan = claims(plan_derived(run, ["processed"], site))
    assert [claim.key.version for claim in plan] == ["v6.9.0"]


def test_what_failed_is_claimed_again_under_another_name() -> None:
    """An entry whose job was given up is claimed anew where the run changes: next attempt."""
    run = run_of(raw())
    failed = entry_of(run, status="error", job_ended={"how": "exit"})
    (claim,) = claims(plan_derived(run_of(raw(), failed), ["processed"], SITE))
    assert claim.resume is not None


def test_minitrees_follow_each_processed_version() -> None:
    """Minitrees have the version of what they are made of."""
    run = run_of(raw())
    good = entry_of(run, status="transferred")
    other = {**good, "pax_version": "v6.6.0", "status": "verifying"}
    (claim,) = claims(plan_derived(run_of(raw(), good, other), ["minitrees"], SITE))
    assert claim.key == CopyKey("minitrees", "chicago", "v6.8.0")
    assert claim.location == "/data/minitrees/pax_v6.8.0/161111_1434.root"


# -- which job it is -----------------------------------------------------------------------------


def task(run: Run, **fields: Any) -> made.SubmitPlan:
    run = run_of(raw(), entry_of(run, **fields), trigger=run.document["trigger"])
    plan = made.plan_submit(run, run.copy(PROCESSED), SITE, START)
    assert isinstance(plan, made.SubmitPlan)
    return plan


@pytest.mark.parametrize(("events", "cores"), [(999, 1), (1000, 4)])
def test_few_events_have_one_core(events: int, cores: int) -> None:
    """Below 1000 events a run is worth one core; the command is told."""
    spec = task(run_of(raw(), events=events)).spec
    assert (spec.cores, spec.argv[-1]) == (cores, str(cores))


def test_the_command_is_filled_word_by_word() -> None:
    """Each argument stays one, whatever a path holds; what a job reads and writes is its own."""
    odd = "/data/raw/a b;$(reboot)\n'\""
    run = run_of(raw(location=odd))
    spec = task(
        run, job={**derived.new_job(run, PROCESSED, HOW, run.copies[0], claimed=START)}
    ).spec
    assert spec.argv == ("pax", spec.view, spec.output, "4")
    assert spec.input == odd
    work = f"{jobs_directory(SITE, 'processed')}/work/{spec.name}"
    assert spec.view == f"{work}/input/a b;$(reboot)\n'\""
    assert spec.output == f"{work}/output/161111_1434.root"
    assert spec.environment["CAXEV_VERSION"] == "v6.8.0"


async def test_a_tag_that_is_gone_withdraws_nothing() -> None:
    """A listener that comes late to the tag leaves the claim that followed its end."""
    run = run_of(raw())
    run = run_of(raw(), entry_of(run), trigger=run.document["trigger"])
    event = Event(run.id, Tag("donotprocess"), None, "yes")
    result = await made.withdraw(Job(run, event, site=SITE))
    assert result == Skip("it is no longer tagged donotprocess")


def test_what_is_not_to_be_processed_is_not_claimed() -> None:
    """Tagged between the look and the write, the run gets no entry."""
    run = run_of(raw())
    plans = plan_derived(run, ["processed"], SITE)
    assert not isinstance(plans, Skip)
    (plan,) = plans
    event = Event(run.id, CopyKey("raw", SITE.name), None, "transferred")
    assert TagAbsent("donotprocess") in made.claiming(Job(run, event, site=SITE), plan).expect


def test_runs_of_one_name_do_not_write_to_one_file() -> None:
    """Two detectors name their runs alike: each job's result is written to a place of its own."""
    outputs = set()
    for detector in ("tpc", "muon_veto"):
        run = run_of(raw(), _id=detector)
        run = run_of(raw(), entry_of(run), _id=detector)
        plan = made.plan_submit(run, run.copy(PROCESSED), SITE, START)
        assert isinstance(plan, made.SubmitPlan)
        outputs.add(plan.spec.output)
    assert len(outputs) == 2


@pytest.mark.parametrize(
    "job",
    [
        {"name": "/etc/shadow"},
        {"name": "../x"},
        {"name": "lngs.1.processed.v6.8.0.1.1"},
        {"attempt": "1"},
        {"attempt": 2},
        {"claimed": None},
    ],
)
def test_a_job_that_is_not_the_copy_s_own_is_refused(job: dict[str, Any]) -> None:
    """Its name names files: it follows from the run, and nobody else chooses it."""
    run = run_of(raw())
    entry = entry_of(run)
    entry |= {"job": {**entry["job"], **job}, "job_ended": {"how": "done"}}
    entry["job_ended"]["name"] = entry["job"]["name"]
    run = run_of(raw(), entry, trigger=run.document["trigger"])
    with pytest.raises(GiveUp, match="a job that is not its own"):
        made.plan_collect(run, run.copy(PROCESSED), SITE)
    entry["job_ended"] = None
    run = run_of(raw(), entry, trigger=run.document["trigger"])
    with pytest.raises(GiveUp, match="a job that is not its own"):
        made.plan_submit(run, run.copy(PROCESSED), SITE, START)


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/b", ".hidden", "", "..", "a b"])
def test_no_name_leads_out_of_the_jobs_files(tmp_path: Path, name: str) -> None:
    """Whatever a document calls a job, its files are where those of jobs are."""
    folder = Folder(tmp_path / "jobs")
    for deed in (folder.place, folder.close, folder.closed, folder.forget, folder.log, folder.tail):
        with pytest.raises(GiveUp, match="no name of a job"):
            deed(name)


def test_stock_is_taken_inside_of_the_site_s_directories(tmp_path: Path) -> None:
    """Neither what is published nor what is taken away lies anywhere else."""
    spec, outside = spec_in(tmp_path), tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("not ours")
    roots = (str(tmp_path / "made"),)
    home, mine = str(tmp_path / "jobs"), str(tmp_path / "made")
    written(spec, "result")
    with pytest.raises(GiveUp, match="not inside"):
        take_stock(home, spec.name, str(outside / "job.1"), roots, True)
    for final in (f"{mine}/..", f"{mine}/.", "", "/"):
        with pytest.raises(GiveUp, match="no usable name"):
            take_stock(home, spec.name, final, roots, True)
    assert [one.name for one in outside.iterdir()] == ["file"]


def test_no_name_becomes_an_option() -> None:
    """A name from the database that begins with - is refused."""
    run = run_of(raw(), name="-rf")
    run = run_of(raw(), entry_of(run), name="-rf")
    with pytest.raises(GiveUp, match="begins with -"):
        made.plan_submit(run, run.copy(PROCESSED), SITE, START)


def test_copies_made_otherwise_are_left_alone() -> None:
    """A processed copy that is fetched from elsewhere has no job here."""
    entry = {**entry_of(run_of(raw())), "job": None}
    run = run_of(raw(), entry)
    assert isinstance(made.plan_submit(run, run.copy(PROCESSED), SITE, START), Skip)


def test_a_retry_waits() -> None:
    """The next attempt is due when its entry says so, and then at once."""
    run = run_of(raw())
    job = entry_of(run)["job"] | {"not_before": START + timedelta(seconds=60)}
    later = run_of(raw(), entry_of(run, job=job))
    wait = made.plan_submit(later, later.copy(PROCESSED), SITE, START)
    assert isinstance(wait, Wait)
    assert wait.until == START + timedelta(seconds=60)
    assert task(run, job=job | {"not_before": START}).number is None


NAMES = st.text(min_size=1, max_size=80)


@given(one=st.tuples(NAMES, NAMES, NAMES), other=st.tuples(NAMES, NAMES, NAMES))
@example(one=("1", "lngs", "v6.8"), other=("1", "lngs", "v6.8.0"))
def test_names_tell_jobs_apart(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    """Two jobs have one name only if they are one; a name is plain, and begins as all of its."""

    def name(words: tuple[str, ...], claimed: int = 1, attempt: int = 1) -> str:
        key = CopyKey("processed", words[1], words[2])
        found: str = derived.attempt_at(Run(words[0]), key, claimed, attempt)["name"]
        assert found.startswith(derived.names_of(Run(words[0]), key))
        return found

    assert (name(one) == name(other)) == (one == other)
    key = CopyKey("processed", one[1], one[2])
    assert name(other).startswith(derived.names_of(Run(one[0]), key)) == (one == other)
    assert len({name(one, claimed, attempt) for claimed in (1, 2) for attempt in (1, 2, 12)}) == 6
    assert set(name(one)) <= set(
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+_.-"
    )


# -- what becomes of failures -----------------------------------------------------------------


def again(how: End, tries: dict[str, int] | None = None, status: str = "transferring") -> Any:
    run = run_of(raw())
    entry = entry_of(run, status=status)
    entry["job"] |= {"tries": tries or {}, "memory": 1000, "walltime": 600, "id": "17_0"}
    run = run_of(raw(), entry)
    copy = run.copy(PROCESSED)
    assert copy is not None
    return derived.next_job(run, copy, JobEnd(how), HOW)


@pytest.mark.parametrize("how", [how for how in End if how is not End.DONE])
def test_each_kind_of_failure_has_its_tries(how: End) -> None:
    """A failure is tried again as often as `retries` say of its kind, then no more."""
    allowed = HOW.retries[how]
    spent = {how.value: allowed}
    assert again(how, spent) is None
    if allowed:
        job = again(how, {how.value: allowed - 1})
        assert job["attempt"] == 2
        assert job["tries"] == spent
        assert job["name"].endswith(".2")
        assert job["id"] is None


def test_what_ran_out_gets_more() -> None:
    """Out of memory: more memory. Out of time: more time. Else as before."""
    assert [
        (job["memory"], job["walltime"])
        for job in (again(End.MEMORY), again(End.TIMEOUT), again(End.EXIT))
    ] == [(1500, 600), (1000, 900), (1000, 600)]


def test_a_person_may_ask_for_one_that_was_given_up() -> None:
    """Fired again by hand, it has all its tries anew."""
    job = again(End.EXIT, {"exit": 5}, status="error")
    assert (job["attempt"], job["tries"]) == (2, {})


def test_another_attempts_end_is_not_this_ones() -> None:
    """An end that tells of an earlier attempt changes nothing."""
    run = run_of(raw())
    entry = entry_of(run, job_ended={"name": "another", "how": "done"})
    run = run_of(raw(), entry)
    assert isinstance(made.plan_collect(run, run.copy(PROCESSED), SITE), Skip)


@given(row=st.dictionaries(st.sampled_from(["how", "exit", "why", "host"]), st.none() | st.text()))
def test_any_end_can_be_read(row: dict[str, Any]) -> None:
    """Whatever stands there, it is an end; what makes no sense is a job that was lost."""
    ended = JobEnd.from_row(row)
    assert ended.how in End


# -- what Slurm says ------------------------------------------------------------------------------

SHOWN = (
    "JobId=5 ArrayJobId=1 ArrayTaskId=2 JobName=x JobState={state} Reason=Why ExitCode={code} "
    "BatchHost=node1 Command=/x/job.sh sh -c JobState=COMPLETED; exit WorkDir=/x Power=\n"
)


@pytest.mark.parametrize(
    ("state", "code", "how", "status"),
    [
        ("COMPLETED", "0:0", End.DONE, 0),
        ("FAILED", "7:0", End.EXIT, 7),
        ("FAILED", "0:9", End.EXIT, -9),
        ("TIMEOUT", "0:15", End.TIMEOUT, -15),
        ("OUT_OF_MEMORY", "0:125", End.MEMORY, -125),
        ("CANCELLED", "0:15", End.CANCELLED, -15),
        ("NODE_FAIL", "1:0", End.NODE, 1),
    ],
)
def test_slurm_s_words_are_told_apart(state: str, code: str, how: End, status: int) -> None:
    """Each of Slurm's ends is one of ours, whatever the command in the line says."""
    ended = end_of(SHOWN.format(state=state, code=code))
    assert ended is not None
    assert (ended.how, ended.exit, ended.host) == (how, status, "node1")


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "NEW_ONE"])
def test_a_job_that_has_not_ended_has_no_end(state: str) -> None:
    """Any other state, also one that is not known yet, is that of a job that goes on."""
    assert end_of(SHOWN.format(state=state, code="0:0")) is None


@pytest.mark.parametrize(
    ("before", "log", "after"),
    [
        (End.LOST, "*** JOB 6 ON n CANCELLED AT 2026 DUE TO TIME LIMIT ***", End.TIMEOUT),
        (End.LOST, "slurmstepd-n: error: *** JOB 6 ON n CANCELLED AT 2026 ***", End.CANCELLED),
        (End.LOST, "nothing", End.LOST),
        (End.EXIT, "slurmstepd: error: Detected 1 oom-kill event(s)", End.MEMORY),
        (End.EXIT, "CANCELLED AT DUE TO TIME LIMIT", End.EXIT),
        (End.DONE, "oom-kill DUE TO TIME LIMIT", End.DONE),
    ],
)
def test_a_log_may_say_more(before: End, log: str, after: End) -> None:
    """What Slurm wrote into the log counts where it knows no more, or says too little."""
    assert explained(JobEnd(before), log, MESSAGES).how is after


# -- sites.json -----------------------------------------------------------------------------------


def loaded(tmp_path: Path, **processing: Any) -> Processing:
    file = tmp_path / "sites.json"
    entry = {"name": "a", "dir_processed": "/p", "processing": processing}
    file.write_text(json.dumps([entry]))
    found = load_sites(file).get("a").processing
    assert found is not None
    return found


def test_processing_is_read(tmp_path: Path) -> None:
    """Amounts and times are bytes and seconds; retries by kind complete the defaults."""
    how = loaded(
        tmp_path,
        command=["pax", "{input}"],
        memory_per_core="2GB",
        walltime="1-02:00:30",
        retries={"exit": 5},
        x_mine=1,
    )
    assert (how.memory_per_core, how.walltime) == (2_000_000_000, 93_630)
    assert (how.retries["exit"], how.retries["node"]) == (5, 3)
    assert loaded(tmp_path, command=["pax"], retries=0).retries["node"] == 0


@pytest.mark.parametrize(
    ("processing", "said"),
    [
        ({"comand": ["x"]}, "unknown key 'comand' (did you mean 'command'?"),
        ({"cores": 2}, "command is missing: it must be a list of arguments"),
        ({"command": ["pax", "{inptu}"]}, "command must be a list of arguments"),
        ({"command": "pax {input}"}, "command must be a list of arguments"),
        ({"command": ["x"], "walltime": "2h"}, 'walltime must be a time, as "12:00:00"'),
        ({"command": ["x"], "system": "slrm"}, "system must be one of local, slurm"),
        ({"command": ["x"], "partition": "-x"}, "partition must be a name"),
        ({"command": ["x"], "output": "../{name}"}, "output must be a file's name"),
        ({"command": ["x"], "retries": {"exot": 1}}, "retries must be"),
        ({"command": ["x"], "directory": "/a%b"}, "directory must be an absolute path"),
    ],
)
def test_what_is_wrong_with_it_is_told(
    tmp_path: Path, processing: dict[str, Any], said: str
) -> None:
    """File, site, key and value are named, and the nearest key that there is."""
    with pytest.raises(ConfigError) as error:
        loaded(tmp_path, **processing)
    assert "site 'a': processing: " in str(error.value)
    assert said in str(error.value)


def test_results_need_a_directory(tmp_path: Path) -> None:
    """A site that processes says where the results go."""
    file = tmp_path / "sites.json"
    file.write_text(json.dumps([{"name": "a", "processing": {"command": ["x"]}}]))
    with pytest.raises(ConfigError, match="processing needs dir_processed"):
        load_sites(file)


def test_only_sites_that_process_have_the_reactions() -> None:
    """A handler that needs a key is not enabled where the site does not give it."""
    load_handlers()
    ours = [handler for handler in recorded if handler.module == made.__name__]
    assert len(ours) == 6
    # The site knows no types of data but those of cax.
    assert [handler.name for handler in ours if not SITE.wants(handler)] == ["derive"]
    assert not any(Site(name="plain").wants(handler) for handler in ours)


# -- the files of jobs ----------------------------------------------------------------------------


def spec_in(directory: Path, name: str = "job.1", **fields: Any) -> JobSpec:
    (directory / "raw").mkdir(exist_ok=True)
    (directory / "made").mkdir(exist_ok=True)
    work = directory / "jobs" / "work" / name
    return JobSpec(
        **{
            "name": name,
            "argv": ("true",),
            "run": 7,
            "key": PROCESSED,
            "input": str(directory / "raw" / "one"),
            "view": str(work / "input" / "one"),
            "output": str(work / "output" / name),
            "roots": (str(directory / "raw"), str(directory / "made")),
            **fields,
        }
    )


def make_input(directory: Path) -> None:
    """Let there be what the job of `spec_in` reads."""
    (directory / "raw").mkdir(exist_ok=True)
    (directory / "raw" / "one").touch()


def written(spec: JobSpec, content: str) -> None:
    """Let a job have written that."""
    Path(spec.output).parent.mkdir(parents=True)
    Path(spec.output).write_text(content)


def quiet(_done: int, _total: int) -> None:
    pass


def test_a_job_is_filed_as_it_is(tmp_path: Path) -> None:
    """What is read at the node is what was filed, also ids and odd bytes in paths."""
    odd = os.fsdecode(b"/data/\xff \n'")
    specs = [spec_in(tmp_path, f"job.{n}", argv=("x", odd, ""), setup="a\nb") for n in range(3)]
    folder = Folder(tmp_path / "jobs")
    group = folder.file(specs)
    places = [folder.place(spec.name) for spec in specs]
    assert [place.load() for place in places if place] == specs
    assert folder.names() == ["job.0", "job.1", "job.2"]
    for spec in specs:
        assert group.exists()
        folder.close(spec.name)
    assert (folder.names(), group.exists()) == ([], False)


@pytest.mark.parametrize("run", [7, "161111", 3.5, START])
def test_ids_keep_their_type(run: Any) -> None:
    """The id of a run comes back from its text as it was."""
    assert id_from(id_text(run)) == run


def test_a_job_runs_here(tmp_path: Path) -> None:
    """It gets its words as they are, its variables and the operator's lines."""
    source = tmp_path / "raw" / "one"
    script = "import os, sys; open(sys.argv[2], 'w').write(sys.argv[1] + os.environ['A'])"
    spec = spec_in(tmp_path, environment={"A": "b"}, setup="A=$A$A; export A")
    spec = evolve(spec, argv=(sys.executable, "-c", script, "$(x) 'y'", spec.output))
    source.touch()
    ended = run_here(str(tmp_path / "jobs"), spec)
    assert (ended.how, ended.exit) == (End.DONE, 0)
    assert Path(spec.output).read_text() == "$(x) 'y'bb"


def test_a_job_knows_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the listener logs in with, anywhere, is not in a processing program's environment."""
    planted = dict.fromkeys((*SECRETS.values(), "MONGO_PASSWORD", "RUCIO_PASSWORD"), "planted")
    planted |= {f"{name}_FILE": "planted" for name in planted}
    for name in (*planted, "CAXEV_MONGO_URI", "CREDENTIALS_DIRECTORY", "NEW_PASSWORD"):
        monkeypatch.setenv(name, "planted")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "one").touch()
    spec = spec_in(tmp_path, argv=("sh", "-c", 'test -n "$PATH" && ! env | grep planted'))
    assert run_here(str(tmp_path / "jobs"), spec).how is End.DONE


@pytest.mark.parametrize(
    ("argv", "status"),
    [(("sh", "-c", "exit 7"), 7), (("sh", "-c", "kill -9 $$"), -9), (("/no/such/program",), 127)],
)
def test_a_failure_here_is_told(tmp_path: Path, argv: tuple[str, ...], status: int) -> None:
    """Exit status, signal, and a program that is not there."""
    spec = spec_in(tmp_path, argv=argv)
    Path(spec.input).touch()
    ended = run_here(str(tmp_path / "jobs"), spec)
    assert (ended.how, ended.exit) == (End.EXIT, status)


def test_only_ours_is_read_and_written(tmp_path: Path) -> None:
    """Input and output lie in the site's directories, links followed, or nothing is begun."""
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "one").symlink_to("/etc/passwd")
    with pytest.raises(GiveUp, match="not inside"):
        run_here(str(tmp_path / "jobs"), spec_in(tmp_path))


@contextmanager
def outliving(folder: Folder, spec: JobSpec) -> Iterator[None]:
    """A process of a job that has outlived its listener, for the length of the block."""
    folder.file([spec])
    place = folder.place(spec.name)
    assert place is not None
    with place.file("log").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        orphan = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
    with orphan:
        yield


def test_a_job_that_still_runs_is_not_run_beside(tmp_path: Path) -> None:
    """A process that outlived its listener is waited for; it is known by what it inherited."""
    spec = spec_in(tmp_path)
    Path(spec.input).touch()
    with outliving(Folder(tmp_path / "jobs"), spec), pytest.raises(Retry, match="still runs"):
        run_here(str(tmp_path / "jobs"), spec)
    assert run_here(str(tmp_path / "jobs"), spec).how is End.DONE


def test_a_job_that_still_runs_is_withdrawn_when_it_has_ended(tmp_path: Path) -> None:
    """A process that outlived its listener still writes: what it has written goes after that."""
    spec = spec_in(tmp_path)
    folder = Folder(tmp_path / "jobs")
    with outliving(folder, spec):
        with pytest.raises(Retry, match="still runs"):
            withdraw("local", str(tmp_path / "jobs"), spec.name)
        written(spec, "")
    assert withdraw("local", str(tmp_path / "jobs"), spec.name) == 1
    assert not Path(spec.output).exists()
    assert folder.names() == []


def test_a_job_that_another_version_filed(tmp_path: Path) -> None:
    """What it wrote besides is left out; what it lacks is no error of the whole listener."""
    spec = spec_in(tmp_path)
    place = Place(Folder(tmp_path / "jobs").file([spec]), 0)
    row = json.loads(place.file("json").read_text())
    place.file("json").write_text(json.dumps({**row, "gpus": 1}))
    assert place.load() == spec
    del row["input"]
    place.file("json").write_text(json.dumps(row))
    with pytest.raises(GiveUp, match=r"0\.json describes no job"):
        place.load()
    assert _report_of(place, JobEnd(End.DONE)) is None


def stock(directory: Path, spec: JobSpec, *, good: bool = True) -> Any:
    final = str(directory / "made" / Path(spec.output).name)
    return take_stock(str(directory / "jobs"), spec.name, final, spec.roots, good)


def test_a_result_is_published_once(tmp_path: Path) -> None:
    """Taking stock twice is as once: the result has its name, the log is kept, files are gone."""
    spec = spec_in(tmp_path)
    Folder(tmp_path / "jobs").file([spec])
    written(spec, "result")
    first, second = stock(tmp_path, spec), stock(tmp_path, spec)
    assert (first.size, second.size) == (6, 6)
    assert Folder(tmp_path / "jobs").names() == []
    assert (tmp_path / "made" / "job.1").read_text() == "result"


@pytest.mark.parametrize(("content", "problem"), [(None, "left no result"), ("", "left nothing")])
def test_a_job_without_a_result_has_failed(
    tmp_path: Path, content: str | None, problem: str
) -> None:
    """That it ended well is not enough."""
    spec = spec_in(tmp_path)
    if content is not None:
        written(spec, content)
    found = stock(tmp_path, spec)
    assert found.size is None
    assert problem in found.problem
    assert not Path(spec.output).exists()


def test_a_result_that_no_copy_may_hold_is_a_failure(tmp_path: Path) -> None:
    """Its files go all the same: jobs that stay filed would take up all places."""
    spec = spec_in(tmp_path)
    Folder(tmp_path / "jobs").file([spec])
    Path(spec.output).parent.mkdir(parents=True)
    os.mkfifo(spec.output)
    assert "neither a directory nor a file" in stock(tmp_path, spec).problem
    assert Folder(tmp_path / "jobs").names() == []


def test_a_failed_result_is_taken_away(tmp_path: Path) -> None:
    """What a job that failed has written does not stay."""
    spec = spec_in(tmp_path)
    written(spec, "half")
    assert stock(tmp_path, spec, good=False).size is None
    assert not Path(spec.output).exists()


def test_nothing_is_replaced(tmp_path: Path) -> None:
    """Where something else has the final name, a person is told."""
    spec = spec_in(tmp_path)
    written(spec, "result")
    (tmp_path / "made" / "job.1").write_text("another")
    with pytest.raises(GiveUp, match="something else stands"):
        stock(tmp_path, spec)


def test_no_job_starts_whose_result_has_no_place(tmp_path: Path) -> None:
    """Else an older file there would be taken for its result if it ends well without any."""
    make_input(tmp_path)
    final = tmp_path / "made" / "job.1"
    spec = spec_in(tmp_path, argv=("true",), final=str(final))
    final.write_text("another")
    with pytest.raises(GiveUp, match="something else stands"):
        run_here(str(tmp_path / "jobs"), spec)
    final.unlink()
    assert run_here(str(tmp_path / "jobs"), spec).how is End.DONE


def test_withdrawn_jobs_leave_nothing(tmp_path: Path) -> None:
    """All jobs that begin so are closed, and what they had written is gone; no others."""
    specs = [spec_in(tmp_path, name) for name in ("a.1", "a.2", "b.1")]
    for spec in specs:
        Folder(tmp_path / "jobs").file([spec])
        written(spec, "")
    assert withdraw("local", str(tmp_path / "jobs"), "a.") == 2
    assert Folder(tmp_path / "jobs").names() == ["b.1"]
    assert [Path(spec.output).exists() for spec in specs] == [False, False, True]


# -- sending together -----------------------------------------------------------------------------


@frozen
class Sender:
    """Stands in for a batch system: notes what is sent at once. `room` jobs find a place."""

    sent: list[list[str]]
    room: int = 10**6

    async def __call__(self, specs: Any) -> list[Sent]:
        free = self.room - sum(map(len, self.sent))
        names = [spec.name for spec in specs]
        self.sent.append(names[: max(free, 0)])
        return [SentJob(name) if n < free else None for n, name in enumerate(names)]


def sent_by(number: int, send: Any, queue: Queue | None = None) -> Callable[[], Awaitable[None]]:
    queue = queue or Queue()

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for n in range(number):
                spec = JobSpec(f"j{n}", (), 1, PROCESSED, "", "", "", (), cores=1 + n % 2)
                nursery.start_soon(queue.place, spec, "slurm", send)

    return main


def test_what_comes_at_once_goes_together() -> None:
    """Jobs of one moment and the same needs are one submission."""
    sender = Sender([])
    trio.run(sent_by(50, sender), clock=MockClock(autojump_threshold=0))
    assert sorted(map(len, sender.sent)) == [25, 25]
    assert {len({int(name[1:]) % 2 for name in names}) for names in sender.sent} == {1}


def test_only_what_goes_the_same_way_goes_together() -> None:
    """Jobs that keep their files at different places are never one submission."""
    queue, first, second = Queue(), Sender([]), Sender([])

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for n in range(10):
                spec = JobSpec(f"j{n}", (), 1, PROCESSED, "", "", "", ())
                nursery.start_soon(queue.place, spec, n % 2, (first, second)[n % 2])

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert [sorted(names) for names in first.sent] == [["j0", "j2", "j4", "j6", "j8"]]
    assert [sorted(names) for names in second.sent] == [["j1", "j3", "j5", "j7", "j9"]]


def test_one_submission_at_a_time_goes_one_way() -> None:
    """Each counts the jobs that are out before it sends: two at once would take the same room."""
    at_once: list[int] = []
    sending = 0

    async def send(specs: Any) -> list[Sent]:
        nonlocal sending
        sending += 1
        at_once.append(sending)
        await trio.sleep(1.0)
        sending -= 1
        return [SentJob("1") for _ in specs]

    trio.run(sent_by(10, send), clock=MockClock(autojump_threshold=0))
    assert at_once == [1, 1]


def test_a_failed_submission_is_everybody_s() -> None:
    """What hinders all is raised by all, once each."""

    async def down(_specs: Any) -> list[Sent]:
        raise Retry("slurmctld is down")

    with pytest.raises(ExceptionGroup) as errors:
        trio.run(sent_by(10, down), clock=MockClock(autojump_threshold=0))
    assert all(isinstance(error, Retry) for error in errors.value.exceptions)


def test_who_waits_long_for_room_lets_others_pass() -> None:
    """A lane full of jobs that wait must not keep back the looks for those that were lost."""

    async def full(specs: Any) -> list[Sent]:
        return [None for _ in specs]

    with pytest.raises(ExceptionGroup) as errors:
        trio.run(sent_by(3, full), clock=MockClock(autojump_threshold=0))
    assert all("no room" in str(error) for error in errors.value.exceptions)


async def test_jobs_wait_until_there_is_room() -> None:
    """While the queue is full a job waits, and goes when another has ended."""
    queue, sent = Queue(), []

    async def send(specs: Any) -> list[Sent]:
        sent.append([spec.name for spec in specs])
        return [SentJob("1") if len(sent) > 1 else None for _ in specs]

    with trio.fail_after(engine.PATIENCE):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sent_by(1, send, queue))
            await engine.until(lambda: sent)
            await wait_all_tasks_blocked(0.01)
            queue.left()
    assert sent == [["j0"], ["j0"]]


class Another:
    """A third party's batch system, as far as it goes."""

    def __init__(self, home: str) -> None:
        self.folder = Folder(Path(home))

    def submit(self, jobs: Sequence[JobSpec]) -> list[str]:
        group = self.folder.file(jobs)
        self.folder.note_sent(group, "another")
        return ["another" for _ in jobs]

    def find(self, names: Sequence[str]) -> dict[str, str]:
        return dict.fromkeys(names, "another")

    def outcome(self, name: str, job: str) -> JobEnd | None:
        return None

    def cancel(self, job: str) -> None:
        pass


def test_third_parties_add_batch_systems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A class that an entry point names serves sites.json's `system` of that name."""
    point = EntryPoint("another", f"{__name__}:Another", "caxev.batch")

    def points(*, group: str, name: str) -> list[EntryPoint]:
        return [point] if (group, name) == ("caxev.batch", "another") else []

    monkeypatch.setattr("caxev.config.plugins.entry_points", points)
    monkeypatch.setattr("caxev.config.values.entry_points", points)
    assert loaded(tmp_path, command=["x"], system="another").system == "another"
    spec = spec_in(tmp_path)
    Path(spec.input).touch()
    assert send("another", str(tmp_path / "jobs"), 1, [spec]) == [SentJob("another")]
    with pytest.raises(GiveUp, match="no batch system is named 'nowhere'"):
        send("nowhere", str(tmp_path / "jobs"), 1, [spec])


# -- the demo's processor -------------------------------------------------------------------------


def test_the_processor_finds_the_peaks(tmp_path: Path) -> None:
    """Of every event the stand-in DAQ wrote, the one pulse is found, and summed up by channel."""
    run = daq.write_run(tmp_path, 1, size_bytes=1_500_000, seed=1, start=START)
    peaks, summary = tmp_path / "peaks", tmp_path / "summary"
    assert processor.main(["peaks", str(run.path), str(peaks)]) == 0
    rows = [json.loads(line) for line in peaks.read_text().splitlines()]
    assert [row["number"] for row in rows] == list(range(run.events))
    assert {len(row["peaks"]) for row in rows} == {1}
    assert {row["peaks"][0]["height"] for row in rows} == {9000}
    assert processor.main(["summary", str(peaks), str(summary)]) == 0
    channels = [json.loads(line) for line in summary.read_text().splitlines()]
    assert sum(row["events"] for row in channels) == run.events


# -- all of it, on a real database ----------------------------------------------------------------


@frozen
class Ground:
    """A site that processes, its database and its directories."""

    database: Database
    site: Site
    directory: Path
    named: Named

    @property
    def how(self) -> Processing:
        assert self.site.processing is not None
        return self.site.processing

    @property
    def options(self) -> Options:
        load_handlers()
        sites = Sites(Path("sites.json"), {self.site.name: self.site})
        return Options(
            site=self.site,
            sites=sites,
            settings=engine.settings_for(self.named),
            registry=Registry(
                [h for h in recorded if h.module.startswith("caxev.handlers.")],
                sites.here("chicago"),
            ),
            lease_time=3.0,
            grace=0.0,
        )

    async def take(self, number: int, **fields: Any) -> Any:
        """A run whose raw data is good here."""
        start = START + timedelta(minutes=number)
        run = daq.write_run(
            self.directory / "raw", number, size_bytes=20_000, seed=number, start=start
        )
        document = daq.run_document(run)
        document["data"].append({**daq.data_entry(run, "chicago", "transferred"), "checksum": "ab"})
        return await self.database.insert_run({**document, **fields})

    async def run(self, id: Any) -> Run:  # noqa: A002
        return (await self.database.runs([id]))[id]

    async def entry(self, id: Any, kind: str = "processed") -> Any:  # noqa: A002
        return (await self.run(id)).copy(CopyKey(kind, "chicago", "v1"))

    async def becomes(self, id: Any, status: str, kind: str = "processed") -> Any:  # noqa: A002
        """Wait until its copy of that kind has that status."""

        async def there() -> Any:
            entry = await self.entry(id, kind)
            return entry if entry is not None and entry.status == status else None

        return await engine.until(there)

    async def paid(self) -> None:
        """Wait until nothing is owed, and nothing has failed."""

        async def nothing() -> bool:
            owed = [await self.database.reactions(state=state) for state in ("pending", "running")]
            return not any(owed)

        await engine.until(nothing)


KINDS = ("raw", "processed", "minitrees")


def made_in(directory: Path, name: str) -> str:
    (directory / name).mkdir()
    return str(directory / name)


@asynccontextmanager
async def ground_of(
    database: Named, tmp_path: Path, *command: str, **processing: Any
) -> AsyncIterator[Ground]:
    dirs: dict[str, Any] = {f"dir_{kind}": made_in(tmp_path, kind) for kind in KINDS}
    peaks = ("{python}", "-m", "caxev.demo.processor", "peaks", "{input}", "{output}")
    how = Processing(command=command or peaks, version="v1", retry_after=0.0, **processing)
    summary = (*peaks[:3], "summary", *peaks[4:])
    trees = evolve(how, command=summary, version=None) if not command else None
    site = Site(name="chicago", processing=how, minitrees=trees, master=("raw",), **dirs)
    async with engine.opened(database) as db:
        yield Ground(db, site, tmp_path, database)


def read(path: str) -> str:
    return Path(path).read_text()


def said(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def half_of(directory: Path) -> list[str]:
    """What is hidden in the site's directories, where other sites may write."""
    kinds = ("raw", "processed", "minitrees")
    names = [path.name for kind in kinds for path in (directory / kind).rglob(".caxev-*")]
    return [name for name in names if not name.startswith(MARKER_PREFIX)]


@pytest.mark.replicaset
async def test_raw_becomes_processed_becomes_minitrees(database: Named, tmp_path: Path) -> None:
    """Each is made once the one before is good here, published, sized, and verified."""
    async with ground_of(database, tmp_path) as ground:
        async with engine.listener(ground.database, ground.options):
            run = await ground.take(1)
            await ground.becomes(run, "transferred", "minitrees")
            await ground.paid()
        for kind in ("processed", "minitrees"):
            entry = await ground.entry(run, kind)
            assert Path(entry.location).parent == tmp_path / kind / "pax_v1"
            assert entry.fields["size"] == os.lstat(entry.location).st_size > 0
            assert entry.checksum
            assert entry.fields["creation_place"] == "chicago"
            assert entry.fields["owner"] is None
    assert half_of(tmp_path) == []


@pytest.mark.replicaset
async def test_a_run_is_processed_when_it_is_fit(database: Named, tmp_path: Path) -> None:
    """What was missing comes, or the tag goes: that is the event."""
    async with (
        ground_of(database, tmp_path, "cp", "{input}/pax_info.json", "{output}") as ground,
        engine.listener(ground.database, ground.options),
    ):
        bare = await ground.take(1, processor=None)
        tagged = await ground.take(2, tags=[{"name": "donotprocess"}])
        await ground.becomes(await ground.take(3), "transferred")
        assert await ground.entry(bare) is await ground.entry(tagged) is None
        run = await ground.run(bare)
        await engine.write(
            ground.database, RunUpdate.set_fields(run, processor={"DEFAULT": DEFAULT})
        )
        await engine.write(ground.database, RunUpdate.overwrite(await ground.run(tagged), tags=[]))
        await ground.becomes(bare, "transferred")
        await ground.becomes(tagged, "transferred")


@pytest.mark.replicaset
async def test_a_failure_is_kept_and_tried_again(database: Named, tmp_path: Path) -> None:
    """As often as `retries` say; then entry, log and reaction tell; a person can ask again."""
    script = f'echo trouble; [ -e "{tmp_path}/repaired" ] && cp "$1" "$2" || exit 7'
    command = ("sh", "-c", script, "sh", "{input}/pax_info.json", "{output}")
    async with (
        ground_of(database, tmp_path, *command, retries={"exit": 1}) as ground,
        engine.listener(ground.database, ground.options),
    ):
        id_ = await ground.take(1)
        entry = await ground.becomes(id_, "error")
        assert entry.fields["job"]["attempt"] == 2
        assert entry.fields["job_ended"]["exit"] == 7
        assert "exit status 7" in entry.fields["error"]
        assert "trouble" in entry.fields["error"]
        assert read(entry.fields["job"]["log"]) == "trouble\n"
        (found,) = await ground.database.reactions(state="failed")
        assert found[0].handler == "collect"
        (tmp_path / "repaired").touch()
        request = Request("replay", (id_,), handler="collect", force=True)
        await ground.database.add_request("chicago", request, "test", datetime.now(UTC))
        entry = await ground.becomes(id_, "transferred")
        assert entry.fields["job"]["attempt"] == 3
        assert entry.fields["error"] is None


@pytest.mark.replicaset
async def test_a_job_has_its_time(database: Named, tmp_path: Path) -> None:
    """One that takes longer than `walltime` is ended with all that it started, and gets more."""
    pid = tmp_path / "pid"
    script = f'sleep 600 & echo $! > "{pid}.new"; mv "{pid}.new" "{pid}"; wait'
    patient = {"walltime": 1, "grow": 2.0, "retries": {"timeout": 1000}}
    async with (
        ground_of(database, tmp_path, "sh", "-c", script, **patient) as ground,
        engine.listener(ground.database, ground.options),
    ):
        id_ = await ground.take(1)
        await engine.until(pid.exists)  # a first time may be over before it begins
        first = int(pid.read_text())
        await engine.until(lambda: gone(first))

        async def again() -> Any:
            entry = await ground.entry(id_)
            return entry.fields["job"]["attempt"] > 1 and entry

        entry = await engine.until(again)
        assert "out of time" in entry.fields["error"]
        assert entry.fields["job"]["walltime"] >= 2
        assert entry.fields["job"]["tries"]["timeout"] >= 1


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.replicaset
async def test_a_run_is_withdrawn(database: Named, tmp_path: Path) -> None:
    """Tagged `donotprocess` in the midst of it, the job ends, the entry goes, nothing is left."""
    script = f'echo half > "$1"; cd "{tmp_path}"; echo $$ > new; mv new pid; exec sleep 600'
    async with (
        ground_of(database, tmp_path, "sh", "-c", script, "sh", "{output}") as ground,
        engine.listener(ground.database, ground.options),
    ):
        id_ = await ground.take(1)
        await engine.until((tmp_path / "pid").exists)
        await engine.write(
            ground.database, RunUpdate.add_tag(await ground.run(id_), "donotprocess")
        )

        async def withdrawn() -> bool:
            names = Folder(Path(jobs_directory(ground.site, "processed"))).names()
            return await ground.entry(id_) is None and not names

        await engine.until(withdrawn)
        await ground.paid()
    assert gone(int((tmp_path / "pid").read_text()))
    assert half_of(tmp_path) == []


@pytest.mark.replicaset
async def test_a_job_cut_short_is_run_anew(database: Named, tmp_path: Path) -> None:
    """A listener that leaves takes its processes along; the next one begins that attempt again."""
    script = (
        f'echo run >> "{tmp_path}/runs"; [ -e "{tmp_path}/go" ] || exec sleep 600; cp "$1" "$2"'
    )
    command = ("sh", "-c", script, "sh", "{input}/pax_info.json", "{output}")
    async with ground_of(database, tmp_path, *command) as ground:
        async with engine.listener(ground.database, ground.options):
            id_ = await ground.take(1)
            await engine.until(lambda: said(tmp_path / "runs") == "run\n")
        (tmp_path / "go").touch()
        async with engine.listener(ground.database, ground.options, "another"):
            entry = await ground.becomes(id_, "transferred")
            await ground.paid()
    assert entry.fields["job"]["attempt"] == 1
    assert (tmp_path / "runs").read_text() == "run\nrun\n"


@pytest.mark.replicaset
@pytest.mark.parametrize("how", ["run", "watch"])
async def test_a_batch_job_tells_of_its_end(database: Named, tmp_path: Path, how: str) -> None:
    """The job itself tells; where it could only note it, the watch beside it does."""
    async with ground_of(database, tmp_path) as ground:
        id_ = await ground.take(1)
        key = CopyKey("processed", "chicago", "v1")
        claim = RunUpdate.add_copy(
            await ground.run(id_), key, "transferring", job={"name": "job.1"}
        )
        await engine.write(ground.database, claim)
        command = ("sh", "-c", 'test -z "$CAXEV_MONGO_URI" && exit 7')
        make_input(tmp_path)
        group = Folder(tmp_path / "jobs").file([spec_in(tmp_path, run=id_, key=key, argv=command)])
        words = ["run", str(group), "0"]
        if how == "watch":
            Place(group, 0).note(JobEnd(End.EXIT, 7))
            words = ["watch", str(group), "0", "17_0", "nowhere"]
        where = {"CAXEV_MONGO_URI": database.uri, "CAXEV_DATABASE": database.name}
        process = await trio.run_process(
            [sys.executable, "-m", "caxev", "batch", *words],
            env={**os.environ, **where},
            check=False,
        )
        assert process.returncode == (7 if how == "run" else 0)
        told = (await ground.entry(id_)).fields["job_ended"]
        assert (told["name"], told["how"], told["exit"]) == ("job.1", "exit", 7)
        assert Place(group, 0).file("reported").exists()


@pytest.mark.parametrize("full_at", range(4))
def test_a_full_disk_leaves_nothing_of_jobs_that_were_not_filed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: int
) -> None:
    """Neither a group, whichever file finds no room, nor a part of that file."""
    filed, sync, synced = Folder(tmp_path / "jobs"), os.fsync, count()

    def full(file: int) -> None:
        if next(synced) == full_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr(os, "fsync", full)
    specs = [spec_in(tmp_path, f"x.{n}") for n in range(2)]
    with pytest.raises(OSError, match="No space left"):
        filed.file(specs)
    assert [one for one in (tmp_path / "jobs").rglob("*") if one.parent.name != "jobs"] == []
    filed.file(specs)
    assert filed.names() == ["x.0", "x.1"]


def test_a_full_disk_hides_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that cannot note its end reports it all the same, and ends as its command did."""
    told: list[RunUpdate] = []
    make_input(tmp_path)
    group = Folder(tmp_path / "jobs").file([spec_in(tmp_path, argv=("true",))])

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("CAXEV_MONGO_URI", "mongodb://x")
    monkeypatch.setattr(runner, "amend", lambda _, update: told.append(update()))
    monkeypatch.setattr(folder, "_write", full)
    monkeypatch.setattr(Path, "touch", full)
    assert run_job(Place(group, 0)) == 0
    assert len(told) == 1


@pytest.mark.parametrize("command", [("sh", "-c", "kill -9 $$"), ("sh", "-c", "exit 137")])
def test_of_one_that_was_killed_the_batch_system_tells(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    """Whether it was for memory, the job itself cannot know: the watch asks."""
    make_input(tmp_path)
    group = Folder(tmp_path / "jobs").file([spec_in(tmp_path, argv=command)])
    assert run_job(Place(group, 0)) == 137
    assert Place(group, 0).ended is None
    assert not Place(group, 0).file("reported").exists()


CGROUPS = {
    "0::/job_7\n": "job_7/memory.events",
    "9:cpu:/x\n4:hugetlb,memory:/job_7\n0::/\n": "memory/job_7/memory.oom_control",
}
"""What a process is told of its cgroups, of either version, and where kills are counted then."""


@pytest.fixture(params=CGROUPS)
def kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """The file in which the kernel counts kills for want of memory, after one long ago."""
    (tmp_path / "cgroup").write_text(request.param)
    counts = tmp_path / CGROUPS[request.param]
    counts.parent.mkdir(parents=True)
    counts.write_text("oom 2\noom_kill 1\n")
    monkeypatch.setattr(runner, "OURS", tmp_path / "cgroup")
    monkeypatch.setattr(runner, "CGROUPS", tmp_path)
    return counts


@pytest.mark.parametrize("more", [0, 1])
def test_a_job_whose_worker_was_killed_for_memory(
    tmp_path: Path, kills: Path, capsys: pytest.CaptureFixture[str], more: int
) -> None:
    """Where its own status says nothing of it: the watch tells, or we do of one that runs here."""
    command = ("sh", "-c", f'echo "oom_kill $(({more} + $1))" > {kills}; exit 1', "x")
    make_input(tmp_path)
    group = Folder(tmp_path / "jobs").file([spec_in(tmp_path, argv=(*command, "1"))])
    if more:
        assert run_job(Place(group, 0)) == 1
        assert Place(group, 0).ended is None
        log = capsys.readouterr().err  # which is the job's log
        assert explained(JobEnd(End.EXIT, 1), log, MESSAGES).how is End.MEMORY
    spec = spec_in(tmp_path, name="here.1", argv=(*command, str(1 + more)))
    how = run_here(str(tmp_path / "jobs"), spec).how
    assert how is (End.MEMORY if more else End.EXIT)


@pytest.mark.replicaset
async def test_what_a_job_reads_is_not_deleted(database: Named, tmp_path: Path) -> None:
    """While a job is to read a copy here, nobody can write that it is to go."""
    async with ground_of(database, tmp_path) as ground:
        run = await ground.run(await ground.take(1))
        source = CopyKey("raw", "chicago")
        (plan,) = claims(plan_derived(run, ["processed"], ground.site))
        job = derived.new_job(run, plan.key, ground.how, plan.source, claimed=START)
        await engine.write(
            ground.database, RunUpdate.add_copy(run, plan.key, "transferring", job=job)
        )

        async def delete() -> Run | None:
            now = await ground.run(run.id)
            copy = now.copy(source)
            assert copy is not None
            update = RunUpdate.change_copy(now, copy, "deleting", NobodyReads(source))
            return await ground.database.update_run(update, datetime.now(UTC))

        assert await delete() is None
        now = await ground.run(run.id)
        made_of_it = now.copy(plan.key)
        assert made_of_it is not None
        await engine.write(ground.database, RunUpdate.change_copy(now, made_of_it, "verifying"))
        assert await delete() is not None


@pytest.mark.replicaset
async def test_an_end_is_told_once(database: Named, tmp_path: Path) -> None:
    """Of two reports on one job the first counts, and none on a job that is not the entry's."""
    async with ground_of(database, tmp_path) as ground:
        id_ = await ground.take(1)
        run = await ground.run(id_)
        key = CopyKey("processed", "chicago", "v1")
        await engine.write(
            ground.database,
            RunUpdate.add_copy(run, key, "transferring", job={"name": "a.1"}),
        )
        spec = spec_in(tmp_path, "a.1", run=id_, key=key)
        now = datetime.now(UTC)
        other = report(evolve(spec, name="a.2"), JobEnd(End.DONE))
        assert await ground.database.update_run(other, now) is None
        assert await ground.database.update_run(report(spec, JobEnd(End.EXIT, 7)), now) is not None
        assert await ground.database.update_run(report(spec, JobEnd(End.DONE)), now) is None
        entry = await ground.entry(id_)
        assert entry.fields["job_ended"]["exit"] == 7
