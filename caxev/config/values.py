"""The kinds of values that keys of sites.json have: what each must be, and how it is read. Pure.

The classes of this package annotate their fields with these, and `caxev.config.reading` structures
them. The docstring below a field is the documentation of its key.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from decimal import Decimal
from math import inf
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, TypeVar

import attrs

from caxev.config.plugins import entry_points

T = TypeVar("T", bound=attrs.AttrsInstance)
Reader = Callable[[Any], Any]
_UNITS: Final = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGTP", 1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGTP", 1)},
}
_SECONDS: Final = {"s": 1, "min": 60, "h": 3600}
CENTURY: Final = 36525
"""The most days: more, before now or after it, would leave the range of dates."""


class Kind(NamedTuple):
    """A kind of value: what it must be, in words, and the function that reads it.

    `read` returns the value as its class holds it, and raises for any other. Null stands for a
    key's default, and is only read if `null` is true. Without `read` the annotated type itself is
    structured. An error names the nearest of `choices`.
    """

    words: str
    read: Reader | None = None
    choices: tuple[str, ...] = ()
    null: bool = False


def check(fits: object) -> None:
    """Raise ValueError unless the value fits."""
    if not fits:
        raise ValueError


def match(pattern: str, value: str) -> re.Match[str]:
    """Match a text from end to end. Raises ValueError, or TypeError if it is no text."""
    # Not `match` with a $ at the end: that lets one newline pass.
    found = re.fullmatch(pattern, value)
    if found is None:
        raise ValueError
    return found


def matching(pattern: str) -> Reader:
    """Make a reader of texts that match a pattern from end to end."""
    return lambda value: match(pattern, value).string


read_text: Final = matching(r"[^\0]*")
read_name: Final = matching(r"[^\0]+")


def printable(value: Any) -> str:
    """Read a text that is not empty and stays on one line."""
    check(value and str.isprintable(value))
    return str(value)


def absolute(without: str = "") -> Reader:
    """Make a reader of absolute paths that hold no ``..`` and none of some characters."""

    def read(value: Any) -> str:
        path = str(read_name(value))
        check(path.startswith("/") and ".." not in path.split("/"))
        check(not {*without} & {*path})
        return path.rstrip("/") or "/"

    return read


def whole(low: float = 1, high: float = inf) -> Reader:
    """Make a reader of whole numbers. In Python true is one; here it is not."""

    def read(value: Any) -> int:
        # Not isinstance: true is an int in Python.
        check(type(value) is int and low <= value <= high)
        return int(value)

    return read


def number(low: float = 0.0, high: float = sys.float_info.max, above: float = -inf) -> Reader:
    """Make a reader of finite numbers, at least `low` and more than `above`."""

    def read(value: Any) -> float:
        # NaN fails each comparison. A whole number of 400 digits is no float: it exceeds `high`.
        check(type(value) in {int, float} and low <= value <= high and value > above)
        return float(value)

    return read


def flag(value: Any) -> bool:
    """Read true or false."""
    check(isinstance(value, bool))
    return bool(value)


def listed(item: Reader, least: int = 0) -> Reader:
    """Make a reader of lists that have at least so many items."""

    def read(value: Any) -> tuple[Any, ...]:
        # A text is a sequence, too: "raw" would become three names.
        check(isinstance(value, list) and len(value) >= least)
        return tuple(map(item, value))

    return read


def mapped(key: Reader, item: Reader) -> Reader:
    """Make a reader of objects whose keys are names."""
    return lambda value: {key(label): item(inner) for label, inner in value.items()}


def one_of(*choices: str, group: str | None = None) -> Kind:
    """Return the kind of these words, and of the names of installed entry points of a group."""

    def read(value: Any) -> str:
        # Looked up again for each value: a package may be installed while a listener runs.
        check(value in choices or (group and entry_points(group=group, name=value)))
        return str(value)

    others = f", or a name of the entry points {group}" if group else ""
    return Kind(f"one of {', '.join(choices)}{others}", read, choices)


def read_amount(value: Any) -> int:
    """Read ``500GB`` (B, kB to PB, KiB to PiB) as bytes."""
    found = match(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([A-Za-z]+)", value)
    # Decimal, because 0.1 of a float times 1000 ** 5 is not what was written.
    return int(Decimal(found[1]) * _UNITS[found[2]])


def read_rate(value: Any) -> float:
    """Read ``200MB/s`` as bytes a second, 1 or more."""
    rate = float(read_amount(match("(.*)/s", value)[1]))
    check(rate >= 1)
    return rate


def _duration(value: Any) -> float:
    found = match(r"([0-9]{1,6}) ?(s|min|h)", value)
    check(int(found[1]))
    return float(int(found[1]) * _SECONDS[found[2]])


# A lambda is safe here, but not within an annotation of a field: that is evaluated as a text, and
# the lambda's names would be looked up in the class alone.
Text = Annotated[str | None, Kind("a text", lambda value: read_text(value) or None)]
Name = Annotated[str, Kind("a text that is not empty", read_name)]
Names = Annotated[tuple[str, ...], Kind("a list of names", listed(read_name))]
Flag = Annotated[bool, Kind("true or false", flag)]
Count = Annotated[int, Kind("a whole number, 1 or more", whole())]
Port = Annotated[int, Kind("a port, 1 to 65535", whole(1, 65535))]
Days = Annotated[float, Kind("a number of days, up to 36525", number(high=CENTURY))]
SomeDays = Annotated[
    float, Kind("a number of days above 0, up to 36525", number(high=CENTURY, above=0))
]
Hours = Annotated[float, Kind("a number of hours, up to 876600", number(high=24 * CENTURY))]
Amount = Annotated[int, Kind('an amount, as "500GB"', read_amount)]
Rate = Annotated[float, Kind('a rate, as "200MB/s"', read_rate)]
Duration = Annotated[float, Kind('a length of time, as "6h" (s, min, h)', _duration)]


def expanded(path: str | Path) -> Path:
    """Return a path with the home directory in place of ``~``; unchanged if there is no such user.

    sites.json is the same at every site, and a user of one need not exist at another.
    """
    # Path.expanduser raises for an unknown user.
    return Path(os.path.expanduser(path))  # noqa: PTH111


def filled(one: T, other: T) -> T:
    """Return `one`, with the values of `other` for what it leaves out (None)."""
    given = attrs.asdict(one, recurse=False, filter=lambda _key, value: value is not None)
    return attrs.evolve(other, **given)  # type: ignore[misc]  # plainly a class of attrs
