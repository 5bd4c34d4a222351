"""JSON as people write it: a key that is given twice in an object is noticed.

sites.json (`caxev.config.loading`) and rule files (`caxev.rucio.rules`) are read by this.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from caxev.core.errors import ConfigError
from caxev.limited import CONFIGURATION, read_limited


class Repeat(NamedTuple):
    """A key that an object has more than once; `same`: always with the same value."""

    label: str
    key: str
    same: bool

    def __str__(self) -> str:
        what = ", always with the same value" if self.same else " with different values"
        return f"{self.label}: {self.key!r} stands there more than once{what}; keep one of them"


class _Repeating(dict[str, Any]):
    """An object with repeated keys. The last one counts.

    `repeated` has each of these keys, and whether it always has the same value.
    """

    repeated: dict[str, bool]


def parse(text: str) -> Any:
    """Parse JSON so that `repeats` finds repeated keys. Raises what `json.loads` raises."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Python takes the last of equal keys silently; a person who edits the first sees no effect.
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    times = Counter(key for key, _ in pairs)
    repeating = _Repeating(found)
    repeating.repeated = {
        # As JSON, because in Python true equals 1.
        key: len({json.dumps(value, sort_keys=True) for name, value in pairs if name == key}) == 1
        for key, number in times.items()
        if number > 1
    }
    return repeating


def repeats(value: object, label: str, *, inside: bool = True) -> Iterator[Repeat]:
    """Find the repeated keys of an object and of those inside it, but for one's own (``x_``)."""
    if isinstance(value, _Repeating):
        for key, same in value.repeated.items():
            if not key.startswith("x_"):
                yield Repeat(label, key, same)
    if not inside:
        return
    if isinstance(value, dict):
        for key, inner in value.items():
            if not key.startswith("x_"):
                yield from repeats(inner, f"{label}: {key!r}")
    elif isinstance(value, list):
        for inner in value:
            yield from repeats(inner, label)


def as_list(file: Path, document: Any, of: str) -> list[Any]:
    """Return what a file holds if it is a list `of` something. Raises `ConfigError`."""
    if not isinstance(document, list):
        what = next((what for kind, what in _KINDS if isinstance(document, kind)), "a number")
        raise ConfigError(f"{file} holds {what}, not a list of {of}: put it in [ and ]")
    return document


def read_json(file: Path, of: str, absent: str = "") -> Any:
    """Read a file, in which there should be a list `of` something. Raises `ConfigError`."""
    try:
        # Some editors begin a file with a byte order mark, which is no JSON.
        return parse(read_limited(file, CONFIGURATION).decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist{absent}") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 text (byte {error.start}): save it as UTF-8"
        raise ConfigError(f"{file} {what}") from error
    except json.JSONDecodeError as error:
        if not error.doc.strip():
            raise ConfigError(f"{file} is empty: it must hold a list of {of}") from None
        place = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{file} is not JSON: {error.msg} at {place}") from error
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"{file} holds a number that is too long: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{file} is nested too deeply to be a list of {of}") from error


_KINDS: Final = (
    (dict, "an object"),
    (str, "a text"),
    (bool, "a truth value"),
    (type(None), "null"),
)
