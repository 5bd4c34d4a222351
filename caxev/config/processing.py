"""How a site processes its data: ``processing`` and ``minitrees`` of its entry in sites.json.

`sites` reads these; `handlers.processing` goes by them. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any, Final

from attrs import field, frozen

from caxev.config.errors import Problems, read_keys
from caxev.config.links import read_amount

SYSTEMS: Final = ("local", "slurm")
BATCH: Final = "caxev.batch"
"""The entry point group in which others name batch systems of their own; see `caxev.batch`."""
PLACEHOLDERS: Final = frozenset(
    ("input", "output", "run", "name", "suffix", "version", "cores", "events", "detector", "python")
)
"""What may stand in braces in ``command`` and ``output``."""
FAILURES: Final = ("exit", "timeout", "memory", "cancelled", "node", "lost")
"""How a job can fail: by its exit status, its time limit, its memory, a person, its node, or
without a trace."""
INPUTS: Final = (
    "processor.DEFAULT.gains",
    "processor.DEFAULT.drift_velocity_liquid",
    "processor.DEFAULT.electron_lifetime_liquid",
)
_RETRIES: Final = MappingProxyType(
    {"exit": 1, "timeout": 1, "memory": 1, "cancelled": 0, "node": 3, "lost": 1}
)
_BRACES: Final = re.compile(r"\{([a-z_]+)\}")
_WALLTIME: Final = re.compile(r"(?:([0-9]{1,3})-)?([0-9]{1,3}):([0-5][0-9]):([0-5][0-9])")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@frozen
class Processing:
    """How one kind of derived data is made here, and by what.

    `command` is one argument an item, with `PLACEHOLDERS` in braces. `system` is ``local`` or a
    batch system; `setup` are shell lines to run before the command. `memory_per_core` is in bytes,
    `walltime` and `retry_after` in seconds. `max_jobs` may be in the queue, or at work here, at
    once. `retries` says how often a job that failed so is tried again, and `grow` what a job that
    ran out of time or memory gets of it then, as a multiple. `inputs` are the fields that a run
    must have. `output` names the result. `directory` is where jobs keep their files: the nodes
    must see it, too. `pax_hash` is noted in the entries, for each version.
    """

    command: tuple[str, ...]
    version: str | None = None
    system: str = "local"
    cores: int = 1
    memory_per_core: int | None = None
    walltime: int | None = None
    partition: str | None = None
    account: str | None = None
    reservation: str | None = None
    setup: str | None = None
    environment: Mapping[str, str] = field(factory=dict, hash=False)
    directory: str | None = None
    output: str = "{name}{suffix}.root"
    inputs: tuple[str, ...] = INPUTS
    max_jobs: int | None = None
    retries: Mapping[str, int] = field(default=_RETRIES, hash=False, converter=dict)
    retry_after: float = 60.0
    grow: float = 1.5
    pax_hash: Mapping[str, str] = field(factory=dict, hash=False)

    @property
    def most(self) -> int:
        """How many jobs there may be at once: of local ones 1, else 100, unless it is said."""
        return self.max_jobs or (1 if self.system == "local" else 100)

    def fill(self, text: str, values: Mapping[str, object]) -> str:
        """Put the values into their places in one argument."""
        return _BRACES.sub(lambda found: str(values.get(found[1], found[0])), text)


def _sure(fits: bool) -> None:
    if not fits:
        raise ValueError


def _text(value: Any) -> str:
    _sure(isinstance(value, str) and bool(value) and "\0" not in value)
    return str(value)


def _texts(value: Any) -> tuple[str, ...]:
    _sure(isinstance(value, list))
    return tuple(_text(item) for item in value)


def _command(value: Any) -> tuple[str, ...]:
    command = _texts(value)
    _sure(bool(command) and all(_known(word) for word in command))
    return command


def _known(text: str) -> bool:
    return {found[1] for found in _BRACES.finditer(text)} <= PLACEHOLDERS


def _output(value: Any) -> str:
    name = _text(value)
    _sure(_known(name) and "/" not in name and name.strip(".") != "")
    return name


def _word(value: Any) -> str:
    word = _text(value)
    _sure(not word.startswith("-") and not any(c.isspace() for c in word))
    return word


def _version(value: Any) -> str:
    version = _text(value)
    _sure("/" not in version)
    return version


def _count(value: Any) -> int:
    _sure(isinstance(value, int) and not isinstance(value, bool) and value > 0)
    return int(value)


def _walltime(value: Any) -> int:
    match = _WALLTIME.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    _sure(total > 0)
    return total


def _system(value: Any) -> str:
    _sure(
        isinstance(value, str) and (value in SYSTEMS or bool(entry_points(group=BATCH, name=value)))
    )
    return str(value)


def _environment(value: Any) -> dict[str, str]:
    _sure(isinstance(value, dict) and all(map(_NAME.fullmatch, value)))
    return {name: str(_text(text)) for name, text in value.items()}


def read_directory(value: Any) -> str:
    """Read a directory's path, as every program takes it. Raises ValueError for any other."""
    path = _text(value)
    # Slurm would fill in what stands behind a % in a log's path, and end its lines at a newline.
    _sure(path.startswith("/") and ".." not in PurePosixPath(path).parts)
    _sure(not {"%", "\\", "\n"}.intersection(path))
    return path.rstrip("/")


def _number(value: Any) -> float:
    _sure(isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e9)  # noqa: PLR2004  # thirty years
    return float(value)


def _growth(value: Any) -> float:
    _sure(1 <= _number(value) <= 10)  # noqa: PLR2004  # more is a mistake
    return float(value)


def _retries(value: Any) -> dict[str, int]:
    if isinstance(value, dict):
        _sure(all(kind in FAILURES for kind in value))
        return {**_RETRIES, **{kind: _tries(number) for kind, number in value.items()}}
    return dict.fromkeys(FAILURES, _tries(value))


def _tries(value: Any) -> int:
    _sure(isinstance(value, int) and not isinstance(value, bool) and value >= 0)
    return int(value)


def _hashes(value: Any) -> dict[str, str]:
    _sure(isinstance(value, dict))
    return {_version(version): _text(text) for version, text in value.items()}


_BY: Final = ", ".join(sorted(PLACEHOLDERS))
_READ: Final[Mapping[str, tuple[str, Callable[[Any], Any]]]] = {
    "command": (f"a list of arguments, in which braces hold one of {_BY}", _command),
    "version": ("a version, as it stands in pax_version", _version),
    "system": (f"one of {', '.join(SYSTEMS)}, or a name of the entry points {BATCH}", _system),
    "cores": ("a whole number, 1 or more", _count),
    "memory_per_core": ('an amount, as "2GB"', read_amount),
    "walltime": ('a time, as "12:00:00" or "2-00:00:00"', _walltime),
    "partition": ("a name", _word),
    "account": ("a name", _word),
    "reservation": ("a name", _word),
    "setup": ("shell lines", _text),
    "environment": ('variables, as {"OMP_NUM_THREADS": "1"}', _environment),
    "directory": ("an absolute path without '..', '%' or '\\'", read_directory),
    "output": (f"a file's name, in which braces hold one of {_BY}", _output),
    "inputs": ("a list of fields' paths", _texts),
    "max_jobs": ("a whole number, 1 or more", _count),
    "retries": (f"a whole number, or numbers by kind: {', '.join(FAILURES)}", _retries),
    "retry_after": ("a number of seconds", _number),
    "grow": ("a number, 1 to 10", _growth),
    "pax_hash": ('hashes by version, as {"v6.8.0": "5b3d..."}', _hashes),
}


def read_processing(value: Any) -> Processing:
    """Read ``processing`` or ``minitrees``.

    Raises ValueError where it is no object with a command, `Problems` where its values are wrong.
    """
    if not isinstance(value, dict) or not value:
        raise ValueError
    read, problems = read_keys(value, _READ)
    if value.get("command") is None:
        problems.append("has no command: give it as a list of arguments")
    if problems:
        raise Problems(problems)
    return Processing(**read)
