"""caxev: one process per computing site that reacts to changes of the runs database.

What stands here is all that the author of a handler needs::

    from caxev import HERE, Job, RunUpdate, copy, on
"""

from caxev.files import Manifest
from caxev.job import GiveUp, Job, Result, Retry, Skip, Superseded
from caxev.model import (
    ERROR,
    REQUESTED,
    TRANSFERRED,
    TRANSFERRING,
    VERIFYING,
    Copy,
    CopyAbsent,
    CopyIs,
    CopyKey,
    Event,
    FieldIs,
    Run,
    RunUpdate,
    Tag,
    TagAbsent,
)
from caxev.registry import ELSEWHERE, GONE, HERE, PASSIVE, copy, new_run, on, tag

__version__ = "0.1.0"

__all__ = [
    "ELSEWHERE",
    "ERROR",
    "GONE",
    "HERE",
    "PASSIVE",
    "REQUESTED",
    "TRANSFERRED",
    "TRANSFERRING",
    "VERIFYING",
    "Copy",
    "CopyAbsent",
    "CopyIs",
    "CopyKey",
    "Event",
    "FieldIs",
    "GiveUp",
    "Job",
    "Manifest",
    "Result",
    "Retry",
    "Run",
    "RunUpdate",
    "Skip",
    "Superseded",
    "Tag",
    "TagAbsent",
    "copy",
    "new_run",
    "on",
    "tag",
]
