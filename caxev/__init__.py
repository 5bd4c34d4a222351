"""caxev: one process per computing site that reacts to changes of the runs database.

What stands here is all that the author of a handler needs::

    from caxev import HERE, Job, RunUpdate, copy, on
"""

from caxev.core.errors import Denied, GiveUp, Retry, RootAway, Superseded
from caxev.core.history import What
from caxev.core.job import Decision, Job, Result, Skip, Unmet, Wait, skip_of
from caxev.core.model import (
    DELETING,
    ERROR,
    MOVING,
    REQUESTED,
    TRANSFERRED,
    TRANSFERRING,
    VERIFYING,
    Copy,
    CopyField,
    CopyIs,
    CopyKey,
    Event,
    Field,
    Run,
    Tag,
)
from caxev.core.registry import (
    CORRECTION_INPUTS,
    DERIVED,
    ELSEWHERE,
    GONE,
    HERE,
    OWN,
    PASSIVE,
    PRIMARY,
    PROCESSING_INPUTS,
    VERSIONED,
    copy,
    copy_field,
    field,
    new_run,
    on,
    tag,
)
from caxev.core.update import (
    CopiesAtLeast,
    CopyAbsent,
    FieldIs,
    NobodyReads,
    RunUpdate,
    TagAbsent,
    TagThere,
)
from caxev.files import Manifest

__version__ = "0.1.0"

__all__ = [
    "CORRECTION_INPUTS",
    "DELETING",
    "DERIVED",
    "ELSEWHERE",
    "ERROR",
    "GONE",
    "HERE",
    "MOVING",
    "OWN",
    "PASSIVE",
    "PRIMARY",
    "PROCESSING_INPUTS",
    "REQUESTED",
    "TRANSFERRED",
    "TRANSFERRING",
    "VERIFYING",
    "VERSIONED",
    "CopiesAtLeast",
    "Copy",
    "CopyAbsent",
    "CopyField",
    "CopyIs",
    "CopyKey",
    "Decision",
    "Denied",
    "Event",
    "Field",
    "FieldIs",
    "GiveUp",
    "Job",
    "Manifest",
    "NobodyReads",
    "Result",
    "Retry",
    "RootAway",
    "Run",
    "RunUpdate",
    "Skip",
    "Superseded",
    "Tag",
    "TagAbsent",
    "TagThere",
    "Unmet",
    "Wait",
    "What",
    "copy",
    "copy_field",
    "field",
    "new_run",
    "on",
    "skip_of",
    "tag",
]
