"""How a site makes data: ``processing``, ``minitrees`` and the like of its entry in sites.json.

`caxev.handlers.processing` goes by them. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Final

from attrs import field, frozen

from caxev.config.data_types import PROCESSED
from caxev.config.values import (
    Count,
    Kind,
    absolute,
    check,
    listed,
    mapped,
    match,
    matching,
    number,
    one_of,
    read_amount,
    read_name,
    whole,
)

LOCAL: Final = "local"
"""The system of jobs that are processes of the listener's machine."""
SYSTEMS: Final = MappingProxyType(
    {
        "slurm": "caxev.batch.slurm:Slurm",
        "htcondor": "caxev.batch.htcondor:HTCondor",
        "pbs": "caxev.batch.pbs:Pbs",
    }
)
"""The batch systems, and the class that implements each; see `caxev.batch.base.BatchSystem`."""
BATCH: Final = "caxev.batch"
"""The entry point group in which others name batch systems of their own; see `caxev.batch`."""
PLACEHOLDERS: Final = frozenset(
    ("input", "output", "run", "name", "suffix", "version", "cores", "events", "detector", "python")
)
"""The placeholders in ``command`` and ``output``."""
FAILURES: Final = ("exit", "timeout", "memory", "cancelled", "node", "lost")
"""How a job can fail: by its exit status, its time limit, its memory, a person, its node, or
without a trace."""
INPUTS: Final = (
    "processor.DEFAULT.gains",
    "processor.DEFAULT.drift_velocity_liquid",
    "processor.DEFAULT.electron_lifetime_liquid",
)
"""The fields of a run that pax needs."""
_RETRIES: Final = MappingProxyType(
    {"exit": 1, "timeout": 1, "memory": 1, "cancelled": 0, "node": 3, "lost": 1}
)
_BRACES: Final = re.compile(r"\{([a-z_]+)\}")
_BY: Final = ", ".join(sorted(PLACEHOLDERS))


def _filled_in(value: Any) -> str:
    # A misspelt placeholder would reach the program unchanged, and fail job by job.
    check({*_BRACES.findall(read_name(value))} <= PLACEHOLDERS)
    return str(value)


def _output(value: Any) -> str:
    # The result must lie in the job's own directory, and have a name: "." and ".." are none.
    check("/" not in _filled_in(value) and value.strip("."))
    return str(value)


def _walltime(value: Any) -> int:
    found = match("(?:([0-9]{1,3})-)?([0-9]{1,3}):([0-5][0-9]):([0-5][0-9])", value)
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    check(total > 0)
    return total


def _retries(value: Any) -> dict[str, int]:
    if isinstance(value, dict):
        check(value.keys() <= {*FAILURES})
        return _RETRIES | {kind: whole(0)(tries) for kind, tries in value.items()}
    return {kind: whole(0)(value) for kind in FAILURES}


_version: Final = matching(r"[^/\0]+")
# A name that begins with - would be an option of the batch system's program.
_Word = Annotated[str | None, Kind("a name", matching(r"(?!-)[^\s\0]+"))]
# Slurm would expand a % in a log's path, HTCondor a $.
Directory = Annotated[
    str | None, Kind("an absolute path without '..', '$', '%' or '\\'", absolute("$%\\\n"))
]
"""A directory's path as every program takes it."""


@frozen
class Processing:
    """How one kind of derived data is made here, and by what."""

    command: Annotated[
        tuple[str, ...],
        Kind(f"a list of arguments, in which braces hold one of {_BY}", listed(_filled_in, 1)),
    ]
    """One argument an item; no shell sees it. Placeholders in braces are ``input`` and ``output``
    (paths), ``run`` (number or name), ``name``, ``suffix`` (``_MV`` for a run of the muon veto,
    which may have the name of one of the TPC), ``version``, ``cores``, ``events``, ``detector`` and
    ``python`` (the one that runs caxev). The command writes ``{output}``, a file or a directory,
    and ends with status 0."""
    version: Annotated[str | None, Kind("a version, as it stands in pax_version", _version)] = None
    """The version that is made."""
    system: Annotated[str, one_of(LOCAL, *SYSTEMS, group=BATCH)] = LOCAL
    """``local`` (a process of this machine), a batch system, or one of your own."""
    cores: Count = 1
    """Cores of a job. A run of fewer than 1000 events has one."""
    memory_per_core: Annotated[int | None, Kind('an amount, as "2GB"', read_amount)] = None
    """Memory of a job for each of its cores."""
    walltime: Annotated[int | None, Kind('a time, as "12:00:00" or "2-00:00:00"', _walltime)] = None
    """The time limit of a job."""
    partition: _Word = None
    """The partition of Slurm, or the queue of PBS."""
    account: _Word = None
    """The account of Slurm or PBS, or the accounting group of HTCondor."""
    reservation: _Word = None
    """The reservation of Slurm or PBS."""
    options: Annotated[tuple[str, ...], Kind("a list of options", listed(read_name))] = ()
    """Further options: arguments of ``sbatch`` or ``qsub``, or lines of HTCondor's submit
    description. The job's name, and HTCondor's ``initialdir``, stay caxev's: it knows a job by
    them."""
    setup: Annotated[str | None, Kind("shell lines", read_name)] = None
    """Lines for bash before the command. They find the placeholders' values, except the paths, in
    variables: ``$CAXEV_VERSION``, ``$CAXEV_CORES``."""
    environment: Annotated[
        Mapping[str, str],
        Kind(
            'variables, as {"OMP_NUM_THREADS": "1"}',
            mapped(matching("[A-Za-z_][A-Za-z0-9_]*"), read_name),
        ),
    ] = field(factory=dict, hash=False)
    """Further variables."""
    directory: Directory = None
    """The directory in which jobs keep their files; by default below ``state``. The nodes of a
    batch system must see it. It must lie outside of the data directories, and nobody else may write
    there, because files in it are executed. Logs are in its ``logs``."""
    output: Annotated[str, Kind(f"a file's name, in which braces hold one of {_BY}", _output)] = (
        "{name}{suffix}.root"
    )
    """The name of the result."""
    inputs: Annotated[
        tuple[str, ...] | None, Kind("a list of fields' paths", listed(read_name))
    ] = None
    """Fields that the run must have; by default three of ``processor.DEFAULT`` for processed data,
    and none for other types."""
    max_jobs: Count | None = None
    """How many jobs may be queued, or at work here, at once; by default 1 local one, else 100."""
    retries: Annotated[
        Mapping[str, int],
        Kind(f"a whole number, or numbers by kind: {', '.join(FAILURES)}", _retries),
    ] = field(default=_RETRIES, hash=False, converter=dict)
    """How often a job is tried again: a number, or one for each way to fail, which are ``exit``
    (its status; 1), ``timeout`` (1), ``memory`` (1), ``cancelled`` (0), ``node`` (3) and ``lost``
    (1). Then the copy is ``error``."""
    retry_after: Annotated[float, Kind("a number of seconds", number(high=1e9))] = 60.0
    """Seconds until a job is tried again."""
    grow: Annotated[float, Kind("a number, 1 to 10", number(1, 10))] = 1.5
    """After ``timeout`` or ``memory`` the job gets so many times as much of that."""
    pax_hash: Annotated[
        Mapping[str, str],
        Kind('hashes by version, as {"v6.8.0": "5b3d..."}', mapped(_version, read_name)),
    ] = field(factory=dict, hash=False)
    """The hash that is noted in the entries, for each version."""

    def needs(self, type: str) -> tuple[str, ...]:  # noqa: A002  # the field's own name
        """Return the fields that a run must have before data of that type is made of it."""
        if self.inputs is None:
            return INPUTS if type == PROCESSED else ()
        return self.inputs

    @property
    def most(self) -> int:
        """How many jobs there may be at once."""
        return self.max_jobs or (1 if self.system == LOCAL else 100)

    def fill(self, text: str, values: Mapping[str, object]) -> str:
        """Return one argument with the values in place of its names in braces."""
        return _BRACES.sub(lambda found: str(values.get(found[1], found[0])), text)
