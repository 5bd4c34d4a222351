"""What the classes of `caxev.config` say of their keys: name, kind, default and documentation."""

from __future__ import annotations

import ast
import inspect
from itertools import pairwise
from typing import Any, Final, NamedTuple

from caxev.config import (
    ArchiveOptions,
    Catalogue,
    Correction,
    DataType,
    Deletion,
    Email,
    Link,
    Patrol,
    Processing,
    Site,
    Stalled,
    Webhook,
)
from caxev.config.permissions import Permissions
from caxev.config.reading import keys, kind_of

CLASSES: Final[dict[str, type]] = {
    "": Site,
    "types": DataType,
    "links": Link,
    "archive": ArchiveOptions,
    "permissions": Permissions,
    "corrections": Correction,
    "processing": Processing,
    "minitrees": Processing,
    "rucio": Catalogue,
    "patrol": Patrol,
    "deletion": Deletion,
    "stalled": Stalled,
    "email": Email,
    "webhook": Webhook,
}
"""The classes by the key of the file, a site or its `alarms`, whose values (or theirs) they are."""


class Key(NamedTuple):
    """A key. `must`: what its value must be. `default`: `attrs.NOTHING` if it is required."""

    name: str
    must: str
    default: Any
    text: str


def documented(cls: type) -> list[Key]:
    """Return the keys of a class in their order, each with the docstring below its field."""
    texts = {name: text for base in reversed(cls.__mro__[:-1]) for name, text in _texts(base)}
    found = []
    for name, field in keys(cls).items():
        kind = kind_of(field.type)
        assert kind is not None
        found.append(Key(name, kind.words, field.default, texts.get(field.name, "")))
    return found


def _texts(cls: type) -> list[tuple[str, str]]:
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    return [
        (field.target.id, " ".join(below.value.value.split()))
        for field, below in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if isinstance(below.value.value, str)
    ]
