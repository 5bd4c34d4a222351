"""Which end a job had by what HTCondor and PBS write of it; Slurm is in test_processing.py."""

from __future__ import annotations

from typing import Any

import pytest

from caxev.batch import base, htcondor, pbs
from caxev.batch.base import End
from tests.condor_simulator import unquoted


@pytest.mark.parametrize(
    ("event", "how", "status"),
    [
        ({"MyType": "JobTerminatedEvent", "TerminatedNormally": True, "ReturnValue": 0}, "done", 0),
        ({"MyType": "JobTerminatedEvent", "TerminatedNormally": True, "ReturnValue": 7}, "exit", 7),
        ({"MyType": "JobTerminatedEvent", "TerminatedBySignal": 9}, "exit", -9),
        ({"MyType": "JobAbortedEvent", "Reason": "via condor_rm"}, "cancelled", None),
        ({"MyType": "JobEvictedEvent"}, "node", None),
        ({"MyType": "JobReconnectFailedEvent", "Reason": "lease expired"}, "node", None),
        (
            {"MyType": "JobHeldEvent", "HoldReasonCode": 34, "HoldReasonSubCode": 102},
            "memory",
            None,
        ),
        ({"MyType": "JobHeldEvent", "HoldReasonCode": 34, "HoldReasonSubCode": 104}, "node", None),
        ({"MyType": "JobHeldEvent", "HoldReasonCode": 47}, "timeout", None),
        (
            {"MyType": "JobHeldEvent", "HoldReasonCode": 26, "HoldReason": "Memory above 2 GB"},
            "memory",
            None,
        ),
        (
            {"MyType": "JobHeldEvent", "HoldReasonCode": 26, "HoldReason": "exceeded walltime"},
            "timeout",
            None,
        ),
        ({"MyType": "JobHeldEvent", "HoldReasonCode": 13, "HoldReason": "memory"}, "node", None),
        ({"MyType": "JobHeldEvent", "HoldReasonCode": 1}, None, None),
        ({"MyType": "ExecuteEvent"}, None, None),
        ({"MyType": "JobDisconnectedEvent"}, None, None),
    ],
)
def test_an_event_of_htcondor_is_an_end_of_a_kind(
    event: dict[str, Any], how: str | None, status: int | None
) -> None:
    """By its type and codes; a hold by a person, and a lost connection, are none."""
    ended = htcondor.end_of(event)
    assert (ended and (ended.how, ended.exit)) == (how and (how, status))


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
