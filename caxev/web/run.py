"""A run's page: its copies, what is still to be done, what happened, and its document."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from attrs import frozen

from caxev.core.errors import GiveUp
from caxev.core.history import HistoryRow
from caxev.core.ledger import Reaction
from caxev.core.model import Run, RunId
from caxev.core.selection import source_of
from caxev.database import Database, HistorySearch
from caxev.web import listing
from caxev.web.acts.links import links_of
from caxev.web.documents import label_of
from caxev.web.jobs import job_rows
from caxev.web.listing import BadFilter
from caxev.web.outputs import OutputRow, output_rows
from caxev.web.rendering import lines, render
from caxev.web.scene import Scene

Owed: TypeAlias = Sequence[tuple[Reaction, Mapping[str, Any]]]
History: TypeAlias = Callable[[Run, Sequence[HistoryRow], Owed], Sequence[Mapping[str, Any]]]
"""Makes rows of what happened to a run, oldest first: time, site, handler, event, state, why."""

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

    async def outputs(self, path: str) -> list[OutputRow]:
        """Return what programs printed that is kept. Raises `GiveUp` if that is no run's path."""
        return await output_rows(self.scene.state, self.database, _id_of(path))

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
