"""How a tape archive is reached: ``archive`` of a site's entry in sites.json.

`sites` reads it; `archive_between` gives the outcome to `caxev.tape`. What holds for everyone
stands at the tape site; what is so on one machine only, such as the client's option file, stands
at the site that is there, and counts before it. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs
from attrs import field, frozen

from caxev.config.errors import Problems, read_keys

ARCHIVES: Final = "caxev.tape"
"""The entry point group in which others name archives of their own; see `caxev.tape`."""
PATIENCE: Final = 6 * 3600.0
_UNITS: Final = {"s": 1, "min": 60, "h": 3600}
_DURATION: Final = re.compile(r"([0-9]{1,6}) ?(s|min|h)")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OURS: Final = frozenset({"LC_ALL", "LANG", "LANGUAGE"})


@frozen
class ArchiveOptions:
    """How the client of a tape system is run. None: it is not said.

    `command` are the words that start it, `server` and `optfile` its own options, `environment`
    what is added to our environment. `scratch` is the directory that copies are restored to in
    order to be compared. After `patience` seconds without a sign of life it is killed; a tape may
    have to be fetched and mounted in that time.
    """

    command: tuple[str, ...] | None = None
    server: str | None = None
    optfile: str | None = None
    scratch: str | None = None
    environment: Mapping[str, str] = field(factory=dict, hash=False)
    patience: float | None = None

    def over(self, other: ArchiveOptions) -> ArchiveOptions:
        """These options, and where they say nothing the other's."""
        merged = {
            name: getattr(other, name) if getattr(self, name) is None else getattr(self, name)
            for name in _keys
        }
        return ArchiveOptions(
            **{**merged, "environment": {**other.environment, **self.environment}}
        )


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ValueError
    return value


def _words(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError
    return tuple(_text(word) for word in value)


def _word(value: Any) -> str:
    if any(character.isspace() for character in _text(value)):
        raise ValueError
    return str(value)


def _path(value: Any) -> str:
    path = _text(value)
    if not path.startswith("/") or ".." in path.split("/"):
        raise ValueError
    return path.rstrip("/") or "/"


def _environment(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(map(_VARIABLE.fullmatch, value)):
        raise ValueError
    if _OURS & value.keys():  # the client's output must stay in the language that is parsed
        raise ValueError
    return {name: _text(text) for name, text in value.items()}


def read_duration(value: Any) -> float:
    """Read ``6h`` (s, min, h) as seconds, 1 or more. Raises ValueError for anything else."""
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None or int(match[1]) == 0:
        raise ValueError
    return float(int(match[1]) * _UNITS[match[2]])


_READ: Final[Mapping[str, tuple[str, Callable[[Any], Any]]]] = {
    "command": ('a list of words, as ["dsmc"], or null', _words),
    "server": ("a name without spaces, or null", _word),
    "optfile": ("an absolute path, or null", _path),
    "scratch": ("an absolute path, or null", _path),
    "environment": ("texts by the names of variables (not LANG or LC_ALL), or null", _environment),
    "patience": ('a length of time, as "6h" (s, min, h), or null', read_duration),
}
_keys: Final = tuple(attribute.name for attribute in attrs.fields(ArchiveOptions))


def read_archive(value: Any) -> ArchiveOptions:
    """Read a site's ``archive``.

    Raises ValueError where it is no object, `Problems` where its inner values are wrong.
    """
    if not isinstance(value, dict):
        raise ValueError  # noqa: TRY004  # as every reader here
    options, problems = read_keys(value, _READ)
    if problems:
        raise Problems(problems)
    return ArchiveOptions(**options)
