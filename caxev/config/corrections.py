"""Values computed for each run from tables: ``corrections`` of a site's entry in sites.json.

`caxev.handlers.corrections` goes by them. Pure.
"""

from __future__ import annotations

from typing import Annotated, Any

from attrs import frozen

from caxev.config.errors import Problems
from caxev.config.reading import read
from caxev.config.values import Kind, check, listed, matching, number, read_name
from caxev.core.update import OWN_FIELDS, is_path


def _path(value: Any) -> str:
    check(is_path(value))
    return str(value)


def _target(value: Any) -> str:
    # A correction must not overwrite what identifies a run, or its entries.
    check(_path(value).partition(".")[0] not in OWN_FIELDS)
    return str(value)


@frozen
class Correction:
    """One field of a run that is computed from a table."""

    name: Annotated[
        str, Kind("a name of letters, digits and _", matching("[A-Za-z_][A-Za-z0-9_]*"))
    ]
    """The name in ``task_list``, and in the run's ``processor.correction_versions``."""
    field: Annotated[str, Kind("a dotted path into the run that is not the run's own", _target)]
    """The dotted path that is set in the run."""
    table: Annotated[
        str,
        Kind("the name of a collection", matching(r"(?!system\.)[A-Za-z_][A-Za-z0-9_.-]{0,99}")),
    ]
    """The collection, beside that of the runs, that has the rows."""
    when: Annotated[
        tuple[str, ...], Kind("a list of dotted paths into the run", listed(_path, 1))
    ] = ("start",)
    """The value is computed as soon as the run has these fields."""
    version: Annotated[str | None, Kind("a text", read_name)] = None
    """The version of the rows that count; null: the one made last."""
    factor: Annotated[float | None, Kind("a number", number(-1e308))] = None
    """The value of a row's ``function`` is multiplied by this. Rows in cax's form need it."""

    @property
    def version_field(self) -> str:
        """The dotted path of the run's field that keeps which version was used."""
        return f"processor.correction_versions.{self.name}"


def read_corrections(value: Any) -> tuple[Correction, ...]:
    """Read a site's ``corrections``. Raises ValueError if it is no list, and `Problems`."""
    check(isinstance(value, list))
    # Two corrections of one field would overwrite each other's values.
    found: tuple[Correction, ...] = read(tuple[Correction, ...], value)
    problems = [
        f"two have the {key} {one!r}"
        for key, given in (
            ("field", [one.field for one in found]),
            ("name", [one.name for one in found]),
        )
        for one in sorted({one for one in given if given.count(one) > 1})
    ]
    if problems:
        raise Problems(problems)
    return found
