"""A run's page: its copies, what is still to be done, what happened, its document and output."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import trio
from attrs import frozen
from markupsafe import Markup

from caxev.core.errors import GiveUp
from caxev.core.history import HistoryRow
from caxev.core.ledger import Reaction
from caxev.core.model import Run, RunId
from caxev.core.selection import source_of
from caxev.core.transcript import last_of
from caxev.database import Database, HistorySearch
from caxev.web import listing
from caxev.web.acts.links import links_of
from caxev.web.documents import label_of
from caxev.web.jobs import job_rows
from caxev.web.listing import BadFilter
from caxev.web.rendering import lines, render
from caxev.web.scene import Scene

Owed: TypeAlias = Sequence[tuple[Reaction, Mapping[str, Any]]]
History: TypeAlias = Callable[[Run, Sequence[HistoryRow], Owed], Sequence[Mapping[str, Any]]]
"""Makes rows of what happened to a run, oldest first: time, site, handler, event, state, why."""

OUTPUTS: Final = 10
"""Number of reactions whose output is shown: the open ones, then the newest of the history."""
OUTPUT_SHOWN: Final = 50_000
"""Characters of one reaction's output, the last ones."""
RAW_SHOWN: Final = 100_000
"""Characters of a stored document that are shown."""


@frozen
class RunView:
    """Makes the parts of runs' pages; `history` makes rows of what happened."""

    scene: Scene
    database: Database
    history: History

    async def parts(self, path: str) -> dict[str, str]:
        """Return the parts of the page at a path. Raises `GiveUp` if there is no such run."""
        run_id = _id_of(path)
        found = (await self.database.runs([run_id])).get(run_id)
        if found is None:
            raise GiveUp("There is no such run.")
        self.scene.state.name(run_id, label_of(found.document))
        past = await self.database.history(HistorySearch(runs=[run_id]))
        return {"run": self._run(found, past)}

    async def outputs(self, path: str) -> list[tuple[Reaction | HistoryRow, str, Markup]]:
        """Return what programs last printed, as far as it is kept: reaction, its state, text.

        Raises `GiveUp` if that is no run's path, `DatabaseError`.
        """
        run = _id_of(path)
        open_ = [one.reaction for one in self.scene.state.of_run(run) if one.outputs][:OUTPUTS]
        kept = await self.database.open_outputs([one.id for one in open_])
        rows: list[tuple[Reaction | HistoryRow, str, Markup]] = [
            (one, one.state.value, await _text(*kept[one.id])) for one in open_ if one.id in kept
        ]
        past = await self.database.outputs(run, OUTPUTS - len(rows))
        return rows + [(one, one.deed.what, await _text(one.output, one.outputs)) for one in past]

    def _run(self, run: Run, past: Sequence[HistoryRow]) -> str:
        raw = json.dumps(run.document, indent=2, default=str, ensure_ascii=True)
        cut = f"\n… {len(raw) - RAW_SHOWN:,} more characters" if len(raw) > RAW_SHOWN else ""
        open_ = self.scene.state.of_run(run.id)
        owed: Owed = [(one.reaction, {}) for one in open_]
        rows = [
            {**row, "what": row.get("event"), "who": row.get("handler")}
            for row in reversed(self.history(run, past, owed))
        ]
        return render(
            "run_part.html",
            run=run,
            source=source_of(run),
            acts=links_of(run),
            copies=sorted(run.copies, key=lambda one: self.scene.sites.types.order(one.type)),
            open=open_,
            history=rows,
            jobs=list(job_rows(run, self.scene.sites)),
            has_output=any(one.outputs for one in open_) or any(one.outputs for one in past),
            raw=lines(raw[:RAW_SHOWN] + cut),
        )


def _id_of(path: str) -> RunId:
    try:
        return listing.id_of(path)
    except BadFilter as error:
        raise GiveUp(str(error)) from error


async def _text(parts: Sequence[bytes], number: int) -> Markup:
    # A hostile writer may have compressed a very long text.
    return lines(await trio.to_thread.run_sync(last_of, parts, number, OUTPUT_SHOWN))
