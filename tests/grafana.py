"""A Grafana board as Grafana's own description of dashboards has it.

It says what types the fields of ours have (kinds/dashboard in Grafana's source, schema version 39);
no other fields are allowed.
"""

from __future__ import annotations

from typing import Any, Literal

from attrs import field, frozen
from cattrs import Converter


@frozen
class GridPos:
    x: int
    y: int
    w: int
    h: int


@frozen
class Source:
    type: str
    uid: str


@frozen
class Target:
    expr: str
    refId: str  # noqa: N815  # Grafana's name, as those below
    legendFormat: str = ""  # noqa: N815
    format: Literal["time_series", "table", "heatmap"] = "time_series"
    instant: bool = False


@frozen
class Fields:
    defaults: dict[str, str]
    overrides: list[dict[str, Any]]


@frozen
class Panel:
    id: int
    type: Literal["stat", "table", "timeseries"]
    title: str
    gridPos: GridPos  # noqa: N815
    datasource: Source
    targets: list[Target]
    fieldConfig: Fields  # noqa: N815
    options: dict[str, Any] = field(factory=dict)
    description: str = ""


@frozen
class Variable:
    name: str
    type: Literal["query", "datasource"]
    query: str
    label: str = ""
    datasource: Source | None = None
    definition: str = ""
    multi: bool = False
    includeAll: bool = False  # noqa: N815
    refresh: Literal[0, 1, 2] = 0
    sort: int = 0


@frozen
class Board:
    title: str
    uid: str
    schemaVersion: Literal[39]  # noqa: N815
    version: int
    editable: bool
    refresh: str
    tags: list[str]
    timezone: str
    time: dict[Literal["from", "to"], str]
    templating: dict[Literal["list"], list[Variable]]
    annotations: dict[Literal["list"], list[dict[str, Any]]]
    panels: list[Panel]


def _as_it_is(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def board_of(document: dict[str, Any]) -> Board:
    """Return the board. Raises cattrs' BaseValidationError, with all that is wrong."""
    converter = Converter(forbid_extra_keys=True)
    for kind in (str, int, bool):
        converter.register_structure_hook(kind, _as_it_is)
    return converter.structure(document, Board)
