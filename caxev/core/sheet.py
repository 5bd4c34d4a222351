"""Runs as rows of a spreadsheet, for ``caxev runs --csv`` and the page. Pure."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from typing import Final

from caxev.core.escapes import escaped
from caxev.core.model import TRANSFERRED, Run
from caxev.core.selection import CopyPattern, good_hosts, source_of

HEADINGS = ("number", "name", "detector", "start", "source", "bytes", "good", "tags", "copies")
"""`good` are the sites with a good copy of raw data."""
_RAW: Final = CopyPattern(type="raw", status=TRANSFERRED)


def as_csv(rows: Iterable[Iterable[object]]) -> str:
    """Return rows as CSV, a line each."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_cell(one) for one in row] for row in rows)
    return text.getvalue()


def cells(run: Run) -> Iterable[object]:
    """Return a run's row."""
    start = run.start and f"{run.start:%Y-%m-%dT%H:%M:%SZ}"
    good = ", ".join(sorted(good_hosts(run, _RAW)))
    copies = ", ".join(f"{one.key.data}@{one.host} {one.status}" for one in run.copies)
    about = (run.number, run.name, run.detector, start, source_of(run), run.raw_size)
    return *about, good, ", ".join(run.tags), copies


def _cell(value: object) -> object:
    if value is None or isinstance(value, int):
        return value
    text = escaped(str(value))
    # A spreadsheet would evaluate a text that begins with one of these.
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
