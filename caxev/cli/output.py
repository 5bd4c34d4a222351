"""Print results as a table, on a terminal or in a pipe, or as one JSON document.

Every command uses the same forms: `run_parts` for a run, `event_parts` for an event, ISO 8601 in
UTC for a time, a number of bytes for an amount of data.

Other programs write to the database: unprintable characters are escaped, so that no text from there
can control a terminal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from shutil import get_terminal_size
from textwrap import indent
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, Self

import click
from attrs import Factory, define, field, frozen

from caxev.cli.errors import FAILED
from caxev.cli.options import options
from caxev.core.amounts import size
from caxev.core.escapes import escaped
from caxev.core.model import CopyField, CopyKey, Event, Field, Tag

if TYPE_CHECKING:
    from caxev.database import Database

P = ParamSpec("P")
Row = Mapping[str, Any]


@frozen
class Parts:
    """A value that tables show as a few words, and JSON as an object."""

    words: str
    parts: Mapping[str, Any]

    def __str__(self) -> str:
        return self.words


def run_parts(run: object, number: int | None = None, name: str | None = None) -> Parts:
    """Return a run by its number, else its name, else its id; None: it is not stored."""
    key = None if run is None else str(run)
    words = str(number or name or f"{key} (gone)")
    return Parts(words, {"id": key, "number": number or None, "name": name or None})


def event_parts(event: Event) -> Parts:
    """Return what happened to which aspect of a run: its values, without their times."""
    kind, parts = "run", {}
    match event.aspect:
        case CopyKey() as copy:
            kind, parts = "copy", copy._asdict()
        case CopyField() as one:
            kind, parts = "copy_field", one._asdict()
        case Tag(tag):
            kind, parts = "tag", {"tag": tag}
        case Field(path):
            kind, parts = "field", {"field": path}
    before = None if event.before is None else event.before.partition("@")[0]
    return Parts(str(event), {"kind": kind, **parts, "before": before, "after": event.status})


@frozen
class Column:
    """A column of a table: a row's `key`, or ``key.part`` of `Parts`, under a heading.

    `show` turns a value into the cell's text. If a terminal is too narrow for all columns, the most
    `minor` are left out first, and those with 0 never. By default the key is the heading.
    """

    key: str
    heading: str = field(default=Factory(lambda self: self.key.upper(), takes_self=True))
    show: Callable[[Any], Any] = field(default=lambda value: value)
    minor: int = field(default=0, kw_only=True)

    def value(self, row: Row) -> Any:
        """Return the row's value in this column."""
        name, _, part = self.key.partition(".")
        found = row.get(name)
        if part:
            found = None if found is None else found.parts[part]
        return None if found is None else self.show(found)

    def widths(self, rows: Sequence[Row]) -> tuple[int, int]:
        """Return the width of the heading, and that of the widest cell."""
        cells = (len(cell(self.value(row))) for row in rows)
        return len(self.heading), max(cells, default=0)


def columns(*keys: str | Column) -> tuple[Column, ...]:
    """Return the columns of a table; a key is a column with the key as its heading."""
    return tuple(Column(one) if isinstance(one, str) else one for one in keys)


_WHOLE: Final = 20
"""The width, that of a time, up to which a column is not folded."""
_FOLDED: Final = 12
"""The smallest width at which a folded column is legible."""
_GAP: Final = 2


def _fitting(columns: Sequence[Column], rows: Sequence[Row], width: int) -> Sequence[Column]:
    """Return the columns that have anything to show, and fit the width."""
    filled = [one for one in columns if any(map(_says, map(one.value, rows)))]
    return _narrowed(filled, rows, width) or columns[:1]


def _says(value: object) -> bool:
    # A column of zeros has nothing to show, but one of "no" does.
    return isinstance(value, bool) or value not in (None, "", 0, [], ())


def _narrowed(columns: Sequence[Column], rows: Sequence[Row], width: int) -> list[Column]:
    """Return the columns without the most minor ones, as far as the width demands it."""
    left = list(columns)
    # Measured again after each removal, so that no column goes without need.
    for minor in sorted(columns, key=lambda one: -one.minor):
        if minor.minor and _least(left, rows) > width:
            left.remove(minor)
    return left


def _least(columns: Iterable[Column], rows: Sequence[Row]) -> int:
    """Return how many characters these columns need if they are folded as far as possible."""
    widths = [one.widths(rows) for one in columns]
    least = (max(heading, cells if cells <= _WHOLE else _FOLDED) for heading, cells in widths)
    return sum(least) + _GAP * (len(widths) - 1)


def show(
    columns: Sequence[Column], rows: Sequence[Row], *, empty: str = "", failed: bool = False
) -> None:
    """Print a table, or JSON, to stdout, and exit with a failure if `failed`.

    `empty` is for people, if there are no rows. Columns without anything to show are left out, and
    on a terminal the rest fits its width. ``--wide`` keeps every column, and folds none. JSON has
    every key of every row.
    """
    if options().as_json:
        show_json(rows)
    elif not rows:
        print_line(empty)
    elif sys.stdout.isatty():
        _show_rich(columns, rows, wide=options().wide)
    else:  # a pipe has no width: leave out empty columns only
        shown = columns if options().wide else _fitting(columns, rows, sys.maxsize)
        _LinePrinter.of(shown, rows).add(rows)
    fail_if(failed)


def fail_if(failed: bool) -> None:
    """Exit with a failure if something has failed."""
    if failed:
        raise click.exceptions.Exit(FAILED)


def show_lines(rows: Sequence[Row], line: Callable[[Row], str], *, failed: bool = False) -> None:
    """Print a line for each row, or JSON, and exit with a failure if `failed`."""
    if options().as_json:
        show_json(rows)
    else:
        for row in rows:
            print_line(line(row))
    fail_if(failed)


def stream(
    columns: Sequence[Column],
    empty: str,
    rows: Callable[Concatenate[Database, P], AsyncGenerator[Row, None]],
    *args: P.args,
    **kwargs: P.kwargs,
) -> bool:
    """Print a table whose rows `rows` reads from the database one by one, as `show_rows` does."""

    async def show_all(database: Database) -> bool:
        async with aclosing(rows(database, *args, **kwargs)) as found:
            return await show_rows(columns, found, empty=empty)

    return options().with_database(show_all)


async def show_rows(
    columns: Sequence[Column], rows: AsyncIterable[Row], *, empty: str = ""
) -> bool:
    """Print a table whose rows come one by one, as `show` does if they are few.

    Many rows are not kept: each is printed as it comes, in columns as wide as the first rows need.
    The JSON is the same, however many rows there are. Returns whether there was any.
    """
    first: list[Row] = []
    printer: _JsonPrinter | _LinePrinter | None = None
    try:
        async for row in rows:
            first.append(row)
            if len(first) > _FEW and printer is None:
                printer = _JsonPrinter() if options().as_json else _LinePrinter.of(columns, first)
            if printer is not None:
                printer.add(first)
                first = []
    except BaseException:  # also of Ctrl-C: what was done before shows
        if printer is not None:
            printer.end()
        elif first:
            show(columns, first)
        raise
    if printer is None:
        show(columns, first, empty=empty)
    else:
        printer.end()
    return printer is not None or bool(first)


_FEW: Final = 100
"""Maximum number of rows for which a table's columns are as wide as all of them need."""


@define
class _JsonPrinter:
    """Prints the list that `show_json` would print, object by object."""

    _before: str = field(init=False, default="[\n")

    def add(self, rows: Sequence[Row]) -> None:
        for row in rows:
            text = indent(_json(row), "  ")
            click.echo(f"{self._before}{text}", nl=False)
            self._before = ",\n"

    def end(self) -> None:
        click.echo("\n]")


@define
class _LinePrinter:
    """Prints a line for each row; a cell that is wider than its column pushes the others aside."""

    columns: Sequence[Column]
    widths: Sequence[int]

    @classmethod
    def of(cls, columns: Sequence[Column], first: Sequence[Row]) -> Self:
        """Print the headings. All columns stay, as a later row may have something to show."""
        shown = list(columns)
        if sys.stdout.isatty() and not options().wide:
            shown = _narrowed(shown, first, get_terminal_size().columns)
        printer = cls(shown, [max(one.widths(first)) for one in shown])
        printer._print([one.heading for one in shown])
        return printer

    def add(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._print([cell(column.value(row)) for column in self.columns])

    def _print(self, cells: Sequence[str]) -> None:
        padded = (text.ljust(width) for text, width in zip(cells, self.widths, strict=True))
        click.echo((" " * _GAP).join(padded).rstrip())

    def end(self) -> None:
        return


def show_json(document: Sequence[Row] | Row) -> None:
    """Print rows, or one, as one JSON document."""
    click.echo(_json(document))


def _json(value: Any) -> str:
    return json.dumps(value, default=_plain, indent=2)


def print_line(line: str, *, err: bool = False) -> None:
    """Print a line for people, if there is one."""
    if line:
        click.echo(escaped(line), err=err)


def print_progress(line: str) -> None:
    """Print a line of progress: on stderr beside JSON, which has stdout to itself."""
    print_line(line, err=options().as_json)


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


SIZE: Final = Column("bytes", "SIZE", size)


def _plain(value: Any) -> Any:
    if isinstance(value, Parts):
        return dict(value.parts)
    return time(value) if isinstance(value, datetime) else str(value)


def _show_rich(columns: Sequence[Column], rows: Sequence[Row], *, wide: bool) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    fitting = columns if wide else _fitting(columns, rows, console.width)
    shown = Table(
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, _GAP - 1, 0, 0),  # the box adds one column
    )
    for column in fitting:
        heading, cells = column.widths(rows)
        whole = wide or cells <= _WHOLE
        shown.add_column(column.heading, overflow="fold", min_width=heading, no_wrap=whole)
    # Texts and not strings: rich would take brackets in what others wrote for mark-up.
    for row in rows:
        texts = (cell(column.value(row)) for column in fitting)
        shown.add_row(*(Text(text, style=_STYLES.get(text, "")) for text in texts))
    if wide:  # let lines be longer than the terminal, which then wraps them, rather than fold cells
        widths = [max(column.widths(rows)) + _GAP for column in fitting]
        console.width = max(console.width, sum(widths))
    console.print(shown)


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
