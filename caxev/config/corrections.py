"""What is computed for each run from tables: ``corrections`` of a site's entry in sites.json.

`sites` reads these; `handlers.corrections` goes by them. Pure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from math import isfinite
from typing import Any, Final

import attrs
from attrs import frozen

from caxev.config.errors import Problems, nearest
from caxev.core.model import OWN_FIELDS, is_path

_COLLECTION: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,99}")


@frozen
class Correction:
    """One field of a run that is computed from a table.

    `name` is by which ``task_list`` enables it, and under which the run keeps the version used.
    `field` is the dotted path that is set, `table` the collection beside the runs that has the
    rows. It is computed once the run has the fields `when`. `version` None: the newest. What a
    ``function`` gives is multiplied by `factor`, None: it is not said; see `handlers.corrections`.
    """

    name: str
    field: str
    table: str
    when: tuple[str, ...] = ("start",)
    version: str | None = None
    factor: float | None = None

    @property
    def version_field(self) -> str:
        """Where the run keeps which version was used."""
        return f"processor.correction_versions.{self.name}"


def read_corrections(value: Any) -> tuple[Correction, ...]:
    """Read a site's ``corrections``.

    Raises ValueError where it is no list, `Problems` where its items are wrong.
    """
    if not isinstance(value, list):
        raise ValueError  # noqa: TRY004  # what `Shape.read` raises
    problems = [line for place, item in enumerate(value, 1) for line in _problems(place, item)]
    if problems:
        raise Problems(problems)
    found = tuple(
        Correction(**{key: _READ[key][1](given) for key, given in item.items() if key in _READ})
        for item in value
    )
    for key in ("name", "field"):
        given = [getattr(one, key) for one in found]
        problems += [f"two have the {key} {one!r}" for one in {*given} if given.count(one) > 1]
    if problems:
        raise Problems(sorted(problems))
    return found


def _problems(place: int, item: Any) -> Iterator[str]:
    if not isinstance(item, dict):
        yield f"no. {place}: must be an object, not {_shown(item)}"
        return
    label = repr(item["name"]) if isinstance(item.get("name"), str) else f"no. {place}"
    for key in _NEEDED - item.keys():
        yield f"{label}: has no {key}"
    for key, given in item.items():
        if key not in _READ:
            yield from _unknown(label, key)
            continue
        words, read = _READ[key]
        try:
            read(given)
        except ValueError:
            yield f"{label}: {key} must be {words}, not {_shown(given)}"


def _unknown(label: str, key: str) -> Iterator[str]:
    if not key.startswith("x_"):
        guess = nearest(key, _READ)
        hint = f"did you mean {guess!r}?" if guess else "take it out"
        yield f"{label}: unknown key {key!r} ({hint}; a key of your own begins with x_)"


def _sure(fits: object) -> None:
    if not fits:
        raise ValueError


def _text(value: Any) -> str:
    _sure(isinstance(value, str) and value and "\0" not in value)
    return str(value)


def _name(value: Any) -> str:
    _sure(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", _text(value)))
    return str(value)


def _path(value: Any) -> str:
    _sure(is_path(value))
    return str(value)


def _target(value: Any) -> str:
    _sure(_path(value).partition(".")[0] not in OWN_FIELDS)
    return str(value)


def _table(value: Any) -> str:
    _sure(_COLLECTION.fullmatch(_text(value)) and not value.startswith("system."))
    return str(value)


def _when(value: Any) -> tuple[str, ...]:
    _sure(isinstance(value, list) and value)
    return tuple(_path(one) for one in value)


def _version(value: Any) -> str | None:
    return None if value is None else _text(value)


def _factor(value: Any) -> float | None:
    if value is None:
        return None
    _sure(isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value))
    return float(value)


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."  # noqa: PLR2004  # so that it stays a line


_READ: Final[Mapping[str, tuple[str, Callable[[Any], Any]]]] = {
    "name": ("a name of letters, digits and _", _name),
    "field": ("a dotted path into the run that is not the run's own", _target),
    "table": ("the name of a collection", _table),
    "when": ("a list of dotted paths into the run", _when),
    "version": ("a text or null", _version),
    "factor": ("a number or null", _factor),
}
_NEEDED: Final = {one.name for one in attrs.fields(Correction) if one.default is attrs.NOTHING}
