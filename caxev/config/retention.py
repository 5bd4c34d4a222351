"""How a site looks after its copies: how often they are read again, and which may go.

`sites` reads these out of sites.json; handlers and `caxev.copies.deletion` ask them. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any, Final, NamedTuple, TypeVar

from attrs import frozen

from caxev.config.errors import Problems, read_keys
from caxev.config.links import read_rate

T = TypeVar("T")


@frozen
class Patrol:
    """Each copy is read again every so many `days`, by a worker at `max_rate` bytes a second."""

    days: float
    max_rate: float | None = None


@frozen
class Deletion:
    """What must hold before a copy is deleted here.

    `copies` of raw data must remain at other sites: with this one they are three by default, as in
    cax. Data of runs with one of the tags `protect` stays. The others must have been read within
    `proof_days` before the intent, or since; what nobody answers within `patience` (days) is given
    up. With `when_full`, the oldest that may go do so, whatever their age, when less than the
    site's ``min_free`` is free.
    """

    copies: int = 2
    protect: tuple[str, ...] = ()
    proof_days: float = 0.0
    patience: float = 7.0
    when_full: bool = False


@frozen
class Stalled:
    """Hours after which a copy on which nobody is at work is warned of, and given up."""

    warn: float = 2.0
    retry: float = 24.0


class _Shape(NamedTuple):
    words: str
    read: Callable[[Any], Any]


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError  # noqa: TRY004  # as every reader of a shape
    if not (isfinite(value) and value >= 0):
        raise ValueError
    return float(value)


def _positive(value: Any) -> float:
    if _number(value) == 0:
        raise ValueError
    return float(value)


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError  # noqa: TRY004  # the same
    return value


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        raise ValueError
    return tuple(value)


_DAYS: Final = _Shape("a number of days", _number)
_SOME_DAYS: Final = _Shape("a number of days above 0", _positive)
_HOURS: Final = _Shape("a number of hours", _number)
_PATROL: Final = {
    "days": _SOME_DAYS,
    "max_rate": _Shape('a rate, as "50MB/s", or null', read_rate),
}
_DELETION: Final = {
    "copies": _Shape("a whole number, 1 or more", _count),
    "protect": _Shape("a list of tags", _names),
    "proof_days": _DAYS,
    "patience": _SOME_DAYS,
    "when_full": _Shape("true or false", _flag),
}
_STALLED: Final = {"warn": _HOURS, "retry": _HOURS}


def read_patrol(value: Any) -> Patrol:
    """Read a site's ``patrol``. Raises ValueError, or `Problems` for what is in it."""
    if isinstance(value, dict) and value.get("days") is None:
        raise Problems(["days is missing: after how many each copy is to be read again"])
    return _read(Patrol, value, _PATROL)


def read_deletion(value: Any) -> Deletion:
    """Read a site's ``deletion``. Raises ValueError, or `Problems` for what is in it."""
    return _read(Deletion, value, _DELETION)


def read_stalled(value: Any) -> Stalled:
    """Read a site's ``stalled``. Raises ValueError, or `Problems` for what is in it."""
    return _read(Stalled, value, _STALLED)


def _read(kind: Callable[..., T], value: Any, shapes: Mapping[str, _Shape]) -> T:
    if not isinstance(value, dict):
        raise ValueError  # noqa: TRY004  # as every reader of a shape
    found, problems = read_keys(value, shapes)
    if problems:
        raise Problems(problems)
    return kind(**found)
