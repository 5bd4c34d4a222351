"""How tables come out: rich on a terminal, aligned plain lines in a pipe, or one JSON document.

What stands in the database was written by others: whatever is not printable is shown escaped, so
that no text from there can steer a terminal. Times are UTC, ISO 8601.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import click
from attrs import frozen

from caxev.core.escapes import escaped

Row = Mapping[str, Any]


@frozen
class Table:
    """Rows with the columns that people see: (key of the row, heading). JSON has every key."""

    columns: Sequence[tuple[str, str]]
    rows: Sequence[Row]
    title: str = ""


def show(table: Table, *, as_json: bool, empty: str = "") -> None:
    """Print a table to stdout; `empty` is for people, where there are no rows."""
    if as_json:
        show_json(table.rows)
    elif not table.rows:
        say(empty)
    elif sys.stdout.isatty():
        _show_rich(table)
    else:
        _show_plain(table)


def show_json(rows: Sequence[Row]) -> None:
    """Print rows as one JSON document: a list of objects."""
    click.echo(json.dumps(list(rows), default=_json, indent=2))


def say(line: str, *, err: bool = False) -> None:
    """Print a line for people, if there is one."""
    if line:
        click.echo(escaped(line), err=err)


def time(moment: datetime | None) -> str | None:
    """Return a time as ISO 8601 in UTC, to the second: ``2016-11-11T14:34:05Z``."""
    return None if moment is None else f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def cell(value: Any) -> str:
    """Return a value as people read it in a table."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return time(value) or "-"
    if isinstance(value, list | tuple):
        return escaped(", ".join(map(str, value))) or "-"
    return escaped(str(value))


def size(number: object) -> str | None:
    """Return bytes as people read them: ``1.2 GB`` (powers of 1000)."""
    if not isinstance(number, int | float):
        return None
    value = float(number)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:  # noqa: PLR2004  # rounds to 1000
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def lasting(seconds: float) -> str:
    """Return a length of time as people say it, in the largest unit of which there are two."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _json(value: Any) -> Any:
    return time(value) if isinstance(value, datetime) else str(value)


def _cells(table: Table) -> list[list[str]]:
    return [[cell(row.get(key)) for key, _ in table.columns] for row in table.rows]


def _show_plain(table: Table) -> None:
    say(table.title)
    lines = [[heading for _, heading in table.columns], *_cells(table)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = (text.ljust(width) for text, width in zip(line, widths, strict=True))
        click.echo("  ".join(padded).rstrip())


def _show_rich(table: Table) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(box=SIMPLE_HEAD, title=escaped(table.title) or None, title_justify="left")
    for _, heading in table.columns:
        shown.add_column(heading, overflow="fold")
    for cells in _cells(table):
        shown.add_row(*(Text(text, style=_STYLES.get(text, "")) for text in cells))
    Console().print(shown)


_STYLES = {
    "done": "green",
    "transferred": "green",
    "ok": "green",
    "running": "cyan",
    "transferring": "cyan",
    "verifying": "cyan",
    "requested": "yellow",
    "failed": "red",
    "error": "red",
}
