"""Who may read copies at a site: ``permissions`` of its entry in sites.json.

`sites` reads these; `handlers.permissions` goes by them. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from attrs import frozen

from caxev.config.errors import Problems, nearest

_WHO: Final = r"(?:d(?:efault)?:)?(?:u(?:ser)?|g(?:roup)?|o(?:ther)?|m(?:ask)?)"
_ENTRY: Final = re.compile(rf"{_WHO}:[A-Za-z0-9_.@-]*:[rwxX-]{{1,3}}")
_OWNER: Final = 0o700


@frozen
class Permission:
    """What files and directories of a copy are given; None: left as it is.

    `mode` is that of directories; files get it without its execute and special bits. `group` is a
    group's name. `acl` is what ``setfacl --modify`` takes.
    """

    mode: int | None = None
    group: str | None = None
    acl: str | None = None

    @property
    def file_mode(self) -> int | None:
        """The mode of files."""
        return None if self.mode is None else self.mode & 0o666


def read_permissions(value: Any, types: tuple[str, ...]) -> dict[str, Permission]:
    """Read a site's ``permissions``, by type of data: its own, or else those named for all.

    Raises ValueError where it is no object, `Problems` where its values are wrong.
    """
    if not isinstance(value, dict):
        raise ValueError  # noqa: TRY004  # what `Shape.read` raises
    problems = [line for key, given in value.items() for line in _problems(key, given, types)]
    if problems:
        raise Problems(problems)
    common = _values(value)
    return {
        name: Permission(**{**common, **_values(value.get(name) or {})})
        for name in types
        if common or value.get(name)
    }


def _values(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: read(entry[key]) for key, (_, read) in _READ.items() if entry.get(key) is not None}


def _problems(key: str, given: Any, types: tuple[str, ...], label: str = "") -> Iterator[str]:
    if key in types and not label and isinstance(given, dict):
        for name, value in given.items():
            yield from _problems(name, value, (), f"{key}: ")
    elif key in types and not label:
        yield f"{key}: must be an object, not {_shown(given)}"
    elif key in _READ:
        words, read = _READ[key]
        try:
            read(given)
        except ValueError:
            yield f"{label}{key} must be {words} or null, not {_shown(given)}"
    elif not key.startswith("x_"):
        guess = nearest(key, (*_READ, *types))
        hint = f"did you mean {guess!r}?" if guess else "take it out"
        yield f"{label}unknown key {key!r} ({hint}; a key of your own begins with x_)"


def _sure(fits: object) -> None:
    if not fits:
        raise ValueError


def _mode(value: Any) -> int | None:
    if value is None:
        return None
    _sure(isinstance(value, str) and re.fullmatch("0?[0-7]{3,4}", value))
    mode = int(value, 8)
    _sure(mode & _OWNER == _OWNER and not mode & 0o4002)
    return mode


def _group(value: Any) -> str | None:
    _sure(value is None or (isinstance(value, str) and value and value.isprintable()))
    return None if value is None else str(value)


def _acl(value: Any) -> str | None:
    if value is None:
        return None
    _sure(isinstance(value, str) and all(map(_ENTRY.fullmatch, value.split(","))))
    return str(value)


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."  # noqa: PLR2004  # so that it stays a line


_READ: Final[Mapping[str, tuple[str, Callable[[Any], Any]]]] = {
    "mode": ('a mode as "0750", with all for the owner and no writing for others', _mode),
    "group": ("a group's name", _group),
    "acl": ('entries for setfacl, as "g:xenon:rX"', _acl),
}
