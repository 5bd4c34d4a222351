"""Send what changed in the database to viewers: views rendered again, rows and changes."""

from __future__ import annotations

from typing import Final

from attrs import define, field

from caxev.web import listing
from caxev.web.data import change_value
from caxev.web.feeder import Heard
from caxev.web.hub import Hub
from caxev.web.rendering import run_path
from caxev.web.scene import Scene

RUNS: Final = "runs"
EVENTS: Final = "api"
"""The views whose viewers get single rows: the list of runs, and ``/api/v1/events``."""


@define(eq=False)
class Broadcast:
    """Takes each batch that the feeder hears."""

    scene: Scene
    hub: Hub
    _last: int = field(init=False, default=0)
    _columns: list[str] = field(init=False, factory=list)

    def __call__(self, heard: Heard) -> None:
        """Show what has just changed."""
        self.hub.wake(*self._views(heard))
        self._send_rows(heard)
        self._send_changes()

    def _views(self, heard: Heard) -> list[str]:
        """Return the views that may have changed: of the pages of runs only some."""
        if heard.touched is None:
            return list(self.hub.topics)
        runs = {f"run:{run_path(one)}" for one in heard.touched}
        return [one for one in self.hub.topics if one in runs or not one.startswith("run:")]

    def _send_rows(self, heard: Heard) -> None:
        former, self._columns = self._columns, listing.columns(self.scene)
        if RUNS not in self.hub.topics:
            return
        if former != self._columns:
            self.hub.reload(RUNS)  # a row of other columns does not fit the table
            return
        rows = [
            {
                "id": listing.row_id(one["_id"]),
                "html": listing.row(self.scene, one),
                "fresh": one["_id"] in heard.new,
            }
            for one in heard.runs
        ]
        self.hub.send_rows(RUNS, "rows", rows)

    def _send_changes(self) -> None:
        changes, last = self.scene.state.runs.changes, self._last
        self._last = changes[-1].number if changes else last
        if EVENTS in self.hub.topics:
            new = [change_value(one) for one in changes if one.number > last]
            self.hub.send_rows(EVENTS, "changes", new)
