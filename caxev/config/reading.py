"""Configuration classes out of JSON: one converter, and one form of the errors.

A class is attrs' own; each field whose type has a `Kind` is a key of that name (`from_` is
``from``). Null stands for a key's default, and a key that begins with ``x_`` is passed over.
`caxev.config.loading` reads sites.json by this, `caxev.rucio.rules` rule files. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, partial
from types import UnionType
from typing import TYPE_CHECKING, Any, Final, Union, get_args, get_origin

import attrs

from caxev.config.errors import Problems, hint, shown
from caxev.config.values import Kind, check

# cattrs is imported by the functions that structure: processes that read no file start sooner.
if TYPE_CHECKING:
    from cattrs import Converter
    from cattrs.dispatch import StructureHook

FORMER: Final = {
    "pax_versions": "pax_processing_versions",
    "receive": "method",
    "directory": "dir_raw",
}
"""Keys of old versions of cax, and what they became."""


def read(kind: Any, value: Any) -> Any:
    """Structure a value as a type. Raises `Problems` with a line for each mistake in its parts.

    If the value as a whole is of another kind, any exception is raised: the caller knows what it
    must be.
    """
    from cattrs import BaseValidationError

    if attrs.has(kind) and not isinstance(value, dict):
        raise Problems([f"is {shown(value)}, not an object with its keys"])
    try:
        return _converter().structure(value, kind)
    except BaseValidationError as error:
        raise Problems(_mistakes(error, value)) from error


def keys(cls: type) -> dict[str, attrs.Attribute[Any]]:
    """Return the keys of a configuration class, in order, each with its field."""
    attrs.resolve_types(cls)
    return {one.name.rstrip("_"): one for one in attrs.fields(cls) if kind_of(one.type)}


def kind_of(type_: Any) -> Kind | None:
    """Return the kind in the annotation of a field's type, optional or not."""
    annotated = _annotated(type_)
    return next((one for one in get_args(annotated) if isinstance(one, Kind)), None)


def _annotated(type_: Any) -> Any:
    parts = get_args(type_)
    if get_origin(type_) in {Union, UnionType}:
        return next((part for part in parts if kind_of(part)), None)
    return type_ if any(isinstance(part, Kind) for part in parts) else None


def _mistakes(error: BaseException, value: Any) -> Iterator[str]:
    """Report each mistake in a value; `error` is what structuring it raised."""
    from cattrs import BaseValidationError, ForbiddenExtraKeysError

    if isinstance(error, BaseValidationError):
        for inner in error.exceptions:
            yield from _located(inner, value)
    elif isinstance(error, ForbiddenExtraKeysError):
        for key in sorted(error.extra_fields):
            yield _unknown(key, keys(error.cl))
    else:
        yield from error.lines if isinstance(error, Problems) else [str(error)]


def _located(error: BaseException, value: Any) -> Iterator[str]:
    """Report the mistakes in one part of a value, each after the name of that part."""
    from cattrs import AttributeValidationNote, BaseValidationError, IterableValidationNote

    # cattrs leaves the place of a mistake as a note of the exception, next to notes of others.
    notes = (AttributeValidationNote, IterableValidationNote)
    note = next((one for one in getattr(error, "__notes__", ()) if isinstance(one, notes)), None)
    if note is None:  # it is the whole that is wrong
        yield from _mistakes(error, value)
        return
    if isinstance(note, AttributeValidationNote):
        label = note.name.rstrip("_")
        inner, must = value.get(label), f"{label} must be"
    else:
        inner = value[note.index]
        label = _label(note.index, inner)
        must = f"{label}: must be"
    kind = kind_of(note.type) or Kind("an object")
    if isinstance(error, BaseValidationError | Problems):
        yield from (f"{label}: {line}" for line in _mistakes(error, inner))
    # The converter raises KeyError for a missing key, but a reader may raise one of its own, too.
    elif isinstance(error, KeyError) and label not in value:
        yield f"{label} is missing: it must be {kind.words}"
    else:
        guess = hint(inner, kind.choices) if isinstance(inner, str) else ""
        yield f"{must} {kind.words}, not {shown(inner)}" + (f" ({guess})" if guess else "")


def _label(index: int | str, item: Any) -> str:
    """Name an item: by its key, by the name that it has, or by its place in a list."""
    named = item.get("name") if isinstance(item, dict) else None
    if isinstance(index, str):
        return repr(index)
    return repr(named) if isinstance(named, str) else f"no. {index + 1}"


def _unknown(key: str, known: Mapping[str, object]) -> str:
    # The nearest key might be a plausible one, and the secret would stay in the file.
    if "password" in key.lower():
        return f"unknown key {key!r} (no secret belongs in a file: set RUCIO_PASSWORD or the like)"
    # By its letters alone, ``pax_versions`` would be taken for ``pax_version_purge``.
    former = FORMER.get(key)
    guess = f"did you mean {former!r}?" if former in known else hint(key, known, "take it out")
    return f"unknown key {key!r} ({guess}; a key of your own begins with x_)"


def _kind_hook(type_: Any, converter: Converter) -> StructureHook:
    inner, kind, *_ = get_args(_annotated(type_))
    reader = kind.read or partial(converter.structure, cl=inner)
    return lambda value, _type: reader(value)


def _class_hook(cls: type, converter: Converter) -> StructureHook:
    from cattrs.gen import make_dict_structure_fn, override

    known = keys(cls)
    others = [one.name for one in attrs.fields(cls) if one not in known.values()]
    overrides: dict[str, Any] = dict.fromkeys(others, override(omit=True))
    overrides |= {one.name: override(rename=key) for key, one in known.items()}
    structure: StructureHook = make_dict_structure_fn(cls, converter, **overrides)
    # Null stands for the default. A required key has none: its reader refuses null by name.
    optional = {
        key
        for key, one in known.items()
        if one.default is not attrs.NOTHING and not getattr(kind_of(one.type), "null", False)
    }

    def hook(value: Any, _type: Any) -> Any:
        check(isinstance(value, dict))
        given = {
            key: inner
            for key, inner in value.items()
            if not key.startswith("x_") and (inner is not None or key not in optional)
        }
        return structure(given, cls)

    return hook


@cache
def _converter() -> Converter:
    from cattrs import Converter

    made = Converter(detailed_validation=True, forbid_extra_keys=True)
    # The hook that is registered last is asked first: an annotated class goes by its kind.
    made.register_structure_hook_factory(attrs.has, _class_hook)
    made.register_structure_hook_factory(lambda type_: kind_of(type_) is not None, _kind_hook)
    return made
