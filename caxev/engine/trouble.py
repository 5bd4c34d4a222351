"""What ails the database, as any of a listener's tasks meets it.

The stream may go on while no write is confirmed, and the other way round: each task reports what it
meets, and what is over. `listener` makes a `Trouble` for each lease and the wait before it; it,
`watcher` and `dispatcher` report to it; metrics, alarms and ``caxev status`` show it.
"""

from __future__ import annotations

from datetime import datetime
from time import monotonic

from attrs import define, field
from loguru import logger

from caxev import metrics
from caxev.core.clock import utcnow
from caxev.database import DatabaseError


@define(eq=False)
class Trouble:
    """A site's trouble with the database: since when, and the last error of each task."""

    site: str
    _since: datetime | None = field(init=False, default=None)
    _at: float = field(init=False, default=0.0)
    _met: dict[str, str] = field(init=False, factory=dict)

    def meet(self, task: str, error: DatabaseError) -> None:
        """Report what a task has met; logged once, until all of it is over."""
        metrics.database_errors.labels(self.site, type(error).__name__).inc()
        if self._since is None:
            logger.warning("{}; trying again until it answers", error)
            self._since, self._at = utcnow(), monotonic()
        self._met[task] = str(error)
        self._show()

    def over(self, task: str) -> None:
        """Report that what a task met is over; nothing if it has met none."""
        self._met.pop(task, None)
        if self._since is not None and not self._met:
            logger.info("the database answers again")
            self._since = None
        self._show()

    def _show(self) -> None:
        metrics.troubled.labels(self.site).set(self._since is not None)
        since = 0 if self._since is None else self._since.timestamp()
        metrics.troubled_since.labels(self.site).set(since)

    def __bool__(self) -> bool:
        return self._since is not None

    @property
    def text(self) -> str | None:
        """What it is, and since when; None: there is none."""
        if self._since is None:
            return None
        return f"since {self._since:%Y-%m-%d %H:%M:%S} UTC: {next(iter(self._met.values()))}"

    @property
    def seconds(self) -> float:
        """For how long it has lasted; 0.0: there is none."""
        return 0.0 if self._since is None else monotonic() - self._at
