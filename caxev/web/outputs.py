"""The output of programs while a run's reactions ran, as far as the database keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final

import trio
from attrs import frozen
from markupsafe import Markup

from caxev.core.model import Event, RunId
from caxev.core.transcript import last_of
from caxev.database import Database
from caxev.web.rendering import lines
from caxev.web.state import LiveState

MOST: Final = 10
"""Number of reactions whose output is shown: the open ones, then the newest of the history."""
SHOWN: Final = 50_000
"""Characters of one reaction's output, the last ones."""


@frozen
class OutputRow:
    """The last output of the programs of one reaction."""

    at: datetime
    site: str
    handler: str
    event: Event | None
    state: str
    text: Markup


async def output_rows(state: LiveState, database: Database, run: RunId) -> list[OutputRow]:
    """Return the output that is kept of a run's reactions. Raises `DatabaseError`."""
    open_ = [one.reaction for one in state.of_run(run) if one.outputs][:MOST]
    kept = await database.open_outputs([one.id for one in open_])
    rows = [
        OutputRow(
            one.at, one.site, one.handler, one.event, one.state.value, await _text(*kept[id_])
        )
        for one in open_
        if (id_ := one.id) in kept
    ]
    past = await database.outputs(run, MOST - len(rows))
    return rows + [
        OutputRow(
            one.at,
            one.site,
            one.handler,
            one.event,
            one.deed.what,
            await _text(one.output, one.outputs),
        )
        for one in past
    ]


async def _text(parts: Sequence[bytes], number: int) -> Markup:
    # A hostile writer may have compressed a very long text.
    return lines(await trio.to_thread.run_sync(last_of, parts, number, SHOWN))
