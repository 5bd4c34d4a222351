"""The list of runs: which are asked for in the address, a page of them, and the row of each.

Pages go by the runs' ids, those stored last first: a page costs one query by an index, however many
runs there are and however far back it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final
from urllib.parse import urlencode

from attrs import Factory, field, frozen
from starlette.datastructures import ImmutableMultiDict

from caxev.core.model import Copy, Run, RunId
from caxev.core.selection import Selection, SelectionError, source_of
from caxev.database import Database, id_from
from caxev.web.rendering import element_id, render, run_path
from caxev.web.scene import Scene

PAGE: Final = 50
MOST: Final = 500
COLUMNS: Final = 8
"""So many sites have a column of their own; of more, each run lists those that have a copy."""
PAGING: Final = frozenset({"before", "limit"})
"""The parts of an address beside conditions."""
_SHORT: Final = {"raw": "raw", "processed": "proc", "minitrees": "mini"}
_OBJECT_ID: Final = re.compile("[0-9a-f]{24}")


class BadFilter(Exception):
    """The address asks for runs in a way that means nothing. The message is for a person."""


@frozen
class Filter:
    """Which runs are asked for: conditions as the address has them, as `Selection.read` takes."""

    given: Mapping[str, Sequence[str]] = Factory(dict)

    @classmethod
    def of(cls, query: ImmutableMultiDict[str, str]) -> Filter:
        """Return the filter of an address's query, without what is left empty."""
        found: dict[str, list[str]] = {}
        for name, value in query.multi_items():
            if name not in PAGING and value.strip():
                found.setdefault(name, []).append(value.strip())
        return cls(found)

    def selection(self) -> Selection:
        """Return what to ask the database for. Raises `BadFilter`."""
        try:
            return Selection.read(self.given)
        except SelectionError as error:
            raise BadFilter(str(error)) from error

    def get(self, name: str) -> str:
        """Return a condition as the form shows it."""
        return ",".join(self.given.get(name, ()))

    def address(self, path: str, **more: str) -> str:
        """Return an address with this filter."""
        query = urlencode({**self.given, **more}, doseq=True, errors="surrogateescape")
        return f"{path}?{query}" if query else path


def id_of(path: str) -> RunId:
    """Return the run's id that an address has. Raises `BadFilter`."""
    try:
        found = id_from(f'{{"$oid": "{path}"}}' if _OBJECT_ID.fullmatch(path) else path)
        hash(found)  # an object or a list is no id
    except Exception as error:  # any error that a parser raises for an arbitrary text
        raise BadFilter("there is no such run") from error
    return found


@frozen
class Page:
    """A page of runs; `following` is the id after which the next one begins, None: the last."""

    documents: Sequence[Mapping[str, Any]]
    following: str | None = field(default=None)


async def read_page(
    database: Database, chosen: Filter, before: str | None, limit: int, now: datetime
) -> Page:
    """Read a page of the runs that match. Raises `BadFilter`, `DatabaseError`."""
    start = None if before is None else id_of(before)
    selection = chosen.selection()
    # One more than is shown: only then is there a next page.
    found = await database.newest_runs(selection, now, start, limit + 1)
    more = run_path(found[limit - 1]["_id"]) if len(found) > limit else None
    meant = [one for one in found[:limit] if selection.means(Run.from_document(one), now)]
    return Page(meant, more)


# -- rows -----------------------------------------------------------------------------------------


def row_id(run: RunId) -> str:
    """Return the id of a run's row."""
    return element_id("run", run_path(run))


def row(scene: Scene, document: Mapping[str, Any]) -> str:
    """Return a run's row, with a cell for each site."""
    run = Run.from_document(document)
    return render(
        "runs_row.html",
        id=row_id(run.id),
        run=run,
        source=source_of(run),
        short=_SHORT,
        cells=cells(run, columns(scene)),
        strip=() if columns(scene) else cells(run, dict.fromkeys(one.host for one in run.copies)),
    )


def columns(scene: Scene) -> list[str]:
    """Return the sites that have a column: all, or none if a page has no room for so many."""
    hosts = scene.hosts
    return hosts if len(hosts) <= COLUMNS else []


def cells(run: Run, sites: Iterable[str]) -> list[tuple[str, list[Copy]]]:
    """Return the copies of a run at each site: its raw data first."""
    found: dict[str, list[Copy]] = {}
    for copy in run.copies:
        found.setdefault(copy.host, []).append(copy)
    return [(site, sorted(found.get(site, ()), key=lambda c: c.type != "raw")) for site in sites]
