"""Which end a job had by what HTCondor and PBS write of it; Slurm is in test_processing.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from htcondor2 import JobEventType

from caxev.batch import base, htcondor, pbs
from caxev.batch.base import End
from caxev.batch.folder import Place
from caxev.core.errors import Retry
from tests import condor_log
from tests.condor_simulator import unquoted
from tests.test_processing import spec_in

Ended = tuple[str, int | None] | None
REMOVED = "The job attribute PeriodicRemove expression '(JobStatus == 1)' evaluated to TRUE"
USAGE = "Usr 0 01:02:03, Sys 0 00:00:04"
RESOURCES: dict[str, Any] = {
    "Cpus": 1,
    "RequestCpus": 1,
    "CpusUsage": 0.5,
    "Memory": 128,
    "MemoryUsage": 3,
}
NOTHING: list[tuple[JobEventType, dict[str, Any]]] = [
    (JobEventType.SUBMIT, {"SubmitHost": "<127.0.0.1:9618>", "LogNotes": "DAG Node: A"}),
    (JobEventType.EXECUTE, {"ExecuteHost": "<127.0.0.1:9618>", "SlotName": "slot1@node"}),
    (JobEventType.CHECKPOINTED, {"RunRemoteUsage": USAGE}),
    (JobEventType.JOB_EVICTED, {"Checkpointed": False}),
    (JobEventType.JOB_EVICTED, {"Reason": "preempted", "ReasonCode": 5, "ReasonSubCode": 6}),
    (
        JobEventType.JOB_EVICTED,
        {"TerminatedAndRequeued": True, "TerminatedNormally": True, "ReturnValue": 3},
    ),
    (JobEventType.IMAGE_SIZE, {"Size": 100, "MemoryUsage": 3, "ResidentSetSize": 1000}),
    (JobEventType.SHADOW_EXCEPTION, {"Message": "Error from slot1@node: disk full"}),
    (JobEventType.GENERIC, {"Info": "Job terminated."}),
    (JobEventType.JOB_SUSPENDED, {"NumberOfPIDs": 2}),
    (JobEventType.JOB_UNSUSPENDED, {}),
    (JobEventType.JOB_HELD, {"HoldReason": "via condor_hold", "HoldReasonCode": 1}),
    (JobEventType.JOB_HELD, {"HoldReason": "Spooling input", "HoldReasonCode": 16}),
    (JobEventType.JOB_RELEASED, {"Reason": "via condor_release"}),
    (
        JobEventType.JOB_DISCONNECTED,
        {"StartdAddr": "<127.0.0.1:1>", "StartdName": "slot1@node", "DisconnectReason": "gone"},
    ),
    (
        JobEventType.JOB_RECONNECTED,
        {
            "StartdAddr": "<127.0.0.1:1>",
            "StartdName": "slot1@node",
            "StarterAddr": "<127.0.0.1:2>",
        },
    ),
    (JobEventType.FILE_TRANSFER, {"Type": 2}),
]
"""Events after which a job goes on, or of which only the next one tells whether it has ended."""


def ended(event: Any) -> Ended:
    end = htcondor.end_of(event)
    return None if end is None else (end.how, end.exit)


@pytest.mark.parametrize("form", [condor_log.OLD, condor_log.ISO, condor_log.SUBSECOND])
@pytest.mark.parametrize(
    ("event", "fields", "end"),
    [
        *((event, fields, None) for event, fields in NOTHING),
        (
            JobEventType.JOB_TERMINATED,
            {
                "TerminatedNormally": True,
                "ReturnValue": 0,
                "TotalRemoteUsage": USAGE,
                **RESOURCES,
            },
            ("done", 0),
        ),
        (
            JobEventType.JOB_TERMINATED,
            {"TerminatedNormally": True, "ReturnValue": 7},
            ("exit", 7),
        ),
        (
            JobEventType.JOB_TERMINATED,
            {"TerminatedNormally": False, "TerminatedBySignal": 9, "CoreFile": "/tmp/core"},
            ("exit", -9),
        ),
        (JobEventType.EXECUTABLE_ERROR, {"ExecuteErrorType": 0}, ("exit", None)),
        (JobEventType.JOB_ABORTED, {"Reason": "via condor_rm (by user x)"}, ("cancelled", None)),
        (JobEventType.JOB_ABORTED, {"Reason": "one\ntwo"}, ("cancelled", None)),
        (JobEventType.JOB_ABORTED, {}, ("cancelled", None)),
        (JobEventType.JOB_ABORTED, {"Reason": REMOVED}, ("node", None)),
        (
            JobEventType.JOB_RECONNECT_FAILED,
            {"Reason": "lease expired", "StartdName": "slot1@node"},
            ("node", None),
        ),
        *(
            (
                JobEventType.JOB_HELD,
                {"HoldReason": why, "HoldReasonCode": code, "HoldReasonSubCode": sub},
                (how, None),
            )
            for why, code, sub, how in [
                ("memory usage exceeded request_memory", 34, 102, "memory"),
                ("disk usage exceeded request_disk", 34, 104, "node"),
                ("exceeded allowed execute duration", 47, 0, "timeout"),
                ("Memory above 2 GB|ask for more", 26, 0, "memory"),
                ("exceeded walltime", 26, 0, "timeout"),
                ("memory", 13, 0, "node"),
            ]
        ),
    ],
)
def test_an_event_of_htcondor_is_an_end_of_a_kind(
    tmp_path: Path, form: int, event: JobEventType, fields: dict[str, Any], end: Ended
) -> None:
    """As HTCondor's library writes it, in each form of its dates, and reads it."""
    log = tmp_path / "log"
    condor_log.append(log, "12345.6", event, form=form, **fields)
    (found,) = htcondor._events(log)
    assert (found["Cluster"], found["Proc"]) == (12345, 6)
    assert ended(found) == end


def grouped(directory: Path, jobs: int) -> tuple[htcondor.HTCondor, str, Path]:
    """Jobs that are filed as a group, its name, and the path of its log."""
    system = htcondor.HTCondor(str(directory / "jobs"))
    group = system.folder.file([spec_in(directory, f"x.{n}") for n in range(jobs)])
    return system, group.name, system.folder.events / group.name


def kinds(ends: Iterator[tuple[Place, base.JobEnd]]) -> list[tuple[int, End]]:
    return [(place.index, end.how) for place, end in ends]


@pytest.mark.parametrize("end", ["005 (007", "(return", "Run Local", "\n...\n"])
def test_a_log_that_is_cut_is_read_on(tmp_path: Path, end: str) -> None:
    """An event counts once all of it is there, wherever the file ended meanwhile; and once."""
    system, name, log = grouped(tmp_path, 1)
    condor_log.append(log, "7.0", JobEventType.SUBMIT, SubmitHost="<127.0.0.1:9618>")
    fields = {"TerminatedNormally": True, "ReturnValue": 0}
    condor_log.append(log, "7.0", JobEventType.JOB_TERMINATED, **fields, **RESOURCES)
    content = log.read_text()
    log.write_text(content[: content.rindex(end)])
    assert kinds(system.ends(name)) == []
    with log.open("a") as file:
        file.write(content[content.rindex(end) :])
    assert kinds(system.ends(name)) == [(0, End.DONE)]
    assert kinds(system.ends(name)) == []


def test_a_damaged_event_hides_only_what_follows(tmp_path: Path) -> None:
    """As of a disk that was full: the ends before it count, and nothing is sent twice."""
    system, name, log = grouped(tmp_path, 3)
    condor_log.append(log, "7.0", JobEventType.JOB_ABORTED, Reason="via condor_rm")
    with log.open("a") as file:
        file.write("005 (007.001.000) 2024-01-01 00:00:00 Job terminated.\n\t(1) Normal ter")
    condor_log.append(log, "7.2", JobEventType.JOB_ABORTED, Reason="via condor_rm")
    assert kinds(system.ends(name))[:1] == [(0, End.CANCELLED)]
    assert system._logged("x.0", "7.0") is not None
    assert system._logged("x.1", "7.1") is None
    place = system.folder.place("x.0")
    assert place is not None
    assert system.numbers_of([place.group]) == {place.group: "7"}
    log.write_text("005 (007.000.000) 2024-01-01 00:00:00 Job terminated.\n\t(1) Normal ter\n")
    condor_log.append(log, "7.2", JobEventType.JOB_ABORTED, Reason="via condor_rm")
    with pytest.raises(Retry, match="cannot be read"):
        system.numbers_of([place.group])
    system, gone, log = grouped(tmp_path, 1)
    assert kinds(system.ends(gone)) == []


def test_an_end_is_that_of_the_job_that_was_asked_for(tmp_path: Path) -> None:
    """If several clusters are in one log, and jobs are evicted, held, released and removed."""
    system, _, log = grouped(tmp_path, 3)
    gone = {"TerminatedNormally": True, "ReturnValue": 1}
    condor_log.append(log, "6.0", JobEventType.JOB_TERMINATED, **gone)
    for job in ("7.0", "7.1", "7.2"):
        condor_log.append(log, job, JobEventType.EXECUTE, ExecuteHost="<127.0.0.1:9618>")
        condor_log.append(log, job, JobEventType.JOB_EVICTED, Checkpointed=False)
    assert [system._logged(f"x.{n}", f"7.{n}") for n in range(3)] == [None] * 3
    condor_log.append(log, "7.0", JobEventType.JOB_ABORTED, Reason="via condor_rm")
    condor_log.append(log, "7.1", JobEventType.JOB_ABORTED, Reason=REMOVED)
    condor_log.append(log, "7.2", JobEventType.JOB_HELD, HoldReason="mine", HoldReasonCode=1)
    found = [system._logged(f"x.{n}", f"7.{n}") for n in range(3)]
    assert [end and end.how for end in found] == [End.CANCELLED, End.NODE, None]


LINES = """\
Job Id: 7.pbs
    Job_Name = x
    job_state = {state}
    exec_host = node1/0*2
{status}    substate = {substate}
    Variable_List = PBS_O_HOME=/home/xenon,PBS_O_LANG=C,
\tPBS_O_LOGNAME=xenon,job_state = R
    comment = Job run
"""
XML = (
    "<Data><Job><Job_Id>7.pbs</Job_Id><Job_Name>x</Job_Name><job_state>{state}</job_state>"
    "<exec_host>node1/0</exec_host>{status}</Job></Data>"
)


@pytest.mark.parametrize(
    ("torque", "shown", "how", "number"),
    [
        (False, ("F", 0, "92"), "done", 0),
        (False, ("F", 7, "93"), "exit", 7),
        (False, ("F", 271, "91"), "cancelled", -15),
        (False, ("F", 265, "93"), "exit", -9),
        (False, ("F", -29, "93"), "timeout", None),
        (False, ("F", -27, "93"), "memory", None),
        (False, ("F", -10, "93"), "node", None),
        (False, ("F", None, "91"), "cancelled", None),
        (False, ("R", None, "42"), None, None),
        (False, ("NEW", None, "42"), None, None),
        (True, ("C", 0, ""), "done", 0),
        (True, ("C", -11, ""), "timeout", None),
        (True, ("C", -10, ""), "memory", None),
        (True, ("C", 271, ""), "cancelled", -15),
        (True, ("Q", None, ""), None, None),
    ],
)
def test_a_state_of_pbs_is_an_end_of_a_kind(
    torque: bool, shown: tuple[str, int | None, str], how: str | None, number: int | None
) -> None:
    """OpenPBS's lines and Torque's XML, which number some reasons differently."""
    state, status, substate = shown
    key = "exit_status" if torque else "Exit_status"
    row = f"<{key}>{status}</{key}>" if torque else f"    {key} = {status}\n"
    text = XML if torque else LINES
    row = "" if status is None else row
    ended = pbs.end_of(text.format(state=state, status=row, substate=substate))
    assert (ended and (ended.how, ended.exit, ended.host)) == (how and (how, number, "node1"))


@pytest.mark.parametrize(
    ("before", "log", "after"),
    [
        (End.CANCELLED, "=>> PBS: job killed: walltime 70 exceeded limit 60", End.TIMEOUT),
        (End.CANCELLED, "=>> PBS: job killed: mem 20kb exceeded limit 10kb", End.MEMORY),
        (End.EXIT, "=>> PBS: job killed: vmem 20kb exceeded limit 10kb", End.MEMORY),
        (End.EXIT, "=>> PBS: job killed: walltime 70 exceeded limit 60", End.EXIT),
        (End.LOST, "=>> PBS: job killed: walltime 70 exceeded limit 60", End.TIMEOUT),
    ],
)
def test_the_log_of_a_job_of_pbs_may_say_more(before: End, log: str, after: End) -> None:
    """As Torque does not report why it killed a job."""
    assert base.explained(base.JobEnd(before), log, pbs.MESSAGES).how is after


def test_an_argument_of_htcondor_stays_one() -> None:
    """Whatever is in it: the simulator's reading is the inverse."""
    words = ["a b", "it's", 'say "x"', "$(HOME)", "", "plain"]
    text = f'"{htcondor._quoted(words)}"'.replace("$(DOLLAR)", "$")
    assert unquoted(text) == words
